//! The common beginning of a chosen and a rejected answer computed once: the numbers of both rows apart.

use std::fs;
use std::path::Path;

use dsgc_ir::stage::Prefix;
use dsgc_ir::{Program, Tensor};
use dsgc_kernels::interp::InterpTarget;
use dsgc_passes::PassContext;

mod stages;

use stages::{Ran, cpu, interp};

const PASS: &str = "share_prefix";

/// A stage on pairs, of a model with learned positions or with rotary ones.
fn program(folder: &Path, recipe: &str, model: &str, sets: &[&str]) -> Program {
    let config = match model {
        "opt" => "{hidden: 64, layers: 2, heads: 4, ffn: 128, max_positions: 64}",
        _ => "{hidden: 64, layers: 2, heads: 4, kv_heads: 2, ffn: 128, max_positions: 64}",
    };
    let role = if recipe == "reward" { "reward" } else { "policy" };
    let text = format!(
        "dsgc: 1
seed: 7
models:
  base: {{model: {model}, tokenizer: TOKENIZER, config: {config}}}
data:
  pairs: {{path: rows.jsonl}}
stages:
  stage:
    recipe: {recipe}
    {role}: {{model: base}}
    data: pairs
    batch_size: 4
    micro_batch_size: 4
    max_length: 48
    learning_rate: 1e-2
    max_steps: 4
    logging_steps: 1
"
    );
    // Beginnings of several lengths; answers of which one is shorter than the other.
    let row = |i: usize| {
        let (question, more) = ("Is it so? ".repeat(1 + i % 3), "no ".repeat(i % 4));
        format!("{{\"prompt\": \"{question}\", \"chosen\": \"Yes, {i}.\", \"rejected\": \"{more}{i}\"}}")
    };
    let rows: Vec<String> = (0..16).map(row).collect();
    let sets: Vec<String> = sets.iter().map(|s| format!("stages.stage.{s}")).collect();
    stages::program(folder, &text, &rows, &sets.iter().map(String::as_str).collect::<Vec<_>>())
}

/// How far two runs are apart, each number relative to the largest of its tensor.
fn distance(a: &Ran, b: &Ran) -> f64 {
    let error = |a: &[f64], b: &[f64]| {
        assert_eq!(a.len(), b.len());
        let most = b.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
        a.iter().zip(b).map(|(a, b)| (a - b).abs() / most).fold(0.0, f64::max)
    };
    let mut worst = 0.0f64;
    for (a, b) in a.0.iter().zip(&b.0) {
        assert!(a.keys().eq(b.keys()));
        worst = a.iter().map(|(name, x)| error(&[*x], &[b[name]])).fold(worst, f64::max);
    }
    for (name, tensor) in &a.1 {
        // No loss depends on these: keys that all move, scores that all do. Their gradients are rounding noise, which AdamW
        // makes large.
        let noise = name.contains("k_proj.bias") || name.contains("final_layer_norm.bias") && !name.contains("layers");
        let numbers = |t: &Tensor| t.to_f64();
        worst = if noise { worst } else { worst.max(error(&numbers(tensor), &numbers(&b.1[name]))) };
    }
    worst
}

#[test]
fn answers_to_one_question_are_scored_as_two_rows() {
    for recipe in ["reward", "dpo"] {
        for model in ["opt", "llama"] {
            for sets in [&[][..], &["micro_batch_size=1"]] {
                let folder = tempfile::tempdir().expect("a temporary folder");
                let program = program(folder.path(), recipe, model, sets);
                let ((with, shared), (without, apart)) = (interp(&program, None), interp(&program, Some(PASS)));
                let sequences = vec!["chosen".to_string(), "rejected".to_string()];
                let input = "ends.chosen.rejected".to_string();
                assert_eq!(with.stage.prefixes, [Prefix { sequences, samples: 1, input }], "{recipe} of {model}");
                assert!(without.stage.prefixes.is_empty());
                let error = distance(&shared, &apart);
                assert!(error < 1e-9, "{recipe} of {model} {sets:?}: {error:e}");
            }
        }
    }
}

#[test]
fn the_cpu_has_the_numbers_of_the_interpreter_with_any_threads() {
    for model in ["opt", "llama"] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = program(folder.path(), "reward", model, &["max_steps=2"]);
        let exact = interp(&program, None).1;
        let first = cpu(&program, 1, None);
        for (found, exact) in first.0.iter().zip(&exact.0) {
            // End scores move with what no loss depends on.
            for name in ["loss", "grad_norm", "accuracy"] {
                let (found, exact) = (found[name], exact[name]);
                assert!((found - exact).abs() <= 1e-5 * exact.abs(), "{model}: {name} {found} and {exact}");
            }
        }
        for threads in [2, 3] {
            assert_eq!(cpu(&program, threads, None), first, "{threads} threads");
        }
    }
}

#[test]
fn dropout_keeps_rows_apart() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), "reward", "opt", &["reward.lora_r=2", "reward.lora_dropout=0.5"]);
    let (with, _) = interp(&program, None);
    assert!(with.stage.prefixes.is_empty());
}

/// Several answers to each prompt, compared with each other: the scoring graph gets them as rows that stand together.
const GROUPS: &str = include_str!("common/groups.yaml");

fn in_groups(folder: &Path, model: &str, sets: &[&str]) -> Program {
    fs::write(folder.join("groups.yaml"), GROUPS).expect("a new file");
    let sets: Vec<&str> = ["recipe=./groups.yaml"].iter().chain(sets).copied().collect();
    program(folder, "groups", model, &sets)
}

#[test]
fn answers_to_one_prompt_are_scored_as_rows_apart() {
    let prefix = Prefix { sequences: vec!["seq".into()], samples: 4, input: "ends.seq".into() };
    // Two groups in a call, and one.
    for (model, micro) in [("opt", 8), ("llama", 4)] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let sets = ["batch_size=8", "max_steps=2", &format!("micro_batch_size={micro}")];
        let program = in_groups(folder.path(), model, &sets);
        let ((with, together), (_, apart)) = (interp(&program, None), interp(&program, Some(PASS)));
        assert_eq!(with.stage.prefixes, std::slice::from_ref(&prefix), "{model}");
        let error = distance(&together, &apart);
        assert!(error < 1e-9, "{model}: {error:e}");
        assert!(together.0.last().is_some_and(|step| step["kl"] > 0.0), "{:?}", together.0);
    }
}

#[test]
fn groups_larger_than_a_micro_batch_stay_apart() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = in_groups(folder.path(), "opt", &["batch_size=8", "micro_batch_size=2"]);
    assert!(stages::compile(&program, &PassContext::new(&InterpTarget), None).stage.prefixes.is_empty());
}
