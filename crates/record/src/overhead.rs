//! What recording costs the program, as the records themselves tell.
//!
//! Owns [`Overhead`] and the [`Gauge`] that the [`drain`](crate::drain) holds to every run of records. Between the time stamps of two records of a thread lies all
//! that one record costs, and what the program did meanwhile. Where functions call each other without doing anything else the latter is a few instructions,
//! so the shortest distance in some thousands of records is the cost of one. The median over all such runs leaves out runs that were never that busy as well as
//! clocks of processors that differ. Not in it: what the program would have had in its caches, stops for signals and new threads, and arming before its start.

use trapline_abi::record::TSC_BITS;

/// Fewer records than this tell nothing.
const RUN_RECORDS: usize = 256;

/// Distances that are told apart, in ticks. No record costs more.
const TICKS: usize = 4096;

/// The bits of a record that hold its time.
const TIME: u64 = (1 << TSC_BITS) - 1;

/// What recording has cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overhead {
    /// A record, in picoseconds.
    pub record_ps: u64,
    /// All records, in all threads, in nanoseconds.
    pub total_ns: u64,
}

/// Holds the shortest distances.
#[derive(Debug)]
pub(crate) struct Gauge {
    /// How many runs had which shortest distance, by ticks.
    runs: Box<[u32; TICKS]>,
}

impl Gauge {
    pub(crate) fn new() -> Self {
        Self { runs: Box::new([0; TICKS]) }
    }

    /// Looks at records that one thread has written one after the other.
    pub(crate) fn look(&mut self, records: &[u64]) {
        if records.len() < RUN_RECORDS {
            return;
        }
        // Zero is between records that have no time of their own; a wrapped difference is a clock that went backwards.
        let distances = records.windows(2).map(|pair| pair[1].wrapping_sub(pair[0]) & TIME);
        let shortest = distances.map(|ticks| if ticks == 0 { TIME } else { ticks }).min().unwrap_or(TIME);
        if let Some(runs) = usize::try_from(shortest).ok().and_then(|ticks| self.runs.get_mut(ticks)) {
            *runs += 1;
        }
    }

    /// What so many records have cost, if enough of them were seen; `ns` turns ticks into nanoseconds.
    pub(crate) fn overhead(&self, records: u64, ns: impl Fn(u64) -> u64) -> Option<Overhead> {
        let all: u64 = self.runs.iter().map(|runs| u64::from(*runs)).sum();
        let mut seen = 0;
        let median = (0..).zip(self.runs.iter()).find_map(|(ticks, runs)| {
            seen += u64::from(*runs);
            (seen * 2 >= all && all > 0).then_some(ticks)
        })?;
        // Thousandths by way of a thousand times the ticks.
        let record_ps = ns(median * 1000);
        Some(Overhead { record_ps, total_ns: record_ps.saturating_mul(records) / 1000 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records, the shortest distance between which is `ticks`.
    fn run(ticks: u64) -> Vec<u64> {
        let kinds = [0x1234_u64, 0x99_9999].into_iter().cycle();
        (0..600_u64).zip(kinds).map(|(at, kind)| (kind << TSC_BITS) | (at * ticks + at / 3 * 100)).collect()
    }

    #[test]
    fn the_median_of_the_shortest_distances_is_what_a_record_costs() {
        let mut gauge = Gauge::new();
        for ticks in [31, 30, 500, 32, 31] {
            gauge.look(&run(ticks));
        }
        let two_ticks_a_nanosecond = |ticks| ticks / 2;
        let overhead = gauge.overhead(1_000, two_ticks_a_nanosecond).unwrap();
        assert_eq!(overhead, Overhead { record_ps: 15_500, total_ns: 15_500 });
    }

    #[test]
    fn time_that_wraps_or_stands_still_is_no_distance() {
        let mut gauge = Gauge::new();
        gauge.look(&[7; 600]);
        assert_eq!(gauge.overhead(600, |ticks| ticks), None, "no time passed");
        let mut records = run(40);
        for (at, record) in (0..).zip(&mut records) {
            *record = record.wrapping_add(TIME - 999 + at) & TIME;
        }
        gauge.look(&records);
        assert_eq!(gauge.overhead(1, |ticks| ticks).map(|overhead| overhead.record_ps), Some(41_000));
    }

    #[test]
    fn a_handful_of_records_tells_nothing() {
        let mut gauge = Gauge::new();
        gauge.look(&run(30)[..RUN_RECORDS - 1]);
        assert_eq!(gauge.overhead(100, |ticks| ticks), None);
    }
}
