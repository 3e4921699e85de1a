//! A thread of the process that works for us for a moment, while all others run on.
//!
//! Owns [`borrow`], and [`with_own_tracer`] for all who trace for a moment. The thread is stopped wherever it is, preferably asleep in a system call. It goes on where it was, even if we are gone meanwhile.

use std::{
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::Process;
use crate::{
    remote::Remote,
    sys::{
        Tid,
        ptrace::{self, Stopped},
        spawn::{self, Urgent},
        threads_of,
    },
};

/// How long a thread has to stand still. One that waits for its child after vfork takes longer; then the next one is asked.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long until it is looked whether a tracer is gone, which takes the kernel far less.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// Runs `work` in a thread of its own. The kernel lets all go on whom it traces when that ends, whatever happened; they are free when this returns.
pub(super) fn with_own_tracer<R: Send>(work: impl FnOnce() -> R + Send) -> R {
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

/// Has a thread work.
pub(super) fn borrow<R: Send>(
    process: &Process,
    work: impl FnOnce(&mut Remote) -> io::Result<R> + Send,
) -> io::Result<R> {
    let _urgent = Urgent::with_new_threads();
    with_own_tracer(|| have(process, work))
}

fn have<R>(process: &Process, work: impl FnOnce(&mut Remote) -> io::Result<R>) -> io::Result<R> {
    let gadgets = process.gadgets(&[])?;
    let tid = stop_one(process.pid)?;
    ptrace::tell_system_calls(tid)?;
    let mut remote = Remote::by_gadgets(tid, &process.memory, gadgets)?;
    let done = work(&mut remote);
    let signals = remote.finish()?;
    ptrace::detach(tid, 0)?;
    for signal in signals {
        spawn::kill(tid, signal);
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
