//! Where hooked functions return to.
//!
//! ```text
//!                                         at trapline_return    with n words pushed
//! behind what the function has popped     esp
//! the last word that it has popped        esp - 4               esp + 4n
//! ```
//!
//! A function pops its return address, which was in the slot, and perhaps arguments: then the slot lies further down, and its shadow is found as the first one that
//! fits, upwards in time and downwards in memory. The word that was popped last gets the return address, and is returned by.
//!
//! A processor predicts that each `ret` leads behind the last call. The function's own comes here instead. The one here would then use up its caller's caller's
//! prediction; so a call that leads to the next instruction comes before it, and all others stay right. (Where there is a red zone the function is called once more, by
//! what is in front of this code, and both are predicted. Here nothing may lie below the stack pointer that a call could be led by.)
//!
//! # Unwinding
//!
//! A hooked slot holds `trapline_return`, so unwinders come here, and look up the address before it: the entry starts with the byte in front. The canonical frame address is
//! one *above* the stack pointer, which is then given by a rule of its own: were both equal, libgcc would take this frame
//! for the one of the handler that it looks for, and were the former smaller, gdb would take the stack for corrupt. The return address is in the slot's shadow, to which
//! the table leads. That is exact for whoever walks through; a signal that interrupts the few instructions up to where the return address is on the stack again,
//! after a function that has popped arguments, shows nothing behind them. The directives of the assembler take no address, so the entry is written out.
//!
//! # What a signal handler sees at any instruction
//!
//! The place for the record is reserved before `top` leads to the outer frame. A handler between the two has its records behind this one, one deeper
//! than the reader thinks, as described for the [entries](super::entries).

use core::mem::offset_of;

use trapline_abi::{agent::INJECTED_THREAD_OFFSET, record::kind};

use super::{
    BLOCK_SHIFT, PAYLOAD_BITS, POPPED_SHIFT, POPPED_UNKNOWN, REFUSED, SHADOW_DEPTH, SHADOW_OUTER, SHADOW_RETURN,
    SHADOW_SLOT, Thread, global_asm,
    number_of::{DEPTH_MASK, PLACE_IN_AH, UPPER_TSC_BITS},
};

global_asm!(
    r#"
    .pushsection .text.trapline,"ax",@progbits
    .p2align 6
.Lreturn_begins:
    int3
    .hidden trapline_return
    .globl trapline_return
    .type trapline_return, @function
trapline_return:
    lea esp, [esp - 4]
.Lreturn_1:
    # Results and flags are the function's: all registers are kept. Of these, esi and edi are the caller's to unwind.
    push eax
.Lreturn_2:
    lahf
    seto al
    push eax
.Lreturn_3:
    push ecx
.Lreturn_4:
    push edx
.Lreturn_5:
    push esi
.Lreturn_6:
    push edi
.Lreturn_7:
    lea edx, [esp + 24]
1:
    "#,
    shadow_of_edx!("edi", "esi", "2f"),
    r#"
    cmp dword ptr [edi + {SHADOW_SLOT}], edx
    jne 2f
    mov esi, dword ptr [edi + {SHADOW_DEPTH}]
    shr esi, {POPPED_SHIFT}
    lea ecx, [edx + 4*esi]
    cmp esi, {POPPED_UNKNOWN}
    je 3f
    lea esi, [esp + 24]
    cmp esi, ecx
    je 3f
2:  # Not here.
    sub edx, 4
    lea ecx, [esp + 24 - 4*{POPPED_UNKNOWN}]
    cmp edx, ecx
    ja 1b
    # Nowhere: a function whose file does not tell the truth. The innermost frame is the best guess.
    "#,
    concat!("mov edi, dword ptr ", of_thread!("TOP")),
    r#"
3:
    mov eax, dword ptr [edi + {SHADOW_RETURN}]
    mov dword ptr [esp + 24], eax
.Lreturn_8:
    mov edx, dword ptr [edi + {SHADOW_OUTER}]
    mov esi, dword ptr [edi + {SHADOW_DEPTH}]
    and esi, {DEPTH_MASK}
    "#,
    reserve!(),
    concat!("mov dword ptr ", of_thread!("TOP"), ", edx"),
    "mov dword ptr [edi + {SHADOW_SLOT}], 0",
    write_record!("EXIT", ".Ltrapline_return_full"),
    r#"
.Ltrapline_return_leave:
    call 4f
4:
.Lreturn_9:
    lea esp, [esp + 4]
.Lreturn_10:
    pop edi
.Lreturn_11:
    pop esi
.Lreturn_12:
    pop edx
.Lreturn_13:
    pop ecx
.Lreturn_14:
    pop eax
.Lreturn_15:
    add al, 127
    sahf
    pop eax
.Lreturn_16:
    ret
.Ltrapline_return_full:
    call trapline_record_full
    jmp .Ltrapline_return_leave
.Lreturn_ends:
    .size trapline_return, . - trapline_return
    .popsection

    .pushsection .eh_frame,"a",@progbits
.Lreturn_common:
    .long .Lreturn_common_ends - .Lreturn_common - 4
    .long 0
    .byte 1
    .asciz "zR"
    .uleb128 1
    .sleb128 -4
    .byte 8
    .uleb128 1
    .byte 0x1b
    # DW_CFA_def_cfa esp, 1. DW_CFA_val_expression, register 4: lit1 minus.
    .byte 0x0c, 4, 1
    .byte 0x16, 4, 2, 0x31, 0x1c
    .p2align 2
.Lreturn_common_ends:
.Lreturn_entry:
    .long .Lreturn_entry_ends - .Lreturn_entry - 4
    .long . - .Lreturn_common
    .long .Lreturn_begins - .
    .long .Lreturn_ends - .Lreturn_begins
    .uleb128 0
    # DW_CFA_expression, register 8, 22 bytes: lit5 minus, dup lit16 shr lit2 shl addr plus deref, swap const2u 0xffff and lit2 shl, plus.
    .byte 0x10, 8, 22, 0x35, 0x1c, 0x12, 0x40, 0x25, 0x32, 0x24, 0x03
    .long trapline_shadows
    .byte 0x22, 0x06, 0x16, 0x0a, 0xff, 0xff, 0x1a, 0x32, 0x24, 0x22
    # DW_CFA_advance_loc1, DW_CFA_def_cfa_offset.
    .byte 2, .Lreturn_1 - .Lreturn_begins, 0x0e, 5
    .byte 2, .Lreturn_2 - .Lreturn_1, 0x0e, 9
    .byte 2, .Lreturn_3 - .Lreturn_2, 0x0e, 13
    .byte 2, .Lreturn_4 - .Lreturn_3, 0x0e, 17
    .byte 2, .Lreturn_5 - .Lreturn_4, 0x0e, 21
    # DW_CFA_expression, registers 6 and 7, 3 bytes: const1u minus. The caller's, which are lost in between.
    .byte 2, .Lreturn_6 - .Lreturn_5, 0x0e, 25, 0x10, 6, 3, 0x08, 25, 0x1c
    .byte 2, .Lreturn_7 - .Lreturn_6, 0x0e, 29, 0x10, 7, 3, 0x08, 29, 0x1c
    # DW_CFA_expression, register 8, 2 bytes: lit5 minus.
    .byte 2, .Lreturn_8 - .Lreturn_7, 0x10, 8, 2, 0x35, 0x1c
    .byte 2, .Lreturn_9 - .Lreturn_8, 0x0e, 33
    .byte 2, .Lreturn_10 - .Lreturn_9, 0x0e, 29
    # DW_CFA_same_value.
    .byte 2, .Lreturn_11 - .Lreturn_10, 0x0e, 25, 0x08, 7
    .byte 2, .Lreturn_12 - .Lreturn_11, 0x0e, 21, 0x08, 6
    .byte 2, .Lreturn_13 - .Lreturn_12, 0x0e, 17
    .byte 2, .Lreturn_14 - .Lreturn_13, 0x0e, 13
    .byte 2, .Lreturn_15 - .Lreturn_14, 0x0e, 9
    .byte 2, .Lreturn_16 - .Lreturn_15, 0x0e, 5
    .byte 2, .Ltrapline_return_full - .Lreturn_16, 0x0e, 29, 0x10, 6, 3, 0x08, 25, 0x1c, 0x10, 7, 3, 0x08, 29, 0x1c
    .p2align 2
.Lreturn_entry_ends:
    .popsection
    "#,
    THREAD = const INJECTED_THREAD_OFFSET,
    POSITION = const offset_of!(Thread, position),
    PLACE_IN_AH = const PLACE_IN_AH,
    TOP = const offset_of!(Thread, top),
    REFUSED = const REFUSED,
    SHADOW_RETURN = const SHADOW_RETURN,
    SHADOW_OUTER = const SHADOW_OUTER,
    SHADOW_SLOT = const SHADOW_SLOT,
    SHADOW_DEPTH = const SHADOW_DEPTH,
    BLOCK_SHIFT = const BLOCK_SHIFT,
    POPPED_SHIFT = const POPPED_SHIFT,
    POPPED_UNKNOWN = const POPPED_UNKNOWN,
    DEPTH_MASK = const DEPTH_MASK,
    UPPER_TSC_BITS = const UPPER_TSC_BITS,
    PAYLOAD_BITS = const PAYLOAD_BITS,
    EXIT = const kind::EXIT,
);

// The unwinder's expression.
const _: () = assert!(BLOCK_SHIFT == 16 && SHADOW_RETURN == 0);
