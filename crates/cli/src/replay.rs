//! `trapline replay`: the calls of a trace as a graph, as ftrace's `function_graph` prints them.
//!
//! Owns the options, and the printer that [`Frames`] tells of calls. Threads are interleaved in the order of time, as the [`Timeline`] has them. A call's line
//! is held back until it is known whether the call fits on one line, because it makes no call that is shown; with a shortest duration, until something
//! is shown inside of it or it has ended. Invariant: memory grows with open frames and running threads only.

use std::{
    collections::HashMap,
    io::{self, BufWriter, Write},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::json;
use trapline_process::{Addr, Filter};
use trapline_trace::{Catalog, Ending, Frame, Frames, Order, Sink, TimedEvent, Timeline, record::Event};

use crate::{
    Outcome, color,
    pager::{self, Text},
    report::{DEFAULT_TRACE, warn},
};

/// Of the JSON form. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Shows the calls of all threads in the order of time, as an indented graph with their durations.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  trapline replay -F 'parse_*' -D 3 --min-duration 1000 | less")]
pub(crate) struct Arguments {
    /// The trace.
    #[arg(short, long, default_value = DEFAULT_TRACE, value_name = "FILE")]
    input: PathBuf,
    /// Only calls of functions whose name matches, and what they call.
    #[arg(short = 'F', long = "function", value_name = "GLOB")]
    functions: Vec<String>,
    /// Only this thread.
    #[arg(long, visible_alias = "thread", value_name = "TID")]
    tid: Option<u32>,
    /// Only calls that took so many nanoseconds at least.
    #[arg(long, default_value_t = 0, value_name = "NS")]
    min_duration: u64,
    /// So many levels at most.
    #[arg(short = 'D', long, value_name = "DEPTH")]
    depth: Option<usize>,
    /// Print one JSON object, calls in the order in which they ended.
    #[arg(long)]
    json: bool,
}

/// What is kept of a thread between its chunks.
#[derive(Default)]
struct Thread {
    frames: Frames<()>,
    /// Whether the line of each open frame was printed.
    printed: Vec<bool>,
    /// The depth of the outermost frame that the filter selects.
    root: Option<usize>,
    sites: Vec<u32>,
}

/// Where lines go, and what decides on them.
struct Printer<'a, W> {
    output: W,
    failure: Option<io::Error>,
    arguments: &'a Arguments,
    filter: Option<Filter>,
    /// For each site, its name and whether the filter selects it.
    names: HashMap<u32, (String, bool)>,
    is_first: bool,
}

/// A printer that prints for one thread.
struct ForThread<'p, 'a, W> {
    printer: &'p mut Printer<'a, W>,
    catalog: &'p Catalog,
    printed: &'p mut Vec<bool>,
    sites: &'p mut Vec<u32>,
    root: &'p mut Option<usize>,
    tid: u32,
}

/// Goes through the trace and prints.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let is_wanted =
        |catalog: &Catalog, stream: u32| arguments.tid.is_none_or(|wanted| wanted == tid_of(catalog, stream));
    let (mut timeline, catalog, mut damage) = Timeline::open(&arguments.input, Order::Time, is_wanted)?;
    let mut globs = arguments.functions.iter();
    let filter = globs.next().map(|first| globs.fold(Filter::name(first), |filter, glob| filter.or_name(glob)));
    pager::begin(Text::Stream);
    let output = BufWriter::new(io::stdout().lock());
    let mut printer = Printer { output, failure: None, arguments, filter, names: HashMap::new(), is_first: true };
    let heading = color::heading();
    let mut threads: HashMap<u32, Thread> = HashMap::new();
    if arguments.json {
        printer.line(format_args!("{{\"version\":{JSON_VERSION},\"calls\":["));
    }
    while let Some(part) = timeline.next_part()? {
        let tid = tid_of(&catalog, part.stream);
        let Thread { frames, printed, root, sites } = threads.entry(part.stream).or_insert_with(|| {
            if !arguments.json {
                let name = catalog.streams.get(&part.stream).map_or("", |stream| stream.name.as_str());
                printer.line(format_args!("{heading}# thread {tid} {name}{heading:#}"));
            }
            Thread::default()
        });
        let mut sink = ForThread { printer: &mut printer, catalog: &catalog, printed, sites, root, tid };
        if let Some(chunk) = part.starts {
            frames.start(chunk, &mut sink);
        }
        frames.events(part.events, &mut sink);
        if part.is_last {
            frames.finish(&mut sink);
            threads.remove(&part.stream);
        } else {
            sink.give_way(part.next);
        }
        if printer.failure.is_some() {
            break;
        }
    }
    if arguments.json {
        printer.line(format_args!("]}}"));
    }
    let flushed = printer.output.flush();
    match printer.failure.map_or(flushed, Err) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Outcome::Good),
        written => written.context("cannot write to standard output")?,
    }
    damage.senseless_chunks += timeline.senseless_chunks();
    warn(&damage, &catalog);
    Ok(Outcome::Good)
}

fn tid_of(catalog: &Catalog, stream: u32) -> u32 {
    catalog.streams.get(&stream).map_or(0, |stream| stream.tid)
}

impl<W: Write> Printer<'_, W> {
    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        if self.failure.is_none() {
            self.failure = writeln!(self.output, "{text}").err();
        }
    }
}

impl<W: Write> ForThread<'_, '_, W> {
    fn lookup(&mut self, site: u32) -> (&str, bool) {
        let filter = &self.printer.filter;
        let found = self.printer.names.entry(site).or_insert_with(|| {
            let name = self.catalog.function(site).name();
            let is_selected = filter.as_ref().is_none_or(|filter| filter.matches(&name, Addr::from(0)));
            (name, is_selected)
        });
        (&found.0, found.1)
    }

    /// How deep below the selected function a frame is, if it is to be shown.
    fn level(&self, depth: usize) -> Option<usize> {
        let level = depth.checked_sub((*self.root)?)?;
        (level < self.printer.arguments.depth.unwrap_or(usize::MAX)).then_some(level)
    }

    /// Prints the lines of open frames that are held back, up to a depth.
    fn open_lines(&mut self, depth: usize) {
        let Some(root) = *self.root else { return };
        for outer in root..depth {
            if !self.printed[outer] {
                self.printed[outer] = true;
                let name = self.lookup(self.sites[outer]).0.to_owned();
                let tid = self.tid;
                self.printer.line(format_args!(
                    "{tid:>7})            | {:width$}{name}() {{",
                    "",
                    width = 2 * (outer - root)
                ));
            }
        }
    }

    /// Lines of other threads follow, so open frames are shown before them: those of calls that are known to make calls which are shown.
    fn give_way(&mut self, next: Option<TimedEvent>) {
        if self.printer.arguments.json || self.printer.arguments.min_duration > 0 {
            return;
        }
        // What comes next may be the return of the innermost one, which then takes one line.
        let is_call = matches!(next, Some(TimedEvent { event: Event::Enter { .. } | Event::Point { .. }, .. }));
        let callers = self.sites.len().saturating_sub(usize::from(!is_call));
        // Calls of what is shown at the greatest depth are not shown.
        let deepest = self.printer.arguments.depth.unwrap_or(usize::MAX).saturating_sub(1);
        let shown = self.root.map_or(0, |root| root.saturating_add(deepest));
        self.open_lines(callers.min(shown));
    }

    fn object(&mut self, level: usize, site: u32, start: u64, ns: Option<u64>, ending: &str) {
        let start_ns = self.catalog.clock().since_start_ns(start);
        let name = self.lookup(site).0.to_owned();
        let call = json!({ "tid": self.tid, "name": name, "depth": level, "start_ns": start_ns, "duration_ns": ns, "ending": ending });
        let comma = if self.printer.is_first { "" } else { "," };
        self.printer.is_first = false;
        self.printer.line(format_args!("{comma}{call}"));
    }
}

impl<W: Write> Sink for ForThread<'_, '_, W> {
    type Data = ();

    fn open(&mut self, depth: usize, site: u32, _: u64) {
        self.printed.truncate(depth);
        self.sites.truncate(depth);
        self.printed.push(false);
        self.sites.push(site);
        if self.root.is_none() && self.lookup(site).1 {
            *self.root = Some(depth);
        }
    }

    fn close(&mut self, depth: usize, frame: Frame<()>, tsc: u64, ending: Ending) {
        let is_printed = self.printed.pop().unwrap_or(false);
        self.sites.pop();
        let ns = (ending != Ending::Unknown).then(|| self.catalog.clock().ns(frame.ticks(tsc)));
        let is_long = ns.is_none_or(|ns| ns >= self.printer.arguments.min_duration);
        if let Some(level) = self.level(depth).filter(|_| is_printed || is_long) {
            let (word, note) = match ending {
                Ending::Returned => ("returned", ""),
                Ending::Unwound => ("unwound", " /* left without a return */"),
                Ending::Jumped => ("jumped", " /* jumped on */"),
                Ending::Open => ("open", " /* did not return */"),
                Ending::Unknown => ("unknown", " /* its end is lost */"),
            };
            if self.printer.arguments.json {
                self.object(level, frame.site, frame.start_tsc, ns, word);
            } else {
                self.open_lines(depth);
                let name = self.lookup(frame.site).0.to_owned();
                let (tid, width) = (self.tid, 2 * level);
                let time = micros(ns);
                let text = if is_printed { format!("}} /* {name} */") } else { format!("{name}();") };
                self.printer.line(format_args!("{tid:>7}) {time:>10} | {:width$}{text}{note}", ""));
            }
        }
        if *self.root == Some(depth) {
            *self.root = None;
        }
    }

    fn point(&mut self, depth: usize, site: u32, tsc: u64) {
        let is_root = self.root.is_none() && self.lookup(site).1;
        let level = if is_root { Some(0) } else { self.level(depth) };
        let Some(level) = level.filter(|_| self.printer.arguments.min_duration == 0) else { return };
        if self.printer.arguments.json {
            self.object(level, site, tsc, None, "point");
            return;
        }
        self.open_lines(depth);
        let name = self.lookup(site).0.to_owned();
        let (tid, width) = (self.tid, 2 * level);
        self.printer.line(format_args!("{tid:>7})            | {:width$}{name}();", ""));
    }
}

/// Microseconds with three digits behind the point, as ftrace has them.
fn micros(ns: Option<u64>) -> String {
    ns.map_or_else(String::new, |ns| format!("{}.{:03} us", ns / 1000, ns % 1000))
}
