//! `cargo xtask manual`: the pages of the manual are followed, command by command.
//!
//! A page's `sh` blocks are one session of a shell, in an empty folder, with `trapline` in the path; a `text` block behind one of them is what people are shown, and has to be among what it
//! printed. [`page`] reads a page, [`follow`] runs it, [`mod@reference`] writes the page that the command line itself knows best, and [`links`] finds pages that nothing leads to and links that
//! lead nowhere. Negative controls are in the tests of these: a command that fails, and words that are not printed, are found.
//!
//! Invariant: each command of each page is run, or the page says why not, and that is printed.

mod follow;
mod links;
mod page;
mod reference;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{fidelity, packages, workspace_root};

/// What pages use beyond a compiler.
const NEEDS: [packages::Need; 5] = [
    ("/usr/bin/jq", "jq"),
    ("/usr/bin/python3", "python3"),
    ("/usr/bin/man", "man-db"),
    ("/usr/bin/uftrace", "uftrace"),
    ("/usr/bin/gdb", "gdb"),
];

/// What of `manual` the user asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// The command that pages mean; the one that the tests have built unless said.
    pub(crate) command: Option<PathBuf>,
    /// Write the reference anew, and follow nothing.
    pub(crate) write: bool,
    /// Names of pages, or all.
    pub(crate) pages: Vec<String>,
}

/// The blocks of commands of a text.
///
/// # Errors
/// It is no page: a sentence for the author.
pub(crate) fn commands(text: &str) -> Result<Vec<String>, String> {
    Ok(page::parse(text)?.blocks.into_iter().map(|block| block.commands).collect())
}

/// Follows pages, and prints what became of each.
pub(crate) fn run(asked: &Asked) -> Result<ExitCode> {
    let docs = workspace_root().join("docs");
    let trapline = match &asked.command {
        Some(path) => path.canonicalize().with_context(|| format!("looking for {}", path.display()))?,
        None => fidelity::build_trapline(fidelity::Build::Test)?,
    };
    let reference = reference::of(&trapline)?;
    let written = docs.join(reference::PAGE);
    if asked.write {
        fs::write(&written, reference).with_context(|| format!("writing {}", written.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let names = wanted(&docs, &asked.pages)?;
    packages::ensure(&NEEDS)?;
    let mut failed = 0;
    for name in &names {
        let text = fs::read_to_string(docs.join(name)).with_context(|| format!("reading docs/{name}"))?;
        let verdict = page::parse(&text).map_err(anyhow::Error::msg).and_then(|page| follow::page(&page, &trapline));
        match verdict {
            Ok(done) if done.commands == 0 && done.left_out.is_empty() => {}
            Ok(done) => {
                println!(
                    "{name}: {} blocks of commands followed, {} shown, {:.1} s",
                    done.commands, done.shown, done.seconds
                );
                for (line, why) in &done.left_out {
                    println!("    line {line} is not followed: {why}");
                }
            }
            Err(error) => {
                failed += 1;
                println!("{name}: {error:#}");
            }
        }
    }
    if asked.pages.is_empty() && fs::read_to_string(&written).unwrap_or_default() != reference {
        failed += 1;
        println!("{}: is not what the command line says; `cargo xtask manual --write` writes it", reference::PAGE);
    }
    println!("pages: {} followed, {failed} failed", names.len());
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The pages' files under `docs`, in their order.
fn wanted(docs: &Path, asked: &[String]) -> Result<Vec<String>> {
    let summary = fs::read_to_string(docs.join(links::SUMMARY)).context("reading docs/SUMMARY.md")?;
    let mut pages: Vec<String> = links::targets(&summary).map(|(_, target)| target.to_owned()).collect();
    ensure!(!pages.is_empty(), "the manual has no pages");
    if !asked.is_empty() {
        if let Some(unknown) = asked.iter().find(|name| !pages.contains(name)) {
            bail!("`{unknown}` is no page of the manual; there are {}", pages.join(", "));
        }
        pages.retain(|page| asked.contains(page));
    }
    Ok(pages)
}
