//! A live patch as plain data: everything that is needed to put new functions into a process, and to tell people what it does.
//!
//! Owns [`Patch`] and its parts. Neighbours: `build` makes it from objects, `format` writes and reads it, [`Linker`](crate::Linker) fits it to a process. Invariants
//! of every `Patch` from this crate: indices lie inside of their tables, relocations inside of their sections, and all their types are supported.
//! Addresses are the target file's.

use trapline_engine::Mode;

/// A live patch for one executable or library.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Patch {
    /// What it is called; `list` and `revert` go by it.
    pub name: String,
    /// What it patches.
    pub target: Target,
    /// What it replaces, by ascending address.
    pub functions: Vec<Function>,
    /// Nobody may be in these either when it is applied or reverted.
    pub pins: Vec<Pin>,
    /// What it calls in the target when it is applied or reverted.
    pub callbacks: Vec<Callback>,
    /// New code and data.
    pub sections: Vec<Section>,
    /// What the new code refers to.
    pub symbols: Vec<Symbol>,
    /// What is not in it, and why; what to know about what is.
    pub notes: Vec<Note>,
}

impl Patch {
    /// All new functions, each with its name and the index of its section: those that replace others, and those that came along.
    pub fn bodies(&self) -> impl Iterator<Item = (String, usize)> {
        let code = self.sections.iter().enumerate().filter(|(_, section)| section.role == Role::Code);
        code.map(|(index, section)| {
            let begins_it = |symbol: &&Symbol| match symbol.place {
                Place::Own { section, offset: 0 } => section as usize == index,
                _ => false,
            };
            let mut names = self.symbols.iter().filter(begins_it).map(|symbol| symbol.name.as_str());
            // A section's own symbol has its name, or none.
            let known = names.find(|name| !name.is_empty() && !name.starts_with('.'));
            let of_section = || match section.name.strip_prefix(".text.") {
                Some(name) => name.strip_prefix("unlikely.").map_or(name.to_owned(), |name| format!("{name}.cold")),
                None => section.name.clone(),
            };
            (known.map_or_else(of_section, str::to_owned), index)
        })
    }
}

/// The file that is patched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// The file's name, without its directory.
    pub name: String,
    /// The width of its code.
    pub mode: Mode,
    /// The descriptor of its `NT_GNU_BUILD_ID` note.
    pub build_id: Vec<u8>,
}

/// A function that is replaced.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// As its symbol has it.
    pub name: String,
    /// The source or object that the new body comes from.
    pub object: String,
    /// Of the old body.
    pub address: u64,
    /// The old body, as the file has it. Its length is the function's.
    pub expected: Vec<u8>,
    /// Other pieces of the old body (`.cold`): address and length in bytes.
    pub parts: Vec<(u64, u64)>,
    /// The new body: a symbol in a section of this patch.
    pub symbol: u32,
}

/// A function that nobody may be in although it stays.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pin {
    /// As its symbol has it.
    pub name: String,
    /// Of its first byte.
    pub address: u64,
    /// Its length.
    pub len_bytes: u64,
}

/// When a callback is called.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum When {
    /// Before anything is replaced. An answer other than 0 vetoes.
    PreApply,
    /// When the new functions are in effect.
    PostApply,
    /// Before the old functions come back. An answer other than 0 vetoes.
    PreRevert,
    /// When the old functions are in effect again.
    PostRevert,
}

impl When {
    /// All of them, in the order of a patch's life.
    pub const ALL: [Self; 4] = [Self::PreApply, Self::PostApply, Self::PreRevert, Self::PostRevert];

    /// As it stands in lists; `trapline_` before it makes the name of the function in the object.
    pub fn code(self) -> &'static str {
        match self {
            Self::PreApply => "pre_apply",
            Self::PostApply => "post_apply",
            Self::PreRevert => "pre_revert",
            Self::PostRevert => "post_revert",
        }
    }
}

/// A function of the patch that is called when it is applied or reverted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Callback {
    /// When.
    pub when: When,
    /// A symbol in a section of this patch.
    pub symbol: u32,
}

/// What a section of the patch is for, and with it how its pages may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Executed.
    Code,
    /// Only read.
    ReadOnly,
    /// Unwind tables (`.eh_frame`): only read, and to be registered.
    Unwind,
    /// Written to.
    Data,
    /// Written to, and zero at first: it has a length and no bytes.
    Zero,
}

/// New code or data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Section {
    /// As the object has it.
    pub name: String,
    /// The object it comes from.
    pub object: String,
    /// What it is for.
    pub role: Role,
    /// A power of two.
    pub align: u64,
    /// Its bytes, with zeroes where relocations are.
    pub data: Vec<u8>,
    /// Its length: of `data`, or of the zeroes.
    pub len_bytes: u64,
    /// Places to fill in, by ascending offset.
    pub relocations: Vec<Relocation>,
}

/// A place to be filled in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Relocation {
    /// In the section.
    pub offset: u64,
    /// `r_type` of the target's psABI.
    pub kind: u32,
    /// Index of a symbol.
    pub symbol: u32,
    /// What is added.
    pub addend: i64,
}

/// What relocations refer to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Symbol {
    /// For people, and for what is looked up by name.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// Its length, for what asks for it.
    pub len_bytes: u64,
}

/// Where a symbol is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// In a section of this patch.
    Own {
        /// Index of the section.
        section: u32,
        /// In it. One behind its last byte is allowed.
        offset: u64,
    },
    /// In the target.
    Target {
        /// As the file counts.
        address: u64,
    },
    /// A thread-local variable of the target.
    TargetThreadLocal {
        /// In the target's block.
        offset: u64,
    },
    /// In another library, where the target would find it.
    Import {
        /// The version that the target asks for.
        version: Option<String>,
        /// Whether its absence is an answer: address 0.
        is_weak: bool,
        /// Whether it is a variable of each thread.
        is_thread_local: bool,
    },
    /// The table of slots (`_GLOBAL_OFFSET_TABLE_`).
    Table,
    /// A number.
    Absolute {
        /// The number.
        value: u64,
    },
}

/// What to know about a patch: what was left out of it, and why.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Note {
    /// Why.
    pub kind: NoteKind,
    /// The function or variable.
    pub symbol: String,
    /// The object.
    pub object: String,
    /// For people; may be empty.
    pub detail: String,
}

/// Why something is not in a patch, or what to know about it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum NoteKind {
    /// Left out: the new function is the old one.
    Unchanged,
    /// Left out: the target has no such function, and no replaced function refers to it.
    NotInTarget,
    /// Left out: it runs before `main`, and has run.
    StartUp,
    /// In it: a function that the target does not have.
    New,
    /// In it: a variable that the target does not have.
    NewData,
    /// In it: a changed constant, with all functions that use it.
    ChangedConstant,
    /// In it: the target's code is not what the old object holds, so that the compiler or its flags were others.
    OtherBuild,
    /// In it, but the target has copies of it inlined elsewhere, which stay.
    Inlined,
    /// In it, although the types of its parameters or of its result changed: callers elsewhere keep calling it the old way.
    ChangedSignature,
    /// In it: it refers to types whose layout changed, and that existing data points to.
    ChangedPointee,
    /// In it: it calls what the target does not import yet.
    NewImport,
    /// In it: it was found by its code, as the target has no symbol for it.
    FoundByCode,
}

impl NoteKind {
    /// All of them; a file's numbers are the places here.
    pub const ALL: [Self; 12] = [
        Self::Unchanged,
        Self::NotInTarget,
        Self::StartUp,
        Self::New,
        Self::NewData,
        Self::ChangedConstant,
        Self::OtherBuild,
        Self::Inlined,
        Self::ChangedSignature,
        Self::ChangedPointee,
        Self::NewImport,
        Self::FoundByCode,
    ];

    /// Short and stable, for JSON and lists.
    pub fn code(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::NotInTarget => "not-in-target",
            Self::StartUp => "start-up",
            Self::New => "new-function",
            Self::NewData => "new-data",
            Self::ChangedConstant => "changed-constant",
            Self::OtherBuild => "other-build",
            Self::Inlined => "inlined",
            Self::ChangedSignature => "changed-signature",
            Self::ChangedPointee => "changed-pointee",
            Self::NewImport => "new-import",
            Self::FoundByCode => "found-by-code",
        }
    }

    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Unchanged => "it is what it was",
            Self::NotInTarget => "the target has no function of its own for it",
            Self::StartUp => "it runs before main, and has run",
            Self::New => "a new function",
            Self::NewData => "a new variable",
            Self::ChangedConstant => "a changed constant, with all functions that use it",
            Self::OtherBuild => {
                "the target holds other code than the old object; was it compiled with the same compiler and flags?"
            }
            Self::Inlined => "the target has copies of it inlined into functions that stay",
            Self::ChangedSignature => {
                "its parameters or its result changed, and callers elsewhere keep calling it the old way"
            }
            Self::ChangedPointee => "types changed that existing data points to",
            Self::NewImport => "the target does not import it yet; applying fails if no loaded library has it",
            Self::FoundByCode => "found by its code, as the target has no symbol for it",
        }
    }

    /// Whether the symbol was left out of the patch.
    pub fn is_left_out(self) -> bool {
        matches!(self, Self::Unchanged | Self::NotInTarget | Self::StartUp)
    }
}
