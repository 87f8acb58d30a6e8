//! Whole pipelines in mixed precision: generation, PPO with roles of several precisions, and what is written.

use std::fs;

use dsgc_ir::Tensor;

use super::place::Place;

pub const PIPELINE: &str = "
dsgc: 1
output_dir: runs
seed: 5
models:
  base: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 48}}
data:
  prefs: {path: rows.jsonl}
stages:
  sft: {model: base, data: prefs, batch_size: 4, max_length: 40, max_steps: 2, learning_rate: 1e-2}
  reward: {reward: sft, data: prefs, batch_size: 4, max_length: 40, max_steps: 2, learning_rate: 1e-2}
  ppo:
    actor: {model: sft}
    critic: {model: reward}
    data: prefs
    batch_size: 4
    minibatch_size: 2
    max_prompt_len: 16
    max_new_tokens: 6
    max_steps: 2
    save: [actor, critic]
    warmup_steps: 0
    learning_rate: 1e-3
    logging_steps: 1
";

#[test]
fn all_stages_run_in_either_precision() {
    let devices: &[&str] = if cfg!(feature = "wgpu") { &["cpu", "wgpu"] } else { &["cpu"] };
    let cases = devices.iter().flat_map(|device| ["defaults.bf16=true", "defaults.fp16=true"].map(|p| (device, p)));
    for (device, precision) in cases {
        let place = Place::with(PIPELINE);
        place.out(&["run", "pipeline.yaml", "--device", device], &[precision]);
        for step in place.steps("ppo") {
            let loss = step["actor/loss"].as_f64().expect("a loss");
            assert!(loss.is_finite(), "{step}");
            assert_eq!(step.get("actor/loss_scale").is_some(), precision == "defaults.fp16=true", "{step}");
        }
        // What is trained is written in full precision.
        let weights = place.tensors("runs/sft/model.safetensors");
        let narrow = |t: &Tensor| t.clone().rounded(dsgc_ir::DType::Bf16) == *t;
        assert!(weights.iter().any(|(_, t)| !narrow(t)));
        // The actor and its reference are equal at first, whatever is trained.
        let first = &place.steps("ppo")[0];
        assert!(first["kl"].as_f64().is_none_or(|kl| kl.abs() < 1e-6), "{first}");
    }
}

#[test]
fn frozen_roles_are_narrow_alone() {
    let place = Place::with(PIPELINE);
    place.out(&["run", "pipeline.yaml", "--stage", "sft"], &[]);
    place.out(&["run", "pipeline.yaml", "--stage", "reward"], &[]);
    let frozen = ["stages.ppo.ref={bf16: true}", "stages.ppo.reward={bf16: true}"];
    let plain = place.out(&["compile", "pipeline.yaml", "--stage", "ppo"], &[]);
    let report = place.out(&["compile", "pipeline.yaml", "--stage", "ppo"], &frozen);
    let persistent = |report: &str| -> f64 {
        let (_, after) = report.split_once("parameters and state ").expect("the report says it");
        after.split_once(" KiB").expect("in KiB").0.parse().expect("a number")
    };
    // All but the norms' parameters and the value head's bias: half of nearly 31,056 numbers.
    let saved = (persistent(&plain) - persistent(&report)) * 1024.0;
    assert!(saved > 0.95 * 2.0 * 31_056.0 && saved < 2.0 * 31_056.0, "{saved} bytes saved in\n{report}");
    assert!(report.contains("held in bf16 only"), "{report}");
    let line = report.lines().find(|line| line.trim_start().starts_with("ref ")).expect("the report has the role");
    assert!(line.contains("15,520 frozen; changes numbers: computes in bf16, ") && line.ends_with(" saved"), "{line}");
    place.out(&["run", "pipeline.yaml", "--stage", "ppo"], &frozen);
    assert!(place.steps("ppo").iter().all(|step| step["actor/loss"].as_f64().is_some_and(f64::is_finite)));
}

/// What a stage does not change is written as it was read, though it computes with rounded numbers.
#[test]
fn folders_keep_every_digit_of_what_does_not_change() {
    let place = Place::with(PIPELINE);
    place.out(&["run", "pipeline.yaml", "--stage", "sft"], &[]);
    let before = place.tensors("runs/sft/model.safetensors");
    fs::rename(place.path("runs/sft"), place.path("start")).expect("it moves");
    let text = fs::read_to_string(place.path("pipeline.yaml")).expect("a file");
    let text =
        text.replace("data:\n  prefs", "  start: start\ndata:\n  prefs").replace("{model: base,", "{model: start,");
    fs::write(place.path("pipeline.yaml"), text).expect("a file");
    place.out(
        &["run", "pipeline.yaml", "--stage", "sft"],
        &["stages.sft.bf16=true", "stages.sft.freeze=['*fc1*', '*embed*']"],
    );
    let after = place.tensors("runs/sft/model.safetensors");
    assert_eq!(before.len(), after.len());
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let frozen = name.contains("fc1") || name.contains("embed");
        assert_eq!(before == after, frozen, "{name}");
    }
}
