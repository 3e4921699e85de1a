//! A chunk of events back to events: the hot path of reading.
//!
//! Owns [`EventsChunk`] and the [`Decoder`], the [`Encoder`](crate::Encoder)'s counterpart, of which each thread has its own. Invariant: whatever the bytes are,
//! decoding ends with as many events as the header says or with [`BadChunk`], in bounded time and memory.

use trapline_abi::record::{DEPTH_BITS, Event, MAX_SITES};

use crate::{
    MAX_RECORDS,
    format::{EVENTS_HEADER_BYTES, MAX_PAYLOAD_BYTES, code, events_header as field, take_number, u32_at, u64_at},
};

const DEPTH_MASK: u32 = (1 << DEPTH_BITS) - 1;

/// An event and its time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimedEvent {
    /// The time-stamp counter.
    pub tsc: u64,
    /// What happened.
    pub event: Event,
}

/// Events of one stream, not yet decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EventsChunk {
    /// The stream.
    pub stream: u32,
    /// Which of the stream's chunks this is.
    pub sequence: u32,
    /// The stream's records before this chunk.
    pub records_before: u64,
    /// The first event's time.
    pub first_tsc: u64,
    /// The last one's.
    pub last_tsc: u64,
    /// Records that were lost while recording, between the previous chunk and this one.
    pub lost_before: u64,
    /// Frames that were open before the first event.
    pub depth: u32,
    /// How many events there are.
    pub records: u32,
    /// How many of them are calls.
    pub calls: u32,
    /// Words that were no records.
    pub torn: u32,
    /// Chunks before this one are missing in the file. Set by the [`Reader`](crate::Reader).
    pub follows_gap: bool,
    /// Bytes of the chunk in the file.
    pub len_bytes: usize,
    codes_bytes: usize,
    times_bytes: usize,
    /// Both columns as they are stored.
    columns: Vec<u8>,
    codes_stored: usize,
}

/// A chunk of events whose checksum is right and which makes no sense: it was written by something else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadChunk;

impl EventsChunk {
    /// Takes a payload apart.
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, BadChunk> {
        if payload.len() < EVENTS_HEADER_BYTES {
            return Err(BadChunk);
        }
        let len = |at| u32_at(payload, at) as usize;
        let columns = payload[EVENTS_HEADER_BYTES..].to_vec();
        let chunk = Self {
            stream: u32_at(payload, field::STREAM),
            sequence: u32_at(payload, field::SEQUENCE),
            records_before: u64_at(payload, field::RECORDS_BEFORE),
            first_tsc: u64_at(payload, field::FIRST_TSC),
            last_tsc: u64_at(payload, field::LAST_TSC),
            lost_before: u64_at(payload, field::LOST_BEFORE),
            depth: u32_at(payload, field::DEPTH),
            records: u32_at(payload, field::RECORDS),
            calls: u32_at(payload, field::CALLS),
            torn: u32_at(payload, field::TORN),
            follows_gap: false,
            len_bytes: payload.len() + crate::format::HEAD_BYTES,
            codes_bytes: len(field::CODES_BYTES),
            times_bytes: len(field::TIMES_BYTES),
            columns,
            codes_stored: len(field::CODES_STORED),
        };
        let stored = [chunk.codes_stored, len(field::TIMES_STORED)];
        let is_sound = stored[0].checked_add(stored[1]) == Some(chunk.columns.len())
            && stored[0] <= chunk.codes_bytes
            && stored[1] <= chunk.times_bytes
            && chunk.codes_bytes <= MAX_PAYLOAD_BYTES
            && chunk.times_bytes <= MAX_PAYLOAD_BYTES
            && (1..=MAX_RECORDS).contains(&(chunk.records as usize))
            && chunk.calls <= chunk.records;
        if is_sound { Ok(chunk) } else { Err(BadChunk) }
    }
}

/// Decodes chunks. Keep it: it keeps its memory.
pub struct Decoder {
    decompressor: zstd::bulk::Decompressor<'static>,
    codes: Vec<u8>,
    times: Vec<u8>,
    known: Vec<Event>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

impl Decoder {
    /// Makes one.
    ///
    /// # Panics
    /// If there is no memory for the decompressor.
    #[must_use]
    pub fn new() -> Self {
        Self {
            decompressor: zstd::bulk::Decompressor::new().expect("memory for a decompressor"),
            codes: Vec::new(),
            times: Vec::new(),
            known: Vec::new(),
        }
    }

    /// Puts the events of a chunk into `events`, whose content goes.
    ///
    /// # Errors
    /// [`BadChunk`]; `events` is empty then.
    pub fn decode(&mut self, chunk: &EventsChunk, events: &mut Vec<TimedEvent>) -> Result<(), BadChunk> {
        events.clear();
        let (codes, times) = chunk.columns.split_at(chunk.codes_stored);
        let codes = uncompressed(&mut self.decompressor, codes, chunk.codes_bytes, &mut self.codes)?;
        let times = uncompressed(&mut self.decompressor, times, chunk.times_bytes, &mut self.times)?;
        let result = decode_columns(chunk, codes, times, &mut self.known, events);
        if result.is_err() {
            events.clear();
        }
        result
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

/// A column as it was before compression.
fn uncompressed<'a>(
    decompressor: &mut zstd::bulk::Decompressor<'_>,
    stored: &'a [u8],
    len: usize,
    buffer: &'a mut Vec<u8>,
) -> Result<&'a [u8], BadChunk> {
    if stored.len() == len {
        return Ok(stored);
    }
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let found = decompressor.decompress_to_buffer(stored, &mut buffer[..len]).map_err(|_| BadChunk)?;
    if found == len { Ok(&buffer[..len]) } else { Err(BadChunk) }
}

fn decode_columns(
    chunk: &EventsChunk,
    mut codes: &[u8],
    mut times: &[u8],
    known: &mut Vec<Event>,
    events: &mut Vec<TimedEvent>,
) -> Result<(), BadChunk> {
    known.clear();
    let mut depth = chunk.depth & DEPTH_MASK;
    let mut tsc = chunk.first_tsc;
    let mut goes_back = false;
    let mut left = chunk.records;
    events.reserve(left as usize);
    while left > 0 {
        let number = take(&mut codes)?;
        let event = match number {
            code::EXIT_INNERMOST => {
                let event = Event::Exit { depth };
                depth = depth.wrapping_sub(1) & DEPTH_MASK;
                event
            }
            code::KNOWN.. => {
                let index = usize::try_from(number - code::KNOWN).map_err(|_| BadChunk)?;
                let event = *known.get(index).ok_or(BadChunk)?;
                depth = depth.wrapping_add(u32::from(matches!(event, Event::Enter { .. }))) & DEPTH_MASK;
                event
            }
            code::BACK if !goes_back => {
                goes_back = true;
                continue;
            }
            code::EXIT => {
                let of = payload(&mut codes)?;
                depth = of.wrapping_sub(1) & DEPTH_MASK;
                Event::Exit { depth: of }
            }
            code::UNWIND => {
                let to = payload(&mut codes)?;
                depth = to & DEPTH_MASK;
                Event::Unwind { depth: to }
            }
            code::NEW_ENTER | code::NEW_TAIL | code::NEW_POINT => {
                let site = payload(&mut codes)?;
                let event = match number {
                    code::NEW_ENTER => Event::Enter { site },
                    code::NEW_TAIL => Event::Tail { site },
                    _ => Event::Point { site },
                };
                known.push(event);
                depth = depth.wrapping_add(u32::from(number == code::NEW_ENTER)) & DEPTH_MASK;
                event
            }
            _ => return Err(BadChunk),
        };
        let difference = take(&mut times)?;
        tsc = if goes_back { tsc.wrapping_sub(difference) } else { tsc.wrapping_add(difference) };
        goes_back = false;
        events.push(TimedEvent { tsc, event });
        left -= 1;
    }
    let is_whole = codes.is_empty() && times.is_empty() && tsc == chunk.last_tsc;
    if is_whole { Ok(()) } else { Err(BadChunk) }
}

/// [`take_number`], with a short way for the usual single byte.
#[inline]
fn take(bytes: &mut &[u8]) -> Result<u64, BadChunk> {
    match bytes.split_first() {
        Some((&first, rest)) if first < 0x80 => {
            *bytes = rest;
            Ok(u64::from(first))
        }
        _ => take_number(bytes).ok_or(BadChunk),
    }
}

fn payload(codes: &mut &[u8]) -> Result<u32, BadChunk> {
    let number = take(codes)?;
    u32::try_from(number).ok().filter(|number| *number < MAX_SITES).ok_or(BadChunk)
}
