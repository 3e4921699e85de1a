//! Programs that run already are recorded for a moment, again and again, and left as they were.
//!
//! Each does one thing all the time, and checks its results itself. After each recording the process is compared with what it was: its code with the files,
//! mappings, threads, descriptors, masks and handlers of signals, memory. `TRAPLINE_ATTACHES` sets how often (1,000 of `calls` is the full measure),
//! `TRAPLINE_KILLS` the kills. How long threads stood still is printed, and not judged.

mod refused;

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use trapline_testsuite::{
    program::{Library, Optimised, Program},
    run::{self, Command, End, Outcome, Running},
    scratch::Scratch,
    snapshot::{Own, Snapshot},
    trace::Report,
    trapline,
};

/// Recordings of each program.
const ATTACHES: u64 = 5;

/// How long a recording may take, its start and its end included.
const ROUND: Duration = Duration::from_secs(2);

/// How long threads may take to go on that were let go.
const SETTLING: Duration = Duration::from_secs(10);

/// Kills of the recorder.
const KILLS: u64 = 5;

fn number(name: &str, usual: u64) -> u64 {
    env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(usual)
}

/// One target at a time: the busy threads of a second one would take the processors from the first one's recorder, again and again.
static TURN: Mutex<()> = Mutex::new(());

/// A program that runs.
struct Target {
    running: Running,
    scratch: Scratch,
    pid: u32,
    /// For who reads what was measured.
    arguments: String,
    _turn: MutexGuard<'static, ()>,
}

impl Target {
    fn start(program: &Program, arguments: &[&str]) -> Self {
        Self::start_as(program, arguments, |command| command)
    }

    /// Starts it in a session of its own, as services are: there the tests get a processor, however many threads of it are busy, and it starves where the
    /// tests share theirs with other work.
    fn service(program: &Program, arguments: &[&str]) -> Self {
        Self::start_as(program, arguments, Command::in_session)
    }

    fn start_as(program: &Program, arguments: &[&str], how: impl FnOnce(Command) -> Command) -> Self {
        let scratch = Scratch::new();
        let mut words = program.build(Optimised::Yes, scratch.path());
        words.splice(1..1, arguments.iter().map(Into::into));
        // As long as all recordings may take.
        let patience = run::PATIENCE * 4 + ROUND * u32::try_from(number("TRAPLINE_ATTACHES", ATTACHES)).unwrap_or(0);
        // Whoever builds it waits long for a processor beside a busy program.
        trapline::path();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let running = how(Command::new(&words, scratch.path()).patience(patience)).start();
        run::wait_for(&scratch.join("ready"));
        Self { scratch, pid: running.pid, running, arguments: arguments.join(" "), _turn: turn }
    }

    /// The command that records it.
    fn recorder(&self, options: &[&str]) -> Command {
        let words = trapline::attach(&self.scratch.join("trace"), self.pid, options);
        Command::new(&words, self.scratch.path())
    }

    /// Records it for a moment.
    fn record(&self, options: &[&str]) -> Outcome {
        self.recorder(&[&["--duration", "0.02"], options].concat()).run()
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot::of(self.pid)
    }

    /// It is as it was before, as soon as its threads are back in the system calls that they were in: some of these change the mask of signals meanwhile.
    fn assert_left(&self, before: &Snapshot, own: Own, when: &str) {
        let deadline = Instant::now() + SETTLING;
        loop {
            let complaints = self.snapshot().complaints(before, own);
            if complaints.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "{when}: {complaints:?}");
        }
    }

    /// Has it end, and say whether all was right.
    fn finish(self) {
        fs::write(self.scratch.join("over"), "").expect("a folder of our own");
        // The others look for the file.
        if ["attached", "many_functions"].iter().any(|name| self.scratch.join(name).exists()) {
            run::signal("TERM", &self.pid.to_string());
        }
        let outcome = self.running.finish();
        let said = (outcome.end, outcome.text(), outcome.error_text());
        assert_eq!(said, (End::Status(7), "right\n".to_owned(), String::new()));
    }
}

/// The longest stop that a recording tells of, in milliseconds.
fn longest_stop(outcome: &Outcome) -> Option<f64> {
    let text = outcome.error_text();
    let line = text.lines().find(|line| line.contains("stood still"))?;
    line.split_once("for ")?.1.split_whitespace().next()?.parse().ok()
}

/// Records a program many times.
fn check(program: &Program, arguments: &[&str], own: Own, options: &[&str]) {
    record_often(Target::start(program, arguments), own, options);
}

fn record_often(target: Target, own: Own, options: &[&str]) {
    let arguments = target.arguments.clone();
    let before = target.snapshot();
    let mut stops = Vec::new();
    for round in 0..number("TRAPLINE_ATTACHES", ATTACHES) {
        let outcome = target.record(options);
        assert_eq!(outcome.end, End::Status(0), "round {round}: {}", outcome.error_text());
        assert!(outcome.error_text().contains(" events of "), "{}", outcome.error_text());
        stops.extend(longest_stop(&outcome));
        target.assert_left(&before, own, &format!("round {round}"));
    }
    target.finish();
    stops.sort_by(f64::total_cmp);
    let (median, longest) = (stops[stops.len() / 2], stops[stops.len() - 1]);
    println!(
        "{arguments} {options:?}: stood still for {median:.2} ms (median), {longest:.2} ms (maximum of {})",
        stops.len()
    );
}

const ATTACHED: Program = Program::of(&["attached.cpp"]);

#[test]
fn hot_calls() {
    check(&ATTACHED, &["calls", "4"], Own::Nothing, &[]);
}

#[test]
fn hot_calls_with_libraries() {
    check(&ATTACHED, &["calls", "4"], Own::Nothing, &["--lib", "*"]);
}

#[test]
fn exceptions_all_the_time() {
    check(&ATTACHED, &["throws", "4"], Own::Memory, &["--lib", "libstdc++*", "--lib", "libgcc_s*"]);
}

#[test]
fn panics_all_the_time() {
    check(&Program::of(&["attached_panics.rs"]), &[], Own::Memory, &[]);
}

#[test]
fn four_hundred_threads() {
    check(&ATTACHED, &["paced", "400"], Own::Nothing, &[]);
}

/// Functions without end, and threads that are never at rest.
const MANY_FUNCTIONS: Program = Program::of(&["many_functions.c"]);

#[test]
#[ignore = "how long threads stand still is what it is for: `cargo test --release -p trapline-testsuite --test attach -- --ignored --nocapture`"]
fn ten_thousand_functions_in_sixty_four_busy_threads() {
    record_often(Target::service(&MANY_FUNCTIONS, &["64"]), Own::Nothing, &[]);
}

#[test]
#[ignore = "how long threads stand still is what it is for: `cargo test --release -p trapline-testsuite --test attach -- --ignored --nocapture`"]
fn a_hundred_thousand_functions() {
    let program = MANY_FUNCTIONS.flags(&["-DFUNCTIONS=100000"]);
    record_often(Target::service(&program, &["4"]), Own::Nothing, &[]);
}

#[test]
fn processes_that_are_counted_are_left_as_they_were() {
    for (what, function, own) in [("calls", "\"leaf\"", Own::Nothing), ("throws", "\"thrower(int", Own::Memory)] {
        let target = Target::start(&ATTACHED, &[what, "4"]);
        let before = target.snapshot();
        // On a machine that does other things, it may call nothing for a while.
        let (mut rounds, deadline) = (0, Instant::now() + run::PATIENCE);
        while rounds < 3 {
            let pid = target.pid.to_string();
            let options = ["top", "--batch", "--json", "--delay", "0.1", "-n", "2", "-p", &pid];
            let words = [trapline::path().as_os_str()].into_iter().chain(options.iter().map(AsRef::as_ref));
            let outcome = Command::new(words, target.scratch.path()).run();
            assert_eq!((outcome.end, outcome.error_text()), (End::Status(0), String::new()), "{what}");
            assert_eq!(outcome.text().lines().count(), 2, "{}", outcome.text());
            rounds += u32::from(outcome.text().contains(function));
            target.assert_left(&before, own, what);
            assert!(Instant::now() < deadline, "{what}: {}", outcome.text());
        }
        target.finish();
    }
}

#[test]
fn threads_that_block_all_signals() {
    check(&ATTACHED, &["blocked", "4"], Own::Nothing, &[]);
}

#[test]
fn threads_asleep_in_system_calls() {
    check(&ATTACHED, &["sleeps", "15"], Own::Nothing, &[]);
}

#[test]
fn system_calls_all_the_time() {
    check(&ATTACHED, &["asks", "2"], Own::Nothing, &["--lib", "libc.so*"]);
}

#[test]
fn libraries_and_children_come_and_go() {
    check(&ATTACHED.library(Library::Argument), &["changes", "4"], Own::Everything, &[]);
}

/// Whoever joins it finds another program than the one that was looked at.
#[test]
fn a_process_that_executes_programs_all_the_time_is_joined() {
    let scratch = Scratch::new();
    let (script, trace) = (scratch.join("again"), scratch.join("trace"));
    fs::write(&script, "#!/bin/sh\n: > ready\nexec \"$0\"\n").expect("a folder of our own");
    fs::set_permissions(&script, Permissions::from_mode(0o755)).expect("a file of our own");
    trapline::path();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let running = Command::new([&script], scratch.path()).start();
    run::wait_for(&scratch.join("ready"));
    let mut calls = 0;
    for round in 0..ATTACHES {
        let words = trapline::attach(&trace, running.pid, &["--duration", "0.5"]);
        let outcome = Command::new(&words, scratch.path()).run();
        assert_eq!(outcome.end, End::Status(0), "round {round}: {}", outcome.error_text());
        calls += Report::read(&trace).expect("a trace").calls.values().sum::<u64>();
    }
    assert!(calls > 0, "programs are recorded from their beginning");
    // It goes on.
    fs::remove_file(scratch.join("ready")).expect("it is there");
    run::wait_for(&scratch.join("ready"));
}

#[test]
fn a_process_whose_recorder_is_killed_is_left_as_it_was() {
    let target = Target::start(&ATTACHED, &["calls", "4"]);
    let before = target.snapshot();
    for round in 0..number("TRAPLINE_KILLS", KILLS) {
        let recorder = target.recorder(&[]).start();
        // From before it is armed to some time after.
        let moment = Duration::from_millis(round * 37 % 400);
        let begun = Instant::now();
        while begun.elapsed() < moment && !recorder.has_ended() {
            std::thread::yield_now();
        }
        run::signal("KILL", &recorder.pid.to_string());
        let killed = Instant::now();
        let deadline = killed + run::PATIENCE;
        loop {
            let complaints = target.snapshot().complaints(&before, Own::Nothing);
            if complaints.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "round {round}: {complaints:?}");
        }
        println!("killed after {moment:?}: left after {:?}", killed.elapsed());
        recorder.finish();
    }
    target.finish();
}

#[test]
fn a_process_that_is_being_recorded_is_told_from_one_that_is_not() {
    let target = Target::start(&ATTACHED, &["calls", "4"]);
    let before = target.snapshot();
    let recorder = target.recorder(&[]).start();
    let deadline = Instant::now() + run::PATIENCE;
    loop {
        let complaints = target.snapshot().complaints(&before, Own::Nothing);
        let has = |text: &str| complaints.iter().any(|complaint| complaint.contains(text));
        if has("its code is changed") && has("was not mapped") && has("signals: ") && has("KiB of addresses") {
            break;
        }
        assert!(Instant::now() < deadline, "{complaints:?}");
    }
    run::signal("INT", &recorder.pid.to_string());
    assert_eq!(recorder.finish().end, End::Status(0));
    target.assert_left(&before, Own::Nothing, "at the end");
    target.finish();
}
