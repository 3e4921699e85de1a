//! What an area of stubs has beside the stubs: its head, the table of places, and detours.
//!
//! Owns their encoding, as `trapline_abi::agent` describes it. Upstream [`arm`](crate::arm) says where things are. Invariant: places ascend.

use std::mem::offset_of;

use trapline_abi::agent::{CALLED_CODE, DETOUR_HELPERS, Detour, NO_CODE, StubArea, StubPlace};
use trapline_engine::{Addr, Mode};

/// Room for the head.
pub(crate) const HEAD_BYTES: usize = size_of::<StubArea>().next_multiple_of(16);

/// Bytes of a detour's code; the [`Detour`] is behind it.
pub(crate) const DETOUR_CODE_BYTES: usize = 16;

/// `lea r10, [rip + 9]`: the detour. `jmp [rip + 3]`: what it leads through. Filled up.
const DETOUR_CODE: [u8; DETOUR_CODE_BYTES] = [0x4c, 0x8d, 0x15, 9, 0, 0, 0, 0xff, 0x25, 3, 0, 0, 0, 0xcc, 0xcc, 0xcc];

/// The code of a detour at `at`.
fn detour_code(mode: Mode, at: Addr) -> [u8; DETOUR_CODE_BYTES] {
    let mut code = DETOUR_CODE;
    if mode == Mode::Bits32 {
        let detour = at.after(DETOUR_CODE_BYTES).value().to_le_bytes();
        // mov edx, detour; jmp [detour].
        code.fill(0xcc);
        code[0] = 0xba;
        code[1..5].copy_from_slice(&detour[..4]);
        code[5..7].copy_from_slice(&[0xff, 0x25]);
        code[7..11].copy_from_slice(&detour[..4]);
    }
    code
}

const _: () = assert!(offset_of!(Detour, through) == 0 && offset_of!(Detour, function) == 8);
const _: () = assert!(offset_of!(Detour, helpers) == 16 && size_of::<Detour>() == 16 + 8 * DETOUR_HELPERS);
const _: () = assert!(offset_of!(StubArea, next) == 0 && offset_of!(StubArea, len_bytes) == 8);
const _: () = assert!(offset_of!(StubArea, places_at) == 16 && offset_of!(StubArea, place_count) == 20);
const _: () = assert!(offset_of!(StubPlace, stub) == 0 && offset_of!(StubPlace, code) == 4);

/// What stands from `offset` on in the area at `area_at`, for the code at `to`.
pub(crate) fn place(mode: Mode, area_at: Addr, offset: usize, to: Addr) -> StubPlace {
    let distance = to.distance_from(area_at);
    let distance = match mode {
        #[expect(clippy::cast_possible_truncation, reason = "addresses are added modulo 2^32")]
        Mode::Bits32 => Some(distance as i32),
        Mode::Bits64 => i32::try_from(distance).ok(),
    };
    let code = distance.filter(|code| *code > CALLED_CODE).unwrap_or(NO_CODE);
    StubPlace { stub: u32::try_from(offset).unwrap_or(u32::MAX), code }
}

/// Puts the table behind the stubs, and the head before them.
pub(crate) fn finish(area: &mut Vec<u8>, places: &[StubPlace]) {
    area.resize(area.len().next_multiple_of(align_of::<StubPlace>()), 0);
    let [places_at, place_count] = [area.len(), places.len()].map(|number| u32::try_from(number).unwrap_or(0));
    for StubPlace { stub, code } in places {
        area.extend_from_slice(&stub.to_le_bytes());
        area.extend_from_slice(&code.to_le_bytes());
    }
    let len_bytes = area.len() as u64;
    area[8..16].copy_from_slice(&len_bytes.to_le_bytes());
    area[16..20].copy_from_slice(&places_at.to_le_bytes());
    area[20..24].copy_from_slice(&place_count.to_le_bytes());
    area[..8].fill(0);
}

/// The code and data of a detour, for the address `at` in the process.
pub(crate) fn detour(mode: Mode, at: Addr, detour: &Detour) -> Vec<u8> {
    let words = [detour.through, detour.function].into_iter().chain(detour.helpers);
    detour_code(mode, at).into_iter().chain(words.flat_map(u64::to_le_bytes)).collect()
}
