//! What people and programs see of a command that went wrong, and the status that it ends with.
//!
//! Owns both forms of an error and the statuses. Neighbours: `main` hands over what clap or a verb says. Invariant: an error is the last that is written to
//! standard error, also as JSON, where it is one line; standard output is left to data.

use std::{
    ffi::OsString,
    io::{self, Write as _, stderr},
};

use clap::Command;
use serde_json::json;

use crate::{Refused, color};

/// Of the JSON form. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// The command line is wrong, or cannot be carried out here.
const REFUSED: u8 = 2;

/// Something went wrong on the way.
const FAILED: u8 = 3;

/// Either, where the status is otherwise the program's: what `env`, `nohup` and `timeout` have for it.
pub(crate) const NOT_RUN: u8 = 125;

/// How errors of a command line are told.
pub(crate) struct Teller {
    /// As JSON.
    is_json: bool,
    /// The command line has its status from a program.
    runs_program: bool,
}

impl Teller {
    /// Judges the words of a command line, which may be wrong.
    pub(crate) fn new(command: &Command, given: &[OsString]) -> Self {
        let mut verb = command;
        let mut is_json = false;
        // What follows `--` is a program's.
        for word in given.iter().skip(1).take_while(|word| *word != "--") {
            is_json |= word == "--json";
            verb = verb.find_subcommand(word).unwrap_or(verb);
        }
        let knows_json = verb.get_arguments().any(|argument| argument.get_long() == Some("json"));
        Self { is_json: is_json && knows_json, runs_program: matches!(verb.get_name(), "record" | "top") }
    }

    /// Whether JSON was asked for.
    pub(crate) fn is_json(&self) -> bool {
        self.is_json
    }

    /// Tells what clap said: what was asked for, such as help, or what is wrong with the command line. Returns the status.
    pub(crate) fn command_line(&self, error: &clap::Error) -> u8 {
        if !error.use_stderr() {
            return match error.print() {
                Err(cause) if cause.kind() != io::ErrorKind::BrokenPipe => self
                    .failed(&anyhow::Error::new(cause).context("cannot write to standard output"), self.runs_program),
                _ => 0,
            };
        }
        if self.is_json {
            let text = error.render().to_string();
            Self::tell_json(REFUSED, "usage", text.strip_prefix("error: ").unwrap_or(&text).trim_end(), None);
        } else {
            let _ = error.print();
        }
        status(REFUSED, self.runs_program)
    }

    /// Tells an error of a verb. Returns the status. `is_program`: whether a program's status is waited for.
    pub(crate) fn failed(&self, error: &anyhow::Error, is_program: bool) -> u8 {
        let (status, kind) = if error.is::<Refused>() { (REFUSED, "refused") } else { (FAILED, "failed") };
        let status = self::status(status, is_program);
        let text = with_causes(error);
        if self.is_json {
            Self::tell_json(status, kind, &text, system_error(error));
        } else {
            let style = color::error();
            let _ = writeln!(stderr(), "{style}trapline:{style:#} {text}");
        }
        status
    }

    fn tell_json(status: u8, kind: &str, message: &str, system_error: Option<i32>) {
        let error = json!({ "kind": kind, "status": status, "message": message, "errno": system_error });
        let _ = writeln!(stderr(), "{}", json!({ "version": JSON_VERSION, "error": error }));
    }
}

/// The status, of our own or where it is otherwise a program's.
fn status(own: u8, is_program: bool) -> u8 {
    if is_program { NOT_RUN } else { own }
}

/// The number of the system's error that is behind this one.
fn system_error(error: &anyhow::Error) -> Option<i32> {
    error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())
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
    use clap::CommandFactory as _;

    use super::*;
    use crate::Arguments;

    #[test]
    fn an_error_is_told_with_its_causes_and_each_once() {
        let error = anyhow!("no such file").context("cannot open x: no such file").context("reading the list");
        assert_eq!(with_causes(&error), "reading the list: cannot open x: no such file");
    }

    #[test]
    fn json_is_told_where_the_verb_knows_it_and_was_asked_for_it() {
        let is_json = |line: &str| {
            let given: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            Teller::new(&Arguments::command(), &given).is_json
        };
        for line in ["trapline report --json", "trapline patch show --json", "trapline report --nonsense --json"] {
            assert!(is_json(line), "{line}");
        }
        for line in ["trapline report", "trapline --json", "trapline record -- ls --json", "trapline graph -- --json"] {
            assert!(!is_json(line), "{line}");
        }
    }
}
