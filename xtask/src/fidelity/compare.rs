//! The verdict: executions of first instructions beside calls in a trace.
//!
//! Owns [`compare`]; pure.

use std::collections::{BTreeMap, BTreeSet};

/// Counts by module and address in its file.
pub(super) type Calls = BTreeMap<(String, u64), u64>;

/// Bytes of `endbr64`, behind which a site's instruction lies.
const ENDBR_BYTES: u64 = 4;

/// What the comparison found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Traced functions.
    pub(super) compared: usize,
    /// Traced functions that were called at all.
    pub(super) called: usize,
    /// Calls of traced functions, by their first instructions.
    pub(super) calls: u64,
    /// Executions and calls, where they differ.
    pub(super) different: BTreeMap<(String, u64), (u64, u64)>,
    /// Functions that are entered behind their `endbr` as well, where the trace has these entries too.
    pub(super) looped: BTreeSet<(String, u64)>,
    /// How often that was.
    pub(super) loops: u64,
}

impl Verdict {
    /// Whether `control`, the verdict on a run in which one function was left out, has found that, and beside it nothing but what this one has found.
    pub(super) fn is_found_by(&self, control: &Self, left_out: &(String, u64)) -> bool {
        let is_seen = control.different.get(left_out).is_some_and(|(first, calls)| *first > 0 && *calls == 0);
        let of_others = |verdict: &Self| {
            let others = verdict.different.keys().filter(|place| *place != left_out);
            others.cloned().collect::<Vec<_>>()
        };
        is_seen && !self.different.contains_key(left_out) && of_others(self) == of_others(control)
    }
}

/// Compares all `traced` functions: how often their first instructions were executed, and how often the trace has them called.
pub(super) fn compare(traced: &BTreeSet<(String, u64)>, executed: &Calls, in_trace: &Calls) -> Verdict {
    let mut verdict = Verdict { compared: traced.len(), ..Verdict::default() };
    for place in traced {
        let first = executed.get(place).copied().unwrap_or_default();
        let calls = in_trace.get(place).copied().unwrap_or_default();
        verdict.called += usize::from(first > 0);
        verdict.calls += first;
        if first == calls {
            continue;
        }
        let behind = executed.get(&(place.0.clone(), place.1 + ENDBR_BYTES)).copied().unwrap_or_default();
        if behind > first && behind == calls {
            verdict.looped.insert(place.clone());
            verdict.loops += behind - first;
        } else {
            verdict.different.insert(place.clone(), (first, calls));
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(list: &[(u64, u64)]) -> Calls {
        list.iter().map(|&(address, count)| (("m".to_owned(), address), count)).collect()
    }

    fn places(list: &[u64]) -> BTreeSet<(String, u64)> {
        list.iter().map(|&address| ("m".to_owned(), address)).collect()
    }

    #[test]
    fn equal_counts_are_equal_also_where_nothing_was_called() {
        let verdict = compare(&places(&[1, 2, 9]), &calls(&[(1, 5), (2, 1), (3, 7)]), &calls(&[(1, 5), (2, 1)]));
        let expected = Verdict { compared: 3, called: 2, calls: 6, ..Verdict::default() };
        assert_eq!(verdict, expected);
    }

    #[test]
    fn one_call_more_or_less_is_a_difference() {
        let executed = calls(&[(16, 5), (32, 5), (48, 0)]);
        let verdict = compare(&places(&[16, 32, 48]), &executed, &calls(&[(16, 4), (32, 6), (48, 1)]));
        assert_eq!(verdict.different.values().copied().collect::<Vec<_>>(), [(5, 4), (5, 6), (0, 1)]);
    }

    #[test]
    fn a_function_that_was_left_out_is_found_also_among_other_differences() {
        let (traced, executed) = (places(&[16, 32, 48]), calls(&[(16, 5), (32, 5), (48, 1)]));
        let verdict = |list: &[(u64, u64)]| compare(&traced, &executed, &calls(list));
        let whole = verdict(&[(16, 5), (32, 4), (48, 1)]);
        let left_out = &("m".to_owned(), 16);
        assert!(whole.is_found_by(&verdict(&[(32, 4), (48, 1)]), left_out));
        assert!(!whole.is_found_by(&verdict(&[(16, 5), (32, 4), (48, 1)]), left_out), "it was not left out");
        assert!(!whole.is_found_by(&verdict(&[(16, 1), (32, 4), (48, 1)]), left_out), "not all of it was");
        assert!(!whole.is_found_by(&verdict(&[(32, 4)]), left_out), "more was left out");
        assert!(!whole.is_found_by(&verdict(&[(32, 5), (48, 1)]), left_out), "a difference went away");
    }

    #[test]
    fn loops_behind_endbr_are_accounted_for_and_nothing_else_is() {
        let executed = calls(&[(16, 5), (20, 9)]);
        let looped = compare(&places(&[16]), &executed, &calls(&[(16, 9)]));
        assert!(looped.different.is_empty());
        assert_eq!((looped.looped.len(), looped.loops), (1, 4));
        assert_eq!(compare(&places(&[16]), &executed, &calls(&[(16, 8)])).different.len(), 1);
    }
}
