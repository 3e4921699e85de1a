//! What callbacks see of a call, what they may change, and what they cannot change by accident.

use std::{
    arch::naked_asm,
    ffi::c_void,
    hint::black_box,
    ptr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use trapline_process::{Addr, CallFrame, Error, Filter, RawCallback, Resume, Tracer, traceable};

use crate::{
    STRATEGIES, THREADS,
    common::{
        calls::{Watched, Workers, count, toggle_until_trapped},
        child::in_child,
        fixture::{Compiled, function},
    },
};

pub(crate) type Word = libc::c_long;
pub(crate) type Weigh = extern "C" fn(Word, Word, Word, Word, Word, Word, Word, Word) -> Word;

traceable! {
    /// Eight arguments: at 64 bit six in registers and two on the stack, at 32 bit all on the stack.
    extern "C" fn weigh(a: Word, b: Word, c: Word, d: Word, e: Word, f: Word, g: Word, h: Word) -> Word {
        black_box(a + 10 * b + 100 * c + 1_000 * d + 10_000 * e + 100_000 * f + 1_000_000 * g + 10_000_000 * h)
    }

    extern "C" fn observed() {
        black_box(());
    }

    extern "C" fn wrong() -> u32 {
        black_box(41)
    }

    extern "C" fn also_wrong() -> u32 {
        black_box(40)
    }

    extern "C" fn scaled(a: f64, b: f32, c: f64) -> f64 {
        black_box(a) + 2.0 * f64::from(b) + 4.0 * c
    }
}

/// Checks what `weigh` and a C function like it do with a callback that sees and changes their arguments.
#[test]
fn arguments_in_registers_and_on_the_stack_are_seen_and_changed() {
    in_child("arguments::arguments_in_registers_and_on_the_stack_are_seen_and_changed", || {
        let library = Compiled::Patchable.load("hooks_functions.c");
        // SAFETY: the fixture declares it so, and the library outlives the tracer.
        let in_c: Weigh = unsafe { function(&library, "hooks_weigh") };
        let tracer = Tracer::new().expect("a tracer");
        for (glob, weigh) in [("*::weigh*", weigh as Weigh), ("hooks_weigh", in_c)] {
            let found = Arc::new(Mutex::new(Vec::new()));
            let seen = Arc::clone(&found);
            let ops = tracer.ops("arguments").filter(Filter::name(glob)).register(move |call| {
                *seen.lock().expect("nobody panics") = (0..8).map(|index| call.arg(index)).collect();
                for index in [1, 5, 6, 7] {
                    // SAFETY: the function has eight integer arguments and works with any value.
                    unsafe { call.set_arg(index, 9) };
                }
            });
            let ops = ops.expect("the function is there");
            assert_eq!(weigh(1, 2, 3, 4, 5, 6, 7, 8), 99_954_391, "{glob}");
            assert_eq!(*found.lock().expect("nobody panics"), [1, 2, 3, 4, 5, 6, 7, 8], "{glob}");
            drop(ops);
            assert_eq!(weigh(1, 2, 3, 4, 5, 6, 7, 8), 87_654_321, "{glob}");
        }
    });
}

#[test]
fn changes_of_arguments_arrive_in_every_thread_while_sites_change() {
    in_child("arguments::changes_of_arguments_arrive_in_every_thread_while_sites_change", || {
        let tracer = Tracer::new().expect("a tracer");
        let change = tracer.ops("change").filter(Filter::name("*::weigh*")).register(|call| {
            for index in [0, 7] {
                // SAFETY: the function has eight integer arguments and works with any value.
                unsafe { call.set_arg(index, 9) };
            }
        });
        let change = change.expect("the function is there");
        let beside = tracer.ops("beside").filter(Filter::name("*::weigh*")).disabled().register(count::<0>);
        let beside = Watched::new(beside.expect("the function is there"), 0);
        let workers = Workers::start(THREADS, &[0], || assert_eq!(weigh(1, 2, 3, 4, 5, 6, 7, 8), 97_654_329));
        beside.toggle(100, &workers);
        workers.assert_exact(0);
        drop(change);
    });
}

/// What [`call_with_registers`] puts into the registers that a called function must keep, in the order of [`kept_registers`].
const KEPT: [usize; 4] = [0x1001, 0x1002, 0x1003, 0x1004];

/// Calls `function` with [`KEPT`] in bx, bp, and r12, r13 (or si, di), and returns the stack pointer at its entry.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn call_with_registers(function: extern "C" fn()) -> usize {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "sub rsp, 8",
        "mov rbx, 0x1001",
        "mov rbp, 0x1002",
        "mov r12, 0x1003",
        "mov r13, 0x1004",
        "call rdi",
        "lea rax, [rsp - 8]",
        "add rsp, 8",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

#[cfg(target_arch = "x86")]
#[unsafe(naked)]
unsafe extern "C" fn call_with_registers(function: extern "C" fn()) -> usize {
    naked_asm!(
        "push ebx",
        "push ebp",
        "push esi",
        "push edi",
        "sub esp, 12",
        "mov eax, [esp + 32]",
        "mov ebx, 0x1001",
        "mov ebp, 0x1002",
        "mov esi, 0x1003",
        "mov edi, 0x1004",
        "call eax",
        "lea eax, [esp - 4]",
        "add esp, 12",
        "pop edi",
        "pop esi",
        "pop ebp",
        "pop ebx",
        "ret",
    )
}

#[cfg(target_arch = "x86_64")]
fn kept_registers(frame: &CallFrame) -> [usize; 4] {
    [frame.bx, frame.bp, frame.r12, frame.r13]
}

#[cfg(target_arch = "x86")]
fn kept_registers(frame: &CallFrame) -> [usize; 4] {
    [frame.bx, frame.bp, frame.si, frame.di]
}

#[test]
fn save_regs_shows_all_registers_and_the_stack_pointer() {
    in_child("arguments::save_regs_shows_all_registers_and_the_stack_pointer", || {
        static FOUND: [AtomicUsize; 7] = [const { AtomicUsize::new(0) }; 7];
        let tracer = Tracer::new().expect("a tracer");
        let ops = tracer.ops("registers").filter(Filter::name("*::observed*")).save_regs().register(|call| {
            let (site, parent) = (call.site(), call.return_address());
            let Some(frame) = call.registers() else { return };
            let [a, b, c, d] = kept_registers(frame);
            // SAFETY: the stack pointer points to the return address.
            let top = unsafe { ptr::with_exposed_provenance::<usize>(frame.sp).read() };
            let is_parent = usize::from(top == frame.parent && parent == Addr::new(top as u64));
            let is_site = usize::from(site == Addr::new(observed as *const () as u64));
            for (found, value) in FOUND.iter().zip([a, b, c, d, frame.sp, is_parent, is_site]) {
                found.store(value, Ordering::SeqCst);
            }
        });
        let _ops = ops.expect("the function is there");
        // SAFETY: it keeps what the psABI says, and the function takes nothing.
        let sp = unsafe { call_with_registers(observed) };
        let found: Vec<usize> = FOUND.iter().map(|found| found.load(Ordering::SeqCst)).collect();
        assert_eq!(found, [&KEPT[..], &[sp, 1, 1]].concat());
    });
}

#[test]
fn callbacks_without_save_regs_are_not_given_all_registers() {
    in_child("arguments::callbacks_without_save_regs_are_not_given_all_registers", || {
        static REFUSED: AtomicUsize = AtomicUsize::new(0);
        let tracer = Tracer::new().expect("a tracer");
        let ops = tracer.ops("plain").filter(Filter::name("*::observed*")).register(|call| {
            // SAFETY: refused, so nothing happens.
            let redirected = unsafe { call.redirect(Addr::new(0)) };
            // SAFETY: nothing is changed.
            let registers = unsafe { call.registers_mut() }.is_some();
            REFUSED.store(usize::from(!redirected && !registers && call.registers().is_none()), Ordering::SeqCst);
        });
        let _ops = ops.expect("the function is there");
        observed();
        assert_eq!(REFUSED.load(Ordering::SeqCst), 1);
    });
}

extern "C" fn right() -> u32 {
    42
}

fn address_of(function: extern "C" fn() -> u32) -> Addr {
    Addr::new(function as *const () as u64)
}

/// Registers an ops that replaces the functions that a glob matches.
fn replace(tracer: &Tracer, name: &str, glob: &str) -> Result<trapline_process::Ops, Error> {
    tracer.ops(name).filter(Filter::name(glob)).ip_modify().register(|call| {
        // SAFETY: both functions take nothing and return a number.
        unsafe { call.redirect(address_of(right)) };
    })
}

#[test]
fn ip_modify_replaces_a_function_and_one_ops_only_holds_it() {
    in_child("arguments::ip_modify_replaces_a_function_and_one_ops_only_holds_it", || {
        let tracer = Tracer::new().expect("a tracer");
        let fix = replace(&tracer, "the fix", "*::wrong*").expect("nobody holds it");
        assert_eq!((wrong(), also_wrong()), (42, 40));

        let error = replace(&tracer, "another fix", "*wrong*").expect_err("it is held").to_string();
        assert!(error.contains("\"the fix\"") && error.contains("wrong"), "{error}");
        assert_eq!((wrong(), also_wrong()), (42, 40), "all or nothing");
        let other = replace(&tracer, "another fix", "*::also_wrong*").expect("nobody holds that one");
        assert_eq!((wrong(), also_wrong()), (42, 42));
        assert!(other.set_filter(Filter::name("*wrong*")).is_err());
        assert_eq!((wrong(), also_wrong()), (42, 42));

        drop(fix);
        other.set_filter(Filter::name("*wrong*")).expect("it is free now");
        assert_eq!((wrong(), also_wrong()), (42, 42));
        drop(other);
        assert_eq!((wrong(), also_wrong()), (41, 40));
    });
}

/// How many calls ran `wrong` although it was replaced, while another ops came and went there: of `calls` at least, with a breakpoint met by one at least.
fn old_ones(resume: Resume, calls: u64) -> u64 {
    let tracer = Tracer::builder().resume(resume).build().expect("a tracer");
    let _fix = replace(&tracer, "the fix", "*::wrong*").expect("nobody holds it");
    let beside = tracer.ops("beside").filter(Filter::name("*::wrong*")).disabled().register(|_call| ());
    let beside = beside.expect("the function is there");
    let old = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&old);
    let workers = Workers::start(THREADS, &[], move || {
        if wrong() != 42 {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    while workers.calls() < calls || tracer.stats().traps.traps == 0 {
        beside.enable().expect("enabling");
        beside.disable().expect("disabling");
    }
    workers.finish();
    old.load(Ordering::Relaxed)
}

/// The defect of the kernel that this project started from: the old function ran for a moment.
fn the_old_function_never_runs(calls: u64) {
    for resume in STRATEGIES {
        assert_eq!(old_ones(*resume, calls), 0, "{resume:?}");
    }
    // The control: resumed behind the breakpoint, as the kernel did.
    while old_ones(Resume::Skip, calls) == 0 {}
}

#[test]
fn a_replaced_function_stays_replaced_while_others_come_and_go() {
    in_child("arguments::a_replaced_function_stays_replaced_while_others_come_and_go", || {
        the_old_function_never_runs(100_000);
    });
}

#[test]
#[ignore = "forty million calls"]
fn a_replaced_function_stays_replaced_for_ten_million_calls_while_others_come_and_go() {
    in_child("arguments::a_replaced_function_stays_replaced_for_ten_million_calls_while_others_come_and_go", || {
        the_old_function_never_runs(10_000_000);
    });
}

#[test]
fn floating_point_arguments_survive_a_callback_that_calculates() {
    in_child("arguments::floating_point_arguments_survive_a_callback_that_calculates", || {
        static SUM: AtomicU64 = AtomicU64::new(0);
        let tracer = Tracer::new().expect("a tracer");
        let ops = tracer.ops("mathematician").filter(Filter::name("*::scaled*")).disabled().register(|call| {
            let angle = f64::from(u16::try_from(call.arg(0) & 0xff).unwrap_or(0));
            SUM.fetch_add((angle.sin().abs().exp() * 1e3 + black_box(angle).sqrt()).to_bits(), Ordering::Relaxed);
            count::<0>(call);
        });
        let ops = Watched::new(ops.expect("the function is there"), 0);
        let workers = Workers::start(THREADS, &[0], || {
            let sum = scaled(1.5, 2.5, 3.5);
            assert!((sum - 20.5).abs() < f64::EPSILON, "{sum}");
        });
        ops.toggle(100, &workers);
        workers.assert_exact(0);
        assert_ne!(SUM.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn vector_arguments_survive_a_callback_that_writes_every_vector_register() {
    in_child("arguments::vector_arguments_survive_a_callback_that_writes_every_vector_register", || {
        let has_avx = std::arch::is_x86_feature_detected!("avx");
        if !has_avx {
            eprintln!("skipped in part: this CPU has no AVX");
        }
        let library = Compiled::Patchable.load("hooks_vectors.c");
        // SAFETY: the fixture declares it so, and the library outlives the tracer.
        let mix_is_right: extern "C" fn(f64) -> i32 = unsafe { function(&library, "hooks_mix_is_right") };
        // SAFETY: as above; called only where there is AVX.
        let combine_is_right: extern "C" fn(f32) -> i32 = unsafe { function(&library, "hooks_combine_is_right") };
        let callback = if has_avx { "hooks_write_wide_vectors" } else { "hooks_write_vectors" };
        // SAFETY: the fixture declares it so.
        let callback: RawCallback = unsafe { function(&library, callback) };
        let calls: &'static AtomicUsize = Box::leak(Box::default());

        let tracer = Tracer::new().expect("a tracer");
        let builder = tracer.ops("eraser").filter(Filter::name("hooks_*")).disabled();
        // SAFETY: the callback counts in a word that lives for ever, and is in a library that outlives the tracer.
        let ops = unsafe { builder.register_raw(callback, ptr::from_ref(calls).cast::<c_void>()) };
        let ops = ops.expect("the functions are there");
        let workers = Workers::start(THREADS, &[], move || {
            assert_eq!(mix_is_right(1.25), 1);
            assert!(!has_avx || combine_is_right(1.25) == 1);
        });
        for _ in 0..100 {
            ops.enable().expect("enabling");
            let before = calls.load(Ordering::SeqCst);
            workers.await_each();
            assert!(calls.load(Ordering::SeqCst) > before);
            ops.disable().expect("disabling");
            workers.await_calls(10);
        }
        toggle_until_trapped(&tracer, || {
            ops.enable().expect("enabling");
            ops.disable().expect("disabling");
        });
        workers.finish();
    });
}

/// A site and nothing else: it changes neither registers nor flags.
#[unsafe(naked)]
extern "C" fn transparent() {
    naked_asm!(
        "2: .byte 0x0f, 0x1f, 0x44, 0x00, 0x00",
        "ret",
        ".pushsection __patchable_function_entries, \"awo\", @progbits, {entry}",
        ".balign {word}",
        ".dc.a 2b",
        ".popsection",
        entry = sym transparent,
        word = const size_of::<usize>(),
    )
}

/// Calls [`transparent`] with these flags, and returns those afterwards.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn call_with_flags(flags: usize) -> usize {
    naked_asm!(
        "push rdi",
        "popfq",
        "call {transparent}",
        "pushfq",
        "pop rax",
        "ret",
        transparent = sym transparent,
    )
}

#[cfg(target_arch = "x86")]
#[unsafe(naked)]
unsafe extern "C" fn call_with_flags(flags: usize) -> usize {
    naked_asm!(
        "push dword ptr [esp + 4]",
        "popfd",
        "call {transparent}",
        "pushfd",
        "pop eax",
        "ret",
        transparent = sym transparent,
    )
}

/// CF, PF, AF, ZF, SF, OF (SDM volume 1, section 3.4.3).
const ARITHMETIC: [usize; 6] = [1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11];
/// Always set, and set whenever user code runs.
const OTHERS: usize = 1 << 1 | 1 << 9;

#[test]
fn arithmetic_flags_pass_through_trampolines_and_breakpoints() {
    in_child("arguments::arithmetic_flags_pass_through_trampolines_and_breakpoints", || {
        let tracer = Tracer::new().expect("a tracer");
        let describe = |name| tracer.ops(name).filter(Filter::name("*::transparent*")).disabled();
        // A trampoline that keeps the arithmetic flags only, one that keeps them all, and one that does both for two callbacks.
        let few = Watched::new(describe("few").register(count::<0>).expect("it is there"), 0);
        let all = Watched::new(describe("all").save_regs().register(count::<1>).expect("it is there"), 1);
        let mut choice = 0_usize;
        let workers = Workers::start(THREADS, &[0, 1], move || {
            choice = (choice + 1) % 64;
            let set = (0..6).filter(|bit| choice >> bit & 1 == 1).map(|bit| ARITHMETIC[bit]);
            let flags = set.fold(OTHERS, |flags, flag| flags | flag);
            // SAFETY: arithmetic flags affect nobody else.
            let found = unsafe { call_with_flags(flags) };
            assert_eq!(found, flags, "{found:#x}, not {flags:#x}");
        });
        few.toggle(100, &workers);
        all.toggle(100, &workers);
        few.enable();
        all.toggle(100, &workers);
        toggle_until_trapped(&tracer, || all.blink());
        few.disable();
        workers.assert_exact(1);
    });
}
