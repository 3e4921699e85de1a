//! A value that trap handlers read without locks, and whose owner can wait until the last of them has let go.
//!
//! Owns [`Published`]: one pointer and one count of readers. The engine publishes its live batch and its index of sites through it;
//! [`trap`](crate::trap) reads them. Invariant: a reader that saw a value keeps it alive until it leaves.

use alloc::sync::Arc;
use core::{
    ptr,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};

/// A shared value that may be swapped while trap handlers read it.
#[derive(Debug)]
pub struct Published<T> {
    current: AtomicPtr<T>,
    readers: AtomicUsize,
}

impl<T> Default for Published<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Published<T> {
    /// Nothing is published.
    pub const fn new() -> Self {
        Self { current: AtomicPtr::new(ptr::null_mut()), readers: AtomicUsize::new(0) }
    }

    /// Runs `read` on the current value, if there is one. Neither blocks nor allocates: fit for trap handlers, which may nest.
    pub fn read<R>(&self, read: impl FnOnce(&T) -> R) -> Option<R> {
        // SeqCst: one total order with the swap and the load of `readers` in `replace`. Either the swap comes first and this
        // reader sees the new pointer, or this increment comes first and `replace` waits for it.
        self.readers.fetch_add(1, Ordering::SeqCst);
        let current = self.current.load(Ordering::SeqCst);
        // SAFETY: (1) a non-null pointer came from `Arc::into_raw` in `replace`; (2) `replace` releases it only after it saw
        // `readers` at zero following the swap, and this reader is counted.
        let result = unsafe { current.as_ref() }.map(read);
        // Release: pairs with the SeqCst load in `replace`; what was read happens before the value is dropped.
        self.readers.fetch_sub(1, Ordering::Release);
        result
    }

    /// Publishes `value` (or nothing), waits until no reader can hold the previous one, and returns that.
    ///
    /// `relax` is called while waiting: a place to yield. Readers are trap handlers and stay for nanoseconds.
    pub fn replace(&self, value: Option<Arc<T>>, mut relax: impl FnMut()) -> Option<Arc<T>> {
        let next = value.map_or(ptr::null_mut(), |value| Arc::into_raw(value).cast_mut());
        let previous = self.current.swap(next, Ordering::SeqCst);
        while self.readers.load(Ordering::SeqCst) != 0 {
            relax();
        }
        if previous.is_null() {
            return None;
        }
        // SAFETY: `previous` came from `Arc::into_raw` in an earlier call, which gave its reference to `self.current`; the swap
        // took it back, and no reader is left that could still borrow from it.
        Some(unsafe { Arc::from_raw(previous) })
    }

    /// Forgets every reader. In the child of a fork the threads that were reading do not exist, but are counted.
    ///
    /// # Safety
    /// No thread reads: this is the only thread of a forked child, and it is not in a closure given to [`read`](Self::read).
    pub unsafe fn forget_readers(&self) {
        self.readers.store(0, Ordering::SeqCst);
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        drop(self.replace(None, core::hint::spin_loop));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_sees_what_is_published_and_nothing_before() {
        let published = Published::new();
        assert_eq!(published.read(|value: &u32| *value), None);
        assert!(published.replace(Some(Arc::new(7)), core::hint::spin_loop).is_none());
        assert_eq!(published.read(|value| *value), Some(7));
        let previous = published.replace(None, core::hint::spin_loop);
        assert_eq!(previous.as_deref(), Some(&7));
        assert_eq!(Arc::strong_count(&previous.unwrap()), 1);
    }

    #[test]
    fn readers_that_a_fork_left_behind_hold_up_nobody_once_forgotten() {
        let published = Published::<u32>::new();
        published.readers.store(2, Ordering::SeqCst);
        // SAFETY: nobody reads.
        unsafe { published.forget_readers() };
        published.replace(None, || panic!("nobody reads"));
    }

    #[test]
    fn replace_waits_for_the_last_reader() {
        let published = Published::new();
        published.replace(Some(Arc::new(1)), core::hint::spin_loop);
        published.readers.store(1, Ordering::SeqCst);
        let mut waited = 0;
        published.replace(None, || {
            waited += 1;
            if waited == 3 {
                published.readers.store(0, Ordering::SeqCst);
            }
        });
        assert_eq!(waited, 3);
    }
}
