//! The linker: fits a patch to a process.
//!
//! Owns [`Linker`], which lays a patch out, and then, given an address and a [`Resolver`], gives the bytes to be mapped there. Neighbours: a patch from `format` or
//! `build` comes in; whoever applies it allocates the memory, answers for the process's symbols, and maps what comes out. Invariants: pure; code, constants and
//! data never share a page (I8); each place is filled in exactly or the link fails with the symbol's name; the same input gives the same bytes.
//!
//! What the new code refers to by name may be out of a jump's reach. So what is called has a stub of its own beside the new code, and what is looked up has
//! a slot, as in a program's PLT and GOT. Both are laid out before anything is known about the process.

use std::collections::BTreeMap;

use trapline_engine::{Addr, AddrRange, Mode};

use crate::{
    patch::{Patch, Place, Relocation, Role, Section, When},
    relocation::{self, Fit, Meaning, Slot, Value},
    unwind,
};

/// Parts of different protection begin on pages of their own.
const PAGE_BYTES: u64 = 4096;

/// What a stub takes, whatever is in it.
const STUB_BYTES: u64 = 16;

/// `jmp *slot(%rip)`: what is called may be out of a jump's reach.
const FAR: [u8; 6] = [0xff, 0x25, 0, 0, 0, 0];

/// Asks an indirect function of another library what it chooses, at each call, and goes there: `push %eax; push %ecx; push %edx; call chooser; pop %edx; pop %ecx; xchg %eax,(%esp); ret`. All
/// registers are as they were, as some have arguments (`regparm`), and the stack is aligned at the call (i386 psABI, "The Stack Frame").
const CHOOSES: [u8; 14] = [0x50, 0x51, 0x52, 0xe8, 0, 0, 0, 0, 0x5a, 0x59, 0x87, 0x04, 0x24, 0xc3];

/// Where the displacement is in one of these.
const FAR_AT: usize = 2;
const CHOOSES_AT: usize = 4;

/// What a process says about its symbols.
pub trait Resolver {
    /// What is added to the target file's addresses.
    fn bias(&self) -> u64;

    /// Where a symbol of another library is, as the target would find it. Indirect functions are asked what they choose.
    fn import(&self, name: &str, version: Option<&str>) -> Option<Addr>;

    /// The indirect function behind a symbol of another library, where nobody knows what it chooses.
    fn chooser(&self, name: &str, version: Option<&str>) -> Option<Addr> {
        let _ = (name, version);
        None
    }

    /// Where a thread-local variable is.
    fn thread_local(&self, variable: ThreadLocal<'_>) -> Option<ThreadPlace>;
}

/// A variable that each thread has for itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ThreadLocal<'a> {
    /// The target's, at an offset in its block.
    Target {
        /// In the block.
        offset: u64,
    },
    /// Another library's.
    Import {
        /// Its name.
        name: &'a str,
        /// The version that the target asks for.
        version: Option<&'a str>,
    },
}

/// Where a thread-local variable is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ThreadPlace {
    /// The module, as `__tls_get_addr` takes it; 0 if that is not known.
    pub module: u64,
    /// In the module's block.
    pub offset: u64,
    /// Seen from the thread pointer, if that is the same in all threads; negative.
    pub from_thread_pointer: Option<i64>,
}

/// How pages may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protection {
    /// Read and execute.
    Code,
    /// Read.
    ReadOnly,
    /// Read and write.
    Data,
}

/// A patch that was fitted to a process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Linked {
    /// What to map, by ascending address, whole pages.
    pub segments: Vec<Segment>,
    /// Which function is replaced by which: the old address and the new one, as in [`Patch::functions`].
    pub replacements: Vec<(Addr, Addr)>,
    /// Where all new code is.
    pub code: AddrRange,
    /// Where each new function is, as in [`Patch::bodies`].
    pub bodies: Vec<AddrRange>,
    /// The unwind tables of the new code, ended by a zero word, as `__register_frame` takes them.
    pub unwind: Option<AddrRange>,
    /// What those tables describe.
    pub frames: Vec<Frame>,
    /// What to call, and when.
    pub callbacks: Vec<(When, Addr)>,
}

/// A function of the new code, and how to unwind it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The function.
    pub code: AddrRange,
    /// Its record (FDE) in the unwind tables.
    pub record: Addr,
}

/// Pages of one protection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Of the first byte: a page's beginning.
    pub at: Addr,
    /// Whole pages.
    pub bytes: Vec<u8>,
    /// How they may be used.
    pub protection: Protection,
}

/// Why a patch does not fit a process.
#[derive(Clone, PartialEq, Eq, thiserror::Error, Debug)]
pub enum LinkError {
    /// The memory is not at the beginning of a page.
    #[error("a patch cannot be placed at {0}: that is not the beginning of a page")]
    NotAligned(Addr),
    /// A symbol is nowhere.
    #[error(
        "{object}: {symbol} is in no library that the process has loaded; build the patch from what the process runs, or load the library first"
    )]
    Unresolved {
        /// The object that refers to it.
        object: String,
        /// The symbol.
        symbol: String,
    },
    /// The type of a relocation is not supported.
    #[error("{object}: section {section}: relocation {kind} against {symbol} is not supported")]
    Unsupported {
        /// The object.
        object: String,
        /// The section.
        section: String,
        /// The type's name.
        kind: String,
        /// The symbol.
        symbol: String,
    },
    /// A value does not fit its place.
    #[error(
        "{object}: section {section}: {symbol} is out of the reach of {kind}; place the patch closer to the target, or compile with -fPIC"
    )]
    OutOfReach {
        /// The object.
        object: String,
        /// The section.
        section: String,
        /// The type's name.
        kind: String,
        /// The symbol.
        symbol: String,
    },
    /// A thread-local variable is to be asked for by the number of its module.
    #[error(
        "{object}: {symbol} is asked for by a number that the target does not use itself; compile with -ftls-model=initial-exec"
    )]
    UnknownModule {
        /// The object.
        object: String,
        /// The symbol.
        symbol: String,
    },
    /// A thread-local variable has no fixed distance from the thread pointer, and the code counts on one.
    #[error(
        "{object}: {symbol} lies in memory that each thread allocates when it first needs it; compile with -ftls-model=global-dynamic"
    )]
    DynamicThreadLocal {
        /// The object.
        object: String,
        /// The symbol.
        symbol: String,
    },
}

/// A patch, laid out.
#[derive(Clone, Debug)]
pub struct Linker<'a> {
    patch: &'a Patch,
    /// Of each section.
    offsets: Vec<u64>,
    /// By what they hold, and of which symbol.
    slots: BTreeMap<(Slot, u32), u64>,
    /// By the symbol.
    stubs: BTreeMap<u32, u64>,
    code: (u64, u64),
    unwind: (u64, u64),
    table: u64,
    read_only_end: u64,
    end: u64,
}

impl<'a> Linker<'a> {
    /// Lays a patch out.
    pub fn new(patch: &'a Patch) -> Self {
        let mut linker = Self {
            patch,
            offsets: vec![0; patch.sections.len()],
            slots: BTreeMap::new(),
            stubs: BTreeMap::new(),
            code: (0, 0),
            unwind: (0, 0),
            table: 0,
            read_only_end: 0,
            end: 0,
        };
        let mode = patch.target.mode;
        let word = u64::from(mode.word_bytes());
        let relocations =
            patch.sections.iter().flat_map(|section| section.relocations.iter().map(move |one| (section.role, one)));
        for (role, relocation) in relocations {
            let Some(meaning) = relocation::meaning(mode, relocation.kind) else { continue };
            if let Some(slot) = meaning.slot() {
                linker.slots.insert((slot, relocation.symbol), 0);
            }
            let is_own = matches!(patch.symbols[relocation.symbol as usize].place, Place::Own { .. });
            // What unwind tables name of another library is a function, which code that is not position-independent expects in reach of 32 bits.
            let is_called = meaning.value == Value::Call || meaning.value == Value::Absolute && role == Role::Unwind;
            let is_import =
                matches!(patch.symbols[relocation.symbol as usize].place, Place::Import { is_thread_local: false, .. });
            match mode {
                Mode::Bits32 if is_import => drop(linker.stubs.insert(relocation.symbol, 0)),
                Mode::Bits64 if is_called && !is_own => {
                    linker.stubs.insert(relocation.symbol, 0);
                    linker.slots.insert((Slot::Address, relocation.symbol), 0);
                }
                _ => {}
            }
        }
        let mut at = linker.place(0, Role::Code);
        for offset in linker.stubs.values_mut() {
            at = at.next_multiple_of(STUB_BYTES);
            *offset = at;
            at += STUB_BYTES;
        }
        linker.code = (0, at);
        at = linker.place(at.next_multiple_of(PAGE_BYTES), Role::ReadOnly);
        at = at.next_multiple_of(16);
        linker.table = at;
        for ((slot, _), offset) in &mut linker.slots {
            *offset = at;
            at += if matches!(slot, Slot::ModuleAndOffset | Slot::Module) { 2 * word } else { word };
        }
        // A zero word before them would be their end, so nothing is left free before the first.
        let tables = patch.sections.iter().filter(|section| section.role == Role::Unwind);
        let unwind = at.next_multiple_of(tables.map(|section| section.align).fold(word, u64::max));
        at = linker.place(unwind, Role::Unwind);
        if patch.sections.iter().any(|section| section.role == Role::Unwind) {
            // The zero word that ends them.
            at += 4;
        }
        linker.unwind = (unwind, at);
        linker.read_only_end = at.next_multiple_of(PAGE_BYTES);
        at = linker.place(linker.read_only_end, Role::Data);
        at = linker.place(at, Role::Zero);
        linker.end = at.next_multiple_of(PAGE_BYTES);
        linker
    }

    /// How much memory the patch takes: whole pages.
    pub fn len_bytes(&self) -> u64 {
        self.end
    }

    /// Gives the sections of a role their places from `at` on.
    fn place(&mut self, mut at: u64, role: Role) -> u64 {
        for (section, offset) in self.patch.sections.iter().zip(&mut self.offsets) {
            if section.role == role {
                at = at.next_multiple_of(section.align);
                *offset = at;
                at += section.len_bytes;
            }
        }
        at
    }

    /// The bytes to be mapped at `at`. For 64-bit code that is not position-independent, or refers to the target's data, this has to be within 2 GiB of the target.
    ///
    /// # Errors
    /// A symbol is nowhere, or out of reach.
    pub fn link(&self, at: Addr, resolver: &dyn Resolver) -> Result<Linked, LinkError> {
        if !at.value().is_multiple_of(PAGE_BYTES) {
            return Err(LinkError::NotAligned(at));
        }
        let len = usize::try_from(self.end).unwrap_or(usize::MAX);
        let mut linking = Linking {
            linker: self,
            at,
            resolver,
            image: vec![0; len],
            known: BTreeMap::new(),
            choosers: BTreeMap::new(),
        };
        for (section, &offset) in self.patch.sections.iter().zip(&self.offsets) {
            linking.put(offset, &section.data);
            for relocation in &section.relocations {
                linking.apply(section, offset, relocation)?;
            }
        }
        linking.fill_slots()?;
        linking.write_stubs();
        Ok(self.finish(&linking))
    }

    fn finish(&self, linking: &Linking<'_>) -> Linked {
        let at = linking.at;
        let own = |symbol: u32| match self.patch.symbols[symbol as usize].place {
            Place::Own { section, offset } => {
                linking.address(self.offsets[section as usize]).offset(offset.cast_signed())
            }
            _ => at,
        };
        let code_end = self.code.1.next_multiple_of(PAGE_BYTES);
        let parts = [
            (0, code_end, Protection::Code),
            (code_end, self.read_only_end, Protection::ReadOnly),
            (self.read_only_end, self.end, Protection::Data),
        ];
        let segment = |(start, end, protection): (u64, u64, Protection)| {
            let range = usize::try_from(start).ok()?..usize::try_from(end).ok()?;
            let bytes = linking.image.get(range).filter(|bytes| !bytes.is_empty())?.to_vec();
            Some(Segment { at: linking.address(start), bytes, protection })
        };
        let functions = self.patch.functions.iter();
        let has_unwind = self.unwind.1 > self.unwind.0;
        let unwind = has_unwind
            .then(|| AddrRange { start: linking.address(self.unwind.0), end: linking.address(self.unwind.1) });
        let tables = usize::try_from(self.unwind.0).ok().zip(usize::try_from(self.unwind.1).ok());
        let tables = tables.and_then(|(start, end)| linking.image.get(start..end)).unwrap_or_default();
        Linked {
            segments: parts.into_iter().filter_map(segment).collect(),
            replacements: functions
                .map(|function| (linking.in_process(function.address), own(function.symbol)))
                .collect(),
            code: AddrRange { start: at, end: linking.address(self.code.1) },
            bodies: self
                .patch
                .bodies()
                .map(|(_, index)| {
                    AddrRange::new(linking.address(self.offsets[index]), self.patch.sections[index].len_bytes)
                })
                .collect(),
            frames: unwind::frames(tables, linking.address(self.unwind.0), self.patch.target.mode),
            unwind,
            callbacks: self.patch.callbacks.iter().map(|callback| (callback.when, own(callback.symbol))).collect(),
        }
    }
}

/// A link in progress.
struct Linking<'a> {
    linker: &'a Linker<'a>,
    at: Addr,
    resolver: &'a dyn Resolver,
    image: Vec<u8>,
    /// Addresses that were asked for.
    known: BTreeMap<u32, Addr>,
    /// Indirect functions that are asked at each call.
    choosers: BTreeMap<u32, Addr>,
}

impl Linking<'_> {
    fn address(&self, offset: u64) -> Addr {
        self.at.offset(offset.cast_signed())
    }

    /// Where the process has what the target's file has at an address.
    fn in_process(&self, address: u64) -> Addr {
        let moved = self.resolver.bias().wrapping_add(address);
        match self.linker.patch.target.mode {
            Mode::Bits32 => Addr::new(moved & u64::from(u32::MAX)),
            Mode::Bits64 => Addr::new(moved),
        }
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(place) = self.image.get_mut(start..start.saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
    }

    /// Fills in one place.
    fn apply(&mut self, section: &Section, base: u64, relocation: &Relocation) -> Result<(), LinkError> {
        let linker = self.linker;
        let mode = linker.patch.target.mode;
        let symbol = relocation.symbol;
        let Some(meaning) = relocation::meaning(mode, relocation.kind) else {
            return Err(LinkError::Unsupported {
                object: section.object.clone(),
                section: section.name.clone(),
                kind: relocation::name(mode, relocation.kind),
                symbol: self.name(symbol).to_owned(),
            });
        };
        let place = self.address(base + relocation.offset);
        let table = self.address(linker.table);
        let slot = |slot: Slot| self.address(linker.slots.get(&(slot, symbol)).copied().unwrap_or(linker.table));
        let value = match meaning.value {
            Value::Nothing => return Ok(()),
            Value::Absolute => {
                let target = self.symbol(symbol, &section.object)?.value();
                let is_near = fits(target.wrapping_add_signed(relocation.addend), meaning);
                match linker.stubs.get(&symbol) {
                    Some(&stub) if !is_near && section.role == Role::Unwind => self.address(stub).value(),
                    _ => target,
                }
            }
            Value::Relative => self.symbol(symbol, &section.object)?.value().wrapping_sub(place.value()),
            Value::Call => {
                let target = self.symbol(symbol, &section.object)?;
                let direct = target.value().wrapping_sub(place.value());
                let is_near = fits(direct.wrapping_add_signed(relocation.addend), meaning);
                match linker.stubs.get(&symbol) {
                    Some(&stub) if !is_near => self.address(stub).value().wrapping_sub(place.value()),
                    _ => direct,
                }
            }
            Value::FromTable => self.symbol(symbol, &section.object)?.value().wrapping_sub(table.value()),
            Value::TableRelative => table.value().wrapping_sub(place.value()),
            Value::SlotRelative(kind) => slot(kind).value().wrapping_sub(place.value()),
            Value::SlotFromTable(kind) => slot(kind).value().wrapping_sub(table.value()),
            Value::SlotAbsolute(kind) => slot(kind).value(),
            Value::SlotByInstruction if has_base_register(section, relocation.offset) => {
                slot(Slot::Address).value().wrapping_sub(table.value())
            }
            Value::SlotByInstruction => slot(Slot::Address).value(),
            Value::ThreadOffset => self.thread_offset(symbol, &section.object)?.cast_unsigned(),
            Value::ModuleOffset => self.thread_place(symbol, &section.object)?.offset,
            Value::Size => linker.patch.symbols[symbol as usize].len_bytes,
        };
        let value = value.wrapping_add_signed(relocation.addend);
        if !fits(value, meaning) {
            return Err(LinkError::OutOfReach {
                object: section.object.clone(),
                section: section.name.clone(),
                kind: relocation::name(mode, relocation.kind),
                symbol: self.name(symbol).to_owned(),
            });
        }
        self.put(base + relocation.offset, &value.to_le_bytes()[..meaning.width_bytes()]);
        Ok(())
    }

    fn fill_slots(&mut self) -> Result<(), LinkError> {
        let word = self.linker.patch.target.mode.word_bytes() as usize;
        for (&(slot, symbol), &offset) in &self.linker.slots {
            let object = self.linker.patch.name.as_str();
            let words = match slot {
                Slot::Address => vec![self.symbol(symbol, object)?.value()],
                Slot::ThreadOffset => vec![self.thread_offset(symbol, object)?.cast_unsigned()],
                Slot::Module => vec![self.thread_module(symbol, object)?.module, 0],
                Slot::ModuleAndOffset => {
                    let place = self.thread_module(symbol, object)?;
                    vec![place.module, place.offset]
                }
            };
            for (index, value) in (0..).zip(words) {
                self.put(offset + index * word as u64, &value.to_le_bytes()[..word]);
            }
        }
        Ok(())
    }

    fn write_stubs(&mut self) {
        for (symbol, &offset) in &self.linker.stubs {
            let slot = self.linker.slots.get(&(Slot::Address, *symbol)).copied().unwrap_or(self.linker.table);
            let (mut stub, at, to) = match (self.linker.patch.target.mode, self.choosers.get(symbol)) {
                // Both are within one patch, which is smaller than 2 GiB.
                (Mode::Bits64, _) => (FAR.to_vec(), FAR_AT, self.address(slot)),
                (Mode::Bits32, Some(chooser)) => (CHOOSES.to_vec(), CHOOSES_AT, *chooser),
                (Mode::Bits32, None) => (Vec::new(), 0, Addr::default()),
            };
            let Some(place) = stub.get_mut(at..at + 4) else { continue };
            // Displacements count from their own end.
            let distance = to.value().wrapping_sub(self.address(offset).after(at + 4).value()).to_le_bytes();
            place.copy_from_slice(&distance[..4]);
            stub.resize(usize::try_from(STUB_BYTES).unwrap_or(0), 0xcc);
            self.put(offset, &stub);
        }
    }

    fn name(&self, symbol: u32) -> &str {
        &self.linker.patch.symbols[symbol as usize].name
    }

    fn symbol(&mut self, index: u32, object: &str) -> Result<Addr, LinkError> {
        if let Some(address) = self.known.get(&index) {
            return Ok(*address);
        }
        let linker = self.linker;
        let symbol = &linker.patch.symbols[index as usize];
        let address = match &symbol.place {
            Place::Own { section, offset } => {
                self.address(linker.offsets[*section as usize]).offset(offset.cast_signed())
            }
            Place::Target { address } => self.in_process(*address),
            Place::Table => self.address(linker.table),
            Place::Absolute { value } => Addr::new(*value),
            Place::Import { version, is_weak, is_thread_local: false } => {
                let version = version.as_deref();
                let stub = linker.stubs.get(&index).filter(|_| linker.patch.target.mode == Mode::Bits32);
                let chooser = || stub.copied().zip(self.resolver.chooser(&symbol.name, version));
                match self.resolver.import(&symbol.name, version).ok_or_else(chooser) {
                    Ok(address) => address,
                    Err(Some((stub, chooser))) => {
                        self.choosers.insert(index, chooser);
                        self.address(stub)
                    }
                    Err(None) if *is_weak => Addr::new(0),
                    Err(None) => return Err(unresolved(object, &symbol.name)),
                }
            }
            Place::TargetThreadLocal { .. } | Place::Import { .. } => return Err(unresolved(object, &symbol.name)),
        };
        self.known.insert(index, address);
        Ok(address)
    }

    fn thread_place(&self, index: u32, object: &str) -> Result<ThreadPlace, LinkError> {
        let symbol = &self.linker.patch.symbols[index as usize];
        let variable = match &symbol.place {
            Place::TargetThreadLocal { offset } => ThreadLocal::Target { offset: *offset },
            Place::Import { version, .. } => ThreadLocal::Import { name: &symbol.name, version: version.as_deref() },
            _ => return Err(unresolved(object, &symbol.name)),
        };
        self.resolver.thread_local(variable).ok_or_else(|| unresolved(object, &symbol.name))
    }

    /// A place whose module is known.
    fn thread_module(&self, index: u32, object: &str) -> Result<ThreadPlace, LinkError> {
        let place = self.thread_place(index, object)?;
        let unknown = || LinkError::UnknownModule { object: object.to_owned(), symbol: self.name(index).to_owned() };
        if place.module == 0 { Err(unknown()) } else { Ok(place) }
    }

    fn thread_offset(&self, index: u32, object: &str) -> Result<i64, LinkError> {
        self.thread_place(index, object)?.from_thread_pointer.ok_or_else(|| LinkError::DynamicThreadLocal {
            object: object.to_owned(),
            symbol: self.name(index).to_owned(),
        })
    }
}

fn unresolved(object: &str, symbol: &str) -> LinkError {
    LinkError::Unresolved { object: object.to_owned(), symbol: symbol.to_owned() }
}

/// Whether the operand at `offset` has a base register: its `ModRM` byte says so.
fn has_base_register(section: &Section, offset: u64) -> bool {
    let before = offset.checked_sub(1).and_then(|at| usize::try_from(at).ok()).and_then(|at| section.data.get(at));
    // mod 00 with r/m 101: a displacement and nothing else. 32-bit psABI, R_386_GOT32X.
    before.is_some_and(|modrm| modrm & 0xc7 != 5)
}

fn fits(value: u64, meaning: Meaning) -> bool {
    let bits = 8 * meaning.width_bytes();
    if meaning.fit == Fit::All || bits >= 64 {
        return true;
    }
    let as_signed = value.cast_signed();
    let is_signed = (as_signed << (64 - bits) >> (64 - bits)) == as_signed;
    let is_unsigned = value >> bits == 0;
    match meaning.fit {
        Fit::All => true,
        Fit::Signed => is_signed,
        Fit::Unsigned => is_unsigned,
        Fit::Either => is_signed || is_unsigned,
    }
}

#[cfg(test)]
mod tests {
    use object::elf;

    use super::*;
    use crate::patch::{Symbol, Target};

    const AT: u64 = 0xf7ed_4000;
    const CHOOSER: u64 = 0xf7c0_1000;

    /// Has one function for others, that chooses.
    struct Choosing;

    impl Resolver for Choosing {
        fn bias(&self) -> u64 {
            0
        }

        fn import(&self, _name: &str, _version: Option<&str>) -> Option<Addr> {
            None
        }

        fn chooser(&self, name: &str, _version: Option<&str>) -> Option<Addr> {
            (name == "strlen").then_some(Addr::new(CHOOSER))
        }

        fn thread_local(&self, _variable: ThreadLocal<'_>) -> Option<ThreadPlace> {
            None
        }
    }

    /// 32-bit code that calls `strlen`, and looks it up in one slot, with its unwind table.
    fn narrow(import: &str) -> Patch {
        // One CIE ("zR", addresses are relative and have 32 bits), and one FDE.
        const TABLE: &[u8] = b"\x14\0\0\0\0\0\0\0\x01zR\0\x01\x7c\x08\x01\x1b\x0c\x04\x04\x88\x01\0\0\
                               \x10\0\0\0\x1c\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0";
        let place =
            |offset, kind: elf::RelocationType, symbol, addend| Relocation { offset, kind: kind.0, symbol, addend };
        let section = |name: &str, role, data: &[u8], relocations| Section {
            name: name.to_owned(),
            object: "new.o".to_owned(),
            role,
            align: 8,
            data: data.to_vec(),
            len_bytes: data.len() as u64,
            relocations,
        };
        let calls = vec![place(1, elf::R_386_PLT32, 1, -4), place(8, elf::R_386_GOT32, 1, 0)];
        let describes = vec![place(32, elf::R_386_PC32, 0, 0)];
        let symbol = |name: &str, place| Symbol { name: name.to_owned(), place, len_bytes: 16 };
        Patch {
            name: "narrow".to_owned(),
            target: Target { name: "server".to_owned(), mode: Mode::Bits32, build_id: vec![1] },
            functions: Vec::new(),
            pins: Vec::new(),
            callbacks: Vec::new(),
            sections: vec![
                section(".text.measure", Role::Code, &[0xe8; 16], calls),
                section(".eh_frame", Role::Unwind, TABLE, describes),
            ],
            symbols: vec![
                symbol("measure", Place::Own { section: 0, offset: 0 }),
                symbol(import, Place::Import { version: None, is_weak: false, is_thread_local: false }),
            ],
            notes: Vec::new(),
        }
    }

    fn bytes_at(linked: &Linked, at: u64) -> &[u8] {
        let has = |segment: &&Segment| segment.at.value() <= at && at < segment.at.value() + segment.bytes.len() as u64;
        let segment = linked.segments.iter().find(has).expect("it is in one of them");
        &segment.bytes[usize::try_from(at - segment.at.value()).expect("small")..]
    }

    fn word_at(linked: &Linked, at: u64) -> u32 {
        u32::from_le_bytes(*bytes_at(linked, at).first_chunk().expect("four bytes"))
    }

    #[test]
    fn unwind_tables_begin_with_their_first_record_also_behind_an_odd_number_of_slots() {
        let linked = Linker::new(&narrow("strlen")).link(Addr::new(AT), &Choosing).expect("it fits");
        let tables = linked.unwind.expect("it has some");
        assert_eq!(word_at(&linked, tables.start.value()), 0x14);
        let [frame] = linked.frames[..] else { panic!("{:?}", linked.frames) };
        assert_eq!((frame.code, frame.record), (AddrRange::new(Addr::new(AT), 16), tables.start.after(24)));
    }

    #[test]
    fn an_indirect_function_of_which_nobody_knows_what_it_chooses_is_asked_by_its_stub() {
        let linked = Linker::new(&narrow("strlen")).link(Addr::new(AT), &Choosing).expect("it fits");
        let reached = |at: u64| (at + 4 + u64::from(word_at(&linked, at))) & u64::from(u32::MAX);
        let stub = reached(AT + 1);
        assert!(linked.code.contains(Addr::new(stub)), "{stub:#x}");
        assert_eq!(bytes_at(&linked, stub)[..4], [0x50, 0x51, 0x52, 0xe8]);
        assert_eq!(reached(stub + 4), CHOOSER);
        // Who asks for its address gets the same.
        let slot = AT + 0x1000 + u64::from(word_at(&linked, AT + 8));
        assert_eq!(u64::from(word_at(&linked, slot)), stub);
        let unknown = Linker::new(&narrow("strlem")).link(Addr::new(AT), &Choosing);
        assert!(matches!(unknown, Err(LinkError::Unresolved { .. })), "{unknown:?}");
    }
}
