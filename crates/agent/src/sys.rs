//! System calls by number: the C library's own would change `errno`, and may be traced themselves.
//!
//! Owns one function for each call that the agent needs, and [`SignalsBlocked`]. Invariants: whatever a call answers, the agent has a way to go on; a
//! call that a sandbox forbids, as far as that is known, is not made: the kernel might answer with death.

use core::sync::atomic::{AtomicU32, Ordering};

use trapline_abi::agent::Call;

use crate::arch;

/// Whether a call may be made.
pub(crate) fn is_allowed(call: Call) -> bool {
    arch::config_forbidden().load(Ordering::Relaxed) & calls(call.bit()) == 0
}

/// A set of calls, as a word of the machine: there are far fewer than that has bits.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
pub(crate) fn calls(bits: u64) -> usize {
    bits as usize
}

/// Makes a call, unless it is forbidden.
///
/// # Safety
/// As the call demands.
unsafe fn make(call: Call, arguments: [usize; 6]) -> Option<isize> {
    // SAFETY: the caller's promise.
    is_allowed(call).then(|| unsafe { arch::syscall(arch::CALLS[call as usize] as usize, arguments) })
}

/// Numbers of errors (include/uapi/asm-generic/errno-base.h).
pub(crate) mod error {
    pub(crate) const ESRCH: isize = -3;
    #[cfg(target_pointer_width = "64")]
    pub(crate) const EEXIST: isize = -17;
}

/// `struct timespec`, at 32 bit that of the calls that are older than 2038 (`struct old_timespec32`).
#[repr(C)]
struct Timespec {
    seconds: usize,
    nanoseconds: usize,
}

/// Nanoseconds in a second.
const SECOND_NS: u32 = 1_000_000_000;

impl Timespec {
    fn new(ns: u32) -> Self {
        Self { seconds: (ns / SECOND_NS) as usize, nanoseconds: (ns % SECOND_NS) as usize }
    }
}

/// While this lives, no signal handler runs in the calling thread, so that what it does is not interrupted, nor left half-way by longjmp.
#[derive(Debug)]
pub(crate) struct SignalsBlocked {
    before: u64,
}

/// Bytes of the kernel's signal sets.
const SIGNAL_SET_BYTES: usize = 8;

impl SignalsBlocked {
    pub(crate) fn new() -> Self {
        const SIG_BLOCK: usize = 0;
        let all = u64::MAX;
        let mut before = 0_u64;
        let arguments = [SIG_BLOCK, (&raw const all) as usize, (&raw mut before) as usize, SIGNAL_SET_BYTES, 0, 0];
        // SAFETY: both pointers lead to 8 bytes that outlive the call.
        unsafe { make(Call::Sigprocmask, arguments) };
        Self { before }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        const SIG_SETMASK: usize = 2;
        let arguments = [SIG_SETMASK, (&raw const self.before) as usize, 0, SIGNAL_SET_BYTES, 0, 0];
        // SAFETY: the pointer leads to 8 bytes that outlive the call.
        unsafe { make(Call::Sigprocmask, arguments) };
    }
}

/// The process, as it sees itself.
pub(crate) fn process_id() -> Option<u32> {
    // SAFETY: has no effect.
    let id = unsafe { make(Call::Getpid, [0; 6]) };
    u32::try_from(id?).ok()
}

/// The thread, as it sees itself.
pub(crate) fn thread_id() -> Option<u32> {
    // SAFETY: has no effect.
    let id = unsafe { make(Call::Gettid, [0; 6]) };
    u32::try_from(id?).ok()
}

/// Whether there certainly is no process of this number in our namespace.
pub(crate) fn is_gone(process: u32) -> bool {
    // SAFETY: signal 0 only asks.
    let answer = unsafe { make(Call::Kill, [process as usize, 0, 0, 0, 0, 0]) };
    answer == Some(error::ESRCH)
}

/// So often a thread looks that may not sleep, nor perhaps read a clock; some dozens of milliseconds.
const SPINS: u32 = 1 << 20;

/// Spins while `goes_on`, at most for [`SPINS`].
fn spin(goes_on: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if !goes_on() {
            break;
        }
        arch::relax();
    }
}

/// Sleeps for about this long, less if a signal comes.
pub(crate) fn sleep_ns(ns: u32) {
    let time = Timespec::new(ns);
    // SAFETY: the pointer leads to a timespec that outlives the call.
    if unsafe { make(Call::Nanosleep, [(&raw const time) as usize, 0, 0, 0, 0, 0]) }.is_none() {
        spin(|| true);
    }
}

/// Waits while `word` is `value`, at most for `ns`. May return at any time.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32, ns: u32) {
    const FUTEX_WAIT: usize = 0;
    let time = Timespec::new(ns);
    let arguments = [(&raw const *word) as usize, FUTEX_WAIT, value as usize, (&raw const time) as usize, 0, 0];
    // SAFETY: both pointers lead to what the call reads, and outlive it.
    if unsafe { make(Call::Futex, arguments) }.is_none() {
        spin(|| word.load(Ordering::Relaxed) == value);
    }
}

/// Wakes whoever waits for `word` to change.
pub(crate) fn futex_wake_all(word: &AtomicU32) {
    const FUTEX_WAKE: usize = 1;
    let everyone = i32::MAX.cast_unsigned() as usize;
    // SAFETY: the word is only an address for this call.
    unsafe { make(Call::Futex, [(&raw const *word) as usize, FUTEX_WAKE, everyone, 0, 0, 0]) };
}

/// How a place for a mapping was found.
#[cfg(target_pointer_width = "64")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MapResult {
    /// It is ours now.
    Mapped,
    /// Something is there already.
    Occupied,
    /// There is no memory, or the kernel forbids it.
    Failed,
}

const PROT_READ_WRITE: usize = 1 | 2;
const MAP_PRIVATE_ANONYMOUS: usize = 0x2 | 0x20;
const MAP_NORESERVE: usize = 0x4000;

/// A huge page for each thread's few frames would be 2 MiB a thread.
fn forbid_huge_pages(address: usize, len_bytes: usize) {
    const MADV_NOHUGEPAGE: usize = 15;
    // SAFETY: advice about a mapping of ours.
    unsafe { make(Call::Madvise, [address, len_bytes, MADV_NOHUGEPAGE, 0, 0, 0]) };
}

/// Takes a mapping of ours away that nobody knows.
pub(crate) fn unmap(address: usize, len_bytes: usize) {
    // SAFETY: by the caller's word.
    unsafe { make(Call::Munmap, [address, len_bytes, 0, 0, 0, 0]) };
}

/// Maps zeros that can be read and written at exactly this address, if nothing is there.
#[cfg(target_pointer_width = "64")]
pub(crate) fn map_at(address: usize, len_bytes: usize) -> MapResult {
    const MAP_FIXED_NOREPLACE: usize = 0x10_0000;
    let flags = MAP_PRIVATE_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    // SAFETY: a new mapping that replaces none.
    let result = unsafe { make(Call::Mmap, [address, len_bytes, PROT_READ_WRITE, flags, usize::MAX, 0]) };
    let Some(result) = result else { return MapResult::Failed };
    if result == error::EEXIST {
        return MapResult::Occupied;
    }
    if result.cast_unsigned() != address {
        if result > 0 {
            // A kernel before 4.17 takes the address for a hint.
            unmap(result.cast_unsigned(), len_bytes);
            return MapResult::Occupied;
        }
        return MapResult::Failed;
    }
    forbid_huge_pages(address, len_bytes);
    MapResult::Mapped
}

/// Maps zeros that can be read and written wherever there is room.
#[cfg(target_pointer_width = "32")]
pub(crate) fn map_anywhere(len_bytes: usize) -> Option<usize> {
    const MAX_ERRNO: isize = 4095;
    let flags = MAP_PRIVATE_ANONYMOUS | MAP_NORESERVE;
    // SAFETY: a new mapping that replaces none.
    let result = unsafe { make(Call::Mmap, [0, len_bytes, PROT_READ_WRITE, flags, usize::MAX, 0]) }?;
    if (-MAX_ERRNO..0).contains(&result) {
        return None;
    }
    forbid_huge_pages(result.cast_unsigned(), len_bytes);
    Some(result.cast_unsigned())
}

/// The thread's alternate signal stack: its first address, and the first behind it. Empty if there is none.
pub(crate) fn signal_stack() -> (usize, usize) {
    /// `stack_t`.
    #[repr(C)]
    struct Stack {
        start: usize,
        flags: i32,
        len_bytes: usize,
    }
    const SS_DISABLE: i32 = 2;
    let mut stack = Stack { start: 0, flags: SS_DISABLE, len_bytes: 0 };
    // SAFETY: the pointer leads to a stack_t that outlives the call.
    unsafe { make(Call::Sigaltstack, [0, (&raw mut stack) as usize, 0, 0, 0, 0]) };
    if stack.flags & SS_DISABLE != 0 { (0, 0) } else { (stack.start, stack.start.wrapping_add(stack.len_bytes)) }
}
