//! What the data of a page says of a trace whose calls are known. That the page shows it is proved in a browser, by `cargo xtask pages`.

use std::{collections::BTreeMap, fs, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;
use trapline_export::{Calls, Facts, Target, html};
use trapline_trace::{
    Function, Meta, Module, Stream, Writer,
    record::{
        Event::{self, Enter, Exit, Point},
        encode,
    },
};

const NAMES: [&str; 4] = ["main", "work", "leaf</script><b>\"", "stop"];

/// Of threads 7 and 8: `main` calls `work` very often, which calls `leaf` none to six times, and `stop`, whose return is not seen. `left_out` names a call of `leaf` in either thread that is not there.
fn write_trace(path: &Path, left_out: Option<u32>) {
    let meta = Meta { command: vec!["prog".into()], tsc_hz: 1_000_000_000, ..Meta::default() };
    let mut writer = Writer::create(path, &meta).expect("a trace");
    let functions = NAMES.map(|name| Function { name: name.into(), ..Function::default() });
    let module = Module { id: 1, path: "/bin/prog", build_id: None, first_site: 0, functions: &functions };
    writer.module(&module).expect("a module");
    for (stream, rounds) in [(1, 6000_u64), (2, 300)] {
        writer.stream(&Stream { id: stream, tid: 6 + stream, ..Stream::default() }).expect("a stream");
        let (mut events, mut at, mut leaves) = (vec![(100, Enter { site: 0 })], 100, 0);
        for round in 0..rounds {
            at += 30 + round % 11;
            events.push((at, Enter { site: 1 }));
            for leaf in 0..round % 7 {
                let long = if round % 1000 == 999 { 40_000 } else { 5 + (round * leaf) % 90 };
                leaves += 1;
                if left_out != Some(leaves) {
                    events.extend([(at + 3, Enter { site: 2 }), (at + 3 + long, Exit { depth: 3 })]);
                }
                at += 3 + long;
            }
            if round % 100 == 0 {
                events.push((at, Point { site: 3 }));
            }
            at += 2;
            events.push((at, Exit { depth: 2 }));
        }
        events.push((at + 10, Exit { depth: 1 }));
        write_events(&mut writer, stream, &events);
    }
    writer.finish().expect("the end");
}

fn write_events(writer: &mut Writer, stream: u32, events: &[(u64, Event)]) {
    let (mut tsc, mut depth) = (events[0].0, 0);
    for events in events.chunks(1000) {
        let records: Vec<u64> = events.iter().map(|(tsc, event)| encode(*event, *tsc)).collect();
        let end = writer.events(stream, tsc, depth, 0, &records).expect("events");
        (tsc, depth) = (end.tsc, end.depth);
    }
}

/// A page that was read.
struct Page {
    text: String,
    facts: Value,
    blocks: Vec<Block>,
}

struct Block {
    step: usize,
    is_run: bool,
    /// Function, calls, length.
    pieces: Vec<(usize, u64, u64)>,
}

fn element<'a>(text: &'a str, id: &str) -> &'a str {
    let (_, rest) = text.split_once(&format!("id=\"{id}\">")).expect(id);
    rest.split_once("</script>").expect("an end").0
}

fn json_of(text: &str, id: &str) -> Value {
    serde_json::from_str(element(text, id)).expect("JSON")
}

/// Unpacked bytes as numbers.
fn numbers(text: &str, page: u64, offset: u64, len: u64) -> Vec<u64> {
    let pages = STANDARD.decode(element(text, &format!("data-{page}"))).expect("base64");
    let [from, to] = [offset, offset + len].map(|at| usize::try_from(at).expect("a place"));
    let bytes = miniz_oxide::inflate::decompress_to_vec(&pages[from..to]).expect("deflate");
    bytes
        .split_inclusive(|byte| byte & 0x80 == 0)
        .map(|bytes| bytes.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f)))
        .collect()
}

fn page(left_out: Option<u32>, detail: u64) -> (TempDir, Page) {
    let directory = TempDir::new().expect("a directory for the test");
    let (input, output) = (directory.path().join("t.data"), directory.path().join("t.html"));
    write_trace(&input, left_out);
    let report = json!({ "functions": NAMES.map(|name| json!({ "name": name })) });
    let info = json!({ "command": ["prog"] });
    let facts =
        Facts { info, report, sites: vec![0, 1, 2, 3], durations: vec![vec![(40, 1)]; 4], duration_ns: 2_000_000 };
    let mut progress = Vec::new();
    html(&input, &facts, detail, &Target::new(&output), |done, total| progress.push((done, total))).expect("a page");
    assert!(progress.is_sorted() && progress.last().is_some_and(|(done, total)| done == total));
    let text = fs::read_to_string(output).expect("text");
    let (facts, directory_of_blocks) = (json_of(&text, "facts"), json_of(&text, "blocks"));
    let fields: Vec<u64> = directory_of_blocks.as_array().expect("a list").iter().filter_map(Value::as_u64).collect();
    let blocks = fields.chunks_exact(9).map(|fields| block(&text, fields)).collect();
    (directory, Page { text, facts, blocks })
}

fn block(text: &str, fields: &[u64]) -> Block {
    let [_, step, is_run, _, _, count, page, offset, len] = fields.try_into().expect("nine numbers");
    let numbers = numbers(text, page, offset, len);
    let count = usize::try_from(count).expect("a count");
    let heads = 1 + 2 * usize::try_from(numbers[0]).expect("a count");
    let column = |at: usize| &numbers[heads + at * count..heads + (at + 1) * count];
    assert_eq!(numbers.len(), heads + count * if is_run == 1 { 4 } else { 3 });
    let calls = |at: usize| if is_run == 1 { column(3)[at] } else { 1 };
    let piece = |at: usize| (usize::try_from(column(2)[at]).expect("a function"), calls(at), column(1)[at]);
    Block { step: usize::try_from(step).expect("a step"), is_run: is_run == 1, pieces: (0..count).map(piece).collect() }
}

impl Page {
    /// Calls and their durations added up, of each function, by the calls that are told one by one.
    fn calls(&self) -> BTreeMap<usize, (u64, u64)> {
        let mut sums: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        for (function, calls, length) in
            self.blocks.iter().filter(|block| !block.is_run).flat_map(|block| block.pieces.iter().copied())
        {
            let sum = sums.entry(function).or_default();
            *sum = (sum.0 + calls, sum.1 + length);
        }
        sums
    }

    /// How many calls a step has, in runs and one by one.
    fn calls_at(&self, step: usize) -> u64 {
        let shown =
            self.blocks.iter().filter(|block| if block.is_run { block.step == step } else { block.step >= step });
        shown.flat_map(|block| &block.pieces).map(|(_, calls, _)| calls).sum()
    }
}

/// The same by the calls that every format is made of.
fn expected(directory: &TempDir) -> BTreeMap<usize, (u64, u64)> {
    let mut calls = Calls::open(&directory.path().join("t.data"), |_| true).expect("a trace");
    let mut sums: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
    while let Some(row) = calls.next_call().expect("a call") {
        let site = calls.function(row.function).site;
        let sum = sums.entry(usize::try_from(site).expect("a site")).or_default();
        *sum = (sum.0 + 1, sum.1 + row.duration_ns);
    }
    sums
}

#[test]
fn each_call_is_on_the_timeline_at_every_step() {
    let (directory, page) = page(None, u64::MAX);
    let expected = expected(&directory);
    assert_eq!(page.calls(), expected);
    let all: u64 = expected.values().map(|(calls, _)| calls).sum();
    let steps = page.facts["steps"].as_array().expect("steps").len();
    assert!(steps > 1, "nothing is merged");
    for step in 0..steps {
        assert_eq!(page.calls_at(step), all, "step {step}");
    }
    let threads: u64 =
        page.facts["threads"].as_array().expect("a list").iter().filter_map(|one| one["calls"].as_u64()).sum();
    assert_eq!(threads, all);

    // The control: a call that is missing is missed.
    let (other, without) = self::page(Some(77), u64::MAX);
    assert_eq!(without.calls(), self::expected(&other));
    assert_ne!(without.calls(), expected);
    assert_eq!(without.calls_at(0), all - 2);
}

#[test]
fn too_many_calls_are_merged_and_none_is_lost() {
    let (directory, page) = page(None, 5000);
    let all: u64 = expected(&directory).values().map(|(calls, _)| calls).sum();
    let first = page.facts["first_step"].as_u64().and_then(|step| usize::try_from(step).ok()).expect("a step");
    assert!(first > 0 && page.blocks.iter().all(|block| block.step >= first));
    assert_eq!(page.calls_at(first), all);
    assert!(page.blocks.iter().map(|block| block.pieces.len()).sum::<usize>() < 10_000);
}

#[test]
fn stacks_have_all_calls_and_the_page_fetches_nothing() {
    let (directory, page) = page(None, u64::MAX);
    let expected = expected(&directory);
    let stacks = &page.facts["stacks"];
    let of = |key: &str| stacks[key].as_u64().expect("a number");
    let numbers = numbers(&page.text, 0, 0, of("bytes"));
    let count = usize::try_from(of("count")).expect("a count");
    let columns: Vec<&[u64]> = numbers.chunks_exact(count).collect();
    assert_eq!((columns.len(), numbers.len()), (4, 4 * count));
    let mut calls: BTreeMap<usize, u64> = BTreeMap::new();
    for (function, more) in columns[1].iter().zip(columns[2]) {
        *calls.entry(usize::try_from(*function).expect("a function")).or_default() += more;
    }
    assert_eq!(calls, expected.iter().map(|(function, (calls, _))| (*function, *calls)).collect());
    // Threads run one `main` each, so times of their own are the time of these.
    assert_eq!(columns[3].iter().sum::<u64>(), expected[&0].1);

    // Names end no element, and what there is of addresses is the empty icon's.
    assert_eq!(page.facts["report"]["functions"][2]["name"], NAMES[2]);
    let code: Vec<&str> = page
        .text
        .split("<script type=\"text/plain\"")
        .enumerate()
        .map(|(at, part)| if at == 0 { part } else { part.split_once("</script>").expect("an end").1 })
        .collect();
    let code = code.concat();
    assert_eq!(code.matches("href=").count(), 2);
    for word in ["http:", "https:", "src=", "@import", "url(", "fetch("] {
        assert!(!code.contains(word), "{word}");
    }
    assert!(code.contains("default-src 'none'") && code.trim_end().ends_with("</html>"));
}
