//! Stops that cannot be made, or do not end as they should: each is reported, and the process runs on.

use std::{
    fs, io, iter, panic, ptr,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use trapline_process::quiesce::{self, Obstacle, QuiesceError, Stopper};

use crate::child::{PATIENCE, Pipe, Spinner, Worker, expect_exit, fork, futex_wait, isolated, outcome, wait_until};

fn stop() -> Result<usize, QuiesceError> {
    quiesce::stop_world(|_| (), PATIENCE).map(|((), report)| report.threads)
}

/// The process runs on, and the next stop works.
fn assert_unharmed(spinners: &[Spinner]) {
    spinners.iter().for_each(Spinner::wait_for_progress);
    assert!(stop().expect("the next stop") > spinners.len());
    spinners.iter().for_each(Spinner::wait_for_progress);
}

fn spinners() -> Vec<Spinner> {
    iter::repeat_with(Spinner::start).take(4).collect()
}

/// The state letter of a thread of this process.
fn state(tid: i32) -> char {
    let stat = fs::read_to_string(format!("/proc/self/task/{tid}/stat")).expect("the thread exists");
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).expect("a state")
}

isolated! {
    fn a_thread_waiting_for_its_vfork_child_is_named() {
        extern "C" fn child(pipe: *mut libc::c_void) -> i32 {
            // The test may fail, and nobody else would end this process.
            // SAFETY: takes no pointers.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            // SAFETY: the parent passes its pipe, and waits.
            let pipe = unsafe { *pipe.cast::<Pipe>() };
            i32::from(pipe.wait().is_err())
        }
        let spinners = spinners();
        let pipe = Pipe::new();
        let worker = Worker::start(move || {
            let mut pipe = pipe;
            let mut stack = vec![0_u64; 8192];
            let top = stack.as_mut_ptr_range().end.cast();
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
            // SAFETY: the child has a stack of its own, uses only that and the pipe, and this thread waits for it.
            let pid = unsafe { libc::clone(child, top, flags, (&raw mut pipe).cast()) };
            outcome(pid).expect("a child");
            pid
        });
        wait_until(|| state(worker.tid) == 'D');
        loop {
            let mut called = false;
            let result = quiesce::stop_world(|_| called = true, Duration::from_millis(100));
            assert!(!called);
            match result {
                Err(QuiesceError::Unstoppable { tid, state: 'D', .. }) if tid == worker.tid => break,
                // On a busy machine another thread may not have come to run.
                Err(QuiesceError::Unstoppable { state: 'R', .. }) => {}
                other => panic!("{other:?}"),
            }
        }
        spinners.iter().for_each(Spinner::wait_for_progress);
        pipe.signal();
        expect_exit(worker.join(), 0);
        assert_unharmed(&spinners);
        spinners.into_iter().for_each(Spinner::finish);
    }
}

/// `linux/prctl.h`; `libc` has them for Android only.
const PR_SET_PTRACER: i32 = 0x5961_6d61;
const PR_SET_PTRACER_ANY: libc::c_ulong = libc::c_ulong::MAX;

isolated! {
    fn a_debugger_is_named() {
        let spinners = spinners();
        let (traced, may_end) = (Pipe::new(), Pipe::new());
        let tid = spinners[2].tid();
        // Where Yama restricts tracing, the target has to permit it. This call does nothing elsewhere.
        // SAFETY: takes no pointers.
        unsafe { libc::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY) };
        let debugger = fork(move || {
            // SAFETY: the request takes no pointers.
            let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0_usize, 0_usize) };
            outcome(seized).expect("the thread can be traced");
            traced.signal();
            may_end.wait().expect("told to end");
            0
        });
        traced.wait().expect("it traces");
        match stop() {
            Err(error @ QuiesceError::Forbidden { tid: refused, obstacle, .. }) => {
                assert_eq!((refused, obstacle), (tid, Obstacle::Tracer(debugger)));
                let message = error.to_string();
                assert!(message.contains(&debugger.to_string()) && message.contains("debugger"), "{message}");
            }
            other => panic!("{other:?}"),
        }
        spinners.iter().for_each(Spinner::wait_for_progress);
        may_end.signal();
        expect_exit(debugger, 0);
        assert_unharmed(&spinners);
        spinners.into_iter().for_each(Spinner::finish);
    }
}

/// Forbids the calling thread, and what it starts, to call ptrace.
fn forbid_ptrace() {
    // Where `struct seccomp_data` has the number of the call.
    const NUMBER_AT: u32 = 0;
    let statement = |code: u32, k: u32| libc::sock_filter { code: code.try_into().expect("16 bits"), jt: 0, jf: 0, k };
    let ptrace = u32::try_from(libc::SYS_ptrace).expect("a small number");
    let is_ptrace = statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, ptrace);
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, NUMBER_AT),
        libc::sock_filter { jf: 1, ..is_ptrace },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned()),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let length = program.len().try_into().expect("four");
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: takes no pointers.
    outcome(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).expect("always allowed");
    // SAFETY: the kernel copies a program of four statements, all live locals.
    let filtered = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    outcome(filtered).expect("filters are supported");
}

isolated! {
    fn a_filter_that_forbids_ptrace_is_reported() {
        let spinners = spinners();
        Worker::start(|| {
            forbid_ptrace();
            match stop() {
                Err(QuiesceError::Forbidden { errno, obstacle, .. }) => {
                    assert_eq!((errno.0, obstacle), (libc::EPERM, Obstacle::Unknown));
                }
                other => panic!("{other:?}"),
            }
        })
        .join();
        // This thread is not under the filter.
        assert_unharmed(&spinners);
        spinners.into_iter().for_each(Spinner::finish);
    }
}

isolated! {
    /// The usual user has neither `CAP_SYS_PTRACE` nor `CAP_SYS_NICE`.
    fn a_process_without_privileges_needs_only_to_be_dumpable() {
        let spinners = spinners();
        // SAFETY: takes no pointers. Whoever is not root has no privileges to begin with.
        let is_root = unsafe { libc::geteuid() } == 0;
        if is_root {
            const NOBODY: libc::uid_t = 65534;
            // SAFETY: takes no pointers; glibc changes every thread.
            outcome(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) }).expect("root may become anyone");
        }
        let set_dumpable = |dumpable: libc::c_ulong| {
            // SAFETY: takes no pointers.
            outcome(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, dumpable, 0, 0, 0) }).expect("0 and 1 are allowed");
        };
        set_dumpable(0);
        match stop() {
            Err(QuiesceError::Forbidden { obstacle, .. }) => assert_eq!(obstacle, Obstacle::NotDumpable),
            // /proc/self belongs to root now; where that is enforced, the first step fails already.
            Err(QuiesceError::Proc { source, .. }) => assert_eq!(source.kind(), io::ErrorKind::PermissionDenied),
            other => panic!("{other:?}"),
        }
        set_dumpable(1);
        assert_unharmed(&spinners);
        spinners.into_iter().for_each(Spinner::finish);
    }
}

isolated! {
    fn work_that_never_ends_loses_its_task_and_not_the_process() {
        let spinners = spinners();
        let never = AtomicU32::new(0);
        let limit = Duration::from_millis(100);
        let stuck = Stopper::new(PATIENCE).work_limit(limit).run(|_| while futex_wait(&never, None).is_ok() {});
        match stuck {
            Err(QuiesceError::StopperLost { signal, work_begun }) => {
                assert_eq!((signal, work_begun), (Some(libc::SIGKILL), true));
            }
            other => panic!("{other:?}"),
        }
        assert_unharmed(&spinners);
        spinners.into_iter().for_each(Spinner::finish);
    }
}

isolated! {
    fn work_that_faults_loses_its_task_and_not_the_process() {
        let spinners = spinners();
        let faulted = quiesce::stop_world(
            |_| {
                // SAFETY: it is not. The fault is what this test is about, and it is the task's alone.
                unsafe { ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
            },
            PATIENCE,
        );
        match faulted {
            Err(QuiesceError::StopperLost { signal, work_begun }) => {
                assert_eq!((signal, work_begun), (Some(libc::SIGSEGV), true));
            }
            other => panic!("{other:?}"),
        }
        assert_unharmed(&spinners);
        spinners.into_iter().for_each(Spinner::finish);
    }
}

isolated! {
    fn a_panic_in_the_work_reaches_the_caller_after_the_threads_go_on() {
        let spinners = spinners();
        // The message would be printed while threads stand still.
        panic::set_hook(Box::new(|_| ()));
        let caught = panic::catch_unwind(|| quiesce::stop_world(|_| panic::resume_unwind(Box::new(7_u8)), PATIENCE));
        let _ = panic::take_hook();
        match caught {
            Err(payload) => assert_eq!(payload.downcast_ref(), Some(&7_u8)),
            Ok(other) => panic!("{:?}", other.map(|((), report)| report)),
        }
        assert_unharmed(&spinners);
        spinners.into_iter().for_each(Spinner::finish);
    }
}

isolated! {
    fn what_the_work_owns_is_dropped_by_the_caller() {
        struct Owned(i32, &'static AtomicU32);
        impl Drop for Owned {
            fn drop(&mut self) {
                let same = self.0 == std::process::id().cast_signed();
                self.1.fetch_add(if same { 1 } else { 100 }, Ordering::SeqCst);
            }
        }
        static DROPS: AtomicU32 = AtomicU32::new(0);
        let owned = Owned(std::process::id().cast_signed(), &DROPS);
        let (before, _) = quiesce::stop_world(
            move |_| {
                let _moved_in = &owned;
                DROPS.load(Ordering::SeqCst)
            },
            PATIENCE,
        )
        .unwrap();
        assert_eq!((before, DROPS.load(Ordering::SeqCst)), (0, 1));
    }
}
