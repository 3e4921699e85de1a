//! The recorder's side of a pool of chunks: see [`trapline_abi::pool`].
//!
//! Owns [`Pool`]: makes one, finds what is to be drained in it, and gives chunks back. Draining is one thread's work, and nobody
//! else changes a chunk's state on this side. Invariant: a chunk is zero again before it is free.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::atomic::{AtomicU64, Ordering},
};

use trapline_abi::pool::{
    self, CHUNK_BYTES, ChunkHeader, OnFull, POOL_HEADER_BYTES, POOL_MAGIC, POOL_VERSION, PoolHeader, state,
};

use crate::sys::shared::{self, SharedMemory};

/// Records in a chunk.
pub(crate) const CHUNK_RECORDS: usize = CHUNK_BYTES / size_of::<u64>();

#[expect(clippy::cast_possible_truncation, reason = "some thousand bytes")]
const CHUNK_BYTES_32: u32 = CHUNK_BYTES as u32;

/// A chunk in somebody's hands: the same place may be in another's later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Taken {
    /// Its place in the pool.
    pub(crate) index: usize,
    /// Its word, as if it were free: whose, and the how many-th time.
    hands: u64,
}

impl Taken {
    /// The thread, as it sees itself.
    pub(crate) fn tid(self) -> u32 {
        state::thread(self.hands)
    }
}

/// The pool of one process.
#[derive(Debug)]
pub(crate) struct Pool {
    memory: SharedMemory,
    chunk_count: usize,
}

impl Pool {
    /// A pool whose chunks are all free.
    pub(crate) fn new(chunk_count: usize, on_full: OnFull) -> io::Result<Self> {
        let memory = SharedMemory::new(c"trapline-pool", pool::pool_bytes(chunk_count))?;
        let pool = Self { memory, chunk_count };
        let count = u32::try_from(chunk_count).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let header = pool.header();
        // Relaxed all of them: the target maps the pool after a system call of ours.
        header.version.store(POOL_VERSION, Ordering::Relaxed);
        header.chunk_bytes.store(CHUNK_BYTES_32, Ordering::Relaxed);
        header.chunk_count.store(count, Ordering::Relaxed);
        header.on_full.store(on_full as u32, Ordering::Relaxed);
        header.recorder.store(std::process::id(), Ordering::Relaxed);
        header.free_chunks.store(count, Ordering::Relaxed);
        header.now_tsc.store(shared::tsc(), Ordering::Relaxed);
        header.magic.store(POOL_MAGIC, Ordering::Release);
        Ok(pool)
    }

    /// Bytes to map.
    pub(crate) fn len_bytes(&self) -> u64 {
        pool::pool_bytes(self.chunk_count) as u64
    }

    /// The descriptor by which targets map it.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.memory.file().as_raw_fd()
    }

    /// Its header.
    pub(crate) fn header(&self) -> &PoolHeader {
        self.memory.header()
    }

    /// The header of a chunk.
    pub(crate) fn chunk(&self, index: usize) -> &ChunkHeader {
        assert!(index < self.chunk_count, "no such chunk");
        self.memory.chunk_header(POOL_HEADER_BYTES + index * size_of::<ChunkHeader>())
    }

    /// How many chunks there are.
    pub(crate) fn chunk_count(&self) -> usize {
        self.chunk_count
    }

    /// The records of a chunk.
    pub(crate) fn records(&self, index: usize) -> &[AtomicU64] {
        assert!(index < self.chunk_count, "no such chunk");
        self.memory.words(pool::records_offset(self.chunk_count, index), CHUNK_RECORDS)
    }

    /// Clears a drained chunk and frees it.
    pub(crate) fn free(&self, index: usize) {
        for record in self.records(index) {
            record.store(0, Ordering::Relaxed);
        }
        let (header, chunk) = (self.header(), self.chunk(index));
        // Counted before it can be taken, so that the count never falls below zero.
        header.free_chunks.fetch_add(1, Ordering::Relaxed);
        let word = chunk.state.load(Ordering::Relaxed);
        // Release: the zeros above are there for who takes the chunk with Acquire (the agent's `take_free`).
        chunk.state.store(state::with(word, state::FREE), Ordering::Release);
        header.free_hint.store(u32::try_from(index).unwrap_or(0), Ordering::Relaxed);
        // SeqCst: one order with the agent's count of waiters and its look at `freed`; either it sees the change, or we see it wait.
        header.freed.fetch_add(1, Ordering::SeqCst);
        if header.waiters.load(Ordering::SeqCst) != 0 {
            shared::wake_all(&header.freed);
        }
    }

    /// Nobody drains any more: threads that wait, and all others, go on without.
    pub(crate) fn close(&self) {
        self.header().closed.store(1, Ordering::SeqCst);
        shared::wake_all(&self.header().freed);
        shared::wake_all(&self.header().answered);
    }

    /// Whether a chunk is still in these hands, and not full.
    pub(crate) fn is(&self, taken: Taken) -> bool {
        let word = self.chunk(taken.index).state.load(Ordering::Acquire);
        state::of(word) != state::FREE && self.taken(taken.index) == taken
    }

    /// What a chunk was taken for last.
    pub(crate) fn taken(&self, index: usize) -> Taken {
        let chunk = self.chunk(index);
        Taken { index, hands: state::with(chunk.state.load(Ordering::Acquire), state::FREE) }
    }

    /// Makes the chunk full that a thread was filling and will not go on with. Returns whether it was that.
    pub(crate) fn end_chunk(&self, taken: Taken) -> bool {
        let state = &self.chunk(taken.index).state;
        [state::TAKEN, state::ACTIVE].into_iter().any(|before| {
            let (before, full) = (state::with(taken.hands, before), state::with(taken.hands, state::FULL));
            // Acquire: pairs with the agent's Release. Nobody but the drain's thread frees it, and that is who asks.
            state.compare_exchange(before, full, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drained_chunk_is_zero_and_free_again() {
        let pool = Pool::new(8, OnFull::Block).unwrap();
        assert_eq!(pool.header().free_chunks.load(Ordering::Relaxed), 8);
        pool.chunk(3).state.store(state::with(state::taken_by(0, 77), state::FULL), Ordering::Relaxed);
        pool.header().free_chunks.store(7, Ordering::Relaxed);
        pool.records(3)[7].store(1, Ordering::Relaxed);
        pool.free(3);
        assert_eq!(state::of(pool.chunk(3).state.load(Ordering::Relaxed)), state::FREE);
        assert!(pool.records(3).iter().all(|record| record.load(Ordering::Relaxed) == 0));
        let header = pool.header();
        assert_eq!((header.free_chunks.load(Ordering::Relaxed), header.freed.load(Ordering::Relaxed)), (8, 1));
    }

    #[test]
    fn a_chunk_is_ended_in_the_hands_of_its_thread_only() {
        let pool = Pool::new(2, OnFull::Block).unwrap();
        let word = state::taken_by(0, 77);
        for state in [state::TAKEN, state::ACTIVE] {
            pool.chunk(0).state.store(state::with(word, state), Ordering::Relaxed);
            assert!(pool.end_chunk(pool.taken(0)));
            assert_eq!(pool.chunk(0).state.load(Ordering::Relaxed), state::with(word, state::FULL));
        }
        let taken = pool.taken(0);
        assert!(pool.is(taken) && taken.tid() == 77);
        pool.free(0);
        assert!(!pool.is(taken) && !pool.end_chunk(taken), "it is free");
        let again = state::taken_by(pool.chunk(0).state.load(Ordering::Relaxed), 77);
        pool.chunk(0).state.store(again, Ordering::Relaxed);
        assert!(!pool.is(taken) && !pool.end_chunk(taken), "the thread has taken it again");
        assert!(pool.end_chunk(pool.taken(0)));
    }
}
