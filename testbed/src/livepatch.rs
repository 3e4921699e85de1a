//! Live patching: functions are replaced, and get their old bodies back, while tracers on them come and go.
//!
//! Owns the scenario `livepatch` ([`run`]), the new bodies, and the judgement of one call ([`call`]). The patch is an IPMODIFY ops: its callback changes where
//! the call resumes, so that each breakpoint that skips its call runs the old body. A call that lies wholly within the time in which the patch is applied
//! must run the new body; one that lies wholly behind its revert, the old one. Each body counts its runs for the call that it serves, so both are found call
//! by call, in whatever context. Invariant: a call runs exactly one body, and its result is that body's.

use core::sync::atomic::Ordering;

use alloc::format;

use traced::{Bodies, REPLACEABLE_COUNT, Replaceable};
use trapline_engine::{Addr, CallFrame, Filter, OpsFlags};

use crate::{
    cpu, say,
    scenario::{self, CONTEXTS, KernelEngine, RECURSIONS, Strategy, sum_of},
    workload::{self, CHANGING, PHASE, REPLACEABLE, SPAN, TRACED, Tally, UNTRACED, WORK},
};

/// The patch is applied: here the phase in which an ops is attached.
const PATCHED: usize = TRACED;
/// The patch is reverted.
const UNPATCHED: usize = UNTRACED;

/// How often the patch is applied and reverted in a run.
const ROUNDS: usize = 4;

/// What a run does.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// How breakpoints resume.
    pub strategy: Strategy,
    /// Replaces all functions that are there for it, with a tracer on every site there is; else one function alone.
    pub all: bool,
    /// How often the tracer comes or goes, applied and reverted taken together.
    pub toggles: usize,
    /// NMIs at each step of a poke.
    pub nmis: usize,
    /// Only says that it reverts: the defect, to be shown.
    pub forget_revert: bool,
}

/// Where a replaceable function is.
pub fn address_of(index: usize) -> Addr {
    Addr::new(traced::replaceable(index) as usize as u64)
}

extern "C" fn new_body<const INDEX: usize>(bodies: &Bodies, argument: usize) -> usize {
    bodies.new.fetch_add(1, Ordering::Relaxed);
    replaced(INDEX, argument)
}

/// What a new body returns.
fn replaced(index: usize, argument: usize) -> usize {
    !traced::expected(index, argument)
}

macro_rules! new_bodies {
    ($($index:literal)*) => {
        [$(new_body::<$index>),*]
    };
}

static NEW_BODIES: [Replaceable; REPLACEABLE_COUNT] = new_bodies!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);

/// The patch: the call goes on in the new body.
extern "C" fn patch_callback(frame: *mut CallFrame, _data: usize) {
    // SAFETY: the trampoline hands over its own frame.
    let frame = unsafe { &mut *frame };
    let site = frame.site();
    for (index, new_body) in NEW_BODIES.iter().enumerate() {
        if address_of(index) == site {
            frame.ip = *new_body as usize;
        }
    }
}

/// Calls the next replaceable function and judges which body it ran.
pub fn call(kind: usize) {
    let thread = cpu::current();
    let tally = &thread.tallies[kind];
    let argument = thread.next.fetch_add(1, Ordering::Relaxed);
    let index = argument % SPAN.load(Ordering::Relaxed);
    let bodies = Bodies::default();
    tally.calls.add(1);
    tally.site.store(traced::replaceable(index) as usize, Ordering::Relaxed);
    // Acquire: pairs with the Release in `workload::enter_phase`.
    let phase = PHASE.load(Ordering::Acquire);
    let result = core::hint::black_box(traced::replaceable(index))(&bodies, argument);
    let settled = PHASE.load(Ordering::Acquire) == phase;
    let (old, new) = (bodies.old.load(Ordering::Relaxed), bodies.new.load(Ordering::Relaxed));
    tally.old_bodies.add(old);
    tally.new_bodies.add(new);
    match (settled, phase & 3) {
        (true, PATCHED) => tally.stale_old.add(old),
        (true, UNPATCHED) => tally.stale_new.add(new),
        _ => {}
    }
    let right = if new > 0 { replaced(index, argument) } else { traced::expected(index, argument) };
    if old + new != 1 || result != right {
        tally.wrong.add(1);
    }
}

/// Carries out a run and prints what was counted, one line for each kind of context.
pub fn run(engine: &mut KernelEngine, run: Run) {
    engine.host_mut().nmis = 0;
    let (targets, tracers, span) = if run.all {
        (Filter::name("target_*"), Filter::all(), REPLACEABLE_COUNT)
    } else {
        (Filter::address(address_of(0)), Filter::address(address_of(0)), 1)
    };
    // As in `scenario`: the guard of the strategy with slots of the CPU would not be the thread's.
    let flags = OpsFlags { recursion_safe: run.strategy.per_cpu, ..OpsFlags::default() };
    let modify = OpsFlags { ip_modify: true, ..flags };
    let patch = scenario::register(engine, "patch", targets, patch_callback as *const () as usize, modify);
    let tracer = scenario::register(engine, "tracer", tracers, workload::first_callback as *const () as usize, flags);
    SPAN.store(span, Ordering::Relaxed);
    WORK.store(REPLACEABLE, Ordering::Relaxed);
    workload::enter_phase(UNPATCHED);
    for thread in scenario::started() {
        thread.tallies.iter().for_each(Tally::clear);
    }
    workload::begin_run();
    while scenario::calls() < 1000 {
        core::hint::spin_loop();
    }

    engine.host_mut().nmis = run.nmis;
    let (stats, syncs) = (engine.stats(), engine.host().syncs);
    for half in 0..2 * ROUNDS {
        let applies = half % 2 == 0;
        workload::enter_phase(CHANGING);
        if applies {
            engine.enable(patch).expect("the patch is applied");
        } else if !run.forget_revert {
            engine.disable(patch).expect("the patch is reverted");
        }
        workload::enter_phase(if applies { PATCHED } else { UNPATCHED });
        // An even number, so that each phase begins and ends without the tracer.
        for toggle in 0..run.toggles.div_ceil(4 * ROUNDS) * 2 {
            if toggle % 2 == 0 { engine.enable(tracer) } else { engine.disable(tracer) }.expect("a poke");
        }
    }
    workload::enter_phase(CHANGING);
    let (pokes, syncs) = (engine.stats().pokes - stats.pokes, engine.host().syncs - syncs);
    let batches = engine.stats().batches - stats.batches;
    engine.host_mut().nmis = 0;
    scenario::park();

    let run_line = format!(
        "\"strategy\":\"{}\",\"functions\":{span},\"nmi_storm\":{},\"batches\":{batches},\"pokes\":{pokes},\
         \"syncs\":{syncs},\"patched\":{ROUNDS},\"pending\":{},\"recursions\":{}",
        run.strategy.name,
        run.nmis > 0,
        scenario::pending(),
        RECURSIONS.load(Ordering::Relaxed),
    );
    for (name, kinds) in CONTEXTS {
        let sum = |count: fn(&Tally) -> usize| sum_of(&kinds, count);
        say!(
            "{{\"event\":\"patch\",{run_line},\"context\":\"{name}\",\"calls\":{},\"old_bodies\":{},\"new_bodies\":{},\
             \"stale_old\":{},\"stale_new\":{},\"tracer\":{},\"wrong\":{},\"traps\":{},\"overflows\":{}}}",
            sum(|tally| tally.calls.value()),
            sum(|tally| tally.old_bodies.value()),
            sum(|tally| tally.new_bodies.value()),
            sum(|tally| tally.stale_old.value()),
            sum(|tally| tally.stale_new.value()),
            sum(|tally| tally.first_ops.value()),
            sum(|tally| tally.wrong.value()),
            sum(|tally| tally.traps.value()),
            sum(|tally| tally.overflows.value()),
        );
    }
    engine.unregister(tracer).expect("no tracer");
    engine.unregister(patch).expect("no patch");
    assert!(engine.reclaim().len() == 2, "every thread is parked, so nothing is in use");
}
