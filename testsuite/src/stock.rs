//! A program as it is installed, with and without trapline.
//!
//! Owns [`Stock`]. The program runs bare, recorded, and recorded with all of its libraries. Outputs, exit status and signal have to be the same; the
//! trace has to open, hold calls and have lost none; and of every executable that ran, nearly all functions have to be traced, the others with reasons.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    path::Path,
};

use serde_json::Value;

use crate::{
    compare,
    run::{Command, Outcome},
    scratch::Scratch,
    trace::{Report, ask},
    transparency::VARIANTS,
    trapline,
};

/// Of an executable's functions, at least so many in a hundred are traced.
const TRACED_PERCENT: u64 = 99;

/// A program to be checked.
#[derive(Debug)]
pub struct Stock {
    command: Command,
    normalise: fn(&str) -> String,
}

impl Stock {
    /// Checks a command that prints the same in every run.
    pub fn of(command: Command) -> Self {
        Self { command, normalise: str::to_owned }
    }

    /// Outputs are compared after this was done to them.
    #[must_use]
    pub fn normalise(self, normalise: fn(&str) -> String) -> Self {
        Self { normalise, ..self }
    }

    /// Runs the whole check.
    ///
    /// # Panics
    /// Anything is otherwise than without trapline, or the trace lacks something: with everything that was found.
    pub fn run(&self) {
        let complaints = self.complaints(trapline::record);
        assert!(complaints.is_empty(), "{} complaints\n{}", complaints.len(), complaints.join("\n"));
    }

    /// What there is to complain about under the recorder whose words `record` makes. For negative controls, that is not trapline.
    pub fn complaints(&self, record: fn(&Path, &[&str]) -> Vec<OsString>) -> Vec<String> {
        let scratch = Scratch::new();
        let bare = self.comparable(&self.command.run());
        let mut found = Vec::new();
        for (variant, options) in VARIANTS {
            let trace = scratch.join("trace");
            let outcome = self.comparable(&self.command.behind(record(&trace, options)).run());
            let mut complaints = compare::same(&bare, &outcome);
            complaints.extend(of_trace(&trace).unwrap_or_else(|error| vec![error]));
            found.extend(complaints.iter().map(|text| format!("{}, {variant}: {text}", self.command)));
        }
        found
    }

    fn comparable(&self, outcome: &Outcome) -> Outcome {
        Outcome {
            stdout: (self.normalise)(&outcome.text()).into_bytes(),
            stderr: (self.normalise)(&outcome.error_text()).into_bytes(),
            end: outcome.end,
        }
    }
}

/// What a trace that was recorded with nothing left out lacks.
///
/// # Errors
/// It cannot be read.
pub fn of_trace(trace: &Path) -> Result<Vec<String>, String> {
    let report = Report::read(trace)?;
    let info = ask("info", trace)?;
    let functions = ask("functions", trace)?;
    let mut found: Vec<String> =
        report.losses().iter().map(|(cause, count)| format!("lost by {cause}: {count}")).collect();
    if report.calls.values().sum::<u64>() == 0 {
        found.push("there are no calls".to_owned());
    }
    let processes = info["processes"].as_array().ok_or("the description has no list `processes`")?;
    let executables = processes.iter().filter_map(|process| process["executable"].as_str()).collect();
    found.extend(coverage(functions["functions"].as_array().ok_or("there is no list `functions`")?, &executables));
    Ok(found)
}

/// Which of `executables` are traced in too small a part, and what is left out without a reason.
fn coverage(functions: &[Value], executables: &BTreeSet<&str>) -> Vec<String> {
    let mut found = Vec::new();
    let mut counts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for function in functions {
        let module = function["module"].as_str().unwrap_or_default();
        let is_traced = function["traced"] == true;
        if !is_traced && function["reason"].as_str().is_none_or(str::is_empty) {
            found.push(format!("{} in {module} is not traced, and has no reason", function["name"]));
        }
        if executables.contains(module) {
            let (traced, all) = counts.entry(module).or_default();
            *traced += u64::from(is_traced);
            *all += 1;
        }
    }
    let is_too_small = |&(_, (traced, all)): &(_, (u64, u64))| traced * 100 < all * TRACED_PERCENT;
    let too_small = counts.into_iter().filter(is_too_small);
    found
        .extend(too_small.map(|(module, (traced, all))| format!("{traced} of {all} functions of {module} are traced")));
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn too_few_functions_and_missing_reasons_are_found() {
        let function = |module: &str, traced: bool, reason: Option<&str>| json!({ "name": "f", "module": module, "traced": traced, "reason": reason });
        let mut functions = vec![function("/bin/a", true, None); 99];
        functions.push(function("/bin/a", false, Some("too-short")));
        let executables = BTreeSet::from(["/bin/a"]);
        assert_eq!(coverage(&functions, &executables), Vec::<String>::new());
        functions.push(function("/lib/b", false, Some("too-short")));
        assert_eq!(coverage(&functions, &executables), Vec::<String>::new(), "a library may have fewer");
        functions.push(function("/lib/b", false, None));
        assert_eq!(coverage(&functions, &executables).len(), 1);
        functions.push(function("/bin/a", false, Some("too-short")));
        assert_eq!(coverage(&functions, &executables).len(), 2);
    }
}
