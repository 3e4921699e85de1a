//! Pieces of a timeline as bytes.
//!
//! Owns [`encode`]. Pieces are sorted by depth, then by time, and their numbers stand in columns, as varints (LEB128): per depth its distance from the one before and how many pieces it has; then for all
//! pieces the time since the last one's end, the length, the function, and for runs the calls. The times of runs are rounded to units, outwards. Invariant: pieces of a depth do not overlap, so no number is negative.
//! `page/blocks.js` is the other half.

use super::ladder::Piece;

/// What a page has to know of a block to find and read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Extent {
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
    pub(super) pieces: usize,
}

/// Encodes some pieces, which are gone then. `unit_bits`: a unit of time is 2 to the power of this, in nanoseconds; `with_calls`: they are runs.
pub(super) fn encode(pieces: &mut Vec<Piece>, unit_bits: u32, with_calls: bool) -> (Vec<u8>, Extent) {
    pieces.sort_by_key(|piece| (piece.depth, piece.start_ns, piece.end_ns));
    let start_ns = pieces.iter().map(|piece| piece.start_ns).min().unwrap_or(0);
    let end_ns = pieces.iter().map(|piece| piece.end_ns).max().unwrap_or(0);
    let rows: Vec<&[Piece]> = pieces.chunk_by(|one, next| one.depth == next.depth).collect();
    let (mut heads, mut gaps, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
    let (mut functions, mut calls) = (Vec::new(), Vec::new());
    varint(&mut heads, rows.len() as u64);
    let (mut depth, origin) = (0, start_ns >> unit_bits);
    for row in rows {
        varint(&mut heads, u64::from(row[0].depth - depth));
        varint(&mut heads, row.len() as u64);
        depth = row[0].depth;
        let mut at = origin;
        for piece in row {
            let start = (piece.start_ns >> unit_bits).max(at);
            let end = piece.end_ns.div_ceil(1 << unit_bits).max(start);
            varint(&mut gaps, start - at);
            varint(&mut lengths, end - start);
            varint(&mut functions, u64::from(piece.function));
            if with_calls {
                varint(&mut calls, piece.calls);
            }
            at = end;
        }
    }
    let extent = Extent { start_ns, end_ns, pieces: pieces.len() };
    pieces.clear();
    (packed(&[heads, gaps, lengths, functions, calls].concat()), extent)
}

/// As `DecompressionStream("deflate-raw")` reads it.
pub(super) fn packed(bytes: &[u8]) -> Vec<u8> {
    /// What most tools take: higher levels gain a hundredth here, and take twice as long.
    const LEVEL: u8 = 6;
    miniz_oxide::deflate::compress_to_vec(bytes, LEVEL)
}

/// Appends a number: seven bits a byte, the lowest first; the eighth says that more follow.
pub(super) fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    #[expect(clippy::cast_possible_truncation, reason = "less than 0x80")]
    bytes.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(block: &[u8]) -> Vec<u64> {
        let bytes = miniz_oxide::inflate::decompress_to_vec(block).expect("deflate");
        let mut numbers = Vec::new();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let len = rest.iter().position(|byte| byte & 0x80 == 0).expect("an end") + 1;
            let (number, others) = rest.split_at(len);
            numbers.push(number.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f)));
            rest = others;
        }
        numbers
    }

    #[test]
    fn pieces_are_sorted_into_columns() {
        let piece = |depth, start_ns, end_ns, function| Piece { depth, start_ns, end_ns, function, calls: 300 };
        let mut pieces = vec![piece(3, 110, 120, 1), piece(3, 130, 130, 2), piece(0, 100, 400, 5)];
        let (block, extent) = encode(&mut pieces, 0, true);
        assert_eq!(extent, Extent { start_ns: 100, end_ns: 400, pieces: 3 });
        assert!(pieces.is_empty());
        let expected = [vec![2, 0, 1, 3, 2], vec![0, 10, 10], vec![300, 10, 0], vec![5, 1, 2], vec![300; 3]].concat();
        assert_eq!(numbers(&block), expected);
    }

    #[test]
    fn rounded_times_do_not_overlap() {
        let piece = |start_ns, end_ns| Piece { depth: 0, start_ns, end_ns, function: 0, calls: 1 };
        let mut pieces = vec![piece(33, 47), piece(47, 48), piece(65, 66)];
        let (block, _) = encode(&mut pieces, 4, false);
        assert_eq!(numbers(&block), [1, 0, 3, 0, 0, 1, 1, 0, 1, 0, 0, 0]);
    }
}
