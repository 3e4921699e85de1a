//! What is written while all threads stand still.
//!
//! Owns [`Exchange`], by which a patch comes, in the place of one that was there or not, and [`restore`], by which it goes. Invariants: everything is as expected before the
//! first write; what fails in the middle is taken back (I5). A command that is killed in the middle leaves the status
//! [`Changing`](Status::Changing), and [`restore`] puts that right.

use std::io;

use trapline_engine::{Addr, AddrRange, Mode};
use trapline_patch::When;

use super::{
    JUMP_BYTES, LiveError, Process,
    state::{self, Active, Called, Replaced, Status},
    tracing::Standstill,
    transition::Check,
    unwinder::Detour,
};
use crate::{inject::Gadgets, remote::Remote, sys::memory::Memory};

/// Bytes to be written.
struct Edit {
    function: String,
    at: Addr,
    before: Vec<u8>,
    after: Vec<u8>,
}

/// Everything by which a patch comes.
pub(super) struct Exchange<'a> {
    memory: &'a Memory,
    mode: Mode,
    gadgets: Gadgets,
    draft: &'a Active,
    previous: Option<&'a Active>,
    edits: Vec<Edit>,
    detours: Vec<Detour>,
}

impl<'a> Exchange<'a> {
    /// Compares the process's code with what the patch expects.
    pub(super) fn new(
        process: &'a Process,
        draft: &'a Active,
        previous: Option<&'a Active>,
        active: &[Active],
    ) -> Result<Self, LiveError> {
        let ours = previous.map_or_else(Vec::new, Active::memory);
        let gadgets = process.gadgets(&ours).map_err(process.system("having it make system calls"))?;
        let edits = edits(draft, previous);
        if let Some(short) = draft.functions.iter().find(|function| function.original.len() < JUMP_BYTES) {
            return Err(LiveError::TooShort { function: short.name.clone() });
        }
        for Edit { function, at, before, .. } in &edits {
            let there = process.code(*at, before.len());
            if there.map_err(process.system("reading the code of its functions"))? != *before {
                return Err(LiveError::OtherCode { function: function.clone(), at: *at });
            }
        }
        let detours = active.iter().chain([draft]).flat_map(|patch| patch.detours.clone()).collect();
        Ok(Self { memory: &process.memory, mode: process.mode, gadgets, draft, previous, edits, detours })
    }

    /// Where nobody may be.
    pub(super) fn check(&self) -> Check {
        let before = self.draft.ranges_before();
        let previous = self.previous.map(Active::ranges_after);
        previous.into_iter().fold(before, Check::and_all)
    }

    /// Diverts all functions, and has the previous patch's memory unmapped by a thread. Nobody is in them, and nobody moves.
    pub(super) fn commit(&self, still: &mut dyn Standstill) -> io::Result<()> {
        for Edit { function, at, before, .. } in &self.edits {
            if still.read_code(self.memory, *at, before.len())? != *before {
                return Err(io::Error::other(format!("{function} was changed meanwhile")));
            }
        }
        state::set_status(self.memory, self.draft, Status::Changing)?;
        let written = self.write(still);
        if let Err(error) = written {
            for Edit { at, before, .. } in &self.edits {
                still.write_code(self.memory, *at, before)?;
            }
            self.draft.detours.iter().try_for_each(|detour| self.remove(still, detour))?;
            state::set_status(self.memory, self.draft, Status::Preparing)?;
            return Err(error);
        }
        state::set_status(self.memory, self.draft, Status::Active)?;
        let Some(previous) = self.previous else { return Ok(()) };
        // What fails from here on leaves memory that nothing leads to, and is swept by the next command if nothing of it is needed.
        let mut detours = previous.detours.iter();
        if detours.all(|detour| self.remove(still, detour).is_ok())
            && state::set_status(self.memory, previous, Status::Preparing).is_ok()
        {
            let mut give_back = |remote: &mut Remote| state::give_back(remote, self.memory, previous);
            let _ = still.errand(self.memory, self.gadgets, &mut give_back);
        }
        Ok(())
    }

    fn remove(&self, still: &mut dyn Standstill, detour: &Detour) -> io::Result<()> {
        detour.remove(still, self.memory, self.mode, &self.detours)
    }

    fn write(&self, still: &mut dyn Standstill) -> io::Result<()> {
        self.draft.detours.iter().try_for_each(|detour| detour.insert(still, self.memory))?;
        self.edits.iter().try_for_each(|edit| still.write_code(self.memory, edit.at, &edit.after))
    }
}

/// From the previous patch, or none, to this one.
fn edits(draft: &Active, previous: Option<&Active>) -> Vec<Edit> {
    let known = previous.map_or(&[][..], |previous| &previous.functions);
    let edit = |function: &Replaced, before: &[u8], after: &[u8]| Edit {
        function: function.name.clone(),
        at: Addr::new(function.old),
        before: before.to_vec(),
        after: after.to_vec(),
    };
    let come = draft.functions.iter().map(|function| {
        let before =
            known.iter().find(|other| other.old == function.old).map_or(&function.original, |other| &other.jump);
        edit(function, before, &function.jump)
    });
    let stays = |other: &&Replaced| !draft.functions.iter().any(|function| function.old == other.old);
    come.chain(known.iter().filter(stays).map(|other| edit(other, &other.jump, &other.original))).collect()
}

/// Writes the old code back, where it is not there. Nobody is in the new one, and nobody moves.
pub(super) fn restore(
    still: &mut dyn Standstill,
    memory: &Memory,
    mode: Mode,
    patch: &Active,
    active: &[Active],
) -> io::Result<()> {
    state::set_status(memory, patch, Status::Changing)?;
    for function in &patch.functions {
        let at = Addr::new(function.old);
        // The object was unloaded.
        let Ok(there) = still.read_code(memory, at, function.original.len()) else { continue };
        if there == function.jump {
            still.write_code(memory, at, &function.original)?;
        } else if there != function.original {
            return Err(io::Error::other(format!("{} was changed by somebody else", function.name)));
        }
    }
    let detours: Vec<Detour> = active.iter().flat_map(|patch| patch.detours.clone()).collect();
    patch.detours.iter().try_for_each(|detour| detour.remove(still, memory, mode, &detours))?;
    // From here on it is only memory, and swept by the next command if unmapping it fails.
    state::set_status(memory, patch, Status::Preparing)
}

impl Active {
    /// All its memory.
    pub(super) fn memory(&self) -> Vec<AddrRange> {
        let region = AddrRange::new(Addr::new(self.at), self.len_bytes);
        std::iter::once(region).chain(self.detours.iter().map(Detour::area)).collect()
    }

    /// Where a callback is, if the patch has it.
    pub(super) fn callback(&self, when: When) -> Option<Addr> {
        let found = self.callbacks.iter().find(|called| called.when == when.code());
        found.map(|Called { at, .. }| Addr::new(*at))
    }

    /// Where nobody may be when it is applied.
    fn ranges_before(&self) -> Check {
        let detours = self.detours.iter().map(Detour::window);
        Check::new(self.old_ranges().chain(detours).collect())
    }

    /// Where nobody may be when it is reverted.
    pub(super) fn ranges_after(&self) -> Check {
        let new = AddrRange { start: Addr::new(self.code.0), end: Addr::new(self.code.1) };
        let detours = self.detours.iter().map(Detour::code);
        let new = std::iter::once((format!("new code of {}", self.name), new));
        Check::new(self.old_ranges().chain(new).chain(detours).collect())
    }

    /// The functions that are replaced, and what is pinned.
    fn old_ranges(&self) -> impl Iterator<Item = (String, AddrRange)> {
        let range = |at: u64, len_bytes: u64| AddrRange::new(Addr::new(at), len_bytes);
        let functions = self.functions.iter().flat_map(move |function| {
            let parts = function.parts.iter().map(move |(at, len)| (function.name.clone(), range(*at, *len)));
            std::iter::once((function.name.clone(), range(function.old, function.old_bytes))).chain(parts)
        });
        functions.chain(self.pins.iter().map(move |pin| (pin.name.clone(), range(pin.at, pin.len_bytes))))
    }
}
