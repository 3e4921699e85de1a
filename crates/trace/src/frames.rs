//! From events to calls: which frame an event opens, and which ones it ends.
//!
//! Owns [`Frames`], the open frames of one stream, which tells a [`Sink`] what happens to them. The analyses are sinks: [`Profile`](crate::Profile) and
//! whatever else wants to know of calls. Invariant: each enter, tail and point is told as one call, exactly once, and each frame that was opened is closed
//! exactly once, whatever the events are.
//!
//! A record that is missing (torn, when its thread was interrupted for good) shows when a function returns at a depth that is deeper than any frame that is
//! open. Then a frame that was opened since depths agreed the last time may be deeper than it seems, and the return ends the innermost one of these. A
//! frame that was open when depths agreed is where it seems to be, so it does not end.

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
    /// Frames whose depths are certain: so many were open at the last return whose depth was as expected, and still are.
    certain: usize,
    last_tsc: u64,
    has_begun: bool,
    unmatched: u64,
}

impl<T> Default for Frames<T> {
    fn default() -> Self {
        Self { known: Vec::new(), unknown: 0, certain: 0, last_tsc: 0, has_begun: false, unmatched: 0 }
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
        self.start(chunk, sink);
        self.events(events, sink);
    }

    /// Begins a chunk. Its events follow, at once or in parts. If it could not be decoded, none do, and the next chunk begins anew.
    pub fn start<S: Sink<Data = T>>(&mut self, chunk: &EventsChunk, sink: &mut S) {
        self.go_on(chunk.depth, chunk.follows_gap || chunk.lost_before > 0, sink);
    }

    /// Begins a part of the stream, as [`start`](Self::start) does with a chunk: `depth` frames are open, modulo 2^19. `is_torn_off` tells that events are missing between the last part and this
    /// one.
    pub fn go_on<S: Sink<Data = T>>(&mut self, depth: u32, is_torn_off: bool, sink: &mut S) {
        if is_torn_off || !self.has_begun {
            // Frames may have ended and others of the same depth begun.
            while let Some(frame) = self.known.pop() {
                sink.close(self.known.len(), frame, self.last_tsc, Ending::Unknown);
            }
            self.unknown = depth & DEPTH_MASK;
            self.certain = self.depth();
        }
        self.has_begun = false;
    }

    /// Goes through some events of the chunk that has begun.
    pub fn events<S: Sink<Data = T>>(&mut self, events: &[TimedEvent], sink: &mut S) {
        for event in events {
            self.event(*event, sink);
        }
        if let Some(last) = events.last() {
            (self.last_tsc, self.has_begun) = (last.tsc, true);
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
            Event::Exit { depth } if depth as usize == self.depth() & DEPTH_MASK as usize && self.depth() > 0 => {
                self.pop(tsc, Ending::Returned, sink);
                self.certain = self.depth();
            }
            _ => self.unusual(TimedEvent { tsc, event }, sink),
        }
    }

    /// Anything but a call and the return of the innermost frame.
    #[inline(never)]
    fn unusual<S: Sink<Data = T>>(&mut self, TimedEvent { tsc, event }: TimedEvent, sink: &mut S) {
        match event {
            Event::Enter { site } => self.push(site, tsc, sink),
            Event::Exit { depth } => match self.deeper_than(depth) {
                // The frame itself has to be there as well.
                Some(deeper) if deeper < self.depth() => {
                    self.unwind(deeper, tsc, sink);
                    self.pop(tsc, Ending::Returned, sink);
                    self.certain = self.depth();
                }
                None if self.depth() > self.certain => self.pop(tsc, Ending::Returned, sink),
                _ => self.unmatched += 1,
            },
            Event::Tail { site } => {
                if self.depth() == 0 {
                    sink.point(0, site, tsc);
                } else {
                    let certain = self.certain;
                    self.pop(tsc, Ending::Jumped, sink);
                    self.push(site, tsc, sink);
                    self.certain = certain;
                }
            }
            Event::Point { site } => sink.point(self.known.len(), site, tsc),
            Event::Unwind { depth } => match self.deeper_than(depth) {
                Some(deeper) => self.unwind(deeper, tsc, sink),
                None => self.unmatched += 1,
            },
        }
    }

    /// Ends some of the innermost frames, which were left without a return.
    fn unwind<S: Sink<Data = T>>(&mut self, frames: usize, tsc: u64, sink: &mut S) {
        for _ in 0..frames {
            self.pop(tsc, Ending::Unwound, sink);
        }
        self.certain = self.certain.min(self.depth());
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
    #[expect(clippy::inline_always, reason = "half of the time that a report takes")]
    #[inline(always)]
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
