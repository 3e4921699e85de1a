//! A patch that goes.
//!
//! Owns [`Going`], with the same two halves as [`Coming`](super::coming::Coming). Invariant: what is given up stays as it is.

use std::time::Duration;

use trapline_patch::When;

use super::{
    Done, LiveError, Process, callback, exchange,
    objects::Objects,
    state::{self, Active},
    tracing::Tracing,
    transition::Transition,
    walk::Walker,
};
use crate::inject::Gadgets;

/// A patch that is to go, and that may.
pub(crate) struct Going {
    process: Process,
    objects: Objects,
    walker: Walker,
    deadline: Duration,
    gadgets: Gadgets,
    /// It.
    patch: Active,
    /// What is active.
    active: Vec<Active>,
}

impl Going {
    /// Finds the one of this name, or the only one.
    pub(crate) fn prepare(process: Process, name: Option<&str>, deadline: Duration) -> Result<Self, LiveError> {
        let active = process.patches();
        let names = || active.iter().map(|patch| patch.name.clone()).collect::<Vec<_>>().join(", ");
        let mut matching = active.iter().filter(|patch| name.is_none_or(|name| patch.name == name));
        let none = || LiveError::NoSuchPatch { pid: process.pid, names: names() };
        let patch = matching.next().ok_or_else(none)?.clone();
        if matching.next().is_some() {
            return Err(LiveError::WhichPatch { names: names() });
        }
        if patch.is_tainted {
            return Err(LiveError::Tainted { name: patch.name });
        }
        let objects = process.objects()?;
        let gadgets = process.gadgets(&patch.memory()).map_err(process.system("having it make system calls"))?;
        let walker = process.walker(&objects, &active);
        Ok(Self { process, objects, walker, deadline, gadgets, patch, active })
    }

    /// Has it go.
    pub(crate) fn carry_out(self, tracing: &mut dyn Tracing) -> Result<Done, LiveError> {
        let Self { process, objects, walker, deadline, gadgets, patch, active } = self;
        callback::call(tracing, &process, &patch, When::PreRevert, deadline)?;
        let has_last_word = patch.callback(When::PostRevert).is_some();
        let memory = &process.memory;
        let transition = Transition::new(process.pid, memory, deadline);
        let reverted = transition.run(tracing, &patch.ranges_after(), &objects, walker, |still| {
            exchange::restore(still, memory, process.mode, &patch, &active)?;
            if has_last_word {
                return Ok(());
            }
            // It is only memory now, and swept by the next command if this fails.
            let _ = still.errand(memory, gadgets, &mut |remote| state::give_back(remote, memory, &patch));
            Ok(())
        });
        match reverted {
            Ok(report) => {
                if has_last_word {
                    let called = callback::call(tracing, &process, &patch, When::PostRevert, deadline);
                    let _ = process.unmap(tracing, &patch);
                    called?;
                }
                Ok(Done::new(patch, None, report))
            }
            Err(error) => {
                // As it agreed to go, it is told that it stays.
                callback::call(tracing, &process, &patch, When::PostApply, deadline)?;
                Err(error)
            }
        }
    }
}
