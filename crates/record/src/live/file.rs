//! The file of what a process has loaded, of either width.
//!
//! Owns [`ElfFile`]: its build-id, its symbols, and what it asks the dynamic linker to fill in ([`Wanted`]); and [`Segment`], how any such file lies in memory. Neighbour: `objects` knows where it is loaded.
//! Invariants: pure; addresses are the file's. Sources: psABI of x86-64, table 4.9; psABI of i386, table 4.9, whose addends stand where the value goes (`SHT_REL`).

use object::{
    Endianness, FileKind, Object as _, ObjectSymbol as _, ObjectSymbolTable as _, RelocationFlags, RelocationTarget,
    elf,
    read::elf::{FileHeader, ProgramHeader, Sym},
};
use trapline_engine::Mode;

use crate::sys::width;

type Header32 = elf::FileHeader32<Endianness>;
type Header64 = elf::FileHeader64<Endianness>;

/// An executable or library.
#[derive(Debug)]
pub(super) struct ElfFile {
    bytes: Vec<u8>,
    mode: Mode,
}

/// A place that the dynamic linker fills in.
pub(super) struct Wanted<'a> {
    /// Where.
    pub(super) at: u64,
    pub(super) kind: Kind,
    /// The symbol's.
    pub(super) name: Option<&'a [u8]>,
    /// The symbol's value, if it is the object's own; 0 if there is no symbol.
    pub(super) own: Option<u64>,
    pub(super) addend: u64,
}

/// What is to be filled in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Where a symbol is.
    Address,
    /// What a function of its own chooses, which the addend says.
    Chosen,
    /// The number of a module that has thread-local variables.
    ThreadModule,
    /// How far a thread-local variable is from the thread pointer.
    ThreadOffset,
}

/// Where a function or variable is that others can see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Exported {
    pub(super) address: u64,
    /// Whether a function there chooses what is meant.
    pub(super) is_chosen: bool,
}

impl ElfFile {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        let mode = if FileKind::parse(&*bytes) == Ok(FileKind::Elf32) { Mode::Bits32 } else { Mode::Bits64 };
        Self { bytes, mode }
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn parsed(&self) -> Option<object::File<'_>> {
        object::File::parse(&*self.bytes).ok()
    }

    pub(super) fn build_id(&self) -> Option<Vec<u8>> {
        self.parsed()?.build_id().ok()?.map(<[u8]>::to_vec)
    }

    /// Which of these functions it has, for others to see or not.
    pub(super) fn defines<const N: usize>(&self, names: &[&str; N]) -> [bool; N] {
        let mut found = [false; N];
        let Some(file) = self.parsed() else { return found };
        for symbol in file.dynamic_symbols().chain(file.symbols()).filter(object::ObjectSymbol::is_definition) {
            if let Some(at) = names.iter().position(|name| symbol.name() == Ok(name)) {
                found[at] = true;
            }
        }
        found
    }

    /// What it has for others under a name, and a version if one is asked for.
    pub(super) fn export(&self, name: &str, version: Option<&str>) -> Option<Exported> {
        match self.mode {
            Mode::Bits32 => export::<Header32>(&self.bytes, name, version),
            Mode::Bits64 => export::<Header64>(&self.bytes, name, version),
        }
    }

    /// The first place that the dynamic linker fills in and that `look` finds something at.
    pub(super) fn filled_in<R>(&self, look: impl Fn(&Wanted<'_>) -> Option<R>) -> Option<R> {
        let file = self.parsed()?;
        let symbols = file.dynamic_symbol_table();
        file.dynamic_relocations()?.find_map(|(at, relocation)| {
            let RelocationFlags::Elf { r_type } = relocation.flags() else { return None };
            let kind = self.kind(r_type)?;
            let symbol = match relocation.target() {
                RelocationTarget::Symbol(index) => symbols.as_ref()?.symbol_by_index(index).ok(),
                _ => None,
            };
            let name = symbol.as_ref().and_then(|symbol| symbol.name_bytes().ok());
            let own = match &symbol {
                Some(symbol) => (!symbol.is_undefined()).then(|| symbol.address()),
                None => Some(0),
            };
            let implicit = || self.word_at(at).unwrap_or(0);
            let addend =
                if relocation.has_implicit_addend() { implicit() } else { relocation.addend().cast_unsigned() };
            look(&Wanted { at, kind, name, own, addend })
        })
    }

    fn kind(&self, relocation: elf::RelocationType) -> Option<Kind> {
        match (self.mode, relocation) {
            (Mode::Bits64, elf::R_X86_64_GLOB_DAT | elf::R_X86_64_JUMP_SLOT)
            | (Mode::Bits32, elf::R_386_GLOB_DAT | elf::R_386_JMP_SLOT) => Some(Kind::Address),
            (Mode::Bits64, elf::R_X86_64_IRELATIVE) | (Mode::Bits32, elf::R_386_IRELATIVE) => Some(Kind::Chosen),
            (Mode::Bits64, elf::R_X86_64_DTPMOD64) | (Mode::Bits32, elf::R_386_TLS_DTPMOD32) => {
                Some(Kind::ThreadModule)
            }
            (Mode::Bits64, elf::R_X86_64_TPOFF64) | (Mode::Bits32, elf::R_386_TLS_TPOFF) => Some(Kind::ThreadOffset),
            _ => None,
        }
    }

    /// A word of its data, as the file has it.
    fn word_at(&self, address: u64) -> Option<u64> {
        let segments = segments(&self.bytes)?;
        let bytes = segments.iter().find_map(|segment| segment.from(&self.bytes, address))?;
        Some(width::word_in(self.mode, bytes))
    }

    /// The function at an address, and how far from its beginning that is.
    pub(super) fn function_at(&self, address: u64) -> Option<String> {
        let file = self.parsed()?;
        let here = file.symbols().chain(file.dynamic_symbols()).find(|symbol| {
            let start = symbol.address();
            let is_function = symbol.kind() == object::SymbolKind::Text && symbol.is_definition();
            is_function && (start..start + symbol.size()).contains(&address)
        })?;
        Some(format!("{}+{:#x}", String::from_utf8_lossy(here.name_bytes().ok()?), address - here.address()))
    }

    /// How long the block of thread-local variables is, as the dynamic linker allots it for an executable.
    pub(super) fn thread_block_bytes(&self) -> Option<u64> {
        let block = segments(&self.bytes)?.into_iter().find(|segment| segment.kind == elf::PT_TLS)?;
        Some(block.len_bytes.next_multiple_of(block.align.max(1)))
    }
}

fn export<H: FileHeader<Endian = Endianness>>(bytes: &[u8], name: &str, version: Option<&str>) -> Option<Exported> {
    let header = H::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, bytes).ok()?;
    let symbols = sections.symbols(endian, bytes, elf::SHT_DYNSYM).ok()?;
    let versions = sections.versions(endian, bytes).ok()?;
    for (index, symbol) in symbols.enumerate() {
        if symbol.is_undefined(endian) || symbols.symbol_name(endian, symbol).ok()? != name.as_bytes() {
            continue;
        }
        let place = versions.as_ref().map(|versions| (versions, versions.version_index(endian, index)));
        if let Some((versions, index)) = place {
            let found = versions.version(index.into()).ok().flatten().map(object::read::elf::Version::name);
            let fits = match version {
                Some(wanted) => found.is_none_or(|found| found == wanted.as_bytes()),
                // Without one the default counts.
                None => !index.is_hidden(),
            };
            if !fits {
                continue;
            }
        }
        let is_chosen = symbol.st_type() == elf::STT_GNU_IFUNC;
        return Some(Exported { address: symbol.st_value(endian).into(), is_chosen });
    }
    None
}

/// A program header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) kind: elf::ProgramType,
    pub(super) address: u64,
    /// Where the file has it, and how much of it.
    stored: (u64, u64),
    /// In memory.
    len_bytes: u64,
    align: u64,
}

impl Segment {
    /// What the file has from an address on, if that is in this segment and is loaded.
    pub(super) fn from<'a>(&self, file: &'a [u8], address: u64) -> Option<&'a [u8]> {
        if self.kind != elf::PT_LOAD {
            return None;
        }
        let within = address.checked_sub(self.address).filter(|within| *within < self.stored.1)?;
        let start = usize::try_from(self.stored.0.checked_add(within)?).ok()?;
        let end = start.checked_add(usize::try_from(self.stored.1 - within).ok()?)?;
        file.get(start..end)
    }
}

/// The program headers of a file.
pub(super) fn segments(file: &[u8]) -> Option<Vec<Segment>> {
    match FileKind::parse(file).ok()? {
        FileKind::Elf32 => program_headers::<Header32>(file),
        FileKind::Elf64 => program_headers::<Header64>(file),
        _ => None,
    }
}

fn program_headers<H: FileHeader<Endian = Endianness>>(file: &[u8]) -> Option<Vec<Segment>> {
    let header = H::parse(file).ok()?;
    let endian = header.endian().ok()?;
    let headers = header.program_headers(endian, file).ok()?.iter();
    let segment = |header: &H::ProgramHeader| Segment {
        kind: header.p_type(endian),
        address: header.p_vaddr(endian).into(),
        stored: (header.p_offset(endian).into(), header.p_filesz(endian).into()),
        len_bytes: header.p_memsz(endian).into(),
        align: header.p_align(endian).into(),
    };
    Some(headers.map(segment).collect())
}
