//! Who stops the threads of a process that is patched.
//!
//! Owns [`Tracing`], what a transition wants of whoever traces the process, and [`Standstill`], its threads while they stand still. A command that comes by itself traces
//! for moments only: that is [`own`](super::own). A recorder traces
//! it anyway, and has put its own code in between ([`Hooks`]). Invariant: whoever was stopped goes on where it was, whatever becomes of the work.

use std::{
    io,
    sync::Mutex,
    time::{Duration, Instant},
};

use trapline_engine::{Addr, AddrRange};
use trapline_image::ArmedSite;
use trapline_process::quiesce::RangeSet;

use super::Process;
use crate::{
    inject::Gadgets,
    places::Places,
    remote::Remote,
    shadows::{self, Page},
    space::AgentAt,
    sys::{Tid, maps::Mapping, memory::Memory},
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

    /// Lets some time pass. Returns whether it is worth to go on.
    fn pause(&mut self, pause: Duration) -> bool;

    /// What it has put between the program's functions and their callers, for who asks whether somebody is in these ranges.
    ///
    /// # Errors
    /// It cannot be read.
    fn hooks(&self, ranges: &RangeSet) -> io::Result<Option<Hooks>>;
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

/// What a tracer has put between the program's functions and their callers.
#[derive(Debug)]
pub(crate) struct Hooks {
    agent: AgentAt,
    /// Where the agent's code is: whoever is there may have any function as its caller.
    pub(super) code: AddrRange,
    places: Places,
    /// Of functions that are asked about: where their moved instructions were, and where they are, but for the first. Who is at that has not begun.
    pub(super) moved: Vec<(Addr, AddrRange)>,
    /// What was read of shadows last.
    page: Mutex<Option<Page>>,
}

impl Hooks {
    /// Those of a process that is armed: what is asked about are these sites.
    pub(crate) fn new<'a>(
        agent: AgentAt,
        memory: &Memory,
        mappings: &[Mapping],
        sites: impl Iterator<Item = &'a ArmedSite>,
    ) -> io::Result<Self> {
        let code = mappings.iter().find(|mapping| mapping.range.contains(agent.return_code));
        let code = code.ok_or_else(|| io::Error::other("the agent is not there"))?.range;
        let moved = |site: &ArmedSite| {
            let all = AddrRange::new(site.off, site.moved_bytes as u64);
            (site.window_at, AddrRange { start: all.start.after(1), ..all })
        };
        Ok(Self {
            agent,
            code,
            places: Places::read(memory, &agent)?,
            moved: sites.map(moved).collect(),
            page: Mutex::new(None),
        })
    }

    /// What it has put in the place of return addresses.
    pub(super) fn return_code(&self) -> u64 {
        self.agent.return_code.value()
    }

    /// The return address that was in a slot.
    pub(super) fn return_at(&self, memory: &Memory, slot: Addr) -> Option<u64> {
        let mut page = self.page.lock().ok()?;
        shadows::return_at(&self.agent, memory, slot, &mut page)
    }

    /// Has the process be read again, which has gone on.
    pub(super) fn look_again(&self) {
        if let Ok(mut page) = self.page.lock() {
            *page = None;
        }
    }

    /// The instruction of the program that one stands for.
    pub(super) fn program_at(&self, at: Addr) -> Option<Addr> {
        if self.places.is_stub(at) { self.places.code_at(at) } else { Some(at) }
    }
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
