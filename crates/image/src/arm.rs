//! From plans to bytes: stubs, and what has to be written where.
//!
//! Owns [`ArmRequest`] and [`Armed`], and the layout of stubs that `trapline_abi::agent` describes. Neighbours: the ladder made the plans, the recorder
//! writes what comes out. Invariants: the same request gives the same bytes; every write says which bytes it replaces.

use trapline_engine::{Addr, insn::InsnBytes};

use crate::{Function, Image, Reason};

/// Where the agent's entries are in the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entries {
    /// `trapline_abi::agent::symbol::ENTER`.
    pub enter: Addr,
    /// `trapline_abi::agent::symbol::ENTER_KEEP_FLAGS`.
    pub enter_keep_flags: Addr,
    /// `trapline_abi::agent::symbol::ENTER_LIMITED`.
    pub enter_limited: Addr,
    /// `trapline_abi::agent::symbol::POINT`.
    pub point: Addr,
}

/// What is to be armed, and where.
#[derive(Clone, Copy, Debug)]
pub struct ArmRequest<'a> {
    /// Indices in [`Image::functions`], ascending.
    pub selected: &'a [usize],
    /// What the loader added to the file's addresses.
    pub bias: u64,
    /// Where the stubs will be in the process: 16-byte aligned, within 2 GiB of everything that is loaded of the file.
    pub stubs_at: Addr,
    /// Where the agent's entries are in the process; anywhere.
    pub entries: Entries,
    /// The site id of function 0.
    pub first_site: u32,
    /// Whether returns are to be seen.
    pub returns: bool,
    /// Whether the depth of frames is limited.
    pub limit_depth: bool,
}

/// Everything that arms the functions of one request.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Armed {
    /// For [`ArmRequest::stubs_at`]; code and read-only data.
    pub stubs: Vec<u8>,
    /// Ascending by address, not overlapping. To be made when the stubs stand and no thread is inside a window.
    pub writes: Vec<Write>,
    /// Ascending by function.
    pub sites: Vec<ArmedSite>,
    /// Functions that are not among the sites, by index, and why.
    pub refused: Vec<(usize, Reason)>,
}

/// Bytes to be written to the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Write {
    /// In the process.
    pub at: Addr,
    /// What stands there, as the file has it.
    pub expected: InsnBytes,
    /// What shall stand there; as long.
    pub new: InsnBytes,
}

/// A function that is armed. All addresses are the process's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArmedSite {
    /// Its site id.
    pub id: u32,
    /// Its index in [`Image::functions`].
    pub function: usize,
    /// The function's address.
    pub address: Addr,
    /// The first half of its stub: the call of an entry.
    pub on: Addr,
    /// The second half: only what the function does itself.
    pub off: Addr,
    /// Where the jump of 5 bytes stands. It leads to `on`, and is the one instruction to poke to switch the site.
    pub jump_at: Addr,
}

pub(crate) fn stub_bytes_bound(_functions: &[Function], _selected: &[usize]) -> usize {
    0
}

pub(crate) fn arm(_image: &Image, _request: &ArmRequest<'_>) -> Armed {
    Armed::default()
}
