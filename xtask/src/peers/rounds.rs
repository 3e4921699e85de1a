//! Interleaved rounds: in each, every row does the work once, beside the same program that nobody traces.
//!
//! Owns [`Figures`], what came out for a row. Other programs disturb a machine for seconds at a time, so a cost is compared with what was measured in the same
//! round, and what is reported is the median of the rounds.

use std::time::{Duration, Instant};

use super::{
    bench::{Bench, Flavour, Times},
    tools::Tools,
    tracer::{Events, ROWS, Row, Tool, bare},
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Calls of the fastest rows, for each thread.
    pub(super) calls: u64,
    /// At most.
    pub(super) rounds: usize,
    /// After this, no further round is begun if there are [`LEAST_ROUNDS`].
    pub(super) patience: Duration,
}

/// A median of fewer says nothing.
const LEAST_ROUNDS: usize = 3;

/// What one row's runs came to, by round.
#[derive(Clone, Debug, Default)]
struct Runs {
    /// Nanoseconds a call beyond those of the untraced program of the same round.
    cost_ns: Vec<f64>,
    /// The same of processor time.
    cost_cpu_ns: Vec<f64>,
    to_floor: Vec<f64>,
    to_trapline: Vec<f64>,
    command_s: Vec<f64>,
    bytes: Vec<f64>,
}

/// Medians of a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    /// Nanoseconds a call beyond those that nobody traces.
    pub(super) cost_ns: f64,
    /// The same of processor time: less than the other if the machine had other things to do, or if the tracer waits.
    pub(super) cost_cpu_ns: f64,
    /// Cost beside the floor's, if the row has one.
    pub(super) to_floor: Option<f64>,
    /// Cost beside that of trapline on stock code, if it was measured.
    pub(super) to_trapline: Option<f64>,
    /// The whole command, in nanoseconds for each call.
    pub(super) command_ns: f64,
    /// Bytes of data for each call.
    pub(super) bytes: f64,
}

/// A row and its figures, or why there are none.
pub(super) type Outcome = (Row, Result<Figures, String>);

/// What the rows came to.
#[derive(Debug)]
pub(super) struct Rounds {
    /// In the order of the rows.
    pub(super) rows: Vec<Outcome>,
    /// How many there were.
    pub(super) count: usize,
    /// Nanoseconds of a call that nobody traces.
    pub(super) bare_ns: f64,
}

/// Measures all rows, those first whose tracers can be had and prove that they see every call.
pub(super) fn measure(bench: &Bench, tools: &Tools, threads: u64, extent: Extent) -> Rounds {
    let mut rows: Vec<(Row, Result<Runs, String>)> = ROWS
        .iter()
        .filter(|row| tools.are_asked_for(row.tool))
        .map(|row| {
            let calls = whole_rounds(extent.calls / row.one_in / 5);
            let proof = tools
                .has(row.tool)
                .map_err(str::to_owned)
                .and_then(|()| row.prove(bench, calls, threads).map_err(|error| format!("{error:#}")));
            if let Err(why) = &proof {
                eprintln!("  {} on {}: failed: {why}", row.title, row.flavour.options());
            }
            (*row, proof.map(|()| Runs::default()))
        })
        .collect();
    let begin = Instant::now();
    let mut count = 0;
    let mut bare_ns = Vec::new();
    while count < extent.rounds && (count < LEAST_ROUNDS || begin.elapsed() < extent.patience) {
        count += 1;
        one_round(bench, threads, extent, &mut rows, &mut bare_ns);
        eprintln!("  round {count} with {threads} thread(s): {:.0} s", begin.elapsed().as_secs_f64());
    }
    let rows = rows.into_iter().map(|(row, runs)| (row, runs.map(Runs::figures))).collect();
    Rounds { rows, count, bare_ns: median(&mut bare_ns) }
}

fn one_round(
    bench: &Bench,
    threads: u64,
    extent: Extent,
    rows: &mut [(Row, Result<Runs, String>)],
    bare_ns: &mut Vec<f64>,
) {
    let mut untraced: Vec<(Flavour, Times)> = Vec::new();
    for flavour in rows.iter().map(|(row, _)| row.baseline()).chain([Flavour::Stock]) {
        if untraced.iter().all(|(known, _)| *known != flavour)
            && let Ok(times) = bare(flavour).measure(bench, extent.calls, threads)
        {
            untraced.push((flavour, times));
        }
    }
    let untraced_as = |flavour| untraced.iter().find(|(known, _)| *known == flavour).map(|(_, times)| *times);
    let Some(stock) = untraced_as(Flavour::Stock) else { return };
    bare_ns.push(a_call(stock.wall_ns, extent.calls));
    let mut floors: Vec<(Row, f64)> = Vec::new();
    let mut of_trapline: Vec<(Events, f64)> = Vec::new();
    for (row, runs) in rows {
        let Ok(known) = runs else { continue };
        let Some(bare) = untraced_as(row.baseline()) else { continue };
        let calls = whole_rounds(extent.calls / row.one_in);
        let times = match row.measure(bench, calls, threads) {
            Ok(times) => times,
            Err(error) => {
                eprintln!("  {} on {}: failed: {error:#}", row.title, row.flavour.options());
                *runs = Err(format!("{error:#}"));
                continue;
            }
        };
        let beyond = |of: fn(&Times) -> f64| a_call(of(&times), calls) - a_call(of(&bare), extent.calls);
        let cost_ns = beyond(|times| times.wall_ns);
        if row.tool == Tool::Floor {
            floors.push((*row, cost_ns));
        }
        if row.tool == Tool::Trapline && row.flavour == Flavour::Stock {
            of_trapline.push((row.events, cost_ns));
        }
        let floor = floors.iter().find(|(floor, _)| floor.is_floor_of(row));
        let ours = of_trapline.iter().find(|(events, _)| *events == row.events);
        known.to_floor.extend(floor.map(|(_, floor)| cost_ns / floor));
        known.to_trapline.extend(ours.map(|(_, ours)| cost_ns / ours));
        known.cost_ns.push(cost_ns);
        known.cost_cpu_ns.push(beyond(|times| times.cpu_ns));
        known.command_s.push(a_call(times.command.as_secs_f64() * 1e9, calls * threads));
        known.bytes.push(a_call(bytes(bench.data_bytes()), calls * threads));
    }
}

impl Runs {
    fn figures(mut self) -> Figures {
        let some = |values: &mut Vec<f64>| (!values.is_empty()).then(|| median(values));
        Figures {
            cost_ns: median(&mut self.cost_ns),
            cost_cpu_ns: median(&mut self.cost_cpu_ns),
            to_floor: some(&mut self.to_floor),
            to_trapline: some(&mut self.to_trapline),
            command_ns: median(&mut self.command_s),
            bytes: median(&mut self.bytes),
        }
    }
}

/// The work comes in tens of calls.
fn whole_rounds(calls: u64) -> u64 {
    calls.next_multiple_of(10)
}

#[expect(clippy::cast_precision_loss, reason = "calls are far fewer than 2^53")]
fn a_call(total: f64, calls: u64) -> f64 {
    total / calls as f64
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn bytes(count: u64) -> f64 {
    count as f64
}

/// The middle one, or the mean of the two in the middle; not a number if there is none.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_disturbed_round_does_not_move_a_median() {
        assert!((median(&mut [3.0, 1.0, 900.0]) - 3.0).abs() < f64::EPSILON);
        assert!((median(&mut [1.0, 2.0]) - 1.5).abs() < f64::EPSILON);
        assert!(median(&mut []).is_nan());
    }
}
