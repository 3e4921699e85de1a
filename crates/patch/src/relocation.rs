//! What the relocation types of both widths mean.
//!
//! Owns the table from `r_type` to [`Meaning`]. Neighbours: `object` takes addends out by it, `compare` and `build` ask what a place refers to, `link` fills
//! places in. Invariant: a type that is not in the table is refused, by all of them. Source: psABI of x86-64, tables 4.9 to 4.11; psABI of i386, table 4.9;
//! Drepper, "ELF Handling For Thread-Local Storage".

use object::elf;
use trapline_engine::Mode;

/// What is stored in a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Value {
    /// Nothing; a mark for linkers.
    Nothing,
    /// S + A.
    Absolute,
    /// S + A - P.
    Relative,
    /// S + A - P, and the place is the operand of a call or a jump: a stub will do as well.
    Call,
    /// S + A - the table of slots.
    FromTable,
    /// The table of slots + A - P.
    TableRelative,
    /// A slot's address + A - P.
    SlotRelative(Slot),
    /// A slot's address + A - the table of slots.
    SlotFromTable(Slot),
    /// A slot's address + A.
    SlotAbsolute(Slot),
    /// Either of the two before: by whether the instruction has a base register (i386, `R_386_GOT32X`).
    SlotByInstruction,
    /// Where a thread-local variable lies, seen from the thread pointer.
    ThreadOffset,
    /// Where a thread-local variable lies in its module's block.
    ModuleOffset,
    /// The size of the symbol + A.
    Size,
}

/// What a slot holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Slot {
    /// An address.
    Address,
    /// A thread-local variable's offset from the thread pointer.
    ThreadOffset,
    /// A thread-local variable's module and its offset there, for `__tls_get_addr`.
    ModuleAndOffset,
    /// A module, and zero.
    Module,
}

/// Which values fit a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fit {
    /// All: it is as wide as the arithmetic.
    All,
    Signed,
    Unsigned,
    /// Either way of reading it.
    Either,
}

/// What a type of relocation means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Meaning {
    pub(crate) value: Value,
    width_bytes: u8,
    pub(crate) fit: Fit,
}

impl Meaning {
    /// How long the place is.
    pub(crate) fn width_bytes(self) -> usize {
        self.width_bytes.into()
    }

    /// Whether the value depends on where the place is: for code the addend then counts from the end of the instruction.
    pub(crate) fn is_relative(self) -> bool {
        matches!(self.value, Value::Relative | Value::Call | Value::TableRelative | Value::SlotRelative(_))
    }

    /// Whether it refers to a variable that each thread has for itself.
    pub(crate) fn is_thread_local(self) -> bool {
        let is_slot = matches!(self.slot(), Some(Slot::ThreadOffset | Slot::ModuleAndOffset | Slot::Module));
        is_slot || matches!(self.value, Value::ThreadOffset | Value::ModuleOffset)
    }

    /// Whether it matters what the symbol is: two types ask for the symbol's module, or for no symbol at all.
    pub(crate) fn needs_symbol(self) -> bool {
        !matches!(self.value, Value::TableRelative | Value::Nothing | Value::Size)
    }

    /// The kind of slot that it needs.
    pub(crate) fn slot(self) -> Option<Slot> {
        match self.value {
            Value::SlotRelative(slot) | Value::SlotFromTable(slot) | Value::SlotAbsolute(slot) => Some(slot),
            Value::SlotByInstruction => Some(Slot::Address),
            _ => None,
        }
    }
}

/// What a type means, if trapline supports it.
pub(crate) fn meaning(mode: Mode, kind: u32) -> Option<Meaning> {
    let (value, width_bytes, fit) = match mode {
        Mode::Bits64 => meaning_64(elf::RelocationType(kind))?,
        Mode::Bits32 => meaning_32(elf::RelocationType(kind))?,
    };
    Some(Meaning { value, width_bytes, fit })
}

/// The name of a type in the psABI.
pub(crate) fn name(mode: Mode, kind: u32) -> String {
    let known = match mode {
        Mode::Bits64 => NAMES_64,
        Mode::Bits32 => NAMES_32,
    };
    let prefix = match mode {
        Mode::Bits64 => "R_X86_64",
        Mode::Bits32 => "R_386",
    };
    match known.iter().find(|(known, _)| known.0 == kind) {
        Some((_, name)) => format!("{prefix}_{name}"),
        None => format!("{prefix} type {kind}"),
    }
}

/// Names of what compilers can be made to emit and trapline does not support. The others have no need of a name.
const NAMES_64: &[(elf::RelocationType, &str)] = &[
    (elf::R_X86_64_COPY, "COPY"),
    (elf::R_X86_64_DTPMOD64, "DTPMOD64"),
    (elf::R_X86_64_GOTPC32_TLSDESC, "GOTPC32_TLSDESC"),
    (elf::R_X86_64_TLSDESC_CALL, "TLSDESC_CALL"),
    (elf::R_X86_64_TLSDESC, "TLSDESC"),
    (elf::R_X86_64_PC32, "PC32"),
    (elf::R_X86_64_32, "32"),
    (elf::R_X86_64_32S, "32S"),
    (elf::R_X86_64_PLT32, "PLT32"),
    (elf::R_X86_64_TPOFF32, "TPOFF32"),
    (elf::R_X86_64_GOTPCRELX, "GOTPCRELX"),
    (elf::R_X86_64_REX_GOTPCRELX, "REX_GOTPCRELX"),
];

const NAMES_32: &[(elf::RelocationType, &str)] = &[
    (elf::R_386_COPY, "COPY"),
    (elf::R_386_TLS_GOTDESC, "TLS_GOTDESC"),
    (elf::R_386_TLS_DESC_CALL, "TLS_DESC_CALL"),
    (elf::R_386_TLS_IE_32, "TLS_IE_32"),
    (elf::R_386_TLS_LE_32, "TLS_LE_32"),
    (elf::R_386_32PLT, "32PLT"),
];

fn meaning_64(kind: elf::RelocationType) -> Option<(Value, u8, Fit)> {
    Some(match kind {
        elf::R_X86_64_NONE => (Value::Nothing, 0, Fit::All),
        elf::R_X86_64_64 => (Value::Absolute, 8, Fit::All),
        elf::R_X86_64_32 => (Value::Absolute, 4, Fit::Unsigned),
        elf::R_X86_64_32S => (Value::Absolute, 4, Fit::Signed),
        elf::R_X86_64_16 => (Value::Absolute, 2, Fit::Either),
        elf::R_X86_64_8 => (Value::Absolute, 1, Fit::Either),
        elf::R_X86_64_PC64 => (Value::Relative, 8, Fit::All),
        elf::R_X86_64_PC32 => (Value::Relative, 4, Fit::Signed),
        elf::R_X86_64_PC16 => (Value::Relative, 2, Fit::Signed),
        elf::R_X86_64_PC8 => (Value::Relative, 1, Fit::Signed),
        elf::R_X86_64_PLT32 => (Value::Call, 4, Fit::Signed),
        elf::R_X86_64_GOTOFF64 | elf::R_X86_64_PLTOFF64 => (Value::FromTable, 8, Fit::All),
        elf::R_X86_64_GOTPC32 => (Value::TableRelative, 4, Fit::Signed),
        elf::R_X86_64_GOTPC64 => (Value::TableRelative, 8, Fit::All),
        elf::R_X86_64_GOT32 => (Value::SlotFromTable(Slot::Address), 4, Fit::Signed),
        elf::R_X86_64_GOT64 => (Value::SlotFromTable(Slot::Address), 8, Fit::All),
        // The last two tell a linker that it may rewrite the instruction; the slot is right in any case.
        elf::R_X86_64_GOTPCREL | elf::R_X86_64_GOTPCRELX | elf::R_X86_64_REX_GOTPCRELX => {
            (Value::SlotRelative(Slot::Address), 4, Fit::Signed)
        }
        elf::R_X86_64_GOTPCREL64 => (Value::SlotRelative(Slot::Address), 8, Fit::All),
        elf::R_X86_64_TLSGD => (Value::SlotRelative(Slot::ModuleAndOffset), 4, Fit::Signed),
        elf::R_X86_64_TLSLD => (Value::SlotRelative(Slot::Module), 4, Fit::Signed),
        elf::R_X86_64_GOTTPOFF => (Value::SlotRelative(Slot::ThreadOffset), 4, Fit::Signed),
        elf::R_X86_64_DTPOFF32 => (Value::ModuleOffset, 4, Fit::Signed),
        elf::R_X86_64_DTPOFF64 => (Value::ModuleOffset, 8, Fit::All),
        elf::R_X86_64_TPOFF32 => (Value::ThreadOffset, 4, Fit::Signed),
        elf::R_X86_64_TPOFF64 => (Value::ThreadOffset, 8, Fit::All),
        elf::R_X86_64_SIZE32 => (Value::Size, 4, Fit::Unsigned),
        elf::R_X86_64_SIZE64 => (Value::Size, 8, Fit::All),
        _ => return None,
    })
}

fn meaning_32(kind: elf::RelocationType) -> Option<(Value, u8, Fit)> {
    Some(match kind {
        elf::R_386_NONE => (Value::Nothing, 0, Fit::All),
        elf::R_386_32 => (Value::Absolute, 4, Fit::All),
        elf::R_386_16 => (Value::Absolute, 2, Fit::Either),
        elf::R_386_8 => (Value::Absolute, 1, Fit::Either),
        elf::R_386_PC32 => (Value::Relative, 4, Fit::All),
        elf::R_386_PC16 => (Value::Relative, 2, Fit::Signed),
        elf::R_386_PC8 => (Value::Relative, 1, Fit::Signed),
        elf::R_386_PLT32 => (Value::Call, 4, Fit::All),
        elf::R_386_GOTOFF => (Value::FromTable, 4, Fit::All),
        elf::R_386_GOTPC => (Value::TableRelative, 4, Fit::All),
        elf::R_386_GOT32 => (Value::SlotFromTable(Slot::Address), 4, Fit::All),
        elf::R_386_GOT32X => (Value::SlotByInstruction, 4, Fit::All),
        elf::R_386_TLS_GD => (Value::SlotFromTable(Slot::ModuleAndOffset), 4, Fit::All),
        elf::R_386_TLS_LDM => (Value::SlotFromTable(Slot::Module), 4, Fit::All),
        elf::R_386_TLS_GOTIE => (Value::SlotFromTable(Slot::ThreadOffset), 4, Fit::All),
        elf::R_386_TLS_IE => (Value::SlotAbsolute(Slot::ThreadOffset), 4, Fit::All),
        elf::R_386_TLS_LDO_32 => (Value::ModuleOffset, 4, Fit::All),
        elf::R_386_TLS_LE => (Value::ThreadOffset, 4, Fit::All),
        elf::R_386_SIZE32 => (Value::Size, 4, Fit::All),
        _ => return None,
    })
}
