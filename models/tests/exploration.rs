//! The suite within bounds that a development build explores in seconds: the real machines hold, every mutant is found, and it is known why some
//! are harmless somewhere.

use std::collections::BTreeSet;

use trapline_models::{
    explore::Verdict,
    suite::{self, Bounds, Run},
};

/// Explores each run; fails with all complaints.
fn explore_all(runs: &[Run]) -> Vec<Verdict> {
    let verdicts: Vec<Verdict> = runs.iter().map(Run::explore).collect();
    let complaints: Vec<String> = runs
        .iter()
        .zip(&verdicts)
        .filter_map(|(run, verdict)| {
            let complaint = run.complaint(verdict)?;
            Some(format!("{} ({}): {complaint}\n{verdict:#?}", run.title, run.setting()))
        })
        .collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    verdicts
}

#[test]
fn every_reachable_state_of_the_real_machines_keeps_every_invariant() {
    explore_all(&suite::real(Bounds::Small));
}

#[test]
fn every_mutant_is_found_and_breaks_what_it_should() {
    let verdicts = explore_all(&suite::mutants());
    for verdict in verdicts {
        let Verdict::Violated { trace, .. } = verdict else { panic!("it was as expected") };
        assert!(!trace.is_empty() && trace.iter().all(|step| !step.is_empty()));
    }
}

#[test]
fn a_mutant_that_a_setting_makes_harmless_is_found_in_another() {
    explore_all(&suite::harmless());
    let found: BTreeSet<String> = suite::mutants().into_iter().map(|run| run.title).collect();
    for run in suite::harmless() {
        let (mutant, _) = run.title.split_once(": ").expect("the title says which mutant, and what covers for it");
        assert!(found.contains(mutant), "{mutant}");
    }
}

#[test]
fn the_verdict_of_a_run_that_breaks_nothing_is_a_complaint_about_a_mutant() {
    let mut harmless = suite::harmless();
    let run = &mut harmless[0];
    let verdict = run.explore();
    assert_eq!(run.complaint(&verdict), None);
    run.expectation = suite::mutants()[0].expectation;
    let complaint = run.complaint(&verdict).expect("it was to break something");
    assert!(complaint.contains("was expected to break"), "{complaint}");
}

#[test]
fn a_run_that_gets_nowhere_is_a_complaint() {
    let slots = suite::real(Bounds::Small).pop().expect("there are runs");
    let mut run = suite::harmless().pop().expect("there are runs");
    run.expectation = slots.expectation;
    let verdict = suite::mutants()[0].explore();
    assert!(run.complaint(&verdict).is_some_and(|complaint| complaint.starts_with("breaks")));
    let idle = Verdict::Holds { states: 1, transitions: 0, landmarks: trapline_models::explore::Landmarks::default() };
    assert!(run.complaint(&idle).is_some_and(|complaint| complaint.contains("landmarks")));
}
