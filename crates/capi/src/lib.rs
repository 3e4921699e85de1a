//! trapline for C and whatever calls C: hook the functions of the own process while its threads run them.
//!
//! What a C program sees is `include/trapline.h`, which is made from this crate; `docs/library.md` leads from a problem to its first result. The
//! crate adds nothing to [`trapline_process`]: it translates.
//!
//! [`tracer`] is the process's tracer and its sites, [`filter`] chooses functions, [`ops`] attaches callbacks to them, [`call`] is what a callback sees
//! of a call, [`status`] how a function tells what went wrong,
//! `entry` the way in where it matters what is on the stack.
//!
//! Invariants: every pointer that may be null is checked, and the error names it; no panic leaves a function; whatever a function hands out has one
//! function that takes it back; all names begin with `trapline_`.

mod entry;

// In the order in which the header has them.
pub mod status;

pub mod tracer;

pub mod filter;

pub mod ops;

pub mod call;
