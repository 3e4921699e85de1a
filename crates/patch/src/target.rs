//! The file that is patched: its symbols, its imports, its bytes.
//!
//! Owns [`TargetFile`]. Neighbours: `build` asks it where things are, `found` adds what it found by code. Invariants: addresses are the file's; a name that
//! several symbols have is never guessed.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use object::{
    Object as _, ObjectSegment as _, ObjectSymbol as _, SegmentFlags, SymbolFlags, elf,
    read::elf::{ElfFile32, ElfFile64, FileHeader, ProgramHeader},
};
use trapline_engine::Mode;

use crate::{Error, object::SymbolKind};

/// The file that is patched.
#[derive(Debug)]
pub(crate) struct TargetFile {
    pub(crate) path: String,
    pub(crate) name: String,
    pub(crate) mode: Mode,
    pub(crate) build_id: Vec<u8>,
    /// Whether it has the full table of symbols, static ones too, or a file beside it has.
    pub(crate) has_symbols: bool,
    pub(crate) segments: Vec<TargetSegment>,
    symbols: HashMap<String, Vec<TargetSymbol>>,
    /// Names that it imports, with the versions.
    imports: HashMap<String, Option<String>>,
    /// Names that were found by code.
    found: HashSet<String>,
    /// How long the block of thread-local variables is, which ends at the thread pointer.
    pub(crate) thread_block_bytes: Option<u64>,
    /// The file with its debugging information, if that is another one.
    pub(crate) debug_file: Option<Vec<u8>>,
    pub(crate) bytes: Vec<u8>,
}

/// A part of the file that is loaded.
#[derive(Clone, Debug)]
pub(crate) struct TargetSegment {
    pub(crate) address: u64,
    pub(crate) data: Vec<u8>,
    /// With the zeroes behind the data.
    pub(crate) len_bytes: u64,
    pub(crate) is_code: bool,
}

/// A symbol that the target defines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TargetSymbol {
    /// Of thread-local variables: in the block.
    pub(crate) address: u64,
    pub(crate) size: u64,
    pub(crate) kind: SymbolKind,
    pub(crate) is_local: bool,
    /// The source file, of local ones.
    pub(crate) source: Option<String>,
}

/// What a name means in the target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Found<'a> {
    One(&'a TargetSymbol),
    Nothing,
    /// Several, and nothing tells which.
    Ambiguous(usize),
}

impl TargetFile {
    /// Reads the target, and the file with its symbols if that is another one.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(|error| Error::Unreadable { path: path.to_owned(), error })?;
        let debug_file = trapline_image::symbol_file(&bytes, path);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let malformed = |what: String| Error::Malformed { path: path.display().to_string(), what };
        let file = object::File::parse(&*bytes).map_err(|error| malformed(format!("it cannot be read: {error}")))?;
        let mode = match file.architecture() {
            object::Architecture::X86_64 if file.is_64() => Mode::Bits64,
            object::Architecture::I386 => Mode::Bits32,
            other => return Err(malformed(format!("it is for {other:?}, and trapline patches x86-64 and i386"))),
        };
        if !matches!(file.kind(), object::ObjectKind::Executable | object::ObjectKind::Dynamic) {
            return Err(malformed("it is neither an executable nor a shared object".to_owned()));
        }
        let build_id = build_id(&file).ok_or_else(|| {
            malformed(
                "it has no build-id, so that a patch could not be told from a stale one; link it with -Wl,--build-id"
                    .to_owned(),
            )
        })?;
        let mut target = Self {
            path: path.display().to_string(),
            name,
            mode,
            build_id,
            has_symbols: file.symbols().next().is_some(),
            segments: file.segments().map(|segment| loaded(&segment)).collect(),
            symbols: HashMap::new(),
            imports: HashMap::new(),
            found: HashSet::new(),
            thread_block_bytes: match &file {
                object::File::Elf64(file) => thread_block(file.elf_program_headers(), file.endian()),
                object::File::Elf32(file) => thread_block(file.elf_program_headers(), file.endian()),
                _ => None,
            },
            debug_file: None,
            bytes: Vec::new(),
        };
        target.add_symbols(file.symbols());
        target.add_symbols(file.dynamic_symbols());
        target.add_imports(&file);
        if let Some(other) = debug_file.as_deref().and_then(|bytes| object::File::parse(bytes).ok())
            && other.is_64() == file.is_64()
        {
            target.has_symbols |= other.symbols().next().is_some();
            target.add_symbols(other.symbols());
        }
        drop(file);
        target.debug_file = debug_file;
        target.bytes = bytes;
        Ok(target)
    }

    fn add_symbols<'data: 'file, 'file>(&mut self, symbols: impl Iterator<Item = object::Symbol<'data, 'file>>) {
        let mut source = None;
        for symbol in symbols {
            let SymbolFlags::Elf { st_info, .. } = symbol.flags() else { continue };
            let name = String::from_utf8_lossy(symbol.name_bytes().unwrap_or_default()).into_owned();
            let kind = match st_info.st_type() {
                elf::STT_FILE => {
                    source = Some(name).filter(|name| !name.is_empty());
                    continue;
                }
                elf::STT_FUNC => SymbolKind::Function,
                elf::STT_GNU_IFUNC => SymbolKind::Indirect,
                elf::STT_OBJECT => SymbolKind::Data,
                elf::STT_TLS => SymbolKind::ThreadLocal,
                elf::STT_NOTYPE => SymbolKind::Other,
                _ => continue,
            };
            if symbol.is_undefined() || name.is_empty() {
                continue;
            }
            // Linkers write copied variables as `stdout@GLIBC_2.2.5`.
            let name = name.split('@').next().unwrap_or_default();
            let is_local = st_info.st_bind() == elf::STB_LOCAL;
            self.add(
                name,
                TargetSymbol {
                    address: symbol.address(),
                    size: symbol.size(),
                    kind,
                    is_local,
                    source: source.clone().filter(|_| is_local),
                },
            );
        }
    }

    /// Adds what is known of a name.
    pub(crate) fn add(&mut self, name: &str, symbol: TargetSymbol) {
        let known = self.symbols.entry(name.to_owned()).or_default();
        if !known.iter().any(|other| other.address == symbol.address && other.kind == symbol.kind) {
            known.push(symbol);
        }
    }

    /// Adds what was found by code. Nothing is found that has a symbol.
    pub(crate) fn add_found(&mut self, name: &str, symbol: TargetSymbol) {
        if !self.symbols.contains_key(name) || symbol.is_local {
            self.found.insert(name.to_owned());
            self.add(name, symbol);
        }
    }

    /// Whether a name was found by code.
    pub(crate) fn is_found_by_code(&self, name: &str) -> bool {
        self.found.contains(name)
    }

    fn add_imports(&mut self, file: &object::File<'_>) {
        for symbol in file.dynamic_symbols().filter(object::ObjectSymbol::is_undefined) {
            let name = String::from_utf8_lossy(symbol.name_bytes().unwrap_or_default()).into_owned();
            self.imports.entry(name).or_insert(None);
        }
        let versions = match file {
            object::File::Elf64(file) => versions_64(file),
            object::File::Elf32(file) => versions_32(file),
            _ => Vec::new(),
        };
        for (name, version) in versions {
            self.imports.insert(name, Some(version));
        }
    }

    /// What a name means that the object `source` refers to. `is_local`: the object defines it for itself alone.
    pub(crate) fn find(&self, name: &str, is_local: bool, source: Option<&str>) -> Found<'_> {
        let all = self.symbols.get(name).map_or(&[][..], Vec::as_slice);
        if !is_local && let Some(global) = all.iter().find(|symbol| !symbol.is_local) {
            return Found::One(global);
        }
        let local: Vec<_> = all.iter().filter(|symbol| symbol.is_local || !is_local).collect();
        let same_source: Vec<_> =
            local.iter().copied().filter(|symbol| source.is_some() && symbol.source.as_deref() == source).collect();
        match one_of(&same_source) {
            Found::Nothing => one_of(&local),
            found => found,
        }
    }

    /// All symbols of a name.
    pub(crate) fn all(&self, name: &str) -> &[TargetSymbol] {
        self.symbols.get(name).map_or(&[], Vec::as_slice)
    }

    /// All names and their symbols.
    pub(crate) fn symbols(&self) -> impl Iterator<Item = (&str, &TargetSymbol)> {
        self.symbols.iter().flat_map(|(name, all)| all.iter().map(move |symbol| (name.as_str(), symbol)))
    }

    /// Whether it imports a name.
    pub(crate) fn imports(&self, name: &str) -> bool {
        self.imports.contains_key(name)
    }

    /// The version of a name that it imports.
    pub(crate) fn import_version(&self, name: &str) -> Option<&str> {
        self.imports.get(name)?.as_deref()
    }

    /// The loaded bytes at an address; `None` if they are not all in the file.
    pub(crate) fn at(&self, address: u64, len_bytes: u64) -> Option<&[u8]> {
        self.segments.iter().find_map(|segment| {
            let start = usize::try_from(address.checked_sub(segment.address)?).ok()?;
            segment.data.get(start..start.checked_add(usize::try_from(len_bytes).ok()?)?)
        })
    }

    /// Whether an address is in zeroed memory.
    pub(crate) fn is_zero(&self, address: u64) -> bool {
        self.segments.iter().any(|segment| {
            let offset = address.checked_sub(segment.address);
            offset.is_some_and(|offset| offset >= segment.data.len() as u64 && offset < segment.len_bytes)
        })
    }
}

fn one_of<'a>(candidates: &[&'a TargetSymbol]) -> Found<'a> {
    match candidates {
        [] => Found::Nothing,
        [one] => Found::One(one),
        _ => Found::Ambiguous(candidates.len()),
    }
}

fn loaded(segment: &object::Segment<'_, '_>) -> TargetSegment {
    let is_code = match segment.flags() {
        SegmentFlags::Elf { p_flags, .. } => p_flags.contains(elf::PF_X),
        _ => false,
    };
    TargetSegment {
        address: segment.address(),
        data: segment.data().unwrap_or_default().to_vec(),
        len_bytes: segment.size(),
        is_code,
    }
}

fn build_id(file: &object::File<'_>) -> Option<Vec<u8>> {
    file.build_id().ok().flatten().map(<[u8]>::to_vec).filter(|id| !id.is_empty())
}

/// Source: Drepper, "ELF Handling For Thread-Local Storage", section 3, variant II.
fn thread_block<Header: ProgramHeader>(headers: &[Header], endian: Header::Endian) -> Option<u64> {
    let header = headers.iter().find(|header| header.p_type(endian) == elf::PT_TLS)?;
    let (len_bytes, align): (u64, u64) = (header.p_memsz(endian).into(), header.p_align(endian).into());
    len_bytes.checked_next_multiple_of(align.max(1))
}

fn versions_64(file: &ElfFile64<'_>) -> Vec<(String, String)> {
    versions(file.elf_header(), file.endian(), file.data())
}

fn versions_32(file: &ElfFile32<'_>) -> Vec<(String, String)> {
    versions(file.elf_header(), file.endian(), file.data())
}

/// The imported names that have a version.
fn versions<File: FileHeader>(header: &File, endian: File::Endian, data: &[u8]) -> Vec<(String, String)> {
    use object::read::elf::Sym as _;
    let read = || -> Option<Vec<(String, String)>> {
        let sections = header.sections(endian, data).ok()?;
        let symbols = sections.symbols(endian, data, elf::SHT_DYNSYM).ok()?;
        let versions = sections.versions(endian, data).ok()??;
        let mut found = Vec::new();
        for (index, symbol) in symbols.enumerate() {
            if symbol.st_shndx(endian) != elf::SHN_UNDEF {
                continue;
            }
            let version = versions.version(versions.version_index(endian, index).into()).ok().flatten();
            if let (Some(version), Ok(name)) = (version, symbols.symbol_name(endian, symbol)) {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                found.push((text(name), text(version.name())));
            }
        }
        Some(found)
    };
    read().unwrap_or_default()
}
