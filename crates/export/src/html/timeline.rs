//! The timeline of a page: blocks of pieces, thread by thread and step by step.
//!
//! Owns [`Timeline`], an [`Output`] that keeps the pieces of one block for each step, and the directory of what was written. Invariant: the pieces of a block lie between those of the blocks of its step that are written before and after,
//! so that a window of time needs few blocks.

use std::{collections::HashMap, io};

use serde_json::json;

use super::{
    block,
    ladder::{Ladder, Piece, Shelf},
    sheet::Sheet,
    survey::piece,
};
use crate::source::{Call, Enter, Output, Thread, Trace};

/// Pieces in a block: read in less than the time of a frame.
const PIECES: usize = 1 << 14;

/// A unit of time of a step's runs is the step divided by two to the power of this.
const PRECISION_BITS: u32 = 3;

/// See the module's text.
pub(super) struct Timeline {
    ladder: Ladder,
    shelf: Blocks,
    /// The page's numbers of functions, by their sites.
    numbers: HashMap<u32, u32>,
    /// And by the source's numbers, as far as they were asked for.
    known: Vec<u32>,
    /// What has no number.
    others: u32,
    threads: u64,
}

/// Pieces that are gathered, and where those went that are written.
struct Blocks {
    sheet: Sheet,
    steps: Vec<u64>,
    /// The first step whose pieces are on the page.
    first: usize,
    /// Of each step: calls, and runs.
    pieces: Vec<[Vec<Piece>; 2]>,
    full: Option<usize>,
    /// Nine numbers a block: thread, step, whether they are runs, start, end, how many, and its place on the sheet.
    directory: Vec<u64>,
    thread: u64,
    failure: Option<io::Error>,
}

impl Timeline {
    pub(super) fn new(sheet: Sheet, steps: Vec<u64>, first: usize, numbers: HashMap<u32, u32>, others: u32) -> Self {
        let shelf = Blocks {
            sheet,
            first,
            pieces: vec![Default::default(); steps.len()],
            full: None,
            directory: Vec::new(),
            thread: 0,
            failure: None,
            steps: steps.clone(),
        };
        Self { ladder: Ladder::new(steps), shelf, numbers, known: Vec::new(), others, threads: 0 }
    }

    fn put(&mut self, trace: &Trace, call: Piece) -> io::Result<()> {
        for function in &trace.functions[self.known.len()..] {
            self.known.push(self.numbers.get(&function.site).copied().unwrap_or(self.others));
        }
        let function = self.known[call.function as usize];
        self.ladder.call(Piece { function, ..call }, &mut self.shelf);
        self.shelf.failure.take().map_or(Ok(()), Err)
    }
}

impl Output for Timeline {
    fn thread(&mut self, _: &Trace, _: &Thread) -> io::Result<()> {
        self.shelf.thread = self.threads;
        self.threads += 1;
        Ok(())
    }

    fn leave(&mut self, trace: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.put(trace, piece(call.function, call.depth, call.start_ns, call.end_ns))
    }

    fn point(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.put(trace, piece(enter.function, enter.depth, enter.start_ns, enter.start_ns))
    }

    fn thread_end(&mut self, _: &Trace, _: &Thread) -> io::Result<()> {
        self.ladder.end(&mut self.shelf);
        self.shelf.failure.take().map_or(Ok(()), Err)
    }

    fn end(self, _: &Trace) -> io::Result<()> {
        self.shelf.sheet.end(&json!(self.shelf.directory))
    }
}

impl Blocks {
    fn put(&mut self, step: usize, kind: usize, piece: Piece) {
        if step >= self.first {
            let pieces = &mut self.pieces[step][kind];
            pieces.push(piece);
            if pieces.len() >= PIECES {
                self.full = Some(step);
            }
        }
    }

    fn write(&mut self, step: usize, kind: usize) -> io::Result<()> {
        let pieces = &mut self.pieces[step][kind];
        if pieces.is_empty() {
            return Ok(());
        }
        let is_run = kind == 1;
        let unit_bits = if is_run { self.steps[step].ilog2().saturating_sub(PRECISION_BITS) } else { 0 };
        let (bytes, extent) = block::encode(pieces, unit_bits, is_run);
        let place = self.sheet.put(&bytes)?;
        let [step, kind, pieces] = [step, kind, extent.pieces].map(|number| number as u64);
        self.directory.extend([self.thread, step, kind, extent.start_ns, extent.end_ns, pieces]);
        self.directory.extend([place.page, place.offset, place.len]);
        Ok(())
    }
}

impl Shelf for Blocks {
    fn call(&mut self, step: usize, call: Piece) {
        self.put(step, 0, call);
    }

    fn run(&mut self, step: usize, run: Piece) {
        self.put(step, 1, run);
    }

    fn full(&self) -> Option<usize> {
        self.full
    }

    fn close(&mut self, step: usize) {
        self.full = None;
        for kind in [0, 1] {
            let written = self.write(step, kind);
            self.failure = self.failure.take().or(written.err());
        }
    }
}
