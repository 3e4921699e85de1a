//! Hook the functions of the own process while its threads run them: count their calls, measure how long these take, see and change arguments, replace functions.
//!
//! A service is slow, and only in production. Which function is it? Its binary has switches compiled in, which cost a nop each:
//!
//! ```
//! use std::sync::atomic::{AtomicU64, Ordering};
//! use trapline_process::{Filter, Tracer, traceable};
//!
//! traceable! {
//!     /// One of many.
//!     extern "C" fn parse_header(bytes: usize) -> usize {
//!         std::hint::black_box(bytes) + 1
//!     }
//! }
//!
//! static CALLS: AtomicU64 = AtomicU64::new(0);
//!
//! let tracer = Tracer::new()?;
//! let ops = tracer.ops("count").filter(Filter::name("*::parse_*")).register(|_call| {
//!     CALLS.fetch_add(1, Ordering::Relaxed);
//! })?;
//! // Every call of a matching function is counted from here on, in every thread,
//! parse_header(100);
//! ops.disable()?;
//! // and none any more from here on.
//! parse_header(100);
//! assert_eq!(CALLS.load(Ordering::Relaxed), 1);
//! # Ok::<(), trapline_process::Error>(())
//! ```
//!
//! [`Tracer`] is the entry point: it finds the *sites* of the loaded objects ([`discover`]), takes over SIGTRAP, and registers [`Ops`], each a callback with a
//! [`Filter`]. A callback sees a [`Call`]. [`OpsBuilder::replace`] puts a function in another's place, which may call that at its [`body`](SiteInfo::body): this is how to
//! measure durations, too. The examples `count`, `histogram`, `replace` and `arguments` are whole programs.
//!
//! A site is a nop that a compiler left at a function's entry: `-fpatchable-function-entry=5` (GCC, Clang, rustc), `-pg -mfentry -mnop-mcount
//! -mrecord-mcount` (GCC), `XRay` (Clang); for single Rust functions on stable there is [`traceable!`]. C and C++ code of the process is hooked as Rust
//! code is. There are no feature flags.
//!
//! # What callbacks may do
//!
//! A callback runs in the thread that calls the function, before its first instruction, in the middle of anything. It must not wait for what that thread
//! may hold, as the allocator or a lock, and a panic in it aborts. What its machine code may change is saved around it, and no more.
//!
//! # What a process has to be
//!
//! Linux 4.16 or later on x86-64, 64-bit or i386, linked dynamically; `membarrier`, `ptrace` and `/proc` must not be forbidden by a sandbox. Under a debugger
//! no tracer is made. [`Error`] tells what is in the way, and what to do.
//!
//! # Within
//!
//! The engine itself is [`trapline_engine`]; this crate is its [`Host`](trapline_engine::Host) for a Linux process: core synchronisation by
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
pub use tracer::{Builder, SiteInfo, Stats, Tracer, called_from};
pub use trapline_engine::{Addr, AddrRange, CallFrame, EngineError, Filter, Mode, trap::Resume};

/// The README's example, which has to work as it stands.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ReadmeDoctests;
