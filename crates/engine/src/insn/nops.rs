//! Runs of nops, as compilers leave them at function entries for others to use.
//!
//! Owns [`leading_nops`]. Neighbours: discovery in a host asks it what stands at a site that an object lists; which
//! instructions count is [`Effect`]'s business, so that whatever is found here can also be emulated while it is poked.
//! Invariant: the lengths add up to the bytes that execute as nops one after the other, none is cut off.

use super::{Effect, decode};
use crate::{Addr, Mode};

/// The lengths in bytes of the nop instructions that `bytes` begin with, in order; empty if they begin with anything else.
///
/// A nop that `bytes` cut off is not counted.
pub fn leading_nops(mode: Mode, bytes: &[u8]) -> impl Iterator<Item = usize> {
    let mut rest = bytes;
    core::iter::from_fn(move || {
        let len_bytes = nop_len_bytes(mode, rest)?;
        rest = &rest[len_bytes..];
        Some(len_bytes)
    })
}

/// The length of the nop at the beginning of `bytes`. A nop does not depend on where it stands.
fn nop_len_bytes(mode: Mode, bytes: &[u8]) -> Option<usize> {
    let at = Addr::new(0);
    let len_bytes = decode(mode, at, bytes).len();
    let is_nop = matches!(Effect::decode(mode, at, bytes.get(..len_bytes)?), Ok(Effect::Nop { .. }));
    is_nop.then_some(len_bytes)
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::leading_nops;
    use crate::Mode;

    fn lengths(mode: Mode, bytes: &[u8]) -> Vec<usize> {
        leading_nops(mode, bytes).collect()
    }

    #[test]
    fn gcc_leaves_single_byte_nops() {
        for mode in [Mode::Bits32, Mode::Bits64] {
            assert_eq!(lengths(mode, b"\x90\x90\x90\x90\x90\xc3"), [1; 5]);
        }
    }

    #[test]
    fn clang_leaves_long_nops_in_64_bit_code_and_pairs_in_32_bit_code() {
        assert_eq!(lengths(Mode::Bits64, b"\x0f\x1f\x44\x00\x08\xc3"), [5]);
        assert_eq!(lengths(Mode::Bits64, b"\x2e\x66\x0f\x1f\x84\x00\x00\x02\x00\x00\x0f\x1f\x00\x8d"), [10, 3]);
        assert_eq!(lengths(Mode::Bits32, b"\x66\x90\x66\x90\x90\x8b\x44\x24\x04"), [2, 2, 1]);
    }

    #[test]
    fn a_run_ends_at_the_first_other_instruction_and_at_a_nop_that_is_cut_off() {
        for mode in [Mode::Bits32, Mode::Bits64] {
            assert_eq!(lengths(mode, b"\x90\xcc\x90"), [1]);
            assert_eq!(lengths(mode, b"\x90\xf3\x90\x90"), [1], "pause is no nop");
            assert_eq!(lengths(mode, b"\x90\x0f\x1f\x44\x00"), [1]);
            assert_eq!(lengths(mode, b"\xf3\x0f\x1e\xfa"), [], "endbr64 has to stay");
            assert_eq!(lengths(mode, b"\xf3\x0f\x1e\xfb"), [], "endbr32 has to stay");
            assert_eq!(lengths(mode, b""), []);
        }
    }
}
