//! A debugger, while a process is recorded and afterwards.

use std::fs;

use trapline_testsuite::{
    program::{Optimised, Program},
    run::{self, Command, End},
    scratch::Scratch,
    web,
};

use super::Recording;

/// What gdb says of the frames of all threads, and how it ended.
fn frames(pid: u32, scratch: &Scratch) -> (Vec<String>, String, End) {
    let pid = pid.to_string();
    let words = ["gdb", "-nx", "-q", "-batch", "-p", &pid, "-ex", "thread apply all backtrace", "-ex", "detach"];
    let outcome = Command::new(words, scratch.path()).env("DEBUGINFOD_URLS", "").run();
    let text = outcome.text();
    let frames = text.lines().filter(|line| line.starts_with('#')).map(str::to_owned).collect();
    (frames, outcome.error_text(), outcome.end)
}

#[test]
fn a_debugger_sees_nothing_afterwards_and_harms_nobody_meanwhile() {
    let scratch = Scratch::new();
    let words = Program::of(&["http_server.rs"]).build(Optimised::Yes, scratch.path());
    let server = Command::new(words, scratch.path()).start();
    run::wait_for(&scratch.join("port"));
    let port: u16 = fs::read_to_string(scratch.join("port")).expect("its port").parse().expect("a number");
    let asleep = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", server.pid)).expect("it lives");
        let mut states = tasks.map(|entry| fs::read_to_string(entry.expect("a thread").path().join("wchan")));
        states.all(|wchan| wchan.is_ok_and(|wchan| wchan != "0")).then_some(())
    };
    run::wait_some(&"all threads asleep", asleep);
    let (before, told, end) = frames(server.pid, &scratch);
    assert!(end == End::Status(0) && before.iter().any(|frame| frame.contains("accept")), "{before:?} {told}");
    let recording = Recording::new(&scratch, &[]);
    let recorder = recording.start(server.pid);
    run::wait_some(&"the recorder", || {
        let status = fs::read_to_string(format!("/proc/{}/status", server.pid)).expect("it lives");
        (!status.contains("TracerPid:\t0\n")).then_some(())
    });
    let (none, told, _) = frames(server.pid, &scratch);
    assert!(none.is_empty() && told.contains("Operation not permitted"), "{none:?} {told}");
    while !recorder.has_ended() {
        assert_eq!(web::get(port, "/9"), b"45");
    }
    recording.finish("with a debugger that comes late", recorder);
    run::wait_some(&"all threads asleep", asleep);
    assert_eq!(frames(server.pid, &scratch).0, before);
    assert_eq!(web::get(port, "/9"), b"45");
}
