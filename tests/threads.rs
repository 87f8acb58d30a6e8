//! The CPU's threads change no bit: whole stages, compiled for one, two and three of them, of models that are wide enough for
//! kernels to be shared out.

use dsgc_runtime::Metrics;

#[allow(dead_code)] // Other tests use the rest.
mod stages;

use stages::{Ran, cpu};

const PIPELINE: &str = "
dsgc: 1
seed: 7
models:
  opt: {model: opt, tokenizer: TOKENIZER, config: {hidden: 192, layers: 2, heads: 6, ffn: 520, max_positions: 64}}
  llama: {model: llama, tokenizer: TOKENIZER, config: {hidden: 192, layers: 2, heads: 6, kv_heads: 2, ffn: 456, max_positions: 64}}
data:
  pairs: {path: rows.jsonl}
";

/// Rows of several lengths.
fn rows() -> Vec<String> {
    let row = |i: usize| {
        let (question, more) = ("Is it so? ".repeat(1 + i % 3), "no ".repeat(i % 4));
        format!("{{\"prompt\": \"{question}\", \"chosen\": \"Yes, {i}.\", \"rejected\": \"{more}{i}\"}}")
    };
    (0..16).map(row).collect()
}

/// Every metric of every step, and all parameters and states at the end, as bits.
fn bits((steps, states): Ran) -> (Vec<Metrics>, Vec<(String, Vec<u64>)>) {
    let of =
        |(name, tensor): (String, dsgc_ir::Tensor)| (name, tensor.to_f64().into_iter().map(f64::to_bits).collect());
    (steps, states.into_iter().map(of).collect())
}

/// Both models in a stage, with settings.
fn alike(stage: &str) {
    for model in ["opt", "llama"] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = format!(
            "{PIPELINE}stages:\n  stage: {{{}, max_steps: 2, logging_steps: 1}}\n",
            stage.replace("MODEL", model)
        );
        let program = stages::program(folder.path(), &text, &rows(), &[]);
        let one = bits(cpu(&program, 1, None));
        assert!(!one.0.is_empty() && one.1.len() > 20);
        for threads in [2, 3] {
            let found = bits(cpu(&program, threads, None));
            assert_eq!(found.0, one.0, "metrics of {model} with {threads} threads: {stage}");
            let other = found.1.iter().zip(&one.1).find(|(found, one)| found != one);
            assert!(other.is_none(), "`{}` of {model} with {threads} threads: {stage}", other.expect("some").0.0);
        }
    }
}

#[test]
fn of_fine_tuning() {
    alike(
        "recipe: sft, model: MODEL, data: pairs, max_length: 48, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-2, max_grad_norm: 0.5",
    );
}

#[test]
fn of_mixed_precision() {
    for narrow in ["bf16", "fp16"] {
        alike(&format!(
            "recipe: sft, model: MODEL, data: pairs, max_length: 48, batch_size: 8, learning_rate: 1e-2, {narrow}: true"
        ));
    }
}

#[test]
fn of_reward_models() {
    alike("recipe: reward, reward: {model: MODEL}, data: pairs, max_length: 48, batch_size: 8, learning_rate: 1e-2");
}

#[test]
fn of_preferences_with_low_rank_factors() {
    alike(
        "recipe: dpo, policy: {model: MODEL, lora_r: 4, lora_dropout: 0.1}, data: pairs, max_length: 48, batch_size: 8, learning_rate: 1e-2",
    );
}

#[test]
fn of_reinforcement() {
    alike(
        "recipe: ppo, actor: {model: MODEL, learning_rate: 1e-2}, critic: {model: MODEL, learning_rate: 1e-2}, data: pairs, \
         batch_size: 8, micro_batch_size: 4, minibatch_size: 4, max_prompt_len: 24, max_new_tokens: 8",
    );
}
