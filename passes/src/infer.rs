//! Infers all types again, with dims that can only have one value as numbers.
//!
//! ```text
//! dim T: 8..8
//! %y = exp %x : f32[B, T]        =>     %y = exp %x : f32[B, 8]
//! ```
//!
//! The batch symbol stays a symbol: calls are cut along it. Values do not change.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Dim, Graph, Op, Program, Symbol, Type};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::Rebuild;

/// The pass.
pub const PASS: Pass =
    Pass { name: "infer", requires: &[Fact::Logical], provides: &[Fact::Typed], numerics: Numerics::Exact, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    program.graphs = program.graphs.iter().map(|g| infer(g, &program, context)).collect();
    Ok(program)
}

fn infer(graph: &Graph, program: &Program, context: &PassContext) -> Graph {
    let fixed: BTreeMap<Symbol, Dim> = graph
        .dims
        .iter()
        .filter(|d| d.min == d.max && graph.batch.as_ref() != Some(&d.symbol))
        .map(|d| (d.symbol.clone(), Dim::from(d.min)))
        .collect();
    context.matched("dim as a number", fixed.len());
    let mut new = substituted(graph, &fixed, program);
    new.dims.retain(|d| !fixed.contains_key(&d.symbol));
    new
}

/// The graph with symbols replaced; the ranges of symbols are as they were.
pub(crate) fn substituted(graph: &Graph, with: &BTreeMap<Symbol, Dim>, program: &Program) -> Graph {
    let mut rebuild = Rebuild::new(graph, graph.name.clone());
    for input in graph.inputs() {
        let ty = graph.ty(input);
        let dims: Vec<Dim> = ty.dims.iter().map(|d| d.substitute(with)).collect();
        let new = rebuild.new.input(graph.name_of(input), Type::new(ty.dtype, dims));
        rebuild.set(input, new);
    }
    for (_, op) in graph.ops() {
        let args: Vec<_> = op.args.iter().map(|&a| rebuild.get(a)).collect();
        rebuild.push(op, with_dims(&op.op, with), &args, program);
    }
    rebuild.finish()
}

/// The op with symbols replaced in its attributes.
pub(crate) fn with_dims(op: &Op, with: &BTreeMap<Symbol, Dim>) -> Op {
    let sub = |d: &Dim| d.substitute(with);
    let all = |dims: &[Dim]| dims.iter().map(sub).collect();
    let mut op = op.clone();
    match &mut op {
        Op::Size { dim: d, .. } | Op::Iota { len: d } | Op::EmbedGrad { rows: d } | Op::SliceAt { len: d, .. } => {
            *d = sub(d);
        }
        Op::Broadcast { shape }
        | Op::Reshape { shape }
        | Op::Fused { shape, .. }
        | Op::RandomNormal { shape, .. }
        | Op::RandomUniform { shape, .. }
        | Op::RowUniform { shape } => *shape = all(shape),
        Op::Slice { start: a, end: b, .. } | Op::Pad { before: a, after: b, .. } => (*a, *b) = (sub(a), sub(b)),
        // All other ops have no dim among their attributes.
        _ => {}
    }
    op
}
