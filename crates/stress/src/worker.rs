//! Threads that call traced functions as fast as they can, and signal handlers that interrupt them to do the same.
//!
//! Owns [`Shared`], what all workers read, and [`work`], the life of one. A worker has four *contexts*: its main loop and the handlers of three
//! signals, which interrupt each other. Each context has counters and an account of its own, and while a handler runs, functions and
//! callbacks count in the handler's; so a call is judged by its own effects, whatever interrupted it at whatever instruction.
//! Upstream are [`schedule`](crate::schedule) and [`workload`], downstream is the [`report`](crate::report).
//!
//! Invariant: a context runs at most once at a time in its thread, because a signal is blocked while it is handled. So its book has one user.

use std::{
    array,
    cell::{Cell, UnsafeCell},
    io,
    num::Wrapping,
    ptr,
    sync::atomic::{AtomicBool, Ordering, compiler_fence},
    time::Duration,
};

use libc::{c_int, c_void, siginfo_t};

use crate::{
    account::{Account, Damage, Seen},
    plan::PLAN,
    registers::{Held, Vectors},
    schedule::{Schedule, Windows},
    signals::{self, AlternateStack, SIGNALS, Thread, Timer},
    workload::{self, ARGUMENTS, Counters, FUNCTIONS, PROBES},
};

/// The main loop and the handlers.
pub(crate) const CONTEXTS: usize = 1 + SIGNALS;
const MAIN_LOOP: usize = 0;

/// How often timers send each signal to a worker that runs. The first two handlers raise the signal after theirs besides. No period is a
/// multiple of another, so that they meet in every order.
const PERIODS: [Duration; SIGNALS] =
    [Duration::from_micros(190), Duration::from_micros(310), Duration::from_micros(530)];

/// Calls that a handler makes, before and after it raises another signal.
const CALLS_BY_HANDLER: usize = 2;

/// Calls between two looks at whether to stop.
const CALLS_BY_ROUND: usize = 64;

/// Functions with numbers below this are called most of the time: a batch that pokes few sites pokes these, and has to meet someone there.
const HOT_FUNCTIONS: usize = 16;

/// What is known of a traced function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function {
    /// Which windows cover it.
    pub(crate) covering: Windows,
    /// The return address of a call at its site.
    pub(crate) behind_site: usize,
}

/// What all workers read.
pub(crate) struct Shared {
    pub(crate) schedule: Schedule,
    pub(crate) functions: Box<[Function]>,
    pub(crate) vectors: Vectors,
    /// Whether r11 has to survive a traced call.
    pub(crate) r11_is_held: bool,
    /// Asks all workers to come to an end.
    pub(crate) stop: AtomicBool,
}

/// What workers bring home.
#[derive(Debug, Default)]
pub(crate) struct Harvest {
    /// The main loop's, then the handlers'.
    pub(crate) accounts: [Account; CONTEXTS],
    /// How many handlers were active at once, at most.
    pub(crate) nesting: usize,
}

impl Harvest {
    /// Adds another worker's.
    pub(crate) fn add(&mut self, other: &Self) {
        self.accounts.iter_mut().zip(&other.accounts).for_each(|(sum, account)| sum.add(account));
        self.nesting = self.nesting.max(other.nesting);
    }
}

/// What a context keeps for itself.
struct Book {
    random: Random,
    held: Held,
    account: Account,
}

struct Worker<'a> {
    shared: &'a Shared,
    thread: Thread,
    counters: [Counters; CONTEXTS],
    books: [UnsafeCell<Book>; CONTEXTS],
    active_handlers: Cell<usize>,
    nesting: Cell<usize>,
}

thread_local! {
    /// The worker of this thread, for its signal handlers; null before it begins and after it ended.
    static WORKER: Cell<*const Worker<'static>> = const { Cell::new(ptr::null()) };
}

/// Calls traced functions until it is time to stop. `number` differs from worker to worker: even ones have an alternate stack. It is where
/// the breakpoint handler runs then, and the handler of one signal. In the others everything happens on the stack of the calls.
///
/// # Errors
/// A timer or the alternate stack could not be had.
pub(crate) fn work(shared: &Shared, number: usize) -> io::Result<Harvest> {
    // On the heap: it is some 40 KiB.
    let worker = Box::new(Worker::new(shared, number as u64));
    let stack = if number.is_multiple_of(2) { AlternateStack::install() } else { AlternateStack::none() }?;
    WORKER.set((&raw const *worker).cast());
    // SAFETY: the counters live until null is entered below; only this thread's main loop uses them.
    unsafe { workload::enter(&raw const worker.counters[MAIN_LOOP]) };
    let timers = (0..SIGNALS).map(|signal| Timer::start(signal, PERIODS[signal])).collect::<io::Result<Vec<_>>>();
    if timers.is_ok() {
        while !shared.stop.load(Ordering::Relaxed) {
            worker.make_calls(MAIN_LOOP, CALLS_BY_ROUND);
        }
    }
    // A signal that is under way when its timer is deleted stays pending.
    signals::block();
    WORKER.set(ptr::null());
    // SAFETY: no traced function is called from here on.
    unsafe { workload::enter(ptr::null()) };
    drop(stack);
    timers.map(|_| worker.harvest())
}

/// The handler of all signals.
pub(crate) extern "C" fn on_signal(signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    signals::keeping_errno(|| {
        // SAFETY: the pointer is null or to the worker of this very thread, which takes it back before it ends.
        let worker = unsafe { WORKER.get().as_ref() };
        if let (Some(worker), Some(signal)) = (worker, signals::index(signal)) {
            worker.interrupt(signal);
        }
    });
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared, seed: u64) -> Self {
        let book = |context: usize| {
            let mut random = Random::new(seed.wrapping_mul(CONTEXTS as u64).wrapping_add(context as u64));
            let held = Held::new(shared.vectors, shared.r11_is_held, || random.next());
            UnsafeCell::new(Book { random, held, account: Account::default() })
        };
        Self {
            shared,
            thread: Thread::current(),
            counters: array::from_fn(|_| Counters::default()),
            books: array::from_fn(book),
            active_handlers: Cell::new(0),
            nesting: Cell::new(0),
        }
    }

    /// What the handler of a signal does.
    fn interrupt(&self, signal: usize) {
        let context = 1 + signal;
        // SAFETY: the counters live as long as the worker, and are used by this handler only, which does not interrupt itself.
        let outer = unsafe { workload::enter(&raw const self.counters[context]) };
        let active = self.active_handlers.get() + 1;
        self.active_handlers.set(active);
        self.nesting.set(self.nesting.get().max(active));
        self.make_calls(context, CALLS_BY_HANDLER);
        if signal + 1 < SIGNALS {
            self.thread.raise(signal + 1);
            self.make_calls(context, CALLS_BY_HANDLER);
        }
        self.active_handlers.set(active - 1);
        // SAFETY: these are the interrupted context's, which is the only one to use them.
        unsafe { workload::enter(outer) };
    }

    /// Calls some functions in the given context, which is the running one.
    fn make_calls(&self, context: usize, calls: usize) {
        let counters = &self.counters[context];
        // SAFETY: a context does not interrupt itself, so nobody else has a reference.
        let book = unsafe { &mut *self.books[context].get() };
        for _ in 0..calls {
            let choice = book.random.next();
            // One call in eight holds registers.
            if choice.is_multiple_of(8) {
                let probe = below(PROBES, choice >> 8);
                book.account.held += 1;
                book.observe(self.shared, counters, probe, |held, _| {
                    // SAFETY: counters are entered, and the registers were detected.
                    unsafe { held.call(probe) }.map(Damage::Register)
                });
            } else {
                let functions = if choice & 0x30 == 0 { FUNCTIONS } else { HOT_FUNCTIONS };
                let function = PROBES + below(functions - PROBES, choice >> 8);
                book.observe(self.shared, counters, function, |_, random| {
                    let word = random.next_word();
                    let arguments: [usize; ARGUMENTS] = array::from_fn(|index| word.wrapping_mul(2 * index + 1));
                    // SAFETY: counters are entered.
                    let result = unsafe { workload::call(function, &arguments) };
                    (result != workload::expected_result(function, &arguments)).then_some(Damage::Result)
                });
            }
        }
    }

    /// What all contexts have counted. No context is running any more.
    fn harvest(self: Box<Self>) -> Harvest {
        let Self { counters, books, nesting, .. } = *self;
        let mut books = books.into_iter();
        let accounts = counters.each_ref().map(|counters| {
            let mut account = books.next().map(|book| book.into_inner().account).unwrap_or_default();
            #[expect(clippy::cast_possible_truncation, reason = "the low halves are compared")]
            let seen = counters.seen.iter().map(|count| Wrapping(count.load(Ordering::Relaxed) as u32));
            let runs = counters.own.iter().map(|count| Wrapping(count.load(Ordering::Relaxed)));
            account.close(seen.sum::<Wrapping<u32>>().0, runs.sum::<Wrapping<u32>>().0);
            account
        });
        Harvest { accounts, nesting: nesting.get() }
    }
}

impl Book {
    /// Judges what one call does. `call` makes it, and says what it found to be damaged.
    #[inline]
    fn observe(
        &mut self,
        shared: &Shared,
        counters: &Counters,
        function: usize,
        call: impl FnOnce(&mut Held, &mut Random) -> Option<Damage>,
    ) {
        let known = &shared.functions[function];
        counters.behind_site.store(known.behind_site, Ordering::Relaxed);
        counters.stray.store(0, Ordering::Relaxed);
        let runs_before = counters.own[function].load(Ordering::Relaxed);
        let seen_before: [usize; PLAN.len()] = array::from_fn(|ops| counters.seen[ops].load(Ordering::Relaxed));
        // The steps are read right around the call; see `schedule` for why that is enough.
        let first = shared.schedule.now();
        compiler_fence(Ordering::SeqCst);
        let damage = call(&mut self.held, &mut self.random);
        compiler_fence(Ordering::SeqCst);
        let last = shared.schedule.now();

        let mut seen = Seen::default();
        for (ops, before) in seen_before.into_iter().enumerate() {
            seen.note(ops, counters.seen[ops].load(Ordering::Relaxed).wrapping_sub(before));
        }
        self.account.settle(&shared.schedule.during(first, last, known.covering), &seen);
        let runs = counters.own[function].load(Ordering::Relaxed).wrapping_sub(runs_before);
        let damage = damage
            .or((runs != 1).then_some(Damage::Runs))
            .or((counters.stray.load(Ordering::Relaxed) != 0).then_some(Damage::Site));
        if let Some(damage) = damage {
            self.account.damaged(function, damage);
        }
    }
}

/// xorshift64 (Marsaglia 2003): fast, and safe in signal handlers.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Neighbouring seeds far apart; the state must not be zero.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    #[inline]
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
    fn next_word(&mut self) -> usize {
        self.next() as usize
    }
}

/// A number below `limit`, from random bits: by their product's upper half, without a division.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "both factors have 32 bits, and the result is below `limit`")]
fn below(limit: usize, bits: u64) -> usize {
    ((u64::from(bits as u32) * limit as u64) >> 32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_stay_below_the_limit_and_reach_it() {
        let mut random = Random::new(0);
        let mut met = [false; 12];
        for _ in 0..1000 {
            met[below(met.len(), random.next())] = true;
        }
        assert!(met.into_iter().all(|met| met));
        assert_eq!((below(12, 0), below(12, u64::from(u32::MAX))), (0, 11));
    }

    #[test]
    fn workers_have_numbers_of_their_own() {
        let firsts: Vec<u64> = (0..8).map(|seed| Random::new(seed).next()).collect();
        for (index, first) in firsts.iter().enumerate() {
            assert!(!firsts[..index].contains(first));
        }
    }
}
