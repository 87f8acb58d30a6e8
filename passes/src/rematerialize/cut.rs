//! What of a group of ops to keep for the backward pass, and what to compute again: a minimum cut.
//!
//! A value that is needed later is kept, for its bytes, or made again by its op, for the op's time, and then the op's
//! operands must be there too. Every op and every value is a node, on the side of the source if it is not there later, on
//! the side of the sink if it is. Edges that a cut pays for:
//!
//! ```text
//! source -> op      time     the op runs again
//! op -> result      bytes    the result is there and the op does not run again: it is kept
//! source -> value   bytes    the same of a value from outside
//! operand -> op     never    what runs again has its operands
//! value -> sink     never    what is needed is there
//! ```
//!
//! Bytes and time have a price each, so one family of cuts goes from the least time to the least bytes. Those on its lower
//! hull are all that some price makes best. The construction is that of AOTAutograd's partitioner, with Checkmate's cost
//! of running again (Jain et al. 2020). Of equally good cuts the one that computes least again is taken, which does not
//! depend on how the flow was found.

use petgraph::algo::dinics;
use petgraph::graph::{Graph, NodeIndex};
use petgraph::visit::EdgeRef;

/// A group of ops.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Problem {
    pub(super) ops: Vec<Op>,
    pub(super) values: Vec<Value>,
}

/// An op of the group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Op {
    /// Its operands, by their place in [`Problem::values`].
    pub(super) args: Vec<usize>,
    /// How long it takes; `None` if it must not run again.
    pub(super) time: Option<u64>,
}

/// A value of the group, or one from outside that its ops use.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Value {
    /// The op of the group that makes it.
    pub(super) made_by: Option<usize>,
    /// Bytes to keep; `None` if it has none of its own to keep.
    pub(super) keep: Option<u64>,
    /// Whether the backward pass uses it.
    pub(super) needed: bool,
}

/// What runs again, and what that leaves to keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Per op, whether it runs again.
    pub(super) again: Vec<bool>,
    /// Bytes that are kept.
    pub(super) bytes: u64,
    /// Time of what runs again.
    pub(super) time: u64,
}

impl Problem {
    /// Bytes that are kept if nothing runs again but what has no bytes of its own to keep. No best cut keeps more.
    pub(super) fn all_kept(&self) -> u64 {
        let mut there: Vec<bool> = self.values.iter().map(|value| value.needed).collect();
        // Operands stand before results.
        for (at, value) in self.values.iter().enumerate().rev() {
            if let (true, None, Some(op)) = (there[at], value.keep, value.made_by) {
                self.ops[op].args.iter().for_each(|&arg| there[arg] = true);
            }
        }
        self.values.iter().zip(there).filter(|(_, there)| *there).filter_map(|(value, _)| value.keep).sum()
    }

    /// All cuts that are best for some price of time in bytes: from the least time to the least bytes.
    pub(super) fn hull(&self) -> Vec<Cut> {
        let all_bytes: u128 = self.values.iter().filter_map(|v| v.keep).map(u128::from).sum();
        let all_time: u128 = self.ops.iter().filter_map(|op| op.time).map(u128::from).sum();
        let (first, last) = (self.cut(1, all_bytes + 1), self.cut(all_time + 1, 1));
        let mut hull = vec![first.clone()];
        if (first.bytes, first.time) != (last.bytes, last.time) {
            self.between(&first, &last, &mut hull);
            hull.push(last);
        }
        hull
    }

    /// The cuts of the hull between two of them: the price at which both are equal finds the one that is furthest below,
    /// if there is one (Eisner and Severance 1976).
    fn between(&self, left: &Cut, right: &Cut, hull: &mut Vec<Cut>) {
        let of_bytes = u128::from(right.time - left.time);
        let of_time = u128::from(left.bytes - right.bytes);
        let price = |cut: &Cut| u128::from(cut.bytes) * of_bytes + u128::from(cut.time) * of_time;
        let middle = self.cut(of_bytes, of_time);
        if price(&middle) < price(left) {
            self.between(left, &middle, hull);
            hull.push(middle.clone());
            self.between(&middle, right, hull);
        }
    }

    /// The best cut at these prices of a byte and of a unit of time.
    pub(super) fn cut(&self, of_bytes: u128, of_time: u128) -> Cut {
        let mut network: Graph<(), u128> = Graph::new();
        let (source, sink) = (network.add_node(()), network.add_node(()));
        let ops: Vec<NodeIndex> = self.ops.iter().map(|_| network.add_node(())).collect();
        let values: Vec<NodeIndex> = self.values.iter().map(|_| network.add_node(())).collect();
        let bytes = |v: &Value| v.keep.map(|bytes| u128::from(bytes) * of_bytes);
        let time = |op: &Op| op.time.map(|time| u128::from(time) * of_time);
        let finite = self.values.iter().filter_map(bytes).chain(self.ops.iter().filter_map(time));
        let never = finite.sum::<u128>() + 1;
        for (op, &node) in self.ops.iter().zip(&ops) {
            network.add_edge(source, node, time(op).unwrap_or(never));
            for &arg in &op.args {
                network.add_edge(values[arg], node, never);
            }
        }
        for (value, &node) in self.values.iter().zip(&values) {
            network.add_edge(value.made_by.map_or(source, |op| ops[op]), node, bytes(value).unwrap_or(never));
            if value.needed {
                network.add_edge(node, sink, never);
            }
        }
        let (flow, flows) = dinics(&network, source, sink);
        let there = reaches(&network, sink, &flows);
        let again: Vec<bool> = ops.iter().map(|&op| there[op.index()]).collect();
        let kept = |v: &Value, node: NodeIndex| there[node.index()] && !v.made_by.is_some_and(|op| again[op]);
        let kept = self.values.iter().zip(&values).filter(|(v, node)| kept(v, **node)).map(|(v, _)| v);
        let cut = Cut {
            bytes: kept.map(|v| v.keep.expect("bug: a cut keeps what has no bytes")).sum(),
            time: self.ops.iter().zip(&again).filter(|(_, again)| **again).filter_map(|(op, _)| op.time).sum(),
            again,
        };
        let price = u128::from(cut.bytes) * of_bytes + u128::from(cut.time) * of_time;
        assert_eq!(price, flow, "bug: a cut costs more than flows through it");
        cut
    }
}

/// Per node, whether more could flow from it to the sink.
fn reaches(network: &Graph<(), u128>, sink: NodeIndex, flows: &[u128]) -> Vec<bool> {
    use petgraph::Direction::{Incoming, Outgoing};
    let mut there = vec![false; network.node_count()];
    there[sink.index()] = true;
    let mut stack = vec![sink];
    while let Some(node) = stack.pop() {
        let into = network.edges_directed(node, Incoming);
        let into = into.filter(|e| flows[e.id().index()] < *e.weight()).map(|e| e.source());
        let back = network.edges_directed(node, Outgoing).filter(|e| flows[e.id().index()] > 0).map(|e| e.target());
        for other in into.chain(back).collect::<Vec<_>>() {
            if !there[other.index()] {
                there[other.index()] = true;
                stack.push(other);
            }
        }
    }
    there
}

#[cfg(test)]
mod tests {
    use dsgc_ir::fuzz::Rng;

    use super::*;

    /// Bytes and time if exactly these ops run again; `None` if one of them must not, or if a view would be kept.
    fn cost(problem: &Problem, again: &[bool]) -> Option<(u64, u64)> {
        let mut used: Vec<bool> = problem.values.iter().map(|v| v.needed).collect();
        let mut time = 0;
        for (op, _) in problem.ops.iter().zip(again).filter(|(_, again)| **again) {
            time += op.time?;
            op.args.iter().for_each(|&arg| used[arg] = true);
        }
        let mut bytes = 0;
        for (value, _) in problem.values.iter().zip(&used).filter(|(_, used)| **used) {
            if !value.made_by.is_some_and(|op| again[op]) {
                bytes += value.keep?;
            }
        }
        Some((bytes, time))
    }

    /// A random group of at most 12 ops. Its first op can be kept, and whatever has no bytes can run again.
    fn random(seed: u64) -> Problem {
        let mut rng = Rng::new(seed);
        let mut problem = Problem::default();
        for _ in 0..1 + rng.below(3) {
            let keep = Some(rng.below(20) as u64);
            problem.values.push(Value { made_by: None, keep, needed: rng.once_in(4) });
        }
        for op in 0..1 + rng.below(12) {
            let args = (0..1 + rng.below(3)).map(|_| rng.below(problem.values.len())).collect();
            let view = rng.once_in(4);
            let time = if view { Some(0) } else { (!rng.once_in(5)).then(|| rng.below(10) as u64) };
            problem.ops.push(Op { args, time });
            for _ in 0..1 + rng.below(2) {
                let keep = (!view).then(|| rng.below(20) as u64);
                problem.values.push(Value { made_by: Some(op), keep, needed: rng.once_in(3) });
            }
        }
        problem
    }

    #[test]
    fn cuts_are_the_best_of_all_choices() {
        let mut sizes = 0;
        for seed in 0..300 {
            let problem = random(seed);
            let n = problem.ops.len();
            let choice = |mask: u32| (0..n).map(|i| mask >> i & 1 == 1).collect::<Vec<bool>>();
            let all: Vec<(u64, u64)> = (0..1 << n).filter_map(|mask| cost(&problem, &choice(mask))).collect();
            for (of_bytes, of_time) in [(1, 0), (1, 1), (1, 3), (7, 2), (1, 1000), (1000, 1)] {
                let price = |(bytes, time): (u64, u64)| u128::from(bytes) * of_bytes + u128::from(time) * of_time;
                let best = all.iter().map(|&c| price(c)).min().expect("keeping everything is a choice");
                let cut = problem.cut(of_bytes, of_time);
                assert_eq!(cost(&problem, &cut.again), Some((cut.bytes, cut.time)), "seed {seed}");
                assert_eq!(price((cut.bytes, cut.time)), best, "seed {seed} at {of_bytes}, {of_time}");
            }
            // What is needed is a choice too, and none of the hull keeps more.
            let kept = problem.all_kept();
            assert!(all.contains(&(kept, 0)), "seed {seed}: {kept} of {all:?}");
            assert!(problem.hull().iter().all(|cut| cut.bytes <= kept), "seed {seed}");
            sizes = sizes.max(n);
        }
        assert_eq!(sizes, 12);
    }

    #[test]
    fn hulls_are_what_some_price_makes_best() {
        let mut longest = 0;
        for seed in 300..500 {
            let problem = random(seed);
            let n = problem.ops.len();
            let choice = |mask: u32| (0..n).map(|i| mask >> i & 1 == 1).collect::<Vec<bool>>();
            let mut all: Vec<(u64, u64)> = (0..1 << n).filter_map(|mask| cost(&problem, &choice(mask))).collect();
            all.sort_unstable_by_key(|&(bytes, time)| (time, bytes));
            // The lower left hull by the plain definition: from each corner on to the steepest way down.
            let mut corners = vec![all[0]];
            while let Some(next) = all
                .iter()
                .filter(|c| c.0 < corners[corners.len() - 1].0)
                .max_by(|a, b| {
                    let at = corners[corners.len() - 1];
                    let slope = |c: &(u64, u64)| (u128::from(at.0 - c.0), u128::from(c.1 - at.1));
                    let ((a_saved, a_spent), (b_saved, b_spent)) = (slope(a), slope(b));
                    (a_saved * b_spent).cmp(&(b_saved * a_spent)).then(a.0.cmp(&b.0).reverse())
                })
                .copied()
            {
                corners.push(next);
            }
            let hull: Vec<(u64, u64)> = problem.hull().iter().map(|c| (c.bytes, c.time)).collect();
            assert_eq!(hull, corners, "seed {seed}");
            longest = longest.max(hull.len());
        }
        assert!(longest > 3, "the longest hull has {longest} corners");
    }
}
