//! `cargo xtask screenshots`: the manual's pictures of what trapline shows, taken of real runs.
//!
//! The page of `trapline html` is that of the tutorial's script, as Chromium draws it; `trapline top` runs on a terminal, which is tmux, and what stands there is written as SVG.
//! Invariant: a picture is what somebody sees who types the commands of the manual; nothing is drawn by hand.

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    Folder,
    install::{self, Tools},
    pages,
};
use crate::{
    fidelity::{self, Build},
    packages, workspace_root,
};

/// The tutorial's text and script.
const WORDS: &str = r#"head -c 4000 /usr/share/common-licenses/GPL-3 | tr -d '"\\\n[]$`' > words.txt"#;
const SCRIPT: &str = "text=$(cat words.txt)
declare -A seen
for ((i = 0; i < ${#text}; i++)); do
  letter=${text:i:1}
  seen[$letter]=$((${seen[$letter]:-0} + 1))
done
echo \"${#seen[@]} letters\"
";
/// What the tutorial finds to be slow.
const SLOW: &str = "mbstrlen";

/// A program that is never done: its functions have names, though Debian's perl has no debug information.
const ENDLESS: &str =
    r#"my %seen; for (my $i = 0; ; $i++) { $seen{$i % 999} .= lc "Word $i"; delete $seen{($i * 7) % 999} }"#;
/// The terminal's columns and rows.
const TERMINAL: (&str, &str) = ("96", "24");
/// How long `top` looks before its picture is taken, and how long it may take to draw anything.
const LOOKS: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_mins(1);

/// Takes all pictures, and puts them where the manual has them.
pub(crate) fn take() -> Result<ExitCode> {
    packages::ensure(&[("/usr/bin/tmux", "tmux"), ("/bin/bash", "bash"), ("/usr/bin/perl", "perl")])?;
    let (tools, trapline, folder) =
        (Tools::for_tool("pages")?, fidelity::build_trapline(Build::Release)?, Folder::create()?);
    let pictures = workspace_root().join("docs/pictures");
    page(&tools, &trapline, &folder.0, &pictures)?;
    let picture = pictures.join("top.svg");
    fs::write(&picture, top(&trapline, &folder.0)?).with_context(|| format!("writing {}", picture.display()))?;
    println!("{} has them", pictures.display());
    Ok(ExitCode::SUCCESS)
}

fn page(tools: &Tools, trapline: &Path, folder: &Path, pictures: &Path) -> Result<()> {
    fs::write(folder.join("count.sh"), SCRIPT).context("writing the script")?;
    let mut command = Command::new("/bin/sh");
    install::output(command.args(["-c", WORDS]).current_dir(folder), "the script's text")?;
    let mut command = Command::new(trapline);
    command.args(["record", "--quiet", "-o", "before.data", "--", "bash", "count.sh"]).current_dir(folder);
    install::output(&command, "trapline record")?;
    let page = pages::write_page(trapline, &folder.join("before.data"))?;
    let mut command = tools.node_script("screenshots.mjs");
    install::output(command.arg(&page).arg(pictures).arg(SLOW), "Chromium").map(drop)
}

/// What stands on the terminal, as SVG.
fn top(trapline: &Path, folder: &Path) -> Result<String> {
    let terminal =
        Terminal::start(folder, &[trapline.as_os_str().as_encoded_bytes(), b" top -- perl endless.pl"].concat())?;
    let deadline = Instant::now() + PATIENCE;
    while !terminal.screen()?.contains("[perl]") {
        ensure!(Instant::now() < deadline, "`trapline top` shows nothing:\n{}", terminal.screen()?);
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(LOOKS);
    // With the first row selected, and the busiest functions above.
    terminal.tmux(&["send-keys", "s"])?;
    thread::sleep(Duration::from_secs(2));
    let screen = terminal.screen()?;
    terminal.tmux(&["send-keys", "q"])?;
    Ok(anstyle_svg::Term::new().render_svg(screen.trim_end()))
}

/// A terminal in which a command runs.
struct Terminal<'a>(&'a Path);

impl<'a> Terminal<'a> {
    fn start(folder: &'a Path, command: &[u8]) -> Result<Self> {
        fs::write(folder.join("endless.pl"), ENDLESS).context("writing the program")?;
        let (terminal, command) = (Self(folder), String::from_utf8_lossy(command));
        let there = folder.display().to_string();
        let words =
            ["-f", "/dev/null", "new-session", "-d", "-x", TERMINAL.0, "-y", TERMINAL.1, "-c", &there, &command];
        terminal.tmux(&words)?;
        Ok(terminal)
    }

    fn tmux(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("/usr/bin/tmux");
        command
            .arg("-S")
            .arg(self.0.join("terminal"))
            .args(words)
            .env("TERM", "xterm-256color")
            .env("SHELL", "/bin/sh");
        install::output(&command, "tmux")
    }

    /// With its colours.
    fn screen(&self) -> Result<String> {
        self.tmux(&["capture-pane", "-e", "-p"])
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        // It is gone by itself once its command is.
        let _ = self.tmux(&["kill-server"]);
    }
}
