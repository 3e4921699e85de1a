//! A patch that comes.
//!
//! Owns [`Coming`]: everything that can be done while the process runs and nobody traces it is [prepared](Coming::prepare), and then [carried out](Coming::carry_out) by
//! whoever does. Invariant: what is given up leaves nothing behind.

use trapline_patch::{Patch, Role, When};

use super::{
    Done, How, LiveError, Process, callback,
    exchange::Exchange,
    objects::Objects,
    prepare::{self, Piece, Prepared},
    state::{self, Active},
    tracing::Tracing,
    transition::Transition,
    unwinder,
    walk::Walker,
};

/// A patch that is fitted to a process.
pub(crate) struct Coming {
    process: Process,
    objects: Objects,
    walker: Walker,
    how: How,
    /// What will be active.
    draft: Active,
    pieces: Vec<Piece>,
    /// What is active.
    active: Vec<Active>,
    /// What is active for the same file.
    previous: Option<Active>,
}

impl Coming {
    /// Fits it.
    pub(crate) fn prepare(process: Process, patch: &Patch, how: How) -> Result<Self, LiveError> {
        if patch.target.mode != process.mode {
            return Err(LiveError::Width { patch: patch.target.mode.bitness(), process: process.mode.bitness() });
        }
        let objects = process.objects()?;
        let target = objects.of_build(&patch.target)?;
        let active = process.patches();
        let previous = active.iter().find(|other| other.bias == target.bias).cloned();
        if let Some(tainted) = previous.as_ref().filter(|previous| previous.is_tainted) {
            return Err(LiveError::Tainted { name: tainted.name.clone() });
        }
        let has_tables = patch.sections.iter().any(|section| section.role == Role::Unwind);
        let unwinders = if has_tables { unwinder::find(&objects, &process.memory) } else { Ok(Vec::new()) };
        let is_tainted = unwinders.is_err() && how.is_forced;
        let unwinders = if is_tainted { Vec::new() } else { unwinders? };
        let Prepared { draft, pieces } =
            prepare::prepare(&process, patch, &objects, target, &unwinders, &active, is_tainted)?;
        let walker = process.walker(&objects, &active);
        Ok(Self { process, objects, walker, how, draft, pieces, active, previous })
    }

    /// Whether nothing is to be changed.
    pub(crate) fn is_dry_run(&self) -> bool {
        self.how.is_dry_run
    }

    /// Has it come.
    pub(crate) fn carry_out(self, tracing: &mut dyn Tracing) -> Result<Done, LiveError> {
        let Self { process, objects, walker, how, draft, pieces, active, previous } = self;
        let exchange = Exchange::new(&process, &draft, previous.as_ref(), &active)?;
        let check = exchange.check();
        let transition = Transition::new(process.pid, &process.memory, how.deadline);
        let replaced = previous.as_ref().map(|previous| previous.name.clone());
        if how.is_dry_run {
            let report = transition.run(tracing, &check, &objects, walker, |_| Ok(()))?;
            return Ok(Done::new(draft, replaced, report));
        }
        let (process, draft) = (&process, &draft);
        process.sweep(tracing)?;
        prepare::place(tracing, process, draft, &pieces)?;
        let changed = callback::call(tracing, process, draft, When::PreApply, how.deadline).and_then(|()| {
            let report = transition.run(tracing, &check, &objects, walker, |still| exchange.commit(still));
            if report.is_err() {
                // As it was accepted, it is told that nothing came of it.
                callback::call(tracing, process, draft, When::PostRevert, how.deadline)?;
            }
            report
        });
        match changed {
            Ok(report) => {
                callback::call(tracing, process, draft, When::PostApply, how.deadline)?;
                Ok(Done::new(draft.clone(), replaced, report))
            }
            Err(error) => {
                // Where not even the old code could be written back, new code stays. What is left if this fails is swept by the next command.
                if state::is_unused(&process.memory, draft) {
                    let _ = process.unmap(tracing, draft);
                }
                Err(error)
            }
        }
    }
}
