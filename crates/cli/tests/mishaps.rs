//! What people see of the verbs that read no trace when something is wrong, and of all verbs with an option that there is not; `reading.rs` has those that read traces.
#![cfg(target_arch = "x86_64")]

mod common;

use std::{
    fs::{self, OpenOptions, Permissions},
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
};

use common::Directory;

/// Every verb as its words, and its usage behind its name.
const USAGE: [(&[&str], &str); 22] = [
    (&["completions"], " [OPTIONS] <SHELL>"),
    (&["diff"], " [OPTIONS] <BEFORE> <AFTER>"),
    (&["doctor"], " [OPTIONS]"),
    (&["export"], " [OPTIONS]"),
    (&["functions"], " [OPTIONS] [FILE]"),
    (&["graph"], " [OPTIONS] <FUNCTION>"),
    (&["html"], " [OPTIONS]"),
    (&["info"], " [OPTIONS]"),
    (&["man"], " [OPTIONS] [DIR"),
    (&["patch"], " [OPTIONS] <COMMAND>"),
    (&["patch", "apply"], ""),
    (&["patch", "build"], ""),
    (&["patch", "list"], ""),
    (&["patch", "revert"], ""),
    (&["patch", "show"], ""),
    (&["patch", "status"], ""),
    (&["record"], " [OPTIONS] [COMMAND]..."),
    (&["replay"], " [OPTIONS]"),
    (&["report"], " [OPTIONS]"),
    (&["sql"], " [OPTIONS] [QUERY]"),
    (&["stress"], " [OPTIONS]"),
    (&["top"], " [OPTIONS] [COMMAND]..."),
];

/// Command lines, their status, and all that standard error shows. In [`folder`].
const MISHAPS: &[(&str, i32, &str)] = &[
    // A file that is not there.
    (
        "functions none",
        3,
        "looking for the functions of none: cannot read none: No such file or directory (os error 2)",
    ),
    ("patch show none", 3, "cannot read none: No such file or directory (os error 2)"),
    ("patch apply none -p 1073741824", 3, "cannot read none: No such file or directory (os error 2)"),
    (
        "patch build --target none --old old.o --new new.o -o x",
        3,
        "cannot read none: No such file or directory (os error 2)",
    ),
    (
        "patch build --target program --old none --new new.o -o x",
        3,
        "cannot read none: No such file or directory (os error 2)",
    ),
    ("record -- ./none", 127, "cannot find the program `./none`; give its path, or check PATH"),
    // A file of something else.
    (
        "functions foreign",
        3,
        "looking for the functions of foreign: it does not begin as an ELF file; trapline reads ELF executables and shared objects for x86 and x86-64",
    ),
    ("patch show foreign", 2, "foreign: it is no trapline patch; `trapline patch build` makes one"),
    ("patch apply foreign -p 1073741824", 2, "foreign: it is no trapline patch; `trapline patch build` makes one"),
    ("patch build --target foreign --old old.o --new new.o -o x", 2, "foreign: it cannot be read: Unknown file magic"),
    (
        "patch build --target program --old foreign --new new.o -o x",
        2,
        "foreign: it cannot be read: Unknown file magic",
    ),
    ("record -- ./foreign", 126, "cannot execute ./foreign: it has no permission to be executed; `chmod +x` gives it"),
    // A file that was cut.
    ("functions cut-program", 0, "cut-program is shorter than its headers say; functions behind its end are missing"),
    ("patch show cut.tlp", 2, "cut.tlp: it is damaged: it is shorter or longer than it was; build or copy it again"),
    (
        "patch apply cut.tlp -p 1073741824",
        2,
        "cut.tlp: it is damaged: it is shorter or longer than it was; build or copy it again",
    ),
    (
        "patch build --target program --old old.o --new cut.o -o x",
        2,
        "cut.o: it cannot be read: Invalid ELF section header offset/size/alignment",
    ),
    ("record -- ./cut-program", 126, "cannot execute ./cut-program: its ELF headers are broken"),
    // A process that is not there.
    (
        "record -p 1073741824",
        2,
        "cannot record process 1073741824: there is no such process; `ps` or `pgrep` tells the number",
    ),
    (
        "patch apply fix.tlp -p 1073741824",
        2,
        "cannot patch process 1073741824: there is no such process; `ps` or `pgrep` tells the number",
    ),
    (
        "patch revert fix -p 1073741824",
        2,
        "cannot patch process 1073741824: there is no such process; `ps` or `pgrep` tells the number",
    ),
    (
        "patch list -p 1073741824",
        2,
        "cannot patch process 1073741824: there is no such process; `ps` or `pgrep` tells the number",
    ),
    (
        "patch status -p 1073741824",
        2,
        "cannot patch process 1073741824: there is no such process; `ps` or `pgrep` tells the number",
    ),
    // A full disk, and a folder that is not there, where something is to be kept.
    (
        "record -o /dev/full -- ./program",
        125,
        "cannot write to the trace /dev/full: No space left on device (os error 28); free some room, or write to another disk with -o; what was written so far can be read",
    ),
    (
        "record -o none/trace -- ./program",
        125,
        "cannot create the trace none/trace: No such file or directory (os error 2); name another file with -o, in a directory that you may write to",
    ),
    (
        "patch build --target program --old old.o --new new.o -o /dev/full",
        3,
        "cannot write the patch to /dev/full: No space left on device (os error 28)",
    ),
    (
        "patch build --target program --old old.o --new new.o -o none/x",
        3,
        "cannot write the patch to none/x: No such file or directory (os error 2)",
    ),
];

/// The same command lines without a mishap, which have to succeed and print something or nothing.
const WELL: [(&str, bool); 10] = [
    ("completions bash", true),
    ("doctor", true),
    ("functions program", true),
    ("man", true),
    ("patch build --target program --old old.o --new new.o -o again.tlp", true),
    ("patch show fix.tlp", true),
    ("record -q -o trace -- ./program", false),
    ("stress --seconds 1 --threads 1", true),
    ("stress --seconds 1 --threads 1 --json", true),
    ("patch show fix.tlp --json", true),
];

const OLD: &str = "__attribute__((noinline)) int f(void) { return 1; } int main(void) { return f() - 1; }\n";

/// A program, its object and a recompiled one, a patch of them; and what is left of those when they are cut.
fn folder(name: &str) -> Directory {
    let directory = Directory::new(name);
    let at = |file: &str| directory.0.join(file);
    let gcc = |arguments: &str| {
        let mut gcc = Command::new("gcc");
        let gcc = gcc.args(arguments.split(' ')).current_dir(&directory.0);
        assert!(gcc.status().expect("gcc is needed for this test").success());
    };
    fs::write(at("old.c"), OLD).expect("a file");
    fs::write(at("new.c"), OLD.replace("return 1;", "return 2;")).expect("a file");
    gcc("-O1 -ffunction-sections -c old.c new.c");
    gcc("old.o -o program");
    directory.text(&"patch build --target program --old old.o --new new.o -o fix.tlp".split(' ').collect::<Vec<_>>());
    for (whole, cut, bytes) in [("program", "cut-program", 2000), ("new.o", "cut.o", 300), ("fix.tlp", "cut.tlp", 100)]
    {
        fs::write(at(cut), &fs::read(at(whole)).expect("a file")[..bytes]).expect("a file");
    }
    fs::set_permissions(at("cut-program"), Permissions::from_mode(0o755)).expect("its permissions");
    fs::write(at("foreign"), "#!/bin/sh\necho nothing\n".repeat(100)).expect("a file");
    directory
}

#[test]
fn an_option_that_there_is_not_is_refused_with_the_usage() {
    let directory = Directory::new("mishaps-option");
    for (verb, usage) in USAGE {
        let output = directory.trapline(&[verb, &["--xyzzy"]].concat());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let status = if matches!(verb, ["record" | "top"]) { 125 } else { 2 };
        assert_eq!((output.status.code(), output.stdout.len()), (Some(status), 0), "{verb:?}: {told}");
        assert!(told.starts_with("error: unexpected argument '--xyzzy' found\n\n"), "{verb:?}: {told}");
        assert!(told.contains(&format!("\nUsage: trapline {}{usage}", verb.join(" "))), "{verb:?}: {told}");
        assert!(told.ends_with("\n\nFor more information, try '--help'.\n"), "{verb:?}: {told}");
    }
}

#[test]
fn each_mishap_is_told_in_one_line_with_its_status() {
    let directory = folder("mishaps-told");
    assert!(fs::metadata("/proc/1073741824").is_err());
    for (line, status, expected) in MISHAPS {
        let output = directory.trapline(&line.split(' ').collect::<Vec<_>>());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), told), (Some(*status), format!("trapline: {expected}\n")), "{line}");
    }
    assert!(!directory.0.join("x").exists(), "a patch of a mishap");
}

#[test]
fn without_a_mishap_nothing_is_told_and_a_full_disk_or_a_reader_that_left_is_another_matter() {
    let directory = folder("mishaps-well");
    for (line, has_output) in WELL {
        let words: Vec<&str> = line.split(' ').collect();
        let run = |stdout: Stdio| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
            directory.confine(command.args(&words)).stdout(stdout).output().expect("the command runs")
        };
        let told = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
        let well = run(Stdio::piped());
        assert_eq!((well.status.code(), told(&well)), (Some(0), String::new()), "{line}");
        assert_eq!(!well.stdout.is_empty(), has_output, "{line}");

        let full = run(OpenOptions::new().write(true).open("/dev/full").expect("/dev/full").into());
        let status = if has_output { 3 } else { 0 };
        assert_eq!(full.status.code(), Some(status), "{line}: {}", told(&full));
        let has_error = told(&full).contains("cannot write to standard output: No space left on device (os error 28)");
        assert_eq!(has_error, has_output, "{line}: {}", told(&full));

        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let left = run(writer.into());
        assert_eq!((left.status.code(), told(&left)), (Some(0), String::new()), "{line}");
    }
}
