//! Pipelines that run from strings, as users run them.

use std::collections::BTreeMap;
use std::fs;

use dsgc_ir::Tensor;
use serde_json::Value;

use super::{LORA, Place};

/// Names of the tensors that differ.
fn changed(before: &BTreeMap<String, Tensor>, after: &BTreeMap<String, Tensor>) -> Vec<String> {
    assert!(before.keys().eq(after.keys()), "{:?} and {:?}", before.keys(), after.keys());
    before.iter().filter(|(name, tensor)| after[*name] != **tensor).map(|(name, _)| name.clone()).collect()
}

#[test]
fn what_is_frozen_is_written_as_it_was() {
    let place = Place::new();
    let before = place.tensors("runs/sft/model.safetensors");
    let freeze = "freeze=[model.decoder.embed*, 'model.decoder.layers.0.*']";
    let losses = place.run("dpo", &[freeze]);
    assert!(losses[3] < losses[0], "{losses:?}");
    let changed = changed(&before, &place.tensors("runs/dpo/model.safetensors"));
    // The head is the embedding: it is one parameter, and frozen. Keys have a bias that no gradient reaches in theory.
    let trained: Vec<&String> =
        before.keys().filter(|name| !name.contains("embed") && !name.contains("layers.0.")).collect();
    assert!(changed.iter().all(|name| trained.contains(&name)), "{changed:?}");
    assert!(trained.len() - changed.len() <= 1, "{changed:?} of {trained:?}");
    // Whether all of a batch is one call or not.
    for (whole, cut) in losses.iter().zip(place.run("dpo", &[freeze, "micro_batch_size=1"])) {
        assert!((whole - cut).abs() < 1e-6, "{whole} and {cut}");
    }
}

#[test]
fn what_is_frozen_has_no_state_and_is_shared_with_the_reference() {
    let place = Place::new();
    let (all, some) = (place.report(&[]), place.report(&["freeze=[model.decoder.embed*]"]));
    let embeddings = 640 * 16 + 50 * 16;
    let count = |report: &Value, role: usize, what: &str| report["roles"][role][what].as_u64().expect("a number");
    let model = count(&all, 0, "trained");
    assert_eq!((count(&all, 1, "frozen"), count(&all, 1, "shared")), (model, 0));
    assert_eq!((count(&some, 0, "trained"), count(&some, 0, "frozen")), (model - embeddings, embeddings));
    assert_eq!((count(&some, 1, "frozen"), count(&some, 1, "shared")), (model - embeddings, embeddings));
    // Both moments, and the copy of the reference.
    let memory = |report: &Value, what: &str| report["memory"][what].as_u64().expect("bytes");
    assert_eq!(memory(&all, "persistent") - memory(&some, "persistent"), 3 * 4 * embeddings);
    assert!(memory(&some, "peak") < memory(&all, "peak") - 3 * 4 * embeddings);
}

#[test]
fn lora_trains_factors_only_and_leaves_a_merged_model() {
    let place = Place::new();
    let before = place.tensors("runs/sft/model.safetensors");
    let losses = place.run("dpo", &LORA);
    assert!(losses[3] < losses[0], "{losses:?}");
    let merged = place.tensors("runs/dpo/model.safetensors");
    let targets: Vec<&String> =
        before.keys().filter(|name| name.ends_with("q_proj.weight") || name.ends_with("v_proj.weight")).collect();
    assert_eq!(changed(&before, &merged).iter().collect::<Vec<_>>(), targets);
    let factors = place.tensors("runs/dpo/adapter/adapter_model.safetensors");
    assert_eq!(factors.len(), 2 * targets.len());
    let name = "base_model.model.model.decoder.layers.1.self_attn.q_proj.lora_B.weight";
    assert_eq!(factors[name].shape, [16, 2]);
    assert!(factors[name].to_f64().iter().all(|&x| x != 0.0));

    let config = fs::read_to_string(place.path("runs/dpo/adapter/adapter_config.json")).expect("a file");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["target_modules"], serde_json::json!(["q_proj", "v_proj"]));
    assert_eq!((&config["base_model_name_or_path"], &config["r"]), (&"runs/sft".into(), &2.into()));

    // An adapter is a model like any other.
    fs::write(place.path("texts.jsonl"), "{\"text\": \"Is it 3? Yes.\"}\n").expect("a new file");
    let score = |model: &str| place.out(&["score", model, "--input", "texts.jsonl"], &[]);
    assert_eq!(score("runs/dpo"), score("runs/dpo/adapter"));
    assert_ne!(score("runs/dpo"), score("runs/sft"));
    place.out(&["merge", "runs/dpo/adapter", "runs/merged"], &[]);
    assert_eq!(place.tensors("runs/merged/model.safetensors"), merged);
    assert_eq!(score("runs/merged"), score("runs/dpo"));
    // Micro-batches change no number, with fewer roundings in common.
    for (whole, cut) in losses.iter().zip(place.run("dpo", &[&LORA[..], &["micro_batch_size=1"]].concat())) {
        assert!((whole - cut).abs() < 1e-5, "{whole} and {cut}");
    }
}

#[test]
fn the_reference_of_lora_is_free() {
    let place = Place::new();
    let (all, lora) = (place.report(&[]), place.report(&LORA));
    let model = all["roles"][0]["trained"].as_u64().expect("a number");
    let factors = 2 * 2 * (2 * 16 + 16 * 2);
    let roles = serde_json::json!([
        {"role": "policy", "trained": factors, "frozen": model, "shared": 0, "lora": {"rank": 2, "weights": 4}},
        {"role": "ref", "trained": 0, "frozen": 0, "shared": model},
    ]);
    assert_eq!(lora["roles"], roles);
    let memory = |report: &Value, what: &str| report["memory"][what].as_u64().expect("bytes");
    // One model instead of a model, its moments and its reference; and factors with their moments.
    let padding = 64 * 6 * 8;
    assert!(memory(&lora, "persistent") <= 4 * (model + 3 * factors) + padding, "{lora}");
    assert!(memory(&all, "persistent") >= 4 * 4 * model, "{all}");
    assert!(memory(&lora, "peak") < memory(&all, "peak") - 4 * 2 * model);
}

#[test]
fn a_stage_goes_on_from_an_adapter_alone() {
    let place = Place::new();
    let text = fs::read_to_string(place.path("pipeline.yaml")).expect("a file");
    let more = "  more: {recipe: sft, model: dpo, data: prefs, batch_size: 4, max_length: 40, max_steps: 1}\n";
    fs::write(place.path("pipeline.yaml"), format!("{text}{more}")).expect("a file");
    place.run("dpo", &LORA);
    let merged = place.run("more", &[]);
    fs::remove_file(place.path("runs/dpo/model.safetensors")).expect("it was there");
    fs::remove_file(place.path("runs/dpo/config.json")).expect("it was there");
    let all: Vec<String> = LORA.iter().chain(&["lora_save=adapter"]).map(|set| format!("stages.dpo.{set}")).collect();
    let sets = || all.iter().flat_map(|set| ["--set", set.as_str()]);
    place.out(&["run", "pipeline.yaml"].into_iter().chain(sets()).collect::<Vec<_>>(), &[]);
    assert!(!place.path("runs/dpo/model.safetensors").exists());
    let metrics = fs::read_to_string(place.path("runs/more/metrics.jsonl")).expect("metrics");
    let mut step = metrics.lines().map(|line| serde_json::from_str::<Value>(line).expect("an object"));
    let step = step.rfind(|line| line.get("epoch").is_some()).expect("a step");
    assert_eq!(step["loss"].as_f64(), merged.last().copied());
    // An adapter to an adapter is nothing that others could load.
    let twice = ["--set", "stages.more.lora_r=2", "--stage", "more"];
    let ran = place.command(&["run", "pipeline.yaml"].into_iter().chain(twice).chain(sets()).collect::<Vec<_>>());
    let told = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(told.contains("would have another adapter as its base") && told.contains("lora_save: merged"), "{told}");
}

#[test]
fn ppo_trains_factors_of_two_models_and_averages_one() {
    let place = Place::new();
    let text = fs::read_to_string(place.path("pipeline.yaml")).expect("a file");
    let more = "
  reward: {reward: sft, data: prefs, batch_size: 4, max_length: 40, max_steps: 2, lora_r: 2, learning_rate: 1e-2}
  ppo:
    actor: sft
    critic: reward
    data: prefs
    batch_size: 4
    minibatch_size: 2
    max_prompt_len: 16
    max_new_tokens: 4
    max_steps: 1
    enable_ema: true
    ema_decay: 0.5
    warmup_steps: 0
    learning_rate: 1e-2
    lora_r: 2
";
    fs::write(place.path("pipeline.yaml"), text + more).expect("a file");
    place.out(&["run", "pipeline.yaml", "--stage", "reward"], &[]);
    // The head is new: it is trained as a whole, beside the factors.
    let adapter = place.tensors("runs/reward/adapter/adapter_model.safetensors");
    assert!(adapter.contains_key("base_model.model.score.weight"), "{:?}", adapter.keys());
    assert_eq!(adapter.len(), 2 * 2 * 6 + 1);

    place.out(&["run", "pipeline.yaml", "--stage", "ppo"], &[]);
    let [before, actor, ema] =
        ["sft", "ppo/actor", "ppo/ema"].map(|f| place.tensors(&format!("runs/{f}/model.safetensors")));
    let [q, embed] = ["layers.0.self_attn.q_proj.weight", "embed_tokens.weight"].map(|n| format!("model.decoder.{n}"));
    assert_eq!(before[&embed], actor[&embed]);
    assert_ne!(before[&q], actor[&q]);
    // Two optimizer steps: the average has seen half of the last and a quarter of the first, all merged.
    assert_ne!(before[&q], ema[&q]);
    let far = |a: &Tensor, b: &Tensor| -> f64 { a.to_f64().iter().zip(b.to_f64()).map(|(a, b)| (a - b).abs()).sum() };
    assert!(far(&before[&q], &ema[&q]) < far(&before[&q], &actor[&q]));
    assert!(place.path("runs/ppo/critic/adapter/adapter_config.json").exists());
    assert!(!place.path("runs/ppo/ema/adapter").exists());
    let report = place.out(&["compile", "pipeline.yaml", "--stage", "ppo"], &[]);
    let model: usize = before.values().map(Tensor::len).sum();
    let line = |role: &str| {
        let line = report.lines().find(|line| line.trim_start().starts_with(role));
        line.unwrap_or_else(|| panic!("{report}")).replace(',', "")
    };
    assert!(line("ref ").ends_with(&format!("{model} shared")), "{report}");
    // The head of the critic is trained, so the reward model has its own.
    assert!(line("reward ").ends_with(&format!("16 frozen {model} shared")), "{report}");
}

#[test]
fn dropout_of_a_users_model_is_live_in_updates_only() {
    let place = Place::new();
    let plain = place.out(&["std", "show", "opt"], &[]);
    let line = "y: mid + linear(activation(linear(g, fc1)), fc2)";
    assert!(plain.contains(line), "{plain}");
    let with = plain.replace(line, "y: mid + dropout(linear(activation(linear(g, fc1)), fc2), 0.5)");
    let text = fs::read_to_string(place.path("pipeline.yaml")).expect("a file");
    let text = text.replace("model: opt", "model: ./mine.yaml").replace("rows.jsonl}", "rows.jsonl, eval: 0.5}");
    fs::write(place.path("pipeline.yaml"), text).expect("a file");
    let lines = |micro: &str| -> Vec<Value> {
        place.run("sft", &["learning_rate=0", "max_steps=none", "num_epochs=2", "logging_steps=1", micro]);
        let metrics = fs::read_to_string(place.path("runs/sft/metrics.jsonl")).expect("metrics");
        metrics.lines().map(|line| serde_json::from_str(line).expect("an object")).collect()
    };
    let numbers = |lines: &[Value], step: bool| -> Vec<f64> {
        let lines = lines.iter().filter(|line| line.get("epoch").is_some() == step);
        lines.map(|line| line["loss"].as_f64().or(line["eval/loss"].as_f64()).expect("a loss")).collect()
    };
    fs::write(place.path("mine.yaml"), plain).expect("a file");
    let without = lines("micro_batch_size=4");
    fs::write(place.path("mine.yaml"), with).expect("a file");
    let (whole, cut) = (lines("micro_batch_size=4"), lines("micro_batch_size=1"));
    assert_eq!(numbers(&without, false), numbers(&whole, false), "held-out rows see the whole model");
    assert_eq!(numbers(&whole, false).len(), 2);
    let [without, whole, cut] = [without, whole, cut].map(|lines| numbers(&lines, true));
    assert_eq!(without.len(), 2);
    for ((without, whole), cut) in without.iter().zip(&whole).zip(&cut) {
        assert!((without - whole).abs() > 1e-4, "{without} and {whole}");
        assert!((whole - cut).abs() < 1e-5, "{whole} and {cut}");
    }
    // The same rows and weights in another step: other elements are left out.
    assert!((without[0] - without[1]).abs() < 1e-6 && (whole[0] - whole[1]).abs() > 1e-6, "{without:?} {whole:?}");
}

/// A second preference stage on the adapter that the first one leaves.
fn with_more(place: &Place) {
    let text = fs::read_to_string(place.path("pipeline.yaml")).expect("a file");
    let dpo = text.split_once("  dpo:\n").expect("it has the stage").1.replace("policy: sft", "policy: dpo");
    let with_factors = text.replace("  dpo:\n", "  dpo:\n    lora_r: 2\n");
    fs::write(place.path("pipeline.yaml"), format!("{with_factors}  more:\n    recipe: dpo\n{dpo}")).expect("a file");
}

#[test]
fn an_adapter_is_trained_further() {
    let place = Place::new();
    place.run("dpo", &LORA);
    with_more(&place);
    let further = [&LORA[..], &["lora_continue=true"]].concat();
    let losses = place.run("more", &further);
    // The reference has the factors too: both are one model at first.
    assert!((losses[0] - 2f64.ln()).abs() < 1e-6, "{losses:?}");
    assert!(losses.last() < losses.first(), "{losses:?}");
    let factors = |stage: &str| place.tensors(&format!("runs/{stage}/adapter/adapter_model.safetensors"));
    let (before, after) = (factors("dpo"), factors("more"));
    assert_eq!(changed(&before, &after).len(), before.len());
    // It is an adapter to the same base, and what it is beside that is the merged model.
    let config = fs::read_to_string(place.path("runs/more/adapter/adapter_config.json")).expect("a file");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["base_model_name_or_path"], "runs/sft");
    place.out(&["merge", "runs/more/adapter", "runs/merged"], &[]);
    let merged = place.tensors("runs/more/model.safetensors");
    assert_eq!(place.tensors("runs/merged/model.safetensors"), merged);
    // What is trained stays near what it began with, and that is not the base: its weights and its reference are apart.
    let report = place.report_of("more", &further);
    let weights = report["roles"][0]["lora"]["weights"].as_u64().expect("a number");
    let model = report["roles"][0]["frozen"].as_u64().expect("a number");
    assert_eq!(report["roles"][1]["shared"].as_u64(), Some(model - weights * 16 * 16));
}

#[test]
fn an_adapter_that_does_not_fit_is_an_error() {
    let place = Place::new();
    place.run("dpo", &LORA);
    with_more(&place);
    let said = |set: &str| {
        let all = LORA.into_iter().chain(["lora_continue=true", set]);
        let sets: Vec<String> = all.map(|set| format!("stages.more.{set}")).collect();
        let sets = sets.iter().flat_map(|set| ["--set", set.as_str()]);
        let ran =
            place.command(&["run", "pipeline.yaml", "--stage", "more"].into_iter().chain(sets).collect::<Vec<_>>());
        assert_eq!(ran.status.code(), Some(1), "{set}");
        String::from_utf8_lossy(&ran.stderr).into_owned()
    };
    for (set, expected) in [
        ("lora_r=4", "the adapter in `runs/dpo/adapter` has 2 as `r`, expected 4"),
        ("lora_alpha=8", "has 4 as `lora_alpha`, expected 8"),
        ("lora_target_modules=[q_proj]", "v_proj.lora_A.weight`, which nothing here trains further"),
        ("lora_target_modules=[q_proj, k_proj, v_proj]", "k_proj.lora_A.weight`"),
        ("policy=sft", "`lora_continue` for a model in `runs/sft`, whose stage leaves no adapter"),
    ] {
        let said = said(set);
        assert!(said.contains(expected), "{set}: {said}");
    }
}
