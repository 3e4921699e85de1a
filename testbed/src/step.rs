//! Interruptions at chosen instructions: each boundary of the int3 trampoline, in each context, in every combination.
//!
//! Owns the scenario `step` ([`run`]). Random interrupts hit a trampoline of a dozen instructions rarely, and all contexts in theirs at once hardly ever. So
//! the breakpoint's handler sets the trap flag, [`trap`] counts instructions in the debug exception, and at the chosen boundary the next context interrupts: a
//! timer interrupt that the CPU sends to itself in normal context and in a softirq, an NMI in an interrupt. Each of them calls a traced function, meets the
//! breakpoint of its own function, and is interrupted in turn: normal, softirq, interrupt and NMI are pending at once, each at a boundary of its own. Functions
//! differ, so that no slot can stand for another one.
//!
//! Two sweeps, numbered by [`NEXT`]: first all triples of boundaries of the int3 trampoline; then one boundary after the other of all that runs from the
//! breakpoint to the function's body, by an interrupt and by an NMI. The poking CPU holds the int3 until they are through. An interrupt of somebody else's, or
//! a thread that is preempted, spoils a number: both sweeps are gone through again until nothing is missing, [`ROUNDS`] times at most. Invariant: what is
//! reported is where the interrupted contexts *were*, by their frames, and not where they were meant to be.

use alloc::format;
use core::{
    arch::naked_asm,
    sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
};

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use trapline_engine::{Filter, Mode, OpsFlags, slots::ThreadLayout};

use crate::{
    apic, cpu, paging, say,
    scenario::{self, KernelEngine, Strategy},
    thread::{IRQ, KINDS, NMI, NORMAL, SOFTIRQ, Thread},
    trap,
    workload::{self, OWN, SPAN, TRACED, UNTRACED, WORK},
};

/// What the handler of a breakpoint or of a step does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Nothing more: it runs on.
    Run,
    /// One more instruction.
    Step,
    /// The timer interrupts here.
    Interrupt,
    /// An NMI does.
    Nmi,
}

/// What a thread owns of this: where its contexts are on their way from the breakpoint.
#[derive(Debug)]
pub struct Progress {
    /// The number of the interruptions that the thread's normal context is there for.
    number: AtomicUsize,
    /// Instructions since the breakpoint, for each kind of context.
    steps: [AtomicUsize; KINDS],
    /// Where the call returns to.
    until: [AtomicUsize; KINDS],
    /// Where in the int3 trampoline it is interrupted, from its start; [`OUTSIDE`] where it is not, or elsewhere.
    at: [AtomicUsize; KINDS],
}

const OUTSIDE: usize = usize::MAX;

impl Progress {
    /// On no way.
    pub const fn new() -> Self {
        Self {
            number: AtomicUsize::new(0),
            steps: [const { AtomicUsize::new(0) }; KINDS],
            until: [const { AtomicUsize::new(0) }; KINDS],
            at: [const { AtomicUsize::new(OUTSIDE) }; KINDS],
        }
    }
}

/// Whether breakpoints are followed.
static FOLLOWED: AtomicBool = AtomicBool::new(false);
/// Both sweeps are through.
static FINISHED: AtomicBool = AtomicBool::new(false);
/// The next breakpoint in normal context has this number.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// From this number on there is nothing left to interrupt.
static END: AtomicUsize = AtomicUsize::new(usize::MAX);
/// How many more numbers are given out then: threads that were preempted on their way finish it meanwhile.
const GRACE: usize = 256;
/// How often both sweeps are gone through.
const ROUNDS: usize = 16;
/// How often they have been.
static ROUND: AtomicUsize = AtomicUsize::new(0);
/// Instructions of the int3 trampoline; none where the strategy does without.
static BOUNDARIES: AtomicUsize = AtomicUsize::new(0);
/// Where each of them begins, from the trampoline's start.
static OFFSETS: [AtomicUsize; LONGEST] = [const { AtomicUsize::new(0) }; LONGEST];
/// The trampoline's start and bytes.
static TRAMPOLINE: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

/// Bytes that the int3 trampoline has at most.
const LONGEST: usize = 96;
/// Bytes of trampolines that are told apart.
const CODE_BYTES: usize = 1 << 14;

/// A set of small numbers.
struct Set<const BYTES: usize>([AtomicU8; BYTES]);

impl<const BYTES: usize> Set<BYTES> {
    const fn new() -> Self {
        Self([const { AtomicU8::new(0) }; BYTES])
    }

    fn insert(&self, number: usize) {
        if let Some(byte) = self.0.get(number / 8) {
            byte.fetch_or(1 << (number % 8), Ordering::Relaxed);
        }
    }

    fn contains(&self, number: usize) -> bool {
        self.0.get(number / 8).is_some_and(|byte| byte.load(Ordering::Relaxed) & 1 << (number % 8) != 0)
    }

    fn clear(&self) {
        self.0.iter().for_each(|byte| byte.store(0, Ordering::Relaxed));
    }

    fn count(&self) -> usize {
        self.0.iter().map(|byte| byte.load(Ordering::Relaxed).count_ones() as usize).sum()
    }
}

type Places = Set<{ CODE_BYTES / 8 }>;

/// Instructions of trampolines that were stepped over in normal context, by their distance from the first trampoline.
static STEPPED: Places = Set::new();
/// Those at which normal context was interrupted: by interrupts, and by NMIs.
static INTERRUPTED: [Places; 2] = [const { Set::new() }; 2];
/// Triples of places in the int3 trampoline at which normal context, softirq and interrupt stood when an NMI came.
static TRIPLES: Set<{ LONGEST * LONGEST * LONGEST / 8 }> = Set::new();

/// Whether the poking CPU is to hold the int3 phase.
pub fn holds() -> bool {
    FOLLOWED.load(Ordering::Relaxed) && !FINISHED.load(Ordering::Acquire)
}

/// A breakpoint was emulated in a context of this kind: its call returns to `until`.
pub fn begin(thread: &Thread, kind: usize, target: usize, until: usize) -> Next {
    if !FOLLOWED.load(Ordering::Relaxed) || kind >= NMI {
        return Next::Run;
    }
    let progress = &thread.progress;
    if kind == NORMAL {
        let number = next_number();
        progress.number.store(number, Ordering::Relaxed);
        if number >= END.load(Ordering::Relaxed).saturating_add(GRACE) {
            if !is_complete() && ROUND.fetch_add(1, Ordering::Relaxed) < ROUNDS {
                NEXT.store(0, Ordering::Relaxed);
            } else {
                // Release: pairs with the Acquire in `holds`.
                FINISHED.store(true, Ordering::Release);
                apic::interrupt_first(trap::WAKE_VECTOR);
            }
            return Next::Run;
        }
        STEPPED.insert(target.wrapping_sub(paging::code_start()));
    }
    progress.steps[kind].store(0, Ordering::Relaxed);
    progress.until[kind].store(until, Ordering::Relaxed);
    reach(progress, kind, 0)
}

/// The debug exception: a context of this kind has executed one more instruction, and is at `ip`.
pub fn step(thread: &Thread, kind: usize, ip: usize) -> Next {
    let progress = &thread.progress;
    if kind == NORMAL {
        STEPPED.insert(ip.wrapping_sub(paging::code_start()));
    }
    if ip == progress.until[kind].load(Ordering::Relaxed) {
        if kind == NORMAL {
            END.fetch_min(progress.number.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        return Next::Run;
    }
    let steps = progress.steps[kind].load(Ordering::Relaxed) + 1;
    progress.steps[kind].store(steps, Ordering::Relaxed);
    reach(progress, kind, steps)
}

/// The next one whose interruptions have not been met.
fn next_number() -> usize {
    let boundaries = BOUNDARIES.load(Ordering::Relaxed);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let met =
            || TRIPLES.contains(triple(places(number, boundaries).map(|place| OFFSETS[place].load(Ordering::Relaxed))));
        if number >= boundaries.pow(3) || !met() {
            return number;
        }
    }
}

/// Whether nothing is missing that either sweep is there for.
fn is_complete() -> bool {
    let stepped = STEPPED.count();
    TRIPLES.count() == BOUNDARIES.load(Ordering::Relaxed).pow(3)
        && INTERRUPTED.iter().all(|places| met(places) == stepped)
}

/// The boundaries at which the three contexts are interrupted for this number of the first sweep.
fn places(number: usize, boundaries: usize) -> [usize; 3] {
    [number % boundaries, number / boundaries % boundaries, number / boundaries / boundaries]
}

/// The number of a triple of places in the trampoline.
fn triple(offsets: [usize; 3]) -> usize {
    offsets.into_iter().fold(0, |number, offset| number * LONGEST + offset)
}

/// What is due after so many instructions.
fn reach(progress: &Progress, kind: usize, steps: usize) -> Next {
    let boundaries = BOUNDARIES.load(Ordering::Relaxed);
    let (triples, number) = (boundaries.pow(3), progress.number.load(Ordering::Relaxed));
    let (chosen, by_nmi) = if number < triples {
        (places(number, boundaries)[kind], kind == IRQ)
    } else if number < END.load(Ordering::Relaxed) && kind == NORMAL {
        ((number - triples) / 2, number % 2 == 0)
    } else {
        (0, kind == IRQ)
    };
    match (steps == chosen, by_nmi) {
        (false, _) => Next::Step,
        (true, false) => Next::Interrupt,
        (true, true) => Next::Nmi,
    }
}

/// A context of kind `by` begins: it interrupted one of kind `kind` at `ip`.
pub fn enter_context(thread: &Thread, kind: usize, by: usize, ip: usize) {
    if !FOLLOWED.load(Ordering::Relaxed) {
        return;
    }
    let [start, bytes] = [0, 1].map(|index: usize| TRAMPOLINE[index].load(Ordering::Relaxed));
    let at = ip.wrapping_sub(start);
    thread.progress.at[kind].store(if at < bytes { at } else { OUTSIDE }, Ordering::Relaxed);
    if kind == NORMAL {
        INTERRUPTED[usize::from(by == NMI)].insert(ip.wrapping_sub(paging::code_start()));
    }
    let places = [NORMAL, SOFTIRQ, IRQ].map(|kind| thread.progress.at[kind].load(Ordering::Relaxed));
    if by == NMI && kind == IRQ && places.iter().all(|place| *place < LONGEST) {
        TRIPLES.insert(triple(places));
    }
}

/// It ends.
pub fn leave_context(thread: &Thread, kind: usize) {
    thread.progress.at[kind].store(OUTSIDE, Ordering::Relaxed);
}

/// Carries out both sweeps and prints what was met, and a line for each kind of context.
pub fn run(engine: &mut KernelEngine, strategy: Strategy) {
    let start = trap::SETTINGS.int3_trampoline.load(Ordering::Relaxed);
    let (bytes, boundaries) = if strategy.uses_slots() { trampoline_at(start) } else { (0, 0) };
    assert!(bytes < LONGEST, "the int3 trampoline is too long");
    TRAMPOLINE[0].store(start, Ordering::Relaxed);
    TRAMPOLINE[1].store(bytes, Ordering::Relaxed);
    BOUNDARIES.store(boundaries, Ordering::Relaxed);
    NEXT.store(0, Ordering::Relaxed);
    ROUND.store(0, Ordering::Relaxed);
    END.store(usize::MAX, Ordering::Relaxed);
    FINISHED.store(false, Ordering::Relaxed);
    STEPPED.clear();
    INTERRUPTED.iter().for_each(Set::clear);
    TRIPLES.clear();

    engine.host_mut().nmis = 0;
    let flags = OpsFlags { recursion_safe: strategy.per_cpu, ..OpsFlags::default() };
    let ops = scenario::register_both(engine, || Filter::name("work_[0-3]"), flags);
    WORK.store(OWN, Ordering::Relaxed);
    SPAN.store(NMI + 1, Ordering::Relaxed);
    engine.enable(ops.first).expect("a first ops");
    workload::enter_phase(TRACED);
    scenario::forget_tallies();
    workload::begin_run();
    let before = engine.stats();
    FOLLOWED.store(true, Ordering::Relaxed);
    engine.enable(ops.second).expect("a poke");
    scenario::park();
    FOLLOWED.store(false, Ordering::Relaxed);

    let now = engine.stats();
    let run_line = format!(
        "\"strategy\":\"{}\",\"poke\":\"call-call\",\"sites\":{},\"nmi_storm\":false,\"batches\":{},\"pokes\":{},\"syncs\":{},\"pending\":{},\
         \"recursions\":{}",
        strategy.name,
        NMI + 1,
        now.batches - before.batches,
        now.pokes - before.pokes,
        now.syncs - before.syncs,
        scenario::pending(),
        scenario::RECURSIONS.load(Ordering::Relaxed),
    );
    scenario::print_rows(&run_line);
    say!(
        "{{\"event\":\"steps\",\"strategy\":\"{}\",\"boundaries\":{boundaries},\"triples\":{},\"stepped\":{},\"by_irq\":{},\"by_nmi\":{}}}",
        strategy.name,
        TRIPLES.count(),
        STEPPED.count(),
        met(&INTERRUPTED[0]),
        met(&INTERRUPTED[1]),
    );
    workload::enter_phase(UNTRACED);
    scenario::unregister_both(engine, ops);
}

/// How many of the instructions that were stepped over were interrupted.
fn met(interrupted: &Places) -> usize {
    let both = STEPPED.0.iter().zip(&interrupted.0);
    both.map(|(one, other)| (one.load(Ordering::Relaxed) & other.load(Ordering::Relaxed)).count_ones() as usize).sum()
}

/// Bytes and instructions of the int3 trampoline, up to its `ret`; notes where they begin.
fn trampoline_at(at: usize) -> (usize, usize) {
    let code: [u8; LONGEST] = core::array::from_fn(|index| paging::text_byte(at + index));
    let mut decoder = Decoder::new(Mode::NATIVE.word_bytes() * 8, &code, DecoderOptions::NONE);
    let mut count = 0;
    loop {
        OFFSETS[count].store(decoder.position(), Ordering::Relaxed);
        count += 1;
        if decoder.decode().mnemonic() == Mnemonic::Ret {
            return (decoder.position(), count);
        }
    }
}

/// An int3 trampoline with a defect, to be shown: it gives the slot back, and reads it then. Who interrupts in between has overwritten it.
#[unsafe(naked)]
pub unsafe extern "C" fn early_release() {
    const LAYOUT: ThreadLayout = ThreadLayout::new(Mode::NATIVE);
    const THREAD: i64 = core::mem::offset_of!(Thread, state) as i64;
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "lea rsp, [rsp - 16]",
        "push rax",
        "push rcx",
        "mov rax, gs:[{current}]",
        "mov rcx, [rax + {depth}]",
        "lea rcx, [rcx - 16]",
        "mov [rax + {depth}], rcx",
        "lea rcx, [rax + rcx + {slots}]",
        "mov rax, [rcx]",
        "mov [rsp + 24], rax",
        "mov rax, [rcx + 8]",
        "mov [rsp + 16], rax",
        "pop rcx",
        "pop rax",
        "ret",
        current = const cpu::CURRENT,
        depth = const THREAD + LAYOUT.depth(),
        slots = const THREAD + LAYOUT.slots(),
    );
    #[cfg(target_arch = "x86")]
    naked_asm!(
        "lea esp, [esp - 8]",
        "push eax",
        "push ecx",
        "mov eax, gs:[{current}]",
        "mov ecx, [eax + {depth}]",
        "lea ecx, [ecx - 8]",
        "mov [eax + {depth}], ecx",
        "lea ecx, [eax + ecx + {slots}]",
        "mov eax, [ecx]",
        "mov [esp + 12], eax",
        "mov eax, [ecx + 4]",
        "mov [esp + 8], eax",
        "pop ecx",
        "pop eax",
        "ret",
        current = const cpu::CURRENT,
        depth = const THREAD + LAYOUT.depth(),
        slots = const THREAD + LAYOUT.slots(),
    );
}
