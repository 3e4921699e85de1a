//! Functions that a patch has replaced are traced, and stay replaced meanwhile and afterwards.

use std::{
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};

use trapline_testsuite::{
    snapshot::{Own, Snapshot},
    trapline,
};

use crate::target::{Built, Target};

/// Records a process for a moment, and says how often each function was called.
fn recorded(target: &Target, built: &Built, options: &[&str]) -> Vec<(String, u64)> {
    let trace = built.scratch.join("trace.data");
    let mut command = Command::new("timeout");
    command.arg("60").arg(trapline::path()).args(["record", "-q", "--duration", "0.3", "-p"]);
    let output = command.arg(target.pid().to_string()).arg("-o").arg(&trace).args(options).output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut report = Command::new(trapline::path());
    let output = report.args(["report", "--json", "-i"]).arg(&trace).output().expect("it starts");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let functions = report["functions"].as_array().expect("a list");
    functions
        .iter()
        .map(|function| {
            let name = function["name"].as_str().expect("a name").to_owned();
            (name, function["calls"].as_u64().expect("a number"))
        })
        .collect()
}

fn calls(found: &[(String, u64)], name: &str) -> u64 {
    found.iter().find(|(known, _)| known == name).map_or(0, |(_, calls)| *calls)
}

#[test]
fn calls_of_new_functions_are_seen_as_those_of_the_old_ones() {
    let built = Built::new();
    let patch = built.patch("pair", &["-DVERSION=2"], &["pair"]);
    let patch = patch.to_str().expect("a path");
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    for _ in 0..3 {
        let applied = target.trapline(&["apply", patch, "--deadline", "60"]);
        assert!(applied.is_good(), "{}", applied.error);
        let patched = Snapshot::of(target.pid());
        let found = recorded(&target, &built, &[]);
        // Each pair calls each of them once; four threads may be between the two at each end.
        let pairs = calls(&found, "pair");
        for function in ["first", "second"] {
            assert!(pairs > 100 && calls(&found, function).abs_diff(pairs) <= 8, "{function}: {found:?}");
        }
        let answer = target.ask();
        assert_eq!((answer.version, answer.mixed), (2, 0));
        // The code is not the file's, but the patch's.
        let mut complaints = Snapshot::of(target.pid()).complaints(&patched, Own::Nothing);
        complaints.retain(|complaint| !complaint.contains("its code is changed"));
        assert_eq!(complaints, [""; 0], "left behind");
        let reverted = target.trapline(&["revert", "--deadline", "60"]);
        assert!(reverted.is_good(), "{}", reverted.error);
        assert_eq!(target.ask().version, 1);
        assert!(calls(&recorded(&target, &built, &[]), "first") > 100);
    }
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

#[test]
fn exceptions_go_through_new_code_that_is_traced() {
    let built = Built::of("pitcher.cpp", "pitcher", &[]);
    let patch = built.patch("throws", &["-DVERSION=2"], &[]);
    let mut target = Target::start(&built);
    let applied = target.trapline(&["apply", patch.to_str().expect("a path"), "--deadline", "60"]);
    assert!(applied.is_good(), "{}", applied.error);
    for libraries in [&[][..], &["--lib", "libgcc_s*"]] {
        let found = recorded(&target, &built, libraries);
        assert!(calls(&found, "pitch") > 20 && calls(&found, "between") > 20, "{found:?}");
        let answer = target.ask();
        assert_eq!((answer.version, answer.mixed, answer.is_count_kept), (20, 0, true));
    }
    let reverted = target.trapline(&["revert", "--deadline", "60"]);
    assert!(reverted.is_good(), "{}", reverted.error);
    let answer = target.ask();
    assert_eq!((answer.version, answer.mixed), (10, 0));
}

/// How often the first version was called, and how often others.
fn counts(target: &mut Target, more: u64) -> (u64, u64) {
    let answer = target.ask_for(&more.to_string());
    (answer.calls, answer.mixed)
}

/// The recorder puts its own jump before the patch's, and takes it away again, all the time.
#[test]
fn no_call_is_of_the_old_function_while_a_recorder_comes_and_goes() {
    const CALLS: u64 = 10_000_000;
    let built = Built::of("versions.c", "versions", &[]);
    let patch = built.patch("version", &["-DVERSION=2"], &[]);
    let patch = patch.to_str().expect("a path");
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    let (is_over, recordings) = (AtomicBool::new(false), AtomicU64::new(0));
    let pid = target.pid();
    let check = |target: &mut Target| {
        for round in 0..3 {
            let applied = target.trapline(&["apply", patch, "--deadline", "60"]);
            assert!(applied.is_good(), "round {round}: {}", applied.error);
            let (old, new) = counts(target, 0);
            let recorded = recordings.load(Relaxed);
            // At least one comes and one goes meanwhile.
            while recordings.load(Relaxed) < recorded + 2 {
                counts(target, CALLS / 10);
            }
            let (old_now, new_now) = counts(target, CALLS);
            assert!(old_now == old && new_now >= new + CALLS, "round {round}: {} calls of the old one", old_now - old);
            let reverted = target.trapline(&["revert", "--deadline", "60"]);
            assert!(reverted.is_good(), "round {round}: {}", reverted.error);
            // So it would have been seen.
            let (old, new) = counts(target, 0);
            let (old_now, new_now) = counts(target, CALLS / 10);
            assert!(new_now == new && old_now >= old + CALLS / 10, "round {round}: {} of the new one", new_now - new);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let trace = built.scratch.join("trace.data");
            // Relaxed: that it is seen at some time is enough.
            while !is_over.load(Relaxed) {
                let mut command = Command::new("timeout");
                command.arg("60").arg(trapline::path()).args(["record", "-q", "--duration", "0.05", "-p"]);
                let output = command.arg(pid.to_string()).arg("-o").arg(&trace).output().expect("it starts");
                // It is refused while a patch comes or goes.
                recordings.fetch_add(u64::from(output.status.success()), Relaxed);
                // A command has to find a moment in which nobody records, unless the recorder stays for as long as the command needs.
                thread::sleep(Duration::from_millis(300));
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&mut target)));
        is_over.store(true, Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    println!("{} recordings", recordings.load(Relaxed));
    assert!(calls(&recorded(&target, &built, &[]), "version") > 1000, "or they have not seen the function");
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}
