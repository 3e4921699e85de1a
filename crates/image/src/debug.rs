//! Symbols that were taken out of a file, and are somewhere else.
//!
//! Owns the search for them: a compressed file within the file (`.gnu_debugdata`), and separate debug files, by build-id and by name
//! (`.gnu_debuglink`). Neighbours: discovery reads the symbols of what is found here. Invariant: a separate file is used only if its build-id or its
//! checksum says that it belongs to this one. Source: GDB's manual, "Separate Debug Files" and "`MiniDebugInfo`".

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use crate::elf::Elf;

/// Where distributions put debug files.
const ROOT: &str = "/usr/lib/debug";

/// What a file within a file may grow to. Symbols of the largest programs take some megabytes.
const MAX_EMBEDDED_BYTES: u64 = 256 << 20;

/// The contents of the debug file of `elf`, which was read from `path`.
pub(crate) fn separate_file(elf: &Elf<'_>, path: &Path) -> Option<Vec<u8>> {
    by_build_id(elf, Path::new(ROOT)).or_else(|| by_link(elf, path, Path::new(ROOT)))
}

/// The file in `.gnu_debugdata`.
pub(crate) fn embedded_file(elf: &Elf<'_>) -> Option<Vec<u8>> {
    let compressed = elf.section(".gnu_debugdata")?.data;
    let mut bytes = Vec::new();
    let reader = lzma_rust2::XzReader::new(compressed, true);
    reader.take(MAX_EMBEDDED_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn by_build_id(elf: &Elf<'_>, root: &Path) -> Option<Vec<u8>> {
    let (first, rest) = elf.build_id?.split_first()?;
    let rest = rest.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    let bytes = fs::read(root.join(format!(".build-id/{first:02x}/{rest}.debug"))).ok()?;
    let belongs = Elf::parse(&bytes).is_ok_and(|other| other.build_id == elf.build_id);
    belongs.then_some(bytes)
}

fn by_link(elf: &Elf<'_>, path: &Path, root: &Path) -> Option<Vec<u8>> {
    let link = elf.section(".gnu_debuglink")?.data;
    let name = link.split(|byte| *byte == 0).next().filter(|name| !name.is_empty())?;
    let name = std::str::from_utf8(name).ok().filter(|name| !name.contains('/'))?;
    let checksum = u32::from_le_bytes(*link.get((name.len() + 1).next_multiple_of(4)..)?.first_chunk()?);
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let directory = path.parent().unwrap_or(Path::new("/"));
    let below_root: PathBuf = root.join(directory.strip_prefix("/").unwrap_or(directory));
    let places = [directory.to_owned(), directory.join(".debug"), below_root];
    let files = places.iter().map(|place| place.join(name)).filter(|file| *file != path);
    files.filter_map(|file| fs::read(file).ok()).find(|bytes| crc32fast::hash(bytes) == checksum)
}
