//! x86-64: System V calling convention, Linux system calls.
//!
//! Owns the agent's symbols ([`entries`], [`leave`], [`calls`]), its data ([`data`]) and the raw system call ([`syscall`]). Invariants: an entry changes no
//! register but the flags, and not even these if its name says so; no vector register but the low halves of xmm0 to xmm15 is ever touched.

use core::arch::{asm, global_asm};

use trapline_abi::{
    agent::SITE_ID_OFFSET,
    pool::{OnFull, PoolHeader},
    record::{DEPTH_BITS, KIND_SHIFT, PAYLOAD_BITS, TSC_BITS},
    thread::{ADDRESS_BITS, BLOCK_SHIFT, SHADOW_BASE, SHADOW_OUTER, SHADOW_RETURN, SLOT_SHIFT, Thread},
};

/// Instructions that several of the functions below have in common.
#[macro_use]
mod text;

mod calls;
mod data;
mod entries;
mod leave;

pub use data::{config_pool, thread};

/// A system call. Neither `errno` nor any memory but what the call itself writes is touched.
///
/// # Safety
/// As the call demands.
pub unsafe fn syscall(number: u64, arguments: [u64; 6]) -> i64 {
    let result: u64;
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

/// Numbers of system calls (`arch/x86/entry/syscalls/syscall_64.tbl`).
pub mod number {
    /// `mmap`.
    pub const MMAP: u64 = 9;
    /// `munmap`.
    pub const MUNMAP: u64 = 11;
    /// `rt_sigprocmask`.
    pub const RT_SIGPROCMASK: u64 = 14;
    /// `madvise`.
    pub const MADVISE: u64 = 28;
    /// `nanosleep`.
    pub const NANOSLEEP: u64 = 35;
    /// `getpid`.
    pub const GETPID: u64 = 39;
    /// `kill`.
    pub const KILL: u64 = 62;
    /// `sigaltstack`.
    pub const SIGALTSTACK: u64 = 131;
    /// `gettid`.
    pub const GETTID: u64 = 186;
    /// `futex`.
    pub const FUTEX: u64 = 202;
    /// `clock_gettime`.
    pub const CLOCK_GETTIME: u64 = 228;
}

/// Shifts and masks as machine code needs them.
mod number_of {
    use super::{ADDRESS_BITS, DEPTH_BITS, KIND_SHIFT, PAYLOAD_BITS, TSC_BITS};

    /// A record's upper half is `(kind << PAYLOAD_BITS | payload) << UPPER_TSC_BITS | tsc >> 32`.
    pub(super) const UPPER_TSC_BITS: u32 = TSC_BITS - 32;
    /// Depths are counted modulo this.
    pub(super) const DEPTH_MASK: u32 = (1 << DEPTH_BITS) - 1;
    /// What shifts out the bits that are above an address.
    pub(super) const ABOVE_ADDRESS: u32 = 64 - ADDRESS_BITS;

    // `mov sil, dl` takes the time's bits 32 to 39.
    const _: () = assert!(UPPER_TSC_BITS == 8);
    const _: () = assert!(KIND_SHIFT == PAYLOAD_BITS + TSC_BITS);
}
