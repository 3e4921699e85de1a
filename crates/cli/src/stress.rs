//! `trapline stress`: whether calls get lost while tracing is switched on and off under load.
//!
//! Owns the options and the two forms of the report; the test itself is [`trapline_stress`]. Invariant: with `--json` standard output holds
//! exactly one object.

use std::{
    fmt::{self, Write as _},
    io::{self, Write as _},
};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum, value_parser};
use serde_json::{Map, Value, json};
use trapline_process::Resume;
use trapline_stress::{
    Account, CONTEXT_NAMES, Damage, FUNCTIONS, MAX_SLOTS, Options, Phase, Report, StressError, Tally, Verdict,
    run as run_stress, strategy_name,
};

use crate::{Outcome, Refused};

/// Of the JSON report. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Calls traced functions under load while ops come and go, and counts what is lost.
///
/// Threads call a thousand traced C functions as fast as they can. Signal handlers interrupt them, and each other, and call traced functions
/// too. Another thread attaches and detaches ops all the while, one, sixteen and a thousand functions at a time. For each single call it is
/// known which ops had to see it; known values are held in all registers across one call in eight. The exit status is 0 only if
/// nothing was missed and nothing corrupted, and 1 if something was.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  trapline stress --seconds 10 --threads 4 --resume slots --json")]
pub(crate) struct Arguments {
    /// For how long, in seconds.
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// How many threads call functions.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// How a call that meets a breakpoint is resumed.
    #[arg(long, value_enum, default_value_t = Strategy::Slots)]
    resume: Strategy,
    /// How many slots a thread may use. With fewer than four, nested signal handlers overflow them, and calls are resumed another way.
    #[arg(long, default_value_t = MAX_SLOTS as u8, value_name = "N", value_parser = value_parser!(u8).range(0..=MAX_SLOTS as i64))]
    slots: u8,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Strategy {
    /// The return address goes through a slot of the thread and an int3 trampoline.
    Slots,
    /// The handler writes it to the interrupted stack (64 bit only).
    Push,
    /// It is passed in register r11 (64 bit only).
    R11,
    /// The call is left out: the old behaviour, which loses calls.
    Skip,
}

impl Strategy {
    fn resume(self) -> Resume {
        match self {
            Self::Slots => Resume::Slots,
            Self::Push => Resume::Push,
            Self::R11 => Resume::R11,
            Self::Skip => Resume::Skip,
        }
    }
}

/// Runs the test and prints its report.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let options = Options {
        seconds: arguments.seconds,
        threads: arguments.threads.into(),
        resume: arguments.resume.resume(),
        slots: arguments.slots.into(),
    };
    let report = run_stress(&options).map_err(|error| match error {
        StressError::Refused(_) => Refused(error.to_string()).into(),
        _ => anyhow::Error::from(error).context("the stress test could not be carried out"),
    })?;
    let text = if arguments.json { format!("{}\n", to_json(&report)) } else { Table(&report).to_string() };
    match io::stdout().write_all(text.as_bytes()) {
        // Nobody reads it, but the status is an answer, too.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.context("cannot write to standard output")?,
    }
    explain(&report);
    Ok(match report.verdict() {
        Verdict::Clean => Outcome::Good,
        Verdict::Failed | Verdict::Idle(_) => Outcome::Bad,
    })
}

/// What has to be said beside the counts, on standard error.
fn explain(report: &Report) {
    if let Verdict::Idle(what) = report.verdict() {
        eprintln!("trapline: nothing is shown by this run: {what}. Let it run for longer, or with more threads.");
    }
    for (name, account) in CONTEXT_NAMES.iter().zip(&report.contexts) {
        let Some(example) = account.example else { continue };
        let damage = match example.damage {
            Damage::Runs => "did not run exactly once for one call".to_owned(),
            Damage::Result => "returned what its arguments do not give".to_owned(),
            Damage::Site => "was reported to an ops as another one".to_owned(),
            Damage::Register(register) => format!("came back with another value in {register}"),
        };
        eprintln!("trapline: {name}: stress_fn_{:04} {damage} (first of {})", example.function, account.corrupted);
    }
}

fn to_json(report: &Report) -> Value {
    let account = report.total();
    let tally = account.total();
    let Options { seconds, threads, resume, slots } = report.options;
    let contexts = CONTEXT_NAMES.iter().zip(&report.contexts).map(|(name, account)| {
        let mut value = tally_json(&account.total());
        value.extend([
            ("ops".to_owned(), account.ops.into()),
            ("held".to_owned(), account.held.into()),
            ("corrupted".to_owned(), account.corrupted.into()),
        ]);
        ((*name).to_owned(), Value::from(value))
    });
    let phases = Phase::ALL.into_iter().zip(&report.pokes).map(|(phase, pokes)| {
        let mut value = tally_json(&report.phase(phase));
        value.insert("pokes".to_owned(), (*pokes).into());
        (phase.name().to_owned(), Value::from(value))
    });
    json!({
        "version": JSON_VERSION,
        "width": report.width,
        "resume": strategy_name(resume),
        "seconds": seconds,
        "threads": threads,
        "slots": slots,
        "calls": tally.calls,
        "ops": account.ops,
        "missed": tally.missed,
        "spurious": tally.spurious,
        "pokes": report.stats.pokes,
        "batches": report.stats.batches,
        "traps": report.stats.traps.traps,
        "max_depth": report.stats.traps.max_depth,
        "overflows": report.stats.traps.overflows,
        "corrupted": account.corrupted,
        "held": account.held,
        "vectors": report.vectors.name(),
        "nesting": report.nesting,
        "text_writer": report.text_writer.to_string(),
        "elapsed_ms": u64::try_from(report.elapsed.as_millis()).unwrap_or(u64::MAX),
        "contexts": contexts.collect::<Map<_, _>>(),
        "phases": phases.collect::<Map<_, _>>(),
    })
}

fn tally_json(tally: &Tally) -> Map<String, Value> {
    let Tally { calls, missed, spurious } = *tally;
    [("calls", calls), ("missed", missed), ("spurious", spurious)]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.into()))
        .collect()
}

/// The report for people.
struct Table<'a>(&'a Report);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.0;
        let account = report.total();
        let tally = account.total();
        let traps = &report.stats.traps;
        writeln!(
            f,
            "{} bit, {}, {} threads, {:.1} s; {FUNCTIONS} functions; text through {}; x87, {} and general registers held\n",
            report.width,
            strategy_name(report.options.resume),
            report.options.threads,
            report.elapsed.as_secs_f64(),
            report.text_writer,
            report.vectors.name(),
        )?;
        for (name, count, note) in [
            ("calls", tally.calls, format!("across {} of them registers were held", grouped(account.held))),
            ("ops invocations", account.ops, String::new()),
            ("pokes", report.stats.pokes, format!("sites rewritten, in {} batches", grouped(report.stats.batches))),
            ("traps", traps.traps, "breakpoints that threads met".to_owned()),
            ("greatest slot depth", traps.max_depth, format!("up to {} signal handlers nested", report.nesting)),
            ("overflows", traps.overflows, "calls for which no slot was left".to_owned()),
            ("missed", tally.missed, "invocations that had to be and were not".to_owned()),
            ("spurious", tally.spurious, "invocations that must not have been".to_owned()),
            ("corrupted", account.corrupted, "calls with damaged registers, arguments or results".to_owned()),
        ] {
            let line = format!("{name:<20}{:>16}  {note}", grouped(count));
            writeln!(f, "{}", line.trim_end())?;
        }
        writeln!(f, "\n{}", row("called from", ["calls", "ops", "missed", "spurious", "corrupted"].map(String::from)))?;
        for (name, account) in CONTEXT_NAMES.iter().zip(&report.contexts) {
            let Account { ops, corrupted, .. } = *account;
            let Tally { calls, missed, spurious } = account.total();
            writeln!(f, "{}", row(name, [calls, ops, missed, spurious, corrupted].map(grouped)))?;
        }
        writeln!(f, "\n{}", row("meanwhile", ["calls", "pokes", "missed", "spurious", ""].map(String::from)))?;
        for (phase, pokes) in Phase::ALL.into_iter().zip(&report.pokes) {
            let Tally { calls, missed, spurious } = report.phase(phase);
            let pokes = if *pokes == 0 { String::new() } else { grouped(*pokes) };
            let counts = [grouped(calls), pokes, grouped(missed), grouped(spurious), String::new()];
            writeln!(f, "{}", row(phase.name(), counts))?;
        }
        let verdict = match report.verdict() {
            Verdict::Clean => "no call was missed, nothing was corrupted",
            Verdict::Failed => "FAILED",
            Verdict::Idle(_) => "nothing is shown",
        };
        writeln!(f, "\n{verdict}")
    }
}

fn row(name: &str, counts: [String; 5]) -> String {
    let mut line = format!("{name:<12}");
    for count in counts {
        let _ = write!(line, "{count:>16}");
    }
    line.truncate(line.trim_end().len());
    line
}

/// Thousands set apart.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(count), text);
        }
    }

    #[test]
    fn strategies_have_the_names_that_reports_give_them() {
        for strategy in Strategy::value_variants() {
            let option = strategy.to_possible_value().expect("none is hidden");
            assert_eq!(option.get_name(), strategy_name(strategy.resume()));
        }
    }
}
