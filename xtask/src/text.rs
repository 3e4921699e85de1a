//! Rules about the project's own files that no compiler checks.
//!
//! Owns the rules and the list of tracked files they apply to. [`findings`] is pure: a path and a text in, complaints out.
//! What a rule forbids is spelled in pieces here, because this file is tracked too.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// A file of Rust that is longer than this holds more than one concept.
const MAX_LINES: usize = 700;

/// Folders of a developer's or a build machine, under the root. Nobody else has what lies there.
const MACHINE_FOLDERS: [&str; 4] = ["work", "farm", "root", "home"];

/// Hosts of package registries, with spaces for dots. Where packages come from is the machine's own configuration.
const REGISTRY_HOSTS: [&str; 5] =
    ["crates io", "static rust-lang org", "deb debian org", "pypi org", "registry npmjs org"];

/// The crates whose every root forbids unsafe code, once they exist.
const SAFE_CRATES: [&str; 5] = ["crates/abi", "crates/cli", "crates/export", "crates/trace", "xtask"];

/// Applies the rules to every tracked file of the workspace at `root`.
///
/// # Errors
/// The list of files cannot be had, a file cannot be read, or rules are broken: one line for each place.
pub(crate) fn check(root: &Path) -> Result<()> {
    let paths = tracked_files(root)?;
    ensure!(!paths.is_empty(), "no file is tracked, so nothing was checked");
    let mut broken = Vec::new();
    for path in &paths {
        let file = root.join(path);
        // Tracked, and removed since: the next commit settles it. Or a link to a folder, whose files are tracked where they are.
        if !file.is_file() {
            continue;
        }
        let bytes = fs::read(&file).with_context(|| format!("reading {path}"))?;
        broken.extend(findings(path, &String::from_utf8_lossy(&bytes)));
    }
    if broken.is_empty() {
        eprintln!("        {} files", paths.len());
        return Ok(());
    }
    bail!("rules about text are broken:\n  {}", broken.join("\n  "));
}

fn tracked_files(root: &Path) -> Result<Vec<String>> {
    // A build machine may run us as another user than the one that owns the clone. Git refuses that unless told that it is
    // meant; a list of names can do no harm.
    let output = Command::new("git")
        .args(["-c", "safe.directory=*", "ls-files", "-z"])
        .current_dir(root)
        .output()
        .context("running `git ls-files`")?;
    ensure!(output.status.success(), "`git ls-files`: {}", String::from_utf8_lossy(&output.stderr).trim());
    let names = String::from_utf8(output.stdout).context("a tracked file has a name that is not UTF-8")?;
    Ok(names.split_terminator('\0').map(str::to_owned).collect())
}

/// The broken rules of one file.
fn findings(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if MACHINE_FOLDERS.iter().any(|folder| names_folder(line, folder)) {
            found.push(format!("{path}:{number}: an absolute path that exists on one machine only"));
        }
        if path.ends_with("Cargo.lock") && line.starts_with("source = ") {
            if !is_public_source(line) {
                found.push(format!("{path}:{number}: a dependency from elsewhere than the public registry"));
            }
        } else if REGISTRY_HOSTS.iter().any(|host| line.contains(&host.replace(' ', "."))) {
            found.push(format!("{path}:{number}: the host of a package registry"));
        }
    }
    if has_extension(path, "rs") {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            found.push(format!("{path}: {lines} lines; split it by concept (at most {MAX_LINES})"));
        }
        if is_root_of_safe_crate(path) && !text.lines().any(|line| line == "#![forbid(unsafe_code)]") {
            found.push(format!("{path}: lacks #![forbid(unsafe_code)], which this crate promises"));
        }
    }
    found
}

/// Whether `line` has the path of this folder right under the root, and not as a part of another path or word.
fn names_folder(line: &str, folder: &str) -> bool {
    let path = format!("/{folder}");
    line.match_indices(&path).any(|(start, _)| {
        let before = line[..start].chars().next_back();
        let after = line[start + path.len()..].chars().next();
        let continues = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-');
        let is_absolute = !before.is_some_and(|c| continues(c) || "./~}>)*".contains(c));
        is_absolute && !after.is_some_and(continues)
    })
}

fn is_public_source(line: &str) -> bool {
    let index = format!("source = \"registry+https://github.com/rust-lang/{}-index\"", "crates io".replace(' ', "."));
    line == index
}

fn has_extension(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

fn is_root_of_safe_crate(path: &str) -> bool {
    SAFE_CRATES
        .iter()
        .any(|folder| path.strip_prefix(folder).is_some_and(|rest| matches!(rest, "/src/lib.rs" | "/src/main.rs")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An absolute path that the rules forbid, made here so that this file does not hold it.
    fn machine_path(folder: &str) -> String {
        format!("/{folder}")
    }

    #[test]
    fn absolute_paths_of_a_machine_are_found() {
        for folder in MACHINE_FOLDERS {
            let path = machine_path(folder);
            for line in [format!("cd {path}/main"), format!("let p = \"{path}\";"), path.clone(), format!("a=({path})")]
            {
                assert_eq!(findings("notes.md", &line).len(), 1, "{line}");
            }
        }
    }

    #[test]
    fn other_paths_and_words_are_left_alone() {
        let (work, root) = (machine_path("work"), machine_path("root"));
        for line in [
            format!("sleep{work}"),
            format!(".{work}/main"),
            format!("~{work}"),
            format!("{work}space/main"),
            format!("/proc/self{root}"),
            format!("https://example.org{root}"),
        ] {
            assert_eq!(findings("notes.md", &line), Vec::<String>::new(), "{line}");
        }
    }

    #[test]
    fn hosts_of_registries_are_found_outside_the_lock_file() {
        let host = REGISTRY_HOSTS[0].replace(' ', ".");
        assert_eq!(findings("README.md", &format!("see https://{host}/x")).len(), 1);
        let public = format!("source = \"registry+https://github.com/rust-lang/{host}-index\"");
        assert!(findings("Cargo.lock", &public).is_empty());
        assert_eq!(findings("fuzz/Cargo.lock", "source = \"sparse+https://mirror.example/index/\"").len(), 1);
    }

    #[test]
    fn long_files_of_rust_are_found() {
        let longest = "\n".repeat(MAX_LINES);
        assert!(findings("src/a.rs", &longest).is_empty());
        assert_eq!(findings("src/a.rs", &format!("{longest}\n")).len(), 1);
        assert!(findings("notes.md", &format!("{longest}\n")).is_empty());
    }

    #[test]
    fn a_crate_that_promises_no_unsafe_code_has_to_forbid_it() {
        for path in ["crates/cli/src/main.rs", "xtask/src/main.rs", "crates/abi/src/lib.rs"] {
            assert_eq!(findings(path, "fn main() {}").len(), 1, "{path}");
            assert!(findings(path, "//! Doc.\n#![forbid(unsafe_code)]").is_empty(), "{path}");
            assert_eq!(findings(path, "// #![forbid(unsafe_code)]").len(), 1, "a comment forbids nothing: {path}");
        }
        assert!(findings("crates/engine/src/lib.rs", "").is_empty());
        assert!(findings("crates/cli/src/stress.rs", "").is_empty());
    }
}
