//! Gradients of every op, as the pass `autodiff` derives them, against finite differences in f64.
//!
//! A case is a graph of parameters; the loss is the sum of its results times random weights, so that no two elements
//! get the same gradient. Numbers lie away from kinks: between 0.26 and 1.76 from 0, evenly spaced, never whole.

use std::collections::BTreeMap;

use dsgc_ir::fuzz::{Rng, random_tensor};
use dsgc_ir::op::ROWS;
use dsgc_ir::{Bindings, Builder, Data, Graph, Op, Program, Reason, StateId, Tensor, Type, Value, parse};
use dsgc_kernels::interp::{InterpTarget, Precision, eval_graph};
use dsgc_passes::{PassContext, autodiff, infer};

#[path = "gradients/cases.rs"]
mod cases;
use cases::{CASES, Case, Domain, WITHOUT};

/// Half the distance of the nearest points of a difference.
const STEP: f64 = 1e-3;
/// Largest error relative to the larger of the gradient and 0.01.
const TOLERANCE: f64 = 1e-8;

/// Two rows of segments: two texts packed, and one after padding.
const SEGMENT: [i32; 8] = [1, 1, 2, 2, 0, 1, 1, 1];

/// The program of a case: its parameters are `@model/<name>`, its loss is `@loss`, trained in one call per step.
///
/// With `beta1 = 0` the first moment after a step is the gradient itself.
fn program(case: &Case) -> Program {
    let params: Vec<(&str, &str)> = case.params.split("; ").map(|p| p.split_once(": ").expect(case.op)).collect();
    let declared: String = params.iter().map(|(name, ty)| format!("param @model/{name} : {ty} trained\n")).collect();
    let reads: String = params.iter().map(|(name, _)| format!("  %{name} = read @model/{name}\n")).collect();
    let dims = "  dim B: 1..4 batch\n  dim T: 1..9\n";
    let graph = |inputs: &str, lines: &str| {
        let text = format!(
            r#"level logical
{declared}
graph @loss({inputs}) {{
{dims}{reads}{lines}
}}
stage {{
  "name": "s",
  "sources": [{{"name": "rows", "batch_size": 4, "micro_batch_size": 4}}],
  "trainings": [{{
    "role": "model",
    "optimizer": {{"betas": [0.0, 0.9], "eps": 1e-8, "weight_decay": 0.0, "no_decay": []}},
    "schedule": {{"learning_rate": 0.0, "kind": "constant", "warmup_steps": 0, "warmup_ratio": 0.0, "clamp": true}},
    "max_grad_norm": null
  }}],
  "plan": [{{"for": {{"batch": "b", "rows": {{"source": "rows"}}, "body": [
    {{"update": {{"role": "model", "terms": [{{"weight": 1.0, "graph": "loss", "args": [["x", {{"path": "b.x"}}]]}}], "steps": null}}}}
  ]}}}}]
}}
"#
        );
        parse(&text).unwrap_or_else(|e| panic!("{e} in\n{text}"))
    };
    let bare = graph(case.inputs, &format!("{}\n  return y=%y", case.lines));
    let result = &bare.graphs[0];
    let ty = result.ty(result.output_named("y").expect("the line before returns it"));
    let weights = format!("{}{}%weights: {ty}", case.inputs, if case.inputs.is_empty() { "" } else { ", " });
    let axes: Vec<String> = (0..ty.rank()).map(|i| i.to_string()).collect();
    let loss = format!(
        "{}\n  %weighted = mul %y, %weights\n  %loss = reduce_sum %weighted axes=[{}]\n  return loss=%loss",
        case.lines,
        axes.join(", ")
    );
    graph(&weights, &loss)
}

type Named = Vec<(String, Tensor)>;

/// A case with everything to run it.
struct Setup {
    /// With the graph `@loss`.
    program: Program,
    inputs: Named,
    params: BTreeMap<StateId, Tensor>,
}

fn setup(case: &Case) -> Setup {
    let program = program(case);
    let mut rng = Rng::new(17);
    let bindings: Bindings = [("B".into(), 2), ("T".into(), 3)].into_iter().collect();
    let graph = &program.graphs[0];
    let inputs = graph.inputs().map(|v| {
        let tensor = match graph.name_of(v) {
            "segment" => Tensor::i32(&[2, 4], SEGMENT.to_vec()),
            _ => random_tensor(graph.ty(v), &bindings, &mut rng),
        };
        (graph.name_of(v).to_string(), tensor)
    });
    let inputs = inputs.collect();
    // Evenly spaced magnitudes in random order.
    let total = program.states.iter().filter_map(|s| s.ty.len().constant()).sum::<i64>() as f64;
    let mut magnitudes: Vec<f64> = (0..total as usize).map(|i| 0.26 + 1.5 * i as f64 / total).collect();
    for i in (1..magnitudes.len()).rev() {
        magnitudes.swap(i, rng.below(i + 1));
    }
    let params = program.state_ids().map(|(id, state)| {
        let shape = state.ty.shape(&Bindings::new()).expect("parameters have constant dims");
        let numbers = magnitudes.split_off(magnitudes.len() - shape.iter().product::<usize>());
        let sign = |x: f64| if case.domain == Domain::Any && rng.once_in(2) { -x } else { x };
        (id, Tensor::f64(&shape, numbers.into_iter().map(sign).collect()))
    });
    let params = params.collect();
    Setup { program, inputs, params }
}

fn run(
    program: &Program,
    graph: &str,
    inputs: &Named,
    states: &BTreeMap<StateId, Tensor>,
) -> (f64, BTreeMap<StateId, Tensor>) {
    let declared = program.graph(graph).expect("the graph is there");
    let named = declared.inputs().map(|v| {
        let name = declared.name_of(v);
        (name, &inputs.iter().find(|(n, _)| n == name).expect("all inputs are given").1)
    });
    let named: Vec<(&str, &Tensor)> = named.collect();
    let done = eval_graph(program, graph, &named, states, Precision::F64).unwrap_or_else(|e| panic!("{e}\n{program}"));
    (done.outputs.iter().find(|(n, _)| n == "loss").expect("the loss is an output").1.scalar(), done.written)
}

/// Gradients by the pass: the program with the step graph, whose first moments are the gradients.
fn differentiated(setup: &Setup) -> Program {
    let context = PassContext::new(&InterpTarget);
    let mut program = setup.program.clone();
    for pass in [infer::PASS, autodiff::PASS] {
        program =
            (pass.run)(program, &context).unwrap_or_else(|e| panic!("{}: {}\n{}", pass.name, e[0], setup.program));
    }
    program
}

/// All gradients of parameters that a step finds, by name.
fn found(program: &Program, setup: &Setup) -> BTreeMap<String, Vec<f64>> {
    let mut inputs = setup.inputs.clone();
    inputs.push(("lr".into(), Tensor::f64(&[], vec![0.0])));
    inputs.push(("t".into(), Tensor::i32(&[], vec![1])));
    let (_, written) = run(program, "model.loss.step", &inputs, &setup.params);
    setup
        .program
        .states
        .iter()
        .filter_map(|state| {
            let moment = program.state_named(&format!("{}.m", state.name))?;
            Some((state.name.clone(), written.get(&moment)?.to_f64()))
        })
        .collect()
}

/// All gradients by central differences of fourth order: `(8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h`.
fn expected(setup: &Setup) -> BTreeMap<String, Vec<f64>> {
    let of_param = |(&id, value): (&StateId, &Tensor)| {
        let numbers = value.to_f64();
        let slope = |i: usize| {
            let loss = |steps: f64| {
                let mut moved = numbers.clone();
                moved[i] += steps * STEP;
                let mut params = setup.params.clone();
                params.insert(id, Tensor::f64(&value.shape, moved));
                run(&setup.program, "loss", &setup.inputs, &params).0
            };
            (8.0 * (loss(1.0) - loss(-1.0)) - (loss(2.0) - loss(-2.0))) / (12.0 * STEP)
        };
        (setup.program.state(id).name.clone(), (0..numbers.len()).map(slope).collect())
    };
    setup.params.iter().map(of_param).collect()
}

fn near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= TOLERANCE * expected.abs().max(0.01)
}

/// The first parameter whose gradient is wrong, with both gradients.
fn difference(
    found: &BTreeMap<String, Vec<f64>>,
    expected: &BTreeMap<String, Vec<f64>>,
) -> Option<(String, Vec<f64>, Vec<f64>)> {
    expected.iter().find_map(|(name, expected)| {
        let found = found.get(name).cloned().unwrap_or_else(|| vec![0.0; expected.len()]);
        let equal = found.iter().zip(expected).all(|(&f, &e)| near(f, e));
        (!equal).then(|| (name.clone(), found, expected.clone()))
    })
}

#[test]
fn every_op_has_a_case_or_a_reason_to_have_none() {
    for row in ROWS {
        let cases = CASES.iter().filter(|c| c.op == row.name).count();
        let reasons = WITHOUT.iter().filter(|(op, _)| *op == row.name).count();
        assert!(cases > 0 || reasons == 1, "`{}` has no case", row.name);
        assert!(cases == 0 || reasons == 0, "`{}` has a case and a reason to have none", row.name);
    }
    for case in CASES {
        let used = program(case).op_counts().contains_key(case.op);
        assert!(used, "the case of `{}` does not use it", case.op);
    }
}

#[test]
fn gradients_are_slopes() {
    for case in CASES {
        let setup = setup(case);
        let found = found(&differentiated(&setup), &setup);
        let expected = expected(&setup);
        if let Some((name, found, expected)) = difference(&found, &expected) {
            panic!("`{}`, gradient of {name}: {found:?}, expected {expected:?} in\n{}", case.op, setup.program);
        }
        for (name, gradient) in &expected {
            let flat = gradient.iter().all(|g| g.abs() < 1e-3);
            assert!(!flat, "`{}` shows nothing: the gradient of {name} is {gradient:?}", case.op);
        }
    }
}

/// The mutation check: in the graph of every case, every number that goes into an op of a gradient is negated, one at
/// a time; each time the comparison of [`gradients_are_slopes`] must fail. So does a flipped sign in any one rule.
#[test]
fn a_flipped_sign_in_any_gradient_is_seen() {
    let mut mutants = 0;
    for case in CASES {
        let setup = setup(case);
        let expected = expected(&setup);
        let program = differentiated(&setup);
        let step = program.graph("model.loss.step").expect("autodiff makes it");
        for (id, op) in step.ops().filter(|(_, op)| op.site.loc.reason == Reason::Grad) {
            for (i, &arg) in op.args.iter().enumerate() {
                if !step.ty(arg).dtype.is_float() || is_signless(case, step, arg) {
                    continue;
                }
                let mut mutant = program.clone();
                let place = mutant.graphs.iter().position(|g| g.name == step.name).expect("it was found above");
                mutant.graphs[place] = negated(step, &program, id.0, i);
                mutants += 1;
                let seen = difference(&found(&mutant, &setup), &expected);
                assert!(seen.is_some(), "operand {i} of op {} (`{}`) may be negated in\n{program}", id.0, op.op);
            }
        }
    }
    assert!(mutants > 5 * CASES.len() / 2, "only {mutants} signs were flipped");
}

/// Whether the sign of an operand cannot matter: zeros, and the mask of a largest or smallest element, which is
/// divided by its own sum.
fn is_signless(case: &Case, graph: &Graph, arg: Value) -> bool {
    match constant(graph, arg) {
        Some(number) => number == 0.0 || (number == 1.0 && ["reduce_max", "reduce_min"].contains(&case.op)),
        None => false,
    }
}

/// The number that every element of a value is, if it is a stretched constant.
fn constant(graph: &Graph, value: Value) -> Option<f64> {
    let op = graph.op(graph.def(value)?);
    match op.op {
        Op::Const { value, .. } => Some(value),
        Op::Broadcast { .. } => constant(graph, op.args[0]),
        _ => None,
    }
}

/// The graph with one operand of one op negated.
fn negated(graph: &Graph, program: &Program, at: u32, operand: usize) -> Graph {
    let mut new = Graph::like(graph, graph.name.clone());
    let mut map: Vec<Value> = graph.inputs().map(|v| new.input(graph.name_of(v), graph.ty(v).clone())).collect();
    for (id, op) in graph.ops() {
        let mut args: Vec<Value> = op.args.iter().map(|a| map[a.0 as usize]).collect();
        if id.0 == at {
            args[operand] = Builder::new(&mut new, op.site.clone()).one(Op::Neg {}, &[args[operand]]);
        }
        let state: Option<&Type> = match op.op {
            Op::Read { state } | Op::Write { state } => Some(&program.state(state).ty),
            _ => None,
        };
        let id = new.try_push(op.op.clone(), &args, state, op.site.clone()).unwrap_or_else(|why| panic!("{why}"));
        map.extend(new.op(id).results());
    }
    new.outputs = graph.outputs.iter().map(|(n, v)| (n.clone(), map[v.0 as usize])).collect();
    new
}

#[test]
fn nothing_flows_through_stop() {
    let case = Case {
        op: "stop",
        params: "a: f32[3]",
        inputs: "",
        lines: "  %s = stop %a\n  %y = mul %a, %s",
        domain: Domain::Any,
    };
    let setup = setup(&case);
    let Data::F64(weights) = &setup.inputs[0].1.data else { panic!("weights are floats") };
    let a = setup.params.values().next().expect("it is the only parameter").to_f64();
    let product: Vec<f64> = a.iter().zip(weights).map(|(a, w)| a * w).collect();
    assert_eq!(found(&differentiated(&setup), &setup)["model/a"], product);
}

#[test]
fn gradients_of_gradient_ops_are_errors() {
    for (params, inputs, line) in [
        ("a: f32[2, 3]", "%i: i32[2]", "  %y = embed_grad %i, %a rows=4"),
        ("a: f32[2, 3]; w: f32[3]", "%g: f32[2, 3]", "  %y, %dw, %db = layer_norm_grad %a, %w, %g eps=1e-5"),
        ("a: f32[2, 3]", "%i: i32[2], %g: f32[2]", "  %y = token_logp_grad %a, %i, %g"),
    ] {
        let case = Case { op: "refused", params, inputs, lines: line, domain: Domain::Any };
        let context = PassContext::new(&InterpTarget);
        let errors = (autodiff::PASS.run)(program(&case), &context).expect_err(line);
        assert!(errors[0].message.contains("has no gradient"), "found `{}` for\n{line}", errors[0].message);
    }
}
