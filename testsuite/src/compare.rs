//! The verdict on two runs of one program, and on a trace.
//!
//! Owns [`same`] and [`counts`]. Both are pure: complaints come out, nothing is printed.

use crate::{
    run::{End, Outcome},
    trace::Report,
};

/// Bytes of an output around the first difference that a complaint shows.
const SHOWN_BYTES: usize = 160;

/// What differs between a run as it should be and another; empty if nothing does.
///
/// A signal that ends the target may be told as shells tell it, by exit status 128 + signal, because the recorder has an end of its own.
pub fn same(bare: &Outcome, other: &Outcome) -> Vec<String> {
    let mut found = Vec::new();
    let is_same_end = match bare.end {
        End::Status(_) => other.end == bare.end,
        End::Signal(signal) => other.end == bare.end || other.end == End::Status(128 + signal),
    };
    if !is_same_end {
        found.push(format!("ended with {:?} instead of {:?}", other.end, bare.end));
    }
    for (name, bare, other) in
        [("standard output", &bare.stdout, &other.stdout), ("standard error", &bare.stderr, &other.stderr)]
    {
        if let Some(at) = first_difference(bare, other) {
            found.push(format!(
                "{name} differs from byte {at} on ({} bytes instead of {}):\n--- expected\n{}\n--- found\n{}",
                other.len(),
                bare.len(),
                around(bare, at),
                around(other, at)
            ));
        }
    }
    found
}

fn first_difference(one: &[u8], other: &[u8]) -> Option<usize> {
    (one != other).then(|| one.iter().zip(other).take_while(|(a, b)| a == b).count())
}

fn around(bytes: &[u8], at: usize) -> String {
    let from = at.saturating_sub(SHOWN_BYTES / 2);
    String::from_utf8_lossy(&bytes[from..bytes.len().min(at + 4 * SHOWN_BYTES)]).into_owned()
}

/// What a trace says otherwise than the program: its lines `calls NAME COUNT`.
pub fn counts(output: &str, report: &Report) -> Vec<String> {
    let mut found: Vec<String> = told(output)
        .filter_map(|(name, expected)| {
            let calls = report.calls.get(name).copied().unwrap_or_default();
            (calls != expected).then(|| format!("{name} was called {expected} times, the trace says {calls}"))
        })
        .collect();
    found.extend(report.losses().iter().map(|(cause, count)| format!("lost by {cause}: {count}")));
    found
}

/// The counts that a program told.
pub fn told(output: &str) -> impl Iterator<Item = (&str, u64)> {
    output.lines().filter_map(|line| {
        let (name, count) = line.strip_prefix("calls ")?.split_once(' ')?;
        Some((name, count.parse().ok()?))
    })
}

/// An output without the lines of [`told`], for programs whose counts depend on the moment.
pub fn without_counts(outcome: &Outcome) -> Outcome {
    let text = outcome.text();
    let kept: String = text.split_inclusive('\n').filter(|line| !line.starts_with("calls ")).collect();
    Outcome { stdout: kept.into_bytes(), ..outcome.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(stdout: &str, end: End) -> Outcome {
        Outcome { stdout: stdout.into(), stderr: Vec::new(), end }
    }

    #[test]
    fn every_difference_is_found() {
        let bare = outcome("one\n", End::Status(0));
        assert!(same(&bare, &bare).is_empty());
        assert_eq!(same(&bare, &outcome("one\n", End::Status(1))).len(), 1);
        assert_eq!(same(&bare, &outcome("one", End::Status(0))).len(), 1);
        assert_eq!(same(&bare, &outcome("two\n", End::Signal(9))).len(), 2);
        let noisy = Outcome { stderr: b"hello".to_vec(), ..bare.clone() };
        assert_eq!(same(&bare, &noisy).len(), 1);
    }

    #[test]
    fn a_signal_may_be_told_as_shells_do_and_an_exit_status_may_not() {
        let killed = outcome("", End::Signal(11));
        assert!(same(&killed, &outcome("", End::Status(139))).is_empty());
        assert_eq!(same(&killed, &outcome("", End::Status(138))).len(), 1);
        assert_eq!(same(&outcome("", End::Status(139)), &killed).len(), 1);
    }

    #[test]
    fn counts_that_differ_are_found() {
        let mut report = Report::default();
        report.calls.insert("work".to_owned(), 7);
        assert!(counts("calls work 7\n", &report).is_empty());
        assert_eq!(counts("calls work 8\n", &report).len(), 1);
        assert_eq!(counts("calls work 7\ncalls other 1\n", &report).len(), 1);
        report.lost.insert("full".to_owned(), 2);
        assert_eq!(counts("calls work 7\n", &report).len(), 1);
    }
}
