//! What people see of each verb that reads a trace when something is wrong: with the command, with the file, with where the output goes.

mod common;

use std::{
    fs::{self, File, OpenOptions},
    process::{Command, Output, Stdio},
};

use common::{Directory, write_trace};
use trapline_trace::record::Event::{Enter, Exit};

/// Each verb with what it needs beside the trace's name, which follows.
const VERBS: &[&[&str]] = &[
    &["report", "-i"],
    &["replay", "-i"],
    &["functions", "-i"],
    &["info", "-i"],
    &["graph", "main", "-i"],
    &["diff", "good.data"],
    #[cfg(target_arch = "x86_64")]
    &["export", "-q", "-o", "-", "--format", "chrome", "-i"],
    #[cfg(target_arch = "x86_64")]
    &["html", "-q", "-o", "-", "-i"],
];

/// With a trace of 10,000 calls, `good.data`.
fn directory(name: &str) -> Directory {
    let directory = Directory::new(name);
    let events: Vec<_> =
        (0..10_000).flat_map(|at| [(at * 100, Enter { site: 0 }), (at * 100 + 50, Exit { depth: 1 })]).collect();
    write_trace(&directory.0.join("good.data"), &["main".to_owned()], &events);
    directory
}

/// What each verb says of a trace: its status, and standard error without what comes before the first colon.
fn told(directory: &Directory, trace: &str) -> Vec<(Option<i32>, String)> {
    let told = VERBS.iter().map(|verb| {
        let output = directory.trapline(&[*verb, &[trace]].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    });
    told.collect()
}

#[test]
fn help_has_examples() {
    let directory = directory("reading-help");
    for verb in VERBS {
        let help = directory.text(&[verb[0], "--help"]);
        assert!(help.contains("Example") && help.contains("trapline "), "{}: {help}", verb[0]);
    }
}

#[test]
fn wrong_options_are_refused_with_the_way_to_help() {
    let directory = directory("reading-options");
    for verb in VERBS {
        let output = directory.trapline(&[verb[0], "--nonsense"]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains("unexpected argument '--nonsense' found") && told.contains("--help"), "{told}");
        assert!(output.stdout.is_empty());
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_format_that_is_not_known_is_refused_with_those_that_are() {
    let output = Directory::new("reading-format").trapline(&["export", "--format", "nonsense"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("[possible values: perfetto, chrome, firefox,"), "{told}");
}

#[test]
fn a_file_that_is_not_there_is_named_with_what_the_system_says() {
    for told in told(&directory("reading-missing"), "none.data") {
        assert_eq!(told.0, Some(3));
        assert!(
            told.1.starts_with("trapline: cannot open the trace none.data: No such file or directory"),
            "{}",
            told.1
        );
    }
}

#[test]
fn a_file_of_something_else_is_named_with_what_it_begins_with() {
    let directory = directory("reading-foreign");
    fs::write(directory.0.join("foreign.data"), "#!/bin/sh\necho no trace\n".repeat(1000)).expect("a file");
    for told in told(&directory, "foreign.data") {
        assert_eq!(told.0, Some(3));
        assert!(
            told.1.starts_with("trapline: foreign.data is not a trapline trace: it starts with")
                && told.1.contains("#!/bin/sh"),
            "{}",
            told.1
        );
    }
}

#[test]
fn of_a_file_that_was_cut_what_is_there_is_read() {
    let directory = directory("reading-cut");
    let bytes = fs::read(directory.0.join("good.data")).expect("the trace");
    fs::write(directory.0.join("cut.data"), &bytes[..bytes.len() * 2 / 3]).expect("a file");
    for told in told(&directory, "cut.data") {
        assert_eq!(told.0, Some(0), "{}", told.1);
        assert!(told.1.starts_with("trapline: the trace is damaged from byte "), "{}", told.1);
    }
}

fn to(directory: &Directory, verb: &[&str], output: Stdio) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    command.args(verb).arg("good.data").current_dir(&directory.0).stdout(output).stderr(Stdio::piped());
    command.spawn().and_then(std::process::Child::wait_with_output).expect("the command runs")
}

#[test]
fn a_full_disk_is_a_failure() {
    let directory = directory("reading-full");
    for verb in VERBS {
        let full: File = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let output = to(&directory, verb, full.into());
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{told}");
        let expected = "trapline: cannot write to standard output: No space left on device";
        assert!(told.starts_with(expected), "{}: {told}", verb[0]);
    }
}

#[test]
fn a_reader_that_has_gone_away_is_no_failure() {
    let directory = directory("reading-pipe");
    for verb in VERBS {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = to(&directory, verb, writer.into());
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""), "{verb:?}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn an_export_does_not_overwrite_its_trace() {
    let directory = directory("reading-itself");
    let before = fs::read(directory.0.join("good.data")).expect("the trace");
    let output = directory.trapline(&["export", "-i", "good.data", "-o", "./good.data"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        (output.status.code(), told.as_str()),
        (Some(2), "trapline: ./good.data is the trace itself; name another file with -o\n")
    );
    assert_eq!(fs::read(directory.0.join("good.data")).expect("the trace"), before);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn an_export_lies_beside_its_trace_and_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let directory = directory("reading-beside");
    let output = directory.trapline(&["export", "-i", "good.data", "--format", "folded"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.starts_with("[trapline: 10000 calls in good.folded; it is opened by flamegraph.pl"), "{told}");
    let metadata = fs::metadata(directory.0.join("good.folded")).expect("the export");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn tables_are_parts_of_a_data_set_if_that_is_asked_for() {
    let directory = Directory::new("reading-partition");
    common::write_calls(&directory.0.join("trapline.data"), 100);
    let told = String::from_utf8(directory.trapline(&["export", "--format", "parquet", "--partition"]).stderr);
    let folder = directory.0.join("calls/host=__HIVE_DEFAULT_PARTITION__/date=1970-01-01");
    let table = std::fs::read(folder.join("trapline-0.parquet")).unwrap_or_else(|error| panic!("{error}: {told:?}"));
    assert!(table.starts_with(b"PAR1") && table.ends_with(b"PAR1"));
    let refused = directory.trapline(&["export", "--format", "folded", "--partition"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--format parquet"));
}
