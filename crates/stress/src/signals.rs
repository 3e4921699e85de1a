//! Interruptions: signals, the timers that send them, and the stacks that their handlers run on.
//!
//! Owns the system calls, each behind a type that undoes its effect when dropped: [`Handlers`] (of the process), [`Timer`], [`AlternateStack`]
//! (of the calling thread). What handlers *do* is the [`worker`](crate::worker)'s affair. Invariant: after the last of them
//! is dropped, the process and its threads are as they were.

use std::{
    io,
    mem::{self, MaybeUninit},
    ptr,
    time::Duration,
};

use libc::{c_int, c_void, siginfo_t};

/// How many signals there are. Each may interrupt the others' handlers but not its own, so this is how deep they nest.
pub(crate) const SIGNALS: usize = 3;
/// The handler of this one runs on the alternate stack, and whatever interrupts it there. It is raised by the first one's handler and raises
/// the third one, so stacks are changed in the middle of the nesting.
const ON_ALTERNATE_STACK: usize = 1;

/// Room for nested frames of several KiB each: a signal frame holds all vector registers.
const ALTERNATE_STACK_BYTES: usize = 128 << 10;

/// A signal handler with details.
pub(crate) type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// The number of the signal with this index. Real-time signals: nobody else sends them.
pub(crate) fn number(index: usize) -> c_int {
    // glibc keeps the first ones to itself, debuggers and runtimes like the next.
    libc::SIGRTMIN() + 8 + c_int::try_from(index).unwrap_or(0)
}

/// The index of the signal with this number.
pub(crate) fn index(number: c_int) -> Option<usize> {
    (0..SIGNALS).find(|index| self::number(*index) == number)
}

fn checked(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the function initialises what the pointer, to a live local, points to.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised above.
    unsafe { set.assume_init() }
}

/// The actions of the process for the signals.
pub(crate) struct Handlers {
    before: Vec<(c_int, libc::sigaction)>,
}

impl Handlers {
    /// Installs `handler` for all of them. It may be interrupted by any signal but the one that it handles.
    ///
    /// # Safety
    /// `handler` must keep to what is allowed in signal handlers, in whatever thread gets a signal.
    pub(crate) unsafe fn install(handler: Handler) -> io::Result<Self> {
        let mut handlers = Self { before: Vec::new() };
        for index in 0..SIGNALS {
            // SAFETY: all zero is a valid action: plain integers, and a handler that is null, SIG_DFL.
            let mut action: libc::sigaction = unsafe { mem::zeroed() };
            action.sa_sigaction = handler as usize;
            action.sa_mask = empty_set();
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            if index == ON_ALTERNATE_STACK {
                action.sa_flags |= libc::SA_ONSTACK;
            }
            let mut before = action;
            // SAFETY: both pointers are to live locals; the caller vouches for the handler.
            checked(unsafe { libc::sigaction(number(index), &raw const action, &raw mut before) })?;
            handlers.before.push((number(index), before));
        }
        Ok(handlers)
    }
}

impl Drop for Handlers {
    fn drop(&mut self) {
        for (number, before) in &self.before {
            // SAFETY: the pointer is to a live action that was in force before.
            unsafe { libc::sigaction(*number, before, ptr::null_mut()) };
        }
    }
}

/// A timer that sends a signal to the thread that started it.
pub(crate) struct Timer(libc::timer_t);

impl Timer {
    /// Sends the signal with this index every `period`. If the thread is slower it gets fewer of them, they do not pile up.
    pub(crate) fn start(index: usize, period: Duration) -> io::Result<Self> {
        // SAFETY: all zero is a valid event: plain integers.
        let mut event: libc::sigevent = unsafe { mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = number(index);
        // SAFETY: takes nothing and cannot fail.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = MaybeUninit::uninit();
        // SAFETY: both pointers are to live locals.
        checked(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, timer.as_mut_ptr()) })?;
        // SAFETY: initialised, since the call succeeded.
        let timer = Self(unsafe { timer.assume_init() });
        // SAFETY: all zero is a valid setting.
        let mut setting: libc::itimerspec = unsafe { mem::zeroed() };
        setting.it_interval.tv_nsec = nanoseconds(period);
        setting.it_interval.tv_sec = period.as_secs().try_into().unwrap_or(libc::time_t::MAX);
        setting.it_value = setting.it_interval;
        // SAFETY: the timer exists, and the pointer is to a live local.
        checked(unsafe { libc::timer_settime(timer.0, 0, &raw const setting, ptr::null_mut()) })?;
        Ok(timer)
    }
}

/// What is left beside whole seconds.
#[cfg_attr(target_pointer_width = "32", expect(clippy::useless_conversion, reason = "`c_long` is wider elsewhere"))]
fn nanoseconds(period: Duration) -> libc::c_long {
    period.subsec_nanos().cast_signed().into()
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer exists.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// The calling thread's alternate stack.
pub(crate) struct AlternateStack {
    before: libc::stack_t,
    _memory: Option<Box<[MaybeUninit<u8>]>>,
}

impl AlternateStack {
    /// Gives the calling thread one. Drop it in the same thread, outside of handlers.
    pub(crate) fn install() -> io::Result<Self> {
        let mut memory = Box::new_uninit_slice(ALTERNATE_STACK_BYTES);
        let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
        // SAFETY: the memory lives until the stack is taken out of use.
        unsafe { Self::replace(stack, Some(memory)) }
    }

    /// Takes away the one that it may have: Rust gives its threads one.
    pub(crate) fn none() -> io::Result<Self> {
        let stack = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        // SAFETY: needs no memory.
        unsafe { Self::replace(stack, None) }
    }

    /// # Safety
    /// The stack lies in the memory.
    unsafe fn replace(stack: libc::stack_t, memory: Option<Box<[MaybeUninit<u8>]>>) -> io::Result<Self> {
        let mut before = stack;
        // SAFETY: both pointers are to live locals; the caller vouches for the stack.
        checked(unsafe { libc::sigaltstack(&raw const stack, &raw mut before) })?;
        Ok(Self { before, _memory: memory })
    }
}

impl Drop for AlternateStack {
    fn drop(&mut self) {
        // SAFETY: the pointer is to the thread's stack of before.
        unsafe { libc::sigaltstack(&raw const self.before, ptr::null_mut()) };
    }
}

/// Keeps the signals from the calling thread from here on. They stay pending, and end with the thread.
pub(crate) fn block() {
    let mut set = empty_set();
    for index in 0..SIGNALS {
        // SAFETY: the pointer is to a live set.
        unsafe { libc::sigaddset(&raw mut set, number(index)) };
    }
    // SAFETY: the pointer is to a live set; the null pointer asks for nothing.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
}

/// A thread, to send signals to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thread {
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl Thread {
    /// The calling one.
    pub(crate) fn current() -> Self {
        // SAFETY: takes nothing and cannot fail.
        let process = unsafe { libc::getpid() };
        // SAFETY: as above.
        let thread = unsafe { libc::gettid() };
        Self { process, thread }
    }

    /// Sends it the signal with this index. Sent to the caller itself, its handler has run before this returns, unless it is being handled
    /// already. Safe in signal handlers.
    pub(crate) fn raise(self, index: usize) {
        // SAFETY: plain integers; a thread that does not exist is an error that changes nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, number(index)) };
    }
}

/// Runs `handle` and leaves errno as it was.
pub(crate) fn keeping_errno(handle: impl FnOnce()) {
    // SAFETY: returns a pointer to the calling thread's errno.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: valid as long as the thread.
    let errno = unsafe { place.read() };
    handle();
    // SAFETY: as above.
    unsafe { place.write(errno) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_numbers_and_back() {
        for index in 0..SIGNALS {
            assert_eq!(super::index(number(index)), Some(index));
            assert!(number(index) <= libc::SIGRTMAX());
        }
        assert_eq!(index(libc::SIGTRAP), None);
    }

    #[test]
    fn errno_is_kept() {
        let errno = || io::Error::last_os_error().raw_os_error();
        // SAFETY: no such descriptor: fails and changes nothing else.
        unsafe { libc::close(-1) };
        keeping_errno(|| {
            // SAFETY: fails, for no signal has this number.
            unsafe { libc::raise(-1) };
            assert_eq!(errno(), Some(libc::EINVAL));
        });
        assert_eq!(errno(), Some(libc::EBADF));
    }

    #[test]
    fn the_alternate_stack_is_given_back() {
        let current = || {
            // SAFETY: all zero is a valid stack: plain integers and a pointer.
            let mut stack: libc::stack_t = unsafe { mem::zeroed() };
            // SAFETY: the pointer is to a live local; null changes nothing.
            assert_eq!(unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) }, 0);
            (stack.ss_sp, stack.ss_size)
        };
        let before = current();
        let stack = AlternateStack::install().expect("any thread may have one");
        assert_eq!(current().1, ALTERNATE_STACK_BYTES);
        drop(stack);
        assert_eq!(current(), before);
        let none = AlternateStack::none().expect("any thread may do without");
        assert_eq!(current().1, 0);
        drop(none);
        assert_eq!(current(), before);
    }
}
