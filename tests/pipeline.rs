//! Ranks with different layers beside one: the same numbers in every schedule.

use std::collections::BTreeMap;
use std::path::Path;

use dsgc_ir::diag::Diag;
use dsgc_ir::schedule::{PipelineOrder, Work};
use dsgc_ir::{Axis, Mesh, Planned, Program, StateId, StateKind, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_kernels::ranks::Member;
use dsgc_passes::PassContext;
use dsgc_runtime::{Event, Metrics, Session, on_threads};

#[allow(dead_code)] // Other tests use the rest.
mod stages;

const SFT: &str = "
dsgc: 1
seed: 7
models:
  opt: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 4, heads: 2, ffn: 32, max_positions: 32}}
  llama:
    model: llama
    tokenizer: TOKENIZER
    config: {hidden: 16, layers: 4, heads: 4, kv_heads: 2, ffn: 32, max_positions: 32}
data:
  texts: {path: rows.jsonl, eval: 0.25, fields: {text: prompt}}
stages:
  sft:
    model: opt
    data: texts
    batch_size: 8
    micro_batch_size: 2
    max_length: 24
    learning_rate: 1e-2
    max_grad_norm: 0.5
    weight_decay: 0.1
    max_steps: 5
    eval_steps: 3
";

const PPO: &str = "
dsgc: 1
seed: 7
models:
  base: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 48}}
data:
  prompts: {path: rows.jsonl}
  texts: {path: rows.jsonl, fields: {text: prompt}}
stages:
  ppo:
    actor: {model: base, learning_rate: 1e-2, warmup_steps: 0}
    critic: {model: base, learning_rate: 1e-2, warmup_steps: 0}
    data: {prompts: prompts, ptx: texts}
    batch_size: 5
    micro_batch_size: 2
    minibatch_size: 3
    max_prompt_len: 20
    max_new_tokens: 6
    max_steps: 3
    unsup_coef: 1
    enable_ema: true
    kl_target: 0.1
    min_answer: 6
";

const DPO: &str = "
dsgc: 1
seed: 7
models:
  base: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 48}}
data:
  pairs: {path: rows.jsonl, eval: 0.2}
stages:
  dpo: {policy: base, data: pairs, learning_rate: 1e-2, max_steps: 6, batch_size: 8, micro_batch_size: 2, max_length: 24}
";

fn program(folder: &Path, pipeline: &str, sets: &[&str]) -> Program {
    let row = |i: usize| {
        let more = " and more".repeat(i % 4);
        format!("{{\"prompt\": \"Question {i}{more}?\", \"chosen\": \" Yes.\", \"rejected\": \" {i} is not.\"}}")
    };
    let rows: Vec<String> = (0..40).map(row).collect();
    stages::program(folder, pipeline, &rows, sets)
}

/// The plans of all places.
fn planned(program: &Program, context: &PassContext) -> Vec<Planned> {
    let at = |place| stages::compile(&Program { place, ..program.clone() }, context, None);
    (0..program.mesh.pipeline).map(at).collect()
}

/// What is left of a stage, the same on all ranks.
#[derive(Clone, Debug, PartialEq)]
struct Ran {
    steps: Vec<Metrics>,
    evaluations: Vec<Metrics>,
    /// Parameters and states, whole.
    states: BTreeMap<String, Tensor>,
}

fn run_on(planned: &[Planned], open: &(dyn Fn(&Planned, &Member) -> Box<dyn Device> + Sync)) -> Ran {
    let mesh = planned[0].mesh;
    let rank = |member: Member| -> Result<Ran, Vec<Diag>> {
        let planned = &planned[mesh.place(Axis::Pipeline, member.rank())];
        let device = open(planned, &member);
        let mut session = Session::open_as(planned.clone(), device, member, &mut |_| Ok(()))?;
        let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
        let ended = session.run(&mut |event| {
            match event {
                Event::Step { metrics, .. } => steps.push(metrics.clone()),
                Event::Evaluated { metrics, .. } => evaluations.push(metrics.clone()),
                _ => {}
            }
            Ok(())
        });
        ended.map_err(|e| vec![e])?;
        let lasts = |kind| matches!(kind, StateKind::Param { .. } | StateKind::State);
        let ids: Vec<(StateId, String)> =
            planned.state_ids().filter(|(_, s)| lasts(s.kind)).map(|(id, s)| (id, s.name.clone())).collect();
        let states = ids.into_iter().map(|(id, name)| Ok((name, session.state(id)?)));
        let states = states.collect::<Result<_, Diag>>().map_err(|e| vec![e])?;
        Ok(Ran { steps, evaluations, states })
    };
    let mut all =
        on_threads(mesh, rank, |errors: &Vec<Diag>| errors[0].message.clone()).unwrap_or_else(|e| panic!("{e:?}"));
    for (rank, other) in all.iter().enumerate() {
        assert!(*other == all[0], "rank {rank} has other numbers than the first one");
    }
    all.swap_remove(0)
}

fn in_doubles(program: &Program) -> Ran {
    run_on(&planned(program, &PassContext::new(&InterpTarget)), &|planned, member| {
        Box::new(Interp::planned(planned.clone(), Precision::F64).as_member(member.clone()))
    })
}

/// The program on so many ranks.
fn on(program: &Program, mesh: Mesh, order: PipelineOrder) -> Program {
    let mut program = Program { mesh, ..program.clone() };
    program.stage.pipeline_order = order;
    program
}

fn in_line(pipeline: usize) -> Mesh {
    Mesh { pipeline, ..Mesh::default() }
}

/// The largest difference of the metrics, each relative to itself, and of the states, relative to their largest elements.
fn difference(a: &Ran, b: &Ran) -> (f64, f64) {
    let of_metrics = |a: &[Metrics], b: &[Metrics]| {
        assert_eq!(a.len(), b.len());
        let metric = |(a, b): (&Metrics, &Metrics)| {
            assert!(a.keys().eq(b.keys()), "{a:?} and {b:?}");
            let apart = |(x, y): (&f64, &f64)| (x - y).abs() / x.abs().max(y.abs()).max(1e-3);
            a.values().zip(b.values()).map(apart).fold(0.0, f64::max)
        };
        a.iter().zip(b).map(metric).fold(0.0, f64::max)
    };
    let metrics = of_metrics(&a.steps, &b.steps).max(of_metrics(&a.evaluations, &b.evaluations));
    assert!(a.states.keys().eq(b.states.keys()));
    // The gradient of this bias is zero in exact arithmetic: its steps follow rounding errors.
    let meant = a.states.iter().filter(|(name, _)| !name.contains("k_proj.bias"));
    let of_state = |(name, a): (&String, &Tensor)| {
        let b = &b.states[name];
        assert_eq!(a.shape, b.shape, "{name}");
        let (a, b) = (a.to_f64(), b.to_f64());
        let largest = a.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        a.iter().zip(&b).map(|(x, y)| (x - y).abs() / largest).fold(0.0, f64::max)
    };
    (metrics, meant.map(of_state).fold(0.0, f64::max))
}

fn assert_near(found: &Ran, expected: &Ran, bound: f64, what: &str) {
    let (metrics, states) = difference(found, expected);
    assert!(metrics <= bound && states <= bound, "{what}: metrics differ by {metrics:e}, states by {states:e}");
}

/// Every mesh and schedule beside one rank.
fn every_layout(pipeline: &str, sets: &[&str], layouts: &[(Mesh, PipelineOrder)]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), pipeline, sets);
    let one = in_doubles(&program);
    for &(mesh, order) in layouts {
        let found = in_doubles(&on(&program, mesh, order));
        assert_near(&found, &one, 1e-9, &format!("{mesh}, {}", order.name()));
    }
}

fn all_orders(places: &[usize]) -> Vec<(Mesh, PipelineOrder)> {
    places.iter().flat_map(|&places| PipelineOrder::ALL.map(|order| (in_line(places), order))).collect()
}

#[test]
fn gpipe_on_two_ranks_has_one_ranks_numbers() {
    every_layout(SFT, &[], &[(in_line(2), PipelineOrder::Gpipe)]);
}

/// The table of tokens is at the first place, where it is read, and at the last one, whose head it is.
#[test]
fn sft_of_opt_has_one_ranks_numbers() {
    every_layout(SFT, &[], &all_orders(&[2, 4]));
}

/// Heads of their own; five rows in parts of two, and three places for four layers.
#[test]
fn sft_of_llama_has_one_ranks_numbers() {
    every_layout(SFT, &["stages.sft.model=llama", "stages.sft.batch_size=5"], &all_orders(&[3]));
}

#[test]
fn lora_and_dropout_have_one_ranks_numbers() {
    let sets = ["stages.sft.lora_r=16", "stages.sft.lora_dropout=0.5"];
    every_layout(SFT, &sets, &[(in_line(2), PipelineOrder::OneForwardOneBackward)]);
}

#[test]
fn recomputed_layers_have_one_ranks_numbers() {
    let sets = ["compile.gradient_checkpointing=true"];
    every_layout(SFT, &sets, &[(in_line(2), PipelineOrder::ZeroBubble)]);
}

#[test]
fn ppo_has_one_ranks_numbers() {
    every_layout(PPO, &[], &[(in_line(2), PipelineOrder::OneForwardOneBackward)]);
}

#[test]
fn dpo_has_one_ranks_numbers() {
    every_layout(DPO, &[], &[(in_line(2), PipelineOrder::OneForwardOneBackward)]);
}

/// Ranks with other rows and other layers, and what they share out.
#[test]
fn rows_and_layers_are_shared_out_together() {
    let mesh = Mesh { data: 2, ..in_line(2) };
    every_layout(SFT, &[], &[(mesh, PipelineOrder::OneForwardOneBackward)]);
    every_layout(SFT, &["compile.zero_stage=3"], &[(mesh, PipelineOrder::ZeroBubble)]);
    let mesh = Mesh { tensor: 2, ..in_line(2) };
    every_layout(SFT, &[], &[(mesh, PipelineOrder::OneForwardOneBackward)]);
}

#[test]
fn the_cpu_has_the_doubles_numbers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), SFT, &[]);
    let one = in_doubles(&program);
    let target = CpuTarget { threads: 1 };
    let plans = planned(&on(&program, in_line(2), PipelineOrder::OneForwardOneBackward), &PassContext::new(&target));
    let found =
        run_on(&plans, &|planned, member| Box::new(Cpu::poisoned(planned.clone(), 1).as_member(member.clone())));
    let metrics = |ran: &Ran| ran.steps.iter().map(|step| step["loss"]).collect::<Vec<f64>>();
    for (a, b) in metrics(&found).iter().zip(metrics(&one)) {
        assert!((a - b).abs() <= 1e-4 * b.abs(), "{a} and {b}");
    }
}

/// Each place has its own layers' states and no others, and one piece for each kind of work on a part.
#[test]
fn places_have_their_own_layers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), SFT, &[]);
    for order in PipelineOrder::ALL {
        let plans = planned(&on(&program, in_line(2), order), &PassContext::new(&InterpTarget));
        let has = |place: usize, name: &str| {
            let (_, state) = plans[place].state_ids().find(|(_, s)| s.name.ends_with(name)).expect("it is a state");
            state.bytes() > 0
        };
        let at = |name: &str| [has(0, name), has(1, name)];
        assert_eq!(at("layers.1.fc1.weight"), [true, false]);
        assert_eq!(at("layers.2.fc1.weight.m"), [false, true]);
        assert_eq!(at("embed_positions.weight"), [true, false]);
        assert_eq!(at("final_layer_norm.weight.v"), [false, true]);
        assert_eq!(at("embed_tokens.weight"), [true, true]);
        let grad = plans[0].stage.pieces.iter().find(|(name, _)| name.ends_with(".grad")).expect("it is in pieces").1;
        let found: Vec<(usize, Work)> = grad.iter().map(|piece| (piece.place, piece.work)).collect();
        let mut expected = vec![(0, Work::Forward), (1, Work::Forward), (1, Work::Backward), (0, Work::Backward)];
        if order.splits_backward() {
            expected.extend([(1, Work::Weight), (0, Work::Weight)]);
        }
        assert_eq!(found, expected, "{}", order.name());
    }
}
