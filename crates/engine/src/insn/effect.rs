//! What an instruction at a site does to control flow, so that the int3 handler can do it in its place.
//!
//! Owns [`Effect`] and [`Condition`]. While a site is poked its first byte is an int3, and the handler emulates the
//! instruction that stands there (or is about to). [`Effect::decode`] runs when the poke is *planned*: the decoder
//! builds its tables on the heap at first use and has no place in a trap. The result is a small `Copy` value that
//! travels in the batch to the handler. Invariant: an effect is complete. An instruction that does anything besides
//! moving IP (and, for call and ret, the stack pointer) is refused.

use core::{error::Error, fmt};

use iced_x86::{Code, ConditionCode, Instruction, OpKind, Register};

use super::{InsnBytes, MAX_INSN_BYTES, decode, truncate};
use crate::{Addr, Mode};

/// What the CPU would do. All addresses are truncated to 32 bits in 32-bit mode.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Effect {
    /// Nothing: go on at `next`.
    Nop {
        /// The instruction behind.
        next: Addr,
    },
    /// Push `return_to`, one machine word, and go to `target`.
    Call {
        /// Where the call leads.
        target: Addr,
        /// What it pushes: the instruction behind.
        return_to: Addr,
    },
    /// Go to `target`.
    Jmp {
        /// Where the jump leads.
        target: Addr,
    },
    /// Go to `taken` if `condition` holds, else to `next`.
    Jcc {
        /// What is tested.
        condition: Condition,
        /// Where the jump leads if it is taken.
        taken: Addr,
        /// The instruction behind.
        next: Addr,
    },
    /// Pop a machine word and go there; then add `pop_bytes` to the stack pointer.
    Ret {
        /// Bytes of arguments that the callee releases, besides the return address.
        pop_bytes: u16,
    },
}

impl Effect {
    /// Reads `bytes`, exactly one instruction that stands at `at`.
    ///
    /// Understood are nops (`90`, with any prefixes that leave it one; `0f 1f /0`; the register copies and `lea`s of a
    /// register to itself that assemblers pad 32-bit code with), direct near calls, direct near jumps, conditional
    /// jumps, and near returns. Prefixes that have no meaning there (`rep ret`, branch hints, `addr32 call` from linker
    /// relaxation, MPX's `bnd` without MPX) are accepted.
    ///
    /// `endbr` is refused, though it does nothing on most machines: under indirect-branch tracking (SDM volume 1,
    /// "Control-flow Enforcement Technology") it is what an indirect branch must find, and an int3 in its place faults
    /// before any handler could stand in for it. A site begins behind it. `pause` and the reserved nops (`0f 18`..`0f
    /// 1e`) are refused as well: newer CPUs give them meanings.
    ///
    /// # Errors
    /// [`NotEmulated`] for everything else.
    pub fn decode(mode: Mode, at: Addr, bytes: &[u8]) -> Result<Self, NotEmulated> {
        let refused =
            |reason| NotEmulated { at, bytes: InsnBytes::new(&bytes[..bytes.len().min(MAX_INSN_BYTES)]), reason };
        let insn = decode(mode, at, bytes);
        if insn.is_invalid() {
            return Err(refused(NotEmulatedReason::Undecodable));
        }
        if insn.len() != bytes.len() {
            return Err(refused(NotEmulatedReason::TrailingBytes));
        }
        let next = truncate(mode, Addr::new(insn.next_ip()));
        let target = truncate(mode, Addr::new(insn.near_branch_target()));
        if let Some(condition) = jcc_condition(&insn) {
            return Ok(Self::Jcc { condition, taken: target, next });
        }
        Ok(match insn.code() {
            Code::Call_rel32_32 | Code::Call_rel32_64 => Self::Call { target, return_to: next },
            Code::Jmp_rel8_32 | Code::Jmp_rel32_32 | Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => Self::Jmp { target },
            Code::Retnd | Code::Retnq => Self::Ret { pop_bytes: 0 },
            Code::Retnd_imm16 | Code::Retnq_imm16 => Self::Ret { pop_bytes: insn.immediate16() },
            _ if is_nop(mode, &insn) => Self::Nop { next },
            _ => return Err(refused(NotEmulatedReason::Other)),
        })
    }
}

/// An instruction that the int3 handler cannot stand in for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotEmulated {
    /// Where it stands.
    pub at: Addr,
    /// The bytes given, at most [`MAX_INSN_BYTES`] of them.
    pub bytes: InsnBytes,
    /// What is wrong with them.
    pub reason: NotEmulatedReason,
}

/// Why an instruction has no [`Effect`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NotEmulatedReason {
    /// The bytes are no instruction, or only the beginning of one.
    Undecodable,
    /// More bytes follow behind the first instruction.
    TrailingBytes,
    /// It does something else than to move the instruction pointer.
    Other,
}

impl fmt::Display for NotEmulated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.reason {
            NotEmulatedReason::Undecodable => "is not a whole instruction",
            NotEmulatedReason::TrailingBytes => "is more than one instruction",
            NotEmulatedReason::Other => "is neither nop, direct branch nor near return",
        };
        write!(f, "code at {} cannot be emulated: {} {reason}", self.at, self.bytes)
    }
}

impl Error for NotEmulated {}

/// A condition of x86's `jcc`, `setcc` and `cmovcc`; the discriminant is the `tttn` field of their opcodes (SDM volume
/// 1, appendix B).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Condition {
    /// `o`: OF.
    Overflow = 0x0,
    /// `no`: not OF.
    NotOverflow = 0x1,
    /// `b`, `c`, `nae`: CF.
    Below = 0x2,
    /// `ae`, `nc`, `nb`: not CF.
    AboveOrEqual = 0x3,
    /// `e`, `z`: ZF.
    Equal = 0x4,
    /// `ne`, `nz`: not ZF.
    NotEqual = 0x5,
    /// `be`, `na`: CF or ZF.
    BelowOrEqual = 0x6,
    /// `a`, `nbe`: neither CF nor ZF.
    Above = 0x7,
    /// `s`: SF.
    Sign = 0x8,
    /// `ns`: not SF.
    NotSign = 0x9,
    /// `p`, `pe`: PF.
    Parity = 0xa,
    /// `np`, `po`: not PF.
    NotParity = 0xb,
    /// `l`, `nge`: SF differs from OF.
    Less = 0xc,
    /// `ge`, `nl`: SF equals OF.
    GreaterOrEqual = 0xd,
    /// `le`, `ng`: ZF, or SF differs from OF.
    LessOrEqual = 0xe,
    /// `g`, `nle`: not ZF, and SF equals OF.
    Greater = 0xf,
}

impl Condition {
    /// All sixteen, in the order of their encoding.
    pub const ALL: [Self; 16] = [
        Self::Overflow,
        Self::NotOverflow,
        Self::Below,
        Self::AboveOrEqual,
        Self::Equal,
        Self::NotEqual,
        Self::BelowOrEqual,
        Self::Above,
        Self::Sign,
        Self::NotSign,
        Self::Parity,
        Self::NotParity,
        Self::Less,
        Self::GreaterOrEqual,
        Self::LessOrEqual,
        Self::Greater,
    ];

    /// The four-bit `tttn` field, as it stands in opcodes `70+tttn`, `0f 80+tttn` and `0f 90+tttn`.
    pub const fn encoding(self) -> u8 {
        self as u8
    }

    /// The condition that holds exactly when this one does not.
    #[must_use]
    pub const fn negated(self) -> Self {
        Self::ALL[self.encoding() as usize ^ 1]
    }

    /// Whether the condition holds under `flags`, a value of RFLAGS or EFLAGS.
    pub const fn holds(self, flags: u64) -> bool {
        let carry = flags & 1 != 0;
        let parity = flags & 1 << 2 != 0;
        let zero = flags & 1 << 6 != 0;
        let sign = flags & 1 << 7 != 0;
        let overflow = flags & 1 << 11 != 0;
        match self {
            Self::Overflow => overflow,
            Self::NotOverflow => !overflow,
            Self::Below => carry,
            Self::AboveOrEqual => !carry,
            Self::Equal => zero,
            Self::NotEqual => !zero,
            Self::BelowOrEqual => carry || zero,
            Self::Above => !(carry || zero),
            Self::Sign => sign,
            Self::NotSign => !sign,
            Self::Parity => parity,
            Self::NotParity => !parity,
            Self::Less => sign != overflow,
            Self::GreaterOrEqual => sign == overflow,
            Self::LessOrEqual => zero || sign != overflow,
            Self::Greater => !zero && sign == overflow,
        }
    }

    fn of(code: ConditionCode) -> Option<Self> {
        Some(match code {
            ConditionCode::None => return None,
            ConditionCode::o => Self::Overflow,
            ConditionCode::no => Self::NotOverflow,
            ConditionCode::b => Self::Below,
            ConditionCode::ae => Self::AboveOrEqual,
            ConditionCode::e => Self::Equal,
            ConditionCode::ne => Self::NotEqual,
            ConditionCode::be => Self::BelowOrEqual,
            ConditionCode::a => Self::Above,
            ConditionCode::s => Self::Sign,
            ConditionCode::ns => Self::NotSign,
            ConditionCode::p => Self::Parity,
            ConditionCode::np => Self::NotParity,
            ConditionCode::l => Self::Less,
            ConditionCode::ge => Self::GreaterOrEqual,
            ConditionCode::le => Self::LessOrEqual,
            ConditionCode::g => Self::Greater,
        })
    }
}

/// The condition of a `jcc` of the mode's full width. Not of `loop` and `jcxz`, which test a register.
pub(super) fn jcc_condition(insn: &Instruction) -> Option<Condition> {
    let full_width = insn.op0_kind() != OpKind::NearBranch16;
    (insn.is_jcc_short_or_near() && full_width).then(|| Condition::of(insn.condition_code())).flatten()
}

/// The nops that assemblers emit: the real ones, and for old 32-bit CPUs a register copied to itself. Narrower
/// copies (and 32-bit ones in 64-bit mode, which clear the upper half) do something.
fn is_nop(mode: Mode, insn: &Instruction) -> bool {
    let full_width = match mode {
        Mode::Bits32 => Register::is_gpr32,
        Mode::Bits64 => Register::is_gpr64,
    };
    match insn.code() {
        Code::Nopw | Code::Nopd | Code::Nopq | Code::Nop_rm16 | Code::Nop_rm32 | Code::Nop_rm64 => true,
        Code::Mov_rm32_r32 | Code::Mov_r32_rm32 | Code::Mov_rm64_r64 | Code::Mov_r64_rm64 => {
            insn.op1_kind() == OpKind::Register
                && insn.op0_register() == insn.op1_register()
                && full_width(insn.op0_register())
        }
        Code::Lea_r32_m | Code::Lea_r64_m => {
            insn.memory_base() == insn.op0_register()
                && insn.memory_index() == Register::None
                && insn.memory_displacement64() == 0
                && full_width(insn.op0_register())
        }
        _ => false,
    }
}
