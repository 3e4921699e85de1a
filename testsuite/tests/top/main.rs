//! `trapline top`: what it counts is what a recording of the same program has, the program runs as ever, and a terminal is as it was.

mod terminal;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
};

use serde_json::Value;
use trapline_testsuite::{
    program::{Optimised, Program},
    run::{Command, End},
    scratch::Scratch,
    trace::Report,
    trapline,
};

/// The command that prints what a program does, each table an object; the last one is that of its end.
fn top(options: &[&str]) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![trapline::path().into()];
    words.extend(["top", "--batch", "--json", "--delay", "60"].iter().chain(options).chain(&["--"]).map(Into::into));
    words
}

/// Calls by name, of the last table.
fn calls(printed: &str) -> BTreeMap<String, u64> {
    let last = printed.lines().last().expect("a table");
    let last: Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last}"));
    assert_eq!((&last["last"], &last["uncounted"]), (&Value::Bool(true), &0.into()), "{last}");
    let mut calls = BTreeMap::new();
    for function in last["functions"].as_array().expect("functions") {
        let name = function["name"].as_str().expect("a name");
        let name = name.split_once('(').map_or(name, |(base, _)| base);
        *calls.entry(name.to_owned()).or_default() += function["calls"].as_u64().expect("calls");
    }
    calls
}

/// Where two lists of calls differ.
fn differences(counted: &BTreeMap<String, u64>, recorded: &BTreeMap<String, u64>) -> Vec<String> {
    let names: BTreeSet<&String> = counted.keys().chain(recorded.keys()).collect();
    let differ = names.into_iter().filter(|name| counted.get(*name) != recorded.get(*name));
    differ.map(|name| format!("{name}: {:?} counted, {:?} recorded", counted.get(name), recorded.get(name))).collect()
}

#[test]
fn what_is_counted_is_what_a_recording_has() {
    let programs: [(Program, &[&str]); 4] = [
        (Program::of(&["many_calls.c"]), &["20000"]),
        (Program::of(&["fork.c"]), &[]),
        (Program::of(&["tail_calls.c"]), &[]),
        (Program::of(&["exceptions.cpp"]), &[]),
    ];
    // Of 32-bit programs, records are counted.
    let narrow = programs.map(|(program, arguments)| (program.flags(&["-m32", "-msse2", "-mfpmath=sse"]), arguments));
    for (program, arguments) in [programs, narrow].concat() {
        let scratch = Scratch::new();
        let mut words = program.build(Optimised::Yes, scratch.path());
        words.extend(arguments.iter().map(Into::into));
        let command = Command::new(words, scratch.path());
        let source = command.to_string();
        let bare = command.run();
        let trace = scratch.join("trace");
        command.behind(trapline::record(&trace, &[])).run();
        let recorded = Report::read(&trace).expect("a trace");
        assert_eq!(recorded.losses(), [], "{source}");
        let shown = command.behind(top(&[])).run();
        assert_eq!(shown.end, bare.end, "{source}: {}", shown.error_text());
        assert!(shown.error_text().contains(&bare.text()), "{source} prints {}", shown.error_text());
        let counted = calls(&shown.text());
        assert!(counted.len() > 2, "{source}: {counted:?}");
        assert_eq!(differences(&counted, &recorded.calls), Vec::<String>::new(), "{source}");
        // What differs is found: a function that is left out, and a call that is.
        let name = counted.keys().next().expect("a function").clone();
        let mut wrong = counted.clone();
        *wrong.get_mut(&name).expect("it is there") += 1;
        assert_eq!(differences(&wrong, &recorded.calls).len(), 1);
        wrong.remove(&name);
        assert_eq!(differences(&wrong, &recorded.calls).len(), 1);
    }
}

/// Counts a program and records it: calls, output and end are the same. Returns the calls.
fn same_as_recorded(command: &Command, scratch: &Scratch, options: &[&str]) -> BTreeMap<String, u64> {
    let bare = command.run();
    let trace = scratch.join("trace");
    command.behind(trapline::record(&trace, options)).run();
    let recorded = Report::read(&trace).expect("a trace");
    let shown = command.behind(top(options)).run();
    assert_eq!((shown.end, shown.error_text()), (bare.end, bare.text()));
    let counted = calls(&shown.text());
    assert_eq!(differences(&counted, &recorded.calls), Vec::<String>::new());
    counted
}

/// Few addresses leave no room for counters: records are counted.
#[test]
fn a_program_with_a_limit_for_addresses_is_counted() {
    let scratch = Scratch::new();
    let program = Program::of(&["fork.c"]).build(Optimised::Yes, scratch.path());
    let shell = ["/bin/sh", "-c", "ulimit -v 4000000; exec \"$0\""].map(OsString::from);
    let command = Command::new(shell.into_iter().chain(program), scratch.path());
    let counted = same_as_recorded(&command, &scratch, &[]);
    assert!(counted.contains_key("main"), "{counted:?}");
}

#[test]
fn what_debian_ships_is_counted_and_says_what_it_says_without() {
    let scratch = Scratch::new();
    let command =
        Command::new(["/usr/bin/sort", "-R", "--random-source=/usr/bin/sort", "/usr/share/dict/words"], scratch.path());
    let command = if std::path::Path::new("/usr/share/dict/words").exists() {
        command
    } else {
        Command::new(["/usr/bin/sort", "/etc/services", "/etc/passwd"], scratch.path())
    };
    same_as_recorded(&command, &scratch, &["--lib", "libc.so*"]);
}

#[test]
fn what_cannot_be_counted_gets_an_error_and_no_table() {
    let scratch = Scratch::new();
    let outcome = Command::new(top(&[]).into_iter().chain(["no-such-program".into()]), scratch.path()).run();
    assert_eq!((outcome.end, outcome.text()), (End::Status(127), String::new()));
    assert!(outcome.error_text().contains("cannot find the program"), "{}", outcome.error_text());
    // On no terminal, it says what to do.
    let words: [OsString; 4] = [trapline::path().into(), "top".into(), "--".into(), "true".into()];
    let outcome = Command::new(words, scratch.path()).run();
    assert_eq!(outcome.end, End::Status(125));
    assert!(outcome.error_text().contains("give --batch"), "{}", outcome.error_text());
}
