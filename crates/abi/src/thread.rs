//! What a traced thread owns: its place in the current chunk, and the chain of its open frames.
//!
//! Lies in the agent's initial-exec thread-local storage, so it is all zero before the thread runs its first instruction; zero means that
//! there is no chunk yet and no frame. The first [`RESET_BYTES`] belong to the process: after a fork the recorder clears them in the child, and
//! the rest goes on where the parent was.
//!
//! A *frame* is a hooked call. For the stack word that held its return address, the *slot*, there are 16 bytes of *shadow* at an address that
//! is computed from the slot's own ([`shadow_address`]): the return address, and the packed frame that was innermost before
//! ([`pack_frame`]). So nothing has to be kept in step when frames are left by other ways than a return, when a thread changes
//! stacks, or forks: a slot finds its shadow wherever it is.
//!
//! In a 32-bit process each word is the lower half of what is described here, with the differences that [`narrow`] tells.

use core::mem::offset_of;

use crate::record::DEPTH_BITS;

/// See the module's text. All addresses are the target's.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Thread {
    /// Where the next record goes, if that [is a place](crate::pool::is_place): otherwise the next chunk is needed.
    pub position: u64,
    /// How many chunks this thread has used. Changes with the position as one double word.
    pub chunks_used: u64,
    /// The position of a timeless thread.
    pub timeless_position: u64,
    /// The count of its chunks.
    pub timeless_chunks_used: u64,
    /// The process, as it sees itself; 0 while that is not known.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// Not 0: the thread may not read the time-stamp counter, as seccomp's strict mode has it. It has no position for the entries then, which leads all of its
    /// records to code that uses the two words for that, and the recorder's time.
    pub is_timeless: u64,
    /// Where the thread [counts](crate::counters): its region, or 0 while it has none.
    pub region: u64,
    /// Records of this thread that were lost since its last chunk began.
    pub lost: u64,
    /// The innermost open frame, packed; [`NO_FRAME`] if none is, or 0 before the first.
    pub top: u64,
    /// The blocks of stack around the thread's last entry whose shadow is known to be mapped: the number of the first in the low half, how many
    /// they are in the high one. One word, so that a signal handler on another stack changes it as a whole.
    pub blocks: u64,
}

/// How much of a [`Thread`] the child of a fork must not inherit.
pub const RESET_BYTES: usize = offset_of!(Thread, top);

/// How far left the slot's address lies in a packed frame. Slots are aligned to 8 bytes, so that leaves [`DEPTH_BITS`] for the depth.
pub const SLOT_SHIFT: u32 = 16;

/// Addresses of a process have this many bits.
pub const ADDRESS_BITS: u32 = 47;

/// What is added to twice a slot's address, modulo 2^[`ADDRESS_BITS`]. Where Linux puts programs, heaps, libraries and stacks, the sums lie in parts of the
/// address space that it leaves empty.
pub const SHADOW_BASE: u64 = 0x6000_0000_0000;

/// Shadow is mapped for blocks of 2^`BLOCK_SHIFT` bytes of stack. The number of a block is its address shifted right by as much.
pub const BLOCK_SHIFT: u32 = 20;

/// Bytes of shadow for each 8 bytes of stack.
pub const SHADOW_BYTES: u64 = 16;

/// Of the return address inside a shadow.
pub const SHADOW_RETURN: u64 = 0;

/// Of the packed outer frame inside a shadow.
pub const SHADOW_OUTER: u64 = 8;

/// No frame, as a packed one: depth 0, and further out than any slot.
pub const NO_FRAME: u64 = pack_frame(1 << ADDRESS_BITS, 0);

/// The address of a slot's shadow.
pub const fn shadow_address(slot: u64) -> u64 {
    slot.wrapping_mul(2).wrapping_add(SHADOW_BASE) & ((1 << ADDRESS_BITS) - 1)
}

/// A slot and the depth of its frame in one word. Packed frames of one stack are ordered as their slots are.
pub const fn pack_frame(slot: u64, depth: u64) -> u64 {
    slot << SLOT_SHIFT | depth & ((1 << DEPTH_BITS) - 1)
}

/// The depth in a packed frame.
pub const fn frame_depth(frame: u64) -> u64 {
    frame & ((1 << DEPTH_BITS) - 1)
}

/// The slot of a packed frame.
pub const fn frame_slot(frame: u64) -> u64 {
    frame >> DEPTH_BITS << (DEPTH_BITS - SLOT_SHIFT)
}

/// What is different in a 32-bit process, whose address space is too small to give every slot's shadow a place of its own.
///
/// A block's shadow is wherever there was room, and a table leads to it: [`SHADOWS`](crate::agent::symbol::SHADOWS), with a word of 32 bits for each block. A frame
/// does not fit a word, so it is known by the address of its shadow, which holds what a packed frame would:
///
/// ```text
/// 0 return address | 4 shadow of the frame outside | 8 slot, or 0 when it has returned | 12 depth, and what the function pops
/// ```
///
/// [`Thread::position`] and [`Thread::chunks_used`] are the halves of one word, in this order, and
/// [`Thread::blocks`] is not used by the entries: the table is as quick.
pub mod narrow {
    /// See [`BLOCK_SHIFT`](super::BLOCK_SHIFT).
    pub const BLOCK_SHIFT: u32 = 16;

    /// Blocks of an address space.
    pub const BLOCKS: u32 = 1 << (u32::BITS - BLOCK_SHIFT);

    /// Bytes of shadow for each 4 bytes of stack.
    pub const SHADOW_BYTES: u32 = 16;

    /// Of the return address inside a shadow.
    pub const SHADOW_RETURN: u32 = 0;

    /// Of the outer frame inside a shadow.
    pub const SHADOW_OUTER: u32 = 4;

    /// Of the slot's own address, which is 0 again when the function has returned.
    pub const SHADOW_SLOT: u32 = 8;

    /// Of the depth, and above it what the function pops, as in [`crate::agent::POPPED_SHIFT`].
    pub const SHADOW_DEPTH: u32 = 12;

    /// In place of a shadow's address: it is being mapped.
    pub const CLAIMED: u32 = 1;

    /// The same: it cannot be mapped.
    pub const REFUSED: u32 = 3;

    /// The shadow of a slot, if that has one, whose block's word in the table is this one.
    pub const fn shadow_address(block_word: u32, slot: u32) -> Option<u32> {
        let within = slot & ((1 << BLOCK_SHIFT) - 1);
        if block_word > REFUSED { Some(block_word + within / 4 * SHADOW_BYTES) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_unpacked_as_it_was_packed() {
        for slot in [0x7fff_ffff_fff8, 0x7ffc_1234_5678, 0x10] {
            for depth in [0, 1, (1 << DEPTH_BITS) - 1] {
                let frame = pack_frame(slot, depth);
                assert_eq!((frame_slot(frame), frame_depth(frame)), (slot, depth));
            }
        }
    }

    #[test]
    fn no_frame_lies_outside_of_every_frame() {
        assert_eq!(frame_depth(NO_FRAME), 0);
        assert!(NO_FRAME > pack_frame((1 << ADDRESS_BITS) - 8, u64::MAX));
    }

    #[test]
    fn shadows_lie_where_linux_puts_nothing() {
        for (first, last) in [
            (0x40_0000, 0x0e00_0000_0000),
            (0x5500_0000_0000, 0x5700_0000_0000),
            (0x7e00_0000_0000, 0x7fff_ffff_f000_u64),
        ] {
            let (low, high) = (shadow_address(first), shadow_address(last));
            assert!(low < high, "one piece: {low:#x} {high:#x}");
            let used = [(0x5500_0000_0000, 0x5700_0000_0000), (0x7e00_0000_0000, 1 << ADDRESS_BITS)];
            assert!(used.iter().all(|(start, end)| high < *start || *end <= low), "{low:#x}..{high:#x}");
        }
    }
}
