//! Files as an installed system has them.
//!
//! Owns which file goes where below a prefix, for the command and for the library. [`tarball`](super::tarball) and [`deb`](super::deb) pack what is laid out here.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{build::Build, link, run};

/// Where zsh looks below a prefix that is the administrator's.
pub(crate) const ZSH: &str = "share/zsh/site-functions";
/// Where Debian has it look below `/usr`.
pub(crate) const ZSH_DEBIAN: &str = "share/zsh/vendor-completions";

/// The command with its manual, completions and documents, below `prefix`. `zsh` is the folder for that shell's completions.
///
/// # Errors
/// Files that cannot be written, or a command that does not run.
pub(crate) fn command(build: &Build, prefix: &Path, zsh: &str) -> Result<()> {
    let command = prefix.join("bin/trapline");
    place(&build.command, &command, 0o755)?;
    // `trapline stress` traces itself, and chooses functions by their names. Nobody needs other symbols.
    run(Command::new("strip").args(["--strip-all", "--wildcard", "--keep-symbol=stress_*"]).arg(&command))?;
    let manual = prefix.join("share/man/man1");
    run(Command::new(&command).arg("man").arg(&manual))?;
    for page in files(&manual)? {
        run(Command::new("gzip").args(["-9", "-n"]).arg(&page))?;
    }
    let completions = [
        ("bash", "share/bash-completion/completions/trapline".to_owned()),
        ("zsh", format!("{zsh}/_trapline")),
        ("fish", "share/fish/vendor_completions.d/trapline.fish".to_owned()),
    ];
    for (shell, path) in completions {
        write(&prefix.join(path), &run(Command::new(&command).args(["completions", shell]))?)?;
    }
    let documents = prefix.join("share/doc/trapline");
    place(&build.source.join("README.md"), &documents.join("README.md"), 0o644)?;
    for document in files(&build.source.join("docs"))? {
        place(&document, &documents.join("docs").join(document.file_name().context("a name")?), 0o644)?;
    }
    Ok(())
}

/// The library for C, below `root` and a prefix.
///
/// # Errors
/// What linking says.
pub(crate) fn library(build: &Build, root: &Path, prefix: &str, libraries: &str) -> Result<()> {
    let header = build.source.join("crates/capi/include/trapline.h");
    let layout = link::Layout { root, prefix, libraries };
    link::install(&build.archive, &header, false, &layout).map_err(anyhow::Error::msg)
}

/// The files of a folder, by name.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    paths.retain(|path| path.is_file());
    paths.sort_unstable();
    Ok(paths)
}

/// Everything below a folder, by path: links are not followed.
pub(crate) fn all_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Copies a file, and makes the folders to it.
pub(crate) fn place(from: &Path, to: &Path, mode: u32) -> Result<()> {
    folder_of(to)?;
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    set_mode(to, mode)
}

/// Writes a file, and makes the folders to it.
pub(crate) fn write(to: &Path, text: &str) -> Result<()> {
    folder_of(to)?;
    fs::write(to, text).with_context(|| format!("writing {}", to.display()))?;
    set_mode(to, 0o644)
}

/// Sets who may read, write and execute a file.
pub(crate) fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(|| format!("setting {}", path.display()))
}

fn folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().context("a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))
}
