//! A real terminal, which tmux is.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    time::{Duration, Instant},
};

use crate::run;

/// A terminal with a shell in it. It ends with this value.
#[derive(Debug)]
pub struct Terminal {
    folder: PathBuf,
}

impl Terminal {
    /// What the shell says when it waits.
    pub const PROMPT: &str = "ready$";

    /// Starts a shell in a folder, which has tmux's socket as well, on so many columns and rows.
    ///
    /// # Panics
    /// There is no tmux.
    pub fn new(folder: &Path, (columns, rows): (u16, u16)) -> Self {
        let terminal = Self { folder: folder.to_owned() };
        let (columns, rows) = (columns.to_string(), rows.to_string());
        let there = folder.display().to_string();
        let size = ["-x", columns.as_str(), "-y", rows.as_str()];
        let shell = format!("env PS1='{} ' sh", Self::PROMPT);
        let words = [&["-f", "/dev/null", "new-session", "-d"][..], &size, &["-c", &there, &shell]];
        terminal.tmux(&words.concat());
        terminal.wait_for("a shell", |screen| screen.contains(Self::PROMPT));
        terminal
    }

    /// What tmux says to a command.
    ///
    /// # Panics
    /// It fails.
    pub fn tmux(&self, words: &[&str]) -> String {
        let output = self.command(words).output().expect("tmux; `cargo xtask setup` installs it");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn command(&self, words: &[&str]) -> process::Command {
        let mut command = process::Command::new("tmux");
        command.arg("-S").arg(self.folder.join("terminal")).args(words).env_remove("TMUX").env("SHELL", "/bin/sh");
        command
    }

    /// Types a line.
    pub fn line(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
        self.key("Enter");
    }

    /// Presses a key, by tmux's name of it.
    pub fn key(&self, key: &str) {
        self.tmux(&["send-keys", key]);
    }

    /// What stands there.
    pub fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// The same, with the sequences that colour it.
    pub fn coloured_screen(&self) -> String {
        self.tmux(&["capture-pane", "-e", "-p"])
    }

    /// Waits until something stands there.
    ///
    /// # Panics
    /// It does not come.
    pub fn wait_for(&self, what: &str, is_there: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + run::PATIENCE;
        loop {
            let screen = self.screen();
            if is_there(&screen) {
                return screen;
            }
            assert!(Instant::now() < deadline, "{what} is not there:\n{screen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the terminal is set to.
    ///
    /// # Panics
    /// The shell does not answer.
    pub fn settings(&self, name: &str) -> String {
        self.line(&format!("stty -a > {name}.part && mv {name}.part {name}"));
        run::wait_for(&self.folder.join(name));
        fs::read_to_string(self.folder.join(name)).expect("it is there")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A test that fails may have found it gone.
        let _ = self.command(&["kill-server"]).output();
    }
}
