//! The engine of trapline: rewriting the functions of running x86 code, 32 and 64 bit, without ever skipping a call.
//!
//! It is `no_std` and knows the machine that it runs on only through [`Host`]: a Linux process, a kernel, a fake. The target's width is a
//! value at run time, [`Mode`]. Data flows one way:
//!
//! ```text
//! SiteSpec --> SiteTable --+
//!                          +--> Engine --> PokeSet, Protocol --> Host (write_text, sync_cores)
//! OpsSpec, Filter ---------+       |                  |
//!                                  |                  +--> TrapState --> decide, resume (int3 handler)
//!                                  +--> trampolines <--------------------- slots
//! ```
//!
//! [`Engine`] is the entry point: it takes sites, registers [`OpsSpec`]s, and pokes the difference. [`poke`] is the protocol by which sites
//! are rewritten while other CPUs run them; [`trap`] is what the breakpoint handler does meanwhile; [`slots`] is how the return address of an
//! emulated call gets past the handler's own stack; [`trampoline`] is the code that leads to callbacks; [`insn`] decodes, encodes and
//! moves instructions.
//!
//! ```
//! use trapline_engine::{Addr, Mode, insn, poke::{Poke, PokeSet, Protocol, Step}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let site = Addr::new(0x40_1000);
//! let call = insn::encode::call(site, Addr::new(0x40_2000), Mode::Bits64)?;
//! let batch = PokeSet::new(vec![Poke::new(Mode::Bits64, site, insn::encode::nop(5), call)?])?;
//! let mut protocol = Protocol::new();
//! loop {
//!     match protocol.next_step() {
//!         Step::Write(part, version) => batch.writes(part, version).for_each(|write| println!("{write:?}")),
//!         Step::Done(outcome) => break println!("{outcome:?}"),
//!         step => println!("{step:?}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod addr;
mod engine;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod filter;
mod frame;
pub mod host;
pub mod insn;
mod mode;
mod ops;
pub mod poke;
mod published;
mod site;
pub mod slots;
pub mod trampoline;
pub mod trap;

pub use addr::{Addr, AddrRange};
pub use engine::{DriveError, Engine, Stats, drive};
pub use error::EngineError;
pub use filter::Filter;
pub use frame::CallFrame;
pub use host::Host;
pub use mode::Mode;
pub use ops::{Callback, OpsFlags, OpsId, OpsSpec};
pub use published::Published;
pub use site::{BadSite, Site, SiteSpec, SiteTable};
pub use slots::ThreadState;
