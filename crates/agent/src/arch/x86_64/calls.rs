//! From the entries to Rust and back, and what else the recorder calls or jumps to.

use core::mem::offset_of;

use trapline_abi::agent::{CALLS, Call, Config, ErrandRegisters};

use super::{CHUNK_BYTES, OnFull, PoolHeader, Thread, global_asm, number_of::PLACE_IN_AH};

global_asm!(
    r#"
    .hidden trapline_record
    .hidden trapline_prepare
    .hidden trapline_changed
    .hidden trapline_about_to_call
    .pushsection .text.trapline,"ax",@progbits

    # A record found no place. rcx: the thread's state; esi: the record's kind and payload. rax, rcx, rdx and rsi are lost.
    # Takes the reservation back, so that many of them do not add up to something that looks like a place: unless a signal handler has taken a chunk
    # since, which is one instruction's question. Then decides here what needs no more than a look, as every event does that when nobody drains any
    # more, or events are to be left out.
    .p2align 4
    .hidden trapline_record_full
    .globl trapline_record_full
    .type trapline_record_full, @function
trapline_record_full:
    .cfi_startproc
    "#,
    concat!("mov rax, qword ptr ", of_thread!("POSITION")),
    r#"
    test ah, {PLACE_IN_AH}
    jnz 4f
    mov rdx, rax
    and rdx, -{CHUNK_BYTES}
    "#,
    concat!("cmpxchg qword ptr ", of_thread!("POSITION"), ", rdx"),
    r#"
4:
    mov rdx, qword ptr [rip + trapline_config]
    test rdx, rdx
    jz 3f
    cmp dword ptr [rdx + {CLOSED}], 0
    jne 3f
    cmp dword ptr [rdx + {ON_FULL}], {DROP}
    jne 2f
    cmp dword ptr [rdx + {FREE_CHUNKS}], 0
    jne 2f
    # A chunk that is full has to be given up first. A timeless thread's is elsewhere.
    "#,
    concat!("mov rax, qword ptr ", of_thread!("POSITION")),
    concat!("or rax, qword ptr ", of_thread!("IS_TIMELESS")),
    r#"
    jnz 2f
    lock inc qword ptr [rdx + {LOST_FULL}]
    "#,
    concat!("inc qword ptr ", of_thread!("LOST")),
    r#"
3:
    ret
2:
    lea rax, [rip + trapline_record]
    .cfi_endproc
    # Falls through.

    # Calls the function in rax with rsi as its argument, and returns its result. rcx, rdx and rsi are lost, all else is kept: the other registers
    # that a function may change, the flags, and the low halves of the vector registers, whose upper halves the compiler does not use.
    .hidden trapline_in_rust
    .globl trapline_in_rust
    .type trapline_in_rust, @function
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

    # Called by the stubs of functions that can switch a sandbox on, with their arguments. Keeps every register.
    .p2align 4
    .hidden trapline_sandbox
    .globl trapline_sandbox
    .type trapline_sandbox, @function
trapline_sandbox:
    .cfi_startproc
    .cfi_def_cfa_offset 16
    "#,
    push!("rax"),
    push!("rcx"),
    push!("rdx"),
    push!("rsi"),
    push!("rdi"),
    "mov rsi, rsp",
    "lea rax, [rip + trapline_about_to_call]",
    "call trapline_in_rust",
    pop!("rdi"),
    pop!("rsi"),
    pop!("rdx"),
    pop!("rcx"),
    pop!("rax"),
    r#"
    ret
    .cfi_endproc
    .size trapline_sandbox, . - trapline_sandbox

    .hidden trapline_syscall
    .globl trapline_syscall
    .type trapline_syscall, @function
trapline_syscall:
    syscall
    int3
    .size trapline_syscall, . - trapline_syscall

    # The recorder sends a thread here, and takes it away again behind the system call. If it died meanwhile, nobody does, and the thread
    # takes itself back to where it was. Nothing is pushed here: what lies behind the stack pointer is the area itself.
    .hidden trapline_errand
    .globl trapline_errand
    .type trapline_errand, @function
trapline_errand:
    syscall
    # On its own stack: signals that waited come as soon as they may.
    mov rsp, qword ptr [rip + trapline_errand_registers + {ERRAND_RSP}]
    test dword ptr [rip + trapline_config + {FORBIDDEN}], {MASK_IS_FORBIDDEN}
    jnz 2f
    mov eax, {RT_SIGPROCMASK}
    mov edi, {SIG_SETMASK}
    lea rsi, [rip + trapline_errand_registers + {ERRAND_MASK}]
    xor edx, edx
    mov r10d, 8
    syscall
2:
    lea rsp, [rip + trapline_errand_registers]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    pop r11
    pop r10
    pop r9
    pop r8
    pop rax
    pop rcx
    pop rdx
    pop rsi
    pop rdi
    popfq
    mov rsp, qword ptr [rip + trapline_errand_registers + {ERRAND_RSP}]
    jmp qword ptr [rip + trapline_errand_registers + {ERRAND_RIP}]
    .size trapline_errand, . - trapline_errand
    .popsection
    "#,
    FORBIDDEN = const offset_of!(Config, forbidden),
    MASK_IS_FORBIDDEN = const Call::Sigprocmask.bit(),
    RT_SIGPROCMASK = const CALLS[Call::Sigprocmask as usize],
    SIG_SETMASK = const 2,
    ERRAND_MASK = const offset_of!(ErrandRegisters, signal_mask),
    ERRAND_RSP = const offset_of!(ErrandRegisters, rsp),
    ERRAND_RIP = const offset_of!(ErrandRegisters, rip),
    CLOSED = const offset_of!(PoolHeader, closed),
    ON_FULL = const offset_of!(PoolHeader, on_full),
    DROP = const OnFull::Drop as u32,
    FREE_CHUNKS = const offset_of!(PoolHeader, free_chunks),
    POSITION = const offset_of!(Thread, position),
    IS_TIMELESS = const offset_of!(Thread, is_timeless),
    PLACE_IN_AH = const PLACE_IN_AH,
    CHUNK_BYTES = const CHUNK_BYTES,
    LOST_FULL = const offset_of!(PoolHeader, lost_full),
    LOST = const offset_of!(Thread, lost),
);
