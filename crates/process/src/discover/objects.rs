//! The objects that are loaded into this process.
//!
//! Owns [`LoadedObject`] and [`loaded_objects`]. Neighbours: the dynamic loader says what is mapped and where
//! ([`super::sys`]); site discovery takes one object at a time from here. Invariant: everything but the path comes from memory, so it
//! describes what runs, whatever has happened to the file since.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use trapline_engine::{Addr, AddrRange, Mode};

use super::{
    DiscoverError,
    elf::{BuildId, Segment, in_file},
    memory::Memory,
    sys,
};

/// An object (executable, shared library, vDSO) that is mapped into this process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LoadedObject {
    /// Its file, as the loader or else `/proc/self/maps` calls it. The file may be gone by now, or another one may be in its place.
    pub path: PathBuf,
    /// What was added to the addresses in the file: 0 for an executable that is not position-independent.
    pub bias: Addr,
    /// From the first byte of its lowest segment to the last of its highest. There may be holes inside.
    pub range: AddrRange,
    /// Its build-id, read from memory. `None` if it was linked without one.
    pub build_id: Option<BuildId>,
    /// What it is to the process.
    pub role: ObjectRole,
    pub(super) segments: Vec<Segment>,
}

/// What an object is to the process that it is loaded into.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ObjectRole {
    /// The main executable, whether static, position-independent, or neither.
    Executable,
    /// A shared object, loaded at start or with `dlopen`; the dynamic loader itself is one too.
    Library,
    /// The kernel's own object (`vdso(7)`). It has no file.
    Vdso,
}

impl LoadedObject {
    /// The last component of the path, for names of functions that have none.
    pub fn file_name(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        name.to_string_lossy().into_owned()
    }

    /// The address in the file's terms (before the bias is added), as `readelf` and `objdump` show it.
    pub(super) fn file_address(&self, address: Addr) -> u64 {
        in_file(self.bias, address)
    }

    /// The segment with code in which `address` lies.
    pub(super) fn text_around(&self, address: Addr) -> Option<AddrRange> {
        self.loads()
            .filter(|segment| segment.is_text())
            .map(|segment| segment.range(self.bias))
            .find(|text| text.contains(address))
    }

    /// Whether all of `range` was mapped from the file.
    pub(super) fn maps(&self, range: AddrRange) -> bool {
        self.loads().map(|segment| segment.range(self.bias)).any(|load| {
            let room = load.end.distance_from(range.start);
            load.contains(range.start) && u64::try_from(room).is_ok_and(|room_bytes| range.len_bytes() <= room_bytes)
        })
    }

    pub(super) fn loads(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.is_load())
    }
}

/// Everything that the dynamic loader has mapped, the main executable first, in load order.
///
/// Objects that were opened with `dlmopen` into a namespace of their own are not seen (`dl_iterate_phdr(3)`).
///
/// # Errors
/// [`DiscoverError::Memory`] if this process's own memory cannot be read.
pub fn loaded_objects() -> Result<Vec<LoadedObject>, DiscoverError> {
    let vdso = sys::vdso();
    let mut objects = Vec::new();
    for (index, loaded) in sys::loaded().into_iter().enumerate() {
        let segments = Segment::read_all(Mode::NATIVE, &loaded.program_headers);
        let Some(range) = load_range(&segments, loaded.bias) else { continue };
        let role = match vdso {
            Some(header) if range.contains(header) => ObjectRole::Vdso,
            _ if index == 0 => ObjectRole::Executable,
            _ => ObjectRole::Library,
        };
        // An object that is unloaded at this moment is none of the loaded ones.
        let build_id = match build_id_in_memory(&segments, loaded.bias) {
            Err(error) if error.is_unmapped() => continue,
            build_id => build_id?,
        };
        let path = path_of(&loaded.name, role, range);
        objects.push(LoadedObject { path, bias: loaded.bias, range, build_id, role, segments });
    }
    Ok(objects)
}

/// The smallest range that holds all `PT_LOAD` segments. `None` without any: nothing of such an object is in memory.
fn load_range(segments: &[Segment], bias: Addr) -> Option<AddrRange> {
    let loads = || segments.iter().filter(|segment| segment.is_load()).map(|segment| segment.range(bias));
    let start = loads().map(|range| range.start).min()?;
    let end = loads().map(|range| range.end).max()?;
    Some(AddrRange { start, end })
}

fn build_id_in_memory(segments: &[Segment], bias: Addr) -> Result<Option<BuildId>, DiscoverError> {
    for segment in segments.iter().filter(|segment| segment.is_notes()) {
        let notes = Memory::read(segment.range(bias))?;
        if let Some(build_id) = segment.build_id_in(&notes) {
            return Ok(Some(build_id));
        }
    }
    Ok(None)
}

/// The loader's name for the object where that is an absolute path. The main executable has the empty name, and a relative one
/// means nothing any more once the working directory has changed: those are looked up in the kernel's list of mappings.
fn path_of(name: &[u8], role: ObjectRole, range: AddrRange) -> PathBuf {
    let name = Path::new(OsStr::from_bytes(name));
    if role == ObjectRole::Vdso || name.is_absolute() {
        return name.to_path_buf();
    }
    let maps = fs::read("/proc/self/maps").unwrap_or_default();
    mapped_file(&maps, range.start).unwrap_or_else(|| name.to_path_buf())
}

/// The file that is mapped at `address` according to `maps`, in the format of `proc_pid_maps(5)`.
fn mapped_file(maps: &[u8], address: Addr) -> Option<PathBuf> {
    maps.split(|&byte| byte == b'\n').find_map(|line| {
        let (range, rest) = std::str::from_utf8(line).ok()?.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let parse = |text| u64::from_str_radix(text, 16).ok().map(Addr::new);
        let mapping = AddrRange { start: parse(start)?, end: parse(end)? };
        // Permissions, offset, device and inode stand before the path, which may contain spaces.
        let path = rest.splitn(5, ' ').nth(4)?.trim_start();
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        (mapping.contains(address) && path.starts_with('/')).then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
00400000-00401000 r--p 00000000 fd:00 131 /opt/a program/bin
00401000-00402000 r-xp 00001000 fd:00 131                                /opt/a program/bin
7f0000000000-7f0000001000 r--p 00000000 00:1a 99                         /tmp/x.so (deleted)
7f0000001000-7f0000002000 rw-p 00000000 00:00 0 \n7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0  [stack]
";

    #[test]
    fn mappings_name_their_file_without_the_mark_of_deletion() {
        let file = |address| mapped_file(MAPS, Addr::new(address));
        assert_eq!(file(0x40_0000), Some("/opt/a program/bin".into()));
        assert_eq!(file(0x40_1fff), Some("/opt/a program/bin".into()));
        assert_eq!(file(0x7f00_0000_0010), Some("/tmp/x.so".into()));
        assert_eq!(file(0x7f00_0000_1000), None, "anonymous memory");
        assert_eq!(file(0x7ffd_0000_0000), None, "the stack");
        assert_eq!(file(0x10), None, "unmapped");
    }

    #[test]
    fn the_process_lists_its_executable_first_and_the_vdso_without_a_file() {
        let objects = loaded_objects().expect("own memory is readable");
        let executable = &objects[0];
        assert_eq!(executable.role, ObjectRole::Executable);
        assert_eq!(executable.path, fs::read_link("/proc/self/exe").expect("procfs"));
        let here = Addr::new(loaded_objects as *const () as u64);
        assert!(executable.text_around(here).is_some(), "{here} in {executable:?}");
        assert!(executable.maps(AddrRange::new(here, 1)));
        assert!(!executable.maps(AddrRange::new(here, 1 << 40)));
        assert_eq!(objects.iter().filter(|object| object.role == ObjectRole::Executable).count(), 1);
        assert!(objects.iter().any(|object| object.file_name().starts_with("libc.so")), "{objects:?}");
        for vdso in objects.iter().filter(|object| object.role == ObjectRole::Vdso) {
            assert!(!vdso.path.is_absolute(), "{vdso:?}");
        }
    }
}
