//! Who stops the threads of a process that is patched.
//!
//! Owns [`Tracing`], what a transition wants of whoever traces the process, and [`Standstill`], its threads while they stand still. A command that comes by itself traces
//! for moments only: that is [`own`](super::own). Invariant: whoever was stopped goes on where it was, whatever becomes of the work.

use std::{
    io,
    time::{Duration, Instant},
};

use trapline_engine::Addr;

use super::Process;
use crate::{
    inject::Gadgets,
    remote::Remote,
    sys::{Tid, memory::Memory},
};

/// What is done by a thread that is stopped.
pub(crate) type Errand<'a> = dyn FnMut(&mut Remote) -> io::Result<()> + Send + 'a;

/// What is done while all stand still. It is told for how long the first one does.
pub(crate) type Work<'a> = dyn FnMut(&mut dyn Standstill, Duration) + Send + 'a;

/// Whoever traces the process.
pub(crate) trait Tracing {
    /// Stops all threads once, and runs `work` if all of them stand still in time. Also returned is how long the stop was, be it complete or not.
    ///
    /// # Errors
    /// Not all of them did: `work` was not run. `TimedOut` if there was not enough time, `PermissionDenied` if somebody else traces one.
    fn stop(&mut self, work: &mut Work<'_>) -> (io::Result<()>, Duration);

    /// Has a thread do something, while the others run. It is stopped wherever it is, preferably asleep in a system call.
    fn borrow(&mut self, process: &Process, work: &mut Errand<'_>) -> io::Result<()>;

    /// Lets some time pass.
    fn pause(&mut self, pause: Duration);
}

/// All threads of a process, which stand still.
pub(crate) trait Standstill {
    /// Them.
    fn threads(&self) -> Vec<Tid>;

    /// Lets some of them go on alone for a moment. Returns one that does not, as somebody else wants it to stand where it is, or that has not stopped again in time.
    fn let_on(&mut self, tids: &[Tid], moment: Duration, until: Instant) -> io::Result<Option<Tid>>;

    /// Whether no thread runs: those that were let on may have started some.
    fn is_complete(&self) -> bool;

    /// What the program has in its code, without what its tracer has put there.
    fn read_code(&self, memory: &Memory, at: Addr, len_bytes: usize) -> io::Result<Vec<u8>>;

    /// Puts a jump there, or what was there before. It holds for whoever calls the function, in whatever way; what its tracer has put there stays.
    fn write_code(&mut self, memory: &Memory, at: Addr, bytes: &[u8]) -> io::Result<()>;

    /// Has a thread do something.
    fn errand(&mut self, memory: &Memory, gadgets: Gadgets, work: &mut Errand<'_>) -> io::Result<()>;
}

/// Has a thread do something that has a result, while the others run.
pub(super) fn borrow<R: Send>(
    tracing: &mut dyn Tracing,
    process: &Process,
    mut work: impl FnMut(&mut Remote) -> io::Result<R> + Send,
) -> io::Result<R> {
    let mut result = None;
    tracing.borrow(process, &mut |remote| {
        result = Some(work(remote)?);
        Ok(())
    })?;
    // A thread that was there has done it.
    result.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}
