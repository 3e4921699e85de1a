//! Writing text that other threads execute, without a page that is writable and executable.
//!
//! Owns [`TextWriter`] and the gathering of single stores into runs: a system call costs the same for one byte and for a page, and a batch has
//! thousands of stores. Neighbours: the engine gives the stores, sorted; [`membarrier`](super::membarrier) follows. Invariant: a run covers
//! bytes only of pages in which a store lies, and rewrites the bytes in between with what they are.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    os::unix::{fs::FileExt, fs::OpenOptionsExt},
    ptr,
};

use trapline_engine::{Addr, AddrRange, poke::TextWrite};

use crate::{
    error::HostError,
    sys::{pages::PAGE_BYTES, syscall::syscall, valgrind},
};

/// The ways to write text. [`Tracer::text_writer`](crate::Tracer::text_writer) tells which one is in use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TextWriter {
    /// Through /proc/self/mem, which the kernel lets write to read-only private mappings. The mapping keeps its name, so debuggers and profilers still
    /// find its symbols. Kernels with `proc_mem.force_override=never` forbid it.
    ProcMem,
    /// By mapping a changed copy of each page over it, in one step for the threads that execute it. Always possible, slower, and the pages
    /// lose their file name in /proc/self/maps.
    Remap,
}

impl fmt::Display for TextWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProcMem => "/proc/self/mem",
            Self::Remap => "remapped pages",
        })
    }
}

/// A run is written once it is this long.
const RUN_BYTES: usize = 256 * 1024;

impl TextWriter {
    /// The best writer that works here, tried on `probe`: an address of text whose first byte is written with its own value.
    pub(super) fn choose(probe: Addr) -> Self {
        let byte = read_bytes(probe, 1);
        let written = open_proc_mem().and_then(|memory| memory.write_all_at(&byte, probe.value()));
        if written.is_ok() { Self::ProcMem } else { Self::Remap }
    }

    /// Stores `writes`, which come sorted by address.
    pub(super) fn write(self, mut writes: impl Iterator<Item = TextWrite>) -> Result<(), HostError> {
        let mut run = Run::default();
        writes.try_for_each(|write| -> Result<(), HostError> {
            if run.store(&write) {
                return Ok(());
            }
            if !run.reaches(write.at) {
                self.flush(&mut run)?;
                run.start = write.at;
            }
            run.extend_to(&write);
            Ok(())
        })?;
        self.flush(&mut run)
    }

    fn flush(self, run: &mut Run) -> Result<(), HostError> {
        let len_bytes = run.len;
        if len_bytes == 0 {
            return Ok(());
        }
        let result = match self {
            Self::ProcMem => write_proc_mem(run.start, &run.bytes[..len_bytes]),
            Self::Remap => remap(run.start, &run.bytes[..len_bytes]),
        };
        valgrind::discard_translations(AddrRange::new(run.start, len_bytes as u64));
        run.bytes.clear();
        run.len = 0;
        result.map_err(|source| HostError::WriteText { at: run.start, len_bytes, writer: self, source })
    }
}

/// Bytes to be written side by side.
#[derive(Default)]
struct Run {
    start: Addr,
    /// The text from `start` on, with the stores in it; copied a page at a time, so it may go on behind the last store.
    bytes: Vec<u8>,
    /// How many of them there are up to the end of the last store.
    len: usize,
}

impl Run {
    /// Behind the last store.
    fn end(&self) -> Addr {
        self.start.after(self.len)
    }

    /// Whether the run may go on to `at`: on the page where it ends, or on the next one. Then what is in between is text as well, since both
    /// pages hold stores.
    fn reaches(&self, at: Addr) -> bool {
        let page = |addr: Addr| addr.value() / PAGE_BYTES as u64;
        self.len != 0 && self.len < RUN_BYTES && page(at).wrapping_sub(page(self.end().offset(-1))) <= 1
    }

    /// Takes in a store to text that is copied already; false if it is not.
    #[inline]
    fn store(&mut self, write: &TextWrite) -> bool {
        let Ok(offset) = usize::try_from(write.at.distance_from(self.start)) else { return false };
        let end = offset + write.bytes.len();
        if end > self.bytes.len() {
            return false;
        }
        write.bytes.store(&mut self.bytes[offset..end]);
        self.len = end;
        true
    }

    /// Copies text up to the end of the page on which a store ends, and takes it in.
    #[cold]
    fn extend_to(&mut self, write: &TextWrite) {
        let copied = self.start.after(self.bytes.len());
        let page_end = write.at.after(write.bytes.len()).offset(-1).value() | (PAGE_BYTES as u64 - 1);
        let missing = Addr::new(page_end).offset(1).distance_from(copied);
        append_text(&mut self.bytes, copied, usize::try_from(missing).unwrap_or(0));
        self.store(write);
    }
}

fn pointer(at: Addr) -> *mut u8 {
    #[expect(clippy::cast_possible_truncation, reason = "addresses of the own process")]
    ptr::with_exposed_provenance_mut(at.value() as usize)
}

/// Appends a copy of text, which the loader has mapped readable and which the tracer verified at the beginning of the batch.
fn append_text(bytes: &mut Vec<u8>, at: Addr, len: usize) {
    let old_len = bytes.len();
    bytes.resize(old_len + len, 0);
    let room = &mut bytes[old_len..];
    // SAFETY: (1) the source lies on pages in which verified sites lie, so it is mapped and readable; (2) the destination is a slice of this
    // length; (3) sites may not be written by anybody but the tracer meanwhile, which holds its lock.
    unsafe { ptr::copy_nonoverlapping(pointer(at), room.as_mut_ptr(), len) };
}

fn read_bytes(at: Addr, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    append_text(&mut bytes, at, len);
    bytes
}

/// Opened for each run: a descriptor that is kept would be inherited by a forked child, where it still means the parent's memory, and a program that
/// closes all descriptors might reuse its number.
fn open_proc_mem() -> io::Result<File> {
    OpenOptions::new().write(true).custom_flags(libc::O_CLOEXEC).open("/proc/self/mem")
}

/// Where the file cannot be opened any more (no descriptor is left, a sandbox was entered since) pages are remapped: a batch that is half done has to go
/// on, and undoing it would take the same means.
fn write_proc_mem(at: Addr, bytes: &[u8]) -> io::Result<()> {
    match open_proc_mem() {
        Ok(memory) => memory.write_all_at(bytes, at.value()),
        Err(_) => remap(at, bytes),
    }
}

/// Replaces the pages around `at` by changed copies: mremap(2) takes the old mapping away and puts the new one there under the lock that a page fault
/// of another thread waits for, so that no thread finds nothing.
fn remap(at: Addr, bytes: &[u8]) -> io::Result<()> {
    let page_bytes = PAGE_BYTES as u64;
    let first = Addr::new(at.value() / page_bytes * page_bytes);
    let before = usize::try_from(at.distance_from(first)).unwrap_or(0);
    let len = (before + bytes.len()).next_multiple_of(PAGE_BYTES);
    let mut copy = read_bytes(first, len);
    copy[before..before + bytes.len()].copy_from_slice(bytes);

    let fresh = map_private(len)?;
    // SAFETY: `fresh` is a writable mapping of `len` bytes that nobody else knows.
    unsafe { ptr::copy_nonoverlapping(copy.as_ptr(), ptr::with_exposed_provenance_mut(fresh), len) };
    let read_execute = (libc::PROT_READ | libc::PROT_EXEC).cast_unsigned() as usize;
    // SAFETY: as above; the mapping stops being writable before it becomes text.
    let protected = unsafe { syscall(libc::SYS_mprotect, [fresh, len, read_execute]) };
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).cast_unsigned() as usize;
    let to = pointer(first).expose_provenance();
    // SAFETY: the pages at `to` are text that stays what it was but for the stores that the engine ordered; threads that execute it see either
    // mapping whole.
    let moved = protected.and_then(|_| unsafe { syscall(libc::SYS_mremap, [fresh, len, len, flags, to]) });
    if let Err(error) = moved {
        // SAFETY: the mapping is still where it was made, and unused.
        let _ = unsafe { syscall(libc::SYS_munmap, [fresh, len]) };
        return Err(io::Error::from_raw_os_error(error.0));
    }
    Ok(())
}

fn map_private(len: usize) -> io::Result<usize> {
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(base.expose_provenance()) }
}

#[cfg(test)]
mod tests {
    use trapline_engine::insn::InsnBytes;

    use super::*;

    fn write_at(at: u64) -> TextWrite {
        TextWrite { at: Addr::new(at), bytes: InsnBytes::new(&[0xcc]) }
    }

    #[test]
    fn a_run_never_covers_a_page_without_a_store() {
        let run = Run { start: Addr::new(0x1010), bytes: vec![0; 0xff0], len: 1 };
        assert!(run.reaches(Addr::new(0x1ff0)));
        assert!(run.reaches(Addr::new(0x2ff0)), "the next page");
        assert!(!run.reaches(Addr::new(0x3000)), "0x2000 may be data");
        assert!(!Run::default().reaches(Addr::new(0)));
    }

    /// Two pages of text, a page apart, filled with int3s.
    struct Text(usize);

    const LEN: usize = 3 * PAGE_BYTES;

    impl Text {
        fn new() -> Self {
            let base = map_private(LEN).unwrap();
            // SAFETY: a fresh mapping of this length.
            unsafe { ptr::write_bytes(ptr::with_exposed_provenance_mut::<u8>(base), 0x90, LEN) };
            let protection = libc::PROT_READ | libc::PROT_EXEC;
            // SAFETY: as above.
            let answer = unsafe { libc::mprotect(ptr::with_exposed_provenance_mut(base), LEN, protection) };
            assert_eq!(answer, 0);
            Self(base)
        }
    }

    impl Drop for Text {
        fn drop(&mut self) {
            // SAFETY: the mapping is this test's own.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.0), LEN) };
        }
    }

    #[test]
    fn both_writers_store_what_they_are_told_and_nothing_else() {
        for writer in [TextWriter::ProcMem, TextWriter::Remap] {
            let text = Text::new();
            let base = text.0 as u64;
            let offsets = [0x10, 0x20, 0xfff, 0x1000, 0x2abc];
            writer.write(offsets.iter().map(|offset| write_at(base + offset))).unwrap();
            let bytes = read_bytes(Addr::new(base), LEN);
            for (offset, byte) in bytes.iter().enumerate() {
                let expected = if offsets.contains(&(offset as u64)) { 0xcc } else { 0x90 };
                assert_eq!(*byte, expected, "{writer} at {offset:#x}");
            }
        }
    }

    #[test]
    fn a_write_to_nowhere_is_an_error_with_the_address() {
        let mut run = Run { start: Addr::new(0x10), bytes: vec![0xcc], len: 1 };
        let error = TextWriter::ProcMem.flush(&mut run).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot write 1 bytes of text at 0x10 through /proc/self/mem"),
            "{error}"
        );
    }
}
