//! How a process gets a descriptor of ours.
//!
//! Owns [`open`]. A process of the same user that sees our processes opens the file by its path below `/proc`. To any other it is handed: a stopped thread makes a
//! pair of sockets, of which we take one end (`pidfd_getfd(2)`) and send the descriptor (unix(7), `SCM_RIGHTS`). So neither its user, nor its namespaces, nor its
//! root folder matter. Invariant: it has the one descriptor more that it asked for, until it closes that.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use trapline_engine::{Addr, Mode};

use crate::{
    remote::Remote,
    sys::{Tid, descriptors, memory::Memory, shared},
};

/// How much of a thread's stack is used for it.
pub(crate) const STACK_BYTES: i64 = 512;

/// Of what lies there, in bytes from its start: a `msghdr`, an `iovec`, the byte that is sent, what comes with it, and the pair of sockets. At 32 bit these
/// are smaller.
const VECTOR_AT: usize = 56;
const BYTE_AT: usize = 72;
const CONTROL_AT: usize = 80;
const CONTROL_BYTES: usize = 24;
const PAIR_AT: usize = 104;

/// Has a stopped thread open what `descriptor` is of ours, to write as well or not. `room` is memory of its stack that nobody uses. Returns its descriptor.
pub(crate) fn open(
    remote: &mut Remote,
    memory: &Memory,
    room: Addr,
    descriptor: RawFd,
    is_to_write: bool,
) -> io::Result<u64> {
    let tid = remote.tid();
    if crate::tracer::id_inside(tid) == tid.cast_unsigned() {
        match by_path(remote, memory, room, descriptor, is_to_write) {
            // It is another user's, or there is no such folder.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::ENOENT)) => {}
            opened => return opened,
        }
    }
    let process = crate::tracer::thread_group(tid).unwrap_or(tid);
    by_socket(remote, memory, room, process, descriptor)
}

fn by_path(remote: &mut Remote, memory: &Memory, room: Addr, descriptor: RawFd, is_to_write: bool) -> io::Result<u64> {
    let path = shared::path_for_others(descriptor);
    memory.write(room, &[path.as_bytes(), &[0]].concat())?;
    let access = if is_to_write { libc::O_RDWR } else { libc::O_RDONLY };
    let flags = u64::from((access | libc::O_CLOEXEC).cast_unsigned());
    let here = i64::from(libc::AT_FDCWD).cast_unsigned();
    remote.syscall(libc::SYS_openat, [here, room.value(), flags, 0, 0, 0])
}

fn by_socket(remote: &mut Remote, memory: &Memory, room: Addr, process: Tid, descriptor: RawFd) -> io::Result<u64> {
    let kind = u64::from((libc::SOCK_STREAM | libc::SOCK_CLOEXEC).cast_unsigned());
    let pair_at = room.after(PAIR_AT);
    remote.syscall(libc::SYS_socketpair, [libc::AF_UNIX as u64, kind, 0, pair_at.value(), 0, 0])?;
    let pair = memory.read_word(pair_at)?;
    let ends = [pair & u64::from(u32::MAX), pair >> u32::BITS];
    let received = (|| {
        let end = descriptors::take(process, i32::try_from(ends[1]).unwrap_or(-1))?;
        descriptors::send(end.as_raw_fd(), descriptor)?;
        receive(remote, memory, room, ends[0])
    })();
    for end in ends {
        remote.syscall(libc::SYS_close, [end, 0, 0, 0, 0, 0])?;
    }
    received
}

fn receive(remote: &mut Remote, memory: &Memory, room: Addr, socket: u64) -> io::Result<u64> {
    let at = |offset: usize| room.after(offset).value();
    let word_bytes = remote.mode().word_bytes() as usize;
    let mut bytes = [0; PAIR_AT];
    // Of `msghdr`, in words: the vector, its length, what comes with it, and how much room there is for that; of `iovec`: the byte, and that it is one.
    let words = [
        (2 * word_bytes, at(VECTOR_AT)),
        (3 * word_bytes, 1),
        (4 * word_bytes, at(CONTROL_AT)),
        (5 * word_bytes, CONTROL_BYTES as u64),
        (VECTOR_AT, at(BYTE_AT)),
        (VECTOR_AT + word_bytes, 1),
    ];
    for (offset, word) in words {
        bytes[offset..offset + word_bytes].copy_from_slice(&word.to_le_bytes()[..word_bytes]);
    }
    memory.write(room, &bytes)?;
    let flags = u64::from(libc::MSG_CMSG_CLOEXEC.cast_unsigned());
    remote.syscall(libc::SYS_recvmsg, [socket, room.value(), flags, 0, 0, 0])?;
    let came = memory.read_vec(room.after(CONTROL_AT), CONTROL_BYTES)?;
    // Behind length, level and type (cmsg(3)).
    let received_at = word_bytes + 8;
    let descriptor = came[received_at..].first_chunk().map(|bytes| i32::from_le_bytes(*bytes));
    let len_bytes = match remote.mode() {
        Mode::Bits32 => came.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes).into()),
        Mode::Bits64 => came.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)),
    };
    let descriptor = descriptor.filter(|_| len_bytes >= received_at as u64 + 4);
    descriptor
        .and_then(|descriptor| u64::try_from(descriptor).ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}
