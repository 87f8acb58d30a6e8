//! Keeps parameters and optimizer states of some roles in the host's memory.
//!
//! ```text
//! param @model/w : f32[8, 4] trained         param @model/w : f32[8, 4] trained on_host
//! %w = read @model/w                    =>   %w = read @model/w          layer h/0          // copied to the device
//! %y = contract %x, %w  layer h/0            %y = contract %x, %w        layer h/0          // %w dies here
//! ...                                        %w.1 = read @model/w        layer h/0 backward_input
//! %dx = contract %dy, %w  backward_input     %dx = contract %dy, %w.1    layer h/0 backward_input
//! ```
//!
//! A read of such a state copies it to the device, and a write copies it back, so it takes memory of the device only while
//! it is used. Each layer reads what it needs, forwards and backwards, as ranks gather parameters (`partition`); an optimizer's
//! step reads the moments of its layer, works in their place and writes them. `offload_optimizer` of a role means its moments, and
//! parameters that only the optimizer reads because graphs read copies of them; `offload_param` its parameters and their copies.
//! Values do not change.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::diag::Diag;
use dsgc_ir::trained::reads;
use dsgc_ir::{Builder, Graph, Op, OpId, Phase, Program, Site, StateId, StateKind, Target, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass =
    Pass { name: "offload", requires: &[Fact::Differentiated], provides: &[], numerics: Numerics::Exact, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let chosen = chosen(&program);
    if chosen.is_empty() {
        return Ok(program);
    }
    if !context.target.offloads() {
        return Err(vec![refused(context.target, "states", "`offload_optimizer` and `offload_param`")]);
    }
    for (&id, what) in &chosen {
        program.states[id.0 as usize].on_host = true;
        context.matched(&format!("{what} in the host's memory"), 1);
    }
    program.graphs = program.graphs.iter().map(|graph| with_reads(graph, &program)).collect();
    Ok(program)
}

/// Says that a device keeps nothing in the host's memory, of what keys ask for.
pub(crate) fn refused(target: &dyn Target, what: &str, keys: &str) -> Diag {
    let message = format!("{} cannot keep {what} in the host's memory", target.name());
    Diag::error(message).help(format!("leave {keys} out; `zero_stage` and `compile.memory` need less memory too"))
}

/// The states that are to be at home in the host's memory, and what they are.
fn chosen(program: &Program) -> BTreeMap<StateId, &'static str> {
    let asked = |id: StateId| {
        let role = program.state(id).name.split('/').next().unwrap_or_default();
        let role = program.stage.roles.iter().find(|r| r.name == role);
        role.map_or((false, false), |role| (role.offload_optimizer, role.offload_param))
    };
    let mut chosen = BTreeMap::new();
    if !program.stage.roles.iter().any(|role| role.offload_optimizer || role.offload_param) {
        return chosen;
    }
    let used = used_by_others(program);
    for (id, state) in program.state_ids() {
        let (optimizer, param) = asked(id);
        let what = match state.kind {
            StateKind::Param { trained } if param || (optimizer && trained && !used.contains(&id)) => "parameter",
            StateKind::Copy { .. } if param => "parameter",
            StateKind::State if optimizer && is_moment(program, &state.name) => "moment",
            _ => continue,
        };
        chosen.insert(id, what);
    }
    chosen
}

/// Whether a state is one of the moments that `autodiff` gives a parameter.
fn is_moment(program: &Program, name: &str) -> bool {
    let param = [".m", ".v"].into_iter().find_map(|suffix| name.strip_suffix(suffix));
    param
        .and_then(|param| program.state_named(param))
        .is_some_and(|id| matches!(program.state(id).kind, StateKind::Param { .. }))
}

/// States that graphs read for more than an optimizer's step.
fn used_by_others(program: &Program) -> BTreeSet<StateId> {
    let mut used = BTreeSet::new();
    for graph in &program.graphs {
        let reads = reads(graph);
        let others = graph.ops().filter(|(_, op)| op.site.phase != Phase::Update);
        used.extend(others.flat_map(|(_, op)| &op.args).filter_map(|arg| reads.get(arg)));
        used.extend(graph.outputs.iter().filter_map(|(_, value)| reads.get(value)));
    }
    used
}

/// The graph with a read of what the host has for every layer, forwards and backwards apart.
pub(crate) fn with_reads(graph: &Graph, program: &Program) -> Graph {
    let home = |value: Value| match graph.op(graph.def(value)?).op {
        Op::Read { state } if program.state(state).on_host => Some(state),
        _ => None,
    };
    // Per state, the last op that uses it.
    let mut last: BTreeMap<StateId, OpId> = BTreeMap::new();
    for (id, op) in graph.ops() {
        last.extend(op.args.iter().filter_map(|&arg| Some((home(arg)?, id))));
    }
    last.extend(graph.outputs.iter().filter_map(|(_, value)| Some((home(*value)?, OpId(graph.len() as u32)))));
    if last.is_empty() {
        return graph.clone();
    }
    let mut rebuild = Rebuild::same(graph);
    let mut found: BTreeMap<(StateId, String), Value> = BTreeMap::new();
    // What was read before its state was written, for ops that come later.
    let mut old: BTreeMap<StateId, Value> = BTreeMap::new();
    for (id, op) in graph.ops() {
        if op.results().next().is_some_and(|result| home(result).is_some()) {
            continue;
        }
        let backward = matches!(op.site.phase, Phase::BackwardInput | Phase::BackwardWeight);
        let phase = if backward { Phase::BackwardInput } else { op.site.phase };
        let layer = op.site.tag.as_ref().map(|tag| format!("{}/{}", tag.block, tag.instance)).unwrap_or_default();
        let mut load = |rebuild: &mut Rebuild, state: StateId, name: &str| {
            *found.entry((state, format!("{} {layer}", phase.name()))).or_insert_with(|| {
                let site = Site { phase, ..op.site.clone() };
                let value = Builder::new(&mut rebuild.new, site).read(state, &program.state(state).ty);
                rebuild.new.set_name(value, name);
                value
            })
        };
        let mut args = Vec::with_capacity(op.args.len());
        for &arg in &op.args {
            args.push(match home(arg) {
                Some(state) => match old.get(&state) {
                    Some(&old) => old,
                    None => load(&mut rebuild, state, graph.name_of(arg)),
                },
                None => rebuild.get(arg),
            });
        }
        if let Op::Write { state } = op.op
            && last.get(&state).is_some_and(|&last| last > id)
        {
            let value = load(&mut rebuild, state, "");
            old.insert(state, value);
        }
        rebuild.push(op, op.op.clone(), &args, program);
    }
    for (_, value) in &graph.outputs {
        let Some(state) = home(*value) else { continue };
        let value_now = old
            .get(&state)
            .copied()
            .unwrap_or_else(|| Builder::new(&mut rebuild.new, Site::default()).read(state, &program.state(state).ty));
        rebuild.set(*value, value_now);
    }
    without_dead_ops(&rebuild.finish(), program)
}
