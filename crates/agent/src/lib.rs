//! trapline's agent: the code that runs inside a traced process.
//!
//! Owns everything between an armed function's stub and the shared pool of chunks: the entries and the return trampoline ([`arch`]), what they do when a
//! few instructions do not suffice ([`events`], [`counters`] and [`frames`]), what unwinders of the program are told ([`unwind`] and `tables`), and the requests to the recorder
//! ([`requests`]). The layouts are
//! [`trapline_abi`]'s; the recorder maps the pool, fills in the configuration and writes the stubs.
//!
//! It is linked into a shared object that needs no other one, `object.rs` beside this crate's sources says how, and the dynamic linker loads it
//! as a preload. It exports nothing: the recorder finds the symbols of [`trapline_abi::agent::symbol`] in its symbol table.
//!
//! Invariants: nothing here allocates, takes a lock that a signal handler or a forked child could find taken, panics (the object would not link), or
//! touches `errno`; the program runs on whatever becomes of the recorder; every event that is left out is counted.
#![no_std]

pub mod arch;
#[cfg_attr(target_pointer_width = "32", path = "uncounted.rs")]
pub mod counters;
pub mod events;
pub mod frames;
pub mod requests;
mod shadow;
mod sys;
mod tables;
mod thread;
pub mod unwind;
