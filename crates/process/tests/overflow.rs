//! More emulated calls than slots, and what becomes of the registers of a thread that meets a breakpoint.
//!
//! A call for which no slot is left is pushed to the interrupted stack. At 32 bit the signal's own frame lies there unless the thread has an alternate
//! stack, and must be moved first. Threads here hold known values in their vector registers, in every one of these situations. Every test runs in a process of
//! its own.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "registers are signed words of the width that the test is built for"
)]

mod common;

use std::{
    arch::naked_asm,
    hint::black_box,
    mem, ptr,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use common::{
    calls::{Tally, WATCHED, Watched, Workers, count, count_for, judge},
    child::in_child,
    signals::{detailed, own_tid, raise, set, set_alternate_stack},
};
use libc::{c_int, c_void, siginfo_t, ucontext_t};
use trapline_process::{Addr, Builder, Call, Filter, Tracer, TrapStats, traceable};

#[cfg(target_arch = "x86")]
use libc::{REG_EIP as REG_IP, REG_ESP as REG_SP};
#[cfg(target_arch = "x86_64")]
use libc::{REG_RIP as REG_IP, REG_RSP as REG_SP};

traceable! {
    /// What threads call.
    extern "C" fn touched(a: usize, b: usize, c: usize, d: usize, e: usize, f: usize, g: usize) -> usize {
        black_box(a + b + c + d + e + f) * g
    }

    extern "C" fn first(a: usize) -> usize {
        black_box(a) + 1
    }

    extern "C" fn second(a: usize) -> usize {
        black_box(a) + 2
    }

    extern "C" fn third(a: usize) -> usize {
        black_box(a) + 3
    }
}

/// A site and nothing else: it changes no register.
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

/// The vector registers that both widths have, as they lie in memory.
type Vectors = [[u8; 32]; 8];

/// Bytes of a machine word.
const WORD: usize = size_of::<usize>();

/// Loads ymm0 to ymm7, calls `function` with the stack pointer `lower` bytes lower than usual, and stores what is in them then.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn hold_vectors(load: *const Vectors, found: *mut Vectors, function: extern "C" fn(), lower: usize) {
    naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "push rbx",
        "push rbx",
        "mov rbx, rsi",
        "and rsp, -64",
        "sub rsp, rcx",
        "vmovups ymm0, [rdi]",
        "vmovups ymm1, [rdi + 32]",
        "vmovups ymm2, [rdi + 64]",
        "vmovups ymm3, [rdi + 96]",
        "vmovups ymm4, [rdi + 128]",
        "vmovups ymm5, [rdi + 160]",
        "vmovups ymm6, [rdi + 192]",
        "vmovups ymm7, [rdi + 224]",
        "call rdx",
        "vmovups [rbx], ymm0",
        "vmovups [rbx + 32], ymm1",
        "vmovups [rbx + 64], ymm2",
        "vmovups [rbx + 96], ymm3",
        "vmovups [rbx + 128], ymm4",
        "vmovups [rbx + 160], ymm5",
        "vmovups [rbx + 192], ymm6",
        "vmovups [rbx + 224], ymm7",
        "vzeroupper",
        "mov rbx, [rbp - 8]",
        "leave",
        "ret",
    )
}

#[cfg(target_arch = "x86")]
#[unsafe(naked)]
unsafe extern "C" fn hold_vectors(load: *const Vectors, found: *mut Vectors, function: extern "C" fn(), lower: usize) {
    naked_asm!(
        "push ebp",
        "mov ebp, esp",
        "push ebx",
        "mov ecx, [ebp + 8]",
        "mov ebx, [ebp + 12]",
        "mov edx, [ebp + 16]",
        "and esp, -64",
        "sub esp, [ebp + 20]",
        "vmovups ymm0, [ecx]",
        "vmovups ymm1, [ecx + 32]",
        "vmovups ymm2, [ecx + 64]",
        "vmovups ymm3, [ecx + 96]",
        "vmovups ymm4, [ecx + 128]",
        "vmovups ymm5, [ecx + 160]",
        "vmovups ymm6, [ecx + 192]",
        "vmovups ymm7, [ecx + 224]",
        "call edx",
        "vmovups [ebx], ymm0",
        "vmovups [ebx + 32], ymm1",
        "vmovups [ebx + 64], ymm2",
        "vmovups [ebx + 96], ymm3",
        "vmovups [ebx + 128], ymm4",
        "vmovups [ebx + 160], ymm5",
        "vmovups [ebx + 192], ymm6",
        "vmovups [ebx + 224], ymm7",
        "vzeroupper",
        "mov ebx, [ebp - 4]",
        "leave",
        "ret",
    )
}

/// Values that differ from register to register, and with `seed`.
fn values(seed: u8) -> Vectors {
    std::array::from_fn(|register| {
        std::array::from_fn(|byte| (register as u8 * 32 + byte as u8).wrapping_mul(7) ^ seed)
    })
}

/// Calls `function` with known values in the vector registers, and returns whether they are what they were.
fn keeps_vectors(function: extern "C" fn(), lower: usize, seed: u8) -> bool {
    let (load, mut found) = (values(seed), values(!seed));
    // SAFETY: both are live and large enough, the CPU has AVX (checked by the tests), and the function takes nothing.
    unsafe { hold_vectors(&raw const load, &raw mut found, function, lower) };
    found == load
}

fn has_avx() -> bool {
    let has_avx = std::arch::is_x86_feature_detected!("avx");
    if !has_avx {
        eprintln!("skipped: this CPU has no AVX");
    }
    has_avx
}

/// Where a thread is when it meets a breakpoint, and where the signal's frame lies then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stack {
    /// On its own stack, and the frame on the alternate one.
    FrameElsewhere,
    /// On its own stack, and the frame directly below.
    FrameBelow,
    /// In a handler on the alternate stack, and the frame below on the same.
    InHandlerOnAlternate,
}

const STACKS: [Stack; 3] = [Stack::FrameElsewhere, Stack::FrameBelow, Stack::InHandlerOnAlternate];

static IN_HANDLER: AtomicUsize = AtomicUsize::new(0);

/// Runs [`call_and_hold`] on the alternate stack.
extern "C" fn on_signal(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    call_and_hold();
    IN_HANDLER.fetch_add(1, Ordering::SeqCst);
}

impl Stack {
    /// Prepares the calling thread, once.
    fn prepare(self) {
        set_alternate_stack((self != Self::FrameBelow).then(|| vec![0; 256 << 10].leak()));
        if self == Self::InHandlerOnAlternate {
            set(libc::SIGUSR1, &detailed(on_signal, libc::SA_ONSTACK));
        }
    }

    fn call(self) {
        match self {
            Self::FrameElsewhere | Self::FrameBelow => call_and_hold(),
            Self::InHandlerOnAlternate => raise(libc::SIGUSR1),
        }
    }
}

/// Calls the traced functions, and checks results and registers at every alignment of the stack.
fn call_and_hold() {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let turn = TURN.fetch_add(1, Ordering::Relaxed);
    assert_eq!(touched(1, 2, 3, 4, 5, 6, 2), 42);
    if std::arch::is_x86_feature_detected!("avx") {
        let lower = turn % (64 / WORD) * WORD;
        assert!(keeps_vectors(transparent, lower, turn.to_le_bytes()[0]), "{lower} bytes lower");
    }
}

/// Toggles while two threads call and hold values, in one situation of their stacks, until they have met the breakpoints that the test is about.
fn hold_under_load(builder: Builder, stack: Stack, is_enough: impl Fn(&TrapStats) -> bool) -> TrapStats {
    let tracer = builder.build().expect("a tracer");
    let filter = Filter::name("*::touched*").or_name("*::transparent*");
    let describe = |name| tracer.ops(name).filter(filter.clone()).disabled();
    let stays = Watched::new(describe("stays").register(count_touched).expect("the functions are there"), 0);
    let toggled = describe("toggled").register(|_call| ()).expect("the functions are there");
    let mut is_prepared = false;
    let workers = Workers::start(2, &[0], move || {
        if !is_prepared {
            stack.prepare();
            is_prepared = true;
        }
        stack.call();
    });
    for round in 0..10 {
        stays.enable();
        for _ in 0..20 {
            toggled.enable().expect("enabling");
            workers.await_calls(10);
            toggled.disable().expect("disabling");
            workers.await_calls(10);
        }
        // Without a rest, so that pokes are interrupted half way where threads share a processor.
        while round == 9 && !is_enough(&tracer.stats().traps) {
            toggled.enable().expect("enabling");
            toggled.disable().expect("disabling");
        }
        workers.await_each();
        stays.disable();
        workers.await_calls(10);
    }
    workers.await_each();
    workers.assert_exact(0);
    tracer.stats().traps
}

/// Counts the calls of `touched` only: one a turn.
fn count_touched(call: &mut Call<'_>) {
    if call.site() == Addr::new(touched as *const () as u64) {
        count::<0>(call);
    }
}

#[test]
fn without_slots_every_emulated_call_is_pushed_and_nothing_is_missed_or_overwritten() {
    in_child("without_slots_every_emulated_call_is_pushed_and_nothing_is_missed_or_overwritten", || {
        has_avx();
        for stack in STACKS {
            let traps = hold_under_load(Tracer::builder().slot_limit(0), stack, |traps| traps.overflows > 0);
            assert!(traps.overflows > 0, "{stack:?}: {traps:?}");
            assert_eq!(traps.max_depth, 0, "{stack:?}: {traps:?}");
        }
        assert!(IN_HANDLER.load(Ordering::SeqCst) > 0);
    });
}

#[test]
fn with_slots_nothing_is_missed_or_overwritten_on_any_stack() {
    in_child("with_slots_nothing_is_missed_or_overwritten_on_any_stack", || {
        has_avx();
        for stack in STACKS {
            let traps = hold_under_load(Tracer::builder(), stack, |traps| traps.max_depth > 0);
            assert!(traps.max_depth > 0, "{stack:?}: {traps:?}");
            assert_eq!(traps.overflows, 0, "{stack:?}: {traps:?}");
        }
        assert!(IN_HANDLER.load(Ordering::SeqCst) > 0);
    });
}

// Interruptions between a breakpoint and its trampoline.

/// The functions of the interrupted code and of the three handlers; their calls are counted apart, for they interrupt each other.
fn watch_of(site: Addr) -> Option<usize> {
    let functions = [touched as *const (), first as *const (), second as *const (), third as *const ()];
    functions.iter().position(|function| Addr::new(*function as u64) == site)
}

/// Calls of handlers that had to be seen.
static DUE: AtomicU64 = AtomicU64::new(0);

fn signal_of(watch: usize) -> c_int {
    libc::SIGRTMIN() + 8 + c_int::try_from(watch).expect("small")
}

/// Calls the function that belongs to the signal, and judges the call on the spot.
extern "C" fn calling_handler(signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    let watch = usize::try_from(signal - signal_of(0)).expect("one of ours");
    let mut tallies = [Tally::default(); WATCHED];
    judge(&[watch], &mut tallies, || match watch {
        1 => assert_eq!(first(1), 2),
        2 => assert_eq!(second(1), 3),
        _ => assert_eq!(third(1), 4),
    });
    assert!(tallies[watch].is_exact(), "{:?}", tallies[watch]);
    DUE.fetch_add(tallies[watch].due, Ordering::Relaxed);
}

/// How often each signal is sent: seldom enough that the thread comes to do something else. Signals take longer at 32 bit.
const PERIOD_US: u32 = if cfg!(target_arch = "x86") { 400 } else { 100 };

/// Sends a signal to the thread that started it, again and again. What arrives while a breakpoint is handled interrupts the first instruction behind.
struct Timer(libc::timer_t);

// SAFETY: the number of a timer means the same in every thread.
unsafe impl Send for Timer {}

impl Timer {
    fn start(signal: c_int, period_us: u32) -> Self {
        // SAFETY: all zero is a valid event.
        let mut event: libc::sigevent = unsafe { mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_notify_thread_id = own_tid();
        let mut timer = Self(ptr::null_mut());
        // SAFETY: both are live locals.
        let result = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer.0) };
        assert_eq!(result, 0);
        let period = libc::timespec { tv_sec: 0, tv_nsec: libc::c_long::from(period_us as i32) * 1000 };
        let setting = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: the timer exists, and the setting is a live local.
        let result = unsafe { libc::timer_settime(timer.0, 0, &raw const setting, ptr::null_mut()) };
        assert_eq!(result, 0);
        timer
    }
}

impl Clone for Timer {
    fn clone(&self) -> Self {
        unreachable!("threads start their own")
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer exists.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Interrupts a thread with three kinds of signals, whose handlers interrupt each other, until `is_enough`, or for a few seconds and until `is_least`:
/// less than that shows nothing, however busy the machine is.
fn interrupt_until(
    builder: Builder,
    stack: Stack,
    is_enough: impl Fn(&TrapStats) -> bool,
    is_least: impl Fn(&TrapStats) -> bool,
) -> TrapStats {
    for watch in 1..WATCHED {
        set(signal_of(watch), &detailed(calling_handler, libc::SA_RESTART));
    }
    let tracer = builder.build().expect("a tracer");
    let filter = ["touched", "first", "second", "third"]
        .into_iter()
        .fold(Filter::default(), |filter, name| filter.or_name(&format!("*overflow::{name}")));
    let ops = tracer.ops("watched").filter(filter).disabled().register(|call| {
        if let Some(watch) = watch_of(call.site()) {
            count_for(watch);
        }
    });
    // It stays while another one on its sites comes and goes: each call is due, the emulated ones as well.
    let stays = Watched::by_function(ops.expect("the functions are there"), vec![0, 1, 2, 3]);
    stays.enable();
    let toggled = tracer.ops("toggled").disabled().register(|_call| ()).expect("all functions");

    let mut timers = None;
    let worker = Workers::start(1, &[0], move || {
        timers.get_or_insert_with(|| {
            stack.prepare();
            [1, 2, 3].map(|watch| Timer::start(signal_of(watch), PERIOD_US + watch as u32))
        });
        assert_eq!(touched(1, 2, 3, 4, 5, 6, 2), 42);
    });
    let begin = Instant::now();
    let is_done =
        |traps: &TrapStats| is_enough(traps) || (is_least(traps) && begin.elapsed() > Duration::from_secs(15));
    while !is_done(&tracer.stats().traps) {
        for _ in 0..20 {
            toggled.enable().expect("enabling");
            toggled.disable().expect("disabling");
        }
    }
    stays.disable();
    worker.await_each();
    worker.assert_exact(0);
    assert!(DUE.load(Ordering::Relaxed) > 0);
    tracer.stats().traps
}

#[test]
fn interruptions_beyond_one_slot_overflow_and_nothing_is_missed() {
    in_child("interruptions_beyond_one_slot_overflow_and_nothing_is_missed", || {
        for stack in [Stack::FrameElsewhere, Stack::FrameBelow] {
            let builder = Tracer::builder().slot_limit(1);
            let traps = interrupt_until(builder, stack, |traps| traps.overflows > 200, |traps| traps.overflows > 0);
            assert!(traps.overflows > 0 && traps.max_depth == 1, "{stack:?}: {traps:?}");
        }
    });
}

#[test]
fn interruptions_beyond_two_slots_overflow_and_nothing_is_missed() {
    in_child("interruptions_beyond_two_slots_overflow_and_nothing_is_missed", || {
        for stack in [Stack::FrameElsewhere, Stack::FrameBelow] {
            let builder = Tracer::builder().slot_limit(2);
            let traps = interrupt_until(builder, stack, |traps| traps.overflows > 20, |traps| traps.overflows > 0);
            assert!(traps.overflows > 0 && traps.max_depth == 2, "{stack:?}: {traps:?}");
        }
    });
}

#[test]
fn interruptions_use_one_slot_each_and_nothing_is_missed() {
    in_child("interruptions_use_one_slot_each_and_nothing_is_missed", || {
        for stack in [Stack::FrameElsewhere, Stack::FrameBelow] {
            let traps =
                interrupt_until(Tracer::builder(), stack, |traps| traps.max_depth >= 3, |traps| traps.max_depth >= 2);
            assert!(traps.max_depth >= 2, "{stack:?}: {traps:?}");
            assert_eq!(traps.overflows, 0, "{stack:?}: {traps:?}");
        }
    });
}

// The fact that slots are there for: what a push from a handler does at either width, without a tracer.

/// A breakpoint where a call might be.
#[unsafe(naked)]
extern "C" fn breakpoint_for_a_call() {
    naked_asm!("int3", "ret")
}

extern "C" fn called() {
    PUSHED.fetch_add(1, Ordering::SeqCst);
}

static PUSHED: AtomicUsize = AtomicUsize::new(0);

/// Emulates a call as the naive handler does: it writes the return address to the interrupted stack.
extern "C" fn push_and_call(_signal: c_int, _info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid context, which nobody else uses meanwhile.
    let registers = unsafe { &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs };
    let (ip, sp) = (REG_IP as usize, REG_SP as usize);
    registers[sp] -= size_of::<usize>() as libc::greg_t;
    let top = ptr::with_exposed_provenance_mut::<libc::greg_t>(registers[sp].cast_unsigned() as usize);
    // SAFETY: the interrupted stack is this thread's, with room below. That the kernel's frame may lie there is what the test is about.
    unsafe { top.write(registers[ip]) };
    registers[ip] = called as *const () as usize as libc::greg_t;
}

/// At how many alignments of the stack a thread has lost its vector registers.
fn corrupted_by_a_push() -> usize {
    let lost = |step: &usize| !keeps_vectors(breakpoint_for_a_call, step * WORD, 0x5a);
    (0..64 / WORD).filter(lost).count()
}

#[test]
fn i386_frame_is_overwritten_by_a_push_that_x86_64_has_a_red_zone_for() {
    in_child("i386_frame_is_overwritten_by_a_push_that_x86_64_has_a_red_zone_for", || {
        if !has_avx() {
            return;
        }
        thread::spawn(|| {
            set(libc::SIGTRAP, &detailed(push_and_call, 0));
            set_alternate_stack(None);
            let corrupted = corrupted_by_a_push();
            assert_eq!(corrupted > 0, cfg!(target_arch = "x86"), "{corrupted} times");
            assert_eq!(PUSHED.load(Ordering::SeqCst), 64 / WORD);

            set(libc::SIGTRAP, &detailed(push_and_call, libc::SA_ONSTACK));
            set_alternate_stack(Some(vec![0; 256 << 10].leak()));
            assert_eq!(corrupted_by_a_push(), 0, "the frame lies elsewhere");
        })
        .join()
        .expect("it is as expected");
    });
}
