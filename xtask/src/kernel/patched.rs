//! What a run of the testbed's scenario `livepatch` printed: which bodies of replaced functions ran, and when.
//!
//! Owns [`Patched`], its judgement and its table; [`verdict`](super::verdict) asks for them. Invariant: a body that ran when it must not is never tried
//! away by another run.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::verdict::{CONTEXTS, Line, Must, number};

/// One line for each strategy and context.
#[derive(Debug)]
pub(super) struct Patched {
    sums: BTreeMap<Line, Sum>,
}

#[derive(Debug, Default)]
struct Sum {
    calls: u64,
    old_bodies: u64,
    new_bodies: u64,
    /// Old bodies that ran while the patch was applied.
    stale_old: u64,
    /// New bodies that ran while it was not.
    stale_new: u64,
    tracer: u64,
    traps: u64,
    pokes: u64,
}

impl Patched {
    /// Sums the rows of all configurations up.
    pub(super) fn of(rows: &[Value]) -> Self {
        let mut sums: BTreeMap<Line, Sum> = BTreeMap::new();
        for row in rows {
            let sum = sums.entry(Line::of(row)).or_default();
            sum.calls += number(row, "calls");
            sum.old_bodies += number(row, "old_bodies");
            sum.new_bodies += number(row, "new_bodies");
            sum.stale_old += number(row, "stale_old");
            sum.stale_new += number(row, "stale_new");
            sum.tracer += number(row, "tracer");
            sum.traps += number(row, "traps");
            sum.pokes += number(row, "pokes");
        }
        Self { sums }
    }

    /// What must hold in every run.
    pub(super) fn hold(&self, must: Must) -> Result<()> {
        ensure!(!self.sums.is_empty(), "nothing was replaced");
        for (line, sum) in &self.sums {
            let name = name(line);
            if line.strategy != "skip" {
                ensure!(sum.stale_old == 0, "{name}: the old body ran {} times after the patch", sum.stale_old);
            }
            if must == Must::Replace {
                ensure!(sum.stale_new == 0, "{name}: the new body ran {} times after the revert", sum.stale_new);
            }
        }
        Ok(())
    }

    /// What a run has to come to for that to mean something.
    pub(super) fn reach(&self, must: Must) -> Result<()> {
        for (line, sum) in &self.sums {
            let name = name(line);
            let [old, new, traps] = [sum.old_bodies, sum.new_bodies, sum.traps];
            ensure!(new > 0 && traps > 0, "{name}: {new} new bodies and {traps} breakpoints say nothing");
            ensure!(old > 0 || must == Must::OutliveRevert, "{name}: no old body ran");
            if line.strategy == "skip" {
                ensure!(sum.stale_old > 0, "{name}: no old body after the patch: this run could not have noticed one");
            }
            if must == Must::OutliveRevert {
                ensure!(sum.stale_new > 0, "{name}: no new body after the revert, which was left out");
            }
        }
        Ok(())
    }

    /// The table.
    pub(super) fn table(&self) -> String {
        let mut table = format!(
            "  {:<8} {:<8} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9} {:>8}\n",
            "strategy", "context", "calls", "old", "new", "stale old", "stale new", "tracer", "traps", "pokes"
        );
        for (line, sum) in &self.sums {
            let _ = write!(
                table,
                "  {:<8} {:<8} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9}",
                line.strategy,
                CONTEXTS[line.context],
                sum.calls,
                sum.old_bodies,
                sum.new_bodies,
                sum.stale_old,
                sum.stale_new,
                sum.tracer,
                sum.traps
            );
            if line.context == 0 {
                let _ = write!(table, " {:>8}", sum.pokes);
            }
            table.push('\n');
        }
        table
    }
}

fn name(line: &Line) -> String {
    format!("{} in {} context", line.strategy, CONTEXTS[line.context])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(strategy: &str, stale_old: u64, stale_new: u64) -> Patched {
        Patched::of(&[json!({
            "strategy": strategy, "context": "irq", "calls": 9, "old_bodies": 4, "new_bodies": 5, "traps": 2,
            "stale_old": stale_old, "stale_new": stale_new,
        })])
    }

    #[test]
    fn an_old_body_after_the_patch_fails_a_strategy_and_its_absence_fails_skip() {
        assert!(row("slots", 0, 0).hold(Must::Replace).is_ok());
        let error = row("slots", 2, 0).hold(Must::Replace).unwrap_err();
        assert_eq!(error.to_string(), "slots in irq context: the old body ran 2 times after the patch");
        assert!(row("skip", 2, 0).hold(Must::Replace).is_ok());
        assert!(row("skip", 2, 0).reach(Must::Replace).is_ok());
        assert!(row("skip", 0, 0).reach(Must::Replace).is_err());
    }

    #[test]
    fn a_new_body_after_the_revert_is_a_defect_unless_the_revert_was_left_out() {
        assert!(row("gap", 0, 1).hold(Must::Replace).is_err());
        assert!(row("gap", 0, 1).hold(Must::OutliveRevert).is_ok());
        assert!(row("gap", 0, 1).reach(Must::OutliveRevert).is_ok());
        assert!(row("gap", 0, 0).reach(Must::OutliveRevert).is_err());
    }

    #[test]
    fn a_run_in_which_nothing_was_replaced_proves_nothing() {
        assert!(Patched::of(&[]).hold(Must::Replace).is_err());
    }
}
