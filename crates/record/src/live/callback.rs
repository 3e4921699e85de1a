//! Functions of a patch that are called when it comes or goes.
//!
//! Owns [`call`]. One thread is stopped wherever it is, preferably asleep in a system call, and calls the function, as if for a signal: with all signals blocked that do
//! not mean that it failed, on a frame that takes it back to where it was even if we are gone. All others run on. So the function may
//! do what a signal handler may (signal-safety(7)).

use std::{fs, io, thread, time::Duration};

use trapline_engine::Addr;
use trapline_patch::When;

use super::{LiveError, Process, state::Active};
use crate::{
    remote::{CallOutcome, Remote},
    sys::{Tid, ptrace, spawn},
};

/// Calls the function that a patch has for this moment, if it has one.
pub(super) fn call(process: &Process, patch: &Active, when: When, deadline: Duration) -> Result<(), LiveError> {
    let Some(function) = patch.callback(when) else { return Ok(()) };
    let callback = || format!("trapline_{}", when.code());
    // A tracer of its own: whatever happens, the thread goes on when that ends.
    let outcome = thread::scope(|scope| {
        let tracer = scope.spawn(|| have_called(process, Addr::new(patch.call_at), function, deadline));
        tracer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let failed = |what: String| Err(LiveError::Callback { callback: callback(), what });
    match outcome.map_err(process.system("having a thread call a function of the patch"))? {
        CallOutcome::Returned(0) => Ok(()),
        CallOutcome::Returned(answer) => match when {
            When::PreApply | When::PreRevert => {
                Err(LiveError::Vetoed { callback: callback(), answer, is_apply: when == When::PreApply })
            }
            // What these say changes nothing.
            When::PostApply | When::PostRevert => Ok(()),
        },
        CallOutcome::Failed { signal, at } => failed(format!("was ended by signal {signal} at {at}")),
        CallOutcome::StillRuns => failed(format!("did not return within {} s", deadline.as_secs_f32())),
    }
}

fn have_called(process: &Process, stub: Addr, function: Addr, deadline: Duration) -> io::Result<CallOutcome> {
    let gadgets = process.gadgets(&[])?;
    let tid = one_thread(process.pid)?;
    ptrace::seize(tid)?;
    ptrace::interrupt(tid)?;
    // What it was about to receive goes with it when it is let go.
    let pending = match ptrace::wait_for_stop(tid)? {
        ptrace::Stop::Signal(signal) => signal,
        _ => 0,
    };
    ptrace::hide_interruption(tid)?;
    ptrace::tell_system_calls(tid)?;
    let mut remote = Remote::by_gadgets(tid, &process.memory, gadgets)?;
    let outcome = remote.call(stub, function, deadline);
    let signals = remote.finish()?;
    ptrace::detach(tid, pending)?;
    for signal in signals {
        spawn::kill(tid, signal);
    }
    outcome
}

/// A thread that sleeps in a system call, if there is one, and any otherwise.
fn one_thread(pid: Tid) -> io::Result<Tid> {
    let mut all = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        all.extend(entry?.file_name().to_str().and_then(|name| name.parse::<Tid>().ok()));
    }
    let sleeps = |tid: &&Tid| {
        let state = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
        state.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'))
    };
    let found = all.iter().find(sleeps).or(all.first());
    found.copied().ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}
