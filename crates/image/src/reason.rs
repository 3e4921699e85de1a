//! Why functions are not traced, or not whole.
//!
//! Owns [`Reason`], whose codes are stable: they stand in traces and in the output of commands.
//!
//! | code | meaning |
//! |---|---|
//! | `no-code` | its bytes are not in the file |
//! | `too-short` | there is no room for a jump, nor unused bytes near by |
//! | `jump-into-window` | something jumps between the instructions that would be moved |
//! | `jump-table` | the same, and it is an entry of a jump table, an exception's landing place, or an address that is stored somewhere |
//! | `not-relocatable` | an instruction cannot be moved |
//! | `text-relocation` | the dynamic linker changes the bytes |
//! | `unusual-frame` | it is not entered by a call: its return address is elsewhere |
//! | `out-of-reach` | the stubs are too far away |
//! | `patched` | a live patch has put its jump where ours would be only in part |
//! | `reads-return-address` | entry only: it looks at its own return address |
//! | `no-return-address` | entry only: nobody calls it, it has nowhere to return to |
//! | `returns-twice` | entry only: it returns more often than it is called |
//! | `go-stack` | entry only: Go moves its stacks |
//!
//! Neighbours: the ladder gives reasons, reports show them. Invariant: codes do not change.

use trapline_engine::insn::{RelocateError, RelocateReason};

/// See the module's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Reason {
    /// Its bytes are not in the file.
    NoCode,
    /// There is no room for a jump, nor unused bytes near by.
    TooShort,
    /// A direct branch leads between the instructions that would be moved.
    JumpIntoWindow {
        /// Where to.
        target: u64,
    },
    /// The same, but the address is in a table or is computed.
    JumpTable {
        /// The address that is in the way.
        target: u64,
    },
    /// An instruction cannot be moved.
    NotRelocatable(RelocateError),
    /// The dynamic linker changes the bytes.
    TextRelocation,
    /// It is not entered by a call.
    UnusualFrame,
    /// The stubs are too far away.
    OutOfReach,
    /// A live patch's jump is in the way.
    Patched,
    /// Entry only: it looks at its own return address.
    ReadsReturnAddress,
    /// Entry only: it has nowhere to return to.
    NoReturnAddress,
    /// Entry only: it returns more often than it is called.
    ReturnsTwice,
    /// Entry only: Go moves its stacks.
    GoStack,
}

impl Reason {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCode => "no-code",
            Self::TooShort => "too-short",
            Self::JumpIntoWindow { .. } => "jump-into-window",
            Self::JumpTable { .. } => "jump-table",
            Self::NotRelocatable(_) => "not-relocatable",
            Self::TextRelocation => "text-relocation",
            Self::UnusualFrame => "unusual-frame",
            Self::OutOfReach => "out-of-reach",
            Self::Patched => "patched",
            Self::ReadsReturnAddress => "reads-return-address",
            Self::NoReturnAddress => "no-return-address",
            Self::ReturnsTwice => "returns-twice",
            Self::GoStack => "go-stack",
        }
    }

    /// More, for people; empty if there is nothing more to say.
    pub fn detail(&self) -> String {
        match self {
            Self::JumpIntoWindow { target } | Self::JumpTable { target } => format!("to {target:#x}"),
            Self::NotRelocatable(RelocateError { reason: RelocateReason::EndsTooSoon, .. }) => String::new(),
            Self::NotRelocatable(error) => error.to_string(),
            _ => String::new(),
        }
    }
}
