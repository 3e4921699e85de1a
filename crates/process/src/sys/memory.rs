//! Reading memory that may not be there.
//!
//! A page in the middle of a readable mapping may still fault: guard pages that are no mapping of their own (`MADV_GUARD_INSTALL`, Linux
//! 6.13), a file that was truncated, poisoned memory. A plain load would kill the reader, so the kernel copies.

use trapline_engine::Addr;

use super::{procfs::Tid, syscall::syscall, task};

/// The address `bytes` further on.
pub(crate) const fn further(addr: Addr, bytes: usize) -> Addr {
    Addr::new(addr.value().wrapping_add(bytes as u64))
}

/// Something to read memory from.
pub(crate) trait Memory {
    /// Copies from `at` on into `buffer`, up to the first byte that cannot be read, and returns how many bytes that was.
    fn read(&self, at: Addr, buffer: &mut [u8]) -> usize;
}

/// The address space that the calling task shares with the process.
pub(crate) struct SharedMemory {
    /// The caller's own process: a task may always read itself.
    pid: Tid,
}

/// The memory of another process, which may be read by who may trace it.
pub(crate) struct OtherMemory {
    /// One of its threads.
    pub(crate) tid: Tid,
}

impl Memory for OtherMemory {
    fn read(&self, at: Addr, buffer: &mut [u8]) -> usize {
        SharedMemory { pid: self.tid }.read(at, buffer)
    }
}

impl SharedMemory {
    /// The memory of the calling task.
    pub(crate) fn own() -> Self {
        Self { pid: task::own_pid() }
    }
}

impl Memory for SharedMemory {
    fn read(&self, at: Addr, buffer: &mut [u8]) -> usize {
        let Ok(from) = usize::try_from(at.value()) else { return 0 };
        let here = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let there = libc::iovec { iov_base: std::ptr::without_provenance_mut(from), iov_len: buffer.len() };
        let pid = self.pid.cast_unsigned() as usize;
        let arguments = [pid, &raw const here as usize, 1, &raw const there as usize, 1, 0];
        // SAFETY: the kernel stores at most `buffer.len()` bytes into `buffer`, and checks the other side itself.
        unsafe { syscall(libc::SYS_process_vm_readv, arguments) }.unwrap_or(0).min(buffer.len())
    }
}

/// Memory that exists in a test only.
#[cfg(test)]
pub(crate) mod fake {
    use super::{Addr, Memory};

    /// Pieces of memory at addresses of one's choice.
    #[derive(Default)]
    pub(crate) struct FakeMemory {
        pieces: Vec<(Addr, Vec<u8>)>,
    }

    impl FakeMemory {
        pub(crate) fn add(&mut self, base: Addr, bytes: Vec<u8>) {
            self.pieces.push((base, bytes));
        }

        pub(crate) fn write(&mut self, at: Addr, bytes: &[u8]) {
            let (base, piece) =
                self.pieces.iter_mut().find(|(base, piece)| offset_in(*base, piece, at).is_some()).unwrap();
            let offset = offset_in(*base, piece, at).unwrap();
            piece[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn offset_in(base: Addr, piece: &[u8], at: Addr) -> Option<usize> {
        usize::try_from(at.distance_from(base)).ok().filter(|offset| *offset < piece.len())
    }

    impl Memory for FakeMemory {
        fn read(&self, at: Addr, buffer: &mut [u8]) -> usize {
            let found = self.pieces.iter().find_map(|(base, piece)| Some(&piece[offset_in(*base, piece, at)?..]));
            let Some(bytes) = found else { return 0 };
            let count = bytes.len().min(buffer.len());
            buffer[..count].copy_from_slice(&bytes[..count]);
            count
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pages::{PAGE_BYTES, TaskStack};

    #[test]
    fn reads_stop_at_the_first_missing_byte() {
        let memory = SharedMemory::own();
        let stack = TaskStack::new(PAGE_BYTES).expect("a stack");
        let top = Addr::new(stack.top() as u64);
        let guard = top.offset(-2 * i64::try_from(PAGE_BYTES).unwrap());
        let mut buffer = [7; 64];
        assert_eq!(memory.read(top.offset(-64), &mut buffer), 64);
        assert_eq!(buffer, [0; 64]);
        assert_eq!(memory.read(guard, &mut buffer), 0, "the guard page");
        assert_eq!(memory.read(guard.offset(i64::try_from(PAGE_BYTES).unwrap() - 8), &mut buffer), 0);
        assert_eq!(memory.read(Addr::new(0), &mut buffer), 0);
        assert_eq!(memory.read(Addr::new(u64::MAX - 8), &mut buffer), 0);
    }
}
