//! The pager, on a pseudo-terminal.

mod common;

use std::process::Command;

use common::{Directory, write_calls, write_trace};
use trapline_trace::record::Event::{Enter, Exit};

/// With a trace of so many calls, `trapline.data`.
fn directory(name: &str, calls: u64) -> Directory {
    let directory = Directory::new(name);
    write_calls(&directory.0.join("trapline.data"), calls);
    directory
}

/// The status, and what a terminal shows.
fn shown(directory: &Directory, pager: Option<&str>, line: &str) -> (Option<i32>, String) {
    let pager: Vec<(&str, &str)> = pager.map(|pager| ("PAGER", pager)).into_iter().collect();
    directory.on_terminal(line, &pager)
}

const PAGER: Option<&str> = Some("sed s/^/paged:/");

#[test]
fn what_is_printed_on_a_terminal_goes_through_the_pager() {
    let directory = directory("pager-used", 3);
    let verbs = [
        "report",
        "replay",
        "functions",
        "info",
        "graph main",
        "diff trapline.data trapline.data",
        #[cfg(target_arch = "x86_64")]
        "sql 'SELECT 1'",
    ];
    for verb in verbs {
        let (status, text) = shown(&directory, PAGER, verb);
        assert_eq!(status, Some(0), "{verb}: {text}");
        assert!(text.lines().next().is_some_and(|line| line.contains("paged:")), "{verb}: {text}");
    }
    let (_, text) = shown(&directory, None, "report");
    assert!(text.contains("main [prog]"), "{text}");
}

#[test]
fn nobody_gets_a_pager_who_wants_none_or_has_no_terminal() {
    let directory = directory("pager-unwanted", 3);
    for (pager, line) in
        [(PAGER, "--no-pager report"), (PAGER, "report --no-pager"), (Some(""), "report"), (Some(" "), "report")]
    {
        let (status, text) = shown(&directory, pager, line);
        assert!(status == Some(0) && text.contains("main [prog]") && !text.contains("paged:"), "{line}: {text}");
    }
    for verb in ["report", "replay", "functions", "info", "graph main", "diff trapline.data trapline.data"] {
        let (status, text) = shown(&directory, PAGER, &format!("{verb} --json"));
        assert!(status == Some(0) && text.starts_with("{\"") && !text.contains("paged:"), "{verb}: {text}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    let command = command.arg("report").current_dir(&directory.0).env("PAGER", "sed s/^/paged:/");
    let output = command.output().expect("the command runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("main [prog]") && !text.contains("paged:"), "{text}");
}

#[test]
fn a_pager_that_is_not_there_is_told_and_the_text_is_shown() {
    let (status, text) = shown(&directory("pager-missing", 3), Some("no-such-pager -x"), "report");
    assert!(status == Some(0) && text.contains("main [prog]"), "{text}");
    assert!(text.contains("cannot start the pager no-such-pager: ") && text.contains("--no-pager"), "{text}");
}

#[test]
fn a_pager_that_ends_early_is_no_error_and_ends_the_work() {
    let (status, text) = shown(&directory("pager-early", 50_000), Some("head -n 2"), "replay");
    assert_eq!((status, text.lines().count()), (Some(0), 2), "{text}");
}

#[test]
fn a_reader_that_goes_away_at_once_hides_no_error_and_no_answer() {
    let directory = directory("pager-gone", 1000);
    // `main` takes four times as long, and 20,000 functions are new: more text than a pipe holds.
    let calls = (0..21_000_u64).flat_map(|at| {
        let site = u32::try_from(at.saturating_sub(999)).expect("few");
        [(at * 300, Enter { site }), (at * 300 + 200, Exit { depth: 1 })]
    });
    let names: Vec<String> =
        (0..20_001).map(|at| if at == 0 { "main".into() } else { format!("other_{at}") }).collect();
    write_trace(&directory.0.join("many.data"), &names, &calls.collect::<Vec<_>>());
    for _ in 0..5 {
        let (status, text) = shown(&directory, Some("true"), "diff trapline.data many.data --check");
        assert_eq!((status, text.as_str()), (Some(1), ""));
        let (status, text) = shown(&directory, Some("true"), "replay -i none.data");
        assert!(status == Some(3) && text.contains("cannot open the trace none.data"), "{text}");
    }
}

#[test]
fn an_error_has_its_status_beside_a_pager() {
    let (status, text) = shown(&directory("pager-error", 3), PAGER, "report -i none.data");
    assert!(status == Some(3) && text.contains("cannot open the trace none.data"), "{text}");
}
