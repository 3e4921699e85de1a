//! Small programs, compiled as a check needs them.
//!
//! Owns [`Program`]: which sources of `testsuite/programs` make it up. It is compiled into a folder of the check's own, once without optimisation and
//! once with, because what compilers make of exceptions, tail calls and prologues differs between the two.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// How a program is compiled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Optimised {
    /// `-O0`; a debug build.
    No,
    /// `-O2`; a release build.
    Yes,
}

impl Optimised {
    /// Both ways, or only the second where `TRAPLINE_WIDTH` ends with `-O2`.
    pub fn asked_for() -> &'static [Self] {
        let is_only_second = width().ends_with("-O2");
        if is_only_second { &[Self::Yes] } else { &[Self::No, Self::Yes] }
    }
}

fn width() -> String {
    env::var("TRAPLINE_WIDTH").unwrap_or_default()
}

/// Whether programs are compiled for i386: where `TRAPLINE_WIDTH` is 32, or `32-O2`.
pub fn is_narrow() -> bool {
    width().starts_with("32")
}

/// A program of `testsuite/programs`.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// The sources; the last part of the first one's name says which compiler.
    pub sources: &'static [&'static str],
    /// Whether it is linked with the shared library of `library.cpp`, or gets its path as an argument.
    pub library: Library,
    /// Flags for the compiler.
    pub flags: &'static [&'static str],
    /// Its arguments.
    pub arguments: &'static [&'static str],
    /// What it reads.
    pub input: &'static str,
    /// Words in front of the command in every run; the program is started by these.
    pub started_by: &'static [&'static str],
}

/// What a program does with the library of `library.cpp`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Library {
    /// Nothing.
    None,
    /// It is linked with it.
    Linked,
    /// It gets the library's path as its last argument.
    Argument,
}

impl Program {
    /// The program of these sources, without anything special.
    pub const fn of(sources: &'static [&'static str]) -> Self {
        Self { sources, library: Library::None, flags: &[], arguments: &[], input: "", started_by: &[] }
    }

    /// With a library.
    #[must_use]
    pub const fn library(mut self, library: Library) -> Self {
        self.library = library;
        self
    }

    /// With flags.
    #[must_use]
    pub const fn flags(mut self, flags: &'static [&'static str]) -> Self {
        self.flags = flags;
        self
    }

    /// With arguments.
    #[must_use]
    pub const fn arguments(mut self, arguments: &'static [&'static str]) -> Self {
        self.arguments = arguments;
        self
    }

    /// With something to read.
    #[must_use]
    pub const fn input(mut self, input: &'static str) -> Self {
        self.input = input;
        self
    }

    /// Started by another command.
    #[must_use]
    pub const fn started_by(mut self, words: &'static [&'static str]) -> Self {
        self.started_by = words;
        self
    }

    /// Compiles it into `folder`, and says how it is called: the path and the arguments.
    ///
    /// # Panics
    /// It does not compile.
    pub fn build(&self, optimised: Optimised, folder: &Path) -> Vec<OsString> {
        let first = Path::new(self.sources[0]);
        let extension = first.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let name = first.file_stem().unwrap_or_default();
        let path = folder.join(name);
        let library = folder.join("libchecked.so");
        let narrow: &[&str] = match (is_narrow(), extension) {
            (false, _) => &[],
            (true, "rs") => &["--target", "i686-unknown-linux-gnu"],
            (true, _) => &["-m32", "-msse2", "-mfpmath=sse"],
        };
        if self.library != Library::None {
            compile(
                Command::new("c++")
                    .args([level(optimised), "-shared", "-fPIC"])
                    .args(narrow)
                    .arg("-o")
                    .arg(&library)
                    .arg(source("library.cpp")),
            );
        }
        if extension == "rs" {
            let options: &[&str] = match optimised {
                Optimised::No => &["-Copt-level=0"],
                Optimised::Yes => &["-Copt-level=3"],
            };
            compile(
                Command::new("rustc")
                    .args(["--edition", "2024", "-o"])
                    .arg(&path)
                    .args(options)
                    .args(narrow)
                    .args(self.flags)
                    .arg(source(self.sources[0])),
            );
        } else {
            let mut command = Command::new(if extension == "cpp" { "c++" } else { "cc" });
            command.args([level(optimised), "-g", "-rdynamic", "-pthread", "-Wall", "-Wextra", "-Werror"]);
            command.args(narrow);
            if is_narrow() && self.flags.contains(&"-mfentry") {
                // The compiler has it for no other code.
                command.args(["-no-pie", "-fno-pie"]);
            }
            command.args(["-Wno-infinite-recursion", "-o"]).arg(&path).args(self.flags);
            command.args(self.sources.iter().map(|name| source(name)));
            if self.library == Library::Linked {
                command.arg(&library).arg(format!("-Wl,-rpath,{}", folder.display()));
            }
            compile(command.args(["-lm", "-ldl"]));
        }
        let mut words: Vec<OsString> = self.started_by.iter().map(Into::into).collect();
        words.push(path.into());
        words.extend(self.arguments.iter().map(Into::into));
        if self.library == Library::Argument {
            words.push(library.into());
        }
        words
    }
}

const fn level(optimised: Optimised) -> &'static str {
    match optimised {
        Optimised::No => "-O0",
        Optimised::Yes => "-O2",
    }
}

/// The path of a file of `testsuite/programs`.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name)
}

fn compile(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
