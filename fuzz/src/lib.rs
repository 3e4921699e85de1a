//! What must hold for any bytes whatsoever, as functions that take bytes and panic.
//!
//! The fuzz targets call these with the fuzzer's inputs; the engine's test `insn_random_bytes` includes this file and
//! calls them with random ones, so that they are compiled and run where there is no fuzzer.

use trapline_engine::{
    Addr, Mode,
    insn::{
        CALL_BYTES, Clobbers, Effect, Gpr, MAX_INSN_BYTES, NotEmulatedReason, OutOfReach, RegSet, RelocateOptions,
        RelocateReason, call, clobbers as analyse, jmp, leading_nops, max_relocated_bytes, relocate as relocate_window,
    },
};

/// Code, and where it stands.
struct Input<'a> {
    mode: Mode,
    at: Addr,
    /// Another address, often within the reach of a jump.
    other: Addr,
    /// A number below 32.
    number: usize,
    code: &'a [u8],
}

impl<'a> Input<'a> {
    /// One byte of choices, two addresses, and code.
    fn read(data: &'a [u8]) -> Option<Self> {
        let (choices, rest) = data.split_first()?;
        let (at, rest) = rest.split_first_chunk()?;
        let (other, code) = rest.split_first_chunk::<8>()?;
        let mode = if choices & 1 == 0 { Mode::Bits64 } else { Mode::Bits32 };
        let at = u64::from_le_bytes(*at);
        let distance = i32::from_le_bytes(*other.first_chunk()?);
        let near = at.wrapping_add_signed(i64::from(distance));
        let far = u64::from_le_bytes(*other);
        let is_near = choices & 2 == 0;
        Some(Self {
            mode,
            at: narrowed(mode, at),
            other: narrowed(mode, if is_near { near } else { far }),
            number: usize::from(choices >> 3),
            code,
        })
    }
}

fn narrowed(mode: Mode, address: u64) -> Addr {
    Addr::new(if mode == Mode::Bits32 { address & u64::from(u32::MAX) } else { address })
}

/// An effect is that of the whole instruction and nothing but it; and trapline's own instructions have the effect they
/// were made for.
pub fn effect(data: &[u8]) {
    let Some(Input { mode, at, other, code, .. }) = Input::read(data) else { return };
    let end = |len_bytes: usize| narrowed(mode, at.value().wrapping_add(len_bytes as u64));
    match Effect::decode(mode, at, code) {
        Ok(effect) => {
            assert!(code.len() <= MAX_INSN_BYTES);
            let (next, targets) = match effect {
                Effect::Nop { next } => (Some(next), None),
                Effect::Call { target, return_to } => (Some(return_to), Some(target)),
                Effect::Jmp { target } => (None, Some(target)),
                Effect::Jcc { taken, next, .. } => (Some(next), Some(taken)),
                Effect::Ret { .. } => (None, None),
            };
            assert!(next.is_none_or(|next| next == end(code.len())), "{effect:?}");
            assert!(targets.is_none_or(|target| target == narrowed(mode, target.value())), "{effect:?}");

            let longer = Effect::decode(mode, at, &[code, &[0x90]].concat()).expect_err("two instructions");
            assert_eq!(longer.reason, NotEmulatedReason::TrailingBytes);
            let shorter = Effect::decode(mode, at, &code[..code.len() - 1]).expect_err("a part of an instruction");
            assert_eq!(shorter.reason, NotEmulatedReason::Undecodable);
        }
        Err(error) => {
            assert_eq!(error.at, at);
            assert!(code.starts_with(&error.bytes));
        }
    }
    assert!(leading_nops(mode, code).sum::<usize>() <= code.len());

    let out_of_reach = Err(OutOfReach { from: at, to: other });
    match call(at, other, mode) {
        Ok(bytes) => {
            let expected = Effect::Call { target: other, return_to: end(CALL_BYTES) };
            assert_eq!(Effect::decode(mode, at, &bytes), Ok(expected));
        }
        error => assert_eq!(error, out_of_reach),
    }
    match jmp(at, other, mode) {
        Ok(bytes) => assert_eq!(Effect::decode(mode, at, &bytes), Ok(Effect::Jmp { target: other })),
        error => assert_eq!(error, out_of_reach),
    }
}

/// A window is moved whole, into the room that was promised, to a stub that passes the check; or the instruction in the
/// way is named.
pub fn relocate(data: &[u8]) {
    let Some(Input { mode, at: from, other: to, number: min_bytes, code }) = Input::read(data) else { return };
    // One call in two is of a thunk, so that both ways are taken.
    let is_thunk =
        |target: Addr| (target.value() & 2 == 0).then(|| Gpr::new(target.value().to_le_bytes()[0] & 0xf)).flatten();
    let options = RelocateOptions { pc_thunk: (min_bytes & 1 == 0).then_some(&is_thunk) };
    match relocate_window(mode, from, code, min_bytes, to, &options) {
        Ok(stub) => {
            assert!((min_bytes..min_bytes + MAX_INSN_BYTES).contains(&stub.consumed_bytes));
            assert!(stub.bytes.len() <= max_relocated_bytes(min_bytes));
            assert!(stub.boundaries.is_sorted());
            assert_eq!(stub.boundaries.first(), Some(&(0, 0)));
            let (last_old, last_new) = stub.boundaries[stub.boundaries.len() - 1];
            assert!(last_old as usize <= stub.consumed_bytes && (last_new as usize) < stub.bytes.len());
            // What lies behind the window is not looked at.
            let again = relocate_window(mode, from, &code[..stub.consumed_bytes], min_bytes, to, &options);
            assert_eq!(again.as_ref(), Ok(&stub));
        }
        Err(error) => {
            assert_ne!(error.reason, RelocateReason::CheckFailed, "{error}");
            let offset = narrowed(mode, error.at.value().wrapping_sub(from.value())).value();
            assert!(offset <= code.len() as u64, "{error}");
        }
    }
}

/// The analysis ends, and does not depend on memory that it did not need.
pub fn clobbers(data: &[u8]) {
    let Some(Input { mode, at, number, code, .. }) = Input::read(data) else { return };
    let entry = narrowed(mode, at.value().wrapping_add(number as u64));
    let mut reads = 0;
    let mut analyse_first = |len_bytes: usize| {
        analyse(mode, entry, &mut |from, buffer| {
            reads += 1;
            let offset = narrowed(mode, from.value().wrapping_sub(at.value())).value();
            let readable =
                usize::try_from(offset).ok().and_then(|offset| code[..len_bytes].get(offset..)).unwrap_or(&[]);
            let len_bytes = readable.len().min(buffer.len());
            buffer[..len_bytes].copy_from_slice(&readable[..len_bytes]);
            len_bytes
        })
    };
    let of_all = analyse_first(code.len());
    let of_half = analyse_first(code.len() / 2);
    assert!(of_half == Clobbers::EVERYTHING || of_half == of_all);
    assert!(of_all == Clobbers::EVERYTHING || mode == Mode::Bits64 || of_all.general.bits() < 1 << 8);
    assert!((of_all.caller_saved(mode) - RegSet::caller_saved(mode)).is_empty());
    // 256 instructions, and a few more looks at each of those where paths with different frames meet.
    assert!(reads <= 2 * 256 * 17, "{reads} reads");
}
