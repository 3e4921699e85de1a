//! A program with and without trapline: the same to everybody who looks.
//!
//! Owns [`Check`]. For each optimisation level, the program runs bare, recorded, recorded with all of its libraries, and the same in a process that was
//! running before the recorder came. Outputs, exit status and signal have to be the same, and the trace has to have as many calls as the program says it made.

use std::{ffi::OsString, fs, path::Path, process};

use crate::{
    compare,
    program::{Optimised, Program},
    run::{self, Command, End, Outcome},
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

/// A program that was compiled, and what it does without a recorder.
struct Guest {
    scratch: Scratch,
    optimised: Optimised,
    command: Command,
    bare: Outcome,
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
        let complaints_at = |optimised| {
            let guest = self.guest(optimised);
            let mut complaints = self.complaints_of(&guest, trapline::record);
            complaints.extend(self.complaints_attached(&guest));
            complaints
        };
        let complaints: Vec<String> = Optimised::asked_for().iter().copied().flat_map(complaints_at).collect();
        assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
    }

    /// What there is to complain about under the recorder whose words `record` makes. For negative controls, that is not trapline.
    ///
    /// # Panics
    /// The program does not work even without a recorder.
    pub fn complaints(self, record: fn(&Path, &[&str]) -> Vec<OsString>) -> Vec<String> {
        Optimised::asked_for()
            .iter()
            .copied()
            .flat_map(|optimised| self.complaints_of(&self.guest(optimised), record))
            .collect()
    }

    /// Compiles the program, and runs it without a recorder.
    fn guest(self, optimised: Optimised) -> Guest {
        let scratch = Scratch::new();
        let words = self.program.build(optimised, scratch.path());
        let command = Command::new(words, scratch.path()).input(self.program.input);
        let bare = command.run();
        assert!(!bare.text().contains("FAILED"), "without trapline, {command}: {}", bare.text());
        Guest { scratch, optimised, command, bare }
    }

    fn complaints_of(self, guest: &Guest, record: fn(&Path, &[&str]) -> Vec<OsString>) -> Vec<String> {
        let Guest { scratch, optimised, command, bare } = guest;
        let mut found = Vec::new();
        for (variant, options) in VARIANTS {
            let trace = scratch.join("trace");
            let outcome = command.behind(record(&trace, options)).run();
            let complaints = self.judge(bare, &outcome, &trace);
            found.extend(complaints.iter().map(|text| format!("{command} at {optimised:?}, {variant}: {text}")));
        }
        found
    }

    /// The same, of a process that a recorder has come to when it executes the program.
    fn complaints_attached(self, guest: &Guest) -> Vec<String> {
        let Guest { scratch, optimised, command, bare } = guest;
        let (trace, gate) = (scratch.join("trace"), scratch.join("go"));
        let made = process::Command::new("mkfifo").arg(&gate).status().expect("coreutils");
        assert!(made.success(), "a pipe with a name: {made}");
        let running = command.behind(Program::of(&["gate.c"]).build(Optimised::Yes, scratch.path())).start();
        let words = trapline::attach(&trace, running.pid, &["--lib", "*"]);
        let recorder = Command::new(words, scratch.path()).start();
        let maps = format!("/proc/{}/maps", running.pid);
        let is_armed = || fs::read_to_string(&maps).is_ok_and(|maps| maps.contains("trapline-stubs"));
        run::wait_until(&"the recorder", || is_armed() || recorder.has_ended());
        fs::write(&gate, "\n").expect("somebody reads it");
        let outcome = running.finish();
        let recorder = recorder.finish();
        let mut complaints = self.judge(bare, &outcome, &trace);
        if recorder.end != End::Status(0) {
            complaints.push(format!("the recorder ended with {:?}: {}", recorder.end, recorder.error_text()));
        }
        complaints.iter().map(|text| format!("{command} at {optimised:?}, attached: {text}")).collect()
    }

    fn judge(self, bare: &Outcome, outcome: &Outcome, trace: &Path) -> Vec<String> {
        let mut complaints = compare::same(&self.comparable(bare), &self.comparable(outcome));
        match Report::read(trace) {
            Ok(mut report) => {
                if self.may_tear {
                    report.lost.remove("torn");
                }
                complaints.extend(compare::counts(&outcome.text(), &report));
            }
            Err(error) => complaints.push(error),
        }
        complaints
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
