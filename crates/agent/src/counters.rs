//! Counts calls in place, where their entries' few instructions do not suffice.
//!
//! Owns what those in `arch` call: the thread's region is taken, frames are ended that were left without a return, and what is selected is recorded as well. The layout is
//! [`trapline_abi::counters`]'s. Signal handlers may come between any two instructions here, and do the same. Invariant: each call is counted in its thread's region, or in
//! `uncounted`; each frame that ends gives its time to one counter, once.

use core::sync::atomic::Ordering;

use trapline_abi::{
    counters::{
        COUNTERS_AT, CountedFrame, Counter, CountersHeader, MAX_COUNTED_SITES, REGIONS, RegionHeader, bucket_of,
        region_offset,
    },
    record::{DEPTH_BITS, Event},
};

use crate::{arch, events, shadow::frame, thread::State};

const DEPTH_MASK: usize = (1 << DEPTH_BITS) - 1;

/// A region of the calling thread.
#[derive(Clone, Copy, Debug)]
struct Region(usize);

/// Whether calls are counted, and not recorded.
pub(crate) fn is_counting() -> bool {
    arch::config_counters().load(Ordering::Relaxed) != 0
}

/// Takes a region for the calling thread. Returns where it is, or 0 if the call that is to be counted cannot be.
#[unsafe(no_mangle)]
extern "C" fn trapline_take_region(_: usize) -> usize {
    let counters = arch::config_counters().load(Ordering::Relaxed);
    if counters == 0 {
        return 0;
    }
    // SAFETY: the recorder has mapped the counters there before it wrote the address, and they stay mapped; all of the header's fields are atomics.
    let header = unsafe { &*(counters as *const CountersHeader) };
    let thread = State::of_this_thread();
    let taken = if thread.is_timeless() { None } else { take(counters, header, thread) };
    taken.unwrap_or_else(|| {
        header.uncounted.fetch_add(1, Ordering::Relaxed);
        0
    })
}

fn take(counters: usize, header: &CountersHeader, thread: &State) -> Option<usize> {
    let (_, tid) = thread.ids()?;
    // Acquire: pairs with the recorder's Release when it frees a region: it is zero.
    let is_taken =
        |index: &usize| header.owners[*index].compare_exchange(0, tid, Ordering::Acquire, Ordering::Relaxed).is_ok();
    let index = (0..REGIONS).find(is_taken)?;
    let region = counters + region_offset(index);
    match thread.region.compare_exchange(0, region, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => Some(region),
        // A handler was faster. Nothing was counted in ours.
        Err(other) => {
            header.owners[index].store(0, Ordering::Release);
            Some(other)
        }
    }
}

/// The frame of this depth is about to return, or to be taken over: those that are deeper were left without a return. Returns nothing of interest.
#[unsafe(no_mangle)]
extern "C" fn trapline_end_deeper(depth: usize) -> usize {
    end_deeper(u32::try_from(depth).unwrap_or(0));
    0
}

/// Ends the frames of the calling thread that are deeper than this.
pub(crate) fn end_deeper(depth: u32) {
    let thread = State::of_this_thread();
    let Some(region) = Region::of(thread) else { return };
    let top = frame::depth(thread.top.load(Ordering::Relaxed));
    let now = arch::tsc();
    for deeper in (depth.saturating_add(1)..=top).rev() {
        region.end(region.frame(deeper as usize), now);
    }
    region.header().depth.store(depth.into(), Ordering::Relaxed);
}

/// Ends what was left in the place of a frame that is about to be opened.
#[unsafe(no_mangle)]
extern "C" fn trapline_end_stale(frame: usize) -> usize {
    if let Some(region) = Region::of(State::of_this_thread()) {
        // SAFETY: the entry has computed it as that of a frame of the thread's region.
        region.end(unsafe { &*(frame as *const CountedFrame) }, arch::tsc());
    }
    0
}

/// A frame was opened while something is recorded. Returns nothing of interest.
#[unsafe(no_mangle)]
extern "C" fn trapline_record_begin(frame: usize) -> usize {
    // SAFETY: the entry has computed it as that of a frame of the thread's region.
    let frame = unsafe { &*(frame as *const CountedFrame) };
    let site = low(frame.site.load(Ordering::Relaxed));
    if let (true, Some(region)) = (is_selected(site), Region::of(State::of_this_thread())) {
        // A handler that comes between these leaves the count as it was.
        let recorded = region.recorded() + 1;
        region.header().recorded.store(recorded, Ordering::Relaxed);
        frame.site.store(u64::from(site) | recorded << u32::BITS, Ordering::Relaxed);
        events::record(Event::Enter { site });
    }
    0
}

/// A frame was closed that has been recorded. Returns nothing of interest.
#[unsafe(no_mangle)]
extern "C" fn trapline_record_end(frame: usize) -> usize {
    if let Some(region) = Region::of(State::of_this_thread()) {
        // SAFETY: as above.
        region.record_end(unsafe { &*(frame as *const CountedFrame) });
    }
    0
}

/// A call whose return is not seen, while something is recorded. Returns nothing of interest.
#[unsafe(no_mangle)]
extern "C" fn trapline_record_point(site: usize) -> usize {
    let site = low(site as u64);
    if is_selected(site) {
        events::record(Event::Point { site });
    }
    0
}

/// How many frames are open that are recorded beside being counted.
pub(crate) fn recorded_frames(thread: &State) -> u32 {
    Region::of(thread).map_or(0, |region| low(region.recorded() & DEPTH_MASK as u64))
}

fn is_selected(site: u32) -> bool {
    let counters = arch::config_counters().load(Ordering::Relaxed);
    if counters == 0 {
        return false;
    }
    // SAFETY: as in `trapline_take_region`.
    let header = unsafe { &*(counters as *const CountersHeader) };
    let word = header.selected.get(site as usize / 64);
    word.is_some_and(|word| word.load(Ordering::Relaxed) >> (site % 64) & 1 != 0)
}

/// The lower half.
#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
fn low(word: u64) -> u32 {
    word as u32
}

impl Region {
    fn of(thread: &State) -> Option<Self> {
        let at = thread.region.load(Ordering::Relaxed);
        (at != 0).then_some(Self(at))
    }

    fn header(self) -> &'static RegionHeader {
        // SAFETY: (1) a region that this thread has taken, which stays mapped; (2) made of atomics.
        unsafe { &*(self.0 as *const RegionHeader) }
    }

    fn frame(self, depth: usize) -> &'static CountedFrame {
        let at = self.0 + size_of::<RegionHeader>() + (depth & DEPTH_MASK) * size_of::<CountedFrame>();
        // SAFETY: (1) as in `header`: there are as many frames as depths; (2) made of atomics.
        unsafe { &*(at as *const CountedFrame) }
    }

    fn counter(self, site: u64) -> Option<&'static Counter> {
        if site >= u64::from(MAX_COUNTED_SITES) {
            return None;
        }
        let at = self.0 + COUNTERS_AT + usize::try_from(site).ok()? * size_of::<Counter>();
        // SAFETY: (1) as in `header`: there are as many counters as sites; (2) made of atomics.
        Some(unsafe { &*(at as *const Counter) })
    }

    /// How many frames are open that are recorded, and above that which time it is.
    fn recorded(self) -> u64 {
        let time = (arch::config_recorded().load(Ordering::Relaxed) as u64) << DEPTH_BITS;
        let recorded = self.header().recorded.load(Ordering::Relaxed);
        // Those of another time are not in this trace.
        if recorded >> DEPTH_BITS == time >> DEPTH_BITS { recorded } else { time }
    }

    /// Records that a frame has ended, if it is in this trace.
    fn record_end(self, frame: &CountedFrame) {
        let recorded = frame.site.load(Ordering::Relaxed) >> u32::BITS;
        if recorded != 0 && recorded >> DEPTH_BITS == arch::config_recorded().load(Ordering::Relaxed) as u64 {
            self.header().recorded.store(recorded - 1, Ordering::Relaxed);
            events::record(Event::Exit { depth: low(recorded) & low(DEPTH_MASK as u64) });
        }
    }

    /// As the return code does it.
    fn end(self, frame: &CountedFrame, now: u64) {
        // A handler that comes here ends it before or after us: whose exchange it was counts it.
        if frame.slot.swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        let Some(counter) = self.counter(low(frame.site.load(Ordering::Relaxed)).into()) else { return };
        let start = frame.start.load(Ordering::Relaxed);
        let ticks = if start == 0 { 0 } else { now.saturating_sub(start) };
        let at = (&raw const *frame) as usize;
        let outer = (at - size_of::<CountedFrame>()) as *const CountedFrame;
        // SAFETY: in front of each frame there is another one, or the region's header, which has the same size and callees in the same place.
        let outer = unsafe { &*outer };
        outer.callees.fetch_add(ticks, Ordering::Relaxed);
        if counter.outermost.load(Ordering::Relaxed) == at as u64 {
            counter.total.fetch_add(ticks, Ordering::Relaxed);
            counter.outermost.store(0, Ordering::Relaxed);
        }
        counter.sum.fetch_add(ticks, Ordering::Relaxed);
        counter.own.fetch_add(ticks.saturating_sub(frame.callees.load(Ordering::Relaxed)), Ordering::Relaxed);
        if let Some(bucket) = counter.durations.get(bucket_of(ticks)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.record_end(frame);
    }
}

const _: () = assert!(core::mem::offset_of!(RegionHeader, callees) == core::mem::offset_of!(CountedFrame, callees));
