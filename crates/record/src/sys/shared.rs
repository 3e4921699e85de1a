//! Memory that the recorder shares with its targets: files without a name.
//!
//! Owns [`SharedMemory`] and [`sealed_file`]. Targets open them as `/proc/PID/fd/N`, which the kernel allows to the recorder's own user alone.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Write},
    ops::Range,
    os::fd::{AsRawFd, FromRawFd, RawFd},
    ptr::NonNull,
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
};

use trapline_abi::{
    counters::CountersHeader,
    pool::{ChunkHeader, PoolHeader},
};

use super::check;

/// Does something while files may be as large as they may be for this user: the limit for a file's size holds for memory that has a descriptor, too, but
/// is not meant for it.
fn without_file_limit<T>(make: impl FnOnce() -> T) -> T {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit outlives the call.
    let is_limited =
        unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) } == 0 && limit.rlim_cur != libc::RLIM_INFINITY;
    if !is_limited {
        return make();
    }
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    let highest = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    // Root may go beyond the upper limit. If neither works, what is made fails, and says so.
    // SAFETY: the limit outlives the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const unlimited) } != 0 {
        // SAFETY: as above.
        unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const highest) };
    }
    let result = make();
    // SAFETY: as above.
    unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
    result
}

fn memfd(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a string that outlives the call.
    let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) };
    check(descriptor.into())?;
    // SAFETY: the descriptor was just made, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// A file without a name that nobody can change any more.
pub(crate) fn sealed_file(name: &CStr, content: &[u8]) -> io::Result<File> {
    let mut file = memfd(name, libc::MFD_ALLOW_SEALING)?;
    without_file_limit(|| file.write_all(content))?;
    let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
    // SAFETY: plain numbers.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }.into())?;
    Ok(file)
}

/// The path by which other processes of the same user open a file that we have open.
pub(crate) fn path_for_others(descriptor: RawFd) -> String {
    format!("/proc/{}/fd/{descriptor}", std::process::id())
}

/// A mapping of a file without a name, all zero at first. Pages that nobody touched take no memory.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    file: File,
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: (1) the mapping lives as long as the value; (2) it is only read and written through atomics.
unsafe impl Send for SharedMemory {}
// SAFETY: as for `Send`.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// `len_bytes` of zeros.
    pub(crate) fn new(name: &CStr, len_bytes: usize) -> io::Result<Self> {
        let file = memfd(name, 0)?;
        without_file_limit(|| file.set_len(len_bytes as u64))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len_bytes, protection, flags, file.as_raw_fd(), 0) };
        let start = NonNull::new(start.cast::<u8>()).filter(|start| start.as_ptr().cast() != libc::MAP_FAILED);
        let start = start.ok_or_else(io::Error::last_os_error)?;
        Ok(Self { file, start, len_bytes })
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// How much it is.
    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    fn at<T>(&self, offset: usize) -> *const T {
        assert!(
            offset + size_of::<T>() <= self.len_bytes && offset.is_multiple_of(align_of::<T>()),
            "outside of the shared memory"
        );
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.start.as_ptr().add(offset) }.cast()
    }

    /// Stores bytes from `offset` on, each whole.
    pub(crate) fn fill(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len_bytes, "outside of the shared memory");
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: (1) `at` checks bounds; (2) an atomic of all bits.
            let place = unsafe { &*self.at::<AtomicU8>(offset + index) };
            place.store(*byte, Ordering::Relaxed);
        }
    }

    /// The byte at `offset`.
    pub(crate) fn byte(&self, offset: usize) -> u8 {
        // SAFETY: (1) `at` checks bounds; (2) an atomic of all bits.
        unsafe { &*self.at::<AtomicU8>(offset) }.load(Ordering::Relaxed)
    }

    /// The pool's header.
    pub(crate) fn header(&self) -> &PoolHeader {
        // SAFETY: (1) `at` checks bounds and alignment; (2) it is made of atomics, for which all bits are values.
        unsafe { &*self.at::<PoolHeader>(0) }
    }

    /// The header of a chunk, at this offset in bytes.
    pub(crate) fn chunk_header(&self, offset: usize) -> &ChunkHeader {
        // SAFETY: as in `header`.
        unsafe { &*self.at::<ChunkHeader>(offset) }
    }

    /// The counters' header.
    pub(crate) fn counters_header(&self) -> &CountersHeader {
        // SAFETY: as in `header`.
        unsafe { &*self.at::<CountersHeader>(0) }
    }

    /// The parts between two offsets that somebody has written to, by whole pages. To read anything else would have it take memory.
    pub(crate) fn written(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let seek = |from: usize, whence: libc::c_int| {
            // SAFETY: plain numbers.
            let found = unsafe { libc::lseek64(self.file.as_raw_fd(), in_file(from), whence) };
            // An error means that there is nothing behind it.
            usize::try_from(found).ok()
        };
        let (mut parts, mut at) = (Vec::new(), range.start);
        while let Some(start) = seek(at, libc::SEEK_DATA).filter(|start| *start < range.end) {
            let end = seek(start, libc::SEEK_HOLE).unwrap_or(range.end).min(range.end);
            parts.push(start..end);
            at = end;
            if at >= range.end {
                break;
            }
        }
        parts
    }

    /// Makes whole pages zero again, which take no memory then.
    pub(crate) fn clear(&self, range: Range<usize>) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (start, len_bytes) = (in_file(range.start), in_file(range.len()));
        // SAFETY: plain numbers.
        check(unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, start, len_bytes) }.into())?;
        Ok(())
    }

    /// Words from `offset` in bytes on.
    pub(crate) fn words(&self, offset: usize, count: usize) -> &[AtomicU64] {
        assert!(offset + count * 8 <= self.len_bytes, "outside of the shared memory");
        // SAFETY: (1) `at` checks the first word, the line above the others; (2) atomics of all bits.
        unsafe { std::slice::from_raw_parts(self.at::<AtomicU64>(offset), count) }
    }
}

/// An offset, as system calls want it.
fn in_file(offset: usize) -> libc::off64_t {
    libc::off64_t::try_from(offset).unwrap_or(libc::off64_t::MAX)
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: (1) this is the mapping that `new` made; (2) references into it borrow from `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

/// Wakes everybody who sleeps on a word, in whatever process.
pub(crate) fn wake_all(word: &AtomicU32) {
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) };
}

/// Whether the kernel can have all processors that run a process synchronise their instructions with memory.
pub(crate) fn can_sync_cores() -> bool {
    const QUERY: libc::c_int = 0;
    const SYNC_CORE: libc::c_long = 1 << 5;
    // SAFETY: plain numbers.
    let commands = unsafe { libc::syscall(libc::SYS_membarrier, QUERY, 0, 0) };
    commands >= 0 && commands & SYNC_CORE != 0
}

/// The time-stamp counter.
pub(crate) fn tsc() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every CPU of this kind has it, and Linux does not forbid it.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(target_arch = "x86")]
    // SAFETY: as above.
    unsafe {
        core::arch::x86::_rdtsc()
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let [seconds, nanoseconds] = [time.tv_sec, time.tv_nsec].map(|part| u64::try_from(part).unwrap_or(0));
    seconds * 1_000_000_000 + nanoseconds
}
