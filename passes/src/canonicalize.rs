//! Brings ops into one form: constants folded, casts, transposes, reshapes and broadcasts that do nothing removed,
//! chains of them joined, equal ops merged, dead ones dropped.
//!
//! ```text
//! %a = transpose %x order=[1, 0]
//! %b = transpose %a order=[1, 0]      =>     %y = exp %x
//! %y = exp %b
//! ```
//!
//! Every rule is directed and bitwise exact. Algebra that needs a search belongs to `simplify`.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Class, DType, Dim, Graph, Op, OpData, Phase, Program, Type, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass =
    Pass { name: "canonicalize", requires: &[Fact::Typed], provides: &[], numerics: Numerics::Exact, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let of_graph = |graph: &Graph| {
        let (graph, found) = canonicalize(graph, &program);
        let alive = without_dead_ops(&graph, &program);
        for (what, times) in found.into_iter().chain([("dead op dropped", graph.len() - alive.len())]) {
            context.matched(what, times);
        }
        alive
    };
    program.graphs = program.graphs.iter().map(of_graph).collect();
    Ok(program)
}

/// One graph in the form that the pass gives it.
pub(crate) fn of_graph(graph: &Graph, program: &Program) -> Graph {
    without_dead_ops(&canonicalize(graph, program).0, program)
}

/// What becomes of an op.
enum Rewrite {
    /// It stays.
    Keep,
    /// Its result is another value.
    Value(Value),
    /// Another op on other operands takes its place.
    Op(Op, Vec<Value>),
}

/// The graph, and what was found how often.
fn canonicalize(graph: &Graph, program: &Program) -> (Graph, BTreeMap<&'static str, usize>) {
    let mut found: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut rebuild = Rebuild::same(graph);
    // Equal ops on equal operands in one phase and layer: printed op, operands and phase -> results. Merging across
    // phases would keep forward values alive until backward, which is for `rematerialize` to decide; across layers
    // it would make equal layers different.
    let mut seen: BTreeMap<(String, Vec<Value>, Phase, String), Vec<Value>> = BTreeMap::new();
    for (_, op) in graph.ops() {
        let args: Vec<Value> = op.args.iter().map(|&a| rebuild.get(a)).collect();
        let (new_op, new_args) = match rewrite(&rebuild.new, &op.op, &args, op) {
            Rewrite::Value(v) => {
                *found.entry("op that does nothing").or_default() += 1;
                rebuild.set(op.result(), v);
                continue;
            }
            Rewrite::Op(new_op, new_args) => {
                let is_const = matches!(new_op, Op::Const { .. });
                *found.entry(if is_const { "constant folded" } else { "chain of two as one" }).or_default() += 1;
                (new_op, new_args)
            }
            Rewrite::Keep => (op.op.clone(), args),
        };
        if matches!(new_op, Op::Write { .. }) {
            rebuild.push(op, new_op, &new_args, program);
            continue;
        }
        // A read gives the same value everywhere in a graph; where it stands does not matter.
        let layer = op.site.tag.as_ref().filter(|_| new_op.class() != Class::State);
        let layer = layer.map(|t| format!("{}/{}", t.block, t.instance)).unwrap_or_default();
        let phase = if new_op.class() == Class::State { Phase::Forward } else { op.site.phase };
        let key = (new_op.to_string(), new_args.clone(), phase, layer);
        if let Some(results) = seen.get(&key) {
            *found.entry("equal op joined").or_default() += 1;
            for (old, new) in op.results().zip(results) {
                rebuild.set(old, *new);
            }
            continue;
        }
        rebuild.push(op, new_op, &new_args, program);
        seen.insert(key, op.results().map(|r| rebuild.get(r)).collect());
    }
    (rebuild.finish(), found)
}

fn rewrite(new: &Graph, op: &Op, args: &[Value], old: &OpData) -> Rewrite {
    let producer = |v: Value| new.def(v).map(|d| new.op(d));
    let ty = |v: Value| new.ty(v);
    match op {
        Op::Cast { dtype } if ty(args[0]).dtype == *dtype => Rewrite::Value(args[0]),
        Op::Cast { dtype } => match constant(new, args[0]) {
            Some(value) if old.results().len() == 1 && ty(args[0]).is_scalar() => fold(cast(value, *dtype), *dtype),
            _ => Rewrite::Keep,
        },
        Op::Broadcast { shape } if ty(args[0]).dims == *shape => Rewrite::Value(args[0]),
        Op::Broadcast { shape } => match producer(args[0]) {
            Some(OpData { op: Op::Broadcast { .. }, args: inner, .. }) => {
                Rewrite::Op(Op::Broadcast { shape: shape.clone() }, inner.clone())
            }
            _ => Rewrite::Keep,
        },
        Op::Reshape { shape } if ty(args[0]).dims == *shape => Rewrite::Value(args[0]),
        Op::Reshape { shape } => match producer(args[0]) {
            Some(OpData { op: Op::Reshape { .. }, args: inner, .. }) if ty(inner[0]).dims == *shape => {
                Rewrite::Value(inner[0])
            }
            Some(OpData { op: Op::Reshape { .. }, args: inner, .. }) => {
                Rewrite::Op(Op::Reshape { shape: shape.clone() }, inner.clone())
            }
            _ => Rewrite::Keep,
        },
        Op::Transpose { order } if order.iter().enumerate().all(|(i, &o)| i == o) => Rewrite::Value(args[0]),
        Op::Transpose { order } => match producer(args[0]) {
            Some(OpData { op: Op::Transpose { order: first }, args: inner, .. }) => {
                let both: Vec<usize> = order.iter().map(|&i| first[i]).collect();
                if both.iter().enumerate().all(|(i, &o)| i == o) {
                    return Rewrite::Value(inner[0]);
                }
                Rewrite::Op(Op::Transpose { order: both }, inner.clone())
            }
            _ => Rewrite::Keep,
        },
        Op::Slice { axis, start, end } => {
            let whole = *start == Dim::default() && *end == ty(args[0]).dims[*axis];
            if whole { Rewrite::Value(args[0]) } else { Rewrite::Keep }
        }
        Op::Pad { before, after, .. } if *before == Dim::default() && *after == Dim::default() => {
            Rewrite::Value(args[0])
        }
        Op::Concat { .. } if args.len() == 1 => Rewrite::Value(args[0]),
        Op::ReduceMax { axes } | Op::ReduceMin { axes } if axes.is_empty() => Rewrite::Value(args[0]),
        // A sum begins with 0.0, and 0.0 + -0.0 is not -0.0.
        Op::ReduceSum { axes } if axes.is_empty() && ty(args[0]).dtype == DType::I32 => Rewrite::Value(args[0]),
        Op::Neg {} => match producer(args[0]) {
            Some(OpData { op: Op::Neg {}, args: inner, .. }) => Rewrite::Value(inner[0]),
            _ => scalar_arithmetic(new, op, args),
        },
        // x * 1, x / 1 and x - 0 are x bit by bit; x + 0 is not (-0.0 + 0.0 = 0.0).
        Op::Mul {} if constant(new, args[1]) == Some(1.0) => Rewrite::Value(args[0]),
        Op::Mul {} if constant(new, args[0]) == Some(1.0) => Rewrite::Value(args[1]),
        Op::Div {} if constant(new, args[1]) == Some(1.0) => Rewrite::Value(args[0]),
        Op::Sub {} if constant(new, args[1]).is_some_and(|c| c.to_bits() == 0) => Rewrite::Value(args[0]),
        Op::Add {} | Op::Sub {} | Op::Mul {} | Op::Div {} => scalar_arithmetic(new, op, args),
        Op::Not {} => match producer(args[0]) {
            Some(OpData { op: Op::Not {}, args: inner, .. }) => Rewrite::Value(inner[0]),
            _ => Rewrite::Keep,
        },
        Op::Where {} => match constant(new, args[0]) {
            Some(c) => Rewrite::Value(if c != 0.0 { args[1] } else { args[2] }),
            None if args[1] == args[2] => Rewrite::Value(args[1]),
            None => Rewrite::Keep,
        },
        Op::Size { dim, dtype } => match dim.constant() {
            // Beyond 2^24 single precision does not hold every whole number.
            Some(n) if *dtype == DType::I32 || n.abs() <= 1 << 24 => fold(n as f64, *dtype),
            _ => Rewrite::Keep,
        },
        _ => Rewrite::Keep,
    }
}

/// The number that every element of a value is, if it is a stretched constant.
pub(crate) fn constant(graph: &Graph, value: Value) -> Option<f64> {
    match graph.op(graph.def(value)?) {
        OpData { op: Op::Const { value, .. }, .. } => Some(*value),
        OpData { op: Op::Broadcast { .. } | Op::Reshape { .. }, args, .. } => constant(graph, args[0]),
        _ => None,
    }
}

/// Arithmetic on scalars whose values are known.
fn scalar_arithmetic(graph: &Graph, op: &Op, args: &[Value]) -> Rewrite {
    let ty: &Type = graph.ty(args[0]);
    let numbers: Option<Vec<f64>> = args.iter().map(|&a| constant(graph, a)).collect();
    match numbers.filter(|_| ty.is_scalar()).and_then(|numbers| fold_scalar(op, &numbers, ty.dtype)) {
        Some(result) => fold(result, ty.dtype),
        None => Rewrite::Keep,
    }
}

/// Arithmetic on known numbers; whole ones only: then f32 and f64 agree and folding is exact in both.
pub(crate) fn fold_scalar(op: &Op, numbers: &[f64], dtype: DType) -> Option<f64> {
    // The whole numbers up to which a float holds all of them.
    let most = match dtype {
        DType::Bf16 => 1 << 8,
        DType::F16 => 1 << 11,
        DType::F32 | DType::Quantized(_) | DType::I32 | DType::Bool | DType::Key => 1 << 24,
    };
    let exact = |x: f64| x.fract() == 0.0 && x.abs() <= f64::from(most);
    let result = match (op, numbers) {
        (Op::Neg {}, [x]) => -x,
        (Op::Add {}, [a, b]) => a + b,
        (Op::Sub {}, [a, b]) => a - b,
        (Op::Mul {}, [a, b]) => a * b,
        _ => return None,
    };
    let negative_zero = result == 0.0 && dtype.is_float();
    (numbers.iter().copied().all(exact) && exact(result) && !negative_zero).then_some(result)
}

/// A known number as another type.
pub(crate) fn cast(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::Bool => f64::from(u8::from(value != 0.0)),
        DType::I32 => f64::from(value as i32),
        // As a constant it is rounded where it is used.
        DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) | DType::Key => value,
    }
}

fn fold(value: f64, dtype: DType) -> Rewrite {
    Rewrite::Op(Op::Const { value, dtype }, vec![])
}
