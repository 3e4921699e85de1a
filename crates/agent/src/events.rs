//! Puts records into chunks, and takes the next chunk when one is full.
//!
//! Owns `Pool`, the agent's side of [`trapline_abi::pool`], and `trapline_record`, which the entries call when their record finds no place. Signal handlers
//! may come between any two instructions here, and do the same; they may leave by longjmp. There is no system call to keep them away, which a
//! sandbox might forbid. What changes hands is one double word, the thread's position and the count of its chunks, by one instruction that fails if a
//! handler was faster:
//!
//! 1. If a handler has taken a chunk meanwhile, the record goes there.
//! 2. A chunk that is full is given up: the position becomes that of no chunk; whose exchange it was makes the chunk full and tells the recorder.
//! 3. A free chunk is taken. If there is none: wait (`OnFull::Block`), count and go on without (`Drop`), or take the oldest full one
//!    (`Overwrite`).
//! 4. Its header is written, and then the position leads to it; whose exchange fails gives his chunk back.
//! 5. The chunk becomes active, and the record goes to its first place.
//!
//! Who is left in the middle by longjmp leaves at most one chunk, taken or to be made full: the recorder finds it by its thread.
//! Invariant: each record is in a chunk, or counted in `lost_full` or `lost_overwritten`, unless nobody drains any more.

use core::sync::atomic::{AtomicU64, Ordering};

use trapline_abi::{
    pool::{
        CHUNK_BYTES, ChunkHeader, OnFull, POOL_HEADER_BYTES, PoolHeader, chunk_at, is_place, records_offset, state,
    },
    record::{self, Event, TSC_BITS},
};

use crate::{arch, counters, shadow::frame, sys, thread::State};

/// A pool that somebody drains.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pool(&'static PoolHeader);

/// How long a thread sleeps before it looks whether the recorder lives.
const SLICE_NS: u32 = 100_000_000;

/// Slices without a sign of life before the recorder's process is looked for.
const QUIET_SLICES: u32 = 10;

/// Slices without a sign of life before the recorder is given up even if there is a process of its number.
const DEAD_SLICES: u32 = 600;

/// Slices in which every chunk belonged to a thread, and none to the recorder, before records are given up: nobody would ever free one.
const STARVED_SLICES: u32 = 10;

/// A free word of a chunk.
const RECORD_BYTES: usize = size_of::<u64>();

/// Writes an event of the agent's own.
pub(crate) fn record(event: Event) {
    record_upper(record::encode(event, 0) >> TSC_BITS);
}

/// An entry's record found no place: `upper` is its kind and payload.
#[unsafe(no_mangle)]
extern "C" fn trapline_record(upper: usize) {
    record_upper(upper as u64 & u64::from(u32::MAX));
}

fn record_upper(upper: u64) {
    let Some(pool) = Pool::current() else { return };
    let thread = State::of_this_thread();
    let place = loop {
        if let Some(place) = thread.reserve() {
            break Some(place);
        }
        match pool.next_chunk(thread, upper) {
            Next::Place(place) => break Some(place),
            Next::LookAgain => {}
            Next::None => break None,
        }
    };
    if let Some(place) = place {
        let record = upper << TSC_BITS | pool.now(thread) & ((1 << TSC_BITS) - 1);
        // SAFETY: (1) the place lies in a chunk that this thread has taken, in the pool, which stays mapped; (2) it is aligned to 8 bytes.
        let word = unsafe { &*(place as *const AtomicU64) };
        // Release: pairs with the drain's Acquire.
        word.store(record, Ordering::Release);
    } else {
        pool.0.lost_full.fetch_add(u64::from(pool.is_open()), Ordering::Relaxed);
        thread.lost.fetch_add(1, Ordering::Relaxed);
    }
}

/// What came of the attempt to take a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    /// A record's place.
    Place(usize),
    /// One step is done, by us or by a signal handler.
    LookAgain,
    /// This record is to be left out.
    None,
}

/// How many frames were open before the record that is to be written.
fn open_frames(thread: &State, upper: u64) -> u32 {
    let top = if counters::is_counting() {
        counters::recorded_frames(thread)
    } else {
        frame::depth(thread.top.load(Ordering::Relaxed))
    };
    match record::decode(upper << TSC_BITS) {
        // The entry has made its frame the innermost already.
        Some((Event::Enter { .. }, _)) => top.saturating_sub(1),
        // The trampoline has left it.
        Some((Event::Exit { depth }, _)) => depth,
        _ => top,
    }
}

/// Whether the recorder lives, as far as one can see.
#[derive(Debug)]
pub(crate) struct Watch {
    heartbeat: u64,
    quiet_slices: u32,
}

impl Watch {
    pub(crate) fn new(pool: Pool) -> Self {
        Self { heartbeat: pool.0.heartbeat.load(Ordering::Relaxed), quiet_slices: 0 }
    }

    /// To be called once a slice. Closes the pool if the recorder is gone. Its number may mean nothing in our namespace, or another process.
    pub(crate) fn look(&mut self, pool: Pool) {
        let heartbeat = pool.0.heartbeat.load(Ordering::Relaxed);
        if heartbeat != self.heartbeat {
            *self = Self { heartbeat, quiet_slices: 0 };
            return;
        }
        self.quiet_slices += 1;
        let is_quiet = self.quiet_slices >= QUIET_SLICES;
        if self.quiet_slices >= DEAD_SLICES || is_quiet && sys::is_gone(pool.0.recorder.load(Ordering::Relaxed)) {
            pool.close();
        }
    }
}

impl Pool {
    /// The pool of this process, unless there is none or nobody drains it.
    pub(crate) fn current() -> Option<Self> {
        let address = arch::config_pool().load(Ordering::Relaxed);
        if address == 0 {
            return None;
        }
        // SAFETY: the recorder has mapped a pool there before it wrote the address, and it stays mapped; all of the header's fields are atomics.
        let pool = Self(unsafe { &*(address as *const PoolHeader) });
        pool.is_open().then_some(pool)
    }

    pub(crate) fn header(self) -> &'static PoolHeader {
        self.0
    }

    pub(crate) fn is_open(self) -> bool {
        self.0.closed.load(Ordering::Relaxed) == 0
    }

    /// Nobody drains any more; every thread that waits goes on.
    fn close(self) {
        self.0.closed.store(1, Ordering::SeqCst);
        sys::futex_wake_all(&self.0.freed);
        sys::futex_wake_all(&self.0.answered);
    }

    /// Has the recorder look.
    pub(crate) fn ring(self) {
        // SeqCst: one order with the recorder's word that it sleeps and its last look at the doorbell.
        self.0.doorbell.fetch_add(1, Ordering::SeqCst);
        if self.0.recorder_sleeps.load(Ordering::SeqCst) != 0 {
            sys::futex_wake_all(&self.0.doorbell);
        }
    }

    /// The time-stamp counter; what the recorder saw last if the thread may not read it.
    fn now(self, thread: &State) -> u64 {
        if thread.is_timeless() { self.0.now_tsc.load(Ordering::Relaxed) } else { arch::tsc() }
    }

    fn chunk_count(self) -> u32 {
        self.0.chunk_count.load(Ordering::Relaxed)
    }

    /// The header of a chunk; `None` if there is no such chunk.
    fn chunk(self, index: u32) -> Option<&'static ChunkHeader> {
        if index >= self.chunk_count() {
            return None;
        }
        let address = self.address() + POOL_HEADER_BYTES + index as usize * size_of::<ChunkHeader>();
        // SAFETY: (1) the pool has as many headers there; (2) all of their fields are atomics.
        Some(unsafe { &*(address as *const ChunkHeader) })
    }

    fn address(self) -> usize {
        (&raw const *self.0) as usize
    }

    /// The address of a chunk's first record.
    fn records_at(self, index: u32) -> usize {
        self.address() + records_offset(self.chunk_count() as usize, index as usize)
    }

    /// Gives up the thread's chunk, or takes another one.
    fn next_chunk(self, thread: &State, upper: u64) -> Next {
        let place = thread.place();
        if is_place(place.0 as u64) {
            return Next::LookAgain;
        }
        let old = chunk_at(self.address() as u64, self.chunk_count() as usize, place.0 as u64);
        if let Some(chunk) = old.and_then(|index| self.chunk(u32::try_from(index).ok()?)) {
            // If the exchange succeeds, this is the word of the time when the chunk was this thread's.
            let word = chunk.state.load(Ordering::Relaxed);
            if thread.exchange_place(place, (0, place.1)) {
                self.fill(chunk, word);
            }
            return Next::LookAgain;
        }
        let Some((pid, tid)) = thread.ids() else { return Next::None };
        let Some((index, word)) = self.take(thread, tid) else { return Next::None };
        let Some(chunk) = self.chunk(index) else { return Next::None };
        let lost = thread.lost.swap(0, Ordering::Relaxed);
        chunk.pid.store(pid, Ordering::Relaxed);
        chunk.tid.store(tid, Ordering::Relaxed);
        chunk.has_hole.store(0, Ordering::Relaxed);
        chunk.sequence.store(low(place.1), Ordering::Relaxed);
        chunk.depth.store(open_frames(thread, upper), Ordering::Relaxed);
        chunk.opened_tsc.store(self.now(thread), Ordering::Relaxed);
        // Release: what is above is there for who sees a record.
        chunk.lost_before.store(lost as u64, Ordering::Release);
        let start = self.records_at(index);
        if !thread.exchange_place(place, (start + RECORD_BYTES, place.1.wrapping_add(1))) {
            thread.lost.fetch_add(lost, Ordering::Relaxed);
            self.give_back(chunk, word);
            return Next::LookAgain;
        }
        // Release: pairs with the drain's Acquire. Fails if a handler has filled the chunk meanwhile.
        let active = state::with(word, state::ACTIVE);
        let _ = chunk.state.compare_exchange(word, active, Ordering::Release, Ordering::Relaxed);
        Next::Place(start)
    }

    /// Makes a chunk full that this thread had when its state was `word`.
    fn fill(self, chunk: &ChunkHeader, word: u64) {
        for before in [state::TAKEN, state::ACTIVE].map(|state| state::with(word, state)) {
            // Release: pairs with the drain's Acquire. Fails if the chunk is in other hands by now, or in its other state.
            let full = state::with(word, state::FULL);
            if chunk.state.compare_exchange(before, full, Ordering::Release, Ordering::Relaxed).is_ok() {
                self.ring();
                return;
            }
        }
    }

    /// Takes a chunk, which is all zero; returns its state. `None` if there is none for this record.
    fn take(self, thread: &State, tid: u32) -> Option<(u32, u64)> {
        if let Some(taken) = self.take_free(tid) {
            return Some(taken);
        }
        match self.0.on_full.load(Ordering::Relaxed) {
            mode if mode == OnFull::Block as u32 => self.wait_for_free(thread, tid),
            mode if mode == OnFull::Overwrite as u32 => self.take_oldest(tid),
            _ => None,
        }
    }

    /// Takes a free chunk.
    fn take_free(self, tid: u32) -> Option<(u32, u64)> {
        let (count, hint) = (self.chunk_count(), self.0.free_hint.load(Ordering::Relaxed));
        // Relaxed: who waits has seen `freed`, which changes after this.
        if self.0.free_chunks.load(Ordering::Relaxed) == 0 {
            return None;
        }
        for step in 0..count {
            let index = hint.wrapping_add(step) % count;
            let chunk = self.chunk(index)?;
            let word = chunk.state.load(Ordering::Relaxed);
            let taken = state::taken_by(word, tid);
            // Acquire: pairs with the recorder's Release when it frees one: its records are zero.
            if state::of(word) == state::FREE
                && chunk.state.compare_exchange(word, taken, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                self.0.free_chunks.fetch_sub(1, Ordering::Relaxed);
                self.0.free_hint.store(index + 1, Ordering::Relaxed);
                return Some((index, taken));
            }
        }
        None
    }

    /// Gives a chunk back that was taken and not used.
    #[cold]
    fn give_back(self, chunk: &ChunkHeader, word: u64) {
        self.0.free_chunks.fetch_add(1, Ordering::Relaxed);
        let free = state::with(word, state::FREE);
        // Release: pairs with the Acquire of the next one who takes it.
        let _ = chunk.state.compare_exchange(word, free, Ordering::Release, Ordering::Relaxed);
        // SeqCst: one order with the count of waiters, as when the recorder frees one.
        self.0.freed.fetch_add(1, Ordering::SeqCst);
        if self.0.waiters.load(Ordering::SeqCst) != 0 {
            sys::futex_wake_all(&self.0.freed);
        }
    }

    /// Waits for a free chunk; `None` if none will ever come.
    #[cold]
    fn wait_for_free(self, thread: &State, tid: u32) -> Option<(u32, u64)> {
        let header = self.0;
        let started = self.now(thread);
        let mut watch = Watch::new(self);
        let mut starved_slices = 0;
        // SeqCst: one order with the recorder's count of freed chunks and its look at the waiters.
        header.waiters.fetch_add(1, Ordering::SeqCst);
        let taken = loop {
            let freed = header.freed.load(Ordering::SeqCst);
            let taken = self.take_free(tid);
            let is_starved = header.starved.load(Ordering::Relaxed) == freed.wrapping_add(1);
            if taken.is_some() || is_starved || !self.is_open() {
                break taken;
            }
            if starved_slices > STARVED_SLICES {
                header.starved.store(freed.wrapping_add(1), Ordering::Relaxed);
                continue;
            }
            sys::futex_wait(&header.freed, freed, SLICE_NS);
            if header.freed.load(Ordering::Relaxed) == freed {
                watch.look(self);
                starved_slices = if self.has_chunks_to_drain() { 0 } else { starved_slices + 1 };
            }
        };
        header.waiters.fetch_sub(1, Ordering::SeqCst);
        header.waited_tsc.fetch_add(self.now(thread).wrapping_sub(started), Ordering::Relaxed);
        taken
    }

    /// Whether the recorder has, or will have, a chunk that it can free.
    fn has_chunks_to_drain(self) -> bool {
        (0..self.chunk_count())
            .filter_map(|index| self.chunk(index))
            .any(|chunk| matches!(state::of(chunk.state.load(Ordering::Relaxed)), state::FREE | state::FULL))
    }

    /// Takes the full chunk that was begun first, and counts what was in it. One with a hole is left alone, as somebody will still fill that, or has left
    /// it by longjmp: unless half of all chunks are such.
    #[cold]
    fn take_oldest(self, tid: u32) -> Option<(u32, u64)> {
        loop {
            let (mut oldest, mut oldest_with_hole, mut holes) = (None, None, 0);
            for index in 0..self.chunk_count() {
                let chunk = self.chunk(index)?;
                // Acquire: pairs with the Release of the thread that filled it.
                let word = chunk.state.load(Ordering::Acquire);
                if state::of(word) != state::FULL {
                    continue;
                }
                let has_hole = chunk.has_hole.load(Ordering::Relaxed) != 0;
                holes += u32::from(has_hole);
                let found = (chunk.opened_tsc.load(Ordering::Relaxed), index, word);
                let best = if has_hole { &mut oldest_with_hole } else { &mut oldest };
                if best.is_none_or(|best| found < best) {
                    *best = Some(found);
                }
            }
            let takes_holes = holes > self.chunk_count() / 2;
            let (_, index, word) = if takes_holes { oldest_with_hole } else { oldest }?;
            let chunk = self.chunk(index)?;
            if !takes_holes && self.words(index).any(|record| !record::is_written(record.load(Ordering::Relaxed))) {
                chunk.has_hole.store(1, Ordering::Relaxed);
                continue;
            }
            let taken = state::taken_by(word, tid);
            // Acquire: pairs with the same. Fails if another thread was faster.
            if chunk.state.compare_exchange(word, taken, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                self.0.lost_overwritten.fetch_add(self.clear(index), Ordering::Relaxed);
                return Some((index, taken));
            }
        }
    }

    /// Fills a chunk with zeros, and returns how many records were in it.
    fn clear(self, index: u32) -> u64 {
        self.words(index).map(|word| u64::from(word.swap(0, Ordering::Relaxed) != 0)).sum()
    }

    /// The records of a chunk.
    fn words(self, index: u32) -> impl Iterator<Item = &'static AtomicU64> {
        let start = self.records_at(index);
        (0..CHUNK_BYTES / RECORD_BYTES).map(move |at| {
            // SAFETY: (1) the caller's index is that of a chunk, and the word lies in it; (2) the pool stays mapped.
            unsafe { &*((start + at * RECORD_BYTES) as *const AtomicU64) }
        })
    }
}

/// The low half.
#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
fn low(word: usize) -> u32 {
    word as u32
}
