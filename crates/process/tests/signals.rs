//! SIGTRAP is shared with the program, and other signals are what they were (I4).
//!
//! While sites change, breakpoints are met all the time; the program's own breakpoints, its handlers and its masks must work as without a tracer.
//! Every test runs in a process of its own.

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
    io, ptr,
    sync::{
        atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use common::{
    calls::{Changing, Workers, count},
    child::{in_child, in_child_killed_by, say_last_words, wait_until},
    fixture::{Compiled, function},
    signals::{
        Handler, KernelAction, PlainHandler, action, blocking_all, breakpoint, contains, detailed, errno, full_set,
        is_blocked, is_shown_blocked, own_tid, plain, raise, send, set, set_alternate_stack, set_errno, set_mask,
        shown,
    },
};
use libc::{c_int, c_void, siginfo_t, ucontext_t};
use trapline_process::{Filter, Tracer, sigtrap_is_ours, traceable};

#[cfg(target_arch = "x86")]
use libc::{REG_EAX as REG_AX, REG_EIP as REG_IP};
#[cfg(target_arch = "x86_64")]
use libc::{REG_RAX as REG_AX, REG_RIP as REG_IP};

traceable! {
    /// What threads call.
    extern "C" fn touched(a: usize) -> usize {
        black_box(a) + 1
    }

    /// What signal handlers call. Attached to the same ops as the other.
    extern "C" fn from_handler(a: usize) -> usize {
        black_box(a) + 100
    }
}

/// A tracer whose sites change all the time.
fn start_changing() -> (Tracer, Changing) {
    let tracer = Tracer::new().expect("a tracer");
    let changing = change(&tracer);
    (tracer, changing)
}

fn change(tracer: &Tracer) -> Changing {
    Changing::start(tracer, &Filter::name("*touched*").or_name("*from_handler*"))
}

/// Two threads that call and judge.
fn callers() -> Workers {
    Workers::start(2, &[0], || assert_eq!(touched(1), 2))
}

/// A breakpoint of the program's. Returns what its handler leaves in ax.
#[unsafe(naked)]
extern "C" fn own_breakpoint() -> usize {
    naked_asm!("xor eax, eax", "int3", "ret")
}

/// Behind the int3 of [`own_breakpoint`].
fn behind_own_breakpoint() -> usize {
    own_breakpoint as *const () as usize + 3
}

static HITS: AtomicUsize = AtomicUsize::new(0);

/// Checks what the kernel says about [`own_breakpoint`], calls traced functions, and leaves 42 in ax.
extern "C" fn on_breakpoint(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    const SI_KERNEL: c_int = 0x80;
    // SAFETY: the kernel passes a valid description.
    let code = unsafe { (*info).si_code };
    assert_eq!((signal, code), (libc::SIGTRAP, SI_KERNEL));
    // SAFETY: the kernel passes a valid context, which nobody else uses meanwhile.
    let registers = unsafe { &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs };
    assert_eq!(registers[REG_IP as usize] as usize, behind_own_breakpoint());
    assert_eq!(registers[REG_AX as usize], 0);
    registers[REG_AX as usize] = 42;
    assert_eq!(from_handler(1), 101);
    HITS.fetch_add(1, Ordering::SeqCst);
}

extern "C" fn on_signal(_signal: c_int) {
    assert_eq!(from_handler(1), 101);
    HITS.fetch_add(1, Ordering::SeqCst);
}

fn hits() -> usize {
    HITS.load(Ordering::SeqCst)
}

/// Meets breakpoints of the program's while sites change and threads call.
fn meet_own_breakpoints(tracer: &Tracer, changing: &Changing, meet: impl Fn()) {
    let workers = callers();
    let before = (hits(), tracer.stats().traps.chained);
    for _ in 0..200 {
        meet();
    }
    changing.await_traps();
    workers.assert_all_seen(0);
    assert_eq!((hits() - before.0, tracer.stats().traps.chained - before.1), (200, 200));
}

fn meet_own_breakpoint() {
    assert_eq!(own_breakpoint(), 42);
}

#[test]
fn a_handler_from_before_gets_the_programs_breakpoints() {
    in_child("a_handler_from_before_gets_the_programs_breakpoints", || {
        set(libc::SIGTRAP, &detailed(on_breakpoint, 0));
        let (tracer, changing) = start_changing();
        meet_own_breakpoints(&tracer, &changing, meet_own_breakpoint);
        changing.finish();
    });
}

#[test]
fn a_handler_set_later_is_shown_and_gets_the_programs_breakpoints() {
    in_child("a_handler_set_later_is_shown_and_gets_the_programs_breakpoints", || {
        let (tracer, changing) = start_changing();
        assert_eq!(shown(libc::SIGTRAP).sa_sigaction, libc::SIG_DFL);
        let before = set(libc::SIGTRAP, &detailed(on_breakpoint, libc::SA_NODEFER));
        assert_eq!(before.sa_sigaction, libc::SIG_DFL);
        let now = shown(libc::SIGTRAP);
        assert_eq!(now.sa_sigaction, on_breakpoint as Handler as usize);
        assert_eq!(now.sa_flags & (libc::SA_SIGINFO | libc::SA_NODEFER), libc::SA_SIGINFO | libc::SA_NODEFER);
        assert!(sigtrap_is_ours());
        meet_own_breakpoints(&tracer, &changing, meet_own_breakpoint);
        changing.finish();
        drop(tracer);
        assert_eq!(KernelAction::of(libc::SIGTRAP).handler, on_breakpoint as Handler as usize);
        assert_eq!(own_breakpoint(), 42);
    });
}

#[test]
fn a_handler_set_by_signal_is_shown_and_gets_the_programs_breakpoints() {
    in_child("a_handler_set_by_signal_is_shown_and_gets_the_programs_breakpoints", || {
        let (tracer, changing) = start_changing();
        let handler = on_signal as PlainHandler as usize;
        // SAFETY: the handler calls functions only.
        let before = [handler, handler].map(|handler| unsafe { libc::signal(libc::SIGTRAP, handler) });
        assert_eq!(before, [libc::SIG_DFL, handler]);
        assert_eq!(shown(libc::SIGTRAP).sa_sigaction, handler);
        assert!(sigtrap_is_ours());
        meet_own_breakpoints(&tracer, &changing, breakpoint);
        changing.finish();
    });
}

#[test]
fn a_handler_set_behind_libcs_back_is_noticed_by_the_next_batch() {
    in_child("a_handler_set_behind_libcs_back_is_noticed_by_the_next_batch", || {
        let (tracer, changing) = start_changing();
        changing.finish();
        KernelAction::detailed(on_breakpoint).install(libc::SIGTRAP);
        assert!(!sigtrap_is_ours());
        let changing = change(&tracer);
        assert!(sigtrap_is_ours());
        assert_eq!(shown(libc::SIGTRAP).sa_sigaction, on_breakpoint as Handler as usize);
        meet_own_breakpoints(&tracer, &changing, meet_own_breakpoint);
        changing.finish();
    });
}

#[test]
fn a_library_that_is_loaded_is_interposed_too() {
    in_child("a_library_that_is_loaded_is_interposed_too", || {
        type Install = extern "C" fn(c_int, PlainHandler) -> c_int;
        let library = Compiled::Patchable.load("hooks_signals.c");
        let (tracer, changing) = start_changing();
        for name in ["hooks_sigaction", "hooks_signal"] {
            // SAFETY: the fixture declares it so, and the library stays.
            let install: Install = unsafe { function(&library, name) };
            assert_eq!(install(libc::SIGTRAP, on_signal), 0);
            assert_eq!(shown(libc::SIGTRAP).sa_sigaction, on_signal as PlainHandler as usize);
            assert!(sigtrap_is_ours(), "{name}");
            meet_own_breakpoints(&tracer, &changing, breakpoint);
            action_is_reset(libc::SIGTRAP);
        }
        changing.finish();
    });
}

fn action_is_reset(signal: c_int) {
    set(signal, &action(libc::SIG_DFL, 0));
    assert_eq!(shown(signal).sa_sigaction, libc::SIG_DFL);
}

#[test]
fn without_a_handler_a_breakpoint_of_the_programs_ends_it() {
    in_child_killed_by(libc::SIGTRAP, "without_a_handler_a_breakpoint_of_the_programs_ends_it", || {
        let (_tracer, changing) = start_changing();
        changing.await_rounds(10);
        say_last_words();
        breakpoint();
    });
}

#[test]
fn a_breakpoint_ends_a_program_that_ignores_it() {
    in_child_killed_by(libc::SIGTRAP, "a_breakpoint_ends_a_program_that_ignores_it", || {
        set(libc::SIGTRAP, &action(libc::SIG_IGN, 0));
        let (_tracer, changing) = start_changing();
        changing.await_rounds(10);
        say_last_words();
        breakpoint();
    });
}

#[test]
fn a_signal_that_is_sent_ends_a_program_without_a_handler() {
    in_child_killed_by(libc::SIGTRAP, "a_signal_that_is_sent_ends_a_program_without_a_handler", || {
        let (_tracer, changing) = start_changing();
        changing.await_rounds(10);
        say_last_words();
        raise(libc::SIGTRAP);
    });
}

#[test]
fn a_handler_that_asked_for_one_signal_gets_one() {
    in_child_killed_by(libc::SIGTRAP, "a_handler_that_asked_for_one_signal_gets_one", || {
        let (_tracer, changing) = start_changing();
        set(libc::SIGTRAP, &plain(on_signal, libc::SA_RESETHAND));
        breakpoint();
        assert_eq!((hits(), shown(libc::SIGTRAP).sa_sigaction), (1, libc::SIG_DFL));
        changing.await_rounds(10);
        say_last_words();
        breakpoint();
    });
}

#[test]
fn a_signal_that_is_sent_and_ignored_is_ignored() {
    in_child("a_signal_that_is_sent_and_ignored_is_ignored", || {
        let (tracer, changing) = start_changing();
        // SAFETY: no handler is installed.
        unsafe { libc::signal(libc::SIGTRAP, libc::SIG_IGN) };
        assert_eq!(shown(libc::SIGTRAP).sa_sigaction, libc::SIG_IGN);
        let workers = callers();
        let own_pid = std::process::id().cast_signed();
        for _ in 0..200 {
            // SAFETY: takes numbers. Sent to the process: any thread may get it.
            unsafe { libc::kill(own_pid, libc::SIGTRAP) };
            raise(libc::SIGTRAP);
        }
        changing.await_rounds(100);
        workers.assert_all_seen(0);
        assert!(tracer.stats().traps.chained > 0);
        changing.finish();
        drop(tracer);
        assert_eq!(KernelAction::of(libc::SIGTRAP).handler, libc::SIG_IGN);
    });
}

#[test]
fn a_signal_that_is_sent_reaches_the_programs_handler() {
    in_child("a_signal_that_is_sent_reaches_the_programs_handler", || {
        extern "C" fn on_sent(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
            // SAFETY: the kernel passes a valid description.
            let code = unsafe { (*info).si_code };
            assert_eq!((signal, code), (libc::SIGTRAP, libc::SI_TKILL));
            // SAFETY: the kernel passes a valid description.
            let info = unsafe { &*info };
            // SAFETY: a signal that was sent has a sender.
            let sender = unsafe { info.si_pid() };
            assert_eq!(sender.cast_unsigned(), std::process::id());
            HITS.fetch_add(1, Ordering::SeqCst);
        }
        let (_tracer, changing) = start_changing();
        set(libc::SIGTRAP, &detailed(on_sent, 0));
        for sent in 1..=100 {
            raise(libc::SIGTRAP);
            assert_eq!(hits(), sent);
        }
        changing.finish();
    });
}

/// Calls and judges in a thread that blocks all signals, with thousands of changes of the sites meanwhile.
fn call_with_all_blocked(changing: &Changing) {
    assert!(!is_blocked(libc::SIGTRAP) && is_blocked(libc::SIGUSR1), "what the kernel has");
    assert!(is_shown_blocked(libc::SIGTRAP) && is_shown_blocked(libc::SIGUSR1), "what the program sees");
    let worker = Workers::start(1, &[0], || assert_eq!(touched(1), 2));
    changing.await_rounds(2000);
    changing.await_traps();
    worker.assert_all_seen(0);
}

#[test]
fn a_thread_that_blocks_all_signals_after_the_tracer_survives_and_sees_its_mask() {
    in_child("a_thread_that_blocks_all_signals_after_the_tracer_survives_and_sees_its_mask", || {
        let (_tracer, changing) = start_changing();
        let before = set_mask(&full_set());
        call_with_all_blocked(&changing);
        assert!(!contains(&before, libc::SIGTRAP));
        assert!(contains(&set_mask(&before), libc::SIGTRAP));
        assert!(!is_shown_blocked(libc::SIGTRAP));
        changing.finish();
    });
}

#[test]
fn a_thread_that_blocked_all_signals_before_the_tracer_survives_and_sees_its_mask() {
    in_child("a_thread_that_blocked_all_signals_before_the_tracer_survives_and_sees_its_mask", || {
        static END: AtomicBool = AtomicBool::new(false);
        let ((ready, is_ready), (go, may_go)) = (mpsc::channel(), mpsc::channel::<()>());
        let blocking = thread::spawn(move || {
            let before = set_mask(&full_set());
            ready.send(()).expect("the test waits");
            may_go.recv().expect("the test goes on");
            let shown = is_shown_blocked(libc::SIGTRAP);
            let kernel = is_blocked(libc::SIGTRAP);
            while !END.load(Ordering::Relaxed) {
                assert_eq!(touched(1), 2);
            }
            set_mask(&before);
            (kernel, shown, is_shown_blocked(libc::SIGTRAP))
        });
        is_ready.recv().expect("the thread has blocked them");
        let (_tracer, changing) = start_changing();
        go.send(()).expect("the thread waits");
        changing.await_rounds(1000);
        changing.await_traps();
        END.store(true, Ordering::Relaxed);
        assert_eq!(blocking.join().expect("it survived"), (false, true, false));
        changing.finish();
    });
}

#[test]
fn a_thread_that_inherits_a_full_mask_survives() {
    in_child("a_thread_that_inherits_a_full_mask_survives", || {
        let (_tracer, changing) = start_changing();
        let before = set_mask(&full_set());
        let worker = Workers::start(1, &[0], || {
            assert!(!is_blocked(libc::SIGTRAP) && is_blocked(libc::SIGUSR1));
            assert_eq!(touched(1), 2);
        });
        set_mask(&before);
        changing.await_rounds(1000);
        worker.assert_all_seen(0);
        changing.finish();
    });
}

#[test]
#[ignore = "a new thread does not know what its creator asked for: it is shown SIGTRAP as not blocked"]
fn a_thread_that_inherits_a_full_mask_sees_it() {
    in_child("a_thread_that_inherits_a_full_mask_sees_it", || {
        let _tracer = Tracer::new().expect("a tracer");
        set_mask(&full_set());
        let shown = thread::spawn(|| is_shown_blocked(libc::SIGTRAP)).join().expect("it only looks");
        assert!(shown);
    });
}

/// Has handlers run that block everything, in threads whose sites change.
fn interrupt_with_everything_blocked() {
    let (_tracer, changing) = start_changing();
    let before = hits();
    let workers = Workers::start(2, &[], || {
        assert_eq!(touched(1), 2);
        raise(libc::SIGUSR1);
    });
    changing.await_rounds(1000);
    changing.await_traps();
    workers.await_each();
    workers.finish();
    assert!(hits() > before);
    changing.finish();
}

#[test]
fn handlers_that_block_everything_survive() {
    in_child("handlers_that_block_everything_survive", || {
        for handler in [blocking_all(plain(on_signal, 0)), blocking_all(detailed(on_any_detailed, 0))] {
            // Installed before the tracer, and again while there is one.
            set(libc::SIGUSR1, &handler);
            interrupt_with_everything_blocked();
            let (_tracer, changing) = start_changing();
            set(libc::SIGUSR1, &handler);
            assert!(contains(&shown(libc::SIGUSR1).sa_mask, libc::SIGTRAP), "as it was asked for");
            changing.finish();
        }
    });
}

extern "C" fn on_any_detailed(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    assert!(!info.is_null() && !context.is_null());
    on_signal(signal);
}

#[test]
fn handlers_that_run_under_a_mask_of_sigsuspend_and_its_kin_survive() {
    in_child("handlers_that_run_under_a_mask_of_sigsuspend_and_its_kin_survive", || {
        type Wait = extern "C" fn(c_int, c_int) -> c_int;
        let library = Compiled::Patchable.load("hooks_signals.c");
        // SAFETY: the fixture declares it so, and the library stays.
        let wait: Wait = unsafe { function(&library, "hooks_wait") };
        set(libc::SIGUSR1, &detailed(on_any_detailed, 0));
        let (tracer, changing) = start_changing();
        set(libc::SIGUSR2, &plain(on_signal, 0));
        let traps = || tracer.stats().traps.traps;
        for way in 0..3 {
            for signal in [libc::SIGUSR1, libc::SIGUSR2] {
                // Only the handlers call traced functions here.
                let at_first = traps();
                while traps() <= at_first {
                    for _ in 0..100 {
                        let before = hits();
                        assert_eq!(wait(way, signal), -1);
                        assert_eq!((hits(), errno()), (before + 1, libc::EINTR));
                    }
                }
            }
        }
        changing.finish();
    });
}

/// Ignored unless there is a handler: what is reset can be raised again.
const HARMLESS: c_int = libc::SIGURG;

/// Where a local of the last handler was, how many handlers were active at once, and how many are.
static LOCAL: AtomicUsize = AtomicUsize::new(0);
static DEEPEST: AtomicI32 = AtomicI32::new(0);
static DEPTH: AtomicI32 = AtomicI32::new(0);

extern "C" fn nesting(signal: c_int) {
    let depth = DEPTH.fetch_add(1, Ordering::SeqCst) + 1;
    DEEPEST.fetch_max(depth, Ordering::SeqCst);
    LOCAL.store((&raw const depth).addr(), Ordering::SeqCst);
    on_signal(signal);
    if depth < 4 && hits() < 4 {
        raise(signal);
    }
    DEPTH.fetch_sub(1, Ordering::SeqCst);
}

fn reset_observations() {
    for counter in [&LOCAL, &HITS] {
        counter.store(0, Ordering::SeqCst);
    }
    DEEPEST.store(0, Ordering::SeqCst);
}

#[test]
fn flags_of_handlers_keep_their_meaning() {
    in_child("flags_of_handlers_keep_their_meaning", || {
        let memory: &'static mut [u8] = vec![0; 128 << 10].leak();
        let alternate = memory.as_ptr_range();
        let alternate = alternate.start.addr()..alternate.end.addr();
        set_alternate_stack(Some(memory));
        let (tracer, changing) = start_changing();
        changing.finish();
        drop(tracer);

        for before_the_tracer in [true, false] {
            for flags in
                [0, libc::SA_RESETHAND, libc::SA_NODEFER, libc::SA_ONSTACK, libc::SA_NODEFER | libc::SA_ONSTACK]
            {
                let what = format!("flags {flags:#x}, before: {before_the_tracer}");
                reset_observations();
                if before_the_tracer {
                    set(HARMLESS, &plain(nesting, flags));
                }
                let (_tracer, changing) = start_changing();
                if !before_the_tracer {
                    set(HARMLESS, &plain(nesting, flags));
                }
                let now = shown(HARMLESS);
                assert_eq!(
                    (now.sa_sigaction, now.sa_flags & flags),
                    (nesting as PlainHandler as usize, flags),
                    "{what}"
                );
                raise(HARMLESS);
                let (hits, deepest) = (hits(), DEEPEST.load(Ordering::SeqCst));
                let expected = match flags {
                    libc::SA_RESETHAND => (1, 1),
                    flags if flags & libc::SA_NODEFER != 0 => (4, 4),
                    _ => (4, 1),
                };
                assert_eq!((hits, deepest), expected, "{what}");
                let on_alternate = alternate.contains(&LOCAL.load(Ordering::SeqCst));
                assert_eq!(on_alternate, flags & libc::SA_ONSTACK != 0, "{what}");
                let left = shown(HARMLESS).sa_sigaction;
                assert_eq!(left == libc::SIG_DFL, flags == libc::SA_RESETHAND, "{what}");
                raise(HARMLESS);
                assert_eq!(hits == self::hits(), flags == libc::SA_RESETHAND, "{what}");
                changing.finish();
            }
        }
    });
}

#[test]
fn errno_is_kept_over_traced_calls_and_breakpoints() {
    in_child("errno_is_kept_over_traced_calls_and_breakpoints", || {
        set(libc::SIGTRAP, &detailed(on_breakpoint, 0));
        let (_tracer, changing) = start_changing();
        let mut value = 0;
        let workers = Workers::start(2, &[0], move || {
            value = (value + 1) % 100;
            set_errno(value);
            assert_eq!(touched(1), 2);
            assert_eq!(errno(), value);
        });
        for value in 0..200 {
            set_errno(value);
            assert_eq!(own_breakpoint(), 42);
            assert_eq!(errno(), value);
        }
        changing.await_traps();
        workers.assert_all_seen(0);
        changing.finish();
    });
}

/// Sleeps in nanosleep(2), and returns what that returned.
#[allow(clippy::unnecessary_fallible_conversions, reason = "it can fail at the other width")]
fn nap(duration: Duration) -> Result<(), io::Error> {
    let time = libc::timespec {
        tv_sec: duration.as_secs().try_into().expect("short"),
        tv_nsec: libc::c_long::try_from(duration.subsec_nanos()).unwrap_or(0),
    };
    // SAFETY: the time is a live local; null asks for no rest.
    if unsafe { libc::nanosleep(&raw const time, ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[test]
fn sleeping_threads_are_interrupted_by_signals_and_by_nothing_else() {
    in_child("sleeping_threads_are_interrupted_by_signals_and_by_nothing_else", || {
        let (tracer, changing) = start_changing();
        // Sites change and all threads are stopped meanwhile: this one notices nothing.
        let sleeper = thread::spawn(|| nap(Duration::from_millis(200)));
        while !sleeper.is_finished() {
            drop(
                tracer.ops("short-lived").filter(Filter::name("*touched*")).register(count::<1>).expect("it is there"),
            );
            tracer.synchronize(common::child::PATIENCE).expect("threads leave");
        }
        sleeper.join().expect("it only sleeps").expect("nothing interrupts it");

        for flags in [0, libc::SA_SIGINFO] {
            set(libc::SIGUSR1, &action(on_signal as PlainHandler as usize, flags));
            let (say, tid) = mpsc::channel();
            let sleeper = thread::spawn(move || {
                say.send(own_tid()).expect("the test waits");
                nap(Duration::from_secs(1000))
            });
            let tid = tid.recv().expect("the thread runs");
            let before = hits();
            // Until it has gone to sleep signals are handled before it.
            wait_until(|| sleeper.is_finished() || !send(tid, libc::SIGUSR1));
            let result = sleeper.join().expect("it only sleeps");
            assert_eq!(result.expect_err("a handler ran").raw_os_error(), Some(libc::EINTR));
            assert!(hits() > before);
        }
        changing.finish();
    });
}
