//! A program with and without trapline: the same to everybody who looks.
//!
//! Owns [`Check`]. For each optimisation level, the program runs bare, recorded, and recorded with all of its libraries. Outputs, exit status and signal
//! have to be the same, and the trace has to have as many calls as the program says it made.

use std::{ffi::OsString, path::Path};

use crate::{
    compare,
    program::{Optimised, Program},
    run::{Command, Outcome},
    scratch::Scratch,
    trace::Report,
    trapline,
};

/// What is recorded beside the main executable: a name, and options for the recorder.
pub const VARIANTS: [(&str, &[&str]); 2] = [("recorded", &[]), ("recorded with its libraries", &["--lib", "*"])];

/// A check of one program.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    program: Program,
    is_count_of_the_moment: bool,
    may_tear: bool,
    normalise: fn(&str) -> String,
}

impl Check {
    /// Checks a program that does the same in every run.
    pub const fn of(program: Program) -> Self {
        Self { program, is_count_of_the_moment: false, may_tear: false, normalise: str::to_owned }
    }

    /// Calls may be more or fewer in the next run: they are compared with the trace of the same run only.
    #[must_use]
    pub const fn count_of_the_moment(mut self) -> Self {
        self.is_count_of_the_moment = true;
        self
    }

    /// The program leaves its functions at any instruction: by a jump out of a signal handler, or by asynchronous cancellation. Where that is in the middle of
    /// an entry or a return, a record stays unwritten, and is counted.
    #[must_use]
    pub const fn leaves_anywhere(mut self) -> Self {
        self.may_tear = true;
        self
    }

    /// Outputs are compared after this was done to them.
    #[must_use]
    pub const fn normalise(mut self, normalise: fn(&str) -> String) -> Self {
        self.normalise = normalise;
        self
    }

    /// Runs the whole check.
    ///
    /// # Panics
    /// Anything is otherwise than without trapline: with everything that was found.
    pub fn run(self) {
        let complaints = self.complaints(trapline::record);
        assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
    }

    /// What there is to complain about under the recorder whose words `record` makes. For negative controls, that is not trapline.
    ///
    /// # Panics
    /// The program does not work even without a recorder.
    pub fn complaints(self, record: fn(&Path, &[&str]) -> Vec<OsString>) -> Vec<String> {
        Optimised::BOTH.into_iter().flat_map(|optimised| self.complaints_at(optimised, record)).collect()
    }

    fn complaints_at(self, optimised: Optimised, record: fn(&Path, &[&str]) -> Vec<OsString>) -> Vec<String> {
        let scratch = Scratch::new();
        let words = self.program.build(optimised, scratch.path());
        let command = Command::new(words, scratch.path()).input(self.program.input);
        let bare = command.run();
        assert!(!bare.text().contains("FAILED"), "without trapline, {command}: {}", bare.text());
        let mut found = Vec::new();
        for (variant, options) in VARIANTS {
            let trace = scratch.join("trace");
            let outcome = command.behind(record(&trace, options)).run();
            let mut complaints = compare::same(&self.comparable(&bare), &self.comparable(&outcome));
            match Report::read(&trace) {
                Ok(mut report) => {
                    if self.may_tear {
                        report.lost.remove("torn");
                    }
                    complaints.extend(compare::counts(&outcome.text(), &report));
                }
                Err(error) => complaints.push(error),
            }
            found.extend(complaints.iter().map(|text| format!("{command} at {optimised:?}, {variant}: {text}")));
        }
        found
    }

    fn comparable(self, outcome: &Outcome) -> Outcome {
        let outcome = if self.is_count_of_the_moment { compare::without_counts(outcome) } else { outcome.clone() };
        Outcome {
            stdout: (self.normalise)(&outcome.text()).into_bytes(),
            stderr: (self.normalise)(&outcome.error_text()).into_bytes(),
            end: outcome.end,
        }
    }
}
