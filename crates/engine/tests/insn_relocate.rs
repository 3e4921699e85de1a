//! Windows and the stubs that they become, byte by byte; and the windows that are refused.

use trapline_engine::{
    Addr, Mode,
    insn::{Gpr, RelocateError, RelocateOptions, RelocateReason, Relocated, max_relocated_bytes, pc_thunk, relocate},
};

const BOTH: [Mode; 2] = [Mode::Bits32, Mode::Bits64];

const FROM: Addr = Addr::new(0x40_1000);
const TO: Addr = Addr::new(0x50_0000);
/// Out of the reach of `rel32` from [`FROM`].
const AFAR: Addr = Addr::new(0x7f00_0000_0000);

fn relocated_to(mode: Mode, code: &[u8], min_bytes: usize, to: Addr) -> Relocated {
    relocate(mode, FROM, code, min_bytes, to, &RelocateOptions::default())
        .unwrap_or_else(|error| panic!("{mode:?} {code:02x?}: {error}"))
}

fn relocated(mode: Mode, code: &[u8]) -> Relocated {
    relocated_to(mode, code, 5, TO)
}

/// The reason, and the offset in the window of the instruction that it is about.
fn refusal(mode: Mode, code: &[u8]) -> (RelocateReason, i64) {
    let RelocateError { at, reason } =
        relocate(mode, FROM, code, 5, TO, &RelocateOptions::default()).expect_err("relocated");
    (reason, at.distance_from(FROM))
}

/// `jmp` from a place in the stub to a place in the function.
fn jmp_back(stub_offset: i64, window_offset: i64) -> Vec<u8> {
    let displacement = FROM.offset(window_offset).distance_from(TO.offset(stub_offset + 5));
    [&[0xe9][..], &i32::try_from(displacement).unwrap().to_le_bytes()].concat()
}

#[test]
fn position_independent_instructions_are_copied_and_a_jump_back_is_added() {
    // push bp; mov bp, sp; sub sp, 16; and more that is not needed
    let code_32 = [0x55, 0x89, 0xe5, 0x83, 0xec, 0x10, 0x90, 0xc3];
    let stub = relocated(Mode::Bits32, &code_32);
    assert_eq!(stub.bytes, [&code_32[..6], &jmp_back(6, 6)].concat());
    assert_eq!(stub.consumed_bytes, 6);
    assert_eq!(stub.boundaries, [(0, 0), (1, 1), (3, 3), (6, 6)]);
    assert!(!stub.emulates_call);

    let code_64 = [0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10];
    let stub = relocated(Mode::Bits64, &code_64);
    assert_eq!(stub.bytes, [&code_64[..], &jmp_back(8, 8)].concat());
    assert_eq!(stub.boundaries, [(0, 0), (1, 1), (4, 4), (8, 8)]);
}

#[test]
fn prefixes_that_mean_nothing_are_copied_too() {
    // cs data16 nopw: as assemblers pad
    let code = [0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
    for mode in BOTH {
        assert_eq!(relocated(mode, &code).bytes[..10], code);
    }
}

#[test]
fn a_window_grows_to_whole_instructions() {
    let code = [&[0x90; 4][..], &[0xb8, 1, 2, 3, 4], &[0xc3]].concat();
    for mode in BOTH {
        assert_eq!(relocated_to(mode, &code, 4, TO).consumed_bytes, 4);
        assert_eq!(relocated_to(mode, &code, 5, TO).consumed_bytes, 9);
        assert_eq!(relocated_to(mode, &code, 0, TO).consumed_bytes, 0);
        assert_eq!(relocated_to(mode, &code, 10, TO).consumed_bytes, 10);
    }
}

#[test]
fn rip_relative_operands_keep_their_address() {
    // mov rax, [rip + 0x100]; cmp dword [rip + 0x200], 7
    let code = [0x48, 0x8b, 0x05, 0, 1, 0, 0, 0x83, 0x3d, 0, 2, 0, 0, 7];
    let stub = relocated_to(Mode::Bits64, &code, 14, TO);
    let moved = |displacement| i32::try_from(FROM.distance_from(TO) + displacement).unwrap().to_le_bytes();
    let expected =
        [&[0x48, 0x8b, 0x05][..], &moved(0x100), &[0x83, 0x3d], &moved(0x200), &[7], &jmp_back(14, 14)].concat();
    assert_eq!(stub.bytes, expected);

    let beyond = relocate(Mode::Bits64, FROM, &code, 14, AFAR, &RelocateOptions::default());
    assert_eq!(beyond, Err(RelocateError { at: FROM, reason: RelocateReason::OperandOutOfReach }));
    // In 32-bit code the same bytes are an absolute address.
    assert_eq!(relocated(Mode::Bits32, &[0x8b, 0x05, 0, 1, 0, 0]).bytes[..6], [0x8b, 0x05, 0, 1, 0, 0]);
}

#[test]
fn an_operand_that_is_in_the_window_itself_stays_there() {
    // lea rax, [rip - 7]: the function's own address
    let stub = relocated(Mode::Bits64, &[0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff]);
    let displacement = i32::try_from(FROM.distance_from(TO.offset(7))).unwrap().to_le_bytes();
    assert_eq!(stub.bytes[..7], [&[0x48, 0x8d, 0x05][..], &displacement].concat());
}

#[test]
fn branches_out_of_the_window_are_widened() {
    // je +0x10; jmp +0x20 (ends the window)
    let code = [0x74, 0x10, 0x90, 0xeb, 0x20];
    for mode in BOTH {
        let stub = relocated(mode, &code);
        let je = i32::try_from(FROM.offset(0x12).distance_from(TO.offset(6))).unwrap().to_le_bytes();
        assert_eq!(stub.bytes, [&[0x0f, 0x84][..], &je, &[0x90], &jmp_back(7, 0x25)].concat());
        assert_eq!(stub.boundaries, [(0, 0), (2, 6), (3, 7)], "there is no way back");
    }
}

#[test]
fn branches_out_of_reach_take_the_long_way() {
    let stub = relocated_to(Mode::Bits64, &[0x74, 0x10, 0x90, 0x90, 0x90], 5, AFAR);
    let far_jump = |to: Addr| [&[0xff, 0x25, 0, 0, 0, 0][..], &to.value().to_le_bytes()].concat();
    let expected = [&[0x75, 14][..], &far_jump(FROM.offset(0x12)), &[0x90; 3], &far_jump(FROM.offset(5))].concat();
    assert_eq!(stub.bytes, expected);
    assert_eq!(stub.boundaries, [(0, 0), (2, 16), (3, 17), (4, 18), (5, 19)]);

    // In 32-bit code nothing is out of reach.
    let wrapped = relocated_to(Mode::Bits32, &[0x90; 5], 5, Addr::new(0xffff_fff0));
    assert_eq!(wrapped.bytes[5..], [0xe9, 0x0b, 0x10, 0x40, 0]);
}

#[test]
fn branches_within_the_window_follow_it() {
    // je 1f; ja 1f (long); 1: mov eax, 5
    let code = [0x74, 0x06, 0x0f, 0x87, 0, 0, 0, 0, 0xb8, 5, 0, 0, 0];
    for mode in BOTH {
        let stub = relocated_to(mode, &code, 13, TO);
        let expected =
            [&[0x0f, 0x84, 6, 0, 0, 0, 0x0f, 0x87, 0, 0, 0, 0, 0xb8, 5, 0, 0, 0][..], &jmp_back(17, 13)].concat();
        assert_eq!(stub.bytes, expected);
        // With the smaller window the target is outside.
        let stub = relocated_to(mode, &code, 8, TO);
        assert_eq!(stub.bytes[..2], [0x0f, 0x84]);
        assert_eq!(stub.bytes[12..], jmp_back(12, 8));
    }
}

#[test]
fn branches_without_a_long_form_jump_around_a_jump() {
    // addr-size jcxz +0x20; nop...
    let code = [0x67, 0xe3, 0x20, 0x90, 0x90];
    for mode in BOTH {
        let stub = relocated(mode, &code);
        let expected = [&[0x67, 0xe3, 2, 0xeb, 5][..], &jmp_back(5, 0x23), &[0x90, 0x90], &jmp_back(12, 5)].concat();
        assert_eq!(stub.bytes, expected);
    }
}

#[test]
fn calls_push_the_address_in_the_function() {
    // push bx; call +0x100
    let code = [0x53, 0xe8, 0, 1, 0, 0];
    for mode in BOTH {
        let stub = relocated(mode, &code);
        let return_to = 0x40_1006_u32.to_le_bytes();
        assert_eq!(stub.bytes, [&[0x53, 0x68][..], &return_to, &jmp_back(6, 0x106)].concat());
        assert_eq!((stub.consumed_bytes, stub.emulates_call), (6, true));
        assert_eq!(stub.boundaries, [(0, 0), (1, 1)], "the callee returns to the function");
    }
}

#[test]
fn return_addresses_of_any_size_are_pushed() {
    let call = [0xe8, 0, 1, 0, 0];
    for (from, expected) in [
        (0x7fff_fff0, vec![0x68, 0xf5, 0xff, 0xff, 0x7f]),
        // Sign-extended, `push imm32` would fill the upper half with ones.
        (0x7fff_fffb, vec![0x68, 0, 0, 0, 0x80, 0xc7, 0x44, 0x24, 4, 0, 0, 0, 0]),
        (0x5555_1234_5000, vec![0x68, 0x05, 0x50, 0x34, 0x12, 0xc7, 0x44, 0x24, 4, 0x55, 0x55, 0, 0]),
        (0xffff_ffff_8100_0000, vec![0x68, 5, 0, 0, 0x81]),
    ] {
        let from = Addr::new(from);
        let stub = relocate(Mode::Bits64, from, &call, 5, from.offset(0x10_0000), &RelocateOptions::default()).unwrap();
        assert_eq!(stub.bytes[..expected.len()], expected);
    }
}

#[test]
fn indirect_calls_keep_their_operand() {
    // call [rip + 0x100]
    let stub = relocated(Mode::Bits64, &[0xff, 0x15, 0, 1, 0, 0]);
    let displacement = i32::try_from(FROM.offset(0x106).distance_from(TO.offset(11))).unwrap().to_le_bytes();
    assert_eq!(stub.bytes, [&[0x68, 6, 0x10, 0x40, 0, 0xff, 0x25][..], &displacement].concat());
    // nop; notrack call [r12 + rbx * 8 + 0x10]
    let stub = relocated(Mode::Bits64, &[0x90, 0x3e, 0x41, 0xff, 0x54, 0xdc, 0x10]);
    assert_eq!(stub.bytes, [0x90, 0x68, 7, 0x10, 0x40, 0, 0x3e, 0x41, 0xff, 0x64, 0xdc, 0x10]);
    // mov ecx, [esp + 4]; call ecx
    let stub = relocated(Mode::Bits32, &[0x8b, 0x4c, 0x24, 4, 0xff, 0xd1]);
    assert_eq!(stub.bytes, [0x8b, 0x4c, 0x24, 4, 0x68, 6, 0x10, 0x40, 0, 0xff, 0xe1]);
    assert!(stub.emulates_call);
}

#[test]
fn a_call_of_the_next_instruction_is_a_push() {
    let code = [0xe8, 0, 0, 0, 0, 0x5b];
    for mode in BOTH {
        for min_bytes in [5, 6] {
            let stub = relocated_to(mode, &code, min_bytes, TO);
            assert_eq!(stub.bytes[..5], [0x68, 5, 0x10, 0x40, 0]);
            assert_eq!(stub.bytes[5..min_bytes], code[5..min_bytes]);
            let end = i64::try_from(min_bytes).unwrap();
            assert_eq!(stub.bytes[min_bytes..], jmp_back(end, end));
            assert!(!stub.emulates_call);
        }
    }
}

#[test]
fn a_call_of_a_pc_thunk_loads_the_constant() {
    let code = [0xe8, 0, 1, 0, 0, 0x90];
    let thunk = FROM.offset(0x105);
    let is_thunk = |target| (target == thunk).then_some(Gpr::BX);
    let options = RelocateOptions { pc_thunk: Some(&is_thunk) };
    let stub = relocate(Mode::Bits32, FROM, &code, 6, TO, &options).unwrap();
    assert_eq!(stub.bytes, [&[0xbb, 5, 0x10, 0x40, 0, 0x90][..], &jmp_back(6, 6)].concat());
    assert!(!stub.emulates_call);

    let in_r12 = |_| Some(Gpr::R12);
    let options = RelocateOptions { pc_thunk: Some(&in_r12) };
    let stub = relocate(Mode::Bits64, FROM, &code, 5, TO, &options).unwrap();
    assert_eq!(stub.bytes[..10], [0x49, 0xbc, 5, 0x10, 0x40, 0, 0, 0, 0, 0]);
    // 32-bit code has no r12: no thunk that this call could mean.
    let stub = relocate(Mode::Bits32, FROM, &code, 5, TO, &options).unwrap();
    assert!(stub.emulates_call);
}

#[test]
fn pc_thunks_are_recognised() {
    assert_eq!(pc_thunk(Mode::Bits32, &[0x8b, 0x1c, 0x24, 0xc3]), Some(Gpr::BX));
    assert_eq!(pc_thunk(Mode::Bits32, &[0x8b, 0x04, 0x24, 0xc3, 0x90]), Some(Gpr::AX));
    assert_eq!(pc_thunk(Mode::Bits64, &[0x48, 0x8b, 0x1c, 0x24, 0xc3]), Some(Gpr::BX));
    let others: [&[u8]; 8] = [
        &[],
        &[0x8b, 0x1c],
        &[0x8b, 0x1c, 0x24],
        &[0x8b, 0x1c, 0x24, 0x90, 0xc3],
        &[0x8b, 0x5c, 0x24, 0x04, 0xc3],       // mov 4(%esp),%ebx
        &[0x8b, 0x24, 0x24, 0xc3],             // mov (%esp),%esp
        &[0x65, 0x8b, 0x1c, 0x24, 0xc3],       // mov %gs:(%esp),%ebx
        &[0x8b, 0x1c, 0x24, 0xc2, 0x04, 0x00], // ret $4
    ];
    for code in others {
        assert_eq!(pc_thunk(Mode::Bits32, code), None, "{code:02x?}");
    }
    assert_eq!(pc_thunk(Mode::Bits64, &[0x8b, 0x1c, 0x24, 0xc3]), None, "half an address");
}

#[test]
fn windows_that_cannot_be_moved_are_refused_with_the_instruction_named() {
    use RelocateReason as R;
    let both: [(&[u8], R, i64); 27] = [
        (&[], R::Truncated, 0),
        (&[0x90, 0xb8, 1, 2], R::Truncated, 1),
        (&[0x90, 0x90, 0x0f, 0x04, 0x90], R::Invalid, 2),
        (&[0x66; 16], R::Invalid, 0),
        (&[0x31, 0xc0, 0xc3, 0x90, 0x90], R::EndsTooSoon, 2),
        (&[0xeb, 0x20, 0x90, 0x90, 0x90], R::EndsTooSoon, 0),
        (&[0x90, 0xff, 0xe0, 0x90, 0x90], R::EndsTooSoon, 1),
        (&[0x0f, 0x0b, 0x90, 0x90, 0x90], R::EndsTooSoon, 0),
        (&[0x90, 0x74, 0xfd, 0x90, 0x90], R::BranchesBack, 1),
        (&[0x90, 0x90, 0xe2, 0xfe, 0x90], R::BranchesBack, 2),
        (&[0x74, 0xff, 0x90, 0x90, 0x90], R::BranchesIntoInstruction, 0),
        (&[0xe9, 0xfb, 0xff, 0xff, 0xff], R::BranchesBack, 0),
        (&[0xe8, 0xfb, 0xff, 0xff, 0xff], R::BranchesBack, 0),
        (&[0x74, 0x01, 0xb8, 1, 2, 3, 4], R::BranchesIntoInstruction, 0),
        (&[0xff, 0xd0, 0x90, 0x90, 0x90], R::ReturnsIntoWindow, 0),
        (&[0x90, 0xcc, 0x90, 0x90, 0x90], R::Breakpoint, 1),
        (&[0xf3, 0x0f, 0x1e, 0xfa, 0x90], R::EndBranch, 0),
        (&[0x90, 0xf3, 0x0f, 0x1e, 0xfb], R::EndBranch, 1),
        (&[0xcb, 0x90, 0x90, 0x90, 0x90], R::EndsTooSoon, 0),
        (&[0x90, 0x90, 0xff, 0x28, 0x90], R::EndsTooSoon, 2),
        (&[0xff, 0x18, 0x90, 0x90, 0x90], R::FarBranch, 0),
        (&[0x90, 0x90, 0x90, 0x90, 0xcf], R::FarBranch, 4),
        (&[0xcd, 0x80, 0x90, 0x90, 0x90], R::SystemCall, 0),
        (&[0x0f, 0x34, 0x90, 0x90, 0x90], R::SystemCall, 0),
        (&[0xc7, 0xf8, 0, 0, 0, 0], R::Transaction, 0),
        (&[0x66, 0x74, 0x20, 0x90, 0x90], R::Narrow, 0),
        (&[0x90, 0x90, 0x90, 0x66, 0xc3], R::Narrow, 3),
    ];
    for (code, reason, offset) in both {
        for mode in BOTH {
            assert_eq!(refusal(mode, code), (reason, offset), "{mode:?} {code:02x?}");
        }
    }
    let only_64: [(&[u8], R); 5] = [
        (&[0x0f, 0x05, 0x90, 0x90, 0x90], R::SystemCall),
        (&[0x67, 0x8b, 0x05, 0, 0, 0, 0], R::Unsupported), // eip-relative
        (&[0xff, 0x94, 0x24, 0, 1, 0, 0], R::Unsupported), // call [rsp + 0x100]
        (&[0x66, 0xe8, 0, 1, 0x90], R::Narrow),
        (&[0x66, 0xff, 0x15, 0, 0, 0, 0], R::Narrow),
    ];
    for (code, reason) in only_64 {
        assert_eq!(refusal(Mode::Bits64, code), (reason, 0), "{code:02x?}");
    }
    assert_eq!(refusal(Mode::Bits32, &[0x9a, 0, 0, 0, 0, 0x33, 0]), (R::FarBranch, 0));
    let text = relocate(Mode::Bits32, FROM, &[0xc3], 5, TO, &RelocateOptions::default()).unwrap_err().to_string();
    assert_eq!(text, "cannot be moved: the instruction at 0x401000 ends the function before there is room for a jump");
}

#[test]
fn stubs_fit_the_room_that_is_said_to_suffice() {
    // loop out of the window, again and again, with every jump in its long form: the worst there is.
    let code = [0xe2, 0x7f].repeat(20);
    let mut largest = 0;
    for min_bytes in 1..=20 {
        let stub = relocated_to(Mode::Bits64, &code, min_bytes, AFAR);
        assert!(stub.bytes.len() <= max_relocated_bytes(min_bytes));
        largest = stub.bytes.len();
    }
    assert_eq!(largest, 10 * 18 + 14);
}
