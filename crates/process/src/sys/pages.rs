//! Memory straight from the kernel, for code that may not allocate.
//!
//! [`PageVec`] is a vector on pages of its own: it grows by `mremap`, which needs no lock that a stopped thread could hold. [`TaskStack`]
//! is a stack with a guard page under it. Both are left out of a child that another thread happens to fork.

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
    slice,
};

use super::{
    errno::Errno,
    syscall::{SYS_MMAP, syscall},
};

/// The page size of x86 at either width, in bytes.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Maps `len_bytes` of private, zeroed, readable and writable memory that a forked child does not inherit.
fn map(len_bytes: usize, extra_flags: i32) -> Result<NonNull<u8>, Errno> {
    let protection = (libc::PROT_READ | libc::PROT_WRITE).cast_unsigned() as usize;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | extra_flags).cast_unsigned() as usize;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe { syscall(SYS_MMAP, [0, len_bytes, protection, flags, usize::MAX, 0]) }?;
    // SAFETY: advice on memory that was mapped just now and that nobody else knows. Where it is refused, a child inherits some pages.
    let _ = unsafe { syscall(libc::SYS_madvise, [base, len_bytes, libc::MADV_DONTFORK.cast_unsigned() as usize]) };
    NonNull::new(ptr::with_exposed_provenance_mut(base)).ok_or(Errno(libc::ENOMEM))
}

/// Unmaps what [`map`] returned.
///
/// # Safety
/// The range is one whole mapping of [`map`]'s, and nothing refers to it any more.
unsafe fn unmap(base: NonNull<u8>, len_bytes: usize) {
    // SAFETY: passed on to the caller. Unmapping a whole mapping cannot fail.
    let _ = unsafe { syscall(libc::SYS_munmap, [base.as_ptr().expose_provenance(), len_bytes]) };
}

/// A growable array of plain values on pages of its own.
pub(crate) struct PageVec<T: Copy> {
    base: NonNull<u8>,
    capacity_bytes: usize,
    len: usize,
    items: PhantomData<T>,
}

// SAFETY: a `PageVec` owns its pages and its items, as `Vec` does; nothing in it is bound to a thread.
unsafe impl<T: Copy + Send> Send for PageVec<T> {}

impl<T: Copy> PageVec<T> {
    /// An empty vector with room for at least `capacity` items, whose pages are present already: filling it causes no page fault.
    pub(crate) fn with_capacity(capacity: usize) -> Result<Self, Errno> {
        const { assert!(align_of::<T>() <= PAGE_BYTES && size_of::<T>() > 0) };
        let bytes = capacity.checked_mul(size_of::<T>()).ok_or(Errno(libc::ENOMEM))?;
        let capacity_bytes = bytes.max(1).checked_next_multiple_of(PAGE_BYTES).ok_or(Errno(libc::ENOMEM))?;
        let base = map(capacity_bytes, libc::MAP_POPULATE)?;
        Ok(Self { base, capacity_bytes, len: 0, items: PhantomData })
    }

    /// Appends `item`, doubling the room where there is none left.
    pub(crate) fn push(&mut self, item: T) -> Result<(), Errno> {
        self.insert(self.len, item)
    }

    /// Puts `item` in front of the one at `index`.
    ///
    /// # Panics
    /// If `index` is greater than the length.
    pub(crate) fn insert(&mut self, index: usize, item: T) -> Result<(), Errno> {
        assert!(index <= self.len, "insertion behind the end");
        if (self.len + 1) * size_of::<T>() > self.capacity_bytes {
            self.grow()?;
        }
        let tail = self.len - index;
        // SAFETY: index <= len <= capacity, so the pointer stays within the mapping.
        let slot = unsafe { self.first().add(index) };
        // SAFETY: len + 1 items fit (checked above), so moving the tail by one stays within the mapping; `copy` allows overlap.
        unsafe { ptr::copy(slot, slot.wrapping_add(1), tail) };
        // SAFETY: the slot lies within the mapping and is aligned, because the base is page-aligned.
        unsafe { slot.write(item) };
        self.len += 1;
        Ok(())
    }

    /// Takes the item at `index` out; those behind it move up.
    ///
    /// # Panics
    /// If there is no such item.
    pub(crate) fn remove(&mut self, index: usize) {
        let len = self.len;
        self.copy_within(index + 1..len, index);
        self.len -= 1;
    }

    /// Forgets all items, and keeps the pages.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    fn first(&self) -> *mut T {
        self.base.as_ptr().cast()
    }

    fn grow(&mut self) -> Result<(), Errno> {
        let doubled = self.capacity_bytes.checked_mul(2).ok_or(Errno(libc::ENOMEM))?;
        let may_move = libc::MREMAP_MAYMOVE.cast_unsigned() as usize;
        let arguments = [self.base.as_ptr().expose_provenance(), self.capacity_bytes, doubled, may_move];
        // SAFETY: the range is this vector's own mapping, and `&mut self` says that no reference into it exists.
        let base = unsafe { syscall(libc::SYS_mremap, arguments) }?;
        self.base = NonNull::new(ptr::with_exposed_provenance_mut(base)).ok_or(Errno(libc::ENOMEM))?;
        self.capacity_bytes = doubled;
        Ok(())
    }
}

impl<T: Copy> Deref for PageVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the first `len` items were written by `insert`, the base is page-aligned, and `&self` keeps them in place.
        unsafe { slice::from_raw_parts(self.first(), self.len) }
    }
}

impl<T: Copy> DerefMut for PageVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes this the only reference.
        unsafe { slice::from_raw_parts_mut(self.first(), self.len) }
    }
}

impl<T: Copy> Drop for PageVec<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this vector's own, whole, and dies with it.
        unsafe { unmap(self.base, self.capacity_bytes) };
    }
}

/// The stack of a task, with a page under it that faults.
pub(crate) struct TaskStack {
    base: NonNull<u8>,
    len_bytes: usize,
}

impl TaskStack {
    /// A stack of at least `len_bytes`.
    pub(crate) fn new(len_bytes: usize) -> Result<Self, Errno> {
        let len_bytes = len_bytes.next_multiple_of(PAGE_BYTES) + PAGE_BYTES;
        let stack = Self { base: map(len_bytes, libc::MAP_STACK | libc::MAP_NORESERVE)?, len_bytes };
        let protection = libc::PROT_NONE.cast_unsigned() as usize;
        // SAFETY: the lowest page of a mapping that was made just now; nobody uses it.
        unsafe { syscall(libc::SYS_mprotect, [stack.base.as_ptr().expose_provenance(), PAGE_BYTES, protection]) }?;
        Ok(stack)
    }

    /// The address behind the highest byte: where a stack begins. Page-aligned.
    pub(crate) fn top(&self) -> *mut u8 {
        self.base.as_ptr().wrapping_add(self.len_bytes)
    }
}

impl Drop for TaskStack {
    fn drop(&mut self) {
        // SAFETY: the mapping is this stack's own; its user waits for the task's end before it drops the stack.
        unsafe { unmap(self.base, self.len_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_vec_grows_past_its_first_page_and_keeps_its_items() {
        let mut numbers = PageVec::with_capacity(1).expect("a page");
        for number in 0..100_000_u64 {
            numbers.push(number).expect("more pages");
        }
        assert!(numbers.iter().copied().eq(0..100_000));
    }

    #[test]
    fn items_are_inserted_and_removed_anywhere() {
        let mut letters = PageVec::with_capacity(4).expect("a page");
        for (index, letter) in [(0, b'c'), (0, b'a'), (1, b'b'), (3, b'd')] {
            letters.insert(index, letter).expect("room");
        }
        assert_eq!(&*letters, b"abcd");
        letters.remove(1);
        letters.remove(2);
        assert_eq!(&*letters, b"ac");
        letters.clear();
        assert!(letters.is_empty());
    }

    #[test]
    fn a_task_stack_is_writable_up_to_its_top() {
        let stack = TaskStack::new(10_000).expect("a stack");
        let top_byte = stack.top().wrapping_sub(1);
        // SAFETY: the highest byte of the stack, which no task uses yet.
        unsafe { top_byte.write(7) };
        // SAFETY: written just now.
        assert_eq!(unsafe { top_byte.read() }, 7);
        assert_eq!(stack.top() as usize % PAGE_BYTES, 0);
    }
}
