//! What each CPU owns: its place in memory behind gs, and the interrupt table that all share.
//!
//! Owns [`Cpu`]. Its second word is the *current thread*: `gs:[CURRENT]` is what the engine's trampolines load. Invariant: code that may be
//! preempted never keeps a `&Cpu`, since the next instruction may run on another one; it asks for [`current`], a thread's own state.

use core::{
    arch::asm,
    mem::offset_of,
    sync::atomic::{AtomicUsize, Ordering},
};

use trapline_engine::ThreadState;

use crate::thread::{SLOTS, Thread};

/// How many CPUs can be served.
pub const MAX: usize = 4;

/// Distance from gs's base to the pointer to the current thread.
pub const CURRENT: usize = offset_of!(Cpu, current);
/// Distance from gs's base to the slots of the strategy `percpu`.
pub const SLOTS_OF_CPU: usize = offset_of!(Cpu, state);

const NEXT_RECORD: usize = offset_of!(Cpu, next_record);

/// One CPU.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Cpu {
    this: AtomicUsize,
    current: AtomicUsize,
    id: AtomicUsize,
    /// For the strategy `percpu`. While a call is pending here, the scheduler leaves the CPU alone: the depth is the preemption counter.
    pub state: ThreadState<SLOTS>,
    /// The next place in this CPU's ring of records, counted over the rings of all CPUs; see [`crate::graph`].
    next_record: AtomicUsize,
}

static CPUS: [Cpu; MAX] = [const {
    Cpu {
        this: AtomicUsize::new(0),
        current: AtomicUsize::new(0),
        id: AtomicUsize::new(0),
        state: ThreadState::new(),
        next_record: AtomicUsize::new(0),
    }
}; MAX];

/// The CPU that this runs on. Only for code that cannot be preempted.
pub fn this() -> &'static Cpu {
    let at: *const Cpu;
    // SAFETY: `enter` made gs lead to a static `Cpu`, whose first word points to itself.
    unsafe { asm!("mov {}, gs:[0]", out(reg) at, options(nostack, preserves_flags, readonly)) };
    // SAFETY: as above.
    unsafe { &*at }
}

/// The thread that this runs in. One instruction reads the pointer, so it is the thread's own wherever it runs.
pub fn current() -> &'static Thread {
    let at: *const Thread;
    // SAFETY: gs leads to a `Cpu` whose `current` is set by `enter` and `set_current`.
    unsafe {
        asm!("mov {}, gs:[{at}]", out(reg) at, at = const CURRENT, options(nostack, preserves_flags, readonly));
    };
    // SAFETY: threads are static.
    unsafe { &*at }
}

impl Cpu {
    /// Its number, from 0.
    pub fn id(&self) -> usize {
        self.id.load(Ordering::Relaxed)
    }

    /// How many records this CPU has taken a place for.
    pub fn records(&self) -> usize {
        self.next_record.load(Ordering::Relaxed) & (MAX_RECORDS - 1)
    }

    /// Makes a thread the one that runs here; for the scheduler.
    pub fn set_current(&self, thread: &'static Thread) {
        self.current.store((&raw const *thread).addr(), Ordering::Relaxed);
    }
}

/// Places that can be counted of one CPU.
const MAX_RECORDS: usize = 1 << 24;

/// Takes the next place for a record on whichever CPU this runs: that CPU's number, and the place in its ring. One instruction, so that neither an NMI nor
/// a migration comes between reading and counting up.
pub fn take_record() -> (usize, usize) {
    let place: usize;
    // SAFETY: gs leads to a `Cpu`, whose counter only its own CPU changes, by this.
    unsafe {
        asm!("xadd gs:[{at}], {place}", place = inout(reg) 1_usize => place, at = const NEXT_RECORD, options(nostack))
    };
    (place / MAX_RECORDS, place % MAX_RECORDS)
}

/// All CPUs, those included that are not there.
pub fn all() -> &'static [Cpu] {
    &CPUS
}

/// Makes this CPU the one with number `id`, running `thread`.
pub fn enter(id: usize, thread: &'static Thread) {
    let cpu = &CPUS[id];
    let base = (&raw const *cpu).addr();
    cpu.this.store(base, Ordering::Relaxed);
    cpu.id.store(id, Ordering::Relaxed);
    cpu.next_record.store(id * MAX_RECORDS, Ordering::Relaxed);
    cpu.set_current(thread);
    set_gs(id, base);
    load_table();
}

#[cfg(target_arch = "x86_64")]
fn set_gs(_id: usize, base: usize) {
    const GS_BASE: u32 = 0xc000_0101;
    let (low, high) = (base as u32, (base >> 32) as u32);
    // SAFETY: nothing uses gs before this.
    unsafe { asm!("wrmsr", in("ecx") GS_BASE, in("eax") low, in("edx") high, options(nostack, preserves_flags)) };
}

#[cfg(target_arch = "x86")]
fn set_gs(id: usize, base: usize) {
    unsafe extern "C" {
        static mut gdt: [u64; 12];
    }
    let base = base as u64;
    let descriptor = 0x00cf_9200_0000_ffff | (base & 0xff_ffff) << 16 | (base >> 24) << 56;
    // SAFETY: each CPU has an entry of its own, of the eight that are kept for this.
    unsafe { (&raw mut gdt).cast::<u64>().add(4 + id).write(descriptor) };
    let selector = 0x20 + 8 * id;
    // SAFETY: the descriptor was just written; nothing uses gs before this.
    unsafe { asm!("mov gs, {0:x}", in(reg) selector, options(nostack, preserves_flags)) };
}

const GATES: usize = 256;
const WORDS: usize = 2 * size_of::<usize>() / 4;

#[repr(C, align(16))]
struct Table([[u32; WORDS]; GATES]);

static mut TABLE: Table = Table([[0; WORDS]; GATES]);

/// Lets `vector` interrupt at `entry`, with interrupts off. On the boot CPU, before the others start.
pub fn set_gate(vector: u8, entry: unsafe extern "C" fn()) {
    let at = entry as *const () as usize;
    let mut gate = [0; WORDS];
    gate[0] = (at as u32 & 0xffff) | 8 << 16;
    gate[1] = (at as u32 & 0xffff_0000) | 0x8e00;
    #[cfg(target_arch = "x86_64")]
    {
        gate[2] = (at >> 32) as u32;
    }
    // SAFETY: no other CPU runs yet, and this one takes no interrupt.
    unsafe { TABLE.0[usize::from(vector)] = gate };
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: usize,
}

fn load_table() {
    let pointer = Pointer { limit: (size_of::<Table>() - 1) as u16, base: (&raw const TABLE).addr() };
    // SAFETY: the table is static.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack, preserves_flags, readonly)) };
}

/// The time-stamp counter.
pub fn cycles() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading a counter.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Takes interrupts from here on.
pub fn interrupts_on() {
    // SAFETY: the interrupt table is complete when a CPU gets here.
    unsafe { asm!("sti", options(nostack)) };
}

/// Takes no interrupt from here on, but NMIs.
pub fn interrupts_off() {
    // SAFETY: taking none is always allowed.
    unsafe { asm!("cli", options(nostack)) };
}

/// Waits for an interrupt, with interrupts off before and after: none that comes in between is missed.
pub fn wait_for_interrupt() {
    // SAFETY: `sti` takes effect behind the `hlt`, so an interrupt that is due ends it.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}
