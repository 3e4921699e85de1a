//! The beginning of a single function, where the ladder's plans are more than what is needed: no file is scanned.
//!
//! Owns [`entry_window`]. Invariant: what it offers can be moved, and nothing in the function jumps between its instructions.

use iced_x86::{Decoder, DecoderOptions, FlowControl};
use trapline_engine::Mode;

/// How many bytes of whole instructions stand at the beginning of a function, at least `min_bytes`. `code` is all of the function. `None` if one
/// of them does not simply go on to the next, if the function has branches between them, or is not understood.
pub fn entry_window(mode: Mode, code: &[u8], address: u64, min_bytes: usize) -> Option<usize> {
    let mut len_bytes = 0;
    let mut targets = Vec::new();
    for insn in Decoder::with_ip(mode.bitness(), code, address, DecoderOptions::NONE) {
        if insn.is_invalid() {
            return None;
        }
        match insn.flow_control() {
            FlowControl::Next => {}
            _ if len_bytes < min_bytes => return None,
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call => {
                targets.push(insn.near_branch_target());
            }
            FlowControl::IndirectBranch => return None,
            _ => {}
        }
        if len_bytes < min_bytes {
            len_bytes += insn.len();
        }
    }
    let is_inside = |target: &u64| (address + 1..address + len_bytes as u64).contains(target);
    (len_bytes >= min_bytes && !targets.iter().any(is_inside)).then_some(len_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_instructions_are_taken_and_no_branches() {
        // mov rax, rdi; mov rdi, rsi; syscall; jae +2; ret
        let code = [0x48, 0x89, 0xf8, 0x48, 0x89, 0xf7, 0x0f, 0x05, 0x73, 0x00, 0xc3];
        assert_eq!(entry_window(Mode::Bits64, &code, 0x1000, 5), Some(6));
        assert_eq!(entry_window(Mode::Bits64, &code, 0x1000, 9), None, "a branch");
        assert_eq!(entry_window(Mode::Bits64, &code[..4], 0x1000, 5), None, "half an instruction");
        assert_eq!(entry_window(Mode::Bits64, &[], 0x1000, 5), None);
    }

    #[test]
    fn a_branch_back_between_the_instructions_is_seen() {
        // mov rax, rdi; mov rdi, rsi; jmp to the second; the same to the first
        let back = |to: i8| [&[0x48, 0x89, 0xf8, 0x48, 0x89, 0xf7, 0xeb][..], &[(to - 8).cast_unsigned()]].concat();
        assert_eq!(entry_window(Mode::Bits64, &back(3), 0x1000, 5), None);
        assert_eq!(entry_window(Mode::Bits64, &back(0), 0x1000, 5), Some(6));
    }
}
