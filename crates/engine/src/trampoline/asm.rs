//! A thin assembler over iced-x86 that writes one instruction sequence for either width.
//!
//! Owns the choice between the 32- and the 64-bit form of each instruction; encoding is iced's. Only [`trampoline`](super) uses it.

use alloc::vec::Vec;

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, IcedError, Instruction, InstructionBlock, MemoryOperand, Register,
};

use crate::{Addr, Mode, insn::Gpr};

/// The segment register whose base leads to the thread's state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Segment {
    /// fs: the thread pointer of the x86-64 psABI.
    Fs,
    /// gs: the thread pointer of the i386 psABI, and of most 64-bit kernels.
    Gs,
}

/// The register as wide as the mode.
fn wide(register: Gpr, mode: Mode) -> Register {
    let first = match mode {
        Mode::Bits32 => Register::EAX,
        Mode::Bits64 => Register::RAX,
    };
    first + u32::from(register.number())
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    segment: Option<Segment>,
    base: Option<Gpr>,
    index: Option<Gpr>,
    displacement: i64,
}

impl Mem {
    pub(crate) fn at(base: Gpr, displacement: i64) -> Self {
        Self { segment: None, base: Some(base), index: None, displacement }
    }

    pub(crate) fn indexed(base: Gpr, index: Gpr, displacement: i64) -> Self {
        Self { segment: None, base: Some(base), index: Some(index), displacement }
    }

    pub(crate) fn thread(segment: Segment, displacement: i64) -> Self {
        Self { segment: Some(segment), base: None, index: None, displacement }
    }

    pub(crate) fn thread_indexed(segment: Segment, index: Gpr, displacement: i64) -> Self {
        Self { segment: Some(segment), base: Some(index), index: None, displacement }
    }

    fn operand(self, mode: Mode) -> MemoryOperand {
        let register = |register: Option<Gpr>| register.map_or(Register::None, |register| wide(register, mode));
        let (base, index) = (register(self.base), register(self.index));
        let segment = match self.segment {
            None => Register::None,
            Some(Segment::Fs) => Register::FS,
            Some(Segment::Gs) => Register::GS,
        };
        // Without a base the size of the displacement is the address size; with one, 1 lets the encoder choose.
        let displacement_size = if self.base.is_some() { 1 } else { mode.word_bytes() };
        MemoryOperand::new(base, index, 1, self.displacement, displacement_size, false, segment)
    }
}

/// A place in the code under construction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Label(u64);

/// Instructions under construction. A failed encoding is kept and reported by [`assemble`](Self::assemble).
pub(crate) struct Asm {
    mode: Mode,
    instructions: Vec<Instruction>,
    labels: u64,
    bound: Option<Label>,
    error: Option<IcedError>,
}

impl Asm {
    pub(crate) fn new(mode: Mode) -> Self {
        Self { mode, instructions: Vec::new(), labels: 0, bound: None, error: None }
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// A label to jump to before, or after, it is bound.
    pub(crate) fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels)
    }

    /// Binds `label` to the next instruction.
    pub(crate) fn bind(&mut self, label: Label) {
        debug_assert!(self.bound.is_none(), "one label an instruction");
        self.bound = Some(label);
    }

    fn add(&mut self, instruction: Result<Instruction, IcedError>) {
        match instruction {
            Ok(mut instruction) => {
                // iced's BlockEncoder resolves branches by the instructions' addresses: labels are addresses that no code has.
                instruction.set_ip(self.bound.take().map_or(0, |label| label.0));
                self.instructions.push(instruction);
            }
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }

    fn by_mode(&self, bits32: Code, bits64: Code) -> Code {
        match self.mode {
            Mode::Bits32 => bits32,
            Mode::Bits64 => bits64,
        }
    }

    fn unary(&mut self, bits32: Code, bits64: Code, register: Gpr) {
        let code = self.by_mode(bits32, bits64);
        self.add(Instruction::with1(code, wide(register, self.mode)));
    }

    fn plain(&mut self, bits32: Code, bits64: Code) {
        let code = self.by_mode(bits32, bits64);
        self.add(Ok(Instruction::with(code)));
    }

    fn memory(&mut self, bits32: Code, bits64: Code, memory: Mem) {
        let code = self.by_mode(bits32, bits64);
        self.add(Instruction::with1(code, memory.operand(self.mode)));
    }

    pub(crate) fn push(&mut self, register: Gpr) {
        self.unary(Code::Push_r32, Code::Push_r64, register);
    }

    pub(crate) fn pop(&mut self, register: Gpr) {
        self.unary(Code::Pop_r32, Code::Pop_r64, register);
    }

    pub(crate) fn load(&mut self, register: Gpr, from: Mem) {
        let code = self.by_mode(Code::Mov_r32_rm32, Code::Mov_r64_rm64);
        self.add(Instruction::with2(code, wide(register, self.mode), from.operand(self.mode)));
    }

    pub(crate) fn store(&mut self, to: Mem, register: Gpr) {
        let code = self.by_mode(Code::Mov_rm32_r32, Code::Mov_rm64_r64);
        self.add(Instruction::with2(code, to.operand(self.mode), wide(register, self.mode)));
    }

    pub(crate) fn copy(&mut self, to: Gpr, from: Gpr) {
        let code = self.by_mode(Code::Mov_r32_rm32, Code::Mov_r64_rm64);
        self.add(Instruction::with2(code, wide(to, self.mode), wide(from, self.mode)));
    }

    /// Address arithmetic; leaves the flags alone.
    pub(crate) fn lea(&mut self, register: Gpr, of: Mem) {
        let code = self.by_mode(Code::Lea_r32_m, Code::Lea_r64_m);
        self.add(Instruction::with2(code, wide(register, self.mode), of.operand(self.mode)));
    }

    pub(crate) fn load_address(&mut self, register: Gpr, address: Addr) {
        let register = wide(register, self.mode);
        self.add(match self.mode {
            #[expect(clippy::cast_possible_truncation, reason = "addresses of a 32-bit target have 32 bits")]
            Mode::Bits32 => Instruction::with2(Code::Mov_r32_imm32, register, address.value() as u32),
            Mode::Bits64 => Instruction::with2(Code::Mov_r64_imm64, register, address.value()),
        });
    }

    /// Rounds a register down to a multiple of a power of two, up to 64. Writes flags.
    pub(crate) fn align_down(&mut self, register: Gpr, bytes: i32) {
        let code = self.by_mode(Code::And_rm32_imm8, Code::And_rm64_imm8);
        self.add(Instruction::with2(code, wide(register, self.mode), -bytes));
    }

    pub(crate) fn load_u32(&mut self, register: Gpr, value: u32) {
        self.add(Instruction::with2(Code::Mov_r32_imm32, wide(register, Mode::Bits32), value));
    }

    /// The arithmetic flags into ax: SF, ZF, AF, PF, CF into ah, OF into al. A tenth of what pushf and popf cost.
    pub(crate) fn flags_to_ax(&mut self) {
        self.add(Ok(Instruction::with(Code::Lahf)));
        self.add(Instruction::with1(Code::Seto_rm8, Register::AL));
    }

    /// The inverse of [`flags_to_ax`](Self::flags_to_ax): adding 0x7f to al sets OF where al was 1.
    pub(crate) fn ax_to_flags(&mut self) {
        self.add(Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x7f));
        self.add(Ok(Instruction::with(Code::Sahf)));
    }

    pub(crate) fn push_flags(&mut self) {
        self.plain(Code::Pushfd, Code::Pushfq);
    }

    pub(crate) fn pop_flags(&mut self) {
        self.plain(Code::Popfd, Code::Popfq);
    }

    pub(crate) fn compare_byte(&mut self, memory: Mem, value: u32) {
        self.add(Instruction::with2(Code::Cmp_rm8_imm8, memory.operand(self.mode), value));
    }

    pub(crate) fn store_byte(&mut self, memory: Mem, value: u32) {
        self.add(Instruction::with2(Code::Mov_rm8_imm8, memory.operand(self.mode), value));
    }

    pub(crate) fn lock_increment(&mut self, memory: Mem) {
        let code = self.by_mode(Code::Inc_rm32, Code::Inc_rm64);
        self.add(Instruction::with1(code, memory.operand(self.mode)).map(|mut instruction| {
            instruction.set_has_lock_prefix(true);
            instruction
        }));
    }

    pub(crate) fn jump_if_not_equal(&mut self, to: Label) {
        let code = self.by_mode(Code::Jne_rel32_32, Code::Jne_rel32_64);
        self.add(Instruction::with_branch(code, to.0));
    }

    pub(crate) fn jump(&mut self, to: Label) {
        let code = self.by_mode(Code::Jmp_rel32_32, Code::Jmp_rel32_64);
        self.add(Instruction::with_branch(code, to.0));
    }

    /// A direct call, or one through a pointer behind the code where the target is out of a direct one's reach.
    pub(crate) fn call(&mut self, to: Addr) {
        let code = self.by_mode(Code::Call_rel32_32, Code::Call_rel32_64);
        self.add(Instruction::with_branch(code, to.value()));
    }

    /// One byte, for a label to stand on.
    pub(crate) fn nop(&mut self) {
        self.add(Ok(Instruction::with(Code::Nopd)));
    }

    pub(crate) fn ret(&mut self) {
        self.plain(Code::Retnd, Code::Retnq);
    }

    /// sp = bp; pop bp. Leaves the flags alone.
    pub(crate) fn leave(&mut self) {
        self.plain(Code::Leaved, Code::Leaveq);
    }

    pub(crate) fn fxsave(&mut self, memory: Mem) {
        self.memory(Code::Fxsave_m512byte, Code::Fxsave64_m512byte, memory);
    }

    pub(crate) fn fxrstor(&mut self, memory: Mem) {
        self.memory(Code::Fxrstor_m512byte, Code::Fxrstor64_m512byte, memory);
    }

    pub(crate) fn xsave(&mut self, memory: Mem) {
        self.memory(Code::Xsave_mem, Code::Xsave64_mem, memory);
    }

    pub(crate) fn xsavec(&mut self, memory: Mem) {
        self.memory(Code::Xsavec_mem, Code::Xsavec64_mem, memory);
    }

    pub(crate) fn xrstor(&mut self, memory: Mem) {
        self.memory(Code::Xrstor_mem, Code::Xrstor64_mem, memory);
    }

    /// The machine code, to run at `at`.
    pub(crate) fn assemble(self, at: Addr) -> Result<Vec<u8>, IcedError> {
        debug_assert!(self.bound.is_none(), "a label is bound to an instruction");
        if let Some(error) = self.error {
            return Err(error);
        }
        let block = InstructionBlock::new(&self.instructions, at.value());
        BlockEncoder::encode(self.mode.bitness(), block, BlockEncoderOptions::NONE).map(|encoded| encoded.code_buffer)
    }
}
