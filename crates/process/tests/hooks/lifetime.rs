//! What is there before, meanwhile, and afterwards: closures, text, and the action for SIGTRAP.

use std::{
    hint::black_box,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use trapline_process::{Error, Filter, Ops, TextWriter, Tracer, sigtrap_is_ours, traceable};

use crate::{
    call_doubled,
    common::{
        calls::Workers,
        child::{PATIENCE, in_child},
        fixture::{Compiled, native},
        signals::{self, KernelAction},
    },
    toggle_under_load,
};

traceable! {
    extern "C" fn entered(a: usize) -> usize {
        black_box(a) + 1
    }
}

/// Counts how often it was dropped.
struct Droppable(Arc<AtomicUsize>);

impl Drop for Droppable {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A thread that is inside a callback, and waits there.
struct Inside {
    release: mpsc::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Inside {
    /// Registers an ops whose closure owns `owned`, and has a thread call its function.
    fn enter(tracer: &Tracer, owned: impl Send + Sync + 'static) -> (Ops, Self) {
        let ((arrive, arrived), (release, released)) = (mpsc::channel(), mpsc::channel::<()>());
        let (arrive, released) = (Mutex::new(arrive), Mutex::new(released));
        let ops = tracer.ops("blocking").filter(Filter::name("*::entered*")).register(move |_call| {
            black_box(&owned);
            arrive.lock().expect("one at a time").send(()).expect("the test waits");
            released.lock().expect("one at a time").recv().expect("the test releases");
        });
        let ops = ops.expect("the function is there");
        let thread = thread::spawn(|| assert_eq!(entered(1), 2));
        arrived.recv().expect("the callback runs");
        (ops, Self { release, thread })
    }

    fn leave(self) {
        self.release.send(()).expect("the callback waits");
        self.thread.join().expect("it found its way out");
    }
}

#[test]
fn a_closure_is_dropped_when_no_thread_is_inside_any_more() {
    in_child("lifetime::a_closure_is_dropped_when_no_thread_is_inside_any_more", || {
        let dropped = Arc::new(AtomicUsize::new(0));
        let tracer = Tracer::new().expect("a tracer");
        let (ops, inside) = Inside::enter(&tracer, Droppable(Arc::clone(&dropped)));
        drop(ops);
        assert_eq!(entered(1), 2, "it is detached");
        for _ in 0..3 {
            let error = tracer.synchronize(Duration::from_millis(20)).expect_err("a thread is inside");
            assert!(matches!(error, Error::StillInside { pending: 1, .. }), "{error}");
            assert_eq!(dropped.load(Ordering::SeqCst), 0);
        }
        inside.leave();
        tracer.synchronize(PATIENCE).expect("nobody is inside");
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
        drop(tracer);
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn a_thread_that_stays_inside_one_ops_holds_up_no_other() {
    in_child("lifetime::a_thread_that_stays_inside_one_ops_holds_up_no_other", || {
        let dropped = Arc::new(AtomicUsize::new(0));
        let tracer = Tracer::new().expect("a tracer");
        let (ops, inside) = Inside::enter(&tracer, ());
        drop(ops);
        let owned = Droppable(Arc::clone(&dropped));
        let other = tracer.ops("other").filter(Filter::name("*doubled*")).register(move |_call| {
            black_box(&owned);
        });
        drop(other.expect("the function is there"));
        let error = tracer.synchronize(Duration::from_millis(20)).expect_err("a thread is inside");
        assert!(matches!(error, Error::StillInside { pending: 1, .. }), "{error}");
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
        inside.leave();
    });
}

#[test]
fn unregistered_closures_are_dropped_while_threads_call() {
    in_child("lifetime::unregistered_closures_are_dropped_while_threads_call", || {
        const OPS: usize = 100;
        let dropped = Arc::new(AtomicUsize::new(0));
        let tracer = Tracer::new().expect("a tracer");
        let workers = Workers::start(2, &[], call_doubled);
        for _ in 0..OPS {
            let owned = Droppable(Arc::clone(&dropped));
            let ops = tracer.ops("short-lived").filter(Filter::name("*doubled*")).register(move |_call| {
                // Whoever is here keeps it: a closure that was dropped would have left.
                assert!(Arc::strong_count(&owned.0) > 1);
            });
            let ops = ops.expect("the function is there");
            workers.await_calls(10);
            drop(ops);
        }
        assert!(dropped.load(Ordering::SeqCst) > 0, "they are reclaimed on the way");
        tracer.synchronize(PATIENCE).expect("threads leave");
        assert_eq!(dropped.load(Ordering::SeqCst), OPS);
        workers.finish();
    });
}

#[test]
fn an_ops_keeps_the_tracer_alive_and_a_closure_may_own_one() {
    in_child("lifetime::an_ops_keeps_the_tracer_alive_and_a_closure_may_own_one", || {
        let tracer = Tracer::new().expect("a tracer");
        let calls = Arc::new(AtomicUsize::new(0));
        let counting = |calls: &Arc<AtomicUsize>| {
            let calls = Arc::clone(calls);
            move |_call: &mut trapline_process::Call<'_>| {
                calls.fetch_add(1, Ordering::SeqCst);
            }
        };
        let inner = tracer.ops("inner").filter(Filter::name("*::entered*")).register(counting(&calls));
        let (inner, also) = (inner.expect("it is there"), counting(&calls));
        let outer = tracer.ops("outer").filter(Filter::name("*::entered*")).register(move |call| {
            black_box(&inner);
            also(call);
        });
        let outer = outer.expect("it is there");
        drop(tracer);
        assert!(matches!(Tracer::new(), Err(Error::AlreadyRunning)));
        assert_eq!((entered(1), calls.load(Ordering::SeqCst)), (2, 2));
        drop(outer);
    });
}

/// The bytes at and behind the sites of a tracer.
fn text_of(sites: &[usize]) -> Vec<[u8; 16]> {
    let text = |site: &usize| {
        let at = std::ptr::with_exposed_provenance::<[u8; 16]>(*site);
        // SAFETY: sites are in text, which is readable, and functions that others follow.
        unsafe { at.read_unaligned() }
    };
    sites.iter().map(text).collect()
}

#[test]
fn dropping_the_tracer_puts_everything_back_and_another_can_be_made() {
    in_child("lifetime::dropping_the_tracer_puts_everything_back_and_another_can_be_made", || {
        extern "C" fn handler(_signal: libc::c_int) {}
        let _libraries: Vec<_> = [Compiled::Patchable, Compiled::Fentry, Compiled::Xray]
            .into_iter()
            .filter(|compiled| compiled.is_possible())
            .map(|compiled| compiled.load("hooks_functions.c"))
            .collect();
        // One tracer to learn where the sites are. What it leaves must be what was there.
        let functions = [call_doubled as *const () as usize, entered as *const () as usize];
        let untouched = text_of(&functions);
        let sites: Vec<usize> = Tracer::new().expect("a tracer").sites().map(|site| native(site.address)).collect();
        assert_eq!(text_of(&functions), untouched);
        let original = text_of(&sites);
        let _ = signals::set(libc::SIGTRAP, &signals::plain(handler, libc::SA_NODEFER));
        let _ = signals::set(libc::SIGUSR1, &signals::blocking_all(signals::plain(handler, 0)));
        let actions = || [libc::SIGTRAP, libc::SIGUSR1, libc::SIGSEGV].map(KernelAction::of);
        let before = actions();

        for writer in [TextWriter::ProcMem, TextWriter::Remap, TextWriter::ProcMem] {
            let tracer = Tracer::builder().text_writer(writer).build().expect("the one before is gone");
            assert!(sigtrap_is_ours());
            assert_ne!(actions(), before);
            toggle_under_load(&tracer, 20);
            let attached = tracer.ops("attached").register(|_call| ()).expect("all sites");
            assert!(text_of(&sites).iter().zip(&original).all(|(now, then)| now != then && now[0] == 0xe8));
            drop(tracer);
            drop(attached);
            assert_eq!(text_of(&sites), original, "{writer}");
            assert_eq!(actions(), before, "{writer}");
            assert!(!sigtrap_is_ours());
        }
    });
}

#[test]
fn a_tracer_that_is_dropped_while_a_thread_is_inside_leaves_it_a_way_out() {
    in_child("lifetime::a_tracer_that_is_dropped_while_a_thread_is_inside_leaves_it_a_way_out", || {
        let tracer = Tracer::new().expect("a tracer");
        let original = text_of(&[entered as *const () as usize]);
        let (ops, inside) = Inside::enter(&tracer, ());
        drop(ops);
        drop(tracer);
        assert_eq!(text_of(&[entered as *const () as usize]), original);
        // The next one works beside what was left for that thread.
        toggle_under_load(&Tracer::new().expect("the text is free"), 20);
        inside.leave();
        toggle_under_load(&Tracer::new().expect("the text is free"), 20);
    });
}

#[test]
fn what_calls_have_left_on_a_stack_does_not_hold_up_the_end() {
    in_child("lifetime::what_calls_have_left_on_a_stack_does_not_hold_up_the_end", || {
        let tracer = Tracer::new().expect("a tracer");
        // A word as an emulated or executed call pushes it: the address behind its site.
        let behind_sites: Vec<usize> = tracer.sites().map(|site| native(site.address) + 5).collect();
        let mut left = [0; 64];
        for (word, behind) in left.iter_mut().zip(behind_sites) {
            *word = behind;
        }
        black_box(&mut left);
        drop(tracer);
        assert!(!sigtrap_is_ours());
        black_box(&left);
    });
}
