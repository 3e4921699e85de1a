//! What the int3 handler is told to emulate: read from bytes, and held against the encoder and the CPU.

use proptest::prelude::*;
use trapline_engine::{
    Addr, Mode,
    insn::{CALL_BYTES, Condition, Effect, MAX_INSN_BYTES, NotEmulatedReason, OutOfReach, call, jmp, nop},
};

const BOTH: [Mode; 2] = [Mode::Bits32, Mode::Bits64];

/// Where the instructions of this file stand. Below 4 GiB, so that both modes may have it.
const AT: Addr = Addr::new(0x0804_8000);

fn effect(mode: Mode, bytes: &[u8]) -> Effect {
    Effect::decode(mode, AT, bytes).unwrap_or_else(|error| panic!("{mode:?}: {error}"))
}

fn refusal(mode: Mode, bytes: &[u8]) -> NotEmulatedReason {
    let error = Effect::decode(mode, AT, bytes).expect_err("accepted");
    assert_eq!(error.at, AT);
    assert_eq!(*error.bytes, bytes[..bytes.len().min(MAX_INSN_BYTES)]);
    error.reason
}

#[test]
fn nops_go_on_at_the_next_instruction() {
    for mode in BOTH {
        for len_bytes in 1..=MAX_INSN_BYTES {
            let next = AT.offset(i64::try_from(len_bytes).unwrap());
            assert_eq!(effect(mode, &nop(len_bytes)), Effect::Nop { next });
        }
    }
}

#[test]
fn other_assemblers_nops_are_known() {
    let both: [&[u8]; 4] = [
        &[0x66, 0x66, 0x66, 0x90],
        &[0x0f, 0x1f, 0x44, 0x00, 0x08],
        &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
        &[0x0f, 0x1f, 0xc0],
    ];
    // lea 0(%esi),%esi; lea 0(%esi,%eiz),%esi; lea 0(%edi),%edi with a long displacement; mov %edi,%edi both ways.
    let only_32: [&[u8]; 5] =
        [&[0x8d, 0x76, 0], &[0x8d, 0x74, 0x26, 0], &[0x8d, 0xbf, 0, 0, 0, 0], &[0x89, 0xff], &[0x8b, 0xff]];
    let only_64: [&[u8]; 3] = [&[0x48, 0x90], &[0x48, 0x8d, 0x76, 0], &[0x48, 0x89, 0xff]];
    let cases = [(&both[..], &BOTH[..]), (&only_32, &[Mode::Bits32]), (&only_64, &[Mode::Bits64])];
    for (nops, modes) in cases {
        for (bytes, mode) in nops.iter().flat_map(|bytes| modes.iter().map(move |mode| (bytes, *mode))) {
            let next = AT.offset(i64::try_from(bytes.len()).unwrap());
            assert_eq!(effect(mode, bytes), Effect::Nop { next }, "{bytes:02x?}");
        }
    }
}

#[test]
fn what_only_looks_like_a_nop_is_refused() {
    let both: [&[u8]; 7] = [
        &[0xf3, 0x90],             // pause
        &[0xf3, 0x0f, 0x1e, 0xfa], // endbr64
        &[0xf3, 0x0f, 0x1e, 0xfb], // endbr32
        &[0x0f, 0x1e, 0xc0],       // reserved nops
        &[0x0f, 0x1f, 0xc8],
        &[0x0f, 0x18, 0x00], // a prefetch
        &[0x66, 0x89, 0xff], // mov %di,%di: does nothing, but nobody emits it
    ];
    let only_64: [&[u8]; 4] = [
        &[0x41, 0x90],             // xchg %r8,%rax
        &[0x89, 0xff],             // mov %edi,%edi clears the upper half
        &[0x8d, 0x76, 0],          // lea 0(%rsi),%esi likewise
        &[0x67, 0x48, 0x8d, 0x36], // lea (%esi),%rsi likewise
    ];
    let only_32: [&[u8]; 3] = [
        &[0x8d, 0x76, 1],    // lea 1(%esi),%esi
        &[0x8d, 0x34, 0x36], // lea (%esi,%esi),%esi
        &[0x67, 0x8d, 0x34], // lea (%si),%esi
    ];
    for (mode, bytes) in BOTH
        .into_iter()
        .flat_map(|mode| both.into_iter().map(move |bytes| (mode, bytes)))
        .chain(only_64.into_iter().map(|bytes| (Mode::Bits64, bytes)))
        .chain(only_32.into_iter().map(|bytes| (Mode::Bits32, bytes)))
    {
        assert_eq!(refusal(mode, bytes), NotEmulatedReason::Other, "{mode:?} {bytes:02x?}");
    }
}

#[test]
fn branches_and_returns_are_known_in_all_their_forms() {
    for mode in BOTH {
        let to = |distance| AT.offset(distance);
        for (bytes, expected) in [
            (&[0xe8, 0x10, 0, 0, 0][..], Effect::Call { target: to(0x15), return_to: to(5) }),
            // addr32 call, as linkers relax `call *foo@GOTPCREL(%rip)`.
            (&[0x67, 0xe8, 0x10, 0, 0, 0], Effect::Call { target: to(0x16), return_to: to(6) }),
            (&[0xe9, 0xf0, 0xff, 0xff, 0xff], Effect::Jmp { target: to(-0xb) }),
            (&[0xeb, 0x09], Effect::Jmp { target: to(0xb) }),
            (&[0xc3], Effect::Ret { pop_bytes: 0 }),
            (&[0xf3, 0xc3], Effect::Ret { pop_bytes: 0 }),
            (&[0xc2, 0x0c, 0x80], Effect::Ret { pop_bytes: 0x800c }),
        ] {
            assert_eq!(effect(mode, bytes), expected, "{mode:?} {bytes:02x?}");
        }
        for condition in Condition::ALL {
            let short = effect(mode, &[0x70 | condition.encoding(), 0xfe]);
            assert_eq!(short, Effect::Jcc { condition, taken: AT, next: to(2) });
            let long = effect(mode, &[0x0f, 0x80 | condition.encoding(), 0, 1, 0, 0]);
            assert_eq!(long, Effect::Jcc { condition, taken: to(0x106), next: to(6) });
            let hinted = effect(mode, &[0x3e, 0x70 | condition.encoding(), 0x7f]);
            assert_eq!(hinted, Effect::Jcc { condition, taken: to(0x82), next: to(3) });
        }
    }
}

#[test]
fn everything_else_is_refused() {
    let cases: [(&[u8], NotEmulatedReason); 18] = [
        (&[], NotEmulatedReason::Undecodable),
        (&[0xe8, 0, 0, 0], NotEmulatedReason::Undecodable),
        (&[0x0f, 0x04], NotEmulatedReason::Undecodable),
        (&[0xf0, 0x90], NotEmulatedReason::Undecodable),
        (&[0x66; 16], NotEmulatedReason::Undecodable),
        (&[0x90, 0x90], NotEmulatedReason::TrailingBytes),
        (&[0x90; 20], NotEmulatedReason::TrailingBytes),
        (&[0xe8, 0, 0, 0, 0, 0], NotEmulatedReason::TrailingBytes),
        (&[0xcc], NotEmulatedReason::Other),
        (&[0xff, 0xd0], NotEmulatedReason::Other), // call through a register
        (&[0xff, 0x25, 0, 0, 0, 0], NotEmulatedReason::Other), // jmp through memory
        (&[0xe2, 0xfe], NotEmulatedReason::Other), // loop
        (&[0xe3, 0xfe], NotEmulatedReason::Other), // jcxz
        (&[0xcb], NotEmulatedReason::Other),       // far return
        (&[0xcf], NotEmulatedReason::Other),       // return from interrupt
        (&[0x66, 0xc3], NotEmulatedReason::Other), // 16-bit return
        (&[0x66, 0xe9, 0, 0], NotEmulatedReason::Other), // 16-bit jump, or the start of a longer one
        (&[0x48, 0x8b, 0x05, 0, 0, 0, 0], NotEmulatedReason::Other), // a load, in 64-bit code
    ];
    for (bytes, expected) in cases {
        assert_eq!(refusal(Mode::Bits64, bytes), expected, "{bytes:02x?}");
    }
    assert_eq!(refusal(Mode::Bits32, &[0x9a, 0, 0, 0, 0, 0x33, 0]), NotEmulatedReason::Other);
    let text = Effect::decode(Mode::Bits64, AT, &[0xcc]).unwrap_err().to_string();
    assert_eq!(text, "code at 0x8048000 cannot be emulated: cc is neither nop, direct branch nor near return");
}

#[test]
fn addresses_wrap_at_4_gib_in_32_bit_mode_only() {
    let at = Addr::new(0xffff_fffe);
    let jcc = [0x74, 0x10];
    let expect =
        |taken, next| Ok(Effect::Jcc { condition: Condition::Equal, taken: Addr::new(taken), next: Addr::new(next) });
    assert_eq!(Effect::decode(Mode::Bits32, at, &jcc), expect(0x10, 0));
    assert_eq!(Effect::decode(Mode::Bits64, at, &jcc), expect(0x1_0000_0010, 0x1_0000_0000));
}

#[test]
fn conditions_come_in_opposite_pairs_by_encoding() {
    for (encoding, condition) in Condition::ALL.into_iter().enumerate() {
        assert_eq!(usize::from(condition.encoding()), encoding);
        assert_eq!(condition.negated().negated(), condition);
        for flags in 0..=0xfff {
            assert_ne!(condition.holds(flags), condition.negated().holds(flags), "{condition:?} {flags:#x}");
        }
    }
}

/// The bits of the flags register that conditions look at, and AF beside them.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
const STATUS_FLAGS: [u64; 6] = [1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11];

/// The result of the sixteen `setcc` instructions under `flags`, by encoding.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn setcc_on_this_cpu(flags: usize) -> [bool; 16] {
    #[cfg(target_arch = "x86")]
    macro_rules! pop_flags {
        () => {
            "popfd"
        };
    }
    #[cfg(target_arch = "x86_64")]
    macro_rules! pop_flags {
        () => {
            "popfq"
        };
    }
    macro_rules! setcc {
        ($($suffix:literal)*) => {
            [$({
                let holds: u8;
                // SAFETY: flags get a value that has only status bits set, the stack is left as it was, and the
                // compiler is told of the one register written.
                unsafe {
                    core::arch::asm!(
                        "push {flags}", pop_flags!(), concat!("set", $suffix, " {holds}"),
                        flags = in(reg) flags, holds = out(reg_byte) holds,
                    );
                }
                holds == 1
            }),*]
        };
    }
    setcc!("o" "no" "b" "ae" "e" "ne" "be" "a" "s" "ns" "p" "np" "l" "ge" "le" "g")
}

#[test]
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn conditions_hold_exactly_when_the_cpu_says_so() {
    for subset in 0..1 << STATUS_FLAGS.len() {
        let flags: u64 =
            STATUS_FLAGS.iter().enumerate().filter(|(bit, _)| subset & 1 << bit != 0).map(|(_, flag)| flag).sum();
        let expected = setcc_on_this_cpu(usize::try_from(flags).unwrap());
        for condition in Condition::ALL {
            let holds = condition.holds(flags | 0x202);
            assert_eq!(holds, expected[usize::from(condition.encoding())], "{condition:?} under {flags:#x}");
        }
    }
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Bits32), Just(Mode::Bits64)]
}

/// A pair of addresses, near to each other more often than not.
fn two_addresses() -> impl Strategy<Value = (u64, u64)> {
    let near = (any::<u64>(), any::<i32>()).prop_map(|(at, distance)| (at, at.wrapping_add_signed(distance.into())));
    let around_the_edge = (any::<u64>(), -8_i64..8, any::<bool>()).prop_map(|(at, offset, up)| {
        let edge = if up { 1 << 31 } else { -(1 << 31) };
        (at, at.wrapping_add_signed(edge + 5 + offset))
    });
    prop_oneof![near, around_the_edge, any::<(u64, u64)>()]
}

fn narrowed(mode: Mode, address: u64) -> Addr {
    Addr::new(if mode == Mode::Bits32 { address & 0xffff_ffff } else { address })
}

/// No regression files: a failing case is printed, and becomes a test of its own.
fn quiet() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(quiet())]

    #[test]
    fn calls_and_jumps_lead_where_they_were_told_to(mode in modes(), (at, target) in two_addresses()) {
        let (at, target) = (narrowed(mode, at), narrowed(mode, target));
        let distance = target.value().wrapping_sub(at.value().wrapping_add(5)).cast_signed();
        let reachable = mode == Mode::Bits32 || i32::try_from(distance).is_ok();
        match (call(at, target, mode), jmp(at, target, mode)) {
            (Ok(call), Ok(jmp)) => {
                prop_assert!(reachable);
                prop_assert_eq!((call.len(), jmp.len()), (CALL_BYTES, CALL_BYTES));
                let return_to = narrowed(mode, at.value().wrapping_add(5));
                prop_assert_eq!(Effect::decode(mode, at, &call), Ok(Effect::Call { target, return_to }));
                prop_assert_eq!(Effect::decode(mode, at, &jmp), Ok(Effect::Jmp { target }));
            }
            (call, jmp) => {
                prop_assert!(!reachable);
                prop_assert_eq!(call, Err(OutOfReach { from: at, to: target }));
                prop_assert_eq!(jmp, Err(OutOfReach { from: at, to: target }));
            }
        }
    }

    #[test]
    fn nops_lead_behind_themselves_wherever_they_stand(mode in modes(), at: u64, len_bytes in 1..=MAX_INSN_BYTES) {
        let at = narrowed(mode, at);
        let next = narrowed(mode, at.value().wrapping_add(len_bytes as u64));
        prop_assert_eq!(Effect::decode(mode, at, &nop(len_bytes)), Ok(Effect::Nop { next }));
    }
}
