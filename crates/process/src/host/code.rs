//! Memory for trampolines, within reach of the sites that call them.
//!
//! Owns [`CodeMemory`]: arenas of read-only executable pages and what is free in them. Their contents are written by the text writer, so no page is
//! ever writable and executable. Invariant: a block lies within 2 GiB of every address of the range that it was asked for, whichever end of either
//! is measured.

use std::{io, ptr};

use trapline_engine::{Addr, AddrRange};

use crate::{
    error::HostError,
    sys::maps::{self, Mapping},
};

/// What is mapped at a time.
const ARENA_BYTES: u64 = 64 * 1024;

/// How blocks are aligned: as function entries are.
const ALIGN_BYTES: u64 = 16;

/// What a 32-bit displacement reaches, less a little for the lengths of instructions.
const REACH_BYTES: i64 = (1 << 31) - (1 << 12);

/// No mapping is made below: the lowest pages are kept free by the kernel, and a null pointer with an offset should not find code.
const LOWEST: Addr = Addr::new(1 << 20);

/// Executable memory in the own process.
#[derive(Debug, Default)]
pub(super) struct CodeMemory {
    arenas: Vec<Arena>,
}

#[derive(Debug)]
struct Arena {
    range: AddrRange,
    /// Sorted by address; neighbours are merged.
    free: Vec<AddrRange>,
}

impl CodeMemory {
    /// A block of `len_bytes` that all of `near` reaches.
    pub(super) fn alloc(&mut self, near: AddrRange, len_bytes: usize) -> Result<Addr, HostError> {
        let len = (len_bytes as u64).next_multiple_of(ALIGN_BYTES);
        for arena in self.arenas.iter_mut().filter(|arena| is_within_reach(near, arena.range)) {
            if let Some(at) = arena.take(len) {
                return Ok(at);
            }
        }
        let mut arena = Arena::map(near, len.next_multiple_of(ARENA_BYTES))?;
        let at = arena.take(len).ok_or(HostError::NoMemoryWithinReach { near, len_bytes })?;
        self.arenas.push(arena);
        Ok(at)
    }

    /// Unmaps every arena. Nobody runs, or returns into, what is in them.
    pub(super) fn unmap(&mut self) {
        for arena in self.arenas.drain(..) {
            #[expect(clippy::cast_possible_truncation, reason = "addresses of the own process")]
            let (start, len) = (arena.range.start.value() as usize, arena.range.len_bytes() as usize);
            // SAFETY: the arena is a whole mapping of `map_at`'s, and the caller vouches that nobody uses it.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(start), len) };
        }
    }

    /// Gives back a block, by the range that was asked for.
    pub(super) fn free(&mut self, block: AddrRange) {
        let block = AddrRange::new(block.start, block.len_bytes().next_multiple_of(ALIGN_BYTES));
        if let Some(arena) = self.arenas.iter_mut().find(|arena| arena.range.contains(block.start)) {
            arena.give_back(block);
        }
    }
}

impl Arena {
    fn map(near: AddrRange, len: u64) -> Result<Self, HostError> {
        // Another thread may map at the same place before us: then the next gap is tried, and the map read again.
        for _ in 0..8 {
            let mappings = maps::read_own().map_err(HostError::Map)?;
            for start in gaps(&mappings, near, len) {
                match map_at(start, len) {
                    Ok(()) => {
                        let range = AddrRange::new(start, len);
                        return Ok(Self { range, free: vec![range] });
                    }
                    // Taken meanwhile, or below vm.mmap_min_addr.
                    Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EPERM)) => {}
                    Err(error) => return Err(HostError::Map(error)),
                }
            }
        }
        Err(HostError::NoMemoryWithinReach { near, len_bytes: usize::try_from(len).unwrap_or(usize::MAX) })
    }

    fn take(&mut self, len: u64) -> Option<Addr> {
        let index = self.free.iter().position(|free| free.len_bytes() >= len)?;
        let block = &mut self.free[index];
        let at = block.start;
        block.start = at.offset(len.cast_signed());
        if block.len_bytes() == 0 {
            self.free.remove(index);
        }
        Some(at)
    }

    fn give_back(&mut self, block: AddrRange) {
        let index = self.free.partition_point(|free| free.start < block.start);
        self.free.insert(index, block);
        // The new one with the one behind it, then the one before with the new one.
        for index in [Some(index), index.checked_sub(1)].into_iter().flatten() {
            if index + 1 < self.free.len() && self.free[index].end == self.free[index + 1].start {
                self.free[index].end = self.free[index + 1].end;
                self.free.remove(index + 1);
            }
        }
    }
}

fn is_within_reach(near: AddrRange, code: AddrRange) -> bool {
    // In 32-bit code displacements wrap: everything reaches everything.
    cfg!(target_pointer_width = "32")
        || code.end.distance_from(near.start).abs() < REACH_BYTES
            && near.end.distance_from(code.start).abs() < REACH_BYTES
}

/// Where `len` bytes can go within reach of `near`, nearest first.
fn gaps(mappings: &[Mapping], near: AddrRange, len: u64) -> Vec<Addr> {
    let len = len.cast_signed();
    let ends = std::iter::once(LOWEST).chain(mappings.iter().map(|mapping| mapping.range.end));
    let starts = mappings.iter().map(|mapping| mapping.range.start).chain([top_of_memory()]);
    let mut places = Vec::new();
    for (start, end) in ends.zip(starts) {
        if end.distance_from(start) < len {
            continue;
        }
        // At either end of the gap, a page away from the neighbour where there is room: the heap and stacks grow.
        places.extend([start, end.offset(-len)]);
        // And in the middle of a gap that reaches from in reach to out of reach.
        places.extend(
            [near.start.offset(-REACH_BYTES / 2), near.end.offset(REACH_BYTES / 2)]
                .map(page_of)
                .into_iter()
                .filter(|place| *place >= start && end.distance_from(*place) >= len),
        );
    }
    places.retain(|place| *place >= LOWEST && is_within_reach(near, AddrRange::new(*place, len.cast_unsigned())));
    places.sort_unstable_by_key(|place| place.distance_from(near.start).unsigned_abs());
    places.dedup();
    places
}

fn page_of(at: Addr) -> Addr {
    Addr::new(at.value() & !0xffff)
}

fn top_of_memory() -> Addr {
    // The highest user address of 4-level paging, and of a 32-bit process under a 64-bit kernel; a page short.
    Addr::new(if cfg!(target_pointer_width = "64") { 0x7fff_ffff_e000 } else { 0xffff_d000 })
}

fn map_at(start: Addr, len: u64) -> io::Result<()> {
    #[expect(clippy::cast_possible_truncation, reason = "addresses of the own process")]
    let (hint, len) = (ptr::with_exposed_provenance_mut(start.value() as usize), len as usize);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: MAP_FIXED_NOREPLACE refuses where something is mapped, so nothing that exists is touched.
    let mapped = unsafe { libc::mmap(hint, len, libc::PROT_READ | libc::PROT_EXEC, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    if mapped != hint {
        // A kernel before 4.17 takes the flag for a hint.
        // SAFETY: the mapping was made just now and nobody knows it.
        unsafe { libc::munmap(mapped, len) };
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near() -> AddrRange {
        let function = gaps as *const () as u64;
        AddrRange::new(Addr::new(function), 16)
    }

    #[test]
    fn blocks_are_within_reach_disjoint_and_reused() {
        let mut memory = CodeMemory::default();
        let blocks: Vec<AddrRange> =
            (1..200).map(|len| AddrRange::new(memory.alloc(near(), len).unwrap(), len as u64)).collect();
        for pair in blocks.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:?}");
            assert!(pair[1].start.distance_from(near().start).abs() < 1 << 31 || cfg!(target_pointer_width = "32"));
            assert_eq!(pair[1].start.value() % ALIGN_BYTES, 0);
        }
        // In an order that makes neighbours on either side.
        let (even, odd): (Vec<_>, Vec<_>) = blocks.iter().enumerate().partition(|(index, _)| index % 2 == 0);
        for (_, block) in even.into_iter().chain(odd) {
            memory.free(*block);
        }
        assert_eq!(memory.arenas.len(), 1);
        assert_eq!(memory.arenas[0].free, [memory.arenas[0].range], "all of it is one free block again");
        assert_eq!(memory.alloc(near(), 64).unwrap(), memory.arenas[0].range.start);
    }

    #[test]
    fn pages_are_never_writable() {
        let mut memory = CodeMemory::default();
        let at = memory.alloc(near(), 16).unwrap();
        let mappings = maps::read_own().unwrap();
        let mapping = mappings.iter().find(|mapping| mapping.range.contains(at)).unwrap();
        assert!(mapping.access.is_executable() && !mapping.access.is_writable());
    }

    #[test]
    #[cfg(target_pointer_width = "64")]
    fn a_full_neighbourhood_has_no_gap() {
        let near = AddrRange::new(Addr::new(0x5555_0000_0000), 0x1000);
        let all = AddrRange { start: LOWEST, end: top_of_memory() };
        let full = Mapping { range: all, ..Mapping::default() };
        assert!(gaps(&[full], near, ARENA_BYTES).is_empty());
        // A hole that is out of reach does not help, one that is within does.
        let hole = |at: u64| {
            let hole = AddrRange::new(Addr::new(at), ARENA_BYTES);
            let below = Mapping { range: AddrRange { start: all.start, end: hole.start }, ..Mapping::default() };
            let above = Mapping { range: AddrRange { start: hole.end, end: all.end }, ..Mapping::default() };
            gaps(&[below, above], near, ARENA_BYTES)
        };
        assert!(hole(0x5554_0000_0000).is_empty());
        assert_eq!(hole(0x5555_1000_0000), [Addr::new(0x5555_1000_0000)]);
    }
}
