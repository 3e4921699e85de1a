//! Several patches, several objects, several commands, several processes.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use trapline_testsuite::{
    run,
    snapshot::{Own, Snapshot},
    trapline,
};

use crate::target::{Built, Target};

const LIBRARY: &[&str] = &["-shared", "-fPIC", "-DLIBRARY"];

/// The path as an argument.
fn text(path: &std::path::Path) -> String {
    path.to_str().expect("a path").to_owned()
}

fn is_done(target: &Target, words: &[&str]) {
    let outcome = target.trapline(&[words, &["--deadline", "60"]].concat());
    assert!(outcome.is_good(), "{words:?}: {}", outcome.error);
}

#[test]
fn a_patch_replaces_the_one_that_is_there_in_one_moment() {
    let built = Built::new();
    let pins = ["pair"];
    let [two, three] = ["2", "3"]
        .map(|version| text(&built.patch(&format!("to-{version}"), &[&format!("-DVERSION={version}")], &pins)));
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    for _ in 0..5 {
        for (patch, version) in [(&two, 2), (&three, 3), (&two, 2), (&two, 2)] {
            is_done(&target, &["apply", patch]);
            let answer = target.ask();
            assert_eq!((answer.version, answer.mixed), (version, 0));
            let listed = target.trapline(&["list", "--json"]).json();
            let patches = listed["patches"].as_array().expect("a list");
            assert!(patches.len() == 1 && patches[0]["name"] == format!("to-{version}"), "{listed}");
        }
    }
    is_done(&target, &["revert"]);
    assert_eq!(target.ask().version, 1);
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

/// Both have exceptions, so both stand before the same unwinder.
#[test]
fn patches_of_program_and_library_come_and_go_in_any_order() {
    let program = Built::of("pitcher.cpp", "pitcher", &[]);
    let library = Built::of("pitcher.cpp", "libpitcher.so", LIBRARY);
    let own = text(&program.patch("own", &["-DVERSION=2"], &[]));
    let other = text(&library.patch("other", &["-DVERSION=2"], &[]));
    let mut target = Target::start_with(&program, &[&text(&library.path())]);
    let before = Snapshot::of(target.pid());
    for (first, second) in [("own", "other"), ("other", "own")] {
        for (words, version) in [
            (["apply", &own], 21),
            (["apply", &other], 22),
            (["revert", first], if first == "own" { 12 } else { 21 }),
            (["revert", second], 11),
        ] {
            is_done(&target, &words);
            let answer = target.ask();
            assert_eq!((answer.version, answer.mixed, answer.is_count_kept), (version, 0, true), "{words:?}");
        }
    }
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

#[test]
fn the_patch_of_a_library_that_is_closed_can_be_reverted() {
    let program = Built::of("pitcher.cpp", "pitcher", &[]);
    let library = Built::of("pitcher.cpp", "libpitcher.so", LIBRARY);
    let patch = text(&library.patch("other", &["-DVERSION=2"], &[]));
    let mut target = Target::start_with(&program, &[&text(&library.path())]);
    is_done(&target, &["apply", &patch]);
    assert_eq!(target.ask().version, 12);
    let answer = target.ask_for("c");
    assert_eq!((answer.version, answer.mixed), (10, 0));
    let listed = target.trapline(&["list"]);
    assert!(listed.text.contains("other: unloaded"), "{}", listed.text);
    is_done(&target, &["revert"]);
    assert!(target.trapline(&["list"]).text.contains("has no patches"));
    assert_eq!(target.ask().mixed, 0);
}

#[test]
fn new_threads_and_forked_children_have_the_patch_and_new_programs_have_not() {
    let built = Built::new();
    let patch = text(&built.patch("pair", &["-DVERSION=2"], &["pair"]));
    let mut target = Target::start(&built);
    is_done(&target, &["apply", &patch]);
    for (letter, version) in [("", 2), ("t", 2), ("f", 2), ("x", 1)] {
        assert_eq!(target.ask_for(letter).version, version, "{letter:?}");
    }
    is_done(&target, &["revert"]);
    for letter in ["", "t", "f", "x"] {
        assert_eq!(target.ask_for(letter).version, 1, "{letter:?}");
    }
}

#[test]
fn a_second_command_at_the_same_time_is_refused() {
    let built = Built::new();
    let stuck = text(&built.patch("loop", &["-DVERSION=2", "-DLOOP=2"], &[]));
    let patch = text(&built.patch("pair", &["-DVERSION=2"], &["pair"]));
    let mut target = Target::start(&built);
    let pid = target.pid().to_string();
    let mut command = Command::new(trapline::path());
    command.args(["patch", "apply", "-p", &pid, &stuck, "--deadline", "3"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut first = command.spawn().expect("a command that starts");
    let refusal = "another trapline is patching process";
    // Seen from outside: a command that asks would keep the first one out.
    let lock = "@trapline-patch-";
    let is_locked = |line: &str| line.contains(lock) && line.ends_with(&format!("-{pid}"));
    run::wait_until(&"the first command", || {
        fs::read_to_string("/proc/net/unix").is_ok_and(|sockets| sockets.lines().any(is_locked))
    });
    let listed = target.trapline(&["list"]);
    let second = target.trapline(&["apply", &patch]);
    let _ = first.wait();
    assert!(listed.status == Some(2) && listed.error.contains(refusal), "{}", listed.error);
    assert!(second.status == Some(2) && second.error.contains(refusal), "{}", second.error);
    assert_eq!(target.ask().version, 1);
}

/// At any moment: while it maps, while all stand still, while it writes.
#[test]
fn a_command_that_is_killed_leaves_a_program_that_runs_and_can_be_patched() {
    let built = Built::of("pitcher.cpp", "pitcher", &[]);
    let patch = text(&built.patch("throws", &["-DVERSION=2"], &[]));
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    let pid = target.pid().to_string();
    for round in 0..40_u64 {
        let mut command = Command::new(trapline::path());
        command.args(["patch", "apply", "-p", &pid, &patch]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut killed = command.spawn().expect("a command that starts");
        thread::sleep(Duration::from_millis(1 + round * 3));
        killed.kill().expect("a command that can be killed");
        let _ = killed.wait();
        let answer = target.ask();
        assert!(answer.mixed == 0 && answer.is_count_kept, "round {round}");
        let listed = target.trapline(&["list", "--json"]).json();
        if listed["patches"].as_array().is_some_and(|patches| !patches.is_empty()) {
            is_done(&target, &["revert"]);
        }
        assert_eq!(target.ask().version, 10, "round {round}");
    }
    is_done(&target, &["apply", &patch]);
    assert_eq!(target.ask().version, 20);
    is_done(&target, &["revert"]);
    let mut complaints = Snapshot::of(target.pid()).complaints(&before, Own::Nothing);
    // Killed while a thread of the program was in mmap for it, a command can have told nobody of that memory.
    let is_unknown =
        |complaint: &String| complaint.contains("was not mapped") || complaint.contains("KiB of addresses");
    assert!(complaints.extract_if(.., |complaint| is_unknown(complaint)).count() <= 4, "too much is left behind");
    assert_eq!(complaints, [""; 0], "left behind");
}
