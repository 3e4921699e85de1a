//! What is mapped where while nothing moves: the extent of each stack, and which words may be code.
//!
//! [`MemoryMap::snapshot`] parses /proc/self/maps once a stop, into pages of its own. It stays true until the threads go on, except for what
//! the stopper task itself maps, which no thread's stack can be part of.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering},
};

use trapline_engine::{Addr, AddrRange};

use super::page_filter::PageFilter;
use crate::sys::{
    errno::Errno,
    maps::{self, Access, MapsLine},
    pages::PageVec,
    procfs,
};

/// Where the memory map is read from, opened by a thread of the process: "self" is another one for the stopper task.
#[derive(Debug)]
pub(super) struct MapsFile {
    file: File,
    first_stack_end: Option<Addr>,
}

impl MapsFile {
    /// The files of the calling process. Allocates.
    pub(super) fn open_own() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/maps")?, first_stack_end: first_stack_end() })
    }

    /// The files of another process.
    pub(super) fn open_other(tid: procfs::Tid) -> io::Result<Self> {
        let first_stack_end =
            fs::read_to_string(format!("/proc/{tid}/stat")).ok().and_then(|stat| start_of_stack(&stat));
        Ok(Self { file: File::open(format!("/proc/{tid}/maps"))?, first_stack_end })
    }
}

/// Where the stack of the calling process's first thread ends. Read once: it never changes, and the kernel looks at every thread to make the file.
fn first_stack_end() -> Option<Addr> {
    /// 0 until it is known. Relaxed: whoever finds it unknown reads the same. No lock, which a forked child could find taken.
    static KNOWN: AtomicU64 = AtomicU64::new(0);
    let known = KNOWN.load(Ordering::Relaxed);
    if known != 0 {
        return Some(Addr::new(known));
    }
    let end = start_of_stack(&fs::read_to_string("/proc/self/stat").ok()?)?;
    KNOWN.store(end.value(), Ordering::Relaxed);
    Some(end)
}

/// The field `startstack` of a `stat` file, the 28th (`proc_pid_stat(5)`): where the kernel put the arguments. 0 if we may not know.
fn start_of_stack(stat: &str) -> Option<Addr> {
    const FIELDS_BEHIND_NAME: usize = 28 - 3;
    let (_, behind_name) = stat.rsplit_once(") ")?;
    let address: u64 = behind_name.split(' ').nth(FIELDS_BEHIND_NAME)?.parse().ok()?;
    (address != 0).then(|| Addr::new(address))
}

/// Room for the mappings of most processes; it grows.
const USUAL_MAPPINGS: usize = 512;

/// One mapping, without its name.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    range: AddrRange,
    access: Access,
    inode: u64,
}

/// The mappings of the process.
pub(super) struct MemoryMap {
    /// Ascending and disjoint, as the kernel lists them.
    mappings: PageVec<Mapping>,
    /// The executable ones, adjacent ones joined, and their pages: asked about for every stack word.
    executable: PageVec<AddrRange>,
    executable_pages: PageFilter,
    /// Where the stack of the first thread ends. Above it are its arguments and the environment, any four letters of which are the address of 32-bit
    /// code.
    first_stack_end: Option<Addr>,
}

impl MemoryMap {
    /// Reads the memory map from its beginning.
    pub(super) fn snapshot(maps: &MapsFile) -> Result<Self, Errno> {
        let mut map = Self { first_stack_end: maps.first_stack_end, ..Self::empty()? };
        let maps = maps.file.as_fd();
        let mut buffer = PageVec::with_capacity(maps::LINE_BUFFER_BYTES)?;
        for _ in 0..maps::LINE_BUFFER_BYTES {
            buffer.push(0_u8)?;
        }
        procfs::rewind(maps)?;
        maps::for_each_line(&mut buffer, |piece| procfs::read(maps, piece), |line| map.push(line))?;
        Ok(map)
    }

    /// A map without mappings.
    pub(super) fn empty() -> Result<Self, Errno> {
        Ok(Self {
            mappings: PageVec::with_capacity(USUAL_MAPPINGS)?,
            executable: PageVec::with_capacity(1)?,
            executable_pages: PageFilter::empty(),
            first_stack_end: None,
        })
    }

    /// Adds a mapping above those that are there.
    pub(super) fn push(&mut self, line: MapsLine<'_>) -> Result<(), Errno> {
        let MapsLine { range, access, inode, .. } = line;
        self.mappings.push(Mapping { range, access, inode })?;
        if !access.is_executable() {
            return Ok(());
        }
        self.executable_pages.add(range);
        match self.executable.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.executable.push(range)?,
        }
        Ok(())
    }

    /// Whether `addr` may be code.
    pub(super) fn is_executable(&self, addr: Addr) -> bool {
        if !self.executable_pages.may_contain(addr) {
            return false;
        }
        let behind = self.executable.partition_point(|range| range.start <= addr);
        self.executable[..behind].last().is_some_and(|range| range.contains(addr))
    }

    /// The live part of the stack whose pointer is `sp`: from there to the end of the memory that a stack could consist of. `None` if `sp`
    /// is not in, or right behind, a mapping.
    ///
    /// The kernel splits a mapping whose pages are treated differently (mlock, madvise, mprotect to executable), so the stack is taken to
    /// go on in adjacent writable mappings of the same file, or of none. A pointer in an inaccessible mapping, as after an overflow
    /// into the guard page, belongs to the stack above it.
    pub(super) fn live_stack(&self, sp: Addr) -> Option<AddrRange> {
        // The mapping that holds sp; or, for a stack that is quite empty, the one that ends there.
        let index = self.mappings.partition_point(|mapping| mapping.range.end < sp);
        let holder = self.mappings.get(index).filter(|mapping| mapping.range.start <= sp)?;
        let next = self.mappings.get(index + 1).filter(|next| next.range.start == holder.range.end);
        let (first, start) = match next {
            // sp is the boundary of two mappings: it points at the second one's first word.
            Some(next) if holder.range.end == sp => (index + 1, next.range.start),
            Some(next) if !holder.access.is_readable() => (index + 1, next.range.start),
            _ => (index, sp),
        };
        let bottom = self.mappings.get(first)?;
        if !bottom.access.is_readable() {
            return None;
        }
        let continues = |(lower, upper): (&Mapping, &Mapping)| {
            lower.range.end == upper.range.start
                && upper.access.is_readable()
                && upper.access.is_writable()
                && upper.inode == bottom.inode
        };
        let rest = &self.mappings[first..];
        let further = rest.iter().zip(&rest[1..]).take_while(|pair| continues(*pair)).count();
        let end = rest[further].range.end;
        let arguments = self.first_stack_end.filter(|arguments| start < *arguments && *arguments < end);
        Some(AddrRange { start, end: arguments.unwrap_or(end) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> MemoryMap {
        let mut map = MemoryMap::empty().unwrap();
        for line in text.lines() {
            map.push(MapsLine::parse(line.trim().as_bytes()).unwrap()).unwrap();
        }
        map
    }

    fn live(map: &MemoryMap, sp: u64) -> Option<(u64, u64)> {
        map.live_stack(Addr::new(sp)).map(|range| (range.start.value(), range.end.value()))
    }

    #[test]
    fn a_stack_reaches_from_its_pointer_to_the_end_of_its_mapping() {
        let map = map("1000-2000 ---p 0 00:00 0
            2000-5000 rw-p 0 00:00 0
            6000-7000 rw-p 0 00:00 0");
        assert_eq!(live(&map, 0x2000), Some((0x2000, 0x5000)));
        assert_eq!(live(&map, 0x4ff8), Some((0x4ff8, 0x5000)));
        assert_eq!(live(&map, 0x5000), Some((0x5000, 0x5000)), "an empty stack");
        assert_eq!(live(&map, 0x5008), None, "not mapped");
        assert_eq!(live(&map, 0x800), None, "below everything");
        assert_eq!(live(&map, 0x7001), None, "above everything");
    }

    #[test]
    fn an_overflowed_stack_is_the_one_above_the_guard() {
        let map = map("1000-2000 ---p 0 00:00 0
            2000-5000 rw-p 0 00:00 0
            5000-6000 ---p 0 00:00 0");
        assert_eq!(live(&map, 0x1ff0), Some((0x2000, 0x5000)));
        assert_eq!(live(&map, 0x5800), None, "nothing above this guard");
    }

    #[test]
    fn a_stack_goes_on_across_a_split_but_not_into_other_files() {
        let map = map("1000-2000 rw-p 0 00:00 0
            2000-3000 rwxp 0 00:00 0
            3000-4000 rw-p 0 fe:00 9 /lib
            4000-5000 rw-p 0 fe:00 9 /lib
            5000-6000 r--p 0 fe:00 9 /lib");
        assert_eq!(live(&map, 0x1800), Some((0x1800, 0x3000)));
        assert_eq!(live(&map, 0x2000), Some((0x2000, 0x3000)), "at the boundary of the two halves");
        assert_eq!(live(&map, 0x3800), Some((0x3800, 0x5000)), "a stack in a mapped file");
    }

    #[test]
    fn the_first_thread_s_stack_ends_where_its_arguments_begin() {
        let mut map = map("2000-5000 rw-p 0 00:00 0 [stack]
            6000-7000 rw-p 0 00:00 0");
        map.first_stack_end = Some(Addr::new(0x4800));
        assert_eq!(live(&map, 0x2000), Some((0x2000, 0x4800)));
        assert_eq!(live(&map, 0x4900), Some((0x4900, 0x5000)), "somebody put a stack there");
        assert_eq!(live(&map, 0x6000), Some((0x6000, 0x7000)), "another thread's");
    }

    #[test]
    fn the_start_of_the_stack_is_found_behind_any_name() {
        let behind = "R 1 2 3 0 -1 4194304 95 0 0 0 0 0 0 0 20 0 1 0 12345 3 4 18446744073709551615 5 6 140721 0 0";
        assert_eq!(start_of_stack(&format!("7 (a) b) {behind}")), Some(Addr::new(140_721)));
        assert_eq!(start_of_stack(&format!("7 (a) {}", behind.replace("140721", "0"))), None, "not for us");
        assert_eq!(start_of_stack("7 (a) R 1"), None);
        let own = MapsFile::open_own().unwrap();
        let end = own.first_stack_end.expect("a process may know its own");
        assert!(MemoryMap::snapshot(&own).unwrap().live_stack(end).is_some());
    }

    #[test]
    fn only_executable_mappings_hold_code() {
        let map = map("1000-2000 r--p 0 fe:00 9 /lib
            2000-3000 r-xp 0 fe:00 9 /lib
            3000-4000 r-xp 0 fe:00 9 /lib
            7000-8000 --xp 0 00:00 0 [vsyscall]");
        for (addr, expected) in
            [(0x1fff, false), (0x2000, true), (0x3000, true), (0x3fff, true), (0x4000, false), (0x7000, true)]
        {
            assert_eq!(map.is_executable(Addr::new(addr)), expected, "{addr:#x}");
        }
    }

    #[test]
    fn the_own_process_is_read_whole() {
        let file = MapsFile::open_own().unwrap();
        let local = 0_u64;
        for _ in 0..2 {
            let map = MemoryMap::snapshot(&file).unwrap();
            let sp = Addr::new(&raw const local as u64);
            let stack = map.live_stack(sp).expect("the stack is mapped");
            assert!(stack.start == sp && stack.end > sp);
            assert!(map.is_executable(Addr::new(MemoryMap::snapshot as *const () as u64)));
            assert!(!map.is_executable(sp));
        }
    }
}
