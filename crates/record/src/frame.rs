//! A signal frame by which a thread takes itself back to where it was.
//!
//! Owns [`signal_frame`]. A thread that makes system calls for the recorder where there is no agent is given the frame that a signal handler would have on its
//! stack: whoever returns from the system call returns into `sigreturn`, and all registers are as they were, those of vectors too. That is for a
//! recorder that died meanwhile; one that lives sets the registers itself. Source: `struct rt_sigframe` (arch/x86/include/asm/sigframe.h), `struct sigcontext`
//! and `struct _fpx_sw_bytes` (uapi/asm/sigcontext.h).

#[cfg(target_arch = "x86")]
use std::arch::x86::__cpuid_count;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__cpuid_count;

use trapline_engine::Addr;
use trapline_process::quiesce::ThreadRegisters;

/// A frame, and where it goes. The stack pointer has to be there when `ret` is executed.
#[derive(Debug)]
pub(crate) struct SignalFrame {
    /// Where its first byte goes.
    pub(crate) at: Addr,
    /// All of it.
    pub(crate) bytes: Vec<u8>,
}

/// What lies below the stack pointer and is the thread's (System V psABI, "The Stack Frame").
const RED_ZONE_BYTES: u64 = 128;

/// Return address; `struct ucontext` with flags, link, stack, `struct sigcontext`, signal mask.
const HEAD_BYTES: u64 = 8 + 8 + 8 + 24 + 256 + 8;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// In the area of FXSAVE: what the kernel puts there for itself. In ptrace's, the features that are there.
const SOFTWARE_AT: usize = 464;
/// Features whose state is in every thread's area; those that come later are given to who asks for them.
const FEATURES: u64 = 0x2ff;

/// The same area as a function may expect it that is called: registers of the x87 are empty, exceptions masked (psABI, "Registers and the Stack Frame").
pub(crate) fn state_at_entry(xstate: &[u8]) -> Vec<u8> {
    const X87_AND_SSE: u8 = 3;
    const FEATURES_AT: usize = 512;
    let mut state = xstate.to_vec();
    // FCW, FSW, FTW; MXCSR (SDM volume 1, "Legacy Region of an XSAVE Area").
    for (at, bytes) in [(0, &[0x7f, 0x03, 0, 0, 0][..]), (24, &0x1f80_u32.to_le_bytes())] {
        if let Some(place) = state.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    if let Some(features) = state.get_mut(FEATURES_AT) {
        *features |= X87_AND_SSE;
    }
    state
}

/// The frame of a thread with these registers, that blocks these signals. `xstate` is the area that XSAVE would write (`NT_X86_XSTATE`), `state_bytes`
/// how much of it belongs to [`FEATURES`].
pub(crate) fn signal_frame(
    registers: &ThreadRegisters,
    signal_mask: u64,
    sigreturn: Addr,
    xstate: &[u8],
    state_bytes: usize,
) -> SignalFrame {
    const UC_FLAGS: u64 = 7;
    /// No flag that the kernel knows: it leaves the alternate stack alone.
    const NO_STACK: u64 = 0x10;
    let extended = extended_state(xstate, state_bytes);
    let state_at = (registers.rsp - RED_ZONE_BYTES - extended.len() as u64) & !63;
    // As if a call had pushed the return address.
    let at = ((state_at - HEAD_BYTES) & !15) - 8;
    let now = registers;
    let segments = (now.cs & 0xffff) | (now.ss & 0xffff) << 48;
    let words = [
        sigreturn.value(),
        UC_FLAGS,
        0,
        0,
        NO_STACK,
        0,
        now.r8,
        now.r9,
        now.r10,
        now.r11,
        now.r12,
        now.r13,
        now.r14,
        now.r15,
        now.rdi,
        now.rsi,
        now.rbp,
        now.rbx,
        now.rdx,
        now.rax,
        now.rcx,
        now.rsp,
        now.rip,
        now.eflags,
        segments,
        0,
        0,
        0,
        0,
        state_at,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        signal_mask,
    ];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    bytes.resize(usize::try_from(state_at - at).unwrap_or(0), 0);
    bytes.extend_from_slice(&extended);
    SignalFrame { at: Addr::new(at), bytes }
}

/// The area that XSAVE would write, as the kernel has it in a signal frame, with what marks its end.
pub(crate) fn extended_state(xstate: &[u8], state_bytes: usize) -> Vec<u8> {
    let state_bytes = state_bytes.min(xstate.len());
    let mut state = xstate[..state_bytes].to_vec();
    if state_bytes > SOFTWARE_AT + 48 {
        let features = xstate[SOFTWARE_AT..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)) & FEATURES;
        let size = u32::try_from(state_bytes).unwrap_or(0);
        let software = [
            &FP_XSTATE_MAGIC1.to_le_bytes()[..],
            &(size + 4).to_le_bytes(),
            &features.to_le_bytes(),
            &size.to_le_bytes(),
            &[0; 28],
        ]
        .concat();
        state[SOFTWARE_AT..SOFTWARE_AT + software.len()].copy_from_slice(&software);
    }
    state.extend_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
    state
}

/// How many bytes of a thread's area of XSAVE belong to [`FEATURES`], of which the processor has `enabled`.
pub(crate) fn state_bytes(xstate: &[u8]) -> usize {
    /// The area of FXSAVE, and the header.
    const FIRST_BYTES: usize = 512 + 64;
    let enabled =
        xstate.get(SOFTWARE_AT..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let enabled = enabled & FEATURES;
    let ends = (2..64_u32).filter(|feature| enabled >> feature & 1 == 1).map(|feature| {
        // Size and offset (SDM volume 1, "Determining the XSAVE Managed Feature States").
        let about = __cpuid_count(0xd, feature);
        about.eax as usize + about.ebx as usize
    });
    ends.max().unwrap_or(0).max(FIRST_BYTES).min(xstate.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_lies_as_the_kernel_would_have_it() {
        // SAFETY: plain numbers, for which zero is a value.
        let mut registers: ThreadRegisters = unsafe { std::mem::zeroed() };
        (registers.rsp, registers.rip, registers.rax) = (0x7fff_0000_1238, 0x1234, 77);
        let frame = signal_frame(&registers, 5, Addr::new(0x4000), &[0; 832], 832);
        assert_eq!(frame.at.value() % 16, 8);
        let word = |at: usize| u64::from_le_bytes(*frame.bytes[at..].first_chunk().expect("a word"));
        // `ucontext` begins behind the return address; its registers 40 bytes later.
        let register = |index: usize| word(8 + 40 + 8 * index);
        assert_eq!((register(13), register(15), register(16)), (77, 0x7fff_0000_1238, 0x1234));
        let state_at = register(23);
        assert!(state_at.is_multiple_of(64) && state_at > frame.at.value());
        assert_eq!(word(8 + 40 + 256), 5, "the mask");
        assert!(frame.at.value() + frame.bytes.len() as u64 <= registers.rsp - RED_ZONE_BYTES);
    }
}
