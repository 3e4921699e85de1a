//! The recorder's side of counters: see [`trapline_abi::counters`].
//!
//! Owns [`Counters`], the memory that one process counts in, and [`Tally`], what was counted of one function, by whatever threads. Its neighbour is
//! [`figures`](crate::figures), which adds up. Invariants: what a thread has counted is added once; memory that nobody has written to is not read, as it would take memory then.

use std::{
    collections::HashMap,
    fs, io,
    mem::offset_of,
    ops::Range,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use trapline_abi::counters::{
    BUCKETS, COUNTERS_AT, CountedFrame, Counter, FRAMES, MAX_COUNTED_SITES, REGION_BYTES, REGIONS, RegionHeader,
    middle_of, region_offset,
};
use trapline_engine::Mode;

use crate::sys::{
    Tid,
    shared::{self, SharedMemory},
};

/// Words of a [`Counter`].
const WORDS: usize = size_of::<Counter>() / size_of::<u64>();

/// Where its buckets begin, of which two are a word.
const BUCKETS_AT: usize = offset_of!(Counter, durations) / size_of::<u64>();

/// What was counted of one function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Tally {
    /// Calls.
    pub(crate) calls: u64,
    /// Calls that have not ended.
    pub(crate) open: u64,
    /// Ticks of its calls, with what they called; not those of calls within a call of itself.
    pub(crate) total: u64,
    /// Ticks without what they called.
    pub(crate) own: u64,
    /// How many of the calls took how long.
    pub(crate) durations: [u64; BUCKETS],
}

impl Default for Tally {
    fn default() -> Self {
        Self { calls: 0, open: 0, total: 0, own: 0, durations: [0; BUCKETS] }
    }
}

impl Tally {
    /// Adds what another one has.
    pub(crate) fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.open += other.open;
        self.total += other.total;
        self.own += other.own;
        for (own, others) in self.durations.iter_mut().zip(&other.durations) {
            *own += others;
        }
    }

    /// The ticks that `per_mille` thousandths of the calls that have ended did not exceed; `None` if none has.
    pub(crate) fn percentile(&self, per_mille: u64) -> Option<u64> {
        let timed: u64 = self.durations.iter().sum();
        let rank = u128::from(timed) * u128::from(per_mille);
        let rank = u64::try_from(rank.div_ceil(1000)).unwrap_or(timed).max(1);
        let mut seen = 0;
        let bucket = self.durations.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(middle_of(bucket))
    }
}

/// What was counted, by the sites of the functions.
pub(crate) type Tallies = HashMap<u32, Tally>;

/// The memory that one process counts in.
#[derive(Debug)]
pub(crate) struct Counters {
    memory: SharedMemory,
}

/// What was seen of a counter, in which region and of which site, when it was looked at last.
pub(crate) type Seen = HashMap<(usize, u32), [u64; WORDS]>;

impl Counters {
    /// Those of a process of this width; `None` if it has no room for them: it has few addresses, or keeps memory from being paged out.
    pub(crate) fn of(tid: Tid, mode: Mode) -> io::Result<Option<Arc<Self>>> {
        let read = |name: &str| fs::read_to_string(format!("/proc/{tid}/{name}")).unwrap_or_default();
        let has_room = mode == Mode::Bits64 && has_room(&read("status"), &read("limits"));
        has_room.then(|| Self::new().map(Arc::new)).transpose()
    }

    /// All zero.
    #[cfg(target_pointer_width = "64")]
    pub(crate) fn new() -> io::Result<Self> {
        let counters =
            Self { memory: SharedMemory::new(c"trapline-counters", trapline_abi::counters::COUNTERS_BYTES)? };
        // Release: whoever finds it has the memory.
        counters.memory.counters_header().magic.store(trapline_abi::counters::COUNTERS_MAGIC, Ordering::Release);
        Ok(counters)
    }

    /// There is no room.
    #[cfg(target_pointer_width = "32")]
    pub(crate) fn new() -> io::Result<Self> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    /// Bytes to map.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.memory.len_bytes() as u64
    }

    /// The descriptor by which targets map it.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.memory.file().as_raw_fd()
    }

    /// Has these sites be recorded as well, while something is, and no others.
    pub(crate) fn select(&self, sites: &[u32]) {
        let selected = &self.memory.counters_header().selected;
        for word in selected {
            word.store(0, Ordering::Relaxed);
        }
        for site in sites {
            if let Some(word) = selected.get(*site as usize / 64) {
                word.fetch_or(1 << (site % 64), Ordering::Relaxed);
            }
        }
    }

    /// Calls of threads that had no region.
    pub(crate) fn uncounted(&self) -> u64 {
        self.memory.counters_header().uncounted.load(Ordering::Relaxed)
    }

    /// The regions that a thread has, as it sees itself, or any thread.
    pub(crate) fn regions(&self, of: Option<u32>) -> Vec<usize> {
        let owners = &self.memory.counters_header().owners;
        let is_it = |index: &usize| {
            let owner = owners[*index].load(Ordering::Relaxed);
            owner != 0 && of.is_none_or(|tid| tid == owner)
        };
        (0..REGIONS).filter(is_it).collect()
    }

    /// Adds to `tallies` what a region has counted since it was looked at last.
    pub(crate) fn add_new(&self, region: usize, seen: &mut Seen, tallies: &mut Tallies) {
        let start = region_offset(region) + COUNTERS_AT;
        let end = start + MAX_COUNTED_SITES as usize * size_of::<Counter>();
        for part in self.memory.written(start..end) {
            for at in part.step_by(size_of::<Counter>()) {
                let site = (at - start) / size_of::<Counter>();
                let Ok(site) = u32::try_from(site) else { continue };
                let words = self.memory.words(at, WORDS);
                // The durations first: a call that ends meanwhile is then not timed before it is counted.
                let mut now = [0; WORDS];
                for (now, word) in now.iter_mut().zip(words).rev() {
                    *now = word.load(Ordering::Acquire);
                }
                if now == [0; WORDS] {
                    continue;
                }
                let before = seen.entry((region, site)).or_insert([0; WORDS]);
                if *before != now {
                    tallies.entry(site).or_default().add_change(before, &now);
                    *before = now;
                }
            }
        }
    }

    /// Adds to `tallies` what the open calls of a region have taken so far, as if they ended now.
    pub(crate) fn add_open(&self, region: usize, tallies: &mut Tallies) {
        let start = region_offset(region);
        let depth = word(self.memory.words(start + offset_of!(RegionHeader, depth), 1), 0);
        let depth = usize::try_from(depth).unwrap_or(0).min(FRAMES - 1);
        let frame = |depth: usize| {
            let at = start + size_of::<RegionHeader>() + depth * size_of::<CountedFrame>();
            self.memory.words(at, size_of::<CountedFrame>() / size_of::<u64>())
        };
        let field = |frame: &[AtomicU64], offset: usize| word(frame, offset / size_of::<u64>());
        let (now, mut inner) = (shared::tsc(), 0);
        let mut outermost: HashMap<u32, u64> = HashMap::new();
        for depth in (0..=depth).rev() {
            let frame = frame(depth);
            if field(frame, offset_of!(CountedFrame, slot)) == 0 {
                continue;
            }
            let site = field(frame, offset_of!(CountedFrame, site));
            let Ok(site) = u32::try_from(site & u64::from(u32::MAX)) else { continue };
            let begun = field(frame, offset_of!(CountedFrame, start));
            let ticks = if begun == 0 { 0 } else { now.saturating_sub(begun) };
            let callees = field(frame, offset_of!(CountedFrame, callees)).saturating_add(inner);
            let tally = tallies.entry(site).or_default();
            tally.open += 1;
            tally.own += ticks.saturating_sub(callees);
            inner = ticks;
            // The next one further out, if there is one, has these in its own.
            outermost.insert(site, ticks);
        }
        for (site, ticks) in outermost {
            tallies.entry(site).or_default().total += ticks;
        }
    }

    /// Makes a region free, whose thread has ended and whose counts were added.
    pub(crate) fn free(&self, region: usize, seen: &mut Seen) -> io::Result<()> {
        seen.retain(|(of, _), _| *of != region);
        self.memory.clear(range_of(region))?;
        // Release: pairs with the Acquire of the thread that takes it, which then finds zeros.
        self.memory.counters_header().owners[region].store(0, Ordering::Release);
        Ok(())
    }
}

impl Tally {
    /// Adds what has come between two looks at a counter.
    fn add_change(&mut self, before: &[u64; WORDS], now: &[u64; WORDS]) {
        let grown = |offset: usize| {
            let at = offset / size_of::<u64>();
            now[at].wrapping_sub(before[at])
        };
        self.calls += grown(offset_of!(Counter, calls));
        self.total += grown(offset_of!(Counter, total));
        self.own += grown(offset_of!(Counter, own));
        for (at, (before, now)) in (0..).step_by(2).zip(before[BUCKETS_AT..].iter().zip(&now[BUCKETS_AT..])) {
            if before == now {
                continue;
            }
            for (bucket, shift) in [(at, 0), (at + 1, u32::BITS)] {
                let [before, now] = [before, now].map(|word| low(word >> shift));
                // Each wraps by itself, long after somebody has looked.
                self.durations[bucket] += u64::from(now.wrapping_sub(before));
            }
        }
    }
}

/// Whether nearly all memory of a process may be of no use to it, by its `status` and `limits`.
fn has_room(status: &str, limits: &str) -> bool {
    let after = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next().map(str::to_owned)
    };
    let is_locked = after(status, "VmLck:").is_some_and(|kib| kib != "0");
    let is_limited = after(limits, "Max address space").is_some_and(|bytes| bytes != "unlimited");
    !is_locked && !is_limited
}

fn word(words: &[AtomicU64], at: usize) -> u64 {
    words.get(at).map_or(0, |word| word.load(Ordering::Relaxed))
}

/// The lower half.
#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
fn low(word: u64) -> u32 {
    word as u32
}

/// Where a region lies.
fn range_of(region: usize) -> Range<usize> {
    region_offset(region)..region_offset(region) + REGION_BYTES
}

const _: () = assert!(BUCKETS_AT + BUCKETS / 2 == WORDS);

#[cfg(all(test, target_pointer_width = "64"))]
mod tests {
    use trapline_abi::counters::bucket_of;

    use super::*;

    /// Puts a counter's word where a thread would.
    fn count(counters: &Counters, (region, site): (usize, usize), offset: usize, value: u64) {
        let at = region_offset(region) + COUNTERS_AT + site * size_of::<Counter>() + offset;
        counters.memory.words(at, 1)[0].store(value, Ordering::Relaxed);
    }

    fn own(counters: &Counters, region: usize, tid: u32) {
        counters.memory.counters_header().owners[region].store(tid, Ordering::Relaxed);
    }

    #[test]
    fn what_a_thread_has_counted_is_added_once_and_its_region_is_zero_again() {
        let counters = Counters::new().unwrap();
        own(&counters, 3, 77);
        own(&counters, 4, 78);
        let (mut seen, mut tallies) = (Seen::new(), Tallies::new());
        for (region, site, calls) in [(3, 9, 5), (3, 200_000, 1), (4, 9, 7)] {
            count(&counters, (region, site), offset_of!(Counter, calls), calls);
        }
        for _ in 0..2 {
            for region in counters.regions(None) {
                counters.add_new(region, &mut seen, &mut tallies);
            }
            assert_eq!((tallies[&9].calls, tallies[&200_000].calls, tallies.len()), (12, 1, 2));
        }
        count(&counters, (3, 9), offset_of!(Counter, calls), 6);
        assert_eq!(counters.regions(Some(77)), [3]);
        counters.add_new(3, &mut seen, &mut tallies);
        assert_eq!(tallies[&9].calls, 13);
        counters.free(3, &mut seen).unwrap();
        assert_eq!(counters.regions(None), [4]);
        // Somebody else has it now.
        own(&counters, 3, 79);
        counters.add_new(3, &mut seen, &mut tallies);
        assert_eq!(tallies[&9].calls, 13);
        count(&counters, (3, 9), offset_of!(Counter, calls), 2);
        counters.add_new(3, &mut seen, &mut tallies);
        assert_eq!(tallies[&9].calls, 15);
    }

    #[test]
    fn processes_that_lock_memory_or_have_few_addresses_get_none() {
        let status = |kib: u32| format!("Name:\tx\nVmLck:\t{kib:>8} kB\n");
        let limits =
            |bytes: &str| format!("Max core file size  0  0\nMax address space         {bytes}  unlimited  bytes\n");
        assert!(has_room(&status(0), &limits("unlimited")));
        assert!(!has_room(&status(4), &limits("unlimited")));
        assert!(!has_room(&status(0), &limits("2048000000")));
        let own = fs::read_to_string("/proc/self/limits").unwrap();
        assert!(own.contains("\nMax address space "), "{own}");
    }

    #[test]
    fn durations_that_wrap_are_counted_on() {
        let counters = Counters::new().unwrap();
        let (mut seen, mut tallies) = (Seen::new(), Tallies::new());
        let [short, long] = [100, 1_000_000].map(bucket_of);
        let at = offset_of!(Counter, durations) + short / 2 * 8;
        let shift = u32::try_from(short % 2).unwrap() * u32::BITS;
        for count_now in [u64::from(u32::MAX), 4] {
            count(&counters, (0, 1), at, count_now << shift);
            counters.add_new(0, &mut seen, &mut tallies);
        }
        assert_eq!(tallies[&1].durations[short], u64::from(u32::MAX) + 5);
        tallies.get_mut(&1).unwrap().durations[long] = u64::from(u32::MAX);
        let percentiles = [500, 990].map(|per_mille| tallies[&1].percentile(per_mille).unwrap());
        assert_eq!(percentiles, [middle_of(short), middle_of(long)]);
        assert_eq!(Tally::default().percentile(990), None);
    }

    #[test]
    fn open_calls_count_as_if_they_ended_now_and_those_of_one_function_once() {
        let counters = Counters::new().unwrap();
        let now = shared::tsc();
        // Functions 1, 2, 1, each called by the one before.
        for (depth, site, ticks) in [(1, 1, 3_000_000_000), (2, 2, 2_000_000_000), (3, 1, 1_000_000_000)] {
            let at = region_offset(0) + size_of::<RegionHeader>() + depth * size_of::<CountedFrame>();
            let words = counters.memory.words(at, 4);
            for (word, value) in words.iter().zip([1 << 20, site, now - ticks, 0]) {
                word.store(value, Ordering::Relaxed);
            }
        }
        counters.memory.words(region_offset(0), 1)[0].store(3, Ordering::Relaxed);
        let mut tallies = Tallies::new();
        counters.add_open(0, &mut tallies);
        let near = |ticks: u64, wanted: u64| assert!(ticks >= wanted, "{ticks} of {wanted}");
        assert_eq!((tallies[&1].open, tallies[&2].open), (2, 1));
        near(tallies[&1].total, 3_000_000_000);
        near(tallies[&2].total, 2_000_000_000);
        let sum = tallies[&1].own + tallies[&2].own;
        assert_eq!(sum, tallies[&1].total, "each tick is one function's own");
    }
}
