//! Stopping the own process, against real threads: what they notice (nothing), what the check finds, what is refused.
//!
//! Every test runs in a process of its own (`isolated!`), because it stops all threads of the one it is in, and so that a stop that never
//! ends costs one process and not the whole run.

mod child;
mod inside;
mod park;
mod refusals;
mod signals;
mod sleeps;
mod transparency;
