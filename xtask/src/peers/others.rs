//! What is measured beside calls: how long a program takes to start, how long a report takes, and what enabling sites costs.

use std::{ffi::OsString, fs, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    bench::{Bench, Flavour, output},
    rounds::median,
    tools::Tools,
    tracer::{self, Tool, frida, trapline, uftrace},
};
use crate::{packages, target_folder};

/// How a program is started, and how long that takes.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) title: &'static str,
    /// Milliseconds, the median.
    pub(super) ms: Result<f64, String>,
}

/// A program without work of its own, with thousands of functions.
pub(super) const STARTED: [&str; 3] = ["/usr/bin/python3", "-c", "pass"];

/// A function of [`STARTED`] that is called once.
const ONE_FUNCTION: &str = "Py_BytesMain";

/// Starts a program under each tracer, `rounds` times.
pub(super) fn starts(bench: &Bench, tools: &Tools, rounds: usize) -> Vec<Start> {
    let with = |mut words: Vec<OsString>, options: &[&str]| {
        words.extend(options.iter().map(OsString::from));
        words.extend(STARTED.map(OsString::from));
        words
    };
    let probe = format!("uprobe:{}:{ONE_FUNCTION} {{ @entries = count(); }}", STARTED[0]);
    let bpftrace = ["bpftrace", "-e", &probe, "-c", &STARTED.join(" ")].map(OsString::from).to_vec();
    let record = trapline("record", bench);
    let mut all: Vec<(Tool, &'static str, Vec<OsString>)> = vec![
        (Tool::Nobody, "nobody traces", with(Vec::new(), &[])),
        (Tool::Trapline, "trapline record", with(record.clone(), &["--quiet", "--"])),
        (Tool::Trapline, "trapline record --lib '*'", with(record, &["--quiet", "--lib", "*", "--"])),
        (Tool::Uftrace, "uftrace record --force (library calls only)", with(uftrace("record", bench), &["--force"])),
        (Tool::Uftrace, "uftrace record -P .", with(uftrace("record", bench), &["-P", "."])),
        (Tool::Bpftrace, "bpftrace, one uprobe", bpftrace),
        (Tool::Frida, "Frida, one function", with(frida("-".into(), ONE_FUNCTION), &[])),
    ];
    all.retain(|(tool, ..)| tools.are_asked_for(*tool));
    let mut times: Vec<Result<Vec<f64>, String>> =
        all.iter().map(|(tool, ..)| tools.has(*tool).map(|()| Vec::new()).map_err(str::to_owned)).collect();
    for _ in 0..rounds {
        for ((_, _, words), times) in all.iter().zip(&mut times) {
            let Ok(known) = times else { continue };
            let taken = bench.clear().and_then(|()| bench.run(words, &[]));
            match taken {
                Ok((_, taken)) => known.push(taken.as_secs_f64() * 1e3),
                Err(error) => *times = Err(format!("{error:#}")),
            }
        }
    }
    let median_of = |times: Result<Vec<f64>, String>| times.map(|mut times| median(&mut times));
    all.iter().zip(times).map(|((_, title, _), times)| Start { title, ms: median_of(times) }).collect()
}

/// What reading a trace takes.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) tool: Tool,
    /// Calls in the trace.
    pub(super) calls: u64,
    /// Seconds, and MiB of memory at most.
    pub(super) cost: Result<(f64, f64), String>,
}

/// Records so many calls with uftrace and with trapline, and has both report on them.
pub(super) fn reports(bench: &Bench, tools: &Tools, calls: u64, rounds: usize) -> Vec<Report> {
    [Tool::Uftrace, Tool::Trapline]
        .into_iter()
        .filter(|tool| tools.are_asked_for(*tool))
        .map(|tool| {
            let cost = tools
                .has(tool)
                .map_err(str::to_owned)
                .and_then(|()| report(bench, tool, calls, rounds).map_err(|error| format!("{error:#}")));
            Report { tool, calls, cost }
        })
        .collect()
}

fn report(bench: &Bench, tool: Tool, calls: u64, rounds: usize) -> Result<(f64, f64)> {
    packages::ensure(&[("/usr/bin/time", "time")])?;
    let row = tracer::ROWS.iter().find(|row| row.tool == tool && row.flavour == Flavour::Fentry);
    row.context("no row of this tool")?.measure(bench, calls, 1)?;
    let (mut seconds, mut mebibytes) = (Vec::new(), Vec::new());
    let file = bench.file("resources");
    for _ in 0..rounds {
        let time = ["/usr/bin/time", "--format=%e %M", "-o"].map(OsString::from);
        let words = if tool == Tool::Uftrace { uftrace("report", bench) } else { trapline("report", bench) };
        let words: Vec<OsString> = time.into_iter().chain([file.clone().into()]).chain(words).collect();
        let (_, taken) = bench.run(&words, &[])?;
        let resources = fs::read_to_string(&file).context("`time` left no figures")?;
        let kibibytes = resources.split_whitespace().nth(1).and_then(|word| word.parse::<f64>().ok());
        seconds.push(taken.as_secs_f64());
        mebibytes.push(kibibytes.context("`time` left no figures")? / 1024.0);
    }
    Ok((median(&mut seconds), median(&mut mebibytes)))
}

/// Nanoseconds a site of enabling 20,000 of them while a thread calls one, by trapline and by the floor.
pub(super) fn enabling(quick: bool) -> Result<(f64, f64)> {
    let mut command = Command::new("cargo");
    command.args(["bench", "--quiet", "-p", "trapline-benches", "--bench", "pokes", "--", "enable/.*/20000"]);
    if quick {
        command.arg("--quick");
    }
    command.current_dir(crate::workspace_root());
    output(command, "cargo bench")?;
    let a_site = |name: &str| -> Result<f64> {
        let file = target_folder().join("criterion/enable").join(name).join("20000/new/estimates.json");
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let estimates: Value = serde_json::from_str(&text)?;
        let median = estimates["median"]["point_estimate"].as_f64().context("criterion left no median")?;
        ensure!(median > 0.0, "the benchmark did nothing");
        Ok(median / 20_000.0)
    };
    Ok((a_site("trapline")?, a_site("floor")?))
}
