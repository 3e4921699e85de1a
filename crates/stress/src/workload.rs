//! The traced functions and their callbacks: the Rust side of `workload/*.c` and `registers.S`.
//!
//! Owns [`Counters`], which functions and callbacks count in, and the calls into the C code. Users are the [`worker`](crate::worker), which
//! calls functions and reads counters, and the [`toggler`](crate::toggle), which registers callbacks. Invariant: traced functions and
//! callbacks run only in threads that have [entered](enter) some counters; each context of a thread has its own, so that what
//! interrupts a call does not count where the call does.

use std::{
    ffi::{c_uint, c_ulong, c_void},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicUsize},
};

use trapline_process::{Addr, CallFrame};

use crate::{plan::Consumer, registers::Vectors};

/// How many traced functions there are.
pub const FUNCTIONS: usize = 1024;
/// The first of them are probes: they change no register at all, and registers are held across their calls.
pub(crate) const PROBES: usize = 4;
/// Arguments of a function that is no probe.
pub(crate) const ARGUMENTS: usize = 8;
/// How many ops can be told apart.
pub(crate) const OPS: usize = 16;

/// What one context has counted, `struct stress_counters`. Atomic because C code counts here while Rust code holds a reference; nobody
/// else ever writes, so relaxed loads and stores are exact.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Counters {
    /// What callbacks must find as the frame's instruction pointer during the current call.
    pub(crate) behind_site: AtomicUsize,
    /// All bits in which one of them found something else.
    pub(crate) stray: AtomicUsize,
    /// How often the callback of each ops ran.
    pub(crate) seen: [AtomicUsize; OPS],
    /// How often each function ran.
    pub(crate) own: [AtomicU32; FUNCTIONS],
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            behind_site: AtomicUsize::new(0),
            stray: AtomicUsize::new(0),
            seen: [const { AtomicUsize::new(0) }; OPS],
            own: [const { AtomicU32::new(0) }; FUNCTIONS],
        }
    }
}

/// `struct stress_function`.
#[repr(C)]
struct Function {
    entry: NonNull<c_void>,
    /// The ways to call it, which are the C side's affair.
    _ways: [*const c_void; 2],
}

// SAFETY: addresses of code, which nobody writes through.
unsafe impl Sync for Function {}

/// A callback in C; its `struct stress_frame` is the [`CallFrame`].
pub(crate) type RawCallback = unsafe extern "C" fn(*mut CallFrame, *const c_void);

unsafe extern "C" {
    static stress_functions: [Function; FUNCTIONS];
    static mut stress_vectors: c_uint;
    fn stress_call(index: c_uint, arguments: *const [usize; ARGUMENTS]) -> usize;
    fn stress_enter(counters: *const Counters) -> *const Counters;
    fn stress_note(ops: usize, ip: usize);
    fn stress_count(frame: *mut CallFrame, data: *const c_void);
    fn stress_count_and_spoil(frame: *mut CallFrame, data: *const c_void);
}

// The C side's `unsigned long` is declared as `usize` here, which is what it is on Linux.
const _: () = assert!(size_of::<c_ulong>() == size_of::<usize>());

/// The name of a traced function.
pub(crate) fn name(function: usize) -> String {
    format!("stress_fn_{function:04}")
}

/// The entry of a traced function.
pub(crate) fn entry(function: usize) -> NonNull<c_void> {
    // SAFETY: the table is constant and initialised; indexing checks its bounds.
    unsafe { stress_functions[function].entry }
}

/// Length of the call at a site.
const CALL_BYTES: usize = 5;

/// The return address of a call at this site: what its callbacks find as the instruction pointer.
#[expect(clippy::cast_possible_truncation, reason = "an address of the own process")]
pub(crate) fn behind(site: Addr) -> usize {
    site.value() as usize + CALL_BYTES
}

/// The first bytes of each traced function, as they are now: as many as `endbr` and a call have.
pub(crate) fn text() -> Vec<[u8; 4 + CALL_BYTES]> {
    // SAFETY: each function is longer than that, and code can be read.
    (0..FUNCTIONS).map(|function| unsafe { entry(function).cast().read_unaligned() }).collect()
}

/// Makes `counters` those of the calling context and returns the ones before, null at first. Safe in signal handlers.
///
/// # Safety
/// `counters` must stay valid until the context has entered others, and no other context may use them; null forbids traced calls.
pub(crate) unsafe fn enter(counters: *const Counters) -> *const Counters {
    // SAFETY: the caller vouches for the pointer.
    unsafe { stress_enter(counters) }
}

/// Calls a function that is no probe.
///
/// # Safety
/// The calling context must have entered counters.
#[inline]
pub(crate) unsafe fn call(function: usize, arguments: &[usize; ARGUMENTS]) -> usize {
    debug_assert!((PROBES..FUNCTIONS).contains(&function));
    #[expect(clippy::cast_possible_truncation, reason = "there are but a thousand")]
    let index = function as c_uint;
    // SAFETY: the function exists and reads as many arguments as there are; the caller vouches for the counters.
    unsafe { stress_call(index, arguments) }
}

/// What a function that is no probe returns.
pub(crate) fn expected_result(function: usize, arguments: &[usize; ARGUMENTS]) -> usize {
    let all = arguments.iter().copied().chain([function]);
    all.reduce(|mixed, word| mixed.wrapping_mul(31).wrapping_add(word)).unwrap_or_default()
}

/// Notes that an ops was invoked for the function whose frame has this instruction pointer.
///
/// # Safety
/// The calling context must have entered counters, and `ops` must be below [`OPS`].
pub(crate) unsafe fn note(ops: usize, ip: usize) {
    // SAFETY: the caller vouches for both.
    unsafe { stress_note(ops, ip) }
}

/// The C callback of a consumer, and its data. `None` for closures.
pub(crate) fn raw_callback(consumer: Consumer, ops: usize) -> Option<(RawCallback, *const c_void)> {
    assert!(ops < OPS, "callbacks count without a check");
    let callback: RawCallback = match consumer {
        Consumer::Counter => stress_count,
        Consumer::Spoiler => stress_count_and_spoil,
        Consumer::Closure => return None,
    };
    Some((callback, std::ptr::without_provenance(ops)))
}

/// Tells [`Consumer::Spoiler`] what there is to spoil.
///
/// # Safety
/// No traced function may run meanwhile.
pub(crate) unsafe fn spoil(vectors: Vectors) {
    // SAFETY: nobody reads it, says the caller.
    unsafe { stress_vectors = vectors as c_uint }
}

#[cfg(test)]
mod tests {
    use std::{mem::offset_of, sync::atomic::Ordering::Relaxed};

    use super::*;
    use crate::registers::Registers;

    unsafe extern "C" {
        static stress_layout: [u32; 18];
    }

    #[test]
    fn both_sides_agree_about_the_layout() {
        let ours = [
            FUNCTIONS,
            PROBES,
            ARGUMENTS,
            OPS,
            size_of::<Function>(),
            offset_of!(Counters, behind_site),
            offset_of!(Counters, stray),
            offset_of!(Counters, seen),
            offset_of!(Counters, own),
            size_of::<Counters>(),
            offset_of!(CallFrame, ip),
            offset_of!(Registers, vectors),
            offset_of!(Registers, masks),
            offset_of!(Registers, x87),
            offset_of!(Registers, mxcsr),
            offset_of!(Registers, x87_control),
            offset_of!(Registers, flags),
            offset_of!(Registers, general),
        ];
        // SAFETY: a constant table of as many numbers.
        let theirs = unsafe { stress_layout };
        assert_eq!(theirs.map(|value| value as usize), ours);
    }

    #[test]
    fn functions_return_what_is_expected_and_count_themselves() {
        let counters = Counters::default();
        // SAFETY: entered below are the outer ones again, before these go.
        let outer = unsafe { enter(&raw const counters) };
        for function in PROBES..FUNCTIONS {
            let arguments: [usize; ARGUMENTS] =
                std::array::from_fn(|index| (usize::MAX / (3 * index + 7)) ^ (function << index));
            // SAFETY: counters are entered.
            let result = unsafe { call(function, &arguments) };
            assert_eq!(result, expected_result(function, &arguments), "{}", name(function));
            let runs: Vec<_> = counters.own.iter().map(|runs| runs.load(Relaxed)).collect();
            let expected: Vec<_> =
                (0..FUNCTIONS).map(|other| u32::from((PROBES..=function).contains(&other))).collect();
            assert_eq!(runs, expected);
        }
        // SAFETY: they were valid before.
        unsafe { enter(outer) };
    }

    #[test]
    fn a_result_depends_on_every_argument_its_place_and_the_function() {
        let arguments: [usize; ARGUMENTS] = std::array::from_fn(|index| 1000 + 77 * index);
        let result = expected_result(9, &arguments);
        assert_ne!(expected_result(10, &arguments), result);
        for index in 0..ARGUMENTS {
            let mut damaged = arguments;
            damaged[index] ^= 1;
            assert_ne!(expected_result(9, &damaged), result, "argument {index} changed");
            damaged = arguments;
            damaged.swap(index, (index + 1) % ARGUMENTS);
            assert_ne!(expected_result(9, &damaged), result, "argument {index} changed places");
        }
    }

    #[test]
    fn a_callback_with_another_site_than_the_called_one_is_noticed() {
        let counters = Counters::default();
        counters.behind_site.store(0x1005, Relaxed);
        // SAFETY: entered below are the outer ones again, before these go.
        let outer = unsafe { enter(&raw const counters) };
        // SAFETY: counters are entered, and 3 is an ops.
        unsafe { note(3, 0x1005) };
        assert_eq!((counters.seen[3].load(Relaxed), counters.stray.load(Relaxed)), (1, 0));
        // SAFETY: as above.
        unsafe { note(3, 0x2005) };
        assert_eq!((counters.seen[3].load(Relaxed), counters.stray.load(Relaxed)), (2, 0x3000));
        // SAFETY: they were valid before.
        unsafe { enter(outer) };
    }
}
