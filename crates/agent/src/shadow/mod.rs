//! Which blocks of stack have their shadow mapped.
//!
//! Owns what is known of blocks, and maps on demand. Only `frames` uses it. A block that cannot be mapped, because something else lies where
//! its shadow would be or because there is no memory, is refused for good; calls on it are recorded without their returns. Where a slot's shadow is, and what a
//! frame is known by, depends on how large the address space is: `computed` and `listed`.
//!
//! No lock: whoever enters a block into the table maps it, the others wait for a while. Who forks in that moment leaves a child in which
//! nobody does; there the one that waits maps it, and takes what it finds for the work of the one who is gone. Invariant: a block that the table calls
//! mapped is mapped, and stays so.

use core::sync::atomic::Ordering;

use trapline_abi::agent::Call;

use crate::sys;

#[cfg(target_pointer_width = "64")]
#[path = "computed.rs"]
mod scheme;

#[cfg(target_pointer_width = "32")]
#[path = "listed.rs"]
mod scheme;

pub(crate) use scheme::{block_of, frame, known, return_address};

/// How far a run of mapped blocks is followed in each direction.
const RUN_BLOCKS: u32 = 64;

/// How often, and how long each time, one waits for another who maps the same block.
const PATIENCE: (u32, u32) = (200, 500_000);

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

/// Maps a block's shadow, unless it is. Signals are blocked, so that it is not left half-way. Where a sandbox forbids it, nothing is noted in the table.
pub(crate) fn ensure(block: u32) -> Known {
    if !sys::is_allowed(Call::Mmap) {
        return Known::Refused;
    }
    let mut patience = PATIENCE.0;
    let mut is_adopting = false;
    loop {
        let Some((place, entry)) = scheme::find(block) else { return Known::Refused };
        let claimed = scheme::claimed(block);
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
        let entry = scheme::map(block, is_adopting);
        // Release: pairs with the Acquire in `find`. Fails if someone adopted it before us, and knows better.
        if place.compare_exchange(claimed, entry, Ordering::Release, Ordering::Relaxed).is_err() {
            scheme::discard(entry);
        }
        return known(block);
    }
}

/// Blocks that follow each other, as [`Thread::blocks`](trapline_abi::thread::Thread::blocks) has them: the first in the lower half, how many in the upper one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run(usize);

const HALF_BITS: u32 = usize::BITS / 2;

impl Run {
    /// The word.
    pub(crate) fn word(self) -> usize {
        self.0
    }

    /// Whether a slot's block is one of them.
    pub(crate) fn has(self, slot: usize) -> bool {
        let (first, count) = (self.0 & ((1 << HALF_BITS) - 1), self.0 >> HALF_BITS);
        (block_of(slot) as usize).wrapping_sub(first) < count
    }
}

/// Maps the shadows of a run of blocks, as far as that is possible: the first in the lower half, how many in the upper one.
pub(crate) fn ensure_run(run: u64) {
    let [first, count] = [run & u64::from(u32::MAX), run >> u32::BITS].map(|number| u32::try_from(number).unwrap_or(0));
    for block in first..first.saturating_add(count) {
        ensure(block);
    }
}

/// The run of mapped blocks around a mapped one.
pub(crate) fn run_around(block: u32) -> Run {
    let is_mapped = |other: &u32| known(*other) == Known::Mapped;
    let below = (1..=RUN_BLOCKS).take_while(|distance| block.checked_sub(*distance).as_ref().is_some_and(is_mapped));
    let above = (1..=RUN_BLOCKS).take_while(|distance| block.checked_add(*distance).as_ref().is_some_and(is_mapped));
    let below = below.last().unwrap_or(0);
    let count = below + 1 + above.last().unwrap_or(0);
    Run((count as usize) << HALF_BITS | (block - below) as usize)
}
