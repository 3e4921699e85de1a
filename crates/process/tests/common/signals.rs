//! Signals as the tests need them: what the program asks libc for, and what the kernel has.

use std::{arch::asm, ffi::c_void, mem, ptr};

use libc::{c_int, siginfo_t};

/// A handler with details.
pub(crate) type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
/// A handler without.
pub(crate) type PlainHandler = extern "C" fn(c_int);

/// `SIG_DFL` or `SIG_IGN` as an action, or the address of a handler, with an empty mask.
pub(crate) fn action(disposition: libc::sighandler_t, flags: c_int) -> libc::sigaction {
    // SAFETY: all zero is a valid action.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = disposition;
    action.sa_flags = flags;
    action
}

/// The action that a handler with details is.
pub(crate) fn detailed(handler: Handler, flags: c_int) -> libc::sigaction {
    action(handler as usize, flags | libc::SA_SIGINFO)
}

/// The action that a handler without details is.
pub(crate) fn plain(handler: PlainHandler, flags: c_int) -> libc::sigaction {
    action(handler as usize, flags)
}

/// The same, blocking every signal while it runs.
pub(crate) fn blocking_all(mut action: libc::sigaction) -> libc::sigaction {
    action.sa_mask = full_set();
    action
}

/// Sets an action the usual way, and returns the one before.
pub(crate) fn set(signal: c_int, action: &libc::sigaction) -> libc::sigaction {
    let mut before = self::action(libc::SIG_DFL, 0);
    // SAFETY: both are live; the tests' handlers are sound whenever they run.
    let result = unsafe { libc::sigaction(signal, action, &raw mut before) };
    assert_eq!(result, 0);
    before
}

/// The action as the program is shown it.
pub(crate) fn shown(signal: c_int) -> libc::sigaction {
    let mut current = action(libc::SIG_DFL, 0);
    // SAFETY: null changes nothing; the other is a live local.
    let result = unsafe { libc::sigaction(signal, ptr::null(), &raw mut current) };
    assert_eq!(result, 0);
    current
}

/// `struct sigaction` of the kernel (`k_sigaction` in `include/linux/signal_types.h`), the same at either width but for the words.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct KernelAction {
    pub(crate) handler: usize,
    pub(crate) flags: usize,
    pub(crate) restorer: usize,
    pub(crate) mask: u64,
}

impl KernelAction {
    /// The one in force.
    pub(crate) fn of(signal: c_int) -> Self {
        let mut current = Self::default();
        // SAFETY: null changes nothing; the kernel stores its structure into a live local.
        let result = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, ptr::null::<Self>(), &raw mut current, size_of::<u64>())
        };
        assert_eq!(result, 0);
        current
    }

    /// A handler with details, with the way back that libc gives to its own.
    pub(crate) fn detailed(handler: Handler) -> Self {
        let spare = libc::SIGPWR;
        let before = set(spare, &detailed(handler, 0));
        let model = Self::of(spare);
        set(spare, &before);
        Self { handler: handler as usize, mask: 0, ..model }
    }

    /// Puts it into force behind libc's back.
    pub(crate) fn install(&self, signal: c_int) {
        // SAFETY: the structure is the kernel's; the tests' handlers are sound whenever they run.
        let result = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, ptr::from_ref(self), ptr::null::<Self>(), size_of::<u64>())
        };
        assert_eq!(result, 0);
    }
}

/// Every signal.
pub(crate) fn full_set() -> libc::sigset_t {
    // SAFETY: all zero is a valid set.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: a live local.
    unsafe { libc::sigfillset(&raw mut set) };
    set
}

/// Whether a set contains a signal.
pub(crate) fn contains(set: &libc::sigset_t, signal: c_int) -> bool {
    // SAFETY: the tests' sets were filled, by libc or by the kernel.
    unsafe { libc::sigismember(ptr::from_ref(set), signal) == 1 }
}

/// Replaces the calling thread's mask, and returns the one before.
pub(crate) fn set_mask(mask: &libc::sigset_t) -> libc::sigset_t {
    let mut before = *mask;
    // SAFETY: both sets are live.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, &raw mut before) };
    assert_eq!(result, 0);
    before
}

/// Whether the calling thread blocks a signal, as the program is shown it.
pub(crate) fn is_shown_blocked(signal: c_int) -> bool {
    let mut mask = full_set();
    // SAFETY: null changes nothing; the other is a live local.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut mask) };
    assert_eq!(result, 0);
    contains(&mask, signal)
}

/// Whether the calling thread blocks a signal, as the kernel sees it.
pub(crate) fn is_blocked(signal: c_int) -> bool {
    let mut mask = 0_u64;
    // SAFETY: null changes nothing; the kernel stores eight bytes into a live local.
    let result = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, ptr::null::<u64>(), &raw mut mask, size_of::<u64>())
    };
    assert_eq!(result, 0);
    mask >> (signal - 1) & 1 == 1
}

/// Sends a signal to the calling thread: its handler has run when this returns, unless the signal is blocked.
pub(crate) fn raise(signal: c_int) {
    // SAFETY: takes a number; the tests' handlers are sound wherever they run.
    let result = unsafe { libc::raise(signal) };
    assert_eq!(result, 0);
}

/// The calling thread as others address it.
pub(crate) fn own_tid() -> libc::pid_t {
    // SAFETY: takes nothing and always succeeds.
    unsafe { libc::gettid() }
}

/// Sends a signal to a thread of this process. `false` if its queue is full.
pub(crate) fn send(tid: libc::pid_t, signal: c_int) -> bool {
    // SAFETY: takes nothing and always succeeds.
    let process = unsafe { libc::getpid() };
    // SAFETY: takes numbers; the tests' handlers are sound wherever they run.
    unsafe { libc::syscall(libc::SYS_tgkill, process, tid, signal) == 0 }
}

/// Executes a breakpoint that is none of trapline's.
#[inline(never)]
pub(crate) fn breakpoint() {
    // SAFETY: the tests that use it have a handler, or mean to end here.
    unsafe { asm!("int3") };
}

/// The calling thread's errno.
pub(crate) fn errno() -> c_int {
    // SAFETY: returns a pointer to the thread's own variable.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: valid as long as the thread.
    unsafe { place.read() }
}

/// Sets it.
pub(crate) fn set_errno(value: c_int) {
    // SAFETY: returns a pointer to the thread's own variable.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: valid as long as the thread.
    unsafe { place.write(value) };
}

/// Gives the calling thread an alternate signal stack, or takes the one away that Rust gives its threads. For tests that end with the thread.
pub(crate) fn set_alternate_stack(memory: Option<&'static mut [u8]>) {
    let stack = match memory {
        Some(memory) => libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() },
        None => libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 },
    };
    // SAFETY: the memory lives for ever and nobody else uses it.
    let result = unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) };
    assert_eq!(result, 0);
}
