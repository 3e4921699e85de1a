//! What the checks of whole programs under `trapline record` share.
//!
//! Owns the harness: [`program`] compiles a small program at two optimisation levels, [`run`] runs a command with everything about its surroundings fixed
//! and its time bounded, [`trapline`] finds the command under test, [`trace`] reads what it says of a trace, [`compare`] judges two runs, and
//! [`snapshot`] what can be seen of a process before and after, [`transparency`] puts these together for programs of our own, [`stock`] for those that are installed, and [`web`] asks servers. The checks themselves are the integration tests.
//!
//! Invariant: whatever a check started has ended when it returns, and whatever it wrote lay in a [`scratch::Scratch`] folder that is gone.
#![forbid(unsafe_code)]

pub mod compare;
pub mod debian;
pub mod moments;
pub mod program;
pub mod run;
pub mod scratch;
pub mod snapshot;
pub mod stock;
pub mod terminal;
pub mod trace;
pub mod transparency;
pub mod trapline;
pub mod web;
