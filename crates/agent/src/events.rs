//! Puts records into chunks, and takes the next chunk when one is full.
//!
//! Owns `Pool`, the agent's side of [`trapline_abi::pool`], and `trapline_record`, which the entries call when their record finds no place. What then
//! happens, in order:
//!
//! 1. Signals are blocked: nobody else changes this thread's place meanwhile.
//! 2. The old chunk becomes full, and the recorder is told.
//! 3. A free one is taken. If there is none: wait (`OnFull::Block`), count and go on without (`Drop`), or take the oldest full one
//!    (`Overwrite`).
//! 4. Its header is written, then its state.
//! 5. The record goes to its first place.
//!
//! Invariant: each record is in a chunk, or counted in `lost_full` or `lost_overwritten`, unless nobody drains any more.

use core::sync::atomic::{AtomicU64, Ordering};

use trapline_abi::{
    pool::{CHUNK_BYTES, ChunkHeader, OnFull, POOL_HEADER_BYTES, PoolHeader, chunks_offset, state},
    record::{self, Event, TSC_BITS},
};

use crate::{
    arch, frames,
    sys::{self, SignalsBlocked},
    thread::State,
};

/// A pool that somebody drains.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pool(&'static PoolHeader);

/// How long a thread sleeps before it looks whether the recorder lives.
const SLICE_NS: u64 = 100_000_000;

/// Slices without a sign of life before the recorder's process is looked for.
const QUIET_SLICES: u32 = 10;

/// Slices without a sign of life before the recorder is given up even if there is a process of its number.
const DEAD_SLICES: u32 = 600;

/// Slices in which every chunk belonged to a thread, and none to the recorder, before a record is given up: nobody would ever free one.
const STARVED_SLICES: u32 = 10;

/// A free word of a chunk.
const RECORD_BYTES: u64 = size_of::<u64>() as u64;

/// Writes an event of the agent's own.
pub(crate) fn record(event: Event) {
    record_upper(record::encode(event, 0) >> TSC_BITS);
}

/// An entry's record found no place: `upper` is its kind and payload.
#[unsafe(no_mangle)]
extern "C" fn trapline_record(upper: u64) {
    record_upper(upper & u64::from(u32::MAX));
}

fn record_upper(upper: u64) {
    let Some(pool) = Pool::current() else { return };
    let blocked = SignalsBlocked::new();
    let thread = State::of_this_thread();
    let place = thread.position.load(Ordering::Relaxed);
    let place = if place < thread.end.load(Ordering::Relaxed) {
        Some(place)
    } else {
        pool.leave_chunk(thread);
        pool.next_chunk(thread, open_frames(thread, upper))
    };
    if let Some(place) = place {
        thread.position.store(place + RECORD_BYTES, Ordering::Relaxed);
        let record = upper << TSC_BITS | arch::tsc() & ((1 << TSC_BITS) - 1);
        // SAFETY: (1) the place lies in a chunk that this thread has taken, in the pool, which stays mapped; (2) it is aligned to 8 bytes.
        let word = unsafe { &*(place as *const AtomicU64) };
        // Release: pairs with the drain's Acquire.
        word.store(record, Ordering::Release);
    } else {
        pool.0.lost_full.fetch_add(u64::from(pool.is_open()), Ordering::Relaxed);
        thread.lost.fetch_add(1, Ordering::Relaxed);
    }
    drop(blocked);
}

/// How many frames were open before the record that is to be written.
fn open_frames(thread: &State, upper: u64) -> u32 {
    let top = frames::depth(thread.top.load(Ordering::Relaxed));
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

    fn chunk_count(self) -> u32 {
        self.0.chunk_count.load(Ordering::Relaxed)
    }

    /// The header of a chunk; `None` if there is no such chunk.
    fn chunk(self, index: u32) -> Option<&'static ChunkHeader> {
        if index >= self.chunk_count() {
            return None;
        }
        let address = (&raw const *self.0) as usize + POOL_HEADER_BYTES + index as usize * size_of::<ChunkHeader>();
        // SAFETY: (1) the pool has as many headers there; (2) all of their fields are atomics.
        Some(unsafe { &*(address as *const ChunkHeader) })
    }

    /// The address of a chunk's first record.
    fn records_at(self, index: u32) -> u64 {
        ((&raw const *self.0) as usize + chunks_offset(self.chunk_count() as usize) + index as usize * CHUNK_BYTES)
            as u64
    }

    /// Ends the thread's chunk, if it has one.
    fn leave_chunk(self, thread: &State) {
        let old = thread.chunk.swap(0, Ordering::Relaxed);
        thread.position.store(0, Ordering::Relaxed);
        thread.end.store(0, Ordering::Relaxed);
        let Some(chunk) = old.checked_sub(1).and_then(|index| self.chunk(index)) else { return };
        // Release: pairs with the drain's Acquire. Fails if the recorder has ended it on our behalf.
        if chunk.state.compare_exchange(state::ACTIVE, state::FULL, Ordering::Release, Ordering::Relaxed).is_ok() {
            self.ring();
        }
    }

    /// Takes another chunk for the thread; `None` if this record is to be left out.
    fn next_chunk(self, thread: &State, depth: u32) -> Option<u64> {
        let index = match self.take_free() {
            Some(index) => index,
            None => match self.0.on_full.load(Ordering::Relaxed) {
                mode if mode == OnFull::Block as u32 => self.wait_for_free()?,
                mode if mode == OnFull::Overwrite as u32 => self.take_oldest()?,
                _ => return None,
            },
        };
        let chunk = self.chunk(index)?;
        let sequence = thread.chunks_taken.fetch_add(1, Ordering::Relaxed);
        chunk.pid.store(sys::process_id(), Ordering::Relaxed);
        chunk.tid.store(sys::thread_id(), Ordering::Relaxed);
        chunk.sequence.store(sequence, Ordering::Relaxed);
        chunk.depth.store(depth, Ordering::Relaxed);
        chunk.opened_tsc.store(arch::tsc(), Ordering::Relaxed);
        chunk.lost_before.store(thread.lost.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        // Release: pairs with the drain's Acquire; what is above is there for who sees this.
        chunk.state.store(state::ACTIVE, Ordering::Release);
        let start = self.records_at(index);
        thread.chunk.store(index + 1, Ordering::Relaxed);
        thread.position.store(start, Ordering::Relaxed);
        thread.end.store(start + CHUNK_BYTES as u64, Ordering::Relaxed);
        Some(start)
    }

    /// Takes the first chunk of the list of free ones.
    fn take_free(self) -> Option<u32> {
        // Acquire: pairs with the recorder's Release when it frees one: its records are zero, and its link is there.
        let mut head = self.0.free_head.load(Ordering::Acquire);
        loop {
            let index = low(head).checked_sub(1)?;
            // If another thread takes it first this is no link; the count of changes in the head tells.
            let next = self.chunk(index)?.next_free.load(Ordering::Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(next);
            match self.0.free_head.compare_exchange_weak(head, new, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some(index),
                Err(now) => head = now,
            }
        }
    }

    /// Waits for a free chunk; `None` if none will ever come.
    #[cold]
    fn wait_for_free(self) -> Option<u32> {
        let header = self.0;
        let started_ns = sys::monotonic_ns();
        let mut watch = Watch::new(self);
        let mut starved_slices = 0;
        // SeqCst: one order with the recorder's count of freed chunks and its look at the waiters.
        header.waiters.fetch_add(1, Ordering::SeqCst);
        let index = loop {
            let freed = header.freed.load(Ordering::SeqCst);
            let index = self.take_free();
            if index.is_some() || !self.is_open() || starved_slices > STARVED_SLICES {
                break index;
            }
            sys::futex_wait(&header.freed, freed, SLICE_NS);
            if header.freed.load(Ordering::Relaxed) == freed {
                watch.look(self);
                starved_slices = if self.has_chunks_to_drain() { 0 } else { starved_slices + 1 };
            }
        };
        header.waiters.fetch_sub(1, Ordering::SeqCst);
        header.waited_ns.fetch_add(sys::monotonic_ns().wrapping_sub(started_ns), Ordering::Relaxed);
        index
    }

    /// Whether the recorder has, or will have, a chunk that it can free.
    fn has_chunks_to_drain(self) -> bool {
        (0..self.chunk_count())
            .filter_map(|index| self.chunk(index))
            .any(|chunk| chunk.state.load(Ordering::Relaxed) != state::ACTIVE)
    }

    /// Takes the full chunk that was begun first, and counts what was in it.
    #[cold]
    fn take_oldest(self) -> Option<u32> {
        loop {
            let full = (0..self.chunk_count()).filter_map(|index| self.chunk(index).map(|chunk| (index, chunk)));
            // Acquire: pairs with the Release of the thread that filled it.
            let full = full.filter(|(_, chunk)| chunk.state.load(Ordering::Acquire) == state::FULL);
            let (index, chunk) = full.min_by_key(|(_, chunk)| chunk.opened_tsc.load(Ordering::Relaxed))?;
            // Acquire: pairs with the same. Fails if another thread was faster.
            if chunk.state.compare_exchange(state::FULL, state::DRAINING, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                self.0.lost_overwritten.fetch_add(self.clear(index), Ordering::Relaxed);
                return Some(index);
            }
        }
    }

    /// Fills a chunk with zeros, and returns how many records were in it.
    fn clear(self, index: u32) -> u64 {
        let start = self.records_at(index);
        let words = (0..CHUNK_BYTES as u64 / RECORD_BYTES).map(|at| {
            // SAFETY: the word lies in the chunk, which is this thread's.
            unsafe { &*((start + at * RECORD_BYTES) as *const AtomicU64) }
        });
        words.map(|word| u64::from(word.swap(0, Ordering::Relaxed) != 0)).sum()
    }
}

/// The low half.
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
fn low(word: u64) -> u32 {
    word as u32
}
