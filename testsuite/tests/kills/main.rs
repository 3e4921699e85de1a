//! SIGKILL at random moments, from before the program starts to its end: for the target, for the recorder, for both.
//!
//! The target notes in a file how many calls it has begun and how many have returned, and when. A killed target loses nothing: its trace has as
//! many calls. A killed recorder leaves a trace that opens and holds what it had drained, without a gap, and a target that runs to its end as if nothing
//! had happened. `TRAPLINE_KILLS` sets the number of kills, `TRAPLINE_SEED` the moments; both are printed.

use std::{
    env, fs,
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime},
};

use trapline_testsuite::{
    compare,
    moments::Moments,
    program::{Optimised, Program},
    run::{self, Command, End, Outcome},
    scratch::Scratch,
    trace, trapline,
};

/// Kills of each kind.
const KILLS: u64 = 34;

/// Half of the kills come as early as this, while the program is started.
const START: Duration = Duration::from_millis(60);

/// Random numbers, the same ones for the same seed (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    fn new(test: &str) -> Self {
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_secs());
        let seed = env::var("TRAPLINE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(now);
        println!("{test}: {} kills, TRAPLINE_SEED={seed}", kills());
        Self(test.bytes().fold(seed | 1, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into())) | 1)
    }

    fn below(&mut self, end: Duration) -> Duration {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let upper = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        let end_ns = u64::try_from(end.as_nanos()).expect("a short time");
        Duration::from_nanos((end_ns / 1024 * upper) >> 22)
    }
}

fn kills() -> u64 {
    env::var("TRAPLINE_KILLS").ok().and_then(|kills| kills.parse::<u64>().ok()).map_or(KILLS, |kills| kills.div_ceil(3))
}

/// What the target noted.
#[derive(Debug, Default)]
struct Notes {
    begun: u64,
    done: u64,
    returned_at: Vec<u64>,
}

/// Every so many calls have a time.
const STRIDE: u64 = 64;

impl Notes {
    /// Empty if the target did not come that far.
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_default();
        let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")));
        let words: Vec<u64> = words.collect();
        let [begun, done, returned_at @ ..] = &words[..] else { return Self::default() };
        Self { begun: *begun, done: *done, returned_at: returned_at.to_vec() }
    }

    /// How many calls had returned by this time, at least.
    fn returned_by(&self, tsc: u64) -> u64 {
        let count = self.returned_at.iter().take_while(|&&at| at != 0 && at < tsc).count() as u64;
        count.checked_sub(1).map_or(0, |last| last * STRIDE + 1)
    }
}

/// A folder with the program in it.
struct Place {
    scratch: Scratch,
    /// How long a recorded run takes.
    duration: Duration,
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        Program::of(&["ticks.c"]).build(Optimised::Yes, scratch.path());
        let mut place = Self { scratch, duration: Duration::ZERO };
        let started = Instant::now();
        let whole = place.command(&["./ticks", "notes"], "64").run();
        place.duration = started.elapsed();
        assert_eq!(whole.end, End::Status(7), "{}", whole.error_text());
        place
    }

    fn bare(&self, words: &[&str]) -> Command {
        let _ = fs::remove_file(self.scratch.join("notes"));
        Command::new(words, self.scratch.path())
    }

    /// With little room, the target is soon full of events that nobody drains.
    fn command(&self, words: &[&str], room_mib: &str) -> Command {
        for name in ["trace", "trace.old"] {
            let _ = fs::remove_file(self.scratch.join(name));
        }
        self.bare(words).behind(trapline::record(&self.scratch.join("trace"), &["--buffer", room_mib]))
    }

    fn notes(&self) -> Notes {
        Notes::read(&self.scratch.join("notes"))
    }

    /// Starts a command, and does something at a random moment.
    fn interrupted(&self, words: &[&str], round: u64, random: &mut Random, kill: impl Fn(u32)) -> Outcome {
        let moment = random.below(if round.is_multiple_of(2) { START } else { self.duration });
        let running = self.command(words, if round.is_multiple_of(4) { "4" } else { "64" }).start();
        thread::sleep(moment);
        kill(running.pid);
        running.finish()
    }

    /// Judges the trace of a recorder that was killed: every call up to the last one in it, and no other.
    fn check_cut_trace(&self) {
        let (path, notes) = (self.scratch.join("trace"), self.notes());
        if fs::metadata(&path).map_or(0, |trace| trace.len()) == 0 {
            assert_eq!(notes.begun, 0, "the target ran without a trace");
            return;
        }
        for verb in ["info", "report"] {
            trace::ask(verb, &path).expect("a trace that opens");
        }
        let moments = Moments::read(&path, |name| name == "tick").expect("a trace");
        let calls: Vec<u64> = moments.calls.values().flatten().map(|&(tsc, _)| tsc).collect();
        let count = calls.len() as u64;
        let returned = notes.returned_by(calls.last().copied().unwrap_or(0));
        assert!(count <= notes.begun, "{count} calls in the trace, {} begun", notes.begun);
        assert!(count >= returned, "{count} calls in the trace, {returned} had returned before the last one in it");
        if moments.is_finished {
            assert!(count >= notes.done, "a whole trace with {count} of {} calls", notes.done);
        }
    }
}

/// The first process that another one has started.
fn child_of(pid: u32) -> Option<String> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next().map(str::to_owned)
}

#[test]
fn a_killed_target_loses_nothing_that_it_had_done() {
    let place = Place::new();
    let mut random = Random::new("target");
    for round in 0..kills() {
        let outcome = place.interrupted(&["./ticks", "notes"], round, &mut random, |recorder| {
            if let Some(target) = child_of(recorder) {
                run::signal("KILL", &target);
            }
        });
        let is_expected = matches!(outcome.end, End::Status(7 | 137) | End::Signal(9));
        assert!(is_expected, "round {round}: {:?}, {}", outcome.end, outcome.error_text());
        let notes = place.notes();
        let moments = Moments::read(&place.scratch.join("trace"), |name| name == "tick").expect("a trace");
        let calls = moments.calls.values().map(|calls| calls.len() as u64).sum::<u64>();
        assert!(moments.is_finished, "round {round}: the recorder did not end the trace");
        assert!(
            notes.done <= calls && calls <= notes.begun,
            "round {round}: {calls} calls in the trace, {} begun and {} returned",
            notes.begun,
            notes.done
        );
        let report = trace::Report::read(&place.scratch.join("trace")).expect("a trace");
        assert_eq!(report.losses(), [], "round {round}");
    }
}

/// The dynamic linker tells if it was to preload the agent of a recorder that was gone.
fn without_preload(outcome: &Outcome) -> Outcome {
    let text = outcome.error_text();
    let kept = text.split_inclusive('\n').filter(|line| !(line.contains("LD_PRELOAD") && line.contains("/proc/")));
    Outcome { stderr: kept.collect::<String>().into_bytes(), ..outcome.clone() }
}

#[test]
fn a_target_whose_recorder_is_killed_runs_to_its_end() {
    let place = Place::new();
    let words = ["/bin/sh", "-c", "./ticks notes; echo status $?"];
    let bare = place.bare(&words).run();
    assert!(bare.text().ends_with("status 7\n"), "{}", bare.text());
    let mut random = Random::new("recorder");
    let mut started = 0;
    for round in 0..kills() {
        let outcome =
            place.interrupted(&words, round, &mut random, |recorder| run::signal("KILL", &recorder.to_string()));
        // A recorder that is killed before it has started the program leaves nothing.
        let is_started = !outcome.stdout.is_empty();
        started += u64::from(is_started);
        if is_started || place.notes().begun > 0 {
            let outcome = Outcome { end: bare.end, ..without_preload(&outcome) };
            assert_eq!(compare::same(&bare, &outcome), Vec::<String>::new(), "round {round}");
        }
        place.check_cut_trace();
    }
    assert!(started > 0, "the program never ran");
}

#[test]
fn a_trace_is_readable_after_both_were_killed() {
    let place = Place::new();
    let mut random = Random::new("both");
    for round in 0..kills() {
        place.interrupted(&["./ticks", "notes"], round, &mut random, run::kill_group);
        place.check_cut_trace();
    }
}

#[test]
fn calls_that_returned_are_counted_by_their_times() {
    let notes = Notes { begun: 200, done: 199, returned_at: vec![10, 20, 30, 40, 0, 0] };
    assert_eq!(notes.returned_by(10), 0);
    assert_eq!(notes.returned_by(11), 1);
    assert_eq!(notes.returned_by(35), 129);
    assert_eq!(notes.returned_by(99), 193);
}
