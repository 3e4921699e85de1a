//! Negative controls: recorders that are not transparent are found out.

use std::{ffi::OsString, path::Path};

use trapline_testsuite::{program::Program, transparency::Check};

fn complaints(program: Program, record: fn(&Path, &[&str]) -> Vec<OsString>) -> String {
    Check::of(program).complaints(record).join("\n")
}

fn shell(script: &str) -> Vec<OsString> {
    ["/bin/sh", "-c", script, "sh"].map(Into::into).to_vec()
}

#[test]
fn an_exit_status_that_is_lost_is_found() {
    let found = complaints(Program::of(&["contexts.c"]), |_, _| shell("\"$@\"; exit 0"));
    assert!(found.contains("ended with Status(0) instead of Status(3)"), "{found}");
}

#[test]
fn a_variable_that_is_added_is_found() {
    let found = complaints(Program::of(&["environment.c"]), |_, _| shell("LD_PRELOAD=/nonexistent.so exec \"$@\""));
    assert!(found.contains("standard output differs"), "{found}");
}

#[test]
fn a_file_that_is_left_open_is_found() {
    let found = complaints(Program::of(&["descriptors.c"]), |_, _| shell("exec \"$@\" 5</dev/null"));
    assert!(found.contains("start: 5"), "{found}");
}

#[test]
fn a_signal_that_is_ignored_is_found() {
    let found = complaints(Program::of(&["signal_state.c"]), |_, _| shell("trap '' PIPE; exec \"$@\""));
    assert!(found.contains("ignored 13"), "{found}");
}

#[test]
fn a_trace_that_is_missing_is_found() {
    let found = complaints(Program::of(&["contexts.c"]), |_, _| shell("exec \"$@\""));
    assert!(found.contains("report"), "{found}");
}
