//! Every pipeline in `examples/` passes `dsgc check`, and trains as a user would run it, only shorter.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use serde_json::Value;

/// Example -> settings that keep a run short. An example's data may be too large to be here; it then runs on other rows.
const SHORT: &[(&str, &[&str])] = &[
    ("gsm8k", &["data.gsm8k.path=examples/rlhf/data/prefs.jsonl", "stages.sft.max_steps=3"]),
    ("rlhf", &["stages.sft.max_steps=40"]),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn dsgc(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dsgc")).args(args).current_dir(root()).output().expect("dsgc starts")
}

fn succeeds(args: &[&str]) -> String {
    let output = dsgc(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "dsgc {}:\n{errors}", args.join(" "));
    String::from_utf8(output.stdout).expect("results are text")
}

fn pipeline(example: &str) -> String {
    format!("examples/{example}/pipeline.yaml")
}

/// Settings as arguments; results go to a folder of their own.
fn arguments(example: &str) -> (Vec<String>, PathBuf) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("example-{example}"));
    let short = SHORT.iter().find(|(name, _)| *name == example).expect("SHORT names every example").1;
    let output = format!("output_dir={}", folder.display());
    let sets = short.iter().copied().chain([output.as_str()]);
    (sets.flat_map(|set| ["--set".to_string(), set.to_string()]).collect(), folder)
}

#[test]
fn every_example_is_listed() {
    let folders = fs::read_dir(root().join("examples")).expect("there are examples").flatten();
    let mut found: Vec<String> = folders
        .filter(|e| e.path().join("pipeline.yaml").is_file())
        .map(|e| e.file_name().into_string().expect("names are text"))
        .collect();
    found.sort();
    let listed: Vec<&str> = SHORT.iter().map(|(name, _)| *name).collect();
    assert_eq!(found, listed, "an example is missing in SHORT, or is no more");
}

#[test]
fn every_example_passes_check_and_compile() {
    for (example, _) in SHORT {
        let (sets, _) = arguments(example);
        for command in ["check", "compile"] {
            let file = pipeline(example);
            let mut args = vec![command, &file];
            args.extend(sets.iter().map(String::as_str));
            assert!(succeeds(&args).contains("sft"), "`{command}` names the stage");
        }
    }
}

/// Lines of `metrics.jsonl` after a run.
fn run(example: &str) -> (Vec<BTreeMap<String, Value>>, PathBuf) {
    let (sets, folder) = arguments(example);
    // What an earlier run of the tests left would be kept beside the new results.
    if folder.exists() {
        fs::remove_dir_all(&folder).expect("the folder is ours");
    }
    let file = pipeline(example);
    let mut args = vec!["run", &file];
    args.extend(sets.iter().map(String::as_str));
    succeeds(&args);
    let text = fs::read_to_string(folder.join("sft/metrics.jsonl")).expect("a run writes its metrics");
    let lines = text.lines().map(|line| serde_json::from_str(line).expect("a line is a JSON object"));
    (lines.collect(), folder.join("sft"))
}

/// The held-out perplexity before and after.
fn perplexity(lines: &[BTreeMap<String, Value>]) -> (f64, f64) {
    let all: Vec<f64> = lines.iter().filter_map(|line| line.get("eval/ppl")?.as_f64()).collect();
    (*all.first().expect("held-out rows are evaluated before"), *all.last().expect("and after"))
}

#[test]
fn rlhf_divides_the_held_out_perplexity_by_ten_and_writes_a_model() {
    let (lines, folder) = run("rlhf");
    assert_eq!(lines.iter().filter(|line| line.contains_key("loss")).count(), 40, "a line per optimizer step");
    let (before, after) = perplexity(&lines);
    assert!(after < before / 10.0, "held-out perplexity: {before} before, {after} after");

    // What was written is a model: another pipeline starts where this one ended.
    let model = format!("models.base={}", folder.display());
    let output = format!("output_dir={}", folder.join("next").display());
    let file = pipeline("rlhf");
    succeeds(&["run", &file, "--set", &model, "--set", "stages.sft.max_steps=1", "--set", &output]);
    let text = fs::read_to_string(folder.join("next/sft/metrics.jsonl")).expect("a run writes its metrics");
    let first: BTreeMap<String, Value> = serde_json::from_str(text.lines().next().expect("a line")).expect("an object");
    let again = first["eval/ppl"].as_f64().expect("held-out rows are evaluated before");
    assert!((again / after - 1.0).abs() < 1e-5, "{after} when it was written, {again} when it was read");
}

#[test]
fn gsm8k_trains() {
    let (lines, _) = run("gsm8k");
    let (before, after) = perplexity(&lines);
    assert!(after < before, "held-out perplexity: {before} before, {after} after");
}

#[test]
fn without_its_data_gsm8k_says_what_is_missing() {
    let file = pipeline("gsm8k");
    let output = dsgc(&["check", &file]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("gsm8k-sft.jsonl"));
}
