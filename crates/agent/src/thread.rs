//! The state of the calling thread, as Rust sees it.
//!
//! Owns [`State`], which is [`trapline_abi::thread::Thread`] made of atomics: signal handlers of the same thread change it between any two instructions,
//! other threads never. So every access is relaxed, and each field's change is one instruction.

use core::{
    mem::offset_of,
    ops::Deref,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
};

use trapline_abi::{pool::is_place, thread::Thread};

use crate::{arch, sys};

/// A word of the machine, in the 8 bytes that it has in what is shared with the recorder.
#[repr(C, align(8))]
#[derive(Debug)]
pub(crate) struct Word(AtomicUsize);

impl Deref for Word {
    type Target = AtomicUsize;

    fn deref(&self) -> &AtomicUsize {
        &self.0
    }
}

/// Where the next record goes, and how many chunks were used: two words that change as one.
#[repr(C)]
#[derive(Debug)]
struct Place {
    position: AtomicUsize,
    chunks_used: AtomicUsize,
    #[cfg(target_pointer_width = "32")]
    _unused: [u32; 2],
}

/// See [`Thread`].
#[repr(C)]
#[derive(Debug)]
pub(crate) struct State {
    place: Place,
    timeless_place: Place,
    pid: AtomicU32,
    tid: AtomicU32,
    is_timeless: Word,
    pub(crate) region: Word,
    pub(crate) lost: Word,
    pub(crate) top: Word,
    pub(crate) blocks: Word,
}

const _: () = assert!(size_of::<State>() == size_of::<Thread>());
const _: () = assert!(offset_of!(State, place) == offset_of!(Thread, position));
#[cfg(target_pointer_width = "64")]
const _: () = assert!(offset_of!(Place, chunks_used) == offset_of!(Thread, chunks_used));
const _: () = assert!(offset_of!(State, timeless_place) == offset_of!(Thread, timeless_position));
const _: () = assert!(offset_of!(State, is_timeless) == offset_of!(Thread, is_timeless));
const _: () =
    assert!(offset_of!(State, place).is_multiple_of(16) && offset_of!(State, timeless_place).is_multiple_of(16));
const _: () = assert!(offset_of!(State, pid) == offset_of!(Thread, pid));
const _: () = assert!(offset_of!(State, tid) == offset_of!(Thread, tid));
const _: () = assert!(offset_of!(State, region) == offset_of!(Thread, region));
const _: () = assert!(offset_of!(State, lost) == offset_of!(Thread, lost));
const _: () = assert!(offset_of!(State, top) == offset_of!(Thread, top));
const _: () = assert!(offset_of!(State, blocks) == offset_of!(Thread, blocks));

impl State {
    /// The calling thread's. The reference must not be kept or handed on: it is good while the thread lives.
    pub(crate) fn of_this_thread() -> &'static Self {
        // SAFETY: (1) `arch::thread` leads to the thread's own storage, zero-initialised and aligned to 64 bytes; (2) the layouts are equal, as
        // asserted above; (3) every access is atomic.
        unsafe { &*arch::thread().cast::<Self>() }
    }
    /// Whether the thread may not read the time-stamp counter.
    pub(crate) fn is_timeless(&self) -> bool {
        self.is_timeless.load(Ordering::Relaxed) != 0
    }

    /// From here on the thread may not read the time-stamp counter: its entries find no place any more, and its chunk goes on elsewhere. No signal handler
    /// may come in between.
    pub(crate) fn become_timeless(&self) {
        if self.is_timeless() {
            return;
        }
        let (position, chunks_used) = self.place();
        self.timeless_place.position.store(position, Ordering::Relaxed);
        self.timeless_place.chunks_used.store(chunks_used, Ordering::Relaxed);
        self.place.position.store(0, Ordering::Relaxed);
        self.is_timeless.store(1, Ordering::Relaxed);
        self.region.store(0, Ordering::Relaxed);
    }

    fn words(&self) -> &Place {
        if self.is_timeless() { &self.timeless_place } else { &self.place }
    }

    /// Reserves a place for a record, if the thread's chunk has one.
    pub(crate) fn reserve(&self) -> Option<usize> {
        let words = self.words();
        if !is_place(words.position.load(Ordering::Relaxed) as u64) {
            return None;
        }
        let place = words.position.fetch_add(size_of::<u64>(), Ordering::Relaxed);
        is_place(place as u64).then_some(place)
    }

    /// Where the next record goes, and how many chunks were used.
    pub(crate) fn place(&self) -> (usize, usize) {
        let words = self.words();
        // If a handler comes between, `exchange_place` finds the pair changed.
        (words.position.load(Ordering::Relaxed), words.chunks_used.load(Ordering::Relaxed))
    }

    /// Changes both, unless a handler that came since `expected` was read has done so.
    pub(crate) fn exchange_place(&self, expected: (usize, usize), new: (usize, usize)) -> bool {
        // SAFETY: (1) both pairs are aligned to 16 bytes, as asserted above; (2) they are this thread's alone; (3) they can be changed through a shared
        // reference.
        unsafe { arch::exchange_pair(self.words().position.as_ptr(), expected, new) }
    }

    /// The process and the thread as they see themselves; `None` if they are not known, and may not be asked for.
    pub(crate) fn ids(&self) -> Option<(u32, u32)> {
        let known = (self.pid.load(Ordering::Relaxed), self.tid.load(Ordering::Relaxed));
        if known.0 != 0 && known.1 != 0 {
            return Some(known);
        }
        let (pid, tid) = (sys::process_id()?, sys::thread_id()?);
        self.pid.store(pid, Ordering::Relaxed);
        self.tid.store(tid, Ordering::Relaxed);
        Some((pid, tid))
    }
}
