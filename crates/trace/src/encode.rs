//! Raw records to a chunk of events: the hot path of recording.
//!
//! Owns the [`Encoder`], which needs nothing but the records, so that any thread can encode what another one writes
//! ([`Writer::write`](crate::Writer::write)). Two columns come out. *Codes* say what happened, mostly in one byte: functions get short numbers in the order
//! in which a chunk first meets them, and the return of the innermost frame has no number to it. *Times* are differences. Codes repeat
//! themselves, so they are compressed; times hardly do, so now and then it is tried whether that pays. Invariant: a chunk can be decoded without any other.

use trapline_abi::record::{self, DEPTH_BITS, Event, KIND_SHIFT, MAX_SITES, TSC_BITS, kind};

use crate::{
    Error,
    format::{EVENTS_HEADER_BYTES, MAX_PAYLOAD_BYTES, code, events_header as field},
};

/// The most records that one chunk holds.
pub const MAX_RECORDS: usize = 1 << 16;

/// Levels of zstd; negative ones are the fast ones. And what a column has to shrink to, in sixteenths, to be worth its time: codes of loops do,
/// those of a walk without a pattern do not.
const CODES_LEVEL: i32 = 1;
const CODES_WORTH: usize = 6;
const TIMES_LEVEL: i32 = -1;
const TIMES_WORTH: usize = 12;

/// Codes are compressed in any case if records take more than half of this: calls are to take less than 8 bytes.
const LONG_HALF_BYTES: usize = 7;

/// Columns that are shorter stay as they are: a frame of zstd alone takes a dozen bytes.
const MIN_COMPRESSED_BYTES: usize = 64;

/// After how many chunks it is tried again whether compressing pays.
const RETRY_CHUNKS: u32 = 32;

/// The most bytes that one record takes in each column.
const CODE_BYTES: usize = 8;
const TIME_BYTES: usize = 8;

/// Between which events a stream stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Position {
    /// The time-stamp counter, near enough to the next record's to tell which of the times with its low bits is meant: within three minutes.
    pub tsc: u64,
    /// How many frames are open.
    pub depth: u32,
}

/// Some records of one stream, as the agent wrote them.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Which stream.
    pub stream: u32,
    /// Where the records begin.
    pub start: Position,
    /// Records of this stream that were lost between its previous batch and this one.
    pub lost_before: u64,
    /// The records, as [`trapline_abi::record`] has them. Words that are none are left out, and counted as torn.
    pub records: &'a [u64],
}

/// A chunk of events, ready to be [written](crate::Writer::write).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Encoded {
    /// Which stream.
    pub stream: u32,
    /// Where the records end: where the stream's next batch begins, if nothing is lost in between.
    pub end: Position,
    /// How many records there are.
    pub records: u32,
    /// How many of them are calls.
    pub calls: u32,
    /// How many words were no records.
    pub torn: u32,
    /// Records that were lost before.
    pub lost_before: u64,
    pub(crate) payload: Vec<u8>,
}

impl Encoded {
    /// Bytes that it takes in the file, apart from the head of its chunk.
    pub fn len_bytes(&self) -> usize {
        self.payload.len()
    }
}

/// Makes chunks of records. Keep it: making one costs more than using it.
pub struct Encoder {
    codes: Vec<u8>,
    times: Vec<u8>,
    /// For each kind and site, as they lie in a record, which chunk met it last (upper half) and its number in that one (lower half).
    known: Vec<u64>,
    chunk: u32,
    codes_press: Press,
    times_press: Press,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("chunk", &self.chunk).finish_non_exhaustive()
    }
}

/// What the loop over the records keeps.
struct Columns {
    codes_bytes: usize,
    times_bytes: usize,
    first_tsc: Option<u64>,
    tsc: u64,
    depth: u32,
    /// What the next site that is new to the chunk is called.
    next_known: u64,
    calls: u32,
    torn: u32,
}

impl Encoder {
    /// Makes one.
    ///
    /// # Errors
    /// [`Error::Compress`] if there is no memory for the compressor.
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            codes: Vec::new(),
            times: Vec::new(),
            known: Vec::new(),
            chunk: 0,
            codes_press: Press::new(CODES_LEVEL, CODES_WORTH)?,
            times_press: Press::new(TIMES_LEVEL, TIMES_WORTH)?,
        })
    }

    /// Encodes a batch.
    ///
    /// # Errors
    /// [`Error::TooLong`] for more than [`MAX_RECORDS`], [`Error::Compress`] if there is no memory.
    pub fn encode(&mut self, batch: &Batch<'_>) -> Result<Encoded, Error> {
        if batch.records.len() > MAX_RECORDS {
            return Err(Error::TooLong { what: "records", bytes: batch.records.len() * 8, limit: MAX_RECORDS * 8 });
        }
        let columns = self.columns(batch);
        let records = len_u32(batch.records.len()) - columns.torn;
        let mut payload = vec![0; EVENTS_HEADER_BYTES];
        payload.reserve(columns.codes_bytes + columns.times_bytes);
        let codes = &self.codes[..columns.codes_bytes];
        let is_long = columns.codes_bytes + columns.times_bytes > batch.records.len() * LONG_HALF_BYTES / 2;
        let codes_stored = self.codes_press.append(codes, is_long, &mut payload)?;
        let times = &self.times[..columns.times_bytes];
        let times_stored = self.times_press.append(times, false, &mut payload)?;
        debug_assert!(payload.len() <= MAX_PAYLOAD_BYTES);
        put_u32(&mut payload, field::STREAM, batch.stream);
        put_u64(&mut payload, field::FIRST_TSC, columns.first_tsc.unwrap_or(columns.tsc));
        put_u64(&mut payload, field::LAST_TSC, columns.tsc);
        put_u64(&mut payload, field::LOST_BEFORE, batch.lost_before);
        put_u32(&mut payload, field::DEPTH, batch.start.depth);
        put_u32(&mut payload, field::RECORDS, records);
        put_u32(&mut payload, field::CALLS, columns.calls);
        put_u32(&mut payload, field::TORN, columns.torn);
        put_len(&mut payload, field::CODES_BYTES, columns.codes_bytes);
        put_len(&mut payload, field::CODES_STORED, codes_stored);
        put_len(&mut payload, field::TIMES_BYTES, columns.times_bytes);
        put_len(&mut payload, field::TIMES_STORED, times_stored);
        Ok(Encoded {
            stream: batch.stream,
            end: Position { tsc: columns.tsc, depth: columns.depth },
            records,
            calls: columns.calls,
            torn: columns.torn,
            lost_before: batch.lost_before,
            payload,
        })
    }

    /// Fills both columns.
    #[expect(clippy::needless_bitwise_bool, reason = "a lazy operator is a branch")]
    fn columns(&mut self, batch: &Batch<'_>) -> Columns {
        // A record needs at most this much room, so that the loop need not ask.
        grow(&mut self.codes, (batch.records.len() + 1) * CODE_BYTES);
        grow(&mut self.times, (batch.records.len() + 1) * TIME_BYTES);
        self.start_chunk();
        let mut columns = Columns {
            codes_bytes: 0,
            times_bytes: 0,
            first_tsc: None,
            tsc: batch.start.tsc,
            depth: batch.start.depth & DEPTH_MASK,
            next_known: code::KNOWN,
            calls: 0,
            torn: 0,
        };
        for &word in batch.records {
            // Calls and returns take turns in a way that no branch predictor foresees, so they take the same way here, unless there is something
            // to one that is rare.
            let (kind, payload) = (word >> KIND_SHIFT, (word >> TSC_BITS) as u32 & (MAX_SITES - 1));
            let known = self.known[what(word)];
            let is_exit = kind == kind::EXIT;
            let is_usual = (known >> 32 == u64::from(self.chunk)) | (is_exit & (payload == columns.depth));
            let ahead = (word & TSC_MASK).wrapping_sub(columns.tsc) & TSC_MASK;
            if is_usual && ahead < TSC_HALF && columns.first_tsc.is_some() {
                let number = if is_exit { code::EXIT_INNERMOST } else { known & u64::from(u32::MAX) };
                columns.codes_bytes += put_short(&mut self.codes[columns.codes_bytes..][..CODE_BYTES], number);
                columns.times_bytes += put_short(&mut self.times[columns.times_bytes..][..TIME_BYTES], ahead);
                columns.tsc = columns.tsc.wrapping_add(ahead);
                columns.calls += u32::from(!is_exit);
                let (more, fewer) = (u32::from(kind == kind::ENTER), u32::from(is_exit));
                columns.depth = columns.depth.wrapping_add(more).wrapping_sub(fewer) & DEPTH_MASK;
            } else {
                self.unusual(word, &mut columns);
            }
        }
        columns
    }

    /// Encodes any record.
    fn unusual(&mut self, word: u64, columns: &mut Columns) {
        let Some((event, low)) = record::decode(word) else {
            columns.torn += 1;
            return;
        };
        let tsc = record::full_tsc(low, columns.tsc);
        if columns.first_tsc.is_none() {
            // Its time is in the header.
            (columns.first_tsc, columns.tsc) = (Some(tsc), tsc);
        }
        let ahead = tsc.wrapping_sub(columns.tsc);
        if ahead > u64::MAX / 2 {
            self.put_code(code::BACK, columns);
        }
        let difference = ahead.min(ahead.wrapping_neg());
        columns.times_bytes += put_short(&mut self.times[columns.times_bytes..], difference);
        columns.tsc = tsc;
        match event {
            Event::Enter { site } => {
                columns.depth = (columns.depth + 1) & DEPTH_MASK;
                self.put_call(word, code::NEW_ENTER, site, columns);
            }
            Event::Exit { depth } => {
                if depth == columns.depth {
                    self.put_code(code::EXIT_INNERMOST, columns);
                } else {
                    self.put_code(code::EXIT, columns);
                    self.put_code(depth.into(), columns);
                }
                columns.depth = depth.wrapping_sub(1) & DEPTH_MASK;
            }
            Event::Unwind { depth } => {
                self.put_code(code::UNWIND, columns);
                self.put_code(depth.into(), columns);
                columns.depth = depth & DEPTH_MASK;
            }
            Event::Tail { site } => self.put_call(word, code::NEW_TAIL, site, columns),
            Event::Point { site } => self.put_call(word, code::NEW_POINT, site, columns),
        }
    }

    fn put_call(&mut self, word: u64, new: u64, site: u32, columns: &mut Columns) {
        columns.calls += 1;
        let known = &mut self.known[what(word)];
        if *known >> 32 == u64::from(self.chunk) {
            let number = *known & u64::from(u32::MAX);
            self.put_code(number, columns);
        } else {
            *known = u64::from(self.chunk) << 32 | columns.next_known;
            columns.next_known += 1;
            self.put_code(new, columns);
            self.put_code(site.into(), columns);
        }
    }

    fn put_code(&mut self, number: u64, columns: &mut Columns) {
        columns.codes_bytes += put_short(&mut self.codes[columns.codes_bytes..], number);
    }

    /// Forgets which sites were met.
    fn start_chunk(&mut self) {
        if self.known.is_empty() {
            // Pages of it that no site needs are never touched.
            self.known = vec![0; 1 << (u64::BITS - TSC_BITS)];
        }
        self.chunk = self.chunk.wrapping_add(1);
        if self.chunk == 0 {
            self.known.fill(0);
            self.chunk = 1;
        }
    }
}

/// A record's kind and payload.
fn what(word: u64) -> usize {
    (word >> TSC_BITS) as usize
}

const DEPTH_MASK: u32 = (1 << DEPTH_BITS) - 1;
const TSC_MASK: u64 = (1 << TSC_BITS) - 1;
const TSC_HALF: u64 = 1 << (TSC_BITS - 1);

fn grow(bytes: &mut Vec<u8>, len: usize) {
    if bytes.len() < len {
        bytes.resize(len, 0);
    }
}

/// Writes a number below 2^56 as [`put_number`](crate::format::put_number) does, and says how many bytes that took. One or two bytes, the usual case, take no
/// unpredictable branch.
#[expect(clippy::cast_possible_truncation, reason = "a number is cut into its bytes")]
#[inline]
fn put_short(out: &mut [u8], mut number: u64) -> usize {
    if number < 1 << 14 {
        let long = u8::from(number >= 0x80);
        out[0] = number as u8 & 0x7f | long << 7;
        out[1] = (number >> 7) as u8;
        return 1 + usize::from(long);
    }
    let mut len = 0;
    while number >= 0x80 {
        out[len] = number as u8 | 0x80;
        number >>= 7;
        len += 1;
    }
    out[len] = number as u8;
    len + 1
}

/// Compresses a column where that pays.
struct Press {
    compressor: zstd::bulk::Compressor<'static>,
    /// What a column has to shrink to, in sixteenths, for the time to be well spent.
    worth_sixteenths: usize,
    pays: bool,
    chunks_since_trial: u32,
    compressed: Vec<u8>,
}

impl Press {
    fn new(level: i32, worth_sixteenths: usize) -> Result<Self, Error> {
        Ok(Self {
            compressor: zstd::bulk::Compressor::new(level).map_err(Error::Compress)?,
            worth_sixteenths,
            pays: true,
            chunks_since_trial: 0,
            compressed: Vec::new(),
        })
    }

    /// Appends a column, in fewer bytes if that paid lately or `anyway`, and says how many bytes it took.
    fn append(&mut self, column: &[u8], anyway: bool, payload: &mut Vec<u8>) -> Result<usize, Error> {
        self.chunks_since_trial += 1;
        let is_due = self.pays || self.chunks_since_trial >= RETRY_CHUNKS || anyway;
        if column.len() >= MIN_COMPRESSED_BYTES && is_due {
            grow(&mut self.compressed, zstd::zstd_safe::compress_bound(column.len()));
            let len = self.compressor.compress_to_buffer(column, &mut self.compressed[..]).map_err(Error::Compress)?;
            (self.pays, self.chunks_since_trial) = (len * 16 < column.len() * self.worth_sixteenths, 0);
            if len < column.len() {
                payload.extend_from_slice(&self.compressed[..len]);
                return Ok(len);
            }
        }
        payload.extend_from_slice(column);
        Ok(column.len())
    }
}

fn put_u32(payload: &mut [u8], at: usize, number: u32) {
    payload[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

fn put_len(payload: &mut [u8], at: usize, len: usize) {
    put_u32(payload, at, len_u32(len));
}

fn len_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn put_u64(payload: &mut [u8], at: usize, number: u64) {
    payload[at..at + 8].copy_from_slice(&number.to_le_bytes());
}
