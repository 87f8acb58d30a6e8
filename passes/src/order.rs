//! Puts ops in an order in which fewer bytes are live at once.
//!
//! ```text
//! %big = broadcast %s shape=[4096]          %y = reduce_sum %x axes=[0]      // %x dies before %big is made
//! %y = reduce_sum %x axes=[0]         =>    %big = broadcast %s shape=[4096]
//! %z = add %big, %w                         %z = add %big, %w
//! ```
//!
//! Program order is good already: autodiff writes gradients in the order in which what they need dies. Two moves make it
//! better. An op that makes more bytes than die with it waits until somebody needs its result, but never longer than to
//! where an operand dies without it; an op with which more bytes die than it makes runs as soon as it can. So gradients die
//! in the optimizer right after they are final, unless clipping needs all of them first. Neither move makes more live at
//! any other time, if every value counts as much as in [`crate::plan_memory`].
//!
//! One more order goes by what is gathered, as DeepCompile's schedule of ZeRO 3 does (Tanaka et al. 2025): of the gathers
//! that are dead again before another one is needed, that with which most bytes die on the way goes first, to its last
//! use, so what the others leave lies there when it is gone. That may make more live elsewhere.
//!
//! What lies in place of what else may change, so each order is weighed by the planner's own count, and only an order with
//! a smaller peak takes the place of the old one. Of equally good ones the first is taken, and ties inside of one go by
//! program order.
//!
//! What reads a state's old value stays before the op that makes the new one, which may lie in its place.

use dsgc_ir::diag::Diag;
use dsgc_ir::verify::{last_uses, root};
use dsgc_ir::{Bindings, Graph, Op, OpId, Program, StateId, Target, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::plan_memory::{live_bytes, too_large};
use crate::rebuild::Rebuild;

/// The pass.
pub const PASS: Pass = Pass { name: "order", requires: &[Fact::Typed], provides: &[], numerics: Numerics::Exact, run };

/// Bytes of a result that is as good as none: a number.
const TINY: usize = 8;

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut graphs = Vec::with_capacity(program.graphs.len());
    for graph in &program.graphs {
        graphs.push(match order(graph, &program, context.target) {
            None => graph.clone(),
            Some(Better { graph, moved, before, after }) => {
                context.matched("op at another place", moved);
                if context.explain {
                    let text = format!("@{}: {moved} ops moved, at most {after} bytes live, not {before}", graph.name);
                    context.changed(text);
                }
                graph
            }
        });
    }
    program.graphs = graphs;
    Ok(program)
}

/// A graph in a better order.
pub(crate) struct Better {
    pub(crate) graph: Graph,
    /// Ops that another op than before precedes.
    moved: usize,
    /// Most bytes live at once.
    before: usize,
    after: usize,
}

/// The graph in the best order that is found, if it is better than its own.
pub(crate) fn order(graph: &Graph, program: &Program, target: &dyn Target) -> Option<Better> {
    if too_large(graph).is_some() {
        return None;
    }
    let work = Work::of(graph, program);
    let same: Vec<OpId> = graph.ops().map(|(id, _)| id).collect();
    let late = work.late();
    let mut orders = vec![late.clone(), work.early(&same, false), work.early(&late, false), work.early(&late, true)];
    orders.extend(work.by_gathers(graph, &late).map(|order| work.early(&order, false)));
    let before = live_bytes(graph, program, target);
    let mut best: Option<Better> = None;
    for order in orders {
        let moved = order.iter().enumerate().filter(|(i, op)| *i as u32 != op.0).count();
        if moved == 0 {
            continue;
        }
        let mut rebuild = Rebuild::same(graph);
        order.iter().for_each(|&id| rebuild.copy(graph.op(id), program));
        let graph = rebuild.finish();
        let after = live_bytes(&graph, program, target);
        if after < best.as_ref().map_or(before, |b| b.after) {
            best = Some(Better { graph, moved, before, after });
        }
    }
    best
}

/// What is known of the ops of a graph in their own order.
struct Work {
    /// Per op, the ops that must run before it, ascending.
    after: Vec<Vec<OpId>>,
    /// Per op, bytes that it makes.
    born: Vec<usize>,
    /// Per op, bytes for which it is the last use.
    freed: Vec<usize>,
    /// Per op, the other ops that use what dies with it.
    mourners: Vec<Vec<OpId>>,
    /// Per op, the ops with which its operands die, if not with it.
    until: Vec<Vec<OpId>>,
}

impl Work {
    fn of(graph: &Graph, program: &Program) -> Work {
        let bounds = graph.upper_bounds();
        let last = last_uses(graph);
        let n = graph.len();
        let users = users(graph);
        let in_state = in_states(graph, program);
        let own = |v: Value| !in_state[v.0 as usize] && root(graph, v) == v;
        let mut work = Work {
            after: dependences(graph, &users),
            born: vec![0; n],
            freed: vec![0; n],
            mourners: vec![Vec::new(); n],
            until: vec![Vec::new(); n],
        };
        for (id, op) in graph.ops() {
            let at = id.0 as usize;
            work.born[at] = op.results().filter(|&r| own(r)).map(|r| bytes(graph, r, &bounds)).sum();
            let mut roots: Vec<Value> = op.args.iter().map(|&arg| root(graph, arg)).collect();
            roots.sort_unstable();
            roots.dedup();
            // When a number dies does not matter.
            for v in roots.into_iter().filter(|&v| own(v) && bytes(graph, v, &bounds) > TINY) {
                let end = last[v.0 as usize];
                if end == id.0 {
                    work.freed[at] += bytes(graph, v, &bounds);
                    work.mourners[at].extend(users[v.0 as usize].iter().filter(|&&u| u != id));
                } else if (end as usize) < n {
                    work.until[at].push(OpId(end));
                }
            }
        }
        work
    }

    /// Ops that make more than dies with them, as late as they can run without making anything die later.
    fn late(&self) -> Vec<OpId> {
        let n = self.born.len();
        // What must run before each op, besides its operands: waiting ops that use what dies with it.
        let mut before = self.after.clone();
        for (at, until) in self.until.iter().enumerate() {
            until.iter().for_each(|end| before[end.0 as usize].push(OpId(at as u32)));
        }
        let mut placed = vec![false; n];
        let mut order = Vec::with_capacity(n);
        let waits = (0..n).filter(|&at| self.born[at] > self.freed[at]);
        let mut waiting = vec![false; n];
        waits.for_each(|at| waiting[at] = true);
        for op in (0..n).filter(|&at| !waiting[at]).chain(0..n) {
            // A stack in the place of a recursion: a chain of waiting ops can be as long as the graph.
            let mut stack = vec![op];
            while let Some(&top) = stack.last() {
                let missing = before[top].iter().map(|b| b.0 as usize).filter(|&b| !placed[b]).min();
                match missing {
                    Some(first) => stack.push(first),
                    None => {
                        stack.pop();
                        if !placed[top] {
                            placed[top] = true;
                            order.push(OpId(top as u32));
                        }
                    }
                }
            }
        }
        order
    }

    /// Ops with which more dies than they make, as early as they can run and still be the last use; if `tiny`, also those
    /// that make a number or nothing, which may be the last that keeps another op from that.
    fn early(&self, order: &[OpId], tiny: bool) -> Vec<OpId> {
        let mut place = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, op)| place[op.0 as usize] = i);
        // Reads and numbers, which cost nothing, come along with the first op that uses them.
        let comes_along = |at: usize| self.after[at].is_empty() && self.born[at] <= TINY;
        // Per op, the place behind which it runs: its own, or that of the last op that it needs.
        let mut behind = place.clone();
        for op in order {
            let at = op.0 as usize;
            let gains = self.freed[at] > self.born[at] || tiny && self.born[at] <= TINY;
            if gains && !comes_along(at) {
                let needs = self.after[at].iter().chain(&self.mourners[at]).map(|n| n.0 as usize);
                let earliest = needs.filter(|&n| place[n] < place[at] && !comes_along(n)).map(|n| behind[n]).max();
                behind[at] = earliest.unwrap_or(0);
            }
        }
        let mut keys: Vec<(usize, usize, usize)> =
            (0..order.len()).map(|at| (behind[at], place[at], usize::MAX)).collect();
        for op in order {
            let user = keys[op.0 as usize];
            for need in self.after[op.0 as usize].iter().map(|n| n.0 as usize).filter(|&n| comes_along(n)) {
                keys[need] = keys[need].min((user.0, user.1, place[need]));
            }
        }
        let mut early = order.to_vec();
        early.sort_by_key(|op| keys[op.0 as usize]);
        early
    }

    /// Gathers one after the other, each with what leads to its last use; `None` where there are not two to choose from.
    fn by_gathers(&self, graph: &Graph, order: &[OpId]) -> Option<Vec<OpId>> {
        let users = users(graph);
        let gathers: Vec<usize> =
            graph.ops().filter(|(_, op)| matches!(op.op, Op::AllGather { .. })).map(|(id, _)| id.0 as usize).collect();
        if gathers.len() < 2 {
            return None;
        }
        let uses = |gather: usize| {
            let results = graph.op(OpId(gather as u32)).results();
            results.flat_map(|r| users[r.0 as usize].clone()).collect::<Vec<OpId>>()
        };
        let uses: Vec<Vec<OpId>> = gathers.iter().map(|&gather| uses(gather)).collect();
        // Per op, the gathers that it cannot do without.
        let words = gathers.len().div_ceil(64);
        let mut needs = vec![vec![0u64; words]; self.after.len()];
        for at in 0..needs.len() {
            let mut own = vec![0u64; words];
            for before in &self.after[at] {
                own.iter_mut().zip(&needs[before.0 as usize]).for_each(|(own, other)| *own |= other);
            }
            if let Ok(number) = gathers.binary_search(&at) {
                own[number / 64] |= 1 << (number % 64);
            }
            needs[at] = own;
        }
        let mut place = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, op)| place[op.0 as usize] = i);
        let mut placed = vec![false; order.len()];
        let mut gathered = vec![0u64; words];
        let mut made = Vec::with_capacity(order.len());
        let mut left: Vec<usize> = (0..gathers.len()).collect();
        while !left.is_empty() {
            let alone = |&number: &usize| {
                let others = |word: usize| {
                    let all = uses[number].iter().fold(0, |all, op| all | needs[op.0 as usize][word]) & !gathered[word];
                    if word == number / 64 { all & !(1 << (number % 64)) } else { all }
                };
                (0..words).all(|word| others(word) == 0)
            };
            let way = |number: usize| self.way(&uses[number], &placed, &place);
            let dies = |way: &[usize]| way.iter().map(|&at| self.freed[at]).sum::<usize>();
            let best = left.iter().copied().filter(alone).map(|number| (number, way(number)));
            let best = best.max_by_key(|(number, way)| (dies(way), std::cmp::Reverse(place[gathers[*number]])));
            // Else the next one of the order, and no further.
            let (number, way) = best.unwrap_or_else(|| {
                let &number = left.iter().min_by_key(|&&number| place[gathers[number]]).expect("some are left");
                (number, self.way(&[OpId(gathers[number] as u32)], &placed, &place))
            });
            for at in way {
                placed[at] = true;
                made.push(OpId(at as u32));
                if let Ok(other) = gathers.binary_search(&at) {
                    gathered[other / 64] |= 1 << (other % 64);
                }
            }
            left.retain(|&other| other != number && !placed[gathers[other]]);
        }
        made.extend(order.iter().filter(|op| !placed[op.0 as usize]));
        Some(made)
    }

    /// What leads to these ops, themselves too, and is not placed yet.
    fn way(&self, to: &[OpId], placed: &[bool], place: &[usize]) -> Vec<usize> {
        let mut found = std::collections::BTreeSet::new();
        let mut open: Vec<usize> = to.iter().map(|op| op.0 as usize).collect();
        while let Some(at) = open.pop() {
            if !placed[at] && found.insert(at) {
                open.extend(self.after[at].iter().map(|before| before.0 as usize));
            }
        }
        let mut way: Vec<usize> = found.into_iter().collect();
        way.sort_by_key(|&at| place[at]);
        way
    }
}

fn bytes(graph: &Graph, value: Value, bounds: &Bindings) -> usize {
    graph.ty(value).bytes(bounds).expect("the verifier saw that every dim is declared")
}

/// Per value, whether it has no bytes of its own: it is a state's old value, or is made in the place of the state that it
/// is written to.
fn in_states(graph: &Graph, program: &Program) -> Vec<bool> {
    let mut in_state = vec![false; graph.values().len()];
    for (_, op) in graph.ops() {
        match op.op {
            Op::Read { state } | Op::Write { state } if program.state(state).on_host => {}
            Op::Read { .. } => in_state[op.result().0 as usize] = true,
            Op::Write { .. } => in_state[root(graph, op.args[0]).0 as usize] = true,
            _ => {}
        }
    }
    in_state
}

/// Per value, the ops that use it or a view of it.
pub(crate) fn users(graph: &Graph) -> Vec<Vec<OpId>> {
    let mut users: Vec<Vec<OpId>> = vec![Vec::new(); graph.values().len()];
    for (id, op) in graph.ops() {
        op.args.iter().for_each(|&arg| users[root(graph, arg).0 as usize].push(id));
    }
    users
}

/// Per op, the ops that must run before it: those that make its operands, and those that need the old value of a state
/// before it makes the new one.
pub(crate) fn dependences(graph: &Graph, users: &[Vec<OpId>]) -> Vec<Vec<OpId>> {
    let mut after: Vec<Vec<OpId>> =
        graph.ops().map(|(_, op)| op.args.iter().filter_map(|&arg| graph.def(arg)).collect()).collect();
    let mut reads: Vec<(StateId, OpId)> = Vec::new();
    for (id, op) in graph.ops() {
        if let Op::Read { state } = op.op {
            reads.push((state, id));
        }
    }
    reads.sort_unstable();
    for (write, op) in graph.ops() {
        let Op::Write { state } = op.op else { continue };
        let renewal = graph.def(root(graph, op.args[0])).unwrap_or(write);
        let first = reads.partition_point(|r| r.0 < state);
        for &(_, read) in reads[first..].iter().take_while(|r| r.0 == state) {
            let old = graph.op(read).result();
            for &user in users[old.0 as usize].iter().chain([&read]) {
                // What uses the old value later has a copy of it, which is made before the write.
                for end in [renewal, write] {
                    if user < end {
                        after[end.0 as usize].push(user);
                    }
                }
            }
        }
    }
    for needs in &mut after {
        needs.sort_unstable();
        needs.dedup();
    }
    after
}
