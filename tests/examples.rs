//! Every pipeline in `examples/` passes `dsgc check`, and trains as a user would run it, only shorter.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use dsgc_kernels::cpu::CpuTarget;
use dsgc_passes::{PIPELINE, PassContext, compile};
use dsgc_yaml::load::{Options, load};
use serde_json::Value;

#[path = "../frontends/cli/host.rs"]
mod host;

/// Example -> settings that keep a run short. An example's data may be too large to be here; it then runs on other rows.
const SHORT: &[(&str, &[&str])] = &[
    (
        "gsm8k",
        &[
            "data.pairs.path=examples/rlhf/data/prefs.jsonl",
            "data.pairs.eval=examples/rlhf/data/eval.jsonl",
            "data.pairs.max_rows=48",
            "stages.sft.max_steps=3",
            "stages.reward.max_steps=2",
            "stages.ppo.max_steps=2",
            "stages.ppo.max_new_tokens=8",
        ],
    ),
    ("rlhf", &["stages.sft.max_steps=60", "stages.reward.max_steps=20", "stages.ppo.max_steps=8"]),
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
fn arguments(example: &str, purpose: &str) -> (Vec<String>, PathBuf) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{purpose}-{example}"));
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
        let (sets, _) = arguments(example, "check");
        for command in ["check", "compile"] {
            let file = pipeline(example);
            let mut args = vec![command, &file];
            args.extend(sets.iter().map(String::as_str));
            assert!(succeeds(&args).contains("sft"), "`{command}` names the stage");
        }
    }
}

/// How the stages of an example may run: all that passes can be asked for.
const LAYOUTS: [&[&str]; 5] = [
    &[],
    &["compile.parallel={data: 2, zero_stage: 3}", "defaults.bf16=true", "compile.gradient_checkpointing=true"],
    &["compile.parallel={tensor: 2}", "defaults.lora_r=4", "compile.offload_activations=true"],
    &["compile.parallel={pipeline: 2, schedule: 1f1b}", "stages.ppo.micro_batch_size=24"],
    &["defaults.weights=int8", "defaults.freeze=['*bias']", "defaults.offload_optimizer=true"],
];

/// A reader of the report sees of every pass that has changed something what that was.
#[test]
fn every_pass_that_changes_a_graph_says_what_it_matched() {
    let mut said: BTreeMap<&str, usize> = BTreeMap::new();
    for layout in LAYOUTS {
        let (_, short) = SHORT.iter().find(|(name, _)| *name == "rlhf").expect("it is an example");
        let sets = short.iter().chain(layout).map(|set| set.to_string()).collect();
        let options = Options { sets, ..Options::default() };
        let loaded = load(&root().join(pipeline("rlhf")), &options, &host::Disk);
        for program in loaded.unwrap_or_else(|e| panic!("{layout:?}: {:?}", e.diags)).stages {
            let (name, target) = (program.stage.name.clone(), CpuTarget { threads: 2 });
            let compiled = compile(program, &PassContext::new(&target), &mut |step| {
                let silent = step.notes.matched.is_empty() && step.before.graphs != step.after.graphs;
                assert!(!silent, "`{}` changes graphs of `{name}` and says nothing of it: {layout:?}", step.pass.name);
                *said.entry(step.pass.name).or_default() += step.notes.matched.len();
            });
            compiled.unwrap_or_else(|e| panic!("`{name}`: {e:?}"));
        }
    }
    let silent: Vec<&str> = PIPELINE.iter().map(|pass| pass.name).filter(|name| said[name] == 0).collect();
    assert!(silent.is_empty(), "{silent:?} matched nothing");
}

type Metrics = BTreeMap<String, Value>;

/// Runs an example; the folder of its results.
fn run(example: &str) -> PathBuf {
    let (sets, folder) = arguments(example, "run");
    // What an earlier run of the tests left would be kept beside the new results.
    if folder.exists() {
        fs::remove_dir_all(&folder).expect("the folder is ours");
    }
    let file = pipeline(example);
    let mut args = vec!["run", &file];
    args.extend(sets.iter().map(String::as_str));
    succeeds(&args);
    folder
}

/// Lines of `metrics.jsonl` in a folder.
fn metrics(folder: &Path) -> Vec<Metrics> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).expect("a run writes its metrics");
    text.lines().map(|line| serde_json::from_str(line).expect("a line is a JSON object")).collect()
}

/// A metric of the held-out rows before and after a stage.
fn held_out(lines: &[Metrics], name: &str) -> (f64, f64) {
    let all: Vec<f64> = lines.iter().filter_map(|line| line.get(&format!("eval/{name}"))?.as_f64()).collect();
    (*all.first().expect("held-out rows are evaluated before"), *all.last().expect("and after"))
}

/// What each of the three stages is for, on questions that none was trained on. `three_seeds.py` shows it at full length.
#[test]
fn rlhf_does_what_its_stages_are_for() {
    let folder = run("rlhf");
    let sft = metrics(&folder.join("sft"));
    assert_eq!(sft.iter().filter(|line| line.contains_key("loss")).count(), 60, "a line per optimizer step");
    let (before, after) = held_out(&sft, "ppl");
    assert!(after < before / 10.0, "held-out perplexity: {before} before, {after} after");

    let (_, accuracy) = held_out(&metrics(&folder.join("reward")), "accuracy");
    assert!(accuracy > 0.7, "held-out pairs ranked right: {accuracy}");

    let ppo = metrics(&folder.join("ppo"));
    let (before, after) = held_out(&ppo, "reward");
    assert!(after > before + 1.0, "held-out reward: {before} before, {after} after");
    let (_, divergence) = held_out(&ppo, "sequence_kl");
    assert!(divergence > 0.0 && divergence < 4.0, "divergence from the model before: {divergence}");
    // Scoring and training run at equal shapes: the first ratio of every step is exactly 1.
    let ratios: Vec<f64> = ppo.iter().filter_map(|line| line.get("actor/ratio")?.as_f64()).collect();
    assert_eq!(ratios, [1.0; 8]);

    // What was written is a model: another pipeline starts where this one ended.
    let next = folder.join("next");
    let sets = [
        format!("models.base={}", folder.join("sft").display()),
        "stages.sft.max_steps=1".into(),
        format!("output_dir={}", next.display()),
    ];
    let file = pipeline("rlhf");
    let mut args = vec!["run", &file, "--stage", "sft"];
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    succeeds(&args);
    let (again, _) = held_out(&metrics(&next.join("sft")), "ppl");
    let (_, after) = held_out(&sft, "ppl");
    assert!((again / after - 1.0).abs() < 1e-5, "{after} when it was written, {again} when it was read");
}

#[test]
fn gsm8k_runs_through_all_stages() {
    let folder = run("gsm8k");
    let (before, after) = held_out(&metrics(&folder.join("sft")), "ppl");
    assert!(after < before, "held-out perplexity: {before} before, {after} after");
    for model in ["sft", "reward", "ppo/actor", "ppo/critic"] {
        assert!(folder.join(model).join("model.safetensors").is_file(), "`{model}` is written");
    }
}

#[test]
fn every_example_can_be_tried() {
    for (example, _) in SHORT {
        let (sets, folder) = arguments(example, "smoke");
        let file = pipeline(example);
        let mut args = vec!["run", &file, "--smoke"];
        args.extend(sets.iter().map(String::as_str));
        let out = succeeds(&args);
        assert!(out.contains("smoke: sft, reward, ppo ran"), "{out}");
        if cfg!(feature = "wgpu") {
            args.extend(["--device", "wgpu"]);
            let out = succeeds(&args);
            assert!(out.contains("smoke: sft, reward, ppo ran"), "{out}");
        }
        assert!(!folder.exists(), "nothing of it is kept");
    }
}

#[test]
fn without_its_data_gsm8k_says_what_is_missing() {
    let file = pipeline("gsm8k");
    let output = dsgc(&["check", &file]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("pairs.train.jsonl"));
}
