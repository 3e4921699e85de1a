//! Makes an entry possible: the shadow of its slot, and a chain of open frames that is not stale.
//!
//! Owns `trapline_prepare`, which an entry calls when its quick checks fail. Neighbours: `shadow` maps, `events`
//! writes. Invariant: after [`Prepared::Push`] the slot's shadow can be written, and the innermost frame either lies further out or on another
//! stack.

use core::sync::atomic::Ordering;

use trapline_abi::record::Event;

use crate::{
    counters,
    events::{self, Pool},
    shadow::{self, Known, Run, frame},
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
extern "C" fn trapline_prepare(slot: usize) -> u32 {
    prepare(slot) as u32
}

fn prepare(slot: usize) -> Prepared {
    let Some(pool) = Pool::current() else { return Prepared::Leave };
    let thread = State::of_this_thread();
    if thread.top.load(Ordering::Relaxed) == 0 {
        thread.top.store(frame::none(), Ordering::Relaxed);
    }
    let block = shadow::block_of(slot);
    let is_mapped = slot.is_multiple_of(size_of::<usize>())
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
    thread.blocks.store(run.word(), Ordering::Relaxed);
    leave_stale(thread, slot, run);
    Prepared::Push
}

/// How many stale frames are left behind at once.
const STEPS: u32 = 1 << 20;

/// Frames that do not lie further out than a new one, on the same stack, were left without a return.
fn leave_stale(thread: &State, slot: usize, run: Run) {
    let is_stale = |of: usize| frame::is_gone(of) || frame::slot(of) <= slot && run.has(frame::slot(of));
    let top = thread.top.load(Ordering::Relaxed);
    if !is_stale(top) {
        return;
    }
    // A signal handler's stack may lie inside of the one that it interrupted, further out than frames that are open.
    let (start, end) = sys::signal_stack();
    let is_on_signal_stack = |slot: usize| start <= slot && slot < end;
    if is_on_signal_stack(slot) && !frame::is_gone(top) && !is_on_signal_stack(frame::slot(top)) {
        return;
    }
    let mut innermost = top;
    for _ in 0..STEPS {
        if !is_stale(innermost) {
            break;
        }
        // SAFETY: its slot lies in a run of mapped blocks, or its shadow is what it is known by.
        innermost = unsafe { frame::outer(innermost) };
    }
    if counters::is_counting() {
        counters::end_deeper(frame::depth(innermost));
        thread.top.store(innermost, Ordering::Relaxed);
        return;
    }
    thread.top.store(innermost, Ordering::Relaxed);
    events::record(Event::Unwind { depth: frame::depth(innermost) });
}
