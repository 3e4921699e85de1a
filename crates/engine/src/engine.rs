//! The engine: from what users register to what stands at each site.
//!
//! Owns the [`SiteTable`], the registered ops and the code of their trampolines; drives the [`Protocol`] on a [`Host`]. A change (an ops
//! enabled, disabled, refiltered, unregistered) is turned into the *desired* set of ops of each affected site, and only the difference is
//! poked, in one batch. What nobody calls any more is reclaimed after a grace period ([`Engine::reclaim`]).
//!
//! Invariants: a trampoline exists before a site leads to it, and until no thread can be in it (I1); a failed change leaves every site and
//! every ops as they were (I5).

use alloc::{boxed::Box, string::ToString, sync::Arc, vec::Vec};

use crate::{
    Addr, AddrRange, Filter,
    error::EngineError,
    filter::near_misses,
    host::{Host, VerifyError},
    insn::{self, CALL_BYTES, Effect},
    ops::{Ops, OpsId, OpsSpec, OpsTable, SetId, SetTable, Trampoline},
    poke::{Outcome, Poke, PokeSet, Protocol, Step},
    site::{Site, SiteSpec, SiteTable, State},
    trampoline::{ENTRY_OFFSET_BYTES, OpsCall, int3_trampoline, ops_trampoline},
    trap::TrapState,
};

/// How much the engine has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Batches that were committed.
    pub batches: u64,
    /// Sites that were rewritten by them.
    pub pokes: u64,
    /// Rounds of core synchronisation: three for each batch.
    pub syncs: u64,
}

/// Code, and possibly an ops, that waits for the end of a grace period.
#[derive(Debug)]
struct Retired {
    blocks: Vec<AddrRange>,
    ops: OpsId,
}

/// Sites, ops, and the host that they live in.
#[derive(Debug)]
pub struct Engine<H: Host> {
    host: H,
    trap: &'static TrapState,
    sites: SiteTable,
    ops: OpsTable,
    sets: SetTable,
    int3_trampoline: Addr,
    int3_block: AddrRange,
    retired: Vec<Retired>,
    stats: Stats,
    stuck: bool,
}

impl<H: Host> Engine<H> {
    /// An engine for these sites. Nothing is written to them yet. `trap` is what the host's trap handler reads.
    ///
    /// # Errors
    /// If a site cannot be used, or if there is no memory for the int3 trampoline.
    pub fn new(mut host: H, trap: &'static TrapState, specs: Vec<SiteSpec>) -> Result<Self, EngineError<H::Error>> {
        let machine = host.machine();
        let sites = SiteTable::new(machine.mode, specs)?;
        let near = sites.sites().first().map_or(AddrRange::default(), |site| AddrRange::new(site.address(), 1));
        // The int3 trampoline is reached by setting the instruction pointer, so its code does not depend on its place.
        let code = int3_trampoline(&machine, near.start)?;
        let int3_trampoline = host.alloc_code(near, code.len()).map_err(EngineError::Host)?;
        host.write_code(int3_trampoline, &code).map_err(EngineError::Host)?;
        let int3_block = AddrRange::new(int3_trampoline, code.len() as u64);
        let addresses = sites.sites().iter().map(crate::Site::address).collect();
        trap.know_sites(Arc::new(addresses), || host.relax());
        Ok(Self {
            host,
            trap,
            sites,
            ops: OpsTable::default(),
            sets: SetTable::default(),
            int3_trampoline,
            int3_block,
            retired: Vec::new(),
            stats: Stats::default(),
            stuck: false,
        })
    }

    /// The host.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// The host, to be changed.
    pub fn host_mut(&mut self) -> &mut H {
        &mut self.host
    }

    /// The sites, and what stands there now.
    pub fn sites(&self) -> &SiteTable {
        &self.sites
    }

    /// Where trap handlers resume an emulated call with [`Resume::Slots`](crate::trap::Resume::Slots).
    pub fn int3_trampoline(&self) -> Addr {
        self.int3_trampoline
    }

    /// All code that the engine has made and not given back, sorted by address, as [`Host::is_unused`] wants it.
    pub fn code(&self) -> Vec<AddrRange> {
        let retired = self.retired.iter().flat_map(|retired| retired.blocks.iter().copied());
        self.habitable(self.sets.blocks().chain(retired))
    }

    /// Where a thread can be that runs these trampolines or is about to: a slot that is still pending leads to a trampoline too, and its thread
    /// is in the int3 trampoline until it is not.
    fn habitable(&self, blocks: impl Iterator<Item = AddrRange>) -> Vec<AddrRange> {
        let mut ranges: Vec<AddrRange> = blocks.flat_map(around_entry).chain([self.int3_block]).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        ranges
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// How many ops are attached to the site at `address`; `None` if it is no site.
    pub fn attached(&self, address: Addr) -> Option<usize> {
        self.sites.state(address).map(|state| self.sets.set(state.set).ops.len())
    }

    /// Registers an ops, disabled.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSite`], [`EngineError::NothingMatches`], [`EngineError::IpModifyTaken`].
    pub fn register(&mut self, spec: OpsSpec) -> Result<OpsId, EngineError<H::Error>> {
        let sites = self.resolve(&spec.filter)?;
        if spec.flags.ip_modify {
            self.check_ip_modify(&sites, None)?;
        }
        Ok(self.ops.insert(Ops { spec, sites, enabled: false }))
    }

    /// Attaches an ops to all of its sites: from the return of this function on it sees every call. Enabling it twice changes nothing.
    ///
    /// # Errors
    /// [`EngineError::Text`] if a site does not hold what it should, and whatever the host reports; nothing has changed then.
    pub fn enable(&mut self, id: OpsId) -> Result<(), EngineError<H::Error>> {
        self.set_enabled(id, true)
    }

    /// Detaches an ops from all of its sites. A thread may still be inside its callback afterwards, until [`reclaim`](Self::reclaim) says
    /// otherwise.
    ///
    /// # Errors
    /// As [`enable`](Self::enable).
    pub fn disable(&mut self, id: OpsId) -> Result<(), EngineError<H::Error>> {
        self.set_enabled(id, false)
    }

    fn set_enabled(&mut self, id: OpsId, enabled: bool) -> Result<(), EngineError<H::Error>> {
        let ops = self.ops.find(id).ok_or(EngineError::UnknownOps(id))?;
        if ops.enabled == enabled {
            return Ok(());
        }
        debug_assert!(self.sites.states().iter().all(|state| state.settled), "settle the sites first");
        let sites = ops.sites.clone();
        self.retarget(id, sites.iter().map(|site| (*site, enabled)))?;
        if let Some(ops) = self.ops.find_mut(id) {
            ops.enabled = enabled;
        }
        Ok(())
    }

    /// Gives an ops another filter. An enabled ops leaves the sites that no longer match and is attached to the new ones, in one batch; those
    /// that match both keep it throughout.
    ///
    /// # Errors
    /// As [`register`](Self::register) and [`enable`](Self::enable); the old filter stays in force then.
    pub fn set_filter(&mut self, id: OpsId, filter: Filter) -> Result<(), EngineError<H::Error>> {
        let wanted = self.resolve(&filter)?;
        let ops = self.ops.find(id).ok_or(EngineError::UnknownOps(id))?;
        if ops.spec.flags.ip_modify {
            self.check_ip_modify(&wanted, Some(id))?;
        }
        if ops.enabled {
            let leave = ops.sites.iter().filter(|site| wanted.binary_search(site).is_err()).map(|site| (*site, false));
            let mut changes: Vec<_> = leave.chain(wanted.iter().map(|site| (*site, true))).collect();
            changes.sort_unstable();
            self.retarget(id, changes.into_iter())?;
        }
        if let Some(ops) = self.ops.find_mut(id) {
            ops.sites = wanted;
            ops.spec.filter = filter;
        }
        Ok(())
    }

    /// Disables an ops and forgets it. Its callback and its trampolines must stay until [`reclaim`](Self::reclaim) returns its id.
    ///
    /// # Errors
    /// As [`disable`](Self::disable); the ops is still registered then.
    pub fn unregister(&mut self, id: OpsId) -> Result<(), EngineError<H::Error>> {
        self.disable(id)?;
        self.ops.remove(id);
        self.retired.push(Retired { blocks: self.sets.forget(id), ops: id });
        Ok(())
    }

    /// Frees the code that no thread can be in any more, and returns the ops whose callbacks are not running and never will again. What is still
    /// in use is left for the next call.
    pub fn reclaim(&mut self) -> Vec<OpsId> {
        // The int3s of a batch that could not be undone still lead to its trampolines, whoever is registered.
        if self.retired.is_empty() || self.stuck {
            return Vec::new();
        }
        let retired = core::mem::take(&mut self.retired);
        // One question for all is mostly enough. Where it is not, each is asked for, so that one that stays in use holds up no other.
        let all_unused = self.are_unused(&retired);
        let alone = retired.len() == 1;
        let (unused, used): (Vec<_>, Vec<_>) =
            retired.into_iter().partition(|one| all_unused || !alone && self.are_unused(core::slice::from_ref(one)));
        self.retired = used;
        for block in unused.iter().flat_map(|retired| &retired.blocks) {
            self.host.free_code(*block);
        }
        unused.into_iter().map(|retired| retired.ops).collect()
    }

    fn are_unused(&mut self, retired: &[Retired]) -> bool {
        if retired.iter().all(|retired| retired.blocks.is_empty()) {
            return true;
        }
        let ranges = self.habitable(retired.iter().flat_map(|retired| retired.blocks.iter().copied()));
        // Not to know is to wait.
        matches!(self.host.is_unused(&ranges), Ok(true))
    }

    /// How many unregistered ops wait for [`reclaim`](Self::reclaim).
    pub fn retired(&self) -> usize {
        self.retired.len()
    }

    /// Replaces the original bytes of every site by those at rest, so that later batches replace one instruction by another. Needed once, before
    /// the first ops is enabled. Where the two differ this takes a grace period, since a thread may be between the original instructions.
    ///
    /// # Errors
    /// As [`enable`](Self::enable), and [`EngineError::Busy`] if a thread stays inside a site.
    pub fn settle(&mut self) -> Result<(), EngineError<H::Error>> {
        self.set_settled(true)
    }

    /// Disables every ops and puts the original bytes back everywhere (I6). Ops stay registered; [`settle`](Self::settle) before enabling one.
    ///
    /// # Errors
    /// As [`disable`](Self::disable) and [`settle`](Self::settle).
    pub fn release(&mut self) -> Result<(), EngineError<H::Error>> {
        let enabled: Vec<OpsId> = self.ops.iter().filter(|(_, ops)| ops.enabled).map(|(id, _)| id).collect();
        for id in enabled {
            self.disable(id)?;
        }
        self.set_settled(false)
    }

    fn set_settled(&mut self, settled: bool) -> Result<(), EngineError<H::Error>> {
        let mut pokes = Vec::new();
        for (site, state) in self.sites.iter_mut() {
            let SiteSpec { address, original, rest, .. } = site.spec;
            if state.settled == settled || original == rest {
                continue;
            }
            let (old, new) = if settled { (original, rest) } else { (rest, original) };
            // Both do the same; whoever meets the int3 goes on behind all of it.
            let effect = match site.rest_effect {
                Effect::Nop { .. } => Effect::Nop { next: address.after(rest.len()) },
                other => other,
            };
            pokes.push(Poke::with_effect(address, old, new, effect)?);
        }
        self.commit(pokes, Protocol::with_grace())?;
        for (site, state) in self.sites.iter_mut() {
            state.settled = settled || site.rests_as_built();
        }
        Ok(())
    }

    /// Brings sites, in order of their addresses, to the set that they are in, with or without `id`, by one batch.
    fn retarget(
        &mut self,
        id: OpsId,
        changes: impl ExactSizeIterator<Item = (u32, bool)>,
    ) -> Result<(), EngineError<H::Error>> {
        let mut pokes = Vec::with_capacity(changes.len());
        let mut moves = Vec::with_capacity(changes.len());
        let mode = self.host.machine().mode;
        // Neighbours are mostly in the same set: one look-up serves them all.
        let mut last = None;
        for (index, attached) in changes {
            let State { address, now, set: from, region, .. } = self.sites.states()[index as usize];
            let key = (from, region, attached);
            let (to, entry) = match last {
                Some((last_key, found)) if last_key == key => found,
                _ => {
                    let to = self.sets.changed(from, id, attached);
                    (to, self.trampoline(to, region)?)
                }
            };
            last = Some((key, (to, entry)));
            if to == from {
                continue;
            }
            // What stands at a settled site and what comes there are one instruction each, as long as a call. Each poke is made in its place: a copy
            // of it would be most of the work.
            match entry {
                None => {
                    let &Site { rest, rest_effect, .. } = &self.sites.sites()[index as usize];
                    pokes.push(Poke { site: address, old: now, new: rest, effect: rest_effect });
                }
                Some(target) => {
                    let new = insn::encode::call(address, target, mode)?;
                    let return_to = address.after(CALL_BYTES);
                    pokes.push(Poke { site: address, old: now, new, effect: Effect::Call { target, return_to } });
                }
            }
            moves.push((index, to));
        }
        let Some(batch) = self.commit(pokes, Protocol::new())? else { return Ok(()) };
        for ((index, to), poke) in moves.into_iter().zip(batch.pokes()) {
            let state = &mut self.sites.states_mut()[index as usize];
            state.set = to;
            state.now = poke.new;
        }
        Ok(())
    }

    /// The main entry of a set's trampoline in a region, made when it is first asked for; `None` for the empty set.
    fn trampoline(&mut self, id: SetId, region: u16) -> Result<Option<Addr>, EngineError<H::Error>> {
        let set = self.sets.set(id);
        if set.ops.is_empty() {
            return Ok(None);
        }
        if let Some(known) = set.trampolines.iter().find(|known| known.region == region) {
            return Ok(Some(known.entry));
        }
        let machine = self.host.machine();
        let calls = self.calls(&set.ops);
        let near = self.sites.region(region);
        // Which form of call reaches a callback depends on the place, and the place on the length: reserve for the longer form.
        let longest = ops_trampoline(&machine, &calls, near.start)?.len() + LONG_CALL_BYTES * calls.len();
        let at = self.host.alloc_code(near, longest).map_err(EngineError::Host)?;
        let code = ops_trampoline(&machine, &calls, at)?;
        debug_assert!(code.len() <= longest, "the reserve covers both forms of call");
        self.host.write_code(at, &code).map_err(EngineError::Host)?;
        let entry = at.offset(ENTRY_OFFSET_BYTES);
        let block = AddrRange::new(at, longest as u64);
        self.sets.set_mut(id).trampolines.push(Trampoline { region, entry, block });
        Ok(Some(entry))
    }

    /// The callbacks of these ops in the order in which they are called: by age, but the one that may change where the call resumes last, since the others
    /// learn from the same word which site this is.
    fn calls(&self, members: &[OpsId]) -> Vec<OpsCall> {
        let specs = || members.iter().filter_map(|member| self.ops.find(*member)).map(|ops| &ops.spec);
        let of = |ip_modify| specs().filter(move |spec| spec.flags.ip_modify == ip_modify);
        of(false).chain(of(true)).map(OpsSpec::call).collect()
    }

    /// Takes a batch through the protocol, and returns it in order of the addresses; `None` if there was nothing to do.
    fn commit(&mut self, pokes: Vec<Poke>, protocol: Protocol) -> Result<Option<Arc<PokeSet>>, EngineError<H::Error>> {
        if self.stuck {
            return Err(EngineError::Stuck);
        }
        if pokes.is_empty() {
            return Ok(None);
        }
        let batch = Arc::new(PokeSet::new(pokes)?);
        let mut syncs = 0;
        let (outcome, failure) = drive(&mut self.host, self.trap, &batch, protocol, &mut syncs);
        self.stats.syncs += syncs;
        self.stuck = outcome == Outcome::Stuck;
        match (outcome, failure) {
            (Outcome::Committed, _) => {
                self.stats.batches += 1;
                self.stats.pokes += batch.pokes().len() as u64;
                Ok(Some(batch))
            }
            (Outcome::Aborted, Some(DriveError::Text(error))) => Err(error.into()),
            (Outcome::Aborted, Some(DriveError::Busy)) => Err(EngineError::Busy),
            _ => Err(EngineError::Stuck),
        }
    }

    fn resolve(&self, filter: &Filter) -> Result<Vec<u32>, EngineError<H::Error>> {
        for address in filter.addresses() {
            if self.sites.find(address).is_none() {
                let nearest = self.sites.nearest(address).map(|site| (site.address(), site.name().into()));
                return Err(EngineError::NoSuchSite { address, nearest });
            }
        }
        let matching = (0u32..).zip(self.sites.sites()).filter(|(_, site)| filter.matches(site.name(), site.address()));
        let sites: Vec<u32> = matching.map(|(index, _)| index).collect();
        if sites.is_empty() {
            let names = || self.sites.sites().iter().map(crate::Site::name);
            let mut near: Vec<_> = filter.names().flat_map(|glob| near_misses(glob, names())).collect();
            near.dedup();
            let globs = filter.names().map(ToString::to_string).collect();
            return Err(EngineError::NothingMatches { globs, near, sites: self.sites.sites().len() });
        }
        Ok(sites)
    }

    fn check_ip_modify(&self, sites: &[u32], except: Option<OpsId>) -> Result<(), EngineError<H::Error>> {
        for (id, other) in self.ops.iter() {
            if !other.spec.flags.ip_modify || Some(id) == except {
                continue;
            }
            if let Some(index) = sites.iter().find(|site| other.sites.binary_search(site).is_ok()) {
                let site = &self.sites.sites()[*index as usize];
                let holder: Box<str> = other.spec.name.clone();
                return Err(EngineError::IpModifyTaken { site: site.address(), name: site.name().into(), holder });
            }
        }
        Ok(())
    }
}

/// A call through a pointer behind the code is this much longer than a direct one: a byte of opcode, and the pointer with its alignment.
const LONG_CALL_BYTES: usize = 1 + 2 * size_of::<u64>();

/// A trampoline's block without the byte before its main entry, which is no instruction's first: what stands on a stack as the entry's address is
/// where a slot led to, and no return address.
fn around_entry(block: AddrRange) -> [AddrRange; 2] {
    let entry = block.start.offset(ENTRY_OFFSET_BYTES);
    [AddrRange { start: block.start, end: entry.offset(-1) }, AddrRange { start: entry, end: block.end }]
}

/// How often a grace period is looked for before a batch is given up. A thread between two nops leaves as soon as it runs.
const GRACE_ATTEMPTS: usize = 100;

/// What made [`drive`] undo a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DriveError<E> {
    /// The text is not as expected, or the host failed.
    Text(VerifyError<E>),
    /// A thread stayed between the instructions of a site.
    Busy,
}

impl<E> From<E> for DriveError<E> {
    fn from(error: E) -> Self {
        Self::Text(VerifyError::Host(error))
    }
}

fn await_passed<H: Host>(host: &mut H, ranges: &[AddrRange]) -> Result<(), DriveError<H::Error>> {
    for _ in 0..GRACE_ATTEMPTS {
        if host.is_passed(ranges)? {
            return Ok(());
        }
        host.relax();
    }
    Err(DriveError::Busy)
}

/// Takes one batch through the [`Protocol`] on a host. Returns how it ended and, if not committed, what failed first; `syncs` counts barriers.
pub fn drive<H: Host>(
    host: &mut H,
    trap: &TrapState,
    batch: &Arc<PokeSet>,
    mut protocol: Protocol,
    syncs: &mut u64,
) -> (Outcome, Option<DriveError<H::Error>>) {
    let mut failure = None;
    loop {
        let result = match protocol.next_step() {
            Step::Verify => host.verify_text(batch.expected()).map_err(DriveError::Text),
            Step::Publish => {
                trap.publish(batch.clone(), || host.relax());
                Ok(())
            }
            Step::Write(part, version) => host.write_text(batch.writes(part, version)).map_err(Into::into),
            Step::AwaitUnused => await_passed(host, &batch.interiors()),
            Step::SyncCores => {
                *syncs += 1;
                host.sync_cores().map_err(Into::into)
            }
            Step::Retire => {
                trap.retire(|| host.relax());
                Ok(())
            }
            Step::Done(outcome) => return (outcome, failure),
        };
        if let Err(error) = result {
            failure.get_or_insert(error);
            protocol.failed();
        }
    }
}

#[cfg(test)]
mod tests;
