//! Writes a trace while it is recorded.
//!
//! Owns the [`Writer`]. The recorder tells it of processes, modules and streams, each before the first event that needs it, and hands it records as it
//! drains them. Invariant: what a call has written is in the file when it returns, nothing waits in a buffer, so a recorder that is killed leaves all that it
//! had drained; and a chunk that could be written only in part is cut off again.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    Batch, ClockPoint, Encoded, Encoder, End, Error, Exit, Function, Load, Losses, MAX_RECORDS, Meta, Module, Position,
    Process, Stream, Unload,
    format::{self, HEAD_BYTES, MAX_PAYLOAD_BYTES, chunk_type, events_header as field, put_number},
};

/// Functions in one chunk at most. Damage to a chunk loses their names.
const FUNCTIONS_PER_CHUNK: usize = 4096;

/// Bytes of functions in one chunk before compression at most, but for the last function's name.
const FUNCTION_BYTES: usize = 512 << 10;

/// Longer names and details are cut: a mangled name can be a megabyte.
const MAX_NAME_BYTES: usize = 64 << 10;

/// Of zstd, for names.
const NAMES_LEVEL: i32 = 1;

/// A trace that is being written.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    /// The file's length, up to which all is well.
    len_bytes: u64,
    seekable: bool,
    streams: HashMap<u32, Progress>,
    encoder: Encoder,
    end: End,
    torn: u64,
    unwritten: u64,
}

/// What was written of a stream.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    chunks: u32,
    records: u64,
    /// Records that could not be written since.
    lost: u64,
}

/// A module's chunk: what [`Module`] tells, without the functions.
#[derive(Serialize)]
struct ModuleHead<'a> {
    id: u32,
    path: &'a str,
    build_id: Option<String>,
    first_site: u32,
    functions: u32,
}

impl Writer {
    /// Makes a trace file that only its owner may read. A file of this name is kept: its name gets `.old` appended, and what had that name goes.
    ///
    /// # Errors
    /// [`Error::KeepOld`], [`Error::Create`], [`Error::Write`].
    pub fn create(path: &Path, meta: &Meta) -> Result<Self, Error> {
        if fs::symlink_metadata(path).is_ok_and(|found| found.is_file()) {
            let mut old = path.as_os_str().to_owned();
            old.push(".old");
            let old = PathBuf::from(old);
            fs::rename(path, &old).map_err(|source| Error::KeepOld { path: path.into(), old, source })?;
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| Error::Create { path: path.into(), source })?;
        let seekable = file.metadata().is_ok_and(|found| found.is_file());
        let mut writer = Self {
            path: path.into(),
            file,
            len_bytes: 0,
            seekable,
            streams: HashMap::new(),
            encoder: Encoder::new()?,
            end: End::default(),
            torn: 0,
            unwritten: 0,
        };
        writer.write_all(&[&format::file_header()])?;
        writer.json(chunk_type::META, meta)?;
        Ok(writer)
    }

    /// Where the trace is written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How long the file is so far.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Calls in the file so far.
    pub fn calls(&self) -> u64 {
        self.end.calls
    }

    /// Records in the file so far.
    pub fn records(&self) -> u64 {
        self.end.records
    }

    /// A module, before any event of its functions and before it is [loaded](Self::load).
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn module(&mut self, module: &Module<'_>) -> Result<(), Error> {
        let head = ModuleHead {
            id: module.id,
            path: module.path,
            build_id: module.build_id.map(hexadecimal),
            first_site: module.first_site,
            functions: len_u32(module.functions.len()),
        };
        self.json(chunk_type::MODULE, &head)?;
        let mut first = 0;
        while first < module.functions.len() {
            let mut bytes = Vec::new();
            let mut count = 0;
            let mut address = 0;
            for function in module.functions[first..].iter().take(FUNCTIONS_PER_CHUNK) {
                put_function(&mut bytes, function, &mut address);
                count += 1;
                if bytes.len() >= FUNCTION_BYTES {
                    break;
                }
            }
            let mut payload = Vec::new();
            for number in [module.id, module.first_site + len_u32(first), count, len_u32(bytes.len())] {
                payload.extend_from_slice(&number.to_le_bytes());
            }
            payload.extend(zstd::bulk::compress(&bytes, NAMES_LEVEL).map_err(Error::Compress)?);
            self.chunk(chunk_type::FUNCTIONS, &payload)?;
            first += count as usize;
        }
        Ok(())
    }

    /// A process, before its streams.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn process(&mut self, process: &Process) -> Result<(), Error> {
        self.json(chunk_type::PROCESS, process)
    }

    /// A module is mapped in a process.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn load(&mut self, load: &Load) -> Result<(), Error> {
        self.json(chunk_type::LOAD, load)
    }

    /// A module is mapped no more.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn unload(&mut self, unload: &Unload) -> Result<(), Error> {
        self.json(chunk_type::UNLOAD, unload)
    }

    /// A thread, before its events. Told once more, the later name counts.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn stream(&mut self, stream: &Stream) -> Result<(), Error> {
        self.json(chunk_type::STREAM, stream)
    }

    /// Events of a stream, in the order in which the thread wrote them: encodes and [writes](Self::write) them. `near_tsc` is a time near the first
    /// record's, `depth` the number of frames that were open before it, `lost_before` counts the stream's records that were lost between the previous
    /// call and this one. Returns where the records end, for a call with those that follow.
    ///
    /// # Errors
    /// [`Error::Write`], [`Error::Compress`]. The records are counted as lost then, and the writer can be used on.
    pub fn events(
        &mut self,
        stream: u32,
        near_tsc: u64,
        depth: u32,
        lost_before: u64,
        records: &[u64],
    ) -> Result<Position, Error> {
        let mut start = Position { tsc: near_tsc, depth };
        let mut lost_before = lost_before;
        if records.is_empty() {
            // They were lost before the next ones.
            self.streams.entry(stream).or_default().lost += lost_before;
        }
        for records in records.chunks(MAX_RECORDS) {
            let encoded = match self.encoder.encode(&Batch { stream, start, lost_before, records }) {
                Ok(encoded) => encoded,
                Err(error) => {
                    self.streams.entry(stream).or_default().lost += lost_before + records.len() as u64;
                    self.unwritten += records.len() as u64;
                    return Err(error);
                }
            };
            start = encoded.end;
            lost_before = 0;
            self.write(encoded)?;
        }
        Ok(start)
    }

    /// Writes what an [`Encoder`] has made. The chunks of a stream have to come in order.
    ///
    /// # Errors
    /// [`Error::Write`]. The records are counted as lost then.
    pub fn write(&mut self, mut encoded: Encoded) -> Result<(), Error> {
        self.torn += u64::from(encoded.torn);
        let progress = self.streams.entry(encoded.stream).or_default();
        if encoded.records == 0 {
            // Nothing to read; what was lost before it was lost before the next one.
            progress.lost += encoded.lost_before;
            return Ok(());
        }
        let lost = progress.lost + encoded.lost_before;
        let payload = &mut encoded.payload;
        payload[field::SEQUENCE..][..4].copy_from_slice(&progress.chunks.to_le_bytes());
        payload[field::RECORDS_BEFORE..][..8].copy_from_slice(&progress.records.to_le_bytes());
        payload[field::LOST_BEFORE..][..8].copy_from_slice(&lost.to_le_bytes());
        let written = self.chunk(chunk_type::EVENTS, &encoded.payload);
        let progress = self.streams.entry(encoded.stream).or_default();
        if written.is_err() {
            progress.lost = lost + u64::from(encoded.records);
            self.unwritten += u64::from(encoded.records);
            return written;
        }
        progress.lost = 0;
        progress.chunks += 1;
        progress.records += u64::from(encoded.records);
        self.end.event_chunks += 1;
        self.end.records += u64::from(encoded.records);
        self.end.calls += u64::from(encoded.calls);
        Ok(())
    }

    /// A stream that gets no more events: what the writer knows of it is forgotten.
    pub fn forget_stream(&mut self, stream: u32) {
        self.streams.remove(&stream);
    }

    /// What was lost so far, in the whole trace. What the writer itself has found torn or could not write is added.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn losses(&mut self, losses: &Losses) -> Result<(), Error> {
        self.json(chunk_type::LOSSES, &self.with_own(losses))
    }

    /// `losses`, and those that the writer has counted itself.
    #[must_use]
    pub fn with_own(&self, losses: &Losses) -> Losses {
        let mut losses = losses.clone();
        losses.torn += self.torn;
        losses.unwritten += self.unwritten;
        losses
    }

    /// A process has ended. `status` is as `wait` gives it.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn exit(&mut self, process: u32, status: Option<i32>, tsc: u64) -> Result<(), Error> {
        self.json(chunk_type::EXIT, &Exit { process, status, tsc })
    }

    /// Moments on both clocks: at least one at the start and one at the end, the further apart the better.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn calibration(&mut self, points: &[ClockPoint]) -> Result<(), Error> {
        self.json(chunk_type::CALIBRATION, &points)
    }

    /// What a record has cost its thread, in picoseconds.
    pub fn record_cost(&mut self, record_ps: u64) {
        self.end.record_ps = Some(record_ps);
    }

    /// Says that nothing is missing behind this, and gives the file's length.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn finish(mut self) -> Result<u64, Error> {
        let end = self.end;
        self.json(chunk_type::END, &end)?;
        Ok(self.len_bytes)
    }

    fn json(&mut self, chunk_type: u32, value: &impl Serialize) -> Result<(), Error> {
        let payload = serde_json::to_vec(value)
            .map_err(|error| Error::Write { path: self.path.clone(), source: std::io::Error::other(error) })?;
        self.chunk(chunk_type, &payload)
    }

    fn chunk(&mut self, chunk_type: u32, payload: &[u8]) -> Result<(), Error> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            let what = "a description";
            return Err(Error::TooLong { what, bytes: payload.len(), limit: MAX_PAYLOAD_BYTES });
        }
        let head: [u8; HEAD_BYTES] = format::frame(chunk_type, payload);
        self.write_all(&[&head, payload])
    }

    fn write_all(&mut self, parts: &[&[u8]]) -> Result<(), Error> {
        // One system call, so that a recorder that is killed has written all of it or nothing.
        let bytes = parts.concat();
        if let Err(source) = self.file.write_all(&bytes) {
            if self.seekable {
                // If this fails as well, readers find their way past the rest of the chunk.
                let _ = self.file.set_len(self.len_bytes);
                let _ = self.file.seek(SeekFrom::Start(self.len_bytes));
            }
            return Err(Error::Write { path: self.path.clone(), source });
        }
        self.len_bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Appends a function: address as the difference to its predecessor's, modulo 2^64 and with its sign in the lowest bit, size, name, reason, detail.
fn put_function(bytes: &mut Vec<u8>, function: &Function, address: &mut u64) {
    let difference = function.address.wrapping_sub(*address);
    *address = function.address;
    put_number(bytes, difference << 1 ^ if difference >> 63 == 0 { 0 } else { u64::MAX });
    put_number(bytes, function.size);
    put_text(bytes, &function.name);
    put_text(bytes, function.untraced.as_deref().unwrap_or_default());
    put_text(bytes, &function.detail);
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    let mut end = text.len().min(MAX_NAME_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    put_number(bytes, end as u64);
    bytes.extend_from_slice(&text.as_bytes()[..end]);
}

/// Two digits a byte, in small letters: how build-ids are written.
pub fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn len_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
