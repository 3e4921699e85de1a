//! `trapline patch apply`, `revert`, `list`, `status` and `symbols`: live patches in a running process.
//!
//! Owns their options and what they print. What is refused and why comes from [`trapline_record::live`].

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};
use trapline_record::live::{self, Done, How, Listed, LiveError};

use crate::{Outcome, Refused, info::print, patch};

/// Of the JSON output. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Puts a patch into a running process: all of it, and only when nobody is in a function that it replaces.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  trapline patch apply -p 1234 fix.tlp --deadline 10")]
pub(crate) struct ApplyArguments {
    /// The process.
    #[arg(short, long, value_name = "PID")]
    pid: i32,
    /// The patch file.
    #[arg(value_name = "FIX.tlp")]
    file: PathBuf,
    /// Give up if somebody is still in a replaced function after so many seconds. The process runs on meanwhile.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    deadline: f64,
    /// Check everything, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Apply what is refused because it may go wrong. The patch cannot be reverted then.
    #[arg(long)]
    force: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Takes a patch back: the old functions are as they were, and no memory of the patch is left.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  trapline patch revert -p 1234 fix")]
pub(crate) struct RevertArguments {
    /// The process.
    #[arg(short, long, value_name = "PID")]
    pid: i32,
    /// The patch; may be left out if there is one.
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Give up if somebody is still in its functions after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    deadline: f64,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Tells which patches a process has; `status` also where their functions are.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  trapline patch list -p 1234\n  trapline patch status -p 1234 --json")]
pub(crate) struct ListArguments {
    /// The process.
    #[arg(short, long, value_name = "PID")]
    pid: i32,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Writes what a debugger needs to know of the patches of a process, and prints the commands by which gdb reads it.
#[derive(Debug, Args)]
#[command(after_help = SYMBOLS_HELP)]
pub(crate) struct SymbolsArguments {
    /// The process; it may be in a debugger already.
    #[arg(short, long, value_name = "PID")]
    pid: i32,
    /// The folder for a file of each patch.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// Print one JSON object instead of commands.
    #[arg(long)]
    json: bool,
}

const SYMBOLS_HELP: &str = "\
The files are for this process only: another one has the patches at other addresses.

Example:
  trapline patch symbols -p 1234 symbols > patches.gdb
  gdb -p 1234 -x patches.gdb";

pub(crate) fn apply(arguments: &ApplyArguments) -> Result<Outcome> {
    let patch = patch::read(&arguments.file)?;
    let how = How { deadline: seconds(arguments.deadline)?, is_dry_run: arguments.dry_run, is_forced: arguments.force };
    let started = Instant::now();
    let done = live::apply(arguments.pid, &patch, how).map_err(refused)?;
    let what = if arguments.dry_run { "could apply" } else { "applied" };
    tell(what, arguments.pid, &done, started.elapsed(), arguments.json)
}

pub(crate) fn revert(arguments: &RevertArguments) -> Result<Outcome> {
    let started = Instant::now();
    let deadline = seconds(arguments.deadline)?;
    let done = live::revert(arguments.pid, arguments.name.as_deref(), deadline).map_err(refused)?;
    tell("reverted", arguments.pid, &done, started.elapsed(), arguments.json)
}

pub(crate) fn list(arguments: &ListArguments, is_long: bool) -> Result<Outcome> {
    let active = live::list(arguments.pid).map_err(refused)?;
    let text = if arguments.json {
        let patches: Vec<Value> = active.iter().map(described).collect();
        format!("{}\n", json!({ "version": JSON_VERSION, "pid": arguments.pid, "patches": patches }))
    } else if active.is_empty() {
        format!("process {} has no patches\n", arguments.pid)
    } else {
        active.iter().map(|listed| told(listed, is_long)).collect()
    };
    print(&text)?;
    Ok(Outcome::Good)
}

pub(crate) fn symbols(arguments: &SymbolsArguments) -> Result<Outcome> {
    let folder = &arguments.folder;
    let files = live::symbol_files(arguments.pid).map_err(refused)?;
    let unwritable = || format!("cannot write to {}", folder.display());
    fs::create_dir_all(folder).with_context(unwritable)?;
    let folder = folder.canonicalize().with_context(unwritable)?;
    let mut written = Vec::new();
    for (patch, file) in &files {
        // Patches of several files may have the same name, and a name may be anything.
        let path = folder.join(format!("{}-{:x}.debug", patch.name.replace('/', "_"), patch.at));
        let bytes = file.encode().with_context(|| format!("describing {}", patch.name))?;
        fs::write(&path, bytes).with_context(|| format!("cannot write to {}", path.display()))?;
        written.push((patch, path));
    }
    let text = if arguments.json {
        let described = written.iter().map(|(patch, path)| json!({ "name": patch.name, "file": path }));
        let files: Vec<Value> = described.collect();
        format!("{}\n", json!({ "version": JSON_VERSION, "pid": arguments.pid, "files": files }))
    } else {
        let mut commands = String::new();
        for (_, path) in &written {
            let _ = writeln!(commands, "add-symbol-file {}", for_gdb(path));
        }
        commands
    };
    print(&text)?;
    Ok(Outcome::Good)
}

/// A path as one word of a command of gdb.
fn for_gdb(path: &Path) -> String {
    let escaped = path.to_string_lossy().replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{escaped}\"")
}

fn seconds(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| Refused(format!("--deadline {seconds}: {error}")).into())
}

fn refused(error: LiveError) -> anyhow::Error {
    if matches!(error, LiveError::System { .. } | LiveError::ByRecorder { is_failure: true, .. }) {
        error.into()
    } else {
        Refused(error.to_string()).into()
    }
}

fn tell(what: &str, pid: i32, done: &Done, took: Duration, as_json: bool) -> Result<Outcome> {
    let Done { patch, replaced, stops, longest_stop, let_out } = done;
    let text = if as_json {
        let value = json!({
            "version": JSON_VERSION, "done": what, "pid": pid, "name": patch.name, "functions": patch.functions.len(),
            "replaced": replaced, "let_out": let_out,
            "tainted": patch.is_tainted, "stops": stops, "longest_stop_ns": u64::try_from(longest_stop.as_nanos())?,
            "took_ns": u64::try_from(took.as_nanos())?,
        });
        format!("{value}\n")
    } else {
        let stop_ms = longest_stop.as_secs_f64() * 1e3;
        let functions = patch.functions.len();
        let instead = replaced.as_ref().map_or_else(String::new, |name| format!(" in place of {name}"));
        format!(
            "{what} {}{instead}: {functions} functions of process {pid}, {stops} stops, the longest of {stop_ms:.2} ms\n",
            patch.name
        )
    };
    print(&text)?;
    Ok(Outcome::Good)
}

fn described(listed: &Listed) -> Value {
    let Listed { status, patch, unaware } = listed;
    json!({
        "name": patch.name, "status": status.code(), "target": patch.target, "build_id": patch.build_id, "tainted": patch.is_tainted,
        "applied_unix_s": patch.applied_unix_s, "address": patch.at, "bytes": patch.len_bytes,
        "functions": patch.functions.iter().map(|function| json!({
            "name": function.name, "old": function.old, "new": function.new,
        })).collect::<Vec<_>>(),
        "unaware": unaware,
        "pins": patch.pins.iter().map(|pin| &pin.name).collect::<Vec<_>>(),
    })
}

fn told(listed: &Listed, is_long: bool) -> String {
    let Listed { status, patch, unaware } = listed;
    let tainted = if patch.is_tainted { ", tainted (--force)" } else { "" };
    let functions = patch.functions.len();
    let mut told = format!("{}: {}{tainted}, {functions} functions of {}\n", patch.name, status.code(), patch.target);
    for unwinder in unaware {
        let _ = writeln!(
            told,
            "  {unwinder} was loaded later and does not know the new code: an exception that goes through it ends the process; apply the patch again"
        );
    }
    if is_long {
        let _ = writeln!(told, "  build-id {}\n  {} bytes at {:#x}", patch.build_id, patch.len_bytes, patch.at);
        let lines = patch
            .functions
            .iter()
            .map(|function| format!("  {}: {:#x} leads to {:#x}\n", function.name, function.old, function.new));
        told.extend(lines);
        told.extend(patch.pins.iter().map(|pin| format!("  pins {}\n", pin.name)));
    }
    told
}
