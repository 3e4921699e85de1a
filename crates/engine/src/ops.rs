//! Ops: who wants to see which calls, and the sets in which they share sites.
//!
//! Owns [`OpsSpec`], [`OpsFlags`] and the interning of *sets* of ops. A site is in the state of exactly one set, and a set has one trampoline
//! for each region of the address space; so a change at a site is a change from one [`SetId`] to another. Invariant: a set never
//! changes; sets that contain a dead ops are forgotten, and their code waits for the end of a grace period.

use alloc::{boxed::Box, collections::BTreeMap, vec::Vec};

use crate::{Addr, AddrRange, Filter, insn::Clobbers, trampoline::OpsCall};

/// Names a registered ops. Never used twice by one engine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpsId(u32);

/// What an ops asks for beyond being called. The names are ftrace's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpsFlags {
    /// `SAVE_REGS`: the callback sees all registers, not the arguments only.
    pub save_regs: bool,
    /// IPMODIFY: the callback may change where the call resumes. Implies `SAVE_REGS`; exclusive at a site, and called behind the others there.
    pub ip_modify: bool,
    /// `RECURSION_SAFE`: the callback may be entered again while it runs in the same context. Without it such calls are left out, and
    /// counted.
    pub recursion_safe: bool,
}

/// The machine code behind an ops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Callback {
    /// Entry of an `extern "C" fn(frame: *mut CallFrame, data: usize)`.
    pub entry: Addr,
    /// Its second argument.
    pub data: Addr,
    /// A word in the target that counts calls left out because of recursion.
    pub recursions: Addr,
    /// What the code at `entry` can write.
    pub clobbers: Clobbers,
}

/// An ops as its owner describes it.
#[derive(Clone, Debug)]
pub struct OpsSpec {
    /// For messages.
    pub name: Box<str>,
    /// Which sites it is attached to.
    pub filter: Filter,
    /// What it asks for.
    pub flags: OpsFlags,
    /// What is called.
    pub callback: Callback,
}

impl OpsSpec {
    pub(crate) fn call(&self) -> OpsCall {
        OpsCall {
            callback: self.callback.entry,
            data: self.callback.data,
            recursions: self.callback.recursions,
            clobbers: self.callback.clobbers,
            save_regs: self.flags.save_regs || self.flags.ip_modify,
            recursion_safe: self.flags.recursion_safe,
        }
    }
}

/// A registered ops.
#[derive(Debug)]
pub(crate) struct Ops {
    pub(crate) spec: OpsSpec,
    /// Indices into the site table, ascending.
    pub(crate) sites: Vec<u32>,
    pub(crate) enabled: bool,
}

/// All registered ops.
#[derive(Debug, Default)]
pub(crate) struct OpsTable {
    ops: BTreeMap<OpsId, Ops>,
    next: u32,
}

impl OpsTable {
    pub(crate) fn insert(&mut self, ops: Ops) -> OpsId {
        let id = OpsId(self.next);
        self.next += 1;
        self.ops.insert(id, ops);
        id
    }

    pub(crate) fn remove(&mut self, id: OpsId) -> Option<Ops> {
        self.ops.remove(&id)
    }

    pub(crate) fn find(&self, id: OpsId) -> Option<&Ops> {
        self.ops.get(&id)
    }

    pub(crate) fn find_mut(&mut self, id: OpsId) -> Option<&mut Ops> {
        self.ops.get_mut(&id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (OpsId, &Ops)> {
        self.ops.iter().map(|(id, ops)| (*id, ops))
    }
}

/// Names an interned set of ops.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct SetId(u32);

impl SetId {
    /// The set of no ops: the site is at rest.
    pub(crate) const EMPTY: Self = Self(0);
}

/// The code of one set in one region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trampoline {
    pub(crate) region: u16,
    pub(crate) entry: Addr,
    pub(crate) block: AddrRange,
}

#[derive(Debug)]
pub(crate) struct OpsSet {
    pub(crate) ops: Vec<OpsId>,
    pub(crate) trampolines: Vec<Trampoline>,
}

/// All sets that a site is or was in.
#[derive(Debug)]
pub(crate) struct SetTable {
    sets: BTreeMap<SetId, OpsSet>,
    by_ops: BTreeMap<Vec<OpsId>, SetId>,
    next: u32,
}

impl Default for SetTable {
    fn default() -> Self {
        let empty = OpsSet { ops: Vec::new(), trampolines: Vec::new() };
        Self {
            sets: BTreeMap::from([(SetId::EMPTY, empty)]),
            by_ops: BTreeMap::from([(Vec::new(), SetId::EMPTY)]),
            next: 1,
        }
    }
}

impl SetTable {
    pub(crate) fn set(&self, id: SetId) -> &OpsSet {
        &self.sets[&id]
    }

    pub(crate) fn set_mut(&mut self, id: SetId) -> &mut OpsSet {
        self.sets.get_mut(&id).expect("a set that a site is in is known")
    }

    /// The set `from` with `ops` in it, or without it.
    pub(crate) fn changed(&mut self, from: SetId, ops: OpsId, attached: bool) -> SetId {
        let mut members = self.set(from).ops.clone();
        match (members.binary_search(&ops), attached) {
            (Err(at), true) => members.insert(at, ops),
            (Ok(at), false) => drop(members.remove(at)),
            _ => return from,
        }
        if let Some(id) = self.by_ops.get(&members) {
            return *id;
        }
        let id = SetId(self.next);
        self.next += 1;
        self.by_ops.insert(members.clone(), id);
        self.sets.insert(id, OpsSet { ops: members, trampolines: Vec::new() });
        id
    }

    /// The code of all sets.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = AddrRange> {
        self.sets.values().flat_map(|set| set.trampolines.iter().map(|code| code.block))
    }

    /// Forgets every set with `ops` in it, and returns the code that served them. No site is in one of them any more.
    pub(crate) fn forget(&mut self, ops: OpsId) -> Vec<AddrRange> {
        let dead = |set: &OpsSet| set.ops.binary_search(&ops).is_ok();
        self.by_ops.retain(|members, _| members.binary_search(&ops).is_err());
        let blocks =
            self.sets.values().filter(|set| dead(set)).flat_map(|set| set.trampolines.iter().map(|code| code.block));
        let blocks = blocks.collect();
        self.sets.retain(|_, set| !dead(set));
        blocks
    }
}
