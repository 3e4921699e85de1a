//! `trapline functions`: every function of an executable or of a trace: traced, or the reason why not.
//!
//! Owns the options and both forms of the list. What is listed comes as [`Listed`], from either source.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};
use trapline_image::Image;
use trapline_trace::{Catalog, Reader};

use crate::{
    Outcome, color,
    info::print,
    report::{DEFAULT_TRACE, warn},
};

/// Of the JSON list. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Lists every function of an executable or a trace: traced, or the reason why not.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  trapline functions --untraced\n  trapline functions /usr/bin/bash")]
pub(crate) struct Arguments {
    /// An executable or a library: which of its functions can be traced. Without one, the trace's are listed.
    #[arg(value_name = "FILE", conflicts_with = "input")]
    executable: Option<PathBuf>,
    /// The trace.
    #[arg(short, long, default_value = DEFAULT_TRACE, value_name = "FILE")]
    input: PathBuf,
    /// Only those that are not traced.
    #[arg(long)]
    untraced: bool,
    /// Print one JSON object instead of a list.
    #[arg(long)]
    json: bool,
}

/// A function of the list.
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) module: String,
    pub(crate) address: u64,
    pub(crate) size: u64,
    pub(crate) reason: Option<String>,
    pub(crate) detail: String,
}

/// Prints the list.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    if let Some(executable) = &arguments.executable {
        print(&shown(&of_executable(executable)?, arguments.untraced, arguments.json))?;
        return Ok(Outcome::Good);
    }
    let (catalog, damage) = read_catalog(&arguments.input)?;
    let listed: Vec<Listed> = catalog
        .functions()
        .filter_map(|found| {
            let function = found.function?;
            Some(Listed {
                name: function.name.clone(),
                module: found.module_path().to_owned(),
                address: function.address,
                size: function.size,
                reason: function.untraced.clone(),
                detail: function.detail.clone(),
            })
        })
        .collect();
    warn(&damage, &catalog);
    print(&shown(&listed, arguments.untraced, arguments.json))?;
    Ok(Outcome::Good)
}

/// The functions of a file, as the recorder would arm them.
fn of_executable(path: &Path) -> Result<Vec<Listed>> {
    let image = Image::open(path).with_context(|| format!("looking for the functions of {}", path.display()))?;
    if image.is_cut() {
        let style = color::warning();
        eprintln!(
            "{style}trapline:{style:#} {} is shorter than its headers say; functions behind its end are missing",
            path.display()
        );
    }
    let module = path.to_string_lossy();
    let listed = image.functions().iter().map(|function| {
        let (reason, detail) = function.untraced().unzip();
        Listed {
            name: function.name.clone(),
            module: module.clone().into_owned(),
            address: function.address,
            size: function.size,
            reason: reason.map(str::to_owned),
            detail: detail.unwrap_or_default(),
        }
    });
    Ok(listed.collect())
}

/// Reads all of a trace but its events.
pub(crate) fn read_catalog(input: &Path) -> Result<(Catalog, trapline_trace::Damage)> {
    let mut reader = Reader::open(input)?;
    let mut catalog = Catalog::new();
    while let Some(chunk) = reader.next_chunk()? {
        catalog.take(chunk);
    }
    Ok((catalog, reader.damage().clone()))
}

/// The list as text or JSON.
pub(crate) fn shown(listed: &[Listed], untraced: bool, json: bool) -> String {
    let traced = listed.iter().filter(|function| function.reason.is_none()).count();
    let selected = listed.iter().filter(|function| !untraced || function.reason.is_some());
    if json {
        let functions: Vec<Value> = selected
            .map(|function| {
                json!({
                    "name": function.name, "module": function.module, "address": function.address, "size": function.size,
                    "traced": function.reason.is_none(), "reason": function.reason,
                })
            })
            .collect();
        let list = json!({ "version": JSON_VERSION, "functions": functions, "traced": traced, "total": listed.len() });
        return format!("{list}\n");
    }
    let mut text = String::new();
    for function in selected {
        let state = function.reason.as_deref().unwrap_or("traced");
        let detail = if function.detail.is_empty() { String::new() } else { format!(": {}", function.detail) };
        let _ = writeln!(
            text,
            "{:#14x} {:>8} {state:<20} {} [{}]{detail}",
            function.address, function.size, function.name, function.module
        );
    }
    text + &format!("{traced} of {} functions are traced\n", listed.len())
}
