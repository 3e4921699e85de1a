//! One instruction's bytes, by value.

use core::{fmt, ops::Deref};

/// The longest x86 instruction, in bytes (SDM volume 2, section 2.3.11).
pub const MAX_INSN_BYTES: usize = 15;

/// Up to [`MAX_INSN_BYTES`] bytes of machine code, stored in place so that trap handlers may carry it.
///
/// The bytes, zeros behind them, and their number in the last byte: one word of two registers, since a batch carries thousands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(align(8))]
pub struct InsnBytes([u8; MAX_INSN_BYTES + 1]);

impl InsnBytes {
    /// Copies `bytes`.
    ///
    /// # Panics
    /// If there are more than [`MAX_INSN_BYTES`].
    #[inline]
    pub fn new(bytes: &[u8]) -> Self {
        let mut copy = [0; MAX_INSN_BYTES + 1];
        copy[..MAX_INSN_BYTES][..bytes.len()].copy_from_slice(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "the copy above bounds the length by 15")]
        {
            copy[MAX_INSN_BYTES] = bytes.len() as u8;
        }
        Self(copy)
    }

    /// The one byte.
    #[inline]
    pub const fn one(byte: u8) -> Self {
        let mut bytes = [0; MAX_INSN_BYTES + 1];
        bytes[0] = byte;
        bytes[MAX_INSN_BYTES] = 1;
        Self(bytes)
    }

    #[inline]
    fn count(self) -> u8 {
        self.0[MAX_INSN_BYTES]
    }

    #[inline]
    fn with_count(mut self, count: u8) -> Self {
        self.0[MAX_INSN_BYTES] = count;
        self
    }

    /// The first byte by itself; nothing of nothing.
    #[must_use]
    #[inline]
    pub fn head(&self) -> Self {
        Self::one(self.0[0]).with_count(self.count().min(1))
    }

    /// Everything but the first byte.
    #[must_use]
    #[inline]
    pub fn tail(&self) -> Self {
        let shifted = u128::from_le_bytes(self.with_count(0).0) >> u8::BITS;
        Self(shifted.to_le_bytes()).with_count(self.count().saturating_sub(1))
    }
}

impl Deref for InsnBytes {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.0[..usize::from(self.count()).min(MAX_INSN_BYTES)]
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
}
