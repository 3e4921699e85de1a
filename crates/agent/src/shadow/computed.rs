//! Shadows whose addresses are computed, in a large address space, and frames that are packed into a word.
//!
//! Owns the table of blocks. Invariant: a block's shadow is where `shadow_address` says, or nowhere.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use trapline_abi::{
    agent::{SHADOW_ENTRIES, SHADOW_MAPPED, SHADOW_STATE_BITS},
    thread::{ADDRESS_BITS, BLOCK_SHIFT, SHADOW_BYTES, SHADOW_OUTER, SHADOW_RETURN, shadow_address},
};

use super::Known;
use crate::sys::{self, MapResult};

const ENTRIES: u32 = SHADOW_ENTRIES;

/// How far a block's entry may be from its place.
const PROBES: u32 = 64;

/// Free, or a block's number << `STATE_BITS` | one of the states. The recorder reads it when it leaves: see `trapline_abi::agent::symbol::SHADOWS`.
#[unsafe(export_name = "trapline_shadows")]
static TABLE: [AtomicU32; ENTRIES as usize] = [const { AtomicU32::new(0) }; ENTRIES as usize];

const STATE_BITS: u32 = SHADOW_STATE_BITS;
const CLAIMED: u32 = 1;
const MAPPED: u32 = SHADOW_MAPPED;
const REFUSED: u32 = 3;

const _: () = assert!(ADDRESS_BITS - BLOCK_SHIFT + STATE_BITS <= u32::BITS);

/// A block's number.
#[expect(clippy::cast_possible_truncation, reason = "addresses have 47 bits")]
pub(crate) const fn block_of(slot: usize) -> u32 {
    (slot >> BLOCK_SHIFT) as u32
}

/// The place of a block's entry, and what it holds: the block's, or 0.
pub(super) fn find(block: u32) -> Option<(&'static AtomicU32, u32)> {
    // Fibonacci hashing: the stacks of threads lie at equal distances.
    let home = block.wrapping_mul(0x9e37_79b1) >> (u32::BITS - ENTRIES.trailing_zeros());
    for probe in 0..PROBES {
        let place = TABLE.get((home.wrapping_add(probe) % ENTRIES) as usize)?;
        // Acquire: pairs with the Release in `ensure`, so that the mapping is there. (The kernel sees to that, too.)
        let entry = place.load(Ordering::Acquire);
        if entry == 0 || entry >> STATE_BITS == block {
            return Some((place, entry));
        }
    }
    None
}

/// What is known of a block, without a system call.
pub(crate) fn known(block: u32) -> Known {
    match find(block) {
        Some((_, 0)) => Known::Unknown,
        Some((_, entry)) => match entry & ((1 << STATE_BITS) - 1) {
            MAPPED => Known::Mapped,
            REFUSED => Known::Refused,
            _ => Known::Unknown,
        },
        // The table has no room.
        None => Known::Refused,
    }
}

/// The entry of a block that somebody is about to map.
pub(super) fn claimed(block: u32) -> u32 {
    block << STATE_BITS | CLAIMED
}

/// Maps a block's shadow, and returns its entry. Who adopts takes what is there already for the shadow.
pub(super) fn map(block: u32, is_adopting: bool) -> u32 {
    let address = shadow_address(u64::from(block) << BLOCK_SHIFT);
    let is_mapped = match sys::map_at(word(address), word(SHADOW_BYTES / 8) << BLOCK_SHIFT) {
        MapResult::Mapped => true,
        MapResult::Occupied => is_adopting,
        MapResult::Failed => false,
    };
    block << STATE_BITS | if is_mapped { MAPPED } else { REFUSED }
}

/// What was mapped for an entry that nobody wants: there is one place for it, and it is in use.
pub(super) fn discard(_entry: u32) {}

/// Where a slot that is hooked returns to.
///
/// # Safety
/// It is hooked, so that it has a shadow.
pub(crate) unsafe fn return_address(slot: usize) -> usize {
    // SAFETY: by the caller's promise.
    unsafe { *(word(shadow_address(slot as u64) + SHADOW_RETURN) as *const usize) }
}

/// An address, which is as wide as a word here.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
const fn word(address: u64) -> usize {
    address as usize
}

/// Frames, packed as `trapline_abi::thread` describes them.
pub(crate) mod frame {
    use trapline_abi::thread::{self, frame_depth, frame_slot};

    use super::{AtomicU64, Ordering, SHADOW_OUTER, shadow_address, word};

    /// What is outside of all frames.
    pub(crate) fn none() -> usize {
        word(thread::NO_FRAME)
    }

    /// The slot of a frame.
    pub(crate) fn slot(frame: usize) -> usize {
        word(frame_slot(frame as u64))
    }

    /// The depth of a frame.
    #[expect(clippy::cast_possible_truncation, reason = "depths have 19 bits")]
    pub(crate) fn depth(frame: usize) -> u32 {
        frame_depth(frame as u64) as u32
    }

    /// Whether a frame is known to be gone, whatever lies where.
    pub(crate) fn is_gone(_frame: usize) -> bool {
        false
    }

    /// The frame outside of this one.
    ///
    /// # Safety
    /// The frame's slot lies in a run of mapped blocks.
    pub(crate) unsafe fn outer(frame: usize) -> usize {
        let outer = word(shadow_address(slot(frame) as u64) + SHADOW_OUTER) as *const AtomicU64;
        // SAFETY: (1) mapped, by the caller's promise, and never unmapped; (2) shadows are aligned to 16 bytes as slots are to 8.
        word(unsafe { &*outer }.load(Ordering::Relaxed))
    }
}
