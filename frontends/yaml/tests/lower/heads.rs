//! Models over models: the parameters they have, their numbers, and what is said about mistakes.

use dsgc_ir::diag::Diag;
use dsgc_ir::verify::verify;
use dsgc_ir::{Op, Program, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, Precision};
use dsgc_yaml::document::Document;
use dsgc_yaml::literal::Constant;
use dsgc_yaml::lower::{self, Lowered};
use dsgc_yaml::model::Model;
use dsgc_yaml::recipe::Recipe;
use dsgc_yaml::render::{Look, render};

use crate::setup::{Documents, request, role, role_over, tiny};

/// A recipe with a critic.
pub const SCORES: &str = "\
recipe: scores
extends: sft
models: {critic: {type: value, trained: true}}
graphs:
  loss:
    in: {text: \"sequence[B, T]\"}
    out: {loss: mean(critic(text)), value: critic(text).value}
";

fn recipe(documents: &mut Documents, text: &str) -> Recipe {
    let Document::Recipe(recipe) = documents.read("recipe.yaml", text) else { panic!("no recipe") };
    *recipe
}

/// The library's head over the tiny OPT, with changes of its config.
fn scores(changes: &[(&'static str, Constant)]) -> Lowered {
    let mut documents = Documents::default();
    let recipe = recipe(&mut documents, SCORES);
    let (functions, head, opt) = (documents.std_functions(), documents.std_model("value"), documents.std_model("opt"));
    let config: Vec<_> = tiny().into_iter().chain(changes.iter().cloned()).collect();
    let role = role_over("critic", &head, (&opt, &config), &functions);
    let lowered = lower::program(&request(&recipe, &functions, vec![role]));
    let lowered = lowered.unwrap_or_else(|e| panic!("{}", render(&e, &documents.sources, Look::Plain)));
    verify(&lowered.program).unwrap_or_else(|e| panic!("{e}\n{}", lowered.program));
    lowered
}

fn names(program: &Program) -> Vec<&str> {
    program.params_of("critic").map(|(_, name)| name).collect()
}

#[test]
fn a_head_has_the_parameters_of_its_trunk_that_it_needs() {
    let Lowered { program, left } = scores(&[]);
    assert_eq!(names(&program).len(), 37);
    assert_eq!(*names(&program).last().expect("there are some"), "score.weight");
    assert_eq!(left["critic"], [] as [&str; 0]);
    let score = program.state_named("critic/score.weight").expect("the head's parameter");
    assert_eq!(program.state(score).ty.to_string(), "f32[1, 16]");

    let Lowered { program, left } = scores(&[("tied", Constant::Bool(false))]);
    assert_eq!((names(&program).len(), names(&program).contains(&"lm_head.weight")), (37, false));
    assert_eq!(left["critic"], ["lm_head.weight"]);
    let tags = program.graph("loss").expect("the plan calls it").ops().filter(|(_, op)| op.site.tag.is_some());
    assert!(tags.count() > 40);
}

#[test]
fn a_head_begins_with_its_trunk() {
    let program = scores(&[("tied", Constant::Bool(false))]).program;
    let mut interp = Interp::new(program.clone(), Precision::F64);
    interp.run("critic.init", &[("key", &Tensor::key([0, 1]))]).unwrap_or_else(|e| panic!("{e}"));
    let of = |name: &str| interp.state(program.state_named(name).expect("a parameter")).to_f64();
    let spread = |values: Vec<f64>| (values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64).sqrt();
    // 1 / sqrt(16 + 1) = 0.2425 for the 16 numbers of the head.
    let head = spread(of("critic/score.weight"));
    assert!((0.12..0.4).contains(&head), "{head}");
    let body = spread(of("critic/model.decoder.layers.0.fc1.weight"));
    assert!((body - 0.02).abs() < 0.004, "{body}");
    let writes = program.graph("critic.init").expect("there is one per role").ops();
    assert_eq!(writes.filter(|(_, op)| matches!(op.op, Op::Write { .. })).count(), 37);
}

/// The scores of rlhf.md 17.6: the head is the 0th parameter there, then come those of the decoder.
#[test]
fn the_tiny_reward_model_has_its_golden_scores() {
    let program = scores(&[]).program;
    let mut interp = Interp::new(program.clone(), Precision::F64);
    for (at, (id, state)) in program.state_ids().enumerate() {
        let p = if state.name == "critic/score.weight" { 0 } else { at + 1 };
        let shape: Vec<usize> = state.ty.dims.iter().map(|d| d.constant().expect("a number") as usize).collect();
        let one = if state.name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let value = |k: usize| 0.1 * (0.7 * k as f64 + 1.9 * p as f64 + 0.3).sin() + one;
        interp.set_state(id, &Tensor::f64(&shape, (0..shape.iter().product()).map(value).collect()));
    }
    let tokens = Tensor::i32(&[2, 8], vec![2, 5, 6, 7, 8, 9, 2, 2, 2, 11, 12, 13, 14, 15, 16, 17]);
    let segment = Tensor::i32(&[2, 8], (0..16).map(|at| i32::from(at != 7)).collect());
    let trained = Tensor::bool(&[2, 8], vec![true; 16]);
    let inputs = [("text.tokens", &tokens), ("text.segment", &segment), ("text.trained", &trained)];
    let outputs = interp.run("loss", &inputs).unwrap_or_else(|e| panic!("{e}"));
    let value = outputs[1].1.to_f64();
    let golden = [-0.474292, -0.447729, -0.561162, -0.896935, -0.847664, -0.622437, -0.417608];
    for (found, expected) in value.iter().zip(golden) {
        assert!((found - expected).abs() < 1e-6, "found {found}, expected {expected}");
    }
    assert!((value[15] + 0.9609093).abs() < 1e-6 || (value[14] + 0.9609093).abs() < 1e-6, "{value:?}");
}

/// What is said about a head over the tiny OPT.
fn said(head: &str) -> String {
    let mut documents = Documents::default();
    let recipe = recipe(&mut documents, SCORES);
    let (functions, opt) = (documents.std_functions(), documents.std_model("opt"));
    let Document::Model(head) = documents.read("head.yaml", head) else { panic!("no model") };
    let role = role_over("critic", &head, (&opt, &tiny()), &functions);
    told(&documents, lower::program(&request(&recipe, &functions, vec![role])))
}

fn told(documents: &Documents, lowered: Result<Lowered, Vec<Diag>>) -> String {
    match lowered {
        Ok(_) => "nothing is wrong".into(),
        Err(diags) => render(&diags, &documents.sources, Look::Plain),
    }
}

/// A head like the library's.
pub const HEAD: &str = "\
model: head
models: {trunk: any}
params:
  score.weight: [1, trunk.hidden.size]
graph:
  in: {tokens: \"i32[B, T]\", segment: \"i32[B, T]\"}
  let:
    - scores: linear(trunk(tokens, segment).hidden, score)
  out: {value: \"scores[:, :, 0]\"}
";

#[test]
fn mistakes_in_heads_are_told_in_the_head() {
    assert_eq!(said(HEAD), "nothing is wrong");
    let typo = said(&HEAD.replace("[1, trunk.hidden.size]", "[1, trunk.hiden.size]"));
    assert!(typo.contains("found `.hiden`, expected one of `logits` and `hidden`"), "{typo}");
    assert!(typo.contains("write `.hidden`") && typo.contains("head.yaml:4"), "{typo}");
    let twice = said(&HEAD.replace("score.weight:", "model.decoder.final_layer_norm.weight:"));
    assert!(twice.contains("the parameter `model.decoder.final_layer_norm.weight` is declared twice"), "{twice}");
    let arguments = said(&HEAD.replace("trunk(tokens, segment)", "trunk(tokens)"));
    assert!(arguments.contains("misses its input `segment`"), "{arguments}");
    let shadowed = said(&HEAD.replace("- scores:", "- trunk:").replace("scores[", "trunk["));
    assert!(shadowed.contains("`trunk` has two meanings"), "{shadowed}");
    let wide = said(&HEAD.replace("[1, trunk.hidden.size]", "[1, 2 * trunk.hidden.size]"));
    assert!(wide.contains("found 16 features, expected 32"), "{wide}");
}

#[test]
fn a_head_stands_over_one_model_that_is_none() {
    let mut documents = Documents::default();
    let recipe = recipe(&mut documents, SCORES);
    let (functions, head) = (documents.std_functions(), documents.std_model("value"));
    let alone = role("critic", &head, &functions, &[], true);
    let said = told(&documents, lower::program(&request(&recipe, &functions, vec![alone])));
    assert!(said.contains("found `value` alone, expected it over another model"), "{said}");
    let twice = role_over("critic", &head, (&head, &[]), &functions);
    let said = told(&documents, lower::program(&request(&recipe, &functions, vec![twice])));
    assert!(said.contains("found a model over `value`, which is built upon a model itself"), "{said}");
    // What is wrong is said once, not again where it is called.
    assert_eq!(said.matches("error").count(), 1, "{said}");
}

/// A mistake in the trunk is told there, and nowhere else.
#[test]
fn a_broken_trunk_makes_no_mistakes_of_the_head() {
    let mut documents = Documents::default();
    let recipe = recipe(&mut documents, SCORES);
    let (functions, head) = (documents.std_functions(), documents.std_model("value"));
    const TRUNK: &str = "\
model: broken
params:
  embed.weight: [4, 8]
graph:
  in: {tokens: \"i32[B, T]\", segment: \"i32[B, T]\"}
  out: {hidden: \"embed(tokens, embde)\"}
";
    let Document::Model(trunk) = documents.read("trunk.yaml", TRUNK) else { panic!("no model") };
    let trunk: Model = *trunk;
    let role = role_over("critic", &head, (&trunk, &[]), &functions);
    let said = told(&documents, lower::program(&request(&recipe, &functions, vec![role])));
    assert!(said.contains("`embde` is not defined") && said.matches("error").count() == 1, "{said}");
}
