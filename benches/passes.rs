//! How long the compiler takes: every pass by itself, and all of them, over the three stages of OPT-125m and over a Llama
//! of 96 layers.
//!
//! `cargo bench --bench passes [NAME]`.

mod common;

use std::hint::black_box;

use criterion::{BatchSize, Criterion};
use dsgc_ir::Program;
use dsgc_kernels::cpu::CpuTarget;
use dsgc_passes::{PIPELINE, PassContext, compile};

use common::{Folder, OPT_125M};

const STAGES: &str = "
stages:
  sft: {model: base, data: rows, batch_size: 4, max_length: 256}
  reward: {reward: base, data: rows, batch_size: 4, max_length: 256}
  ppo:
    actor: base
    critic: base
    data: rows
    batch_size: 4
    minibatch_size: 4
    max_prompt_len: 128
    max_new_tokens: 128
";

const DEEP: &str = "
dsgc: 1
models:
  base:
    model: llama
    tokenizer: tokenizer
    config: {vocab: 50272, hidden: 2048, layers: 96, heads: 16, kv_heads: 16, head_dim: 128, ffn: 5632}
data:
  rows: {path: rows.jsonl}
stages:
  sft: {model: base, data: rows, batch_size: 4, max_length: 256}
";

fn passes(criterion: &mut Criterion) {
    let target = CpuTarget { threads: 2 };
    let opt = Folder::new(&format!("{OPT_125M}{STAGES}"), 1, 16, true).stages();
    let deep = Folder::new(DEEP, 1, 16, true).stages();
    let named = |prefix: &'static str| move |p: Program| (format!("{prefix}/{}", p.stage.name), p);
    for (name, program) in opt.into_iter().map(named("opt-125m")).chain(deep.into_iter().map(named("llama-96"))) {
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10);
        let mut before = program.clone();
        for (i, pass) in PIPELINE.iter().enumerate() {
            let run = |program| {
                (pass.run)(program, &PassContext::new(&target)).unwrap_or_else(|diags| panic!("{}", diags[0]))
            };
            // Some passes run twice: their place tells which one it is.
            group.bench_function(format!("{i} {}", pass.name), |bench| {
                bench.iter_batched(|| before.clone(), |program| black_box(run(program)), BatchSize::PerIteration);
            });
            before = run(before);
        }
        group.bench_function("all", |bench| {
            let all = |program| {
                let planned = compile(program, &PassContext::new(&target), &mut |_| {});
                planned.unwrap_or_else(|diags| panic!("{}", diags[0]))
            };
            bench.iter_batched(|| program.clone(), |program| black_box(all(program)), BatchSize::PerIteration);
        });
        group.finish();
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    passes(&mut criterion);
    criterion.final_summary();
}
