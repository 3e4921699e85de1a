//! System calls by number: the C library's own would change `errno`, and may be traced themselves.
//!
//! Owns one function for each call that the agent needs, and [`SignalsBlocked`]. Invariants: whatever a call answers, the agent has a way to go on; a
//! call that a sandbox forbids, as far as that is known, is not made: the kernel might answer with death.

use core::sync::atomic::{AtomicU32, Ordering};

use trapline_abi::agent::{CALLS, Call};

use crate::arch;

/// Whether a call may be made.
pub(crate) fn is_allowed(call: Call) -> bool {
    arch::config_forbidden().load(Ordering::Relaxed) & call.bit() == 0
}

/// Makes a call, unless it is forbidden.
///
/// # Safety
/// As the call demands.
unsafe fn make(call: Call, arguments: [u64; 6]) -> Option<i64> {
    // SAFETY: the caller's promise.
    is_allowed(call).then(|| unsafe { arch::syscall(CALLS[call as usize].into(), arguments) })
}

/// Numbers of errors (include/uapi/asm-generic/errno-base.h).
pub(crate) mod error {
    pub(crate) const ESRCH: i64 = -3;
    pub(crate) const EEXIST: i64 = -17;
}

/// `struct timespec`.
#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;

impl Timespec {
    fn new(ns: u64) -> Self {
        Self { seconds: (ns / SECOND_NS).cast_signed(), nanoseconds: (ns % SECOND_NS).cast_signed() }
    }
}

/// While this lives, no signal handler runs in the calling thread, so that what it does is not interrupted, nor left half-way by longjmp.
#[derive(Debug)]
pub(crate) struct SignalsBlocked {
    before: u64,
}

/// Bytes of the kernel's signal sets.
const SIGNAL_SET_BYTES: u64 = 8;

impl SignalsBlocked {
    pub(crate) fn new() -> Self {
        const SIG_BLOCK: u64 = 0;
        let all = u64::MAX;
        let mut before = 0_u64;
        let arguments = [SIG_BLOCK, (&raw const all) as u64, (&raw mut before) as u64, SIGNAL_SET_BYTES, 0, 0];
        // SAFETY: both pointers lead to 8 bytes that outlive the call.
        unsafe { make(Call::Sigprocmask, arguments) };
        Self { before }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        const SIG_SETMASK: u64 = 2;
        let arguments = [SIG_SETMASK, (&raw const self.before) as u64, 0, SIGNAL_SET_BYTES, 0, 0];
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
    let answer = unsafe { make(Call::Kill, [process.into(), 0, 0, 0, 0, 0]) };
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
pub(crate) fn sleep_ns(ns: u64) {
    let time = Timespec::new(ns);
    // SAFETY: the pointer leads to a timespec that outlives the call.
    if unsafe { make(Call::Nanosleep, [(&raw const time) as u64, 0, 0, 0, 0, 0]) }.is_none() {
        spin(|| true);
    }
}

/// Waits while `word` is `value`, at most for `ns`. May return at any time.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32, ns: u64) {
    const FUTEX_WAIT: u64 = 0;
    let time = Timespec::new(ns);
    let arguments = [(&raw const *word) as u64, FUTEX_WAIT, value.into(), (&raw const time) as u64, 0, 0];
    // SAFETY: both pointers lead to what the call reads, and outlive it.
    if unsafe { make(Call::Futex, arguments) }.is_none() {
        spin(|| word.load(Ordering::Relaxed) == value);
    }
}

/// Wakes whoever waits for `word` to change.
pub(crate) fn futex_wake_all(word: &AtomicU32) {
    const FUTEX_WAKE: u64 = 1;
    let everyone = u64::from(i32::MAX.cast_unsigned());
    // SAFETY: the word is only an address for this call.
    unsafe { make(Call::Futex, [(&raw const *word) as u64, FUTEX_WAKE, everyone, 0, 0, 0]) };
}

/// How a place for a mapping was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MapResult {
    /// It is ours now.
    Mapped,
    /// Something is there already.
    Occupied,
    /// There is no memory, or the kernel forbids it.
    Failed,
}

/// Maps zeros that can be read and written at exactly this address, if nothing is there.
pub(crate) fn map_at(address: u64, len_bytes: u64) -> MapResult {
    const PROT_READ_WRITE: u64 = 1 | 2;
    const MAP_PRIVATE_ANONYMOUS: u64 = 0x2 | 0x20;
    const MAP_NORESERVE: u64 = 0x4000;
    const MAP_FIXED_NOREPLACE: u64 = 0x10_0000;
    const MADV_NOHUGEPAGE: u64 = 15;
    let flags = MAP_PRIVATE_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    // SAFETY: a new mapping that replaces none.
    let result = unsafe { make(Call::Mmap, [address, len_bytes, PROT_READ_WRITE, flags, u64::MAX, 0]) };
    let Some(result) = result else { return MapResult::Failed };
    if result == error::EEXIST {
        return MapResult::Occupied;
    }
    if result.cast_unsigned() != address {
        if result > 0 {
            // A kernel before 4.17 takes the address for a hint.
            // SAFETY: the mapping is the one that was just made, and nobody knows it.
            unsafe { make(Call::Munmap, [result.cast_unsigned(), len_bytes, 0, 0, 0, 0]) };
            return MapResult::Occupied;
        }
        return MapResult::Failed;
    }
    // A huge page for each thread's few frames would be 2 MiB a thread.
    // SAFETY: advice about a mapping of ours.
    unsafe { make(Call::Madvise, [address, len_bytes, MADV_NOHUGEPAGE, 0, 0, 0]) };
    MapResult::Mapped
}

/// The thread's alternate signal stack: its first address, and the first behind it. Empty if there is none.
pub(crate) fn signal_stack() -> (u64, u64) {
    /// `stack_t`.
    #[repr(C)]
    struct Stack {
        start: u64,
        flags: i32,
        len_bytes: u64,
    }
    const SS_DISABLE: i32 = 2;
    let mut stack = Stack { start: 0, flags: SS_DISABLE, len_bytes: 0 };
    // SAFETY: the pointer leads to a stack_t that outlives the call.
    unsafe { make(Call::Sigaltstack, [0, (&raw mut stack) as u64, 0, 0, 0, 0]) };
    if stack.flags & SS_DISABLE != 0 { (0, 0) } else { (stack.start, stack.start.wrapping_add(stack.len_bytes)) }
}
