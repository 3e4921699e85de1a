//! A host without a machine: text is a vector, barriers are counted, failures are ordered.
//!
//! It makes the contract of [`Host`] visible, and tests what a real host cannot be made to do. Invariant: it refuses what the contract
//! forbids (unsorted writes, writes outside its text).

use alloc::{vec, vec::Vec};

use crate::{
    Addr, AddrRange, Host, Mode,
    poke::TextWrite,
    trampoline::{Machine, Segment, ThreadBase, VectorSave},
};

/// What a [`FakeHost`] was asked to do, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// [`Host::write_text`], with all of its writes.
    Write(Vec<TextWrite>),
    /// [`Host::sync_cores`].
    Sync,
    /// [`Host::is_unused`].
    IsUnused,
}

/// Why a [`FakeHost`] refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FakeError {
    /// It was told to fail here.
    Ordered,
    /// No code memory is left.
    NoMemory,
    /// The address is outside of its text.
    Unmapped(Addr),
}

impl core::fmt::Display for FakeError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A host without a machine.
#[derive(Debug)]
pub struct FakeHost {
    mode: Mode,
    /// The text, from [`FakeHost::TEXT`] on.
    pub text: Vec<u8>,
    /// What was done.
    pub events: Vec<Event>,
    /// How many more operations (writes and barriers) succeed; `None` for all.
    pub fail_after: Option<usize>,
    /// How many operations fail once they begin to; `None` for all.
    pub failures: Option<usize>,
    /// What [`Host::is_unused`] answers.
    pub unused: bool,
    /// Bytes of code memory that are left.
    pub code_bytes: usize,
    /// Code memory that was given back.
    pub freed: Vec<AddrRange>,
    next_code: Addr,
}

impl FakeHost {
    /// Where the text begins.
    pub const TEXT: Addr = Addr::new(0x40_0000);
    const CODE: Addr = Addr::new(0x80_0000);

    /// A host with this text.
    pub fn new(mode: Mode, text: Vec<u8>) -> Self {
        Self {
            mode,
            text,
            events: Vec::new(),
            fail_after: None,
            failures: None,
            unused: true,
            code_bytes: 1 << 20,
            freed: Vec::new(),
            next_code: Self::CODE,
        }
    }

    fn attempt(&mut self) -> Result<(), FakeError> {
        match &mut self.fail_after {
            None => return Ok(()),
            Some(0) => {}
            Some(left) => {
                *left -= 1;
                return Ok(());
            }
        }
        match &mut self.failures {
            None => Err(FakeError::Ordered),
            Some(0) => Ok(()),
            Some(left) => {
                *left -= 1;
                Err(FakeError::Ordered)
            }
        }
    }

    fn bytes(&mut self, at: Addr, len: usize) -> Result<&mut [u8], FakeError> {
        usize::try_from(at.distance_from(Self::TEXT))
            .ok()
            .and_then(|start| self.text.get_mut(start..start + len))
            .ok_or(FakeError::Unmapped(at))
    }
}

impl Host for FakeHost {
    type Error = FakeError;

    fn machine(&self) -> Machine {
        let thread = ThreadBase { segment: Segment::Fs, pointer: None, offset: -0x200 };
        Machine { mode: self.mode, thread, vectors: VectorSave::Fxsave }
    }

    fn read_text(&mut self, at: Addr, bytes: &mut [u8]) -> Result<(), FakeError> {
        bytes.copy_from_slice(self.bytes(at, bytes.len())?);
        Ok(())
    }

    fn write_text(&mut self, writes: impl Iterator<Item = TextWrite>) -> Result<(), FakeError> {
        let mut done = Vec::new();
        let result = writes.enumerate().try_for_each(|(index, write)| {
            // The failure comes after the first write: a batch that was written in part is the hard case.
            if index == 1 {
                self.attempt()?;
            }
            assert!(done.last().is_none_or(|last: &TextWrite| last.at < write.at), "writes come sorted");
            self.bytes(write.at, write.bytes.len())?.copy_from_slice(&write.bytes);
            done.push(write);
            Ok(())
        });
        self.events.push(Event::Write(done));
        result
    }

    fn sync_cores(&mut self) -> Result<(), FakeError> {
        self.attempt()?;
        self.events.push(Event::Sync);
        Ok(())
    }

    fn alloc_code(&mut self, _near: AddrRange, len_bytes: usize) -> Result<Addr, FakeError> {
        let len_bytes = len_bytes.next_multiple_of(16);
        self.code_bytes = self.code_bytes.checked_sub(len_bytes).ok_or(FakeError::NoMemory)?;
        let at = self.next_code;
        self.next_code = at.offset(i64::try_from(len_bytes).unwrap_or(i64::MAX));
        Ok(at)
    }

    fn write_code(&mut self, _at: Addr, _code: &[u8]) -> Result<(), FakeError> {
        Ok(())
    }

    fn free_code(&mut self, code: AddrRange) {
        self.freed.push(code);
    }

    fn is_unused(&mut self, ranges: &[AddrRange]) -> Result<bool, FakeError> {
        assert!(ranges.is_sorted_by_key(|range| range.start), "ranges come sorted");
        self.events.push(Event::IsUnused);
        Ok(self.unused)
    }

    fn relax(&mut self) {}
}

/// Text of `sites` five-byte nops, 16 bytes apart, each followed by a `ret`.
pub fn text_of_nops(sites: usize) -> Vec<u8> {
    let mut text = vec![0xcc; 16 * sites];
    for site in text.chunks_mut(16) {
        site[..5].copy_from_slice(&crate::insn::encode::nop(5));
        site[5] = 0xc3;
    }
    text
}
