//! What does not fit a process is refused in a sentence, and nothing is written.

use std::fs;

use trapline_testsuite::snapshot::{Own, Snapshot};

use crate::target::{Built, Target, trapline_of};

/// Has a patch be refused with these words.
fn refused(target: &Target, patch: &std::path::Path, words: &[&str]) {
    let before = Snapshot::of(target.pid());
    let outcome = target.trapline(&["apply", patch.to_str().expect("a path")]);
    assert_eq!(outcome.status, Some(2), "{}", outcome.error);
    for word in words {
        assert!(outcome.error.contains(word), "{word} is not in: {}", outcome.error);
    }
    assert_eq!(Snapshot::of(target.pid()).complaints(&before, Own::Nothing), [""; 0], "left behind");
}

#[test]
fn another_build_is_refused_by_both_ids() {
    let built = Built::new();
    let patch = built.patch("pair", &["-DVERSION=2"], &["pair"]);
    built.link(&["-Wl,--build-id=0x0123456789abcdef"]);
    let target = Target::start(&built);
    refused(&target, &patch, &["is for pair with build-id", "the process runs", "with build-id 0123456789abcdef"]);
}

#[test]
fn a_broken_file_is_refused() {
    let built = Built::new();
    let patch = built.patch("pair", &["-DVERSION=2"], &["pair"]);
    let target = Target::start(&built);
    let whole = fs::read(&patch).expect("a patch");
    let broken = built.scratch.join("broken.tlp");
    for len in [0, 10, 24, whole.len() / 2, whole.len() - 1] {
        fs::write(&broken, &whole[..len]).expect("room");
        refused(&target, &broken, &["broken.tlp"]);
    }
    for at in [0, 9, 30, whole.len() / 2, whole.len() - 1] {
        let mut other = whole.clone();
        other[at] ^= 0x10;
        fs::write(&broken, &other).expect("room");
        refused(&target, &broken, &["broken.tlp"]);
    }
}

#[test]
fn another_architecture_is_refused() {
    let [narrow, wide] = [true, false].map(|is_narrow| Built::of_width("pair.c", "pair", &[], is_narrow));
    for (built, other, words) in [(&narrow, &wide, "code of 64 bit"), (&wide, &narrow, "code of 32 bit")] {
        let patch = other.patch("pair", &["-DVERSION=2"], &["pair"]);
        refused(&Target::start(built), &patch, &[words]);
    }
}

#[test]
fn a_process_that_is_gone_is_refused() {
    let built = Built::new();
    let patch = built.patch("pair", &["-DVERSION=2"], &["pair"]);
    let pid = Target::start(&built).end();
    let outcome = trapline_of(pid, &["apply", patch.to_str().expect("a path")]);
    assert!(outcome.status == Some(2) && outcome.error.contains("no such process"), "{}", outcome.error);
}
