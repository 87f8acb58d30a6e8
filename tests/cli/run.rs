//! `run`: what is trained, written and told.

use std::fs;
use std::process::Stdio;

use serde_json::{Map, Value};

use super::{Workplace, has};

/// The lines of a `metrics.jsonl`.
pub fn metrics(place: &Workplace, file: &str) -> Vec<Map<String, Value>> {
    let lines = place.read(file);
    lines.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line}"))).collect()
}

pub fn numbers(lines: &[Map<String, Value>], key: &str) -> Vec<f64> {
    lines.iter().filter_map(|line| line.get(key)?.as_f64()).collect()
}

#[test]
fn a_stage_leaves_a_model_folder() {
    let place = Workplace::new();
    let told = place.out(&["run", "pipeline.yaml", "--stage", "sft"]);
    has(&told, &["sft text: 18 rows", "sft text held out: 6 rows", "sft step 0/3 held out: loss"]);
    has(
        &told,
        &["sft step 1/3 epoch 0.33 loss", "tokens/s", "left", "sft step 3/3 epoch 1.00", "sft step 3/3 held out"],
    );
    has(&told, &["held out, before -> after: loss", "ppl", "sft wrote `model` to runs/sft"]);

    let mut files: Vec<String> = fs::read_dir(place.path("runs/sft"))
        .expect("the stage's folder")
        .map(|e| e.expect("a file").file_name().into_string().expect("text"))
        .collect();
    files.sort();
    let about = ["config.json", "finished.json", "metrics.jsonl"];
    assert_eq!(files, [&about[..], &["model.safetensors", "tokenizer.json", "tokenizer_config.json"]].concat());
    assert_eq!(place.read("runs/sft/tokenizer.json"), place.read("tokenizer/tokenizer.json"));

    let config: Value = serde_json::from_str(&place.read("runs/sft/config.json")).expect("JSON");
    assert_eq!(config["model_type"], "opt");
    assert_eq!(config["architectures"][0], "OPTForCausalLM");
    assert_eq!((&config["vocab_size"], &config["hidden_size"]), (&Value::from(640), &Value::from(16)));

    let bytes = fs::read(place.path("runs/sft/model.safetensors")).expect("the weights");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a whole file");
    assert_eq!(tensors.len(), 2 + 2 * 16 + 2);
    let words = tensors.tensor("model.decoder.embed_tokens.weight").expect("the embedding");
    assert_eq!((words.shape(), words.dtype()), ([640, 16].as_slice(), safetensors::Dtype::F32));

    let lines = metrics(&place, "runs/sft/metrics.jsonl");
    assert!(lines.iter().all(|line| line["stage"] == "sft"));
    assert_eq!(numbers(&lines, "step"), [0.0, 1.0, 2.0, 3.0, 3.0]);
    let (loss, held_out) = (numbers(&lines, "loss"), numbers(&lines, "eval/loss"));
    assert_eq!((loss.len(), held_out.len()), (3, 2));
    // A model that knows nothing gives each of 640 tokens the same chance.
    assert!((loss[0] - 640f64.ln()).abs() < 0.1, "{loss:?}");
    assert!(loss[2] < loss[0] && held_out[1] < held_out[0], "{loss:?} {held_out:?}");
    let ppl = numbers(&lines, "eval/ppl");
    assert!((ppl[0] - held_out[0].exp()).abs() < 1e-3 * ppl[0]);
    // Three steps of a cosine from 1e-2.
    for (found, expected) in numbers(&lines, "lr").iter().zip([1e-2, 7.5e-3, 2.5e-3]) {
        assert!((found - expected).abs() < 1e-12, "{found}, expected {expected}");
    }
    for key in ["grad_norm", "tokens", "tokens_per_second"] {
        let found = numbers(&lines, key);
        assert!(found.len() == 3 && found.iter().all(|&x| x > 0.0), "{key}: {found:?}");
    }
}

#[test]
fn the_same_run_gives_the_same_bits() {
    let place = Workplace::new();
    let run = |dir: &str, seed: &str| {
        let (dir, seed) = (format!("output_dir={dir}"), format!("seed={seed}"));
        place.out(&["run", "pipeline.yaml", "--stage", "sft", "--set", &dir, "--set", &seed]);
    };
    run("a", "7");
    run("b", "7");
    run("c", "8");
    let weights = |dir: &str| fs::read(place.path(dir).join("sft/model.safetensors")).expect("the weights");
    assert!(weights("a") == weights("b"));
    assert!(weights("a") != weights("c"));
    let without_times = |dir: &str| {
        let mut lines = metrics(&place, &format!("{dir}/sft/metrics.jsonl"));
        lines.iter_mut().for_each(|line| line.retain(|key, _| key != "seconds" && key != "tokens_per_second"));
        lines
    };
    assert_eq!(without_times("a"), without_times("b"));
}

#[test]
fn a_later_stage_goes_on_from_an_earlier_one() {
    let place = Workplace::new();
    place.out(&["run", "pipeline.yaml"]);
    let (first, second) = (metrics(&place, "runs/sft/metrics.jsonl"), metrics(&place, "runs/more/metrics.jsonl"));
    let (first, second) = (numbers(&first, "eval/loss"), numbers(&second, "eval/loss"));
    assert_eq!(first[1], second[0], "the second stage begins where the first one ended");
    // Half of the 18 rows in batches of 4 are 3 steps; evaluated before, after 2 and at the end.
    assert_eq!(numbers(&metrics(&place, "runs/more/metrics.jsonl"), "step"), [0.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
    assert_eq!(second.len(), 3);

    let whole = fs::read(place.path("runs/more/model.safetensors")).expect("the weights");
    let told = place.out(&["run", "pipeline.yaml", "--stage", "more"]);
    assert!(!told.contains("sft step"), "{told}");
    assert!(fs::read(place.path("runs/more/model.safetensors")).expect("the weights") == whole);
    assert_eq!(metrics(&place, "runs/more/metrics.1.jsonl").len(), metrics(&place, "runs/more/metrics.jsonl").len());
}

#[test]
fn a_stage_without_the_one_before_it_says_so() {
    let place = Workplace::new();
    let err = place.run(&["run", "pipeline.yaml", "--stage", "more"]);
    assert_eq!(err.code, Some(1));
    has(&err.err, &["error: found no model in `runs/sft`", "--stage"]);
    assert!(!place.path("runs/more").exists(), "nothing is written by a stage that cannot begin");
}

#[test]
fn the_interpreter_and_the_cpu_agree() {
    let place = Workplace::new();
    let losses = |device: &str| {
        let dir = format!("output_dir={device}");
        place.out(&["run", "pipeline.yaml", "--device", device, "--set", &dir]);
        let read = |stage: &str| metrics(&place, &format!("{device}/{stage}/metrics.jsonl"));
        let lines = [read("sft"), read("more")].concat();
        ["loss", "eval/loss", "grad_norm"].map(|key| numbers(&lines, key)).concat()
    };
    let cpu = losses("cpu");
    assert_eq!(cpu.len(), 6 + 5 + 6);
    for device in ["interp", "interp-f64"] {
        for (found, expected) in losses(device).iter().zip(&cpu) {
            assert!((found - expected).abs() <= 1e-4 * expected.abs(), "{device}: {found}, on the cpu {expected}");
        }
    }
}

#[test]
fn a_loss_that_is_no_number_ends_the_run() {
    let place = Workplace::new();
    let ended = place.run(&["run", "pipeline.yaml", "--set", "stages.sft.learning_rate=1e30"]);
    assert_eq!(ended.code, Some(1));
    has(&ended.err, &["error: `loss` is NaN at step 2 of the stage `sft`", "help", "learning_rate"]);
    let lines = metrics(&place, "runs/sft/metrics.jsonl");
    assert_eq!(lines.last().expect("a line")["loss"], "nan", "the step that failed is in the metrics");
    assert!(!place.path("runs/sft/model.safetensors").exists());
}

#[test]
fn a_run_over_an_older_one_keeps_what_is_the_users() {
    let place = Workplace::new();
    place.out(&["run", "pipeline.yaml", "--stage", "sft"]);
    let (model, log) = (place.path("runs/sft/model.safetensors"), place.read("runs/sft/metrics.jsonl"));
    let before = fs::read(&model).expect("the weights");
    place.write("runs/sft/notes.txt", "mine");
    place.out(&["run", "pipeline.yaml", "--stage", "sft", "--set", "stages.sft.max_steps=1"]);
    assert_eq!(place.read("runs/sft/notes.txt"), "mine");
    assert_eq!(place.read("runs/sft/metrics.1.jsonl"), log);
    assert!(fs::read(&model).expect("the weights") != before);
    assert!(!place.path("runs/sft.saving").exists());
}

#[test]
fn a_folder_that_cannot_be_written_is_told_before_training() {
    let place = Workplace::new();
    let ended = place.run(&["run", "pipeline.yaml", "--set", "output_dir=rows.jsonl"]);
    assert_eq!(ended.code, Some(1));
    has(&ended.err, &["error: cannot write", "rows.jsonl"]);
    assert!(!ended.out.contains("step"), "{}", ended.out);
}

#[test]
fn training_goes_on_when_nobody_reads_what_it_says() {
    let place = Workplace::new();
    let mut command = place.command(&["run", "pipeline.yaml", "--stage", "sft"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the program starts");
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert_eq!(numbers(&metrics(&place, "runs/sft/metrics.jsonl"), "eval/loss").len(), 2);
    assert!(place.path("runs/sft/model.safetensors").exists());
}

#[test]
fn a_model_beyond_the_memory_is_told() {
    let place = Workplace::new();
    let sizes = ["--set", "models.base.config.hidden=1000000", "--set", "models.base.config.layers=4"];
    let err = place.refused(&[&["run", "pipeline.yaml", "--stage", "sft"][..], &sizes].concat());
    has(&err, &["error: stage `sft` needs", "TiB of memory", "help", "micro_batch_size"]);
    assert!(!place.path("runs").exists());
}

/// Trains a model from a folder, with this change of its `config.json`.
fn from_folder(change: impl Fn(&mut Map<String, Value>)) -> (Workplace, super::Ended) {
    let place = Workplace::new();
    place.out(&["run", "pipeline.yaml", "--stage", "sft"]);
    let mut config = serde_json::from_str(&place.read("runs/sft/config.json")).expect("JSON");
    change(&mut config);
    place.write("runs/sft/config.json", &serde_json::to_string(&config).expect("JSON"));
    let pipeline = place.read("pipeline.yaml");
    let (head, stages) = pipeline.split_once("models:").expect("models");
    let (_, stages) = stages.split_once("data:").expect("data");
    let (stages, _) = stages.split_once("  more:").expect("the second stage");
    place.write("again.yaml", &format!("{head}models:\n  base: runs/sft\ndata:{stages}"));
    let ended = place.run(&["run", "again.yaml", "--set", "output_dir=again"]);
    (place, ended)
}

#[test]
fn keys_of_a_config_that_a_model_does_not_use_are_listed_and_kept() {
    let (place, ended) = from_folder(|config| {
        config.insert("dropout".into(), 0.1.into());
        config.insert("my_note".into(), "kept".into());
    });
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    assert_eq!(ended.out.matches("my_note").count(), 1, "{}", ended.out);
    has(&ended.out, &["sft", "config.json", "dropout, my_note"]);
    let config: Value = serde_json::from_str(&place.read("again/sft/config.json")).expect("JSON");
    assert_eq!(config["my_note"], "kept");
    // It goes on where the folder's model ended.
    let (before, after) = (metrics(&place, "runs/sft/metrics.jsonl"), metrics(&place, "again/sft/metrics.jsonl"));
    assert_eq!(numbers(&before, "eval/loss")[1], numbers(&after, "eval/loss")[0]);
}

#[test]
fn a_folder_that_is_not_the_models_is_refused() {
    let (_, ended) = from_folder(|config| {
        config.insert("num_hidden_layers".into(), 3.into());
    });
    assert_eq!(ended.code, Some(1));
    has(&ended.err, &["error: found no tensor for parameter", "layers.2.", "expected one of shape"]);
}

#[test]
fn a_profile_says_where_time_went() {
    let place = Workplace::new();
    let told = place.out(&["run", "pipeline.yaml", "--stage", "sft", "--profile"]);
    has(&told, &["profile of sft", "launches", "model.loss.grad", "attention_grad f32[", " %", "GB/s", "together"]);
    let why = place.refused(&["run", "pipeline.yaml", "--stage", "sft", "--profile", "--device", "interp"]);
    has(&why, &["the device `interp` does not measure its launches", "--device cpu"]);
}
