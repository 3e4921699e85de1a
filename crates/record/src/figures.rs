//! What functions do, while they do it: a source of live figures, and of orders about them.
//!
//! Owns [`Figures`], which is shared by whoever shows figures and by the recorder: the tracer and the drain tell it of modules, counters and ends, and do what it was
//! ordered. Nothing is recorded for it where threads can count in place, and a look adds up what is new; what others record is folded (`folded.rs`) into the same
//! sums. Invariant: each call that was counted is in the sums
//! once, also of threads and processes that are gone.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use trapline_trace::Batch;

use crate::{
    counters::{Counters, Seen, Tallies, Tally},
    drain::SpaceId,
    folded::{Folded, Selection},
    sys::{shared, spawn::Waker},
};

/// A module whose functions can be counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Module {
    /// Its file.
    pub path: String,
    /// The site of its first function; the others follow.
    pub first_site: u32,
    /// Its functions.
    pub functions: Vec<Function>,
}

/// A function that can be counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Its address in its file.
    pub address: u64,
}

/// What a function did since the beginning. Times are nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Figure {
    /// Which function.
    pub site: u32,
    /// Calls.
    pub calls: u64,
    /// Calls that have not ended. They count as if they ended now.
    pub open: u64,
    /// Time of its calls, with what they called; not those of calls within a call of itself.
    pub total_ns: u64,
    /// Time without what they called.
    pub self_ns: u64,
    /// What 99 of 100 calls did not exceed of those that have ended. Wrong by at most a sixteenth, or four ticks of the processor's counter.
    pub p99_ns: Option<u64>,
}

/// All figures at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// Of all functions that were called.
    pub figures: Vec<Figure>,
    /// Calls that could not be counted: more threads at once than there is room for, or threads that may not read the time. Of processes that have no room for counters: records that were lost,
    /// of which a call has two.
    pub uncounted: u64,
    /// Processes that are counted in now.
    pub processes: usize,
    /// Threads of them that have called something.
    pub threads: usize,
    /// Nanoseconds since the beginning.
    pub elapsed_ns: u64,
}

/// What the recorder is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Order {
    /// Count these functions, or do not. What was counted stays.
    Switch {
        /// Their sites.
        sites: Vec<u32>,
        /// Whether they are counted from now on.
        is_on: bool,
    },
    /// Write what these functions do into a trace, until it is told to stop. They are counted all the same.
    Record {
        /// Where the trace goes.
        output: PathBuf,
        /// Their sites.
        sites: Vec<u32>,
        /// What was asked for, for the trace's header.
        given: BTreeMap<String, String>,
    },
    /// The trace is complete.
    StopRecording,
    /// Leave a process that ran already; end a program that was launched.
    End,
}

/// See the module's text. A copy is the same one.
#[derive(Clone, Debug)]
pub struct Figures(Arc<Mutex<Board>>);

#[derive(Debug)]
struct Board {
    modules: Vec<Arc<Module>>,
    spaces: HashMap<SpaceId, (Arc<Counters>, Seen)>,
    folded: HashMap<SpaceId, Folded>,
    selection: Selection,
    tallies: Tallies,
    /// Of processes that have ended.
    uncounted: u64,
    /// When the first process was counted in.
    began: Option<Clock>,
    orders: VecDeque<Order>,
    waker: Option<Waker>,
    /// What became of orders, for who gave them.
    news: VecDeque<String>,
}

/// A moment, by both clocks.
#[derive(Clone, Copy, Debug)]
struct Clock {
    tsc: u64,
    monotonic_ns: u64,
}

impl Clock {
    fn now() -> Self {
        Self { tsc: shared::tsc(), monotonic_ns: shared::monotonic_ns() }
    }
}

impl Default for Figures {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Board {
            modules: Vec::new(),
            spaces: HashMap::new(),
            folded: HashMap::new(),
            selection: Selection::default(),
            tallies: Tallies::new(),
            uncounted: 0,
            began: None,
            orders: VecDeque::new(),
            waker: None,
            news: VecDeque::new(),
        })))
    }
}

impl Figures {
    /// All modules so far, in the order of their sites.
    pub fn modules(&self) -> Vec<Arc<Module>> {
        self.board().modules.clone()
    }

    /// Whether something has been counted in.
    pub fn has_begun(&self) -> bool {
        self.board().began.is_some()
    }

    /// Looks at all counters.
    pub fn look(&self) -> Snapshot {
        self.board().look()
    }

    /// Gives an order. It is carried out soon.
    pub fn order(&self, order: Order) {
        let mut board = self.board();
        board.orders.push_back(order);
        if let Some(waker) = &board.waker {
            waker.wake();
        }
    }

    /// What became of an order, if there is something to tell.
    pub fn news(&self) -> Option<String> {
        self.board().news.pop_front()
    }

    /// The next order.
    pub(crate) fn next_order(&self) -> Option<Order> {
        self.board().orders.pop_front()
    }

    /// Something to tell.
    pub(crate) fn tell(&self, news: String) {
        self.board().news.push_back(news);
    }

    /// Who is woken by orders.
    pub(crate) fn wakes(&self, waker: Waker) {
        self.board().waker = Some(waker);
    }

    /// A module is known.
    pub(crate) fn add_module(&self, module: Module) {
        let mut board = self.board();
        board.modules.push(Arc::new(module));
        board.modules.sort_by_key(|module| module.first_site);
    }

    /// A process counts here.
    pub(crate) fn add(&self, id: SpaceId, counters: Arc<Counters>) {
        let mut board = self.board();
        board.began.get_or_insert_with(Clock::now);
        board.spaces.insert(id, (counters, Seen::new()));
    }

    /// A process that has no counters records, and its records are brought here.
    pub(crate) fn add_folded(&self, id: SpaceId) {
        let mut board = self.board();
        board.began.get_or_insert_with(Clock::now);
        board.folded.entry(id).or_default();
    }

    /// Takes records of a process without counters. Those that are to be in the trace beside go to `beside`, in place of what is there; returns how many calls are open there before. `None` if the process has counters.
    pub(crate) fn fold(&self, id: SpaceId, batch: &Batch<'_>, beside: &mut Vec<u64>) -> Option<u32> {
        let mut board = self.board();
        let Board { folded, selection, uncounted, .. } = &mut *board;
        let folded = folded.get_mut(&id)?;
        *uncounted += batch.lost_before;
        beside.clear();
        Some(folded.add(batch, selection, beside))
    }

    /// All records of a process without counters were brought that are older than this.
    pub(crate) fn has_looked(&self, id: SpaceId, tsc: u64) {
        if let Some(folded) = self.board().folded.get_mut(&id) {
            folded.has_looked(tsc);
        }
    }

    /// A thread of a process without counters has ended.
    pub(crate) fn end_folded(&self, id: SpaceId, stream: u32) {
        if let Some(folded) = self.board().folded.get_mut(&id) {
            folded.end(stream, shared::tsc());
        }
    }

    /// A process without counters has.
    pub(crate) fn end_all_folded(&self, id: SpaceId) {
        let mut board = self.board();
        if let Some(mut folded) = board.folded.remove(&id) {
            folded.end_all(shared::tsc());
            folded.add_new(&mut board.tallies);
        }
    }

    /// Of processes without counters, these functions are in a trace that begins now; none if one has ended.
    pub(crate) fn select(&self, sites: &[u32]) {
        self.board().selection.select(sites);
    }

    /// A thread has ended, or all threads of a process: what they have counted is kept.
    pub(crate) fn ended(&self, id: SpaceId, tid_inside: Option<u32>) {
        let mut board = self.board();
        let Board { spaces, tallies, uncounted, .. } = &mut *board;
        let Some((counters, seen)) = spaces.get_mut(&id) else { return };
        for region in counters.regions(tid_inside) {
            counters.add_new(region, seen, tallies);
            let mut open = Tallies::new();
            counters.add_open(region, &mut open);
            for (site, tally) in open {
                // They have ended with their thread, and nobody knows how long they would have taken.
                tallies.entry(site).or_default().add(&Tally { open: 0, ..tally });
            }
            // An error means that its memory is not given back before the process ends; nobody takes it again.
            let _ = counters.free(region, seen);
        }
        if tid_inside.is_none() {
            *uncounted += counters.uncounted();
            spaces.remove(&id);
        }
    }

    /// A panic of somebody else leaves sums that are right.
    fn board(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Board {
    fn look(&mut self) -> Snapshot {
        let mut open = Tallies::new();
        let (mut uncounted, mut threads) = (self.uncounted, 0);
        for (counters, seen) in self.spaces.values_mut() {
            uncounted += counters.uncounted();
            for region in counters.regions(None) {
                threads += 1;
                counters.add_open(region, &mut open);
                counters.add_new(region, seen, &mut self.tallies);
            }
        }
        for folded in self.folded.values_mut() {
            threads += folded.threads();
            folded.add_open(&mut open);
            folded.add_new(&mut self.tallies);
        }
        let now = Clock::now();
        let began = self.began.unwrap_or(now);
        let passed_ns = now.monotonic_ns - began.monotonic_ns;
        let passed_tsc = now.tsc.saturating_sub(began.tsc).max(1);
        let ns = |ticks: u64| {
            let ns = u128::from(ticks) * u128::from(passed_ns) / u128::from(passed_tsc);
            u64::try_from(ns).unwrap_or(u64::MAX)
        };
        let none = Tally::default();
        let figure = |(site, tally): (&u32, &Tally)| {
            let open = open.get(site).unwrap_or(&none);
            Figure {
                site: *site,
                calls: tally.calls,
                open: open.open,
                total_ns: ns(tally.total + open.total),
                self_ns: ns(tally.own + open.own),
                p99_ns: tally.percentile(990).map(ns),
            }
        };
        let mut figures: Vec<Figure> = self.tallies.iter().filter(|(_, tally)| tally.calls > 0).map(figure).collect();
        figures.sort_unstable_by_key(|figure| figure.site);
        Snapshot {
            figures,
            uncounted,
            processes: self.spaces.len() + self.folded.len(),
            threads,
            elapsed_ns: passed_ns,
        }
    }
}
