//! A target's memory, through `/proc/PID/mem`: reads and writes whatever the protection of the pages, as ptrace does.
//!
//! Owns [`Memory`]. A write to a private mapping of a file gets the target a page of its own; no page becomes writable for that.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
};

use trapline_engine::{Addr, Mode};

use super::Tid;

/// Why nothing can be read.
const GONE: &str = "its memory is gone: it has executed another program, or ended";

/// The memory of one process.
#[derive(Debug)]
pub(crate) struct Memory(File);

impl Memory {
    /// Opens the memory that a thread has now; after an exec it has another.
    pub(crate) fn open(tid: Tid) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(format!("/proc/{tid}/mem")).map(Self)
    }

    /// Fills `bytes` from `at`.
    pub(crate) fn read(&self, at: Addr, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, at.value()).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), GONE),
            _ => error,
        })
    }

    /// `len_bytes` from `at`.
    pub(crate) fn read_vec(&self, at: Addr, len_bytes: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len_bytes];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// A word of 8 bytes.
    pub(crate) fn read_word(&self, at: Addr) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A word of the process's own width.
    pub(crate) fn read_pointer(&self, mode: Mode, at: Addr) -> io::Result<u64> {
        match mode {
            Mode::Bits32 => {
                let mut bytes = [0; 4];
                self.read(at, &mut bytes)?;
                Ok(u32::from_le_bytes(bytes).into())
            }
            Mode::Bits64 => self.read_word(at),
        }
    }

    /// A string up to its zero, of at most `limit` bytes.
    pub(crate) fn read_string(&self, at: Addr, limit: usize) -> io::Result<Vec<u8>> {
        const PIECE_BYTES: u64 = 256;
        let mut string = Vec::new();
        while string.len() < limit {
            let here = at.after(string.len());
            // Not over the end of a page: the next one may not be there.
            let piece = PIECE_BYTES.min(4096 - here.value() % 4096);
            let bytes = self.read_vec(here, usize::try_from(piece).unwrap_or(1))?;
            if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
                string.extend_from_slice(&bytes[..end]);
                return Ok(string);
            }
            string.extend_from_slice(&bytes);
        }
        Ok(string)
    }

    /// Stores `bytes` at `at`.
    pub(crate) fn write(&self, at: Addr, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at.value())
    }

    /// Stores a word of 8 bytes.
    pub(crate) fn write_word(&self, at: Addr, word: u64) -> io::Result<()> {
        self.write(at, &word.to_le_bytes())
    }

    /// Stores a word of the process's own width.
    pub(crate) fn write_pointer(&self, mode: Mode, at: Addr, word: u64) -> io::Result<()> {
        self.write(at, &word.to_le_bytes()[..mode.word_bytes() as usize])
    }
}
