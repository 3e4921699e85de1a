//! A relocatable object, as plain data.
//!
//! Owns [`Object`]: its sections by what they are for, its symbols, and its relocations with their addends taken out of the code where i386 keeps them.
//! Neighbours: `compare` and `build` read it instead of the file. Invariant: indices lie inside of the tables, and relocations inside of their sections.
//! Source: gABI chapter 4; psABI of x86-64, section 4.4; psABI of i386, section 4.

use std::path::Path;

use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags, RelocationTarget, SectionFlags, SymbolFlags,
    elf,
};
use trapline_engine::Mode;

use crate::{
    Error,
    debug::{Debug, Types},
    relocation::{self, Value},
};

/// One relocatable object.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    /// As the user named it.
    pub(crate) path: String,
    pub(crate) mode: Mode,
    /// By the file's indices; 0 is none.
    pub(crate) sections: Vec<Section>,
    /// By the file's indices.
    pub(crate) symbols: Vec<Symbol>,
    /// The source file, as the compiler recorded it.
    pub(crate) source: Option<String>,
    /// By section: functions at its beginning, those that other files see first.
    functions: Vec<Vec<usize>>,
    /// By section: what has a name.
    named: Vec<Vec<usize>>,
}

/// A section of an object.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    pub(crate) name: String,
    pub(crate) role: Role,
    /// Empty for zeroed memory. Where a relocation keeps its addend in place, there are zeroes.
    pub(crate) data: Vec<u8>,
    pub(crate) len_bytes: u64,
    pub(crate) align: u64,
    /// Whether the linker may merge equal entries, and how.
    pub(crate) merge: Merge,
    /// By ascending offset.
    pub(crate) relocations: Vec<Relocation>,
}

/// What a section is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    Code,
    /// Never written, or only by the dynamic linker.
    ReadOnly,
    Data,
    Zero,
    ThreadLocal,
    /// `.eh_frame`.
    Unwind,
    /// Runs when the program starts or ends.
    StartOrEnd,
    /// Not loaded, or of no meaning after linking.
    Ignored,
}

/// Whether the linker may merge equal entries of a section.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Merge {
    No,
    /// Entries of a fixed size.
    Entries(usize),
    /// Zero-terminated strings of characters of this size.
    Strings(usize),
}

/// A place to be filled in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Relocation {
    pub(crate) offset: u64,
    /// `r_type`.
    pub(crate) kind: u32,
    pub(crate) symbol: usize,
    pub(crate) addend: i64,
}

/// A symbol of an object.
#[derive(Clone, Debug)]
pub(crate) struct Symbol {
    pub(crate) name: String,
    pub(crate) home: Home,
    pub(crate) value: u64,
    pub(crate) size: u64,
    pub(crate) kind: SymbolKind,
    pub(crate) is_local: bool,
    pub(crate) is_weak: bool,
}

/// Where a symbol is defined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Home {
    Section(usize),
    Undefined,
    /// Zeroed memory that the linker allocates; the value is its alignment.
    Common,
    Absolute,
}

/// What a symbol says that it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SymbolKind {
    Function,
    /// A function that chooses a function.
    Indirect,
    Data,
    ThreadLocal,
    Section,
    Other,
}

/// A function of an object: a section of code and its names.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    pub(crate) section: usize,
    /// Symbols at its beginning, those that other files see first.
    pub(crate) symbols: Vec<usize>,
}

impl Object {
    /// Reads the object at `path`, and the types that its debugging information tells.
    pub(crate) fn open(path: &Path) -> Result<(Self, Option<Types>), Error> {
        let bytes = std::fs::read(path).map_err(|error| Error::Unreadable { path: path.to_owned(), error })?;
        let object = Self::parse(&bytes, &path.display().to_string())?;
        Ok((object, Debug::of(&bytes).map(|debug| debug.types())))
    }

    /// Makes sense of an object's contents.
    pub(crate) fn parse(bytes: &[u8], path: &str) -> Result<Self, Error> {
        let malformed = |what: String| Error::Malformed { path: path.to_owned(), what };
        if bytes.starts_with(b"BC\xc0\xde") || bytes.starts_with(b"\xde\xc0\x17\x0b") {
            return Err(malformed("it holds LLVM's bitcode and no machine code; compile it without -flto".to_owned()));
        }
        if bytes.starts_with(b"!<arch>\n") {
            return Err(malformed("it is an archive; give the objects in it one by one".to_owned()));
        }
        let file = object::File::parse(bytes).map_err(|error| malformed(format!("it cannot be read: {error}")))?;
        let mode = match file.architecture() {
            object::Architecture::X86_64 if file.is_64() => Mode::Bits64,
            object::Architecture::I386 => Mode::Bits32,
            other => return Err(malformed(format!("it is for {other:?}, and trapline patches x86-64 and i386"))),
        };
        if file.kind() != object::ObjectKind::Relocatable {
            return Err(malformed("it is no relocatable object; compile with -c".to_owned()));
        }
        let count = file.sections().map(|section| section.index().0 + 1).max().unwrap_or(1);
        let mut object = Self {
            path: path.to_owned(),
            mode,
            sections: vec![Section::none(); count],
            symbols: Vec::new(),
            source: None,
            functions: Vec::new(),
            named: Vec::new(),
        };
        object.read_symbols(&file);
        for section in file.sections() {
            let read = object.read_section(&section).map_err(malformed)?;
            object.sections[section.index().0] = read;
        }
        if object.sections.iter().any(|section| section.name.starts_with(".gnu.lto_"))
            && !object.sections.iter().any(|section| section.role == Role::Code && section.len_bytes > 0)
        {
            return Err(malformed("it holds GCC's bytecode and no machine code; compile it without -flto".to_owned()));
        }
        object.index();
        Ok(object)
    }

    fn read_symbols(&mut self, file: &object::File<'_>) {
        for symbol in file.symbols() {
            let at = symbol.index().0;
            while self.symbols.len() <= at {
                self.symbols.push(Symbol::none());
            }
            let SymbolFlags::Elf { st_info, .. } = symbol.flags() else { continue };
            let name = String::from_utf8_lossy(symbol.name_bytes().unwrap_or_default()).into_owned();
            if symbol.kind() == object::SymbolKind::File {
                // Of objects that were merged into one there are several; they tell nothing then.
                self.source = if self.source.is_none() { Some(name) } else { None };
                continue;
            }
            let home = match symbol.section() {
                object::SymbolSection::Section(index) if index.0 < self.sections.len() => Home::Section(index.0),
                object::SymbolSection::Common => Home::Common,
                object::SymbolSection::Absolute => Home::Absolute,
                _ => Home::Undefined,
            };
            let kind = match st_info.st_type() {
                elf::STT_FUNC => SymbolKind::Function,
                elf::STT_GNU_IFUNC => SymbolKind::Indirect,
                elf::STT_OBJECT | elf::STT_COMMON => SymbolKind::Data,
                elf::STT_TLS => SymbolKind::ThreadLocal,
                elf::STT_SECTION => SymbolKind::Section,
                _ => SymbolKind::Other,
            };
            self.symbols[at] = Symbol {
                name,
                home,
                value: symbol.address(),
                size: symbol.size(),
                kind,
                is_local: st_info.st_bind() == elf::STB_LOCAL,
                is_weak: symbol.is_weak(),
            };
        }
    }

    fn read_section(&self, section: &object::Section<'_, '_>) -> Result<Section, String> {
        let name = String::from_utf8_lossy(section.name_bytes().unwrap_or_default()).into_owned();
        let SectionFlags::Elf { sh_type, sh_flags } = section.flags() else {
            return Err("it is no ELF file".to_owned());
        };
        let role = role(&name, sh_type, sh_flags);
        let data = match role {
            Role::Zero | Role::Ignored => Vec::new(),
            _ => section.data().map_err(|error| format!("section {name}: {error}"))?.to_vec(),
        };
        let len_bytes = if role == Role::Ignored { 0 } else { section.size() };
        let entry_bytes = entry_bytes(section);
        let merge = match sh_flags.contains(elf::SHF_MERGE) {
            true if sh_flags.contains(elf::SHF_STRINGS) => Merge::Strings(entry_bytes.max(1)),
            true if entry_bytes > 0 => Merge::Entries(entry_bytes),
            _ => Merge::No,
        };
        let align = section.align().max(1);
        if !align.is_power_of_two() {
            return Err(format!("section {name} has an alignment of {align} bytes"));
        }
        let mut read = Section { name, role, data, len_bytes, align, merge, relocations: Vec::new() };
        if role != Role::Ignored {
            self.read_relocations(section, &mut read)?;
        }
        Ok(read)
    }

    fn read_relocations(&self, section: &object::Section<'_, '_>, read: &mut Section) -> Result<(), String> {
        for (offset, relocation) in section.relocations() {
            let RelocationFlags::Elf { r_type } = relocation.flags() else { continue };
            let kind = r_type.0;
            let symbol = match relocation.target() {
                RelocationTarget::Symbol(index) if index.0 < self.symbols.len() => index.0,
                _ => 0,
            };
            let width = relocation::meaning(self.mode, kind).map_or(0, relocation::Meaning::width_bytes);
            let place =
                usize::try_from(offset).ok().and_then(|start| read.data.get_mut(start..start.checked_add(width)?));
            let Some(place) = place else {
                return Err(format!("section {}: a relocation at {offset:#x} lies outside", read.name));
            };
            let mut addend = relocation.addend();
            if relocation.has_implicit_addend() {
                let mut word = [0; 8];
                word[..width].copy_from_slice(place);
                let shift = 64 - 8 * u32::try_from(width).unwrap_or(0);
                // Sign extension from the place's width.
                addend = if width == 0 { 0 } else { i64::from_le_bytes(word) << shift >> shift };
            }
            place.fill(0);
            if relocation::meaning(self.mode, kind).is_some_and(|meaning| meaning.value == Value::Nothing) {
                continue;
            }
            read.relocations.push(Relocation { offset, kind, symbol, addend });
        }
        read.relocations.sort_by_key(|relocation| relocation.offset);
        Ok(())
    }

    /// Sorts symbols by the sections that they are in.
    fn index(&mut self) {
        self.functions = vec![Vec::new(); self.sections.len()];
        self.named = vec![Vec::new(); self.sections.len()];
        for (index, symbol) in self.symbols.iter().enumerate() {
            let Home::Section(section) = symbol.home else { continue };
            if !has_identity(&symbol.name) {
                continue;
            }
            let is_function = matches!(symbol.kind, SymbolKind::Function | SymbolKind::Indirect);
            if is_function || matches!(symbol.kind, SymbolKind::Data | SymbolKind::ThreadLocal) {
                self.named[section].push(index);
            }
            if is_function && self.sections[section].role == Role::Code && symbol.value == 0 && !is_part(&symbol.name) {
                self.functions[section].push(index);
            }
        }
        let symbols = &self.symbols;
        for functions in &mut self.functions {
            functions.sort_by_key(|&index| (symbols[index].is_local, symbols[index].is_weak, index));
        }
        for named in &mut self.named {
            named.sort_by_key(|&index| (symbols[index].value, symbols[index].is_local, index));
            // Other names of the same object.
            named.dedup_by_key(|index| symbols[*index].value);
        }
    }

    /// All functions: sections of code with a function at their beginning. Parts of functions (`.cold`) are none.
    pub(crate) fn units(&self) -> impl Iterator<Item = Unit> {
        let sections = self.functions.iter().enumerate().filter(|(_, symbols)| !symbols.is_empty());
        sections.map(|(section, symbols)| Unit { section, symbols: symbols.clone() })
    }

    /// The symbol of the function that a section of code is, the one that other files see first.
    pub(crate) fn function_of(&self, section: usize) -> Option<usize> {
        self.functions[section].first().copied()
    }

    /// The named objects or functions in a section, by ascending address, one at each.
    pub(crate) fn named_in(&self, section: usize) -> &[usize] {
        &self.named[section]
    }

    /// A function that stands behind another one in the same section, so that they cannot be told apart.
    pub(crate) fn function_inside(&self, section: usize) -> Option<&Symbol> {
        self.symbols.iter().find(|symbol| {
            symbol.home == Home::Section(section)
                && symbol.kind == SymbolKind::Function
                && symbol.value != 0
                && !is_part(&symbol.name)
        })
    }

    /// The bytes from `offset` of a section on; zeroes have none.
    pub(crate) fn bytes(&self, section: usize, offset: u64, len_bytes: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(len_bytes).ok()?)?;
        self.sections.get(section)?.data.get(start..end)
    }
}

impl Section {
    fn none() -> Self {
        Self {
            name: String::new(),
            role: Role::Ignored,
            data: Vec::new(),
            len_bytes: 0,
            align: 1,
            merge: Merge::No,
            relocations: Vec::new(),
        }
    }

    /// Whether the program writes to it.
    pub(crate) fn is_writable(&self) -> bool {
        matches!(self.role, Role::Data | Role::Zero)
    }
}

impl Symbol {
    fn none() -> Self {
        Self {
            name: String::new(),
            home: Home::Undefined,
            value: 0,
            size: 0,
            kind: SymbolKind::Other,
            is_local: true,
            is_weak: false,
        }
    }
}

/// Whether a name is the program's, and not one that the compiler made up for something without a name.
pub(crate) fn has_identity(name: &str) -> bool {
    !name.is_empty() && !name.starts_with(".L") && !name.starts_with("GCC_except_table")
}

/// Whether a symbol names a piece of a function and no function.
pub(crate) fn is_part(name: &str) -> bool {
    name.split_once(".cold").is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with('.'))
}

fn role(name: &str, kind: elf::SectionType, flags: elf::SectionFlags) -> Role {
    const START_OR_END: [&str; 7] =
        [".init_array", ".fini_array", ".preinit_array", ".ctors", ".dtors", ".init", ".fini"];
    // Tables for tools that work on the linked file; trapline's own sites come from the target.
    const TABLES: [&str; 5] =
        ["__patchable_function_entries", "__mcount_loc", "xray_instr_map", "xray_fn_idx", ".stapsdt.base"];
    let is_one_of = |names: &[&str]| {
        names.iter().any(|known| name.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
    };
    if !flags.contains(elf::SHF_ALLOC) || kind == elf::SHT_NOTE || is_one_of(&TABLES) {
        Role::Ignored
    } else if name == ".eh_frame" {
        Role::Unwind
    } else if is_one_of(&START_OR_END) {
        Role::StartOrEnd
    } else if flags.contains(elf::SHF_TLS) {
        Role::ThreadLocal
    } else if flags.contains(elf::SHF_EXECINSTR) {
        Role::Code
    } else if kind == elf::SHT_NOBITS {
        Role::Zero
    } else if !flags.contains(elf::SHF_WRITE) || name.starts_with(".data.rel.ro") {
        Role::ReadOnly
    } else {
        Role::Data
    }
}

fn entry_bytes(section: &object::Section<'_, '_>) -> usize {
    // The unified interface does not tell `sh_entsize`; what compilers emit has it in the name.
    let name = section.name_bytes().unwrap_or_default();
    let name = String::from_utf8_lossy(name);
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    let after = |mark: &str| name.rfind(mark).map(|at| digits(&name[at + mark.len()..]));
    after(".str").or_else(|| after(".cst")).unwrap_or(0)
}
