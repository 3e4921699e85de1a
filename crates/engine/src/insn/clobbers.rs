//! What a compiled callback can write, read from its machine code.
//!
//! Owns [`clobbers`] and its answer, [`Clobbers`]. A trampoline that calls an ops' callback must keep the registers
//! that the traced function's caller expects to survive, and which of them the callback *can* touch is in its code: a
//! counter takes one or two, and no vector state. Trampolines save just these; the saving is most of what a traced call
//! costs. Neighbours: `frame` follows the stack pointer, ops call this once when they are registered, trampolines use
//! the result.
//!
//! Invariant: the answer is sound. A register that is not in it is not written, on any path, by anything the callback
//! calls. Whatever is not understood makes the answer [`Clobbers::EVERYTHING`]: an allow-list of instruction sets
//! decides what is. Relied upon are three things. The code is a compiler's, or keeps to the psABI: callee-saved
//! registers are restored, and no store through a computed pointer hits a return address (computed returns, such as
//! retpolines, are recognised). It does not change after it was read, except that its own callees may become sites:
//! what trampolines do there, they undo. And nothing resumes behind a `ud2`.

mod frame;

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use iced_x86::{
    Code, CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, UsedRegister,
};

use self::frame::Frame;
use super::{Gpr, MAX_INSN_BYTES, RegSet, decode, truncate};
use crate::{Addr, Mode};

/// A callback with more instructions than this is not looked at further. Those worth it are much smaller.
const MAX_INSTRUCTIONS: usize = 256;

/// How deep direct calls are followed.
const MAX_CALL_DEPTH: usize = 8;

/// The state of the CPU that a piece of code can write.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Clobbers {
    /// General-purpose registers written anywhere. Also those that are restored before the return, and the stack
    /// pointer.
    pub general: RegSet,
    /// Any bit of RFLAGS, the direction flag included.
    pub flags: bool,
    /// Any of x87, MMX, XMM, YMM, ZMM and mask registers, MXCSR, or the x87 control and status words.
    pub vector: bool,
}

impl Clobbers {
    /// Code that writes nothing.
    pub const NOTHING: Self = Self { general: RegSet::EMPTY, flags: false, vector: false };

    /// Code that may write anything, as all code that is not understood.
    pub const EVERYTHING: Self = Self { general: RegSet::ALL, flags: true, vector: true };

    /// The registers that it writes and that the psABI of `mode` leaves to the caller to save.
    pub fn caller_saved(self, mode: Mode) -> RegSet {
        self.general & RegSet::caller_saved(mode)
    }

    /// What either of two pieces of code can write.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            general: self.general | other.general,
            flags: self.flags || other.flags,
            vector: self.vector || other.vector,
        }
    }
}

/// What a call of the function at `entry` can write, from its first instruction to its return.
///
/// `read` fills the buffer from an address and returns how many bytes it could read there; fewer than asked for is not
/// an error. Jumps are followed, conditional ones both ways, and direct calls; paths end at the return and at `ud2`. An
/// `int3` is *not* taken for an end: it may be a debugger's, or a site's, and hide another instruction.
///
/// The answer is [`Clobbers::EVERYTHING`] at the first indirect call or jump (a call through a PLT or GOT among them),
/// system call, privileged or unknown instruction, write of a segment register, save or restore of extended state
/// (`xsave`, `fxsave`), unreadable byte, return to elsewhere than the caller, `ret imm16`, after more than 256
/// instructions, or with calls nested deeper than 8.
pub fn clobbers(mode: Mode, entry: Addr, read: &mut dyn FnMut(Addr, &mut [u8]) -> usize) -> Clobbers {
    let mut analysis = Analysis {
        mode,
        read,
        infos: InstructionInfoFactory::new(),
        instructions_left: MAX_INSTRUCTIONS,
        finished: BTreeSet::new(),
        found: Clobbers::NOTHING,
    };
    match analysis.function(truncate(mode, entry), 0) {
        Ok(()) => analysis.found,
        Err(NotUnderstood) => Clobbers::EVERYTHING,
    }
}

/// The analysis met something that it cannot vouch for.
struct NotUnderstood;

struct Analysis<'a> {
    mode: Mode,
    read: &'a mut dyn FnMut(Addr, &mut [u8]) -> usize,
    infos: InstructionInfoFactory,
    instructions_left: usize,
    /// Entries of callees that were followed to the end.
    finished: BTreeSet<Addr>,
    found: Clobbers,
}

/// Where control goes after an instruction.
enum Flow {
    /// To the next instruction.
    Next,
    /// To one of the next instruction and this one.
    Branch(Addr),
    /// To this one.
    Jump(Addr),
    /// To this one, and from there back to the next.
    Call(Addr),
    /// To the caller.
    Return,
    /// Nowhere.
    End,
}

impl Analysis<'_> {
    /// Follows one function from its entry until no path leads to an instruction, or a state of the frame, that was not
    /// seen.
    fn function(&mut self, entry: Addr, call_depth: usize) -> Result<(), NotUnderstood> {
        if call_depth > MAX_CALL_DEPTH {
            return Err(NotUnderstood);
        }
        let mut frames: BTreeMap<Addr, Frame> = BTreeMap::new();
        let mut pending: Vec<(Addr, Frame)> = Vec::from([(entry, Frame::at_entry(self.mode))]);
        while let Some((at, incoming)) = pending.pop() {
            let frame = match frames.get(&at) {
                None => {
                    self.instructions_left = self.instructions_left.checked_sub(1).ok_or(NotUnderstood)?;
                    incoming
                }
                Some(known) if known.join(&incoming) == *known => continue,
                Some(known) => known.join(&incoming),
            };
            frames.insert(at, frame.clone());

            let insn = self.fetch(at)?;
            self.record_writes(&insn)?;
            let mut after = frame.step(&insn, self.infos.info(&insn))?;
            let next = truncate(self.mode, Addr::new(insn.next_ip()));
            match flow(self.mode, &insn)? {
                Flow::Next => pending.push((next, after)),
                Flow::Jump(target) => pending.push((target, after)),
                Flow::Branch(target) => pending.extend([(target, after.clone()), (next, after)]),
                Flow::Call(target) => {
                    if !self.finished.contains(&target) {
                        self.function(target, call_depth + 1)?;
                        self.finished.insert(target);
                    }
                    after.return_from_call();
                    pending.push((next, after));
                }
                Flow::Return if frame.is_at_return_address() => {}
                Flow::Return => return Err(NotUnderstood),
                Flow::End => {}
            }
        }
        Ok(())
    }

    fn fetch(&mut self, at: Addr) -> Result<Instruction, NotUnderstood> {
        let mut bytes = [0; MAX_INSN_BYTES];
        let len_bytes = (self.read)(at, &mut bytes).min(MAX_INSN_BYTES);
        let insn = decode(self.mode, at, &bytes[..len_bytes]);
        if insn.is_invalid() { Err(NotUnderstood) } else { Ok(insn) }
    }

    /// Adds what `insn` itself writes to what was found.
    fn record_writes(&mut self, insn: &Instruction) -> Result<(), NotUnderstood> {
        if insn.is_privileged() {
            return Err(NotUnderstood);
        }
        match state_touched(insn)? {
            StateTouched::General => {}
            StateTouched::Vector => self.found.vector = true,
        }
        self.found.flags |= insn.rflags_modified() != 0;
        for used in self.infos.info(insn).used_registers().iter().copied().filter(|used| is_written(*used)) {
            let register = used.register();
            if let Some(gpr) = Gpr::of(register) {
                self.found.general.insert(gpr);
            } else if register.is_vector_register() || register.is_st() || register.is_mm() || register.is_k() {
                self.found.vector = true;
            } else {
                return Err(NotUnderstood);
            }
        }
        Ok(())
    }
}

fn is_written(used: UsedRegister) -> bool {
    match used.access() {
        OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess => false,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
    }
}

/// Classes of instructions by the state that they have to do with.
enum StateTouched {
    /// General-purpose registers, flags and memory; the decoder lists all that is written.
    General,
    /// Vector or x87 registers as well, or their control and status words, which the decoder does not list.
    Vector,
}

/// Sorts instructions by the extension they belong to. The lists name what is understood; everything newer is not.
fn state_touched(insn: &Instruction) -> Result<StateTouched, NotUnderstood> {
    // Came with SSE, but have to do with memory and its order only.
    if matches!(
        insn.mnemonic(),
        Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Sfence
            | Mnemonic::Movnti
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
    ) {
        return Ok(StateTouched::General);
    }
    let mut touched = StateTouched::General;
    for feature in insn.cpuid_features() {
        if is_vector_extension(*feature) {
            touched = StateTouched::Vector;
        } else if !is_general_extension(*feature) {
            return Err(NotUnderstood);
        }
    }
    Ok(touched)
}

fn is_general_extension(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::ADX
            | F::BMI1
            | F::BMI2
            | F::CET_IBT
            | F::CLDEMOTE
            | F::CLFLUSHOPT
            | F::CLFSH
            | F::CLWB
            | F::CMOV
            | F::CMPXCHG16B
            | F::CPUID
            | F::CX8
            | F::LZCNT
            | F::MOVBE
            | F::MOVDIRI
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::POPCNT
            | F::PREFETCHW
            | F::RDPID
            | F::RDRAND
            | F::RDSEED
            | F::RDTSCP
            | F::SERIALIZE
            | F::TSC
    )
}

fn is_vector_extension(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::GFNI
            | F::AVX
            | F::AVX2
            | F::AVX_VNNI
            | F::F16C
            | F::FMA
            | F::VAES
            | F::VPCLMULQDQ
            | F::AVX512F
            | F::AVX512BW
            | F::AVX512CD
            | F::AVX512DQ
            | F::AVX512VL
            | F::AVX512_BF16
            | F::AVX512_BITALG
            | F::AVX512_FP16
            | F::AVX512_IFMA
            | F::AVX512_VBMI
            | F::AVX512_VBMI2
            | F::AVX512_VNNI
            | F::AVX512_VPOPCNTDQ
    )
}

fn flow(mode: Mode, insn: &Instruction) -> Result<Flow, NotUnderstood> {
    let next = truncate(mode, Addr::new(insn.next_ip()));
    let target = match insn.op0_kind() {
        OpKind::NearBranch32 | OpKind::NearBranch64 => Some(truncate(mode, Addr::new(insn.near_branch_target()))),
        _ => None,
    };
    Ok(match (insn.flow_control(), target) {
        (FlowControl::Next, _) => Flow::Next,
        (FlowControl::UnconditionalBranch, Some(target)) => Flow::Jump(target),
        (FlowControl::ConditionalBranch, Some(target)) => Flow::Branch(target),
        // i386 code reads its own address like this; there is no return.
        (FlowControl::Call, Some(target)) if target == next => Flow::Next,
        (FlowControl::Call, Some(target)) => Flow::Call(target),
        (FlowControl::Return, _) if matches!(insn.code(), Code::Retnd | Code::Retnq) => Flow::Return,
        (FlowControl::Exception, _) if insn.code() == Code::Ud2 => Flow::End,
        _ => return Err(NotUnderstood),
    })
}
