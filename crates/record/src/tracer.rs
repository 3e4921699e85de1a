//! The tracer: what happens to the tasks of the traced tree, from launch to the last exit.
//!
//! Owns [`Tracer`], the only thread that may use ptrace. It follows forks, threads and execs, has new images [prepared](crate::exec) and
//! [armed](crate::arm), gives forked children a pool of their own, and stays out of the way otherwise: signals and stops go where they would have gone.
//! Neighbours: the [drain](crate::drain) writes what the tracer learns into the trace. Invariant: a task that stopped is resumed, whatever goes
//! wrong; a process that cannot be traced runs untraced, and the summary says why.

mod attach;
mod leaving;
#[cfg(target_arch = "x86_64")]
mod patch;
mod stop;
mod switch;
mod task;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use trapline_abi::thread::{RESET_BYTES, Thread};
use trapline_engine::{Addr, Mode};
use trapline_trace::{How, Load, Process};

use crate::{
    Options,
    arm::Armory,
    counters::Counters,
    drain::{About, Drain, Message, SpaceId},
    error::{Doing, Error},
    exec::{self, Linkers, NewImage, Report, Untraceable},
    guard::Guard,
    pool::{Pool, Taken},
    remote::Remote,
    sandbox,
    space::Space,
    sys::{
        Tid,
        memory::Memory,
        ptrace::{self, Stop},
        shared,
        spawn::{self, Inbox},
    },
    toggle::Toggler,
};
pub use stop::Stops;
use switch::Off;
use task::{Lent, Task, status_field};
pub(crate) use task::{id_inside, thread_group};

/// Whether live patches come and go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Patching {
    /// Not before processes are armed.
    NotYet,
    /// Yes.
    Welcome,
    /// One does, and others wait.
    UnderWay,
}

/// How the traced tree went.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// How the launched program ended.
    pub(crate) status: Option<Stop>,
    /// Images that ran untraced, and why.
    pub(crate) untraced: BTreeMap<String, String>,
    /// Processes that were traced.
    pub(crate) processes: u32,
    /// How long threads stood still for us.
    pub(crate) stops: Stops,
    /// What could not be taken back in a process that goes on.
    pub(crate) left: Vec<String>,
}

/// See the module's text.
pub(crate) struct Tracer<'a> {
    options: &'a Options,
    inbox: Inbox,
    changed: Receiver<SpaceId>,
    drain: &'a Drain,
    armory: Armory,
    linkers: Linkers,
    tasks: HashMap<Tid, Task>,
    spaces: HashMap<SpaceId, Space>,
    /// Threads that stopped before their creator was seen to create them.
    unclaimed: HashMap<Tid, Stop>,
    /// Threads that were created, and have not stopped yet.
    expected: HashSet<Tid>,
    /// Spaces a thread of which waits until new objects are seen to.
    requests: HashMap<Tid, SpaceId>,
    toggler: Option<Toggler>,
    /// Sites that are switched off by order.
    off: Vec<Off>,
    /// What is recorded beside being counted, and how often something was.
    selection: Vec<u32>,
    recordings: u64,
    /// First threads that have ended before the others of their processes.
    zombies: HashSet<Tid>,
    /// Signals that people have sent the recorder of a running process.
    heard: Vec<i32>,
    /// Who leaves processes that run if we cannot.
    guard: Option<Guard>,
    /// Whether the process ran already when we came. Programs that it executes get the agent as it did.
    is_attached: bool,
    /// Whether processes are being left.
    is_leaving: bool,
    /// When it is to be left, whatever happens.
    end: Option<Instant>,
    /// What commands want that patch processes.
    #[cfg(target_arch = "x86_64")]
    jobs: Option<Receiver<crate::live::serve::Job>>,
    /// Whether they are done.
    patching: Patching,
    /// Live patches that the trace knows of, by process and where they are.
    patches: HashMap<(u32, u64), Load>,
    main: Tid,
    next_process: u32,
    next_space: u32,
    outcome: Outcome,
}

impl<'a> Tracer<'a> {
    pub(crate) fn new(
        options: &'a Options,
        inbox: Inbox,
        changed: Receiver<SpaceId>,
        drain: &'a Drain,
        armory: Armory,
    ) -> Self {
        Self {
            options,
            inbox,
            changed,
            drain,
            armory,
            linkers: Linkers::default(),
            tasks: HashMap::new(),
            spaces: HashMap::new(),
            unclaimed: HashMap::new(),
            expected: HashSet::new(),
            requests: HashMap::new(),
            toggler: None,
            off: Vec::new(),
            selection: Vec::new(),
            recordings: 0,
            zombies: HashSet::new(),
            heard: Vec::new(),
            guard: None,
            is_attached: false,
            is_leaving: false,
            end: None,
            #[cfg(target_arch = "x86_64")]
            jobs: None,
            patching: Patching::NotYet,
            patches: HashMap::new(),
            main: 0,
            next_process: 0,
            next_space: 0,
            outcome: Outcome::default(),
        }
    }

    /// Does also what these jobs are.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn with_jobs(self, jobs: Option<Receiver<crate::live::serve::Job>>) -> Self {
        Self { jobs, ..self }
    }

    /// Passes on what people have sent to the program.
    fn pass_on(&mut self) {
        for signal in std::mem::take(&mut self.heard) {
            if spawn::is_passed_on(signal) {
                spawn::kill(self.main, signal);
            }
        }
    }

    /// Traces a child that waits to execute, and everything that comes from it, until the last of them has ended.
    pub(crate) fn run(mut self, child: spawn::Waiting) -> Result<(Outcome, Armory), Error> {
        self.main = child.pid;
        let toggler = self.options.toggle.as_ref().map(Toggler::new).transpose();
        self.toggler = toggler.doing(|| "writing the log of switched sites".to_owned())?;
        if let Err(error) = ptrace::seize(child.pid) {
            // Whoever was killed before we traced it is not there to be traced.
            let Ok(Some((_, stop @ Stop::Killed(_)))) = ptrace::poll_any() else {
                return Err(error).doing(|| format!("tracing process {}", child.pid));
            };
            return Ok((Outcome { status: Some(stop), ..self.outcome }, self.armory));
        }
        let process = self.new_process(child.pid, None, How::Launched);
        self.tasks.insert(child.pid, Task::new(process, id_inside(child.pid)));
        let failure = child.go();
        self.patching = Patching::Welcome;
        loop {
            match ptrace::poll_any() {
                Ok(Some((tid, stop))) => self.stopped(tid, stop),
                Ok(None) => {
                    self.see_to_requests();
                    #[cfg(target_arch = "x86_64")]
                    self.see_to_patches();
                    self.toggle();
                    let patience = self.toggler.as_ref().map_or(AT_LEAST, Toggler::wait);
                    let heard = self.inbox.wait(patience).doing(|| "waiting for the program".to_owned())?;
                    self.heard.extend(heard);
                    self.pass_on();
                }
                // No child is left.
                Err(_) => break,
            }
        }
        if self.outcome.processes == 0
            && let Some(error) = spawn::exec_error(&failure)
        {
            return Err(error).doing(|| "executing the program".to_owned());
        }
        Ok((self.outcome, self.armory))
    }

    fn stopped(&mut self, tid: Tid, stop: Stop) {
        if let Stop::Exited(_) | Stop::Killed(_) = stop {
            return self.ended(tid, stop);
        }
        if !self.tasks.contains_key(&tid) {
            self.unclaimed.insert(tid, stop);
            return;
        }
        if self.expected.remove(&tid) {
            return self.started(tid, stop);
        }
        if matches!(stop, Stop::Signal(_) | Stop::Interrupted) {
            // An error means that the task is gone: its end is reported.
            let _ = ptrace::hide_interruption(tid);
        }
        match stop {
            Stop::Syscall if self.has_made_report(tid) => self.loader_reports(tid),
            Stop::Signal(libc::SIGTRAP) if self.is_at_poked_site(tid) => resume(tid, 0),
            Stop::Signal(libc::SIGSEGV) if self.has_lost_segment(tid) => resume(tid, 0),
            Stop::Signal(signal) => self.go_on(tid, signal),
            Stop::Fork | Stop::Vfork | Stop::Clone => self.created(tid, stop),
            Stop::VforkDone => self.vfork_done(tid),
            Stop::Exec => self.executed(tid),
            // An error means that the task is gone: its end is reported.
            Stop::WithItsGroup => drop(ptrace::listen(tid)),
            Stop::Interrupted if self.requests.contains_key(&tid) => self.objects_changed(tid),
            Stop::Interrupted | Stop::Syscall | Stop::Exited(_) | Stop::Killed(_) => self.go_on(tid, 0),
        }
    }

    fn new_process(&mut self, pid: Tid, parent: Option<u32>, how: How) -> u32 {
        let id = self.next_process;
        self.next_process += 1;
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = command.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        let mut command: Vec<String> = command.collect();
        command.pop();
        let executable = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let process = Process {
            id,
            pid: pid.cast_unsigned(),
            parent,
            command,
            executable: executable.to_string_lossy().into_owned(),
            started_tsc: shared::tsc(),
            how,
        };
        self.drain.write(About::Process(id), move |writer| writer.process(&process));
        id
    }

    /// A task has made another one.
    fn created(&mut self, parent: Tid, stop: Stop) {
        if let Err(error) = self.try_created(parent, stop) {
            self.note_failure(parent, &error);
        }
        resume(parent, 0);
    }

    fn try_created(&mut self, parent: Tid, stop: Stop) -> io::Result<()> {
        let child = Tid::try_from(ptrace::event_message(parent)?).unwrap_or(0);
        let Some(task) = self.tasks.get(&parent) else { return Ok(()) };
        let (mut process, space, forbidden, given) = (task.process, task.space, task.forbidden, task.given);
        let is_thread = thread_group(child) != Some(child);
        let shares_memory =
            is_thread || spawn::share_memory(parent, child).unwrap_or(matches!(stop, Stop::Vfork | Stop::Clone));
        if !is_thread {
            let how = if shares_memory { How::Vfork } else { How::Fork };
            let child = self.new_process(child, Some(process), how);
            #[cfg(target_arch = "x86_64")]
            self.inherit_patches(process, child);
            process = child;
        }
        let child_space = match space {
            Some(space) if shares_memory => {
                if let Some(space) = self.spaces.get_mut(&space) {
                    space.tasks += 1;
                }
                Some(space)
            }
            // A copy: the child gets a space of its own when it has stopped.
            other => other,
        };
        // The child of a fork has its parent's in its copy of the memory; that of a vfork borrows it.
        let given = given.filter(|_| !shares_memory);
        let is_to_be_given = shares_memory && stop != Stop::Vfork;
        let task =
            Task { space: child_space, forbidden, given, is_to_be_given, ..Task::new(process, id_inside(child)) };
        let pid_inside = task.tid_inside;
        self.tasks.insert(child, task);
        if let (Some(space), false, true) = (space, is_thread, shares_memory) {
            self.drain.tell(Message::Process { space, pid_inside, pid: child, process });
            if stop == Stop::Vfork {
                self.lend_thread_state(parent, space, pid_inside)?;
            }
        }
        if !shares_memory {
            self.copies_memory(child, space);
        }
        if let Some(stop) = self.unclaimed.remove(&child) {
            self.started(child, stop);
        } else {
            self.expected.insert(child);
        }
        Ok(())
    }

    /// A child has a copy of its parent's memory: the code there is armed, the pool is the parent's.
    fn copies_memory(&mut self, child: Tid, parent_space: Option<SpaceId>) {
        let copy = parent_space.and_then(|space| self.spaces.get(&space)).map(Space::forked);
        let id = SpaceId(self.next_space);
        self.next_space += 1;
        let Some(task) = self.tasks.get_mut(&child) else { return };
        task.space = copy.is_some().then_some(id);
        if let Some(space) = copy {
            self.spaces.insert(id, space);
        }
    }

    /// A new task has stopped for the first time.
    fn started(&mut self, tid: Tid, stop: Stop) {
        let signals = self.began(tid);
        if stop == Stop::Interrupted {
            return resume_with(tid, &signals);
        }
        for signal in signals {
            spawn::kill(tid, signal);
        }
        self.stopped(tid, stop);
    }

    /// The same; it stays where it is. Returns signals that came meanwhile.
    fn began(&mut self, tid: Tid) -> Vec<i32> {
        if let Err(error) = self.begin_thread(tid) {
            self.note_failure(tid, &error);
        }
        if let Some(id) = self.tasks.get(&tid).and_then(|task| task.space)
            && self.spaces.get(&id).is_some_and(|space| space.pool.is_none())
        {
            match self.adopt(tid, id) {
                Ok(signals) => return signals,
                Err(error) => self.note_failure(tid, &error),
            }
        }
        Vec::new()
    }

    /// Gives a forked child its own pool, in place of its parent's. Returns signals that came meanwhile.
    fn adopt(&mut self, tid: Tid, id: SpaceId) -> io::Result<Vec<i32>> {
        let Some(task) = self.tasks.get(&tid) else { return Ok(Vec::new()) };
        let (process, pid_inside, forbidden, given) = (task.process, task.tid_inside, task.forbidden, task.given);
        let Some(space) = self.spaces.get_mut(&id) else { return Ok(Vec::new()) };
        let memory = Memory::open(tid)?;
        let registers = ptrace::registers(tid)?;
        memory.write(space.agent.thread(&registers, given), &[0; RESET_BYTES])?;
        if !sandbox::may_map(forbidden) {
            return space.forget_pool(&memory).and(Err(io::Error::other(SANDBOXED)));
        }
        let chunks = self.options.chunks_for(space.agent.mode);
        let pool = Pool::new(chunks, self.options.on_full).map(Arc::new)?;
        // In place of its parent's, or, if that has none, none.
        space.counters = space.counters_place.map(|_| Counters::new().map(Arc::new)).transpose()?;
        let mut remote = Remote::on_errand(tid, &memory, space.agent.errand)?;
        let mapped = space.map_pool(&mut remote, &memory, &pool, None);
        let signals = remote.finish()?;
        if let Err(error) = mapped {
            space.forget_pool(&memory)?;
            self.note_failure(tid, &error);
            return Ok(signals);
        }
        space.memory = Some(Arc::new(memory));
        space.pool = Some(Arc::clone(&pool));
        let counters = space.counters.clone();
        for load in space.loads(process) {
            self.drain.load(load);
        }
        self.count_in(id, counters.as_ref());
        self.drain.tell(Message::Pool(id, pool));
        self.drain.tell(Message::Process { space: id, pid_inside, pid: tid, process });
        self.tell_guard(id, tid);
        self.outcome.processes += 1;
        let more = self.add_helper(tid, id);
        Ok([signals, more].concat())
    }

    /// A vfork child goes on with its parent's thread state, and with its own chunks.
    fn lend_thread_state(&mut self, parent: Tid, id: SpaceId, child_inside: u32) -> io::Result<()> {
        let (Some(space), Some(task)) = (self.spaces.get(&id), self.tasks.get_mut(&parent)) else { return Ok(()) };
        let registers = ptrace::registers(parent)?;
        let thread = space.agent.thread(&registers, task.given);
        // Its only thread has the number of the process.
        let (left, state) = space.lend(thread, (child_inside, child_inside))?;
        task.lent = Some(Lent { thread, state });
        self.leave_chunk(id, left);
        Ok(())
    }

    /// Tells the drain that a thread does not go on with its chunk.
    fn leave_chunk(&self, id: SpaceId, left: Option<Taken>) {
        if let Some(taken) = left {
            self.drain.tell(Message::ChunkEnded(id, taken));
        }
    }

    fn vfork_done(&mut self, parent: Tid) {
        self.has_vforked(parent);
        resume(parent, 0);
    }

    /// A vfork child has let go of its parent's memory.
    fn has_vforked(&mut self, parent: Tid) {
        if let Some(task) = self.tasks.get_mut(&parent)
            && let Some(Lent { thread, state }) = task.lent.take()
            && let Some(id) = task.space
            && let Some(space) = self.spaces.get(&id)
        {
            match space.give_back(thread, &state) {
                Ok(left) => self.leave_chunk(id, left),
                Err(error) => self.note_failure(parent, &error),
            }
        }
    }

    /// A task has replaced its program.
    fn executed(&mut self, tid: Tid) {
        // The kernel gives the leader's id to the thread that executes; the id that it had is gone.
        if let Ok(former) = ptrace::event_message(tid)
            && let Ok(former) = Tid::try_from(former)
            && former != tid
            && let Some(task) = self.tasks.remove(&former)
        {
            self.leave_space(&task);
        }
        let Some(mut task) = self.tasks.remove(&tid) else { return resume(tid, 0) };
        self.leave_space(&task);
        let old = task.process;
        let tsc = shared::tsc();
        self.drain.write_end(About::Process(old), move |writer| writer.exit(old, None, tsc));
        task.process = self.new_process(tid, Some(old), How::Exec);
        task.space = None;
        let prepared = if self.is_leaving {
            Err(Untraceable("the recording had ended".to_owned()))
        } else if sandbox::may_map(task.forbidden) {
            let agent = (!self.is_attached).then(|| self.armory.agent_path());
            exec::prepare(tid, agent, &mut self.linkers)
        } else {
            Err(Untraceable(SANDBOXED.to_owned()))
        };
        task.loading = match prepared {
            Ok(image) => Some(Box::new(image)),
            Err(reason) => {
                self.note_untraced(tid, reason);
                None
            }
        };
        self.tasks.insert(tid, task);
        self.go_on(tid, 0);
    }

    fn has_made_report(&self, tid: Tid) -> bool {
        let image = self.tasks.get(&tid).and_then(|task| task.loading.as_ref());
        image.is_some_and(|image| image.has_made_report(tid))
    }

    /// Lets a task go on: while its dynamic linker works, to its next system call.
    fn go_on(&self, tid: Tid, signal: i32) {
        if self.tasks.get(&tid).is_some_and(|task| task.loading.is_some()) {
            let _ = ptrace::resume_to_syscall(tid, signal);
        } else {
            resume(tid, signal);
        }
    }

    /// The dynamic linker has made the system call that we put there.
    fn loader_reports(&mut self, tid: Tid) {
        let image = self.tasks.get_mut(&tid).and_then(|task| task.loading.take());
        let Some(image) = image else { return resume(tid, 0) };
        let report = Memory::open(tid).and_then(|memory| Ok((image.reached(tid, &memory)?, memory)));
        match report {
            Ok((Report::Changing, _)) => {
                if let Some(task) = self.tasks.get_mut(&tid) {
                    task.loading = Some(image);
                }
                self.go_on(tid, 0);
            }
            // The agent was not preloaded.
            Ok((Report::Loaded, memory)) if self.is_attached || image.mode == Mode::Bits32 => {
                if let Err(reason) = self.arm_loaded(tid, &image, &memory) {
                    self.note_untraced(tid, reason);
                }
                resume(tid, 0);
            }
            Ok((Report::Loaded, memory)) => match self.arm(tid, &image, memory) {
                Ok(signals) => resume_with(tid, &signals),
                Err(reason) => {
                    self.note_untraced(tid, reason);
                    resume(tid, 0);
                }
            },
            Err(error) => {
                self.note_untraced(tid, error.into());
                resume(tid, 0);
            }
        }
    }

    fn arm(&mut self, tid: Tid, image: &NewImage, memory: Memory) -> Result<Vec<i32>, Untraceable> {
        let Some(task) = self.tasks.get(&tid) else { return Ok(Vec::new()) };
        let (process, pid_inside, forbidden) = (task.process, task.tid_inside, task.forbidden);
        let (mut space, signals) = self.armory.arm_image(tid, process, image, memory, self.options, self.drain)?;
        space.forbid(forbidden)?;
        let id = SpaceId(self.next_space);
        self.next_space += 1;
        if let Some(pool) = &space.pool {
            self.count_in(id, space.counters.as_ref());
            self.drain.tell(Message::Pool(id, Arc::clone(pool)));
            self.drain.tell(Message::Process { space: id, pid_inside, pid: tid, process });
        }
        self.spaces.insert(id, space);
        if let Some(task) = self.tasks.get_mut(&tid) {
            task.space = Some(id);
        }
        self.outcome.processes += 1;
        let more = self.add_helper(tid, id);
        Ok([signals, more].concat())
    }

    /// Stops the threads that wait until we have looked at their processes' new objects.
    fn see_to_requests(&mut self) {
        self.see_to_orders();
        while let Ok(id) = self.changed.try_recv() {
            let Some(space) = self.spaces.get(&id) else { continue };
            if self.is_leaving {
                space.answer();
                continue;
            }
            let requester = space.requester();
            let waiting = self.tasks.iter().find(|(_, task)| task.space == Some(id) && task.tid_inside == requester);
            if let Some((tid, _)) = waiting {
                let tid = *tid;
                self.requests.insert(tid, id);
                if ptrace::interrupt(tid).is_err() {
                    self.requests.remove(&tid);
                }
            } else {
                space.answer();
            }
        }
    }

    fn objects_changed(&mut self, tid: Tid) {
        let Some(id) = self.requests.remove(&tid) else { return resume(tid, 0) };
        let process = self.tasks.get(&tid).map(|task| task.process);
        let mut signals = Vec::new();
        if let Some(filter) = self.spaces.get(&id).and_then(Space::sandbox_request) {
            if let Err(error) = self.sandboxed(tid, id, filter) {
                self.note_failure(tid, &error);
            }
        } else if let (Some(process), Some(space)) = (process, self.spaces.get_mut(&id)) {
            match self.armory.arm_changes(tid, process, space, self.options, self.drain) {
                Ok(found) => signals = found,
                Err(reason) => self.note_untraced(tid, reason),
            }
            self.tell_guard(id, thread_group(tid).unwrap_or(tid));
        }
        if let Some(space) = self.spaces.get(&id) {
            space.answer();
        }
        resume_with(tid, &signals);
    }

    /// A thread is about to switch a sandbox on.
    fn sandboxed(&mut self, tid: Tid, id: SpaceId, filter: Addr) -> io::Result<()> {
        let Some(space) = self.spaces.get_mut(&id) else { return Ok(()) };
        space.prepare_for_sandbox(tid, filter)?;
        // One thread's filter is every thread's, as far as we make use of it.
        for task in self.tasks.values_mut().filter(|task| task.space == Some(id)) {
            task.forbidden |= space.forbidden;
        }
        Ok(())
    }

    fn ended(&mut self, tid: Tid, stop: Stop) {
        self.unclaimed.remove(&tid);
        self.expected.remove(&tid);
        self.zombies.remove(&tid);
        if tid == self.main {
            self.outcome.status = Some(stop);
        }
        let Some(task) = self.tasks.remove(&tid) else { return };
        let is_last = !self.tasks.values().any(|other| other.process == task.process);
        self.leave_space(&task);
        if is_last {
            let status = match stop {
                Stop::Exited(code) => Some(code << 8),
                Stop::Killed(signal) => Some(signal),
                _ => None,
            };
            let (process, tsc) = (task.process, shared::tsc());
            self.drain.write_end(About::Process(process), move |writer| writer.exit(process, status, tsc));
        }
    }

    fn leave_space(&mut self, task: &Task) {
        let Some(id) = task.space else { return };
        let Some(space) = self.spaces.get_mut(&id) else { return };
        space.tasks -= 1;
        if let (Some(room), Some(given)) = (&mut space.room, task.given) {
            room.give_back(given);
        }
        if space.tasks == 0 {
            self.spaces.remove(&id);
            if let Some(toggler) = &mut self.toggler {
                toggler.remove(id);
            }
            self.let_go(id);
        } else {
            if let Some(figures) = self.drain.figures() {
                figures.ended(id, Some(task.tid_inside));
            }
            self.drain.tell(Message::ThreadEnded { space: id, tid_inside: task.tid_inside });
        }
    }

    fn note_untraced(&mut self, tid: Tid, reason: Untraceable) {
        let executable = fs::read_link(format!("/proc/{tid}/exe")).unwrap_or_default();
        self.outcome.untraced.insert(executable.to_string_lossy().into_owned(), reason.0);
    }

    /// The task may be dying: then there is nothing to say. Else its process is traced in part.
    fn note_failure(&mut self, tid: Tid, error: &io::Error) {
        if error.raw_os_error() != Some(libc::ESRCH) {
            self.note_untraced(tid, Untraceable(error.to_string()));
        }
    }
}

/// Why a program is not traced, or a child.
const SANDBOXED: &str = "it is in a sandbox that forbids to map memory";

/// How often the tracer looks around, whatever happens.
const AT_LEAST: Duration = Duration::from_secs(1);

/// Lets a task go on. It may have been killed meanwhile; then its end is reported next.
fn resume(tid: Tid, signal: i32) {
    let _ = ptrace::resume(tid, signal);
}

/// The same, with signals that arrived while it worked for us.
fn resume_with(tid: Tid, signals: &[i32]) {
    for signal in signals.iter().skip(1) {
        spawn::kill(tid, *signal);
    }
    resume(tid, signals.first().copied().unwrap_or(0));
}

const _: () = assert!(RESET_BYTES < size_of::<Thread>());
