//! The task that stops the others, from its start to its end.
//!
//! [`run`] is called by a thread of the process, the *creator*. The protocol between the two:
//!
//! 1. The creator prepares everything that costs an allocation, and blocks all signals, so that no handler of its own can run while its
//!    thread-local storage has a second user. The task inherits that mask.
//! 2. It starts the task, which asks to die with the creator and then waits at the gate.
//! 3. The creator, which now knows the task's number, permits it to trace where Yama wants that, opens the gate (Release; the task's load
//!    is the Acquire), and sleeps in `wait4`. From here on it makes no step until the task has ended.
//! 4. The task stops all threads, the creator in its `wait4` among them, does the work, and lets them go.
//! 5. It stores the outcome, says so (Release; the creator's load is the Acquire), and ends, which wakes the creator.
//!
//! If the task is killed in between, the kernel lets every thread go that it traced, and the creator finds that no outcome was stored.

use std::{
    cell::UnsafeCell,
    mem::MaybeUninit,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use trapline_engine::Addr;

use super::{
    memory_map::MapsFile,
    session::{Failure, Session, State, Summary, Thread},
    stopped::{Creator, Stopped},
};
use crate::sys::{
    clock::Moment,
    errno::Errno,
    pages::{PageVec, TaskStack},
    procfs::{TaskDir, Tid},
    signal::{self, SignalSet},
    task::{self, Exit},
    valgrind,
};

/// The task's stack: our own frames need some 50 KiB, the rest is for the work.
const STACK_BYTES: usize = 256 << 10;

/// How long letting go may take: it sleeps nowhere.
const RESUME_LIMIT: Duration = Duration::from_secs(5);

/// How a stop is to go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// How long the threads have to stop.
    pub(super) deadline: Duration,
    /// How long the work may take, before the task is killed.
    pub(super) work_limit: Duration,
    /// See [`Creator::own_frames_below`].
    pub(super) own_frames_below: Addr,
    /// Whether Yama has to be told about the tracer.
    pub(super) permit_tracer: bool,
}

/// Why there is no summary.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lost {
    /// The memory for it, or the task itself, is not to be had.
    Start(Errno),
    /// The threads could not be stopped. The work was not begun.
    Stop(Failure),
    /// The task ended without an outcome: `signal` killed it, if known.
    Task { signal: Option<i32>, work_begun: bool },
    /// Valgrind starts no such task, and there are so many threads.
    Emulated { threads: usize },
}

/// The work, without its type.
pub(super) type Work<'w> = dyn FnMut(&Stopped<'_>) + Send + 'w;

/// How far the task has come; the values of [`Meeting::progress`].
const WAITING: u32 = 0;
const GATE_OPEN: u32 = 1;
const WORK_BEGUN: u32 = 2;
const OUTCOME_STORED: u32 = 3;

/// What creator and task share. It lives on the creator's stack, which stays as it is for as long as the task exists.
struct Meeting<'a, 'w> {
    plan: Plan,
    process: Tid,
    creator: Creator<'a>,
    tasks: &'a TaskDir,
    maps: &'a MapsFile,
    /// The gate and the progress in one word: one of the constants above.
    progress: AtomicU32,
    /// The task's own, between the gate and the outcome.
    of_task: UnsafeCell<OfTask<'a, 'w>>,
    /// Written by the task before `OUTCOME_STORED`, read by the creator after it.
    outcome: UnsafeCell<MaybeUninit<Result<Summary, Failure>>>,
}

struct OfTask<'a, 'w> {
    threads: &'a mut PageVec<Thread>,
    work: &'a mut Work<'w>,
}

/// Stops the process, runs `work` in the stopper task, and lets the process go on. `Ok` means that `work` ran to its end.
pub(super) fn run(plan: Plan, tasks: &TaskDir, maps: &MapsFile, work: &mut Work<'_>) -> Result<Summary, Lost> {
    if valgrind::is_running() {
        return run_alone(plan, tasks, maps, work);
    }
    let stack = TaskStack::new(STACK_BYTES).map_err(Lost::Start)?;
    // Twice what there is now; more only if they multiply meanwhile.
    let usual_threads = tasks.count().map_err(Lost::Start)?.saturating_mul(2).max(64);
    let mut threads = PageVec::with_capacity(usual_threads).map_err(Lost::Start)?;

    let mask = AtomicU64::new(0);
    let masked = Masked::all(&mask);
    let meeting = Meeting {
        plan,
        process: task::own_pid(),
        creator: Creator { tid: task::own_tid(), mask: &mask, own_frames_below: plan.own_frames_below },
        tasks,
        maps,
        progress: AtomicU32::new(WAITING),
        of_task: UnsafeCell::new(OfTask { threads: &mut threads, work }),
        outcome: UnsafeCell::new(MaybeUninit::uninit()),
    };
    let argument = (&raw const meeting).cast_mut().cast();
    // SAFETY: 1. until `wait_for` returns, this function only makes system calls of `sys`, and no signal handler can run; 2. `stack` and
    // `meeting` live until the end of this function. `task_main` aborts where it would unwind.
    let stopper = unsafe { task::spawn_sharing(task_main, &stack, argument) }.map_err(Lost::Start)?;
    if plan.permit_tracer {
        // It fails where there is no Yama; then nobody asks for it.
        let _ = task::permit_tracer(stopper);
    }
    meeting.progress.store(GATE_OPEN, Ordering::Release);
    task::wake(&meeting.progress);
    let exit = task::wait_for(stopper);
    drop(masked);

    match meeting.progress.load(Ordering::Acquire) {
        OUTCOME_STORED => {
            // SAFETY: the task has ended, so nobody writes to the cell.
            let outcome = unsafe { meeting.outcome.get().read() };
            // SAFETY: the task stored the outcome before it said so.
            unsafe { outcome.assume_init() }.map_err(Lost::Stop)
        }
        progress => {
            let signal = match exit {
                Exit::Killed(signal) => Some(signal),
                Exit::Left => None,
            };
            Err(Lost::Task { signal, work_begun: progress == WORK_BEGUN })
        }
    }
}

/// Does the work in the calling thread, if that is the only one: it stands still while it does something else.
fn run_alone(plan: Plan, tasks: &TaskDir, maps: &MapsFile, work: &mut Work<'_>) -> Result<Summary, Lost> {
    let begin = Moment::now();
    let threads = tasks.count().map_err(Lost::Start)?;
    if threads != 1 {
        return Err(Lost::Emulated { threads });
    }
    let mask = AtomicU64::new(0);
    let _masked = Masked::all(&mask);
    let creator = Creator { tid: task::own_tid(), mask: &mask, own_frames_below: plan.own_frames_below };
    let thread = Thread { tid: creator.tid, state: State::Stopped { signal: 0 } };
    work(&Stopped::alone(&[thread], creator, maps));
    Ok(Summary { threads, stop_ns: Moment::now().nanos_since(begin), rounds: 1, restarted_syscalls: 0 })
}

/// Where the task begins. A panic cannot leave an `extern "C"` function: it would abort the task, not the process.
extern "C" fn task_main(argument: *mut libc::c_void) -> libc::c_int {
    let meeting = argument.cast::<Meeting<'_, '_>>();
    // SAFETY: the creator passes its `Meeting`, which lives longer than this task; both only share it, its cells aside.
    let meeting = unsafe { &*meeting };
    // Better to lose this task than to leave the process standing still for ever. Where there are no timers, there is no such net.
    let watchdog = task::Watchdog::new().ok();
    let watch = |limit| watchdog.iter().for_each(|watchdog| watchdog.set(limit));
    watch(meeting.plan.deadline.saturating_add(meeting.plan.work_limit));
    // Whoever killed the creator did not mean this task to go on alone. If it has died already, the parent is another.
    let _ = task::die_with_parent();
    if task::parent_pid() != meeting.process {
        return 1;
    }
    while meeting.progress.load(Ordering::Acquire) == WAITING {
        task::sleep_while(&meeting.progress, WAITING);
    }
    let outcome = stop_and_work(meeting, watch);
    // SAFETY: the creator reads this cell only after the store below.
    unsafe { meeting.outcome.get().write(MaybeUninit::new(outcome)) };
    meeting.progress.store(OUTCOME_STORED, Ordering::Release);
    0
}

/// What the task is for. `watch` says how long the next step may take.
fn stop_and_work(meeting: &Meeting<'_, '_>, watch: impl Fn(Duration)) -> Result<Summary, Failure> {
    let Plan { deadline, work_limit, .. } = meeting.plan;
    // SAFETY: the action belongs to this task alone (no CLONE_SIGHAND). The kernel reports stops by SIGCHLD only if it is not ignored.
    unsafe { signal::reset_action(libc::SIGCHLD) }?;
    task::raise_own_priority();

    // SAFETY: between the gate and the outcome, this task alone uses the cell.
    let OfTask { threads, work } = unsafe { &mut *meeting.of_task.get() };
    let mut session = Session::new(meeting.process, meeting.tasks, threads);
    session.stop(Moment::now().after(deadline))?;
    // Relaxed: it only matters once this task has ended, and its end orders it.
    meeting.progress.store(WORK_BEGUN, Ordering::Relaxed);
    watch(work_limit);
    work(&Stopped::new(session.threads(), meeting.creator, meeting.maps));
    watch(RESUME_LIMIT);
    Ok(session.resume())
}

/// The calling thread, blocking every signal until it is dropped.
struct Masked<'a> {
    /// The mask to go back to. The work may change it.
    mask: &'a AtomicU64,
}

impl<'a> Masked<'a> {
    fn all(mask: &'a AtomicU64) -> Self {
        mask.store(signal::replace_mask(SignalSet::ALL).bits(), Ordering::Relaxed);
        Self { mask }
    }
}

impl Drop for Masked<'_> {
    fn drop(&mut self) {
        signal::replace_mask(SignalSet::from_bits(self.mask.load(Ordering::Relaxed)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_creator_blocks_everything_and_goes_back_to_what_the_work_left() {
        let own_mask = || {
            let mask = signal::replace_mask(SignalSet::ALL);
            signal::replace_mask(mask);
            mask
        };
        let before = own_mask();
        let mask = AtomicU64::new(0);
        let masked = Masked::all(&mask);
        assert_eq!(own_mask(), SignalSet::ALL.without(libc::SIGKILL).without(libc::SIGSTOP));
        assert_eq!(SignalSet::from_bits(mask.load(Ordering::Relaxed)), before);
        mask.store(before.with(libc::SIGUSR1).bits(), Ordering::Relaxed);
        drop(masked);
        assert_eq!(own_mask(), before.with(libc::SIGUSR1));
        signal::replace_mask(before);
    }
}
