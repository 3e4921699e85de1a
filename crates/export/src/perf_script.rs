//! What `perf script` prints: samples with their stacks, as text.
//!
//! Owns [`PerfScript`]. A sample is a time in which one call ran itself, from its beginning; its period is how long that was, in nanoseconds. Readers that add periods up get
//! exact times; readers that count samples do not. Invariant: the samples of a thread are in the order of time, and all threads' are interleaved.

use std::{
    collections::HashMap,
    io::{self, Write},
};

use trapline_trace::Order;

use crate::{
    source::{Call, Enter, Output, Thread, Trace},
    target::Stream,
};

/// The open calls of a thread, and since when the innermost one runs itself.
#[derive(Default)]
struct Running {
    functions: Vec<u32>,
    since_ns: u64,
}

/// See the module's text.
pub(crate) struct PerfScript {
    output: Stream,
    threads: HashMap<u32, Running>,
}

impl PerfScript {
    pub(crate) fn new(output: Stream) -> Self {
        Self { output, threads: HashMap::new() }
    }

    /// Another call runs from now on.
    fn sample(&mut self, trace: &Trace, thread: &Thread, now_ns: u64) -> io::Result<&mut Running> {
        let running = self.threads.entry(thread.stream).or_default();
        let period_ns = now_ns - running.since_ns.min(now_ns);
        if period_ns > 0 && !running.functions.is_empty() {
            let (seconds, rest) = (running.since_ns / 1_000_000_000, running.since_ns % 1_000_000_000);
            // Names of threads may have spaces, and readers split there.
            let name = thread.name.replace(char::is_whitespace, "_");
            writeln!(
                self.output,
                "{name} {}/{} [000] {seconds}.{rest:09}: {period_ns} cpu-clock:",
                thread.pid, thread.tid
            )?;
            for function in running.functions.iter().rev() {
                let known = trace.function(*function);
                let name = known.name.replace(['\n', '\r'], " ");
                writeln!(self.output, "\t{:16x} {name}+0x0 ({})", known.address, known.path)?;
            }
            writeln!(self.output)?;
        }
        running.since_ns = now_ns;
        Ok(running)
    }
}

impl Output for PerfScript {
    const ORDER: Order = Order::Time;

    fn enter(&mut self, trace: &Trace, thread: &Thread, enter: Enter) -> io::Result<()> {
        self.sample(trace, thread, enter.start_ns)?.functions.push(enter.function);
        Ok(())
    }

    fn leave(&mut self, trace: &Trace, thread: &Thread, call: Call) -> io::Result<()> {
        self.sample(trace, thread, call.end_ns)?.functions.pop();
        Ok(())
    }

    fn point(&mut self, _: &Trace, _: &Thread, _: Enter) -> io::Result<()> {
        Ok(())
    }

    fn thread_end(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        self.threads.remove(&thread.stream);
        Ok(())
    }

    fn end(mut self, _: &Trace) -> io::Result<()> {
        self.output.flush()
    }
}
