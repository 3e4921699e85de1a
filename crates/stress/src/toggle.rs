//! The thread that makes ops come and go.
//!
//! Owns [`Toggler`]: the registered ops of the [`plan`](crate::plan), and the walk through its rotation as fast as it goes. Neighbours: it tells
//! the [`schedule`](crate::schedule) what is attached, before and after each change, and counts which sites each change pokes. Invariant:
//! every change lies between its announcement and its close; what the schedule says is attached, is.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use trapline_process::{Error, Filter, Ops, Stats, Tracer};

use crate::{
    StressError,
    account::Phase,
    plan::{ALWAYS, Change, PLAN, SHORT_LIVED, rotation},
    schedule::{Schedule, Windows},
    worker::Function,
    workload,
};

/// Rounds of which one has the short-lived ops in it.
const ROUNDS_BY_SHORT_LIVED: usize = 2;

/// How long unregistered ops may take to be left by all threads.
const SYNCHRONIZE_DEADLINE: Duration = Duration::from_secs(10);

/// Functions that the same windows cover change together: which windows, and how many functions.
type Class = (Windows, u64);

/// The ops, and what they are attached to.
pub(crate) struct Toggler<'a> {
    tracer: &'a Tracer,
    schedule: &'a Schedule,
    /// The filters of each ops, as planned.
    filters: Vec<Vec<Filter>>,
    /// By number; the short-lived one is there at times only.
    ops: Vec<Option<Ops>>,
    attached: Windows,
    classes: Vec<Class>,
    /// What the tracer had done before the first change.
    before: Stats,
    /// Rewritten sites, in the order of [`Phase::ALL`].
    pokes: [u64; Phase::ALL.len()],
}

impl<'a> Toggler<'a> {
    /// Registers all ops but the short-lived one, and attaches the one that stays attached.
    pub(crate) fn new(tracer: &'a Tracer, schedule: &'a Schedule, functions: &[Function]) -> Result<Self, StressError> {
        let filters = PLAN.iter().map(|planned| (0..2).map_while(|which| planned.filter(which)).collect()).collect();
        let mut toggler = Self {
            tracer,
            schedule,
            filters,
            ops: Vec::new(),
            attached: Windows::of(ALWAYS, 0),
            classes: classes(functions),
            before: Stats::default(),
            pokes: [0; Phase::ALL.len()],
        };
        for number in 0..PLAN.len() {
            let ops = if number == SHORT_LIVED { None } else { Some(toggler.register(number, false)?) };
            toggler.ops.push(ops);
        }
        toggler.known(ALWAYS)?.enable().map_err(|error| failed("attach", ALWAYS, error))?;
        toggler.before = tracer.stats();
        Ok(toggler)
    }

    /// Walks through the rotation again and again, until `stop` says that it is time.
    pub(crate) fn run(&mut self, stop: impl Fn() -> bool) -> Result<(), StressError> {
        let (usual, full) = (rotation(false), rotation(true));
        for round in 1_usize.. {
            let changes = if round.is_multiple_of(ROUNDS_BY_SHORT_LIVED) { &full } else { &usual };
            for change in changes {
                if stop() {
                    return Ok(());
                }
                self.make(*change)?;
            }
        }
        Ok(())
    }

    /// Detaches and unregisters everything, and returns what the tracer has done from the first change to the last, and which sites were
    /// rewritten.
    pub(crate) fn finish(self) -> Result<(Stats, [u64; Phase::ALL.len()]), StressError> {
        let mut stats = self.tracer.stats();
        stats.batches -= self.before.batches;
        stats.pokes -= self.before.pokes;
        stats.syncs -= self.before.syncs;
        drop(self.ops);
        self.tracer.synchronize(SYNCHRONIZE_DEADLINE).map_err(StressError::Leave)?;
        Ok((stats, self.pokes))
    }

    fn make(&mut self, change: Change) -> Result<(), StressError> {
        let next = change.apply(self.attached);
        self.schedule.announce(next);
        self.carry_out(change)?;
        self.schedule.close();
        for (covering, functions) in &self.classes {
            let (before, after) = (self.attached.ops_in(*covering), next.ops_in(*covering));
            if before != after {
                self.pokes[Phase::change(before.len(), after.len()) as usize] += functions;
            }
        }
        self.attached = next;
        Ok(())
    }

    fn carry_out(&mut self, change: Change) -> Result<(), StressError> {
        match change {
            Change::Enable(number) => self.known(number)?.enable().map_err(|error| failed("attach", number, error)),
            Change::Disable(number) => self.known(number)?.disable().map_err(|error| failed("detach", number, error)),
            Change::SetFilter(number, which) => {
                let filter = self.filters[number][which].clone();
                self.known(number)?.set_filter(filter).map_err(|error| failed("give another filter to", number, error))
            }
            Change::Register(number) => {
                self.ops[number] = Some(self.register(number, true)?);
                Ok(())
            }
            Change::Unregister(number) => {
                self.ops[number] = None;
                Ok(())
            }
        }
    }

    fn known(&self, number: usize) -> Result<&Ops, StressError> {
        self.ops[number].as_ref().ok_or(StressError::Plan(number))
    }

    fn register(&self, number: usize, attached: bool) -> Result<Ops, StressError> {
        let planned = &PLAN[number];
        let builder = self.tracer.ops(planned.name).filter(self.filters[number][0].clone()).recursion_safe();
        let builder = if attached { builder } else { builder.disabled() };
        let ops = match workload::raw_callback(planned.consumer, number) {
            // SAFETY: the callback needs a thread that has entered counters, as workers have as long as they call traced functions,
            // and nobody else calls them. Its data is no pointer to anything.
            Some((callback, data)) => unsafe { builder.register_raw(callback, data) },
            None => builder.register(move |call| {
                let behind_site = workload::behind(call.site());
                // SAFETY: as above; the table of ops is not longer than there is room for.
                unsafe { workload::note(number, behind_site) }
            }),
        };
        ops.map_err(|error| failed("register", number, error))
    }
}

fn failed(what: &'static str, ops: usize, source: Error) -> StressError {
    StressError::Change { what, ops: PLAN[ops].name, source }
}

/// How many functions each set of windows covers.
fn classes(functions: &[Function]) -> Vec<Class> {
    let mut classes: Vec<Class> = Vec::new();
    for function in functions {
        match classes.iter_mut().find(|(covering, _)| *covering == function.covering) {
            Some((_, count)) => *count += 1,
            None => classes.push((function.covering, 1)),
        }
    }
    classes
}

/// Lets go of the workers whatever happens: a thread that is never told to stop would be waited for.
pub(crate) struct StopWorkers<'a>(pub(crate) &'a AtomicBool);

impl Drop for StopWorkers<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
