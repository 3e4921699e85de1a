//! How hooked functions are launched, and where they return to.
//!
//! A processor remembers the calls, and predicts that each `ret` leads behind the last one. A hooked function returns elsewhere than behind its caller's call, so it is called
//! once more, by `trapline_launch`, the instruction in front of `trapline_return`. Its `ret` is then predicted, and so is the one here, which belongs to its caller's call.
//! The call stores in the slot what is there already.
//!
//! ```text
//!                        at trapline_return    with n words pushed
//! slot + 8  (caller's)   rsp
//! slot                   rsp - 8               rsp + 8n
//! ```
//!
//! The slot lies below the stack pointer when a function has just returned, in the red zone, where signal handlers leave it alone.
//!
//! # Unwinding
//!
//! A hooked slot holds `trapline_return`, so unwinders come here, and look up the address before it: the entry starts with the last byte of the call.
//! The canonical frame address is one *above* the stack pointer, which is then given by a rule of its own: were both equal, libgcc would take this frame
//! for the one of the handler that it looks for, and were the former smaller, gdb would take the stack for corrupt. The return address is where
//! `shadow_address` says, computed from the slot, which is 9 below. That holds until the end, as nobody changes the shadow meanwhile. Not marked
//! as a signal frame, which would shift the lookup of the caller.
//!
//! This is for whoever reads unwind information by itself: debuggers, profilers, libunwind. libgcc, which nearly every program has for exceptions and
//! backtraces, is led past the return code by [`unwind`](crate::unwind), and sees no frame of it.
//!
//! # What a signal handler sees at any instruction
//!
//! The place for the record is reserved before `top` leads to the outer frame. A handler between the two has its records behind this one, one deeper
//! than the reader thinks, as described for the [entries](super::entries).

use core::mem::offset_of;

use trapline_abi::{agent::Config, record::kind};

use super::{
    ADDRESS_BITS, PAYLOAD_BITS, SHADOW_BASE, SHADOW_OUTER, SHADOW_RETURN, Thread, global_asm,
    number_of::{ABOVE_ADDRESS, DEPTH_MASK, PLACE_IN_AH, UPPER_TSC_BITS},
};

global_asm!(
    r#"
    .pushsection .text.trapline,"ax",@progbits
    .p2align 6
    .hidden trapline_launch
    .globl trapline_launch
    .type trapline_launch, @function
trapline_launch:
    .cfi_startproc
    .cfi_def_cfa_offset 16
    lea rsp, [rsp + 16]
    .cfi_def_cfa rsp, 1
    # As below, but the return address is in the slot. DW_CFA_expression, register 16, 2 bytes: lit9 minus.
    .cfi_escape 0x16, 7, 2, 0x31, 0x1c
    .cfi_escape 0x10, 16, 2, 0x39, 0x1c
    # call qword ptr [rsp - 16], whose last byte is looked up for what comes behind.
    .byte 0xff, 0x54, 0x24
    .cfi_endproc
    .size trapline_launch, . - trapline_launch
    .hidden trapline_return
    .globl trapline_return
    .type trapline_return, @function
    .cfi_startproc
    .cfi_def_cfa rsp, 1
    # Stack pointer: DW_CFA_val_expression, register 7, 2 bytes: lit1 minus.
    .cfi_escape 0x16, 7, 2, 0x31, 0x1c
    # Return address: DW_CFA_expression, register 16, 13 bytes: lit9 minus, dup plus, lit3 const1u 45 shl plus, lit17 shl lit17 shr.
    .cfi_escape 0x10, 16, 13, 0x39, 0x1c, 0x12, 0x22, 0x33, 0x08, 45, 0x24, 0x22, 0x41, 0x24, 0x41, 0x25
    .byte 0xf0
trapline_return:
    lea rsp, [rsp - 8]
    .cfi_adjust_cfa_offset 8
    "#,
    // Results and flags are the function's: all registers are kept. These are not the caller's to unwind, so no rules for them.
    "push rax\n.cfi_adjust_cfa_offset 8",
    push_flags!(),
    "push rcx\n.cfi_adjust_cfa_offset 8",
    "push rdx\n.cfi_adjust_cfa_offset 8",
    "push rsi\n.cfi_adjust_cfa_offset 8",
    "lea rdx, [rsp + 40]",
    thread_in_rcx!(),
    shadow_of_rdx!("rsi"),
    "mov rax, qword ptr [rsi + {SHADOW_RETURN}]",
    "mov qword ptr [rdx], rax",
    "mov rdx, qword ptr [rsi + {SHADOW_OUTER}]",
    "cmp qword ptr [rip + trapline_config + {COUNTERS}], 0",
    "jne .Ltrapline_return_count",
    reserve!(),
    concat!("mov qword ptr ", of_thread!("TOP"), ", rdx"),
    "lea esi, [rdx + 1]",
    "and esi, {DEPTH_MASK}",
    write_record!("EXIT", ".Ltrapline_return_full"),
    r#"
.Ltrapline_return_leave:
    .cfi_remember_state
    pop rsi
    .cfi_adjust_cfa_offset -8
    pop rdx
    .cfi_adjust_cfa_offset -8
    pop rcx
    .cfi_adjust_cfa_offset -8
    "#,
    pop_flags!(),
    r#"
    pop rax
    .cfi_adjust_cfa_offset -8
    # Predicted: the function's own return went with the launch.
    ret
    .cfi_restore_state
.Ltrapline_return_count:
    lea rsi, [rsp + 40]
    call trapline_count_exit
    jmp .Ltrapline_return_leave
.Ltrapline_return_full:
    call trapline_record_full
    jmp .Ltrapline_return_leave
    .cfi_endproc
    .size trapline_return, . - trapline_return
    .popsection
    "#,
    POSITION = const offset_of!(Thread, position),
    PLACE_IN_AH = const PLACE_IN_AH,
    TOP = const offset_of!(Thread, top),
    SHADOW_BASE = const SHADOW_BASE,
    SHADOW_RETURN = const SHADOW_RETURN,
    SHADOW_OUTER = const SHADOW_OUTER,
    DEPTH_MASK = const DEPTH_MASK,
    ABOVE_ADDRESS = const ABOVE_ADDRESS,
    UPPER_TSC_BITS = const UPPER_TSC_BITS,
    PAYLOAD_BITS = const PAYLOAD_BITS,
    EXIT = const kind::EXIT,
    COUNTERS = const offset_of!(Config, counters),
);

// The unwinder's expression.
const _: () = assert!(SHADOW_BASE == 3 << 45);
const _: () = assert!(SHADOW_RETURN == 0);
const _: () = assert!(64 - ADDRESS_BITS == 17);
