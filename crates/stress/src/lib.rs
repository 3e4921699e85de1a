//! trapline's stress test: does any call get lost, does any register get damaged, while functions are traced that threads run?
//!
//! [`run`] is the entry point: it takes [`Options`] and returns a [`Report`]. Threads call a thousand traced C functions as fast as they can,
//! interval timers interrupt them with signal handlers that call traced functions too, and another thread attaches and detaches ops all
//! the while:
//!
//! ```text
//! plan --> toggle --> Tracer (enable, disable, set_filter, register, drop)
//!             |
//!             +-----> schedule --------+
//!                                      v
//! worker --> workload, registers --> account --> report
//! ```
//!
//! `plan` says who traces what; `toggle` makes the changes and announces them in the `schedule`; `worker` calls functions and asks
//! the schedule, for each single call, which ops had to see it; `account` compares that with what the ops counted; `workload` and
//! `registers` are the way to the C and assembly code that is traced.
//!
//! Invariant: the counts are exact. There is no tolerance, and no call that is left out: also in the middle of a change an ops that is attached
//! before and after it must see every call (I1), and the registers that threads hold must survive everything (I4).
//!
//! ```no_run
//! use trapline_process::Resume;
//! use trapline_stress::{MAX_SLOTS, Options, Verdict, run};
//!
//! let report = run(&Options { seconds: 10, threads: 4, resume: Resume::Slots, slots: MAX_SLOTS })?;
//! assert_eq!(report.verdict(), Verdict::Clean);
//! # Ok::<(), trapline_stress::StressError>(())
//! ```

mod account;
mod plan;
mod registers;
mod report;
mod schedule;
mod signals;
mod toggle;
mod worker;
mod workload;

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

pub use account::{Account, Damage, Example, Phase, Tally};
pub use registers::{Register, Vectors};
pub use report::{CONTEXT_NAMES, Report, Verdict, strategy_name};
use trapline_process::{Error, Mode, Resume, Tracer};
pub use workload::FUNCTIONS;

use crate::{
    plan::{ALWAYS, PLAN},
    schedule::{Schedule, Windows},
    signals::Handlers,
    toggle::{StopWorkers, Toggler},
    worker::{Function, Harvest, Shared},
};

/// The most slots that a thread can be allowed to use.
pub const MAX_SLOTS: usize = 16;

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// For how long functions are called and ops toggled.
    pub seconds: u32,
    /// How many threads call functions. One more toggles.
    pub threads: usize,
    /// How a call that meets a breakpoint is resumed.
    pub resume: Resume,
    /// How many slots a thread may use, up to [`MAX_SLOTS`]. With less than four, nested signal handlers overflow them.
    pub slots: usize,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StressError {
    /// The strategy cannot work at this width.
    #[error(transparent)]
    Refused(Error),
    /// The tracer could not be set up.
    #[error("cannot set the tracer up")]
    Tracer(#[source] Error),
    /// A function of the workload is no site.
    #[error(
        "{missing} of {FUNCTIONS} functions of the workload cannot be traced, {first} among them; is the executable stripped?"
    )]
    NotTraced {
        /// How many.
        missing: usize,
        /// The name of one.
        first: String,
    },
    /// An ops could not be changed.
    #[error("cannot {what} the ops \"{ops}\"")]
    Change {
        /// What was tried.
        what: &'static str,
        /// The name of the ops.
        ops: &'static str,
        /// Why not.
        source: Error,
    },
    /// The plan changes an ops that is not registered.
    #[error("the plan changes ops number {0}, which is not registered; this is a mistake in the plan")]
    Plan(usize),
    /// A thread could not be started.
    #[error("cannot start thread {number} of {threads}; ask for fewer")]
    Spawn {
        /// Which one, from 1.
        number: usize,
        /// How many were asked for.
        threads: usize,
        /// The system's answer.
        source: io::Error,
    },
    /// A signal handler, timer or stack could not be had.
    #[error("cannot set signals and timers up; each thread needs three timers, see `ulimit -i`")]
    Signals(#[source] io::Error),
    /// Threads are still in unregistered ops although they have ended.
    #[error("threads may still be inside unregistered ops")]
    Leave(#[source] Error),
    /// The functions were not restored.
    #[error("{0} of {FUNCTIONS} functions do not have their original code back")]
    NotRestored(usize),
}

/// Stack of a worker, bytes: signal frames of several KiB each lie on it.
const STACK_BYTES: usize = 256 << 10;

/// Runs the stress test. There can be only one tracer in a process, so there can be only one run at a time.
///
/// # Errors
/// See [`StressError`]. Losses are no error: they are in the report.
///
/// # Panics
/// If a worker panics, which is a mistake in this crate.
pub fn run(options: &Options) -> Result<Report, StressError> {
    let before = workload::text();
    let tracer =
        Tracer::builder().resume(options.resume).slot_limit(options.slots).build().map_err(|error| match error {
            Error::Resume(_) => StressError::Refused(error),
            _ => StressError::Tracer(error),
        })?;
    let vectors = Vectors::detect();
    // SAFETY: no worker has been started.
    unsafe { workload::spoil(vectors) };
    let shared = Shared {
        schedule: Schedule::new(Windows::of(ALWAYS, 0)),
        functions: functions(&tracer)?,
        vectors,
        r11_is_held: options.resume != Resume::R11,
        stop: AtomicBool::new(false),
    };
    let mut toggler = Toggler::new(&tracer, &shared.schedule, &shared.functions[..])?;
    // SAFETY: the handler does nothing but what a worker does, in threads that have one.
    let handlers = unsafe { Handlers::install(worker::on_signal) }.map_err(StressError::Signals)?;
    let begin = Instant::now();
    let harvest = harvest(options, &shared, &mut toggler, begin + Duration::from_secs(options.seconds.into()))?;
    let elapsed = begin.elapsed();
    drop(handlers);
    let text_writer = tracer.text_writer();
    let (stats, pokes) = toggler.finish()?;
    drop(tracer);
    let changed = before.iter().zip(workload::text()).filter(|(before, after)| **before != *after).count();
    if changed > 0 {
        return Err(StressError::NotRestored(changed));
    }
    Ok(Report {
        options: *options,
        width: Mode::NATIVE.bitness(),
        vectors,
        text_writer,
        elapsed,
        stats,
        pokes,
        contexts: harvest.accounts,
        nesting: harvest.nesting,
    })
}

/// Runs workers and toggler until the deadline, and adds up what the workers found.
fn harvest(
    options: &Options,
    shared: &Shared,
    toggler: &mut Toggler,
    deadline: Instant,
) -> Result<Harvest, StressError> {
    thread::scope(|scope| {
        let stop_workers = StopWorkers(&shared.stop);
        let mut threads = Vec::with_capacity(options.threads);
        for number in 1..=options.threads {
            let builder = thread::Builder::new().name(format!("worker {number}")).stack_size(STACK_BYTES);
            let thread = builder.spawn_scoped(scope, move || {
                // A worker that cannot begin ends the run.
                worker::work(shared, number).inspect_err(|_| shared.stop.store(true, Ordering::Relaxed))
            });
            threads.push(thread.map_err(|source| StressError::Spawn { number, threads: options.threads, source })?);
        }
        let outcome = toggler.run(|| shared.stop.load(Ordering::Relaxed) || Instant::now() >= deadline);
        drop(stop_workers);
        let mut all = Harvest::default();
        let mut failure = None;
        for thread in threads {
            match thread.join().expect("workers do not panic") {
                Ok(harvest) => all.add(&harvest),
                Err(error) => failure = Some(error),
            }
        }
        outcome?;
        failure.map_or(Ok(all), |error| Err(StressError::Signals(error)))
    })
}

/// What is known of the traced functions: where their sites are, and who traces them.
fn functions(tracer: &Tracer) -> Result<Box<[Function]>, StressError> {
    let sites: std::collections::HashMap<String, _> = tracer.sites().map(|site| (site.name, site.address)).collect();
    let missing: Vec<String> = (0..FUNCTIONS).map(workload::name).filter(|name| !sites.contains_key(name)).collect();
    if let Some(first) = missing.first() {
        return Err(StressError::NotTraced { missing: missing.len(), first: first.clone() });
    }
    let function = |number| {
        let name = workload::name(number);
        let site = sites[&name];
        let mut covering = Windows::NONE;
        for (ops, planned) in PLAN.iter().enumerate() {
            for which in 0..2 {
                if planned.filter(which).is_some_and(|filter| filter.matches(&name, site)) {
                    covering = covering.with(Windows::of(ops, which));
                }
            }
        }
        Function { covering, behind_site: workload::behind(site) }
    };
    Ok((0..FUNCTIONS).map(function).collect())
}
