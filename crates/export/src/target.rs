//! Where an export goes: a file, standard output, or a directory.
//!
//! Owns [`Target`]. Invariant: what is made is its owner's alone, as the trace is, for it holds the same names.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::Error;

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target(PathBuf);

/// A file that is written.
pub(crate) type Stream = BufWriter<Box<dyn Write + Send>>;

const BUFFER_BYTES: usize = 1 << 18;

impl Target {
    /// A path; `-` is standard output.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// What messages call it.
    pub fn path(&self) -> &Path {
        if self.is_standard_output() { Path::new("standard output") } else { &self.0 }
    }

    /// It is standard output.
    pub fn is_standard_output(&self) -> bool {
        self.0.as_os_str() == "-"
    }

    pub(crate) fn file(&self) -> Result<Stream, Error> {
        let sink: Box<dyn Write + Send> = if self.is_standard_output() {
            Box::new(io::stdout())
        } else {
            Box::new(create(&self.0).map_err(|source| Error::Create { path: self.0.clone(), source })?)
        };
        Ok(BufWriter::with_capacity(BUFFER_BYTES, sink))
    }

    pub(crate) fn directory(&self) -> Result<PathBuf, Error> {
        if self.is_standard_output() {
            return Err(Error::Directory);
        }
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Ok(()) => Ok(self.0.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let is_empty = fs::read_dir(&self.0).is_ok_and(|mut entries| entries.next().is_none());
                if is_empty { Ok(self.0.clone()) } else { Err(Error::Occupied { path: self.0.clone() }) }
            }
            Err(source) => Err(Error::Create { path: self.0.clone(), source }),
        }
    }
}

/// Makes a file of an export, or empties the one that is there.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}
