//! `trapline record`: runs a program, or joins one that runs, and records what its functions do.
//!
//! Owns the verb's options and what it says to people; the work is [`trapline_record`]'s. While the program runs, standard error shows progress where
//! it is a terminal; the program's own output is not touched. Exit status: the program's; 127 and 126 if it could not be found or executed, as
//! shells do, and 125 if trapline itself could not run it; 0 for a program that ran already.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{IsTerminal, Write, stderr},
    path::PathBuf,
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use trapline_process::Filter;
use trapline_record::{Error, Options, Overhead, Progress, Summary, Toggle, record, record_running};

use crate::{Outcome, Refused, color};

/// Records the functions of a program, from its start to its end, with every process that it starts.
///
/// The program needs no preparation: stock binaries are traced as they are. Read the trace with `trapline report`, `replay`, `functions` and `info`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Record only functions whose names match; may be given several times
    #[arg(short = 'F', long = "function", value_name = "GLOB")]
    functions: Vec<String>,

    /// Leave out functions whose names match; may be given several times
    #[arg(short = 'N', long = "no-function", value_name = "GLOB")]
    except: Vec<String>,

    /// Record these libraries too, also those that are loaded later: file name or path; may be given several times
    #[arg(long = "lib", value_name = "GLOB")]
    libraries: Vec<String>,

    /// Leave out calls that are nested deeper than this
    #[arg(short = 'D', long, value_name = "DEPTH", value_parser = clap::value_parser!(u32).range(1..))]
    depth: Option<u32>,

    /// Record entries only, no returns: less to write, no durations
    #[arg(long)]
    no_returns: bool,

    /// What to do with events that find no room: wait, leave them out, or overwrite the oldest (a flight recorder)
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = OnFull::Block)]
    on_full: OnFull,

    /// Room for events, for each process
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    buffer: u32,

    /// Where the trace goes; an existing one is kept as FILE.old
    #[arg(short, long, value_name = "FILE", default_value = "trapline.data")]
    output: PathBuf,

    /// For tests: switch all sites off and on again every so many milliseconds
    #[arg(long, value_name = "MS", hide = true, requires = "toggle_log")]
    toggle_every: Option<u64>,

    /// For tests: note there when sites were switched
    #[arg(long, value_name = "FILE", hide = true)]
    toggle_log: Option<PathBuf>,

    /// For measurements: arm everything, and leave every site switched off
    #[arg(long, hide = true, conflicts_with = "toggle_every")]
    start_off: bool,

    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// Record this process, which runs already, and leave it as it was
    #[arg(short, long, value_name = "PID", conflicts_with = "command", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,

    /// End the recording of a running process after so many seconds, and not by Ctrl-C
    #[arg(long, value_name = "SECONDS", requires = "pid", value_parser = seconds)]
    duration: Option<Duration>,

    /// The program and its arguments
    #[arg(required_unless_present = "pid", trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Arguments {
    /// Whether a program is run, whose status counts.
    pub(crate) fn has_program(&self) -> bool {
        self.pid.is_none()
    }
}

const EXAMPLES: &str = "\
Examples:
  trapline record -- ls -lR /usr/share
  trapline record -p 1234 --duration 2
  trapline record -F 'sqlite3_*' -o queries.data -- sqlite3 my.db 'select 1'
  trapline record --lib 'libc.so*' --lib 'libcrypto.so*' -- openssl rand 16

The exit status is the program's, or 127 and 126 if it was not found or is not executable, or 125 if trapline could not run it. With -p it is 0, 2 or 3.";

/// See [`trapline_record::OnFull`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum OnFull {
    /// Nothing is lost; the time that threads wait is counted
    Block,
    /// They are counted
    Drop,
    /// The newest stay
    Overwrite,
}

impl From<OnFull> for trapline_record::OnFull {
    fn from(policy: OnFull) -> Self {
        match policy {
            OnFull::Block => Self::Block,
            OnFull::Drop => Self::Drop,
            OnFull::Overwrite => Self::Overwrite,
        }
    }
}

/// A program that is there, and cannot be executed, as shells have it.
pub(crate) const NOT_EXECUTABLE: u8 = 126;
/// A program that is not there.
pub(crate) const NOT_FOUND: u8 = 127;

/// Chunks of the pool in a mebibyte.
pub(crate) const CHUNKS_PER_MIB: usize = (1 << 20) / trapline_record::CHUNK_BYTES;

/// Runs the program.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    let options = Options {
        output: arguments.output.clone(),
        functions: selection(&arguments.functions, &arguments.except),
        libraries: arguments.libraries.clone(),
        returns: !arguments.no_returns,
        max_depth: arguments.depth,
        on_full: arguments.on_full.into(),
        chunks: arguments.buffer as usize * CHUNKS_PER_MIB,
        given: given(arguments),
        toggle: toggle(arguments),
        start_off: arguments.start_off,
    };
    let progress = Progress::default();
    let result = with_progress(arguments, &progress, || match arguments.pid {
        Some(pid) => record_running(pid, arguments.duration, &options, &progress),
        None => record(&arguments.command, &options, &progress),
    });
    match result {
        Ok(summary) => {
            if !arguments.quiet {
                tell(&summary, arguments);
            }
            if !arguments.quiet || summary.processes == 0 {
                tell_untraced(&summary);
            }
            if let Some(failure) = &summary.failure {
                eprintln!(
                    "trapline: {failure}. {} events were lost then, and what was called later is neither recorded nor counted; the program ran on",
                    summary.losses.unwritten
                );
            }
            if arguments.pid.is_some() {
                return Ok(Outcome::Good);
            }
            trapline_record::die_likewise(&summary);
            Ok(Outcome::Program(summary.status))
        }
        Err(error @ Error::NotFound(_)) => Ok(failed(&error, NOT_FOUND)),
        Err(error @ Error::NotExecutable { .. }) => Ok(failed(&error, NOT_EXECUTABLE)),
        Err(error @ (Error::NotTraceable { .. } | Error::NotAttachable { .. })) => {
            Err(Refused(error.to_string()).into())
        }
        Err(error) => Err(error.into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// Tells why a program was not run.
pub(crate) fn failed(error: &Error, status: u8) -> Outcome {
    eprintln!("trapline: {error}");
    Outcome::Program(status)
}

/// The functions that these globs name, or all, without those that the others name.
pub(crate) fn selection(functions: &[String], except: &[String]) -> Filter {
    let mut wanted = functions.iter();
    let first = wanted.next().map_or_else(Filter::all, |glob| Filter::name(glob));
    let wanted = wanted.fold(first, |filter, glob| filter.or_name(glob));
    except.iter().fold(wanted, |filter, glob| filter.except(glob))
}

fn toggle(arguments: &Arguments) -> Option<Toggle> {
    let (period, log) = (arguments.toggle_every?, arguments.toggle_log.clone()?);
    Some(Toggle { period: Duration::from_millis(period), log })
}

/// The options that were given, for who reads the trace later.
fn given(arguments: &Arguments) -> BTreeMap<String, String> {
    let lists = [("functions", &arguments.functions), ("except", &arguments.except), ("lib", &arguments.libraries)];
    let lists = lists.into_iter().filter(|(_, globs)| !globs.is_empty()).map(|(name, globs)| (name, globs.join(" ")));
    let depth = arguments.depth.map(|depth| ("depth", depth.to_string()));
    let returns = arguments.no_returns.then(|| ("returns", "no".to_owned()));
    let on_full = arguments.on_full.to_possible_value().map(|value| ("on-full", value.get_name().to_owned()));
    lists.chain(depth).chain(returns).chain(on_full).map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Shows how far the recording is while `work` goes on, on a terminal.
fn with_progress<T>(arguments: &Arguments, progress: &Progress, work: impl FnOnce() -> T) -> T {
    const FIRST: Duration = Duration::from_secs(1);
    const EVERY: Duration = Duration::from_millis(500);
    if arguments.quiet || !stderr().is_terminal() {
        return work();
    }
    let (done, is_done) = channel::<()>();
    let shown = progress.clone();
    let shower = thread::spawn(move || {
        trapline_record::leave_signals_to_the_recorder();
        let start = Instant::now();
        let mut wait = FIRST;
        while is_done.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
            wait = EVERY;
            let seconds = start.elapsed().as_secs();
            // Erases the rest of the line (ECMA-48, EL), and stays on it.
            let _ = write!(stderr(), "\r[trapline: {} events in {seconds} s]\x1b[K\r", short(shown.records()));
        }
        if wait == EVERY {
            let _ = write!(stderr(), "\x1b[K");
        }
    });
    let result = work();
    drop(done);
    let _ = shower.join();
    result
}

/// A count with at most four digits.
pub(crate) fn short(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let scaled = |divisor: u64, unit: &str| format!("{:.1}{unit}", count as f64 / divisor as f64);
    match count {
        0..10_000 => count.to_string(),
        10_000..10_000_000 => scaled(1_000, "k"),
        10_000_000..10_000_000_000 => scaled(1_000_000, "M"),
        _ => scaled(1_000_000_000, "G"),
    }
}

fn tell(summary: &Summary, arguments: &Arguments) {
    let coverage = &summary.coverage;
    let total = coverage.total();
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let percent = if total == 0 { 0.0 } else { 100.0 * coverage.traced as f64 / total as f64 };
    eprintln!(
        "[trapline: {} events of {} {}, {} in {}]",
        short(summary.records),
        summary.processes,
        if summary.processes == 1 { "process" } else { "processes" },
        size(summary.trace_bytes),
        arguments.output.display(),
    );
    let mut reasons: Vec<_> = coverage.untraced.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    reasons.sort();
    let why = if reasons.is_empty() { String::new() } else { format!("; not: {}", reasons.join(", ")) };
    let entry_only = match coverage.entry_only {
        0 => String::new(),
        count => format!(", {count} of them at entry only"),
    };
    eprintln!("[trapline: traced {} of {total} functions ({percent:.1} %){entry_only}{why}]", coverage.traced);
    let losses = &summary.losses;
    if losses.records() > 0 {
        let style = color::warning();
        eprintln!("[{style}trapline:{style:#} {} events are missing; `trapline info` says why]", losses.records());
    }
    if let Some(Overhead { record_ps, total_ns }) = summary.overhead {
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let [record_ns, total_s] = [record_ps as f64 / 1e3, total_ns as f64 / 1e9];
        eprintln!(
            "[trapline: an event cost about {record_ns:.1} ns, all of them {total_s:.2} s of the program's time]"
        );
    }
    if arguments.pid.is_some() {
        let stops = summary.stops;
        let ms = stops.longest.as_secs_f64() * 1e3;
        eprintln!("[trapline: the process stood still {} times, for {ms:.2} ms at most]", stops.count);
    }
    if losses.waited_ns > 0 {
        eprintln!("[trapline: threads waited {} ms for room; a larger --buffer helps]", losses.waited_ns / 1_000_000);
    }
}

/// What could not be traced, or taken back.
pub(crate) fn tell_untraced(summary: &Summary) {
    for left in &summary.left {
        eprintln!("[trapline: {left}]");
    }
    for (program, reason) in &summary.untraced {
        eprintln!("[trapline: {program} ran untraced: {reason}]");
    }
}

fn size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let scaled = |shift: u32| bytes as f64 / f64::from(1_u32 << shift);
    match bytes {
        0..0x2800 => format!("{bytes} bytes"),
        0x2800..0xa0_0000 => format!("{:.1} KiB", scaled(10)),
        0xa0_0000..0x2_8000_0000 => format!("{:.1} MiB", scaled(20)),
        _ => format!("{:.1} GiB", scaled(30)),
    }
}
