//! Counts calls in place: what entries and the return code do where nothing is recorded.
//!
//! Owns what they call when [`Config::counters`](trapline_abi::agent::Config::counters) is not 0, with the thread's distance in rcx. All registers that the callers have not
//! saved are kept. What is changed is the thread's own, one word by one instruction.
//!
//! # What a signal handler sees at any instruction
//!
//! `top` leads to a frame before its [`CountedFrame`] is written, and until after it was read: so a handler's frames are always one deeper, and never in its place. The
//! slot is written when the rest is there that a handler needs to tell that the function has an open call: what the handler's calls of the same function took counts once.

use core::mem::offset_of;

use trapline_abi::{
    agent::Config,
    counters::{
        BUCKETS, COUNTERS_AT, CountedFrame, Counter, FRAMES, OCTAVE_SHIFT, RegionHeader, TICKS_SHIFT, bucket_of,
    },
};

use super::{
    ADDRESS_BITS, SHADOW_BASE, SHADOW_OUTER, Thread, global_asm,
    number_of::{ABOVE_ADDRESS, DEPTH_MASK},
};

/// Ends the frame at rdi, in the region at r8, at the time in rax. rax, rcx, rdx and rsi are lost.
macro_rules! end_frame {
    () => {
        r#"
        mov esi, dword ptr [rdi + {SITE}]
        shl rsi, {COUNTER_SHIFT}
        lea rsi, [rsi + r8 + {COUNTERS_AT}]
        # A processor may be a little behind the one that the call began on.
        sub rax, qword ptr [rdi + {START}]
        jae 91f
        xor eax, eax
        91:
        add qword ptr [rdi - {FRAME_BYTES} + {CALLEES}], rax
        cmp qword ptr [rsi + {OUTERMOST}], rdi
        jne 92f
        add qword ptr [rsi + {TOTAL}], rax
        mov qword ptr [rsi + {OUTERMOST}], 0
        92:
        add qword ptr [rsi + {SUM}], rax
        mov rdx, rax
        sub rdx, qword ptr [rdi + {CALLEES}]
        jae 93f
        xor edx, edx
        93:
        add qword ptr [rsi + {OWN}], rdx
        # bucket_of
        shr rax, {TICKS_SHIFT}
        mov rcx, rax
        or rcx, 1 << {OCTAVE_SHIFT}
        bsr rcx, rcx
        sub ecx, {OCTAVE_SHIFT}
        shr rax, cl
        lea eax, [rax + 8*rcx]
        mov edx, {LAST_BUCKET}
        cmp eax, edx
        cmova eax, edx
        # From here on it has ended: who leaves a handler by longjmp does not have it ended again.
        mov qword ptr [rdi + {SLOT}], 0
        inc dword ptr [rsi + 4*rax + {DURATIONS}]
        cmp dword ptr [rdi + {SITE} + 4], 0
        je 94f
        mov rsi, rdi
        lea rax, [rip + trapline_record_end]
        call trapline_in_rust
        94:
        "#
    };
}

/// rax = the time-stamp counter; rdx is lost.
macro_rules! time_in_rax {
    () => {
        "rdtsc\nshl rdx, 32\nor rax, rdx\n"
    };
}

/// Compares the depth in eax with the innermost frame's; rdx is lost.
macro_rules! compare_with_top {
    () => {
        concat!("mov edx, dword ptr ", of_thread!("TOP"), "\nand edx, {DEPTH_MASK}\ncmp edx, eax\n")
    };
}

/// Calls the function whose address `$before` leaves in rax, and keeps rdx and rsi; rcx is the thread's distance again.
macro_rules! in_rust {
    ($before:literal) => {
        concat!(
            "push rdx\n.cfi_adjust_cfa_offset 8\npush rsi\n.cfi_adjust_cfa_offset 8\n",
            $before,
            "\ncall trapline_in_rust\npop rsi\n.cfi_adjust_cfa_offset -8\npop rdx\n.cfi_adjust_cfa_offset -8\n",
            thread_in_rcx!(),
        )
    };
}

global_asm!(
    r#"
    .hidden trapline_take_region
    .hidden trapline_end_deeper
    .hidden trapline_end_stale
    .hidden trapline_record_begin
    .hidden trapline_record_end
    .hidden trapline_record_point
    .pushsection .text.trapline,"ax",@progbits

    # A call has begun, and its frame is the innermost. esi: its site, rdx: its slot. rax, rcx, rdx, rsi and rdi are lost.
    .p2align 6
    .hidden trapline_count_enter
    .globl trapline_count_enter
    .type trapline_count_enter, @function
trapline_count_enter:
    .cfi_startproc
    "#,
    concat!("mov rax, qword ptr ", of_thread!("REGION")),
    r#"
    test rax, rax
    jz 6f
1:
    "#,
    concat!("mov edi, dword ptr ", of_thread!("TOP")),
    r#"
    and edi, {DEPTH_MASK}
    mov qword ptr [rax + {DEPTH}], rdi
    shl rdi, {FRAME_SHIFT}
    lea rdi, [rdi + rax + {FRAMES_AT}]
    # rax: the region, rdi: the frame.
.Ltrapline_count_open:
    cmp qword ptr [rdi + {SLOT}], 0
    jne 7f
2:
    mov qword ptr [rdi + {START}], 0
    mov qword ptr [rdi + {CALLEES}], 0
    mov qword ptr [rdi + {SITE}], rsi
    shl rsi, {COUNTER_SHIFT}
    lea rsi, [rsi + rax + {COUNTERS_AT}]
    inc qword ptr [rsi + {CALLS}]
    # From here on it is a call that can end.
    mov qword ptr [rdi + {SLOT}], rdx
    mov rax, qword ptr [rsi + {OUTERMOST}]
    test rax, rax
    jnz 5f
3:
    mov qword ptr [rsi + {OUTERMOST}], rdi
4:
    "#,
    time_in_rax!(),
    r#"
    mov qword ptr [rdi + {START}], rax
    cmp qword ptr [rip + trapline_config + {RECORDED}], 0
    jne 8f
    ret
8:
    mov rsi, rdi
    lea rax, [rip + trapline_record_begin]
    call trapline_in_rust
    ret
    # It has an open call already, if that frame is further out, and still this function's.
5:
    cmp rax, rdi
    jae 3b
    cmp qword ptr [rax + {SLOT}], 0
    je 3b
    mov rdx, qword ptr [rdi + {SITE}]
    cmp qword ptr [rax + {SITE}], rdx
    jne 3b
    jmp 4b
    # The thread's first call.
6:
    "#,
    in_rust!("lea rax, [rip + trapline_take_region]"),
    r#"
    test rax, rax
    jnz 1b
    ret
    # The frame was left open.
7:
    "#,
    in_rust!("mov rsi, rdi\nlea rax, [rip + trapline_end_stale]"),
    concat!("mov rax, qword ptr ", of_thread!("REGION")),
    r#"
    test rax, rax
    jnz 2b
    ret
    .cfi_endproc
    .size trapline_count_enter, . - trapline_count_enter

    # A call whose return is not seen. esi: its site. rax, rcx, rdx and rsi are lost.
    .p2align 4
    .hidden trapline_count_point
    .globl trapline_count_point
    .type trapline_count_point, @function
trapline_count_point:
    .cfi_startproc
    "#,
    concat!("mov rax, qword ptr ", of_thread!("REGION")),
    r#"
    test rax, rax
    jz 2f
1:
    mov rdx, rsi
    shl rdx, {COUNTER_SHIFT}
    inc qword ptr [rdx + rax + {COUNTERS_AT} + {CALLS}]
    cmp qword ptr [rip + trapline_config + {RECORDED}], 0
    jne 3f
    ret
3:
    lea rax, [rip + trapline_record_point]
    call trapline_in_rust
    ret
2:
    "#,
    "push rsi\n.cfi_adjust_cfa_offset 8",
    "lea rax, [rip + trapline_take_region]",
    "call trapline_in_rust",
    "pop rsi\n.cfi_adjust_cfa_offset -8",
    r#"
    test rax, rax
    jnz 1b
    ret
    .cfi_endproc
    .size trapline_count_point, . - trapline_count_point

    # A function was jumped to, and takes over the frame of the slot in rdx. esi: its site. rax, rcx, rdx, rsi and rdi are lost.
    .p2align 6
    .hidden trapline_count_tail
    .globl trapline_count_tail
    .type trapline_count_tail, @function
trapline_count_tail:
    .cfi_startproc
    "#,
    "push r8\n.cfi_adjust_cfa_offset 8",
    shadow_of_rdx!("rdi"),
    "mov rdi, qword ptr [rdi + {SHADOW_OUTER}]",
    concat!("mov r8, qword ptr ", of_thread!("REGION")),
    r#"
    test r8, r8
    jz 4f
1:
    lea eax, [rdi + 1]
    and eax, {DEPTH_MASK}
    "#,
    // The slot in the stack, and the depth, are needed later.
    "push rdx\n.cfi_adjust_cfa_offset 8",
    "push rsi\n.cfi_adjust_cfa_offset 8",
    compare_with_top!(),
    r#"
    jne 5f
2:
    mov qword ptr [r8 + {DEPTH}], rax
    shl rax, {FRAME_SHIFT}
    lea rdi, [rax + r8 + {FRAMES_AT}]
    mov rdx, qword ptr [rsp + 8]
    cmp qword ptr [rdi + {SLOT}], rdx
    jne 3f
    "#,
    time_in_rax!(),
    end_frame!(),
    "3:",
    ".cfi_remember_state",
    "pop rsi\n.cfi_adjust_cfa_offset -8",
    "pop rdx\n.cfi_adjust_cfa_offset -8",
    "mov rax, r8",
    "pop r8\n.cfi_adjust_cfa_offset -8",
    thread_in_rcx!(),
    r#"
    jmp .Ltrapline_count_open
    .cfi_restore_state
    # Frames that are deeper were left.
5:
    mov esi, eax
    "#,
    "push rax\n.cfi_adjust_cfa_offset 8",
    "lea rax, [rip + trapline_end_deeper]",
    "call trapline_in_rust",
    "pop rax\n.cfi_adjust_cfa_offset -8",
    r#"
    jmp 2b
    # The first call that is counted.
4:
    .cfi_adjust_cfa_offset -16
    "#,
    in_rust!("lea rax, [rip + trapline_take_region]"),
    r#"
    mov r8, rax
    test r8, r8
    jnz 1b
    "#,
    "pop r8\n.cfi_adjust_cfa_offset -8",
    r#"
    ret
    .cfi_endproc
    .size trapline_count_tail, . - trapline_count_tail

    # A hooked function has returned. rdx: the frame outside of its own, packed, rsi: its slot. Makes that frame the innermost. rax, rcx, rdx and rsi are lost.
    .p2align 6
    .hidden trapline_count_exit
    .globl trapline_count_exit
    .type trapline_count_exit, @function
trapline_count_exit:
    .cfi_startproc
    "#,
    "push rdi\n.cfi_adjust_cfa_offset 8",
    "push r8\n.cfi_adjust_cfa_offset 8",
    "mov rdi, rdx",
    concat!("mov r8, qword ptr ", of_thread!("REGION")),
    r#"
    test r8, r8
    jz 3f
    lea eax, [rdi + 1]
    and eax, {DEPTH_MASK}
    "#,
    compare_with_top!(),
    r#"
    jne 4f
1:
    shl rax, {FRAME_SHIFT}
    lea rax, [rax + r8 + {FRAMES_AT}]
    cmp qword ptr [rax + {SLOT}], rsi
    jne 2f
    "#,
    "push rdi\n.cfi_adjust_cfa_offset 8",
    "mov rdi, rax",
    time_in_rax!(),
    end_frame!(),
    "pop rdi\n.cfi_adjust_cfa_offset -8",
    thread_in_rcx!(),
    r#"
2:
    mov eax, edi
    and eax, {DEPTH_MASK}
    mov qword ptr [r8 + {DEPTH}], rax
3:
    "#,
    concat!("mov qword ptr ", of_thread!("TOP"), ", rdi"),
    ".cfi_remember_state",
    "pop r8\n.cfi_adjust_cfa_offset -8",
    "pop rdi\n.cfi_adjust_cfa_offset -8",
    r#"
    ret
    .cfi_restore_state
4:
    "#,
    "push rsi\n.cfi_adjust_cfa_offset 8",
    "push rax\n.cfi_adjust_cfa_offset 8",
    "mov esi, eax",
    "lea rax, [rip + trapline_end_deeper]",
    "call trapline_in_rust",
    "pop rax\n.cfi_adjust_cfa_offset -8",
    "pop rsi\n.cfi_adjust_cfa_offset -8",
    thread_in_rcx!(),
    r#"
    jmp 1b
    .cfi_endproc
    .size trapline_count_exit, . - trapline_count_exit
    .popsection
    "#,
    TOP = const offset_of!(Thread, top),
    REGION = const offset_of!(Thread, region),
    DEPTH = const offset_of!(RegionHeader, depth),
    DEPTH_MASK = const DEPTH_MASK,
    FRAMES_AT = const size_of::<RegionHeader>(),
    FRAME_BYTES = const size_of::<CountedFrame>(),
    FRAME_SHIFT = const size_of::<CountedFrame>().trailing_zeros(),
    RECORDED = const offset_of!(Config, recorded),
    SLOT = const offset_of!(CountedFrame, slot),
    SITE = const offset_of!(CountedFrame, site),
    START = const offset_of!(CountedFrame, start),
    CALLEES = const offset_of!(CountedFrame, callees),
    COUNTERS_AT = const COUNTERS_AT,
    COUNTER_SHIFT = const size_of::<Counter>().trailing_zeros(),
    CALLS = const offset_of!(Counter, calls),
    OUTERMOST = const offset_of!(Counter, outermost),
    TOTAL = const offset_of!(Counter, total),
    OWN = const offset_of!(Counter, own),
    SUM = const offset_of!(Counter, sum),
    DURATIONS = const offset_of!(Counter, durations),
    TICKS_SHIFT = const TICKS_SHIFT,
    OCTAVE_SHIFT = const OCTAVE_SHIFT,
    LAST_BUCKET = const BUCKETS - 1,
    SHADOW_BASE = const SHADOW_BASE,
    SHADOW_OUTER = const SHADOW_OUTER,
    ABOVE_ADDRESS = const ABOVE_ADDRESS,
);

// `lea eax, [rax + 8*rcx]`, and the frames' addresses.
const _: () = assert!(1 << OCTAVE_SHIFT == 8 && bucket_of(u64::MAX) == BUCKETS - 1);
const _: () = assert!(size_of::<CountedFrame>().is_power_of_two() && size_of::<Counter>().is_power_of_two());
const _: () = assert!(COUNTERS_AT + FRAMES < i32::MAX as usize && ADDRESS_BITS == 47);
const _: () = assert!(offset_of!(Config, counters) == 56);
