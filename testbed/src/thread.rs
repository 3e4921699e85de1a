//! Threads, and the small preemptive scheduler that moves them between CPUs.
//!
//! Owns [`Thread`], the testbed's `thread_info`: among other things it holds the engine's [`ThreadState`]. There is one queue for all CPUs, so a
//! preempted thread goes on where it is picked up next, mostly on another CPU: with an emulated call pending, if it was preempted there.
//! Invariant: whoever switches holds the queue's lock across the switch, so that no CPU picks up a thread whose stack pointer is not
//! saved yet; the thread switched to releases it.

use core::{
    arch::naked_asm,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use trapline_engine::ThreadState;

use crate::{
    cpu,
    graph::Graph,
    step::Progress,
    workload::{self, Tally},
};

/// Slots a thread: one for each context that can interrupt another.
pub const SLOTS: usize = 4;

/// How many threads can be, those included that CPUs start in.
pub const MAX: usize = 8;
const STACK_BYTES: usize = 64 << 10;

/// Kinds of context; an NMI that interrupts an NMI counts on from [`NMI`].
pub const NORMAL: usize = 0;
/// Run on the way out of an interrupt, with interrupts on.
pub const SOFTIRQ: usize = 1;
/// The timer's interrupt.
pub const IRQ: usize = 2;
/// A non-maskable interrupt.
pub const NMI: usize = 3;
/// How many kinds are told apart.
pub const KINDS: usize = 8;

/// A thread's own data.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Thread {
    /// What the engine keeps of a thread.
    pub state: ThreadState<SLOTS>,
    /// Which kind of context runs.
    pub kind: AtomicUsize,
    /// The last pause between runs in which its normal context waited; see [`workload::pause`].
    pub parked_in: AtomicUsize,
    /// Which function is called next.
    pub next: AtomicUsize,
    /// How often it went on on another CPU than before.
    pub migrations: AtomicUsize,
    /// How often it did so with an emulated call pending in its slots.
    pub carried: AtomicUsize,
    /// Open frames of traced functions, and where they return to.
    pub graph: Graph,
    /// Where it is on its way from a breakpoint, in the scenario `step`.
    pub progress: Progress,
    last_cpu: AtomicUsize,
    saved_sp: AtomicUsize,
    /// What was counted, for each kind of context.
    pub tallies: [Tally; KINDS],
}

static THREADS: [Thread; MAX] = [const {
    Thread {
        state: ThreadState::new(),
        kind: AtomicUsize::new(NORMAL),
        parked_in: AtomicUsize::new(usize::MAX),
        next: AtomicUsize::new(0),
        migrations: AtomicUsize::new(0),
        carried: AtomicUsize::new(0),
        graph: Graph::new(),
        progress: Progress::new(),
        last_cpu: AtomicUsize::new(0),
        saved_sp: AtomicUsize::new(0),
        tallies: [const { Tally::new() }; KINDS],
    }
}; MAX];

impl Thread {
    /// Its number.
    pub fn index(&self) -> usize {
        ((&raw const *self).addr() - (&raw const THREADS).addr()) / size_of::<Self>()
    }
}

#[repr(C, align(64))]
struct Stack([u8; STACK_BYTES]);

static mut STACKS: [Stack; MAX] = [const { Stack([0; STACK_BYTES]) }; MAX];

/// All threads, those included that were never started.
pub fn all() -> &'static [Thread] {
    &THREADS
}

struct Queue {
    locked: AtomicBool,
    threads: [AtomicUsize; MAX],
    first: AtomicUsize,
    len: AtomicUsize,
}

static QUEUE: Queue = Queue {
    locked: AtomicBool::new(false),
    threads: [const { AtomicUsize::new(0) }; MAX],
    first: AtomicUsize::new(0),
    len: AtomicUsize::new(0),
};

impl Queue {
    fn lock(&self) {
        // Acquire: pairs with the Release in `unlock`.
        while self.locked.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
    }

    fn unlock(&self) {
        self.locked.store(false, Ordering::Release);
    }

    fn push(&self, thread: usize) {
        let len = self.len.load(Ordering::Relaxed);
        let at = (self.first.load(Ordering::Relaxed) + len) % MAX;
        self.threads[at].store(thread, Ordering::Relaxed);
        self.len.store(len + 1, Ordering::Relaxed);
    }

    fn pop(&self) -> Option<usize> {
        let len = self.len.load(Ordering::Relaxed).checked_sub(1)?;
        let first = self.first.load(Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.first.store((first + 1) % MAX, Ordering::Relaxed);
        Some(self.threads[first].load(Ordering::Relaxed))
    }
}

/// Makes a thread that runs the workload, to be picked up by any CPU. Before the others start.
pub fn spawn(index: usize) {
    // SAFETY: the thread does not run yet, and nobody else uses its stack.
    let stack = unsafe { &raw mut STACKS[index] };
    let top = stack.wrapping_add(1).cast::<usize>();
    // What `switch_stacks` pops: four callee-saved registers (six at 64 bit), and where it returns to.
    let saved = if cfg!(target_arch = "x86_64") { 6 } else { 4 };
    // SAFETY: within the stack.
    let entry = unsafe { top.sub(2) };
    // SAFETY: as above.
    unsafe { entry.write(first_instruction as *const () as usize) };
    let sp = entry.addr() - saved * size_of::<usize>();
    THREADS[index].saved_sp.store(sp, Ordering::Relaxed);
    QUEUE.push(index);
}

extern "C" fn first_instruction() -> ! {
    QUEUE.unlock();
    cpu::interrupts_on();
    workload::run()
}

/// Lets another thread run here, if one waits. With interrupts off and from normal context's interrupt only.
pub fn preempt() {
    let (cpu, me) = (cpu::this(), cpu::current());
    QUEUE.lock();
    if let Some(index) = QUEUE.pop() {
        let next = &THREADS[index];
        if next.last_cpu.swap(cpu.id(), Ordering::Relaxed) != cpu.id() {
            next.migrations.fetch_add(1, Ordering::Relaxed);
            if next.state.depth() > 0 {
                next.carried.fetch_add(1, Ordering::Relaxed);
            }
        }
        QUEUE.push(me.index());
        cpu.set_current(next);
        // SAFETY: `next` was taken from the queue, so its stack pointer is saved and no other CPU runs it.
        unsafe { switch_stacks(me.saved_sp.as_ptr(), next.saved_sp.load(Ordering::Relaxed)) };
    }
    QUEUE.unlock();
}

/// Saves the callee-saved registers and the stack pointer, and goes on with those of another thread.
#[unsafe(naked)]
unsafe extern "C" fn switch_stacks(save: *mut usize, load: usize) {
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret"
    );
    #[cfg(target_arch = "x86")]
    naked_asm!(
        "mov eax, [esp + 4]",
        "mov edx, [esp + 8]",
        "push ebx",
        "push ebp",
        "push esi",
        "push edi",
        "mov [eax], esp",
        "mov esp, edx",
        "pop edi",
        "pop esi",
        "pop ebp",
        "pop ebx",
        "ret"
    );
}
