//! Makes an entry possible: the shadow of its slot, and a chain of open frames that is not stale.
//!
//! Owns `trapline_prepare`, which an entry calls when its quick checks fail. Neighbours: `shadow` maps, `events`
//! writes. Invariant: after [`Prepared::Push`] the slot's shadow can be written, and the innermost frame either lies further out or on another
//! stack.

use core::sync::atomic::{AtomicU64, Ordering};

use trapline_abi::{
    record::Event,
    thread::{NO_FRAME, SHADOW_OUTER, frame_depth, frame_slot, shadow_address},
};

use crate::{
    events::{self, Pool},
    shadow::{self, Known},
    sys::{self, SignalsBlocked},
    thread::State,
};

/// What the entry is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Prepared {
    /// Open a frame.
    Push = 0,
    /// Record the call, without its return.
    PointOnly = 1,
    /// Nothing.
    Leave = 2,
}

/// An entry's quick checks failed for this slot.
#[unsafe(no_mangle)]
extern "C" fn trapline_prepare(slot: u64) -> u32 {
    prepare(slot) as u32
}

fn prepare(slot: u64) -> Prepared {
    let Some(pool) = Pool::current() else { return Prepared::Leave };
    let thread = State::of_this_thread();
    if thread.top.load(Ordering::Relaxed) == 0 {
        thread.top.store(NO_FRAME, Ordering::Relaxed);
    }
    let block = shadow::block_of(slot);
    let is_mapped = slot.is_multiple_of(8)
        && match shadow::known(block) {
            Known::Mapped => true,
            Known::Refused => false,
            Known::Unknown => {
                let _blocked = SignalsBlocked::new();
                shadow::ensure(block) == Known::Mapped
            }
        };
    if !is_mapped {
        pool.header().unhooked.fetch_add(1, Ordering::Relaxed);
        return Prepared::PointOnly;
    }
    let run = shadow::run_around(block);
    thread.blocks.store(run, Ordering::Relaxed);
    leave_stale(thread, slot, run);
    Prepared::Push
}

/// How many stale frames are left behind at once.
const STEPS: u32 = 1 << 20;

/// Frames that do not lie further out than a new one, on the same stack, were left without a return.
fn leave_stale(thread: &State, slot: u64, run: u64) {
    let is_stale = |frame: u64| frame_slot(frame) <= slot && is_in(run, frame_slot(frame));
    let top = thread.top.load(Ordering::Relaxed);
    if !is_stale(top) {
        return;
    }
    // A signal handler's stack may lie inside of the one that it interrupted, further out than frames that are open.
    let (start, end) = sys::signal_stack();
    let is_on_signal_stack = |slot: u64| start <= slot && slot < end;
    if is_on_signal_stack(slot) && !is_on_signal_stack(frame_slot(top)) {
        return;
    }
    let mut frame = top;
    for _ in 0..STEPS {
        if !is_stale(frame) {
            break;
        }
        frame = outer_of(frame);
    }
    thread.top.store(frame, Ordering::Relaxed);
    events::record(Event::Unwind { depth: depth(frame) });
}

/// Whether a slot's shadow is mapped for certain: it lies in a run of blocks.
fn is_in(run: u64, slot: u64) -> bool {
    let (first, count) = (run & u64::from(u32::MAX), run >> 32);
    u64::from(shadow::block_of(slot)).wrapping_sub(first) < count
}

fn outer_of(frame: u64) -> u64 {
    let outer = (shadow_address(frame_slot(frame)) + SHADOW_OUTER) as *const AtomicU64;
    // SAFETY: (1) the frame's slot lies in a run of mapped blocks, as the caller has checked; (2) shadows are aligned to 16 bytes as slots are to 8;
    // (3) they are never unmapped.
    unsafe { &*outer }.load(Ordering::Relaxed)
}

/// The depth in a packed frame.
#[expect(clippy::cast_possible_truncation, reason = "depths have 19 bits")]
pub(crate) fn depth(frame: u64) -> u32 {
    frame_depth(frame) as u32
}
