//! What was done to a process, kept in the process itself.
//!
//! Owns [`Active`], and its form in memory: pages of their own in front of the new code, read-only there, found by a magic number. Children that are forked have a copy,
//! as they have one of the code; an exec forgets both. Layout, little-endian: magic (8 bytes), version (u32), length of the payload (u32), CRC-32 of the payload (u32),
//! [`Status`] (u32), how many of the patch's other pieces are mapped (u32), and the payload, which is JSON. Invariant: what is counted as mapped is ours. A command that
//! is killed between a call of mmap and the count leaves a piece behind for good, and never has memory unmapped that is the process's.

use std::io;

use serde::{Deserialize, Serialize};
use trapline_engine::Addr;

use super::{PAGE_BYTES, unwinder::Detour};
use crate::{
    remote::Remote,
    sys::{maps::Mapping, memory::Memory},
    text::Hidden,
};

const MAGIC: [u8; 8] = [0x8f, b't', b'p', b'l', b'i', b'v', b'e', b'\n'];
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 28;
const STATUS_AT: usize = 20;
const MAPPED_AT: usize = 24;

/// No patch has more to say.
const LARGEST_BYTES: u64 = 64 << 20;

/// How far a patch is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Status {
    /// It is mapped, and nothing is diverted.
    Preparing,
    /// A command was stopped while it wrote: some functions are diverted. Reverting it helps.
    Changing,
    /// All functions are diverted.
    Active,
    /// What it patched was unloaded: nothing leads to it. Never written, but found out.
    Unloaded,
}

impl Status {
    /// Those that are written.
    const WRITTEN: [Self; 3] = [Self::Preparing, Self::Changing, Self::Active];

    /// For lists.
    pub fn code(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Changing => "interrupted",
            Self::Active => "active",
            Self::Unloaded => "unloaded",
        }
    }
}

/// A patch in a process. Addresses are the process's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Active {
    /// What it is called.
    pub name: String,
    /// The file that it patches.
    pub target: String,
    /// That file's build-id.
    pub build_id: String,
    /// What is added to the file's addresses.
    pub bias: u64,
    /// Where its memory near the target begins: with these pages.
    pub at: u64,
    /// How much it is.
    pub len_bytes: u64,
    /// How many bytes of it this takes.
    pub header_bytes: u64,
    /// Everything else that is mapped for it: begin and length.
    pub pieces: Vec<(u64, u64)>,
    /// Where its code begins and ends.
    pub code: (u64, u64),
    /// Where its unwind tables are.
    pub unwind: Option<(u64, u64)>,
    /// What it replaces.
    pub functions: Vec<Replaced>,
    /// Its new functions, those too that only these call.
    #[serde(default)]
    pub bodies: Vec<Body>,
    /// What nobody may be in when it comes or goes.
    pub pins: Vec<Pinned>,
    /// How unwinders learn of the new code.
    pub detours: Vec<Detour>,
    /// What is called when it comes or goes.
    pub callbacks: Vec<Called>,
    /// What calls those; 0 if there are none.
    pub call_at: u64,
    /// Whether it was forced.
    pub is_tainted: bool,
    /// When it was applied, in seconds since 1970.
    pub applied_unix_s: u64,
}

/// A function that is replaced.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Replaced {
    /// Its name.
    pub name: String,
    /// Where the old body is.
    pub old: u64,
    /// Its length.
    pub old_bytes: u64,
    /// Its other pieces: address and length.
    pub parts: Vec<(u64, u64)>,
    /// Where the new body is.
    pub new: u64,
    /// What the old body begins with.
    pub original: Vec<u8>,
    /// What is there instead.
    pub jump: Vec<u8>,
}

/// A new function.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Body {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub at: u64,
    /// Its length.
    pub len_bytes: u64,
}

/// A function that stays, and that nobody may be in.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pinned {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub at: u64,
    /// Its length.
    pub len_bytes: u64,
}

/// A function of the patch that is called when it comes or goes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Called {
    /// [`When::code`](trapline_patch::When::code).
    pub when: String,
    /// Where it is.
    pub at: u64,
}

impl Active {
    fn encode(&self) -> io::Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(io::Error::other)
    }

    /// How much memory this takes: whole pages. Addresses that are not known yet are to be the largest.
    pub(super) fn page_bytes(&self) -> u64 {
        let len_bytes = self.encode().map_or(0, |payload| payload.len());
        ((HEADER_BYTES + len_bytes) as u64).next_multiple_of(PAGE_BYTES)
    }
}

/// What is to be known of a patch, for its first pages.
pub(super) fn header(patch: &Active, status: Status) -> io::Result<Vec<u8>> {
    let payload = patch.encode()?;
    let len_bytes = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let numbers = [VERSION, len_bytes, crc32fast::hash(&payload), status as u32, 0];
    let numbers: Vec<u8> = numbers.into_iter().flat_map(u32::to_le_bytes).collect();
    Ok([&MAGIC[..], &numbers, &payload].concat())
}

/// Says how far it is.
pub(super) fn set_status(memory: &Memory, patch: &Active, status: Status) -> io::Result<()> {
    memory.write(Addr::new(patch.at).after(STATUS_AT), &(status as u32).to_le_bytes())
}

/// Whether nothing leads to a patch.
pub(super) fn is_unused(memory: &Memory, patch: &Active) -> bool {
    let status = memory.read_vec(Addr::new(patch.at).after(STATUS_AT), 4);
    status.is_ok_and(|status| status == (Status::Preparing as u32).to_le_bytes())
}

/// Says how many pieces are mapped.
pub(super) fn set_mapped(memory: &Memory, patch: &Active, count: usize) -> io::Result<()> {
    let count = u32::try_from(count).map_err(io::Error::other)?;
    memory.write(Addr::new(patch.at).after(MAPPED_AT), &count.to_le_bytes())
}

/// Has a thread unmap what is mapped of a patch that nothing leads to, these pages last.
pub(super) fn give_back(remote: &mut Remote, memory: &Memory, patch: &Active) -> io::Result<()> {
    let mut count = [0; 4];
    memory.read(Addr::new(patch.at).after(MAPPED_AT), &mut count)?;
    let mapped = patch.pieces.len().min(u32::from_le_bytes(count) as usize);
    for (index, (at, len_bytes)) in patch.pieces[..mapped].iter().enumerate().rev() {
        set_mapped(memory, patch, index)?;
        remote.unmap(Addr::new(*at), *len_bytes)?;
    }
    remote.unmap(Addr::new(patch.at), patch.header_bytes)
}

/// All patches that a process knows of.
pub(super) fn find(memory: &Memory, mappings: &[Mapping], hidden: &Hidden) -> Vec<(Status, Active)> {
    let may_be = |mapping: &&Mapping| {
        let is_memory = mapping.inode == 0 && !mapping.is_executable && !mapping.is_private_memory;
        is_memory && !mapping.path.to_string_lossy().starts_with("[v") && mapping.range.len_bytes() <= LARGEST_BYTES
    };
    let starts = mappings.iter().filter(may_be).map(|mapping| mapping.range.start);
    starts.filter_map(|at| read(memory, at, hidden)).collect()
}

fn read(memory: &Memory, at: Addr, hidden: &Hidden) -> Option<(Status, Active)> {
    let mut header = [0; HEADER_BYTES];
    memory.read(at, &mut header).ok()?;
    let number = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    if !header.starts_with(&MAGIC) || number(8) != VERSION || u64::from(number(12)) > LARGEST_BYTES {
        return None;
    }
    let payload = memory.read_vec(at.after(HEADER_BYTES), usize::try_from(number(12)).ok()?).ok()?;
    let status = Status::WRITTEN.into_iter().find(|status| *status as u32 == number(STATUS_AT))?;
    let patch: Active = (crc32fast::hash(&payload) == number(16)).then(|| serde_json::from_slice(&payload).ok())??;
    let is_diverted = |function: &Replaced| {
        let there = hidden.read(memory, Addr::new(function.old), function.jump.len());
        there.is_ok_and(|there| there == function.jump)
    };
    let status = match status {
        Status::Active if !patch.functions.iter().any(is_diverted) => Status::Unloaded,
        status => status,
    };
    (patch.at == at.value()).then_some((status, patch))
}
