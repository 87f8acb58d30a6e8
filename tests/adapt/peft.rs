//! An adapter that PEFT wrote (`peft/make.py`): PEFT's logits, and its losses and factors when it is trained further.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;

use super::Place;

const PIPELINE: &str = "
dsgc: 1
output_dir: runs
models:
  adapted: adapter
data:
  rows: {path: rows.jsonl, shuffle: none}
stages:
  sft:
    model: adapted
    data: rows
    batch_size: 4
    max_length: 16
    max_steps: 5
    logging_steps: 1
    learning_rate: 1e-2
    lr_scheduler_type: constant
    warmup_steps: 0
    adam_betas: [0.9, 0.95]
    weight_decay: 0.1
    no_decay: []
    max_grad_norm: none
    lora_r: 2
    lora_alpha: 3
    lora_target_modules: [q_proj, fc1]
    lora_continue: true
";

/// The folders of PEFT and transformers, with a pipeline on them.
fn place() -> Place {
    let place = Place::with(PIPELINE);
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adapt/peft");
    for folder in ["base", "adapter"] {
        fs::create_dir(place.path(folder)).expect("a new folder");
        for file in fs::read_dir(from.join(folder)).expect("the references are there") {
            let file = file.expect("a file").path();
            fs::copy(&file, place.path(folder).join(file.file_name().expect("a name"))).expect("a new file");
        }
    }
    fs::copy(from.join("rows.jsonl"), place.path("rows.jsonl")).expect("a new file");
    place
}

/// What PEFT gives, in doubles.
fn numbers() -> BTreeMap<String, Vec<f64>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adapt/peft/numbers.safetensors");
    let bytes = fs::read(path).expect("the references are there");
    let read = SafeTensors::deserialize(&bytes).expect("safetensors");
    let doubles = |bytes: &[u8]| bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    let floats = read.tensors().into_iter().filter(|(_, tensor)| tensor.dtype() == safetensors::Dtype::F64);
    floats.map(|(name, tensor)| (name, doubles(tensor.data()))).collect()
}

fn near(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < tolerance, "{what}: {found} and {expected}");
    }
}

#[test]
fn logits_are_those_of_peft() {
    let (place, numbers) = (place(), numbers());
    let logits = |model: &str| {
        let args =
            ["score", model, "--input", "rows.jsonl", "--logits", "logits.safetensors", "--device", "interp-f64"];
        place.out(&args, &[]);
        let logits = place.tensors("logits.safetensors");
        (0..4).flat_map(|row| logits[&format!("row.{row}")].to_f64()).collect::<Vec<f64>>()
    };
    // The file ends each text with a token that a row of texts does not have.
    let (width, vocabulary) = (9, 24);
    let expected = numbers["logits"].chunks(width * vocabulary).flat_map(|row| &row[..(width - 1) * vocabulary]);
    let expected: Vec<f64> = expected.copied().collect();
    near(&logits("adapter"), &expected, 2e-6, "logits");
    place.out(&["merge", "adapter", "merged"], &[]);
    near(&logits("merged"), &expected, 2e-6, "logits of the merged model");
}

#[test]
fn training_further_is_that_of_peft() {
    let (place, numbers) = (place(), numbers());
    place.out(&["run", "pipeline.yaml", "--device", "interp-f64"], &[]);
    for (step, line) in place.steps("sft").iter().enumerate() {
        let loss = line["loss"].as_f64().expect("a loss");
        near(&[loss], &numbers[&format!("loss.{step}")], 1e-9, &format!("loss of step {step}"));
    }
    let factors = place.tensors("runs/sft/adapter/adapter_model.safetensors");
    assert_eq!(factors.len(), 8);
    for (name, tensor) in factors {
        near(&tensor.to_f64(), &numbers[&format!("trained.{name}")], 1e-7, &name);
    }
}
