//! A rollout's scoring and the first updates on it in one graph: the same numbers to the bit, with less work.

use std::path::Path;

use dsgc_ir::stage::{CallSteps, Statement};
use dsgc_ir::{Planned, Program};
use dsgc_runtime::Metrics;

mod stages;

use stages::{cpu, interp};

const STAGES: &str = "\
dsgc: 1
seed: 7
models:
  base:
    model: opt
    tokenizer: TOKENIZER
    config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 64}
data:
  prompts: {path: rows.jsonl}
  texts: {path: rows.jsonl, fields: {text: prompt}}
stages:
  ppo:
    actor: {model: base, learning_rate: 1e-2}
    critic: {model: base, learning_rate: 1e-2}
    data: prompts
    batch_size: 4
    minibatch_size: 4
    max_prompt_len: 24
    max_new_tokens: 8
    max_steps: 3
    logging_steps: 1
";

fn program(folder: &Path, sets: &[&str]) -> Program {
    let rows: Vec<String> = (0..12).map(|i| format!("{{\"prompt\": \"Question {i}?\"}}")).collect();
    let sets: Vec<String> = sets.iter().map(|s| format!("stages.ppo.{s}")).collect();
    stages::program(folder, STAGES, &rows, &sets.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Whether the stage's only call is joined with updates, and of how many roles.
fn joined(planned: &Planned) -> usize {
    fn of(body: &[Statement]) -> usize {
        let one = |statement: &Statement| match statement {
            Statement::For { body, .. } | Statement::Repeat { body, .. } => of(body),
            Statement::Call(call) => match &call.steps {
                Some(CallSteps::Joined(joined)) => joined.updates.len(),
                _ => 0,
            },
            _ => 0,
        };
        body.iter().map(one).sum()
    }
    of(&planned.stage.plan)
}

/// Joined and apart, in doubles; gives how many updates are joined, and the metrics.
fn both(sets: &[&str]) -> (usize, Vec<Metrics>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), sets);
    let (with, without) = (interp(&program, None), interp(&program, Some("join_updates")));
    assert_eq!(joined(&without.0), 0);
    assert_eq!(with.1, without.1, "{sets:?}");
    (joined(&with.0), with.1.0)
}

#[test]
fn a_rollout_is_scored_and_trained_on_at_once() {
    let (updates, steps) = both(&[]);
    assert_eq!(updates, 2);
    assert!(steps.iter().all(|metrics| metrics["actor/ratio"] == 1.0), "{steps:?}");
    // The first of two epochs.
    let (updates, steps) = both(&["ppo_epochs=2"]);
    assert_eq!(updates, 2);
    // The learning rate begins at 0; of two updates, the last one is told.
    assert!(steps[1..].iter().all(|metrics| metrics["actor/ratio"] != 1.0), "{steps:?}");
}

#[test]
fn rows_that_are_left_out_keep_them_apart() {
    // Some answers end early, and are not trained on.
    let (updates, steps) = both(&["min_answer=24", "max_new_tokens=24", "max_steps=12", "num_epochs=4"]);
    assert_eq!(updates, 2);
    let partly = |metrics: &&Metrics| metrics["answer_length"] < 24.0;
    assert!((1..12).contains(&steps.iter().filter(partly).count()), "{steps:?}");
}

#[test]
fn what_is_cut_or_differs_stays_apart() {
    // An update on a part of the rollout, one in parts, and one whose dropout scoring does not have.
    for sets in [&["minibatch_size=2"][..], &["micro_batch_size=2"], &["critic.lora_r=2", "critic.lora_dropout=0.5"]] {
        let (updates, _) = both(sets);
        let expected = usize::from(sets[0].starts_with("critic"));
        assert_eq!(updates, expected, "{sets:?}");
    }
}

/// A sum of losses is no single call: the actor learns from other text too, in blocks of a rollout's width.
#[test]
fn other_text_beside_the_rollout_keeps_them_apart() {
    let (updates, steps) = both(&["data={prompts: prompts, ptx: texts}", "unsup_coef=1", "num_epochs=3"]);
    assert_eq!(updates, 0);
    let of_text = |metrics: &Metrics| metrics["actor/ptx_loss/loss"];
    assert!(of_text(&steps[2]) < of_text(&steps[0]), "{steps:?}");
    let sum = steps[1]["actor/actor_loss/loss"] + of_text(&steps[1]);
    assert!((steps[1]["actor/loss"] - sum).abs() < 1e-12, "{steps:?}");
}

#[test]
fn the_cpu_gives_equal_bits_with_any_threads() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), &[]);
    let first = cpu(&program, 1, Some("join_updates"));
    for threads in [1, 2, 3] {
        assert_eq!(cpu(&program, threads, None), first, "{threads} threads");
    }
}
