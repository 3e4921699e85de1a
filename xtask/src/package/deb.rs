//! Debian packages: `trapline`, `libtrapline0.1` with the shared library, `libtrapline-dev` with the header.
//!
//! Made with dpkg-deb alone. Three packages of one build, one of which has a library that cargo does not link, are more than cargo-deb makes, and what is here is shorter
//! than what it would have to be told. dpkg-deb takes the time of all files from `SOURCE_DATE_EPOCH`, and sorts.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{VERSION, build::Build, link::INTERFACE, run, tree};

/// Debian's name for the width, and for folders.
const ARCHITECTURE: &str = "amd64";
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
const MAINTAINER: &str = "The trapline maintainers <maintainers@trapline.invalid>";

/// The version of the packages: of trapline, and of the way they are made.
const REVISED: &str = concat!(env!("CARGO_PKG_VERSION"), "-1");

/// A package that is to be made.
struct Description {
    name: String,
    section: &'static str,
    /// What it needs beside what its programs were linked with.
    depends: Option<String>,
    /// Only one for the width at a time, or several side by side.
    multi_arch: Option<&'static str>,
    synopsis: &'static str,
    text: &'static str,
}

/// What lintian does not have to tell.
const OVERRIDES: &str = "# `trapline stress` looks for its own functions by their symbols; all others are taken away.\n\
                         trapline: unstripped-binary-or-object [usr/bin/trapline]\n";

/// Makes the packages in `folder`, and returns their paths.
///
/// # Errors
/// What the tools say.
pub(crate) fn make(build: &Build, folder: &Path) -> Result<Vec<PathBuf>> {
    let runtime = format!("libtrapline{INTERFACE}");
    let descriptions = [
        Description {
            name: "trapline".to_owned(),
            section: "devel",
            depends: None,
            multi_arch: None,
            synopsis: "trace and live-patch the functions of running programs",
            text: "trapline records every call of every function of a program that nobody\nprepared, from its start or while it runs, and replaces functions in running\n\
                   programs. No call is skipped while code changes.",
        },
        Description {
            name: runtime.clone(),
            section: "libs",
            depends: None,
            multi_arch: Some("same"),
            synopsis: "hook the functions of the own process, shared library",
            text: "A program that links this library counts, times and replaces its own functions\nwhile its threads run them.",
        },
        Description {
            name: "libtrapline-dev".to_owned(),
            section: "libdevel",
            depends: Some(format!("{runtime} (= {REVISED})")),
            multi_arch: Some("same"),
            synopsis: "hook the functions of the own process, development files",
            text: "The header, the static library and the description for pkg-config, with\nexamples that count calls, measure durations, replace a function and log\narguments.",
        },
    ];
    let everything = folder.join("everything");
    tree::library(build, &everything, "/usr", LIBRARIES)?;
    let mut made = Vec::new();
    for description in &descriptions {
        let root = folder.join(&description.name);
        lay_out(build, description, &everything, &root)?;
        documents(build, description, &root)?;
        control(description, &root, folder)?;
        let path = folder.join(format!("{}_{REVISED}_{ARCHITECTURE}.deb", description.name));
        let mut pack = Command::new("dpkg-deb");
        pack.env("SOURCE_DATE_EPOCH", format!("{}", build.epoch));
        run(pack.args(["--root-owner-group", "--uniform-compression", "-Zxz", "--build"]).arg(&root).arg(&path))?;
        made.push(path);
    }
    Ok(made)
}

fn lay_out(build: &Build, description: &Description, everything: &Path, root: &Path) -> Result<()> {
    let (usr, libraries) = (root.join("usr"), root.join("usr").join(LIBRARIES));
    let from = everything.join("usr").join(LIBRARIES);
    let link = |target: String, name: String| {
        symlink(&target, libraries.join(&name)).with_context(|| format!("linking {name} to {target}"))
    };
    let file = format!("libtrapline.so.{VERSION}");
    match description.name.as_str() {
        "trapline" => {
            tree::write(&usr.join("share/lintian/overrides/trapline"), OVERRIDES)?;
            tree::command(build, &usr, tree::ZSH_DEBIAN)
        }
        "libtrapline-dev" => {
            tree::place(&everything.join("usr/include/trapline.h"), &usr.join("include/trapline.h"), 0o644)?;
            tree::place(&from.join("libtrapline.a"), &libraries.join("libtrapline.a"), 0o644)?;
            tree::place(&from.join("pkgconfig/trapline.pc"), &libraries.join("pkgconfig/trapline.pc"), 0o644)?;
            for example in tree::files(&build.source.join("crates/capi/examples"))? {
                let name = example.file_name().context("a name")?;
                tree::place(&example, &usr.join("share/doc/libtrapline-dev/examples").join(name), 0o644)?;
            }
            link(file, "libtrapline.so".to_owned())
        }
        _ => {
            tree::place(&from.join(&file), &libraries.join(&file), 0o644)?;
            link(file, format!("libtrapline.so.{INTERFACE}"))
        }
    }
}

/// Copyright and changes, which every package has.
fn documents(build: &Build, description: &Description, root: &Path) -> Result<()> {
    let folder = root.join("usr/share/doc").join(&description.name);
    let read = |name: &str| fs::read_to_string(build.source.join(name)).with_context(|| format!("reading {name}"));
    let mit = read("LICENSE-MIT")?;
    // A field's further lines begin with a space, and none is empty.
    let mit: Vec<&str> = mit.lines().map(|line| if line.is_empty() { "." } else { line }).collect();
    let mit = mit.join("\n ");
    let date = run(Command::new("date").args(["-u", "-R", "-d"]).arg(format!("@{}", build.epoch)))?;
    // Day of the week, day, month, year (RFC 5322).
    let year = date.split_whitespace().nth(3).context("a year")?;
    let copyright = format!(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: trapline\n\n\
         Files: *\nCopyright: {year} the trapline developers\nLicense: Expat or Apache-2.0\n\n\
         License: Expat\n {mit}\n\nLicense: Apache-2.0\n On Debian systems the text is in /usr/share/common-licenses/Apache-2.0.\n"
    );
    tree::write(&folder.join("copyright"), &copyright)?;
    let entry = format!(
        "trapline ({REVISED}) unstable; urgency=medium\n\n  * Made of a commit; changelog.gz has what users notice.\n\n -- {MAINTAINER}  {date}"
    );
    for (name, text) in [("changelog", read("CHANGELOG.md")?), ("changelog.Debian", entry)] {
        tree::write(&folder.join(name), &text)?;
        run(Command::new("gzip").args(["-9", "-n"]).arg(folder.join(name)))?;
    }
    Ok(())
}

/// The folder `DEBIAN`: what the package is, needs and holds.
fn control(description: &Description, root: &Path, folder: &Path) -> Result<()> {
    let needs = [linked(root, folder)?, description.depends.clone()];
    let needs: Vec<String> = needs.into_iter().flatten().collect();
    let mut fields = vec![
        format!("Package: {}", description.name),
        format!("Version: {REVISED}"),
        format!("Architecture: {ARCHITECTURE}"),
        format!("Maintainer: {MAINTAINER}"),
        format!("Installed-Size: {}", size_kib(root)?),
        format!("Section: {}", description.section),
        "Priority: optional".to_owned(),
    ];
    if !needs.is_empty() {
        fields.push(format!("Depends: {}", needs.join(", ")));
    }
    fields.extend(description.multi_arch.map(|value| format!("Multi-Arch: {value}")));
    fields.push(format!("Description: {}\n {}", description.synopsis, description.text.replace('\n', "\n ")));
    let control = root.join("DEBIAN");
    let sums = sums(root)?;
    tree::write(&control.join("control"), &format!("{}\n", fields.join("\n")))?;
    tree::write(&control.join("md5sums"), &sums)?;
    if description.section == "libs" {
        let name = &description.name;
        tree::write(&control.join("shlibs"), &format!("libtrapline {INTERFACE} {name} (>= {VERSION})\n"))?;
        tree::write(&control.join("triggers"), "activate-noawait ldconfig\n")?;
    }
    Ok(())
}

/// The packages of the libraries that the programs of a package were linked with, as dpkg-shlibdeps knows them.
fn linked(root: &Path, folder: &Path) -> Result<Option<String>> {
    let is_linked = |path: &PathBuf| {
        let is_library = path.to_string_lossy().contains(".so.");
        path.starts_with(root.join("usr/bin")) && path.is_file() || is_library && !path.is_symlink()
    };
    let programs: Vec<PathBuf> = tree::all_below(root)?.into_iter().filter(is_linked).collect();
    if programs.is_empty() {
        return Ok(None);
    }
    // It wants to be where a source package is.
    let place = folder.join("dependencies");
    tree::write(&place.join("debian/control"), "Source: trapline\n\nPackage: trapline\nArchitecture: any\n")?;
    let said = run(Command::new("dpkg-shlibdeps").arg("-O").args(&programs).current_dir(&place))?;
    Ok(said.lines().find_map(|line| line.strip_prefix("shlibs:Depends=")).map(str::to_owned))
}

fn size_kib(root: &Path) -> Result<u64> {
    let mut size = 0;
    for path in tree::all_below(root)? {
        let data = path.symlink_metadata().with_context(|| format!("looking at {}", path.display()))?;
        // As dpkg-gencontrol counts: a folder or a link is a KiB.
        size += if data.is_file() { data.size().div_ceil(1024) } else { 1 };
    }
    Ok(size)
}

fn sums(root: &Path) -> Result<String> {
    let files = tree::all_below(root)?.into_iter().filter(|path| path.is_file() && !path.is_symlink());
    let names: Vec<PathBuf> = files.filter_map(|path| path.strip_prefix(root).ok().map(Path::to_path_buf)).collect();
    run(Command::new("md5sum").args(&names).current_dir(root))
}
