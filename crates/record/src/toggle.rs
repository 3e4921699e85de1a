//! Switching every site off and on again while the targets run, by the engine's poke protocol.
//!
//! Owns [`Toggler`], and the [`Host`] that the protocol is driven on: stubs are written through memory that we share with the target, and cores are
//! synchronised by `membarrier`, called by a *helper* in the target's memory: a task that shares it, is no thread of its process, never runs
//! an instruction of its own, and lives as long as the memory is used. A thread that meets one of our breakpoints stops, as every signal stops a
//! traced thread, and is sent back to the site when the batch is through: it executes the new instruction, so no call is skipped (I1).

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use trapline_engine::{
    Addr, AddrRange, Host, drive,
    insn::{CALL_BYTES, InsnBytes, encode},
    poke::{Outcome, Poke, PokeSet, Protocol, TextWrite},
    trampoline::{Machine, Segment, ThreadBase, VectorSave},
    trap::TrapState,
};

use crate::{
    drain::SpaceId,
    remote::Remote,
    space::{Space, Stubs},
    sys::{
        Tid,
        ptrace::{self, Stop},
        shared, spawn,
    },
};

/// How sites are toggled while recording: a way to test the engine on programs.
#[derive(Clone, Debug)]
pub struct Toggle {
    /// Time between two batches.
    pub period: Duration,
    /// Where each batch is noted: `on` or `off`, the time-stamp counter before and after it, how many sites it had.
    pub log: std::path::PathBuf,
}

const REGISTER_SYNC_CORE: u64 = 1 << 6;
const SYNC_CORE: u64 = 1 << 5;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Toggler {
    period: Duration,
    due: Instant,
    log: File,
    is_on: bool,
    trap: &'static TrapState,
    helpers: HashMap<SpaceId, (Tid, Addr)>,
    /// For each set of stubs, what stands at its sites while they are on.
    calls: HashMap<Addr, Vec<InsnBytes>>,
    /// Threads that blocked SIGTRAP when the last batch began: the kernel unblocks it in a thread that meets a breakpoint.
    blocking: HashSet<Tid>,
}

impl Toggler {
    pub(crate) fn new(toggle: &Toggle) -> io::Result<Self> {
        Ok(Self {
            period: toggle.period,
            due: Instant::now() + toggle.period,
            log: File::create(&toggle.log)?,
            is_on: true,
            trap: Box::leak(Box::new(TrapState::new())),
            helpers: HashMap::new(),
            calls: HashMap::new(),
            blocking: HashSet::new(),
        })
    }

    /// How long until the next batch.
    pub(crate) fn wait(&self) -> Duration {
        self.due.saturating_duration_since(Instant::now())
    }

    /// Makes the helper of a memory: a copy of the stopped thread, that never goes on.
    pub(crate) fn add(&mut self, id: SpaceId, tid: Tid, syscall_insn: Addr) -> io::Result<Vec<i32>> {
        let flags = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_PARENT;
        let mut remote = Remote::new(tid, syscall_insn)?;
        let cloned = remote.syscall(libc::SYS_clone, [u64::from(flags.cast_unsigned()), 0, 0, 0, 0, 0]);
        let created = remote.created();
        let signals = remote.finish()?;
        cloned?;
        let helper = created.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        while ptrace::wait_for(helper)? != Stop::Interrupted {}
        membarrier(helper, syscall_insn, REGISTER_SYNC_CORE)?;
        self.helpers.insert(id, (helper, syscall_insn));
        Ok(signals)
    }

    /// Ends the helper of a memory that nobody uses any more.
    pub(crate) fn remove(&mut self, id: SpaceId) {
        if let Some((helper, _)) = self.helpers.remove(&id) {
            spawn::kill(helper, libc::SIGKILL);
        }
    }

    /// Switches all sites, if it is time to. `tasks` are those of each memory.
    pub(crate) fn toggle_if_due(&mut self, spaces: &HashMap<SpaceId, Space>, tasks: &[Tid]) -> io::Result<()> {
        if !self.wait().is_zero() {
            return Ok(());
        }
        self.due = Instant::now() + self.period;
        self.is_on = !self.is_on;
        let blocks_trap = |tid: &&Tid| {
            let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
            crate::exec::signal_set(&status, "SigBlk:").is_some_and(|set| set >> (libc::SIGTRAP - 1) & 1 == 1)
        };
        self.blocking = tasks.iter().filter(blocks_trap).copied().collect();
        let mut done: Vec<*const Stubs> = Vec::new();
        for stubs in spaces.values().flat_map(|space| space.stubs.values()) {
            if done.contains(&Arc::as_ptr(stubs)) || stubs.sites.is_empty() {
                continue;
            }
            done.push(Arc::as_ptr(stubs));
            let shares = |space: &Space| space.stubs.values().any(|other| Arc::ptr_eq(other, stubs));
            let helpers =
                spaces.iter().filter(|(_, space)| shares(space)).filter_map(|(id, _)| self.helpers.get(id).copied());
            let helpers = helpers.collect();
            self.toggle(stubs, helpers)?;
        }
        Ok(())
    }

    fn toggle(&mut self, stubs: &Arc<Stubs>, helpers: Vec<(Tid, Addr)>) -> io::Result<()> {
        let mut host = StubHost { stubs, helpers };
        let mut bytes = [0; CALL_BYTES];
        let calls = self.calls.entry(stubs.at).or_default();
        if calls.len() != stubs.sites.len() {
            calls.clear();
            for site in &stubs.sites {
                host.read_text(site.on, &mut bytes)?;
                calls.push(InsnBytes::new(&bytes));
            }
        }
        let nop = encode::nop(CALL_BYTES);
        let pokes = stubs.sites.iter().zip(&*calls).map(|(site, call)| {
            let (old, new) = if self.is_on { (nop, *call) } else { (*call, nop) };
            Poke::new(stubs.mode, site.on, old, new)
        });
        let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
        let pokes =
            pokes.collect::<Result<Vec<_>, _>>().and_then(PokeSet::new).map_err(|error| invalid(error.to_string()))?;
        let mut syncs = 0;
        let before = shared::tsc();
        let (outcome, failure) = drive(&mut host, self.trap, &Arc::new(pokes), Protocol::new(), &mut syncs);
        let after = shared::tsc();
        if outcome != Outcome::Committed {
            return Err(invalid(format!("switching sites: {outcome:?}, {failure:?}")));
        }
        let what = if self.is_on { "on" } else { "off" };
        writeln!(self.log, "{what} {before} {after} {}", stubs.sites.len())
    }

    /// Whether a thread that a breakpoint stopped is at one of ours. If so, it is sent back to the site.
    pub(crate) fn rewound(&self, tid: Tid, space: &Space) -> bool {
        let Ok(mut registers) = ptrace::registers(tid) else { return false };
        let at = Addr::new(registers.rip).offset(-1);
        let is_ours = |stubs: &Arc<Stubs>| stubs.sites.iter().any(|site| site.on == at);
        if !space.stubs.values().any(is_ours) {
            return false;
        }
        registers.rip = at.value();
        if self.blocking.contains(&tid)
            && let Ok(mask) = ptrace::signal_mask(tid)
        {
            let _ = ptrace::set_signal_mask(tid, mask | 1 << (libc::SIGTRAP - 1));
        }
        ptrace::set_registers(tid, &registers).is_ok()
    }
}

fn membarrier(helper: Tid, syscall_insn: Addr, command: u64) -> io::Result<()> {
    let mut remote = Remote::new(helper, syscall_insn)?;
    let result = remote.syscall(libc::SYS_membarrier, [command, 0, 0, 0, 0, 0]);
    remote.finish()?;
    result.map(drop)
}

/// The protocol's host: one set of stubs, and the memories that have it mapped.
struct StubHost<'a> {
    stubs: &'a Stubs,
    helpers: Vec<(Tid, Addr)>,
}

impl StubHost<'_> {
    fn offset(&self, at: Addr) -> usize {
        usize::try_from(at.distance_from(self.stubs.at)).unwrap_or(usize::MAX)
    }
}

fn unsupported<T>() -> io::Result<T> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

impl Host for StubHost<'_> {
    type Error = io::Error;

    /// No trampolines are emitted for this host.
    fn machine(&self) -> Machine {
        let thread = ThreadBase { segment: Segment::Fs, pointer: None, offset: 0 };
        Machine { mode: self.stubs.mode, thread, vectors: VectorSave::Never }
    }

    fn read_text(&mut self, at: Addr, bytes: &mut [u8]) -> io::Result<()> {
        let offset = self.offset(at);
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = self.stubs.memory.byte(offset + index);
        }
        Ok(())
    }

    fn write_text(&mut self, writes: impl Iterator<Item = TextWrite>) -> io::Result<()> {
        for write in writes {
            self.stubs.memory.fill(self.offset(write.at), &write.bytes);
        }
        Ok(())
    }

    fn sync_cores(&mut self) -> io::Result<()> {
        self.helpers.iter().try_for_each(|(helper, syscall_insn)| membarrier(*helper, *syscall_insn, SYNC_CORE))
    }

    fn alloc_code(&mut self, _near: AddrRange, _len_bytes: usize) -> io::Result<Addr> {
        unsupported()
    }

    fn write_code(&mut self, _at: Addr, _code: &[u8]) -> io::Result<()> {
        unsupported()
    }

    fn free_code(&mut self, _code: AddrRange) {}

    fn is_unused(&mut self, _ranges: &[AddrRange]) -> io::Result<bool> {
        unsupported()
    }

    fn relax(&mut self) {
        std::hint::spin_loop();
    }
}
