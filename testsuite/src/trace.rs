//! What `trapline report --json` says of a trace.
//!
//! Owns [`Report`]. The command itself is asked, so that the checks see what a user sees.

use std::{collections::BTreeMap, path::Path, process::Command};

use serde_json::Value;

use crate::trapline;

/// Calls by function, and what was lost.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Calls by name, without the types of arguments; of all functions of the same name together.
    pub calls: BTreeMap<String, u64>,
    /// What was lost, by cause.
    pub lost: BTreeMap<String, u64>,
}

impl Report {
    /// Reads the report of a trace.
    ///
    /// # Errors
    /// What the command complained of, or what its answer lacks.
    pub fn read(trace: &Path) -> Result<Self, String> {
        let answer = ask("report", trace)?;
        let functions = answer["functions"].as_array().ok_or("the report has no list `functions`")?;
        let mut report = Self::default();
        for function in functions {
            let name = function["name"].as_str().ok_or("a function has no `name`")?;
            let calls = function["calls"].as_u64().ok_or_else(|| format!("{name} has no number `calls`"))?;
            *report.calls.entry(base_name(name).to_owned()).or_default() += calls;
        }
        let lost = answer["lost"].as_object().ok_or("the report has no object `lost`")?;
        report.lost = lost.iter().filter_map(|(cause, count)| Some((cause.clone(), count.as_u64()?))).collect();
        Ok(report)
    }

    /// Everything that was lost and should not have been. Time that threads waited is no loss.
    pub fn losses(&self) -> Vec<(&str, u64)> {
        let lost = self.lost.iter().map(|(cause, &count)| (cause.as_str(), count));
        lost.filter(|&(cause, count)| count != 0 && !cause.ends_with("_ns")).collect()
    }
}

/// Asks a reading verb about a trace.
///
/// # Errors
/// What the command complained of.
pub fn ask(verb: &str, trace: &Path) -> Result<Value, String> {
    let mut command = Command::new(trapline::path());
    command.arg(verb).arg("-i").arg(trace).arg("--json");
    let output = command.output().map_err(|error| format!("starting {command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("{command:?}: {error}"))
}

/// A demangled name up to its arguments.
fn base_name(name: &str) -> &str {
    name.split_once('(').map_or(name, |(base, _)| base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_compared_without_arguments() {
        assert_eq!(base_name("descend(long)"), "descend");
        assert_eq!(base_name("main"), "main");
    }

    #[test]
    fn waiting_is_no_loss() {
        let mut report = Report::default();
        report.lost.insert("waited_ns".to_owned(), 12);
        report.lost.insert("full".to_owned(), 0);
        assert_eq!(report.losses(), []);
        report.lost.insert("overwritten".to_owned(), 3);
        report.lost.insert("torn".to_owned(), 1);
        assert_eq!(report.losses(), [("overwritten", 3), ("torn", 1)]);
    }
}
