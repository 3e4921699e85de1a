//! The byte layouts that cross a boundary: between the agent in a traced process, the recorder, and the trace file.
//!
//! Owns [`record`] (the 8 bytes that one event takes), [`pool`] (the shared memory that events travel through), [`thread`] (what a traced
//! thread owns) and [`agent`] (what the recorder tells the agent). Nobody here does anything: it is all numbers and offsets, checked at compile
//! time where the compiler can. Invariant: everything is `repr(C)`, little-endian, and the same for a 32-bit agent and a 64-bit recorder.
#![no_std]
#![forbid(unsafe_code)]

pub mod agent;
pub mod counters;
pub mod pool;
pub mod record;
pub mod thread;
