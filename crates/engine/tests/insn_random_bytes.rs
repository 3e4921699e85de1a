//! What must hold for any bytes whatsoever, tried on random ones. The bodies are those of the fuzz targets.

#[path = "../../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "public where the file is a library")]
mod fuzz;

use proptest::{collection::vec, prelude::*};

/// Random bytes, and random bytes made of the opcodes that the code under test is about.
fn code() -> impl Strategy<Value = Vec<u8>> {
    let opcode: &[&[u8]] = &[
        &[0xe8],
        &[0xe9],
        &[0xeb],
        &[0x74],
        &[0x0f, 0x85],
        &[0xc3],
        &[0xc2],
        &[0x90],
        &[0x0f, 0x1f],
        &[0xff],
        &[0xe2],
        &[0xe3],
        &[0x66],
        &[0x67],
        &[0x48],
        &[0x8b, 0x05],
        &[0x89, 0xe5],
        &[0x55],
        &[0x5d],
        &[0x8d],
        &[0x00, 0x00, 0x00],
    ];
    let part = prop_oneof![prop::sample::select(opcode).prop_map(<[u8]>::to_vec), vec(any::<u8>(), 1..3)];
    prop_oneof![vec(any::<u8>(), 0..64), vec(part, 0..16).prop_map(|parts| parts.concat())]
}

/// Choices, two addresses, and code.
fn input() -> impl Strategy<Value = Vec<u8>> {
    (any::<[u8; 17]>(), code()).prop_map(|(head, code)| [&head[..], &code].concat())
}

proptest! {
    // No regression files: a failing case is printed, and becomes a test of its own.
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn effects_of_any_bytes(data in input()) {
        fuzz::effect(&data);
    }

    #[test]
    fn stubs_for_any_bytes(data in input()) {
        fuzz::relocate(&data);
    }

    #[test]
    fn clobbers_of_any_bytes(data in input()) {
        fuzz::clobbers(&data);
    }
}
