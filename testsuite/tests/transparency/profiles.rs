//! Code with a profiler's call at the beginning of each function (`-pg -mfentry`), which is profiled as it is without us.

use std::{collections::BTreeMap, fs, path::Path};

use trapline_testsuite::{
    compare,
    program::{Optimised, Program, is_narrow},
    run::Command,
    scratch::Scratch,
    trace::Report,
    transparency::{Check, VARIANTS},
    trapline,
};

/// As users compile for `gprof`.
const PROFILED: &[&str] = &["-pg", "-mfentry"];

#[test]
fn arguments_arrive_behind_a_profilers_call() {
    Check::of(Program::of(&["arguments.c"]).flags(PROFILED)).run();
}

#[test]
fn tail_calls_to_a_profilers_call_are_counted() {
    Check::of(Program::of(&["tail_calls.c"]).flags(&["-pg", "-mfentry", "-fcf-protection=full"])).run();
}

#[test]
fn exceptions_pass_functions_with_a_profilers_call() {
    Check::of(Program::of(&["exceptions.cpp"]).flags(PROFILED)).run();
}

/// How often which place called which function, as the profile has it: `gmon_out.h` of the C library.
fn arcs(profile: &Path) -> BTreeMap<(u64, u64), u32> {
    const HEADER_BYTES: usize = 20;
    let bytes = fs::read(profile).unwrap_or_else(|error| panic!("{}: {error}", profile.display()));
    assert!(bytes.starts_with(b"gmon"));
    let half = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("the file is whole"));
    let word_bytes = if is_narrow() { 4 } else { 8 };
    let word = |at: usize| u64::from(half(at)) | if is_narrow() { 0 } else { u64::from(half(at + 4)) << 32 };
    let (mut at, mut arcs) = (HEADER_BYTES, BTreeMap::new());
    while at < bytes.len() {
        match bytes[at] {
            // Times: from, to, how many counters of 2 bytes, their rate and unit.
            0 => at += 1 + 2 * word_bytes + 24 + 2 * half(at + 1 + 2 * word_bytes) as usize,
            1 => {
                *arcs.entry((word(at + 1), word(at + 1 + word_bytes))).or_default() += half(at + 1 + 2 * word_bytes);
                at += 1 + 2 * word_bytes + 4;
            }
            other => panic!("a record of kind {other}"),
        }
    }
    arcs
}

#[test]
fn the_profile_has_the_same_callers() {
    for optimised in Optimised::asked_for().iter().copied() {
        let scratch = Scratch::new();
        // Addresses are the same in each run.
        let program = Program::of(&["profiled.c"]).flags(&["-pg", "-mfentry", "-no-pie", "-fno-pie"]);
        let command = Command::new(program.build(optimised, scratch.path()), scratch.path());
        let profile = scratch.join("gmon.out");
        let bare = command.run();
        let expected = arcs(&profile);
        assert!(expected.len() > 10, "{expected:x?}");
        for (variant, options) in VARIANTS {
            fs::remove_file(&profile).expect("it was just written");
            let trace = scratch.join("trace");
            let outcome = command.behind(trapline::record(&trace, options)).run();
            assert_eq!(compare::same(&bare, &outcome), Vec::<String>::new(), "{optimised:?}, {variant}");
            let report = Report::read(&trace).expect("a trace");
            assert_eq!(compare::counts(&outcome.text(), &report), Vec::<String>::new(), "{optimised:?}, {variant}");
            assert_eq!(arcs(&profile), expected, "{optimised:?}, {variant}");
        }
    }
}
