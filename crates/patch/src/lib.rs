//! Live patches: what changed between two objects, the patch file, and the linker that fits it to a running process.
//!
//! [`build()`] compares recompiled objects with the ones that an executable was made of, and gives a [`Patch`]: the functions that changed, what they need, and what
//! was left out and why. A patch is written to a file and read again ([`Patch::encode`], [`Patch::decode`]). [`Linker`] gives the bytes that a process needs to
//! have it. Data flows one way:
//!
//! ```text
//! old.o, new.o --> object --> compare ----> build, bind --> Patch <--> format (fix.tlp)
//!                                              ^              |
//! executable ----> target, found, debug -------+              +------> link --> Linked { segments, replacements, unwind, callbacks }
//! ```
//!
//! Whoever applies a patch stops the process, checks that nobody is in a replaced function, maps the segments and diverts the old functions. Invariants: nothing here
//! knows a process; what cannot be patched is refused with the file, the symbol and the reason; nothing is guessed.

use std::{fmt, io, path::PathBuf};

mod bind;
mod build;
mod compare;
mod debug;
mod debugger;
mod format;
mod found;
mod link;
mod object;
mod operands;
mod pairs;
mod patch;
mod relocation;
mod target;
mod unwind;

pub use build::{Pair, Request, build};
pub use debugger::SymbolFile;
pub use format::FormatError;
pub use link::{Frame, LinkError, Linked, Linker, Protection, Resolver, Segment, ThreadLocal, ThreadPlace};
pub use pairs::pair_up;
pub use patch::{
    Callback, Function, Note, NoteKind, Patch, Pin, Place, Relocation, Role, Section, Symbol, Target, When,
};

/// Why there is no patch.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {what}")]
    Malformed {
        /// The file.
        path: String,
        /// What was found.
        what: String,
    },
    /// An object has another width than the target.
    #[error("{object} is for {} bit, and {target} for {}; compile it for the target's width", object_bits, target_bits)]
    OtherWidth {
        /// The object.
        object: String,
        /// Its width.
        object_bits: u32,
        /// The target.
        target: String,
        /// Its width.
        target_bits: u32,
    },
    /// Something changed that a patch cannot change.
    #[error("this cannot be patched into a running process:{}", listed(.0))]
    Refused(Vec<Refusal>),
    /// Nothing is left to be replaced.
    #[error("there is nothing to patch: {0}")]
    Nothing(String),
    /// A function that should be pinned is not there.
    #[error("{target} has no function {name} to be pinned")]
    NoSuchPin {
        /// As it was given.
        name: String,
        /// The target.
        target: String,
    },
}

/// Something that a patch cannot change, or not with these objects.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Refusal {
    /// The object.
    pub object: String,
    /// The function, variable or section.
    pub symbol: String,
    /// Why.
    pub reason: Reason,
    /// What exactly was found; may be empty.
    pub detail: String,
}

/// Why something cannot be patched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reason {
    /// A variable begins with another value.
    ChangedInitialiser,
    /// A variable has another size or another type.
    ChangedLayout,
    /// A constructor or destructor of the program changed.
    ChangedStart,
    /// A constant that other files can see changed.
    ChangedConstant,
    /// A thread-local variable that the target does not have.
    NewThreadLocal,
    /// Functions share a section.
    SharedSection,
    /// Variables share a section.
    SharedData,
    /// The target has several symbols of this name.
    Ambiguous,
    /// The target has no symbols, and the place could not be found by code.
    NoSymbol,
    /// The type of a relocation is not supported.
    UnsupportedRelocation,
    /// The function is chosen when the program starts.
    IndirectFunction,
    /// The target has copies of the function inlined elsewhere.
    Inlined,
    /// Two of the objects replace the same function.
    ReplacedTwice,
}

impl Reason {
    /// Short and stable, for JSON and lists.
    pub fn code(self) -> &'static str {
        match self {
            Self::ChangedInitialiser => "changed-initialiser",
            Self::ChangedLayout => "changed-layout",
            Self::ChangedStart => "changed-start",
            Self::ChangedConstant => "changed-constant",
            Self::NewThreadLocal => "new-thread-local",
            Self::SharedSection => "shared-section",
            Self::SharedData => "shared-data",
            Self::Ambiguous => "ambiguous",
            Self::NoSymbol => "no-symbol",
            Self::UnsupportedRelocation => "unsupported-relocation",
            Self::IndirectFunction => "indirect-function",
            Self::Inlined => "inlined",
            Self::ReplacedTwice => "replaced-twice",
        }
    }

    /// For people: what it means, and what to do.
    pub fn text(self) -> &'static str {
        match self {
            Self::ChangedInitialiser => {
                "its initial value changed, and the running process has the old one; set it in a trapline_pre_apply callback"
            }
            Self::ChangedLayout => "its size or type changed, and the running process has the old one",
            Self::ChangedStart => "it runs when the program starts or ends, and has run",
            Self::ChangedConstant => "it is a constant that other files can see, and they keep the old one",
            Self::NewThreadLocal => "the running process's threads have no such variable",
            Self::SharedSection => "it shares a section with other functions; compile with -ffunction-sections",
            Self::SharedData => "it shares a section with other variables; compile with -fdata-sections",
            Self::Ambiguous => "the target has several symbols of this name",
            Self::NoSymbol => {
                "the target has no symbols, and its code does not tell where this is; install its debugging symbols, or give all its objects (--old and --new)"
            }
            Self::UnsupportedRelocation => "a relocation of this type is not supported",
            Self::IndirectFunction => "the function is chosen when the program starts",
            Self::Inlined => {
                "the target has copies of it inlined into functions that stay; give the objects with them too, or accept that (--allow-inlined)"
            }
            Self::ReplacedTwice => "two of the objects replace the same function",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.object, self.symbol, self.reason.text())?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, " ({})", self.detail) }
    }
}

fn listed(refusals: &[Refusal]) -> String {
    refusals.iter().fold(String::new(), |text, refusal| format!("{text}\n  {refusal}"))
}
