//! Which ops a call had to be seen by, and which it may have been seen by.
//!
//! Owns [`Schedule`], a sequence lock around the set of attached ops: the toggler announces every change before it begins and closes it when
//! it is done, workers read the step before and after a call. Key types: [`Windows`], what is attached where; [`OpsSet`], what of it
//! concerns one function; [`Expected`], the verdict's basis. Upstream is the toggler, downstream the accounting.
//!
//! Invariant: the judgement of a call is exact. A call overlaps with a known range of steps, and
//!
//! - whatever is attached in *every* configuration of the range must have seen it, once: also in the midst of a change (I1);
//! - whatever is attached in *none* of them must not;
//! - only ops that come or go within the range may go either way.
//!
//! Why the steps that a worker reads do bracket its call:
//!
//! 1. Before: a worker that reads an even step read it after the toggler stored it, thus after the last round of core synchronisation of that
//!    change (Acquire in [`now`](Schedule::now), Release in [`close`](Schedule::close)). That round made every CPU discard what it had
//!    fetched before, at the latest before it runs a thread of the process again; so the call executes the new instruction, or that of a
//!    later change.
//! 2. After: a call that executes a byte of a change, int3 included, executes what was stored after the change was announced. x86 stores become
//!    visible in order, [`announce`](Schedule::announce) ends with a full fence, and an instruction is fetched before
//!    a later one is executed; so the load behind the call finds the announcement, or something later.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence};

use crate::workload::OPS;

/// A set of ops, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct OpsSet(u16);

impl OpsSet {
    pub(crate) const ALL: Self = Self(u16::MAX);

    pub(crate) const fn of(ops: usize) -> Self {
        Self(1 << ops)
    }

    pub(crate) fn insert(&mut self, ops: usize) {
        self.0 |= Self::of(ops).0;
    }

    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(crate) const fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) const fn either(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn len(self) -> u32 {
        self.0.count_ones()
    }
}

const _: () = assert!(OPS == u16::BITS as usize, "one bit for each ops");

/// A set of windows. A window is an ops together with one of its filters, of which it has one or two: bit n is ops n under its first
/// filter, bit 16 + n under its second.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Windows(u32);

impl Windows {
    pub(crate) const NONE: Self = Self(0);

    /// The window of an ops under its filter 0 or 1.
    pub(crate) const fn of(ops: usize, filter: usize) -> Self {
        Self(1 << (OPS * filter + ops))
    }

    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The ops of the windows that are in both sets: of what is attached and of what covers a function, those that are attached to it.
    #[expect(clippy::cast_possible_truncation, reason = "the halves are united")]
    pub(crate) const fn ops_in(self, covering: Self) -> OpsSet {
        let windows = self.0 & covering.0;
        OpsSet((windows | windows >> OPS) as u16)
    }
}

/// Number of configurations that are remembered. A worker that is off its CPU for longer while it makes a call learns less.
const REMEMBERED: usize = 256;

/// The configurations of attached windows, one after the other.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// Even, `2 * n`: configuration n is in force. Odd, `2 * n + 1`: the change from n to n + 1 is under way.
    step: AtomicUsize,
    /// Configuration n is at n modulo the length.
    configurations: [AtomicU32; REMEMBERED],
    /// In every configuration, from the first to the last.
    constant: Windows,
}

/// What is known about one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Expected {
    /// These must have seen it, once.
    pub(crate) must: OpsSet,
    /// These may have seen it, at most once. Includes `must`.
    pub(crate) may: OpsSet,
    /// Attached to the function when the call began.
    pub(crate) from: OpsSet,
    /// Attached to it when the call ended, or about to be.
    pub(crate) to: OpsSet,
    /// How often the ops attached to it changed while the call lasted. `None`: more often than is remembered.
    pub(crate) changes: Option<usize>,
}

impl Schedule {
    /// `constant` is attached in the first configuration, and will be in all others.
    pub(crate) fn new(constant: Windows) -> Self {
        let configurations = [const { AtomicU32::new(0) }; REMEMBERED];
        configurations[0].store(constant.0, Ordering::Relaxed);
        Self { step: AtomicUsize::new(0), configurations, constant }
    }

    /// Announces a change to `next`, before it begins. Only one thread makes changes.
    pub(crate) fn announce(&self, next: Windows) {
        let step = self.step.load(Ordering::Relaxed);
        debug_assert!(step.is_multiple_of(2), "the change before is not closed");
        debug_assert_eq!(next.with(self.constant), next, "what is constant stays");
        // Release: pairs with the Acquire in `attached`; who reads this configuration where an older one was finds in `now` that
        // the one before this is in force.
        self.slot(step / 2 + 1).store(next.0, Ordering::Release);
        // Release: pairs with the Acquire in `now`; who sees the step sees its configuration.
        self.step.store(step.wrapping_add(1), Ordering::Release);
        // The announcement is visible before the first byte of text changes.
        fence(Ordering::SeqCst);
    }

    /// Closes the change that was announced, when it is complete.
    pub(crate) fn close(&self) {
        fence(Ordering::SeqCst);
        // Release: pairs with the Acquire in `now`; who sees the step runs the new text.
        self.step.fetch_add(1, Ordering::Release);
    }

    /// The current step.
    #[inline]
    pub(crate) fn now(&self) -> usize {
        // Acquire: pairs with the Releases above.
        self.step.load(Ordering::Acquire)
    }

    /// What to expect of a call that began after step `first` and ended before step `last` was read, of a function that the windows in
    /// `covering` cover.
    #[inline]
    pub(crate) fn during(&self, first: usize, last: usize, covering: Windows) -> Expected {
        let (oldest, newest) = (first / 2, last.div_ceil(2));
        let spanned = newest.wrapping_sub(oldest);
        let from = self.attached(oldest, covering);
        let mut expected = Expected { must: from, may: from, from, to: from, changes: Some(0) };
        if spanned < REMEMBERED - 1 {
            let mut changes = 0;
            for configuration in 1..=spanned {
                let attached = self.attached(oldest + configuration, covering);
                changes += usize::from(attached != expected.to);
                expected.must = expected.must.both(attached);
                expected.may = expected.may.either(attached);
                expected.to = attached;
            }
            expected.changes = Some(changes);
            // What was read above may have been overwritten meanwhile. The newest configuration that can have been stored is the one
            // behind the newest announced; each overwrites the one `REMEMBERED` before it.
            let newest_stored = self.now().div_ceil(2).wrapping_add(1);
            if newest_stored.wrapping_sub(oldest) < REMEMBERED {
                return expected;
            }
        }
        let must = self.constant.ops_in(covering);
        Expected { must, may: OpsSet::ALL, from: must, to: must, changes: None }
    }

    fn attached(&self, configuration: usize, covering: Windows) -> OpsSet {
        // Acquire: pairs with the Release in `announce`.
        Windows(self.slot(configuration).load(Ordering::Acquire)).ops_in(covering)
    }

    fn slot(&self, configuration: usize) -> &AtomicU32 {
        &self.configurations[configuration % REMEMBERED]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALWAYS: Windows = Windows::of(0, 0);
    const TOGGLED: Windows = Windows::of(1, 0);
    const NEAR: Windows = Windows::of(2, 0);
    const FAR: Windows = Windows::of(2, 1);

    fn change(schedule: &Schedule, next: Windows) {
        schedule.announce(next);
        schedule.close();
    }

    fn set(ops: &[usize]) -> OpsSet {
        ops.iter().fold(OpsSet::default(), |set, ops| set.either(OpsSet::of(*ops)))
    }

    #[test]
    fn a_call_between_changes_must_be_seen_by_exactly_what_is_attached() {
        let schedule = Schedule::new(ALWAYS);
        let covering = ALWAYS.with(TOGGLED);
        let now = schedule.now();
        let expected = schedule.during(now, now, covering);
        assert_eq!((expected.must, expected.may, expected.changes), (set(&[0]), set(&[0]), Some(0)));
        change(&schedule, ALWAYS.with(TOGGLED));
        let now = schedule.now();
        let expected = schedule.during(now, now, covering);
        assert_eq!((expected.must, expected.may), (set(&[0, 1]), set(&[0, 1])));
        let elsewhere = schedule.during(now, now, TOGGLED);
        assert_eq!((elsewhere.must, elsewhere.may), (set(&[1]), set(&[1])));
    }

    #[test]
    fn a_call_in_the_midst_of_a_change_must_be_seen_by_what_is_attached_before_and_after() {
        let schedule = Schedule::new(ALWAYS);
        schedule.announce(ALWAYS.with(TOGGLED));
        let under_way = schedule.now();
        let expected = schedule.during(under_way, under_way, ALWAYS.with(TOGGLED));
        let both = set(&[0, 1]);
        let changed = Expected { must: set(&[0]), may: both, from: set(&[0]), to: both, changes: Some(1) };
        assert_eq!(expected, changed);
        assert_eq!(schedule.during(under_way, under_way, ALWAYS).changes, Some(0), "another function");
    }

    #[test]
    fn a_long_call_may_have_been_seen_by_whatever_came_by() {
        let schedule = Schedule::new(ALWAYS);
        let first = schedule.now();
        change(&schedule, ALWAYS.with(TOGGLED));
        change(&schedule, ALWAYS);
        let expected = schedule.during(first, schedule.now(), ALWAYS.with(TOGGLED));
        assert_eq!((expected.must, expected.may, expected.changes), (set(&[0]), set(&[0, 1]), Some(2)));
        assert_eq!((expected.from, expected.to), (set(&[0]), set(&[0])));
    }

    #[test]
    fn an_ops_keeps_the_functions_that_match_both_its_filters() {
        let schedule = Schedule::new(ALWAYS);
        change(&schedule, ALWAYS.with(NEAR));
        schedule.announce(ALWAYS.with(FAR));
        let step = schedule.now();
        assert_eq!(schedule.during(step, step, NEAR.with(FAR)).must, set(&[2]));
        let left = schedule.during(step, step, NEAR);
        assert_eq!((left.must, left.may), (set(&[]), set(&[2])));
    }

    #[test]
    fn beyond_what_is_remembered_only_the_constant_is_expected() {
        let schedule = Schedule::new(ALWAYS);
        let first = schedule.now();
        let covering = ALWAYS.with(TOGGLED);
        for _ in 0..REMEMBERED / 2 {
            change(&schedule, covering);
            change(&schedule, ALWAYS);
        }
        let forgotten = schedule.during(first, schedule.now(), covering);
        assert_eq!((forgotten.must, forgotten.may, forgotten.changes), (set(&[0]), OpsSet::ALL, None));
        // The call was short, but the worker slept before it judged it, and its configuration is gone.
        assert_eq!(schedule.during(first, first, covering).changes, None);
        let late = schedule.now();
        let remembered = REMEMBERED - 2;
        assert_eq!(schedule.during(late - 2 * remembered, late, covering).changes, Some(remembered));
        assert_eq!(schedule.during(late - 2 * (remembered + 1), late, covering).changes, None);
    }
}
