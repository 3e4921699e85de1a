//! The ELF structures that an object has twice: in its file and in memory.
//!
//! Owns [`Segment`] and [`BuildId`], and how they are read from raw bytes. Neighbours: [`super::objects`] reads them from
//! memory, [`super::image`] from the file, and compares. Invariant: both sides go through the same code, so that a
//! difference is a difference of the objects. Source: gABI chapter 5 ("Program Header", "Note Section").

use std::fmt;

use object::{
    LittleEndian,
    elf::{self, FileHeader32, FileHeader64},
    pod,
    read::elf::{FileHeader, NoteIterator, ProgramHeader},
};
use trapline_engine::{Addr, AddrRange, Mode};

/// Byte order of every x86 object.
pub(super) const ENDIAN: LittleEndian = LittleEndian;

/// The file layouts of the two widths.
pub(super) type Elf32 = FileHeader32<LittleEndian>;
/// See [`Elf32`].
pub(super) type Elf64 = FileHeader64<LittleEndian>;

/// Where something is in memory that the file has at `address`, in an object loaded at `bias`. Wraps as the native width does.
pub(super) const fn relocated(bias: Addr, address: u64) -> Addr {
    in_native_width(bias.value().wrapping_add(address))
}

/// Where the file has something that is at `address` in memory: undoes [`relocated`].
pub(super) const fn in_file(bias: Addr, address: Addr) -> u64 {
    in_native_width(address.value().wrapping_sub(bias.value())).value()
}

const fn in_native_width(address: u64) -> Addr {
    match Mode::NATIVE {
        Mode::Bits32 => Addr::new(address & u32::MAX as u64),
        Mode::Bits64 => Addr::new(address),
    }
}

/// One program header, as far as discovery reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Segment {
    kind: elf::ProgramType,
    /// Address before the load bias is added.
    address: u64,
    len_bytes: u64,
    executable: bool,
    align_bytes: u64,
}

impl Segment {
    /// Reads program headers that lie side by side, in the layout of `mode`. A cut-off one at the end is left out.
    pub(super) fn read_all(mode: Mode, program_headers: &[u8]) -> Vec<Self> {
        match mode {
            Mode::Bits32 => Self::read_slice::<Elf32>(program_headers),
            Mode::Bits64 => Self::read_slice::<Elf64>(program_headers),
        }
    }

    fn read_slice<Elf: FileHeader<Endian = LittleEndian>>(program_headers: &[u8]) -> Vec<Self> {
        let count = program_headers.len() / size_of::<Elf::ProgramHeader>();
        let (headers, _) = pod::slice_from_bytes(program_headers, count).unwrap_or_default();
        Self::from_headers::<Elf>(headers)
    }

    pub(super) fn from_headers<Elf: FileHeader<Endian = LittleEndian>>(headers: &[Elf::ProgramHeader]) -> Vec<Self> {
        let segment = |header: &Elf::ProgramHeader| Self {
            kind: header.p_type(ENDIAN),
            address: header.p_vaddr(ENDIAN).into(),
            len_bytes: header.p_memsz(ENDIAN).into(),
            executable: header.p_flags(ENDIAN).contains(elf::PF_X),
            align_bytes: header.p_align(ENDIAN).into(),
        };
        headers.iter().map(segment).collect()
    }

    /// Where the segment lies in memory if its object is loaded at `bias`.
    pub(super) fn range(&self, bias: Addr) -> AddrRange {
        AddrRange::new(relocated(bias, self.address), self.len_bytes)
    }

    /// Whether the segment is mapped from the file, as `PT_LOAD`.
    pub(super) fn is_load(&self) -> bool {
        self.kind == elf::PT_LOAD
    }

    /// Whether the segment holds code.
    pub(super) fn is_text(&self) -> bool {
        self.is_load() && self.executable
    }

    /// Whether the segment is the lookup table of the unwind information.
    pub(super) fn is_unwind_table(&self) -> bool {
        self.kind == elf::PT_GNU_EH_FRAME
    }

    /// Whether the segment holds notes.
    pub(super) fn is_notes(&self) -> bool {
        self.kind == elf::PT_NOTE
    }

    /// The build-id among `notes`, which are this segment's contents.
    pub(super) fn build_id_in(&self, notes: &[u8]) -> Option<BuildId> {
        // The note header is the same in both widths, three 32-bit words; the alignment is 4 or 8 (then without a build-id).
        let align_bytes = u32::try_from(self.align_bytes).ok()?;
        let mut notes = NoteIterator::<Elf32>::new(ENDIAN, align_bytes, notes).ok()?;
        while let Ok(Some(note)) = notes.next() {
            if note.name() == elf::ELF_NOTE_GNU && note.n_type(ENDIAN) == elf::NT_GNU_BUILD_ID {
                return Some(BuildId(note.desc().to_vec()));
            }
        }
        None
    }
}

/// What the linker computed to tell builds apart: the descriptor of the `NT_GNU_BUILD_ID` note. Displayed in hexadecimal, as
/// `readelf -n` and debuginfod write it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BuildId(Vec<u8>);

impl BuildId {
    /// The bytes, usually 20 of them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
