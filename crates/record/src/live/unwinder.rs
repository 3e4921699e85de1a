//! How exceptions, panics and backtraces get through new code.
//!
//! Owns [`Detour`]: an unwinder's `_Unwind_Find_FDE` (libgcc) is led through code that answers for the patch's functions, and goes on to the unwinder for all others. Nothing
//! of the process is called for it: `__register_frame` takes a lock and memory, and whoever is stopped may hold either. Several patches stand one behind
//! the other, each with a word that says where it goes on; they come and go in any order. Source of the interface: GCC, libgcc/unwind-dw2-fde.h.

use std::io;

use serde::{Deserialize, Serialize};
use trapline_engine::{
    Addr, AddrRange, Mode,
    insn::{RelocateOptions, encode, relocate},
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
    /// Its first instructions, as the file has them.
    window: Vec<u8>,
}

/// All unwinders of a process.
///
/// # Errors
/// One of them cannot be led through anything.
pub(super) fn find(objects: &Objects) -> Result<Vec<Unwinder>, LiveError> {
    let mut found = Vec::new();
    for object in objects.all() {
        let has = object.defines(&[FINDS, RAISES]);
        if has == [false, false] {
            continue;
        }
        let unwinder = Image::parse(object.bytes().to_vec(), &object.name()).ok().and_then(|image| of(object, &image));
        found.push(unwinder.ok_or_else(|| LiveError::Unwinding { object: object.name() })?);
    }
    Ok(found)
}

fn of(object: &Object, image: &Image) -> Option<Unwinder> {
    let plan = image.functions()[image.function_named(FINDS)?].plan()?;
    if plan.redirects() || matches!(plan.rung, Rung::ShortJump { .. }) {
        return None;
    }
    let window = image.code(Addr::new(plan.window_at)).get(..usize::from(plan.window_bytes))?.to_vec();
    let at = Addr::new(plan.window_at.wrapping_add(object.bias));
    (window.len() >= JUMP_BYTES).then(|| Unwinder { object: object.name(), near: object.range, at, window })
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

    /// Whether it has one of these detours.
    pub(super) fn is_led(&self, detours: &[Detour]) -> bool {
        detours.iter().any(|detour| detour.at == self.at.value())
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
        let out_of_reach = || LiveError::NoRoom { len_bytes: area.len_bytes() };
        let copy_at = area.start.after(COPY_OFFSET);
        let moved = relocate(Mode::Bits64, self.at, &self.window, JUMP_BYTES, copy_at, &RelocateOptions::default());
        let moved = moved.map_err(|_| LiveError::Unwinding { object: self.object.clone() })?;
        let mut code = code::answer().to_vec();
        code.resize(COPY_OFFSET, 0xcc);
        code.extend(moved.bytes);
        detour.area = (area.start.value(), area.len_bytes());
        detour.jump = encode::jmp(self.at, area.start, Mode::Bits64).map_err(|_| out_of_reach())?.to_vec();
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
    pub(super) fn remove(&self, still: &mut dyn Standstill, memory: &Memory, others: &[Self]) -> io::Result<()> {
        let at = Addr::new(self.at);
        // The unwinder was unloaded.
        let Ok(there) = still.read_code(memory, at, JUMP_BYTES) else { return Ok(()) };
        let next = Addr::new(memory.read_word(self.next_at())?);
        let is_last = next == self.copy_at();
        if there == self.jump {
            let before = if is_last { self.original.clone() } else { jump(at, next)? };
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

fn jump(at: Addr, to: Addr) -> io::Result<Vec<u8>> {
    Ok(encode::jmp(at, to, Mode::Bits64).map_err(io::Error::other)?.to_vec())
}
