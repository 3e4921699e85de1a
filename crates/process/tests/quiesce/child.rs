//! Running a test in a process of its own, for a bounded time; and what tests in such a process share.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{self, Read},
    process::{Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use trapline_engine::Addr;

/// Names the test that the process was started for.
const VARIABLE: &str = "TRAPLINE_ISOLATED_TEST";

/// No test takes more than a few seconds. Beyond this its process is killed, and the test fails.
const TIME_LIMIT: Duration = Duration::from_secs(90);

/// How long threads may take to stop, on a machine that does other things too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Declares a test whose body runs in a process of its own and must return normally.
macro_rules! isolated {
    ($(#[$attribute:meta])* fn $name:ident() $body:block) => {
        $(#[$attribute])*
        #[test]
        fn $name() {
            let path = $crate::child::test_path(module_path!(), stringify!($name));
            if $crate::child::is_child(&path) {
                fn body() $body
                return $crate::child::run_body(body);
            }
            let end = $crate::child::run(&path);
            assert!(end.status.success(), "{}: {}", end.status, end.output);
        }
    };
}
pub(crate) use isolated;

/// How a child ended, and what it printed.
pub(crate) struct End {
    pub(crate) status: ExitStatus,
    pub(crate) output: String,
}

/// A test's name as the test harness knows it: without the crate.
pub(crate) fn test_path(module: &str, name: &str) -> String {
    let within_crate = module.split_once("::").map_or("", |(_, rest)| rest);
    format!("{within_crate}::{name}")
}

/// Whether this process was started for the test.
pub(crate) fn is_child(path: &str) -> bool {
    env::var_os(VARIABLE).as_deref() == Some(OsStr::new(path))
}

/// Where the stack of the thread that runs a test's body begins to be the body's.
static BODY_FRAMES_BELOW: AtomicUsize = AtomicUsize::new(0);

/// Runs the body of a test, of which nothing is inlined here.
#[inline(never)]
pub(crate) fn run_body(body: fn()) {
    let mark = 0_u8;
    BODY_FRAMES_BELOW.store((&raw const mark).addr(), Ordering::Relaxed);
    std::hint::black_box(body)();
    std::hint::black_box(&mark);
}

/// Below this address the stack of a body's thread holds the body's own frames only.
pub(crate) fn body_frames_below() -> Addr {
    Addr::new(BODY_FRAMES_BELOW.load(Ordering::Relaxed) as u64)
}

/// Runs the test in a process of its own.
pub(crate) fn run(path: &str) -> End {
    let mut child = Command::new(env::current_exe().expect("this program's own path"))
        .args([path, "--exact", "--nocapture"])
        .env(VARIABLE, path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starting this program again");
    let mut pipes = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let mut output = String::new();
        let _ = pipes.0.read_to_string(&mut output);
        let _ = pipes.1.read_to_string(&mut output);
        let _ = send.send(output);
    });
    // The pipes end with the last process that holds them: the child and whatever it forked.
    let output = receive.recv_timeout(TIME_LIMIT).unwrap_or_else(|_| {
        let _ = child.kill();
        format!("killed after {TIME_LIMIT:?}")
    });
    End { status: child.wait().expect("waiting for the child"), output }
}

/// The number of the calling thread.
pub(crate) fn own_tid() -> i32 {
    // SAFETY: has no preconditions.
    unsafe { libc::gettid() }
}

/// Lets others run until `condition` holds. The time limit of the test's process bounds it.
pub(crate) fn wait_until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

/// Waits until a thread sleeps in one of these system calls.
pub(crate) fn wait_until_in_syscall(tid: i32, calls: &[libc::c_long]) {
    wait_until(|| {
        // "running", or the call's number and arguments.
        let text = fs::read_to_string(format!("/proc/self/task/{tid}/syscall")).expect("the thread exists");
        text.split_whitespace()
            .next()
            .and_then(|number| number.parse().ok())
            .is_some_and(|number| calls.contains(&number))
    });
}

/// What a system call returned, with its `errno`.
pub(crate) fn outcome(result: impl TryInto<i64>) -> io::Result<i64> {
    let result = result.try_into().unwrap_or(-1);
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A thread, and the number the kernel has for it.
pub(crate) struct Worker<T> {
    pub(crate) tid: i32,
    handle: JoinHandle<T>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread and waits until it runs.
    pub(crate) fn start(body: impl FnOnce() -> T + Send + 'static) -> Self {
        let (send, receive) = mpsc::channel();
        let handle = thread::spawn(move || {
            send.send(own_tid()).expect("the starter waits");
            body()
        });
        Self { tid: receive.recv().expect("the thread runs"), handle }
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// Waits for its end.
    pub(crate) fn join(self) -> T {
        self.handle.join().expect("the thread did not panic")
    }
}

/// A thread that never sleeps, and counts. It leaves the CPU to whoever wants it, so that the tests end in time.
pub(crate) struct Spinner {
    shared: &'static SpinnerState,
    worker: Worker<()>,
}

#[derive(Default)]
struct SpinnerState {
    rounds: AtomicU64,
    end: AtomicBool,
}

impl Spinner {
    pub(crate) fn start() -> Self {
        let shared: &'static SpinnerState = Box::leak(Box::default());
        let worker = Worker::start(|| {
            // SAFETY: takes no pointers; 0 is the calling thread.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
            while !shared.end.load(Ordering::Relaxed) {
                shared.rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { shared, worker }
    }

    pub(crate) fn tid(&self) -> i32 {
        self.worker.tid
    }

    /// How far it has come.
    pub(crate) fn rounds(&self) -> u64 {
        self.shared.rounds.load(Ordering::Relaxed)
    }

    /// Waits until it has moved.
    pub(crate) fn wait_for_progress(&self) {
        let before = self.rounds();
        wait_until(|| self.rounds() != before);
    }

    pub(crate) fn finish(self) {
        self.shared.end.store(true, Ordering::Relaxed);
        self.worker.join();
    }
}

/// A pipe that a thread waits at until it is told to go on.
#[derive(Clone, Copy)]
pub(crate) struct Pipe {
    read_end: i32,
    write_end: i32,
}

impl Pipe {
    pub(crate) fn new() -> Self {
        let mut ends = [0; 2];
        // SAFETY: two descriptors are stored in a live local.
        let result = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
        outcome(result).expect("a pipe");
        Self { read_end: ends[0], write_end: ends[1] }
    }

    pub(crate) fn read_end(self) -> i32 {
        self.read_end
    }

    /// Reads one byte, with a single system call.
    pub(crate) fn wait(self) -> io::Result<i64> {
        let mut byte = 0_u8;
        // SAFETY: at most one byte is stored in a live local.
        let count = unsafe { libc::read(self.read_end, (&raw mut byte).cast(), 1) };
        outcome(count)
    }

    /// Writes one byte.
    pub(crate) fn signal(self) {
        // SAFETY: one byte is read from a static.
        let count = unsafe { libc::write(self.write_end, [0_u8].as_ptr().cast(), 1) };
        assert_eq!(outcome(count).expect("the pipe has room"), 1);
    }
}

/// Sleeps at a futex while it holds 0, with a single system call.
pub(crate) fn futex_wait(word: &AtomicU32, timeout: Option<Duration>) -> io::Result<i64> {
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs().try_into().expect("a short time"),
        tv_nsec: libc::c_long::from(timeout.subsec_nanos().cast_signed()),
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the timeout are live.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, 0, timeout) };
    outcome(result)
}

/// Stores 1 and wakes the sleeper.
pub(crate) fn futex_release(word: &AtomicU32) {
    word.store(1, Ordering::SeqCst);
    // SAFETY: a wake does not touch the word.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
    outcome(result).expect("a wake always works");
}

/// Runs `body` in a forked process, whose only thread it is, and returns that process's number. It exits with what `body` returns.
pub(crate) fn fork(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: glibc makes its allocator usable in the child, and the bodies use nothing else that another thread may have locked.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // A test that fails does not wait for it.
        // SAFETY: takes no pointers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
        // SAFETY: ends the process without the parent's exit handlers.
        unsafe { libc::_exit(code) };
    }
    outcome(pid).expect("a child process");
    pid
}

/// Waits for a change of a child process and returns the wait status.
pub(crate) fn wait_for(pid: i32, options: i32) -> i32 {
    let mut status = 0;
    // SAFETY: one `int` is stored in a live local.
    while unsafe { libc::waitpid(pid, &raw mut status, options) } != pid {
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EINTR), "waiting for {pid}");
    }
    status
}

/// Waits for a child's end, which must be an exit with this code.
pub(crate) fn expect_exit(pid: i32, code: i32) {
    let status = wait_for(pid, 0);
    assert!(libc::WIFEXITED(status), "ended with wait status {status:#x}");
    assert_eq!(libc::WEXITSTATUS(status), code);
}
