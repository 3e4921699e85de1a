//! Whether code looks at the return address of its own function.
//!
//! Owns [`Stack`], which knows at each instruction how far the canonical frame address is from a register: from the unwind information where there is
//! any, and by following pushes and pops where there is none. The return address is the word below that address. Neighbours: the [scan](crate::scan) feeds it.
//! Invariant: `ret` and calls are not looking; whatever else touches the word is.

use std::collections::HashMap;

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};
use trapline_engine::Mode;

use crate::{
    frames::{Cfa, Frames, frame_pointer, stack_pointer},
    scan::branch_target,
};

/// Follows the stack through one unit of code.
pub(crate) struct Stack {
    mode: Mode,
    now: Cfa,
    how: How,
    /// Whether something below the stack pointer was used.
    uses_red_zone: bool,
    /// Whether the last instruction's distance was known by following.
    knew: bool,
}

enum How {
    /// The rows that are still to come, the next one last.
    Rows(Vec<(u64, Cfa)>),
    /// What branches say of the instructions that they lead to.
    Followed(HashMap<u64, Cfa>),
}

impl Stack {
    /// For a unit that begins at `start`, perhaps as a function does.
    pub(crate) fn new(mode: Mode, frames: &Frames<'_>, start: u64, is_entry: bool) -> Self {
        let stack = Self::followed(mode);
        match frames.at(start) {
            Some(frame) => {
                let mut rows = Vec::new();
                frames.rows(frame, &mut rows);
                rows.reverse();
                Self { now: Cfa::Unknown, how: How::Rows(rows), ..stack }
            }
            None if is_entry => stack,
            None => Self { now: Cfa::Unknown, ..stack },
        }
    }

    /// For a function, whatever its unwind information says.
    pub(crate) fn followed(mode: Mode) -> Self {
        let how = How::Followed(HashMap::new());
        Self { mode, now: Cfa::at_entry(mode), how, uses_red_zone: false, knew: false }
    }

    /// Whether the distance of the stack pointer was known at the last instruction.
    pub(crate) fn knows(&self) -> bool {
        self.knew
    }

    /// Decoding was interrupted.
    pub(crate) fn lost(&mut self) {
        if let How::Followed(_) = self.how {
            self.now = Cfa::Unknown;
        }
    }

    /// Goes over `insn`. Returns whether it looks at the return address.
    pub(crate) fn follow(&mut self, insn: &Instruction, flow: FlowControl) -> bool {
        match &mut self.how {
            How::Rows(rows) => {
                while let Some((_, cfa)) = rows.pop_if(|(from, _)| *from <= insn.ip()) {
                    self.now = cfa;
                }
            }
            How::Followed(known) => {
                if let Some(cfa) = known.get(&insn.ip()) {
                    self.now = *cfa;
                }
            }
        }
        self.knew = matches!(self.now, Cfa::Register(register, _) if register == stack_pointer(self.mode));
        let Cfa::Register(register, offset) = self.now else { return false };
        let looks = self.touches(insn, register, offset);
        if let How::Followed(_) = self.how {
            self.step(insn, flow);
        }
        looks
    }

    fn touches(&mut self, insn: &Instruction, register: u16, offset: i64) -> bool {
        let word = i64::from(self.mode.word_bytes());
        // Most instructions: no memory, no stack.
        if insn.mnemonic() == Mnemonic::Pop && register == stack_pointer(self.mode) && offset == word {
            return true;
        }
        if !matches!(insn.op0_kind(), OpKind::Memory) && !matches!(insn.op1_kind(), OpKind::Memory) {
            return false;
        }
        if insn.memory_index() != Register::None || number(self.mode, insn.memory_base()) != Some(register) {
            return false;
        }
        let from_cfa = insn.memory_displacement64().cast_signed().wrapping_sub(offset);
        let from_cfa = if self.mode == Mode::Bits32 { sign_extended(from_cfa) } else { from_cfa };
        let is_below = insn.memory_displacement64().cast_signed() < 0 && register == stack_pointer(self.mode);
        self.uses_red_zone |= is_below;
        match insn.mnemonic() {
            // Moving the stack pointer there, to return; or the end of an array in the red zone.
            Mnemonic::Lea if number(self.mode, insn.op0_register()) == Some(stack_pointer(self.mode)) => false,
            Mnemonic::Lea if self.uses_red_zone && offset == word => false,
            Mnemonic::Lea => from_cfa == -word,
            Mnemonic::Nop => false,
            // Prologues that align the stack push a copy of the return address, for debuggers. Nothing uses it.
            Mnemonic::Push if register != stack_pointer(self.mode) && register != frame_pointer(self.mode) => false,
            _ => {
                let bytes = i64::try_from(insn.memory_size().size()).unwrap_or(word).max(1);
                from_cfa < 0 && from_cfa.saturating_add(bytes) > -word
            }
        }
    }

    /// Where there is no unwind information: what `insn` does to the stack pointer.
    fn step(&mut self, insn: &Instruction, flow: FlowControl) {
        let How::Followed(known) = &mut self.how else { return };
        let Cfa::Register(register, offset) = self.now else { return };
        let (sp, fp, word) = (stack_pointer(self.mode), frame_pointer(self.mode), i64::from(self.mode.word_bytes()));
        match flow {
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                if let Some(target) = branch_target(insn).filter(|target| *target > insn.ip()) {
                    known.insert(target, self.now);
                }
                if flow == FlowControl::UnconditionalBranch {
                    self.now = Cfa::Unknown;
                }
                return;
            }
            FlowControl::Return | FlowControl::IndirectBranch | FlowControl::Exception => {
                self.now = Cfa::Unknown;
                return;
            }
            // What is called leaves the stack as it was, or else it is no function.
            FlowControl::Call | FlowControl::IndirectCall => return,
            _ => {}
        }
        if register != sp {
            return;
        }
        let is_sp = number(self.mode, insn.op0_register()) == Some(sp) && insn.op0_kind() == OpKind::Register;
        self.now = match insn.mnemonic() {
            _ if insn.is_stack_instruction() && !is_sp => {
                Cfa::Register(sp, offset.wrapping_sub(insn.stack_pointer_increment().into()))
            }
            Mnemonic::Sub if is_sp && is_immediate(insn) => {
                Cfa::Register(sp, offset.wrapping_add(insn.immediate(1).cast_signed()))
            }
            Mnemonic::Add if is_sp && is_immediate(insn) => {
                Cfa::Register(sp, offset.wrapping_sub(insn.immediate(1).cast_signed()))
            }
            Mnemonic::Lea
                if is_sp
                    && number(self.mode, insn.memory_base()) == Some(sp)
                    && insn.memory_index() == Register::None =>
            {
                Cfa::Register(sp, offset.wrapping_sub(insn.memory_displacement64().cast_signed()))
            }
            Mnemonic::Mov
                if number(self.mode, insn.op0_register()) == Some(fp)
                    && number(self.mode, insn.op1_register()) == Some(sp) =>
            {
                Cfa::Register(fp, offset)
            }
            _ if is_sp && !matches!(insn.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Push) => Cfa::Unknown,
            Mnemonic::Leave | Mnemonic::Enter => Cfa::Unknown,
            _ if offset < word => Cfa::Unknown,
            _ => self.now,
        };
    }
}

fn is_immediate(insn: &Instruction) -> bool {
    matches!(
        insn.op1_kind(),
        OpKind::Immediate8to32 | OpKind::Immediate8to64 | OpKind::Immediate32 | OpKind::Immediate32to64
    )
}

fn sign_extended(value: i64) -> i64 {
    #[expect(clippy::cast_possible_truncation, reason = "addresses of 32-bit code wrap")]
    let low = value as i32;
    low.into()
}

/// The DWARF number of a general register (psABI, "DWARF Register Number Mapping"), whatever width it is named with.
fn number(mode: Mode, register: Register) -> Option<u16> {
    /// By the numbers that instructions are encoded with; the others are the same.
    const OF_64_BITS: [u16; 8] = [0, 2, 1, 3, 7, 6, 4, 5];
    if !register.is_gpr() {
        return None;
    }
    let encoded = register.full_register().number();
    match mode {
        Mode::Bits64 => OF_64_BITS.get(encoded).copied().or_else(|| u16::try_from(encoded).ok()),
        Mode::Bits32 => u16::try_from(encoded).ok(),
    }
}
