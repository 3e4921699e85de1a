//! A kernel's trace: made of the records that the testbed sent, and read back by the command.
//!
//! Owns [`judge`]. Records come as they lay in the rings of the CPUs; a thread's are sorted by their sequence numbers, in whichever ring it left them, and become
//! one stream of a trace file as `trapline record` writes it. Functions come from the kernel's symbol table; contexts are functions of a module of their own, so that what
//! an interrupt called is nested in it, and it in what it interrupted. Then `trapline replay --json` and `trapline report --json` are asked, and must know each
//! call that the callers counted.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use trapline_trace::record::{self, Event};
use trapline_trace::{ClockPoint, Function, Load, Losses, Meta, Module, Process, Stream, Writer};

use super::elf::Functions;
use super::verdict::{CONTEXTS, Must, number};
use crate::workspace_root;

/// Bytes of a record as it is sent: event, then thread, context and depth in one word, then sequence number.
const RECORD_BYTES: usize = 16;

/// Sites from this one on are contexts, by their kinds.
const CONTEXT_SITES: u32 = record::MAX_SITES - 16;

/// Contexts as functions, by their kinds; the first one leaves no frame.
const CONTEXT_NAMES: [&str; 4] = ["", "[softirq]", "[irq]", "[nmi]"];

/// One record of a thread.
#[derive(Debug, Clone, Copy)]
struct Record {
    event: u64,
    /// Frames that were open before.
    depth: u32,
    sequence: u64,
}

/// What a trace holds.
#[derive(Debug)]
pub(super) struct Judged {
    /// For people.
    pub(super) line: String,
    /// For each context, calls that were made and calls that are in the trace; and how many records were lost.
    pub(super) counts: Value,
    /// What did not happen to come about, where nothing is wrong.
    pub(super) missing: Option<String>,
}

/// Makes the trace file, has the command read it, and judges that.
///
/// # Errors
/// A call, a record or a context is missing or too many; or the file cannot be made or read.
pub(super) fn judge(kernel: &Path, events: &[Value], records: &Path, file: &Path, must: Must) -> Result<Judged> {
    let of = |name: &'static str| events.iter().filter(move |event| event["event"] == name);
    let bytes = std::fs::read(records).with_context(|| format!("reading {}", records.display()))?;
    let threads = sort(&bytes);
    let clocks: Vec<ClockPoint> = of("clock")
        .map(|clock| ClockPoint { tsc: number(clock, "tsc"), monotonic_ns: number(clock, "host_ns") })
        .collect();
    let mut lost = 0;
    for thread in of("thread") {
        let (id, written) = (number(thread, "thread"), number(thread, "records"));
        let kept = threads.get(&id).map_or(0, Vec::len) as u64;
        ensure!(
            kept + number(thread, "lost") == written,
            "of thread {id}'s {written} records {kept} came through, and its loss was counted otherwise: {thread}"
        );
        ensure!(number(thread, "unhooked") == 0, "calls without their returns: {thread}");
        lost += number(thread, "lost");
    }
    match must {
        Must::TraceLoss => ensure!(lost > 0, "no record was lost"),
        _ => ensure!(lost == 0, "{lost} records were lost"),
    }
    write(kernel, &threads, &clocks, lost, file)?;

    let report = ask(&["report", "--json"], file)?;
    ensure!(number(&report["lost"], "full") == lost, "the trace knows of another loss: {}", report["lost"]);
    let replay = ask(&["replay", "--json"], file)?;
    let found = Found::of(replay["calls"].as_array().context("a replay without calls")?);
    ensure!(of("traced").count() == CONTEXTS.len(), "callers did not say what they counted");
    let (mut said, mut differs, mut counts) = (Vec::new(), false, json!({ "records_lost": lost }));
    for (traced, name) in of("traced").zip(CONTEXTS) {
        let (called, seen) = (number(traced, "calls"), found.calls.get(name).copied().unwrap_or_default());
        ensure!(number(traced, "wrong") == 0, "results were disturbed: {traced}");
        ensure!(called > 0 && traced["context"] == name, "nothing was called in {name} context");
        differs |= if must == Must::TraceLoss { seen > called } else { seen != called };
        said.push(format!("{seen} of {called} {name}"));
        counts[name] = json!({ "calls": called, "in_trace": seen });
    }
    ensure!(!differs, "calls in the trace are not those that were made: {}", said.join(", "));
    let mut missing = None;
    for context in &CONTEXT_NAMES[1..] {
        let of = |is_context| found.nested(context, |outer| outer.starts_with('[') == is_context);
        said.push(format!("{} {context} in a function, {} right in a context", of(false), of(true)));
        if must == Must::Trace && of(false) == 0 {
            missing = Some(format!("no {context} frame is nested in the function that it interrupted"));
        }
    }
    said.push(format!("{lost} records lost"));
    Ok(Judged { line: format!("{}: {}", file.display(), said.join(", ")), counts, missing })
}

/// Records by thread, in the order in which they were written.
fn sort(bytes: &[u8]) -> BTreeMap<u64, Vec<Record>> {
    let mut threads: BTreeMap<u64, Vec<Record>> = BTreeMap::new();
    for record in bytes.chunks_exact(RECORD_BYTES) {
        let word = |at: usize| record[at..at + 4].iter().rev().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
        let event = word(0) | word(4) << 32;
        // A place that was taken and never filled: the count of records tells.
        if event != 0 {
            let depth = u32::try_from(word(8) & 0xff).unwrap_or_default();
            threads.entry(word(8) >> 16).or_default().push(Record { event, depth, sequence: word(12) });
        }
    }
    for records in threads.values_mut() {
        records.sort_by_key(|record| record.sequence);
    }
    threads
}

/// Writes the trace file.
fn write(
    kernel: &Path,
    threads: &BTreeMap<u64, Vec<Record>>,
    clocks: &[ClockPoint],
    lost: u64,
    file: &Path,
) -> Result<()> {
    let [begin, end] = clocks else { bail!("{} readings of the clock, not two", clocks.len()) };
    let known = Functions::read(kernel)?;
    let functions: Vec<Function> = (known.by_address.iter())
        .map(|(address, function)| Function {
            name: function.name.clone(),
            address: *address,
            size: function.code.len() as u64,
            untraced: (!known.sites.contains(address)).then(|| "no-site".to_owned()),
            detail: String::new(),
        })
        .collect();
    let contexts = CONTEXT_NAMES.map(|name| Function { name: name.to_owned(), ..Function::default() });
    let first_context = u32::try_from(functions.len())?;
    let site_of = |raw: u32| -> Result<u32> {
        if let Some(kind) = raw.checked_sub(CONTEXT_SITES) {
            return Ok(first_context + kind.min(3));
        }
        let address = known.text_start + u64::from(raw);
        let index = functions.binary_search_by_key(&address, |function| function.address);
        Ok(u32::try_from(index.ok().with_context(|| format!("a record of {address:#x}, which is no function"))?)?)
    };

    if file.exists() {
        std::fs::remove_file(file).with_context(|| format!("removing {}", file.display()))?;
    }
    let path = kernel.display().to_string();
    let command = vec![path.clone()];
    let meta = Meta { command: command.clone(), kernel: "testbed".to_owned(), ..Meta::default() };
    let mut writer = Writer::create(file, &meta)?;
    writer.process(&Process { command, executable: path.clone(), started_tsc: begin.tsc, ..Process::default() })?;
    writer.module(&Module { id: 0, path: &path, build_id: None, first_site: 0, functions: &functions })?;
    let contexts = Module { id: 1, path: "contexts", build_id: None, first_site: first_context, functions: &contexts };
    writer.module(&contexts)?;
    for module in 0..2 {
        writer.load(&Load { module, tsc: begin.tsc, ..Load::default() })?;
    }
    for (thread, records) in threads {
        let id = u32::try_from(*thread)?;
        let name = format!("thread {id}");
        writer.stream(&Stream { id, process: 0, tid: id, name, started_tsc: begin.tsc })?;
        let (mut near, mut next) = (begin.tsc, 0);
        for run in records.chunk_by(|before, after| before.sequence + 1 == after.sequence) {
            let words = run.iter().map(|record| translate(record.event, site_of)).collect::<Result<Vec<u64>>>()?;
            near = writer.events(id, near, run[0].depth, run[0].sequence - next, &words)?.tsc;
            next = run[0].sequence + run.len() as u64;
        }
    }
    writer.losses(&Losses { full: lost, ..Losses::default() })?;
    writer.exit(0, Some(0), end.tsc)?;
    writer.calibration(clocks)?;
    writer.finish()?;
    Ok(())
}

/// A record with the trace's number of its function for the kernel's.
fn translate(event: u64, site_of: impl Fn(u32) -> Result<u32>) -> Result<u64> {
    let (kind, tsc) = record::decode(event).with_context(|| format!("{event:#x} is no record"))?;
    let kind = match kind {
        Event::Enter { site } => Event::Enter { site: site_of(site)? },
        Event::Point { site } => Event::Point { site: site_of(site)? },
        other => other,
    };
    Ok(record::encode(kind, tsc))
}

/// Runs the command on a trace: the one that the variable `TRAPLINE` names, or this workspace's.
fn ask(verb: &[&str], file: &Path) -> Result<Value> {
    let mut command = if let Some(path) = std::env::var_os("TRAPLINE") {
        Command::new(path)
    } else {
        let mut cargo = Command::new("cargo");
        cargo.args(["run", "--quiet", "--"]).current_dir(workspace_root());
        cargo
    };
    command.args(verb).arg("-i").arg(file).stderr(Stdio::inherit());
    let output = command.output().with_context(|| format!("starting `trapline {}`", verb.join(" ")))?;
    ensure!(output.status.success(), "`trapline {}` ended with {}", verb.join(" "), output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("reading what `trapline {}` says", verb.join(" ")))
}

/// What a replay shows.
#[derive(Debug, Default)]
struct Found {
    /// Calls of functions, by the innermost context that they are in.
    calls: BTreeMap<&'static str, u64>,
    /// How many frames of a context are directly in which other frame.
    nested: BTreeMap<(String, String), u64>,
}

impl Found {
    /// Goes through the calls of a replay, which come in the order in which they ended. Backwards, each comes behind the one that it is nested in.
    fn of(calls: &[Value]) -> Self {
        let mut found = Self::default();
        let mut open: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
        for call in calls.iter().rev() {
            let name = call["name"].as_str().unwrap_or_default();
            let outer = open.entry(number(call, "tid")).or_default();
            outer.truncate(usize::try_from(number(call, "depth")).unwrap_or_default());
            if CONTEXT_NAMES.contains(&name) {
                if let Some(around) = outer.last() {
                    *found.nested.entry((name.to_owned(), (*around).to_owned())).or_default() += 1;
                }
            } else {
                let kind = outer.iter().rev().find_map(|name| CONTEXT_NAMES.iter().position(|known| known == name));
                *found.calls.entry(CONTEXTS[kind.unwrap_or_default()]).or_default() += 1;
            }
            outer.push(name);
        }
        found
    }

    /// How many frames of `context` are directly in another frame that is as asked for.
    fn nested(&self, context: &str, is_asked: impl Fn(&str) -> bool) -> u64 {
        self.nested
            .iter()
            .filter(|((inner, outer), _)| inner == context && is_asked(outer))
            .map(|(_, count)| count)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_belong_to_the_innermost_context_around_them() {
        let call = |tid: u64, depth: u64, name: &str| json!({ "tid": tid, "depth": depth, "name": name });
        // In the order in which they end: work { [irq] { f { [nmi] { g } } } h }, and g alone in another thread.
        let calls = [
            call(1, 4, "g"),
            call(1, 3, "[nmi]"),
            call(1, 2, "f"),
            call(2, 0, "g"),
            call(1, 1, "[irq]"),
            call(1, 1, "h"),
            call(1, 0, "work"),
        ];
        let found = Found::of(&calls);
        let expected = BTreeMap::from([("nmi", 1), ("irq", 1), ("normal", 3)]);
        assert_eq!(found.calls, expected);
        assert_eq!(found.nested("[nmi]", |outer| outer == "f"), 1);
        assert_eq!(found.nested("[irq]", |outer| outer == "work"), 1);
        assert_eq!(found.nested("[irq]", |outer| outer == "f"), 0);
    }

    #[test]
    fn records_of_a_thread_are_sorted_whichever_ring_they_come_from() {
        let record = |thread: u32, sequence: u32| -> Vec<u8> {
            [1 << 8, 1 << 29, thread << 16 | 2 << 8 | 7, sequence].iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let bytes = [record(1, 2), record(2, 0), vec![0; RECORD_BYTES], record(1, 0), record(1, 1)].concat();
        let threads = sort(&bytes);
        let order: Vec<u64> = threads[&1].iter().map(|record| record.sequence).collect();
        assert_eq!((order, threads[&2].len(), threads[&1][0].depth), (vec![0, 1, 2], 1, 7));
    }
}
