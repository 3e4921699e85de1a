//! From the entries to Rust and back, and what else the recorder calls or jumps to.

use core::mem::offset_of;

use trapline_abi::agent::{Call, Config, ErrandRegisters, INJECTED_THREAD_OFFSET, NARROW_CALLS};

use super::{CHUNK_BYTES, OnFull, PoolHeader, Thread, global_asm, number_of::PLACE_IN_AH};

global_asm!(
    r#"
    .hidden trapline_record
    .hidden trapline_prepare
    .hidden trapline_changed
    .hidden trapline_about_to_call
    .pushsection .text.trapline,"ax",@progbits

    # A record found no place. esi: the record's kind and payload. eax, ecx, edx and esi are lost.
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
    concat!("mov eax, dword ptr ", of_thread!("POSITION")),
    r#"
    test ah, {PLACE_IN_AH}
    jnz 4f
    mov edx, eax
    and edx, -{CHUNK_BYTES}
    "#,
    concat!("cmpxchg dword ptr ", of_thread!("POSITION"), ", edx"),
    r#"
4:
    mov edx, dword ptr [trapline_config]
    test edx, edx
    jz 3f
    cmp dword ptr [edx + {CLOSED}], 0
    jne 3f
    cmp dword ptr [edx + {ON_FULL}], {DROP}
    jne 2f
    cmp dword ptr [edx + {FREE_CHUNKS}], 0
    jne 2f
    # A chunk that is full has to be given up first. A timeless thread's is elsewhere.
    "#,
    concat!("mov eax, dword ptr ", of_thread!("POSITION")),
    concat!("or eax, dword ptr ", of_thread!("IS_TIMELESS")),
    r#"
    jnz 2f
    # Two halves: whoever overflows the lower one carries into the upper one.
    lock add dword ptr [edx + {LOST_FULL}], 1
    lock adc dword ptr [edx + {LOST_FULL} + 4], 0
    "#,
    concat!("inc dword ptr ", of_thread!("LOST")),
    r#"
3:
    ret
2:
    mov eax, offset trapline_record
    .cfi_endproc
    # Falls through.

    # Calls the function in eax with esi as its argument, and returns its result. ecx, edx and esi are lost, all else is kept: the other registers
    # that a function may change, the flags, and the low halves of the vector registers, whose upper halves the compiler does not use.
    .hidden trapline_in_rust
    .globl trapline_in_rust
    .type trapline_in_rust, @function
trapline_in_rust:
    .cfi_startproc
    push ebp
    .cfi_def_cfa_offset 8
    .cfi_offset ebp, -8
    mov ebp, esp
    .cfi_def_cfa_register ebp
    pushfd
    cld
    sub esp, 144
    and esp, -16
    "#,
    vectors!(save "16"),
    r#"
    mov dword ptr [esp], esi
    call eax
    "#,
    vectors!(restore "16"),
    r#"
    lea esp, [ebp - 4]
    popfd
    pop ebp
    .cfi_def_cfa esp, 4
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
    push!("eax"),
    push!("ecx"),
    push!("edx"),
    push!("esi"),
    "mov eax, offset trapline_changed",
    "call trapline_in_rust",
    pop!("esi"),
    pop!("edx"),
    pop!("ecx"),
    pop!("eax"),
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
    .cfi_def_cfa_offset 8
    "#,
    push!("eax"),
    push!("ecx"),
    push!("edx"),
    push!("esi"),
    "lea esi, [esp + 16]",
    "mov eax, offset trapline_about_to_call",
    "call trapline_in_rust",
    pop!("esi"),
    pop!("edx"),
    pop!("ecx"),
    pop!("eax"),
    r#"
    ret
    .cfi_endproc
    .size trapline_sandbox, . - trapline_sandbox

    .hidden trapline_syscall
    .globl trapline_syscall
    .type trapline_syscall, @function
trapline_syscall:
    int 0x80
    int3
    .size trapline_syscall, . - trapline_syscall

    # The recorder sends a thread here, and takes it away again behind the system call. If it died meanwhile, nobody does, and the thread
    # takes itself back to where it was.
    .hidden trapline_errand
    .globl trapline_errand
    .type trapline_errand, @function
trapline_errand:
    int 0x80
    # On its own stack: signals that waited come as soon as they may.
    mov esp, dword ptr [trapline_errand_registers + {ERRAND_RSP}]
    test dword ptr [trapline_config + {FORBIDDEN}], {MASK_IS_FORBIDDEN}
    jnz 2f
    mov eax, {RT_SIGPROCMASK}
    mov ebx, {SIG_SETMASK}
    mov ecx, offset trapline_errand_registers + {ERRAND_MASK}
    xor edx, edx
    mov esi, 8
    int 0x80
2:
    push dword ptr [trapline_errand_registers + {ERRAND_FLAGS}]
    popfd
    mov ebp, dword ptr [trapline_errand_registers + 8*4]
    mov ebx, dword ptr [trapline_errand_registers + 8*5]
    mov eax, dword ptr [trapline_errand_registers + 8*10]
    mov ecx, dword ptr [trapline_errand_registers + 8*11]
    mov edx, dword ptr [trapline_errand_registers + 8*12]
    mov esi, dword ptr [trapline_errand_registers + 8*13]
    mov edi, dword ptr [trapline_errand_registers + 8*14]
    jmp dword ptr [trapline_errand_registers + {ERRAND_RIP}]
    .size trapline_errand, . - trapline_errand

    # A system call: its number, and its six arguments in memory.
    .p2align 4
    .hidden trapline_call_kernel
    .globl trapline_call_kernel
    .type trapline_call_kernel, @function
trapline_call_kernel:
    .cfi_startproc
    "#,
    push!("ebx"),
    push!("esi"),
    push!("edi"),
    push!("ebp"),
    r#"
    mov eax, dword ptr [esp + 20]
    mov ebp, dword ptr [esp + 24]
    mov ebx, dword ptr [ebp]
    mov ecx, dword ptr [ebp + 4]
    mov edx, dword ptr [ebp + 8]
    mov esi, dword ptr [ebp + 12]
    mov edi, dword ptr [ebp + 16]
    mov ebp, dword ptr [ebp + 20]
    int 0x80
    "#,
    pop!("ebp"),
    pop!("edi"),
    pop!("esi"),
    pop!("ebx"),
    r#"
    ret
    .cfi_endproc
    .size trapline_call_kernel, . - trapline_call_kernel

    # Two words, what they are expected to be and shall be: whether they are now.
    .p2align 4
    .hidden trapline_exchange_pair
    .globl trapline_exchange_pair
    .type trapline_exchange_pair, @function
trapline_exchange_pair:
    .cfi_startproc
    "#,
    push!("ebx"),
    push!("esi"),
    r#"
    mov ecx, dword ptr [esp + 16]
    mov eax, dword ptr [ecx]
    mov edx, dword ptr [ecx + 4]
    mov ecx, dword ptr [esp + 20]
    mov ebx, dword ptr [ecx]
    mov ecx, dword ptr [ecx + 4]
    mov esi, dword ptr [esp + 12]
    cmpxchg8b qword ptr [esi]
    sete al
    movzx eax, al
    "#,
    pop!("esi"),
    pop!("ebx"),
    r#"
    ret
    .cfi_endproc
    .size trapline_exchange_pair, . - trapline_exchange_pair
    .popsection
    "#,
    THREAD = const INJECTED_THREAD_OFFSET,
    FORBIDDEN = const offset_of!(Config, forbidden),
    MASK_IS_FORBIDDEN = const Call::Sigprocmask.bit(),
    RT_SIGPROCMASK = const NARROW_CALLS[Call::Sigprocmask as usize],
    SIG_SETMASK = const 2,
    ERRAND_MASK = const offset_of!(ErrandRegisters, signal_mask),
    ERRAND_FLAGS = const offset_of!(ErrandRegisters, flags),
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

const _: () = assert!(offset_of!(ErrandRegisters, general) == 0);
