//! Functions that a patch has replaced are traced, and stay replaced meanwhile and afterwards.

use std::process::Command;

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
