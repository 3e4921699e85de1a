//! A signal handler may come between any two instructions of the agent, record calls of its own, take chunks, and leave by longjmp.
//!
//! Exhaustive: a call is single-stepped while the agent changes chunks in the middle of it, once for each instruction, and at that instruction the
//! handler does its work. Then the chunks are looked at: every record is there, once, in its place.

mod common;

use std::{
    arch::global_asm,
    mem::{offset_of, zeroed},
    ptr,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

use common::{CHUNK_RECORDS, Contents, Counters, Pool, calls, in_thread, stub_one, stub_tail, stub_two, thread, tid};
use trapline_abi::{
    pool::{CHUNK_BYTES, OnFull},
    thread::Thread,
};

// Calls the function in rdi with the trap flag on. A handler may go on at `stepped_landing`, as longjmp would.
global_asm!(
    r#"
    .pushsection .text.stepped,"ax",@progbits
    .globl call_stepped
call_stepped:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 8
    mov qword ptr [rip + stepped_stack], rsp
    pushfq
    or dword ptr [rsp], 0x100
    popfq
    call rdi
    pushfq
    and dword ptr [rsp], ~0x100
    popfq
    .globl stepped_landing
stepped_landing:
    add rsp, 8
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .popsection
    .pushsection .bss.stepped,"aw",@nobits
    .p2align 3
    .globl stepped_stack
stepped_stack:
    .zero 8
    .popsection
    "#
);

unsafe extern "C" {
    fn call_stepped(function: unsafe extern "C" fn());
    fn stepped_landing();
    static stepped_stack: AtomicU64;
}

/// Single steps so far.
static STEP: AtomicU64 = AtomicU64::new(0);
/// At which one the handler does its work; `DONE` when it has.
static AT: AtomicU64 = AtomicU64::new(0);
/// How many calls it makes.
static NESTED: AtomicU64 = AtomicU64::new(0);
/// Whether it leaves by longjmp.
static LEAVES: AtomicU64 = AtomicU64::new(0);
/// System calls that were stepped over.
static SYSCALLS: AtomicUsize = AtomicUsize::new(0);

const DONE: u64 = u64::MAX;
const TRAP_FLAG: i64 = 0x100;

extern "C" fn on_step(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives every handler with SA_SIGINFO such a context.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = AT.load(Ordering::Relaxed);
    if at == DONE {
        registers[libc::REG_EFL as usize] &= !TRAP_FLAG;
        return;
    }
    let next = registers[libc::REG_RIP as usize] as *const [u8; 2];
    // SAFETY: the instruction that comes next; code goes on behind it.
    if unsafe { next.read_unaligned() } == [0x0f, 0x05] {
        SYSCALLS.fetch_add(1, Ordering::Relaxed);
    }
    if STEP.fetch_add(1, Ordering::Relaxed) != at {
        return;
    }
    AT.store(DONE, Ordering::Relaxed);
    registers[libc::REG_EFL as usize] &= !TRAP_FLAG;
    calls(NESTED.load(Ordering::Relaxed), stub_two);
    if LEAVES.load(Ordering::Relaxed) != 0 {
        registers[libc::REG_RIP as usize] = stepped_landing as *const () as i64;
        // SAFETY: `call_stepped` has written it.
        registers[libc::REG_RSP as usize] = unsafe { &stepped_stack }.load(Ordering::Relaxed).cast_signed();
    }
}

/// What is left of a chunk's places when the call begins: its entry and its return are two records.
#[derive(Clone, Copy, Debug)]
enum Left {
    /// There is no chunk yet.
    NoChunk,
    /// So many places.
    Places(u64),
}

struct Case {
    left: Left,
    nested: u64,
    leaves: bool,
    on_full: OnFull,
    chunks: usize,
}

/// What became of a call.
struct Outcome {
    /// Whether the handler came.
    has_come: bool,
    /// Single steps and system calls up to there, or to the end.
    steps: u64,
    syscalls: usize,
    /// Records that were there before.
    before: u64,
    /// What is there now.
    contents: Result<Contents, String>,
    /// What was dropped or overwritten.
    lost: u64,
}

fn handle_steps() {
    // SAFETY: all zero is a value.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = on_step as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler is the one above, and only one thread traps.
    assert_eq!(unsafe { libc::sigaction(libc::SIGTRAP, &raw const action, ptr::null_mut()) }, 0);
}

/// Calls a function, step by step. Returns whether the handler came.
fn step(function: unsafe extern "C" fn(), at: u64, nested: u64, leaves: bool) -> bool {
    STEP.store(0, Ordering::Relaxed);
    AT.store(at, Ordering::Relaxed);
    NESTED.store(nested, Ordering::Relaxed);
    LEAVES.store(u64::from(leaves), Ordering::Relaxed);
    SYSCALLS.store(0, Ordering::Relaxed);
    // SAFETY: a function of no arguments, that keeps to the calling convention.
    unsafe { call_stepped(function) };
    let has_come = AT.load(Ordering::Relaxed) == DONE;
    AT.store(DONE, Ordering::Relaxed);
    has_come
}

/// One call, in which the handler comes at this step.
fn call(case: &Case, at: u64) -> Outcome {
    let pool = Pool::new(case.chunks, case.on_full);
    in_thread(|| {
        handle_steps();
        // Its number, its stack's shadow and its first chunk are there afterwards, as in any thread that has run for a while.
        let before = match case.left {
            Left::NoChunk => 0,
            Left::Places(left) => {
                calls((CHUNK_RECORDS as u64 - left) / 2, stub_two);
                if left % 2 == 1 {
                    calls(1, common::stub_point);
                }
                CHUNK_RECORDS as u64 - left
            }
        };
        let has_come = step(stub_one, at, case.nested, case.leaves);
        let (steps, syscalls) = (STEP.load(Ordering::Relaxed), SYSCALLS.load(Ordering::Relaxed));
        calls(3, stub_two);
        let header = pool.header();
        let lost = header.lost_full.load(Ordering::Relaxed) + header.lost_overwritten.load(Ordering::Relaxed);
        Outcome { has_come, steps, syscalls, before, contents: pool.contents(), lost }
    })
}

/// Every step there is. Returns how many.
fn every_step(case: &Case, judge: impl Fn(&Contents, u64, u64, bool) -> Result<(), String>) -> u64 {
    for at in 0.. {
        let Outcome { has_come, before, contents, lost, .. } = call(case, at);
        let judged = contents.and_then(|contents| judge(&contents, before, lost, has_come));
        assert_eq!(judged, Ok(()), "at step {at}");
        if !has_come {
            return at;
        }
    }
    unreachable!("a call ends")
}

/// All records of a call whose handler came back.
fn judge_whole(case: &Case, contents: &Contents, before: u64, lost: u64, has_come: bool) -> Result<(), String> {
    let nested = if has_come { case.nested } else { 0 };
    let expected = before + 2 + 2 * nested + 2 * 3;
    let is_odd = u64::from(before % 2 == 1);
    if contents.records() + lost != expected || contents.holes + contents.broken != 0 {
        return Err(format!("{expected} records and none is torn, but: lost {lost}, {contents:?}"));
    }
    if lost == 0 && (contents.calls[&1] != 1 || contents.exits * 2 + is_odd != expected) {
        return Err(format!("{contents:?}"));
    }
    if contents.not_full > 1 || contents.unused + contents.said_to_be_free != 0 {
        return Err(format!("a chunk was left behind: {contents:?}"));
    }
    Ok(())
}

/// The lengths of work in the handler: it uses the same chunk, it needs the next, and the one after that.
const WORK: [u64; 3] = [1, CHUNK_RECORDS as u64 / 2 + 1, CHUNK_RECORDS as u64 + 3];

#[test]
fn a_handler_at_any_instruction_of_a_chunk_change_loses_nothing() {
    for nested in WORK {
        for left in [Left::Places(0), Left::Places(1)] {
            let case = Case { left, nested, leaves: false, on_full: OnFull::Block, chunks: 6 };
            let steps = every_step(&case, |contents, before, lost, has_come| {
                let judged = judge_whole(&case, contents, before, lost, has_come);
                if lost == 0 { judged } else { Err(format!("lost {lost}")) }
            });
            assert!(steps > 100, "{steps} steps with {left:?}");
        }
    }
}

#[test]
fn a_handler_at_any_instruction_of_a_threads_first_call_loses_nothing() {
    let case = Case { left: Left::NoChunk, nested: 2, leaves: false, on_full: OnFull::Block, chunks: 6 };
    every_step(&case, |contents, before, lost, has_come| {
        // A call whose shadow is not there yet is only deeper than another: nothing is recorded otherwise.
        judge_whole(&case, contents, before, lost, has_come)
    });
}

#[test]
fn a_chunk_change_makes_no_system_call() {
    let case = Case { left: Left::Places(1), nested: 0, leaves: false, on_full: OnFull::Block, chunks: 6 };
    let whole = call(&case, DONE - 1);
    assert!(!whole.has_come && whole.contents.is_ok());
    assert!(whole.steps > 100, "{} steps", whole.steps);
    assert_eq!(whole.syscalls, 0);
    // The steps see them: a thread's first call asks for its number, and maps.
    assert!(call(&Case { left: Left::NoChunk, ..case }, DONE - 1).syscalls >= 2);
}

#[test]
fn what_a_handler_overwrites_or_drops_is_counted() {
    for on_full in [OnFull::Drop, OnFull::Overwrite] {
        let case = Case { left: Left::Places(1), nested: WORK[2], leaves: false, on_full, chunks: 2 };
        every_step(&case, |contents, before, lost, has_come| judge_whole(&case, contents, before, lost, has_come));
    }
}

#[test]
fn a_handler_that_leaves_by_longjmp_costs_one_record_and_one_chunk_at_most() {
    for nested in [WORK[0], WORK[2]] {
        for left in [Left::Places(0), Left::Places(1)] {
            let case = Case { left, nested, leaves: true, on_full: OnFull::Block, chunks: 6 };
            every_step(&case, |contents, before, lost, has_come| {
                if !has_come {
                    return judge_whole(&case, contents, before, lost, has_come);
                }
                // Of the call that was left: nothing, its entry, or both.
                let others = before + 2 * nested + 2 * 3;
                let is_complete = (others..=others + 2).contains(&contents.records()) && lost == 0;
                let is_sound = contents.broken == 0 && contents.holes <= 1;
                let left_behind = contents.not_full + contents.unused - 1;
                let is_all_found = left_behind <= 1 && contents.said_to_be_free <= 1;
                if is_complete && is_sound && is_all_found { Ok(()) } else { Err(format!("{others}: {contents:?}")) }
            });
        }
    }
}

/// What the counters have of a call of the function of site 1 or 4, and of those of site 2 that a handler made at this step and that came before and after. Returns
/// whether the handler came.
fn judge_counted(
    function: unsafe extern "C" fn(),
    before: u64,
    at: u64,
    nested: u64,
    leaves: bool,
    is_recorded: bool,
) -> Result<bool, String> {
    let counters = Counters::new();
    in_thread(|| {
        handle_steps();
        calls(before, stub_two);
        if is_recorded {
            counters.record(&[1, 2, 4]);
        }
        let has_come = step(function, at, nested, leaves);
        calls(3, stub_two);
        let region = counters.region(tid());
        let [one, two, tail] = [1, 2, 4].map(|site| {
            let counter = counters.counter(region, site);
            let timed: u64 = counter.durations.iter().map(|bucket| u64::from(bucket.load(Ordering::Relaxed))).sum();
            let [total, own, sum] =
                [&counter.total, &counter.own, &counter.sum].map(|ticks| ticks.load(Ordering::Relaxed));
            (counter.calls.load(Ordering::Relaxed), timed, total, own, sum)
        });
        let found = format!("{one:?} {two:?} {tail:?} {:?}", counters.open(region));
        let nested = if has_come { nested } else { 0 };
        let is_tail = function as usize == stub_tail as *const () as usize;
        let (called, other) = if is_tail { (tail, one) } else { (one, tail) };
        let of_two = before + nested + 3 + u64::from(is_tail);
        let has_left = has_come && leaves;
        let is_counted = if has_left {
            called.0 <= 1 && (of_two - 1..=of_two).contains(&two.0)
        } else {
            (called.0, two.0) == (1, of_two)
        };
        let is_timed = called.1 == called.0 && two.1 == two.0 || has_left && called.1 <= called.0 && two.1 <= two.0;
        // None of them calls itself, so each was the outermost of its function: but the handler's, where the function jumps to the same that the handler calls.
        let is_whole = |(_, _, total, own, sum): (u64, u64, u64, u64, u64), is_outermost: bool| {
            has_left || own <= sum && total <= sum && (total == sum || !is_outermost)
        };
        let is_whole = is_whole(called, true) && is_whole(two, !is_tail);
        let is_quiet =
            other.0 == 0 && counters.open(region) == (0, 0) && counters.header().uncounted.load(Ordering::Relaxed) == 0;
        let contents = counters.pool.contents()?;
        let recorded = |site| contents.calls.get(&site).copied().unwrap_or(0);
        let is_in_trace = if is_recorded {
            let of_called = recorded(if is_tail { 4 } else { 1 });
            (of_called, recorded(2)) == (1, of_two - before) && contents.exits == contents.calls.values().sum()
        } else {
            contents == Contents::default()
        };
        if is_counted && is_timed && is_whole && is_quiet && is_in_trace {
            Ok(has_come)
        } else {
            Err(format!("{found} {contents:?}"))
        }
    })
}

#[test]
fn a_handler_at_any_instruction_of_a_counted_call_loses_nothing() {
    for (function, least) in [(stub_one as unsafe extern "C" fn(), 80), (stub_tail, 160)] {
        let cases = [(5, 2, false, false), (0, 1, false, false), (5, 2, true, false), (5, 2, false, true)];
        for (before, nested, leaves, is_recorded) in cases {
            let mut at = 0;
            loop {
                let judged = judge_counted(function, before, at, nested, leaves, is_recorded);
                assert!(
                    judged.is_ok(),
                    "{before} before, {nested} nested at step {at}, left: {leaves}, recorded: {is_recorded}: {judged:?}"
                );
                if judged == Ok(false) {
                    break;
                }
                at += 1;
            }
            assert!(at > least, "{at} steps");
        }
    }
}

#[test]
fn a_function_that_calls_itself_is_timed_once() {
    let counters = Counters::new();
    in_thread(|| {
        // SAFETY: it keeps to the calling convention.
        unsafe { common::stub_recursive(9) };
        let counter = counters.counter(counters.region(tid()), 5);
        let [calls, total, own, sum] =
            [&counter.calls, &counter.total, &counter.own, &counter.sum].map(|word| word.load(Ordering::Relaxed));
        assert_eq!(calls, 10);
        assert_eq!(total, own, "what it called was itself");
        assert!(sum > 2 * total, "{sum} and {total}");
    });
}

#[test]
fn what_is_selected_is_recorded_beside_what_is_counted_and_nothing_else() {
    let counters = Counters::new();
    in_thread(|| {
        calls(7, stub_one);
        counters.record(&[3, 5]);
        calls(4, stub_one);
        calls(2, common::stub_point);
        // SAFETY: it keeps to the calling convention.
        unsafe { common::stub_recursive(9) };
        let contents = counters.pool.contents().expect("chunks of this thread");
        assert_eq!((contents.calls.len(), contents.calls[&3], contents.calls[&5], contents.exits), (2, 2, 10, 10));
        let region = counters.region(tid());
        let counted = [1, 3, 5].map(|site| counters.counter(region, site).calls.load(Ordering::Relaxed));
        assert_eq!(counted, [11, 2, 10]);
    });
}

/// The looks at the chunks find what they are there to find.
#[test]
fn a_record_in_another_threads_chunk_or_a_hole_is_found() {
    let pool = Pool::new(3, OnFull::Block);
    in_thread(|| {
        calls(CHUNK_RECORDS as u64 / 2 + 5, stub_one);
        // SAFETY: this thread's own state.
        let state: Thread = unsafe { *thread() };
        assert!(pool.contents().is_ok());
        let chunk = pool.chunk_at(state.position).unwrap();
        let place = &pool.records(chunk)[3];
        let record = place.swap(0, Ordering::Relaxed);
        let contents = pool.contents().unwrap();
        assert_eq!((contents.holes, contents.records()), (1, CHUNK_RECORDS as u64 + 9));
        place.store(record, Ordering::Relaxed);
        let free = (0..3).find(|index| pool.state(*index) == 0).unwrap();
        pool.records(free)[0].store(record, Ordering::Relaxed);
        assert!(pool.contents().unwrap_err().contains("free chunk"));
    });
    const { assert!(offset_of!(Thread, position) == 0 && CHUNK_BYTES == 8 * CHUNK_RECORDS) };
}
