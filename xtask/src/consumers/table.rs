//! Calls and times of functions, by whomever they were told, and what differs.
//!
//! Owns [`Table`]. Pure: nothing runs here. Functions of the same name are one row, for most formats know names alone. Invariant: what somebody does not tell is not compared; what he tells
//! has to be within his own precision, or a nanosecond a call, which rounding takes; of time without callees, one for each of them as well.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Context, Result};
use serde_json::Value;

/// What was told of a function. Times are nanoseconds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Sums {
    pub(super) calls: Option<u64>,
    /// All durations added up.
    pub(super) sum: Option<f64>,
    /// With callees, the outermost call only.
    pub(super) total: Option<f64>,
    /// Without callees.
    pub(super) own: Option<f64>,
    /// How wrong times may be, for they are printed with so many digits only.
    pub(super) within: f64,
    /// How many calls it made: each one's duration is rounded, and taken off.
    pub(super) callees: u64,
}

/// See the module's text.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Table(BTreeMap<String, Sums>);

impl Table {
    /// What `trapline report --json` prints.
    pub(super) fn of_report(text: &str) -> Result<Self> {
        let report: Value = serde_json::from_str(text).context("the report is no JSON")?;
        let mut table = Self::default();
        for function in report["functions"].as_array().context("the report has no functions")? {
            let ns = |key: &str| function[key].as_f64();
            let sums = Sums {
                calls: function["calls"].as_u64(),
                sum: ns("sum_ns"),
                total: ns("total_ns"),
                own: ns("self_ns"),
                ..Sums::default()
            };
            table.add(function["name"].as_str().context("a function has no name")?, sums);
        }
        Ok(table)
    }

    /// `{"functions": {name: {"calls", "sum_ns", "total_ns", "self_ns"}}}`, as our scripts print it. Errors that the reader reports are errors.
    pub(super) fn of_json(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text.lines().last().unwrap_or_default()).context("no JSON came back")?;
        let errors = json["errors"].as_array().filter(|errors| !errors.is_empty());
        anyhow::ensure!(errors.is_none(), "it reports errors: {}", json["errors"]);
        let mut table = Self::default();
        for (name, sums) in json["functions"].as_object().context("no functions came back")? {
            let ns = |key: &str| sums[key].as_f64();
            let sums = Sums {
                calls: sums["calls"].as_u64(),
                sum: ns("sum_ns"),
                total: ns("total_ns"),
                own: ns("self_ns"),
                ..Sums::default()
            };
            table.add(name, sums);
        }
        Ok(table)
    }

    /// Adds what is told to what was told before.
    pub(super) fn add(&mut self, name: &str, more: Sums) {
        fn added<T: std::ops::Add<Output = T>>(known: Option<T>, more: Option<T>) -> Option<T> {
            match (known, more) {
                (Some(known), Some(more)) => Some(known + more),
                (known, more) => known.or(more),
            }
        }
        let known = self.0.entry(name.to_owned()).or_default();
        *known = Sums {
            calls: added(known.calls, more.calls),
            sum: added(known.sum, more.sum),
            total: added(known.total, more.total),
            own: added(known.own, more.own),
            within: known.within + more.within,
            callees: known.callees + more.callees,
        };
    }

    pub(super) fn forget_calls(&mut self) {
        self.0.values_mut().for_each(|sums| sums.calls = None);
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn calls(&self) -> u64 {
        self.0.values().filter_map(|sums| sums.calls).sum()
    }

    /// The time that is told, of all functions.
    pub(super) fn time_ns(&self) -> f64 {
        self.0.values().filter_map(|sums| sums.sum.or(sums.total)).sum()
    }

    /// What another one tells otherwise, a line a function that begins with its name. Some formats leave out what takes no time.
    pub(super) fn differences(&self, other: &Self, leaves_out_instants: bool) -> Vec<String> {
        let mut found = Vec::new();
        for (name, own) in &self.0 {
            let is_instant = leaves_out_instants && own.sum == Some(0.0);
            match other.0.get(name) {
                Some(theirs) => found.extend(difference(own, theirs).map(|text| format!("{name}: {text}"))),
                None if is_instant => {}
                None => found.push(format!("{name}: not there, {} calls in the report", own.calls.unwrap_or(0))),
            }
        }
        let foreign = other.0.keys().filter(|name| !self.0.contains_key(*name));
        found.extend(foreign.map(|name| format!("{name}: not in the report")));
        found
    }

    /// The functions with most time, as the report tells them.
    pub(super) fn longest(&self, count: usize) -> String {
        let mut rows: Vec<(&String, &Sums)> = self.0.iter().collect();
        rows.sort_by(|a, b| b.1.total.unwrap_or(0.0).total_cmp(&a.1.total.unwrap_or(0.0)));
        let mut text = format!("{:>10} {:>14} {:>14} {:>14}  function\n", "calls", "sum, ms", "total, ms", "self, ms");
        for (name, sums) in rows.into_iter().take(count) {
            let [sum, total, own] = [sums.sum, sums.total, sums.own].map(|ns| ns.unwrap_or(0.0) / 1e6);
            let _ = writeln!(text, "{:>10} {sum:>14.6} {total:>14.6} {own:>14.6}  {name}", sums.calls.unwrap_or(0));
        }
        text
    }
}

/// What is told otherwise.
#[expect(clippy::cast_precision_loss, reason = "a limit")]
fn difference(own: &Sums, theirs: &Sums) -> Option<String> {
    if let (Some(calls), Some(found)) = (own.calls, theirs.calls)
        && calls != found
    {
        return Some(format!("{found} calls, {calls} in the report"));
    }
    let limit = 1.0 + own.calls.unwrap_or(0) as f64 + theirs.within;
    let of_callees = own.callees as f64;
    let times = [
        ("sum", own.sum, theirs.sum, limit),
        ("total", own.total, theirs.total, limit),
        ("self", own.own, theirs.own, limit + of_callees),
    ];
    times.into_iter().find_map(|(what, own, found, limit)| {
        let (own, found) = (own?, found?);
        ((own - found).abs() > limit).then(|| format!("{what} {found} ns, {own} ns in the report"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[(&str, u64, f64)]) -> Table {
        let mut table = Table::default();
        for (name, calls, sum) in rows {
            table.add(name, Sums { calls: Some(*calls), sum: Some(*sum), ..Sums::default() });
        }
        table
    }

    #[test]
    fn rounding_is_no_difference_and_a_call_is() {
        let report = table(&[("f", 2, 500.0), ("g", 1, 0.0)]);
        assert!(report.differences(&table(&[("f", 2, 503.0), ("g", 1, 0.0)]), false).is_empty());
        assert_eq!(report.differences(&table(&[("f", 2, 504.0), ("g", 1, 0.0)]), false).len(), 1);
        let fewer = report.differences(&table(&[("f", 1, 500.0), ("g", 1, 0.0)]), false);
        assert_eq!(fewer, ["f: 1 calls, 2 in the report"]);
    }

    #[test]
    fn functions_that_are_missing_or_foreign_differ() {
        let report = table(&[("f", 2, 500.0), ("g", 1, 0.0)]);
        let found = report.differences(&table(&[("h", 2, 500.0)]), true);
        assert_eq!(found, ["f: not there, 2 calls in the report", "h: not in the report"]);
    }

    #[test]
    fn what_is_not_told_is_not_compared_and_precision_is_the_readers_own() {
        let report = table(&[("f", 2, 500_400.0)]);
        let mut told = Table::default();
        told.add("f", Sums { sum: Some(500_000.0), within: 500.0, ..Sums::default() });
        assert!(report.differences(&told, false).is_empty());
    }

    #[test]
    fn tables_come_from_reports_and_from_scripts() {
        let report =
            r#"{"functions":[{"name":"f","calls":2,"sum_ns":5,"total_ns":4,"self_ns":3},{"name":"f","calls":1}]}"#;
        let json = r#"{"functions":{"f":{"calls":3,"sum_ns":5,"total_ns":4,"self_ns":3}}}"#;
        let (report, told) = (Table::of_report(report).expect("a report"), Table::of_json(json).expect("a table"));
        assert_eq!(report, told);
        assert!(Table::of_json(r#"{"functions":{},"errors":["lost: 3"]}"#).is_err());
    }
}
