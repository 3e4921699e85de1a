//! What is shown of figures: which rows, in which order.
//!
//! Owns [`View`], what somebody wants to see, and [`Row`]. Nothing is drawn or printed here. Invariant: a row's numbers are those of the figures; only which rows there are, and their
//! order, is a matter of the view.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    sync::Arc,
};

use clap::ValueEnum;
use trapline_record::figures::{Figure, Module, Snapshot};

/// What rows are sorted by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum Field {
    /// Calls a second, since the last look
    Rate,
    /// All calls
    Calls,
    /// Time with what was called
    Total,
    /// Time without what was called
    #[value(name = "self")]
    Own,
    /// What 99 of 100 calls did not exceed
    P99,
    /// The function's name
    Name,
}

/// A function, or a module that is folded. Times are nanoseconds.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Row {
    /// The functions that it stands for.
    pub(super) sites: Vec<u32>,
    pub(super) name: String,
    /// The module's file name; empty for a module.
    pub(super) module: String,
    /// The module's whole path.
    pub(super) path: String,
    pub(super) address: u64,
    pub(super) calls: u64,
    pub(super) open: u64,
    /// `None` for a module, whose functions call each other.
    pub(super) total_ns: Option<u64>,
    pub(super) self_ns: u64,
    pub(super) p99_ns: Option<u64>,
    /// Calls a second since the last look.
    pub(super) rate: f64,
    /// Whether it is switched off: its functions, all of them.
    pub(super) is_off: bool,
}

/// What somebody wants to see.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) sort: Field,
    /// Only names that have this in them, whatever the case.
    pub(super) search: String,
    /// Modules, and not their functions.
    pub(super) is_folded: bool,
    /// Sites that are switched off.
    pub(super) off: HashSet<u32>,
}

impl View {
    pub(super) fn new(sort: Field) -> Self {
        Self { sort, search: String::new(), is_folded: false, off: HashSet::new() }
    }

    /// The rows of a look, `before` which there was another one.
    pub(super) fn rows(&self, modules: &[Arc<Module>], now: &Snapshot, before: &Snapshot) -> Vec<Row> {
        let calls_before: HashMap<u32, u64> = before.figures.iter().map(|figure| (figure.site, figure.calls)).collect();
        let passed_ns = now.elapsed_ns.saturating_sub(before.elapsed_ns);
        let functions = now.figures.iter().map(|figure| {
            let came = figure.calls.saturating_sub(calls_before.get(&figure.site).copied().unwrap_or(0));
            self.row(modules, figure, rate(came, passed_ns))
        });
        let search = self.search.to_lowercase();
        let is_wanted = |row: &Row| search.is_empty() || row.name.to_lowercase().contains(&search);
        let mut rows: Vec<Row> = if self.is_folded {
            fold(functions).into_iter().filter(is_wanted).collect()
        } else {
            functions.filter(is_wanted).collect()
        };
        self.sort(&mut rows);
        rows
    }

    fn row(&self, modules: &[Arc<Module>], figure: &Figure, rate: f64) -> Row {
        let known = modules.partition_point(|module| module.first_site <= figure.site);
        let module = known.checked_sub(1).and_then(|index| modules.get(index));
        let function = module.and_then(|module| module.functions.get((figure.site - module.first_site) as usize));
        let path = module.map_or("?", |module| module.path.as_str());
        Row {
            sites: vec![figure.site],
            name: function.map_or_else(|| format!("site {}", figure.site), |function| function.name.clone()),
            module: file_name(path).to_owned(),
            path: path.to_owned(),
            address: function.map_or(0, |function| function.address),
            calls: figure.calls,
            open: figure.open,
            total_ns: Some(figure.total_ns),
            self_ns: figure.self_ns,
            p99_ns: figure.p99_ns,
            rate,
            is_off: self.off.contains(&figure.site),
        }
    }

    fn sort(&self, rows: &mut [Row]) {
        // Equal ones stay where they are from one look to the next.
        rows.sort_by(|a, b| (&a.name, &a.path, a.address).cmp(&(&b.name, &b.path, b.address)));
        match self.sort {
            Field::Name => {}
            Field::Rate => rows.sort_by(|a, b| b.rate.total_cmp(&a.rate)),
            Field::Calls => rows.sort_by_key(|row| Reverse(row.calls)),
            Field::Total => rows.sort_by_key(|row| Reverse(row.total_ns.unwrap_or(row.self_ns))),
            Field::Own => rows.sort_by_key(|row| Reverse(row.self_ns)),
            Field::P99 => rows.sort_by_key(|row| Reverse(row.p99_ns)),
        }
    }
}

/// One row for each module.
fn fold(functions: impl Iterator<Item = Row>) -> Vec<Row> {
    let mut modules: HashMap<String, Row> = HashMap::new();
    for row in functions {
        let module = modules.entry(row.path.clone()).or_insert_with(|| Row {
            sites: Vec::new(),
            name: row.module.clone(),
            module: String::new(),
            path: row.path.clone(),
            address: 0,
            calls: 0,
            open: 0,
            total_ns: None,
            self_ns: 0,
            p99_ns: None,
            rate: 0.0,
            is_off: true,
        });
        module.sites.extend(row.sites);
        module.calls += row.calls;
        module.open += row.open;
        module.self_ns += row.self_ns;
        module.rate += row.rate;
        module.is_off &= row.is_off;
    }
    modules.into_values().collect()
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn rate(calls: u64, passed_ns: u64) -> f64 {
    if passed_ns == 0 { 0.0 } else { calls as f64 * 1e9 / passed_ns as f64 }
}

#[cfg(test)]
mod tests {
    use trapline_record::figures::Function;

    use super::*;

    fn modules() -> Vec<Arc<Module>> {
        let module = |path: &str, first_site, names: &[&str]| {
            let functions = names.iter().map(|name| Function { name: (*name).to_owned(), address: 16 });
            Arc::new(Module { path: path.to_owned(), first_site, functions: functions.collect() })
        };
        vec![module("/bin/prog", 0, &["main", "work", "other"]), module("/lib/libwork.so", 3, &["lib_work"])]
    }

    fn snapshot(elapsed_ns: u64, calls: [u64; 4]) -> Snapshot {
        let figure = |(site, calls): (u32, &u64)| Figure {
            site,
            calls: *calls,
            open: u64::from(site == 0),
            total_ns: 100 * calls,
            self_ns: 1000 - u64::from(site),
            p99_ns: (site != 0).then_some(u64::from(site)),
        };
        Snapshot { figures: (0..).zip(&calls).map(figure).collect(), elapsed_ns, ..Snapshot::default() }
    }

    fn names(view: &View) -> Vec<String> {
        let (before, now) = (snapshot(0, [1, 10, 0, 5]), snapshot(2_000_000_000, [1, 30, 8, 105]));
        view.rows(&modules(), &now, &before).into_iter().map(|row| row.name).collect()
    }

    #[test]
    fn rows_come_in_the_order_that_was_asked_for() {
        let of = |sort| names(&View::new(sort));
        assert_eq!(of(Field::Rate), ["lib_work", "work", "other", "main"]);
        assert_eq!(of(Field::Own), ["main", "work", "other", "lib_work"]);
        assert_eq!(of(Field::P99), ["lib_work", "other", "work", "main"]);
        assert_eq!(of(Field::Name), ["lib_work", "main", "other", "work"]);
    }

    #[test]
    fn a_rate_is_what_came_between_two_looks() {
        let (before, now) = (snapshot(0, [1, 10, 0, 5]), snapshot(2_000_000_000, [1, 30, 8, 105]));
        let rows = View::new(Field::Rate).rows(&modules(), &now, &before);
        let rates: Vec<String> = rows.iter().map(|row| format!("{} {:.1}", row.name, row.rate)).collect();
        assert_eq!(rates, ["lib_work 50.0", "work 10.0", "other 4.0", "main 0.0"]);
    }

    #[test]
    fn a_search_keeps_what_has_the_text_and_a_fold_sums_what_can_be_summed() {
        let mut view = View { search: "WORK".to_owned(), ..View::new(Field::Calls) };
        assert_eq!(names(&view), ["lib_work", "work"]);
        (view.search, view.is_folded) = (String::new(), true);
        view.off.extend([0, 1, 3]);
        let rows = view.rows(&modules(), &snapshot(1, [1, 2, 3, 4]), &Snapshot::default());
        let found: Vec<_> = rows.iter().map(|row| (&*row.name, row.calls, row.self_ns, row.open, row.is_off)).collect();
        assert_eq!(found, [("prog", 6, 2997, 1, false), ("libwork.so", 4, 997, 0, true)]);
        assert!(rows.iter().all(|row| row.total_ns.is_none() && row.p99_ns.is_none()), "functions call each other");
    }
}
