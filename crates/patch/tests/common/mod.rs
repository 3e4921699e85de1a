//! Programs that tests compile, processes that take new code, and a place for files that goes away.
#![allow(dead_code, reason = "each test uses some of it")]

use std::{
    cell::RefCell,
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use object::{Object as _, ObjectSegment as _, ObjectSymbol as _};
use tempfile::TempDir;
use trapline_engine::Addr;
use trapline_patch::{Error, Linked, Pair, Patch, Protection, Request, Resolver, ThreadLocal, ThreadPlace};

/// A directory that is removed with all that is in it.
pub(crate) struct Directory(TempDir);

impl Directory {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().expect("the directory for temporary files is writable"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a source file.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("the directory is writable");
        path
    }

    /// Compiles a source to an object with functions in sections of their own.
    pub(crate) fn object(&self, tool: &str, source: &Path, name: &str, flags: &[&str]) -> PathBuf {
        let to = self.path(name);
        let fixed = ["-c", "-ffunction-sections", "-fdata-sections", "-w", text(source), "-o", text(&to)];
        run(tool, &[&fixed, flags].concat());
        to
    }
}

/// The path of a fixture's source.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Runs a tool that has to succeed.
pub(crate) fn run(tool: &str, arguments: &[&str]) {
    let output = Command::new(tool).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{tool} is needed for this test: {error}"));
    assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("the directory for temporary files has a name in UTF-8")
}

/// Builds a patch of one object.
pub(crate) fn build(target: &Path, old: Option<&Path>, new: &Path) -> Result<Patch, Error> {
    trapline_patch::build(&Request {
        target: target.to_owned(),
        pairs: vec![Pair { old: old.map(Path::to_owned), new: new.to_owned() }],
        name: None,
        pins: Vec::new(),
        allow_inlined: false,
    })
}

/// A process that runs a target.
pub(crate) struct Host {
    child: Child,
    to: RefCell<ChildStdin>,
    from: RefCell<BufReader<ChildStdout>>,
    bias: u64,
    /// Of the target's thread-local block, seen from the thread pointer.
    block: i64,
    pub(crate) absent: RefCell<Vec<String>>,
    known: RefCell<HashMap<String, u64>>,
}

impl Host {
    pub(crate) fn start(target: &Path) -> Self {
        let mut child = Command::new(target)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} starts: {error}", target.display()));
        let to = RefCell::new(child.stdin.take().expect("it is a pipe"));
        let from = RefCell::new(BufReader::new(child.stdout.take().expect("it is a pipe")));
        let none = RefCell::default();
        let mut host = Self { child, to, from, bias: 0, block: 0, absent: none, known: RefCell::default() };
        let bytes = fs::read(target).expect("it was just made");
        let file = object::File::parse(&*bytes).expect("a linker made it");
        let lowest = file.segments().map(|segment| segment.address()).min().expect("it has segments");
        let probe = file.symbols().find(|symbol| symbol.name() == Ok("trapline_probe")).expect("the fixture has it");
        let answer = host.ask("base");
        let (base, distance) = answer.split_once(' ').expect("two numbers");
        host.bias = base.parse::<u64>().expect("a number").wrapping_sub(lowest);
        host.block = distance.parse::<i64>().expect("a number") - probe.address().cast_signed();
        host
    }

    /// Sends a command, and takes a line of answer.
    pub(crate) fn ask(&self, command: &str) -> String {
        writeln!(self.to.borrow_mut(), "{command}").expect("the process reads");
        self.answer()
    }

    /// Sends a command, and waits for nothing.
    pub(crate) fn send(&self, command: &str) {
        writeln!(self.to.borrow_mut(), "{command}").expect("the process reads");
    }

    fn answer(&self) -> String {
        let mut line = String::new();
        self.from.borrow_mut().read_line(&mut line).expect("the process answers");
        assert!(!line.is_empty(), "the process ended");
        line.trim_end().to_owned()
    }

    /// Runs the scenario; its output.
    pub(crate) fn scenario(&self) -> String {
        writeln!(self.to.borrow_mut(), "run").expect("the process reads");
        let mut output = String::new();
        loop {
            let line = self.answer();
            if line == "." {
                return output;
            }
            output.push_str(&line);
            output.push('\n');
        }
    }

    /// Memory for a patch, near the target or far from it.
    pub(crate) fn reserve(&self, len_bytes: u64, is_far: bool) -> Addr {
        Addr::new(self.ask(&format!("reserve {len_bytes} {}", u8::from(is_far))).parse().expect("an address"))
    }

    /// Maps what was linked.
    pub(crate) fn map(&self, linked: &Linked) {
        for segment in &linked.segments {
            let protection = match segment.protection {
                Protection::Code => libc::PROT_READ | libc::PROT_EXEC,
                Protection::ReadOnly => libc::PROT_READ,
                Protection::Data => libc::PROT_READ | libc::PROT_WRITE,
            };
            let command = format!("map {} {} {protection}\n", segment.at.value(), segment.bytes.len());
            let mut to = self.to.borrow_mut();
            to.write_all(command.as_bytes()).expect("the process reads");
            to.write_all(&segment.bytes).expect("the process reads");
            drop(to);
            assert_eq!(self.answer(), "mapped");
        }
    }

    /// Diverts what was linked.
    pub(crate) fn divert(&self, linked: &Linked) {
        for (old, new) in &linked.replacements {
            assert_eq!(self.ask(&format!("divert {} {}", old.value(), new.value())), "diverted");
        }
    }

    /// Links, maps, and diverts a patch.
    pub(crate) fn apply(&self, patch: &Patch) -> Linked {
        let linker = trapline_patch::Linker::new(patch);
        let at = self.reserve(linker.len_bytes(), false);
        let fitted = linker.link(at, self).unwrap_or_else(|error| panic!("{error}"));
        self.map(&fitted);
        self.divert(&fitted);
        fitted
    }

    /// Some address near the target that begins a page.
    pub(crate) fn bias_page(&self) -> u64 {
        (self.bias & !4095).wrapping_add(1 << 28)
    }

    /// The status it ends with when there is nothing left to do.
    pub(crate) fn end(mut self) -> std::process::ExitStatus {
        drop(self.to);
        let mut rest = String::new();
        let _ = self.from.borrow_mut().read_to_string(&mut rest);
        self.child.wait().expect("it is our child")
    }
}

impl Resolver for Host {
    fn bias(&self) -> u64 {
        self.bias
    }

    fn import(&self, name: &str, _version: Option<&str>) -> Option<Addr> {
        if self.absent.borrow().iter().any(|absent| absent == name) {
            return None;
        }
        let known = self.known.borrow().get(name).copied();
        let address = known.unwrap_or_else(|| self.ask(&format!("symbol {name}")).parse().expect("an address"));
        self.known.borrow_mut().insert(name.to_owned(), address);
        (address != 0).then_some(Addr::new(address))
    }

    fn thread_local(&self, variable: ThreadLocal<'_>) -> Option<ThreadPlace> {
        match variable {
            ThreadLocal::Target { offset } => {
                let from_thread_pointer = Some(self.block + offset.cast_signed());
                // The executable is the first module.
                Some(ThreadPlace { module: 1, offset, from_thread_pointer })
            }
            ThreadLocal::Import { .. } => None,
        }
    }
}
