//! Tells the recorder what it has to see to at once, and waits until it has: objects that came or went, and a sandbox that is about to be switched on.
//!
//! Owns `trapline_changed`, which stands in for the dynamic linker's `_dl_debug_state`, and `trapline_about_to_call`, which the C library's functions
//! that can forbid system calls begin with. In a sandbox the kernel may answer a system call with an error or with death, and it cannot be asked. So
//! the recorder finds out which of the agent's calls the filter will forbid, and those are never made again; if memory is among them, everything
//! that may be a stack gets its shadow before. Invariant: both come back, whatever becomes of the recorder.

use core::sync::atomic::{AtomicI32, Ordering};

use trapline_abi::{agent::SITE_ID_OFFSET, pool::request};

use crate::{
    arch,
    events::{Pool, Watch},
    shadow,
    sys::{self, SignalsBlocked},
    thread::State,
};

/// How long a thread sleeps before it looks whether the recorder lives.
const SLICE_NS: u32 = 100_000_000;

/// Slices that a thread waits for another that asks, before it takes its turn: that one was interrupted, and left by longjmp.
const TURN_SLICES: u32 = 50;

/// The set of loaded objects has changed.
#[unsafe(no_mangle)]
extern "C" fn trapline_changed() {
    if is_before_the_change() {
        return;
    }
    let Some(pool) = Pool::current() else { return };
    ask(pool, request::OBJECTS, 0, || ());
}

/// Whether the dynamic linker is only about to change the set of objects: it reports before and after, and before there is nothing to see. It says
/// so of the main namespace only; of others each report counts.
fn is_before_the_change() -> bool {
    const CONSISTENT: i32 = 0;
    let state = arch::config_linker_state().load(Ordering::Relaxed) as *const AtomicI32;
    // SAFETY: (1) null, or a word of the dynamic linker's, which is never unloaded; (2) it is written under the lock that this thread holds.
    unsafe { state.as_ref() }.is_some_and(|state| state.load(Ordering::Relaxed) != CONSISTENT)
}

/// A function of the C library that can switch a sandbox on was called.
#[cfg(target_pointer_width = "64")]
#[repr(C)]
#[derive(Debug)]
pub struct LibraryCall {
    /// The first four, in order.
    arguments: [usize; 4],
    rax: usize,
    /// Where it returns to in the stub; the function's number is in front of it.
    stub: usize,
}

/// The same, on the stack as the caller has left it.
#[cfg(target_pointer_width = "32")]
#[repr(C)]
#[derive(Debug)]
pub struct LibraryCall {
    /// Where it returns to in the stub; the function's number is in front of it.
    stub: usize,
    return_address: usize,
    arguments: [usize; 4],
}

/// See the module's text.
///
/// # Safety
/// The pointer is the entry's.
#[unsafe(no_mangle)]
unsafe extern "C" fn trapline_about_to_call(call: *const LibraryCall) {
    #[expect(clippy::cast_possible_truncation, reason = "a small number")]
    const NUMBER_OFFSET: isize = SITE_ID_OFFSET as isize;
    // SAFETY: the entry has put it on its stack.
    let call = unsafe { &*call };
    let number = call.stub.wrapping_add_signed(NUMBER_OFFSET) as *const u32;
    // SAFETY: the stub has a number there; it may be at any address.
    let function = unsafe { number.read_unaligned() };
    let Some(filter) = filter_of(function, call.arguments) else { return };
    let Some(pool) = Pool::current() else { return };
    let _ = State::of_this_thread().ids();
    ask(pool, request::SANDBOX, filter as u64, || {
        let header = pool.header();
        let blocked = SignalsBlocked::new();
        for run in &header.blocks_to_map {
            let run = run.load(Ordering::Relaxed);
            if run == 0 {
                break;
            }
            shadow::ensure_run(run);
        }
        if filter == STRICT_MODE {
            State::of_this_thread().become_timeless();
        }
        drop(blocked);
        let forbidden = sys::calls(header.request_about.load(Ordering::Relaxed));
        arch::config_forbidden().fetch_or(forbidden, Ordering::Relaxed);
    });
}

/// In place of a filter's address. Strict mode also forbids to read the time-stamp counter.
const STRICT_MODE: usize = 0;

/// The `struct sock_fprog` that a call is about to install, or [`STRICT_MODE`]; `None` if it does nothing of that kind.
fn filter_of(function: u32, arguments: [usize; 4]) -> Option<usize> {
    const PRCTL: u32 = 0;
    const PR_SET_SECCOMP: usize = 22;
    const MODE_STRICT: usize = 1;
    const SET_MODE_STRICT: usize = 0;
    const SET_MODE_FILTER: usize = 1;
    let [first, second, third, fourth] = arguments;
    let by_prctl = |option: usize, mode: usize, filter: usize| {
        (option == PR_SET_SECCOMP).then_some(if mode == MODE_STRICT { STRICT_MODE } else { filter })
    };
    match (function, first) {
        (PRCTL, _) => by_prctl(first, second, third),
        (_, arch::SYS_PRCTL) => by_prctl(second, third, fourth),
        (_, arch::SYS_SECCOMP) if second == SET_MODE_STRICT => Some(STRICT_MODE),
        (_, arch::SYS_SECCOMP) if second == SET_MODE_FILTER => Some(fourth),
        _ => None,
    }
}

/// Asks, waits for the answer, and makes use of it. One thread at a time.
fn ask(pool: Pool, request: u32, about: u64, answered: impl FnOnce()) {
    let header = pool.header();
    let me = State::of_this_thread().ids().map_or(u32::MAX, |(_, tid)| tid);
    let mut watch = Watch::new(pool);
    let mut slices = 0;
    // Acquire: pairs with the Release of the thread before.
    while let Err(other) = header.requester.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed) {
        if !pool.is_open() {
            return;
        }
        if other == me || slices >= TURN_SLICES {
            header.requester.store(me, Ordering::Relaxed);
            break;
        }
        sys::futex_wait(&header.requester, other, SLICE_NS);
        slices += 1;
        watch.look(pool);
    }
    header.request.store(request, Ordering::Relaxed);
    header.request_about.store(about, Ordering::Relaxed);
    // Release: pairs with the recorder's Acquire, which then sees who asks what.
    let mine = header.requests.fetch_add(1, Ordering::Release).wrapping_add(1);
    pool.ring();
    let mut watch = Watch::new(pool);
    while pool.is_open() {
        // Acquire: pairs with the recorder's Release; what it has written is there.
        let seen_to = header.answered.load(Ordering::Acquire);
        if seen_to.wrapping_sub(mine).cast_signed() >= 0 {
            answered();
            break;
        }
        sys::futex_wait(&header.answered, seen_to, SLICE_NS);
        if header.answered.load(Ordering::Relaxed) == seen_to {
            watch.look(pool);
        }
    }
    // Release: pairs with the Acquire of the next one.
    header.requester.store(0, Ordering::Release);
    sys::futex_wake_all(&header.requester);
}
