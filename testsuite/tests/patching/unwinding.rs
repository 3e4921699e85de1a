//! Exceptions, panics and backtraces go through new code as through old, also while patches come and go.

use trapline_testsuite::{
    program,
    snapshot::{Own, Snapshot},
};

use crate::{
    rounds,
    target::{Built, Target},
};

/// Applies and reverts a patch, and asks the program which version it has.
fn back_and_forth(built: &Built, flags: &[&str], versions: [u32; 2], rounds: usize) {
    let patch = built.patch("throws", flags, &[]);
    let patch = patch.to_str().expect("a path");
    let mut target = Target::start(built);
    let before = Snapshot::of(target.pid());
    let mut in_the_way = 0;
    for round in 0.. {
        // Somebody has to have been inside now and then; otherwise this was no test.
        if round >= rounds && in_the_way > 0 {
            break;
        }
        assert!(round < 20 * rounds, "never was anybody in the way");
        for (words, version) in [(vec!["apply", patch], versions[1]), (vec!["revert", "throws"], versions[0])] {
            let outcome = target.trapline(&[&words[..], &["--deadline", "60", "--json"]].concat());
            assert!(outcome.is_good(), "{}", outcome.error);
            let number = |key: &str| outcome.json()[key].as_u64().expect("a number");
            in_the_way += number("stops") - 1 + number("let_out");
            let answer = target.ask();
            assert_eq!((answer.version, answer.mixed, answer.is_count_kept), (version, 0, true));
        }
    }
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

#[test]
fn exceptions_are_thrown_in_go_through_and_are_caught_in_new_code() {
    back_and_forth(&Built::of("pitcher.cpp", "pitcher", &["-no-pie", "-fno-pie"]), &["-DVERSION=2"], [10, 20], 3);
    back_and_forth(&Built::of("pitcher.cpp", "pitcher", &[]), &["-DVERSION=2"], [10, 20], rounds().div_ceil(2));
}

#[test]
fn panics_are_raised_in_go_through_and_are_caught_in_new_code() {
    back_and_forth(&Built::of("panicker.rs", "panicker", &[]), &["--cfg=new"], [1, 2], rounds());
}

/// An exception goes from the library through the program, which knows nothing of exceptions when it is patched.
#[test]
fn an_unwinder_that_is_loaded_later_is_told_of_and_knows_the_code_when_it_is_patched_again() {
    let program = Built::of("late.c", "late", &["-fexceptions"]);
    // The C library of i386 has a function for unwinders, which comes first and knows the new code; so this one brings all that it needs.
    let (flags, unwinder): (&[&str], _) = if program::is_narrow() {
        (&["-shared", "-fPIC", "-static-libgcc", "-static-libstdc++", "-Wl,--exclude-libs,ALL"], "late_library.so")
    } else {
        (&["-shared", "-fPIC"], "libgcc_s.so.1")
    };
    let library = Built::of("late_library.cpp", "late_library.so", flags);
    let patch = program.patch("late", &["-DVERSION=2"], &[]);
    let patch = patch.to_str().expect("a path");
    let library = library.path();
    for is_patched_again in [true, false] {
        let mut target = Target::start_with(&program, &[library.to_str().expect("a path")]);
        let is_done = |target: &Target| {
            let outcome = target.trapline(&["apply", patch, "--deadline", "60"]);
            assert!(outcome.is_good(), "{}", outcome.error);
        };
        let unaware = |target: &Target| target.trapline(&["list", "--json"]).json()["patches"][0]["unaware"].clone();
        is_done(&target);
        assert_eq!(unaware(&target), serde_json::json!([]));
        assert_eq!(target.ask_for("l").version, 2);
        assert_eq!(unaware(&target), serde_json::json!([unwinder]));
        let listed = target.trapline(&["list"]);
        assert!(listed.text.contains("apply the patch again"), "{}", listed.text);
        if is_patched_again {
            is_done(&target);
            assert_eq!(unaware(&target), serde_json::json!([]));
            let answer = target.ask_for("t");
            assert_eq!((answer.version, answer.mixed), (2, 1), "what was thrown is caught");
            assert!(target.trapline(&["revert", "--deadline", "60"]).is_good());
            let answer = target.ask_for("t");
            assert_eq!((answer.version, answer.mixed), (1, 2));
        } else {
            assert!(!target.survives("t"), "or it needs nothing of this");
        }
    }
}
