//! Addresses in the target, and ranges of them.
//!
//! Owns [`Addr`], which keeps the target's pointers apart from ours, and [`AddrRange`]. Everything that flows through the
//! engine carries one of them. Invariant: arithmetic wraps as the CPU's does in 64-bit mode; narrowing to a 32-bit target
//! happens where bytes are encoded, with the [`Mode`](crate::Mode) at hand.

use core::fmt;

/// An address in the traced target: of a site, a trampoline, a stack word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Addr(u64);

impl Addr {
    /// Wraps a numeric address.
    #[inline]
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The numeric address.
    #[inline]
    pub const fn value(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on; negative counts go back.
    #[must_use]
    #[inline]
    pub const fn offset(self, bytes: i64) -> Self {
        Self(self.0.wrapping_add_signed(bytes))
    }

    /// The address behind `bytes` bytes that begin here.
    #[must_use]
    #[inline]
    pub const fn after(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes as u64))
    }

    /// The signed distance in bytes from `origin` to this address.
    #[inline]
    pub const fn distance_from(self, origin: Self) -> i64 {
        self.0.wrapping_sub(origin.0).cast_signed()
    }
}

impl From<u64> for Addr {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// A half-open range of target addresses, `start..end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct AddrRange {
    /// First address inside.
    pub start: Addr,
    /// First address behind.
    pub end: Addr,
}

impl AddrRange {
    /// The range of `len_bytes` from `start`.
    pub const fn new(start: Addr, len_bytes: u64) -> Self {
        Self { start, end: start.offset(len_bytes.cast_signed()) }
    }

    /// Whether `addr` lies inside.
    pub fn contains(self, addr: Addr) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Length in bytes.
    pub const fn len_bytes(self) -> u64 {
        self.end.0.wrapping_sub(self.start.0)
    }
}
