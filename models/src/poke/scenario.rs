//! What an exploration of the poke protocol is about: the sites, the batches, the machine, and the mutation, if any.
//!
//! Owns [`Scenario`] and the small types that it is made of. [`PokeModel::new`](super::PokeModel::new) turns one into a model;
//! [`suite`](crate::suite) lists those that are run. Invariant: a scenario is a value without behaviour; what it means is in the model.

use std::fmt;

use trapline_engine::{
    Mode,
    poke::{Part, Version},
    trap::Resume,
};

/// How many CPUs there are.
pub const CPUS: usize = 2;
/// How many contexts can be nested on a CPU: normal, and two that interrupt.
pub const CONTEXTS: usize = 3;

/// What stands at a site.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Content {
    /// One nop of five bytes.
    Nop,
    /// Five nops of one byte, as GCC leaves them: a CPU may stand between two.
    Nops,
    /// A call of trampoline A.
    CallA,
    /// A call of trampoline B.
    CallB,
}

impl Content {
    pub(super) const ALL: [Self; 4] = [Self::Nop, Self::Nops, Self::CallA, Self::CallB];

    /// Which of the trampolines it leads to.
    pub(super) fn trampoline(self) -> Option<usize> {
        match self {
            Self::Nop | Self::Nops => None,
            Self::CallA => Some(0),
            Self::CallB => Some(1),
        }
    }

    /// The ops that see a call through it, as a bit set.
    pub(super) fn ops(self) -> u8 {
        self.trampoline().map_or(0, ops_of)
    }
}

/// The ops behind a trampoline. Ops X (bit 0) is behind both, so that it is attached before and after an update from A to B; ops Y (bit 1)
/// is behind B only.
pub(super) fn ops_of(trampoline: usize) -> u8 {
    [0b01, 0b11][trampoline]
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nop => "nop",
            Self::Nops => "5 nops",
            Self::CallA => "call A",
            Self::CallB => "call B",
        })
    }
}

/// Where the engine runs: whether barriers wait for trap handlers, and what these know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Machine {
    /// A Linux process. A thread that hit an int3 may be descheduled before its handler looks, for as long as it takes; barriers do not wait for
    /// it. So the handler knows all sites, and executes a site again whose int3 is gone.
    Process,
    /// A kernel that does as Linux does. The handler runs with interrupts off, so that a barrier's interrupt waits until it has returned, and no
    /// handler is ever late. It knows no sites: a breakpoint without a batch is somebody else's.
    Kernel,
}

/// One change to the protocol or to what surrounds it, each of which breaks an invariant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// The barrier behind this write is left out.
    NoBarrierAfter(Part, Version),
    /// First bytes are written where the others should be, and the other way round.
    HeadsBeforeTails,
    /// The batch is hidden from the handler before the last barrier instead of behind it.
    RetireBeforeLastBarrier,
    /// The batch is shown to the handler behind the int3s instead of before them.
    PublishAfterInt3,
    /// The trampolines that the batch leads to are written behind the int3s instead of before the batch.
    TrampolinesAfterInt3,
    /// Trampolines are freed without a grace period.
    NoGracePeriod,
    /// The grace period looks for CPUs in the trampolines, and not for trap handlers that are about to go there.
    GraceOverlooksHandlers,
    /// A batch that replaces several instructions, or is undone to several, does not wait for those who stand between them.
    NoGraceBetweenInstructions,
    /// The handler of a process does not know the sites.
    SitesUnknown,
    /// The return from a trap does not serialise. No mutant of ours but of the machine: the model depends on it.
    TrapsDoNotSerialise,
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoBarrierAfter(Part::Int3, Version::New) => "no barrier behind the int3s",
            Self::NoBarrierAfter(Part::Tail, Version::New) => "no barrier behind the new bytes after the first",
            Self::NoBarrierAfter(Part::Head, Version::New) => "no barrier behind the new first bytes",
            Self::NoBarrierAfter(Part::Int3, Version::Old) => "undoing: no barrier behind the int3s",
            Self::NoBarrierAfter(Part::Tail, Version::Old) => {
                "undoing: no barrier behind the old bytes after the first"
            }
            Self::NoBarrierAfter(Part::Head, Version::Old) => "undoing: no barrier behind the old first bytes",
            Self::HeadsBeforeTails => "first bytes written before the others",
            Self::RetireBeforeLastBarrier => "batch retired before the last barrier",
            Self::PublishAfterInt3 => "batch published behind the int3s",
            Self::TrampolinesAfterInt3 => "trampolines written behind the int3s",
            Self::NoGracePeriod => "trampolines freed without a grace period",
            Self::GraceOverlooksHandlers => "grace period overlooks trap handlers",
            Self::NoGraceBetweenInstructions => "several instructions replaced without a grace period",
            Self::SitesUnknown => "a process whose handler does not know its sites",
            Self::TrapsDoNotSerialise => "a machine whose return from a trap does not serialise",
        })
    }
}

/// A setting to explore.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The target's width.
    pub mode: Mode,
    /// Where the engine runs.
    pub machine: Machine,
    /// Whether the trampolines are so far away that the calls differ in all four bytes of the displacement, not only in two.
    pub far: bool,
    /// How many contexts nest on each CPU, at most [`CONTEXTS`].
    pub contexts: [usize; CPUS],
    /// What stands at the sites in the beginning: one or two of them.
    pub sites: Vec<Content>,
    /// The batches that are poked, one after the other: which site becomes what.
    pub batches: Vec<Vec<(usize, Content)>>,
    /// How many steps of the protocol may fail, at any place.
    pub failures: u8,
    /// How emulated calls are resumed.
    pub resume: Resume,
    /// What is broken.
    pub mutant: Option<Mutant>,
}

impl Scenario {
    /// One batch at one site, on two CPUs that nothing interrupts.
    pub fn one_site(machine: Machine, old: Content, new: Content) -> Self {
        Self {
            mode: Mode::Bits64,
            machine,
            far: false,
            contexts: [1, 1],
            sites: vec![old],
            batches: vec![vec![(0, new)]],
            failures: 0,
            resume: Resume::Slots,
            mutant: None,
        }
    }

    /// The same with one more batch, at one site.
    #[must_use]
    pub fn then(mut self, site: usize, new: Content) -> Self {
        self.batches.push(vec![(site, new)]);
        self
    }

    /// The same with a second site in the first batch.
    #[must_use]
    pub fn second_site(mut self, old: Content, new: Content) -> Self {
        self.sites.push(old);
        self.batches[0].push((1, new));
        self
    }

    /// The same with this many nested contexts on each CPU.
    #[must_use]
    pub fn contexts(mut self, contexts: [usize; CPUS]) -> Self {
        self.contexts = contexts;
        self
    }

    /// The same with distant trampolines.
    #[must_use]
    pub fn far(mut self) -> Self {
        self.far = true;
        self
    }

    /// The same with this many failures.
    #[must_use]
    pub fn failures(mut self, failures: u8) -> Self {
        self.failures = failures;
        self
    }

    /// The same in a 32-bit target.
    #[must_use]
    pub fn bits32(mut self) -> Self {
        self.mode = Mode::Bits32;
        self
    }

    /// The same, broken.
    #[must_use]
    pub fn mutant(mut self, mutant: Mutant) -> Self {
        self.mutant = Some(mutant);
        self
    }

    /// The same with another way to resume emulated calls.
    #[must_use]
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = resume;
        self
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = match self.machine {
            Machine::Process => "process",
            Machine::Kernel => "kernel",
        };
        write!(f, "{machine} {}:", self.mode.bitness())?;
        for (site, first) in self.sites.iter().enumerate() {
            write!(f, "{} {first}", if site == 0 { "" } else { "," })?;
            for (_, new) in self.batches.iter().flatten().filter(|(changed, _)| *changed == site) {
                write!(f, " -> {new}")?;
            }
        }
        if self.far {
            write!(f, ", 4 bytes differ")?;
        }
        if self.failures > 0 {
            write!(f, ", {} failure{}", self.failures, if self.failures == 1 { "" } else { "s" })?;
        }
        write!(f, "; contexts on the CPUs {}+{}", self.contexts[0], self.contexts[1])
    }
}
