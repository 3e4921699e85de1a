//! The bytes of a trace file: its header, its chunks, and the numbers in them. `docs/trace-format.md` is the description for others.
//!
//! Owns the constants, [`frame`] and [`parse_head`], and the variable-length numbers. The [`Writer`](crate::Writer) and the
//! [`Reader`](crate::Reader) are its neighbours. Invariant: whatever of a chunk is changed or cut off, its checksums show it; and a chunk is found again
//! behind any damage, since each begins with the same marker and can be read without those before it.

/// How a trace file begins.
pub const MAGIC: [u8; 8] = *b"\x8ftrapl\r\n";

/// The version that is written, and the newest one that is read. It changes only if older readers would misunderstand; they skip chunks of
/// types that they do not know.
pub const VERSION: u32 = 1;

/// Bytes of the file's header: the magic, the version (4 bytes), and the checksum of these 12 bytes. This much is the same in all versions.
pub const FILE_HEADER_BYTES: usize = 16;

/// How each chunk begins.
pub const MARKER: [u8; 4] = [0xf1, b'T', b'L', 0x8e];

/// Bytes of a chunk before its payload: marker, type, length, checksum of the payload, checksum of these 16 bytes.
pub const HEAD_BYTES: usize = 20;

/// The longest payload. A chunk that says that it is longer is damaged.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;

/// What is in a chunk.
pub mod chunk_type {
    /// A [`Meta`](crate::Meta), as JSON.
    pub const META: u32 = 1;
    /// A module without its functions, as JSON.
    pub const MODULE: u32 = 2;
    /// Some functions of a module, compressed.
    pub const FUNCTIONS: u32 = 3;
    /// A [`Process`](crate::Process), as JSON.
    pub const PROCESS: u32 = 4;
    /// A [`Load`](crate::Load), as JSON.
    pub const LOAD: u32 = 5;
    /// An [`Unload`](crate::Unload), as JSON.
    pub const UNLOAD: u32 = 6;
    /// A [`Stream`](crate::Stream), as JSON.
    pub const STREAM: u32 = 7;
    /// Events of one stream.
    pub const EVENTS: u32 = 8;
    /// A [`Losses`](crate::Losses), as JSON.
    pub const LOSSES: u32 = 9;
    /// An [`Exit`](crate::Exit), as JSON.
    pub const EXIT: u32 = 10;
    /// A list of [`ClockPoint`](crate::ClockPoint)s, as JSON.
    pub const CALIBRATION: u32 = 11;
    /// An [`End`](crate::End), as JSON.
    pub const END: u32 = 12;
}

/// Bytes of a chunk of events before its columns.
pub const EVENTS_HEADER_BYTES: usize = 80;

/// Where the fields of the header of a chunk of events lie.
pub mod events_header {
    /// The stream, 4 bytes.
    pub const STREAM: usize = 0;
    /// Which of the stream's chunks this is, 4 bytes: 0 is the first.
    pub const SEQUENCE: usize = 4;
    /// The stream's records in the chunks before this one, 8 bytes.
    pub const RECORDS_BEFORE: usize = 8;
    /// The time-stamp counter of the first record, 8 bytes.
    pub const FIRST_TSC: usize = 16;
    /// Of the last one, 8 bytes.
    pub const LAST_TSC: usize = 24;
    /// Records that were lost between the stream's previous chunk and this one, 8 bytes.
    pub const LOST_BEFORE: usize = 32;
    /// How many frames were open before the first record, 4 bytes.
    pub const DEPTH: usize = 40;
    /// Records in this chunk, 4 bytes.
    pub const RECORDS: usize = 44;
    /// Calls among them (kinds enter, tail and point), 4 bytes.
    pub const CALLS: usize = 48;
    /// Words among them that were no records, and were left out, 4 bytes.
    pub const TORN: usize = 52;
    /// Bytes of the column of codes before compression, 4 bytes.
    pub const CODES_BYTES: usize = 56;
    /// Its bytes as they are stored, 4 bytes; fewer than before compression if and only if it is compressed.
    pub const CODES_STORED: usize = 60;
    /// Bytes of the column of times before compression, 4 bytes.
    pub const TIMES_BYTES: usize = 64;
    /// Its bytes as they are stored, 4 bytes, likewise.
    pub const TIMES_STORED: usize = 68;
    /// 8 bytes of zero, for later.
    pub const RESERVED: usize = 72;
}

/// The numbers in the column of codes.
pub mod code {
    /// The innermost frame ends.
    pub const EXIT_INNERMOST: u64 = 0;
    /// The frame whose depth follows ends, and those that are deeper.
    pub const EXIT: u64 = 1;
    /// Frames that are deeper than the number that follows have ended.
    pub const UNWIND: u64 = 2;
    /// The next record's time is before its predecessor's: its number in the column of times is how much.
    pub const BACK: u64 = 3;
    /// A function is called that was not in this chunk before: its site follows. From now on the next number from [`KNOWN`] on means just this.
    pub const NEW_ENTER: u64 = 4;
    /// The same for a tail call.
    pub const NEW_TAIL: u64 = 5;
    /// The same for a point.
    pub const NEW_POINT: u64 = 6;
    /// This number and those above are what was new before, in its order.
    pub const KNOWN: u64 = 8;
}

/// The header of a trace file.
pub fn file_header() -> [u8; FILE_HEADER_BYTES] {
    let mut header = [0; FILE_HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let sum = crc32fast::hash(&header[..12]);
    header[12..].copy_from_slice(&sum.to_le_bytes());
    header
}

/// The version in the header of a trace file; `None` if it is none, or damaged.
pub fn parse_file_header(bytes: &[u8]) -> Option<u32> {
    let intact =
        bytes.len() >= FILE_HEADER_BYTES && bytes[..8] == MAGIC && crc32fast::hash(&bytes[..12]) == u32_at(bytes, 12);
    intact.then(|| u32_at(bytes, 8))
}

/// Makes the head of a chunk.
///
/// # Panics
/// If the payload is longer than [`MAX_PAYLOAD_BYTES`].
pub fn frame(chunk_type: u32, payload: &[u8]) -> [u8; HEAD_BYTES] {
    assert!(payload.len() <= MAX_PAYLOAD_BYTES, "a chunk's payload has at most {MAX_PAYLOAD_BYTES} bytes");
    let mut head = [0; HEAD_BYTES];
    head[..4].copy_from_slice(&MARKER);
    head[4..8].copy_from_slice(&chunk_type.to_le_bytes());
    head[8..12].copy_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    head[12..16].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    let sum = crc32fast::hash(&head[..16]);
    head[16..].copy_from_slice(&sum.to_le_bytes());
    head
}

/// What the head of a chunk says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// One of [`chunk_type`], or one that is not known yet.
    pub chunk_type: u32,
    /// Of the payload.
    pub length: usize,
    /// Of the payload.
    pub checksum: u32,
}

/// Reads the head of a chunk; `None` if this is none, or one that is damaged.
pub fn parse_head(bytes: &[u8; HEAD_BYTES]) -> Option<Head> {
    let length = u32_at(bytes, 8) as usize;
    let intact =
        bytes[..4] == MARKER && length <= MAX_PAYLOAD_BYTES && crc32fast::hash(&bytes[..16]) == u32_at(bytes, 16);
    intact.then(|| Head { chunk_type: u32_at(bytes, 4), length, checksum: u32_at(bytes, 12) })
}

/// Reads 4 bytes.
///
/// # Panics
/// If there are fewer.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Reads 8 bytes.
///
/// # Panics
/// If there are fewer.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Appends a number, seven bits to a byte, the lowest first, all bytes but the last with their upper bit set (LEB128).
pub fn put_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    bytes.push(number.to_le_bytes()[0]);
}

/// Takes a number as [`put_number`] appends it off the front; `None` if there is none, or one of more than 64 bits.
pub fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(first & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        number |= bits << shift;
        if first & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_and_too_long_ones_are_refused() {
        for number in [0, 1, 127, 128, 16383, 16384, 1 << 40, u64::MAX] {
            let mut bytes = Vec::new();
            put_number(&mut bytes, number);
            let mut rest = bytes.as_slice();
            assert_eq!((take_number(&mut rest), rest.len()), (Some(number), 0));
            assert_eq!(take_number(&mut &bytes[..bytes.len() - 1]), None, "cut short");
        }
        assert_eq!(take_number(&mut [0xff; 10].as_slice()), None, "more than 64 bits");
        assert_eq!(take_number(&mut [0x80; 20].as_slice()), None, "no end");
    }

    #[test]
    fn a_head_with_any_bit_changed_is_none() {
        let head = frame(chunk_type::META, b"{}");
        assert_eq!(parse_head(&head).map(|head| (head.chunk_type, head.length)), Some((chunk_type::META, 2)));
        for bit in 0..HEAD_BYTES * 8 {
            let mut changed = head;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(parse_head(&changed), None, "bit {bit}");
        }
    }
}
