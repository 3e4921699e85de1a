//! What the width of a target changes about its registers and its system calls.
//!
//! Owns the questions whose answers depend on a [`Mode`]. A tracer of 64-bit code sees a 32-bit thread's registers in the lower halves of its own
//! (`PTRACE_GETREGS`), and everything that leads through them is the same: so there is one recorder. Sources: `arch/x86/entry/syscalls/syscall_32.tbl`, `asm/segment.h`,
//! `set_thread_area(2)`.

use std::{
    fs::File,
    io::{self, Read},
};

use libc::c_long;
use trapline_engine::{Addr, Mode};
use trapline_process::quiesce::ThreadRegisters;

use super::{Tid, ptrace};

/// The code segment of 32-bit programs (`__USER32_CS`).
const CODE_32: u64 = 0x23;

/// The entry of the descriptor table that a 32-bit thread gets for the agent: the C library has the first of three (`GDT_ENTRY_TLS_MIN`, which a 32-bit kernel has
/// elsewhere, as it has the code segment).
fn agents_entry(registers: &ThreadRegisters) -> u32 {
    if registers.cs == CODE_32 { 13 } else { 7 }
}

/// The selector that leads to it, for user code.
fn agents_selector(registers: &ThreadRegisters) -> u64 {
    u64::from(agents_entry(registers)) << 3 | 3
}

/// What code a thread with these registers executes. A 32-bit tracer traces nothing else.
pub(crate) fn mode_of(registers: &ThreadRegisters) -> Mode {
    if Mode::NATIVE == Mode::Bits32 || registers.cs == CODE_32 { Mode::Bits32 } else { Mode::Bits64 }
}

/// What code the program of a process is.
pub(crate) fn mode_of_program(tid: Tid) -> Mode {
    // Of the ELF header: class 1 has addresses of 32 bits.
    let mut head = [0; 5];
    let read = File::open(format!("/proc/{tid}/exe")).and_then(|mut file| file.read_exact(&mut head));
    if read.is_ok() && head[4] == 1 { Mode::Bits32 } else { Mode::Bits64 }
}

/// Whether a program of this width is wider than this one, which the kernel does not let trace it.
pub(crate) fn is_too_wide(mode: Mode) -> bool {
    mode == Mode::Bits64 && Mode::NATIVE == Mode::Bits32
}

/// What is said of those.
pub(crate) const TOO_WIDE: &str = "it is a 64-bit program, and this trapline is a 32-bit one; use a 64-bit trapline";

/// The bytes of an instruction that makes a system call: `syscall`, or `int 0x80`.
pub(crate) const SYSCALL_BYTES: i64 = 2;

/// The number of a system call. `None` for those that the recorder never has a 32-bit process make.
pub(crate) fn call_number(mode: Mode, number: c_long) -> Option<u64> {
    let of_32_bits = || match number {
        libc::SYS_close => Some(6),
        libc::SYS_munmap => Some(91),
        libc::SYS_clone => Some(120),
        libc::SYS_rt_sigreturn => Some(173),
        // `mmap2`, whose offset is in pages: the recorder's is 0.
        libc::SYS_mmap => Some(192),
        libc::SYS_futex => Some(240),
        libc::SYS_openat => Some(295),
        libc::SYS_socketpair => Some(360),
        libc::SYS_recvmsg => Some(372),
        libc::SYS_membarrier => Some(375),
        libc::SYS_restart_syscall => Some(0),
        _ => None,
    };
    match mode {
        Mode::Bits32 => of_32_bits(),
        Mode::Bits64 => u64::try_from(number).ok(),
    }
}

/// Puts the arguments of a system call where the kernel looks for them.
pub(crate) fn set_arguments(mode: Mode, registers: &mut ThreadRegisters, arguments: [u64; 6]) {
    let call = registers;
    match mode {
        Mode::Bits32 => {
            let arguments = arguments.map(|argument| argument & u64::from(u32::MAX));
            [call.rbx, call.rcx, call.rdx, call.rsi, call.rdi, call.rbp] = arguments;
        }
        Mode::Bits64 => [call.rdi, call.rsi, call.rdx, call.r10, call.r8, call.r9] = arguments,
    }
}

/// The second argument of the system call that a thread is in.
pub(crate) fn second_argument(registers: &ThreadRegisters) -> u64 {
    match mode_of(registers) {
        Mode::Bits32 => registers.rcx,
        Mode::Bits64 => registers.rsi,
    }
}

/// The number of the system call that a thread is in, negative if it is in none.
pub(crate) fn call_of(registers: &ThreadRegisters) -> i64 {
    signed(mode_of(registers), registers.orig_rax)
}

/// What the system call returned that a thread is at the end of: less than 0 and more than -4096 for an error.
pub(crate) fn result_of(registers: &ThreadRegisters) -> i64 {
    signed(mode_of(registers), registers.rax)
}

/// A register as the kernel reads a number in it. Of a 32-bit thread it keeps what was there in the upper half or extends the sign, as it happens. Addresses
/// of theirs can be negative numbers of 32 bits, so only what may be an error is one.
fn signed(mode: Mode, register: u64) -> i64 {
    const LEAST: i32 = -4095;
    let low = u32::try_from(register & u64::from(u32::MAX)).unwrap_or(0);
    match mode {
        Mode::Bits32 if low.cast_signed() >= LEAST && low.cast_signed() < 0 => low.cast_signed().into(),
        Mode::Bits32 => low.into(),
        Mode::Bits64 => register.cast_signed(),
    }
}

/// A word of a process, from bytes that begin with it; 0 if there are fewer.
pub(crate) fn word_in(mode: Mode, bytes: &[u8]) -> u64 {
    match mode {
        Mode::Bits32 => bytes.first_chunk().map_or(0, |word| u32::from_le_bytes(*word).into()),
        Mode::Bits64 => bytes.first_chunk().map_or(0, |word| u64::from_le_bytes(*word)),
    }
}

/// A word that is a number, and may be negative.
pub(crate) fn number(mode: Mode, word: u64) -> i64 {
    match mode {
        Mode::Bits32 => u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0).cast_signed().into(),
        Mode::Bits64 => word.cast_signed(),
    }
}

/// An address that was computed, as the process has it: 32-bit code computes modulo 2^32.
pub(crate) fn wrapped(mode: Mode, address: Addr) -> Addr {
    match mode {
        Mode::Bits32 => Addr::new(address.value() & u64::from(u32::MAX)),
        Mode::Bits64 => address,
    }
}

/// The end of what a process can map.
pub(crate) fn end_of_memory(mode: Mode) -> u64 {
    match mode {
        // A page below the end of 32 bits (`IA32_PAGE_OFFSET`).
        Mode::Bits32 => 0xffff_e000,
        Mode::Bits64 => (1 << 47) - 4096,
    }
}

/// Bytes below the stack pointer that are a function's own (System V psABI, "The Stack Frame").
pub(crate) fn red_zone_bytes(mode: Mode) -> u64 {
    match mode {
        Mode::Bits32 => 0,
        Mode::Bits64 => 128,
    }
}

/// Whether a thread uses the segment whose base the agent needs.
pub(crate) fn uses_agents_segment(registers: &ThreadRegisters) -> bool {
    match mode_of(registers) {
        Mode::Bits32 => registers.fs != 0,
        Mode::Bits64 => registers.gs_base != 0 || registers.gs != 0,
    }
}

/// Gives a stopped thread the pointer to its state, the base of a segment, or takes it away.
pub(crate) fn give_pointer(tid: Tid, registers: &mut ThreadRegisters, pointer: Option<Addr>) -> io::Result<()> {
    match mode_of(registers) {
        Mode::Bits32 => {
            ptrace::set_thread_area(tid, agents_entry(registers), pointer)?;
            registers.fs = pointer.map_or(0, |_| agents_selector(registers));
            // The kernel loads the base beside the selector where the processor lets it.
            registers.fs_base = pointer.map_or(0, Addr::value);
        }
        Mode::Bits64 => registers.gs_base = pointer.map_or(0, Addr::value),
    }
    ptrace::set_registers(tid, registers)
}

/// Whether a 32-bit thread has lost the segment that it was given: a signal handler that was entered before has returned, and put back what was there then.
pub(crate) fn has_lost_segment(registers: &ThreadRegisters) -> bool {
    mode_of(registers) == Mode::Bits32 && registers.fs == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_32_bit_calls_are_told_from_addresses() {
        assert_eq!(signed(Mode::Bits32, 0xffff_fe00), -512);
        assert_eq!(signed(Mode::Bits32, (-512_i64).cast_unsigned()), -512);
        assert_eq!(signed(Mode::Bits32, 0xf7f0_0000), 0xf7f0_0000);
        assert_eq!(signed(Mode::Bits64, 0xffff_fe00), 0xffff_fe00);
    }

    #[test]
    fn every_call_that_a_32_bit_process_makes_for_us_has_a_number() {
        for number in [libc::SYS_mmap, libc::SYS_munmap, libc::SYS_openat, libc::SYS_close, libc::SYS_socketpair] {
            assert!(call_number(Mode::Bits32, number).is_some());
        }
        assert_eq!(call_number(Mode::Bits32, libc::SYS_uname), None);
        assert_eq!(call_number(Mode::Bits64, libc::SYS_uname), u64::try_from(libc::SYS_uname).ok());
    }
}
