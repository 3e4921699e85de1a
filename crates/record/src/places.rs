//! Which instruction of a stub stands for which of the program's.
//!
//! Owns [`Places`], the recorder's reading of the tables that `trapline_abi::agent` describes. Threads that stand still are moved by it: from the middle of
//! what is about to be replaced into a stub, and from a stub back. Only from one instruction's beginning to another's.

use std::{io, mem::offset_of};

use trapline_abi::agent::{CALLED_CODE, Config, ENTRY_CODE, NO_CODE, StubArea, StubPlace};
use trapline_engine::{Addr, AddrRange, Mode};

use crate::{
    space::AgentAt,
    sys::{memory::Memory, width},
};

/// An area of stubs, and its table.
#[derive(Debug)]
struct Area {
    range: AddrRange,
    /// Stub and code, both from the area's start.
    places: Vec<(u32, i32)>,
}

/// The tables of a process.
#[derive(Debug)]
pub(crate) struct Places {
    mode: Mode,
    areas: Vec<Area>,
}

impl Places {
    /// Reads them.
    pub(crate) fn read(memory: &Memory, agent: &AgentAt) -> io::Result<Self> {
        /// No process has as many modules.
        const MOST_AREAS: usize = 1 << 16;
        let mut areas = Vec::new();
        let mut next = memory.read_word(agent.config.after(offset_of!(Config, areas)))?;
        while next != 0 && areas.len() < MOST_AREAS {
            let at = Addr::new(next);
            let head = memory.read_vec(at, size_of::<StubArea>())?;
            let word = |at: usize| head[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let half = |at: usize| head[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            let (places_at, count) = (half(offset_of!(StubArea, places_at)), half(offset_of!(StubArea, place_count)));
            let table = memory.read_vec(at.after(places_at as usize), count as usize * size_of::<StubPlace>())?;
            let place = |bytes: &[u8]| {
                let half = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
                (half(0), half(4).cast_signed())
            };
            let places = table.chunks_exact(size_of::<StubPlace>()).map(place).collect();
            areas.push(Area { range: AddrRange::new(at, word(offset_of!(StubArea, len_bytes))), places });
            next = word(offset_of!(StubArea, next));
        }
        Ok(Self { mode: agent.mode, areas })
    }

    /// Whether an address is one of a stub.
    pub(crate) fn is_stub(&self, at: Addr) -> bool {
        self.areas.iter().any(|area| area.range.contains(at))
    }

    /// The instruction of the program that the one at `stub` stands for.
    pub(crate) fn code_at(&self, stub: Addr) -> Option<Addr> {
        let area = self.areas.iter().find(|area| area.range.contains(stub))?;
        let offset = u32::try_from(stub.distance_from(area.range.start)).ok()?;
        let index = area.places.binary_search_by_key(&offset, |(stub, _)| *stub).ok()?;
        let code = area.places[index].1;
        let at = width::wrapped(self.mode, area.range.start.offset(code.into()));
        (![NO_CODE, ENTRY_CODE, CALLED_CODE].contains(&code)).then_some(at)
    }

    /// The last instruction of a stub that stands for the one at `code`: behind the call of an entry.
    pub(crate) fn stub_of(&self, code: Addr) -> Option<Addr> {
        self.areas.iter().find_map(|area| {
            let distance = code.distance_from(area.range.start);
            let wanted = match self.mode {
                #[expect(clippy::cast_possible_truncation, reason = "addresses are added modulo 2^32")]
                Mode::Bits32 => distance as i32,
                Mode::Bits64 => i32::try_from(distance).ok()?,
            };
            let place = area.places.iter().rfind(|(_, code)| *code == wanted)?;
            Some(area.range.start.after(place.0 as usize))
        })
    }
}
