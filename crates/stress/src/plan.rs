//! What is traced by whom, and what changes after what.
//!
//! Owns the table of ops ([`PLAN`]) and the order in which they come and go ([`rotation`]). Pure data: the [`toggler`](crate::toggle)
//! registers the one and walks through the other. Invariant: a rotation ends as it began; it pokes batches of 1, 16 and 1,000 sites,
//! and takes functions through every kind of change ([`Phase`](crate::account::Phase)).
//!
//! Functions are `stress_fn_0000` to `stress_fn_1023`. One ops is attached to every second of them throughout, so each batch of more than
//! one site changes some functions between nop and call, and others between call and list.

use trapline_process::Filter;

use crate::schedule::Windows;

/// Who is called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Consumer {
    /// A C function that touches general-purpose registers only, so that its trampoline saves no more.
    Counter,
    /// A C function that also ruins all vector, mask and x87 registers.
    Spoiler,
    /// A Rust closure.
    Closure,
}

/// An ops of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned {
    pub(crate) name: &'static str,
    pub(crate) consumer: Consumer,
    /// The globs of its filters, of which it has one or two.
    pub(crate) filters: [&'static [&'static str]; 2],
}

const fn planned(name: &'static str, consumer: Consumer, globs: &'static [&'static str]) -> Planned {
    Planned { name, consumer, filters: [globs, &[]] }
}

use Consumer::{Closure, Counter, Spoiler};

const EVERY_SECOND: &[&str] = &["stress_fn_*[02468]"];
/// The first four functions are probes, which hold registers. Number 0 and 4 belong to [`EVERY_SECOND`], 1 and 5 do not.
const ONE: [&[&str]; 4] = [&["stress_fn_0000"], &["stress_fn_0001"], &["stress_fn_0004"], &["stress_fn_0005"]];
const SIXTEEN: &[&str] = &["stress_fn_000?", "stress_fn_001[0-5]"];
const THOUSAND: &[&str] = &["stress_fn_0???"];
/// Sixteen sites each, of which they share eight.
const NEAR_AND_FAR: [&[&str]; 2] =
    [&["stress_fn_000[4-9]", "stress_fn_001?"], &["stress_fn_001[2-9]", "stress_fn_002[0-7]"]];

/// All ops. Their numbers are their places here.
pub(crate) const PLAN: [Planned; 15] = [
    planned("always", Counter, EVERY_SECOND),
    planned("one, probe with always", Counter, ONE[0]),
    planned("one, probe", Counter, ONE[1]),
    planned("one, function with always", Counter, ONE[2]),
    planned("one, function", Counter, ONE[3]),
    planned("second, probe with always", Spoiler, ONE[0]),
    planned("second, probe", Spoiler, ONE[1]),
    planned("second, function with always", Closure, ONE[2]),
    planned("second, function", Closure, ONE[3]),
    planned("sixteen", Counter, SIXTEEN),
    planned("second sixteen", Spoiler, SIXTEEN),
    planned("thousand", Counter, THOUSAND),
    planned("second thousand", Counter, THOUSAND),
    planned("short-lived", Closure, SIXTEEN),
    Planned { name: "roaming", consumer: Counter, filters: NEAR_AND_FAR },
];

/// The ops that is attached throughout.
pub(crate) const ALWAYS: usize = 0;
const SIXTEEN_TOGGLED: usize = 9;
const SIXTEEN_SECOND: usize = 10;
const THOUSAND_TOGGLED: usize = 11;
const THOUSAND_SECOND: usize = 12;
/// The ops that is registered and unregistered, where the others are enabled and disabled.
pub(crate) const SHORT_LIVED: usize = 13;
const ROAMING: usize = 14;

impl Planned {
    /// Its first or second filter; `None` where it has but one.
    pub(crate) fn filter(&self, which: usize) -> Option<Filter> {
        let globs = self.filters.get(which)?;
        globs.iter().fold(None, |filter: Option<Filter>, glob| {
            Some(match filter {
                None => Filter::name(glob),
                Some(filter) => filter.or_name(glob),
            })
        })
    }
}

/// One change by the toggler. The numbers are those of ops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    Enable(usize),
    Disable(usize),
    /// Gives an enabled ops its first or second filter.
    SetFilter(usize, usize),
    Register(usize),
    Unregister(usize),
}

impl Change {
    /// What is attached after the change, if this was before.
    pub(crate) fn apply(self, before: Windows) -> Windows {
        let all = |ops| Windows::of(ops, 0).with(Windows::of(ops, 1));
        match self {
            Self::Enable(ops) | Self::Register(ops) => before.with(Windows::of(ops, 0)),
            Self::Disable(ops) | Self::Unregister(ops) => before.without(all(ops)),
            Self::SetFilter(ops, filter) => before.without(all(ops)).with(Windows::of(ops, filter)),
        }
    }
}

/// The changes of one round. Short-lived ops cost much more than others, their code is made and reclaimed: they come in some rounds only.
pub(crate) fn rotation(short_lived: bool) -> Vec<Change> {
    use Change::{Disable, Enable, Register, SetFilter, Unregister};
    let mut changes = Vec::new();
    let pair = |first, second| [Enable(first), Enable(second), Disable(first), Disable(second)];
    let ones: Vec<Change> = (1..=4).flat_map(|first| pair(first, first + 4)).collect();
    let sixteen = pair(SIXTEEN_TOGGLED, SIXTEEN_SECOND);
    // By themselves,
    changes.extend(&ones);
    changes.extend(sixteen);
    // beside one more, and beside two,
    changes.push(Enable(THOUSAND_TOGGLED));
    changes.extend(&ones);
    changes.push(Enable(THOUSAND_SECOND));
    changes.extend(sixteen);
    changes.push(Disable(THOUSAND_TOGGLED));
    // by another filter,
    changes.extend([Enable(ROAMING), SetFilter(ROAMING, 1), SetFilter(ROAMING, 0), Disable(ROAMING)]);
    changes.push(Disable(THOUSAND_SECOND));
    // and for good.
    if short_lived {
        changes.extend([Register(SHORT_LIVED), Unregister(SHORT_LIVED)]);
    }
    changes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        account::Phase,
        schedule::OpsSet,
        workload::{FUNCTIONS, OPS, name},
    };

    /// The windows that cover each function.
    fn covering() -> Vec<Windows> {
        let covers = |function| {
            let mut windows = Windows::NONE;
            for (ops, planned) in PLAN.iter().enumerate() {
                for which in 0..2 {
                    if planned.filter(which).is_some_and(|filter| filter.matches(&name(function), 0.into())) {
                        windows = windows.with(Windows::of(ops, which));
                    }
                }
            }
            windows
        };
        (0..FUNCTIONS).map(covers).collect()
    }

    /// For each change of a full rotation: what was attached to each function before and after.
    fn changes() -> Vec<(Change, Vec<(OpsSet, OpsSet)>)> {
        let covering = covering();
        let mut attached = Windows::of(ALWAYS, 0);
        let step = |change: Change| {
            let before = attached;
            attached = change.apply(before);
            (change, covering.iter().map(|covers| (before.ops_in(*covers), attached.ops_in(*covers))).collect())
        };
        rotation(true).into_iter().map(step).collect()
    }

    #[test]
    fn there_are_as_many_ops_as_there_is_room_for() {
        assert!(PLAN.len() <= OPS);
    }

    #[test]
    fn a_rotation_ends_as_it_began() {
        for short_lived in [false, true] {
            let begin = Windows::of(ALWAYS, 0);
            let end = rotation(short_lived).into_iter().fold(begin, |attached, change| change.apply(attached));
            assert_eq!(end, begin);
        }
    }

    #[test]
    fn batches_have_one_sixteen_or_a_thousand_sites() {
        let sizes: BTreeSet<usize> = changes()
            .into_iter()
            .map(|(_, functions)| functions.into_iter().filter(|(before, after)| before != after).count())
            .collect();
        assert_eq!(sizes, BTreeSet::from([1, 16, 1000]));
    }

    #[test]
    fn functions_go_through_every_kind_of_change() {
        let mut kinds = BTreeSet::new();
        for (before, after) in changes().into_iter().flat_map(|(_, functions)| functions) {
            if before != after {
                kinds.insert(Phase::change(before.len(), after.len()));
            }
        }
        let all = [Phase::NopToCall, Phase::CallToList, Phase::ListToList, Phase::ListToCall, Phase::CallToNop].into();
        assert_eq!(kinds, all);
    }

    #[test]
    fn always_stays_attached_to_every_second_function() {
        for (change, functions) in changes() {
            for (function, (before, after)) in functions.into_iter().enumerate() {
                let always = |ops: OpsSet| ops.both(OpsSet::of(ALWAYS)).len() == 1;
                let expected = function % 2 == 0;
                assert_eq!((always(before), always(after)), (expected, expected), "{change:?} {function}");
            }
        }
    }

    #[test]
    fn a_change_of_filter_moves_half_of_the_sites_and_keeps_the_rest() {
        let moved = changes().into_iter().find(|(change, _)| matches!(change, Change::SetFilter(_, 1)));
        let roaming = |ops: OpsSet| ops.both(OpsSet::of(ROAMING)).len() == 1;
        let count = |left: bool, joined: bool| {
            let functions = moved.iter().flat_map(|(_, functions)| functions);
            functions.filter(|(before, after)| (roaming(*before), roaming(*after)) == (left, joined)).count()
        };
        assert_eq!((count(true, false), count(false, true), count(true, true)), (8, 8, 8));
    }
}
