//! What outcome a step must have, and the verdict on the one it had.
//!
//! Owns [`Expect`] and [`Outcome`]. A pure function: [`crate::runner`] runs the command and asks here.
//!
//! An exit status alone is too little for the stress runs. One that made no call would pass as a proof, and one that died
//! of something else would pass as a negative control. So their reports are read too.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The outcome that a step must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    /// Exit status 0.
    Success,
    /// A stress report with exit status 0 that shows work done, nothing missed and nothing corrupted.
    NothingLost,
    /// A stress report with exit status 1 that shows missed calls.
    CallsLost,
    /// Exit status 2: the tool would not do what it was asked to do.
    Refused,
}

/// What a command did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome<'a> {
    /// The exit status; `None` when a signal ended the command.
    pub(crate) status: Option<i32>,
    /// Standard output, where [`Expect::reads_report`] asked for it.
    pub(crate) stdout: &'a str,
}

impl Expect {
    /// Whether the verdict needs the command's standard output.
    pub(crate) fn reads_report(self) -> bool {
        matches!(self, Self::NothingLost | Self::CallsLost)
    }

    fn status(self) -> i32 {
        match self {
            Self::Success | Self::NothingLost => 0,
            Self::CallsLost => 1,
            Self::Refused => 2,
        }
    }

    /// Judges an outcome.
    ///
    /// # Errors
    /// What was expected and what was found.
    pub(crate) fn judge(self, outcome: Outcome) -> Result<()> {
        let expected = self.status();
        match outcome.status {
            Some(status) => ensure!(status == expected, "expected exit status {expected}, found {status}"),
            None => bail!("expected exit status {expected}, but a signal ended the command"),
        }
        match self {
            Self::Success | Self::Refused => Ok(()),
            Self::NothingLost => {
                let report = Report::parse(outcome.stdout)?;
                report.expect_none(&["missed", "corrupted"])?;
                report.expect_some(&["calls", "ops", "pokes", "traps"])
            }
            Self::CallsLost => Report::parse(outcome.stdout)?.expect_some(&["calls", "pokes", "traps", "missed"]),
        }
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit status {}", self.status())?;
        f.write_str(match self {
            Self::Success => "",
            Self::NothingLost => ", work done, nothing missed, nothing corrupted",
            Self::CallsLost => ", calls missed",
            Self::Refused => ", refused",
        })
    }
}

/// The counts that a stress run printed.
struct Report(Value);

impl Report {
    fn parse(stdout: &str) -> Result<Self> {
        serde_json::from_str(stdout).map(Self).context("expected a report in JSON on standard output")
    }

    fn count(&self, key: &str) -> Result<u64> {
        self.0.get(key).and_then(Value::as_u64).with_context(|| format!("the report has no count `{key}`"))
    }

    fn expect_some(&self, keys: &[&str]) -> Result<()> {
        for key in keys {
            ensure!(self.count(key)? > 0, "the run proves nothing: `{key}` is 0");
        }
        Ok(())
    }

    fn expect_none(&self, keys: &[&str]) -> Result<()> {
        for key in keys {
            let count = self.count(key)?;
            ensure!(count == 0, "`{key}` is {count}, expected 0");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(calls: u64, missed: u64) -> String {
        format!(r#"{{"version":1,"calls":{calls},"ops":9,"pokes":5,"traps":3,"missed":{missed},"corrupted":0}}"#)
    }

    /// The complaint about an outcome, or nothing when it is as expected.
    fn complaint(expect: Expect, status: Option<i32>, stdout: &str) -> String {
        expect.judge(Outcome { status, stdout }).err().map_or_else(String::new, |error| format!("{error:#}"))
    }

    #[test]
    fn only_the_expected_status_passes() {
        for (expect, passing) in [(Expect::Success, 0), (Expect::Refused, 2)] {
            for status in [0, 1, 2, 101] {
                assert_eq!(complaint(expect, Some(status), "").is_empty(), status == passing, "{expect:?} {status}");
            }
            assert!(complaint(expect, None, "").contains("signal"));
        }
    }

    #[test]
    fn a_proof_needs_calls_and_no_losses() {
        assert_eq!(complaint(Expect::NothingLost, Some(0), &report(7, 0)), "");
        assert!(complaint(Expect::NothingLost, Some(0), &report(7, 1)).contains("`missed` is 1"));
        assert!(complaint(Expect::NothingLost, Some(0), &report(0, 0)).contains("`calls` is 0"));
        assert!(complaint(Expect::NothingLost, Some(1), &report(7, 0)).contains("found 1"));
    }

    #[test]
    fn a_negative_control_must_fail_for_the_right_reason() {
        assert_eq!(complaint(Expect::CallsLost, Some(1), &report(7, 4)), "");
        assert!(complaint(Expect::CallsLost, Some(1), &report(7, 0)).contains("`missed` is 0"));
        assert!(complaint(Expect::CallsLost, Some(0), &report(7, 4)).contains("found 0"));
        assert!(complaint(Expect::CallsLost, Some(1), "").contains("in JSON"));
        assert!(complaint(Expect::CallsLost, Some(101), "").contains("found 101"));
    }

    #[test]
    fn a_report_without_a_count_is_an_error() {
        assert!(complaint(Expect::NothingLost, Some(0), r#"{"missed":0}"#).contains("no count `corrupted`"));
    }
}
