//! The recorder: launches a program, or joins one that runs, arms its functions, and drains what they record into a trace file.
//!
//! Owns [`record`], [`record_running`] and their [`Options`]; [`watch`] and [`watch_running`] do the same without a trace, for live [`figures`]. Data flows one way:
//!
//! ```text
//! launch -> tracer (ptrace) -> exec: agent preloaded -> arm: image, stubs, sites -> the target runs
//!              |                                                                       |
//!              +------------- processes, modules, exits -------+      pool of chunks <-+
//!                                                              v             |
//!                                              trace file <- drain <---------+
//! ```
//!
//! All thinking happens here, in the recorder's own process; in the target there is only the [agent]. The tracer's thread is the only one that
//! may use ptrace, the drain's the only one that writes the trace. Unsafe code lives in `sys` alone. Invariants: no page of the target is ever writable
//! and executable (I8); every function is armed or listed with the reason (I7); a target whose recorder dies runs on.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]
#![cfg_attr(target_arch = "x86", allow(dead_code, reason = "live patches need more, and are for 64-bit processes"))]
#![cfg_attr(
    target_arch = "x86",
    allow(clippy::useless_conversion, reason = "a C `long` has no more bits than an `int`")
)]

pub mod agent;
mod arm;
mod counters;
mod divert;
mod drain;
mod error;
mod exec;
pub mod figures;
mod folded;
mod frame;
mod guard;
mod handing;
mod inject;
mod launch;
mod leave;
#[cfg(target_arch = "x86_64")]
pub mod live;
pub mod machine;
mod narrow_frame;
mod overhead;
mod pending;
mod places;
mod pool;
pub mod refusal;
mod remote;
mod sandbox;
mod shadows;
mod shims;
mod space;
mod sys;
mod text;
mod toggle;
mod tracer;

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64, mpsc},
    time::{Duration, SystemTime},
};

pub use error::Error;
pub use overhead::Overhead;
pub use toggle::Toggle;
pub use tracer::Stops;
pub use trapline_abi::pool::{CHUNK_BYTES, OnFull};
use trapline_engine::{Filter, Mode};
use trapline_trace::{Losses, Meta, Writer};

use crate::{
    arm::{Armory, Coverage},
    drain::{Drain, Sink},
    error::Doing,
    figures::Figures,
    guard::Guard,
    launch::Program,
    sys::{
        ptrace::Stop,
        shared,
        spawn::{self, Inbox},
    },
    tracer::{Outcome, Tracer},
};

/// What is to be recorded, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the trace goes.
    pub output: PathBuf,
    /// Which functions, by their names.
    pub functions: Filter,
    /// Which libraries beside the main executable: globs of file names or whole paths.
    pub libraries: Vec<String>,
    /// Whether returns are recorded.
    pub returns: bool,
    /// Frames deeper than this are left out.
    pub max_depth: Option<u32>,
    /// What happens to events that find no room.
    pub on_full: OnFull,
    /// Chunks of 32 KiB in each process's pool. 32-bit processes, whose address space is small, get 1,024 at most.
    pub chunks: usize,
    /// As they were given, for the trace's header.
    pub given: BTreeMap<String, String>,
    /// For tests: sites are switched off and on all the time.
    pub toggle: Option<Toggle>,
    /// For measurements: everything is armed, and stays switched off.
    pub start_off: bool,
}

impl Options {
    /// How many chunks the pool of a process of this width has.
    fn chunks_for(&self, mode: Mode) -> usize {
        /// 32 MiB of records.
        const MOST_NARROW: usize = 1024;
        match mode {
            Mode::Bits32 => self.chunks.min(MOST_NARROW),
            Mode::Bits64 => self.chunks,
        }
    }
}

/// How a recording went.
#[derive(Debug)]
pub struct Summary {
    /// The exit status of the program, as a shell gives it: 128 + n if signal n killed it.
    pub status: u8,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// Processes that were traced; after an exec it is another one.
    pub processes: u32,
    /// Programs that ran untraced, and why.
    pub untraced: BTreeMap<String, String>,
    /// What was armed of what was selected.
    pub coverage: Coverage,
    /// Records written: two for a call whose return was seen.
    pub records: u64,
    /// What is missing.
    pub losses: Losses,
    /// What recording cost the program, if it had enough calls to tell by.
    pub overhead: Option<Overhead>,
    /// Size of the trace file in bytes.
    pub trace_bytes: u64,
    /// Why the trace breaks off, if it does. The program ran on untraced from then on.
    pub failure: Option<trapline_trace::Error>,
    /// How long the threads of a running process stood still for us.
    pub stops: Stops,
    /// What could not be taken back in a running process, and why.
    pub left: Vec<String>,
}

/// Follows a recording while it goes on.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Records written so far.
    pub fn records(&self) -> u64 {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// Runs `command` and records it. `progress` counts along.
///
/// # Errors
/// If the program cannot be started or traced, or the trace cannot be created. A program that was started is not harmed if the trace cannot be written
/// on: that is no error, but [`Summary::failure`].
pub fn record(command: &[OsString], options: &Options, progress: &Progress) -> Result<Summary, Error> {
    let program = Program::find(command)?;
    let limit_signal = spawn::ignore_file_limit();
    let writer = writer(&meta(command, options), options)?;
    let child = spawn::spawn(program.path.as_os_str(), &program.arguments, limit_signal)
        .doing(|| "starting a process".to_owned())?;
    run(Sink::Trace(writer), options, progress, |tracer| tracer.run(child))
}

/// Runs `command` and counts what its functions do, without recording it, for `figures`. No trace is written, but for [`Order::Record`].
///
/// # Errors
/// If the program cannot be started or traced.
///
/// [`Order::Record`]: figures::Order::Record
pub fn watch(command: &[OsString], options: &Options, figures: &Figures) -> Result<Summary, Error> {
    let program = Program::find(command)?;
    let limit_signal = spawn::ignore_file_limit();
    let child = spawn::spawn(program.path.as_os_str(), &program.arguments, limit_signal)
        .doing(|| "starting a process".to_owned())?;
    run(Sink::Figures(figures.clone()), options, &Progress::default(), |tracer| tracer.run(child))
}

/// Counts what the functions of a process do that runs, and what comes from it, until it ends, this process gets SIGINT, SIGTERM or SIGHUP, it is
/// [ordered](figures::Order::End), or `duration` has passed; then leaves it as it was.
///
/// # Errors
/// If the process cannot be counted in: nothing of it was changed then.
pub fn watch_running(
    pid: i32,
    duration: Option<Duration>,
    options: &Options,
    figures: &Figures,
) -> Result<Summary, Error> {
    if let Some(reason) = refusal::examine(pid).or_else(|| machine::code_can_be_changed().err()) {
        return Err(Error::NotAttachable { pid, reason });
    }
    spawn::ignore_file_limit();
    // Before there are other threads.
    let guard = Guard::start().doing(|| "starting a process".to_owned())?;
    let sink = Sink::Figures(figures.clone());
    run(sink, options, &Progress::default(), |tracer| tracer.run_attached(pid, duration, guard))
}

/// Records a process that runs, and what comes from it, until it ends, this process gets SIGINT, SIGTERM or SIGHUP, or `duration` has passed; then leaves
/// it as it was. `progress` counts along.
///
/// # Errors
/// If the process cannot be recorded: nothing of it was changed then. Or if the trace cannot be created.
pub fn record_running(
    pid: i32,
    duration: Option<Duration>,
    options: &Options,
    progress: &Progress,
) -> Result<Summary, Error> {
    if let Some(reason) = refusal::examine(pid).or_else(|| machine::code_can_be_changed().err()) {
        return Err(Error::NotAttachable { pid, reason });
    }
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = command.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let command: Vec<OsString> = words.map(|word| OsStr::from_bytes(word).to_owned()).collect();
    spawn::ignore_file_limit();
    let writer = writer(&meta(&command, options), options)?;
    // Before there are other threads.
    let guard = Guard::start().doing(|| "starting a process".to_owned())?;
    run(Sink::Trace(writer), options, progress, |tracer| tracer.run_attached(pid, duration, guard))
}

fn writer(meta: &Meta, options: &Options) -> Result<Box<Writer>, Error> {
    let mut writer = Writer::create(&options.output, meta)?;
    writer.calibration(&[clock_point()])?;
    Ok(Box::new(writer))
}

fn run(
    sink: Sink,
    options: &Options,
    progress: &Progress,
    work: impl FnOnce(Tracer<'_>) -> Result<(Outcome, Armory), Error>,
) -> Result<Summary, Error> {
    spawn::raise_descriptor_limit();
    let inbox = Inbox::new().doing(|| "taking over signals".to_owned())?;
    let waker = inbox.waker().doing(|| "taking over signals".to_owned())?;
    #[cfg(target_arch = "x86_64")]
    let patch_waker = inbox.waker().doing(|| "taking over signals".to_owned())?;
    if let Sink::Figures(figures) = &sink {
        figures.wakes(inbox.waker().doing(|| "taking over signals".to_owned())?);
    }
    let (tell, changed) = mpsc::channel();
    let drain = Drain::start(sink, options.on_full, Arc::clone(&progress.0), move |space| {
        // The tracer is gone when everything has ended.
        if tell.send(space).is_ok() {
            waker.wake();
        }
    });
    let drain = drain.doing(|| "starting a thread".to_owned())?;
    let armory = Armory::new().doing(|| "sharing the agent".to_owned())?;
    let tracer = Tracer::new(options, inbox, changed, &drain, armory);
    // Where somebody else has its name, patches wait until the recording has ended.
    #[cfg(target_arch = "x86_64")]
    let (_service, jobs) =
        live::serve::Service::start(patch_waker).map_or((None, None), |(service, jobs)| (Some(service), Some(jobs)));
    #[cfg(target_arch = "x86_64")]
    let tracer = tracer.with_jobs(jobs);
    let outcome = work(tracer);
    let finished = drain.finish();
    let (outcome, armory) = outcome?;
    let (status, signal) = match outcome.status {
        Some(Stop::Exited(code)) => (u8::try_from(code).unwrap_or(u8::MAX), None),
        Some(Stop::Killed(signal)) => (128_u8.wrapping_add(u8::try_from(signal).unwrap_or(0)), Some(signal)),
        _ => (0, None),
    };
    Ok(Summary {
        status,
        signal,
        processes: outcome.processes,
        untraced: outcome.untraced,
        coverage: armory.coverage(),
        records: progress.records(),
        losses: finished.losses,
        overhead: finished.overhead,
        failure: finished.failure,
        trace_bytes: fs::metadata(&options.output).map_or(0, |metadata| metadata.len()),
        stops: outcome.stops,
        left: outcome.left,
    })
}

/// Keeps the calling thread from getting the signals that the recorder hears, which are the process's. For threads beside the one that records.
pub fn leave_signals_to_the_recorder() {
    // An error means that there is no such thing as a set of signals.
    let _ = spawn::block_signals();
}

/// Ends this process by the signal that ended the program, if one did, so that whoever waits for us sees what it would have seen. Dumps no core.
pub fn die_likewise(summary: &Summary) {
    if let Some(signal) = summary.signal {
        spawn::die_of(signal);
    }
}

fn clock_point() -> trapline_trace::ClockPoint {
    trapline_trace::ClockPoint { tsc: shared::tsc(), monotonic_ns: shared::monotonic_ns() }
}

fn meta(command: &[OsString], options: &Options) -> Meta {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(": "));
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Meta {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: read("/proc/sys/kernel/hostname"),
        kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease")),
        cpu: cpu.map_or_else(String::new, |(_, name)| name.to_owned()),
        command: command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
        directory: std::env::current_dir().unwrap_or_default().to_string_lossy().into_owned(),
        started_unix_ns: u64::try_from(since_1970.as_nanos()).unwrap_or(0),
        tsc_hz: 0,
        options: options.given.clone(),
    }
}
