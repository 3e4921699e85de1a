//! General-purpose registers and sets of them.
//!
//! Owns [`Gpr`] and [`RegSet`], numbered as `ModRM` and REX encode them (SDM volume 2, table 2-2), so that emitted code
//! can use the numbers directly. Neighbours: [`clobbers`](super::clobbers()) yields sets, trampolines save them, PC
//! thunks name one. Invariant: a number is below 16; 32-bit code has only the lower eight.

use core::{fmt, ops};

use iced_x86::Register;

use crate::Mode;

/// A general-purpose register, whichever part of it is meant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpr(u8);

impl Gpr {
    /// eax, rax.
    pub const AX: Self = Self(0);
    /// ecx, rcx.
    pub const CX: Self = Self(1);
    /// edx, rdx.
    pub const DX: Self = Self(2);
    /// ebx, rbx.
    pub const BX: Self = Self(3);
    /// esp, rsp.
    pub const SP: Self = Self(4);
    /// ebp, rbp.
    pub const BP: Self = Self(5);
    /// esi, rsi.
    pub const SI: Self = Self(6);
    /// edi, rdi.
    pub const DI: Self = Self(7);
    /// r8.
    pub const R8: Self = Self(8);
    /// r9.
    pub const R9: Self = Self(9);
    /// r10.
    pub const R10: Self = Self(10);
    /// r11.
    pub const R11: Self = Self(11);
    /// r12.
    pub const R12: Self = Self(12);
    /// r13.
    pub const R13: Self = Self(13);
    /// r14.
    pub const R14: Self = Self(14);
    /// r15.
    pub const R15: Self = Self(15);

    /// The register with that number, if there is one.
    pub const fn new(number: u8) -> Option<Self> {
        if number < 16 { Some(Self(number)) } else { None }
    }

    /// Its number, 0..16.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Whether code of `mode` can name it: 32-bit code has no r8 to r15.
    pub const fn exists_in(self, mode: Mode) -> bool {
        matches!(mode, Mode::Bits64) || self.0 < 8
    }

    /// The register that `register` is, or is a part of.
    pub(super) fn of(register: Register) -> Option<Self> {
        // iced numbers ah..bh behind al..bl, so the number must come from the full register.
        let full = register.is_gpr().then(|| register.full_register())?;
        u8::try_from(full.number()).ok().and_then(Self::new)
    }
}

impl fmt::Display for Gpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 16] =
            ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
        f.write_str(NAMES[usize::from(self.0)])
    }
}

impl fmt::Debug for Gpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A set of general-purpose registers: bit n stands for the register with number n.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RegSet(u16);

impl RegSet {
    /// No register.
    pub const EMPTY: Self = Self(0);
    /// All sixteen.
    pub const ALL: Self = Self(u16::MAX);

    /// The set of these.
    pub const fn of(registers: &[Gpr]) -> Self {
        let mut bits = 0;
        let mut index = 0;
        while index < registers.len() {
            bits |= 1 << registers[index].0;
            index += 1;
        }
        Self(bits)
    }

    /// Bit n for the register with number n.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// The set with these bits.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// How many registers it has.
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether it has none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `register` is in it.
    pub const fn contains(self, register: Gpr) -> bool {
        self.0 & 1 << register.0 != 0
    }

    /// Adds `register`.
    pub const fn insert(&mut self, register: Gpr) {
        self.0 |= 1 << register.0;
    }

    /// Its registers in the order of their numbers.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Gpr> {
        (0..16).map(Gpr).filter(move |register| self.contains(*register))
    }

    /// What the psABI leaves to the caller to save: 64 bit rax, rcx, rdx, rsi, rdi and r8 to r11 (x86-64 psABI, figure
    /// 3.4); 32 bit eax, ecx and edx (i386 psABI, table 2.3).
    pub const fn caller_saved(mode: Mode) -> Self {
        match mode {
            Mode::Bits32 => Self::of(&[Gpr::AX, Gpr::CX, Gpr::DX]),
            Mode::Bits64 => {
                Self::of(&[Gpr::AX, Gpr::CX, Gpr::DX, Gpr::SI, Gpr::DI, Gpr::R8, Gpr::R9, Gpr::R10, Gpr::R11])
            }
        }
    }
}

impl ops::BitOr for RegSet {
    type Output = Self;

    /// The union.
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl ops::BitAnd for RegSet {
    type Output = Self;

    /// The intersection.
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl ops::Sub for RegSet {
    type Output = Self;

    /// The difference.
    fn sub(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl fmt::Debug for RegSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_numbered_as_instructions_encode_them() {
        use iced_x86::Register as R;
        let families = [
            [R::AL, R::AX, R::EAX, R::RAX],
            [R::CL, R::CX, R::ECX, R::RCX],
            [R::DL, R::DX, R::EDX, R::RDX],
            [R::BL, R::BX, R::EBX, R::RBX],
            [R::SPL, R::SP, R::ESP, R::RSP],
            [R::BPL, R::BP, R::EBP, R::RBP],
            [R::SIL, R::SI, R::ESI, R::RSI],
            [R::DIL, R::DI, R::EDI, R::RDI],
            [R::R8L, R::R8W, R::R8D, R::R8],
            [R::R15L, R::R15W, R::R15D, R::R15],
        ];
        for (parts, number) in families.iter().zip([0, 1, 2, 3, 4, 5, 6, 7, 8, 15]) {
            for part in parts {
                assert_eq!(Gpr::of(*part), Gpr::new(number), "{part:?}");
            }
        }
        for (high, low) in [(R::AH, Gpr::AX), (R::CH, Gpr::CX), (R::DH, Gpr::DX), (R::BH, Gpr::BX)] {
            assert_eq!(Gpr::of(high), Some(low));
        }
        for other in [R::None, R::RIP, R::EIP, R::XMM0, R::ES, R::K1, R::ST0] {
            assert_eq!(Gpr::of(other), None, "{other:?}");
        }
    }

    #[test]
    fn sets_behave_as_sets() {
        let mut set = RegSet::of(&[Gpr::R15, Gpr::AX]);
        set.insert(Gpr::SP);
        assert!(set.iter().eq([Gpr::AX, Gpr::SP, Gpr::R15]));
        assert_eq!((set.len(), set.is_empty(), set.bits()), (3, false, 0x8011));
        assert_eq!(set - RegSet::of(&[Gpr::SP, Gpr::BX]), RegSet::of(&[Gpr::AX, Gpr::R15]));
        assert_eq!(set & RegSet::caller_saved(Mode::Bits64), RegSet::of(&[Gpr::AX]));
        assert_eq!(set | RegSet::ALL, RegSet::ALL);
    }
}
