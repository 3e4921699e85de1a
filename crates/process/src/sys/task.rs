//! Tasks: starting one that is no thread, waiting for it, its priority, its end; and the futex that two of them meet at.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use super::{clock::KernelTimespec, errno::Errno, pages::TaskStack, procfs::Tid, syscall::syscall};

/// `PR_SET_PTRACER` (linux/prctl.h), which `libc` has for Android only.
const PR_SET_PTRACER: usize = 0x5961_6d61;

/// How a task ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exit {
    /// By itself, or nobody knows: somebody else in the process reaped it, with `__WALL`.
    Left,
    /// By this signal.
    Killed(i32),
}

/// Starts a task that shares memory and files with the caller, but is a process of its own: not in the list of threads, and
/// invisible to a `wait` without `__WALL` or `__WCLONE`, because its end sends no signal. A debugger of the caller does not get it.
///
/// It shares the caller's thread-local storage too (no `CLONE_SETTLS`), and has the caller's signal mask. It has directories of its own, which are the
/// same: while another thread executes a program the kernel lets nobody share them (fs/exec.c, `check_unsafe_exec`), and whoever does share them from
/// outside of the process keeps a set-user-ID program from getting its privileges.
///
/// # Errors
/// `EAGAIN` where the user may have no more processes, `ENOMEM`, `EPERM` under a seccomp filter.
///
/// # Safety
/// Until [`wait_for`] has returned for the task,
/// 1. the caller must do nothing but system calls by [`syscall`], so that the thread-local storage has one user,
/// 2. `stack` and whatever `argument` points to must stay.
///
/// `main` must not unwind.
pub(crate) unsafe fn spawn_sharing(
    main: extern "C" fn(*mut libc::c_void) -> libc::c_int,
    stack: &TaskStack,
    argument: *mut libc::c_void,
) -> Result<Tid, Errno> {
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_UNTRACED;
    // SAFETY: the stack is fresh and page-aligned; the rest is the caller's promise. libc's wrapper is only the assembly that switches to
    // the new stack; it stores `errno` if the call fails, when there is no second user of it.
    let tid = unsafe { libc::clone(main, stack.top().cast(), flags, argument) };
    if tid > 0 {
        return Ok(tid);
    }
    Err(Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN)))
}

/// Sleeps in the kernel until a task started by [`spawn_sharing`] has ended, and removes it from the process table.
pub(crate) fn wait_for(task: Tid) -> Exit {
    let mut status = 0_i32;
    let arguments = [task.cast_unsigned() as usize, &raw mut status as usize, libc::__WALL.cast_unsigned() as usize, 0];
    loop {
        // SAFETY: the kernel stores one `int` into a live local.
        match unsafe { syscall(libc::SYS_wait4, arguments) } {
            Err(Errno(libc::EINTR)) => {}
            Ok(_) if libc::WIFSIGNALED(status) => return Exit::Killed(libc::WTERMSIG(status)),
            _ => return Exit::Left,
        }
    }
}

/// Sleeps while `word` holds `value`, until [`wake`]. May return early.
pub(crate) fn sleep_while(word: &AtomicU32, value: u32) {
    let operation = (libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG).cast_unsigned() as usize;
    // SAFETY: the kernel reads one aligned word that lives as long as the reference; null means without a timeout.
    let _ = unsafe { syscall(libc::SYS_futex, [word.as_ptr() as usize, operation, value as usize, 0]) };
}

/// Wakes whoever sleeps at `word`: one task.
pub(crate) fn wake(word: &AtomicU32) {
    let operation = (libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG).cast_unsigned() as usize;
    // SAFETY: a wake does not touch the word.
    let _ = unsafe { syscall(libc::SYS_futex, [word.as_ptr() as usize, operation, 1]) };
}

/// The process that the calling task belongs to.
pub(crate) fn own_pid() -> Tid {
    identity(libc::SYS_getpid)
}

/// The calling task.
pub(crate) fn own_tid() -> Tid {
    identity(libc::SYS_gettid)
}

/// The process that the calling task's process was started by.
pub(crate) fn parent_pid() -> Tid {
    identity(libc::SYS_getppid)
}

fn identity(call: libc::c_long) -> Tid {
    // SAFETY: these calls take no arguments and always succeed.
    unsafe { syscall(call, []) }.ok().and_then(|id| Tid::try_from(id).ok()).unwrap_or(0)
}

/// Has the kernel kill the calling task when the thread that started it ends.
pub(crate) fn die_with_parent() -> Result<(), Errno> {
    prctl(libc::PR_SET_PDEATHSIG.cast_unsigned() as usize, libc::SIGKILL.cast_unsigned() as usize)
}

/// Allows `tracer` to trace the calling process where Yama restricts tracing to ancestors. The kernel drops the permission when the tracer
/// ends. It replaces one that the process may have given before.
pub(crate) fn permit_tracer(tracer: Tid) -> Result<(), Errno> {
    prctl(PR_SET_PTRACER, tracer.cast_unsigned() as usize)
}

/// Whether other processes of the same user may look into the calling one (`PR_SET_DUMPABLE`).
pub(crate) fn is_dumpable() -> bool {
    // SAFETY: this operation takes no further arguments.
    let dumpable = unsafe { syscall(libc::SYS_prctl, [libc::PR_GET_DUMPABLE.cast_unsigned() as usize, 0, 0, 0, 0]) };
    dumpable == Ok(1)
}

fn prctl(operation: usize, argument: usize) -> Result<(), Errno> {
    // SAFETY: both operations that are used take a number, no pointer.
    unsafe { syscall(libc::SYS_prctl, [operation, argument, 0, 0, 0]) }.map(drop)
}

/// Puts the calling task in front of every task that runs at normal priority, as far as it may: real-time, or else the highest of the
/// normal ones. Does nothing where neither is allowed.
///
/// A caller that inherited real-time priority gets one level more.
pub(crate) fn raise_own_priority() {
    const HIGHEST_REALTIME: i32 = 99;
    const HIGHEST_NORMAL: i32 = -20;
    let mut level = 0_i32;
    // SAFETY: `struct sched_param` is one `int`, which the kernel stores into a live local; 0 is the caller.
    let _ = unsafe { syscall(libc::SYS_sched_getparam, [0, &raw mut level as usize]) };
    let raised = (level + 1).min(HIGHEST_REALTIME);
    let fifo = libc::SCHED_FIFO.cast_unsigned() as usize;
    // SAFETY: the kernel reads one `int` from a live local; 0 is the caller.
    if unsafe { syscall(libc::SYS_sched_setscheduler, [0, fifo, &raw const raised as usize]) }.is_err() {
        // SAFETY: takes no pointers; 0 is the caller.
        let _ = unsafe {
            let task = libc::PRIO_PROCESS as usize;
            syscall(libc::SYS_setpriority, [task, 0, HIGHEST_NORMAL.cast_unsigned() as usize])
        };
    }
}

/// A timer that kills the calling process, whatever it is doing then. What the process traces goes on.
///
/// It is the kernel's, so it works for a process that waits for a lock, and ends with the process.
pub(crate) struct Watchdog {
    timer: usize,
}

impl Watchdog {
    /// A watchdog that sleeps.
    pub(crate) fn new() -> Result<Self, Errno> {
        // SAFETY: the structure consists of integers and a pointer, for all of which zero is a value.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGKILL;
        let mut timer = 0_i32;
        let clock = libc::CLOCK_MONOTONIC.cast_unsigned() as usize;
        // SAFETY: the kernel reads the event from one live local and stores the timer's number, an `int`, into another.
        unsafe { syscall(libc::SYS_timer_create, [clock, &raw const event as usize, &raw mut timer as usize]) }?;
        Ok(Self { timer: timer.cast_unsigned() as usize })
    }

    /// Has it strike after `delay`, and not when it would have until now.
    pub(crate) fn set(&self, delay: Duration) {
        // `struct itimerspec` is interval and first expiry. An expiry of zero would switch it off.
        let setting = [Duration::ZERO, delay.max(Duration::from_nanos(1))].map(KernelTimespec::from);
        // SAFETY: the kernel reads two timespecs from a live local; null asks for no old value. A valid setting is not refused.
        let _ = unsafe { syscall(libc::SYS_timer_settime, [self.timer, 0, setting.as_ptr() as usize, 0]) };
    }
}

/// A lock that a forked child does not inherit: it holds the number of the process whose thread took it.
///
/// A `Mutex` that another thread holds during a fork stays locked in the child for ever.
pub(crate) struct ProcessLock {
    holder: AtomicU32,
}

/// Holds a [`ProcessLock`].
pub(crate) struct ProcessLockGuard<'a> {
    lock: &'a ProcessLock,
}

impl ProcessLock {
    /// A lock that nobody holds.
    pub(crate) const fn new() -> Self {
        Self { holder: AtomicU32::new(0) }
    }

    /// Sleeps until no other thread of this process holds the lock, and takes it. Not re-entrant.
    pub(crate) fn acquire(&self) -> ProcessLockGuard<'_> {
        let this_process = own_pid().cast_unsigned();
        let mut expected = 0;
        // Acquire: pairs with the Release in `ProcessLockGuard::drop`.
        while let Err(holder) =
            self.holder.compare_exchange(expected, this_process, Ordering::Acquire, Ordering::Relaxed)
        {
            if holder == this_process {
                sleep_while(&self.holder, holder);
                expected = 0;
            } else {
                // Free, or left behind in this child by a thread that stayed in the parent.
                expected = holder;
            }
        }
        ProcessLockGuard { lock: self }
    }

    /// Takes the lock over a fork: to be called before it. [`release_after_fork`](Self::release_after_fork) follows in parent and child.
    pub(crate) fn hold_over_fork(&self) {
        std::mem::forget(self.acquire());
    }

    /// Releases what [`hold_over_fork`](Self::hold_over_fork) took.
    pub(crate) fn release_after_fork(&self) {
        drop(ProcessLockGuard { lock: self });
    }
}

impl Drop for ProcessLockGuard<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `ProcessLock::acquire`.
        self.lock.holder.store(0, Ordering::Release);
        wake(&self.lock.holder);
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[test]
    fn a_task_and_its_parent_have_the_expected_numbers() {
        assert_eq!(own_pid().cast_unsigned(), std::process::id());
        assert_ne!(own_tid(), 0);
        assert_ne!(parent_pid(), own_pid());
    }

    #[test]
    fn the_process_lock_excludes() {
        // Not atomic on purpose: a lost update would show.
        struct Counter(std::cell::UnsafeCell<u64>);
        // SAFETY: every access below is made under the lock.
        unsafe impl Sync for Counter {}
        const ROUNDS: u64 = 20_000;
        let shared = Arc::new((ProcessLock::new(), Counter(std::cell::UnsafeCell::new(0))));
        let threads = [(); 4].map(|()| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for _ in 0..ROUNDS {
                    let _guard = shared.0.acquire();
                    let count = shared.1.0.get();
                    // SAFETY: the guard excludes the other threads.
                    let old = unsafe { count.read_volatile() };
                    // SAFETY: as above.
                    unsafe { count.write_volatile(old + 1) };
                }
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        // SAFETY: all threads have ended.
        assert_eq!(unsafe { shared.1.0.get().read() }, 4 * ROUNDS);
    }

    #[test]
    fn a_lock_left_behind_by_a_fork_is_taken_over() {
        let lock = ProcessLock::new();
        lock.holder.store(parent_pid().cast_unsigned(), Ordering::Relaxed);
        drop(lock.acquire());
        assert_eq!(lock.holder.load(Ordering::Relaxed), 0);
    }
}
