//! Walks over steps: announces each, runs it, times it, and stops at the first that fails.
//!
//! The only file that starts the commands of [`crate::steps`]. Progress goes to standard error; standard output gets what the
//! commands print there and, last, the tally (`steps: N passed, N failed, N skipped`).

use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::expect::{Expect, Outcome};
use crate::steps::{Action, Selected, Step};
use crate::{target_folder, text, workspace_root};

/// Runs the selected steps and prints the tally; the exit code tells whether all of them passed.
pub(crate) fn run_all(selected: &Selected) -> ExitCode {
    let started = Instant::now();
    let total = selected.run.len();
    let mut timings = Vec::with_capacity(total);
    let mut failure = None;
    for (number, step) in (1..).zip(&selected.run) {
        announce(number, total, step);
        let step_started = Instant::now();
        let verdict = run(step);
        let seconds = step_started.elapsed().as_secs_f64();
        if let Err(error) = verdict {
            failure = Some((step, error));
            break;
        }
        eprintln!("        passed in {seconds:.1} s");
        timings.push((step.name, seconds));
    }
    eprintln!("\nSteps passed, in seconds:");
    for (name, seconds) in &timings {
        eprintln!("{seconds:>8.1}  {name}");
    }
    eprintln!("{:>8.1}  in all", started.elapsed().as_secs_f64());
    for (step, option) in &selected.left_out {
        eprintln!(" skipped  {} ({option})", step.name);
    }
    if let Some((step, error)) = &failure {
        eprintln!("\nFAILED: {}: {error:#}", step.name);
        if let Action::Command(..) = step.action {
            eprintln!("To repeat it: {}", as_typed(step.action));
        }
    }
    println!("{}", tally(timings.len(), usize::from(failure.is_some()), selected.left_out.len()));
    if failure.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn announce(number: usize, total: usize, step: &Step) {
    eprintln!("\n[{number:>2}/{total}] {}", step.name);
    eprintln!("        proves: {}", step.proves);
    if step.expect != Expect::Success {
        eprintln!("        passes if: {}", step.expect);
    }
    if let Action::Command(..) = step.action {
        eprintln!("        $ {}", as_typed(step.action));
    }
}

fn run(step: &Step) -> Result<()> {
    let Action::Command(line, variable) = step.action else {
        return text::check(&workspace_root());
    };
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().context("a step without a command")?);
    command.args(words).envs(variable).current_dir(workspace_root()).stdin(Stdio::null());
    // One for all: the fuzz targets, a workspace of their own, use what is compiled already.
    command.env("CARGO_TARGET_DIR", target_folder());
    if step.expect.reads_report() {
        command.stdout(Stdio::piped());
    }
    let output =
        command.spawn().and_then(std::process::Child::wait_with_output).with_context(|| format!("running `{line}`"))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    print!("{stdout}");
    step.expect.judge(Outcome { status: output.status.code(), stdout: &stdout })
}

/// The action as a person would type it into a shell.
fn as_typed(action: Action) -> String {
    match action {
        Action::Command(line, None) => line.to_owned(),
        Action::Command(line, Some((name, value))) => format!("{name}=\"{value}\" {line}"),
        Action::TextRules => "cargo xtask lint".to_owned(),
    }
}

/// The closing line. Its form is one that CI systems read as a count of tests.
fn tally(passed: usize, failed: usize, skipped: usize) -> String {
    let skipped = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
    format!("steps: {passed} passed, {failed} failed{skipped}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        assert_eq!(as_typed(Action::Command("cargo fmt --check", None)), "cargo fmt --check");
        let documented = Action::Command("cargo doc", Some(("RUSTDOCFLAGS", "-D warnings")));
        assert_eq!(as_typed(documented), "RUSTDOCFLAGS=\"-D warnings\" cargo doc");
    }

    #[test]
    fn the_tally_counts_what_was_left_out() {
        assert_eq!(tally(21, 0, 0), "steps: 21 passed, 0 failed");
        assert_eq!(tally(3, 1, 4), "steps: 3 passed, 1 failed, 4 skipped");
    }
}
