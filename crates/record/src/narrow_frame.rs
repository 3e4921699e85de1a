//! A signal frame by which a 32-bit thread takes itself back to where it was: the other half of [`frame`](crate::frame).
//!
//! Owns [`signal_frame`]. Source: `struct rt_sigframe_ia32` (arch/x86/include/asm/sigframe.h), `struct sigcontext_32` and `struct _fpstate_32`
//! (uapi/asm/sigcontext.h). The kernel takes the x87's registers from the older area in front of the one that XSAVE writes.

use trapline_engine::Addr;
use trapline_process::quiesce::ThreadRegisters;

use crate::frame::{SignalFrame, extended_state};

/// Up to the end of the mask: return address, signal, two pointers; `siginfo`; `ucontext` with flags, link, stack, `struct sigcontext_32`, mask.
const HEAD_BYTES: u64 = 16 + 128 + 4 + 4 + 12 + 88 + 8;
/// Bytes of what FSAVE writes, and of a word of status behind it (`struct fregs_state`).
const FSAVE_BYTES: usize = 112;

/// The frame of a thread with these registers; see [`frame::signal_frame`](crate::frame::signal_frame).
pub(crate) fn signal_frame(
    registers: &ThreadRegisters,
    signal_mask: u64,
    sigreturn: Addr,
    xstate: &[u8],
    state_bytes: usize,
) -> SignalFrame {
    /// No flag that the kernel knows: it leaves the alternate stack alone.
    const NO_STACK: u64 = 0x10;
    const UC_FLAGS: u64 = 1;
    let extended = extended_state(xstate, state_bytes);
    let state_at = (registers.rsp - extended.len() as u64) & !63;
    let older_at = state_at - FSAVE_BYTES as u64;
    // As if a call had pushed the return address.
    let at = ((older_at - HEAD_BYTES) & !15) - 4;
    let now = registers;
    let mut words = vec![sigreturn.value(), 0, 0, 0];
    words.extend([0; 32]);
    words.extend([UC_FLAGS, 0, 0, NO_STACK, 0]);
    words.extend([now.gs, now.fs, now.es, now.ds].map(|selector| selector & 0xffff));
    words.extend([now.rdi, now.rsi, now.rbp, now.rsp, now.rbx, now.rdx, now.rcx, now.rax, 0, 0, now.rip]);
    words.extend([now.cs & 0xffff, now.eflags, now.rsp, now.ss & 0xffff, older_at, 0, 0]);
    words.extend([signal_mask, signal_mask >> 32]);
    let lower_halves = words.iter().flat_map(|word| word.to_le_bytes().into_iter().take(4));
    let mut bytes: Vec<u8> = lower_halves.collect();
    bytes.resize(usize::try_from(older_at - at).unwrap_or(0), 0);
    bytes.extend_from_slice(&older(xstate));
    bytes.extend_from_slice(&extended);
    SignalFrame { at: Addr::new(at), bytes }
}

/// The x87's registers as FSAVE writes them, from how FXSAVE does (SDM, volume 1, "Layout of the 64-bit-mode FXSAVE Map" and "Protected Mode x87 FPU State Image").
fn older(fxsave: &[u8]) -> [u8; FSAVE_BYTES] {
    /// Above the words of 16 bits in the older area.
    const RESERVED: u32 = 0xffff_0000;
    const STACK_AT: usize = 28;
    const OF_STACK_BYTES: usize = 10;
    let half = |at: usize| fxsave.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u16::from_le_bytes(*bytes));
    let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
    // One bit a register says that it is used; the older area has two, both set where it is empty.
    let tags =
        (0..8).fold(0_u32, |tags, register| tags | if half(4) >> register & 1 == 0 { 3 << (2 * register) } else { 0 });
    let instruction = u32::from(half(12)) | u32::from(half(6)) << 16;
    let head = [
        u32::from(half(0)) | RESERVED,
        u32::from(half(2)) | RESERVED,
        tags | RESERVED,
        word(8),
        instruction,
        word(16),
        u32::from(half(20)) | RESERVED,
    ];
    let mut area = [0; FSAVE_BYTES];
    for (place, word) in area.chunks_exact_mut(4).zip(head) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    for register in 0..8 {
        if let Some(value) = fxsave.get(32 + 16 * register..).and_then(<[u8]>::first_chunk::<OF_STACK_BYTES>) {
            area[STACK_AT + OF_STACK_BYTES * register..][..OF_STACK_BYTES].copy_from_slice(value);
        }
    }
    area[FSAVE_BYTES - 4..FSAVE_BYTES - 2].copy_from_slice(&half(2).to_le_bytes());
    area
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_lies_as_the_kernel_would_have_it() {
        // SAFETY: plain numbers, for which zero is a value.
        let mut registers: ThreadRegisters = unsafe { std::mem::zeroed() };
        (registers.rsp, registers.rip, registers.rax, registers.rbx) = (0xffff_1234, 0x1234, 77, 78);
        let mut xstate = [0; 832];
        // Of the x87: registers 0 and 7 are used.
        xstate[4] = 0x81;
        let frame = signal_frame(&registers, 5, Addr::new(0x4000), &xstate, 832);
        assert_eq!(frame.at.value() % 16, 12);
        let word = |at: usize| u32::from_le_bytes(*frame.bytes[at..].first_chunk().expect("a word"));
        // `sigcontext_32` is 164 bytes from the frame's start.
        let register = |index: usize| word(164 + 4 * index);
        assert_eq!(
            (word(0), register(7), register(8), register(11), register(14)),
            (0x4000, 0xffff_1234, 78, 77, 0x1234)
        );
        let older_at = register(19);
        assert!((older_at + 112).is_multiple_of(64));
        assert_eq!(word(252), 5, "the mask");
        let older = usize::try_from(u64::from(older_at) - frame.at.value()).expect("a small number");
        assert_eq!(word(older + 8), 0xffff_0000 | 0x3ffc, "tags");
        assert!(frame.at.value() + frame.bytes.len() as u64 <= registers.rsp);
    }
}
