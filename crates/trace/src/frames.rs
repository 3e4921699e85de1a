//! From events to calls: which frame an event opens, and which ones it ends.
//!
//! Owns [`Frames`], the open frames of one stream, which tells a [`Sink`] what happens to them. The analyses are sinks: [`Profile`](crate::Profile) and
//! whatever else wants to know of calls. Invariant: each enter, tail and point is told as one call, exactly once, and each frame that was opened is closed
//! exactly once, whatever the events are.

use trapline_abi::record::{DEPTH_BITS, Event};

use crate::{EventsChunk, TimedEvent};

const DEPTH_MASK: u32 = (1 << DEPTH_BITS) - 1;

/// How a frame ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Ending {
    /// The function returned.
    Returned,
    /// It was left by other ways: an exception, longjmp, the end of its thread while others go on.
    Unwound,
    /// It jumped to another function, which returns in its stead (a tail call).
    Jumped,
    /// It was still running at the end of the stream.
    Open,
    /// Records are missing: nobody knows when.
    Unknown,
}

/// A call whose end was not seen yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame<T> {
    /// The function's site.
    pub site: u32,
    /// When it was called.
    pub start_tsc: u64,
    /// How long the calls took that it made and that have ended.
    pub callees_ticks: u64,
    /// What the sink wants to keep.
    pub data: T,
}

impl<T> Frame<T> {
    /// How long the call took, if it ended at `tsc`. Never negative: contexts that interrupt each other have times a little out of order.
    pub fn ticks(&self, tsc: u64) -> u64 {
        // The counter may wrap, so the difference tells what was earlier.
        let ticks = tsc.wrapping_sub(self.start_tsc);
        if ticks > u64::MAX / 2 { 0 } else { ticks }
    }
}

/// Who is told of calls. Depths count known frames only, from 0.
pub trait Sink {
    /// What is kept with each frame.
    type Data;

    /// A function was called, and its frame is at `depth`.
    fn open(&mut self, depth: usize, site: u32, tsc: u64) -> Self::Data;

    /// The innermost frame, at `depth`, has ended.
    fn close(&mut self, depth: usize, frame: Frame<Self::Data>, tsc: u64, ending: Ending);

    /// A function was called whose return is not seen; `depth` frames are open.
    fn point(&mut self, depth: usize, site: u32, tsc: u64);
}

/// The open frames of a stream.
#[derive(Clone, Debug)]
pub struct Frames<T> {
    known: Vec<Frame<T>>,
    /// Frames below those that are known: opened before a fork, or before records were lost.
    unknown: u32,
    last_tsc: u64,
    has_begun: bool,
    unmatched: u64,
}

impl<T> Default for Frames<T> {
    fn default() -> Self {
        Self { known: Vec::new(), unknown: 0, last_tsc: 0, has_begun: false, unmatched: 0 }
    }
}

impl<T> Frames<T> {
    /// The open frames, the outermost first.
    pub fn known(&self) -> &[Frame<T>] {
        &self.known
    }

    /// Returns of frames that nobody knows.
    pub fn unmatched(&self) -> u64 {
        self.unmatched
    }

    /// Goes through a chunk, whose events have been decoded. A stream's chunks have to come in order.
    pub fn chunk<S: Sink<Data = T>>(&mut self, chunk: &EventsChunk, events: &[TimedEvent], sink: &mut S) {
        let is_torn_off = chunk.follows_gap || chunk.lost_before > 0 || !self.has_begun;
        if is_torn_off {
            // Frames may have ended and others of the same depth begun.
            while let Some(frame) = self.known.pop() {
                sink.close(self.known.len(), frame, self.last_tsc, Ending::Unknown);
            }
            self.unknown = chunk.depth & DEPTH_MASK;
        }
        self.has_begun = true;
        for event in events {
            self.event(*event, sink);
        }
        match events.last() {
            Some(last) => self.last_tsc = last.tsc,
            // It could not be decoded, so what follows begins anew.
            None => self.has_begun = false,
        }
    }

    /// The stream ends: what is open was not seen to end.
    pub fn finish<S: Sink<Data = T>>(&mut self, sink: &mut S) {
        let tsc = self.last_tsc;
        while !self.known.is_empty() {
            self.pop(tsc, Ending::Open, sink);
        }
    }

    #[inline]
    fn event<S: Sink<Data = T>>(&mut self, TimedEvent { tsc, event }: TimedEvent, sink: &mut S) {
        match event {
            Event::Enter { site } => self.push(site, tsc, sink),
            Event::Exit { depth } => match self.deeper_than(depth) {
                // The frame itself has to be there as well.
                Some(deeper) if deeper < self.depth() => {
                    for _ in 0..deeper {
                        self.pop(tsc, Ending::Unwound, sink);
                    }
                    self.pop(tsc, Ending::Returned, sink);
                }
                _ => self.unmatched += 1,
            },
            Event::Tail { site } => {
                if self.depth() == 0 {
                    sink.point(0, site, tsc);
                } else {
                    self.pop(tsc, Ending::Jumped, sink);
                    self.push(site, tsc, sink);
                }
            }
            Event::Point { site } => sink.point(self.known.len(), site, tsc),
            Event::Unwind { depth } => match self.deeper_than(depth) {
                Some(deeper) => {
                    for _ in 0..deeper {
                        self.pop(tsc, Ending::Unwound, sink);
                    }
                }
                None => self.unmatched += 1,
            },
        }
    }

    /// How many frames are open.
    fn depth(&self) -> usize {
        self.unknown as usize + self.known.len()
    }

    /// How many frames are deeper than this depth, which is told modulo 2^19; `None` if not even so many are open.
    #[inline]
    fn deeper_than(&self, depth: u32) -> Option<usize> {
        let own = self.depth();
        let deeper = own.wrapping_sub(depth as usize) & DEPTH_MASK as usize;
        (deeper <= own).then_some(deeper)
    }

    #[inline]
    fn push<S: Sink<Data = T>>(&mut self, site: u32, tsc: u64, sink: &mut S) {
        let data = sink.open(self.known.len(), site, tsc);
        self.known.push(Frame { site, start_tsc: tsc, callees_ticks: 0, data });
    }

    /// Ends the innermost frame.
    #[inline]
    fn pop<S: Sink<Data = T>>(&mut self, tsc: u64, ending: Ending, sink: &mut S) {
        let Some(frame) = self.known.pop() else {
            self.unknown = self.unknown.saturating_sub(1);
            return;
        };
        if let Some(caller) = self.known.last_mut() {
            caller.callees_ticks += frame.ticks(tsc);
        }
        sink.close(self.known.len(), frame, tsc, ending);
    }
}
