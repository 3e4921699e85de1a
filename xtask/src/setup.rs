//! Makes a machine ready for the tests: finds what is missing and installs that, and no more.
//!
//! Owns the table [`NEEDS`]. The flow is: probe every need, decide ([`Plan::for_missing`], pure), then act in one place. A need is
//! probed by what it is for (a 32-bit program compiles, links and runs), not by a package's name, so that any machine that
//! can do the work is ready as it is.
//!
//! Invariant: either everything that is missing can be installed and is, or nothing is touched and the user is told the
//! exact commands.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::args::Selection;
use crate::workspace_root;

/// Something that the tests cannot do without.
#[derive(Debug)]
struct Need {
    name: &'static str,
    used_for: &'static str,
    only_i686: bool,
    probe: Probe,
    remedy: Remedy,
}

/// How to find out whether a need is met.
#[derive(Debug)]
enum Probe {
    /// This command succeeds.
    Succeeds(&'static str),
    /// The toolchain in use has the standard library of this target.
    RustTarget(&'static str),
    /// This compiler command accepts this source.
    Compiles { command: &'static str, source: &'static str },
    /// What this compiler command makes of this source runs. Met as well if it does not compile, which another need reports.
    Executes { command: &'static str, source: &'static str },
}

/// What meets a need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    DebianPackage(&'static str),
    RustTarget(&'static str),
    RustComponent(&'static str),
    /// Nothing that could be installed; the text says what to do instead.
    Nothing(&'static str),
}

const C_MAIN: &str = "#include <stdio.h>\nint main(void) { return puts(\"\") < 0; }";

const NEEDS: &[Need] = &[
    Need {
        name: "git",
        used_for: "to list the tracked files",
        only_i686: false,
        probe: Probe::Succeeds("git --version"),
        remedy: Remedy::DebianPackage("git"),
    },
    Need {
        name: "rustfmt",
        used_for: "to check the format",
        only_i686: false,
        probe: Probe::Succeeds("cargo fmt --version"),
        remedy: Remedy::RustComponent("rustfmt"),
    },
    Need {
        name: "clippy",
        used_for: "to lint",
        only_i686: false,
        probe: Probe::Succeeds("cargo clippy --version"),
        remedy: Remedy::RustComponent("clippy"),
    },
    Need {
        name: "Rust for x86_64-unknown-none",
        used_for: "to build the engine without a standard library",
        only_i686: false,
        probe: Probe::RustTarget("x86_64-unknown-none"),
        remedy: Remedy::RustTarget("x86_64-unknown-none"),
    },
    Need {
        name: "a C++ compiler",
        used_for: "to build the fuzzer's runtime and traced C++ functions",
        only_i686: false,
        probe: Probe::Compiles {
            command: "c++ -x c++ -",
            source: "#include <string>\nint main() { return std::string(\"a\").size() != 1; }",
        },
        remedy: Remedy::DebianPackage("g++"),
    },
    Need {
        name: "clang with XRay",
        used_for: "to build functions whose entry is an XRay sled",
        only_i686: false,
        probe: Probe::Compiles {
            command: "clang -fxray-instrument -fxray-instruction-threshold=1 -c -x c -",
            source: "int traced(int i) { return i + 1; }",
        },
        remedy: Remedy::DebianPackage("clang"),
    },
    Need {
        name: "pkg-config",
        used_for: "to compile C programs with the library as their authors do",
        only_i686: false,
        probe: Probe::Succeeds("pkg-config --version"),
        remedy: Remedy::DebianPackage("pkg-config"),
    },
    Need {
        name: "xz",
        used_for: "to record it",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/xz --version"),
        remedy: Remedy::DebianPackage("xz-utils"),
    },
    Need {
        name: "bzip2",
        used_for: "to record it",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/bzip2 --help"),
        remedy: Remedy::DebianPackage("bzip2"),
    },
    Need {
        name: "sqlite3",
        used_for: "to record it",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/sqlite3 -version"),
        remedy: Remedy::DebianPackage("sqlite3"),
    },
    Need {
        name: "tmux",
        used_for: "to draw `trapline top` on a terminal",
        only_i686: false,
        probe: Probe::Succeeds("tmux -V"),
        remedy: Remedy::DebianPackage("tmux"),
    },
    Need {
        name: "python3",
        used_for: "to record it",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/python3 -m json.tool --help"),
        remedy: Remedy::DebianPackage("python3"),
    },
    Need {
        name: "perl",
        used_for: "to record it",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/perl -e 1"),
        remedy: Remedy::DebianPackage("perl-base"),
    },
    Need {
        name: "gawk",
        used_for: "to record it",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/gawk --version"),
        remedy: Remedy::DebianPackage("gawk"),
    },
    Need {
        name: "openssl",
        used_for: "to record it",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/openssl version"),
        remedy: Remedy::DebianPackage("openssl"),
    },
    Need {
        name: "redis's programs",
        used_for: "to record a server under load",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/redis-benchmark --version"),
        remedy: Remedy::DebianPackage("redis-tools"),
    },
    Need {
        name: "PostgreSQL",
        used_for: "to record a backend under load",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/pgbench --version"),
        remedy: Remedy::DebianPackage("postgresql"),
    },
    Need {
        name: "gdb",
        used_for: "to try out a debugger beside trapline",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/gdb --version"),
        remedy: Remedy::DebianPackage("gdb"),
    },
    Need {
        name: "strace",
        used_for: "to try out another tracer beside trapline",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/strace --version"),
        remedy: Remedy::DebianPackage("strace"),
    },
    Need {
        name: "QEMU",
        used_for: "to boot the testbed kernel",
        only_i686: false,
        probe: Probe::Succeeds("qemu-system-x86_64 --version"),
        remedy: Remedy::DebianPackage("qemu-system-x86"),
    },
    Need {
        name: "setpriv",
        used_for: "to try out what other users may do",
        only_i686: false,
        probe: Probe::Succeeds("/usr/bin/setpriv --version"),
        remedy: Remedy::DebianPackage("util-linux"),
    },
    Need {
        name: "Rust for i686-unknown-linux-gnu",
        used_for: "to build the 32-bit tests",
        only_i686: true,
        probe: Probe::RustTarget("i686-unknown-linux-gnu"),
        remedy: Remedy::RustTarget("i686-unknown-linux-gnu"),
    },
    Need {
        name: "a 32-bit C compiler and library",
        used_for: "to build and link the 32-bit tests",
        only_i686: true,
        probe: Probe::Compiles { command: "cc -m32 -x c -", source: C_MAIN },
        remedy: Remedy::DebianPackage("gcc-multilib"),
    },
    Need {
        name: "a 32-bit C++ compiler and library",
        used_for: "to build traced 32-bit C++ functions",
        only_i686: true,
        probe: Probe::Compiles {
            command: "c++ -m32 -x c++ -",
            source: "int main() { try { throw 1; } catch (int) { return 0; } }",
        },
        remedy: Remedy::DebianPackage("g++-multilib"),
    },
    Need {
        name: "a kernel that runs 32-bit programs",
        used_for: "to run the 32-bit tests",
        only_i686: true,
        probe: Probe::Executes { command: "cc -m32 -x c -", source: C_MAIN },
        remedy: Remedy::Nothing("needs a kernel with CONFIG_IA32_EMULATION; without one, use --skip-i686"),
    },
    Need {
        name: "valgrind",
        used_for: "to count the calls of traced programs in another way",
        only_i686: false,
        probe: Probe::Succeeds(
            "/usr/bin/valgrind --quiet --tool=callgrind --callgrind-out-file=/dev/null /usr/bin/env",
        ),
        remedy: Remedy::DebianPackage("valgrind"),
    },
    Need::traced("xz", "/usr/bin/xz --version", "xz-utils"),
    Need::traced("gzip", "/usr/bin/gzip --version", "gzip"),
    Need::traced("bzip2", "/usr/bin/bzip2 --help", "bzip2"),
    Need::traced("sqlite3", "/usr/bin/sqlite3 -version", "sqlite3"),
    Need::traced("python3", "/usr/bin/python3 -S -m json.tool --help", "python3"),
    Need::traced("perl", "/usr/bin/perl -v", "perl-base"),
    Need::traced("gawk", "/usr/bin/gawk --version", "gawk"),
];

impl Need {
    /// A program whose calls are counted.
    const fn traced(name: &'static str, probe: &'static str, package: &'static str) -> Self {
        let (probe, remedy) = (Probe::Succeeds(probe), Remedy::DebianPackage(package));
        Self { name, used_for: "to compare its trace with counted calls", only_i686: false, probe, remedy }
    }
}

/// Installs what the selected tests need and the machine lacks.
///
/// # Errors
/// Something is missing and the user is not root, or it cannot be installed at all (nothing is touched then, and the error says
/// what to do); an installation failed; or it succeeded and the need is still not met.
pub(crate) fn make_ready(selection: Selection) -> Result<()> {
    let needs: Vec<&Need> = NEEDS.iter().filter(|need| !(selection.skip_i686 && need.only_i686)).collect();
    let missing = unmet(&needs)?;
    if missing.is_empty() {
        eprintln!("setup: all {} needs of the tests are met", needs.len());
        return Ok(());
    }
    eprintln!("setup: missing");
    for need in &missing {
        eprintln!("  {}, {}", need.name, need.used_for);
    }
    let plan = Plan::for_missing(&missing);
    if let Some((name, advice)) = plan.hopeless {
        bail!("{name}: {advice}");
    }
    ensure!(
        is_root(),
        "only root can install that; nothing was changed. Run\n{}then this command again",
        plan.as_typed()
    );
    for command in &plan.commands {
        carry_out(command)?;
    }
    let still = unmet(&needs)?;
    if let Some(need) = still.first() {
        bail!("{} is still missing after a successful installation (probe: {:?})", need.name, need.probe);
    }
    eprintln!("setup: installed; all {} needs of the tests are met", needs.len());
    Ok(())
}

/// What to do about the needs that are not met.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// The commands that install everything, in order.
    commands: Vec<InstallCommand>,
    /// A need that no command can meet, with advice.
    hopeless: Option<(&'static str, &'static str)>,
}

#[derive(Debug, PartialEq, Eq)]
struct InstallCommand {
    words: Vec<&'static str>,
    needs_root: bool,
    /// Whether a failure is only worth a warning.
    may_fail: bool,
}

impl Plan {
    fn for_missing(missing: &[&Need]) -> Self {
        let mut plan = Self::default();
        let mut packages = vec!["apt-get", "install", "--yes", "--no-install-recommends"];
        let options = packages.len();
        let mut targets = vec!["rustup", "target", "add"];
        let mut components = vec!["rustup", "component", "add"];
        let toolchain_options = targets.len();
        for need in missing {
            match need.remedy {
                Remedy::DebianPackage(package) => packages.push(package),
                Remedy::RustTarget(target) => targets.push(target),
                Remedy::RustComponent(component) => components.push(component),
                Remedy::Nothing(advice) => plan.hopeless = plan.hopeless.or(Some((need.name, advice))),
            }
        }
        if packages.len() > options {
            // A source that has nothing to do with us may be out of reach. Whether ours is, the installation shows.
            plan.commands.push(InstallCommand { words: vec!["apt-get", "update"], needs_root: true, may_fail: true });
            plan.commands.push(InstallCommand { words: packages, needs_root: true, may_fail: false });
        }
        for words in [targets, components] {
            if words.len() > toolchain_options {
                plan.commands.push(InstallCommand { words, needs_root: false, may_fail: false });
            }
        }
        plan
    }

    /// The commands as a user who is not root would type them, one a line.
    fn as_typed(&self) -> String {
        let mut lines = String::new();
        for command in &self.commands {
            lines.push_str(if command.needs_root { "  sudo " } else { "  " });
            lines.push_str(&command.words.join(" "));
            lines.push('\n');
        }
        lines
    }
}

fn carry_out(command: &InstallCommand) -> Result<()> {
    let line = command.words.join(" ");
    eprintln!("setup: $ {line}");
    let status = Command::new(command.words[0])
        .args(&command.words[1..])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .current_dir(workspace_root())
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("starting `{line}`: on a system without it, install the equivalents by hand"))?;
    if !status.success() && command.may_fail {
        eprintln!("setup: warning: `{line}` ended with {status}; going on");
        return Ok(());
    }
    ensure!(status.success(), "`{line}` ended with {status}");
    Ok(())
}

pub(crate) fn is_root() -> bool {
    // The owner of this folder is the effective user of the process that looks.
    fs::metadata("/proc/self").is_ok_and(|folder| folder.uid() == 0)
}

/// The needs that the machine does not meet.
///
/// # Errors
/// There is nowhere to put a compiled program.
fn unmet<'a>(needs: &[&'a Need]) -> Result<Vec<&'a Need>> {
    let scratch = Scratch::create()?;
    Ok(needs.iter().copied().filter(|need| !need.probe.is_met(&scratch)).collect())
}

impl Probe {
    fn is_met(&self, scratch: &Scratch) -> bool {
        match *self {
            Self::Succeeds(line) => succeeds(&mut command(line)),
            Self::RustTarget(target) => has_rust_target(target),
            Self::Compiles { command, source } => compile(command, source, scratch).is_some(),
            Self::Executes { command, source } => {
                compile(command, source, scratch).is_none_or(|program| succeeds(&mut Command::new(program)))
            }
        }
    }
}

fn command(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).current_dir(workspace_root());
    command
}

/// Whether the command starts and ends with exit status 0. It reads nothing and its output is dropped.
fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Whether the toolchain in use has the core library of a target, however it came there.
fn has_rust_target(target: &str) -> bool {
    let Ok(output) = command(&format!("rustc --print target-libdir --target {target}")).output() else {
        return false;
    };
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    fs::read_dir(folder)
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-")))
}

/// Compiles `source`, handed over on standard input, and tells where the result is.
fn compile(line: &str, source: &str, scratch: &Scratch) -> Option<PathBuf> {
    let result = scratch.path.join("probe");
    let mut compiler = command(line);
    compiler.arg("-o").arg(&result).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = compiler.spawn().ok()?;
    // A compiler that ends without reading makes this fail, and then its status says what there is to say.
    let _ = child.stdin.take()?.write_all(source.as_bytes());
    child.wait().ok()?.success().then_some(result)
}

/// A folder that is removed with this value.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("trapline-setup-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let leftover: &Path = &self.path;
        if let Err(error) = fs::remove_dir_all(leftover) {
            eprintln!("setup: warning: could not remove {}: {error}", leftover.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(remedy: Remedy) -> Need {
        Need { name: "it", used_for: "to test", only_i686: false, probe: Probe::Succeeds("true"), remedy }
    }

    #[test]
    fn what_is_missing_becomes_one_command_a_tool() {
        let missing = [
            need(Remedy::RustTarget("a-none")),
            need(Remedy::DebianPackage("clang")),
            need(Remedy::RustComponent("clippy")),
            need(Remedy::DebianPackage("gcc-multilib")),
            need(Remedy::RustTarget("b-none")),
        ];
        let plan = Plan::for_missing(&missing.iter().collect::<Vec<_>>());
        assert_eq!(
            plan.as_typed(),
            "  sudo apt-get update\n  \
               sudo apt-get install --yes --no-install-recommends clang gcc-multilib\n  \
               rustup target add a-none b-none\n  \
               rustup component add clippy\n"
        );
        assert_eq!(plan.hopeless, None);
    }

    #[test]
    fn package_lists_are_left_alone_when_no_package_is_missing() {
        let missing = [need(Remedy::RustTarget("a-none"))];
        let plan = Plan::for_missing(&missing.iter().collect::<Vec<_>>());
        assert_eq!(plan.as_typed(), "  rustup target add a-none\n");
        assert_eq!(Plan::for_missing(&[]), Plan::default());
    }

    #[test]
    fn what_cannot_be_installed_is_told_with_advice() {
        let missing = [need(Remedy::DebianPackage("clang")), need(Remedy::Nothing("use another kernel"))];
        let plan = Plan::for_missing(&missing.iter().collect::<Vec<_>>());
        assert_eq!(plan.hopeless, Some(("it", "use another kernel")));
    }

    #[test]
    fn a_probe_tells_what_works_from_what_does_not() {
        let scratch = Scratch::create().expect("a folder for temporary files");
        assert!(Probe::Succeeds("true").is_met(&scratch));
        assert!(!Probe::Succeeds("false").is_met(&scratch));
        assert!(!Probe::Succeeds("trapline-no-such-command").is_met(&scratch));
        assert!(!Probe::RustTarget("no-such-target").is_met(&scratch));
        let compiler = "cc -x c -";
        assert!(Probe::Compiles { command: compiler, source: C_MAIN }.is_met(&scratch));
        assert!(!Probe::Compiles { command: compiler, source: "no C" }.is_met(&scratch));
        assert!(Probe::Executes { command: compiler, source: C_MAIN }.is_met(&scratch));
        assert!(!Probe::Executes { command: compiler, source: "int main(void) { return 1; }" }.is_met(&scratch));
        let path = scratch.path.clone();
        drop(scratch);
        assert!(!path.exists(), "the scratch folder stays behind");
    }
}
