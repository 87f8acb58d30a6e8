//! Freezing as a user asks for it: what stays as it is to the bit, what shares memory, and that every number is the one
//! that it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use dsgc_ir::Tensor;
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

/// A model from random weights, and preferences on it. OPT's head is the embedding.
const PIPELINE: &str = "
dsgc: 1
output_dir: runs
seed: 5
models:
  base:
    model: opt
    tokenizer: TOKENIZER
    config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 48}
data:
  prefs: {path: rows.jsonl}
stages:
  sft:
    model: base
    data: prefs
    batch_size: 4
    max_length: 40
    max_steps: 1
    learning_rate: 1e-3
  dpo:
    policy: sft
    data: prefs
    batch_size: 4
    max_length: 40
    num_epochs: 2
    learning_rate: 1e-2
    lr_scheduler_type: constant
    beta: 0.5
    logging_steps: 1
";

/// A folder with the pipeline, whose first stage has run.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().expect("a temporary folder"));
        let tokenizer = format!("{}/examples/rlhf/tokenizer", env!("CARGO_MANIFEST_DIR"));
        let rows =
            (0..8).map(|i| format!("{{\"prompt\": \"Is it {i}?\", \"chosen\": \" Yes.\", \"rejected\": \" {i}\"}}\n"));
        fs::write(place.path("pipeline.yaml"), PIPELINE.replace("TOKENIZER", &tokenizer)).expect("a new file");
        fs::write(place.path("rows.jsonl"), rows.collect::<String>()).expect("a new file");
        place.run("sft", &[]);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What a command prints.
    fn out(&self, args: &[&str]) -> String {
        let ran = Command::new(env!("CARGO_BIN_EXE_dsgc")).current_dir(&self.0).args(args).output().expect("dsgc runs");
        assert!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).into_owned()
    }

    /// Runs a stage with further settings; gives the losses of its steps.
    fn run(&self, stage: &str, sets: &[&str]) -> Vec<f64> {
        let sets: Vec<String> = sets.iter().map(|set| format!("stages.{stage}.{set}")).collect();
        let sets = sets.iter().flat_map(|set| ["--set", set.as_str()]);
        self.out(&["run", "pipeline.yaml", "--stage", stage].into_iter().chain(sets).collect::<Vec<_>>());
        let metrics = fs::read_to_string(self.path(&format!("runs/{stage}/metrics.jsonl"))).expect("metrics");
        let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).expect("an object"));
        lines.filter(|line| line.get("epoch").is_some()).map(|line| line["loss"].as_f64().expect("a loss")).collect()
    }

    /// The report of a compiled stage.
    fn report(&self, sets: &[&str]) -> Value {
        let sets: Vec<String> = sets.iter().map(|set| format!("stages.dpo.{set}")).collect();
        let sets = sets.iter().flat_map(|set| ["--set", set.as_str()]);
        let args = ["compile", "pipeline.yaml", "--stage", "dpo", "--json"];
        let text = self.out(&args.into_iter().chain(sets).collect::<Vec<_>>());
        serde_json::from_str::<Value>(&text).expect("JSON")[0].clone()
    }

    /// The tensors of a file.
    fn tensors(&self, file: &str) -> BTreeMap<String, Tensor> {
        let bytes = fs::read(self.path(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let read = SafeTensors::deserialize(&bytes).expect("safetensors");
        let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        read.tensors().into_iter().map(|(name, t)| (name, Tensor::f32(t.shape(), floats(t.data())))).collect()
    }
}

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

/// LoRA on queries and values.
const LORA: [&str; 4] = ["lora_r=2", "lora_alpha=4", "lora_target_modules=[q_proj, v_proj]", "learning_rate=5e-2"];

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
    let score = |model: &str| place.out(&["score", model, "--input", "texts.jsonl"]);
    assert_eq!(score("runs/dpo"), score("runs/dpo/adapter"));
    assert_ne!(score("runs/dpo"), score("runs/sft"));
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
        {"role": "policy", "trained": factors, "frozen": model, "shared": 0},
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
    let sets: Vec<String> = LORA.iter().chain(&["lora_save=adapter"]).map(|set| format!("stages.dpo.{set}")).collect();
    let args = ["run", "pipeline.yaml"].into_iter().chain(sets.iter().flat_map(|set| ["--set", set.as_str()]));
    place.out(&args.collect::<Vec<_>>());
    assert!(!place.path("runs/dpo/model.safetensors").exists());
    let metrics = fs::read_to_string(place.path("runs/more/metrics.jsonl")).expect("metrics");
    let step = metrics.lines().map(|line| serde_json::from_str::<Value>(line).expect("an object"));
    let step = step.filter(|line| line.get("epoch").is_some()).last().expect("a step");
    assert_eq!(step["loss"].as_f64(), merged.last().copied());
}
