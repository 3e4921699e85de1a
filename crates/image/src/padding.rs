//! Bytes between functions that nobody executes.
//!
//! Owns [`Padding`]. Neighbours: the [ladder](crate::plan) gives it to functions that have no room of their own. Invariant: each byte is given out once, and none
//! that anything leads to.

use std::ops::Range;

use iced_x86::{Mnemonic, Register};
use trapline_engine::{Mode, insn::CALL_BYTES};

use crate::{
    marks::Text,
    scan::{Scanned, decoder},
};

/// The padding of a file.
#[derive(Debug)]
pub(crate) struct Padding {
    /// What is left, ascending.
    free: Vec<Range<u64>>,
}

impl Padding {
    /// Collects what stands behind the ends of functions.
    pub(crate) fn find(text: &Text<'_>, mode: Mode, scanned: &Scanned) -> Self {
        let mut free = Vec::new();
        let units = scanned.units.iter().zip(&scanned.facts);
        for ((before, facts), (unit, _)) in units.clone().zip(units.skip(1)) {
            let is_reached = facts.falls_through || before.range.end != unit.range.start;
            if is_reached || unit.candidate.is_some() {
                continue;
            }
            let len = leading_bytes(mode, text.range(unit.range.clone())) as u64;
            let range = unit.range.start..unit.range.start + len;
            let end = scanned.first_target(text, range.clone()).unwrap_or(range.end);
            let end = scanned.relocated.first_in(text, range.start..end).unwrap_or(end);
            if range.start < end {
                free.push(range.start..end);
            }
        }
        Self { free }
    }

    /// How much there is at `address`.
    pub(crate) fn len_at(&self, address: u64) -> usize {
        let index = self.free.partition_point(|range| range.end <= address);
        let range = self.free.get(index).filter(|range| range.contains(&address));
        range.map_or(0, |range| usize::try_from(range.end - address).unwrap_or(usize::MAX))
    }

    /// Takes the bytes of `used` out, and what is before them in the same piece.
    pub(crate) fn claim(&mut self, used: Range<u64>) {
        let first = self.free.partition_point(|range| range.end <= used.start);
        for range in &mut self.free[first..] {
            if range.start >= used.end {
                break;
            }
            range.start = used.end.min(range.end);
        }
    }

    /// Takes room for a jump inside of `reach`, as near to `address` as there is. Returns where.
    pub(crate) fn take(&mut self, address: u64, reach: &Range<u64>) -> Option<u64> {
        let jump_bytes = CALL_BYTES as u64;
        let first = self.free.partition_point(|range| range.end <= reach.start);
        let mut best: Option<(u64, usize, bool)> = None;
        for (index, range) in self.free[first..].iter().enumerate().take_while(|(_, range)| range.start < reach.end) {
            // From either end of the piece, so that what is left stays in one piece.
            for (at, is_front) in [(range.start, true), (range.end.saturating_sub(jump_bytes), false)] {
                let fits = at >= range.start && at + jump_bytes <= range.end;
                let is_near = reach.start <= at && at + jump_bytes <= reach.end;
                let distance = at.abs_diff(address);
                if fits && is_near && best.is_none_or(|(other, ..)| distance < other.abs_diff(address)) {
                    best = Some((at, first + index, is_front));
                }
            }
        }
        let (at, index, is_front) = best?;
        let range = &mut self.free[index];
        if is_front {
            range.start += jump_bytes;
        } else {
            range.end -= jump_bytes;
        }
        Some(at)
    }
}

/// How many of the first bytes of `code` are padding: nops and breakpoints, as compilers, assemblers and linkers fill gaps.
pub(crate) fn leading_bytes(mode: Mode, code: &[u8]) -> usize {
    let mut len = 0;
    for insn in &mut decoder(mode, 0, code) {
        let is_padding = match insn.mnemonic() {
            Mnemonic::Nop | Mnemonic::Int3 => true,
            // `xchg ax, ax`, as the decoder calls `66 90`.
            Mnemonic::Xchg => insn.op0_register() == insn.op1_register() && insn.len() <= 2,
            // `lea 0(%esi), %esi`, in the lengths that an assembler for 32-bit code needs.
            Mnemonic::Lea => {
                mode == Mode::Bits32
                    && insn.op0_register() == insn.memory_base()
                    && insn.memory_index() == Register::None
                    && insn.memory_displacement64() == 0
            }
            _ => false,
        };
        if !is_padding {
            break;
        }
        len += insn.len();
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    fn padding(free: &[(u64, u64)]) -> Padding {
        Padding { free: free.iter().map(|(start, end)| *start..*end).collect() }
    }

    #[test]
    fn nops_of_every_length_and_breakpoints_are_padding_and_nothing_else_is() {
        for mode in [Mode::Bits32, Mode::Bits64] {
            assert_eq!(leading_bytes(mode, b"\x90\x66\x90\x0f\x1f\x44\x00\x00\xcc\xcc\xc3"), 10);
            assert_eq!(leading_bytes(mode, b"\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00\x48"), 10);
            for code in [&b"\xc3"[..], b"", b"\x00\x00", b"\xf3\x90", b"\x87\xd8"] {
                assert_eq!(leading_bytes(mode, code), 0, "{code:x?}");
            }
        }
        let lea = b"\x8d\xb4\x26\x00\x00\x00\x00\x8d\x76\x00";
        assert_eq!(leading_bytes(Mode::Bits32, lea), 10);
        assert_eq!(leading_bytes(Mode::Bits64, lea), 0, "it clears the upper half of the register");
        assert_eq!(leading_bytes(Mode::Bits32, b"\x8d\x76\x04"), 0);
    }

    #[test]
    fn the_nearest_padding_within_reach_is_taken_once() {
        let mut padding = padding(&[(100, 111), (200, 204), (300, 305)]);
        let reach = 90..320;
        assert_eq!(padding.take(150, &reach), Some(106));
        assert_eq!(padding.take(150, &reach), Some(101), "what is left of the same piece");
        assert_eq!(padding.take(150, &reach), Some(300), "200..204 is too short");
        assert_eq!(padding.take(150, &reach), None);
        assert_eq!(self::padding(&[(100, 105)]).take(150, &(101..300)), None, "out of reach");
    }

    #[test]
    fn what_is_claimed_is_gone() {
        let mut padding = padding(&[(100, 110)]);
        padding.claim(100..103);
        assert_eq!((padding.len_at(102), padding.len_at(103)), (0, 7));
        padding.claim(90..95);
        assert_eq!(padding.len_at(103), 7);
        padding.claim(100..200);
        assert_eq!(padding.len_at(105), 0);
    }
}
