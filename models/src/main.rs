//! `trapline-models`: explores the engine's state machines, then their mutants, and says what it found.
//!
//! Everything is printed to stdout in the order of the lists in [`suite`](trapline_models::suite); two explorations run at once. The exit status is 0
//! only if the real machines hold in every state and every mutant is found.
#![forbid(unsafe_code)]

use std::{
    io::{self, Write},
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};

use trapline_models::{
    explore::Verdict,
    suite::{self, Bounds, Run},
};

const USAGE: &str = "usage: trapline-models [--deep]

Explores every state of the poke protocol and of the slot stack, and finds the mutants.
  --deep   larger bounds: minutes, and several GB";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let bounds = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Bounds::Standard,
        ["--deep"] => Bounds::Deep,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match print_all(bounds, &mut io::stdout().lock()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("trapline-models: cannot write the results: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints everything and returns how many runs did not come out as expected.
fn print_all(bounds: Bounds, out: &mut impl Write) -> io::Result<usize> {
    let begun = Instant::now();
    let mut failures = 0;
    let (real, mutants, harmless) = (suite::real(bounds), suite::mutants(), suite::harmless());

    writeln!(out, "The engine's own machines: every state is visited, and every invariant has to hold.\n")?;
    let mut all_states = 0;
    each_in_order(&real, |run, verdict| {
        all_states += states_of(&verdict);
        failures += print_state_count(run, &verdict, out)?;
        Ok(())
    })?;
    writeln!(out, "\nMutants: each has to be found.")?;
    each_in_order(&mutants, |run, verdict| {
        failures += print_trace(run, &verdict, out)?;
        Ok(())
    })?;
    writeln!(out, "\nMutants where something else covers for them: not found here, but above.\n")?;
    each_in_order(&harmless, |run, verdict| {
        writeln!(out, "  {}", run.title)?;
        failures += print_state_count(run, &verdict, out)?;
        Ok(())
    })?;

    let seconds = begun.elapsed().as_secs_f64();
    writeln!(
        out,
        "\n{} explorations of the real machines, {} states; {} mutants; {failures} not as expected; {seconds:.1} s",
        real.len(),
        grouped(all_states),
        mutants.len(),
    )?;
    Ok(failures)
}

fn print_state_count(run: &Run, verdict: &Verdict, out: &mut impl Write) -> io::Result<usize> {
    let outcome =
        run.complaint(verdict).map_or_else(|| "holds".to_string(), |complaint| format!("FAILED: {complaint}"));
    let transitions = match verdict {
        Verdict::Holds { transitions, .. } => *transitions,
        _ => 0,
    };
    let (states, transitions) = (grouped(states_of(verdict)), grouped(transitions));
    writeln!(out, "  {:<86} {states:>11} states {transitions:>12} steps  {outcome}", run.setting())?;
    if let Verdict::Violated { violation, trace, .. } = verdict {
        print_steps(trace, &violation.what, out)?;
    }
    Ok(usize::from(run.complaint(verdict).is_some()))
}

fn print_trace(run: &Run, verdict: &Verdict, out: &mut impl Write) -> io::Result<usize> {
    writeln!(out, "\n  {}", run.title)?;
    let complaint = run.complaint(verdict);
    if let Some(complaint) = &complaint {
        writeln!(out, "    {}: FAILED: {complaint}", run.setting())?;
    }
    if let Verdict::Violated { violation, trace, states } = verdict {
        let (steps, states) = (trace.len(), grouped(*states));
        writeln!(out, "    {}: breaks {} in {steps} steps ({states} states)", run.setting(), violation.invariant)?;
        print_steps(trace, &violation.what, out)?;
    }
    Ok(usize::from(complaint.is_some()))
}

fn print_steps(trace: &[String], what: &str, out: &mut impl Write) -> io::Result<()> {
    for (number, step) in (1..).zip(trace) {
        writeln!(out, "    {number:>4}  {step}")?;
    }
    writeln!(out, "      =>  {what}")
}

fn states_of(verdict: &Verdict) -> usize {
    match verdict {
        Verdict::Holds { states, .. } | Verdict::Violated { states, .. } | Verdict::Unfinished { states } => *states,
    }
}

/// A number with its thousands apart.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Explores on every CPU there is, and hands over the verdicts in the order of `runs`.
fn each_in_order(runs: &[Run], mut judge: impl FnMut(&Run, Verdict) -> io::Result<()>) -> io::Result<()> {
    let workers = thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    let sender = Mutex::new(sender);
    thread::scope(|scope| {
        for _ in 0..workers {
            let (next, sender) = (&next, &sender);
            scope.spawn(move || {
                loop {
                    // Relaxed: the counter hands out numbers and orders nothing else.
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(run) = runs.get(index) else { break };
                    let verdict = run.explore();
                    let sender = sender.lock().expect("no worker panics while it sends");
                    sender.send((index, verdict)).expect("the receiver outlives the workers");
                }
            });
        }
        let mut verdicts: Vec<Option<Verdict>> = runs.iter().map(|_| None).collect();
        for (index, run) in runs.iter().enumerate() {
            while verdicts[index].is_none() {
                let (done, verdict) = receiver.recv().expect("every run sends its verdict");
                verdicts[done] = Some(verdict);
            }
            judge(run, verdicts[index].take().expect("it has arrived"))?;
        }
        Ok(())
    })
}

/// Each may need more than a GB.
const MAX_WORKERS: usize = 2;
