//! `/proc/PID/maps`: what is mapped where, with which access, from which file.
//!
//! [`MapsLine::parse`] reads one line of it; [`for_each_line`] feeds it a whole file through a fixed buffer, without allocation, so that the
//! stopper task may use it while every thread stands still. [`read_own`] is the comfortable way, for code that may allocate.
//!
//! Source of the format: `proc_pid_maps(5)`; `show_vma_header_prefix` in `fs/proc/task_mmu.c`.

use std::{fs, io, str};

use trapline_engine::{Addr, AddrRange};

use super::errno::Errno;

/// A buffer that holds any line: the path is at most `PATH_MAX` bytes, of which each may be escaped as `\ooo`.
pub(crate) const LINE_BUFFER_BYTES: usize = 32 << 10;

/// What may be done with the memory of a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Access(u8);

impl Access {
    const READ: u8 = 1;
    const WRITE: u8 = 2;
    const EXECUTE: u8 = 4;

    /// Parses four characters such as `r-xp`.
    fn parse(text: &[u8]) -> Option<Self> {
        let &[read, write, execute, sharing] = text else { return None };
        let mut bits = 0;
        for (character, yes, no, bit) in [
            (read, b'r', b'-', Self::READ),
            (write, b'w', b'-', Self::WRITE),
            (execute, b'x', b'-', Self::EXECUTE),
            // Whether writes are shared or private does not matter here.
            (sharing, b's', b'p', 0),
        ] {
            match character {
                c if c == yes => bits |= bit,
                c if c == no => {}
                _ => return None,
            }
        }
        Some(Self(bits))
    }

    /// Whether it may be read.
    pub(crate) const fn is_readable(self) -> bool {
        self.0 & Self::READ != 0
    }

    /// Whether it may be written.
    pub(crate) const fn is_writable(self) -> bool {
        self.0 & Self::WRITE != 0
    }

    /// Whether it may be executed.
    pub(crate) const fn is_executable(self) -> bool {
        self.0 & Self::EXECUTE != 0
    }
}

/// One mapping, as its line describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MapsLine<'a> {
    /// The addresses that it covers.
    pub(crate) range: AddrRange,
    /// What may be done there.
    pub(crate) access: Access,
    /// Where in the file it begins, in bytes.
    pub(crate) offset_bytes: u64,
    /// The file's inode; 0 where no file is mapped.
    pub(crate) inode: u64,
    /// The file's path, `[name]` for what the kernel names itself, empty for anonymous memory. A newline in it is written `\012`, and
    /// ` (deleted)` follows a file that has no name any more.
    pub(crate) path: &'a [u8],
}

impl<'a> MapsLine<'a> {
    /// Parses a line without its newline, or returns `None` if it is none of this file's.
    pub(crate) fn parse(line: &'a [u8]) -> Option<Self> {
        // The first five fields are separated by one space each; the path is aligned with several.
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let (start, end) = split_once(fields.next()?, b'-')?;
        let access = Access::parse(fields.next()?)?;
        let offset_bytes = parse_number(fields.next()?, 16)?;
        let _device = fields.next()?;
        let inode = parse_number(fields.next()?, 10)?;
        let path = fields.next().unwrap_or_default().trim_ascii_start();
        let range = AddrRange { start: Addr::new(parse_number(start, 16)?), end: Addr::new(parse_number(end, 16)?) };
        (range.start <= range.end).then_some(Self { range, access, offset_bytes, inode, path })
    }
}

/// A mapping that owns its path.
#[derive(Default, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mapping {
    /// See [`MapsLine::range`].
    pub(crate) range: AddrRange,
    /// See [`MapsLine::access`].
    pub(crate) access: Access,
    /// See [`MapsLine::offset_bytes`].
    pub(crate) offset_bytes: u64,
    /// See [`MapsLine::inode`].
    pub(crate) inode: u64,
    /// See [`MapsLine::path`].
    pub(crate) path: Vec<u8>,
}

/// The mappings of this process, in ascending order. Allocates.
///
/// # Errors
/// If /proc cannot be read, or holds something else than Linux writes.
pub(crate) fn read_own() -> io::Result<Vec<Mapping>> {
    let text = fs::read("/proc/self/maps")?;
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            let MapsLine { range, access, offset_bytes, inode, path } = MapsLine::parse(line).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "a line of /proc/self/maps has another format")
            })?;
            Ok(Mapping { range, access, offset_bytes, inode, path: path.to_vec() })
        })
        .collect()
}

/// Calls `visit` with every line that `read` yields piece by piece, keeping an incomplete one in `buffer` for the next piece.
///
/// `read` fills the front of what it is given and returns how much; 0 means the end. `buffer` should have [`LINE_BUFFER_BYTES`].
///
/// # Errors
/// Those of `read` and `visit`; `EINVAL` for a line of another format; `ENAMETOOLONG` for one that does not fit in `buffer`.
pub(crate) fn for_each_line(
    buffer: &mut [u8],
    mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>,
    mut visit: impl FnMut(MapsLine<'_>) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let mut filled = 0;
    loop {
        let Some(free) = buffer.get_mut(filled..).filter(|free| !free.is_empty()) else {
            return Err(Errno(libc::ENAMETOOLONG));
        };
        let room = free.len();
        let count = read(free)?.min(room);
        if count == 0 {
            return if filled == 0 { Ok(()) } else { Err(Errno(libc::EINVAL)) };
        }
        filled += count;
        let mut done = 0;
        while let Some(len) = buffer[done..filled].iter().position(|byte| *byte == b'\n') {
            visit(MapsLine::parse(&buffer[done..done + len]).ok_or(Errno(libc::EINVAL))?)?;
            done += len + 1;
        }
        buffer.copy_within(done..filled, 0);
        filled -= done;
    }
}

fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|byte| *byte == separator)?;
    Some((&text[..at], &text[at + 1..]))
}

fn parse_number(text: &[u8], radix: u32) -> Option<u64> {
    u64::from_str_radix(str::from_utf8(text).ok()?, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"08048000-08049000 r-xp 00001000 fe:00 1234                       /usr/bin/a b (deleted)\n\
        f7d00000-f7d21000 rw-p 00000000 00:00 0 \n\
        7ffdfbe92000-7ffdfbeb3000 rw-s 00000000 00:00 0                          [stack]\n\
        ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";

    fn lines(text: &[u8]) -> Vec<MapsLine<'_>> {
        text.split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| MapsLine::parse(line).unwrap())
            .collect()
    }

    #[test]
    fn every_field_is_read() {
        let lines = lines(TEXT);
        let file = lines[0];
        assert_eq!(file.range, AddrRange::new(Addr::new(0x0804_8000), 0x1000));
        assert!(file.access.is_readable() && file.access.is_executable());
        assert!(!file.access.is_writable());
        assert_eq!((file.offset_bytes, file.inode), (0x1000, 1234));
        assert_eq!(file.path, b"/usr/bin/a b (deleted)");
        assert_eq!(lines[1].path, b"");
        assert_eq!(lines[2].access, lines[1].access, "shared or private");
        assert_eq!(lines[3].path, b"[vsyscall]");
        assert!(!lines[3].access.is_readable());
    }

    #[test]
    fn foreign_lines_are_refused() {
        for line in [
            &b""[..],
            b"VmRSS: 3 kB",
            b"08048000 r-xp 0 fe:00 1 /a",
            b"2-1 r-xp 0 fe:00 1 /a",
            b"1-2 rwxz 0 fe:00 1 /a",
            b"1-2 r-xp 0 fe:00",
            b"1-2 r-xp 0 fe:00 q /a",
        ] {
            assert_eq!(MapsLine::parse(line), None, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn lines_survive_any_cut_of_the_stream() {
        for piece in 1..TEXT.len() {
            let (mut rest, mut ranges) = (TEXT, Vec::new());
            let read = |buffer: &mut [u8]| {
                let count = piece.min(rest.len()).min(buffer.len());
                buffer[..count].copy_from_slice(&rest[..count]);
                rest = &rest[count..];
                Ok(count)
            };
            let visit = |line: MapsLine<'_>| {
                ranges.push(line.range);
                Ok(())
            };
            for_each_line(&mut [0; 128], read, visit).expect("each line is shorter than the buffer");
            assert!(ranges.iter().copied().eq(lines(TEXT).iter().map(|line| line.range)), "cut every {piece} bytes");
        }
    }

    #[test]
    fn a_stream_that_cannot_be_read_whole_is_an_error() {
        let mut once = Some(&b"1-2 r-xp"[..]);
        let mut read = |buffer: &mut [u8]| {
            let piece = once.take().unwrap_or_default();
            buffer[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        };
        assert_eq!(for_each_line(&mut [0; 64], &mut read, |_| Ok(())), Err(Errno(libc::EINVAL)), "cut in the line");
        let endless = |buffer: &mut [u8]| {
            buffer.fill(b'x');
            Ok(buffer.len())
        };
        assert_eq!(for_each_line(&mut [0; 64], endless, |_| Ok(())), Err(Errno(libc::ENAMETOOLONG)));
    }

    #[test]
    fn this_function_lies_in_an_executable_mapping_of_this_program() {
        let here = Addr::new(this_function_lies_in_an_executable_mapping_of_this_program as *const () as u64);
        let mappings = read_own().expect("/proc is mounted");
        let mine = mappings.iter().find(|mapping| mapping.range.contains(here)).expect("code is mapped");
        assert!(mine.access.is_executable() && mine.inode != 0);
        assert!(mappings.is_sorted_by_key(|mapping| mapping.range.start));
    }
}
