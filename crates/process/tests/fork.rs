//! Processes that are started while sites change.
//!
//! A forked child has the text, the ops and the counters as they were, and none of the other threads: it must find no change half done, see its calls, and
//! be able to go on by itself. What is spawned must not notice anything. Every test runs in a process of its own.

mod common;

use std::{
    hint::black_box,
    os::unix::process::CommandExt,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering},
    },
    thread,
};

use common::{
    calls::{Changing, Watched, Workers, count, seen},
    child::{PATIENCE, in_child, wait_until},
    fixture::native,
    signals::{KernelAction, breakpoint, plain, set},
};
use trapline_process::{Filter, Ops, Tracer, sigtrap_is_ours, traceable};

traceable! {
    /// What threads call, in parent and children.
    extern "C" fn doubled(a: usize) -> usize {
        black_box(a) * 2
    }

    /// What only children call.
    extern "C" fn tripled(a: usize) -> usize {
        black_box(a) * 3
    }

    /// What a callback that forks is attached to.
    extern "C" fn forking(a: usize) -> usize {
        black_box(a) + 1
    }
}

/// How many children are forked.
const CHILDREN: usize = 100;

/// Runs `body` in a forked child, which must not be noticed by `fork`'s caller otherwise, and waits for its exit with this code.
fn expect_child(code: i32, body: impl FnOnce()) {
    expect_exit(fork(body), code);
}

/// Starts a child that runs `body` and exits with 0. A panic ends it with 101.
fn fork(body: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the C library makes its allocator usable in the child; that everything else is usable there is what is tested.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        body();
        // SAFETY: ends the process without the parent's exit handlers.
        unsafe { libc::_exit(0) };
    }
    assert!(pid > 0);
    pid
}

fn expect_exit(pid: libc::pid_t, code: i32) {
    let mut status = 0;
    // SAFETY: the status is a live local.
    let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(ended, pid);
    assert!(libc::WIFEXITED(status), "ended with wait status {status:#x}");
    assert_eq!(libc::WEXITSTATUS(status), code);
}

/// The first bytes of all sites.
fn heads(tracer: &Tracer) -> Vec<u8> {
    let head = |at| {
        let at = std::ptr::with_exposed_provenance::<u8>(at);
        // SAFETY: sites are text, which is readable. Volatile: in the parent other threads write it.
        unsafe { at.read_volatile() }
    };
    tracer.sites().map(|site| head(native(site.address))).collect()
}

fn register(tracer: &Tracer, name: &str, glob: &str, callback: fn(&mut trapline_process::Call<'_>)) -> Ops {
    tracer.ops(name).filter(Filter::name(glob)).disabled().register(callback).expect("the function is there")
}

/// A tracer whose sites change all the time, and two threads that call and judge.
struct Load {
    tracer: Tracer,
    changing: Changing,
    workers: Workers,
}

impl Load {
    fn start() -> Self {
        let tracer = Tracer::new().expect("a tracer");
        let changing = Changing::start(&tracer, &Filter::name("*doubled*"));
        let workers = Workers::start(2, &[0], || assert_eq!(doubled(21), 42));
        Self { tracer, changing, workers }
    }

    /// Ends it, when the parent's threads have missed nothing.
    fn finish(self) -> Tracer {
        self.changing.await_traps();
        self.workers.await_each();
        self.workers.assert_all_seen(0);
        self.changing.finish();
        self.tracer
    }
}

#[test]
fn forked_children_find_the_text_whole_and_see_their_calls() {
    in_child("forked_children_find_the_text_whole_and_see_their_calls", || {
        let load = Load::start();
        for _ in 0..CHILDREN {
            expect_child(0, || {
                assert!(!heads(&load.tracer).contains(&0xcc), "no change is half done");
                assert!(sigtrap_is_ours());
                let before = seen(0);
                for calls in 1..=100 {
                    assert_eq!((doubled(21), seen(0)), (42, before + calls));
                }
            });
        }
        load.finish();
    });
}

#[test]
fn forked_children_toggle_on_their_own_and_the_parent_does_not_notice() {
    in_child("forked_children_toggle_on_their_own_and_the_parent_does_not_notice", || {
        let load = Load::start();
        for _ in 0..CHILDREN {
            expect_child(0, || {
                let own = register(&load.tracer, "own", "*tripled*", count::<2>);
                for round in 1..=10 {
                    own.enable().expect("enabling");
                    assert_eq!((tripled(3), doubled(3), seen(2)), (9, 6, round));
                    own.disable().expect("disabling");
                    assert_eq!((tripled(3), seen(2)), (9, round));
                }
            });
        }
        assert_eq!((tripled(3), seen(2)), (9, 0), "the parent's text is another");
        load.finish();
    });
}

#[test]
fn a_forked_child_runs_threads_of_its_own_and_leaves_by_itself() {
    in_child("a_forked_child_runs_threads_of_its_own_and_leaves_by_itself", || {
        let load = Load::start();
        for _ in 0..10 {
            expect_child(0, || {
                let tracer = load.tracer.clone();
                let toggled = register(&tracer, "own", "*tripled*", count::<2>);
                let workers = Workers::start(2, &[2], || assert_eq!(tripled(3), 9));
                Watched::new(toggled, 2).toggle(20, &workers);
                workers.assert_exact(2);
                tracer.synchronize(PATIENCE).expect("threads leave");
            });
        }
        let tracer = load.finish();
        // The last handle is dropped in the child, and then in the parent.
        let before = heads(&tracer);
        let mut tracer = Some(tracer);
        expect_child(0, || {
            let taken = tracer.take();
            let sites: Vec<usize> = taken.iter().flat_map(Tracer::sites).map(|site| native(site.address)).collect();
            drop(taken);
            assert!(!sigtrap_is_ours() && !sites.is_empty());
            let tracer = Tracer::new().expect("the parent's is gone here");
            assert!(heads(&tracer).iter().all(|head| *head == 0x0f));
        });
        assert!(sigtrap_is_ours());
        assert_eq!(tracer.as_ref().map(heads), Some(before));
    });
}

#[test]
fn a_callback_may_fork() {
    in_child("a_callback_may_fork", || {
        static CHILD: AtomicI32 = AtomicI32::new(-1);
        let load = Load::start();
        let ops = load.tracer.ops("forking").filter(Filter::name("*forking*")).register(|_call| {
            // SAFETY: both processes go on behind the traced function's entry.
            CHILD.store(unsafe { libc::fork() }, Ordering::SeqCst);
        });
        let ops = ops.expect("the function is there");
        for _ in 0..20 {
            let result = forking(1);
            let child = CHILD.load(Ordering::SeqCst);
            if child == 0 {
                assert_eq!((result, doubled(3)), (2, 6));
                ops.disable().expect("disabling");
                // SAFETY: ends the process without the parent's exit handlers.
                unsafe { libc::_exit(0) };
            }
            assert_eq!(result, 2);
            expect_exit(child, 0);
        }
        drop(ops);
        load.finish();
    });
}

#[test]
fn threads_that_handle_breakpoints_during_a_fork_do_not_hold_up_the_child() {
    in_child("threads_that_handle_breakpoints_during_a_fork_do_not_hold_up_the_child", || {
        extern "C" fn on_breakpoint(_signal: libc::c_int) {}
        set(libc::SIGTRAP, &plain(on_breakpoint, 0));
        let tracer = Tracer::new().expect("a tracer");
        let workers = Workers::start(2, &[], breakpoint);
        for _ in 0..10 * CHILDREN {
            expect_child(0, || {
                let own = register(&tracer, "own", "*tripled*", count::<2>);
                own.enable().expect("enabling");
                assert_eq!((tripled(3), seen(2)), (9, 1));
            });
        }
        workers.finish();
    });
}

#[test]
fn handlers_that_are_replaced_during_a_fork_do_not_hold_up_the_child() {
    in_child("handlers_that_are_replaced_during_a_fork_do_not_hold_up_the_child", || {
        extern "C" fn one(_signal: libc::c_int) {}
        extern "C" fn other(_signal: libc::c_int) {}
        let _tracer = Tracer::new().expect("a tracer");
        let workers = Workers::start(2, &[], || {
            for signal in [libc::SIGTRAP, libc::SIGUSR1] {
                set(signal, &plain(one, 0));
                set(signal, &plain(other, 0));
            }
        });
        for _ in 0..10 * CHILDREN {
            expect_child(0, || {
                for signal in [libc::SIGTRAP, libc::SIGUSR1] {
                    set(signal, &plain(one, 0));
                }
                breakpoint();
            });
        }
        workers.finish();
    });
}

/// What a program that is spawned finds about signals: blocked, ignored, caught.
fn signals_of_a_program(with_code_before_exec: bool) -> Vec<u64> {
    // Without 32 and 33, which glibc takes when it first needs them, whether they were inherited as ignored or not.
    const OF_GLIBC: u64 = 0b11 << 31;
    let mut command = Command::new("cat");
    command.arg("/proc/self/status");
    if with_code_before_exec {
        let call_traced = || {
            assert_eq!(doubled(21), 42);
            Ok(())
        };
        // SAFETY: the function neither allocates nor locks.
        unsafe { command.pre_exec(call_traced) };
    }
    let output = command.output().expect("it is installed");
    assert!(output.status.success(), "{:?}", output.status);
    let status = String::from_utf8(output.stdout).expect("text");
    let fields = status.lines().filter_map(|line| line.split_once(":\t"));
    let sets = fields.filter(|(name, _)| ["SigBlk", "SigIgn", "SigCgt"].contains(name));
    sets.map(|(_, set)| u64::from_str_radix(set, 16).expect("a set of signals") & !OF_GLIBC).collect()
}

#[test]
fn spawned_programs_start_as_without_a_tracer() {
    in_child("spawned_programs_start_as_without_a_tracer", || {
        // By posix_spawn, and by fork and exec.
        let ways = [false, true];
        let expected = ways.map(signals_of_a_program);
        assert_eq!(expected[0].len(), 3);
        let load = Load::start();
        let action = KernelAction::of(libc::SIGTRAP);
        for _ in 0..CHILDREN / 2 {
            assert_eq!(ways.map(signals_of_a_program), expected);
        }
        assert_eq!(KernelAction::of(libc::SIGTRAP), action);
        load.finish();
    });
}

#[test]
fn threads_that_start_and_end_all_the_time_see_their_calls() {
    in_child("threads_that_start_and_end_all_the_time_see_their_calls", || {
        let load = Load::start();
        let end = Arc::<AtomicBool>::default();
        let threads: &'static AtomicUsize = Box::leak(Box::default());
        let told = Arc::clone(&end);
        let starter = thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                let short_lived = thread::spawn(|| {
                    assert_eq!((doubled(21), seen(0)), (42, 1));
                });
                short_lived.join().expect("it saw its call");
                threads.fetch_add(1, Ordering::Relaxed);
            }
        });
        let before = threads.load(Ordering::Relaxed);
        for _ in 0..20 {
            // Which stops all threads, the new ones as well.
            drop(register(&load.tracer, "short-lived", "*tripled*", count::<3>));
            load.tracer.synchronize(PATIENCE).expect("threads leave");
        }
        wait_until(|| threads.load(Ordering::Relaxed) >= before + 100);
        end.store(true, Ordering::Relaxed);
        starter.join().expect("it only starts threads");
        load.finish();
    });
}
