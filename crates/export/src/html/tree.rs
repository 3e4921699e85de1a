//! Distinct stacks as bytes.
//!
//! Owns [`encode`]: for each stack, in columns of varints, how far before it its caller's stands (0: it has none), its function, its calls, and the nanoseconds that its function ran itself. Of very many stacks those
//! with most time are kept; what others had is added up beside them, under the function [`Encoded::others`] says. Invariants: a stack stands behind its caller's; calls and times of all stacks add up to the trace's.
//! `page/stacks.js` is the other half.

use trapline_trace::{Node, Stacks};

use super::block::{packed, varint};

/// So many stacks are kept at most, beside what adds others up.
const MOST: usize = 100_000;

/// Stacks for the page.
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    pub(super) stacks: usize,
    /// How many stacks were added up.
    pub(super) merged: usize,
}

/// Encodes all stacks. `index` gives the page's number of a function; `others` stands for functions of stacks that were added up.
pub(super) fn encode(stacks: &Stacks, index: impl Fn(u32) -> u32, others: u32) -> Encoded {
    let numbered: Vec<Node> =
        stacks.nodes().iter().map(|node| Node { function: index(node.function), ..*node }).collect();
    let kept = reduced(&numbered, &stacks.totals(), MOST, others);
    let mut columns: [Vec<u8>; 4] = Default::default();
    for (at, node) in (0..).zip(&kept) {
        let distance = node.caller.map_or(0, |caller| at - u64::from(caller));
        let numbers = [distance, u64::from(node.function), node.calls, node.own];
        for (column, number) in columns.iter_mut().zip(numbers) {
            varint(column, number);
        }
    }
    let merged = numbered.len() - kept.iter().filter(|node| node.function != others).count();
    Encoded { bytes: packed(&columns.concat()), stacks: kept.len(), merged }
}

/// The stacks with most time, each behind its caller's.
fn reduced(nodes: &[Node], totals: &[u64], most: usize, others: u32) -> Vec<Node> {
    if nodes.len() <= most {
        return nodes.to_vec();
    }
    let mut sorted = totals.to_vec();
    sorted.sort_unstable_by_key(|total| std::cmp::Reverse(*total));
    // A caller's total is no less than its callees', so callers of what is kept are kept.
    let limit = sorted[most];
    let mut kept: Vec<Node> = Vec::with_capacity(most);
    // For each stack, where it is; for those that are added up, what it is added to.
    let mut place: Vec<u32> = Vec::with_capacity(nodes.len());
    let mut sums: std::collections::HashMap<Option<u32>, u32> = std::collections::HashMap::new();
    for (at, node) in nodes.iter().enumerate() {
        let caller = node.caller.map(|caller| place[caller as usize]);
        let next = u32::try_from(kept.len()).unwrap_or(u32::MAX);
        let own = if totals[at] > limit {
            kept.push(Node { caller, ..*node });
            next
        } else {
            let is_in_sum = caller.is_some_and(|caller| kept[caller as usize].function == others);
            let sum = if is_in_sum { caller.unwrap_or(next) } else { *sums.entry(caller).or_insert(next) };
            if sum == next {
                kept.push(Node { caller, function: others, calls: 0, own: 0 });
            }
            kept[sum as usize].calls += node.calls;
            kept[sum as usize].own += node.own;
            sum
        };
        place.push(own);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_stacks_are_added_up_beside_the_large_ones() {
        let mut stacks = Stacks::new();
        for (outer, inner, own) in [(1, 2, 100), (1, 3, 5), (1, 4, 6), (5, 6, 1), (1, 2, 50)] {
            stacks.enter(outer);
            stacks.enter(inner);
            stacks.leave(own);
            stacks.leave(10);
        }
        let node = |caller, function, calls, own| Node { caller, function, calls, own };
        let kept = reduced(stacks.nodes(), &stacks.totals(), 2, 9);
        let expected = [node(None, 1, 4, 40), node(Some(0), 2, 2, 150), node(Some(0), 9, 2, 11), node(None, 9, 2, 11)];
        assert_eq!(kept, expected);
        assert_eq!(reduced(stacks.nodes(), &stacks.totals(), 6, 9), stacks.nodes());
        let encoded = encode(&stacks, |function| function, 9);
        assert_eq!((encoded.stacks, encoded.merged), (6, 0));
    }
}
