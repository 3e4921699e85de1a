//! Compiles a commit so that the same bytes come out in any folder.
//!
//! Owns [`Build`]. Names of folders would be in messages of panics and in assertions of C: compilers are told to write others. Cargo itself names packages of the
//! workspace by their place in it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::run;
use crate::{target_folder, workspace_root};

/// A compiled commit.
#[derive(Debug)]
pub(crate) struct Build {
    /// Its files.
    pub(crate) source: PathBuf,
    /// The `trapline` command.
    pub(crate) command: PathBuf,
    /// The library for C, as an archive.
    pub(crate) archive: PathBuf,
    /// When it was committed, in seconds since 1970: the time of all files in packages.
    pub(crate) epoch: u64,
}

/// Compiles the last commit in the folder of this name, or what is not compiled of it yet.
///
/// # Errors
/// What the tools say.
pub(crate) fn of_commit(name: &str) -> Result<Build> {
    let folder = target_folder().join("package").join(name);
    let (source, target) = (folder.join("source"), folder.join("target"));
    export(&source)?;
    let epoch = run(git().args(["log", "-1", "--format=%ct"]))?;
    let epoch = epoch.trim().parse().context("the time of the commit")?;
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let places = [(Some(&source), "/trapline"), (Some(&target), "/trapline/target"), (cargo_home.as_ref(), "/cargo")];
    let renamed = |option: &str| -> Vec<String> {
        let known = places.iter().filter_map(|(place, name)| place.map(|place| (place, name)));
        known.map(|(place, name)| format!("{option}={}={name}", place.display())).collect()
    };
    let mut command = Command::new("cargo");
    command.args(["build", "--locked", "--profile", "dist", "-p", "trapline-cli", "-p", "trapline-capi"]);
    command.arg("--target-dir").arg(&target).current_dir(&source);
    command.env("CARGO_ENCODED_RUSTFLAGS", renamed("--remap-path-prefix").join("\x1f"));
    for variable in ["CFLAGS", "CXXFLAGS"] {
        command.env(variable, renamed("-ffile-prefix-map").join(" "));
    }
    command.env("SOURCE_DATE_EPOCH", format!("{epoch}")).env_remove("CARGO_TARGET_DIR");
    // Incremental compilation divides code by what was compiled before.
    command.env("CARGO_INCREMENTAL", "0");
    eprintln!("compiling the last commit in {}", folder.display());
    let status = command.status().context("starting cargo")?;
    ensure!(status.success(), "{command:?}: {status}");
    let built = target.join("dist");
    Ok(Build { source, command: built.join("trapline"), archive: built.join("libtrapline_c.a"), epoch })
}

/// Puts the files of the last commit into a folder, with the time of now: what cargo compiled of an earlier one is older.
fn export(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    if !run(git().args(["status", "--porcelain"]))?.is_empty() {
        eprintln!("there are changes that are not committed: they are not in the packages");
    }
    let mut archive = git().args(["archive", "HEAD"]).stdout(Stdio::piped()).spawn().context("starting git")?;
    let files = archive.stdout.take().context("git's output")?;
    let unpacked = Command::new("tar").args(["-x", "-m", "-C"]).arg(folder).stdin(files).status();
    let archived = archive.wait().context("waiting for git")?;
    let unpacked = unpacked.context("starting tar")?;
    ensure!(archived.success() && unpacked.success(), "exporting the last commit: git {archived}, tar {unpacked}");
    Ok(())
}

fn git() -> Command {
    let mut command = Command::new("git");
    command.args(["-c", "safe.directory=*"]).current_dir(workspace_root());
    command
}
