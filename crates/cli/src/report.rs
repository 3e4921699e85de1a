//! `trapline report`: how often each function was called, and how long that took.
//!
//! Owns the options, the order and the two forms of the report; the counting is [`trapline_trace::profile`]. Invariant: with `--json` standard output holds
//! exactly one object; what is missing in the trace is told on standard error as well.

use std::{cmp::Reverse, fmt::Write as _, path::PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use trapline_trace::{Catalog, Damage, FunctionProfile, Profile, profile};

use crate::{Outcome, color, info::print};

/// Of the JSON report. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Where a trace is looked for.
pub(crate) const DEFAULT_TRACE: &str = "trapline.data";

/// Shows calls, total time and time without callees of each function that was called.
///
/// A call that was still running at the end of its thread's events counts as if it had ended then ("open"). The total of a function that calls itself
/// counts the outermost call only. Percentiles are wrong by at most 1.6 %.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  trapline report --sort self --limit 20")]
pub(crate) struct Arguments {
    /// The trace.
    #[arg(short, long, default_value = DEFAULT_TRACE, value_name = "FILE")]
    input: PathBuf,
    /// What the functions are sorted by, the greatest first; names and modules alphabetically.
    #[arg(long, value_enum, default_value_t = Field::Total)]
    sort: Field,
    /// Show so many functions at most.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Field {
    Calls,
    Total,
    #[value(name = "self")]
    Own,
    Min,
    Avg,
    Max,
    P50,
    P99,
    Name,
    Module,
}

/// A function as it is shown. Times are nanoseconds.
pub(crate) struct Row {
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for pages, which the 64-bit command writes"))]
    pub(crate) site: u32,
    name: String,
    module: String,
    address: u64,
    calls: u64,
    open: u64,
    total: u64,
    own: u64,
    sum: u64,
    min: Option<u64>,
    avg: Option<u64>,
    max: Option<u64>,
    p50: Option<u64>,
    p99: Option<u64>,
}

/// Reads the trace and prints the report.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let profile = profile(&arguments.input)?;
    let mut rows = rows(&profile, arguments.sort);
    rows.truncate(arguments.limit.unwrap_or(usize::MAX));
    warn(&profile.damage, &profile.catalog);
    let text = if arguments.json { format!("{}\n", report_json(&profile, &rows)) } else { table(&rows) };
    print(&text)?;
    Ok(Outcome::Good)
}

/// All functions that were called, in this order.
pub(crate) fn rows(profile: &Profile, field: Field) -> Vec<Row> {
    let mut rows: Vec<Row> = profile.functions.iter().map(|function| row(&profile.catalog, function)).collect();
    sort(&mut rows, field);
    rows
}

fn row(catalog: &Catalog, function: &FunctionProfile) -> Row {
    let clock = catalog.clock();
    let timed = |ticks: u64| (function.timed > 0).then(|| clock.ns(ticks));
    let found = catalog.function(function.site);
    Row {
        site: function.site,
        name: found.name(),
        module: found.module_path().to_owned(),
        address: found.function.map_or(0, |function| function.address),
        calls: function.calls,
        open: function.open,
        total: clock.ns(function.total_ticks),
        own: clock.ns(function.self_ticks),
        sum: clock.ns(function.sum_ticks),
        min: timed(function.min_ticks),
        avg: function.average_ticks().map(|ticks| clock.ns(ticks)),
        max: timed(function.max_ticks),
        p50: function.percentile_ticks(500).map(|ticks| clock.ns(ticks)),
        p99: function.percentile_ticks(990).map(|ticks| clock.ns(ticks)),
    }
}

fn sort(rows: &mut [Row], field: Field) {
    match field {
        Field::Calls => rows.sort_by_key(|row| Reverse(row.calls)),
        Field::Total => rows.sort_by_key(|row| Reverse((row.total, row.calls))),
        Field::Own => rows.sort_by_key(|row| Reverse(row.own)),
        Field::Min => rows.sort_by_key(|row| Reverse(row.min)),
        Field::Avg => rows.sort_by_key(|row| Reverse(row.avg)),
        Field::Max => rows.sort_by_key(|row| Reverse(row.max)),
        Field::P50 => rows.sort_by_key(|row| Reverse(row.p50)),
        Field::P99 => rows.sort_by_key(|row| Reverse(row.p99)),
        Field::Name => rows.sort_by(|a, b| a.name.cmp(&b.name)),
        Field::Module => rows.sort_by(|a, b| (&a.module, &a.name).cmp(&(&b.module, &b.name))),
    }
}

/// What `--json` prints.
pub(crate) fn report_json(profile: &Profile, rows: &[Row]) -> Value {
    let functions: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name, "module": row.module, "address": row.address, "calls": row.calls, "open": row.open,
                "total_ns": row.total, "self_ns": row.own, "sum_ns": row.sum, "min_ns": row.min, "avg_ns": row.avg, "max_ns": row.max,
                "p50_ns": row.p50, "p99_ns": row.p99,
            })
        })
        .collect();
    json!({ "version": JSON_VERSION, "functions": functions, "lost": lost_json(&profile.catalog, &profile.damage) })
}

/// What is missing, by cause.
pub(crate) fn lost_json(catalog: &Catalog, damage: &Damage) -> Value {
    let losses = &catalog.losses;
    let mut lost = json!({
        "full": losses.full, "overwritten": losses.overwritten, "torn": losses.torn, "unwritten": losses.unwritten,
        "unhooked": losses.unhooked, "waited_ns": losses.waited_ns, "damaged_bytes": damage.skipped_bytes,
        "damaged_records": damage.missing_records, "finished": damage.is_finished,
    });
    for (cause, count) in &losses.other {
        lost[cause] = json!(count);
    }
    lost
}

/// Tells on standard error what the trace lacks.
pub(crate) fn warn(damage: &Damage, catalog: &Catalog) {
    let style = color::warning();
    if let Some(at) = damage.first_at {
        eprintln!(
            "{style}trapline:{style:#} the trace is damaged from byte {at} on, in {} place(s): {} bytes were skipped, {} records are known to be missing; the rest was read",
            damage.places, damage.skipped_bytes, damage.missing_records
        );
    } else if !damage.is_finished {
        eprintln!(
            "{style}trapline:{style:#} the trace has no end: its recorder was killed, or it was cut; what is there was read"
        );
    }
    warn_of_senseless(damage.senseless_chunks);
    let lost = catalog.losses.records();
    if lost > 0 {
        eprintln!("{style}trapline:{style:#} {lost} records were lost while recording; `trapline info` tells why");
    }
}

/// Tells of chunks that could be read, and not be understood.
pub(crate) fn warn_of_senseless(chunks: u64) {
    if chunks > 0 {
        let style = color::warning();
        eprintln!("{style}trapline:{style:#} {chunks} chunks make no sense, and were left out");
    }
}

fn table(rows: &[Row]) -> String {
    let heading = color::heading();
    let mut text = format!(
        "{heading}{:>12} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9}  {}{heading:#}\n",
        "calls", "total", "self", "min", "avg", "max", "p50", "p99", "function"
    );
    for row in rows {
        let module = row.module.rsplit('/').next().unwrap_or_default();
        let [min, avg, max, p50, p99] =
            [row.min, row.avg, row.max, row.p50, row.p99].map(|ns| ns.map_or("-".into(), duration));
        let open = if row.open > 0 { format!(" ({} open)", row.open) } else { String::new() };
        let (total, own) = (duration(row.total), duration(row.own));
        let _ = writeln!(
            text,
            "{:>12} {total:>10} {own:>10} {min:>9} {avg:>9} {max:>9} {p50:>9} {p99:>9}  {} [{module}]{open}",
            row.calls, row.name
        );
    }
    text
}

/// A duration with three or four digits and its unit.
#[expect(clippy::cast_precision_loss, reason = "for people to read")]
pub(crate) fn duration(ns: u64) -> String {
    let value = ns as f64;
    match ns {
        0..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{:.2}us", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2}ms", value / 1e6),
        _ => format!("{:.3}s", value / 1e9),
    }
}
