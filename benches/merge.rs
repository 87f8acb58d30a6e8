//! What the pass `merge` saves, or products that regions finish: one optimizer step with it and without, interleaved in one
//! process.
//!
//! `cargo bench --bench merge [-- <model>] [finish]` prints for a model (`tiny`, `llama`, `opt`; the first two without an
//! argument) the kernels of a step, the memory that is planned, and the best and the median of several steps of each, f32,
//! random weights.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use dsgc_ir::diag::Diag;
use dsgc_ir::op::Class;
use dsgc_ir::stage::{Statement, UpdateSteps};
use dsgc_ir::{Bindings, Graph, Op, Planned, Program, Target, Tensor, Type, parse};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_passes::{PIPELINE, PassContext, merge, plan_memory};
use dsgc_yaml::load::{Host, Options, TokenizerFacts, load};
use dsgc_yaml::render::{Look, render};
use serde_json::{Map, Value};

/// A model, and the batch that it is trained on.
struct Case {
    name: &'static str,
    model: &'static str,
    vocab: usize,
    rows: usize,
    tokens: usize,
    /// Steps of which the best counts.
    steps: usize,
}

const CASES: &[Case] = &[
    Case {
        name: "tiny",
        model: "{model: llama, tokenizer: t, config: {vocab: 512, hidden: 64, layers: 4, heads: 4, kv_heads: 4, \
                head_dim: 16, ffn: 128, tied: true}}",
        vocab: 512,
        rows: 4,
        tokens: 16,
        steps: 200,
    },
    // The sizes of stories15M.
    Case {
        name: "llama",
        model: "{model: llama, tokenizer: t, config: {vocab: 32000, hidden: 288, layers: 6, heads: 6, kv_heads: 6, \
                head_dim: 48, ffn: 768, tied: true}}",
        vocab: 32000,
        rows: 8,
        tokens: 256,
        steps: 6,
    },
    // facebook/opt-125m by its config.json.
    Case {
        name: "opt",
        model: "{model: opt, tokenizer: t, config: {vocab: 50272, hidden: 768, layers: 12, heads: 12, ffn: 3072, \
                max_positions: 2048}}",
        vocab: 50265,
        rows: 4,
        tokens: 256,
        steps: 5,
    },
];

/// A machine with nothing on it but the pipeline of a case.
struct Bare<'a>(&'a Case);

impl Host for Bare<'_> {
    fn text(&self, _: &Path) -> io::Result<String> {
        let Case { model, rows, tokens, .. } = self.0;
        Ok(format!(
            "
dsgc: 1
models:
  base: {model}
data:
  rows: {{path: rows.jsonl}}
stages:
  sft: {{model: base, data: rows, batch_size: {rows}, micro_batch_size: {rows}, max_length: {tokens}, max_grad_norm: 1.0}}
"
        ))
    }
    fn hf_config(&self, _: &Path) -> Result<Map<String, Value>, Diag> {
        Err(Diag::error("there is no folder"))
    }
    fn tokenizer(&self, _: &Path) -> Result<TokenizerFacts, Diag> {
        Ok(TokenizerFacts { vocab: self.0.vocab, pad: Some(1), eos: Some(2), bos: Some(2) })
    }
    fn columns(&self, _: &Path) -> Result<Vec<String>, Diag> {
        Ok(vec!["text".into()])
    }
}

/// What a step is compared without.
#[derive(Clone, Copy, PartialEq)]
enum Without {
    Nothing,
    Merge,
    Finish,
}

/// A CPU that finishes no products.
struct Unfinished(CpuTarget);

impl Target for Unfinished {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn alignment(&self) -> usize {
        self.0.alignment()
    }
    fn missing_kernel(&self, op: &Op, args: &[Type]) -> Option<String> {
        if matches!(op, Op::ContractFused { .. }) { Some(String::new()) } else { self.0.missing_kernel(op, args) }
    }
    fn workspace(&self, op: &Op, args: &[Type], bounds: &Bindings) -> usize {
        self.0.workspace(op, args, bounds)
    }
    fn memory(&self) -> Option<usize> {
        self.0.memory()
    }
}

/// The case's only stage, planned with all passes, or without something.
fn plan(case: &Case, threads: usize, without: Without) -> Planned {
    let loaded = load(Path::new("bench.yaml"), &Options::default(), &Bare(case))
        .unwrap_or_else(|failed| panic!("{}", render(&failed.diags, &failed.sources, Look::Plain)));
    let mut program: Program = loaded.stages.into_iter().next().expect("there is one stage");
    let cpu = CpuTarget { threads };
    let unfinished = Unfinished(cpu);
    let target: &dyn Target = if without == Without::Finish { &unfinished } else { &cpu };
    for pass in PIPELINE.iter().filter(|pass| without != Without::Merge || pass.name != "merge") {
        program = (pass.run)(program, &PassContext::new(target)).unwrap_or_else(|diags| panic!("{}", diags[0]));
    }
    Planned::new(program).unwrap_or_else(|fault| panic!("{fault}"))
}

/// The graph of an optimizer step.
fn step_of(program: &Program) -> String {
    let Statement::For { body, .. } = &program.stage.plan[0] else { panic!("the plan begins with `for`") };
    let Statement::Update(update) = &body[0] else { panic!("the body is an update") };
    let Some(UpdateSteps::Whole { step }) = update.steps.clone() else { panic!("the batch is one call") };
    step
}

fn kernels(graph: &Graph) -> usize {
    graph.ops().filter(|(_, op)| !matches!(op.op.class(), Class::View | Class::State)).count()
}

fn run(case: &Case, threads: usize, without: Without) {
    println!("{}: {} x {} tokens, f32, {threads} threads", case.name, case.rows, case.tokens);
    let plans = [without, Without::Nothing].map(|without| plan(case, threads, without));
    let step = step_of(&plans[0]);
    let mut devices = plans.map(|plan| {
        let (mib, graph) =
            (|bytes: usize| bytes as f64 / f64::from(1 << 20), plan.graph(&step).expect("it is planned"));
        let arena = plan.arena;
        println!(
            "  {} kernels, {:.1} MiB = states {:.1} + values {:.1} + workspace {:.1}",
            kernels(graph),
            mib(arena.total()),
            mib(arena.persistent),
            mib(arena.values),
            mib(arena.scratch)
        );
        let mut device = Cpu::new(plan, threads);
        device.run("model.init", &[("key", &Tensor::key([0, 42]))]).unwrap_or_else(|e| panic!("{e}"));
        device
    });
    let (shape, n) = ([case.rows, case.tokens], case.rows * case.tokens);
    let tokens = Tensor::i32(&shape, (0..n).map(|i| (i * 7919 % case.vocab) as i32).collect());
    let (segment, trained) = (Tensor::i32(&shape, vec![1; n]), Tensor::bool(&shape, vec![true; n]));
    let mut times = [Vec::new(), Vec::new()];
    // The first step touches all memory for the first time.
    for t in 1..=case.steps + 1 {
        let (lr, at) = (Tensor::f32(&[], vec![1e-5]), Tensor::i32(&[], vec![t as i32]));
        let inputs =
            [("text.tokens", &tokens), ("text.segment", &segment), ("text.trained", &trained), ("lr", &lr), ("t", &at)];
        let mut losses = Vec::new();
        for (device, times) in devices.iter_mut().zip(&mut times) {
            let started = Instant::now();
            let outputs = device.run(&step, &inputs).unwrap_or_else(|e| panic!("{e}"));
            if t > 1 {
                times.push(started.elapsed().as_secs_f64());
            }
            losses.extend(outputs.iter().find(|(name, _)| name == "loss").map(|(_, x)| x.scalar()));
        }
        assert!((losses[0] - losses[1]).abs() < 1e-5 * losses[0].abs(), "losses {losses:?}");
    }
    times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    for (what, at) in [("best", 0), ("median", case.steps / 2)] {
        let [without, with] = [&times[0], &times[1]].map(|times| 1e3 * times[at]);
        println!("  {what} of {}: {without:.3} ms without, {with:.3} ms with: {:.3}", case.steps, without / with);
    }
}

/// Queries, keys and values of a few rows, as a step of decoding makes them: three products, and the same in one op.
fn few_rows(width: usize, threads: usize) {
    let names = ["q", "k", "v"];
    let lines = |line: &dyn Fn(&str) -> String| names.iter().map(|name| line(name)).collect::<String>();
    let text = format!(
        "{}graph @apart(%x: f32[4, {width}]) {{
{}{}  return a=%qx, b=%kx, c=%vx
}}
",
        lines(&|name| format!("param @model/{name} : f32[{width}, {width}]\n")),
        lines(&|name| format!("  %{name} = read @model/{name}\n")),
        lines(&|name| format!("  %{name}x = contract %x, %{name} spec=bd,vd->bv\n"))
    );
    let target = CpuTarget { threads };
    let mut best = [Duration::MAX; 2];
    let apart = parse(&text).unwrap_or_else(|e| panic!("{e}"));
    let merged = merge::run(apart.clone(), &PassContext::new(&target)).unwrap_or_else(|diags| panic!("{}", diags[0]));
    let mut devices = [apart, merged].map(|program| {
        let planned =
            plan_memory::run(program, &PassContext::new(&target)).unwrap_or_else(|diags| panic!("{}", diags[0]));
        Cpu::new(Planned::new(planned).unwrap_or_else(|fault| panic!("{fault}")), threads)
    });
    let x = Tensor::f32(&[4, width], (0..4 * width).map(|i| (i % 7) as f32).collect());
    let inputs = [("x", &x)];
    for _ in 0..500 {
        for (device, best) in devices.iter_mut().zip(&mut best) {
            let started = Instant::now();
            device.run("apart", &inputs).unwrap_or_else(|e| panic!("{e}"));
            *best = started.elapsed().min(*best);
        }
    }
    let [apart, merged] = best.map(|t| 1e6 * t.as_secs_f64());
    println!("3 products of 4 rows, {width} wide: {apart:.1} us apart, {merged:.1} us in one");
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let finish = wanted.iter().any(|arg| arg == "finish");
    wanted.retain(|arg| arg != "finish");
    let named = |case: &&Case| match &wanted[..] {
        [] => case.name != "opt",
        names => names.iter().any(|name| name == case.name),
    };
    let without = if finish { Without::Finish } else { Without::Merge };
    CASES.iter().filter(named).for_each(|case| run(case, threads, without));
    if !finish {
        [288, 768].into_iter().for_each(|width| few_rows(width, threads));
    }
}
