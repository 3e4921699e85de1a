//! What is about to be done to a process: prepared while it runs, done at once while it stands still.
//!
//! Owns [`Pending`]. [`crate::arm`] and [`crate::sandbox`] fill it from what the process has mapped; the [tracer](crate::tracer) has it done by a stopped
//! thread. Invariant: nothing is changed before [`Pending::commit`]; there, memory is mapped first, and only where nothing is, and code is edited last.

use std::{mem::offset_of, os::fd::AsRawFd, sync::Arc};

use trapline_abi::agent::{Config, StubArea};
use trapline_engine::{Addr, AddrRange, Mode};
use trapline_image::{Diverted, Write};
use trapline_trace::{Load, Unload};

use crate::{
    drain::Drain,
    exec::Untraceable,
    remote::Remote,
    space::{SharedMapping, Space},
    sys::{
        maps::{self, Mapping},
        memory::Memory,
        shared::SharedMemory,
    },
    text::Pieces,
};

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Pending {
    mode: Mode,
    memory: Arc<Memory>,
    /// What is mapped, and what will be.
    mappings: Vec<Mapping>,
    /// What live patches have put into the code.
    diverted: Vec<Diverted>,
    to_map: Vec<(SharedMapping, Arc<SharedMemory>)>,
    /// The area of stubs that came last.
    last_area: u64,
    /// Words of the agent's configuration.
    words: Vec<(Addr, u64)>,
    /// All edits, and what has to be written for them once they are [assembled](Self::assemble).
    edits: Vec<Write>,
    pieces: Pieces,
    /// Edits that belong to no module's stubs.
    pub(crate) others: Vec<Write>,
    loads: Vec<Load>,
    unloads: Vec<Unload>,
}

impl Pending {
    /// Nothing yet, for a process of this width that has this mapped. `last_area` is what its [`Config::areas`] is.
    pub(crate) fn new(mode: Mode, memory: Arc<Memory>, mappings: Vec<Mapping>, last_area: u64) -> Self {
        Self {
            mode,
            #[cfg(target_arch = "x86_64")]
            diverted: crate::live::diverted(&memory, &mappings),
            // There are no live patches of 32-bit processes.
            #[cfg(target_arch = "x86")]
            diverted: Vec::new(),
            memory,
            mappings,
            to_map: Vec::new(),
            last_area,
            words: Vec::new(),
            edits: Vec::new(),
            pieces: Pieces::default(),
            others: Vec::new(),
            loads: Vec::new(),
            unloads: Vec::new(),
        }
    }

    /// The process's memory.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Functions that live patches have diverted, and stay so.
    pub(crate) fn diverted(&self) -> &[Diverted] {
        &self.diverted
    }

    /// A place for memory that every address in `near` reaches, where nothing is and nothing will be.
    pub(crate) fn find_hole(&self, near: AddrRange, len_bytes: u64) -> Option<Addr> {
        maps::find_hole(self.mode, &self.mappings, near, len_bytes)
    }

    /// What is mapped, and what will be.
    pub(crate) fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Keeps a place free that was found.
    pub(crate) fn reserve(&mut self, range: AddrRange) {
        let at = self.mappings.partition_point(|mapping| mapping.range.start < range.start);
        self.mappings.insert(at, Mapping::planned(range));
    }

    /// Will have memory of ours mapped as code.
    pub(crate) fn map_code(&mut self, at: Addr, shared: &Arc<SharedMemory>, len_bytes: usize) {
        let len_bytes = (len_bytes as u64).next_multiple_of(4096);
        self.reserve(AddrRange::new(at, len_bytes));
        let mapping = SharedMapping {
            descriptor: shared.file().as_raw_fd(),
            at,
            len_bytes,
            protection: libc::PROT_READ | libc::PROT_EXEC,
            flags: libc::MAP_FIXED_NOREPLACE,
        };
        self.to_map.push((mapping, Arc::clone(shared)));
    }

    /// The same, for an area of stubs, which the agent has to know of.
    pub(crate) fn map_stubs(&mut self, at: Addr, shared: &Arc<SharedMemory>, len_bytes: usize) {
        shared.fill(offset_of!(StubArea, next), &self.last_area.to_le_bytes());
        self.last_area = at.value();
        self.map_code(at, shared, len_bytes);
    }

    /// Will edit code, which has to be as these edits expect it. They come in order of their addresses.
    pub(crate) fn edit(&mut self, edits: &[Write]) -> Result<(), Untraceable> {
        Pieces::new(&self.memory, edits)?;
        self.edits.extend_from_slice(edits);
        Ok(())
    }

    /// Makes up all that is to be written. Edits of several modules may be neighbours.
    pub(crate) fn assemble(&mut self) -> Result<(), Untraceable> {
        self.edits.sort_by_key(|edit| edit.at);
        self.pieces = Pieces::new(&self.memory, &self.edits)?;
        Ok(())
    }

    /// Where code of ours will be mapped.
    pub(crate) fn planned(&self) -> impl Iterator<Item = AddrRange> {
        self.to_map.iter().map(|(mapping, _)| AddrRange::new(mapping.at, mapping.len_bytes))
    }

    /// All edits, in order once they are assembled.
    pub(crate) fn edits(&self) -> &[Write] {
        &self.edits
    }

    /// The same, for edits that belong to no module's stubs.
    pub(crate) fn edit_others(&mut self, edits: &[Write]) -> Result<(), Untraceable> {
        self.edit(edits)?;
        self.others.extend_from_slice(edits);
        Ok(())
    }

    /// Will tell the agent something.
    pub(crate) fn tell_agent(&mut self, at: Addr, word: u64) {
        self.words.push((at, word));
    }

    /// Will tell the trace of a module.
    pub(crate) fn loaded(&mut self, load: Load) {
        self.loads.push(load);
    }

    /// Will tell the trace that a module is gone.
    pub(crate) fn unloaded(&mut self, unload: Unload) {
        self.unloads.push(unload);
    }

    /// Does it, by a stopped thread.
    pub(crate) fn commit(mut self, remote: &mut Remote, space: &mut Space, drain: &Drain) -> Result<(), Untraceable> {
        self.assemble()?;
        self.map(remote, space)?;
        self.edit_code(space, drain)
    }

    /// The first half: maps what is to be mapped.
    pub(crate) fn map(&self, remote: &mut Remote, space: &mut Space) -> Result<(), Untraceable> {
        let has_areas = !self.to_map.is_empty();
        for (mapping, _) in &self.to_map {
            mapping.make(remote, &self.memory)?;
            space.code.push(AddrRange::new(mapping.at, mapping.len_bytes));
            space.mapped.push(AddrRange::new(mapping.at, mapping.len_bytes));
        }
        if has_areas {
            self.memory.write_word(space.agent.config.after(offset_of!(Config, areas)), self.last_area)?;
        }
        for (at, word) in &self.words {
            self.memory.write_word(*at, *word)?;
        }
        Ok(())
    }

    /// The second half, of what is assembled.
    pub(crate) fn edit_code(self, space: &mut Space, drain: &Drain) -> Result<(), Untraceable> {
        for unload in self.unloads {
            drain.unload(unload);
        }
        for load in self.loads {
            drain.load(load);
        }
        space.writes.extend(self.others);
        self.pieces.write(&self.memory)?;
        Ok(())
    }
}
