//! Every thread's [`ThreadState`], in initial-exec thread-local storage.
//!
//! Owns the storage and the way to it. A trap handler and a trampoline reach it at a fixed distance from the thread pointer: no lazy
//! allocation, no call into the loader, valid from a thread's first instruction to its last. Trampolines get the distance as
//! [`ThreadBase`]. Invariant: the storage is part of the static TLS block (psABI: variant II), so the distance is the same in all threads.
//!
//! Stable Rust cannot ask for the initial-exec model, so the variable is declared in assembly.

use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use trapline_engine::{
    Mode, ThreadState,
    slots::{CONTEXTS, ThreadLayout},
    trampoline::{Segment, ThreadBase},
};

/// How many emulated calls of one thread can be pending: signal handlers that interrupt each other between a trap and its trampoline. Beyond
/// it the handler pushes to the interrupted stack.
pub(crate) const SLOTS: usize = 16;

/// What a thread owns.
#[repr(C)]
pub(crate) struct Thread {
    /// The engine's part.
    pub(crate) state: ThreadState<SLOTS>,
    /// Whether the thread asked for SIGTRAP to be blocked: see [`interpose`](crate::interpose), which gives the values.
    pub(crate) sigtrap_mask: AtomicU8,
    /// For each context but the normal one: an address in the stack frame that entered it.
    frames: [AtomicUsize; CONTEXTS],
}

/// What a signal has interrupted, from the handler's `ucontext_t`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupted {
    /// The stack pointer.
    pub(crate) sp: usize,
    /// The thread's alternate stack: first address and length in bytes.
    pub(crate) alternate_stack: (usize, usize),
}

impl Interrupted {
    /// Whether the frame at `frame` is gone: what runs on its stack now has a higher stack pointer, or has left the alternate stack that it was on.
    fn has_left(self, frame: usize) -> bool {
        let (start, len_bytes) = self.alternate_stack;
        let is_alternate = |address: usize| address.wrapping_sub(start) < len_bytes;
        if is_alternate(frame) == is_alternate(self.sp) { self.sp >= frame } else { is_alternate(frame) }
    }
}

impl Thread {
    /// Runs `handler` as a context of its own: what it calls is no recursion of what was interrupted.
    ///
    /// Handlers may also leave by a jump (`siglongjmp`), past the end of this function and of callbacks below. Nobody notices that at once: what runs
    /// then goes on in the handler's context. The next signal finds that the frames are gone, and puts that right.
    pub(crate) fn in_new_context(&self, interrupted: Interrupted, handler: impl FnOnce()) {
        let mut outer = self.state.enter_context();
        while outer > 0 && interrupted.has_left(self.frames[outer].load(Ordering::Relaxed)) {
            // What was interrupted belongs one further out, with the callback that it may be in. One that was there was left by the jump.
            let busy = self.busy(outer).swap(0, Ordering::Relaxed);
            outer -= 1;
            self.busy(outer).store(busy, Ordering::Relaxed);
        }
        self.state.leave_context(outer);
        let own = (outer + 1).min(CONTEXTS - 1);
        // The frame is stored first: a signal that comes in between finds the context with it, or no context.
        let here = 0_u8;
        let before = self.frames[own].swap((&raw const here).addr(), Ordering::Relaxed);
        // Beyond the last context several share it, and a callback may be running in it.
        if own > outer {
            self.busy(own).store(0, Ordering::Relaxed);
        }
        self.state.enter_context();
        handler();
        self.state.leave_context(outer);
        self.frames[own].store(before, Ordering::Relaxed);
    }

    /// Whether `context` runs a callback that is not recursion safe: 1 or 0. Trampolines write it.
    fn busy(&self, context: usize) -> &AtomicU8 {
        debug_assert!(context < CONTEXTS);
        let first = usize::try_from(ThreadLayout::new(Mode::NATIVE).busy()).unwrap_or(0);
        // SAFETY: the layout is the type's, and says that `CONTEXTS` such bytes begin there, of which this is one.
        let busy = unsafe { (&raw const self.state).cast::<AtomicU8>().add(first + context) };
        // SAFETY: as above; it lives as long as the state, all of which is atomics.
        unsafe { &*busy }
    }
}

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".pushsection .tbss.trapline_thread,\"awT\",@nobits",
    ".p2align 4",
    ".hidden trapline_process_thread",
    ".globl trapline_process_thread",
    "trapline_process_thread:",
    ".zero {size}",
    ".popsection",
    size = const size_of::<Thread>(),
);

#[cfg(target_arch = "x86")]
core::arch::global_asm!(
    ".pushsection .tbss.trapline_thread,\"awT\",@nobits",
    ".p2align 4",
    ".hidden trapline_process_thread",
    ".globl trapline_process_thread",
    "trapline_process_thread:",
    ".zero {size}",
    ".popsection",
    // The linker, or for a shared object the loader, stores the distance from the thread pointer.
    ".pushsection .data.rel.ro.trapline_thread,\"aw\",@progbits",
    ".p2align 2",
    ".hidden trapline_process_thread_offset",
    ".globl trapline_process_thread_offset",
    "trapline_process_thread_offset:",
    ".long trapline_process_thread@ntpoff",
    ".popsection",
    size = const size_of::<Thread>(),
);

/// Distance of [`Thread`] from the thread pointer, in bytes.
#[cfg(target_arch = "x86_64")]
fn offset() -> isize {
    let offset: isize;
    // SAFETY: reads a word that the linker makes, and sets before any code of this object runs; GNU ld puts no distance into data of shared objects.
    unsafe {
        core::arch::asm!(
            "mov {}, qword ptr [rip + trapline_process_thread@GOTTPOFF]",
            out(reg) offset,
            options(nostack, preserves_flags, readonly, pure),
        );
    }
    offset
}

#[cfg(target_arch = "x86")]
unsafe extern "C" {
    static trapline_process_thread_offset: isize;
}

/// Distance of [`Thread`] from the thread pointer, in bytes.
#[cfg(target_arch = "x86")]
fn offset() -> isize {
    // SAFETY: an initialised word that the linker or the loader has set before any code of this object runs.
    unsafe { trapline_process_thread_offset }
}

/// Where trampolines find [`Thread::state`], which comes first.
pub(crate) fn base() -> ThreadBase {
    const { assert!(core::mem::offset_of!(Thread, state) == 0) };
    let segment = if cfg!(target_arch = "x86_64") { Segment::Fs } else { Segment::Gs };
    ThreadBase { segment, pointer: None, offset: offset() as i64 }
}

/// The calling thread's pointer to its control block.
pub(crate) fn pointer() -> usize {
    let thread_pointer: usize;
    // SAFETY: the first word of a thread's control block is its own address (psABI of either width, TLS variant II); reading it has no effect.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        core::arch::asm!("mov {}, fs:[0]", out(reg) thread_pointer, options(nostack, preserves_flags, readonly, pure));
    }
    // SAFETY: as above.
    #[cfg(target_arch = "x86")]
    unsafe {
        core::arch::asm!("mov {}, gs:[0]", out(reg) thread_pointer, options(nostack, preserves_flags, readonly, pure));
    }
    thread_pointer
}

/// The calling thread's. Safe in signal handlers.
pub(crate) fn with_current<R>(work: impl FnOnce(&Thread) -> R) -> R {
    let thread = core::ptr::with_exposed_provenance::<Thread>(pointer().wrapping_add_signed(offset()));
    // SAFETY: (1) the address is this thread's copy of the variable declared above, which has the size of `Thread`, is aligned to 16 and lives
    // as long as the thread; (2) zero is a valid value of every field, and all fields are atomics, so shared access is fine; (3) the
    // reference does not leave this call.
    work(unsafe { &*thread })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> usize {
        with_current(|thread| core::ptr::from_ref(thread).addr())
    }

    #[test]
    fn each_thread_has_its_own_and_it_starts_empty() {
        with_current(|thread| assert_eq!(thread.state.depth(), 0));
        let index = with_current(|thread| thread.state.reserve(SLOTS)).unwrap();
        assert_eq!(index, 0);
        let other = std::thread::spawn(|| (address(), with_current(|thread| thread.state.depth()))).join().unwrap();
        assert_ne!(other.0, address());
        assert_eq!(other.1, 0, "another thread's slots are free");
        assert_eq!(with_current(|thread| thread.state.depth()), 1);
    }

    #[test]
    fn contexts_that_were_left_by_a_jump_are_forgotten_and_others_are_not() {
        let frame = 0x1000;
        let on = |sp, alternate_stack| Interrupted { sp, alternate_stack };
        let elsewhere = (0x8000, 0x1000);
        assert!(!on(0xf00, elsewhere).has_left(frame), "called by it");
        assert!(on(0x1008, elsewhere).has_left(frame));
        assert!(!on(0x8800, elsewhere).has_left(frame), "called by it, on the alternate stack");
        let around = (0x800, 0x1000);
        assert!(on(0x9000, around).has_left(frame), "it was on the alternate stack");
        assert!(on(0x100, around).has_left(frame));
        assert!(!on(0xf00, around).has_left(frame));
    }

    #[test]
    fn it_lies_in_the_static_block_below_the_thread_pointer() {
        assert!(offset() < 0, "TLS variant II");
        assert!(address().is_multiple_of(16));
    }
}
