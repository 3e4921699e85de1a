//! What is refused is told in a sentence, and goes on as it was.

use std::{ffi::OsString, fs};

use trapline_testsuite::{
    program::{Optimised, Program},
    run::{self, Command, End, Running},
    scratch::Scratch,
    trapline,
};

/// What trapline says of a process.
fn refused(pid: &str, scratch: &Scratch) -> String {
    let trace = scratch.join("trace");
    let mut words = vec![trapline::path().into(), "record".into(), "-p".into(), OsString::from(pid)];
    words.extend(["--duration".into(), "1".into(), "-o".into(), trace.clone().into_os_string()]);
    let outcome = Command::new(&words, scratch.path()).run();
    assert_eq!(outcome.end, End::Status(2), "{}", outcome.error_text());
    assert!(!trace.exists(), "a trace of nothing");
    outcome.error_text()
}

fn state(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or_default().trim().to_owned()
}

fn wait_for_state(pid: u32, letter: char) {
    run::wait_until(&format!("state {letter} of {pid}"), || state(pid).starts_with(letter));
}

fn asleep(scratch: &Scratch) -> Running {
    let running = Command::new(["sleep", "1000"], scratch.path()).start();
    wait_for_state(running.pid, 'S');
    running
}

#[test]
fn processes_that_are_none() {
    let scratch = Scratch::new();
    assert!(refused("4194303", &scratch).contains("no such process"));
    // The kernel's first thread.
    assert!(refused("2", &scratch).contains("thread of the kernel"));
}

#[test]
fn a_stopped_process_stays_stopped() {
    let scratch = Scratch::new();
    let sleeper = asleep(&scratch);
    run::signal("STOP", &sleeper.pid.to_string());
    wait_for_state(sleeper.pid, 'T');
    assert!(refused(&sleeper.pid.to_string(), &scratch).contains("is stopped"));
    assert!(state(sleeper.pid).starts_with('T'));
}

#[test]
fn a_process_that_is_traced_already() {
    let scratch = Scratch::new();
    let strace = Command::new(["strace", "-o", "calls", "sleep", "1000"], scratch.path()).start();
    let child = || fs::read_to_string(format!("/proc/{0}/task/{0}/children", strace.pid)).unwrap_or_default();
    let deadline = std::time::Instant::now() + run::PATIENCE;
    let sleeper = loop {
        let sleeper = child().split_whitespace().next().and_then(|pid| pid.parse::<u32>().ok());
        let has_begun = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n");
        if let Some(sleeper) = sleeper.filter(has_begun) {
            break sleeper;
        }
        assert!(std::time::Instant::now() < deadline, "strace starts nothing");
    };
    assert!(refused(&sleeper.to_string(), &scratch).contains("(strace) traces it already"));
}

#[test]
fn a_program_without_a_dynamic_linker() {
    let scratch = Scratch::new();
    let program = Program::of(&["attached.cpp"]).flags(&["-static"]).build(Optimised::Yes, scratch.path()).remove(0);
    let running = Command::new([program, "calls".into(), "1".into()], scratch.path()).start();
    run::wait_for(&scratch.join("ready"));
    assert!(refused(&running.pid.to_string(), &scratch).contains("linked statically"));
}

#[test]
fn a_zombie() {
    let scratch = Scratch::new();
    let script = "sleep 0 & echo $! > zombie; exec sleep 1000";
    let _parent = Command::new(["/bin/sh", "-c", script], scratch.path()).start();
    run::wait_for(&scratch.join("zombie"));
    let deadline = std::time::Instant::now() + run::PATIENCE;
    let zombie = loop {
        let text = fs::read_to_string(scratch.join("zombie")).unwrap_or_default();
        if let Ok(pid) = text.trim().parse::<u32>() {
            break pid;
        }
        assert!(std::time::Instant::now() < deadline, "no number");
    };
    wait_for_state(zombie, 'Z');
    assert!(refused(&zombie.to_string(), &scratch).contains("a zombie"));
}
