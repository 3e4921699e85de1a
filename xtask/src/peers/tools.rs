//! What the peers need of the machine, and which of them it has.
//!
//! Owns [`Tools`]. A peer that cannot be had is listed with the reason; it is never left out in silence.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use super::{bench::output, tracer::Tool};
use crate::{packages, target_folder};

/// Which peers there are.
#[derive(Debug)]
pub(super) struct Tools(Vec<(Tool, Result<String, String>)>);

impl Tools {
    /// Installs what is missing of these, if we may.
    pub(super) fn set_up(peers: &[Tool]) -> Self {
        Self(peers.iter().map(|&peer| (peer, set_up(peer).map_err(|error| format!("{error:#}")))).collect())
    }

    /// Whether rows of this tool are wanted.
    pub(super) fn are_asked_for(&self, tool: Tool) -> bool {
        !Tool::PEERS.contains(&tool) || self.0.iter().any(|(peer, _)| *peer == tool)
    }

    /// Whether a row of this tool can be measured; otherwise why not.
    pub(super) fn has(&self, tool: Tool) -> Result<(), &str> {
        match self.0.iter().find(|(peer, _)| *peer == tool) {
            Some((_, Err(why))) => Err(why),
            _ => Ok(()),
        }
    }

    /// Each peer with its version, or why it is not there.
    pub(super) fn list(&self) -> impl Iterator<Item = (Tool, &Result<String, String>)> {
        self.0.iter().map(|(tool, found)| (*tool, found))
    }
}

/// Makes a peer ready, and returns its version.
fn set_up(peer: Tool) -> Result<String> {
    let first_line = |program: &str| -> Result<String> {
        let mut command = Command::new(program);
        command.arg("--version");
        Ok(output(command, program)?.lines().next().unwrap_or_default().trim().to_owned())
    };
    match peer {
        Tool::Uftrace => {
            packages::ensure(&[("/usr/bin/uftrace", "uftrace")])?;
            first_line("uftrace")
        }
        Tool::Bpftrace => {
            packages::ensure(&[("/usr/bin/bpftrace", "bpftrace")])?;
            first_line("bpftrace")
        }
        Tool::Xray => {
            packages::ensure(&[("/usr/bin/clang", "clang"), ("/usr/bin/llvm-xray", "llvm")])?;
            first_line("clang")
        }
        Tool::Frida => {
            let python = frida_python();
            if !python.exists() {
                packages::ensure(&[("/usr/bin/python3", "python3")])?;
                let mut has_pip = Command::new("/usr/bin/python3");
                has_pip.args(["-c", "import ensurepip"]);
                if output(has_pip, "python3").is_err() {
                    // Its files' names have Python's version in them; none has this one.
                    packages::ensure(&[("/nonexistent", "python3-venv")])?;
                }
                let mut command = Command::new("/usr/bin/python3");
                command.args(["-m", "venv"]).arg(frida_folder());
                output(command, "python3 -m venv")?;
            }
            let version = || {
                let mut command = Command::new(&python);
                command.args(["-c", "import frida; print('Frida', frida.__version__)"]);
                output(command, "python3")
            };
            if version().is_err() {
                let mut command = Command::new(&python);
                command.args(["-m", "pip", "install", "--quiet", "frida"]);
                output(command, "pip install frida")?;
            }
            Ok(version()?.trim().to_owned())
        }
        Tool::Nobody | Tool::Floor | Tool::Trapline | Tool::Top => Ok(String::new()),
    }
}

fn frida_folder() -> PathBuf {
    target_folder().join("frida")
}

/// The interpreter that has Frida.
pub(super) fn frida_python() -> PathBuf {
    frida_folder().join("bin/python3")
}
