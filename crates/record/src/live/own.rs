//! A command that traces the process itself, for moments.
//!
//! Owns [`Own`]. Each stop has a tracer of its own: a thread that could not be stopped is traced until its tracer ends, and nobody else can trace it until then.

use std::{
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use trapline_engine::Addr;
use trapline_process::quiesce::{RangeSet, stop_process};

use super::{
    Process,
    tracing::{Errand, Hooks, Standstill, Tracing, Work},
};
use crate::{
    inject::Gadgets,
    remote::Remote,
    sys::{
        Tid, by_processors,
        memory::Memory,
        ptrace::{self, Standing, Stopped},
        spawn::{self, Urgent},
        threads_of,
    },
};

/// How long threads have to stand still. A stop that takes longer is one that the program would notice.
const STOP_PATIENCE: Duration = Duration::from_millis(15);

/// How long a single thread has to. One that waits for its child after vfork takes longer; then the next one is asked.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long until it is looked whether a tracer is gone, which takes the kernel far less.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// The tracer of a process that nobody traces.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own {
    pid: Tid,
}

impl Own {
    pub(super) fn new(pid: Tid) -> Self {
        Self { pid }
    }
}

impl Tracing for Own {
    fn stop(&mut self, work: &mut Work<'_>) -> (io::Result<()>, Duration) {
        let _urgent = Urgent::with_new_threads();
        let pid = self.pid;
        with_own_tracer(|| {
            stop_process(pid, STOP_PATIENCE, |threads, stopped_for| {
                work(&mut Still { pid, threads: threads.to_vec(), before: None }, stopped_for);
            })
        })
    }

    fn borrow(&mut self, process: &Process, work: &mut Errand<'_>) -> io::Result<()> {
        let _urgent = Urgent::with_new_threads();
        with_own_tracer(|| {
            let gadgets = process.gadgets(&[])?;
            let tid = stop_one(process.pid)?;
            let done = work_in(tid, &process.memory, gadgets, work);
            ptrace::detach(tid, 0)?;
            done
        })
    }

    fn pause(&mut self, pause: Duration) -> bool {
        thread::sleep(pause);
        true
    }

    fn hooks(&self, _ranges: &RangeSet) -> io::Result<Option<Hooks>> {
        Ok(None)
    }
}

/// The threads that a tracer of its own has stopped.
struct Still {
    pid: Tid,
    threads: Vec<Tid>,
    /// All that there were when the first were let on.
    before: Option<Vec<Tid>>,
}

impl Standstill for Still {
    fn threads(&self) -> Vec<Tid> {
        self.threads.clone()
    }

    fn let_on(&mut self, tids: &[Tid], moment: Duration, until: Instant) -> io::Result<Option<Tid>> {
        self.before.get_or_insert_with(|| threads_of(self.pid));
        for some in by_processors(tids) {
            if Instant::now() > until {
                break;
            }
            for &tid in some {
                let signal = match ptrace::standing(tid) {
                    Ok(Standing::Signal(signal)) => signal,
                    Ok(Standing::WithItsGroup) => return Ok(Some(tid)),
                    Ok(Standing::Interrupted) | Err(_) => 0,
                };
                ptrace::unless_it_ended(ptrace::resume(tid, signal))?;
            }
            thread::sleep(moment);
            for &tid in some {
                if ptrace::stop(tid, until)? == Stopped::NotYet {
                    return Ok(Some(tid));
                }
            }
        }
        Ok(None)
    }

    fn is_complete(&self) -> bool {
        self.before.as_ref().is_none_or(|before| threads_of(self.pid).iter().all(|tid| before.contains(tid)))
    }

    fn read_code(&self, memory: &Memory, at: Addr, len_bytes: usize) -> io::Result<Vec<u8>> {
        memory.read_vec(at, len_bytes)
    }

    fn write_code(&mut self, memory: &Memory, at: Addr, bytes: &[u8]) -> io::Result<()> {
        memory.write(at, bytes)
    }

    fn errand(&mut self, memory: &Memory, gadgets: Gadgets, work: &mut Errand<'_>) -> io::Result<()> {
        // Not one that is about to receive a signal, if there is another.
        let is_free = |tid: &&Tid| matches!(ptrace::standing(**tid), Ok(Standing::Interrupted));
        let tid = self.threads.iter().find(is_free).or(self.threads.first()).copied();
        work_in(tid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?, memory, gadgets, work)
    }
}

/// Has a stopped thread work.
fn work_in(tid: Tid, memory: &Memory, gadgets: Gadgets, work: &mut Errand<'_>) -> io::Result<()> {
    ptrace::tell_system_calls(tid)?;
    let mut remote = Remote::by_gadgets(tid, memory, gadgets)?;
    let done = work(&mut remote);
    for signal in remote.finish()? {
        spawn::kill(tid, signal);
    }
    done
}

/// Runs `work` in a thread of its own. The kernel lets all go on whom it traces when that ends, whatever happened; they are free when this returns.
fn with_own_tracer<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let both = || (work(), spawn::own_tid());
    let (done, tracer) = thread::scope(|scope| match scope.spawn(both).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    });
    // A thread counts as ended when it has left its memory, which is before the kernel lets go whom it traces (do_exit: exit_mm, then exit_notify): the next tracer would be
    // refused. When the kernel has forgotten it, both are done.
    let task = format!("/proc/self/task/{tracer}");
    let until = Instant::now() + PATIENCE;
    while Path::new(&task).exists() && Instant::now() < until {
        thread::sleep(LOOK_AGAIN);
    }
    done
}

/// Stops a thread.
fn stop_one(pid: Tid) -> io::Result<Tid> {
    let mut failure = io::Error::from_raw_os_error(libc::ESRCH);
    for tid in threads(pid) {
        match ptrace::seize(tid).and_then(|()| ptrace::stop(tid, Instant::now() + PATIENCE)) {
            Ok(Stopped::Yes) => return Ok(tid),
            Ok(Stopped::Ended) => {}
            Ok(Stopped::NotYet) => failure = io::ErrorKind::TimedOut.into(),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// All threads, those first that sleep in a system call.
fn threads(pid: Tid) -> Vec<Tid> {
    let mut all = threads_of(pid);
    all.sort_by_cached_key(|tid| {
        let state = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
        !state.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'))
    });
    all
}
