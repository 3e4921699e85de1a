//! `trapline diff`: what two traces of a program differ in, and how sure that is.
//!
//! Owns the options, the decision which differences are named, and both forms of the answer. A run differs from the next one in ways that have nothing to do with the program: the
//! processor's clock, what else runs, where things lie in memory. So four things are set against a function's change: the spread within each run ([`Pace`]), what of
//! its time is the recorder's, the change that most functions have in common, which is taken off, and the spread of the functions' changes around that. Invariant: a difference is
//! named only if it is [`SURE`] standard errors large, and as large as was asked for.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use trapline_trace::{Catalog, Damage, Estimate, Pace, paces};

use crate::{
    Outcome, color,
    info::print,
    report::{duration, lost_json, warn},
};

/// Of the JSON form. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Standard errors. By chance alone, one function in a million would be named.
const SURE: f64 = 5.0;

/// A function that is called less often tells nothing about its time.
const MIN_CALLS: u64 = 32;

/// What two runs differ in at least, as a part of the time, whatever the functions say.
const LEAST_SPREAD: f64 = 0.005;

/// What recording takes of the time that a function runs itself, for its own call and for each one that it makes: about so many nanoseconds. From run to run, that changes by
/// this part of it, as with what the caches hold.
const EVENT_NS: f64 = 25.0;
const EVENT_SPREAD: f64 = 0.15;

/// If so few functions can be compared, their spread says little, and this is taken.
const FEW: usize = 8;
const SPREAD_OF_FEW: f64 = 0.015;

/// Compares two traces of a program: what got slower or faster, is called more or less often, is new or gone.
///
/// Times are those that a function ran itself, without what it called. A difference is shown only if it is sure: five standard errors, estimated from the spread within both
/// runs and among functions. What changed for all functions alike, as by another clock rate, is told once and taken off.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// The trace to compare with
    #[arg(value_name = "BEFORE")]
    before: PathBuf,
    /// The trace that is compared
    #[arg(value_name = "AFTER")]
    after: PathBuf,
    /// Leave out changes of less than so many percent
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    min_change: f64,
    /// Show so many functions of each kind at most
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// End with status 1 if a function got slower
    #[arg(long)]
    check: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  trapline record -o before.data -- ./old; trapline record -o after.data -- ./new
  trapline diff before.data after.data
  trapline diff before.data after.data --min-change 10 --check";

/// One trace.
struct Side {
    /// By name and module. Times are nanoseconds.
    functions: BTreeMap<(String, String), Function>,
    /// All that could have been called.
    known: HashSet<(String, String)>,
    catalog: Catalog,
    damage: Damage,
}

struct Function {
    pace: Pace,
    /// What turns ticks into nanoseconds, as a logarithm.
    unit: f64,
}

/// The answer. Each list has the largest differences first.
#[derive(Default)]
struct Answer {
    /// What most functions' times changed by, as a logarithm; `None` if none could be compared.
    common: Option<f64>,
    compared: usize,
    slower: Vec<Change>,
    faster: Vec<Change>,
    more: Vec<Count>,
    fewer: Vec<Count>,
    new: Vec<Count>,
    gone: Vec<Count>,
    /// Functions that were called in both, too seldom to compare their times.
    seldom: usize,
}

/// A function whose time changed. Times are nanoseconds.
struct Change {
    name: (String, String),
    /// Of the mean, or of a typical call.
    is_typical: bool,
    before_ns: f64,
    after_ns: f64,
    /// What of the change is not common, and its standard error, as logarithms.
    shift: f64,
    error: f64,
    /// What that makes in all calls.
    cost_ns: f64,
}

/// A function whose number of calls changed.
struct Count {
    name: (String, String),
    before: u64,
    after: u64,
    /// It is not in the other trace's program.
    is_code: bool,
}

/// Reads both traces and prints the answer.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let [before, after] = [read(&arguments.before)?, read(&arguments.after)?];
    let mut answer = compare(&before, &after, (1.0 + arguments.min_change / 100.0).ln());
    if let Some(limit) = arguments.limit {
        answer.limit(limit);
    }
    let text = if arguments.json { format!("{}\n", answer.json(&before, &after)) } else { answer.told(arguments) };
    print(&text)?;
    let is_bad = arguments.check && !answer.slower.is_empty();
    Ok(if is_bad { Outcome::Bad } else { Outcome::Good })
}

fn read(path: &Path) -> Result<Side> {
    const TICKS: u64 = 1 << 40;
    let (paces, catalog, damage) = paces(path)?;
    warn(&damage, &catalog);
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let unit = (catalog.clock().ns(TICKS).max(1) as f64 / TICKS as f64).ln();
    let key = |name: String, path: &str| (name, path.rsplit('/').next().unwrap_or_default().to_owned());
    let mut functions: BTreeMap<(String, String), Function> = BTreeMap::new();
    for pace in paces {
        let found = catalog.function(pace.site);
        functions
            .entry(key(found.name(), found.module_path()))
            .and_modify(|function| function.pace.merge(&pace))
            .or_insert(Function { pace, unit });
    }
    let known = catalog.functions().map(|found| key(found.name(), found.module_path())).collect();
    Ok(Side { functions, known, catalog, damage })
}

/// What kind of mean is compared.
type Kind = fn(&Pace) -> Option<Estimate>;
const KINDS: [(Kind, bool); 2] = [(Pace::mean, false), (Pace::typical, true)];

fn compare(before: &Side, after: &Side, least: f64) -> Answer {
    let mut answer = Answer::default();
    let in_both: Vec<(&(String, String), &Function, &Function)> =
        before.functions.iter().filter_map(|(name, old)| Some((name, old, after.functions.get(name)?))).collect();
    let is_enough = |function: &Function| function.pace.calls >= MIN_CALLS;
    let (often, seldom): (Vec<_>, Vec<_>) =
        in_both.iter().copied().partition(|(_, old, new)| is_enough(old) && is_enough(new));
    answer.seldom = seldom.len();
    let mut changes: BTreeMap<&(String, String), Change> = BTreeMap::new();
    for (kind, is_typical) in KINDS {
        let shifts: Vec<_> = often
            .iter()
            .filter_map(|(name, old, new)| shift(kind, old, new).map(|shift| (name, old, new, shift)))
            .collect();
        let (common, spread) = common(shifts.iter().map(|(.., shift)| shift.logarithm).collect());
        if is_typical {
            (answer.common, answer.compared) = ((!shifts.is_empty()).then_some(common), shifts.len());
        }
        for (name, old, new, shift) in shifts {
            let (shift, error) = (shift.logarithm - common, shift.error.hypot(spread));
            if shift.abs() < least || shift.abs() < SURE * error {
                continue;
            }
            let ns =
                |function: &Function| kind(&function.pace).map_or(0.0, |own| (own.logarithm + function.unit).exp());
            let (before_ns, after_ns) = (ns(old), ns(new));
            #[expect(clippy::cast_precision_loss, reason = "for people")]
            let cost_ns = (after_ns - after_ns / shift.exp()) * new.pace.calls as f64;
            let change = Change { name: (*name).clone(), is_typical, before_ns, after_ns, shift, error, cost_ns };
            // The surer one tells.
            let sureness = |change: &Change| change.shift.abs() / change.error;
            match changes.get(name) {
                Some(known) if sureness(known) >= sureness(&change) => {}
                _ => drop(changes.insert(name, change)),
            }
        }
    }
    (answer.slower, answer.faster) = changes.into_values().partition(|change| change.shift > 0.0);
    for changes in [&mut answer.slower, &mut answer.faster] {
        changes.sort_by(|a, b| b.cost_ns.abs().total_cmp(&a.cost_ns.abs()));
    }
    answer.count(before, after, least);
    answer
}

/// How a function's time changed, and how sure that is by the spread within the runs.
fn shift(kind: Kind, old: &Function, new: &Function) -> Option<Estimate> {
    let (before, after) = (kind(&old.pace)?, kind(&new.pace)?);
    let logarithm = after.logarithm + new.unit - before.logarithm - old.unit;
    let recorder = EVENT_SPREAD * old.recorders_part().max(new.recorders_part());
    Some(Estimate { logarithm, error: before.error.hypot(after.error).hypot(recorder) })
}

impl Function {
    /// What part of its time is the recorder's.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn recorders_part(&self) -> f64 {
        let own_ns = self.pace.own.max(1) as f64 * self.unit.exp();
        ((self.pace.calls + self.pace.callees) as f64 * EVENT_NS / own_ns).min(1.0)
    }
}

/// What changes have in common, and how far they are from it: the median, and the median distance as a standard deviation.
fn common(mut changes: Vec<f64>) -> (f64, f64) {
    /// Of a normal distribution.
    const DEVIATION_OF_MEDIAN: f64 = 1.4826;
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    let middle = median(&mut changes);
    let mut distances: Vec<f64> = changes.iter().map(|change| (change - middle).abs()).collect();
    let spread = DEVIATION_OF_MEDIAN * median(&mut distances);
    let least = if changes.len() < FEW { SPREAD_OF_FEW } else { LEAST_SPREAD };
    // Of few, half may have changed.
    (if changes.len() < 3 { 0.0 } else { middle }, spread.max(least))
}

impl Answer {
    /// Compares numbers of calls. Where chance has a part in them, they spread like the root of their number at least.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn count(&mut self, before: &Side, after: &Side, least: f64) {
        let names: HashSet<&(String, String)> = before.functions.keys().chain(after.functions.keys()).collect();
        for name in names {
            let calls = |side: &Side| side.functions.get(name).map_or(0, |function| function.pace.calls);
            let (old, new) = (calls(before), calls(after));
            let is_code = !before.known.contains(name) || !after.known.contains(name);
            let difference = (new as f64 - old as f64).abs();
            let is_sure = difference > SURE * (new as f64 + old as f64).sqrt();
            let is_large = (new.max(1) as f64 / old.max(1) as f64).ln().abs() >= least;
            let count = Count { name: name.clone(), before: old, after: new, is_code };
            match (old, new) {
                (0, _) if is_code || is_sure => self.new.push(count),
                (_, 0) if is_code || is_sure => self.gone.push(count),
                _ if !is_sure || !is_large => {}
                _ if new > old => self.more.push(count),
                _ => self.fewer.push(count),
            }
        }
        for counts in [&mut self.more, &mut self.fewer, &mut self.new, &mut self.gone] {
            counts.sort_by_key(|count| (std::cmp::Reverse(count.before.abs_diff(count.after)), count.name.clone()));
        }
    }

    fn limit(&mut self, limit: usize) {
        for changes in [&mut self.slower, &mut self.faster] {
            changes.truncate(limit);
        }
        for counts in [&mut self.more, &mut self.fewer, &mut self.new, &mut self.gone] {
            counts.truncate(limit);
        }
    }

    fn told(&self, arguments: &Arguments) -> String {
        let mut text = String::new();
        let heading = color::heading();
        if let Some(common) = self.common {
            let _ = writeln!(
                text,
                "in common {:>+8.1} %: the median of {} functions; it is taken off below",
                percent(common),
                self.compared
            );
        }
        for (title, changes) in [("slower", &self.slower), ("faster", &self.faster)] {
            for (index, change) in changes.iter().enumerate() {
                if index == 0 {
                    let _ = writeln!(
                        text,
                        "\n{heading}{title:<10}{:>8}   {:>7} {:>9} {:>9} {:>11}  function{heading:#}",
                        "change", "95 %", "before", "after", "in all"
                    );
                }
                let _ = writeln!(text, "{}", change.line());
            }
        }
        let lists =
            [("more calls", &self.more), ("fewer calls", &self.fewer), ("new", &self.new), ("gone", &self.gone)];
        for (title, counts) in lists {
            for (index, count) in counts.iter().enumerate() {
                if index == 0 {
                    let _ =
                        writeln!(text, "\n{heading}{title:<18} {:>14} {:>14}  function{heading:#}", "before", "after");
                }
                let _ = writeln!(text, "{}", count.line());
            }
        }
        let lists = [&self.more, &self.fewer, &self.new, &self.gone];
        if self.slower.is_empty() && self.faster.is_empty() && lists.iter().all(|counts| counts.is_empty()) {
            let _ = writeln!(text, "no difference that is sure and larger than {} %", arguments.min_change);
        }
        if self.seldom > 0 {
            let _ = writeln!(
                text,
                "\n{} functions were called less than {MIN_CALLS} times; their times are not compared",
                self.seldom
            );
        }
        text
    }

    fn json(&self, before: &Side, after: &Side) -> Value {
        let changes = |changes: &[Change]| -> Value { changes.iter().map(Change::json).collect() };
        let counts = |counts: &[Count]| -> Value { counts.iter().map(Count::json).collect() };
        let lost = |side: &Side| lost_json(&side.catalog, &side.damage);
        json!({
            "version": JSON_VERSION, "common_percent": self.common.map(percent), "compared": self.compared, "seldom": self.seldom,
            "slower": changes(&self.slower), "faster": changes(&self.faster), "more_calls": counts(&self.more),
            "fewer_calls": counts(&self.fewer), "new": counts(&self.new), "gone": counts(&self.gone),
            "lost_before": lost(before), "lost_after": lost(after),
        })
    }
}

impl Change {
    /// Half of the interval in which the change is with a probability of 95 %.
    fn interval_percent(&self) -> f64 {
        100.0 * 1.96 * self.error * self.shift.exp()
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "for people")]
    fn line(&self) -> String {
        let ns = |ns: f64| duration(ns.abs().round() as u64);
        let sign = if self.cost_ns < 0.0 { '-' } else { '+' };
        format!(
            "{:>+16.1} % ±{:>6.1} {:>9} {:>9} {:>11}  {} [{}]{}",
            percent(self.shift),
            self.interval_percent(),
            ns(self.before_ns),
            ns(self.after_ns),
            format!("{sign}{}", ns(self.cost_ns)),
            self.name.0,
            self.name.1,
            if self.is_typical { " (typical call)" } else { "" }
        )
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name.0, "module": self.name.1, "measure": if self.is_typical { "typical" } else { "mean" },
            "before_ns": self.before_ns, "after_ns": self.after_ns, "change_percent": percent(self.shift),
            "interval_95_percent": self.interval_percent(), "standard_errors": self.shift.abs() / self.error,
            "cost_ns": self.cost_ns,
        })
    }
}

impl Count {
    fn line(&self) -> String {
        let note = if self.is_code { " (the other program has no such function)" } else { "" };
        format!("{:<18} {:>14} {:>14}  {} [{}]{note}", "", self.before, self.after, self.name.0, self.name.1)
    }

    fn json(&self) -> Value {
        json!({ "name": self.name.0, "module": self.name.1, "before": self.before, "after": self.after, "other_has_it": !self.is_code })
    }
}

/// A change as people say it.
fn percent(logarithm: f64) -> f64 {
    100.0 * logarithm.exp_m1()
}
