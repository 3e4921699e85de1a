//! Quiesce: a checked, bounded all-stop of the own process.
//!
//! Some changes cannot be made while code runs: replacing several instructions by one, applying a live patch, unmapping a trampoline. For
//! those every thread stands still for a moment, the caller makes sure that none is inside what is about to change, changes it, or gives
//! up, and all go on. The threads notice nothing: no signal is sent, no system call fails.
//!
//! [`stop_world`] is the entry; [`Stopper`] is the same with more to choose. The work that they run sees the threads as [`Stopped`], asks
//! [`may_be_inside`](Stopped::may_be_inside) about a [`RangeSet`] prepared before, and learns of a [`Blocker`] or of none. Underneath,
//! `stopper` is the task that runs the work, `session` stops the threads, `inside` searches their stacks with `memory_map` and `sigframe`.
//!
//! ```
//! use std::time::Duration;
//! use trapline_engine::{Addr, AddrRange};
//! use trapline_process::quiesce::{self, RangeSet};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # fn old_function() {}
//! let function = Addr::new(old_function as fn() as usize as u64);
//! let window = AddrRange::new(function.offset(1), 4);
//! let forbidden = RangeSet::new([window]);
//! let (blocker, report) = quiesce::stop_world(
//!     |stopped| {
//!         let blocker = stopped.may_be_inside(&forbidden);
//!         if blocker.is_none() {
//!             // Commit: nobody is inside, and nobody moves.
//!         }
//!         blocker
//!     },
//!     Duration::from_millis(20),
//! )?;
//! match blocker {
//!     None => println!("done; {} threads stood still for {} ns", report.threads, report.stop_ns),
//!     Some(blocker) => println!("thread {} may be inside at {}: try again", blocker.tid, blocker.at),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # How
//!
//! A task that shares the address space and the files, but is no thread of the process, traces all of its threads (as leak sanitizers do).
//! So the list of threads, `wait` and `fork` of the target do not show it, and signal masks do not matter to it. It shares the calling
//! thread's thread-local storage, which is sound because that thread sleeps in one system call until the task has ended.
//! A `membarrier` that it issues covers the process, whose memory is its own.
//!
//! # What the work must not do
//!
//! Any lock may be held by a thread that stands still. So the work must not allocate or free, print, panic, load libraries or call
//! anything else that may lock; memory is prepared before, and dropped after. If it blocks all the same, the task is killed after
//! [`work_limit`](Stopper::work_limit) and the process goes on.
//!
//! # What it does not reach
//!
//! - A thread waiting for the child that it started by `vfork` cannot be stopped. The child shares the memory, so this is not ignored: the
//!   stop fails with [`QuiesceError::Unstoppable`] and names the thread.
//! - Other processes that share the memory (`clone` with `CLONE_VM` alone) run on. A forked child has memory of its own.
//! - Valgrind knows no tasks that are no threads. Under it a process of one thread counts as standing still, and any other cannot be stopped.
//! - Relative timeouts of the few calls that the kernel does not restart by itself (`epoll_wait`, `sigtimedwait`, sockets with a timeout)
//!   start afresh.

mod inside;
mod memory_map;
mod other;
mod page_filter;
mod ranges;
mod registers;
mod session;
mod sigframe;
mod stopped;
mod stopper;

use std::{
    fmt, fs, io,
    mem::MaybeUninit,
    panic::{self, AssertUnwindSafe},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use trapline_engine::Addr;

pub use self::{
    inside::{Blocker, How},
    other::{OtherProcess, may_start_again, stop_process},
    ranges::RangeSet,
    registers::{ThreadRegisters, from_native, to_native},
    stopped::{Stopped, StoppedThread},
};
use self::{
    memory_map::MapsFile,
    session::{Failure, Summary},
    stopper::{Lost, Plan},
};
pub use crate::sys::{errno::Errno, procfs::Tid, ptrace::Registers, signal::SignalSet};
use crate::sys::{
    procfs::{self, TaskDir},
    task::{self, ProcessLock},
};

/// How long the work of a stop may take unless said otherwise. Far beyond any useful pause: it is for work that is stuck.
const USUAL_WORK_LIMIT: Duration = Duration::from_secs(5);

/// One stop at a time: a second task could not trace what the first one traces.
static STOPS: ProcessLock = ProcessLock::new();

/// Whether an attempt has shown that Yama wants to be asked.
static YAMA_RESTRICTS: AtomicBool = AtomicBool::new(false);

/// Stops every thread of the process, the calling one included, runs `work`, and lets all go on.
///
/// `work` is called at most once, and only when every thread stands still within `deadline`. It is `FnMut` so that what it owns is dropped by
/// the caller, after the stop. See the [module](self) for what it must not do.
///
/// # Errors
/// Why the threads could not be stopped. They run on then, and unless the error says that the work had begun, nothing has happened.
///
/// # Panics
/// If `work` does; the threads go on first.
pub fn stop_world<R: Send>(
    work: impl FnMut(&Stopped<'_>) -> R + Send,
    deadline: Duration,
) -> Result<(R, StopReport), QuiesceError> {
    Stopper::new(deadline).run(work)
}

/// How a stop is to be made: [`stop_world`] with more to choose.
#[derive(Clone, Copy, Debug)]
pub struct Stopper {
    deadline: Duration,
    work_limit: Duration,
    own_frames_below: Option<Addr>,
}

impl Stopper {
    /// Stops that give up when a thread still runs after `deadline`.
    pub const fn new(deadline: Duration) -> Self {
        Self { deadline, work_limit: USUAL_WORK_LIMIT, own_frames_below: None }
    }

    /// How long the work may take before the stopper task is killed and the threads go on; 5 s unless set. What the work had changed by then
    /// stays changed.
    #[must_use]
    pub const fn work_limit(self, work_limit: Duration) -> Self {
        Self { work_limit, ..self }
    }

    /// Says that below `address` the calling thread's stack holds frames of trapline only, so that their words do not block.
    ///
    /// Whoever decides which code to change has its addresses in its own frames, where they look like return addresses. So a function of
    /// the library that a program calls, and that leads here, passes the address of one of its locals. Unless set, every frame from the
    /// caller of this module on is searched.
    #[must_use]
    pub const fn own_frames_below(self, address: Addr) -> Self {
        Self { own_frames_below: Some(address), ..self }
    }

    /// Makes one stop. See [`stop_world`].
    ///
    /// # Errors
    /// As for [`stop_world`].
    ///
    /// # Panics
    /// As for [`stop_world`].
    pub fn run<R: Send>(self, mut work: impl FnMut(&Stopped<'_>) -> R + Send) -> Result<(R, StopReport), QuiesceError> {
        let mut answer = MaybeUninit::<thread::Result<R>>::uninit();
        let mut work = |stopped: &Stopped<'_>| {
            answer.write(panic::catch_unwind(AssertUnwindSafe(|| work(stopped))));
        };
        let report = self.run_untyped(&mut work)?;
        // SAFETY: `run_untyped` succeeds only if `work` ran to its end, and writing the answer is all it does.
        match unsafe { answer.assume_init() } {
            Ok(answer) => Ok((answer, report)),
            Err(panic) => panic::resume_unwind(panic),
        }
    }

    fn run_untyped(self, work: &mut stopper::Work<'_>) -> Result<StopReport, QuiesceError> {
        // Its address separates our frames, below, from the caller's.
        let frame_mark = 0_u8;
        let own_frames_below = self.own_frames_below.unwrap_or(Addr::new((&raw const frame_mark).addr() as u64));
        let _lock = STOPS.acquire();
        let tasks = TaskDir::open_own().map_err(|source| QuiesceError::Proc { path: "/proc/self/task", source })?;
        let maps = MapsFile::open_own().map_err(|source| QuiesceError::Proc { path: "/proc/self/maps", source })?;
        loop {
            // Relaxed: it guards nothing; at worst one attempt more is refused.
            let permit_tracer = YAMA_RESTRICTS.load(Ordering::Relaxed);
            let Self { deadline, work_limit, .. } = self;
            let plan = Plan { deadline, work_limit, own_frames_below, permit_tracer };
            match stopper::run(plan, &tasks, &maps, work) {
                Ok(summary) => return Ok(summary.into()),
                // Asking replaces a permission that the target may have given itself, so it is done where it is needed only.
                Err(Lost::Stop(Failure::Refused { .. })) if !permit_tracer && yama_scope() == Some(YAMA_RELATIONAL) => {
                    YAMA_RESTRICTS.store(true, Ordering::Relaxed);
                }
                Err(lost) => return Err(self.error_of(lost)),
            }
        }
    }

    fn error_of(self, lost: Lost) -> QuiesceError {
        match lost {
            Lost::Start(errno) => QuiesceError::Start { errno },
            Lost::Stop(Failure::Refused { tid, errno }) => {
                QuiesceError::Forbidden { tid, errno, obstacle: Obstacle::to_tracing(tid) }
            }
            Lost::Stop(Failure::Unstoppable { tid, state }) => {
                QuiesceError::Unstoppable { tid, state: state.into(), waited: self.deadline }
            }
            Lost::Stop(Failure::Unsettled) => QuiesceError::Unsettled { waited: self.deadline },
            Lost::Stop(Failure::Kernel(errno)) => QuiesceError::ThreadList { errno },
            Lost::Task { signal, work_begun } => QuiesceError::StopperLost { signal, work_begun },
            Lost::Emulated { threads } => QuiesceError::Emulated { threads },
        }
    }
}

/// How a stop went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StopReport {
    /// How many threads stood still.
    pub threads: usize,
    /// From the first interruption until the last thread was let go, the work included, in nanoseconds.
    pub stop_ns: u64,
    /// How often the list of threads was read; 2 when none was started meanwhile.
    pub rounds: u32,
    /// How many system calls would have failed with `EINTR`, and were started again instead.
    pub restarted_syscalls: u32,
}

impl From<Summary> for StopReport {
    fn from(summary: Summary) -> Self {
        let Summary { threads, stop_ns, rounds, restarted_syscalls } = summary;
        Self { threads, stop_ns, rounds, restarted_syscalls }
    }
}

/// Why the process could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// What the stop reads about the own process is not there.
    #[error("cannot open {path}: {source}")]
    Proc {
        /// What.
        path: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The stopper task, or its memory, is not to be had.
    #[error("cannot start the task that stops the threads: {errno}")]
    Start {
        /// Why not.
        errno: Errno,
    },
    /// The list of threads could not be read, or not be kept, while they were being stopped.
    #[error("cannot list the threads of the process: {errno}")]
    ThreadList {
        /// Why not.
        errno: Errno,
    },
    /// Threads of this process may not be traced.
    #[error("thread {tid} may not be stopped: {errno}: {obstacle}")]
    Forbidden {
        /// The first thread that was refused.
        tid: Tid,
        /// The kernel's answer.
        errno: Errno,
        /// What is in the way.
        obstacle: Obstacle,
    },
    /// A thread did not stop, because it sleeps in the kernel where nothing interrupts it: usually until its `vfork` child leaves.
    #[error("thread {tid} did not stop within {waited:?}: it is in state {state} (see /proc/self/task/{tid}/stack)")]
    Unstoppable {
        /// The thread.
        tid: Tid,
        /// Its state, by the letters of `proc_pid_stat(5)`: `D` for an uninterruptible sleep.
        state: char,
        /// How long it had.
        waited: Duration,
    },
    /// Threads were started, or ended, faster than they could be stopped.
    #[error("the list of threads kept changing for {waited:?}")]
    Unsettled {
        /// How long it was tried.
        waited: Duration,
    },
    /// The stopper task ended before it was done; the threads run on.
    #[error("the task that stops the threads ended early (signal {signal:?}, work begun: {work_begun})")]
    StopperLost {
        /// What killed it, if it was a signal: SIGKILL for work over its limit.
        signal: Option<i32>,
        /// Whether the work may have done something.
        work_begun: bool,
    },
    /// Valgrind runs the process, and starts no task that could stop its threads.
    #[error(
        "under Valgrind no task can stop the {threads} threads of this process; make the tracer, and drop it, while there is only one thread"
    )]
    Emulated {
        /// How many threads there are.
        threads: usize,
    },
}

/// What keeps a process from tracing its own threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// Another process traces the thread: a debugger, strace, a sandbox.
    Tracer(Tid),
    /// The process is not dumpable: it changed its user, or holds secrets (`PR_SET_DUMPABLE`).
    NotDumpable,
    /// Yama's `ptrace_scope` is 2 (only with `CAP_SYS_PTRACE`) or 3 (never).
    Yama(u32),
    /// None of these: a seccomp filter or another security module.
    Unknown,
}

/// The `ptrace_scope` that restricts tracing to ancestors and to whom the process permits.
const YAMA_RELATIONAL: u32 = 1;

impl Obstacle {
    /// Finds out after the fact.
    fn to_tracing(tid: Tid) -> Self {
        let status = fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap_or_default();
        let tracer = procfs::status_field(&status, "TracerPid").and_then(|pid| pid.parse().ok());
        match tracer {
            Some(tracer) if tracer != 0 => return Self::Tracer(tracer),
            _ => {}
        }
        if !task::is_dumpable() {
            return Self::NotDumpable;
        }
        match yama_scope() {
            Some(scope) if scope > YAMA_RELATIONAL => Self::Yama(scope),
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tracer(pid) => write!(f, "process {pid} traces it already; end the debugger or strace first"),
            Self::NotDumpable => f.write_str(
                "the process is not dumpable (PR_SET_DUMPABLE), so only a task with CAP_SYS_PTRACE may trace it",
            ),
            Self::Yama(scope) => {
                write!(
                    f,
                    "/proc/sys/kernel/yama/ptrace_scope is {scope}, where this needs CAP_SYS_PTRACE (2) or is off (3)"
                )
            }
            Self::Unknown => f.write_str("a seccomp filter or a security module seems to forbid ptrace"),
        }
    }
}

fn yama_scope() -> Option<u32> {
    fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?.trim().parse().ok()
}

/// The threads that block SIGTRAP, each of which a breakpoint would kill, in ascending order.
///
/// A stop is needed to [unblock](Stopped::unblock) it only if there are any. What it says is past when it returns: threads change their
/// masks, and new ones inherit them.
///
/// # Errors
/// If /proc cannot be read, or shows something else than Linux does.
pub fn threads_blocking_sigtrap() -> io::Result<Vec<Tid>> {
    let mut blocking = Vec::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let path = entry?.path();
        let Some(tid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
        let status = match fs::read_to_string(path.join("status")) {
            Ok(status) => status,
            // It ended since: before the file was opened, or before it was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {
                continue;
            }
            Err(error) => return Err(error),
        };
        let blocked = procfs::blocked_signals(&status)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no SigBlk for thread {tid}")))?;
        if blocked.contains(libc::SIGTRAP) {
            blocking.push(tid);
        }
    }
    blocking.sort_unstable();
    Ok(blocking)
}
