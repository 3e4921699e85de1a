//! The text, as memory holds it and as CPUs may fetch it.
//!
//! Owns [`Text`], [`Fetchable`] and the numbering of the bytes that matter ([`Cell`]). The poker writes text, CPUs fetch from what they
//! find *fetchable*: for each byte, every value that it had since the CPU's last serialisation. That is all that the model takes from
//! the manuals about instruction fetch: a CPU may have read any byte ahead of time, each byte on its own, and keeps what it read until it executes
//! a serialising instruction (SDM volume 3, sections 9.1.3 and 9.3). Invariant: a byte's present value is always among the fetchable ones.

use trapline_engine::insn::CALL_BYTES;

/// How many sites there are room for.
pub(super) const SITES: usize = 2;
/// Trampolines A and B.
pub(super) const TRAMPOLINES: usize = 2;
/// Bytes of text in the model: those of the sites, and one for the code of each trampoline.
pub(super) const CELLS: usize = SITES * CALL_BYTES + TRAMPOLINES;

/// The number of a byte of text.
pub(super) type Cell = usize;

/// The value of a trampoline's cell while there is no code: before it was written, or after it was freed.
pub(super) const BLANK: u8 = 0;
/// The value of a trampoline's cell while the code is there.
pub(super) const CODE: u8 = 1;

/// A byte of a site.
pub(super) fn site_cell(site: usize, offset: usize) -> Cell {
    site * CALL_BYTES + offset
}

/// The code of a trampoline.
pub(super) fn trampoline_cell(trampoline: usize) -> Cell {
    SITES * CALL_BYTES + trampoline
}

/// The values that each byte ever has. States hold indices into it, so that sets of values are small bit masks.
#[derive(Clone, Debug)]
pub(super) struct Dictionary {
    values: [Vec<u8>; CELLS],
}

impl Dictionary {
    pub(super) fn new() -> Self {
        let mut values = [const { Vec::new() }; CELLS];
        for trampoline in 0..TRAMPOLINES {
            values[trampoline_cell(trampoline)] = vec![BLANK, CODE];
        }
        Self { values }
    }

    pub(super) fn add(&mut self, cell: Cell, value: u8) {
        if !self.values[cell].contains(&value) {
            self.values[cell].push(value);
            assert!(self.values[cell].len() <= 8, "sets of values are masks of eight bits");
        }
    }

    fn index(&self, cell: Cell, value: u8) -> u8 {
        let index = self.values[cell].iter().position(|known| *known == value).expect("every value was added");
        u8::try_from(index).expect("there are at most eight")
    }
}

/// What memory holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Text {
    now: [u8; CELLS],
}

impl Text {
    /// All bytes have the first value that was added to the dictionary.
    pub(super) fn initial() -> Self {
        Self { now: [0; CELLS] }
    }

    pub(super) fn byte(&self, dictionary: &Dictionary, cell: Cell) -> u8 {
        dictionary.values[cell][usize::from(self.now[cell])]
    }

    /// Stores a byte. Every CPU may fetch it from now on, and what was there before until it serialises.
    pub(super) fn write<'a>(
        &mut self,
        dictionary: &Dictionary,
        cell: Cell,
        value: u8,
        cpus: impl Iterator<Item = &'a mut Fetchable>,
    ) {
        let index = dictionary.index(cell, value);
        self.now[cell] = index;
        for fetchable in cpus {
            fetchable.values[cell] |= 1 << index;
        }
    }
}

/// What one CPU may fetch: for each byte a set of indices into the dictionary.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Fetchable {
    values: [u8; CELLS],
}

impl Fetchable {
    /// What a CPU may fetch that has just executed a serialising instruction: what memory holds.
    pub(super) fn serialised(text: &Text) -> Self {
        Self { values: text.now.map(|index| 1 << index) }
    }

    /// The values that a byte may be fetched as.
    pub(super) fn values<'a>(&self, dictionary: &'a Dictionary, cell: Cell) -> impl Iterator<Item = u8> + Clone + 'a {
        let set = self.values[cell];
        dictionary.values[cell]
            .iter()
            .enumerate()
            .filter(move |(index, _)| set & 1 << index != 0)
            .map(|(_, value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_fetches_old_and_new_bytes_until_it_serialises() {
        let mut dictionary = Dictionary::new();
        for value in [0x0f, 0xcc, 0xe8] {
            dictionary.add(0, value);
        }
        let mut text = Text::initial();
        let mut fetchable = Fetchable::serialised(&text);
        text.write(&dictionary, 0, 0xcc, [&mut fetchable].into_iter());
        text.write(&dictionary, 0, 0xe8, [&mut fetchable].into_iter());
        assert_eq!(fetchable.values(&dictionary, 0).collect::<Vec<_>>(), [0x0f, 0xcc, 0xe8]);
        assert_eq!(text.byte(&dictionary, 0), 0xe8);
        fetchable = Fetchable::serialised(&text);
        assert_eq!(fetchable.values(&dictionary, 0).collect::<Vec<_>>(), [0xe8]);
    }
}
