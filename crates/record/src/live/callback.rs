//! Functions of a patch that are called when it comes or goes.
//!
//! Owns [`call`]. A [borrowed](super::tracing::Tracing::borrow) thread calls the function as if for a signal: with all signals blocked that do not mean that it failed, on a frame that takes
//! it back to where it was even if we are gone. So the function may do what a signal handler may (signal-safety(7)).

use std::time::Duration;

use trapline_engine::Addr;
use trapline_patch::When;

use super::{
    LiveError, Process,
    state::Active,
    tracing::{self, Tracing},
};
use crate::remote::CallOutcome;

/// Calls the function that a patch has for this moment, if it has one.
pub(super) fn call(
    tracing: &mut dyn Tracing,
    process: &Process,
    patch: &Active,
    when: When,
    deadline: Duration,
) -> Result<(), LiveError> {
    let Some(function) = patch.callback(when) else { return Ok(()) };
    let callback = || format!("trapline_{}", when.code());
    let outcome = tracing::borrow(tracing, process, |remote| remote.call(Addr::new(patch.call_at), function, deadline));
    let failed = |what: String| Err(LiveError::Callback { callback: callback(), what });
    match outcome.map_err(process.system("having a thread call a function of the patch"))? {
        CallOutcome::Returned(0) => Ok(()),
        CallOutcome::Returned(answer) => match when {
            When::PreApply | When::PreRevert => {
                Err(LiveError::Vetoed { callback: callback(), answer, is_apply: when == When::PreApply })
            }
            // What these say changes nothing.
            When::PostApply | When::PostRevert => Ok(()),
        },
        CallOutcome::Failed { signal, at } => failed(format!("was ended by signal {signal} at {at}")),
        CallOutcome::StillRuns => failed(format!("did not return within {} s", deadline.as_secs_f32())),
    }
}
