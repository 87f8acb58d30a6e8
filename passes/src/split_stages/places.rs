//! Where each op of a graph runs, and in which piece.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::{Class, Graph, Op, OpId, Phase, Program, StateId, Value};

use super::{Layers, is_cheap};

/// Places along `pipeline`.
pub(super) type Places = BTreeSet<usize>;

/// Where states are; those that are not named may be anywhere.
pub(super) type Homes = BTreeMap<StateId, Places>;

/// A graph in which accumulators of several places are told apart.
pub(super) struct Prepared {
    pub graph: Graph,
    /// Ops that run at these places: parts of what several places add up.
    pub pinned: BTreeMap<OpId, Places>,
    /// Ops that add to an accumulator.
    pub sums: BTreeSet<OpId>,
}

/// What is known of the values of a graph.
pub(super) struct Placed {
    all: Places,
    /// Per value, where it can be made without a message.
    on: Vec<Places>,
    /// Per value, whether pieces make it anew.
    light: Vec<bool>,
    /// Per value, whether a state whose place is known takes part in it.
    homed: Vec<bool>,
    /// Per op, what it does: 0 forward, 1 gradients, 2 gradients of weights that are apart.
    pub work: Vec<u8>,
    /// Per op that is not made anew, and place, how often values have come from another piece before.
    pub level: Vec<BTreeMap<usize, usize>>,
}

/// Whether the layers of a model are computed in a graph.
pub(super) fn has_layers(graph: &Graph) -> bool {
    graph.ops().any(|(_, op)| {
        let heavy = matches!(op.op.class(), Class::Contraction | Class::Composite);
        op.site.tag.is_some() && heavy && op.site.phase != Phase::Update
    })
}

/// Values that lie between pieces for gradients, wherever layers are cut: those that are not made anew.
pub(super) fn kept(program: &Program, graph: &Graph) -> BTreeSet<Value> {
    let mut kept = BTreeSet::new();
    if !has_layers(graph) || graph.ops().all(|(_, op)| op.site.phase == Phase::Forward) {
        return kept;
    }
    let prepared = Prepared { graph: graph.clone(), pinned: BTreeMap::new(), sums: BTreeSet::new() };
    let placed = Placed::of(program, &prepared, &Layers::new(), &Homes::new());
    let (mut open, mut seen) = (Vec::new(), BTreeSet::new());
    graph.ops().filter(|(id, _)| placed.work[id.0 as usize] > 0).for_each(|(_, op)| open.extend(&op.args));
    while let Some(value) = open.pop() {
        let Some(def) = graph.def(value).filter(|_| seen.insert(value)) else { continue };
        if placed.is_light(value) {
            open.extend(&graph.op(def).args);
        } else if placed.work[def.0 as usize] == 0 {
            kept.insert(value);
        }
    }
    kept
}

impl Placed {
    pub fn of(program: &Program, prepared: &Prepared, layers: &Layers, homes: &Homes) -> Placed {
        let graph = &prepared.graph;
        let all: Places = (0..program.mesh.pipeline).collect();
        let values = graph.values().len();
        let mut placed = Placed {
            on: vec![all.clone(); values],
            light: vec![true; values],
            homed: vec![false; values],
            work: Vec::with_capacity(graph.len()),
            level: Vec::with_capacity(graph.len()),
            all,
        };
        // Whether values depend on inputs, and on states.
        let mut from = vec![[false; 2]; values];
        graph.inputs().for_each(|input| from[input.0 as usize][0] = true);
        let has_layers = has_layers(graph);
        let apart = program.stage.parallel.order.splits_backward();
        for (id, op) in graph.ops() {
            let is_tensor = |state: StateId| program.state(state).ty.rank() > 0;
            let is_of_state = matches!(op.op, Op::Read { state } | Op::Write { state } if is_tensor(state));
            let [of_inputs, of_states] =
                [0, 1].map(|kind| op.args.iter().any(|a| from[a.0 as usize][kind]) || kind == 1 && is_of_state);
            // A number is sent for next to nothing: it does not say where an op runs.
            let tensors: Vec<Value> = op.args.iter().copied().filter(|&arg| graph.ty(arg).rank() > 0).collect();
            let common = |args: &[Value]| args.iter().fold(placed.all.clone(), |common, &arg| &common & placed.on(arg));
            let of_all = common(&op.args);
            let light = !prepared.pinned.contains_key(&id)
                && is_cheap(&op.op, of_inputs, of_states)
                && op.args.iter().all(|&arg| placed.is_light(arg))
                && !of_all.is_empty();
            let common = if light || tensors.is_empty() { of_all } else { common(&tensors) };
            let of_layer = op.site.tag.as_ref().filter(|_| has_layers && op.site.phase != Phase::Update);
            let of_layer = of_layer.and_then(|tag| layers.get(&tag.block)?.get(tag.instance as usize));
            let on = match (&op.op, prepared.pinned.get(&id), of_layer) {
                (_, Some(pinned), _) => pinned.clone(),
                (Op::Read { state }, ..) => homes.get(state).unwrap_or(&placed.all).clone(),
                _ if light => common,
                (_, _, Some(&place)) => Places::from([place]),
                _ if common == placed.all && of_states && has_layers && op.site.phase != Phase::Update => {
                    Places::from([0])
                }
                _ if !common.is_empty() => common,
                _ => {
                    let latest =
                        op.args.iter().max_by_key(|&&arg| (placed.first_level(graph, arg), placed.source(graph, arg)));
                    Places::from([placed.source(graph, *latest.expect("an op without operands is light"))])
                }
            };
            let own = match op.site.phase {
                _ if prepared.sums.contains(&id) => 1 + u8::from(apart),
                Phase::Forward | Phase::Update => 0,
                Phase::BackwardInput => 1,
                Phase::BackwardWeight => 1 + u8::from(apart),
            };
            let of_args = op.args.iter().filter(|&&arg| !placed.is_light(arg)).filter_map(|&arg| graph.def(arg));
            let work = of_args.map(|def| placed.work[def.0 as usize]).fold(own, u8::max);
            placed.work.push(if light { 0 } else { work });
            let level = |place: usize| {
                let after = |&arg: &Value| match graph.def(arg) {
                    _ if placed.on(arg).contains(&place) && placed.is_light(arg) => 0,
                    Some(def) if placed.on(arg).contains(&place) => {
                        let def = def.0 as usize;
                        placed.level[def][&place] + usize::from(placed.work[def] < work)
                    }
                    _ => placed.first_level(graph, arg) + 1,
                };
                op.args.iter().map(after).max().unwrap_or(0)
            };
            let levels = if light { BTreeMap::new() } else { on.iter().map(|&place| (place, level(place))).collect() };
            placed.level.push(levels);
            let homed = prepared.pinned.contains_key(&id)
                || matches!(&op.op, Op::Read { state } if homes.contains_key(state))
                || op.args.iter().any(|&arg| placed.is_homed(arg));
            for result in op.results() {
                placed.homed[result.0 as usize] = homed;
                placed.on[result.0 as usize] = on.clone();
                placed.light[result.0 as usize] = light;
                from[result.0 as usize] = [of_inputs, of_states];
            }
        }
        placed
    }

    pub fn on(&self, value: Value) -> &Places {
        &self.on[value.0 as usize]
    }

    pub fn is_light(&self, value: Value) -> bool {
        self.light[value.0 as usize]
    }

    /// Whether nothing says where it is made.
    pub fn is_anywhere(&self, value: Value) -> bool {
        *self.on(value) == self.all && !self.is_homed(value)
    }

    fn is_homed(&self, value: Value) -> bool {
        self.homed[value.0 as usize]
    }

    /// The place that others have a value from: where it is there first.
    pub fn source(&self, graph: &Graph, value: Value) -> usize {
        let level = |place: usize| graph.def(value).and_then(|def| self.level[def.0 as usize].get(&place).copied());
        *self.on(value).iter().min_by_key(|&&place| (level(place).unwrap_or(0), place)).expect("a value is somewhere")
    }

    fn first_level(&self, graph: &Graph, value: Value) -> usize {
        let level =
            graph.def(value).and_then(|def| self.level[def.0 as usize].get(&self.source(graph, value)).copied());
        level.unwrap_or(0)
    }

    /// The states that a value is made of where it is made anew.
    pub fn states_of(&self, graph: &Graph, value: Value) -> Vec<StateId> {
        let (mut found, mut open) = (Vec::new(), vec![value]);
        while let Some(value) = open.pop() {
            let Some(def) = graph.def(value).filter(|_| self.is_light(value)) else { continue };
            let op = graph.op(def);
            if let Op::Read { state } = op.op {
                found.push(state);
            }
            open.extend(&op.args);
        }
        found
    }
}
