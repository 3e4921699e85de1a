//! What the engine needs of the place it runs in.
//!
//! Owns the [`Host`] trait: a process, a kernel and a fake implement it, and it is all that they have in common. Everything else in this crate
//! is pure. Invariant: a host writes text only as the engine tells it to, and returns from [`Host::sync_cores`] only when every CPU that
//! runs the target has executed a serialising instruction since the call.

use core::fmt;

use crate::{Addr, AddrRange, insn::InsnBytes, poke::TextWrite, trampoline::Machine};

/// Text that is not what it has to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// The site.
    pub at: Addr,
    /// The bytes that had to be there.
    pub expected: InsnBytes,
    /// The bytes that are there.
    pub found: InsnBytes,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected {} at {}, found {}", self.expected, self.at, self.found)
    }
}

/// Why [`Host::verify_text`] failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VerifyError<E> {
    /// The text differs.
    Mismatch(Mismatch),
    /// The text could not be read.
    Host(E),
}

impl<E> From<E> for VerifyError<E> {
    fn from(error: E) -> Self {
        Self::Host(error)
    }
}

/// The place that the engine runs in.
pub trait Host {
    /// What can go wrong in it.
    type Error;

    /// The machine that trampolines are emitted for.
    fn machine(&self) -> Machine;

    /// Reads text, as data, into `bytes`.
    ///
    /// # Errors
    /// If it cannot be read.
    fn read_text(&mut self, at: Addr, bytes: &mut [u8]) -> Result<(), Self::Error>;

    /// Compares text with what is expected, in order of the addresses. Hosts for which reading costs a system call read pages at a time.
    ///
    /// # Errors
    /// The first difference, or that the text cannot be read.
    fn verify_text(&mut self, expected: impl Iterator<Item = TextWrite>) -> Result<(), VerifyError<Self::Error>> {
        for TextWrite { at, bytes } in expected {
            let mut found = [0; crate::insn::MAX_INSN_BYTES];
            let found = &mut found[..bytes.len()];
            self.read_text(at, found)?;
            if *found != *bytes {
                let found = InsnBytes::new(found);
                return Err(VerifyError::Mismatch(Mismatch { at, expected: bytes, found }));
            }
        }
        Ok(())
    }

    /// Stores into the text while CPUs run it: the writes come sorted by address and each byte is stored whole. No page becomes writable and
    /// executable at once (I8).
    ///
    /// # Errors
    /// If a store failed; some of the others may have happened.
    fn write_text(&mut self, writes: impl Iterator<Item = TextWrite>) -> Result<(), Self::Error>;

    /// Makes every CPU that runs the target execute a serialising instruction (SDM volume 3, section 9.3).
    ///
    /// # Errors
    /// If that cannot be done; the batch is undone then.
    fn sync_cores(&mut self) -> Result<(), Self::Error>;

    /// Finds room for `len_bytes` of code that every address in `near` reaches with a 32-bit displacement, aligned to 16 bytes.
    ///
    /// # Errors
    /// If there is no memory within reach.
    fn alloc_code(&mut self, near: AddrRange, len_bytes: usize) -> Result<Addr, Self::Error>;

    /// Fills code memory that no CPU runs yet.
    ///
    /// # Errors
    /// If it cannot be written.
    fn write_code(&mut self, at: Addr, code: &[u8]) -> Result<(), Self::Error>;

    /// Gives code memory back. No CPU runs it any more.
    fn free_code(&mut self, code: AddrRange);

    /// Whether no thread is inside one of `ranges` (sorted by address), or inside a call that was made from one: the end of a grace period. The
    /// engine asks again later where it is not.
    ///
    /// A return address is inside if the byte *before* it is. What points to the first byte of a range is no return address into it.
    ///
    /// # Errors
    /// If that cannot be found out.
    fn is_unused(&mut self, ranges: &[AddrRange]) -> Result<bool, Self::Error>;

    /// Whether no thread stands in one of `ranges` (sorted by address), or comes back to it when a signal handler returns. There are nops in them and
    /// no calls, so that return addresses need not be looked at: one that leads behind a range may well be the address of a function's body. Unless a
    /// host knows better, it asks for more.
    ///
    /// # Errors
    /// If that cannot be found out.
    fn is_passed(&mut self, ranges: &[AddrRange]) -> Result<bool, Self::Error> {
        self.is_unused(ranges)
    }

    /// Called while waiting for trap handlers on other CPUs: a place to yield.
    fn relax(&mut self);
}
