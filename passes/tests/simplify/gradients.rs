//! The pass runs before `autodiff` too, so both sides of a rule must have equal gradients, at kinks and ties as well.

use std::collections::BTreeMap;

use dsgc_ir::diag::Span;
use dsgc_ir::fuzz::Rng;
use dsgc_ir::{Bindings, Builder, DType, Dim, Graph, Op, Program, Site, StateId, StateKind, Tensor, Type, parse};
use dsgc_kernels::interp::{InterpTarget, Precision, eval_graph};
use dsgc_passes::simplify::language::Node;
use dsgc_passes::simplify::matching::rewrites;
use dsgc_passes::{Numerics, PassContext, autodiff, infer};
use egg::RecExpr;

use crate::draw::{Term, term};
use crate::rules::{build, right_side};

/// Terms with gradients that are compared for a rule, if so many are found in [`TRIES`].
const DRAWS: usize = 12;
const TRIES: usize = 1500;
/// Largest difference, relative to the larger of the gradient and 1.
const TOLERANCE: f64 = 1e-9;

/// A stage that trains all of `@model` by one call of `@loss` per step. With `beta1 = 0` the first moment after a step is
/// the gradient.
const STAGE: &str = r#"level logical
stage {
  "name": "s",
  "sources": [{"name": "rows", "batch_size": 4, "micro_batch_size": 4}],
  "trainings": [{
    "role": "model",
    "optimizer": {"betas": [0.0, 0.9], "eps": 1e-8, "weight_decay": 0.0, "no_decay": []},
    "schedule": {"learning_rate": 0.0, "kind": "constant", "warmup_steps": 0, "warmup_ratio": 0.0, "clamp": true},
    "max_grad_norm": null
  }],
  "plan": [{"for": {"batch": "b", "rows": {"source": "rows"}, "body": [
    {"update": {"role": "model", "terms": [{"weight": 1.0, "graph": "loss", "args": []}], "steps": null}}
  ]}}]
}
"#;

#[test]
fn both_sides_have_equal_gradients() {
    let dims = [Dim::from(1i64), Dim::from(2i64), Dim::from(3i64)];
    let mut compared = 0;
    for (i, rewrite) in rewrites(Numerics::Finite).iter().enumerate() {
        let mut rng = Rng::new(i as u64);
        let mut draws = 0;
        for _ in 0..TRIES {
            if draws == DRAWS {
                break;
            }
            let Some(left) = term(&rewrite.from.ast, &dims, &mut rng) else { continue };
            let Some(right) = right_side(rewrite, &left) else { continue };
            let seed = rng.bits();
            let Some(expected) = gradients(&left, &left.nodes, seed) else { continue };
            if expected.values().flatten().any(|x| !x.is_finite()) {
                continue;
            }
            let found = gradients(&left, &right, seed).unwrap_or_default();
            draws += 1;
            for (name, expected) in &expected {
                let found = found.get(name).cloned().unwrap_or_else(|| vec![0.0; expected.len()]);
                let near = |(a, b): (&f64, &f64)| (a - b).abs() <= TOLERANCE * a.abs().max(1.0);
                assert!(
                    expected.iter().zip(&found).all(near),
                    "{}: the gradient of {name} is {expected:?} on the left side and {found:?} on the right, by\n{:?}\n{right:?}",
                    rewrite.rule.name,
                    left.nodes
                );
            }
        }
        compared += usize::from(draws == DRAWS);
    }
    assert!(compared > 100, "only {compared} rules have gradients to compare");
}

/// The gradients of all floats that a term takes from outside, by name; `None` where there is none, or the term has no
/// value for these numbers.
fn gradients(term: &Term, nodes: &RecExpr<Node>, seed: u64) -> Option<BTreeMap<String, Vec<f64>>> {
    let mut rng = Rng::new(seed);
    let mut program = parse(STAGE).unwrap_or_else(|e| panic!("{e}"));
    let mut graph = Graph::new("loss");
    let mut states: BTreeMap<StateId, Tensor> = BTreeMap::new();
    let mut inputs: Vec<(String, Tensor)> = Vec::new();
    let mut values = Vec::new();
    // Inputs come before all ops.
    for (i, ty) in term.leaves.iter().enumerate() {
        let shape = ty.shape(&Bindings::new()).expect("all dims are bound");
        let n: usize = shape.iter().product();
        let tensor = match ty.dtype {
            DType::F32 | DType::Bf16 | DType::F16 => {
                Tensor::f64(&shape, (0..n).map(|_| rng.choose(&[-1.0, 0.0, 1.0, 0.5, -0.7, 1.3])).collect())
            }
            DType::I32 => Tensor::i32(&shape, (0..n).map(|_| rng.below(3) as i32).collect()),
            DType::Bool => Tensor::bool(&shape, (0..n).map(|_| rng.once_in(2)).collect()),
            DType::Key | DType::Quantized(_) => panic!("no rule is about {}", ty.dtype),
        };
        if ty.dtype.is_float() {
            let name = format!("model/x{i}");
            let id = program.declare(name, ty.clone(), StateKind::Param { trained: true }, Span::NONE);
            states.insert(id, tensor);
            values.push((ty, Err(id)));
        } else {
            let name = format!("x{i}");
            values.push((ty, Ok(graph.input(&name, ty.clone()))));
            inputs.push((name, tensor));
        }
    }
    let weights = graph.input("weights", Type::new(DType::F32, [Dim::from(512i64)]));
    let mut b = Builder::new(&mut graph, Site::default());
    let leaves: Vec<_> = values
        .into_iter()
        .map(|(ty, value)| match value {
            Ok(input) => input,
            Err(state) => b.read(state, ty),
        })
        .collect();
    let y = build(&mut graph, &leaves, nodes);
    let ty = graph.ty(y).clone();
    let n = ty.len().constant().filter(|n| *n > 0 && ty.dtype.is_float())?;
    let mut b = Builder::new(&mut graph, Site::default());
    let flat = b.one(Op::Reshape { shape: vec![Dim::from(n)] }, &[y]);
    let own = b.one(Op::Slice { axis: 0, start: Dim::default(), end: Dim::from(n) }, &[weights]);
    let loss = b.one(Op::Contract { spec: "a,a->".into() }, &[flat, own]);
    graph.outputs.push(("loss".into(), loss));
    program.graphs.push(graph);
    inputs.push(("weights".into(), Tensor::f64(&[512], (0..512).map(|_| rng.unit() + 0.5).collect())));
    inputs.push(("lr".into(), Tensor::f64(&[], vec![0.0])));
    inputs.push(("t".into(), Tensor::i32(&[], vec![1])));
    differentiated(program, &states, &inputs)
}

fn differentiated(
    program: Program,
    states: &BTreeMap<StateId, Tensor>,
    inputs: &[(String, Tensor)],
) -> Option<BTreeMap<String, Vec<f64>>> {
    let context = PassContext::new(&InterpTarget);
    let program = infer::run(program, &context).expect("it fits");
    // Gradients of gradient ops, and losses without any, are refused.
    let program = autodiff::run(program, &context).ok()?;
    let graph = program.graph("model.loss.step").expect("the loss is trained in one call");
    let named: Vec<(&str, &Tensor)> =
        inputs.iter().filter(|(n, _)| graph.input_named(n).is_some()).map(|(n, t)| (n.as_str(), t)).collect();
    let done = eval_graph(&program, "model.loss.step", &named, states, Precision::F64).ok()?;
    let of = |(&id, _): (&StateId, &Tensor)| {
        let name = program.state(id).name.clone();
        let moment = program.state_named(&format!("{name}.m"))?;
        let gradient: &Tensor = done.written.get(&moment)?;
        Some((name, gradient.to_f64()))
    };
    Some(states.iter().filter_map(of).collect())
}
