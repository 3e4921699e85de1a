//! What a function finds in the registers when it is entered through the agent, and what its caller finds when it has returned (I4).
//!
//! A caller fills every register, a function looks at them, fills them anew and returns, the caller looks. Entries that spoil one thing each are the
//! controls: each is found, by the name of what it spoils.

mod common;

use std::{
    arch::{global_asm, x86_64::__cpuid_count},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use common::{Pool, calls, in_thread, stub_two, thread};
use trapline_abi::{
    pool::{CHUNK_BYTES, OnFull, is_place},
    thread::Thread,
};

/// Room for everything that XSAVE stores.
const XSAVE_BYTES: usize = 4096;

/// Registers in the order of their numbers.
const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
const RSP: usize = 4;

/// The machine's state as the code below stores and loads it.
#[repr(C, align(64))]
#[derive(Clone)]
struct State {
    general: [u64; 16],
    flags: u64,
    _pad: [u64; 7],
    extended: [u8; XSAVE_BYTES],
}

macro_rules! stubs {
    ($($name:literal: $entry:literal;)*) => {
        concat!($(".long 7\n.globl ", $name, "\n", $name, ":\ncall ", $entry, "\njmp looks\n",)*)
    };
}

macro_rules! hooked_stubs {
    ($($name:literal: $entry:literal;)*) => {
        concat!($(hooked_stub!($name, "7", $entry, "looks"),)*)
    };
}

macro_rules! spoiled {
    ($($name:literal $entry:literal: $spoils:literal;)*) => {
        concat!($(hooked_stub!($name, "7", $entry, "looks"), $entry, ":\n", $spoils, "\njmp trapline_enter_keep_flags\n",)*)
    };
}

// Each register by its number's place.
global_asm!(
    r#"
    .macro each_general instruction state
    \instruction \state, 0, rax
    \instruction \state, 8, rcx
    \instruction \state, 16, rdx
    \instruction \state, 24, rbx
    \instruction \state, 40, rbp
    \instruction \state, 48, rsi
    \instruction \state, 56, rdi
    \instruction \state, 64, r8
    \instruction \state, 72, r9
    \instruction \state, 80, r10
    \instruction \state, 88, r11
    \instruction \state, 96, r12
    \instruction \state, 104, r13
    \instruction \state, 112, r14
    \instruction \state, 120, r15
    .endm
    .macro store_one state at register
    mov qword ptr [rip + \state + \at], \register
    .endm
    .macro load_one state at register
    mov \register, qword ptr [rip + \state + \at]
    .endm
    .macro store_all state
    each_general store_one, \state
    mov qword ptr [rip + \state + 32], rsp
    pushfq
    pop qword ptr [rip + \state + 128]
    cld
    mov eax, dword ptr [rip + components]
    xor edx, edx
    lea rcx, [rip + \state]
    xsave [rcx + 192]
    .endm
    .macro load_all state
    mov eax, dword ptr [rip + components]
    xor edx, edx
    lea rcx, [rip + \state]
    xrstor [rcx + 192]
    push qword ptr [rip + \state + 128]
    popfq
    each_general load_one, \state
    .endm
    "#
);

global_asm!(
    ".pushsection .bss.registers,\"aw\",@nobits",
    ".p2align 6",
    ".globl given\ngiven: .zero {BYTES}",
    ".globl seen\nseen: .zero {BYTES}",
    ".globl results\nresults: .zero {BYTES}",
    ".globl received\nreceived: .zero {BYTES}",
    "host: .zero {BYTES}",
    ".globl caller_stack\ncaller_stack: .zero 8",
    "target: .zero 8",
    ".globl components\ncomponents: .zero 8",
    ".globl above\nabove: .zero 64",
    ".globl above_seen\nabove_seen: .zero 64",
    ".popsection",
    ".pushsection .text.registers,\"ax\",@progbits",
    // The caller: rdi is the function. The words above its return address are arguments on the stack.
    ".globl call_looking\ncall_looking:",
    "push rbx\npush rbp\npush r12\npush r13\npush r14\npush r15\nsub rsp, 72",
    "mov qword ptr [rip + target], rdi",
    "mov eax, dword ptr [rip + components]\nxor edx, edx\nxsave [rip + host + 192]",
    "lea rsi, [rip + above]\nmov rdi, rsp\nmov ecx, 8\nrep movsq",
    "mov qword ptr [rip + caller_stack], rsp",
    "load_all given",
    "call qword ptr [rip + target]",
    "store_all received",
    "mov rsp, qword ptr [rip + caller_stack]",
    "mov eax, dword ptr [rip + components]\nxor edx, edx\nxrstor [rip + host + 192]",
    "lea rdi, [rip + above_seen]\nmov rsi, rsp\nmov ecx, 8\nrep movsq",
    "add rsp, 72\npop r15\npop r14\npop r13\npop r12\npop rbp\npop rbx\nret",
    // The function.
    "looks:",
    "store_all seen",
    "load_all results",
    "ret",
    stubs! {
        "through_nothing": "returns";
        "through_point": "trapline_point";
        "through_point_keep_flags": "trapline_point_keep_flags";
    },
    hooked_stubs! {
        "through_enter": "trapline_enter";
        "through_keep_flags": "trapline_enter_keep_flags";
        "through_limited": "trapline_enter_limited";
    },
    "returns: ret",
    spoiled! {
        "spoils_rax" "spoils_rax_entry": "mov eax, eax";
        "spoils_r10" "spoils_r10_entry": "lea r10, [r10 + 1]";
        "spoils_r11" "spoils_r11_entry": "lea r11, [r11 + 1]";
        "spoils_flags" "spoils_flags_entry": "test rsp, rsp";
        "spoils_direction" "spoils_direction_entry": "cld";
        "spoils_x87" "spoils_x87_entry": "fincstp";
        "spoils_mxcsr" "spoils_mxcsr_entry": "push 0x1f80\nldmxcsr [rsp]\nlea rsp, [rsp + 8]";
        "spoils_xmm" "spoils_xmm_entry": "xorps xmm15, xmm15";
        "spoils_upper" "spoils_upper_entry": "vzeroupper";
        "spoils_stack" "spoils_stack_entry": "mov qword ptr [rsp + 24], rsp";
    },
    ".popsection",
    BYTES = const size_of::<State>(),
);

type Function = unsafe extern "C" fn();

unsafe extern "C" {
    static mut given: State;
    static mut seen: State;
    static mut results: State;
    static mut received: State;
    static mut above: [u64; 8];
    static mut above_seen: [u64; 8];
    static caller_stack: AtomicU64;
    static components: AtomicU32;
    fn call_looking(function: Function);
    fn through_nothing();
    fn through_enter();
    fn through_keep_flags();
    fn through_limited();
    fn through_point();
    fn through_point_keep_flags();
    fn spoils_rax();
    fn spoils_r10();
    fn spoils_r11();
    fn spoils_flags();
    fn spoils_direction();
    fn spoils_x87();
    fn spoils_mxcsr();
    fn spoils_xmm();
    fn spoils_upper();
    fn spoils_stack();
}

/// x87, SSE, AVX and AVX-512, as far as the processor has them and the system lets programs use them.
fn used_components() -> u32 {
    const WANTED: u32 = 0xe7;
    let enabled: u32;
    // SAFETY: every processor with XSAVE has the instruction, and 64-bit Linux enables that.
    unsafe { std::arch::asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _, options(nomem, nostack)) };
    enabled & WANTED
}

/// Where the extended components lie in what XSAVE stores.
fn places(mask: u32) -> Vec<(&'static str, std::ops::Range<usize>)> {
    let mut places =
        vec![("x87", 0..24), ("mxcsr", 24..28), ("x87", 32..160), ("xmm", 160..416), ("components", 512..520)];
    for (component, name) in [(2, "ymm"), (5, "opmask"), (6, "zmm"), (7, "zmm16..31")] {
        if mask >> component & 1 == 1 {
            let leaf = __cpuid_count(0xd, component);
            places.push((name, leaf.ebx as usize..(leaf.ebx + leaf.eax) as usize));
        }
    }
    places
}

const ARITHMETIC: u64 = 0x8d5;
const DIRECTION: u64 = 0x400;
/// Always one, and interrupts.
const FIXED: u64 = 0x202;

/// A state with something in every register.
fn state(seed: u64, flags: u64) -> State {
    let mask = used_components();
    let mut number = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number
    };
    let mut state = State { general: [0; 16], flags: flags | FIXED, _pad: [0; 7], extended: [0; XSAVE_BYTES] };
    state.general = std::array::from_fn(|_| next());
    for (_, place) in places(mask) {
        for byte in &mut state.extended[place] {
            *byte = next().to_le_bytes()[3];
        }
    }
    // Control word: rounding to zero, exceptions masked; status: the stack's top is 5; all registers in use; no pending exception.
    state.extended[..24].fill(0);
    state.extended[..5].copy_from_slice(&[0x7f, 0x0e, 0x00, 0x28, 0xff]);
    // Of ten bytes each.
    for register in 0..8 {
        state.extended[32 + 16 * register + 10..][..6].fill(0);
    }
    // Rounding to zero, denormals are zero, flush to zero, some exception flags; exceptions masked.
    state.extended[24..28].copy_from_slice(&0xffc5_u32.to_le_bytes());
    state.extended[28..32].fill(0);
    state.extended[512..520].copy_from_slice(&u64::from(mask).to_le_bytes());
    state.extended[520..576].fill(0);
    state
}

/// What differs, by name. `flags` are those that count.
fn differences(expected: &State, found: &State, stack: u64, flags: u64) -> Vec<&'static str> {
    let mut names = Vec::new();
    for (number, name) in NAMES.into_iter().enumerate() {
        let expected = if number == RSP { stack } else { expected.general[number] };
        if found.general[number] != expected {
            names.push(name);
        }
    }
    if (found.flags ^ expected.flags) & flags & ARITHMETIC != 0 {
        names.push("flags");
    }
    if (found.flags ^ expected.flags) & DIRECTION != 0 {
        names.push("direction");
    }
    for (name, place) in places(used_components()) {
        if found.extended[place.clone()] != expected.extended[place] {
            names.push(name);
        }
    }
    names
}

/// Writes one of the above.
fn write<T>(place: *mut T, value: T) {
    // SAFETY: (1) one of the statics of that type; (2) one thread uses them at a time, the one that holds the pool.
    unsafe { place.write(value) }
}

/// Reads one of the above.
fn read<T: Clone>(place: *const T) -> T {
    // SAFETY: as in `write`.
    unsafe { &*place }.clone()
}

/// Calls a function once; what differs at its entry and in its caller. `flags` are those that an entry has to keep.
fn look(function: Function, seed: u64, entry_flags: u64) -> (Vec<&'static str>, Vec<&'static str>) {
    // Six arithmetic flags and the direction.
    let spread = |bits: u64| {
        let places = [0, 2, 4, 6, 7, 11, 10];
        places.into_iter().enumerate().map(|(bit, place)| (bits >> bit & 1) << place).sum()
    };
    let (call, result) = (state(seed, spread(seed)), state(!seed, spread(!seed)));
    write(&raw mut given, call.clone());
    write(&raw mut results, result.clone());
    write(&raw mut above, std::array::from_fn(|at| seed + 1000 + at as u64));
    // SAFETY: (1) an atomic that the code above reads; (2) it is set before that runs.
    unsafe { &components }.store(used_components(), Ordering::Relaxed);
    // SAFETY: it takes any function that keeps to the calling convention, and puts the processor's state back.
    unsafe { call_looking(function) };
    let (at_entry, at_return) = (read(&raw const seen), read(&raw const received));
    // SAFETY: an atomic.
    let stack = unsafe { &caller_stack }.load(Ordering::Relaxed);
    let is_stack_kept = read(&raw const above) == read(&raw const above_seen);
    let mut entered = differences(&call, &at_entry, stack - 8, entry_flags);
    if !is_stack_kept {
        entered.push("stack");
    }
    (entered, differences(&result, &at_return, stack, ARITHMETIC))
}

/// Where the thread's next record goes, from the end of its chunk.
#[derive(Clone, Copy, Debug)]
enum Room {
    /// The thread has no chunk, and its stack no shadow that it knows.
    First,
    /// There is enough.
    Plenty,
    /// The entry has the last place, the return has none.
    One,
    /// The entry has none.
    None,
}

/// Brings the thread there; `None` if it has no chunk, as in a pool that is full.
fn prepare(pool: &Pool, room: Room) -> Option<()> {
    // SAFETY: this thread's own state, and no handler comes.
    let state = || unsafe { &mut *thread() };
    let left = match room {
        Room::Plenty => return Some(()),
        Room::First => {
            // What it had is full, as far as anybody can tell.
            pool.end(common::tid());
            *state() = Thread { chunks_used: state().chunks_used, ..Thread::default() };
            return Some(());
        }
        Room::One => 1,
        Room::None => 0,
    };
    if !is_place(state().position) {
        calls(1, stub_two);
    }
    let position = is_place(state().position).then_some(state().position)?;
    let places = (position.next_multiple_of(CHUNK_BYTES as u64) - position) / 8 - left;
    calls(places / 2, stub_two);
    calls(places % 2, common::stub_point);
    Some(())
}

fn every_way(function: Function, entry_flags: u64) {
    for on_full in [OnFull::Block, OnFull::Drop, OnFull::Overwrite] {
        // Where that matters, so few that most of the time none is free.
        let pool = Pool::new(if on_full == OnFull::Block { 700 } else { 30 }, on_full);
        let mut looks = 0;
        in_thread(|| {
            for seed in 0..128 {
                for room in [Room::First, Room::Plenty, Room::One, Room::None] {
                    if prepare(&pool, room).is_some() {
                        looks += 1;
                        assert_eq!(look(function, seed, entry_flags), (vec![], vec![]), "{on_full:?} {room:?} {seed}");
                    }
                }
            }
        });
        let header = pool.header();
        let lost = header.lost_full.load(Ordering::Relaxed) + header.lost_overwritten.load(Ordering::Relaxed);
        if on_full == OnFull::Block {
            assert_eq!((pool.contents().unwrap().calls[&7], lost), (looks, 0));
        } else {
            assert!(lost > 100, "{lost}");
        }
    }
}

#[test]
fn the_usual_entry_keeps_all_but_flags() {
    every_way(through_enter, 0);
}

#[test]
fn the_entry_that_keeps_flags_keeps_all() {
    every_way(through_keep_flags, ARITHMETIC);
}

#[test]
fn the_entry_with_a_limit_keeps_all() {
    every_way(through_limited, ARITHMETIC);
}

#[test]
fn the_entry_without_a_return_keeps_all_but_flags() {
    every_way(through_point, 0);
}

#[test]
fn the_entry_without_a_return_that_keeps_flags_keeps_all() {
    every_way(through_point_keep_flags, ARITHMETIC);
}

#[test]
fn what_an_entry_spoils_is_found() {
    let spoilers: [(Function, &str); 10] = [
        (spoils_rax, "rax"),
        (spoils_r10, "r10"),
        (spoils_r11, "r11"),
        (spoils_flags, "flags"),
        (spoils_direction, "direction"),
        (spoils_x87, "x87"),
        (spoils_mxcsr, "mxcsr"),
        (spoils_xmm, "xmm"),
        (spoils_upper, "ymm"),
        (spoils_stack, "stack"),
    ];
    let _pool = Pool::new(30, OnFull::Block);
    in_thread(|| {
        for (function, what) in spoilers {
            if what == "ymm" && used_components() & 4 == 0 {
                continue;
            }
            // With every flag and the direction set, and with none.
            let found: Vec<_> = [0x7f, 0].into_iter().flat_map(|seed| look(function, seed, ARITHMETIC).0).collect();
            assert!(found.contains(&what), "{what}: {found:?}");
            assert!(found.iter().all(|name| *name == what || is_part_of(name, what)), "{what}: {found:?}");
        }
        assert_eq!(look(through_nothing, 5, ARITHMETIC), (vec![], vec![]));
    });
}

/// What else is a part of what is spoiled.
fn is_part_of(name: &str, what: &str) -> bool {
    match what {
        "ymm" => matches!(name, "zmm" | "zmm16..31" | "components"),
        _ => name == "components",
    }
}
