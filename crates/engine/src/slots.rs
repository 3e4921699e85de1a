//! The slot stack: where the trap handler leaves the return address of an emulated call.
//!
//! The handler of a breakpoint cannot push to the stack that it interrupted: in a kernel the trap frame lies there, in a 32-bit
//! process the signal frame does. So every thread has a small stack of its own for this, [`ThreadState`]: a depth and one [`Slot`]
//! for each context that can interrupt another (normal, softirq, irq, nmi; in a process: nested signal handlers). The handler
//! pushes a slot and resumes at the *int3 trampoline* ([`trampoline`](crate::trampoline)), which makes room on the stack, moves the
//! slot there and releases it last.
//!
//! Invariant: a context that interrupts another one *at any instruction* between push and release uses the slots above, and is back at
//! the old depth when it returns. So [`ThreadState::reserve`] comes before [`ThreadState::fill`], and the trampoline reads before
//! it releases. A full stack is reported, never overwritten: the caller falls back to another way.
//!
//! The layout is part of the machine code that trampolines are made of: [`ThreadLayout`] gives it for either width.

use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering, compiler_fence};

use crate::Mode;

/// How many nested contexts the recursion guard tells apart: bytes in a [`ThreadState`].
pub const CONTEXTS: usize = 32;

#[expect(clippy::cast_possible_wrap, reason = "a few dozen")]
const CONTEXT_BYTES: i64 = CONTEXTS as i64;

/// One pending emulated call.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Slot {
    /// The address behind the call: what the call would have pushed.
    return_to: AtomicUsize,
    /// Where the call goes.
    target: AtomicUsize,
}

/// What a thread owns of the engine: its slots, and which contexts run a callback. All zero is the initial state, so that it can lie in
/// zero-initialised thread-local storage and exists before the thread runs its first instruction.
#[repr(C)]
#[derive(Debug)]
pub struct ThreadState<const SLOTS: usize> {
    /// Bytes of `slots` in use.
    depth_bytes: AtomicUsize,
    /// Which context runs: 0 is normal; each interruption counts one up on entry, and down on exit.
    context: AtomicUsize,
    /// For each context: 1 while it runs a callback that is not recursion safe.
    busy: [AtomicU8; CONTEXTS],
    slots: [Slot; SLOTS],
}

/// All slots are in use: more nested contexts than slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotsFull;

impl<const SLOTS: usize> Default for ThreadState<SLOTS> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const SLOTS: usize> ThreadState<SLOTS> {
    /// No call is pending, and the context is the normal one.
    pub const fn new() -> Self {
        Self {
            depth_bytes: AtomicUsize::new(0),
            context: AtomicUsize::new(0),
            busy: [const { AtomicU8::new(0) }; CONTEXTS],
            slots: [const { Slot { return_to: AtomicUsize::new(0), target: AtomicUsize::new(0) } }; SLOTS],
        }
    }

    /// Pending calls.
    pub fn depth(&self) -> usize {
        self.depth_bytes.load(Ordering::Relaxed) / size_of::<Slot>()
    }

    /// Takes the next slot, of at most `limit`, and returns its index. From here on an interruption uses the slot behind.
    ///
    /// Only the owning thread calls this; the atomics are for contexts that interrupt it, which leave the depth as they found it.
    ///
    /// # Errors
    /// [`SlotsFull`]; nothing has changed then.
    pub fn reserve(&self, limit: usize) -> Result<usize, SlotsFull> {
        let depth = self.depth();
        if depth >= limit.min(SLOTS) {
            return Err(SlotsFull);
        }
        self.depth_bytes.store((depth + 1) * size_of::<Slot>(), Ordering::Relaxed);
        // The reservation must be visible to an interruption before the slot is filled.
        compiler_fence(Ordering::SeqCst);
        Ok(depth)
    }

    /// Fills the slot that [`reserve`](Self::reserve) returned.
    ///
    /// # Panics
    /// If `index` was not reserved.
    pub fn fill(&self, index: usize, return_to: usize, target: usize) {
        let slot = &self.slots[index];
        slot.return_to.store(return_to, Ordering::Relaxed);
        slot.target.store(target, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    /// The depth and the slots as they are now, those beyond the depth included.
    pub fn snapshot(&self) -> Snapshot<SLOTS> {
        let slots = core::array::from_fn(|index| {
            let Slot { return_to, target } = &self.slots[index];
            (return_to.load(Ordering::Relaxed), target.load(Ordering::Relaxed))
        });
        Snapshot { depth: self.depth(), slots }
    }

    /// Enters a context that interrupts the current one (a signal handler, an interrupt), and returns a token for
    /// [`leave_context`](Self::leave_context). Beyond [`CONTEXTS`] the last one is shared.
    pub fn enter_context(&self) -> usize {
        let outer = self.context.load(Ordering::Relaxed);
        self.context.store((outer + 1).min(CONTEXTS - 1), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        outer
    }

    /// Leaves a context; `outer` is the token of its [`enter_context`](Self::enter_context).
    pub fn leave_context(&self, outer: usize) {
        compiler_fence(Ordering::SeqCst);
        self.context.store(outer, Ordering::Relaxed);
    }
}

/// What the slots of a [`ThreadState`] hold at one moment: a value that models keep, compare, and make a state from again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Snapshot<const SLOTS: usize> {
    /// Pending calls.
    pub depth: usize,
    /// The return address and the target in each slot, oldest first; those beyond the depth are left-overs.
    pub slots: [(usize, usize); SLOTS],
}

impl<const SLOTS: usize> From<Snapshot<SLOTS>> for ThreadState<SLOTS> {
    fn from(snapshot: Snapshot<SLOTS>) -> Self {
        Self {
            depth_bytes: AtomicUsize::new(snapshot.depth * size_of::<Slot>()),
            slots: snapshot
                .slots
                .map(|(return_to, target)| Slot { return_to: return_to.into(), target: target.into() }),
            ..Self::default()
        }
    }
}

/// Offsets in bytes of a [`ThreadState`], for the machine code of a target of either width.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ThreadLayout {
    word: i64,
}

impl ThreadLayout {
    /// The layout in a target of this width.
    pub const fn new(mode: Mode) -> Self {
        Self { word: mode.word_bytes() as i64 }
    }

    /// Of the bytes of slots in use.
    pub const fn depth(self) -> i64 {
        0
    }

    /// Of the number of the current context.
    pub const fn context(self) -> i64 {
        self.word
    }

    /// Of the first of the [`CONTEXTS`] guard bytes.
    pub const fn busy(self) -> i64 {
        2 * self.word
    }

    /// Of the first slot.
    pub const fn slots(self) -> i64 {
        self.busy() + CONTEXT_BYTES
    }

    /// Size of a slot.
    pub const fn slot_bytes(self) -> i64 {
        2 * self.word
    }

    /// Of the return address inside a slot.
    pub const fn slot_return_to(self) -> i64 {
        0
    }

    /// Of the call's target inside a slot.
    pub const fn slot_target(self) -> i64 {
        self.word
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn the_layout_for_machine_code_is_the_layout_of_the_type() {
        type State = ThreadState<4>;
        let layout = ThreadLayout::new(Mode::NATIVE);
        let bytes = |offset: usize| i64::try_from(offset).unwrap();
        assert_eq!(layout.depth(), bytes(offset_of!(State, depth_bytes)));
        assert_eq!(layout.context(), bytes(offset_of!(State, context)));
        assert_eq!(layout.busy(), bytes(offset_of!(State, busy)));
        assert_eq!(layout.slots(), bytes(offset_of!(State, slots)));
        assert_eq!(layout.slot_bytes(), bytes(size_of::<Slot>()));
        assert_eq!(layout.slot_return_to(), bytes(offset_of!(Slot, return_to)));
        assert_eq!(layout.slot_target(), bytes(offset_of!(Slot, target)));
    }

    #[test]
    fn a_full_stack_is_reported_and_nothing_overwritten() {
        let state = ThreadState::<2>::default();
        for call in 1..=2 {
            let index = state.reserve(usize::MAX).unwrap();
            state.fill(index, call, 10 * call);
        }
        assert_eq!(state.reserve(usize::MAX), Err(SlotsFull));
        assert_eq!(state.depth(), 2);
        assert_eq!(state.snapshot(), Snapshot { depth: 2, slots: [(1, 10), (2, 20)] });
    }

    #[test]
    fn a_state_made_from_a_snapshot_goes_on_where_that_was_taken() {
        let state = ThreadState::from(Snapshot { depth: 1, slots: [(1, 10), (2, 20)] });
        assert_eq!(state.reserve(usize::MAX), Ok(1));
        assert_eq!(state.snapshot(), Snapshot { depth: 2, slots: [(1, 10), (2, 20)] });
    }

    #[test]
    fn a_lower_limit_than_the_capacity_is_kept() {
        let state = ThreadState::<4>::default();
        assert_eq!(state.reserve(0), Err(SlotsFull));
        assert_eq!(state.reserve(1), Ok(0));
        assert_eq!(state.reserve(1), Err(SlotsFull));
    }

    #[test]
    fn contexts_nest_and_saturate() {
        let state = ThreadState::<1>::default();
        let outer = state.enter_context();
        assert_eq!((outer, state.context.load(Ordering::Relaxed)), (0, 1));
        let tokens: [usize; 40] = core::array::from_fn(|_| state.enter_context());
        assert_eq!(state.context.load(Ordering::Relaxed), CONTEXTS - 1);
        for token in tokens.into_iter().rev() {
            state.leave_context(token);
        }
        state.leave_context(outer);
        assert_eq!(state.context.load(Ordering::Relaxed), 0);
    }
}
