//! The threads of another process, which its tracer has stopped: are they inside?
//!
//! Owns [`OtherProcess`], and [`stop_process`] for who does not trace it for long. A recorder traces its targets for long, and has its own way of stopping them; what it asks about the threads then is
//! what is asked of one's own, and is answered by the same search. It may allocate: the locks of the target are not its own.

use std::{io, time::Duration};

use trapline_engine::{Addr, Mode};

use super::{
    RangeSet, ThreadRegisters, Tid,
    inside::{Blocker, Context, Inspector},
    memory_map::{MapsFile, MemoryMap},
    session::{Failure, Session, State, Summary},
    to_native,
};
use crate::sys::{
    clock::Moment,
    memory::{Memory, OtherMemory, further},
    pages::PageVec,
    procfs::TaskDir,
    ptrace::{Registers, mode_of_segment},
    restart,
    signal::{self, SignalSet},
};

/// Stops every thread of another process, runs `work` with their numbers and how long the first one stands still, and lets all go on. The calling thread is their
/// tracer meanwhile, and blocks all signals. Also returned is how long the stop was, be it complete or not: from the first thread that was interrupted until all
/// go on.
///
/// # Errors
/// Not all of them stood still in time, or they may not be traced. `work` was not called then.
pub fn stop_process<R>(
    process: Tid,
    deadline: Duration,
    work: impl FnOnce(&[Tid], Duration) -> R,
) -> (io::Result<R>, Duration) {
    let prepare = || {
        let tasks = TaskDir::open_other(process)?;
        let threads = PageVec::with_capacity(tasks.count()?.saturating_mul(2).max(64))?;
        Ok::<_, io::Error>((tasks, threads))
    };
    let (tasks, mut threads) = match prepare() {
        Ok(prepared) => prepared,
        Err(error) => return (Err(error), Duration::ZERO),
    };
    let mask = signal::replace_mask(SignalSet::ALL);
    let mut session = Session::new(process, &tasks, &mut threads);
    let stopped = session.stop(Moment::now().after(deadline)).map(|()| {
        let is_stopped = |thread: &&super::session::Thread| matches!(thread.state, State::Stopped { .. });
        let threads: Vec<Tid> = session.threads().iter().filter(is_stopped).map(|thread| thread.tid).collect();
        work(&threads, Duration::from_nanos(session.stopped_ns()))
    });
    let Summary { stop_ns, .. } = session.resume();
    signal::replace_mask(mask);
    let stopped = stopped.map_err(|failure| match failure {
        Failure::Refused { errno, .. } | Failure::Kernel(errno) => errno.into(),
        Failure::Unstoppable { .. } | Failure::Unsettled => io::Error::from(io::ErrorKind::TimedOut),
    });
    (stopped, Duration::from_nanos(stop_ns))
}

/// The memory of a process whose threads stand still.
pub struct OtherProcess {
    map: MemoryMap,
    memory: OtherMemory,
}

impl std::fmt::Debug for OtherProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OtherProcess").field("tid", &self.memory.tid).finish_non_exhaustive()
    }
}

impl OtherProcess {
    /// Reads what is mapped where. `tid` is any of the threads. True until they go on.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn new(tid: Tid) -> io::Result<Self> {
        let maps = MapsFile::open_other(tid)?;
        Ok(Self { map: MemoryMap::snapshot(&maps)?, memory: OtherMemory { tid } })
    }

    /// Why a stopped thread with these registers may return to `words`, or is in `contexts`, or comes back there from a signal handler. `None` if
    /// it certainly does not. A word of a stack counts if the call before it is in `words`.
    pub fn blocker_of(
        &self,
        tid: Tid,
        registers: &ThreadRegisters,
        words: &RangeSet,
        contexts: &RangeSet,
    ) -> Option<Blocker> {
        Self::blocker_in(&self.memory, &self.map, tid, registers, words, contexts)
    }

    /// The same, for a thread on whose stack a tracer has put `hook` in the place of return addresses. `original` says which, by where the word is, if that is one of them.
    pub fn blocker_behind(
        &self,
        tid: Tid,
        registers: &ThreadRegisters,
        words: &RangeSet,
        contexts: &RangeSet,
        (hook, original): (u64, &dyn Fn(Addr) -> Option<u64>),
    ) -> Option<Blocker> {
        let memory = Unhooked { memory: &self.memory, mode: mode_of(registers), hook, original };
        Self::blocker_in(&memory, &self.map, tid, registers, words, contexts)
    }

    fn blocker_in(
        memory: &impl Memory,
        map: &MemoryMap,
        tid: Tid,
        registers: &ThreadRegisters,
        words: &RangeSet,
        contexts: &RangeSet,
    ) -> Option<Blocker> {
        let mode = mode_of(registers);
        let thread_pointer = match mode {
            Mode::Bits32 => registers.gs_base,
            Mode::Bits64 => registers.fs_base,
        };
        let registers = Registers::from(to_native(registers));
        if registers.is_kernel_worker() {
            return None;
        }
        let context = Context {
            pc: registers.pc(),
            sp: registers.sp(),
            restart: registers.restarted_syscall(),
            thread_pointer: (thread_pointer != 0).then_some(Addr::new(thread_pointer)),
            floor: None,
        };
        let inspector = Inspector::new(mode, memory, map, words);
        inspector.with_contexts(contexts).blocker_of(tid, context)
    }
}

/// A process's memory, as it is without a tracer's hooks.
struct Unhooked<'a> {
    memory: &'a OtherMemory,
    mode: Mode,
    hook: u64,
    original: &'a dyn Fn(Addr) -> Option<u64>,
}

impl Memory for Unhooked<'_> {
    fn read(&self, at: Addr, buffer: &mut [u8]) -> usize {
        let count = self.memory.read(at, buffer);
        let word_bytes = self.mode.word_bytes() as usize;
        let hook = self.hook.to_le_bytes();
        // Return addresses that are hooked are in whole words.
        let first = usize::try_from(at.value().wrapping_neg() % word_bytes as u64).unwrap_or(0).min(count);
        for (index, word) in buffer[first..count].chunks_exact_mut(word_bytes).enumerate() {
            if *word == hook[..word_bytes]
                && let Some(original) = (self.original)(further(at, first + index * word_bytes))
            {
                word.copy_from_slice(&original.to_le_bytes()[..word_bytes]);
            }
        }
        count
    }
}

/// Whether the system call that a stopped thread is in fails because it was interrupted, and may be started again instead:
/// most calls that ptrace interrupts restart by themselves, a few return `EINTR`, which no signal of the program explains.
pub fn may_start_again(registers: &ThreadRegisters) -> bool {
    // Numbers and errors fit the lower half, which is all that a 32-bit thread has.
    #[expect(clippy::cast_possible_truncation, reason = "see above")]
    let low = |register: u64| (register as u32).cast_signed();
    let number = isize::try_from(low(registers.orig_rax)).unwrap_or(-1);
    let is_interrupted = low(registers.rax) == -libc::EINTR;
    is_interrupted && number >= 0 && restart::may_start_again(mode_of(registers), number)
}

/// What code a thread with these registers executes. A 32-bit tracer traces nothing else.
fn mode_of(registers: &ThreadRegisters) -> Mode {
    if Mode::NATIVE == Mode::Bits32 { Mode::Bits32 } else { mode_of_segment(registers.cs) }
}
