//! This process's memory, read with care.
//!
//! Owns [`Memory`], which copies the bytes that discovery looks at and keeps the latest stretch of them: sites are visited
//! in order of address, so a hundred thousand of them cost a few reads. Neighbours: [`super::sys`] does the copying.
//! Invariant: a byte that is handed out was mapped when it was copied; what is not mapped is an error, never a fault.

use trapline_engine::{Addr, AddrRange};

use super::{DiscoverError, sys};

/// How much is read at once, in bytes.
const STRETCH_BYTES: u64 = 64 * 1024;

/// Stretches begin on a page, so that a few bytes in front of a site mostly come with it.
const PAGE_BYTES: u64 = 4096;

/// A reader that remembers the last stretch it read.
#[derive(Default)]
pub(super) struct Memory {
    start: Addr,
    bytes: Vec<u8>,
}

impl Memory {
    /// Copies the whole of `range`.
    pub(super) fn read(range: AddrRange) -> Result<Vec<u8>, DiscoverError> {
        let error = |source| DiscoverError::Memory { address: range.start, len_bytes: range.len_bytes(), source };
        let len_bytes =
            usize::try_from(range.len_bytes()).map_err(|_| error(std::io::Error::from_raw_os_error(libc::EFAULT)))?;
        let mut bytes = vec![0; len_bytes];
        sys::read_memory(range.start, &mut bytes).map_err(error)?;
        Ok(bytes)
    }

    /// The bytes at `at`: `len_bytes` of them, or fewer where `segment`, in which `at` lies, ends before.
    pub(super) fn peek(&mut self, at: Addr, len_bytes: u64, segment: AddrRange) -> Result<&[u8], DiscoverError> {
        let end = at.offset(len_bytes.cast_signed()).min(segment.end);
        let held = AddrRange::new(self.start, self.bytes.len() as u64);
        if !(held.contains(at) && end <= held.end) {
            let page = Addr::new(at.value() & !(PAGE_BYTES - 1));
            let start = page.max(segment.start);
            let stretch_end = start.offset(STRETCH_BYTES.cast_signed()).max(end).min(segment.end);
            self.bytes = Self::read(AddrRange { start, end: stretch_end })?;
            self.start = start;
        }
        let offset = |addr: Addr| usize::try_from(addr.distance_from(self.start)).expect("the stretch begins before");
        Ok(&self.bytes[offset(at)..offset(end)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range_of(bytes: &[u8]) -> AddrRange {
        AddrRange::new(Addr::new(bytes.as_ptr() as u64), bytes.len() as u64)
    }

    #[test]
    fn peeks_agree_with_the_memory_across_stretches() {
        let bytes: Vec<u8> = (0..300_000_u32).map(|index| (index % 251) as u8).collect();
        let segment = range_of(&bytes);
        let mut memory = Memory::default();
        for offset in (0..bytes.len()).step_by(4093).chain([5, 0, bytes.len() - 1]) {
            let peeked =
                memory.peek(segment.start.offset(i64::try_from(offset).expect("small")), 16, segment).expect("mapped");
            assert_eq!(peeked, &bytes[offset..(offset + 16).min(bytes.len())]);
        }
        let whole = memory.peek(segment.start, segment.len_bytes(), segment).expect("longer than a stretch");
        assert_eq!(whole, bytes);
    }

    #[test]
    fn an_unmapped_page_is_an_error() {
        let null_page = AddrRange::new(Addr::new(16), 16);
        assert!(matches!(Memory::read(null_page), Err(DiscoverError::Memory { .. })));
    }
}
