//! Where measurements happen: a folder with the work compiled in each flavour, and commands that end.
//!
//! Owns [`Bench`], [`Flavour`] and [`Times`]. Nothing stays behind: the folder goes when the [`Bench`] does, and a command that takes too long is ended with
//! its children.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{fidelity, target_folder, workspace_root};

/// How long any one command may take.
const PATIENCE_S: u32 = 150;

/// How the work is compiled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flavour {
    /// `-O2` and nothing else.
    Stock,
    /// Each function calls `__fentry__`.
    Fentry,
    /// The same with nops in place of the calls.
    FentryNops,
    /// Nops at each function's beginning.
    Patchable,
    /// `XRay`'s sleds, by clang.
    Sleds,
    /// `__fentry__` is the floor of an entry.
    FloorEntry,
    /// `__fentry__` is the floor of an entry and an exit.
    FloorPair,
    /// The floor of an entry, and then the C library's `__fentry__`.
    KeptFloorEntry,
    /// The same of an entry and an exit.
    KeptFloorPair,
    /// As stock code, for i386.
    Narrow,
    /// The floor of an entry, for i386.
    NarrowFloorEntry,
    /// The same of an entry and an exit.
    NarrowFloorPair,
}

impl Flavour {
    const ALL: [Self; 12] = [
        Self::Stock,
        Self::Fentry,
        Self::FentryNops,
        Self::Patchable,
        Self::Sleds,
        Self::FloorEntry,
        Self::FloorPair,
        Self::KeptFloorEntry,
        Self::KeptFloorPair,
        Self::Narrow,
        Self::NarrowFloorEntry,
        Self::NarrowFloorPair,
    ];

    /// Whether it is 32-bit code.
    pub(super) const fn is_narrow(self) -> bool {
        matches!(self, Self::Narrow | Self::NarrowFloorEntry | Self::NarrowFloorPair)
    }

    /// What the program is without what was added to it: this, less what nobody traces, is what a tracer costs.
    pub(super) const fn untraced(self) -> Self {
        match self {
            Self::FloorEntry | Self::FloorPair => Self::Stock,
            Self::KeptFloorEntry | Self::KeptFloorPair => Self::Fentry,
            Self::NarrowFloorEntry | Self::NarrowFloorPair => Self::Narrow,
            own => own,
        }
    }

    /// The options that a reader would type.
    pub(super) const fn options(self) -> &'static str {
        match self {
            Self::Stock => "-O2",
            Self::Fentry | Self::FloorEntry | Self::FloorPair | Self::KeptFloorEntry | Self::KeptFloorPair => {
                "-O2 -pg -mfentry"
            }
            Self::FentryNops => "-O2 -pg -mfentry -mnop-mcount",
            Self::Patchable => "-O2 -fpatchable-function-entry=5",
            Self::Sleds => "-O2 -fxray-instrument",
            Self::Narrow => "-O2 -m32",
            Self::NarrowFloorEntry | Self::NarrowFloorPair => "-O2 -m32 -pg -mfentry",
        }
    }

    const fn file_name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Fentry => "fentry",
            Self::FentryNops => "fentry-nops",
            Self::Patchable => "patchable",
            Self::Sleds => "sleds",
            Self::FloorEntry => "floor-entry",
            Self::FloorPair => "floor-pair",
            Self::KeptFloorEntry => "kept-floor-entry",
            Self::KeptFloorPair => "kept-floor-pair",
            Self::Narrow => "narrow",
            Self::NarrowFloorEntry => "narrow-floor-entry",
            Self::NarrowFloorPair => "narrow-floor-pair",
        }
    }

    /// Compiler, and what it compiles to one program: sources and options.
    fn recipe(self) -> (&'static str, Vec<(&'static str, Vec<&'static str>)>) {
        // Position-independent code has no nops in place of `__fentry__`, and none of it at 32 bit.
        let own: &[&str] = match self {
            Self::FentryNops | Self::NarrowFloorEntry | Self::NarrowFloorPair => &["-fno-pie"],
            Self::Sleds => &["-fxray-instruction-threshold=1"],
            _ => &[],
        };
        let work = self.options().split(' ').chain(own.iter().copied()).collect();
        let beside = match self {
            Self::Sleds => Some(("xray.c", vec!["-O2"])),
            Self::FloorEntry => Some(("floor.c", vec!["-O2"])),
            Self::FloorPair => Some(("floor.c", vec!["-O2", "-DFLOOR_PAIR"])),
            Self::KeptFloorEntry => Some(("floor.c", vec!["-O2", "-DFLOOR_KEEPS"])),
            Self::KeptFloorPair => Some(("floor.c", vec!["-O2", "-DFLOOR_PAIR", "-DFLOOR_KEEPS"])),
            Self::NarrowFloorEntry => Some(("floor.c", vec!["-O2", "-m32", "-fno-pie"])),
            Self::NarrowFloorPair => Some(("floor.c", vec!["-O2", "-m32", "-fno-pie", "-DFLOOR_PAIR"])),
            _ => None,
        };
        let compiler = if self == Self::Sleds { "clang" } else { "gcc" };
        (compiler, [("work.c", work)].into_iter().chain(beside).collect())
    }
}

/// What the work measured of itself, or we of the command that ran it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Around the calls, of the slowest thread.
    pub(super) wall_ns: f64,
    /// Of the processor, around the calls: says whether others used the machine meanwhile.
    pub(super) cpu_ns: f64,
    /// What the floor recorded.
    pub(super) records: u64,
    /// From the start of the command to its end.
    pub(super) command: Duration,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Bench {
    folder: PathBuf,
    /// The command.
    pub(super) trapline: PathBuf,
    /// Flavours that could not be compiled, and why.
    failed: Vec<(Flavour, String)>,
}

impl Bench {
    /// Builds trapline, and the work in each flavour.
    pub(super) fn set_up() -> Result<Self> {
        let trapline = fidelity::build_trapline(fidelity::Build::Release)?;
        let folder = target_folder().join(format!("bench-peers-{}", std::process::id()));
        // For what tools leave in the folder of temporary files.
        fs::create_dir_all(folder.join("tmp")).with_context(|| format!("creating {}", folder.display()))?;
        let mut bench = Self { folder, trapline, failed: Vec::new() };
        for flavour in Flavour::ALL {
            if let Err(error) = bench.compile(flavour) {
                bench.failed.push((flavour, format!("{error:#}")));
            }
        }
        if let Some((_, error)) = bench.failed.iter().find(|(flavour, _)| *flavour == Flavour::Stock) {
            bail!("the work does not compile: {error}");
        }
        Ok(bench)
    }

    fn compile(&self, flavour: Flavour) -> Result<()> {
        let sources = workspace_root().join("benches/peers");
        let (compiler, units) = flavour.recipe();
        let object = |name: &str| self.folder.join(format!("{}-{name}.o", flavour.file_name()));
        let mut link = Command::new(compiler);
        // Not with `-pg`: that would have the C library profile the program.
        if matches!(flavour, Flavour::FentryNops | Flavour::NarrowFloorEntry | Flavour::NarrowFloorPair) {
            link.arg("-no-pie");
        }
        if flavour.is_narrow() {
            link.arg("-m32");
        }
        if flavour == Flavour::Sleds {
            link.arg("-fxray-instrument");
        }
        for (source, options) in units {
            let object = object(source);
            let mut compile = Command::new(compiler);
            compile.args(options).arg("-c").arg(sources.join(source)).arg("-o").arg(&object);
            output(compile, compiler)?;
            link.arg(object);
        }
        link.arg("-o").arg(self.program(flavour));
        output(link, compiler).map(drop)
    }

    /// Where the work is, compiled in this flavour.
    pub(super) fn program(&self, flavour: Flavour) -> PathBuf {
        self.folder.join(flavour.file_name())
    }

    /// Why there is no such program, if there is none.
    pub(super) fn lacks(&self, flavour: Flavour) -> Option<&str> {
        self.failed.iter().find(|(failed, _)| *failed == flavour).map(|(_, why)| why.as_str())
    }

    /// Where tracers put their data.
    pub(super) fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Another file of ours.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Removes what a tracer wrote.
    pub(super) fn clear(&self) -> Result<()> {
        let data = self.data();
        if data.exists() {
            fs::remove_dir_all(&data).with_context(|| format!("removing {}", data.display()))?;
        }
        fs::create_dir_all(&data).with_context(|| format!("creating {}", data.display()))
    }

    /// Bytes of what a tracer wrote.
    pub(super) fn data_bytes(&self) -> u64 {
        folder_bytes(&self.data())
    }

    /// The words that run the work.
    pub(super) fn work(&self, flavour: Flavour, calls: u64, threads: u64) -> Vec<OsString> {
        vec![
            self.program(flavour).into(),
            calls.to_string().into(),
            threads.to_string().into(),
            self.file("times").into(),
        ]
    }

    /// Runs a command to its end, in the folder of the data. Returns what it printed, and how long it took.
    pub(super) fn run(&self, words: &[OsString], variables: &[(&str, String)]) -> Result<(String, Duration)> {
        let mut command = Command::new("timeout");
        command.arg("--kill-after=5").arg(PATIENCE_S.to_string()).args(words).current_dir(self.data());
        command.env("TMPDIR", self.file("tmp")).envs(variables.iter().map(|(name, value)| (name, value)));
        let begin = Instant::now();
        let name = words.first().map_or_else(String::new, |word| word.to_string_lossy().into_owned());
        let name = Path::new(&name).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let printed = output(command, &name)?;
        Ok((printed, begin.elapsed()))
    }

    /// Runs a command that runs the work, and returns what it printed and what the work measured.
    pub(super) fn measure(&self, words: &[OsString], variables: &[(&str, String)]) -> Result<(String, Times)> {
        let file = self.file("times");
        let _ = fs::remove_file(&file);
        let (printed, command) = self.run(words, variables)?;
        let text = fs::read_to_string(&file).context("the work left no times")?;
        let times: Value = serde_json::from_str(&text).context("reading the work's times")?;
        let number = |name: &str| times[name].as_f64().with_context(|| format!("the work's times lack `{name}`"));
        let records = times["records"].as_u64().unwrap_or(0);
        Ok((printed, Times { wall_ns: number("wall_ns")?, cpu_ns: number("cpu_ns")?, records, command }))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("bench-peers: warning: {} stays behind: {error}", self.folder.display());
        }
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// What a command printed to its standard output; standard error tells why it failed.
pub(super) fn output(mut command: Command, name: &str) -> Result<String> {
    /// Of an error's text, what fits a table.
    const ENOUGH: usize = 200;
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {name}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    let last = without_own_folders(last);
    let last: String = last.chars().take(ENOUGH).collect();
    ensure!(output.status.success(), "{name} ended with {}: {last}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where our folders are is of no use to who reads the document.
fn without_own_folders(text: &str) -> String {
    let target = target_folder().display().to_string();
    text.replace(&target, "target").replace(&workspace_root().display().to_string(), ".")
}
