//! Valgrind, which translates a program's code before it executes it, and knows threads but no other tasks.
//!
//! Owns the *client requests* that a program makes of it: an instruction sequence that does nothing on a processor, with a request in registers
//! (Valgrind manual, "The Client Request mechanism"; `valgrind.h` has the sequences). Neighbours: the text writer tells of changed
//! code, [`quiesce`](crate::quiesce) asks whether it may start a task. Without Valgrind each request costs a nanosecond or two.

use trapline_engine::AddrRange;

const RUNNING_ON_VALGRIND: usize = 0x1001;
const DISCARD_TRANSLATIONS: usize = 0x1002;

/// Whether the process runs under Valgrind.
pub(crate) fn is_running() -> bool {
    request(&[RUNNING_ON_VALGRIND, 0, 0, 0, 0, 0]) != 0
}

/// Says that code has changed, so that it is translated again.
pub(crate) fn discard_translations(code: AddrRange) {
    #[expect(clippy::cast_possible_truncation, reason = "addresses of the own process")]
    let (start, len_bytes) = (code.start.value() as usize, code.len_bytes() as usize);
    request(&[DISCARD_TRANSLATIONS, start, len_bytes, 0, 0, 0]);
}

/// Makes a request, and returns Valgrind's answer: 0 if there is none to give one.
fn request(request: &[usize; 6]) -> usize {
    let mut answer = 0_usize;
    // SAFETY: (1) rotating a register by its width in all, and exchanging one with itself, changes nothing but flags; (2) Valgrind reads the six words that
    // ax points to, which live in the caller, and writes dx.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        core::arch::asm!(
            "rol rdi, 3",
            "rol rdi, 13",
            "rol rdi, 61",
            "rol rdi, 51",
            "xchg rbx, rbx",
            in("rax") request.as_ptr(),
            inout("rdx") answer,
            options(nostack),
        );
    }
    // SAFETY: as above.
    #[cfg(target_arch = "x86")]
    unsafe {
        core::arch::asm!(
            "rol edi, 3",
            "rol edi, 13",
            "rol edi, 29",
            "rol edi, 19",
            "xchg ebx, ebx",
            in("eax") request.as_ptr(),
            inout("edx") answer,
            options(nostack),
        );
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_answers_no_request() {
        assert!(!is_running());
        discard_translations(AddrRange::default());
    }
}
