//! Sites are switched off and on all the time while the target's threads run them: a call that falls into a time when they are on is in the trace
//! (I1), no instruction is torn (I2), and the target notices nothing (I4).
//!
//! The recorder notes the time-stamp counter before and after each batch; the target notes it before and after calls. A call that began after the
//! sites were on, and ended before they began to go off, has to be in the trace, with a time between its two stamps.

use std::{fs, path::Path};

use trapline_testsuite::{
    compare,
    moments::Moments,
    program::{Optimised, Program},
    run::{Command, End, Outcome},
    scratch::Scratch,
    trace::Report,
    trapline,
};

/// A time, as the time-stamp counter gives it.
type Span = (u64, u64);

/// When the sites were on for sure, and off for sure.
#[derive(Debug, Default)]
struct Windows {
    on: Vec<Span>,
    off: Vec<Span>,
}

impl Windows {
    /// Reads the recorder's log: `on` or `off`, the counter before and after, how many sites.
    fn read(log: &str) -> Self {
        let mut windows = Self::default();
        let mut since = 0;
        for line in log.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words[at].parse::<u64>().expect("a number");
            let (before, after) = (number(1), number(2));
            // Sites are on from the start.
            let ends = if words[0] == "off" { &mut windows.on } else { &mut windows.off };
            ends.push((since, before));
            since = after;
        }
        windows
    }
}

/// A call that the target noted.
#[derive(Debug)]
struct Stamp {
    tid: u32,
    function: String,
    span: Span,
}

fn stamps(output: &str) -> Vec<Stamp> {
    let stamps = output.lines().filter_map(|line| {
        let words: Vec<&str> = line.strip_prefix("stamp ")?.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().expect("a number");
        Some(Stamp {
            tid: words[0].parse().expect("a number"),
            function: words[1].into(),
            span: (number(2), number(3)),
        })
    });
    stamps.collect()
}

fn is_in(windows: &[Span], span: Span) -> bool {
    windows.iter().any(|window| window.0 < span.0 && span.1 < window.1)
}

/// How many of the calls that lie within `windows` there are, and which of them the trace lacks.
fn missing<'a>(stamps: &'a [Stamp], windows: &[Span], moments: &Moments) -> (usize, Vec<&'a Stamp>) {
    let claimed: Vec<&Stamp> = stamps.iter().filter(|stamp| is_in(windows, stamp.span)).collect();
    let is_missing = |stamp: &&&Stamp| {
        let calls = moments.calls.get(&stamp.tid).map_or(&[][..], Vec::as_slice);
        let from = calls.partition_point(|&(tsc, _)| tsc < stamp.span.0);
        let within = calls[from..].iter().take_while(|&&(tsc, _)| tsc <= stamp.span.1);
        !within.map(|(_, site)| &moments.names[site]).any(|name| *name == stamp.function)
    };
    (claimed.len(), claimed.iter().filter(is_missing).copied().collect())
}

/// Records a command while all sites are switched every few milliseconds.
fn toggled(command: &Command, folder: &Path, options: &[&str]) -> Outcome {
    let log = folder.join("log");
    let log = log.to_str().expect("a path that is UTF-8");
    let options = [&["--toggle-every", "5", "--toggle-log", log], options].concat();
    command.behind(trapline::record(&folder.join("trace"), &options)).run()
}

#[test]
fn no_call_is_missed_while_sites_are_on() {
    misses_nothing(Program::of(&["toggled.c"]));
}

#[test]
fn no_call_is_missed_behind_a_profilers_call() {
    misses_nothing(Program::of(&["toggled.c"]).flags(&["-pg", "-mfentry"]));
}

fn misses_nothing(program: Program) {
    let folder = Scratch::new();
    let mut words = program.build(Optimised::Yes, folder.path());
    words.push("log".into());
    let outcome = toggled(&Command::new(words, folder.path()), folder.path(), &[]);
    assert_eq!(outcome.end, End::Status(0), "{}", outcome.error_text());
    assert_eq!(outcome.error_text(), "");
    let output = outcome.text();
    let windows = Windows::read(&fs::read_to_string(folder.join("log")).expect("the log"));
    let stamps = stamps(&output);
    let moments = Moments::read(&folder.join("trace"), |name| name.starts_with("numbered_")).expect("a trace");
    let (claimed, missed) = missing(&stamps, &windows.on, &moments);
    assert!(claimed > 0, "no call was noted while sites were on");
    assert!(missed.is_empty(), "{} of {claimed} calls are missing, such as {:?}", missed.len(), missed[0]);
    // Negative control: what is claimed for a time when sites were off is not there.
    let (claimed, missed) = missing(&stamps, &windows.off, &moments);
    assert!(claimed > 0, "no call was noted while sites were off");
    assert_eq!(missed.len(), claimed, "calls are in the trace that were made while sites were off");
    // Nothing is there that was not called.
    let report = Report::read(&folder.join("trace")).expect("a trace");
    assert_eq!(report.losses(), []);
    for line in output.lines().filter_map(|line| line.strip_prefix("made ")) {
        let (name, made) = line.split_once(' ').expect("a name and a count");
        let seen = report.calls.get(name).copied().unwrap_or_default();
        assert!(seen <= made.parse().expect("a count"), "{name} was called {made} times, the trace says {seen}");
    }
}

#[test]
fn python_with_threads_gives_the_right_answers() {
    let folder = Scratch::new();
    fs::write(
        folder.join("work.py"),
        r#"
import hashlib, json, re, threading
answers = [None] * 4
def work(index):
    sums = []
    for turn in range(60):
        text = json.dumps({"numbers": list(range(index, 300 + index)), "turn": turn})
        assert json.loads(text)["turn"] == turn
        sums.append(sum(map(int, re.findall(r"\d+", text))))
    answers[index] = hashlib.sha256(str(sums).encode()).hexdigest()
threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(answers)
"#,
    )
    .expect("a folder of our own");
    let command = Command::new(["/usr/bin/python3", "work.py"], folder.path());
    let bare = command.run();
    for options in [&[][..], &["--lib", "*"]] {
        let outcome = toggled(&command, folder.path(), options);
        assert_eq!(compare::same(&bare, &outcome), Vec::<String>::new());
        assert!(fs::read_to_string(folder.join("log")).expect("the log").lines().count() > 1, "nothing was switched");
        assert_eq!(Report::read(&folder.join("trace")).expect("a trace").losses(), []);
    }
}

#[test]
fn windows_are_what_lies_between_two_batches() {
    let windows = Windows::read("off 10 12 3\non 20 25 3\noff 40 41 3\n");
    assert_eq!(windows.on, [(0, 10), (25, 40)]);
    assert_eq!(windows.off, [(12, 20)]);
    assert!(is_in(&windows.on, (26, 39)) && !is_in(&windows.on, (25, 39)) && !is_in(&windows.on, (26, 41)));
}
