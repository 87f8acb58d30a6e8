//! Leaving out what nothing needs: ops, and parameters of a model under another one.

use std::collections::BTreeSet;

use dsgc_ir::{Graph, Op, Program, StateId, Value};

/// Whether each op is needed for the roots, or writes a state.
fn needed(graph: &Graph, roots: impl IntoIterator<Item = Value>) -> Vec<bool> {
    let mut used = vec![false; graph.values().len()];
    for root in roots {
        used[root.0 as usize] = true;
    }
    let mut needed = vec![false; graph.len()];
    for (id, op) in graph.ops().rev() {
        if matches!(op.op, Op::Write { .. }) || op.results().any(|r| used[r.0 as usize]) {
            needed[id.0 as usize] = true;
            for arg in &op.args {
                used[arg.0 as usize] = true;
            }
        }
    }
    needed
}

/// The states that the roots depend on.
pub(super) fn states_read(graph: &Graph, roots: &[Value]) -> BTreeSet<StateId> {
    let needed = needed(graph, roots.iter().copied());
    let ops = graph.ops().filter(|(id, _)| needed[id.0 as usize]);
    ops.filter_map(|(_, op)| if let Op::Read { state } = op.op { Some(state) } else { None }).collect()
}

/// Numbers of states after some are gone.
pub(super) struct Sweep {
    /// States that no op needs.
    pub gone: BTreeSet<StateId>,
}

impl Sweep {
    /// The new number of a state that stays.
    pub fn number(&self, id: StateId) -> StateId {
        assert!(!self.gone.contains(&id), "bug: state {} is needed, and gone", id.0);
        StateId(id.0 - self.gone.range(..id).count() as u32)
    }

    /// The program without these states, and without ops that nothing needs.
    pub fn program(&self, program: Program) -> Program {
        let graphs = program.graphs.iter().map(|graph| self.graph(graph, &program)).collect();
        let states = program.states.into_iter().enumerate();
        let kept = states.filter(|(at, _)| !self.gone.contains(&StateId(*at as u32)));
        Program { graphs, states: kept.map(|(_, state)| state).collect(), ..program }
    }

    fn graph(&self, graph: &Graph, program: &Program) -> Graph {
        let needed = needed(graph, graph.outputs.iter().map(|output| output.1));
        let mut new = Graph::like(graph, graph.name.clone());
        let mut map: Vec<Option<Value>> = vec![None; graph.values().len()];
        let place = |map: &[Option<Value>], old: Value| {
            map[old.0 as usize].unwrap_or_else(|| panic!("bug: graph @{} needs %{}, which is gone", graph.name, old.0))
        };
        for input in graph.inputs() {
            map[input.0 as usize] = Some(new.input(graph.name_of(input), graph.ty(input).clone()));
        }
        for (id, op) in graph.ops().filter(|(id, _)| needed[id.0 as usize]) {
            let args: Vec<Value> = op.args.iter().map(|&arg| place(&map, arg)).collect();
            let (kept, ty) = match op.op {
                Op::Read { state } => (Op::Read { state: self.number(state) }, Some(&program.state(state).ty)),
                Op::Write { state } => (Op::Write { state: self.number(state) }, Some(&program.state(state).ty)),
                ref other => (other.clone(), None),
            };
            let pushed = new.try_push(kept, &args, ty, op.site.clone());
            let pushed = pushed.unwrap_or_else(|why| panic!("bug: op {} of graph @{}: {why}", id.0, graph.name));
            let results: Vec<Value> = new.op(pushed).results().collect();
            for (old, result) in op.results().zip(results) {
                new.set_name(result, graph.name_of(old));
                map[old.0 as usize] = Some(result);
            }
        }
        new.outputs = graph.outputs.iter().map(|(name, value)| (name.clone(), place(&map, *value))).collect();
        new
    }
}
