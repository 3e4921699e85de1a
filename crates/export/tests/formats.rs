//! What each format says of a small trace whose calls are known. That other tools read it alike is shown by `cargo xtask consumers`, with the tools themselves.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tempfile::TempDir;
use trapline_export::{Error, Format, Target, export};
use trapline_trace::{
    ClockPoint, Function, Meta, Module, Process, Stream, Writer,
    record::{
        Event::{Enter, Exit, Point, Tail},
        encode,
    },
};

const MAIN: u32 = 0;
const WORK: u32 = 1;
const LEAF: u32 = 2;
const STOP: u32 = 3;

/// A second is 10^9 ticks. Thread 41: `main` calls `work`, which calls `leaf;"x"` and jumps to it; then `main` calls `stop`, which does not return, nor does `main`. Thread
/// 42: `work` calls itself, and is interrupted by something whose time goes back.
fn write_trace(path: &Path) {
    let meta = Meta { command: vec!["prog".into(), "-x".into()], tsc_hz: 1_000_000_000, ..Meta::default() };
    let mut writer = Writer::create(path, &meta).expect("a trace");
    let names = ["main", "work", "leaf;\"x\"", "stop"];
    let function = |(at, name): (u64, &str)| Function { name: name.into(), address: at * 64, ..Function::default() };
    let functions: Vec<Function> = (1..).zip(names).map(function).collect();
    let process = Process { id: 1, pid: 41, executable: "/bin/prog".into(), ..Process::default() };
    writer.process(&process).expect("a process");
    let module = Module { id: 1, path: "/bin/prog", build_id: None, first_site: 0, functions: &functions };
    writer.module(&module).expect("a module");
    writer.calibration(&[ClockPoint { tsc: 1000, monotonic_ns: 0 }]).expect("a clock");
    let first = [
        (1100, Enter { site: MAIN }),
        (1200, Enter { site: WORK }),
        (1300, Enter { site: LEAF }),
        (1350, Exit { depth: 3 }),
        (1400, Tail { site: LEAF }),
        (1500, Exit { depth: 2 }),
        (1600, Point { site: STOP }),
        (1700, Enter { site: STOP }),
    ];
    let second = [
        (2000, Enter { site: WORK }),
        (2100, Enter { site: WORK }),
        (2200, Exit { depth: 2 }),
        (2150, Enter { site: LEAF }),
        (2300, Exit { depth: 2 }),
        (2400, Exit { depth: 1 }),
    ];
    for (id, tid, events) in [(1, 41, first.as_slice()), (2, 42, &second)] {
        writer.stream(&Stream { id, process: 1, tid, name: "a thread".into(), started_tsc: 0 }).expect("a stream");
        let records: Vec<u64> = events.iter().map(|(tsc, event)| encode(*event, *tsc)).collect();
        writer.events(id, events[0].0, 0, 0, &records).expect("events");
    }
    writer.finish().expect("the end");
}

/// Calls and their times added up, for each function, by what was written above.
fn expected() -> BTreeMap<String, (u64, u64)> {
    let of = |name: &str, calls, sum_ns| (name.to_owned(), (calls, sum_ns));
    BTreeMap::from([
        of("main", 1, 600),
        of("work", 3, 200 + 400 + 100),
        of("leaf;\"x\"", 3, 50 + 100 + 100),
        of("stop", 2, 0),
    ])
}

fn exported(format: Format) -> (TempDir, PathBuf) {
    let directory = TempDir::new().expect("a directory for the test");
    let input = directory.path().join("t.data");
    write_trace(&input);
    let output = directory.path().join("out");
    let mut progress = Vec::new();
    let summary = export(&input, format, &Target::new(&output), |done, total| progress.push((done, total)));
    let summary = summary.expect("an export");
    assert_eq!((summary.calls, summary.damage.is_none()), (9, true));
    assert_eq!(progress.last(), Some(&(14, 14)));
    (directory, output)
}

fn text(format: Format) -> String {
    let (_directory, output) = exported(format);
    fs::read_to_string(output).expect("text")
}

fn json(format: Format) -> Value {
    serde_json::from_str(&text(format)).expect("JSON")
}

/// Adds opened and closed calls up. They have to be nested, and times may not go back.
#[derive(Default)]
struct Calls {
    open: Vec<(String, u64)>,
    last_ns: u64,
    sums: BTreeMap<String, (u64, u64)>,
}

impl Calls {
    fn enter(&mut self, name: &str, ns: u64) {
        assert!(ns >= self.last_ns, "times go back");
        self.last_ns = ns;
        self.open.push((name.to_owned(), ns));
    }

    fn leave(&mut self, name: &str, ns: u64) {
        assert!(ns >= self.last_ns, "times go back");
        self.last_ns = ns;
        let (opened, start_ns) = self.open.pop().expect("an open call");
        assert_eq!(opened, name);
        let sum = self.sums.entry(opened).or_default();
        *sum = (sum.0 + 1, sum.1 + ns - start_ns);
    }

    /// The next thread's events follow.
    fn thread(&mut self) {
        assert!(self.open.is_empty(), "a thread ends with open calls");
        self.last_ns = 0;
    }
}

#[test]
fn chrome_has_both_ends_of_each_call_with_pid_and_tid() {
    let json = json(Format::Chrome);
    let mut threads: BTreeMap<u64, Calls> = BTreeMap::new();
    let mut names = Vec::new();
    for event in json["traceEvents"].as_array().expect("events") {
        assert_eq!(event["pid"], 41);
        let calls = threads.entry(event["tid"].as_u64().expect("a tid")).or_default();
        let name = event["name"].as_str().expect("a name");
        // Three digits behind the point: nanoseconds.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small")]
        let ns = || (event["ts"].as_f64().expect("a time") * 1000.0).round() as u64;
        match event["ph"].as_str().expect("a phase") {
            "B" => calls.enter(name, ns()),
            "E" => calls.leave(name, ns()),
            "i" => {
                calls.enter(name, ns());
                calls.leave(name, ns());
            }
            "M" => names.push(event["args"]["name"].as_str().expect("a name").to_owned()),
            phase => panic!("{phase}"),
        }
    }
    assert_eq!(names, ["prog", "a thread", "prog", "a thread"]);
    let mut sums: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (name, sum) in threads.into_values().flat_map(|mut calls| {
        calls.thread();
        calls.sums
    }) {
        let both = sums.entry(name).or_default();
        *both = (both.0 + sum.0, both.1 + sum.1);
    }
    assert_eq!(sums, expected());
}

#[test]
fn speedscope_has_a_profile_a_thread_and_frames_at_the_end() {
    let json = json(Format::Speedscope);
    let mut calls = Calls::default();
    let profiles = json["profiles"].as_array().expect("profiles");
    let names: Vec<&Value> = profiles.iter().map(|profile| &profile["name"]).collect();
    assert_eq!(names, ["a thread (41)", "a thread (42)"]);
    for profile in profiles {
        let events = profile["events"].as_array().expect("events");
        for event in events {
            let frame = usize::try_from(event["frame"].as_u64().expect("a frame")).expect("an index");
            let name = json["shared"]["frames"][frame]["name"].as_str().expect("a name");
            let ns = event["at"].as_u64().expect("a time");
            if event["type"] == "O" { calls.enter(name, ns) } else { calls.leave(name, ns) }
        }
        assert_eq!((&profile["startValue"], &profile["endValue"]), (&events[0]["at"], &events[events.len() - 1]["at"]));
        calls.thread();
    }
    assert_eq!(calls.sums, expected());
}

#[test]
fn folded_stacks_weigh_what_their_innermost_function_took_itself() {
    let mut lines: Vec<String> = text(Format::Folded).lines().map(str::to_owned).collect();
    lines.sort();
    let leaf = "leaf:\"x\"";
    let expected = [
        "prog;main 300".to_owned(),
        format!("prog;main;{leaf} 100"),
        "prog;main;work 150".to_owned(),
        format!("prog;main;work;{leaf} 50"),
        "prog;work 200".to_owned(),
        format!("prog;work;{leaf} 100"),
        "prog;work;work 100".to_owned(),
    ];
    assert_eq!(lines, expected);
}

#[test]
fn a_flame_graph_names_the_command_and_every_function_that_takes_time() {
    let svg = text(Format::Flamegraph);
    for text in ["prog -x", "main (600 ns", "work (200 ns", "leaf:&quot;x&quot; (100 ns"] {
        assert!(svg.contains(text), "{text}");
    }
    assert!(svg.trim_end().ends_with("</svg>"));
}

#[test]
fn samples_of_perf_script_have_periods_that_add_up_to_the_folded_stacks() {
    let text = text(Format::PerfScript);
    let mut sums: BTreeMap<Vec<&str>, u64> = BTreeMap::new();
    for sample in text.split_terminator("\n\n") {
        let (head, frames) = sample.split_once('\n').expect("frames");
        // The thread's name has a space, and readers split there.
        assert!(head.starts_with("a_thread 41/4"), "{head}");
        let period_ns = head.split_whitespace().rev().nth(1).and_then(|word| word.parse::<u64>().ok());
        let stack = frames.lines().map(|line| line.split_whitespace().nth(1).expect("a symbol")).collect();
        *sums.entry(stack).or_default() += period_ns.expect("a period");
    }
    assert_eq!(sums.len(), 7);
    assert_eq!(sums[&vec!["main+0x0"]], 300);
    assert_eq!(sums[&vec!["leaf;\"x\"+0x0", "work+0x0", "main+0x0"]], 50);
    assert_eq!(sums.values().sum::<u64>(), 600 + 400);
}

#[test]
fn uftrace_has_a_file_of_records_a_thread_and_tells_its_sessions() {
    let (_directory, output) = exported(Format::Uftrace);
    let read = |name: &str| fs::read(output.join(name)).expect(name);
    let mut words = Vec::new();
    for record in read("42.dat").chunks(16) {
        let word = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes"));
        words.push((word(0), word(8) & 3, word(8) >> 6 & 0x3ff, word(8) >> 16));
    }
    let [work, leaf] = [0x1_0000_0080, 0x1_0000_00c0];
    // The time that goes back is the latest one instead.
    let expected = [
        (1000, 0, 0, work),
        (1100, 0, 1, work),
        (1200, 1, 1, work),
        (1200, 0, 1, leaf),
        (1300, 1, 1, leaf),
        (1400, 1, 0, work),
    ];
    assert_eq!(words, expected);
    assert_eq!(read("41.dat").len(), 16 * 2 * 6);
    let tasks = String::from_utf8(read("task.txt")).expect("text");
    assert_eq!(tasks.lines().count(), 3);
    assert!(tasks.starts_with("SESS timestamp=0.000000000 pid=41 sid=0000000000000001 exename=\"/bin/prog\"\n"));
    assert!(String::from_utf8(read("prog.sym")).expect("text").contains("0000000000000080 T work\n"));
    assert!(read("info").starts_with(b"Ftrace!\0"));
}

#[test]
fn parquet_has_a_row_a_call_and_null_where_nobody_knows() {
    use parquet::{
        file::reader::{FileReader, SerializedFileReader},
        record::RowAccessor,
    };
    let (_directory, output) = exported(Format::Parquet);
    let reader = SerializedFileReader::new(fs::File::open(output).expect("a file")).expect("Parquet");
    let mut sums: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut endings = Vec::new();
    for row in reader.get_row_iter(None).expect("rows") {
        let row = row.expect("a row");
        let named: BTreeMap<&str, usize> =
            row.get_column_iter().enumerate().map(|(index, (name, _))| (name.as_str(), index)).collect();
        assert_eq!(row.get_string(named["program"]).expect("a program"), "prog");
        assert_eq!(row.get_int(named["pid"]).expect("a pid"), 41);
        let function = row.get_string(named["function"]).expect("a function").clone();
        let ending = row.get_string(named["ending"]).expect("an ending").clone();
        let duration_ns = row.get_long(named["duration_ns"]);
        assert_eq!(duration_ns.is_err(), ending == "point");
        let sum = sums.entry(function).or_default();
        *sum = (sum.0 + 1, sum.1 + duration_ns.unwrap_or(0).cast_unsigned());
        endings.push(ending);
    }
    assert_eq!(sums, expected());
    let expected = ["returned", "jumped", "returned", "point", "open", "open", "returned", "returned", "returned"];
    assert_eq!(endings, expected);
}

#[test]
fn binary_formats_hold_the_names() {
    for format in [Format::Perfetto, Format::Pprof, Format::Firefox] {
        let (_directory, output) = exported(format);
        let bytes = fs::read(output).expect("a file");
        let text = String::from_utf8_lossy(&bytes).replace("\\\"", "\"");
        for name in expected().keys() {
            assert!(text.contains(name.as_str()), "{format:?} {name}");
        }
    }
}

#[test]
fn a_trace_without_calls_is_no_failure_in_any_format() {
    let directory = TempDir::new().expect("a directory for the test");
    let trace = directory.path().join("empty.data");
    Writer::create(&trace, &Meta::default()).and_then(Writer::finish).expect("a trace");
    for format in Format::ALL {
        let output = directory.path().join(format!("{format:?}"));
        let summary = export(&trace, format, &Target::new(&output), |_, _| ());
        assert_eq!(summary.expect("a summary").calls, 0, "{format:?}");
        if format == Format::Flamegraph {
            assert!(fs::read_to_string(output).expect("the picture").contains("no call has a duration"));
        }
    }
}

#[test]
fn what_is_there_is_not_mixed_with_an_export() {
    let directory = TempDir::new().expect("a directory for the test");
    let input = directory.path().join("t.data");
    write_trace(&input);
    let full = Target::new(directory.path().join("full"));
    fs::create_dir(full.path()).expect("a directory");
    // An empty one is as good as none.
    export(&input, Format::Uftrace, &full, |_, _| ()).expect("an export");
    let again = export(&input, Format::Uftrace, &full, |_, _| ()).expect_err("it is occupied");
    assert!(matches!(again, Error::Occupied { .. }), "{again}");
    let nowhere = export(&input, Format::Chrome, &Target::new(directory.path().join("none/out")), |_, _| ());
    let nowhere = nowhere.expect_err("no such directory").to_string();
    assert!(nowhere.contains("none/out: No such file") && nowhere.ends_with("where you may write"), "{nowhere}");
    let out = export(&input, Format::Uftrace, &Target::new("-"), |_, _| ()).expect_err("no file");
    assert!(matches!(out, Error::Directory), "{out}");
}

#[test]
fn a_full_disk_is_told_whatever_the_format() {
    let directory = TempDir::new().expect("a directory for the test");
    let input = directory.path().join("t.data");
    write_trace(&input);
    for format in Format::ALL.into_iter().filter(|format| !format.is_directory()) {
        let error = export(&input, format, &Target::new("/dev/full"), |_, _| ()).expect_err("no room");
        let told = error.to_string();
        assert!(told.starts_with("cannot write to /dev/full: No space left"), "{format:?}: {told}");
    }
}
