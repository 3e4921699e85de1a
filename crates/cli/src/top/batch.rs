//! Tables of figures, one after another, as text or JSON.
//!
//! Owns [`Printer`], and how numbers are written for people. Invariant: the last table is that of the end, with all that was counted.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Write as _},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use trapline_record::figures::Snapshot;

use super::{
    Shared,
    model::{Row, View},
};
use crate::{record::short, report::duration};

/// Of the JSON objects. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// How soon it is noticed that all is over.
const AT_LEAST: Duration = Duration::from_millis(20);

/// See the module's text.
pub(super) struct Printer {
    pub(super) output: File,
    pub(super) is_json: bool,
    pub(super) limit: usize,
    /// How many tables, if not all.
    pub(super) tables: Option<u64>,
}

impl Printer {
    /// Prints until all is over.
    pub(super) fn run(mut self, shared: &Shared, view: &View, delay: Duration) -> Result<()> {
        let mut before = Snapshot::default();
        let mut printed = 0;
        while !shared.figures.has_begun() && !wait(shared, AT_LEAST) {}
        loop {
            let is_over = wait(shared, delay);
            let has_all = self.tables.is_some_and(|tables| printed >= tables);
            if is_over && (has_all || shared.has_failed()) {
                return Ok(());
            }
            if has_all {
                continue;
            }
            let now = shared.figures.look();
            match self.print(shared, view, &now, &before, is_over) {
                // Whoever reads has seen enough.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    shared.end();
                    self.tables = Some(0);
                }
                printed => printed.context("cannot write to standard output")?,
            }
            printed += 1;
            if is_over {
                return Ok(());
            }
            if self.tables == Some(printed) {
                shared.end();
            }
            before = now;
        }
    }

    fn print(
        &mut self,
        shared: &Shared,
        view: &View,
        now: &Snapshot,
        before: &Snapshot,
        is_last: bool,
    ) -> io::Result<()> {
        let mut rows = view.rows(&shared.figures.modules(), now, before);
        rows.truncate(self.limit);
        let text = if self.is_json { format!("{}\n", to_json(now, &rows, is_last)) } else { to_table(now, &rows) };
        self.output.write_all(text.as_bytes())
    }
}

/// Waits until the next table is due, or all is over, and returns whether it is.
fn wait(shared: &Shared, delay: Duration) -> bool {
    let due = Instant::now() + delay;
    loop {
        if shared.is_over() {
            return true;
        }
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        thread::sleep(left.min(AT_LEAST));
    }
}

fn to_json(now: &Snapshot, rows: &[Row], is_last: bool) -> Value {
    let functions: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name, "module": row.path, "address": row.address, "calls": row.calls, "open": row.open,
                "total_ns": row.total_ns, "self_ns": row.self_ns, "p99_ns": row.p99_ns, "calls_per_s": row.rate,
            })
        })
        .collect();
    json!({
        "version": JSON_VERSION, "elapsed_ns": now.elapsed_ns, "processes": now.processes, "threads": now.threads,
        "uncounted": now.uncounted, "last": is_last, "functions": functions,
    })
}

/// What stands above the rows.
pub(super) fn heading(now: &Snapshot) -> String {
    let plural = |count: usize, one: &str, more: &str| format!("{count} {}", if count == 1 { one } else { more });
    let uncounted = match now.uncounted {
        0 => String::new(),
        count => format!(", {} calls are not counted", short(count)),
    };
    format!(
        "{} after the beginning, {}, {}{uncounted}",
        duration(now.elapsed_ns),
        plural(now.processes, "process", "processes"),
        plural(now.threads, "thread", "threads"),
    )
}

pub(super) fn to_table(now: &Snapshot, rows: &[Row]) -> String {
    let mut text = format!("{}\n", heading(now));
    let _ = writeln!(text, "{:>9} {:>14} {:>9} {:>9} {:>9}  function", "calls/s", "calls", "total", "self", "p99");
    for row in rows {
        let [total, p99] = [row.total_ns, row.p99_ns].map(|ns| ns.map_or_else(|| "-".to_owned(), duration));
        let open = if row.open > 0 { format!(" ({} open)", row.open) } else { String::new() };
        let _ = writeln!(
            text,
            "{:>9} {:>14} {total:>9} {:>9} {p99:>9}  {} [{}]{open}",
            per_second(row.rate),
            row.calls,
            duration(row.self_ns),
            row.name,
            row.module,
        );
    }
    text.push('\n');
    text
}

/// A rate with at most five characters.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are no less than zero, and for people"
)]
pub(super) fn per_second(rate: f64) -> String {
    short(rate.round() as u64)
}
