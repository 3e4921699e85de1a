//! The agent's own unwind information, for unwinders of the program.
//!
//! Owns the search of tables, and the answer for an address of the agent's code, from its `.eh_frame_hdr` (Linux Standard Base, "Exception Frames"). The C library knows only
//! the objects that the dynamic linker has loaded, which the agent may not be. Invariant: async-signal-safe.

use crate::arch;

/// `PT_GNU_EH_FRAME`.
const UNWIND_TABLE: u32 = 0x6474_e550;

/// The header's first word: version 1; `.eh_frame`'s address in 4 bytes from the field, the count in 4 bytes, pairs of 4 bytes from the header.
const HEADER: u32 = u32::from_le_bytes([1, 0x1b, 0x03, 0x3b]);
const COUNT_AT: usize = 8;
const PAIRS_AT: usize = 12;
const PAIR_BYTES: usize = 8;

/// What `_Unwind_Find_FDE` answers beside the unwind information: bases of relative addresses, of which the agent has none, and the function's beginning.
#[repr(C)]
struct Bases {
    text: usize,
    data: usize,
    function: usize,
}

/// The unwind information for `address`, if that is the agent's, and 0 otherwise.
#[unsafe(no_mangle)]
extern "C" fn trapline_own_information(address: usize, answer: *mut Bases) -> usize {
    if !arch::is_own(address) {
        return 0;
    }
    let Some((information, function)) = find(address) else { return 0 };
    // SAFETY: the unwinder has it on its stack, and waits for us.
    unsafe { *answer = Bases { text: 0, data: 0, function } };
    information
}

/// A value in the agent's file as it is mapped.
///
/// # Safety
/// It is there.
unsafe fn read<T: Copy>(at: usize) -> T {
    // SAFETY: by the caller's promise. Nothing of it is ever written.
    unsafe { (at as *const T).read_unaligned() }
}

/// Where the table's header is.
fn table() -> Option<usize> {
    const IS_WIDE: bool = usize::BITS == u64::BITS;
    /// `e_phoff`.
    const HEADERS_AT: usize = if IS_WIDE { 32 } else { 28 };
    /// `e_phnum`.
    const COUNT_AT: usize = if IS_WIDE { 56 } else { 44 };
    const HEADER_BYTES: usize = if IS_WIDE { 56 } else { 32 };
    /// `p_vaddr`.
    const ADDRESS_AT: usize = if IS_WIDE { 16 } else { 8 };
    let start = arch::start();
    // SAFETY: the ELF header is mapped, and the program headers are (System V ABI, "ELF Header").
    let headers = start + unsafe { read::<usize>(start + HEADERS_AT) };
    // SAFETY: as above.
    let count = unsafe { read::<u16>(start + COUNT_AT) };
    let mut all = (0..usize::from(count)).map(|index| headers + index * HEADER_BYTES);
    // SAFETY: as above.
    let header = all.find(|header| unsafe { read::<u32>(*header) } == UNWIND_TABLE)?;
    // SAFETY: as above.
    let at = start + unsafe { read::<usize>(header + ADDRESS_AT) };
    // SAFETY: the linker has put the table there.
    (unsafe { read::<u32>(at) } == HEADER).then_some(at)
}

/// The last of `count` keys in ascending order that is not above `wanted`.
pub(crate) fn last_not_above(count: u32, key: impl Fn(u32) -> usize, wanted: usize) -> Option<u32> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        if key(middle) <= wanted {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low.checked_sub(1)
}

/// The unwind information of the function that `address` is in, and the function's beginning.
fn find(address: usize) -> Option<(usize, usize)> {
    const LENGTH_AT: usize = 12;
    let table = table()?;
    // SAFETY: the linker has written the table.
    let count = unsafe { read::<u32>(table + COUNT_AT) };
    // SAFETY: asked for the pairs of the table, which has as many as it says.
    let from_table = |at: usize| table.wrapping_add_signed(unsafe { read::<i32>(at) } as isize);
    let pair = |index: u32| table + PAIRS_AT + index as usize * PAIR_BYTES;
    let last = pair(last_not_above(count, |index| from_table(pair(index)), address)?);
    let (function, information) = (from_table(last), from_table(last + PAIR_BYTES / 2));
    // SAFETY: an entry of `.eh_frame` has its length, its CIE, the function's beginning and its size in 4 bytes each.
    let len_bytes = unsafe { read::<u32>(information + LENGTH_AT) } as usize;
    (address < function + len_bytes).then_some((information, function))
}
