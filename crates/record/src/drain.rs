//! The thread that empties the pools and writes the trace.
//!
//! Owns [`Drain`], its thread's handle, and the trace's writer. The [`tracer`](crate::tracer) sends it [`Message`]s: pools and processes come and go,
//! and what the trace has to tell of them. Full chunks are emptied all the time; chunks in use are looked into a few times a second, so that little is
//! missing when the recorder itself is killed, and so that the time between two looks stays far below the range of a record's time. Each
//! thread's chunks are written in their order. Invariant: a record reaches the trace once; what cannot reach it is counted.

use std::{
    collections::{HashMap, VecDeque},
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use trapline_abi::{
    pool::{OnFull, state},
    record::is_written,
};
use trapline_trace::{Batch, Losses, Position, Stream, Writer};

use crate::{
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
    /// Something for the trace.
    Write(ForTheTrace),
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
    ) -> std::io::Result<Self> {
        let (messages, inbox) = mpsc::channel();
        let (writer, figures) = match sink {
            Sink::Trace(writer) => (Some(writer), None),
            Sink::Figures(figures) => (None, Some(figures)),
        };
        let mut work = Work {
            writer,
            figures: figures.clone(),
            story: Vec::new(),
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
        };
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
    pub(crate) fn write(&self, write: impl Fn(&mut Writer) -> Result<(), trapline_trace::Error> + Send + 'static) {
        self.tell(Message::Write(Box::new(write)));
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

/// Of one thread, how far its chunks are written.
#[derive(Debug)]
struct Thread {
    stream: u32,
    next_sequence: u32,
    /// Whether the trace knows it.
    is_told: bool,
    /// How much of the chunk `next_sequence` is written already.
    begun: Option<Begun>,
}

#[derive(Clone, Copy, Debug)]
struct Begun {
    records: usize,
    /// Every record behind was written after this.
    seen_at_tsc: u64,
    depth: u32,
    /// When a word that is not written yet was met in a full chunk.
    hole_since: Option<Instant>,
}

#[derive(Debug)]
struct Space {
    pool: Arc<Pool>,
    doorbell: u32,
    answered: u32,
    processes: HashMap<u32, (Tid, u32)>,
    threads: HashMap<(u32, u32), Thread>,
    /// Chunks that became full before their threads had filled them.
    ended_early: Vec<Taken>,
    /// Chunks that are written, all but a hole, and whose they were: who was interrupted there may still come back and fill it, and would do that in
    /// somebody else's chunk if it were free.
    kept_back: VecDeque<(usize, u32)>,
}

struct Work {
    writer: Option<Box<Writer>>,
    figures: Option<Figures>,
    /// What a trace that begins later has to be told first.
    story: Vec<ForTheTrace>,
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

/// Which chunks a look at a pool is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Look {
    /// Full ones.
    Full,
    /// Those in use, too, as far as they are written.
    Everything,
    /// Nobody writes any more: all there is, of this thread or of every one.
    Last(Option<u32>),
}

/// Shortest and longest sleep between two looks.
const SLEEP: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(4));

/// How often chunks in use are looked into.
const FLUSH_EVERY: Duration = Duration::from_millis(200);

/// How long an interrupted context may take to complete its record; whoever left it by longjmp never does.
const HOLE_PATIENCE: Duration = Duration::from_millis(500);

impl Work {
    fn run(&mut self, changed: &dyn Fn(Changed)) {
        let mut sleep = SLEEP.0;
        let mut last_flush = Instant::now();
        loop {
            match self.inbox.recv_timeout(sleep) {
                Ok(message) => {
                    self.take(message);
                    while let Ok(message) = self.inbox.try_recv() {
                        self.take(message);
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
        if let Some(writer) = &mut self.writer {
            let result = write(writer);
            self.keep(result);
        }
    }

    /// The first failure is the one that is reported; targets go on untraced.
    fn keep(&mut self, result: Result<(), trapline_trace::Error>) {
        if let Err(error) = result
            && self.failure.is_none()
        {
            self.failure = Some(error);
            for space in self.spaces.values() {
                space.pool.close();
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Pool(id, pool) => {
                if self.failure.is_some() {
                    pool.close();
                }
                let (processes, threads) = (HashMap::new(), HashMap::new());
                let (ended_early, kept_back) = (Vec::new(), VecDeque::new());
                let space = Space { pool, doorbell: 0, answered: 0, processes, threads, ended_early, kept_back };
                self.spaces.insert(id, space);
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
            Message::Write(write) => {
                self.write(&write);
                if self.figures.is_some() {
                    self.story.push(write);
                }
            }
            Message::Begin(writer, sites) => {
                // What is left of the last one belongs to nobody.
                self.look_at_all(true, &|_| ());
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
                for write in &story {
                    self.write(write);
                }
                self.story = story;
            }
            Message::End => {
                self.look_at_all(true, &|_| ());
                if let Some(figures) = &self.figures {
                    figures.select(&[]);
                }
                let written = self.writer.as_ref().map(|writer| (writer.calls(), writer.path().display().to_string()));
                self.end_trace();
                if let (Some(figures), Some((calls, path))) = (&self.figures, written) {
                    figures.tell(match &self.failure {
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
                self.look(id, if is_flush { Look::Everything } else { Look::Full });
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
            // Who has begun another one writes nothing more here.
            let is_left = chunks.get(at + 1).is_some_and(|(other, _, _)| *other == key);
            if is_early || !self.write_chunk((id, &mut space), key, index, is_last, is_left) {
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
        if !thread.is_told {
            let stream = thread.stream;
            thread.is_told = self.writer.is_some();
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
        let lost_before = if thread.begun.is_none() { chunk.lost_before.load(Ordering::Relaxed) } else { 0 };
        let mut begun = thread.begun.unwrap_or_else(|| Begun {
            records: 0,
            seen_at_tsc: chunk.opened_tsc.load(Ordering::Relaxed),
            depth: chunk.depth.load(Ordering::Relaxed),
            hole_since: None,
        });
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
            let result = self.writer.as_mut().map(write).transpose();
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

/// The record in a word of a chunk, or 0 if there is none yet.
fn record_in(word: &AtomicU64) -> u64 {
    // Acquire: pairs with the trampoline's store, which on x86 is a release; the chunk's header is there.
    let word = word.load(Ordering::Acquire);
    if is_written(word) { word } else { 0 }
}

/// A chunk to be written: the thread, its place in the thread's order, and in the pool.
type ChunkAt = ((u32, u32), u32, usize);

fn chunks_to_write(space: &Space, look: Look) -> Vec<ChunkAt> {
    let mut chunks: Vec<ChunkAt> = (0..space.pool.chunk_count())
        .filter_map(|index| {
            let chunk = space.pool.chunk(index);
            // Acquire: pairs with the agent's Release; the rest of the header is there.
            let is_wanted = match state::of(chunk.state.load(Ordering::Acquire)) {
                state::FULL => true,
                state::ACTIVE => look != Look::Full,
                // Begun, and perhaps left in that moment.
                state::TAKEN => look != Look::Full && space.is_used(index),
                _ => false,
            };
            let is_wanted = is_wanted && !space.kept_back.iter().any(|(kept, _)| *kept == index);
            let tid = chunk.tid.load(Ordering::Relaxed);
            let is_wanted = is_wanted && !matches!(look, Look::Last(Some(only)) if only != tid);
            is_wanted.then(|| ((chunk.pid.load(Ordering::Relaxed), tid), chunk.sequence.load(Ordering::Relaxed), index))
        })
        .collect();
    chunks.sort_unstable();
    chunks
}

impl Space {
    fn is_used(&self, index: usize) -> bool {
        self.pool.records(index).iter().any(|word| record_in(word) != 0)
    }

    /// Frees what was kept back for threads that have ended, and the oldest where that would be more than a quarter of the pool: those were left by longjmp.
    fn free_kept_back(&mut self, look: Look) {
        let has_ended = |tid: u32| match look {
            Look::Last(ended) => ended.is_none_or(|ended| ended == tid),
            _ => false,
        };
        let mut too_many = self.kept_back.len().saturating_sub(self.pool.chunk_count() / 4);
        self.kept_back.retain(|(index, tid)| {
            let is_over = too_many > 0 || has_ended(*tid);
            if is_over {
                too_many = too_many.saturating_sub(1);
                self.pool.free(*index);
            }
            !is_over
        });
    }

    /// Frees what a thread that ended, or any, took and never used: a signal handler has left it by longjmp in that moment.
    fn free_unused(&self, ended: Option<u32>) {
        for index in 0..self.pool.chunk_count() {
            let word = self.pool.chunk(index).state.load(Ordering::Acquire);
            let is_of = ended.is_none_or(|tid| state::thread(word) == tid);
            if is_of && state::of(word) == state::TAKEN && !self.is_used(index) {
                self.pool.free(index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use trapline_abi::record::KIND_SHIFT;

    use super::*;

    fn space(chunks: usize) -> Space {
        Space {
            pool: Arc::new(Pool::new(chunks, OnFull::Block).unwrap()),
            doorbell: 0,
            answered: 0,
            processes: HashMap::new(),
            threads: HashMap::new(),
            ended_early: Vec::new(),
            kept_back: VecDeque::new(),
        }
    }

    /// Puts a chunk into a thread's hands, as the agent does.
    fn take(space: &Space, index: usize, (tid, sequence): (u32, u32), state: u32) {
        let chunk = space.pool.chunk(index);
        chunk.pid.store(1, Ordering::Relaxed);
        chunk.tid.store(tid, Ordering::Relaxed);
        chunk.sequence.store(sequence, Ordering::Relaxed);
        chunk.state.store(state::with(state::taken_by(0, tid), state), Ordering::Release);
        space.pool.header().free_chunks.fetch_sub(1, Ordering::Relaxed);
    }

    fn listed(space: &Space, look: Look) -> Vec<usize> {
        chunks_to_write(space, look).into_iter().map(|(_, _, index)| index).collect()
    }

    fn is_free(space: &Space, index: usize) -> bool {
        state::of(space.pool.chunk(index).state.load(Ordering::Relaxed)) == state::FREE
    }

    #[test]
    fn chunks_come_in_the_order_of_their_threads() {
        let space = space(6);
        take(&space, 0, (8, 1), state::FULL);
        take(&space, 1, (8, 0), state::FULL);
        take(&space, 2, (7, 5), state::ACTIVE);
        take(&space, 3, (8, 2), state::ACTIVE);
        assert_eq!(listed(&space, Look::Full), [1, 0]);
        assert_eq!(listed(&space, Look::Everything), [2, 1, 0, 3]);
        assert_eq!(listed(&space, Look::Last(Some(7))), [2]);
    }

    #[test]
    fn a_chunk_that_was_left_when_it_was_taken_is_found() {
        let space = space(4);
        take(&space, 0, (7, 0), state::TAKEN);
        take(&space, 1, (7, 1), state::TAKEN);
        take(&space, 2, (8, 0), state::TAKEN);
        // Half of a record, which 32-bit code stores first, is none.
        space.pool.records(0)[3].store(1, Ordering::Relaxed);
        space.pool.records(1)[3].store(1 << KIND_SHIFT, Ordering::Relaxed);
        assert_eq!(listed(&space, Look::Full), [0_usize; 0]);
        assert_eq!(listed(&space, Look::Everything), [1], "one has a record");
        space.free_unused(Some(7));
        assert_eq!([0, 1, 2].map(|index| is_free(&space, index)), [true, false, false]);
        space.free_unused(None);
        assert_eq!([0, 1, 2].map(|index| is_free(&space, index)), [true, false, true]);
        assert_eq!(space.pool.header().free_chunks.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_chunk_with_a_hole_is_kept_back_until_its_thread_ends_or_room_is_short() {
        let mut space = space(8);
        for index in 0..4 {
            take(&space, index, (7 + u32::try_from(index).unwrap(), 0), state::FULL);
            space.kept_back.push_back((index, 7 + u32::try_from(index).unwrap()));
        }
        assert_eq!(listed(&space, Look::Everything), [0_usize; 0], "they are written");
        // A quarter of eight may be kept.
        space.free_kept_back(Look::Full);
        assert_eq!([0, 1, 2, 3].map(|index| is_free(&space, index)), [true, true, false, false]);
        space.free_kept_back(Look::Last(Some(10)));
        assert_eq!([2, 3].map(|index| is_free(&space, index)), [false, true]);
        space.free_kept_back(Look::Last(None));
        assert!(is_free(&space, 2) && space.kept_back.is_empty());
    }
}
