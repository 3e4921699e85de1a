//! x86-64: System V calling convention, Linux system calls.
//!
//! Owns the agent's symbols ([`entries`], [`leave`], [`counters`], [`calls`], [`unwinders`]), its data ([`data`]) and the raw system call ([`syscall`]). Invariants: an entry changes no
//! register but the flags, and not even these if its name says so; no vector register but the low halves of xmm0 to xmm15 is ever touched.

use core::arch::{asm, global_asm};

use trapline_abi::{
    agent::SITE_ID_OFFSET,
    pool::{CHUNK_BYTES, OnFull, PoolHeader},
    record::{DEPTH_BITS, KIND_SHIFT, PAYLOAD_BITS, TSC_BITS},
    thread::{ADDRESS_BITS, BLOCK_SHIFT, SHADOW_BASE, SHADOW_OUTER, SHADOW_RETURN, SLOT_SHIFT, Thread},
};

/// Instructions that several of the functions below have in common.
#[macro_use]
mod text;

mod calls;
mod counters;
mod data;
mod entries;
mod leave;
mod unwinders;

pub use data::{
    config_areas, config_counters, config_forbidden, config_linker_state, config_pool, config_recorded, thread,
};
pub use unwinders::{Code, any_function, code_at, entry, is_own, return_code, start};

pub use trapline_abi::agent::CALLS;

/// Numbers of calls that switch a sandbox on.
pub const SYS_PRCTL: usize = 157;
/// See above.
pub const SYS_SECCOMP: usize = 317;

/// A system call. Neither `errno` nor any memory but what the call itself writes is touched.
///
/// # Safety
/// As the call demands.
pub unsafe fn syscall(number: usize, arguments: [usize; 6]) -> isize {
    let result: usize;
    // SAFETY: (1) the kernel clobbers rax, rcx and r11, and all three are declared; (2) what the call does is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result.cast_signed()
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: the instruction is there on every x86-64 processor; a process that forbids it to itself (PR_SET_TSC) cannot be traced.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Makes two adjacent words `new` if they are `expected`, in one instruction: not atomic towards other threads.
///
/// # Safety
/// `words` is aligned to 16 bytes, leads to memory that may be read and written, and is changed by the calling thread alone.
pub unsafe fn exchange_pair(words: *mut usize, expected: (usize, usize), new: (usize, usize)) -> bool {
    let is_done: u8;
    // SAFETY: (1) every 64-bit processor that Linux 4.16 and later is used on has the instruction; (2) rbx is put back; (3) the memory is the caller's
    // promise.
    unsafe {
        asm!(
            "xchg rbx, rsi",
            "cmpxchg16b xmmword ptr [rdi]",
            "mov rbx, rsi",
            "sete r8b",
            in("rdi") words,
            inout("rsi") new.0 => _,
            in("rcx") new.1,
            inout("rax") expected.0 => _,
            inout("rdx") expected.1 => _,
            out("r8b") is_done,
            options(nostack),
        );
    }
    is_done != 0
}

/// Tells the processor that this thread spins.
pub fn relax() {
    core::hint::spin_loop();
}

/// Shifts and masks as machine code needs them.
mod number_of {
    use super::{ADDRESS_BITS, CHUNK_BYTES, DEPTH_BITS, KIND_SHIFT, PAYLOAD_BITS, TSC_BITS};

    /// A record's upper half is `(kind << PAYLOAD_BITS | payload) << UPPER_TSC_BITS | tsc >> 32`.
    pub(super) const UPPER_TSC_BITS: u32 = TSC_BITS - 32;
    /// Depths are counted modulo this.
    pub(super) const DEPTH_MASK: u32 = (1 << DEPTH_BITS) - 1;
    /// What shifts out the bits that are above an address.
    pub(super) const ABOVE_ADDRESS: u32 = 64 - ADDRESS_BITS;
    /// The bit of a place, in the second byte of its address.
    pub(super) const PLACE_IN_AH: usize = CHUNK_BYTES >> 8;

    // `mov sil, dl` takes the time's bits 32 to 39.
    const _: () = assert!(UPPER_TSC_BITS == 8);
    const _: () = assert!(PLACE_IN_AH < 256 && PLACE_IN_AH << 8 == CHUNK_BYTES);
    const _: () = assert!(KIND_SHIFT == PAYLOAD_BITS + TSC_BITS);
}
