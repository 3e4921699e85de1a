//! The state of the calling thread, as Rust sees it.
//!
//! Owns [`State`], which is [`trapline_abi::thread::Thread`] made of atomics: signal handlers of the same thread change it between any two instructions,
//! other threads never. So every access is relaxed, and each field's change is one instruction.

use core::{
    mem::offset_of,
    sync::atomic::{AtomicU32, AtomicU64},
};

use trapline_abi::thread::Thread;

use crate::arch;

/// See [`Thread`].
#[repr(C)]
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) position: AtomicU64,
    pub(crate) end: AtomicU64,
    pub(crate) chunk: AtomicU32,
    pub(crate) chunks_taken: AtomicU32,
    pub(crate) lost: AtomicU64,
    pub(crate) top: AtomicU64,
    pub(crate) blocks: AtomicU64,
}

const _: () = assert!(size_of::<State>() == size_of::<Thread>());
const _: () = assert!(offset_of!(State, position) == offset_of!(Thread, position));
const _: () = assert!(offset_of!(State, end) == offset_of!(Thread, end));
const _: () = assert!(offset_of!(State, chunk) == offset_of!(Thread, chunk));
const _: () = assert!(offset_of!(State, chunks_taken) == offset_of!(Thread, chunks_taken));
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
}
