//! speedscope's own JSON: a profile a thread, of opened and closed frames.
//!
//! Owns [`Speedscope`]. The list of frames comes last, when all functions are known. Invariant: a profile's times begin and end with its events, and what is opened is closed.

use std::io::{self, Write};

use serde_json::json;

use crate::{
    source::{Call, Enter, Output, Thread, Trace},
    target::Stream,
};

/// See the module's text.
pub(crate) struct Speedscope {
    output: Stream,
    has_profiles: bool,
    has_events: bool,
    first_ns: u64,
    last_ns: u64,
}

impl Speedscope {
    pub(crate) fn new(output: Stream) -> Self {
        Self { output, has_profiles: false, has_events: false, first_ns: 0, last_ns: 0 }
    }

    fn event(&mut self, kind: char, function: u32, ns: u64) -> io::Result<()> {
        if !self.has_events {
            self.first_ns = ns;
        }
        let separator = if self.has_events { "," } else { "" };
        (self.has_events, self.last_ns) = (true, ns);
        write!(self.output, "{separator}\n{{\"type\":\"{kind}\",\"frame\":{function},\"at\":{ns}}}")
    }
}

impl Output for Speedscope {
    fn begin(&mut self, _: &Trace) -> io::Result<()> {
        let schema = "https://www.speedscope.app/file-format-schema.json";
        let exporter = concat!("trapline ", env!("CARGO_PKG_VERSION"));
        write!(self.output, "{{\"$schema\":{},\"exporter\":{},\"profiles\":[", json!(schema), json!(exporter))
    }

    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        let separator = if self.has_profiles { "," } else { "" };
        (self.has_profiles, self.has_events, self.first_ns, self.last_ns) = (true, false, 0, 0);
        let name = json!(format!("{} ({})", thread.name, thread.tid));
        write!(self.output, "{separator}\n{{\"type\":\"evented\",\"name\":{name},\"unit\":\"nanoseconds\",\"events\":[")
    }

    fn enter(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.event('O', enter.function, enter.start_ns)
    }

    fn leave(&mut self, _: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.event('C', call.function, call.end_ns)
    }

    fn point(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.event('O', enter.function, enter.start_ns)?;
        self.event('C', enter.function, enter.start_ns)
    }

    fn thread_end(&mut self, _: &Trace, _: &Thread) -> io::Result<()> {
        write!(self.output, "],\"startValue\":{},\"endValue\":{}}}", self.first_ns, self.last_ns)
    }

    fn end(mut self, trace: &Trace) -> io::Result<()> {
        write!(self.output, "],\"shared\":{{\"frames\":[")?;
        for (index, function) in trace.functions.iter().enumerate() {
            let separator = if index > 0 { "," } else { "" };
            write!(self.output, "{separator}\n{}", json!({ "name": function.name, "file": function.path }))?;
        }
        writeln!(self.output, "]}}}}")?;
        self.output.flush()
    }
}
