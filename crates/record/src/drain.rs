//! The thread that empties the pools and writes the trace.
//!
//! Owns [`Drain`], its thread's handle, and the trace's writer. The [`tracer`](crate::tracer) sends it [`Message`]s: pools and processes come and go,
//! and what the trace has to tell of them. Full chunks are emptied all the time; chunks in use are looked into a few times a second, so that little is
//! missing when the recorder itself is killed, and so that the time between two looks stays far below the range of a record's time. Each
//! thread's chunks are written in their order, which [`chunks`] knows. Invariant: a record reaches the trace once; what cannot reach it is counted.

mod chunks;
mod story;

use std::{
    collections::HashMap,
    fs, io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use trapline_abi::pool::{OnFull, state};
use trapline_engine::Mode;
use trapline_trace::{Batch, Load, Losses, Position, Stream, Unload, Writer};

pub(crate) use self::story::About;
use self::{
    chunks::{Begun, Look, Space, Thread, chunks_to_write, record_in},
    story::Story,
};
use crate::{
    counters::Counters,
    figures::Figures,
    overhead::{Gauge, Overhead},
    pool::{CHUNK_RECORDS, Pool, Taken},
    sys::{Tid, shared},
};

/// Names the memory of a process; a vfork child uses its parent's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct SpaceId(pub(crate) u32);

/// What writes something into the trace.
type ForTheTrace = Box<dyn Fn(&mut Writer) -> Result<(), trapline_trace::Error> + Send>;

/// What the drain is told, in order.
pub(crate) enum Message {
    /// A pool to be emptied.
    Pool(SpaceId, Arc<Pool>),
    /// A process uses the pool of this space; its number in its own namespace, and in the trace.
    Process {
        /// Whose pool.
        space: SpaceId,
        /// As it sees itself.
        pid_inside: u32,
        /// As the recorder sees it.
        pid: Tid,
        /// In the trace.
        process: u32,
    },
    /// A thread has ended.
    ThreadEnded {
        /// Whose pool.
        space: SpaceId,
        /// As it saw itself.
        tid_inside: u32,
    },
    /// A thread will not go on with this chunk: what lies behind its last record was never reserved.
    ChunkEnded(SpaceId, Taken),
    /// Nobody uses the pool any more.
    SpaceEnded(SpaceId),
    /// Something for the trace, and whether what it is about is over with it.
    Write(About, bool, ForTheTrace),
    /// A trace of these sites begins, while figures are shown.
    Begin(Box<Writer>, Vec<u32>),
    /// It is complete.
    End,
}

/// What the tracer hears from the drain: this space's objects have changed, and a thread of it waits.
pub(crate) type Changed = SpaceId;

/// How it went.
#[derive(Debug)]
pub(crate) struct Finished {
    /// What is not in the trace.
    pub(crate) losses: Losses,
    /// What it cost, if there was enough to tell by.
    pub(crate) overhead: Option<Overhead>,
    /// Why the trace breaks off.
    pub(crate) failure: Option<trapline_trace::Error>,
}

/// The thread.
pub(crate) struct Drain {
    messages: Sender<Message>,
    thread: JoinHandle<Finished>,
    figures: Option<Figures>,
}

/// Where what it hears goes.
pub(crate) enum Sink {
    /// Into a trace.
    Trace(Box<Writer>),
    /// Into figures. There is a trace only where it is asked for.
    Figures(Figures),
}

impl Drain {
    /// Starts it. `changed` is called when a target asks for attention.
    pub(crate) fn start(
        sink: Sink,
        on_full: OnFull,
        totals: Arc<AtomicU64>,
        changed: impl Fn(Changed) + Send + 'static,
    ) -> io::Result<Self> {
        let (messages, inbox) = mpsc::channel();
        let mut work = Work::new(sink, on_full, totals, inbox);
        let figures = work.figures.clone();
        let thread = std::thread::Builder::new().name("drain".to_owned()).spawn(move || {
            work.run(&changed);
            work.finish()
        })?;
        Ok(Self { messages, thread, figures })
    }

    /// Where calls are counted, if they are, and not recorded.
    pub(crate) fn figures(&self) -> Option<&Figures> {
        self.figures.as_ref()
    }

    /// Tells it something. What is told after it broke off is lost, and [`finish`](Self::finish) says why.
    pub(crate) fn tell(&self, message: Message) {
        let _ = self.messages.send(message);
    }

    /// Something for the trace.
    pub(crate) fn write(
        &self,
        about: About,
        write: impl Fn(&mut Writer) -> Result<(), trapline_trace::Error> + Send + 'static,
    ) {
        self.tell(Message::Write(about, false, Box::new(write)));
    }

    /// The same, of what is over.
    pub(crate) fn write_end(
        &self,
        about: About,
        write: impl Fn(&mut Writer) -> Result<(), trapline_trace::Error> + Send + 'static,
    ) {
        self.tell(Message::Write(about, true, Box::new(write)));
    }

    /// For the trace: a module is mapped in a process.
    pub(crate) fn load(&self, load: Load) {
        let Load { process, module, bias, .. } = load;
        self.write(About::Mapping { process, module, bias }, move |writer| writer.load(&load));
    }

    /// The same: it is mapped no more.
    pub(crate) fn unload(&self, unload: Unload) {
        let Unload { process, module, bias, .. } = unload;
        self.write_end(About::Mapping { process, module, bias }, move |writer| writer.unload(&unload));
    }

    /// What a process of this width is to count in, if calls are counted, and it has room for that.
    pub(crate) fn counters_for(&self, tid: Tid, mode: Mode) -> io::Result<Option<Arc<Counters>>> {
        if self.figures.is_some() { Counters::of(tid, mode) } else { Ok(None) }
    }

    /// Waits until all that was told is done.
    pub(crate) fn finish(self) -> Finished {
        drop(self.messages);
        match self.thread.join() {
            Ok(finished) => finished,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

struct Work {
    writer: Option<Box<Writer>>,
    figures: Option<Figures>,
    /// While there are figures.
    story: Story,
    inbox: Receiver<Message>,
    totals: Arc<AtomicU64>,
    only_at_the_end: bool,
    spaces: HashMap<SpaceId, Space>,
    next_stream: u32,
    losses: Losses,
    records: Vec<u64>,
    /// What of them is for a trace beside figures.
    beside: Vec<u64>,
    gauge: Gauge,
    failure: Option<trapline_trace::Error>,
    clock: Clock,
}

/// When the drain began, by both clocks.
#[derive(Clone, Copy, Debug)]
struct Clock {
    tsc: u64,
    monotonic_ns: u64,
}

impl Clock {
    /// So many ticks in nanoseconds.
    fn ns(self, ticks: u64) -> u64 {
        let [passed_tsc, passed_ns] =
            [shared::tsc() - self.tsc, shared::monotonic_ns() - self.monotonic_ns].map(u128::from);
        u64::try_from(u128::from(ticks) * passed_ns / passed_tsc.max(1)).unwrap_or(u64::MAX)
    }
}

/// Shortest and longest sleep between two looks.
const SLEEP: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(4));

/// How often chunks in use are looked into.
const FLUSH_EVERY: Duration = Duration::from_millis(200);

/// How long an interrupted context may take to complete its record; whoever left it by longjmp never does.
const HOLE_PATIENCE: Duration = Duration::from_millis(500);

impl Work {
    fn new(sink: Sink, on_full: OnFull, totals: Arc<AtomicU64>, inbox: Receiver<Message>) -> Self {
        let (writer, figures) = match sink {
            Sink::Trace(writer) => (Some(writer), None),
            Sink::Figures(figures) => (None, Some(figures)),
        };
        Self {
            writer,
            figures,
            story: Story::default(),
            inbox,
            totals,
            only_at_the_end: on_full == OnFull::Overwrite,
            spaces: HashMap::new(),
            next_stream: 0,
            losses: Losses::default(),
            records: Vec::with_capacity(CHUNK_RECORDS),
            beside: Vec::new(),
            gauge: Gauge::new(),
            failure: None,
            clock: Clock { tsc: shared::tsc(), monotonic_ns: shared::monotonic_ns() },
        }
    }

    fn run(&mut self, changed: &dyn Fn(Changed)) {
        let mut sleep = SLEEP.0;
        let mut last_flush = Instant::now();
        loop {
            match self.inbox.recv_timeout(sleep) {
                Ok(message) => {
                    self.take(message, changed);
                    while let Ok(message) = self.inbox.try_recv() {
                        self.take(message, changed);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let is_flush = last_flush.elapsed() >= FLUSH_EVERY;
            if is_flush {
                last_flush = Instant::now();
            }
            let before = self.totals.load(Ordering::Relaxed);
            self.look_at_all(is_flush, changed);
            let is_busy = self.totals.load(Ordering::Relaxed) != before;
            sleep = if is_busy { SLEEP.0 } else { (sleep * 2).min(SLEEP.1) };
        }
        let spaces: Vec<SpaceId> = self.spaces.keys().copied().collect();
        for space in spaces {
            self.end_space(space);
        }
    }

    fn finish(mut self) -> Finished {
        let losses = self.writer.as_ref().map_or_else(|| self.losses.clone(), |writer| writer.with_own(&self.losses));
        let records = self.totals.load(Ordering::Relaxed);
        let overhead = self.gauge.overhead(records, |ticks| self.clock.ns(ticks));
        if let (Some(overhead), Some(writer)) = (overhead, &mut self.writer) {
            writer.record_cost(overhead.record_ps);
        }
        self.end_trace();
        Finished { losses, overhead, failure: self.failure }
    }

    /// The trace, if there is one, gets nothing more.
    fn end_trace(&mut self) {
        let losses = self.losses.clone();
        self.write(&|writer| writer.calibration(&[crate::clock_point()]));
        self.write(&|writer| writer.losses(&losses));
        // A trace that lacks something has no end.
        if let Some(writer) = self.writer.take()
            && self.failure.is_none()
        {
            self.failure = writer.finish().err();
        }
    }

    /// Writes something, if there is a trace.
    fn write(&mut self, write: &dyn Fn(&mut Writer) -> Result<(), trapline_trace::Error>) {
        if let (Some(writer), None) = (&mut self.writer, &self.failure) {
            let result = write(writer);
            self.keep(result);
        }
    }

    /// The first failure is the one that is reported; targets go on untraced, unless the trace is beside figures.
    fn keep(&mut self, result: Result<(), trapline_trace::Error>) {
        if let Err(error) = result
            && self.failure.is_none()
        {
            self.failure = Some(error);
            if self.figures.is_none() {
                for space in self.spaces.values() {
                    space.pool.close();
                }
            }
        }
    }

    fn take(&mut self, message: Message, changed: &dyn Fn(Changed)) {
        match message {
            Message::Pool(id, pool) => {
                if self.failure.is_some() && self.figures.is_none() {
                    pool.close();
                }
                self.spaces.insert(id, Space::new(pool));
            }
            Message::Process { space, pid_inside, pid, process } => {
                if let Some(space) = self.spaces.get_mut(&space) {
                    space.processes.insert(pid_inside, (pid, process));
                    space.threads.retain(|(of, _), _| *of != pid_inside);
                }
            }
            Message::ThreadEnded { space, tid_inside } => {
                if !self.only_at_the_end {
                    self.look(space, Look::Last(Some(tid_inside)));
                }
            }
            Message::ChunkEnded(space, taken) => {
                if let Some(space) = self.spaces.get_mut(&space)
                    && space.pool.end_chunk(taken)
                {
                    let pool = Arc::clone(&space.pool);
                    space.ended_early.retain(|other| pool.is(*other));
                    space.ended_early.push(taken);
                    space.doorbell = space.doorbell.wrapping_sub(1);
                }
            }
            Message::SpaceEnded(space) => self.end_space(space),
            Message::Write(about, is_end, write) => {
                self.write(&write);
                if is_end {
                    self.story.end(about);
                } else if self.figures.is_some() {
                    self.story.add(about, write);
                }
            }
            Message::Begin(writer, sites) => {
                // What is left of the last one belongs to nobody.
                self.look_at_all(true, changed);
                self.failure = None;
                if let Some(figures) = &self.figures {
                    figures.select(&sites);
                }
                for thread in self.spaces.values_mut().flat_map(|space| space.threads.values_mut()) {
                    thread.is_told = false;
                    if let Some(begun) = &mut thread.begun {
                        begun.depth = 0;
                    }
                }
                self.writer = Some(writer);
                let story = std::mem::take(&mut self.story);
                for write in story.parts() {
                    self.write(write);
                }
                self.story = story;
            }
            Message::End => {
                self.look_at_all(true, changed);
                if let Some(figures) = &self.figures {
                    figures.select(&[]);
                }
                let written = self.writer.as_ref().map(|writer| (writer.calls(), writer.path().display().to_string()));
                self.end_trace();
                if let (Some(figures), Some((calls, path))) = (&self.figures, written) {
                    figures.tell(match self.failure.take() {
                        Some(failure) => failure.to_string(),
                        None => format!("{calls} calls are in {path}; read it by `trapline report -i {path}`"),
                    });
                }
            }
        }
    }

    fn look_at_all(&mut self, is_flush: bool, changed: &dyn Fn(Changed)) {
        let ids: Vec<SpaceId> = self.spaces.keys().copied().collect();
        for id in ids {
            let Some(space) = self.spaces.get_mut(&id) else { continue };
            let header = space.pool.header();
            header.heartbeat.fetch_add(1, Ordering::Relaxed);
            header.now_tsc.store(shared::tsc(), Ordering::Relaxed);
            let requests = header.requests.load(Ordering::Acquire);
            if requests != space.answered {
                space.answered = requests;
                changed(id);
            }
            let doorbell = header.doorbell.load(Ordering::Acquire);
            let has_rung = doorbell != space.doorbell;
            space.doorbell = doorbell;
            if (is_flush || has_rung) && !self.only_at_the_end {
                let began_tsc = shared::tsc();
                self.look(id, if is_flush { Look::Everything } else { Look::Full });
                if let (Some(figures), true) = (&self.figures, is_flush) {
                    figures.has_looked(id, began_tsc);
                }
            }
        }
    }

    fn end_space(&mut self, id: SpaceId) {
        self.look(id, Look::Last(None));
        if let Some(figures) = &self.figures {
            figures.end_all_folded(id);
        }
        if let Some(space) = self.spaces.remove(&id) {
            let header = space.pool.header();
            self.losses.full += header.lost_full.load(Ordering::Relaxed);
            self.losses.overwritten += header.lost_overwritten.load(Ordering::Relaxed);
            self.losses.unhooked += header.unhooked.load(Ordering::Relaxed);
            self.losses.waited_ns += self.clock.ns(header.waited_tsc.load(Ordering::Relaxed));
        }
    }

    /// Writes what a pool has, each thread's chunks in their order.
    fn look(&mut self, id: SpaceId, look: Look) {
        let Some(mut space) = self.spaces.remove(&id) else { return };
        let chunks = chunks_to_write(&space, look);
        let mut held = None;
        for (at, (key, sequence, index)) in chunks.iter().copied().enumerate() {
            if held == Some(key) {
                continue;
            }
            let is_last = match look {
                Look::Last(Some(tid)) => key.1 == tid,
                Look::Last(None) => true,
                _ => false,
            };
            let next = space.threads.get(&key).map_or(0, |thread| thread.next_sequence);
            // A thread begins its next chunk before the last one is full, if a signal handler comes in between: that is in nobody's list of full ones.
            let is_early = sequence != next && !is_last;
            // A process is told of before it can write; that may have come since the messages were read.
            let is_known = is_last || space.knows(key.0);
            // Who has begun another one writes nothing more here.
            let is_left = chunks.get(at + 1).is_some_and(|(other, _, _)| *other == key);
            if is_early || !is_known || !self.write_chunk((id, &mut space), key, index, is_last, is_left) {
                held = Some(key);
                space.doorbell = space.doorbell.wrapping_sub(1);
            }
        }
        if let Look::Last(Some(tid)) = look {
            for (_, thread) in space.threads.extract_if(|(_, of), _| *of == tid) {
                if let Some(figures) = &self.figures {
                    figures.end_folded(id, thread.stream);
                }
            }
        }
        if let Look::Last(ended) = look {
            space.free_unused(ended);
        }
        space.free_kept_back(look);
        self.spaces.insert(id, space);
    }

    /// Writes what is new in a chunk. Returns whether the thread's next one may follow: not if this one has a hole that may still be filled.
    fn write_chunk(
        &mut self,
        (id, space): (SpaceId, &mut Space),
        key: (u32, u32),
        index: usize,
        is_last: bool,
        is_left: bool,
    ) -> bool {
        let pool = Arc::clone(&space.pool);
        let chunk = pool.chunk(index);
        let sequence = chunk.sequence.load(Ordering::Relaxed);
        let next_stream = &mut self.next_stream;
        let thread = space.threads.entry(key).or_insert_with(|| {
            *next_stream += 1;
            Thread { stream: *next_stream - 1, next_sequence: sequence, is_told: false, begun: None }
        });
        if !thread.is_told && self.writer.is_some() {
            let stream = thread.stream;
            thread.is_told = true;
            let (pid, process) = space.processes.get(&key.0).copied().unwrap_or_default();
            let name = fs::read_to_string(format!("/proc/{pid}/task/{}/comm", key.1)).unwrap_or_default();
            let started_tsc = chunk.opened_tsc.load(Ordering::Relaxed);
            let name = name.trim_end().to_owned();
            let stream = Stream { id: stream, process, tid: key.1, name, started_tsc };
            self.write(&|writer| writer.stream(&stream));
        }
        let Some(thread) = space.threads.get_mut(&key) else { return true };
        if thread.begun.is_none() || thread.next_sequence != sequence {
            thread.next_sequence = sequence;
            thread.begun = None;
        }
        let mut begun = thread.begun.unwrap_or_else(|| Begun {
            records: 0,
            seen_at_tsc: chunk.opened_tsc.load(Ordering::Relaxed),
            depth: chunk.depth.load(Ordering::Relaxed),
            lost_before: chunk.lost_before.load(Ordering::Relaxed),
            hole_since: None,
        });
        let lost_before = begun.lost_before;
        let is_full = is_left || state::of(chunk.state.load(Ordering::Acquire)) == state::FULL;
        let is_last = is_last || is_full && space.ended_early.contains(&pool.taken(index));
        let seen_at_tsc = shared::tsc();
        self.records.clear();
        let words = pool.records(index)[begun.records..].iter();
        self.records.extend(words.map(record_in).take_while(|word| *word != 0));
        let mut has_hole = false;
        // The chunk of a thread that has not given it up is not ours, however much is in it.
        let is_done = if begun.records + self.records.len() == CHUNK_RECORDS {
            is_full || is_last
        } else if is_last {
            let rest = pool.records(index)[begun.records + self.records.len()..].iter();
            self.records.extend(rest.map(record_in));
            // What nobody had reserved is no loss: only holes before the last record are.
            let used = self.records.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
            self.records.truncate(used);
            true
        } else if is_full {
            let hole_since = *begun.hole_since.get_or_insert_with(Instant::now);
            if hole_since.elapsed() < HOLE_PATIENCE {
                thread.begun = Some(begun);
                return false;
            }
            let rest = pool.records(index)[begun.records + self.records.len()..].iter();
            self.records.extend(rest.map(record_in));
            has_hole = true;
            true
        } else {
            false
        };
        if !self.records.is_empty() || lost_before != 0 {
            let (stream, tsc) = (thread.stream, begun.seen_at_tsc);
            let start = Position { tsc, depth: chunk.depth.load(Ordering::Relaxed) };
            let batch = Batch { stream, start, lost_before, records: &self.records };
            let figures = self.figures.as_ref();
            let (depth, records) = match figures.and_then(|figures| figures.fold(id, &batch, &mut self.beside)) {
                Some(depth) => (depth, &self.beside),
                None => (begun.depth, &self.records),
            };
            let write = |writer: &mut Box<Writer>| writer.events(stream, tsc, depth, lost_before, records);
            let result = self.writer.as_mut().filter(|_| self.failure.is_none()).map(write).transpose();
            begun.lost_before = 0;
            self.gauge.look(&self.records);
            self.totals.fetch_add(self.records.len() as u64, Ordering::Relaxed);
            begun.records += self.records.len();
            let result = result.map(|end| begun.depth = end.map_or(begun.depth, |end| end.depth));
            self.keep(result);
        }
        begun.seen_at_tsc = seen_at_tsc;
        let Some(thread) = space.threads.get_mut(&key) else { return true };
        if is_done {
            thread.begun = None;
            thread.next_sequence = sequence.wrapping_add(1);
            if has_hole {
                space.kept_back.push_back((index, key.1));
            } else {
                pool.free(index);
            }
        } else {
            thread.begun = Some(begun);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use trapline_abi::record::{Event, encode};

    use super::*;

    /// The drain may look at a pool between two messages: what it finds there of a process that it has not heard of has to wait.
    #[test]
    fn records_that_are_there_before_their_process_is_known_are_taken_once() {
        const CALLS: usize = 100;
        let (figures, id) = (Figures::default(), SpaceId(0));
        let pool = Arc::new(Pool::new(4, OnFull::Block).unwrap());
        let chunk = pool.chunk(0);
        chunk.pid.store(1, Ordering::Relaxed);
        chunk.tid.store(7, Ordering::Relaxed);
        for word in &pool.records(0)[..CALLS] {
            word.store(encode(Event::Point { site: 3 }, shared::tsc()), Ordering::Relaxed);
        }
        chunk.state.store(state::with(state::taken_by(0, 7), state::ACTIVE), Ordering::Release);
        figures.add_folded(id);
        let mut work = Work::new(Sink::Figures(figures.clone()), OnFull::Block, Arc::default(), mpsc::channel().1);
        work.take(Message::Pool(id, Arc::clone(&pool)), &|_| ());
        work.look_at_all(true, &|_| ());
        assert_eq!(figures.look().figures, []);
        work.take(Message::Process { space: id, pid_inside: 1, pid: 1, process: 5 }, &|_| ());
        work.take(Message::SpaceEnded(id), &|_| ());
        let calls: Vec<u64> = figures.look().figures.iter().map(|figure| figure.calls).collect();
        assert_eq!(calls, [CALLS as u64]);
    }
}
