//! Which blocks of stack have their shadow mapped.
//!
//! Owns the table of blocks, and maps on demand. Only `frames` uses it. A block that cannot be mapped, because something else lies where
//! its shadow would be or because there is no memory, is refused for good; calls on it are recorded without their returns.
//!
//! No lock: whoever enters a block into the table maps it, the others wait for a while. Who forks in that moment leaves a child in which
//! nobody does; there the one that waits maps it, and takes what it finds for the work of the one who is gone. Invariant: a block that the table calls
//! mapped is mapped, and stays so.

use core::sync::atomic::{AtomicU32, Ordering};

use trapline_abi::{
    agent::{Call, SHADOW_ENTRIES, SHADOW_MAPPED, SHADOW_STATE_BITS},
    thread::{ADDRESS_BITS, BLOCK_SHIFT, SHADOW_BYTES, shadow_address},
};

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

/// How far a run of mapped blocks is followed in each direction.
const RUN_BLOCKS: u32 = 64;

/// How often, and how long each time, one waits for another who maps the same block.
const PATIENCE: (u32, u64) = (200, 500_000);

/// A block's number.
#[expect(clippy::cast_possible_truncation, reason = "addresses have 47 bits")]
pub(crate) const fn block_of(slot: u64) -> u32 {
    (slot >> BLOCK_SHIFT) as u32
}

/// What the table knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Known {
    /// The shadow is there.
    Mapped,
    /// It cannot be.
    Refused,
    /// Nothing yet.
    Unknown,
}

/// The place of a block's entry, and what it holds: the block's, or 0.
fn find(block: u32) -> Option<(&'static AtomicU32, u32)> {
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

/// Maps a block's shadow, unless it is. Signals are blocked, so that it is not left half-way. Where a sandbox forbids it, nothing is noted in the table.
pub(crate) fn ensure(block: u32) -> Known {
    if !sys::is_allowed(Call::Mmap) {
        return Known::Refused;
    }
    let mut patience = PATIENCE.0;
    let mut is_adopting = false;
    loop {
        let Some((place, entry)) = find(block) else { return Known::Refused };
        let claimed = block << STATE_BITS | CLAIMED;
        if entry == 0 {
            if place.compare_exchange(0, claimed, Ordering::Relaxed, Ordering::Relaxed).is_err() {
                continue;
            }
        } else if entry == claimed && patience > 0 {
            patience -= 1;
            sys::sleep_ns(PATIENCE.1);
            continue;
        } else if entry == claimed {
            is_adopting = true;
        } else {
            return known(block);
        }
        let is_mapped =
            match sys::map_at(shadow_address(u64::from(block) << BLOCK_SHIFT), (SHADOW_BYTES / 8) << BLOCK_SHIFT) {
                MapResult::Mapped => true,
                MapResult::Occupied => is_adopting,
                MapResult::Failed => false,
            };
        let state = if is_mapped { MAPPED } else { REFUSED };
        // Release: pairs with the Acquire in `find`. Fails if someone adopted it before us, and knows better.
        let _ = place.compare_exchange(claimed, block << STATE_BITS | state, Ordering::Release, Ordering::Relaxed);
        return known(block);
    }
}

/// Maps the shadows of a run of blocks, as far as that is possible; `run` is as in [`Thread::blocks`](trapline_abi::thread::Thread::blocks).
pub(crate) fn ensure_run(run: u64) {
    let [first, count] = [run & u64::from(u32::MAX), run >> 32].map(|number| block_of(number << BLOCK_SHIFT));
    for block in first..first.saturating_add(count) {
        ensure(block);
    }
}

/// The run of mapped blocks around a mapped one, as in [`Thread::blocks`](trapline_abi::thread::Thread::blocks).
pub(crate) fn run_around(block: u32) -> u64 {
    let is_mapped = |other: &u32| known(*other) == Known::Mapped;
    let below = (1..=RUN_BLOCKS).take_while(|distance| block.checked_sub(*distance).as_ref().is_some_and(is_mapped));
    let above = (1..=RUN_BLOCKS).take_while(|distance| block.checked_add(*distance).as_ref().is_some_and(is_mapped));
    let below = below.last().unwrap_or(0);
    let count = below + 1 + above.last().unwrap_or(0);
    u64::from(count) << 32 | u64::from(block - below)
}
