//! The shared memory that events travel through: a pool of chunks for each process.
//!
//! ```text
//! PoolHeader, padded to POOL_HEADER_BYTES
//! ChunkHeader x chunk_count
//! chunks, each of chunk_bytes, from the next multiple of 4096 on
//! ```
//!
//! A chunk is *free* (in a list that starts at [`PoolHeader::free_head`]), *active* (one thread fills it with records from its start), or *full*.
//! The recorder drains full ones, fills them with zeros, and puts them back into the list. Each thread takes its chunks with rising
//! [`ChunkHeader::sequence`]. When a process dies, everything that it wrote is in its active and full chunks.
//!
//! Invariants: the records of a chunk that is free are zero; only the thread that took a chunk writes its records and its header until it is full;
//! only the recorder turns full into free.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// First word of a pool.
pub const POOL_MAGIC: u64 = u64::from_le_bytes(*b"trapline");

/// Version of these layouts.
pub const POOL_VERSION: u32 = 1;

/// Room for the [`PoolHeader`].
pub const POOL_HEADER_BYTES: usize = 4096;

/// Bytes of one chunk: 4,096 records.
pub const CHUNK_BYTES: usize = 32 << 10;

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
#[derive(Debug, Default)]
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
    /// The first free chunk: its index plus 1 in the low half, 0 for none; the high half counts changes, so that a compare-and-swap cannot be
    /// fooled by a chunk that went and came back.
    pub free_head: AtomicU64,
    /// A futex: counts what the recorder should look at (chunks that became full, requests).
    pub doorbell: AtomicU32,
    /// Not 0 while the recorder sleeps on the doorbell: whoever rings has to wake it.
    pub recorder_sleeps: AtomicU32,
    /// A futex: counts chunks that were freed.
    pub freed: AtomicU32,
    /// Threads that sleep on `freed`.
    pub waiters: AtomicU32,
    /// A futex: counts changes of the set of loaded objects that the recorder has been told of.
    pub requests: AtomicU32,
    /// A futex: the `requests` that the recorder has seen to.
    pub answered: AtomicU32,
    /// The thread that asked last, as it sees itself; written before `requests`. The dynamic linker's lock lets one ask at a time.
    pub requester: AtomicU32,
    /// Records that found no free chunk, and were left out. Two make a call whose return is seen.
    pub lost_full: AtomicU64,
    /// Records in chunks that were overwritten.
    pub lost_overwritten: AtomicU64,
    /// Calls whose returns could not be hooked, for want of memory for shadows: they are recorded as points.
    pub unhooked: AtomicU64,
    /// Nanoseconds that threads waited for a free chunk.
    pub waited_ns: AtomicU64,
    /// Bumped by the recorder whenever it drains: a sign of life.
    pub heartbeat: AtomicU64,
}

/// States of a chunk.
pub mod state {
    /// In the list of free chunks.
    pub const FREE: u32 = 0;
    /// A thread fills it.
    pub const ACTIVE: u32 = 1;
    /// It is complete, but for records of contexts that were interrupted while they wrote one.
    pub const FULL: u32 = 2;
    /// The recorder empties it.
    pub const DRAINING: u32 = 3;
}

/// What is known of a chunk.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct ChunkHeader {
    /// One of [`state`]. Release when it becomes active or full, so that what is below is there for who acquires it.
    pub state: AtomicU32,
    /// The next free chunk, as in [`PoolHeader::free_head`]; only in a free one.
    pub next_free: AtomicU32,
    /// The process that filled it, as its own namespace numbers it: a vfork child shares its parent's pool.
    pub pid: AtomicU32,
    /// The thread.
    pub tid: AtomicU32,
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
    (POOL_HEADER_BYTES + chunk_count * size_of::<ChunkHeader>()).next_multiple_of(4096)
}

/// Bytes of a pool.
pub const fn pool_bytes(chunk_count: usize) -> usize {
    chunks_offset(chunk_count) + chunk_count * CHUNK_BYTES
}

const _: () = assert!(size_of::<PoolHeader>() <= POOL_HEADER_BYTES);
const _: () = assert!(size_of::<ChunkHeader>() == 64);
