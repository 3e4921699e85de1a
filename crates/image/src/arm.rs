//! From plans to bytes: stubs, and what has to be written where.
//!
//! Owns [`ArmRequest`] and [`Armed`], and the layout of stubs that `trapline_abi::agent` describes. Neighbours: the ladder made the plans, the recorder
//! writes what comes out. Invariants: the same request gives the same bytes; every write says which bytes it replaces.

use rayon::prelude::*;
use trapline_abi::agent::SITE_ID_BYTES;
use trapline_engine::{
    Addr, Mode,
    insn::{InsnBytes, OutOfReach, RelocateOptions, RelocateReason, encode, relocate},
};

use crate::{
    Function, Image, Plan, Reason, Rung, Verdict,
    plan::pc_thunk_at,
    scan::{branch_target, decoder},
};

/// Where the agent's entries are in the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entries {
    /// `trapline_abi::agent::symbol::ENTER`.
    pub enter: Addr,
    /// `trapline_abi::agent::symbol::ENTER_KEEP_FLAGS`.
    pub enter_keep_flags: Addr,
    /// `trapline_abi::agent::symbol::ENTER_LIMITED`.
    pub enter_limited: Addr,
    /// `trapline_abi::agent::symbol::POINT`.
    pub point: Addr,
}

/// What is to be armed, and where.
#[derive(Clone, Copy, Debug)]
pub struct ArmRequest<'a> {
    /// Indices in [`Image::functions`], ascending.
    pub selected: &'a [usize],
    /// What the loader added to the file's addresses.
    pub bias: u64,
    /// Where the stubs will be in the process: 16-byte aligned, within 2 GiB of everything that is loaded of the file.
    pub stubs_at: Addr,
    /// Where the agent's entries are in the process; anywhere.
    pub entries: Entries,
    /// The site id of function 0.
    pub first_site: u32,
    /// Whether returns are to be seen.
    pub returns: bool,
    /// Whether the depth of frames is limited.
    pub limit_depth: bool,
}

/// Everything that arms the functions of one request.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Armed {
    /// For [`ArmRequest::stubs_at`]; code and read-only data.
    pub stubs: Vec<u8>,
    /// Ascending by address, not overlapping. To be made when the stubs stand and no thread is inside a window.
    pub writes: Vec<Write>,
    /// Ascending by function.
    pub sites: Vec<ArmedSite>,
    /// Functions that are not among the sites, by index, and why.
    pub refused: Vec<(usize, Reason)>,
}

/// Bytes to be written to the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Write {
    /// In the process.
    pub at: Addr,
    /// What stands there, as the file has it.
    pub expected: InsnBytes,
    /// What shall stand there; as long.
    pub new: InsnBytes,
}

/// A function that is armed. All addresses are the process's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArmedSite {
    /// Its site id.
    pub id: u32,
    /// Its index in [`Image::functions`].
    pub function: usize,
    /// The function's address.
    pub address: Addr,
    /// The first half of its stub: the call of an entry.
    pub on: Addr,
    /// The second half: only what the function does itself.
    pub off: Addr,
    /// Where the jump of 5 bytes stands. It leads to `on`, and is the one instruction to poke to switch the site.
    pub jump_at: Addr,
}

/// Behind the shared jumps, and between stubs, so that nobody runs on.
const FILLER: u8 = 0xcc;

/// The second half of a stub's beginning: the call.
const CALL: usize = 5;

/// Code of stubs is aligned to this.
const ALIGN_BYTES: usize = 16;

/// Bytes of a jump to anywhere, and of the address that it goes to.
const VENEER_BYTES: usize = 16;

/// One for each of the [`Entries`].
const VENEERS: usize = 4;

/// How many bytes the stubs of these functions take at most.
pub(crate) fn stub_bytes_bound(functions: &[Function], selected: &[usize]) -> usize {
    layout(functions, selected).1
}

/// Where each stub's id is, from the start of the stubs, and where the last one ends. It does not depend on addresses.
fn layout(functions: &[Function], selected: &[usize]) -> (Vec<Option<usize>>, usize) {
    let mut end = VENEERS * VENEER_BYTES;
    let place = |index: &usize| {
        let plan = functions.get(*index).and_then(Function::plan)?;
        let code = (end + SITE_ID_BYTES).next_multiple_of(ALIGN_BYTES);
        end = code + CALL + usize::from(plan.stub_bytes);
        Some(code - SITE_ID_BYTES)
    };
    let places = selected.iter().map(place).collect();
    (places, end)
}

/// What one function adds.
struct Part {
    stub: Vec<u8>,
    writes: Vec<Write>,
    site: ArmedSite,
}

/// See [`Image::arm`].
pub(crate) fn arm(image: &Image, request: &ArmRequest<'_>) -> Armed {
    let (places, len_bytes) = layout(image.functions(), request.selected);
    let mut armed = Armed { stubs: vec![FILLER; len_bytes], ..Armed::default() };
    let entries = request.entries;
    let all = [entries.enter, entries.enter_keep_flags, entries.enter_limited, entries.point];
    for (index, entry) in all.into_iter().enumerate() {
        armed.stubs[index * VENEER_BYTES..][..VENEER_BYTES].copy_from_slice(&veneer(image.mode(), entry));
    }
    let parts: Vec<Result<Part, Reason>> = request
        .selected
        .par_iter()
        .zip(&places)
        .with_min_len(64)
        .map(|(index, place)| match place {
            Some(place) => part(image, request, *index, *place),
            None => Err(image.functions().get(*index).map_or(Reason::NoCode, |function| match &function.verdict {
                Verdict::Untraced(reason) => *reason,
                Verdict::Traced(_) => Reason::NoCode,
            })),
        })
        .collect();
    for ((index, place), part) in request.selected.iter().zip(places).zip(parts) {
        match (part, place) {
            (Ok(part), Some(place)) => {
                armed.stubs[place..place + part.stub.len()].copy_from_slice(&part.stub);
                armed.writes.extend(part.writes);
                armed.sites.push(part.site);
            }
            (Err(reason), _) => armed.refused.push((*index, reason)),
            (Ok(_), None) => {}
        }
    }
    armed.writes.sort_by_key(|write| write.at);
    armed
}

/// `jmp` to anywhere, and where to, in [`VENEER_BYTES`]. In 32-bit code everything is within reach of everything.
fn veneer(mode: Mode, to: Addr) -> [u8; VENEER_BYTES] {
    let mut bytes = [FILLER; VENEER_BYTES];
    if mode == Mode::Bits64 {
        // jmp [rip + 2]: the address is the last, aligned word.
        bytes[..6].copy_from_slice(&[0xff, 0x25, 2, 0, 0, 0]);
        bytes[8..].copy_from_slice(&to.value().to_le_bytes());
    }
    bytes
}

/// Encodes what one function adds, whose stub's id is `place` bytes behind the start of the stubs.
fn part(image: &Image, request: &ArmRequest<'_>, index: usize, place: usize) -> Result<Part, Reason> {
    let function = &image.functions()[index];
    let Some(plan) = function.plan() else { return Err(Reason::NoCode) };
    let mode = image.mode();
    let in_process = |address: u64| in_width(mode, Addr::new(address.wrapping_add(request.bias)));
    let window_at = in_process(plan.window_at);
    let id_at = in_width(mode, request.stubs_at.after(place));
    let on = in_width(mode, id_at.after(SITE_ID_BYTES));
    let off = in_width(mode, on.after(CALL));

    let code = image.code(Addr::new(plan.window_at));
    let window = code.get(..usize::from(plan.window_bytes)).ok_or(Reason::NoCode)?;
    let thunk = |target: Addr| pc_thunk_at(mode, image.code(Addr::new(target.value().wrapping_sub(request.bias))));
    let options = RelocateOptions { pc_thunk: Some(&thunk) };
    let moved = relocate(mode, window_at, window, window.len(), off, &options).map_err(|error| match error.reason {
        RelocateReason::OperandOutOfReach => Reason::OutOfReach,
        _ => Reason::NotRelocatable(error),
    })?;
    if moved.bytes.len() > usize::from(plan.stub_bytes) {
        return Err(Reason::OutOfReach);
    }

    let id = request.first_site.wrapping_add(u32::try_from(index).unwrap_or(u32::MAX));
    let mut stub = id.to_le_bytes().to_vec();
    stub.extend_from_slice(&call_of_entry(mode, request, plan, on)?);
    stub.extend_from_slice(&moved.bytes);

    let out_of_reach = |_: OutOfReach| Reason::OutOfReach;
    let replace = |at: u64, new: &[u8]| {
        let expected = image.code(Addr::new(at)).get(..new.len()).ok_or(Reason::NoCode)?;
        Ok(Write { at: in_process(at), expected: InsnBytes::new(expected), new: InsnBytes::new(new) })
    };
    let jump_at = match plan.rung {
        Rung::ShortJump { pad } => pad,
        _ => plan.window_at,
    };
    let jump = encode::jmp(in_process(jump_at), on, mode).map_err(out_of_reach)?;
    let mut writes = vec![replace(jump_at, &jump)?];
    if jump_at != plan.window_at {
        let distance = jump_at.wrapping_sub(plan.window_at + 2).cast_signed();
        let distance = i8::try_from(distance).map_err(|_| Reason::OutOfReach)?;
        writes.push(replace(plan.window_at, &[0xeb, distance.cast_unsigned()])?);
    }
    for branch in &plan.redirected {
        let follow = |target: u64| {
            let offset = u32::try_from(target.checked_sub(plan.window_at)?).ok()?;
            let (_, stub_offset) = moved.boundaries.iter().find(|(old, _)| *old == offset)?;
            Some(off.offset(i64::from(*stub_offset)))
        };
        let (at, displacement) = redirect(image, *branch, in_process, follow).ok_or(Reason::OutOfReach)?;
        writes.push(replace(at, &displacement)?);
    }
    let site =
        ArmedSite { id, function: index, address: in_process(function.address), on, off, jump_at: in_process(jump_at) };
    Ok(Part { stub, writes, site })
}

/// The call at the beginning of a stub, of the entry itself or of the jump to it.
fn call_of_entry(mode: Mode, request: &ArmRequest<'_>, plan: &Plan, at: Addr) -> Result<InsnBytes, Reason> {
    let entries = request.entries;
    let (entry, index) = if plan.entry_only.is_some() || !request.returns {
        (entries.point, 3)
    } else if request.limit_depth {
        (entries.enter_limited, 2)
    } else if plan.keep_flags {
        (entries.enter_keep_flags, 1)
    } else {
        (entries.enter, 0)
    };
    let direct = encode::call(at, entry, mode);
    let through = || encode::call(at, request.stubs_at.after(index * VENEER_BYTES), mode);
    direct.or_else(|_| through()).map_err(|_| Reason::OutOfReach)
}

/// The displacement of the branch at `branch` that leads to where its target went, and where that displacement stands in the file.
fn redirect(
    image: &Image,
    branch: u64,
    in_process: impl Fn(u64) -> Addr,
    follow: impl Fn(u64) -> Option<Addr>,
) -> Option<(u64, [u8; 4])> {
    let mut decoder = decoder(image.mode(), branch, image.code(Addr::new(branch)));
    let insn = decoder.decode();
    let target = follow(branch_target(&insn)?)?;
    let constants = decoder.get_constant_offsets(&insn);
    let distance = target.distance_from(in_process(insn.next_ip()));
    let displacement = match image.mode() {
        #[expect(clippy::cast_possible_truncation, reason = "the CPU computes modulo 2^32 as well")]
        Mode::Bits32 => distance as i32,
        Mode::Bits64 => i32::try_from(distance).ok()?,
    };
    let is_long = constants.immediate_size() == size_of::<i32>();
    is_long.then(|| (branch + constants.immediate_offset() as u64, displacement.to_le_bytes()))
}

/// An address as the instruction pointer holds it.
fn in_width(mode: Mode, addr: Addr) -> Addr {
    match mode {
        Mode::Bits32 => Addr::new(addr.value() & u64::from(u32::MAX)),
        Mode::Bits64 => addr,
    }
}
