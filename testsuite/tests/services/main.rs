//! Services that run, under load: recorded for a while, and left. No request fails, answers are right, and what is mapped as code is as before.
//!
//! What the load costs while the service is recorded and afterwards is printed, as a ratio to before. `TRAPLINE_SECONDS` sets how long each is recorded.

mod debugger;
mod servers;

use std::{
    env,
    ffi::OsString,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use trapline_testsuite::{
    run::{self, Command, End, Running},
    scratch::Scratch,
    snapshot::{Own, Snapshot},
    trace::Report,
    trapline,
};

/// Rounds of load before and after.
const ROUNDS: usize = 5;

/// How a process is recorded.
struct Recording<'a> {
    folder: &'a Path,
    /// Words in front of the command.
    before: Vec<OsString>,
    trapline: OsString,
    options: &'a [&'a str],
}

impl<'a> Recording<'a> {
    fn new(scratch: &'a Scratch, options: &'a [&'a str]) -> Self {
        Self { folder: scratch.path(), before: Vec::new(), trapline: trapline::path().into(), options }
    }

    fn start(&self, pid: u32) -> Running {
        let seconds = env::var("TRAPLINE_SECONDS").unwrap_or_else(|_| "1".to_owned());
        let mut words = self.before.clone();
        words.push(self.trapline.clone());
        words.extend(["record", "-p", &pid.to_string(), "--duration", &seconds, "-o", "trace"].map(OsString::from));
        words.extend(self.options.iter().map(OsString::from));
        Command::new(words, self.folder).start()
    }

    /// Waits for the recorder's end, and judges what it says and has written.
    fn finish(&self, what: &str, running: Running) {
        let outcome = running.finish();
        let told = outcome.error_text();
        assert_eq!(outcome.end, End::Status(0), "{what}: {told}");
        assert!(!told.contains("stays"), "{what}: {told}");
        let stops = told.lines().find(|line| line.contains("stood still")).unwrap_or_default();
        println!("{what}: {stops}");
        let report = Report::read(&self.folder.join("trace")).expect("a trace that opens");
        assert!(report.calls.values().sum::<u64>() > 0, "{what}: nothing was recorded, {told}");
        assert_eq!(report.losses(), [], "{what}");
        fs::remove_file(self.folder.join("trace")).expect("the trace");
    }
}

/// Where code is mapped.
fn code(pid: u32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
    maps.lines().filter(|line| line.contains("xp ")).map(str::to_owned).collect()
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

fn timed(mut load: impl FnMut()) -> Duration {
    let started = Instant::now();
    load();
    started.elapsed()
}

/// Records a process while `load`, which checks its answers itself, is put on it again and again, and looks at what is left.
fn check(what: &str, pid: u32, recording: &Recording<'_>, mut load: impl FnMut()) {
    load();
    let before: Vec<Duration> = (0..ROUNDS).map(|_| timed(&mut load)).collect();
    let (snapshot, code_before) = (Snapshot::of(pid), code(pid));
    let recorder = recording.start(pid);
    let mut during = Vec::new();
    while during.is_empty() || !recorder.has_ended() {
        during.push(timed(&mut load));
    }
    recording.finish(what, recorder);
    assert_eq!(code(pid), code_before, "{what}");
    assert_eq!(Snapshot::of(pid).complaints(&snapshot, Own::Everything), Vec::<String>::new(), "{what}");
    let after: Vec<Duration> = (0..ROUNDS).map(|_| timed(&mut load)).collect();
    let before = median(before);
    println!(
        "{what}: {:.2} of before while recorded, {:.2} afterwards",
        median(during) / before,
        median(after) / before
    );
}

#[test]
fn a_change_of_code_is_found() {
    let scratch = Scratch::new();
    let service = Command::new(["sleep", "1000"], scratch.path()).start();
    let pid = service.pid;
    let is_there = || fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.contains("libc.so"));
    run::wait_until(&"sleep", is_there);
    let before = Snapshot::of(pid);
    assert_eq!(Snapshot::of(pid).complaints(&before, Own::Everything), Vec::<String>::new());
    let first = code(pid).into_iter().find(|line| line.contains("libc.so")).expect("the C library");
    let at = u64::from_str_radix(first.split('-').next().unwrap_or_default(), 16).expect("an address");
    let memory = fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).expect("its memory");
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut byte, at).expect("a byte");
    std::os::unix::fs::FileExt::write_all_at(&memory, &[!byte[0]], at).expect("a byte");
    assert_eq!(Snapshot::of(pid).complaints(&before, Own::Everything).len(), 1);
}
