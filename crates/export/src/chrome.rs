//! Chrome's trace event JSON: a begin and an end for each call, in the order of their thread.
//!
//! Owns [`Chrome`]. Begins and ends rather than complete events: readers sort by time, and calls that begin in the same nanosecond would change places.
//! Invariant: every event has both pid and tid; speedscope and others fail without.

use std::io::{self, Write};

use serde_json::json;

use crate::{
    source::{Call, Enter, Output, Thread, Trace},
    target::Stream,
};

/// Phases, as JSON. An instant has a scope as well, its thread.
const BEGIN: &str = r#""B""#;
const END: &str = r#""E""#;
const INSTANT: &str = r#""i","s":"t""#;

/// See the module's text.
pub(crate) struct Chrome {
    output: Stream,
    /// The functions' names and modules, as JSON.
    names: Vec<String>,
    has_events: bool,
    /// Of the current thread, as JSON.
    ids: String,
}

impl Chrome {
    pub(crate) fn new(output: Stream) -> Self {
        Self { output, names: Vec::new(), has_events: false, ids: String::new() }
    }

    fn separate(&mut self) -> io::Result<()> {
        let separator = if self.has_events { ",\n" } else { "" };
        self.has_events = true;
        self.output.write_all(separator.as_bytes())
    }

    fn event(&mut self, trace: &Trace, phase: &str, function: u32, ns: u64) -> io::Result<()> {
        self.separate()?;
        for known in &trace.functions[self.names.len()..] {
            self.names.push(format!("\"name\":{},\"cat\":{}", json!(known.name), json!(known.module())));
        }
        let (micros, rest, names, ids) = (ns / 1000, ns % 1000, &self.names[function as usize], &self.ids);
        write!(self.output, "{{\"ph\":{phase},{names},\"ts\":{micros}.{rest:03},{ids}}}")
    }
}

impl Output for Chrome {
    fn begin(&mut self, _: &Trace) -> io::Result<()> {
        self.output.write_all(b"{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n")
    }

    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        self.ids = format!("\"pid\":{},\"tid\":{}", thread.pid, thread.tid);
        for (what, name) in [("process_name", thread.program()), ("thread_name", &thread.name)] {
            self.separate()?;
            let metadata =
                json!({ "ph": "M", "name": what, "pid": thread.pid, "tid": thread.tid, "args": { "name": name } });
            write!(self.output, "{metadata}")?;
        }
        Ok(())
    }

    fn enter(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.event(trace, BEGIN, enter.function, enter.start_ns)
    }

    fn leave(&mut self, trace: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.event(trace, END, call.function, call.end_ns)
    }

    fn point(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.event(trace, INSTANT, enter.function, enter.start_ns)
    }

    fn end(mut self, _: &Trace) -> io::Result<()> {
        self.output.write_all(b"\n]}\n")?;
        self.output.flush()
    }
}
