//! `cargo xtask screenshots`: the manual's pictures of what trapline shows, taken of real runs.
//!
//! The page of `trapline html` is that of the tutorial's script, as Chromium draws it; `trapline top` runs on a terminal, which is tmux, and what stands there is written as SVG. So are the commands that mend a process.
//! Invariant: a picture is what somebody sees who types the commands of the manual; nothing is drawn by hand.

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result};
use trapline_testsuite::{run, terminal::Terminal};

use super::{
    Folder,
    install::{self, Tools},
    pages,
};
use crate::{
    fidelity::{self, Build},
    manual, packages, workspace_root,
};

/// What the tutorial finds to be slow.
const SLOW: &str = "mbstrlen";
/// Which of its commands are followed: up to this one, which makes the trace.
const RECORDS: &str = "trapline record -o before.data";

/// A program that is never done: its functions have names, though Debian's perl has no debug information.
const ENDLESS: &str =
    r#"my %seen; for (my $i = 0; ; $i++) { $seen{$i % 999} .= lc "Word $i"; delete $seen{($i * 7) % 999} }"#;
/// The terminal's columns and rows.
const TERMINAL: (u16, u16) = (96, 24);
/// For how long `top` has looked when its picture is taken.
const SECONDS: f64 = 5.0;

/// Takes all pictures, and puts them where the manual has them.
pub(crate) fn take() -> Result<ExitCode> {
    packages::ensure(&[("/usr/bin/tmux", "tmux"), ("/bin/bash", "bash"), ("/usr/bin/perl", "perl")])?;
    let (tools, trapline, folder) =
        (Tools::for_tool("pages")?, fidelity::build_trapline(Build::Release)?, Folder::create()?);
    let pictures = workspace_root().join("docs/pictures");
    page(&tools, &trapline, &folder.0, &pictures)?;
    let picture = pictures.join("top.svg");
    fs::write(&picture, top(&trapline, &folder.0)?).with_context(|| format!("writing {}", picture.display()))?;
    let picture = pictures.join("live-fix.svg");
    fs::write(&picture, live_fix(&trapline, &folder.0)?).with_context(|| format!("writing {}", picture.display()))?;
    println!("{} has them", pictures.display());
    Ok(ExitCode::SUCCESS)
}

fn page(tools: &Tools, trapline: &Path, folder: &Path, pictures: &Path) -> Result<()> {
    let blocks = commands("tutorial.md")?;
    let last = blocks.iter().position(|block| block.contains(RECORDS)).context("the tutorial records nothing")?;
    let mut command = Command::new("/bin/bash");
    command.args(["-e", "-c", &blocks[..=last].concat()]).current_dir(folder);
    install::output(command.env("PATH", path(trapline)?), "the tutorial")?;
    let page = pages::write_page(trapline, &folder.join("before.data"))?;
    let mut command = tools.node_script("screenshots.mjs");
    install::output(command.arg(&page).arg(pictures).arg(SLOW), "Chromium").map(drop)
}

/// What stands on the terminal, as SVG.
fn top(trapline: &Path, folder: &Path) -> Result<String> {
    fs::write(folder.join("endless.pl"), ENDLESS).context("writing the program")?;
    let terminal = Terminal::new(folder, TERMINAL);
    terminal.line(&format!("{} top --sort self -- perl endless.pl", trapline.display()));
    terminal.wait_for("a table", |screen| screen.contains("[perl]") && elapsed(screen).is_some_and(|s| s > SECONDS));
    let screen = terminal.coloured_screen();
    terminal.key("q");
    terminal.wait_for("the shell", |screen| screen.trim_end().ends_with(Terminal::PROMPT));
    Ok(anstyle_svg::Term::new().render_svg(screen.trim_end()))
}

/// The commands that mend a process, one after the other, as the manual has them, and what they say.
fn live_fix(trapline: &Path, folder: &Path) -> Result<String> {
    let blocks = commands("how-to-live-fix.md")?;
    let (process, others) = blocks.split_first().context("there is no process to be mended")?;
    let mut command = Command::new("/bin/bash");
    command.args(["-e", "-c", &format!("{process}echo $till")]).current_dir(folder).stderr(Stdio::null());
    let output = command.output().context("starting bash")?;
    let process = Till(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let setup = format!("export till={} PATH={}", process.0, path(trapline)?);
    fs::write(folder.join("setup"), setup).context("writing the shell's variables")?;
    let terminal = Terminal::new(folder, HIGH_TERMINAL);
    // A prompt more is there when a command is done, and not before: nothing scrolls.
    let wait = |prompts: usize| {
        let is_waiting = |screen: &str| {
            screen.matches(Terminal::PROMPT).count() == prompts && screen.trim_end().ends_with(Terminal::PROMPT)
        };
        terminal.wait_for("the shell", is_waiting);
    };
    terminal.line(". ./setup");
    wait(2);
    terminal.line("clear");
    wait(1);
    for (prompts, line) in (2..).zip(others.concat().lines()) {
        terminal.line(line);
        wait(prompts);
    }
    let screen = terminal.coloured_screen();
    let text = screen.trim_end().trim_end_matches(Terminal::PROMPT).trim_end().replace(Terminal::PROMPT, "$");
    Ok(anstyle_svg::Term::new().render_svg(&text))
}

/// Room for all that is said when a process is mended.
const HIGH_TERMINAL: (u16, u16) = (96, 40);

/// The number of the process that is mended, which ends with this.
struct Till(String);

impl Drop for Till {
    fn drop(&mut self) {
        run::signal("TERM", &self.0);
    }
}

/// The blocks of commands of a page.
fn commands(page: &str) -> Result<Vec<String>> {
    let text =
        fs::read_to_string(workspace_root().join("docs").join(page)).with_context(|| format!("reading {page}"))?;
    manual::commands(&text).map_err(anyhow::Error::msg)
}

/// Where programs are looked for, this trapline first.
fn path(trapline: &Path) -> Result<String> {
    let own = trapline.parent().context("trapline is in a folder")?.display();
    Ok(format!("{own}:{}", std::env::var("PATH").unwrap_or_default()))
}

/// The seconds that `top` tells in its first line.
fn elapsed(screen: &str) -> Option<f64> {
    let line = screen.lines().find_map(|line| line.strip_prefix("trapline top: "))?;
    line.split_once("s after")?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_says_how_long_it_looks() {
        assert_eq!(elapsed("trapline top: 7.960s after the beginning, 1 process, 1 thread\n"), Some(7.96));
        assert_eq!(elapsed("ready$ trapline top\n"), None);
    }
}
