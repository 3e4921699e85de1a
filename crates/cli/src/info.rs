//! `trapline info`: everything about a trace but its events.
//!
//! Owns both forms of the description, and [`print()`] for all verbs that read. Invariant: a reader of standard output that goes away is no error.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::{Value, json};
use trapline_trace::{Catalog, Chunk, Damage, FunctionRef, Reader, Unload};

use crate::{
    Outcome, color,
    pager::{self, Text},
    report::{DEFAULT_TRACE, duration, lost_json, warn},
};

/// Of the JSON description. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Tells everything about a trace: command, host, processes, modules, coverage, losses, size.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  trapline info -i trapline.data --json")]
pub(crate) struct Arguments {
    /// The trace.
    #[arg(short, long, default_value = DEFAULT_TRACE, value_name = "FILE")]
    input: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Reads the trace and describes it.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let (info, catalog, damage) = describe(&arguments.input)?;
    warn(&damage, &catalog);
    let text = if arguments.json { format!("{info}\n") } else { told(&info) };
    print(&text)?;
    Ok(Outcome::Good)
}

/// What `--json` prints.
pub(crate) fn describe(input: &Path) -> Result<(Value, Catalog, Damage)> {
    let mut reader = Reader::open(input)?;
    let mut catalog = Catalog::new();
    let (mut records, mut calls, mut first, mut last) = (0_u64, 0_u64, u64::MAX, 0_u64);
    let mut unloads = Vec::new();
    while let Some(chunk) = reader.next_chunk()? {
        if let Chunk::Unload(unload) = &chunk {
            unloads.push(*unload);
        }
        if let Some(events) = catalog.take(chunk) {
            records += u64::from(events.records);
            calls += u64::from(events.calls);
            (first, last) = (first.min(events.first_tsc), last.max(events.last_tsc));
        }
    }
    let meta = catalog.meta.clone().unwrap_or_default();
    let (traced, total, reasons) = census(&catalog);
    let record_ps = catalog.end.and_then(|end| end.record_ps);
    let info = json!({
        "version": JSON_VERSION, "trapline": meta.version, "host": meta.host, "kernel": meta.kernel, "cpu": meta.cpu,
        "command": meta.command, "started_unix_ns": meta.started_unix_ns, "options": meta.options,
        "duration_ns": catalog.clock().ns(last.saturating_sub(first)), "processes": catalog.processes.values().map(|process| json!({
            "pid": process.pid, "how": process.how, "executable": process.executable, "command": process.command,
            "status": catalog.exits.get(&process.id).and_then(|exit| exit.status),
        })).collect::<Vec<Value>>(),
        "threads": catalog.streams.len(), "thread_names": catalog.streams.values().map(|stream| json!({
            "pid": catalog.processes.get(&stream.process).map(|process| process.pid), "tid": stream.tid, "name": stream.name,
        })).collect::<Vec<Value>>(),
        "modules": catalog.modules.values().map(|module| json!({
            "path": module.path, "build_id": module.build_id, "functions": module.functions,
        })).collect::<Vec<Value>>(),
        "patches": patches(&catalog, &unloads, first), "traced": traced, "total": total, "untraced": reasons, "calls": calls, "records": records,
        "bytes": reader.offset(), "lost": lost_json(&catalog, reader.damage()), "overhead": record_ps.map(|record_ps| json!({
            "record_ps": record_ps, "total_ns": record_ps.saturating_mul(records) / 1000,
        })),
    });
    let damage = reader.damage().clone();
    Ok((info, catalog, damage))
}

/// Live patches, and when they came and went, from the first event.
fn patches(catalog: &Catalog, unloads: &[Unload], first: u64) -> Vec<Value> {
    let is_of_patch =
        |found: &FunctionRef<'_>| found.function.is_some_and(|function| function.untraced.as_deref() == Some("patch"));
    let modules: BTreeSet<u32> =
        catalog.functions().filter(is_of_patch).filter_map(|found| Some(found.module?.id)).collect();
    let clock = catalog.clock();
    let loads = catalog.loads.iter().filter(|load| modules.contains(&load.module));
    let since_first = |tsc: u64| clock.ns(tsc.saturating_sub(first));
    loads
        .map(|load| {
            let unload = unloads.iter().find(|unload| (unload.process, unload.module) == (load.process, load.module));
            json!({
                "name": catalog.modules.get(&load.module).map(|module| &module.path),
                "pid": catalog.processes.get(&load.process).map(|process| process.pid),
                "from_ns": since_first(load.tsc), "until_ns": unload.map(|unload| since_first(unload.tsc)),
            })
        })
        .collect()
}

/// How many functions are traced, how many there are, and why the others are not.
fn census(catalog: &Catalog) -> (u64, u64, BTreeMap<String, u64>) {
    let (mut traced, mut total, mut reasons) = (0, 0, BTreeMap::new());
    for function in catalog.functions().filter_map(|found| found.function) {
        total += 1;
        match &function.untraced {
            None => traced += 1,
            Some(reason) => *reasons.entry(reason.clone()).or_default() += 1,
        }
    }
    (traced, total, reasons)
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn told(info: &Value) -> String {
    let words = |value: &Value| {
        let words: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        words.join(" ")
    };
    let number = |key: &str| info[key].as_u64().unwrap_or(0);
    let text = |key: &str| info[key].as_str().unwrap_or_default();
    let mut told = format!(
        "command    {}\nhost       {}, {}, {}\ntrapline   {}\nduration   {}\ncalls      {} ({} records, {} bytes, {:.2} bytes a call)\nfunctions  {} of {} traced\n",
        words(&info["command"]),
        text("host"),
        text("kernel"),
        text("cpu"),
        text("trapline"),
        duration(number("duration_ns")),
        number("calls"),
        number("records"),
        number("bytes"),
        number("bytes") as f64 / number("calls").max(1) as f64,
        number("traced"),
        number("total")
    );
    for (reason, count) in info["untraced"].as_object().into_iter().flatten() {
        let _ = writeln!(told, "           {count} {reason}");
    }
    if let Some(record_ps) = info["overhead"]["record_ps"].as_u64() {
        let (record_ns, total) = (record_ps as f64 / 1e3, duration(info["overhead"]["total_ns"].as_u64().unwrap_or(0)));
        let _ = writeln!(told, "overhead   about {record_ns:.1} ns a record, {total} of the program's time");
    }
    let missing = color::missing();
    for (cause, count) in info["lost"].as_object().into_iter().flatten() {
        if count.as_u64().is_some_and(|count| count > 0) {
            let _ = writeln!(told, "{missing}lost       {count} {cause}{missing:#}");
        }
    }
    for process in info["processes"].as_array().into_iter().flatten() {
        let _ = writeln!(told, "process    {} {}", process["pid"], shortened(&words(&process["command"])));
    }
    let _ = writeln!(told, "threads    {}", number("threads"));
    for thread in info["thread_names"].as_array().into_iter().flatten() {
        let _ = writeln!(told, "thread     {} {}", thread["tid"], thread["name"].as_str().unwrap_or_default());
    }
    for patch in info["patches"].as_array().into_iter().flatten() {
        let until = patch["until_ns"].as_u64().map_or_else(String::new, |until| format!(" to {}", duration(until)));
        let from = duration(patch["from_ns"].as_u64().unwrap_or(0));
        let _ = writeln!(
            told,
            "patch      {} in {}, from {from}{until}",
            patch["name"].as_str().unwrap_or_default(),
            patch["pid"]
        );
    }
    for module in info["modules"].as_array().into_iter().flatten() {
        let _ = writeln!(
            told,
            "module     {} ({} functions)",
            module["path"].as_str().unwrap_or_default(),
            module["functions"]
        );
    }
    told
}

/// Writes to standard output. If nobody reads it any more, that is fine.
pub(crate) fn print(text: &str) -> Result<()> {
    pager::begin(Text::Whole);
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// A command as it fits a line; the whole of it is in the JSON.
fn shortened(command: &str) -> String {
    const CHARS: usize = 100;
    match command.char_indices().nth(CHARS) {
        Some((end, _)) => format!("{}...", &command[..end]),
        None => command.to_owned(),
    }
}
