//! `cargo xtask newcomer`: the README's first steps, on a Debian system on which nothing of ours was ever.
//!
//! The system is made anew by debootstrap, with a C compiler, beside the Rust of this machine and the tracked files as a clone has them; its cargo has no cache. The commands are those of the README's
//! part "First steps", each block in turn, timed. Making the system is not part of the time. Invariant: nothing is mounted and no process runs when it ends; mounts are in a namespace of their own.
//!
//! Negative control: the last block has to have written a picture that names a function of the program that was recorded; a step that fails ends it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{manual, packages, setup, target_folder, workspace_root};

/// The longest that a newcomer should need.
const GOAL_SECONDS: f64 = 300.0;

const SUITE: &str = "bookworm";

/// Where a newcomer has the clone.
const CLONE: &str = "/newcomer/trapline";

/// In the clone, what the last step writes.
const PICTURE: &str = "trapline.svg";

/// Makes a system, follows the README there, and prints how long each step took.
pub(crate) fn run() -> Result<ExitCode> {
    ensure!(setup::is_root(), "a fresh system is made by root; run `sudo cargo xtask newcomer`");
    packages::ensure(&[("/usr/sbin/debootstrap", "debootstrap")])?;
    let readme = fs::read_to_string(workspace_root().join("README.md")).context("reading README.md")?;
    let steps = steps(&readme)?;
    let folder = target_folder().join("newcomer");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let system = folder.join("system");
    eprintln!("newcomer: a fresh {SUITE} in {}", system.display());
    make(&system)?;
    let taken = follow(&system, &steps)?;
    println!("{:>8}  {:>12}  step", "seconds", "of processors");
    for (commands, Taken { seconds, of_processors }) in steps.iter().zip(&taken) {
        println!("{seconds:>8.1}  {of_processors:>13.1}  {}", commands.trim_end().replace('\n', "; "));
    }
    let total: f64 = taken.iter().map(|step| step.seconds).sum();
    let of_processors: f64 = taken.iter().map(|step| step.of_processors).sum();
    println!("{total:>8.1}  {of_processors:>13.1}  in all; the goal is {GOAL_SECONDS} s");
    let picture = fs::read_to_string(system.join(&CLONE[1..]).join(PICTURE)).context("reading the picture")?;
    ensure!(picture.contains("<svg") && picture.contains("main"), "the picture shows no function");
    fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    Ok(if total < GOAL_SECONDS { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The blocks of commands of the README's first steps.
fn steps(readme: &str) -> Result<Vec<String>> {
    let part = readme.split_once("\n## First steps\n").context("README.md has no part `First steps`")?.1;
    let part = part.split_once("\n## ").map_or(part, |(part, _)| part);
    let steps = manual::commands(part).map_err(anyhow::Error::msg)?;
    ensure!(steps.len() > 2, "the first steps of README.md are {}", steps.len());
    Ok(steps)
}

/// A system with a C compiler, our files, and this machine's way into the network.
fn make(system: &Path) -> Result<()> {
    let line = Command::new("debootstrap")
        .args(["--variant=minbase", "--include=gcc,libc6-dev,ca-certificates", SUITE])
        .arg(system)
        .stdout(Stdio::null())
        .status()
        .context("starting debootstrap")?;
    ensure!(line.success(), "debootstrap ended with {line}");
    for file in ["/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"] {
        fs::copy(file, system.join(&file[1..])).with_context(|| format!("copying {file}"))?;
    }
    let clone = system.join(&CLONE[1..]);
    fs::create_dir_all(&clone).with_context(|| format!("creating {}", clone.display()))?;
    let archive = "git -c safe.directory='*' archive HEAD | tar -x -C \"$1\"";
    let status = Command::new("sh")
        .args(["-c", archive, "sh"])
        .arg(&clone)
        .current_dir(workspace_root())
        .status()
        .context("copying the tracked files")?;
    ensure!(status.success(), "the tracked files cannot be copied");
    Ok(())
}

/// What a step took. On a machine that does other work, the first says little.
struct Taken {
    seconds: f64,
    of_processors: f64,
}

/// Runs the steps, and tells what each took.
fn follow(system: &Path, steps: &[String]) -> Result<Vec<Taken>> {
    let rust = Command::new("rustc").args(["--print", "sysroot"]).output().context("asking rustc where it is")?;
    let rust = PathBuf::from(String::from_utf8_lossy(&rust.stdout).trim());
    let now = "{ cut -d ' ' -f 1 /proc/uptime; times; } >> /newcomer/times\n";
    let script: String = steps.iter().flat_map(|step| [now, step]).collect();
    let script = format!("set -e\ncd {CLONE}\n{script}{now}");
    fs::write(system.join("newcomer/script"), script).context("writing the script")?;
    fs::create_dir_all(system.join("opt/rust")).context("creating a folder for Rust")?;
    // Private mounts and processes: both end with the command.
    let inside = "set -e
mount -t proc proc \"$1/proc\"
mount --rbind /dev \"$1/dev\"
mount --bind \"$2\" \"$1/opt/rust\"
exec chroot \"$1\" env -i HOME=/newcomer TERM=dumb SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
  PATH=/newcomer/.cargo/bin:/opt/rust/bin:/usr/bin:/bin sh /newcomer/script";
    let status = Command::new("timeout")
        .args(["1800", "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", inside, "sh"])
        .args([system, &rust])
        .stdin(Stdio::null())
        .status()
        .context("starting unshare")?;
    ensure!(status.success(), "a step ended with {status}");
    let times = fs::read_to_string(system.join("newcomer/times")).context("reading the times")?;
    let times = moments(&times);
    ensure!(times.len() == steps.len() + 1, "{} times of {} steps", times.len(), steps.len());
    let taken = |pair: &[(f64, f64)]| Taken { seconds: pair[1].0 - pair[0].0, of_processors: pair[1].1 - pair[0].1 };
    Ok(times.windows(2).map(taken).collect())
}

/// Of each moment the seconds since the machine was started, and those that commands had of processors: the shell prints its own in a second line and theirs in a third, as user and system.
fn moments(text: &str) -> Vec<(f64, f64)> {
    let lines: Vec<&str> = text.lines().collect();
    let seconds = |word: &str| -> Option<f64> {
        let (minutes, seconds) = word.strip_suffix('s')?.split_once('m')?;
        Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
    };
    let moment = |lines: &[&str]| Some((lines[0].parse().ok()?, lines[2].split(' ').filter_map(seconds).sum()));
    lines.chunks_exact(3).filter_map(moment).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_clock_and_of_the_shell() {
        let text = "100.50\n0m0.01s 0m0.00s\n1m2.50s 0m0.50s\n103.00\n0m0.01s 0m0.00s\n1m3.00s 0m1.00s\n";
        assert_eq!(moments(text), [(100.5, 63.0), (103.0, 64.0)]);
    }

    #[test]
    fn steps_are_the_commands_of_their_part() {
        let readme =
            "# x\n\n## First steps\n\n```sh\na\n```\n```sh\nb\nc\n```\n```sh\nd\n```\n\n## More\n\n```sh\ne\n```\n";
        assert_eq!(steps(readme).expect("steps"), ["a\n", "b\nc\n", "d\n"]);
        assert!(steps("# x\n\n## More\n").is_err());
        assert!(steps(&readme.replace("```sh\nb\nc\n```\n", "")).is_err());
        // What this repository's README says is what it takes.
        let readme = fs::read_to_string(workspace_root().join("README.md")).expect("README.md");
        let last = steps(&readme).expect("steps").pop().unwrap_or_default();
        assert!(last.contains("export") && last.contains("flamegraph"), "{last}");
    }
}
