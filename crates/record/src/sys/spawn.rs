//! The start of the traced program: a child that waits until it is traced, and then executes.
//!
//! Owns [`spawn`] and the signals of the recorder itself ([`Inbox`]). Between fork and exec only what POSIX calls async-signal-safe is
//! done. The program gets our signal mask and our descriptors; SIGPIPE, which Rust ignores, is as a program expects it.

use std::{
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    time::Duration,
};

use super::{Tid, check};

/// A child that waits to be told to execute.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// Its process id.
    pub(crate) pid: Tid,
    go: OwnedFd,
    failure: OwnedFd,
}

fn pipe() -> io::Result<[OwnedFd; 2]> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: both were just made, and nobody else knows them.
    Ok(ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) }))
}

/// What was to be done about SIGXFSZ.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LimitSignal(libc::sighandler_t);

/// Has a write beyond the limit for a file's size fail, where it would end this process. The program gets back what was.
pub(crate) fn ignore_file_limit() -> LimitSignal {
    // SAFETY: no handler is set, and there is none yet.
    LimitSignal(unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) })
}

/// Allows this process as many descriptors as it may have: each traced process takes some. Call after [`spawn`], so that the program keeps its own limit.
pub(crate) fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit outlives the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_max;
        // A limit that stays is met later, and told then.
        // SAFETY: the limit outlives the call.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

/// Forks a child that will execute `program` with these arguments (the first is its name) and our environment.
pub(crate) fn spawn(program: &OsStr, arguments: &[OsString], limit_signal: LimitSignal) -> io::Result<Waiting> {
    let c_string =
        |text: &OsStr| CString::new(text.as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let program = c_string(program)?;
    let arguments = arguments.iter().map(|argument| c_string(argument)).collect::<io::Result<Vec<_>>>()?;
    let mut pointers: Vec<*const libc::c_char> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let ([wait, go], [failure, report]) = (pipe()?, pipe()?);
    // SAFETY: the child calls only async-signal-safe functions before it executes or exits.
    let pid = unsafe { libc::fork() };
    check(pid.into())?;
    if pid == 0 {
        // SAFETY: (1) async-signal-safe all of them; (2) the strings were made before the fork.
        unsafe { child([wait.as_raw_fd(), go.as_raw_fd()], report.as_raw_fd(), &program, &pointers, limit_signal) }
    }
    Ok(Waiting { pid, go, failure })
}

/// Forks a child that does nothing, and ends when the value is dropped.
pub(crate) fn spawn_idle() -> io::Result<Waiting> {
    // It is never told to go.
    let nothing = OsStr::new("/");
    spawn(nothing, &[], LimitSignal(libc::SIG_DFL))
}

/// # Safety
/// Only in a forked child; `arguments` ends in a null pointer and points to strings.
unsafe fn child(
    [wait, go]: [i32; 2],
    report: i32,
    program: &CString,
    arguments: &[*const libc::c_char],
    limit_signal: LimitSignal,
) -> ! {
    // If the recorder dies, nobody else must hold this end.
    // SAFETY: the descriptor is this process's copy, which nobody uses.
    unsafe { libc::close(go) };
    let mut byte = 0_u8;
    // SAFETY: room for a byte.
    let read = unsafe { libc::read(wait, (&raw mut byte).cast(), 1) };
    if read == 1 {
        // SAFETY: the default for a signal that this process has no handler for.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        // SAFETY: what this process began with: the default, or to ignore it.
        unsafe { libc::signal(libc::SIGXFSZ, limit_signal.0) };
        // SAFETY: strings, and a list of them that ends in a null pointer.
        unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
        let error = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
        // SAFETY: four bytes.
        unsafe { libc::write(report, error.as_ptr().cast(), error.len()) };
    }
    // SAFETY: ends the child without running what the parent registered.
    unsafe { libc::_exit(127) }
}

impl Waiting {
    /// Lets the child execute. Returns the descriptor that says whether it could: see [`exec_error`].
    pub(crate) fn go(self) -> OwnedFd {
        let byte = [1_u8];
        // A child that was killed meanwhile does not read it; its end is reported as any other.
        // SAFETY: one byte.
        unsafe { libc::write(self.go.as_raw_fd(), byte.as_ptr().cast(), 1) };
        self.failure
    }
}

/// Why the child could not execute, once it has ended.
pub(crate) fn exec_error(failure: &OwnedFd) -> Option<io::Error> {
    let mut errno = [0_u8; 4];
    // SAFETY: room for four bytes.
    let read = unsafe { libc::read(failure.as_raw_fd(), errno.as_mut_ptr().cast(), errno.len()) };
    (read == 4).then(|| io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
}

/// Whether a signal is passed on to a program that was launched.
pub(crate) fn is_passed_on(signal: i32) -> bool {
    PASSED_ON.contains(&signal)
}

/// The calling thread's id.
pub(crate) fn own_tid() -> Tid {
    // SAFETY: never fails.
    unsafe { libc::gettid() }
}

/// While this lives, the calling thread runs before all others: threads that stand still for it wait for nobody else. Where that is not allowed, it runs as before.
#[derive(Debug)]
pub(crate) struct Urgent {
    before: Option<(i32, libc::sched_param)>,
}

impl Urgent {
    /// For the calling thread alone.
    pub(crate) fn new() -> Self {
        Self::with(libc::SCHED_RESET_ON_FORK)
    }

    /// Also for all that it starts meanwhile.
    pub(crate) fn with_new_threads() -> Self {
        Self::with(0)
    }

    fn with(flags: i32) -> Self {
        let mut parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: plain numbers.
        let policy = unsafe { libc::sched_getscheduler(0) };
        // SAFETY: the parameters outlive the call.
        let is_known = policy >= 0 && unsafe { libc::sched_getparam(0, &raw mut parameters) } == 0;
        let urgent = libc::sched_param { sched_priority: 1 };
        let wanted = libc::SCHED_FIFO | flags;
        // SAFETY: the parameters outlive the call.
        let is_urgent = is_known && unsafe { libc::sched_setscheduler(0, wanted, &raw const urgent) } == 0;
        Self { before: is_urgent.then_some((policy, parameters)) }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some((policy, parameters)) = &self.before {
            // SAFETY: the parameters outlive the call.
            unsafe { libc::sched_setscheduler(0, *policy, std::ptr::from_ref(parameters)) };
        }
    }
}

/// Forks a child that does `work` and then ends, with the reading end of a pipe whose writing end is ours. It is in a session of its own, has no other descriptor,
/// and no signal that people send ends it.
pub(crate) fn fork_reader(work: impl FnOnce(std::fs::File)) -> io::Result<(Tid, std::fs::File)> {
    let [read, write] = pipe()?;
    // SAFETY: the child uses the allocator, which the C library makes usable in the child of a fork, and no other lock that another thread could hold.
    let pid = unsafe { libc::fork() };
    check(pid.into())?;
    if pid != 0 {
        return Ok((pid, write.into()));
    }
    // SAFETY: never fails in a child that has just begun.
    unsafe { libc::setsid() };
    for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
        // SAFETY: no handler is set.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    drop(write);
    let kept = read.as_raw_fd().cast_unsigned();
    // Whoever waits for the end of our output shall not wait for this child.
    for (first, last) in [(0, kept.wrapping_sub(1)), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: nobody in this process uses them any more.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
    work(read.into());
    // SAFETY: ends the child without running what the parent registered.
    unsafe { libc::_exit(0) }
}

/// Waits for a child to end.
pub(crate) fn wait_for_end(pid: Tid) {
    // SAFETY: no status is asked for. It fails where the child has been seen to end already.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
}

/// Where the recorder hears of its children and of signals that people send it.
#[derive(Debug)]
pub(crate) struct Inbox {
    signals: OwnedFd,
    wakeup: OwnedFd,
}

/// Signals that the terminal sends to the whole group: the program gets them too, and decides.
const FROM_THE_TERMINAL: [i32; 2] = [libc::SIGINT, libc::SIGQUIT];

/// Signals that are passed on to a program that was launched.
const PASSED_ON: [i32; 2] = [libc::SIGTERM, libc::SIGHUP];

/// Blocks the recorder's signals in the calling thread, and tells which they are.
pub(crate) fn block_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for signal in FROM_THE_TERMINAL.into_iter().chain(PASSED_ON).chain([libc::SIGCHLD]) {
        // SAFETY: the set outlives the call.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set outlives the call.
    check(unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) }.into())?;
    Ok(set)
}

impl Inbox {
    /// Takes over the recorder's signals. Call after [`spawn`], so that the program keeps its own.
    pub(crate) fn new() -> io::Result<Self> {
        let set = block_signals()?;
        // SAFETY: the set outlives the call.
        let signals = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        check(signals.into())?;
        // SAFETY: just made.
        let signals = unsafe { OwnedFd::from_raw_fd(signals) };
        // SAFETY: plain numbers.
        let wakeup = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        check(wakeup.into())?;
        // SAFETY: just made.
        let wakeup = unsafe { OwnedFd::from_raw_fd(wakeup) };
        Ok(Self { signals, wakeup })
    }

    /// What other threads end a [`wait`](Self::wait) with.
    pub(crate) fn waker(&self) -> io::Result<Waker> {
        self.wakeup.as_fd().try_clone_to_owned().map(Waker)
    }

    /// Sleeps until something happened, or `timeout` has passed; returns the signals that people have sent.
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<Vec<i32>> {
        let polled = |file: &OwnedFd| libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut polled = [polled(&self.signals), polled(&self.wakeup)];
        let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: two entries.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), 2, timeout) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(Vec::new()) } else { Err(error) };
        }
        let mut count = [0_u8; 8];
        // SAFETY: room for a counter.
        unsafe { libc::read(self.wakeup.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        Ok(self.signals())
    }

    fn signals(&self) -> Vec<i32> {
        const INFO_BYTES: usize = size_of::<libc::signalfd_siginfo>();
        let mut signals = Vec::new();
        let mut info = [0_u8; INFO_BYTES];
        loop {
            // SAFETY: room for one.
            let read = unsafe { libc::read(self.signals.as_raw_fd(), info.as_mut_ptr().cast(), INFO_BYTES) };
            if read != INFO_BYTES.cast_signed() {
                return signals;
            }
            let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if signal != libc::SIGCHLD {
                signals.push(signal);
            }
        }
    }
}

/// Ends an [`Inbox::wait`] from another thread.
#[derive(Debug)]
pub(crate) struct Waker(OwnedFd);

impl Waker {
    /// Ends it, now or when it begins.
    pub(crate) fn wake(&self) {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: eight bytes, as an eventfd wants them. It fails only when it is set already.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// Sends a signal to a process.
pub(crate) fn kill(pid: Tid, signal: i32) {
    // SAFETY: plain numbers. It fails only where the process is gone.
    unsafe { libc::kill(pid, signal) };
}

/// Our own user id, the effective one.
pub(crate) fn user() -> u32 {
    // SAFETY: never fails.
    unsafe { libc::geteuid() }
}

/// Whether two threads share their memory; `None` if the kernel does not say.
pub(crate) fn share_memory(one: Tid, other: Tid) -> Option<bool> {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: plain numbers.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) } {
        0 => Some(true),
        -1 => None,
        _ => Some(false),
    }
}

/// Ends this process by a signal, if that signal ends processes.
pub(crate) fn die_of(signal: i32) {
    let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit outlives the call.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core) };
    // SAFETY: the default action.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // SAFETY: plain numbers, for which zero is a value.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set outlives the call.
    unsafe { libc::sigaddset(&raw mut set, signal) };
    // SAFETY: the set outlives the call.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
    // SAFETY: plain numbers.
    unsafe { libc::raise(signal) };
}
