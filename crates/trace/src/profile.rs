//! How often each function was called, and how long that took: what `trapline report` shows.
//!
//! Owns [`profile`], which goes through a trace once, and its result, the [`Profile`]. While one batch of chunks is analysed, the next one is read and
//! decoded, on as many threads as there are; streams are dealt out to *lanes*, each of which counts for itself, and at the end the lanes are added
//! up. Invariant: memory does not grow with the trace, only with the numbers of functions and threads; calls are exactly the enters, tails and
//! points that are in the trace.

use std::{cell::RefCell, collections::HashMap, path::Path};

use rayon::prelude::*;

use crate::{
    BadChunk, Catalog, Damage, Decoder, Ending, Error, EventsChunk, Frame, Frames, Histogram, Reader, Sink, SiteIndex,
    TimedEvent,
};

/// Chunks in a batch: some milliseconds of work, some megabytes of memory.
const BATCH_CHUNKS: usize = 96;

/// Lanes that streams are dealt out to at most: each one has counts of its own for each function.
const MAX_LANES: usize = 8;

/// What a trace tells about its functions' calls. Times are in ticks of the time-stamp counter; [`Catalog::clock`] converts them.
#[derive(Debug)]
pub struct Profile {
    /// What is no event.
    pub catalog: Catalog,
    /// What is wrong with the file.
    pub damage: Damage,
    /// Functions that were called, in the order of their sites.
    pub functions: Vec<FunctionProfile>,
    /// Records that were read.
    pub records: u64,
    /// Records that were lost while recording, as their successors tell.
    pub lost_before: u64,
    /// Returns of frames that nobody knows: more than none means that something is missing, or wrong.
    pub unmatched: u64,
    /// From the first event to the last.
    pub first_tsc: u64,
    /// See there.
    pub last_tsc: u64,
}

/// The calls of one function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FunctionProfile {
    /// The function's site.
    pub site: u32,
    /// How often it was called.
    pub calls: u64,
    /// How many of the calls were not seen to end. Those that were still running at the end of their thread's events count as if they had ended then;
    /// those that were running when records were lost have no duration.
    pub open: u64,
    /// How many of the calls have a duration; points, and calls that were running when records were lost, have none.
    pub timed: u64,
    /// How long the function ran, with what it called. A call of itself does not count once more.
    pub total_ticks: u64,
    /// How long it ran without what it called.
    pub self_ticks: u64,
    /// All durations added up, those of calls of itself as well.
    pub sum_ticks: u64,
    /// The shortest one.
    pub min_ticks: u64,
    /// The longest one.
    pub max_ticks: u64,
    /// All of them.
    pub durations: Histogram,
}

impl FunctionProfile {
    fn new(site: u32) -> Self {
        Self {
            site,
            calls: 0,
            open: 0,
            timed: 0,
            total_ticks: 0,
            self_ticks: 0,
            sum_ticks: 0,
            min_ticks: u64::MAX,
            max_ticks: 0,
            durations: Histogram::default(),
        }
    }

    /// The mean duration; `None` if there is no duration.
    pub fn average_ticks(&self) -> Option<u64> {
        self.sum_ticks.checked_div(self.timed)
    }

    /// A percentile of the durations, never outside of what was seen; `None` if there is no duration.
    pub fn percentile_ticks(&self, per_mille: u64) -> Option<u64> {
        (self.timed > 0).then(|| self.durations.percentile(per_mille).clamp(self.min_ticks, self.max_ticks))
    }

    fn merge(&mut self, other: &Self) {
        self.calls += other.calls;
        self.open += other.open;
        self.timed += other.timed;
        self.total_ticks += other.total_ticks;
        self.self_ticks += other.self_ticks;
        self.sum_ticks += other.sum_ticks;
        self.min_ticks = self.min_ticks.min(other.min_ticks);
        self.max_ticks = self.max_ticks.max(other.max_ticks);
        self.durations.merge(&other.durations);
    }
}

/// Analyses a trace.
///
/// # Errors
/// Those of [`Reader::open`] and [`Reader::next_chunk`].
pub fn profile(path: &Path) -> Result<Profile, Error> {
    let mut reader = Reader::open(path)?;
    let mut catalog = Catalog::new();
    let mut lanes: Vec<Lane> = (0..rayon::current_num_threads().clamp(1, MAX_LANES)).map(|_| Lane::default()).collect();
    let mut batch = Batch::default();
    let mut next = Batch::default();
    batch.read(&mut reader, &mut catalog)?;
    while !batch.chunks.is_empty() {
        let ((), read) = rayon::join(|| analyse(&mut lanes, &batch), || next.read(&mut reader, &mut catalog));
        for _ in batch.decoded.iter().filter(|decoded| decoded.is_bad) {
            reader.report_senseless();
        }
        read?;
        std::mem::swap(&mut batch, &mut next);
    }
    Ok(summed(lanes, catalog, reader.damage().clone()))
}

/// Chunks that are decoded while their predecessors are analysed.
#[derive(Default)]
struct Batch {
    chunks: Vec<EventsChunk>,
    decoded: Vec<Decoded>,
}

#[derive(Default)]
struct Decoded {
    events: Vec<TimedEvent>,
    is_bad: bool,
}

impl Batch {
    fn read(&mut self, reader: &mut Reader, catalog: &mut Catalog) -> Result<(), Error> {
        thread_local! {
            static DECODER: RefCell<Decoder> = RefCell::new(Decoder::new());
        }
        self.chunks.clear();
        while self.chunks.len() < BATCH_CHUNKS {
            let Some(chunk) = reader.next_chunk()? else { break };
            self.chunks.extend(catalog.take(chunk));
        }
        self.decoded.resize_with(BATCH_CHUNKS, Decoded::default);
        self.decoded.truncate(self.chunks.len());
        self.chunks.par_iter().zip(&mut self.decoded).for_each(|(chunk, decoded)| {
            let result = DECODER.with_borrow_mut(|decoder| decoder.decode(chunk, &mut decoded.events));
            decoded.is_bad = result == Err(BadChunk);
        });
        Ok(())
    }
}

fn analyse(lanes: &mut [Lane], batch: &Batch) {
    let count = lanes.len();
    lanes.par_iter_mut().enumerate().for_each(|(index, lane)| {
        for (chunk, decoded) in batch.chunks.iter().zip(&batch.decoded) {
            if chunk.stream as usize % count == index {
                lane.chunk(chunk, &decoded.events);
            }
        }
    });
}

/// Some of the streams, and what their functions did.
#[derive(Default)]
struct Lane {
    streams: HashMap<u32, Frames<InFrame>>,
    counts: Counts,
    /// Whose frames [`Counts::active`] counts.
    current: Option<u32>,
    records: u64,
    lost_before: u64,
    span: Option<(u64, u64)>,
}

impl Lane {
    fn chunk(&mut self, chunk: &EventsChunk, events: &[TimedEvent]) {
        self.records += events.len() as u64;
        self.lost_before = self.lost_before.saturating_add(chunk.lost_before);
        let (first, last) = self.span.unwrap_or((chunk.first_tsc, chunk.last_tsc));
        self.span = Some((first.min(chunk.first_tsc), last.max(chunk.last_tsc)));
        let mut frames = self.switch(chunk.stream);
        frames.chunk(chunk, events, &mut self.counts);
        self.streams.insert(chunk.stream, frames);
    }

    /// Makes a stream the current one, and takes its frames out.
    fn switch(&mut self, stream: u32) -> Frames<InFrame> {
        if self.current != Some(stream) {
            let old = self.current.and_then(|current| self.streams.get(&current));
            for frame in old.iter().flat_map(|frames| frames.known()) {
                self.counts.tallies[frame.data.index as usize].active -= 1;
            }
            for frame in self.streams.get(&stream).iter().flat_map(|frames| frames.known()) {
                self.counts.tallies[frame.data.index as usize].active += 1;
            }
            self.current = Some(stream);
        }
        self.streams.remove(&stream).unwrap_or_default()
    }
}

/// What is kept with an open frame.
#[derive(Clone, Copy, Debug)]
struct InFrame {
    /// Of the function in [`Counts`].
    index: u32,
    /// The function had no other open frame in this stream.
    is_outermost: bool,
}

/// Functions that were called, in the order in which they were met.
#[derive(Default)]
struct Counts {
    index_of: SiteIndex,
    tallies: Vec<Tally>,
}

/// What a function did so far. A call is counted when its frame ends, as each frame does once.
struct Tally {
    profile: FunctionProfile,
    /// How many of the calls have no duration.
    untimed: u64,
    /// How many frames the current stream has open.
    active: u32,
}

impl Counts {
    #[inline]
    fn index(&mut self, site: u32) -> u32 {
        self.index_of.get(site).unwrap_or_else(|| self.new_index(site))
    }

    #[cold]
    fn new_index(&mut self, site: u32) -> u32 {
        self.tallies.push(Tally { profile: FunctionProfile::new(site), untimed: 0, active: 0 });
        self.index_of.add(site)
    }
}

impl Sink for Counts {
    type Data = InFrame;

    #[inline]
    fn open(&mut self, _: usize, site: u32, _: u64) -> InFrame {
        let index = self.index(site);
        let active = &mut self.tallies[index as usize].active;
        *active += 1;
        InFrame { index, is_outermost: *active == 1 }
    }

    #[inline]
    fn close(&mut self, _: usize, frame: Frame<InFrame>, tsc: u64, ending: Ending) {
        let InFrame { index, is_outermost } = frame.data;
        let Tally { profile, untimed, active } = &mut self.tallies[index as usize];
        *active -= 1;
        profile.calls += 1;
        if matches!(ending, Ending::Open | Ending::Unknown) {
            profile.open += 1;
            if ending == Ending::Unknown {
                *untimed += 1;
                return;
            }
        }
        let ticks = frame.ticks(tsc);
        profile.total_ticks += if is_outermost { ticks } else { 0 };
        profile.self_ticks += ticks.saturating_sub(frame.callees_ticks);
        profile.sum_ticks += ticks;
        profile.min_ticks = profile.min_ticks.min(ticks);
        profile.max_ticks = profile.max_ticks.max(ticks);
        profile.durations.add(ticks);
    }

    fn point(&mut self, _: usize, site: u32, _: u64) {
        let index = self.index(site);
        let Tally { profile, untimed, .. } = &mut self.tallies[index as usize];
        profile.calls += 1;
        *untimed += 1;
    }
}

/// Ends all streams, and adds the lanes up.
fn summed(lanes: Vec<Lane>, catalog: Catalog, damage: Damage) -> Profile {
    let mut profile = Profile {
        catalog,
        damage,
        functions: Vec::new(),
        records: 0,
        lost_before: 0,
        unmatched: 0,
        first_tsc: u64::MAX,
        last_tsc: 0,
    };
    let mut by_site: HashMap<u32, FunctionProfile> = HashMap::new();
    for mut lane in lanes {
        let streams: Vec<u32> = lane.streams.keys().copied().collect();
        for stream in streams {
            let mut frames = lane.switch(stream);
            frames.finish(&mut lane.counts);
            profile.unmatched += frames.unmatched();
        }
        profile.records += lane.records;
        profile.lost_before = profile.lost_before.saturating_add(lane.lost_before);
        if let Some((first, last)) = lane.span {
            profile.first_tsc = profile.first_tsc.min(first);
            profile.last_tsc = profile.last_tsc.max(last);
        }
        for Tally { profile: mut function, untimed, .. } in lane.counts.tallies {
            function.timed = function.calls - untimed;
            by_site.entry(function.site).or_insert_with(|| FunctionProfile::new(function.site)).merge(&function);
        }
    }
    profile.first_tsc = profile.first_tsc.min(profile.last_tsc);
    profile.functions = by_site.into_values().collect();
    profile.functions.sort_unstable_by_key(|function| function.site);
    profile
}
