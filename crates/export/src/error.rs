//! What can go wrong with an export, told so that its user knows what to do next.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why a trace cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The trace cannot be read.
    #[error(transparent)]
    Trace(#[from] trapline_trace::Error),
    /// The output cannot be made.
    #[error("cannot create {path}: {source}; name another one with -o, where you may write", path = path.display())]
    Create {
        /// The output.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A directory is there already, and holds something.
    #[error("{path} is there already, and is no empty directory; remove it, or name another one with -o", path = path.display())]
    Occupied {
        /// The directory.
        path: PathBuf,
    },
    /// A directory cannot go to standard output.
    #[error("this format is a directory, and cannot go to standard output; name a directory with -o")]
    Directory,
    /// The output cannot be written to its end.
    #[error("cannot write to {path}: {source}; what is there of it is incomplete", path = path.display())]
    Write {
        /// The output.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl Error {
    /// Whoever read the output has gone away, which is no failure.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Write { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Why going through a trace came to nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    /// On the way in.
    Trace(trapline_trace::Error),
    /// On the way out.
    Output(io::Error),
}

impl Failure {
    /// Names the output.
    pub(crate) fn about(self, path: &Path) -> Error {
        match self {
            Self::Trace(error) => Error::Trace(error),
            Self::Output(source) => Error::Write { path: path.into(), source },
        }
    }
}
