//! Breadth-first exploration of every state that a model can reach.
//!
//! Owns the [`Model`] trait, [`explore`] and what comes out of it ([`Verdict`]). The models of [`poke`](crate::poke) and
//! [`slots`](crate::slots) implement the trait; [`suite`](crate::suite) judges the verdicts. States are kept whole and compared whole, not by
//! fingerprint, so that "every state" is meant literally. Invariant: states are visited in order of their distance from the initial one, so
//! the first counterexample found is one of the shortest.

use std::{
    fmt,
    hash::{BuildHasher, BuildHasherDefault, Hash, Hasher},
};

/// What a model promises. The numbers are those of the invariants that the whole project goes by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invariant {
    /// I1: ops attached before and after an update see every call during it.
    NoSkippedCall,
    /// I2: no CPU executes bytes other than the old instruction, the new one, or int3.
    NoTornInstruction,
    /// I4: the interrupted code goes on as if nothing had happened.
    Transparency,
    /// I5: a batch that fails leaves every byte as it was.
    AllOrNothing,
    /// I6: once we have left, nobody needs us any more.
    CleanLeave,
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSkippedCall => "I1 (no skipped call)",
            Self::NoTornInstruction => "I2 (no torn instruction)",
            Self::Transparency => "I4 (transparency)",
            Self::AllOrNothing => "I5 (all or nothing)",
            Self::CleanLeave => "I6 (clean leave)",
        })
    }
}

/// An invariant that does not hold, and how that shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Which one.
    pub invariant: Invariant,
    /// What happened.
    pub what: String,
}

impl Violation {
    pub(crate) fn new(invariant: Invariant, what: impl Into<String>) -> Self {
        Self { invariant, what: what.into() }
    }
}

/// A set of the noteworthy things that happened anywhere in an exploration, as bits whose meaning the model knows. Without them a model that
/// never takes a trap would hold as well.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Landmarks(pub u32);

impl Landmarks {
    pub(crate) fn contains(self, all: Self) -> bool {
        self.0 & all.0 == all.0
    }
}

impl std::ops::BitOr for Landmarks {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A system of states and actions.
pub trait Model {
    /// A state: everything that decides what can happen next.
    type State: Clone + Eq + Hash;
    /// One atomic thing that somebody does.
    type Action: Copy;

    /// Where everything begins.
    fn initial(&self) -> Self::State;

    /// Appends every action that is possible in `state`.
    fn actions(&self, state: &Self::State, actions: &mut Vec<Self::Action>);

    /// Takes an action that is possible in `state`.
    ///
    /// # Errors
    /// If the action, or the state that it leads to, breaks an invariant.
    fn apply(&self, state: &Self::State, action: Self::Action) -> Result<Self::State, Violation>;

    /// One representative of all states that behave like this one.
    fn canonical(&self, state: Self::State) -> Self::State {
        state
    }

    /// What of note an action was.
    fn landmarks(&self, before: &Self::State, action: Self::Action, after: &Self::State) -> Landmarks;

    /// An action for human readers.
    fn describe(&self, before: &Self::State, action: Self::Action) -> String;
}

/// What an exploration found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Every reachable state was visited, and all invariants hold in it.
    Holds {
        /// How many states there are.
        states: usize,
        /// How many actions between them.
        transitions: usize,
        /// What happened on the way.
        landmarks: Landmarks,
    },
    /// An invariant does not hold.
    Violated {
        /// How it shows.
        violation: Violation,
        /// The actions that lead there, from the initial state; no shorter sequence does.
        trace: Vec<String>,
        /// How many states were visited.
        states: usize,
    },
    /// There are more states than the caller has room for; nothing is known.
    Unfinished {
        /// How many were visited.
        states: usize,
    },
}

/// Visits every state of `model`, up to `max_states`.
pub fn explore<M: Model>(model: &M, max_states: usize) -> Verdict {
    let mut visited = Visited::new(model.canonical(model.initial()));
    let mut landmarks = Landmarks::default();
    let mut transitions = 0;
    let mut actions = Vec::new();
    let mut index = 0;
    while let Some(state) = visited.states.get(index).cloned() {
        actions.clear();
        model.actions(&state, &mut actions);
        transitions += actions.len();
        for action in &actions {
            let Ok(next) = model.apply(&state, *action) else {
                let (violation, trace) = retrace(model, &visited.path_to(index));
                return Verdict::Violated { violation, trace, states: visited.states.len() };
            };
            landmarks = landmarks | model.landmarks(&state, *action, &next);
            visited.insert(model.canonical(next), index);
        }
        if visited.states.len() > max_states {
            return Verdict::Unfinished { states: visited.states.len() };
        }
        index += 1;
    }
    Verdict::Holds { states: visited.states.len(), transitions, landmarks }
}

/// Repeats the way along `path`, whose last state has a violating action, on states that are *not* made canonical: so that a CPU keeps its
/// name in the trace.
fn retrace<M: Model>(model: &M, path: &[M::State]) -> (Violation, Vec<String>) {
    let mut state = model.initial();
    let mut trace = Vec::new();
    let actions_of = |state: &M::State| {
        let mut actions = Vec::new();
        model.actions(state, &mut actions);
        actions
    };
    for target in &path[1..] {
        let (action, next) = actions_of(&state)
            .into_iter()
            .find_map(|action| {
                let next = model.apply(&state, action).ok()?;
                (model.canonical(next.clone()) == *target).then_some((action, next))
            })
            .expect("states with the same canonical form behave alike");
        trace.push(model.describe(&state, action));
        state = next;
    }
    let (action, violation) = actions_of(&state)
        .into_iter()
        .find_map(|action| Some((action, model.apply(&state, action).err()?)))
        .expect("states with the same canonical form behave alike");
    trace.push(model.describe(&state, action));
    (violation, trace)
}

/// The states visited so far, in the order of their discovery, with the index of each one's predecessor.
struct Visited<S> {
    states: Vec<S>,
    predecessors: Vec<u32>,
    /// An open-addressing hash table of indices into `states`; its length is a power of two.
    table: Vec<u32>,
}

const EMPTY: u32 = u32::MAX;

impl<S: Eq + Hash + Clone> Visited<S> {
    fn new(initial: S) -> Self {
        let mut visited = Self { states: Vec::new(), predecessors: Vec::new(), table: vec![EMPTY; 1 << 12] };
        visited.insert(initial, 0);
        visited
    }

    fn insert(&mut self, state: S, predecessor: usize) {
        if 2 * self.states.len() >= self.table.len() {
            self.grow();
        }
        let place = self.place_of(&state);
        if self.table[place] == EMPTY {
            let narrow = |index: usize| u32::try_from(index).expect("memory ends before four billion states");
            self.table[place] = narrow(self.states.len());
            self.states.push(state);
            self.predecessors.push(narrow(predecessor));
        }
    }

    /// Where in the table `state` is, or would be.
    fn place_of(&self, state: &S) -> usize {
        let mask = self.table.len() - 1;
        let mut place = hash_of(state) & mask;
        while self.table[place] != EMPTY && self.states[self.table[place] as usize] != *state {
            place = (place + 1) & mask;
        }
        place
    }

    fn grow(&mut self) {
        self.table = vec![EMPTY; 2 * self.table.len()];
        for index in 0..self.states.len() {
            let place = self.place_of(&self.states[index]);
            self.table[place] = u32::try_from(index).expect("it was inserted with a narrow index");
        }
    }

    /// The states from the initial one to that with this index.
    fn path_to(&self, index: usize) -> Vec<S> {
        let predecessors =
            std::iter::successors(Some(index), |index| (*index != 0).then(|| self.predecessors[*index] as usize));
        let mut path: Vec<S> = predecessors.map(|index| self.states[index].clone()).collect();
        path.reverse();
        path
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a hash: any bits will do")]
fn hash_of(value: &impl Hash) -> usize {
    BuildHasherDefault::<Mixer>::default().hash_one(value) as usize
}

/// A fast hash for short, fixed-size states, in place of the standard library's, which resists adversaries that are not here: rotate, xor,
/// multiply for each word, and a final mix of high bits into low ones.
#[derive(Default)]
struct Mixer(u64);

impl Mixer {
    fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Hasher for Mixer {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.word(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.word(value.into());
    }

    fn write_usize(&mut self, value: usize) {
        self.word(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.word(value.cast_unsigned() as u64);
    }

    fn finish(&self) -> u64 {
        let folded = (self.0 ^ (self.0 >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        folded ^ (folded >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two counters that each go up to `top`; they must never both be there. With `symmetric` their order does not matter.
    struct Counters {
        top: u8,
        forbidden: bool,
        symmetric: bool,
    }

    impl Model for Counters {
        type State = [u8; 2];
        type Action = usize;

        fn initial(&self) -> [u8; 2] {
            [0, 0]
        }

        fn actions(&self, state: &[u8; 2], actions: &mut Vec<usize>) {
            actions.extend((0..2).filter(|counter| state[*counter] < self.top));
        }

        fn apply(&self, state: &[u8; 2], counter: usize) -> Result<[u8; 2], Violation> {
            let mut next = *state;
            next[counter] += 1;
            if self.forbidden && next == [self.top; 2] {
                return Err(Violation::new(Invariant::AllOrNothing, "both are there"));
            }
            Ok(next)
        }

        fn canonical(&self, mut state: [u8; 2]) -> [u8; 2] {
            if self.symmetric {
                state.sort_unstable();
            }
            state
        }

        fn landmarks(&self, _: &[u8; 2], counter: usize, _: &[u8; 2]) -> Landmarks {
            Landmarks(1 << counter)
        }

        fn describe(&self, before: &[u8; 2], counter: usize) -> String {
            format!("{counter} leaves {}", before[counter])
        }
    }

    fn states_of(verdict: &Verdict) -> usize {
        match verdict {
            Verdict::Holds { states, .. } | Verdict::Violated { states, .. } | Verdict::Unfinished { states } => {
                *states
            }
        }
    }

    #[test]
    fn every_state_is_visited_once() {
        let mut model = Counters { top: 99, forbidden: false, symmetric: false };
        let verdict = explore(&model, usize::MAX);
        let expected = Verdict::Holds { states: 100 * 100, transitions: 2 * 99 * 100, landmarks: Landmarks(3) };
        assert_eq!(verdict, expected);
        model.symmetric = true;
        assert_eq!(states_of(&explore(&model, usize::MAX)), 100 * 101 / 2);
    }

    #[test]
    fn a_violation_comes_with_a_shortest_trace_in_which_everybody_keeps_its_name() {
        for symmetric in [false, true] {
            let model = Counters { top: 2, forbidden: true, symmetric };
            let Verdict::Violated { violation, trace, .. } = explore(&model, usize::MAX) else { panic!("not found") };
            assert_eq!(violation.invariant, Invariant::AllOrNothing);
            assert_eq!(trace.len(), 4);
            for step in ["0 leaves 0", "0 leaves 1", "1 leaves 0", "1 leaves 1"] {
                assert!(trace.iter().any(|line| line == step), "{trace:?}");
            }
        }
    }

    #[test]
    fn too_many_states_are_no_proof() {
        let model = Counters { top: 99, forbidden: true, symmetric: false };
        assert!(matches!(explore(&model, 1000), Verdict::Unfinished { .. }));
    }
}
