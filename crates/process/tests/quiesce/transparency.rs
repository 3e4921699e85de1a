//! What the target notices of a stop: nothing (I4).

use std::{
    fs::{self, File},
    io, iter,
    os::fd::AsRawFd,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use trapline_process::quiesce::{self, StopReport};

use crate::{
    child::{
        PATIENCE, Spinner, Worker, expect_exit, fork, is_child, isolated, outcome, own_tid, run, test_path, wait_until,
        wait_until_in_syscall,
    },
    sleeps::{self, Sleep},
};

fn stop() -> StopReport {
    quiesce::stop_world(|_| (), PATIENCE).expect("the threads stop").1
}

isolated! {
    /// 64 threads: nine ways to sleep, four threads each; twelve that do short sleeps over and over; sixteen that never sleep.
    fn no_blocked_call_fails_in_two_hundred_stops() {
        let (mut sleepers, mut wakes) = (Vec::new(), Vec::new());
        for Sleep { calls, run, wake } in iter::repeat_with(sleeps::all).take(4).flatten() {
            let sleeper = Worker::start(run);
            wait_until_in_syscall(sleeper.tid, calls);
            sleepers.push(sleeper);
            wakes.push(wake);
        }
        let end: Arc<AtomicBool> = Arc::default();
        let nappers: Vec<_> = iter::repeat_with(|| {
            let end = Arc::clone(&end);
            Worker::start(move || {
                let mut naps = 0_u64;
                let nap = libc::timespec { tv_sec: 0, tv_nsec: 300_000 };
                while !end.load(Ordering::Relaxed) {
                    // SAFETY: one timespec is read from a live local; null asks for no remainder.
                    outcome(unsafe { libc::nanosleep(&raw const nap, ptr::null_mut()) })?;
                    naps += 1;
                }
                Ok::<_, io::Error>(naps)
            })
        })
        .take(12)
        .collect();
        let spinners: Vec<_> = iter::repeat_with(Spinner::start).take(16).collect();

        let expected = fs::read_dir("/proc/self/task").unwrap().count();
        assert!(expected >= 65);
        let mut restarted = 0;
        for _ in 0..200 {
            let report = stop();
            assert_eq!(report.threads, expected);
            assert!(report.stop_ns > 0 && report.rounds >= 2);
            restarted += report.restarted_syscalls;
        }
        // Those that the kernel does not restart: epoll (2), a socket with a timeout, sigtimedwait; four threads each. All of them are in
        // their calls at the first stop; later, one may be stopped again before it has come back to its call.
        assert!((16..=200 * 16).contains(&restarted), "{restarted}");

        spinners.iter().for_each(Spinner::wait_for_progress);
        spinners.into_iter().for_each(Spinner::finish);
        end.store(true, Ordering::Relaxed);
        for napper in nappers {
            assert!(napper.join().expect("no nap was interrupted") > 0);
        }
        for (sleeper, wake) in sleepers.into_iter().zip(wakes) {
            wake();
            sleeper.join().expect("no call was interrupted");
        }
    }
}

isolated! {
    /// Stops follow each other without a pause. If each began the sleep anew, it would not end.
    fn a_restarted_sleep_keeps_its_end() {
        let sleeper = Worker::start(|| {
            let time = libc::timespec { tv_sec: 0, tv_nsec: 150_000_000 };
            // SAFETY: one timespec is read from a live local; null asks for no remainder.
            outcome(unsafe { libc::nanosleep(&raw const time, ptr::null_mut()) })
        });
        while !sleeper.is_finished() {
            stop();
        }
        sleeper.join().expect("not interrupted");
    }
}

isolated! {
    /// The control for the tests above: without our doing, `epoll_wait` fails when a tracer interrupts it, and `read` does not.
    fn a_bare_interruption_fails_epoll_wait_only() {
        for (Sleep { calls, run, wake }, fails) in [(sleeps::epoll(-1), true), (sleeps::read(), false)] {
            let sleeper = Worker::start(run);
            wait_until_in_syscall(sleeper.tid, calls);
            let tid = sleeper.tid;
            let tracer = fork(move || {
                let request = |request, data: usize| {
                    // SAFETY: none of the three requests takes a pointer.
                    unsafe { libc::ptrace(request, tid, 0_usize, data) }
                };
                outcome(request(libc::PTRACE_SEIZE, 0)).unwrap();
                outcome(request(libc::PTRACE_INTERRUPT, 0)).unwrap();
                let mut status = 0;
                // SAFETY: one `int` is stored in a live local.
                assert_eq!(unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) }, tid);
                outcome(request(libc::PTRACE_DETACH, 0)).unwrap();
                0
            });
            expect_exit(tracer, 0);
            if !fails {
                wake();
            }
            let result = sleeper.join();
            assert_eq!(result.err().and_then(|error| error.raw_os_error()), fails.then_some(libc::EINTR));
        }
    }
}

isolated! {
    fn nobody_moves_during_a_stop() {
        let spinners: Vec<_> = iter::repeat_with(Spinner::start).take(4).collect();
        for _ in 0..20 {
            let (moved, _) = quiesce::stop_world(
                |_| {
                    let before = [0, 1, 2, 3].map(|index: usize| spinners[index].rounds());
                    for _ in 0..1000 {
                        // SAFETY: takes no arguments. It gives a thread that could run the chance to.
                        unsafe { libc::sched_yield() };
                    }
                    before != [0, 1, 2, 3].map(|index: usize| spinners[index].rounds())
                },
                PATIENCE,
            )
            .unwrap();
            assert!(!moved);
            // The control: as soon as the stop is over, each of them moves.
            spinners.iter().for_each(Spinner::wait_for_progress);
        }
        spinners.into_iter().for_each(Spinner::finish);
    }
}

/// Whether the kernel says of every thread of the process that a tracer has stopped it. Neither allocates nor locks.
fn every_thread_is_stopped(tasks: &File) -> bool {
    let directory = tasks.as_raw_fd();
    // SAFETY: takes no pointers.
    unsafe { libc::lseek(directory, 0, libc::SEEK_SET) };
    let mut records = [0_u8; 8 << 10];
    // SAFETY: at most `records.len()` bytes are stored in a live local.
    let listed = unsafe { libc::syscall(libc::SYS_getdents64, directory, records.as_mut_ptr(), records.len()) };
    let mut rest = &records[..usize::try_from(listed).expect("the directory can be listed")];
    // Each record: inode and offset (8 bytes each), length (2), type (1), name.
    while let Some((length, name)) = rest.get(16..18).zip(rest.get(19..)) {
        rest = &rest[usize::from(u16::from_ne_bytes([length[0], length[1]]))..];
        let digits = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let mut path = [0_u8; 32];
        path[..digits].copy_from_slice(&name[..digits]);
        path[digits..digits + 5].copy_from_slice(b"/stat");
        // SAFETY: the rest of the path is zeros.
        let file = unsafe { libc::openat(directory, path.as_ptr().cast(), libc::O_RDONLY) };
        if digits == 0 || file < 0 {
            // "." and "..", or a thread that is gone.
            continue;
        }
        let mut stat = [0_u8; 512];
        // SAFETY: at most `stat.len()` bytes are stored in a live local.
        unsafe { libc::read(file, stat.as_mut_ptr().cast(), stat.len()) };
        // SAFETY: opened above.
        unsafe { libc::close(file) };
        let name_end = stat.iter().rposition(|byte| *byte == b')').unwrap_or(0);
        if !matches!(stat[name_end + 2], b't' | b'Z' | b'X' | 0) {
            return false;
        }
    }
    true
}

isolated! {
    fn threads_may_come_and_go_during_stops() {
        const SPAWNERS: usize = 4;
        static BORN: AtomicUsize = AtomicUsize::new(0);
        let end: Arc<AtomicBool> = Arc::default();
        let spawners: Vec<_> = iter::repeat_with(|| {
            let end = Arc::clone(&end);
            Worker::start(move || {
                while !end.load(Ordering::Relaxed) {
                    for thread in [(); 2].map(|()| thread::spawn(|| BORN.fetch_add(1, Ordering::Relaxed))) {
                        thread.join().unwrap();
                    }
                }
            })
        })
        .take(SPAWNERS)
        .collect();
        let tasks = File::open("/proc/self/task").unwrap();
        // Threads can only be started beside the stopper, which runs at real-time priority, where there is a processor beside its own.
        let new_ones_wanted = if thread::available_parallelism().unwrap().get() > 1 { 5 } else { 0 };
        let mut new_ones_found = 0;
        for stops in 0.. {
            // The control: there were stops in which threads came between the first list and the end of the stop.
            if stops >= 300 && BORN.load(Ordering::Relaxed) >= 1000 && new_ones_found >= new_ones_wanted {
                break;
            }
            let (all, report) = quiesce::stop_world(|_| every_thread_is_stopped(&tasks), PATIENCE)
                .expect("threads that come and go can be stopped");
            assert!(all, "a thread was not stopped: {report:?}");
            new_ones_found += usize::from(report.rounds > 2);
        }
        assert!(!every_thread_is_stopped(&tasks), "now they run");
        end.store(true, Ordering::Relaxed);
        spawners.into_iter().for_each(Worker::join);
    }
}

isolated! {
    fn several_threads_may_ask_for_stops_at_once() {
        let askers: Vec<_> = iter::repeat_with(|| Worker::start(|| (0..25).map(|_| stop().threads).min()))
            .take(4)
            .collect();
        for asker in askers {
            assert!(asker.join() >= Some(2));
        }
    }
}

isolated! {
    fn wait_and_sigchld_do_not_show_the_stopper() {
        static SIGCHLDS: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn count(_: i32) {
            SIGCHLDS.fetch_add(1, Ordering::Relaxed);
        }
        let handler: extern "C" fn(i32) = count;
        // SAFETY: the handler is async-signal-safe.
        unsafe { libc::signal(libc::SIGCHLD, handler as libc::sighandler_t) };
        let end: Arc<AtomicBool> = Arc::default();
        let waiter = Worker::start({
            let end = Arc::clone(&end);
            move || {
                while !end.load(Ordering::Relaxed) {
                    // SAFETY: null asks for no status.
                    let waited = unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) };
                    assert_eq!(outcome(waited).unwrap_err().raw_os_error(), Some(libc::ECHILD), "there is no child");
                }
            }
        });
        for _ in 0..200 {
            stop();
        }
        end.store(true, Ordering::Relaxed);
        waiter.join();
        assert_eq!(SIGCHLDS.load(Ordering::Relaxed), 0);
        // The control: a child that the target itself has shows in both ways.
        expect_exit(fork(|| 0), 0);
        wait_until(|| SIGCHLDS.load(Ordering::Relaxed) == 1);
    }
}

isolated! {
    /// A fork copies whatever state the stops of another thread are in.
    fn a_forked_child_can_stop_its_own_threads() {
        let end: Arc<AtomicBool> = Arc::default();
        let stopping = Worker::start({
            let end = Arc::clone(&end);
            move || {
                while !end.load(Ordering::Relaxed) {
                    stop();
                }
            }
        });
        for _ in 0..25 {
            expect_exit(fork(|| if stop().threads == 1 { 3 } else { 4 }), 3);
        }
        end.store(true, Ordering::Relaxed);
        stopping.join();
    }
}

/// In a process of its own: the first thread leaves while the second one makes stops. Ends the process with 5 if all goes well.
fn leave_during_stops() -> i32 {
    let leader = own_tid();
    thread::spawn(move || {
        let is_zombie = || fs::read_to_string(format!("/proc/self/task/{leader}/stat")).unwrap().contains(") Z ");
        // Some of these stops see it leave.
        while !is_zombie() {
            stop();
        }
        let code = if stop().threads == 1 { 5 } else { 6 };
        // SAFETY: ends the process.
        unsafe { libc::_exit(code) };
    });
    stop();
    // SAFETY: ends this thread alone, without its destructors; the other one uses nothing of it.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!()
}

isolated! {
    fn a_process_whose_first_thread_has_left_can_be_stopped() {
        for _ in 0..20 {
            expect_exit(fork(leave_during_stops), 5);
        }
    }
}

/// `linux/io_uring.h`: a thread of the kernel polls for submissions, from the first moment on.
const IORING_SETUP_SQPOLL: u32 = 1 << 1;

isolated! {
    /// The kernel's own workers are in the list of threads too.
    fn an_io_uring_worker_stops_and_counts_as_outside() {
        // `struct io_uring_params` is 120 bytes; its third word are the flags.
        let mut parameters = [0_u32; 30];
        parameters[2] = IORING_SETUP_SQPOLL;
        // SAFETY: the parameters are a live local of the right size.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        if let Err(error) = outcome(ring) {
            // Switched off (kernel.io_uring_disabled), not compiled in, or filtered.
            eprintln!("no io_uring here: {error}");
            return;
        }
        let everything_low = trapline_engine::AddrRange::new(trapline_engine::Addr::new(0), 4096);
        let forbidden = quiesce::RangeSet::new([everything_low]);
        for _ in 0..20 {
            let ((workers, blocked), report) = quiesce::stop_world(
                |stopped| {
                    let workers = stopped.threads().filter(|thread| {
                        thread.registers().is_ok_and(|registers| registers.is_kernel_worker())
                    });
                    let mut blocked = 0;
                    let workers = workers.inspect(|worker| {
                        blocked += usize::from(stopped.may_thread_be_inside(*worker, &forbidden).is_some());
                    });
                    (workers.count(), blocked)
                },
                PATIENCE,
            )
            .unwrap();
            assert_eq!((workers, blocked), (1, 0), "{report:?}");
        }
    }
}

/// What a process does in the middle of stops that ends all of them.
const REPETITIONS: usize = 8;

fn stop_for_ever() -> ! {
    loop {
        stop();
    }
}

#[test]
fn an_exec_goes_through_in_the_middle_of_stops() {
    let path = test_path(module_path!(), "an_exec_goes_through_in_the_middle_of_stops");
    if is_child(&path) {
        for _ in 0..3 {
            stop();
        }
        thread::spawn(|| {
            let arguments = [c"/bin/echo".as_ptr(), c"executed".as_ptr(), ptr::null()];
            // SAFETY: a null-terminated array of C strings.
            unsafe { libc::execv(arguments[0], arguments.as_ptr()) };
            panic!("{}", io::Error::last_os_error());
        });
        stop_for_ever();
    }
    for _ in 0..REPETITIONS {
        let end = run(&path);
        assert!(end.status.success() && end.output.ends_with("executed\n"), "{}: {}", end.status, end.output);
    }
}

#[test]
fn the_exit_status_survives_the_middle_of_stops() {
    let path = test_path(module_path!(), "the_exit_status_survives_the_middle_of_stops");
    if is_child(&path) {
        for _ in 0..3 {
            stop();
        }
        thread::spawn(|| {
            // SAFETY: ends the process.
            unsafe { libc::_exit(42) }
        });
        stop_for_ever();
    }
    for _ in 0..REPETITIONS {
        let end = run(&path);
        assert_eq!(end.status.code(), Some(42), "{}", end.output);
    }
}
