//! What must hold, as a table: each row names a command, what it proves, and the outcome that proves it.
//!
//! Owns the tables [`LINT`] and [`TEST`] and the decision which rows a run leaves out ([`select`]). [`crate::runner`]
//! walks the rows in order; [`crate::expect`] judges each outcome. Commands are written as a person would type them, and
//! hold no quoting: words are what lies between spaces.
//!
//! Invariant: [`TEST`] begins with all of [`LINT`], and beside each proof stands its negative control.

use crate::args::Selection;
use crate::expect::Expect;

/// A row of the table.
#[derive(Debug)]
pub(crate) struct Step {
    /// Short and unique.
    pub(crate) name: &'static str,
    /// What is known after this step that was not known before it.
    pub(crate) proves: &'static str,
    /// What runs.
    pub(crate) action: Action,
    /// The outcome that counts as passing.
    pub(crate) expect: Expect,
    /// Why a run may leave it out.
    needs: Needs,
}

/// What a step does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Action {
    /// Runs a command, its words separated by spaces, with one environment variable set or none.
    Command(&'static str, Option<(&'static str, &'static str)>),
    /// Applies the rules of [`crate::text`] to the tracked files.
    TextRules,
}

/// What a run may do without.
#[derive(Debug, Clone, Copy, Default)]
struct Needs {
    i686: bool,
    is_long: bool,
}

impl Step {
    const fn new(name: &'static str, action: Action, proves: &'static str) -> Self {
        let needs = Needs { i686: false, is_long: false };
        Self { name, proves, action, expect: Expect::Success, needs }
    }

    const fn command(name: &'static str, command: &'static str, proves: &'static str) -> Self {
        Self::new(name, Action::Command(command, None), proves)
    }

    const fn expect(mut self, expect: Expect) -> Self {
        self.expect = expect;
        self
    }

    /// Marks the step as one that `--skip-i686` leaves out.
    const fn i686(mut self) -> Self {
        self.needs.i686 = true;
        self
    }

    /// Marks the step as one that `--quick` leaves out.
    const fn long(mut self) -> Self {
        self.needs.is_long = true;
        self
    }
}

/// The steps that read the source and run none of it.
pub(crate) const LINT: &[&[Step]] = &[SOURCE];

/// Everything that must hold before a change lands.
pub(crate) const TEST: &[&[Step]] = &[SOURCE, BEHAVIOUR, MODELS, STRESS, STRESS_I686, RECORDING, KERNEL];

const SOURCE: &[Step] = &[
    Step::new(
        "text rules",
        Action::TextRules,
        "no file names this machine, files are short, and crates that promise no unsafe code forbid it",
    ),
    Step::command("format", "cargo fmt --all --check", "the workspace is formatted"),
    Step::command(
        "clippy",
        "cargo clippy --workspace --all-targets -- -D warnings",
        "no warning; every unsafe block is one operation and says why it is sound",
    ),
    Step::command(
        "clippy, i686",
        "cargo clippy --target i686-unknown-linux-gnu -p trapline-engine -p trapline-process -p trapline-capi -p trapline-cli \
         --all-targets -- -D warnings",
        "the same for the code that only the 32-bit build compiles",
    )
    .i686(),
    Step::new(
        "documentation",
        Action::Command("cargo doc --workspace --no-deps", Some(("RUSTDOCFLAGS", "-D warnings"))),
        "the documentation builds and its links lead somewhere",
    ),
    Step::command("fuzz format", "cargo fmt --manifest-path fuzz/Cargo.toml --check", "the fuzz targets are formatted"),
    Step::new(
        "testbed format",
        Action::Command("cargo fmt --manifest-path testbed/Cargo.toml --check", Some(("RUSTC_BOOTSTRAP", "1"))),
        "the testbed is formatted",
    ),
    Step::command(
        "fuzz clippy",
        "cargo clippy --manifest-path fuzz/Cargo.toml --no-default-features --all-targets -- -D warnings",
        "the fuzz targets still fit the engine's interface",
    ),
];

/// Has the testsuite compile its programs for i386, and with optimisation only: all of it takes as long as at 64 bit.
const OF_32_BITS: (&str, &str) = ("TRAPLINE_WIDTH", "32-O2");

const BEHAVIOUR: &[Step] = &[
    Step::command(
        "no_std",
        "cargo build -p trapline-engine --target x86_64-unknown-none",
        "the engine needs no standard library and no operating system",
    ),
    // The benchmarks have no tests, and their dependencies would be compiled for nothing. Clippy checks them.
    Step::command("tests", "cargo test --workspace --exclude trapline-benches", "the tests pass in a 64-bit process"),
    Step::command(
        "tests, i686",
        "cargo test --target i686-unknown-linux-gnu -p trapline-engine -p trapline-process -p trapline-cli",
        "the same tests pass in a 32-bit process",
    )
    .i686(),
    Step::new(
        "32-bit programs",
        Action::Command("cargo test -p trapline-testsuite --test transparency -- calls stacks exceptions", Some(OF_32_BITS)),
        "programs compiled for i386 do the same under the recorder as without it, launched and joined; with TRAPLINE_WIDTH=32 all are compiled so",
    )
    .i686(),
    Step::new(
        "32-bit programs, left",
        Action::Command("cargo test -p trapline-testsuite --test attach -- hot_calls killed", Some(OF_32_BITS)),
        "a 32-bit process that was recorded while it ran is as it was, also where the recorder was killed",
    )
    .i686(),
];

// Nothing from here on is built for release: the tests have built it, and what is proved does not depend on how quick it is.

const MODELS: &[Step] = &[Step::command(
    "models",
    "cargo run -p trapline-models",
    "no interleaving skips a call (I1) or tears an instruction (I2), and every mutant of the protocol is found",
)
.long()];

const STRESS: &[Step] = &[
    Step::command(
        "stress slots",
        "cargo run -- stress --seconds 3 --threads 4 --resume slots --json",
        "slots: under load no call is missed (I1) and no register corrupted (I4)",
    )
    .long()
    .expect(Expect::NothingLost),
    Step::command(
        "stress push",
        "cargo run -- stress --seconds 3 --threads 4 --resume push --json",
        "push: the same, with the return address written to the interrupted stack, above the signal frame",
    )
    .long()
    .expect(Expect::NothingLost),
    Step::command(
        "stress r11",
        "cargo run -- stress --seconds 3 --threads 4 --resume r11 --json",
        "r11: the same, with the return address handed over in a register",
    )
    .long()
    .expect(Expect::NothingLost),
    Step::command(
        "stress skip",
        "cargo run -- stress --seconds 3 --threads 4 --resume skip --json",
        "negative control: the old behaviour does lose calls, and the tool does see it",
    )
    .long()
    .expect(Expect::CallsLost),
];

const STRESS_I686: &[Step] = &[
    Step::command(
        "stress slots, i686",
        "cargo run --target i686-unknown-linux-gnu -- stress --seconds 3 --threads 4 --resume slots --json",
        "slots in a 32-bit process: no call is missed and no register corrupted",
    )
    .i686()
    .expect(Expect::NothingLost),
    Step::command(
        "stress skip, i686",
        "cargo run --target i686-unknown-linux-gnu -- stress --seconds 3 --threads 4 --resume skip --json",
        "negative control in a 32-bit process",
    )
    .i686()
    .expect(Expect::CallsLost),
    Step::command(
        "stress push, i686",
        "cargo run --target i686-unknown-linux-gnu -- stress --seconds 3 --threads 4 --resume push --json",
        "push is refused where the signal frame lies right under the stack pointer",
    )
    .i686()
    .expect(Expect::Refused),
    Step::command(
        "stress r11, i686",
        "cargo run --target i686-unknown-linux-gnu -- stress --seconds 3 --threads 4 --resume r11 --json",
        "r11 is refused where there is no such register",
    )
    .i686()
    .expect(Expect::Refused),
];

const RECORDING: &[Step] = &[
    Step::command(
        "fidelity",
        "cargo xtask fidelity",
        "each traced function of real programs has exactly the calls in the trace that an interpreter counts, and a function that is left out is found",
    )
    .long(),
    Step::command(
        "consumers",
        "cargo xtask consumers uftrace babeltrace2 sql",
        "tools that are quickly installed find the calls and times of the report in our exports, and a call that is left out is missed; `cargo xtask consumers` asks all",
    )
    .long(),
];

const KERNEL: &[Step] = &[Step::command(
    "kernel",
    "cargo xtask kernel-test --quick",
    "in a kernel of either width no call is lost in any context, a replaced function stays replaced, and a trace holds every call; and what \
     is left out in the controls is noticed",
)
.long()];

/// A table split by what the user asked to leave out.
#[derive(Debug, Default)]
pub(crate) struct Selected {
    /// The steps to run, in the order of the table.
    pub(crate) run: Vec<&'static Step>,
    /// The steps left out, each with the option that asked for it.
    pub(crate) left_out: Vec<(&'static Step, &'static str)>,
}

/// Splits `table` into what runs and what is left out.
pub(crate) fn select(table: &'static [&'static [Step]], selection: Selection) -> Selected {
    let mut selected = Selected::default();
    for step in table.iter().copied().flatten() {
        if selection.skip_i686 && step.needs.i686 {
            selected.left_out.push((step, "--skip-i686"));
        } else if selection.quick && step.needs.is_long {
            selected.left_out.push((step, "--quick"));
        } else {
            selected.run.push(step);
        }
    }
    selected
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn names(steps: &[&'static Step]) -> Vec<&'static str> {
        steps.iter().map(|step| step.name).collect()
    }

    fn command(step: &Step) -> &'static str {
        match step.action {
            Action::Command(command, _) => command,
            Action::TextRules => "",
        }
    }

    #[test]
    fn without_options_every_step_runs_once() {
        let all = select(TEST, Selection::default());
        assert!(all.left_out.is_empty());
        assert_eq!(all.run.iter().map(|step| step.name).collect::<HashSet<_>>().len(), all.run.len());
        let lint = names(&select(LINT, Selection::default()).run);
        assert_eq!(names(&all.run)[..lint.len()], lint[..]);
    }

    #[test]
    fn skip_i686_leaves_out_exactly_what_is_of_32_bits() {
        let is_narrow =
            |step: &Step| command(step).contains("i686") || matches!(step.action, Action::Command(_, Some(OF_32_BITS)));
        let selected = select(TEST, Selection { skip_i686: true, quick: false });
        assert!(!selected.left_out.is_empty());
        assert!(selected.left_out.iter().all(|(step, why)| is_narrow(step) && *why == "--skip-i686"));
        assert!(selected.run.iter().all(|step| !is_narrow(step)));
    }

    #[test]
    fn quick_leaves_out_exactly_the_proofs_beside_the_tests() {
        let selected = select(TEST, Selection { quick: true, skip_i686: false });
        let left_out: Vec<_> = selected.left_out.iter().map(|(step, _)| step.name).collect();
        let proofs: Vec<_> =
            [MODELS, STRESS, RECORDING, KERNEL].iter().copied().flatten().map(|step| step.name).collect();
        assert_eq!(left_out, proofs);
    }

    #[test]
    fn nothing_is_both_run_and_left_out() {
        let total = select(TEST, Selection::default()).run.len();
        for (quick, skip_i686) in [(false, true), (true, false), (true, true)] {
            let selected = select(TEST, Selection { quick, skip_i686 });
            assert_eq!(selected.run.len() + selected.left_out.len(), total);
        }
    }

    #[test]
    fn both_widths_have_a_stress_proof_and_its_negative_control() {
        let all = select(TEST, Selection::default()).run;
        for i686 in [false, true] {
            let of_width = |expect| all.iter().any(|step| step.needs.i686 == i686 && step.expect == expect);
            assert!(of_width(Expect::NothingLost) && of_width(Expect::CallsLost));
        }
    }

    #[test]
    fn every_judged_report_is_asked_for_as_json() {
        for step in select(TEST, Selection::default()).run {
            if step.expect.reads_report() {
                assert!(command(step).ends_with("--json"), "{}", step.name);
            }
        }
    }
}
