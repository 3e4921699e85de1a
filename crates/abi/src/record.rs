//! One event in 8 bytes, as the trampolines write it and the trace's encoder reads it.
//!
//! ```text
//! 63..61 kind | 60..40 payload: a site's id, or a depth | 39..0 time-stamp counter, low bits
//! ```
//!
//! Invariant: no record's kind is 0, so a word in a chunk whose kind is 0 is not written yet. 32-bit code stores the lower half first.

/// Bits of the time-stamp counter in a record: more than five minutes at 3 GHz.
pub const TSC_BITS: u32 = 40;

/// Bits of payload in a record.
pub const PAYLOAD_BITS: u32 = 21;

/// Sites that records can tell apart.
pub const MAX_SITES: u32 = 1 << PAYLOAD_BITS;

/// Bits of a frame's depth in an [`Event::Exit`]; deeper ones wrap.
pub const DEPTH_BITS: u32 = 19;

const PAYLOAD_MASK: u64 = (1 << PAYLOAD_BITS) - 1;
const TSC_MASK: u64 = (1 << TSC_BITS) - 1;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// A function was called, and its return will be seen: a frame is opened, one deeper than the last.
    Enter {
        /// Which function.
        site: u32,
    },
    /// A function returned. Frames deeper than this one were left without a return (an exception, longjmp), and end here too.
    Exit {
        /// The depth of the frame that ends: 1 is the outermost. Modulo 2^[`DEPTH_BITS`].
        depth: u32,
    },
    /// A function was jumped to by the one whose frame is open (a tail call), or by itself: it takes that frame over.
    Tail {
        /// Which function.
        site: u32,
    },
    /// A function was called whose return will not be seen: no frame is opened.
    Point {
        /// Which function.
        site: u32,
    },
    /// Frames were found to be left without a return: all that are deeper than this ended some time ago.
    Unwind {
        /// The depth of the innermost frame that is still open; 0 if none is. Modulo 2^[`DEPTH_BITS`].
        depth: u32,
    },
}

/// The kinds as the numbers in a record's upper bits, for machine code.
pub mod kind {
    /// [`Event::Enter`](super::Event::Enter).
    pub const ENTER: u64 = 1;
    /// [`Event::Exit`](super::Event::Exit).
    pub const EXIT: u64 = 2;
    /// [`Event::Tail`](super::Event::Tail).
    pub const TAIL: u64 = 3;
    /// [`Event::Point`](super::Event::Point).
    pub const POINT: u64 = 4;
    /// [`Event::Unwind`](super::Event::Unwind).
    pub const UNWIND: u64 = 5;
}

/// How far left the kind lies in a record.
pub const KIND_SHIFT: u32 = TSC_BITS + PAYLOAD_BITS;

/// Makes a record of an event; `tsc` is cut to its low bits.
pub const fn encode(event: Event, tsc: u64) -> u64 {
    let (kind, payload) = match event {
        Event::Enter { site } => (kind::ENTER, site),
        Event::Exit { depth } => (kind::EXIT, depth),
        Event::Tail { site } => (kind::TAIL, site),
        Event::Point { site } => (kind::POINT, site),
        Event::Unwind { depth } => (kind::UNWIND, depth),
    };
    kind << KIND_SHIFT | (payload as u64 & PAYLOAD_MASK) << TSC_BITS | tsc & TSC_MASK
}

/// Whether a word of a chunk is a record by now, or else one that somebody has yet to write.
pub const fn is_written(word: u64) -> bool {
    word >> KIND_SHIFT != 0
}

/// The event in a record and the low bits of its time; `None` for a word that is no record.
pub const fn decode(record: u64) -> Option<(Event, u64)> {
    let payload = (record >> TSC_BITS & PAYLOAD_MASK) as u32;
    let event = match record >> KIND_SHIFT {
        kind::ENTER => Event::Enter { site: payload },
        kind::EXIT => Event::Exit { depth: payload },
        kind::TAIL => Event::Tail { site: payload },
        kind::POINT => Event::Point { site: payload },
        kind::UNWIND => Event::Unwind { depth: payload },
        _ => return None,
    };
    Some((event, record & TSC_MASK))
}

/// The time whose low bits are `low` and that is nearest to `near`: contexts that interrupt each other write records a little out of order, so
/// it may be earlier.
pub const fn full_tsc(low: u64, near: u64) -> u64 {
    const HALF: u64 = 1 << (TSC_BITS - 1);
    let ahead = low.wrapping_sub(near) & TSC_MASK;
    if ahead < HALF { near.wrapping_add(ahead) } else { near.wrapping_sub((TSC_MASK + 1) - ahead) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_as_they_were() {
        for event in [
            Event::Enter { site: 0 },
            Event::Exit { depth: 1 },
            Event::Tail { site: MAX_SITES - 1 },
            Event::Point { site: 7 },
            Event::Unwind { depth: 0 },
        ] {
            let record = encode(event, u64::MAX);
            assert!(is_written(record) && !is_written(record & u64::from(u32::MAX)));
            assert_eq!(decode(record), Some((event, TSC_MASK)));
        }
        assert_eq!(decode(0), None);
        assert_eq!(decode(u64::MAX), None);
    }

    #[test]
    fn the_nearest_time_is_found_across_a_wrap_and_backwards() {
        let near = 5_u64 << TSC_BITS;
        for delta in [0_i64, 1, -1, 1 << 38, -(1 << 38)] {
            let tsc = near.wrapping_add_signed(delta);
            assert_eq!(full_tsc(tsc & TSC_MASK, near), tsc, "{delta}");
        }
    }
}
