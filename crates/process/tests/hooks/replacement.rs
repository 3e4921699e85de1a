//! Functions that stand for others and call them: what returns from a call, and when, is seen without a hook at its end.

use std::{
    hint::black_box,
    mem,
    sync::atomic::{AtomicUsize, Ordering},
};

use trapline_process::{Addr, Filter, Ops, Tracer, traceable};

use crate::{
    THREADS,
    arguments::Word,
    common::{
        calls::{Watched, Workers, count},
        child::in_child,
        fixture::{Compiled, function, native},
    },
};

traceable! {
    extern "C" fn stood_for(a: Word) -> Word {
        black_box(a) + 1
    }

    extern "C" fn trigger() {
        black_box(());
    }
}

type Unary = extern "C" fn(Word) -> Word;

/// Where [`around`] calls what it stands for.
static BODY: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Calls what it stands for, and adds a thousand.
extern "C" fn around(a: Word) -> Word {
    CALLS.fetch_add(1, Ordering::Relaxed);
    unary(BODY.load(Ordering::Relaxed))(a) + 1_000
}

extern "C" fn hundred(_a: Word) -> Word {
    100
}

fn unary(address: usize) -> Unary {
    // SAFETY: all functions of this file whose addresses are kept have this signature.
    unsafe { mem::transmute::<usize, Unary>(address) }
}

fn replaced(tracer: &Tracer, glob: &str, by: Unary) -> Ops {
    let by = Addr::new(by as *const () as u64);
    // SAFETY: the functions that the tests select have the signature of both that replace them.
    unsafe { tracer.ops("replacement").filter(Filter::name(glob)).replace(by) }.expect("the function is there")
}

fn body_of(tracer: &Tracer, name: &str) -> usize {
    native(tracer.sites().find(|site| site.name.ends_with(name)).expect("the function is there").body)
}

/// Has `glob` replaced by [`around`] while other ops come and go, and then calls the body without a tracer.
fn stand_for(name: &str, glob: &str, call: Unary, expected: Word) {
    let tracer = Tracer::new().expect("a tracer");
    let body = body_of(&tracer, name);
    BODY.store(body, Ordering::Relaxed);
    let replacement = replaced(&tracer, glob, around);
    let beside = tracer.ops("beside").filter(Filter::name(glob)).disabled().register(count::<0>);
    let beside = Watched::new(beside.expect("the function is there"), 0);
    let before = CALLS.load(Ordering::Relaxed);
    let workers = Workers::start(THREADS, &[0], move || assert_eq!(call(21), expected + 1_000));
    beside.toggle(30, &workers);
    workers.assert_exact(0);
    assert!(CALLS.load(Ordering::Relaxed) > before);
    drop((replacement, beside));
    assert_eq!((call(21), unary(body)(21)), (expected, expected));
    drop(tracer);
    assert_eq!((call(21), unary(body)(21)), (expected, expected), "the body is one without a tracer, too");
}

#[test]
fn a_replacement_calls_the_function_however_its_site_was_compiled_in() {
    in_child("replacement::a_replacement_calls_the_function_however_its_site_was_compiled_in", || {
        stand_for("::stood_for", "*::stood_for*", stood_for, 22);
        for compiled in [Compiled::Patchable, Compiled::Fentry, Compiled::Xray] {
            if compiled.is_possible() {
                let library = compiled.load("hooks_functions.c");
                // SAFETY: the fixture declares it so, and the library stays until the tracer is gone.
                let double: Unary = unsafe { function(&library, "hooks_double") };
                stand_for("hooks_double", "hooks_double", double, 42);
            }
        }
    });
}

#[test]
fn a_function_stays_replaced_in_callbacks() {
    in_child("replacement::a_function_stays_replaced_in_callbacks", || {
        static IN_CALLBACK: AtomicUsize = AtomicUsize::new(0);
        let result_in_callback = || {
            trigger();
            IN_CALLBACK.load(Ordering::Relaxed)
        };
        let tracer = Tracer::new().expect("a tracer");
        let _caller = tracer.ops("caller").filter(Filter::name("*::trigger*")).register(|_call| {
            IN_CALLBACK.store(usize::try_from(stood_for(1)).expect("small"), Ordering::Relaxed);
        });
        assert_eq!(result_in_callback(), 2);
        let replacement = replaced(&tracer, "*::stood_for*", hundred);
        assert_eq!((stood_for(1), result_in_callback()), (100, 100));
        drop(replacement);

        // The control: guarded as other callbacks are, it is left out there.
        let guarded = tracer.ops("guarded").filter(Filter::name("*::stood_for*")).ip_modify().register(|call| {
            // SAFETY: both functions have the same signature.
            unsafe { call.redirect(Addr::new(hundred as *const () as u64)) };
        });
        let guarded = guarded.expect("nobody holds it");
        assert_eq!((stood_for(1), result_in_callback()), (100, 2));
        assert_eq!(guarded.recursions(), 1);
    });
}
