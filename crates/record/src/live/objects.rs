//! What a process has loaded, and where its symbols are.
//!
//! Owns [`Objects`], in the order in which the dynamic linker looks symbols up, and [`Names`], which answers the linker's questions. What the target's own table of
//! addresses says comes first: it is what the dynamic linker found, also for functions that are chosen when the program starts.

use std::{fs, io, path::PathBuf};

use trapline_engine::{Addr, AddrRange, Mode};
use trapline_patch::{Resolver, Target, ThreadLocal, ThreadPlace};
use trapline_trace::hexadecimal;

use super::{
    LiveError,
    file::{ElfFile, Kind, Wanted},
};
use crate::sys::{Tid, auxiliary_vector, maps::Mapping, memory::Memory, width};

/// All objects of a process.
#[derive(Debug)]
pub(super) struct Objects(Vec<Object>);

/// An executable or library in a process.
#[derive(Debug)]
pub(super) struct Object {
    path: PathBuf,
    file: ElfFile,
    /// The process's.
    mode: Mode,
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
    pub(super) fn of(pid: Tid, mode: Mode, memory: &Memory, mappings: &[Mapping]) -> io::Result<Self> {
        let (bias, phdr, dynamic) = executable(pid, mode, memory)?;
        let mut loads = vec![(bias, None)];
        if let Some(dynamic) = dynamic {
            loads.extend(link_map(memory, mode, dynamic)?.into_iter().skip(1).map(|(bias, at)| (bias, Some(at))));
        }
        let objects = loads.into_iter().filter_map(|(bias, dynamic)| {
            let inside = Addr::new(dynamic.unwrap_or(phdr));
            let mapping = mappings.iter().find(|mapping| mapping.range.contains(inside) && mapping.inode != 0)?;
            Object::read(pid, mode, mappings, mapping, bias, dynamic.is_none())
        });
        Ok(Self(objects.collect()))
    }

    /// The one that a patch is for.
    pub(super) fn of_build(&self, target: &Target) -> Result<&Object, LiveError> {
        let wanted = hexadecimal(&target.build_id);
        if let Some(object) = self.0.iter().find(|object| object.file.build_id().as_deref() == Some(&target.build_id)) {
            return Ok(object);
        }
        let of_this_name = |object: &&Object| object.path.file_name().is_some_and(|name| *name == *target.name);
        let found = self.0.iter().find(of_this_name).or(self.0.first());
        let found = found.map_or_else(
            || "and the process has no file that can be read".to_owned(),
            |object| {
                let id = object.file.build_id().map_or_else(|| "none".to_owned(), |id| hexadecimal(&id));
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
        let address = object.in_file(at);
        let function = object.file.function_at(address).unwrap_or_else(|| format!("{address:#x}"));
        Some(format!("{function} ({})", object.name()))
    }
}

impl Object {
    fn read(
        pid: Tid,
        mode: Mode,
        mappings: &[Mapping],
        mapping: &Mapping,
        bias: u64,
        is_executable: bool,
    ) -> Option<Self> {
        let AddrRange { start, end } = mapping.range;
        // By this name also a file that was deleted is found, as after an update.
        let mapped = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", start.value(), end.value()));
        let bytes = mapping.file(pid).and_then(|path| fs::read(path).ok()).or_else(|| fs::read(mapped).ok())?;
        let its = || mappings.iter().filter(|other| other.inode == mapping.inode && other.path == mapping.path);
        let range = AddrRange { start: its().next()?.range.start, end: its().next_back()?.range.end };
        Some(Self { path: mapping.path.clone(), file: ElfFile::new(bytes), mode, bias, range, is_executable })
    }

    /// Its file's name.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its file.
    pub(super) fn file(&self) -> &ElfFile {
        &self.file
    }

    /// Where the process has what the file has at an address.
    pub(super) fn in_process(&self, address: u64) -> Addr {
        width::wrapped(self.mode, Addr::new(address.wrapping_add(self.bias)))
    }

    fn in_file(&self, at: Addr) -> u64 {
        width::wrapped(self.mode, Addr::new(at.value().wrapping_sub(self.bias))).value()
    }

    fn export(&self, name: &str, version: Option<&str>) -> Option<Export> {
        let found = self.file.export(name, version)?;
        Some(Export { at: self.in_process(found.address), is_chosen: found.is_chosen })
    }

    /// What the dynamic linker has filled in, by what it was asked for.
    fn filled_in(&self, memory: &Memory, is_wanted: impl Fn(&Wanted<'_>) -> bool) -> Option<(Addr, u64)> {
        self.file.filled_in(|wanted| {
            if !is_wanted(wanted) {
                return None;
            }
            let word = Addr::new(memory.read_pointer(self.mode, self.in_process(wanted.at)).ok()?);
            // A name of another object that still leads into this one is looked up at the first call.
            let is_open = word == Addr::default() || wanted.name.is_some() && self.range.contains(word);
            (!is_open).then(|| (word, wanted.own.unwrap_or(0).wrapping_add(wanted.addend)))
        })
    }

    /// Which function of a name its own code calls, if others may have one, too, and the dynamic linker decides. `None` if it does not.
    pub(super) fn chosen_among(&self, objects: &Objects, name: &str, memory: &Memory) -> Option<Addr> {
        let is_slot = |wanted: &Wanted<'_>| wanted.kind == Kind::Address && wanted.name == Some(name.as_bytes());
        self.file.filled_in(|wanted| is_slot(wanted).then_some(()))?;
        // At the first call it is the first one that there is.
        self.knows(name, memory).or_else(|| objects.export(name, None).map(|export| export.at))
    }

    /// What an object was told of a symbol of another object, unless that is to be found out at the first call.
    fn knows(&self, name: &str, memory: &Memory) -> Option<Addr> {
        let is_slot = |wanted: &Wanted<'_>| wanted.kind == Kind::Address && wanted.name == Some(name.as_bytes());
        self.filled_in(memory, is_slot).map(|(at, _)| at)
    }

    /// What a function of its own has chosen, that it uses itself: `chooser` is the file's address.
    fn has_chosen(&self, chooser: u64, memory: &Memory) -> Option<Addr> {
        let is_it = |wanted: &Wanted<'_>| wanted.kind == Kind::Chosen && wanted.addend == chooser;
        self.filled_in(memory, is_it).map(|(at, _)| at)
    }

    /// Where its thread-local variables are, as the dynamic linker has told its own code: the number of its module; the beginning of its block, seen from the thread pointer.
    fn thread_block(&self, memory: &Memory) -> (Option<u64>, Option<i64>) {
        let is_own = |wanted: &Wanted<'_>, kind| wanted.kind == kind && wanted.own.is_some();
        let module = self.filled_in(memory, |wanted| is_own(wanted, Kind::ThreadModule));
        let offset = self.filled_in(memory, |wanted| is_own(wanted, Kind::ThreadOffset));
        let start = offset.map(|(from_thread_pointer, in_block)| {
            width::number(self.mode, from_thread_pointer.value()).wrapping_sub_unsigned(in_block)
        });
        (module.map(|(module, _)| module.value()), start)
    }
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
                let chooser = |object: &Object| object.in_file(export.at);
                let told = all().find_map(|object| object.knows(name, self.memory));
                return told.or_else(|| all().find_map(|object| object.has_chosen(chooser(object), self.memory)));
            }
            Some(export.at)
        })
    }

    fn chooser(&self, name: &str, version: Option<&str>) -> Option<Addr> {
        self.objects.export(name, version).filter(|export| export.is_chosen).map(|export| export.at)
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
        let block_bytes = self.target.file.thread_block_bytes()?;
        let from_thread_pointer = offset.wrapping_sub(block_bytes).cast_signed();
        Some(ThreadPlace { module: 1, offset, from_thread_pointer: Some(from_thread_pointer) })
    }
}

const AT_PHDR: u64 = 3;
const AT_PHNUM: u64 = 5;

/// The executable's bias, where its program headers are, and where its dynamic section is.
fn executable(pid: Tid, mode: Mode, memory: &Memory) -> io::Result<(u64, u64, Option<Addr>)> {
    // Of a header: its length, and where in it the address is (`elf.h`, `Elf32_Phdr` and `Elf64_Phdr`).
    let (header_bytes, address_at) = match mode {
        Mode::Bits32 => (32, 8),
        Mode::Bits64 => (56, 16),
    };
    let auxiliary = auxiliary_vector(pid, mode)?;
    let word = |key: u64| auxiliary.get(&key).copied().unwrap_or(0);
    let at = word(AT_PHDR);
    let count = usize::try_from(word(AT_PHNUM)).unwrap_or(0).min(1 << 16);
    let headers = memory.read_vec(Addr::new(at), count * header_bytes)?;
    let (mut bias, mut dynamic) = (0, None);
    for header in headers.chunks_exact(header_bytes) {
        let kind = header.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let address = width::word_in(mode, &header[address_at..]);
        match kind {
            6 => bias = at.wrapping_sub(address),
            2 => dynamic = Some(address),
            _ => {}
        }
    }
    let moved = |address: u64| width::wrapped(mode, Addr::new(address.wrapping_add(bias)));
    Ok((bias, at, dynamic.map(moved)))
}

/// All objects that the dynamic linker has loaded, in its order: bias, and where the dynamic section is. (`link.h`, `struct link_map`.)
fn link_map(memory: &Memory, mode: Mode, dynamic: Addr) -> io::Result<Vec<(u64, u64)>> {
    const DT_DEBUG: u64 = 21;
    const LIMIT: usize = 1 << 16;
    let word_bytes = mode.word_bytes() as usize;
    let word = |at: Addr, index: usize| memory.read_pointer(mode, at.after(index * word_bytes));
    let mut at = dynamic;
    let debug = loop {
        match word(at, 0)? {
            0 => return Ok(Vec::new()),
            DT_DEBUG => break word(at, 1)?,
            _ => at = at.after(2 * word_bytes),
        }
    };
    let mut loaded = Vec::new();
    let mut next = if debug == 0 { 0 } else { word(Addr::new(debug), 1)? };
    while next != 0 && loaded.len() < LIMIT {
        let entry = Addr::new(next);
        loaded.push((word(entry, 0)?, word(entry, 2)?));
        next = word(entry, 3)?;
    }
    Ok(loaded)
}
