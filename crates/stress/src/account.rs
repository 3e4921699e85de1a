//! What became of the calls: counted, by what was going on and by who made them.
//!
//! Owns [`Account`], which every context of every worker keeps for itself, and the judgement of one call ([`Account::settle`]).
//! Upstream are the [`schedule`](crate::schedule), which says what had to happen, and the counters, which say what did; downstream is the
//! [`report`](crate::report). Invariant: every call is in exactly one phase, and every discrepancy in exactly one count.

use std::num::Wrapping;

use crate::schedule::{Expected, OpsSet};

/// What was done to a function while it was called.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// Nothing; no ops was attached.
    Nop,
    /// Nothing; one ops was attached.
    Call,
    /// Nothing; several were attached.
    List,
    /// The first ops came.
    NopToCall,
    /// A second ops came: from one ops' own trampoline to a list's.
    CallToList,
    /// From one list to another.
    ListToList,
    /// All but one ops left.
    ListToCall,
    /// The last ops left.
    CallToNop,
    /// More than one change.
    Several,
}

impl Phase {
    /// All phases, in the order of their discriminants.
    pub const ALL: [Self; 9] = [
        Self::Nop,
        Self::Call,
        Self::List,
        Self::NopToCall,
        Self::CallToList,
        Self::ListToList,
        Self::ListToCall,
        Self::CallToNop,
        Self::Several,
    ];

    /// As reports call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nop => "nop",
            Self::Call => "call",
            Self::List => "list",
            Self::NopToCall => "nop->call",
            Self::CallToList => "call->list",
            Self::ListToList => "list->list",
            Self::ListToCall => "list->call",
            Self::CallToNop => "call->nop",
            Self::Several => "several",
        }
    }

    /// Of a function to which this many ops stay attached.
    fn steady(ops: u32) -> Self {
        match ops {
            0 => Self::Nop,
            1 => Self::Call,
            _ => Self::List,
        }
    }

    /// Of a function that goes from one number of ops to another.
    pub(crate) fn change(from: u32, to: u32) -> Self {
        match (from, to) {
            (0, _) => Self::NopToCall,
            (_, 0) => Self::CallToNop,
            (1, _) => Self::CallToList,
            (_, 1) => Self::ListToCall,
            _ => Self::ListToList,
        }
    }

    fn of(expected: &Expected) -> Self {
        match expected.changes {
            Some(0) => Self::steady(expected.from.len()),
            Some(1) => Self::change(expected.from.len(), expected.to.len()),
            _ => Self::Several,
        }
    }
}

/// Calls, and what went wrong with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Calls made.
    pub calls: u64,
    /// Invocations of an ops that had to be and were not.
    pub missed: u64,
    /// Invocations that must not have been: by an ops that was not attached, or a second one.
    pub spurious: u64,
}

impl Tally {
    /// Adds another tally to this one.
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.missed += other.missed;
        self.spurious += other.spurious;
    }
}

/// How a call turned out to be damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// The function did not run exactly once.
    Runs,
    /// It returned something else: an argument did not arrive, or another function ran.
    Result,
    /// A callback was told of another site than the one that was called.
    Site,
    /// A register that was held across the call had another value afterwards.
    Register(crate::registers::Register),
}

/// The first damaged call of a context, for the message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Example {
    /// Number of the function.
    pub function: usize,
    /// What happened to it.
    pub damage: Damage,
}

/// What one context has seen.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// By phase, in the order of [`Phase::ALL`].
    pub phases: [Tally; Phase::ALL.len()],
    /// Invocations of ops.
    pub ops: u64,
    /// Calls across which registers were held.
    pub held: u64,
    /// Damaged calls.
    pub corrupted: u64,
    /// The first of them.
    pub example: Option<Example>,
}

/// How often each ops was seen to be invoked by one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Seen {
    /// At least once.
    pub(crate) once: OpsSet,
    /// More than once.
    pub(crate) more: OpsSet,
    /// Invocations in all.
    pub(crate) invocations: u64,
}

impl Seen {
    /// Notes that ops number `ops` was invoked `times` during the call.
    #[inline]
    pub(crate) fn note(&mut self, ops: usize, times: usize) {
        if times > 0 {
            self.once.insert(ops);
            if times > 1 {
                self.more.insert(ops);
            }
            self.invocations += times as u64;
        }
    }
}

impl Account {
    /// Judges one call and enters it.
    #[inline]
    pub(crate) fn settle(&mut self, expected: &Expected, seen: &Seen) {
        let missed = expected.must.without(seen.once).len();
        let spurious = seen.once.without(expected.may).either(seen.more).len();
        let tally = &mut self.phases[Phase::of(expected) as usize];
        tally.calls += 1;
        tally.missed += u64::from(missed);
        tally.spurious += u64::from(spurious);
        self.ops += seen.invocations;
    }

    /// Enters a damaged call.
    #[cold]
    pub(crate) fn damaged(&mut self, function: usize, damage: Damage) {
        self.corrupted += 1;
        self.example.get_or_insert(Example { function, damage });
    }

    /// Compares what was counted in all with what was counted call by call, as far as 32 bits tell: `seen` invocations of callbacks,
    /// `runs` of functions. What happened outside of any call is a discrepancy too.
    pub(crate) fn close(&mut self, seen: u32, runs: u32) {
        #[expect(clippy::cast_possible_truncation, reason = "the low halves are compared")]
        let low = |count: u64| Wrapping(count as u32);
        let outside = Wrapping(seen) - low(self.ops);
        self.phases[Phase::Nop as usize].spurious += u64::from(outside.0);
        let stray_runs = Wrapping(runs) - low(self.total().calls);
        self.corrupted += u64::from(stray_runs.0);
    }

    /// All phases together.
    pub fn total(&self) -> Tally {
        let mut total = Tally::default();
        self.phases.iter().for_each(|tally| total.add(tally));
        total
    }

    /// Adds another account to this one.
    pub fn add(&mut self, other: &Self) {
        for (sum, tally) in self.phases.iter_mut().zip(&other.phases) {
            sum.add(tally);
        }
        self.ops += other.ops;
        self.held += other.held;
        self.corrupted += other.corrupted;
        self.example = self.example.or(other.example);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ops: &[usize]) -> OpsSet {
        ops.iter().fold(OpsSet::default(), |set, ops| set.either(OpsSet::of(*ops)))
    }

    fn seen(ops: &[usize]) -> Seen {
        let mut seen = Seen::default();
        for number in 0..16 {
            seen.note(number, ops.iter().filter(|ops| **ops == number).count());
        }
        seen
    }

    fn settled(expected: &Expected, ops: &[usize]) -> (Tally, Account) {
        let mut account = Account::default();
        account.settle(expected, &seen(ops));
        (account.total(), account)
    }

    fn steady(ops: &[usize]) -> Expected {
        let ops = set(ops);
        Expected { must: ops, may: ops, from: ops, to: ops, changes: Some(0) }
    }

    fn change(from: &[usize], to: &[usize]) -> Expected {
        let (from, to) = (set(from), set(to));
        Expected { must: from.both(to), may: from.either(to), from, to, changes: Some(1) }
    }

    #[test]
    fn a_call_that_was_seen_by_what_had_to_see_it_is_in_order() {
        for (expected, ops) in [
            (steady(&[]), &[][..]),
            (steady(&[3]), &[3]),
            (steady(&[0, 3]), &[0, 3]),
            (change(&[0], &[0, 1]), &[0]),
            (change(&[0], &[0, 1]), &[0, 1]),
            (change(&[1], &[]), &[]),
            (change(&[1], &[]), &[1]),
        ] {
            let (tally, account) = settled(&expected, ops);
            assert_eq!(tally, Tally { calls: 1, missed: 0, spurious: 0 }, "{expected:?} {ops:?}");
            assert_eq!(account.ops, ops.len() as u64);
        }
    }

    #[test]
    fn what_had_to_see_a_call_and_did_not_is_missed() {
        assert_eq!(settled(&steady(&[0, 3]), &[3]).0.missed, 1);
        assert_eq!(settled(&steady(&[0, 3]), &[]).0.missed, 2);
        let (tally, account) = settled(&change(&[0], &[0, 1]), &[]);
        assert_eq!(tally, Tally { calls: 1, missed: 1, spurious: 0 });
        assert_eq!(account.phases[Phase::CallToList as usize].missed, 1);
    }

    #[test]
    fn what_must_not_have_seen_a_call_and_did_is_spurious() {
        assert_eq!(settled(&steady(&[]), &[5]).0.spurious, 1);
        assert_eq!(settled(&steady(&[5]), &[5, 5]).0, Tally { calls: 1, missed: 0, spurious: 1 });
        assert_eq!(settled(&change(&[0], &[0, 1]), &[0, 1, 1]).0.spurious, 1);
    }

    #[test]
    fn phases_are_told_apart_by_the_ops_before_and_after() {
        for (expected, phase) in [
            (steady(&[]), Phase::Nop),
            (steady(&[0]), Phase::Call),
            (steady(&[0, 1]), Phase::List),
            (change(&[], &[1]), Phase::NopToCall),
            (change(&[0], &[0, 1]), Phase::CallToList),
            (change(&[0, 1], &[0, 1, 2]), Phase::ListToList),
            (change(&[0, 1], &[1]), Phase::ListToCall),
            (change(&[0, 1], &[]), Phase::CallToNop),
        ] {
            assert_eq!(Phase::of(&expected), phase);
            assert_eq!(Phase::of(&Expected { changes: None, ..expected }), Phase::Several);
        }
        for (index, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase as usize, index);
        }
    }

    #[test]
    fn what_happened_outside_of_calls_is_found_in_the_end() {
        let mut account = settled(&steady(&[0, 1]), &[0, 1]).1;
        account.close(2, 1);
        assert_eq!((account.total().spurious, account.corrupted), (0, 0));
        account.close(3, 2);
        assert_eq!((account.total().spurious, account.corrupted), (1, 1));
    }

    #[test]
    fn accounts_add_up_and_keep_the_first_example() {
        let mut sum = Account::default();
        let mut part = settled(&steady(&[0]), &[]).1;
        part.damaged(7, Damage::Result);
        part.damaged(8, Damage::Site);
        sum.add(&part);
        sum.add(&settled(&steady(&[0]), &[0]).1);
        assert_eq!(sum.total(), Tally { calls: 2, missed: 1, spurious: 0 });
        assert_eq!((sum.ops, sum.corrupted), (1, 2));
        assert_eq!(sum.example, Some(Example { function: 7, damage: Damage::Result }));
    }
}
