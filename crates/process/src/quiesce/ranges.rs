//! The code that must be empty: a set of address ranges, prepared before anything stops.

use std::fmt;

use trapline_engine::{Addr, AddrRange};

use super::page_filter::PageFilter;

/// A set of code ranges, sorted and merged, so that a stack's thousands of words are tested against it in no time.
///
/// Build it before the stop: this allocates.
///
/// ```
/// use trapline_engine::{Addr, AddrRange};
/// use trapline_process::quiesce::RangeSet;
///
/// let window = AddrRange::new(Addr::new(0x1001), 4);
/// let forbidden = RangeSet::new([window]);
/// assert!(forbidden.contains(Addr::new(0x1004)));
/// assert!(!forbidden.contains(Addr::new(0x1005)));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct RangeSet {
    /// Ascending, disjoint, none empty.
    ranges: Vec<Disguised>,
    /// Their pages.
    filter: Box<PageFilter>,
}

/// A range with every bit of its bounds inverted.
///
/// The memory behind a stack may be the heap, where this set lies too: searched word by word, it must not look like what it is about.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Disguised {
    start: u64,
    end: u64,
}

impl Disguised {
    const fn new(range: AddrRange) -> Self {
        Self { start: !range.start.value(), end: !range.end.value() }
    }

    const fn start(self) -> Addr {
        Addr::new(!self.start)
    }

    const fn end(self) -> Addr {
        Addr::new(!self.end)
    }
}

impl RangeSet {
    /// The union of `ranges`; empty ones add nothing.
    pub fn new(ranges: impl IntoIterator<Item = AddrRange>) -> Self {
        let not_empty = |range: &AddrRange| range.start < range.end;
        let mut ranges: Vec<_> = ranges.into_iter().filter(not_empty).map(Disguised::new).collect();
        ranges.sort_unstable_by_key(|range| range.start());
        ranges.dedup_by(|next, merged| {
            let touches = next.start() <= merged.end();
            if touches {
                let end = merged.end().max(next.end());
                *merged = Disguised::new(AddrRange { start: merged.start(), end });
            }
            touches
        });
        let mut filter = Box::new(PageFilter::empty());
        for range in &ranges {
            filter.add(AddrRange { start: range.start(), end: range.end() });
        }
        Self { ranges, filter }
    }

    /// Whether `addr` lies in one of the ranges. Neither allocates nor blocks.
    pub fn contains(&self, addr: Addr) -> bool {
        if !self.filter.may_contain(addr) {
            return false;
        }
        let behind = self.ranges.partition_point(|range| range.start() <= addr);
        self.ranges[..behind].last().is_some_and(|range| addr < range.end())
    }

    /// The ranges, ascending and disjoint.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = AddrRange> {
        self.ranges.iter().map(|range| AddrRange { start: range.start(), end: range.end() })
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

impl Default for RangeSet {
    fn default() -> Self {
        Self::new([])
    }
}

impl fmt::Debug for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl FromIterator<AddrRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = AddrRange>>(ranges: I) -> Self {
        Self::new(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> AddrRange {
        AddrRange { start: Addr::new(start), end: Addr::new(end) }
    }

    #[test]
    fn overlapping_and_touching_ranges_merge_whatever_their_order() {
        let set = RangeSet::new([range(50, 60), range(10, 20), range(15, 17), range(20, 30), range(5, 5), range(9, 8)]);
        assert!(set.iter().eq([range(10, 30), range(50, 60)]), "{set:?}");
        assert!(!set.is_empty());
    }

    #[test]
    fn membership_agrees_with_the_ranges_one_by_one() {
        let ranges = [range(50, 60), range(10, 20), range(20, 21), range(58, 70)];
        let set: RangeSet = ranges.into_iter().collect();
        for addr in (0..100).map(Addr::new) {
            assert_eq!(set.contains(addr), ranges.iter().any(|range| range.contains(addr)), "{addr}");
        }
    }

    #[test]
    fn the_empty_set_contains_nothing() {
        assert!(!RangeSet::default().contains(Addr::default()));
        assert!(!RangeSet::new([range(0, 0)]).contains(Addr::default()));
        assert!(RangeSet::new([range(7, 7)]).is_empty());
    }

    #[test]
    fn the_set_does_not_contain_its_own_words() {
        let set = RangeSet::new([range(0x1000, 0x2000), range(0x7fff_0000_0000, 0x7fff_0000_1000)]);
        for Disguised { start, end } in &set.ranges {
            assert!(!set.contains(Addr::new(*start)) && !set.contains(Addr::new(*end)));
        }
    }
}
