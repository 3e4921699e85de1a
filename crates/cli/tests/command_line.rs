//! The command line itself: what errors look like to people and to programs, the statuses, the manual, completions.

mod common;

use std::{
    fs::{self, OpenOptions},
    process::{Command, Output},
};

use common::{Directory, write_trace};
use serde_json::Value;
use trapline_trace::record::Event::{Enter, Exit};

/// Each verb, as its words.
const VERBS: &[&[&str]] = &[
    &["completions"],
    &["diff"],
    &["doctor"],
    #[cfg(target_arch = "x86_64")]
    &["export"],
    &["functions"],
    &["graph"],
    #[cfg(target_arch = "x86_64")]
    &["html"],
    &["info"],
    &["man"],
    &["patch"],
    #[cfg(target_arch = "x86_64")]
    &["patch", "apply"],
    &["patch", "build"],
    #[cfg(target_arch = "x86_64")]
    &["patch", "list"],
    #[cfg(target_arch = "x86_64")]
    &["patch", "revert"],
    &["patch", "show"],
    #[cfg(target_arch = "x86_64")]
    &["patch", "status"],
    #[cfg(target_arch = "x86_64")]
    &["patch", "symbols"],
    &["record"],
    &["replay"],
    &["report"],
    #[cfg(target_arch = "x86_64")]
    &["sql"],
    &["stress"],
    #[cfg(target_arch = "x86_64")]
    &["top"],
    &[],
];

/// Command lines that know `--json`, without it, that fail on a file that is not there.
const WITH_JSON: &[&[&str]] = &[
    &["diff", "none.data", "none.data"],
    &["functions", "-i", "none.data"],
    &["graph", "main", "-i", "none.data"],
    &["info", "-i", "none.data"],
    &["replay", "-i", "none.data"],
    &["report", "-i", "none.data"],
    #[cfg(target_arch = "x86_64")]
    &["sql", "SELECT 1", "-i", "none.data"],
    &["patch", "show", "none.data"],
];

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The error that is the last line of standard error.
fn error(output: &Output) -> Value {
    assert!(output.stdout.is_empty(), "data beside an error");
    let told = told(output);
    let error: Value =
        serde_json::from_str(told.lines().last().unwrap_or_default()).unwrap_or_else(|error| panic!("{error}: {told}"));
    assert_eq!(error["version"], 1);
    assert_eq!(error["error"]["status"].as_i64(), output.status.code().map(i64::from));
    error["error"].clone()
}

#[test]
fn without_arguments_the_way_is_shown() {
    let output = Directory::new("line-way").trapline(&[]);
    let told = told(&output);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    for next in ["trapline record -- ", "trapline report ", "trapline export ", "--help", "trapline doctor"] {
        assert!(told.contains(next), "{next}: {told}");
    }
    assert!(told.lines().count() < 10, "{told}");
}

#[test]
fn the_list_of_verbs_here_is_that_of_the_command() {
    let help = Directory::new("line-list").text(&["--help"]);
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let listed: Vec<&str> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    let known: Vec<&str> = VERBS.iter().filter(|verb| verb.len() == 1).map(|verb| verb[0]).chain(["help"]).collect();
    let mut sorted = listed.clone();
    sorted.sort_unstable();
    let mut expected = known;
    expected.sort_unstable();
    assert_eq!(sorted, expected);
}

#[test]
fn the_help_of_each_verb_has_examples_and_a_full_disk_is_told() {
    let directory = Directory::new("line-help");
    for verb in &VERBS[..VERBS.len() - 1] {
        let words = [*verb, &["--help"]].concat();
        let help = directory.text(&words);
        assert!(help.contains("Example") && help.contains(&format!("  trapline {}", verb[0])), "{verb:?}: {help}");
        let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
        let output = command.args(&words).stdout(full).output().expect("the command runs");
        let status = if matches!(verb, ["record" | "top"]) { 125 } else { 3 };
        assert_eq!(output.status.code(), Some(status), "{verb:?}");
        assert!(told(&output).contains("No space left on device"), "{verb:?}: {}", told(&output));
    }
    let help = directory.text(&["--help"]);
    assert!(help.contains("Exit status:") && help.contains("125") && help.contains("--json"), "{help}");
}

#[test]
fn where_json_was_asked_for_errors_are_json_and_elsewhere_text() {
    let directory = Directory::new("line-json");
    for line in WITH_JSON {
        let failed = error(&directory.trapline(&[*line, &["--json"]].concat()));
        assert_eq!((&failed["kind"], &failed["status"], &failed["errno"]), (&"failed".into(), &3.into(), &2.into()));
        let message = failed["message"].as_str().expect("a text");
        assert!(message.contains("none.data") && message.contains("No such file"), "{message}");

        let text = told(&directory.trapline(line));
        assert_eq!(text.trim_end(), format!("trapline: {message}"), "text and JSON differ");

        let usage = error(&directory.trapline(&[*line, &["--json", "--nonsense"]].concat()));
        assert_eq!((&usage["kind"], &usage["status"]), (&"usage".into(), &2.into()));
        let message = usage["message"].as_str().expect("a text");
        assert!(message.starts_with("unexpected argument '--nonsense' found") && message.contains("--help"));
        assert!(told(&directory.trapline(&[*line, &["--nonsense"]].concat())).starts_with("error: unexpected"));
    }
}

#[test]
fn what_is_told_of_a_trace_comes_before_the_error() {
    let directory = Directory::new("line-last");
    let events: Vec<_> =
        (0..2000).flat_map(|at| [(at * 100, Enter { site: 0 }), (at * 100 + 50, Exit { depth: 1 })]).collect();
    let path = directory.0.join("cut.data");
    write_trace(&path, &["main".to_owned()], &events);
    let bytes = fs::read(&path).expect("the trace");
    fs::write(&path, &bytes[..bytes.len() * 2 / 3]).expect("a file");
    let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    let command = command.args(["report", "--json", "-i", "cut.data"]).current_dir(&directory.0).stdout(full);
    let output = command.output().expect("the command runs");
    assert!(told(&output).starts_with("trapline: the trace is damaged"), "{}", told(&output));
    assert_eq!(error(&output)["errno"], 28);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_status_of_record_tells_a_program_that_failed_from_one_that_did_not_run() {
    let directory = Directory::new("line-status");
    let status = |words: &[&str]| {
        let output = directory.trapline(&[&["record", "-q"], words].concat());
        (output.status.code(), told(&output))
    };
    for own in [2, 3] {
        assert_eq!(status(&["-o", "trace", "--", "/bin/sh", "-c", &format!("exit {own}")]).0, Some(own));
    }
    assert_eq!(status(&["--", "/nowhere/at/all"]).0, Some(127));
    assert_eq!(status(&["--", "/usr/share"]).0, Some(126));
    assert_eq!(status(&["--nonsense", "--", "/bin/true"]).0, Some(125));
    let (code, told) = status(&["-o", "no/such/folder/trace", "--", "/bin/true"]);
    assert!(code == Some(125) && told.contains("no/such/folder/trace"), "{code:?}: {told}");
    assert_eq!(status(&["--duration", "0.1", "-p", "1073741824"]).0, Some(2));
}

#[test]
fn each_verb_has_a_page_of_the_manual() {
    let directory = Directory::new("line-man");
    directory.text(&["man", "man1"]);
    let mut pages: Vec<String> = fs::read_dir(directory.0.join("man1"))
        .expect("the folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    pages.sort_unstable();
    let named = |verb: &&[&str]| format!("{}.1", [&["trapline"], *verb].concat().join("-"));
    let mut expected: Vec<String> = VERBS.iter().map(named).collect();
    expected.sort_unstable();
    assert_eq!(pages, expected);
    for verb in VERBS {
        let page = fs::read_to_string(directory.0.join("man1").join(named(verb))).expect("the page");
        assert!(page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"), "{verb:?}: {page}");
        let has_options = page.contains(".SH OPTIONS") && page.contains("\\-\\-help");
        assert!(has_options && page.contains("trapline"), "{verb:?}: {page}");
    }
    assert!(directory.text(&["man"]).contains(".TH trapline 1"));
    fs::write(directory.0.join("file"), "").expect("a file");
    let output = directory.trapline(&["man", "file"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(told(&output).starts_with("trapline: cannot write the manual to file: "), "{}", told(&output));
}

/// What bash offers at the end of a line.
fn completed(script: &str, line: &[&str]) -> Vec<String> {
    let ask = "source \"$0\"; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); \
        _trapline trapline \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let mut command = Command::new("bash");
    let output = command.args(["--norc", "-c", ask, script]).args(line).output().expect("bash runs");
    assert!(output.status.success() && output.stderr.is_empty(), "{}", told(&output));
    let offered = String::from_utf8_lossy(&output.stdout).into_owned();
    offered.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[test]
fn bash_completes_verbs_options_and_values() {
    let directory = Directory::new("line-bash");
    let path = directory.0.join("trapline.bash");
    fs::write(&path, directory.text(&["completions", "bash"])).expect("the script");
    let script = path.to_str().expect("its name");
    let checked = Command::new("bash").args(["-n", script]).output().expect("bash runs");
    assert!(checked.status.success() && checked.stderr.is_empty(), "{}", told(&checked));
    assert_eq!(completed(script, &["trapline", "repo"]), ["report"]);
    #[cfg(target_arch = "x86_64")]
    assert_eq!(completed(script, &["trapline", "export", "--format", "fi"]), ["firefox"]);
    assert_eq!(completed(script, &["trapline", "patch", "sh"]), ["show"]);
    assert_eq!(completed(script, &["trapline", "replay", "--min-d"]), ["--min-duration"]);
    assert_eq!(completed(script, &["trapline", "nonsense"]), [""; 0]);
}

#[test]
fn other_shells_have_a_script_and_unknown_ones_are_refused() {
    let directory = Directory::new("line-shells");
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(directory.text(&["completions", shell]).contains("replay"), "{shell}");
    }
    let output = directory.trapline(&["completions", "nonsense"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(told(&output).contains("[possible values: bash, "), "{}", told(&output));
}
