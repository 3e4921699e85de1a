//! A report as one page that needs nothing else: what people look at in a browser.
//!
//! Owns [`html()`], which goes through a trace twice: [`survey`] adds stacks up and counts what levels of detail the timeline would have, then [`timeline`] writes those that are worth their place. What the page is made of lies in
//! `page/`, plain HTML, CSS and JavaScript, and [`sheet`] puts it together. Invariants: the numbers of functions are those of [`Facts`], which are the report's; memory grows with the numbers of functions, threads and distinct stacks, and
//! not with that of calls; the page asks for nothing over a network.

mod block;
mod ladder;
mod sheet;
mod survey;
mod timeline;
mod tree;

use std::{collections::HashMap, path::Path};

use serde_json::{Value, json};

use crate::{
    Error, Target,
    source::{Summary, drive},
};

/// Of the page's data. `page/data.js` knows it.
const VERSION: u32 = 1;

/// What is known of a trace before its calls are looked at.
#[derive(Clone, Debug)]
pub struct Facts {
    /// As `trapline info --json` tells it.
    pub info: Value,
    /// As `trapline report --json` tells it, in the order in which functions are numbered on the page.
    pub report: Value,
    /// The sites of the report's functions.
    pub sites: Vec<u32>,
    /// Of each of them, how many calls had which duration in nanoseconds.
    pub durations: Vec<Vec<(u64, u32)>>,
    /// How long the recording took, from the first event to the last.
    pub duration_ns: u64,
}

/// Writes a trace as a page, and says what it held. If it has more than `detail` calls, the shortest ones are not on the timeline one by one. `progress` is told now and then how
/// much is done, and of how much.
///
/// # Errors
/// [`Error`]: the trace cannot be read, or the output not written; what of it was written stays.
pub fn html(
    input: &Path,
    facts: &Facts,
    detail: u64,
    target: &Target,
    mut progress: impl FnMut(u64, u64),
) -> Result<Summary, Error> {
    let output = target.file()?;
    let about = |failure: crate::error::Failure| failure.about(target.path());
    let numbers: HashMap<u32, u32> = facts.sites.iter().copied().zip(0..).collect();
    let others = u32::try_from(facts.sites.len()).unwrap_or(u32::MAX);
    let steps = ladder::steps(facts.duration_ns);
    let mut found = survey::Found::new(&steps);
    drive(input, survey::Survey::new(&mut found, &steps), &mut |done, total| progress(done, 2 * total))
        .map_err(about)?;
    let (chosen, first) = ladder::choose(&steps, &found.counts, detail);
    let sites = std::mem::take(&mut found.sites);
    let number = |function: u32| sites.get(function as usize).and_then(|site| numbers.get(site)).copied();
    let tree = tree::encode(&found.stacks, |function| number(function).unwrap_or(others), others);
    let facts = json!({
        "version": VERSION, "info": facts.info, "report": facts.report, "threads": found.threads,
        "durations": facts.durations.iter().map(|durations| binned(durations)).collect::<Vec<_>>(),
        "stacks": { "count": tree.stacks, "merged": tree.merged, "bytes": tree.bytes.len() }, "steps": chosen, "first_step": first,
    });
    drop(found);
    let sheet = sheet::Sheet::begin(output, &facts, &tree.bytes)
        .map_err(|source| Error::Write { path: target.path().into(), source })?;
    let timeline = timeline::Timeline::new(sheet, chosen, first, numbers, others);
    drive(input, timeline, &mut |done, total| progress(total + done, 2 * total)).map_err(about)
}

/// Durations by quarters of powers of two, as a list of bins and counts in turn: bin 0 is none at all, and bin `1 + 4 n + q` begins at `2^n (1 + q/4)` nanoseconds.
fn binned(durations: &[(u64, u32)]) -> Vec<u64> {
    let mut bins: Vec<u64> = Vec::new();
    for (ns, count) in durations {
        let bin = ns.checked_ilog2().map_or(0, |bits| {
            let quarter = (u128::from(*ns) << 2 >> bits) & 3;
            1 + 4 * u64::from(bits) + u64::try_from(quarter).unwrap_or(0)
        });
        let len = bins.len();
        if len > 0 && bins[len - 2] == bin {
            bins[len - 1] += u64::from(*count);
        } else {
            bins.extend([bin, u64::from(*count)]);
        }
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_binned_by_quarters_of_powers_of_two() {
        let durations = [(0, 1), (1, 2), (2, 3), (3, 4), (1024, 5), (1279, 6), (1280, 7), (u64::MAX, 8)];
        assert_eq!(binned(&durations), [0, 1, 1, 2, 5, 3, 7, 4, 41, 11, 42, 7, 256, 8]);
    }
}
