//! The workload: traced functions called in every kind of context, each call accounted for; and the callbacks that count.
//!
//! Owns the judgement of one call ([`call`]). The poking CPU publishes in [`PHASE`] what must be true of a call that lies wholly within the
//! phase: traced (an ops is attached: the callback must have run once, for this site), untraced (it must not have run), or changing (either).
//! So losses are found call by call, while sites change. Invariant: a context's counts are touched by that context alone.

use core::sync::atomic::{AtomicUsize, Ordering};

use trapline_engine::CallFrame;

use crate::{cpu, graph, livepatch, thread};

/// A counter that one context at a time adds to.
#[derive(Debug)]
pub struct Count(AtomicUsize);

impl Count {
    const fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// Adds by one instruction, so that an NMI in between loses nothing.
    pub fn add(&self, amount: usize) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Keeps the greatest value.
    pub fn raise_to(&self, value: usize) {
        self.0.fetch_max(value, Ordering::Relaxed);
    }

    /// The value.
    pub fn value(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// What one kind of context of one thread counts.
#[derive(Debug)]
pub struct Tally {
    /// Calls of traced functions.
    pub calls: Count,
    /// Runs of the first ops' callback.
    pub first_ops: Count,
    /// Runs of the second ops' callback.
    pub second_ops: Count,
    /// Calls that the first ops had to see and did not.
    pub lost: Count,
    /// Calls that it saw twice, or while it was not attached.
    pub surplus: Count,
    /// Calls that ran the body that a function was compiled with.
    pub old_bodies: Count,
    /// Calls that ran the body that replaces it.
    pub new_bodies: Count,
    /// Calls that ran the old body while the patch was applied.
    pub stale_old: Count,
    /// Calls that ran the new body while it was not.
    pub stale_new: Count,
    /// Calls with a wrong result, and callbacks that were told of another site.
    pub wrong: Count,
    /// Breakpoints.
    pub traps: Count,
    /// Breakpoints for which no slot was free.
    pub overflows: Count,
    /// Breakpoints that came when their site held a whole instruction again.
    pub rewinds: Count,
    /// Breakpoints that left out their call.
    pub skipped: Count,
    /// The greatest number of calls that were pending at once.
    pub depth: Count,
    /// The site that is called now.
    pub site: AtomicUsize,
}

impl Tally {
    /// Nothing counted.
    pub const fn new() -> Self {
        Self {
            calls: Count::new(),
            first_ops: Count::new(),
            second_ops: Count::new(),
            lost: Count::new(),
            surplus: Count::new(),
            old_bodies: Count::new(),
            new_bodies: Count::new(),
            stale_old: Count::new(),
            stale_new: Count::new(),
            wrong: Count::new(),
            traps: Count::new(),
            overflows: Count::new(),
            rewinds: Count::new(),
            skipped: Count::new(),
            depth: Count::new(),
            site: AtomicUsize::new(0),
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for count in [
            &self.calls,
            &self.first_ops,
            &self.second_ops,
            &self.lost,
            &self.surplus,
            &self.old_bodies,
            &self.new_bodies,
            &self.stale_old,
            &self.stale_new,
            &self.wrong,
            &self.traps,
            &self.overflows,
            &self.rewinds,
            &self.skipped,
            &self.depth,
        ] {
            count.clear();
        }
    }
}

/// How often runs began and ended: calls are made while it is odd.
static RUN: AtomicUsize = AtomicUsize::new(0);
/// What is called: [`TRACEABLE`] functions, [`REPLACEABLE`] or [`NESTED`] ones, or [`OWN`].
pub static WORK: AtomicUsize = AtomicUsize::new(TRACEABLE);
/// How many of them are called: the first ones.
pub static SPAN: AtomicUsize = AtomicUsize::new(1);
/// A phase: its number, shifted, and one of the three below.
pub static PHASE: AtomicUsize = AtomicUsize::new(UNTRACED);

/// Functions that are only traced.
pub const TRACEABLE: usize = 0;
/// Functions that are replaced.
pub const REPLACEABLE: usize = 1;
/// Functions that call others.
pub const NESTED: usize = 2;
/// One function of those that are only traced for each kind of context.
pub const OWN: usize = 3;

/// The first ops is attached to no site.
pub const UNTRACED: usize = 0;
/// The first ops is attached to every site that is called.
pub const TRACED: usize = 1;
/// It is being attached or detached.
pub const CHANGING: usize = 2;

/// Begins the next phase.
pub fn enter_phase(phase: usize) {
    let number = PHASE.load(Ordering::Relaxed) >> 2;
    // Release: pairs with the Acquire loads in `call`; what was poked before is what a call of the new phase meets.
    PHASE.store((number + 1) << 2 | phase, Ordering::Release);
}

/// Begins a run.
pub fn begin_run() {
    // Release: pairs with the Acquire in `is_running`; who sees the run sees all that was set for it.
    RUN.fetch_add(1, Ordering::Release);
}

/// Ends the run. Calls that have begun go on.
pub fn end_run() {
    RUN.fetch_add(1, Ordering::Release);
}

/// The pause between two runs; `None` in a run.
pub fn pause() -> Option<usize> {
    Some(RUN.load(Ordering::Acquire)).filter(|run| run % 2 == 0)
}

/// Whether calls are made.
pub fn is_running() -> bool {
    pause().is_none()
}

/// What threads do for ever.
pub fn run() -> ! {
    let thread = cpu::current();
    loop {
        if let Some(pause) = pause() {
            // Release: pairs with the Acquire in `scenario::all_parked`; every call before this is counted. It says which pause was seen: a thread that has
            // slept through a run is not taken for one that has ended it.
            thread.parked_in.store(pause, Ordering::Release);
            core::hint::spin_loop();
        } else {
            call_in(thread::NORMAL, 16);
        }
    }
}

/// Calls traced functions in a context of this kind, if a run is on.
pub fn call_in(kind: usize, calls: usize) {
    for _ in 0..calls {
        if is_running() {
            match WORK.load(Ordering::Relaxed) {
                REPLACEABLE => livepatch::call(kind),
                NESTED => graph::call(kind),
                OWN => call(kind, |_argument| kind % SPAN.load(Ordering::Relaxed)),
                _ => call(kind, |argument| argument % SPAN.load(Ordering::Relaxed)),
            }
        }
    }
}

/// Calls a function, chosen by the argument that is next, and judges what the first ops made of it.
fn call(kind: usize, choose: impl Fn(usize) -> usize) {
    let thread = cpu::current();
    let tally = &thread.tallies[kind];
    let argument = thread.next.fetch_add(1, Ordering::Relaxed);
    let index = choose(argument);
    let function = traced::function(index);
    tally.calls.add(1);
    tally.site.store(function as usize, Ordering::Relaxed);
    let phase = PHASE.load(Ordering::Acquire);
    let seen = tally.first_ops.value();
    let result = core::hint::black_box(function)(argument);
    let seen = tally.first_ops.value() - seen;
    // An NMI that interrupted an NMI before its kind was set counts here as well: only the first of them is judged.
    let settled = PHASE.load(Ordering::Acquire) == phase;
    match (settled, phase & 3) {
        (true, TRACED) if seen == 0 => tally.lost.add(1),
        (true, UNTRACED) if seen > 0 => tally.surplus.add(1),
        _ if seen > 1 => tally.surplus.add(1),
        _ => {}
    }
    if result != traced::expected(index, argument) {
        tally.wrong.add(1);
    }
}

/// The first ops' callback.
pub extern "C" fn first_callback(frame: *mut CallFrame, _data: usize) {
    let thread = cpu::current();
    let tally = &thread.tallies[thread.kind.load(Ordering::Relaxed) % thread::KINDS];
    tally.first_ops.add(1);
    // SAFETY: the trampoline hands over its own frame.
    let site = unsafe { &*frame }.site();
    if site.value() as usize != tally.site.load(Ordering::Relaxed) {
        tally.wrong.add(1);
    }
}

/// The second ops' callback.
pub extern "C" fn second_callback(_frame: *mut CallFrame, _data: usize) {
    let thread = cpu::current();
    thread.tallies[thread.kind.load(Ordering::Relaxed) % thread::KINDS].second_ops.add(1);
}
