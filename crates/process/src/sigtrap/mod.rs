//! SIGTRAP: the breakpoint handler of the own process, and whoever else wants the signal.
//!
//! Owns the handler, what it reads (the engine's [`TrapState`], the [`Resume`] strategy), its counters, and the *chain*: the action for SIGTRAP
//! that the program had before, or asked for later. Neighbours: the engine decides and resumes ([`trap`](trapline_engine::trap)); [`frame`]
//! wraps the kernel's signal frame; [`interpose`](crate::interpose) brings later actions. Invariant: the handler allocates, locks and panics
//! nowhere, keeps errno, and every trap that is not ours reaches the chain as the kernel would have delivered it.
//!
//! The handler runs on the alternate stack where a thread has one (small stacks, Go), with every signal blocked: what arrives meanwhile is delivered at
//! the first instruction of the int3 trampoline, which is where the slots are for.

mod action;
mod frame;

use std::{
    io, ptr,
    sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
};

pub(crate) use action::{Action, ActionCell, Disposition, libc_sigaction};
use frame::SignalFrame;
pub(crate) use frame::interrupted;
use trapline_engine::{
    Addr,
    trap::{Decision, Resume, Resumed, TrapFrame, TrapState, resume},
};

use crate::{error::HostError, thread};

/// What the handler and the engine share.
pub(crate) static TRAPS: TrapState = TrapState::new();

/// The program's own action for SIGTRAP.
pub(crate) static CHAIN: ActionCell = ActionCell::new();

static STRATEGY: AtomicU8 = AtomicU8::new(0);
static SLOT_LIMIT: AtomicUsize = AtomicUsize::new(thread::SLOTS);
static INT3_TRAMPOLINE: AtomicU64 = AtomicU64::new(0);

/// What the breakpoint handler has done since the tracer was made. Counted for the whole process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TrapStats {
    /// Breakpoints of ours.
    pub traps: u64,
    /// Of those, late ones: the site was whole again and was executed.
    pub rewound: u64,
    /// The greatest number of slots in use in a thread.
    pub max_depth: u64,
    /// Calls for which no slot was left, pushed to the interrupted stack instead.
    pub overflows: u64,
    /// Calls left out by [`Resume::Skip`].
    pub skipped: u64,
    /// Breakpoints and other SIGTRAPs that were not ours.
    pub chained: u64,
}

#[derive(Default)]
struct Counters {
    traps: AtomicU64,
    rewound: AtomicU64,
    max_depth: AtomicU64,
    overflows: AtomicU64,
    skipped: AtomicU64,
    chained: AtomicU64,
}

static COUNTERS: Counters = Counters {
    traps: AtomicU64::new(0),
    rewound: AtomicU64::new(0),
    max_depth: AtomicU64::new(0),
    overflows: AtomicU64::new(0),
    skipped: AtomicU64::new(0),
    chained: AtomicU64::new(0),
};

/// The counters as they are now.
pub(crate) fn stats() -> TrapStats {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    TrapStats {
        traps: read(&COUNTERS.traps),
        rewound: read(&COUNTERS.rewound),
        max_depth: read(&COUNTERS.max_depth),
        overflows: read(&COUNTERS.overflows),
        skipped: read(&COUNTERS.skipped),
        chained: read(&COUNTERS.chained),
    }
}

/// Sets what traps do from now on, and counts from zero. Called before the first site is poked.
pub(crate) fn configure(strategy: Resume, slot_limit: usize, int3_trampoline: Addr) {
    let Counters { traps, rewound, max_depth, overflows, skipped, chained } = &COUNTERS;
    for counter in [traps, rewound, max_depth, overflows, skipped, chained] {
        counter.store(0, Ordering::Relaxed);
    }
    let number = ALL_STRATEGIES.iter().position(|known| *known == strategy).unwrap_or(0);
    STRATEGY.store(u8::try_from(number).unwrap_or(0), Ordering::Relaxed);
    SLOT_LIMIT.store(slot_limit.min(thread::SLOTS), Ordering::Relaxed);
    INT3_TRAMPOLINE.store(int3_trampoline.value(), Ordering::Relaxed);
}

const ALL_STRATEGIES: [Resume; 4] = [Resume::Slots, Resume::Push, Resume::R11, Resume::Skip];

/// Installs the handler if the kernel's action for SIGTRAP is another one, which becomes the chain. Somebody may have set it by a way that is not
/// interposed, so every batch begins with this.
pub(crate) fn ensure_installed() -> Result<(), HostError> {
    let current = Action::of_kernel(libc::SIGTRAP).map_err(HostError::Sigaction)?;
    if current.is_handler(handler_address()) {
        return Ok(());
    }
    CHAIN.store(current);
    install(current).map_err(HostError::Sigaction)
}

/// Makes `action` the program's own, and returns the one before.
pub(crate) fn replace_chain(action: Action) -> io::Result<Action> {
    let before = CHAIN.store(action);
    install(action)?;
    Ok(before)
}

/// Gives the kernel our handler. A SIGTRAP that is sent interrupts system calls if the `chained` action says so.
fn install(chained: Action) -> io::Result<()> {
    let restart = if chained.interrupts_calls() { 0 } else { libc::SA_RESTART };
    Action::handler(handler_address(), libc::SA_SIGINFO | libc::SA_ONSTACK | restart).give_to_kernel(libc::SIGTRAP)
}

/// Whether the kernel delivers SIGTRAP to trapline. Between batches somebody may have taken it by a way that is not interposed.
pub fn sigtrap_is_ours() -> bool {
    Action::of_kernel(libc::SIGTRAP).is_ok_and(|action| action.is_handler(handler_address()))
}

/// Gives SIGTRAP back to the chain, if it is still ours.
pub(crate) fn uninstall() -> io::Result<()> {
    if sigtrap_is_ours() { CHAIN.load().give_to_kernel(libc::SIGTRAP) } else { Ok(()) }
}

fn handler_address() -> usize {
    on_sigtrap as *const () as usize
}

/// The SIGTRAP handler.
extern "C" fn on_sigtrap(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: glibc keeps errno at a fixed place in the thread's static TLS.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the pointer is the calling thread's errno.
    let saved_errno = unsafe { errno.read() };
    // SAFETY: the kernel called this handler with SA_SIGINFO, so `info` and `context` are those of a signal frame on this stack, which nobody else
    // touches until the handler returns.
    let mut frame = unsafe { SignalFrame::new(info, context.cast()) };
    if !handle(&mut frame) {
        COUNTERS.chained.fetch_add(1, Ordering::Relaxed);
        chain(signal, info, context, &frame);
    }
    // SAFETY: as above.
    unsafe { errno.write(saved_errno) };
    frame.leave();
}

/// Handles a trap of ours; `false` if it is none.
fn handle(frame: &mut SignalFrame) -> bool {
    if !frame.is_breakpoint() {
        return false;
    }
    let byte_at = |at: Addr| {
        #[expect(clippy::cast_possible_truncation, reason = "an address of the own process")]
        let byte = ptr::with_exposed_provenance::<u8>(at.value() as usize);
        // SAFETY: asked only for sites, which are readable text. Volatile: another thread may be poking it.
        unsafe { byte.read_volatile() }
    };
    let strategy = ALL_STRATEGIES[usize::from(STRATEGY.load(Ordering::Relaxed)) % ALL_STRATEGIES.len()];
    let limit = SLOT_LIMIT.load(Ordering::Relaxed);
    let int3_trampoline = Addr::new(INT3_TRAMPOLINE.load(Ordering::Relaxed));
    let decision = TRAPS.decide(frame.ip(), byte_at, |effect| {
        thread::with_current(|thread| resume(frame, effect, strategy, &thread.state, limit, int3_trampoline))
    });
    let resumed = match decision {
        Decision::Emulate(resumed) => resumed,
        Decision::Rewind(site) => {
            frame.set_ip(site);
            COUNTERS.rewound.fetch_add(1, Ordering::Relaxed);
            Resumed::NotACall
        }
        Decision::Foreign => return false,
    };
    COUNTERS.traps.fetch_add(1, Ordering::Relaxed);
    match resumed {
        Resumed::Slot(index) => drop(COUNTERS.max_depth.fetch_max(index as u64 + 1, Ordering::Relaxed)),
        Resumed::Overflow => drop(COUNTERS.overflows.fetch_add(1, Ordering::Relaxed)),
        Resumed::Skipped => drop(COUNTERS.skipped.fetch_add(1, Ordering::Relaxed)),
        Resumed::Direct | Resumed::NotACall => {}
    }
    true
}

/// Does for the program's own action what the kernel would have done.
fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, frame: &SignalFrame) {
    let action = CHAIN.load();
    match action.disposition() {
        // The kernel ignores SIGTRAP when it is sent, not when an instruction raises it (force_sig).
        Disposition::Ignore if frame.was_sent() => {}
        Disposition::Default | Disposition::Ignore => {
            // Raised again with the default action, it takes effect when this handler returns: the core dump shows the trapped instruction.
            if Action::DEFAULT.give_to_kernel(signal).is_ok() {
                // SAFETY: raising a signal has no memory arguments.
                unsafe { libc::raise(signal) };
            }
        }
        Disposition::Handler => {
            if action.resets() {
                CHAIN.store(Action::DEFAULT);
            }
            // The program's handler may call traced functions, so SIGTRAP stays unblocked whatever it asked for.
            let mask = action.mask_on_top_of(frame.mask()).without(libc::SIGTRAP);
            let during_ours = crate::sys::signal::replace_mask(mask);
            // SAFETY: the kernel passed the context to the handler that called this.
            let interrupted = unsafe { interrupted(context.cast()) };
            thread::with_current(|thread| {
                thread.in_new_context(interrupted, || {
                    // SAFETY: the program registered this function for SIGTRAP with these flags; it gets the arguments that the kernel made.
                    unsafe { action.call(signal, info, context) };
                });
            });
            crate::sys::signal::replace_mask(during_ours);
        }
    }
}
