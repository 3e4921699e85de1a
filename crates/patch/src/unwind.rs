//! The unwind tables of an object, by the functions that they describe.
//!
//! Owns [`Frames`]: the records of `.eh_frame`, and [`frames`], which reads them when they are in their place. Neighbour: `bind` takes those of the functions that it keeps. Invariant: a record that cannot be read ends the reading,
//! and functions behind it have no tables. Source: LSB core specification, section 10.6.

use std::ops::Range;

use gimli::{BaseAddresses, CieOrFde, EhFrame, LittleEndian, UnwindSection};
use trapline_engine::{Addr, AddrRange, Mode};

use crate::{
    link::Frame,
    object::{Home, Object, Relocation, Role},
};

/// The unwind tables of an object.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frames {
    descriptions: Vec<Description>,
}

/// How to unwind one function (an FDE).
#[derive(Clone, Debug)]
struct Description {
    table: usize,
    /// The section of the function.
    code: usize,
    record: Range<usize>,
    /// What it has in common with others (its CIE).
    common: Range<usize>,
}

/// The records of some functions, put together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Gathered {
    pub(crate) data: Vec<u8>,
    pub(crate) relocations: Vec<Relocation>,
}

impl Frames {
    pub(crate) fn of(object: &Object) -> Self {
        let tables = object.sections.iter().enumerate().filter(|(_, section)| section.role == Role::Unwind);
        Self { descriptions: tables.flat_map(|(table, _)| read(object, table).unwrap_or_default()).collect() }
    }

    /// Appends the records of the functions in the sections that `is_wanted`.
    pub(crate) fn gather(&self, object: &Object, is_wanted: impl Fn(usize) -> bool, into: &mut Gathered) {
        let mut commons: Vec<(usize, Range<usize>, usize)> = Vec::new();
        for description in self.descriptions.iter().filter(|description| is_wanted(description.code)) {
            let known =
                commons.iter().find(|(table, common, _)| (*table, common) == (description.table, &description.common));
            let common = known.map(|(_, _, at)| *at);
            let common = common.unwrap_or_else(|| {
                let at = copy(object, description.table, &description.common, into);
                commons.push((description.table, description.common.clone(), at));
                at
            });
            let at = copy(object, description.table, &description.record, into);
            // The distance from this field back to the common record.
            let field = at + 4;
            let distance = u32::try_from(field - common).unwrap_or(0);
            into.data[field..field + 4].copy_from_slice(&distance.to_le_bytes());
        }
    }
}

fn read(object: &Object, table: usize) -> Option<Vec<Description>> {
    let section = &object.sections[table];
    let word = |at: usize| section.data.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(length) = word(at) {
        // The end, or a record longer than 4 GiB.
        if length == 0 || length == u32::MAX {
            break;
        }
        let end = (at + 4).checked_add(usize::try_from(length).ok()?)?;
        if end > section.data.len() || length < 4 {
            break;
        }
        let back = usize::try_from(word(at + 4)?).ok()?;
        if back != 0 {
            let common = (at + 4).checked_sub(back)?;
            let common_end = (common + 4).checked_add(usize::try_from(word(common)?).ok()?)?;
            let begins = section.relocations.iter().find(|relocation| relocation.offset == (at + 8) as u64);
            if let Some(begins) = begins
                && let Home::Section(code) = object.symbols[begins.symbol].home
                && common_end <= section.data.len()
            {
                found.push(Description { table, code, record: at..end, common: common..common_end });
            }
        }
        at = end;
    }
    Some(found)
}

/// What tables describe that were fitted to their place, `at`.
pub(crate) fn frames(tables: &[u8], at: Addr, mode: Mode) -> Vec<Frame> {
    let mut section = EhFrame::new(tables, LittleEndian);
    section.set_address_size(match mode {
        Mode::Bits32 => 4,
        Mode::Bits64 => 8,
    });
    let bases = BaseAddresses::default().set_eh_frame(at.value());
    let mut entries = section.entries(&bases);
    let mut found = Vec::new();
    while let Ok(Some(entry)) = entries.next() {
        let CieOrFde::Fde(partial) = entry else { continue };
        let Ok(record) = partial.parse(EhFrame::cie_from_offset) else { continue };
        let code = AddrRange::new(Addr::new(record.initial_address()), record.len());
        found.push(Frame { code, record: at.after(record.offset()) });
    }
    found
}

/// Appends a record, and says where it begins.
fn copy(object: &Object, table: usize, record: &Range<usize>, into: &mut Gathered) -> usize {
    let section = &object.sections[table];
    let at = into.data.len();
    into.data.extend(&section.data[record.clone()]);
    let range = record.start as u64..record.end as u64;
    into.relocations.extend(
        section.relocations.iter().filter(|relocation| range.contains(&relocation.offset)).map(|relocation| {
            Relocation { offset: relocation.offset - record.start as u64 + at as u64, ..*relocation }
        }),
    );
    at
}
