//! `trapline graph`: who calls a function and whom it calls, with calls and times.
//!
//! Owns the options, the two trees of a function and both forms of them; the stacks are [`trapline_trace::stacks()`]'s. A tree of [`Branch`]es is merged from all
//! stacks that the function is on. Invariant: the calls of the first level of callers add up to the function's, and so do their times.

use std::{collections::BTreeMap, fmt::Write as _, path::PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use trapline_process::{Addr, Filter};
use trapline_trace::{Catalog, Clock, Node, Stacks, stacks};

use crate::{
    Outcome, color,
    info::print,
    names::near,
    report::{DEFAULT_TRACE, duration, lost_json, warn},
};

/// Of the JSON form. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Shows who calls a function and whom it calls, as trees with calls and times.
///
/// A caller's calls and time are those of the function, as far as it was called from there. If the function calls itself, the time of the outermost call counts.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  trapline graph main\n  trapline graph 'parse_*' -D 2 --json")]
pub(crate) struct Arguments {
    /// The function: its name, or a pattern; each function that matches is shown
    #[arg(value_name = "FUNCTION")]
    function: String,
    /// The trace
    #[arg(short, long, default_value = DEFAULT_TRACE, value_name = "FILE")]
    input: PathBuf,
    /// So many levels of callers and of callees at most
    #[arg(short = 'D', long, value_name = "DEPTH", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    depth: u32,
    /// Leave out branches that have less than so many percent of the function's time
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    min: f64,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// A function in one of the trees. Times are ticks.
#[derive(Default)]
struct Branch {
    calls: u64,
    total: u64,
    /// By their functions' sites. `None`: nobody is known.
    branches: BTreeMap<Option<u32>, Branch>,
}

/// A function with its trees.
struct Shown {
    site: u32,
    /// Ticks that it ran without what it called.
    own: u64,
    /// Whom it calls.
    down: Branch,
    /// Who calls it.
    up: Branch,
}

/// Reads the trace and prints the trees.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let (stacks, catalog, damage) = stacks(&arguments.input)?;
    warn(&damage, &catalog);
    let filter = Filter::name(&arguments.function);
    let mut called: Vec<u32> = stacks.nodes().iter().map(|node| node.function).collect();
    called.sort_unstable();
    called.dedup();
    let is_meant = |site: &u32| filter.matches(&catalog.function(*site).name(), Addr::from(0));
    let meant: Vec<u32> = called.iter().copied().filter(is_meant).collect();
    if meant.is_empty() {
        let names = catalog.functions().filter_map(|found| found.function).map(|function| function.name.as_str());
        bail!("no function was called whose name matches `{}`{}", arguments.function, near(&arguments.function, names));
    }
    let shown = trees(&stacks, &meant, arguments.depth);
    let clock = catalog.clock();
    let text = if arguments.json {
        let functions: Vec<Value> = shown.iter().map(|shown| shown.json(&catalog, clock)).collect();
        let lost = lost_json(&catalog, &damage);
        format!("{}\n", json!({ "version": JSON_VERSION, "functions": functions, "lost": lost }))
    } else {
        let told: Vec<String> = shown.iter().map(|shown| shown.told(&catalog, clock, arguments.min)).collect();
        told.join("\n")
    };
    print(&text)?;
    Ok(Outcome::Good)
}

/// The trees of some functions.
fn trees(stacks: &Stacks, meant: &[u32], depth: u32) -> Vec<Shown> {
    let (nodes, totals) = (stacks.nodes(), stacks.totals());
    let mut shown: Vec<Shown> = meant
        .iter()
        .map(|site| Shown { site: *site, own: 0, down: Branch::default(), up: Branch::default() })
        .collect();
    for (node, total) in nodes.iter().zip(&totals) {
        // Upwards, for the function itself.
        if let Ok(index) = meant.binary_search(&node.function) {
            let is_outermost = stacks.callers(node).skip(1).all(|caller| caller.function != node.function);
            shown[index].own += node.own;
            shown[index].up.add_callers(stacks, node, if is_outermost { *total } else { 0 }, depth);
        }
        // Downwards, for each function that the stack is below of, from its outermost call on.
        let mut path: Vec<u32> = stacks.callers(node).map(|node| node.function).collect();
        path.reverse();
        for (index, site) in meant.iter().enumerate() {
            let Some(outermost) = path.iter().position(|function| function == site) else { continue };
            shown[index].down.add(&path[outermost + 1..], node, *total, depth);
        }
    }
    shown
}

impl Branch {
    /// Counts a stack whose path from here is this.
    fn add(&mut self, path: &[u32], node: &Node, total: u64, depth: u32) {
        match path.split_first() {
            None => {
                self.calls += node.calls;
                self.total += total;
            }
            Some((next, rest)) if depth > 0 => {
                self.branches.entry(Some(*next)).or_default().add(rest, node, total, depth - 1);
            }
            Some(_) => {}
        }
    }

    /// Counts who called a stack's function, level by level.
    fn add_callers(&mut self, stacks: &Stacks, node: &Node, total: u64, depth: u32) {
        let callers = stacks.callers(node).skip(1).map(|caller| Some(caller.function)).chain([None]);
        let mut branch = self;
        branch.calls += node.calls;
        branch.total += total;
        for caller in callers.take(depth as usize) {
            branch = branch.branches.entry(caller).or_default();
            branch.calls += node.calls;
            branch.total += total;
        }
    }

    /// The branches, those with most time first.
    fn sorted(&self) -> Vec<(Option<u32>, &Branch)> {
        let mut sorted: Vec<_> = self.branches.iter().map(|(site, branch)| (*site, branch)).collect();
        sorted.sort_by_key(|(site, branch)| (std::cmp::Reverse((branch.total, branch.calls)), *site));
        sorted
    }

    fn lines(&self, catalog: &Catalog, clock: Clock, level: usize, least: u64, text: &mut String) {
        for (site, branch) in self.sorted().into_iter().filter(|(_, branch)| branch.total >= least) {
            let (calls, total) = (branch.calls, duration(clock.ns(branch.total)));
            let _ = writeln!(text, "{calls:>12} {total:>10}  {:width$}{}", "", name(catalog, site), width = 2 * level);
            branch.lines(catalog, clock, level + 1, least, text);
        }
    }

    fn json(&self, catalog: &Catalog, clock: Clock, key: &str) -> Value {
        let branches = self.sorted().into_iter().map(|(site, branch)| {
            let (calls, total) = (branch.calls, clock.ns(branch.total));
            let own = site.map(|site| catalog.function(site));
            json!({
                "name": own.map(|found| found.name()), "module": own.map(|found| found.module_path().to_owned()),
                "calls": calls, "total_ns": total, key: branch.json(catalog, clock, key),
            })
        });
        branches.collect()
    }
}

fn name(catalog: &Catalog, site: Option<u32>) -> String {
    site.map_or_else(|| "(nobody who was recorded)".to_owned(), |site| catalog.function(site).name())
}

impl Shown {
    fn told(&self, catalog: &Catalog, clock: Clock, min_percent: f64) -> String {
        let found = catalog.function(self.site);
        let module = found.module_path().rsplit('/').next().unwrap_or_default();
        let (total, own) = (duration(clock.ns(self.up.total)), duration(clock.ns(self.own)));
        let heading = color::heading();
        let mut text = format!(
            "{heading}{}{heading:#} [{module}]: {} calls, {total} in all, {own} itself\n\n{heading}is called by{heading:#}\n{:>12} {:>10}  function\n",
            found.name(),
            self.up.calls,
            "calls",
            "time"
        );
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a limit that people give in percent"
        )]
        let least = (self.up.total as f64 * min_percent / 100.0) as u64;
        self.up.lines(catalog, clock, 0, least, &mut text);
        if self.down.branches.is_empty() {
            text += "\ncalls nothing that was recorded\n";
        } else {
            let _ = writeln!(text, "\n{heading}calls{heading:#}\n{:>12} {:>10}  function", "calls", "time");
            self.down.lines(catalog, clock, 0, least, &mut text);
        }
        text
    }

    fn json(&self, catalog: &Catalog, clock: Clock) -> Value {
        let found = catalog.function(self.site);
        json!({
            "name": found.name(), "module": found.module_path(), "calls": self.up.calls,
            "total_ns": clock.ns(self.up.total), "self_ns": clock.ns(self.own),
            "callers": self.up.json(catalog, clock, "callers"), "callees": self.down.json(catalog, clock, "callees"),
        })
    }
}
