//! What a callback can write: found in code assembled by hand, for both modes, and in functions that this compiler
//! made.

use std::cell::Cell;

use trapline_engine::{
    Addr, Mode,
    insn::{Clobbers, Gpr, RegSet, clobbers},
};

const BOTH: [Mode; 2] = [Mode::Bits32, Mode::Bits64];

const ENTRY: Addr = Addr::new(0x40_0000);

/// The analysis of `code` at [`ENTRY`], with nothing readable around it.
fn analyse(mode: Mode, code: &[u8]) -> Clobbers {
    analyse_at(mode, ENTRY, code)
}

fn analyse_at(mode: Mode, entry: Addr, code: &[u8]) -> Clobbers {
    clobbers(mode, entry, &mut |from, buffer| {
        // 32-bit code wraps around at 4 GiB.
        let mut distance = from.value().wrapping_sub(entry.value());
        if mode == Mode::Bits32 {
            distance &= 0xffff_ffff;
        }
        let rest = usize::try_from(distance).ok().and_then(|offset| code.get(offset..)).unwrap_or_default();
        let len_bytes = rest.len().min(buffer.len());
        buffer[..len_bytes].copy_from_slice(&rest[..len_bytes]);
        len_bytes
    })
}

fn general(registers: &[Gpr]) -> Clobbers {
    Clobbers { general: RegSet::of(registers), ..Clobbers::NOTHING }
}

fn general_and_flags(registers: &[Gpr]) -> Clobbers {
    Clobbers { flags: true, ..general(registers) }
}

#[test]
fn a_return_writes_only_the_stack_pointer() {
    for mode in BOTH {
        assert_eq!(analyse(mode, &[0xc3]), general(&[Gpr::SP]));
        assert_eq!(analyse(mode, &[0xf3, 0x0f, 0x1e, 0xfa, 0xf3, 0xc3]), general(&[Gpr::SP]), "behind an endbr64");
        assert!(analyse(mode, &[0xc3]).caller_saved(mode).is_empty());
    }
}

#[test]
fn writes_are_found_by_register_whatever_part_is_written() {
    let cases: [(&[u8], Clobbers); 8] = [
        (&[0xb4, 0x01, 0xc3], general(&[Gpr::AX, Gpr::SP])), // mov ah, 1
        (&[0x66, 0xb9, 0x01, 0x00, 0xc3], general(&[Gpr::CX, Gpr::SP])), // mov cx, 1
        (&[0x0f, 0x31, 0xc3], general(&[Gpr::AX, Gpr::DX, Gpr::SP])), // rdtsc
        (&[0x0f, 0xae, 0xe8, 0x0f, 0x31, 0xc3], general(&[Gpr::AX, Gpr::DX, Gpr::SP])), // lfence; rdtsc
        (&[0xf0, 0xff, 0x03, 0xc3], general_and_flags(&[Gpr::SP])), // lock inc dword [bx]
        (&[0x0f, 0x44, 0xca, 0xc3], general(&[Gpr::CX, Gpr::SP])), // cmove ecx, edx
        (&[0xfd, 0xfc, 0xc3], general_and_flags(&[Gpr::SP])), // std; cld
        (&[0x53, 0x31, 0xdb, 0x5b, 0xc3], general_and_flags(&[Gpr::BX, Gpr::SP])), // push bx; xor ebx, ebx; pop bx
    ];
    for (code, expected) in cases {
        for mode in BOTH {
            assert_eq!(analyse(mode, code), expected, "{mode:?} {code:02x?}");
        }
    }
    let r15 = [0x4d, 0x89, 0xc7, 0xc3]; // mov r15, r8
    assert_eq!(analyse(Mode::Bits64, &r15), general(&[Gpr::R15, Gpr::SP]));
    assert!(analyse(Mode::Bits64, &r15).caller_saved(Mode::Bits64).is_empty());
}

#[test]
fn registers_left_to_the_caller_depend_on_the_psabi() {
    // mov eax, esi
    let found = analyse(Mode::Bits64, &[0x89, 0xf0, 0x31, 0xf6, 0xc3]);
    assert_eq!(found, general_and_flags(&[Gpr::AX, Gpr::SI, Gpr::SP]));
    assert_eq!(found.caller_saved(Mode::Bits64), RegSet::of(&[Gpr::AX, Gpr::SI]));
    assert_eq!(found.caller_saved(Mode::Bits32), RegSet::of(&[Gpr::AX]));
    assert_eq!(Clobbers::EVERYTHING.caller_saved(Mode::Bits32).len(), 3);
    assert_eq!(Clobbers::EVERYTHING.caller_saved(Mode::Bits64).len(), 9);
}

#[test]
fn vector_state_is_any_of_its_registers_and_control_words() {
    let both: [&[u8]; 9] = [
        &[0x0f, 0x57, 0xc0],       // xorps xmm0, xmm0
        &[0x0f, 0x11, 0x00],       // movups [ax], xmm0
        &[0x0f, 0x2e, 0xc1],       // ucomiss xmm0, xmm1: flags and MXCSR
        &[0xf2, 0x0f, 0x2c, 0xc0], // cvttsd2si eax, xmm0: MXCSR
        &[0x0f, 0xae, 0x10],       // ldmxcsr
        &[0xd9, 0x28],             // fldcw
        &[0xdb, 0xe3],             // fninit
        &[0x0f, 0x77],             // emms
        &[0xc5, 0xf8, 0x77],       // vzeroupper
    ];
    for (code, mode) in both.into_iter().flat_map(|code| BOTH.map(|mode| (code, mode))) {
        let found = analyse(mode, &[code, &[0xc3]].concat());
        assert!(found.vector, "{mode:?} {code:02x?}");
        assert_ne!(found, Clobbers::EVERYTHING, "{mode:?} {code:02x?}");
    }
    let mask = [0xc5, 0xf8, 0x92, 0xc8, 0xc3]; // kmovw k1, eax
    assert_eq!(analyse(Mode::Bits64, &mask), Clobbers { vector: true, ..general(&[Gpr::SP]) });
}

#[test]
fn what_is_not_understood_is_everything() {
    let both: [(&str, &[u8]); 29] = [
        ("invalid", &[0x0f, 0x04]),
        ("unreadable", &[0x90]),
        ("cut off", &[0xe8, 0, 0]),
        ("call through a register", &[0xff, 0xd0, 0xc3]),
        ("call through memory", &[0xff, 0x10, 0xc3]),
        ("jump through a register", &[0xff, 0xe0]),
        ("jump to unreadable memory", &[0xe9, 0, 0, 0, 0x10]),
        ("call of unreadable memory", &[0xe8, 0, 0, 0, 0x10, 0xc3]),
        ("a breakpoint", &[0xcc, 0xc3]),
        ("int 0x80", &[0xcd, 0x80, 0xc3]),
        ("sysenter", &[0x0f, 0x34, 0xc3]),
        ("hlt", &[0xf4, 0xc3]),
        ("cli", &[0xfa, 0xc3]),
        ("mov to cr0", &[0x0f, 0x22, 0xc0, 0xc3]),
        ("mov to ds", &[0x8e, 0xd8, 0xc3]),
        ("pop of fs", &[0x0f, 0xa1, 0xc3]),
        ("xsave", &[0x0f, 0xae, 0x20, 0xc3]),
        ("xrstor", &[0x0f, 0xae, 0x28, 0xc3]),
        ("fxsave", &[0x0f, 0xae, 0x00, 0xc3]),
        ("xgetbv", &[0x0f, 0x01, 0xd0, 0xc3]),
        ("rdpmc", &[0x0f, 0x33, 0xc3]),
        ("xbegin", &[0xc7, 0xf8, 0, 0, 0, 0, 0xc3]),
        ("far return", &[0xcb]),
        ("return from interrupt", &[0xcf]),
        ("16-bit return", &[0x66, 0xc3]),
        ("return that pops arguments", &[0xc2, 0x04, 0x00]),
        ("endless recursion", &[0xe8, 0xfb, 0xff, 0xff, 0xff, 0xc3]),
        ("ud1", &[0x0f, 0xb9, 0xc0]),
        ("x87 state save", &[0x0f, 0xae, 0x20, 0xc3]),
    ];
    for (what, code) in both {
        for mode in BOTH {
            assert_eq!(analyse(mode, code), Clobbers::EVERYTHING, "{what}, {mode:?}");
        }
    }
    let only_64: [(&str, &[u8]); 6] = [
        ("syscall", &[0x0f, 0x05, 0xc3]),
        ("wrfsbase", &[0xf3, 0x48, 0x0f, 0xae, 0xd0, 0xc3]),
        ("swapgs", &[0x0f, 0x01, 0xf8, 0xc3]),
        ("tile load", &[0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x20, 0xc3]),
        ("16-bit call", &[0x66, 0xe8, 0, 0, 0xc3]),
        ("call through a GOT", &[0xff, 0x15, 0, 0, 0, 0, 0xc3]),
    ];
    for (what, code) in only_64 {
        assert_eq!(analyse(Mode::Bits64, code), Clobbers::EVERYTHING, "{what}");
    }
}

#[test]
fn both_sides_of_branches_are_followed() {
    // test edi, edi; je 1f; inc ecx...; ret; 1: mov edx, 1; ret
    let code = [0x85, 0xff, 0x74, 0x03, 0x0f, 0xc9, 0xc3, 0xba, 1, 0, 0, 0, 0xc3];
    // The fall-through side is `bswap ecx`.
    for mode in BOTH {
        assert_eq!(analyse(mode, &code), general_and_flags(&[Gpr::CX, Gpr::DX, Gpr::SP]));
    }
    // loop: jumps back to itself, and counts in cx.
    let counted = [0xe2, 0xfe, 0xc3];
    // jmp over bytes that are no code.
    let jump = [0xeb, 0x02, 0x0f, 0x04, 0xc3];
    for mode in BOTH {
        assert_eq!(analyse(mode, &counted), general(&[Gpr::CX, Gpr::SP]));
        assert_eq!(analyse(mode, &jump), general(&[Gpr::SP]));
    }
}

#[test]
fn a_path_ends_at_ud2() {
    for mode in BOTH {
        // je 1f; ret; 1: ud2; (no code)
        assert_eq!(analyse(mode, &[0x74, 0x01, 0xc3, 0x0f, 0x0b]), general(&[Gpr::SP]));
        assert_eq!(analyse(mode, &[0x0f, 0x0b]), Clobbers::NOTHING);
    }
}

#[test]
fn callees_count() {
    // call 1f; ret; 1: mov esi, eax; ret
    let code = [0xe8, 1, 0, 0, 0, 0xc3, 0x89, 0xc6, 0xc3];
    for mode in BOTH {
        assert_eq!(analyse(mode, &code), general(&[Gpr::SI, Gpr::SP]));
    }
}

/// `calls` functions, each of which calls the next; the last one writes edi.
fn chain(calls: u8) -> Vec<u8> {
    let mut code = [0xe8, 1, 0, 0, 0, 0xc3].repeat(calls.into());
    code.extend([0x89, 0xc7, 0xc3]);
    code
}

#[test]
fn calls_are_followed_eight_deep() {
    for mode in BOTH {
        assert_eq!(analyse(mode, &chain(8)), general(&[Gpr::DI, Gpr::SP]));
        assert_eq!(analyse(mode, &chain(9)), Clobbers::EVERYTHING);
    }
}

#[test]
fn code_is_followed_for_256_instructions() {
    for mode in BOTH {
        let mut code = vec![0x90; 255];
        code.push(0xc3);
        assert_eq!(analyse(mode, &code), general(&[Gpr::SP]));
        code.insert(0, 0x90);
        assert_eq!(analyse(mode, &code), Clobbers::EVERYTHING);
    }
}

#[test]
fn a_return_to_elsewhere_is_everything() {
    let both: [(&str, &[u8]); 9] = [
        // call 1f; 2: pause; jmp 2b; 1: mov [sp], ax; ret, in 32-bit code
        ("retpoline", &[0xe8, 4, 0, 0, 0, 0xf3, 0x90, 0xeb, 0xfc, 0x89, 0x04, 0x24, 0xc3]),
        ("push and return", &[0x50, 0xc3]),
        ("return to the caller's caller", &[0x58, 0xc3]),
        ("replaced return address", &[0x58, 0x51, 0xc3]),
        ("exchanged return address", &[0x87, 0x04, 0x24, 0xc3]),
        ("another stack", &[0x89, 0xc4, 0xc3]),
        ("stack of unknown depth", &[0x83, 0xe4, 0xf0, 0xc3]),
        ("pop of the stack pointer", &[0x5c, 0xc3]),
        // je 1f; push ax; 1: ret
        ("depth depends on the path", &[0x74, 0x01, 0x50, 0xc3]),
    ];
    for (what, code) in both {
        for mode in BOTH {
            assert_eq!(analyse(mode, code), Clobbers::EVERYTHING, "{what}, {mode:?}");
        }
    }
    let retpoline_64 = [0xe8, 7, 0, 0, 0, 0xf3, 0x90, 0x0f, 0xae, 0xe8, 0xeb, 0xf9, 0x48, 0x89, 0x04, 0x24, 0xc3];
    assert_eq!(analyse(Mode::Bits64, &retpoline_64), Clobbers::EVERYTHING);
}

#[test]
fn frames_of_all_kinds_return_to_the_caller() {
    let frames_32: [&[u8]; 4] = [
        // push ebp; mov ebp, esp; sub esp, 16; mov [ebp - 4], eax; leave; ret
        &[0x55, 0x89, 0xe5, 0x83, 0xec, 0x10, 0x89, 0x45, 0xfc, 0xc9, 0xc3],
        // push ebp; mov ebp, esp; push ebx; and esp, -32; sub esp, 64; lea esp, [ebp - 4]; pop ebx; pop ebp; ret
        &[0x55, 0x89, 0xe5, 0x53, 0x83, 0xe4, 0xe0, 0x83, 0xec, 0x40, 0x8d, 0x65, 0xfc, 0x5b, 0x5d, 0xc3],
        // sub esp, 0x100; lea eax, [esp + 8]; mov [eax + 4], ecx; add esp, 0x100; ret
        &[0x81, 0xec, 0, 1, 0, 0, 0x8d, 0x44, 0x24, 8, 0x89, 0x48, 4, 0x81, 0xc4, 0, 1, 0, 0, 0xc3],
        // mov [esp + 4], eax: an argument's slot is the callee's to write
        &[0x89, 0x44, 0x24, 0x04, 0xc3],
    ];
    let frames_64: [&[u8]; 3] = [
        &[0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0x48, 0x89, 0x45, 0xf8, 0xc9, 0xc3],
        &[
            0x55, 0x48, 0x89, 0xe5, 0x53, 0x48, 0x83, 0xe4, 0xe0, 0x48, 0x83, 0xec, 0x40, 0x48, 0x8d, 0x65, 0xf8, 0x5b,
            0x5d, 0xc3,
        ],
        // mov [rsp - 8], rax: in the red zone
        &[0x48, 0x89, 0x44, 0x24, 0xf8, 0xc3],
    ];
    let cases =
        frames_32.map(|code| (Mode::Bits32, code)).into_iter().chain(frames_64.map(|code| (Mode::Bits64, code)));
    for (mode, code) in cases {
        let found = analyse(mode, code);
        assert_ne!(found, Clobbers::EVERYTHING, "{mode:?} {code:02x?}");
        assert!(!found.vector);
    }
}

#[test]
fn i386_code_that_finds_its_own_address_is_followed() {
    // call 1f; 1: pop ecx; ret
    assert_eq!(analyse(Mode::Bits32, &[0xe8, 0, 0, 0, 0, 0x59, 0xc3]), general(&[Gpr::CX, Gpr::SP]));
    // call 1f; ret; 1: mov ebx, [esp]; ret
    assert_eq!(analyse(Mode::Bits32, &[0xe8, 1, 0, 0, 0, 0xc3, 0x8b, 0x1c, 0x24, 0xc3]), general(&[Gpr::BX, Gpr::SP]));
}

#[test]
fn addresses_wrap_at_4_gib_in_32_bit_mode() {
    // mov ecx, edx; jmp +1; (no code); mov edx, ecx; ret, across the end of the address space
    let code = [0x89, 0xd1, 0xeb, 0x01, 0x0f, 0x89, 0xca, 0xc3];
    let found = analyse_at(Mode::Bits32, Addr::new(0xffff_fffd), &code);
    assert_eq!(found, general(&[Gpr::CX, Gpr::DX, Gpr::SP]));
}

#[test]
fn memory_is_read_no_further_than_needed() {
    let reads = Cell::new(0);
    let found = clobbers(Mode::Bits64, ENTRY, &mut |from, buffer| {
        reads.set(reads.get() + 1);
        assert_eq!(from, ENTRY);
        buffer[0] = 0xc3;
        1
    });
    assert_eq!((found, reads.get()), (general(&[Gpr::SP]), 1));
}

#[test]
fn clobbers_add_up() {
    let one = general(&[Gpr::AX]);
    let other = Clobbers { vector: true, ..general_and_flags(&[Gpr::DX]) };
    let both = Clobbers { general: RegSet::of(&[Gpr::AX, Gpr::DX]), flags: true, vector: true };
    assert_eq!(one.union(other), both);
    assert_eq!(Clobbers::NOTHING.union(one), one);
    assert_eq!(one.union(Clobbers::EVERYTHING), Clobbers::EVERYTHING);
}

/// Functions as trapline's users write them, made by the compiler that made this test.
#[cfg(all(target_os = "linux", any(target_arch = "x86", target_arch = "x86_64")))]
mod compiled {
    use std::{
        fs::File,
        hint::black_box,
        os::unix::fs::FileExt,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use trapline_engine::{
        Addr, Mode,
        insn::{Clobbers, Gpr, RegSet, clobbers},
    };

    static CALLS: AtomicUsize = AtomicUsize::new(0);
    static BY_PARITY: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];

    #[inline(never)]
    extern "C" fn count(_site: usize) {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }

    #[inline(never)]
    extern "C" fn count_by_parity(site: usize) {
        if site & 1 == 0 {
            BY_PARITY[0].fetch_add(site, Ordering::Relaxed)
        } else {
            BY_PARITY[1].fetch_add(1, Ordering::Relaxed)
        };
    }

    #[inline(never)]
    extern "C" fn scale(value: f64) -> f64 {
        value * 1.5 + 2.0
    }

    #[inline(never)]
    extern "C" fn forward(callback: extern "C" fn(usize), site: usize) {
        callback(site);
        CALLS.fetch_add(1, Ordering::Relaxed);
    }

    #[inline(never)]
    extern "C" fn print(site: usize) {
        println!("site {site}");
    }

    /// The analysis of code in this process.
    fn analyse(function: *const ()) -> Clobbers {
        let memory = File::open("/proc/self/mem").expect("readable");
        clobbers(Mode::NATIVE, Addr::new(function.addr() as u64), &mut |from, buffer| {
            memory.read_at(buffer, from.value()).unwrap_or(0)
        })
    }

    #[test]
    fn an_atomic_counter_leaves_vector_state_and_most_registers_alone() {
        count(0);
        let found = analyse(count as *const ());
        assert!(!found.vector, "{found:?}");
        assert!(found.caller_saved(Mode::NATIVE).len() <= 2, "{found:?}");
    }

    #[test]
    fn two_counters_and_a_branch_leave_vector_state_alone() {
        count_by_parity(black_box(1));
        let found = analyse(count_by_parity as *const ());
        assert!(!found.vector, "{found:?}");
        assert!(found.flags);
        assert_ne!(found.general, RegSet::ALL);
    }

    #[test]
    fn floating_point_needs_vector_state_but_no_argument_registers() {
        assert!((scale(black_box(2.0)) - 5.0).abs() < f64::EPSILON);
        let found = analyse(scale as *const ());
        assert!(found.vector);
        assert!(!found.general.contains(Gpr::DX), "{found:?}");
    }

    #[test]
    fn a_call_through_a_pointer_is_everything() {
        forward(count, 1);
        assert_eq!(analyse(forward as *const ()), Clobbers::EVERYTHING);
    }

    #[test]
    fn printing_is_everything() {
        print(1);
        assert_eq!(analyse(print as *const ()), Clobbers::EVERYTHING);
    }
}
