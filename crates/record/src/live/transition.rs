//! The moment in which functions are exchanged: all threads stand still, and none is in them.
//!
//! Owns [`Transition`], the stops with their pauses, and [`Check`], where nobody may be. Whoever is in the way is named after it went on.

use std::{
    fs, io,
    time::{Duration, Instant},
};

use trapline_engine::{Addr, AddrRange};
use trapline_process::quiesce::{Blocker, How, OtherProcess, RangeSet, ThreadRegisters};

use super::{
    Blocked, LiveError, PAGE_BYTES,
    objects::Objects,
    tracing::{Hooks, Standstill, Tracing},
    walk::{Frame, Walker},
};
use crate::sys::{Tid, memory::Memory, ptrace, spawn::Urgent, width};

/// How long a stop may take if threads have to be let out of the functions first. Never the longest that is bearable, as the exchange follows.
const LIMIT: Duration = Duration::from_millis(16);

/// How long those are let go on by themselves at first; then twice as long, and so on. Short calls are over then.
const FIRST_STEP: Duration = Duration::from_micros(100);

const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Where nobody may be, and what is there.
#[derive(Clone, Debug)]
pub(super) struct Check {
    named: Vec<(String, AddrRange)>,
}

impl Check {
    pub(super) fn new(named: Vec<(String, AddrRange)>) -> Self {
        Self { named }
    }

    pub(super) fn and_all(mut self, other: Self) -> Self {
        self.named.extend(other.named);
        self
    }

    fn ranges(&self) -> RangeSet {
        RangeSet::new(self.named.iter().map(|(_, range)| *range))
    }

    /// The same, with where a tracer has moved something of that to, and where it has code of its own.
    fn with_hooks(mut self, hooks: &Hooks) -> Self {
        let moved = hooks.moved.iter().map(|(window, range)| (self.name_of(*window), *range));
        let added: Vec<_> = moved.chain([("the recorder's code".to_owned(), hooks.code)]).collect();
        self.named.extend(added);
        self
    }

    /// What an instruction is in.
    fn name_of(&self, insn: Addr) -> String {
        let found = self.named.iter().find(|(_, range)| range.contains(insn));
        found.map_or_else(|| "a stack that cannot be searched".to_owned(), |(name, _)| name.clone())
    }
}

/// Where nobody may be, for who looks at stopped threads.
struct Forbidden {
    /// Where nobody may return to.
    words: RangeSet,
    /// Where nobody may be, or have been when a signal came.
    contexts: RangeSet,
    hooks: Option<Hooks>,
}

/// Stops, until nobody is where nobody may be, or the time is over.
pub(super) struct Transition<'a> {
    pid: Tid,
    memory: &'a Memory,
    deadline: Duration,
}

/// How it went.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Report {
    pub(super) stops: u32,
    pub(super) longest: Duration,
    /// How often threads were let go on alone to get out.
    pub(super) let_out: u32,
}

/// A thread in the way, as it stood there.
struct InTheWay {
    tid: Tid,
    /// An instruction of what is to be replaced.
    insn: Addr,
    /// For people.
    how: String,
    /// Its instruction, and those of all who called, from the innermost.
    frames: Vec<Addr>,
    /// Instruction and stack pointer.
    registers: (u64, u64),
    /// Whether it is in a system call.
    is_in_kernel: bool,
}

impl InTheWay {
    /// Whether it sleeps where it was before. One that executes may only not have got a processor.
    fn sleeps_since(&self, before: &Self) -> bool {
        (self.tid, self.registers) == (before.tid, before.registers) && self.is_in_kernel
    }
}

impl<'a> Transition<'a> {
    pub(super) fn new(pid: Tid, memory: &'a Memory, deadline: Duration) -> Self {
        Self { pid, memory, deadline }
    }

    /// Runs `commit` in the first stop in which nobody is inside.
    pub(super) fn run(
        &self,
        tracing: &mut dyn Tracing,
        check: &Check,
        objects: &Objects,
        mut walker: Walker,
        mut commit: impl FnMut(&mut dyn Standstill) -> io::Result<()> + Send,
    ) -> Result<Report, LiveError> {
        let _urgent = Urgent::with_new_threads();
        let started = Instant::now();
        let words = check.ranges();
        let hooks = tracing.hooks(&words).map_err(|error| LiveError::system(self.pid, "reading its stubs", error))?;
        let check = &hooks.as_ref().map_or_else(|| check.clone(), |hooks| check.clone().with_hooks(hooks));
        let forbidden = Forbidden { words, contexts: check.ranges(), hooks };
        let (mut report, mut pause) = (Report::default(), FIRST_PAUSE);
        // Who was in the way when all stood still last.
        let mut last = None;
        loop {
            let mut steps = 0;
            let mut outcome = Ok(None);
            let (stopped, took) = tracing.stop(&mut |still, stopped_for| {
                let until = Instant::now() + LIMIT.saturating_sub(stopped_for);
                outcome = self
                    .in_the_way(&still.threads(), &forbidden, &mut walker)
                    .and_then(|found| self.let_out(still, found, &forbidden, &mut walker, until, &mut steps))
                    .and_then(|found| if found.is_none() { commit(still).map(|()| None) } else { Ok(found) });
            });
            report.stops += 1;
            report.let_out += steps;
            report.longest = report.longest.max(took);
            let waited = started.elapsed();
            match stopped.map(|()| outcome) {
                Ok(Ok(None)) => return Ok(report),
                Ok(Ok(found)) => last = found,
                Err(error) | Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {}
                // Somebody traces a thread, perhaps for a moment only.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && waited < self.deadline => {}
                Ok(Err(error)) => return Err(LiveError::system(self.pid, "exchanging the functions", error)),
                Err(error) => return Err(LiveError::system(self.pid, "stopping its threads", error)),
            }
            if waited >= self.deadline {
                let Some(found) = last else { return Err(LiveError::Unstoppable { waited }) };
                let blocked = Box::new(self.blocked(check, objects, &found));
                return Err(LiveError::Busy { waited, stops: report.stops, blocked });
            }
            if !tracing.pause(pause.min(self.deadline.saturating_sub(waited))) {
                return Err(LiveError::RecorderLeaves { pid: self.pid });
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Lets those go on who are inside, and nobody else, again and again until they are out: there are few of them, and they do not have to wait for a processor. Who is
    /// still inside when the time is over, or sleeps there, is returned.
    fn let_out(
        &self,
        still: &mut dyn Standstill,
        mut inside: Vec<InTheWay>,
        forbidden: &Forbidden,
        walker: &mut Walker,
        until: Instant,
        steps: &mut u32,
    ) -> io::Result<Option<InTheWay>> {
        let mut step = FIRST_STEP;
        while !inside.is_empty() && Instant::now() + step < until {
            let tids: Vec<Tid> = inside.iter().map(|thread| thread.tid).collect();
            let stays = still.let_on(&tids, step, until)?;
            *steps += 1;
            if let Some(stays) = stays {
                return Ok(inside.into_iter().find(|thread| thread.tid == stays));
            }
            step *= 2;
            let there = self.in_the_way(&tids, forbidden, walker)?;
            let sleeps = |thread: &&InTheWay| inside.iter().any(|before| thread.sleeps_since(before));
            if let Some(asleep) = there.iter().position(|thread| sleeps(&thread)) {
                return Ok(there.into_iter().nth(asleep));
            }
            inside = there;
        }
        if inside.is_empty() && !still.is_complete() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(inside.pop())
    }

    /// Who is inside. Words of stacks that may be return addresses are looked at first, which is quick; what they say is believed where no walk says otherwise.
    fn in_the_way(&self, threads: &[Tid], forbidden: &Forbidden, walker: &mut Walker) -> io::Result<Vec<InTheWay>> {
        let Forbidden { words, contexts, hooks } = forbidden;
        hooks.iter().for_each(Hooks::look_again);
        let Some(&any) = threads.first() else { return Ok(Vec::new()) };
        let process = OtherProcess::new(any)?;
        let mut inside = Vec::new();
        for &tid in threads {
            let registers = match ptrace::registers(tid) {
                Ok(registers) => registers,
                // It was killed.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                Err(error) => return Err(error),
            };
            let found = match hooks {
                None => process.blocker_of(tid, &registers, words, contexts),
                Some(hooks) => {
                    let original = |slot: Addr| hooks.return_at(self.memory, slot);
                    process.blocker_behind(tid, &registers, words, contexts, (hooks.return_code(), &original))
                }
            };
            let Some(Blocker { at, how, .. }) = found else { continue };
            let exact = walker.frames(&registers, self.memory, hooks.as_ref());
            let (insn, how) = match (how, &exact) {
                (How::Pc, _) => (at, format!("it executes {at}")),
                (_, Some(frames)) => match frames.iter().find(|frame| contexts.contains(frame.insn())) {
                    Some(frame) => (frame.insn(), format!("it returns to {}", frame.pc)),
                    // The word is left over from a call that is long gone.
                    None => continue,
                },
                (How::StackWord { .. }, None) => (at.offset(-1), format!("it may return to {at}")),
                (How::SignalFrame { .. }, None) => (at, format!("its signal handler may return to {at}")),
                (How::Unscannable, None) => (at, format!("stack at {at}")),
            };
            let frames = exact.map(|frames| frames.into_iter().map(Frame::insn).collect());
            let frames = frames.unwrap_or_else(|| self.guessed(&registers, walker));
            inside.push(InTheWay {
                tid,
                insn,
                how,
                frames,
                registers: (registers.rip, registers.rsp),
                is_in_kernel: width::call_of(&registers) >= 0,
            });
        }
        Ok(inside)
    }

    /// Where a thread is, and all that looks like a return address near its stack pointer.
    fn guessed(&self, registers: &ThreadRegisters, walker: &Walker) -> Vec<Addr> {
        const STACK_BYTES: usize = 16 << 10;
        let mode = width::mode_of(registers);
        let word_bytes = mode.word_bytes();
        let sp = Addr::new(registers.rsp & !(u64::from(word_bytes) - 1));
        // The end of the stack may be closer: then a page at a time.
        let stack = self.memory.read_vec(sp, STACK_BYTES).or_else(|_| {
            let left = PAGE_BYTES - sp.value() % PAGE_BYTES;
            self.memory.read_vec(sp, usize::try_from(left).unwrap_or(0))
        });
        let stack = stack.unwrap_or_default();
        let words = stack.chunks_exact(word_bytes as usize).map(|word| Addr::new(width::word_in(mode, word)));
        // Nothing else is read: below a stack, the kernel would have it grow to there.
        let callers = words.filter(|word| walker.is_code(*word) && self.is_behind_a_call(*word));
        std::iter::once(Addr::new(registers.rip)).chain(callers.map(|word| word.offset(-1))).collect()
    }

    fn blocked(&self, check: &Check, objects: &Objects, found: &InTheWay) -> Blocked {
        const FRAMES: usize = 16;
        let tid = found.tid;
        let name = fs::read_to_string(format!("/proc/{}/task/{tid}/comm", self.pid)).unwrap_or_default();
        Blocked {
            tid,
            thread: name.trim().to_owned(),
            function: check.name_of(found.insn),
            how: found.how.clone(),
            backtrace: found.frames.iter().filter_map(|at| objects.name_of(*at)).take(FRAMES).collect(),
        }
    }

    /// Whether the instruction before is a call, direct or indirect (SDM volume 2, CALL).
    fn is_behind_a_call(&self, at: Addr) -> bool {
        let Ok(before) = self.memory.read_vec(at.offset(-7), 7) else { return false };
        let is_indirect = |len: usize| before[7 - len] == 0xff && before[8 - len] & 0x38 == 0x10;
        before[2] == 0xe8 || [2, 3, 6, 7].into_iter().any(is_indirect)
    }
}
