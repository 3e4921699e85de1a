//! A second opinion on every stub: decodes it, and the window it was made from, and compares them.
//!
//! Owns [`check`]. It shares with the rewriting only the decoder and the result's type, and goes the other way: it
//! knows no encodings, only what decoded instructions mean. Neighbours: the parent module calls it on each result
//! before giving it out, tests and fuzzers call it with broken ones. Invariant: it accepts a stub only if each
//! instruction of the window has at its boundary either itself, with the same absolute operands, or one of the known
//! sequences for a branch or call with the same destination; anything else in the stub is data that no instruction runs
//! into.

use iced_x86::{Code, FlowControl, Instruction, OpKind, Register};

use super::{RelocateOptions, Relocated};
use crate::{
    Addr, Mode,
    insn::{Gpr, decode, effect::jcc_condition, truncate},
};

/// Whether `relocated`, at `to`, does what the window of `code`, at `from`, does; if not, the instruction of the window
/// whose new form is wrong.
pub(super) fn check(
    mode: Mode,
    from: Addr,
    code: &[u8],
    to: Addr,
    relocated: &Relocated,
    options: &RelocateOptions<'_>,
) -> Result<(), Addr> {
    let window = code.get(..relocated.consumed_bytes).ok_or(from)?;
    let comparison = Comparison { mode, from, window, to, relocated, options };
    let mut boundaries = relocated.boundaries.iter().copied();
    let mut rest = Cursor { mode, stub: to, bytes: &relocated.bytes, offset: 0 };
    let mut offset = 0;
    let mut falls_through = true;
    while offset < window.len() {
        let old = decode(mode, comparison.in_function(offset), &window[offset..]);
        let wrong = Addr::new(old.ip());
        if old.is_invalid() || boundaries.next() != Some((number(offset), number(rest.offset))) {
            return Err(wrong);
        }
        falls_through = comparison.same(&old, &mut rest).ok_or(wrong)?;
        offset += old.len();
    }
    let end = comparison.in_function(window.len());
    if falls_through {
        let jump_back = (number(window.len()), number(rest.offset));
        if boundaries.next() != Some(jump_back) || rest.jump() != Some(end) {
            return Err(end);
        }
    }
    if boundaries.next().is_some() || !rest.is_at_end() { Err(end) } else { Ok(()) }
}

/// An offset as it stands among the boundaries.
fn number(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}

struct Comparison<'a> {
    mode: Mode,
    from: Addr,
    window: &'a [u8],
    to: Addr,
    relocated: &'a Relocated,
    options: &'a RelocateOptions<'a>,
}

impl Comparison<'_> {
    /// Reads what `old` became. Returns whether control can go on from there to the next instruction, nothing if it is
    /// not the same.
    fn same(&self, old: &Instruction, new: &mut Cursor<'_>) -> Option<bool> {
        match old.flow_control() {
            FlowControl::Next => (new.insn()? == *old).then_some(true),
            FlowControl::Return | FlowControl::IndirectBranch | FlowControl::Exception => {
                (new.insn()? == *old).then_some(false)
            }
            FlowControl::UnconditionalBranch => (new.jump()? == self.destination(old)?).then_some(false),
            FlowControl::ConditionalBranch if jcc_condition(old).is_some() => self.same_jcc(old, new),
            FlowControl::ConditionalBranch => self.same_counter_jump(old, new),
            FlowControl::Call => self.same_call(old, new),
            FlowControl::IndirectCall => self.same_indirect_call(old, new),
            FlowControl::Interrupt | FlowControl::XbeginXabortXend => None,
        }
    }

    fn same_jcc(&self, old: &Instruction, new: &mut Cursor<'_>) -> Option<bool> {
        let destination = self.destination(old)?;
        let jcc = new.insn()?;
        let condition = jcc_condition(&jcc)?;
        let same = if Some(condition) == jcc_condition(old) {
            near_target(self.mode, &jcc)? == destination
        } else {
            // The opposite condition, around a jump.
            Some(condition.negated()) == jcc_condition(old)
                && new.jump()? == destination
                && near_target(self.mode, &jcc)? == new.here()
        };
        same.then_some(true)
    }

    fn same_counter_jump(&self, old: &Instruction, new: &mut Cursor<'_>) -> Option<bool> {
        let destination = self.destination(old)?;
        let counter_jump = new.insn()?;
        let not_taken = new.jump()?;
        let taken = new.here();
        let same = counter_jump.code() == old.code()
            && near_target(self.mode, &counter_jump)? == taken
            && new.jump()? == destination
            && not_taken == new.here();
        same.then_some(true)
    }

    fn same_call(&self, old: &Instruction, new: &mut Cursor<'_>) -> Option<bool> {
        let return_to = truncate(self.mode, Addr::new(old.next_ip()));
        let target = near_target(self.mode, old)?;
        if target == return_to {
            return (new.pushed_address()? == return_to).then_some(true);
        }
        if let Some(register) = self.options.pc_thunk.and_then(|pc_thunk| pc_thunk(target))
            && let Some(loaded) = new.clone().loaded_address()
        {
            new.insn()?;
            return (loaded == (register, return_to)).then_some(true);
        }
        let same = self.is_outside(return_to)
            && self.is_outside(target)
            && new.pushed_address()? == return_to
            && new.jump()? == target;
        same.then_some(false)
    }

    fn same_indirect_call(&self, old: &Instruction, new: &mut Cursor<'_>) -> Option<bool> {
        let return_to = truncate(self.mode, Addr::new(old.next_ip()));
        let pushed = new.pushed_address()?;
        let mut jump = new.insn()?;
        let is_the_calls_jump =
            matches!((old.code(), jump.code()), (Code::Call_rm32, Code::Jmp_rm32) | (Code::Call_rm64, Code::Jmp_rm64));
        jump.set_code(old.code());
        let registers = [old.op0_register(), old.memory_base(), old.memory_index()];
        let depends_on_the_push = registers.iter().any(|register| Gpr::of(*register) == Some(Gpr::SP));
        let same = is_the_calls_jump
            && jump == *old
            && !depends_on_the_push
            && pushed == return_to
            && self.is_outside(return_to);
        same.then_some(false)
    }

    /// Where the direct branch `old` has to lead from the stub.
    fn destination(&self, old: &Instruction) -> Option<Addr> {
        let target = near_target(self.mode, old)?;
        let Some(offset) = self.window_offset(target) else { return Some(target) };
        let (_, new) = self.relocated.boundaries.iter().find(|(old, _)| u64::from(*old) == offset)?;
        let is_forward = Some(offset) > self.window_offset(Addr::new(old.ip()));
        is_forward.then(|| truncate(self.mode, self.to.offset(i64::from(*new))))
    }

    fn is_outside(&self, addr: Addr) -> bool {
        self.window_offset(addr).is_none()
    }

    fn window_offset(&self, addr: Addr) -> Option<u64> {
        let offset = truncate(self.mode, Addr::new(addr.value().wrapping_sub(self.from.value()))).value();
        (offset < self.window.len() as u64).then_some(offset)
    }

    fn in_function(&self, offset: usize) -> Addr {
        truncate(self.mode, Addr::new(self.from.value().wrapping_add(offset as u64)))
    }
}

/// Reads a stub from one end to the other.
#[derive(Clone)]
struct Cursor<'a> {
    mode: Mode,
    stub: Addr,
    bytes: &'a [u8],
    offset: usize,
}

impl Cursor<'_> {
    fn here(&self) -> Addr {
        truncate(self.mode, Addr::new(self.stub.value().wrapping_add(self.offset as u64)))
    }

    fn is_at_end(&self) -> bool {
        self.offset == self.bytes.len()
    }

    fn insn(&mut self) -> Option<Instruction> {
        let insn = decode(self.mode, self.here(), self.bytes.get(self.offset..)?);
        self.offset += insn.len();
        (!insn.is_invalid()).then_some(insn)
    }

    /// The target of a direct jump, or of one through the eight bytes behind it.
    fn jump(&mut self) -> Option<Addr> {
        let insn = self.insn()?;
        match insn.code() {
            Code::Jmp_rel8_32 | Code::Jmp_rel8_64 | Code::Jmp_rel32_32 | Code::Jmp_rel32_64 => {
                near_target(self.mode, &insn)
            }
            Code::Jmp_rm64
                if insn.memory_base() == Register::RIP && insn.ip_rel_memory_address() == self.here().value() =>
            {
                let literal = self.bytes.get(self.offset..)?.first_chunk()?;
                self.offset += literal.len();
                Some(Addr::new(u64::from_le_bytes(*literal)))
            }
            _ => None,
        }
    }

    /// The constant that one or two instructions push.
    fn pushed_address(&mut self) -> Option<Addr> {
        let push = self.insn()?;
        match (push.code(), self.mode) {
            (Code::Pushd_imm32, Mode::Bits32) => Some(Addr::new(u64::from(push.immediate32()))),
            (Code::Pushq_imm32, Mode::Bits64) => {
                let sign_extended = push.immediate32to64().cast_unsigned();
                let mut behind = self.clone();
                let Some(upper_half) = behind.upper_half_stored() else { return Some(Addr::new(sign_extended)) };
                *self = behind;
                Some(Addr::new(sign_extended & u64::from(u32::MAX) | u64::from(upper_half) << 32))
            }
            _ => None,
        }
    }

    /// The constant in `mov dword ptr [rsp + 4], constant`.
    fn upper_half_stored(&mut self) -> Option<u32> {
        let mov = self.insn()?;
        let stores_upper_half = mov.code() == Code::Mov_rm32_imm32
            && mov.op0_kind() == OpKind::Memory
            && mov.memory_base() == Register::RSP
            && mov.memory_index() == Register::None
            && mov.memory_displacement64() == 4
            && mov.segment_prefix() == Register::None;
        stores_upper_half.then(|| mov.immediate32())
    }

    /// The register and the constant in `mov register, constant`.
    fn loaded_address(&mut self) -> Option<(Gpr, Addr)> {
        let mov = self.insn()?;
        let constant = match (mov.code(), self.mode) {
            (Code::Mov_r32_imm32, Mode::Bits32) => u64::from(mov.immediate32()),
            (Code::Mov_r64_imm64, Mode::Bits64) => mov.immediate64(),
            _ => return None,
        };
        Some((Gpr::of(mov.op0_register())?, Addr::new(constant)))
    }
}

/// The target of a direct near branch of the mode's width.
fn near_target(mode: Mode, insn: &Instruction) -> Option<Addr> {
    let is_near =
        matches!((insn.op0_kind(), mode), (OpKind::NearBranch32, Mode::Bits32) | (OpKind::NearBranch64, Mode::Bits64));
    is_near.then(|| truncate(mode, Addr::new(insn.near_branch_target())))
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use crate::insn::relocate;

    const FROM: Addr = Addr::new(0x40_1000);
    const NEAR: Addr = Addr::new(0x50_0000);
    const AFAR: Addr = Addr::new(0x7f00_0000_0000);

    fn is_thunk(target: Addr) -> Option<Gpr> {
        (target == FROM.offset(0x205)).then_some(Gpr::BX)
    }

    /// A window of every kind of instruction that is rewritten, and what it is rewritten to, near and far.
    fn stubs() -> Vec<(Mode, &'static [u8], Addr, Relocated)> {
        let options = RelocateOptions { pc_thunk: Some(&is_thunk) };
        let both: [&[u8]; 9] = [
            &[0x55, 0x89, 0xe5, 0x31, 0xc0],             // push, mov, xor
            &[0x74, 0x30, 0x0f, 0x88, 0, 1, 0, 0],       // je, js out of the window
            &[0x74, 0x02, 0x89, 0xc8, 0x89, 0xd1, 0x90], // je forward in the window
            &[0xe2, 0x30, 0xe3, 0x40, 0x90],             // loop, jcxz
            &[0xe8, 0, 1, 0, 0],                         // call
            &[0xe8, 0, 2, 0, 0],                         // call of a PC thunk
            &[0xe8, 0, 0, 0, 0, 0x58],                   // call of the next instruction
            &[0x89, 0xc8, 0x40, 0xff, 0x53, 0x10],       // call [bx + 16]
            &[0xe9, 0, 1, 0, 0],                         // jmp
        ];
        let only_64: [&[u8]; 2] = [
            &[0x48, 0x8b, 0x05, 0, 1, 0, 0], // mov rax, [rip + 0x100]
            &[0xff, 0x15, 0, 1, 0, 0],       // call [rip + 0x100]
        ];
        let near = both
            .into_iter()
            .flat_map(|code| [(Mode::Bits32, code, NEAR), (Mode::Bits64, code, NEAR)])
            .chain(only_64.map(|code| (Mode::Bits64, code, NEAR)));
        let far = both.map(|code| (Mode::Bits64, code, AFAR));
        near.chain(far)
            .map(|(mode, code, to)| (mode, code, to, relocate(mode, FROM, code, 5, to, &options).unwrap()))
            .collect()
    }

    fn verdict(mode: Mode, code: &[u8], to: Addr, relocated: &Relocated) -> Result<(), Addr> {
        check(mode, FROM, code, to, relocated, &RelocateOptions { pc_thunk: Some(&is_thunk) })
    }

    #[test]
    fn a_stub_with_any_bit_flipped_is_rejected() {
        for (mode, code, to, good) in stubs() {
            assert_eq!(verdict(mode, code, to, &good), Ok(()));
            for bit in 0..good.bytes.len() * 8 {
                let mut bad = good.clone();
                bad.bytes[bit / 8] ^= 1 << (bit % 8);
                // REX has bits that extend fields which not all instructions have. These do nothing.
                let is_rex = |stub: &Relocated| mode == Mode::Bits64 && stub.bytes[bit / 8] & 0xf0 == 0x40;
                assert!(
                    verdict(mode, code, to, &bad).is_err() || (is_rex(&good) && is_rex(&bad)),
                    "{mode:?} {code:02x?} to {to}: {:02x?} passes for {:02x?}",
                    bad.bytes,
                    good.bytes
                );
            }
        }
    }

    #[test]
    fn a_stub_that_is_cut_off_or_goes_on_is_rejected() {
        for (mode, code, to, good) in stubs() {
            for len_bytes in 0..good.bytes.len() {
                let mut bad = good.clone();
                bad.bytes.truncate(len_bytes);
                assert!(verdict(mode, code, to, &bad).is_err(), "{mode:?} {code:02x?} to {to}: {len_bytes} bytes pass");
            }
            let mut bad = good.clone();
            bad.bytes.push(0x90);
            assert!(verdict(mode, code, to, &bad).is_err());
        }
    }

    #[test]
    fn wrong_boundaries_are_rejected() {
        for (mode, code, to, good) in stubs() {
            for index in 0..good.boundaries.len() {
                let mut bad = good.clone();
                bad.boundaries[index].0 += 1;
                assert!(verdict(mode, code, to, &bad).is_err());
                let mut bad = good.clone();
                bad.boundaries[index].1 += 1;
                assert!(verdict(mode, code, to, &bad).is_err());
                let mut bad = good.clone();
                bad.boundaries.remove(index);
                assert!(verdict(mode, code, to, &bad).is_err());
            }
            let mut bad = good.clone();
            bad.boundaries.push((100, 100));
            assert!(verdict(mode, code, to, &bad).is_err());
        }
    }

    #[test]
    fn a_stub_for_another_place_or_function_is_rejected() {
        for (mode, code, to, good) in stubs() {
            let elsewhere =
                check(mode, FROM.offset(16), code, to, &good, &RelocateOptions { pc_thunk: Some(&is_thunk) });
            assert!(elsewhere.is_err(), "{mode:?} {code:02x?}");
            let mut other_code = code.to_vec();
            other_code[0] ^= 0x08;
            assert!(verdict(mode, &other_code, to, &good).is_err(), "{mode:?} {code:02x?}");
        }
    }
}
