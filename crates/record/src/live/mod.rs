//! Live patches in a running process: apply, revert, list.
//!
//! Owns [`apply`], [`revert`] and [`list`]. A patch is fitted by [`trapline_patch::Linker`]; `objects` says what the process has loaded and where its symbols are,
//! `state` keeps what was done in the process itself, so that a later command knows everything, and `transition` stops the threads and asks where they are.
//!
//! ```text
//! fix.tlp + objects -> link -> map, write (the process runs) -> stop, check all threads -> jumps (one stop) -> go on
//!                                                                  | busy: go on at once, pause, again, until the deadline
//! ```
//!
//! Invariants: either all functions are replaced or none (I5); nobody is in a replaced or pinned function when that happens; no page is ever writable and executable
//! (I8); whoever gives up leaves nothing behind (I6).

mod error;
mod objects;
mod state;
mod transition;

use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixListener},
        },
    },
    time::{Duration, SystemTime},
};

use trapline_engine::{Addr, AddrRange, Mode};
use trapline_patch::{Linked, Linker, Patch, Protection, Role};

pub use self::{
    error::{Blocked, LiveError},
    state::{Active, Pinned, Replaced, Status},
};
use self::{
    objects::{Object, Objects},
    transition::{Check, Report, Transition},
};
use crate::{
    inject::Gadgets,
    refusal::{self, Refusal},
    remote::Remote,
    sys::{
        Tid,
        maps::{self, Mapping},
        memory::Memory,
    },
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
#[derive(Clone, Debug)]
pub struct Done {
    /// What is, or was, active.
    pub patch: Active,
    /// How often the threads were stopped.
    pub stops: u32,
    /// The longest stop.
    pub longest_stop: Duration,
}

/// A process that is looked at, by one command at a time.
struct Process {
    pid: Tid,
    memory: Memory,
    mappings: Vec<Mapping>,
    /// Held as long as this is.
    _lock: UnixListener,
}

impl Process {
    fn open(pid: Tid) -> Result<Self, LiveError> {
        let harmless =
            |refusal: &Refusal| matches!(refusal, Refusal::Static | Refusal::Go | Refusal::SegmentInUse { .. });
        if let Some(reason) = refusal::diagnose(pid).into_iter().find(|refusal| !harmless(refusal)) {
            return Err(LiveError::NotPatchable { pid, reason });
        }
        let lock = lock(pid)?;
        let memory = Memory::open(pid).map_err(|error| LiveError::system(pid, "opening its memory", error))?;
        let mappings = maps::read(pid).map_err(|error| LiveError::system(pid, "reading its mappings", error))?;
        Ok(Self { pid, memory, mappings, _lock: lock })
    }

    fn system(&self, doing: &'static str) -> impl Fn(io::Error) -> LiveError + use<> {
        let pid = self.pid;
        move |error| LiveError::system(pid, doing, error)
    }

    /// What is active, without what a command that died has left before anything was replaced.
    fn active(&self) -> Vec<(Status, Active)> {
        let all = state::find(&self.memory, &self.mappings);
        all.into_iter().filter(|(status, _)| *status != Status::Preparing).collect()
    }

    /// Has one of its threads make system calls, while all stand still.
    fn have_it(&self, work: impl FnOnce(&mut Remote) -> io::Result<()> + Send) -> io::Result<()> {
        let gadgets = Gadgets::find(&self.memory, &self.mappings, &[])
            .ok_or_else(|| io::Error::other("it has no code that makes system calls"))?;
        transition::with_one_thread(self.pid, &self.memory, gadgets, work)
    }

    fn unmap(&self, range: AddrRange) -> io::Result<()> {
        self.have_it(|remote| remote.unmap(range.start, range.len_bytes()))
    }

    /// Gives back what a command that died has left.
    fn sweep(&self) -> Result<(), LiveError> {
        let all = state::find(&self.memory, &self.mappings);
        for (_, left) in all.into_iter().filter(|(status, _)| *status == Status::Preparing) {
            self.unmap(left.region()).map_err(self.system("unmapping what an earlier command left"))?;
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

/// Puts a patch into a running process.
///
/// # Errors
/// It does not belong to the process, or somebody was in a function that it replaces until the deadline. Nothing of the process was changed then.
pub fn apply(pid: Tid, patch: &Patch, how: How) -> Result<Done, LiveError> {
    if patch.target.mode != Mode::Bits64 {
        return Err(LiveError::Width { bits: patch.target.mode.bitness() });
    }
    if !patch.callbacks.is_empty() {
        return Err(LiveError::Callbacks);
    }
    let process = Process::open(pid)?;
    let objects =
        Objects::of(pid, &process.memory, &process.mappings).map_err(process.system("reading its objects"))?;
    let target = objects.of_build(&patch.target)?;
    check_bytes(&process, patch, target)?;
    let has_unwinder = objects.export("_Unwind_RaiseException", None).is_some();
    let may_unwind = patch.sections.iter().any(|section| section.role == Role::Unwind) && has_unwinder;
    if may_unwind && !how.is_forced {
        return Err(LiveError::Unwinding);
    }
    let mut draft = draft(patch, target, may_unwind && how.is_forced);
    let linker = Linker::new(patch);
    let header_bytes = draft.page_bytes();
    let len_bytes = header_bytes + linker.len_bytes();
    let hole = maps::find_hole(&process.mappings, target.range, len_bytes + 2 * PAGE_BYTES);
    // A page apart from others: mappings of the same kind would become one.
    let at = hole.ok_or(LiveError::NoRoom { len_bytes })?.offset(PAGE_BYTES.cast_signed());
    let code_at = at.offset(header_bytes.cast_signed());
    let fitted = linker.link(code_at, &objects.resolver(target, &process.memory))?;
    complete(&mut draft, AddrRange::new(at, len_bytes), &fitted);
    let transition = Transition::new(pid, &process.memory, how.deadline);
    if how.is_dry_run {
        let report = transition.run(&draft.ranges_before(), &objects, |_| Ok(()))?;
        return Ok(done(draft, report));
    }
    process.sweep()?;
    place(&process, &draft, header_bytes, &fitted)?;
    let committed = transition.run(&draft.ranges_before(), &objects, |_| commit(&process.memory, &draft));
    match committed {
        Ok(report) => Ok(done(draft, report)),
        Err(error) => {
            // What is left if this fails is swept by the next command.
            let _ = process.unmap(draft.region());
            Err(error)
        }
    }
}

fn done(patch: Active, report: Report) -> Done {
    Done { patch, stops: report.stops, longest_stop: report.longest }
}

/// Whether the functions are as the patch expects them, and if not: why.
fn check_bytes(process: &Process, patch: &Patch, target: &Object) -> Result<(), LiveError> {
    let active = process.active();
    if let Some((_, other)) = active.iter().find(|(_, other)| other.bias == target.bias) {
        return Err(LiveError::Patched { active: other.name.clone(), target: patch.target.name.clone() });
    }
    for function in &patch.functions {
        let at = Addr::new(function.address.wrapping_add(target.bias));
        let there = process.memory.read_vec(at, function.expected.len());
        let there = there.map_err(process.system("reading the code of its functions"))?;
        if there != function.expected {
            return Err(LiveError::OtherCode { function: function.name.clone(), at });
        }
        if function.expected.len() < JUMP_BYTES {
            return Err(LiveError::TooShort { function: function.name.clone() });
        }
    }
    Ok(())
}

/// What there will be to say of a patch, but for what its place decides.
fn draft(patch: &Patch, target: &Object, is_tainted: bool) -> Active {
    let moved = |address: u64| address.wrapping_add(target.bias);
    let functions = patch.functions.iter().map(|function| Replaced {
        name: function.name.clone(),
        old: moved(function.address),
        old_bytes: function.expected.len() as u64,
        parts: function.parts.iter().map(|(at, len)| (moved(*at), *len)).collect(),
        new: u64::MAX,
        original: function.expected[..JUMP_BYTES].to_vec(),
        jump: vec![u8::MAX; JUMP_BYTES],
    });
    let pins = patch.pins.iter().map(|pin| Pinned {
        name: pin.name.clone(),
        at: moved(pin.address),
        len_bytes: pin.len_bytes,
    });
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Active {
        name: patch.name.clone(),
        target: patch.target.name.clone(),
        build_id: objects::hexadecimal(&patch.target.build_id),
        bias: target.bias,
        at: u64::MAX,
        len_bytes: u64::MAX,
        code: (u64::MAX, u64::MAX),
        functions: functions.collect(),
        pins: pins.collect(),
        is_tainted,
        applied_unix_s: now.as_secs(),
    }
}

fn complete(draft: &mut Active, region: AddrRange, linked: &Linked) {
    (draft.at, draft.len_bytes) = (region.start.value(), region.len_bytes());
    draft.code = (linked.code.start.value(), linked.code.end.value());
    for (function, (old, new)) in draft.functions.iter_mut().zip(&linked.replacements) {
        function.new = new.value();
        // Both are within reach: the hole was looked for near the whole target.
        let distance = new.distance_from(old.after(JUMP_BYTES)).to_le_bytes();
        function.jump = [&[0xe9], &distance[..4]].concat();
    }
}

/// Maps and writes what the patch brings, of which nobody knows yet.
fn place(process: &Process, draft: &Active, header_bytes: u64, linked: &Linked) -> Result<(), LiveError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let map = |remote: &mut Remote| {
        remote.map(Addr::new(draft.at), header_bytes, libc::PROT_READ, flags, -1)?;
        linked.segments.iter().try_for_each(|segment| {
            let protection = match segment.protection {
                Protection::Code => libc::PROT_READ | libc::PROT_EXEC,
                Protection::ReadOnly => libc::PROT_READ,
                Protection::Data => libc::PROT_READ | libc::PROT_WRITE,
            };
            remote.map(segment.at, segment.bytes.len() as u64, protection, flags, -1).map(drop)
        })
    };
    // If only some of it could be mapped, the rest of the region is nobody's.
    let map = |remote: &mut Remote| {
        let mapped = map(remote);
        if mapped.as_ref().is_err_and(|error| error.raw_os_error() != Some(libc::EEXIST)) {
            remote.unmap(Addr::new(draft.at), draft.len_bytes)?;
        }
        mapped
    };
    process.have_it(map).map_err(process.system("mapping memory for the patch"))?;
    let write = || {
        state::write(&process.memory, draft, Status::Preparing)?;
        linked.segments.iter().try_for_each(|segment| process.memory.write(segment.at, &segment.bytes))
    };
    write().map_err(|error| {
        let _ = process.unmap(draft.region());
        LiveError::system(process.pid, "writing the patch", error)
    })
}

/// Diverts all functions. Nobody is in them, and nobody moves.
fn commit(memory: &Memory, draft: &Active) -> io::Result<()> {
    let is_as_it_was = |function: &Replaced| {
        let there = memory.read_vec(Addr::new(function.old), JUMP_BYTES)?;
        Ok::<_, io::Error>(there == function.original)
    };
    for function in &draft.functions {
        if !is_as_it_was(function)? {
            return Err(io::Error::other(format!("{} was changed meanwhile", function.name)));
        }
    }
    state::set_status(memory, draft, Status::Changing)?;
    let written = draft.functions.iter().try_for_each(|function| memory.write(Addr::new(function.old), &function.jump));
    if let Err(error) = written {
        restore(memory, draft)?;
        return Err(error);
    }
    state::set_status(memory, draft, Status::Active)
}

/// Writes the old code back, where it is not there.
fn restore(memory: &Memory, patch: &Active) -> io::Result<()> {
    for function in &patch.functions {
        let at = Addr::new(function.old);
        let there = memory.read_vec(at, function.original.len())?;
        if there == function.jump {
            memory.write(at, &function.original)?;
        } else if there != function.original {
            return Err(io::Error::other(format!("{} was changed by somebody else", function.name)));
        }
    }
    Ok(())
}

/// Takes a patch back: the one of this name, or the only one.
///
/// # Errors
/// There is none, or somebody was in its functions until the deadline. It is active then as before.
pub fn revert(pid: Tid, name: Option<&str>, deadline: Duration) -> Result<Done, LiveError> {
    let process = Process::open(pid)?;
    let active = process.active();
    let names = || active.iter().map(|(_, patch)| patch.name.clone()).collect::<Vec<_>>().join(", ");
    let mut matching = active.iter().filter(|(_, patch)| name.is_none_or(|name| patch.name == name));
    let Some((_, patch)) = matching.next() else { return Err(LiveError::NoSuchPatch { pid, names: names() }) };
    if matching.next().is_some() {
        return Err(LiveError::WhichPatch { names: names() });
    }
    if patch.is_tainted {
        return Err(LiveError::Tainted { name: patch.name.clone() });
    }
    let objects =
        Objects::of(pid, &process.memory, &process.mappings).map_err(process.system("reading its objects"))?;
    let gadgets = Gadgets::find(&process.memory, &process.mappings, &[patch.region()]);
    let gadgets = gadgets
        .ok_or_else(|| process.system("looking for code that makes system calls")(io::ErrorKind::NotFound.into()))?;
    let transition = Transition::new(pid, &process.memory, deadline);
    let report = transition.run(&patch.ranges_after(), &objects, |thread| {
        state::set_status(&process.memory, patch, Status::Changing)?;
        restore(&process.memory, patch)?;
        // From here on it is only memory, and swept by the next command if this fails.
        state::set_status(&process.memory, patch, Status::Preparing)?;
        transition::work_in(thread, &process.memory, gadgets, |remote| {
            remote.unmap(patch.region().start, patch.len_bytes)
        })
    })?;
    Ok(done(patch.clone(), report))
}

/// What is active in a process.
///
/// # Errors
/// It cannot be looked at.
pub fn list(pid: Tid) -> Result<Vec<(Status, Active)>, LiveError> {
    let process = Process::open(pid)?;
    Ok(process.active())
}

impl Active {
    /// All its memory.
    fn region(&self) -> AddrRange {
        AddrRange::new(Addr::new(self.at), self.len_bytes)
    }

    /// Where nobody may be when it is applied.
    fn ranges_before(&self) -> Check {
        let range = |at: u64, len_bytes: u64| AddrRange::new(Addr::new(at), len_bytes);
        let functions = self.functions.iter().flat_map(|function| {
            let parts = function.parts.iter().map(|(at, len)| (function.name.clone(), *at, *len));
            std::iter::once((function.name.clone(), function.old, function.old_bytes)).chain(parts)
        });
        let pins = self.pins.iter().map(|pin| (pin.name.clone(), pin.at, pin.len_bytes));
        Check::new(functions.chain(pins).map(|(name, at, len)| (name, range(at, len))).collect())
    }

    /// Where nobody may be when it is reverted.
    fn ranges_after(&self) -> Check {
        let new = AddrRange { start: Addr::new(self.code.0), end: Addr::new(self.code.1) };
        self.ranges_before().and(format!("new code of {}", self.name), new)
    }
}
