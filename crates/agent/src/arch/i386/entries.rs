//! The entries: what an armed function's stub calls.
//!
//! At the entry of one, and with `n` words pushed by it:
//!
//! ```text
//! esp + 4n + 4   slot: the return address of the armed function
//! esp + 4n       where the stub goes on; the site's id and what the function pops lie SITE_ID_OFFSET bytes from it
//! ```
//!
//! For unwinders an entry stands for the armed function: its canonical frame address is that of the function, whose registers are all still
//! there, so that the caller is found through the slot.
//!
//! # What a signal handler or an unwinder sees at any instruction
//!
//! 1. The shadow is written first. Nothing leads to it, and a handler's own frames have other slots.
//! 2. `top` leads to the new frame. A handler's frames are then inside of it, and leave `top` as they found it.
//! 3. The slot is hooked. From here on an unwinder comes to `trapline_return`, whose rule finds the shadow complete.
//! 4. The record is reserved. A handler that came between 2 and 4 has its records before this one, one deeper than the reader thinks: an exit that is deeper
//!    than what is open ends the innermost frame, which then is the right one.
//!
//! A handler that leaves by longjmp at any of them leaves a frame that is found stale later, or a place for a record that stays zero.
//!
//! # Functions that take their arguments off the stack
//!
//! When such a function has returned, the stack pointer does not tell where its slot was, so its shadow says how many words it pops. A frame that was left
//! by longjmp may have had its slot where arguments of a later call are now, and would be taken for that call's: so whoever is entered with such arguments
//! first forgets the frames whose slots were there.

use core::mem::offset_of;

use trapline_abi::{
    agent::{Config, INJECTED_THREAD_OFFSET},
    record::kind,
};

use super::{
    BLOCK_SHIFT, DEPTH_BITS, PAYLOAD_BITS, POPPED_SHIFT, POPPED_UNKNOWN, REFUSED, SHADOW_DEPTH, SHADOW_OUTER,
    SHADOW_RETURN, SHADOW_SLOT, SITE_ID_OFFSET, Thread, global_asm,
    number_of::{DEPTH_MASK, PLACE_IN_AH, SITE_MASK, UPPER_TSC_BITS},
};
use crate::frames::Prepared;

/// esi = the site's id and what the function pops.
macro_rules! site {
    ($extra:literal) => {
        concat!("mov esi, dword ptr [esp + 20 + ", $extra, "]\n", "mov esi, dword ptr [esi + {SITE_ID_OFFSET}]\n")
    };
}

/// An entry that hooks the return. `$extra` is the size of what `$save` pushes between eax and the rest, `$limit` may jump to `$leave`.
macro_rules! enter {
    ($name:literal, $extra:literal, $save:expr, $restore:expr, $limit:expr) => {
        concat!(
            begin_function!($name),
            ".cfi_def_cfa_offset 8\n",
            push!("eax"),
            $save,
            push!("ecx"),
            push!("edx"),
            push!("esi"),
            push!("edi"),
            "lea edx, [esp + 24 + ",
            $extra,
            "]\n",
            // A slot that is hooked already: the function was jumped to, and takes the frame over.
            "cmp dword ptr [edx], offset trapline_return\n",
            "je .L",
            $name,
            "_tail\n",
            shadow_of_edx!("edi", "esi", concat!(".L", $name, "_prepare")),
            "test dl, 3\n",
            "jnz .L",
            $name,
            "_prepare\n",
            // Is the innermost frame further out than the slot?
            "mov eax, dword ptr ",
            of_thread!("TOP"),
            "\n",
            "test eax, eax\n",
            "jz .L",
            $name,
            "_prepare\n",
            "cmp dword ptr [eax + {SHADOW_SLOT}], edx\n",
            "jbe .L",
            $name,
            "_prepare\n",
            ".L",
            $name,
            "_open:\n",
            $limit,
            // The frame, in the order that the module's text explains.
            "mov dword ptr [edi + {SHADOW_OUTER}], eax\n",
            "mov ecx, dword ptr [eax + {SHADOW_DEPTH}]\n",
            "inc ecx\n",
            "and ecx, {DEPTH_MASK}\n",
            site!($extra),
            "mov eax, esi\n",
            "and eax, ~{SITE_MASK}\n",
            "or ecx, eax\n",
            "mov dword ptr [edi + {SHADOW_DEPTH}], ecx\n",
            "mov dword ptr [edi + {SHADOW_SLOT}], edx\n",
            "shr eax, {POPPED_SHIFT}\n",
            "jnz .L",
            $name,
            "_pops\n",
            ".L",
            $name,
            "_hook:\n",
            "and esi, {SITE_MASK}\n",
            "mov eax, dword ptr [edx]\n",
            "mov dword ptr [edi + {SHADOW_RETURN}], eax\n",
            "mov dword ptr ",
            of_thread!("TOP"),
            ", edi\n",
            "mov dword ptr [edx], offset trapline_return\n",
            reserve!(),
            write_record!("ENTER", concat!(".L", $name, "_full")),
            ".L",
            $name,
            "_leave:\n",
            ".cfi_remember_state\n",
            pop!("edi"),
            pop!("esi"),
            pop!("edx"),
            pop!("ecx"),
            $restore,
            pop!("eax"),
            "ret\n",
            ".cfi_restore_state\n",
            ".L",
            $name,
            "_full:\n",
            "call trapline_record_full\n",
            "jmp .L",
            $name,
            "_leave\n",
            // Arguments that are popped lie over the slots of frames that are gone. eax: how many words.
            ".L",
            $name,
            "_pops:\n",
            "call trapline_forget_above\n",
            "jmp .L",
            $name,
            "_hook\n",
            ".L",
            $name,
            "_tail:\n",
            site!($extra),
            // The frame pops what its last function does.
            shadow_of_edx!("edi", "ecx", concat!(".L", $name, "_tail_record")),
            "mov ecx, dword ptr [edi + {SHADOW_DEPTH}]\n",
            "and ecx, {DEPTH_MASK}\n",
            "mov eax, esi\n",
            "and eax, ~{SITE_MASK}\n",
            "or ecx, eax\n",
            "mov dword ptr [edi + {SHADOW_DEPTH}], ecx\n",
            "shr eax, {POPPED_SHIFT}\n",
            "jz .L",
            $name,
            "_tail_record\n",
            "call trapline_forget_above\n",
            ".L",
            $name,
            "_tail_record:\n",
            "and esi, {SITE_MASK}\n",
            reserve!(),
            write_record!("TAIL", concat!(".L", $name, "_full")),
            "jmp .L",
            $name,
            "_leave\n",
            ".L",
            $name,
            "_prepare:\n",
            "mov esi, edx\n",
            "mov eax, offset trapline_prepare\n",
            "call trapline_in_rust\n",
            "lea edx, [esp + 24 + ",
            $extra,
            "]\n",
            "cmp eax, {POINT_ONLY}\n",
            "jb .L",
            $name,
            "_push\n",
            "ja .L",
            $name,
            "_leave\n",
            site!($extra),
            "and esi, {SITE_MASK}\n",
            reserve!(),
            write_record!("POINT", concat!(".L", $name, "_full")),
            "jmp .L",
            $name,
            "_leave\n",
            // The innermost frame may lie on another stack, further in.
            ".L",
            $name,
            "_push:\n",
            shadow_of_edx!("edi", "esi", concat!(".L", $name, "_leave")),
            "mov eax, dword ptr ",
            of_thread!("TOP"),
            "\n",
            "jmp .L",
            $name,
            "_open\n",
            end_function!($name),
        )
    };
}

/// The entry that never hooks. `$extra` is the size of what `$save` pushes between eax and the rest.
macro_rules! point {
    ($name:literal, $extra:literal, $save:expr, $restore:expr) => {
        concat!(
            begin_function!($name),
            ".cfi_def_cfa_offset 8\n",
            push!("eax"),
            $save,
            push!("ecx"),
            push!("edx"),
            push!("esi"),
            "mov esi, dword ptr [esp + 16 + ",
            $extra,
            "]\n",
            "mov esi, dword ptr [esi + {SITE_ID_OFFSET}]\n",
            "and esi, {SITE_MASK}\n",
            reserve!(),
            write_record!("POINT", concat!(".L", $name, "_full")),
            ".L",
            $name,
            "_leave:\n",
            ".cfi_remember_state\n",
            pop!("esi"),
            pop!("edx"),
            pop!("ecx"),
            $restore,
            pop!("eax"),
            "ret\n",
            ".cfi_restore_state\n",
            ".L",
            $name,
            "_full:\n",
            "call trapline_record_full\n",
            "jmp .L",
            $name,
            "_leave\n",
            end_function!($name),
        )
    };
}

global_asm!(
    ".pushsection .text.trapline,\"ax\",@progbits",
    enter!("trapline_enter", "0", "", "", ""),
    enter!("trapline_enter_keep_flags", "4", push_flags!(), pop_flags!(), ""),
    // Frames are as deep as the limit allows: this one is left out.
    enter!(
        "trapline_enter_limited",
        "4",
        push_flags!(),
        pop_flags!(),
        concat!(
            "mov ecx, dword ptr [eax + {SHADOW_DEPTH}]\n",
            "and ecx, {DEPTH_MASK}\n",
            "cmp ecx, dword ptr [trapline_config + {MAX_DEPTH}]\n",
            "jae .Ltrapline_enter_limited_leave\n",
        )
    ),
    point!("trapline_point", "0", "", ""),
    point!("trapline_point_keep_flags", "4", push_flags!(), pop_flags!()),
    ".hidden trapline_entries_end\n.globl trapline_entries_end\ntrapline_entries_end:",
    r#"
    # Forgets the frames whose slots are among the eax words above the slot in edx. eax and ecx are lost.
    .p2align 4
    .hidden trapline_forget_above
    .globl trapline_forget_above
    .type trapline_forget_above, @function
trapline_forget_above:
    .cfi_startproc
    cmp eax, {POPPED_UNKNOWN}
    je 3f
    "#,
    push!("edx"),
    push!("edi"),
    r#"
1:  add edx, 4
    "#,
    shadow_of_edx!("edi", "ecx", "2f"),
    r#"
    mov dword ptr [edi + {SHADOW_SLOT}], 0
2:  dec eax
    jnz 1b
    "#,
    pop!("edi"),
    pop!("edx"),
    r#"
3:  ret
    .cfi_endproc
    .size trapline_forget_above, . - trapline_forget_above
    .popsection
    "#,
    THREAD = const INJECTED_THREAD_OFFSET,
    POSITION = const offset_of!(Thread, position),
    PLACE_IN_AH = const PLACE_IN_AH,
    TOP = const offset_of!(Thread, top),
    MAX_DEPTH = const offset_of!(Config, max_depth),
    SITE_ID_OFFSET = const SITE_ID_OFFSET,
    SITE_MASK = const SITE_MASK,
    POPPED_SHIFT = const POPPED_SHIFT,
    POPPED_UNKNOWN = const POPPED_UNKNOWN,
    REFUSED = const REFUSED,
    SHADOW_RETURN = const SHADOW_RETURN,
    SHADOW_OUTER = const SHADOW_OUTER,
    SHADOW_SLOT = const SHADOW_SLOT,
    SHADOW_DEPTH = const SHADOW_DEPTH,
    BLOCK_SHIFT = const BLOCK_SHIFT,
    DEPTH_MASK = const DEPTH_MASK,
    UPPER_TSC_BITS = const UPPER_TSC_BITS,
    PAYLOAD_BITS = const PAYLOAD_BITS,
    ENTER = const kind::ENTER,
    TAIL = const kind::TAIL,
    POINT = const kind::POINT,
    POINT_ONLY = const Prepared::PointOnly as u32,
);

const _: () = assert!(
    (Prepared::Push as u32) < Prepared::PointOnly as u32 && (Prepared::PointOnly as u32) < Prepared::Leave as u32
);
const _: () = assert!(BLOCK_SHIFT == 16 && DEPTH_BITS <= 19);
