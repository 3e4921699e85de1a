//! What can go wrong while recording, each with what was being done and what to do next.

use std::{io, path::PathBuf};

use crate::refusal::Refusal;

/// Why a recording did not begin, or broke off.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such program in the PATH, or at the path given.
    #[error("cannot find the program `{0}`; give its path, or check PATH")]
    NotFound(String),
    /// The file is there, but cannot be executed.
    #[error("cannot execute {}: {reason}", .path.display())]
    NotExecutable {
        /// The file.
        path: PathBuf,
        /// What is in the way, and what to do.
        reason: String,
    },
    /// The program can run, but cannot be traced. It was not started.
    #[error("cannot trace {}: {reason}", .path.display())]
    NotTraceable {
        /// The file.
        path: PathBuf,
        /// What is in the way, and what to do.
        reason: String,
    },
    /// The process runs, and cannot be recorded. Nothing of it was changed.
    #[error("cannot record process {pid}: {reason}")]
    NotAttachable {
        /// The process.
        pid: i32,
        /// What is in the way, and what to do.
        reason: Refusal,
    },
    /// A call of the operating system failed.
    #[error("{doing}: {source}{}", advice(source))]
    System {
        /// What was being done.
        doing: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The trace file could not be written.
    #[error(transparent)]
    Trace(#[from] trapline_trace::Error),
}

fn advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EMFILE) => "; allow more open files, by `ulimit -n`",
        Some(libc::EFBIG) => "; the limit for a file's size holds for shared memory too: raise it, by `ulimit -f`",
        Some(libc::ENFILE) => "; the whole system has too many open files: allow more by the sysctl fs.file-max",
        Some(libc::EPERM) => {
            "; somebody else traces it, or a sandbox forbids it: try as another user or outside of the container"
        }
        Some(libc::ENOMEM) => "; free some memory, or ask for a smaller --buffer",
        _ => "",
    }
}

/// For errors of the operating system: says what was being done.
pub(crate) trait Doing<T> {
    /// Adds what was being done.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::System { doing: what(), source })
    }
}
