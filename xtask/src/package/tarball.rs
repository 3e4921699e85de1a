//! One archive with the folders of a prefix, for systems without Debian's packages: unpack it into `/usr/local`, or anywhere.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use super::{VERSION, build::Build, run, tree};

/// Packs a build into `folder`, and returns the archive's path.
///
/// # Errors
/// What the tools say.
pub(crate) fn make(build: &Build, folder: &Path) -> Result<PathBuf> {
    let name = format!("trapline-{VERSION}-x86_64-linux-gnu");
    let prefix = folder.join(&name);
    tree::command(build, &prefix, tree::ZSH)?;
    // The prefix in the description for pkg-config, which finds the real one by where that file lies (`--define-prefix`).
    tree::library(build, folder, &format!("/{name}"), "lib")?;
    let description = prefix.join("lib/pkgconfig/trapline.pc");
    let text = std::fs::read_to_string(&description)?;
    tree::write(&description, &text.replace(&format!("prefix=/{name}\n"), "prefix=/usr/local\n"))?;
    for text in ["LICENSE-APACHE", "LICENSE-MIT", "CHANGELOG.md"] {
        tree::place(&build.source.join(text), &prefix.join("share/doc/trapline").join(text), 0o644)?;
    }
    let archive = folder.join(format!("{name}.tar.xz"));
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu", "--mode=go=rX,u+rw,a-s"]);
    tar.arg(format!("--mtime=@{}", build.epoch)).args(["-I", "xz -T1 -6", "-C"]).arg(folder).arg("-cf").arg(&archive);
    run(tar.arg(&name))?;
    Ok(archive)
}
