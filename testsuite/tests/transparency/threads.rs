//! Threads, in all ways to begin and to end.

use trapline_testsuite::{program::Program, transparency::Check};

#[test]
fn threads_end_from_deep_inside() {
    Check::of(Program::of(&["thread_ends.c"])).leaves_anywhere().run();
}

#[test]
fn threads_that_block_every_signal_are_recorded() {
    Check::of(Program::of(&["blocked.c"])).run();
}

#[test]
fn four_hundred_threads_at_once_are_recorded() {
    Check::of(Program::of(&["threads_at_once.c"])).run();
}

#[test]
fn five_thousand_threads_in_turn_are_recorded() {
    Check::of(Program::of(&["threads_in_turn.c"])).run();
}
