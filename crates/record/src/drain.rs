//! The thread that empties the pools and writes the trace.
//!
//! Owns [`Drain`], its thread's handle, and the trace's writer. The [`tracer`](crate::tracer) sends it [`Message`]s: pools and processes come and go,
//! and what the trace has to tell of them. Full chunks are emptied all the time; chunks in use are looked into a few times a second, so that little is
//! missing when the recorder itself is killed, and so that the time between two looks stays far below the range of a record's time. Each
//! thread's chunks are written in their order. Invariant: a record reaches the trace once; what cannot reach it is counted.

use std::{
    collections::HashMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use trapline_abi::pool::{OnFull, state};
use trapline_trace::{Losses, Stream, Writer};

use crate::{
    error::Error,
    pool::{CHUNK_RECORDS, Pool, Taken},
    sys::{Tid, shared},
};

/// Names the memory of a process; a vfork child uses its parent's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct SpaceId(pub(crate) u32);

/// What writes something into the trace.
type ForTheTrace = Box<dyn FnOnce(&mut Writer) -> Result<(), trapline_trace::Error> + Send>;

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
}

/// What the tracer hears from the drain: this space's objects have changed, and a thread of it waits.
pub(crate) type Changed = SpaceId;

/// The thread.
pub(crate) struct Drain {
    messages: Sender<Message>,
    thread: JoinHandle<Result<Losses, Error>>,
}

impl Drain {
    /// Starts it. `changed` is called when a target asks for attention.
    pub(crate) fn start(
        writer: Writer,
        on_full: OnFull,
        totals: Arc<AtomicU64>,
        changed: impl Fn(Changed) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (messages, inbox) = mpsc::channel();
        let mut work = Work {
            writer,
            inbox,
            totals,
            only_at_the_end: on_full == OnFull::Overwrite,
            spaces: HashMap::new(),
            next_stream: 0,
            losses: Losses::default(),
            records: Vec::with_capacity(CHUNK_RECORDS),
            failure: None,
        };
        let thread = std::thread::Builder::new().name("drain".to_owned()).spawn(move || {
            work.run(&changed);
            work.finish()
        })?;
        Ok(Self { messages, thread })
    }

    /// Tells it something. What is told after it broke off is lost, and [`finish`](Self::finish) says why.
    pub(crate) fn tell(&self, message: Message) {
        let _ = self.messages.send(message);
    }

    /// Something for the trace.
    pub(crate) fn write(&self, write: impl FnOnce(&mut Writer) -> Result<(), trapline_trace::Error> + Send + 'static) {
        self.tell(Message::Write(Box::new(write)));
    }

    /// Waits until all that was told is done.
    pub(crate) fn finish(self) -> Result<Losses, Error> {
        drop(self.messages);
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Of one thread, how far its chunks are written.
#[derive(Debug)]
struct Thread {
    stream: u32,
    next_sequence: u32,
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
}

struct Work {
    writer: Writer,
    inbox: Receiver<Message>,
    totals: Arc<AtomicU64>,
    only_at_the_end: bool,
    spaces: HashMap<SpaceId, Space>,
    next_stream: u32,
    losses: Losses,
    records: Vec<u64>,
    failure: Option<trapline_trace::Error>,
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

    fn finish(mut self) -> Result<Losses, Error> {
        let result = self.writer.losses(&self.losses);
        self.keep(result);
        let finished = self.writer.finish();
        match self.failure {
            Some(failure) => Err(failure.into()),
            None => finished.map(|_| self.losses).map_err(Into::into),
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
                let ended_early = Vec::new();
                self.spaces.insert(id, Space { pool, doorbell: 0, answered: 0, processes, threads, ended_early });
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
                let result = write(&mut self.writer);
                self.keep(result);
            }
        }
    }

    fn look_at_all(&mut self, is_flush: bool, changed: &dyn Fn(Changed)) {
        let ids: Vec<SpaceId> = self.spaces.keys().copied().collect();
        for id in ids {
            let Some(space) = self.spaces.get_mut(&id) else { continue };
            let header = space.pool.header();
            header.heartbeat.fetch_add(1, Ordering::Relaxed);
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
        if let Some(space) = self.spaces.remove(&id) {
            let header = space.pool.header();
            self.losses.full += header.lost_full.load(Ordering::Relaxed);
            self.losses.overwritten += header.lost_overwritten.load(Ordering::Relaxed);
            self.losses.unhooked += header.unhooked.load(Ordering::Relaxed);
            self.losses.waited_ns += header.waited_ns.load(Ordering::Relaxed);
        }
    }

    /// Writes what a pool has, each thread's chunks in their order.
    fn look(&mut self, id: SpaceId, look: Look) {
        let Some(mut space) = self.spaces.remove(&id) else { return };
        let mut chunks = chunks_to_write(&space, look);
        if !space.is_in_order(&chunks) {
            // A chunk is full before the next one is taken: a second look finds every chunk that comes before one of the first.
            chunks = chunks_to_write(&space, look);
        }
        let mut held = None;
        for (key, _, index) in chunks {
            if held == Some(key) {
                continue;
            }
            let is_last = match look {
                Look::Last(Some(tid)) => key.1 == tid,
                Look::Last(None) => true,
                _ => false,
            };
            if !self.write_chunk(&mut space, key, index, is_last) {
                held = Some(key);
            }
        }
        if let Look::Last(Some(tid)) = look {
            space.threads.retain(|(_, of), _| *of != tid);
        }
        self.spaces.insert(id, space);
    }

    /// Writes what is new in a chunk. Returns whether the thread's next one may follow: not if this one has a hole that may still be filled.
    fn write_chunk(&mut self, space: &mut Space, key: (u32, u32), index: usize, is_last: bool) -> bool {
        let pool = Arc::clone(&space.pool);
        let chunk = pool.chunk(index);
        let sequence = chunk.sequence.load(Ordering::Relaxed);
        if let std::collections::hash_map::Entry::Vacant(entry) = space.threads.entry(key) {
            let stream = self.next_stream;
            self.next_stream += 1;
            entry.insert(Thread { stream, next_sequence: sequence, begun: None });
            let (pid, process) = space.processes.get(&key.0).copied().unwrap_or_default();
            let name = fs::read_to_string(format!("/proc/{pid}/task/{}/comm", key.1)).unwrap_or_default();
            let started_tsc = chunk.opened_tsc.load(Ordering::Relaxed);
            let name = name.trim_end().to_owned();
            let result = self.writer.stream(&Stream { id: stream, process, tid: key.1, name, started_tsc });
            self.keep(result);
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
        let is_full = chunk.state.load(Ordering::Acquire) == state::FULL;
        let is_last = is_last || is_full && space.ended_early.contains(&pool.taken(index));
        let seen_at_tsc = shared::tsc();
        self.records.clear();
        let words = pool.records(index)[begun.records..].iter();
        // Acquire: pairs with the trampoline's store, which on x86 is a release.
        self.records.extend(words.map(|word| word.load(Ordering::Acquire)).take_while(|word| *word != 0));
        let is_done = if begun.records + self.records.len() == CHUNK_RECORDS {
            true
        } else if is_last {
            let rest = pool.records(index)[begun.records + self.records.len()..].iter();
            self.records.extend(rest.map(|word| word.load(Ordering::Acquire)));
            // What nobody had reserved is no loss: only holes before the last record are.
            let used = self.records.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
            self.records.truncate(used);
            true
        } else if is_full {
            let hole_since = *begun.hole_since.get_or_insert_with(Instant::now);
            if hole_since.elapsed() < HOLE_PATIENCE {
                thread.begun = Some(begun);
                space.doorbell = space.doorbell.wrapping_sub(1);
                return false;
            }
            let rest = pool.records(index)[begun.records + self.records.len()..].iter();
            self.records.extend(rest.map(|word| word.load(Ordering::Acquire)));
            true
        } else {
            false
        };
        if !self.records.is_empty() || lost_before != 0 {
            let result = self.writer.events(thread.stream, begun.seen_at_tsc, begun.depth, lost_before, &self.records);
            self.totals.fetch_add(self.records.len() as u64, Ordering::Relaxed);
            begun.records += self.records.len();
            let result = result.map(|end| begun.depth = end.depth);
            self.keep(result);
        }
        begun.seen_at_tsc = seen_at_tsc;
        let Some(thread) = space.threads.get_mut(&key) else { return true };
        if is_done {
            thread.begun = None;
            thread.next_sequence = sequence.wrapping_add(1);
            pool.free(index);
        } else {
            thread.begun = Some(begun);
        }
        true
    }
}

/// A chunk to be written: the thread, its place in the thread's order, and in the pool.
type ChunkAt = ((u32, u32), u32, usize);

fn chunks_to_write(space: &Space, look: Look) -> Vec<ChunkAt> {
    let mut chunks: Vec<ChunkAt> = (0..space.pool.chunk_count())
        .filter_map(|index| {
            let chunk = space.pool.chunk(index);
            // Acquire: pairs with the agent's Release; the rest of the header is there.
            let is_wanted = match chunk.state.load(Ordering::Acquire) {
                state::FULL => true,
                state::ACTIVE => look != Look::Full,
                _ => false,
            };
            let tid = chunk.tid.load(Ordering::Relaxed);
            let is_wanted = is_wanted && !matches!(look, Look::Last(Some(only)) if only != tid);
            is_wanted.then(|| ((chunk.pid.load(Ordering::Relaxed), tid), chunk.sequence.load(Ordering::Relaxed), index))
        })
        .collect();
    chunks.sort_unstable();
    chunks
}

impl Space {
    /// Whether each thread's chunks begin where the last look ended, and none is left out.
    fn is_in_order(&self, chunks: &[ChunkAt]) -> bool {
        let mut expected: Option<((u32, u32), u32)> = None;
        chunks.iter().all(|(key, sequence, _)| {
            let next = match expected {
                Some((of, next)) if of == *key => next,
                _ => self.threads.get(key).map_or(0, |thread| thread.next_sequence),
            };
            expected = Some((*key, sequence.wrapping_add(1)));
            *sequence == next
        })
    }
}
