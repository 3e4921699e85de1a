//! An object's file on disk: what the loader did not map.
//!
//! Owns [`Image`]. Section headers and the full symbol table exist only in the file; what the sections *contain* is read
//! from memory, where it is relocated. Neighbours: [`super::objects`] describes the same object in memory, [`super::functions`]
//! sorts the symbols. Invariant: an image is only handed out after it was compared with what is loaded. A file that was
//! replaced since (by an upgrade, mostly) would name the wrong functions.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use object::{
    LittleEndian,
    elf::{self, SHF_ALLOC, SHN_ABS, SHN_UNDEF, SHT_DYNSYM, SHT_SYMTAB, STT_FUNC, STT_GNU_IFUNC},
    pod,
    read::{
        self, ReadCache, ReadRef,
        elf::{FileHeader, ProgramHeader, SectionHeader, Sym},
    },
};
use trapline_engine::{Addr, AddrRange, Mode};

use super::{
    LoadedObject, ObjectRole, Refusal, SiteKind, SkipReason,
    elf::{BuildId, ENDIAN, Elf32, Elf64, Segment, relocated},
    memory::Memory,
};

/// A file that was found to be the one that is loaded.
pub(super) struct Image {
    data: ReadCache<File>,
    mode: Mode,
    segments: Vec<Segment>,
    build_id: Option<BuildId>,
    /// The sections that list sites. There may be several of a kind.
    pub(super) lists: Vec<ListSection>,
    /// `.symtab`, if the object is not stripped.
    full_symbols: Option<SymbolSection>,
    /// `.dynsym`, which is in memory too.
    dynamic_symbols: Option<SymbolSection>,
}

/// A section that lists the addresses of sites.
#[derive(Clone, Copy, Debug)]
pub(super) struct ListSection {
    pub(super) kind: SiteKind,
    /// Where it is, before the load bias is added.
    pub(super) address: u64,
    pub(super) len_bytes: u64,
    /// Whether it is loaded (`SHF_ALLOC`), and thus relocated.
    pub(super) loaded: bool,
}

/// A symbol table and its names.
#[derive(Clone, Copy, Debug)]
struct SymbolSection {
    table: Place,
    names: Place,
}

/// Where a section's contents are: in the file and, before the load bias is added, in memory.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    address: u64,
    len_bytes: u64,
}

/// A function's symbol.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    /// Before the load bias is added.
    pub(super) address: u64,
    /// 0 where the compiler or assembler did not say.
    pub(super) len_bytes: u64,
    pub(super) binding: Binding,
    /// Offset of the name in the string table.
    pub(super) name: u32,
}

/// How widely a symbol is known, the most widely known first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Binding {
    /// `STB_GLOBAL`, or GNU's unique.
    Global,
    /// `STB_WEAK`.
    Weak,
    /// `STB_LOCAL`: a static function, or one hidden by the linker.
    Local,
}

impl Image {
    /// Opens the file of `object` and makes sure that it is the one that is loaded.
    pub(super) fn of(object: &LoadedObject) -> Result<Self, Refusal> {
        let mut refusal = None;
        for path in candidates(object) {
            let opened = Self::open(&path).and_then(|image| image.compare(object).map(|()| image));
            match opened {
                Ok(image) => return Ok(image),
                Err(error) => refusal = Some(error),
            }
        }
        Err(refusal.expect("there is at least one candidate"))
    }

    fn open(path: &Path) -> Result<Self, Refusal> {
        let file = File::open(path).map_err(|error| SkipReason::FileUnreadable { error: error.kind() })?;
        let data = ReadCache::new(file);
        let image = match Mode::NATIVE {
            Mode::Bits32 => Self::parse::<Elf32>(data),
            Mode::Bits64 => Self::parse::<Elf64>(data),
        };
        Ok(image.map_err(malformed)?)
    }

    fn parse<Elf: FileHeader<Endian = LittleEndian>>(data: ReadCache<File>) -> read::Result<Self> {
        let file = &data;
        let header = Elf::parse(file)?;
        let program_headers = header.program_headers(ENDIAN, file)?;
        let segments = Segment::from_headers::<Elf>(program_headers);
        let mut build_id = None;
        for (segment, header) in segments.iter().zip(program_headers).filter(|(segment, _)| segment.is_notes()) {
            let notes = ProgramHeader::data(header, ENDIAN, file).unwrap_or_default();
            build_id = build_id.or_else(|| segment.build_id_in(notes));
        }
        let sections = header.section_headers(ENDIAN, file)?;
        // All names in one read: the reader fetches single strings from the file one by one.
        let names = match sections {
            [] => &[],
            _ => match sections.get(header.section_strings_index(ENDIAN, file)?.0) {
                Some(names) => SectionHeader::data(names, ENDIAN, file)?,
                None => &[],
            },
        };
        let lists = sections.iter().filter_map(|section| list_section::<Elf>(section, names)).collect();
        let symbols = |kind| {
            let table = sections.iter().find(|section| section.sh_type(ENDIAN) == kind)?;
            let names = sections.get(SectionHeader::link(table, ENDIAN).0)?;
            Some(SymbolSection { table: place::<Elf>(table), names: place::<Elf>(names) })
        };
        let (full_symbols, dynamic_symbols) = (symbols(SHT_SYMTAB), symbols(SHT_DYNSYM));
        let mode = if header.is_type_64() { Mode::Bits64 } else { Mode::Bits32 };
        Ok(Self { data, mode, segments, build_id, lists, full_symbols, dynamic_symbols })
    }

    /// Fails if this is not the file that `object` was loaded from.
    ///
    /// The loader's view of the two must agree, and so must the build-ids. Objects without a build-id must agree in all
    /// dynamic symbols and their names: the loader never changes those, and different builds hardly ever share them.
    fn compare(&self, object: &LoadedObject) -> Result<(), Refusal> {
        let differs = |what| Err(SkipReason::NotTheLoadedFile { what }.into());
        if !self.segments.iter().filter(|segment| segment.is_load()).eq(object.loads()) {
            return differs("load segments");
        }
        if self.build_id != object.build_id {
            return differs("build-id");
        }
        if let (None, Some(symbols)) = (&self.build_id, self.dynamic_symbols) {
            for place in [symbols.table, symbols.names] {
                let range = place.range(object.bias);
                if !object.maps(range) || Memory::read(range)? != self.bytes(place)? {
                    return differs("dynamic symbols");
                }
            }
        }
        Ok(())
    }

    /// The functions that the symbol table defines, in its order, and the table of their names. Both are empty in an
    /// object without symbols.
    pub(super) fn functions(&self) -> Result<(Vec<Symbol>, &[u8]), SkipReason> {
        let Some(symbols) = self.full_symbols.or(self.dynamic_symbols) else { return Ok((Vec::new(), &[])) };
        let (table, names) = (self.bytes(symbols.table)?, self.bytes(symbols.names)?);
        let functions = match self.mode {
            Mode::Bits32 => functions_in::<Elf32>(table),
            Mode::Bits64 => functions_in::<Elf64>(table),
        };
        Ok((functions, names))
    }

    fn bytes(&self, place: Place) -> Result<&[u8], SkipReason> {
        (&self.data)
            .read_bytes_at(place.offset, place.len_bytes)
            .map_err(|()| SkipReason::MalformedFile { what: "Section outside of the file".into() })
    }
}

/// Where the file may be. `/proc/self/exe` opens the executable even if it was deleted, but it is the dynamic loader where
/// that was called by name to run the program; the comparison sorts it out.
fn candidates(object: &LoadedObject) -> Vec<PathBuf> {
    match object.role {
        ObjectRole::Executable => vec!["/proc/self/exe".into(), object.path.clone()],
        ObjectRole::Library | ObjectRole::Vdso => vec![object.path.clone()],
    }
}

fn malformed(error: object::Error) -> SkipReason {
    SkipReason::MalformedFile { what: error.to_string() }
}

fn list_section<Elf: FileHeader<Endian = LittleEndian>>(
    section: &Elf::SectionHeader,
    names: &[u8],
) -> Option<ListSection> {
    let name = string_at(names, section.sh_name(ENDIAN))?;
    let kind = SiteKind::ALL.into_iter().find(|kind| kind.section_name().as_bytes() == name)?;
    let Place { address, len_bytes, .. } = place::<Elf>(section);
    let loaded = section.sh_flags(ENDIAN).contains(SHF_ALLOC);
    Some(ListSection { kind, address, len_bytes, loaded })
}

fn place<Elf: FileHeader<Endian = LittleEndian>>(section: &Elf::SectionHeader) -> Place {
    Place {
        offset: section.sh_offset(ENDIAN).into(),
        address: section.sh_addr(ENDIAN).into(),
        len_bytes: section.sh_size(ENDIAN).into(),
    }
}

impl Place {
    fn range(&self, bias: Addr) -> AddrRange {
        AddrRange::new(relocated(bias, self.address), self.len_bytes)
    }
}

fn functions_in<Elf: FileHeader<Endian = LittleEndian>>(table: &[u8]) -> Vec<Symbol> {
    let symbols: &[Elf::Sym] = pod::slice_from_all_bytes(table).unwrap_or_default();
    symbols.iter().filter_map(function).collect()
}

fn function<S: Sym<Endian = LittleEndian>>(symbol: &S) -> Option<Symbol> {
    let is_function = matches!(symbol.st_type(), STT_FUNC | STT_GNU_IFUNC);
    let is_defined = !matches!(symbol.st_shndx(ENDIAN), SHN_UNDEF | SHN_ABS);
    let binding = match symbol.st_bind() {
        elf::STB_LOCAL => Binding::Local,
        elf::STB_WEAK => Binding::Weak,
        _ => Binding::Global,
    };
    (is_function && is_defined).then(|| Symbol {
        address: symbol.st_value(ENDIAN).into(),
        len_bytes: symbol.st_size(ENDIAN).into(),
        binding,
        name: symbol.st_name(ENDIAN),
    })
}

/// The string at `offset` of a string table, without the null byte that ends it.
pub(super) fn string_at(strings: &[u8], offset: u32) -> Option<&[u8]> {
    let rest = strings.get(usize::try_from(offset).ok()?..)?;
    rest.split(|&byte| byte == 0).next()
}
