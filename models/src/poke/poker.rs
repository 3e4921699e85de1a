//! The poker: whoever changes the text.
//!
//! Owns [`Poker`], where it stands, and the driving of the real [`Protocol`]: what `Engine::retarget`, `drive` and `Engine::reclaim` do, cut into
//! steps that anybody may come between. In order, for each batch: write the trampolines that it leads to; take the protocol's steps, each
//! store byte by byte; free the trampolines that nothing leads to any more, after a grace period, or leave them. At the end remove the trap
//! handler. [`Mutant`]s are a filter between the protocol and the poker, so that it is the real machine which is mutated. Invariant: a
//! step of the protocol is finished before the next one is asked for.

use std::fmt;

use trapline_engine::poke::{Outcome, Part, Protocol, Step, Version};

use super::{
    Action, CODE, CPUS, Context, Mutant, PokeModel, State, landmark,
    text::{BLANK, Cell, TRAMPOLINES, trampoline_cell},
};
use crate::explore::{Invariant, Landmarks, Violation};

/// What the poker is at.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    /// About to write the trampolines of the next batch.
    Prepare,
    /// Inside the protocol. `last` is the step that it gave last.
    Poking { protocol: Protocol, last: Option<Step>, doing: Doing },
    /// Trampolines are left that nothing leads to.
    Reclaim,
    /// All batches are over.
    Leave,
    /// The handler is gone.
    Left,
    /// A batch could not be undone. The engine does nothing more.
    Stuck,
}

/// How far a step of the protocol is.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Doing {
    /// Done.
    Nothing,
    /// Bytes are being stored; `left` is a mask of cells.
    Writing { part: Part, version: Version, left: u16 },
    /// A barrier is under way: CPUs that have not acknowledged it are marked.
    Syncing,
    /// Waiting until nobody is between the instructions of a site.
    Awaiting,
    /// Trampolines are about to be written ([`Mutant::TrampolinesAfterInt3`]).
    WritingTrampolines,
}

/// The state of the poker.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Poker {
    pub(super) phase: Phase,
    /// How many batches were committed.
    pub(super) committed: u8,
    /// How many batches were published; batch `n` is the `n + 1`th.
    pub(super) published: u8,
    /// Whether the last of them still is.
    pub(super) live: bool,
    /// Whether a batch was undone, after which there is no other.
    aborted: bool,
    failures_left: u8,
}

/// What the poker does next.
#[derive(Clone, Copy)]
pub enum PokerAction {
    /// Writes the trampolines that the next batch leads to, and begins with it.
    Prepare,
    /// Writes them now that the int3s are there ([`Mutant::TrampolinesAfterInt3`]).
    PrepareLate,
    /// Asks the protocol for a step and begins it.
    Step,
    /// Stores one byte.
    Store(Cell),
    /// Finds that the grace period is over.
    GraceEnds,
    /// Fails in what it is doing.
    Fail,
    /// Frees the trampolines that nothing leads to.
    Free,
    /// Leaves them for later.
    Keep,
    /// Removes the trap handler.
    RemoveHandler,
}

impl Poker {
    pub(super) fn new(failures: u8) -> Self {
        Self { phase: Phase::Prepare, committed: 0, published: 0, live: false, aborted: false, failures_left: failures }
    }

    /// The trap handler is gone.
    pub(super) fn has_left(&self) -> bool {
        matches!(self.phase, Phase::Left)
    }
}

fn cells_of(mask: u16) -> impl Iterator<Item = Cell> {
    (0..16).filter(move |cell| mask & 1 << cell != 0)
}

impl PokeModel {
    pub(super) fn poker_actions(&self, state: &State, actions: &mut Vec<Action>) {
        let mut add = |action| actions.push(Action::Poker(action));
        let can_fail = state.poker.failures_left > 0;
        match state.poker.phase {
            Phase::Prepare => add(PokerAction::Prepare),
            Phase::Poking { last, doing, .. } => {
                let mut may_fail = true;
                match doing {
                    Doing::Nothing => {
                        add(PokerAction::Step);
                        may_fail = last == Some(Step::Verify);
                    }
                    Doing::Writing { left: 0, .. } => add(PokerAction::Step),
                    Doing::Writing { left, .. } => cells_of(left).for_each(|cell| add(PokerAction::Store(cell))),
                    Doing::Syncing => {}
                    Doing::Awaiting => {
                        if self.nobody_is_between_instructions(state) {
                            add(PokerAction::GraceEnds);
                        }
                    }
                    Doing::WritingTrampolines => {
                        add(PokerAction::PrepareLate);
                        may_fail = false;
                    }
                }
                if can_fail && may_fail {
                    add(PokerAction::Fail);
                }
            }
            Phase::Reclaim => {
                if self.grace_period_is_over(state) {
                    add(PokerAction::Free);
                }
                add(PokerAction::Keep);
            }
            Phase::Leave => {
                if state.contexts().all(|context| !context.is_in_handler()) {
                    add(PokerAction::RemoveHandler);
                }
            }
            Phase::Left | Phase::Stuck => {}
        }
    }

    pub(super) fn poke(&self, state: &mut State, action: PokerAction) -> Result<(), Violation> {
        match action {
            PokerAction::Prepare => self.prepare(state),
            PokerAction::PrepareLate => {
                self.write_trampolines(state);
                set_doing(state, Doing::Nothing);
            }
            PokerAction::Step => self.take_step(state)?,
            PokerAction::Store(cell) => self.store(state, cell),
            PokerAction::GraceEnds => set_doing(state, Doing::Nothing),
            PokerAction::Fail => fail(state),
            PokerAction::Free => self.free(state)?,
            PokerAction::Keep => self.next_batch(state),
            PokerAction::RemoveHandler => state.poker.phase = Phase::Left,
        }
        Ok(())
    }

    /// `Engine::retarget`: the trampolines first, then the batch.
    fn prepare(&self, state: &mut State) {
        if !self.mutant_is(Mutant::TrampolinesAfterInt3) {
            self.write_trampolines(state);
        }
        let with_grace = self.batches[usize::from(state.poker.committed)].with_grace;
        let protocol = if with_grace { Protocol::with_grace() } else { Protocol::new() };
        state.poker.phase = Phase::Poking { protocol, last: None, doing: Doing::Nothing };
        // Whoever asks for an ops to be detached no longer counts on the calls that are under way.
        for site in 0..self.scenario.sites.len() {
            let attached = self.attached(state, site);
            for cpu in &mut state.cpus {
                cpu.contexts.iter_mut().for_each(|context| context.expect_less(site, attached));
            }
        }
    }

    fn write_trampolines(&self, state: &mut State) {
        let after = &self.contents[usize::from(state.poker.committed) + 1];
        for trampoline in after.iter().filter_map(|content| content.trampoline()) {
            if self.byte(state, trampoline_cell(trampoline)) == BLANK {
                self.write(state, trampoline_cell(trampoline), CODE);
            }
        }
    }

    /// `drive`: one step of the protocol.
    fn take_step(&self, state: &mut State) -> Result<(), Violation> {
        let Phase::Poking { mut protocol, last, .. } = state.poker.phase else { return Ok(()) };
        let (step, last) = self.next_step(&mut protocol, last);
        let batch = &self.batches[usize::from(state.poker.committed)];
        let doing = match step {
            Step::Verify => {
                let found = |at| self.byte(state, Self::cell_at(at));
                for expected in batch.set.expected() {
                    let mut offsets = (0i64..).zip(expected.bytes.iter());
                    if offsets.any(|(offset, byte)| found(expected.at.offset(offset)) != *byte) {
                        let what = "a site does not hold what the last batch left there";
                        return Err(Violation::new(Invariant::AllOrNothing, what));
                    }
                }
                Doing::Nothing
            }
            Step::Publish => {
                state.poker.published = state.poker.committed + 1;
                state.poker.live = true;
                Doing::Nothing
            }
            Step::Write(part, version) => {
                let stores = self.stores(state, part, version);
                let left = stores.iter().fold(0, |mask, (cell, _)| mask | 1 << cell);
                Doing::Writing { part, version, left }
            }
            Step::SyncCores => {
                state.cpus.iter_mut().for_each(|cpu| cpu.owes_barrier = true);
                Doing::Syncing
            }
            Step::AwaitUnused if self.mutant_is(Mutant::NoGraceBetweenInstructions) => Doing::Nothing,
            Step::AwaitUnused => Doing::Awaiting,
            Step::Retire => {
                state.poker.live = false;
                Doing::Nothing
            }
            Step::Done(outcome) => return self.finish(state, outcome),
        };
        state.poker.phase = Phase::Poking { protocol, last: Some(last), doing };
        self.finish_writing(state);
        Ok(())
    }

    /// The protocol's next step, and the one that the poker takes for it.
    fn next_step(&self, protocol: &mut Protocol, last: Option<Step>) -> (Step, Step) {
        let mut real = protocol.next_step();
        if let Some(Mutant::NoBarrierAfter(part, version)) = self.scenario.mutant
            && (last, real) == (Some(Step::Write(part, version)), Step::SyncCores)
        {
            real = protocol.next_step();
        }
        let is_last_barrier = |protocol: Protocol| real == Step::SyncCores && { protocol }.next_step() == Step::Retire;
        let taken = match (self.scenario.mutant, real) {
            (Some(Mutant::HeadsBeforeTails), Step::Write(Part::Tail, version)) => Step::Write(Part::Head, version),
            (Some(Mutant::HeadsBeforeTails), Step::Write(Part::Head, version)) => Step::Write(Part::Tail, version),
            (Some(Mutant::RetireBeforeLastBarrier), _) if is_last_barrier(*protocol) => Step::Retire,
            (Some(Mutant::RetireBeforeLastBarrier), Step::Retire) => Step::SyncCores,
            (Some(Mutant::PublishAfterInt3), Step::Publish) => Step::Write(Part::Int3, Version::New),
            (Some(Mutant::PublishAfterInt3), Step::Write(Part::Int3, Version::New)) => Step::Publish,
            _ => real,
        };
        (taken, real)
    }

    /// The bytes that a write changes. Storing what is there already is no event.
    fn stores(&self, state: &State, part: Part, version: Version) -> Vec<(Cell, u8)> {
        let batch = &self.batches[usize::from(state.poker.committed)];
        let mut stores = Vec::new();
        for write in batch.set.writes(part, version) {
            for (offset, value) in (0i64..).zip(write.bytes.iter()) {
                let cell = Self::cell_at(write.at.offset(offset));
                if self.byte(state, cell) != *value {
                    stores.push((cell, *value));
                }
            }
        }
        stores
    }

    fn store(&self, state: &mut State, cell: Cell) {
        let Phase::Poking { doing: Doing::Writing { part, version, left }, .. } = state.poker.phase else { return };
        let stores = self.stores(state, part, version);
        let (_, value) = stores.iter().find(|(stored, _)| *stored == cell).expect("only bytes that change are left");
        self.write(state, cell, *value);
        set_doing(state, Doing::Writing { part, version, left: left & !(1 << cell) });
        self.finish_writing(state);
    }

    /// Ends a write of which nothing is left. One that might yet be reported as failed waits for the next step.
    fn finish_writing(&self, state: &mut State) {
        let Phase::Poking { doing: Doing::Writing { part, left: 0, .. }, .. } = state.poker.phase else { return };
        if state.poker.failures_left > 0 {
            return;
        }
        let late = self.mutant_is(Mutant::TrampolinesAfterInt3) && part == Part::Int3;
        set_doing(state, if late { Doing::WritingTrampolines } else { Doing::Nothing });
    }

    fn finish(&self, state: &mut State, outcome: Outcome) -> Result<(), Violation> {
        match outcome {
            Outcome::Committed => state.poker.committed += 1,
            Outcome::Aborted => state.poker.aborted = true,
            Outcome::Stuck => {
                state.poker.phase = Phase::Stuck;
                return Ok(());
            }
        }
        if !self.text_is_settled(state) {
            let what = format!("the batch ended as {outcome:?}, and a site holds something else");
            return Err(Violation::new(Invariant::AllOrNothing, what));
        }
        if self.useless_trampolines(state).next().is_some() {
            state.poker.phase = Phase::Reclaim;
        } else {
            self.next_batch(state);
        }
        Ok(())
    }

    fn next_batch(&self, state: &mut State) {
        let over = state.poker.aborted || usize::from(state.poker.committed) == self.batches.len();
        state.poker.phase = if over { Phase::Leave } else { Phase::Prepare };
    }

    /// Trampolines that are there though no site leads to them.
    fn useless_trampolines<'a>(&'a self, state: &'a State) -> impl Iterator<Item = usize> + 'a {
        let used = |trampoline| {
            (0..self.scenario.sites.len()).any(|site| self.content(state, site).trampoline() == Some(trampoline))
        };
        (0..TRAMPOLINES)
            .filter(move |trampoline| self.byte(state, trampoline_cell(*trampoline)) == CODE && !used(*trampoline))
    }

    fn free(&self, state: &mut State) -> Result<(), Violation> {
        let useless: Vec<usize> = self.useless_trampolines(state).collect();
        for trampoline in useless {
            if state.contexts().any(|context| context.is_bound_for(trampoline)) {
                let what = "a trampoline is freed while a CPU is inside, or about to enter it";
                return Err(Violation::new(Invariant::NoSkippedCall, what));
            }
            self.write(state, trampoline_cell(trampoline), BLANK);
        }
        self.next_batch(state);
        Ok(())
    }

    /// `Host::is_unused` for the trampolines that are to be freed.
    fn grace_period_is_over(&self, state: &State) -> bool {
        if self.mutant_is(Mutant::NoGracePeriod) {
            return true;
        }
        let overlooks_handlers = self.mutant_is(Mutant::GraceOverlooksHandlers);
        self.useless_trampolines(state).all(|trampoline| {
            !state
                .contexts()
                .any(|context| context.is_bound_for(trampoline) && !(overlooks_handlers && context.is_in_handler()))
        })
    }

    /// `Host::is_unused` for the interiors of the batch's sites.
    fn nobody_is_between_instructions(&self, state: &State) -> bool {
        let batch = &self.batches[usize::from(state.poker.committed)];
        !state
            .contexts()
            .any(|context| matches!(context, Context::Between { site, .. } if batch.sites.contains(&usize::from(site))))
    }

    pub(super) fn poker_landmarks(before: &State, action: PokerAction, after: &State) -> Landmarks {
        match action {
            PokerAction::Step if after.poker.committed > before.poker.committed => landmark::COMMITTED,
            PokerAction::Step if after.poker.aborted && !before.poker.aborted => landmark::ABORTED,
            PokerAction::Step if after.poker.phase == Phase::Stuck => landmark::STUCK,
            PokerAction::Free => landmark::FREED,
            PokerAction::RemoveHandler => landmark::LEFT,
            _ => Landmarks::default(),
        }
    }

    pub(super) fn describe_poker(&self, before: &State, action: PokerAction) -> String {
        match action {
            PokerAction::Prepare if self.mutant_is(Mutant::TrampolinesAfterInt3) => {
                format!("begins batch {} without its trampolines", before.poker.committed + 1)
            }
            PokerAction::Prepare => format!("writes the trampolines of batch {}", before.poker.committed + 1),
            PokerAction::PrepareLate => "writes the trampolines".into(),
            PokerAction::Step => {
                let Phase::Poking { mut protocol, last, .. } = before.poker.phase else { return String::new() };
                StepText(self.next_step(&mut protocol, last).0).to_string()
            }
            PokerAction::Store(cell) => {
                let Phase::Poking { doing: Doing::Writing { part, version, .. }, .. } = before.poker.phase else {
                    return String::new();
                };
                let stores = self.stores(before, part, version);
                let value = stores.iter().find(|(stored, _)| *stored == cell).map_or(0, |(_, value)| *value);
                let (site, offset) = (cell / super::CALL_BYTES, cell % super::CALL_BYTES);
                format!("stores {value:02x} over {:02x} in byte {offset} of site {site}", self.byte(before, cell))
            }
            PokerAction::GraceEnds => "finds nobody between the instructions of a site".into(),
            PokerAction::Fail => "fails in that".into(),
            PokerAction::Free => "frees the trampolines that no site leads to".into(),
            PokerAction::Keep => "leaves old trampolines for later".into(),
            PokerAction::RemoveHandler => "leaves: removes the trap handler".into(),
        }
    }
}

fn set_doing(state: &mut State, now: Doing) {
    if let Phase::Poking { doing, .. } = &mut state.poker.phase {
        *doing = now;
    }
}

fn fail(state: &mut State) {
    if let Phase::Poking { protocol, last, doing } = &mut state.poker.phase {
        protocol.failed();
        (*last, *doing) = (None, Doing::Nothing);
    }
    state.poker.failures_left -= 1;
    // Some CPUs may have serialised already. Not to count on the others is the weaker assumption.
    state.cpus.iter_mut().for_each(|cpu| cpu.owes_barrier = false);
}

/// Ends a barrier that every CPU has acknowledged.
pub(super) fn finish_barrier(state: &mut State) {
    if state.cpus.iter().all(|cpu| !cpu.owes_barrier) {
        set_doing(state, Doing::Nothing);
    }
}

impl State {
    /// All contexts of all CPUs.
    fn contexts(&self) -> impl Iterator<Item = Context> {
        (0..CPUS).flat_map(|cpu| self.cpus[cpu].contexts)
    }
}

/// A step of the protocol in a trace.
struct StepText(Step);

impl fmt::Display for StepText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = |version| match version {
            Version::Old => "old",
            Version::New => "new",
        };
        match self.0 {
            Step::Verify => f.write_str("verifies the old bytes"),
            Step::Publish => f.write_str("publishes the batch"),
            Step::Write(Part::Int3, _) => f.write_str("begins to write int3 over the first bytes"),
            Step::Write(Part::Tail, of) => write!(f, "begins to write the {} bytes behind the first", version(of)),
            Step::Write(Part::Head, of) => write!(f, "begins to write the {} first bytes", version(of)),
            Step::SyncCores => f.write_str("begins a barrier"),
            Step::AwaitUnused => f.write_str("waits until nobody is between the instructions of a site"),
            Step::Retire => f.write_str("retires the batch"),
            Step::Done(outcome) => write!(f, "is done: {outcome:?}"),
        }
    }
}
