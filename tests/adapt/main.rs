//! Freezing and LoRA as a user asks for them: what stays as it is to the bit, what shares memory, what is written, and
//! that every number is the right one.

mod numbers;
mod peft;
#[path = "../common/place.rs"]
mod place;
mod runs;

use place::Place;
use serde_json::Value;

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

impl Place {
    /// A folder with the pipeline, whose first stage has run.
    fn new() -> Place {
        let place = Place::with(PIPELINE);
        place.run("sft", &[]);
        place
    }

    /// Runs a stage with further settings; gives the losses of its steps.
    fn run(&self, stage: &str, sets: &[&str]) -> Vec<f64> {
        let sets: Vec<String> = sets.iter().map(|set| format!("stages.{stage}.{set}")).collect();
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        self.out(&["run", "pipeline.yaml", "--stage", stage], &sets);
        self.steps(stage).iter().map(|line| line["loss"].as_f64().expect("a loss")).collect()
    }

    /// The report of the preference stage.
    fn report(&self, sets: &[&str]) -> Value {
        self.report_of("dpo", sets)
    }

    /// The report of a compiled stage.
    fn report_of(&self, stage: &str, sets: &[&str]) -> Value {
        let sets: Vec<String> = sets.iter().map(|set| format!("stages.{stage}.{set}")).collect();
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let text = self.out(&["compile", "pipeline.yaml", "--stage", stage, "--json"], &sets);
        serde_json::from_str::<Value>(&text).expect("JSON")[0].clone()
    }
}

/// LoRA on queries and values.
const LORA: [&str; 4] = ["lora_r=2", "lora_alpha=4", "lora_target_modules=[q_proj, v_proj]", "learning_rate=5e-2"];
