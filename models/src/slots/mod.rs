//! The slot stack against contexts that interrupt each other at every instruction.
//!
//! Owns [`SlotModel`]: one thread with contexts nested to the capacity of its slots and beyond. Every `context` calls a traced function, traps,
//! and is resumed: the `handler` takes its steps with the real [`ThreadState`](trapline_engine::ThreadState), and the real bytes of
//! [`int3_trampoline`] (`code`) are executed one by one (`trampoline`). Between any two steps the next context may interrupt. Upstream is
//! [`suite`](crate::suite), downstream [`explore`](crate::explore).
//!
//! What an interruption does to the interrupted context is what hardware and kernel promise: its registers come back, and everything below its
//! stack pointer is lost, except a red zone where there is one (x86-64 psABI, section 3.2.2). The trap's own frame lies there as well; in a
//! 32-bit process its last word is `FP_XSTATE_MAGIC2`, right below the interrupted stack pointer.
//!
//! Invariant checked, for each context: it arrives at its target with its own return address on top of its stack, all registers and flags as
//! they were at the site, the words above untouched, and the thread's depth as it found it (I1, I4).

mod code;
mod context;
mod handler;
mod trampoline;

use std::fmt;

use code::Op;
use context::{At, Context, Thread, site};
use trapline_engine::{
    Addr, Mode,
    slots::ThreadLayout,
    trampoline::{Machine, Segment, ThreadBase, VectorSave, int3_trampoline},
    trap::Resume,
};

use crate::explore::{Landmarks, Model, Violation};

/// Slots of the modelled thread, of which a setting may use fewer.
const SLOTS: usize = 4;
/// How many contexts can be nested.
pub const CONTEXTS: usize = 5;

/// What an exploration of the slots came by.
pub mod landmark {
    use crate::explore::Landmarks;

    /// A context was interrupted inside its trap handler.
    pub const HANDLER_INTERRUPTED: Landmarks = Landmarks(1);
    /// A context was interrupted inside the int3 trampoline.
    pub const TRAMPOLINE_INTERRUPTED: Landmarks = Landmarks(1 << 1);
    /// All slots that may be used were in use.
    pub const FULL: Landmarks = Landmarks(1 << 2);
    /// A context found no slot, and its return address was pushed.
    pub const OVERFLOW: Landmarks = Landmarks(1 << 3);
    /// The outermost context came to its end.
    pub const FINISHED: Landmarks = Landmarks(1 << 4);
}

/// A change to the trap handler or to the int3 trampoline, each of which breaks an invariant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// The trampoline releases the slot before it reads it.
    ReleaseBeforeRead,
    /// The trampoline stores below the stack pointer, and makes room afterwards.
    RoomAfterUse,
    /// The trampoline restores its two registers in the wrong order.
    PopsExchanged,
    /// The trampoline does its arithmetic with an instruction that writes flags.
    RoomBySubtraction,
    /// The handler fills the slot before it reserves it.
    FillBeforeReserve,
    /// The handler does not look whether a slot is left, and uses the last one again.
    NoLimit,
    /// The handler pushes to the interrupted stack where its own frame lies.
    PushThroughFrame,
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReleaseBeforeRead => "slot released before it is read",
            Self::RoomAfterUse => "room on the stack made after it is used",
            Self::PopsExchanged => "registers restored in the wrong order",
            Self::RoomBySubtraction => "room made by an instruction that writes flags",
            Self::FillBeforeReserve => "slot filled before it is reserved",
            Self::NoLimit => "last slot used again when none is left",
            Self::PushThroughFrame => "return address pushed through the trap's own frame",
        })
    }
}

/// A setting to explore.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The target's width.
    pub mode: Mode,
    /// Bytes below the stack pointer that an interruption leaves alone.
    pub red_zone_bytes: u32,
    /// How many contexts nest, at most [`CONTEXTS`].
    pub contexts: usize,
    /// How many slots may be used.
    pub slots: usize,
    /// How emulated calls are resumed: `Slots` or `Push`.
    pub resume: Resume,
    /// What is broken.
    pub mutant: Option<Mutant>,
}

impl Setting {
    /// A 64-bit process.
    pub const PROCESS_64: Self =
        Self { mode: Mode::Bits64, red_zone_bytes: 128, contexts: 3, slots: 2, resume: Resume::Slots, mutant: None };
    /// A 32-bit process, which has no red zone.
    pub const PROCESS_32: Self = Self { mode: Mode::Bits32, red_zone_bytes: 0, ..Self::PROCESS_64 };
    /// A 64-bit kernel, which has none either.
    pub const KERNEL_64: Self = Self { red_zone_bytes: 0, ..Self::PROCESS_64 };

    /// The same with so many contexts, and so many slots for them.
    #[must_use]
    pub const fn nested(self, contexts: usize, slots: usize) -> Self {
        Self { contexts, slots, ..self }
    }

    /// The same, broken.
    #[must_use]
    pub const fn mutant(self, mutant: Mutant) -> Self {
        Self { mutant: Some(mutant), ..self }
    }

    /// The same with another way to resume emulated calls.
    #[must_use]
    pub const fn resume(self, resume: Resume) -> Self {
        Self { resume, ..self }
    }

    fn layout(&self) -> ThreadLayout {
        ThreadLayout::new(self.mode)
    }

    fn word(&self) -> u32 {
        self.mode.word_bytes()
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let red_zone = if self.red_zone_bytes > 0 { "red zone" } else { "no red zone" };
        let way = if self.resume == Resume::Slots { "slots" } else { "push" };
        write!(
            f,
            "{} bit, {red_zone}, {way}: {} contexts, slots for {}",
            self.mode.bitness(),
            self.contexts,
            self.slots
        )
    }
}

/// One setting, made ready.
#[derive(Debug)]
pub struct SlotModel {
    setting: Setting,
    ops: Vec<Op>,
}

/// Where the thread's state lies, from its segment's base: below it, as thread-local storage does.
const THREAD_OFFSET: i64 = -0x200;
const INT3_TRAMPOLINE: u32 = 0x00c0_0000;

/// Everything that decides what can happen next.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    contexts: [Context; CONTEXTS],
    thread: Thread,
}

impl State {
    fn innermost(&self) -> usize {
        self.contexts.iter().rposition(|context| context.at != At::Absent).expect("the outermost context stays")
    }
}

/// One atomic thing that happens to the thread.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The innermost context takes its next step.
    Step,
    /// It is interrupted.
    Interrupt,
}

impl SlotModel {
    /// Emits and reads the trampoline of a setting.
    ///
    /// # Panics
    /// If there are more contexts or slots than there is room for, or the trampoline contains an instruction that the model does not know.
    pub fn new(setting: Setting) -> Self {
        assert!((1..=CONTEXTS).contains(&setting.contexts) && (1..=SLOTS).contains(&setting.slots));
        let segment = match setting.mode {
            Mode::Bits32 => Segment::Gs,
            Mode::Bits64 => Segment::Fs,
        };
        let thread = ThreadBase { segment, pointer: None, offset: THREAD_OFFSET };
        let machine = Machine { mode: setting.mode, thread, vectors: VectorSave::Never };
        let bytes = int3_trampoline(&machine, Addr::new(INT3_TRAMPOLINE.into())).expect("it can be encoded");
        let ops = code::decode(setting.mode, &bytes);
        let ops = match setting.mutant {
            Some(mutant) => code::mutate(ops, mutant, setting.mode),
            None => ops,
        };
        Self { setting, ops }
    }

    fn step(&self, state: &mut State) -> Result<(), Violation> {
        let index = state.innermost();
        match state.contexts[index].at {
            At::Site => {
                let depth_bytes = state.thread.depth_bytes;
                state.contexts[index].trap(&self.setting, depth_bytes);
                Ok(())
            }
            at if at.is_handler() => self.handle(state, index),
            At::Trampoline { op } => self.execute(state, index, usize::from(op)),
            At::Arrived => {
                state.contexts[index].return_from_target(&self.setting);
                Ok(())
            }
            _ => {
                // Back behind its site, an interrupting context ends.
                state.contexts[index] = Context::ABSENT;
                Ok(())
            }
        }
    }
}

impl SlotModel {
    fn describe_first_step(&self, before: &State) -> String {
        let free = before.thread.depth(self.setting.layout()).filter(|depth| *depth < self.setting.slots);
        match (self.setting.resume, free, self.setting.mutant) {
            (Resume::Slots, Some(slot), Some(Mutant::FillBeforeReserve)) => format!("handler fills slot {slot}"),
            (Resume::Slots, Some(slot), _) => format!("handler reserves slot {slot}"),
            (Resume::Slots, None, Some(Mutant::NoLimit)) => format!("handler fills slot {}", self.setting.slots - 1),
            (Resume::Slots, None, _) => "handler finds no slot, and pushes the return address".into(),
            _ => "handler pushes the return address".into(),
        }
    }
}

impl Model for SlotModel {
    type State = State;
    type Action = Action;

    fn initial(&self) -> State {
        let mut contexts = [Context::ABSENT; CONTEXTS];
        contexts[0] = Context::new(0);
        State { contexts, thread: Thread::default() }
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let innermost = state.innermost();
        if innermost > 0 || state.contexts[0].at != At::Back {
            actions.push(Action::Step);
        }
        if innermost + 1 < self.setting.contexts {
            actions.push(Action::Interrupt);
        }
    }

    fn apply(&self, state: &State, action: Action) -> Result<State, Violation> {
        let mut next = *state;
        match action {
            Action::Step => self.step(&mut next)?,
            Action::Interrupt => {
                let innermost = next.innermost();
                next.contexts[innermost].lose_words_below(&self.setting);
                next.contexts[innermost + 1] = Context::new(innermost + 1);
            }
        }
        Ok(next)
    }

    fn landmarks(&self, before: &State, action: Action, after: &State) -> Landmarks {
        let innermost = before.innermost();
        let mut seen = match (action, before.contexts[innermost].at) {
            (Action::Interrupt, at) if at.is_handler() => landmark::HANDLER_INTERRUPTED,
            (Action::Interrupt, At::Trampoline { .. }) => landmark::TRAMPOLINE_INTERRUPTED,
            (Action::Step, At::Arrived) if innermost == 0 => landmark::FINISHED,
            _ => Landmarks::default(),
        };
        if after.thread.depth(self.setting.layout()) == Some(self.setting.slots) {
            seen = seen | landmark::FULL;
        }
        if self.setting.resume == Resume::Slots && matches!(after.contexts[innermost].at, At::Pushed { .. }) {
            seen = seen | landmark::OVERFLOW;
        }
        seen
    }

    fn describe(&self, before: &State, action: Action) -> String {
        let innermost = before.innermost();
        let what = match (action, before.contexts[innermost].at) {
            (Action::Interrupt, _) => format!("is interrupted by context {}", innermost + 1),
            (Action::Step, At::Absent) => String::new(),
            (Action::Step, At::Site) => format!("calls the site at {:#x}: trap", site(innermost)),
            (Action::Step, At::Handler) => self.describe_first_step(before),
            (Action::Step, At::Reserved { slot }) => format!("handler fills slot {slot}"),
            (Action::Step, At::FilledFirst) => "handler reserves the slot".into(),
            (Action::Step, At::Filled) => "handler returns to the int3 trampoline".into(),
            (Action::Step, At::Pushed { .. }) => "handler returns to the call's target".into(),
            (Action::Step, At::Trampoline { op }) => format!("trampoline: {}", self.ops[usize::from(op)]),
            (Action::Step, At::Arrived) => "returns from the call".into(),
            (Action::Step, At::Back) => "ends".into(),
        };
        format!("context {innermost}  {what}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explore::{Verdict, explore};

    const SETTINGS: [Setting; 3] = [Setting::PROCESS_64, Setting::PROCESS_32, Setting::KERNEL_64];

    fn holds(setting: Setting) -> bool {
        matches!(explore(&SlotModel::new(setting), usize::MAX), Verdict::Holds { .. })
    }

    #[test]
    fn the_real_trampoline_is_read_whole() {
        for setting in SETTINGS {
            let model = SlotModel::new(setting);
            assert_eq!(model.ops.len(), 13, "{setting}");
            assert_eq!(model.ops.last(), Some(&Op::Ret));
            assert_eq!(model.ops.iter().filter(|op| matches!(op, Op::Load { .. })).count(), 3);
        }
    }

    #[test]
    #[should_panic(expected = "the model has to learn")]
    fn an_instruction_that_the_model_does_not_know_is_refused() {
        // mov rbx, rax
        code::decode(Mode::Bits64, &[0x48, 0x89, 0xc3]);
    }

    /// Otherwise their traces would show that they are wrong, and not that an interruption is what they are wrong about.
    #[test]
    fn mutants_of_the_order_are_right_until_something_interrupts() {
        for mutant in [Mutant::ReleaseBeforeRead, Mutant::RoomAfterUse, Mutant::FillBeforeReserve] {
            for setting in SETTINGS {
                assert!(holds(setting.nested(1, 1).mutant(mutant)), "{setting}: {mutant}");
            }
        }
        assert!(!holds(Setting::PROCESS_64.nested(1, 1).mutant(Mutant::PopsExchanged)));
    }
}
