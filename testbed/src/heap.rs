//! The global allocator: blocks of powers of two, kept in lists.
//!
//! The engine allocates when ops are registered and batches are planned, never in a trap, a trampoline or a callback. So a lock will do, and
//! only the CPU that pokes ever takes it.

use core::{
    alloc::{GlobalAlloc, Layout},
    ptr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

const START: usize = 32 << 20;
const END: usize = 96 << 20;
const SMALLEST_BYTES: usize = 16;
const CLASSES: usize = 24;

struct Heap {
    locked: AtomicBool,
    fresh: AtomicUsize,
    free: [AtomicUsize; CLASSES],
}

#[global_allocator]
static HEAP: Heap = Heap {
    locked: AtomicBool::new(false),
    fresh: AtomicUsize::new(START),
    free: [const { AtomicUsize::new(0) }; CLASSES],
};

impl Heap {
    fn with_lock<R>(&self, act: impl FnOnce() -> R) -> R {
        // Acquire: pairs with the Release below.
        while self.locked.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
        let result = act();
        self.locked.store(false, Ordering::Release);
        result
    }
}

fn class_of(layout: Layout) -> (usize, usize) {
    let bytes = layout.size().max(layout.align()).max(SMALLEST_BYTES).next_power_of_two();
    ((bytes / SMALLEST_BYTES).trailing_zeros() as usize, bytes)
}

// SAFETY: blocks are powers of two at multiples of their size, so every alignment is met; a block is in a list or in use, never both.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (class, bytes) = class_of(layout);
        if class >= CLASSES {
            return ptr::null_mut();
        }
        self.with_lock(|| {
            let first = self.free[class].load(Ordering::Relaxed);
            if first != 0 {
                // SAFETY: a free block's first word holds the next one of its list.
                let next = unsafe { (first as *const usize).read() };
                self.free[class].store(next, Ordering::Relaxed);
                return first as *mut u8;
            }
            let at = self.fresh.load(Ordering::Relaxed).next_multiple_of(bytes);
            if at + bytes > END {
                return ptr::null_mut();
            }
            self.fresh.store(at + bytes, Ordering::Relaxed);
            at as *mut u8
        })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let (class, _) = class_of(layout);
        self.with_lock(|| {
            // SAFETY: the block is no longer in use, and has room for a word.
            unsafe { block.cast::<usize>().write(self.free[class].load(Ordering::Relaxed)) };
            self.free[class].store(block.addr(), Ordering::Relaxed);
        });
    }
}
