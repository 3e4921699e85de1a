//! The configuration file, and what comes before it.

mod common;

use std::{fs, process::Command};

use common::{Directory, write_calls};
use serde_json::Value;

/// With this configuration, and traces of one, two, three and four calls: `trapline.data`, `file.data`, `environment.data`, `option.data`.
fn directory(name: &str, config: &str) -> Directory {
    let directory = Directory::new(name);
    for (calls, trace) in (1..).zip(["trapline", "file", "environment", "option"]) {
        write_calls(&directory.0.join(format!("{trace}.data")), calls);
    }
    fs::create_dir(directory.0.join("trapline")).expect("a folder");
    fs::write(directory.0.join("trapline/config.toml"), config).expect("the configuration");
    directory
}

/// The status and both streams, in this environment.
fn run(directory: &Directory, line: &str, environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    let command = directory.confine(&mut command).args(line.split(' ')).envs(environment.iter().copied());
    let output = command.output().expect("the command runs");
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.code(), stdout, stderr)
}

/// How many calls the trace has that is read.
fn calls(directory: &Directory, line: &str, environment: &[(&str, &str)]) -> u64 {
    let (_, stdout, stderr) = run(directory, line, environment);
    let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"));
    report["functions"][0]["calls"].as_u64().expect("a number")
}

#[test]
fn the_file_comes_before_nothing_the_environment_before_it_and_options_before_both() {
    let directory = directory("config-order", "output = \"file.data\"\n");
    let environment = [("TRAPLINE_OUTPUT", "environment.data")];
    for verb in ["report --json", "graph main --json"] {
        assert_eq!(calls(&directory, verb, &[]), 2);
        assert_eq!(calls(&directory, verb, &environment), 3);
        assert_eq!(calls(&directory, &format!("{verb} -i option.data"), &environment), 4);
        assert_eq!(calls(&directory, &format!("{verb} -i option.data"), &[]), 4);
        // As a control, without the file, and with an empty variable.
        assert_eq!(calls(&directory, verb, &[("XDG_CONFIG_HOME", "/nowhere"), ("TRAPLINE_OUTPUT", "")]), 1);
    }
    // A file to list is no conflict with a trace that nobody named.
    let own = env!("CARGO_BIN_EXE_trapline");
    assert_eq!(run(&directory, &format!("functions {own}"), &environment).0, Some(0));
}

#[test]
fn without_a_folder_of_its_own_the_file_lies_in_the_home() {
    let directory = directory("config-home", "");
    let home = directory.0.join(".config/trapline");
    fs::create_dir_all(&home).expect("a folder");
    fs::write(home.join("config.toml"), "output = 'file.data'").expect("the configuration");
    let place = directory.0.to_str().expect("its name");
    for folder in ["", "relative"] {
        assert_eq!(calls(&directory, "report --json", &[("XDG_CONFIG_HOME", folder), ("HOME", place)]), 2);
    }
}

#[test]
fn colours_and_the_pager_follow_the_same_order() {
    let directory = directory("config-color", "color = 'always'\npager = 'sed s/^/file:/'\n");
    let has_colours = |line: &str, environment: &[(&str, &str)]| run(&directory, line, environment).1.contains('\x1b');
    assert!(has_colours("report", &[]) && has_colours("--help", &[]));
    assert!(!has_colours("report", &[("NO_COLOR", "1")]));
    assert!(!has_colours("report --color auto", &[]));
    assert!(!has_colours("report --json", &[]));
    let pager = |line: &str, environment: &[(&str, &str)]| directory.on_terminal(line, environment).1;
    assert!(pager("report", &[]).contains("file:"));
    assert!(pager("report", &[("PAGER", "sed s/^/environment:/")]).contains("environment:"));
    let without = [pager("report", &[("PAGER", "")]), pager("report --no-pager", &[])];
    assert!(without.iter().all(|text| text.contains("main [prog]") && !text.contains("file:")), "{without:?}");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn record_follows_it_too() {
    let directory = directory("config-record", "output = 'recorded.data'\non_full = 'drop'\n");
    assert_eq!(run(&directory, "record -q -- /bin/true", &[]).0, Some(0));
    let options = |trace: &str| run(&directory, &format!("info --json -i {trace}"), &[]).1;
    assert!(options("recorded.data").to_lowercase().contains("drop"), "{}", options("recorded.data"));
    let environment = [("TRAPLINE_OUTPUT", "other.data"), ("TRAPLINE_ON_FULL", "overwrite")];
    assert_eq!(run(&directory, "record -q -- /bin/true", &environment).0, Some(0));
    assert!(options("other.data").to_lowercase().contains("overwrite"), "{}", options("other.data"));
    let (status, _, told) = run(&directory, "record -q -- /bin/true", &[("TRAPLINE_ON_FULL", "wait")]);
    let expected = "trapline: TRAPLINE_ON_FULL in the environment is \"wait\"; it can be block, drop, overwrite\n";
    assert_eq!((status, told.as_str()), (Some(125), expected));
}

#[test]
fn what_is_wrong_is_told_with_file_and_line_and_help_is_there_all_the_same() {
    let directory = directory("config-wrong", "color = 'never'\n\ncolour = 'never'\n");
    let path = directory.0.join("trapline/config.toml");
    let expected = format!("{}:3: unknown key `colour`; the keys are color, on_full, output, pager", path.display());
    let (status, stdout, told) = run(&directory, "report", &[]);
    assert_eq!((status, stdout.as_str(), told), (Some(2), "", format!("trapline: {expected}\n")));
    let (status, _, told) = run(&directory, "report --json", &[]);
    let error: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(
        (status, &error["error"]["kind"], &error["error"]["message"]),
        (Some(2), &"refused".into(), &expected.into())
    );
    for line in ["--help", "report --help", "--version"] {
        assert_eq!(run(&directory, line, &[]).0, Some(0), "{line}");
    }
    fs::remove_file(&path).expect("the configuration");
    fs::create_dir(&path).expect("a folder");
    let (status, _, told) = run(&directory, "report", &[]);
    assert!(status == Some(3) && told.contains("cannot read the configuration"), "{told}");
}
