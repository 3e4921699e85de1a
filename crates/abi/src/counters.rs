//! The shared memory that functions are counted in: for each thread a *region*, which it alone writes.
//!
//! ```text
//! CountersHeader, padded to HEADER_BYTES
//! REGIONS of these:
//!     RegionHeader
//!     CountedFrame x 2^DEPTH_BITS: the open calls, by their depths
//!     from COUNTERS_AT on, Counter x MAX_COUNTED_SITES: by the sites' ids
//! ```
//!
//! Nearly all of that is never touched, and takes no memory. A thread changes each word by one instruction, which no other thread's memory is needed for and a signal
//! handler comes before or after: so nothing is locked, and nothing is lost. The recorder reads while threads write, and sees each word as it was at some moment.
//!
//! Calls are counted when they begin, durations when they end. A *frame* knows its slot, so that a return that finds another one there is known for what it is: the end
//! of a call that was not seen to begin, or whose place was taken by another stack's (coroutines), which then has no duration.
//!
//! Invariants: only the thread that took a region writes it; only the recorder makes it free again, when the thread has ended, and it is all zero then.

use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::record::DEPTH_BITS;

/// First word of the memory.
pub const COUNTERS_MAGIC: u64 = u64::from_le_bytes(*b"traptops");

/// Threads that can be counted at once.
pub const REGIONS: usize = 512;

/// Sites with larger ids cannot be counted.
pub const MAX_COUNTED_SITES: u32 = 1 << 18;

/// Room for the [`CountersHeader`].
pub const HEADER_BYTES: usize = 9 << 12;

/// How often something can be recorded beside, by [`Config::recorded`](crate::agent::Config::recorded). Then it begins with 1 again.
pub const MAX_RECORDED: u64 = (1 << (u32::BITS - DEPTH_BITS)) - 1;

/// Buckets of a counter's histogram.
pub const BUCKETS: usize = 240;

/// How many ticks fall together, as a shift: less is not to be told from the noise of the counter.
pub const TICKS_SHIFT: u32 = 3;

/// 2^this are the buckets of each power of two.
pub const OCTAVE_SHIFT: u32 = 3;

/// The start of the memory.
#[repr(C)]
#[derive(Debug)]
pub struct CountersHeader {
    /// [`COUNTERS_MAGIC`].
    pub magic: AtomicU64,
    /// Calls of threads that found no region, or may not read the time-stamp counter.
    pub uncounted: AtomicU64,
    /// For each region, the thread that has it, as it sees itself; 0 for nobody.
    pub owners: [AtomicU32; REGIONS],
    /// A bit for each site: whether it is to be recorded as well.
    pub selected: [AtomicU64; MAX_COUNTED_SITES as usize / 64],
}

/// The start of a region.
#[repr(C)]
#[derive(Debug)]
pub struct RegionHeader {
    /// The depth of the innermost frame.
    pub depth: AtomicU64,
    /// What is recorded as well: how many such frames are open, and above [`DEPTH_BITS`] bits which time it is.
    pub recorded: AtomicU64,
    /// Nobody's.
    pub unused: AtomicU64,
    /// What ended outside of all frames took: as if it were a frame's.
    pub callees: AtomicU64,
}

/// A call that has not ended.
#[repr(C)]
#[derive(Debug)]
pub struct CountedFrame {
    /// Where its return address is; 0 if there is no open call of this depth. Written after the site, and before the start.
    pub slot: AtomicU64,
    /// Which function, in the lower half. In the upper one, 0 if the call is not recorded: otherwise what [`RegionHeader::recorded`] was when it was.
    pub site: AtomicU64,
    /// The time-stamp counter when it began; 0 for the moment until that is known.
    pub start: AtomicU64,
    /// Ticks that the calls took that it made and that have ended.
    pub callees: AtomicU64,
}

/// What a function did in one thread.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Counter {
    /// How often it was called.
    pub calls: AtomicU64,
    /// The address of the [`CountedFrame`] of its outermost open call, if that frame still is one: otherwise whatever was there before.
    pub outermost: AtomicU64,
    /// Ticks of its calls that have ended, with what they called; not those of calls within a call of itself.
    pub total: AtomicU64,
    /// Ticks without what they called.
    pub own: AtomicU64,
    /// Ticks of all of them.
    pub sum: AtomicU64,
    /// Nobody's.
    pub unused: [AtomicU64; 3],
    /// How many of the calls took how long, by [`bucket_of`]; each wraps.
    pub durations: [AtomicU32; BUCKETS],
}

/// Frames of a region.
pub const FRAMES: usize = 1 << DEPTH_BITS;

/// Where a region's counters are.
pub const COUNTERS_AT: usize = (size_of::<RegionHeader>() + FRAMES * size_of::<CountedFrame>()).next_multiple_of(4096);

/// Bytes of a region.
pub const REGION_BYTES: usize = COUNTERS_AT + MAX_COUNTED_SITES as usize * size_of::<Counter>();

/// Bytes of the memory.
#[cfg(target_pointer_width = "64")]
pub const COUNTERS_BYTES: usize = region_offset(REGIONS);

/// Where a region begins.
pub const fn region_offset(index: usize) -> usize {
    HEADER_BYTES + index * REGION_BYTES
}

/// The bucket that a duration falls into.
#[expect(clippy::cast_possible_truncation, reason = "no more than there are buckets")]
pub const fn bucket_of(ticks: u64) -> usize {
    let value = ticks >> TICKS_SHIFT;
    let shift = (value | 1 << OCTAVE_SHIFT).ilog2() - OCTAVE_SHIFT;
    let bucket = ((shift as u64) << OCTAVE_SHIFT) + (value >> shift);
    if bucket < BUCKETS as u64 { bucket as usize } else { BUCKETS - 1 }
}

/// The duration in the middle of a bucket: wrong by four ticks, or a sixteenth, at most, but for the last one, which holds all that is longer.
pub const fn middle_of(bucket: usize) -> u64 {
    const PER_OCTAVE: u64 = 1 << OCTAVE_SHIFT;
    let bucket = bucket as u64;
    let (value, width) = if bucket < 2 * PER_OCTAVE {
        (bucket, 1)
    } else {
        let shift = bucket / PER_OCTAVE - 1;
        ((PER_OCTAVE + bucket % PER_OCTAVE) << shift, 1 << shift)
    };
    (value << TICKS_SHIFT) + ((width << TICKS_SHIFT) >> 1)
}

const _: () = assert!(size_of::<CountersHeader>() <= HEADER_BYTES);
const _: () = assert!(size_of::<CountedFrame>() == 32 && size_of::<RegionHeader>() == size_of::<CountedFrame>());
const _: () = assert!(size_of::<Counter>() == 1024);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_a_bucket_is_near_all_that_falls_into_it() {
        let mut ticks = 0_u64;
        while bucket_of(ticks) < BUCKETS - 1 {
            let middle = middle_of(bucket_of(ticks));
            assert!(middle.abs_diff(ticks) <= (ticks / 16).max(4), "{ticks}: {middle}");
            assert_eq!(bucket_of(middle), bucket_of(ticks), "{ticks}");
            ticks += ticks / 100 + 1;
        }
        assert!(ticks > 12_000_000_000, "some seconds, and not {ticks} ticks");
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn buckets_follow_each_other_without_a_hole() {
        let mut last = 0;
        for ticks in 0..1_000_000 {
            let bucket = bucket_of(ticks);
            assert!(bucket == last || bucket == last + 1, "{ticks}");
            last = bucket;
        }
    }
}
