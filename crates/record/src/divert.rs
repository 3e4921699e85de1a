//! Functions that live patches divert while they are armed.
//!
//! Owns how code is changed beneath what the recorder has put there ([`Space::write_code`]). What leads to a function's stub stays, and so does what calls the entry: its calls
//! are recorded as before. What changes is the stub's second half, which holds the function's own instructions, or a jump to the new body; and what the recorder writes when it
//! leaves, which is the patch's jump then. So whoever is on the way through the agent comes to the body that counts. Invariants: all of it happens while all threads
//! stand still and none is in the instructions; the stubs are of this memory alone, as those of a forked child are the same memory until then.

use std::{io, sync::Arc};

use trapline_engine::{
    Addr, AddrRange,
    insn::{InsnBytes, MAX_INSN_BYTES, encode},
};
use trapline_image::{ArmedSite, SetAside, Write};

use crate::{
    space::{Space, Stubs},
    sys::memory::Memory,
    text::{Hidden, overlay},
};

/// A jump with a displacement of 32 bits.
const JUMP: u8 = 0xe9;
const JUMP_BYTES: usize = 5;

/// `endbr64` and `endbr32`: functions may begin with one, and it does nothing else than to allow that.
const ENDBR: [[u8; ENDBR_BYTES]; 2] = [[0xf3, 0x0f, 0x1e, 0xfa], [0xf3, 0x0f, 0x1e, 0xfb]];
pub(crate) const ENDBR_BYTES: usize = 4;

/// Whether code begins with one of those.
pub(crate) fn begins_with_endbr(code: &[u8]) -> bool {
    ENDBR.iter().any(|endbr| code.starts_with(endbr))
}

/// What a function is without a patch.
#[derive(Clone, Debug)]
pub(crate) struct Undiverted {
    /// Its [`ArmedSite::off`].
    off: Addr,
    /// What its stub has there.
    moved: Vec<u8>,
    /// What leads to the stub. Empty if a patch's jump stands before that, and nothing leads there now.
    writes: Vec<Write>,
}

impl From<SetAside> for Undiverted {
    fn from(SetAside { off, moved, write }: SetAside) -> Self {
        Self { off, moved, writes: vec![write] }
    }
}

/// Edits that are others now: what is done when the process is left.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Amended {
    /// Those that are no more.
    pub(crate) gone: Vec<Write>,
    /// Those in their place.
    pub(crate) come: Vec<Write>,
}

impl Amended {
    /// Makes the same change in a list of edits that has them.
    pub(crate) fn apply(&self, edits: &mut Vec<Write>) {
        let before = edits.len();
        edits.retain(|edit| !self.gone.contains(edit));
        if edits.len() < before {
            edits.extend(&self.come);
            edits.sort_by_key(|edit| edit.at);
        }
    }
}

impl Stubs {
    /// The function that begins there, or whose moved instructions were there.
    pub(crate) fn function_at(&self, at: Addr) -> Option<&ArmedSite> {
        self.all_sites().find(|site| site.address == at || site.window_at == at)
    }

    /// All functions that have a stub.
    pub(crate) fn all_sites(&self) -> impl Iterator<Item = &ArmedSite> {
        self.sites.iter().chain(&self.unselected)
    }

    fn offset(&self, at: Addr) -> usize {
        usize::try_from(at.distance_from(self.at)).unwrap_or(usize::MAX)
    }

    fn amend(&mut self, amended: &Amended) {
        // Those of unwinders are in both.
        amended.apply(&mut self.writes);
        amended.apply(&mut self.of_unwinders);
    }

    /// Has the function at `at` begin with `bytes`, for whoever calls it.
    fn divert(&mut self, memory: &Memory, at: Addr, bytes: &[u8]) -> io::Result<Amended> {
        let none = || io::Error::other(format!("the function at {at} has no stub"));
        let site = *self.function_at(at).ok_or_else(none)?;
        let range = AddrRange::new(at, bytes.len() as u64);
        let overlaps = |edit: &&Write| edit.at < range.end && range.start < edit.at.after(edit.new.len());
        let gone: Vec<Write> = self.writes.iter().filter(overlaps).copied().collect();
        let before_window = usize::try_from(site.window_at.distance_from(at)).unwrap_or(usize::MAX);
        // Whoever calls it comes to the stub, if nothing stands before that, or what does nothing.
        let reaches = match before_window {
            0 => true,
            ENDBR_BYTES => begins_with_endbr(&memory.read_vec(at, ENDBR_BYTES)?),
            _ => false,
        };
        if !reaches && !gone.is_empty() {
            return Err(io::Error::other(format!("what the recorder has put at {at} does not begin the function")));
        }
        let kept = self.set_aside.iter().position(|kept| kept.off == site.off);
        let now = Hidden::new(gone.clone());
        if now.read(memory, at, bytes.len())? == bytes {
            return Ok(Amended::default());
        }
        let (at_off, come) = if let Some(to) = jump_target(at, bytes) {
            if site.moved_bytes < JUMP_BYTES {
                return Err(io::Error::other(format!(
                    "there is no room for a jump in the stub of the function at {at}"
                )));
            }
            let jump = encode::jmp(site.off, to, self.mode).map_err(io::Error::other)?;
            if kept.is_none() {
                let first = self.offset(site.off);
                let moved = (first..first + site.moved_bytes).map(|offset| self.memory.byte(offset)).collect();
                self.set_aside.push(Undiverted { off: site.off, moved, writes: gone.clone() });
            }
            let come = if reaches { vec![merged(memory, &gone, at, bytes)?] } else { Vec::new() };
            (jump.to_vec(), come)
        } else {
            let unknown = || io::Error::other(format!("what was at {at} before the patch is not known"));
            let kept = kept.ok_or_else(unknown)?;
            if reaches && Hidden::new(self.set_aside[kept].writes.clone()).read(memory, at, bytes.len())? != bytes {
                return Err(unknown());
            }
            let kept = self.set_aside.swap_remove(kept);
            (kept.moved, kept.writes)
        };
        if !reaches {
            memory.write(at, bytes)?;
        }
        self.memory.fill(self.offset(site.off), &at_off);
        let amended = Amended { gone, come };
        self.amend(&amended);
        Ok(amended)
    }

    /// Forgets all patches: what they were for has been unloaded.
    pub(crate) fn forget_patches(&mut self) {
        for kept in std::mem::take(&mut self.set_aside) {
            self.memory.fill(self.offset(kept.off), &kept.moved);
            let is_in_place = |edit: &&Write| {
                let overlaps =
                    |old: &Write| edit.at < old.at.after(old.new.len()) && old.at < edit.at.after(edit.new.len());
                kept.writes.iter().any(overlaps)
            };
            let gone = self.writes.iter().filter(is_in_place).copied().collect();
            self.amend(&Amended { gone, come: kept.writes });
        }
    }
}

impl Space {
    /// All edits of the program's code.
    pub(crate) fn hidden(&self) -> Hidden {
        Hidden::new(self.edits().copied().collect())
    }

    /// What the program has somewhere, beneath them.
    pub(crate) fn read_code(&self, memory: &Memory, at: Addr, len_bytes: usize) -> io::Result<Vec<u8>> {
        let near = self.edits_within(AddrRange::new(at, len_bytes as u64)).copied().collect();
        Hidden::new(near).read(memory, at, len_bytes)
    }

    fn edits_within(&self, range: AddrRange) -> impl Iterator<Item = &Write> {
        self.edits().filter(move |edit| edit.at < range.end && range.start < edit.at.after(edit.new.len()))
    }

    fn edits(&self) -> impl Iterator<Item = &Write> {
        let stubs = self.loaded.iter().filter_map(|loaded| self.stubs.get(&loaded.key()));
        stubs.flat_map(|stubs| &stubs.writes).chain(&self.writes)
    }

    /// The stubs of the function that begins there.
    pub(crate) fn stubs_for(&self, at: Addr) -> Option<(u32, u64)> {
        let has = |key: &(u32, u64)| self.stubs.get(key).is_some_and(|stubs| stubs.function_at(at).is_some());
        self.loaded.iter().map(crate::space::Loaded::key).find(has)
    }

    /// Puts a jump, or what was there before, at the beginning of a function. What the recorder has put there stays, and its stubs are to be nobody else's.
    pub(crate) fn write_code(&mut self, memory: &Memory, at: Addr, bytes: &[u8]) -> io::Result<Amended> {
        let Some(key) = self.stubs_for(at) else {
            let range = AddrRange::new(at, bytes.len() as u64);
            if self.edits_within(range).next().is_some() {
                return Err(io::Error::other(format!("the recorder itself needs what is at {at}")));
            }
            return memory.write(at, bytes).map(|()| Amended::default());
        };
        let stubs = self.stubs.get_mut(&key).and_then(Arc::get_mut);
        let stubs = stubs.ok_or_else(|| io::Error::other("the stubs belong to several processes"))?;
        stubs.divert(memory, at, bytes)
    }
}

/// One edit in place of some: what is there stays, and what is taken back is that with `bytes`.
fn merged(memory: &Memory, gone: &[Write], at: Addr, bytes: &[u8]) -> io::Result<Write> {
    let end = |edit: &Write| edit.at.after(edit.new.len());
    let first = gone.iter().map(|edit| edit.at).fold(at, Addr::min);
    let last = gone.iter().map(end).fold(at.after(bytes.len()), Addr::max);
    let len_bytes = usize::try_from(last.distance_from(first)).unwrap_or(usize::MAX);
    if len_bytes > MAX_INSN_BYTES {
        return Err(io::Error::other(format!("there are too many edits at {at}")));
    }
    let new = memory.read_vec(first, len_bytes)?;
    let mut expected = Hidden::new(gone.to_vec()).read(memory, first, len_bytes)?;
    overlay(&mut expected, first, at, bytes);
    Ok(Write { at: first, expected: InsnBytes::new(&expected), new: InsnBytes::new(&new) })
}

/// Where a jump at this address leads.
fn jump_target(at: Addr, bytes: &[u8]) -> Option<Addr> {
    let (&first, displacement) = bytes.split_first()?;
    let displacement = displacement.first_chunk().map(|bytes| i32::from_le_bytes(*bytes))?;
    (first == JUMP).then(|| at.after(JUMP_BYTES).offset(displacement.into()))
}

#[cfg(test)]
mod tests {
    use trapline_engine::Mode;

    use super::*;

    fn edit(at: u64, expected: &[u8], new: &[u8]) -> Write {
        Write { at: Addr::new(at), expected: InsnBytes::new(expected), new: InsnBytes::new(new) }
    }

    #[test]
    fn jumps_lead_where_they_were_made_for() {
        let at = Addr::new(0x5555_0000_1000);
        for distance in [-0x1000, 5, 0x7000_0000] {
            let to = at.offset(distance);
            let jump = encode::jmp(at, to, Mode::Bits64).expect("within reach");
            assert_eq!(jump_target(at, &jump), Some(to));
        }
        assert_eq!(jump_target(at, &[0xe8, 0, 0, 0, 0]), None);
        assert_eq!(jump_target(at, &[0xe9, 0, 0]), None);
    }

    #[test]
    fn edits_are_amended_in_the_list_that_has_them_and_in_no_other() {
        let (old, new) = (edit(0x1004, &[1; 5], &[2; 5]), edit(0x1000, &[3; 9], &[4; 9]));
        let (before, after) = (edit(0x800, &[5], &[6]), edit(0x2000, &[5], &[6]));
        let amended = Amended { gone: vec![old], come: vec![new] };
        let (mut list, mut other) = (vec![before, old, after], vec![before]);
        amended.apply(&mut list);
        amended.apply(&mut other);
        assert_eq!(list, [before, new, after]);
        assert_eq!(other, [before]);
        // As the guard is told.
        amended.apply(&mut list);
        assert_eq!(list, [before, new, after]);
    }

    /// Read from this process as from another one.
    #[test]
    fn what_is_taken_back_has_the_patch_and_what_stays_is_what_was_there() {
        static CODE: [u8; 16] = [0xf3, 0x0f, 0x1e, 0xfa, 0xe9, 1, 2, 3, 4, 9, 9, 9, 9, 9, 9, 9];
        let memory = Memory::open(std::process::id().cast_signed()).expect("our own memory");
        let at = Addr::new(CODE.as_ptr().addr() as u64);
        let armed = edit(at.value() + 4, &[0x41, 0x54, 0x55, 0x53, 0x90], &CODE[4..9]);
        let patch = [0xe9, 7, 7, 7, 7];
        let one = merged(&memory, &[armed], at, &patch).expect("short edits");
        assert_eq!((one.at, &*one.new), (at, &CODE[..9]));
        assert_eq!(*one.expected, [0xe9, 7, 7, 7, 7, 0x54, 0x55, 0x53, 0x90]);
        let hidden = Hidden::new(vec![one]);
        assert_eq!(hidden.read(&memory, at, 5).expect("our own memory"), patch);
        assert_eq!(hidden.read(&memory, at.after(8), 4).expect("our own memory"), [0x90, 9, 9, 9]);
        assert_eq!(hidden.read(&memory, at.after(9), 2).expect("our own memory"), [9, 9]);
    }
}
