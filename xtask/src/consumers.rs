//! `cargo xtask consumers`: other tools read our exports, and find the calls and times that `trapline report` tells.
//!
//! A real program with several threads is recorded once; each format is written, and whoever people open it with reads it. [`install`] makes the tools ready, [`readers`] is the list of
//! them and how each is asked, [`table`] is the pure comparison. Negative control: [`reduced`] writes the same trace without one call, and each reader of its export
//! has to differ from the report in that function.
//!
//! [`pages`] and [`screenshots`] are other verbs with the same means: they drive the page of `trapline html` in a browser, and take the manual's pictures.
//!
//! Invariant: every reader is in the printed table, with its verdict or with the reason why it has none; only a table of equal verdicts is a success.

mod install;
pub(crate) mod pages;
mod readers;
mod reduced;
pub(crate) mod screenshots;
mod table;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{fidelity, packages};
use install::Tools;
use readers::{READERS, Reader};
use table::Table;

/// Of the program's input.
const INPUT_BYTES: u32 = 24_000;

/// What a reader found, or why it did not.
struct Row {
    reader: &'static Reader,
    verdict: Result<Verdict>,
}

struct Verdict {
    calls: u64,
    time_ns: f64,
    /// Functions that differ from the report, each with what differs.
    different: Vec<String>,
    /// The function whose call was left out is found to differ.
    is_control_found: bool,
}

/// Records, exports, asks all readers or the named ones, and prints what they found.
pub(crate) fn run(names: &[String]) -> Result<ExitCode> {
    if let Some(unknown) = names.iter().find(|name| READERS.iter().all(|reader| reader.tool != name.as_str())) {
        let mut known: Vec<&str> = READERS.iter().map(|reader| reader.tool).collect();
        known.dedup();
        bail!("unknown reader `{unknown}`; there are {}", known.join(", "));
    }
    packages::ensure(&[("/usr/bin/xz", "xz-utils")])?;
    let trapline = fidelity::build_trapline(fidelity::Build::Test)?;
    let folder = Folder::create()?;
    let whole = record(&trapline, &folder.0)?;
    let reduced = folder.0.join("reduced.data");
    let left_out = reduced::without_one_call(&whole, &reduced)?;
    let mut expected = report(&trapline, &whole)?;
    add_callees(&mut expected, &whole)?;
    let without = report(&trapline, &reduced)?;
    ensure!(
        expected.calls() == without.calls() + 1,
        "the trace without a call has {} calls, not one less than {}",
        without.calls(),
        expected.calls()
    );
    eprintln!("consumers: {} calls of {} functions", expected.calls(), expected.len());
    let wanted = READERS.iter().filter(|reader| names.is_empty() || names.iter().any(|name| name == reader.tool));
    let rows: Vec<Row> = wanted
        .map(|reader| {
            eprintln!("consumers: {} reads {}", reader.tool, reader.format);
            Row { reader, verdict: judge(&trapline, reader, &folder.0, [&whole, &reduced], &expected, &left_out) }
        })
        .collect();
    print!("{}", expected.longest(12));
    Ok(if print(&rows, &left_out) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Has a reader read both traces.
fn judge(
    trapline: &Path,
    reader: &'static Reader,
    folder: &Path,
    [whole, reduced]: [&Path; 2],
    expected: &Table,
    left_out: &str,
) -> Result<Verdict> {
    let tools = Tools::for_tool(reader.tool)?;
    let read = |trace: &Path| -> Result<Table> {
        let name = trace.file_stem().unwrap_or_default().to_string_lossy();
        let number = READERS.iter().position(|other| std::ptr::eq(other, reader)).unwrap_or_default();
        let output = folder.join(format!("{name}-{number}-{}", reader.format.replace(' ', "-")));
        match reader.format {
            readers::TRACE => return (reader.read)(&tools, trace),
            readers::DATA_SET => write_data_set(trapline, trace, whole, &output)?,
            format => export(trapline, trace, &["--format", format], &output)?,
        }
        (reader.read)(&tools, &output)
    };
    let found = read(whole)?;
    let control = read(reduced)?;
    let different = expected.differences(&found, reader.leaves_out_instants);
    let is_control_found = expected
        .differences(&control, reader.leaves_out_instants)
        .iter()
        .any(|difference| difference.starts_with(&format!("{left_out}: ")));
    Ok(Verdict { calls: found.calls(), time_ns: found.time_ns(), different, is_control_found })
}

fn export(trapline: &Path, trace: &Path, options: &[&str], output: &Path) -> Result<()> {
    let mut command = Command::new(trapline);
    command.args(["export", "--quiet"]).args(options).arg("-i").arg(trace).arg("-o").arg(output);
    install::output(&command, "trapline export").map(drop)
}

/// Writes the tables of two machines and two days into `calls` there. The trace is the first machine's, of the day that the document's queries ask for; the others are there to be told apart.
fn write_data_set(trapline: &Path, trace: &Path, other: &Path, folder: &Path) -> Result<()> {
    const DAY_NS: u64 = 24 * 3600 * 1_000_000_000;
    const ASKED_FOR: u64 = 20_786 * DAY_NS;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let origins = [
        (trace, "web-1", ASKED_FOR),
        (other, "web-2", ASKED_FOR + DAY_NS - 1),
        (other, "web-1", ASKED_FOR - 1),
        (other, "web-2", ASKED_FOR + DAY_NS),
    ];
    for (trace, host, started_unix_ns) in origins {
        let copy = folder.join("trapline.data");
        reduced::as_of(trace, &copy, host, started_unix_ns)?;
        export(trapline, &copy, &["--format", "parquet", "--partition"], &folder.join("calls"))?;
    }
    Ok(())
}

/// Prints the rows, and says whether all is well.
fn print(rows: &[Row], left_out: &str) -> bool {
    println!("\n{:<18} {:<12} {:>10} {:>14}  verdict", "reader", "format", "calls", "time, ms");
    let mut is_good = true;
    for Row { reader, verdict } in rows {
        let (tool, format) = (reader.tool, reader.format);
        match verdict {
            Err(error) => {
                is_good = false;
                println!("{tool:<18} {format:<12} {:>10} {:>14}  not read: {error:#}", "-", "-");
            }
            Ok(verdict) => {
                let is_equal = verdict.different.is_empty() && verdict.is_control_found;
                is_good &= is_equal;
                let calls = if reader.has_calls { verdict.calls.to_string() } else { "-".to_owned() };
                let word = match (verdict.different.len(), verdict.is_control_found) {
                    (0, true) => format!("equal to the report; without one call of {left_out}, it differs there"),
                    (0, false) => format!("BLIND: one call of {left_out} was left out, and it found the same"),
                    (count, _) => format!("DIFFERENT in {count} functions"),
                };
                println!("{tool:<18} {format:<12} {calls:>10} {:>14.6}  {word}", verdict.time_ns / 1e6);
                for difference in verdict.different.iter().take(5) {
                    println!("    {difference}");
                }
            }
        }
    }
    is_good
}

/// Records a program with several threads, and its library.
fn record(trapline: &Path, folder: &Path) -> Result<PathBuf> {
    let input = folder.join("input");
    // A sequence that is neither all alike nor without any pattern (a linear congruence, its upper bits).
    let numbers = std::iter::successors(Some(1_u32), |number| Some(number.wrapping_mul(1_664_525).wrapping_add(1)));
    let bytes: Vec<u8> =
        numbers.map(|number| b"abcdefgh"[(number >> 29) as usize]).take(INPUT_BYTES as usize).collect();
    fs::write(&input, bytes).with_context(|| format!("writing {}", input.display()))?;
    let trace = folder.join("whole.data");
    let mut command = Command::new(trapline);
    command.args(["record", "--quiet", "--lib", "liblzma.so*", "-o"]).arg(&trace);
    command.args(["--", "/usr/bin/xz", "-T2", "--block-size=8KiB", "-0", "-k", "-c"]).arg(&input);
    install::output(&command, "trapline record")?;
    Ok(trace)
}

fn report(trapline: &Path, trace: &Path) -> Result<Table> {
    let mut command = Command::new(trapline);
    command.args(["report", "--json", "-i"]).arg(trace);
    Table::of_report(&install::output(&command, "trapline report")?)
}

/// Adds how many calls each function made.
fn add_callees(table: &mut Table, trace: &Path) -> Result<()> {
    let (stacks, catalog, _) = trapline_trace::stacks(trace)?;
    for node in stacks.nodes() {
        if let Some(caller) = stacks.callers(node).nth(1) {
            let name = catalog.function(caller.function).name();
            table.add(&name, table::Sums { callees: node.calls, ..table::Sums::default() });
        }
    }
    Ok(())
}

/// Where traces and exports are meanwhile.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("trapline-consumers-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("consumers: warning: {} stays behind: {error}", self.0.display());
        }
    }
}
