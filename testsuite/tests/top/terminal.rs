//! On a real terminal, which tmux is.

use std::{
    fs,
    path::Path,
    process,
    time::{Duration, Instant},
};

use trapline_testsuite::{
    program::{Optimised, Program},
    run,
    scratch::Scratch,
    trapline,
};

/// A terminal with a shell in it.
struct Terminal<'a> {
    scratch: &'a Scratch,
}

impl<'a> Terminal<'a> {
    fn new(scratch: &'a Scratch) -> Self {
        let terminal = Self { scratch };
        let folder = scratch.path().display().to_string();
        terminal.tmux(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            "-c",
            &folder,
            "env PS1='ready$ ' sh",
        ]);
        terminal.wait_for("a shell", |screen| screen.contains("ready$"));
        terminal
    }

    fn tmux(&self, words: &[&str]) -> String {
        let mut command = process::Command::new("tmux");
        command.arg("-S").arg(self.scratch.join("terminal")).args(words).env_remove("TMUX").env("SHELL", "/bin/sh");
        let output = command.output().expect("tmux; `cargo xtask setup` installs it");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn line(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
        self.key("Enter");
    }

    fn key(&self, key: &str) {
        self.tmux(&["send-keys", key]);
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn wait_for(&self, what: &str, is_there: impl Fn(&str) -> bool) -> String {
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
    fn settings(&self, name: &str) -> String {
        self.line(&format!("stty -a > {name}.part && mv {name}.part {name}"));
        run::wait_for(&self.scratch.join(name));
        fs::read_to_string(self.scratch.join(name)).expect("it is there")
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        // A test that fails may have found it gone.
        let _ = process::Command::new("tmux").arg("-S").arg(self.scratch.join("terminal")).arg("kill-server").output();
    }
}

/// The command is over, and the shell waits.
fn is_over(path: &Path) -> impl Fn(&str) -> bool + '_ {
    move |screen| path.exists() && screen.trim_end().lines().last().is_some_and(|line| line.starts_with("ready$"))
}

#[test]
fn it_is_driven_on_a_terminal_and_leaves_it_as_it_was() {
    let scratch = Scratch::new();
    let words = Program::of(&["attached.cpp"]).build(Optimised::Yes, scratch.path());
    let target = run::Command::new(words.iter().cloned().chain(["calls".into(), "2".into()]), scratch.path()).start();
    run::wait_for(&scratch.join("ready"));
    let terminal = Terminal::new(&scratch);
    let before = terminal.settings("before");
    let command = trapline::path().display().to_string();
    terminal.line(&format!("{command} top --delay 0.1 --sort name -p {}; echo $? > status", target.pid));
    let row = |screen: &str| screen.lines().nth(2).unwrap_or_default().to_owned();
    let screen = terminal.wait_for("a row", |screen| screen.contains("[attached"));
    assert!(screen.contains("calls/s") && screen.contains("q leave"), "{screen}");
    // A search, and all again.
    terminal.line("/no such name");
    terminal.wait_for("no row", |screen| !screen.contains("[attached"));
    terminal.key("Escape");
    terminal.wait_for("rows again", |screen| screen.contains("[attached"));
    // Counting is switched off, and on again: nothing comes meanwhile.
    terminal.line("/LEAF");
    terminal.wait_for("one row", |screen| row(screen).contains(" leaf [") && !screen.contains("deeper"));
    let has_calls = |screen: &str| !row(screen).trim_start().starts_with("0 ");
    terminal.wait_for("calls", has_calls);
    terminal.key("Down");
    terminal.key("Space");
    terminal.wait_for("nothing more", |screen| row(screen).contains(" off: leaf [") && !has_calls(screen));
    terminal.key("Space");
    terminal.wait_for("calls again", |screen| row(screen).contains(" leaf [") && has_calls(screen));
    terminal.key("Escape");
    terminal.wait_for("all rows", |screen| screen.contains(" deeper ["));
    // Modules, help, another size.
    terminal.key("m");
    terminal.wait_for("modules", |screen| row(screen).contains("attached") && !row(screen).contains('['));
    terminal.key("m");
    terminal.key("?");
    terminal.wait_for("help", |screen| screen.contains("any key goes back"));
    terminal.key("x");
    terminal.wait_for("no help", |screen| !screen.contains("any key goes back"));
    for (width, height) in [("100", 10), ("80", 24)] {
        terminal.tmux(&["resize-window", "-x", width, "-y", &height.to_string()]);
        let is_last = |line: &str| line.starts_with("q leave");
        // A key that comes with another size at once would be read with the next key only (crossterm).
        terminal.wait_for("the last line", |screen| screen.lines().nth(height - 1).is_some_and(is_last));
    }
    terminal.key("q");
    terminal.wait_for("the shell", is_over(&scratch.join("status")));
    assert_eq!(fs::read_to_string(scratch.join("status")).expect("a status"), "0\n");
    assert_eq!(terminal.settings("after"), before);
    // A signal leaves it as well.
    fs::remove_file(scratch.join("status")).expect("it is there");
    terminal.line(&format!("sh -c 'echo $$ > number; exec {command} top -p {}'; echo $? > status", target.pid));
    terminal.wait_for("a row", |screen| screen.contains("[attached"));
    run::wait_for(&scratch.join("number"));
    let number = fs::read_to_string(scratch.join("number")).expect("a number");
    run::signal("TERM", number.trim());
    terminal.wait_for("the shell", is_over(&scratch.join("status")));
    assert_eq!(terminal.settings("at_last"), before);
    // So does a terminal that is closed.
    fs::remove_file(scratch.join("number")).expect("it is there");
    terminal.line(&format!("sh -c 'echo $$ > number; exec {command} top -p {}'", target.pid));
    terminal.wait_for("a row", |screen| screen.contains("[attached"));
    run::wait_for(&scratch.join("number"));
    let number = fs::read_to_string(scratch.join("number")).expect("a number");
    drop(terminal);
    let task = Path::new("/proc").join(number.trim());
    run::wait_until(&"its end without a terminal", || !task.exists());
}
