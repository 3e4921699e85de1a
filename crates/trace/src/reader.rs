//! Reads a trace chunk by chunk, past whatever is damaged.
//!
//! Owns the [`Reader`], the [`Chunk`]s that it gives, and [`Damage`], which says what it could not. Memory is bounded by the longest chunk. Invariant: a chunk
//! is given only if both of its checksums are right; every byte of the file belongs to a chunk that was given or counted, or is counted as damage; and
//! a chunk of events that is missing in the middle of a stream shows, for those of a stream are numbered.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use trapline_abi::record::MAX_SITES;

use crate::{
    ClockPoint, End, Error, EventsChunk, Exit, Function, Load, Losses, Meta, Process, Stream, Unload,
    format::{
        self, FILE_HEADER_BYTES, HEAD_BYTES, MARKER, MAX_PAYLOAD_BYTES, VERSION, chunk_type, take_number, u32_at,
    },
};

/// How much is read at a time.
const READ_BYTES: usize = 1 << 20;

/// How far a chunk is looked for in a file that does not begin as a trace.
const SEARCH_BYTES: usize = 64 << 10;

/// A part of a trace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Chunk {
    /// Where and how the trace was recorded.
    Meta(Meta),
    /// A module.
    Module(ModuleHead),
    /// Some of the functions of a module.
    Functions(Functions),
    /// A process.
    Process(Process),
    /// A module was mapped.
    Load(Load),
    /// And unmapped.
    Unload(Unload),
    /// A thread.
    Stream(Stream),
    /// Events of a thread.
    Events(EventsChunk),
    /// What was lost so far.
    Losses(Losses),
    /// A process ended.
    Exit(Exit),
    /// Moments on two clocks.
    Calibration(Vec<ClockPoint>),
    /// The recorder was done.
    End(End),
    /// Something that a newer trapline writes.
    Unknown {
        /// Its type.
        chunk_type: u32,
    },
}

/// A module without its functions.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ModuleHead {
    /// The recorder's number for it.
    pub id: u32,
    /// Where it lies.
    pub path: String,
    /// What the linker called this build of it, in hexadecimal.
    pub build_id: Option<String>,
    /// The site of its first function.
    pub first_site: u32,
    /// How many functions it has.
    pub functions: u32,
}

/// Functions with sites in a row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Functions {
    /// Their module.
    pub module: u32,
    /// The first one's site.
    pub first_site: u32,
    /// The functions.
    pub functions: Vec<Function>,
}

/// What is wrong with a trace file, and how much that takes away.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Damage {
    /// Places where something else than the next chunk was found.
    pub places: u64,
    /// Bytes that belong to no chunk that could be read.
    pub skipped_bytes: u64,
    /// Where the first such place is, in bytes from the start of the file.
    pub first_at: Option<u64>,
    /// Chunks whose checksums are right, and whose content makes no sense.
    pub senseless_chunks: u64,
    /// Chunks of events that are missing, as far as it shows.
    pub missing_chunks: u64,
    /// Records in them.
    pub missing_records: u64,
    /// The end is there: the recorder was done, and nothing was cut off.
    pub is_finished: bool,
}

impl Damage {
    /// Whether the file is as it was written, though perhaps not finished.
    pub fn is_none(&self) -> bool {
        self.places == 0 && self.senseless_chunks == 0 && self.missing_chunks == 0
    }
}

/// Where a stream's next chunk should begin.
#[derive(Clone, Copy, Debug, Default)]
struct Expected {
    sequence: u32,
    records: u64,
}

/// A trace that is being read.
#[derive(Debug)]
pub struct Reader<R = File> {
    path: PathBuf,
    input: R,
    buffer: Vec<u8>,
    /// What of the buffer was dealt with.
    start: usize,
    /// Where in the file that is.
    offset: u64,
    at_end: bool,
    /// The previous chunk was bad, and the next one is looked for.
    is_lost: bool,
    streams: HashMap<u32, Expected>,
    records: u64,
    damage: Damage,
}

impl Reader<File> {
    /// Opens a trace.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Read`], [`Error::Empty`], [`Error::NotATrace`], [`Error::Newer`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let open = || {
            let file = File::open(path)?;
            // A folder can be opened, and not be read.
            if file.metadata()?.is_dir() { Err(io::ErrorKind::IsADirectory.into()) } else { Ok(file) }
        };
        let file = open().map_err(|source| Error::Open { path: path.into(), source })?;
        Self::new(file, path)
    }
}

impl<R: Read> Reader<R> {
    /// Reads a trace from anywhere; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Empty`], [`Error::NotATrace`], [`Error::Newer`].
    pub fn new(input: R, path: &Path) -> Result<Self, Error> {
        let mut reader = Self {
            path: path.into(),
            input,
            buffer: Vec::new(),
            start: 0,
            offset: 0,
            at_end: false,
            is_lost: false,
            streams: HashMap::new(),
            records: 0,
            damage: Damage::default(),
        };
        reader.header()?;
        Ok(reader)
    }

    /// What was found to be wrong so far.
    pub fn damage(&self) -> &Damage {
        &self.damage
    }

    /// Bytes read so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// A chunk that was given made no sense to the caller.
    pub fn report_senseless(&mut self) {
        self.damage.senseless_chunks += 1;
    }

    /// The next chunk, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>, Error> {
        loop {
            if self.fill(HEAD_BYTES)? < HEAD_BYTES {
                let rest = self.available();
                if rest > 0 {
                    self.skip_damage(rest);
                }
                return Ok(None);
            }
            let mut head = [0; HEAD_BYTES];
            head.copy_from_slice(&self.buffer[self.start..self.start + HEAD_BYTES]);
            let Some(head) = format::parse_head(&head) else {
                self.seek_marker();
                continue;
            };
            let len = HEAD_BYTES + head.length;
            if self.fill(len)? < len {
                self.seek_marker();
                continue;
            }
            let payload = &self.buffer[self.start + HEAD_BYTES..self.start + len];
            if crc32fast::hash(payload) != head.checksum {
                self.seek_marker();
                continue;
            }
            let chunk = parse_chunk(head.chunk_type, payload);
            self.is_lost = false;
            self.advance(len);
            match chunk {
                Some(Chunk::Events(mut chunk)) => {
                    self.check_sequence(&mut chunk);
                    return Ok(Some(Chunk::Events(chunk)));
                }
                Some(Chunk::End(end)) => {
                    self.damage.is_finished = true;
                    let seen = self.records.saturating_add(self.damage.missing_records);
                    self.damage.missing_records += end.records.saturating_sub(seen);
                    return Ok(Some(Chunk::End(end)));
                }
                Some(chunk) => return Ok(Some(chunk)),
                None => self.damage.senseless_chunks += 1,
            }
        }
    }

    /// Checks the file's header, and goes behind it.
    fn header(&mut self) -> Result<(), Error> {
        let found = self.fill(FILE_HEADER_BYTES)?;
        let begin = &self.buffer[..found.min(FILE_HEADER_BYTES)];
        if begin.is_empty() || (begin.len() < FILE_HEADER_BYTES && format::file_header().starts_with(begin)) {
            return Err(Error::Empty { path: self.path.clone() });
        }
        if let Some(version) = format::parse_file_header(begin) {
            self.advance(FILE_HEADER_BYTES);
            let is_known = version <= VERSION;
            return if is_known {
                Ok(())
            } else {
                Err(Error::Newer { path: self.path.clone(), found: version, known: VERSION })
            };
        }
        // The header may be damaged, and the rest may not be.
        let shown = String::from_utf8_lossy(begin).escape_debug().to_string();
        while self.offset < SEARCH_BYTES as u64 && self.fill(HEAD_BYTES)? == HEAD_BYTES {
            if self.is_chunk()? {
                return Ok(());
            }
            self.seek_marker();
        }
        Err(Error::NotATrace { path: self.path.clone(), found: format!("\"{shown}\"") })
    }

    /// Whether a whole chunk is next.
    fn is_chunk(&mut self) -> Result<bool, Error> {
        let mut head = [0; HEAD_BYTES];
        head.copy_from_slice(&self.buffer[self.start..self.start + HEAD_BYTES]);
        let Some(head) = format::parse_head(&head) else { return Ok(false) };
        let len = HEAD_BYTES + head.length;
        let is_whole = self.fill(len)? == len;
        Ok(is_whole && crc32fast::hash(&self.buffer[self.start + HEAD_BYTES..self.start + len]) == head.checksum)
    }

    /// Compares a chunk's number with the one that is due.
    fn check_sequence(&mut self, chunk: &mut EventsChunk) {
        let expected = self.streams.entry(chunk.stream).or_default();
        if chunk.sequence != expected.sequence {
            chunk.follows_gap = true;
            self.damage.missing_chunks += u64::from(chunk.sequence.saturating_sub(expected.sequence));
            self.damage.missing_records += chunk.records_before.saturating_sub(expected.records);
        }
        expected.sequence = chunk.sequence.wrapping_add(1);
        expected.records = chunk.records_before.saturating_add(u64::from(chunk.records));
        self.records = self.records.saturating_add(u64::from(chunk.records));
    }

    /// Goes on at the next marker behind this place, where something was wrong.
    fn seek_marker(&mut self) {
        let rest = &self.buffer[self.start + 1..];
        let found = rest.windows(MARKER.len()).position(|window| window == MARKER);
        // A marker may be cut by the buffer's end.
        let len = found.unwrap_or(rest.len().saturating_sub(MARKER.len() - 1)) + 1;
        self.skip_damage(len);
    }

    fn skip_damage(&mut self, len: usize) {
        if !self.is_lost {
            self.is_lost = true;
            self.damage.places += 1;
            self.damage.first_at.get_or_insert(self.offset);
        }
        self.damage.skipped_bytes += len as u64;
        self.advance(len);
    }

    fn available(&self) -> usize {
        self.buffer.len() - self.start
    }

    fn advance(&mut self, len: usize) {
        self.start += len;
        self.offset += len as u64;
    }

    /// Reads until `wanted` bytes are there or the file ends, and says how many there are, at most `wanted`.
    fn fill(&mut self, wanted: usize) -> Result<usize, Error> {
        if self.available() < wanted && !self.at_end {
            self.buffer.drain(..self.start);
            self.start = 0;
            let missing = wanted.max(READ_BYTES) - self.buffer.len();
            let read = (&mut self.input).take(missing as u64).read_to_end(&mut self.buffer);
            let read = read.map_err(|source| Error::Read { path: self.path.clone(), source })?;
            self.at_end = read < missing;
        }
        Ok(self.available().min(wanted))
    }
}

fn parse_chunk(chunk_type: u32, payload: &[u8]) -> Option<Chunk> {
    fn json<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Option<T> {
        serde_json::from_slice(payload).ok()
    }
    Some(match chunk_type {
        chunk_type::META => Chunk::Meta(json(payload)?),
        chunk_type::MODULE => Chunk::Module(json(payload)?),
        chunk_type::FUNCTIONS => Chunk::Functions(parse_functions(payload)?),
        chunk_type::PROCESS => Chunk::Process(json(payload)?),
        chunk_type::LOAD => Chunk::Load(json(payload)?),
        chunk_type::UNLOAD => Chunk::Unload(json(payload)?),
        chunk_type::STREAM => Chunk::Stream(json(payload)?),
        chunk_type::EVENTS => Chunk::Events(EventsChunk::parse(payload).ok()?),
        chunk_type::LOSSES => Chunk::Losses(json(payload)?),
        chunk_type::EXIT => Chunk::Exit(json(payload)?),
        chunk_type::CALIBRATION => Chunk::Calibration(json(payload)?),
        chunk_type::END => Chunk::End(json(payload)?),
        _ => Chunk::Unknown { chunk_type },
    })
}

fn parse_functions(payload: &[u8]) -> Option<Functions> {
    const FIXED_BYTES: usize = 16;
    if payload.len() < FIXED_BYTES {
        return None;
    }
    let [module, first_site, count, len] = [0, 4, 8, 12].map(|at| u32_at(payload, at));
    let len = usize::try_from(len).ok().filter(|len| *len <= MAX_PAYLOAD_BYTES)?;
    let bytes = zstd::bulk::decompress(&payload[FIXED_BYTES..], len).ok()?;
    let mut rest = bytes.as_slice();
    let mut functions = Vec::new();
    let mut address = 0_u64;
    for _ in 0..count {
        let signed = take_number(&mut rest)?;
        address = address.wrapping_add(signed >> 1 ^ (signed & 1).wrapping_neg());
        let size = take_number(&mut rest)?;
        let [name, untraced, detail] = [take_text(&mut rest)?, take_text(&mut rest)?, take_text(&mut rest)?];
        functions.push(Function {
            name,
            address,
            size,
            untraced: Some(untraced).filter(|text| !text.is_empty()),
            detail,
        });
    }
    let is_whole = rest.is_empty() && first_site.checked_add(count).is_some_and(|end| end <= MAX_SITES);
    is_whole.then_some(Functions { module, first_site, functions })
}

fn take_text(bytes: &mut &[u8]) -> Option<String> {
    let len = usize::try_from(take_number(bytes)?).ok()?;
    let (text, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(String::from_utf8_lossy(text).into_owned())
}
