//! What a run of the testbed printed, and whether it is what must hold.
//!
//! Owns [`Report`] (the lines of one run), [`Must`] (what a run is there to show) and the table. All of it is pure: lines in, verdict out.
//! Invariant: a run whose report is not complete proves nothing, and passes only where breaking is what it is there to show.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::patched::Patched;

/// Contexts in which the testbed calls traced functions, in the order in which they can interrupt each other.
pub(super) const CONTEXTS: [&str; 4] = ["normal", "softirq", "irq", "nmi"];

/// What a run is there to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Must {
    /// No call is lost, in any context; with `skip`, calls are lost in each.
    Hold,
    /// As `Hold`; and all contexts were pending at once: the greatest depth is 4, and no slot was missing.
    ReachDepth,
    /// As `ReachDepth`; and each instruction of the int3 trampoline was interrupted in each context, in every combination, and each one from the
    /// breakpoint to the function by an interrupt and by an NMI.
    InterruptAll,
    /// Calls end in the wrong place: the kernel breaks, or counts results that are not the called function's.
    GoWrong,
    /// Slots run out, which is counted, and no call is lost all the same.
    Overflow,
    /// Replaced functions never run their old bodies, and after the revert never their new ones; with `skip`, old bodies run in each context.
    Replace,
    /// New bodies run after a revert that was left out, in each context.
    OutliveRevert,
    /// Calls and contexts are traced, and all of it is in the trace.
    Trace,
    /// The trace lacks records, and says how many.
    TraceLoss,
    /// A batch over all sites takes three barriers; how long it takes is told, and not judged.
    Batch,
    /// The kernel faults, resets or hangs: what was left out is needed.
    Break,
}

/// How QEMU ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself, with this status.
    Exit(Option<i32>),
    /// Its time was up.
    TimedOut,
}

/// The status of QEMU when the testbed ended with success: `2 * 0x10 + 1`.
const SUCCESS: i32 = 33;

/// What one run printed.
#[derive(Debug)]
pub(crate) struct Report {
    /// One for each configuration and context.
    pub(crate) rows: Vec<Value>,
    /// The same of functions that are replaced.
    pub(crate) patches: Vec<Value>,
    /// What was said of a trace, or of a batch: events `clock`, `thread`, `traced`, `sent`, `batch`; or where calls were interrupted: `steps`.
    pub(crate) trace: Vec<Value>,
    /// Traced functions.
    pub(crate) sites: u64,
    /// Whether the last line said that all is done.
    pub(crate) done: bool,
    /// Lines that are no JSON, and faults: what to show when something is wrong.
    pub(crate) complaints: Vec<String>,
    /// How it ended.
    pub(crate) end: End,
}

impl Report {
    /// Sorts the lines.
    pub(crate) fn new(lines: &[String], end: End) -> Self {
        let mut report = Self {
            rows: Vec::new(),
            patches: Vec::new(),
            trace: Vec::new(),
            sites: 0,
            done: false,
            complaints: Vec::new(),
            end,
        };
        for line in lines.iter().map(|line| line.trim()).filter(|line| !line.is_empty()) {
            let parsed: Option<Value> = serde_json::from_str(line).ok();
            match parsed.as_ref().and_then(|value| value["event"].as_str()) {
                Some("row") => report.rows.extend(parsed),
                Some("patch") => report.patches.extend(parsed),
                Some("clock" | "thread" | "traced" | "sent" | "batch" | "steps") => report.trace.extend(parsed),
                Some("sites") => report.sites = parsed.map_or(0, |value| number(&value, "count")),
                Some("done") => report.done = true,
                _ => report.complaints.push(line.to_owned()),
            }
        }
        report
    }

    fn is_complete(&self) -> bool {
        self.done && self.end == End::Exit(Some(SUCCESS)) && self.complaints.is_empty()
    }

    /// How a kernel that broke did so, in a few words.
    pub(crate) fn breakage(&self) -> Option<String> {
        if self.is_complete() {
            return None;
        }
        Some(match (self.end, self.complaints.first()) {
            (End::TimedOut, _) => "hangs".to_owned(),
            (End::Exit(_), Some(complaint)) => complaint.clone(),
            (End::Exit(status), None) => format!("resets (status {status:?})"),
        })
    }

    /// Judges the run; the error says what does not hold.
    pub(crate) fn judge(&self, must: Must) -> Result<()> {
        if must == Must::Break {
            let began = self.sites > 0 || self.complaints.iter().any(|complaint| complaint.contains("\"fault\""));
            ensure!(began, "the kernel did not get as far as to break: {}", self.breakage().unwrap_or_default());
            return self.breakage().map(drop).context("the kernel ran on as if nothing were missing");
        }
        if must == Must::GoWrong {
            ensure!(
                self.sites > 0,
                "the kernel did not get as far as to call: {}",
                self.breakage().unwrap_or_default()
            );
            let is_wrong = self.rows.iter().any(|row| number(row, "wrong") > 0);
            ensure!(is_wrong || self.breakage().is_some(), "all calls went right, as if nothing were missing");
            return Ok(());
        }
        self.hold(must)?;
        self.reach(must)
    }

    /// Whether all that was wanted did not come about, though nothing is wrong. Interrupts come when they come: another run may do.
    pub(crate) fn missed(&self, must: Must) -> bool {
        // Which instruction is interrupted is chosen, and no matter of luck.
        !matches!(must, Must::Break | Must::GoWrong | Must::InterruptAll)
            && self.hold(must).is_ok()
            && self.reach(must).is_err()
    }

    fn hold(&self, must: Must) -> Result<()> {
        ensure!(self.is_complete(), "the run broke off: {}", self.breakage().unwrap_or_default());
        ensure!(self.sites >= 1000, "{} sites are not the thousand that are asked for", self.sites);
        for row in self.rows.iter().chain(&self.patches) {
            ensure!(
                number(row, "syncs") == 3 * number(row, "batches"),
                "a batch took more or less than three barriers: {row}"
            );
            for none in ["pending", "recursions", "wrong"] {
                ensure!(number(row, none) == 0, "{none} is not 0: {row}");
            }
        }
        if matches!(must, Must::Replace | Must::OutliveRevert) {
            return Patched::of(&self.patches).hold(must);
        }
        if must == Must::Batch {
            let batch = self.batch().context("no batch was timed")?;
            let [batches, syncs] = ["batches", "syncs"].map(|name| number(batch, name));
            ensure!(batches > 0 && syncs == 3 * batches, "{batches} batches took {syncs} barriers");
            return Ok(());
        }
        if matches!(must, Must::Trace | Must::TraceLoss) {
            // What the trace itself must hold is found in it.
            ensure!(self.trace.iter().any(|event| event["event"] == "sent"), "no trace was sent");
            return Ok(());
        }
        let sums = self.sums();
        ensure!(!sums.is_empty(), "nothing was run");
        for (line, sum) in &sums {
            let name = format!("{} in {} context", line.strategy, CONTEXTS[line.context]);
            ensure!(sum.calls > 0, "{name}: nothing was called");
            if line.strategy == "skip" {
                ensure!(sum.lost > 0, "{name} lost no call: this run could not have noticed a loss");
            } else {
                ensure!(sum.lost == 0, "{name} lost {} calls", sum.lost);
            }
            // Where NMIs nest, a call of one may count as a second one of the other.
            ensure!(sum.surplus == 0 || must == Must::Overflow, "{name} saw {} calls too many", sum.surplus);
            ensure!(sum.overflows == 0 || must == Must::Overflow, "{name}: {} overflows", sum.overflows);
        }
        Ok(())
    }

    /// Whether the table's lines are of enough calls and pokes to mean something: what a quick run does without.
    pub(crate) fn is_large(&self) -> Result<()> {
        for (line, sum) in &self.sums() {
            let name = format!("{} in {} context", line.strategy, CONTEXTS[line.context]);
            ensure!(sum.calls >= 1_000_000, "{name}: {} calls are less than a million", sum.calls);
            ensure!(sum.pokes >= 20_000, "{name}: {} pokes are less than 20,000", sum.pokes);
        }
        Ok(())
    }

    fn reach(&self, must: Must) -> Result<()> {
        let sums = self.sums();
        let depth = sums.values().map(|sum| sum.depth).max().unwrap_or_default();
        let overflows: u64 = sums.values().map(|sum| sum.overflows).sum();
        match must {
            Must::ReachDepth => {
                ensure!(depth == 4, "the greatest depth is {depth}: not all contexts met in the trampoline");
            }
            Must::InterruptAll => {
                ensure!(depth == 4, "the greatest depth is {depth}: not all contexts met in the trampoline");
                self.interrupt_all()?;
            }
            Must::Overflow => ensure!(overflows > 0, "no slot was missing"),
            Must::Replace | Must::OutliveRevert => Patched::of(&self.patches).reach(must)?,
            Must::Hold | Must::Break | Must::GoWrong | Must::Trace | Must::TraceLoss | Must::Batch => {}
        }
        Ok(())
    }

    /// Whether every instruction was interrupted, with every strategy.
    fn interrupt_all(&self) -> Result<()> {
        let steps = self.steps();
        ensure!(!steps.is_empty(), "nothing was stepped over");
        for run in steps {
            let [boundaries, triples, stepped, by_irq, by_nmi] =
                ["boundaries", "triples", "stepped", "by_irq", "by_nmi"].map(|name| number(run, name));
            ensure!(stepped > boundaries, "no further than the int3 trampoline: {run}");
            ensure!(
                triples == boundaries.pow(3) && by_irq == stepped && by_nmi == stepped,
                "not every instruction was interrupted: {run}"
            );
        }
        Ok(())
    }

    /// Where calls were interrupted, for each strategy.
    pub(crate) fn steps(&self) -> Vec<&Value> {
        self.trace.iter().filter(|event| event["event"] == "steps").collect()
    }

    fn batch(&self) -> Option<&Value> {
        self.trace.iter().find(|event| event["event"] == "batch")
    }

    /// Sites a second in batches of all of them, by the clock of the machine that the kernel was emulated on.
    pub(crate) fn rate(&self) -> Option<u64> {
        let pokes = number(self.batch()?, "pokes");
        let mut clocks =
            self.trace.iter().filter(|event| event["event"] == "clock").map(|clock| number(clock, "host_ns"));
        let (begin, end) = (clocks.next()?, clocks.next()?);
        pokes.checked_mul(1_000_000_000)?.checked_div(end.checked_sub(begin)?)
    }

    fn sums(&self) -> BTreeMap<Line, Sum> {
        let mut sums: BTreeMap<Line, Sum> = BTreeMap::new();
        for row in &self.rows {
            let sum = sums.entry(Line::of(row)).or_default();
            sum.calls += number(row, "calls");
            sum.ops += number(row, "ops");
            sum.lost += number(row, "lost");
            sum.surplus += number(row, "surplus");
            sum.traps += number(row, "traps");
            sum.overflows += number(row, "overflows");
            sum.depth = sum.depth.max(number(row, "depth"));
            sum.pokes += number(row, "pokes");
            sum.carried += number(row, "carried");
            let cycles = number(row, "cycles_per_poke");
            let place = usize::from(number(row, "sites") > 1);
            // Not under NMIs, which are most of the time where they are.
            if row["nmi_storm"] == false {
                sum.cycles[place] = sum.cycles[place].max(cycles);
            }
        }
        sums
    }

    /// The table: one line for each strategy and context.
    pub(crate) fn table(&self) -> String {
        if !self.patches.is_empty() {
            return Patched::of(&self.patches).table();
        }
        if self.rows.is_empty() {
            return self.rate().map(|rate| format!("  {rate} sites a second\n")).unwrap_or_default();
        }
        let mut table = format!(
            "  {:<8} {:<8} {:>10} {:>10} {:>9} {:>9} {:>5} {:>9} {:>8} {:>8} {:>12} {:>12}\n",
            "strategy",
            "context",
            "calls",
            "ops",
            "traps",
            "lost",
            "depth",
            "overflows",
            "pokes",
            "carried",
            "cycles/poke",
            "in a batch"
        );
        for (line, sum) in self.sums() {
            let _ = write!(
                table,
                "  {:<8} {:<8} {:>10} {:>10} {:>9} {:>9} {:>5} {:>9}",
                line.strategy,
                CONTEXTS[line.context],
                sum.calls,
                sum.ops,
                sum.traps,
                sum.lost,
                sum.depth,
                sum.overflows
            );
            if line.context == 0 {
                let [single, batch] = sum.cycles;
                let _ = write!(table, " {:>8} {:>8} {single:>12} {batch:>12}", sum.pokes, sum.carried);
            }
            table.push('\n');
        }
        for run in self.steps() {
            let [boundaries, triples, stepped, by_irq, by_nmi] =
                ["boundaries", "triples", "stepped", "by_irq", "by_nmi"].map(|name| number(run, name));
            let _ = writeln!(
                table,
                "  {}: {triples} combinations of {boundaries} instructions in three contexts; of {stepped} instructions, {by_irq} were \
                 interrupted and {by_nmi} met an NMI",
                run["strategy"].as_str().unwrap_or_default()
            );
        }
        table
    }
}

/// What a line of a table is of.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Line {
    pub(super) strategy: String,
    /// An index into [`CONTEXTS`].
    pub(super) context: usize,
}

impl Line {
    pub(super) fn of(row: &Value) -> Self {
        let context = CONTEXTS.iter().position(|context| row["context"] == *context).unwrap_or_default();
        Self { strategy: row["strategy"].as_str().unwrap_or_default().to_owned(), context }
    }
}

/// One line of the table: what all configurations of a strategy have in common.
#[derive(Debug, Default)]
struct Sum {
    calls: u64,
    ops: u64,
    lost: u64,
    surplus: u64,
    traps: u64,
    overflows: u64,
    depth: u64,
    pokes: u64,
    carried: u64,
    /// Of a poke alone, and in a batch of all sites.
    cycles: [u64; 2],
}

pub(super) fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(strategy: &str, context: &str, lost: u64, overflows: u64, depth: u64) -> String {
        format!(
            r#"{{"event":"row","strategy":"{strategy}","context":"{context}","calls":9,"ops":9,"lost":{lost},"surplus":0,
            "wrong":0,"pending":0,"recursions":0,"batches":2,"syncs":6,"overflows":{overflows},"depth":{depth}}}"#
        )
        .replace('\n', "")
    }

    fn report(rows: &[String]) -> Report {
        let mut lines = vec![r#"{"event":"sites","count":1024}"#.to_owned()];
        lines.extend_from_slice(rows);
        lines.push(r#"{"event":"done"}"#.to_owned());
        Report::new(&lines, End::Exit(Some(SUCCESS)))
    }

    #[test]
    fn a_lost_call_fails_a_strategy_and_its_absence_fails_skip() {
        assert!(report(&[row("slots", "nmi", 0, 0, 1)]).judge(Must::Hold).is_ok());
        let error = report(&[row("slots", "nmi", 3, 0, 1)]).judge(Must::Hold).unwrap_err();
        assert_eq!(error.to_string(), "slots in nmi context lost 3 calls");
        assert!(report(&[row("skip", "irq", 3, 0, 0)]).judge(Must::Hold).is_ok());
        assert!(report(&[row("skip", "irq", 0, 0, 0)]).judge(Must::Hold).is_err());
    }

    #[test]
    fn overflows_are_wanted_in_one_run_and_a_defect_in_the_others() {
        let overflow = report(&[row("slots", "nmi", 0, 7, 4)]);
        assert!(overflow.judge(Must::Overflow).is_ok());
        assert!(overflow.judge(Must::Hold).is_err());
        let missed = report(&[row("slots", "nmi", 0, 0, 4)]);
        assert!(missed.judge(Must::Overflow).is_err() && missed.missed(Must::Overflow));
        assert!(!report(&[row("slots", "nmi", 1, 0, 4)]).missed(Must::Overflow), "a lost call is not tried away");
    }

    #[test]
    fn a_run_that_breaks_off_proves_nothing_but_that_it_breaks() {
        let fault = r#"{"event":"fault","what":"a fault","ip":1,"cpu":1}"#.to_owned();
        let broken = Report::new(std::slice::from_ref(&fault), End::Exit(Some(35)));
        assert!(broken.judge(Must::Break).is_ok());
        assert!(broken.judge(Must::Hold).is_err());
        assert_eq!(broken.breakage(), Some(fault));
        let unborn = Report::new(&[], End::Exit(Some(1)));
        assert!(unborn.judge(Must::Break).is_err(), "a kernel that does not boot is no control");
        let hung = Report::new(&[], End::TimedOut);
        assert_eq!(hung.breakage(), Some("hangs".to_owned()));
        let whole = report(&[row("slots", "nmi", 0, 0, 1)]);
        assert!(whole.judge(Must::Break).is_err());
    }

    #[test]
    fn a_single_instruction_that_was_not_interrupted_fails() {
        let met = |triples: u64, by_nmi: u64| {
            let steps = format!(
                r#"{{"event":"steps","strategy":"slots","boundaries":3,"triples":{triples},"stepped":9,"by_irq":9,"by_nmi":{by_nmi}}}"#
            );
            report(&[row("slots", "nmi", 0, 0, 4), steps])
        };
        assert!(met(27, 9).judge(Must::InterruptAll).is_ok());
        assert!(met(26, 9).judge(Must::InterruptAll).is_err());
        assert!(met(27, 8).judge(Must::InterruptAll).is_err() && !met(27, 8).missed(Must::InterruptAll));
        assert!(report(&[row("slots", "nmi", 0, 0, 4)]).judge(Must::InterruptAll).is_err());
    }

    #[test]
    fn a_call_that_goes_wrong_is_wanted_in_one_run_and_a_defect_in_the_others() {
        let right = row("slots", "nmi", 0, 0, 1);
        let wrong = report(&[right.replace(r#""wrong":0"#, r#""wrong":2"#)]);
        assert!(wrong.judge(Must::GoWrong).is_ok());
        assert!(wrong.judge(Must::Hold).is_err());
        assert!(report(&[right]).judge(Must::GoWrong).is_err());
    }

    #[test]
    fn a_batch_takes_three_barriers_whatever_it_costs() {
        let timed = |syncs: u64| {
            let mut report = report(&[
                r#"{"event":"clock","tsc":1,"host_ns":5}"#.to_owned(),
                r#"{"event":"clock","tsc":9,"host_ns":1000000005}"#.to_owned(),
                format!(r#"{{"event":"batch","batches":2,"pokes":2082,"syncs":{syncs}}}"#),
            ]);
            report.sites = 1041;
            report
        };
        assert!(timed(6).judge(Must::Batch).is_ok());
        assert_eq!(timed(6).rate(), Some(2082));
        assert!(timed(7).judge(Must::Batch).is_err());
        assert!(report(&[]).judge(Must::Batch).is_err(), "nothing was timed");
    }

    #[test]
    fn the_single_step_run_must_reach_the_greatest_depth() {
        assert!(report(&[row("slots", "nmi", 0, 0, 4)]).judge(Must::ReachDepth).is_ok());
        assert!(report(&[row("slots", "nmi", 0, 0, 3)]).judge(Must::ReachDepth).is_err());
    }
}
