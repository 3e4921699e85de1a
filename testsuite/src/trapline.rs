//! The command under test.
//!
//! Owns the search for it: `TRAPLINE` in the environment names it, otherwise it is built once for each test process, in the profile of that process.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The path of the `trapline` command.
///
/// # Panics
/// It cannot be built.
pub fn path() -> &'static Path {
    // An error is kept as well: to fail takes as long as to succeed, and there are many tests.
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = PATH.get_or_init(|| env::var_os("TRAPLINE").map_or_else(build, |path| Ok(path.into())));
    found.as_deref().unwrap_or_else(|error| panic!("{error}"))
}

fn build() -> Result<PathBuf, String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "-p", "trapline-cli"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let output = command.output().unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
    if !output.status.success() {
        return Err(format!("building trapline: {}", String::from_utf8_lossy(&output.stderr)));
    }
    // A test lies in deps/ of the folder that has the command.
    let test = env::current_exe().expect("this program's own path");
    let folder = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    Ok(folder.join("trapline"))
}

/// What goes in front of a command to record it into `trace`.
pub fn record(trace: &Path, options: &[&str]) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![path().into(), "record".into(), "--quiet".into(), "-o".into(), trace.into()];
    words.extend(options.iter().map(Into::into));
    words.push("--".into());
    words
}

/// The command that records a process that runs into `trace`.
pub fn attach(trace: &Path, pid: u32, options: &[&str]) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![path().into(), "record".into(), "-o".into(), trace.into()];
    words.extend(["-p".into(), pid.to_string().into()]);
    words.extend(options.iter().map(Into::into));
    words
}
