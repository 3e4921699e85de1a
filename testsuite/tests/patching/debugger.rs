//! A debugger knows the new code by what `trapline patch symbols` writes.

use std::fs;

use trapline_testsuite::{
    run::{Command, End},
    snapshot::{Own, Snapshot},
};

use crate::target::{Built, Target};

/// The functions from where a thread is in new code, as gdb names them.
fn backtrace(target: &Target, built: &Built, at: u64, script: &str) -> Vec<String> {
    let (pid, stop) = (target.pid().to_string(), format!("break *{at:#x}"));
    let mut words = vec!["gdb", "-nx", "-q", "-batch", "-p", &pid];
    if !script.is_empty() {
        words.extend(["-x", script]);
    }
    words.extend(["-ex", &stop, "-ex", "continue", "-ex", "backtrace", "-ex", "delete", "-ex", "detach"]);
    let outcome = Command::new(words, built.scratch.path()).env("DEBUGINFOD_URLS", "").run();
    assert!(outcome.end == End::Status(0), "{}", outcome.error_text());
    let text = outcome.text();
    let frames = text.lines().filter(|line| line.starts_with('#'));
    frames.filter_map(|frame| Some(frame.split_once(" in ")?.1.split_whitespace().next()?.to_owned())).collect()
}

#[test]
fn a_debugger_that_is_told_names_new_functions_and_finds_their_callers() {
    let built = Built::of("pitcher.cpp", "pitcher", &[]);
    let patch = built.patch("throws", &["-DVERSION=2"], &[]);
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    let outcome = target.trapline(&["apply", patch.to_str().expect("a path"), "--deadline", "60"]);
    assert!(outcome.is_good(), "{}", outcome.error);
    let listed = target.trapline(&["status", "--json"]).json();
    let functions = listed["patches"][0]["functions"].as_array().expect("a list");
    let thrower = functions.iter().find(|function| function["name"] == "pitch").expect("it is replaced");
    let at = thrower["new"].as_u64().expect("an address");
    let folder = built.scratch.join("symbols of \"throws\"");
    let outcome = target.trapline(&["symbols", folder.to_str().expect("a path")]);
    assert!(outcome.is_good(), "{}", outcome.error);
    let script = built.scratch.join("patches.gdb");
    fs::write(&script, outcome.text).expect("room");
    let told = backtrace(&target, &built, at, script.to_str().expect("a path"));
    assert_eq!(told[..4], ["pitch", "between", "attempt", "throw_for_ever"], "{told:?}");
    let alone = backtrace(&target, &built, at, "");
    // It may guess where there are frame pointers.
    let is_new = |name: &String| ["pitch", "between", "attempt"].contains(&name.as_str());
    assert!(alone[0] == "??" && !alone.iter().any(is_new), "{alone:?}");
    let answer = target.ask();
    assert_eq!((answer.version, answer.mixed, answer.is_count_kept), (20, 0, true));
    assert!(target.trapline(&["revert", "--deadline", "60"]).is_good());
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
    let none = target.trapline(&["symbols", folder.to_str().expect("a path")]);
    assert!(none.is_good() && none.text.is_empty(), "{}", none.text);
}
