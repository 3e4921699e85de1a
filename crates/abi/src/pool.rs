//! The shared memory that events travel through: a pool of chunks for each process.
//!
//! ```text
//! PoolHeader, padded to POOL_HEADER_BYTES
//! ChunkHeader x chunk_count
//! from the next multiple of CHUNK_STRIDE_BYTES on, for each chunk:
//!     CHUNK_BYTES that nobody touches
//!     CHUNK_BYTES of records
//! ```
//!
//! A pool is mapped at a multiple of [`CHUNK_STRIDE_BYTES`]. So one bit of an address tells whether it is a record's place ([`is_place`]): what was
//! reserved behind a chunk's end, and the 0 of who has no chunk yet, are none, whatever has happened to the chunk meanwhile.
//!
//! A chunk is *free*, *taken* (a thread has it and has not begun to use it), *active* (one thread fills it with records from its start), or *full*.
//! The recorder drains full ones, fills them with zeros, and frees them. Each thread uses its chunks with rising [`ChunkHeader::sequence`], none left
//! out. When a process dies, everything that it wrote is in the chunks that are not free.
//!
//! Invariants: the records of a chunk that is free or taken and not used are zero; only the thread that took a chunk writes its records and its header
//! until it is full; only the recorder turns full into free, but for a thread that overwrites.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// First word of a pool.
pub const POOL_MAGIC: u64 = u64::from_le_bytes(*b"trapline");

/// Version of these layouts.
pub const POOL_VERSION: u32 = 2;

/// Room for the [`PoolHeader`].
pub const POOL_HEADER_BYTES: usize = 4096;

/// Bytes of one chunk: 4,096 records.
pub const CHUNK_BYTES: usize = 32 << 10;

/// From one chunk to the next, and what a pool's address is a multiple of.
pub const CHUNK_STRIDE_BYTES: usize = 2 * CHUNK_BYTES;

/// What happens to events that find no free chunk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u32)]
pub enum OnFull {
    /// The thread waits, and the time is counted.
    #[default]
    Block = 0,
    /// They are left out, and counted.
    Drop = 1,
    /// The oldest full chunk is overwritten, and counted: a flight recorder.
    Overwrite = 2,
}

/// The start of a pool. `futex` words are shared between processes.
#[repr(C)]
#[derive(Debug)]
pub struct PoolHeader {
    /// [`POOL_MAGIC`].
    pub magic: AtomicU64,
    /// [`POOL_VERSION`].
    pub version: AtomicU32,
    /// [`CHUNK_BYTES`].
    pub chunk_bytes: AtomicU32,
    /// How many chunks there are.
    pub chunk_count: AtomicU32,
    /// An [`OnFull`].
    pub on_full: AtomicU32,
    /// The recorder's process id, as its own namespace numbers it.
    pub recorder: AtomicU32,
    /// Not 0: nobody drains any more. Threads write into memory of their own instead, which nobody reads.
    pub closed: AtomicU32,
    /// How many chunks are free, or more: one for each thread that was left by longjmp just when it had taken one.
    pub free_chunks: AtomicU32,
    /// A chunk from which on a free one is looked for.
    pub free_hint: AtomicU32,
    /// A futex: counts what the recorder should look at (chunks that became full, requests).
    pub doorbell: AtomicU32,
    /// Not 0 while the recorder sleeps on the doorbell: whoever rings has to wake it.
    pub recorder_sleeps: AtomicU32,
    /// A futex: counts chunks that were freed.
    pub freed: AtomicU32,
    /// `freed` plus 1 when a thread found that all chunks are in threads' hands and come no nearer to be full: none waits again until one is freed.
    pub starved: AtomicU32,
    /// Threads that sleep on `freed`.
    pub waiters: AtomicU32,
    /// A futex: counts changes of the set of loaded objects that the recorder has been told of.
    pub requests: AtomicU32,
    /// A futex: the `requests` that the recorder has seen to.
    pub answered: AtomicU32,
    /// The thread that asks, as it sees itself: whoever makes it its own number from 0 may ask, and makes it 0 again when it was answered.
    pub requester: AtomicU32,
    /// What it asks, one of [`request`]; written before `requests`.
    pub request: AtomicU32,
    /// What the request is about, if it is about something.
    pub request_about: AtomicU64,
    /// Records that found no free chunk, and were left out. Two make a call whose return is seen.
    pub lost_full: AtomicU64,
    /// Records in chunks that were overwritten.
    pub lost_overwritten: AtomicU64,
    /// Calls whose returns could not be hooked, for want of memory for shadows: they are recorded as points.
    pub unhooked: AtomicU64,
    /// Ticks of the time-stamp counter that threads waited for a free chunk.
    pub waited_tsc: AtomicU64,
    /// Bumped by the recorder whenever it drains: a sign of life.
    pub heartbeat: AtomicU64,
    /// The time-stamp counter when the recorder drained last, for threads that may not read it.
    pub now_tsc: AtomicU64,
    /// The answer to [`request::SANDBOX`]: blocks of memory that stacks may lie in, as in [`Thread::blocks`](crate::thread::Thread::blocks), to be given a
    /// shadow now, because it cannot be had later. Ends with a 0.
    pub blocks_to_map: [AtomicU64; BLOCKS_TO_MAP],
}

/// How many runs of blocks the recorder can tell.
pub const BLOCKS_TO_MAP: usize = 128;

/// What the agent can ask of the recorder.
pub mod request {
    /// Objects came or went.
    pub const OBJECTS: u32 = 0;
    /// The thread is about to forbid itself system calls. It is about the `struct sock_fprog`, or 0 for strict mode.
    pub const SANDBOX: u32 = 1;
}

/// States of a chunk, and the word that holds one.
pub mod state {
    /// Nobody's.
    pub const FREE: u32 = 0;
    /// A thread has it, and perhaps begins to use it at this moment: its header is complete if any of its records is not zero.
    pub const TAKEN: u32 = 1;
    /// A thread fills it.
    pub const ACTIVE: u32 = 2;
    /// It is complete, but for records of contexts that were interrupted while they wrote one.
    pub const FULL: u32 = 3;

    const STATE_BITS: u32 = 3;

    /// The state in a word.
    pub const fn of(word: u64) -> u32 {
        (word & ((1 << STATE_BITS) - 1)) as u32
    }

    /// The word of a chunk that goes on to another state, in the same hands.
    pub const fn with(word: u64, state: u32) -> u64 {
        word >> STATE_BITS << STATE_BITS | state as u64
    }

    /// The word of a free chunk that `thread` takes. Each time is another one, so that a word from before tells that it is outdated.
    pub const fn taken_by(word: u64, thread: u32) -> u64 {
        let times = (word << 32 >> (32 + STATE_BITS)).wrapping_add(1) << STATE_BITS << 32 >> 32;
        (thread as u64) << 32 | times | TAKEN as u64
    }

    /// The thread that took the chunk last, as it sees itself.
    pub const fn thread(word: u64) -> u32 {
        (word >> 32) as u32
    }
}

/// What is known of a chunk.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct ChunkHeader {
    /// A [`state`], whose it is, and how often it was taken. Release when it becomes active or full, so that what is below is there for who acquires it.
    pub state: AtomicU64,
    /// The process that filled it, as its own namespace numbers it: a vfork child shares its parent's pool.
    pub pid: AtomicU32,
    /// The thread.
    pub tid: AtomicU32,
    /// Not 0: it was full and to be overwritten, but a context that was interrupted had not yet written its record, and would have written into what comes next.
    pub has_hole: AtomicU32,
    /// Which of the thread's chunks this is: 0 is the first.
    pub sequence: AtomicU32,
    /// How many frames were open when it was taken.
    pub depth: AtomicU32,
    /// The time-stamp counter when it was taken.
    pub opened_tsc: AtomicU64,
    /// How many records of this thread were lost between its previous chunk and this one.
    pub lost_before: AtomicU64,
}

/// Bytes of a pool before its chunks.
pub const fn chunks_offset(chunk_count: usize) -> usize {
    (POOL_HEADER_BYTES + chunk_count * size_of::<ChunkHeader>()).next_multiple_of(CHUNK_STRIDE_BYTES)
}

/// Where a chunk's records begin, from the start of its pool.
pub const fn records_offset(chunk_count: usize, index: usize) -> usize {
    chunks_offset(chunk_count) + index * CHUNK_STRIDE_BYTES + CHUNK_BYTES
}

/// Bytes of a pool.
pub const fn pool_bytes(chunk_count: usize) -> usize {
    chunks_offset(chunk_count) + chunk_count * CHUNK_STRIDE_BYTES
}

/// Whether this is the address of a record's place.
pub const fn is_place(address: u64) -> bool {
    address & CHUNK_BYTES as u64 != 0
}

/// The chunk that a [position](crate::thread::Thread::position) belongs to, in a pool at `pool`: at a place, or behind the chunk's end. `None` if it belongs to
/// none.
#[expect(clippy::cast_possible_truncation, reason = "no more than there are chunks")]
pub const fn chunk_at(pool: u64, chunk_count: usize, position: u64) -> Option<usize> {
    let first = pool.wrapping_add(records_offset(chunk_count, 0) as u64);
    let index = position.wrapping_sub(first) / CHUNK_STRIDE_BYTES as u64;
    if position >= first && index < chunk_count as u64 { Some(index as usize) } else { None }
}

const _: () = assert!(size_of::<PoolHeader>() <= POOL_HEADER_BYTES);
const _: () = assert!(size_of::<ChunkHeader>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_from_what_is_behind_a_chunk() {
        let pool = 37 * CHUNK_STRIDE_BYTES as u64;
        for index in 0..5 {
            let start = pool + records_offset(5, index) as u64;
            let end = start + CHUNK_BYTES as u64;
            assert!(is_place(start) && is_place(end - 8));
            assert!(!is_place(end) && !is_place(end + CHUNK_BYTES as u64 - 8));
            for position in [start, end - 8, end, end + CHUNK_BYTES as u64 - 8] {
                assert_eq!(chunk_at(pool, 5, position), Some(index));
            }
        }
        assert!(!is_place(0));
        assert_eq!(chunk_at(pool, 5, 0), None);
        assert_eq!(chunk_at(pool, 5, pool + records_offset(5, 5) as u64), None);
        assert_eq!(pool_bytes(5), records_offset(5, 4) + CHUNK_BYTES);
    }

    #[test]
    fn a_word_tells_state_thread_and_that_it_was_taken_again() {
        let mut word = 0;
        for times in 0..100 {
            let taken = state::taken_by(word, 1234 + times);
            assert_eq!((state::of(taken), state::thread(taken)), (state::TAKEN, 1234 + times));
            let full = state::with(taken, state::FULL);
            assert_eq!((state::of(full), state::thread(full)), (state::FULL, 1234 + times));
            assert_ne!(taken << 32, state::taken_by(state::with(full, state::FREE), 5) << 32);
            word = state::with(full, state::FREE);
        }
    }
}
