//! `trapline top`: what the functions of a program do, while they do it.
//!
//! Owns the verb's options and how its threads work together: this one records nothing, but traces ([`trapline_record::watch`]); another one shows, as a [`screen`] or in
//! [`batch`]es. Both share [`Figures`]. What is shown of them is decided in [`model`]. Invariant: the process is left, and the terminal is as it was, however it ends.

mod app;
mod batch;
mod model;
mod screen;

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, IsTerminal as _, stderr, stdin, stdout},
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use trapline_record::{
    Error, Options, Summary,
    figures::{Figures, Order},
    watch, watch_running,
};

use self::model::{Field, View};
use crate::{
    Outcome, Refused,
    record::{self, CHUNKS_PER_MIB, NOT_EXECUTABLE, NOT_FOUND},
};

/// Shows what the functions of a program do while it runs: calls, time, and how long 99 of 100 calls took.
///
/// Calls are counted in the program's own memory, and nothing is written. On a terminal `?` lists the keys; with --batch tables are printed instead.
/// Of a program that is launched here, nothing is read or shown; with --batch, its standard output goes to standard error.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Count only functions whose names match; may be given several times
    #[arg(short = 'F', long = "function", value_name = "GLOB")]
    functions: Vec<String>,

    /// Leave out functions whose names match; may be given several times
    #[arg(short = 'N', long = "no-function", value_name = "GLOB")]
    except: Vec<String>,

    /// Count in these libraries too, also those that are loaded later: file name or path; may be given several times
    #[arg(long = "lib", value_name = "GLOB")]
    libraries: Vec<String>,

    /// What the functions are sorted by, the greatest first; names alphabetically
    #[arg(long, value_enum, default_value_t = Field::Own)]
    sort: Field,

    /// Seconds between two looks
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = delay)]
    delay: Duration,

    /// Print tables, one after each delay and one at the end, and need no terminal
    #[arg(short, long)]
    batch: bool,

    /// End after so many tables: a process is left, a program that was launched gets SIGTERM
    #[arg(short = 'n', long, value_name = "N", requires = "batch", value_parser = clap::value_parser!(u64).range(1..))]
    tables: Option<u64>,

    /// Print so many functions at most
    #[arg(long, value_name = "N", requires = "batch")]
    limit: Option<usize>,

    /// Print each table as a JSON object, one a line
    #[arg(long, requires = "batch")]
    json: bool,

    /// Where the key `r` records the next ten seconds of a function; an existing trace is kept as FILE.old
    #[arg(short, long, value_name = "FILE", default_value = "trapline.data")]
    output: PathBuf,

    /// Count in this process, which runs already, and leave it as it was
    #[arg(short, long, value_name = "PID", conflicts_with = "command", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,

    /// The program and its arguments
    #[arg(required_unless_present = "pid", trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

const EXAMPLES: &str = "\
Examples:
  trapline top -p 1234
  trapline top --lib 'libcrypto.so*' -- openssl speed -seconds 5 sha256
  trapline top --batch -n 3 --sort calls --limit 20 -p 1234
  trapline top --batch --json -p 1234 > figures.jsonl

The exit status is that of a program that was launched, unless it was ended by `q` or -n; otherwise it is 0, 2 or 3.";

/// Room for what is recorded of a selection, for each process.
const BUFFER_MIB: usize = 64;

impl Arguments {
    /// Whether a program is run, whose status counts.
    pub(crate) fn has_program(&self) -> bool {
        self.pid.is_none()
    }

    fn options(&self) -> Options {
        Options {
            output: self.output.clone(),
            functions: record::selection(&self.functions, &self.except),
            libraries: self.libraries.clone(),
            returns: true,
            max_depth: None,
            on_full: trapline_record::OnFull::Block,
            chunks: BUFFER_MIB * CHUNKS_PER_MIB,
            given: std::collections::BTreeMap::new(),
            toggle: None,
            start_off: false,
        }
    }
}

fn delay(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    if duration < SHORTEST { Err("a hundredth of a second is the shortest".to_owned()) } else { Ok(duration) }
}

const SHORTEST: Duration = Duration::from_millis(10);

/// What who traces and who shows say to each other, beside the figures.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    figures: Figures,
    /// Nothing is counted any more.
    is_over: Arc<AtomicBool>,
    /// There was nothing to count.
    has_failed: Arc<AtomicBool>,
    /// Whoever shows has ended it.
    is_ended: Arc<AtomicBool>,
}

impl Shared {
    /// Has the recorder leave the process, or end the program.
    fn end(&self) {
        self.is_ended.store(true, Ordering::Relaxed);
        self.figures.order(Order::End);
    }

    fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        // Acquire: pairs with the Release in `run`, after the last call was counted.
        self.is_over.load(Ordering::Acquire)
    }
}

/// Shows what there is to see.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    if !arguments.batch && !(stdout().is_terminal() && (stdin().is_terminal() || arguments.pid.is_none())) {
        let text = "`trapline top` draws on a terminal, and standard output or input is none; give --batch for tables";
        return Err(Refused(text.to_owned()).into());
    }
    let shared = Shared {
        figures: Figures::default(),
        is_over: Arc::default(),
        has_failed: Arc::default(),
        is_ended: Arc::default(),
    };
    let view = View::new(arguments.sort);
    let streams = Streams::take(arguments)?;
    let shower = {
        let (shared, delay) = (shared.clone(), arguments.delay);
        if arguments.batch {
            let printer = batch::Printer {
                output: streams.output.try_clone().context("keeping standard output")?,
                is_json: arguments.json,
                limit: arguments.limit.unwrap_or(usize::MAX),
                tables: arguments.tables,
            };
            Shower::start(move || printer.run(&shared, &view, delay))
        } else {
            let screen = screen::Screen::new(streams.output.try_clone()?, arguments.output.clone())?;
            Shower::start(move || screen.run(&shared, view, delay))
        }
    };
    let options = arguments.options();
    let result = match arguments.pid {
        Some(pid) => watch_running(pid, None, &options, &shared.figures),
        None => watch(&arguments.command, &options, &shared.figures),
    };
    shared.has_failed.store(result.is_err(), Ordering::Relaxed);
    // Release: pairs with the Acquire in `Shared::is_over`.
    shared.is_over.store(true, Ordering::Release);
    let shown = shower.finish();
    streams.give_back();
    outcome(arguments, result, &shared).and_then(|outcome| shown.map(|()| outcome))
}

fn outcome(arguments: &Arguments, result: Result<Summary, Error>, shared: &Shared) -> Result<Outcome> {
    match result {
        Ok(summary) => {
            record::tell_untraced(&summary);
            if arguments.pid.is_some() || shared.is_ended.load(Ordering::Relaxed) {
                return Ok(Outcome::Good);
            }
            trapline_record::die_likewise(&summary);
            Ok(Outcome::Program(summary.status))
        }
        Err(error @ Error::NotFound(_)) => Ok(record::failed(&error, NOT_FOUND)),
        Err(error @ Error::NotExecutable { .. }) => Ok(record::failed(&error, NOT_EXECUTABLE)),
        Err(error @ (Error::NotTraceable { .. } | Error::NotAttachable { .. })) => {
            Err(Refused(error.to_string()).into())
        }
        Err(error) => Err(error.into()),
    }
}

/// The thread that shows.
struct Shower(thread::JoinHandle<Result<()>>);

impl Shower {
    /// Starts it. The recorder's signals are not for it.
    fn start(show: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        let (tell, is_ready) = mpsc::channel();
        let thread = thread::spawn(move || {
            trapline_record::leave_signals_to_the_recorder();
            // Whoever waits for it is there until it is told.
            let _ = tell.send(());
            show()
        });
        let _ = is_ready.recv();
        Self(thread)
    }

    fn finish(self) -> Result<()> {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Where we print, while a program that is launched has other streams than ours.
struct Streams {
    output: File,
    messages: File,
    input: Option<File>,
}

impl Streams {
    /// A program that is launched inherits what these streams are afterwards.
    fn take(arguments: &Arguments) -> Result<Self> {
        let copy = |stream: &dyn AsFd| stream.as_fd().try_clone_to_owned().map(File::from);
        let (output, messages) = (copy(&stdout())?, copy(&stderr())?);
        let mut streams = Self { output, messages, input: None };
        if arguments.pid.is_none() {
            streams.divert(arguments.batch).context("taking the program's streams")?;
        }
        Ok(streams)
    }

    fn divert(&mut self, is_batch: bool) -> io::Result<()> {
        if is_batch {
            dup2_stdout(&self.messages)?;
            return Ok(());
        }
        let nothing = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        self.input = Some(stdin().as_fd().try_clone_to_owned()?.into());
        dup2_stdin(&nothing)?;
        dup2_stdout(&nothing)?;
        dup2_stderr(&nothing)?;
        Ok(())
    }

    /// They are ours again.
    fn give_back(&self) {
        // Each was open before.
        let _ = dup2_stdout(&self.output);
        let _ = dup2_stderr(&self.messages);
        if let Some(input) = &self.input {
            let _ = dup2_stdin(input);
        }
    }
}
