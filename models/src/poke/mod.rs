//! The poke protocol against CPUs that fetch stale bytes.
//!
//! Owns [`PokeModel`]: a state machine of one poker and two CPUs, in which the engine's own code makes every decision. The `poker`
//! drives the real [`Protocol`](trapline_engine::poke::Protocol) and stores the bytes of the real [`PokeSet`], one at a time and in any order; each `cpu`
//! fetches, takes traps, and asks the real [`TrapState::decide`](trapline_engine::trap::TrapState::decide) and
//! [`resume`](trapline_engine::trap::resume); `text` is the memory between them. [`scenario`] says what is poked. Upstream is
//! [`suite`](crate::suite), downstream [`explore`](crate::explore).
//!
//! Invariants checked: I1, I2, I5 and I6, and that no breakpoint of ours is taken for somebody else's. Where, says each `Violation`.

mod cpu;
mod poker;
pub mod scenario;
mod text;

use std::sync::Arc;

use cpu::{Context, Cpu, CpuAction};
use poker::{Phase, Poker, PokerAction};
use scenario::{CPUS, Content, Mutant, Scenario};
use text::{CODE, Cell, Dictionary, Fetchable, Text, site_cell, trampoline_cell};
use trapline_engine::{
    Addr, Mode,
    insn::{self, CALL_BYTES, Effect, INT3, InsnBytes},
    poke::{Poke, PokeSet},
};

use crate::explore::{Landmarks, Model, Violation};

/// What an exploration of the poke protocol came by.
pub mod landmark {
    use crate::explore::Landmarks;

    /// A CPU executed an int3.
    pub const TRAP: Landmarks = Landmarks(1);
    /// A CPU executed an int3 in a context that had interrupted another one's handler or trampoline.
    pub const NESTED_TRAP: Landmarks = Landmarks(1 << 1);
    /// A CPU executed an instruction that no longer stood in memory.
    pub const STALE: Landmarks = Landmarks(1 << 2);
    /// A handler emulated a call.
    pub const EMULATED_CALL: Landmarks = Landmarks(1 << 3);
    /// A handler emulated a nop.
    pub const EMULATED_NOP: Landmarks = Landmarks(1 << 4);
    /// A handler came too late, and the site was executed again.
    pub const REWOUND: Landmarks = Landmarks(1 << 5);
    /// A handler found no batch, then an int3, and looked again.
    pub const LOOKED_AGAIN: Landmarks = Landmarks(1 << 6);
    /// A batch was committed.
    pub const COMMITTED: Landmarks = Landmarks(1 << 7);
    /// A batch was undone.
    pub const ABORTED: Landmarks = Landmarks(1 << 8);
    /// A batch could not be undone.
    pub const STUCK: Landmarks = Landmarks(1 << 9);
    /// A trampoline was freed.
    pub const FREED: Landmarks = Landmarks(1 << 10);
    /// The trap handler was removed at the end.
    pub const LEFT: Landmarks = Landmarks(1 << 11);
    /// A CPU stood between two instructions of a site.
    pub const BETWEEN: Landmarks = Landmarks(1 << 12);
}

const SITE: [Addr; text::SITES] = [Addr::new(0x40_1000), Addr::new(0x40_1020)];
const INT3_TRAMPOLINE: Addr = Addr::new(0x40_7000);

/// Entries of trampolines A and B. The near ones give calls that differ from each other and from a nop in two bytes behind the first; the
/// far ones in all four.
fn trampoline_entry(trampoline: usize, far: bool) -> Addr {
    match (far, trampoline) {
        (false, 0) => Addr::new(0x40_8110),
        (false, _) => Addr::new(0x40_9240),
        (true, 0) => Addr::new(0x1274_8110),
        (true, _) => Addr::new(0x5396_9240),
    }
}

/// An instruction that is allowed to be executed at a site.
#[derive(Clone, Debug)]
struct Legal {
    content: Content,
    /// Where in the site it begins.
    offset: usize,
    bytes: InsnBytes,
}

/// A batch, and what it is made from.
#[derive(Debug)]
struct Batch {
    set: Arc<PokeSet>,
    /// Whether some of its sites hold several instructions.
    with_grace: bool,
    sites: Vec<usize>,
}

/// One scenario, made ready: real instructions, real batches.
#[derive(Debug)]
pub struct PokeModel {
    scenario: Scenario,
    legal: [Vec<Legal>; text::SITES],
    batches: Vec<Batch>,
    /// What stands at each site after so many batches.
    contents: Vec<Vec<Content>>,
    known_sites: Arc<Vec<Addr>>,
    dictionary: Dictionary,
}

/// Everything that decides what can happen next.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    text: Text,
    cpus: [Cpu; CPUS],
    poker: Poker,
}

/// One atomic thing that somebody does.
#[derive(Clone, Copy)]
pub enum Action {
    /// The thread that pokes.
    Poker(PokerAction),
    /// A CPU that runs the sites.
    Cpu(usize, CpuAction),
}

fn bytes_of(content: Content, site: usize, scenario: &Scenario) -> InsnBytes {
    match content.trampoline() {
        None if content == Content::Nops => InsnBytes::new(&[0x90; CALL_BYTES]),
        None => insn::encode::nop(CALL_BYTES),
        Some(trampoline) => insn::encode::call(SITE[site], trampoline_entry(trampoline, scenario.far), scenario.mode)
            .expect("trampolines are within reach"),
    }
}

/// What the handler does in place of a content. Of several nops: all of them.
fn effect_of(content: Content, site: usize, bytes: &InsnBytes, mode: Mode) -> Effect {
    if content == Content::Nops {
        return Effect::Nop { next: end_of(site) };
    }
    Effect::decode(mode, SITE[site], bytes).expect("nops and calls are emulated")
}

/// The address behind a site: the return address of a call there.
fn end_of(site: usize) -> Addr {
    SITE[site].offset(i64::try_from(CALL_BYTES).expect("a call is short"))
}

impl PokeModel {
    /// Encodes the instructions and makes the batches of a scenario.
    ///
    /// # Panics
    /// If the scenario makes no sense: more sites or contexts than there are, a batch for a site that does not exist.
    pub fn new(scenario: Scenario) -> Self {
        assert!(scenario.contexts.iter().all(|contexts| (1..=scenario::CONTEXTS).contains(contexts)));
        assert!((1..=text::SITES).contains(&scenario.sites.len()));
        let mut contents = vec![scenario.sites.clone()];
        let mut batches = Vec::new();
        for changes in &scenario.batches {
            let before = contents.last().expect("there is the first").clone();
            let mut after = before.clone();
            let mut pokes = Vec::new();
            for (site, new) in changes {
                after[*site] = *new;
                let [old_bytes, new_bytes] = [before[*site], *new].map(|content| bytes_of(content, *site, &scenario));
                let effect = effect_of(*new, *site, &new_bytes, scenario.mode);
                pokes.push(Poke::with_effect(SITE[*site], old_bytes, new_bytes, effect).expect("lengths are equal"));
            }
            batches.push(Batch {
                set: Arc::new(PokeSet::new(pokes).expect("sites do not overlap")),
                with_grace: changes.iter().any(|(site, new)| *new == Content::Nops || before[*site] == Content::Nops),
                sites: changes.iter().map(|(site, _)| *site).collect(),
            });
            contents.push(after);
        }
        let mut model = Self {
            known_sites: Arc::new(SITE[..scenario.sites.len()].to_vec()),
            legal: [const { Vec::new() }; text::SITES],
            dictionary: Dictionary::new(),
            scenario,
            batches,
            contents,
        };
        model.allow_instructions();
        model
    }

    /// Everything that ever stands at a site may be executed there, as a whole; whether it may be executed *now* is for I1 to say.
    fn allow_instructions(&mut self) {
        for site in 0..self.scenario.sites.len() {
            for state in &self.contents {
                let content = state[site];
                if self.legal[site].iter().any(|legal| legal.content == content) {
                    continue;
                }
                let bytes = bytes_of(content, site, &self.scenario);
                for (offset, byte) in bytes.iter().enumerate() {
                    self.dictionary.add(site_cell(site, offset), *byte);
                }
                if content == Content::Nops {
                    let nop = InsnBytes::new(&bytes[..1]);
                    self.legal[site].extend((0..CALL_BYTES).map(|offset| Legal { content, offset, bytes: nop }));
                } else {
                    self.legal[site].push(Legal { content, offset: 0, bytes });
                }
            }
            self.dictionary.add(site_cell(site, 0), INT3);
        }
    }

    fn mutant_is(&self, mutant: Mutant) -> bool {
        self.scenario.mutant == Some(mutant)
    }

    /// What stands at a site when no batch is under way.
    fn content(&self, state: &State, site: usize) -> Content {
        self.contents[usize::from(state.poker.committed)][site]
    }

    /// The ops that have to see a call of a site that happens entirely at this moment. While a site is being poked those are the ones attached
    /// before *and* after; if the batch is undone, the old ones again, from the end of it on.
    fn attached(&self, state: &State, site: usize) -> u8 {
        let now = self.content(state, site).ops();
        let poked = match state.poker.phase {
            Phase::Poking { .. } | Phase::Stuck => {
                self.batches[usize::from(state.poker.committed)].sites.contains(&site)
            }
            _ => false,
        };
        if poked { now & self.contents[usize::from(state.poker.committed) + 1][site].ops() } else { now }
    }

    /// Whether all bytes of all sites are what they should be once `committed` batches are done.
    fn text_is_settled(&self, state: &State) -> bool {
        (0..self.scenario.sites.len()).all(|site| {
            let bytes = bytes_of(self.content(state, site), site, &self.scenario);
            (0..CALL_BYTES).all(|offset| self.byte(state, site_cell(site, offset)) == bytes[offset])
        })
    }

    fn byte(&self, state: &State, cell: Cell) -> u8 {
        state.text.byte(&self.dictionary, cell)
    }

    fn write(&self, state: &mut State, cell: Cell, value: u8) {
        let cpus = state.cpus.iter_mut().map(|cpu| &mut cpu.fetchable);
        state.text.write(&self.dictionary, cell, value, cpus);
    }

    /// The byte of the model that lies at an address of a site.
    fn cell_at(at: Addr) -> Cell {
        let distance = |site: usize| usize::try_from(at.distance_from(SITE[site])).unwrap_or(usize::MAX);
        let site = (0..text::SITES).find(|site| distance(*site) < CALL_BYTES).expect("only sites are read and written");
        site_cell(site, distance(site))
    }
}

impl Model for PokeModel {
    type State = State;
    type Action = Action;

    fn initial(&self) -> State {
        let text = Text::initial();
        let cpu = Cpu::new(Fetchable::serialised(&text));
        let mut state = State { text, cpus: [cpu; CPUS], poker: Poker::new(self.scenario.failures) };
        for trampoline in self.scenario.sites.iter().filter_map(|content| content.trampoline()) {
            self.write(&mut state, trampoline_cell(trampoline), CODE);
        }
        for cpu in &mut state.cpus {
            cpu.fetchable = Fetchable::serialised(&state.text);
        }
        state
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.poker_actions(state, actions);
        for cpu in 0..CPUS {
            self.cpu_actions(state, cpu, actions);
        }
    }

    fn apply(&self, state: &State, action: Action) -> Result<State, Violation> {
        let mut next = *state;
        match action {
            Action::Poker(action) => self.poke(&mut next, action)?,
            Action::Cpu(cpu, action) => self.run(&mut next, cpu, action)?,
        }
        Ok(next)
    }

    /// CPUs that can do the same are interchangeable.
    fn canonical(&self, mut state: State) -> State {
        if self.scenario.contexts[0] == self.scenario.contexts[1] {
            state.cpus.sort_unstable();
        }
        state
    }

    fn landmarks(&self, before: &State, action: Action, after: &State) -> Landmarks {
        match action {
            Action::Poker(action) => Self::poker_landmarks(before, action, after),
            Action::Cpu(cpu, action) => self.cpu_landmarks(before, cpu, action, after),
        }
    }

    fn describe(&self, before: &State, action: Action) -> String {
        match action {
            Action::Poker(action) => format!("poker        {}", self.describe_poker(before, action)),
            Action::Cpu(cpu, action) => self.describe_cpu(before, cpu, action),
        }
    }
}
