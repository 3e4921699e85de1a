//! Patches come and go while a recorder traces what they replace.

use std::{
    fs,
    process::{Child, Command},
};

use trapline_testsuite::{
    run,
    scratch::Scratch,
    snapshot::{Own, Snapshot},
    trace, trapline,
};

use crate::target::{Answer, Built, Target, trapline_of};

const PATIENCE_S: &str = "100";

/// A recorder at work.
struct Recorder {
    child: Child,
    trace: Scratch,
}

impl Recorder {
    /// Of a process that runs, which is being traced when this returns.
    fn of(target: &Target, options: &[&str]) -> Self {
        let trace = Scratch::new();
        let mut command = Command::new(trapline::path());
        command.args(["record", "-q", "--duration", PATIENCE_S, "-p", &target.pid().to_string()]);
        let child = command.args(options).arg("-o").arg(trace.join("trace")).spawn().expect("a recorder that starts");
        let recorder = Self { child, trace };
        let is_there =
            |status: String| status.lines().any(|line| line == format!("TracerPid:\t{}", recorder.child.id()));
        let status = format!("/proc/{}/status", target.pid());
        run::wait_until(&"the recorder", || fs::read_to_string(&status).is_ok_and(is_there));
        recorder
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.is_ok_and(|sent| sent.success()));
    }

    /// Leaves the process.
    fn leave(mut self) -> Recorded {
        self.signal("-INT");
        let status = self.child.wait().expect("a child");
        assert!(status.success(), "{status:?}");
        let path = self.trace.join("trace");
        Recorded {
            report: trace::ask("report", &path).expect("a trace"),
            info: trace::ask("info", &path).expect("a trace"),
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a trace says.
struct Recorded {
    report: serde_json::Value,
    info: serde_json::Value,
}

impl Recorded {
    fn calls(&self, name: &str) -> u64 {
        let functions = self.report["functions"].as_array().expect("a list");
        let found = functions.iter().find(|function| function["name"] == name);
        found.map_or(0, |function| function["calls"].as_u64().expect("a number"))
    }

    fn has_module(&self, path: &str) -> bool {
        self.info["modules"].as_array().expect("a list").iter().any(|module| module["path"] == path)
    }
}

fn is_done(target: &Target, words: &[&str]) {
    let outcome = target.trapline(&[words, &["--deadline", "60"]].concat());
    assert!(outcome.is_good(), "{words:?}: {}", outcome.error);
}

fn text(path: &std::path::Path) -> String {
    path.to_str().expect("a path").to_owned()
}

fn is_listed(target: &Target, what: &str) {
    let listed = target.trapline(&["list"]);
    assert!(listed.text.contains(what), "{}{}", listed.text, listed.error);
}

/// Came before the recorder and goes meanwhile, comes and goes meanwhile, comes meanwhile and stays: all calls are seen under the same names.
#[test]
fn patches_come_and_go_in_any_order_with_a_recorder() {
    let built = Built::new();
    let [two, three] = ["2", "3"]
        .map(|version| text(&built.patch(&format!("to-{version}"), &[&format!("-DVERSION={version}")], &["pair"])));
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    let has = |target: &mut Target, version: u32| {
        let answer = target.ask();
        assert_eq!((answer.version, answer.mixed, answer.is_count_kept), (version, 0, true));
    };
    is_done(&target, &["apply", &two]);
    let recorder = Recorder::of(&target, &[]);
    has(&mut target, 2);
    is_listed(&target, "to-2: active");
    is_done(&target, &["revert"]);
    has(&mut target, 1);
    for _ in 0..2 {
        is_done(&target, &["apply", &two]);
        has(&mut target, 2);
        is_listed(&target, "to-2: active");
        is_done(&target, &["apply", &three]);
        has(&mut target, 3);
        is_done(&target, &["revert"]);
        has(&mut target, 1);
        is_listed(&target, "has no patches");
    }
    is_done(&target, &["apply", &three, "--dry-run"]);
    has(&mut target, 1);
    is_done(&target, &["apply", &three]);
    has(&mut target, 3);
    let told = recorder.leave();
    has(&mut target, 3);
    is_listed(&target, "to-3: active");
    is_done(&target, &["revert"]);
    has(&mut target, 1);
    // Each pair calls each of them once; four threads may be between the two at each end. Each answer is one more call of the first.
    let pairs = told.calls("pair");
    for (function, more) in [("first", 16), ("second", 0)] {
        let calls = told.calls(function);
        assert!(pairs > 100 && calls.abs_diff(pairs) <= 8 + more, "{function}: {}", told.report);
    }
    assert!(told.has_module("to-2.tlp") && told.has_module("to-3.tlp"), "{}", told.info);
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

#[test]
fn exceptions_go_through_new_code_that_came_while_it_was_traced() {
    let built = Built::of("pitcher.cpp", "pitcher", &[]);
    let patch = text(&built.patch("throws", &["-DVERSION=2"], &[]));
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    let recorder = Recorder::of(&target, &["--lib", "libgcc_s*"]);
    for _ in 0..2 {
        for (words, version) in [(["apply", &patch], 20), (["revert", "throws"], 10)] {
            is_done(&target, &words);
            let answer = target.ask();
            assert_eq!((answer.version, answer.mixed, answer.is_count_kept), (version, 0, true), "{words:?}");
        }
    }
    is_done(&target, &["apply", &patch]);
    let told = recorder.leave();
    assert!(told.calls("pitch") > 20 && told.calls("between") > 20, "{}", told.report);
    let answer = target.ask();
    assert_eq!((answer.version, answer.mixed, answer.is_count_kept), (20, 0, true));
    is_done(&target, &["revert"]);
    assert_eq!(target.ask().version, 10);
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

/// The guard leaves for the recorder, and leaves the patch.
#[test]
fn a_patch_outlives_a_recorder_that_is_killed() {
    let built = Built::new();
    let patch = text(&built.patch("pair", &["-DVERSION=2"], &["pair"]));
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    let recorder = Recorder::of(&target, &[]);
    is_done(&target, &["apply", &patch]);
    assert_eq!(target.ask().version, 2);
    recorder.signal("-KILL");
    drop(recorder);
    let answer = target.ask();
    assert_eq!((answer.version, answer.mixed), (2, 0));
    let maps = format!("/proc/{}/maps", target.pid());
    run::wait_until(&"the guard", || !fs::read_to_string(&maps).expect("a process").contains("memfd:trapline"));
    let answer = target.ask();
    assert_eq!((answer.version, answer.mixed), (2, 0));
    is_done(&target, &["revert"]);
    let answer = target.ask();
    assert_eq!((answer.version, answer.mixed), (1, 0));
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

/// Every frame of the program is hooked: who is inside is told by what the recorder has put in the place of return addresses.
#[test]
fn a_program_that_was_launched_by_a_recorder_is_patched_and_who_is_inside_is_named() {
    let built = Built::new();
    let patch = text(&built.patch("pair", &["-DVERSION=2"], &["pair"]));
    let stuck = text(&built.patch("loop", &["-DVERSION=2", "-DLOOP=2"], &[]));
    let caller = text(&built.patch("caller", &["-DSLEEPER=1"], &[]));
    let mut target = Target::launched(&built, &built.scratch.join("trace"), &[]);
    let refused = target.trapline(&["apply", &stuck, "--deadline", "1"]);
    assert_eq!(refused.status, Some(2), "{}", refused.error);
    assert!(refused.error.contains("is in for_ever"), "{}", refused.error);
    assert!(refused.error.contains("sleeper+"), "no backtrace: {}", refused.error);
    // Nothing else than a return address that is hooked tells of this one.
    let refused = target.trapline(&["apply", &caller, "--deadline", "1"]);
    assert_eq!(refused.status, Some(2), "{}", refused.error);
    assert!(refused.error.contains("is in sleeper (it returns to"), "{}", refused.error);
    for (words, version) in [(["apply", &patch], 2), (["revert", "pair"], 1)] {
        is_done(&target, &words);
        for letter in ["", "t", "f"] {
            let Answer { version: found, mixed, .. } = target.ask_for(letter);
            assert_eq!((found, mixed), (version, 0), "{words:?} {letter}");
        }
    }
}

/// How often the first version was called, and how often others.
fn counts(target: &mut Target, more: u64) -> (u64, u64) {
    let answer = target.ask_for(&more.to_string());
    (answer.calls, answer.mixed)
}

/// Patches come and go while all sites are switched on and off. At least so many calls are counted after each.
fn while_sites_are_switched(calls: u64, rounds: usize, flags: &'static [&'static str]) {
    let built = Built::of("versions.c", "versions", flags);
    let patch = text(&built.patch("version", &["-DVERSION=2"], &[]));
    let (log, trace) = (built.scratch.join("log"), built.scratch.join("trace"));
    let mut target =
        Target::launched(&built, &trace, &["--no-returns", "--toggle-every", "2", "--toggle-log", &text(&log)]);
    let switched = || fs::read_to_string(&log).expect("a log").lines().count();
    for round in 0..rounds {
        for (words, is_patched) in [(["apply", &patch], true), (["revert", "version"], false)] {
            is_done(&target, &words);
            let (old, new) = counts(&mut target, 0);
            let since = switched();
            counts(&mut target, calls);
            // Both on and off.
            while switched() < since + 4 {
                counts(&mut target, 0);
            }
            let (old_now, new_now) = counts(&mut target, 0);
            let (other, right) =
                if is_patched { (old_now - old, new_now - new) } else { (new_now - new, old_now - old) };
            assert!(other == 0 && right >= calls, "round {round}, {words:?}: {other} calls of the other one");
        }
    }
    target.end();
    let report = trace::ask("report", &trace).expect("a trace");
    let told = Recorded { report, info: trace::ask("info", &trace).expect("a trace") };
    assert!(told.calls("version") > 1000, "or the function was not traced: {}", told.report);
}

/// The second one begins with an instruction that the recorder leaves where it is, and a patch does not.
#[test]
fn no_call_is_of_the_old_function_while_its_site_is_switched() {
    while_sites_are_switched(100_000, 2, &[]);
    while_sites_are_switched(100_000, 2, &["-fcf-protection=branch"]);
}

#[test]
#[ignore = "sixty million calls"]
fn no_call_of_ten_million_is_of_the_old_function_while_its_site_is_switched() {
    while_sites_are_switched(10_000_000, 3, &[]);
}

/// A child of fork goes on with the stubs of its parent.
#[test]
fn a_child_keeps_what_it_was_forked_with() {
    let built = Built::of("forked.c", "forked", &[]);
    let patch = text(&built.patch("version", &["-DVERSION=2"], &[]));
    let mut target = Target::start(&built);
    let _recorder = Recorder::of(&target, &[]);
    let child = |target: &mut Target| u32::try_from(target.ask_for("f").calls).expect("a process");
    let versions = |target: &mut Target| {
        let answer = target.ask();
        (answer.version, answer.mixed)
    };
    let first = child(&mut target);
    is_done(&target, &["apply", &patch]);
    // Of the parent, and of its last child.
    assert_eq!(versions(&mut target), (2, 1));
    let applied = trapline_of(first, &["apply", &patch, "--deadline", "60"]);
    assert!(applied.is_good(), "{}", applied.error);
    assert_eq!(versions(&mut target), (2, 2));
    child(&mut target);
    assert_eq!(versions(&mut target), (2, 2));
    is_done(&target, &["revert"]);
    assert_eq!(versions(&mut target), (1, 2));
}

/// Commands that go away, and commands that come together.
#[test]
fn a_recorder_does_one_thing_at_a_time_and_nothing_for_a_command_that_is_gone() {
    let built = Built::new();
    let stuck = text(&built.patch("loop", &["-DVERSION=2", "-DLOOP=2"], &[]));
    let patch = text(&built.patch("pair", &["-DVERSION=2"], &["pair"]));
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    let recorder = Recorder::of(&target, &[]);
    let pid = target.pid().to_string();
    let mut command = Command::new(trapline::path());
    let mut first =
        command.args(["patch", "apply", "-p", &pid, &stuck, "--deadline", "100"]).spawn().expect("it starts");
    let is_locked = || {
        let sockets = fs::read_to_string("/proc/net/unix").expect("the kernel tells");
        let is_it = |line: &str| line.contains("@trapline-patch-") && line.ends_with(&format!("-{pid}"));
        sockets.lines().any(is_it)
    };
    run::wait_until(&"the first command", is_locked);
    let second = target.trapline(&["apply", &patch]);
    first.kill().expect("a command that can be killed");
    let _ = first.wait();
    assert!(second.status == Some(2) && second.error.contains("another trapline is patching"), "{}", second.error);
    assert_eq!(target.ask().version, 1);
    // Long before the deadline of the first one.
    run::wait_until(&"the end of its work", || !is_locked());
    is_done(&target, &["apply", &patch]);
    assert_eq!(target.ask().version, 2);
    is_done(&target, &["revert"]);
    drop(recorder.leave());
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}
