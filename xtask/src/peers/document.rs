//! The section of docs/benchmarks.md that this command owns: from figures to Markdown.
//!
//! Owns [`Results`]. Everything between two markers is ours, and is replaced as a whole; other sections of the file stand beside it. Invariant: a figure stands beside
//! its goal whether it reaches it or not.

use std::{fmt::Write as _, fs, process::Command};

use anyhow::{Context, Result, ensure};

use super::{
    bench::{
        Flavour::{self, Fentry, FloorEntry, FloorPair, KeptFloorEntry, KeptFloorPair, Patchable, Stock},
        output,
    },
    others::{Report, STARTED, Start},
    rounds::{Extent, Figures, Outcome, Rounds},
    tools::Tools,
    tracer::{Events, Tool},
};
use crate::workspace_root;

const FILE: &str = "docs/benchmarks.md";
const BEGIN: &str = "<!-- bench-peers: begin -->";
const END: &str = "<!-- bench-peers: end -->";
const HEAD: &str =
    "# Benchmarks\n\nEach section is written by the command that it names, and says on which machine.\n\n";

/// All that was measured.
pub(super) struct Results {
    /// Of the command, as one would type them.
    pub(super) options: String,
    pub(super) tools: Tools,
    /// With one thread, and with two.
    pub(super) extents: [Extent; 2],
    pub(super) one_thread: Rounds,
    pub(super) two_threads: Rounds,
    pub(super) starts: Vec<Start>,
    pub(super) reports: Vec<Report>,
    /// Nanoseconds a site, ours and the floor's.
    pub(super) enabling: Result<(f64, f64), String>,
}

/// Writes the section into the file, in place of the one that is there.
pub(super) fn write(section: &str) -> Result<()> {
    let path = workspace_root().join(FILE);
    let old = if path.exists() { fs::read_to_string(&path)? } else { HEAD.to_owned() };
    fs::write(&path, replaced(&old, section)?).with_context(|| format!("writing {FILE}"))?;
    eprintln!("bench-peers: wrote {FILE}");
    Ok(())
}

/// The text with its section replaced, or added at the end if it has none.
fn replaced(text: &str, section: &str) -> Result<String> {
    let Some((before, rest)) = text.split_once(BEGIN) else {
        return Ok(format!("{}\n\n{BEGIN}\n{section}{END}\n", text.trim_end()));
    };
    let (_, after) = rest.split_once(END).with_context(|| format!("{FILE} has `{BEGIN}` without `{END}`"))?;
    ensure!(!after.contains(BEGIN), "{FILE} has `{BEGIN}` twice");
    Ok(format!("{before}{BEGIN}\n{section}{END}{after}"))
}

impl Results {
    /// The rows without figures, and why.
    pub(super) fn failures(&self) -> Vec<String> {
        let rounds = [(1, &self.one_thread), (2, &self.two_threads)];
        let rows =
            rounds.iter().flat_map(|(threads, rounds)| rounds.rows.iter().map(move |outcome| (threads, outcome)));
        let rows = rows.filter_map(|(threads, (row, figures))| {
            let why = figures.as_ref().err()?;
            Some(format!("{} on {}, {threads} thread(s): {why}", row.title, row.flavour.options()))
        });
        let starts =
            self.starts.iter().filter_map(|start| Some(format!("{}: {}", start.title, start.ms.as_ref().err()?)));
        let reports = self
            .reports
            .iter()
            .filter_map(|one| Some(format!("{} report: {}", one.tool.name(), one.cost.as_ref().err()?)));
        let enabling = self.enabling.as_ref().err().map(|why| format!("enabling sites: {why}"));
        rows.chain(starts).chain(reports).chain(enabling).collect()
    }

    /// Whether each of trapline's own figures is there.
    pub(super) fn is_ours_whole(&self) -> bool {
        let is_ours = |tool: Tool| matches!(tool, Tool::Trapline | Tool::Top | Tool::Floor | Tool::Nobody);
        let rows = self.one_thread.rows.iter().chain(&self.two_threads.rows);
        rows.filter(|(row, _)| is_ours(row.tool)).all(|(_, figures)| figures.is_ok())
            && self.starts.iter().filter(|start| start.title.starts_with("trapline")).all(|start| start.ms.is_ok())
            && self.reports.iter().filter(|report| is_ours(report.tool)).all(|report| report.cost.is_ok())
            && self.enabling.is_ok()
    }

    /// The section.
    pub(super) fn section(&self) -> String {
        let mut text = String::new();
        self.introduce(&mut text);
        self.goals(&mut text);
        for (events, title) in
            [(Events::Pair, "Entry and exit"), (Events::Entry, "Entry only"), (Events::Off, "Armed, but off")]
        {
            let _ = writeln!(text, "\n### {title}, one thread\n");
            table(&mut text, &self.one_thread, events);
            let _ = writeln!(text, "\n### {title}, two threads\n");
            table(&mut text, &self.two_threads, events);
        }
        self.others(&mut text);
        self.explain(&mut text);
        text
    }

    fn introduce(&self, text: &mut String) {
        let _ = writeln!(text, "\n## Calls, beside other tracers\n");
        let _ = writeln!(text, "Written by `cargo xtask bench-peers{}`.\n", self.options);
        let _ = writeln!(text, "- Machine: {}", machine());
        let gcc = output(version_of("gcc"), "gcc").unwrap_or_default();
        let _ = writeln!(text, "- trapline {}; {}", env!("CARGO_PKG_VERSION"), gcc.lines().next().unwrap_or_default());
        for (tool, found) in self.tools.list() {
            let _ = match found {
                Ok(version) => writeln!(text, "- {}: {version}", tool.name()),
                Err(why) => writeln!(text, "- {}: not measured, could not be had here: {why}", tool.name()),
            };
        }
        let [one, two] = self.extents;
        let _ = writeln!(
            text,
            "- Work: {} calls in each of {} rounds with one thread, {} calls a thread in {} rounds with two; slow tracers make fewer. A call that nobody \
             traces takes {:.1} ns.",
            millions(one.calls),
            self.one_thread.count,
            millions(two.calls),
            self.two_threads.count,
            self.one_thread.bare_ns,
        );
    }

    fn figures(&self, tool: Tool, events: Events, flavour: Flavour) -> Option<Figures> {
        let is_it = |(row, _): &&Outcome| row.tool == tool && row.events == events && row.flavour == flavour;
        self.one_thread.rows.iter().find(is_it).and_then(|(_, figures)| figures.as_ref().ok().copied())
    }

    fn goals(&self, text: &mut String) {
        let _ = writeln!(text, "\n### Goals\n\n| goal | measured | reached |\n|---|---|---|");
        let mut goal = |what: &str, limit: f64, measured: Option<f64>, unit: &str, note: &str| {
            let _ = match measured.filter(|value| value.is_finite()) {
                Some(value) => {
                    let reached = if value <= limit { "yes" } else { "**no**" };
                    writeln!(text, "| {what} | {value:.2}{unit}{note} | {reached} |")
                }
                None => writeln!(text, "| {what} | not measured | |"),
            };
        };
        for (events, title) in [(Events::Pair, "entry and exit"), (Events::Entry, "entry only")] {
            for flavour in [Stock, Patchable, Fentry] {
                let floor = match (events, flavour) {
                    (Events::Pair, Fentry) => KeptFloorPair,
                    (Events::Pair, _) => FloorPair,
                    (_, Fentry) => KeptFloorEntry,
                    _ => FloorEntry,
                };
                let floor = self.figures(Tool::Floor, events, floor);
                let what = format!("{title} at most 1.3 times the floor, `{}`", flavour.options());
                let ours = self.figures(Tool::Trapline, events, flavour);
                let of_cpu = ours.and_then(|ours| Some(ours.cost_cpu_ns / floor?.cost_cpu_ns)).unwrap_or(f64::NAN);
                let note = format!(" ({of_cpu:.2} of the processor)");
                goal(&what, 1.3, ours.and_then(|ours| ours.to_floor), " times", &note);
            }
        }
        let counted = self.figures(Tool::Top, Events::Pair, Stock).and_then(|counted| counted.to_floor);
        goal("counted by `trapline top` at most 1.3 times the floor of entry and exit", 1.3, counted, " times", "");
        if let Some(theirs) = self.figures(Tool::Uftrace, Events::Pair, Fentry) {
            let of_theirs = |ours: Option<Figures>| ours.map(|ours| ours.cost_ns / theirs.cost_ns);
            let floor = of_theirs(self.figures(Tool::Floor, Events::Pair, FloorPair));
            let note = floor.map_or_else(String::new, |floor| format!(" (the floor: {floor:.2})"));
            for flavour in [Fentry, Stock] {
                let what = format!(
                    "entry and exit at most a third of uftrace's on `{}`, `{}`",
                    Fentry.options(),
                    flavour.options()
                );
                let ours = self.figures(Tool::Trapline, Events::Pair, flavour);
                goal(&what, 1.0 / 3.0, of_theirs(ours), " times", &note);
            }
        } else {
            goal("entry and exit at most a third of uftrace's", 0.0, None, "", "");
        }
        let stock = self.figures(Tool::Trapline, Events::Pair, Stock);
        goal("at most 8 bytes a call on disk, entry and exit", 8.0, stock.map(|one| one.bytes), " bytes", "");
        for flavour in [Stock, Patchable, Fentry] {
            let off = self.figures(Tool::Trapline, Events::Off, flavour);
            let what = format!("off at most 2 ns a call, `{}`", flavour.options());
            goal(&what, 2.0, off.map(|one| one.cost_ns), " ns", "");
        }
        let enabling = self.enabling.as_ref().ok().map(|(ours, _)| *ours);
        goal("enabling 20,000 sites under load at most 100 ns a site", 100.0, enabling, " ns", "");
        let cost =
            |tool| self.reports.iter().find(|one| one.tool == tool).and_then(|one| one.cost.as_ref().ok().copied());
        let (ours, theirs) = (cost(Tool::Trapline), cost(Tool::Uftrace));
        let part = ours.and_then(|(ours, _)| Some(ours / theirs?.0));
        goal("a report in at most a tenth of uftrace's time", 0.1, part, " times", "");
        let calls = self.reports.first().map_or(0, |report| report.calls);
        let what = format!("a report on {} calls in less than 1,024 MiB (the goal is 100 M calls)", millions(calls));
        goal(&what, 1024.0, ours.map(|(_, mebibytes)| mebibytes), " MiB", "");
    }

    fn others(&self, text: &mut String) {
        let _ = writeln!(text, "\n### Start-up\n\n`{}`, the whole command:\n", STARTED.join(" "));
        let _ = writeln!(text, "| tracer | ms | beyond nobody |\n|---|---:|---:|");
        let bare = self.starts.first().and_then(|start| start.ms.as_ref().ok().copied());
        for start in &self.starts {
            let _ = match &start.ms {
                Ok(ms) => writeln!(text, "| {} | {ms:.1} | {:.1} |", start.title, ms - bare.unwrap_or(f64::NAN)),
                Err(why) => writeln!(text, "| {} | failed: {} | |", start.title, cell(why)),
            };
        }
        let _ = writeln!(text, "\n### Reports\n\n| command | calls | seconds | MiB at most |\n|---|---:|---:|---:|");
        for Report { tool, calls, cost } in &self.reports {
            let (name, calls) = (tool.name(), millions(*calls));
            let _ = match cost {
                Ok((seconds, mebibytes)) => {
                    writeln!(text, "| `{name} report` | {calls} | {seconds:.2} | {mebibytes:.0} |")
                }
                Err(why) => writeln!(text, "| `{name} report` | {calls} | failed: {} | |", cell(why)),
            };
        }
        let _ = writeln!(text, "\n### Enabling 20,000 sites while a thread runs them\n");
        let _ = match &self.enabling {
            Ok((ours, floor)) => writeln!(
                text,
                "{ours:.0} ns a site; the same protocol without any bookkeeping, through an alias of the text: {floor:.0} ns a site \
                 (`cargo bench -p trapline-benches --bench pokes -- enable`)."
            ),
            Err(why) => writeln!(text, "Failed: {why}"),
        };
    }

    fn explain(&self, text: &mut String) {
        text.push_str(EXPLANATION);
        let failures = self.failures();
        if !failures.is_empty() {
            let _ = writeln!(text, "\n### Without figures\n");
            for failure in failures {
                let _ = writeln!(text, "- {failure}");
            }
        }
    }
}

const EXPLANATION: &str = "\n\
### How the figures are taken, and what they mean

- **The work** is `benches/peers/work.c`: calls of a leaf, and of trees of seven calls. It reads CLOCK_MONOTONIC before the first call and after the last, so that a tracer's
  start and end are left out; with two threads the slower one counts. **ns a call** is that time for one call, less the time of a call of the same program that
  nobody traces, in the same round; of the program compiled with `-O2`, for the floor and where nobody traces. *of the processor* is the same by the thread's processor time: where it is much less, the thread waited, for its tracer or for
  other programs.
- **The floor** is `benches/peers/floor.c`: reads the time-stamp counter and stores, at the entry, or at entry and exit with a return address put aside. Nobody reads what it
  records, and it knows no filters, no second stack and no exceptions. A tracer that functions call cannot be faster. trapline's sites jump, so it can call the function anew
  from where that has to return to, which has both returns predicted: a misprediction that the floor has at each exit.
- **Ratios** are those of costs in the same round; **medians** of all rounds. Rounds are interleaved: each has every row once. Nothing is pinned and no frequency is fixed.
- **whole command** is the time from the start of the command to its end for each call, start-up and the writing of all data included: a tracer that only puts off its work does not
  hide it there. **bytes** are those of its data for each call.
- **Every row is proved first**: the tracer's own report has to have exactly the calls that were made, or the row says that it failed. Rows of what is off must have none.
- uftrace writes what it records unpacked; trapline packs it, in another thread, which takes time of another processor. bpftrace counts in the kernel, and Frida calls an
  empty compiled callback: both record nothing. XRay reads the time by a system call's fast path where it does not know the processor's frequency, as on many virtual machines.
- `-pg -mfentry` code calls `__fentry__` in the C library, which saves registers, exchanges a word that all threads share by a locked instruction, sees that nothing is profiled,
  and returns. The program pays for that without any tracer, and trapline leaves it in place, as it keeps all that a program does. The locked instruction also waits for what a
  tracer has just stored. So there is a second floor for this code, which calls the C library's function as well, and is beyond the program that calls it. uftrace
  replaces the function, and stands beside the first floor.
- **Off** means that each function still begins with a jump to its stub, which goes on with the function: what a site costs between two recordings.
";

fn table(text: &mut String, rounds: &Rounds, events: Events) {
    // Of costs near nothing, a ratio is noise.
    let has_ratios = events != Events::Off;
    let only_with_ratios = |text: &'static str| if has_ratios { text } else { "" };
    let _ = writeln!(
        text,
        "| tracer | code | ns a call | of the processor |{} whole command, ns a call | bytes |",
        only_with_ratios(" times the floor | times trapline on `-O2` |")
    );
    let _ = writeln!(text, "|---|---|---:|---:|{}---:|---:|", only_with_ratios("---:|---:|"));
    for (row, figures) in rounds.rows.iter().filter(|(row, _)| row.events == events) {
        let (title, options) = (row.title, row.flavour.options());
        let figures = match figures {
            Ok(figures) => figures,
            Err(why) => {
                let none = only_with_ratios(" | |");
                let _ = writeln!(text, "| {title} | `{options}` | failed: {} | |{none} | |", cell(why));
                continue;
            }
        };
        let ratio = |ratio: Option<f64>| ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let (to_floor, to_trapline) = (ratio(figures.to_floor), ratio(figures.to_trapline));
        let ratios = if has_ratios { format!(" {to_floor} | {to_trapline} |") } else { String::new() };
        let bytes = if figures.bytes > 0.0 { format!("{:.1}", figures.bytes) } else { String::new() };
        let _ = writeln!(
            text,
            "| {title} | `{options}` | {:.1} | {:.1} |{ratios} {:.1} | {bytes} |",
            figures.cost_ns, figures.cost_cpu_ns, figures.command_ns
        );
    }
}

/// What does not break a table.
fn cell(text: &str) -> String {
    text.replace('|', "/").replace('\n', " ")
}

fn version_of(program: &str) -> Command {
    let mut command = Command::new(program);
    command.arg("--version");
    command
}

fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let of_cpu =
        |name: &str| cpuinfo.lines().find(|line| line.starts_with(name))?.split_once(": ").map(|(_, text)| text);
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let is_virtual = if of_cpu("flags").is_some_and(|flags| flags.contains("hypervisor")) { ", virtual" } else { "" };
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    format!(
        "{cpus} processors, {}{is_virtual}, Linux {}; load average at the end: {load}",
        of_cpu("model name").unwrap_or("unknown").trim(),
        kernel.trim(),
    )
}

fn millions(calls: u64) -> String {
    if calls.is_multiple_of(1_000_000) { format!("{} M", calls / 1_000_000) } else { calls.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_section_is_replaced() {
        let first = replaced("# Benchmarks\n", "one\n").expect("no section yet");
        assert_eq!(first, format!("# Benchmarks\n\n{BEGIN}\none\n{END}\n"));
        let beside = format!("{first}\n## Kernel\n");
        let second = replaced(&beside, "two\n").expect("one section");
        assert_eq!(second, format!("# Benchmarks\n\n{BEGIN}\ntwo\n{END}\n\n## Kernel\n"));
        assert!(replaced(BEGIN, "").is_err(), "a section without an end");
    }

    #[test]
    fn reasons_fit_a_cell() {
        assert_eq!(cell("a | b\nc"), "a / b c");
    }

    #[test]
    fn calls_are_counted_in_millions() {
        assert_eq!(millions(10_000_000), "10 M");
        assert_eq!(millions(500_000), "500000");
    }
}
