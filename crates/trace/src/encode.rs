//! Raw records to a chunk of events: the hot path of recording.
//!
//! Owns the [`Encoder`], which needs nothing but the records, so that any thread can encode what another one writes
//! ([`Writer::write`](crate::Writer::write)). Two columns come out. *Codes* say what happened, mostly in one byte: functions get short numbers in the order
//! in which a chunk first meets them, and the return of the innermost frame has no number to it. *Times* are differences. Codes repeat
//! themselves, so they are compressed; times hardly do, so now and then it is tried whether that pays. Invariant: a chunk can be decoded without any other.

use trapline_abi::record::{self, DEPTH_BITS, Event, TSC_BITS};

use crate::{
    Error,
    format::{EVENTS_HEADER_BYTES, MAX_PAYLOAD_BYTES, code, events_header as field},
};

/// The most records that one chunk holds.
pub const MAX_RECORDS: usize = 1 << 16;

/// Of zstd. Negative levels are the fast ones.
const CODES_LEVEL: i32 = 1;
const TIMES_LEVEL: i32 = -1;

/// Columns that are shorter stay as they are: a frame of zstd alone takes a dozen bytes.
const MIN_COMPRESSED_BYTES: usize = 64;

/// After how many chunks it is tried again whether compressing times pays.
const TIMES_RETRY: u32 = 16;

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
    /// For each site, which chunk met it last (upper half) and its number in that one (lower half).
    known: Vec<u64>,
    chunk: u32,
    codes_compressor: zstd::bulk::Compressor<'static>,
    times_compressor: zstd::bulk::Compressor<'static>,
    times_pay: bool,
    times_trial: u32,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder")
            .field("chunk", &self.chunk)
            .field("times_pay", &self.times_pay)
            .finish_non_exhaustive()
    }
}

/// What the loop over the records keeps.
struct Columns {
    codes_bytes: usize,
    times_bytes: usize,
    first_tsc: u64,
    tsc: u64,
    depth: u32,
    records: u32,
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
            codes_compressor: zstd::bulk::Compressor::new(CODES_LEVEL).map_err(Error::Compress)?,
            times_compressor: zstd::bulk::Compressor::new(TIMES_LEVEL).map_err(Error::Compress)?,
            times_pay: false,
            times_trial: 0,
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
        let mut payload = vec![0; EVENTS_HEADER_BYTES];
        payload.reserve(columns.codes_bytes + columns.times_bytes);
        let codes = &self.codes[..columns.codes_bytes];
        let codes_stored = append_compressed(&mut self.codes_compressor, codes, &mut payload)?;
        let times = &self.times[..columns.times_bytes];
        self.times_trial += 1;
        let times_stored = if self.times_pay || self.times_trial >= TIMES_RETRY {
            let stored = append_compressed(&mut self.times_compressor, times, &mut payload)?;
            if times.len() >= MIN_COMPRESSED_BYTES {
                // An eighth less is worth the time that it takes.
                (self.times_pay, self.times_trial) = (stored < times.len() - times.len() / 8, 0);
            }
            stored
        } else {
            payload.extend_from_slice(times);
            times.len()
        };
        debug_assert!(payload.len() <= MAX_PAYLOAD_BYTES);
        put_u32(&mut payload, field::STREAM, batch.stream);
        put_u64(&mut payload, field::FIRST_TSC, columns.first_tsc);
        put_u64(&mut payload, field::LAST_TSC, columns.tsc);
        put_u64(&mut payload, field::LOST_BEFORE, batch.lost_before);
        put_u32(&mut payload, field::DEPTH, batch.start.depth);
        put_u32(&mut payload, field::RECORDS, columns.records);
        put_u32(&mut payload, field::CALLS, columns.calls);
        put_u32(&mut payload, field::TORN, columns.torn);
        put_len(&mut payload, field::CODES_BYTES, columns.codes_bytes);
        put_len(&mut payload, field::CODES_STORED, codes_stored);
        put_len(&mut payload, field::TIMES_BYTES, columns.times_bytes);
        put_len(&mut payload, field::TIMES_STORED, times_stored);
        Ok(Encoded {
            stream: batch.stream,
            end: Position { tsc: columns.tsc, depth: columns.depth },
            records: columns.records,
            calls: columns.calls,
            torn: columns.torn,
            lost_before: batch.lost_before,
            payload,
        })
    }

    /// Fills both columns.
    #[expect(clippy::cast_possible_truncation, reason = "a number is cut into its bytes; payloads have 21 bits")]
    fn columns(&mut self, batch: &Batch<'_>) -> Columns {
        const HALF: u64 = 1 << (TSC_BITS - 1);
        const TSC_MASK: u64 = (1 << TSC_BITS) - 1;
        // A record needs at most this much room, so that the loop need not ask.
        grow(&mut self.codes, (batch.records.len() + 1) * CODE_BYTES);
        grow(&mut self.times, (batch.records.len() + 1) * TIME_BYTES);
        self.start_chunk();
        let (mut at, mut time_at) = (0, 0);
        let mut next_known = code::KNOWN as u32;
        let Position { mut tsc, mut depth } = batch.start;
        let (mut calls, mut torn) = (0_u32, 0_u32);
        let mut first_tsc = None;
        for &word in batch.records {
            let Some((event, low)) = record::decode(word) else {
                torn += 1;
                continue;
            };
            let ahead = low.wrapping_sub(tsc) & TSC_MASK;
            let mut delta = ahead;
            if ahead >= HALF {
                delta = TSC_MASK + 1 - ahead;
                tsc = tsc.wrapping_sub(delta);
                if first_tsc.is_some() {
                    self.codes[at] = code::BACK as u8;
                    at += 1;
                }
            } else {
                tsc = tsc.wrapping_add(delta);
            }
            if first_tsc.is_none() {
                first_tsc = Some(tsc);
                delta = 0;
            }
            time_at += put_short(&mut self.times[time_at..time_at + TIME_BYTES], delta);
            let (prefix, site) = match event {
                Event::Exit { depth: of } => {
                    at += if of == depth & DEPTH_MASK {
                        self.codes[at] = code::EXIT_INNERMOST as u8;
                        1
                    } else {
                        self.codes[at] = code::EXIT as u8;
                        1 + put_short(&mut self.codes[at + 1..at + 1 + CODE_BYTES], u64::from(of))
                    };
                    depth = of.wrapping_sub(1) & DEPTH_MASK;
                    continue;
                }
                Event::Unwind { depth: left } => {
                    self.codes[at] = code::UNWIND as u8;
                    at += 1 + put_short(&mut self.codes[at + 1..at + 1 + CODE_BYTES], u64::from(left));
                    depth = left & DEPTH_MASK;
                    continue;
                }
                Event::Enter { site } => {
                    depth = depth.wrapping_add(1) & DEPTH_MASK;
                    (0, site)
                }
                Event::Tail { site } => (code::TAIL as u8, site),
                Event::Point { site } => (code::POINT as u8, site),
            };
            calls += 1;
            if prefix != 0 {
                self.codes[at] = prefix;
                at += 1;
            }
            let known = &mut self.known[site as usize];
            let out = &mut self.codes[at..at + CODE_BYTES];
            if (*known >> 32) as u32 == self.chunk {
                at += put_short(out, *known & u64::from(u32::MAX));
            } else {
                *known = u64::from(self.chunk) << 32 | u64::from(next_known);
                next_known += 1;
                out[0] = code::NEW as u8;
                at += 1 + put_short(&mut self.codes[at + 1..at + 1 + CODE_BYTES], u64::from(site));
            }
        }
        Columns {
            codes_bytes: at,
            times_bytes: time_at,
            first_tsc: first_tsc.unwrap_or(tsc),
            tsc,
            depth,
            records: batch.records.len() as u32 - torn,
            calls,
            torn,
        }
    }

    /// Forgets which sites were met.
    fn start_chunk(&mut self) {
        if self.known.is_empty() {
            // Pages of it that no site needs are never touched.
            self.known = vec![0; record::MAX_SITES as usize];
        }
        self.chunk = self.chunk.wrapping_add(1);
        if self.chunk == 0 {
            self.known.fill(0);
            self.chunk = 1;
        }
    }
}

const DEPTH_MASK: u32 = (1 << DEPTH_BITS) - 1;

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

/// Appends a column, compressed if that makes it shorter, and says how many bytes it took.
fn append_compressed(
    compressor: &mut zstd::bulk::Compressor<'_>,
    column: &[u8],
    payload: &mut Vec<u8>,
) -> Result<usize, Error> {
    if column.len() >= MIN_COMPRESSED_BYTES {
        let compressed = compressor.compress(column).map_err(Error::Compress)?;
        if compressed.len() < column.len() {
            payload.extend_from_slice(&compressed);
            return Ok(compressed.len());
        }
    }
    payload.extend_from_slice(column);
    Ok(column.len())
}

fn put_u32(payload: &mut [u8], at: usize, number: u32) {
    payload[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

fn put_len(payload: &mut [u8], at: usize, len: usize) {
    put_u32(payload, at, u32::try_from(len).unwrap_or(u32::MAX));
}

fn put_u64(payload: &mut [u8], at: usize, number: u64) {
    payload[at..at + 8].copy_from_slice(&number.to_le_bytes());
}
