//! `cargo xtask package`: what people install, made of the last commit.
//!
//! Owns the ways there ([`Package`]) and the folders below the target's. [`build`] compiles the commit in a folder of its own, [`tree`] lays files out as an installed
//! system has them, [`deb`] and [`tarball`] pack that, and [`crates`] asks cargo what it would publish. [`check`] installs, removes, and compares.
//!
//! Invariant: packages depend on the commit and on the toolchain, and on nothing else: not on folders, time, user or order of files.

mod build;
mod check;
mod crates;
mod deb;
#[path = "../../crates/capi/link.rs"]
mod link;
mod tarball;
mod tree;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{target_folder, workspace_root};

/// The version of everything in the workspace.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Package {
    /// Debian packages.
    Deb,
    /// One archive with a prefix's folders.
    Tarball,
    /// The library for C below a prefix, of the source as it is.
    Library {
        /// Where it goes.
        prefix: String,
        /// For 32-bit programs.
        is_narrow: bool,
    },
    /// All of it, and that it holds what it promises.
    Check,
}

/// Makes it.
///
/// # Errors
/// What was being done, and what the tool said.
pub(crate) fn make(package: &Package) -> Result<()> {
    match package {
        Package::Library { prefix, is_narrow } => library(prefix, *is_narrow),
        Package::Deb => {
            for path in deb::make(&build::of_commit("build")?, &folder("deb")?)? {
                println!("{}", path.display());
            }
            Ok(())
        }
        Package::Tarball => {
            println!("{}", tarball::make(&build::of_commit("build")?, &folder("tarball")?)?.display());
            Ok(())
        }
        Package::Check => check::all(),
    }
}

fn library(prefix: &str, is_narrow: bool) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "-p", "trapline-capi"]).current_dir(workspace_root());
    let mut built = target_folder();
    if is_narrow {
        let target = "i686-unknown-linux-gnu";
        command.args(["--target", target]);
        built.push(target);
    }
    run(&mut command)?;
    let prefix = std::path::absolute(prefix).with_context(|| format!("finding {prefix}"))?;
    let prefix = prefix.to_str().context("the prefix is not text")?;
    let layout = link::Layout { root: Path::new(""), prefix, libraries: "lib" };
    let header = workspace_root().join("crates/capi/include/trapline.h");
    link::install(&built.join("release/libtrapline_c.a"), &header, is_narrow, &layout).map_err(anyhow::Error::msg)
}

/// An empty folder for this below the target's.
fn folder(name: &str) -> Result<PathBuf> {
    let folder = target_folder().join("package").join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder)
}

/// Runs a command to its end, and returns what it printed.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}\n{}", output.status, stderr.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
