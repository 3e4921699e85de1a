//! What is known of one function.
//!
//! Owns [`Function`] and [`Verdict`], which are the crate's answers, and [`LeftOut`]. Neighbours: discovery makes functions, the ladder gives each its
//! verdict, arming carries plans out. Invariant: plain data; addresses are the file's, without the load bias.

use trapline_engine::{Addr, AddrRange};

use crate::Reason;

/// A function: an address that is called, or jumped to in place of a call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// As in the source, if there is a symbol; `module+0x1234` otherwise.
    pub name: String,
    /// Other symbols at the same address, as they are in the file.
    pub aliases: Vec<String>,
    /// Of its first instruction, before the load bias is added.
    pub address: u64,
    /// In bytes, from the symbol or the unwind information; up to the next function where neither says.
    pub size: u64,
    /// How it can be armed.
    pub verdict: Verdict,
}

impl Function {
    /// Why it cannot be traced: a reason of the table in [`Reason`], and details for people, perhaps empty.
    pub fn untraced(&self) -> Option<(&'static str, String)> {
        match &self.verdict {
            Verdict::Traced(_) => None,
            Verdict::Untraced(reason) => Some((reason.code(), reason.detail())),
        }
    }

    /// How it is armed, if it can be.
    pub fn plan(&self) -> Option<&Plan> {
        match &self.verdict {
            Verdict::Traced(plan) => Some(plan),
            Verdict::Untraced(_) => None,
        }
    }

    /// The first address behind it.
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.size)
    }

    /// Whether its calls can be seen, but not their returns.
    pub fn is_entry_only(&self) -> bool {
        matches!(&self.verdict, Verdict::Traced(plan) if plan.entry_only.is_some())
    }
}

/// Whether a function can be armed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It can, like this.
    Traced(Plan),
    /// It cannot.
    Untraced(Reason),
}

/// How a function is armed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What is put at its entry.
    pub rung: Rung,
    /// Where the instructions that are moved begin: at the function's address, or behind its `endbr` and its call of `__fentry__`.
    pub window_at: u64,
    /// How many bytes of whole instructions are moved.
    pub window_bytes: u8,
    /// Why its returns are not hooked; `None` if they are.
    pub entry_only: Option<Reason>,
    /// Whether arithmetic flags may carry a value into the function.
    pub keep_flags: bool,
    /// How many bytes the function takes off the stack when it returns, beside its return address; `None` if that is not known, as where it leaves by jumps only.
    pub popped_bytes: Option<u16>,
    /// Whether a branch inside the module leads to the window's first instruction: a loop to the function's head, or a tail call. Such a jump
    /// counts as a call.
    pub is_branch_target: bool,
    /// The most bytes that its stub has.
    pub(crate) stub_bytes: u16,
    /// Branches of the function that lead into the moved instructions, and have to follow them: the address of each.
    pub(crate) redirected: Vec<u64>,
}

impl Plan {
    /// Whether branches of the function that lead into the window are changed, to follow what is moved.
    pub fn redirects(&self) -> bool {
        !self.redirected.is_empty()
    }
}

/// What is put at a function's entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rung {
    /// A jump over the nop of 5 bytes or more that the compiler left there.
    Nop,
    /// A jump over the first instruction, which has 5 bytes or more.
    OneInstruction,
    /// A jump over several instructions, perhaps over padding behind the function.
    Window,
    /// A short jump to unused bytes near by, which hold the jump.
    ShortJump {
        /// Where those bytes are.
        pad: u64,
    },
}

/// Something that is no function, though a table of the file says so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeftOut {
    /// What it is called, if it has a symbol.
    pub name: Option<String>,
    /// Where it is.
    pub range: AddrRange,
    /// Why it is none.
    pub why: NoFunction,
}

impl LeftOut {
    /// Its first byte.
    pub fn address(&self) -> Addr {
        self.range.start
    }
}

/// Why something is no function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NoFunction {
    /// Its symbol says that it is a part of a function, placed elsewhere because it is rarely executed.
    PartName,
    /// Its unwind information begins with a frame: it is entered by jumps from the middle of a function.
    FrameAtEntry,
    /// It has no symbol, and nothing but jumps leads there: the rarely executed part of a function.
    OnlyJumpedTo,
    /// A symbol without a size inside another function: a label.
    Label,
    /// A stub that leads to a function of another object.
    Plt,
    /// Where signal handlers return to.
    SignalReturn,
    /// It tells its caller where that is, as compilers' code for i386 has to ask: a call of it that is moved is replaced by what it says.
    PcThunk,
}
