//! Programs that are not started: none of them runs, no trace is left, and the exit status is the one that a shell gives.

use std::{ffi::OsString, fs, os::unix::fs::PermissionsExt, path::Path};

use trapline_testsuite::{
    run::{Command, End},
    scratch::Scratch,
    trapline,
};

use super::{RAN, is_root, program, record, script};

fn check(folder: &Scratch, word: impl Into<OsString>, status: i32, texts: &[&str]) {
    let outcome = record(folder, &[word.into()]);
    assert_eq!(outcome.end, End::Status(status), "{}", outcome.error_text());
    assert!(!outcome.text().contains(RAN), "it was started");
    for text in texts {
        assert!(outcome.error_text().contains(text), "`{text}` is not in: {}", outcome.error_text());
    }
    assert!(!folder.join("trace").exists(), "a trace is left of what did not run");
}

#[test]
fn a_missing_program() {
    let folder = Scratch::new();
    check(
        &folder,
        "trapline-no-such-program",
        127,
        &["cannot find the program `trapline-no-such-program`", "check PATH"],
    );
    check(&folder, "./nothing", 127, &["cannot find the program `./nothing`"]);
}

#[test]
fn a_folder() {
    check(&Scratch::new(), "/usr/share", 126, &["it is a directory"]);
}

#[test]
fn a_file_that_may_not_be_executed() {
    let folder = Scratch::new();
    let path = script(&folder, "script", "#!/bin/sh\necho ran to its end\n");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("a file of our own");
    check(&folder, path, 126, &["chmod +x"]);
}

#[test]
fn a_script_without_its_interpreter() {
    let folder = Scratch::new();
    let path = script(&folder, "script", "#!/usr/bin/no-such-interpreter -x\necho ran to its end\n");
    check(&folder, path, 126, &["/usr/bin/no-such-interpreter does not exist", "install it"]);
    let path = script(&folder, "empty", "#!\n");
    check(&folder, path, 126, &["names no interpreter"]);
}

#[test]
fn a_script_that_interprets_itself() {
    let folder = Scratch::new();
    let path = folder.join("script");
    let path = script(&folder, "script", &format!("#!{}\n", path.display()));
    check(&folder, path, 126, &["scripts without end"]);
}

#[test]
fn text_that_is_no_script() {
    let folder = Scratch::new();
    let path = script(&folder, "text", "echo ran to its end\n");
    check(&folder, path, 126, &["neither a program (ELF) nor a script"]);
}

#[test]
fn a_static_program() {
    let folder = Scratch::new();
    check(&folder, program(&folder, &["-static"]), 125, &["linked statically", "link it dynamically"]);
}

#[test]
fn a_static_32_bit_program() {
    let folder = Scratch::new();
    check(&folder, program(&folder, &["-m32", "-static"]), 125, &["linked statically", "link it dynamically"]);
}

#[test]
fn a_program_whose_dynamic_linker_is_missing() {
    let folder = Scratch::new();
    let flags = &["-Wl,--dynamic-linker=/lib/no-such-linker.so"];
    check(&folder, program(&folder, flags), 126, &["/lib/no-such-linker.so does not exist"]);
}

#[test]
fn what_only_begins_like_a_program() {
    let folder = Scratch::new();
    let whole = fs::read(program(&folder, &[])).expect("the program");
    for len in [4, 16, 63] {
        let path = script(&folder, "cut", "");
        fs::write(&path, &whole[..len]).expect("a file of our own");
        check(&folder, path, 126, &["ELF headers are broken"]);
    }
}

#[test]
fn a_setuid_program_for_other_users() {
    if !is_root() {
        return;
    }
    let folder = Scratch::new();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).expect("a folder of our own");
    let path = program(&folder, &[]);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).expect("a file of our own");
    let trapline = folder.join("trapline");
    fs::copy(trapline::path(), &trapline).expect("a copy of the command");
    let words = ["/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"].map(OsString::from);
    let command = words.into_iter().chain([trapline.into(), "record".into(), "-o".into(), "trace".into(), path]);
    let outcome = Command::new(command, folder.path()).run();
    assert_eq!(outcome.end, End::Status(125), "{}", outcome.error_text());
    assert!(
        outcome.error_text().contains("setuid") && outcome.error_text().contains("as root"),
        "{}",
        outcome.error_text()
    );
    assert!(!outcome.text().contains(RAN) && !Path::new(&folder.join("trace")).exists());
}
