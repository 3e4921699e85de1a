//! What was done to the memory of one process.
//!
//! Owns [`Space`]: where the agent is, the pool, the modules that are armed and their stubs. [`crate::arm`] makes one for a new image; the
//! [tracer](crate::tracer) keeps it while tasks use the memory, and gives forked children their own. Stubs are memory that the recorder shares with the
//! target: readable and executable there, writable here, so that no page is ever both (I8) and a site is switched by a store.

use std::{
    collections::HashMap,
    io,
    mem::offset_of,
    sync::{Arc, atomic::Ordering},
};

use trapline_abi::{agent::Config, thread::Thread};
use trapline_engine::Addr;
use trapline_image::{ArmedSite, Entries};
use trapline_trace::Load;

use crate::{
    arm::KnownModule,
    pool::{Pool, Taken},
    remote::Remote,
    sys::{
        memory::Memory,
        shared::{self, SharedMemory},
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
    /// Where they stand in the target.
    pub(crate) at: Addr,
    /// The same bytes, for us to write.
    pub(crate) memory: SharedMemory,
    /// The sites that lead to them.
    pub(crate) sites: Vec<ArmedSite>,
}

/// Where the agent's entries are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AgentAt {
    /// What stubs call.
    pub(crate) entries: Entries,
    /// Its [`Config`].
    pub(crate) config: Addr,
    /// What the dynamic linker's report jumps to.
    pub(crate) objects_changed: Addr,
    /// A `syscall` instruction.
    pub(crate) syscall_insn: Addr,
    /// From a thread pointer to the thread's [`Thread`].
    pub(crate) thread_offset: i64,
}

/// What was done to the memory of one process.
#[derive(Debug)]
pub(crate) struct Space {
    /// How many tasks use it.
    pub(crate) tasks: usize,
    /// Its memory; `None` in a forked child that has not run yet.
    pub(crate) memory: Option<Memory>,
    /// Its pool; `None` in a forked child that has not run yet.
    pub(crate) pool: Option<Arc<Pool>>,
    /// Where the agent is.
    pub(crate) agent: AgentAt,
    pool_at: Addr,
    /// What is armed.
    pub(crate) loaded: Vec<Loaded>,
    /// Stubs that stand: a module that is mapped where it was before finds them again.
    pub(crate) stubs: HashMap<(u32, u64), Arc<Stubs>>,
}

impl Space {
    /// The memory of a new image with one task, of which nothing is armed yet.
    pub(crate) fn new(agent: AgentAt) -> Self {
        let (loaded, stubs) = (Vec::new(), HashMap::new());
        Self { tasks: 1, memory: None, pool: None, agent, pool_at: Addr::default(), loaded, stubs }
    }

    /// The same, for a child that has a copy of the memory, with one task.
    pub(crate) fn forked(&self) -> Self {
        Self {
            tasks: 1,
            memory: None,
            pool: None,
            agent: self.agent,
            pool_at: self.pool_at,
            loaded: self.loaded.clone(),
            stubs: self.stubs.clone(),
        }
    }

    /// Where a thread with this thread pointer has its [`Thread`].
    pub(crate) fn thread_at(&self, thread_pointer: u64) -> Addr {
        Addr::new(thread_pointer).offset(self.agent.thread_offset)
    }

    /// What the process has mapped of known modules.
    pub(crate) fn loads(&self, process: u32) -> Vec<Load> {
        let tsc = shared::tsc();
        self.loaded.iter().map(|load| Load { process, module: load.module.id, bias: load.bias, tsc }).collect()
    }

    /// Maps `pool` where the old one is, or for the first time, and tells the agent. The thread is stopped.
    pub(crate) fn map_pool(&mut self, remote: &mut Remote, memory: &Memory, pool: &Pool) -> io::Result<()> {
        let fixed = if self.pool_at == Addr::default() { 0 } else { libc::MAP_FIXED };
        let mapping = SharedMapping {
            path: pool.path(),
            at: self.pool_at,
            len_bytes: pool.len_bytes(),
            protection: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_NORESERVE | fixed,
        };
        self.pool_at = mapping.make(remote, memory)?;
        memory.write_word(self.agent.config.after(offset_of!(Config, pool)), self.pool_at.value())
    }

    /// Tells the agent that there is no pool.
    pub(crate) fn forget_pool(&self, memory: &Memory) -> io::Result<()> {
        memory.write_word(self.agent.config.after(offset_of!(Config, pool)), 0)
    }

    /// Takes its chunk away from a stopped thread, if it is still this one's; it takes another one next time. Returns the chunk, which the drain has to be
    /// told of, and the thread's innermost frame.
    pub(crate) fn leave_chunk_of(&self, thread: Addr, tid_inside: u32) -> io::Result<(Option<Taken>, u64)> {
        let (Some(memory), Some(pool)) = (&self.memory, &self.pool) else { return Ok((None, 0)) };
        let mut chunk = [0; 4];
        memory.read(thread.after(offset_of!(Thread, chunk)), &mut chunk)?;
        let index = (u32::from_le_bytes(chunk) as usize).checked_sub(1).filter(|index| *index < pool.chunk_count());
        let taken = index.map(|index| pool.taken(index)).filter(|taken| taken.tid == tid_inside);
        // Position and end; the count of chunks goes on.
        memory.write(thread, &[0; offset_of!(Thread, chunk)])?;
        memory.write(thread.after(offset_of!(Thread, chunk)), &[0; 4])?;
        Ok((taken, memory.read_word(thread.after(offset_of!(Thread, top)))?))
    }

    /// Sets the innermost frame of a stopped thread.
    pub(crate) fn set_top(&self, thread: Addr, top: u64) -> io::Result<()> {
        let Some(memory) = &self.memory else { return Ok(()) };
        memory.write_word(thread.after(offset_of!(Thread, top)), top)
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
    /// By which path it opens it.
    pub(crate) path: String,
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
    /// Has a stopped thread map it. What lies below its stack pointer and the red zone (System V psABI, "The Stack Frame") is used for the path.
    pub(crate) fn make(&self, remote: &mut Remote, memory: &Memory) -> io::Result<Addr> {
        const BELOW_STACK_BYTES: i64 = 128 + 512;
        let path = [self.path.as_bytes(), &[0]].concat();
        let path_at = Addr::new(remote.registers.rsp).offset(-BELOW_STACK_BYTES);
        memory.write(path_at, &path)?;
        let access = if self.protection & libc::PROT_WRITE != 0 { libc::O_RDWR } else { libc::O_RDONLY };
        let flags = u64::from((access | libc::O_CLOEXEC).cast_unsigned());
        let here = i64::from(libc::AT_FDCWD).cast_unsigned();
        let descriptor = remote.syscall(libc::SYS_openat, [here, path_at.value(), flags, 0, 0, 0])?;
        let flags = libc::MAP_SHARED | self.flags;
        let mapped = remote.map(self.at, self.len_bytes, self.protection, flags, descriptor.cast_signed());
        remote.syscall(libc::SYS_close, [descriptor, 0, 0, 0, 0, 0])?;
        mapped
    }
}
