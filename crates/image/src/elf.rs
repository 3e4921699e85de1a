//! The tables of an ELF file, of either width, as plain data.
//!
//! Owns [`Elf`]: segments, sections, symbols, what the dynamic linker is told. Neighbours: everything else in this crate reads it instead of the
//! file. Invariants: nothing is believed, a table that lies outside of the file is empty; addresses are the file's. Source: gABI chapters 4 and 5.

use std::ops::Range;

use object::{
    LittleEndian,
    elf::{self, FileHeader32, FileHeader64, SHN_ABS, SHN_UNDEF, SHT_DYNSYM, SHT_NOBITS, SHT_SYMTAB},
    pod,
    read::elf::{FileHeader, NoteIterator, ProgramHeader, SectionHeader, Sym},
};
use trapline_engine::Mode;

const ENDIAN: LittleEndian = LittleEndian;

/// More pieces of code than that have no sane file, and they would have to be searched.
const MAX_CODE_SEGMENTS: usize = 8;

/// The function that code compiled with `-pg -mfentry` calls first of all.
pub(crate) const ENTRY_HOOK: &[u8] = b"__fentry__";

/// The tables of one file.
#[derive(Debug)]
pub(crate) struct Elf<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) mode: Mode,
    /// Whether addresses are final: the file is not position-independent.
    pub(crate) is_fixed: bool,
    pub(crate) entry: u64,
    /// The file ends before what its headers say is loaded.
    pub(crate) is_cut: bool,
    pub(crate) segments: Vec<Segment>,
    pub(crate) sections: Vec<Section<'a>>,
    pub(crate) build_id: Option<&'a [u8]>,
    pub(crate) unwind_table: Option<u64>,
    pub(crate) dynamic: Dynamic,
}

/// A part of the file that is loaded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Segment {
    pub(crate) address: u64,
    /// In the file. Not longer than the file.
    pub(crate) file: Range<usize>,
    pub(crate) is_code: bool,
}

impl Segment {
    /// The file's bytes at `address` and behind it.
    pub(crate) fn at<'a>(&self, bytes: &'a [u8], address: u64) -> Option<&'a [u8]> {
        let offset = usize::try_from(address.checked_sub(self.address)?).ok()?;
        bytes.get(self.file.clone())?.get(offset..).filter(|rest| !rest.is_empty())
    }

    pub(crate) fn end(&self) -> u64 {
        self.address.saturating_add(self.file.len() as u64)
    }
}

/// A section, with its contents if the file has them.
#[derive(Clone, Debug)]
pub(crate) struct Section<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) address: u64,
    pub(crate) data: &'a [u8],
    pub(crate) is_code: bool,
    pub(crate) is_loaded: bool,
    kind: elf::SectionType,
    link: usize,
}

impl Section<'_> {
    pub(crate) fn end(&self) -> u64 {
        self.address.saturating_add(self.data.len() as u64)
    }
}

/// What the dynamic linker is told about code.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Dynamic {
    /// `DT_INIT`.
    pub(crate) init: Option<u64>,
    /// `DT_FINI`.
    pub(crate) fini: Option<u64>,
    /// `DT_PREINIT_ARRAY`, `DT_INIT_ARRAY` and `DT_FINI_ARRAY`: where the arrays are.
    arrays: [(u64, u64); 3],
    /// Addresses that it changes.
    pub(crate) relocated: Vec<u64>,
    /// Addresses inside the file that it stores somewhere, with the place.
    pub(crate) stored: Vec<(u64, u64)>,
    /// Where it stores the address of [`ENTRY_HOOK`].
    pub(crate) hook_places: Vec<u64>,
}

/// The names of the symbols that relocations refer to: `DT_SYMTAB` and `DT_STRTAB`, from their beginnings.
#[derive(Clone, Copy)]
struct DynamicNames<'a> {
    symbols: &'a [u8],
    strings: &'a [u8],
}

impl<'a> DynamicNames<'a> {
    /// The symbol of this number.
    fn of(self, mode: Mode, index: u64) -> Option<&'a [u8]> {
        // Elf32_Sym and Elf64_Sym, which both begin with the name.
        let symbol_bytes = if mode == Mode::Bits32 { 16 } else { 24 };
        let at = usize::try_from(index).ok()?.checked_mul(symbol_bytes)?;
        let name = u32::from_le_bytes(*self.symbols.get(at..)?.first_chunk()?);
        self.strings.get(usize::try_from(name).ok()?..)?.split(|byte| *byte == 0).next()
    }
}

/// The symbol of some code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Symbol<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) address: u64,
    /// 0 where the compiler or assembler did not say.
    pub(crate) size: u64,
    pub(crate) binding: Binding,
    /// Whether it says that it is a function.
    pub(crate) is_function: bool,
}

/// How widely a symbol is known, the most widely known first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Binding {
    Global,
    Weak,
    Local,
}

impl<'a> Elf<'a> {
    /// Reads the tables. `Err` says what is wrong with the file.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let ident = bytes.get(..6).filter(|ident| ident.starts_with(b"\x7fELF"));
        let ident = ident.ok_or_else(|| "it does not begin as an ELF file".to_owned())?;
        match ident[4..] {
            [1, 1] => Self::read::<FileHeader32<LittleEndian>>(bytes, elf::EM_386, Mode::Bits32),
            [2, 1] => Self::read::<FileHeader64<LittleEndian>>(bytes, elf::EM_X86_64, Mode::Bits64),
            _ => Err("it is an ELF file of another architecture".to_owned()),
        }
    }

    fn read<File>(bytes: &'a [u8], machine: elf::Machine, mode: Mode) -> Result<Self, String>
    where
        File: FileHeader<Endian = LittleEndian>,
    {
        let header = File::parse(bytes).map_err(|error| error.to_string())?;
        if header.e_machine(ENDIAN) != machine {
            return Err("it is an ELF file of another architecture".to_owned());
        }
        let programs = header.program_headers(ENDIAN, bytes).map_err(|error| error.to_string())?;
        let segments: Vec<_> = programs.iter().filter_map(|program| segment::<File>(program, bytes.len())).collect();
        let code = segments.iter().filter(|segment| segment.is_code);
        if code.clone().count() > MAX_CODE_SEGMENTS
            || code.map(|segment| segment.file.len()).sum::<usize>() > bytes.len()
        {
            return Err("its segments of code overlap".to_owned());
        }
        let find = |kind| programs.iter().find(|program| program.p_type(ENDIAN) == kind);
        let mut notes = programs.iter().filter(|program| program.p_type(ENDIAN) == elf::PT_NOTE);
        let build_id = notes.find_map(|program| build_id::<File>(program, bytes));
        let mut elf = Self {
            bytes,
            mode,
            is_fixed: header.e_type(ENDIAN) == elf::ET_EXEC,
            entry: header.e_entry(ENDIAN).into(),
            is_cut: programs.iter().any(|program| is_behind_end::<File>(program, bytes.len())),
            segments,
            sections: sections::<File>(header, bytes),
            build_id,
            unwind_table: find(elf::PT_GNU_EH_FRAME).map(|program| program.p_vaddr(ENDIAN).into()),
            dynamic: Dynamic::default(),
        };
        if let Some(program) = find(elf::PT_DYNAMIC) {
            let (address, len_bytes): (u64, u64) = (program.p_vaddr(ENDIAN).into(), program.p_filesz(ENDIAN).into());
            elf.dynamic = elf.read_dynamic(address, len_bytes);
        }
        Ok(elf)
    }

    /// The loaded bytes at `address` and behind it, as far as the segment goes.
    pub(crate) fn at(&self, address: u64) -> Option<&'a [u8]> {
        self.segments.iter().find_map(|segment| segment.at(self.bytes, address))
    }

    /// Whether there is code at `address`.
    pub(crate) fn is_code(&self, address: u64) -> bool {
        self.segments.iter().any(|segment| segment.is_code && (segment.address..segment.end()).contains(&address))
    }

    /// The word at `address`.
    pub(crate) fn word(&self, address: u64) -> Option<u64> {
        read_word(self.mode, self.at(address)?)
    }

    /// The section of this name.
    pub(crate) fn section(&self, name: &str) -> Option<&Section<'a>> {
        self.sections.iter().find(|section| section.name == name.as_bytes())
    }

    /// The symbols of code in the full table, or in the one for dynamic linking.
    pub(crate) fn symbols(&self, dynamic: bool) -> Vec<Symbol<'a>> {
        let kind = if dynamic { SHT_DYNSYM } else { SHT_SYMTAB };
        let Some(table) = self.sections.iter().find(|section| section.kind == kind) else { return Vec::new() };
        let names = self.sections.get(table.link).map_or(&[][..], |names| names.data);
        match self.mode {
            Mode::Bits32 => symbols::<FileHeader32<LittleEndian>>(table.data, names),
            Mode::Bits64 => symbols::<FileHeader64<LittleEndian>>(table.data, names),
        }
    }

    /// The functions that the dynamic linker calls by itself.
    pub(crate) fn constructors(&self) -> Vec<u64> {
        let word_bytes = u64::from(self.mode.word_bytes());
        let mut found = Vec::new();
        for (start, len_bytes) in self.dynamic.arrays {
            let end = start.saturating_add(len_bytes);
            let stored = self.dynamic.stored.iter().filter(|(at, _)| (start..end).contains(at));
            found.extend(stored.map(|(_, target)| *target));
            if self.is_fixed {
                let data = self.at(start).unwrap_or_default();
                let data = &data[..data.len().min(usize::try_from(len_bytes).unwrap_or(usize::MAX))];
                let words = data.chunks_exact(usize::try_from(word_bytes).unwrap_or(8));
                found.extend(words.filter_map(|word| read_word(self.mode, word)));
            }
        }
        found.retain(|address| self.is_code(*address));
        found
    }

    fn read_dynamic(&self, address: u64, len_bytes: u64) -> Dynamic {
        let word = usize::try_from(self.mode.word_bytes()).unwrap_or(8);
        let bytes = self.at(address).unwrap_or_default();
        let bytes = &bytes[..bytes.len().min(usize::try_from(len_bytes).unwrap_or(usize::MAX))];
        let mut tags = [0; 64];
        for entry in bytes.chunks_exact(2 * word) {
            let (tag, value) = (read_word(self.mode, entry), read_word(self.mode, &entry[word..]));
            let (Some(tag), Some(value)) = (tag, value) else { break };
            if tag == 0 {
                break;
            }
            if let Some(place) = usize::try_from(tag).ok().and_then(|tag| tags.get_mut(tag)) {
                *place = value;
            }
        }
        let tag = |tag: usize| tags[tag];
        let mut dynamic = Dynamic {
            // DT_INIT, DT_FINI; DT_PREINIT_ARRAY, DT_INIT_ARRAY, DT_FINI_ARRAY and their sizes.
            init: Some(tag(12)).filter(|address| self.is_code(*address)),
            fini: Some(tag(13)).filter(|address| self.is_code(*address)),
            arrays: [(tag(32), tag(33)), (tag(25), tag(27)), (tag(26), tag(28))],
            ..Dynamic::default()
        };
        // DT_SYMTAB, DT_STRTAB.
        let [symbols, strings] = [6, 5].map(|table| self.at(tag(table)).unwrap_or_default());
        let names = DynamicNames { symbols, strings };
        // DT_RELA, DT_RELASZ; DT_REL, DT_RELSZ; DT_JMPREL, DT_PLTRELSZ, DT_PLTREL; DT_RELR, DT_RELRSZ.
        self.read_relocations((tag(7), tag(8)), true, names, &mut dynamic);
        self.read_relocations((tag(17), tag(18)), false, names, &mut dynamic);
        self.read_relocations((tag(23), tag(2)), tag(20) == 7, names, &mut dynamic);
        self.read_relative(tag(36), tag(35), &mut dynamic);
        dynamic
    }

    fn read_relocations(
        &self,
        (address, len_bytes): (u64, u64),
        has_addend: bool,
        names: DynamicNames<'_>,
        dynamic: &mut Dynamic,
    ) {
        let word = usize::try_from(self.mode.word_bytes()).unwrap_or(8);
        let entry_bytes = if has_addend { 3 * word } else { 2 * word };
        let Some(bytes) = self.at(address).filter(|_| address != 0) else { return };
        let bytes = &bytes[..bytes.len().min(usize::try_from(len_bytes).unwrap_or(usize::MAX))];
        for entry in bytes.chunks_exact(entry_bytes) {
            let word_at = |index: usize| read_word(self.mode, &entry[index * word..]).unwrap_or(0);
            let (at, info) = (word_at(0), word_at(1));
            dynamic.relocated.push(at);
            let (kind, symbol) = match self.mode {
                Mode::Bits32 => (info & 0xff, info >> 8),
                Mode::Bits64 => (info & 0xffff_ffff, info >> 32),
            };
            // R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT; R_386_GLOB_DAT, R_386_JMP_SLOT.
            if matches!(kind, 6 | 7) && names.of(self.mode, symbol) == Some(ENTRY_HOOK) {
                dynamic.hook_places.push(at);
            }
            // R_X86_64_RELATIVE, R_X86_64_IRELATIVE; R_386_RELATIVE, R_386_IRELATIVE.
            if matches!((self.mode, kind), (Mode::Bits64, 8 | 37) | (Mode::Bits32, 8 | 42)) {
                let target = if has_addend { Some(word_at(2)) } else { self.word(at) };
                dynamic.stored.extend(target.map(|target| (at, target)));
            }
        }
    }

    /// `DT_RELR`: a word is the address of a place, or a bitmap of the places behind it.
    fn read_relative(&self, address: u64, len_bytes: u64, dynamic: &mut Dynamic) {
        let word = usize::try_from(self.mode.word_bytes()).unwrap_or(8);
        let Some(bytes) = self.at(address).filter(|_| address != 0) else { return };
        let bytes = &bytes[..bytes.len().min(usize::try_from(len_bytes).unwrap_or(usize::MAX))];
        let mut base = 0_u64;
        for entry in bytes.chunks_exact(word) {
            let entry = read_word(self.mode, entry).unwrap_or(0);
            let mut place = |at: u64| {
                dynamic.relocated.push(at);
                dynamic.stored.extend(self.word(at).map(|target| (at, target)));
            };
            if entry & 1 == 0 {
                place(entry);
                base = entry.wrapping_add(word as u64);
            } else {
                let bits = u64::from(self.mode.bitness()) - 1;
                (0..bits)
                    .filter(|bit| entry >> (bit + 1) & 1 != 0)
                    .for_each(|bit| place(base.wrapping_add(bit * word as u64)));
                base = base.wrapping_add(bits * word as u64);
            }
        }
    }
}

/// The first word of `bytes`.
pub(crate) fn read_word(mode: Mode, bytes: &[u8]) -> Option<u64> {
    match mode {
        Mode::Bits32 => bytes.first_chunk().map(|bytes| u32::from_le_bytes(*bytes).into()),
        Mode::Bits64 => bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)),
    }
}

fn segment<File: FileHeader<Endian = LittleEndian>>(
    program: &File::ProgramHeader,
    file_bytes: usize,
) -> Option<Segment> {
    if program.p_type(ENDIAN) != elf::PT_LOAD {
        return None;
    }
    let (offset, len): (u64, u64) = (program.p_offset(ENDIAN).into(), program.p_filesz(ENDIAN).into());
    let start = usize::try_from(offset).ok()?.min(file_bytes);
    let end = start.saturating_add(usize::try_from(len).ok()?).min(file_bytes);
    let address: u64 = program.p_vaddr(ENDIAN).into();
    address.checked_add(program.p_memsz(ENDIAN).into())?;
    Some(Segment { address, file: start..end, is_code: program.p_flags(ENDIAN).contains(elf::PF_X) })
}

/// Whether what is loaded of a file was more than it has.
fn is_behind_end<File: FileHeader<Endian = LittleEndian>>(program: &File::ProgramHeader, file_bytes: usize) -> bool {
    let (offset, len): (u64, u64) = (program.p_offset(ENDIAN).into(), program.p_filesz(ENDIAN).into());
    program.p_type(ENDIAN) == elf::PT_LOAD && offset.saturating_add(len) > file_bytes as u64
}

fn build_id<'a, File>(program: &File::ProgramHeader, bytes: &'a [u8]) -> Option<&'a [u8]>
where
    File: FileHeader<Endian = LittleEndian>,
{
    let notes = ProgramHeader::data(program, ENDIAN, bytes).ok()?;
    let align: u64 = program.p_align(ENDIAN).into();
    let mut notes = NoteIterator::<FileHeader32<LittleEndian>>::new(ENDIAN, u32::try_from(align).ok()?, notes).ok()?;
    while let Ok(Some(note)) = notes.next() {
        if note.name() == elf::ELF_NOTE_GNU && note.n_type(ENDIAN) == elf::NT_GNU_BUILD_ID {
            return Some(note.desc());
        }
    }
    None
}

fn sections<'a, File: FileHeader<Endian = LittleEndian>>(header: &File, bytes: &'a [u8]) -> Vec<Section<'a>> {
    let Ok(table) = header.sections(ENDIAN, bytes) else { return Vec::new() };
    let section = |section: &File::SectionHeader| {
        let flags = section.sh_flags(ENDIAN);
        let kind = section.sh_type(ENDIAN);
        Section {
            name: table.section_name(ENDIAN, section).unwrap_or_default(),
            address: section.sh_addr(ENDIAN).into(),
            data: if kind == SHT_NOBITS {
                &[]
            } else {
                SectionHeader::data(section, ENDIAN, bytes).unwrap_or_default()
            },
            is_code: flags.contains(elf::SHF_ALLOC) && flags.contains(elf::SHF_EXECINSTR),
            is_loaded: flags.contains(elf::SHF_ALLOC),
            kind,
            link: section.sh_link(ENDIAN) as usize,
        }
    };
    table.iter().map(section).collect()
}

fn symbols<'a, File: FileHeader<Endian = LittleEndian>>(table: &[u8], names: &'a [u8]) -> Vec<Symbol<'a>> {
    let count = table.len() / size_of::<File::Sym>();
    let (symbols, _) = pod::slice_from_bytes::<File::Sym>(table, count).unwrap_or_default();
    symbols.iter().filter_map(|symbol| code_symbol::<File>(symbol, names)).collect()
}

fn code_symbol<'a, File: FileHeader<Endian = LittleEndian>>(symbol: &File::Sym, names: &'a [u8]) -> Option<Symbol<'a>> {
    let is_function = match symbol.st_type() {
        elf::STT_FUNC | elf::STT_GNU_IFUNC => true,
        elf::STT_NOTYPE => false,
        _ => return None,
    };
    if matches!(symbol.st_shndx(ENDIAN), SHN_UNDEF | SHN_ABS) {
        return None;
    }
    let binding = match symbol.st_bind() {
        elf::STB_LOCAL => Binding::Local,
        elf::STB_WEAK => Binding::Weak,
        _ => Binding::Global,
    };
    let name = names.get(symbol.st_name(ENDIAN) as usize..).unwrap_or_default();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let (address, size) = (symbol.st_value(ENDIAN).into(), symbol.st_size(ENDIAN).into());
    Some(Symbol { name, address, size, binding, is_function })
}
