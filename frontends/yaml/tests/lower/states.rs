//! Conditions on tensors, states of recipes, and averages of models.

use dsgc_ir::verify::verify;
use dsgc_ir::{DType, Op, Program, Tensor, Type};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, Precision};
use dsgc_yaml::document::Document;
use dsgc_yaml::lower::{self, Average, Lowered, Request, Set, document_tests};
use dsgc_yaml::plan::Step;
use dsgc_yaml::recipe::Recipe;
use dsgc_yaml::render::{Look, render};

use crate::setup::{Documents, request, role, tiny};

fn read(documents: &mut Documents, text: &str) -> Recipe {
    let Document::Recipe(recipe) = documents.read("mine.yaml", text) else { panic!("no recipe") };
    *recipe
}

/// A program, or what is said about it; `change` completes the request.
fn lowered(text: &str, change: impl FnOnce(&Recipe, &mut Request<'_>)) -> Result<Program, String> {
    let mut documents = Documents::default();
    let recipe = read(&mut documents, text);
    let (functions, opt) = (documents.std_functions(), documents.std_model("opt"));
    let mut request =
        request(&recipe, &functions, ["model", "slow"].map(|name| role(name, &opt, &functions, &tiny(), true)).into());
    change(&recipe, &mut request);
    match lower::program(&request) {
        Ok(Lowered { program, .. }) => {
            verify(&program).unwrap_or_else(|e| panic!("{e}\n{program}"));
            Ok(program)
        }
        Err(diags) => Err(render(&diags, &documents.sources, Look::Plain)),
    }
}

#[track_caller]
fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-12, "found {found}, expected {expected}");
}

const ASSERTS: &str = "\
recipe: asserts
extends: sft
models: {model: causal_lm}
options: {least: 1}
graphs:
  ends:
    in: {m: \"bool[B, T]\"}
    assert:
      - any(m, axis=1): a row is empty
    out: first(m)
  loss:
    in: {text: \"sequence[B, T]\"}
    let:
      - end: ends(text.trained)
    assert:
      - least > 0: known when the file is read
      - all(end >= least): a row begins too early
    out: {loss: mean(f32(end))}
";

#[test]
fn conditions_are_outputs_of_the_graph_that_the_plan_calls() {
    let program = lowered(ASSERTS, |_, _| {}).unwrap_or_else(|e| panic!("{e}"));
    let asserts: Vec<_> = program.stage.asserts.iter().map(|a| (&*a.graph, &*a.output, &*a.message)).collect();
    assert_eq!(asserts, [("loss", "assert.0", "a row is empty"), ("loss", "assert.1", "a row begins too early")]);
    assert!(program.stage.asserts.iter().all(|a| a.span.is_some()));
    let mut interp = Interp::new(program, Precision::F64);
    let mut holds = |trained: [bool; 4]| -> Vec<f64> {
        let (tokens, segment) = (Tensor::i32(&[2, 2], vec![3; 4]), Tensor::i32(&[2, 2], vec![1; 4]));
        let trained = Tensor::bool(&[2, 2], trained.into());
        let inputs = [("text.tokens", &tokens), ("text.segment", &segment), ("text.trained", &trained)];
        let outputs = interp.run("loss", &inputs).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(outputs[1..].iter().map(|o| o.0.as_str()).collect::<Vec<_>>(), ["assert.0", "assert.1"]);
        assert!(outputs[1..].iter().all(|o| o.1.shape.is_empty() && o.1.dtype() == DType::F32));
        outputs[1..].iter().map(|o| o.1.scalar()).collect()
    };
    assert_eq!(holds([false, true, false, true]), [1.0, 1.0]);
    assert_eq!(holds([false, true, true, true]), [1.0, 0.0]);
    assert_eq!(holds([false, true, false, false]), [0.0, 1.0]);
}

#[test]
fn conditions_are_truth_values() {
    let said = lowered(&ASSERTS.replace("all(end >= least)", "end - least"), |_, _| {}).expect_err("a number");
    assert!(said.contains("found i32[B], expected bool"), "{said}");
    let said = lowered(&ASSERTS.replace("{least: 1}", "{least: 0}"), |_, _| {}).expect_err("it does not hold");
    assert!(said.contains("known when the file is read"), "{said}");
}

/// A test of a document fails where what its graph demands does not hold.
#[test]
fn tests_of_documents_ask_for_what_graphs_demand() {
    const FUNCTIONS: &str = "\
functions: mine
graphs:
  root:
    in: {x: \"f[N]\"}
    assert:
      - x >= 0: no root of a negative number
    out: sqrt(abs(x))
tests:
  - graph: root
    given: {x: [4.0, -9.0]}
    expect: {out: [2, 3]}
";
    let mut documents = Documents::default();
    let Document::Functions(mine) = documents.read("mine.yaml", FUNCTIONS) else { panic!("no functions") };
    let tests = document_tests(&mine.tests, &[], &mine.graphs, &[&mine]).unwrap_or_else(|e| panic!("{e:#?}"));
    let expected: Vec<&str> = tests[0].expect.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(expected, ["out", "assert.0"]);
    let mut interp = Interp::new(tests[0].program.clone(), Precision::F64);
    let inputs: Vec<(&str, &Tensor)> = tests[0].inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let outputs = interp.run("root", &inputs).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((outputs[1].1.scalar(), tests[0].expect[1].1.scalar()), (0.0, 1.0));
}

/// The adaptive coefficient of Ziegler et al. 2019, and a running mean beside it.
const STATES: &str = "\
recipe: states
extends: sft
models: {model: causal_lm, slow: causal_lm}
options: {kl_coef: 0.1, kl_target: 6.0, kl_horizon: 10000, batch_size: 256}
state:
  kl_now: {init: kl_coef}
  seen: {init: \"zeros([2])\"}
graphs:
  loss:
    in: {text: \"sequence[B, T]\"}
    out: {loss: mean(f32(text.tokens))}
plan:
  - set:
      kl_now: kl_now * (1 + clip(exp.kl / kl_target - 1, -0.2, 0.2) * batch_size / kl_horizon)
      seen: 0.5 * seen + kl_now
";

/// The `set` statements of a recipe's plan, with the names of the plan in them.
fn sets(recipe: &Recipe, inputs: &[&str]) -> Vec<Set> {
    let steps = recipe.plan.iter().flatten();
    let values = steps.filter_map(|step| if let Step::Set { values, .. } = step { Some(values.clone()) } else { None });
    let inputs: Vec<_> = inputs.iter().map(|name| (name.to_string(), Type::scalar(DType::F32))).collect();
    values.map(|values| Set { values, inputs: inputs.clone() }).collect()
}

#[test]
fn states_begin_and_change() {
    let program = lowered(STATES, |recipe, request| request.sets = sets(recipe, &["exp.kl"]));
    let program = program.unwrap_or_else(|e| panic!("{e}"));
    let id = |name: &str| program.state_named(name).unwrap_or_else(|| panic!("no state {name}"));
    let (kl, seen) = (id("state/kl_now"), id("state/seen"));
    assert_eq!(program.state(seen).ty.to_string(), "f32[2]");
    let mut interp = Interp::new(program.clone(), Precision::F64);
    interp.run(lower::STATE_INIT, &[]).unwrap_or_else(|e| panic!("{e}"));
    near(interp.state(kl).scalar(), 0.1);
    // The divergence is twice the target: clipped to 0.2. The mean is that of the old value.
    interp.run(&lower::set_graph(0), &[("exp.kl", &Tensor::f64(&[], vec![12.0]))]).unwrap_or_else(|e| panic!("{e}"));
    near(interp.state(kl).scalar(), 0.1 * (1.0 + 0.2 * 256.0 / 10000.0));
    assert_eq!(interp.state(seen).to_f64(), [0.1, 0.1]);
    interp.run(&lower::set_graph(0), &[("exp.kl", &Tensor::f64(&[], vec![5.4]))]).unwrap_or_else(|e| panic!("{e}"));
    near(interp.state(kl).scalar(), 0.1 * (1.0 + 0.2 * 256.0 / 10000.0) * (1.0 - 0.1 * 256.0 / 10000.0));
}

#[test]
fn mistakes_in_states_are_told() {
    let said = |text: &str| {
        let program = lowered(text, |recipe, request| request.sets = sets(recipe, &["exp.kl"]));
        program.map(|program| program.to_string()).expect_err("something is wrong")
    };
    let other = said(&STATES.replace("      seen:", "      sene:"));
    assert!(other.contains("found `sene`, expected a state of this recipe"), "{other}");
    let shape = said(&STATES.replace("0.5 * seen", "zeros([3])"));
    assert!(shape.contains("error") && shape.contains("mine.yaml:15"), "{shape}");
    let unknown = said(&STATES.replace("exp.kl /", "exp.lk /"));
    assert!(unknown.contains("`exp.lk` is not defined"), "{unknown}");
    let text = said(&STATES.replace("init: kl_coef", "init: \"'a'\""));
    assert!(text.contains("expected a tensor or a number"), "{text}");
    let taken = said(&STATES.replace("kl_now", "kl_target"));
    assert!(taken.contains("`kl_target` has two meanings"), "{taken}");
}

#[test]
fn averages_follow_slowly_and_layer_by_layer() {
    let averages = vec![Average { role: "slow".into(), of: "model".into(), decay: 0.75 }];
    let program = lowered(STATES, |_, request| request.averages = averages).unwrap_or_else(|e| panic!("{e}"));
    let graph = program.graph(&lower::average_graph("slow")).expect("there is one per average");
    let layer = |i: u32| -> Vec<&str> {
        let of = |op: &&dsgc_ir::OpData| op.site.tag.as_ref().is_some_and(|t| t.instance == i);
        graph.ops().map(|(_, op)| op).filter(of).map(|op| op.op.name()).collect()
    };
    assert_eq!(layer(0), layer(1));
    assert_eq!(graph.ops().filter(|(_, op)| matches!(op.op, Op::Write { .. })).count(), 36);
    let mut interp = Interp::new(program.clone(), Precision::F64);
    interp.run("slow.init", &[("key", &Tensor::key([0, 1]))]).unwrap_or_else(|e| panic!("{e}"));
    interp.run("model.init", &[("key", &Tensor::key([0, 2]))]).unwrap_or_else(|e| panic!("{e}"));
    let of = |interp: &Interp, role: &str| {
        let name = format!("{role}/model.decoder.layers.1.fc2.weight");
        interp.state(program.state_named(&name).expect("a parameter")).to_f64()
    };
    let (old, new) = (of(&interp, "slow"), of(&interp, "model"));
    interp.run("slow.average", &[]).unwrap_or_else(|e| panic!("{e}"));
    for ((average, old), new) in of(&interp, "slow").into_iter().zip(old).zip(&new) {
        near(average, 0.75 * old + 0.25 * new);
    }
    assert_eq!(of(&interp, "model"), new);
}
