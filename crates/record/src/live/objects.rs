//! What a process has loaded, and where its symbols are.
//!
//! Owns [`Objects`], in the order in which the dynamic linker looks symbols up, and [`Names`], which answers the linker's questions. What the target's own table of
//! addresses says comes first: it is what the dynamic linker found, also for functions that are chosen when the program starts.

use std::{fs, io, path::PathBuf};

use object::{
    Endianness, Object as _, ObjectSymbol as _, elf,
    read::elf::{FileHeader, ProgramHeader, Rela, SectionHeader, Sym},
};
use trapline_engine::{Addr, AddrRange, Mode};
use trapline_patch::{Resolver, Target, ThreadLocal, ThreadPlace};
use trapline_trace::hexadecimal;

use super::LiveError;
use crate::sys::{Tid, auxiliary_vector, maps::Mapping, memory::Memory};

type File = elf::FileHeader64<Endianness>;

/// All objects of a process.
#[derive(Debug)]
pub(super) struct Objects(Vec<Object>);

/// An executable or library in a process.
#[derive(Debug)]
pub(super) struct Object {
    path: PathBuf,
    bytes: Vec<u8>,
    /// What is added to its addresses.
    pub(super) bias: u64,
    /// From its first mapping to its last.
    pub(super) range: AddrRange,
    is_executable: bool,
}

/// A symbol that others can see.
#[derive(Clone, Copy, Debug)]
pub(super) struct Export {
    at: Addr,
    is_chosen: bool,
}

impl Objects {
    /// Reads which there are, and their files.
    pub(super) fn of(pid: Tid, memory: &Memory, mappings: &[Mapping]) -> io::Result<Self> {
        let (bias, phdr, dynamic) = executable(pid, memory)?;
        let mut loads = vec![(bias, None)];
        if let Some(dynamic) = dynamic {
            loads.extend(link_map(memory, dynamic)?.into_iter().skip(1).map(|(bias, at)| (bias, Some(at))));
        }
        let objects = loads.into_iter().filter_map(|(bias, dynamic)| {
            let inside = Addr::new(dynamic.unwrap_or(phdr));
            let mapping = mappings.iter().find(|mapping| mapping.range.contains(inside) && mapping.inode != 0)?;
            Object::read(pid, mappings, mapping, bias, dynamic.is_none())
        });
        Ok(Self(objects.collect()))
    }

    /// The one that a patch is for.
    pub(super) fn of_build(&self, target: &Target) -> Result<&Object, LiveError> {
        let wanted = hexadecimal(&target.build_id);
        if let Some(object) = self.0.iter().find(|object| object.build_id().as_deref() == Some(&target.build_id)) {
            return Ok(object);
        }
        let of_this_name = |object: &&Object| object.path.file_name().is_some_and(|name| *name == *target.name);
        let found = self.0.iter().find(of_this_name).or(self.0.first());
        let found = found.map_or_else(
            || "and the process has no file that can be read".to_owned(),
            |object| {
                let id = object.build_id().map_or_else(|| "none".to_owned(), |id| hexadecimal(&id));
                format!("and the process runs {} with build-id {id}", object.path.display())
            },
        );
        Err(LiveError::NotLoaded { target: target.name.clone(), wanted, found })
    }

    /// All of them.
    pub(super) fn all(&self) -> &[Object] {
        &self.0
    }

    /// What the first object has that has a symbol for others to see.
    pub(super) fn export(&self, name: &str, version: Option<&str>) -> Option<Export> {
        self.0.iter().find_map(|object| object.export(name, version))
    }

    /// Answers for a patch of `target`.
    pub(super) fn resolver<'a>(&'a self, target: &'a Object, memory: &'a Memory) -> Names<'a> {
        Names { objects: self, target, memory }
    }

    /// What is at an address of code: a function and the object.
    pub(super) fn name_of(&self, at: Addr) -> Option<String> {
        let object = self.0.iter().find(|object| object.range.contains(at))?;
        let address = at.value().wrapping_sub(object.bias);
        let file = object.path.file_name().unwrap_or_default().to_string_lossy();
        let function = object.function_at(address).unwrap_or_else(|| format!("{address:#x}"));
        Some(format!("{function} ({file})"))
    }
}

impl Object {
    fn read(pid: Tid, mappings: &[Mapping], mapping: &Mapping, bias: u64, is_executable: bool) -> Option<Self> {
        let AddrRange { start, end } = mapping.range;
        // By this name also a file that was deleted is found, as after an update.
        let mapped = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", start.value(), end.value()));
        let bytes = mapping.file(pid).and_then(|path| fs::read(path).ok()).or_else(|| fs::read(mapped).ok())?;
        let its = || mappings.iter().filter(|other| other.inode == mapping.inode && other.path == mapping.path);
        let range = AddrRange { start: its().next()?.range.start, end: its().next_back()?.range.end };
        Some(Self { path: mapping.path.clone(), bytes, bias, range, is_executable })
    }

    fn header(&self) -> Option<(&File, Endianness)> {
        let header = File::parse(&*self.bytes).ok()?;
        Some((header, header.endian().ok()?))
    }

    /// Its file's name.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Which of these functions it has, for others to see or not.
    pub(super) fn defines<const N: usize>(&self, names: &[&str; N]) -> [bool; N] {
        let mut found = [false; N];
        let Ok(file) = object::File::parse(&*self.bytes) else { return found };
        for symbol in file.dynamic_symbols().chain(file.symbols()).filter(object::ObjectSymbol::is_definition) {
            if let Some(at) = names.iter().position(|name| symbol.name() == Ok(name)) {
                found[at] = true;
            }
        }
        found
    }

    pub(super) fn build_id(&self) -> Option<Vec<u8>> {
        let (header, endian) = self.header()?;
        for segment in header.program_headers(endian, &*self.bytes).ok()? {
            let Ok(Some(mut notes)) = segment.notes(endian, &*self.bytes) else { continue };
            while let Ok(Some(note)) = notes.next() {
                if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
                    return Some(note.desc().to_vec());
                }
            }
        }
        None
    }

    fn export(&self, name: &str, version: Option<&str>) -> Option<Export> {
        let (header, endian) = self.header()?;
        let sections = header.sections(endian, &*self.bytes).ok()?;
        let symbols = sections.symbols(endian, &*self.bytes, elf::SHT_DYNSYM).ok()?;
        let versions = sections.versions(endian, &*self.bytes).ok()?;
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
            let at = Addr::new(symbol.st_value(endian).wrapping_add(self.bias));
            return Some(Export { at, is_chosen: symbol.st_type() == elf::STT_GNU_IFUNC });
        }
        None
    }

    /// What the dynamic linker has filled in, by what it was asked for.
    fn filled_in(&self, memory: &Memory, is_wanted: impl Fn(&Wanted<'_>) -> bool) -> Option<(Addr, u64)> {
        let (header, endian) = self.header()?;
        let sections = header.sections(endian, &*self.bytes).ok()?;
        let symbols = sections.symbols(endian, &*self.bytes, elf::SHT_DYNSYM).ok()?;
        for section in sections.iter() {
            let Ok(Some((relocations, _))) = section.rela(endian, &*self.bytes) else { continue };
            for relocation in relocations {
                let symbol = relocation.symbol(endian, false).and_then(|index| symbols.symbol(index).ok());
                let name = symbol.and_then(|symbol| symbols.symbol_name(endian, symbol).ok());
                let own = symbol.filter(|symbol| !symbol.is_undefined(endian)).map(|symbol| symbol.st_value(endian));
                let addend = relocation.r_addend(endian).cast_unsigned();
                let kind = relocation.r_type(endian, false);
                let wanted = Wanted { kind, name, own: own.or(symbol.is_none().then_some(0)), addend };
                if !is_wanted(&wanted) {
                    continue;
                }
                let at = Addr::new(relocation.r_offset(endian).wrapping_add(self.bias));
                if let Ok(word) = memory.read_word(at)
                    && (word != 0 && !(wanted.name.is_some() && self.range.contains(Addr::new(word))))
                {
                    return Some((Addr::new(word), wanted.own.unwrap_or(0).wrapping_add(addend)));
                }
            }
        }
        None
    }

    /// What an object was told of a symbol of another object, unless that is to be found out at the first call.
    fn knows(&self, name: &str, memory: &Memory) -> Option<Addr> {
        let is_slot = |wanted: &Wanted<'_>| {
            let is_address = wanted.kind == elf::R_X86_64_GLOB_DAT || wanted.kind == elf::R_X86_64_JUMP_SLOT;
            is_address && wanted.name == Some(name.as_bytes())
        };
        self.filled_in(memory, is_slot).map(|(at, _)| at)
    }

    /// What a function of its own has chosen, that it uses itself: `chooser` is the file's address.
    fn has_chosen(&self, chooser: u64, memory: &Memory) -> Option<Addr> {
        let is_it = |wanted: &Wanted<'_>| wanted.kind == elf::R_X86_64_IRELATIVE && wanted.addend == chooser;
        self.filled_in(memory, is_it).map(|(at, _)| at)
    }

    /// Where its thread-local variables are, as the dynamic linker has told its own code: the number of its module; the beginning of its block, seen from the thread pointer.
    fn thread_block(&self, memory: &Memory) -> (Option<u64>, Option<i64>) {
        let is_own = |wanted: &Wanted<'_>, kind| wanted.kind == kind && wanted.own.is_some();
        let module = self.filled_in(memory, |wanted| is_own(wanted, elf::R_X86_64_DTPMOD64));
        let offset = self.filled_in(memory, |wanted| is_own(wanted, elf::R_X86_64_TPOFF64));
        let start = offset.map(|(from_thread_pointer, in_block)| from_thread_pointer.value().wrapping_sub(in_block));
        (module.map(|(module, _)| module.value()), start.map(u64::cast_signed))
    }

    fn function_at(&self, address: u64) -> Option<String> {
        let (header, endian) = self.header()?;
        let sections = header.sections(endian, &*self.bytes).ok()?;
        for kind in [elf::SHT_SYMTAB, elf::SHT_DYNSYM] {
            let symbols = sections.symbols(endian, &*self.bytes, kind).ok()?;
            let here = symbols.iter().find(|symbol| {
                let start = symbol.st_value(endian);
                let is_function = symbol.st_type() == elf::STT_FUNC && !symbol.is_undefined(endian);
                is_function && (start..start + symbol.st_size(endian)).contains(&address)
            });
            if let Some(symbol) = here {
                let name = symbols.symbol_name(endian, symbol).ok()?;
                return Some(format!("{}+{:#x}", String::from_utf8_lossy(name), address - symbol.st_value(endian)));
            }
        }
        None
    }

    /// How long the block of thread-local variables is, as the dynamic linker allots it for an executable.
    fn thread_block_bytes(&self) -> Option<u64> {
        let (header, endian) = self.header()?;
        let segments = header.program_headers(endian, &*self.bytes).ok()?;
        let block = segments.iter().find(|segment| segment.p_type(endian) == elf::PT_TLS)?;
        Some(block.p_memsz(endian).next_multiple_of(block.p_align(endian).max(1)))
    }
}

/// A place that the dynamic linker fills in.
struct Wanted<'a> {
    kind: elf::RelocationType,
    /// The symbol's.
    name: Option<&'a [u8]>,
    /// The symbol's value, if it is the object's own; 0 if there is no symbol.
    own: Option<u64>,
    addend: u64,
}

/// Answers the linker's questions.
#[derive(Debug)]
pub(super) struct Names<'a> {
    objects: &'a Objects,
    target: &'a Object,
    memory: &'a Memory,
}

impl Resolver for Names<'_> {
    fn bias(&self) -> u64 {
        self.target.bias
    }

    fn import(&self, name: &str, version: Option<&str>) -> Option<Addr> {
        self.target.knows(name, self.memory).or_else(|| {
            let export = self.objects.export(name, version)?;
            if export.is_chosen {
                // Who uses it knows what was chosen.
                let all = || self.objects.0.iter();
                let chooser = |object: &Object| export.at.value().wrapping_sub(object.bias);
                let told = all().find_map(|object| object.knows(name, self.memory));
                return told.or_else(|| all().find_map(|object| object.has_chosen(chooser(object), self.memory)));
            }
            Some(export.at)
        })
    }

    fn thread_local(&self, variable: ThreadLocal<'_>) -> Option<ThreadPlace> {
        let ThreadLocal::Target { offset } = variable else { return None };
        if !self.target.is_executable {
            let (module, start) = self.target.thread_block(self.memory);
            let from_thread_pointer = start.map(|start| start.wrapping_add_unsigned(offset));
            // Without a module's number only code is possible that does not ask for it.
            let is_known = module.is_some() || from_thread_pointer.is_some();
            return is_known.then(|| ThreadPlace { module: module.unwrap_or(0), offset, from_thread_pointer });
        }
        // ELF TLS, variant II: the executable's block ends at the thread pointer, and it is module 1.
        let block_bytes = self.target.thread_block_bytes()?;
        let from_thread_pointer = offset.wrapping_sub(block_bytes).cast_signed();
        Some(ThreadPlace { module: 1, offset, from_thread_pointer: Some(from_thread_pointer) })
    }
}

const AT_PHDR: u64 = 3;
const AT_PHNUM: u64 = 5;

/// The executable's bias, where its program headers are, and where its dynamic section is.
fn executable(pid: Tid, memory: &Memory) -> io::Result<(u64, u64, Option<Addr>)> {
    const HEADER_BYTES: usize = 56;
    let auxiliary = auxiliary_vector(pid, Mode::Bits64)?;
    let word = |key: u64| auxiliary.get(&key).copied().unwrap_or(0);
    let at = word(AT_PHDR);
    let len_bytes = usize::try_from(word(AT_PHNUM)).unwrap_or(0).min(1 << 16) * HEADER_BYTES;
    let headers = memory.read_vec(Addr::new(at), len_bytes)?;
    let (mut bias, mut dynamic) = (0, None);
    for header in headers.chunks_exact(HEADER_BYTES) {
        let kind = header.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let address = header[16..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        match kind {
            6 => bias = at.wrapping_sub(address),
            2 => dynamic = Some(address),
            _ => {}
        }
    }
    Ok((bias, at, dynamic.map(|address| Addr::new(address.wrapping_add(bias)))))
}

/// All objects that the dynamic linker has loaded, in its order: bias, and where the dynamic section is. (`link.h`, `struct link_map`.)
fn link_map(memory: &Memory, dynamic: Addr) -> io::Result<Vec<(u64, u64)>> {
    const DT_DEBUG: u64 = 21;
    const LIMIT: usize = 1 << 16;
    let mut at = dynamic;
    let debug = loop {
        match memory.read_word(at)? {
            0 => return Ok(Vec::new()),
            DT_DEBUG => break memory.read_word(at.after(8))?,
            _ => at = at.after(16),
        }
    };
    let mut loaded = Vec::new();
    let mut next = if debug == 0 { 0 } else { memory.read_word(Addr::new(debug).after(8))? };
    while next != 0 && loaded.len() < LIMIT {
        let entry = Addr::new(next);
        loaded.push((memory.read_word(entry)?, memory.read_word(entry.after(16))?));
        next = memory.read_word(entry.after(24))?;
    }
    Ok(loaded)
}
