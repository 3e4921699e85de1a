//! `trapline patch apply`, `revert`, `list` and `status`: live patches in a running process.
//!
//! Owns their options and what they print. What is refused and why comes from [`trapline_record::live`].

use std::{
    fmt::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use trapline_record::live::{self, Active, Done, How, LiveError, Status};

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
        let patches: Vec<Value> = active.iter().map(|(status, patch)| described(*status, patch)).collect();
        format!("{}\n", json!({ "version": JSON_VERSION, "pid": arguments.pid, "patches": patches }))
    } else if active.is_empty() {
        format!("process {} has no patches\n", arguments.pid)
    } else {
        active.iter().map(|(status, patch)| told(*status, patch, is_long)).collect()
    };
    print(&text)?;
    Ok(Outcome::Good)
}

fn seconds(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| Refused(format!("--deadline {seconds}: {error}")).into())
}

fn refused(error: LiveError) -> anyhow::Error {
    if matches!(error, LiveError::System { .. }) { error.into() } else { Refused(error.to_string()).into() }
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

fn described(status: Status, patch: &Active) -> Value {
    json!({
        "name": patch.name, "status": status.code(), "target": patch.target, "build_id": patch.build_id, "tainted": patch.is_tainted,
        "applied_unix_s": patch.applied_unix_s, "address": patch.at, "bytes": patch.len_bytes,
        "functions": patch.functions.iter().map(|function| json!({
            "name": function.name, "old": function.old, "new": function.new,
        })).collect::<Vec<_>>(),
        "pins": patch.pins.iter().map(|pin| &pin.name).collect::<Vec<_>>(),
    })
}

fn told(status: Status, patch: &Active, is_long: bool) -> String {
    let tainted = if patch.is_tainted { ", tainted (--force)" } else { "" };
    let functions = patch.functions.len();
    let mut told = format!("{}: {}{tainted}, {functions} functions of {}\n", patch.name, status.code(), patch.target);
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
