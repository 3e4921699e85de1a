//! The int3 trampoline as the model executes it.
//!
//! Owns [`Op`] and [`decode`], which reads the bytes that the engine emits; what is not understood is refused, so that the model cannot be
//! right about another program than the real one. [`mutate`] rewrites the result. Neighbours: [`SlotModel`](super::SlotModel) interprets it, one
//! instruction at a time. Invariant: the unmutated program is, instruction by instruction, what `int3_trampoline` returned.

use std::fmt;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register as Iced};
use trapline_engine::{Mode, slots::ThreadLayout};

use super::Mutant;

/// The registers that the trampoline may use. All others it cannot even name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Register {
    Ax,
    Cx,
    Sp,
}

/// How many there are.
pub(super) const REGISTERS: usize = 3;

impl Register {
    fn of(register: Iced) -> Option<Self> {
        match register {
            Iced::RAX | Iced::EAX => Some(Self::Ax),
            Iced::RCX | Iced::ECX => Some(Self::Cx),
            Iced::RSP | Iced::ESP => Some(Self::Sp),
            _ => None,
        }
    }
}

/// Where a load or a store goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// A word relative to a register: on the stack.
    Stack { base: Register, displacement: i64 },
    /// A word of the thread's state, relative to its segment's base and an index.
    Thread { index: Option<Register>, displacement: i64 },
}

/// An instruction of the trampoline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Op {
    Lea {
        to: Register,
        base: Register,
        displacement: i64,
    },
    Push(Register),
    Pop(Register),
    Load {
        to: Register,
        from: Place,
    },
    Store {
        to: Place,
        from: Register,
    },
    Ret,
    /// Not in the real trampoline: arithmetic that writes flags.
    Add {
        to: Register,
        displacement: i64,
    },
}

/// Reads a trampoline.
///
/// # Panics
/// On an instruction that the model does not know: then it has to learn it.
pub(super) fn decode(mode: Mode, code: &[u8]) -> Vec<Op> {
    let decoder = Decoder::new(mode.bitness(), code, DecoderOptions::NONE);
    decoder
        .into_iter()
        .map(|insn| op_of(mode, &insn).unwrap_or_else(|| panic!("the model has to learn {insn:?}")))
        .collect()
}

fn op_of(mode: Mode, insn: &Instruction) -> Option<Op> {
    let register = |operand| Register::of(insn.op_register(operand));
    Some(match (insn.mnemonic(), insn.op_count()) {
        (Mnemonic::Lea, 2) => match place_of(mode, insn)? {
            Place::Stack { base, displacement } => Op::Lea { to: register(0)?, base, displacement },
            Place::Thread { .. } => return None,
        },
        (Mnemonic::Push, 1) => Op::Push(register(0)?),
        (Mnemonic::Pop, 1) => Op::Pop(register(0)?),
        (Mnemonic::Mov, 2) if insn.op1_kind() == OpKind::Memory => {
            Op::Load { to: register(0)?, from: place_of(mode, insn)? }
        }
        (Mnemonic::Mov, 2) if insn.op0_kind() == OpKind::Memory => {
            Op::Store { to: place_of(mode, insn)?, from: register(1)? }
        }
        (Mnemonic::Ret, 0) => Op::Ret,
        _ => return None,
    })
}

fn place_of(mode: Mode, insn: &Instruction) -> Option<Place> {
    if insn.memory_index() != Iced::None {
        return None;
    }
    let wide = insn.memory_displacement64();
    let displacement = match mode {
        #[expect(clippy::cast_possible_truncation, reason = "addresses of 32-bit code wrap at 4 GiB")]
        Mode::Bits32 => i64::from((wide as u32).cast_signed()),
        Mode::Bits64 => wide.cast_signed(),
    };
    let base = insn.memory_base();
    match insn.segment_prefix() {
        Iced::None => Some(Place::Stack { base: Register::of(base)?, displacement }),
        Iced::FS | Iced::GS if base == Iced::None => Some(Place::Thread { index: None, displacement }),
        Iced::FS | Iced::GS => Some(Place::Thread { index: Some(Register::of(base)?), displacement }),
        _ => None,
    }
}

/// The trampoline, broken. Each mutant computes the same as the real one as long as nothing interrupts it, except those that do not
/// restore what they should.
pub(super) fn mutate(ops: Vec<Op>, mutant: Mutant, mode: Mode) -> Vec<Op> {
    match mutant {
        Mutant::ReleaseBeforeRead => release_before_read(ops, ThreadLayout::new(mode)),
        Mutant::RoomAfterUse => room_after_use(ops, i64::from(mode.word_bytes())),
        Mutant::PopsExchanged => {
            let pops: Vec<usize> = (0..ops.len()).filter(|index| matches!(ops[*index], Op::Pop(_))).collect();
            let mut ops = ops;
            ops.swap(pops[0], pops[1]);
            ops
        }
        Mutant::RoomBySubtraction => {
            let add = |op| match op {
                Op::Lea { to, base, displacement } if to == base => Op::Add { to, displacement },
                other => other,
            };
            ops.into_iter().map(add).collect()
        }
        Mutant::FillBeforeReserve | Mutant::NoLimit | Mutant::PushThroughFrame => ops,
    }
}

/// Moves the two instructions that lower the depth in front of those that read the slot.
fn release_before_read(mut ops: Vec<Op>, layout: ThreadLayout) -> Vec<Op> {
    let reads_depth = |op: &Op| matches!(op, Op::Load { from: Place::Thread { index: None, .. }, .. });
    let writes_depth = |op: &Op| matches!(op, Op::Store { to: Place::Thread { .. }, .. });
    let read = ops.iter().position(reads_depth).expect("the depth is read");
    let write = ops.iter().position(writes_depth).expect("the depth is written");
    let release: Vec<Op> = ops.drain(write - 1..=write).collect();
    for op in &mut ops {
        if let Op::Load { from: Place::Thread { index: Some(_), displacement }, .. } = op {
            // The index is that of the slot below by now.
            *displacement += layout.slot_bytes();
        }
    }
    ops.splice(read + 1..=read, release);
    ops
}

/// Lowers the stack pointer only when it has to be right: what was pushed is stored below it until then.
fn room_after_use(ops: Vec<Op>, word: i64) -> Vec<Op> {
    let mut lowered = 0;
    let mut late = Vec::new();
    for op in ops {
        match op {
            Op::Lea { to: Register::Sp, base: Register::Sp, displacement } => lowered -= displacement,
            Op::Push(from) => {
                lowered += word;
                late.push(Op::Store { to: Place::Stack { base: Register::Sp, displacement: -lowered }, from });
            }
            Op::Store { to: Place::Stack { base, displacement }, from } => {
                late.push(Op::Store { to: Place::Stack { base, displacement: displacement - lowered }, from });
            }
            Op::Pop(_) if lowered > 0 => {
                late.push(Op::Lea { to: Register::Sp, base: Register::Sp, displacement: -lowered });
                late.push(op);
                lowered = 0;
            }
            other => late.push(other),
        }
    }
    late
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ax => "ax",
            Self::Cx => "cx",
            Self::Sp => "sp",
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stack { base, displacement } => write!(f, "[{base}{displacement:+}]"),
            Self::Thread { index: None, displacement } => write!(f, "thread[{displacement}]"),
            Self::Thread { index: Some(index), displacement } => write!(f, "thread[{index}{displacement:+}]"),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lea { to, base, displacement } => write!(f, "lea {to}, [{base}{displacement:+}]"),
            Self::Push(register) => write!(f, "push {register}"),
            Self::Pop(register) => write!(f, "pop {register}"),
            Self::Load { to, from } => write!(f, "mov {to}, {from}"),
            Self::Store { to, from } => write!(f, "mov {to}, {from}"),
            Self::Ret => write!(f, "ret"),
            Self::Add { to, displacement } => write!(f, "add {to}, {displacement}"),
        }
    }
}
