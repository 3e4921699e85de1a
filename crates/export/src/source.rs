//! Calls, one thread after the other or in the order of time: what every format is made of.
//!
//! Owns [`drive`], which goes through a trace and tells an [`Output`] of its threads and calls, and the words in which it does: [`Trace`], [`Thread`],
//! [`Function`], [`Call`]. Functions are numbered in the order in which they are met. Invariant: each call is told as one enter and one leave, or as one point; enters
//! and leaves of a thread are nested, and their times never go back: contexts that interrupt each other may have times a little out of order, and
//! the latest one counts.

use std::{io, path::Path};

use trapline_trace::{Catalog, Clock, Damage, Ending, Frame, Frames, Order, Process, Sink, SiteIndex, Timeline};

use crate::error::Failure;

/// What an export held.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Everything but the events.
    pub catalog: Catalog,
    /// What is wrong with the trace.
    pub damage: Damage,
    /// Calls that were written.
    pub calls: u64,
}

/// Takes calls, and writes them in one format.
pub(crate) trait Output {
    /// How events have to come.
    const ORDER: Order = Order::Stream;

    /// Before everything else.
    fn begin(&mut self, _: &Trace) -> io::Result<()> {
        Ok(())
    }

    /// A thread's first event follows.
    fn thread(&mut self, _: &Trace, _: &Thread) -> io::Result<()> {
        Ok(())
    }

    /// A function was called.
    fn enter(&mut self, _: &Trace, _: &Thread, _: Enter) -> io::Result<()> {
        Ok(())
    }

    /// The innermost call has ended.
    fn leave(&mut self, _: &Trace, _: &Thread, _: Call) -> io::Result<()>;

    /// A function was called whose return is not seen.
    fn point(&mut self, _: &Trace, _: &Thread, _: Enter) -> io::Result<()>;

    /// The thread has no more events. All of its calls have ended.
    fn thread_end(&mut self, _: &Trace, _: &Thread) -> io::Result<()> {
        Ok(())
    }

    /// After everything else: all has to be written, down to the file.
    fn end(self, _: &Trace) -> io::Result<()>;
}

/// A call that begins. Times are nanoseconds from the start of the trace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Enter {
    /// The function's number.
    pub(crate) function: u32,
    /// How many calls are open that are known.
    pub(crate) depth: usize,
    pub(crate) start_ns: u64,
}

/// A call that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    /// The function's number.
    pub(crate) function: u32,
    /// How many calls are open without this one.
    pub(crate) depth: usize,
    pub(crate) start_ns: u64,
    pub(crate) end_ns: u64,
    /// Without the calls that it made.
    pub(crate) self_ns: u64,
    pub(crate) ending: Ending,
}

/// How a call ended, in words. The last one: its return is not seen.
pub(crate) const ENDINGS: [&str; 6] = ["returned", "unwound", "jumped", "open", "unknown", "point"];

/// Which of [`ENDINGS`] this is; `None` for a call whose return is not seen.
pub(crate) fn place_of(ending: Option<Ending>) -> usize {
    match ending {
        Some(Ending::Returned) => 0,
        Some(Ending::Unwound) => 1,
        Some(Ending::Jumped) => 2,
        Some(Ending::Open) => 3,
        Some(Ending::Unknown) => 4,
        None => 5,
    }
}

/// A function, as formats show it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// The recorder's number for it.
    pub site: u32,
    /// As people write it.
    pub name: String,
    /// Of its module.
    pub path: String,
    /// In the file.
    pub address: u64,
}

impl Function {
    /// The module's file without its directories.
    pub(crate) fn module(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }
}

/// What is known of the trace so far.
#[derive(Debug)]
pub(crate) struct Trace {
    pub(crate) catalog: Catalog,
    pub(crate) clock: Clock,
    /// By their numbers.
    pub(crate) functions: Vec<Function>,
    number_of: SiteIndex,
}

impl Trace {
    pub(crate) fn function(&self, number: u32) -> &Function {
        &self.functions[number as usize]
    }

    #[inline]
    fn number(&mut self, site: u32) -> u32 {
        self.number_of.get(site).unwrap_or_else(|| self.new_number(site))
    }

    #[cold]
    fn new_number(&mut self, site: u32) -> u32 {
        let found = self.catalog.function(site);
        let address = found.function.map_or(0, |function| function.address);
        self.functions.push(Function { site, name: found.name(), path: found.module_path().to_owned(), address });
        self.number_of.add(site)
    }
}

/// A thread of a process that runs one program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Thread {
    /// The recorder's number for its events, unique in the trace.
    pub stream: u32,
    /// The system's number for it.
    pub tid: u32,
    /// And for its process.
    pub pid: u32,
    /// Its own name, or its process's.
    pub name: String,
    /// What is known of the process.
    pub process: Process,
}

impl Thread {
    /// The thread of a stream; what is not known of it is empty.
    pub fn new(catalog: &Catalog, stream: u32) -> Self {
        let known = catalog.streams.get(&stream).cloned().unwrap_or_default();
        let process = catalog.processes.get(&known.process).cloned().unwrap_or_default();
        // Traces that name no process have one all the same, for formats that want one.
        let pid = if process.pid == 0 { known.tid } else { process.pid };
        let name = if known.name.is_empty() { program(&process).to_owned() } else { known.name };
        Self { stream, tid: known.tid, pid, name, process }
    }

    /// The program's file without its directories.
    pub fn program(&self) -> &str {
        match program(&self.process) {
            "" => &self.name,
            program => program,
        }
    }
}

fn program(process: &Process) -> &str {
    process.executable.rsplit('/').next().unwrap_or_default()
}

/// Goes through a trace.
pub(crate) fn drive<O: Output>(
    input: &Path,
    output: O,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary, Failure> {
    let mut drive = Drive::open(input, output, |_, _| true)?;
    while drive.step()? {
        progress(drive.done, drive.total);
    }
    drive.end()
}

/// A way through a trace.
#[derive(Debug)]
pub(crate) struct Drive<O> {
    pub(crate) output: O,
    pub(crate) trace: Trace,
    timeline: Timeline,
    threads: Threads,
    damage: Damage,
    /// Events that are done, and all of them.
    done: u64,
    total: u64,
    calls: u64,
}

impl<O: Output> Drive<O> {
    /// Opens a trace, of which the streams are told that `is_wanted`.
    pub(crate) fn open(
        input: &Path,
        mut output: O,
        is_wanted: impl Fn(&Catalog, u32) -> bool,
    ) -> Result<Self, Failure> {
        let (timeline, catalog, damage) = Timeline::open(input, O::ORDER, is_wanted).map_err(Failure::Trace)?;
        let trace = Trace { clock: catalog.clock(), catalog, functions: Vec::new(), number_of: SiteIndex::default() };
        output.begin(&trace).map_err(Failure::Output)?;
        let (threads, total) = (Threads::default(), timeline.records());
        Ok(Self { output, trace, timeline, threads, damage, done: 0, total, calls: 0 })
    }

    /// Tells some events of one thread. False if there are no more.
    pub(crate) fn step(&mut self) -> Result<bool, Failure> {
        let Some(part) = self.timeline.next_part().map_err(Failure::Trace)? else { return Ok(false) };
        let trace = &mut self.trace;
        let mut state = self.threads.take(part.stream).unwrap_or_else(|| State::new(&trace.catalog, part.stream));
        let mut teller = Teller { output: &mut self.output, trace, state: &mut state.told, calls: &mut self.calls };
        teller.tell(|output, trace, thread| if thread.is_new { output.thread(trace, &thread.thread) } else { Ok(()) });
        teller.state.is_new = false;
        if let Some(chunk) = part.starts {
            state.frames.start(chunk, &mut teller);
        }
        state.frames.events(part.events, &mut teller);
        self.done += part.events.len() as u64;
        if part.is_last {
            state.frames.finish(&mut teller);
            teller.tell(|output, trace, thread| output.thread_end(trace, &thread.thread));
        }
        if let Some(failure) = state.told.failure.take() {
            return Err(Failure::Output(failure));
        }
        if !part.is_last {
            self.threads.put(state);
        }
        Ok(true)
    }

    /// Chunks so far whose checksums are right, and whose events make no sense.
    pub(crate) fn senseless_chunks(&self) -> u64 {
        self.damage.senseless_chunks + self.timeline.senseless_chunks()
    }

    fn end(mut self) -> Result<Summary, Failure> {
        self.damage.senseless_chunks = self.senseless_chunks();
        self.output.end(&self.trace).map_err(Failure::Output)?;
        Ok(Summary { catalog: self.trace.catalog, damage: self.damage, calls: self.calls })
    }
}

/// Threads between two of their parts. The one that comes next is mostly the one that came last.
#[derive(Debug, Default)]
struct Threads {
    waiting: std::collections::HashMap<u32, Box<State>>,
    last: Option<Box<State>>,
}

impl Threads {
    fn take(&mut self, stream: u32) -> Option<Box<State>> {
        match self.last.take() {
            Some(last) if last.told.thread.stream == stream => Some(last),
            other => {
                self.waiting.extend(other.map(|state| (state.told.thread.stream, state)));
                self.waiting.remove(&stream)
            }
        }
    }

    fn put(&mut self, state: Box<State>) {
        self.last = Some(state);
    }
}

/// What is kept of a thread between its parts.
#[derive(Debug)]
struct State {
    frames: Frames<Open>,
    told: Told,
}

/// What was told of it.
#[derive(Debug)]
struct Told {
    thread: Thread,
    is_new: bool,
    latest_ns: u64,
    /// Of calls that have ended, by the depth of their caller.
    callees_ns: Vec<u64>,
    /// The first thing that went wrong.
    failure: Option<io::Error>,
}

/// What is kept with a frame.
#[derive(Clone, Copy, Debug)]
struct Open {
    function: u32,
    start_ns: u64,
}

impl State {
    fn new(catalog: &Catalog, stream: u32) -> Box<Self> {
        let thread = Thread::new(catalog, stream);
        let told = Told { thread, is_new: true, latest_ns: 0, callees_ns: Vec::new(), failure: None };
        Box::new(Self { frames: Frames::default(), told })
    }
}

/// Tells an output what happens to the frames of one thread.
struct Teller<'a, O> {
    output: &'a mut O,
    trace: &'a mut Trace,
    state: &'a mut Told,
    calls: &'a mut u64,
}

impl<O: Output> Teller<'_, O> {
    /// Nothing more is told after a failure.
    #[inline]
    fn tell(&mut self, what: impl FnOnce(&mut O, &Trace, &Told) -> io::Result<()>) {
        if self.state.failure.is_none() {
            self.state.failure = what(self.output, self.trace, self.state).err();
        }
    }

    #[inline]
    fn time(&mut self, tsc: u64) -> u64 {
        self.state.latest_ns = self.state.latest_ns.max(self.trace.clock.since_start_ns(tsc));
        self.state.latest_ns
    }
}

impl<O: Output> Sink for Teller<'_, O> {
    type Data = Open;

    #[inline]
    fn open(&mut self, depth: usize, site: u32, tsc: u64) -> Open {
        let (function, start_ns) = (self.trace.number(site), self.time(tsc));
        self.state.callees_ns.truncate(depth);
        self.state.callees_ns.push(0);
        *self.calls += 1;
        self.tell(|output, trace, told| output.enter(trace, &told.thread, Enter { function, depth, start_ns }));
        Open { function, start_ns }
    }

    #[inline]
    fn close(&mut self, depth: usize, frame: Frame<Open>, tsc: u64, ending: Ending) {
        let Open { function, start_ns } = frame.data;
        let end_ns = self.time(tsc);
        let callees_ns = self.state.callees_ns.pop().unwrap_or_default();
        if let Some(caller) = self.state.callees_ns.last_mut() {
            *caller += end_ns - start_ns;
        }
        let self_ns = (end_ns - start_ns).saturating_sub(callees_ns);
        let call = Call { function, depth, start_ns, end_ns, self_ns, ending };
        self.tell(|output, trace, told| output.leave(trace, &told.thread, call));
    }

    fn point(&mut self, depth: usize, site: u32, tsc: u64) {
        let (function, start_ns) = (self.trace.number(site), self.time(tsc));
        *self.calls += 1;
        self.tell(|output, trace, told| output.point(trace, &told.thread, Enter { function, depth, start_ns }));
    }
}
