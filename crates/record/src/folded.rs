//! Figures of processes that have no room for counters: 32-bit ones, and those with few addresses or locked memory. They record all calls. What becomes of the records is decided here, in the recorder.
//!
//! Owns [`Folded`], the open calls of one process, and what its functions have done since somebody looked. Its neighbours are [`figures`](crate::figures), which adds up, and the
//! [`drain`](crate::drain), which brings the records and writes those that are [selected](Selection). Invariants: each call is added once, when it begins, and its time when it
//! ends; a trace beside has the selected functions' calls only, at depths of their own.

use std::collections::HashMap;

use trapline_abi::{
    counters::bucket_of,
    record::{self, Event},
};
use trapline_trace::{Batch, Ending, Frame, Frames, Sink, SiteIndex, TimedEvent};

use crate::counters::{Tallies, Tally};

/// The functions that are recorded beside, if any are.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    /// How many times something was selected.
    times: u32,
    /// A bit for each site.
    sites: Vec<u64>,
}

impl Selection {
    /// From now on these are, and a new trace has begun.
    pub(crate) fn select(&mut self, sites: &[u32]) {
        self.times = self.times.wrapping_add(1);
        self.sites.clear();
        for site in sites {
            let (word, bit) = (*site as usize / 64, site % 64);
            if self.sites.len() <= word {
                self.sites.resize(word + 1, 0);
            }
            self.sites[word] |= 1 << bit;
        }
    }

    fn has(&self, site: u32) -> bool {
        self.sites.get(site as usize / 64).is_some_and(|word| word >> (site % 64) & 1 != 0)
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Folded {
    streams: HashMap<u32, Thread>,
    new: Functions,
    /// All records are here that are older.
    looked_tsc: u64,
}

/// What functions have done since somebody looked.
#[derive(Debug, Default)]
struct Functions {
    index_of: SiteIndex,
    tallies: Vec<(u32, Tally)>,
}

#[derive(Debug, Default)]
struct Thread {
    frames: Frames<Open>,
    /// For each function, how many of its calls are open.
    active: Vec<u32>,
    beside: Beside,
    events: Vec<TimedEvent>,
}

/// What is kept with an open call.
#[derive(Clone, Copy, Debug)]
struct Open {
    index: u32,
    /// The thread has no other open call of the function further out.
    is_outermost: bool,
    /// Which trace it is in, and at which depth, 0 if it is in none.
    trace: u32,
    depth: u32,
}

/// A thread's calls in the trace beside.
#[derive(Debug, Default)]
struct Beside {
    trace: u32,
    /// How many of its calls are open.
    depth: u32,
}

impl Folded {
    /// Adds the records of a thread. Those of `selection`'s functions go to `beside`, after what is there. Returns how many calls are open there before.
    pub(crate) fn add(&mut self, batch: &Batch<'_>, selection: &Selection, beside: &mut Vec<u64>) -> u32 {
        let Thread { frames, active, beside: own, events } = self.streams.entry(batch.stream).or_default();
        if own.trace != selection.times {
            *own = Beside { trace: selection.times, depth: 0 };
        }
        let mut tsc = batch.start.tsc;
        events.clear();
        events.extend(batch.records.iter().filter_map(|word| record::decode(*word)).map(|(event, low)| {
            tsc = record::full_tsc(low, tsc);
            TimedEvent { tsc, event }
        }));
        let mut sink = Sorting { functions: &mut self.new, active, selection, own, beside };
        frames.go_on(batch.start.depth, batch.lost_before > 0, &mut sink);
        let depth = sink.own.depth;
        frames.events(events, &mut sink);
        depth
    }

    /// All records were brought that are older than this.
    pub(crate) fn has_looked(&mut self, tsc: u64) {
        self.looked_tsc = tsc;
    }

    /// A thread has ended, now. Its open calls are no more, and their time counts.
    pub(crate) fn end(&mut self, stream: u32, now: u64) {
        let Some(thread) = self.streams.remove(&stream) else { return };
        for (frame, ticks, own) in thread.open(now) {
            let tally = &mut self.new.tallies[frame.data.index as usize].1;
            tally.own += own;
            tally.total += if frame.data.is_outermost { ticks } else { 0 };
        }
    }

    /// All threads have.
    pub(crate) fn end_all(&mut self, now: u64) {
        let streams: Vec<u32> = self.streams.keys().copied().collect();
        for stream in streams {
            self.end(stream, now);
        }
    }

    /// Threads that have called something, and have not ended.
    pub(crate) fn threads(&self) -> usize {
        self.streams.len()
    }

    /// Adds to `tallies` what has come since this was asked last.
    pub(crate) fn add_new(&mut self, tallies: &mut Tallies) {
        for (site, tally) in &mut self.new.tallies {
            if tally.calls > 0 || tally.total > 0 || tally.own > 0 || tally.durations.iter().any(|count| *count > 0) {
                tallies.entry(*site).or_default().add(tally);
                *tally = Tally::default();
            }
        }
    }

    /// Adds to `tallies` what the open calls had taken when [all records were here](Self::has_looked): what they go on to take comes later, and nothing is taken back.
    pub(crate) fn add_open(&self, tallies: &mut Tallies) {
        for (frame, ticks, own) in self.streams.values().flat_map(|thread| thread.open(self.looked_tsc)) {
            let tally = tallies.entry(frame.site).or_default();
            tally.open += 1;
            tally.own += own;
            tally.total += if frame.data.is_outermost { ticks } else { 0 };
        }
    }
}

impl Thread {
    /// The open calls, the innermost first: how long each has taken, and without what it called, if it ended now.
    fn open(&self, now: u64) -> impl Iterator<Item = (&Frame<Open>, u64, u64)> {
        let mut inner = 0;
        self.frames.known().iter().rev().map(move |frame| {
            let ticks = frame.ticks(now);
            let callees = frame.callees_ticks.saturating_add(inner);
            inner = ticks;
            (frame, ticks, ticks.saturating_sub(callees))
        })
    }
}

impl Functions {
    #[inline]
    fn index(&mut self, site: u32) -> u32 {
        self.index_of.get(site).unwrap_or_else(|| self.new_index(site))
    }

    #[cold]
    fn new_index(&mut self, site: u32) -> u32 {
        self.tallies.push((site, Tally::default()));
        self.index_of.add(site)
    }
}

/// Takes the calls of one thread.
struct Sorting<'a> {
    functions: &'a mut Functions,
    active: &'a mut Vec<u32>,
    selection: &'a Selection,
    own: &'a mut Beside,
    beside: &'a mut Vec<u64>,
}

impl Sink for Sorting<'_> {
    type Data = Open;

    #[inline]
    fn open(&mut self, _: usize, site: u32, tsc: u64) -> Open {
        let index = self.functions.index(site);
        self.functions.tallies[index as usize].1.calls += 1;
        if self.active.len() <= index as usize {
            self.active.resize(index as usize + 1, 0);
        }
        let active = &mut self.active[index as usize];
        *active += 1;
        let mut open = Open { index, is_outermost: *active == 1, trace: self.own.trace, depth: 0 };
        if self.selection.has(site) {
            self.own.depth += 1;
            open.depth = self.own.depth;
            self.beside.push(record::encode(Event::Enter { site }, tsc));
        }
        open
    }

    #[inline]
    fn close(&mut self, _: usize, frame: Frame<Open>, tsc: u64, ending: Ending) {
        let Open { index, is_outermost, trace, depth } = frame.data;
        self.active[index as usize] -= 1;
        let is_recorded = depth > 0 && trace == self.own.trace;
        if is_recorded {
            self.own.depth = depth - 1;
        }
        if ending == Ending::Unknown {
            return;
        }
        let tally = &mut self.functions.tallies[index as usize].1;
        let ticks = frame.ticks(tsc);
        tally.total += if is_outermost { ticks } else { 0 };
        tally.own += ticks.saturating_sub(frame.callees_ticks);
        if let Some(count) = tally.durations.get_mut(bucket_of(ticks)) {
            *count += 1;
        }
        if is_recorded {
            self.beside.push(record::encode(Event::Exit { depth }, tsc));
        }
    }

    fn point(&mut self, _: usize, site: u32, tsc: u64) {
        let index = self.functions.index(site);
        self.functions.tallies[index as usize].1.calls += 1;
        if self.selection.has(site) {
            self.beside.push(record::encode(Event::Point { site }, tsc));
        }
    }
}

#[cfg(test)]
mod tests {
    use trapline_trace::Position;

    use super::*;

    const ENTER: fn(u32) -> Event = |site| Event::Enter { site };
    const EXIT: fn(u32) -> Event = |depth| Event::Exit { depth };

    fn records(events: &[(Event, u64)]) -> Vec<u64> {
        events.iter().map(|(event, tsc)| record::encode(*event, *tsc)).collect()
    }

    fn batch(records: &[u64], lost_before: u64) -> Batch<'_> {
        Batch { stream: 7, start: Position { tsc: 1000, depth: 0 }, lost_before, records }
    }

    fn decoded(records: &[u64]) -> Vec<Event> {
        records.iter().map(|word| record::decode(*word).expect("a record").0).collect()
    }

    #[test]
    fn calls_are_added_when_they_begin_and_times_when_they_end_each_once() {
        let (mut folded, selection, mut tallies) = (Folded::default(), Selection::default(), Tallies::new());
        let first = records(&[(ENTER(1), 1000), (ENTER(1), 1100), (ENTER(2), 1200), (Event::Point { site: 3 }, 1250)]);
        folded.add(&batch(&first, 0), &selection, &mut Vec::new());
        folded.add_new(&mut tallies);
        assert_eq!([1, 2, 3].map(|site| tallies[&site].calls), [2, 1, 1]);
        assert_eq!((tallies[&1].total, folded.threads()), (0, 1));
        folded.has_looked(1280);
        let mut open = Tallies::new();
        folded.add_open(&mut open);
        assert_eq!((open[&1].open, open[&2].open, open.len()), (2, 1, 2));
        assert_eq!((open[&1].total, open[&1].own, open[&2].own), (280, 200, 80), "each tick is one function's own");
        let second = records(&[(EXIT(3), 1300), (EXIT(2), 1400), (EXIT(1), 2000)]);
        folded.add(&batch(&second, 0), &selection, &mut Vec::new());
        for _ in 0..2 {
            folded.add_new(&mut tallies);
            assert_eq!((tallies[&1].total, tallies[&1].own, tallies[&1].calls), (1000, 900, 2));
            assert_eq!((tallies[&2].total, tallies[&2].own), (100, 100));
            assert_eq!(tallies[&1].durations.iter().sum::<u64>(), 2);
        }
        // Who ends with a call leaves its time, and no duration.
        folded.add(&batch(&records(&[(ENTER(2), 3000), (ENTER(1), 3050)]), 0), &selection, &mut Vec::new());
        folded.end_all(3050);
        folded.add_new(&mut tallies);
        assert_eq!((tallies[&2].calls, tallies[&2].total, tallies[&2].durations.iter().sum::<u64>()), (2, 150, 1));
        assert_eq!(folded.threads(), 0);
    }

    #[test]
    fn a_trace_beside_has_what_is_selected_at_depths_of_its_own() {
        let (mut folded, mut selection, mut beside) = (Folded::default(), Selection::default(), Vec::new());
        folded.add(&batch(&records(&[(ENTER(1), 1000), (ENTER(2), 1001)]), 0), &selection, &mut beside);
        assert_eq!(beside, [0_u64; 0]);
        selection.select(&[2, 200]);
        let events = [(ENTER(2), 1002), (ENTER(1), 1003), (ENTER(200), 1004), (Event::Point { site: 2 }, 1005)];
        assert_eq!(folded.add(&batch(&records(&events), 0), &selection, &mut beside), 0);
        assert_eq!(decoded(&beside), [ENTER(2), ENTER(200), Event::Point { site: 2 }]);
        beside.clear();
        // What was open before the trace began is not in it, and neither is what another one has.
        let events: Vec<_> = (0..4).map(|index| (EXIT(5 - index), 1010 + u64::from(index))).collect();
        assert_eq!(folded.add(&batch(&records(&events), 0), &selection, &mut beside), 2);
        assert_eq!(decoded(&beside), [EXIT(2), EXIT(1)]);
        beside.clear();
        folded.add(&batch(&records(&[(ENTER(2), 1020)]), 0), &selection, &mut beside);
        selection.select(&[2]);
        beside.clear();
        folded.add(&batch(&records(&[(EXIT(2), 1021), (ENTER(2), 1022)]), 0), &selection, &mut beside);
        assert_eq!(decoded(&beside), [ENTER(2)]);
    }

    #[test]
    fn what_was_open_when_records_were_lost_has_no_time() {
        let (mut folded, mut selection, mut beside) = (Folded::default(), Selection::default(), Vec::new());
        selection.select(&[1]);
        folded.add(&batch(&records(&[(ENTER(1), 1000)]), 0), &selection, &mut beside);
        beside.clear();
        let after = records(&[(ENTER(1), 9000), (EXIT(1), 9010)]);
        assert_eq!(folded.add(&batch(&after, 3), &selection, &mut beside), 0, "a reader ends what was open as well");
        assert_eq!(decoded(&beside), [ENTER(1), EXIT(1)]);
        let mut tallies = Tallies::new();
        folded.add_new(&mut tallies);
        assert_eq!((tallies[&1].calls, tallies[&1].total), (2, 10));
    }
}
