//! Everything that a trace tells but the events, gathered while it is read.
//!
//! Owns the [`Catalog`], which takes the [`Chunk`]s of a [`Reader`](crate::Reader) and answers what function a site is, what thread a stream, and how long a tick takes.
//! Invariant: it answers something whatever is missing: what has no name gets its number.

use std::collections::BTreeMap;

use crate::{
    Chunk, ClockPoint, End, EventsChunk, Exit, Function, Functions, Load, Losses, Meta, ModuleHead, Process, Stream,
};

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// Where and how the trace was recorded.
    pub meta: Option<Meta>,
    /// By the recorder's numbers.
    pub processes: BTreeMap<u32, Process>,
    /// How processes ended, likewise.
    pub exits: BTreeMap<u32, Exit>,
    /// Threads, by the recorder's numbers for streams.
    pub streams: BTreeMap<u32, Stream>,
    /// Modules, by the recorder's numbers.
    pub modules: BTreeMap<u32, ModuleHead>,
    /// Which module was mapped where.
    pub loads: Vec<Load>,
    /// What is missing.
    pub losses: Losses,
    /// What the recorder counted at the end.
    pub end: Option<End>,
    /// By their first sites.
    functions: BTreeMap<u32, Functions>,
    points: Vec<ClockPoint>,
}

/// A function that a site belongs to.
#[derive(Clone, Copy, Debug)]
pub struct FunctionRef<'a> {
    /// Its site.
    pub site: u32,
    /// Its module.
    pub module: Option<&'a ModuleHead>,
    /// What is known of it.
    pub function: Option<&'a Function>,
}

impl FunctionRef<'_> {
    /// Its name, or what there is instead.
    pub fn name(&self) -> String {
        match self.function {
            Some(function) => function.name.clone(),
            None => format!("site {}", self.site),
        }
    }

    /// Its module's file.
    pub fn module_path(&self) -> &str {
        self.module.map_or("?", |module| module.path.as_str())
    }
}

impl Catalog {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what a chunk tells; gives chunks of events back.
    pub fn take(&mut self, chunk: Chunk) -> Option<EventsChunk> {
        match chunk {
            Chunk::Meta(meta) => self.meta = Some(meta),
            Chunk::Module(module) => {
                self.modules.insert(module.id, module);
            }
            Chunk::Functions(functions) => {
                self.functions.insert(functions.first_site, functions);
            }
            Chunk::Process(process) => {
                self.processes.insert(process.id, process);
            }
            Chunk::Load(load) => self.loads.push(load),
            Chunk::Stream(stream) => {
                self.streams.insert(stream.id, stream);
            }
            Chunk::Losses(losses) => self.losses = losses,
            Chunk::Exit(exit) => {
                self.exits.insert(exit.process, exit);
            }
            Chunk::Calibration(points) => self.calibrate(points),
            Chunk::End(end) => self.end = Some(end),
            Chunk::Unload(_) | Chunk::Unknown { .. } => {}
            Chunk::Events(events) => return Some(events),
        }
        None
    }

    /// The function that a site belongs to.
    pub fn function(&self, site: u32) -> FunctionRef<'_> {
        let block = self.functions.range(..=site).next_back().map(|(_, block)| block);
        let found = block.and_then(|block| {
            let index = usize::try_from(site - block.first_site).ok()?;
            Some((block.module, block.functions.get(index)?))
        });
        let module = found.map_or_else(|| self.module_of(site), |(module, _)| self.modules.get(&module));
        FunctionRef { site, module, function: found.map(|(_, function)| function) }
    }

    /// All functions whose names are there, in the order of their sites.
    pub fn functions(&self) -> impl Iterator<Item = FunctionRef<'_>> {
        self.functions.values().flat_map(move |block| {
            let module = self.modules.get(&block.module);
            (block.first_site..).zip(&block.functions).map(move |(site, function)| FunctionRef {
                site,
                module,
                function: Some(function),
            })
        })
    }

    /// How ticks become nanoseconds.
    pub fn clock(&self) -> Clock {
        let hz = self.meta.as_ref().map_or(0, |meta| meta.tsc_hz);
        match (self.points.iter().min_by_key(|point| point.tsc), self.points.iter().max_by_key(|point| point.tsc)) {
            (Some(first), Some(last)) if last.tsc > first.tsc && last.monotonic_ns > first.monotonic_ns => Clock {
                origin_tsc: first.tsc,
                ns: last.monotonic_ns - first.monotonic_ns,
                ticks: last.tsc - first.tsc,
                is_known: true,
            },
            (first, _) => Clock {
                origin_tsc: first.map_or(0, |point| point.tsc),
                ns: 1_000_000_000,
                ticks: if hz == 0 { 1_000_000_000 } else { hz },
                is_known: hz != 0,
            },
        }
    }

    /// Keeps the points that are furthest apart: memory is not to grow with the trace.
    fn calibrate(&mut self, points: Vec<ClockPoint>) {
        self.points.extend(points);
        let first = self.points.iter().min_by_key(|point| point.tsc).copied();
        let last = self.points.iter().max_by_key(|point| point.tsc).copied();
        self.points = first.into_iter().chain(last).collect();
    }

    fn module_of(&self, site: u32) -> Option<&ModuleHead> {
        self.modules
            .values()
            .find(|module| site.checked_sub(module.first_site).is_some_and(|index| index < module.functions))
    }
}

/// The time-stamp counter's rate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clock {
    /// A moment at the start of the trace.
    pub origin_tsc: u64,
    ns: u64,
    ticks: u64,
    /// The trace tells the rate. Otherwise a tick is taken for a nanosecond.
    pub is_known: bool,
}

impl Clock {
    /// How long so many ticks take, in nanoseconds.
    pub fn ns(&self, ticks: u64) -> u64 {
        let ns = u128::from(ticks) * u128::from(self.ns) / u128::from(self.ticks);
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Nanoseconds from the start of the trace, 0 for what was before.
    pub fn since_start_ns(&self, tsc: u64) -> u64 {
        self.ns(tsc.saturating_sub(self.origin_tsc))
    }
}
