//! `kernel-test`: builds the testbed kernel for each width, runs it in QEMU, and judges what it prints.
//!
//! Owns the table of [`JOBS`] and the running of one; [`verdict`] judges. A job is one boot with one command line, within a time limit. Some
//! leave something out on purpose, and pass only if that is noticed. Invariant: no QEMU outlives its job.

mod elf;
mod patched;
mod trace;
mod vectors;
mod verdict;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use self::verdict::{End, Must, Report};
use crate::args::{Accelerator, Arch, KernelTest};
use crate::{setup, target_folder, workspace_root};

const QEMU: &str = "qemu-system-x86_64";

/// How often a job is run until all contexts have met, or slots have run out: that depends on when interrupts come. What must not happen
/// must not happen in any of them.
const ATTEMPTS: usize = 4;

/// One boot of the kernel.
struct Job {
    name: &'static str,
    must: Must,
    /// The kernel's command line.
    line: &'static str,
    /// The same with `--quick`; empty: not run then.
    quick_line: &'static str,
    /// Whether TCG translates one instruction at a time, so that interrupts come at every instruction boundary.
    single_step: bool,
    limit: Duration,
}

const JOBS: &[Job] = &[
    Job {
        name: "every strategy, every poke",
        must: Must::Hold,
        line: "strategies=slots,percpu,gap,r11,skip single=1500 batches=20 nmis=2 context-calls=80",
        quick_line: "strategies=slots,percpu,gap,r11,skip single=40 batches=3 nmis=2 context-calls=6",
        single_step: false,
        limit: Duration::from_hours(1),
    },
    Job {
        name: "interrupted at every instruction",
        must: Must::InterruptAll,
        line: "scenario=step strategies=slots,percpu,gap,r11 context-calls=1",
        quick_line: "scenario=step strategies=slots,percpu,gap,r11 context-calls=1",
        single_step: true,
        limit: Duration::from_mins(15),
    },
    Job {
        name: "interrupted anywhere",
        must: Must::ReachDepth,
        line: "strategies=slots,percpu,gap,r11 single=300 batches=2 only-storms=1 nmis=10 ticks=100000 until-depth=4",
        quick_line: "",
        single_step: true,
        limit: Duration::from_mins(15),
    },
    Job {
        name: "a batch of all sites",
        must: Must::Batch,
        line: "scenario=batch strategies=slots batches=100",
        quick_line: "scenario=batch strategies=slots batches=20",
        single_step: false,
        limit: Duration::from_mins(2),
    },
    Job {
        name: "functions replaced under tracers",
        must: Must::Replace,
        line: "scenario=livepatch strategies=slots,percpu,gap,r11,skip single=400 batches=16 nmis=2",
        quick_line: "scenario=livepatch strategies=slots,percpu,gap,r11,skip single=16 batches=4 nmis=2",
        single_step: false,
        limit: Duration::from_mins(15),
    },
    Job {
        name: "control: a revert that is left out",
        must: Must::OutliveRevert,
        line: "scenario=livepatch strategies=slots single=32 batches=0 nmis=2 forget-revert=1",
        quick_line: "scenario=livepatch strategies=slots single=16 batches=0 nmis=2 forget-revert=1",
        single_step: false,
        limit: Duration::from_mins(2),
    },
    Job {
        name: "a trace that begins amid interrupts",
        must: Must::Trace,
        line: "scenario=trace strategies=slots nmis=2 calls=2000 ticks=5000",
        quick_line: "scenario=trace strategies=slots nmis=2 calls=2000 ticks=5000",
        single_step: false,
        limit: Duration::from_mins(5),
    },
    Job {
        name: "a trace of every call, in every context",
        must: Must::Trace,
        line: "scenario=trace strategies=slots nmis=12 calls=80000",
        quick_line: "scenario=trace strategies=slots nmis=12 calls=20000",
        single_step: false,
        limit: Duration::from_mins(5),
    },
    Job {
        name: "control: rings that are too small for a trace",
        must: Must::TraceLoss,
        line: "scenario=trace strategies=slots nmis=4 calls=5000 ring=1000",
        quick_line: "scenario=trace strategies=slots nmis=4 calls=5000 ring=1000",
        single_step: false,
        limit: Duration::from_mins(5),
    },
    Job {
        name: "control: a slot that is given back before it is read",
        must: Must::GoWrong,
        line: "scenario=step strategies=slots context-calls=1 early-release=1",
        quick_line: "scenario=step strategies=slots context-calls=1 early-release=1",
        single_step: false,
        limit: Duration::from_secs(30),
    },
    Job {
        name: "control: one slot only",
        must: Must::Overflow,
        line: "strategies=slots,percpu single=200 batches=4 slots=1",
        quick_line: "strategies=slots single=40 batches=2 slots=1",
        single_step: false,
        limit: Duration::from_mins(5),
    },
    Job {
        name: "control: IRET in NMI context",
        must: Must::Overflow,
        line: "strategies=slots single=200 batches=0 only-storms=1 nmis=12 iret=1 until-overflow=1",
        quick_line: "strategies=slots single=6 batches=0 only-storms=1 nmis=12 iret=1 until-overflow=1",
        single_step: true,
        limit: Duration::from_mins(5),
    },
    Job {
        name: "control: per-CPU slots, but preempted",
        must: Must::Break,
        line: "strategies=percpu single=400 batches=4 nmis=0 ticks=100000 preempt-pending=1",
        quick_line: "strategies=percpu single=400 batches=4 nmis=0 ticks=100000 preempt-pending=1",
        single_step: true,
        limit: Duration::from_secs(30),
    },
    Job {
        name: "control: a store to text itself",
        must: Must::Break,
        line: "strategies=slots single=1 batches=0 store-directly=1",
        quick_line: "strategies=slots single=1 batches=0 store-directly=1",
        single_step: false,
        limit: Duration::from_secs(15),
    },
    Job {
        name: "control: no int3 phase",
        must: Must::Break,
        line: "strategies=slots single=2000 batches=20 nmis=0 naive=1",
        quick_line: "strategies=slots single=2000 batches=20 nmis=0 naive=1",
        single_step: false,
        limit: Duration::from_secs(15),
    },
];

/// Carries out the verb.
///
/// # Errors
/// QEMU or the build is not to be had. That something does not hold is not an error but the exit code.
pub(crate) fn test(asked: KernelTest) -> Result<ExitCode> {
    let jobs = jobs(&asked)?;
    prepare()?;
    let accelerator = accelerator(asked.accelerator)?;
    let single_step = single_step_option()?;
    let run = Run { asked, jobs, accelerator, single_step };
    let mut kernels = Vec::new();
    for arch in Arch::ALL.into_iter().filter(|arch| run.asked.arch.is_none_or(|only| only == *arch)) {
        kernels.push((arch, build(arch)?));
    }
    // The widths side by side: most of the time somebody waits for an interrupt.
    let failed: Vec<String> = std::thread::scope(|scope| {
        let widths: Vec<_> = kernels.iter().map(|(arch, kernel)| scope.spawn(|| run.all_jobs(*arch, kernel))).collect();
        let ended = widths.into_iter().map(|width| width.join().unwrap_or_else(|_| bail!("a panic")));
        ended.collect::<Result<Vec<_>>>().map(|failed| failed.concat())
    })?;
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("\nfailed:\n  {}", failed.join("\n  "));
    Ok(ExitCode::FAILURE)
}

/// The jobs that are asked for, each with the kernel's command line.
fn jobs(asked: &KernelTest) -> Result<Vec<(&'static Job, &'static str)>> {
    let of_this_length = JOBS
        .iter()
        .map(|job| (job, if asked.quick { job.quick_line } else { job.line }))
        .filter(|(_, line)| !line.is_empty());
    let only = asked.only.as_deref().unwrap_or_default();
    let jobs: Vec<_> = of_this_length.clone().filter(|(job, _)| job.name.contains(only)).collect();
    if jobs.is_empty() {
        let names: Vec<&str> = of_this_length.map(|(job, _)| job.name).collect();
        bail!("no job has `{only}` in its name; there are:\n  {}", names.join("\n  "));
    }
    Ok(jobs)
}

/// What all jobs have in common.
struct Run {
    asked: KernelTest,
    /// Each with the kernel's command line.
    jobs: Vec<(&'static Job, &'static str)>,
    accelerator: Accelerator,
    single_step: Vec<&'static str>,
}

impl Run {
    /// Runs every job with one kernel and tells which failed. What is printed of a job comes in one piece: another width runs beside.
    fn all_jobs(&self, arch: Arch, kernel: &Path) -> Result<Vec<String>> {
        let mut failed = Vec::new();
        match vectors::check(kernel) {
            Ok(found) => eprintln!("{}: {found}", arch.name()),
            Err(error) => {
                eprintln!("FAILED: {}: {error:#}", arch.name());
                failed.push(format!("{}: no vector instructions", arch.name()));
            }
        }
        let times = self.asked.times.unwrap_or(1);
        for (job, line) in &self.jobs {
            let mut failures = 0;
            for _ in 0..times {
                failures += u32::from(!self.job(arch, kernel, job, line)?);
            }
            if failures > 0 {
                let of_them = if times > 1 { format!(", {failures} times of {times}") } else { String::new() };
                failed.push(format!("{}: {}{of_them}", arch.name(), job.name));
            }
        }
        Ok(failed)
    }

    /// Runs a job, again if what is to be seen did not come about, and tells whether it passed.
    fn job(&self, arch: Arch, kernel: &Path, job: &Job, line: &str) -> Result<bool> {
        let started = Instant::now();
        let title = format!("{}: {}", arch.name(), job.name);
        let attempt = || -> Result<(Report, Judged)> {
            let report = run(kernel, job, line, self.accelerator, &self.single_step)?;
            let judged = examine(kernel, arch, job, &report, self.asked.quick);
            Ok((report, judged))
        };
        let (mut report, mut judged) = attempt()?;
        for _ in 1..ATTEMPTS {
            if judged.missed {
                eprintln!("{title}: what is to be seen did not happen to come about; once more");
                (report, judged) = attempt()?;
            }
        }
        let verdict = judged.verdict;
        let seconds = started.elapsed().as_secs_f64();
        if self.asked.json {
            println!(
                "{}",
                json!({
                    "version": 1, "arch": arch.name(), "job": job.name, "line": line, "seconds": seconds, "passed": verdict.is_ok(),
                    "broke": report.breakage(), "rows": report.rows, "patches": report.patches, "steps": report.steps(),
                    "sites_a_second": report.rate(), "trace": judged.trace, "error": verdict.as_ref().err().map(|error| format!("{error:#}")),
                })
            );
        } else {
            let found = match report.breakage() {
                Some(breakage) => format!("  the kernel: {breakage}\n"),
                None => report.table(),
            };
            print!("\n{title}, {} sites\n{found}", report.sites);
        }
        match &verdict {
            Ok(()) => eprintln!("{title}: passed in {seconds:.1} s"),
            Err(error) => {
                let complaints = report.complaints.iter().take(20).map(|complaint| format!("  {complaint}\n"));
                eprint!("FAILED: {title}: {error:#}\n{}", complaints.collect::<String>());
            }
        }
        Ok(verdict.is_ok())
    }
}

/// What became of one run.
struct Judged {
    verdict: Result<()>,
    /// Nothing is wrong, but not all that is to be seen came about.
    missed: bool,
    /// What a trace holds; nothing for other jobs.
    trace: Value,
}

fn examine(kernel: &Path, arch: Arch, job: &Job, report: &Report, is_quick: bool) -> Judged {
    let mut judged = Judged { verdict: report.judge(job.must), missed: report.missed(job.must), trace: Value::Null };
    if job.must == Must::Hold && !is_quick {
        judged.verdict = judged.verdict.and_then(|()| report.is_large());
    }
    if judged.verdict.is_err() || !matches!(job.must, Must::Trace | Must::TraceLoss) {
        return judged;
    }
    let kind = if job.must == Must::Trace { "kernel" } else { "lossy" };
    let file = kernel.with_file_name(format!("{kind}-{}.data", arch.name()));
    match trace::judge(kernel, &report.trace, &records_file(kernel), &file, job.must) {
        Err(error) => Judged { verdict: Err(error), missed: false, trace: Value::Null },
        Ok(found) => {
            eprintln!("{}: {}", arch.name(), found.line);
            let missed = found.missing.is_some();
            Judged {
                verdict: found.missing.map_or(Ok(()), |missing| Err(anyhow::anyhow!(missing))),
                missed,
                trace: found.counts,
            }
        }
    }
}

/// Installs what is missing: QEMU, as root, and the sources of the standard library.
fn prepare() -> Result<()> {
    if version().is_err() {
        let install = ["apt-get", "install", "--yes", "--no-install-recommends", "qemu-system-x86"];
        ensure!(setup::is_root(), "QEMU is missing; install it:\n  sudo {}", install.join(" "));
        let status = Command::new(install[0])
            .args(&install[1..])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(Stdio::null())
            .status()
            .context("installing QEMU")?;
        ensure!(status.success(), "`{}` ended with {status}", install.join(" "));
    }
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).current_dir(workspace_root()).output()?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot.stdout).trim());
    if !sysroot.join("lib/rustlib/src/rust/library").exists() {
        let status = Command::new("rustup")
            .args(["component", "add", "rust-src"])
            .current_dir(workspace_root())
            .status()
            .context("the standard library's sources are missing: `rustup component add rust-src`")?;
        ensure!(status.success(), "`rustup component add rust-src` ended with {status}");
    }
    Ok(())
}

fn version() -> Result<String> {
    let output = Command::new(QEMU).arg("--version").output().context("starting QEMU")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How this QEMU is told to translate one instruction at a time: an option of its own, since 8.1 a property of the accelerator.
fn single_step_option() -> Result<Vec<&'static str>> {
    let version = version()?;
    let number = version.split_whitespace().skip_while(|word| *word != "version").nth(1);
    let mut parts = number.unwrap_or_default().split('.').map_while(|part| part.parse::<u32>().ok());
    let number = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    Ok(if number < (8, 1) {
        vec!["-accel", "tcg,thread=multi", "-singlestep"]
    } else {
        vec!["-accel", "tcg,thread=multi,one-insn-per-tb=on"]
    })
}

/// KVM where the machine has virtualisation of its own: a paravirtual /dev/kvm cannot run this kernel.
fn accelerator(asked: Option<Accelerator>) -> Result<Accelerator> {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let real = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") && Path::new("/dev/kvm").exists();
    match asked {
        Some(Accelerator::Kvm) if !real => {
            bail!("this machine has no KVM of its own (flags vmx or svm, /dev/kvm): use --accel tcg")
        }
        Some(accelerator) => Ok(accelerator),
        None if real => Ok(Accelerator::Kvm),
        None => Ok(Accelerator::Tcg),
    }
}

/// Builds the kernel and tells where it is.
fn build(arch: Arch) -> Result<PathBuf> {
    let root = workspace_root();
    let targets = target_folder().join("testbed");
    let (target, folder) = match arch {
        Arch::X86_64 => ("x86_64-unknown-none", "x86_64-unknown-none"),
        Arch::I386 => ("i386.json", "i386"),
    };
    // The testbed's own configuration says the rest.
    let status = Command::new("cargo")
        .args(["build", "--release", "--locked", "--target", target, "--target-dir"])
        .arg(&targets)
        .current_dir(root.join("testbed"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTFLAGS")
        .status()
        .context("building the testbed")?;
    ensure!(status.success(), "the testbed does not build for {}", arch.name());
    Ok(targets.join(folder).join("release/testbed"))
}

/// Where the kernel's second serial port leads to.
fn records_file(kernel: &Path) -> PathBuf {
    kernel.with_file_name("records.bin")
}

/// Boots the kernel and collects what it prints until it ends or its time is up.
fn run(kernel: &Path, job: &Job, line: &str, accelerator: Accelerator, single_step: &[&str]) -> Result<Report> {
    let accelerator: &[&str] = match accelerator {
        _ if job.single_step => single_step,
        Accelerator::Tcg => &["-accel", "tcg,thread=multi"],
        Accelerator::Kvm => &["-accel", "kvm"],
    };
    let store_again = if accelerator.contains(&"kvm") { " store-again=0" } else { "" };
    let mut qemu = Command::new(QEMU)
        .args(accelerator)
        .args([
            "-smp",
            if job.must == Must::Batch { "2" } else { "3" },
            "-m",
            "128",
            "-display",
            "none",
            "-monitor",
            "none",
            "-serial",
            "stdio",
            "-serial",
        ])
        .arg(format!("file:{}", records_file(kernel).display()))
        .arg("-no-reboot")
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-append"])
        .arg(format!("{line}{store_again}"))
        .arg("-kernel")
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting QEMU")?;
    let output = qemu.stdout.take().context("QEMU without output")?;
    let (send, receive) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    let started = Instant::now();
    let deadline = started + job.limit;
    let (mut lines, mut clock_ns) = (Vec::new(), Vec::new());
    let timed_out = loop {
        match receive.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if line.contains("\"clock\"") {
                    clock_ns.push(u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX));
                }
                lines.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break false,
            Err(mpsc::RecvTimeoutError::Timeout) => break true,
        }
    };
    if timed_out {
        qemu.kill().context("ending QEMU")?;
    }
    let status = qemu.wait().context("waiting for QEMU")?;
    // Its output is closed with it.
    let _ = reader.join();
    lines.extend(receive.try_iter());
    let mut report = Report::new(&lines, if timed_out { End::TimedOut } else { End::Exit(status.code()) });
    // The kernel tells its time-stamp counter; what time that was is known here.
    let clocks = report.trace.iter_mut().filter(|event| event["event"] == "clock");
    clocks.zip(clock_ns).for_each(|(clock, ns)| clock["host_ns"] = json!(ns));
    Ok(report)
}
