//! Ways to sleep in one system call, each with a way to be woken.

use std::{
    io, ptr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use crate::child::{Pipe, futex_release, futex_wait, outcome, own_tid};

/// Longer than any test runs.
const HOUR: Duration = Duration::from_hours(1);

/// A way to sleep in one system call, and to be woken.
pub(crate) struct Sleep {
    /// The numbers that the kernel may show for the call.
    pub(crate) calls: &'static [libc::c_long],
    /// One call; an error is a failure of the test.
    pub(crate) run: Box<dyn FnOnce() -> io::Result<i64> + Send>,
    pub(crate) wake: Box<dyn FnOnce()>,
}

pub(crate) fn read() -> Sleep {
    let pipe = Pipe::new();
    Sleep { calls: &[libc::SYS_read], run: Box::new(move || pipe.wait()), wake: Box::new(move || pipe.signal()) }
}

fn futex(timeout: Option<Duration>) -> Sleep {
    let word: &'static AtomicU32 = Box::leak(Box::default());
    Sleep {
        calls: &[libc::SYS_futex],
        run: Box::new(move || futex_wait(word, timeout)),
        wake: Box::new(|| futex_release(word)),
    }
}

pub(crate) fn epoll(timeout_ms: i32) -> Sleep {
    let pipe = Pipe::new();
    // SAFETY: takes no pointers.
    let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    let mut interest = libc::epoll_event { events: libc::EPOLLIN.cast_unsigned(), u64: 0 };
    // SAFETY: one event is read from a live local.
    let added = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, pipe.read_end(), &raw mut interest) };
    outcome(added).expect("the pipe can be polled");
    Sleep {
        calls: &[libc::SYS_epoll_wait, libc::SYS_epoll_pwait],
        run: Box::new(move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: at most one event is stored in a live local.
            outcome(unsafe { libc::epoll_wait(epoll, &raw mut event, 1, timeout_ms) })
        }),
        wake: Box::new(move || pipe.signal()),
    }
}

fn poll(timeout_ms: i32) -> Sleep {
    let pipe = Pipe::new();
    Sleep {
        calls: &[libc::SYS_poll, libc::SYS_ppoll],
        run: Box::new(move || {
            let mut interest = libc::pollfd { fd: pipe.read_end(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one structure is read and stored, a live local.
            outcome(unsafe { libc::poll(&raw mut interest, 1, timeout_ms) })
        }),
        wake: Box::new(move || pipe.signal()),
    }
}

/// i386: the call that all of sockets shared before Linux 4.3, or one of its own.
#[cfg(target_arch = "x86")]
const RECEIVE: &[libc::c_long] = &[libc::SYS_socketcall, libc::SYS_recvfrom];
#[cfg(target_arch = "x86_64")]
const RECEIVE: &[libc::c_long] = &[libc::SYS_recvfrom];

fn receive_with_timeout() -> Sleep {
    let mut ends = [0; 2];
    // SAFETY: two descriptors are stored in a live local.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()) };
    outcome(made).expect("a pair of sockets");
    let timeout = libc::timeval { tv_sec: 3600, tv_usec: 0 };
    let bytes = u32::try_from(size_of_val(&timeout)).expect("a small structure");
    // SAFETY: one timeval is read from a live local.
    let set = unsafe {
        libc::setsockopt(ends[0], libc::SOL_SOCKET, libc::SO_RCVTIMEO, ptr::from_ref(&timeout).cast(), bytes)
    };
    outcome(set).expect("sockets have timeouts");
    Sleep {
        calls: RECEIVE,
        run: Box::new(move || {
            let mut byte = 0_u8;
            // SAFETY: at most one byte is stored in a live local.
            outcome(unsafe { libc::recv(ends[0], (&raw mut byte).cast(), 1, 0) })
        }),
        wake: Box::new(move || {
            // SAFETY: one byte is read from a static.
            let count = unsafe { libc::send(ends[1], [0_u8].as_ptr().cast(), 1, 0) };
            outcome(count).expect("the socket has room");
        }),
    }
}

/// Waits for a signal of its own thread, which is blocked, so that no handler has to run.
fn signal_wait() -> Sleep {
    let tid: Arc<AtomicU32> = Arc::default();
    let sleeper = Arc::clone(&tid);
    Sleep {
        calls: &[libc::SYS_rt_sigtimedwait],
        run: Box::new(move || {
            sleeper.store(own_tid().cast_unsigned(), Ordering::SeqCst);
            let set = 1_u64 << (libc::SIGUSR2 - 1);
            let how = libc::SIG_BLOCK;
            let nothing = ptr::null_mut::<u64>();
            // SAFETY: one kernel signal set of 8 bytes is read from a live local.
            let blocked = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const set, nothing, 8) };
            outcome(blocked)?;
            let timeout = libc::timespec { tv_sec: 3600, tv_nsec: 0 };
            // SAFETY: a set and a timespec are read from live locals; null asks for no details.
            let signal =
                unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &raw const set, nothing, &raw const timeout, 8) };
            outcome(signal)
        }),
        wake: Box::new(move || {
            let tid = tid.load(Ordering::SeqCst).cast_signed();
            // SAFETY: takes no pointers.
            let sent = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, libc::SIGUSR2) };
            outcome(sent).expect("the thread exists until it has this signal");
        }),
    }
}

/// Each of them once: nine.
pub(crate) fn all() -> Vec<Sleep> {
    vec![
        read(),
        futex(None),
        futex(Some(HOUR)),
        epoll(-1),
        epoll(3_600_000),
        poll(-1),
        poll(3_600_000),
        receive_with_timeout(),
        signal_wait(),
    ]
}
