//! Signal functions of libc, so that SIGTRAP stays deliverable and signal handlers are known as contexts.
//!
//! Owns `sigaction`, `signal`, `pthread_sigmask` and `sigprocmask`: definitions in the executable come before libc's for every object of the
//! process. While a tracer runs:
//!
//! - an action for SIGTRAP becomes the chain of our handler, and is shown when asked for;
//! - SIGTRAP is taken out of the masks that threads set and that handlers run with (a thread that blocks it is killed by an int3), and shown as
//!   blocked where it was asked for;
//! - handlers are called through [`on_signal`], which unblocks SIGTRAP (`sigsuspend`, `ppoll` and their kin leave their mask to a handler) and tells
//!   the engine that another context runs, so that a handler that interrupts a callback is not taken for the callback's recursion.
//!
//! Without a tracer they pass everything through. Invariant: the program sees the actions and masks that it has set; only a new thread does not know
//! that its creator asked for SIGTRAP to be blocked. What comes by another way (`rt_sigaction` by hand) is not seen here; a replaced
//! SIGTRAP handler is noticed when the next batch begins.

use std::{
    io, ptr,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering},
};

use crate::{
    quiesce::Tid,
    sigtrap::{self, Action, ActionCell, CHAIN, Disposition, libc_sigaction},
    sys::{signal::SignalSet, syscall::syscall, task::own_tid},
    thread,
};

/// Signals 1 to 64 (`_NSIG` of the kernel).
const SIGNALS: usize = 64;

static ACTIVE: AtomicBool = AtomicBool::new(false);

/// What the program asked for, for each signal whose kernel action is another.
static ACTIONS: [ActionCell; SIGNALS] = [const { ActionCell::new() }; SIGNALS];

/// Bit n - 1: the kernel's action for signal n is [`on_signal`], and the program's is in [`ACTIONS`].
static WRAPPED: AtomicU64 = AtomicU64::new(0);

/// The threads that blocked SIGTRAP before the tracer, which has unblocked it. Signal handlers read it too, so it is never freed.
static MENDED: AtomicPtr<Vec<Tid>> = AtomicPtr::new(ptr::null_mut());

/// A value of [`Thread::sigtrap_mask`](crate::thread::Thread): nothing was asked for while there was a tracer. What the kernel has is right, unless
/// the thread was [`MENDED`].
const AS_KERNEL: u8 = 0;
/// The thread asked for SIGTRAP to be blocked.
const BLOCKED: u8 = 1;
/// It asked for it not to be.
const NOT_BLOCKED: u8 = 2;

/// Says which threads have SIGTRAP unblocked behind their backs.
pub(crate) fn will_mend(threads: Vec<Tid>) {
    // Release: pairs with the Acquire in `is_mended`.
    MENDED.store(Box::into_raw(Box::new(threads)), Ordering::Release);
}

fn cell(signal: libc::c_int) -> Option<&'static ActionCell> {
    ACTIONS.get(usize::try_from(signal).ok()?.checked_sub(1)?)
}

fn is_wrapped(signal: libc::c_int) -> bool {
    SignalSet::from_bits(WRAPPED.load(Ordering::Acquire)).contains(signal)
}

fn set_wrapped(signal: libc::c_int, wrapped: bool) {
    let bit = SignalSet::EMPTY.with(signal).bits();
    // Release: pairs with the Acquire above; the program's action is in its cell before the bit says so.
    if wrapped {
        WRAPPED.fetch_or(bit, Ordering::Release)
    } else {
        WRAPPED.fetch_and(!bit, Ordering::Release)
    };
}

/// Begins to interpose: takes the handlers over that the program has now.
pub(crate) fn start() {
    ACTIVE.store(true, Ordering::SeqCst);
    for signal in program_signals() {
        if let Ok(action) = Action::of_kernel(signal)
            && action.disposition() == Disposition::Handler
            // A tracer that had to leave its handlers behind has wrapped them already.
            && !action.is_handler(wrapper_address())
        {
            let _ = set_action(signal, action);
        }
    }
}

/// Ends it: the kernel gets the program's own actions.
pub(crate) fn stop() {
    ACTIVE.store(false, Ordering::SeqCst);
    for signal in program_signals().filter(|signal| is_wrapped(*signal)) {
        if let Some(cell) = cell(signal)
            && Action::of_kernel(signal).is_ok_and(|action| action.is_handler(wrapper_address()))
            && cell.load().give_to_kernel(signal).is_ok()
        {
            set_wrapped(signal, false);
        }
    }
}

/// All but SIGTRAP, which has a handler of its own, the two that cannot be handled, and the two that glibc keeps to itself.
fn program_signals() -> impl Iterator<Item = libc::c_int> {
    (1..=64).filter(|signal| ![libc::SIGTRAP, libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(signal))
}

/// What stands for the program's handlers in the kernel.
extern "C" fn on_signal(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(cell) = cell(signal) else { return };
    let action = cell.load();
    if action.disposition() != Disposition::Handler {
        // Replaced between the kernel's decision and this line.
        return;
    }
    if action.resets() {
        cell.store(Action::DEFAULT);
        set_wrapped(signal, false);
    }
    unblock_sigtrap();
    // SAFETY: the kernel passed the context to this handler.
    let interrupted = unsafe { sigtrap::interrupted(context.cast()) };
    thread::with_current(|thread| {
        thread.in_new_context(interrupted, || {
            // SAFETY: the program registered this handler for this signal with these flags; it gets the arguments that the kernel made.
            unsafe { action.call(signal, info, context) };
        });
    });
}

/// For the time of a handler: the kernel puts the interrupted mask back.
fn unblock_sigtrap() {
    let set = SignalSet::EMPTY.with(libc::SIGTRAP);
    let how = libc::SIG_UNBLOCK.cast_unsigned() as usize;
    // SAFETY: the kernel reads one set, a live local, and stores none. With valid arguments the call cannot fail.
    let _ = unsafe { syscall(libc::SYS_rt_sigprocmask, [how, &raw const set as usize, 0, size_of::<SignalSet>()]) };
}

fn wrapper_address() -> usize {
    on_signal as *const () as usize
}

/// Gives the kernel what stands for `action`.
fn set_action(signal: libc::c_int, action: Action) -> io::Result<()> {
    let kernel = action.without_blocking(libc::SIGTRAP);
    let is_handler = action.disposition() == Disposition::Handler;
    let Some(cell) = cell(signal).filter(|_| is_handler) else {
        kernel.give_to_kernel(signal)?;
        set_wrapped(signal, false);
        return Ok(());
    };
    let previous = cell.store(action);
    set_wrapped(signal, true);
    kernel.with_handler(wrapper_address()).give_to_kernel(signal).inspect_err(|_| {
        cell.store(previous);
    })
}

/// The action that the program believes `signal` to have.
fn shown_action(signal: libc::c_int) -> io::Result<Action> {
    let kernel = Action::of_kernel(signal)?;
    match cell(signal) {
        Some(cell) if is_wrapped(signal) && kernel.is_handler(wrapper_address()) => Ok(cell.load()),
        _ => Ok(kernel),
    }
}

fn fail(error: &io::Error) -> libc::c_int {
    // SAFETY: glibc keeps errno at a fixed place in the thread's static TLS.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the pointer is the calling thread's errno.
    unsafe { errno.write(error.raw_os_error().unwrap_or(libc::EINVAL)) };
    -1
}

/// sigaction(2), as the program sees it.
///
/// # Safety
/// As libc's: each pointer is null or good for a `struct sigaction`.
#[unsafe(no_mangle)]
unsafe extern "C" fn sigaction(
    signal: libc::c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> libc::c_int {
    if !ACTIVE.load(Ordering::Acquire) {
        // SAFETY: the caller's arguments are passed on as they are.
        return unsafe { libc_sigaction(signal, new, old) };
    }
    // SAFETY: the caller vouches for the pointer.
    let new = unsafe { new.as_ref() }.map(Action::from_libc);
    match exchange_action(signal, new) {
        Err(error) => fail(&error),
        Ok(previous) => {
            if !old.is_null() {
                // SAFETY: the caller vouches for the pointer.
                unsafe { old.write(previous.to_libc()) };
            }
            0
        }
    }
}

fn exchange_action(signal: libc::c_int, new: Option<Action>) -> io::Result<Action> {
    if !ACTIVE.load(Ordering::Acquire) {
        let previous = Action::of_kernel(signal)?;
        if let Some(new) = new {
            new.give_to_kernel(signal)?;
        }
        return Ok(previous);
    }
    if signal == libc::SIGTRAP {
        return new.map_or_else(|| Ok(CHAIN.load()), sigtrap::replace_chain);
    }
    let previous = shown_action(signal)?;
    if let Some(new) = new {
        set_action(signal, new)?;
    }
    Ok(previous)
}

/// signal(3) with BSD semantics, as glibc's: the handler stays, and system calls are restarted.
///
/// # Safety
/// As libc's: `handler` is `SIG_DFL`, `SIG_IGN`, or a function.
#[unsafe(no_mangle)]
unsafe extern "C" fn signal(signal: libc::c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    let result = if handler == libc::SIG_ERR {
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    } else {
        // A number that is no signal's is in no set, and the kernel refuses it.
        exchange_action(signal, Some(Action::bsd(handler, SignalSet::EMPTY.with(signal))))
    };
    match result {
        Err(error) => {
            fail(&error);
            libc::SIG_ERR
        }
        Ok(previous) => previous.to_libc().sa_sigaction,
    }
}

/// Changes the calling thread's mask, but never blocks SIGTRAP; returns the mask before, as the thread believes it to have been.
fn exchange_mask(how: libc::c_int, set: Option<SignalSet>) -> Result<SignalSet, libc::c_int> {
    let active = ACTIVE.load(Ordering::Acquire);
    // glibc keeps signals 32 and 33 to itself (sysdeps/unix/sysv/linux/internal-signals.h).
    let kernel_set = set.map(|set| set.without(32).without(33));
    let kernel_set = if active { kernel_set.map(|set| set.without(libc::SIGTRAP)) } else { kernel_set };
    let mut before = SignalSet::EMPTY;
    let set_at = kernel_set.as_ref().map_or(0, |set| std::ptr::from_ref(set) as usize);
    let arguments = [how.cast_unsigned() as usize, set_at, &raw mut before as usize, size_of::<SignalSet>()];
    // SAFETY: the kernel reads one set, or none, and stores one; both are live locals.
    unsafe { syscall(libc::SYS_rt_sigprocmask, arguments) }.map_err(|error| error.0)?;
    let wanted = set.and_then(|set| match (how, set.contains(libc::SIGTRAP)) {
        (libc::SIG_BLOCK, true) => Some(true),
        (libc::SIG_UNBLOCK, true) => Some(false),
        (libc::SIG_SETMASK, blocked) => Some(blocked),
        _ => None,
    });
    let asked_for = thread::with_current(|thread| match wanted {
        // Without a tracer the kernel does as it is told.
        Some(_) if !active => thread.sigtrap_mask.swap(AS_KERNEL, Ordering::Relaxed),
        Some(true) => thread.sigtrap_mask.swap(BLOCKED, Ordering::Relaxed),
        Some(false) => thread.sigtrap_mask.swap(NOT_BLOCKED, Ordering::Relaxed),
        None => thread.sigtrap_mask.load(Ordering::Relaxed),
    });
    let was_blocked = asked_for == BLOCKED || (asked_for == AS_KERNEL && active && is_mended());
    Ok(if was_blocked { before.with(libc::SIGTRAP) } else { before })
}

/// Whether the calling thread is one of the [`MENDED`].
fn is_mended() -> bool {
    // Acquire: pairs with the Release in `will_mend`.
    let mended = MENDED.load(Ordering::Acquire);
    // SAFETY: null, or from `Box::into_raw`, and never freed.
    unsafe { mended.as_ref() }.is_some_and(|mended| mended.contains(&own_tid()))
}

/// # Safety
/// Each pointer is null or good for a `sigset_t`.
unsafe fn exchange_libc_mask(
    how: libc::c_int,
    set: *const libc::sigset_t,
    old: *mut libc::sigset_t,
) -> Result<(), libc::c_int> {
    // SAFETY: the caller vouches for the pointer; a sigset_t begins with the kernel's 64 bits.
    let set = unsafe { set.cast::<SignalSet>().as_ref() }.copied();
    let before = exchange_mask(how, set)?;
    if !old.is_null() {
        // SAFETY: the caller vouches for the pointer; the rest of the set stands for signals that do not exist.
        unsafe { old.cast::<SignalSet>().write(before) };
    }
    Ok(())
}

/// `pthread_sigmask(3)`, as the program sees it.
///
/// # Safety
/// As libc's: each pointer is null or good for a `sigset_t`.
#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_sigmask(
    how: libc::c_int,
    set: *const libc::sigset_t,
    old: *mut libc::sigset_t,
) -> libc::c_int {
    // SAFETY: the caller vouches for the pointers.
    unsafe { exchange_libc_mask(how, set, old) }.err().unwrap_or(0)
}

/// sigprocmask(2), as the program sees it.
///
/// # Safety
/// As libc's: each pointer is null or good for a `sigset_t`.
#[unsafe(no_mangle)]
unsafe extern "C" fn sigprocmask(
    how: libc::c_int,
    set: *const libc::sigset_t,
    old: *mut libc::sigset_t,
) -> libc::c_int {
    // SAFETY: the caller vouches for the pointers.
    match unsafe { exchange_libc_mask(how, set, old) } {
        Ok(()) => 0,
        Err(error) => fail(&io::Error::from_raw_os_error(error)),
    }
}
