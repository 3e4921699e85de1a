//! The bytes of moved instructions.
//!
//! Owns [`Emitter`], which appends instructions to a stub whose address is known, so that every displacement is final
//! when it is written, except those of branches forward to instructions of the same stub, which [`Emitter::finish`]
//! fills in. Neighbours: the parent module decides what to emit. Invariant: nothing that it adds changes flags or
//! registers that the original did not change, or uses the stack but for the push of a return address.

use alloc::vec::Vec;

use super::{Destination, Moved, RelocateReason};
use crate::{
    Addr, Mode,
    insn::{
        Condition, Gpr,
        encode::{self, displacement32},
        truncate,
    },
};

/// `jmp [rip + 0]` and the address behind it.
pub(super) const FAR_JUMP_BYTES: usize = 14;

/// Bytes of a `jmp rel8`.
const SHORT_JUMP_BYTES: u8 = 2;

/// A stub in the making.
pub(super) struct Emitter {
    mode: Mode,
    to: Addr,
    bytes: Vec<u8>,
    /// Where a `rel32` stands in `bytes`, and the offset in the window of the instruction that it leads to.
    forward_branches: Vec<(usize, u32)>,
}

impl Emitter {
    /// A stub that will stand at `to`.
    pub(super) fn new(mode: Mode, to: Addr) -> Self {
        Self { mode, to, bytes: Vec::new(), forward_branches: Vec::new() }
    }

    /// How long the stub is.
    pub(super) fn offset(&self) -> u32 {
        u32::try_from(self.bytes.len()).expect("a stub is some hundred bytes long")
    }

    /// Appends `moved`.
    pub(super) fn emit(&mut self, moved: &Moved<'_>) -> Result<(), RelocateReason> {
        match *moved {
            Moved::Verbatim(bytes) => self.bytes.extend_from_slice(bytes),
            Moved::RipRelative { bytes, displacement_at, target } => {
                self.rip_relative(bytes, displacement_at, target)?;
            }
            Moved::Jump(destination) => self.jump(destination),
            Moved::Jcc(condition, destination) => self.jcc(condition, destination),
            Moved::CounterJump { opcode, destination } => self.counter_jump(opcode, destination),
            Moved::Call { target, return_to } => {
                self.push_address(return_to);
                self.jump(Destination::Outside(target));
            }
            Moved::IndirectCall { bytes, displacement, return_to } => {
                self.push_address(return_to);
                let start = self.bytes.len();
                match displacement {
                    Some((displacement_at, target)) => self.rip_relative(bytes, displacement_at, target)?,
                    None => self.bytes.extend_from_slice(bytes),
                }
                make_call_a_jump(self.mode, &mut self.bytes[start..])?;
            }
            Moved::PushAddress(address) => self.push_address(address),
            Moved::LoadAddress(register, address) => self.load_address(register, address),
        }
        Ok(())
    }

    /// Appends a jump that reaches everything.
    pub(super) fn jump(&mut self, destination: Destination) {
        match destination {
            Destination::Outside(target) => {
                if let Ok(jmp) = encode::jmp(self.here(), target, self.mode) {
                    self.bytes.extend_from_slice(&jmp);
                } else {
                    self.bytes.extend_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
                    self.bytes.extend_from_slice(&target.value().to_le_bytes());
                }
            }
            Destination::Window(offset) => {
                self.bytes.push(0xe9);
                self.forward(offset);
            }
        }
    }

    /// Fills in the branches within the stub. `boundaries` say where each instruction of the window went.
    pub(super) fn finish(mut self, boundaries: &[(u32, u32)]) -> Vec<u8> {
        for (at, window_offset) in self.forward_branches {
            let (_, stub_offset) = boundaries
                .iter()
                .find(|(old, _)| *old == window_offset)
                .expect("branches lead to instructions of the window");
            let next = u32::try_from(at + 4).expect("a stub is some hundred bytes long");
            self.bytes[at..at + 4].copy_from_slice(&(stub_offset - next).to_le_bytes());
        }
        self.bytes
    }

    /// The address of the next byte.
    fn here(&self) -> Addr {
        truncate(self.mode, self.to.offset(i64::from(self.offset())))
    }

    fn forward(&mut self, window_offset: u32) {
        self.forward_branches.push((self.bytes.len(), window_offset));
        self.bytes.extend_from_slice(&[0; 4]);
    }

    fn rip_relative(&mut self, bytes: &[u8], displacement_at: usize, target: Addr) -> Result<(), RelocateReason> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        let displacement = displacement32(self.here(), target, self.mode).ok_or(RelocateReason::OperandOutOfReach)?;
        let field = start + displacement_at..start + displacement_at + 4;
        self.bytes[field].copy_from_slice(&displacement.to_le_bytes());
        Ok(())
    }

    fn jcc(&mut self, condition: Condition, destination: Destination) {
        match destination {
            Destination::Window(offset) => {
                self.bytes.extend_from_slice(&[0x0f, 0x80 | condition.encoding()]);
                self.forward(offset);
            }
            Destination::Outside(target) => {
                let long = self.here().offset(2 + 4);
                if let Some(displacement) = displacement32(long, target, self.mode) {
                    self.bytes.extend_from_slice(&[0x0f, 0x80 | condition.encoding()]);
                    self.bytes.extend_from_slice(&displacement.to_le_bytes());
                } else {
                    self.jump_past_short(0x70 | condition.negated().encoding(), destination);
                }
            }
        }
    }

    /// ```text
    ///         loop taken
    ///         jmp  not_taken
    /// taken:  jmp  destination
    /// not_taken:
    /// ```
    fn counter_jump(&mut self, opcode: &[u8], destination: Destination) {
        self.bytes.extend_from_slice(opcode);
        self.bytes.push(SHORT_JUMP_BYTES);
        self.jump_past_short(0xeb, destination);
    }

    /// A short jump with the opcode `around`, past a jump to `destination`.
    fn jump_past_short(&mut self, around: u8, destination: Destination) {
        self.bytes.extend_from_slice(&[around, 0]);
        let start = self.bytes.len();
        self.jump(destination);
        let jump_bytes = u8::try_from(self.bytes.len() - start).expect("a jump has 5 or 14 bytes");
        self.bytes[start - 1] = jump_bytes;
    }

    /// Pushes a constant. In 64-bit mode `push imm32` is sign-extended; what does not fit gets its upper half stored
    /// over.
    fn push_address(&mut self, address: Addr) {
        let [low, high] = halves(address);
        self.bytes.push(0x68);
        self.bytes.extend_from_slice(&low.to_le_bytes());
        let sign_extension = if low.cast_signed() < 0 { u32::MAX } else { 0 };
        if self.mode == Mode::Bits64 && high != sign_extension {
            self.bytes.extend_from_slice(&[0xc7, 0x44, 0x24, 0x04]);
            self.bytes.extend_from_slice(&high.to_le_bytes());
        }
    }

    /// `mov register, address`.
    fn load_address(&mut self, register: Gpr, address: Addr) {
        let [low, high] = halves(address);
        if self.mode == Mode::Bits64 {
            self.bytes.push(0x48 | register.number() >> 3);
        }
        self.bytes.push(0xb8 | register.number() & 7);
        self.bytes.extend_from_slice(&low.to_le_bytes());
        if self.mode == Mode::Bits64 {
            self.bytes.extend_from_slice(&high.to_le_bytes());
        }
    }
}

/// The lower and the upper four bytes of an address.
#[expect(clippy::cast_possible_truncation, reason = "halves")]
fn halves(address: Addr) -> [u32; 2] {
    [address.value() as u32, (address.value() >> 32) as u32]
}

/// Turns `call rm` (`ff /2`) into `jmp rm` (`ff /4`) with the same operand.
fn make_call_a_jump(mode: Mode, bytes: &mut [u8]) -> Result<(), RelocateReason> {
    let is_prefix = |byte: u8| {
        matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf2 | 0xf3)
            || (mode == Mode::Bits64 && byte & 0xf0 == 0x40)
    };
    let opcode = bytes.iter().position(|byte| !is_prefix(*byte));
    match opcode.map(|at| &mut bytes[at..]) {
        Some([0xff, modrm, ..]) if *modrm >> 3 & 7 == 2 => {
            *modrm = *modrm & !(7 << 3) | 4 << 3;
            Ok(())
        }
        _ => Err(RelocateReason::Unsupported),
    }
}
