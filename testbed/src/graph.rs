//! The tracer of functions and their returns: what ftrace calls `function_graph`.
//!
//! Owns the rings of records, one a CPU, [`Graph`] with a thread's open frames, and the scenario `trace` ([`run`]). A traced call is sent through
//! [`return_entry`] on its way back: the callback puts that address where the call returns to, and keeps the caller's in the thread's [`Graph`]. Records are those of
//! the process recorder ([`trapline_abi::record`]), each with its thread, so that a thread that migrates leaves them in several
//! rings; `cargo xtask kernel-test` sorts them by their sequence numbers and makes a trace file.
//!
//! Nothing here locks or waits. Two additions, each one instruction, order everything: a thread's *position* (sequence number and depth in one word) and a
//! ring's next place. An NMI between any two instructions takes the next sequence number, the next slot for a return address and the next place, and
//! has given its slot back when it returns. Invariants: a slot is taken before it is filled, and read before it is given back; depths follow from the order
//! of sequence numbers, in whatever order records reach the rings.

use alloc::vec::Vec;
use core::{
    arch::naked_asm,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering, compiler_fence},
};

use trapline_abi::record::{self, Event};
use trapline_engine::{CallFrame, Filter, OpsFlags};

use crate::{
    cpu,
    options::Options,
    paging, say,
    scenario::{self, CONTEXTS, KernelEngine, sum_of},
    serial, thread,
    workload::{self, CHANGING, NESTED, Tally, WORK},
};

/// Records in the ring of each CPU.
pub const RECORDS: usize = 1 << 16;

/// With so many in one of them, no more functions are called: what is left is for contexts, which go on for a while.
const ENOUGH: usize = RECORDS / 4 * 3;

/// Frames of a thread that can be open at once. Beyond, a call is recorded without its return.
const FRAMES: usize = 64;

/// What stands for a context as a function: this, and the kind of the context. Functions are told by their distance from the start of the text.
const CONTEXT_SITES: u32 = record::MAX_SITES - 16;

/// One event: the record's lower and upper half; thread, kind of context, and frames that were open before; sequence number.
#[repr(C, align(16))]
struct Record([AtomicU32; 4]);

static RINGS: [[Record; RECORDS]; cpu::MAX] =
    [const { [const { Record([const { AtomicU32::new(0) }; 4]) }; RECORDS] }; cpu::MAX];

/// How much of the rings is used.
static RING: AtomicUsize = AtomicUsize::new(RECORDS);

/// What a thread owns of the tracer.
#[derive(Debug)]
pub struct Graph {
    /// How many records it wrote (upper bits) and how many frames are open (the lowest [`DEPTH_BITS`]).
    position: AtomicU32,
    /// Where open frames return to.
    returns: [AtomicUsize; FRAMES],
    /// Records for which no place was left.
    lost: AtomicUsize,
    /// Calls that were recorded without their returns.
    unhooked: AtomicUsize,
}

const DEPTH_BITS: u32 = 8;
const DEPTH_MASK: u32 = (1 << DEPTH_BITS) - 1;
const NEXT: u32 = 1 << DEPTH_BITS;

impl Graph {
    /// Nothing is open.
    pub const fn new() -> Self {
        Self {
            position: AtomicU32::new(0),
            returns: [const { AtomicUsize::new(0) }; FRAMES],
            lost: AtomicUsize::new(0),
            unhooked: AtomicUsize::new(0),
        }
    }

    fn depth(&self) -> usize {
        (self.position.load(Ordering::Relaxed) & DEPTH_MASK) as usize
    }

    /// Opens a frame and returns its index; `None` if there are too many, and then the call is a point.
    fn open(&self, site: u32) -> Option<usize> {
        // Whoever interrupts is back at this depth when it returns, so there is still room behind this.
        if self.depth() >= FRAMES {
            self.unhooked.fetch_add(1, Ordering::Relaxed);
            self.write(Event::Point { site }, self.position.fetch_add(NEXT, Ordering::Relaxed));
            return None;
        }
        let before = self.position.fetch_add(NEXT + 1, Ordering::Relaxed);
        self.write(Event::Enter { site }, before);
        Some((before & DEPTH_MASK) as usize)
    }

    /// Closes the innermost frame and returns where it returns to.
    fn close(&self) -> usize {
        let depth = self.depth();
        let return_to = self.returns[(depth - 1) % FRAMES].load(Ordering::Relaxed);
        // The slot is given back only now: an interruption behind this uses it.
        compiler_fence(Ordering::SeqCst);
        let before = self.position.fetch_add(NEXT - 1, Ordering::Relaxed);
        self.write(Event::Exit { depth: depth as u32 }, before);
        return_to
    }

    fn write(&self, event: Event, before: u32) {
        let thread = cpu::current();
        let (cpu, place) = cpu::take_record();
        if place >= RING.load(Ordering::Relaxed) {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let event = record::encode(event, cpu::cycles());
        let context = thread.kind.load(Ordering::Relaxed) as u32;
        let Record([low, high, place, sequence]) = &RINGS[cpu % cpu::MAX][place % RECORDS];
        place.store((thread.index() as u32) << 16 | context << 8 | (before & DEPTH_MASK), Ordering::Relaxed);
        sequence.store(before >> DEPTH_BITS, Ordering::Relaxed);
        low.store(event as u32, Ordering::Relaxed);
        high.store((event >> 32) as u32, Ordering::Relaxed);
    }
}

/// Opens a frame for a context, if the run is traced; for [`leave_context`].
pub fn enter_context(kind: usize) -> bool {
    WORK.load(Ordering::Relaxed) == NESTED && cpu::current().graph.open(CONTEXT_SITES + kind as u32).is_some()
}

/// Closes the frame of a context.
pub fn leave_context(entered: bool) {
    if entered {
        cpu::current().graph.close();
    }
}

/// A traced function is called: opens its frame, and has it return through [`return_entry`].
extern "C" fn enter_callback(frame: *mut CallFrame, _data: usize) {
    // SAFETY: the trampoline hands over its own frame.
    let frame = unsafe { &mut *frame };
    let graph = &cpu::current().graph;
    if let Some(index) = graph.open((frame.site().value() as usize - paging::text().start) as u32) {
        graph.returns[index % FRAMES].store(frame.parent, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        frame.parent = return_entry as *const () as usize;
    }
}

/// A traced function has returned.
extern "C" fn leave() -> usize {
    cpu::current().graph.close()
}

/// Where traced functions return to: on to their callers, with the result as it was.
///
/// ```text
/// the return address     below the stack pointer of the caller
/// a word for alignment
/// ax, dx                 the result
/// ```
#[unsafe(naked)]
unsafe extern "C" fn return_entry() {
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "sub rsp, 16",
        "push rax",
        "push rdx",
        "call {leave}",
        "mov [rsp + 24], rax",
        "pop rdx",
        "pop rax",
        "lea rsp, [rsp + 8]",
        "ret",
        leave = sym leave
    );
    #[cfg(target_arch = "x86")]
    naked_asm!(
        "sub esp, 8",
        "push eax",
        "push edx",
        "call {leave}",
        "mov [esp + 12], eax",
        "pop edx",
        "pop eax",
        "lea esp, [esp + 4]",
        "ret",
        leave = sym leave
    );
}

/// How deep the functions go that call others, at most.
const LEVELS: usize = 4;

/// Calls a function that calls others, and counts all of these calls.
pub fn call(kind: usize) {
    if is_enough() {
        return;
    }
    let thread = cpu::current();
    let tally = &thread.tallies[kind];
    let argument = thread.next.fetch_add(1, Ordering::Relaxed);
    let levels = argument % LEVELS;
    // Each level, the one without a level, and the function behind it.
    tally.calls.add(levels + 2);
    let result = core::hint::black_box(traced::nest as fn(usize, usize) -> usize)(levels, argument);
    if result != traced::expected_of_nest(levels, argument) {
        tally.wrong.add(1);
    }
}

/// Whether a ring will soon be full.
fn is_enough() -> bool {
    cpu::all().iter().any(|cpu| cpu.records() >= ENOUGH)
}

/// Traces until there were enough calls or records, while another ops comes and goes at the same sites; then sends the records to the second serial port and prints what
/// they must add up to.
pub fn run(engine: &mut KernelEngine, options: &Options) {
    // Reentrant as it is: a guard would leave calls out.
    let flags = OpsFlags { recursion_safe: true, ..OpsFlags::default() };
    let graph = scenario::register(engine, "graph", Filter::all(), enter_callback as *const () as usize, flags);
    let counter = workload::second_callback as *const () as usize;
    let counter = scenario::register(engine, "counter", Filter::name("nest_*").or_name("work_1*"), counter, flags);
    WORK.store(NESTED, Ordering::Relaxed);
    RING.store(options.ring.min(RECORDS), Ordering::Relaxed);
    workload::enter_phase(CHANGING);
    for thread in scenario::started() {
        thread.tallies.iter().for_each(Tally::clear);
    }
    engine.enable(graph).expect("the tracer");
    say!("{{\"event\":\"clock\",\"tsc\":{}}}", cpu::cycles());
    workload::begin_run();
    engine.host_mut().nmis = options.nmis;
    let mut attach = true;
    while scenario::calls() < options.calls && !is_enough() {
        if attach { engine.enable(counter) } else { engine.disable(counter) }.expect("a poke");
        attach = !attach;
    }
    engine.host_mut().nmis = 0;
    scenario::park();
    assert!(scenario::started().all(|thread| thread.graph.depth() == 0), "a thread that waits has left every frame");
    say!("{{\"event\":\"clock\",\"tsc\":{}}}", cpu::cycles());
    let traps = sum_of(&(0..thread::KINDS), |tally| tally.traps.value());
    for thread in scenario::started() {
        say!(
            "{{\"event\":\"thread\",\"thread\":{},\"records\":{},\"lost\":{},\"unhooked\":{},\"migrations\":{}}}",
            thread.index(),
            thread.graph.position.load(Ordering::Relaxed) >> DEPTH_BITS,
            thread.graph.lost.load(Ordering::Relaxed),
            thread.graph.unhooked.load(Ordering::Relaxed),
            thread.migrations.load(Ordering::Relaxed),
        );
    }
    for (name, kinds) in CONTEXTS {
        say!(
            "{{\"event\":\"traced\",\"context\":\"{name}\",\"calls\":{},\"wrong\":{},\"counted\":{},\"traps\":{traps}}}",
            sum_of(&kinds, |tally| tally.calls.value()),
            sum_of(&kinds, |tally| tally.wrong.value()),
            sum_of(&kinds, |tally| tally.second_ops.value()),
        );
    }
    for (cpu, ring) in cpu::all().iter().zip(&RINGS) {
        let records = &ring[..cpu.records().min(RING.load(Ordering::Relaxed))];
        let words = records.iter().flat_map(|Record(words)| words);
        let bytes: Vec<u8> = words.flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
        serial::send(&bytes);
    }
    say!("{{\"event\":\"sent\"}}");
    engine.unregister(counter).expect("no counter");
    engine.unregister(graph).expect("no tracer");
    assert!(engine.reclaim().len() == 2, "every thread is parked, so nothing is in use");
}
