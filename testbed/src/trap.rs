//! Trap entries: the breakpoint, whose frame the engine changes, and the interrupts, which make contexts.
//!
//! Owns the entry code and [`KernelFrame`], the engine's view of an interrupted context. Every trap runs on the stack that it interrupts. At
//! 64 bit the CPU pushes ss, sp, flags, cs, ip there; at 32 bit, within one privilege level, only flags, cs, ip: the interrupted stack
//! pointer is the end of the frame. Invariants: the breakpoint's handler runs with interrupts off; a breakpoint in NMI context returns
//! without IRET, which would let the next NMI in while the int3 trampoline still runs on behalf of this one.
//!
//! ```text
//! the breakpoint's stack       push (strategy `gap`, and on overflow): the frame moves down a word
//!   ...interrupted stack        ...interrupted stack
//!   [ss, sp,] flags, cs, ip     the pushed word          <- sp of the resumed context
//!   registers     <- frame      [ss, sp,] flags, cs, ip
//!   16 bytes of room            registers                <- frame, returned to the entry code
//!   handler's own               the rest of the room
//! ```

use core::{
    arch::naked_asm,
    ptr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use trapline_engine::{
    Addr,
    insn::{CALL_BYTES, Effect},
    trap::{Decision, Resume, Resumed, TrapFrame, TrapState, resume},
};

use crate::{
    apic, cpu, graph,
    host::OTHERS,
    paging, say,
    serial::exit,
    step::{self, Next},
    thread::{self, IRQ, KINDS, NMI, NORMAL, SOFTIRQ, Thread},
    workload,
};

/// Vector of the timer.
pub const TIMER_VECTOR: u8 = 0x40;
/// Vector of the IPI that makes a CPU serialise.
pub const SYNC_VECTOR: u8 = 0x41;
/// Vector of the IPI that tells the poking CPU that all others did.
pub const WAKE_VECTOR: u8 = 0x42;

/// What breakpoint handlers read.
pub static STATE: TrapState = TrapState::new();
/// CPUs that took the current sync IPI.
pub static SYNCED: AtomicUsize = AtomicUsize::new(0);
/// NMIs that were taken.
pub static NMIS: AtomicUsize = AtomicUsize::new(0);
/// How much later the timer interrupts again.
pub static TIMER_TICKS: AtomicUsize = AtomicUsize::new(200_000);
/// Calls of traced functions that an interrupt, a softirq and an NMI makes.
pub static CONTEXT_CALLS: [AtomicUsize; 3] = [AtomicUsize::new(2), AtomicUsize::new(4), AtomicUsize::new(1)];

/// What a run sets before it begins: how breakpoints resume.
#[derive(Debug)]
pub struct Settings {
    /// 0 to 3: [`Resume`] in the order of its variants.
    resume: AtomicUsize,
    /// Whether the CPU's slots are used, and not the thread's.
    pub per_cpu: AtomicBool,
    /// How many slots may be used.
    pub slot_limit: AtomicUsize,
    /// Whether a breakpoint in NMI context returns by IRET: the defect, to be shown.
    pub iret_in_nmi: AtomicBool,
    /// Whether a CPU with a pending call is preempted: the defect that `percpu` must avoid, to be shown.
    pub preempt_pending: AtomicBool,
    /// The engine's code that empties slots.
    pub int3_trampoline: AtomicUsize,
}

/// How breakpoints resume.
pub static SETTINGS: Settings = Settings {
    resume: AtomicUsize::new(0),
    per_cpu: AtomicBool::new(false),
    slot_limit: AtomicUsize::new(thread::SLOTS),
    iret_in_nmi: AtomicBool::new(false),
    preempt_pending: AtomicBool::new(false),
    int3_trampoline: AtomicUsize::new(0),
};

const STRATEGIES: [Resume; 4] = [Resume::Slots, Resume::Push, Resume::R11, Resume::Skip];

impl Settings {
    /// Sets the strategy.
    pub fn set_resume(&self, resume: Resume) {
        let index = STRATEGIES.iter().position(|known| *known == resume);
        self.resume.store(index.unwrap_or_default(), Ordering::Relaxed);
    }
}

/// What the entry code pushes, and the CPU before it.
#[cfg(target_arch = "x86_64")]
#[repr(C)]
#[derive(Debug)]
pub struct Registers {
    /// r15, r14, r13, r12, bp, bx.
    callee_saved: [usize; 6],
    r11: usize,
    /// r10, r9, r8, di, si, dx, cx, ax.
    caller_saved: [usize; 8],
    ip: usize,
    cs: usize,
    flags: usize,
    sp: usize,
    ss: usize,
}

/// What the entry code pushes, and the CPU before it.
#[cfg(target_arch = "x86")]
#[repr(C)]
#[derive(Debug)]
pub struct Registers {
    /// PUSHAD's order: di, si, bp, sp (ignored), bx, dx, cx, ax.
    general: [usize; 8],
    ip: usize,
    cs: usize,
    flags: usize,
}

/// An interrupted context: where its frame lies now.
struct KernelFrame {
    at: *mut Registers,
}

impl KernelFrame {
    fn registers(&self) -> &Registers {
        // SAFETY: the entry code handed over its frame, and it is moved within the stack only.
        unsafe { &*self.at }
    }

    fn registers_mut(&mut self) -> &mut Registers {
        // SAFETY: as above; the handler alone uses it.
        unsafe { &mut *self.at }
    }

    /// Moves the frame by whole words: down into the room that the entry code left, or up over what was popped.
    fn move_by(&mut self, bytes: isize) {
        let to = self.at.wrapping_byte_offset(bytes);
        // SAFETY: `copy` allows the overlap; the room below is two words and a frame is moved down once by one.
        unsafe { ptr::copy(self.at, to, 1) };
        self.at = to;
    }
}

impl TrapFrame for KernelFrame {
    #[cfg(target_arch = "x86_64")]
    fn sp(&self) -> Addr {
        Addr::new(self.registers().sp as u64)
    }

    /// The CPU pushed no stack pointer: it is where the frame ends.
    #[cfg(target_arch = "x86")]
    fn sp(&self) -> Addr {
        Addr::new(self.at.wrapping_add(1).addr() as u64)
    }

    #[cfg(target_arch = "x86_64")]
    fn set_sp(&mut self, sp: Addr) {
        let over = self.at.wrapping_add(1).addr().saturating_sub(sp.value() as usize);
        if over > 0 {
            self.move_by(-(over as isize));
        }
        self.registers_mut().sp = sp.value() as usize;
    }

    #[cfg(target_arch = "x86")]
    fn set_sp(&mut self, sp: Addr) {
        self.move_by(sp.distance_from(self.sp()) as isize);
    }

    fn set_ip(&mut self, ip: Addr) {
        self.registers_mut().ip = ip.value() as usize;
    }

    fn flags(&self) -> u64 {
        self.registers().flags as u64
    }

    #[cfg(target_arch = "x86_64")]
    fn set_r11(&mut self, value: Addr) {
        self.registers_mut().r11 = value.value() as usize;
    }

    #[cfg(target_arch = "x86")]
    fn set_r11(&mut self, _value: Addr) {
        die("there is no r11", self.registers().ip);
    }

    fn top_of_stack(&self) -> Addr {
        // SAFETY: the interrupted stack continues where the frame ends.
        Addr::new(unsafe { (self.sp().value() as usize as *const usize).read() } as u64)
    }

    fn push(&mut self, word: Addr) {
        let sp = self.sp().offset(-self.word_bytes());
        self.set_sp(sp);
        // SAFETY: the frame has made room for this word.
        unsafe { (sp.value() as usize as *mut usize).write(word.value() as usize) };
    }

    fn word_bytes(&self) -> i64 {
        size_of::<usize>() as i64
    }
}

/// The trap flag (SDM volume 3, section 19.3.2.3): a debug exception behind the next instruction.
const TRAP_FLAG: usize = 1 << 8;

/// Has the interrupted context go on as the scenario `step` wants it.
fn go_on(frame: &mut KernelFrame, next: Next) {
    let flags = &mut frame.registers_mut().flags;
    *flags = if next == Next::Step { *flags | TRAP_FLAG } else { *flags & !TRAP_FLAG };
    if next == Next::Interrupt {
        // Interrupts are off: it comes behind the IRET.
        apic::interrupt_self(TIMER_VECTOR);
    }
}

/// The debug exception. Returns whether the interrupted context takes an NMI now.
extern "C" fn debug(registers: *mut Registers) -> bool {
    let mut frame = KernelFrame { at: registers };
    let thread = cpu::current();
    let next = step::step(thread, thread.kind.load(Ordering::Relaxed), frame.registers().ip);
    go_on(&mut frame, next);
    next == Next::Nmi
}

/// The breakpoint. Returns where the frame is now; bit 0 asks for a return without IRET, bit 1 for an NMI before anything else.
extern "C" fn breakpoint(registers: *mut Registers) -> usize {
    let mut frame = KernelFrame { at: registers };
    let ip = frame.registers().ip;
    let thread = cpu::current();
    let kind = thread.kind.load(Ordering::Relaxed);
    let tally = &thread.tallies[kind];
    tally.traps.add(1);
    let decision = STATE.decide(
        Addr::new(ip as u64),
        |at| paging::text_byte(at.value() as usize),
        |effect| emulate(&mut frame, effect, thread),
    );
    match decision {
        Decision::Emulate(Resumed::Slot(index)) => tally.depth.raise_to(index + 1),
        Decision::Emulate(Resumed::Overflow) => tally.overflows.add(1),
        Decision::Emulate(Resumed::Skipped) => tally.skipped.add(1),
        Decision::Emulate(Resumed::Direct | Resumed::NotACall) => {}
        Decision::Rewind(site) => {
            tally.rewinds.add(1);
            frame.set_ip(site);
        }
        Decision::Foreign => die("a breakpoint that nobody set", ip),
    }
    let mut takes_nmi = false;
    if matches!(decision, Decision::Emulate(_)) {
        let next = step::begin(thread, kind, frame.registers().ip, ip - 1 + CALL_BYTES);
        if next != Next::Run {
            go_on(&mut frame, next);
            takes_nmi = next == Next::Nmi;
        }
    }
    let without_iret = kind >= NMI && !SETTINGS.iret_in_nmi.load(Ordering::Relaxed);
    frame.at.addr() | usize::from(without_iret) | usize::from(takes_nmi) << 1
}

fn emulate(frame: &mut KernelFrame, effect: Effect, thread: &Thread) -> Resumed {
    let strategy = STRATEGIES[SETTINGS.resume.load(Ordering::Relaxed) % STRATEGIES.len()];
    // Interrupts are off: this CPU's slots stay this CPU's until the trampoline has emptied the one taken here, because the scheduler
    // preempts no CPU with a pending slot.
    let slots = if SETTINGS.per_cpu.load(Ordering::Relaxed) { &cpu::this().state } else { &thread.state };
    let limit = SETTINGS.slot_limit.load(Ordering::Relaxed);
    let trampoline = Addr::new(SETTINGS.int3_trampoline.load(Ordering::Relaxed) as u64);
    resume(frame, effect, strategy, slots, limit, trampoline)
}

extern "C" fn timer(ip: usize) {
    let thread = cpu::current();
    let interrupted = thread.kind.swap(IRQ, Ordering::Relaxed);
    let outer = thread.state.enter_context();
    step::enter_context(thread, interrupted, IRQ, ip);
    work_in(IRQ, || call_in(IRQ));
    apic::end_of_interrupt();
    arm_timer();
    if interrupted == NORMAL {
        // Softirqs, on the way out of the interrupt.
        thread.kind.store(SOFTIRQ, Ordering::Relaxed);
        work_in(SOFTIRQ, || {
            cpu::interrupts_on();
            call_in(SOFTIRQ);
            cpu::interrupts_off();
        });
        // Whatever softirqs cost, the interrupted thread gets its time.
        arm_timer();
    }
    step::leave_context(thread, interrupted);
    thread.state.leave_context(outer);
    thread.kind.store(interrupted, Ordering::Relaxed);
    let may_preempt = cpu::this().state.depth() == 0 || SETTINGS.preempt_pending.load(Ordering::Relaxed);
    if interrupted == NORMAL && may_preempt {
        thread::preempt();
    }
}

/// Does what a context is there for, in a frame of its own if the run is traced. Whether there is a run is asked before there is a frame: a context that was
/// under way when the run began has none, and so makes no call that a trace would take for one of the context around it.
fn work_in(kind: usize, work: impl FnOnce()) {
    if workload::is_running() {
        let frame = graph::enter_context(kind);
        work();
        graph::leave_context(frame);
    }
}

/// Calls traced functions in a context of this kind, but normal.
fn call_in(kind: usize) {
    let index = [IRQ, SOFTIRQ, NMI].iter().position(|known| *known == kind).unwrap_or(2);
    workload::call_in(kind, CONTEXT_CALLS[index].load(Ordering::Relaxed));
}

/// Arms the timer, with a jitter that lets interrupts hit every place.
pub fn arm_timer() {
    let ticks = TIMER_TICKS.load(Ordering::Relaxed) as u32;
    apic::arm_timer(TIMER_VECTOR, ticks + (cpu::cycles() as u32 >> 4) % (ticks / 4));
}

extern "C" fn nmi(ip: usize) {
    NMIS.fetch_add(1, Ordering::Relaxed);
    let thread = cpu::current();
    let interrupted = thread.kind.load(Ordering::Relaxed);
    let kind = if interrupted >= NMI { (interrupted + 1).min(KINDS - 1) } else { NMI };
    thread.kind.store(kind, Ordering::Relaxed);
    let outer = thread.state.enter_context();
    step::enter_context(thread, interrupted, NMI, ip);
    work_in(kind, || call_in(kind));
    step::leave_context(thread, interrupted);
    thread.state.leave_context(outer);
    thread.kind.store(interrupted, Ordering::Relaxed);
}

/// The IRET behind this is the serialising instruction (SDM volume 3, section 9.3).
extern "C" fn sync(_ip: usize) {
    apic::end_of_interrupt();
    // Release: pairs with the Acquire in `KernelHost::sync_cores`.
    let synced = SYNCED.fetch_add(1, Ordering::Release) + 1;
    if synced == OTHERS.load(Ordering::Relaxed) {
        apic::interrupt_first(WAKE_VECTOR);
    }
}

/// Ends the `hlt` in which the poking CPU waits.
extern "C" fn wake(_ip: usize) {
    apic::end_of_interrupt();
}

extern "C" fn fault(ip: usize) -> ! {
    die("a fault", ip)
}

/// Reports what cannot be and ends the machine.
pub fn die(what: &str, ip: usize) -> ! {
    say!("\n{{\"event\":\"fault\",\"what\":\"{what}\",\"ip\":{ip},\"cpu\":{}}}", cpu::this().id());
    exit(false)
}

macro_rules! interrupt_entry {
    ($name:ident, $handler:path) => {
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            #[cfg(target_arch = "x86_64")]
            naked_asm!(
                "push rax", "push rcx", "push rdx", "push rsi", "push rdi", "push r8", "push r9", "push r10", "push r11",
                "cld",
                // The handler gets the interrupted ip. The CPU aligned the stack to 16 bytes and pushed five words; these are nine.
                "mov rdi, [rsp + 72]",
                "call {handler}",
                "pop r11", "pop r10", "pop r9", "pop r8", "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rax",
                "iretq",
                handler = sym $handler
            );
            #[cfg(target_arch = "x86")]
            naked_asm!(
                "pushad", "cld", "push dword ptr [esp + 32]", "call {handler}", "pop eax", "popad", "iretd",
                handler = sym $handler
            );
        }
    };
}

interrupt_entry!(timer_entry, timer);
interrupt_entry!(nmi_entry, nmi);
interrupt_entry!(sync_entry, sync);
interrupt_entry!(wake_entry, wake);

/// The breakpoint's entry: all registers, room for the frame to move, and two ways back.
#[unsafe(naked)]
unsafe extern "C" fn breakpoint_entry() {
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "push rax", "push rcx", "push rdx", "push rsi", "push rdi", "push r8", "push r9", "push r10", "push r11",
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "cld",
        "mov rdi, rsp",
        "sub rsp, 16",
        "call {handler}",
        "test al, 1",
        "jnz 2f",
        "test al, 2",
        "jnz 3f",
        "mov rsp, rax",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "pop r11", "pop r10", "pop r9", "pop r8", "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rax",
        "iretq",
        // Without IRET: ip, flags and rax go right below the interrupted stack pointer. That may overwrite the frame, so all of it is
        // read before.
        "2:",
        "lea rsp, [rax - 1]",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "pop r11", "pop r10", "pop r9", "pop r8", "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rax",
        "push rax", "push rbx", "push rcx", "push rdx",
        "mov rax, [rsp + 32 + 24]",
        "mov rbx, [rsp + 32]",
        "mov rcx, [rsp + 32 + 16]",
        "mov rdx, [rsp + 24]",
        "mov [rax - 8], rbx",
        "mov [rax - 16], rcx",
        "mov [rax - 24], rdx",
        "pop rdx", "pop rcx", "pop rbx",
        // rax still holds the interrupted stack pointer.
        "lea rsp, [rax - 24]",
        "pop rax", "popfq", "ret",
        // As if an NMI came before the first instruction of where it goes on.
        "3:",
        "lea rsp, [rax - 2]",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "pop r11", "pop r10", "pop r9", "pop r8", "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rax",
        "jmp {nmi}",
        handler = sym breakpoint,
        nmi = sym nmi_entry
    );
    #[cfg(target_arch = "x86")]
    naked_asm!(
        "pushad",
        "cld",
        "mov eax, esp",
        "sub esp, 12",
        "push eax",
        "call {handler}",
        "test al, 1",
        "jnz 2f",
        "test al, 2",
        "jnz 3f",
        "mov esp, eax",
        "popad",
        "iretd",
        // Without IRET: ip, cs, flags become flags and ip, in the two upper words, and a word that is dropped.
        "2:",
        "lea esp, [eax - 1]",
        "popad",
        "push eax",
        "mov eax, [esp + 12]",
        "mov [esp + 8], eax",
        "mov eax, [esp + 4]",
        "mov [esp + 12], eax",
        "pop eax",
        "lea esp, [esp + 4]",
        "popfd",
        "ret",
        // As if an NMI came before the first instruction of where it goes on.
        "3:",
        "lea esp, [eax - 2]",
        "popad",
        "jmp {nmi}",
        handler = sym breakpoint,
        nmi = sym nmi_entry
    );
}

/// The debug exception's entry: with the frame as it is, an NMI may follow.
#[unsafe(naked)]
unsafe extern "C" fn debug_entry() {
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "push rax", "push rcx", "push rdx", "push rsi", "push rdi", "push r8", "push r9", "push r10", "push r11",
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "cld",
        "mov rdi, rsp",
        "call {handler}",
        "test al, al",
        // Neither changes flags.
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "pop r11", "pop r10", "pop r9", "pop r8", "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rax",
        "jnz {nmi}",
        "iretq",
        handler = sym debug,
        nmi = sym nmi_entry
    );
    #[cfg(target_arch = "x86")]
    naked_asm!(
        "pushad",
        "cld",
        "push esp",
        "call {handler}",
        "pop ecx",
        "test al, al",
        "popad",
        "jnz {nmi}",
        "iretd",
        handler = sym debug,
        nmi = sym nmi_entry
    );
}

/// For exceptions without an error code.
#[unsafe(naked)]
unsafe extern "C" fn fault_entry() {
    #[cfg(target_arch = "x86_64")]
    naked_asm!("mov rdi, [rsp]", "and rsp, -16", "call {handler}", handler = sym fault);
    #[cfg(target_arch = "x86")]
    naked_asm!("push dword ptr [esp]", "call {handler}", handler = sym fault);
}

/// For exceptions with an error code.
#[unsafe(naked)]
unsafe extern "C" fn fault_code_entry() {
    #[cfg(target_arch = "x86_64")]
    naked_asm!("mov rdi, [rsp + 8]", "and rsp, -16", "call {handler}", handler = sym fault);
    #[cfg(target_arch = "x86")]
    naked_asm!("push dword ptr [esp + 4]", "call {handler}", handler = sym fault);
}

/// Fills the interrupt table.
pub fn install() {
    for vector in 0..32 {
        let with_code = matches!(vector, 8 | 10..=14 | 17 | 21);
        cpu::set_gate(vector, if with_code { fault_code_entry } else { fault_entry });
    }
    cpu::set_gate(1, debug_entry);
    cpu::set_gate(2, nmi_entry);
    cpu::set_gate(3, breakpoint_entry);
    cpu::set_gate(TIMER_VECTOR, timer_entry);
    cpu::set_gate(SYNC_VECTOR, sync_entry);
    cpu::set_gate(WAKE_VECTOR, wake_entry);
}
