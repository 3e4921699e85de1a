//! What the drain knows of a pool's chunks: whose they are, how far they are written, and which come next.
//!
//! Owns [`Space`], the pool of one process with the threads that fill it, and [`chunks_to_write`]. The [`drain`](super) writes. Invariant: the chunks of a thread come in their order, and
//! none is freed that somebody may still write to.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use trapline_abi::{pool::state, record::is_written};

use crate::{
    pool::{Pool, Taken},
    sys::Tid,
};

/// Of one thread, how far its chunks are written.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) stream: u32,
    pub(super) next_sequence: u32,
    /// Whether the trace knows it.
    pub(super) is_told: bool,
    /// How much of the chunk `next_sequence` is written already.
    pub(super) begun: Option<Begun>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    pub(super) records: usize,
    /// Every record behind was written after this.
    pub(super) seen_at_tsc: u64,
    pub(super) depth: u32,
    /// Records that were lost before the chunk, and that the trace does not know of.
    pub(super) lost_before: u64,
    /// When a word that is not written yet was met in a full chunk.
    pub(super) hole_since: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Space {
    pub(super) pool: Arc<Pool>,
    pub(super) doorbell: u32,
    pub(super) answered: u32,
    pub(super) processes: HashMap<u32, (Tid, u32)>,
    /// Processes that have written, and that nobody has told of: since when.
    strangers: HashMap<u32, Instant>,
    pub(super) threads: HashMap<(u32, u32), Thread>,
    /// Chunks that became full before their threads had filled them.
    pub(super) ended_early: Vec<Taken>,
    /// Chunks that are written, all but a hole, and whose they were: who was interrupted there may still come back and fill it, and would do that in
    /// somebody else's chunk if it were free.
    pub(super) kept_back: VecDeque<(usize, u32)>,
}

/// How long a process may write that nobody has told of.
const STRANGERS_PATIENCE: Duration = Duration::from_secs(10);

/// Which chunks a look at a pool is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Look {
    /// Full ones.
    Full,
    /// Those in use, too, as far as they are written.
    Everything,
    /// Nobody writes any more: all there is, of this thread or of every one.
    Last(Option<u32>),
}

/// The record in a word of a chunk, or 0 if there is none yet.
pub(super) fn record_in(word: &AtomicU64) -> u64 {
    // Acquire: pairs with the trampoline's store, which on x86 is a release; the chunk's header is there.
    let word = word.load(Ordering::Acquire);
    if is_written(word) { word } else { 0 }
}

/// A chunk to be written: the thread, its place in the thread's order, and in the pool.
pub(super) type ChunkAt = ((u32, u32), u32, usize);

pub(super) fn chunks_to_write(space: &Space, look: Look) -> Vec<ChunkAt> {
    let mut chunks: Vec<ChunkAt> = (0..space.pool.chunk_count())
        .filter_map(|index| {
            let chunk = space.pool.chunk(index);
            // Acquire: pairs with the agent's Release; the rest of the header is there.
            let is_wanted = match state::of(chunk.state.load(Ordering::Acquire)) {
                state::FULL => true,
                state::ACTIVE => look != Look::Full,
                // Begun, and perhaps left in that moment.
                state::TAKEN => look != Look::Full && space.is_used(index),
                _ => false,
            };
            let is_wanted = is_wanted && !space.kept_back.iter().any(|(kept, _)| *kept == index);
            let tid = chunk.tid.load(Ordering::Relaxed);
            let is_wanted = is_wanted && !matches!(look, Look::Last(Some(only)) if only != tid);
            is_wanted.then(|| ((chunk.pid.load(Ordering::Relaxed), tid), chunk.sequence.load(Ordering::Relaxed), index))
        })
        .collect();
    chunks.sort_unstable();
    chunks
}

impl Space {
    /// A pool that nobody has written to.
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            doorbell: 0,
            answered: 0,
            processes: HashMap::new(),
            strangers: HashMap::new(),
            threads: HashMap::new(),
            ended_early: Vec::new(),
            kept_back: VecDeque::new(),
        }
    }

    /// Whether a process was told of. If that does not come for long, it is taken as it is, so that its threads do not wait for room for ever.
    pub(super) fn knows(&mut self, pid: u32) -> bool {
        self.processes.contains_key(&pid)
            || self.strangers.entry(pid).or_insert_with(Instant::now).elapsed() > STRANGERS_PATIENCE
    }

    fn is_used(&self, index: usize) -> bool {
        self.pool.records(index).iter().any(|word| record_in(word) != 0)
    }

    /// Frees what was kept back for threads that have ended, and the oldest where that would be more than a quarter of the pool: those were left by longjmp.
    pub(super) fn free_kept_back(&mut self, look: Look) {
        let has_ended = |tid: u32| match look {
            Look::Last(ended) => ended.is_none_or(|ended| ended == tid),
            _ => false,
        };
        let mut too_many = self.kept_back.len().saturating_sub(self.pool.chunk_count() / 4);
        self.kept_back.retain(|(index, tid)| {
            let is_over = too_many > 0 || has_ended(*tid);
            if is_over {
                too_many = too_many.saturating_sub(1);
                self.pool.free(*index);
            }
            !is_over
        });
    }

    /// Frees what a thread that ended, or any, took and never used: a signal handler has left it by longjmp in that moment.
    pub(super) fn free_unused(&self, ended: Option<u32>) {
        for index in 0..self.pool.chunk_count() {
            let word = self.pool.chunk(index).state.load(Ordering::Acquire);
            let is_of = ended.is_none_or(|tid| state::thread(word) == tid);
            if is_of && state::of(word) == state::TAKEN && !self.is_used(index) {
                self.pool.free(index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use trapline_abi::{pool::OnFull, record::KIND_SHIFT};

    use super::*;

    fn space(chunks: usize) -> Space {
        Space::new(Arc::new(Pool::new(chunks, OnFull::Block).unwrap()))
    }

    /// Puts a chunk into a thread's hands, as the agent does.
    fn take(space: &Space, index: usize, (tid, sequence): (u32, u32), state: u32) {
        let chunk = space.pool.chunk(index);
        chunk.pid.store(1, Ordering::Relaxed);
        chunk.tid.store(tid, Ordering::Relaxed);
        chunk.sequence.store(sequence, Ordering::Relaxed);
        chunk.state.store(state::with(state::taken_by(0, tid), state), Ordering::Release);
        space.pool.header().free_chunks.fetch_sub(1, Ordering::Relaxed);
    }

    fn listed(space: &Space, look: Look) -> Vec<usize> {
        chunks_to_write(space, look).into_iter().map(|(_, _, index)| index).collect()
    }

    fn is_free(space: &Space, index: usize) -> bool {
        state::of(space.pool.chunk(index).state.load(Ordering::Relaxed)) == state::FREE
    }

    #[test]
    fn chunks_come_in_the_order_of_their_threads() {
        let space = space(6);
        take(&space, 0, (8, 1), state::FULL);
        take(&space, 1, (8, 0), state::FULL);
        take(&space, 2, (7, 5), state::ACTIVE);
        take(&space, 3, (8, 2), state::ACTIVE);
        assert_eq!(listed(&space, Look::Full), [1, 0]);
        assert_eq!(listed(&space, Look::Everything), [2, 1, 0, 3]);
        assert_eq!(listed(&space, Look::Last(Some(7))), [2]);
    }

    #[test]
    fn a_chunk_that_was_left_when_it_was_taken_is_found() {
        let space = space(4);
        take(&space, 0, (7, 0), state::TAKEN);
        take(&space, 1, (7, 1), state::TAKEN);
        take(&space, 2, (8, 0), state::TAKEN);
        // Half of a record, which 32-bit code stores first, is none.
        space.pool.records(0)[3].store(1, Ordering::Relaxed);
        space.pool.records(1)[3].store(1 << KIND_SHIFT, Ordering::Relaxed);
        assert_eq!(listed(&space, Look::Full), [0_usize; 0]);
        assert_eq!(listed(&space, Look::Everything), [1], "one has a record");
        space.free_unused(Some(7));
        assert_eq!([0, 1, 2].map(|index| is_free(&space, index)), [true, false, false]);
        space.free_unused(None);
        assert_eq!([0, 1, 2].map(|index| is_free(&space, index)), [true, false, true]);
        assert_eq!(space.pool.header().free_chunks.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_chunk_with_a_hole_is_kept_back_until_its_thread_ends_or_room_is_short() {
        let mut space = space(8);
        for index in 0..4 {
            take(&space, index, (7 + u32::try_from(index).unwrap(), 0), state::FULL);
            space.kept_back.push_back((index, 7 + u32::try_from(index).unwrap()));
        }
        assert_eq!(listed(&space, Look::Everything), [0_usize; 0], "they are written");
        // A quarter of eight may be kept.
        space.free_kept_back(Look::Full);
        assert_eq!([0, 1, 2, 3].map(|index| is_free(&space, index)), [true, true, false, false]);
        space.free_kept_back(Look::Last(Some(10)));
        assert_eq!([2, 3].map(|index| is_free(&space, index)), [false, true]);
        space.free_kept_back(Look::Last(None));
        assert!(is_free(&space, 2) && space.kept_back.is_empty());
    }
}
