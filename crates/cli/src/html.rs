//! `trapline html`: a report as one page for a browser.
//!
//! Owns the options; the page is [`trapline_export::html()`]'s. Invariant: its numbers are those of `trapline report --json` and `trapline info --json`, which are in it as they are printed.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use trapline_export::{Facts, Target, html};
use trapline_trace::profile;

use crate::{
    Outcome, Refused,
    export::{Shown, beside, is_same_file},
    info::describe,
    report::{DEFAULT_TRACE, Field, report_json, rows, warn},
};

/// Writes a report as one page for a browser: functions, flame graph, timeline.
///
/// The page needs no other file and no network. What is selected in one of its views is selected in all of them.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// The trace
    #[arg(short, long, default_value = DEFAULT_TRACE, value_name = "FILE")]
    input: PathBuf,
    /// The page, `-` for standard output; without it, beside the trace, under its name with `.html`
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,
    /// Keep about so many calls one by one on the timeline; if there are more, the shortest ones are merged with their neighbours. A million takes some four megabytes
    #[arg(long, value_name = "CALLS", default_value_t = 12_000_000)]
    detail: u64,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

const EXAMPLES: &str = "\
Examples:
  trapline html                               trapline.html, of trapline.data
  trapline html -i slow.data -o report.html
  trapline html --detail 1000000              a small page of a large trace";

/// Reads the trace and writes the page.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let output = arguments.output.clone().unwrap_or_else(|| beside(&arguments.input, "html"));
    if is_same_file(&arguments.input, &output) {
        let message = format!("{} is the trace itself; name another file with -o", output.display());
        return Err(Refused(message).into());
    }
    let facts = facts(arguments)?;
    let target = Target::new(&output);
    let mut shown = Shown::new(arguments.quiet);
    let result = html(&arguments.input, &facts, arguments.detail, &target, |done, total| shown.progress(done, total));
    shown.end();
    match result {
        Ok(summary) => {
            warn(&summary.damage, &summary.catalog);
            if !arguments.quiet && !target.is_standard_output() {
                eprintln!("[trapline: {} calls in {}; open it in a browser]", summary.calls, output.display());
            }
            Ok(Outcome::Good)
        }
        Err(error) if error.is_closed_pipe() => Ok(Outcome::Good),
        Err(error) => Err(error.into()),
    }
}

/// What the other verbs tell of the trace.
fn facts(arguments: &Arguments) -> Result<Facts> {
    let (info, catalog, _) = describe(&arguments.input)?;
    let profile = profile(&arguments.input)?;
    let rows = rows(&profile, Field::Total);
    let (sites, clock): (Vec<u32>, _) = (rows.iter().map(|row| row.site).collect(), catalog.clock());
    let durations = sites.iter().map(|site| {
        // Functions are in the order of their sites.
        let at = profile.functions.binary_search_by_key(site, |function| function.site).ok();
        let durations = at.iter().flat_map(|at| profile.functions[*at].durations.counts());
        durations.map(|(ticks, count)| (clock.ns(ticks), count)).collect()
    });
    let durations = durations.collect();
    let duration_ns = clock.ns(profile.last_tsc - profile.first_tsc);
    Ok(Facts { info, report: report_json(&profile, &rows), sites, durations, duration_ns })
}
