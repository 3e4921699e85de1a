//! What was done to the memory of one process.
//!
//! Owns [`Space`]: where the agent is, the pool, the modules that are armed and their stubs. [`crate::arm`] makes one for a new image; the
//! [tracer](crate::tracer) keeps it while tasks use the memory, and gives forked children their own. Stubs are memory that the recorder shares with the
//! target: readable and executable there, writable here, so that no page is ever both (I8) and a site is switched by a store.

use std::{
    collections::HashMap,
    ffi::CStr,
    io,
    mem::offset_of,
    os::fd::RawFd,
    sync::{Arc, atomic::Ordering},
};

use trapline_abi::{
    agent::Config,
    pool::{CHUNK_STRIDE_BYTES, chunk_at},
    thread::Thread,
};
use trapline_engine::{Addr, AddrRange, Mode};
use trapline_image::{ArmedSite, Entries, Write};
use trapline_process::quiesce::ThreadRegisters;
use trapline_trace::Load;

use crate::{
    arm::KnownModule,
    counters::Counters,
    divert::Undiverted,
    handing,
    inject::{Gadgets, ThreadRoom},
    leave::Footprint,
    pool::{Pool, Taken},
    remote::{Errand, Remote},
    sys::{
        maps::{self, Mapping},
        memory::Memory,
        shared::{self, SharedMemory},
        width,
    },
};

/// A module as it is mapped into a process.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    /// Which.
    pub(crate) module: Arc<KnownModule>,
    /// What has to be added to an address in its file.
    pub(crate) bias: u64,
}

impl Loaded {
    /// What it is known by in one memory.
    pub(crate) fn key(&self) -> (u32, u64) {
        (self.module.id, self.bias)
    }
}

/// The stubs of one module in one memory, and in its copies.
#[derive(Debug)]
pub(crate) struct Stubs {
    /// Of which code they are.
    pub(crate) mode: Mode,
    /// Where they stand in the target.
    pub(crate) at: Addr,
    /// The same bytes, for us to write.
    pub(crate) memory: Arc<SharedMemory>,
    /// The sites that lead to them.
    pub(crate) sites: Vec<ArmedSite>,
    /// Functions that have a stub, and are not traced.
    pub(crate) unselected: Vec<ArmedSite>,
    /// Of functions that live patches divert, what they are without that.
    pub(crate) set_aside: Vec<Undiverted>,
    /// What leads to them in the module's code.
    pub(crate) writes: Vec<Write>,
    /// Those of them that lead unwinders through the agent.
    pub(crate) of_unwinders: Vec<Write>,
    /// Where the module's unwinder is.
    pub(crate) unwinder: Option<AddrRange>,
}

impl Stubs {
    /// The same, in memory of their own.
    pub(crate) fn copied(&self, name: &CStr) -> io::Result<Self> {
        let len_bytes = self.memory.len_bytes();
        let memory = SharedMemory::new(name, len_bytes)?;
        let bytes: Vec<u8> = (0..len_bytes).map(|offset| self.memory.byte(offset)).collect();
        memory.fill(0, &bytes);
        Ok(Self {
            mode: self.mode,
            at: self.at,
            memory: Arc::new(memory),
            sites: self.sites.clone(),
            unselected: self.unselected.clone(),
            set_aside: self.set_aside.clone(),
            writes: self.writes.clone(),
            of_unwinders: self.of_unwinders.clone(),
            unwinder: self.unwinder,
        })
    }
}

/// Where the agent's entries are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AgentAt {
    /// Of which code it is.
    pub(crate) mode: Mode,
    /// What stubs call.
    pub(crate) entries: Entries,
    /// Its [`Config`].
    pub(crate) config: Addr,
    /// What the dynamic linker's report jumps to.
    pub(crate) objects_changed: Addr,
    /// What functions begin with that can switch a sandbox on.
    pub(crate) sandbox: Addr,
    /// What `_Unwind_Backtrace` is led through.
    pub(crate) backtrace: Addr,
    /// What `_Unwind_Find_FDE` is led through.
    pub(crate) find_fde: Addr,
    /// A `syscall` instruction for tasks that never go on.
    pub(crate) syscall_insn: Addr,
    /// Where threads run system calls for us.
    pub(crate) errand: Errand,
    /// From a thread pointer to the thread's [`Thread`].
    pub(crate) thread_offset: i64,
    /// Which one.
    pub(crate) thread_pointer: ThreadPointer,
    /// What hooked slots hold.
    pub(crate) return_code: Addr,
    /// Where the program's unwinder returns to while it calls the program back.
    pub(crate) walking: Addr,
    /// Where threads are whose unwinder is about to look for unwind information, and knows only the program's addresses.
    pub(crate) asked: AddrRange,
    /// Which blocks of stack have their shadow mapped.
    pub(crate) shadows: Addr,
}

/// What leads to a thread's state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ThreadPointer {
    /// The base of the fs segment, as the C library has it.
    Own,
    /// The base of the gs segment, or of the fs segment at 32 bit, which the recorder gives each thread.
    Given,
}

impl AgentAt {
    /// Where a thread with these registers has its [`Thread`]. `given` is the pointer that the recorder has given it, if it has.
    pub(crate) fn thread(&self, registers: &ThreadRegisters, given: Option<Addr>) -> Addr {
        let pointer = match (self.thread_pointer, given) {
            (ThreadPointer::Own, _) => Addr::new(registers.fs_base),
            (ThreadPointer::Given, Some(given)) => given,
            (ThreadPointer::Given, None) => Addr::new(registers.gs_base),
        };
        pointer.offset(self.thread_offset)
    }

    /// Where the next record of a thread goes, from a copy of its [`Thread`]. At 32 bit the word also counts chunks.
    fn position(&self, state: &[u8]) -> Option<u64> {
        let word = state.get(offset_of!(Thread, position)..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))?;
        Some(width::wrapped(self.mode, Addr::new(word)).value())
    }
}

/// What was done to the memory of one process.
#[derive(Debug)]
pub(crate) struct Space {
    /// How many tasks use it.
    pub(crate) tasks: usize,
    /// Its memory; `None` in a forked child that has not run yet.
    pub(crate) memory: Option<Arc<Memory>>,
    /// Its pool; `None` in a forked child that has not run yet.
    pub(crate) pool: Option<Arc<Pool>>,
    /// Where the agent is.
    pub(crate) agent: AgentAt,
    pool_at: Addr,
    /// Where it counts, if it is to count and not to record.
    pub(crate) counters: Option<Arc<Counters>>,
    /// Where these are mapped, or will be.
    pub(crate) counters_place: Option<AddrRange>,
    /// What is armed.
    pub(crate) loaded: Vec<Loaded>,
    /// Whether the C library's functions that can switch a sandbox on lead to the agent.
    pub(crate) is_sandbox_hooked: bool,
    /// What a sandbox forbids the agent, as in [`Config::forbidden`].
    pub(crate) forbidden: u64,
    /// Stubs that stand: a module that is mapped where it was before finds them again.
    pub(crate) stubs: HashMap<(u32, u64), Arc<Stubs>>,
    /// Edits beside those of the stubs: what tells the agent of new objects and of sandboxes.
    pub(crate) writes: Vec<Write>,
    /// What is mapped of ours beside shadows.
    pub(crate) mapped: Vec<AddrRange>,
    /// What of it is code.
    pub(crate) code: Vec<AddrRange>,
    /// The threads' states, if the agent was injected.
    pub(crate) room: Option<ThreadRoom>,
    /// Code of the process's own that makes system calls, likewise.
    pub(crate) gadgets: Option<Gadgets>,
}

impl Space {
    /// The memory of a new image with one task, of which nothing is armed yet.
    pub(crate) fn new(agent: AgentAt) -> Self {
        Self {
            tasks: 1,
            memory: None,
            pool: None,
            agent,
            pool_at: Addr::default(),
            counters: None,
            counters_place: None,
            loaded: Vec::new(),
            is_sandbox_hooked: false,
            forbidden: 0,
            stubs: HashMap::new(),
            writes: Vec::new(),
            mapped: Vec::new(),
            code: Vec::new(),
            room: None,
            gadgets: None,
        }
    }

    /// The same, for a child that has a copy of the memory, with one task.
    pub(crate) fn forked(&self) -> Self {
        Self {
            tasks: 1,
            memory: None,
            pool: None,
            agent: self.agent,
            pool_at: self.pool_at,
            counters: None,
            counters_place: self.counters_place,
            loaded: self.loaded.clone(),
            is_sandbox_hooked: self.is_sandbox_hooked,
            forbidden: self.forbidden,
            stubs: self.stubs.clone(),
            writes: self.writes.clone(),
            mapped: self.mapped.clone(),
            code: self.code.clone(),
            room: self.room.clone(),
            gadgets: self.gadgets,
        }
    }

    /// What is to be undone when the process is left; `None` if the dynamic linker has loaded the agent, which then stays.
    pub(crate) fn footprint(&self) -> Option<Footprint> {
        self.room.as_ref()?;
        let (code, mapped) = (self.code.clone(), self.mapped.clone());
        let stubs = || self.loaded.iter().filter_map(|loaded| self.stubs.get(&loaded.key()));
        let of_unwinders: Vec<Write> = stubs().flat_map(|stubs| &stubs.of_unwinders).copied().collect();
        let all = self.writes.iter().chain(stubs().flat_map(|stubs| &stubs.writes));
        let writes = all.filter(|write| !of_unwinders.contains(write)).copied().collect();
        let unwinders = stubs().filter_map(|stubs| stubs.unwinder).collect();
        let (agent, gadgets, instead) = (self.agent, self.gadgets?, Vec::new());
        Some(Footprint { agent, code, mapped, unwinders, writes, of_unwinders, gadgets, instead })
    }

    /// What the process has mapped of modules that are in the trace.
    pub(crate) fn loads(&self, process: u32) -> Vec<Load> {
        let tsc = shared::tsc();
        let listed = self.loaded.iter().filter(|load| load.module.is_listed);
        listed.map(|load| Load { process, module: load.module.id, bias: load.bias, tsc }).collect()
    }

    /// Where `pool` is to be mapped for the first time: in a hole between these mappings.
    pub(crate) fn place_pool(&self, pool: &Pool, mappings: &[Mapping]) -> io::Result<AddrRange> {
        let stride = CHUNK_STRIDE_BYTES as u64;
        let near = AddrRange::new(self.agent.config, 0);
        let hole = maps::find_hole(self.agent.mode, mappings, near, pool.len_bytes() + stride);
        let hole = hole.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(AddrRange::new(Addr::new(hole.value().next_multiple_of(stride)), pool.len_bytes()))
    }

    /// Decides where the counters are to be mapped for the first time, if there are any: in a hole between these mappings.
    pub(crate) fn place_counters(&mut self, mappings: &[Mapping]) -> io::Result<()> {
        let Some(counters) = &self.counters else { return Ok(()) };
        let hole = maps::find_room(mappings, counters.len_bytes());
        let hole = hole.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        self.counters_place = Some(AddrRange::new(hole, counters.len_bytes()));
        Ok(())
    }

    /// Maps `pool` at this [place](Self::place_pool), or where the old one is, and the counters, if there are any, and tells the agent. The thread is stopped.
    pub(crate) fn map_pool(
        &mut self,
        remote: &mut Remote,
        memory: &Memory,
        pool: &Pool,
        place: Option<AddrRange>,
    ) -> io::Result<()> {
        let mapping = SharedMapping {
            descriptor: pool.descriptor(),
            at: place.map_or(self.pool_at, |place| place.start),
            len_bytes: pool.len_bytes(),
            protection: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_NORESERVE | place.map_or(libc::MAP_FIXED, |_| libc::MAP_FIXED_NOREPLACE),
        };
        self.mapped.extend(place);
        self.pool_at = mapping.make(remote, memory)?;
        if let Some(counters) = self.counters.clone() {
            self.map_counters(remote, memory, &counters)?;
        }
        memory.write_word(self.agent.config.after(offset_of!(Config, pool)), self.pool_at.value())
    }

    fn map_counters(&mut self, remote: &mut Remote, memory: &Memory, counters: &Counters) -> io::Result<()> {
        let Some(place) = self.counters_place else { return Ok(()) };
        let is_first = !self.mapped.contains(&place);
        let mapping = SharedMapping {
            descriptor: counters.descriptor(),
            at: place.start,
            len_bytes: place.len_bytes(),
            protection: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_NORESERVE | if is_first { libc::MAP_FIXED_NOREPLACE } else { libc::MAP_FIXED },
        };
        if is_first {
            self.mapped.push(place);
        }
        let at = mapping.make(remote, memory)?;
        // A core dump would read all of it, and what is read takes memory. A sandbox is not asked for leave to make this call.
        if self.forbidden == 0 {
            let advice = u64::from(libc::MADV_DONTDUMP.cast_unsigned());
            remote.syscall(libc::SYS_madvise, [at.value(), mapping.len_bytes, advice, 0, 0, 0])?;
        }
        memory.write_word(self.agent.config.after(offset_of!(Config, counters)), at.value())
    }

    /// Tells the agent that there is no pool, and no counters.
    pub(crate) fn forget_pool(&self, memory: &Memory) -> io::Result<()> {
        memory.write_word(self.agent.config.after(offset_of!(Config, counters)), 0)?;
        memory.write_word(self.agent.config.after(offset_of!(Config, pool)), 0)
    }

    /// Lends the state of a stopped thread to another one, which goes on with it and with chunks of its own. Returns the chunk that was left, which the drain
    /// has to be told of, and what [`give_back`](Self::give_back) wants.
    pub(crate) fn lend(&self, thread: Addr, (pid, tid): (u32, u32)) -> io::Result<(Option<Taken>, Vec<u8>)> {
        let Some(memory) = &self.memory else { return Ok((None, Vec::new())) };
        let mut state = memory.read_vec(thread, size_of::<Thread>())?;
        let left = self.chunk_of(&state);
        state[offset_of!(Thread, position)..][..size_of::<u64>()].fill(0);
        let mut borrowed = [0; offset_of!(Thread, lost)];
        borrowed[offset_of!(Thread, pid)..][..4].copy_from_slice(&pid.to_le_bytes());
        borrowed[offset_of!(Thread, tid)..][..4].copy_from_slice(&tid.to_le_bytes());
        memory.write(thread, &borrowed)?;
        Ok((left, state))
    }

    /// The stopped thread has its state back, with the frames that were open. Returns the borrower's chunk.
    pub(crate) fn give_back(&self, thread: Addr, state: &[u8]) -> io::Result<Option<Taken>> {
        let Some(memory) = self.memory.as_ref().filter(|_| !state.is_empty()) else { return Ok(None) };
        let left = self.chunk_of(&memory.read_vec(thread, size_of::<Thread>())?);
        // Losses are the process's, and the blocks that are known to be mapped are those of both.
        let (lost, top) = (offset_of!(Thread, lost), offset_of!(Thread, top));
        memory.write(thread, &state[..lost])?;
        memory.write(thread.after(top), &state[top..][..size_of::<u64>()])?;
        Ok(left)
    }

    /// The chunk of a stopped thread, if it is still this one's.
    fn chunk_of(&self, state: &[u8]) -> Option<Taken> {
        let pool = self.pool.as_ref()?;
        let tid = state.get(offset_of!(Thread, tid)..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))?;
        let index = chunk_at(self.pool_at.value(), pool.chunk_count(), self.agent.position(state)?)?;
        let taken = pool.taken(index);
        (taken.tid() == tid).then_some(taken)
    }

    /// The thread that waits for an answer, as it sees itself.
    pub(crate) fn requester(&self) -> u32 {
        self.pool.as_ref().map_or(0, |pool| pool.header().requester.load(Ordering::Relaxed))
    }

    /// Lets whoever asked go on.
    pub(crate) fn answer(&self) {
        if let Some(pool) = &self.pool {
            let header = pool.header();
            header.answered.store(header.requests.load(Ordering::Acquire), Ordering::Release);
            shared::wake_all(&header.answered);
        }
    }
}

/// Memory of ours that a target is to map.
#[derive(Debug)]
pub(crate) struct SharedMapping {
    /// Of our descriptors, the one that it is.
    pub(crate) descriptor: RawFd,
    /// Where; 0 for wherever the kernel likes.
    pub(crate) at: Addr,
    /// How much.
    pub(crate) len_bytes: u64,
    /// Of mmap(2).
    pub(crate) protection: i32,
    /// Of mmap(2), beside `MAP_SHARED`.
    pub(crate) flags: i32,
}

impl SharedMapping {
    /// Has a stopped thread map it. What lies below its stack pointer and the red zone (System V psABI, "The Stack Frame") is used for what it is told.
    pub(crate) fn make(&self, remote: &mut Remote, memory: &Memory) -> io::Result<Addr> {
        let red_zone_bytes = width::red_zone_bytes(remote.mode()).cast_signed();
        let room = remote.stack_pointer().offset(-red_zone_bytes - handing::STACK_BYTES);
        let is_to_write = self.protection & libc::PROT_WRITE != 0;
        let descriptor = handing::open(remote, memory, room, self.descriptor, is_to_write)?;
        let flags = libc::MAP_SHARED | self.flags;
        let mapped = remote.map(self.at, self.len_bytes, self.protection, flags, descriptor.cast_signed());
        remote.syscall(libc::SYS_close, [descriptor, 0, 0, 0, 0, 0])?;
        mapped
    }
}
