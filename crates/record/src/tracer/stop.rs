//! Threads of the traced tree standing still, for a moment.
//!
//! Owns [`Still`] and how the [tracer](crate::tracer) makes one. It traces the threads for long, so they are only interrupted; what happens to them and to
//! others meanwhile is seen to as ever, but that a thread of the crowd stays where it stopped. Invariant: whoever stopped goes on, with the signal that it was about
//! to get; a process that was stopped stays so. If not all of them stop in time, all go on.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::{Task, Tracer};
use crate::{
    drain::SpaceId,
    sys::{
        Tid, by_processors,
        ptrace::{self, Stop},
        spawn::{self, Urgent},
    },
};

/// Whose threads are to stand still.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Crowd {
    /// Those of a process, by its number.
    Process(u32),
    /// Those that use a memory.
    Space(SpaceId),
    /// One thread.
    Thread(Tid),
    /// Those of all processes that are traced.
    All,
}

impl Crowd {
    pub(super) fn has(self, tid: Tid, task: &Task) -> bool {
        match self {
            Self::Thread(one) => tid == one,
            Self::Process(process) => task.process == process,
            Self::Space(space) => task.space == Some(space),
            Self::All => task.space.is_some(),
        }
    }
}

/// How a thread goes on that stands still.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Parked {
    /// With this signal, or 0.
    With(i32),
    /// Not before its group does.
    Stopped,
}

/// A crowd that stands still.
#[derive(Debug)]
pub(super) struct Still {
    crowd: Crowd,
    /// Its threads.
    pub(super) parked: HashMap<Tid, Parked>,
    /// When they began to stop.
    pub(super) since: Instant,
    _urgent: Urgent,
}

impl Still {
    /// The threads.
    pub(super) fn threads(&self) -> Vec<Tid> {
        let mut threads: Vec<Tid> = self.parked.keys().copied().collect();
        threads.sort_unstable();
        threads
    }
}

/// How long threads stood still.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stops {
    /// How often.
    pub count: u32,
    /// The longest time.
    pub longest: Duration,
}

/// How often it is looked for threads that have ended and are not reported.
const LOOK_AROUND: Duration = Duration::from_millis(10);

/// How long a few threads that went on for a moment may take to stand still again.
const STOPPING: Duration = Duration::from_millis(2);

impl Tracer<'_> {
    /// Stops a crowd; `None` if not all of them stop in time, or none is left.
    pub(super) fn stop(&mut self, crowd: Crowd, patience: Duration) -> Option<Still> {
        let since = Instant::now();
        let mut still = Still { crowd, parked: HashMap::new(), since, _urgent: Urgent::new() };
        for (tid, task) in &self.tasks {
            if crowd.has(*tid, task) {
                // Who is gone is reported.
                let _ = ptrace::interrupt(*tid);
            }
        }
        if self.settle(&mut still, since + patience) {
            return (!still.parked.is_empty()).then_some(still);
        }
        self.resume_all(&still);
        None
    }

    /// Lets some of a crowd go on, each for a moment, while the others stand still. Returns whether all of them have, and stand still again, until then or soon afterwards.
    pub(super) fn nudge(&mut self, still: &mut Still, tids: &[Tid], moment: Duration, until: Instant) -> bool {
        by_processors(tids).all(|some| {
            if Instant::now() > until {
                return false;
            }
            for tid in some {
                if let Some(Parked::With(signal)) = still.parked.get(tid).copied() {
                    still.parked.remove(tid);
                    // Who is gone is reported.
                    let _ = ptrace::resume(*tid, signal);
                }
            }
            std::thread::sleep(moment);
            for tid in some {
                let _ = ptrace::interrupt(*tid);
            }
            self.settle(still, until + STOPPING)
        })
    }

    /// Waits until all of a crowd stand still that were interrupted. Returns whether they do in time.
    fn settle(&mut self, still: &mut Still, until: Instant) -> bool {
        loop {
            match ptrace::poll_any() {
                Ok(Some((tid, stop))) => {
                    // Others may have events without end, and the crowd is not to wait for them. Who is not known yet may be one of the crowd.
                    let is_others = self.tasks.get(&tid).is_some_and(|task| !still.crowd.has(tid, task));
                    self.park(still, tid, stop);
                    if is_others && self.is_settled(still) {
                        return true;
                    }
                    continue;
                }
                Ok(None) if self.is_settled(still) => return true,
                Ok(None) => {}
                Err(_) => return self.is_settled(still),
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
            // Rounded up: a wait for nothing is none.
            let patience = (left + Duration::from_millis(1)).min(LOOK_AROUND);
            let begun = Instant::now();
            let heard = self.inbox.wait(patience).unwrap_or_default();
            self.heard.extend(heard);
            if begun.elapsed() >= patience {
                self.find_zombies(still);
            }
        }
    }

    /// Whether all of a crowd stand still.
    pub(super) fn is_settled(&self, still: &Still) -> bool {
        let mut members = self.tasks.iter().filter(|(tid, task)| still.crowd.has(**tid, task));
        members.all(|(tid, _)| still.parked.contains_key(tid) || self.zombies.contains(tid))
    }

    /// A first thread that has ended is not reported before the last one has.
    fn find_zombies(&mut self, still: &Still) {
        let missing =
            self.tasks.iter().filter(|(tid, task)| still.crowd.has(**tid, task) && !still.parked.contains_key(tid));
        let is_zombie = |tid: &Tid| super::status_field(*tid, "State:").is_some_and(|state| state.starts_with('Z'));
        let zombies: Vec<Tid> = missing.map(|(tid, _)| *tid).filter(is_zombie).collect();
        self.zombies.extend(zombies);
    }

    fn park(&mut self, still: &mut Still, tid: Tid, stop: Stop) {
        if matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
            still.parked.remove(&tid);
            return self.stopped(tid, stop);
        }
        if !self.tasks.get(&tid).is_some_and(|task| still.crowd.has(tid, task)) {
            return self.stopped(tid, stop);
        }
        let _ = ptrace::hide_interruption(tid);
        let is_new = self.expected.remove(&tid);
        let parked = match stop {
            Stop::Fork | Stop::Vfork | Stop::Clone => {
                if let Err(error) = self.try_created(tid, stop) {
                    self.note_failure(tid, &error);
                }
                self.interrupt_child(still, tid);
                Parked::With(0)
            }
            Stop::VforkDone => {
                self.has_vforked(tid);
                Parked::With(0)
            }
            Stop::Exec => {
                still.parked.remove(&tid);
                return self.stopped(tid, stop);
            }
            Stop::WithItsGroup => Parked::Stopped,
            Stop::Signal(libc::SIGTRAP) if self.is_at_poked_site(tid) => Parked::With(0),
            Stop::Signal(libc::SIGSEGV) if self.has_lost_segment(tid) => Parked::With(0),
            Stop::Signal(signal) => Parked::With(signal),
            _ => Parked::With(0),
        };
        if is_new {
            for signal in self.began(tid) {
                spawn::kill(tid, signal);
            }
        }
        still.parked.insert(tid, parked);
    }

    /// A child that had stopped before its parent told of it runs by now. It was not there when the crowd was interrupted.
    fn interrupt_child(&self, still: &Still, parent: Tid) {
        let Ok(child) = ptrace::event_message(parent) else { return };
        let Ok(child) = Tid::try_from(child) else { return };
        if self.tasks.get(&child).is_some_and(|task| still.crowd.has(child, task)) && !self.expected.contains(&child) {
            // Who is gone is reported.
            let _ = ptrace::interrupt(child);
        }
    }

    /// Lets all go on.
    pub(super) fn resume_all(&mut self, still: &Still) {
        for (tid, parked) in &still.parked {
            // An error means that the thread is gone.
            let _ = match parked {
                Parked::With(signal) => ptrace::resume(*tid, *signal),
                Parked::Stopped => ptrace::listen(*tid),
            };
            if self.requests.contains_key(tid) {
                // It waits for us to look at its objects, and has stopped for something else.
                let _ = ptrace::interrupt(*tid);
            }
        }
        self.was_still(still);
    }

    /// Lets all go for good.
    pub(super) fn release_all(&mut self, still: &Still) {
        for (tid, parked) in &still.parked {
            let signal = match parked {
                Parked::With(signal) => *signal,
                Parked::Stopped => 0,
            };
            let _ = ptrace::detach(*tid, signal);
            self.tasks.remove(tid);
            self.requests.remove(tid);
        }
        self.was_still(still);
    }

    fn was_still(&mut self, still: &Still) {
        self.outcome.stops.count += 1;
        let longest = &mut self.outcome.stops.longest;
        *longest = (*longest).max(still.since.elapsed());
    }
}
