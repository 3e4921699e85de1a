//! Threads that judge every single call of a traced function.
//!
//! A [`Watched`] ops has a *phase*, which the thread that turns it on and off announces, and each thread counts for itself how often the callback has run
//! in it. A call that begins and ends in one phase is judged exactly: it has been seen once if the ops was on, and not at all if it was
//! off. Only calls that overlap a change may go either way, once. Invariant: no tolerance: one missed call fails a test.

use std::{
    cell::Cell,
    iter::Sum,
    ops::AddAssign,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

use trapline_process::{Call, Filter, Ops, Tracer};

use super::child::wait_until;

/// How many ops can be watched.
pub(crate) const WATCHED: usize = 4;

const OFF: usize = 0;
const ON: usize = 2;

/// Phases count up: modulo 4 they are off, on the way to on, on, on the way to off.
static PHASES: [AtomicUsize; WATCHED] = [const { AtomicUsize::new(OFF) }; WATCHED];

thread_local! {
    static SEEN: [Cell<u64>; WATCHED] = const { [const { Cell::new(0) }; WATCHED] };
}

/// The callback of the watched ops with this number. Contexts that interrupt each other in a thread must use different numbers.
pub(crate) fn count<const WATCH: usize>(_call: &mut Call<'_>) {
    count_for(WATCH);
}

/// How often [`count`] has run in this thread.
pub(crate) fn seen(watch: usize) -> u64 {
    SEEN.with(|seen| seen[watch].get())
}

/// Counts a call for a number that is chosen at run time.
pub(crate) fn count_for(watch: usize) {
    SEEN.with(|seen| seen[watch].set(seen[watch].get().wrapping_add(1)));
}

/// An ops whose changes are announced. It begins disabled.
pub(crate) struct Watched {
    ops: Ops,
    watches: Vec<usize>,
}

impl Watched {
    /// `ops` is disabled and its callback is [`count`] with the number `watch`.
    pub(crate) fn new(ops: Ops, watch: usize) -> Self {
        Self::by_function(ops, vec![watch])
    }

    /// `ops` is disabled, and its callback counts for a different one of these numbers in each function.
    pub(crate) fn by_function(ops: Ops, watches: Vec<usize>) -> Self {
        Self { ops, watches }
    }

    pub(crate) fn enable(&self) {
        self.change(OFF, |ops| ops.enable().expect("enabling"));
    }

    pub(crate) fn disable(&self) {
        self.change(ON, |ops| ops.disable().expect("disabling"));
    }

    /// Gives it another filter while it is enabled. What it sees of a function that both match does not change.
    pub(crate) fn refilter(&self, filter: Filter) {
        self.ops.set_filter(filter).expect("changing the filter");
    }

    /// Unregisters it while it is enabled.
    pub(crate) fn drop_enabled(self) {
        let Self { ops, watches } = self;
        announce(&watches, ON);
        drop(ops);
        announce(&watches, ON + 1);
    }

    /// Turns it on and off again at once.
    pub(crate) fn blink(&self) {
        self.enable();
        self.disable();
    }

    fn change(&self, from: usize, change: impl FnOnce(&Ops)) {
        announce(&self.watches, from);
        change(&self.ops);
        announce(&self.watches, from + 1);
    }

    /// Turns it on and off again this often, and waits in between until the workers have made some calls.
    pub(crate) fn toggle(&self, rounds: usize, workers: &Workers) {
        for _ in 0..rounds {
            self.enable();
            workers.await_calls(10);
            self.disable();
            workers.await_calls(10);
        }
        // And once so long that every worker has something to judge in either phase.
        self.enable();
        workers.await_each();
        self.disable();
        workers.await_each();
    }
}

/// Toggles an ops until somebody has met a breakpoint there, for a test of what happens then shows nothing else.
///
/// Without a rest: on a processor that threads share, a caller meets one only if the poke is interrupted half way, and a thread that always waits for
/// others between its pokes is interrupted in none of them.
pub(crate) fn toggle_until_trapped(tracer: &Tracer, mut toggle: impl FnMut()) {
    let before = tracer.stats().traps.traps;
    while tracer.stats().traps.traps == before {
        toggle();
    }
}

/// Ends the phase `from`.
fn announce(watches: &[usize], from: usize) {
    for watch in watches {
        let before = PHASES[*watch].fetch_add(1, Ordering::SeqCst);
        assert_eq!(before % 4, from);
    }
}

/// What one thread has found about one ops.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Tally {
    /// Calls that had to be seen.
    pub(crate) due: u64,
    /// Of those, the ones that were not.
    pub(crate) missed: u64,
    /// Calls that must not be seen.
    pub(crate) idle: u64,
    /// Of those, the ones that were.
    pub(crate) stray: u64,
    /// Calls that overlapped a change.
    pub(crate) undecided: u64,
    /// Calls that were seen more than once.
    pub(crate) repeated: u64,
}

impl Tally {
    /// Whether every call went as it had to.
    pub(crate) fn is_exact(&self) -> bool {
        (self.missed, self.stray, self.repeated) == (0, 0, 0)
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.due += other.due;
        self.missed += other.missed;
        self.idle += other.idle;
        self.stray += other.stray;
        self.undecided += other.undecided;
        self.repeated += other.repeated;
    }
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), |mut sum, tally| {
            sum += tally;
            sum
        })
    }
}

/// Makes one call, and judges it for each of the watched ops.
pub(crate) fn judge(watches: &[usize], tallies: &mut [Tally; WATCHED], call: impl FnOnce()) {
    let mut before = [(0, 0); WATCHED];
    for &watch in watches {
        before[watch] = (PHASES[watch].load(Ordering::SeqCst), seen(watch));
    }
    call();
    for &watch in watches {
        let (phase, seen_before) = before[watch];
        let (tally, times) = (&mut tallies[watch], seen(watch) - seen_before);
        tally.repeated += u64::from(times > 1);
        if PHASES[watch].load(Ordering::SeqCst) != phase {
            tally.undecided += 1;
        } else if phase % 4 == ON {
            tally.due += 1;
            tally.missed += u64::from(times == 0);
        } else if phase % 4 == OFF {
            tally.idle += 1;
            tally.stray += u64::from(times != 0);
        } else {
            tally.undecided += 1;
        }
    }
}

/// Threads that call all the time.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<[Tally; WATCHED]>>,
}

struct Shared {
    end: AtomicBool,
    calls: Vec<AtomicU64>,
}

impl Workers {
    /// Starts threads that make `call` and judge it, and waits until all do.
    pub(crate) fn start<F>(count: usize, watches: &'static [usize], call: F) -> Self
    where
        F: FnMut() + Clone + Send + 'static,
    {
        let calls = (0..count).map(|_| AtomicU64::new(0)).collect();
        let shared = Arc::new(Shared { end: AtomicBool::new(false), calls });
        let run = |index: usize| {
            let (shared, mut call) = (Arc::clone(&shared), call.clone());
            move || {
                let mut tallies = [Tally::default(); WATCHED];
                while !shared.end.load(Ordering::Relaxed) {
                    judge(watches, &mut tallies, &mut call);
                    shared.calls[index].fetch_add(1, Ordering::Relaxed);
                }
                tallies
            }
        };
        let threads = (0..count).map(|index| thread::spawn(run(index))).collect();
        let workers = Self { shared, threads };
        workers.await_each();
        workers
    }

    /// Calls that they have made, all together.
    pub(crate) fn calls(&self) -> u64 {
        self.shared.calls.iter().map(|calls| calls.load(Ordering::Relaxed)).sum()
    }

    /// Waits until they have made some more.
    pub(crate) fn await_calls(&self, calls: u64) {
        let before = self.calls();
        wait_until(|| self.calls() - before >= calls);
    }

    /// Waits until each of them has made one more call, from beginning to end.
    pub(crate) fn await_each(&self) {
        let before: Vec<u64> = self.shared.calls.iter().map(|calls| calls.load(Ordering::Relaxed)).collect();
        for (calls, before) in self.shared.calls.iter().zip(before) {
            wait_until(|| calls.load(Ordering::Relaxed) >= before + 2);
        }
    }

    /// Ends them, and returns what each of them has found about each watched ops.
    pub(crate) fn finish(self) -> Vec<[Tally; WATCHED]> {
        self.shared.end.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().expect("a worker does not panic")).collect()
    }

    /// Ends them. Each must have judged calls of either phase of this ops, and all went as they had to.
    pub(crate) fn assert_exact(self, watch: usize) {
        for tallies in self.finish() {
            let tally = tallies[watch];
            assert!(tally.due > 0 && tally.idle > 0, "{tally:?}");
            assert!(tally.is_exact(), "{tally:?}");
        }
    }

    /// Ends them. Every call of each of them was due, and seen once.
    pub(crate) fn assert_all_seen(self, watch: usize) {
        for tallies in self.finish() {
            let Tally { due, missed, idle, repeated, undecided, .. } = tallies[watch];
            assert!(due > 0, "{:?}", tallies[watch]);
            assert_eq!((missed, idle, repeated, undecided), (0, 0, 0, 0), "{:?}", tallies[watch]);
        }
    }
}

/// Functions whose sites change all the time: one ops stays, and a thread turns another one on and off. So every call is due, those that meet a
/// breakpoint as well.
pub(crate) struct Changing {
    tracer: Tracer,
    stays: Watched,
    toggler: Toggler,
}

impl Changing {
    /// Attaches [`count`] with the number 0 to what the filter selects, and begins to toggle there.
    pub(crate) fn start(tracer: &Tracer, filter: &Filter) -> Self {
        let describe = |name| tracer.ops(name).filter(filter.clone()).disabled();
        let stays = Watched::new(describe("stays").register(count::<0>).expect("the functions are there"), 0);
        stays.enable();
        let toggled = describe("toggled").register(|_call| ()).expect("they are there");
        Self { tracer: tracer.clone(), stays, toggler: Toggler::start(toggled) }
    }

    /// Waits until somebody has met some more breakpoints there.
    pub(crate) fn await_traps(&self) {
        let traps = || self.tracer.stats().traps.traps;
        let before = traps();
        wait_until(|| traps() > before + 10);
    }

    /// Waits until the sites have changed this often, and back.
    pub(crate) fn await_rounds(&self, rounds: u64) {
        self.toggler.await_rounds(rounds);
    }

    /// Ends it, and detaches both.
    pub(crate) fn finish(self) {
        self.toggler.finish();
        self.stays.disable();
    }
}

/// A thread that turns an ops on and off all the time.
struct Toggler {
    end: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Toggler {
    fn start(ops: Ops) -> Self {
        let (end, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (told, done) = (Arc::clone(&end), Arc::clone(&rounds));
        let toggle = move || {
            while !told.load(Ordering::Relaxed) {
                ops.enable().expect("enabling");
                ops.disable().expect("disabling");
                done.fetch_add(1, Ordering::Relaxed);
            }
        };
        let toggler = Self { end, rounds, thread: thread::spawn(toggle) };
        toggler.await_rounds(1);
        toggler
    }

    fn await_rounds(&self, rounds: u64) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_until(|| self.rounds.load(Ordering::Relaxed) - before >= rounds);
    }

    fn finish(self) {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().expect("toggling works");
    }
}
