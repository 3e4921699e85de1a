//! The verbs that read a trace, on one that is written here.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use trapline_trace::{
    Function, Meta, Module, Stream, Writer,
    record::{Event, encode},
};

struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn directory(name: &str) -> Directory {
    let path = std::env::temp_dir().join(format!("trapline-verbs-{name}-{}", std::process::id()));
    fs::create_dir_all(&path).expect("a directory");
    Directory(path)
}

/// `main` calls `work`, which calls `leaf` twice; `short` is not traced.
fn write_trace(path: &Path) {
    let meta = Meta { command: vec!["prog".into()], tsc_hz: 1_000_000_000, ..Meta::default() };
    let mut writer = Writer::create(path, &meta).expect("a trace");
    let names = ["main", "work", "leaf", "short"];
    let functions = names.map(|name| Function {
        name: name.into(),
        untraced: (name == "short").then(|| "too-short".into()),
        ..Function::default()
    });
    let module = Module { id: 1, path: "/bin/prog", build_id: None, first_site: 0, functions: &functions };
    writer.module(&module).expect("a module");
    writer.stream(&Stream { id: 1, tid: 7, name: "prog".into(), ..Stream::default() }).expect("a stream");
    let events = [
        (0, Event::Enter { site: 0 }),
        (1000, Event::Enter { site: 1 }),
        (2000, Event::Enter { site: 2 }),
        (2500, Event::Exit { depth: 3 }),
        (3000, Event::Enter { site: 2 }),
        (5000, Event::Exit { depth: 3 }),
        (6000, Event::Exit { depth: 2 }),
    ];
    let records = events.map(|(tsc, event)| encode(event, tsc));
    writer.events(1, 0, 0, 0, &records).expect("events");
    writer.finish().expect("the end");
}

fn trapline(arguments: &[&str], directory: &Directory) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    command.args(arguments).current_dir(&directory.0).output().expect("the command runs")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn report_functions_and_info_tell_what_was_recorded() {
    let directory = directory("json");
    write_trace(&directory.0.join("trapline.data"));
    let json =
        |arguments: &[&str]| serde_json::from_str::<Value>(&text(&trapline(arguments, &directory))).expect("JSON");
    let report = json(&["report", "--json", "--sort", "self"]);
    assert_eq!((&report["version"], report["functions"].as_array().map(Vec::len)), (&1.into(), Some(3)));
    let leaf = report["functions"]
        .as_array()
        .expect("a list")
        .iter()
        .find(|function| function["name"] == "leaf")
        .expect("leaf");
    assert_eq!(
        (&leaf["calls"], &leaf["total_ns"], &leaf["min_ns"], &leaf["max_ns"]),
        (&2.into(), &2500.into(), &500.into(), &2000.into())
    );
    let functions = json(&["functions", "--json", "--untraced"]);
    assert_eq!((&functions["traced"], &functions["total"]), (&3.into(), &4.into()));
    assert_eq!(functions["functions"][0]["reason"], "too-short");
    let info = json(&["info", "--json"]);
    assert_eq!((&info["calls"], &info["untraced"]["too-short"]), (&4.into(), &1.into()));
    assert_eq!((&info["thread_names"][0]["tid"], &info["thread_names"][0]["name"]), (&7.into(), &"prog".into()));
    assert!(text(&trapline(&["report"], &directory)).contains("work [prog]"));
    let info = text(&trapline(&["info"], &directory));
    assert!(info.contains("3 of 4 traced") && info.contains("thread     7 prog"), "{info}");
}

#[test]
fn replay_shows_the_graph_and_filters_it() {
    let directory = directory("replay");
    write_trace(&directory.0.join("trapline.data"));
    let lines = |arguments: &[&str]| -> Vec<String> {
        let text = text(&trapline(arguments, &directory));
        text.lines().skip(1).map(|line| line.split_once(") ").map_or("", |(_, rest)| rest.trim()).to_owned()).collect()
    };
    assert_eq!(
        lines(&["replay"]),
        [
            "| main() {",
            "|   work() {",
            "0.500 us |     leaf();",
            "2.000 us |     leaf();",
            "5.000 us |   } /* work */",
            "6.000 us | } /* main */ /* did not return */",
        ]
    );
    assert_eq!(
        lines(&["replay", "-F", "w*", "--min-duration", "1000"]),
        ["| work() {", "2.000 us |   leaf();", "5.000 us | } /* work */"]
    );
    assert_eq!(lines(&["replay", "-D", "1"]), ["6.000 us | main(); /* did not return */"]);
    let json: Value = serde_json::from_str(&text(&trapline(&["replay", "--json"], &directory))).expect("JSON");
    assert_eq!(json["calls"].as_array().map(Vec::len), Some(4));
}

/// Threads 7 and 8 at the same time; in the file, one is behind the other.
fn write_two_threads(path: &Path) {
    let mut writer = Writer::create(path, &Meta { tsc_hz: 1_000_000_000, ..Meta::default() }).expect("a trace");
    let functions = ["main", "work", "leaf"].map(|name| Function { name: name.into(), ..Function::default() });
    let module = Module { id: 1, path: "/bin/prog", build_id: None, first_site: 0, functions: &functions };
    writer.module(&module).expect("a module");
    let (enter, exit) = (|site| Event::Enter { site }, |depth| Event::Exit { depth });
    let seventh = [
        (0, enter(0)),
        (1000, enter(2)),
        (1500, exit(2)),
        (4000, enter(1)),
        (4200, enter(2)),
        (4400, exit(3)),
        (5000, exit(2)),
    ];
    let eighth = [(2000, enter(1)), (2500, enter(2)), (3000, exit(2)), (4300, exit(1))];
    for (id, name, events) in [(1, "seventh", &seventh[..]), (2, "eighth", &eighth)] {
        writer.stream(&Stream { id, tid: 6 + id, name: name.into(), ..Stream::default() }).expect("a stream");
        let records: Vec<u64> = events.iter().map(|(tsc, event)| encode(*event, *tsc)).collect();
        writer.events(id, events[0].0, 0, 0, &records).expect("events");
    }
    writer.finish().expect("the end");
}

#[test]
fn replay_interleaves_threads_in_the_order_of_time() {
    let directory = directory("threads");
    write_two_threads(&directory.0.join("trapline.data"));
    let lines = |arguments: &[&str]| -> Vec<String> {
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        text(&trapline(arguments, &directory)).lines().map(words).collect()
    };
    let both = [
        "# thread 7 seventh",
        "7) | main() {",
        "7) 0.500 us | leaf();",
        "# thread 8 eighth",
        "8) | work() {",
        "8) 0.500 us | leaf();",
        "7) | work() {",
        "8) 2.300 us | } /* work */",
        "7) 0.200 us | leaf();",
        "7) 1.000 us | } /* work */",
        "7) 5.000 us | } /* main */ /* did not return */",
    ];
    assert_eq!(lines(&["replay"]), both);
    for (thread, tid) in [("7", "7)"), ("8", "8)")] {
        let alone = both.iter().filter(|line| line.starts_with(tid) || line.starts_with(&format!("# thread {thread}")));
        assert_eq!(lines(&["replay", "--thread", thread]), alone.copied().collect::<Vec<_>>());
    }
    let outermost = [
        "# thread 7 seventh",
        "# thread 8 eighth",
        "8) 2.300 us | work();",
        "7) 5.000 us | main(); /* did not return */",
    ];
    assert_eq!(lines(&["replay", "-D", "1"]), outermost);
    let long = [
        "# thread 7 seventh",
        "# thread 8 eighth",
        "8) 2.300 us | work();",
        "7) 5.000 us | main(); /* did not return */",
    ];
    assert_eq!(lines(&["replay", "--min-duration", "2000"]), long);
    let json: Value = serde_json::from_str(&text(&trapline(&["replay", "--json"], &directory))).expect("JSON");
    let ended: Vec<u64> =
        json["calls"].as_array().expect("a list").iter().filter_map(|call| call["tid"].as_u64()).collect();
    assert_eq!(ended, [7, 8, 8, 7, 7, 7]);
}

const VERBS: [&str; 4] = ["report", "replay", "functions", "info"];

#[test]
fn what_is_no_trace_is_told_with_what_to_do() {
    let directory = directory("garbage");
    let path = directory.0.join("trapline.data");
    write_trace(&path);
    let trace = fs::read(&path).expect("the trace");
    let noise: Vec<u8> = (0..5000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let texts: [(&[u8], &str); 5] = [
        (b"", "is empty"),
        (b"some text\n", "is not a trapline trace"),
        (&noise, "is not a trapline trace"),
        (&[0; 4096], "is not a trapline trace"),
        (b"\x7fELF\x02\x01\x01", "is not a trapline trace"),
    ];
    let told = |verb: &str| {
        let output = trapline(&[verb], &directory);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.stdout.is_empty() && output.status.code() == Some(3), "{verb}: {}: {text}", output.status);
        text
    };
    for verb in VERBS {
        for (content, expected) in texts {
            fs::write(&path, content).expect("a file");
            let text = told(verb);
            assert!(text.contains(expected) && text.contains("trapline record"), "{verb}: {text}");
        }
        for len in 1..16 {
            fs::write(&path, &trace[..len]).expect("a file");
            assert!(told(verb).contains("trapline record"), "{verb} of {len} bytes");
        }
        fs::remove_file(&path).expect("the file");
        fs::create_dir(&path).expect("a folder");
        assert!(told(verb).contains("name a file that `trapline record` wrote"), "{verb}");
        fs::remove_dir(&path).expect("the folder");
    }
}

#[test]
fn a_byte_that_is_wrong_costs_its_chunk_and_is_told() {
    let directory = directory("wrong");
    let path = directory.0.join("trapline.data");
    write_trace(&path);
    let trace = fs::read(&path).expect("the trace");
    for at in (16..trace.len()).step_by(7) {
        let mut wrong = trace.clone();
        wrong[at] ^= 0x55;
        fs::write(&path, &wrong).expect("a file");
        for verb in VERBS {
            let output = trapline(&[verb, "--json"], &directory);
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && text.contains("damaged"),
                "{verb}, byte {at}: {}: {text}",
                output.status
            );
            serde_json::from_slice::<Value>(&output.stdout).expect("JSON");
        }
    }
}

#[test]
fn a_trace_cut_anywhere_is_read_and_a_missing_one_is_told() {
    let directory = directory("cut");
    let path = directory.0.join("trapline.data");
    let missing = trapline(&["report"], &directory);
    assert!(!missing.status.success() && String::from_utf8_lossy(&missing.stderr).contains("trapline record"));
    write_trace(&path);
    let bytes = fs::read(&path).expect("the trace");
    for len in (16..bytes.len()).step_by(5) {
        fs::write(&path, &bytes[..len]).expect("a file");
        for verb in VERBS {
            let output = trapline(&[verb], &directory);
            assert!(output.status.success(), "{verb} of {len} bytes");
            assert!(!output.stderr.is_empty(), "{verb} of {len} bytes says nothing");
        }
    }
}
