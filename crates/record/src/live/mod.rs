//! Live patches in a running process: apply, revert, list.
//!
//! Owns [`apply`], [`revert`] and [`list`]. A patch is fitted by [`trapline_patch::Linker`]; `objects` says what the process has loaded and where its symbols are,
//! `prepare` lays out what is mapped for a patch, `unwinder` has exceptions go through new code, `exchange` is what is written while all stand still, `transition` asks where
//! the threads are then, `walk` follows their stacks, `callback` calls a function of the patch, and `state` keeps what was done in the process itself, so that a later command
//! knows everything. `coming` and `going` put all of that in order; who stops the threads for them, and has one work while the others run, is `tracing`, which for a
//! command is `own`. Where a recorder traces the process, the command hands all of it over to that (`serve`).
//!
//! ```text
//! fix.tlp + objects -> link -> map, write (the process runs) -> stop, check all threads -> jumps (one stop) -> go on
//!                                                                  | busy: go on at once, pause, again, until the deadline
//! ```
//!
//! Invariants: either all functions are replaced or none (I5); nobody is in a replaced or pinned function when that happens; no page is ever writable and executable
//! (I8); whoever gives up leaves nothing behind (I6).

mod callback;
mod code;
mod coming;
mod error;
mod exchange;
mod file;
mod going;
mod objects;
mod own;
mod prepare;
pub(crate) mod serve;
mod state;
pub(crate) mod tracing;
mod transition;
mod unwinder;
mod walk;

use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixListener},
        },
    },
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use trapline_engine::{Addr, AddrRange, Mode, insn::InsnBytes};
use trapline_image::Diverted;
use trapline_patch::{Patch, SymbolFile};

use self::{
    coming::Coming, going::Going, objects::Objects, own::Own, prepare::Piece, serve::Recorder, tracing::Tracing,
    transition::Report, walk::Walker,
};
pub use self::{
    error::{Blocked, LiveError},
    state::{Active, Body, Called, Pinned, Replaced, Status},
    unwinder::Detour,
};
use crate::{
    inject::Gadgets,
    refusal::{self, Refusal},
    sys::{
        Tid,
        maps::{self, Mapping},
        memory::Memory,
        width,
    },
    text::Hidden,
};

/// A jump with a displacement of 32 bits.
const JUMP_BYTES: usize = 5;

const PAGE_BYTES: u64 = 4096;

/// How a patch is to be applied.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// How long it is tried while threads are in the functions.
    pub deadline: Duration,
    /// Everything is checked, and nothing changed.
    pub is_dry_run: bool,
    /// What is refused because it may go wrong is done, and the patch marked.
    pub is_forced: bool,
}

/// How a patch was applied or reverted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// What is, or was, active.
    pub patch: Active,
    /// What was active before, for the same file.
    pub replaced: Option<String>,
    /// How often the threads were stopped.
    pub stops: u32,
    /// The longest stop.
    pub longest_stop: Duration,
    /// How often threads were let go on alone, while the others stood still.
    pub let_out: u32,
}

impl Done {
    fn new(patch: Active, replaced: Option<String>, report: Report) -> Self {
        Self { patch, replaced, stops: report.stops, longest_stop: report.longest, let_out: report.let_out }
    }
}

/// A process that is looked at, by one command at a time.
pub(crate) struct Process {
    pid: Tid,
    /// What its program is.
    mode: Mode,
    pub(crate) memory: Memory,
    mappings: Vec<Mapping>,
    /// What its tracer has put into its code.
    hidden: Hidden,
    /// Held as long as this is.
    _lock: UnixListener,
}

impl Process {
    /// To change it.
    fn open(pid: Tid) -> Result<Self, LiveError> {
        let harmless = |refusal: &Refusal| {
            use Refusal::{Bits32, Go, SegmentInUse, Static};
            // No agent comes in.
            matches!(refusal, Bits32 | Static | Go | SegmentInUse { .. })
        };
        Self::unless(pid, harmless)
    }

    /// To look at it, which is possible whoever traces it, and also while it is stopped.
    fn look(pid: Tid) -> Result<Self, LiveError> {
        let harmless = |refusal: &Refusal| {
            use Refusal::{Bits32, Go, SegmentInUse, Static, Stopped, Traced};
            matches!(refusal, Bits32 | Static | Go | SegmentInUse { .. } | Traced { .. } | Stopped)
        };
        Self::unless(pid, harmless)
    }

    /// To change or to look at one that we trace.
    fn open_recorded(pid: Tid, tracer: Tid, is_to_change: bool) -> Result<Self, LiveError> {
        let harmless = |refusal: &Refusal| match refusal {
            Refusal::Traced { tracer: other, .. } => *other == tracer,
            Refusal::Stopped => !is_to_change,
            refusal => matches!(refusal, Refusal::Static | Refusal::Go | Refusal::SegmentInUse { .. }),
        };
        Self::unless(pid, harmless)
    }

    fn unless(pid: Tid, harmless: impl Fn(&Refusal) -> bool) -> Result<Self, LiveError> {
        // First, as another command's thread is a tracer for moments.
        let lock = lock(pid)?;
        if let Some(reason) = refusal::diagnose(pid).into_iter().find(|refusal| !harmless(refusal)) {
            return Err(LiveError::NotPatchable { pid, reason });
        }
        let memory = Memory::open(pid).map_err(|error| LiveError::system(pid, "opening its memory", error))?;
        let mappings = maps::read(pid).map_err(|error| LiveError::system(pid, "reading its mappings", error))?;
        // A recorder that came meanwhile may have mapped some of them, and takes that away.
        if let Some(reason) = refusal::examine(pid).filter(|refusal| !harmless(refusal)) {
            return Err(LiveError::NotPatchable { pid, reason });
        }
        let mode = width::mode_of_program(pid);
        Ok(Self { pid, mode, memory, mappings, hidden: Hidden::default(), _lock: lock })
    }

    fn system(&self, doing: &'static str) -> impl Fn(io::Error) -> LiveError + use<> {
        let pid = self.pid;
        move |error| LiveError::system(pid, doing, error)
    }

    /// What is active, without what a command that died has left before anything was replaced.
    fn active(&self) -> Vec<(Status, Active)> {
        let all = state::find(&self.memory, &self.mappings, &self.hidden);
        all.into_iter().filter(|(status, _)| *status != Status::Preparing).collect()
    }

    /// The same, however far they are.
    fn patches(&self) -> Vec<Active> {
        self.active().into_iter().map(|(_, patch)| patch).collect()
    }

    /// What it has in its code, beneath what its tracer has put there.
    fn code(&self, at: Addr, len_bytes: usize) -> io::Result<Vec<u8>> {
        self.hidden.read(&self.memory, at, len_bytes)
    }

    /// Code of it that makes system calls, and is not in this memory of ours.
    pub(crate) fn gadgets(&self, ours: &[AddrRange]) -> io::Result<Gadgets> {
        let found = Gadgets::find(self.mode, &self.memory, &self.mappings, ours);
        found.ok_or_else(|| io::Error::other("it has no code that makes system calls"))
    }

    /// What it has loaded.
    fn objects(&self) -> Result<Objects, LiveError> {
        let objects = Objects::of(self.pid, self.mode, &self.memory, &self.mappings);
        objects.map_err(self.system("reading its objects"))
    }

    /// Follows the stacks of its threads.
    fn walker(&self, objects: &Objects, active: &[Active]) -> Walker {
        Walker::new(self.mode, objects, &self.memory, &self.mappings, active)
    }

    /// Has it unmap a patch that nothing leads to.
    fn unmap(&self, tracing: &mut dyn Tracing, patch: &Active) -> io::Result<()> {
        tracing::borrow(tracing, self, |remote| state::give_back(remote, &self.memory, patch))
    }

    /// Gives back what a command that died has left.
    fn sweep(&self, tracing: &mut dyn Tracing) -> Result<(), LiveError> {
        let all = state::find(&self.memory, &self.mappings, &self.hidden);
        for (_, left) in all.into_iter().filter(|(status, _)| *status == Status::Preparing) {
            self.unmap(tracing, &left).map_err(self.system("unmapping what an earlier command left"))?;
        }
        Ok(())
    }
}

/// Keeps other commands from the process. The kernel lets go of it when we end, however that is.
fn lock(pid: Tid) -> Result<UnixListener, LiveError> {
    let space = std::fs::metadata(format!("/proc/{pid}/ns/pid")).map_or(0, |space| space.ino());
    let address = SocketAddr::from_abstract_name(format!("trapline-patch-{space}-{pid}"));
    let lock = address.and_then(|address| UnixListener::bind_addr(&address));
    lock.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => LiveError::InUse { pid },
        _ => LiveError::system(pid, "keeping other commands from it", error),
    })
}

/// Puts a patch into a running process. What is active for the same file is replaced by it, in the same moment.
///
/// # Errors
/// It does not belong to the process, a callback was against it, or somebody was in a function that it replaces until the deadline. Nothing of the process was changed
/// then.
pub fn apply(pid: Tid, patch: &Patch, how: How) -> Result<Done, LiveError> {
    between_recordings(pid, how.deadline, |deadline| apply_now(pid, patch, How { deadline, ..how }))
}

/// Tries it again while a recorder is there, or comes in the middle, until the time is over. `work` gets what is left of it.
fn between_recordings(
    pid: Tid,
    deadline: Duration,
    mut work: impl FnMut(Duration) -> Result<Done, LiveError>,
) -> Result<Done, LiveError> {
    const PAUSE: Duration = Duration::from_millis(10);
    // Code that a recorder has changed looks like code that is another's. It may have gone since; what is another's does not pass.
    const CHANGES: u32 = 3;
    let until = Instant::now() + deadline;
    let (mut changes, mut left) = (0, deadline);
    loop {
        match work(left) {
            Err(LiveError::OtherCode { .. }) if !left.is_zero() && refusal::is_recorded(pid) => {}
            Err(LiveError::OtherCode { .. }) if changes < CHANGES && !left.is_zero() => changes += 1,
            Err(error) if error.may_pass() && !left.is_zero() => {}
            done => return done,
        }
        thread::sleep(PAUSE.min(left));
        left = until.saturating_duration_since(Instant::now());
    }
}

fn apply_now(pid: Tid, patch: &Patch, how: How) -> Result<Done, LiveError> {
    if let Some(recorder) = Recorder::of(pid) {
        return recorder.apply(patch, how);
    }
    Coming::prepare(Process::open(pid)?, patch, how)?.carry_out(&mut Own::new(pid))
}

/// Takes a patch back: the one of this name, or the only one.
///
/// # Errors
/// There is none, a callback was against it, or somebody was in its functions until the deadline. It is active then as before.
pub fn revert(pid: Tid, name: Option<&str>, deadline: Duration) -> Result<Done, LiveError> {
    between_recordings(pid, deadline, |deadline| revert_now(pid, name, deadline))
}

fn revert_now(pid: Tid, name: Option<&str>, deadline: Duration) -> Result<Done, LiveError> {
    if let Some(recorder) = Recorder::of(pid) {
        return recorder.revert(name, deadline);
    }
    Going::prepare(Process::open(pid)?, name, deadline)?.carry_out(&mut Own::new(pid))
}

/// What patches have put into the code of a process: who traces it puts its own jumps before these, and leaves them behind.
pub(crate) fn diverted(memory: &Memory, mappings: &[Mapping]) -> Vec<Diverted> {
    let patches = state::find(memory, mappings, &Hidden::default()).into_iter().map(|(_, patch)| patch);
    let jumps = patches.flat_map(|patch| {
        let functions = patch.functions.into_iter().map(|function| (function.old, function.jump, function.new));
        functions.chain(patch.detours.into_iter().map(|detour| (detour.at, detour.jump, detour.area.0)))
    });
    // Of several before one unwinder, it is the last one.
    let is_there = |at: u64, jump: &[u8]| memory.read_vec(Addr::new(at), jump.len()).is_ok_and(|there| there == jump);
    jumps
        .filter(|(at, jump, _)| jump.len() == JUMP_BYTES && is_there(*at, jump))
        .map(|(at, jump, to)| Diverted { at: Addr::new(at), jump: InsnBytes::new(&jump), to: Addr::new(to) })
        .collect()
}

/// The patches of a process that counts on its tracer's edits being left out.
pub(crate) fn in_effect(memory: &Memory, mappings: &[Mapping], hidden: &Hidden) -> Vec<Active> {
    let all = state::find(memory, mappings, hidden).into_iter();
    all.filter(|(status, _)| *status == Status::Active).map(|(_, patch)| patch).collect()
}

/// A patch, as it is in a process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed {
    /// How far it is.
    pub status: Status,
    /// What is known of it.
    pub patch: Active,
    /// Files whose unwinders do not know the new code, as they were loaded later.
    pub unaware: Vec<String>,
}

/// What is active in a process.
///
/// # Errors
/// It cannot be looked at.
pub fn list(pid: Tid) -> Result<Vec<Listed>, LiveError> {
    // It knows what is beneath its own jumps.
    match Recorder::of(pid).map(|recorder| recorder.list()) {
        None | Some(Err(LiveError::RecorderLeaves { .. })) => list_of(&Process::look(pid)?),
        Some(listed) => listed,
    }
}

fn list_of(process: &Process) -> Result<Vec<Listed>, LiveError> {
    let active = process.active();
    if active.is_empty() {
        return Ok(Vec::new());
    }
    let objects = process.objects()?;
    // A patch that is in spite of one that cannot be told was forced, which is told.
    let unwinders = unwinder::find(&objects, &process.memory).unwrap_or_default();
    let listed = active.into_iter().map(|(status, patch)| {
        let is_of_interest = patch.unwind.is_some() && status == Status::Active && !patch.is_tainted;
        let unaware =
            unwinders.iter().filter(|unwinder| is_of_interest && !unwinder.is_led(&unwinders, &patch.detours));
        let unaware = unaware.map(|unwinder| unwinder.object().to_owned()).collect();
        Listed { status, patch, unaware }
    });
    Ok(listed.collect())
}

/// What a debugger needs to know of the patches of a process.
///
/// # Errors
/// It cannot be looked at.
pub fn symbol_files(pid: Tid) -> Result<Vec<(Active, SymbolFile)>, LiveError> {
    let process = Process::look(pid)?;
    let files = process.patches().into_iter().map(|patch| {
        let unwind = patch.unwind.map(|(start, end)| AddrRange { start: Addr::new(start), end: Addr::new(end) });
        let tables = unwind.map(|range| {
            let len_bytes = usize::try_from(range.len_bytes()).map_err(io::Error::other)?;
            Ok((range.start, process.memory.read_vec(range.start, len_bytes)?))
        });
        let unwind = tables.transpose().map_err(process.system("reading its unwind tables"))?;
        let function = |body: &Body| (body.name.clone(), AddrRange::new(Addr::new(body.at), body.len_bytes));
        let file = SymbolFile {
            mode: process.mode,
            code: AddrRange { start: Addr::new(patch.code.0), end: Addr::new(patch.code.1) },
            functions: patch.bodies.iter().map(function).collect(),
            unwind,
        };
        Ok((patch, file))
    });
    files.collect()
}
