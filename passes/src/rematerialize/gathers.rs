//! Parameters that are gathered for the forward pass and again for gradients, or kept in between: a cut of two choices each.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::cost::{sending, time_of_sending, types};
use dsgc_ir::{Graph, Op, OpId, Phase, Program, StateId, Value};

use crate::rebuild::{Rebuild, without_dead_ops};

/// A parameter of which ranks have parts, and that both passes of a graph gather.
pub(super) struct Gather {
    /// What is gathered.
    pub state: StateId,
    /// Bytes of the whole, which are kept where it is not gathered again.
    pub bytes: u64,
    /// How long it takes to gather it again, in the unit of [`super::cut::Cut::time`].
    pub time: u64,
}

/// Those of a graph, in the order of the forward pass.
pub(super) fn gathers(graph: &Graph, program: &Program) -> Vec<Gather> {
    // Pieces of a graph gather each for themselves.
    if program.mesh.pipeline > 1 {
        return Vec::new();
    }
    let bounds = graph.upper_bounds();
    let is_forward = |id: OpId| graph.op(id).site.phase == Phase::Forward;
    let again: BTreeMap<StateId, OpId> = all(graph).filter(|&(_, id)| !is_forward(id)).collect();
    let one = |(state, id): (StateId, OpId)| {
        let op = graph.op(id);
        let twice = again.get(&state).is_some_and(|&other| graph.op(other).op == op.op);
        let (args, results) = types(graph, op);
        let bytes = results[0].bytes(&bounds).ok().filter(|_| twice)? as u64;
        let time = time_of_sending(sending(&op.op, &args, &results, &bounds, &program.mesh).ok()?);
        Some(Gather { state, bytes, time })
    };
    all(graph).filter(|&(_, id)| is_forward(id)).filter_map(one).collect()
}

/// The gathers of states by what they gather.
fn all(graph: &Graph) -> impl Iterator<Item = (StateId, OpId)> {
    graph.ops().filter_map(|(id, op)| {
        let Op::AllGather { .. } = op.op else { return None };
        let [operand] = op.args[..] else { return None };
        match graph.op(graph.def(operand)?).op {
            Op::Read { state } => Some((state, id)),
            _ => None,
        }
    })
}

/// The graph in which gradients use what the forward pass has gathered of these, and gather everything else once: what runs
/// again uses it too.
pub(super) fn keep(graph: Graph, program: &Program, kept: &BTreeSet<StateId>) -> Graph {
    let mut first: BTreeMap<(StateId, bool), OpId> = BTreeMap::new();
    let mut instead: BTreeMap<OpId, Value> = BTreeMap::new();
    for (state, id) in all(&graph) {
        let is_forward = kept.contains(&state) || graph.op(id).site.phase == Phase::Forward;
        let of = *first.entry((state, is_forward)).or_insert(id);
        if of != id && graph.op(of).op == graph.op(id).op {
            instead.insert(id, graph.op(of).result());
        }
    }
    if instead.is_empty() {
        return graph;
    }
    let mut rebuild = Rebuild::same(&graph);
    for (id, op) in graph.ops() {
        match instead.get(&id) {
            Some(&of) => {
                let of = rebuild.get(of);
                rebuild.set(op.result(), of);
            }
            None => rebuild.copy(op, program),
        }
    }
    without_dead_ops(&rebuild.finish(), program)
}
