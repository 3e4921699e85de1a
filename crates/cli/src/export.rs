//! `trapline export`: a trace in the format of another tool.
//!
//! Owns the options, where the output goes by default, and what is shown meanwhile; the work is [`trapline_export`]'s. While it goes on, standard error shows
//! progress where it is a terminal.

use std::{
    io::{IsTerminal, Write, stderr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::{Args, builder::PossibleValue};
use trapline_export::{Format, Target, export};

use crate::{
    Outcome, Refused, partition,
    report::{DEFAULT_TRACE, warn},
};

/// Writes a trace in the format of another tool: a viewer, a profiler, a database.
///
/// Times are nanoseconds from the start of the trace. A call that was still running at the end of its thread's events ends there.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// The trace
    #[arg(short, long, default_value = DEFAULT_TRACE, value_name = "FILE")]
    input: PathBuf,
    /// What it becomes
    #[arg(short, long, value_enum, default_value_t = Named(Format::Perfetto), value_name = "FORMAT")]
    format: Named,
    /// Where it goes, `-` for standard output; without it, beside the trace, under its name with the format's ending
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,
    /// Put the table into a data set: OUT is a folder, `calls` unless named, with folders for hosts and days. For `parquet`
    #[arg(long)]
    partition: bool,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

const EXAMPLES: &str = "\
Examples:
  trapline export                                      trapline.perfetto-trace, for ui.perfetto.dev
  trapline export --format speedscope -o calls.json
  trapline export --format folded -o - | flamegraph.pl > flame.svg
  trapline export --format uftrace -o calls && uftrace report -d calls
  trapline export --format parquet --partition -o calls";

/// A format, as the command line knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Named(Format);

impl clap::ValueEnum for Named {
    fn value_variants<'a>() -> &'a [Self] {
        static ALL: [Named; Format::ALL.len()] = {
            let mut all = [Named(Format::Perfetto); Format::ALL.len()];
            let mut index = 0;
            while index < all.len() {
                all[index] = Named(Format::ALL[index]);
                index += 1;
            }
            all
        };
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name()).help(self.0.opened_by()))
    }
}

/// Goes through the trace and writes it.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let format = arguments.format.0;
    let output = if arguments.partition {
        if format != Format::Parquet {
            let message = "only tables can be parts of a data set; say --format parquet with --partition";
            return Err(Refused(message.to_owned()).into());
        }
        partition::place(arguments.output.as_deref().unwrap_or(Path::new("calls")), &arguments.input)?
    } else {
        arguments.output.clone().unwrap_or_else(|| beside(&arguments.input, format.ending()))
    };
    if is_same_file(&arguments.input, &output) {
        let message = format!("{} is the trace itself; name another file with -o", output.display());
        return Err(Refused(message).into());
    }
    let target = Target::new(&output);
    let mut shown = Shown::new(arguments.quiet);
    let result = export(&arguments.input, format, &target, |done, total| shown.progress(done, total));
    shown.end();
    match result {
        Ok(summary) => {
            warn(&summary.damage, &summary.catalog);
            if !arguments.quiet && !target.is_standard_output() {
                let (calls, path) = (summary.calls, output.display());
                eprintln!("[trapline: {calls} calls in {path}; it is opened by {}]", format.opened_by());
            }
            Ok(Outcome::Good)
        }
        Err(error) if error.is_closed_pipe() => Ok(Outcome::Good),
        Err(error) => Err(error.into()),
    }
}

/// Where an output lies if nobody says: beside the trace, under its name with an ending of its own.
pub(crate) fn beside(input: &Path, ending: &str) -> PathBuf {
    let name =
        if input.extension().is_some_and(|ending| ending == "data") { input.file_stem() } else { input.file_name() };
    let mut name = name.unwrap_or_default().to_owned();
    name.push(".");
    name.push(ending);
    input.with_file_name(name)
}

/// Whether writing the one would destroy the other.
pub(crate) fn is_same_file(input: &Path, output: &Path) -> bool {
    let [input, output] = [input, output].map(std::fs::canonicalize);
    matches!((input, output), (Ok(input), Ok(output)) if input == output)
}

/// What a terminal shows of the work.
pub(crate) struct Shown {
    is_wanted: bool,
    start: Instant,
    last: Option<Instant>,
}

impl Shown {
    pub(crate) fn new(quiet: bool) -> Self {
        Self { is_wanted: !quiet && stderr().is_terminal(), start: Instant::now(), last: None }
    }

    pub(crate) fn progress(&mut self, done: u64, total: u64) {
        const FIRST: Duration = Duration::from_secs(1);
        const EVERY: Duration = Duration::from_millis(500);
        const WIDTH: u64 = 30;
        if !self.is_wanted || self.last.map_or(self.start.elapsed() < FIRST, |last| last.elapsed() < EVERY) {
            return;
        }
        self.last = Some(Instant::now());
        let (bars, percent) = (WIDTH * done / total.max(1), 100 * done / total.max(1));
        let [full, empty] = [("#", bars), (".", WIDTH - bars.min(WIDTH))]
            .map(|(sign, count)| sign.repeat(usize::try_from(count).unwrap_or(0)));
        let seconds = self.start.elapsed().as_secs();
        // Erases the rest of the line (ECMA-48, EL), and stays on it.
        let _ = write!(stderr(), "\r[trapline: {full}{empty} {percent} % in {seconds} s]\x1b[K\r");
    }

    pub(crate) fn end(&self) {
        if self.last.is_some() {
            let _ = write!(stderr(), "\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_lies_beside_the_trace() {
        let of = |input: &str, format| beside(Path::new(input), Format::ending(format)).display().to_string();
        assert_eq!(of("a/trapline.data", Format::Perfetto), "a/trapline.perfetto-trace");
        assert_eq!(of("trapline.data.old", Format::Flamegraph), "trapline.data.old.svg");
    }
}
