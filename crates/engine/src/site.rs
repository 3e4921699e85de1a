//! Sites: the instructions that may be poked, and what stands there now.
//!
//! Owns [`SiteTable`]. Discovery fills it, the [`engine`](crate::Engine) keeps it in step with the text. What a site *is* ([`Site`]) lies apart
//! from what *stands* there (`State`), so that a batch of thousands reads little memory. Invariant: sorted by address, no two sites overlap,
//! and what stands at a site is what the last committed batch wrote.

use alloc::{boxed::Box, vec::Vec};
use core::fmt;

use crate::{
    Addr, AddrRange, Mode,
    insn::{CALL_BYTES, Effect, InsnBytes, NotEmulated},
    ops::SetId,
};

/// A site as discovery reports it.
#[derive(Clone, Debug)]
pub struct SiteSpec {
    /// Address of the first byte.
    pub address: Addr,
    /// Name of the function that it belongs to.
    pub name: Box<str>,
    /// The bytes that the program was built with, at least as many as a call takes. [`Engine::settle`](crate::Engine::settle) replaces them
    /// by `rest`, [`Engine::release`](crate::Engine::release) puts them back.
    pub original: InsnBytes,
    /// As long as `original`, and doing the same: the one instruction as long as a call that stands at the site while no ops is attached, and
    /// whatever is to follow it.
    pub rest: InsnBytes,
}

/// A place that can be made a call.
#[derive(Debug)]
pub struct Site {
    pub(crate) spec: SiteSpec,
    /// The first instruction of `spec.rest`: what stands there while no ops is attached.
    pub(crate) rest: InsnBytes,
    pub(crate) rest_effect: Effect,
}

impl Site {
    /// Address of the first byte.
    pub fn address(&self) -> Addr {
        self.spec.address
    }

    /// Name of the function that it belongs to.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Whether `spec.rest` is what the program was built with.
    pub(crate) fn rests_as_built(&self) -> bool {
        self.spec.original == self.spec.rest
    }
}

/// What stands at a site.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    pub(crate) address: Addr,
    /// The instruction that stands there now, once the site is settled.
    pub(crate) now: InsnBytes,
    /// The ops attached to it.
    pub(crate) set: SetId,
    /// Which trampolines it can reach; see [`SiteTable::region`].
    pub(crate) region: u16,
    /// Whether the site holds `spec.rest` or a call, not the original bytes.
    pub(crate) settled: bool,
}

/// Why sites cannot be taken into the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadSite {
    /// Too short for a call, or original and rest differ in length.
    Length {
        /// The site.
        at: Addr,
        /// Length of the original bytes.
        original_bytes: usize,
        /// Length of the resting bytes.
        rest_bytes: usize,
    },
    /// The resting instruction cannot be emulated.
    NotEmulated(NotEmulated),
    /// Two sites overlap.
    Overlap {
        /// The site at the lower address.
        first: Addr,
        /// The one that begins inside it.
        second: Addr,
    },
    /// Sites are scattered over more regions of the address space than are supported.
    TooManyRegions,
}

impl fmt::Display for BadSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { at, original_bytes, rest_bytes } => write!(
                f,
                "the site at {at} has {original_bytes} bytes, to be replaced by {rest_bytes}; a call takes {CALL_BYTES}"
            ),
            Self::NotEmulated(reason) => reason.fmt(f),
            Self::Overlap { first, second } => write!(f, "the sites {first} and {second} overlap"),
            Self::TooManyRegions => write!(f, "the sites lie in more than {} regions of 512 MiB", u16::MAX),
        }
    }
}

impl core::error::Error for BadSite {}

/// Sites that one trampoline can serve lie within this many bytes, far below the 2 GiB of a displacement, so that there is room to find memory.
const REGION_BYTES: i64 = 512 << 20;

/// All sites, sorted by address.
#[derive(Debug, Default)]
pub struct SiteTable {
    sites: Vec<Site>,
    /// Of the site with the same index.
    states: Vec<State>,
    regions: Vec<AddrRange>,
}

impl SiteTable {
    /// Sorts and checks `specs`.
    ///
    /// # Errors
    /// [`BadSite`].
    pub fn new(mode: Mode, mut specs: Vec<SiteSpec>) -> Result<Self, BadSite> {
        specs.sort_by_key(|spec| spec.address);
        let mut table = Self {
            sites: Vec::with_capacity(specs.len()),
            states: Vec::with_capacity(specs.len()),
            regions: Vec::new(),
        };
        for spec in specs {
            table.push(mode, spec)?;
        }
        Ok(table)
    }

    fn push(&mut self, mode: Mode, spec: SiteSpec) -> Result<(), BadSite> {
        let at = spec.address;
        let (original_bytes, rest_bytes) = (spec.original.len(), spec.rest.len());
        if original_bytes < CALL_BYTES || original_bytes != rest_bytes {
            return Err(BadSite::Length { at, original_bytes, rest_bytes });
        }
        if let Some(previous) = self.sites.last()
            && at.distance_from(previous.address()) < i64::try_from(previous.spec.original.len()).unwrap_or(i64::MAX)
        {
            return Err(BadSite::Overlap { first: previous.address(), second: at });
        }
        let rest = InsnBytes::new(&spec.rest[..CALL_BYTES]);
        let rest_effect = Effect::decode(mode, at, &rest).map_err(BadSite::NotEmulated)?;
        match self.regions.last_mut() {
            Some(region) if at.distance_from(region.start) < REGION_BYTES => region.end = at.after(CALL_BYTES),
            _ => self.regions.push(AddrRange::new(at, CALL_BYTES as u64)),
        }
        let region = u16::try_from(self.regions.len() - 1).map_err(|_| BadSite::TooManyRegions)?;
        let site = Site { spec, rest, rest_effect };
        let settled = site.rests_as_built();
        self.states.push(State { address: at, now: rest, set: SetId::EMPTY, region, settled });
        self.sites.push(site);
        Ok(())
    }

    /// All sites in order of their addresses.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// What stands at them, in the same order.
    pub(crate) fn states(&self) -> &[State] {
        &self.states
    }

    pub(crate) fn states_mut(&mut self) -> &mut [State] {
        &mut self.states
    }

    /// The sites with what stands there.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&Site, &mut State)> {
        self.sites.iter().zip(&mut self.states)
    }

    /// The site at exactly this address.
    pub fn find(&self, address: Addr) -> Option<&Site> {
        self.index(address).map(|index| &self.sites[index])
    }

    /// What stands at exactly this address.
    pub(crate) fn state(&self, address: Addr) -> Option<&State> {
        self.index(address).map(|index| &self.states[index])
    }

    /// The instruction that stands at exactly this address, once its site is settled.
    pub fn now(&self, address: Addr) -> Option<InsnBytes> {
        self.state(address).map(|state| state.now)
    }

    fn index(&self, address: Addr) -> Option<usize> {
        self.states.binary_search_by_key(&address, |state| state.address).ok()
    }

    /// The site whose address is nearest, for errors.
    pub(crate) fn nearest(&self, address: Addr) -> Option<&Site> {
        self.sites.iter().min_by_key(|site| site.address().distance_from(address).unsigned_abs())
    }

    /// The stretch of addresses that a site's trampolines must be near to.
    pub(crate) fn region(&self, index: u16) -> AddrRange {
        self.regions[usize::from(index)]
    }
}
