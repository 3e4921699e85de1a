//! The width of the target, a value at run time.
//!
//! One implementation serves both widths, so a 64-bit host handles 32-bit targets and both are tested on one machine.

/// Which instruction set the target runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// i386: protected mode with 32-bit code segments.
    Bits32,
    /// x86-64: 64-bit mode of long mode.
    Bits64,
}

impl Mode {
    /// The mode that this code itself was compiled for.
    pub const NATIVE: Self = if size_of::<usize>() == 8 { Self::Bits64 } else { Self::Bits32 };

    /// 32 or 64, as decoders want it.
    pub const fn bitness(self) -> u32 {
        match self {
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    /// Bytes in a machine word: 4 or 8.
    pub const fn word_bytes(self) -> u32 {
        self.bitness() / 8
    }
}
