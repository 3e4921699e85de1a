//! How long a function's calls take, and how sure that is: what two traces are compared by.
//!
//! Owns [`paces`], which goes through a trace once, and [`Pace`], what it finds of a function: the times that its calls ran without what they called, in *blocks*, each of which is
//! some calls in a row. Calls in a row are alike (what they work on, what else runs on the machine), so the spread between blocks tells how much a mean is to be trusted, where the
//! spread between calls would tell too little. Invariant: a function has at most [`MAX_BLOCKS`] blocks; all but the last have the same number of calls.

use std::{collections::HashMap, path::Path};

use crate::{Catalog, Damage, Ending, Error, Frame, Frames, Order, Sink, Timeline};

/// When there are so many, each two become one.
const MAX_BLOCKS: usize = 64;

/// Some calls in a row. Times are ticks.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Block {
    calls: u64,
    own: u64,
    /// The logarithms of the times, added up.
    logarithms: f64,
}

/// What was found of a function.
#[derive(Clone, PartialEq, Debug)]
pub struct Pace {
    /// The function's site.
    pub site: u32,
    /// How often it was called.
    pub calls: u64,
    /// How long it ran without what it called, in ticks.
    pub own: u64,
    /// How many recorded calls it made.
    pub callees: u64,
    blocks: Vec<Block>,
    calls_a_block: u64,
}

/// A mean and its standard error, both as natural logarithms of ticks, so that differences are ratios.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Estimate {
    /// The logarithm of the mean.
    pub logarithm: f64,
    /// The standard error of it: that part of the mean.
    pub error: f64,
}

impl Pace {
    fn new(site: u32) -> Self {
        Self { site, calls: 0, own: 0, callees: 0, blocks: Vec::new(), calls_a_block: 1 }
    }

    #[expect(clippy::cast_precision_loss, reason = "a logarithm")]
    fn add(&mut self, own: u64) {
        self.own += own;
        if self.blocks.last().is_none_or(|last| last.calls == self.calls_a_block) {
            if self.blocks.len() == MAX_BLOCKS {
                self.halve();
            }
            self.blocks.push(Block::default());
        }
        if let Some(last) = self.blocks.last_mut() {
            last.calls += 1;
            last.own += own;
            last.logarithms += (own.max(1) as f64).ln();
        }
    }

    /// Makes one block of each two.
    fn halve(&mut self) {
        self.blocks = self.blocks.chunks(2).map(|two| two.iter().fold(Block::default(), Block::with)).collect();
        self.calls_a_block *= 2;
    }

    /// Adds a function of the same name.
    pub fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        while self.calls_a_block < other.calls_a_block {
            self.halve();
        }
        while other.calls_a_block < self.calls_a_block {
            other.halve();
        }
        self.calls += other.calls;
        self.own += other.own;
        self.callees += other.callees;
        // Only the last block may be smaller than the others.
        self.blocks.extend(other.blocks);
        self.blocks.sort_by_key(|block| std::cmp::Reverse(block.calls));
        while self.blocks.len() > MAX_BLOCKS {
            self.halve();
        }
    }

    /// The mean time of a call. `None` if there are less than two blocks.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn mean(&self) -> Option<Estimate> {
        self.estimate(|block| block.own as f64)
            .map(|(mean, error)| Estimate { logarithm: mean.ln(), error: error / mean })
    }

    /// The time of a typical call: the mean of the logarithms, on which few very long calls have little influence. `None` if there are less than two blocks.
    pub fn typical(&self) -> Option<Estimate> {
        self.estimate(|block| block.logarithms).map(|(logarithm, error)| Estimate { logarithm, error })
    }

    /// The mean of something by calls, and its standard error by blocks.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn estimate(&self, of: impl Fn(&Block) -> f64) -> Option<(f64, f64)> {
        // A last block of few calls would weigh too much.
        let whole = self.blocks.iter().filter(|block| 2 * block.calls > self.calls_a_block);
        let means: Vec<f64> = whole.map(|block| of(block) / block.calls as f64).collect();
        let count = means.len() as f64;
        if means.len() < 2 {
            return None;
        }
        let mean = means.iter().sum::<f64>() / count;
        let variance = means.iter().map(|own| (own - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let mean = mean.max(f64::MIN_POSITIVE);
        Some((mean, (variance / count).sqrt()))
    }
}

impl Block {
    fn with(self, other: &Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            own: self.own + other.own,
            logarithms: self.logarithms + other.logarithms,
        }
    }
}

/// Goes through a trace. Functions come in the order of their sites.
///
/// # Errors
/// Those of [`Timeline::open`] and [`Timeline::next_part`].
pub fn paces(path: &Path) -> Result<(Vec<Pace>, Catalog, Damage), Error> {
    let (mut timeline, catalog, mut damage) = Timeline::open(path, Order::Stream, |_, _| true)?;
    let (mut paces, mut frames) = (Paces::default(), Frames::default());
    while let Some(part) = timeline.next_part()? {
        if let Some(chunk) = part.starts {
            frames.start(chunk, &mut paces);
        }
        frames.events(part.events, &mut paces);
        if part.is_last {
            frames.finish(&mut paces);
            frames = Frames::default();
        }
    }
    damage.senseless_chunks += timeline.senseless_chunks();
    let mut found: Vec<Pace> = paces.functions.into_values().collect();
    found.sort_unstable_by_key(|pace| pace.site);
    Ok((found, catalog, damage))
}

#[derive(Default)]
struct Paces {
    /// By their sites.
    functions: HashMap<u32, Pace>,
    /// Open calls of the current thread: their functions' sites.
    open: Vec<u32>,
}

impl Paces {
    fn of(&mut self, site: u32) -> &mut Pace {
        self.functions.entry(site).or_insert_with(|| Pace::new(site))
    }
}

impl Sink for Paces {
    type Data = ();

    fn open(&mut self, depth: usize, site: u32, _: u64) {
        self.open.truncate(depth);
        if let Some(caller) = self.open.last().copied() {
            self.of(caller).callees += 1;
        }
        self.open.push(site);
        self.of(site).calls += 1;
    }

    fn close(&mut self, _: usize, frame: Frame<()>, tsc: u64, ending: Ending) {
        // What did not end tells nothing of how long calls take.
        if !matches!(ending, Ending::Open | Ending::Unknown) {
            self.of(frame.site).add(frame.ticks(tsc).saturating_sub(frame.callees_ticks));
        }
    }

    fn point(&mut self, _: usize, site: u32, _: u64) {
        self.of(site).calls += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(times: impl Iterator<Item = u64>) -> Pace {
        let mut pace = Pace::new(1);
        for own in times {
            pace.calls += 1;
            pace.add(own);
        }
        pace
    }

    #[test]
    fn blocks_are_few_and_nothing_is_left_out() {
        for count in [0, 1, 63, 64, 65, 1000, 100_000] {
            let pace = pace((0..count).map(|index| 100 + index % 7));
            assert!(pace.blocks.len() <= MAX_BLOCKS);
            assert_eq!(pace.blocks.iter().map(|block| block.calls).sum::<u64>(), count);
            assert_eq!(pace.blocks.iter().map(|block| block.own).sum::<u64>(), pace.own);
            assert_eq!(pace.mean().is_some(), count > 1);
        }
    }

    #[test]
    fn calls_in_a_row_that_are_alike_make_the_mean_less_sure() {
        let mixed = pace((0..64_000).map(|index| 100 + 100 * (index % 2))).mean().expect("a mean");
        let in_phases = pace((0..64_000).map(|index| 100 + 100 * (index / 16_000 % 2))).mean().expect("a mean");
        assert!((mixed.logarithm - in_phases.logarithm).abs() < 0.02);
        assert!(mixed.error < 0.001 && in_phases.error > 0.03, "{mixed:?} {in_phases:?}");
    }

    #[test]
    fn a_few_long_calls_change_the_mean_and_hardly_what_is_typical() {
        let (usual, disturbed) = (
            pace((0..10_000).map(|_| 100)),
            pace((0..10_000).map(|index| if index % 1000 == 0 { 100_000 } else { 100 })),
        );
        let change = |of: fn(&Pace) -> Option<Estimate>| {
            of(&disturbed).expect("an estimate").logarithm - of(&usual).expect("an estimate").logarithm
        };
        assert!(change(Pace::mean) > 0.6 && change(Pace::typical) < 0.01);
    }

    #[test]
    fn functions_of_the_same_name_are_as_one() {
        let mut both = pace((0..1000).map(|_| 100));
        both.merge(&pace((0..70).map(|_| 300)));
        assert_eq!((both.calls, both.own), (1070, 121_000));
        assert!(both.blocks.len() <= MAX_BLOCKS);
        assert_eq!(both.blocks.iter().map(|block| block.calls).sum::<u64>(), 1070);
    }
}
