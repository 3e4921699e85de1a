//! Which bytes of code something leads to.
//!
//! Owns [`Text`], the code of a file as one numbered row of bytes, and [`Marks`], a set of such bytes that many threads add to. Neighbours: the
//! [scan](crate::scan) adds, the [ladder](crate::plan) asks. Invariant: marks are only ever added, so that the order in which threads come does not matter.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::elf::Elf;

/// The code of a file: its executable segments, one behind the other.
#[derive(Debug)]
pub(crate) struct Text<'a> {
    pieces: Vec<Piece<'a>>,
    len: usize,
}

#[derive(Debug)]
struct Piece<'a> {
    address: u64,
    bytes: &'a [u8],
    /// The number of its first byte.
    first: usize,
}

impl<'a> Text<'a> {
    pub(crate) fn of(elf: &Elf<'a>) -> Self {
        let mut text = Self { pieces: Vec::new(), len: 0 };
        for segment in elf.segments.iter().filter(|segment| segment.is_code && !segment.file.is_empty()) {
            let bytes = &elf.bytes[segment.file.clone()];
            text.pieces.push(Piece { address: segment.address, bytes, first: text.len });
            text.len += bytes.len();
        }
        text
    }

    /// One piece of code, for tests.
    #[cfg(test)]
    pub(crate) fn of_code(address: u64, bytes: &'a [u8]) -> Self {
        Self { pieces: vec![Piece { address, bytes, first: 0 }], len: bytes.len() }
    }

    /// Which byte this is.
    fn number(&self, address: u64) -> Option<usize> {
        self.pieces.iter().find_map(|piece| {
            let offset = usize::try_from(address.wrapping_sub(piece.address)).ok()?;
            (offset < piece.bytes.len()).then(|| piece.first + offset)
        })
    }

    /// Whether there is code.
    pub(crate) fn contains(&self, address: u64) -> bool {
        self.number(address).is_some()
    }

    /// The code from `address` on, to the end of its segment.
    pub(crate) fn from(&self, address: u64) -> &'a [u8] {
        let piece = self.pieces.iter().find_map(|piece| {
            let offset = usize::try_from(address.wrapping_sub(piece.address)).ok()?;
            piece.bytes.get(offset..)
        });
        piece.unwrap_or_default()
    }

    /// The code in a range of addresses, as far as there is any.
    pub(crate) fn range(&self, range: Range<u64>) -> &'a [u8] {
        let bytes = self.from(range.start);
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        &bytes[..len.min(bytes.len())]
    }

    /// The ranges of addresses that have code, ascending.
    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<_> =
            self.pieces.iter().map(|piece| piece.address..piece.address + piece.bytes.len() as u64).collect();
        ranges.sort_by_key(|range| range.start);
        ranges
    }
}

/// A set of bytes of code.
#[derive(Debug)]
pub(crate) struct Marks {
    words: Vec<AtomicU64>,
}

impl Marks {
    pub(crate) fn new(text: &Text<'_>) -> Self {
        Self { words: (0..text.len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Adds the byte at `address`, if it is code.
    pub(crate) fn add(&self, text: &Text<'_>, address: u64) {
        if let Some(number) = text.number(address) {
            let (word, bit) = (&self.words[number / 64], 1 << (number % 64));
            // Relaxed: the threads that ask are started behind those that add. Most marks are there already, and reading is cheaper.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Whether the byte at `address` is in the set.
    pub(crate) fn contains(&self, text: &Text<'_>, address: u64) -> bool {
        let Some(number) = text.number(address) else { return false };
        self.words[number / 64].load(Ordering::Relaxed) >> (number % 64) & 1 != 0
    }

    /// The first address of `range` that is in the set.
    pub(crate) fn first_in(&self, text: &Text<'_>, mut range: Range<u64>) -> Option<u64> {
        range.find(|address| self.contains(text, *address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_where_they_were_made_and_nowhere_else() {
        let code = [0; 200];
        let text = Text::of_code(0x1000, &code);
        let marks = Marks::new(&text);
        for address in [0x1000, 0x103f, 0x1040, 0x10c7, 0x10c8, 0xfff, u64::MAX] {
            marks.add(&text, address);
        }
        let found: Vec<u64> = (0xff0..0x10e0).filter(|address| marks.contains(&text, *address)).collect();
        assert_eq!(found, [0x1000, 0x103f, 0x1040, 0x10c7], "what is no code has no mark");
        assert_eq!(marks.first_in(&text, 0x1001..0x1040), Some(0x103f));
        assert_eq!(marks.first_in(&text, 0x1001..0x103f), None);
    }
}
