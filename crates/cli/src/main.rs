//! The `trapline` command: one file a verb.
//!
//! Owns the command line and the exit status. A verb says how it went by an [`Outcome`]; an error says what was being done, what was found and
//! what to do next. Data goes to standard output, everything else to standard error.
//!
//! Exit status: 0 all is well; 1 the answer is bad (calls were missed, something cannot be recorded); 2 the command cannot be carried out as it was given; 3 something
//! failed on the way. `record` has the status of the program that it ran.
#![forbid(unsafe_code)]

mod diff;
#[cfg(target_arch = "x86_64")]
mod doctor;
mod export;
mod functions;
mod graph;
mod info;
mod names;
mod patch;
#[cfg(target_arch = "x86_64")]
mod record;
mod replay;
mod report;
mod stress;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Traces and live-patches running x86 code, 32 and 64 bit, without ever skipping a call.
#[derive(Debug, Parser)]
#[command(name = "trapline", version, arg_required_else_help = true, after_help = EXAMPLE)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLE: &str = "\
Record a program, and see where its time went:
  trapline record -- ls -lR /usr/share
  trapline report

Put the promise to the test on this machine, and then the old behaviour, which loses calls:
  trapline stress --seconds 10 --threads 4
  trapline stress --seconds 10 --threads 4 --resume skip";

#[derive(Debug, Subcommand)]
enum Verb {
    Diff(diff::Arguments),
    #[cfg(target_arch = "x86_64")]
    Doctor(doctor::Arguments),
    Export(export::Arguments),
    Functions(functions::Arguments),
    Graph(graph::Arguments),
    Info(info::Arguments),
    Patch(patch::Arguments),
    #[cfg(target_arch = "x86_64")]
    Record(record::Arguments),
    Replay(replay::Arguments),
    Report(report::Arguments),
    Stress(stress::Arguments),
}

/// How a verb went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    /// All is well.
    Good,
    /// It ran, and the answer is bad.
    Bad,
    /// A program ran, and this is its status.
    #[cfg(target_arch = "x86_64")]
    Program(u8),
}

/// A command that is well-formed, but cannot be carried out here.
#[derive(Debug)]
struct Refused(String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

const BAD: u8 = 1;
const REFUSED: u8 = 2;
const FAILED: u8 = 3;

fn main() -> ExitCode {
    // Usage errors end here, with status 2.
    let arguments = Arguments::parse();
    let outcome = match &arguments.verb {
        Verb::Diff(arguments) => diff::run(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::Doctor(arguments) => doctor::run(arguments),
        Verb::Export(arguments) => export::run(arguments),
        Verb::Functions(arguments) => functions::run(arguments),
        Verb::Graph(arguments) => graph::run(arguments),
        Verb::Info(arguments) => info::run(arguments),
        Verb::Patch(arguments) => patch::run(arguments),
        Verb::Replay(arguments) => replay::run(arguments),
        Verb::Report(arguments) => report::run(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::Record(arguments) => record::run(arguments),
        Verb::Stress(arguments) => stress::run(arguments),
    };
    match outcome {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Bad) => ExitCode::from(BAD),
        #[cfg(target_arch = "x86_64")]
        Ok(Outcome::Program(status)) => ExitCode::from(status),
        Err(error) => {
            eprintln!("trapline: {}", with_causes(&error));
            ExitCode::from(if error.is::<Refused>() { REFUSED } else { FAILED })
        }
    }
}

/// An error and what caused it, without the causes that the text holds already.
fn with_causes(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| {
        if text.is_empty() {
            cause
        } else if text.contains(&cause) {
            text
        } else {
            format!("{text}: {cause}")
        }
    })
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes_and_each_once() {
        let error = anyhow!("no such file").context("cannot open x: no such file").context("reading the list");
        assert_eq!(with_causes(&error), "reading the list: cannot open x: no such file");
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
