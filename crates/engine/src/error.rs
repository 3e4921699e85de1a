//! What can go wrong in the engine, with the addresses and names that a message needs.

use alloc::{boxed::Box, string::String, vec::Vec};
use core::fmt;

use crate::{
    Addr,
    host::{Mismatch, VerifyError},
    insn::OutOfReach,
    ops::OpsId,
    poke::BadPoke,
    site::BadSite,
    trampoline::EmitError,
};

/// Why the engine did not do what it was asked to. Nothing has changed then, but for [`EngineError::Stuck`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EngineError<E> {
    /// An address in a filter is no site.
    NoSuchSite {
        /// The address asked for.
        address: Addr,
        /// The nearest site, and its name.
        nearest: Option<(Addr, Box<str>)>,
    },
    /// A filter selects no site.
    NothingMatches {
        /// The globs asked for.
        globs: Vec<String>,
        /// Names that are near to them.
        near: Vec<String>,
        /// How many sites there are.
        sites: usize,
    },
    /// Another IPMODIFY ops holds a site already.
    IpModifyTaken {
        /// The site.
        site: Addr,
        /// Its name.
        name: Box<str>,
        /// The ops that holds it.
        holder: Box<str>,
    },
    /// No ops of this name is registered (any more).
    UnknownOps(OpsId),
    /// The text is not what it has to be: somebody else writes there, a debugger for instance.
    Text(Mismatch),
    /// A site that cannot be used.
    BadSite(BadSite),
    /// A poke that cannot be made.
    BadPoke(BadPoke),
    /// A trampoline lies beyond the reach of a site.
    OutOfReach(OutOfReach),
    /// A trampoline could not be encoded.
    Emit(EmitError),
    /// The host failed.
    Host(E),
    /// A thread stayed between the instructions of a site, where they are to become one. Nothing was changed.
    Busy,
    /// A batch failed and could not be undone; its int3s stay, and stay emulated. No further poke is possible.
    Stuck,
}

impl<E: fmt::Display> fmt::Display for EngineError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchSite { address, nearest: None } => write!(f, "{address} is no site, and there are none at all"),
            Self::NoSuchSite { address, nearest: Some((site, name)) } => {
                write!(f, "{address} is no site; the nearest is {site} ({name})")
            }
            Self::NothingMatches { globs, near, sites } => {
                write!(f, "the filter matches none of {sites} sites")?;
                if !globs.is_empty() {
                    write!(f, " (asked for: {})", globs.join(", "))?;
                }
                if near.is_empty() { Ok(()) } else { write!(f, "; did you mean {}?", near.join(", ")) }
            }
            Self::IpModifyTaken { site, name, holder } => {
                write!(f, "{name} at {site} is modified by the ops \"{holder}\" already; unregister that one first")
            }
            Self::UnknownOps(id) => write!(f, "{id:?} is not registered"),
            Self::Text(mismatch) => {
                write!(f, "{mismatch}; nothing was written. Does a debugger or another patcher write there?")
            }
            Self::BadSite(error) => error.fmt(f),
            Self::BadPoke(error) => error.fmt(f),
            Self::OutOfReach(error) => error.fmt(f),
            Self::Emit(error) => error.fmt(f),
            Self::Host(error) => error.fmt(f),
            Self::Busy => write!(f, "a thread stays inside a site that has to be rewritten; try again"),
            Self::Stuck => write!(
                f,
                "an earlier poke failed and could not be undone: its sites go through the breakpoint handler, and nothing more can be poked"
            ),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> core::error::Error for EngineError<E> {}

impl<E> From<VerifyError<E>> for EngineError<E> {
    fn from(error: VerifyError<E>) -> Self {
        match error {
            VerifyError::Mismatch(mismatch) => Self::Text(mismatch),
            VerifyError::Host(error) => Self::Host(error),
        }
    }
}

macro_rules! from {
    ($($variant:ident($error:ty);)*) => {
        $(impl<E> From<$error> for EngineError<E> {
            fn from(error: $error) -> Self {
                Self::$variant(error)
            }
        })*
    };
}

from! {
    BadSite(BadSite);
    BadPoke(BadPoke);
    OutOfReach(OutOfReach);
    Emit(EmitError);
}
