//! Every call of the operating system that the recorder makes, each behind a safe function.
//!
//! Owns ptrace and wait ([`ptrace`]), a target's memory ([`memory`]), its mappings ([`maps`]), shared memory of our own ([`shared`]), descriptors of
//! others ([`descriptors`]), and the start of a child ([`spawn`]). Nobody else in this crate is unsafe but
//! who looks at the bytes of code of ours (`live::code`). Invariant: an error is the kernel's own, and
//! whoever calls adds what was being done.

pub(crate) mod descriptors;
pub(crate) mod maps;
pub(crate) mod memory;
pub(crate) mod ptrace;
pub(crate) mod shared;
pub(crate) mod spawn;
pub(crate) mod width;

use std::{collections::HashMap, fs, io, num::NonZero, slice::Chunks, thread};

use trapline_engine::Mode;

/// A thread's id, as the recorder's own pid namespace numbers it.
pub(crate) type Tid = i32;

/// The threads of a process; none if it is gone.
pub(crate) fn threads_of(pid: Tid) -> Vec<Tid> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// Threads, as many at a time as there are processors: of more that are let go on for a moment, most would wait all the time for one.
pub(crate) fn by_processors(tids: &[Tid]) -> Chunks<'_, Tid> {
    tids.chunks(thread::available_parallelism().map_or(1, NonZero::get))
}

/// What the kernel told a program when it started (getauxval(3)).
pub(crate) fn auxiliary_vector(pid: Tid, mode: Mode) -> io::Result<HashMap<u64, u64>> {
    let bytes = fs::read(format!("/proc/{pid}/auxv"))?;
    let words: Vec<u64> = match mode {
        Mode::Bits32 => bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word).into()).collect(),
        Mode::Bits64 => bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect(),
    };
    Ok(words.as_chunks().0.iter().map(|[key, value]| (*key, *value)).collect())
}

/// The kernel's -1 as an error.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
