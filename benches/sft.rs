//! One optimizer step of supervised fine-tuning: OPT-125m with random weights, f32, a batch of 4 rows of 256 tokens.
//!
//! `cargo bench --bench sft` prints what the pass `fuse` saves, what the device compiles, best and median of 8 steps, and
//! tokens per second. A step is the same work as one of PyTorch's eager mode: forward, backward, clipping, AdamW.

mod common;

use std::time::{Duration, Instant};

use dsgc_ir::cost::graph_cost;
use dsgc_ir::stage::{Statement, UpdateSteps};
use dsgc_ir::{Planned, Program, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget, compile_time};
use dsgc_passes::PassContext;

use common::{Folder, OPT_125M};

const STAGE: &str = "
stages:
  sft:
    model: base
    data: rows
    batch_size: 4
    micro_batch_size: 4
    max_length: 256
    learning_rate: 1e-5
    max_grad_norm: 1.0
";
const ROWS: usize = 4;
const TOKENS: usize = 256;
const STEPS: usize = 8;

fn compile(threads: usize) -> Planned {
    let target = CpuTarget { threads };
    let program = Folder::new(&format!("{OPT_125M}{STAGE}"), 1, TOKENS, true).stages().swap_remove(0);
    let work = |p: &Program| {
        let costs = p.graphs.iter().filter_map(|g| graph_cost(g, &g.upper_bounds()).ok());
        let ops: usize = p.graphs.iter().map(|g| g.len()).sum();
        format!("{ops} ops, {:.3} GB moved", costs.map(|c| c.bytes).sum::<u64>() as f64 / 1e9)
    };
    dsgc_passes::compile(program, &PassContext::new(&target), &mut |step| {
        if step.pass.name == "fuse" {
            println!("fuse: {} -> {} by formula, all graphs once", work(step.before), work(step.after));
        }
    })
    .unwrap_or_else(|diags| panic!("{}", diags[0]))
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let program = compile(threads);
    let Statement::For { body, .. } = &program.stage.plan[0] else { panic!("the plan begins with `for`") };
    let Statement::Update(update) = &body[0] else { panic!("the body is an update") };
    let Some(UpdateSteps::Whole { step }) = update.steps.clone() else { panic!("the batch is one call") };
    let arena = program.arena.total() >> 20;
    let mut device = Cpu::new(program, threads);
    let compiled = compile_time();
    println!("compiled {} fused regions in {:.3} s", compiled.regions, compiled.spent.as_secs_f64());
    device.run("model.init", &[("key", &Tensor::key([0, 42]))]).unwrap_or_else(|e| panic!("{e}"));

    let shape = [ROWS, TOKENS];
    let n = ROWS * TOKENS;
    let tokens = Tensor::i32(&shape, (0..n).map(|i| (i * 7919 % 50265) as i32).collect());
    let segment = Tensor::i32(&shape, vec![1; n]);
    let trained = Tensor::bool(&shape, vec![true; n]);
    let mut times: Vec<Duration> = Vec::new();
    for t in 1..=STEPS + 1 {
        let (lr, t) = (Tensor::f32(&[], vec![1e-5]), Tensor::i32(&[], vec![t as i32]));
        let inputs =
            [("text.tokens", &tokens), ("text.segment", &segment), ("text.trained", &trained), ("lr", &lr), ("t", &t)];
        let started = Instant::now();
        let outputs = device.run(&step, &inputs).unwrap_or_else(|e| panic!("{e}"));
        times.push(started.elapsed());
        let loss = outputs.iter().find(|(name, _)| name == "loss").map_or(f64::NAN, |(_, x)| x.scalar());
        println!("step {:.3} s, loss {loss:.5}", times.last().map_or(0.0, Duration::as_secs_f64));
    }
    // The first step touches all memory for the first time.
    times.remove(0);
    times.sort();
    let (best, median) = (times[0].as_secs_f64(), times[times.len() / 2].as_secs_f64());
    println!("OPT-125m, {ROWS} x {TOKENS} tokens, f32, {threads} threads, {arena} MiB");
    println!("best {best:.3} s, median {median:.3} s: {:.0} tokens/s", n as f64 / median);
}
