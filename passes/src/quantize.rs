//! Weights in few bits: where a role asks for it, the weights of its layers are kept in bf16, f16, int8 or int4, and are
//! numbers of the type that it computes in only inside of products.
//!
//! ```text
//! %w = read @model/w : f32[8, 64]                 %q = cast %w dtype=int8x64
//! %y = contract %x, %w spec=bt,vt->bv     =>      %d = cast %q dtype=f32
//!                                                 %y = contract %x, %d spec=bt,vt->bv
//! ```
//!
//! What is rounded are matrices of linear layers: not the head, nor embeddings, norms and biases, which are few numbers on
//! which much depends, as in GPTQ and AWQ. [`dsgc_ir::Quantized`] has the formula; groups lie along the summed dim, and the
//! last one of a row may be shorter.
//!
//! A weight that nothing changes is rounded in every graph, so a reference or a judge is one model wherever it is asked, and
//! low-rank factors are trained beside what will be read. One that is trained is rounded in graphs that generate only: its
//! gradients, and PPO's old log-probabilities, are those of the weights themselves.
//!
//! That the weights lie in memory so, and products read them there, is the work of `copies`.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::Statement;
use dsgc_ir::trained::{reads_of_any_type, weights_of_layers};
use dsgc_ir::{Builder, DType, Graph, Op, Program, StateId, Value};

use crate::adapt::changes;
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass =
    Pass { name: "quantize", requires: &[Fact::Typed, Fact::Adapted], provides: &[], numerics: Numerics::AsAsked, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    if program.stage.roles.iter().all(|role| role.weights.is_none()) {
        return Ok(program);
    }
    let changes = changes(&program);
    let mut generating = BTreeSet::new();
    let evaluations = program.stage.evaluate.iter().map(|evaluation| &evaluation.body);
    [&program.stage.plan].into_iter().chain(evaluations).for_each(|body| generating_graphs(body, &mut generating));
    // Parameters that generation reads.
    let read: BTreeSet<StateId> =
        program.graphs.iter().filter(|g| generating.contains(g.name.as_str())).flat_map(reads_of).collect();
    // Per weight, what it is kept in. A shared one belongs to the role that others share it with.
    let mut kept: BTreeMap<StateId, DType> = BTreeMap::new();
    for role in &program.stage.roles {
        let Some(dtype) = role.weights else { continue };
        let used = |id: &StateId| !changes[id.0 as usize] || read.contains(id);
        for id in weights_of_layers(&program, &role.name).into_iter().filter(used) {
            kept.insert(id, dtype);
            context.matched(&format!("weights in {dtype}"), 1);
            if changes[id.0 as usize] {
                context.matched("of them to generate only", 1);
            }
            let width = program.state(id).ty.dims.last().and_then(|dim| dim.constant()).unwrap_or(0);
            if matches!(dtype, DType::Quantized(q) if width % q.group() as i64 != 0) {
                context.matched("of them with a shorter last group", 1);
            }
        }
    }
    let graph = |graph: &Graph| {
        let rounds = |id: StateId| {
            let dtype = kept.get(&id).copied();
            dtype.filter(|_| !changes[id.0 as usize] || generating.contains(graph.name.as_str()))
        };
        rewrite(graph, &program, rounds)
    };
    program.graphs = program.graphs.iter().map(graph).collect();
    Ok(program)
}

/// The parameters and states that a graph reads.
fn reads_of(graph: &Graph) -> impl Iterator<Item = StateId> {
    graph.ops().filter_map(|(_, op)| if let Op::Read { state } = op.op { Some(state) } else { None })
}

/// The graphs that continue sequences.
fn generating_graphs<'a>(plan: &'a [Statement], found: &mut BTreeSet<&'a str>) {
    for statement in plan {
        match statement {
            Statement::Generate(generate) => {
                found.extend(generate.steps.iter().flat_map(|steps| [steps.prefill.as_str(), steps.step.as_str()]));
            }
            Statement::For { body, .. } | Statement::Repeat { body, .. } => generating_graphs(body, found),
            _ => {}
        }
    }
}

/// Rounds weights where they are operands of products.
fn rewrite(graph: &Graph, program: &Program, rounds: impl Fn(StateId) -> Option<DType>) -> Graph {
    let weights: BTreeMap<Value, (Value, DType)> = {
        let mut reads: BTreeMap<StateId, Value> = BTreeMap::new();
        for (value, state) in dsgc_ir::trained::reads(graph) {
            reads.entry(state).or_insert(value);
        }
        let all = reads_of_any_type(graph).into_iter();
        all.filter_map(|(value, state)| Some((value, (reads[&state], rounds(state)?)))).collect()
    };
    if weights.is_empty() {
        return graph.clone();
    }
    let mut rebuild = Rebuild::same(graph);
    // The weight in the type that the product takes.
    let mut rounded: BTreeMap<Value, Value> = BTreeMap::new();
    for (_, op) in graph.ops() {
        let mut args: Vec<Value> = op.args.iter().map(|&arg| rebuild.get(arg)).collect();
        if matches!(op.op, Op::Contract { .. }) {
            for (new, old) in args.iter_mut().zip(&op.args) {
                let own = graph.ty(*old).dtype;
                if let Some(&(read, dtype)) = weights.get(old).filter(|(_, dtype)| *dtype != own) {
                    *new = *rounded.entry(*old).or_insert_with(|| {
                        let read = rebuild.get(read);
                        let mut b = Builder::new(&mut rebuild.new, op.site.clone());
                        let kept = b.cast(read, dtype);
                        b.cast(kept, own)
                    });
                }
            }
        }
        rebuild.push(op, op.op.clone(), &args, program);
    }
    without_dead_ops(&rebuild.finish(), program)
}
