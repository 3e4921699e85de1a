//! What the tests of a tracer in its own process share.
//!
//! [`child`] runs a test in a process of its own, for a bounded time. In there [`fixture`] compiles and loads C code with sites, [`calls`] makes
//! threads that judge every single call, [`signals`] asks the kernel what libc's view of it hides, and [`maps`] watches what is mapped.
#![allow(dead_code, reason = "each test program uses a part of this")]

pub(crate) mod calls;
pub(crate) mod child;
pub(crate) mod fixture;
pub(crate) mod maps;
pub(crate) mod signals;
#[path = "../discover/support.rs"]
pub(crate) mod support;
