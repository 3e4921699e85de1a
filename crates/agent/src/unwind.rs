//! What the program's unwinders are told, so that they see the frames that they would see without us.
//!
//! Owns what stands between the program and two functions of its unwinder, in each object that has them (`libgcc_s.so.1`, or an executable that is
//! linked with a copy):
//!
//! - `_Unwind_Find_FDE` finds the unwind information for an address: exceptions, cancellation and backtraces ask it at every frame. In place of the
//!   return code, the unwinder is moved on to where the hooked function returns, and in place of a stub to the instruction of the program that
//!   stands there.
//! - `_Unwind_Backtrace` calls the program back for each frame. Those of the agent are left out: what is left when a signal interrupts the agent,
//!   and the return code's where an unwinder has no `_Unwind_Find_FDE`. If an entry was interrupted, the armed function is shown in its place.
//!
//! Neighbours: [`arch`] has the code that detours lead to. Invariant: async-signal-safe, as the functions themselves are; nothing is changed
//! but what the unwinder has on its own stack.

use core::sync::atomic::Ordering;

use trapline_abi::agent::{CALLED_CODE, Detour, ENTRY_CODE, NO_CODE, StubArea, StubPlace};

use crate::{
    arch::{self, Code},
    shadow, tables,
};

/// The unwinder's state at a frame; opaque.
#[derive(Debug)]
#[repr(C)]
pub struct Context([u8; 0]);

type Callback = extern "C" fn(*mut Context, *mut u8) -> i32;

/// A walk over frames that the program has asked for; on the stack of `trapline_backtrace`.
#[derive(Debug)]
#[repr(C)]
pub struct Walk {
    callback: Callback,
    argument: *mut u8,
    detour: *const Detour,
    /// Whether the frame before was that of an entry.
    is_behind_entry: usize,
}

/// `_URC_NO_REASON`: go on.
const GO_ON: i32 = 0;

/// Helpers of the detour.
const GET_IP: usize = 0;
const GET_CFA: usize = 1;
const SET_IP: usize = 2;

/// The unwinder has come to a frame.
#[unsafe(no_mangle)]
extern "C" fn trapline_frame(context: *mut Context, walk: *mut Walk) -> i32 {
    // SAFETY: `trapline_backtrace` has made it, is still running, and no other thread knows it.
    let walk = unsafe { &mut *walk };
    // SAFETY: a detour is constant and is never unmapped.
    let helpers = unsafe { (*walk.detour).helpers }.map(in_word);
    let ask = |helper: usize| {
        // SAFETY: the recorder names a function of this type there, or 0, which is none.
        let function =
            unsafe { core::mem::transmute::<usize, Option<extern "C" fn(*mut Context) -> usize>>(helpers[helper]) };
        function.map_or(0, |function| function(context))
    };
    let address = ask(GET_IP);
    if walk.is_behind_entry != 0 {
        walk.is_behind_entry = 0;
        let answer = interrupted_function(walk, context, address, ask(GET_CFA), helpers[SET_IP]);
        if answer != GO_ON {
            return answer;
        }
    }
    match arch::code_at(address) {
        Code::Other => (walk.callback)(context, walk.argument),
        Code::Entry => {
            walk.is_behind_entry = 1;
            GO_ON
        }
        Code::Agent => GO_ON,
    }
}

/// Shows the function whose entry was interrupted, when the unwinder has come to its caller, which is at `address`.
fn interrupted_function(
    walk: &Walk,
    context: *mut Context,
    address: usize,
    frame_address: usize,
    set_ip: usize,
) -> i32 {
    const STUB_BELOW: usize = 2 * size_of::<usize>();
    // SAFETY: the recorder names a function of this type there, or 0, which is none.
    let set_ip = unsafe { core::mem::transmute::<usize, Option<extern "C" fn(*mut Context, usize)>>(set_ip) };
    let frame_address = aligned(frame_address);
    let (Some(set_ip), true) = (set_ip, frame_address > STUB_BELOW) else { return GO_ON };
    // SAFETY: the frame of an entry that was interrupted is still there: its return address into the stub is two words below.
    let into_stub = unsafe { *((frame_address - STUB_BELOW) as *const usize) };
    let Some(Place::Code(code)) = place_of(into_stub) else { return GO_ON };
    // As a return address: the instruction is the one before.
    set_ip(context, code + 1);
    let answer = (walk.callback)(context, walk.argument);
    set_ip(context, address);
    answer
}

/// How far before the place for its answer an unwinder has the address that it asks about, in words: of libgcc's `_Unwind_Context`, `cfa`, `ra` and
/// `lsda` come before `bases`.
const ADDRESS_BEFORE_ANSWER: usize = 2;
const FRAME_ADDRESS_BEFORE_ANSWER: usize = 3;

/// For what is at `address`, the unwinder is to look for `_Unwind_Find_FDE`'s answer. `answer` is where that goes.
#[unsafe(no_mangle)]
extern "C" fn trapline_real_place(address: usize, answer: *mut usize) -> usize {
    let asked = answer.wrapping_sub(ADDRESS_BEFORE_ANSWER);
    let is_context = |address: usize| {
        // SAFETY: the answer is on a stack, in the unwinder's context or at least in its caller's frame, and memory goes on below.
        answer.is_aligned() && unsafe { *asked } == address
    };
    let frame_address = || {
        // SAFETY: asked for contexts only: what has the value of the address that is asked about is one.
        unsafe { *answer.wrapping_sub(FRAME_ADDRESS_BEFORE_ANSWER) }
    };
    let move_on = |code: usize| {
        // SAFETY: as for `frame_address`.
        unsafe { *asked = code };
    };
    if address + 1 == arch::return_code() {
        if !is_context(address + 1) {
            return address;
        }
        // SAFETY: the unwinder has just come to this frame, so its frame address is that of the function that was to return here.
        let Some(code) = (unsafe { returns_to(frame_address()) }) else { return address };
        move_on(code);
        return code.wrapping_sub(1);
    }
    // A signal has interrupted the thread there: as a return address it would be one more.
    let Some(place) = place_of(address) else { return address };
    let is_context = is_context(address);
    let code = match place {
        Place::Code(code) => code,
        Place::Entry => arch::entry(),
        Place::Called { from } if is_context => {
            // SAFETY: the frame address of a thread that was interrupted is its stack pointer, and the stub has just pushed.
            unsafe { complete_return_address(frame_address(), from) };
            arch::any_function()
        }
        Place::Called { from } => from,
    };
    if is_context {
        move_on(code);
    }
    code
}

/// Does what the stub is about to do: stores the upper half of the return address that it has pushed, of a call at `from`. At 32 bit nothing is missing.
///
/// # Safety
/// The return address is at `at`, and the thread does not run.
unsafe fn complete_return_address(at: usize, from: usize) {
    const LOWER_HALF: usize = u32::MAX as usize;
    // SAFETY: by the caller's promise.
    let pushed = unsafe { &mut *(at as *mut usize) };
    // It is behind the call by less than the lower half holds.
    *pushed = from + ((*pushed).wrapping_sub(from) & LOWER_HALF);
}

/// Where the hooked function with this canonical frame address returns.
///
/// # Safety
/// It is that of a frame that was just unwound, and its return address that of the return code.
unsafe fn returns_to(frame_address: usize) -> Option<usize> {
    let slot = aligned(frame_address).wrapping_sub(size_of::<usize>());
    // SAFETY: the return address was read there, by the caller's promise.
    let return_address = unsafe { *(slot as *const usize) };
    // SAFETY: a hooked slot has a shadow.
    (return_address == arch::return_code()).then(|| unsafe { shadow::return_address(slot) })
}

/// Without the one that some of the agent's code has its canonical frame address above what it would be.
fn aligned(frame_address: usize) -> usize {
    frame_address & !(size_of::<usize>() - 1)
}

/// An address of this process, from what is shared with the recorder.
#[expect(clippy::cast_possible_truncation, reason = "addresses are as wide as words")]
fn in_word(address: u64) -> usize {
    address as usize
}

/// What a stub's instruction stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// The program's at this address.
    Code(usize),
    /// The first one of an entry.
    Entry,
    /// The first one of what the program's instruction at `from` calls.
    Called { from: usize },
}

/// What stands for what at this address, if that is in a stub.
fn place_of(address: usize) -> Option<Place> {
    // Acquire: pairs with the recorder's store, which comes when the area is complete.
    let mut area_at = arch::config_areas().load(Ordering::Acquire);
    loop {
        if area_at == 0 {
            return None;
        }
        // SAFETY: areas are never unmapped, and never change once they are in the list.
        let area = unsafe { &*(area_at as *const StubArea) };
        let offset = address.wrapping_sub(area_at);
        if offset < in_word(area.len_bytes) {
            return place_in(area, area_at, offset);
        }
        area_at = in_word(area.next);
    }
}

fn place_in(area: &StubArea, area_at: usize, offset: usize) -> Option<Place> {
    let place_at = |index: u32| {
        let at = area_at + area.places_at as usize + index as usize * size_of::<StubPlace>();
        // SAFETY: (1) the index is less than the count; (2) the table is aligned, and never changes.
        unsafe { *(at as *const StubPlace) }
    };
    let index = tables::last_not_above(area.place_count, |index| place_at(index).stub as usize, offset)?;
    let code_at = |code: i32| area_at.wrapping_add_signed(code as isize);
    match place_at(index).code {
        NO_CODE => None,
        ENTRY_CODE => Some(Place::Entry),
        CALLED_CODE => Some(Place::Called { from: code_at(place_at(index.checked_sub(1)?).code) }),
        code => Some(Place::Code(code_at(code))),
    }
}
