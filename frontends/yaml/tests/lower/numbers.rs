//! Numbers in the f64 interpreter.

use dsgc_ir::Tensor;
use dsgc_ir::verify::verify;
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, Precision};
use dsgc_yaml::document::Document;
use dsgc_yaml::recipe::Recipe;

use crate::setup::{Documents, lower, tiny};

/// The golden model of rlhf.md 17.6: the k-th element of the p-th parameter is a sine, plus 1 in norms.
fn fill(interp: &mut Interp) {
    let states: Vec<_> = interp.program().state_ids().map(|(id, s)| (id, s.clone())).collect();
    for (p, (id, state)) in states.into_iter().enumerate() {
        let shape: Vec<usize> = state.ty.dims.iter().map(|d| d.constant().expect("a number") as usize).collect();
        let one = if state.name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let value = |k: usize| 0.1 * (0.7 * k as f64 + 1.9 * p as f64 + 0.3).sin() + one;
        let elements = (0..shape.iter().product()).map(value).collect();
        interp.set_state(id, &Tensor::f64(&shape, elements));
    }
}

/// The rows of rlhf.md 17.6: everything but the last place of the first row is text, and a target.
fn rows() -> [(&'static str, Tensor); 3] {
    let tokens = Tensor::i32(&[2, 8], vec![2, 5, 6, 7, 8, 9, 2, 2, 2, 11, 12, 13, 14, 15, 16, 17]);
    let seen = |at: usize| at != 7;
    let segment = Tensor::i32(&[2, 8], (0..16).map(|at| i32::from(seen(at))).collect());
    let trained = Tensor::bool(&[2, 8], (0..16).map(seen).collect());
    [("text.tokens", tokens), ("text.segment", segment), ("text.trained", trained)]
}

/// The outputs of a recipe's graph `loss` on the tiny model.
fn outputs(documents: &mut Documents, recipe: &Recipe) -> Vec<(String, Tensor)> {
    let (functions, model) = (documents.std_functions(), documents.std_model("opt"));
    let program = lower(recipe, &functions, &model, &tiny()).unwrap_or_else(|e| panic!("{e:#?}"));
    verify(&program).unwrap_or_else(|e| panic!("{e}\n{program}"));
    let mut interp = Interp::new(program, Precision::F64);
    fill(&mut interp);
    let rows = rows();
    let inputs: Vec<(&str, &Tensor)> = rows.iter().map(|(name, tensor)| (*name, tensor)).collect();
    interp.run("loss", &inputs).unwrap_or_else(|e| panic!("{e}"))
}

#[track_caller]
fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-6, "found {found}, expected {expected}");
}

#[test]
fn the_tiny_opt_has_its_golden_loss() {
    let mut documents = Documents::default();
    let recipe = documents.std_recipe("sft");
    let outputs = outputs(&mut documents, &recipe);
    let names: Vec<&str> = outputs.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["loss", "ppl"]);
    near(outputs[0].1.scalar(), 3.377_144_34);
    near(outputs[1].1.scalar(), outputs[0].1.scalar().exp());
}

/// Outputs of a model are members of its result; the sum is over places that are no padding.
const LOGITS: &str = "\
recipe: logits
extends: sft
graphs:
  loss:
    in: {text: \"sequence[B, T]\"}
    let:
      - out: model(tokens=text.tokens, segment=text.segment)
    out:
      loss: sum(out.logits, where=text.trained[:, :, None])
      logits: out.logits
";

#[test]
fn the_tiny_opt_has_its_golden_logits() {
    let mut documents = Documents::default();
    let Document::Recipe(recipe) = documents.read("logits.yaml", LOGITS) else { panic!("no recipe") };
    let recipe = Recipe { options: documents.std_recipe("sft").options, ..*recipe };
    let outputs = outputs(&mut documents, &recipe);
    // The golden sum was taken in f32 over 360 numbers.
    let sum = outputs[0].1.scalar();
    assert!((sum - 7.817_365_6).abs() < 5e-6, "{sum}");
    let logits = outputs[1].1.to_f64();
    let golden = [
        ((0, 0), [0.694_950_8, -0.156_216_1, -0.758_376_1, -0.151_692_0]),
        ((0, 5), [0.905_556_1, -0.192_964_7, -0.983_901_7, -0.206_509_0]),
        ((1, 7), [0.270_114_5, -0.843_891_7, -0.612_742_7, 0.595_112_2]),
    ];
    for ((row, place), expected) in golden {
        for (v, expected) in expected.into_iter().enumerate() {
            near(logits[(row * 8 + place) * 24 + v], expected);
        }
    }
}

/// The first output of a called graph stands for the call, also where it is an output itself.
const CALLS: &str = "\
recipe: calls
extends: sft
graphs:
  parts:
    in: {text: \"sequence[B, T]\"}
    let:
      - logp: next_logp(model(text), text.tokens)
    out:
      nll: mean(-logp, where=text.trained[:, 1:])
      targets: sum(f32(text.trained[:, 1:]))
  loss:
    in: {text: \"sequence[B, T]\"}
    let:
      - both: parts(text)
    out: {loss: both, targets: both.targets}
";

#[test]
fn the_first_output_stands_for_a_call() {
    let mut documents = Documents::default();
    let Document::Recipe(recipe) = documents.read("calls.yaml", CALLS) else { panic!("no recipe") };
    let recipe = Recipe { options: documents.std_recipe("sft").options, ..*recipe };
    let outputs = outputs(&mut documents, &recipe);
    let names: Vec<&str> = outputs.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["loss", "targets"]);
    near(outputs[0].1.scalar(), 3.377_144_34);
    near(outputs[1].1.scalar(), 13.0);
}

#[test]
fn first_values_differ_by_parameter_and_by_key() {
    let mut documents = Documents::default();
    let (recipe, functions, model) =
        (documents.std_recipe("sft"), documents.std_functions(), documents.std_model("opt"));
    let program = lower(&recipe, &functions, &model, &tiny()).unwrap_or_else(|e| panic!("{e:#?}"));
    let of = |key: [u32; 2], name: &str| {
        let mut interp = Interp::new(program.clone(), Precision::F64);
        interp.run("model.init", &[("key", &Tensor::key(key))]).unwrap_or_else(|e| panic!("{e}"));
        let id = program.state_named(&format!("model/model.decoder.{name}")).expect("a parameter");
        interp.state(id).to_f64()
    };
    let (q, k) = (of([0, 1], "layers.0.self_attn.q_proj.weight"), of([0, 1], "layers.0.self_attn.k_proj.weight"));
    let spread = (q.iter().map(|x| x * x).sum::<f64>() / q.len() as f64).sqrt();
    assert!((spread - 0.02).abs() < 0.004, "{spread}");
    assert_ne!(q, k);
    assert_ne!(q, of([0, 2], "layers.0.self_attn.q_proj.weight"));
    assert_eq!(q, of([0, 1], "layers.0.self_attn.q_proj.weight"));
    assert_eq!(of([0, 1], "final_layer_norm.weight"), vec![1.0; 16]);
    assert_eq!(of([0, 1], "layers.1.fc1.bias"), vec![0.0; 32]);
}
