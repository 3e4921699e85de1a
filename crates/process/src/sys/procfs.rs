//! `/proc/self/task`: which threads there are, and what each is doing.
//!
//! [`TaskDir`] is opened by a thread of the process, because "self" is another process for the stopper task, and then read by that task
//! through fixed buffers. Its answers are only as good as the moment: a list made while threads come and go may lack some that live
//! (see [`TaskDir::count`]).

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    str,
};

use super::{errno::Errno, signal::SignalSet, syscall::syscall};

/// A thread's number.
pub type Tid = libc::pid_t;

/// The state letter of a thread that has ended, but is still in the list (`proc_pid_stat(5)`).
pub(crate) const ZOMBIE: u8 = b'Z';
/// The state letter of a thread that is being removed from the list.
pub(crate) const DEAD: u8 = b'X';

/// The directory of a process's threads, open.
pub(crate) struct TaskDir {
    file: File,
}

impl TaskDir {
    /// Opens the directory of the calling process. Allocates.
    pub(crate) fn open_own() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/task")? })
    }

    /// Opens the directory of another process. Allocates.
    pub(crate) fn open_other(process: Tid) -> io::Result<Self> {
        Ok(Self { file: File::open(format!("/proc/{process}/task"))? })
    }

    /// Calls `visit` with every thread that the kernel lists.
    ///
    /// # Errors
    /// Those of the kernel and of `visit`.
    pub(crate) fn for_each_thread<E: From<Errno>>(&self, mut visit: impl FnMut(Tid) -> Result<(), E>) -> Result<(), E> {
        rewind(self.file.as_fd())?;
        // 16 KiB hold some 500 threads. The kernel may end a list early when a thread exits while it is between two pieces, or in the
        // middle of one.
        let mut buffer = [0_u8; 16 << 10];
        loop {
            let arguments = [self.descriptor(), buffer.as_mut_ptr() as usize, buffer.len()];
            // SAFETY: the kernel stores at most `buffer.len()` bytes into it.
            let count = unsafe { syscall(libc::SYS_getdents64, arguments) }?;
            if count == 0 {
                return Ok(());
            }
            for tid in names(buffer.get(..count).unwrap_or_default()).filter_map(parse_tid) {
                visit(tid)?;
            }
        }
    }

    /// How many threads the process has, those included that have ended and are not yet removed.
    ///
    /// The kernel adds their number to the directory's link count (`proc_task_getattr` in `fs/proc/base.c`). A listing of that length that
    /// was made while none of the listed could run is complete.
    pub(crate) fn count(&self) -> Result<usize, Errno> {
        // An empty directory has two links: its name in the parent, and its own dot.
        const LINKS_WITHOUT_THREADS: usize = 2;
        // SAFETY: `statx` consists of integers, for which zero is a value.
        let mut status: libc::statx = unsafe { std::mem::zeroed() };
        let flags = libc::AT_EMPTY_PATH.cast_unsigned() as usize;
        let arguments =
            [self.descriptor(), c"".as_ptr() as usize, flags, libc::STATX_NLINK as usize, &raw mut status as usize];
        // SAFETY: the path is a C string, and the kernel stores one `statx` into a live local.
        unsafe { syscall(libc::SYS_statx, arguments) }?;
        Ok((status.stx_nlink as usize).saturating_sub(LINKS_WITHOUT_THREADS))
    }

    /// The state letter of a thread, as in `proc_pid_stat(5)`, or `None` if there is no such thread.
    pub(crate) fn state(&self, tid: Tid) -> Option<u8> {
        let mut buffer = [0_u8; 512];
        state_in_stat(self.read(tid, b"stat", &mut buffer)?)
    }

    /// Reads the front of `/proc/self/task/TID/NAME`.
    fn read<'a>(&self, tid: Tid, name: &[u8], buffer: &'a mut [u8]) -> Option<&'a [u8]> {
        let path = task_path(tid, name)?;
        let flags = (libc::O_RDONLY | libc::O_CLOEXEC).cast_unsigned() as usize;
        // SAFETY: the path is zero-terminated (`task_path`).
        let file = unsafe { syscall(libc::SYS_openat, [self.descriptor(), path.as_ptr() as usize, flags]) }.ok()?;
        // SAFETY: the kernel stores at most `buffer.len()` bytes into it.
        let count = unsafe { syscall(libc::SYS_read, [file, buffer.as_mut_ptr() as usize, buffer.len()]) };
        // SAFETY: the descriptor was opened above and is known to nobody else.
        let _ = unsafe { syscall(libc::SYS_close, [file]) };
        buffer.get(..count.ok()?)
    }

    fn descriptor(&self) -> usize {
        self.file.as_raw_fd().cast_unsigned() as usize
    }
}

/// Goes back to the beginning of `file`.
pub(crate) fn rewind(file: BorrowedFd<'_>) -> Result<(), Errno> {
    let arguments = [file.as_raw_fd().cast_unsigned() as usize, 0, libc::SEEK_SET.cast_unsigned() as usize];
    // SAFETY: moves the position of a descriptor that is open; no memory is passed.
    unsafe { syscall(libc::SYS_lseek, arguments) }.map(drop)
}

/// Reads from `file` into `buffer` at the file's position.
pub(crate) fn read(file: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    let arguments = [file.as_raw_fd().cast_unsigned() as usize, buffer.as_mut_ptr() as usize, buffer.len()];
    // SAFETY: the kernel stores at most `buffer.len()` bytes into it.
    unsafe { syscall(libc::SYS_read, arguments) }
}

/// The value of a field such as `SigBlk` or `TracerPid` in the text of `/proc/PID/status`.
pub(crate) fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// The signals that a thread blocks, according to the text of its `status` file.
pub(crate) fn blocked_signals(status: &str) -> Option<SignalSet> {
    u64::from_str_radix(status_field(status, "SigBlk")?, 16).ok().map(SignalSet::from_bits)
}

/// `TID/NAME` with a zero behind it, without allocation; `None` if it does not fit.
fn task_path(tid: Tid, name: &[u8]) -> Option<[u8; 32]> {
    let mut digits = [0_u8; 10];
    let mut rest = u32::try_from(tid).ok()?;
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + u8::try_from(rest % 10).ok()?;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let mut path = [0_u8; 32];
    let (number, tail) = path.split_at_mut(digits.len() - first);
    number.copy_from_slice(&digits[first..]);
    // One byte for the slash, one for the zero at the end.
    let (slash, tail) = tail.split_first_mut()?;
    *slash = b'/';
    if tail.len() <= name.len() {
        return None;
    }
    tail[..name.len()].copy_from_slice(name);
    Some(path)
}

/// The names in what `getdents64` returned: records of inode (8 bytes), offset (8), length (2), type (1), zero-terminated name.
fn names(mut records: &[u8]) -> impl Iterator<Item = &[u8]> {
    const LENGTH_AT: usize = 16;
    const NAME_AT: usize = 19;
    std::iter::from_fn(move || {
        let length: [u8; 2] = records.get(LENGTH_AT..LENGTH_AT + 2)?.try_into().ok()?;
        let (record, rest) = records.split_at_checked(usize::from(u16::from_ne_bytes(length)))?;
        records = rest;
        record.get(NAME_AT..)?.split(|byte| *byte == 0).next()
    })
}

/// A directory name as a thread's number; `.` and `..` are none.
fn parse_tid(name: &[u8]) -> Option<Tid> {
    str::from_utf8(name).ok()?.parse().ok()
}

/// The third field of a `stat` file. The second is the thread's name in parentheses, which may itself contain any character.
fn state_in_stat(stat: &[u8]) -> Option<u8> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(name_end + 2).copied()
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    /// The number of the calling thread.
    fn own_tid() -> Tid {
        // SAFETY: has no preconditions.
        unsafe { libc::gettid() }
    }

    #[test]
    fn the_list_holds_every_thread_and_the_count_agrees() {
        // In a process of its own it would be exact; here other tests come and go, so look at one thread only.
        let (send, receive) = mpsc::channel();
        let (end, wait_for_end) = mpsc::channel::<()>();
        let worker = thread::spawn(move || {
            send.send(own_tid()).unwrap();
            wait_for_end.recv().unwrap_err();
        });
        let worker_tid = receive.recv().unwrap();
        let tasks = TaskDir::open_own().unwrap();
        let mut found = Vec::new();
        // A list may be short while threads exit: read until both are in it.
        while !(found.contains(&worker_tid) && found.contains(&own_tid())) {
            found.clear();
            tasks
                .for_each_thread(|tid| {
                    found.push(tid);
                    Ok::<_, Errno>(())
                })
                .unwrap();
        }
        assert!(tasks.count().unwrap() >= 2);
        assert_eq!(tasks.state(own_tid()), Some(b'R'));
        drop(end);
        worker.join().unwrap();
        while tasks.state(worker_tid).is_some() {
            thread::yield_now();
        }
    }

    #[test]
    fn records_are_split_and_cut_ones_ignored() {
        let mut records = Vec::new();
        for name in [&b"."[..], b"..", b"4711", b"12"] {
            let start = records.len();
            records.resize(start + 19, 0);
            records.extend_from_slice(name);
            records.resize((records.len() + 1).next_multiple_of(8), 0);
            let length = u16::try_from(records.len() - start).unwrap();
            records[start + 16..start + 18].copy_from_slice(&length.to_ne_bytes());
        }
        let tids = |records| names(records).filter_map(parse_tid).collect::<Vec<_>>();
        assert_eq!(tids(&records), [4711, 12]);
        assert_eq!(tids(&records[..records.len() - 1]), [4711]);
        assert_eq!(tids(&[]), []);
    }

    #[test]
    fn paths_are_written_without_allocation() {
        assert_eq!(task_path(0, b"stat").unwrap()[..7], *b"0/stat\0");
        assert_eq!(task_path(4_194_304, b"stat").unwrap()[..13], *b"4194304/stat\0");
        assert!(task_path(Tid::MAX, b"status").is_some());
        assert_eq!(task_path(Tid::MAX, &[b'x'; 21]), None, "no room for the zero");
        assert_eq!(task_path(-1, b"stat"), None);
    }

    #[test]
    fn a_thread_may_be_named_like_its_own_state() {
        assert_eq!(state_in_stat(b"1 (cat) S 0 1"), Some(b'S'));
        assert_eq!(state_in_stat(b"1 (a) R) D 0 1"), Some(b'D'));
        assert_eq!(state_in_stat(b"1 (cat"), None);
        assert_eq!(state_in_stat(b"1 (cat)"), None);
    }

    #[test]
    fn status_fields_are_found_by_their_whole_name() {
        let status = "Name:\tSigBlk\nTracerPid:\t77\nSigBlk:\t0000000000000010\n";
        assert_eq!(status_field(status, "TracerPid"), Some("77"));
        assert_eq!(status_field(status, "Tracer"), None);
        assert_eq!(blocked_signals(status), Some(SignalSet::EMPTY.with(libc::SIGTRAP)));
        assert_eq!(blocked_signals("SigBlk:\tq"), None);
    }

    #[test]
    fn plain_reads_return_what_the_file_holds() {
        let file = File::open("/proc/self/comm").unwrap();
        let mut buffer = [0; 64];
        let count = read(file.as_fd(), &mut buffer).unwrap();
        assert_eq!(buffer[count - 1], b'\n');
    }
}
