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

/// Codes below mean the same in each chunk.
const FIRST_KNOWN: usize = 8;
const _: () = assert!(FIRST_KNOWN as u64 == code::KNOWN);

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
    /// What each code from [`code::KNOWN`] on means.
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
        let (codes, times) = chunk.columns.split_at(chunk.codes_stored);
        let codes = uncompressed(&mut self.decompressor, codes, chunk.codes_bytes, &mut self.codes);
        let times = uncompressed(&mut self.decompressor, times, chunk.times_bytes, &mut self.times);
        let result = codes.and_then(|codes| decode_columns(chunk, codes, times?, &mut self.known, events));
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

/// Decodes events whose codes are single bytes of the usual ones and whose times take two at most, and leaves others to [`Columns::any`]. Calls and
/// returns take turns in a way that no branch predictor foresees, and so do times of one byte and of two, so neither decides on a branch here.
#[expect(clippy::needless_bitwise_bool, reason = "a lazy operator is a branch")]
fn decode_columns(
    chunk: &EventsChunk,
    codes: &[u8],
    times: &[u8],
    known: &mut Vec<Event>,
    events: &mut Vec<TimedEvent>,
) -> Result<(), BadChunk> {
    const NOTHING: TimedEvent = TimedEvent { tsc: 0, event: Event::Unwind { depth: 0 } };
    known.clear();
    known.resize(FIRST_KNOWN, NOTHING.event);
    // What is there is overwritten.
    events.resize(chunk.records as usize, NOTHING);
    let (mut codes, mut times) = (codes, times);
    let (mut tsc, mut depth) = (chunk.first_tsc, chunk.depth & DEPTH_MASK);
    for slot in events.iter_mut() {
        if let (Some((&number, more_codes)), Some(&[low, high])) = (codes.split_first(), times.first_chunk()) {
            let is_exit = u64::from(number) == code::EXIT_INNERMOST;
            let is_long = low >> 7;
            let is_usual =
                (is_exit | (usize::from(number) >= FIRST_KNOWN)) & (number < 0x80) & (is_long & high >> 7 == 0);
            if let (true, Some(&called)) = (is_usual, known.get(usize::from(number))) {
                tsc = tsc.wrapping_add(u64::from(low & 0x7f) | (u64::from(high) * u64::from(is_long)) << 7);
                let event = if is_exit { Event::Exit { depth } } else { called };
                // What stands for returns among those that are known is no call.
                let deeper = u32::from(matches!(called, Event::Enter { .. })).wrapping_sub(u32::from(is_exit));
                depth = depth.wrapping_add(deeper) & DEPTH_MASK;
                *slot = TimedEvent { tsc, event };
                (codes, times) = (more_codes, &times[1 + usize::from(is_long)..]);
                continue;
            }
        }
        let mut columns = Columns { codes, times, tsc, depth };
        *slot = columns.any(known)?;
        Columns { codes, times, tsc, depth } = columns;
    }
    let is_whole = codes.is_empty() && times.is_empty() && tsc == chunk.last_tsc;
    if is_whole { Ok(()) } else { Err(BadChunk) }
}

/// What is left of the columns, and between which events that is.
struct Columns<'a> {
    codes: &'a [u8],
    times: &'a [u8],
    tsc: u64,
    depth: u32,
}

impl Columns<'_> {
    /// The next event, whatever it is.
    #[inline(never)]
    fn any(&mut self, known: &mut Vec<Event>) -> Result<TimedEvent, BadChunk> {
        let mut number = take(&mut self.codes)?;
        let goes_back = number == code::BACK;
        if goes_back {
            number = take(&mut self.codes)?;
        }
        let event = match number {
            code::EXIT_INNERMOST => Event::Exit { depth: self.depth },
            code::EXIT => Event::Exit { depth: payload(&mut self.codes)? },
            code::UNWIND => Event::Unwind { depth: payload(&mut self.codes)? },
            code::NEW_ENTER | code::NEW_TAIL | code::NEW_POINT => {
                let site = payload(&mut self.codes)?;
                let event = match number {
                    code::NEW_ENTER => Event::Enter { site },
                    code::NEW_TAIL => Event::Tail { site },
                    _ => Event::Point { site },
                };
                known.push(event);
                event
            }
            code::KNOWN.. => {
                let index = usize::try_from(number).map_err(|_| BadChunk)?;
                *known.get(index).ok_or(BadChunk)?
            }
            _ => return Err(BadChunk),
        };
        let difference = take(&mut self.times)?;
        self.tsc = if goes_back { self.tsc.wrapping_sub(difference) } else { self.tsc.wrapping_add(difference) };
        self.depth = DEPTH_MASK
            & match event {
                Event::Enter { .. } => self.depth.wrapping_add(1),
                Event::Exit { depth } => depth.wrapping_sub(1),
                Event::Unwind { depth } => depth,
                Event::Tail { .. } | Event::Point { .. } => self.depth,
            };
        Ok(TimedEvent { tsc: self.tsc, event })
    }
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
