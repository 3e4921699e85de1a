//! What cargo would publish: every crate but those that say `publish = false`, each with all that it is built of.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::run;
use crate::workspace_root;

/// Packages the crates, and builds the command of nothing else.
///
/// # Errors
/// What cargo says, or a file that a crate lacks.
pub(crate) fn check(folder: &Path) -> Result<()> {
    let names = published()?;
    ensure!(names.iter().any(|name| name == "trapline-cli"), "the command is not published: {names:?}");
    let mut package = Command::new("cargo");
    package.args(["package", "--locked", "--allow-dirty", "--no-verify", "--target-dir"]).arg(folder);
    package.args(names.iter().flat_map(|name| ["-p", name])).current_dir(workspace_root());
    run(&mut package)?;
    for name in &names {
        let file = folder.join(format!("package/{name}-{}.crate", super::VERSION));
        let listed = run(Command::new("tar").arg("-tf").arg(&file))?;
        ensure!(listed.lines().any(|line| line.ends_with("/README.md")), "{name} has no README.md");
    }
    // Cargo verifies a crate by building it of packages alone; the command needs all of them.
    let mut verify = Command::new("cargo");
    verify.args(["package", "--locked", "--allow-dirty", "--target-dir"]).arg(folder);
    verify.args(names.iter().flat_map(|name| ["-p", name])).current_dir(workspace_root());
    run(&mut verify)?;
    println!("{} crates: packaged, and built of nothing else", names.len());
    Ok(())
}

fn published() -> Result<Vec<String>> {
    let said = run(Command::new("cargo")
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(workspace_root()))?;
    let said: Value = serde_json::from_str(&said).context("cargo's metadata")?;
    let packages = said["packages"].as_array().context("no packages")?;
    // `publish` is null, or the list of registries: none for `false`.
    let is_published = |package: &&Value| !package["publish"].as_array().is_some_and(Vec::is_empty);
    Ok(packages.iter().filter(is_published).filter_map(|package| Some(package["name"].as_str()?.to_owned())).collect())
}
