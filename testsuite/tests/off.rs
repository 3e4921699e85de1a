//! Armed functions whose sites are off: the program runs as without trapline, and nothing is recorded.

use std::collections::BTreeMap;

use trapline_testsuite::{
    compare,
    program::{Optimised, Program},
    run::Command,
    scratch::Scratch,
    trace::Report,
    trapline,
};

/// Complaints about how the program ran, and the calls in its trace.
fn recorded(options: &[&str]) -> (Vec<String>, BTreeMap<String, u64>) {
    let scratch = Scratch::new();
    let program = Program::of(&["arguments.c"]);
    let command = Command::new(program.build(Optimised::Yes, scratch.path()), scratch.path());
    let bare = command.run();
    let trace = scratch.join("trace");
    let outcome = command.behind(trapline::record(&trace, options)).run();
    let report = Report::read(&trace).expect("a trace");
    (compare::same(&bare, &outcome), report.calls)
}

#[test]
fn sites_that_start_off_record_nothing() {
    assert_eq!(recorded(&["--start-off"]), (Vec::new(), BTreeMap::new()));
}

#[test]
fn the_same_sites_record_when_they_are_on() {
    let (complaints, calls) = recorded(&[]);
    assert_eq!(complaints, Vec::<String>::new());
    assert!(calls.len() > 1, "{calls:?}");
}
