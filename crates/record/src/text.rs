//! Edits of a target's code: made at once, and taken back.
//!
//! Owns [`Pieces`], what is to be written, [`undo`], and [`Hidden`], which looks beneath them. `trapline_image` says what the edits are. Invariants: code is compared with what has to be there
//! before the first write (I5); what is taken back is what we wrote, and nothing that somebody else wrote since.

use std::io;

use trapline_engine::{Addr, AddrRange};
use trapline_image::Write;

use crate::{exec::Untraceable, sys::memory::Memory};

/// Edits that are nearer to each other than this are written at once: a write costs much more than a byte.
const NEAR_BYTES: i64 = 2048;

/// Code with all edits made, a page and more in one piece.
#[derive(Debug, Default)]
pub(crate) struct Pieces(Vec<(Addr, Vec<u8>)>);

/// The first byte of some neighbouring edits, and how far they go.
fn extent(edits: &[Write]) -> AddrRange {
    let last = &edits[edits.len() - 1];
    AddrRange { start: edits[0].at, end: last.at.after(last.new.len()) }
}

fn neighbours(edits: &[Write]) -> impl Iterator<Item = &[Write]> {
    edits.chunk_by(|one, next| next.at.distance_from(one.at) < NEAR_BYTES)
}

impl Pieces {
    /// Compares the places of all edits with what has to be there. `edits` come in order of their addresses.
    pub(crate) fn new(memory: &Memory, edits: &[Write]) -> Result<Self, Untraceable> {
        let mut pieces = Vec::new();
        for edits in neighbours(edits) {
            let AddrRange { start, end } = extent(edits);
            let mut bytes = memory.read_vec(start, usize::try_from(end.distance_from(start)).unwrap_or(0))?;
            for Write { at, expected, new } in edits {
                let place = &mut bytes[usize::try_from(at.distance_from(start)).unwrap_or(0)..][..new.len()];
                if *place != **expected {
                    let text =
                        format!("its code at {at} is {place:02x?}, and {expected} in its file; nothing was changed");
                    return Err(Untraceable(text));
                }
                place.copy_from_slice(new);
            }
            pieces.push((start, bytes));
        }
        Ok(Self(pieces))
    }

    /// Makes the edits.
    pub(crate) fn write(&self, memory: &Memory) -> io::Result<()> {
        self.0.iter().try_for_each(|(at, bytes)| memory.write(*at, bytes))
    }
}

/// Edits of a tracer, beneath which the program's code is as the program has it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hidden {
    /// In order of their addresses.
    edits: Vec<Write>,
}

impl Hidden {
    pub(crate) fn new(mut edits: Vec<Write>) -> Self {
        edits.sort_by_key(|edit| edit.at);
        Self { edits }
    }

    /// Those of the edits that lie in a range, in part or whole.
    pub(crate) fn within(&self, range: AddrRange) -> impl Iterator<Item = &Write> {
        // No edit is longer than an instruction, or two.
        let first = self.edits.partition_point(|edit| edit.at < range.start.offset(-MOST_BYTES));
        let near = self.edits[first..].iter().take_while(move |edit| edit.at < range.end);
        near.filter(move |edit| range.start < edit.at.after(edit.new.len()))
    }

    /// What the program has somewhere.
    pub(crate) fn read(&self, memory: &Memory, at: Addr, len_bytes: usize) -> io::Result<Vec<u8>> {
        let mut bytes = memory.read_vec(at, len_bytes)?;
        for Write { at: edited, expected, new } in self.within(AddrRange::new(at, len_bytes as u64)) {
            if memory.read_vec(*edited, new.len()).is_ok_and(|there| there == **new) {
                overlay(&mut bytes, at, *edited, expected);
            }
        }
        Ok(bytes)
    }
}

/// Longer than any edit.
const MOST_BYTES: i64 = 16;

/// Puts some bytes of an address into those of another one, as far as they overlap.
pub(crate) fn overlay(bytes: &mut [u8], at: Addr, other_at: Addr, other: &[u8]) {
    for (place, byte) in (other_at.distance_from(at)..).zip(other) {
        if let Some(old) = usize::try_from(place).ok().and_then(|place| bytes.get_mut(place)) {
            *old = *byte;
        }
    }
}

/// Takes edits back, wherever they still stand. Returns how many did. Code that is not mapped any more needs nothing.
pub(crate) fn undo(memory: &Memory, edits: &mut [Write]) -> io::Result<usize> {
    edits.sort_by_key(|edit| edit.at);
    let mut undone = 0;
    for edits in neighbours(edits) {
        let AddrRange { start, end } = extent(edits);
        let Ok(mut bytes) = memory.read_vec(start, usize::try_from(end.distance_from(start)).unwrap_or(0)) else {
            continue;
        };
        let before = undone;
        for Write { at, expected, new } in edits {
            let place = &mut bytes[usize::try_from(at.distance_from(start)).unwrap_or(0)..][..new.len()];
            if *place == **new {
                place.copy_from_slice(expected);
                undone += 1;
            }
        }
        if undone > before {
            memory.write(start, &bytes)?;
        }
    }
    Ok(undone)
}
