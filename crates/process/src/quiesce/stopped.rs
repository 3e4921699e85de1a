//! What may be done while every thread stands still.
//!
//! [`Stopped`] is handed to the work of a stop. It reaches the threads through ptrace, so it is bound to the stopper task, and it neither
//! allocates nor takes a lock: whatever lock exists, one of the threads may hold it.

use std::{
    cell::OnceCell,
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use trapline_engine::{Addr, Mode};

use super::{
    inside::{Blocker, Context, How, Inspector},
    memory_map::{MapsFile, MemoryMap},
    ranges::RangeSet,
    session::{State, Thread},
};
use crate::{
    sys::{
        errno::Errno,
        memory::SharedMemory,
        procfs::Tid,
        ptrace::{self, Registers},
        signal::SignalSet,
    },
    thread,
};

/// The thread that asked for the stop.
///
/// It sleeps in the kernel like any other, but two things about it are ours and not the target's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Creator<'a> {
    pub(super) tid: Tid,
    /// The mask that it will have again after the stop; until then it blocks everything.
    pub(super) mask: &'a AtomicU64,
    /// Below this address its stack holds frames of trapline only.
    pub(super) own_frames_below: Addr,
}

/// The threads of the process, standing still.
pub struct Stopped<'a> {
    threads: &'a [Thread],
    creator: Creator<'a>,
    maps: &'a MapsFile,
    map: OnceCell<Option<MemoryMap>>,
    /// Whether the only thread is the one that does the work.
    alone: bool,
}

impl<'a> Stopped<'a> {
    pub(super) fn new(threads: &'a [Thread], creator: Creator<'a>, maps: &'a MapsFile) -> Self {
        Self { threads, creator, maps, map: OnceCell::new(), alone: false }
    }

    /// For work that the process's only thread does itself.
    pub(super) fn alone(threads: &'a [Thread], creator: Creator<'a>, maps: &'a MapsFile) -> Self {
        Self { alone: true, ..Self::new(threads, creator, maps) }
    }

    /// The threads, in ascending order of their numbers: every one that the process has, with the one that asked for the stop and the
    /// kernel's workers (`io_uring`), but without a first thread that has ended before the others.
    pub fn threads(&self) -> impl Iterator<Item = StoppedThread<'a>> + use<'a> {
        let creator = self.creator;
        self.threads
            .iter()
            .filter(|thread| matches!(thread.state, State::Stopped { .. }))
            .map(move |thread| StoppedThread { tid: thread.tid, creator })
    }

    /// The first thread found that may be inside `forbidden`, or `None` if certainly no thread is.
    ///
    /// A thread counts as inside if its program counter, any word of its stack, or the context in a signal frame says so; and also if its
    /// stack cannot be searched. Word by word is conservative: an integer that looks like an address in the ranges blocks as well.
    ///
    /// The memory map is read once a stop, at the first call.
    pub fn may_be_inside(&self, forbidden: &RangeSet) -> Option<Blocker> {
        self.first_blocker(self.threads(), forbidden, forbidden)
    }

    /// Like [`may_be_inside`](Self::may_be_inside), with other ranges for where threads stand, or will when a signal handler returns, than for what the words
    /// of their stacks return to.
    pub(crate) fn may_stand_or_return(&self, contexts: &RangeSet, words: &RangeSet) -> Option<Blocker> {
        self.first_blocker(self.threads(), words, contexts)
    }

    /// Like [`may_be_inside`](Self::may_be_inside), for one thread.
    pub fn may_thread_be_inside(&self, thread: StoppedThread<'_>, forbidden: &RangeSet) -> Option<Blocker> {
        self.first_blocker([thread], forbidden, forbidden)
    }

    fn first_blocker<'t>(
        &self,
        threads: impl IntoIterator<Item = StoppedThread<'t>>,
        words: &RangeSet,
        contexts: &RangeSet,
    ) -> Option<Blocker> {
        let map = self.map.get_or_init(|| MemoryMap::snapshot(self.maps).ok());
        let memory = SharedMemory::own();
        let mut inspector =
            map.as_ref().map(|map| Inspector::new(Mode::NATIVE, &memory, map, words).with_contexts(contexts));
        threads.into_iter().find_map(|StoppedThread { tid, .. }| {
            let context = if self.alone { self.own_context() } else { self.context_of(tid)? };
            match &mut inspector {
                Some(inspector) => inspector.blocker_of(tid, context),
                // Without a memory map nothing can be ruled out.
                None => Some(Blocker { tid, at: context.sp, how: How::Unscannable }),
            }
        })
    }

    /// Where a thread stands; `None` for a kernel worker, and for a thread whose registers cannot be read: it was killed, with the whole process.
    fn context_of(&self, tid: Tid) -> Option<Context> {
        let registers = ptrace::registers(tid).ok()?;
        (!registers.is_kernel_worker()).then(|| Context {
            pc: registers.pc(),
            sp: registers.sp(),
            restart: registers.restarted_syscall(),
            thread_pointer: ptrace::thread_pointer(tid, &registers),
            floor: (tid == self.creator.tid).then_some(self.creator.own_frames_below),
        })
    }

    /// Where the calling thread stands, which is the creator: in trapline's code, and so in no range.
    fn own_context(&self) -> Context {
        let floor = self.creator.own_frames_below;
        let thread_pointer = Some(Addr::new(thread::pointer() as u64));
        Context { pc: Addr::default(), sp: floor, restart: None, thread_pointer, floor: Some(floor) }
    }

    /// Takes `signal` out of the mask of every thread that blocks it, and returns how many did.
    ///
    /// A thread that blocks SIGTRAP is killed by a breakpoint. A program that asks for its own mask later sees the change.
    pub fn unblock(&self, signal: i32) -> usize {
        self.threads()
            .filter(|thread| {
                thread
                    .signal_mask()
                    .is_ok_and(|mask| mask.contains(signal) && thread.set_signal_mask(mask.without(signal)).is_ok())
            })
            .count()
    }
}

impl fmt::Debug for Stopped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopped").field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// One thread, standing still.
///
/// Its methods fail with `ESRCH` if it was killed since; then the whole process was.
#[derive(Clone, Copy, Debug)]
pub struct StoppedThread<'a> {
    tid: Tid,
    creator: Creator<'a>,
}

impl StoppedThread<'_> {
    /// The kernel's number of the thread.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Whether it is the thread that asked for the stop. It sleeps in trapline's own code.
    pub fn is_creator(&self) -> bool {
        self.tid == self.creator.tid
    }

    /// Its general registers, with the program counter and the stack pointer.
    ///
    /// # Errors
    /// `ESRCH`: it was killed.
    pub fn registers(&self) -> Result<Registers, Errno> {
        ptrace::registers(self.tid)
    }

    /// Has it continue at `pc`.
    ///
    /// # Errors
    /// `EBUSY` if it is going to [restart](Registers::restarted_syscall) a system call: the kernel would go two bytes back from `pc`. And
    /// for the creator, which waits for this task, or is about to: moved away it would leave the stop behind. `ESRCH`: it was killed. `EINVAL`: `pc` does not fit the target's width.
    pub fn set_pc(&self, pc: Addr) -> Result<(), Errno> {
        if self.is_creator() || self.registers()?.restarted_syscall().is_some() {
            return Err(Errno(libc::EBUSY));
        }
        ptrace::set_pc(self.tid, pc)
    }

    /// The signals that it blocks.
    ///
    /// # Errors
    /// `ESRCH`: it was killed.
    pub fn signal_mask(&self) -> Result<SignalSet, Errno> {
        if self.is_creator() {
            // Relaxed: the kernel's start and end of this task order its accesses with the creator's.
            return Ok(SignalSet::from_bits(self.creator.mask.load(Ordering::Relaxed)));
        }
        ptrace::signal_mask(self.tid)
    }

    /// Replaces the signals that it blocks.
    ///
    /// # Errors
    /// `ESRCH`: it was killed.
    pub fn set_signal_mask(&self, mask: SignalSet) -> Result<(), Errno> {
        if self.is_creator() {
            // Relaxed: as above.
            self.creator.mask.store(mask.bits(), Ordering::Relaxed);
            return Ok(());
        }
        ptrace::set_signal_mask(self.tid, mask)
    }
}
