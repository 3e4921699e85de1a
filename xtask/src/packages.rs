//! Debian packages that single verbs need, beyond what [`crate::setup`] installs for the tests.
//!
//! Owns [`ensure()`]. Invariant: a machine that has the programs is left alone.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::setup;

/// A program and the package that has it.
pub(crate) type Need = (&'static str, &'static str);

/// Installs what is missing of these programs, as root.
///
/// # Errors
/// Something is missing and we are not root, or the installation failed: with the command to type.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<&str> =
        needs.iter().filter(|(path, _)| !Path::new(path).exists()).map(|&(_, name)| name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --yes --no-install-recommends {}", missing.join(" "));
    ensure!(setup::is_root(), "missing: {}. Only root can install that; run `sudo {line}`", missing.join(", "));
    // Lists that cannot be refreshed may still be good enough; the installation tells.
    let _ = apt(&["update", "--quiet=2"]);
    let mut words = vec!["install", "--quiet=2", "--yes", "--no-install-recommends"];
    words.extend(&missing);
    apt(&words).with_context(|| format!("`{line}`"))
}

fn apt(arguments: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("starting apt-get: on a system without it, install the equivalents by hand")?;
    ensure!(status.success(), "apt-get ended with {status}");
    Ok(())
}
