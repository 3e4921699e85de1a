//! Signals: handlers, masks, deaths.

use trapline_testsuite::{program::Program, transparency::Check};

#[test]
fn handlers_on_both_stacks_are_recorded_in_a_storm() {
    Check::of(Program::of(&["signal_storm.c"])).count_of_the_moment().run();
}

#[test]
fn handlers_that_take_the_room_of_what_they_interrupt_cost_no_record() {
    Check::of(Program::of(&["signal_chunks.c"])).count_of_the_moment().run();
}

#[test]
fn a_program_may_use_sigtrap_itself() {
    Check::of(Program::of(&["sigtrap.c"])).run();
}

#[test]
fn masks_and_dispositions_are_as_they_would_be() {
    Check::of(Program::of(&["signal_state.c"])).run();
}

#[test]
fn masks_and_dispositions_that_were_inherited_stay() {
    let started_by = &["/usr/bin/env", "--ignore-signal=PIPE,USR1,INT", "--block-signal=USR2,TERM"];
    Check::of(Program::of(&["signal_state.c"]).started_by(started_by)).run();
}

macro_rules! deaths {
    ($($name:ident: $way:literal;)*) => {
        $(
            #[test]
            fn $name() {
                Check::of(Program::of(&["deaths.c"]).arguments(&[$way])).run();
            }
        )*
    };
}

deaths! {
    a_crash_is_a_crash: "crash";
    sigkill_kills: "sigkill";
    sigterm_kills: "sigterm";
    a_raised_sigtrap_kills: "sigtrap";
    a_breakpoint_instruction_kills: "int3";
    sigsys_kills: "sigsys";
    an_illegal_instruction_kills: "illegal";
    a_realtime_signal_kills: "realtime";
    abort_kills: "abort";
    exit_from_a_handler_has_its_status: "handler";
    exit_in_a_thread_has_its_status: "thread";
    a_leader_that_ends_leaves_the_others: "leader";
    the_largest_status_arrives: "status";
    a_raw_exit_has_its_status: "raw";
}
