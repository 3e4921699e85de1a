//! The program that is patched, and what is asked of it.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use trapline_testsuite::{program, scratch::Scratch, trapline};

/// A program, compiled and linked.
pub(crate) struct Built {
    pub(crate) scratch: Scratch,
    source: &'static str,
    flags: &'static [&'static str],
    /// Of the program's file.
    name: &'static str,
    is_narrow: bool,
}

impl Built {
    /// `pair.c`.
    pub(crate) fn new() -> Self {
        Self::of("pair.c", "pair", &[])
    }

    /// Of the width that is asked for.
    pub(crate) fn of(source: &'static str, name: &'static str, flags: &'static [&'static str]) -> Self {
        Self::of_width(source, name, flags, program::is_narrow())
    }

    pub(crate) fn of_width(
        source: &'static str,
        name: &'static str,
        flags: &'static [&'static str],
        is_narrow: bool,
    ) -> Self {
        let built = Self { scratch: Scratch::new(), source, flags, name, is_narrow };
        built.object("old.o", &[]);
        built.link(&[]);
        built
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.scratch.join(self.name)
    }

    /// Links the program again, as another build.
    pub(crate) fn link(&self, flags: &[&str]) {
        if self.is_rust() {
            // The compiler has linked it.
            return;
        }
        // What C++ brings comes to a program of C with its libraries.
        let mut command = self.compiler();
        let object = self.scratch.join("old.o");
        command.args(self.flags).args(["-pthread", "-Wl,--build-id", "-o"]).arg(self.path()).arg(object).args(flags);
        run(&mut command);
    }

    /// The last part of the source's name.
    fn language(&self) -> &str {
        self.source.rsplit_once('.').map_or("", |(_, language)| language)
    }

    fn is_rust(&self) -> bool {
        self.language() == "rs"
    }

    fn compiler(&self) -> Command {
        let mut command = Command::new(if self.language() == "c" { "cc" } else { "c++" });
        command.args(self.is_narrow.then_some("-m32"));
        command
    }

    fn object(&self, name: &str, flags: &[&str]) -> PathBuf {
        let path = self.scratch.join(name);
        let source = program::source(self.source);
        if self.is_rust() {
            let program = if name == "old.o" { self.path() } else { self.scratch.join("unused") };
            let mut command = Command::new("rustc");
            command.args(["--edition=2024", "-O", "-g", "-Ccodegen-units=1", "--check-cfg=cfg(new)"]);
            command.args(self.is_narrow.then_some("--target=i686-unknown-linux-gnu"));
            command.arg("-Clink-arg=-Wl,--build-id").arg("--emit").arg(format!("link={}", program.display()));
            run(command.arg("--emit").arg(format!("obj={}", path.display())).args(flags).arg(source));
            return path;
        }
        let mut command = self.compiler();
        command.args(self.flags).args(["-O2", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]);
        command.args(["-ffunction-sections", "-fdata-sections", "-c", "-o"]).arg(&path).args(flags);
        run(command.arg(source));
        path
    }

    /// A patch to what the program is with other flags.
    pub(crate) fn patch(&self, name: &str, flags: &[&str], pins: &[&str]) -> PathBuf {
        let new = self.object("new.o", flags);
        let path = self.scratch.join(&format!("{name}.tlp"));
        let mut command = Command::new(trapline::path());
        command.args(["patch", "build", "--name", name, "--target"]).arg(self.path()).arg("--old");
        command.arg(self.scratch.join("old.o")).arg("--new").arg(new).arg("-o").arg(&path);
        run(command.args(pins.iter().flat_map(|pin| ["--pin", pin])));
        path
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The program as it runs. It ends when this is dropped, or after five minutes.
pub(crate) struct Target {
    child: Child,
    pid: u32,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// What it says of itself.
pub(crate) struct Answer {
    pub(crate) calls: u64,
    pub(crate) mixed: u64,
    pub(crate) version: u32,
    pub(crate) is_count_kept: bool,
    /// What callbacks of patches have written.
    pub(crate) events: String,
}

/// What a command said.
pub(crate) struct Outcome {
    pub(crate) status: Option<i32>,
    pub(crate) text: String,
    pub(crate) error: String,
}

impl Outcome {
    pub(crate) fn is_good(&self) -> bool {
        self.status == Some(0)
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.text).expect("JSON")
    }
}

impl Target {
    pub(crate) fn start(built: &Built) -> Self {
        Self::start_with(built, &[])
    }

    pub(crate) fn start_with(built: &Built, arguments: &[&str]) -> Self {
        let mut command = Command::new(built.path());
        command.args(arguments);
        Self::run(command, |child| child)
    }

    /// Started in a session of its own, as services are: there the tests get a processor, however many threads of it are busy.
    pub(crate) fn service(built: &Built, arguments: &[&str]) -> Self {
        let mut command = Command::new("setsid");
        command.arg(built.path()).args(arguments);
        Self::run(command, |child| child)
    }

    /// Launched by a recorder.
    pub(crate) fn launched(built: &Built, trace: &Path, options: &[&str]) -> Self {
        let words = trapline::record(trace, options);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(built.path());
        let first_child = |recorder: u32| {
            let children = fs::read_to_string(format!("/proc/{recorder}/task/{recorder}/children"));
            let children = children.expect("a recorder");
            // With switched sites there is a helper, too.
            children.split_whitespace().next().expect("a child").parse().expect("a number")
        };
        Self::run(command, first_child)
    }

    fn run(mut command: Command, pid_of: impl FnOnce(u32) -> u32) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a program that starts");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut target = Self { pid: child.id(), child, input, output };
        assert_eq!(target.line(), "ready\n");
        target.pid = pid_of(target.pid);
        // Everything is there that comes with the first answers.
        target.ask();
        target
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a line");
        line
    }

    /// How it is now, after many more calls.
    pub(crate) fn ask(&mut self) -> Answer {
        self.ask_for("")
    }

    /// The same, with a letter that has it do something before.
    pub(crate) fn ask_for(&mut self, letter: &str) -> Answer {
        self.input.write_all(format!("{letter}\n").as_bytes()).expect("a program that listens");
        let line = self.line();
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [calls, mixed, version, is_count_kept] = numbers[..] else { panic!("the program says {line:?}") };
        Answer {
            calls,
            mixed,
            version: u32::try_from(version).expect("a version"),
            is_count_kept: is_count_kept == 1,
            events: line.split_whitespace().nth(4).unwrap_or_default().to_owned(),
        }
    }

    /// Whether the program answers to a letter, or ends.
    pub(crate) fn survives(&mut self, letter: &str) -> bool {
        self.input.write_all(format!("{letter}\n").as_bytes()).expect("a program that listens");
        !self.line().is_empty()
    }

    /// `trapline patch VERB -p PID ...`
    pub(crate) fn trapline(&self, words: &[&str]) -> Outcome {
        trapline_of(self.pid(), words)
    }

    pub(crate) fn end(mut self) -> u32 {
        self.stop();
        self.pid()
    }

    fn stop(&mut self) {
        // It may be somebody else's child, who has something to do when it ends.
        let _ = Command::new("kill").args(["-KILL", &self.pid.to_string()]).status();
        let _ = self.child.wait();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(crate) fn trapline_of(pid: u32, words: &[&str]) -> Outcome {
    let (verb, rest) = words.split_first().expect("a verb");
    let path: &Path = trapline::path();
    let mut command = Command::new("timeout");
    command.arg("120").arg(path).args(["patch", verb, "-p", &pid.to_string()]).args(rest);
    let output = command.output().expect("a command that starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Outcome { status: output.status.code(), text: text(output.stdout), error: text(output.stderr) }
}
