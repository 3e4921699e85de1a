//! A kernel that refuses: by a seccomp filter, by a limit, or because the address space is full.

use std::{mem, ptr, thread};

use trapline_process::Addr;

/// What a thread is not allowed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Denied {
    /// membarrier(2), which fails with this error.
    Membarrier {
        /// As an older kernel, or a sandbox, would answer.
        errno: i32,
    },
    /// openat(2) for writing only, which is how /proc/self/mem is opened.
    OpenForWriting,
}

/// Runs `work` in a thread of its own that is not allowed something. The others are.
pub(crate) fn denying(denied: Denied, work: impl FnOnce() + Send) {
    let work = || {
        denied.forbid();
        work();
    };
    thread::scope(|scope| scope.spawn(work).join().expect("it does not panic"));
}

/// Offsets in `struct seccomp_data` (include/uapi/linux/seccomp.h).
const NUMBER: u32 = 0;
const THIRD_ARGUMENT: u32 = 16 + 2 * 8;

impl Denied {
    /// Forbids it to the calling thread, for ever.
    fn forbid(self) {
        let statement = |code: u32, k: u32| libc::sock_filter { code: narrow(code), jt: 0, jf: 0, k };
        let unless_equal =
            |k, jf| libc::sock_filter { code: narrow(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K), jt: 0, jf, k };
        let load = |at| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at);
        let answer = |value| statement(libc::BPF_RET | libc::BPF_K, value);
        let fail = |errno: i32| answer(libc::SECCOMP_RET_ERRNO | errno.cast_unsigned());
        let mut program = match self {
            Self::Membarrier { errno } => {
                vec![
                    load(NUMBER),
                    unless_equal(number(libc::SYS_membarrier), 1),
                    fail(errno),
                    answer(libc::SECCOMP_RET_ALLOW),
                ]
            }
            Self::OpenForWriting => vec![
                load(NUMBER),
                unless_equal(number(libc::SYS_openat), 4),
                load(THIRD_ARGUMENT),
                statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, libc::O_ACCMODE.cast_unsigned()),
                unless_equal(libc::O_WRONLY.cast_unsigned(), 1),
                fail(libc::EACCES),
                answer(libc::SECCOMP_RET_ALLOW),
            ],
        };
        let filter = libc::sock_fprog { len: program.len().try_into().expect("short"), filter: program.as_mut_ptr() };
        // SAFETY: takes numbers.
        let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        assert_eq!(result, 0);
        // SAFETY: the kernel copies the program, which is live.
        let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

fn narrow(code: u32) -> u16 {
    code.try_into().expect("the codes have 16 bits")
}

fn number(call: libc::c_long) -> u32 {
    call.try_into().expect("system calls have small numbers")
}

/// A process that cannot open any more files.
pub(crate) struct NoDescriptors(libc::rlimit);

impl NoDescriptors {
    pub(crate) fn begin() -> Self {
        // SAFETY: all zero is a valid limit.
        let mut before: libc::rlimit = unsafe { mem::zeroed() };
        // SAFETY: a live local.
        let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut before) };
        assert_eq!(result, 0);
        set_limit(&libc::rlimit { rlim_cur: 0, ..before });
        Self(before)
    }
}

impl Drop for NoDescriptors {
    fn drop(&mut self) {
        set_limit(&self.0);
    }
}

fn set_limit(limit: &libc::rlimit) {
    // SAFETY: the limit is live.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, ptr::from_ref(limit)) };
    assert_eq!(result, 0);
}

/// All free address space within reach of a place, taken.
pub(crate) struct Reservation(Vec<(usize, usize)>);

impl Reservation {
    /// Maps pages without any permission over every gap within 2 GiB of `near`, and a little more.
    pub(crate) fn around(near: Addr) -> Self {
        const REACH: u64 = (2 << 30) + (64 << 20);
        let mut reservation = Self(Vec::with_capacity(4096));
        let (first, last) = (near.value().saturating_sub(REACH).max(1 << 16), near.value() + REACH);
        let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
        let mut free_from = first;
        let ranges = maps.lines().map(|line| {
            let (start, end) = line.split_whitespace().next().and_then(|range| range.split_once('-')).expect("a range");
            [start, end].map(|bound| u64::from_str_radix(bound, 16).expect("hexadecimal"))
        });
        for [start, end] in ranges.chain([[last, last]]) {
            if free_from < start.min(last) {
                reservation.take(free_from, start.min(last));
            }
            free_from = free_from.max(end);
        }
        reservation
    }

    fn take(&mut self, start: u64, end: u64) {
        let (start, end) = (start.next_multiple_of(4096), end / 4096 * 4096);
        if start >= end {
            return;
        }
        let [start, len] = [start, end - start].map(|number| usize::try_from(number).expect("an address"));
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: refuses where something is mapped, so nothing that exists is touched.
        let mapped = unsafe { libc::mmap(ptr::with_exposed_provenance_mut(start), len, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(mapped, libc::MAP_FAILED, "{start:#x} {len:#x}: {}", std::io::Error::last_os_error());
        self.0.push((start, len));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        for (start, len) in &self.0 {
            // SAFETY: mapped by `take`, and never accessed.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(*start), *len) };
        }
    }
}
