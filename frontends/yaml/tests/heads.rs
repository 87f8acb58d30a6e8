//! Roles of type `value`: a head of the library over whatever model they are bound to.

mod common;

use std::path::Path;

use common::{Machine, TINY, machine};
use dsgc_ir::Program;
use dsgc_ir::stage::Origin;
use dsgc_ir::verify::verify;
use dsgc_yaml::load::{Options, check, load};
use dsgc_yaml::render::{Look, render};
use serde_json::json;

const RECIPE: &str = "\
recipe: rank
extends: sft
models:
  model: {type: value, trained: true}
  old: {snapshot: model}
graphs:
  loss:
    in: {text: \"sequence[B, T]\"}
    out: {loss: \"mean((model(text) - old(text)) ** 2, where=text.trained)\"}
";

const PIPELINE: &str = "\
dsgc: 1
models:
  base: tiny
data:
  chats: {path: texts.jsonl}
stages:
  rank:
    recipe: ./rank.yaml
    model: base
    data: chats
    max_length: 32
    batch_size: 8
    learning_rate: 1e-3
  again:
    recipe: ./rank.yaml
    model: rank
    data: chats
    max_length: 32
    batch_size: 8
    learning_rate: 1e-3
";

fn programs(machine: Machine, pipeline: &str) -> Result<Vec<Program>, String> {
    let machine = machine.with("rank.yaml", RECIPE).with("pipeline.yaml", pipeline);
    match load(Path::new("pipeline.yaml"), &Options::default(), &machine) {
        Ok(loaded) => {
            for program in &loaded.stages {
                verify(program).unwrap_or_else(|e| panic!("{e}\n{program}"));
            }
            Ok(loaded.stages)
        }
        Err(failed) => Err(render(&failed.diags, &failed.sources, Look::Plain)),
    }
}

#[test]
fn a_value_model_is_a_head_over_what_it_is_bound_to() {
    let programs = programs(machine(), PIPELINE).unwrap_or_else(|e| panic!("{e}"));
    let [first, second] = &programs[..] else { panic!("two stages") };
    for (program, origin) in
        [(first, Origin::Folder("tiny".into())), (second, Origin::Stage("runs/pipeline/rank".into()))]
    {
        let role = &program.stage.roles[0];
        assert_eq!((&role.origin, role.model.family.as_str()), (&origin, "value"));
        assert_eq!(role.model.config["architectures"], json!(["OPTForSequenceClassification"]));
        assert_eq!((&role.model.config["num_labels"], &role.model.config["hidden_size"]), (&json!(1), &json!(8)));
        assert_eq!(role.model.tensors.may_be_new, ["score.weight"]);
        assert_eq!(role.model.tensors.may_be_left, [] as [&str; 0]);
        assert!(program.state_named("model/score.weight").is_some());
        assert_eq!(program.params_of("model").count(), program.params_of("old").count());
    }
}

#[test]
fn an_untied_head_of_the_language_model_may_be_left_over() {
    let untied = TINY.replace("\"dropout\": 0.1", "\"tie_word_embeddings\": false");
    let programs = programs(machine().with("tiny/config.json", &untied), PIPELINE).unwrap_or_else(|e| panic!("{e}"));
    for role in &programs[0].stage.roles {
        assert_eq!(role.model.tensors.may_be_left, ["lm_head.weight"]);
    }
    assert!(programs[0].state_named("model/lm_head.weight").is_none());
}

#[test]
fn what_a_role_needs_must_be_there() {
    let second = "  again:\n    recipe: sft\n";
    let pipeline = PIPELINE.replace("  again:\n    recipe: ./rank.yaml\n", second);
    let said = programs(machine(), &pipeline).expect_err("a reward model is no language model");
    assert!(said.contains("role `model` needs a model with the output `logits`"), "{said}");
    assert!(said.contains("`value` has none"), "{said}");
    let typed = RECIPE.replace("type: value", "type: opt");
    let said = {
        let machine = machine().with("rank.yaml", &typed).with("pipeline.yaml", PIPELINE);
        let failed = load(Path::new("pipeline.yaml"), &Options::default(), &machine).expect_err("no such type");
        render(&failed.diags, &failed.sources, Look::Plain)
    };
    assert!(said.contains("found the type `opt`, expected `causal_lm`, `value` or `any`"), "{said}");
}

/// A head, and a recipe with one, are checked over a small model of the library.
#[test]
fn heads_are_checked_by_themselves() {
    const HEAD: &str = "\
model: head
models: {body: any}
params:
  score.weight: [2, body.hidden.size]
graph:
  in: {tokens: \"i32[B, T]\", segment: \"i32[B, T]\"}
  out: {scores: \"linear(body(tokens, segment).hidden, score)\"}
";
    let said = |name: &str, text: &str| match check(Path::new(name), &Options::default(), &machine().with(name, text)) {
        Ok(loaded) => render(&loaded.warnings, &loaded.sources, Look::Plain),
        Err(failed) => render(&failed.diags, &failed.sources, Look::Plain),
    };
    assert_eq!(said("head.yaml", HEAD), "");
    let wrong = said("head.yaml", &HEAD.replace("body.hidden.size", "body.hiden.size"));
    assert!(wrong.contains("found `.hiden`, expected one of `logits` and `hidden`"), "{wrong}");
    assert_eq!(said("rank.yaml", RECIPE), "");
    let wrong = said("rank.yaml", &RECIPE.replace("old(text)", "old(text).logits"));
    assert!(wrong.contains("found `.logits`, expected one of `value`"), "{wrong}");
}
