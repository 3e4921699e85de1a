//! Where a function's stack pointer stands, so that its `ret` is known to go back to its caller.
//!
//! Owns [`Frame`], an abstract register file for the analysis in the parent module: for each register either its
//! distance from the stack pointer at the entry, or nothing. A `ret` is a jump through the stack, and code that first
//! moves the stack pointer or overwrites the slot (a retpoline, a context switch) uses it to jump anywhere. Invariant:
//! a distance that is present is the true one on every path.

use iced_x86::{Code, CodeSize, Instruction, InstructionInfo, Mnemonic, OpAccess, OpKind, Register, UsedMemory};

use super::{NotUnderstood, is_written};
use crate::{
    Mode,
    insn::{Gpr, RegSet},
};

/// Register values between two instructions.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Frame {
    mode: Mode,
    /// By register number: bytes above the slot of the return address, if the register points into the stack at a known
    /// place.
    offsets: [Option<i64>; 16],
}

impl Frame {
    /// At the first instruction the stack pointer is at the return address, and nothing else is known.
    pub(super) fn at_entry(mode: Mode) -> Self {
        let mut frame = Self { mode, offsets: [None; 16] };
        frame.set(Gpr::SP, Some(0));
        frame
    }

    /// What is true of both.
    pub(super) fn join(&self, other: &Self) -> Self {
        let mut joined = self.clone();
        for (offset, other) in joined.offsets.iter_mut().zip(&other.offsets) {
            *offset = offset.filter(|offset| Some(*offset) == *other);
        }
        joined
    }

    /// Whether the stack pointer is where it was at the entry.
    pub(super) fn is_at_return_address(&self) -> bool {
        self.offset(Gpr::SP) == Some(0)
    }

    /// The frame behind `insn`, or an error if it may write the slot of the return address.
    pub(super) fn step(&self, insn: &Instruction, info: &InstructionInfo) -> Result<Self, NotUnderstood> {
        if insn.mnemonic() == Mnemonic::Pop && Gpr::of(insn.memory_base()) == Some(Gpr::SP) {
            // Its address is computed behind the increment of the stack pointer (SDM volume 2, "POP"). Nobody compiles
            // this.
            return Err(NotUnderstood);
        }
        for memory in info.used_memory() {
            self.check_write(memory)?;
        }
        let mut after = self.clone();
        for used in info.used_registers().iter().copied().filter(|used| is_written(*used)) {
            if let Some(register) = Gpr::of(used.register()) {
                after.set(register, None);
            }
        }
        if let Some((register, offset)) = self.pointer_made_by(insn) {
            after.set(register, offset);
        }
        if let Some(offset) = self.stack_pointer_after(insn) {
            after.set(Gpr::SP, Some(offset));
        }
        Ok(after)
    }

    /// Turns the frame behind a call instruction into the one that the callee returns to: its return address is gone
    /// from the stack, and so is everything in the registers that were the caller's to save.
    pub(super) fn return_from_call(&mut self) {
        let word = i64::from(self.mode.word_bytes());
        self.set(Gpr::SP, self.offset(Gpr::SP).map(|offset| self.wrap(offset + word)));
        for register in RegSet::caller_saved(self.mode).iter() {
            self.set(register, None);
        }
    }

    /// A store at a known place in the stack must not touch the return address. Stores at unknown places are trusted,
    /// as the parent module says.
    fn check_write(&self, memory: &UsedMemory) -> Result<(), NotUnderstood> {
        match memory.access() {
            OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess => return Ok(()),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {}
        }
        let Some(base) = Gpr::of(memory.base()).and_then(|base| self.offset(base)) else { return Ok(()) };
        let full_width = match self.mode {
            Mode::Bits32 => CodeSize::Code32,
            Mode::Bits64 => CodeSize::Code64,
        };
        if memory.address_size() != full_width {
            return Err(NotUnderstood);
        }
        if memory.index() != Register::None {
            return Ok(());
        }
        let start = self.wrap(base.wrapping_add_unsigned(memory.displacement()));
        let size = i64::try_from(memory.memory_size().size()).unwrap_or(0);
        let misses_return_address = start >= i64::from(self.mode.word_bytes()) || start.saturating_add(size) <= 0;
        if size > 0 && misses_return_address { Ok(()) } else { Err(NotUnderstood) }
    }

    /// The register, if any, that `insn` makes a copy of a pointer in, and where that points.
    fn pointer_made_by(&self, insn: &Instruction) -> Option<(Gpr, Option<i64>)> {
        if insn.op0_kind() != OpKind::Register {
            return None;
        }
        let target = self.full_width(insn.op0_register())?;
        let offset = match insn.mnemonic() {
            Mnemonic::Mov if insn.op1_kind() == OpKind::Register => {
                self.full_width(insn.op1_register()).and_then(|source| self.offset(source))
            }
            Mnemonic::Lea if insn.memory_index() == Register::None => self
                .full_width(insn.memory_base())
                .and_then(|base| self.offset(base))
                .map(|base| self.wrap(base.wrapping_add_unsigned(insn.memory_displacement64()))),
            Mnemonic::Add => {
                self.offset(target).zip(immediate(insn)).map(|(offset, by)| self.wrap(offset.wrapping_add(by)))
            }
            Mnemonic::Sub => {
                self.offset(target).zip(immediate(insn)).map(|(offset, by)| self.wrap(offset.wrapping_sub(by)))
            }
            _ => return None,
        };
        Some((target, offset))
    }

    /// The stack pointer behind a push, pop, call or leave, if it was known before.
    fn stack_pointer_after(&self, insn: &Instruction) -> Option<i64> {
        match (insn.code(), self.mode) {
            (Code::Leaved, Mode::Bits32) | (Code::Leaveq, Mode::Bits64) => {
                self.offset(Gpr::BP).map(|offset| self.wrap(offset + i64::from(self.mode.word_bytes())))
            }
            (Code::Leavew | Code::Leaved | Code::Leaveq, _) => None,
            _ => match insn.mnemonic() {
                Mnemonic::Pop
                    if insn.op0_kind() == OpKind::Register && Gpr::of(insn.op0_register()) == Some(Gpr::SP) =>
                {
                    None
                }
                Mnemonic::Push
                | Mnemonic::Pop
                | Mnemonic::Call
                | Mnemonic::Pushf
                | Mnemonic::Pushfd
                | Mnemonic::Pushfq
                | Mnemonic::Popf
                | Mnemonic::Popfd
                | Mnemonic::Popfq
                | Mnemonic::Pusha
                | Mnemonic::Pushad
                | Mnemonic::Popa
                | Mnemonic::Popad => {
                    self.offset(Gpr::SP).map(|offset| self.wrap(offset + i64::from(insn.stack_pointer_increment())))
                }
                _ => None,
            },
        }
    }

    fn offset(&self, register: Gpr) -> Option<i64> {
        self.offsets[usize::from(register.number())]
    }

    fn set(&mut self, register: Gpr, offset: Option<i64>) {
        self.offsets[usize::from(register.number())] = offset;
    }

    /// `register` if it is a general-purpose one of the mode's full width.
    fn full_width(&self, register: Register) -> Option<Gpr> {
        let is_full = match self.mode {
            Mode::Bits32 => register.is_gpr32(),
            Mode::Bits64 => register.is_gpr64(),
        };
        is_full.then(|| Gpr::of(register)).flatten()
    }

    /// An offset as the registers of the mode hold it.
    fn wrap(&self, offset: i64) -> i64 {
        match self.mode {
            #[expect(clippy::cast_possible_truncation, reason = "32-bit registers wrap")]
            Mode::Bits32 => i64::from(offset as i32),
            Mode::Bits64 => offset,
        }
    }
}

/// The second operand, sign-extended, if it is an immediate.
fn immediate(insn: &Instruction) -> Option<i64> {
    insn.try_immediate(1).ok().map(u64::cast_signed)
}
