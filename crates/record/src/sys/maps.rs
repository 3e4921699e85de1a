//! A target's mappings, from `/proc/PID/maps`.
//!
//! Owns [`Mapping`], and the search for a hole in the address space ([`find_hole`]).

use std::{fs, io, os::unix::fs::MetadataExt, path::PathBuf};

use trapline_engine::{Addr, AddrRange, Mode};

use super::{Tid, width};

/// One line of `/proc/PID/maps`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mapping {
    /// Where it lies.
    pub(crate) range: AddrRange,
    /// Whether code may run there.
    pub(crate) is_executable: bool,
    /// Whether it can be written, is no file's, and the process's own.
    pub(crate) is_private_memory: bool,
    /// Where in the file it begins, in bytes.
    pub(crate) offset: u64,
    /// The file's number in its file system; 0 for memory that is no file's.
    pub(crate) inode: u64,
    /// The file, or a name in brackets, or nothing.
    pub(crate) path: PathBuf,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let (permissions, rest) = rest.split_once(' ')?;
        let (offset, rest) = rest.split_once(' ')?;
        let (_device, rest) = rest.split_once(' ')?;
        let (inode, path) = rest.split_once(' ').unwrap_or((rest, ""));
        let inode = inode.parse().ok()?;
        Some(Self {
            range: AddrRange { start: Addr::new(hex(start)?), end: Addr::new(hex(end)?) },
            is_executable: permissions.as_bytes().get(2) == Some(&b'x'),
            is_private_memory: matches!(permissions.as_bytes(), [_, b'w', _, b'p']) && inode == 0,
            offset: hex(offset)?,
            inode,
            path: PathBuf::from(path.trim_start()),
        })
    }

    /// What will be mapped there.
    pub(crate) fn planned(range: AddrRange) -> Self {
        Self { range, is_executable: false, is_private_memory: false, offset: 0, inode: 0, path: PathBuf::new() }
    }

    /// A path by which we can open the very file that is mapped, be it in another root or mount namespace; `None` if that file is gone.
    pub(crate) fn file(&self, tid: Tid) -> Option<PathBuf> {
        let below_root = self.path.strip_prefix("/").ok()?;
        let in_its_root = PathBuf::from(format!("/proc/{tid}/root")).join(below_root);
        let is_it = |path: &PathBuf| fs::metadata(path).is_ok_and(|metadata| metadata.ino() == self.inode);
        [self.path.clone(), in_its_root].into_iter().find(is_it)
    }
}

/// All mappings of a thread's process, in order of their addresses.
pub(crate) fn read(tid: Tid) -> io::Result<Vec<Mapping>> {
    let text = fs::read(format!("/proc/{tid}/maps"))?;
    Ok(String::from_utf8_lossy(&text).lines().filter_map(Mapping::parse).collect())
}

/// Lowest address that programs are given.
const LOWEST: u64 = 0x1_0000;

/// How far a jump's displacement reaches, less some room for the jump itself.
const REACH_BYTES: u64 = (1 << 31) - (1 << 16);

/// Free space that is left above a hole's end, so that what grows downwards to it (the area of `mmap`) has room.
const MARGIN_BYTES: u64 = 1 << 20;

/// A page-aligned place for `len_bytes` that every address in `near` reaches: below `near` rather than above, where a program's heap grows.
pub(crate) fn find_hole(mode: Mode, mappings: &[Mapping], near: AddrRange, len_bytes: u64) -> Option<Addr> {
    let len_bytes = len_bytes.next_multiple_of(4096);
    let (lowest, highest) = match mode {
        // A displacement counts modulo 2^32.
        Mode::Bits32 => (LOWEST, width::end_of_memory(mode)),
        Mode::Bits64 => {
            let lowest = near.end.value().saturating_sub(REACH_BYTES).max(LOWEST);
            (lowest, near.start.value().saturating_add(REACH_BYTES).min(width::end_of_memory(mode)))
        }
    };
    let ends = mappings.iter().map(|mapping| mapping.range.end.value());
    let starts = mappings.iter().map(|mapping| mapping.range.start.value());
    let holes = std::iter::once(0).chain(ends).zip(starts.chain([1 << 47]));
    let places = holes.filter_map(|(start, end)| {
        let (start, end) = (start.max(lowest), end.min(highest));
        let room = end.checked_sub(start)?.checked_sub(len_bytes)?;
        // At the upper end of a hole that lies below, at the lower end of one that lies above; a margin to both sides where there is room.
        let margin = MARGIN_BYTES.min(room / 2) & !4095;
        let at = if end <= near.start.value() { end - margin - len_bytes } else { start + margin };
        Some(at & !4095)
    });
    places
        .min_by_key(|at| {
            let is_above = *at >= near.end.value();
            let distance = if is_above { at - near.end.value() } else { near.start.value() - at };
            (is_above, distance)
        })
        .map(Addr::new)
}

/// A place for memory that nobody needs to reach from anywhere, and that is too large to lie where others look for a place: the highest hole that has the room, far below its end.
pub(crate) fn find_room(mappings: &[Mapping], len_bytes: u64) -> Option<Addr> {
    const DISTANCE_BYTES: u64 = 4 * REACH_BYTES;
    let ends = mappings.iter().map(|mapping| mapping.range.end.value());
    let starts = mappings.iter().map(|mapping| mapping.range.start.value());
    let holes = std::iter::once(LOWEST).chain(ends).zip(starts);
    let places = holes.filter_map(|(start, end)| {
        // Above that are the kernel's.
        let end = end.min(1 << 47);
        let at = end.checked_sub(DISTANCE_BYTES)?.checked_sub(len_bytes)?;
        (at >= start.checked_add(DISTANCE_BYTES)?).then_some(at & !4095)
    });
    places.max().map(Addr::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, end: u64) -> Mapping {
        let range = AddrRange { start: Addr::new(start), end: Addr::new(end) };
        Mapping { range, is_executable: true, is_private_memory: false, offset: 0, inode: 0, path: PathBuf::new() }
    }

    #[test]
    fn room_is_found_in_the_highest_hole_that_has_it_and_out_of_the_way() {
        let mappings = [mapping(0x5555_0000_0000, 0x5555_0001_0000), mapping(0x7f00_0000_0000, 0x7f00_0001_0000)];
        let len_bytes = 1 << 37;
        let at = find_room(&mappings, len_bytes).unwrap();
        assert!(at.value() > 0x5555_0001_0000 && at.value() + len_bytes + 2 * REACH_BYTES < 0x7f00_0000_0000);
        assert_eq!(find_room(&mappings, 1 << 47), None);
    }

    #[test]
    fn a_line_is_read_with_spaces_in_its_path() {
        let line = "7f00000000-7f00001000 r-xp 00002000 fd:01 1234                       /usr/lib/a b.so (deleted)";
        let read = Mapping::parse(line).unwrap();
        assert_eq!(read.range, AddrRange { start: Addr::new(0x7f_0000_0000), end: Addr::new(0x7f_0000_1000) });
        assert!(read.is_executable);
        assert_eq!(
            (read.offset, read.inode, read.path.clone()),
            (0x2000, 1234, PathBuf::from("/usr/lib/a b.so (deleted)"))
        );
        let anonymous = Mapping::parse("10000-20000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((anonymous.is_executable, anonymous.path), (false, PathBuf::new()));
        assert!(anonymous.is_private_memory && !read.is_private_memory);
        assert_eq!(Mapping::parse("nonsense"), None);
    }

    #[test]
    fn a_hole_is_found_below_and_else_above() {
        let text = mapping(0x5555_0000_0000, 0x5555_0010_0000);
        let below = find_hole(Mode::Bits64, std::slice::from_ref(&text), text.range, 0x5000).unwrap();
        assert!(below < text.range.start && text.range.start.distance_from(below) < 0x20_0000, "{below}");
        let full = [mapping(0x1_0000, 0x40_0000), mapping(0x40_0000, 0x50_0000)];
        let above = find_hole(Mode::Bits64, &full, full[1].range, 0x5000).unwrap();
        assert!(above >= full[1].range.end && above.distance_from(full[1].range.end) <= 0x10_0000, "{above}");
    }

    #[test]
    fn a_hole_out_of_reach_is_none() {
        let near = AddrRange::new(Addr::new(0x5555_0000_0000), 0x1000);
        let everything = [mapping(0x5000_0000_0000, 0x5600_0000_0000)];
        assert_eq!(find_hole(Mode::Bits64, &everything, near, 0x1000), None);
    }

    #[test]
    fn a_32_bit_process_gets_nothing_that_it_cannot_reach() {
        let everything = [mapping(0, 0xff00_0000)];
        let near = AddrRange::new(Addr::new(0xf7f0_0000), 0x1000);
        let found = find_hole(Mode::Bits32, &everything, near, 0x1000).unwrap();
        assert!((0xff00_0000..0xffff_e000).contains(&found.value()), "{found}");
        assert_eq!(find_hole(Mode::Bits32, &everything, near, 0x100_0000), None);
        // 3 GiB away, which is 1 GiB in the other direction.
        let lower = [mapping(0x4000_0000, 0xffff_e000)];
        let found = find_hole(Mode::Bits32, &lower, AddrRange::new(Addr::new(0xffff_0000), 0x1000), 0x1000);
        assert!(found.is_some_and(|at| at < lower[0].range.start), "{found:?}");
    }
}
