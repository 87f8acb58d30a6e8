//! What each rank holds of a state: ZeRO (Rajbhandari et al. 2020) as a table.
//!
//! | stage | parameters | accumulators of gradients | moments, parameters that only the optimizer reads |
//! |---|---|---|---|
//! | 0 | whole | partial | whole |
//! | 1 | whole | partial | cut |
//! | 2 | whole | cut | cut |
//! | 3 | cut | cut | cut |
//!
//! A partial accumulator is finished once, after the last part of a batch; one that is cut, after each part. The first dim is
//! cut, into equally long parts, the last of which are filled with zeros. What is too small to be worth a message is whole.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::stage::{CallSteps, Statement};
use dsgc_ir::trained::reads;
use dsgc_ir::{Axis, Bindings, Cut, Op, Phase, Placement, Program, State, StateId, StateKind};

/// States of fewer bytes stay whole.
const SMALL: usize = 1 << 10;

/// What the ranks hold.
pub(super) struct Assigned {
    /// Of states that are not whole on every rank.
    pub placements: BTreeMap<StateId, Placement>,
    /// Of partial states, how their sum is wanted.
    pub finished: BTreeMap<StateId, Placement>,
    /// Graphs that every rank runs on all rows, because they cannot be cut.
    pub whole_calls: BTreeSet<String>,
}

/// Assigns every state.
pub(super) fn assign(program: &Program) -> Assigned {
    let mut whole_calls = BTreeSet::new();
    called_whole(&program.stage.plan, &mut whole_calls);
    program.stage.evaluate.iter().for_each(|evaluate| called_whole(&evaluate.body, &mut whole_calls));
    let mut assigned = Assigned { placements: BTreeMap::new(), finished: BTreeMap::new(), whole_calls };
    let users = Users::of(program);
    for (id, state) in program.state_ids() {
        let (StateKind::Param { .. } | StateKind::Copy { .. }) = state.kind else { continue };
        let stage = zero_stage(program, state);
        let master = stage >= 1 && users.optimizer_only.contains(&id);
        if stage >= 3 || master {
            assigned.placements.extend(cut(program, id).map(|placement| (id, placement)));
        }
    }
    for step in &users.steps {
        let stage = zero_stage(program, program.state(step.param));
        let cut = if stage >= 1 { cut(program, step.param) } else { None };
        if let Some(cut) = &cut {
            assigned.placements.extend(step.moments.map(|moment| (moment, cut.clone())));
        }
        let Some(accumulator) = step.accumulator else { continue };
        let partial = Placement { partial: Some(Axis::Data), ..placement(program.state(accumulator)) };
        match cut {
            Some(cut) if stage >= 2 => drop(assigned.placements.insert(accumulator, cut)),
            cut => {
                assigned.placements.insert(accumulator, partial);
                assigned.finished.extend(cut.map(|cut| (accumulator, cut)));
            }
        }
    }
    assigned
}

/// Adds the graphs of calls that `autodiff` did not cut.
fn called_whole(body: &[Statement], graphs: &mut BTreeSet<String>) {
    for statement in body {
        match statement {
            Statement::For { body, .. } | Statement::Repeat { body, .. } => called_whole(body, graphs),
            Statement::Call(call) if call.steps == Some(CallSteps::Whole) => {
                graphs.insert(call.graph.clone());
            }
            _ => {}
        }
    }
}

/// The stage of ZeRO that the role of a state has.
fn zero_stage(program: &Program, state: &State) -> u8 {
    let role = state.name.split('/').next().unwrap_or_default();
    program.stage.roles.iter().find(|r| r.name == role).map_or(0, |role| role.zero_stage)
}

/// A cut over the ranks with different rows; `None` where the state is too small for it.
fn cut(program: &Program, id: StateId) -> Option<Placement> {
    let state = program.state(id);
    let enough = *extents(state).first()? >= program.mesh.data && state.bytes() >= SMALL;
    let mut placement = placement(state);
    placement.cuts.push(Cut { over: Axis::Data, dim: 0 });
    enough.then_some(placement)
}

/// What a rank holds of a state so far.
fn placement(state: &State) -> Placement {
    state.placement.clone().unwrap_or_else(|| Placement::of_whole(extents(state)))
}

fn extents(state: &State) -> Vec<usize> {
    state.ty.shape(&Bindings::new()).expect("states have constant dims")
}

/// The states of an optimizer's step.
struct Step {
    param: StateId,
    /// Where the gradient is added up, if it is.
    accumulator: Option<StateId>,
    moments: [StateId; 2],
}

/// What graphs use states for.
struct Users {
    steps: Vec<Step>,
    /// Parameters that no graph reads but for the optimizer's step and their copies.
    optimizer_only: BTreeSet<StateId>,
}

impl Users {
    fn of(program: &Program) -> Users {
        let mut steps: BTreeMap<StateId, Step> = BTreeMap::new();
        let mut others: BTreeSet<StateId> = BTreeSet::new();
        for graph in &program.graphs {
            let reads = reads(graph);
            for (_, op) in graph.ops() {
                if let Op::Adamw { .. } = op.op {
                    let read = |at: usize| reads.get(&op.args[at]).copied();
                    let (Some(param), Some(m), Some(v)) = (read(0), read(2), read(3)) else {
                        panic!("bug: an optimizer's step in @{} of what is no state", graph.name)
                    };
                    steps.insert(param, Step { param, accumulator: read(1), moments: [m, v] });
                } else if op.site.phase != Phase::Update {
                    others.extend(op.args.iter().filter_map(|arg| reads.get(arg)));
                }
            }
            others.extend(graph.outputs.iter().filter_map(|(_, value)| reads.get(value)));
        }
        let optimizer_only = steps.keys().copied().filter(|param| !others.contains(param)).collect();
        Users { steps: steps.into_values().collect(), optimizer_only }
    }
}
