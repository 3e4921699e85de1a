//! Frames that are left without a return, and those who look at frames.

use trapline_testsuite::{
    compare,
    program::{Library, Optimised, Program},
    run::{Command, End},
    scratch::Scratch,
    transparency::Check,
    trapline,
};

/// Rust prints the thread's number when it panics.
fn without_thread_numbers(text: &str) -> String {
    let mut kept = String::new();
    for line in text.split_inclusive('\n') {
        match (line.strip_prefix("thread '"), line.find(" ("), line.find(") ")) {
            (Some(_), Some(from), Some(to)) if from < to => {
                kept.push_str(&line[..from]);
                kept.push_str(&line[to + 1..]);
            }
            _ => kept.push_str(line),
        }
    }
    kept
}

#[test]
fn only_thread_numbers_are_left_out_of_a_panic() {
    let text = "thread 'main' (123) panicked at (here) x.rs:1:2:\nthe (12) end\n";
    assert_eq!(without_thread_numbers(text), "thread 'main' panicked at (here) x.rs:1:2:\nthe (12) end\n");
}

#[test]
fn exceptions_pass_traced_frames() {
    Check::of(Program::of(&["exceptions.cpp"])).run();
}

#[test]
fn exceptions_that_meet_noexcept_terminate() {
    Check::of(Program::of(&["terminate.cpp"])).run();
}

#[test]
fn exceptions_pass_a_shared_library_both_ways() {
    Check::of(Program::of(&["library_exceptions.cpp"]).library(Library::Linked)).run();
}

#[test]
fn panics_are_caught() {
    Check::of(Program::of(&["panics.rs"])).run();
}

#[test]
fn rust_backtraces_show_the_same_frames() {
    let program = Program::of(&["rust_backtrace.rs"]).started_by(&["/usr/bin/env", "RUST_BACKTRACE=1"]);
    Check::of(program).normalise(without_thread_numbers).run();
}

#[test]
fn backtraces_show_the_same_frames() {
    Check::of(Program::of(&["backtrace.c"])).run();
}

#[test]
fn exceptions_thrown_between_any_two_instructions_are_caught() {
    // Optimised and without libraries: each instruction costs a signal for each one before it.
    let scratch = Scratch::new();
    let program = Program::of(&["thrown_anywhere.cpp"]).flags(&["-fnon-call-exceptions"]);
    let command = Command::new(program.build(Optimised::Yes, scratch.path()), scratch.path());
    let bare = command.run();
    assert_eq!(bare.end, End::Status(0), "{}", bare.text());
    let recorded = command.behind(trapline::record(&scratch.join("trace"), &[])).run();
    assert_eq!(compare::same(&bare, &recorded), Vec::<String>::new());
}

#[test]
fn backtraces_show_the_same_frames_between_any_two_instructions() {
    Check::of(Program::of(&["stepped_backtrace.c"])).count_of_the_moment().run();
}

#[test]
fn backtraces_in_a_storm_of_signals_show_only_frames_of_the_program() {
    Check::of(Program::of(&["backtrace_storm.c"])).run();
}

#[test]
fn threads_that_are_cancelled_between_any_two_instructions_are_unwound() {
    Check::of(Program::of(&["cancelled_anywhere.c"]).flags(&["-fexceptions"])).leaves_anywhere().run();
}

#[test]
fn an_unwinder_that_comes_and_goes_shows_the_same_frames() {
    Check::of(Program::of(&["walks.c"])).run();
}

#[test]
fn an_unwinder_that_is_linked_in_shows_the_same_frames() {
    Check::of(Program::of(&["walks.c"]).flags(&["-static-libgcc", "-DLINKED"])).run();
}

#[test]
fn longjmp_leaves_traced_frames() {
    Check::of(Program::of(&["longjmp.c"])).leaves_anywhere().run();
}

#[test]
fn functions_that_look_at_their_frames_see_them() {
    Check::of(Program::of(&["own_stack_use.c"])).run();
}
