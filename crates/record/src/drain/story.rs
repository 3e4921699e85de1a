//! What a trace that begins later has to be told first: the modules, and the processes that are there with what is mapped in them.
//!
//! Owns [`Story`], which the [`drain`](super) keeps while figures are shown, and [`About`], which says what a part of it is about. Invariant: what is over is no part of it, so it does not
//! grow with the time.

use super::ForTheTrace;

/// What something in a trace is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum About {
    /// A module, which may be mapped again.
    Module,
    /// A process.
    Process(u32),
    /// A module that is mapped in a process, with its bias.
    Mapping {
        /// In the trace.
        process: u32,
        /// In the trace.
        module: u32,
        /// See [`Load::bias`](trapline_trace::Load::bias).
        bias: u64,
    },
}

impl About {
    /// Whether that is over with this.
    fn has(self, other: Self) -> bool {
        match (self, other) {
            (Self::Process(own), Self::Mapping { process, .. }) => own == process,
            _ => self == other,
        }
    }
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Story(Vec<(About, ForTheTrace)>);

impl Story {
    /// Adds what was written.
    pub(super) fn add(&mut self, about: About, write: ForTheTrace) {
        self.0.push((about, write));
    }

    /// This is over.
    pub(super) fn end(&mut self, about: About) {
        self.0.retain(|(other, _)| !about.has(*other));
    }

    /// All parts, in their order.
    pub(super) fn parts(&self) -> impl Iterator<Item = &ForTheTrace> {
        self.0.iter().map(|(_, write)| write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_is_no_part_of_it() {
        let mapping = |process, bias| About::Mapping { process, module: 3, bias };
        let mut story = Story::default();
        let all = [About::Module, About::Process(1), mapping(1, 0), mapping(1, 4096), About::Process(2), mapping(2, 0)];
        for about in all {
            story.add(about, Box::new(|_| Ok(())));
        }
        let left = |story: &Story| -> Vec<About> { story.0.iter().map(|(about, _)| *about).collect() };
        story.end(mapping(1, 4096));
        assert_eq!(left(&story), [About::Module, About::Process(1), mapping(1, 0), About::Process(2), mapping(2, 0)]);
        story.end(About::Process(1));
        assert_eq!(left(&story), [About::Module, About::Process(2), mapping(2, 0)]);
        assert_eq!(story.parts().count(), 3);
    }
}
