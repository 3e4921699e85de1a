//! What a program sees of its surroundings, and what it may do to them.

use trapline_testsuite::{
    compare,
    program::{Optimised, Program},
    run::{Command, End},
    scratch::Scratch,
    trace::Report,
    transparency::Check,
    trapline,
};

#[test]
fn the_environment_has_no_trace_of_us() {
    Check::of(Program::of(&["environment.c"]).arguments(&["one", "", "three words here"])).run();
}

#[test]
fn an_environment_with_a_preload_of_its_own_keeps_it() {
    let started_by = &["/usr/bin/env", "BEFORE=1", "LD_PRELOAD=libm.so.6", "AFTER=2"];
    Check::of(Program::of(&["environment.c"]).started_by(started_by)).run();
}

#[test]
fn an_empty_environment_stays_empty() {
    Check::of(Program::of(&["environment.c"]).started_by(&["/usr/bin/env", "-i"])).run();
}

#[test]
fn open_files_are_those_of_the_program() {
    Check::of(Program::of(&["descriptors.c"])).run();
}

#[test]
fn errno_and_rounding_are_kept() {
    Check::of(Program::of(&["errno.c"])).run();
}

#[test]
fn moderate_limits_leave_room_for_us() {
    Check::of(Program::of(&["limits.c"])).run();
}

#[test]
fn without_address_space_calls_go_on() {
    Check::of(Program::of(&["no_memory.c"])).run();
}

#[test]
fn standard_input_and_relative_paths_reach_the_program() {
    Check::of(Program::of(&["standard_input.c"]).input("one\ntwo\nthree and more\n")).run();
}

#[test]
fn strict_seccomp_forbids_nothing_that_we_need() {
    Check::of(Program::of(&["sandbox.c"])).run();
}

#[test]
fn a_seccomp_filter_forbids_nothing_that_we_need() {
    Check::of(Program::of(&["sandbox_filter.c"])).run();
}

#[test]
fn a_child_in_a_sandbox_runs_on_unrecorded() {
    Check::of(Program::of(&["sandbox_fork.c"])).run();
}

/// There is one tracer a process: a program that traces its own child cannot while it is recorded, and is told by the kernel's usual answer.
#[test]
fn a_program_that_traces_is_told_that_it_cannot() {
    for optimised in Optimised::asked_for().iter().copied() {
        let scratch = Scratch::new();
        let command = Command::new(Program::of(&["debugger.c"]).build(optimised, scratch.path()), scratch.path());
        assert!(command.run().text().contains("child 52"), "without us, the program traces its child");
        let trace = scratch.join("trace");
        let outcome = command.behind(trapline::record(&trace, &[])).run();
        assert_eq!(outcome.end, End::Status(0), "{}", outcome.error_text());
        assert!(["child 50", "child 52"].iter().any(|text| outcome.text().contains(text)), "{}", outcome.text());
        let report = Report::read(&trace).expect("a trace");
        assert_eq!(compare::counts(&outcome.text(), &report), Vec::<String>::new());
    }
}
