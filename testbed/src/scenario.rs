//! The runs: each strategy, with sites that arrive and leave (nop to call, call to nop) or change (call to call), one by one or all in one
//! batch, with and without NMI storms.
//!
//! Owns [`run_all`]. One CPU pokes, the others call; a run ends with every thread parked, is summed up, and printed as one line of JSON for each
//! kind of context. Invariant: what is printed is exact. Nothing is sampled.

use alloc::{format, vec::Vec};
use core::sync::atomic::{AtomicUsize, Ordering};

use trapline_engine::{
    Addr, Callback, Engine, Filter, Mode, OpsFlags, OpsId, OpsSpec, SiteSpec,
    insn::{self, InsnBytes, encode},
    trap::Resume,
};

use crate::{
    cpu, graph,
    host::KernelHost,
    livepatch,
    options::Options,
    paging, say, step,
    thread::{self, IRQ, KINDS, NMI, NORMAL, SOFTIRQ, Thread},
    trap::{self, SETTINGS},
    workload::{self, CHANGING, SPAN, TRACEABLE, TRACED, Tally, UNTRACED, WORK},
};

/// This kernel's engine.
pub type KernelEngine = Engine<KernelHost>;

/// How a breakpoint gets the return address to its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Strategy {
    /// Its name in tables.
    pub name: &'static str,
    /// What the handler does.
    pub resume: Resume,
    /// Whether slots are the CPU's.
    pub per_cpu: bool,
}

impl Strategy {
    /// Whether calls go through slots and the int3 trampoline.
    pub fn uses_slots(self) -> bool {
        self.resume == Resume::Slots
    }
}

const STRATEGIES: [Strategy; 5] = [
    Strategy { name: "slots", resume: Resume::Slots, per_cpu: false },
    Strategy { name: "percpu", resume: Resume::Slots, per_cpu: true },
    Strategy { name: "gap", resume: Resume::Push, per_cpu: false },
    Strategy { name: "r11", resume: Resume::R11, per_cpu: false },
    Strategy { name: "skip", resume: Resume::Skip, per_cpu: false },
];

/// How many sites a batch of all has here: those of the functions that are only traced.
const ALL: usize = traced::COUNT;

/// What a run pokes, how often.
#[derive(Clone, Copy, Debug)]
struct Run {
    strategy: Strategy,
    /// call to call: the first ops stays attached while the second comes and goes. Else the first comes and goes.
    call_to_call: bool,
    /// Sites of each batch: the first ones.
    sites: usize,
    /// Batches.
    pokes: usize,
    nmis: usize,
    /// Pokes on, up to [`PATIENCE`] times as often, until so many calls were pending at once in some run.
    until_depth: usize,
    /// The same until a slot was missing.
    until_overflow: bool,
}

/// How much longer a run goes on for what interrupts have to bring about.
const PATIENCE: usize = 20;

/// Rewrites every entry into the one instruction that the engine expects, and checks that there is one for each function. Before the other CPUs
/// start: on i386 the compiler leaves several short nops, between which nobody may stand.
pub fn prepare_sites() {
    unsafe extern "C" {
        static sites_start: usize;
        static sites_end: usize;
    }
    let start = &raw const sites_start;
    let count = ((&raw const sites_end).addr() - start.addr()) / size_of::<usize>();
    // SAFETY: the linker script puts the compiler's list of addresses there.
    let entries = unsafe { core::slice::from_raw_parts(start, count) };
    for entry in entries {
        let found: [u8; insn::CALL_BYTES] = core::array::from_fn(|index| paging::text_byte(entry + index));
        let nops: usize = insn::leading_nops(Mode::NATIVE, &found).sum();
        assert!(nops == insn::CALL_BYTES, "no nops at {entry:#x}: {found:02x?}");
        paging::write_text(*entry, &encode::nop(insn::CALL_BYTES));
    }
    for site in site_specs() {
        assert!(entries.contains(&(site.address.value() as usize)), "{} has no site", site.name);
    }
    say!("{{\"event\":\"sites\",\"count\":{count}}}");
}

/// Every function with a site: those that are only traced, `work_0` and on, those that are replaced, `target_0` and on, and `nest_0`.
fn site_specs() -> Vec<SiteSpec> {
    let nop: InsnBytes = encode::nop(insn::CALL_BYTES);
    let spec = |name: &str, index: usize, address: Addr| SiteSpec {
        address,
        name: format!("{name}_{index}").into(),
        original: nop,
        rest: nop,
    };
    let traced = (0..traced::COUNT).map(|index| spec("work", index, address_of(index)));
    let replaceable = (0..traced::REPLACEABLE_COUNT).map(|index| spec("target", index, livepatch::address_of(index)));
    let nest = spec("nest", 0, Addr::new(traced::nest as *const () as usize as u64));
    traced.chain(replaceable).chain([nest]).collect()
}

/// Where a function that is only traced is.
pub fn address_of(index: usize) -> Addr {
    Addr::new(traced::function(index) as usize as u64)
}

/// Whether every thread that was started waits for the next run.
pub fn all_parked() -> bool {
    // Acquire: pairs with the Release in `workload::run`.
    workload::pause().is_some_and(|pause| started().all(|thread| thread.parked_in.load(Ordering::Acquire) == pause))
}

/// The threads that run the workload: all but the one that pokes.
pub fn started() -> impl Iterator<Item = &'static Thread> {
    thread::all()[1..=crate::worker_threads()].iter()
}

/// Ends a run: returns when every thread waits for the next one.
pub fn park() {
    workload::end_run();
    await_parked();
}

fn await_parked() {
    while !all_parked() {
        core::hint::spin_loop();
    }
}

/// Runs everything that the options ask for.
pub fn run_all(options: &Options) {
    // Each thread has had its first turn.
    await_parked();
    for strategy in STRATEGIES {
        let asked_for = options.strategies.split(',').any(|name| name == strategy.name);
        if !asked_for || (strategy.resume == Resume::R11 && Mode::NATIVE == Mode::Bits32) {
            continue;
        }
        SETTINGS.set_resume(strategy.resume);
        SETTINGS.per_cpu.store(strategy.per_cpu, Ordering::Relaxed);
        SETTINGS.slot_limit.store(options.slot_limit, Ordering::Relaxed);
        SETTINGS.iret_in_nmi.store(options.iret_in_nmi, Ordering::Relaxed);
        SETTINGS.preempt_pending.store(options.preempt_pending, Ordering::Relaxed);
        let mut engine = Engine::new(KernelHost::new(strategy.per_cpu), &trap::STATE, site_specs()).expect("an engine");
        engine.host_mut().without_int3 = options.without_int3;
        engine.host_mut().store_again = options.store_again;
        let int3_trampoline = match options.early_release {
            true => step::early_release as *const () as usize,
            false => engine.int3_trampoline().value() as usize,
        };
        SETTINGS.int3_trampoline.store(int3_trampoline, Ordering::Relaxed);
        if options.scenario == "batch" {
            run_batches(&mut engine, options);
            engine.release().expect("the original bytes come back");
            return;
        }
        if options.scenario == "step" {
            step::run(&mut engine, strategy);
            engine.release().expect("the original bytes come back");
            continue;
        }
        if options.scenario == "trace" {
            graph::run(&mut engine, options);
            engine.release().expect("the original bytes come back");
            return;
        }
        for (sites, pokes) in [(1, options.single_pokes), (ALL, options.batches)] {
            for nmis in [0, options.nmis] {
                let left_out = pokes == 0 || (nmis == 0 && options.only_storms && options.nmis > 0);
                if left_out || (nmis > 0) != (nmis == options.nmis && options.nmis > 0) {
                    continue;
                }
                if options.scenario == "livepatch" {
                    livepatch::run(
                        &mut engine,
                        livepatch::Run {
                            strategy,
                            all: sites == ALL,
                            toggles: pokes,
                            nmis,
                            forget_revert: options.forget_revert,
                        },
                    );
                    continue;
                }
                for call_to_call in [false, true] {
                    let Options { until_depth, until_overflow, .. } = *options;
                    run_one(
                        &mut engine,
                        Run { strategy, call_to_call, sites, pokes, nmis, until_depth, until_overflow },
                    );
                }
            }
        }
        engine.release().expect("the original bytes come back");
    }
}

/// Registers a callback of this kernel.
pub fn register(engine: &mut KernelEngine, name: &str, filter: Filter, entry: usize, flags: OpsFlags) -> OpsId {
    let entry = Addr::new(entry as u64);
    let clobbers = insn::clobbers(Mode::NATIVE, entry, &mut |at, bytes| {
        for (byte, address) in bytes.iter_mut().zip(at.value() as usize..) {
            *byte = paging::text_byte(address);
        }
        bytes.len()
    });
    let callback = Callback {
        entry,
        data: Addr::default(),
        recursions: Addr::new((&raw const RECURSIONS).addr() as u64),
        clobbers,
    };
    engine.register(OpsSpec { name: name.into(), filter, flags, callback }).expect("an ops")
}

/// Calls that a guard left out. The callbacks call nothing that is traced, so there are none.
pub static RECURSIONS: AtomicUsize = AtomicUsize::new(0);

fn run_one(engine: &mut KernelEngine, run: Run) {
    engine.host_mut().nmis = 0;
    // The recursion guard belongs to what gs leads to; only a thread's stays the same under migration.
    let flags = OpsFlags { recursion_safe: run.strategy.per_cpu, ..OpsFlags::default() };
    let filter = || if run.sites == 1 { Filter::address(address_of(0)) } else { Filter::name("work_*") };
    let both = register_both(engine, filter, flags);
    let Both { first, second } = both;
    WORK.store(TRACEABLE, Ordering::Relaxed);
    SPAN.store(run.sites, Ordering::Relaxed);
    workload::enter_phase(UNTRACED);
    if run.call_to_call {
        engine.enable(first).expect("a first ops");
        workload::enter_phase(TRACED);
    }
    forget_tallies();
    let (migrations, carried) = (migrations(), carried());
    workload::begin_run();
    while calls() < 1000 {
        core::hint::spin_loop();
    }

    engine.host_mut().nmis = run.nmis;
    let (stats, syncs) = (engine.stats(), engine.host().syncs);
    let begin = cpu::cycles();
    let subject = if run.call_to_call { second } else { first };
    for number in 0..run.pokes * PATIENCE {
        let is_done = deepest() >= run.until_depth && (overflows() > 0 || !run.until_overflow);
        if number >= run.pokes && is_done {
            break;
        }
        let attach = number % 2 == 0;
        if !run.call_to_call {
            workload::enter_phase(CHANGING);
        }
        if attach { engine.enable(subject) } else { engine.disable(subject) }.expect("a poke");
        if !run.call_to_call {
            workload::enter_phase(if attach { TRACED } else { UNTRACED });
        }
    }
    let cycles = cpu::cycles() - begin;
    let (pokes, syncs) = (engine.stats().pokes - stats.pokes, engine.host().syncs - syncs);
    let batches = engine.stats().batches - stats.batches;
    engine.host_mut().nmis = 0;
    park();

    let run_line = format!(
        "\"strategy\":\"{}\",\"poke\":\"{}\",\"sites\":{},\"nmi_storm\":{},\"batches\":{batches},\"pokes\":{pokes},\
         \"syncs\":{syncs},\"cycles_per_poke\":{},\"migrations\":{},\"carried\":{},\"pending\":{},\"recursions\":{}",
        run.strategy.name,
        if run.call_to_call { "call-call" } else { "nop-call" },
        run.sites,
        run.nmis > 0,
        cycles / pokes.max(1),
        self::migrations() - migrations,
        self::carried() - carried,
        pending(),
        RECURSIONS.load(Ordering::Relaxed),
    );
    print_rows(&run_line);
    workload::enter_phase(UNTRACED);
    unregister_both(engine, both);
}

/// The two ops of a run: what the first one saw is judged, the second one comes and goes.
#[derive(Clone, Copy, Debug)]
pub struct Both {
    /// Judged.
    pub first: OpsId,
    /// At the same sites.
    pub second: OpsId,
}

/// Registers the two ops of a run.
pub fn register_both(engine: &mut KernelEngine, filter: impl Fn() -> Filter, flags: OpsFlags) -> Both {
    let first = register(engine, "first", filter(), workload::first_callback as *const () as usize, flags);
    let second = register(engine, "second", filter(), workload::second_callback as *const () as usize, flags);
    Both { first, second }
}

/// Gives them back.
pub fn unregister_both(engine: &mut KernelEngine, both: Both) {
    engine.unregister(both.second).expect("no second ops");
    engine.unregister(both.first).expect("no first ops");
    assert!(engine.reclaim().len() == 2, "every thread is parked, so nothing is in use");
}

/// Begins to count anew.
pub fn forget_tallies() {
    for thread in started() {
        thread.tallies.iter().for_each(Tally::clear);
    }
}

/// Prints what was counted, one line for each kind of context.
pub fn print_rows(run_line: &str) {
    for (name, kinds) in CONTEXTS {
        let sum = |count: fn(&Tally) -> usize| sum_of(&kinds, count);
        let tallies = started().flat_map(|thread| &thread.tallies[kinds.clone()]);
        let depth = tallies.map(|tally| tally.depth.value()).max().unwrap_or_default();
        say!(
            "{{\"event\":\"row\",{run_line},\"context\":\"{name}\",\"calls\":{},\"ops\":{},\"second_ops\":{},\"lost\":{},\
             \"surplus\":{},\"wrong\":{},\"traps\":{},\"overflows\":{},\"rewinds\":{},\"skipped\":{},\"depth\":{depth}}}",
            sum(|tally| tally.calls.value()),
            sum(|tally| tally.first_ops.value()),
            sum(|tally| tally.second_ops.value()),
            sum(|tally| tally.lost.value()),
            sum(|tally| tally.surplus.value()),
            sum(|tally| tally.wrong.value()),
            sum(|tally| tally.traps.value()),
            sum(|tally| tally.overflows.value()),
            sum(|tally| tally.rewinds.value()),
            sum(|tally| tally.skipped.value()),
        );
    }
}

/// Attaches an ops to every site and detaches it, again and again, while the other CPUs have nothing to do: what a batch costs. The reader of the lines has a
/// clock.
fn run_batches(engine: &mut KernelEngine, options: &Options) {
    let callback = workload::second_callback as *const () as usize;
    let all = register(engine, "all", Filter::all(), callback, OpsFlags::default());
    let stats = engine.stats();
    say!("{{\"event\":\"clock\",\"tsc\":{}}}", cpu::cycles());
    for _ in 0..options.batches {
        engine.enable(all).expect("a batch");
        engine.disable(all).expect("a batch");
    }
    say!("{{\"event\":\"clock\",\"tsc\":{}}}", cpu::cycles());
    let now = engine.stats();
    let (batches, pokes) = (now.batches - stats.batches, now.pokes - stats.pokes);
    say!("{{\"event\":\"batch\",\"batches\":{batches},\"pokes\":{pokes},\"syncs\":{}}}", now.syncs - stats.syncs);
    engine.unregister(all).expect("no ops");
    assert!(engine.reclaim().len() == 1, "every thread is parked, so nothing is in use");
}

/// Kinds of context by the names that tables have for them.
pub const CONTEXTS: [(&str, core::ops::Range<usize>); 4] =
    [("normal", NORMAL..SOFTIRQ), ("softirq", SOFTIRQ..IRQ), ("irq", IRQ..NMI), ("nmi", NMI..KINDS)];

/// What all threads counted in these kinds of context.
pub fn sum_of(kinds: &core::ops::Range<usize>, count: fn(&Tally) -> usize) -> usize {
    started().map(|thread| thread.tallies[kinds.clone()].iter().map(count).sum::<usize>()).sum()
}

/// Calls of the run so far.
pub fn calls() -> usize {
    sum_of(&(NORMAL..KINDS), |tally| tally.calls.value())
}

/// The greatest number of calls that were pending at once, in this run or an earlier one.
fn deepest() -> usize {
    static DEEPEST: AtomicUsize = AtomicUsize::new(0);
    let now = started().flat_map(|thread| &thread.tallies).map(|tally| tally.depth.value()).max();
    DEEPEST.fetch_max(now.unwrap_or_default(), Ordering::Relaxed).max(now.unwrap_or_default())
}

/// Breakpoints of the run so far for which no slot was free.
fn overflows() -> usize {
    sum_of(&(NORMAL..KINDS), |tally| tally.overflows.value())
}

/// Emulated calls that are pending, in the slots of any thread or CPU.
pub fn pending() -> usize {
    started().map(|thread| thread.state.depth()).chain(cpu::all().iter().map(|cpu| cpu.state.depth())).sum()
}

fn migrations() -> usize {
    started().map(|thread| thread.migrations.load(Ordering::Relaxed)).sum()
}

fn carried() -> usize {
    started().map(|thread| thread.carried.load(Ordering::Relaxed)).sum()
}
