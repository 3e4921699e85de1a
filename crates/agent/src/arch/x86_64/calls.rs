//! From the entries to Rust and back, and what else the recorder calls or jumps to.

use core::mem::offset_of;

use super::{OnFull, PoolHeader, Thread, global_asm};

global_asm!(
    r#"
    .hidden trapline_record
    .hidden trapline_prepare
    .hidden trapline_changed
    .pushsection .text.trapline,"ax",@progbits

    # A record found no place. rcx: the thread's state; esi: the record's kind and payload. rax, rcx, rdx and rsi are lost.
    # Decides here what needs no more than a look, as every event does that when nobody drains any more, or events are to be left out.
    .p2align 4
    .type trapline_record_full, @function
trapline_record_full:
    .cfi_startproc
    mov rdx, qword ptr [rip + trapline_config]
    test rdx, rdx
    jz 3f
    cmp dword ptr [rdx + {CLOSED}], 0
    jne 3f
    cmp dword ptr [rdx + {ON_FULL}], {DROP}
    jne 2f
    cmp dword ptr [rdx + {FREE_HEAD}], 0
    jne 2f
    lock inc qword ptr [rdx + {LOST_FULL}]
    inc qword ptr fs:[rcx + {LOST}]
3:
    ret
2:
    lea rax, [rip + trapline_record]
    .cfi_endproc
    # Falls through.

    # Calls the function in rax with rsi as its argument, and returns its result. rcx, rdx and rsi are lost, all else is kept: the other registers
    # that a function may change, the flags, and the low halves of the vector registers, whose upper halves the compiler does not use.
trapline_in_rust:
    .cfi_startproc
    push rbp
    .cfi_def_cfa_offset 16
    .cfi_offset rbp, -16
    mov rbp, rsp
    .cfi_def_cfa_register rbp
    pushfq
    cld
    push rdi
    push r8
    push r9
    push r10
    push r11
    sub rsp, 256
    and rsp, -16
    "#,
    vectors!(save),
    r#"
    mov rdi, rsi
    call rax
    "#,
    vectors!(restore),
    r#"
    lea rsp, [rbp - 48]
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    popfq
    pop rbp
    .cfi_def_cfa rsp, 8
    ret
    .cfi_endproc

    # Stands in for the dynamic linker's `_dl_debug_state`, an empty function. Keeps every register.
    .p2align 4
    .hidden trapline_objects_changed
    .globl trapline_objects_changed
    .type trapline_objects_changed, @function
trapline_objects_changed:
    .cfi_startproc
    "#,
    push!("rax"),
    push!("rcx"),
    push!("rdx"),
    push!("rsi"),
    "lea rax, [rip + trapline_changed]",
    "call trapline_in_rust",
    pop!("rsi"),
    pop!("rdx"),
    pop!("rcx"),
    pop!("rax"),
    r#"
    ret
    .cfi_endproc
    .size trapline_objects_changed, . - trapline_objects_changed

    .hidden trapline_syscall
    .globl trapline_syscall
    .type trapline_syscall, @function
trapline_syscall:
    syscall
    int3
    .size trapline_syscall, . - trapline_syscall
    .popsection
    "#,
    CLOSED = const offset_of!(PoolHeader, closed),
    ON_FULL = const offset_of!(PoolHeader, on_full),
    DROP = const OnFull::Drop as u32,
    FREE_HEAD = const offset_of!(PoolHeader, free_head),
    LOST_FULL = const offset_of!(PoolHeader, lost_full),
    LOST = const offset_of!(Thread, lost),
);
