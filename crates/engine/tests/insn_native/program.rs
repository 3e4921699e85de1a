//! Random beginnings of functions.
//!
//! Owns [`Op`], a grammar of what compilers put there and what is hard to move, and [`Program`], some of these made
//! into a function that ends at the machine's exit. Branches lead forward to another op or to one of two pads, each of
//! which leaves its mark in the data; calls lead to leaves that record their return address.

use iced_x86::{Code, Instruction, MemoryOperand};
use proptest::{prelude::*, sample::select};
use trapline_engine::{Addr, Mode, insn::Condition};

use crate::{
    asm::{assemble, direct, gpr, word},
    machine::{GPR_COUNT, Machine},
};

/// A general-purpose register other than the stack pointer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reg(usize);

/// One of the words at the start of the data page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot(usize);

impl Reg {
    pub(crate) fn at(number: usize) -> Self {
        assert_ne!(number, 4, "the stack pointer");
        Self(number)
    }
}

impl Slot {
    pub(crate) fn at(index: usize) -> Self {
        assert!(index < SLOT_COUNT);
        Self(index)
    }
}

/// Arithmetic that defines all status flags but AF.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Alu {
    Add,
    Sub,
    Xor,
    And,
    Or,
    Cmp,
}

/// Where a branch leads.
#[derive(Clone, Copy, Debug)]
pub(crate) enum To {
    /// That many ops further on, at most to the end.
    Skip(usize),
    /// One of the two pads.
    Pad(usize),
}

/// An instruction or two.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    MovImmediate(Reg, i32),
    MovRegister(Reg, Reg),
    Load(Reg, Slot),
    /// The displacement of these four is followed by an immediate, or stands behind more than one opcode byte.
    StoreImmediate(Slot, i32),
    CompareImmediate(Slot, i8),
    LoadByte(Reg, Slot),
    LoadIfCarry(Reg, Slot),
    Store(Slot, Reg),
    /// The address of a slot.
    LeaSlot(Reg, Slot),
    /// The address of the function's own first instruction.
    LeaFunction(Reg),
    LeaSum(Reg, Reg, Reg, i32),
    Alu(Alu, Reg, Reg),
    AluImmediate(Alu, Reg, i8),
    AluLoad(Alu, Reg, Slot),
    Push(Reg),
    PushSlot(Slot),
    Pop(Reg),
    StackLoad(Reg, u8),
    Jcc {
        condition: Condition,
        to: To,
        long: bool,
    },
    /// `loop`, `loope`, `loopne` and `jcxz`.
    CounterJump {
        which: usize,
        to: To,
    },
    Jmp {
        pad: usize,
        long: bool,
    },
    JmpSlot,
    CallLeaf(usize),
    CallSlot,
    CallRegister(Reg),
    /// `call` of a function that loads its return address into a register, as i386 code finds itself.
    CallPcThunk,
    /// `call` of the next instruction, which pops the address.
    CallNext(Reg),
    Ret,
}

/// A function made of ops.
#[derive(Clone, Debug)]
pub(crate) struct Program(pub(crate) Vec<Op>);

/// Offsets in the data page, behind the slots.
const SLOT_COUNT: usize = 32;
const PAD_MARKS: [i64; 2] = [0x200, 0x208];
const LEAF_RECORD: i64 = 0x210;
const PAD_POINTER: usize = 0x218;
const LEAF_POINTER: usize = 0x220;

/// The register that the PC thunk loads, as numbered in instructions: bx.
pub(crate) const PC_THUNK_REGISTER: u8 = 3;

/// A program's code and where the parts behind the ops are.
pub(crate) struct Assembled {
    pub(crate) code: Vec<u8>,
    pub(crate) pc_thunk: Addr,
    pads: [Addr; 2],
    leaves: [Addr; 2],
    /// Of each op, and of the end of the last.
    op_offsets: Vec<usize>,
}

impl Program {
    /// The code at [`Machine::function`].
    pub(crate) fn assemble(&self, machine: &Machine) -> Assembled {
        // The sizes of instructions do not depend on where branches lead, but must be known before the targets are.
        let near = machine.function().offset(0x40);
        let mut draft = Assembled {
            code: Vec::new(),
            pc_thunk: near,
            pads: [near; 2],
            leaves: [near; 2],
            op_offsets: vec![0x40; self.0.len() + 1],
        };
        draft = self.lay_out(machine, &draft);
        draft = self.lay_out(machine, &draft);
        draft
    }

    /// Puts the function and what belongs to it into the machine, with fresh data.
    pub(crate) fn load(&self, machine: &mut Machine) -> Assembled {
        let assembled = self.assemble(machine);
        machine.write_function(&assembled.code);
        assembled.reset_data(machine);
        assembled
    }

    fn lay_out(&self, machine: &Machine, previous: &Assembled) -> Assembled {
        let function = machine.function();
        let place = |offset: usize| function.offset(i64::try_from(offset).unwrap());
        let data = |offset| direct(machine.data().offset(offset));
        let mut code = Vec::new();
        let mut append = |instructions: &[Instruction]| {
            let start = code.len();
            code.extend(assemble(place(start), instructions));
            start
        };

        let mut op_offsets: Vec<usize> =
            (0..self.0.len()).map(|index| append(&self.instructions(index, machine, previous))).collect();
        let jump_to_exit = [branch(word(Code::Jmp_rel32_32, Code::Jmp_rel32_64), machine.exit())];
        op_offsets.push(append(&jump_to_exit));
        let pads = PAD_MARKS.map(|mark| {
            let marked = Instruction::with2(Code::Mov_rm32_imm32, data(mark), 0x0bad_cafe_u32).unwrap();
            place(append(&[marked, jump_to_exit[0]]))
        });

        let store = word(Code::Mov_rm32_r32, Code::Mov_rm64_r64);
        let load = word(Code::Mov_r32_rm32, Code::Mov_r64_rm64);
        let ret = Instruction::with(word(Code::Retnd, Code::Retnq));
        let return_address = MemoryOperand::with_base(gpr(4));
        let leaves = [
            place(append(&[
                Instruction::with2(load, gpr(0), return_address).unwrap(),
                Instruction::with2(store, data(LEAF_RECORD), gpr(0)).unwrap(),
                Instruction::with2(word(Code::Add_rm32_imm8, Code::Add_rm64_imm8), gpr(1), 5).unwrap(),
                ret,
            ])),
            place(append(&[
                Instruction::with2(word(Code::Xor_r32_rm32, Code::Xor_r64_rm64), gpr(2), gpr(2)).unwrap(),
                Instruction::with(Code::Stc),
                ret,
            ])),
        ];
        let thunk_register = gpr(usize::from(PC_THUNK_REGISTER));
        let pc_thunk = place(append(&[Instruction::with2(load, thunk_register, return_address).unwrap(), ret]));
        Assembled { code, pc_thunk, pads, leaves, op_offsets }
    }

    /// One op, with branches to where things were in the previous layout.
    fn instructions(&self, index: usize, machine: &Machine, previous: &Assembled) -> Vec<Instruction> {
        let function = machine.function();
        let slot = |Slot(index): Slot| direct(machine.data().offset(i64::try_from(index % SLOT_COUNT * 8).unwrap()));
        let pointer = |offset: usize| direct(machine.data().offset(i64::try_from(offset).unwrap()));
        let to = |to: To| match to {
            To::Skip(ops) => {
                let target = (index + 1 + ops).min(self.0.len());
                function.offset(i64::try_from(previous.op_offsets[target]).unwrap())
            }
            To::Pad(pad) => previous.pads[pad % 2],
        };
        let load = word(Code::Mov_r32_rm32, Code::Mov_r64_rm64);
        let with_register = |code, Reg(register): Reg| Instruction::with1(code, gpr(register)).unwrap();
        let with_memory = |code, memory: MemoryOperand| Instruction::with1(code, memory).unwrap();
        let from_memory = |code, Reg(register): Reg, memory| Instruction::with2(code, gpr(register), memory).unwrap();
        vec![match self.0[index] {
            Op::MovImmediate(Reg(register), value) => {
                Instruction::with2(word(Code::Mov_rm32_imm32, Code::Mov_rm64_imm32), gpr(register), value).unwrap()
            }
            Op::MovRegister(Reg(target), Reg(source)) => {
                Instruction::with2(word(Code::Mov_rm32_r32, Code::Mov_rm64_r64), gpr(target), gpr(source)).unwrap()
            }
            Op::Load(register, from) => from_memory(load, register, slot(from)),
            Op::StoreImmediate(at, value) => {
                Instruction::with2(word(Code::Mov_rm32_imm32, Code::Mov_rm64_imm32), slot(at), value).unwrap()
            }
            Op::CompareImmediate(at, value) => {
                Instruction::with2(word(Code::Cmp_rm32_imm8, Code::Cmp_rm64_imm8), slot(at), i32::from(value)).unwrap()
            }
            Op::LoadByte(register, from) => {
                from_memory(word(Code::Movzx_r32_rm8, Code::Movzx_r64_rm8), register, slot(from))
            }
            Op::LoadIfCarry(register, from) => {
                from_memory(word(Code::Cmovb_r32_rm32, Code::Cmovb_r64_rm64), register, slot(from))
            }
            Op::Store(at, Reg(register)) => {
                Instruction::with2(word(Code::Mov_rm32_r32, Code::Mov_rm64_r64), slot(at), gpr(register)).unwrap()
            }
            Op::LeaSlot(register, of) => from_memory(word(Code::Lea_r32_m, Code::Lea_r64_m), register, slot(of)),
            Op::LeaFunction(register) => {
                from_memory(word(Code::Lea_r32_m, Code::Lea_r64_m), register, direct(function))
            }
            Op::LeaSum(register, Reg(base), Reg(scaled), displacement) => {
                let sum = MemoryOperand::with_base_index_scale_displ_size(
                    gpr(base),
                    gpr(scaled),
                    4,
                    displacement.into(),
                    if i8::try_from(displacement).is_ok() { 1 } else { Mode::NATIVE.word_bytes() },
                );
                from_memory(word(Code::Lea_r32_m, Code::Lea_r64_m), register, sum)
            }
            Op::Alu(alu, Reg(target), Reg(source)) => {
                Instruction::with2(alu.register_form(), gpr(target), gpr(source)).unwrap()
            }
            Op::AluImmediate(alu, Reg(target), value) => {
                Instruction::with2(alu.immediate_form(), gpr(target), i32::from(value)).unwrap()
            }
            Op::AluLoad(alu, target, from) => from_memory(alu.register_form(), target, slot(from)),
            Op::Push(register) => with_register(word(Code::Push_r32, Code::Push_r64), register),
            Op::PushSlot(from) => with_memory(word(Code::Push_rm32, Code::Push_rm64), slot(from)),
            Op::Pop(register) => with_register(word(Code::Pop_r32, Code::Pop_r64), register),
            Op::StackLoad(register, displacement) => {
                from_memory(load, register, MemoryOperand::with_base_displ(gpr(4), i64::from(displacement)))
            }
            Op::Jcc { condition, to: target, long } => branch(jcc(condition, long), to(target)),
            Op::CounterJump { which, to: target } => branch(counter_jump(which), to(target)),
            Op::Jmp { pad, long } => {
                let code = if long {
                    word(Code::Jmp_rel32_32, Code::Jmp_rel32_64)
                } else {
                    word(Code::Jmp_rel8_32, Code::Jmp_rel8_64)
                };
                branch(code, to(To::Pad(pad)))
            }
            Op::JmpSlot => with_memory(word(Code::Jmp_rm32, Code::Jmp_rm64), pointer(PAD_POINTER)),
            Op::CallLeaf(leaf) => branch(word(Code::Call_rel32_32, Code::Call_rel32_64), previous.leaves[leaf % 2]),
            Op::CallSlot => with_memory(word(Code::Call_rm32, Code::Call_rm64), pointer(LEAF_POINTER)),
            Op::CallRegister(register) => {
                let call = with_register(word(Code::Call_rm32, Code::Call_rm64), register);
                return vec![from_memory(load, register, pointer(LEAF_POINTER)), call];
            }
            Op::CallPcThunk => branch(word(Code::Call_rel32_32, Code::Call_rel32_64), previous.pc_thunk),
            Op::CallNext(register) => {
                let here = function.offset(i64::try_from(previous.op_offsets[index]).unwrap());
                let call = branch(word(Code::Call_rel32_32, Code::Call_rel32_64), here.offset(5));
                return vec![call, with_register(word(Code::Pop_r32, Code::Pop_r64), register)];
            }
            Op::Ret if self.0[..index].iter().any(|op| op.moves_stack()) => Instruction::with(Code::Nopd),
            Op::Ret => Instruction::with(word(Code::Retnd, Code::Retnq)),
        }]
    }
}

impl Assembled {
    /// Fresh data, with pointers to a pad and a leaf in it, and a fresh stack.
    pub(crate) fn reset_data(&self, machine: &mut Machine) {
        machine.reset_memory();
        machine.write_data(PAD_POINTER, self.pads[1].value());
        machine.write_data(LEAF_POINTER, self.leaves[0].value());
    }
}

impl Op {
    /// Whether it may leave something on the stack that `ret` must not find.
    fn moves_stack(self) -> bool {
        matches!(self, Self::Push(_) | Self::PushSlot(_))
    }
}

impl Alu {
    const ALL: [Self; 6] = [Self::Add, Self::Sub, Self::Xor, Self::And, Self::Or, Self::Cmp];

    fn register_form(self) -> Code {
        match self {
            Self::Add => word(Code::Add_r32_rm32, Code::Add_r64_rm64),
            Self::Sub => word(Code::Sub_r32_rm32, Code::Sub_r64_rm64),
            Self::Xor => word(Code::Xor_r32_rm32, Code::Xor_r64_rm64),
            Self::And => word(Code::And_r32_rm32, Code::And_r64_rm64),
            Self::Or => word(Code::Or_r32_rm32, Code::Or_r64_rm64),
            Self::Cmp => word(Code::Cmp_r32_rm32, Code::Cmp_r64_rm64),
        }
    }

    fn immediate_form(self) -> Code {
        match self {
            Self::Add => word(Code::Add_rm32_imm8, Code::Add_rm64_imm8),
            Self::Sub => word(Code::Sub_rm32_imm8, Code::Sub_rm64_imm8),
            Self::Xor => word(Code::Xor_rm32_imm8, Code::Xor_rm64_imm8),
            Self::And => word(Code::And_rm32_imm8, Code::And_rm64_imm8),
            Self::Or => word(Code::Or_rm32_imm8, Code::Or_rm64_imm8),
            Self::Cmp => word(Code::Cmp_rm32_imm8, Code::Cmp_rm64_imm8),
        }
    }
}

fn branch(code: Code, target: Addr) -> Instruction {
    Instruction::with_branch(code, target.value()).unwrap()
}

fn jcc(condition: Condition, long: bool) -> Code {
    let overflow =
        if long { word(Code::Jo_rel32_32, Code::Jo_rel32_64) } else { word(Code::Jo_rel8_32, Code::Jo_rel8_64) };
    // The decoder's list has them in the order of their encoding, each in three widths.
    Code::try_from(overflow as usize + 3 * usize::from(condition.encoding())).expect("is in the list")
}

fn counter_jump(which: usize) -> Code {
    match which % 5 {
        0 => word(Code::Loop_rel8_32_ECX, Code::Loop_rel8_64_RCX),
        1 => word(Code::Loope_rel8_32_ECX, Code::Loope_rel8_64_RCX),
        2 => word(Code::Loopne_rel8_32_ECX, Code::Loopne_rel8_64_RCX),
        3 => word(Code::Jecxz_rel8_32, Code::Jrcxz_rel8_64),
        // With an address-size prefix.
        _ => word(Code::Jcxz_rel8_32, Code::Jecxz_rel8_64),
    }
}

fn regs() -> impl Strategy<Value = Reg> {
    (0..GPR_COUNT).prop_filter("the stack pointer", |number| *number != 4).prop_map(Reg)
}

fn slots() -> impl Strategy<Value = Slot> {
    (0..SLOT_COUNT).prop_map(Slot)
}

fn targets() -> impl Strategy<Value = To> {
    prop_oneof![(0..4_usize).prop_map(To::Skip), (0..2_usize).prop_map(To::Pad)]
}

/// One op of any kind.
pub(crate) fn ops() -> impl Strategy<Value = Op> {
    let straight = prop_oneof![
        (regs(), any::<i32>()).prop_map(|(reg, value)| Op::MovImmediate(reg, value)),
        (regs(), regs()).prop_map(|(to, from)| Op::MovRegister(to, from)),
        (regs(), slots()).prop_map(|(reg, slot)| Op::Load(reg, slot)),
        (slots(), any::<i32>()).prop_map(|(slot, value)| Op::StoreImmediate(slot, value)),
        (slots(), any::<i8>()).prop_map(|(slot, value)| Op::CompareImmediate(slot, value)),
        (regs(), slots()).prop_map(|(reg, slot)| Op::LoadByte(reg, slot)),
        (regs(), slots()).prop_map(|(reg, slot)| Op::LoadIfCarry(reg, slot)),
        (slots(), regs()).prop_map(|(slot, reg)| Op::Store(slot, reg)),
        (regs(), slots()).prop_map(|(reg, slot)| Op::LeaSlot(reg, slot)),
        regs().prop_map(Op::LeaFunction),
        (regs(), regs(), regs(), any::<i32>()).prop_map(|(to, base, scaled, by)| Op::LeaSum(to, base, scaled, by)),
        (select(&Alu::ALL), regs(), regs()).prop_map(|(alu, to, from)| Op::Alu(alu, to, from)),
        (select(&Alu::ALL), regs(), any::<i8>()).prop_map(|(alu, to, value)| Op::AluImmediate(alu, to, value)),
        (select(&Alu::ALL), regs(), slots()).prop_map(|(alu, to, from)| Op::AluLoad(alu, to, from)),
    ];
    let stack = prop_oneof![
        regs().prop_map(Op::Push),
        slots().prop_map(Op::PushSlot),
        regs().prop_map(Op::Pop),
        (regs(), 0..64_u8).prop_map(|(reg, displacement)| Op::StackLoad(reg, displacement)),
    ];
    let branches = prop_oneof![
        4 => (select(&Condition::ALL), targets(), any::<bool>())
            .prop_map(|(condition, to, long)| Op::Jcc { condition, to, long }),
        2 => (0..5_usize, targets()).prop_map(|(which, to)| Op::CounterJump { which, to }),
        1 => (0..2_usize, any::<bool>()).prop_map(|(pad, long)| Op::Jmp { pad, long }),
        1 => Just(Op::JmpSlot),
        1 => Just(Op::Ret),
        2 => (0..2_usize).prop_map(Op::CallLeaf),
        1 => Just(Op::CallSlot),
        1 => regs().prop_map(Op::CallRegister),
        1 => Just(Op::CallPcThunk),
        1 => regs().prop_map(Op::CallNext),
    ];
    prop_oneof![5 => straight, 2 => stack, 3 => branches]
}

/// Some ops in a row.
pub(crate) fn programs() -> impl Strategy<Value = Program> {
    prop::collection::vec(ops(), 1..7).prop_map(Program)
}
