//! What a page has to know of all calls before the first one is written.
//!
//! Owns [`Survey`], an [`Output`] that writes nothing, and what it [`Found`].

use std::io;

use serde_json::{Value, json};
use trapline_trace::{Ending, Stacks};

use super::ladder::{Count, Ladder, Piece};
use crate::source::{Call, Enter, Output, Thread, Trace};

/// The result.
pub(super) struct Found {
    pub(super) stacks: Stacks,
    /// For each step of the ladder.
    pub(super) counts: Vec<Count>,
    /// As the page has them, in the order of the trace's streams.
    pub(super) threads: Vec<Value>,
    /// Of functions, by the source's numbers.
    pub(super) sites: Vec<u32>,
}

impl Found {
    /// Nothing yet, for a ladder of these steps.
    pub(super) fn new(steps: &[u64]) -> Self {
        let counts = vec![Count::default(); steps.len()];
        Self { stacks: Stacks::new(), counts, threads: Vec::new(), sites: Vec::new() }
    }
}

/// See the module's text.
pub(super) struct Survey<'a> {
    found: &'a mut Found,
    ladder: Ladder,
    calls: u64,
    /// How many calls were open at most.
    depths: usize,
    span: Option<(u64, u64)>,
}

impl<'a> Survey<'a> {
    pub(super) fn new(found: &'a mut Found, steps: &[u64]) -> Self {
        Self { found, ladder: Ladder::new(steps.to_vec()), calls: 0, depths: 0, span: None }
    }

    fn count(&mut self, piece: Piece) {
        self.ladder.call(piece, &mut self.found.counts);
        self.calls += 1;
        self.depths = self.depths.max(piece.depth as usize + 1);
        let (first, last) = self.span.unwrap_or((piece.start_ns, piece.end_ns));
        self.span = Some((first.min(piece.start_ns), last.max(piece.end_ns)));
    }
}

/// A call as a piece.
pub(super) fn piece(function: u32, depth: usize, start_ns: u64, end_ns: u64) -> Piece {
    Piece { depth: u32::try_from(depth).unwrap_or(u32::MAX), start_ns, end_ns, function, calls: 1 }
}

impl Output for Survey<'_> {
    fn enter(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.found.stacks.enter(enter.function);
        Ok(())
    }

    fn leave(&mut self, _: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        // As in the report: how long it ran is not known.
        self.found.stacks.leave(if call.ending == Ending::Unknown { 0 } else { call.self_ns });
        self.count(piece(call.function, call.depth, call.start_ns, call.end_ns));
        Ok(())
    }

    fn point(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.found.stacks.point(enter.function);
        self.count(piece(enter.function, enter.depth, enter.start_ns, enter.start_ns));
        Ok(())
    }

    fn thread_end(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        self.ladder.end(&mut self.found.counts);
        let (start_ns, end_ns) = self.span.take().unwrap_or_default();
        self.found.threads.push(json!({
            "pid": thread.pid, "tid": thread.tid, "name": thread.name, "program": thread.program(),
            "calls": std::mem::take(&mut self.calls), "depths": std::mem::take(&mut self.depths), "start_ns": start_ns, "end_ns": end_ns,
        }));
        Ok(())
    }

    fn end(self, trace: &Trace) -> io::Result<()> {
        self.found.sites = trace.functions.iter().map(|function| function.site).collect();
        Ok(())
    }
}
