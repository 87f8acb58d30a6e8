//! Weights that are kept in few bits: what runs, what memory it takes, and how far numbers move.

use std::path::Path;

use serde_json::Value;

use super::place::Place;
use super::runs::PIPELINE;

/// The pipeline of `runs`, with layers wide enough for groups.
fn pipeline() -> String {
    PIPELINE.replace("hidden: 16, layers: 2, heads: 2, ffn: 32", "hidden: 64, layers: 2, heads: 2, ffn: 128")
}

/// Numbers in the weights of the two layers: four of attention, two of the feed-forward block.
const WEIGHTS: usize = 2 * (4 * 64 * 64 + 2 * 64 * 128);

fn begun() -> Place {
    let place = Place::with(&pipeline());
    place.out(&["run", "pipeline.yaml", "--stage", "sft"], &[]);
    place.out(&["run", "pipeline.yaml", "--stage", "reward"], &[]);
    place
}

/// What `compile` says of the stage ppo.
fn compiled(place: &Place, sets: &[&str]) -> Value {
    let report = place.out(&["compile", "pipeline.yaml", "--stage", "ppo", "--json"], sets);
    let reports: Vec<Value> = serde_json::from_str(&report).expect("JSON");
    reports.into_iter().next().expect("a stage")
}

fn persistent(report: &Value) -> usize {
    report["memory"]["persistent"].as_u64().expect("bytes") as usize
}

#[test]
fn frozen_roles_take_the_memory_of_what_they_are_kept_in() {
    let place = begun();
    let plain = persistent(&compiled(&place, &[]));
    for (name, group, bytes) in [
        ("bf16", 64, 2 * WEIGHTS),
        ("f16", 64, 2 * WEIGHTS),
        // Rows of 64 and of 128 elements with one scale or two, which take a line of 16 bytes.
        ("int8", 64, WEIGHTS + 2 * 16 * (5 * 64 + 128)),
        ("int4", 64, WEIGHTS / 2 + 2 * 16 * (5 * 64 + 128)),
        ("int4", 32, WEIGHTS / 2 + 2 * 16 * (5 * 64 + 128)),
    ] {
        let sets =
            ["ref", "reward"].map(|role| format!("stages.ppo.{role}={{weights: {name}, weights_group: {group}}}"));
        let sets = sets.each_ref().map(String::as_str);
        let report = compiled(&place, &sets);
        assert_eq!(plain - persistent(&report), 2 * (4 * WEIGHTS - bytes), "{name} by {group}");
        let role = report["roles"].as_array().expect("roles").iter().find(|role| role["role"] == "ref").expect("ref");
        let kept = if name.starts_with("int") { format!("{name}x{group}") } else { name.to_string() };
        assert_eq!((&role["weights"], &role["saved_bytes"]), (&kept.into(), &(4 * WEIGHTS - bytes).into()));
        place.out(&["run", "pipeline.yaml", "--stage", "ppo"], &sets);
        assert!(place.steps("ppo").iter().all(|step| step["actor/loss"].as_f64().is_some_and(f64::is_finite)));
    }
}

#[test]
fn trained_roles_generate_with_a_copy_and_are_written_in_full() {
    let place = begun();
    for sets in [
        &["stages.ppo.actor={model: sft, weights: int8}"][..],
        &["stages.ppo.actor={model: sft, weights: int4, weights_group: 32, bf16: true}", "stages.ppo.ref={bf16: true}"],
    ] {
        let report = place.out(&["compile", "pipeline.yaml", "--stage", "ppo"], sets);
        let line =
            report.lines().find(|line| line.trim_start().starts_with("actor ")).expect("the report has the role");
        assert!(line.contains("generates with weights in int") && line.contains(" of copies"), "{line}");
        place.out(&["run", "pipeline.yaml", "--stage", "ppo"], sets);
        let steps = place.steps("ppo");
        assert!(steps.iter().all(|step| step["actor/loss"].as_f64().is_some_and(f64::is_finite)));
        // Scores of the actor are those of its weights, which are the reference's at first.
        assert!(steps[0]["kl"].as_f64().is_none_or(|kl| kl.abs() < 1e-6), "{}", steps[0]);
        let weights = place.tensors("runs/ppo/actor/model.safetensors");
        let before = place.tensors("runs/sft/model.safetensors");
        let far = |name: &String| {
            let pairs = weights[name].to_f64().into_iter().zip(before[name].to_f64());
            pairs.fold(0f64, |far, (a, b)| far.max((a - b).abs()))
        };
        // AdamW's steps are about as long as the rate; a weight that had been rounded would be farther from what it was.
        let layer = weights.keys().find(|name| name.ends_with("fc1.weight")).expect("there are layers");
        assert!(far(layer) > 0.0 && far(layer) < 5e-3, "{} moved by {}", layer, far(layer));
    }
}

/// An adapter is trained beside weights that are kept in four bits, and written without them.
#[test]
fn low_rank_factors_are_trained_beside_few_bits() {
    let place = begun();
    let lora =
        ["stages.sft.model=start", "models.start=runs/base", "stages.sft.lora_r=4", "stages.sft.lora_save=adapter"];
    std::fs::rename(place.path("runs/sft"), place.path("base")).expect("it moves");
    let lora = [lora[0], "models.start=base", lora[2], lora[3]];
    let report = place.out(&["compile", "pipeline.yaml", "--stage", "sft"], &lora);
    let few = [&lora[..], &["stages.sft.weights=int4"]].concat();
    let kept = place.out(&["compile", "pipeline.yaml", "--stage", "sft"], &few);
    assert!(!report.contains("int4") && kept.contains("held in int4x64 only"), "{kept}");
    place.out(&["run", "pipeline.yaml", "--stage", "sft"], &few);
    let factors = place.tensors("runs/sft/adapter/adapter_model.safetensors");
    assert!(factors.iter().any(|(name, t)| name.contains("lora_B") && t.to_f64().iter().any(|x| *x != 0.0)));
}

/// Log-probabilities of a text by a folder's model.
fn scores(place: &Place, model: &Path, args: &[&str]) -> Vec<f64> {
    std::fs::write(place.path("texts.jsonl"), "{\"tokens\": [2, 30, 41, 52, 63, 74, 85, 96, 107, 118, 129, 140]}\n")
        .expect("a new file");
    let model = model.to_str().expect("a path in UTF-8");
    let out = place.out(&[&["score", model, "--input", "texts.jsonl"][..], args].concat(), &[]);
    let line: Value = serde_json::from_str(out.lines().next().expect("a line")).expect("JSON");
    line["logp"].as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number")).collect()
}

#[test]
fn log_probabilities_move_little() {
    let place = Place::with(&pipeline());
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for family in ["opt", "llma"] {
        let exact = scores(&place, &golden.join(family), &[]);
        let moved = |args: &[&str]| {
            let found = scores(&place, &golden.join(family), args);
            let interp = scores(&place, &golden.join(family), &[args, &["--device", "interp"]].concat());
            for (a, b) in found.iter().zip(&interp) {
                assert!((a - b).abs() < 1e-4, "{family} {args:?}: {a} on the CPU, {b} by the interpreter");
            }
            found.iter().zip(&exact).fold(0f64, |most, (a, b)| most.max((a - b).abs()))
        };
        let far =
            ["f16", "bf16", "int8", "int4"].map(|weights| moved(&["--weights", weights, "--weights-group", "32"]));
        assert!(far[0] > 0.0 && far.is_sorted(), "{family}: {far:?}");
        // Of 32 normally distributed weights the largest is about 2.1 deviations, so those in 8 bits are off by 6 times what
        // bf16's are, and those in 4 bits by 127 / 7 times that.
        assert!(far[2] < 8.0 * far[1] && far[3] < 24.0 * far[2] && far[2] < 0.05, "{family}: {far:?}");
    }
}

#[test]
fn a_folder_generates_with_few_bits() {
    let place = begun();
    let args = ["generate", "runs/sft", "--tokens", "5,6,7", "--max-new-tokens", "8"];
    for weights in ["bf16", "f16", "int8", "int4"] {
        let on = |device: &str| place.out(&[&args[..], &["--weights", weights, "--device", device]].concat(), &[]);
        assert_eq!(on("cpu"), on("interp"), "{weights}");
    }
}
