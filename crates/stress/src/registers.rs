//! Known values in every register of the CPU, held across calls and interruptions.
//!
//! Owns [`Held`]: what is loaded before a call and what is found after it, and the comparison. The loading and storing is done by
//! `workload/registers.S`, around one of the probes, traced functions that change no register themselves. Downstream is the
//! [`worker`](crate::worker), in its main loop and in its signal handlers. Invariant: whatever differs was changed by a trampoline, a trap, or a
//! signal, which must not change anything (I4).

use std::{
    ffi::{c_uint, c_void},
    fmt,
};

use crate::workload;

/// Which vector registers are held, each level with those of the one before. The discriminants are those of `workload.h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Vectors {
    /// XMM.
    Sse = 0,
    /// YMM.
    Avx = 1,
    /// ZMM and mask registers of 64 bits (AVX-512F and AVX-512BW).
    Avx512 = 2,
}

impl Vectors {
    /// The most that this CPU has and its operating system preserves (CPUID, XGETBV).
    pub fn detect() -> Self {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            Self::Avx512
        } else if is_x86_feature_detected!("avx") {
            Self::Avx
        } else {
            Self::Sse
        }
    }

    /// As reports call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sse => "xmm",
            Self::Avx => "ymm",
            Self::Avx512 => "zmm",
        }
    }

    const fn register_bytes(self) -> usize {
        match self {
            Self::Sse => 16,
            Self::Avx => 32,
            Self::Avx512 => 64,
        }
    }

    const fn registers(self) -> usize {
        match self {
            _ if cfg!(target_arch = "x86") => 8,
            Self::Sse | Self::Avx => 16,
            Self::Avx512 => 32,
        }
    }
}

/// General-purpose registers, without the stack pointer, in the order of [`Registers::general`].
const GENERAL: &[&str] = if cfg!(target_arch = "x86") {
    &["eax", "ebx", "ecx", "edx", "esi", "edi", "ebp"]
} else {
    &["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"]
};
const R11: usize = 10;

/// CF, PF, AF, ZF, SF and OF (SDM volume 1, section 3.4.3).
const ARITHMETIC_FLAGS: usize = 0x8d5;
/// Which have to be as they were: the arithmetic ones, and DF.
const HELD_FLAGS: usize = ARITHMETIC_FLAGS | 0x400;
/// Bit 1 is always set; IF is, whenever user code runs.
const OTHER_FLAGS: usize = 0x202;

/// MXCSR with all exceptions masked; bits 13 and 14 are the rounding mode (SDM volume 1, section 10.2.3).
const MXCSR: u32 = 0x1f80;
const MXCSR_ROUND_UP: u32 = 0x4000;
/// x87 control word with all exceptions masked and 64 bits of precision; bits 10 and 11 are the rounding mode (section 8.1.5).
const X87_CONTROL: u16 = 0x037f;
const X87_ROUND_UP: u16 = 0x0800;

/// All registers, `struct registers` of `workload.h`. What the CPU does not have is zero.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Registers {
    pub(crate) vectors: [[u8; 64]; 32],
    pub(crate) masks: [u64; 8],
    /// 80 bits each.
    pub(crate) x87: [[u8; 16]; 8],
    pub(crate) mxcsr: u32,
    pub(crate) x87_control: u16,
    pub(crate) flags: usize,
    pub(crate) general: [usize; 15],
}

/// A register, or the part of the state that flags and control words are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Register {
    /// Vector register number n, with the name of its widest form.
    Vector(Vectors, usize),
    /// Mask register kn.
    Mask(usize),
    /// x87 register st(n).
    X87(usize),
    /// SSE control and status.
    Mxcsr,
    /// x87 control word.
    X87Control,
    /// Arithmetic flags or the direction flag.
    Flags,
    /// General-purpose register, by its place in the structure.
    General(usize),
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vector(vectors, number) => write!(f, "{}{number}", vectors.name()),
            Self::Mask(number) => write!(f, "k{number}"),
            Self::X87(number) => write!(f, "st({number})"),
            Self::Mxcsr => f.write_str("mxcsr"),
            Self::X87Control => f.write_str("the x87 control word"),
            Self::Flags => f.write_str("flags"),
            Self::General(index) => f.write_str(GENERAL.get(*index).copied().unwrap_or("?")),
        }
    }
}

unsafe extern "C" {
    fn stress_call_held(load: *const Registers, found: *mut Registers, level: c_uint, probe: *mut c_void);
}

impl Registers {
    fn zero() -> Self {
        Self {
            vectors: [[0; 64]; 32],
            masks: [0; 8],
            x87: [[0; 16]; 8],
            mxcsr: 0,
            x87_control: 0,
            flags: 0,
            general: [0; 15],
        }
    }

    /// Different values in every register, from `words`.
    fn filled(vectors: Vectors, mut words: impl FnMut() -> u64) -> Self {
        let mut registers = Self::zero();
        for register in &mut registers.vectors[..vectors.registers()] {
            for chunk in register[..vectors.register_bytes()].chunks_exact_mut(8) {
                chunk.copy_from_slice(&words().to_le_bytes());
            }
        }
        if vectors == Vectors::Avx512 {
            registers.masks.fill_with(&mut words);
        }
        for register in &mut registers.x87 {
            // A normal number: the integer bit set, an exponent in the middle of its range.
            let significand = words() | 1 << 63;
            let sign_and_exponent = 0x3fff ^ (words() & 0x83ff);
            register[..8].copy_from_slice(&significand.to_le_bytes());
            register[8..10].copy_from_slice(&sign_and_exponent.to_le_bytes()[..2]);
        }
        let choice = words();
        registers.mxcsr = MXCSR | if choice & 1 == 0 { 0 } else { MXCSR_ROUND_UP };
        registers.x87_control = X87_CONTROL | if choice & 1 == 0 { X87_ROUND_UP } else { 0 };
        registers.flags = truncated(words()) & ARITHMETIC_FLAGS | OTHER_FLAGS;
        registers.general[..GENERAL.len()].fill_with(|| truncated(words()));
        registers
    }

    /// The first register in which `found` differs.
    fn difference(&self, found: &Self, vectors: Vectors, r11_is_held: bool) -> Option<Register> {
        let first = |len: usize, differs: &dyn Fn(usize) -> bool| (0..len).find(|index| differs(*index));
        let register_bytes = vectors.register_bytes();
        let vector = |n: usize| self.vectors[n][..register_bytes] != found.vectors[n][..register_bytes];
        let general = |n: usize| self.general[n] != found.general[n] && (n != R11 || r11_is_held);
        let control = [
            (self.mxcsr != found.mxcsr, Register::Mxcsr),
            (self.x87_control != found.x87_control, Register::X87Control),
            ((self.flags ^ found.flags) & HELD_FLAGS != 0, Register::Flags),
        ];
        first(vectors.registers(), &vector)
            .map(|number| Register::Vector(vectors, number))
            .or_else(|| first(self.masks.len(), &|n| self.masks[n] != found.masks[n]).map(Register::Mask))
            .or_else(|| first(self.x87.len(), &|n| self.x87[n][..10] != found.x87[n][..10]).map(Register::X87))
            .or_else(|| control.iter().find(|(differs, _)| *differs).map(|(_, register)| *register))
            .or_else(|| first(GENERAL.len(), &general).map(Register::General))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
fn truncated(word: u64) -> usize {
    word as usize
}

/// Values to hold, and room for what is found.
pub(crate) struct Held {
    vectors: Vectors,
    /// r11 too: not where a resume strategy passes something in it.
    with_r11: bool,
    /// To be loaded, in turn, so that state which was restored from the call before is noticed.
    loads: [Registers; 2],
    turn: usize,
    found: Registers,
}

impl Held {
    /// Values from `words`, which should not repeat themselves.
    pub(crate) fn new(vectors: Vectors, with_r11: bool, mut words: impl FnMut() -> u64) -> Self {
        let loads = std::array::from_fn(|_| Registers::filled(vectors, &mut words));
        Self { vectors, with_r11, loads, turn: 0, found: Registers::zero() }
    }

    /// Holds the values across a call of a probe, and says which register changed, if one did. Safe in signal handlers.
    ///
    /// # Safety
    /// The calling context must have entered counters, and the CPU must have the registers.
    pub(crate) unsafe fn call(&mut self, probe: usize) -> Option<Register> {
        debug_assert!(probe < workload::PROBES);
        self.turn ^= 1;
        let load = &self.loads[self.turn];
        let entry = workload::entry(probe).as_ptr();
        // SAFETY: both structures are laid out as the callee expects; it restores what the psABI asks it to; the caller vouches
        // for counters and registers.
        unsafe { stress_call_held(load, &raw mut self.found, self.vectors as c_uint, entry) };
        load.difference(&self.found, self.vectors, self.with_r11)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Counters, PROBES, enter};

    fn held() -> Held {
        let mut word = 0x0123_4567_89ab_cdef_u64;
        Held::new(Vectors::detect(), true, move || {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            word
        })
    }

    #[test]
    fn a_probe_changes_no_register() {
        let counters = Counters::default();
        // SAFETY: entered below are the outer ones again, before these go.
        let outer = unsafe { enter(&raw const counters) };
        let mut held = held();
        for probe in (0..PROBES).cycle().take(4 * PROBES) {
            // SAFETY: counters are entered, and the registers were detected.
            assert_eq!(unsafe { held.call(probe) }, None);
        }
        // SAFETY: they were valid before.
        unsafe { enter(outer) };
    }

    /// What [`Consumer::Spoiler`](crate::plan::Consumer::Spoiler) does, without a trampoline that makes it good.
    extern "C" fn ruin() {
        unsafe extern "C" {
            fn stress_spoil(level: c_uint);
        }
        // SAFETY: the CPU has the registers; whoever calls this has saved them.
        unsafe { stress_spoil(Vectors::detect() as c_uint) }
    }

    #[test]
    fn what_the_spoiler_does_is_noticed_in_every_register() {
        let held = held();
        let vectors = held.vectors;
        for load in &held.loads {
            let mut found = Registers::zero();
            // SAFETY: as in `Held::call`; the function takes no arguments, and what it ruins is restored.
            unsafe {
                stress_call_held(load, &raw mut found, vectors as c_uint, ruin as extern "C" fn() as *mut c_void);
            };
            for register in 0..vectors.registers() {
                assert_ne!(load.vectors[register], found.vectors[register], "{}{register}", vectors.name());
            }
            for register in 0..8 {
                assert_ne!(load.x87[register][..10], found.x87[register][..10], "st({register})");
                assert_eq!(vectors == Vectors::Avx512, load.masks[register] != found.masks[register], "k{register}");
            }
            assert_ne!((load.mxcsr, load.x87_control), (found.mxcsr, found.x87_control));
            assert_eq!(load.difference(&found, vectors, true), Some(Register::Vector(vectors, 0)));
        }
    }

    #[test]
    fn values_differ_from_register_to_register_and_from_turn_to_turn() {
        let held = held();
        let [one, other] = &held.loads;
        assert_ne!(one.vectors[0], one.vectors[1]);
        assert_ne!(one.x87[0], one.x87[1]);
        assert_ne!((one.mxcsr, one.x87_control, one.flags, one.general), Default::default());
        assert!(one.difference(other, held.vectors, true).is_some());
        assert_eq!(one.difference(&one.clone(), held.vectors, true), None);
    }

    #[test]
    fn every_register_that_changes_is_named() {
        let held = held();
        let load = &held.loads[0];
        let changed = |change: &dyn Fn(&mut Registers)| {
            let mut found = load.clone();
            change(&mut found);
            load.difference(&found, held.vectors, true).map(|register| register.to_string())
        };
        let last = held.vectors.register_bytes() - 1;
        assert_eq!(changed(&|found| found.vectors[7][last] ^= 1), Some(format!("{}7", held.vectors.name())));
        assert_eq!(changed(&|found| found.masks[7] ^= 1 << 63).as_deref(), Some("k7"));
        assert_eq!(changed(&|found| found.x87[7][9] ^= 0x80).as_deref(), Some("st(7)"));
        assert_eq!(changed(&|found| found.x87[0][15] ^= 1), None, "no bit of the register");
        assert_eq!(changed(&|found| found.mxcsr ^= MXCSR_ROUND_UP).as_deref(), Some("mxcsr"));
        assert_eq!(changed(&|found| found.x87_control ^= 0x100).as_deref(), Some("the x87 control word"));
        assert_eq!(changed(&|found| found.flags ^= 0x400).as_deref(), Some("flags"));
        assert_eq!(changed(&|found| found.flags ^= 0x200), None, "not held");
        for (index, name) in GENERAL.iter().enumerate() {
            assert_eq!(changed(&|found| found.general[index] ^= 1).as_deref(), Some(*name));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn r11_is_left_to_the_strategy_that_needs_it() {
        let held = held();
        let load = &held.loads[0];
        let mut found = load.clone();
        found.general[R11] ^= 1;
        assert_eq!(load.difference(&found, held.vectors, false), None);
        assert_eq!(
            load.difference(&found, held.vectors, true).map(|register| register.to_string()),
            Some("r11".into())
        );
    }
}
