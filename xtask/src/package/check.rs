//! Whether packages hold what they promise, each with a control that has to fail.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::{build, crates, deb, folder, run, tarball, tree};

/// Checks crates, Debian packages and the tarball, in this order.
///
/// # Errors
/// The first thing that does not hold.
pub(crate) fn all() -> Result<()> {
    crates::check(&folder("crates")?)?;
    let build = build::of_commit("build")?;
    let packages = deb::make(&build, &folder("deb")?)?;
    lint(&packages)?;
    install_and_remove(&packages)?;
    is_reproducible(&build)
}

/// Asks lintian, where there is one.
fn lint(packages: &[PathBuf]) -> Result<()> {
    if Command::new("lintian").arg("--version").output().is_err() {
        println!("lintian: not asked, because it is not installed");
        return Ok(());
    }
    // No bug of Debian's is closed by a first version; the maintainers have no address.
    let aside = "--suppress-tags=initial-upload-closes-no-bugs,bogus-mail-host-in-debian-changelog,bogus-mail-host";
    let said = run(Command::new("lintian").args(["--fail-on=error,warning", aside]).args(packages))?;
    println!("lintian: no error and no warning{}", if said.is_empty() { String::new() } else { format!("\n{said}") });
    Ok(())
}

/// Installs the packages in a folder of their own, uses them, removes them, and finds everything as it was.
fn install_and_remove(packages: &[PathBuf]) -> Result<()> {
    let root = folder("root")?;
    for path in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "etc", "tmp"] {
        fs::create_dir_all(root.join(path)).with_context(|| format!("making {path}"))?;
    }
    tree::write(&root.join("var/lib/dpkg/status"), "")?;
    let before = held(&root)?;
    ensure!(before.is_empty(), "an empty system has files: {before:?}");
    // What they need is in the system around.
    run(dpkg(&root).args(["--force-depends", "--install"]).args(packages))?;
    use_command(&root)?;
    use_library(&root)?;
    let names: Vec<String> = packages.iter().filter_map(|path| name_of(path)).collect();
    let left_over = root.join("usr/share/doc/trapline/left-over");
    // The control: what somebody else has put there stays, and is seen.
    tree::write(&left_over, "")?;
    run(dpkg(&root).arg("--purge").args(&names))?;
    ensure!(held(&root)?.contains_key(&left_over), "a file that dpkg does not know was not seen");
    fs::remove_file(&left_over).context("removing the control's file")?;
    let after: Vec<PathBuf> = held(&root)?.into_keys().filter(|path| path.is_file() || path.is_symlink()).collect();
    ensure!(after.is_empty(), "files are left: {after:?}");
    println!("Debian packages: installed, used and removed");
    Ok(())
}

/// What is below `usr` and `etc`, with its size.
fn held(root: &Path) -> Result<BTreeMap<PathBuf, u64>> {
    let mut held = BTreeMap::new();
    for folder in ["usr", "etc"].map(|name| root.join(name)).iter().filter(|folder| folder.exists()) {
        for path in tree::all_below(folder)? {
            let size = path.symlink_metadata().map_or(0, |data| data.len());
            held.insert(path, size);
        }
    }
    Ok(held)
}

fn dpkg(root: &Path) -> Command {
    let mut command = Command::new("dpkg");
    command.arg("--force-not-root").arg(format!("--root={}", root.display())).arg("--log=/dev/null");
    command
}

fn name_of(package: &Path) -> Option<String> {
    Some(package.file_name()?.to_str()?.split('_').next()?.to_owned())
}

/// The command records a program and reports; its pages are manual pages, its completions shell scripts.
fn use_command(root: &Path) -> Result<()> {
    let command = root.join("usr/bin/trapline");
    let trace = root.join("tmp/true.trapline");
    run(Command::new(&command).args(["record", "-o"]).arg(&trace).args(["--", "/usr/bin/env", "true"]))?;
    ensure!(
        run(Command::new(&command).arg("info").arg("-i").arg(&trace))?.contains("env"),
        "the trace tells no program"
    );
    let stress = run(Command::new(&command).args(["stress", "--seconds", "1", "--threads", "2"]))?;
    ensure!(!stress.is_empty(), "stress says nothing");
    let pages = tree::files(&root.join("usr/share/man/man1"))?;
    ensure!(pages.len() > 10, "there are {} pages", pages.len());
    for page in &pages {
        run(Command::new("man").args(["--warnings=all", "-l", "--"]).arg(page).env("MANPAGER", "cat"))?;
    }
    run(Command::new("bash").arg("-n").arg(root.join("usr/share/bash-completion/completions/trapline")))?;
    let loads = "complete -p trapline";
    let script = root.join("usr/share/bash-completion/completions/trapline");
    run(Command::new("bash").arg("-c").arg(format!("source \"$0\" && {loads}")).arg(&script)).map(drop)
}

/// A C program is compiled by what pkg-config says of the installed library, and runs.
fn use_library(root: &Path) -> Result<()> {
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut asked = Command::new("pkg-config");
    asked.env("PKG_CONFIG_SYSROOT_DIR", root).env("PKG_CONFIG_LIBDIR", libraries.join("pkgconfig"));
    asked.env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1").env("PKG_CONFIG_ALLOW_SYSTEM_CFLAGS", "1");
    let flags = run(asked.args(["--cflags", "--libs", "trapline"]))?;
    for example in ["count", "replace"] {
        let program = root.join("tmp").join(example);
        let source = root.join(format!("usr/share/doc/libtrapline-dev/examples/{example}.c"));
        let mut compile = Command::new("cc");
        compile
            .args(["-O2", "-fpatchable-function-entry=5", "-fno-ipa-ra", "-pthread", "-o"])
            .arg(&program)
            .arg(source);
        run(compile.args(flags.split_whitespace()))?;
        run(Command::new("timeout").arg("60").arg(&program).env("LD_LIBRARY_PATH", &libraries))?;
    }
    Ok(())
}

/// The same commit, compiled in another folder, makes the same tarball and the same packages.
fn is_reproducible(build: &build::Build) -> Result<()> {
    let again = build::of_commit("another-folder-with-another-name")?;
    let one = made(build, "tarball")?;
    let other = made(&again, "tarball-again")?;
    for (one, other) in one.iter().zip(&other) {
        if !is_equal(one, other)? {
            bail!("{} and {} differ; `diffoscope` shows in what", one.display(), other.display());
        }
    }
    // The control: one that is a second younger differs.
    let later = build::Build { epoch: build.epoch + 1, ..again };
    let later = made(&later, "tarball-later")?;
    for (one, later) in one.iter().zip(&later) {
        ensure!(
            !is_equal(one, later)?,
            "{} does not depend on the time, or the comparison sees nothing",
            one.display()
        );
    }
    let names: Vec<_> = one.iter().filter_map(|path| path.file_name()).collect();
    println!("reproducible: {names:?}");
    Ok(())
}

fn made(build: &build::Build, name: &str) -> Result<Vec<PathBuf>> {
    let folder = folder(name)?;
    let mut made = vec![tarball::make(build, &folder)?];
    made.extend(deb::make(build, &folder)?);
    Ok(made)
}

fn is_equal(one: &Path, other: &Path) -> Result<bool> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    Ok(read(one)? == read(other)?)
}
