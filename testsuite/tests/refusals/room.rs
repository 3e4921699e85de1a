//! No room for the trace, from the start or in the middle; no descriptors. Programs that were started run to their end.

use std::{fs, os::unix::fs::PermissionsExt};

use trapline_testsuite::{
    run::{Command, End, Outcome},
    scratch::Scratch,
    trace, trapline,
};

use super::{RAN, is_root, program, shell};

/// Records the program with an argument, and so with many calls, by a shell that does something first.
fn record_after(script: &str, folder: &Scratch, trace: &str) -> Outcome {
    let mut words = trapline::record(&folder.join(trace), &[]);
    words.extend([program(folder, &[]), "many".into()]);
    Command::new(shell(&format!("{script}\nexec \"$@\""), &words), folder.path()).run()
}

/// The program was not started, and the error says this.
fn check_refused(outcome: &Outcome, texts: &[&str]) {
    assert_eq!(outcome.end, End::Status(125), "{}", outcome.error_text());
    assert!(!outcome.text().contains(RAN), "it was started");
    for text in texts {
        assert!(outcome.error_text().contains(text), "`{text}` is not in: {}", outcome.error_text());
    }
}

/// The program ran, the error says why the trace breaks off, and what there is of the trace opens.
fn check_cut(outcome: &Outcome, folder: &Scratch, trace: &str, cause: &str) {
    assert_eq!(outcome.end, End::Status(6), "{}", outcome.error_text());
    assert!(outcome.text().contains(RAN), "{}", outcome.text());
    for text in [cause, "events were lost", "the program ran on"] {
        assert!(outcome.error_text().contains(text), "`{text}` is not in: {}", outcome.error_text());
    }
    for verb in ["info", "report", "functions", "replay"] {
        trace::ask(verb, &folder.join(trace)).expect("what was written opens");
    }
    let told =
        Command::new([trapline::path().as_os_str(), "info".as_ref(), "-i".as_ref(), trace.as_ref()], folder.path());
    assert!(told.run().error_text().contains("the trace has no end"), "{}", told.run().error_text());
}

#[test]
fn a_folder_that_is_not_there() {
    let folder = Scratch::new();
    check_refused(
        &record_after(":", &folder, "no/such/folder"),
        &["cannot create the trace", "name another file with -o"],
    );
}

#[test]
fn an_output_that_is_a_folder() {
    let folder = Scratch::new();
    fs::create_dir(folder.join("taken")).expect("a folder of our own");
    check_refused(&record_after(":", &folder, "taken"), &["cannot create the trace", "Is a directory"]);
}

#[test]
fn an_output_that_may_not_be_written() {
    let folder = Scratch::new();
    // Nobody, not even root, makes files there.
    check_refused(&record_after(":", &folder, "/proc/1/trace"), &["cannot create the trace", "that you may write to"]);
}

#[test]
fn a_limit_for_files_is_met_in_the_middle() {
    let folder = Scratch::new();
    let outcome = record_after("ulimit -S -f 64", &folder, "trace");
    check_cut(&outcome, &folder, "trace", "the limit for a file's size is reached");
    assert!(fs::metadata(folder.join("trace")).expect("the trace").len() <= 64 * 1024, "the limit was not kept");
}

#[test]
fn a_limit_for_files_is_met_at_the_start() {
    let folder = Scratch::new();
    check_refused(&record_after("ulimit -S -f 0", &folder, "trace"), &["the limit for a file's size is reached"]);
}

#[test]
fn no_descriptors_are_left() {
    let folder = Scratch::new();
    let outcomes: Vec<Outcome> =
        (4..14).map(|limit| record_after(&format!("ulimit -n {limit}"), &folder, "trace")).collect();
    // From where it is enough for the program itself, it runs or is not started at all; never is it harmed.
    for outcome in &outcomes {
        if outcome.text().contains(RAN) {
            assert_eq!(outcome.end, End::Status(6), "{}", outcome.error_text());
        } else {
            assert!(matches!(outcome.end, End::Status(125 | 127)), "{:?}: {}", outcome.end, outcome.error_text());
            assert!(!outcome.error_text().is_empty());
        }
    }
    let advised = outcomes.iter().filter(|outcome| outcome.error_text().contains("ulimit -n"));
    assert!(advised.count() > 0, "{outcomes:?}");
}

/// A small file system, unmounted when this is dropped.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        Command::new(["/usr/bin/umount".as_ref(), self.0.as_os_str()], "/".as_ref()).run();
    }
}

#[test]
fn the_disk_is_full_in_the_middle() {
    if !is_root() {
        return;
    }
    let folder = Scratch::new();
    let disk = folder.join("disk");
    fs::create_dir(&disk).expect("a folder of our own");
    let mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "disk"];
    let mounted = Command::new(mount, folder.path()).run();
    assert_eq!(mounted.end, End::Status(0), "{}", mounted.error_text());
    let _unmount = Mounted(disk.clone());
    let outcome = record_after(":", &folder, "disk/trace");
    check_cut(&outcome, &folder, "disk/trace", "free some room");
    fs::remove_file(disk.join("trace")).expect("the trace");
    fs::write(disk.join("full"), vec![1; 1 << 20]).expect_err("the disk is full");
    check_refused(&record_after(":", &folder, "disk/trace"), &["free some room"]);
}

#[test]
fn a_trace_is_for_its_owner_alone_whatever_the_mask() {
    let folder = Scratch::new();
    let outcome = record_after("umask 0", &folder, "trace");
    assert_eq!(outcome.end, End::Status(6), "{}", outcome.error_text());
    let mode = fs::metadata(folder.join("trace")).expect("the trace").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
