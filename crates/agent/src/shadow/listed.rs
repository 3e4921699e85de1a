//! Shadows that a table leads to, in a small address space, and frames that are known by their shadows.
//!
//! Owns the table, which the entries and unwind information read: see `trapline_abi::thread::narrow`. Invariant: what the table leads to stays where it is.

use core::sync::atomic::{AtomicU32, Ordering};

use trapline_abi::thread::narrow::{
    BLOCK_SHIFT, BLOCKS, CLAIMED, REFUSED, SHADOW_BYTES, SHADOW_RETURN, shadow_address,
};

use super::Known;
use crate::sys;

/// For each block 0, `CLAIMED`, `REFUSED`, or the address of its shadow. The recorder reads it when it leaves: see `trapline_abi::agent::symbol::SHADOWS`.
#[unsafe(export_name = "trapline_shadows")]
static TABLE: [AtomicU32; BLOCKS as usize] = [const { AtomicU32::new(0) }; BLOCKS as usize];

/// Bytes of shadow for a block.
const BLOCK_SHADOW_BYTES: usize = (SHADOW_BYTES as usize / 4) << BLOCK_SHIFT;

/// An address, which is as wide as a word here.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
const fn narrow(address: usize) -> u32 {
    address as u32
}

/// A block's number.
pub(crate) const fn block_of(slot: usize) -> u32 {
    narrow(slot) >> BLOCK_SHIFT
}

/// The place of a block's entry, and what it holds.
pub(super) fn find(block: u32) -> Option<(&'static AtomicU32, u32)> {
    let place = TABLE.get(block as usize)?;
    // Acquire: pairs with the Release in `ensure`, so that the mapping is there. (The kernel sees to that, too.)
    Some((place, place.load(Ordering::Acquire)))
}

/// What is known of a block, without a system call.
pub(crate) fn known(block: u32) -> Known {
    match find(block) {
        None | Some((_, REFUSED)) => Known::Refused,
        Some((_, 0 | CLAIMED)) => Known::Unknown,
        Some(_) => Known::Mapped,
    }
}

/// The entry of a block that somebody is about to map.
pub(super) fn claimed(_block: u32) -> u32 {
    CLAIMED
}

/// Maps a block's shadow, and returns its entry. What one who is gone may have mapped is nobody's.
pub(super) fn map(_block: u32, _is_adopting: bool) -> u32 {
    sys::map_anywhere(BLOCK_SHADOW_BYTES).map_or(REFUSED, narrow)
}

/// Gives back what was mapped for an entry that nobody wants.
pub(super) fn discard(entry: u32) {
    if entry > REFUSED {
        sys::unmap(entry as usize, BLOCK_SHADOW_BYTES);
    }
}

/// Where a slot that is hooked returns to.
///
/// # Safety
/// It is hooked, so that it has a shadow.
pub(crate) unsafe fn return_address(slot: usize) -> usize {
    let entry = find(block_of(slot)).map_or(0, |(_, entry)| entry);
    let shadow = shadow_address(entry, narrow(slot)).unwrap_or(0);
    // SAFETY: by the caller's promise.
    unsafe { *((shadow + SHADOW_RETURN) as *const usize) }
}

/// Frames, which are the addresses of their shadows.
pub(crate) mod frame {
    use trapline_abi::{
        record::DEPTH_BITS,
        thread::narrow::{SHADOW_DEPTH, SHADOW_OUTER, SHADOW_SLOT},
    };

    use super::{AtomicU32, Ordering};
    use crate::arch;

    /// What is outside of all frames.
    pub(crate) fn none() -> usize {
        arch::no_frame()
    }

    fn field(frame: usize, offset: u32) -> u32 {
        let field = (frame + offset as usize) as *const AtomicU32;
        // SAFETY: (1) a frame is the address of a shadow, or of what stands for one where there is no frame; none is ever unmapped; (2) shadows are aligned to
        // 16 bytes.
        unsafe { &*field }.load(Ordering::Relaxed)
    }

    /// The slot of a frame.
    pub(crate) fn slot(frame: usize) -> usize {
        field(frame, SHADOW_SLOT) as usize
    }

    /// The depth of a frame; 0 also for what a thread has before its first one.
    pub(crate) fn depth(frame: usize) -> u32 {
        if frame == 0 {
            return 0;
        }
        field(frame, SHADOW_DEPTH) & ((1 << DEPTH_BITS) - 1)
    }

    /// Whether a frame is known to be gone, whatever lies where: the arguments of a later call lie over its slot.
    pub(crate) fn is_gone(frame: usize) -> bool {
        slot(frame) == 0
    }

    /// The frame outside of this one.
    ///
    /// # Safety
    /// It is one.
    pub(crate) unsafe fn outer(frame: usize) -> usize {
        field(frame, SHADOW_OUTER) as usize
    }
}
