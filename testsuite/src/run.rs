//! One run of a command, with fixed surroundings and bounded time.
//!
//! Owns [`Command`] and [`Outcome`]. The environment of a run is the few variables of [`ENVIRONMENT`] and no others; standard input is what the
//! check gives, or empty. Invariant: a run that takes too long is killed with its whole process group, and that fails the check.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt,
    io::{Read, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{self, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

/// The environment that every command starts from.
pub const ENVIRONMENT: &[(&str, &str)] = &[
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/nonexistent"),
    ("LANG", "C.UTF-8"),
    ("TZ", "UTC"),
    ("TERM", "dumb"),
];

/// How long a run may take, if the check says nothing else. Generous: machines are slow when they do other things.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// A command to run.
#[derive(Clone, Debug)]
pub struct Command {
    words: Vec<OsString>,
    environment: BTreeMap<OsString, OsString>,
    folder: PathBuf,
    input: Vec<u8>,
    patience: Duration,
    has_session: bool,
}

impl Command {
    /// The command of these words, to run in `folder`.
    pub fn new<W: AsRef<OsStr>>(words: impl IntoIterator<Item = W>, folder: &Path) -> Self {
        Self {
            words: words.into_iter().map(|word| word.as_ref().to_owned()).collect(),
            environment: ENVIRONMENT.iter().map(|&(name, value)| (name.into(), value.into())).collect(),
            folder: folder.to_owned(),
            input: Vec::new(),
            patience: PATIENCE,
            has_session: false,
        }
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment.insert(name.into(), value.as_ref().to_owned());
        self
    }

    /// Gives it something to read.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// How long it may take.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Runs it in a session of its own, as services are: the kernel shares processors out between sessions first, and then between the threads of each (sched(7),
    /// autogroups).
    #[must_use]
    pub fn in_session(self) -> Self {
        Self { has_session: true, ..self }.behind(["setsid"])
    }

    /// The same command behind other words: under a tracer, say.
    #[must_use]
    pub fn behind<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Self {
        let mut both: Vec<OsString> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
        both.extend(self.words.iter().cloned());
        Self { words: both, ..self.clone() }
    }

    /// Starts it, without waiting for anything.
    ///
    /// # Panics
    /// There is no such command.
    pub fn start(&self) -> Running {
        let mut command = process::Command::new(&self.words[0]);
        command
            .args(&self.words[1..])
            .env_clear()
            .envs(&self.environment)
            .current_dir(&self.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // Who leads a group cannot begin a session.
        if !self.has_session {
            command.process_group(0);
        }
        let mut child = command.spawn().unwrap_or_else(|error| panic!("starting {self}: {error}"));
        let mut stdin = child.stdin.take().expect("it is piped");
        let input = self.input.clone();
        // Ends when all is written, or when nobody reads any more.
        thread::spawn(move || stdin.write_all(&input));
        let stdout = read_all(child.stdout.take().expect("it is piped"));
        let stderr = read_all(child.stderr.take().expect("it is piped"));
        let pid = child.id();
        let (sender, status) = mpsc::channel();
        thread::spawn(move || sender.send(child.wait()));
        Running {
            pid,
            stdout,
            stderr,
            status,
            deadline: Instant::now() + self.patience,
            text: self.to_string(),
            is_finished: false,
        }
    }

    /// Runs it to its end: until it has ended and nobody holds its outputs any more, so a daemon that it left behind is waited for as well.
    ///
    /// # Panics
    /// It takes too long.
    pub fn run(&self) -> Outcome {
        self.start().finish()
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, word) in self.words.iter().enumerate() {
            let separator = if number == 0 { "" } else { " " };
            write!(f, "{separator}{}", word.to_string_lossy())?;
        }
        Ok(())
    }
}

fn read_all(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // An error ends the reading as its end does; what was read is judged.
        let _ = from.read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    receiver
}

/// A command that runs. Its process group is killed with this value, unless it was waited for: also where a check fails.
#[derive(Debug)]
pub struct Running {
    /// Its process, and its process group.
    pub pid: u32,
    stdout: Receiver<Vec<u8>>,
    stderr: Receiver<Vec<u8>>,
    status: Receiver<std::io::Result<ExitStatus>>,
    deadline: Instant,
    text: String,
    is_finished: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_finished {
            kill_group(self.pid);
            // It writes no more where its folder is removed.
            let _ = self.status.recv_timeout(PATIENCE);
        }
    }
}

impl Running {
    /// Waits for its end. See [`Command::run`].
    ///
    /// # Panics
    /// It takes too long.
    pub fn finish(mut self) -> Outcome {
        let status = self.within("an end", &self.status).expect("waiting for a child of ours");
        let stdout = self.within("the end of its standard output", &self.stdout);
        let stderr = self.within("the end of its standard error", &self.stderr);
        self.is_finished = true;
        Outcome { stdout, stderr, end: End::of(status) }
    }

    /// Whether it has ended. What it left behind may go on.
    pub fn has_ended(&self) -> bool {
        !Path::new(&format!("/proc/{}", self.pid)).exists()
    }

    fn within<T>(&self, what: &str, from: &Receiver<T>) -> T {
        let left = self.deadline.saturating_duration_since(Instant::now());
        from.recv_timeout(left).unwrap_or_else(|_| panic!("`{}` took too long: waited for {what}", self.text))
    }
}

/// Sends SIGKILL to a process group that a check started.
pub fn kill_group(leader: u32) {
    signal("KILL", &format!("-{leader}"));
}

/// Sends a signal to a process, or to the group whose leader's number follows a minus.
pub fn signal(name: &str, whom: &str) {
    // Without unsafe code, the way to send a signal is the command. That nobody is there any more is no error.
    let _ = process::Command::new("/bin/kill").args(["-s", name, "--", whom]).stderr(Stdio::null()).status();
}

/// Waits for a program to make a file: it says in that way how far it has come.
///
/// # Panics
/// The file does not come.
pub fn wait_for(path: &Path) {
    wait_until(&path.display(), || path.exists());
}

/// Waits until something is so that nobody tells us of.
///
/// # Panics
/// It takes too long; `what` says what did not come.
pub fn wait_until(what: &dyn fmt::Display, is_so: impl Fn() -> bool) {
    wait_some(what, || is_so().then_some(()));
}

/// Waits for what `look` finds once it is there.
///
/// # Panics
/// It takes too long; `what` says what did not come.
pub fn wait_some<T>(what: &dyn fmt::Display, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} does not come");
        thread::sleep(Duration::from_millis(2));
    }
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// With this exit status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

impl End {
    fn of(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Status(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => unreachable!("a process that was waited for has ended"),
        }
    }
}

/// What a run did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub end: End,
}

impl Outcome {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        Command::new(["/bin/sh", "-c", script], Path::new("/"))
    }

    #[test]
    fn an_outcome_has_outputs_and_end() {
        let outcome = shell("read line; echo got $line; echo bad >&2; exit 7").input("this\n").run();
        assert_eq!((outcome.text().as_str(), outcome.error_text().as_str()), ("got this\n", "bad\n"));
        assert_eq!(outcome.end, End::Status(7));
        assert_eq!(shell("kill -USR1 $$").run().end, End::Signal(10));
    }

    #[test]
    fn who_is_left_behind_with_our_output_is_waited_for() {
        let outcome = shell("(while kill -0 $$ 2>/dev/null; do :; done; echo late) & echo early").run();
        assert_eq!(outcome.text(), "early\nlate\n");
    }

    #[test]
    #[should_panic(expected = "took too long")]
    fn what_does_not_end_is_ended() {
        shell("exec cat /dev/zero >/dev/null").patience(Duration::from_millis(200)).run();
    }
}
