//! The patch file: the bytes of a [`Patch`].
//!
//! Owns encoding and decoding, as docs/patch-format.md describes them. Neighbours: `build` hands patches in, whoever applies or shows them reads. Invariant: what
//! is decoded from any bytes whatsoever keeps the invariants of a [`Patch`], takes memory in proportion to the file, and encodes to the same bytes.

use trapline_engine::Mode;

use crate::{
    patch::{Callback, Function, Note, NoteKind, Patch, Pin, Place, Relocation, Role, Section, Symbol, Target, When},
    relocation,
};

const MAGIC: [u8; 8] = [0x8f, b't', b'p', b'a', b't', b'c', 0x0d, 0x0a];
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;
/// Larger ones have no place within the reach of jumps.
const MAX_LEN_BYTES: u64 = 1 << 30;
const MAX_ALIGN: u64 = 4096;

/// Why bytes are no patch.
#[derive(Clone, PartialEq, Eq, thiserror::Error, Debug)]
pub enum FormatError {
    /// They do not begin as a patch does.
    #[error("it is no trapline patch; `trapline patch build` makes one")]
    NoPatch,
    /// Made by a newer trapline.
    #[error("it has version {0} of the format, and this trapline knows 1; use the trapline that made it")]
    Version(u32),
    /// A checksum is wrong, or the file ends too early.
    #[error("it is damaged: {0}; build or copy it again")]
    Damaged(&'static str),
    /// The checksums are right and the contents contradict each other.
    #[error("it contradicts itself: {0}")]
    Contradiction(&'static str),
}

impl Patch {
    /// The bytes of the patch file.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::new());
        out.text(&self.name);
        out.text(&self.target.name);
        out.number(self.target.mode.bitness().into());
        out.bytes(&self.target.build_id);
        out.list(&self.sections, |out, section| {
            out.text(&section.name);
            out.text(&section.object);
            out.number(role_code(section.role));
            out.number(section.align);
            match section.role {
                Role::Zero => out.number(section.len_bytes),
                _ => out.bytes(&section.data),
            }
            out.list(&section.relocations, |out, relocation| {
                out.number(relocation.offset);
                out.number(relocation.kind.into());
                out.number(relocation.symbol.into());
                out.signed(relocation.addend);
            });
        });
        out.list(&self.symbols, |out, symbol| {
            out.text(&symbol.name);
            out.number(symbol.len_bytes);
            write_place(out, &symbol.place);
        });
        out.list(&self.functions, |out, function| {
            out.text(&function.name);
            out.text(&function.object);
            out.number(function.address);
            out.bytes(&function.expected);
            out.list(&function.parts, |out, part| {
                out.number(part.0);
                out.number(part.1);
            });
            out.number(function.symbol.into());
        });
        out.list(&self.pins, |out, pin| {
            out.text(&pin.name);
            out.number(pin.address);
            out.number(pin.len_bytes);
        });
        out.list(&self.callbacks, |out, callback| {
            out.number(code(&When::ALL, &callback.when));
            out.number(callback.symbol.into());
        });
        out.list(&self.notes, |out, note| {
            out.number(code(&NoteKind::ALL, &note.kind));
            out.text(&note.symbol);
            out.text(&note.object);
            out.text(&note.detail);
        });
        Self::with_checksums(&out.0)
    }

    /// The file with this payload, whatever that is. For tests of the reader, which is to refuse more than wrong checksums.
    #[doc(hidden)]
    pub fn with_checksums(payload: &[u8]) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.extend(VERSION.to_le_bytes());
        file.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
        file.extend(crc32fast::hash(payload).to_le_bytes());
        file.extend(crc32fast::hash(&file).to_le_bytes());
        file.extend(payload);
        file
    }

    /// Reads a patch file's bytes.
    ///
    /// # Errors
    /// They are no patch, of a newer version, damaged, or contradict themselves.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let header = bytes.get(..HEADER_BYTES).filter(|header| header.starts_with(&MAGIC));
        let Some(header) = header else {
            let is_cut = !bytes.is_empty() && (bytes.starts_with(&MAGIC) || MAGIC.starts_with(bytes));
            return Err(if is_cut { FormatError::Damaged("it ends in its header") } else { FormatError::NoPatch });
        };
        let word = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        if word(8) > VERSION {
            return Err(FormatError::Version(word(8)));
        }
        if word(20) != crc32fast::hash(&header[..20]) || word(8) != VERSION {
            return Err(FormatError::Damaged("the header's checksum is wrong"));
        }
        let payload = &bytes[HEADER_BYTES..];
        if payload.len() as u64 != u64::from(word(12)) {
            return Err(FormatError::Damaged("it is shorter or longer than it was"));
        }
        if crc32fast::hash(payload) != word(16) {
            return Err(FormatError::Damaged("the checksum is wrong"));
        }
        Self::read(payload)
    }

    fn read(payload: &[u8]) -> Result<Self, FormatError> {
        let mut from = Reader(payload);
        let name = from.text()?;
        let target = Target {
            name: from.text()?,
            mode: match from.number()? {
                32 => Mode::Bits32,
                64 => Mode::Bits64,
                _ => return Err(FormatError::Contradiction("its target is neither 32 nor 64 bit wide")),
            },
            build_id: from.bytes()?,
        };
        let patch = Self {
            name,
            target,
            sections: from.list(read_section)?,
            symbols: from
                .list(|from| Ok(Symbol { name: from.text()?, len_bytes: from.number()?, place: read_place(from)? }))?,
            functions: from.list(|from| {
                Ok(Function {
                    name: from.text()?,
                    object: from.text()?,
                    address: from.number()?,
                    expected: from.bytes()?,
                    parts: from.list(|from| Ok((from.number()?, from.number()?)))?,
                    symbol: from.narrow()?,
                })
            })?,
            pins: from
                .list(|from| Ok(Pin { name: from.text()?, address: from.number()?, len_bytes: from.number()? }))?,
            callbacks: from.list(|from| {
                let when = from.number()?;
                let when =
                    decoded(&When::ALL, when).ok_or(FormatError::Contradiction("an unknown kind of callback"))?;
                Ok(Callback { when, symbol: from.narrow()? })
            })?,
            notes: from.list(|from| {
                let kind = from.number()?;
                let kind =
                    decoded(&NoteKind::ALL, kind).ok_or(FormatError::Contradiction("an unknown kind of note"))?;
                Ok(Note { kind, symbol: from.text()?, object: from.text()?, detail: from.text()? })
            })?,
        };
        if !from.0.is_empty() {
            return Err(FormatError::Contradiction("something follows its last part"));
        }
        patch.check().map_err(FormatError::Contradiction)?;
        Ok(patch)
    }

    /// The invariants of a patch.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        if self.target.build_id.is_empty() {
            return Err("it names no build-id");
        }
        let mut total = 0_u64;
        for section in &self.sections {
            let is_zero = section.role == Role::Zero;
            if section.len_bytes != section.data.len() as u64 && !(is_zero && section.data.is_empty()) {
                return Err("a section is not as long as its bytes");
            }
            if !section.align.is_power_of_two() || section.align > MAX_ALIGN {
                return Err("a section's alignment is no power of two up to a page");
            }
            total = total.saturating_add(section.len_bytes).saturating_add(section.align);
            self.check_relocations(section)?;
        }
        if total > MAX_LEN_BYTES {
            return Err("it is larger than what jumps reach");
        }
        for symbol in &self.symbols {
            if let Place::Own { section, offset } = symbol.place
                && self.section(section).is_none_or(|section| offset > section.len_bytes)
            {
                return Err("a symbol lies outside of its section");
            }
        }
        for function in &self.functions {
            if !self.is_code(function.symbol) || function.expected.is_empty() {
                return Err("a function has no body");
            }
            let pieces = function.parts.iter().copied();
            for (start, len_bytes) in pieces.chain([(function.address, function.expected.len() as u64)]) {
                start.checked_add(len_bytes).ok_or("a function has no end")?;
            }
        }
        if self.functions.windows(2).any(|pair| pair[0].address >= pair[1].address) {
            return Err("its functions are not in order, or one is replaced twice");
        }
        if self.pins.iter().any(|pin| pin.address.checked_add(pin.len_bytes).is_none()) {
            return Err("a function has no end");
        }
        if self.callbacks.iter().any(|callback| !self.is_code(callback.symbol)) {
            return Err("a callback has no body");
        }
        Ok(())
    }

    fn check_relocations(&self, section: &Section) -> Result<(), &'static str> {
        let mut free = 0;
        for relocation in &section.relocations {
            let Some(meaning) = relocation::meaning(self.target.mode, relocation.kind) else {
                return Err("a relocation's type is not supported");
            };
            let end = relocation.offset.checked_add(meaning.width_bytes() as u64);
            if relocation.offset < free || end.is_none_or(|end| end > section.data.len() as u64) {
                return Err("a relocation lies outside of its section, or over another one");
            }
            free = end.unwrap_or(free);
            let Some(symbol) = self.symbols.get(relocation.symbol as usize) else {
                return Err("a relocation refers to no symbol");
            };
            let is_thread_local = match symbol.place {
                Place::TargetThreadLocal { .. } => true,
                Place::Import { is_thread_local, .. } => is_thread_local,
                _ => false,
            };
            if meaning.is_thread_local() != is_thread_local && meaning.needs_symbol() {
                return Err("a relocation's type does not fit what it refers to");
            }
        }
        Ok(())
    }

    fn section(&self, index: u32) -> Option<&Section> {
        self.sections.get(index as usize)
    }

    fn is_code(&self, symbol: u32) -> bool {
        let Some(Place::Own { section, offset }) = self.symbols.get(symbol as usize).map(|symbol| &symbol.place) else {
            return false;
        };
        self.section(*section).is_some_and(|section| section.role == Role::Code && *offset < section.len_bytes)
    }
}

fn read_section(from: &mut Reader<'_>) -> Result<Section, FormatError> {
    let (name, object) = (from.text()?, from.text()?);
    let role = match from.number()? {
        0 => Role::Code,
        1 => Role::ReadOnly,
        2 => Role::Unwind,
        3 => Role::Data,
        4 => Role::Zero,
        _ => return Err(FormatError::Contradiction("an unknown kind of section")),
    };
    let align = from.number()?;
    let data = if role == Role::Zero { Vec::new() } else { from.bytes()? };
    let len_bytes = if role == Role::Zero { from.number()? } else { data.len() as u64 };
    let relocations = from.list(|from| {
        Ok(Relocation { offset: from.number()?, kind: from.narrow()?, symbol: from.narrow()?, addend: from.signed()? })
    })?;
    Ok(Section { name, object, role, align, data, len_bytes, relocations })
}

fn write_place(out: &mut Writer, place: &Place) {
    match place {
        Place::Own { section, offset } => {
            out.number(0);
            out.number((*section).into());
            out.number(*offset);
        }
        Place::Target { address } => {
            out.number(1);
            out.number(*address);
        }
        Place::TargetThreadLocal { offset } => {
            out.number(2);
            out.number(*offset);
        }
        Place::Import { version, is_weak, is_thread_local } => {
            out.number(3);
            out.number(u64::from(*is_weak) | u64::from(*is_thread_local) << 1 | u64::from(version.is_some()) << 2);
            out.text(version.as_deref().unwrap_or_default());
        }
        Place::Table => out.number(4),
        Place::Absolute { value } => {
            out.number(5);
            out.number(*value);
        }
    }
}

fn read_place(from: &mut Reader<'_>) -> Result<Place, FormatError> {
    Ok(match from.number()? {
        0 => Place::Own { section: from.narrow()?, offset: from.number()? },
        1 => Place::Target { address: from.number()? },
        2 => Place::TargetThreadLocal { offset: from.number()? },
        3 => {
            let flags = from.number()?;
            let version = from.text()?;
            if flags > 7 || (flags & 4 == 0 && !version.is_empty()) {
                return Err(FormatError::Contradiction("an unknown kind of import"));
            }
            let version = (flags & 4 != 0).then_some(version);
            Place::Import { version, is_weak: flags & 1 != 0, is_thread_local: flags & 2 != 0 }
        }
        4 => Place::Table,
        5 => Place::Absolute { value: from.number()? },
        _ => return Err(FormatError::Contradiction("an unknown kind of symbol")),
    })
}

fn role_code(role: Role) -> u64 {
    match role {
        Role::Code => 0,
        Role::ReadOnly => 1,
        Role::Unwind => 2,
        Role::Data => 3,
        Role::Zero => 4,
    }
}

/// The number of one of `all`.
fn code<T: PartialEq>(all: &[T], one: &T) -> u64 {
    all.iter().position(|other| other == one).unwrap_or(all.len()) as u64
}

fn decoded<T: Copy>(all: &[T], number: u64) -> Option<T> {
    all.get(usize::try_from(number).ok()?).copied()
}

struct Writer(Vec<u8>);

impl Writer {
    /// LEB128.
    fn number(&mut self, mut value: u64) {
        loop {
            let low = value.to_le_bytes()[0] & 0x7f;
            value >>= 7;
            if value == 0 {
                self.0.push(low);
                return;
            }
            self.0.push(low | 0x80);
        }
    }

    /// Zigzag.
    fn signed(&mut self, value: i64) {
        self.number((value << 1 ^ value >> 63).cast_unsigned());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn list<T>(&mut self, list: &[T], write: impl Fn(&mut Self, &T)) {
        self.number(list.len() as u64);
        for one in list {
            write(self, one);
        }
    }
}

struct Reader<'a>(&'a [u8]);

const CUT: FormatError = FormatError::Contradiction("it ends within a part");

impl Reader<'_> {
    fn number(&mut self) -> Result<u64, FormatError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(CUT)?;
            self.0 = rest;
            let low = u64::from(byte & 0x7f);
            if low << shift >> shift != low || (shift > 0 && byte == 0) {
                break;
            }
            value |= low << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(FormatError::Contradiction("a number is too long"))
    }

    fn narrow(&mut self) -> Result<u32, FormatError> {
        u32::try_from(self.number()?).map_err(|_| FormatError::Contradiction("an index is too large"))
    }

    fn signed(&mut self) -> Result<i64, FormatError> {
        let value = self.number()?;
        Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    fn bytes(&mut self) -> Result<Vec<u8>, FormatError> {
        let len = usize::try_from(self.number()?).map_err(|_| CUT)?;
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(CUT)?;
        self.0 = rest;
        Ok(bytes.to_vec())
    }

    fn text(&mut self) -> Result<String, FormatError> {
        String::from_utf8(self.bytes()?).map_err(|_| FormatError::Contradiction("a name is not UTF-8"))
    }

    /// Every element takes at least a byte, so that a list is no longer than the file.
    fn list<T>(&mut self, mut read: impl FnMut(&mut Self) -> Result<T, FormatError>) -> Result<Vec<T>, FormatError> {
        let count = self.number()?;
        if count > self.0.len() as u64 {
            return Err(CUT);
        }
        (0..count).map(|_| read(self)).collect()
    }
}
