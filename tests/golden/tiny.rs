//! Models that are small enough to be written down: every parameter is a sine of its place. Their losses before and after
//! an optimizer step, end scores, greedy answers and experience are those of DeepSpeed-Chat's functions on PyTorch (single
//! precision, so the numbers are good to seven digits).

use std::path::Path;

use dsgc_ir::{Bindings, Program, Tensor};
use dsgc_yaml::load::{Options, load};

use super::compare::On;
use super::compare::rlhf::{Stage, Values};
use super::text::Text;

const PIPELINE: &str = "
dsgc: 1
models:
  opt: {model: opt, tokenizer: tok, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 32}}
  llama:
    model: llama
    tokenizer: tok
    config: {hidden: 16, layers: 2, heads: 4, kv_heads: 2, head_dim: 4, ffn: 24, max_positions: 32, eps: 1e-5, tied: false}
data:
  rows: {path: rows.jsonl}
defaults:
  lr_scheduler_type: constant
  learning_rate: 1e-2
stages:
  text: {recipe: sft, model: llama, data: rows, batch_size: 2, max_length: 8}
  reward: {reward: opt, data: rows, batch_size: 2, max_length: 8, num_padding_at_beginning: 1}
  ppo:
    actor: {model: opt, learning_rate: 1e-2, warmup_steps: 0}
    critic: {model: opt, learning_rate: 1e-2, warmup_steps: 0}
    data: rows
    batch_size: 2
    minibatch_size: 2
    max_prompt_len: 6
    max_new_tokens: 4
    greedy: true
";

/// A stage whose parameters are sines; `offset` of a role's phase.
fn stage(name: &str, offset: impl Fn(&str) -> f64) -> Stage {
    let options = Options { stage: Some(name.into()), ..Options::default() };
    let files = Text { pipeline: PIPELINE.into(), columns: &["prompt", "chosen", "rejected"] };
    let loaded = load(Path::new("p.yaml"), &options, &files).unwrap_or_else(|e| panic!("{:#?}", e.diags));
    let [program] = <[Program; 1]>::try_from(loaded.stages).expect("one stage is asked for");
    let (program, mut device) = On::Doubles.open(program);
    for role in &program.stage.roles {
        let mut params: Vec<_> = program.params_of(&role.name).collect();
        params.sort_by_key(|(_, name)| order(name));
        for (p, (id, name)) in params.into_iter().enumerate() {
            let shape = program.state(id).ty.shape(&Bindings::new()).expect("parameters have constant dims");
            let one = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
            let value = |k: usize| {
                let at = 0.7 * k as f64 + 1.9 * p as f64 + 0.3 + offset(&role.name);
                f64::from((0.1 * at.sin() + one) as f32)
            };
            device.set_state(id, &Tensor::f64(&shape, (0..shape.iter().product()).map(value).collect()));
        }
    }
    if let Some(init) = &program.stage.init {
        device.run(init, &[]).expect("states have first values");
    }
    Stage::new(program, device, On::Doubles.member())
}

/// Where a parameter stands among those of its model: a head of values first; of a Llama, the norms of each layer after
/// its products, and the last norm and the head last. The rest is as the documents declare it.
fn order(name: &str) -> (usize, usize, bool) {
    match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => (2, layer.parse().expect("a number"), rest.ends_with("layernorm.weight")),
        None if name == "score.weight" => (0, 0, false),
        None if ["model.norm.weight", "lm_head.weight"].contains(&name) => (3, 0, false),
        None => (1, 0, false),
    }
}

/// Tokens, and a segment of 1 on so many places of each row.
fn sequence(prefix: &str, tokens: &[[i32; 8]], lengths: &[usize]) -> Values {
    let rows = tokens.len();
    let at = |n: &usize| (0..8).map(|t| t < *n).collect::<Vec<bool>>();
    let text: Vec<bool> = lengths.iter().flat_map(at).collect();
    Values::from([
        (format!("{prefix}.tokens"), Tensor::i32(&[rows, 8], tokens.concat())),
        (format!("{prefix}.segment"), Tensor::i32(&[rows, 8], text.iter().map(|t| i32::from(*t)).collect())),
        (format!("{prefix}.trained"), Tensor::bool(&[rows, 8], text)),
    ])
}

#[track_caller]
fn near(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() < 1e-6, "found {found:?}, expected {expected:?}");
    }
}

/// Numbers of a result by name.
fn scalars<const N: usize>(values: &Values, names: [&str; N]) -> [f64; N] {
    names.map(|name| values.get(name).unwrap_or_else(|| panic!("no `{name}` in {:?}", values.keys())).scalar())
}

#[test]
fn the_tiny_reward_model_has_its_loss_and_end_scores() {
    let mut stage = stage("reward", |_| 0.0);
    let chosen = [[2, 5, 6, 7, 8, 9, 2, 2], [2, 11, 12, 13, 14, 15, 16, 17]];
    let rejected = [[2, 5, 6, 10, 2, 2, 2, 2], [2, 11, 12, 13, 18, 19, 2, 2]];
    let mut batch = sequence("batch.chosen", &chosen, &[7, 8]);
    batch.extend(sequence("batch.rejected", &rejected, &[5, 7]));
    let step = stage.step(&stage.update("reward"), &batch, 1e-2);
    let found = scalars(&step, ["loss", "chosen_score", "rejected_score"]);
    near(&found, &[0.699480057, (-0.6224374 - 0.9609093) / 2.0, (-0.7428112 - 0.3907568) / 2.0]);
}

#[test]
fn the_tiny_actor_answers_as_it_should() {
    let mut stage = stage("ppo", |_| 0.0);
    let tokens = Tensor::i32(&[2, 6], vec![2, 2, 2, 5, 6, 7, 2, 2, 11, 12, 13, 14]);
    let segment = Tensor::i32(&[2, 6], vec![0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]);
    let (rows, _) = stage.decode(&tokens, &segment).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!([&rows[0][6..], &rows[1][6..]], [[13, 18, 18, 4], [18, 18, 13, 13]]);
}

#[test]
fn the_tiny_models_have_their_experience_and_two_steps_of_ppo() {
    let mut stage = stage("ppo", |role| match role {
        "ref" => 0.05,
        "reward" => 0.4,
        _ => 0.0,
    });
    let tokens = vec![2, 2, 2, 5, 6, 7, 8, 9, 2, 2, 2, 2, 11, 12, 13, 14, 15, 16, 17, 18];
    let mut values = Values::from([
        ("rollout.tokens".to_string(), Tensor::i32(&[2, 10], tokens)),
        ("rollout.answer".to_string(), Tensor::bool(&[2, 4], vec![true; 8])),
    ]);
    let call = stage.call();
    let made = stage.run(&call, &values);
    near(&[made["reward"].scalar()], &[(-0.7877132 - 0.9856721) / 2.0]);
    // At places of the answer, and one behind it.
    let at = |name: &str, places: &[usize]| -> Vec<f64> {
        let all = made[&format!("rows.{name}")].to_f64();
        places.iter().map(|p| all[*p]).collect()
    };
    let (action, live) = ([0, 1, 4, 5, 6, 7], [0, 1, 2, 4, 5, 6, 7]);
    let logp = [-2.608657, -2.714552, -4.208156, -4.301228, -3.076367, -2.781111];
    near(&at("old_logp", &action), &logp);
    let value = [-0.7286036, -0.969299, -0.7667763, -0.821511, -0.5695757, -0.457837, -0.8323857];
    near(&at("old_value", &live), &value);
    let advantage = [-0.0679248, 0.182523, -0.02112699, -0.1109461, -0.3825639, -0.5201685, -0.1534346];
    near(&at("advantage", &live), &advantage);
    for (name, tensor) in &made {
        if let Some(member) = name.strip_prefix("rows.") {
            values.insert(format!("mini.{member}"), tensor.clone());
        }
    }
    let (actor, critic) = (stage.update("actor"), stage.update("critic"));
    let mut step = |role: &_| scalars(&stage.step(role, &values, 1e-2), ["loss", "grad_norm"]);
    near(&step(&actor), &[0.175419167, 0.74196910]);
    near(&step(&critic), &[0.0408925153, 0.94714345]);
    near(&step(&actor)[..1], &[0.130650595]);
    near(&step(&critic)[..1], &[0.0401653461]);
}

#[test]
fn the_tiny_llama_has_its_loss() {
    let mut stage = stage("text", |_| 0.0);
    let rows = [[1, 5, 6, 7, 8, 9, 2, 0], [1, 11, 12, 13, 14, 15, 16, 17]];
    let step = stage.step(&stage.update("model"), &sequence("batch.text", &rows, &[7, 8]), 1e-2);
    near(&scalars(&step, ["loss"]), &[3.03201413]);
}
