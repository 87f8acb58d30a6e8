//! Ranks with different layers beside one, beyond what `tests/matrix.rs` has: settings of stages, what is handed on, and who has
//! which layers.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use dsgc_ir::cost::handed_on;
use dsgc_ir::schedule::{PipelineOrder, Work};
use dsgc_ir::{Axis, Mesh, Program, Tensor};
use dsgc_kernels::ranks::Member;
use dsgc_kernels::{Device, bind};
use dsgc_runtime::{Event, Session, on_threads};

#[path = "common/on_ranks.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod on_ranks;
#[allow(dead_code)] // Other tests use the rest.
mod stages;

use on_ranks::{On, Outputs, Watched, assert_near, device, first_message, laid_out, planned_at_all, ran};

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

/// Ranks along `pipeline` with a schedule, and runs of layers of a rank.
#[derive(Clone, Copy, Debug)]
struct Layout {
    mesh: Mesh,
    order: PipelineOrder,
    chunks: usize,
}

fn in_line(pipeline: usize, order: PipelineOrder) -> Layout {
    let chunks = if order == PipelineOrder::Interleaved { 2 } else { 1 };
    Layout { mesh: Mesh { pipeline, ..Mesh::default() }, order, chunks }
}

fn on(program: &Program, layout: Layout) -> Program {
    let mut program = laid_out(program, layout.mesh, 0);
    program.stage.parallel.order = layout.order;
    program.stage.parallel.virtual_stages = layout.chunks;
    program
}

/// Every layout beside one rank.
fn every_layout(pipeline: &str, sets: &[&str], layouts: &[Layout], device: On, bound: f64) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), pipeline, sets);
    let one = ran(&program, device, false, None);
    for &layout in layouts {
        assert_near(&ran(&on(&program, layout), device, false, None), &one, bound, &format!("{layout:?}"));
    }
}

/// In doubles, which tell another order of sums from another sum.
fn exactly(pipeline: &str, sets: &[&str], layouts: &[Layout]) {
    every_layout(pipeline, sets, layouts, On::Doubles, 1e-9);
}

/// Every schedule that is possible on so many ranks with so many layers.
fn all_orders(places: usize, layers: usize) -> Vec<Layout> {
    let all = PipelineOrder::ALL.map(|order| in_line(places, order));
    all.into_iter().filter(|layout| layout.mesh.pipeline * layout.chunks <= layers).collect()
}

/// Heads of their own; five rows in parts of two, and three places for four layers.
#[test]
fn sft_of_llama_has_one_ranks_numbers() {
    exactly(SFT, &["stages.sft.model=llama", "stages.sft.batch_size=5"], &all_orders(3, 4));
}

#[test]
fn lora_and_dropout_have_one_ranks_numbers() {
    let sets = ["stages.sft.lora_r=16", "stages.sft.lora_dropout=0.5"];
    exactly(SFT, &sets, &[in_line(2, PipelineOrder::OneForwardOneBackward)]);
}

/// Copies of weights in few bits are where the weights are.
#[test]
fn bf16_is_near_one_ranks_numbers() {
    let sets = ["stages.sft.max_steps=3", "stages.sft.bf16=true"];
    every_layout(SFT, &sets, &[in_line(2, PipelineOrder::OneForwardOneBackward)], On::Cpu, 2e-2);
}

/// Rollouts in one call, whose scoring and first update would be one graph on one rank.
#[test]
fn rollouts_in_one_call_have_one_ranks_numbers() {
    let sets = ["stages.ppo.micro_batch_size=5", "stages.ppo.minibatch_size=5"];
    exactly(PPO, &sets, &[in_line(2, PipelineOrder::OneForwardOneBackward)]);
}

#[test]
fn dpo_has_one_ranks_numbers() {
    exactly(DPO, &[], &[in_line(2, PipelineOrder::OneForwardOneBackward)]);
}

/// What ranks hand on has the bytes of the formula, and every rank says how long each place has waited.
#[test]
fn ranks_hand_on_what_the_formula_says() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let sets = ["stages.sft.max_steps=2", "stages.sft.eval_steps=100", "data.texts.eval=none"];
    let program = program(folder.path(), SFT, &sets);
    for order in PipelineOrder::ALL {
        let plans = planned_at_all(&on(&program, in_line(2, order)), On::Cpu);
        let rank = |member: Member| {
            let place = member.mesh.place(Axis::Pipeline, member.rank());
            let (plan, expected) = (plans[place].clone(), std::sync::Arc::new(AtomicU64::new(0)));
            let counted = expected.clone();
            let run = move |device: &mut dyn Device, name: &str, inputs: &[(&str, &Tensor)]| -> Outputs {
                for pieces in plan.stage.pieces.values() {
                    if let Some(at) = pieces.iter().position(|piece| piece.graph == name) {
                        let bindings = bind(plan.graph(name).expect("the pass made it"), inputs)?;
                        let handed = handed_on(&plan, pieces, at, &bindings).expect("all dims are bound");
                        let others = handed.iter().enumerate().filter(|(to, _)| *to != place).map(|(_, bytes)| bytes);
                        counted.fetch_add(others.sum(), Ordering::Relaxed);
                    }
                }
                device.run(name, inputs)
            };
            let device = Watched { device: device(&plans[place], On::Cpu, &member), run };
            let mut waited = None;
            let mut session = Session::open_as(plans[place].clone(), Box::new(device), member, &mut |_| Ok(()))?;
            let ran = session.run(&mut |event| {
                if let Event::Waited { places } = event {
                    waited = Some(places.clone());
                }
                Ok(())
            });
            ran.map_err(|e| vec![e])?;
            let (sent, expected) = (session.device().sent(), expected.load(Ordering::Relaxed));
            assert_eq!(sent, expected, "rank at place {place}, {}", order.name());
            assert!(sent > 0);
            Ok(waited.expect("it is told"))
        };
        let waited = on_threads(plans[0].mesh, rank, first_message).unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(waited[0], waited[1]);
        assert!(waited[0].len() == 2 && waited[0].iter().all(|share| (0.0..1.0).contains(share)), "{waited:?}");
    }
}

/// Each place has its own layers' states and no others, and one piece for each kind of work on a part and each run of layers.
#[test]
fn places_have_their_own_layers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), SFT, &[]);
    for order in PipelineOrder::ALL {
        let plans = planned_at_all(&on(&program, in_line(2, order)), On::Doubles);
        let has = |place: usize, name: &str| {
            let (_, state) = plans[place].state_ids().find(|(_, s)| s.name.ends_with(name)).expect("it is a state");
            state.bytes() > 0
        };
        let at = |name: &str| [has(0, name), has(1, name)];
        let interleaved = order == PipelineOrder::Interleaved;
        assert_eq!(at("layers.0.fc1.weight"), [true, false]);
        assert_eq!(at("layers.1.fc1.weight"), [!interleaved, interleaved]);
        assert_eq!(at("layers.2.fc1.weight.m"), [interleaved, !interleaved]);
        assert_eq!(at("embed_positions.weight"), [true, false]);
        assert_eq!(at("final_layer_norm.weight.v"), [false, true]);
        assert_eq!(at("embed_tokens.weight"), [true, true]);
        let grad = plans[0].stage.pieces.iter().find(|(name, _)| name.ends_with(".grad")).expect("it is in pieces").1;
        let found: Vec<(usize, Work)> = grad.iter().map(|piece| (piece.place, piece.work)).collect();
        let places = if interleaved { vec![0, 1, 0, 1] } else { vec![0, 1] };
        let mut expected: Vec<(usize, Work)> = places.iter().map(|&place| (place, Work::Forward)).collect();
        expected.extend(places.iter().rev().map(|&place| (place, Work::Backward)));
        if order.splits_backward() {
            expected.extend(places.iter().rev().map(|&place| (place, Work::Weight)));
        }
        assert_eq!(found, expected, "{}", order.name());
    }
}
