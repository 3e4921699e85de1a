//! What can go wrong with a trace file, told so that its user knows what to do next.
//!
//! Owns [`Error`]. Damage inside of a trace is no error: the reader goes on behind it and reports it in
//! [`Damage`](crate::Damage).

use std::{io, path::PathBuf};

/// Why a trace cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be made.
    #[error("cannot create the trace {path}: {source}; name another file with -o, in a directory that you may write to", path = path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// An older trace is in the way.
    #[error("cannot keep the older trace {path} as {old}: {source}; move it away, or name another file with -o", path = path.display(), old = old.display())]
    KeepOld {
        /// The file.
        path: PathBuf,
        /// What it was to be renamed to.
        old: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Something could not be written; what was written before is intact.
    #[error("cannot write to the trace {path}: {source}; {}", advice(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Something that was to be written does not fit into the format.
    #[error("cannot write {what} to the trace: it takes {bytes} bytes, and a chunk holds {limit}")]
    TooLong {
        /// What it is.
        what: &'static str,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        limit: usize,
    },
    /// The compressor failed, which it does for want of memory only.
    #[error("cannot compress events: {0}; is there memory left?")]
    Compress(io::Error),
    /// There is no such file, or it may not be read.
    #[error("cannot open the trace {path}: {source}; {}", open_advice(source), path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file cannot be read to its end.
    #[error("cannot read the trace {path}: {source}; what was read before is lost to this command: copy the file to another disk and try that", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is nothing in it.
    #[error("the trace {path} is empty: the recorder had written nothing yet; record again with `trapline record -- COMMAND`", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{path} is not a trapline trace: it starts with {found}; name a file that `trapline record` wrote with -i", path = path.display())]
    NotATrace {
        /// The file.
        path: PathBuf,
        /// How it begins.
        found: String,
    },
    /// It was written by a newer trapline.
    #[error("the trace {path} has format version {found}, and this trapline reads versions up to {known}; read it with the trapline that recorded it, or a newer one", path = path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that is known here.
        known: u32,
    },
}

fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some room, or write to another disk with -o; what was written so far can be read"
        }
        io::ErrorKind::FileTooLarge => "the limit for a file's size is reached; what was written so far can be read",
        _ => "what was written so far can be read",
    }
}

fn open_advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "record one with `trapline record -- COMMAND`, or name one with -i",
        io::ErrorKind::PermissionDenied => "a trace belongs to the user who recorded it: read it as that user",
        _ => "name a file that `trapline record` wrote with -i",
    }
}
