//! Functions of a patch that are called when it comes and goes.

use trapline_testsuite::snapshot::{Own, Snapshot};

use crate::target::{Built, Target};

/// The program, and a patch with callbacks of this kind.
struct Prepared {
    target: Target,
    patch: String,
    before: Snapshot,
    _built: Built,
}

impl Prepared {
    fn new(kind: &str) -> Self {
        let built = Built::new();
        let patch = built.patch("calls", &["-DVERSION=2", &format!("-DCALLBACKS={kind}")], &[]);
        let target = Target::start(&built);
        let before = Snapshot::of(target.pid());
        Self { target, patch: patch.to_str().expect("a path").to_owned(), before, _built: built }
    }

    fn apply(&self, deadline: &str) -> crate::target::Outcome {
        self.target.trapline(&["apply", &self.patch, "--deadline", deadline])
    }

    /// The program has this version, and these were called.
    fn is_at(&mut self, version: u32, events: &str) {
        let answer = self.target.ask();
        assert_eq!((answer.version, &*answer.events), (version, events));
    }

    fn is_as_before(&self) {
        assert_eq!(Snapshot::of(self.target.pid()).complaints(&self.before, Own::Nothing), [""; 0], "left behind");
    }
}

#[test]
fn all_four_are_called_each_at_its_time() {
    let mut prepared = Prepared::new("1");
    for round in 1..4 {
        assert!(prepared.apply("60").is_good());
        prepared.is_at(2, &format!("-{}aA", "aArR".repeat(round - 1)));
        assert!(prepared.target.trapline(&["revert", "--deadline", "60"]).is_good());
        prepared.is_at(1, &format!("-{}", "aArR".repeat(round)));
    }
    prepared.is_as_before();
}

/// The thread that calls them is in the middle of something, with values in all kinds of registers.
#[test]
fn a_thread_that_calls_them_keeps_all_of_its_registers() {
    let built = Built::of("held.c", "held", &["-msse2"]);
    let patch = built.patch("held", &["-DVERSION=2", "-DCALLBACKS"], &[]);
    let mut target = Target::start(&built);
    for _ in 0..5 {
        for (words, version) in [(&["apply", patch.to_str().expect("a path")][..], 2), (&["revert"], 1)] {
            let outcome = target.trapline(&[words, &["--deadline", "60"]].concat());
            assert!(outcome.is_good(), "{}", outcome.error);
            let answer = target.ask();
            assert_eq!((answer.version, answer.mixed), (version, 0));
        }
    }
}

#[test]
fn a_veto_keeps_a_patch_out_or_in() {
    let mut out = Prepared::new("2");
    let outcome = out.apply("60");
    assert_eq!(outcome.status, Some(2));
    assert!(outcome.error.contains("trapline_pre_apply of the patch answered 7: nothing"), "{}", outcome.error);
    out.is_at(1, "-a");
    out.is_as_before();

    let mut inside = Prepared::new("5");
    assert!(inside.apply("60").is_good());
    let outcome = inside.target.trapline(&["revert", "--deadline", "60"]);
    assert_eq!(outcome.status, Some(2));
    assert!(
        outcome.error.contains("trapline_pre_revert of the patch answered 8: the patch stays"),
        "{}",
        outcome.error
    );
    inside.is_at(2, "-aAr");
}

#[test]
fn one_that_crashes_or_hangs_is_ended_and_the_program_runs_on() {
    for (kind, deadline, words) in
        [("3", "60", "was ended by signal 11 at 0x"), ("4", "0.5", "did not return within 0.5 s")]
    {
        let mut prepared = Prepared::new(kind);
        let outcome = prepared.apply(deadline);
        assert_eq!(outcome.status, Some(2), "{}", outcome.error);
        assert!(outcome.error.contains(words), "{}", outcome.error);
        prepared.is_at(1, "-");
        prepared.is_as_before();
    }
}
