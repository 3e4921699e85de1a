//! The `trapline` command: one file a verb.
//!
//! Owns the command line and the exit status. A verb says how it went by an [`Outcome`]; an error says what was being done, what was found and
//! what to do next. Data goes to standard output, everything else to standard error.
//!
//! Exit status: 0 all is well; 1 the answer is bad (calls were missed, something cannot be recorded); 2 the command cannot be carried out as it was given; 3 something
//! failed on the way. `record` and `top` have the status of the program that they ran, and 125 instead of 2 and 3. `docs/command-line.md` tells it to users.
#![forbid(unsafe_code)]

mod cargo;
mod color;
mod config;
mod diff;
mod doctor;
#[cfg(target_arch = "x86_64")]
mod export;
mod failure;
mod functions;
mod graph;
#[cfg(target_arch = "x86_64")]
mod html;
mod info;
#[cfg(target_arch = "x86_64")]
mod live;
mod names;
mod pager;
#[cfg(target_arch = "x86_64")]
mod partition;
mod patch;
mod record;
mod replay;
mod report;
mod shell;
#[cfg(target_arch = "x86_64")]
mod sql;
mod stress;
#[cfg(target_arch = "x86_64")]
mod top;

use std::{env::args_os, ffi::OsString, process::ExitCode};

use clap::{ColorChoice, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use config::Config;
use failure::Teller;

/// Traces and live-patches running x86 code, 32 and 64 bit, without ever skipping a call.
#[derive(Debug, Parser)]
#[command(name = "trapline", version, subcommand_required = true, after_help = EXAMPLE)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
    /// When to show headings and warnings in colours; by itself where they are read on a terminal, and `NO_COLOR` is not set
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t = ColorChoice::Auto)]
    color: ColorChoice,
    /// Print to a terminal without a pager, which is $PAGER, or else `less`
    #[arg(long, global = true)]
    no_pager: bool,
}

const EXAMPLE: &str = "\
Record a program, and see where its time went:
  trapline record -- ls -lR /usr/share
  trapline report

Put the promise to the test on this machine, and then the old behaviour, which loses calls:
  trapline stress --seconds 10 --threads 4
  trapline stress --seconds 10 --threads 4 --resume skip

Exit status: 0 all is well; 1 the answer is bad; 2 the command line is wrong or cannot be carried out here; 3 something failed on the way. `record` has that of its program,
127 or 126 if it was not found or is not executable, and 125 if trapline could not run it. With --json, errors are a JSON object, the last line of standard error.";

/// What is shown without arguments.
const WAY: &str = "\
trapline records the functions of programs that nobody prepared, without ever skipping a call.

  trapline record -- ls -lR /usr/share    record a program, or with -p PID one that runs
  trapline report                         see where its time went
  trapline html                           the same in a browser, with flame graph and timeline
  trapline export                         open it in a viewer: ui.perfetto.dev

`trapline --help` lists all verbs, `trapline VERB --help` has examples of each, and `trapline doctor` tells what is in the way on this machine.
";

#[derive(Debug, Subcommand)]
enum Verb {
    Completions(shell::CompletionsArguments),
    Diff(diff::Arguments),
    Doctor(doctor::Arguments),
    #[cfg(target_arch = "x86_64")]
    Export(export::Arguments),
    Functions(functions::Arguments),
    Graph(graph::Arguments),
    #[cfg(target_arch = "x86_64")]
    Html(html::Arguments),
    Info(info::Arguments),
    Man(shell::ManArguments),
    Patch(patch::Arguments),
    Record(record::Arguments),
    Replay(replay::Arguments),
    Report(report::Arguments),
    #[cfg(target_arch = "x86_64")]
    Sql(sql::Arguments),
    Stress(stress::Arguments),
    #[cfg(target_arch = "x86_64")]
    Top(top::Arguments),
}

impl Verb {
    /// Whether the verb prints what people read at length.
    fn has_pages(&self) -> bool {
        match self {
            Self::Diff(_) | Self::Functions(_) | Self::Graph(_) | Self::Info(_) | Self::Replay(_) | Self::Report(_) => {
                true
            }
            #[cfg(target_arch = "x86_64")]
            Self::Sql(_) => true,
            Self::Patch(arguments) => arguments.is_show(),
            _ => false,
        }
    }

    /// Whether the status is that of a program that the verb runs.
    fn has_program(&self) -> bool {
        match self {
            Self::Record(arguments) => arguments.has_program(),
            #[cfg(target_arch = "x86_64")]
            Self::Top(arguments) => arguments.has_program(),
            _ => false,
        }
    }
}

/// How a verb went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    /// All is well.
    Good,
    /// It ran, and the answer is bad.
    Bad,
    /// A program ran, and this is its status.
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
const NO_VERB: u8 = 2;

fn main() -> ExitCode {
    let given: Vec<OsString> = args_os().collect();
    if let Some(failure) = cargo::as_wrapper(&given) {
        eprintln!("trapline: {failure}");
        return ExitCode::from(BAD);
    }
    if given.len() <= 1 {
        eprint!("{WAY}");
        return ExitCode::from(NO_VERB);
    }
    let teller = Teller::new(&Arguments::command(), &given);
    // Help is there also where the configuration is wrong.
    let (config, wrong) = Config::read().map_or_else(|wrong| (Config::default(), Some(wrong)), |config| (config, None));
    let color = color::asked_for(given.iter().filter_map(|word| word.to_str())).or(config.color).unwrap_or_default();
    let matches = config.applied_to(Arguments::command()).color(color).try_get_matches_from(&given);
    let arguments = match matches.and_then(|matches| Arguments::from_arg_matches(&matches)) {
        Ok(arguments) => arguments,
        Err(error) => return ExitCode::from(teller.command_line(&error)),
    };
    if let Some(wrong) = wrong {
        return ExitCode::from(teller.failed(&wrong, arguments.verb.has_program()));
    }
    color::choose(if teller.is_json() { ColorChoice::Never } else { arguments.color });
    if arguments.verb.has_pages() && !arguments.no_pager && !teller.is_json() {
        pager::want(config.pager);
    }
    let outcome = run(&arguments.verb);
    pager::end();
    match outcome {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Bad) => ExitCode::from(BAD),
        Ok(Outcome::Program(status)) => ExitCode::from(status),
        Err(error) => ExitCode::from(teller.failed(&error, arguments.verb.has_program())),
    }
}

fn run(verb: &Verb) -> anyhow::Result<Outcome> {
    match verb {
        Verb::Completions(arguments) => shell::completions(arguments),
        Verb::Diff(arguments) => diff::run(arguments),
        Verb::Doctor(arguments) => doctor::run(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::Export(arguments) => export::run(arguments),
        Verb::Functions(arguments) => functions::run(arguments),
        Verb::Graph(arguments) => graph::run(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::Html(arguments) => html::run(arguments),
        Verb::Info(arguments) => info::run(arguments),
        Verb::Man(arguments) => shell::man(arguments),
        Verb::Patch(arguments) => patch::run(arguments),
        Verb::Record(arguments) => record::run(arguments),
        Verb::Replay(arguments) => replay::run(arguments),
        Verb::Report(arguments) => report::run(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::Sql(arguments) => sql::run(arguments),
        Verb::Stress(arguments) => stress::run(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::Top(arguments) => top::run(arguments),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
