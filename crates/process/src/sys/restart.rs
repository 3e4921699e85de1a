//! Which system calls may be started again when our interruption made them fail.
//!
//! Most calls that ptrace interrupts restart by themselves: the kernel returns `ERESTARTSYS` and its kin, and acts on them on the way back
//! to user mode. A few return `EINTR` straight away whenever *any* work is pending for the thread, a tracer's interruption included
//! (signal(7), "Interruption of system calls and library functions by stop signals"): the program sees an error that no signal of its own
//! explains. `epoll_wait` is one of them, so nearly every server would notice each stop.
//!
//! The remedy is to replace `EINTR` by `ERESTARTNOHAND` while the thread stands still: the kernel then starts the call again, unless a signal
//! handler is about to run, in which case the program gets the `EINTR` that it is due. What remains visible is that a relative timeout
//! starts afresh.

use libc::c_long;
use trapline_engine::Mode;

/// Calls whose `EINTR` means that nothing has happened yet, so that a second start is the same as a first.
///
/// Left out on purpose: `close` (the descriptor is gone in spite of `EINTR`), `ioctl` and whatever else depends on a driver.
const RESTARTABLE: &[c_long] = &[
    // fs/eventpoll.c, ep_poll.
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    // kernel/signal.c, do_sigtimedwait.
    libc::SYS_rt_sigtimedwait,
    // fs/aio.c, io_getevents; io_uring/io_uring.c, io_cqring_wait: only where nothing was submitted.
    libc::SYS_io_getevents,
    libc::SYS_io_uring_enter,
    // include/net/sock.h, sock_intr_errno: sockets with a timeout (SO_RCVTIMEO, SO_SNDTIMEO). A second connect waits for the first.
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    // The same sockets; and for every other file, POSIX says that EINTR means that no byte was transferred.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
];

/// ipc/sem.c, `do_semtimedop`; and `accept`, which i386 has as `accept4` or `socketcall`.
#[cfg(target_arch = "x86_64")]
const RESTARTABLE_HERE: &[c_long] = &[libc::SYS_semop, libc::SYS_semtimedop, libc::SYS_accept];

/// See [`NARROW`].
#[cfg(target_arch = "x86")]
const RESTARTABLE_HERE: &[c_long] = NARROW;

/// The numbers that 32-bit code has for all of these (`arch/x86/entry/syscalls/syscall_32.tbl`). It reaches System V semaphores and the older socket calls through
/// one number each, and has variants with 64-bit time.
const NARROW: &[c_long] = &[
    3,   // read
    4,   // write
    102, // socketcall
    117, // ipc
    145, // readv
    146, // writev
    177, // rt_sigtimedwait
    247, // io_getevents
    256, // epoll_wait
    319, // epoll_pwait
    337, // recvmmsg
    345, // sendmmsg
    362, // connect
    364, // accept4
    369, // sendto
    370, // sendmsg
    371, // recvfrom
    372, // recvmsg
    417, // recvmmsg_time64
    420, // semtimedop_time64
    421, // rt_sigtimedwait_time64
    426, // io_uring_enter
    441, // epoll_pwait2
];

/// Whether the system call of this number may be started again after `EINTR`. `mode` is that of the code that made it.
pub(crate) fn may_start_again(mode: Mode, number: isize) -> bool {
    let Ok(number) = c_long::try_from(number) else { return false };
    if mode == Mode::NATIVE {
        RESTARTABLE.contains(&number) || RESTARTABLE_HERE.contains(&number)
    } else {
        mode == Mode::Bits32 && NARROW.contains(&number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_calls_start_again_and_close_does_not() {
        let number = |call: c_long| isize::try_from(call).unwrap();
        assert!(may_start_again(Mode::NATIVE, number(libc::SYS_epoll_wait)));
        assert!(may_start_again(Mode::NATIVE, number(libc::SYS_rt_sigtimedwait)));
        assert!(!may_start_again(Mode::NATIVE, number(libc::SYS_close)));
        assert!(!may_start_again(Mode::NATIVE, number(libc::SYS_ioctl)));
        assert!(!may_start_again(Mode::NATIVE, -1));
        // `epoll_wait` and `close`.
        assert!(may_start_again(Mode::Bits32, 256) && !may_start_again(Mode::Bits32, 6));
    }

    #[cfg(target_arch = "x86")]
    #[test]
    fn the_numbers_are_the_c_librarys() {
        assert!(RESTARTABLE.iter().all(|number| NARROW.contains(number)));
    }
}
