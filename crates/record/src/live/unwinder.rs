//! How exceptions, panics and backtraces get through new code.
//!
//! Owns [`Detour`]: an unwinder's `_Unwind_Find_FDE` (libgcc) is led through code that answers for the patch's functions, and goes on to the unwinder for all others. Nothing
//! of the process is called for it: `__register_frame` takes a lock and memory, and whoever is stopped may hold either. Several patches stand one behind
//! the other, each with a word that says where it goes on; they come and go in any order. Source of the interface: GCC, libgcc/unwind-dw2-fde.h.

use std::io;

use serde::{Deserialize, Serialize};
use trapline_engine::{
    Addr, AddrRange, Mode,
    insn::{Gpr, RelocateOptions, encode, pc_thunk, relocate},
};
use trapline_image::{Image, Rung};
use trapline_patch::Linked;

use super::{
    JUMP_BYTES, LiveError, PAGE_BYTES, Piece, Process,
    code::{self, DATA_OFFSET},
    objects::{Object, Objects},
    tracing::Standstill,
};
use crate::sys::memory::Memory;

const FINDS: &str = "_Unwind_Find_FDE";
const RAISES: &str = "_Unwind_RaiseException";

/// Where an area has the unwinder's first instructions, from its beginning.
pub(super) const COPY_OFFSET: usize = 256;

/// Of words in an area's data, whatever the width.
const WORD_BYTES: u64 = 8;

/// Where an unwinder is led through code of a patch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Detour {
    /// The file that the unwinder is of.
    pub object: String,
    /// Where the jump is.
    pub at: u64,
    /// How many bytes of its instructions are moved.
    pub window_bytes: u64,
    /// What it begins with.
    pub original: Vec<u8>,
    /// What is there instead.
    pub jump: Vec<u8>,
    /// Our memory near it: where it begins, and its length.
    pub area: (u64, u64),
}

/// An unwinder that is to get a detour.
#[derive(Debug)]
pub(super) struct Unwinder {
    object: String,
    /// The object's memory, which the area has to be in reach of.
    pub(super) near: AddrRange,
    at: Addr,
    /// Its function.
    entry: Addr,
    /// The function that it calls: of several libraries that have one the first one's. The C library of i386 has one, too.
    calls: Addr,
    /// Its first instructions, as the file has them.
    window: Vec<u8>,
}

/// All unwinders of a process.
///
/// # Errors
/// One of them cannot be led through anything.
pub(super) fn find(objects: &Objects, memory: &Memory) -> Result<Vec<Unwinder>, LiveError> {
    let mut found = Vec::new();
    for object in objects.all() {
        let has = object.file().defines(&[FINDS, RAISES]);
        if has == [false, false] {
            continue;
        }
        let unwinder = Image::parse(object.file().bytes().to_vec(), &object.name()).ok().and_then(|image| {
            let unwinder = of(object, &image)?;
            let calls = object.chosen_among(objects, FINDS, memory).unwrap_or(unwinder.entry);
            Some(Unwinder { calls, ..unwinder })
        });
        found.push(unwinder.ok_or_else(|| LiveError::Unwinding { object: object.name() })?);
    }
    Ok(found)
}

fn of(object: &Object, image: &Image) -> Option<Unwinder> {
    let function = &image.functions()[image.function_named(FINDS)?];
    let plan = function.plan()?;
    if plan.redirects() || matches!(plan.rung, Rung::ShortJump { .. }) {
        return None;
    }
    let window = image.code(Addr::new(plan.window_at)).get(..usize::from(plan.window_bytes))?.to_vec();
    let at = object.in_process(plan.window_at);
    let entry = object.in_process(function.address);
    let (object, near) = (object.name(), object.range);
    (window.len() >= JUMP_BYTES).then_some(Unwinder { object, near, at, entry, calls: entry, window })
}

impl Unwinder {
    /// What is known of its detour before there is memory for it: the places are the largest.
    pub(super) fn draft(&self) -> Detour {
        Detour {
            object: self.object.clone(),
            at: self.at.value(),
            window_bytes: self.window.len() as u64,
            original: self.window[..JUMP_BYTES].to_vec(),
            jump: vec![u8::MAX; JUMP_BYTES],
            area: (u64::MAX, u64::MAX),
        }
    }

    /// Its file's name.
    pub(super) fn object(&self) -> &str {
        &self.object
    }

    /// Whether it comes through one of these detours. `all` are those that the process has.
    pub(super) fn is_led(&self, all: &[Self], detours: &[Detour]) -> bool {
        let answers = all.iter().find(|other| other.entry == self.calls).unwrap_or(self);
        detours.iter().any(|detour| detour.at == answers.at.value())
    }

    /// How much memory it takes.
    pub(super) fn area_bytes(linked: &Linked) -> u64 {
        let words = 4 + 3 * linked.frames.len() as u64;
        DATA_OFFSET as u64 + (words * WORD_BYTES).next_multiple_of(PAGE_BYTES)
    }

    /// Completes its detour for an area, and says what goes there. `others` are the detours that the process has.
    pub(super) fn lead(
        &self,
        process: &Process,
        detour: &mut Detour,
        area: AddrRange,
        linked: &Linked,
        others: &[Detour],
    ) -> Result<Vec<Piece>, LiveError> {
        let Process { mode, memory, .. } = process;
        let out_of_reach = || LiveError::NoRoom { len_bytes: area.len_bytes() };
        let copy_at = area.start.after(COPY_OFFSET);
        let thunk = |at: Addr| thunk_at(*mode, memory, at);
        let options = RelocateOptions { pc_thunk: Some(&thunk) };
        let moved = relocate(*mode, self.at, &self.window, JUMP_BYTES, copy_at, &options);
        let moved = moved.map_err(|_| LiveError::Unwinding { object: self.object.clone() })?;
        let mut code = code::answer(*mode).to_vec();
        code.resize(COPY_OFFSET, 0xcc);
        code.extend(moved.bytes);
        detour.area = (area.start.value(), area.len_bytes());
        detour.jump = encode::jmp(self.at, area.start, *mode).map_err(|_| out_of_reach())?.to_vec();
        let next = self.next(process, copy_at, others)?;
        let all = linked.code;
        let mut words = vec![next.value(), all.start.value(), all.len_bytes(), linked.frames.len() as u64];
        let frames = linked.frames.iter();
        words.extend(frames.flat_map(|frame| [frame.code.start, frame.code.end, frame.record].map(Addr::value)));
        let data = words.into_iter().flat_map(u64::to_le_bytes).collect();
        Ok(vec![Piece::code(area.start, code), Piece::read_only(area.start.after(DATA_OFFSET), data)])
    }

    /// Where those addresses go that are not ours: to who is there now.
    fn next(&self, process: &Process, copy_at: Addr, others: &[Detour]) -> Result<Addr, LiveError> {
        let changed = || LiveError::OtherCode { function: format!("{FINDS} of {}", self.object), at: self.at };
        let there = process.code(self.at, JUMP_BYTES).map_err(|_| changed())?;
        if there == self.window[..JUMP_BYTES] {
            return Ok(copy_at);
        }
        let top = others.iter().find(|other| other.at == self.at.value() && other.jump == there);
        top.map(Detour::entry).ok_or_else(changed)
    }
}

impl Detour {
    fn entry(&self) -> Addr {
        Addr::new(self.area.0)
    }

    fn copy_at(&self) -> Addr {
        self.entry().after(COPY_OFFSET)
    }

    fn next_at(&self) -> Addr {
        self.entry().after(DATA_OFFSET)
    }

    /// Our memory.
    pub(super) fn area(&self) -> AddrRange {
        AddrRange::new(self.entry(), self.area.1)
    }

    /// Where nobody may be when it comes: between the instructions that the jump covers.
    pub(super) fn window(&self) -> (String, AddrRange) {
        (format!("{FINDS} of {}", self.object), AddrRange::new(Addr::new(self.at).after(1), self.window_bytes - 1))
    }

    /// Where nobody may be when it goes.
    pub(super) fn code(&self) -> (String, AddrRange) {
        (format!("{FINDS} of {}", self.object), AddrRange::new(self.entry(), DATA_OFFSET as u64))
    }

    /// Puts the jump there. Nobody moves.
    pub(super) fn insert(&self, still: &mut dyn Standstill, memory: &Memory) -> io::Result<()> {
        still.write_code(memory, Addr::new(self.at), &self.jump)
    }

    /// Takes the jump, or what leads here from another detour. Nobody moves.
    pub(super) fn remove(
        &self,
        still: &mut dyn Standstill,
        memory: &Memory,
        mode: Mode,
        others: &[Self],
    ) -> io::Result<()> {
        let at = Addr::new(self.at);
        // The unwinder was unloaded.
        let Ok(there) = still.read_code(memory, at, JUMP_BYTES) else { return Ok(()) };
        let next = Addr::new(memory.read_word(self.next_at())?);
        let is_last = next == self.copy_at();
        if there == self.jump {
            let before = if is_last { self.original.clone() } else { jump(mode, at, next)? };
            return still.write_code(memory, at, &before);
        }
        for other in others.iter().filter(|other| other.at == self.at) {
            if memory.read_word(other.next_at())? == self.entry().value() {
                let behind = if is_last { other.copy_at() } else { next };
                return memory.write_word(other.next_at(), behind.value());
            }
        }
        // It was never put there.
        let is_others = |other: &Self| other.at == self.at && other.jump == there;
        if there == self.original || others.iter().any(is_others) {
            return Ok(());
        }
        Err(io::Error::other(format!("{FINDS} of {} was changed by somebody else", self.object)))
    }
}

/// The register that a function loads its return address into, if it does nothing else.
fn thunk_at(mode: Mode, memory: &Memory, at: Addr) -> Option<Gpr> {
    const LONGEST_BYTES: usize = 16;
    if mode == Mode::Bits64 {
        return None;
    }
    pc_thunk(mode, &memory.read_vec(at, LONGEST_BYTES).ok()?)
}

fn jump(mode: Mode, at: Addr, to: Addr) -> io::Result<Vec<u8>> {
    Ok(encode::jmp(at, to, mode).map_err(io::Error::other)?.to_vec())
}
