//! A machine in memory for tests: files by path, model folders and tokenizers by name.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use dsgc_ir::diag::Diag;
use dsgc_yaml::load::{Host, TokenizerFacts};
use serde_json::{Map, Value};

/// Files by path. A `config.json` makes a folder a model's; a `tokenizer.json` is a list `[vocab, pad, eos, bos]`; the
/// first line of a `.jsonl` is a row.
#[derive(Default)]
pub struct Machine {
    pub files: BTreeMap<String, String>,
}

impl Machine {
    pub fn with(mut self, path: &str, text: &str) -> Machine {
        self.files.insert(path.into(), text.into());
        self
    }

    fn find(&self, path: &Path) -> Result<&str, Diag> {
        let name = path.display().to_string();
        self.files.get(&name).map(String::as_str).ok_or_else(|| Diag::error(format!("found no `{name}`")))
    }
}

impl Host for Machine {
    fn text(&self, path: &Path) -> io::Result<String> {
        self.files.get(&path.display().to_string()).cloned().ok_or_else(|| io::Error::other("there is no such file"))
    }

    fn hf_config(&self, folder: &Path) -> Result<Map<String, Value>, Diag> {
        let text = self.find(&folder.join("config.json"))?;
        Ok(serde_json::from_str(text).expect("a test's config.json is an object"))
    }

    fn tokenizer(&self, folder: &Path) -> Result<TokenizerFacts, Diag> {
        let text = self.find(&folder.join("tokenizer.json"))?;
        let (vocab, pad, eos, bos) = serde_json::from_str(text).expect("a test's tokenizer is a list");
        Ok(TokenizerFacts { vocab, pad, eos, bos })
    }

    fn columns(&self, file: &Path) -> Result<Vec<String>, Diag> {
        let first = self.find(file)?.lines().next().unwrap_or("{}");
        let row: Map<String, Value> = serde_json::from_str(first).expect("a test's row is an object");
        Ok(row.keys().cloned().collect())
    }
}

/// A machine with a tokenizer in `tok`, a model folder in `tiny`, and rows in two forms.
pub fn machine() -> Machine {
    Machine::default()
        .with("tok/tokenizer.json", "[100, 1, 2, 2]")
        .with("tiny/tokenizer.json", "[100, 1, 2, 2]")
        .with("tiny/config.json", TINY)
        .with("other.yaml", "recipe: other\nextends: sft\n")
        .with("idle.yaml", "recipe: idle\nextends: sft\nplan: []\n")
        .with("pairs.jsonl", r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#)
        .with("texts.jsonl", r#"{"text": "a"}"#)
}

/// A config.json as transformers writes it.
pub const TINY: &str = r#"{
  "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 104, "hidden_size": 8,
  "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": 64,
  "do_layer_norm_before": true, "word_embed_proj_dim": 8, "activation_function": "relu", "dropout": 0.1,
  "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "torch_dtype": "float16"
}"#;
