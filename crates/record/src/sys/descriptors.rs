//! Descriptors of other processes, and of ours for them.

use std::{
    fs::File,
    io,
    mem::{size_of, zeroed},
    os::fd::{FromRawFd, RawFd},
};

use super::{Tid, check};

/// A descriptor of another process, as one of ours (`pidfd_getfd(2)`).
pub(crate) fn take(process: Tid, descriptor: RawFd) -> io::Result<File> {
    // SAFETY: plain numbers.
    let handle = check(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })?;
    let handle = RawFd::try_from(handle).map_err(io::Error::other)?;
    // SAFETY: the descriptor was just made, and nobody else knows it.
    let _handle = unsafe { File::from_raw_fd(handle) };
    // SAFETY: plain numbers.
    let taken = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, handle, descriptor, 0) })?;
    let taken = RawFd::try_from(taken).map_err(io::Error::other)?;
    // SAFETY: as above.
    Ok(unsafe { File::from_raw_fd(taken) })
}

/// Who is at the other end of a socket: process and user, as they were when it was connected, or began to listen (unix(7), `SO_PEERCRED`).
pub(crate) fn peer(socket: RawFd) -> io::Result<(Tid, u32)> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len_bytes = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    let place = (&raw mut peer).cast();
    // SAFETY: both outlive the call, and the second says how long the first is.
    let done = unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, place, &raw mut len_bytes) };
    check(done.into())?;
    Ok((peer.pid, peer.uid))
}

/// What goes with a byte: a header, and the descriptor behind it (cmsg(3)).
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    descriptor: RawFd,
}

/// Sends a descriptor through a socket, with one byte (unix(7), `SCM_RIGHTS`).
pub(crate) fn send(socket: RawFd, descriptor: RawFd) -> io::Result<()> {
    let mut byte = 0_u8;
    let mut vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let header = libc::cmsghdr {
        cmsg_len: size_of::<libc::cmsghdr>() + size_of::<RawFd>(),
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    let mut control = Control { header, descriptor };
    // SAFETY: plain numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    // SAFETY: the message and all that it refers to outlive the call.
    let sent = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) };
    check(libc::c_long::try_from(sent).unwrap_or(-1)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{IoSliceMut, Read, Write},
        os::{fd::AsRawFd, unix::net::UnixStream},
    };

    use super::*;

    #[test]
    fn a_descriptor_goes_through_a_socket() {
        let (mut here, there) = UnixStream::pair().expect("two sockets");
        let own = std::process::id().cast_signed();
        let taken = take(own, there.as_raw_fd()).expect("our own descriptor");
        let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
        send(taken.as_raw_fd(), writer.as_raw_fd()).expect("there is room");
        let mut byte = [1];
        here.read_exact(&mut byte).expect("one byte");
        assert_eq!(byte, [0]);
        // What came with it was closed, as nobody asked for it; ours is open.
        writer.write_all(b"x").expect("a reader");
        drop(writer);
        let mut text = [0; 2];
        assert_eq!(reader.read_vectored(&mut [IoSliceMut::new(&mut text)]).expect("an end"), 1);
        assert!(take(own, -1).is_err());
    }
}
