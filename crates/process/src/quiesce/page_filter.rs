//! A quick no for most addresses.
//!
//! A check under a stop asks of every word of every stack whether it lies in one of many ranges. Nearly always it does not, and one bit
//! tells: that of the word's page, in a table small enough for the CPU's first cache.

use trapline_engine::{Addr, AddrRange};

/// Page numbers are folded to this many bits, so 256 MB of code in a row have a bit for each page.
const PAGE_NUMBER_BITS: u32 = 16;
const PAGE_SHIFT: u32 = 12;
const WORDS: usize = 1 << (PAGE_NUMBER_BITS - u64::BITS.ilog2());

/// The pages that any of some ranges touches, and others whose number folds to the same.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct PageFilter {
    bits: [u64; WORDS],
}

impl PageFilter {
    /// The filter of no range.
    pub(super) const fn empty() -> Self {
        Self { bits: [0; WORDS] }
    }

    /// Adds the pages of `range`.
    pub(super) fn add(&mut self, range: AddrRange) {
        if range.start >= range.end {
            return;
        }
        let (first, last) = (range.start.value() >> PAGE_SHIFT, (range.end.value() - 1) >> PAGE_SHIFT);
        // After so many pages every bit is set.
        for page in (first..=last).take(1 << PAGE_NUMBER_BITS) {
            let (word, bit) = Self::position(page);
            self.bits[word] |= bit;
        }
    }

    /// Whether `addr` may lie in one of the ranges. If not, it certainly does not.
    pub(super) const fn may_contain(&self, addr: Addr) -> bool {
        let (word, bit) = Self::position(addr.value() >> PAGE_SHIFT);
        self.bits[word] & bit != 0
    }

    const fn position(page: u64) -> (usize, u64) {
        // With the higher bits folded in, small integers share their bit with few pages.
        #[expect(clippy::cast_possible_truncation, reason = "only the lowest bits are wanted")]
        let number = (page ^ page >> PAGE_NUMBER_BITS) as usize % (1 << PAGE_NUMBER_BITS);
        (number / u64::BITS as usize, 1 << (number % u64::BITS as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> AddrRange {
        AddrRange { start: Addr::new(start), end: Addr::new(end) }
    }

    #[test]
    fn every_touched_page_passes_and_its_neighbours_do_not() {
        let mut filter = PageFilter::empty();
        filter.add(range(0x7f00_0000_1ffc, 0x7f00_0000_3001));
        filter.add(range(0x5000, 0x5001));
        filter.add(range(0x9000, 0x9000));
        for (addr, expected) in [
            (0x7f00_0000_0fff, false),
            (0x7f00_0000_1000, true),
            (0x7f00_0000_1ffc, true),
            (0x7f00_0000_3fff, true),
            (0x7f00_0000_4000, false),
            (0x5fff, true),
            (0x6000, false),
            (0x9000, false),
        ] {
            assert_eq!(filter.may_contain(Addr::new(addr)), expected, "{addr:#x}");
        }
    }

    #[test]
    fn pages_whose_numbers_fold_to_the_same_are_not_told_apart() {
        let mut filter = PageFilter::empty();
        filter.add(range(0x1000, 0x2000));
        assert!(filter.may_contain(Addr::new(1 << (PAGE_NUMBER_BITS + PAGE_SHIFT))));
    }

    #[test]
    fn a_range_of_everything_passes_everything() {
        let mut filter = PageFilter::empty();
        filter.add(range(0, u64::MAX));
        assert!(filter.bits.iter().all(|word| *word == u64::MAX));
    }
}
