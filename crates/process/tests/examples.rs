//! The examples do what they say: each checks itself.

#[path = "../examples/arguments.rs"]
mod arguments;
mod common;
#[path = "../examples/count.rs"]
mod count;
#[path = "../examples/histogram.rs"]
mod histogram;
#[path = "../examples/replace.rs"]
mod replace;

use common::child::in_child;

#[test]
fn calls_are_counted() {
    in_child("calls_are_counted", || count::main().expect("the example works"));
}

#[test]
fn durations_are_measured() {
    in_child("durations_are_measured", || histogram::main().expect("the example works"));
}

#[test]
fn a_function_is_replaced() {
    in_child("a_function_is_replaced", || replace::main().expect("the example works"));
}

#[test]
fn arguments_are_logged() {
    in_child("arguments_are_logged", || arguments::main().expect("the example works"));
}
