//! The result of a run.
//!
//! Owns [`Report`] and its [`Verdict`]. The command line prints it; nothing here decides how.

use std::time::Duration;

use trapline_process::{Resume, Stats, TextWriter};

use crate::{
    Options,
    account::{Account, Phase, Tally},
    registers::Vectors,
    worker::CONTEXTS,
};

/// Names of the contexts, in the order of [`Report::contexts`].
pub const CONTEXT_NAMES: [&str; CONTEXTS] = ["normal", "signal 1", "signal 2", "signal 3"];

/// What a run has done and found.
#[derive(Clone, Debug)]
pub struct Report {
    /// What was asked for.
    pub options: Options,
    /// Of the process, bits.
    pub width: u32,
    /// Vector registers that were held.
    pub vectors: Vectors,
    /// How text was written.
    pub text_writer: TextWriter,
    /// From the first change to the last.
    pub elapsed: Duration,
    /// What the tracer counted in that time: pokes, traps, slots.
    pub stats: Stats,
    /// Rewritten sites by the kind of change, in the order of [`Phase::ALL`].
    pub pokes: [u64; Phase::ALL.len()],
    /// By who made the calls: the workers' main loops, and the handlers of three signals.
    pub contexts: [Account; CONTEXTS],
    /// How many signal handlers were active at once in a thread, at most.
    pub nesting: usize,
}

/// What a run shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing was missed, nothing spurious, nothing corrupted.
    Clean,
    /// Something was.
    Failed,
    /// Nothing was, but this did not happen at all, so nothing is shown.
    Idle(&'static str),
}

impl Report {
    /// All contexts together.
    pub fn total(&self) -> Account {
        let mut total = Account::default();
        self.contexts.iter().for_each(|account| total.add(account));
        total
    }

    /// One phase of all contexts.
    pub fn phase(&self, phase: Phase) -> Tally {
        self.total().phases[phase as usize]
    }

    /// What it shows.
    pub fn verdict(&self) -> Verdict {
        let account = self.total();
        let tally = account.total();
        if tally.missed + tally.spurious + account.corrupted > 0 {
            return Verdict::Failed;
        }
        let needed = [
            ("no function was called", tally.calls),
            ("no ops was invoked", account.ops),
            ("no site was poked", self.stats.pokes),
            ("no thread met a breakpoint", self.stats.traps.traps),
            ("no register was held", account.held),
            ("no signal arrived", self.contexts[1..].iter().map(|context| context.total().calls).sum()),
        ];
        match needed.iter().find(|(_, count)| *count == 0) {
            Some((what, _)) => Verdict::Idle(what),
            None => Verdict::Clean,
        }
    }
}

/// As options and reports call a strategy.
pub const fn strategy_name(resume: Resume) -> &'static str {
    match resume {
        Resume::Slots => "slots",
        Resume::Push => "push",
        Resume::R11 => "r11",
        Resume::Skip => "skip",
    }
}

#[cfg(test)]
mod tests {
    use trapline_process::TrapStats;

    use super::*;
    use crate::account::Damage;

    fn report(change: impl FnOnce(&mut Report)) -> Report {
        let mut account = Account { ops: 5, held: 1, ..Account::default() };
        account.phases[Phase::Call as usize].calls = 5;
        let mut report = Report {
            options: Options { seconds: 1, threads: 1, resume: Resume::Slots, slots: 16 },
            width: 64,
            vectors: Vectors::Sse,
            text_writer: TextWriter::ProcMem,
            elapsed: Duration::from_secs(1),
            stats: Stats { pokes: 1, traps: TrapStats { traps: 1, ..TrapStats::default() }, ..Stats::default() },
            pokes: [0; Phase::ALL.len()],
            contexts: [const { None }; CONTEXTS].map(|_: Option<()>| account.clone()),
            nesting: 3,
        };
        change(&mut report);
        report
    }

    #[test]
    fn any_loss_fails_in_whichever_context() {
        assert_eq!(report(|_| {}).verdict(), Verdict::Clean);
        for context in 0..CONTEXTS {
            let failed = |spoil: &dyn Fn(&mut Account)| report(|report| spoil(&mut report.contexts[context])).verdict();
            assert_eq!(failed(&|account| account.phases[Phase::CallToList as usize].missed = 1), Verdict::Failed);
            assert_eq!(failed(&|account| account.phases[Phase::Nop as usize].spurious = 1), Verdict::Failed);
            assert_eq!(failed(&|account| account.damaged(3, Damage::Runs)), Verdict::Failed);
        }
    }

    #[test]
    fn a_run_that_did_nothing_shows_nothing() {
        let idle = |change: &dyn Fn(&mut Report)| matches!(report(|report| change(report)).verdict(), Verdict::Idle(_));
        assert!(idle(&|report| report.stats.pokes = 0));
        assert!(idle(&|report| report.stats.traps.traps = 0));
        assert!(idle(&|report| report.contexts[1..].fill(Account::default())));
        assert!(idle(&|report| report.contexts.fill(Account::default())));
    }
}
