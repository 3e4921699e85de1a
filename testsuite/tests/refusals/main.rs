//! What cannot be recorded, or cannot be written, is told in a sentence that says what to do, and no program is harmed.

mod programs;
mod room;

use std::{ffi::OsString, fs, os::unix::fs::PermissionsExt, path::PathBuf};

use trapline_testsuite::{
    program::{Optimised, Program},
    run::{Command, Outcome},
    scratch::Scratch,
    trapline,
};

/// What [`program`] prints: it must not, if it was refused.
const RAN: &str = "ran to its end";

/// A program in a folder, compiled with flags.
fn program(folder: &Scratch, flags: &'static [&'static str]) -> OsString {
    Program::of(&["refused.c"]).flags(flags).build(Optimised::Yes, folder.path()).remove(0)
}

/// Writes a file that can be executed.
fn script(folder: &Scratch, name: &str, content: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, content).expect("a folder of our own");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a file of our own");
    path
}

/// Records a command into the folder's file `trace`.
fn record(folder: &Scratch, words: &[OsString]) -> Outcome {
    Command::new(words, folder.path()).behind(trapline::record(&folder.join("trace"), &[])).run()
}

/// The shell, with a script that gets the words as `$@`.
fn shell(script: &str, words: &[OsString]) -> Vec<OsString> {
    let mut all: Vec<OsString> = ["/bin/sh", "-c", script, "sh"].map(Into::into).to_vec();
    all.extend_from_slice(words);
    all
}

/// Whether the tests run as root. Some of them need that; CI does.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    let is_root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    assert!(is_root || std::env::var_os("CI").is_none(), "under CI, the tests run as root");
    if !is_root {
        eprintln!("left out: only root can try this");
    }
    is_root
}
