//! Colours: where people see them, and where nobody does.

mod common;

use std::{fs, process::Command};

use common::{Directory, write_calls};

/// With a trace, `trapline.data`, and one of which a part is missing, `cut.data`.
fn directory(name: &str) -> Directory {
    let directory = Directory::new(name);
    write_calls(&directory.0.join("trapline.data"), 50_000);
    let bytes = fs::read(directory.0.join("trapline.data")).expect("the trace");
    fs::write(directory.0.join("cut.data"), &bytes[..bytes.len() * 2 / 3]).expect("a file");
    directory
}

/// Of a control sequence (ECMA-48).
const ESCAPE: char = '\x1b';

/// Verbs that have headings.
const VERBS: [&str; 4] =
    ["report", "graph main", "replay -D 1 --min-duration 60", "diff trapline.data none-but-main.data"];

/// Both streams, of a command that writes to pipes.
fn piped(directory: &Directory, line: &str, environment: &[(&str, &str)]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    directory.confine(&mut command).args(line.split(' ')).envs(environment.iter().copied());
    let output = command.output().expect("the command runs");
    [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat()
}

#[test]
fn headings_warnings_and_errors_have_colours_on_a_terminal() {
    let directory = directory("color-terminal");
    write_calls(&directory.0.join("none-but-main.data"), 500);
    for verb in VERBS {
        let (_, text) = directory.on_terminal(&format!("--no-pager {verb}"), &[]);
        assert!(text.contains("\x1b[1m") && text.contains("\x1b[0m"), "{verb}: {text}");
        let (_, plain) = directory.on_terminal(&format!("--no-pager --color never {verb}"), &[]);
        assert!(!plain.contains(ESCAPE), "{verb}: {plain}");
        // Colours change nothing else.
        assert_eq!(text.replace("\x1b[1m", "").replace("\x1b[0m", ""), plain, "{verb}");
    }
    let (_, text) = directory.on_terminal("--no-pager report -i cut.data", &[]);
    assert!(text.contains("\x1b[33mtrapline:\x1b[0m the trace is damaged"), "{text}");
    let (_, text) = directory.on_terminal("report -i none.data", &[]);
    assert!(text.contains("\x1b[31mtrapline:\x1b[0m cannot open"), "{text}");
}

#[test]
fn who_wants_no_colours_sees_none() {
    let directory = directory("color-none");
    let unwanted: [(&str, &[(&str, &str)]); 5] = [
        ("report -i cut.data", &[("NO_COLOR", "1")]),
        ("report -i cut.data", &[("NO_COLOR", "1"), ("CLICOLOR_FORCE", "1")]),
        ("report -i cut.data", &[("CLICOLOR", "0")]),
        ("report -i cut.data", &[("TERM", "dumb")]),
        ("report -i cut.data --color=never", &[("CLICOLOR_FORCE", "1")]),
    ];
    for (line, environment) in unwanted {
        let (status, text) = directory.on_terminal(&format!("--no-pager {line}"), environment);
        assert_eq!(status, Some(0), "{text}");
        assert!(text.contains("main [prog]") && text.contains("damaged"), "{text}");
        assert!(!text.contains(ESCAPE), "{environment:?}: {text}");
    }
    // An empty one asks for nothing.
    let (_, text) = directory.on_terminal("--no-pager report", &[("NO_COLOR", "")]);
    assert!(text.contains(ESCAPE), "{text}");
    for line in ["--help", "report --help", "report --nonsense"] {
        let (_, text) = directory.on_terminal(&format!("{line} --color never"), &[]);
        assert!(!text.contains(ESCAPE), "{line}: {text}");
        let (_, text) = directory.on_terminal(line, &[]);
        assert!(text.contains(ESCAPE), "{line}: {text}");
    }
}

#[test]
fn files_and_pipes_have_colours_only_if_they_are_asked_for() {
    let directory = directory("color-pipe");
    assert!(!piped(&directory, "report -i cut.data", &[]).contains(ESCAPE));
    for (line, environment) in [
        ("report -i cut.data --color always", [("NO_COLOR", "1")].as_slice()),
        ("report -i cut.data", &[("CLICOLOR_FORCE", "1")]),
    ] {
        let text = piped(&directory, line, environment);
        assert!(text.contains("\x1b[1m") && text.contains("\x1b[33mtrapline:"), "{text}");
    }
}

#[test]
fn json_and_what_is_told_beside_it_have_none() {
    let directory = directory("color-json");
    write_calls(&directory.0.join("none-but-main.data"), 500);
    for verb in VERBS.iter().chain(&["report -i cut.data", "report -i none.data", "info -i cut.data"]) {
        let text = piped(&directory, &format!("{verb} --json --color always"), &[("CLICOLOR_FORCE", "1")]);
        assert!(text.contains("{\"") && !text.contains(ESCAPE), "{verb}: {text}");
    }
}

#[test]
fn a_pager_gets_the_colours_of_its_terminal() {
    let (_, text) = directory("color-pager").on_terminal("report", &[("PAGER", "sed s/^/paged:/")]);
    assert!(text.contains("paged:\x1b[1m"), "{text}");
}
