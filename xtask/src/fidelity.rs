//! `cargo xtask fidelity`: every call of every traced function of real programs is in the trace, no more and no fewer.
//!
//! Callgrind interprets a program and counts how often each instruction was executed. A function was called as often as its first instruction was
//! executed, which is known exactly, for stripped programs too; the trace has to say the same of each traced function. Both runs do the same:
//! [`Surroundings`] says what that takes. [`callgrind`] reads callgrind's file, [`compare`] is the pure verdict, [`PROGRAMS`] says what runs.
//!
//! A loop to a function's own head passes the site, and so it is a call in the trace. If it goes to the first instruction, callgrind counts it as well; if
//! it goes behind the `endbr`, it does not, and the trace has to have as many calls as there were executions of the instruction there. Either is
//! counted apart and printed.
//!
//! Negative control: in a second run a function is left out, and the comparison has to find exactly that one beside what it has found before.

mod callgrind;
mod compare;
mod debugger;
mod input;
mod surroundings;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{packages, target_folder, workspace_root};
use trapline_testsuite::debian::{self, Root};

use callgrind::Counts;
use compare::{Calls, Verdict};
use surroundings::Surroundings;

/// A program that does the same in every run.
#[derive(Debug)]
struct Program {
    name: &'static str,
    command: &'static [&'static str],
    /// Libraries that hold the program's work: compared as well. File names up to the version.
    libraries: &'static [&'static str],
    /// What it does depends on addresses in its heap. This command prints where that begins.
    heap: Option<&'static [&'static str]>,
}

const PROGRAMS: &[Program] = &[
    Program::new("xz", &["/usr/bin/xz", "-T1", "-2", "-c", "numbers.txt"]).with(&["liblzma.so"]),
    Program::new("gzip", &["/usr/bin/gzip", "-6", "-c", "numbers.txt"]),
    Program::new("bzip2", &["/usr/bin/bzip2", "-c", "numbers.txt"]).with(&["libbz2.so"]),
    Program::new("sqlite3", &["/usr/bin/sqlite3", ":memory:", ".read inserts.sql"]).with(&["libsqlite3.so"]),
    Program {
        heap: Some(&["/usr/bin/python3", "-S", "-c", PYTHON_HEAP]),
        ..Program::new("python3", &["/usr/bin/python3", "-S", "work.py"])
    },
    Program::new("perl", &["/usr/bin/perl", "work.pl"]),
    Program::new("gawk", &["/usr/bin/gawk", "-f", "work.awk", "numbers.txt"]),
];

/// Valgrind has its memory executable, and nothing else of a program's.
const PYTHON_HEAP: &str =
    "print(int(next(m for m in open('/proc/self/maps') if '[heap]' in m or ' rwxp ' in m).split('-')[0], 16))";

impl Program {
    const fn new(name: &'static str, command: &'static [&'static str]) -> Self {
        Self { name, command, libraries: &[], heap: None }
    }

    const fn with(self, libraries: &'static [&'static str]) -> Self {
        Self { libraries, ..self }
    }
}

const NEEDS: &[packages::Need] = &[
    ("/usr/bin/valgrind", "valgrind"),
    ("/usr/bin/gdb", "gdb"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/bzip2", "bzip2"),
    ("/usr/bin/sqlite3", "sqlite3"),
    ("/usr/bin/python3", "python3"),
    ("/usr/bin/gawk", "gawk"),
];

/// A program as it is run.
#[derive(Debug)]
struct Ready {
    name: &'static str,
    command: Vec<String>,
    libraries: &'static [&'static str],
    heap: Option<Vec<String>>,
}

impl Ready {
    /// The system's own, or if there are others, the one of those.
    fn new(program: &Program, others: Option<&Root>) -> Result<Self> {
        let words = |command: &[&str]| -> Result<Vec<String>> {
            let mut words: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
            if let Some(root) = others {
                let name = Path::new(command[0]).file_name().unwrap_or_default().to_string_lossy().into_owned();
                // Of Python's packages, this one has no name without a version.
                let path = root.program(&name).or_else(|| root.program("python3.11").filter(|_| name == "python3"));
                let path = path.with_context(|| format!("no package of i386 has {name}"))?;
                words[0] = path.to_string_lossy().into_owned();
            }
            Ok(words)
        };
        Ok(Self {
            name: program.name,
            command: words(program.command)?,
            libraries: program.libraries,
            heap: program.heap.map(words).transpose()?,
        })
    }
}

/// Runs the named programs, or all. `is_narrow`: those of Debian's i386 packages.
pub(crate) fn run(names: &[String], is_narrow: bool) -> Result<ExitCode> {
    if let Some(unknown) = names.iter().find(|name| PROGRAMS.iter().all(|program| program.name != name.as_str())) {
        let known: Vec<&str> = PROGRAMS.iter().map(|program| program.name).collect();
        bail!("unknown program `{unknown}`; there are {}", known.join(", "));
    }
    packages::ensure(NEEDS)?;
    let trapline = build_trapline(Build::Test)?;
    let folder = Folder::create()?;
    input::write(&folder.inputs())?;
    let root = is_narrow.then(|| debian::i386(&target_folder().join("tmp")));
    let more = root.as_ref().map(Root::environment).unwrap_or_default();
    let plain = Surroundings::new(&folder.inputs(), is_narrow, more)?;
    let mut failures = 0_usize;
    let mut compared = 0_usize;
    println!(
        "{:<10} {:>10} {:>10} {:>10} {:>12} {:>14}",
        "program", "functions", "equal", "different", "called", "calls"
    );
    for program in PROGRAMS.iter().filter(|program| names.is_empty() || names.iter().any(|name| name == program.name)) {
        let program = &Ready::new(program, root.as_ref())?;
        let around = match &program.heap {
            Some(command) => &plain.clone().with_heap_of(command)?,
            None => &plain,
        };
        let exact = exact_counts(program, &folder, around)?;
        let trace = record(&trapline, program, &folder, around, &[])?;
        let verdict = compare::compare(&trace.traced, &exact.executed, &trace.calls);
        print_verdict(program.name, &verdict, &trace, &exact);
        failures += verdict.different.len() - counted_again(program, &folder, around, &verdict)?;
        compared += verdict.compared;
        ensure!(verdict.compared > 0, "no function of {} is traced, so nothing was compared", program.name);
        let left_out = to_leave_out(&trace, &verdict, &exact.executed)
            .with_context(|| format!("{} calls no function that could be left out", program.name))?;
        let partial = record(&trapline, program, &folder, around, &["-N", &trace.names[left_out]])?;
        let control = compare::compare(&trace.traced, &exact.executed, &partial.calls);
        if !verdict.is_found_by(&control, left_out) {
            println!("  the comparison is blind: {left_out:?} was left out, and it found {:?}", control.different);
            failures += 1;
        }
    }
    if failures > 0 {
        eprintln!("fidelity: {failures} differences");
        return Ok(ExitCode::FAILURE);
    }
    println!("every one of {compared} traced functions was called as often as the trace says");
    Ok(ExitCode::SUCCESS)
}

/// How many of the functions that differ were called on the processor as often as the trace says: then callgrind's run was another one.
fn counted_again(program: &Ready, folder: &Folder, around: &Surroundings, verdict: &Verdict) -> Result<usize> {
    /// Each takes a run of the program that stops at every call.
    const MOST: usize = 10;
    let main = module(program, &program.command[0]);
    let mut agreed = 0;
    for (place, difference) in verdict.different.iter().take(MOST).filter(|(place, _)| Some(&place.0) == main.as_ref())
    {
        let Some(count) = debugger::executions(program, folder, around, place.1)? else { continue };
        let is_so = count == difference.1;
        let verdict = if is_so { "as the trace says: callgrind's run was another one" } else { "too" };
        println!("  {}+{:#x}: executed {count} times on the processor, {verdict}", place.0, place.1);
        agreed += usize::from(is_so);
    }
    Ok(agreed)
}

fn print_verdict(name: &str, verdict: &Verdict, trace: &Trace, exact: &Counts) {
    println!(
        "{name:<10} {:>10} {:>10} {:>10} {:>12} {:>14}",
        verdict.compared,
        verdict.compared - verdict.different.len(),
        verdict.different.len(),
        verdict.called,
        verdict.calls
    );
    for (place, difference) in &verdict.different {
        let text = trace.names.get(place).map_or("?", String::as_str);
        println!("  {}+{:#x} {text}: executed {} times, in the trace {}", place.0, place.1, difference.0, difference.1);
    }
    if !verdict.looped.is_empty() {
        println!("  {} of them also loop to behind their endbr, {} times in all", verdict.looped.len(), verdict.loops);
    }
    let loops = |place: &(String, u64)| exact.jumps(place, &(place.1..place.1 + trace.sizes[place]));
    let loops = trace.traced.iter().map(loops).filter(|count| *count > 0);
    let (looping, times) = loops.fold((0_u64, 0_u64), |(looping, times), count| (looping + 1, times + count));
    if looping > 0 {
        println!("  {looping} of them loop to their first instruction, {times} times in all");
    }
    for (cause, count) in &trace.lost {
        println!("  lost by {cause}: {count}");
    }
}

/// A function for the negative control: called, but not hot, since a difference must not be lost in the crowd; and with a name of its own.
fn to_leave_out<'a>(trace: &'a Trace, verdict: &Verdict, executed: &Calls) -> Option<&'a (String, u64)> {
    let count = |place| executed.get(place).copied().unwrap_or_default();
    let is_alone = |place: &(String, u64)| {
        let name = &trace.names[place];
        trace.names.values().filter(|other| *other == name).count() == 1 && !name.contains(['*', '?', '['])
    };
    let candidates = trace.traced.iter().filter(|&place| count(place) > 0 && !verdict.different.contains_key(place));
    candidates.filter(|&place| is_alone(place)).min_by_key(|&place| count(place))
}

/// What `report` and `functions` say of a trace.
#[derive(Debug, Default)]
struct Trace {
    calls: Calls,
    traced: BTreeSet<(String, u64)>,
    names: BTreeMap<(String, u64), String>,
    /// In bytes.
    sizes: BTreeMap<(String, u64), u64>,
    lost: BTreeMap<String, u64>,
}

fn exact_counts(program: &Ready, folder: &Folder, around: &Surroundings) -> Result<Counts> {
    let file = folder.path.join("callgrind.out");
    around.interpret(&program.command, &file)?;
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    callgrind::counts(&text, |object| module(program, object))
}

/// The name under which a file's functions are compared, if they are.
fn module(program: &Ready, path: &str) -> Option<String> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let main = fs::canonicalize(&program.command[0]).ok();
    let name = path.file_name()?.to_str()?;
    let is_compared = main.is_some_and(|main| main.file_name() == path.file_name())
        || program.libraries.iter().any(|library| name.starts_with(library));
    is_compared.then(|| name.to_owned())
}

fn record(trapline: &Path, program: &Ready, folder: &Folder, around: &Surroundings, options: &[&str]) -> Result<Trace> {
    let file = folder.path.join("trace");
    let mut words: Vec<OsString> =
        vec![trapline.into(), "record".into(), "--quiet".into(), "-o".into(), file.clone().into()];
    words.extend(
        program.libraries.iter().flat_map(|library| ["--lib".to_owned(), format!("{library}*")]).map(Into::into),
    );
    words.extend(options.iter().map(OsString::from));
    words.push("--".into());
    around.execute(&words, &program.command)?;
    let report = ask(trapline, "report", &file)?;
    let mut trace = Trace::default();
    for function in list(&report)? {
        if let Some(place) = place(program, function)? {
            *trace.calls.entry(place).or_default() +=
                function["calls"].as_u64().context("a function without `calls`")?;
        }
    }
    let lost = report["lost"].as_object().context("the report has no `lost`")?;
    trace.lost = lost.iter().filter_map(|(cause, count)| Some((cause.clone(), count.as_u64()?))).collect();
    trace.lost.retain(|cause, count| *count > 0 && !cause.ends_with("_ns"));
    for function in list(&ask(trapline, "functions", &file)?)? {
        let Some(place) = place(program, function)? else { continue };
        if function["traced"].as_bool() == Some(true) {
            trace.traced.insert(place.clone());
        }
        trace.sizes.insert(place.clone(), function["size"].as_u64().context("a function without `size`")?);
        trace.names.insert(place, function["name"].as_str().unwrap_or_default().to_owned());
    }
    Ok(trace)
}

/// Runs a command to its good end, and gives its output.
fn finish(mut command: Command, what: &str) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("starting {what}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} ended with {}: {}", output.status, errors.trim());
    Ok(output.stdout)
}

fn ask(trapline: &Path, verb: &str, file: &Path) -> Result<Value> {
    let mut command = Command::new(trapline);
    command.arg(verb).arg("-i").arg(file).arg("--json").stdin(Stdio::null());
    let answer = finish(command, &format!("`trapline {verb}`"))?;
    serde_json::from_slice(&answer).with_context(|| format!("reading what `trapline {verb} --json` printed"))
}

fn list(answer: &Value) -> Result<&Vec<Value>> {
    answer["functions"].as_array().context("the answer has no list `functions`")
}

/// Functions in sections of their own (`.init`, `.fini`). Callgrind assigns to a file what lies in its `.text`, and counts nothing of these.
const OUTSIDE_OF_TEXT: [&str; 2] = ["_init", "_fini"];

fn place(program: &Ready, function: &Value) -> Result<Option<(String, u64)>> {
    if OUTSIDE_OF_TEXT.iter().any(|name| function["name"] == *name) {
        return Ok(None);
    }
    let path = function["module"].as_str().context("a function without `module`")?;
    let Some(module) = module(program, path) else { return Ok(None) };
    let address = match &function["address"] {
        Value::String(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16).ok(),
        number => number.as_u64(),
    };
    Ok(Some((module, address.with_context(|| format!("a function without `address`: {function}"))?)))
}

/// How the command is built that is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Build {
    /// As for its tests, which is enough for what it says.
    Test,
    /// As for people, which is what its speed is measured of.
    Release,
}

/// Builds the command, and says where it is.
pub(crate) fn build_trapline(build: Build) -> Result<PathBuf> {
    let (option, folder) = match build {
        Build::Test => (None, "debug"),
        Build::Release => (Some("--release"), "release"),
    };
    let status = Command::new("cargo")
        .args(["build", "--quiet", "-p", "trapline-cli"])
        .args(option)
        .current_dir(workspace_root())
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "trapline does not build");
    Ok(target_folder().join(folder).join("trapline"))
}

/// A folder with the programs' inputs, and beside those, our own files: programs list the folder that they run in.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("trapline-fidelity-{}", std::process::id()));
        fs::create_dir_all(path.join("inputs")).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self { path })
    }

    fn inputs(&self) -> PathBuf {
        self.path.join("inputs")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("fidelity: warning: {} stays behind: {error}", self.path.display());
        }
    }
}
