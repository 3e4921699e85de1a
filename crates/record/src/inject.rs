//! The agent's way into a process that runs already: the recorder maps it, where the dynamic linker would.
//!
//! Owns [`Layout`], what of the agent's file goes where, [`ThreadRoom`], the states of the threads, and [`Gadgets`], the code of the process that makes
//! system calls before the agent is there. Nothing of the process is called: its threads may be in the allocator, in the dynamic linker, in a
//! handler, and hold any lock. The memory is no file's, so that no path has to be opened. Invariants: no page is ever writable and executable (I8): code is
//! written as ptrace writes; nothing is mapped where something is.

use std::io;

use object::{Endianness, elf, read::elf::FileHeader};
use trapline_abi::agent::{INJECTED_THREAD_BYTES, INJECTED_THREAD_OFFSET};
use trapline_engine::{Addr, AddrRange};

use crate::{
    agent::Agent,
    remote::Remote,
    sys::{maps::Mapping, memory::Memory},
};

/// The agent's file as it lies in memory, from its first byte on.
#[derive(Debug)]
pub(crate) struct Layout {
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
        const R_X86_64_RELATIVE: u64 = 8;
        const R_X86_64_TPOFF64: u64 = 18;
        use object::read::elf::{ProgramHeader, SectionHeader};
        let bytes = agent.bytes();
        let header = elf::FileHeader64::<Endianness>::parse(bytes).ok()?;
        let endian = header.endian().ok()?;
        let mut layout = Self { len_bytes: 0, writable_at: u64::MAX, pieces: Vec::new(), addresses: Vec::new() };
        for segment in header.program_headers(endian, bytes).ok()? {
            if segment.p_type(endian) != elf::PT_LOAD {
                continue;
            }
            let (start, len_bytes) = (segment.p_vaddr(endian), segment.p_memsz(endian));
            let is_writable = segment.p_flags(endian).contains(elf::PF_W);
            if is_writable {
                layout.writable_at = layout.writable_at.min(start & !(PAGE_BYTES - 1));
            } else if layout.writable_at != u64::MAX {
                return None;
            }
            layout.len_bytes = layout.len_bytes.max((start + len_bytes).next_multiple_of(PAGE_BYTES));
            layout.pieces.push((start, segment.data(endian, bytes).ok()?.to_vec()));
        }
        for section in header.section_headers(endian, bytes).ok()? {
            if section.sh_type(endian) != elf::SHT_RELA {
                continue;
            }
            for entry in section.data(endian, bytes).ok()?.chunks_exact(24) {
                let word = |at: usize| entry[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                match word(8) {
                    R_X86_64_TPOFF64 => layout.put(word(0), INJECTED_THREAD_OFFSET + word(16))?,
                    R_X86_64_RELATIVE => layout.addresses.push((word(0), word(16))),
                    _ => return None,
                }
            }
        }
        (layout.writable_at != u64::MAX).then_some(layout)
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

    fn put(&mut self, at: u64, word: u64) -> Option<()> {
        let (start, piece) =
            self.pieces.iter_mut().find(|(start, piece)| (*start..start + piece.len() as u64).contains(&at))?;
        let offset = usize::try_from(at - *start).ok()?;
        piece.get_mut(offset..offset + 8)?.copy_from_slice(&word.to_le_bytes());
        Some(())
    }

    /// Has a stopped thread map it at `base`.
    pub(crate) fn map(&self, remote: &mut Remote, memory: &Memory, base: Addr) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let at = |offset: u64| base.offset(offset.cast_signed());
        let (code, data) = (libc::PROT_READ | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE);
        remote.map(base, self.writable_at, code, flags, -1)?;
        remote.map(at(self.writable_at), self.len_bytes - self.writable_at, data, flags, -1)?;
        self.pieces.iter().try_for_each(|(offset, bytes)| memory.write(at(*offset), bytes))?;
        self.addresses.iter().try_for_each(|(offset, to)| memory.write_word(at(*offset), at(*to).value()))
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
    /// `syscall` and `ret`.
    pub(crate) syscall_ret: Addr,
    /// What signal handlers return to.
    pub(crate) sigreturn: Addr,
}

const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// mov rax, 15; syscall.
const SIGRETURN: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];

impl Gadgets {
    /// Whether they are where they were: what they are in may have been unloaded.
    pub(crate) fn are_there(self, memory: &Memory) -> bool {
        let is = |at: Addr, what: &[u8]| memory.read_vec(at, what.len()).is_ok_and(|bytes| bytes == what);
        is(self.syscall_ret, SYSCALL_RET) && is(self.sigreturn, SIGRETURN)
    }

    /// Looks for them in the code that a process has mapped, but not in ours.
    pub(crate) fn find(memory: &Memory, mappings: &[Mapping], ours: &[AddrRange]) -> Option<Self> {
        let (mut syscall_ret, mut sigreturn) = (None, None);
        let is_ours = |mapping: &Mapping| ours.iter().any(|range| range.contains(mapping.range.start));
        for mapping in mappings.iter().filter(|mapping| mapping.is_executable && !is_ours(mapping)) {
            let len_bytes = usize::try_from(mapping.range.len_bytes()).ok()?;
            let Ok(code) = memory.read_vec(mapping.range.start, len_bytes) else { continue };
            let find = |what: &[u8]| code.windows(what.len()).position(|bytes| bytes == what);
            let at = |offset: usize| mapping.range.start.after(offset);
            syscall_ret = syscall_ret.or_else(|| find(SYSCALL_RET).map(at));
            sigreturn = sigreturn.or_else(|| find(SIGRETURN).map(at));
            if let (Some(syscall_ret), Some(sigreturn)) = (syscall_ret, sigreturn) {
                return Some(Self { syscall_ret, sigreturn });
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
        let layout = Layout::new(&Agent::injected()).expect("a layout");
        assert!(layout.writable_at < layout.len_bytes && layout.writable_at.is_multiple_of(PAGE_BYTES));
        // The distance of the state from the thread pointer is in its configuration.
        let config = Agent::injected().symbol(trapline_abi::agent::symbol::CONFIG).expect("a symbol");
        let at = config + std::mem::offset_of!(trapline_abi::agent::Config, thread_offset) as u64;
        let (start, piece) = layout.pieces.iter().rfind(|(start, _)| *start <= at).expect("a piece");
        let offset = usize::try_from(at - start).expect("a small number");
        assert_eq!(piece[offset..offset + 8], INJECTED_THREAD_OFFSET.to_le_bytes());
    }

    #[test]
    fn every_process_has_the_code_that_makes_system_calls() {
        let own = std::process::id().cast_signed();
        let memory = Memory::open(own).expect("our own memory");
        let mappings = crate::sys::maps::read(own).expect("our own mappings");
        assert!(Gadgets::find(&memory, &mappings, &[]).is_some());
    }
}
