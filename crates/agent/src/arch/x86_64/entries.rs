//! The entries: where an armed function's stub goes.
//!
//! At the entry of one, and with `n` words pushed by it:
//!
//! ```text
//! rsp + 8n + 8   slot: the return address of the armed function
//! rsp + 8n       where the stub goes on; the site's id lies SITE_ID_OFFSET bytes from it
//! ```
//!
//! An entry that hooks the return is jumped to, and goes on by [`trapline_launch`](super::leave): processors predict where a `ret` leads by the calls before it, so the
//! function is called once more, from where it has to return to. Whatever finds no hook to make goes on by a jump. The entry that never hooks is called, and returns.
//!
//! For unwinders an entry stands for the armed function: its canonical frame address is that of the function, whose registers are all still
//! there, so that the caller is found through the slot.
//!
//! # What a signal handler or an unwinder sees at any instruction
//!
//! 1. The shadow is written first. It is below `top`, nobody looks at it, and a handler's own frames have other slots.
//! 2. `top` leads to the new frame. A handler's frames are then inside of it, and leave `top` as they found it.
//! 3. The slot is hooked. From here on an unwinder comes to `trapline_return`, whose rule finds the shadow complete.
//! 4. The record is reserved. A handler that came between 2 and 4 has its records before this one, one deeper than the reader thinks: an exit that is deeper
//!    than what is open ends the innermost frame, which then is the right one.
//!
//! Where calls are counted and not recorded, [`counters`](super::counters) comes in place of the record.
//!
//! A handler that leaves by longjmp at any of them leaves a frame that is found stale later, or a place for a record that stays zero.

use core::mem::offset_of;

use trapline_abi::{agent::Config, record::kind};

use super::{
    ADDRESS_BITS, BLOCK_SHIFT, DEPTH_BITS, PAYLOAD_BITS, SHADOW_BASE, SHADOW_OUTER, SHADOW_RETURN, SITE_ID_OFFSET,
    SLOT_SHIFT, Thread, global_asm,
    number_of::{ABOVE_ADDRESS, DEPTH_MASK, PLACE_IN_AH, UPPER_TSC_BITS},
};
use crate::frames::Prepared;

/// An entry that hooks the return. `$extra` is the size of what `$save` pushes between rax and the rest, `$limit` may jump to `$leave`.
macro_rules! enter {
    ($name:literal, $extra:literal, $save:expr, $restore:expr, $limit:expr) => {
        concat!(
            begin_function!($name),
            ".cfi_def_cfa_offset 16\n",
            push!("rax"),
            $save,
            push!("rcx"),
            push!("rdx"),
            push!("rsi"),
            push!("rdi"),
            "lea rdx, [rsp + 48 + ",
            $extra,
            "]\n",
            thread_in_rcx!(),
            // A slot that is hooked already: the function was jumped to, and takes the frame over.
            "lea rdi, [rip + trapline_return]\n",
            "cmp qword ptr [rdx], rdi\n",
            "je .L",
            $name,
            "_tail\n",
            // Is the slot's shadow mapped?
            "mov rax, qword ptr ",
            of_thread!("BLOCKS"),
            "\n",
            "mov rsi, rdx\n",
            "shr rsi, {BLOCK_SHIFT}\n",
            "sub esi, eax\n",
            "shr rax, 32\n",
            "cmp esi, eax\n",
            "jae .L",
            $name,
            "_prepare\n",
            "test dl, 7\n",
            "jnz .L",
            $name,
            "_prepare\n",
            // Is the innermost frame further out than the slot? It is if it is no less than any frame of the next slot.
            "mov rax, qword ptr ",
            of_thread!("TOP"),
            "\n",
            "lea rsi, [rdx + 8]\n",
            "shl rsi, {SLOT_SHIFT}\n",
            "cmp rax, rsi\n",
            "jb .L",
            $name,
            "_prepare\n",
            ".L",
            $name,
            "_open:\n",
            $limit,
            // The frame, in the order that the module's text explains. rsi = the packed new one.
            shadow_of_rdx!("rdi"),
            "mov qword ptr [rdi + {SHADOW_OUTER}], rax\n",
            "inc eax\n",
            "and eax, {DEPTH_MASK}\n",
            "lea rsi, [rsi + rax - (8 << {SLOT_SHIFT})]\n",
            "mov rax, qword ptr [rdx]\n",
            "mov qword ptr [rdi + {SHADOW_RETURN}], rax\n",
            "mov qword ptr ",
            of_thread!("TOP"),
            ", rsi\n",
            "lea rdi, [rip + trapline_return]\n",
            "mov qword ptr [rdx], rdi\n",
            "mov rsi, qword ptr [rsp + 40 + ",
            $extra,
            "]\n",
            "mov esi, dword ptr [rsi + {SITE_ID_OFFSET}]\n",
            "cmp qword ptr [rip + trapline_config + {COUNTERS}], 0\n",
            "jne .L",
            $name,
            "_count\n",
            reserve!(),
            write_record!("ENTER", concat!(".L", $name, "_full")),
            ".L",
            $name,
            "_launch:\n",
            ".cfi_remember_state\n",
            pop!("rdi"),
            pop!("rsi"),
            pop!("rdx"),
            pop!("rcx"),
            $restore,
            pop!("rax"),
            "jmp trapline_launch\n",
            ".cfi_restore_state\n",
            ".L",
            $name,
            "_full:\n",
            "call trapline_record_full\n",
            "jmp .L",
            $name,
            "_launch\n",
            // The slot is as it was. Not `ret`, whose prediction is the function's.
            ".L",
            $name,
            "_leave:\n",
            ".cfi_remember_state\n",
            // Assemblers that restore a state go on counting from before.
            ".cfi_def_cfa_offset 56 + ",
            $extra,
            "\n",
            pop!("rdi"),
            pop!("rsi"),
            pop!("rdx"),
            pop!("rcx"),
            $restore,
            pop!("rax"),
            "lea rsp, [rsp + 8]\n",
            ".cfi_adjust_cfa_offset -8\n",
            "jmp qword ptr [rsp - 8]\n",
            ".cfi_restore_state\n",
            ".L",
            $name,
            "_tail:\n",
            "mov rsi, qword ptr [rsp + 40 + ",
            $extra,
            "]\n",
            "mov esi, dword ptr [rsi + {SITE_ID_OFFSET}]\n",
            "cmp qword ptr [rip + trapline_config + {COUNTERS}], 0\n",
            "jne .L",
            $name,
            "_count_tail\n",
            reserve!(),
            write_record!("TAIL", concat!(".L", $name, "_full_unhooked")),
            "jmp .L",
            $name,
            "_leave\n",
            ".L",
            $name,
            "_full_unhooked:\n",
            "call trapline_record_full\n",
            "jmp .L",
            $name,
            "_leave\n",
            ".L",
            $name,
            "_prepare:\n",
            "mov rsi, rdx\n",
            "lea rax, [rip + trapline_prepare]\n",
            "call trapline_in_rust\n",
            "lea rdx, [rsp + 48 + ",
            $extra,
            "]\n",
            thread_in_rcx!(),
            "cmp eax, {POINT_ONLY}\n",
            "jb .L",
            $name,
            "_push\n",
            "ja .L",
            $name,
            "_leave\n",
            "mov rsi, qword ptr [rsp + 40 + ",
            $extra,
            "]\n",
            "mov esi, dword ptr [rsi + {SITE_ID_OFFSET}]\n",
            "cmp qword ptr [rip + trapline_config + {COUNTERS}], 0\n",
            "jne .L",
            $name,
            "_count_point\n",
            reserve!(),
            write_record!("POINT", concat!(".L", $name, "_full_unhooked")),
            "jmp .L",
            $name,
            "_leave\n",
            ".L",
            $name,
            "_count:\n",
            "call trapline_count_enter\n",
            "jmp .L",
            $name,
            "_launch\n",
            ".L",
            $name,
            "_count_tail:\n",
            "call trapline_count_tail\n",
            "jmp .L",
            $name,
            "_leave\n",
            ".L",
            $name,
            "_count_point:\n",
            "call trapline_count_point\n",
            "jmp .L",
            $name,
            "_leave\n",
            // The innermost frame may lie on another stack, further in.
            ".L",
            $name,
            "_push:\n",
            "mov rax, qword ptr ",
            of_thread!("TOP"),
            "\n",
            "lea rsi, [rdx + 8]\n",
            "shl rsi, {SLOT_SHIFT}\n",
            "jmp .L",
            $name,
            "_open\n",
            end_function!($name),
        )
    };
}

/// The entry that never hooks. `$extra` is the size of what `$save` pushes between rax and the rest.
macro_rules! point {
    ($name:literal, $extra:literal, $save:expr, $restore:expr) => {
        concat!(
            begin_function!($name),
            ".cfi_def_cfa_offset 16\n",
            push!("rax"),
            $save,
            push!("rcx"),
            push!("rdx"),
            push!("rsi"),
            thread_in_rcx!(),
            "mov rsi, qword ptr [rsp + 32 + ",
            $extra,
            "]\n",
            "mov esi, dword ptr [rsi + {SITE_ID_OFFSET}]\n",
            "cmp qword ptr [rip + trapline_config + {COUNTERS}], 0\n",
            "jne .L",
            $name,
            "_count\n",
            reserve!(),
            write_record!("POINT", concat!(".L", $name, "_full")),
            ".L",
            $name,
            "_leave:\n",
            ".cfi_remember_state\n",
            pop!("rsi"),
            pop!("rdx"),
            pop!("rcx"),
            $restore,
            pop!("rax"),
            "ret\n",
            ".cfi_restore_state\n",
            ".L",
            $name,
            "_count:\n",
            "call trapline_count_point\n",
            "jmp .L",
            $name,
            "_leave\n",
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
    enter!("trapline_enter_keep_flags", "8", push_flags!(), pop_flags!(), ""),
    // Frames are as deep as the limit allows: this one is left out.
    enter!(
        "trapline_enter_limited",
        "8",
        push_flags!(),
        pop_flags!(),
        concat!(
            "mov edi, eax\n",
            "and edi, {DEPTH_MASK}\n",
            "cmp rdi, qword ptr [rip + trapline_config + {MAX_DEPTH}]\n",
            "jae .Ltrapline_enter_limited_leave\n",
        )
    ),
    point!("trapline_point", "0", "", ""),
    point!("trapline_point_keep_flags", "8", push_flags!(), pop_flags!()),
    ".hidden trapline_entries_end\n.globl trapline_entries_end\ntrapline_entries_end:",
    ".popsection",
    POSITION = const offset_of!(Thread, position),
    PLACE_IN_AH = const PLACE_IN_AH,
    TOP = const offset_of!(Thread, top),
    BLOCKS = const offset_of!(Thread, blocks),
    MAX_DEPTH = const offset_of!(Config, max_depth),
    COUNTERS = const offset_of!(Config, counters),
    SITE_ID_OFFSET = const SITE_ID_OFFSET,
    SHADOW_BASE = const SHADOW_BASE,
    SHADOW_RETURN = const SHADOW_RETURN,
    SHADOW_OUTER = const SHADOW_OUTER,
    BLOCK_SHIFT = const BLOCK_SHIFT,
    SLOT_SHIFT = const SLOT_SHIFT,
    DEPTH_MASK = const DEPTH_MASK,
    ABOVE_ADDRESS = const ABOVE_ADDRESS,
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
const _: () = assert!(ADDRESS_BITS - BLOCK_SHIFT < 32);
const _: () = assert!(DEPTH_BITS == SLOT_SHIFT + 3);
