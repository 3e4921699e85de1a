//! Instructions: their bytes, what they do to control flow, how they are encoded and moved.
//!
//! Owns everything in the engine that knows how x86 instructions look: [`encode`] writes the few that trapline puts
//! into sites, [`Effect`] says what the int3 handler has to do in place of one. Neighbours: sites and pokes carry
//! [`InsnBytes`] and effects, trampolines are emitted beside it. Invariant: what is not understood is an error or
//! "everything", never a guess.

mod bytes;
pub mod clobbers;
pub mod effect;
pub mod encode;
mod nops;
mod regs;
pub mod relocate;

use iced_x86::{Decoder, DecoderOptions, Instruction};

pub use bytes::{InsnBytes, MAX_INSN_BYTES};
pub use clobbers::{Clobbers, clobbers};
pub use effect::{Condition, Effect, NotEmulated, NotEmulatedReason};
pub use encode::{CALL_BYTES, INT3, OutOfReach, call, jmp, nop};
pub use nops::leading_nops;
pub use regs::{Gpr, RegSet};
pub use relocate::{
    RelocateError, RelocateOptions, RelocateReason, Relocated, max_relocated_bytes, pc_thunk, relocate,
};

use crate::{Addr, Mode};

/// AMD's reading is taken where the vendors differ: a near branch with an operand-size prefix in 64-bit mode is 16 bits
/// wide on AMD and has the prefix ignored on Intel (SDM volume 2, "CALL"; APM volume 3, "CALL (Near)"). Read this way
/// such a branch shows as a 16-bit one, which everything here refuses.
const DECODER_OPTIONS: u32 = DecoderOptions::AMD;

/// Decodes the instruction that `bytes` begin with, as it executes at `at`; an invalid one if there is none.
fn decode(mode: Mode, at: Addr, bytes: &[u8]) -> Instruction {
    let bytes = &bytes[..bytes.len().min(MAX_INSN_BYTES)];
    Decoder::with_ip(mode.bitness(), bytes, truncate(mode, at).value(), DECODER_OPTIONS).decode()
}

/// An address as the instruction pointer of `mode` holds it: 32-bit code wraps at 4 GiB.
fn truncate(mode: Mode, addr: Addr) -> Addr {
    match mode {
        Mode::Bits32 => Addr::new(addr.value() & u64::from(u32::MAX)),
        Mode::Bits64 => addr,
    }
}
