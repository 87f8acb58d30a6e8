//! Freezing and LoRA as a user asks for them: what stays as it is to the bit, what shares memory, what is written, and
//! that every number is the right one.

mod numbers;
mod runs;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

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

    fn command(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_dsgc")).current_dir(&self.0).args(args).output().expect("dsgc runs")
    }

    /// What a command prints.
    fn out(&self, args: &[&str]) -> String {
        let ran = self.command(args);
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

/// LoRA on queries and values.
const LORA: [&str; 4] = ["lora_r=2", "lora_alpha=4", "lora_target_modules=[q_proj, v_proj]", "learning_rate=5e-2"];
