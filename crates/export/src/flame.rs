//! Distinct stacks, a line each, and the flame graph that is drawn of them.
//!
//! Owns [`Folded`] and [`Flamegraph`]. The outermost frame is the program, so that programs of one trace stand side by side; a stack's weight is the time that its innermost
//! function ran itself, in nanoseconds, so that widths are total times. Invariant: `;` and line ends separate, so no name has them.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use inferno::flamegraph::{self, Options};

use trapline_trace::Stacks;

use crate::{
    source::{Call, Enter, Function, Output, Thread, Trace},
    target::Stream,
};

/// Stacks of all programs, by their names.
#[derive(Default)]
struct Programs {
    trees: BTreeMap<String, Stacks>,
    current: Stacks,
}

impl Programs {
    fn begin(&mut self, thread: &Thread) {
        self.current = self.trees.remove(thread.program()).unwrap_or_default();
    }

    fn end(&mut self, thread: &Thread) {
        self.trees.insert(thread.program().to_owned(), std::mem::take(&mut self.current));
    }

    /// A line a stack that has a weight.
    fn lines(&self, trace: &Trace) -> impl Iterator<Item = String> {
        let names: Vec<String> = trace.functions.iter().map(frame).collect();
        self.trees.iter().flat_map(move |(program, tree)| {
            let names = names.clone();
            let weighty = tree.nodes().iter().filter(|node| node.own > 0);
            weighty.map(move |node| {
                let stack: Vec<u32> = tree.callers(node).map(|node| node.function).collect();
                let frames = stack.iter().rev().map(|function| names[*function as usize].as_str());
                let frames = std::iter::once(program.as_str()).chain(frames).collect::<Vec<_>>().join(";");
                format!("{frames} {}", node.own)
            })
        })
    }
}

/// A function's name as a frame.
fn frame(function: &Function) -> String {
    function.name.replace(';', ":").replace(['\n', '\r'], " ")
}

/// See the module's text.
pub(crate) struct Folded {
    output: Stream,
    programs: Programs,
}

impl Folded {
    pub(crate) fn new(output: Stream) -> Self {
        Self { output, programs: Programs::default() }
    }
}

/// Drawn where there is no stack to draw: an empty picture would be a broken one.
const NOTHING: &str = "no call has a duration 1";

/// See the module's text.
pub(crate) struct Flamegraph(Folded);

impl Flamegraph {
    pub(crate) fn new(output: Stream) -> Self {
        Self(Folded::new(output))
    }
}

impl Output for Folded {
    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        self.programs.begin(thread);
        Ok(())
    }

    fn enter(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.programs.current.enter(enter.function);
        Ok(())
    }

    fn leave(&mut self, _: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.programs.current.leave(call.self_ns);
        Ok(())
    }

    fn point(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.programs.current.point(enter.function);
        Ok(())
    }

    fn thread_end(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        self.programs.end(thread);
        Ok(())
    }

    fn end(mut self, trace: &Trace) -> io::Result<()> {
        for line in self.programs.lines(trace) {
            writeln!(self.output, "{line}")?;
        }
        self.output.flush()
    }
}

impl Output for Flamegraph {
    fn thread(&mut self, trace: &Trace, thread: &Thread) -> io::Result<()> {
        self.0.thread(trace, thread)
    }

    fn enter(&mut self, trace: &Trace, thread: &Thread, enter: Enter) -> io::Result<()> {
        self.0.enter(trace, thread, enter)
    }

    fn leave(&mut self, trace: &Trace, thread: &Thread, call: Call) -> io::Result<()> {
        self.0.leave(trace, thread, call)
    }

    fn point(&mut self, trace: &Trace, thread: &Thread, enter: Enter) -> io::Result<()> {
        self.0.point(trace, thread, enter)
    }

    fn thread_end(&mut self, trace: &Trace, thread: &Thread) -> io::Result<()> {
        self.0.thread_end(trace, thread)
    }

    fn end(self, trace: &Trace) -> io::Result<()> {
        let Folded { mut output, programs } = self.0;
        let mut lines: Vec<String> = programs.lines(trace).collect();
        if lines.is_empty() {
            lines.push(NOTHING.to_owned());
        }
        let command = trace.catalog.meta.as_ref().map(|meta| meta.command.join(" ")).unwrap_or_default();
        let title = if command.is_empty() { "trapline" } else { &command };
        let mut options = Options::default();
        title.clone_into(&mut options.title);
        "ns".clone_into(&mut options.count_name);
        flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut output)?;
        output.flush()
    }
}
