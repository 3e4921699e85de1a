//! Code of ours that runs in a patched process: position-independent, without a stack frame, without relocations.
//!
//! Owns its bytes, for either width. [`answer`] stands in front of an unwinder's `_Unwind_Find_FDE` and answers for the new code; [`call`] calls a function of the patch for us. Invariants:
//! both are complete in themselves, so that a recorder that dies leaves nothing that would not work; no register is written that their callers rely on (System V psABI).

use std::{arch::global_asm, slice};

use trapline_engine::Mode;

/// From [`answer`]'s first byte to its data, which are: where to go on if the address is not ours; where the new code begins, its length; how many functions it has; and
/// for each of them its beginning, its end, and its record. Words of 8 bytes.
pub(super) const DATA_OFFSET: usize = 4096;

global_asm!(
    r#"
    .pushsection .rodata.trapline_live, "a"
    .p2align 4
    .hidden trapline_live_answer
    .globl trapline_live_answer
trapline_live_answer:
    # rdi: an address of code; rsi: where bases and the function's beginning go (`struct dwarf_eh_bases` of libgcc's unwind-dw2-fde.h).
    lea r8, [rip + trapline_live_answer + {DATA_OFFSET}]
    mov rax, rdi
    sub rax, qword ptr [r8 + 8]
    cmp rax, qword ptr [r8 + 16]
    jae 3f
    mov rcx, qword ptr [r8 + 24]
    lea rdx, [r8 + 32]
1:  sub rcx, 1
    jb 3f
    mov rax, qword ptr [rdx]
    cmp rdi, rax
    jb 2f
    cmp rdi, qword ptr [rdx + 8]
    jae 2f
    mov qword ptr [rsi], 0
    mov qword ptr [rsi + 8], 0
    mov qword ptr [rsi + 16], rax
    mov rax, qword ptr [rdx + 16]
    ret
2:  add rdx, 24
    jmp 1b
3:  jmp qword ptr [r8]
    .hidden trapline_live_answer_end
    .globl trapline_live_answer_end
trapline_live_answer_end:

    .p2align 4
    .hidden trapline_live_call
    .globl trapline_live_call
trapline_live_call:
    # r11: a function. The stack is that of a signal handler at its first instruction, whose return takes the thread back; rbx is of the frame that is left.
    sub rsp, 8
    call r11
    mov ebx, eax
    add rsp, 8
    ret
    .hidden trapline_live_call_end
    .globl trapline_live_call_end
trapline_live_call_end:

    .code32
    .p2align 4
    .hidden trapline_live_narrow_answer
    .globl trapline_live_narrow_answer
trapline_live_narrow_answer:
    # On the stack: an address of code; where bases and the function's beginning go. This is at the beginning of a page, and the data at that of the next one.
    call 4f
4:  pop edx
    and edx, -{DATA_OFFSET}
    mov eax, dword ptr [esp + 4]
    mov ecx, eax
    sub ecx, dword ptr [edx + {DATA_OFFSET} + 8]
    cmp ecx, dword ptr [edx + {DATA_OFFSET} + 16]
    jae 3f
    mov ecx, dword ptr [edx + {DATA_OFFSET} + 24]
    lea ecx, [ecx + 2 * ecx]
2:  sub ecx, 3
    jb 3f
    cmp eax, dword ptr [edx + 8 * ecx + {DATA_OFFSET} + 32]
    jb 2b
    cmp eax, dword ptr [edx + 8 * ecx + {DATA_OFFSET} + 40]
    jae 2b
    mov eax, dword ptr [esp + 8]
    mov dword ptr [eax], 0
    mov dword ptr [eax + 4], 0
    push dword ptr [edx + 8 * ecx + {DATA_OFFSET} + 32]
    pop dword ptr [eax + 8]
    mov eax, dword ptr [edx + 8 * ecx + {DATA_OFFSET} + 48]
    ret
3:  jmp dword ptr [edx + {DATA_OFFSET}]
    .hidden trapline_live_narrow_answer_end
    .globl trapline_live_narrow_answer_end
trapline_live_narrow_answer_end:

    .p2align 4
    .hidden trapline_live_narrow_call
    .globl trapline_live_narrow_call
trapline_live_narrow_call:
    # As above; the function is in edx.
    sub esp, 12
    call edx
    mov ebx, eax
    add esp, 12
    ret
    .hidden trapline_live_narrow_call_end
    .globl trapline_live_narrow_call_end
trapline_live_narrow_call_end:
    .code{OWN_BITS}
    .popsection
    "#,
    DATA_OFFSET = const DATA_OFFSET,
    OWN_BITS = const usize::BITS,
);

unsafe extern "C" {
    #[link_name = "trapline_live_answer"]
    static ANSWER: u8;
    #[link_name = "trapline_live_answer_end"]
    static ANSWER_END: u8;
    #[link_name = "trapline_live_call"]
    static CALL: u8;
    #[link_name = "trapline_live_call_end"]
    static CALL_END: u8;
    #[link_name = "trapline_live_narrow_answer"]
    static NARROW_ANSWER: u8;
    #[link_name = "trapline_live_narrow_answer_end"]
    static NARROW_ANSWER_END: u8;
    #[link_name = "trapline_live_narrow_call"]
    static NARROW_CALL: u8;
    #[link_name = "trapline_live_narrow_call_end"]
    static NARROW_CALL_END: u8;
}

/// What an unwinder is led through.
pub(super) fn answer(mode: Mode) -> &'static [u8] {
    let (start, end) = match mode {
        Mode::Bits32 => (&raw const NARROW_ANSWER, &raw const NARROW_ANSWER_END),
        Mode::Bits64 => (&raw const ANSWER, &raw const ANSWER_END),
    };
    // SAFETY: the labels are of one section, in this order.
    unsafe { between(start, end) }
}

/// Calls the function in r11, or edx, keeps what it answers in ebx, and returns as a signal handler does.
pub(super) fn call(mode: Mode) -> &'static [u8] {
    let (start, end) = match mode {
        Mode::Bits32 => (&raw const NARROW_CALL, &raw const NARROW_CALL_END),
        Mode::Bits64 => (&raw const CALL, &raw const CALL_END),
    };
    // SAFETY: as above.
    unsafe { between(start, end) }
}

/// # Safety
/// Both are of one piece of memory that is never written to.
unsafe fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: by the caller's promise.
    unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_leaves_room_for_what_stands_behind_it() {
        for mode in [Mode::Bits32, Mode::Bits64] {
            assert!((30..super::super::unwinder::COPY_OFFSET).contains(&answer(mode).len()));
            assert!((8..64).contains(&call(mode).len()));
        }
    }
}
