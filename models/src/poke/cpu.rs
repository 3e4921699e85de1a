//! The CPUs: they run the sites, trap, and are interrupted.
//!
//! Owns [`Cpu`], its nested [`Context`]s, and their steps. Each context calls the sites again and again. Calling one is a fetch, of bytes that
//! the CPU may hold since long ([`Fetchable`]); what comes of it is an instruction, or an int3 and the handler: the handler looks, decides, and
//! resumes, and anything may happen before, between and after. At any step another context may interrupt, which does the same. All decisions
//! are the engine's: [`TrapState::decide`] and [`resume`] run here as they do in a trap handler, on a [`TrapState`] that is brought to what it
//! would hold at this moment. Invariant: only the innermost context of a CPU takes steps.
//!
//! `decide` reads shared state four times: the generation, the batch, the byte at the site, the generation again. The poker may act between the
//! second and the third ([`Context::Looking`] is that moment). Elsewhere it cannot change the outcome for the worse: a generation that is older than the
//! batch only makes the handler look again, and an int3 that is read was written after its batch was counted.

use std::{cell::Cell as Shared, sync::Arc};

use trapline_engine::{
    Addr, ThreadState,
    insn::{CALL_BYTES, Effect, INT3, InsnBytes},
    trap::{self, Decision, Resumed, TrapFrame, TrapState},
};

use super::{
    Action, Content, Fetchable, INT3_TRAMPOLINE, PokeModel, SITE, State, effect_of, end_of, landmark,
    poker::finish_barrier,
    scenario::{CONTEXTS, Machine, Mutant, ops_of},
    site_cell,
    text::{CODE, TRAMPOLINES, trampoline_cell},
    trampoline_entry,
};
use crate::explore::{Invariant, Landmarks, Violation};

/// What a context of a CPU is at. `must_see` is the set of ops that have to see the call that is under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Context {
    /// It does not exist.
    Absent,
    /// Between two calls.
    Running,
    /// Between two instructions of a site that holds several.
    Between { site: u8, offset: u8 },
    /// It executed an int3; its handler has not looked yet.
    Trapped { site: u8, must_see: u8 },
    /// Its handler found no batch, that being so when `published` batches had been published and the last was `live`, or not.
    Looking { site: u8, must_see: u8, published: u8, live: bool },
    /// Its handler is about to resume it as if this had been at the site.
    Emulating { site: u8, must_see: u8, content: Content },
    /// It is bound for a trampoline, or inside it: from its call on, or from the handler's return, until it is back.
    Inside { trampoline: u8 },
}

impl Context {
    /// Whether it has executed an int3 and not returned from the handler.
    pub(super) fn is_in_handler(self) -> bool {
        matches!(self, Self::Trapped { .. } | Self::Looking { .. } | Self::Emulating { .. })
    }

    /// Whether it is going to execute this trampoline, or does.
    pub(super) fn is_bound_for(self, trampoline: usize) -> bool {
        match self {
            Self::Inside { trampoline: inside } => usize::from(inside) == trampoline,
            Self::Emulating { content, .. } => content.trampoline() == Some(trampoline),
            _ => false,
        }
    }

    /// Ops other than `attached` no longer have to see a call of `site` that is under way.
    pub(super) fn expect_less(&mut self, site: usize, attached: u8) {
        if let Self::Trapped { site: at, must_see }
        | Self::Looking { site: at, must_see, .. }
        | Self::Emulating { site: at, must_see, .. } = self
            && usize::from(*at) == site
        {
            *must_see &= attached;
        }
    }
}

/// A CPU. Ordered, so that interchangeable ones can be sorted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Cpu {
    /// What it may fetch.
    pub(super) fetchable: Fetchable,
    /// From normal to innermost.
    pub(super) contexts: [Context; CONTEXTS],
    /// It has yet to serialise for the barrier that is under way.
    pub(super) owes_barrier: bool,
}

impl Cpu {
    pub(super) fn new(fetchable: Fetchable) -> Self {
        let mut contexts = [Context::Absent; CONTEXTS];
        contexts[0] = Context::Running;
        Self { fetchable, contexts, owes_barrier: false }
    }

    /// The index of the innermost context.
    fn innermost(&self) -> usize {
        self.contexts.iter().rposition(|context| *context != Context::Absent).expect("normal context never ends")
    }
}

/// What a CPU does next.
#[derive(Clone, Copy)]
pub enum CpuAction {
    /// Fetches these bytes from a site, or from where it stands inside one, and executes them.
    Execute {
        /// The site.
        site: usize,
        /// How far inside.
        offset: usize,
        /// The bytes.
        bytes: InsnBytes,
    },
    /// Its handler takes its next step.
    Handle,
    /// It leaves the trampoline, having called the ops.
    LeaveTrampoline,
    /// Another context interrupts it.
    Interrupt,
    /// The interrupting context returns.
    EndInterrupt,
    /// It executes a serialising instruction for the barrier that is under way.
    Acknowledge,
}

/// What one step of the handler comes to.
enum Handled {
    /// It has to read the byte at the site.
    Looks,
    /// It is through.
    Decided(Decision),
}

impl PokeModel {
    pub(super) fn cpu_actions(&self, state: &State, cpu: usize, actions: &mut Vec<Action>) {
        let Cpu { contexts, owes_barrier, .. } = &state.cpus[cpu];
        let innermost = state.cpus[cpu].innermost();
        let add = |action, actions: &mut Vec<Action>| actions.push(Action::Cpu(cpu, action));
        match contexts[innermost] {
            Context::Absent => {}
            Context::Running => {
                for site in 0..self.scenario.sites.len() {
                    self.fetches(state, cpu, site, 0, actions);
                }
                if innermost > 0 {
                    add(CpuAction::EndInterrupt, actions);
                }
            }
            Context::Between { site, offset } => {
                self.fetches(state, cpu, usize::from(site), usize::from(offset), actions);
            }
            Context::Trapped { .. } | Context::Looking { .. } | Context::Emulating { .. } => {
                add(CpuAction::Handle, actions);
            }
            Context::Inside { .. } => add(CpuAction::LeaveTrampoline, actions),
        }
        if innermost + 1 < self.scenario.contexts[cpu] {
            add(CpuAction::Interrupt, actions);
        }
        let interrupts_are_off =
            self.scenario.machine == Machine::Kernel && contexts.iter().any(|context| context.is_in_handler());
        if *owes_barrier && !interrupts_are_off {
            add(CpuAction::Acknowledge, actions);
        }
    }

    /// Everything that a CPU may fetch at a place of a site: as many bytes as the instruction has that begins with the first one.
    fn fetches(&self, state: &State, cpu: usize, site: usize, offset: usize, actions: &mut Vec<Action>) {
        let values = |offset| state.cpus[cpu].fetchable.values(&self.dictionary, site_cell(site, offset));
        let mut add = |bytes: &[u8]| {
            let bytes = InsnBytes::new(bytes);
            actions.push(Action::Cpu(cpu, CpuAction::Execute { site, offset, bytes }));
        };
        for first in values(offset) {
            let legal = self.legal[site].iter().find(|legal| legal.offset == offset && legal.bytes[0] == first);
            let len = legal.map_or(1, |legal| legal.bytes.len());
            let mut fetched = vec![vec![first]];
            for behind in 1..len {
                fetched = fetched
                    .into_iter()
                    .flat_map(|bytes| values(offset + behind).map(move |next| [&bytes[..], &[next]].concat()))
                    .collect();
            }
            for bytes in fetched {
                add(&bytes);
            }
        }
    }

    pub(super) fn run(&self, state: &mut State, cpu: usize, action: CpuAction) -> Result<(), Violation> {
        let innermost = state.cpus[cpu].innermost();
        let context = state.cpus[cpu].contexts[innermost];
        let next = match action {
            CpuAction::Execute { site, offset, bytes } => self.execute(state, cpu, site, offset, &bytes)?,
            CpuAction::Handle => self.handle(state, cpu, context)?,
            CpuAction::LeaveTrampoline => Context::Running,
            CpuAction::Interrupt => {
                state.cpus[cpu].contexts[innermost + 1] = Context::Running;
                return Ok(());
            }
            CpuAction::EndInterrupt => Context::Absent,
            CpuAction::Acknowledge => {
                serialise(state, cpu);
                state.cpus[cpu].owes_barrier = false;
                finish_barrier(state);
                return Ok(());
            }
        };
        state.cpus[cpu].contexts[innermost] = next;
        Ok(())
    }

    fn execute(
        &self,
        state: &mut State,
        cpu: usize,
        site: usize,
        offset: usize,
        bytes: &InsnBytes,
    ) -> Result<Context, Violation> {
        let must_see = self.attached(state, site);
        let site_number = u8::try_from(site).expect("there are two sites");
        if offset == 0 && bytes[0] == INT3 {
            if state.poker.has_left() {
                let what = "an int3 is met after the handler was removed: the process is killed";
                return Err(Violation::new(Invariant::CleanLeave, what));
            }
            return Ok(Context::Trapped { site: site_number, must_see });
        }
        let Some(legal) = self.legal[site].iter().find(|legal| legal.offset == offset && legal.bytes == *bytes) else {
            let what = format!("{bytes} at byte {offset} of site {site} is no instruction that ever stood there");
            return Err(Violation::new(Invariant::NoTornInstruction, what));
        };
        let content = legal.content;
        if offset == 0 {
            check_seen(site, must_see, content.ops())?;
        }
        match content.trampoline() {
            Some(trampoline) => self.enter(state, cpu, trampoline),
            None if content == Content::Nops && offset + 1 < CALL_BYTES => {
                let offset = u8::try_from(offset + 1).expect("a site has five bytes");
                Ok(Context::Between { site: site_number, offset })
            }
            None => Ok(Context::Running),
        }
    }

    /// Goes to a trampoline, whose code is fetched like any other.
    fn enter(&self, state: &State, cpu: usize, trampoline: usize) -> Result<Context, Violation> {
        let mut code = state.cpus[cpu].fetchable.values(&self.dictionary, trampoline_cell(trampoline));
        if code.any(|value| value != CODE) {
            let what = "a CPU enters a trampoline whose code is not there";
            return Err(Violation::new(Invariant::NoSkippedCall, what));
        }
        Ok(Context::Inside { trampoline: u8::try_from(trampoline).expect("there are two") })
    }

    /// One step of the trap handler.
    fn handle(&self, state: &mut State, cpu: usize, context: Context) -> Result<Context, Violation> {
        let (site, must_see, seen) = match context {
            Context::Trapped { site, must_see } => (site, must_see, None),
            Context::Looking { site, must_see, published, live } => (site, must_see, Some((published, live))),
            Context::Emulating { site, must_see, content } => {
                return self.emulate(state, cpu, usize::from(site), must_see, content);
            }
            _ => return Ok(context),
        };
        match self.decide(state, usize::from(site), seen) {
            Handled::Looks => {
                let (published, live) = (state.poker.published, state.poker.live);
                Ok(Context::Looking { site, must_see, published, live })
            }
            Handled::Decided(Decision::Emulate(effect)) => {
                Ok(Context::Emulating { site, must_see, content: self.content_with(usize::from(site), effect)? })
            }
            Handled::Decided(Decision::Rewind(at)) => {
                if at != SITE[usize::from(site)] {
                    let what = format!("the handler resumes at {at}, which is not the site");
                    return Err(Violation::new(Invariant::Transparency, what));
                }
                self.return_from_trap(state, cpu);
                Ok(Context::Running)
            }
            Handled::Decided(Decision::Foreign) => {
                let what = "the handler takes our int3 for somebody else's: the process is killed";
                Err(Violation::new(Invariant::Transparency, what))
            }
        }
    }

    /// Runs the engine's decision on what shared state holds. If `seen`, the first part of it ran when that was published, and what has happened
    /// since happens where the text is read.
    fn decide(&self, state: &State, site: usize, seen: Option<(u8, bool)>) -> Handled {
        let now = (state.poker.published, state.poker.live);
        let trap = TrapState::new();
        if self.scenario.machine == Machine::Process && !self.mutant_is(Mutant::SitesUnknown) {
            trap.know_sites(self.known_sites.clone(), || ());
        }
        let then = seen.unwrap_or(now);
        self.advance(&trap, (0, false), then);
        let (reads, looks) = (Shared::new(0), Shared::new(false));
        let decision = trap.decide(
            SITE[site].offset(1),
            |at| {
                reads.set(reads.get() + 1);
                if seen.is_some() && reads.get() == 1 {
                    self.advance(&trap, then, now);
                    return self.byte(state, Self::cell_at(at));
                }
                // What follows belongs to a later step: leave by any way, and forget the decision.
                looks.set(true);
                !INT3
            },
            |effect| effect,
        );
        if looks.get() { Handled::Looks } else { Handled::Decided(decision) }
    }

    /// Publishes and retires batches as the poker did on its way from one moment to another.
    fn advance(&self, trap: &TrapState, from: (u8, bool), to: (u8, bool)) {
        for batch in from.0..to.0 {
            trap.publish(Arc::clone(&self.batches[usize::from(batch)].set), || ());
        }
        if !to.1 {
            trap.retire(|| ());
        }
    }

    fn content_with(&self, site: usize, effect: Effect) -> Result<Content, Violation> {
        let is_it = |content: &Content| {
            let bytes = super::bytes_of(*content, site, &self.scenario);
            effect_of(*content, site, &bytes, self.scenario.mode) == effect
        };
        let content = Content::ALL.iter().find(|content| is_it(content)).copied();
        content.ok_or_else(|| {
            Violation::new(Invariant::Transparency, format!("the handler emulates {effect:?}, which no batch contains"))
        })
    }

    /// Runs the engine's resumption, and follows the context to where it comes out.
    fn emulate(
        &self,
        state: &mut State,
        cpu: usize,
        site: usize,
        must_see: u8,
        content: Content,
    ) -> Result<Context, Violation> {
        let bytes = super::bytes_of(content, site, &self.scenario);
        let effect = effect_of(content, site, &bytes, self.scenario.mode);
        let mut frame = Frame { ip: SITE[site].offset(1), ..Frame::default() };
        let slots = ThreadState::<1>::default();
        let resumed = trap::resume(&mut frame, effect, self.scenario.resume, &slots, 1, INT3_TRAMPOLINE);
        // What the int3 trampoline does with a slot is the other model's subject.
        let (ip, return_to) = match (resumed, slots.snapshot().slots[0]) {
            (Resumed::Slot(0), (return_to, target)) if frame.ip == INT3_TRAMPOLINE => {
                (Addr::new(target as u64), Some(Addr::new(return_to as u64)))
            }
            _ => (frame.ip, frame.pushed),
        };
        let entered = (0..TRAMPOLINES).find(|trampoline| ip == trampoline_entry(*trampoline, self.scenario.far));
        self.return_from_trap(state, cpu);
        match (entered, return_to) {
            (Some(trampoline), Some(return_to)) if return_to == end_of(site) => {
                check_seen(site, must_see, ops_of(trampoline))?;
                self.enter(state, cpu, trampoline)
            }
            (None, None) if ip == end_of(site) => {
                check_seen(site, must_see, 0)?;
                Ok(Context::Running)
            }
            _ => {
                let what = format!("after the trap the context goes on at {ip}, returning to {return_to:?}");
                Err(Violation::new(Invariant::Transparency, what))
            }
        }
    }

    /// IRET serialises: in a kernel it ends the handler, in a process the kernel ends sigreturn with it.
    fn return_from_trap(&self, state: &mut State, cpu: usize) {
        if !self.mutant_is(Mutant::TrapsDoNotSerialise) {
            serialise(state, cpu);
        }
    }

    pub(super) fn cpu_landmarks(&self, before: &State, cpu: usize, action: CpuAction, after: &State) -> Landmarks {
        let innermost = before.cpus[cpu].innermost();
        let (was, is) = (before.cpus[cpu].contexts[innermost], after.cpus[cpu].contexts[innermost]);
        match action {
            CpuAction::Execute { bytes, .. } if bytes[0] == INT3 => {
                let outside = &before.cpus[cpu].contexts[..innermost];
                let nested = outside.iter().any(|context| *context != Context::Running);
                landmark::TRAP | if nested { landmark::NESTED_TRAP } else { Landmarks::default() }
            }
            CpuAction::Execute { site, offset, bytes } => {
                let present = |behind: usize| self.byte(before, site_cell(site, offset + behind));
                let stale = bytes.iter().enumerate().any(|(behind, byte)| *byte != present(behind));
                let between = matches!(is, Context::Between { .. });
                (if stale { landmark::STALE } else { Landmarks::default() })
                    | if between { landmark::BETWEEN } else { Landmarks::default() }
            }
            CpuAction::Handle => match (was, is) {
                (_, Context::Inside { .. }) => landmark::EMULATED_CALL,
                (Context::Emulating { .. }, Context::Running) => landmark::EMULATED_NOP,
                (_, Context::Running) => landmark::REWOUND,
                (Context::Looking { .. }, Context::Looking { .. } | Context::Emulating { .. }) => {
                    landmark::LOOKED_AGAIN
                }
                _ => Landmarks::default(),
            },
            _ => Landmarks::default(),
        }
    }

    pub(super) fn describe_cpu(&self, before: &State, cpu: usize, action: CpuAction) -> String {
        let innermost = before.cpus[cpu].innermost();
        let context = match (innermost, self.scenario.machine) {
            (0, _) => "      ",
            (1, Machine::Process) => "signal",
            (_, Machine::Process) => "nested",
            (1, Machine::Kernel) => "irq   ",
            (_, Machine::Kernel) => "nmi   ",
        };
        format!("cpu {cpu} {context} {}", self.describe_action(before, cpu, innermost, action))
    }

    fn describe_action(&self, before: &State, cpu: usize, innermost: usize, action: CpuAction) -> String {
        match action {
            CpuAction::Execute { bytes, site, offset: 0 } if bytes[0] == INT3 => {
                let stale = if self.byte(before, site_cell(site, 0)) == INT3 { "" } else { ", which is stale" };
                format!("calls site {site}, fetches int3{stale}: trap")
            }
            CpuAction::Execute { site, offset, bytes } => {
                let legal = self.legal[site].iter().find(|legal| legal.offset == offset && legal.bytes == bytes);
                let name = match legal.map(|legal| legal.content) {
                    Some(Content::Nops) => "a nop of several".to_string(),
                    Some(content) => content.to_string(),
                    None => "nothing known".to_string(),
                };
                let from = if offset == 0 { "calls site".into() } else { format!("goes on at byte {offset} of site") };
                format!("{from} {site}, fetches {bytes}: {name}")
            }
            CpuAction::Handle => self.describe_handler(before, before.cpus[cpu].contexts[innermost]),
            CpuAction::LeaveTrampoline => "returns from the trampoline".into(),
            CpuAction::Interrupt => "is interrupted".into(),
            CpuAction::EndInterrupt => "returns from the interruption".into(),
            CpuAction::Acknowledge => "serialises for the barrier".into(),
        }
    }

    fn describe_handler(&self, before: &State, context: Context) -> String {
        let (site, seen) = match context {
            Context::Trapped { site, .. } => (site, None),
            Context::Looking { site, published, live, .. } => (site, Some((published, live))),
            Context::Emulating { content, .. } => return format!("handler emulates {content}, returns"),
            _ => return String::new(),
        };
        match self.decide(before, usize::from(site), seen) {
            Handled::Looks => "handler finds no batch for the site".into(),
            Handled::Decided(Decision::Emulate(_)) => "handler finds the batch".into(),
            Handled::Decided(Decision::Rewind(_)) => "handler finds the site whole: executes it again".into(),
            Handled::Decided(Decision::Foreign) => "handler finds no batch, and no int3 that it knows".into(),
        }
    }
}

/// I1, where a call is over or its way certain: those who had to see it do.
fn check_seen(site: usize, must_see: u8, seen: u8) -> Result<(), Violation> {
    let missing = match must_see & !seen {
        0 => return Ok(()),
        0b01 => "X",
        0b10 => "Y",
        _ => "X and Y",
    };
    let what = format!("a call of site {site} is not seen by ops {missing}, attached all the while");
    Err(Violation::new(Invariant::NoSkippedCall, what))
}

/// The CPU executes a serialising instruction.
fn serialise(state: &mut State, cpu: usize) {
    state.cpus[cpu].fetchable = Fetchable::serialised(&state.text);
}

/// The interrupted context, as far as resuming it is concerned.
#[derive(Default)]
struct Frame {
    ip: Addr,
    pushed: Option<Addr>,
}

impl TrapFrame for Frame {
    fn sp(&self) -> Addr {
        Addr::default()
    }
    fn set_sp(&mut self, _: Addr) {}
    fn set_ip(&mut self, ip: Addr) {
        self.ip = ip;
    }
    fn flags(&self) -> u64 {
        0
    }
    fn set_r11(&mut self, _: Addr) {}
    fn top_of_stack(&self) -> Addr {
        Addr::default()
    }
    fn push(&mut self, word: Addr) {
        self.pushed = Some(word);
    }
    fn word_bytes(&self) -> i64 {
        8
    }
}
