//! Makes the libraries that C programs link to, of the archive that cargo builds of this crate, and lays them out under a prefix.
//!
//! Shared by this crate's tests and the task runner, for packages. Cargo could make a shared library of its own, and would give it no symbol versions: rustc hands
//! the linker a version script already.
//!
//! Invariant: the shared library exports the header's functions, with a version, and libc's signal functions, without one. With a version these would not come before
//! libc's: the loader resolves a reference to `sigaction@GLIBC_2.2.5` by that version, or by a definition that has none.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

/// What the library's file names and symbol versions end in. Versions below 1 promise each other nothing across the second number.
pub(crate) const INTERFACE: &str = concat!(env!("CARGO_PKG_VERSION_MAJOR"), ".", env!("CARGO_PKG_VERSION_MINOR"));

/// What programs that link the archive need beside it: `rustc --print native-static-libs`.
const NATIVE: [&str; 7] = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-lc"];

/// Where the libraries go.
pub(crate) struct Layout<'a> {
    /// What stands before the prefix, for a package that is being made; empty for none.
    pub(crate) root: &'a Path,
    /// Where programs find it all, in the end.
    pub(crate) prefix: &'a str,
    /// The folder of libraries below the prefix: `lib`, or `lib/i386-linux-gnu`.
    pub(crate) libraries: &'a str,
}

/// Puts header, archive, shared library and pkg-config file where the layout says.
///
/// # Errors
/// A sentence: which command failed and what it said, or which file.
pub(crate) fn install(archive: &Path, header: &Path, is_narrow: bool, layout: &Layout<'_>) -> Result<(), String> {
    let root = if layout.root.as_os_str().is_empty() { Path::new("/") } else { layout.root };
    let prefix = root.join(layout.prefix.trim_start_matches('/'));
    let libraries = prefix.join(layout.libraries);
    for folder in [&prefix.join("include"), &libraries.join("pkgconfig")] {
        fs::create_dir_all(folder).map_err(|error| format!("making {}: {error}", folder.display()))?;
    }
    let place = |from: &Path, to: PathBuf| {
        fs::copy(from, &to)
            .map(drop)
            .map_err(|error| format!("copying {} to {}: {error}", from.display(), to.display()))
    };
    place(header, prefix.join("include/trapline.h"))?;
    let own_archive = libraries.join("libtrapline.a");
    // Names of what is inside stay, without debugging information: tens of megabytes.
    run(Command::new("objcopy")
        .args(["--strip-debug", "--enable-deterministic-archives"])
        .arg(archive)
        .arg(&own_archive))?;
    link_shared(archive, is_narrow, &libraries)?;
    let description = libraries.join("pkgconfig/trapline.pc");
    fs::write(&description, pkg_config(layout)).map_err(|error| format!("writing {}: {error}", description.display()))
}

fn link_shared(archive: &Path, is_narrow: bool, folder: &Path) -> Result<(), String> {
    let file = format!("libtrapline.so.{}", env!("CARGO_PKG_VERSION"));
    let name = format!("libtrapline.so.{INTERFACE}");
    let script = folder.join("trapline.map");
    // Not `local: *`, which would hide what has no version. These are all that a Rust archive defines beside, as a test checks.
    let versions = format!("TRAPLINE_{INTERFACE} {{ global: trapline_*; local: _*; rust_*; }};\n");
    fs::write(&script, versions).map_err(|error| format!("writing {}: {error}", script.display()))?;
    let mut command = Command::new("cc");
    command.args(if is_narrow { &["-m32"][..] } else { &[] }).args(["-shared", "-Wl,--whole-archive"]).arg(archive);
    command.args(["-Wl,--no-whole-archive", "-Wl,--gc-sections", "-Wl,--strip-all", "-Wl,--build-id", "-Wl,-z,defs"]);
    command.args(["-Wl,-z,relro", "-Wl,-z,now", "-Wl,--as-needed"]).arg(format!("-Wl,-soname,{name}"));
    command.arg(format!("-Wl,--version-script={}", script.display())).args(NATIVE).arg("-o").arg(folder.join(&file));
    let linked = run(&mut command);
    fs::remove_file(&script).map_err(|error| format!("removing {}: {error}", script.display()))?;
    linked?;
    for link in [name.as_str(), "libtrapline.so"] {
        let path = folder.join(link);
        let _ = fs::remove_file(&path);
        symlink(&file, &path).map_err(|error| format!("linking {}: {error}", path.display()))?;
    }
    Ok(())
}

fn pkg_config(layout: &Layout<'_>) -> String {
    format!(
        "prefix={}\nincludedir=${{prefix}}/include\nlibdir=${{prefix}}/{}\n\n\
         Name: trapline\nDescription: Hooks the functions of a running program while its threads run them\nVersion: {}\n\
         Cflags: -I${{includedir}}\nLibs: -L${{libdir}} -ltrapline\nLibs.private: {}\n",
        layout.prefix,
        layout.libraries,
        env!("CARGO_PKG_VERSION"),
        NATIVE.join(" "),
    )
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("starting {command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
