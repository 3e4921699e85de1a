//! What is mapped for a patch, and what is known of it, before anything of the process is changed.
//!
//! Owns [`prepare`], which lays it out, and [`place`], which has the process map it. Layout of the memory near the target, each part on pages of its own: what is to be
//! known of the patch ([`state`]), code that calls its callbacks, its own code, constants and data. Near each unwinder there is a piece of its own
//! ([`unwinder`]).

use std::{io, time::SystemTime};

use trapline_engine::{Addr, AddrRange, Mode, insn::encode};
use trapline_patch::{Linked, Linker, Patch, Protection};
use trapline_trace::hexadecimal;

use super::{
    JUMP_BYTES, LiveError, PAGE_BYTES, Process, code,
    objects::{Object, Objects},
    state::{self, Active, Body, Called, Pinned, Replaced, Status},
    tracing::{self, Tracing},
    unwinder::{Detour, Unwinder},
};
use crate::{
    remote::Remote,
    sys::maps::{self, Mapping},
};

/// Bytes on pages of their own.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    at: Addr,
    bytes: Vec<u8>,
    /// As mmap(2) takes it.
    protection: i32,
}

impl Piece {
    pub(super) fn code(at: Addr, bytes: Vec<u8>) -> Self {
        Self { at, bytes, protection: libc::PROT_READ | libc::PROT_EXEC }
    }

    pub(super) fn read_only(at: Addr, bytes: Vec<u8>) -> Self {
        Self { at, bytes, protection: libc::PROT_READ }
    }

    fn len_bytes(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(PAGE_BYTES)
    }

    /// Has a thread map it, where nothing else is.
    fn map(&self, remote: &mut Remote) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        remote.map(self.at, self.len_bytes(), self.protection, flags, -1).map(drop)
    }
}

/// A patch that is ready for a process.
pub(super) struct Prepared {
    /// What is to be known of it.
    pub(super) draft: Active,
    /// All of its memory but the first pages.
    pub(super) pieces: Vec<Piece>,
}

/// Fits a patch to a process.
pub(super) fn prepare(
    process: &Process,
    patch: &Patch,
    objects: &Objects,
    target: &Object,
    unwinders: &[Unwinder],
    active: &[Active],
    is_tainted: bool,
) -> Result<Prepared, LiveError> {
    let mut draft = draft(patch, target, unwinders, is_tainted);
    let linker = Linker::new(patch);
    let header_bytes = draft.page_bytes();
    draft.header_bytes = header_bytes;
    let call_bytes = if draft.callbacks.is_empty() { 0 } else { PAGE_BYTES };
    let mut room = Room { mode: process.mode, mappings: process.mappings.clone() };
    let region = room.take(target.range, header_bytes + call_bytes + linker.len_bytes())?;
    let call_at = region.start.offset(header_bytes.cast_signed());
    let code_at = call_at.offset(call_bytes.cast_signed());
    let fitted = linker.link(code_at, &objects.resolver(target, &process.memory))?;
    complete(process, &mut draft, region, &fitted)?;
    let mut pieces = Vec::new();
    if call_bytes != 0 {
        draft.call_at = call_at.value();
        pieces.push(Piece::code(call_at, code::call(process.mode).to_vec()));
    }
    pieces.extend(fitted.segments.iter().map(|segment| {
        let protection = match segment.protection {
            Protection::Code => libc::PROT_READ | libc::PROT_EXEC,
            Protection::ReadOnly => libc::PROT_READ,
            Protection::Data => libc::PROT_READ | libc::PROT_WRITE,
        };
        Piece { at: segment.at, bytes: segment.bytes.clone(), protection }
    }));
    let others: Vec<Detour> = active.iter().flat_map(|patch| patch.detours.clone()).collect();
    for (unwinder, detour) in unwinders.iter().zip(&mut draft.detours) {
        let area = room.take(unwinder.near, Unwinder::area_bytes(&fitted))?;
        pieces.extend(unwinder.lead(process, detour, area, &fitted, &others)?);
    }
    draft.pieces = pieces.iter().map(|piece| (piece.at.value(), piece.len_bytes())).collect();
    Ok(Prepared { draft, pieces })
}

/// Where there is still room.
struct Room {
    mode: Mode,
    mappings: Vec<Mapping>,
}

impl Room {
    /// A place within reach of `near`, a page apart from others: mappings of the same kind would become one.
    fn take(&mut self, near: AddrRange, len_bytes: u64) -> Result<AddrRange, LiveError> {
        let hole = maps::find_hole(self.mode, &self.mappings, near, len_bytes + 2 * PAGE_BYTES)
            .ok_or(LiveError::NoRoom { len_bytes })?;
        let taken = AddrRange::new(hole.offset(PAGE_BYTES.cast_signed()), len_bytes);
        let behind = self.mappings.partition_point(|mapping| mapping.range.start < taken.start);
        self.mappings.insert(behind, Mapping::planned(taken));
        Ok(taken)
    }
}

/// What there will be to say of a patch, but for what its place decides: that is the largest number.
fn draft(patch: &Patch, target: &Object, unwinders: &[Unwinder], is_tainted: bool) -> Active {
    let moved = |address: u64| target.in_process(address).value();
    let functions = patch.functions.iter().map(|function| Replaced {
        name: function.name.clone(),
        old: moved(function.address),
        old_bytes: function.expected.len() as u64,
        parts: function.parts.iter().map(|(at, len)| (moved(*at), *len)).collect(),
        new: u64::MAX,
        original: function.expected.iter().copied().take(JUMP_BYTES).collect(),
        jump: vec![u8::MAX; JUMP_BYTES],
    });
    let body =
        |(name, section): (String, usize)| Body { name, at: u64::MAX, len_bytes: patch.sections[section].len_bytes };
    let pins = patch.pins.iter().map(|pin| Pinned {
        name: pin.name.clone(),
        at: moved(pin.address),
        len_bytes: pin.len_bytes,
    });
    let callbacks =
        patch.callbacks.iter().map(|callback| Called { when: callback.when.code().to_owned(), at: u64::MAX });
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Active {
        name: patch.name.clone(),
        target: patch.target.name.clone(),
        build_id: hexadecimal(&patch.target.build_id),
        bias: target.bias,
        at: u64::MAX,
        len_bytes: u64::MAX,
        header_bytes: u64::MAX,
        // Code of three protections, what calls callbacks, and two for each unwinder.
        pieces: vec![(u64::MAX, u64::MAX); 4 + 2 * unwinders.len()],
        code: (u64::MAX, u64::MAX),
        unwind: Some((u64::MAX, u64::MAX)),
        functions: functions.collect(),
        bodies: patch.bodies().map(body).collect(),
        pins: pins.collect(),
        detours: unwinders.iter().map(Unwinder::draft).collect(),
        callbacks: callbacks.collect(),
        call_at: if patch.callbacks.is_empty() { 0 } else { u64::MAX },
        is_tainted,
        applied_unix_s: now.as_secs(),
    }
}

fn complete(process: &Process, draft: &mut Active, region: AddrRange, fitted: &Linked) -> Result<(), LiveError> {
    (draft.at, draft.len_bytes) = (region.start.value(), region.len_bytes());
    draft.code = (fitted.code.start.value(), fitted.code.end.value());
    draft.unwind = fitted.unwind.map(|tables| (tables.start.value(), tables.end.value()));
    for (function, (old, new)) in draft.functions.iter_mut().zip(&fitted.replacements) {
        function.new = new.value();
        // The hole was looked for near the whole target.
        let jump = encode::jmp(*old, *new, process.mode);
        function.jump = jump.map_err(|_| LiveError::NoRoom { len_bytes: region.len_bytes() })?.to_vec();
    }
    for (body, range) in draft.bodies.iter_mut().zip(&fitted.bodies) {
        body.at = range.start.value();
    }
    for (called, (_, at)) in draft.callbacks.iter_mut().zip(&fitted.callbacks) {
        called.at = at.value();
    }
    Ok(())
}

/// Maps and writes what the patch brings, of which nobody knows yet.
pub(super) fn place(
    tracing: &mut dyn Tracing,
    process: &Process,
    draft: &Active,
    pieces: &[Piece],
) -> Result<(), LiveError> {
    let header = state::header(draft, Status::Preparing).map_err(process.system("writing the patch"))?;
    let first = Piece::read_only(Addr::new(draft.at), header);
    let memory = &process.memory;
    let fill = |remote: &mut Remote| {
        memory.write(first.at, &first.bytes)?;
        for (index, piece) in pieces.iter().enumerate() {
            piece.map(remote)?;
            state::set_mapped(memory, draft, index + 1)?;
            memory.write(piece.at, &piece.bytes)?;
        }
        Ok(())
    };
    let map_all = |remote: &mut Remote| {
        // What is in the way of it is not ours, and stays.
        first.map(remote)?;
        let filled = fill(remote);
        if filled.is_err() {
            let _ = state::give_back(remote, memory, draft);
        }
        filled
    };
    tracing::borrow(tracing, process, map_all).map_err(process.system("mapping memory for the patch"))
}
