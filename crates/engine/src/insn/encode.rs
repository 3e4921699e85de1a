//! The instructions that trapline itself puts into a site: nop, call, jmp and int3.
//!
//! Owns their bytes. Neighbours: ops decide which one a site shall hold, the poke writes it, [`Effect`](super::Effect)
//! tells the int3 handler what it does. Invariant: what comes out is exactly one instruction of the length asked for,
//! so that no thread can be interrupted in the middle of it.

use core::{error::Error, fmt};

use super::{InsnBytes, MAX_INSN_BYTES};
use crate::{Addr, Mode};

/// The breakpoint instruction that holds a site while the bytes behind it change.
pub const INT3: u8 = 0xcc;

/// Bytes in a `call rel32` and in a `jmp rel32`.
pub const CALL_BYTES: usize = 5;

const OPCODE_CALL: u8 = 0xe8;
const OPCODE_JMP: u8 = 0xe9;

/// SDM volume 2B, table 4-12 "Recommended Multi-Byte Sequence of NOP Instruction". The opcode `0f 1f`, from three bytes
/// on, is known to 32-bit CPUs since the Pentium Pro.
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// A target that `rel32` cannot express: more than 2 GiB away, in 64-bit mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfReach {
    /// Where the instruction would stand.
    pub from: Addr,
    /// What it should have led to.
    pub to: Addr,
}

impl fmt::Display for OutOfReach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is more than 2 GiB away from {}", self.to, self.from)
    }
}

impl Error for OutOfReach {}

/// One nop instruction of `len_bytes`, for either mode.
///
/// Up to nine bytes these are the SDM's own (volume 2B, table 4-12); longer ones repeat the operand-size prefix, as
/// assemblers do.
///
/// # Panics
/// If `len_bytes` is not in 1..=[`MAX_INSN_BYTES`].
pub fn nop(len_bytes: usize) -> InsnBytes {
    assert!((1..=MAX_INSN_BYTES).contains(&len_bytes), "no instruction has {len_bytes} bytes");
    let recommended = NOPS[len_bytes.min(NOPS.len()) - 1];
    let mut bytes = [0x66; MAX_INSN_BYTES];
    bytes[len_bytes - recommended.len()..len_bytes].copy_from_slice(recommended);
    InsnBytes::new(&bytes[..len_bytes])
}

/// `call target`, to stand at `at`. [`CALL_BYTES`] long.
///
/// # Errors
/// [`OutOfReach`] in 64-bit mode if the displacement from the end of the instruction does not fit 32 bits.
#[inline]
pub fn call(at: Addr, target: Addr, mode: Mode) -> Result<InsnBytes, OutOfReach> {
    rel32(OPCODE_CALL, at, target, mode)
}

/// `jmp target`, to stand at `at`. As long as a call: [`CALL_BYTES`].
///
/// # Errors
/// [`OutOfReach`] in 64-bit mode if the displacement from the end of the instruction does not fit 32 bits.
#[inline]
pub fn jmp(at: Addr, target: Addr, mode: Mode) -> Result<InsnBytes, OutOfReach> {
    rel32(OPCODE_JMP, at, target, mode)
}

#[inline]
fn rel32(opcode: u8, at: Addr, target: Addr, mode: Mode) -> Result<InsnBytes, OutOfReach> {
    let displacement = displacement32(at.after(CALL_BYTES), target, mode).ok_or(OutOfReach { from: at, to: target })?;
    Ok(InsnBytes::opcode_and_i32(opcode, displacement))
}

/// The `rel32` or RIP-relative `disp32` that leads from `next`, the end of the instruction, to `target`.
///
/// 32-bit code adds it modulo 2^32, so that every address is within reach there; in 64-bit mode it is sign-extended.
#[inline]
pub(super) fn displacement32(next: Addr, target: Addr, mode: Mode) -> Option<i32> {
    let distance = target.distance_from(next);
    match mode {
        #[expect(clippy::cast_possible_truncation, reason = "the CPU computes modulo 2^32 as well")]
        Mode::Bits32 => Some(distance as i32),
        Mode::Bits64 => i32::try_from(distance).ok(),
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    use super::*;

    const BOTH: [Mode; 2] = [Mode::Bits32, Mode::Bits64];

    #[test]
    fn nop_of_every_length_is_one_instruction() {
        for mode in BOTH {
            for len_bytes in 1..=MAX_INSN_BYTES {
                let bytes = nop(len_bytes);
                let insn = Decoder::new(mode.bitness(), &bytes, DecoderOptions::NONE).decode();
                assert_eq!((insn.mnemonic(), insn.len()), (Mnemonic::Nop, len_bytes), "{mode:?}: {bytes}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "no instruction has 0 bytes")]
    fn nop_of_no_bytes_panics() {
        nop(0);
    }

    #[test]
    #[should_panic(expected = "no instruction has 16 bytes")]
    fn nop_longer_than_an_instruction_panics() {
        nop(MAX_INSN_BYTES + 1);
    }

    #[test]
    fn call_and_jmp_have_the_bytes_that_an_assembler_gives() {
        let (at, target) = (Addr::new(0x40_1000), Addr::new(0x40_2345));
        for mode in BOTH {
            assert_eq!(*call(at, target, mode).unwrap(), [0xe8, 0x40, 0x13, 0, 0]);
            assert_eq!(*jmp(at, target, mode).unwrap(), [0xe9, 0x40, 0x13, 0, 0]);
            assert_eq!(*jmp(at, at, mode).unwrap(), [0xe9, 0xfb, 0xff, 0xff, 0xff]);
        }
    }

    #[test]
    fn reach_ends_at_two_gib_in_64_bit_mode_only() {
        let at = Addr::new(0x7f00_0000_0000);
        let (farthest_up, farthest_down) = (0x7fff_ffff + 5, -0x8000_0000 + 5);
        for (distance, reachable) in
            [(farthest_up, true), (farthest_up + 1, false), (farthest_down, true), (farthest_down - 1, false)]
        {
            let target = at.offset(distance);
            let expected_error = OutOfReach { from: at, to: target };
            assert_eq!(call(at, target, Mode::Bits64).err(), (!reachable).then_some(expected_error), "{distance:#x}");
            assert_eq!(jmp(at, target, Mode::Bits64).err(), (!reachable).then_some(expected_error), "{distance:#x}");
            assert!(call(at, target, Mode::Bits32).is_ok());
        }
    }

    #[test]
    fn displacement_wraps_at_4_gib_in_32_bit_mode() {
        let bytes = jmp(Addr::new(0xffff_f000), Addr::new(0x1000), Mode::Bits32).unwrap();
        assert_eq!(*bytes, [0xe9, 0xfb, 0x1f, 0, 0]);
    }
}
