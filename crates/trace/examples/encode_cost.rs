//! What a record costs to encode and to write, and how many bytes a call takes: `cargo run --release -p trapline-trace --example encode_cost`.
//!
//! Streams as programs make them: one hot leaf; a walk over a call graph of a given number of functions with realistic times; points only.

#![expect(clippy::cast_precision_loss, reason = "for people to read")]

use trapline_abi::record::{Event, encode};
use trapline_trace::{Batch, Encoder, Meta, Position, Writer};

const RECORDS: usize = 4 << 20;
const CHUNK: usize = 4096;

/// A generator of numbers (xorshift), so that each run measures the same.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn leaf() -> Vec<u64> {
    let mut numbers = Numbers(1);
    let mut tsc = 1 << 45;
    (0..RECORDS)
        .map(|index| {
            tsc += 25 + numbers.next() % 16;
            encode(if index % 2 == 0 { Event::Enter { site: 7 } } else { Event::Exit { depth: 1 } }, tsc)
        })
        .collect()
}

/// Each function calls a few others, always the same ones, often in the same order.
fn walk(functions: u64, max_delta: u64) -> Vec<u64> {
    let mut numbers = Numbers(2);
    let mut tsc = 1 << 45;
    let mut stack = vec![0_u64];
    let mut records = Vec::with_capacity(RECORDS);
    while records.len() < RECORDS {
        tsc += 20 + numbers.next() % max_delta / (1 + numbers.next() % 8);
        let top = stack[stack.len() - 1];
        let choice = numbers.next() % 16;
        if stack.len() > 1 && (choice < 8 || stack.len() > 40) {
            records.push(encode(Event::Exit { depth: u32::try_from(stack.len() - 1).unwrap_or(1) }, tsc));
            stack.pop();
        } else {
            let callee = (top * 31 + choice % 4 * 7 + 1) % functions;
            stack.push(callee);
            records.push(encode(Event::Enter { site: u32::try_from(callee).unwrap_or(0) }, tsc));
        }
    }
    records
}

fn points() -> Vec<u64> {
    let mut tsc = 1 << 45;
    let records = walk(300, 100);
    records
        .iter()
        .enumerate()
        .map(|(index, word)| {
            tsc += 30 + index as u64 % 7;
            encode(Event::Point { site: u32::try_from(word >> 40 & 0xff).unwrap_or(0) }, tsc)
        })
        .collect()
}

/// What this thread has run, however busy the machine is.
fn on_cpu_ns() -> Result<u64, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(text.split(' ').next().unwrap_or_default().parse()?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::temp_dir().join(format!("encode-cost-{}.data", std::process::id()));
    println!(
        "{:<26} {:>10} {:>13} {:>11} {:>13}",
        "stream", "ns/record", "encoding only", "bytes/call", "bytes/record"
    );
    let streams: [(&str, Vec<u64>); 5] = [
        ("one leaf", leaf()),
        ("300 functions, short", walk(300, 200)),
        ("5,000 functions, short", walk(5_000, 400)),
        ("50,000 functions, long", walk(50_000, 20_000)),
        ("points", points()),
    ];
    for (name, records) in streams {
        let mut best = f64::MAX;
        let (mut bytes, mut calls) = (0, 0);
        for _ in 0..10 {
            let mut writer = Writer::create(&path, &Meta::default())?;
            let start = on_cpu_ns()?;
            let (mut tsc, mut depth) = (1 << 45, 0);
            for chunk in records.chunks(CHUNK) {
                let end = writer.events(1, tsc, depth, 0, chunk)?;
                (tsc, depth) = (end.tsc, end.depth);
            }
            calls = writer.calls();
            bytes = writer.finish()?;
            best = best.min((on_cpu_ns()? - start) as f64 / records.len() as f64);
        }
        let mut encoding = f64::MAX;
        for _ in 0..10 {
            let mut encoder = Encoder::new()?;
            let start_ns = on_cpu_ns()?;
            let mut start = Position { tsc: 1 << 45, depth: 0 };
            for records in records.chunks(CHUNK) {
                start = encoder.encode(&Batch { stream: 1, start, lost_before: 0, records })?.end;
            }
            encoding = encoding.min((on_cpu_ns()? - start_ns) as f64 / records.len() as f64);
        }
        let (bytes_f, records_f) = (bytes as f64, records.len() as f64);
        println!(
            "{name:<26} {best:>10.2} {encoding:>13.2} {:>11.2} {:>13.2}",
            bytes_f / calls as f64,
            bytes_f / records_f
        );
    }
    std::fs::remove_file(&path)?;
    let _ = std::fs::remove_file(path.with_extension("data.old"));
    Ok(())
}
