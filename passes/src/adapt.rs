//! Does what a training asks of its model beside the gradient: parameters that `freeze` names stay as they are, LoRA
//! puts factors beside its targets (`lora`), and a snapshot shares every parameter that nothing changes.
//!
//! ```text
//! param @actor/w : f32[2] trained               param @actor/w : f32[2]
//! param @ref/w : f32[2]                    =>
//! %w = read @ref/w                              %w = read @actor/w
//! ```
//!
//! What is not trained has no gradient, no state of the optimizer and no backward op, as `autodiff` makes these for
//! trained parameters only.

mod lora;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::Origin;
use dsgc_ir::trained::{Choice, choose};
use dsgc_ir::{Graph, Op, Program, StateId, StateKind};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass =
    Pass { name: "adapt", requires: &[Fact::Typed], provides: &[Fact::Adapted], numerics: Numerics::AsAsked, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut trainings = std::mem::take(&mut program.stage.trainings);
    let mut errors = Vec::new();
    for training in &mut trainings {
        let Choice { trained, frozen, adapted } = match choose(&program, training) {
            Ok(choice) => choice,
            Err(mut found) => {
                errors.append(&mut found);
                continue;
            }
        };
        context.matched("parameter frozen", frozen.len());
        for id in frozen {
            program.states[id.0 as usize].kind = StateKind::Param { trained: false };
        }
        if let Some(lora) = &mut training.lora {
            let name = |id: &StateId| program.state(*id).name[training.role.len() + 1..].to_string();
            let whole = trained.iter().map(name).collect();
            context.matched(&format!("weight with factors of rank {}", lora.r), adapted.len());
            lora.adapter = Some(lora::adapt(&mut program, &training.role, lora, &adapted, whole));
        }
    }
    program.stage.trainings = trainings;
    if errors.is_empty() { Ok(share(program, context)) } else { Err(errors) }
}

/// Lets snapshots read the parameters that they have in common with the role they are taken of for as long as the stage
/// runs (D10), and takes their own ones away.
fn share(mut program: Program, context: &PassContext) -> Program {
    let changes = changes(&program);
    // Per state, the one that takes its place.
    let mut place: Vec<StateId> = program.state_ids().map(|(id, _)| id).collect();
    let mut shared: Vec<Vec<String>> = Vec::new();
    for role in &program.stage.roles {
        let mut names = Vec::new();
        if let Origin::Snapshot(of) = &role.origin {
            let original = program.stage.roles.iter().find(|r| r.name == *of);
            let alike = original.is_none_or(|of| (of.precision, of.weights) == (role.precision, role.weights));
            for (id, name) in program.params_of(&role.name).filter(|_| alike) {
                let original = program.state_named(&format!("{of}/{name}"));
                // Factors that are not zero at first are merged into the copy.
                let differs = continued(&program, of).iter().any(|module| name.strip_suffix(".weight") == Some(module));
                let fits = |original: &StateId| {
                    program.state(*original).ty == program.state(id).ty
                        && !changes[id.0 as usize]
                        && !changes[original.0 as usize]
                        // Snapshots of one another: the runtime says what is wrong with them.
                        && root(&place, *original) != id
                };
                if let Some(original) = original.filter(fits).filter(|_| !differs) {
                    place[id.0 as usize] = original;
                    names.push(name.to_string());
                }
            }
        }
        shared.push(names);
    }
    if shared.iter().all(Vec::is_empty) {
        return program;
    }
    context.matched("parameter of a snapshot that is its original's", shared.iter().map(Vec::len).sum());
    for (role, names) in program.stage.roles.iter_mut().zip(shared) {
        role.shared = names;
    }
    without_states(program, &place)
}

/// The layers of a role whose factors are those of an adapter.
fn continued<'p>(program: &'p Program, role: &str) -> &'p [String] {
    let training = program.stage.trainings.iter().find(|training| training.role == role);
    let lora = training.and_then(|training| training.lora.as_ref()).filter(|lora| lora.continues);
    lora.and_then(|lora| lora.adapter.as_ref()).map_or(&[], |adapter| &adapter.modules)
}

/// Per state, whether a graph or an optimizer writes more to it than first values.
pub(crate) fn changes(program: &Program) -> Vec<bool> {
    let mut changes: Vec<bool> =
        program.states.iter().map(|state| state.kind == StateKind::Param { trained: true }).collect();
    let first_values: Vec<&str> = program.stage.roles.iter().map(|role| role.init.as_str()).collect();
    for graph in program.graphs.iter().filter(|g| !first_values.contains(&g.name.as_str())) {
        for (_, op) in graph.ops() {
            if let Op::Write { state } = op.op {
                changes[state.0 as usize] = true;
            }
        }
    }
    changes
}

/// The state at the end of a chain of places.
fn root(place: &[StateId], mut id: StateId) -> StateId {
    while place[id.0 as usize] != id {
        id = place[id.0 as usize];
    }
    id
}

/// The program where a state that another one takes the place of is that other one; it has its first value from there.
fn without_states(old: Program, place: &[StateId]) -> Program {
    let kept: Vec<bool> = old.state_ids().map(|(id, _)| place[id.0 as usize] == id).collect();
    // Per state, how many before it are kept.
    let mut numbers = Vec::new();
    for &kept in &kept {
        let before = numbers.last().map_or(0, |&(number, kept)| number + u32::from(kept));
        numbers.push((before, kept));
    }
    let number = |id: StateId| StateId(numbers[id.0 as usize].0);
    let states = old.states.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(state, _)| state.clone()).collect();
    let mut new = Program { states, graphs: Vec::new(), ..old.clone() };
    let graph = |graph: &Graph| {
        let mut rebuild = Rebuild::same(graph);
        for (_, op) in graph.ops() {
            let renumbered = match op.op {
                Op::Read { state } => Op::Read { state: number(root(place, state)) },
                Op::Write { state } if kept[state.0 as usize] => Op::Write { state: number(state) },
                Op::Write { .. } => continue,
                ref other => other.clone(),
            };
            let args: Vec<_> = op.args.iter().map(|&a| rebuild.get(a)).collect();
            rebuild.push(op, renumbered, &args, &new);
        }
        without_dead_ops(&rebuild.finish(), &new)
    };
    new.graphs = old.graphs.iter().map(graph).collect();
    new
}
