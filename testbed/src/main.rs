//! A small SMP kernel that traces itself with `trapline-engine`: the worked example of docs/kernel.md, and the proof that the engine is at
//! home in a kernel, at 32 and 64 bit.
//!
//! QEMU boots it from a PVH note. CPU 0 pokes; the other CPUs run threads that call traced functions in normal context, in softirqs, in the
//! timer's interrupt and in NMIs, and that migrate between CPUs. What it finds goes to the serial port as lines of JSON, which `cargo xtask
//! kernel-test` reads and judges.
//!
//! | module | owns |
//! |---|---|
//! | [`boot`], [`paging`], [`apic`], [`serial`], [`heap`], [`cpu`] | the machine |
//! | [`thread`] | `thread_info` with the engine's state in it; the scheduler |
//! | [`trap`] | entries; the engine's view of a trap frame |
//! | [`host`] | the engine's view of this kernel |
//! | [`workload`], [`scenario`], [`options`] | what is run, and how it is judged |
//! | [`step`] | interruptions at every instruction of the trampolines |
//! | [`livepatch`] | functions that are replaced under tracers |
//! | [`graph`] | a trace of all calls, with their returns |
//!
//! Nothing in this crate or in the engine is traced: only the crate `traced` is compiled with room at its functions' entries.
#![no_std]
#![no_main]

extern crate alloc;

mod apic;
mod boot;
mod cpu;
mod graph;
mod heap;
mod host;
mod livepatch;
mod options;
mod paging;
mod scenario;
mod serial;
mod step;
mod thread;
mod trap;
mod workload;

use core::{
    panic::PanicInfo,
    sync::atomic::{AtomicUsize, Ordering},
};

/// Threads that no CPU starts in: there is always one to switch to.
const SPARE_THREADS: usize = 2;

/// CPUs that are up, besides the first.
static UP: AtomicUsize = AtomicUsize::new(0);

/// How many threads run the workload.
fn worker_threads() -> usize {
    host::OTHERS.load(Ordering::Relaxed) + SPARE_THREADS
}

/// The first Rust code of each CPU.
extern "C" fn start(id: usize) -> ! {
    if id == 0 { poke() } else { work(id) }
}

fn poke() -> ! {
    cpu::enter(0, &thread::all()[0]);
    trap::install();
    mask_legacy_interrupts();
    paging::protect();
    apic::enable();
    let options = options::read();
    trap::TIMER_TICKS.store(options.ticks, Ordering::Relaxed);
    if options.context_calls > 0 {
        trap::CONTEXT_CALLS.iter().for_each(|calls| calls.store(options.context_calls, Ordering::Relaxed));
    }
    if options.store_directly {
        paging::store_directly();
    }
    scenario::prepare_sites();
    let cpus = cpus();
    assert!((2..=cpu::MAX).contains(&cpus), "2 to {} CPUs are needed", cpu::MAX);
    host::OTHERS.store(cpus - 1, Ordering::Relaxed);
    for spare in 0..SPARE_THREADS {
        thread::spawn(cpus + spare);
    }
    apic::start_others();
    // Acquire: pairs with the Release in `work`.
    while UP.load(Ordering::Acquire) < cpus - 1 {
        core::hint::spin_loop();
    }
    scenario::run_all(&options);
    say!("{{\"event\":\"done\"}}");
    serial::exit(true)
}

fn work(id: usize) -> ! {
    cpu::enter(id, &thread::all()[id]);
    apic::enable();
    trap::arm_timer();
    UP.fetch_add(1, Ordering::Release);
    cpu::interrupts_on();
    workload::run()
}

/// How many CPUs the machine has, as QEMU's firmware configuration device tells.
fn cpus() -> usize {
    const SELECT: u16 = 0x510;
    const DATA: u16 = 0x511;
    const NUMBER_OF_CPUS: u16 = 5;
    // SAFETY: selecting an item of a device that nobody else uses.
    unsafe {
        core::arch::asm!("out dx, ax", in("dx") SELECT, in("ax") NUMBER_OF_CPUS, options(nomem, nostack, preserves_flags));
    }
    usize::from(serial::inb(DATA))
}

/// Masks everything at the two legacy interrupt controllers: the APIC's timer is all that is wanted.
fn mask_legacy_interrupts() {
    serial::outb(0x21, 0xff);
    serial::outb(0xa1, 0xff);
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    // The message may contain quotes; the reader takes the rest of the line.
    say!("\nPANIC {info}");
    serial::exit(false)
}
