//! `cargo xtask fidelity`: every call of every traced function of real programs is in the trace, no more and no fewer.
//!
//! Callgrind interprets a program and counts how often each instruction was executed. A function was called as often as its first instruction was
//! executed, which is known exactly, for stripped programs too; the trace has to say the same of each traced function. The programs are such that two
//! runs do the same: fixed environment, no randomised hashes, folders of their own. [`callgrind`] reads callgrind's file, [`compare`] is the pure
//! verdict, [`PROGRAMS`] says what runs.
//!
//! A function may be jumped to behind its `endbr`, by a loop of its own to its head. That is no execution of its first instruction, and yet one that
//! passes the site; it is counted apart and printed.
//!
//! Negative control: in a second run a function is left out, and the comparison has to find exactly that one.

mod callgrind;
mod compare;
mod input;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{packages, workspace_root};
use compare::{Calls, Verdict};

/// A program that does the same in every run.
#[derive(Debug)]
struct Program {
    name: &'static str,
    command: &'static [&'static str],
    /// Libraries that hold the program's work: compared as well. File names up to the version.
    libraries: &'static [&'static str],
}

const PROGRAMS: &[Program] = &[
    Program { name: "xz", command: &["/usr/bin/xz", "-T1", "-2", "-c", "numbers.txt"], libraries: &["liblzma.so"] },
    Program { name: "gzip", command: &["/usr/bin/gzip", "-6", "-c", "numbers.txt"], libraries: &[] },
    Program { name: "bzip2", command: &["/usr/bin/bzip2", "-c", "numbers.txt"], libraries: &["libbz2.so"] },
    Program {
        name: "sqlite3",
        command: &["/usr/bin/sqlite3", ":memory:", ".read inserts.sql"],
        libraries: &["libsqlite3.so"],
    },
    Program { name: "python3", command: &["/usr/bin/python3", "-S", "work.py"], libraries: &[] },
    Program { name: "perl", command: &["/usr/bin/perl", "work.pl"], libraries: &[] },
    Program { name: "gawk", command: &["/usr/bin/gawk", "-f", "work.awk", "numbers.txt"], libraries: &[] },
];

const NEEDS: &[packages::Need] = &[
    ("/usr/bin/valgrind", "valgrind"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/bzip2", "bzip2"),
    ("/usr/bin/sqlite3", "sqlite3"),
    ("/usr/bin/python3", "python3"),
    ("/usr/bin/gawk", "gawk"),
];

/// Runs the named programs, or all.
pub(crate) fn run(names: &[String]) -> Result<ExitCode> {
    if let Some(unknown) = names.iter().find(|name| PROGRAMS.iter().all(|program| program.name != name.as_str())) {
        let known: Vec<&str> = PROGRAMS.iter().map(|program| program.name).collect();
        bail!("unknown program `{unknown}`; there are {}", known.join(", "));
    }
    packages::ensure(NEEDS)?;
    let trapline = build_trapline()?;
    let folder = Folder::create()?;
    input::write(&folder.inputs())?;
    let mut failures = 0_usize;
    let mut compared = 0_usize;
    println!(
        "{:<10} {:>10} {:>10} {:>10} {:>12} {:>14}",
        "program", "functions", "equal", "different", "called", "calls"
    );
    for program in PROGRAMS.iter().filter(|program| names.is_empty() || names.iter().any(|name| name == program.name)) {
        let exact = exact_counts(program, &folder)?;
        let trace = record(&trapline, program, &folder, &[])?;
        let verdict = compare::compare(&trace.traced, &exact, &trace.calls);
        print_verdict(program.name, &verdict, &trace);
        failures += verdict.different.len();
        compared += verdict.compared;
        ensure!(verdict.compared > 0, "no function of {} is traced, so nothing was compared", program.name);
        failures += usize::from(!control(&trapline, program, &folder, &exact, &trace)?);
    }
    if failures > 0 {
        eprintln!("fidelity: {failures} differences");
        return Ok(ExitCode::FAILURE);
    }
    println!("every one of {compared} traced functions was called as often as the trace says");
    Ok(ExitCode::SUCCESS)
}

fn print_verdict(name: &str, verdict: &Verdict, trace: &Trace) {
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
    for (cause, count) in &trace.lost {
        println!("  lost by {cause}: {count}");
    }
}

/// Leaves one function out, and says whether the comparison finds that, and nothing else.
fn control(trapline: &Path, program: &Program, folder: &Folder, exact: &Calls, whole: &Trace) -> Result<bool> {
    // One that is called, but not the hottest: whatever is done to it must not be lost in the crowd.
    let called = whole.traced.iter().filter(|&place| exact.get(place).is_some_and(|&count| count > 0));
    let alone = |place: &&(String, u64)| {
        let name = &whole.names[*place];
        whole.names.values().filter(|other| *other == name).count() == 1 && !name.contains(['*', '?', '['])
    };
    let Some(place) = called.filter(alone).min_by_key(|&place| exact[place]) else {
        bail!("{} calls no function that could be left out", program.name);
    };
    let trace = record(trapline, program, folder, &["-N", &whole.names[place]])?;
    let verdict = compare::compare(&whole.traced, exact, &trace.calls);
    let found: Vec<&(String, u64)> = verdict.different.keys().collect();
    let is_found = found == [place];
    if !is_found {
        println!("  the comparison is blind: {place:?} was left out, and it found {found:?}");
    }
    Ok(is_found)
}

/// What `report` and `functions` say of a trace.
#[derive(Debug)]
struct Trace {
    calls: Calls,
    traced: BTreeSet<(String, u64)>,
    names: BTreeMap<(String, u64), String>,
    lost: BTreeMap<String, u64>,
}

const CALLGRIND: [&str; 6] = [
    "/usr/bin/valgrind",
    "--quiet",
    "--tool=callgrind",
    "--dump-instr=yes",
    "--compress-strings=no",
    "--compress-pos=no",
];

/// What programs have in their environment under callgrind: valgrind adds variables, and a script that reads its environment makes more calls then.
fn environment(folder: &Folder) -> Result<Vec<(String, String)>> {
    let mut command = Command::new(CALLGRIND[0]);
    command.args(&CALLGRIND[1..]).args(["--callgrind-out-file=/dev/null", "/usr/bin/env", "-0"]);
    command.env_clear().envs(given()).current_dir(folder.inputs()).stdin(Stdio::null());
    let printed = finish(command, "`env` under callgrind")?;
    let printed = String::from_utf8(printed).context("the environment under callgrind is not UTF-8")?;
    let variables = printed.split_terminator('\0').filter_map(|variable| variable.split_once('='));
    Ok(variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

/// With randomised hashes, two runs differ. No PATH: the programs start no other.
const ENVIRONMENT: &[(&str, &str)] = &[
    ("HOME", "/nonexistent"),
    ("LANG", "C"),
    ("PYTHONHASHSEED", "0"),
    ("PERL_HASH_SEED", "0"),
    ("PYTHONDONTWRITEBYTECODE", "1"),
];

fn given() -> Vec<(String, String)> {
    ENVIRONMENT.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The command of a program in its fixed surroundings, behind other words.
fn command(program: &Program, before: &[OsString], folder: &Folder, environment: &[(String, String)]) -> Command {
    let mut words = before.iter().cloned().chain(program.command.iter().map(OsString::from));
    let mut command = Command::new(words.next().expect("a command"));
    command.args(words).env_clear().current_dir(folder.inputs());
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn finish(mut command: Command, what: &str) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("starting {what}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} ended with {}: {}", output.status, errors.trim());
    Ok(output.stdout)
}

fn exact_counts(program: &Program, folder: &Folder) -> Result<Calls> {
    let file = folder.path.join("callgrind.out");
    let mut out: OsString = "--callgrind-out-file=".into();
    out.push(&file);
    let mut words: Vec<OsString> = CALLGRIND.iter().map(OsString::from).collect();
    words.push(out);
    finish(command(program, &words, folder, &given()), &format!("{} under callgrind", program.name))?;
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    callgrind::counts(&text, |object| module(program, object))
}

/// The name under which a file's functions are compared, if they are.
fn module(program: &Program, path: &str) -> Option<String> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let main = fs::canonicalize(program.command[0]).ok();
    let name = path.file_name()?.to_str()?;
    let is_compared = main.is_some_and(|main| main.file_name() == path.file_name())
        || program.libraries.iter().any(|library| name.starts_with(library));
    is_compared.then(|| name.to_owned())
}

fn record(trapline: &Path, program: &Program, folder: &Folder, options: &[&str]) -> Result<Trace> {
    let file = folder.path.join("trace");
    let mut words: Vec<OsString> =
        vec![trapline.into(), "record".into(), "--quiet".into(), "-o".into(), file.clone().into()];
    words.extend(
        program.libraries.iter().flat_map(|library| ["--lib".to_owned(), format!("{library}*")]).map(Into::into),
    );
    words.extend(options.iter().map(OsString::from));
    words.push("--".into());
    finish(command(program, &words, folder, &folder.environment), &format!("{} under trapline", program.name))?;
    let report = ask(trapline, "report", &file)?;
    let mut trace =
        Trace { calls: Calls::new(), traced: BTreeSet::new(), names: BTreeMap::new(), lost: BTreeMap::new() };
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
        trace.names.insert(place, function["name"].as_str().unwrap_or_default().to_owned());
    }
    Ok(trace)
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

fn place(program: &Program, function: &Value) -> Result<Option<(String, u64)>> {
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

/// Builds the command, and says where it is.
pub(crate) fn build_trapline() -> Result<PathBuf> {
    let status = Command::new("cargo")
        .args(["build", "--release", "--quiet", "-p", "trapline-cli"])
        .current_dir(workspace_root())
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "trapline does not build");
    Ok(target_folder().join("release/trapline"))
}

/// Where cargo puts what it builds.
pub(crate) fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from)
}

/// A folder with the programs' inputs, and beside those, our own files: programs list the folder that they run in.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// What callgrind makes of [`ENVIRONMENT`]: for the other runs.
    environment: Vec<(String, String)>,
}

impl Folder {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("trapline-fidelity-{}", std::process::id()));
        fs::create_dir_all(path.join("inputs")).with_context(|| format!("creating {}", path.display()))?;
        let mut folder = Self { path, environment: Vec::new() };
        folder.environment = environment(&folder)?;
        Ok(folder)
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
