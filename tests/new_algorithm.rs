//! An algorithm that nobody has thought of while dsgc was written, from a string: its rollouts go into a replay buffer,
//! the penalty on the divergence adapts, and one update takes two losses. No Rust knows of it.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use serde_json::Value;

const RECIPE: &str = r#"
recipe: replay
models:
  actor: {type: causal_lm, trained: true}
  ref: {snapshot: actor}
data:
  prompts: {fields: {prompt: text}, sequences: {prompt: [prompt]}, pad: left, width: 12, longer: drop}
options:
  wanted: {default: 320, doc: "tokens below this one are rewarded"}
  target: {default: 0.05, type: float}
state:
  penalty: {init: 0.2}
  drawn: {init: 0.0}
graphs:
  judged:
    in:
      seq: sequence[B, L]
      answer: bool[B, A]
      penalty: f32[]
    let:
      - ids: seq.tokens[:, L - A:]
      - logp: next_logp(actor(seq), seq.tokens)[:, L - A - 1:]
      - gap: logp - next_logp(ref(seq), seq.tokens)[:, L - A - 1:]
      - reward: sum(f32(ids < wanted), axis=1, where=answer) - penalty * sum(gap, axis=1, where=answer)
    out:
      rows:
        seq: seq
        answer: answer
        old_logp: logp
        # Compared with all answers of the rollout, however it is cut.
        advantage: (reward - mean(reward)) / (std(reward) + 1e-6)
      reward: mean(reward)
      kl: mean(gap, where=answer)
  surrogate:
    in:
      seq: sequence[B, L]
      answer: bool[B, A]
      old_logp: f32[B, A]
      advantage: f32[B]
    let:
      - logp: next_logp(actor(seq), seq.tokens)[:, L - A - 1:]
      - ratio: exp(where(answer, logp - old_logp, 0))
    out: {loss: "mean(-min(ratio, 1.5) * advantage[:, None], where=answer)", ratio: "mean(ratio, where=answer)"}
  imitation:
    in:
      seq: sequence[B, L]
      answer: bool[B, A]
      advantage: f32[B]
    let:
      - logp: next_logp(actor(seq), seq.tokens)[:, L - A - 1:]
      - good: answer and (advantage > 0)[:, None]
    out: {loss: "mean(-logp, where=good, empty=0)"}
plan:
  - for: batch
    in: batches(prompts, 8)
    do:
      - rollout: generate(actor, batch.prompt, max_new_tokens=6)
      - exp: judged(rollout, penalty=penalty)
      - buffer: recent(exp.rows, 12)
      - for: mini
        in: minibatches(buffer, 4)
        do:
          - update(actor, surrogate(mini) + 0.1 * imitation(mini))
          - set: {drawn: drawn + 1}
      - set: {penalty: "penalty * (1 + clip(exp.kl / target - 1, -0.5, 0.5))"}
"#;

fn pipeline(micro: usize) -> String {
    format!(
        "
dsgc: 1
output_dir: runs
seed: 3
models:
  base:
    model: opt
    tokenizer: {}/examples/rlhf/tokenizer
    config: {{hidden: 16, layers: 1, heads: 2, ffn: 32, max_positions: 32}}
data:
  rows: {{path: rows.jsonl}}
stages:
  replay:
    recipe: ./replay.yaml
    actor: base
    data: rows
    batch_size: 8
    micro_batch_size: {micro}
    max_steps: 6
    learning_rate: 1e-2
    lr_scheduler_type: constant
    logging_steps: 1
",
        env!("CARGO_MANIFEST_DIR")
    )
}

/// The metrics of all steps of a run in micro-batches of so many rows.
fn run(micro: usize) -> Vec<BTreeMap<String, f64>> {
    let folder = tempfile::tempdir().expect("a folder");
    let rows: String = (0..8).map(|i| format!("{{\"prompt\": \"Question {i}\"}}\n")).collect();
    for (name, text) in [("replay.yaml", RECIPE.to_string()), ("pipeline.yaml", pipeline(micro)), ("rows.jsonl", rows)]
    {
        fs::write(folder.path().join(name), text).expect("the folder can be written");
    }
    let ran = Command::new(env!("CARGO_BIN_EXE_dsgc"))
        .current_dir(&folder)
        .args(["run", "pipeline.yaml", "--device", "cpu"])
        .output()
        .expect("dsgc runs");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let text = fs::read_to_string(folder.path().join("runs/replay/metrics.jsonl")).expect("metrics are written");
    let lines = text.lines().map(|line| serde_json::from_str::<BTreeMap<String, Value>>(line).expect("an object"));
    let steps = lines.filter(|line| line.contains_key("epoch"));
    steps.map(|line| line.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect()).collect()
}

#[test]
fn a_new_algorithm_is_a_new_file() {
    let steps = run(8);
    assert_eq!(steps.len(), 6, "{steps:?}");
    for name in ["loss", "surrogate/loss", "surrogate/ratio", "imitation/loss", "reward", "kl", "grad_norm"] {
        assert!(steps[0].contains_key(name), "there is no `{name}` in {:?}", steps[0]);
    }
    // The actor is its own reference at first, and leaves it.
    assert_eq!(steps[0]["kl"], 0.0);
    assert!(steps[5]["kl"] > 0.0, "{steps:?}");
    assert!(steps[5]["reward"] > steps[0]["reward"], "{steps:?}");
    let weighted = steps[5]["surrogate/loss"] + 0.1 * steps[5]["imitation/loss"];
    assert!((steps[5]["loss"] - weighted).abs() < 1e-6, "the loss is the weighted sum: {:?}", steps[5]);
    // However the batch is cut, rewards are compared with those of the whole rollout.
    for (whole, cut) in steps.iter().zip(&run(3)) {
        let (a, b) = (whole["reward"], cut["reward"]);
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }
}
