//! Parameters that are read as narrow floats, or quantised, lie in memory so, and are not cast in every call.
//!
//! ```text
//! param @model/w : f32[8, 4] trained              param @model/w : f32[8, 4] trained
//!                                                 state @model/w.bf16 : bf16[8, 4] copy @model/w
//! %w = read @model/w                      =>
//! %c = cast %w dtype=bf16                         %c = read @model/w.bf16
//! ```
//!
//! Where a graph writes the parameter, it writes the copy with it: the optimizer's step, first values. What the host
//! sets, devices copy. A parameter that nothing but its first values writes and that all graphs read in one
//! narrow type has no f32 at all, as long as nobody needs it: a folder that the stage writes, or a model that
//! begins as it was and reads it in f32.
//!
//! Bits do not change: a cast of the same number is the same number. So a product takes weights that are kept in fewer bits
//! than it computes in as they lie, where `quantize` cast them back for it:
//!
//! ```text
//! %q = read @model/w.int8x64                      %q = read @model/w.int8x64
//! %w = cast %q dtype=f32                  =>      %y = contract %x, %q spec=bt,vt->bv
//! %y = contract %x, %w spec=bt,vt->bv
//! ```

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::diag::Diag;
use dsgc_ir::infer::product_type;
use dsgc_ir::stage::{LoraSave, Origin};
use dsgc_ir::trained::reads;
use dsgc_ir::{Builder, DType, Graph, Op, Program, StateId, StateKind, Type, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass =
    Pass { name: "copies", requires: &[Fact::Differentiated], provides: &[], numerics: Numerics::Exact, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let uses = uses(&program);
    let mut homes: BTreeMap<StateId, Home> = BTreeMap::new();
    for (param, found) in uses.into_iter().filter(|(_, found)| !found.narrow.is_empty()) {
        let state = program.state(param).clone();
        let mut types = found.narrow.iter();
        let only = types.next().copied().filter(|_| types.next().is_none() && !found.wide && !found.changed);
        homes.insert(
            param,
            match only.filter(|_| !needs_all_digits(&program, param)) {
                Some(dtype) => {
                    context.matched(&format!("held in {dtype} only"), 1);
                    Home::Narrow(dtype)
                }
                None => {
                    let copy = |&dtype: &DType| {
                        context.matched(&format!("copy in {dtype}"), 1);
                        let (name, ty) = (format!("{}.{dtype}", state.name), state.ty.with(dtype));
                        (dtype, program.declare(name, ty, StateKind::Copy { of: param }, state.span))
                    };
                    Home::Copies(found.narrow.iter().map(copy).collect())
                }
            },
        );
    }
    for (&param, home) in &homes {
        if let Home::Narrow(dtype) = home {
            program.states[param.0 as usize].ty.dtype = *dtype;
        }
    }
    if !homes.is_empty() {
        program.graphs = program.graphs.iter().map(|graph| rewrite(graph, &program, &homes)).collect();
    }
    Ok(program)
}

/// Where the narrow elements of a parameter are.
enum Home {
    /// In its own place.
    Narrow(DType),
    /// In copies.
    Copies(BTreeMap<DType, StateId>),
}

/// What all graphs together do with a parameter.
#[derive(Default)]
struct Uses {
    /// Types of fewer bits to which it is cast.
    narrow: BTreeSet<DType>,
    /// Whether it is used as it is.
    wide: bool,
    /// Whether more than its first values is written.
    changed: bool,
}

fn uses(program: &Program) -> BTreeMap<StateId, Uses> {
    let mut uses: BTreeMap<StateId, Uses> = BTreeMap::new();
    let first_values: BTreeSet<&str> = program.stage.roles.iter().map(|role| role.init.as_str()).collect();
    let is_param = |state: &StateId| matches!(program.state(*state).kind, StateKind::Param { .. });
    for graph in &program.graphs {
        let reads = reads(graph);
        let read = |value: &Value| reads.get(value).copied().filter(is_param);
        for (_, op) in graph.ops() {
            if let Op::Write { state } = op.op
                && is_param(&state)
            {
                uses.entry(state).or_default().changed |= !first_values.contains(graph.name.as_str());
            }
            for state in op.args.iter().filter_map(read) {
                let found = uses.entry(state).or_default();
                match op.op {
                    Op::Cast { dtype } if dtype.is_narrow() || dtype.is_quantized() => drop(found.narrow.insert(dtype)),
                    _ => found.wide = true,
                }
            }
        }
        for state in graph.outputs.iter().filter_map(|(_, v)| read(v)) {
            uses.entry(state).or_default().wide = true;
        }
    }
    uses
}

/// Whether somebody beside the graphs needs a parameter as it was read: a folder that the stage writes, or a model that
/// begins with it and keeps it in f32.
fn needs_all_digits(program: &Program, param: StateId) -> bool {
    let stage = &program.stage;
    let name = &program.state(param).name;
    stage.roles.iter().filter(|role| program.all_params_of(&role.name).iter().any(|(id, _)| *id == param)).any(|role| {
        let lora = stage.trainings.iter().find(|t| t.role == role.name).and_then(|t| t.lora.as_ref());
        let written = stage.save.contains(&role.name) && lora.is_none_or(|lora| lora.save != LoraSave::Adapter);
        let own = name.strip_prefix(&format!("{}/", role.name));
        let begins = |other: &dsgc_ir::stage::Role| {
            let copied = own.and_then(|own| program.state_named(&format!("{}/{own}", other.name)));
            other.origin == Origin::Snapshot(role.name.clone()) && copied.is_some()
        };
        written || stage.roles.iter().any(begins)
    })
}

fn rewrite(graph: &Graph, program: &Program, homes: &BTreeMap<StateId, Home>) -> Graph {
    let mut rebuild = Rebuild::same(graph);
    // Per parameter and type, the narrow value that was read.
    let mut narrow: BTreeMap<(StateId, DType), Value> = BTreeMap::new();
    let reads = reads(graph);
    for (_, op) in graph.ops() {
        match &op.op {
            Op::Read { state } => {
                rebuild.copy(op, program);
                match homes.get(state) {
                    Some(Home::Narrow(dtype)) => drop(narrow.insert((*state, *dtype), rebuild.get(op.result()))),
                    Some(Home::Copies(copies)) => {
                        for (&dtype, &copy) in copies {
                            let read = Builder::new(&mut rebuild.new, op.site.clone());
                            narrow.insert((*state, dtype), { read }.read(copy, &program.state(copy).ty));
                        }
                    }
                    None => {}
                }
            }
            Op::Cast { dtype } if reads.get(&op.args[0]).is_some_and(|s| narrow.contains_key(&(*s, *dtype))) => {
                let value = narrow[&(reads[&op.args[0]], *dtype)];
                rebuild.set(op.result(), value);
            }
            Op::Write { state } => {
                let value = rebuild.get(op.args[0]);
                let mut b = Builder::new(&mut rebuild.new, op.site.clone());
                let ty: &Type = &program.state(*state).ty;
                let own = b.cast(value, ty.dtype);
                b.write(*state, ty, own);
                if let Some(Home::Copies(copies)) = homes.get(state) {
                    for (&dtype, &copy) in copies {
                        let rounded = b.cast(value, dtype);
                        b.write(copy, &program.state(copy).ty, rounded);
                    }
                }
            }
            _ => rebuild.copy(op, program),
        }
    }
    without_dead_ops(&with_kept(&rebuild.finish(), program), program)
}

/// The graph whose products take weights as they are kept.
fn with_kept(graph: &Graph, program: &Program) -> Graph {
    let (mut rebuild, reads) = (Rebuild::same(graph), reads(graph));
    // What a value was before a cast, if it is a weight in memory.
    let kept = |value: Value| {
        let op = graph.op(graph.def(value)?);
        (matches!(op.op, Op::Cast { .. }) && reads.contains_key(&op.args[0])).then(|| op.args[0])
    };
    for (_, op) in graph.ops() {
        let mut args = op.args.clone();
        if matches!(op.op, Op::Contract { .. }) {
            for i in 0..args.len() {
                let (own, other) = (graph.ty(args[i]).dtype, graph.ty(args[1 - i]).dtype);
                if let Some(kept) = kept(args[i]).filter(|_| own == other)
                    && product_type(graph.ty(kept).dtype, other) == Some(own)
                {
                    args[i] = kept;
                }
            }
        }
        let args: Vec<Value> = args.into_iter().map(|arg| rebuild.get(arg)).collect();
        rebuild.push(op, op.op.clone(), &args, program);
    }
    rebuild.finish()
}
