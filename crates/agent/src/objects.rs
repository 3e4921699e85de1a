//! Tells the recorder that shared objects came or went, and waits until it has seen to them.
//!
//! Owns `trapline_changed`, which stands in for the dynamic linker's `_dl_debug_state`. The dynamic linker holds its lock meanwhile, so one thread at
//! a time asks. Invariant: it comes back, whatever becomes of the recorder.

use core::sync::atomic::Ordering;

use crate::{
    events::{Pool, Watch},
    sys,
};

/// How long a thread sleeps before it looks whether the recorder lives.
const SLICE_NS: u64 = 100_000_000;

/// The set of loaded objects has changed.
#[unsafe(no_mangle)]
extern "C" fn trapline_changed() {
    let Some(pool) = Pool::current() else { return };
    let header = pool.header();
    header.requester.store(sys::thread_id(), Ordering::Relaxed);
    // Release: pairs with the recorder's Acquire, which then sees who asks.
    let mine = header.requests.fetch_add(1, Ordering::Release).wrapping_add(1);
    pool.ring();
    let mut watch = Watch::new(pool);
    while pool.is_open() {
        // Acquire: pairs with the recorder's Release; what it has written is there.
        let answered = header.answered.load(Ordering::Acquire);
        if answered.wrapping_sub(mine).cast_signed() >= 0 {
            return;
        }
        sys::futex_wait(&header.answered, answered, SLICE_NS);
        if header.answered.load(Ordering::Relaxed) == answered {
            watch.look(pool);
        }
    }
}
