//! trapline in the own process: hook the functions of a running Rust, C or C++ program while its threads run them.
//!
//! ```no_run
//! use std::sync::atomic::{AtomicU64, Ordering};
//! use trapline_process::{Filter, Tracer};
//!
//! static CALLS: AtomicU64 = AtomicU64::new(0);
//!
//! let tracer = Tracer::new()?;
//! let ops = tracer.ops("count").filter(Filter::name("parse_*")).register(|_call| {
//!     CALLS.fetch_add(1, Ordering::Relaxed);
//! })?;
//! // Every call of a matching function is counted from here on, in every thread,
//! ops.disable()?;
//! // and none any more from here on.
//! # Ok::<(), trapline_process::Error>(())
//! ```
//!
//! [`Tracer`] is the entry point: it finds the *sites* of the loaded objects ([`discover`]), takes over SIGTRAP, and registers [`Ops`]. A site
//! is a nop that a compiler left at a function's entry: `-fpatchable-function-entry=5` (GCC, Clang, rustc), `-pg -mfentry -mnop-mcount
//! -mrecord-mcount` (GCC), `XRay` (Clang); for single Rust functions on stable there is [`traceable!`]. The engine itself is
//! [`trapline_engine`]; this crate is its [`Host`](trapline_engine::Host) for a Linux process: core synchronisation by
//! membarrier(2), text writes that never make a page writable and executable ([`TextWriter`]), memory within reach of a call, the
//! SIGTRAP handler, and a checked stop of all threads ([`quiesce`]).
//!
//! Invariants: no call is skipped while sites change (I1), other handlers and masks of SIGTRAP keep working (I4), and after the tracer is dropped
//! the original bytes are back (I6).

pub mod discover;
mod error;
mod host;
mod interpose;
mod names;
mod ops;
pub mod quiesce;
mod sigtrap;
mod sys;
mod thread;
mod traceable;
mod tracer;

pub use error::{Error, HostError};
pub use host::TextWriter;
pub use ops::{Call, Ops, OpsBuilder, RawCallback};
pub use sigtrap::{TrapStats, sigtrap_is_ours};
pub use tracer::{Builder, SiteInfo, Stats, Tracer};
pub use trapline_engine::{Addr, AddrRange, CallFrame, Filter, Mode, trap::Resume};

/// The README's example, which has to work as it stands.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ReadmeDoctests;
