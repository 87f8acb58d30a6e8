//! Runs that stop and go on have the metrics and the weights of runs that never stopped, to the bit.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "common/place.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod place;

use place::Place;

/// Evaluations, cached answers of a reference, rollouts, an average, text beside the rollouts, a replay buffer.
const PIPELINE: &str = "
dsgc: 1
output_dir: runs
seed: 5
save_steps: 2
models:
  base: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 48}}
data:
  prefs: {path: rows.jsonl}
  held: {path: rows.jsonl, eval: 0.25}
  others: {path: rows.jsonl, fields: {text: chosen}}
defaults: {batch_size: 4, learning_rate: 1e-2, max_steps: 5, logging_steps: 1}
stages:
  sft: {model: base, data: held, max_length: 40, micro_batch_size: 2, eval_steps: 2, lora_r: 2, lora_dropout: 0.5}
  dpo: {policy: sft, data: prefs, max_length: 40, bf16: true}
  reward: {reward: sft, data: prefs, max_length: 40}
  ppo:
    actor: {model: dpo}
    critic: {model: reward}
    data: {prompts: prefs, ptx: others}
    minibatch_size: 2
    max_prompt_len: 16
    max_new_tokens: 6
    warmup_steps: 0
    enable_ema: true
    kl_target: 0.1
    save: [actor, critic, ema]
  replay: {recipe: ./replay.yaml, actor: base, data: prefs}
";

const REPLAY: &str = include_str!("common/replay.yaml");

const STAGES: [&str; 5] = ["sft", "dpo", "reward", "ppo", "replay"];

fn place() -> Place {
    let place = Place::with(PIPELINE);
    fs::write(place.path("replay.yaml"), REPLAY).expect("a new file");
    place
}

/// The lines of a stage's metrics without times.
fn metrics(place: &Place, stage: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path(&format!("runs/{stage}/metrics.jsonl"))).expect("metrics");
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    for line in &mut lines {
        let line = line.as_object_mut().expect("an object");
        line.retain(|key, _| key != "seconds" && key != "tokens_per_second");
    }
    lines
}

/// All files of tensors below a stage's folder, but for checkpoints.
fn tensors(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with("checkpoints") {
            found.extend(tensors(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else if name.ends_with(".safetensors") {
            found.push((name, fs::read(&path).expect("a file")));
        }
    }
    found.sort();
    found
}

fn assert_equal(found: &Place, expected: &Place, stage: &str) {
    assert_eq!(metrics(found, stage), metrics(expected, stage), "metrics of `{stage}`");
    let of = |place: &Place| tensors(&place.path(&format!("runs/{stage}")));
    let (found, expected) = (of(found), of(expected));
    assert!(!expected.is_empty());
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected), "files of `{stage}`");
    assert!(found == expected, "weights of `{stage}` differ");
}

#[test]
fn every_stage_goes_on_to_the_same_numbers() {
    let whole = place();
    whole.out(&["run", "pipeline.yaml"], &[]);
    for stage in STAGES {
        let names: Vec<String> = ["step-00000002", "step-00000004"].map(String::from).into();
        let mut found: Vec<String> = fs::read_dir(whole.path(&format!("runs/{stage}/checkpoints")))
            .expect("checkpoints")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        found.sort();
        assert_eq!(found, names, "{stage}");
    }
    // Stages that are done are not run again; a finished run says so.
    let done = whole.command(&["run", "pipeline.yaml", "--resume", "auto"]);
    assert_eq!(done.status.code(), Some(3), "{done:?}");
    assert!(String::from_utf8_lossy(&done.stdout).contains("nothing is left to resume"), "{done:?}");
    for stage in STAGES {
        let before = place();
        copy(&whole.path("runs"), &before.path("runs"));
        let checkpoint = format!("runs/{stage}/checkpoints/step-00000002");
        let out = before.out(&["run", "pipeline.yaml", "--stage", stage, "--resume", &checkpoint], &[]);
        assert!(out.contains(&format!("{stage} goes on after step 2, from {checkpoint}")), "{out}");
        assert_equal(&before, &whole, stage);
        // The earlier metrics are kept.
        assert!(before.path(&format!("runs/{stage}/metrics.1.jsonl")).exists());
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a new folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let to = to.join(path.file_name().expect("a name"));
        if path.is_dir() { copy(&path, &to) } else { fs::copy(&path, &to).map(drop).expect("a copy") }
    }
}

/// A stage that takes some seconds, with a checkpoint after each of its steps.
const LONG: &[&str] = &["--stage", "ppo", "--set", "stages.ppo.max_steps=40", "--set", "save_steps=1"];

fn start(place: &Place, more: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsgc"));
    command.current_dir(place.path(".")).args(["run", "pipeline.yaml"]).args(LONG).args(more);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("dsgc runs")
}

/// Waits until a run has taken so many steps, or is over.
fn wait_for(place: &Place, child: &mut Child, steps: usize) {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(120) && child.try_wait().expect("a child").is_none() {
        let text = fs::read_to_string(place.path("runs/ppo/metrics.jsonl")).unwrap_or_default();
        if text.lines().count() >= steps {
            return;
        }
        sleep(Duration::from_millis(5));
    }
}

fn prepared() -> Place {
    let place = place();
    for stage in ["sft", "dpo", "reward"] {
        place.out(&["run", "pipeline.yaml", "--stage", stage], &[]);
    }
    place
}

#[cfg(unix)]
#[test]
fn a_run_that_is_told_to_stop_writes_where_it_stands() {
    let whole = prepared();
    let stopped = place();
    copy(&whole.path("runs"), &stopped.path("runs"));
    assert!(start(&whole, &[]).wait().expect("it ends").success());
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let more: &[&str] = if signal == "-INT" { &[] } else { &["--resume", "auto"] };
        let mut child = start(&stopped, more);
        wait_for(&stopped, &mut child, if signal == "-INT" { 3 } else { 8 });
        let kill = Command::new("kill").args([signal, &child.id().to_string()]).status().expect("`kill` runs");
        assert!(kill.success());
        let out = child.wait_with_output().expect("it ends");
        let text = String::from_utf8_lossy(&out.stdout);
        assert_eq!(out.status.code(), Some(code), "{text}");
        assert!(text.contains("`--resume auto` goes on from there"), "{text}");
    }
    assert!(start(&stopped, &["--resume", "auto"]).wait().expect("it ends").success());
    assert_equal(&stopped, &whole, "ppo");
}

#[test]
fn a_run_that_is_killed_loses_one_step_at_most() {
    let whole = prepared();
    let killed = place();
    copy(&whole.path("runs"), &killed.path("runs"));
    assert!(start(&whole, &[]).wait().expect("it ends").success());
    for steps in [2, 9, 17, 30] {
        let more: &[&str] = if steps == 2 { &[] } else { &["--resume", "auto"] };
        let mut child = start(&killed, more);
        wait_for(&killed, &mut child, steps);
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
        let text = fs::read_to_string(killed.path("runs/ppo/metrics.jsonl")).expect("metrics");
        let taken = text.lines().filter(|line| line.contains("\"epoch\"")).count();
        let newest = fs::read_dir(killed.path("runs/ppo/checkpoints")).map_or(0, |entries| {
            let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
            names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).max().unwrap_or(0)
        });
        assert!(newest + 1 >= taken, "{newest} is the newest checkpoint after {taken} steps");
    }
    assert!(start(&killed, &["--resume", "auto"]).wait().expect("it ends").success());
    assert_equal(&killed, &whole, "ppo");
}

#[test]
fn what_is_broken_or_of_another_run_is_named() {
    let place = place();
    let run = ["run", "pipeline.yaml", "--stage", "sft"];
    place.out(&run, &[]);
    let fails = |more: &[&str]| {
        let out = place.command(&[&run[..], more].concat());
        assert_eq!(out.status.code(), Some(1), "{out:?}");
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let checkpoint = |step: u64| format!("runs/sft/checkpoints/step-{step:08}");
    let states = place.path(&format!("{}/states.safetensors", checkpoint(4)));
    let whole = fs::read(&states).expect("a file");

    // Another setting, and another model.
    let error = fails(&["--resume", &checkpoint(4), "--set", "stages.sft.learning_rate=1e-3"]);
    assert!(error.contains("is of another run: `trainings` differ"), "{error}");
    let error = fails(&["--resume", &checkpoint(4), "--set", "models.base.config.layers=1"]);
    assert!(error.contains("is of another run"), "{error}");
    // What changes no number may be another.
    place.out(&[&run[..], &["--resume", &checkpoint(4)]].concat(), &["stages.sft.logging_steps=2"]);
    let error = fails(&["--resume", "runs/sft"]);
    assert!(error.contains("cannot read `runs/sft/checkpoint.json`"), "{error}");

    fs::remove_file(place.path("runs/sft/finished.json")).expect("it is there");
    fs::write(&states, &whole[..whole.len() - 3]).expect("a file");
    let error = fails(&["--resume", "auto"]);
    let sizes = format!("has {} bytes, expected {}", whole.len() - 3, whole.len());
    assert!(error.contains("step-00000004/states.safetensors") && error.contains(&sizes), "{error}");
    assert!(error.contains(&format!("`--resume {}` takes the one before it", checkpoint(2))), "{error}");
    let mut altered = whole.clone();
    *altered.last_mut().expect("it has bytes") ^= 1;
    fs::write(&states, altered).expect("a file");
    let error = fails(&["--resume", "auto"]);
    assert!(error.contains("is not what was written: its SHA-256 is another"), "{error}");
    fs::write(&states, &whole).expect("a file");

    // The file that names the others: altered so that it still reads, cut off, without its hash.
    let manifest = place.path(&format!("{}/checkpoint.json", checkpoint(4)));
    let written = fs::read_to_string(&manifest).expect("a file");
    let other = written.replacen("\"model\": 4", "\"model\": 3", 1);
    assert!(other != written && serde_json::from_str::<Value>(&other).is_ok(), "{written}");
    let (unsealed, _) = written.rsplit_once(",\n").expect("it has members");
    let broken = [
        (other.as_str(), "is not what was written: its SHA-256 is another"),
        (&written[..written.len() / 2], "is no checkpoint of ours: EOF"),
        (&format!("{unsealed}\n}}\n"), "it does not end with the `sha256` of what it says"),
    ];
    for (text, why) in broken {
        fs::write(&manifest, text).expect("a file");
        for from in ["auto", &checkpoint(4)] {
            let error = fails(&["--resume", from]);
            assert!(error.contains("step-00000004/checkpoint.json") && error.contains(why), "{from}: {error}");
            let before = format!("`--resume {}` takes the one before it", checkpoint(2));
            assert!(error.contains(&before), "{from}: {error}");
        }
    }
    place.out(&[&run[..], &["--resume", &checkpoint(2)]].concat(), &[]);

    // What says that a stage is done is whole or not there; if it is cut off all the same, the run can go on.
    let finished = place.path("runs/sft/finished.json");
    let text = fs::read_to_string(&finished).expect("a file");
    fs::write(&finished, &text[..text.len() / 2]).expect("a file");
    let error = fails(&["--resume", "auto"]);
    assert!(error.contains("`runs/sft/finished.json` is no JSON of ours"), "{error}");
    assert!(error.contains("remove it: the stage then goes on from its newest checkpoint"), "{error}");
    fs::remove_file(&finished).expect("it is there");
    place.out(&[&run[..], &["--resume", "auto"]].concat(), &[]);
    assert_eq!(fs::read_to_string(&finished).expect("it is done"), text);
    assert!(!place.path("runs/sft/finished.json.writing").exists());

    // A run that begins anew leaves nothing of an earlier one in its way, and loses nothing.
    place.out(&run, &["save_total_limit=1"]);
    assert!(place.path("runs/sft/checkpoints.1/step-00000002").exists());
    assert!(!place.path(&checkpoint(2)).exists() && place.path(&checkpoint(4)).exists());
    let rows = fs::read_to_string(place.path("rows.jsonl")).expect("rows");
    fs::write(place.path("rows.jsonl"), rows.lines().take(7).map(|l| format!("{l}\n")).collect::<String>())
        .expect("a file");
    let error = fails(&["--resume", &checkpoint(4)]);
    assert!(error.contains("a run goes on with the rows that it began with"), "{error}");
}

/// A number of as many digits as there are is the same when it is read again.
#[test]
fn a_setting_of_many_digits_is_that_of_the_same_run() {
    let place = place();
    let run = ["run", "pipeline.yaml", "--stage", "sft", "--set", "stages.sft.learning_rate=0.0018447362809681143"];
    place.out(&run, &[]);
    place.out(&[&run[..], &["--resume", "runs/sft/checkpoints/step-00000004"]].concat(), &[]);
}

/// A rate at which the loss goes up and down.
#[test]
fn the_best_checkpoint_stays_beside_the_newest() {
    for greater in [false, true] {
        let place = Place::with(&PIPELINE.replace(", lora_r: 2, lora_dropout: 0.5", ""));
        let sets = [
            "save_steps=1",
            "save_total_limit=2",
            "metric_for_best_model=loss",
            "stages.sft.eval_steps=1",
            "stages.sft.max_steps=9",
            "stages.sft.learning_rate=0.3",
        ];
        let more = format!("greater_is_better={greater}");
        let sets: Vec<&str> = sets.into_iter().chain(greater.then_some(more.as_str())).collect();
        fs::write(place.path("replay.yaml"), REPLAY).expect("a new file");
        place.out(&["run", "pipeline.yaml", "--stage", "sft"], &sets);
        let evaluations: Vec<(u64, f64)> = metrics(&place, "sft")
            .iter()
            .filter_map(|line| Some((line["step"].as_u64()?, line["eval/loss"].as_f64()?)))
            .filter(|(step, _)| *step > 0)
            .collect();
        assert_eq!(evaluations.len(), 9);
        let better = |a: f64, b: f64| if greater { a > b } else { a < b };
        let best = evaluations.iter().copied().reduce(|a, b| if better(b.1, a.1) { b } else { a }).expect("some").0;
        assert!((2..8).contains(&best), "this test says nothing: {evaluations:?}");
        let mut found: Vec<String> = fs::read_dir(place.path("runs/sft/checkpoints"))
            .expect("checkpoints")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        found.sort();
        assert_eq!(found, [best, 8, 9].map(|step| format!("step-{step:08}")), "{evaluations:?}");
    }
}
