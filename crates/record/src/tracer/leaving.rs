//! Leaving the processes that are recorded.
//!
//! Owns how the [tracer](crate::tracer) has [`crate::leave`] do it: in a stop of all threads, those who are inside let go on alone for moments, and tried again until nobody is in the
//! agent. Invariant: whoever is left is as it was, or is told of.

use std::time::{Duration, Instant};

use trapline_engine::Addr;

use super::{
    Task, Tracer,
    attach::{PAUSE, PERSISTENCE},
    stop::Crowd,
};
use crate::{
    drain::{Message, SpaceId},
    leave::{self, Inside},
    space::Space,
    sys::{Tid, memory::Memory},
};

/// Until when those who are inside are let go on alone, while all others stand still, since these began to stop; but for [`LEAST_NUDGING`] in any case. The
/// second one counts from then on, when that has not been enough for long, as they get no processor.
const NUDGING: (Duration, Duration) = (Duration::from_millis(11), Duration::from_millis(100));
const LEAST_NUDGING: Duration = Duration::from_millis(2);

/// How long each of them goes on, at first and at most: who gets a processor at once is out of the agent long before that. [`LONGEST_MOMENT`] is for those
/// who get none.
const MOMENT: (Duration, Duration) = (Duration::from_micros(50), Duration::from_micros(400));
const LONGEST_MOMENT: Duration = Duration::from_millis(10);

impl Tracer<'_> {
    /// Lets those go that are loading a new program.
    fn abandon_loading(&mut self, started: Instant) {
        let loading = |tasks: &std::collections::HashMap<Tid, Task>| {
            tasks.values().find(|task| task.loading.is_some()).map(|task| task.process)
        };
        while let Some(process) = loading(&self.tasks) {
            let crowd = Crowd::Process(process);
            if let Some(still) = self.stop(crowd, self.patience(crowd, started)) {
                for tid in still.threads() {
                    let image = self.tasks.get_mut(&tid).and_then(|task| task.loading.take());
                    if let (Some(image), Ok(memory)) = (image, Memory::open(tid)) {
                        // An error means that it is gone.
                        let _ = image.abandon(tid, &memory);
                    }
                }
                self.release_all(&still);
            }
            if started.elapsed() > PERSISTENCE {
                break;
            }
        }
    }

    /// Leaves all processes that are recorded.
    pub(super) fn leave_all(&mut self) {
        self.is_leaving = true;
        let started = Instant::now();
        self.abandon_loading(started);
        while let Some(id) = self.spaces.keys().next().copied() {
            if let Err(inside) = self.leave(id, started) {
                let text = format!("thread {} is still at {}; the agent stays in its process", inside.tid, inside.at);
                self.outcome.left.push(text);
                self.forget_space(id);
            }
        }
    }

    fn forget_space(&mut self, id: SpaceId) {
        self.tasks.retain(|_, task| task.space != Some(id));
        if let Some(space) = self.spaces.remove(&id) {
            if let Some(pool) = &space.pool {
                pool.close();
            }
            self.let_go(id);
        }
    }

    /// Nobody uses a memory any more, or it is left.
    pub(super) fn let_go(&self, id: SpaceId) {
        if let Some(figures) = self.drain.figures() {
            figures.ended(id, None);
        }
        self.drain.tell(Message::SpaceEnded(id));
        if let Some(guard) = &self.guard {
            guard.let_go(id);
        }
    }

    /// Tells the guard what a process has of ours now.
    pub(super) fn tell_guard(&self, id: SpaceId, pid: Tid) {
        let footprint = self.spaces.get(&id).and_then(Space::footprint);
        if let (Some(guard), Some(footprint)) = (&self.guard, footprint) {
            guard.hold(id, pid, &footprint);
        }
    }

    /// Leaves a process, or says who is in the way.
    fn leave(&mut self, id: SpaceId, started: Instant) -> Result<(), Inside> {
        let mut inside = Inside { tid: 0, at: Addr::default() };
        let mut pause = PAUSE.0;
        loop {
            let space = self.spaces.get(&id).and_then(|space| Some((space.footprint()?, space.memory.clone()?)));
            let Some((mut footprint, memory)) = space else {
                self.forget_space(id);
                return Ok(());
            };
            let patience = self.patience(Crowd::Space(id), started);
            if let Some(mut still) = self.stop(Crowd::Space(id), patience) {
                let is_starved = started.elapsed() > PERSISTENCE / 8;
                let mut until = None;
                // An error, here and below, means that the process is about to end.
                let _ = footprint.hold_unwinders(&memory, true);
                let mut moment = MOMENT.0;
                loop {
                    let threads = still.threads();
                    let led = footprint.disarm(&memory).and_then(|()| footprint.lead_out(&threads, &memory));
                    // An error means that a thread was killed: the whole process is about to end.
                    let Ok(still_inside) = led else { break };
                    let Some(first) = still_inside.first() else {
                        if let Err(error) = leave::withdraw(&threads, &footprint, &memory) {
                            self.outcome.left.push(error.0);
                        }
                        self.release_all(&still);
                        self.forget_space(id);
                        return Ok(());
                    };
                    inside = *first;
                    let tids: Vec<Tid> = still_inside.iter().map(|inside| inside.tid).collect();
                    let until = *until.get_or_insert_with(|| {
                        let now = Instant::now();
                        if is_starved { now + NUDGING.1 } else { (still.since + NUDGING.0).max(now + LEAST_NUDGING) }
                    });
                    if !self.nudge(&mut still, &tids, moment, until) {
                        break;
                    }
                    moment = (moment * 2).min(if is_starved { LONGEST_MOMENT } else { MOMENT.1 });
                }
                let _ = footprint.hold_unwinders(&memory, false);
                self.resume_all(&still);
            }
            if started.elapsed() > PERSISTENCE {
                return Err(inside);
            }
            let heard = std::mem::take(&mut self.heard);
            // Whoever wants us to end has said so already.
            let _ = self.attend(Instant::now() + pause);
            self.heard = heard;
            pause = (pause * 2).min(PAUSE.1);
        }
    }
}
