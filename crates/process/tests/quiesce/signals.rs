//! Signals and stops: what is pending arrives, once; masks change only where asked.

use std::{
    ptr,
    sync::atomic::{AtomicI32, AtomicUsize, Ordering},
};

use trapline_process::quiesce::{self, SignalSet};

use crate::child::{
    PATIENCE, Pipe, Spinner, Worker, expect_exit, fork, isolated, outcome, own_tid, wait_for, wait_until,
    wait_until_in_syscall,
};

/// Installs a handler with these flags and an empty mask.
fn handle(signal: i32, handler: extern "C" fn(i32, *const libc::siginfo_t), flags: i32) {
    // SAFETY: zero is a value of every field.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = flags | libc::SA_SIGINFO;
    // SAFETY: the action is a live local; the handlers of these tests are async-signal-safe.
    outcome(unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) }).expect("a handler");
}

/// Sends `signal` to one thread of this process. May be called from the work of a stop, by its process's number.
fn send(process: i32, tid: i32, signal: i32) {
    // SAFETY: takes no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_tgkill, process, tid, signal) }).expect("the thread exists");
}

fn own_pid() -> i32 {
    std::process::id().cast_signed()
}

/// The signals that the calling thread blocks, as the kernel knows them.
fn own_mask() -> SignalSet {
    let mut mask = 0_u64;
    let nothing = ptr::null::<u64>();
    // SAFETY: one kernel signal set of 8 bytes is stored in a live local.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, nothing, &raw mut mask, 8) };
    outcome(result).expect("one's own mask can be read");
    SignalSet::from_bits(mask)
}

fn block(signals: SignalSet) {
    let bits = signals.bits();
    let nothing = ptr::null_mut::<u64>();
    // SAFETY: one kernel signal set of 8 bytes is read from a live local.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const bits, nothing, 8) };
    outcome(result).expect("signals can be blocked");
}

isolated! {
    fn a_signal_that_arrives_during_a_stop_is_delivered_once() {
        static DELIVERED: AtomicUsize = AtomicUsize::new(0);
        static DELIVERED_TO: AtomicI32 = AtomicI32::new(0);
        extern "C" fn note(_: i32, _: *const libc::siginfo_t) {
            DELIVERED_TO.store(own_tid(), Ordering::SeqCst);
            DELIVERED.fetch_add(1, Ordering::SeqCst);
        }
        handle(libc::SIGUSR1, note, libc::SA_RESTART);
        let pipe = Pipe::new();
        let sleeper = Worker::start(move || pipe.wait());
        wait_until_in_syscall(sleeper.tid, &[libc::SYS_read]);
        let spinner = Spinner::start();
        let process = own_pid();
        for (round, tid) in [sleeper.tid, spinner.tid()].into_iter().cycle().take(100).enumerate() {
            let (before, _) = quiesce::stop_world(
                |_| {
                    send(process, tid, libc::SIGUSR1);
                    DELIVERED.load(Ordering::SeqCst)
                },
                PATIENCE,
            )
            .unwrap();
            assert_eq!(before, round, "not while it stands still");
            wait_until(|| DELIVERED.load(Ordering::SeqCst) > round);
            assert_eq!(DELIVERED_TO.load(Ordering::SeqCst), tid);
        }
        spinner.finish();
        pipe.signal();
        sleeper.join().expect("the read was restarted");
        assert_eq!(DELIVERED.load(Ordering::SeqCst), 100);
    }
}

/// A `siginfo_t` as a sender fills it in (asm-generic/siginfo.h); the second part begins at an address that suits its pointer.
#[repr(C)]
struct QueuedInfo {
    signal: i32,
    error: i32,
    code: i32,
    origin: Origin,
    rest: [u8; 96],
}

#[repr(C)]
struct Origin {
    process: i32,
    user: u32,
    value: usize,
}

isolated! {
    /// Interruptions and signals race for each stop; many a thread is stopped with a signal in the middle of its delivery.
    fn every_queued_signal_arrives_once_and_in_order() {
        const SIGNALS: usize = 20_000;
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        static OUT_OF_ORDER: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn note(_: i32, info: *const libc::siginfo_t) {
            // SAFETY: the kernel passes a valid siginfo.
            let info = unsafe { &*info };
            // SAFETY: the sender attached a value.
            let value = unsafe { info.si_value() };
            if value.sival_ptr as usize != NEXT.fetch_add(1, Ordering::SeqCst) {
                OUT_OF_ORDER.fetch_add(1, Ordering::SeqCst);
            }
        }
        let signal = libc::SIGRTMIN();
        handle(signal, note, libc::SA_RESTART);
        let spinner = Spinner::start();
        let (process, receiver) = (own_pid(), spinner.tid());
        let sender = fork(move || {
            let origin = |value| Origin { process: own_pid(), user: 0, value };
            for value in 0..SIGNALS {
                let info = QueuedInfo { signal, error: 0, code: libc::SI_QUEUE, origin: origin(value), rest: [0; 96] };
                // To one thread: two that take signals at once would note them in any order.
                // SAFETY: one siginfo is read from a live local. The queue may be full for a while.
                while unsafe {
                    libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, receiver, signal, &raw const info)
                } != 0
                {
                    std::thread::yield_now();
                }
            }
            0
        });
        let mut stops = 0;
        while NEXT.load(Ordering::SeqCst) < SIGNALS {
            quiesce::stop_world(|_| (), PATIENCE).unwrap();
            stops += 1;
        }
        assert!(stops > 0);
        spinner.finish();
        expect_exit(sender, 0);
        assert_eq!((NEXT.load(Ordering::SeqCst), OUT_OF_ORDER.load(Ordering::SeqCst)), (SIGNALS, 0));
    }
}

isolated! {
    /// The creator's own mask is full during a stop. What was meant for it arrives afterwards.
    fn a_signal_for_the_asking_thread_waits_for_the_end_of_the_stop() {
        static DELIVERED: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn note(_: i32, _: *const libc::siginfo_t) {
            DELIVERED.fetch_add(1, Ordering::SeqCst);
        }
        handle(libc::SIGUSR1, note, libc::SA_RESTART);
        let (process, tid) = (own_pid(), own_tid());
        let (during, _) = quiesce::stop_world(
            |_| {
                send(process, tid, libc::SIGUSR1);
                DELIVERED.load(Ordering::SeqCst)
            },
            PATIENCE,
        )
        .unwrap();
        assert_eq!((during, DELIVERED.load(Ordering::SeqCst)), (0, 1));
    }
}

isolated! {
    fn a_job_control_stop_that_arrives_during_a_stop_takes_effect_after_it() {
        let target = fork(|| {
            let spinner = Spinner::start();
            let process = own_pid();
            quiesce::stop_world(
                |_| {
                    // SAFETY: takes no pointers.
                    unsafe { libc::kill(process, libc::SIGSTOP) };
                },
                PATIENCE,
            )
            .unwrap();
            spinner.wait_for_progress();
            let report = quiesce::stop_world(|_| (), PATIENCE).unwrap().1;
            spinner.finish();
            i32::try_from(report.threads).unwrap()
        });
        let status = wait_for(target, libc::WUNTRACED);
        assert!(libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGSTOP, "{status:#x}");
        // SAFETY: takes no pointers.
        outcome(unsafe { libc::kill(target, libc::SIGCONT) }).unwrap();
        let status = wait_for(target, 0);
        assert!(libc::WIFEXITED(status), "{status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), 2, "both threads run on");
    }
}

isolated! {
    fn sigtrap_is_unblocked_in_every_thread_and_nothing_else() {
        let (trap, other) = (libc::SIGTRAP, libc::SIGUSR2);
        let pipes: [Pipe; 8] = [(); 8].map(|()| Pipe::new());
        let workers = [0, 1, 2, 3, 4, 5, 6, 7].map(|index: usize| {
            let pipe = pipes[index];
            Worker::start(move || {
                block(if index < 4 { SignalSet::EMPTY.with(trap).with(other) } else { SignalSet::EMPTY.with(other) });
                pipe.wait().expect("no call was interrupted");
                own_mask()
            })
        });
        for worker in &workers {
            wait_until_in_syscall(worker.tid, &[libc::SYS_read]);
        }
        let without_trap = own_mask();
        block(SignalSet::EMPTY.with(trap));

        let mut expected: Vec<_> = workers[..4].iter().map(|worker| worker.tid).chain([own_tid()]).collect();
        expected.sort_unstable();
        // The thread that started this one may not have restored its mask yet.
        wait_until(|| quiesce::threads_blocking_sigtrap().unwrap() == expected);
        let unblock = || quiesce::stop_world(|stopped| stopped.unblock(trap), PATIENCE).unwrap().0;
        assert_eq!(unblock(), 5);
        assert_eq!(quiesce::threads_blocking_sigtrap().unwrap(), []);
        assert_eq!(unblock(), 0, "once is enough");

        assert_eq!(own_mask(), without_trap, "the thread that asked");
        pipes.into_iter().for_each(Pipe::signal);
        for worker in workers {
            let mask = worker.join();
            assert!(!mask.contains(trap) && mask.contains(other), "{mask:?}");
        }
    }
}

isolated! {
    /// `ppoll` installs a mask of its own while it waits. The lasting one is what counts, and what changes.
    fn a_mask_is_changed_beneath_a_call_that_replaces_it() {
        let pipe = Pipe::new();
        let worker = Worker::start(move || {
            block(SignalSet::EMPTY.with(libc::SIGTRAP));
            let mut interest = libc::pollfd { fd: pipe.read_end(), events: libc::POLLIN, revents: 0 };
            // SAFETY: zero is a value: the empty set.
            let nothing: libc::sigset_t = unsafe { std::mem::zeroed() };
            // SAFETY: one pollfd and one set, both live locals.
            let ready = unsafe { libc::ppoll(&raw mut interest, 1, ptr::null(), &raw const nothing) };
            (outcome(ready), own_mask())
        });
        wait_until_in_syscall(worker.tid, PPOLL);
        // The kernel shows the mask in force, ours reads the one beneath. Others may block signals while they start threads.
        assert!(!quiesce::threads_blocking_sigtrap().unwrap().contains(&worker.tid));
        let (count, _) = quiesce::stop_world(|stopped| stopped.unblock(libc::SIGTRAP), PATIENCE).unwrap();
        assert!(count >= 1);
        pipe.signal();
        let (ready, mask) = worker.join();
        assert_eq!(ready.expect("the call was restarted"), 1);
        assert!(!mask.contains(libc::SIGTRAP));
    }
}

/// i386 has a second number for 64-bit time.
#[cfg(target_arch = "x86")]
const PPOLL: &[libc::c_long] = &[libc::SYS_ppoll, 414];
#[cfg(target_arch = "x86_64")]
const PPOLL: &[libc::c_long] = &[libc::SYS_ppoll];

isolated! {
    /// A handler that is due makes a call fail with EINTR, stop or no stop: that error is the program's own.
    fn a_handler_without_restart_still_interrupts() {
        static DELIVERED: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn note(_: i32, _: *const libc::siginfo_t) {
            DELIVERED.fetch_add(1, Ordering::SeqCst);
        }
        handle(libc::SIGUSR1, note, 0);
        // SAFETY: takes no pointers.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        let sleeper = Worker::start(move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: at most one event is stored in a live local.
            outcome(unsafe { libc::epoll_wait(epoll, &raw mut event, 1, -1) })
        });
        wait_until_in_syscall(sleeper.tid, &[libc::SYS_epoll_wait, libc::SYS_epoll_pwait]);
        let (process, tid) = (own_pid(), sleeper.tid);
        let ((), report) = quiesce::stop_world(|_| send(process, tid, libc::SIGUSR1), PATIENCE).unwrap();
        assert_eq!(report.restarted_syscalls, 1, "it would have been restarted");
        assert_eq!(sleeper.join().unwrap_err().raw_os_error(), Some(libc::EINTR));
        assert_eq!(DELIVERED.load(Ordering::SeqCst), 1);
    }
}
