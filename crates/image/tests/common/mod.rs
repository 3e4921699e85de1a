//! Programs that tests compile, and a place for them that goes away.
#![allow(dead_code, reason = "each test uses some of it")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;
use trapline_image::{Function, Image};

/// A directory that is removed with all that is in it.
pub(crate) struct Directory(TempDir);

impl Directory {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().expect("the directory for temporary files is writable"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// The path of a fixture's source.
pub(crate) fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Runs a tool that has to succeed.
pub(crate) fn run(tool: &str, arguments: &[&str]) {
    let output = Command::new(tool).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{tool} is needed for this test: {error}"));
    assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("the directory for temporary files has a name in UTF-8")
}

/// The function that goes by this name.
pub(crate) fn named<'a>(image: &'a Image, name: &str) -> (usize, &'a Function) {
    let mut all = image.functions().iter().enumerate();
    all.find(|(_, function)| function.name == name).unwrap_or_else(|| panic!("there is a function {name}"))
}
