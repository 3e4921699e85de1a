//! The poke: rewriting sites while other CPUs run them, as a state machine without I/O.
//!
//! Owns the *protocol* ([`Protocol`], [`Step`]) and the *batch* it is applied to ([`Poke`], [`PokeSet`]). The engine asks
//! [`Protocol::next_step`] what to do, lets its host do it, and reports a failure with [`Protocol::failed`]; the models drive the same
//! machine against CPUs that fetch stale bytes. Downstream is [`trap`](crate::trap), which emulates the new instruction for
//! whoever meets an int3 meanwhile.
//!
//! The protocol, for all sites of a batch at once (SDM volume 3, section 9.1.3 "Handling Self- and Cross-Modifying Code", asks
//! for a serialising instruction on the executing CPU; Linux's `smp_text_poke_batch_finish` is the model):
//!
//! 1. verify that every site holds the expected old bytes; nothing is written unless all do (I5);
//! 2. publish the batch to the trap handler. Everything that the new instructions lead to is live by now (I1);
//! 3. write int3 over the first byte of every site; synchronise all cores: from here on no CPU can *start* an old instruction;
//! 4. write the other bytes; synchronise: no CPU holds stale tail bytes;
//! 5. write the first bytes; synchronise: no CPU can meet an int3 of this batch any more;
//! 6. retire the batch, once no handler reads it.
//!
//! Where the old bytes are *several* instructions (the one-byte nops that GCC leaves for `-fpatchable-function-entry`) a thread may stand
//! between two of them. [`Protocol::with_grace`] then waits between 3 and 4, when nobody can enter any more, until everybody has left: what
//! Linux's optprobes do with a tasks-RCU grace period. Undoing waits likewise, where the *new* bytes may be several instructions.
//!
//! Invariant: at every instant each site's first byte is the old one, int3, or the new one, and the bytes behind an old (new) first
//! byte are the old (new) ones (I2). A failure on the way is undone by the same discipline, backwards; where even that fails the
//! batch stays published, so that the int3s that remain keep being emulated: slow, and correct.

use alloc::vec::Vec;
use core::fmt;

use crate::{
    Addr, AddrRange, Mode,
    insn::{Effect, INT3, InsnBytes, NotEmulated},
};

/// Which bytes of a site a write covers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Part {
    /// Byte 0 becomes int3.
    Int3,
    /// Bytes 1.. of the instruction.
    Tail,
    /// Byte 0 of the instruction.
    Head,
}

/// Which of a poke's two instructions a write takes its bytes from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Version {
    /// The instruction before the poke: used to undo.
    Old,
    /// The instruction that the poke installs.
    New,
}

/// How a batch ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// Every site holds its new instruction.
    Committed,
    /// Every site holds its old instruction, as if nothing had been tried.
    Aborted,
    /// Undoing failed as well: some sites still hold int3 and the batch stays published, so that they keep being emulated.
    Stuck,
}

/// What the driver of a batch has to do next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Step {
    /// Compare the text of every site with [`Poke::old`].
    Verify,
    /// Make the batch visible to the trap handler.
    Publish,
    /// Write one part of every site.
    Write(Part, Version),
    /// Make every CPU that runs the target execute a serialising instruction.
    SyncCores,
    /// Wait until no thread is between the instructions of a site: inside [`PokeSet::interiors`]. Nobody can get there any more.
    AwaitUnused,
    /// Hide the batch from the trap handler and wait until no handler reads it.
    Retire,
    /// Nothing more to do.
    Done(Outcome),
}

use Outcome::{Aborted, Committed, Stuck};
use Part::{Head, Int3, Tail};
use Step::{AwaitUnused, Done, Publish, Retire, SyncCores, Verify, Write};
use Version::{New, Old};

const COMMIT: &[Step] = &[
    Verify,
    Publish,
    Write(Int3, New),
    SyncCores,
    Write(Tail, New),
    SyncCores,
    Write(Head, New),
    SyncCores,
    Retire,
    Done(Committed),
];
const COMMIT_WITH_GRACE: &[Step] = &[
    Verify,
    Publish,
    Write(Int3, New),
    SyncCores,
    AwaitUnused,
    Write(Tail, New),
    SyncCores,
    Write(Head, New),
    SyncCores,
    Retire,
    Done(Committed),
];
/// Nothing was written.
const UNDO_NOTHING: &[Step] = &[Done(Aborted)];
/// Some heads may be int3; all tails are old.
const UNDO_INT3: &[Step] = &[Write(Head, Old), SyncCores, Retire, Done(Aborted)];
/// All heads are int3; tails may be old or new.
const UNDO_TAIL: &[Step] = &[Write(Tail, Old), SyncCores, Write(Head, Old), SyncCores, Retire, Done(Aborted)];
/// Some heads may be new already; all tails are new.
const UNDO_HEAD: &[Step] =
    &[Write(Int3, Old), SyncCores, Write(Tail, Old), SyncCores, Write(Head, Old), SyncCores, Retire, Done(Aborted)];
/// Some heads may be new already, and lead to several instructions: somebody may stand between them.
const UNDO_HEAD_WITH_GRACE: &[Step] = &[
    Write(Int3, Old),
    SyncCores,
    AwaitUnused,
    Write(Tail, Old),
    SyncCores,
    Write(Head, Old),
    SyncCores,
    Retire,
    Done(Aborted),
];
const GIVE_UP: &[Step] = &[Done(Stuck)];

/// The state of one batch on its way through the protocol. Small and comparable, so that models can explore it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Protocol {
    plan: Plan,
    at: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Plan {
    Commit,
    CommitWithGrace,
    UndoNothing,
    UndoInt3,
    UndoTail,
    UndoHead,
    UndoHeadWithGrace,
    GiveUp,
}

impl Plan {
    const fn steps(self) -> &'static [Step] {
        match self {
            Self::Commit => COMMIT,
            Self::CommitWithGrace => COMMIT_WITH_GRACE,
            Self::UndoNothing => UNDO_NOTHING,
            Self::UndoInt3 => UNDO_INT3,
            Self::UndoTail => UNDO_TAIL,
            Self::UndoHead => UNDO_HEAD,
            Self::UndoHeadWithGrace => UNDO_HEAD_WITH_GRACE,
            Self::GiveUp => GIVE_UP,
        }
    }
}

impl Default for Protocol {
    fn default() -> Self {
        Self::new()
    }
}

impl Protocol {
    /// A batch of which nothing is done yet.
    pub const fn new() -> Self {
        Self { plan: Plan::Commit, at: 0 }
    }

    /// A batch whose sites hold several instructions each, so that threads may stand between them.
    pub const fn with_grace() -> Self {
        Self { plan: Plan::CommitWithGrace, at: 0 }
    }

    /// The next step to take. At the end it is [`Step::Done`], again and again.
    pub fn next_step(&mut self) -> Step {
        let steps = self.plan.steps();
        let step = steps[self.at];
        self.at = (self.at + 1).min(steps.len() - 1);
        step
    }

    /// Reports that the step that [`next_step`](Self::next_step) returned last could not be done, or only in part: what follows undoes
    /// the batch.
    pub fn failed(&mut self) {
        let plan = match self.plan {
            Plan::Commit | Plan::CommitWithGrace => {
                let last_write = self.steps_begun().iter().rev().find_map(|step| match step {
                    Write(part, _) => Some(part),
                    _ => None,
                });
                match last_write {
                    None => Plan::UndoNothing,
                    Some(Int3) => Plan::UndoInt3,
                    Some(Tail) => Plan::UndoTail,
                    Some(Head) if self.plan == Plan::CommitWithGrace => Plan::UndoHeadWithGrace,
                    Some(Head) => Plan::UndoHead,
                }
            }
            _ => Plan::GiveUp,
        };
        *self = Self { plan, at: 0 };
    }

    fn steps_begun(&self) -> &'static [Step] {
        &self.plan.steps()[..self.at]
    }
}

/// Bytes to be stored into the target's text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TextWrite {
    /// Where the first byte goes.
    pub at: Addr,
    /// What is stored there.
    pub bytes: InsnBytes,
}

/// One site's rewrite: whole instructions for whole instructions of the same length. Only a batch [with grace](Protocol::with_grace) may
/// replace several, or by several.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Poke {
    /// Address of the instruction.
    pub site: Addr,
    /// The instruction that must be there.
    pub old: InsnBytes,
    /// The instruction that replaces it.
    pub new: InsnBytes,
    /// What `new` does: the trap handler does it for whoever meets the int3.
    pub effect: Effect,
}

/// Why a poke, or a batch of them, cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadPoke {
    /// The old and the new instruction differ in length, so threads could return into the middle of one.
    Length {
        /// The site.
        site: Addr,
        /// Bytes of the old instruction.
        old_bytes: usize,
        /// Bytes of the new instruction.
        new_bytes: usize,
    },
    /// The new instruction is none that the trap handler can emulate.
    NotEmulated(NotEmulated),
    /// Two pokes of the batch cover the same byte.
    Overlap {
        /// The site at the lower address.
        first: Addr,
        /// The site that begins inside it.
        second: Addr,
    },
}

impl fmt::Display for BadPoke {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { site, old_bytes, new_bytes } => {
                write!(f, "at {site} an instruction of {old_bytes} bytes cannot be replaced by one of {new_bytes}")
            }
            Self::NotEmulated(reason) => reason.fmt(f),
            Self::Overlap { first, second } => write!(f, "the sites {first} and {second} overlap"),
        }
    }
}

impl core::error::Error for BadPoke {}

impl Poke {
    /// A poke of `old` into `new` at `site`; what has to be emulated is decoded from `new`.
    ///
    /// # Errors
    /// [`BadPoke::Length`], [`BadPoke::NotEmulated`].
    pub fn new(mode: Mode, site: Addr, old: InsnBytes, new: InsnBytes) -> Result<Self, BadPoke> {
        let effect = Effect::decode(mode, site, &new).map_err(BadPoke::NotEmulated)?;
        Self::with_effect(site, old, new, effect)
    }

    /// A poke whose effect the caller knows, having just encoded `new`.
    ///
    /// # Errors
    /// [`BadPoke::Length`].
    #[inline]
    pub fn with_effect(site: Addr, old: InsnBytes, new: InsnBytes, effect: Effect) -> Result<Self, BadPoke> {
        if old.len() != new.len() || old.is_empty() {
            return Err(BadPoke::Length { site, old_bytes: old.len(), new_bytes: new.len() });
        }
        Ok(Self { site, old, new, effect })
    }

    /// The store that one [`Step::Write`] makes at this site; `None` where there is nothing to store (a one-byte instruction has
    /// no tail).
    #[inline]
    pub fn write(&self, part: Part, version: Version) -> Option<TextWrite> {
        let insn = match version {
            Version::Old => &self.old,
            Version::New => &self.new,
        };
        let (offset, bytes) = match part {
            Part::Int3 => (0, InsnBytes::one(INT3)),
            Part::Tail => (1, insn.tail()),
            Part::Head => (0, insn.head()),
        };
        (!bytes.is_empty()).then(|| TextWrite { at: self.site.offset(offset), bytes })
    }
}

/// The pokes of one batch, sorted by address, none overlapping: what the trap handler searches.
#[derive(Debug)]
pub struct PokeSet {
    pokes: Vec<Poke>,
}

impl PokeSet {
    /// Sorts `pokes` and checks that they are disjoint.
    ///
    /// # Errors
    /// [`BadPoke::Overlap`].
    pub fn new(mut pokes: Vec<Poke>) -> Result<Self, BadPoke> {
        let apart = |first: &Poke, second: &Poke| first.site.after(first.old.len()) <= second.site;
        // The engine goes through its sites in order, so there is mostly nothing to sort.
        if !pokes.is_sorted_by(apart) {
            pokes.sort_unstable_by_key(|poke| poke.site);
            if let Some(pair) = pokes.windows(2).find(|pair| !apart(&pair[0], &pair[1])) {
                return Err(BadPoke::Overlap { first: pair[0].site, second: pair[1].site });
            }
        }
        Ok(Self { pokes })
    }

    /// The pokes in order of their addresses.
    pub fn pokes(&self) -> &[Poke] {
        &self.pokes
    }

    /// The poke of exactly this site, by binary search. Safe in a trap handler: no allocation, no lock.
    pub fn find(&self, site: Addr) -> Option<&Poke> {
        let index = self.pokes.binary_search_by_key(&site, |poke| poke.site).ok()?;
        self.pokes.get(index)
    }

    /// The bytes of every site but the first: where a thread stands that is between the instructions of one.
    pub fn interiors(&self) -> Vec<AddrRange> {
        self.pokes.iter().map(|poke| AddrRange::new(poke.site.offset(1), poke.old.len() as u64 - 1)).collect()
    }

    /// Every store of one [`Step::Write`], in order of the addresses.
    #[inline]
    pub fn writes(&self, part: Part, version: Version) -> impl Iterator<Item = TextWrite> + '_ {
        self.pokes.iter().filter_map(move |poke| poke.write(part, version))
    }

    /// The bytes that [`Step::Verify`] must find, in order of the addresses.
    #[inline]
    pub fn expected(&self) -> impl Iterator<Item = TextWrite> + '_ {
        self.pokes.iter().map(|poke| TextWrite { at: poke.site, bytes: poke.old })
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::insn;

    fn all_steps(mut protocol: Protocol) -> Vec<Step> {
        let mut steps = Vec::new();
        loop {
            let step = protocol.next_step();
            steps.push(step);
            if matches!(step, Step::Done(_)) {
                return steps;
            }
        }
    }

    #[test]
    fn a_batch_costs_three_barriers_whatever_its_size() {
        let barriers = all_steps(Protocol::new()).into_iter().filter(|step| *step == Step::SyncCores).count();
        assert_eq!(barriers, 3);
    }

    /// Fails the commit at its `fail_at`-th step and says which step that was and what undoes it.
    fn undo_after(fail_at: usize) -> (Step, Vec<Step>) {
        let mut protocol = Protocol::new();
        let mut last = protocol.next_step();
        for _ in 0..fail_at {
            last = protocol.next_step();
        }
        protocol.failed();
        (last, all_steps(protocol))
    }

    #[test]
    fn every_failed_step_is_undone_without_a_torn_instruction() {
        assert_eq!(undo_after(0), (Verify, vec![Done(Aborted)]));
        for fail_at in [2, 3] {
            assert_eq!(undo_after(fail_at).1, UNDO_INT3, "step {fail_at}");
        }
        for fail_at in [4, 5] {
            assert_eq!(undo_after(fail_at).1, UNDO_TAIL, "step {fail_at}");
        }
        for fail_at in [6, 7] {
            assert_eq!(undo_after(fail_at).1, UNDO_HEAD, "step {fail_at}");
        }
    }

    #[test]
    fn a_batch_with_grace_waits_when_nobody_can_enter_any_more() {
        let steps = all_steps(Protocol::with_grace());
        let at = steps.iter().position(|step| *step == AwaitUnused).unwrap();
        assert_eq!(steps[at - 2..=at + 1], [Write(Int3, New), SyncCores, AwaitUnused, Write(Tail, New)]);
        let mut protocol = Protocol::with_grace();
        while protocol.next_step() != AwaitUnused {}
        protocol.failed();
        assert_eq!(all_steps(protocol), UNDO_INT3);
    }

    #[test]
    fn undoing_new_heads_waits_for_whoever_went_in_through_them() {
        let mut protocol = Protocol::with_grace();
        while protocol.next_step() != Write(Head, New) {}
        protocol.failed();
        assert_eq!(all_steps(protocol)[..4], [Write(Int3, Old), SyncCores, AwaitUnused, Write(Tail, Old)]);
    }

    #[test]
    fn a_failed_undo_leaves_the_batch_published() {
        let mut protocol = Protocol::new();
        for _ in 0..5 {
            protocol.next_step();
        }
        protocol.failed();
        protocol.next_step();
        protocol.failed();
        let steps = all_steps(protocol);
        assert_eq!(steps, [Done(Stuck)]);
        assert!(!steps.contains(&Retire), "a retired batch would leave int3s that nobody emulates");
    }

    #[test]
    fn overlapping_sites_are_refused() {
        let poke = |at| {
            let site = Addr::new(at);
            Poke::new(Mode::Bits64, site, insn::encode::nop(5), insn::encode::call(site, site, Mode::Bits64).unwrap())
                .unwrap()
        };
        let overlap = BadPoke::Overlap { first: Addr::new(0x1000), second: Addr::new(0x1004) };
        assert_eq!(PokeSet::new(vec![poke(0x1004), poke(0x1000)]).unwrap_err(), overlap);
        assert_eq!(PokeSet::new(vec![poke(0x1005), poke(0x1000)]).unwrap().pokes().len(), 2);
    }

    #[test]
    fn instructions_of_different_length_are_refused() {
        let site = Addr::new(0x1000);
        let error = Poke::new(Mode::Bits64, site, insn::encode::nop(4), insn::encode::nop(5)).unwrap_err();
        assert_eq!(error, BadPoke::Length { site, old_bytes: 4, new_bytes: 5 });
    }
}
