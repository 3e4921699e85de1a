//! Programs as they are installed behave the same under `trapline record` as without it, and their traces are whole (I1, I3, I4, I7).
//!
//! One test a program. Each runs bare, recorded, and recorded with all libraries.

mod builds;
mod control;
mod server;
mod tools;
