//! One iteration of PPO: four OPT-125m (actor, reference, critic, reward model) with random weights, f32, 4 prompts of 128
//! tokens and greedy answers of 128, one optimizer step of the actor and one of the critic.
//!
//! `cargo bench --bench ppo` prints best and median of 4 iterations, and what of the time goes where. The work is that of
//! one experience and one training call of DeepSpeed-Chat's `DeepSpeedPPOTrainer`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use dsgc_hf::Tokenizer;
use dsgc_ir::diag::Diag;
use dsgc_ir::{StateId, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_passes::PassContext;
use dsgc_runtime::{Event, Session};
use dsgc_yaml::load::{Host, Options, TokenizerFacts, load};
use dsgc_yaml::render::{Look, render};
use serde_json::{Map, Value, json};

/// facebook/opt-125m by its config.json, without dropout.
const PIPELINE: &str = "
dsgc: 1
models:
  base:
    model: opt
    tokenizer: tokenizer
    config: {vocab: 50272, hidden: 768, layers: 12, heads: 12, ffn: 3072, max_positions: 2048}
data:
  rows: {path: rows.jsonl, shuffle: none}
stages:
  ppo:
    actor: {model: base, warmup_steps: 0}
    critic: {model: base, warmup_steps: 0}
    data: rows
    batch_size: 4
    minibatch_size: 4
    micro_batch_size: 4
    max_prompt_len: 128
    max_new_tokens: 128
    greedy: true
    save: []
";
const ROWS: usize = 4;
const PROMPT: usize = 128;
const ITERATIONS: usize = 5;

/// The folder of the pipeline.
struct Disk(PathBuf);

impl Host for Disk {
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

/// Seconds by graph.
type Times = Rc<RefCell<BTreeMap<String, f64>>>;

/// A device that notes how long each graph takes.
struct Timed {
    device: Cpu,
    times: Times,
}

impl Device for Timed {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn set_state(&mut self, id: StateId, value: &Tensor) {
        self.device.set_state(id, value);
    }
    fn state(&self, id: StateId) -> Tensor {
        self.device.state(id)
    }
    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, Diag> {
        let started = Instant::now();
        let outputs = self.device.run(graph, inputs);
        *self.times.borrow_mut().entry(graph.into()).or_default() += started.elapsed().as_secs_f64();
        outputs
    }
}

/// Writes the pipeline, a tokenizer whose words are numbers and that has no end token, and rows of random words.
fn files(folder: &Path) -> io::Result<()> {
    let words: Map<String, Value> = (0..50265).map(|i| (format!("w{i}"), i.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w3"},
    });
    fs::create_dir_all(folder.join("tokenizer"))?;
    fs::write(folder.join("tokenizer/tokenizer.json"), tokenizer.to_string())?;
    fs::write(folder.join("tokenizer/tokenizer_config.json"), json!({"pad_token": "w1"}).to_string())?;
    fs::write(folder.join("pipeline.yaml"), PIPELINE)?;
    let row = |r: usize| (0..PROMPT).map(move |i| format!("w{}", 5 + (r * PROMPT + i) * 7919 % 50000));
    let rows = (0..ROWS * ITERATIONS).map(|r| json!({"prompt": row(r).collect::<Vec<_>>().join(" ")}).to_string());
    fs::write(folder.join("rows.jsonl"), rows.collect::<Vec<_>>().join("\n"))
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let folder = tempfile::tempdir().expect("a temporary folder");
    files(folder.path()).expect("files in a temporary folder");
    let disk = Disk(folder.path().into());
    let loaded = load(&disk.0.join("pipeline.yaml"), &Options::default(), &disk)
        .unwrap_or_else(|failed| panic!("{}", render(&failed.diags, &failed.sources, Look::Plain)));
    let mut program = loaded.stages.into_iter().next().expect("there is one stage");
    program.stage.output_dir = folder.path().join("out").display().to_string();
    let target = CpuTarget { threads };
    let planned = dsgc_passes::compile(program, &PassContext::new(&target), &mut |_| {})
        .unwrap_or_else(|diags| panic!("{}", diags[0]));
    let arena = planned.arena.total() >> 20;
    let times = Times::default();
    let device = Timed { device: Cpu::new(planned.clone(), threads), times: Rc::clone(&times) };
    let mut session = Session::open(planned, Box::new(device), &mut |_| Ok(())).unwrap_or_else(|e| panic!("{}", e[0]));
    times.borrow_mut().clear();

    // Per iteration: seconds in all, and by part.
    let mut all: Vec<(f64, [f64; 3])> = Vec::new();
    session
        .run(&mut |event| {
            if let Event::Step { seconds, metrics, .. } = event {
                let mut parts = [0.0; 3];
                for (graph, seconds) in std::mem::take(&mut *times.borrow_mut()) {
                    let part = match graph.as_str() {
                        "actor.prefill" | "actor.step" => 0,
                        "experience" => 1,
                        _ => 2,
                    };
                    parts[part] += seconds;
                }
                let [generate, score, train] = parts;
                let loss = metrics["actor/loss"];
                println!("iteration {seconds:.3} s: generate {generate:.3}, score {score:.3}, train {train:.3}; actor loss {loss:.5}");
                all.push((*seconds, parts));
            }
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
    // The first iteration touches all memory for the first time.
    all.remove(0);
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (best, median) = (all[0].0, all[all.len() / 2].0);
    println!("OPT-125m, {ROWS} prompts of {PROMPT} tokens, 128 new ones, f32, {threads} threads, {arena} MiB");
    println!("best {best:.3} s, median {median:.3} s");
}
