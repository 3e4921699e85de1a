//! Live patches come and go in a process whose threads never stop calling what is patched.
//!
//! `TRAPLINE_PATCH_ROUNDS` says how often, 10 times unless set; `TRAPLINE_PATCH_THREADS` how many threads there are, 4 unless set.

mod callbacks;
mod cargo;
mod debugger;
mod package;
mod recorded;
mod refused;
mod several;
mod target;
mod traced;
mod unwinding;

use std::{env, time::Duration};

use target::{Built, Target};
use trapline_testsuite::snapshot::{Own, Snapshot};

/// What a patch of both functions leads to.
struct Rounds {
    mixed: u64,
    stops: Vec<Duration>,
}

fn asked(variable: &str, otherwise: usize) -> usize {
    env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

fn rounds() -> usize {
    asked("TRAPLINE_PATCH_ROUNDS", 10)
}

fn threads() -> usize {
    asked("TRAPLINE_PATCH_THREADS", 4)
}

/// Applies and reverts a patch of both functions, and asks the program after each step which version it has.
fn back_and_forth(pins: &[&str], threads: usize, rounds: usize) -> Rounds {
    let built = Built::new();
    let patch = built.patch("pair", &["-DVERSION=2"], pins);
    // The program ends by itself, but not before this can be over.
    let most_s = 300 + 4 * rounds;
    let mut target = Target::service(&built, &[&threads.to_string(), &most_s.to_string()]);
    let before = Snapshot::of(target.pid());
    let mut stops = Vec::new();
    let mut mixed = 0;
    for _ in 0..rounds {
        if pins.is_empty() && mixed > 0 {
            // That was to be shown.
            break;
        }
        for (words, version) in [(vec!["apply", patch.to_str().expect("a path")], 2), (vec!["revert", "pair"], 1)] {
            let outcome = target.trapline(&[&words[..], &["--deadline", "60", "--json"]].concat());
            assert!(outcome.is_good(), "{}", outcome.error);
            stops.push(Duration::from_nanos(outcome.json()["longest_stop_ns"].as_u64().expect("a number")));
            let answer = target.ask();
            assert_eq!(answer.version, version);
            assert!(answer.is_count_kept, "the static variable does not go on counting");
            mixed = answer.mixed;
        }
    }
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
    stops.sort_unstable();
    Rounds { mixed, stops }
}

#[test]
fn functions_of_one_patch_never_mix_if_their_caller_is_pinned() {
    let Rounds { mixed, stops } = back_and_forth(&["pair"], threads(), rounds());
    assert_eq!(mixed, 0);
    let (median, longest) = (stops[stops.len() / 2], stops[stops.len() - 1]);
    println!("{} transitions, stops: median {median:?}, longest {longest:?}", stops.len());
}

/// Without the pin a thread may be between the two calls, in a function that stays: nothing forbids the exchange then. If this found nothing, neither would the
/// other test.
#[test]
fn functions_of_one_patch_mix_if_their_caller_is_not_pinned() {
    assert!(back_and_forth(&[], 4, rounds().max(50)).mixed > 0);
}

#[test]
fn a_function_that_never_returns_is_named_and_left_alone() {
    let built = Built::new();
    let patch = built.patch("loop", &["-DVERSION=2", "-DLOOP=2"], &[]);
    let mut target = Target::start(&built);
    let before = Snapshot::of(target.pid());
    let outcome = target.trapline(&["apply", patch.to_str().expect("a path"), "--deadline", "1"]);
    assert_eq!(outcome.status, Some(2));
    assert!(outcome.error.contains("is in for_ever"), "{}", outcome.error);
    assert!(outcome.error.contains("sleeper+"), "no backtrace: {}", outcome.error);
    assert_eq!(target.ask().version, 1, "the program runs on with what it had");
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

#[test]
fn a_later_command_knows_what_an_earlier_one_did() {
    let built = Built::new();
    let patch = built.patch("pair", &["-DVERSION=2"], &["pair"]);
    let target = Target::start(&built);
    let apply = ["apply", patch.to_str().expect("a path"), "--deadline", "60"];
    let names = |target: &Target| -> Vec<String> {
        let outcome = target.trapline(&["list", "--json"]);
        assert!(outcome.is_good(), "{}", outcome.error);
        outcome.json()["patches"].as_array().expect("a list").iter().map(|patch| patch["name"].to_string()).collect()
    };
    assert_eq!(names(&target), Vec::<String>::new());
    let dry = target.trapline(&[&apply[..], &["--dry-run"]].concat());
    assert!(dry.is_good(), "{}", dry.error);
    assert_eq!(names(&target), Vec::<String>::new(), "a dry run changes nothing");
    assert!(target.trapline(&apply).is_good());
    assert_eq!(names(&target), ["\"pair\""]);
    let other = target.trapline(&["revert", "other"]);
    assert!(other.status == Some(2) && other.error.contains("active: pair"), "{}", other.error);
    assert!(target.trapline(&["revert", "--deadline", "60"]).is_good());
    assert_eq!(names(&target), Vec::<String>::new());
}
