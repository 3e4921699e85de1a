//! How long a report takes, and how much memory: `cargo run --release -p trapline-trace --example report_cost -- MILLIONS_OF_CALLS THREADS`.
#![expect(clippy::cast_precision_loss, reason = "for people to read")]

use std::time::Instant;

use trapline_abi::record::{Event, encode};
use trapline_trace::{Function, Meta, Module, Position, Writer, profile};

const FUNCTIONS: u32 = 2000;

/// A thread that walks through a call graph.
struct Walk {
    state: u64,
    tsc: u64,
    stack: Vec<u32>,
    end: Position,
}

impl Walk {
    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.tsc += 25 + self.state % 97;
        let depth = u32::try_from(self.stack.len()).unwrap_or(0);
        let choice = self.state >> 40 & 15;
        let event = if depth > 0 && (choice < 8 || depth > 40) {
            self.stack.pop();
            Event::Exit { depth }
        } else {
            let caller = self.stack.last().copied().unwrap_or(0);
            let site = (caller * 31 + u32::try_from(choice % 4).unwrap_or(0) * 7 + 1) % FUNCTIONS;
            self.stack.push(site);
            Event::Enter { site }
        };
        encode(event, self.tsc)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let millions = arguments.next().transpose()?.unwrap_or(10);
    let threads = arguments.next().transpose()?.unwrap_or(1);
    let path = std::env::temp_dir().join(format!("report-cost-{}.data", std::process::id()));
    let mut writer = Writer::create(&path, &Meta { tsc_hz: 2_600_000_000, ..Meta::default() })?;
    let functions: Vec<Function> =
        (0..FUNCTIONS).map(|index| Function { name: format!("function_{index}"), ..Function::default() }).collect();
    writer.module(&Module { id: 0, path: "/bin/walk", build_id: None, first_site: 0, functions: &functions })?;
    let mut walks: Vec<Walk> = (0..threads)
        .map(|index| Walk { state: index + 1, tsc: 1 << 40, stack: vec![], end: Position { tsc: 1 << 40, depth: 0 } })
        .collect();
    while writer.calls() < millions * 1_000_000 {
        for (stream, walk) in (0..).zip(&mut walks) {
            let records: Vec<u64> = (0..4096).map(|_| walk.next()).collect();
            walk.end = writer.events(stream, walk.end.tsc, walk.end.depth, 0, &records)?;
        }
    }
    let (calls, bytes) = (writer.calls(), writer.finish()?);
    let start = Instant::now();
    let profile = profile(&path)?;
    let seconds = start.elapsed().as_secs_f64();
    std::fs::remove_file(&path)?;
    let counted: u64 = profile.functions.iter().map(|function| function.calls).sum();
    assert_eq!(counted, calls);
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    println!(
        "{calls} calls, {:.2} bytes a call, {seconds:.2} s, {:.1} ns a call, {peak}",
        bytes as f64 / calls as f64,
        seconds * 1e9 / calls as f64
    );
    Ok(())
}
