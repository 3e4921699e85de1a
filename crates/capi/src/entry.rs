//! The way in for functions that ask whether the calling thread may still be inside a callback.
//!
//! Owns `with_frames`, which makes the body of such a function. Where the caller's frames end only the first instruction can tell: so that one hands it on.
//! Neighbours: [`trapline_process::called_from`] takes it. `cfg(target_arch)` appears here and nowhere else in the crate.

use trapline_process::Addr;

/// The body of a naked function of at most two words: calls `$body` with both, whatever the second is, and with the stack pointer that the caller had at its call.
#[cfg(target_arch = "x86_64")]
macro_rules! with_frames {
    ($body:ident) => {
        core::arch::naked_asm!(".cfi_startproc", "lea rdx, [rsp + 8]", "jmp {body}", ".cfi_endproc", body = sym $body)
    };
}

/// The body of a naked function of at most two words: calls `$body` with both, whatever the second is, and with the stack pointer that the caller had at its call.
#[cfg(target_arch = "x86")]
macro_rules! with_frames {
    ($body:ident) => {
        core::arch::naked_asm!(
            ".cfi_startproc",
            "lea eax, [esp + 4]",
            "push eax",
            ".cfi_adjust_cfa_offset 4",
            // The second word, and then the first, which is as far away by now.
            "push dword ptr [esp + 12]",
            ".cfi_adjust_cfa_offset 4",
            "push dword ptr [esp + 12]",
            ".cfi_adjust_cfa_offset 4",
            "call {body}",
            "add esp, 12",
            ".cfi_adjust_cfa_offset -12",
            "ret",
            ".cfi_endproc",
            body = sym $body,
        )
    };
}

pub(crate) use with_frames;

/// The address that [`with_frames`] hands on.
pub(crate) fn address(frames: usize) -> Addr {
    Addr::new(frames as u64)
}
