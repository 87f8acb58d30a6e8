//! The tiny OPT and the tiny Llama, whose numbers are known from PyTorch (`tests/golden/tiny.rs`), in stages of twenty steps
//! on rows of their own: 24 tokens, the letters from `a` to `t` and four special ones.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

/// Both have weights as large as those whose numbers are known, and layers as many as it takes.
const MODELS: &str = "
dsgc: 1
seed: 7
output_dir: runs
models:
  opt:
    model: opt
    tokenizer: tokenizer
    config: {vocab: VOCABULARY, hidden: 16, layers: LAYERS, heads: 2, ffn: 32, max_positions: 32, init_std: 0.1}
  llama:
    model: llama
    tokenizer: tokenizer
    config:
      {vocab: VOCABULARY, hidden: 16, layers: LAYERS, heads: 4, kv_heads: 2, head_dim: 4, ffn: 24, max_positions: 32, eps: 1e-5,
      init_std: 0.1, tied: false}
data:
  texts: {path: rows.jsonl, eval: 0.25, fields: {text: prompt}}
  prompts: {path: rows.jsonl}
";

/// Decay, a norm of gradients that is cut, held-out rows.
const SFT: &str = "
stages:
  sft:
    model: MODEL
    data: texts
    batch_size: 8
    micro_batch_size: 2
    max_length: 12
    learning_rate: LEARNING_RATE
    max_grad_norm: 0.5
    weight_decay: 0.1
    max_steps: 20
    eval_steps: 10
    logging_steps: 1
";

/// A reference and a reward that nothing trains, an average, other text beside the rollouts, a penalty that follows the divergence,
/// answers that end early, and rows that are left out for it.
const PPO: &str = "
stages:
  ppo:
    actor: {model: MODEL, learning_rate: LEARNING_RATE, warmup_steps: 0}
    critic: {model: MODEL, learning_rate: LEARNING_RATE, warmup_steps: 0}
    data: {prompts: prompts, ptx: texts}
    batch_size: 4
    micro_batch_size: 1
    minibatch_size: 4
    max_prompt_len: 12
    max_new_tokens: 4
    max_steps: 20
    unsup_coef: 1
    enable_ema: true
    kl_target: 0.1
    logging_steps: 1
";

const SPECIAL: [&str; 4] = ["<s>", "<pad>", "</s>", "<unk>"];

/// A metric that is compared in doubles only: a quotient of two variances of a few numbers, each of which is the difference of two
/// sums that are nearly equal, so in single precision it has few digits.
pub const OF_FEW_DIGITS: &str = "critic/explained_variance";

/// One of the models, `opt` or `llama`, in one of the stages, `sft` or `ppo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tiny {
    pub model: &'static str,
    pub stage: &'static str,
    pub layers: usize,
    /// Tokens of the model, of which the tokenizer has the first [`TOKENS`].
    pub vocabulary: usize,
}

/// Tokens of the tokenizer.
pub const TOKENS: usize = 24;

impl Tiny {
    /// Both models in both stages.
    pub fn all(layers: usize) -> [Tiny; 4] {
        [("opt", "sft"), ("llama", "sft"), ("opt", "ppo"), ("llama", "ppo")].map(|(model, stage)| Tiny {
            model,
            stage,
            layers,
            vocabulary: TOKENS,
        })
    }

    /// Its pipeline.
    pub fn pipeline(self, learning_rate: &str) -> String {
        let stage = if self.stage == "sft" { SFT } else { PPO };
        let text = format!("{MODELS}{stage}").replace("LAYERS", &self.layers.to_string());
        let text = text.replace("VOCABULARY", &self.vocabulary.to_string());
        text.replace("MODEL", self.model).replace("LEARNING_RATE", learning_rate)
    }
}

/// Rows of 3 to 11 letters, all of which occur.
pub fn rows() -> Vec<String> {
    let letter = |i: usize, at: usize| char::from(b'a' + ((7 * i + (i % 5 + 1) * at + at * at / 3) % 20) as u8);
    let word = |i: usize| (0..3 + i * 5 % 9).map(|at| letter(i, at)).collect::<String>();
    (0..40).map(|i| json!({"prompt": word(i)}).to_string()).collect()
}

/// Writes the models' tokenizer into a folder with their pipeline: a token for each letter.
pub fn write_tokenizer(folder: &Path) {
    let letters = ('a'..='t').map(String::from);
    let tokens = SPECIAL.into_iter().map(String::from).chain(letters);
    let vocabulary: Map<String, Value> = tokens.zip(0..).map(|(token, id)| (token, Value::from(id))).collect();
    let special = |(id, token): (usize, &&str)| {
        json!({
            "id": id, "content": token, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false
        })
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": SPECIAL.iter().enumerate().map(special).collect::<Vec<_>>(),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []}
    });
    let names = json!({"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"});
    let folder = folder.join("tokenizer");
    fs::create_dir(&folder).expect("a new folder");
    for (file, value) in [("tokenizer.json", tokenizer), ("tokenizer_config.json", names)] {
        fs::write(folder.join(file), value.to_string()).expect("a new file");
    }
}
