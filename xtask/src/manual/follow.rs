//! Follows a page: runs its commands as a reader would type them.
//!
//! Owns [`page()`]. All blocks are one shell, which stops at the first command that fails; its folder, home and temporary files are one folder that vanishes. Invariant: what a page starts is ended
//! with it, also if it takes too long.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};

use super::page::{Page, missing};

/// The longest that a page may take.
const SECONDS: &str = "300";

/// Stands in front of what a block prints.
const MARK: &str = "@@ block ";

/// What became of a page.
#[derive(Debug)]
pub(crate) struct Done {
    /// Blocks that were run.
    pub(crate) commands: usize,
    /// Lines that were shown, and printed.
    pub(crate) shown: usize,
    /// Blocks that were not run: line, and why.
    pub(crate) left_out: Vec<(usize, String)>,
    pub(crate) seconds: f64,
}

/// Runs a page's commands, with this `trapline` in the path.
///
/// # Errors
/// A command failed, or did not print what the page shows: with the line of the page, and what was printed.
pub(crate) fn page(page: &Page, trapline: &Path) -> Result<Done> {
    let folder = Folder::create()?;
    let started = Instant::now();
    let (script, output) = (folder.0.join("script"), folder.0.join("output"));
    fs::write(&script, script_of(page)).with_context(|| format!("writing {}", script.display()))?;
    let printed = File::create(&output).with_context(|| format!("creating {}", output.display()))?;
    let also = printed.try_clone().context("a second handle")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let beside = trapline.parent().unwrap_or(Path::new("/")).display();
    let here = folder.0.join("here");
    fs::create_dir(&here).with_context(|| format!("creating {}", here.display()))?;
    // Whose Rust is found by the home folder.
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    let of_home = |name: &str, folder: &str| std::env::var_os(name).map_or_else(|| home.join(folder), PathBuf::from);
    let status = Command::new("timeout")
        .args(["--kill-after=5", SECONDS, "bash"])
        .arg(&script)
        .current_dir(&here)
        .env("PATH", format!("{beside}:{path}"))
        .env("HOME", &here)
        .env("RUSTUP_HOME", of_home("RUSTUP_HOME", ".rustup"))
        .env("CARGO_HOME", of_home("CARGO_HOME", ".cargo"))
        .env_remove("CARGO_TARGET_DIR")
        .env("TMPDIR", &folder.0)
        .env("LC_ALL", "C.UTF-8")
        .envs([("PAGER", ""), ("DEBIAN_FRONTEND", "noninteractive")])
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("TRAPLINE_OUTPUT")
        .env_remove("TRAPLINE_ON_FULL")
        .stdin(Stdio::null())
        .stdout(printed)
        .stderr(also)
        .status()
        .context("starting bash")?;
    let bytes = fs::read(&output).with_context(|| format!("reading {}", output.display()))?;
    let printed = parts(&String::from_utf8_lossy(&bytes));
    if !status.success() {
        let (line, last) = printed.last().cloned().unwrap_or_default();
        bail!("the commands of line {line} failed ({status}):\n{}", last.trim_end());
    }
    let mut shown = 0;
    for block in &page.blocks {
        let text = printed.iter().find(|(line, _)| *line == block.line).map_or("", |(_, text)| text);
        if let Some((line, words)) = missing(&block.shown, text).first() {
            bail!("line {line} shows `{}`, which was not printed:\n{}", words.trim(), text.trim_end());
        }
        shown += block.shown.len();
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(Done { commands: page.blocks.len(), shown, left_out: page.left_out.clone(), seconds })
}

/// For bash.
fn script_of(page: &Page) -> String {
    let begin = "set -e -o pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n".to_owned();
    let blocks = page.blocks.iter().map(|block| format!("printf '\\n{MARK}{}\\n'\n{}", block.line, block.commands));
    [begin].into_iter().chain(blocks).collect::<Vec<_>>().concat()
}

/// What was printed, by the lines of the page's blocks.
fn parts(printed: &str) -> Vec<(usize, String)> {
    let mark = format!("\n{MARK}");
    let parts = printed.split(&mark).skip(1);
    let numbered = parts.filter_map(|part| {
        let (line, text) = part.split_once('\n')?;
        Some((line.parse().ok()?, text.to_owned()))
    });
    numbered.collect()
}

/// A folder for one page.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!(
            "trapline-manual-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::page::parse, *};

    fn followed(text: &str) -> Result<Done> {
        page(&parse(text).expect("a page"), Path::new("/nowhere/trapline"))
    }

    #[test]
    fn what_fails_or_is_not_printed_is_told_with_its_line() {
        let good = "```sh\ncount=3\n```\n\n```sh\necho $count calls\n```\n```text\n5 calls\n```\n";
        let done = followed(good).expect("it can be followed");
        assert_eq!((done.commands, done.shown), (2, 1));
        for (wrong, told) in [
            (good.replace("5 calls", "5 cells"), "line 9 shows `5 cells`"),
            (good.replace("echo $count", "false | cat;"), "the commands of line 5 failed"),
            (good.replace("count=3", "nonsense"), "the commands of line 1 failed"),
        ] {
            let error = followed(&wrong).expect_err("it is wrong").to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn what_a_page_leaves_running_is_ended() {
        let text = "```sh\nsleep 1000 &\necho $! > ../../trapline-manual-left\n```\n";
        followed(text).expect("it can be followed");
        let left = std::env::temp_dir().join("trapline-manual-left");
        let process = fs::read_to_string(&left).expect("its number");
        fs::remove_file(left).expect("it is ours");
        let command = fs::read_to_string(format!("/proc/{}/comm", process.trim())).unwrap_or_default();
        assert_ne!(command.trim(), "sleep");
    }
}
