//! A thread of the process that works for us for a moment, while all others run on.
//!
//! Owns [`borrow`], and [`with_own_tracer`] for all who trace for a moment. The thread is stopped wherever it is, preferably asleep in a system call. It goes on where it was, even if we are gone meanwhile.

use std::{
    fs, io, thread,
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

/// Runs `work` in a thread of its own. The kernel lets all go on whom it traces when that ends, whatever happened.
pub(super) fn with_own_tracer<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
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
