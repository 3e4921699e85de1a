//! The agent's way into a process that runs already: the recorder maps it, where the dynamic linker would.
//!
//! Owns [`Layout`], what of the agent's file goes where, [`ThreadRoom`], the states of the threads, and [`Gadgets`], the code of the process that makes
//! system calls before the agent is there. Nothing of the process is called: its threads may be in the allocator, in the dynamic linker, in a
//! handler, and hold any lock. The memory is no file's, so that no path has to be opened. Invariants: no page is ever writable and executable (I8): code is
//! written as ptrace writes; nothing is mapped where something is.

use std::io;

use object::{Endianness, FileKind, elf, read::elf::FileHeader};
use trapline_abi::agent::{INJECTED_THREAD_BYTES, INJECTED_THREAD_OFFSET};
use trapline_engine::{Addr, AddrRange, Mode};

use crate::{
    agent::Agent,
    remote::Remote,
    sys::{maps::Mapping, memory::Memory},
};

/// The agent's file as it lies in memory, from its first byte on.
#[derive(Debug)]
pub(crate) struct Layout {
    mode: Mode,
    /// All of it.
    pub(crate) len_bytes: u64,
    /// Where the part begins that can be written; it goes to the end.
    writable_at: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    /// Words that hold addresses: where, and how far from the first byte.
    addresses: Vec<(u64, u64)>,
}

const PAGE_BYTES: u64 = 4096;

impl Layout {
    /// Reads the agent's file; `None` if the linker has made something else of it than is expected.
    pub(crate) fn new(agent: &Agent) -> Option<Self> {
        let bytes = agent.bytes();
        match FileKind::parse(bytes).ok()? {
            FileKind::Elf32 => Self::read::<elf::FileHeader32<Endianness>>(bytes, Mode::Bits32),
            FileKind::Elf64 => Self::read::<elf::FileHeader64<Endianness>>(bytes, Mode::Bits64),
            _ => None,
        }
    }

    fn read<H: FileHeader<Endian = Endianness>>(bytes: &[u8], mode: Mode) -> Option<Self> {
        use object::read::elf::{ProgramHeader, SectionHeader};
        let header = H::parse(bytes).ok()?;
        let endian = header.endian().ok()?;
        let mut layout = Self { mode, len_bytes: 0, writable_at: u64::MAX, pieces: Vec::new(), addresses: Vec::new() };
        for segment in header.program_headers(endian, bytes).ok()? {
            if segment.p_type(endian) != elf::PT_LOAD {
                continue;
            }
            let (start, len_bytes): (u64, u64) = (segment.p_vaddr(endian).into(), segment.p_memsz(endian).into());
            let is_writable = segment.p_flags(endian).contains(elf::PF_W);
            if is_writable {
                layout.writable_at = layout.writable_at.min(start & !(PAGE_BYTES - 1));
            } else if layout.writable_at != u64::MAX {
                return None;
            }
            layout.len_bytes = layout.len_bytes.max((start + len_bytes).next_multiple_of(PAGE_BYTES));
            layout.pieces.push((start, segment.data(endian, bytes).ok()?.to_vec()));
        }
        if layout.writable_at == u64::MAX {
            return None;
        }
        for section in header.section_headers(endian, bytes).ok()? {
            match (mode, section.sh_type(endian)) {
                (Mode::Bits64, elf::SHT_RELA) => layout.relocate(section.data(endian, bytes).ok()?)?,
                (Mode::Bits32, elf::SHT_REL) => layout.relocate_narrow(section.data(endian, bytes).ok()?)?,
                _ => {}
            }
        }
        Some(layout)
    }

    /// Follows relocations: `Elf64_Rela`.
    fn relocate(&mut self, entries: &[u8]) -> Option<()> {
        for entry in entries.chunks_exact(24) {
            let word = |at: usize| entry[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            match elf::RelocationType(u32::try_from(word(8)).ok()?) {
                elf::R_X86_64_TPOFF64 => self.put(word(0), &(INJECTED_THREAD_OFFSET + word(16)).to_le_bytes())?,
                elf::R_X86_64_RELATIVE => self.addresses.push((word(0), word(16))),
                _ => return None,
            }
        }
        Some(())
    }

    /// The same: `Elf32_Rel`, whose addends stand where the addresses go, in code too.
    fn relocate_narrow(&mut self, entries: &[u8]) -> Option<()> {
        for entry in entries.chunks_exact(8) {
            let word = |at: usize| entry[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            if elf::RelocationType(word(4)) != elf::R_386_RELATIVE {
                return None;
            }
            let at = u64::from(word(0));
            let place = self.bytes_at(at, 4)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))?;
            self.addresses.push((at, place.into()));
        }
        Some(())
    }

    /// Where its code is, if it is mapped at `base`.
    pub(crate) fn code(&self, base: Addr) -> AddrRange {
        AddrRange::new(base, self.writable_at)
    }

    /// The two pieces that it is mapped in.
    pub(crate) fn ranges(&self, base: Addr) -> [AddrRange; 2] {
        let code = self.code(base);
        [code, AddrRange::new(code.end, self.len_bytes - self.writable_at)]
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> Option<()> {
        self.bytes_at(at, bytes.len())?.copy_from_slice(bytes);
        Some(())
    }

    fn bytes_at(&mut self, at: u64, len_bytes: usize) -> Option<&mut [u8]> {
        let has = |(start, piece): &&mut (u64, Vec<u8>)| (*start..*start + piece.len() as u64).contains(&at);
        let (start, piece) = self.pieces.iter_mut().find(has)?;
        let offset = usize::try_from(at - *start).ok()?;
        piece.get_mut(offset..offset + len_bytes)
    }

    /// Has a stopped thread map it at `base`.
    pub(crate) fn map(&self, remote: &mut Remote, memory: &Memory, base: Addr) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let at = |offset: u64| base.offset(offset.cast_signed());
        let (code, data) = (libc::PROT_READ | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE);
        remote.map(base, self.writable_at, code, flags, -1)?;
        remote.map(at(self.writable_at), self.len_bytes - self.writable_at, data, flags, -1)?;
        self.pieces_at(base).try_for_each(|(offset, bytes)| memory.write(at(offset), &bytes))
    }

    /// The pieces with their addresses filled in, for `base`.
    fn pieces_at(&self, base: Addr) -> impl Iterator<Item = (u64, Vec<u8>)> {
        let word_bytes = self.mode.word_bytes() as usize;
        self.pieces.iter().map(move |(start, piece)| {
            let mut piece = piece.clone();
            for (at, to) in &self.addresses {
                let offset = at.checked_sub(*start).and_then(|offset| usize::try_from(offset).ok());
                let place = offset.and_then(|offset| piece.get_mut(offset..offset + word_bytes));
                if let Some(place) = place {
                    place.copy_from_slice(&base.offset(to.cast_signed()).value().to_le_bytes()[..word_bytes]);
                }
            }
            (*start, piece)
        })
    }
}

/// Memory of the process that its threads have their states in, one piece each.
#[derive(Clone, Debug)]
pub(crate) struct ThreadRoom {
    /// Where it is.
    pub(crate) range: AddrRange,
    used: usize,
    free: Vec<Addr>,
}

impl ThreadRoom {
    /// More threads than Linux allows by default. Pages that nobody touches take no memory.
    pub(crate) const LEN_BYTES: u64 = (INJECTED_THREAD_BYTES as u64) << 16;

    /// Room at this address, all of it free.
    pub(crate) fn new(at: Addr) -> Self {
        Self { range: AddrRange::new(at, Self::LEN_BYTES), used: 0, free: Vec::new() }
    }

    /// Has a stopped thread map it.
    pub(crate) fn map(&self, remote: &mut Remote) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        remote.map(self.range.start, Self::LEN_BYTES, libc::PROT_READ | libc::PROT_WRITE, flags, -1).map(drop)
    }

    /// A pointer for a thread that has none, and its state as it is when a thread begins.
    pub(crate) fn take(&mut self, memory: &Memory) -> io::Result<Addr> {
        let next = || {
            let at = self.range.start.after(self.used * INJECTED_THREAD_BYTES);
            self.range.contains(at).then(|| {
                self.used += 1;
                at
            })
        };
        let at = self.free.pop().or_else(next).ok_or_else(|| io::Error::other("it has too many threads"))?;
        let mut state = [0; INJECTED_THREAD_BYTES];
        state[..8].copy_from_slice(&at.value().to_le_bytes());
        memory.write(at, &state)?;
        Ok(at)
    }

    /// The thread is gone.
    pub(crate) fn give_back(&mut self, at: Addr) {
        self.free.push(at);
    }
}

/// Code of a process, wherever it stands: bytes that mean this if execution begins at them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gadgets {
    /// A system call and `ret`.
    pub(crate) syscall_ret: Addr,
    /// What signal handlers return to.
    pub(crate) sigreturn: Addr,
    /// Of which code.
    pub(crate) mode: Mode,
}

const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// mov rax, 15; syscall.
const SIGRETURN: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];
/// int 0x80; pop ebp; pop edx; pop ecx; ret. The kernel's own code, by which the C library makes its calls, ends so (`arch/x86/entry/vdso/vdso32/system_call.S`).
const NARROW_SYSCALL_RET: &[u8] = &[0xcd, 0x80, 0x5d, 0x5a, 0x59, 0xc3];
/// mov eax, 173; int 0x80. Likewise.
const NARROW_SIGRETURN: &[u8] = &[0xb8, 0xad, 0, 0, 0, 0xcd, 0x80];

impl Gadgets {
    /// What they look like.
    fn patterns(mode: Mode) -> (&'static [u8], &'static [u8]) {
        match mode {
            Mode::Bits32 => (NARROW_SYSCALL_RET, NARROW_SIGRETURN),
            Mode::Bits64 => (SYSCALL_RET, SIGRETURN),
        }
    }

    /// How many words are taken off the stack between the system call and the `ret`.
    pub(crate) fn popped_words(self) -> i64 {
        match self.mode {
            Mode::Bits32 => 3,
            Mode::Bits64 => 0,
        }
    }

    /// Whether they are where they were: what they are in may have been unloaded.
    pub(crate) fn are_there(self, memory: &Memory) -> bool {
        let is = |at: Addr, what: &[u8]| memory.read_vec(at, what.len()).is_ok_and(|bytes| bytes == what);
        let (syscall_ret, sigreturn) = Self::patterns(self.mode);
        is(self.syscall_ret, syscall_ret) && is(self.sigreturn, sigreturn)
    }

    /// Looks for them in the code that a process has mapped, but not in ours.
    pub(crate) fn find(mode: Mode, memory: &Memory, mappings: &[Mapping], ours: &[AddrRange]) -> Option<Self> {
        let patterns = Self::patterns(mode);
        let (mut syscall_ret, mut sigreturn) = (None, None);
        let is_ours = |mapping: &Mapping| ours.iter().any(|range| range.contains(mapping.range.start));
        for mapping in mappings.iter().filter(|mapping| mapping.is_executable && !is_ours(mapping)) {
            let len_bytes = usize::try_from(mapping.range.len_bytes()).ok()?;
            let Ok(code) = memory.read_vec(mapping.range.start, len_bytes) else { continue };
            let find = |what: &[u8]| code.windows(what.len()).position(|bytes| bytes == what);
            let at = |offset: usize| mapping.range.start.after(offset);
            syscall_ret = syscall_ret.or_else(|| find(patterns.0).map(at));
            sigreturn = sigreturn.or_else(|| find(patterns.1).map(at));
            if let (Some(syscall_ret), Some(sigreturn)) = (syscall_ret, sigreturn) {
                return Some(Self { syscall_ret, sigreturn, mode });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_file_has_a_layout() {
        let injected = Agent::injected(Mode::Bits64).expect("it is always there");
        let layout = Layout::new(&injected).expect("a layout");
        assert!(layout.writable_at < layout.len_bytes && layout.writable_at.is_multiple_of(PAGE_BYTES));
        // The distance of the state from the thread pointer is in its configuration.
        let config = injected.symbol(trapline_abi::agent::symbol::CONFIG).expect("a symbol");
        let at = config + std::mem::offset_of!(trapline_abi::agent::Config, thread_offset) as u64;
        let (start, piece) = layout.pieces.iter().rfind(|(start, _)| *start <= at).expect("a piece");
        let offset = usize::try_from(at - start).expect("a small number");
        assert_eq!(piece[offset..offset + 8], INJECTED_THREAD_OFFSET.to_le_bytes());
    }

    #[test]
    fn addresses_of_32_bit_code_are_filled_in() {
        let layout = Layout::new(&Agent::injected(Mode::Bits32).expect("the compiler for i686")).expect("a layout");
        let (at, to) = layout.addresses[0];
        let base = Addr::new(0xf7c0_0000);
        let pieces: Vec<_> = layout.pieces_at(base).collect();
        let (start, piece) = pieces.iter().rfind(|(start, _)| *start <= at).expect("a piece");
        let offset = usize::try_from(at - start).expect("a small number");
        let filled = u32::from_le_bytes(*piece[offset..].first_chunk().expect("a word"));
        assert_eq!(u64::from(filled), base.value() + to);
        assert!(to < layout.len_bytes && layout.addresses.len() > 50);
    }

    #[test]
    fn every_process_has_the_code_that_makes_system_calls() {
        let own = std::process::id().cast_signed();
        let memory = Memory::open(own).expect("our own memory");
        let mappings = crate::sys::maps::read(own).expect("our own mappings");
        assert!(Gadgets::find(Mode::Bits64, &memory, &mappings, &[]).is_some());
    }
}
