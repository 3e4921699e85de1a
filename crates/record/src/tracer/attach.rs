//! Processes that run already: recorded for a while, and left as they were.
//!
//! Owns how the [tracer](crate::tracer) comes into a process:
//!
//! 1. All threads are seized while they run.
//! 2. What is to be mapped and edited is [prepared](crate::pending) while they run.
//! 3. They stand still. One of them maps the agent and all the rest; each gets a pointer to a state of its own; who is in the middle of an instruction that will
//!    be another is moved into the stub, and functions that somebody returns into the middle of are left alone; the code is edited.
//! 4. They go on. From here on all is as if the program had been launched.
//!
//! How it leaves is its neighbour's, [`leaving`](super::leaving). Invariant: if any of it fails, the process is as it was.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use trapline_abi::agent::INJECTED_THREAD_OFFSET;
use trapline_engine::{Addr, AddrRange};
use trapline_image::Write;
use trapline_process::quiesce::{How as Tie, OtherProcess, RangeSet, ThreadRegisters};
use trapline_trace::How;

use super::{
    AT_LEAST, Outcome, Patching, Task, Tracer, id_inside,
    stop::{Crowd, Still},
};
use crate::{
    arm::{self, Armory},
    drain::{Message, SpaceId},
    error::{Doing, Error},
    exec::{self, NewImage, Untraceable},
    guard::Guard,
    inject::{Gadgets, Layout, ThreadRoom},
    leave::{Footprint, is_kernels, requeue, worker},
    pending::Pending,
    places::Places,
    pool::Pool,
    refusal::{self, Refusal},
    remote::Remote,
    space::{Space, ThreadPointer},
    sys::{Tid, maps, memory::Memory, ptrace, spawn, threads_of, width},
    text,
};

/// How long threads may take to stand still, and how much longer for each of them: each needs a processor for a moment, and most of them wait for it.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(8), Duration::from_micros(60));

/// As long as it was not tried for longer than this, nobody stands still for more.
const SOON: Duration = Duration::from_secs(1);

/// How long a process that is looked at in vain may be one that has just begun.
const SETTLING: Duration = Duration::from_millis(100);

/// How long it is tried again to come or to leave.
pub(super) const PERSISTENCE: Duration = Duration::from_secs(20);

/// Between two attempts, the first time and at most.
pub(super) const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));

/// Everything that was prepared for one process.
struct Plan {
    id: SpaceId,
    /// `None` once it is done.
    pending: Option<Pending>,
    space: Space,
    layout: Layout,
    base: Addr,
    /// Where the pool will be.
    pool_place: AddrRange,
    /// What was mapped then.
    objects: Vec<(AddrRange, u64)>,
}

impl Plan {
    /// Where something of ours will be mapped.
    fn planned(&self) -> impl Iterator<Item = AddrRange> {
        let room = self.space.room.as_ref().map(|room| room.range);
        let places = [self.pool_place].into_iter().chain(self.space.counters_place);
        self.layout.ranges(self.base).into_iter().chain(room).chain(places).chain(self.areas())
    }

    /// Where stubs will be.
    fn areas(&self) -> impl Iterator<Item = AddrRange> {
        self.pending.iter().flat_map(Pending::planned)
    }

    /// What is to be undone once it is done.
    fn footprint(&self) -> Option<Footprint> {
        let stubs = || self.space.stubs.values();
        let of_unwinders: Vec<Write> = stubs().flat_map(|stubs| &stubs.of_unwinders).copied().collect();
        let edits = self.pending.iter().flat_map(Pending::edits);
        Some(Footprint {
            agent: self.space.agent,
            code: [self.layout.code(self.base)].into_iter().chain(self.areas()).collect(),
            mapped: self.planned().collect(),
            unwinders: stubs().filter_map(|stubs| stubs.unwinder).collect(),
            writes: edits.filter(|edit| !of_unwinders.contains(edit)).copied().collect(),
            of_unwinders,
            gadgets: self.space.gadgets?,
            instead: Vec::new(),
        })
    }
}

impl Tracer<'_> {
    /// Records a process that runs, and what comes from it, until it ends, somebody wants us to end, or `duration` has passed.
    pub(crate) fn run_attached(
        mut self,
        pid: Tid,
        duration: Option<Duration>,
        guard: Guard,
    ) -> Result<(Outcome, Armory), Error> {
        self.main = pid;
        self.is_attached = true;
        self.guard = Some(guard);
        let process = self.new_process(pid, None, How::Attached);
        self.seize_all(pid, process)?;
        self.arm_running(pid, process)?;
        self.end = duration.map(|duration| Instant::now() + duration);
        self.patching = Patching::Welcome;
        #[cfg(target_arch = "x86_64")]
        self.note_patches(pid, process);
        while !self.tasks.is_empty() && self.heard.is_empty() {
            let left = self.end.map_or(AT_LEAST, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                break;
            }
            self.attend(Instant::now() + left.min(AT_LEAST))?;
        }
        self.leave_all();
        Ok((self.outcome, self.armory))
    }

    /// Sees to what happens, until a moment or something that people have sent.
    pub(super) fn attend(&mut self, until: Instant) -> Result<(), Error> {
        while self.heard.is_empty() && !self.tasks.is_empty() {
            match ptrace::poll_any() {
                Ok(Some((tid, stop))) => self.stopped(tid, stop),
                Ok(None) => {
                    self.see_to_requests();
                    #[cfg(target_arch = "x86_64")]
                    self.see_to_patches();
                    self.toggle();
                    if !self.heard.is_empty() {
                        break;
                    }
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    let patience = self.toggler.as_ref().map_or(left, |toggler| toggler.wait().min(left));
                    let patience = patience + Duration::from_millis(1);
                    let came = self.inbox.wait(patience).doing(|| "waiting for the program".to_owned())?;
                    self.heard.extend(came);
                }
                // No thread is left.
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Seizes all threads of a process.
    fn seize_all(&mut self, pid: Tid, process: u32) -> Result<(), Error> {
        loop {
            let mut found = 0;
            for tid in threads_of(pid) {
                if self.tasks.contains_key(&tid) || self.expected.contains(&tid) {
                    continue;
                }
                match ptrace::seize(tid) {
                    Ok(()) => {}
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                    Err(_) if super::status_field(tid, "State:").is_none_or(|state| state.starts_with(['Z', 'X'])) => {
                        continue;
                    }
                    // A new thread of one that we trace already: the kernel has seized it for us.
                    Err(_) if super::status_field(tid, "TracerPid:") == Some(spawn::own_tid().to_string()) => continue,
                    Err(_) => return Err(Error::NotAttachable { pid, reason: refusal::why_forbidden(pid) }),
                }
                found += 1;
                self.tasks.insert(tid, Task::new(process, id_inside(tid)));
            }
            if found == 0 {
                return Ok(());
            }
        }
    }

    /// Arms a process that runs.
    fn arm_running(&mut self, pid: Tid, process: u32) -> Result<(), Error> {
        let refused = |reason: Refusal| Error::NotAttachable { pid, reason };
        let not_traceable = |reason: Untraceable| refused(Refusal::Other(reason.0));
        let (started, mut failing) = (Instant::now(), None);
        let mut pause = PAUSE.0;
        loop {
            let objects = code_of_process(pid);
            let plan = self.plan(process);
            if threads_of(pid).is_empty() {
                return Err(refused(Refusal::Ended));
            }
            let failure = match plan {
                Ok(plan) => {
                    failing = None;
                    if self.try_to_arm(pid, process, plan, started)? {
                        return Ok(());
                    }
                    None
                }
                Err(reason) => Some(reason),
            };
            if !self.heard.is_empty() {
                // Somebody wants us to end.
                return Ok(());
            }
            self.attend(Instant::now() + pause)?;
            pause = (pause * 2).min(PAUSE.1);
            if self.has_executed(pid, process) {
                return self.wait_for_executed(pid);
            }
            if !self.tasks.values().any(|task| task.process == process) {
                return Err(refused(Refusal::Ended));
            }
            if let Some(reason) = failure {
                // What was looked at may have gone meanwhile, or not be there yet.
                let since: Instant = *failing.get_or_insert_with(Instant::now);
                let patience = if code_of_process(pid) == objects { SETTLING } else { PERSISTENCE };
                if since.elapsed() > patience {
                    return Err(not_traceable(reason));
                }
            } else if started.elapsed() > PERSISTENCE {
                return Err(not_traceable(Untraceable(
                    "its threads do not stand still, or its libraries keep changing; try again when it is quieter"
                        .to_owned(),
                )));
            }
        }
    }

    /// Carries a plan out in one stop. Returns whether that was possible.
    fn try_to_arm(&mut self, pid: Tid, process: u32, mut plan: Plan, started: Instant) -> Result<bool, Error> {
        let refused = |reason: Refusal| Error::NotAttachable { pid, reason };
        let id = plan.id;
        self.seize_all(pid, process)?;
        if let Some(still) = self.stop(Crowd::Process(process), self.patience(Crowd::Process(process), started)) {
            if let Some(thread) = user_of_segment(&still) {
                self.release_all(&still);
                return Err(refused(Refusal::SegmentInUse { thread }));
            }
            if is_complete(pid, &still) && is_current(&still, &plan) {
                let is_last = started.elapsed() > PERSISTENCE / 4;
                match self.carry_out(&still.threads(), &mut plan, is_last) {
                    Ok(true) => {
                        self.armed(pid, &still.threads(), plan, process);
                        self.resume_all(&still);
                        return Ok(true);
                    }
                    Ok(false) => {}
                    Err(reason) => {
                        self.release_all(&still);
                        return Err(refused(Refusal::Other(reason.0)));
                    }
                }
            }
            self.resume_all(&still);
        }
        if let Some(guard) = &self.guard {
            guard.let_go(id);
        }
        Ok(false)
    }

    /// Waits until the program is armed that a process has executed while it was looked at.
    fn wait_for_executed(&mut self, pid: Tid) -> Result<(), Error> {
        let refused = |reason: Refusal| Err(Error::NotAttachable { pid, reason });
        let deadline = Instant::now() + PERSISTENCE;
        while self.heard.is_empty() && Instant::now() < deadline {
            let Some(task) = self.tasks.get(&pid) else { return refused(Refusal::Ended) };
            if task.space.is_some() {
                return Ok(());
            }
            if task.loading.is_none() {
                let reason = self.outcome.untraced.values().next().cloned().unwrap_or_default();
                return refused(Refusal::Other(format!("it has executed another program, which cannot be: {reason}")));
            }
            self.attend(Instant::now() + PAUSE.0)?;
        }
        Ok(())
    }

    /// Whether a process that is to be armed has executed another program, which is armed when it begins.
    fn has_executed(&self, pid: Tid, process: u32) -> bool {
        self.tasks.get(&pid).is_some_and(|task| task.process != process)
    }

    /// How long a crowd may take to stand still, of what was begun then: the longer it was tried, the longer.
    pub(super) fn patience(&self, crowd: Crowd, started: Instant) -> Duration {
        let threads = self.tasks.iter().filter(|(tid, task)| crowd.has(**tid, task)).count();
        let least = PATIENCE.0 + PATIENCE.1 * u32::try_from(threads).unwrap_or(u32::MAX);
        let elapsed = started.elapsed();
        if elapsed > SOON { least.max(elapsed / 8) } else { least }
    }

    /// Prepares everything, while the process runs.
    fn plan(&mut self, process: u32) -> Result<Plan, Untraceable> {
        let tid = self.some_thread(process)?;
        let mode = width::mode_of_program(tid);
        let memory = Arc::new(Memory::open(tid)?);
        let mappings = maps::read(tid)?;
        let objects = code_of(&mappings);
        let none = |what: &str| Untraceable(format!("there is no {what} in it"));
        let gadgets =
            Gadgets::find(mode, &memory, &mappings, &[]).ok_or_else(|| none("code that makes system calls"))?;
        let linker = exec::loaded_linker(mode, tid, &memory, &mut self.linkers)?;
        let layout = Layout::new(self.armory.injected_agent(mode)?)
            .ok_or_else(|| Untraceable("the agent cannot be mapped as it was built".to_owned()))?;
        let mut pending = Pending::new(mode, Arc::clone(&memory), mappings, 0);
        let mut place = |len_bytes: u64| {
            let near = AddrRange::new(linker.debug_state, 1);
            let at = pending.find_hole(near, len_bytes).ok_or_else(|| none("room near its dynamic linker"))?;
            pending.reserve(AddrRange::new(at, len_bytes));
            Ok::<_, Untraceable>(at)
        };
        let base = place(layout.len_bytes)?;
        let room = ThreadRoom::new(place(ThreadRoom::LEN_BYTES)?);
        let mut agent = arm::agent_at(mode, self.armory.injected_agent(mode)?, base, ThreadPointer::Given)?;
        agent.thread_offset = INJECTED_THREAD_OFFSET.cast_signed();
        let mut space = Space::new(agent);
        space.memory = Some(memory);
        let pool = Arc::new(Pool::new(self.options.chunks_for(mode), self.options.on_full)?);
        space.counters = self.drain.counters_for(tid, mode)?;
        space.room = Some(room);
        space.gadgets = Some(gadgets);
        self.armory.prepare_modules(&mut pending, tid, process, &mut space, self.options, self.drain)?;
        match arm::hook_linker(&mut pending, &agent, linker.debug_state, linker.linker_state) {
            Err(_) if self.options.libraries.is_empty() => {}
            hooked => hooked?,
        }
        pending.assemble()?;
        let pool_place = space.place_pool(&pool, pending.mappings())?;
        space.pool = Some(pool);
        space.place_counters(pending.mappings())?;
        let id = SpaceId(self.next_space);
        self.next_space += 1;
        let plan = Plan { id, pending: Some(pending), space, layout, base, pool_place, objects };
        if let (Some(guard), Some(footprint)) = (&self.guard, plan.footprint()) {
            guard.hold(id, super::thread_group(tid).unwrap_or(tid), &footprint);
        }
        Ok(plan)
    }

    /// A thread of a process whose memory can be read.
    fn some_thread(&self, process: u32) -> Result<Tid, Untraceable> {
        let of_process = |(tid, task): (&Tid, &Task)| (task.process == process).then_some(*tid);
        let runs = |tid: &Tid| {
            super::status_field(*tid, "State:").is_some_and(|state| !state.starts_with(['Z', 'X']))
                && !self.zombies.contains(tid)
        };
        let threads = self.tasks.iter().filter_map(of_process).filter(runs);
        // The first one: it is rare that this ends before the others, which come and go in some programs.
        let thread = threads.min_by_key(|tid| super::thread_group(*tid) != Some(*tid));
        thread.ok_or_else(|| Untraceable("it has ended".to_owned()))
    }

    /// Does what was prepared. `Ok(false)` if it is worth to try again, and then nothing was changed: a thread is in the way that will not be there for long.
    fn carry_out(&mut self, threads: &[Tid], plan: &mut Plan, is_last: bool) -> Result<bool, Untraceable> {
        let Plan { pending, space, layout, base, pool_place, .. } = plan;
        let (Some(memory), Some(pool), Some(gadgets)) = (space.memory.clone(), space.pool.clone(), space.gadgets)
        else {
            return Ok(false);
        };
        let Some(planned) = pending else { return Ok(false) };
        let writes = planned.edits().to_vec();
        let mut blocked = match blocked_writes(threads, &writes) {
            Err(_) if !is_last => return Ok(false),
            blocked => blocked?,
        };
        for &tid in threads {
            let at = goes_on_at(&ptrace::registers(tid)?);
            blocked.extend(edit_around(&planned.others, at).map(|index| planned.others[index]));
        }
        if !blocked.is_empty() && !is_last {
            return Ok(false);
        }
        let tid = worker(threads);
        let mut remote = Remote::by_gadgets(tid, &memory, gadgets)?;
        let mapped = (|| -> Result<(), Untraceable> {
            layout.map(&mut remote, &memory, *base)?;
            space.mapped.extend(layout.ranges(*base));
            space.code.push(layout.code(*base));
            if let Some(room) = &space.room {
                room.map(&mut remote)?;
                space.mapped.push(room.range);
            }
            planned.map(&mut remote, space)?;
            space.map_pool(&mut remote, &memory, &pool, Some(*pool_place))?;
            arm::write_config(&memory, &space.agent, self.options)?;
            Ok(())
        })();
        if let Err(reason) = mapped {
            for range in &space.mapped {
                let _ = remote.unmap(range.start, range.len_bytes());
            }
            requeue(tid, &remote.finish()?);
            return Err(reason);
        }
        requeue(tid, &remote.finish()?);
        for &tid in threads {
            give_pointer(tid, space, &mut self.tasks)?;
        }
        let places = Places::read(&memory, &space.agent)?;
        for &tid in threads {
            blocked.extend(move_into_stub(tid, &writes, &places)?);
        }
        if let Some(pending) = pending.take() {
            pending.edit_code(space, self.drain)?;
        }
        let count = text::undo(&memory, &mut blocked)?;
        self.armory.leave_out(count as u64);
        Ok(true)
    }

    /// The process is armed, and its threads stand still.
    fn armed(&mut self, pid: Tid, threads: &[Tid], plan: Plan, process: u32) {
        let id = plan.id;
        let mut space = plan.space;
        space.tasks = threads.len();
        if let Some(pool) = &space.pool {
            self.count_in(id, space.counters.as_ref());
            self.drain.tell(Message::Pool(id, Arc::clone(pool)));
            let pid_inside = id_inside(pid);
            self.drain.tell(Message::Process { space: id, pid_inside, pid, process });
        }
        for tid in threads {
            if let Some(task) = self.tasks.get_mut(tid) {
                task.space = Some(id);
            }
        }
        self.spaces.insert(id, space);
        self.outcome.processes += 1;
    }

    /// Arms a new program of a process, whose objects are loaded and of which nothing has run. The thread is stopped.
    pub(super) fn arm_loaded(&mut self, tid: Tid, image: &NewImage, memory: &Memory) -> Result<(), Untraceable> {
        image.clean_code(memory)?;
        let Some(process) = self.tasks.get(&tid).map(|task| task.process) else { return Ok(()) };
        let mut plan = self.plan(process)?;
        let id = plan.id;
        let is_armed = self.carry_out(&[tid], &mut plan, true);
        if is_armed.as_ref().is_ok_and(|is_armed| *is_armed) {
            self.armed(tid, &[tid], plan, process);
        } else if let Some(guard) = &self.guard {
            guard.let_go(id);
        }
        is_armed.map(drop)
    }

    /// Whether a 32-bit thread failed in the agent because it has lost its segment: then it has it again.
    pub(super) fn has_lost_segment(&self, tid: Tid) -> bool {
        let Some((task, pointer)) = self.tasks.get(&tid).and_then(|task| Some((task, task.given?))) else {
            return false;
        };
        let space = task.space.and_then(|space| self.spaces.get(&space));
        let Ok(mut registers) = ptrace::registers(tid) else { return false };
        let is_in_agent = |space: &Space| space.code.iter().any(|code| code.contains(Addr::new(registers.rip)));
        width::has_lost_segment(&registers)
            && space.is_some_and(is_in_agent)
            && width::give_pointer(tid, &mut registers, Some(pointer)).is_ok()
    }

    /// Gives a new thread a pointer to its state, if threads of its process need one.
    pub(super) fn begin_thread(&mut self, tid: Tid) -> std::io::Result<()> {
        let task = self.tasks.get(&tid).filter(|task| task.is_to_be_given);
        let Some(id) = task.and_then(|task| task.space) else { return Ok(()) };
        let Some(space) = self.spaces.get_mut(&id) else { return Ok(()) };
        give_pointer(tid, space, &mut self.tasks).map_err(|reason| std::io::Error::other(reason.0))
    }
}

/// Gives a stopped thread a pointer to its state.
fn give_pointer(
    tid: Tid,
    space: &mut Space,
    tasks: &mut std::collections::HashMap<Tid, Task>,
) -> Result<(), Untraceable> {
    let (Some(memory), Some(room)) = (space.memory.clone(), &mut space.room) else { return Ok(()) };
    let mut registers = ptrace::registers(tid)?;
    if is_kernels(&registers) {
        return Ok(());
    }
    let pointer = room.take(&memory)?;
    if let Some(task) = tasks.get_mut(&tid) {
        task.given = Some(pointer);
    }
    width::give_pointer(tid, &mut registers, Some(pointer))?;
    Ok(())
}

/// A thread that has a use for the segment whose base is to be the pointer to its state.
fn user_of_segment(still: &Still) -> Option<Tid> {
    let uses = |tid: &Tid| ptrace::registers(*tid).is_ok_and(|registers| width::uses_agents_segment(&registers));
    still.threads().into_iter().find(uses)
}

/// The edit that has an address between its first byte and its end.
fn edit_around(writes: &[Write], at: Addr) -> Option<usize> {
    let index = writes.partition_point(|write| write.at < at).checked_sub(1)?;
    (at < writes[index].at.after(writes[index].new.len())).then_some(index)
}

/// Where a stopped thread goes on: the system call that is made again, or the next instruction.
fn goes_on_at(registers: &ThreadRegisters) -> Addr {
    let is_restarted = width::call_of(registers) >= 0 && matches!(width::result_of(registers), -516 | -514..=-512);
    Addr::new(registers.rip).offset(if is_restarted { -width::SYSCALL_BYTES } else { 0 })
}

/// Moves a thread that is in the middle of an edit to the same place in the stub. Returns the edit if there is none.
fn move_into_stub(tid: Tid, writes: &[Write], places: &Places) -> Result<Option<Write>, Untraceable> {
    let mut registers = ptrace::registers(tid)?;
    let at = goes_on_at(&registers);
    let Some(edit) = edit_around(writes, at) else { return Ok(None) };
    let Some(stub) = places.stub_of(at) else { return Ok(Some(writes[edit])) };
    let distance = Addr::new(registers.rip).distance_from(at);
    registers.rip = stub.offset(distance).value();
    ptrace::set_registers(tid, &registers)?;
    Ok(None)
}

/// The edits that somebody returns into the middle of, or comes back to from a signal handler.
fn blocked_writes(threads: &[Tid], writes: &[Write]) -> Result<Vec<Write>, Untraceable> {
    let mut blocked: Vec<Write> = Vec::new();
    let Some(any) = threads.first() else { return Ok(blocked) };
    let process = OtherProcess::new(*any)?;
    let mut open = writes.to_vec();
    'sets: loop {
        // The call before a return address is in a window that it returns into. The first instruction counts too, which is too much, and harmless.
        let windows = open.iter().map(|write| AddrRange::new(write.at, write.new.len() as u64 - 1));
        let words = RangeSet::new(windows);
        for &tid in threads {
            let mut registers = ptrace::registers(tid)?;
            if is_kernels(&registers) {
                continue;
            }
            // Where it is itself is seen to by moving it.
            (registers.rip, registers.orig_rax) = (1, u64::MAX);
            let Some(found) = process.blocker_of(tid, &registers, &words, &words) else { continue };
            let at = match found.how {
                Tie::StackWord { .. } => found.at.offset(-1),
                Tie::Unscannable => {
                    return Err(Untraceable(format!(
                        "the stack of its thread {tid} at {} cannot be searched",
                        found.at
                    )));
                }
                _ => found.at,
            };
            let is_it = |write: &mut Write| write.at <= at && at < write.at.after(write.new.len());
            let before = open.len();
            blocked.extend(open.extract_if(.., is_it));
            if open.len() == before {
                return Err(Untraceable(format!("thread {tid} is in the way at {}", found.at)));
            }
            continue 'sets;
        }
        return Ok(blocked);
    }
}

/// Whether these are all threads of the process.
fn is_complete(pid: Tid, still: &Still) -> bool {
    threads_of(pid).iter().all(|tid| {
        still.parked.contains_key(tid)
            || super::status_field(*tid, "State:").is_none_or(|state| state.starts_with(['Z', 'X']))
    })
}

/// Whether the process has mapped what it had when it was prepared for, and nothing where we are going to.
fn is_current(still: &Still, plan: &Plan) -> bool {
    let Some(Ok(mappings)) = still.parked.keys().next().map(|tid| maps::read(*tid)) else { return false };
    let is_free =
        |range: AddrRange| mappings.iter().all(|at| at.range.end <= range.start || range.end <= at.range.start);
    code_of(&mappings) == plan.objects && plan.planned().all(is_free)
}

/// The same of a process; nothing if it cannot be read.
fn code_of_process(pid: Tid) -> Vec<(AddrRange, u64)> {
    maps::read(pid).map(|mappings| code_of(&mappings)).unwrap_or_default()
}

/// What is mapped of files' code.
fn code_of(mappings: &[maps::Mapping]) -> Vec<(AddrRange, u64)> {
    let code = mappings.iter().filter(|mapping| mapping.is_executable && mapping.inode != 0);
    code.map(|mapping| (mapping.range, mapping.inode)).collect()
}
