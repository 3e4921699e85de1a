//! Programs behave the same under `trapline record` as without it, and their traces hold every call (I1, I3, I4).
//!
//! One test a program; its text is in the program. Each runs bare, recorded, and recorded with all libraries, compiled with and without optimisation.

mod calls;
mod control;
mod processes;
mod profiles;
mod signals;
mod stacks;
mod surroundings;
mod threads;
mod unwinding;
