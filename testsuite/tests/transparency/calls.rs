//! Calls of every shape: arguments, results, tail calls, code that no compiler would make.

use trapline_testsuite::{
    program::{Library, Program},
    transparency::Check,
};

#[test]
fn arguments_and_results_of_every_class_arrive() {
    Check::of(Program::of(&["arguments.c"])).run();
}

#[test]
fn arguments_arrive_in_code_that_is_not_position_independent() {
    Check::of(Program::of(&["arguments.c"]).flags(&["-no-pie", "-fno-pie", "-fcf-protection=none"])).run();
}

#[test]
fn tail_calls_stay_jumps_and_are_counted() {
    Check::of(Program::of(&["tail_calls.c"])).run();
}

#[test]
fn tail_calls_without_endbr_and_frame_pointer_are_counted() {
    Check::of(Program::of(&["tail_calls.c"]).flags(&["-fcf-protection=none", "-fomit-frame-pointer"])).run();
}

#[test]
fn functions_that_no_compiler_would_make_work() {
    Check::of(Program::of(&["hostile.c", "hostile.S"])).run();
}

#[test]
fn code_before_and_after_main_is_recorded() {
    Check::of(Program::of(&["before_main.cpp"])).run();
}

#[test]
fn compiled_in_nops_are_used() {
    Check::of(Program::of(&["arguments.c"]).flags(&["-fpatchable-function-entry=5"])).run();
}

#[test]
fn libraries_that_come_and_go_are_followed() {
    Check::of(Program::of(&["dlopen.c"]).library(Library::Argument)).run();
}
