//! i386: System V calling convention, Linux system calls.
//!
//! Owns the agent's symbols ([`entries`], [`leave`], [`calls`], [`unwinders`]), its data ([`data`]) and the raw system call ([`syscall`]). The recorder maps the
//! object itself, into processes that it launches too, and fills in every address: so the code is not position-independent, and costs no register for that.
//! Invariants: an entry changes no register but the flags, and not even these if its name says so; no vector register but the low halves of xmm0 to xmm7 is ever
//! touched, nor the x87's; nothing below the stack pointer is counted on, as there is no red zone.

use core::arch::global_asm;

use trapline_abi::{
    agent::{POPPED_SHIFT, POPPED_UNKNOWN, SITE_ID_OFFSET},
    pool::{CHUNK_BYTES, OnFull, PoolHeader},
    record::{DEPTH_BITS, KIND_SHIFT, PAYLOAD_BITS, TSC_BITS},
    thread::{
        Thread,
        narrow::{BLOCK_SHIFT, REFUSED, SHADOW_BYTES, SHADOW_DEPTH, SHADOW_OUTER, SHADOW_RETURN, SHADOW_SLOT},
    },
};

/// Instructions that several of the functions below have in common.
#[macro_use]
mod text;

mod calls;
mod data;
mod entries;
mod leave;
mod unwinders;

pub use data::{config_areas, config_forbidden, config_linker_state, config_pool, no_frame, thread};
pub use trapline_abi::agent::NARROW_CALLS as CALLS;
pub use unwinders::{Code, any_function, code_at, entry, is_own, return_code, start};

/// Numbers of calls that switch a sandbox on.
pub const SYS_PRCTL: usize = 172;
/// See above.
pub const SYS_SECCOMP: usize = 354;

unsafe extern "C" {
    fn trapline_call_kernel(number: usize, arguments: *const [usize; 6]) -> isize;
    fn trapline_exchange_pair(words: *mut usize, expected: *const [usize; 2], new: *const [usize; 2]) -> u32;
}

/// A system call. Neither `errno` nor any memory but what the call itself writes is touched.
///
/// # Safety
/// As the call demands.
pub unsafe fn syscall(number: usize, arguments: [usize; 6]) -> isize {
    // SAFETY: the caller's promise.
    unsafe { trapline_call_kernel(number, &raw const arguments) }
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: the instruction is there on every processor with SSE2; a process that forbids it to itself (PR_SET_TSC) cannot be traced.
    unsafe { core::arch::x86::_rdtsc() }
}

/// Makes two adjacent words `new` if they are `expected`, in one instruction: not atomic towards other threads.
///
/// # Safety
/// `words` is aligned to 8 bytes, leads to memory that may be read and written, and is changed by the calling thread alone.
pub unsafe fn exchange_pair(words: *mut usize, expected: (usize, usize), new: (usize, usize)) -> bool {
    let (expected, new) = ([expected.0, expected.1], [new.0, new.1]);
    // SAFETY: the caller's promise.
    unsafe { trapline_exchange_pair(words, &raw const expected, &raw const new) != 0 }
}

/// Tells the processor that this thread spins.
pub fn relax() {
    core::hint::spin_loop();
}

/// Shifts and masks as machine code needs them.
mod number_of {
    use super::{CHUNK_BYTES, DEPTH_BITS, KIND_SHIFT, PAYLOAD_BITS, POPPED_SHIFT, SHADOW_BYTES, TSC_BITS};

    /// A record's upper half is `(kind << PAYLOAD_BITS | payload) << UPPER_TSC_BITS | tsc >> 32`.
    pub(super) const UPPER_TSC_BITS: u32 = TSC_BITS - 32;
    /// Depths are counted modulo this.
    pub(super) const DEPTH_MASK: u32 = (1 << DEPTH_BITS) - 1;
    /// The bit of a place, in the second byte of its address.
    pub(super) const PLACE_IN_AH: usize = CHUNK_BYTES >> 8;
    /// What of the word in front of a stub is the site's id.
    pub(super) const SITE_MASK: u32 = (1 << POPPED_SHIFT) - 1;

    // `movzx edx, dl` leaves the time's bits 32 to 39.
    const _: () = assert!(UPPER_TSC_BITS == 8);
    const _: () = assert!(PLACE_IN_AH < 256 && PLACE_IN_AH << 8 == CHUNK_BYTES);
    const _: () = assert!(KIND_SHIFT == PAYLOAD_BITS + TSC_BITS);
    // `lea edi, [edi + 4*slot]`, of slots that are 4 bytes apart.
    const _: () = assert!(SHADOW_BYTES == 16);
    // What is popped stands above the depth as it stands above the site's id.
    const _: () = assert!(DEPTH_BITS < POPPED_SHIFT);
}
