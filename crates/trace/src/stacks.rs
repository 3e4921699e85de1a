//! All calls added up by the stack that they were made from.
//!
//! Owns [`Stacks`], a tree in which a node is a distinct stack, and [`stacks()`], which goes through a trace once to make one. Invariant: memory grows with the number of distinct
//! stacks, not with that of calls; a node comes behind its caller's.

use std::{collections::HashMap, path::Path};

use crate::{Catalog, Damage, Ending, Error, Frame, Frames, Order, Sink, Timeline};

/// A stack: a function, and the stack that called it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Node {
    /// The index of the stack that called; `None` if the function is the outermost that is known.
    pub caller: Option<u32>,
    /// The function, as the caller of [`Stacks::enter`] numbers them: a site, in the result of [`stacks()`].
    pub function: u32,
    /// How often the function was called from there.
    pub calls: u64,
    /// How long it ran then, without what it called, in the units of [`Stacks::leave`].
    pub own: u64,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Stacks {
    nodes: Vec<Node>,
    index: HashMap<(Option<u32>, u32), u32>,
    /// Nodes of the open calls of the current thread.
    open: Vec<u32>,
}

impl Stacks {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// All distinct stacks.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The current thread calls a function.
    pub fn enter(&mut self, function: u32) {
        let node = self.node(function);
        self.open.push(node);
    }

    /// The innermost call of the current thread ends, and has run for so long itself. When a thread has no more events, all of its calls have to end before another one's begin.
    pub fn leave(&mut self, own: u64) {
        if let Some(node) = self.open.pop() {
            let node = &mut self.nodes[node as usize];
            node.calls += 1;
            node.own += own;
        }
    }

    /// The current thread calls a function whose return is not seen.
    pub fn point(&mut self, function: u32) {
        let node = self.node(function);
        self.nodes[node as usize].calls += 1;
    }

    /// The stacks that a stack is on, itself first.
    pub fn callers<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = &'a Node> {
        std::iter::successors(Some(node), |node| node.caller.map(|index| &self.nodes[index as usize]))
    }

    /// For each node, how long its calls took with what they called.
    pub fn totals(&self) -> Vec<u64> {
        let mut totals: Vec<u64> = self.nodes.iter().map(|node| node.own).collect();
        for (index, node) in self.nodes.iter().enumerate().rev() {
            if let Some(caller) = node.caller {
                totals[caller as usize] += totals[index];
            }
        }
        totals
    }

    fn node(&mut self, function: u32) -> u32 {
        let caller = self.open.last().copied();
        *self.index.entry((caller, function)).or_insert_with(|| {
            self.nodes.push(Node { caller, function, calls: 0, own: 0 });
            u32::try_from(self.nodes.len() - 1).unwrap_or(u32::MAX)
        })
    }
}

impl Sink for Stacks {
    type Data = ();

    fn open(&mut self, _: usize, site: u32, _: u64) {
        self.enter(site);
    }

    fn close(&mut self, _: usize, frame: Frame<()>, tsc: u64, ending: Ending) {
        let ticks = if ending == Ending::Unknown { 0 } else { frame.ticks(tsc) };
        self.leave(ticks.saturating_sub(frame.callees_ticks));
    }

    fn point(&mut self, _: usize, site: u32, _: u64) {
        Self::point(self, site);
    }
}

/// Goes through a trace. Functions are sites, times are ticks.
///
/// # Errors
/// Those of [`Timeline::open`] and [`Timeline::next_part`].
pub fn stacks(path: &Path) -> Result<(Stacks, Catalog, Damage), Error> {
    let (mut timeline, catalog, mut damage) = Timeline::open(path, Order::Stream, |_, _| true)?;
    let (mut stacks, mut frames) = (Stacks::new(), Frames::default());
    while let Some(part) = timeline.next_part()? {
        if let Some(chunk) = part.starts {
            frames.start(chunk, &mut stacks);
        }
        frames.events(part.events, &mut stacks);
        if part.is_last {
            frames.finish(&mut stacks);
            frames = Frames::default();
        }
    }
    damage.senseless_chunks += timeline.senseless_chunks();
    Ok((stacks, catalog, damage))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_is_one_node_however_often_it_is_called() {
        let mut stacks = Stacks::new();
        for _ in 0..3 {
            stacks.enter(1);
            stacks.enter(2);
            stacks.leave(5);
            stacks.point(2);
            stacks.leave(10);
        }
        stacks.enter(2);
        stacks.leave(7);
        let node = |caller, function, calls, own| Node { caller, function, calls, own };
        assert_eq!(stacks.nodes(), [node(None, 1, 3, 30), node(Some(0), 2, 6, 15), node(None, 2, 1, 7)]);
        assert_eq!(stacks.totals(), [45, 15, 7]);
        let callers: Vec<u32> = stacks.callers(&stacks.nodes()[1]).map(|node| node.function).collect();
        assert_eq!(callers, [2, 1]);
    }
}
