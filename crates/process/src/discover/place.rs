//! From a record to the function that it belongs to and the address of the site.
//!
//! Owns [`Places`]. A record says where nops are, which is not always where the function begins: with
//! `-fpatchable-function-entry=N,M` the first M of them stand in front of the entry, where nothing ever executes them, and behind
//! `endbr` they do not stand at the entry either. Neighbours: [`super::records`] before, [`super::window`] after. Invariant: a site is at
//! its function's entry, behind nothing but `endbr` and nops, and the entry is known from evidence: a symbol, the unwind table, the
//! list itself, or the `endbr`.

use trapline_engine::{Addr, AddrRange, Mode};

use super::{
    DiscoverError, LoadedObject, Refusal, SiteKind, SkipReason,
    functions::Functions,
    memory::Memory,
    records::Record,
    window::{ENDBR_BYTES, LOOK_BYTES, begins_with_endbr, does_nothing},
};

/// The most nops that compilers leave in front of an entry, in bytes (GCC manual, "-fpatchable-function-entry").
const PREFIX_LIMIT_BYTES: i64 = 65535;

/// The most that may stand between a function's entry and its site, in bytes: `endbr`, another kind of nop, and alignment.
const LEAD_IN_LIMIT_BYTES: i64 = 32;

/// Where a record leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    /// The entry of the function.
    pub(super) function: Addr,
    /// The first byte that may be poked.
    pub(super) site: Addr,
    /// The code segment around both.
    pub(super) text: AddrRange,
}

/// Places the records of one object.
pub(super) struct Places<'a> {
    pub(super) object: &'a LoadedObject,
    pub(super) functions: &'a Functions<'a>,
    pub(super) memory: Memory,
}

impl Places<'_> {
    /// Finds the function of `record`, and its site.
    pub(super) fn place(&mut self, record: Record) -> Result<Place, Refusal> {
        let listed = record.address;
        let text = self.object.text_around(listed).ok_or(SkipReason::OutsideText)?;
        let (function, nops) = match record.function {
            Some(function) if self.leads_in(function, listed, text)? => (function, listed),
            Some(function) => return Err(SkipReason::NotAtEntry { function }.into()),
            None => self.entry_by_evidence(record, text)?,
        };
        let behind_endbr = if begins_with_endbr(Mode::NATIVE, self.memory.peek(nops, LOOK_BYTES, text)?) {
            i64::from(ENDBR_BYTES)
        } else {
            0
        };
        Ok(Place { function, site: nops.offset(behind_endbr), text })
    }

    /// The code at a site, long enough to be judged unless the segment ends.
    pub(super) fn code(&mut self, place: Place) -> Result<&[u8], DiscoverError> {
        self.memory.peek(place.site, LOOK_BYTES, place.text)
    }

    /// The function whose entry the listed nops serve, and the first of them that it executes.
    fn entry_by_evidence(&mut self, record: Record, text: AddrRange) -> Result<(Addr, Addr), Refusal> {
        let listed = record.address;
        if let Some(function) = self.functions.at_or_before(listed) {
            let inside = function.body().map(|body| body.contains(listed));
            let near = inside.unwrap_or(listed.distance_from(function.entry) <= i64::from(ENDBR_BYTES));
            if function.entry == listed || (near && self.leads_in(function.entry, listed, text)?) {
                return Ok((function.entry, listed));
            }
            if inside == Some(true) {
                return Err(SkipReason::NotAtEntry { function: function.entry }.into());
            }
        }
        if record.kind == SiteKind::PatchableEntry
            && let Some(function) = self.functions.after(listed)
            && self.is_prefix(listed, function.entry, text)?
        {
            return Ok((function.entry, function.entry));
        }
        let endbr = listed.offset(-i64::from(ENDBR_BYTES));
        if text.contains(endbr) && begins_with_endbr(Mode::NATIVE, self.memory.peek(endbr, LOOK_BYTES, text)?) {
            return Ok((endbr, listed));
        }
        match record.kind {
            // The call of __fentry__ is always the function's first, whatever its options.
            SiteKind::Fentry => Ok((listed, listed)),
            _ => Err(SkipReason::EntryUnknown.into()),
        }
    }

    /// Whether a thread that enters at `entry` comes to `site` having executed only an `endbr` and nops.
    fn leads_in(&mut self, entry: Addr, site: Addr, text: AddrRange) -> Result<bool, DiscoverError> {
        let gap_bytes = site.distance_from(entry);
        if !(text.contains(entry) && (0..=LEAD_IN_LIMIT_BYTES).contains(&gap_bytes)) {
            return Ok(false);
        }
        Ok(does_nothing(Mode::NATIVE, self.memory.peek(entry, gap_bytes.cast_unsigned(), text)?))
    }

    /// Whether nothing but nops stands from `listed` to `entry`: they were put in front of that function.
    fn is_prefix(&mut self, listed: Addr, entry: Addr, text: AddrRange) -> Result<bool, DiscoverError> {
        let gap_bytes = entry.distance_from(listed);
        if !(text.contains(entry) && gap_bytes <= PREFIX_LIMIT_BYTES) {
            return Ok(false);
        }
        let prefix = self.memory.peek(listed, gap_bytes.cast_unsigned(), text)?;
        Ok(!begins_with_endbr(Mode::NATIVE, prefix) && does_nothing(Mode::NATIVE, prefix))
    }
}
