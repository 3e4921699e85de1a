//! Counts values by their size, so that percentiles can be told without keeping the values.
//!
//! Owns the [`Histogram`]: log-linear, exact below 64, and above that 32 buckets for each power of two. Its neighbour is the [`Profile`](crate::Profile).
//! Invariant: a percentile is the middle of the bucket that the value lies in, so it is wrong by at most 1/64 of it, less than 1.6 %.

/// Buckets for each power of two from there on.
const PER_OCTAVE: usize = 32;

/// 2^this is [`PER_OCTAVE`].
const OCTAVE_BITS: u32 = 5;

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Histogram {
    /// The number of the first bucket in `counts`, a multiple of [`PER_OCTAVE`].
    first: usize,
    /// Grows in either direction by whole octaves. A count stops at its greatest value.
    counts: Vec<u32>,
}

impl Histogram {
    /// Counts a value.
    #[inline]
    pub fn add(&mut self, value: u64) {
        let bucket = bucket_of(value);
        if let Some(count) = bucket.checked_sub(self.first).and_then(|index| self.counts.get_mut(index)) {
            *count = count.saturating_add(1);
        } else {
            *self.grow(bucket) += 1;
        }
    }

    /// Adds what another one has counted.
    pub fn merge(&mut self, other: &Self) {
        for (bucket, count) in (other.first..).zip(&other.counts) {
            if *count > 0 {
                let own = self.grow(bucket);
                *own = own.saturating_add(*count);
            }
        }
    }

    /// The value that `per_mille` thousandths of all values do not exceed, to the width of a bucket; 0 if there are none.
    pub fn percentile(&self, per_mille: u64) -> u64 {
        let total: u64 = self.counts.iter().map(|count| u64::from(*count)).sum();
        let rank = u64::try_from((u128::from(total) * u128::from(per_mille)).div_ceil(1000)).unwrap_or(total).max(1);
        let mut seen = 0;
        for (bucket, count) in (self.first..).zip(&self.counts) {
            seen += u64::from(*count);
            if seen >= rank {
                return middle_of(bucket);
            }
        }
        0
    }

    /// The value in the middle of each bucket that is not empty, the smallest first, with its count.
    pub fn counts(&self) -> impl Iterator<Item = (u64, u32)> {
        let counts = (self.first..).zip(&self.counts);
        counts.filter(|(_, count)| **count > 0).map(|(bucket, count)| (middle_of(bucket), *count))
    }

    /// The count of a bucket that may not be there yet.
    fn grow(&mut self, bucket: usize) -> &mut u32 {
        let octave = bucket - bucket % PER_OCTAVE;
        if self.counts.is_empty() {
            self.first = octave;
        }
        if octave < self.first {
            let missing = self.first - octave;
            self.counts.splice(0..0, std::iter::repeat_n(0, missing));
            self.first = octave;
        }
        let end = octave + PER_OCTAVE - self.first;
        if end > self.counts.len() {
            self.counts.resize(end, 0);
        }
        &mut self.counts[bucket - self.first]
    }
}

/// The number of the bucket that a value belongs to.
#[expect(clippy::cast_possible_truncation, reason = "below 64 after the shift")]
#[inline]
fn bucket_of(value: u64) -> usize {
    // Values below 2 * PER_OCTAVE are not shifted, and no branch is needed to tell them.
    let shift = (value | PER_OCTAVE as u64).ilog2() - OCTAVE_BITS;
    shift as usize * PER_OCTAVE + (value >> shift) as usize
}

/// The value in the middle of a bucket.
fn middle_of(bucket: usize) -> u64 {
    if bucket < 2 * PER_OCTAVE {
        return bucket as u64;
    }
    let (octave, within) = (bucket / PER_OCTAVE, bucket % PER_OCTAVE);
    let width = 1_u64 << (octave - 1);
    (PER_OCTAVE + within) as u64 * width + width / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_wrong_by_less_than_a_sixty_fourth() {
        let mut value = 1_u64;
        while value < u64::MAX / 3 {
            for value in [value, value + value / 7, value * 2 - 1] {
                let mut histogram = Histogram::default();
                histogram.add(value);
                let found = histogram.percentile(500);
                assert!(found.abs_diff(value) * 64 <= value, "{value}: {found}");
            }
            value = value * 3 / 2 + 1;
        }
    }

    #[test]
    fn buckets_follow_each_other_without_a_hole() {
        let mut last = 0;
        for value in 0..100_000 {
            let bucket = bucket_of(value);
            assert!(bucket == last || bucket == last + 1, "{value}");
            last = bucket;
        }
        assert_eq!(bucket_of(u64::MAX), 60 * PER_OCTAVE - 1);
    }

    #[test]
    fn percentiles_are_those_of_the_sorted_values() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(500), 0);
        for value in (0..60).rev() {
            histogram.add(value);
        }
        assert_eq!((histogram.percentile(500), histogram.percentile(990), histogram.percentile(0)), (29, 59, 0));
    }

    #[test]
    fn counts_are_told_by_the_middles_of_their_buckets() {
        let mut histogram = Histogram::default();
        for value in [7, 7, 3, 1000, 1_000_000] {
            histogram.add(value);
        }
        let counts: Vec<(u64, u32)> = histogram.counts().collect();
        assert_eq!(counts[..2], [(3, 1), (7, 2)]);
        assert!(counts[2].0.abs_diff(1000) <= 16 && counts[3].0.abs_diff(1_000_000) <= 16_000, "{counts:?}");
    }

    #[test]
    fn merged_histograms_are_as_one() {
        let (mut left, mut right, mut both) = (Histogram::default(), Histogram::default(), Histogram::default());
        for index in 0..1000_u64 {
            let value = index * index * 37 % 100_003;
            if index % 3 == 0 {
                left.add(value);
            } else {
                right.add(value);
            }
            both.add(value);
        }
        left.merge(&right);
        for per_mille in [1, 250, 500, 990, 1000] {
            assert_eq!(left.percentile(per_mille), both.percentile(per_mille));
        }
    }
}
