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
