//! What the bytes at a site allow.
//!
//! Owns the judgement of a site's code: which [`Needs`] it has, or why it cannot be used. Neighbours: [`super::place`] says
//! where the site is. Invariant: pure, and what is not recognised is refused with its bytes.

use trapline_engine::{
    Mode,
    insn::{CALL_BYTES, InsnBytes, MAX_INSN_BYTES, leading_nops},
};

use super::{Needs, SkipReason};

/// The most code that a judgement looks at, in bytes: nops short of a call, and one more instruction.
pub(super) const LOOK_BYTES: u64 = (CALL_BYTES - 1 + MAX_INSN_BYTES) as u64;

/// Length of `endbr32` and `endbr64`, in bytes.
pub(super) const ENDBR_BYTES: u8 = 4;

/// `jmp` over the next 9 bytes, with which every `XRay` entry sled begins.
const XRAY_JMP: [u8; 2] = [0xeb, 0x09];

/// What an `XRay` entry sled jumps over: one nop of this length, in bytes.
const XRAY_NOP_BYTES: usize = 9;

/// Whether `code` begins with the `endbr` of `mode` (SDM volume 2, "ENDBR32", "ENDBR64").
pub(super) fn begins_with_endbr(mode: Mode, code: &[u8]) -> bool {
    let last = match mode {
        Mode::Bits32 => 0xfb,
        Mode::Bits64 => 0xfa,
    };
    code.starts_with(&[0xf3, 0x0f, 0x1e, last])
}

/// Whether all of `code` does nothing: it is an `endbr` perhaps, and nops.
pub(super) fn does_nothing(mode: Mode, code: &[u8]) -> bool {
    let nops = if begins_with_endbr(mode, code) { &code[usize::from(ENDBR_BYTES)..] } else { code };
    leading_nops(mode, nops).sum::<usize>() == nops.len()
}

/// Judges `code`, which should begin with nops that the compiler left. Returns as well the bytes of the whole instructions
/// that a call put there would touch.
pub(super) fn judge_nops(mode: Mode, code: &[u8]) -> Result<(Needs, Vec<u8>), SkipReason> {
    let mut covered_bytes = 0;
    let mut first = None;
    for len_bytes in leading_nops(mode, code) {
        first.get_or_insert(len_bytes);
        covered_bytes += len_bytes;
        if covered_bytes >= CALL_BYTES {
            break;
        }
    }
    let needs = match first {
        None => return Err(SkipReason::UnexpectedBytes { found: excerpt(code) }),
        Some(_) if covered_bytes < CALL_BYTES => return Err(SkipReason::TooShort { len_bytes: covered_bytes }),
        Some(CALL_BYTES) => Needs::Nothing,
        Some(len_bytes) if len_bytes > CALL_BYTES => Needs::SplitNop,
        Some(_) => Needs::MergeNops,
    };
    Ok((needs, code[..covered_bytes].to_vec()))
}

/// Judges `code` at a place where `__fentry__` is called, or was, before the call was made a nop.
pub(super) fn judge_fentry(mode: Mode, code: &[u8]) -> Result<(Needs, Vec<u8>), SkipReason> {
    match code {
        // call rel32, the same with an address-size prefix (a relaxed indirect call), call *disp32.
        [0xe8, ..] | [0x67, 0xe8, ..] | [0xff, 0x15, ..] => Err(SkipReason::FentryCall { found: excerpt(code) }),
        _ => judge_nops(mode, code),
    }
}

/// Judges `code`, which should be an `XRay` entry sled.
pub(super) fn judge_sled(mode: Mode, code: &[u8]) -> Result<(Needs, Vec<u8>), SkipReason> {
    let nop = code.strip_prefix(&XRAY_JMP).and_then(|skipped| leading_nops(mode, skipped).next());
    match nop {
        Some(XRAY_NOP_BYTES) => Ok((Needs::XrayNormalise, code[..XRAY_JMP.len() + XRAY_NOP_BYTES].to_vec())),
        _ => Err(SkipReason::UnexpectedBytes { found: excerpt(code) }),
    }
}

/// As much of `code` as a report shows.
fn excerpt(code: &[u8]) -> InsnBytes {
    InsnBytes::new(&code[..code.len().min(MAX_INSN_BYTES)])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [Mode; 2] = [Mode::Bits32, Mode::Bits64];
    const NOP5: &[u8] = b"\x0f\x1f\x44\x00\x00";
    const NOP8: &[u8] = b"\x0f\x1f\x84\x00\x00\x02\x00\x00";
    const SLED: &[u8] = b"\xeb\x09\x66\x0f\x1f\x84\x00\x00\x02\x00\x00";

    #[test]
    fn what_a_site_needs_depends_on_its_instruction_boundaries() {
        for mode in MODES {
            let judged = |code: &[u8]| judge_nops(mode, &[code, b"\xc3\xcc"].concat());
            assert_eq!(judged(NOP5), Ok((Needs::Nothing, NOP5.to_vec())));
            assert_eq!(judged(NOP8), Ok((Needs::SplitNop, NOP8.to_vec())));
            assert_eq!(judged(b"\x90\x90\x90\x90\x90\x90\x90"), Ok((Needs::MergeNops, vec![0x90; 5])));
            assert_eq!(
                judged(b"\x66\x90\x66\x90\x66\x90\x66\x90"),
                Ok((Needs::MergeNops, b"\x66\x90\x66\x90\x66\x90".to_vec())),
                "whole instructions"
            );
            let nop4_nop8 = [b"\x0f\x1f\x40\x00", NOP8].concat();
            assert_eq!(judged(&nop4_nop8), Ok((Needs::MergeNops, nop4_nop8.clone())));
        }
    }

    #[test]
    fn too_few_nops_and_other_instructions_are_refused() {
        for mode in MODES {
            assert_eq!(judge_nops(mode, b"\x90\x90\xc3"), Err(SkipReason::TooShort { len_bytes: 2 }));
            assert_eq!(judge_nops(mode, &NOP8[..7]), unexpected(&NOP8[..7]), "cut off");
            assert_eq!(judge_nops(mode, b"\xcc\x90\x90\x90\x90"), unexpected(b"\xcc\x90\x90\x90\x90"));
            assert_eq!(judge_nops(mode, b""), unexpected(b""));
        }
    }

    #[test]
    fn fentry_is_a_nop_or_reported_as_the_call_it_is() {
        for mode in MODES {
            assert_eq!(judge_fentry(mode, NOP5), Ok((Needs::Nothing, NOP5.to_vec())));
            for call in [&b"\xe8\x01\x02\x03\x04"[..], b"\x67\xe8\x01\x02\x03\x04", b"\xff\x15\x01\x02\x03\x04"] {
                assert_eq!(judge_fentry(mode, call), Err(SkipReason::FentryCall { found: InsnBytes::new(call) }));
                assert_eq!(judge_nops(mode, call), unexpected(call), "only where a call is expected");
            }
        }
    }

    #[test]
    fn sleds_are_taken_only_as_the_compiler_left_them() {
        for mode in MODES {
            assert_eq!(judge_sled(mode, SLED), Ok((Needs::XrayNormalise, SLED.to_vec())));
            let patched = b"\x41\xba\x01\x00\x00\x00\xe8\x00\x00\x00\x00";
            assert_eq!(judge_sled(mode, patched), unexpected(patched));
            assert_eq!(judge_sled(mode, &SLED[..10]), unexpected(&SLED[..10]));
            assert_eq!(judge_sled(mode, NOP5), unexpected(NOP5));
        }
    }

    #[test]
    fn only_the_endbr_of_the_mode_counts_and_only_at_the_beginning() {
        let (endbr32, endbr64) = (b"\xf3\x0f\x1e\xfb", b"\xf3\x0f\x1e\xfa");
        assert!(begins_with_endbr(Mode::Bits32, endbr32) && !begins_with_endbr(Mode::Bits64, endbr32));
        assert!(begins_with_endbr(Mode::Bits64, endbr64) && !begins_with_endbr(Mode::Bits32, endbr64));
        assert!(does_nothing(Mode::Bits64, b"\xf3\x0f\x1e\xfa\x90\x66\x90"));
        assert!(does_nothing(Mode::Bits64, b""));
        assert!(!does_nothing(Mode::Bits64, b"\x90\xf3\x0f\x1e\xfa"));
        assert!(!does_nothing(Mode::Bits64, b"\xf3\x0f\x1e\xfa\x55"));
    }

    fn unexpected(found: &[u8]) -> Result<(Needs, Vec<u8>), SkipReason> {
        Err(SkipReason::UnexpectedBytes { found: InsnBytes::new(found) })
    }
}
