//! One instruction's bytes, by value.

use core::{fmt, ops::Deref};

/// The longest x86 instruction, in bytes (SDM volume 2, section 2.3.11).
pub const MAX_INSN_BYTES: usize = 15;

/// Up to [`MAX_INSN_BYTES`] bytes of machine code, stored in place so that trap handlers may carry it.
///
/// As the bytes lie in memory: they, zeros behind them, and their number in the last byte. Held in two words, since a batch carries thousands:
/// an array of bytes is copied in pieces that the CPU cannot forward from one another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct InsnBytes {
    low: u64,
    high: u64,
}

/// Where the number of bytes stands in the high word.
const COUNT_SHIFT: u32 = u64::BITS - u8::BITS;

impl InsnBytes {
    /// Copies `bytes`.
    ///
    /// # Panics
    /// If there are more than [`MAX_INSN_BYTES`].
    #[inline]
    pub fn new(bytes: &[u8]) -> Self {
        let mut copy = [0; MAX_INSN_BYTES + 1];
        copy[..MAX_INSN_BYTES][..bytes.len()].copy_from_slice(bytes);
        Self::from_wide(u128::from_le_bytes(copy), bytes.len())
    }

    /// The one byte.
    #[inline]
    pub const fn one(byte: u8) -> Self {
        Self { low: byte as u64, high: 1 << COUNT_SHIFT }
    }

    /// An opcode and four bytes behind it.
    #[inline]
    pub(super) const fn opcode_and_i32(opcode: u8, operand: i32) -> Self {
        let operand = operand.cast_unsigned() as u64;
        Self { low: opcode as u64 | operand << u8::BITS, high: 5 << COUNT_SHIFT }
    }

    #[expect(clippy::cast_possible_truncation, reason = "a u128 is two words")]
    #[inline]
    const fn from_wide(wide: u128, count: usize) -> Self {
        Self { low: wide as u64, high: (wide >> u64::BITS) as u64 | (count as u64) << COUNT_SHIFT }
    }

    /// The bytes as one number, the first one lowest, and zeros behind them.
    #[inline]
    const fn wide(self) -> u128 {
        let high = self.high & ((1 << COUNT_SHIFT) - 1);
        (high as u128) << u64::BITS | self.low as u128
    }

    #[inline]
    const fn count(self) -> usize {
        (self.high >> COUNT_SHIFT) as usize
    }

    /// The first byte by itself; nothing of nothing.
    #[must_use]
    #[inline]
    pub const fn head(&self) -> Self {
        let count = if self.count() == 0 { 0 } else { 1 };
        Self::from_wide((self.low & u8::MAX as u64) as u128, count)
    }

    /// Everything but the first byte.
    #[must_use]
    #[inline]
    pub const fn tail(&self) -> Self {
        Self::from_wide(self.wide() >> u8::BITS, self.count().saturating_sub(1))
    }

    /// Whether `text` begins with these bytes.
    #[must_use]
    #[inline]
    pub fn begin(&self, text: &[u8]) -> bool {
        match text.first_chunk::<{ MAX_INSN_BYTES + 1 }>() {
            Some(chunk) => {
                let beyond = u128::MAX << (u8::BITS as usize * self.count());
                u128::from_le_bytes(*chunk) & !beyond == self.wide()
            }
            None => text.starts_with(self),
        }
    }

    /// Stores the bytes at the beginning of `room`.
    ///
    /// # Panics
    /// If there are more of them than fit.
    #[inline]
    pub fn store(&self, room: &mut [u8]) {
        // Nearly all stores are an int3, a head, or the tail of a call: lengths known here make each a single instruction.
        let [first, second, third, fourth, ..] = self.low.to_le_bytes();
        match self.count() {
            1 => room[0] = first,
            4 => room[..4].copy_from_slice(&[first, second, third, fourth]),
            count => room[..count].copy_from_slice(self),
        }
    }
}

impl Deref for InsnBytes {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        let count = self.count().min(MAX_INSN_BYTES);
        // SAFETY: the two words are 16 bytes without padding, of which at most 15 are seen; any byte is a u8. x86 stores the lowest one first.
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(self).cast(), count) }
    }
}

impl fmt::Debug for InsnBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for InsnBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_and_tail_are_the_bytes_split_behind_the_first() {
        for len in 0..=MAX_INSN_BYTES {
            let all: [u8; MAX_INSN_BYTES] = core::array::from_fn(|index| u8::try_from(index + 1).unwrap());
            let insn = InsnBytes::new(&all[..len]);
            let split = len.min(1);
            assert_eq!(insn.head(), InsnBytes::new(&all[..split]), "{len}");
            assert_eq!(insn.tail(), InsnBytes::new(&all[split..len]), "{len}");
        }
    }

    #[test]
    fn bytes_are_found_where_text_begins_with_them() {
        let text: [u8; 40] = core::array::from_fn(|index| u8::try_from(index + 1).unwrap());
        for len in 0..=MAX_INSN_BYTES {
            let insn = InsnBytes::new(&text[..len]);
            for end in 0..text.len() {
                assert_eq!(insn.begin(&text[..end]), end >= len, "{len} of {end}");
            }
            for changed in 0..text.len() {
                let mut other = text;
                other[changed] ^= 0x80;
                assert_eq!(insn.begin(&other), changed >= len, "{len}, changed at {changed}");
            }
        }
    }

    #[test]
    fn a_store_changes_as_many_bytes_as_there_are() {
        for len in 0..=MAX_INSN_BYTES {
            let bytes: [u8; MAX_INSN_BYTES] = core::array::from_fn(|index| u8::try_from(index + 1).unwrap());
            let mut room = [0xcc; MAX_INSN_BYTES];
            InsnBytes::new(&bytes[..len]).store(&mut room);
            assert_eq!(room[..len], bytes[..len]);
            assert!(room[len..].iter().all(|byte| *byte == 0xcc), "{len}");
        }
    }

    #[test]
    fn an_opcode_with_its_operand_is_five_bytes() {
        assert_eq!(InsnBytes::opcode_and_i32(0xe8, -2), InsnBytes::new(&[0xe8, 0xfe, 0xff, 0xff, 0xff]));
    }
}
