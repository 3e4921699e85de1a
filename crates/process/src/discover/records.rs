//! The sections that list sites, word by word.
//!
//! Owns [`Record`] and the layouts of the three kinds of list. Neighbours: [`super::image`] finds the sections,
//! [`super::place`] takes each record on to a function. Invariant: pure; the bytes come from memory, so the words in them are
//! addresses that the loader has relocated.

use trapline_engine::{Addr, Mode};

use super::{SiteKind, SkipReason, elf::relocated};

/// One entry of a list.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Record {
    /// Where the compiler says that the site is.
    pub(super) address: Addr,
    pub(super) kind: SiteKind,
    /// The function that it belongs to, where the list says so.
    pub(super) function: Option<Addr>,
}

/// A list as it lies in memory.
#[derive(Clone, Copy)]
pub(super) struct List<'a> {
    pub(super) mode: Mode,
    pub(super) kind: SiteKind,
    /// Where the list begins.
    pub(super) at: Addr,
    /// The load bias of its object.
    pub(super) bias: Addr,
    pub(super) bytes: &'a [u8],
}

impl List<'_> {
    /// The records, in the list's order.
    ///
    /// Left out are those of functions that the linker has dropped: their address is 0, or 0 before the bias was added.
    pub(super) fn records(self) -> Result<Vec<Record>, SkipReason> {
        let mut records = match self.kind {
            SiteKind::PatchableEntry | SiteKind::Fentry => self.words()?,
            SiteKind::XrayEntry => self.sleds()?,
        };
        records.retain(|record| record.address != Addr::new(0) && record.address != self.bias);
        Ok(records)
    }

    /// `__patchable_function_entries` and `__mcount_loc` are arrays of addresses.
    fn words(self) -> Result<Vec<Record>, SkipReason> {
        let word_bytes = self.mode.word_bytes() as usize;
        let record =
            |word| Record { address: Addr::new(word_at(word, 0, word_bytes)), kind: self.kind, function: None };
        Ok(self.entries(word_bytes)?.map(record).collect())
    }

    /// `xray_instr_map` is an array of entries, four machine words each (`XRaySledEntry` of LLVM's compiler-rt):
    ///
    /// | offset, in words | size | content |
    /// |---|---|---|
    /// | 0 | 1 word | the sled; since version 2 relative to this field |
    /// | 1 | 1 word | the function; since version 2 relative to this field |
    /// | 2 | 1 byte | kind |
    /// | | 1 byte | whether it is to be instrumented always |
    /// | | 1 byte | version |
    /// | | the rest | padding |
    ///
    /// Entries have the kinds 0 and 3 (the same sled, with a wish to log arguments). Exits, tail calls and events are no
    /// function entries and are passed over.
    fn sleds(self) -> Result<Vec<Record>, SkipReason> {
        const ENTRY: u8 = 0;
        const LOG_ARGUMENTS_ENTRY: u8 = 3;
        let word_bytes = self.mode.word_bytes() as usize;
        let mut records = Vec::new();
        for (index, entry) in self.entries(4 * word_bytes)?.enumerate() {
            let version = entry[2 * word_bytes + 2];
            let origin = |field: usize| match version {
                0 | 1 => Ok(Addr::new(0)),
                2 => Ok(relocated(self.at, (index * 4 * word_bytes + field) as u64)),
                _ => Err(SkipReason::UnknownXrayVersion { version }),
            };
            let pointer = |field| Ok(relocated(origin(field)?, word_at(entry, field, word_bytes)));
            let (address, function) = (pointer(0)?, pointer(word_bytes)?);
            if matches!(entry[2 * word_bytes], ENTRY | LOG_ARGUMENTS_ENTRY) {
                records.push(Record { address, kind: self.kind, function: Some(function) });
            }
        }
        Ok(records)
    }

    fn entries(&self, entry_bytes: usize) -> Result<std::slice::ChunksExact<'_, u8>, SkipReason> {
        let entries = self.bytes.chunks_exact(entry_bytes);
        if entries.remainder().is_empty() {
            Ok(entries)
        } else {
            Err(SkipReason::MalformedSection { section: self.kind.section_name() })
        }
    }
}

/// The little-endian word of `word_bytes` at `offset`.
fn word_at(bytes: &[u8], offset: usize, word_bytes: usize) -> u64 {
    let mut word = [0; 8];
    word[..word_bytes].copy_from_slice(&bytes[offset..offset + word_bytes]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODE: Mode = Mode::NATIVE;
    const WORD: usize = MODE.word_bytes() as usize;
    const AT: Addr = Addr::new(0x2000);
    const BIAS: Addr = Addr::new(0x1000);

    fn list(kind: SiteKind, bytes: &[u8]) -> List<'_> {
        List { mode: MODE, kind, at: AT, bias: BIAS, bytes }
    }

    fn word(value: u64) -> Vec<u8> {
        value.to_le_bytes()[..WORD].to_vec()
    }

    fn sled(address: u64, function: u64, kind: u8, version: u8) -> Vec<u8> {
        let mut entry = [word(address), word(function), vec![kind, 1, version]].concat();
        entry.resize(4 * WORD, 0);
        entry
    }

    fn addresses(records: &[Record]) -> Vec<(u64, Option<u64>)> {
        records.iter().map(|record| (record.address.value(), record.function.map(Addr::value))).collect()
    }

    #[test]
    fn words_are_addresses_and_those_of_dropped_functions_are_left_out() {
        let bytes = [word(0x1010), word(0), word(0x1020), word(BIAS.value())].concat();
        for kind in [SiteKind::PatchableEntry, SiteKind::Fentry] {
            let records = list(kind, &bytes).records().expect("whole words");
            assert_eq!(addresses(&records), [(0x1010, None), (0x1020, None)]);
        }
    }

    #[test]
    fn sleds_are_relative_to_their_fields_since_version_2_and_absolute_before() {
        let back = |from: u64, to: u64| to.wrapping_sub(from);
        let second = AT.value() + 4 * WORD as u64;
        let bytes = [
            sled(0x1104, 0x1100, 0, 0),
            sled(back(second, 0x1204), back(second + WORD as u64, 0x1200), 3, 2),
            sled(0x1110, 0x1100, 1, 0),
            sled(0x1120, 0x1100, 2, 0),
            sled(back(AT.value() + 16 * WORD as u64, BIAS.value()), 0, 0, 2),
        ]
        .concat();
        let records = list(SiteKind::XrayEntry, &bytes).records().expect("known versions");
        assert_eq!(addresses(&records), [(0x1104, Some(0x1100)), (0x1204, Some(0x1200))]);
    }

    #[test]
    fn lists_that_are_not_understood_are_refused_whole() {
        let future = sled(0x1104, 0x1100, 0, 9);
        assert_eq!(list(SiteKind::XrayEntry, &future).records(), Err(SkipReason::UnknownXrayVersion { version: 9 }));
        for kind in SiteKind::ALL {
            let cut = vec![0; 4 * WORD + 1];
            let section = kind.section_name();
            assert_eq!(list(kind, &cut).records(), Err(SkipReason::MalformedSection { section }));
        }
    }
}
