//! The tracer's side of a stop: seize, interrupt, wait, let go.
//!
//! A [`Session`] runs in the stopper task, which blocks every signal. Its invariant: when it is dropped, whatever happened, each thread that
//! it stopped has been let go with the signal that it was about to receive.
//!
//! The order of [`Session::stop`]:
//! 1. seize the threads while they run, so that what this costs is no pause;
//! 2. interrupt them all, from here on the clock of the pause runs;
//! 3. wait until each stands still;
//! 4. look for threads that were started meanwhile, and stop those too; the stop is complete when a list made with nobody running has
//!    no new name and the length that the kernel counts.

use std::time::Duration;

use crate::sys::{
    clock::Moment,
    errno::Errno,
    pages::PageVec,
    procfs::{self, TaskDir, Tid},
    ptrace::{self, Event},
    restart,
    signal::{self, SignalSet},
};

/// How often a thread that does not stop is looked at for having ended. A zombie that leads its group is never reported.
const STATE_CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// How long to wait for a thread to leave the list that has ended, but is not gone.
const LEAVING_INTERVAL: Duration = Duration::from_micros(100);

/// A thread that the session knows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thread {
    pub(super) tid: Tid,
    pub(super) state: State,
}

/// How far a thread has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// Traced, and still running.
    Seized,
    /// Standing still, with the signal that it is about to receive (0 for none).
    Stopped { signal: i32 },
    /// The first thread of the process has ended; it stays in the list until the last one has.
    Zombie,
}

/// Why the threads could not be stopped. `Copy`, because it is made while some stand still.
#[derive(Clone, Copy, Debug)]
pub(super) enum Failure {
    /// The kernel does not allow this thread to be traced.
    Refused { tid: Tid, errno: Errno },
    /// This thread did not stop in time; the letter is its state then.
    Unstoppable { tid: Tid, state: u8 },
    /// New threads kept appearing.
    Unsettled,
    /// The list of threads could not be read, or kept.
    Kernel(Errno),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Kernel(errno)
    }
}

/// The threads of one process, being stopped or standing still.
pub(super) struct Session<'a> {
    process: Tid,
    tasks: &'a TaskDir,
    /// Ascending by number.
    threads: &'a mut PageVec<Thread>,
    /// When the first thread was interrupted.
    begun: Option<Moment>,
    rounds: u32,
    restarted_syscalls: u32,
}

/// What a session has to tell when it is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summary {
    pub(super) threads: usize,
    pub(super) stop_ns: u64,
    pub(super) rounds: u32,
    pub(super) restarted_syscalls: u32,
}

impl<'a> Session<'a> {
    /// A session for the process whose threads `tasks` lists. `threads` is where it keeps them.
    pub(super) fn new(process: Tid, tasks: &'a TaskDir, threads: &'a mut PageVec<Thread>) -> Self {
        Self { process, tasks, threads, begun: None, rounds: 0, restarted_syscalls: 0 }
    }

    /// Stops every thread, or fails; then those that did stop go on when the session is dropped.
    pub(super) fn stop(&mut self, deadline: Moment) -> Result<(), Failure> {
        self.seize_new_threads()?;
        self.begun = Some(Moment::now());
        loop {
            self.interrupt_seized();
            self.await_seized(deadline)?;
            let found = self.seize_new_threads()?;
            if found == 0 && self.tasks.count()? == self.threads.len() {
                return Ok(());
            }
            if deadline.time_left().is_none() {
                return Err(Failure::Unsettled);
            }
            if found == 0 {
                // A thread is leaving, for which it may need this CPU; or the list was cut short by one that left.
                signal::await_pending(SignalSet::EMPTY.with(libc::SIGCHLD), LEAVING_INTERVAL);
            }
        }
    }

    /// The threads that it knows: after a successful [`stop`](Self::stop), all of the process's.
    pub(super) fn threads(&self) -> &[Thread] {
        self.threads
    }

    /// How long the first thread has been interrupted.
    pub(super) fn stopped_ns(&self) -> u64 {
        self.begun.map_or(0, |begun| Moment::now().nanos_since(begun))
    }

    /// Lets every thread go on, and sums up.
    pub(super) fn resume(mut self) -> Summary {
        let threads = self.threads.iter().filter(|thread| matches!(thread.state, State::Stopped { .. })).count();
        self.release();
        let stop_ns = self.stopped_ns();
        Summary { threads, stop_ns, rounds: self.rounds, restarted_syscalls: self.restarted_syscalls }
    }

    /// Seizes the threads that the kernel lists and the session does not know, and returns how many.
    fn seize_new_threads(&mut self) -> Result<usize, Failure> {
        self.rounds += 1;
        let Self { process, tasks, threads, .. } = self;
        let mut found = 0;
        tasks.for_each_thread(|tid| {
            let Err(index) = threads.binary_search_by_key(&tid, |thread| thread.tid) else { return Ok(()) };
            let state = match ptrace::seize(tid) {
                Ok(()) => State::Seized,
                Err(Errno(libc::ESRCH)) => return Ok(()),
                Err(errno) => match tasks.state(tid) {
                    // A thread that has ended cannot be traced. All but the first are about to leave the list.
                    Some(procfs::ZOMBIE | procfs::DEAD) if tid == *process => State::Zombie,
                    Some(procfs::ZOMBIE | procfs::DEAD) | None => return Ok(()),
                    Some(_) => return Err(Failure::Refused { tid, errno }),
                },
            };
            threads.insert(index, Thread { tid, state })?;
            found += 1;
            Ok(())
        })?;
        Ok(found)
    }

    fn interrupt_seized(&self) {
        for thread in self.threads.iter().filter(|thread| thread.state == State::Seized) {
            // It fails for a thread that has ended, which waiting for it finds out.
            let _ = ptrace::interrupt(thread.tid);
        }
    }

    /// Waits for each interrupted thread in turn, and forgets those that ended instead.
    fn await_seized(&mut self, deadline: Moment) -> Result<(), Failure> {
        let mut index = 0;
        while let Some(&Thread { tid, state }) = self.threads.get(index) {
            if state != State::Seized {
                index += 1;
                continue;
            }
            match self.await_stop(tid, deadline)? {
                Some(state) => {
                    self.threads[index].state = state;
                    index += 1;
                }
                None => self.threads.remove(index),
            }
        }
        Ok(())
    }

    /// Waits until `tid` stands still and returns its new state, or `None` if it has ended.
    ///
    /// The kernel sends SIGCHLD for each event. It is blocked, so it stays pending from before the sleep, and none is missed. A plain
    /// `wait` has no timeout, and polling from a real-time task would keep the thread from running to where it stops.
    fn await_stop(&mut self, tid: Tid, deadline: Moment) -> Result<Option<State>, Failure> {
        loop {
            match ptrace::poll(tid) {
                Ok(None) => {}
                Ok(Some(Event::Stopped { signal })) => {
                    self.hide_interruption(tid);
                    return Ok(Some(State::Stopped { signal }));
                }
                Ok(Some(Event::Ended)) | Err(_) => return Ok(None),
            }
            let left = deadline.time_left();
            let timeout = left.map_or(Duration::ZERO, |left| left.min(STATE_CHECK_INTERVAL));
            if signal::await_pending(SignalSet::EMPTY.with(libc::SIGCHLD), timeout) {
                continue;
            }
            match self.tasks.state(tid) {
                None => return Ok(None),
                Some(procfs::ZOMBIE | procfs::DEAD) if tid == self.process => return Ok(Some(State::Zombie)),
                Some(state) if left.is_none() => return Err(Failure::Unstoppable { tid, state }),
                Some(_) => {}
            }
        }
    }

    /// Has the kernel start the system call again that a stopped thread was in, where it would return `EINTR` on our account.
    fn hide_interruption(&mut self, tid: Tid) {
        if let Ok(Some(number)) = ptrace::failing_call(tid, libc::EINTR)
            && let Ok(mode) = ptrace::mode(tid)
            && restart::may_start_again(mode, number)
            && ptrace::set_failure(tid, ptrace::ERESTARTNOHAND).is_ok()
        {
            self.restarted_syscalls += 1;
        }
    }

    fn release(&mut self) {
        for index in 0..self.threads.len() {
            let Thread { tid, state } = self.threads[index];
            let signal = match state {
                State::Stopped { signal } => signal,
                // It may have stopped after we gave up. A thread that never does is let go when this task ends.
                State::Seized => match ptrace::poll(tid) {
                    Ok(Some(Event::Stopped { signal })) => {
                        self.hide_interruption(tid);
                        signal
                    }
                    _ => continue,
                },
                State::Zombie => continue,
            };
            // It fails for a thread that was killed meanwhile.
            let _ = ptrace::detach(tid, signal);
        }
        self.threads.clear();
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.release();
    }
}
