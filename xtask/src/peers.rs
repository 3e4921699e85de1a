//! `cargo xtask bench-peers`: trapline beside uftrace, `XRay`, bpftrace and Frida, on the same work, written to docs/benchmarks.md.
//!
//! The work (`benches/peers/work.c`) makes a known number of calls and times itself. [`mod@bench`] compiles it in each flavour and runs commands, [`tools`] makes the
//! peers ready, [`tracer`] is the list of what is measured and proves that each tracer sees every call, [`rounds`] interleaves the runs, [`others`] measures what is no call,
//! [`document`] writes. Nothing is pinned, no priority is raised, no frequency fixed: the figures are what users get.
//!
//! Invariant: every row is in the document, with figures or with the reason why it has none.

mod bench;
mod document;
mod others;
mod rounds;
mod tools;
mod tracer;

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, bail};

use crate::args::BenchPeers;
use bench::Bench;
use document::Results;
use rounds::Extent;
use tools::Tools;
use tracer::Tool;

/// How much is measured in one form of the command.
struct Form {
    one_thread: Extent,
    two_threads: Extent,
    starts: usize,
    report_calls: u64,
    report_rounds: usize,
}

impl Form {
    const fn of(asked: &BenchPeers) -> Self {
        const fn extent(calls: u64, rounds: usize, patience_s: u64) -> Extent {
            Extent { calls, rounds, patience: Duration::from_secs(patience_s) }
        }
        if asked.quick {
            let (one_thread, two_threads) = (extent(1_000_000, 3, 0), extent(500_000, 3, 0));
            return Self { one_thread, two_threads, starts: 3, report_calls: 1_000_000, report_rounds: 1 };
        }
        let report_calls = if asked.full { 100_000_000 } else { 10_000_000 };
        let report_rounds = if asked.full { 1 } else { 3 };
        let (one_thread, two_threads) = (extent(10_000_000, 7, 200), extent(5_000_000, 5, 100));
        Self { one_thread, two_threads, starts: 7, report_calls, report_rounds }
    }
}

/// The options as they were typed.
fn options(asked: &BenchPeers) -> String {
    let only = asked.only.as_ref().map_or_else(String::new, |name| format!(" --only {name}"));
    let length = if asked.quick {
        " --quick"
    } else if asked.full {
        " --full"
    } else {
        ""
    };
    format!("{length}{only}")
}

/// Measures, and writes the document; prints instead if less than everything was asked for.
pub(crate) fn run(asked: &BenchPeers) -> Result<ExitCode> {
    let peers: Vec<Tool> = match &asked.only {
        None => Tool::PEERS.to_vec(),
        Some(name) => match Tool::PEERS.into_iter().find(|peer| peer.name() == name) {
            Some(peer) => vec![peer],
            None if name == Tool::Trapline.name() => Vec::new(),
            None => bail!("unknown peer `{name}`; there are {}", Tool::PEERS.map(Tool::name).join(", ")),
        },
    };
    let form = Form::of(asked);
    eprintln!("bench-peers: making ready");
    let tools = Tools::set_up(&peers);
    let bench = Bench::set_up()?;
    eprintln!("bench-peers: calls");
    let one_thread = rounds::measure(&bench, &tools, 1, form.one_thread);
    let two_threads = rounds::measure(&bench, &tools, 2, form.two_threads);
    eprintln!("bench-peers: starts");
    let starts = others::starts(&bench, &tools, form.starts);
    eprintln!("bench-peers: reports");
    let reports = others::reports(&bench, &tools, form.report_calls, form.report_rounds);
    eprintln!("bench-peers: enabling sites");
    let enabling = others::enabling(asked.quick).map_err(|error| format!("{error:#}"));
    let is_whole = !asked.quick && asked.only.is_none();
    let results = Results {
        options: options(asked),
        tools,
        extents: [form.one_thread, form.two_threads],
        one_thread,
        two_threads,
        starts,
        reports,
        enabling,
    };
    let section = results.section();
    if is_whole {
        document::write(&section)?;
    } else {
        print!("{section}");
    }
    let failed = results.failures();
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("bench-peers: without figures: {}", failed.join("; "));
    // A peer that fails is a result; ours that fails is a failure.
    Ok(if results.is_ours_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
