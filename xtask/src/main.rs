//! trapline's task runner: `cargo xtask VERB`.
//!
//! A verb is parsed by [`args`] and carried out here. `test` and `lint` are a walk by [`runner`] over the table in
//! [`steps`], whose outcomes [`expect`] judges; `kernel-test` ([`kernel`]) boots a kernel that traces itself; `bench-peers` ([`peers`]) measures trapline beside others; `consumers` ([`consumers`]) has other tools read our exports;
//! `manual` ([`manual`]) follows the manual's pages, and `newcomer` ([`newcomer`]) the README's on a fresh system;
//! `pages` drives the page of `trapline html` in a browser ([`consumers::pages`]), and `screenshots` takes the manual's pictures ([`consumers::screenshots`]);
//! `package` ([`package`]) makes what people install; `setup` ([`setup`]) makes a machine ready for them; [`text`] holds the
//! rules about our own files that no compiler checks.
//!
//! Invariant: nothing that a user asked for is left out in silence. What is skipped is asked for by an option, printed
//! and counted, and under `CI=true` it is refused.
#![forbid(unsafe_code)]

mod args;
mod consumers;
mod expect;
mod fidelity;
mod kernel;
mod manual;
mod newcomer;
mod package;
mod packages;
mod peers;
mod runner;
mod setup;
mod steps;
mod text;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use args::Verb;

fn main() -> ExitCode {
    let under_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    let verb = match args::parse(std::env::args().skip(1), under_ci) {
        Ok(verb) => verb,
        Err(usage) => {
            eprintln!("xtask: {usage}; see `cargo xtask help`");
            return ExitCode::from(2);
        }
    };
    carry_out(verb).unwrap_or_else(|error| {
        eprintln!("\nxtask: {error:#}");
        ExitCode::FAILURE
    })
}

fn carry_out(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Help => {
            print!("{}", args::HELP);
            Ok(ExitCode::SUCCESS)
        }
        Verb::Setup(selection) => setup::make_ready(selection).map(|()| ExitCode::SUCCESS),
        Verb::Test(selection) => {
            setup::make_ready(selection)?;
            Ok(runner::run_all(&steps::select(steps::TEST, selection)))
        }
        Verb::Lint(selection) => Ok(runner::run_all(&steps::select(steps::LINT, selection))),
        Verb::Bench(arguments) => bench(&arguments),
        Verb::KernelTest(asked) => kernel::test(asked),
        Verb::Fidelity { programs, is_narrow } => fidelity::run(&programs, is_narrow),
        Verb::Consumers(names) => consumers::run(&names),
        Verb::Pages { checks, is_measured: false } => consumers::pages::check(&checks),
        Verb::Pages { is_measured: true, .. } => consumers::pages::measure(),
        Verb::Screenshots => consumers::screenshots::take(),
        Verb::BenchPeers(asked) => peers::run(&asked),
        Verb::Manual(asked) => manual::run(&asked),
        Verb::Newcomer => newcomer::run(),
        Verb::Package(package) => package::make(&package).map(|()| ExitCode::SUCCESS),
    }
}

/// Runs the benchmarks, with every argument handed to `cargo bench` as it was written.
fn bench(arguments: &[String]) -> Result<ExitCode> {
    let status = Command::new("cargo")
        .args(["bench", "-p", "trapline-benches"])
        .args(arguments)
        .current_dir(workspace_root())
        .status()
        .context("starting `cargo bench`")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where cargo puts what it builds.
fn target_folder() -> PathBuf {
    let root = workspace_root();
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder))
}

/// The folder of the workspace's `Cargo.toml`, in which every command runs.
fn workspace_root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}
