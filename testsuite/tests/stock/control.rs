//! Negative controls: recorders that change what a program does are found out.

use std::{ffi::OsString, path::Path};

use trapline_testsuite::{run::Command, stock::Stock};

fn complaints(record: fn(&Path, &[&str]) -> Vec<OsString>) -> String {
    Stock::of(Command::new(["/usr/bin/ls", "-l", "/usr"], Path::new("/"))).complaints(record).join("\n")
}

fn shell(script: &str) -> Vec<OsString> {
    ["/bin/sh", "-c", script, "sh"].map(Into::into).to_vec()
}

#[test]
fn a_line_that_is_missing_is_found() {
    let found = complaints(|_, _| shell("text=$(\"$@\"); status=$?; echo \"$text\" | sed 2d; exit $status"));
    assert!(found.contains("standard output differs") && !found.contains("instead of Status"), "{found}");
}

#[test]
fn an_exit_status_that_is_changed_is_found() {
    let found = complaints(|_, _| shell("\"$@\"; exit 1"));
    assert!(found.contains("ended with Status(1) instead of Status(0)") && !found.contains("differs"), "{found}");
}

#[test]
fn a_trace_that_is_missing_is_found() {
    let found = complaints(|_, _| shell("exec \"$@\""));
    assert!(found.contains("cannot open the trace"), "{found}");
}
