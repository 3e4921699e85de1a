//! Moving the first instructions of a function out of line, so that a jump fits in their place.
//!
//! Owns [`relocate`]. The whole instructions that cover the first bytes of a function, its *window*, are rewritten to
//! do the same at another address, the *stub*, and a jump back to the first instruction behind the window is put after
//! them. Neighbours: arming in a host decides that nothing jumps into the window, allocates the stub, and writes the
//! jump to it; sites of that kind run the stub in place of their original instruction. `emit` holds the bytes of the
//! rewritten instructions.
//!
//! What it means to do the same: registers, flags, memory and control flow behind the window are as if the window had
//! run in place, and so are return addresses: a call in the window pushes the address in the *function*, so that the
//! callee, unwinders and debuggers see what they always saw. Not the same are the address of a fault in the window (map
//! it back with [`Relocated::boundaries`]) and the return predictor's hit for a call that is now a push and a jump.
//!
//! Invariant: no result is trusted. `check` decodes every stub again, with code that shares nothing with the rewriting
//! but the decoder, and compares it with the window instruction by instruction; what it does not recognise is an error.
//!
//! iced's `BlockEncoder` is not used, though it is made for this: it takes a RIP-relative operand that points into the
//! window (`lea rax, [rip + function]`) for a label and lets it follow the code, it has no notion of the emulated call,
//! and it encodes instructions anew where their bytes can be copied as they are.

mod check;
mod emit;

use alloc::vec::Vec;
use core::{error::Error, fmt};

use iced_x86::{Code, ConstantOffsets, Decoder, DecoderError, FlowControl, Instruction, Mnemonic, OpKind, Register};

use self::emit::Emitter;
use super::{Condition, Gpr, MAX_INSN_BYTES, effect::jcc_condition, truncate};
use crate::{Addr, AddrRange, Mode};

/// What [`relocate`] has to be told about the code around the window.
#[derive(Clone, Copy, Default)]
pub struct RelocateOptions<'a> {
    /// For the target of a call: the register, if it is a PC thunk, a function that does nothing but load its return
    /// address into that register (`__x86.get_pc_thunk.bx` and its like, three in ten functions of i386 shared
    /// libraries begin with a call of one). The call becomes a `mov` of the constant. [`pc_thunk`] recognises them.
    pub pc_thunk: Option<&'a dyn Fn(Addr) -> Option<Gpr>>,
}

impl fmt::Debug for RelocateOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelocateOptions").field("pc_thunk", &self.pc_thunk.is_some()).finish()
    }
}

/// A window, rewritten for its stub.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Relocated {
    /// The stub: code for the address that was asked for, and no other. It may hold data behind jumps.
    pub bytes: Vec<u8>,
    /// Length of the window: whole instructions, at least as many bytes as were asked for.
    pub consumed_bytes: usize,
    /// Where each instruction went: offset in the window, offset in the stub, ascending. If control reaches the end of
    /// the window, the last pair is `consumed_bytes` and the offset of the jump back. A thread stopped at the one
    /// address may be moved to the other.
    pub boundaries: Vec<(u32, u32)>,
    /// Whether a call of the window has become a push and a jump. Under user shadow stacks its return would fault: the
    /// shadow stack does not know of it.
    pub emulates_call: bool,
}

/// A window that cannot be moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RelocateError {
    /// The instruction that is in the way.
    pub at: Addr,
    /// What is wrong with it.
    pub reason: RelocateReason,
}

/// Why a window cannot be moved.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RelocateReason {
    /// The bytes given end within the instruction.
    Truncated,
    /// Not an instruction.
    Invalid,
    /// The function ends here, or jumps away, before the bytes asked for are reached.
    EndsTooSoon,
    /// It branches back into the window, which will hold something else.
    BranchesBack,
    /// It branches into the middle of an instruction of the window.
    BranchesIntoInstruction,
    /// It is a call that returns into the window.
    ReturnsIntoWindow,
    /// Its RIP-relative operand is more than 2 GiB from the stub.
    OperandOutOfReach,
    /// An `int3`: some debugger's, or a site's, so that the instruction is not known.
    Breakpoint,
    /// An `endbr`: it must stay where it is, as the landing place of indirect branches. The window begins behind it.
    EndBranch,
    /// A branch to another code segment, or a return from an interrupt.
    FarBranch,
    /// A system call or a software interrupt: the kernel, and threads asleep in it, would see the stub's address.
    SystemCall,
    /// Begins or ends a memory transaction.
    Transaction,
    /// A branch with an operand-size prefix, which vendors read in two ways.
    Narrow,
    /// Something that compilers do not make: a call through the stack pointer, an operand relative to the lower half of
    /// RIP.
    Unsupported,
    /// The stub does not do what the window does. A bug in here; nothing was harmed.
    CheckFailed,
}

impl fmt::Display for RelocateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.reason {
            RelocateReason::Truncated => "is cut off",
            RelocateReason::Invalid => "is invalid",
            RelocateReason::EndsTooSoon => "ends the function before there is room for a jump",
            RelocateReason::BranchesBack => "branches back to the function's first bytes",
            RelocateReason::BranchesIntoInstruction => "branches into the middle of an instruction",
            RelocateReason::ReturnsIntoWindow => "is a call that returns to the function's first bytes",
            RelocateReason::OperandOutOfReach => "has an operand more than 2 GiB from its new place",
            RelocateReason::Breakpoint => "is a breakpoint",
            RelocateReason::EndBranch => "is a landing place of indirect branches",
            RelocateReason::FarBranch => "leaves the code segment",
            RelocateReason::SystemCall => "enters the kernel",
            RelocateReason::Transaction => "begins or ends a transaction",
            RelocateReason::Narrow => "is a 16-bit branch",
            RelocateReason::Unsupported => "is of a kind that is not supported",
            RelocateReason::CheckFailed => "did not survive the check of its new form",
        };
        write!(f, "cannot be moved: the instruction at {} {reason}", self.at)
    }
}

impl Error for RelocateError {}

/// The most bytes that a stub can have for a window of at least `min_bytes`: room to allocate before the stub is made.
pub const fn max_relocated_bytes(min_bytes: usize) -> usize {
    // The window is at most one instruction, less a byte, longer than asked for. The worst expansion is `loop` to afar:
    // 2 to 18 bytes.
    (min_bytes + MAX_INSN_BYTES - 1) * 9 + emit::FAR_JUMP_BYTES
}

/// Rewrites the first whole instructions of `code`, at least `min_bytes` of them, for the address `to`.
///
/// `from` is where `code` stands, behind an `endbr` if the function begins with one. `code` should reach
/// [`MAX_INSN_BYTES`] beyond `min_bytes`, if the function does; the function's other instructions are not needed. The
/// caller makes sure that nothing outside the window branches into its middle.
///
/// The stub may be anywhere: jumps that do not reach take the long form, `jmp` through the address behind it, which is
/// an indirect branch to indirect-branch tracking. Only RIP-relative operands need the stub within 2 GiB of their data.
///
/// # Errors
/// [`RelocateError`] names the first instruction that cannot be moved, and why.
pub fn relocate(
    mode: Mode,
    from: Addr,
    code: &[u8],
    min_bytes: usize,
    to: Addr,
    options: &RelocateOptions<'_>,
) -> Result<Relocated, RelocateError> {
    let (from, to) = (truncate(mode, from), truncate(mode, to));
    let window = Window::read(mode, from, code, min_bytes)?;
    let mut emitter = Emitter::new(mode, to);
    let mut boundaries = Vec::with_capacity(window.instructions.len() + 1);
    let mut falls_through = true;
    let mut emulates_call = false;
    for insn in &window.instructions {
        boundaries.push((insn.offset, emitter.offset()));
        let moved = window.classify(insn, options).map_err(|reason| RelocateError { at: insn.at(), reason })?;
        emitter.emit(&moved).map_err(|reason| RelocateError { at: insn.at(), reason })?;
        let is_call = matches!(moved, Moved::Call { .. } | Moved::IndirectCall { .. });
        emulates_call |= is_call;
        falls_through = !is_call && !ends_path(&insn.decoded);
    }
    if falls_through {
        boundaries.push((window.len_bytes, emitter.offset()));
        emitter.jump(Destination::Outside(window.range.end));
    }
    let consumed_bytes = window.instructions.iter().map(|insn| insn.bytes.len()).sum();
    let relocated = Relocated { bytes: emitter.finish(&boundaries), consumed_bytes, boundaries, emulates_call };
    check::check(mode, from, code, to, &relocated, options)
        .map_err(|at| RelocateError { at, reason: RelocateReason::CheckFailed })?;
    Ok(relocated)
}

/// The register that the function with this code loads its return address into, if that is all it does:
/// `mov (%esp),%reg; ret`, as compilers emit it for i386 code that has to find its own address.
pub fn pc_thunk(mode: Mode, code: &[u8]) -> Option<Gpr> {
    let at = Addr::new(0);
    let load = super::decode(mode, at, code);
    let ret = super::decode(mode, at, code.get(load.len()..)?);
    let loads_return_address =
        matches!((load.code(), mode), (Code::Mov_r32_rm32, Mode::Bits32) | (Code::Mov_r64_rm64, Mode::Bits64))
            && load.op1_kind() == OpKind::Memory
            && Gpr::of(load.memory_base()) == Some(Gpr::SP)
            && load.memory_index() == Register::None
            && load.memory_displacement64() == 0
            && load.segment_prefix() == Register::None;
    let returns = matches!((ret.code(), mode), (Code::Retnd, Mode::Bits32) | (Code::Retnq, Mode::Bits64));
    (loads_return_address && returns)
        .then(|| Gpr::of(load.op0_register()))
        .flatten()
        .filter(|register| *register != Gpr::SP)
}

/// The instructions to be moved.
struct Window<'a> {
    mode: Mode,
    range: AddrRange,
    len_bytes: u32,
    instructions: Vec<WindowInsn<'a>>,
}

struct WindowInsn<'a> {
    decoded: Instruction,
    constants: ConstantOffsets,
    bytes: &'a [u8],
    /// In the window.
    offset: u32,
}

/// What becomes of an instruction.
enum Moved<'a> {
    /// Copied byte by byte.
    Verbatim(&'a [u8]),
    /// Copied, with the four bytes at `displacement_at` replaced so that they lead to `target`.
    RipRelative {
        bytes: &'a [u8],
        displacement_at: usize,
        target: Addr,
    },
    Jump(Destination),
    Jcc(Condition, Destination),
    /// `loop`, `jcxz` and their variants, which have no long form; without the displacement byte.
    CounterJump {
        opcode: &'a [u8],
        destination: Destination,
    },
    /// A call whose return address stays in the function.
    Call {
        target: Addr,
        return_to: Addr,
    },
    /// The same for a call through a register or memory. `displacement` as in `RipRelative`, if it is relative to RIP.
    IndirectCall {
        bytes: &'a [u8],
        displacement: Option<(usize, Addr)>,
        return_to: Addr,
    },
    /// `call` of the next instruction: only the push.
    PushAddress(Addr),
    /// Call of a PC thunk.
    LoadAddress(Gpr, Addr),
}

/// Where a moved branch leads.
#[derive(Clone, Copy)]
enum Destination {
    Outside(Addr),
    /// The new place of the instruction that was at this offset in the window.
    Window(u32),
}

impl<'a> Window<'a> {
    fn read(mode: Mode, from: Addr, code: &'a [u8], min_bytes: usize) -> Result<Self, RelocateError> {
        let mut instructions: Vec<WindowInsn<'_>> = Vec::new();
        let mut offset = 0;
        while offset < min_bytes {
            let insn = WindowInsn::decode(mode, from, code, offset)?;
            offset += insn.bytes.len();
            if ends_path(&insn.decoded) && offset < min_bytes {
                return Err(RelocateError { at: insn.at(), reason: RelocateReason::EndsTooSoon });
            }
            instructions.push(insn);
        }
        let len_bytes = instructions.last().map_or(0, WindowInsn::end_offset);
        let end = truncate(mode, from.offset(i64::from(len_bytes)));
        Ok(Self { mode, range: AddrRange { start: from, end }, len_bytes, instructions })
    }

    /// The offset of `addr` in the window, if it is inside.
    fn offset_of(&self, addr: Addr) -> Option<u32> {
        let distance = truncate(self.mode, Addr::new(addr.value().wrapping_sub(self.range.start.value()))).value();
        u32::try_from(distance).ok().filter(|offset| *offset < self.len_bytes)
    }

    /// Decides what becomes of `insn`.
    fn classify(&self, insn: &WindowInsn<'a>, options: &RelocateOptions<'_>) -> Result<Moved<'a>, RelocateReason> {
        let decoded = &insn.decoded;
        match decoded.flow_control() {
            FlowControl::Next if matches!(decoded.mnemonic(), Mnemonic::Endbr32 | Mnemonic::Endbr64) => {
                Err(RelocateReason::EndBranch)
            }
            FlowControl::Next | FlowControl::Exception => insn.copied(),
            FlowControl::UnconditionalBranch => Ok(Moved::Jump(self.destination(insn)?)),
            FlowControl::ConditionalBranch => {
                let destination = self.destination(insn)?;
                Ok(match jcc_condition(decoded) {
                    Some(condition) => Moved::Jcc(condition, destination),
                    None => Moved::CounterJump { opcode: &insn.bytes[..insn.bytes.len() - 1], destination },
                })
            }
            FlowControl::IndirectBranch => match decoded.code() {
                Code::Jmp_rm32 | Code::Jmp_rm64 => insn.copied(),
                Code::Jmp_rm16 => Err(RelocateReason::Narrow),
                _ => Err(RelocateReason::FarBranch),
            },
            FlowControl::Return => match decoded.code() {
                Code::Retnd | Code::Retnq | Code::Retnd_imm16 | Code::Retnq_imm16 => insn.copied(),
                Code::Retnw | Code::Retnw_imm16 => Err(RelocateReason::Narrow),
                _ => Err(RelocateReason::FarBranch),
            },
            FlowControl::Call => self.call(insn, options),
            FlowControl::IndirectCall => match decoded.code() {
                Code::Call_rm32 | Code::Call_rm64 => self.indirect_call(insn),
                Code::Call_rm16 => Err(RelocateReason::Narrow),
                _ => Err(RelocateReason::FarBranch),
            },
            FlowControl::Interrupt if decoded.code() == Code::Int3 => Err(RelocateReason::Breakpoint),
            FlowControl::Interrupt => Err(RelocateReason::SystemCall),
            FlowControl::XbeginXabortXend => Err(RelocateReason::Transaction),
        }
    }

    /// Where a direct branch leads once it is moved.
    fn destination(&self, insn: &WindowInsn<'_>) -> Result<Destination, RelocateReason> {
        let target = match insn.decoded.op0_kind() {
            OpKind::NearBranch32 | OpKind::NearBranch64 => {
                truncate(self.mode, Addr::new(insn.decoded.near_branch_target()))
            }
            OpKind::NearBranch16 => return Err(RelocateReason::Narrow),
            _ => return Err(RelocateReason::FarBranch),
        };
        match self.offset_of(target) {
            None => Ok(Destination::Outside(target)),
            Some(offset) if offset <= insn.offset => Err(RelocateReason::BranchesBack),
            Some(offset) if self.instructions.iter().any(|other| other.offset == offset) => {
                Ok(Destination::Window(offset))
            }
            Some(_) => Err(RelocateReason::BranchesIntoInstruction),
        }
    }

    fn call(&self, insn: &WindowInsn<'a>, options: &RelocateOptions<'_>) -> Result<Moved<'a>, RelocateReason> {
        match insn.decoded.code() {
            Code::Call_rel32_32 | Code::Call_rel32_64 => {}
            Code::Call_rel16 => return Err(RelocateReason::Narrow),
            Code::Call_ptr1616 | Code::Call_ptr1632 => return Err(RelocateReason::FarBranch),
            _ => return Err(RelocateReason::SystemCall),
        }
        let target = truncate(self.mode, Addr::new(insn.decoded.near_branch_target()));
        let return_to = insn.next(self.mode);
        if target == return_to {
            return Ok(Moved::PushAddress(return_to));
        }
        let thunk_register = options.pc_thunk.and_then(|pc_thunk| pc_thunk(target));
        if let Some(register) = thunk_register.filter(|register| register.exists_in(self.mode) && *register != Gpr::SP)
        {
            return Ok(Moved::LoadAddress(register, return_to));
        }
        match (self.offset_of(return_to), self.destination(insn)?) {
            (Some(_), _) => Err(RelocateReason::ReturnsIntoWindow),
            (None, Destination::Outside(target)) => Ok(Moved::Call { target, return_to }),
            // The return address is behind the window, so the target is not a later instruction of it.
            (None, Destination::Window(_)) => Err(RelocateReason::BranchesBack),
        }
    }

    fn indirect_call(&self, insn: &WindowInsn<'a>) -> Result<Moved<'a>, RelocateReason> {
        let return_to = insn.next(self.mode);
        if self.offset_of(return_to).is_some() {
            return Err(RelocateReason::ReturnsIntoWindow);
        }
        // The push of the return address comes before the operand is read, so the operand must not depend on the stack
        // pointer.
        let operand_registers = [insn.decoded.op0_register(), insn.decoded.memory_base(), insn.decoded.memory_index()];
        if operand_registers.iter().any(|register| Gpr::of(*register) == Some(Gpr::SP)) {
            return Err(RelocateReason::Unsupported);
        }
        let displacement = match insn.copied()? {
            Moved::RipRelative { displacement_at, target, .. } => Some((displacement_at, target)),
            _ => None,
        };
        Ok(Moved::IndirectCall { bytes: insn.bytes, displacement, return_to })
    }
}

impl<'a> WindowInsn<'a> {
    fn decode(mode: Mode, from: Addr, code: &'a [u8], offset: usize) -> Result<Self, RelocateError> {
        let at = truncate(mode, AddrRange::new(from, offset as u64).end);
        let rest = code.get(offset..).unwrap_or_default();
        let rest = &rest[..rest.len().min(MAX_INSN_BYTES)];
        let mut decoder = Decoder::with_ip(mode.bitness(), rest, at.value(), super::DECODER_OPTIONS);
        let insn = decoder.decode();
        let reason = match decoder.last_error() {
            DecoderError::None => None,
            // A prefix of an instruction can only be longer than any instruction if it is none.
            DecoderError::NoMoreBytes if rest.len() < MAX_INSN_BYTES => Some(RelocateReason::Truncated),
            _ => Some(RelocateReason::Invalid),
        };
        match (reason, u32::try_from(offset)) {
            (None, Ok(offset)) => {
                let constants = decoder.get_constant_offsets(&insn);
                Ok(Self { decoded: insn, constants, bytes: &rest[..insn.len()], offset })
            }
            (reason, _) => Err(RelocateError { at, reason: reason.unwrap_or(RelocateReason::Unsupported) }),
        }
    }

    /// The offset in the window of the instruction behind.
    fn end_offset(&self) -> u32 {
        self.offset + u32::try_from(self.bytes.len()).expect("no instruction is longer than 15 bytes")
    }

    fn at(&self) -> Addr {
        Addr::new(self.decoded.ip())
    }

    fn next(&self, mode: Mode) -> Addr {
        truncate(mode, Addr::new(self.decoded.next_ip()))
    }

    /// The instruction as it is, but for a RIP-relative displacement.
    fn copied(&self) -> Result<Moved<'a>, RelocateReason> {
        match self.decoded.memory_base() {
            Register::RIP if self.constants.displacement_size() == size_of::<i32>() => Ok(Moved::RipRelative {
                bytes: self.bytes,
                displacement_at: self.constants.displacement_offset(),
                target: Addr::new(self.decoded.ip_rel_memory_address()),
            }),
            Register::RIP | Register::EIP => Err(RelocateReason::Unsupported),
            _ => Ok(Moved::Verbatim(self.bytes)),
        }
    }
}

/// Whether control never goes on to the next instruction.
fn ends_path(insn: &Instruction) -> bool {
    matches!(
        insn.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return | FlowControl::Exception
    )
}
