//! Stacks: many, small, deep, and changed by hand.

use trapline_testsuite::{program::Program, transparency::Check};

#[test]
fn contexts_switch_in_the_middle_of_traced_functions() {
    Check::of(Program::of(&["contexts.c"])).run();
}

#[test]
fn coroutines_on_small_stacks_move_between_threads() {
    Check::of(Program::of(&["coroutines.c"])).run();
}

#[test]
fn recursion_a_hundred_thousand_deep_returns() {
    Check::of(Program::of(&["recursion.c"])).run();
}

#[test]
fn the_smallest_stacks_are_large_enough() {
    Check::of(Program::of(&["small_stacks.c"])).run();
}
