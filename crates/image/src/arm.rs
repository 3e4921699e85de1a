//! From plans to bytes: stubs, and what has to be written where.
//!
//! Owns [`ArmRequest`] and [`Armed`], and the layout of stubs that `trapline_abi::agent` describes. Neighbours: the ladder made the plans, [`area`] encodes
//! what is beside the stubs, the recorder writes what comes out. Invariants: the same request gives the same bytes; every write says which bytes it replaces.

use rayon::prelude::*;
use trapline_abi::agent::{
    CALLED_CODE, DETOUR_HELPERS, Detour, ENTRY_CODE, POPPED_SHIFT, POPPED_UNKNOWN, SITE_ID_BYTES, StubPlace,
};
use trapline_engine::{
    Addr, AddrRange, Mode,
    insn::{InsnBytes, OutOfReach, RelocateError, RelocateOptions, RelocateReason, Relocated, encode, relocate},
};

use crate::{
    Function, Image, Plan, Reason, Rung, Verdict,
    area::{self, DETOUR_CODE_BYTES, HEAD_BYTES},
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
    /// `trapline_abi::agent::symbol::POINT_KEEP_FLAGS`.
    pub point_keep_flags: Addr,
}

impl Entries {
    /// All of them in one place.
    pub const fn all_at(at: Addr) -> Self {
        Self { enter: at, enter_keep_flags: at, enter_limited: at, point: at, point_keep_flags: at }
    }

    /// In the order of their veneers.
    const fn list(self) -> [Addr; VENEERS] {
        [self.enter, self.enter_keep_flags, self.enter_limited, self.point, self.point_keep_flags]
    }
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
    /// Functions that are led through the agent, selected or not.
    pub shims: &'a [Shim],
    /// Functions whose beginning is not the file's.
    pub diverted: &'a [Diverted],
}

/// A function that a jump stands before in the process: that of a live patch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Diverted {
    /// Where the jump is, in the process.
    pub at: Addr,
    /// The jump.
    pub jump: InsnBytes,
    /// Where it leads.
    pub to: Addr,
}

/// A function that is led through code of the agent's: see [`Detour`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shim {
    /// Its index in [`Image::functions`].
    pub function: usize,
    /// Where it is led.
    pub through: Addr,
    /// Functions of the same file for the code there to call.
    pub helpers: [Option<usize>; DETOUR_HELPERS],
}

/// Everything that arms the functions of one request.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Armed {
    /// For [`ArmRequest::stubs_at`]; code and read-only data. Begins with a [`StubArea`](trapline_abi::agent::StubArea), whose `next` is left to the
    /// caller.
    pub stubs: Vec<u8>,
    /// Ascending by address, not overlapping. To be made when the stubs stand and no thread is inside a window.
    pub writes: Vec<Write>,
    /// Ascending by function.
    pub sites: Vec<ArmedSite>,
    /// Functions that have a stub and are not selected: those that are led through the agent.
    pub unselected: Vec<ArmedSite>,
    /// Of functions that are diverted, what they are without that.
    pub set_aside: Vec<SetAside>,
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
    /// The first half of its stub: the jump to what calls an entry, or that call. It is the one instruction to poke to switch the site.
    pub on: Addr,
    /// The second half: only what the function does itself.
    pub off: Addr,
    /// Where the jump of 5 bytes stands. It leads to `on`, perhaps by a detour.
    pub jump_at: Addr,
    /// Where the instructions are that its stub has in place of the function.
    pub window_at: Addr,
    /// How many bytes those are in the stub, from `off` on.
    pub moved_bytes: usize,
}

/// What belongs to a function that is not diverted, and is not there while it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SetAside {
    /// The function's [`ArmedSite::off`].
    pub off: Addr,
    /// What its stub has there.
    pub moved: Vec<u8>,
    /// What leads to the stub, at the function's beginning.
    pub write: Write,
}

/// Behind the shared jumps, and between stubs, so that nobody runs on.
const FILLER: u8 = 0xcc;

/// The second half of a stub's beginning: the jump or call.
const CALL: usize = 5;

/// What a stub ends with: `push`, `jmp`, and the address that is pushed, which is that of the stub's second half.
const ENTER_BYTES: usize = 6 + 6 + 8;

/// Bytes of `push imm32`.
const PUSH: usize = 5;

/// Code of stubs is aligned to this.
const ALIGN_BYTES: usize = 16;

/// Bytes of a jump to anywhere, and of the address that it goes to.
const VENEER_BYTES: usize = 16;

/// One for each of the [`Entries`].
const VENEERS: usize = 5;

/// How many bytes the stubs of these functions take at most, with the table of their places.
pub(crate) fn stub_bytes_bound(functions: &[Function], selected: &[usize], shims: &[Shim]) -> usize {
    let wanted = wanted(selected, shims);
    let places = wanted.iter().filter_map(|one| functions.get(one.function)?.plan());
    // One for the veneers; for each stub one for its beginning, one for each instruction, one for the jump back or behind a push, two for its end, one for
    // the detour.
    let places = 1 + places.map(|plan| 5 + usize::from(plan.window_bytes)).sum::<usize>();
    layout(functions, &wanted).1.next_multiple_of(align_of::<StubPlace>()) + places * size_of::<StubPlace>()
}

/// A function that gets a stub.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    function: usize,
    is_selected: bool,
    shim: Option<&'a Shim>,
}

/// All functions that get stubs, ascending.
fn wanted<'a>(selected: &[usize], shims: &'a [Shim]) -> Vec<Wanted<'a>> {
    let shim_of = |function: usize| shims.iter().find(|shim| shim.function == function);
    let selected_ones =
        selected.iter().map(|&function| Wanted { function, is_selected: true, shim: shim_of(function) });
    let mut all: Vec<_> = selected_ones.collect();
    let others = shims.iter().filter(|shim| !selected.contains(&shim.function));
    all.extend(others.map(|shim| Wanted { function: shim.function, is_selected: false, shim: Some(shim) }));
    all.sort_by_key(|one| one.function);
    all
}

/// Where a function's stub goes, from the start of the area.
#[derive(Clone, Copy)]
struct Room {
    /// Its id.
    id: usize,
    /// Its detour.
    detour: Option<usize>,
}

/// Where each stub goes, and where the last one ends. It does not depend on addresses.
fn layout(functions: &[Function], wanted: &[Wanted<'_>]) -> (Vec<Option<Room>>, usize) {
    let mut end = HEAD_BYTES + VENEERS * VENEER_BYTES;
    let room = |one: &Wanted<'_>| {
        let plan = functions.get(one.function).and_then(Function::plan)?;
        let code = (end + SITE_ID_BYTES).next_multiple_of(ALIGN_BYTES);
        end = code + CALL + usize::from(plan.stub_bytes) + ENTER_BYTES;
        let detour = one.shim.map(|_| end.next_multiple_of(ALIGN_BYTES));
        end = detour.map_or(end, |detour| detour + DETOUR_CODE_BYTES + size_of::<Detour>());
        Some(Room { id: code - SITE_ID_BYTES, detour })
    };
    let rooms = wanted.iter().map(room).collect();
    (rooms, end)
}

/// What one function adds.
struct Part {
    stub: Vec<u8>,
    writes: Vec<Write>,
    site: ArmedSite,
    set_aside: Option<SetAside>,
    /// Offset in the stub's code and address in the process of each of its pieces.
    places: Vec<(usize, Addr)>,
    /// Offset in the stub's code of the instruction behind the push of a return address.
    called: Option<usize>,
    /// Offsets in the stub's code of its end and of the second instruction there.
    enter: Option<[usize; 2]>,
}

/// See [`Image::arm`].
pub(crate) fn arm(image: &Image, request: &ArmRequest<'_>) -> Armed {
    let wanted = wanted(request.selected, request.shims);
    let (rooms, len_bytes) = layout(image.functions(), &wanted);
    let mut armed = Armed { stubs: vec![FILLER; len_bytes], ..Armed::default() };
    for (index, entry) in request.entries.list().into_iter().enumerate() {
        armed.stubs[veneer_at(index)..][..VENEER_BYTES].copy_from_slice(&veneer(image.mode(), entry));
    }
    let parts: Vec<Result<Part, Reason>> = wanted
        .par_iter()
        .zip(&rooms)
        .with_min_len(64)
        .map(|(one, room)| match room {
            Some(room) => part(image, request, *one, *room),
            None => {
                Err(image.functions().get(one.function).map_or(Reason::NoCode, |function| match &function.verdict {
                    Verdict::Untraced(reason) => *reason,
                    Verdict::Traced(_) => Reason::NoCode,
                }))
            }
        })
        .collect();
    // How a function is entered without being recorded.
    let unrecorded = |index: usize| {
        let found = wanted.iter().position(|one| one.function == index);
        match found.and_then(|at| parts[at].as_ref().ok()) {
            Some(part) => Some(part.site.off),
            None => Some(Addr::new(image.functions().get(index)?.address.wrapping_add(request.bias))),
        }
    };
    let detours: Vec<Option<Vec<u8>>> = (wanted.iter().zip(&parts).zip(&rooms))
        .map(|((one, part), room)| {
            let (shim, part) = (one.shim?, part.as_ref().ok()?);
            let at = request.stubs_at.after((*room)?.detour?);
            let helpers = shim.helpers.map(|helper| helper.and_then(unrecorded).map_or(0, Addr::value));
            let detour = Detour { through: shim.through.value(), function: part.site.on.value(), helpers };
            Some(area::detour(image.mode(), at, &detour))
        })
        .collect();
    let first_veneer = u32::try_from(veneer_at(0)).unwrap_or(u32::MAX);
    let mut places = vec![StubPlace { stub: first_veneer, code: ENTRY_CODE }];
    for (((one, room), part), detour) in wanted.iter().zip(rooms).zip(parts).zip(detours) {
        match (part, room) {
            (Ok(part), Some(room)) => {
                armed.stubs[room.id..room.id + part.stub.len()].copy_from_slice(&part.stub);
                let code = room.id + SITE_ID_BYTES;
                places.extend(
                    part.places
                        .iter()
                        .map(|(offset, to)| area::place(image.mode(), request.stubs_at, code + offset, *to)),
                );
                places.extend(part.called.map(|offset| StubPlace {
                    stub: u32::try_from(code + offset).unwrap_or(u32::MAX),
                    code: CALLED_CODE,
                }));
                if let Some([push, jump]) = part.enter {
                    places.push(area::place(image.mode(), request.stubs_at, code + push, part.site.window_at));
                    places.push(StubPlace { stub: u32::try_from(code + jump).unwrap_or(u32::MAX), code: ENTRY_CODE });
                }
                if let (Some(at), Some(bytes)) = (room.detour, detour) {
                    armed.stubs[at..at + bytes.len()].copy_from_slice(&bytes);
                    places.push(area::place(image.mode(), request.stubs_at, at, part.site.address));
                }
                armed.writes.extend(part.writes);
                armed.set_aside.extend(part.set_aside);
                if one.is_selected { &mut armed.sites } else { &mut armed.unselected }.push(part.site);
            }
            (Err(reason), _) if one.is_selected => armed.refused.push((one.function, reason)),
            (Err(_), _) | (Ok(_), None) => {}
        }
    }
    armed.writes.sort_by_key(|write| write.at);
    area::finish(&mut armed.stubs, &places);
    armed
}

/// Where the jump to an entry is, from the area's start.
const fn veneer_at(index: usize) -> usize {
    HEAD_BYTES + index * VENEER_BYTES
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

/// Encodes what one function adds.
fn part(image: &Image, request: &ArmRequest<'_>, wanted: Wanted<'_>, room: Room) -> Result<Part, Reason> {
    let index = wanted.function;
    let function = &image.functions()[index];
    let Some(plan) = function.plan() else { return Err(Reason::NoCode) };
    let mode = image.mode();
    let in_process = |address: u64| in_width(mode, Addr::new(address.wrapping_add(request.bias)));
    let window_at = in_process(plan.window_at);
    let id_at = in_width(mode, request.stubs_at.after(room.id));
    let on = in_width(mode, id_at.after(SITE_ID_BYTES));
    let off = in_width(mode, on.after(CALL));

    let code = image.code(Addr::new(plan.window_at));
    let window = code.get(..usize::from(plan.window_bytes)).ok_or(Reason::NoCode)?;
    let thunk = |target: Addr| pc_thunk_at(mode, image.code(Addr::new(target.value().wrapping_sub(request.bias))));
    let options = RelocateOptions { pc_thunk: Some(&thunk) };
    let here =
        AddrRange::new(in_process(function.address), plan.window_at - function.address + u64::from(plan.window_bytes));
    let diverted = request.diverted.iter().find(|diverted| here.contains(diverted.at));
    let relocated = relocate(mode, window_at, window, window.len(), off, &options);
    let (moved, own) = match diverted {
        // The function as it is now is that jump.
        Some(diverted) if diverted.at == window_at && !matches!(plan.rung, Rung::ShortJump { .. }) => {
            instead(mode, off, diverted, relocated.ok())?
        }
        Some(_) => return Err(Reason::Patched),
        None => (relocated.map_err(not_moved)?, None),
    };
    if moved.bytes.len() > usize::from(plan.stub_bytes) {
        return Err(Reason::OutOfReach);
    }

    let id = request.first_site.wrapping_add(u32::try_from(index).unwrap_or(u32::MAX));
    let mut stub = (id | popped(mode, plan)).to_le_bytes().to_vec();
    let enter_at = CALL + moved.bytes.len();
    let entry = wanted.is_selected.then(|| entry_for(request, plan));
    let jumps = entry.filter(|entry| entry.hooks && mode == Mode::Bits64);
    let first = match entry {
        None => encode::nop(CALL),
        Some(_) if jumps.is_some() => encode::jmp(on, on.after(enter_at), mode).map_err(|_| Reason::OutOfReach)?,
        Some(entry) => {
            let direct = encode::call(on, entry.at, mode);
            let through = || encode::call(on, request.stubs_at.after(veneer_at(entry.veneer)), mode);
            direct.or_else(|_| through()).map_err(|_| Reason::OutOfReach)?
        }
    };
    stub.extend_from_slice(&first);
    stub.extend_from_slice(&moved.bytes);
    let enter = match jumps {
        Some(entry) => {
            let (code, second) = enter(request, entry, on.after(enter_at), off)?;
            stub.extend_from_slice(&code);
            Some([enter_at, enter_at + second])
        }
        None => None,
    };
    // The stub's first instruction stands for the window's.
    let mut places = vec![(0, window_at)];
    // A call is the last one, and begins with `push imm32`.
    let called = moved.boundaries.last().filter(|_| moved.emulates_call).map(|(_, new)| CALL + *new as usize + PUSH);
    places.extend(moved.boundaries.iter().map(|(old, new)| (CALL + *new as usize, window_at.after(*old as usize))));

    let out_of_reach = |_: OutOfReach| Reason::OutOfReach;
    let replace = |at: u64, new: &[u8]| {
        let expected = image.code(Addr::new(at)).get(..new.len()).ok_or(Reason::NoCode)?;
        Ok(Write { at: in_process(at), expected: InsnBytes::new(expected), new: InsnBytes::new(new) })
    };
    let jump_at = match plan.rung {
        Rung::ShortJump { pad } => pad,
        _ => plan.window_at,
    };
    let first = room.detour.map_or(on, |detour| request.stubs_at.after(detour));
    let jump = encode::jmp(in_process(jump_at), first, mode).map_err(out_of_reach)?;
    let mut writes = vec![replace(jump_at, &jump)?];
    let set_aside = own.map(|moved| SetAside { off, moved, write: writes[0] });
    if let Some(diverted) = diverted {
        writes[0].expected = diverted.jump;
    }
    if jump_at != plan.window_at {
        let distance = jump_at.wrapping_sub(plan.window_at + 2).cast_signed();
        let distance = i8::try_from(distance).map_err(|_| Reason::OutOfReach)?;
        writes.push(replace(plan.window_at, &[0xeb, distance.cast_unsigned()])?);
    }
    // Nobody executes the old body of a function that is diverted, before it is that no more.
    let redirected = if diverted.is_none() || set_aside.is_some() { &plan.redirected[..] } else { &[] };
    for branch in redirected {
        let follow = |target: u64| {
            let offset = u32::try_from(target.checked_sub(plan.window_at)?).ok()?;
            let (_, stub_offset) = moved.boundaries.iter().find(|(old, _)| *old == offset)?;
            Some(off.offset(i64::from(*stub_offset)))
        };
        let (at, displacement) = redirect(image, *branch, in_process, follow).ok_or(Reason::OutOfReach)?;
        writes.push(replace(at, &displacement)?);
    }
    let site = ArmedSite {
        id,
        function: index,
        address: in_process(function.address),
        on,
        off,
        jump_at: in_process(jump_at),
        window_at,
        moved_bytes: moved.bytes.len(),
    };
    Ok(Part { stub, writes, site, set_aside, places, called, enter })
}

/// What the stub of a diverted function has in place of its instructions, which are also returned: there is room for them, if they can be moved.
fn instead(
    mode: Mode,
    off: Addr,
    diverted: &Diverted,
    relocated: Option<Relocated>,
) -> Result<(Relocated, Option<Vec<u8>>), Reason> {
    let mut bytes = encode::jmp(off, diverted.to, mode).map_err(|_| Reason::OutOfReach)?.to_vec();
    let Some(relocated) = relocated.filter(|relocated| relocated.bytes.len() >= bytes.len()) else {
        let consumed_bytes = diverted.jump.len();
        return Ok((Relocated { bytes, consumed_bytes, boundaries: vec![(0, 0)], emulates_call: false }, None));
    };
    bytes.resize(relocated.bytes.len(), FILLER);
    let own = relocated.bytes.clone();
    Ok((Relocated { bytes, ..relocated }, Some(own)))
}

/// Why a function's instructions cannot be in its stub.
fn not_moved(error: RelocateError) -> Reason {
    match error.reason {
        RelocateReason::OperandOutOfReach => Reason::OutOfReach,
        _ => Reason::NotRelocatable(error),
    }
}

/// One of the [`Entries`].
#[derive(Clone, Copy)]
struct Entry {
    at: Addr,
    /// Which of the veneers leads there: its place in [`Entries::list`].
    veneer: usize,
    /// Whether it hooks the return.
    hooks: bool,
}

/// Which entry records the function of this plan.
fn entry_for(request: &ArmRequest<'_>, plan: &Plan) -> Entry {
    let hooks = plan.entry_only.is_none() && request.returns;
    let veneer = match (hooks, request.limit_depth, plan.keep_flags) {
        (true, false, false) => 0,
        (true, false, true) => 1,
        (true, true, _) => 2,
        (false, _, false) => 3,
        (false, _, true) => 4,
    };
    Entry { at: request.entries.list()[veneer], veneer, hooks }
}

/// What stands above the site's id in front of a stub of 32-bit code: what the function pops.
fn popped(mode: Mode, plan: &Plan) -> u32 {
    const WORD_BYTES: u16 = 4;
    let words = plan.popped_bytes.filter(|bytes| bytes.is_multiple_of(WORD_BYTES)).map(|bytes| bytes / WORD_BYTES);
    match mode {
        Mode::Bits32 => words.map_or(POPPED_UNKNOWN, u32::from).min(POPPED_UNKNOWN) << POPPED_SHIFT,
        Mode::Bits64 => 0,
    }
}

/// What pushes `off` and jumps to the entry, for the address `at` of 64-bit code, and where its second instruction is.
fn enter(request: &ArmRequest<'_>, entry: Entry, at: Addr, off: Addr) -> Result<([u8; ENTER_BYTES], usize), Reason> {
    const NEXT: usize = 6;
    let mut code = [FILLER; ENTER_BYTES];
    // Of the veneer's jump.
    let word = request.stubs_at.after(veneer_at(entry.veneer) + VENEER_BYTES - size_of::<u64>());
    let distance = i32::try_from(word.distance_from(at.after(2 * NEXT))).map_err(|_| Reason::OutOfReach)?;
    // push [rip + 6]: the last word. jmp [rip + distance].
    code[..NEXT].copy_from_slice(&[0xff, 0x35, 6, 0, 0, 0]);
    code[NEXT..NEXT + 2].copy_from_slice(&[0xff, 0x25]);
    code[NEXT + 2..2 * NEXT].copy_from_slice(&distance.to_le_bytes());
    code[2 * NEXT..].copy_from_slice(&off.value().to_le_bytes());
    Ok((code, NEXT))
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
