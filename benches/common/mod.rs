//! What benchmarks of pipelines share: a folder with a pipeline, its rows and a tokenizer, and what the loader makes of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dsgc_hf::Tokenizer;
use dsgc_ir::Program;
use dsgc_ir::diag::Diag;
use dsgc_yaml::load::{Host, Options, TokenizerFacts, load};
use dsgc_yaml::render::{Look, render};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// facebook/opt-125m by its config.json, without dropout, as the model `base`; random weights.
pub const OPT_125M: &str = "
dsgc: 1
models:
  base:
    model: opt
    tokenizer: tokenizer
    config: {vocab: 50272, hidden: 768, layers: 12, heads: 12, ffn: 3072, max_positions: 2048}
data:
  rows: {path: rows.jsonl, shuffle: none}
";

/// Words that the tokenizer knows.
const WORDS: usize = 50265;

/// A folder with a pipeline, which goes away with it.
pub struct Folder(TempDir);

impl Folder {
    /// A folder with this pipeline and rows of random words, each with a prompt of so many, and answers to it. Words are
    /// numbers; texts end with a token only if `ends`.
    ///
    /// # Panics
    /// If no temporary folder can be written.
    pub fn new(pipeline: &str, rows: usize, prompt: usize, ends: bool) -> Folder {
        let folder = Folder(tempfile::tempdir().expect("a temporary folder"));
        folder.fill(pipeline, rows, prompt, ends).expect("files in a temporary folder");
        folder
    }

    fn fill(&self, pipeline: &str, rows: usize, prompt: usize, ends: bool) -> io::Result<()> {
        let words: Map<String, Value> = (0..WORDS).map(|i| (format!("w{i}"), i.into())).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "w3"},
        });
        let special = if ends { json!({"pad_token": "w1", "eos_token": "w2"}) } else { json!({"pad_token": "w1"}) };
        let path = |name: &str| self.path().join(name);
        fs::create_dir(path("tokenizer"))?;
        fs::write(path("tokenizer/tokenizer.json"), tokenizer.to_string())?;
        fs::write(path("tokenizer/tokenizer_config.json"), special.to_string())?;
        fs::write(path("pipeline.yaml"), pipeline)?;
        let text = |row: usize| {
            let words = (0..prompt).map(|i| format!("w{}", 5 + (row * prompt + i) * 7919 % 50000));
            words.collect::<Vec<_>>().join(" ")
        };
        let rows = (0..rows).map(|r| {
            let row = json!({"prompt": text(r), "chosen": text(r + rows), "rejected": text(r + 2 * rows)});
            row.to_string()
        });
        fs::write(path("rows.jsonl"), rows.collect::<Vec<_>>().join("\n"))
    }

    fn path(&self) -> PathBuf {
        self.0.path().into()
    }

    /// The programs of all stages.
    ///
    /// # Panics
    /// If the pipeline is wrong, with the loader's messages.
    pub fn stages(&self) -> Vec<Program> {
        let loaded = load(&self.path().join("pipeline.yaml"), &Options::default(), self)
            .unwrap_or_else(|failed| panic!("{}", render(&failed.diags, &failed.sources, Look::Plain)));
        let mut stages = loaded.stages;
        for program in &mut stages {
            program.stage.output_dir = self.path().join("out").join(&program.stage.name).display().to_string();
        }
        stages
    }
}

impl Host for Folder {
    fn text(&self, path: &Path) -> io::Result<String> {
        fs::read_to_string(path)
    }
    fn hf_config(&self, _: &Path) -> Result<Map<String, Value>, Diag> {
        Err(Diag::error("there is no model"))
    }
    fn tokenizer(&self, folder: &Path) -> Result<TokenizerFacts, Diag> {
        let tokenizer = Tokenizer::load(folder)?;
        Ok(TokenizerFacts { vocab: tokenizer.vocab_size(), pad: tokenizer.pad(), eos: tokenizer.eos(), bos: None })
    }
    fn columns(&self, file: &Path) -> Result<Vec<String>, Diag> {
        dsgc_runtime::data::columns_of_file(&file.to_string_lossy())
    }
}
