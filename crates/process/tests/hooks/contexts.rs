//! Callbacks that call traced functions, and signal handlers that interrupt callbacks.
//!
//! A callback that calls a traced function, itself or through others, must not be entered without end: such calls are left out, and counted. A signal
//! handler that interrupts a callback is another context: what it calls is seen.

use std::{
    hint::black_box,
    mem,
    sync::atomic::{AtomicUsize, Ordering},
};

use libc::{c_int, c_void, siginfo_t};
use trapline_process::{Filter, Tracer, traceable};

use crate::common::{
    calls::{count, seen},
    child::in_child,
    signals::{self, Handler, PlainHandler, breakpoint, raise},
};

traceable! {
    extern "C" fn outer(a: usize) -> usize {
        black_box(a) + 1
    }

    extern "C" fn inner(a: usize) -> usize {
        black_box(a) + 10
    }

    /// What signal handlers call.
    extern "C" fn from_handler(a: usize) -> usize {
        black_box(a) + 100
    }
}

#[test]
fn a_callback_that_calls_traced_functions_is_entered_once_and_the_rest_is_counted() {
    in_child("contexts::a_callback_that_calls_traced_functions_is_entered_once_and_the_rest_is_counted", || {
        let tracer = Tracer::new().expect("a tracer");
        let ops = tracer.ops("recursive").filter(Filter::name("*::outer*").or_name("*::inner*")).register(|call| {
            count::<0>(call);
            assert_eq!(outer(1) + inner(1), 2 + 11);
        });
        let ops = ops.expect("the functions are there");
        for calls in 1..=100 {
            assert_eq!(outer(3), 4);
            assert_eq!((seen(0), ops.recursions() as u64), (calls, 2 * calls));
        }
        // What the callback calls is not lost to others: only the context is busy.
        std::thread::spawn(|| assert_eq!((inner(3), seen(0)), (13, 1))).join().expect("it is right");
        assert_eq!(ops.recursions(), 202);
    });
}

#[test]
fn a_recursion_safe_callback_is_entered_again() {
    in_child("contexts::a_recursion_safe_callback_is_entered_again", || {
        let tracer = Tracer::new().expect("a tracer");
        let ops = tracer.ops("re-entrant").filter(Filter::name("*::outer*")).recursion_safe().register(|call| {
            count::<0>(call);
            if !seen(0).is_multiple_of(3) {
                assert_eq!(outer(1), 2);
            }
        });
        let ops = ops.expect("the function is there");
        assert_eq!(outer(3), 4);
        assert_eq!((seen(0), ops.recursions()), (3, 0));
    });
}

/// What a handler may be installed by.
#[derive(Clone, Copy, Debug)]
enum Installed {
    /// sigaction(2) with `SA_SIGINFO`.
    Detailed,
    /// sigaction(2) without.
    Plain,
    /// signal(2).
    Signal,
}

extern "C" fn detailed_handler(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid description.
    let described = unsafe { (*info).si_signo };
    assert!(described == signal && !context.is_null());
    assert_eq!(from_handler(1), 101);
}

extern "C" fn plain_handler(signal: c_int) {
    assert!([libc::SIGUSR1, libc::SIGTRAP].contains(&signal));
    assert_eq!(from_handler(1), 101);
}

fn install(how: Installed) {
    match how {
        Installed::Detailed => drop(signals::set(libc::SIGUSR1, &signals::detailed(detailed_handler, 0))),
        Installed::Plain => drop(signals::set(libc::SIGUSR1, &signals::plain(plain_handler, 0))),
        Installed::Signal => {
            // SAFETY: the handler calls a function without side effects.
            let before = unsafe { libc::signal(libc::SIGUSR1, plain_handler as PlainHandler as usize) };
            assert_ne!(before, libc::SIG_ERR);
        }
    }
}

/// Raises a signal in the callback of an ops that is attached to what the handler calls as well.
fn interrupt_callbacks(how: Installed, before_the_tracer: bool) {
    if before_the_tracer {
        install(how);
    }
    let tracer = Tracer::new().expect("a tracer");
    if !before_the_tracer {
        install(how);
    }
    let filter = Filter::name("*::outer*").or_name("*::from_handler*");
    let ops = tracer.ops("interrupted").filter(filter).register(|call| {
        let is_outer = call.site() == trapline_process::Addr::new(outer as *const () as u64);
        count::<0>(call);
        if is_outer {
            raise(libc::SIGUSR1);
        }
    });
    let ops = ops.expect("the functions are there");
    let shown = signals::shown(libc::SIGUSR1).sa_sigaction;
    assert!([detailed_handler as Handler as usize, plain_handler as PlainHandler as usize].contains(&shown), "{how:?}");
    let before = seen(0);
    for calls in 1..=50 {
        assert_eq!(outer(3), 4);
        assert_eq!((seen(0) - before, ops.recursions()), (2 * calls, 0), "{how:?}, before: {before_the_tracer}");
    }
}

#[test]
fn a_detailed_handler_is_a_context_of_its_own() {
    in_child("contexts::a_detailed_handler_is_a_context_of_its_own", || {
        interrupt_callbacks(Installed::Detailed, false);
    });
}

#[test]
fn a_handler_that_was_there_before_is_a_context_of_its_own() {
    in_child("contexts::a_handler_that_was_there_before_is_a_context_of_its_own", || {
        interrupt_callbacks(Installed::Detailed, true);
    });
}

#[test]
fn a_plain_handler_is_a_context_of_its_own() {
    in_child("contexts::a_plain_handler_is_a_context_of_its_own", || {
        interrupt_callbacks(Installed::Plain, false);
        interrupt_callbacks(Installed::Plain, true);
    });
}

#[test]
fn a_handler_set_by_signal_is_a_context_of_its_own() {
    in_child("contexts::a_handler_set_by_signal_is_a_context_of_its_own", || {
        interrupt_callbacks(Installed::Signal, false);
        interrupt_callbacks(Installed::Signal, true);
    });
}

#[test]
fn the_programs_breakpoint_handler_is_a_context_of_its_own() {
    in_child("contexts::the_programs_breakpoint_handler_is_a_context_of_its_own", || {
        signals::set(libc::SIGTRAP, &signals::plain(plain_handler, 0));
        let tracer = Tracer::new().expect("a tracer");
        let filter = Filter::name("*::outer*").or_name("*::from_handler*");
        let ops = tracer.ops("interrupted").filter(filter).register(|call| {
            let is_outer = call.site() == trapline_process::Addr::new(outer as *const () as u64);
            count::<0>(call);
            if is_outer {
                breakpoint();
            }
        });
        let ops = ops.expect("the functions are there");
        for calls in 1..=50 {
            assert_eq!(outer(3), 4);
            assert_eq!((seen(0), ops.recursions()), (2 * calls, 0));
        }
    });
}

// A function that returns twice must not be called by Rust code, so these jumps are made in C.
type JumpOut = extern "C" fn(c_int) -> c_int;

#[test]
fn handlers_that_leave_by_a_jump_do_not_use_contexts_up() {
    in_child("contexts::handlers_that_leave_by_a_jump_do_not_use_contexts_up", || {
        let library = crate::Compiled::Patchable.load("hooks_jump.c");
        // SAFETY: the fixture declares it so, and the library outlives the tracer.
        let jump_out: JumpOut = unsafe { crate::function(&library, "hooks_jump_out_of_handler") };
        // SAFETY: as above.
        let leave: PlainHandler = unsafe { crate::function(&library, "hooks_leave_by_jump") };
        let tracer = Tracer::new().expect("a tracer");
        signals::set(libc::SIGUSR2, &signals::plain(leave, 0));
        signals::set(libc::SIGUSR1, &signals::detailed(detailed_handler, 0));
        // More often than contexts are told apart.
        for _ in 0..100 {
            assert_eq!(jump_out(libc::SIGUSR2), 1);
        }
        let filter = Filter::name("*::outer*").or_name("*::from_handler*");
        let ops = tracer.ops("interrupted").filter(filter).register(|call| {
            let is_outer = call.site() == trapline_process::Addr::new(outer as *const () as u64);
            count::<0>(call);
            if is_outer {
                raise(libc::SIGUSR1);
            }
        });
        let ops = ops.expect("the functions are there");
        assert_eq!(outer(3), 4);
        assert_eq!((seen(0), ops.recursions()), (2, 0));
    });
}

#[test]
fn callbacks_that_are_left_by_a_jump_do_not_silence_their_thread() {
    in_child("contexts::callbacks_that_are_left_by_a_jump_do_not_silence_their_thread", || {
        static RAISE: AtomicUsize = AtomicUsize::new(0);
        let library = crate::Compiled::Patchable.load("hooks_jump.c");
        // SAFETY: the fixture declares it so, and the library outlives the tracer.
        let call_out: extern "C" fn(extern "C" fn(usize) -> usize) -> c_int =
            unsafe { crate::function(&library, "hooks_jump_out_of_call") };
        // SAFETY: as above.
        let leave: PlainHandler = unsafe { crate::function(&library, "hooks_leave_by_jump") };
        let tracer = Tracer::new().expect("a tracer");
        signals::set(libc::SIGUSR2, &signals::plain(leave, 0));
        let ops = tracer.ops("left").filter(Filter::name("*::outer*")).register(|call| {
            count::<0>(call);
            if RAISE.load(Ordering::SeqCst) == 1 {
                raise(libc::SIGUSR2);
            }
        });
        let ops = ops.expect("the function is there");
        for _ in 0..100 {
            RAISE.store(1, Ordering::SeqCst);
            assert_eq!(call_out(outer), 1, "the jump");
            RAISE.store(0, Ordering::SeqCst);
            let before = (seen(0), ops.recursions());
            assert_eq!(outer(3), 4);
            assert_eq!((seen(0), ops.recursions()), (before.0 + 1, before.1));
        }
        mem::forget(library);
    });
}
