//! The tracers: how each runs the work, and how many calls its own report says that it saw.
//!
//! Owns [`Row`], one line of the tables: a tracer, what it records, of which code. Invariant: a row's figures count only if its tracer's report has exactly
//! the calls that were made.

use std::ffi::OsString;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::bench::{Bench, Flavour, Times};

/// The functions of the work.
const FUNCTIONS: [&str; 3] = ["leaf", "middle", "root"];

/// A program that traces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tool {
    /// Nobody traces.
    Nobody,
    /// The floor.
    Floor,
    /// trapline.
    Trapline,
    /// trapline, which counts and does not record.
    Top,
    /// uftrace.
    Uftrace,
    /// LLVM's `XRay`.
    Xray,
    /// bpftrace.
    Bpftrace,
    /// Frida.
    Frida,
}

impl Tool {
    /// Those that can be asked for one by one.
    pub(super) const PEERS: [Self; 4] = [Self::Uftrace, Self::Xray, Self::Bpftrace, Self::Frida];

    /// As on the command line.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Floor => "floor",
            Self::Trapline => "trapline",
            Self::Top => "top",
            Self::Uftrace => "uftrace",
            Self::Xray => "xray",
            Self::Bpftrace => "bpftrace",
            Self::Frida => "frida",
        }
    }
}

/// What a row records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Events {
    /// Entries and exits.
    Pair,
    /// Entries only.
    Entry,
    /// Nothing: it is there, and switched off.
    Off,
}

/// One line of the tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) tool: Tool,
    /// The tool and its options, for readers.
    pub(super) title: &'static str,
    pub(super) events: Events,
    pub(super) flavour: Flavour,
    /// More options of the tool.
    options: &'static [&'static str],
    /// It makes this fraction of the calls that the fastest make: slow ones would take the time of all others.
    pub(super) one_in: u64,
}

const fn row(
    tool: Tool,
    title: &'static str,
    events: Events,
    flavour: Flavour,
    options: &'static [&'static str],
    one_in: u64,
) -> Row {
    Row { tool, title, events, flavour, options, one_in }
}

/// What others' costs are beyond: the program, compiled like this, that nobody traces.
pub(super) const fn bare(flavour: Flavour) -> Row {
    row(Tool::Nobody, "nobody", Events::Off, flavour, &[], 1)
}

/// All rows, the floors first.
pub(super) const ROWS: [Row; 33] = {
    use Events::{Entry, Off, Pair};
    use Flavour::{
        Fentry, FentryNops, FloorEntry, FloorPair, KeptFloorEntry, KeptFloorPair, Narrow, NarrowFloorEntry,
        NarrowFloorPair, Patchable, Sleds, Stock,
    };
    use Tool::{Bpftrace, Floor, Frida, Nobody, Top, Trapline, Uftrace, Xray};
    const RECORD: &str = "trapline record";
    const ENTRIES: &str = "trapline record --no-returns";
    const KEPT: &str = "floor, `__fentry__` kept";
    const OFF: &str = "trapline record, sites off";
    [
        row(Floor, "floor", Pair, FloorPair, &[], 1),
        row(Floor, KEPT, Pair, KeptFloorPair, &[], 1),
        row(Floor, "floor", Pair, NarrowFloorPair, &[], 1),
        row(Trapline, RECORD, Pair, Stock, &[], 1),
        row(Top, "trapline top", Pair, Stock, &[], 1),
        row(Top, "trapline top", Pair, Narrow, &[], 1),
        row(Trapline, RECORD, Pair, Narrow, &[], 1),
        row(Trapline, RECORD, Pair, Fentry, &[], 1),
        row(Trapline, RECORD, Pair, FentryNops, &[], 1),
        row(Trapline, RECORD, Pair, Patchable, &[], 1),
        row(Uftrace, "uftrace record", Pair, Fentry, &[], 1),
        row(Uftrace, "uftrace record -P .", Pair, FentryNops, &["-P", "."], 1),
        row(Uftrace, "uftrace record -P .", Pair, Stock, &["-P", "."], 1),
        row(Xray, "XRay, flight data recorder", Pair, Sleds, &["fdr"], 2),
        row(Xray, "XRay, basic mode", Pair, Sleds, &["basic"], 10),
        row(Frida, "Frida Interceptor, empty CModule", Pair, Stock, &[], 2),
        row(Bpftrace, "bpftrace, uprobe and uretprobe", Pair, Stock, &[], 50),
        row(Floor, "floor", Entry, FloorEntry, &[], 1),
        row(Floor, KEPT, Entry, KeptFloorEntry, &[], 1),
        row(Floor, "floor", Entry, NarrowFloorEntry, &[], 1),
        row(Trapline, ENTRIES, Entry, Stock, &["--no-returns"], 1),
        row(Trapline, ENTRIES, Entry, Narrow, &["--no-returns"], 1),
        row(Trapline, ENTRIES, Entry, Fentry, &["--no-returns"], 1),
        row(Trapline, ENTRIES, Entry, Patchable, &["--no-returns"], 1),
        row(Bpftrace, "bpftrace, uprobe", Entry, Stock, &[], 50),
        row(Trapline, OFF, Off, Stock, &["--start-off"], 1),
        row(Trapline, OFF, Off, Narrow, &["--start-off"], 1),
        row(Trapline, OFF, Off, Fentry, &["--start-off"], 1),
        row(Trapline, OFF, Off, Patchable, &["--start-off"], 1),
        // It heeds the option only beside a trigger.
        row(Uftrace, "uftrace record --disable", Off, Fentry, &["--disable", "-T", "main@trace-off"], 1),
        row(Nobody, "nobody: calls of the C library's `__fentry__`", Off, Fentry, &[], 1),
        row(Nobody, "nobody: 5-byte nops", Off, Patchable, &[], 1),
        row(Nobody, "nobody: XRay's sleds, not patched", Off, Sleds, &[], 1),
    ]
};

impl Row {
    /// Whether this is the row that `other` is divided by.
    pub(super) fn is_floor_of(&self, other: &Self) -> bool {
        self.tool == Tool::Floor
            && self.events == other.events
            && self.keeps_hook() == other.keeps_hook()
            && self.flavour.is_narrow() == other.flavour.is_narrow()
    }

    /// Whether the C library's `__fentry__` is called all the same. uftrace replaces it.
    fn keeps_hook(&self) -> bool {
        matches!(self.flavour, Flavour::KeptFloorEntry | Flavour::KeptFloorPair)
            || self.tool == Tool::Trapline && self.flavour == Flavour::Fentry
    }

    /// How the program is compiled whose time this row's is beyond: that of nobody's rows, beyond stock code.
    pub(super) fn baseline(&self) -> Flavour {
        if self.tool == Tool::Nobody { Flavour::Stock } else { self.flavour.untraced() }
    }

    /// Runs the work once.
    pub(super) fn measure(&self, bench: &Bench, calls: u64, threads: u64) -> Result<Times> {
        if let Some(why) = bench.lacks(self.flavour) {
            anyhow::bail!("{why}");
        }
        bench.clear()?;
        let (words, variables) = self.command(bench, calls, threads, false);
        bench.measure(&words, &variables).map(|(_, times)| times)
    }

    /// Runs the work once, and compares the calls in the tracer's report with those that were made.
    pub(super) fn prove(&self, bench: &Bench, calls: u64, threads: u64) -> Result<()> {
        if let Some(why) = bench.lacks(self.flavour) {
            anyhow::bail!("{why}");
        }
        bench.clear()?;
        // The script's counters are for one thread.
        let threads = if self.tool == Tool::Frida { 1 } else { threads };
        let (words, variables) = self.command(bench, calls, threads, true);
        let (printed, times) = bench.measure(&words, &variables)?;
        let seen = match self.tool {
            Tool::Nobody => return Ok(()),
            Tool::Floor => times.records,
            Tool::Trapline => trapline_calls(&ask_trapline(bench)?)?,
            Tool::Top => {
                let last = printed.lines().last().context("`trapline top` printed nothing")?;
                trapline_calls(&serde_json::from_str(last).context("reading what `trapline top` printed")?)?
            }
            Tool::Uftrace => uftrace_calls(bench, self.events)?,
            Tool::Xray => xray_calls(&ask_xray(bench)?),
            Tool::Bpftrace => bpftrace_calls(&printed, self.events)?,
            Tool::Frida => {
                let text = std::fs::read_to_string(bench.file("count")).context("Frida's script left no count")?;
                least(text.split_whitespace())?
            }
        };
        let expected = if self.events == Events::Off { 0 } else { calls * threads };
        ensure!(seen == expected, "of {expected} calls, its report has {seen}");
        Ok(())
    }

    /// The command, and variables of its environment. `counting`: for [`prove`](Self::prove).
    fn command(
        &self,
        bench: &Bench,
        calls: u64,
        threads: u64,
        counting: bool,
    ) -> (Vec<OsString>, Vec<(&'static str, String)>) {
        let work = bench.work(self.flavour, calls, threads);
        let with = |mut words: Vec<OsString>| {
            words.extend(work.iter().cloned());
            (words, Vec::new())
        };
        match self.tool {
            Tool::Nobody | Tool::Floor => (work, Vec::new()),
            Tool::Trapline => {
                let mut words = trapline("record", bench);
                words.extend(["--quiet"].iter().chain(self.options).chain(&["--"]).map(OsString::from));
                with(words)
            }
            Tool::Top => {
                let mut words: Vec<OsString> = vec![bench.trapline.clone().into()];
                words.extend(["top", "--batch", "--json", "--"].map(OsString::from));
                with(words)
            }
            Tool::Uftrace => {
                let mut words = uftrace("record", bench);
                words.extend(self.options.iter().map(OsString::from));
                with(words)
            }
            Tool::Xray => {
                let log = bench.data().join("xray.").display().to_string();
                let variables = if self.options == ["fdr"] {
                    // Two records of 8 bytes a call, and the buffers' own.
                    let buffers = calls * threads * 20 / FDR_BUFFER_BYTES + 16 * threads;
                    let options =
                        format!("func_duration_threshold_us=0:buffer_size={FDR_BUFFER_BYTES}:buffer_max={buffers}");
                    vec![("FDR_OPTIONS", options), ("XRAY_OPTIONS", format!("xray_logfile_base={log}"))]
                } else {
                    let options = format!("patch_premain=true xray_mode=xray-basic xray_logfile_base={log}");
                    vec![("XRAY_OPTIONS", options), ("XRAY_BASIC_OPTIONS", "func_duration_threshold_us=0".to_owned())]
                };
                (work, variables)
            }
            Tool::Bpftrace => {
                let program = bench.program(self.flavour).display().to_string();
                let probe = |kind: &str| FUNCTIONS.map(|name| format!("{kind}:{program}:{name}")).join(",");
                let entries = format!("{} {{ @entries = count(); }}", probe("uprobe"));
                let script = if self.events == Events::Pair {
                    format!("{entries} {} {{ @returns = count(); }}", probe("uretprobe"))
                } else {
                    entries
                };
                let line = work.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
                (vec!["bpftrace".into(), "-e".into(), script.into(), "-c".into(), line.into()], Vec::new())
            }
            Tool::Frida => {
                let count = if counting { bench.file("count").into() } else { OsString::from("-") };
                with(frida(count, &FUNCTIONS.join(",")))
            }
        }
    }
}

/// Buffers of `XRay`'s flight data recorder.
const FDR_BUFFER_BYTES: u64 = 1 << 20;

/// `trapline VERB`, for the trace in the folder of data.
pub(super) fn trapline(verb: &str, bench: &Bench) -> Vec<OsString> {
    let option = if verb == "record" { "-o" } else { "-i" };
    vec![bench.trapline.clone().into(), verb.into(), option.into(), bench.data().join("trace").into()]
}

/// `uftrace VERB`, for the trace in the folder of data.
pub(super) fn uftrace(verb: &str, bench: &Bench) -> Vec<OsString> {
    vec!["uftrace".into(), verb.into(), "-d".into(), bench.data().join("uftrace").into()]
}

/// Has Frida attach to functions, of the program whose words follow.
pub(super) fn frida(count: OsString, functions: &str) -> Vec<OsString> {
    let script = crate::workspace_root().join("benches/peers/frida_attach.py");
    [super::tools::frida_python().into(), script.into(), count, functions.into()].to_vec()
}

fn uftrace_calls(bench: &Bench, events: Events) -> Result<u64> {
    let report = bench.run(&uftrace("report", bench), &[]);
    match report {
        // Of a folder without any record there is no report.
        Err(error) if events == Events::Off && format!("{error:#}").contains("No data available") => Ok(0),
        report => Ok(table_calls(&report?.0)),
    }
}

fn ask_trapline(bench: &Bench) -> Result<Value> {
    let mut words = trapline("report", bench);
    words.push("--json".into());
    let (printed, _) = bench.run(&words, &[])?;
    serde_json::from_str(&printed).context("reading what `trapline report --json` printed")
}

fn ask_xray(bench: &Bench) -> Result<String> {
    let log =
        std::fs::read_dir(bench.data())?.flatten().map(|entry| entry.path()).next().context("XRay wrote no log")?;
    let map = format!("--instr_map={}", bench.program(Flavour::Sleds).display());
    let words = ["llvm-xray", "account", "--keep-going", "--format=csv", &map].map(OsString::from);
    let words: Vec<OsString> = words.into_iter().chain([log.into()]).collect();
    bench.run(&words, &[]).map(|(printed, _)| printed)
}

fn trapline_calls(report: &Value) -> Result<u64> {
    let functions = report["functions"].as_array().context("the report has no list `functions`")?;
    let is_ours = |function: &&Value| FUNCTIONS.iter().any(|name| function["name"] == *name);
    Ok(functions.iter().filter(is_ours).filter_map(|function| function["calls"].as_u64()).sum())
}

/// The calls in a table whose last two columns are calls and names.
fn table_calls(report: &str) -> u64 {
    let line = |line: &str| {
        let mut words = line.split_whitespace().rev();
        let name = words.next()?;
        FUNCTIONS.contains(&name).then(|| words.next()?.parse::<u64>().ok())?
    };
    report.lines().filter_map(line).sum()
}

/// The calls in `funcid,count,...,"function"`.
fn xray_calls(account: &str) -> u64 {
    let line = |line: &str| {
        let name = line.rsplit(',').next()?.trim_matches('"');
        FUNCTIONS.contains(&name).then(|| line.split(',').nth(1)?.parse::<u64>().ok())?
    };
    account.lines().filter_map(line).sum()
}

fn bpftrace_calls(printed: &str, events: Events) -> Result<u64> {
    let maps: &[&str] = if events == Events::Pair { &["@entries:", "@returns:"] } else { &["@entries:"] };
    let counts = maps.iter().map(|map| printed.lines().find_map(|line| line.strip_prefix(map)).unwrap_or("0").trim());
    least(counts)
}

/// Of entries and returns, what there is less of.
fn least<'a>(counts: impl Iterator<Item = &'a str>) -> Result<u64> {
    let counts = counts.map(|count| count.parse::<u64>().with_context(|| format!("`{count}` is no count")));
    counts.collect::<Result<Vec<_>>>()?.into_iter().min().context("no count")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_of_the_work_are_found_in_each_report() {
        let uftrace = "\
  Total time   Self time       Calls  Function
  ==========  ==========  ==========  ====================
  303.390 ms   18.003 ms      100000  root
    5.979 ms   66.010 us           1  fopen
   86.223 ms   35.205 ms      700000  leaf
";
        assert_eq!(table_calls(uftrace), 800_000);
        let xray = "funcid,count,min,function\n1,70000,2.8e-07,\"leaf\"\n5,1,4.2e-01,\"work\"\n2,20000,1,\"middle\"\n";
        assert_eq!(xray_calls(xray), 90_000);
        let report = serde_json::json!({"functions": [{"name": "leaf", "calls": 7}, {"name": "main", "calls": 1}]});
        assert_eq!(trapline_calls(&report).ok(), Some(7));
        assert!(trapline_calls(&serde_json::json!({})).is_err());
    }

    #[test]
    fn returns_that_were_not_seen_count() {
        let printed = "Attaching 6 probes...\n\n@entries: 20000\n@returns: 19999\n";
        assert_eq!(bpftrace_calls(printed, Events::Pair).ok(), Some(19_999));
        assert_eq!(bpftrace_calls(printed, Events::Entry).ok(), Some(20_000));
        assert_eq!(bpftrace_calls("", Events::Entry).ok(), Some(0));
        assert_eq!(least(["3", "2"].into_iter()).ok(), Some(2));
    }

    #[test]
    fn each_kind_of_event_that_is_recorded_has_a_floor() {
        for row in ROWS.iter().filter(|row| row.events != Events::Off) {
            assert!(ROWS.iter().any(|floor| floor.is_floor_of(row)), "{}", row.title);
        }
    }
}
