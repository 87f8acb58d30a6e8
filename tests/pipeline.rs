//! Ranks with different layers beside one: the same numbers in every schedule.

use std::path::Path;

use dsgc_ir::schedule::{PipelineOrder, Work};
use dsgc_ir::{Mesh, Program};

#[path = "common/on_ranks.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod on_ranks;
#[allow(dead_code)] // Other tests use the rest.
mod stages;

use on_ranks::{On, Ran, assert_near, laid_out, planned_at_all, ran};

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

/// Ranks in a mesh with a schedule, what those with different rows share out, and runs of layers of a rank.
#[derive(Clone, Copy, Debug)]
struct Layout {
    mesh: Mesh,
    order: PipelineOrder,
    zero_stage: u8,
    chunks: usize,
}

/// Ranks along `pipeline` alone.
fn in_line(pipeline: usize, order: PipelineOrder) -> Layout {
    let chunks = if order == PipelineOrder::Interleaved { 2 } else { 1 };
    Layout { mesh: Mesh { pipeline, ..Mesh::default() }, order, zero_stage: 0, chunks }
}

fn on(program: &Program, layout: Layout) -> Program {
    let mut program = laid_out(program, layout.mesh, layout.zero_stage);
    program.stage.parallel.order = layout.order;
    program.stage.parallel.virtual_stages = layout.chunks;
    program
}

/// Every layout beside one rank, whose run this gives.
fn every_layout(pipeline: &str, sets: &[&str], layouts: &[Layout]) -> Ran {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), pipeline, sets);
    let one = ran(&program, On::Doubles, false, None);
    for &layout in layouts {
        let found = ran(&on(&program, layout), On::Doubles, false, None);
        assert_near(&found, &one, 1e-9, &format!("{layout:?}"));
    }
    one
}

/// Every schedule that is possible on so many ranks with so many layers.
fn all_orders(places: usize, layers: usize) -> Vec<Layout> {
    let all = PipelineOrder::ALL.map(|order| in_line(places, order));
    all.into_iter().filter(|layout| layout.mesh.pipeline * layout.chunks <= layers).collect()
}

#[test]
fn gpipe_on_two_ranks_has_one_ranks_numbers() {
    every_layout(SFT, &[], &[in_line(2, PipelineOrder::Gpipe)]);
}

/// The table of tokens is at the first place, where it is read, and at the last one, whose head it is.
#[test]
fn sft_of_opt_has_one_ranks_numbers() {
    every_layout(SFT, &[], &[all_orders(2, 4), all_orders(4, 4)].concat());
}

/// Heads of their own; five rows in parts of two, and three places for four layers.
#[test]
fn sft_of_llama_has_one_ranks_numbers() {
    every_layout(SFT, &["stages.sft.model=llama", "stages.sft.batch_size=5"], &all_orders(3, 4));
}

#[test]
fn lora_and_dropout_have_one_ranks_numbers() {
    let sets = ["stages.sft.lora_r=16", "stages.sft.lora_dropout=0.5"];
    every_layout(SFT, &sets, &[in_line(2, PipelineOrder::OneForwardOneBackward)]);
}

#[test]
fn recomputed_layers_have_one_ranks_numbers() {
    let sets = ["compile.gradient_checkpointing=true"];
    every_layout(SFT, &sets, &[in_line(2, PipelineOrder::ZeroBubble), in_line(2, PipelineOrder::Interleaved)]);
}

#[test]
fn ppo_has_one_ranks_numbers() {
    every_layout(PPO, &[], &all_orders(2, 2));
}

#[test]
fn dpo_has_one_ranks_numbers() {
    every_layout(DPO, &[], &[in_line(2, PipelineOrder::OneForwardOneBackward)]);
}

/// Ranks with other rows and other layers, and what they share out.
#[test]
fn rows_and_layers_are_shared_out_together() {
    let of = |data, tensor, order, zero_stage| {
        let layout = in_line(2, order);
        Layout { mesh: Mesh { data, tensor, ..layout.mesh }, zero_stage, ..layout }
    };
    let layouts = [
        of(2, 1, PipelineOrder::OneForwardOneBackward, 0),
        of(2, 1, PipelineOrder::ZeroBubble, 3),
        of(1, 2, PipelineOrder::Interleaved, 0),
    ];
    every_layout(SFT, &[], &layouts);
}

#[test]
fn the_cpu_has_the_doubles_numbers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), SFT, &[]);
    let one = ran(&program, On::Doubles, false, None);
    let found = ran(&on(&program, in_line(2, PipelineOrder::OneForwardOneBackward)), On::Cpu, false, None);
    let metrics = |ran: &Ran| ran.steps.iter().map(|step| step["loss"]).collect::<Vec<f64>>();
    for (a, b) in metrics(&found).iter().zip(metrics(&one)) {
        assert!((a - b).abs() <= 1e-4 * b.abs(), "{a} and {b}");
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
