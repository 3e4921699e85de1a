//! What depends on the target's architecture: entries and trampolines, system calls, and where a thread's state is.
//!
//! Neighbours: the entries call [`record`](crate::events) and [`prepare`](crate::frames) when their few instructions do not suffice. Invariant: every
//! architecture offers the same names.

#[macro_use]
mod text;

#[cfg(target_arch = "x86")]
mod i386;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86")]
pub use i386::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
