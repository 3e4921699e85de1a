//! What can go wrong in a process, each with what to do next.

use std::{io, time::Duration};

use trapline_engine::{AddrRange, EngineError};

use crate::{discover::DiscoverError, quiesce::QuiesceError};

/// What the process host cannot do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// membarrier(2) cannot synchronise the cores.
    #[error(
        "this kernel cannot synchronise cores: membarrier SYNC_CORE failed ({source}); trapline needs Linux 4.16 or later with \
         CONFIG_MEMBARRIER, and a seccomp filter that lets membarrier pass"
    )]
    NoSyncCore {
        /// The kernel's answer.
        source: io::Error,
    },
    /// Text could not be written.
    #[error("cannot write {len_bytes} bytes of text at {at} through {writer}: {source}")]
    WriteText {
        /// Where.
        at: trapline_engine::Addr,
        /// How much.
        len_bytes: usize,
        /// By which means.
        writer: crate::TextWriter,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Text could not be read.
    #[error("cannot read text at {at}: {source}; was the object unloaded?")]
    ReadText {
        /// Where.
        at: trapline_engine::Addr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No memory is free where a call can reach it.
    #[error("no {len_bytes} bytes of address space are free within 2 GiB of {:#x}..{:#x}, where trampolines have to be", near.start, near.end)]
    NoMemoryWithinReach {
        /// The sites.
        near: AddrRange,
        /// How much is needed.
        len_bytes: usize,
    },
    /// Memory for trampolines could not be mapped.
    #[error("cannot map memory for trampolines: {0}")]
    Map(#[source] io::Error),
    /// Threads could not be checked.
    #[error("cannot check where the threads are: {0}")]
    Quiesce(#[from] QuiesceError),
    /// The SIGTRAP handler could not be installed.
    #[error("cannot install the SIGTRAP handler: {0}")]
    Sigaction(#[source] io::Error),
}

/// What can go wrong with a [`Tracer`](crate::Tracer).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is a tracer already.
    #[error("this process has a tracer already; clone that one, or drop it first")]
    AlreadyRunning,
    /// The resume strategy does not work at this width.
    #[error("{0}")]
    Resume(&'static str),
    /// No function can be traced.
    #[error(
        "none of {objects} loaded objects has a site; compile with -fpatchable-function-entry=5, or use the traceable! macro for Rust \
         functions ({skipped} entries were listed but cannot be used)"
    )]
    NoSites {
        /// How many objects were searched.
        objects: usize,
        /// How many entries were skipped.
        skipped: usize,
    },
    /// The loaded objects could not be searched.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    /// The engine refused, or its host failed.
    #[error(transparent)]
    Engine(#[from] EngineError<HostError>),
    /// The host failed outside of the engine.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Threads stayed inside unregistered ops.
    #[error(
        "after {waited:?} threads may still be inside {pending} unregistered ops; their memory is kept, try again later"
    )]
    StillInside {
        /// How long was waited.
        waited: Duration,
        /// How many ops are pending.
        pending: usize,
    },
}
