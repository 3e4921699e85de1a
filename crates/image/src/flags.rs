//! Whether arithmetic flags carry a value into a function.
//!
//! Owns [`live_at`]. Compilers never do that (psABI, "Registers": flags are not preserved across calls), assembly does. Neighbours: the
//! [ladder](crate::plan) asks, and such functions get an entry that keeps flags. Invariant: what is not known is alive.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};
use trapline_engine::Mode;

use crate::{
    marks::Text,
    scan::{branch_target, decoder},
};

const ARITHMETIC: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Instructions that are looked at, over all paths, before the answer is that nobody knows.
const MAX_INSNS: usize = 96;

/// Whether the code at `address` may read an arithmetic flag before it has written it.
pub(crate) fn live_at(text: &Text<'_>, mode: Mode, address: u64) -> bool {
    // Each path: where it goes on, and what was written on it.
    let mut paths = vec![(address, 0)];
    let mut seen: Vec<(u64, u32)> = Vec::new();
    let mut looked_at = 0;
    let mut insn = Instruction::default();
    while let Some((mut at, mut written)) = paths.pop() {
        loop {
            looked_at += 1;
            let code = text.from(at);
            if looked_at > MAX_INSNS || code.is_empty() {
                return true;
            }
            decoder(mode, at, code).decode_out(&mut insn);
            if insn.is_invalid() || insn.rflags_read() & ARITHMETIC & !written != 0 {
                return true;
            }
            if always_writes(&insn) {
                written |= insn.rflags_modified() & ARITHMETIC;
            }
            if written == ARITHMETIC {
                break;
            }
            match insn.flow_control() {
                FlowControl::Next | FlowControl::Interrupt => at = insn.next_ip(),
                FlowControl::Return | FlowControl::Call | FlowControl::IndirectCall | FlowControl::Exception => break,
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                    let Some(target) = branch_target(&insn) else { return true };
                    let is_new = !seen.contains(&(target, written));
                    if is_new {
                        seen.push((target, written));
                        paths.push((target, written));
                    }
                    if insn.flow_control() == FlowControl::UnconditionalBranch {
                        break;
                    }
                    at = insn.next_ip();
                }
                FlowControl::IndirectBranch | FlowControl::XbeginXabortXend => return true,
            }
        }
    }
    false
}

/// Whether the flags that an instruction may write are written for sure: a shift by nothing and a repetition of nothing write none.
fn always_writes(insn: &Instruction) -> bool {
    let shifts = matches!(
        insn.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Sal
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    let last = insn.op_count().saturating_sub(1);
    let by_register = insn.op_kind(last) == OpKind::Register && insn.op_register(last) == Register::CL;
    !(shifts && by_register || insn.is_string_instruction())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_live(code: &[u8]) -> bool {
        live_at(&Text::of_code(0x1000, code), Mode::Bits64, 0x1000)
    }

    #[test]
    fn flags_that_are_read_first_are_alive() {
        assert!(is_live(b"\x11\xf7\xc3"), "adc");
        assert!(is_live(b"\x89\xf8\x0f\x92\xc0\xc3"), "mov, setc");
        assert!(is_live(b"\x9c\x58\xc3"), "pushfq");
        assert!(is_live(b"\xff\xc7\x72\x01\xc3\xc3"), "inc writes all but the carry flag, jc reads it");
        assert!(is_live(b"\xeb\x01\xcc\x72\x00\xc3"), "behind a jump");
    }

    #[test]
    fn flags_that_are_written_first_or_never_read_are_dead() {
        assert!(!is_live(b"\x48\x83\xec\x08\x72\x01\xc3\xc3"), "sub, jc");
        assert!(!is_live(b"\x31\xc0\x0f\x92\xc0\xc3"), "xor, setc");
        assert!(!is_live(b"\x89\xf8\xc3"), "mov, ret");
        assert!(!is_live(b"\xe8\x00\x00\x00\x00\x0f\x92\xc0\xc3"), "whoever is called may lose them");
    }

    #[test]
    fn what_is_not_known_is_alive() {
        assert!(is_live(b"\xff\xe0"), "jmp rax");
        assert!(is_live(b"\x90"), "the code ends");
        assert!(is_live(b"\xd3\xe0\x72\x00\xc3"), "a shift by cl, perhaps by nothing");
        assert!(is_live(&[0x90; 200]), "too far away");
        assert!(!is_live(b"\xeb\xfe"), "a loop without end reads nothing");
    }
}
