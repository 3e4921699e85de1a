//! `trapline doctor`: what keeps programs from being recorded here, and what to do about it.
//!
//! Owns both forms of the answer; what is looked at, and the words, are the recorder's ([`machine`], [`refusal`]), so that `record` says the same. Invariant:
//! nothing of the process that is asked about is touched.

use std::{fmt::Write as _, fs};

use anyhow::Result;
use clap::Args;
use serde_json::json;
use trapline_record::{
    machine::{self, Finding, Level},
    refusal::{self, Refusal},
};

use crate::{Outcome, info::print};

/// Of the JSON answer. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

const EXAMPLES: &str = "\
Examples:
  trapline doctor
  trapline doctor -p 1234

The exit status is 0 if it can be recorded, and 1 if something is in the way.";

/// Tells what keeps programs, or a process, from being recorded, and what to do about it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Ask about this process, which is not touched
    #[arg(short, long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Looks, and tells.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let machine = machine::look();
    let process = arguments.pid.map(Process::of);
    let text = if arguments.json {
        format!("{}\n", as_json(&machine, process.as_ref()))
    } else {
        process.as_ref().map_or_else(|| told(&machine), |process| process.told(&machine))
    };
    print(&text)?;
    Ok(if can_record(&machine, process.as_ref()) { Outcome::Good } else { Outcome::Bad })
}

/// A process that is asked about.
struct Process {
    pid: i32,
    name: String,
    refusals: Vec<Refusal>,
}

impl Process {
    fn of(pid: i32) -> Self {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Self { pid, name: name.trim_end().to_owned(), refusals: refusal::diagnose(pid) }
    }

    fn told(&self, machine: &[Finding]) -> String {
        let Self { pid, name, refusals } = self;
        let name = if name.is_empty() { String::new() } else { format!(" ({name})") };
        if can_record(machine, Some(self)) {
            return format!("process {pid}{name} can be recorded: trapline record -p {pid}\n");
        }
        let mut told = format!("process {pid}{name} cannot be recorded\n");
        for refusal in refusals {
            let _ = writeln!(told, "{:<18} {refusal}", refusal.name());
        }
        for finding in machine.iter().filter(|finding| finding.level == Level::Prevents) {
            let _ = writeln!(told, "{:<18} {}", finding.name, finding.text);
        }
        told
    }
}

fn can_record(machine: &[Finding], process: Option<&Process>) -> bool {
    machine.iter().all(|finding| finding.level < Level::Prevents)
        && process.is_none_or(|process| process.refusals.is_empty())
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Fine => "fine",
        Level::Limits => "limits",
        Level::Prevents => "prevents",
    }
}

fn told(machine: &[Finding]) -> String {
    let mut told = String::new();
    for Finding { name, level, text } in machine {
        let _ = writeln!(told, "{:<9} {name:<18} {text}", word(*level));
    }
    told += if can_record(machine, None) {
        "Programs can be recorded here; `trapline doctor -p PID` tells about a process that runs.\n"
    } else {
        "Nothing can be recorded here.\n"
    };
    told
}

fn as_json(machine: &[Finding], process: Option<&Process>) -> serde_json::Value {
    let findings: Vec<_> = machine
        .iter()
        .map(|finding| json!({ "name": finding.name, "level": word(finding.level), "text": finding.text }))
        .collect();
    let of_process = process.map(|process| {
        let refusals: Vec<_> = process
            .refusals
            .iter()
            .map(|refusal| json!({ "name": refusal.name(), "text": refusal.to_string() }))
            .collect();
        json!({ "pid": process.pid, "name": process.name, "refusals": refusals })
    });
    let can_record = can_record(machine, process);
    json!({ "version": JSON_VERSION, "can_record": can_record, "machine": findings, "process": of_process })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_prevents_is_told_for_a_process_too() {
        let finding = |level| Finding { name: "ptrace", level, text: "what to do".to_owned() };
        let process = Process { pid: 7, name: "prog".to_owned(), refusals: Vec::new() };
        let fine = [finding(Level::Fine), finding(Level::Limits)];
        assert!(can_record(&fine, Some(&process)));
        assert!(process.told(&fine).contains("process 7 (prog) can be recorded"));
        let bad = [finding(Level::Prevents)];
        assert!(!can_record(&bad, Some(&process)) && !can_record(&bad, None));
        assert!(process.told(&bad).contains("cannot be recorded") && process.told(&bad).contains("what to do"));
        assert_eq!(as_json(&bad, Some(&process))["can_record"], false);
        assert!(told(&bad).contains("Nothing can be recorded here"));
    }
}
