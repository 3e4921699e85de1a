//! What the unwind information says of code: where functions are, how their frames look, where exceptions land.
//!
//! Owns [`Frames`], a sorted list of the FDEs of a file. Neighbours: discovery takes starts and sizes from it, the [scan](crate::scan) the distance of
//! the stack pointer from the return address. Invariant: what cannot be read is not there; nothing else of the file depends on it. Source: DWARF 5
//! section 6.4, LSB 5.0 "Exception Frames", and GCC's `unwind-pe.h` for the table of landing places.

use std::collections::HashMap;

use gimli::{
    BaseAddresses, CallFrameInstruction, CieOrFde, DwEhPe, EhFrame, EhFrameHdr, EndianSlice, FrameDescriptionEntry,
    LittleEndian, Pointer, Reader, UnwindSection, constants,
};
use trapline_engine::Mode;

use crate::elf::Elf;

type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// The FDEs of a file.
pub(crate) struct Frames<'a> {
    section: EhFrame<Slice<'a>>,
    bases: BaseAddresses,
    mode: Mode,
    /// Sorted by start, each start once.
    entries: Vec<Frame<'a>>,
}

/// One FDE.
pub(crate) struct Frame<'a> {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Whether it is where a signal handler returns to.
    pub(crate) is_signal: bool,
    /// How the frame looks at its first instruction.
    pub(crate) entry: Cfa,
    /// Whether there is no return address at its first instruction.
    pub(crate) has_no_return: bool,
    entry_in_section: FrameDescriptionEntry<Slice<'a>>,
}

/// How the canonical frame address is found: the stack pointer before the call pushed the return address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cfa {
    /// A register, by its DWARF number, and what has to be added to it.
    Register(u16, i64),
    /// By a computation.
    Unknown,
}

impl Cfa {
    /// At the entry of a function that was called.
    pub(crate) fn at_entry(mode: Mode) -> Self {
        Self::Register(stack_pointer(mode), mode.word_bytes().into())
    }
}

/// The DWARF number of the stack pointer (psABI, "DWARF Register Number Mapping").
pub(crate) const fn stack_pointer(mode: Mode) -> u16 {
    match mode {
        Mode::Bits32 => 4,
        Mode::Bits64 => 7,
    }
}

/// The DWARF number of the frame pointer.
pub(crate) const fn frame_pointer(mode: Mode) -> u16 {
    match mode {
        Mode::Bits32 => 5,
        Mode::Bits64 => 6,
    }
}

const fn return_address(mode: Mode) -> u16 {
    match mode {
        Mode::Bits32 => 8,
        Mode::Bits64 => 16,
    }
}

impl<'a> Frames<'a> {
    /// Reads `.eh_frame`, which is found through its section or its lookup table.
    pub(crate) fn read(elf: &Elf<'a>) -> Self {
        let word_bytes = u8::try_from(elf.mode.word_bytes()).unwrap_or(8);
        let mut bases = BaseAddresses::default();
        if let Some(text) = elf.section(".text") {
            bases = bases.set_text(text.address);
        }
        if let Some(got) = elf.section(".got.plt").or_else(|| elf.section(".got")) {
            bases = bases.set_got(got.address);
        }
        let (address, bytes) = match elf.section(".eh_frame").filter(|section| !section.data.is_empty()) {
            Some(section) => (section.address, section.data),
            None => through_table(elf, &bases, word_bytes).unwrap_or((0, &[])),
        };
        let bases = bases.set_eh_frame(address);
        let mut section = EhFrame::new(bytes, LittleEndian);
        section.set_address_size(word_bytes);
        let mut frames = Self { section, bases, mode: elf.mode, entries: Vec::new() };
        frames.entries = frames.read_entries();
        frames.entries.sort_by_key(|frame| (frame.start, frame.end));
        frames.entries.dedup_by_key(|frame| frame.start);
        frames
    }

    /// By ascending start.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Frame<'a>> {
        self.entries.iter()
    }

    /// The one that covers `address`.
    pub(crate) fn at(&self, address: u64) -> Option<&Frame<'a>> {
        let index = self.entries.partition_point(|frame| frame.start <= address);
        self.entries[..index].last().filter(|frame| address < frame.end)
    }

    /// Where the rule for the CFA changes in `frame`, ascending, from its start on. Replaces what is in `rows`.
    pub(crate) fn rows(&self, frame: &Frame<'a>, rows: &mut Vec<(u64, Cfa)>) {
        rows.clear();
        let mut state = Cfa::Unknown;
        let mut remembered = Vec::new();
        let mut at = frame.start;
        let factor = frame.entry_in_section.cie().code_alignment_factor();
        let data_factor = frame.entry_in_section.cie().data_alignment_factor();
        self.each_instruction(frame, |instruction| {
            let before = (at, state);
            match instruction {
                CallFrameInstruction::AdvanceLoc { delta } => {
                    at = at.saturating_add(u64::from(*delta).saturating_mul(factor));
                }
                CallFrameInstruction::SetLoc { address } => at = *address,
                CallFrameInstruction::RememberState => remembered.push(state),
                CallFrameInstruction::RestoreState => state = remembered.pop().unwrap_or(Cfa::Unknown),
                _ => state = step(state, instruction, data_factor),
            }
            if before.0 != at {
                rows.push(before);
            }
            true
        });
        rows.push((at, state));
    }

    /// Where exceptions land that are thrown in `frame`.
    pub(crate) fn landing_places(&self, elf: &Elf<'_>, frame: &Frame<'a>, mut found: impl FnMut(u64)) {
        if let Some(Pointer::Direct(table)) = frame.entry_in_section.lsda()
            && table != 0
            && let Some(bytes) = elf.at(table)
        {
            let mut reader = EncodedReader {
                slice: EndianSlice::new(bytes, LittleEndian),
                start: table,
                len: bytes.len(),
                mode: self.mode,
            };
            let _ = landing_places(&mut reader, frame.start, &mut found);
        }
    }

    fn read_entries(&self) -> Vec<Frame<'a>> {
        let mut common = HashMap::new();
        let mut entries = self.section.entries(&self.bases);
        let mut found = Vec::new();
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let parsed = partial.parse(|section, bases, offset| {
                if let Some(known) = common.get(&offset) {
                    return Ok(Clone::clone(known));
                }
                let cie = section.cie_from_offset(bases, offset)?;
                common.insert(offset, cie.clone());
                Ok(cie)
            });
            let Ok(entry) = parsed else { continue };
            let (start, end) = (entry.initial_address(), entry.initial_address().saturating_add(entry.len()));
            // Linkers leave entries of discarded functions behind, at 0.
            if start == 0 || start == end {
                continue;
            }
            let mut frame = Frame {
                start,
                end,
                is_signal: entry.is_signal_trampoline(),
                entry: Cfa::Unknown,
                has_no_return: false,
                entry_in_section: entry,
            };
            let factor = frame.entry_in_section.cie().data_alignment_factor();
            let (mut cfa, mut has_no_return) = (Cfa::Unknown, false);
            self.each_instruction(&frame, |instruction| {
                match instruction {
                    CallFrameInstruction::AdvanceLoc { .. } | CallFrameInstruction::SetLoc { .. } => return false,
                    CallFrameInstruction::Undefined { register } => {
                        has_no_return |= register.0 == return_address(self.mode);
                    }
                    _ => cfa = step(cfa, instruction, factor),
                }
                true
            });
            (frame.entry, frame.has_no_return) = (cfa, has_no_return);
            found.push(frame);
        }
        found
    }

    /// The instructions of the common part and of `frame`, until `each` returns false in the latter.
    fn each_instruction(&self, frame: &Frame<'a>, mut each: impl FnMut(&CallFrameInstruction<usize>) -> bool) {
        let entry = &frame.entry_in_section;
        let mut common = entry.cie().instructions(&self.section, &self.bases);
        while let Ok(Some(instruction)) = common.next() {
            each(&instruction);
        }
        let mut own = entry.instructions(&self.section, &self.bases);
        while let Ok(Some(instruction)) = own.next() {
            if !each(&instruction) {
                break;
            }
        }
    }
}

/// The rule for the CFA after an instruction that is no advance.
fn step(state: Cfa, instruction: &CallFrameInstruction<usize>, data_factor: i64) -> Cfa {
    let register = match state {
        Cfa::Register(register, _) => Some(register),
        Cfa::Unknown => None,
    };
    let signed = |offset: u64| i64::try_from(offset).unwrap_or(i64::MAX);
    match instruction {
        CallFrameInstruction::DefCfa { register, offset } => Cfa::Register(register.0, signed(*offset)),
        CallFrameInstruction::DefCfaSf { register, factored_offset } => {
            Cfa::Register(register.0, factored_offset.wrapping_mul(data_factor))
        }
        CallFrameInstruction::DefCfaRegister { register } => match state {
            Cfa::Register(_, offset) => Cfa::Register(register.0, offset),
            Cfa::Unknown => Cfa::Unknown,
        },
        CallFrameInstruction::DefCfaOffset { offset } => {
            register.map_or(Cfa::Unknown, |register| Cfa::Register(register, signed(*offset)))
        }
        CallFrameInstruction::DefCfaOffsetSf { factored_offset } => {
            register.map_or(Cfa::Unknown, |register| Cfa::Register(register, factored_offset.wrapping_mul(data_factor)))
        }
        CallFrameInstruction::DefCfaExpression { .. } => Cfa::Unknown,
        _ => state,
    }
}

/// The section as its lookup table says: where it begins, and the rest of its segment.
fn through_table<'a>(elf: &Elf<'a>, bases: &BaseAddresses, word_bytes: u8) -> Option<(u64, &'a [u8])> {
    let address = elf.unwind_table?;
    let table = EhFrameHdr::new(elf.at(address)?, LittleEndian);
    let parsed = table.parse(&bases.clone().set_eh_frame_hdr(address), word_bytes).ok()?;
    let Pointer::Direct(start) = parsed.eh_frame_ptr() else { return None };
    Some((start, elf.at(start)?))
}

/// Reads what `unwind-pe.h` calls encoded values.
struct EncodedReader<'a> {
    slice: Slice<'a>,
    start: u64,
    len: usize,
    mode: Mode,
}

impl EncodedReader<'_> {
    fn value(&mut self, encoding: DwEhPe) -> gimli::Result<u64> {
        let at = self.start.wrapping_add((self.len - self.slice.len()) as u64);
        let raw = match encoding.format() {
            constants::DW_EH_PE_absptr if self.mode == Mode::Bits32 => self.slice.read_u32()?.into(),
            constants::DW_EH_PE_uleb128 => self.slice.read_uleb128()?,
            constants::DW_EH_PE_udata2 => self.slice.read_u16()?.into(),
            constants::DW_EH_PE_udata4 => self.slice.read_u32()?.into(),
            constants::DW_EH_PE_absptr | constants::DW_EH_PE_udata8 | constants::DW_EH_PE_sdata8 => {
                self.slice.read_u64()?
            }
            constants::DW_EH_PE_sleb128 => self.slice.read_sleb128()?.cast_unsigned(),
            constants::DW_EH_PE_sdata2 => i64::from(self.slice.read_i16()?).cast_unsigned(),
            constants::DW_EH_PE_sdata4 => i64::from(self.slice.read_i32()?).cast_unsigned(),
            _ => return Err(gimli::Error::UnknownPointerEncoding(encoding)),
        };
        Ok(match encoding.application() {
            constants::DW_EH_PE_pcrel => at.wrapping_add(raw),
            _ => raw,
        })
    }
}

fn landing_places(reader: &mut EncodedReader<'_>, function: u64, found: &mut impl FnMut(u64)) -> gimli::Result<()> {
    let base_encoding = DwEhPe(reader.slice.read_u8()?);
    let base = if base_encoding == constants::DW_EH_PE_omit { function } else { reader.value(base_encoding)? };
    if DwEhPe(reader.slice.read_u8()?) != constants::DW_EH_PE_omit {
        reader.slice.read_uleb128()?;
    }
    let encoding = DwEhPe(reader.slice.read_u8()?);
    let table_bytes = usize::try_from(reader.slice.read_uleb128()?).unwrap_or(usize::MAX);
    let bytes_behind = reader.slice.len().saturating_sub(table_bytes);
    while reader.slice.len() > bytes_behind {
        let (_start, _len) = (reader.value(encoding)?, reader.value(encoding)?);
        let landing = reader.value(encoding)?;
        reader.slice.read_uleb128()?;
        if landing != 0 {
            found(base.wrapping_add(landing));
        }
    }
    Ok(())
}
