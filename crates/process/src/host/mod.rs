//! The [`Host`] of the own process.
//!
//! Owns [`ProcessHost`]: text writer, code memory, membarrier, and the check of all threads. The [`Tracer`](crate::Tracer) puts it under an
//! [`Engine`](trapline_engine::Engine). Invariant: every batch begins by making sure that SIGTRAP is ours.

mod code;
mod membarrier;
mod text;
mod xstate;

use std::{fs::File, io, os::unix::fs::FileExt, time::Duration};

use code::CodeMemory;
pub use text::TextWriter;
use trapline_engine::{
    Addr, AddrRange, Host, Mode,
    host::{Mismatch, VerifyError},
    insn::InsnBytes,
    poke::TextWrite,
    trampoline::{Machine, VectorSave},
};

use crate::{
    error::HostError,
    quiesce::{RangeSet, Stopper},
    sigtrap,
    sys::pages::PAGE_BYTES,
    thread,
};

/// How long a check of all threads may take before it is given up for this time.
const QUIESCE_DEADLINE: Duration = Duration::from_secs(1);

/// The own process as the engine sees it.
#[derive(Debug)]
pub(crate) struct ProcessHost {
    writer: TextWriter,
    code: CodeMemory,
    vectors: VectorSave,
    own_frames_below: Addr,
}

impl ProcessHost {
    /// A host that writes text by `writer`, or by what works on the text at `probe`.
    pub(crate) fn new(writer: Option<TextWriter>, probe: Addr) -> Result<Self, HostError> {
        membarrier::register()?;
        let writer = writer.unwrap_or_else(|| TextWriter::choose(probe));
        let vectors = xstate::vector_save();
        Ok(Self { writer, code: CodeMemory::default(), vectors, own_frames_below: Addr::default() })
    }

    /// Says that the calling thread's stack holds frames of trapline only below `address`: they are full of trampolines' addresses, which are no
    /// return addresses.
    pub(crate) fn set_own_frames_below(&mut self, address: Addr) {
        self.own_frames_below = address;
    }

    /// Unmaps all code memory. No thread runs it, and no site leads to it.
    pub(crate) fn unmap_code(&mut self) {
        self.code.unmap();
    }

    pub(crate) fn text_writer(&self) -> TextWriter {
        self.writer
    }
}

impl Host for ProcessHost {
    type Error = HostError;

    fn machine(&self) -> Machine {
        Machine { mode: Mode::NATIVE, thread: thread::base(), vectors: self.vectors }
    }

    fn read_text(&mut self, at: Addr, bytes: &mut [u8]) -> Result<(), HostError> {
        let memory = File::open("/proc/self/mem").map_err(|source| HostError::ReadText { at, source })?;
        memory.read_exact_at(bytes, at.value()).map_err(|source| HostError::ReadText { at, source })
    }

    fn verify_text(&mut self, mut expected: impl Iterator<Item = TextWrite>) -> Result<(), VerifyError<HostError>> {
        sigtrap::ensure_installed()?;
        let mut page = TextPages::open()?;
        expected.try_for_each(|TextWrite { at, bytes }| {
            let text = page.read(at, bytes.len())?;
            if bytes.begin(text) {
                return Ok(());
            }
            let found = InsnBytes::new(&text[..bytes.len()]);
            Err(VerifyError::Mismatch(Mismatch { at, expected: bytes, found }))
        })
    }

    fn write_text(&mut self, writes: impl Iterator<Item = TextWrite>) -> Result<(), HostError> {
        self.writer.write(writes)
    }

    fn sync_cores(&mut self) -> Result<(), HostError> {
        membarrier::sync_cores()
    }

    fn alloc_code(&mut self, near: AddrRange, len_bytes: usize) -> Result<Addr, HostError> {
        self.code.alloc(near, len_bytes)
    }

    fn write_code(&mut self, at: Addr, code: &[u8]) -> Result<(), HostError> {
        let chunk_bytes = trapline_engine::insn::MAX_INSN_BYTES;
        let mut at = at;
        self.writer.write(code.chunks(chunk_bytes).map(|chunk| {
            let write = TextWrite { at, bytes: InsnBytes::new(chunk) };
            at = at.offset(i64::try_from(chunk.len()).unwrap_or(0));
            write
        }))
    }

    fn free_code(&mut self, code: AddrRange) {
        self.code.free(code);
    }

    fn is_unused(&mut self, ranges: &[AddrRange]) -> Result<bool, HostError> {
        let ranges = RangeSet::new(ranges.iter().copied());
        let stopper = Stopper::new(QUIESCE_DEADLINE).own_frames_below(self.own_frames_below);
        let (blocker, _) = stopper.run(|stopped| stopped.may_be_inside(&ranges))?;
        Ok(blocker.is_none())
    }

    fn is_passed(&mut self, ranges: &[AddrRange]) -> Result<bool, HostError> {
        let (ranges, no_calls) = (RangeSet::new(ranges.iter().copied()), RangeSet::default());
        let stopper = Stopper::new(QUIESCE_DEADLINE).own_frames_below(self.own_frames_below);
        let (blocker, _) = stopper.run(|stopped| stopped.may_stand_or_return(&ranges, &no_calls))?;
        Ok(blocker.is_none())
    }

    fn relax(&mut self) {
        std::thread::yield_now();
    }
}

/// Reads text a page at a time: sites come in order, and many lie on one page.
struct TextPages {
    memory: File,
    page: Addr,
    bytes: Vec<u8>,
}

/// What is read at once: a page, and what an instruction that begins on it may take of the next one.
const WINDOW_BYTES: usize = PAGE_BYTES + trapline_engine::insn::MAX_INSN_BYTES;

impl TextPages {
    fn open() -> Result<Self, HostError> {
        let failed = |source| HostError::ReadText { at: Addr::default(), source };
        let memory = File::open("/proc/self/mem").map_err(failed)?;
        Ok(Self { memory, page: Addr::default(), bytes: Vec::new() })
    }

    /// The text from `at` on: `len` bytes of it, and what else was read.
    #[inline]
    fn read(&mut self, at: Addr, len: usize) -> Result<&[u8], HostError> {
        let page = Addr::new(at.value() / PAGE_BYTES as u64 * PAGE_BYTES as u64);
        if page != self.page || self.bytes.is_empty() {
            self.fill(page)?;
        }
        let start = usize::try_from(at.distance_from(page)).unwrap_or(0);
        self.bytes.get(start..).filter(|text| text.len() >= len).ok_or_else(|| {
            let source = io::Error::from(io::ErrorKind::UnexpectedEof);
            HostError::ReadText { at, source }
        })
    }

    fn fill(&mut self, page: Addr) -> Result<(), HostError> {
        self.bytes.resize(WINDOW_BYTES, 0);
        let filled = self.memory.read_at(&mut self.bytes, page.value());
        let filled = filled.map_err(|source| HostError::ReadText { at: page, source })?;
        self.bytes.truncate(filled);
        self.page = page;
        Ok(())
    }
}
