//! The recorder's side of a pool of chunks: see [`trapline_abi::pool`].
//!
//! Owns [`Pool`]: makes one, finds what is to be drained in it, and gives chunks back. Draining is one thread's work, and nobody
//! else changes a chunk's state on this side. Invariant: a chunk is zero again before it is free.

use std::{
    io,
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

/// The first free chunk in a list's head: its index plus 1.
#[expect(clippy::cast_possible_truncation, reason = "the lower half")]
const fn first_free(head: u64) -> u32 {
    head as u32
}

/// A chunk, and what a thread took it for: the same place may be another one's later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Taken {
    /// Its place in the pool.
    pub(crate) index: usize,
    /// The thread, as it sees itself.
    pub(crate) tid: u32,
    /// Which of the thread's chunks.
    pub(crate) sequence: u32,
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
        for index in 1..count {
            pool.chunk(index as usize - 1).next_free.store(index + 1, Ordering::Relaxed);
        }
        header.free_head.store(1, Ordering::Relaxed);
        header.magic.store(POOL_MAGIC, Ordering::Release);
        Ok(pool)
    }

    /// Bytes to map.
    pub(crate) fn len_bytes(&self) -> u64 {
        pool::pool_bytes(self.chunk_count) as u64
    }

    /// By which path targets open it.
    pub(crate) fn path(&self) -> String {
        shared::path_for_others(self.memory.file())
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
        self.memory.words(pool::chunks_offset(self.chunk_count) + index * CHUNK_BYTES, CHUNK_RECORDS)
    }

    /// Clears a drained chunk and gives it back.
    pub(crate) fn free(&self, index: usize) {
        for record in self.records(index) {
            record.store(0, Ordering::Relaxed);
        }
        let (header, chunk) = (self.header(), self.chunk(index));
        chunk.state.store(state::FREE, Ordering::Relaxed);
        let new = u64::try_from(index + 1).unwrap_or(0);
        let mut head = header.free_head.load(Ordering::Relaxed);
        loop {
            chunk.next_free.store(first_free(head), Ordering::Relaxed);
            let changed = (head >> 32).wrapping_add(1) << 32 | new;
            // Release: the zeros above are there for who takes the chunk with Acquire (the agent's `take_chunk`).
            match header.free_head.compare_exchange_weak(head, changed, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
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

    /// Whether a chunk is still what it was taken for.
    pub(crate) fn is(&self, taken: Taken) -> bool {
        taken.index < self.chunk_count && self.taken(taken.index) == taken
    }

    /// What a chunk was taken for last.
    pub(crate) fn taken(&self, index: usize) -> Taken {
        let chunk = self.chunk(index);
        Taken { index, tid: chunk.tid.load(Ordering::Relaxed), sequence: chunk.sequence.load(Ordering::Relaxed) }
    }

    /// Makes the chunk full that a thread was filling and will not go on with. Returns whether it was that.
    pub(crate) fn end_chunk(&self, taken: Taken) -> bool {
        let state = &self.chunk(taken.index).state;
        self.is(taken)
            // Acquire: pairs with the agent's Release. Nobody but the drain's thread frees it, and that is who asks.
            && state.compare_exchange(state::ACTIVE, state::FULL, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pool: &Pool) -> Option<usize> {
        let header = pool.header();
        let head = header.free_head.load(Ordering::Acquire);
        let index = (first_free(head) as usize).checked_sub(1)?;
        let next = pool.chunk(index).next_free.load(Ordering::Relaxed);
        header.free_head.store((head >> 32).wrapping_add(1) << 32 | u64::from(next), Ordering::Relaxed);
        Some(index)
    }

    #[test]
    fn every_chunk_is_free_once_and_comes_back_zero() {
        let pool = Pool::new(8, OnFull::Block).unwrap();
        let mut taken: Vec<usize> = std::iter::from_fn(|| take(&pool)).collect();
        taken.sort_unstable();
        assert_eq!(taken, (0..8).collect::<Vec<_>>());
        pool.records(3)[7].store(1, Ordering::Relaxed);
        pool.free(3);
        pool.free(5);
        assert_eq!((take(&pool), take(&pool), take(&pool)), (Some(5), Some(3), None));
        assert!(pool.records(3).iter().all(|record| record.load(Ordering::Relaxed) == 0));
        assert_eq!(pool.header().freed.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_chunk_that_is_free_again_is_not_ended_and_stays_in_the_list() {
        let pool = Pool::new(2, OnFull::Block).unwrap();
        let index = take(&pool).unwrap();
        pool.chunk(index).tid.store(7, Ordering::Relaxed);
        pool.chunk(index).state.store(state::ACTIVE, Ordering::Relaxed);
        let taken = pool.taken(index);
        pool.free(index);
        assert!(!pool.end_chunk(taken));
        let mut all: Vec<usize> = std::iter::from_fn(|| take(&pool)).collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1]);
        pool.chunk(index).state.store(state::ACTIVE, Ordering::Relaxed);
        assert!(!pool.end_chunk(Taken { sequence: 1, ..taken }), "the thread has taken it again");
        assert!(pool.end_chunk(taken));
        assert_eq!(pool.chunk(index).state.load(Ordering::Relaxed), state::FULL);
    }
}
