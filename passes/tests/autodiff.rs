//! D1: an optimizer batch gives the same numbers however it is cut; and what cannot be cut is an error.

use std::collections::BTreeMap;

use dsgc_ir::stage::{Statement, UpdateSteps};
use dsgc_ir::verify::verify;
use dsgc_ir::{Data, Program, Tensor, parse};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::{PassContext, autodiff, canonicalize, infer};

/// A regression with a masked mean, a hidden layer, two metrics and a size.
const LOSS: &str = "
graph @loss(%x: f32[B, 3], %y: f32[B], %m: bool[B]) {
  dim B: 1..4 batch
  %w = read @model/w
  %v = read @model/v.bias
  %z = contract %x, %w spec=bi,hi->bh
  %h = tanh %z
  %vb = broadcast %v shape=[B, 2]
  %hv = mul %h, %vb
  %p = reduce_sum %hv axes=[1]
  %e = sub %p, %y
  %e2 = mul %e, %e
  %zero = const value=0.0 dtype=f32
  %zeros = broadcast %zero shape=[B]
  %kept = where %m, %e2, %zeros
  %sum = reduce_sum %kept axes=[0]
  %mf = cast %m dtype=f32
  %count = reduce_sum %mf axes=[0]
  %mean = div %sum, %count
  %ppl = exp %mean
  %worst = reduce_max %kept axes=[0]
  %rows = size dim=B dtype=f32
  return loss=%mean, ppl=%ppl, worst=%worst, rows=%rows, each=%e2
}";

fn program(graph: &str, micro: usize) -> Program {
    let text = format!(
        r#"level logical
param @model/w : f32[2, 3] trained
param @model/v.bias : f32[2] trained
param @model/unused : f32[2] trained
{graph}
stage {{
  "name": "s",
  "sources": [{{"name": "rows", "batch_size": 4, "micro_batch_size": {micro}}}],
  "trainings": [{{
    "role": "model",
    "optimizer": {{"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "no_decay": ["bias"]}},
    "schedule": {{"learning_rate": 0.1, "kind": "constant", "warmup_steps": 0, "warmup_ratio": 0.0, "clamp": true}},
    "max_grad_norm": 0.5
  }}],
  "plan": [{{"for": {{"batch": "b", "rows": {{"source": "rows"}}, "body": [
    {{"update": {{"role": "model", "terms": [{{"weight": 1.0, "graph": "loss", "args": [["x", {{"path": "b.x"}}]]}}], "steps": null}}}}
  ]}}}}],
  "evaluate": [{{"source": "rows", "body": [{{"call": {{"name": null, "graph": "loss", "args": [["x", {{"path": "rows.eval.x"}}]], "cached": false, "steps": null}}}}]}}]
}}
"#
    );
    parse(&text).unwrap_or_else(|e| panic!("{}", e.message))
}

fn differentiate(program: Program) -> Result<Program, String> {
    let context = PassContext::new(&InterpTarget);
    let mut program = program;
    for pass in [infer::PASS, canonicalize::PASS, autodiff::PASS, canonicalize::PASS] {
        program = (pass.run)(program, &context).map_err(|e| e[0].to_string())?;
        verify(&program).unwrap_or_else(|fault| panic!("after {}: {fault}\n{program}", pass.name));
        let printed = program.to_string();
        assert_eq!(parse(&printed).expect("it was printed").to_string(), printed);
    }
    Ok(program)
}

type Named = Vec<(String, Tensor)>;

/// Rows `from` to `to` of all inputs.
fn rows(inputs: &Named, from: usize, to: usize) -> Named {
    let cut = |t: &Tensor| {
        let width: usize = t.shape[1..].iter().product();
        let data = match &t.data {
            Data::F64(v) => Data::F64(v[from * width..to * width].to_vec()),
            Data::Bool(v) => Data::Bool(v[from * width..to * width].to_vec()),
            other => panic!("{other:?} is not used here"),
        };
        Tensor::new(&[&[to - from], &t.shape[1..]].concat(), data)
    };
    inputs.iter().map(|(n, t)| (n.clone(), cut(t))).collect()
}

fn call(interp: &mut Interp, graph: &str, inputs: &Named) -> Named {
    let declared = interp.program().graph(graph).expect("the pass made it").clone();
    let named: Vec<(&str, &Tensor)> =
        inputs.iter().filter(|(n, _)| declared.input_named(n).is_some()).map(|(n, t)| (n.as_str(), t)).collect();
    interp.run(graph, &named).unwrap_or_else(|e| panic!("{graph}: {}", e.message))
}

/// Puts totals of parts together by the first part of their names.
fn combine(totals: &mut Named, part: Named) {
    for (name, tensor) in part {
        let Some((_, so_far)) = totals.iter_mut().find(|(n, _)| *n == name) else {
            totals.push((name, tensor));
            continue;
        };
        let with = |a: f64, b: f64| match name.split('.').next() {
            Some("sum") => a + b,
            Some("max") => a.max(b),
            Some("min") => a.min(b),
            _ => panic!("`{name}` is no total"),
        };
        let numbers = so_far.to_f64().into_iter().zip(tensor.to_f64()).map(|(a, b)| with(a, b)).collect();
        *so_far = Tensor::new(&so_far.shape, Data::F64(numbers));
    }
}

/// Totals of one graph over all parts, where some totals are known.
fn round(interp: &mut Interp, graph: &str, parts: &[Named], given: &Named) -> Named {
    let mut totals = Named::new();
    for part in parts {
        let more = call(interp, graph, &[part.clone(), given.clone()].concat());
        combine(&mut totals, more);
    }
    totals
}

fn scalar(x: f64) -> Tensor {
    Tensor::new(&[], Data::F64(vec![x]))
}

/// Outputs of a step, by name.
type Outputs = BTreeMap<String, f64>;
/// States by name.
type States = BTreeMap<String, Vec<f64>>;

/// Trains three steps on four rows; outputs of every step, all states that every cut has, and the program.
fn train(micro: usize) -> (Vec<Outputs>, States, Program) {
    let program = differentiate(program(LOSS, micro)).unwrap_or_else(|e| panic!("{e}"));
    let Statement::For { body, .. } = &program.stage.plan[0] else { panic!("the plan begins with `for`") };
    let Statement::Update(update) = &body[0] else { panic!("the body is an update") };
    let steps = update.steps.clone().expect("the pass fills it in");
    let mut interp = Interp::new(program.clone(), Precision::F64);
    let wave = |n: usize, by: f64| Data::F64((0..n).map(|i| (by * i as f64 + 0.3).sin()).collect());
    for (name, shape, by) in [("w", vec![2, 3], 0.7), ("v.bias", vec![2], 1.9), ("unused", vec![2], 2.3)] {
        let id = program.state_named(&format!("model/{name}")).expect("it is declared");
        interp.set_state(id, &Tensor::new(&shape, wave(shape.iter().product(), by)));
    }
    let inputs: Named = vec![
        ("x".into(), Tensor::new(&[4, 3], wave(12, 1.3))),
        ("y".into(), Tensor::new(&[4], wave(4, 0.9))),
        ("m".into(), Tensor::new(&[4], Data::Bool(vec![true, true, false, true]))),
    ];
    let mut history = Vec::new();
    for step in 1..=3 {
        let settings: Named = vec![("lr".into(), scalar(0.1)), ("t".into(), Tensor::new(&[], Data::I32(vec![step])))];
        let outputs = match &steps {
            UpdateSteps::Whole { step } => call(&mut interp, step, &[inputs.clone(), settings].concat()),
            UpdateSteps::Split { terms, apply, .. } => {
                let [steps] = &terms[..] else { panic!("the update has one term") };
                let parts: Vec<Named> = (0..4).step_by(micro).map(|i| rows(&inputs, i, (i + micro).min(4))).collect();
                let mut totals = Named::new();
                for count in &steps.count {
                    totals = round(&mut interp, count, &parts, &totals).into_iter().chain(totals).collect();
                }
                let rest = round(&mut interp, &steps.grad, &parts, &totals);
                totals.extend(rest);
                let mut outputs = call(&mut interp, &steps.finish, &totals);
                outputs.extend(call(&mut interp, apply, &settings));
                outputs
            }
        };
        history.push(outputs.into_iter().map(|(n, t)| (n, t.to_f64()[0])).collect());
    }
    let states = program
        .state_ids()
        .filter(|(_, s)| !s.name.ends_with(".grad"))
        .map(|(id, s)| (s.name.clone(), interp.state(id).to_f64()))
        .collect();
    (history, states, program)
}

#[test]
fn numbers_do_not_depend_on_micro_batches() {
    let (history, states, _) = train(4);
    assert!(history[2]["loss"] < history[0]["loss"], "{history:?}");
    assert_eq!(history[0]["rows"], 4.0);
    assert_eq!(states["model/unused"], [0.3f64.sin(), (2.3f64 + 0.3).sin()], "what no loss uses is not decayed either");
    for micro in [1, 2, 3] {
        let (cut_history, cut_states, _) = train(micro);
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-13 * a.abs().max(1.0);
        for (step, (whole, cut)) in history.iter().zip(&cut_history).enumerate() {
            assert_eq!(whole.keys().collect::<Vec<_>>(), cut.keys().collect::<Vec<_>>());
            for (name, &value) in whole {
                assert!(near(value, cut[name]), "{name} at step {step}, micro {micro}: {value} and {}", cut[name]);
            }
        }
        assert_eq!(states.keys().collect::<Vec<_>>(), cut_states.keys().collect::<Vec<_>>());
        for (name, values) in &states {
            let equal = values.iter().zip(&cut_states[name]).all(|(&a, &b)| near(a, b));
            assert!(equal, "@{name}, micro {micro}: {values:?} and {:?}", cut_states[name]);
        }
    }
}

#[test]
fn only_parameters_without_an_exempt_name_decay() {
    let (_, _, program) = train(4);
    let decays: Vec<String> = program.graphs[0]
        .ops()
        .filter(|(_, op)| op.op.name() == "adamw")
        .map(|(_, op)| op.op.attributes().into_iter().find(|a| a.0 == "decay").expect("adamw has it").1)
        .collect();
    assert_eq!(decays, ["0.1", "0.0"], "w decays, v.bias does not");
}

#[test]
fn what_cannot_be_cut_is_an_error_that_says_why() {
    let graph = |lines: &str| {
        format!(
            "graph @loss(%x: f32[B, 3], %y: f32[B], %m: bool[B]) {{
  dim B: 1..4 batch
  %w = read @model/w
  %v = read @model/v.bias
  %z = contract %x, %w spec=bi,hi->bh
  %p = reduce_sum %z axes=[1]
{lines}
}}"
        )
    };
    let cases = [
        // Rows weighted by a total of trained values.
        (
            "  %max = reduce_max %p axes=[0]
  %maxes = broadcast %max shape=[B]
  %d = sub %p, %maxes
  %e = exp %d
  %l = reduce_sum %e axes=[0]
  return loss=%l",
            "depends on the parameters that are trained",
        ),
        // The slope of the logarithm is the sum itself.
        (
            "  %s = reduce_sum %p axes=[0]
  %l = log %s
  return loss=%l",
            "depends on the parameters that are trained",
        ),
        ("  %l = reduce_max %p axes=[0]\n  return loss=%l", "one part cannot know"),
        (
            "  %pairs = contract %z, %z spec=bh,ch->bc
  %l = reduce_sum %pairs axes=[0, 1]
  return loss=%l",
            "pairs rows with rows",
        ),
        (
            "  %one = slice %p axis=0 start=0 end=1
  %l = reduce_sum %one axes=[0]
  return loss=%l",
            "takes the rows 0 to 1",
        ),
        ("  %c = cumsum %p axis=0 reverse=false\n  %l = reduce_sum %c axes=[0]\n  return loss=%l", "from row to row"),
        (
            "  %i = iota len=B
  %f = cast %i dtype=f32
  %q = mul %p, %f
  %l = reduce_sum %q axes=[0]
  return loss=%l",
            "numbers the rows",
        ),
        // The blocks of a joined tensor and the rows of a reshaped one are not beside each other.
        (
            "  %pp = concat %p, %p axis=0
  %r = reshape %z shape=[2*B]
  %q = mul %pp, %r
  %l = reduce_sum %q axes=[0]
  return loss=%l",
            "different rows beside each other",
        ),
        // A penalty on weights would be counted once per part.
        (
            "  %s = reduce_sum %p axes=[0]
  %n = contract %v, %v spec=h,h->
  %l = add %s, %n
  return loss=%l",
            "does not depend on the batch",
        ),
    ];
    for (lines, expected) in cases {
        let found = differentiate(program(&graph(lines), 2)).expect_err(lines);
        assert!(found.contains(expected), "found `{found}`, expected `{expected}` for\n{lines}");
    }
    // Blocks of whole batches are rows of rows.
    let fine = "  %pp = concat %p, %y axis=0
  %a = slice %pp axis=0 start=0 end=B
  %b = slice %pp axis=0 start=B end=2*B
  %q = mul %a, %b
  %l = reduce_sum %q axes=[0]
  return loss=%l";
    differentiate(program(&graph(fine), 2)).unwrap_or_else(|e| panic!("{e}"));
}
