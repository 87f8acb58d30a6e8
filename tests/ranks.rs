//! Several ranks beside one, beyond what `tests/matrix.rs` has: shares that are unequal, settings of stages, checkpoints of one
//! layout in another, memory and messages, and ends.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dsgc_ir::cost::graph_sending;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Generate, Statement};
use dsgc_ir::{Graph, Mesh, Planned, Program, Tensor};
use dsgc_kernels::cpu::CpuTarget;
use dsgc_kernels::ranks::Member;
use dsgc_kernels::{Device, bind};
use dsgc_passes::{PassContext, run_passes};
use dsgc_runtime::{Session, on_threads};

#[path = "common/on_ranks.rs"]
mod on_ranks;
#[path = "common/place.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod place;
#[allow(dead_code)] // Other tests use the rest.
mod stages;

use on_ranks::{On, Outputs, Ran, Watched, assert_near, device, difference, first_message, laid_out, planned, ran};
use place::Place;

const SFT: &str = "
dsgc: 1
seed: 7
models:
  opt: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 32}}
  llama:
    model: llama
    tokenizer: TOKENIZER
    config: {hidden: 16, layers: 2, heads: 4, kv_heads: 2, ffn: 32, max_positions: 32}
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

/// With a reference and a reward that nothing trains, an average, other text beside the rollouts, and rows left out.
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

/// Four answers to a prompt, whose beginning is computed once for them.
const GROUPS: &str = include_str!("common/groups.yaml");

const GROUPED: &str = "
dsgc: 1
seed: 7
models:
  base: {model: llama, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 48}}
data:
  prompts: {path: rows.jsonl}
stages:
  groups:
    recipe: ./groups.yaml
    policy: base
    data: prompts
    max_length: 20
    learning_rate: 1e-2
    max_steps: 2
    batch_size: 8
    micro_batch_size: 8
";

/// A graph that cannot be cut, which all ranks run on all rows.
const RUNNING: &str = "
recipe: running
models:
  model: {type: causal_lm, trained: true}
data:
  texts: {fields: {text: text}, sequences: {text: [text]}, pad: right, width: max_length}
options:
  max_length: 24
graphs:
  running:
    in: {text: 'sequence[B, T]'}
    let:
      - logp: sum(next_logp(model(text), text.tokens), axis=1, where=text.trained[:, 1:])
      - so_far: cumsum(logp, axis=0)
    out: {rows: {so_far: so_far}, on_average: mean(so_far), least: min(so_far)}
  weighted:
    in: {text: 'sequence[B, T]', so_far: 'f32[B]'}
    out: {loss: 'mean(-next_logp(model(text), text.tokens) * (1 + 0.01 * so_far)[:, None], where=text.trained[:, 1:])'}
plan:
  - for: batch
    in: batches(texts, 6)
    do:
      - sums: running(batch.text)
      - update(model, weighted(batch.text, sums.rows.so_far))
";

const WHOLE: &str = "
dsgc: 1
seed: 7
models:
  base: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 48}}
data:
  texts: {path: rows.jsonl, fields: {text: prompt}}
stages:
  running: {recipe: ./running.yaml, model: base, data: texts, learning_rate: 1e-2, max_steps: 3, batch_size: 6}
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
    for (name, recipe) in [("groups.yaml", GROUPS), ("running.yaml", RUNNING)] {
        fs::write(folder.join(name), recipe).expect("a new file");
    }
    let row = |i: usize| {
        let more = " and more".repeat(i % 4);
        format!("{{\"prompt\": \"Question {i}{more}?\", \"chosen\": \" Yes.\", \"rejected\": \" {i} is not.\"}}")
    };
    let rows: Vec<String> = (0..40).map(row).collect();
    stages::program(folder, pipeline, &rows, sets)
}

/// Ranks with different rows.
fn of_data(data: usize) -> Mesh {
    Mesh { data, ..Mesh::default() }
}

fn run(program: &Program, data: usize, zero_stage: u8, on: On) -> Ran {
    ran(&laid_out(program, of_data(data), zero_stage), on, false, None)
}

/// Every layout beside one rank, whose run this gives.
fn every_layout(pipeline: &str, sets: &[&str], layouts: &[(usize, u8)], on: On, bound: f64) -> Ran {
    let folder = tempfile::tempdir().expect("a temporary folder");
    every_layout_of(&program(folder.path(), pipeline, sets), layouts, on, bound)
}

fn every_layout_of(program: &Program, layouts: &[(usize, u8)], on: On, bound: f64) -> Ran {
    let one = run(program, 1, 0, on);
    for &(data, zero_stage) in layouts {
        let what = format!("{data} ranks, zero {zero_stage}");
        let found = run(program, data, zero_stage, on);
        assert_near(&found, &one, bound, &what);
    }
    one
}

/// Three ranks have 2, 3 and 3 rows of a batch in parts of 2: some parts have none.
#[test]
fn ranks_with_unequal_rows_have_one_ranks_numbers() {
    every_layout(SFT, &[], &[(3, 0), (3, 1), (3, 2), (3, 3)], On::Doubles, 1e-9);
}

/// More ranks than rows: some have none at all.
#[test]
fn ranks_without_rows_have_the_others_numbers() {
    let sets = ["stages.sft.batch_size=3", "stages.sft.micro_batch_size=3"];
    every_layout(SFT, &sets, &[(4, 0), (4, 3)], On::Doubles, 1e-9);
}

#[test]
fn lora_and_dropout_have_one_ranks_numbers() {
    let sets = ["stages.sft.lora_r=16", "stages.sft.lora_dropout=0.5"];
    every_layout(SFT, &sets, &[(2, 1), (3, 3)], On::Doubles, 1e-9);
}

/// With parameters in parts, ranks generate in step: an answer that ends on one of them waits for the others'. Rows whose answer is
/// short are left out.
#[test]
fn answers_that_end_early_have_one_ranks_numbers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let sets = ["stages.ppo.max_steps=2", "stages.ppo.max_new_tokens=10", "stages.ppo.micro_batch_size=1"];
    let mut program = program(folder.path(), PPO, &sets);
    generations(&mut program.stage.plan, &mut |generate| generate.stop = Some(460));
    let one = every_layout_of(&program, &[(2, 0), (3, 3)], On::Doubles, 1e-9);
    assert_eq!(one.steps[0]["answer_length"], 9.0);
}

#[test]
fn answers_in_groups_have_one_ranks_numbers() {
    every_layout(GROUPED, &[], &[(2, 0), (3, 3)], On::Doubles, 1e-9);
    every_layout(GROUPED, &["stages.groups.micro_batch_size=4"], &[(2, 2)], On::Doubles, 1e-9);
}

#[test]
fn a_call_that_cannot_be_cut_runs_whole_on_every_rank() {
    every_layout(WHOLE, &[], &[(2, 0), (3, 3)], On::Doubles, 1e-9);
}

/// Pairs in one row, scores of a reference that are kept from epoch to epoch, held-out rows.
#[test]
fn dpo_has_one_ranks_numbers() {
    every_layout(DPO, &[], &[(2, 0), (3, 3)], On::Doubles, 1e-9);
}

/// Roles that step together, by the squares of each other's gradients.
#[test]
fn fp16_has_one_ranks_numbers() {
    every_layout(PPO, &["stages.ppo.fp16=true"], &[(2, 3)], On::Doubles, 1e-9);
}

/// Every rank rounds what its own rows give, and the masters of the weights are cut.
#[test]
fn bf16_is_near() {
    let sets = ["stages.sft.bf16=true", "stages.sft.max_steps=3"];
    every_layout(SFT, &sets, &[(2, 1), (3, 3)], On::Cpu, 1e-4);
}

#[test]
fn resumed_on_another_layout_it_goes_on_to_the_same_numbers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), SFT, &[]);
    let (one, whole) = (run(&program, 1, 0, On::Doubles), run(&program, 2, 3, On::Doubles));
    // Only the last rank is told to stop.
    let begun = ran(&laid_out(&program, of_data(2), 3), On::Doubles, false, Some((1, 3)));
    assert_eq!(begun.steps, whole.steps[..3]);
    for (data, zero_stage) in [(2, 3), (1, 0), (4, 1)] {
        let after = ran(&laid_out(&program, of_data(data), zero_stage), On::Doubles, true, None);
        let mut both = begun.clone();
        both.steps.extend(after.steps);
        both.evaluations.extend(after.evaluations);
        both.states = after.states;
        assert_near(&both, &one, 1e-9, &format!("from 2 ranks to {data}, zero {zero_stage}"));
        if (data, zero_stage) == (2, 3) {
            assert!(both == whole, "the same layout goes on to other bits");
        }
    }
}

/// What is computed again needs parameters that are gathered again: none is kept from the forward pass for it.
#[test]
fn recomputation_has_one_ranks_numbers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let wide = SFT.replace("hidden: 16, layers: 2, heads: 2, ffn: 32", "hidden: 64, layers: 4, heads: 4, ffn: 256");
    let program = program(folder.path(), &wide, &["stages.sft.max_steps=2", "stages.sft.eval_steps=100"]);
    let mut again = program.clone();
    again.stage.memory.gradient_checkpointing = true;
    let one = run(&program, 1, 0, On::Doubles);
    for mesh in [of_data(2), Mesh { data: 2, tensor: 2, ..Mesh::default() }] {
        let (kept, again) = (laid_out(&program, mesh, 3), laid_out(&again, mesh, 3));
        assert_near(&ran(&again, On::Doubles, false, None), &one, 1e-9, &format!("{mesh}"));
        let values = |program: &Program| planned(program, On::Cpu).arena.values;
        assert!(values(&again) < values(&kept), "{mesh}: {} and {}", values(&again), values(&kept));
    }
}

/// Models of one stage with layouts of their own: of the actor everything is shared out, of the critic no parameters.
#[test]
fn every_role_has_a_layout_of_its_own() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let own = ["stages.ppo.actor.zero_stage=3", "stages.ppo.critic.zero_stage=2"];
    let mut mixed = program(folder.path(), PPO, &own);
    let stages: Vec<u8> = mixed.stage.roles.iter().map(|role| role.zero_stage).collect();
    assert_eq!(stages.iter().filter(|&&stage| stage == 0).count(), stages.len() - 2, "{stages:?}");
    let one = run(&program(folder.path(), PPO, &[]), 1, 0, On::Doubles);
    mixed.mesh = of_data(2);
    assert_near(&ran(&mixed, On::Doubles, false, None), &one, 1e-9, "actor 3, critic 2");
}

/// Per graph, how often a rank ran it, and the bytes that it sent for it.
type Counted = BTreeMap<String, (u64, u64)>;

/// Runs a stage on all ranks of its mesh, and gives what the first one counted: bytes are those of the formula.
fn counted(planned: &Planned, on: On) -> Counted {
    let counted: Vec<Arc<Mutex<Counted>>> = (0..planned.mesh.ranks()).map(|_| Arc::default()).collect();
    let rank = |member: Member| {
        let (planned_too, counted) = (planned.clone(), counted[member.rank()].clone());
        let is_first = member.rank() == 0;
        let run = move |device: &mut dyn Device, name: &str, inputs: &[(&str, &Tensor)]| -> Outputs {
            let graph = planned_too.graph(name).expect("the plan names it");
            let sending = graph_sending(graph, &bind(graph, inputs)?, &planned_too.mesh);
            let expected = sending.expect("all dims are bound").bytes;
            let before = device.sent();
            let outputs = device.run(name, inputs)?;
            // Where parts are uneven, the formula is that of the first rank.
            assert!(!is_first || device.sent() - before == expected, "@{name}");
            let mut counted = counted.lock().expect("no rank panics");
            let (runs, sent) = counted.entry(name.into()).or_default();
            (*runs, *sent) = (*runs + 1, *sent + expected);
            Ok(outputs)
        };
        let device = Watched { device: device(planned, on, &member), run };
        let mut session = Session::open_as(planned.clone(), Box::new(device), member, &mut |_| Ok(()))?;
        session.run(&mut |_| Ok(())).map_err(|e| vec![e])
    };
    on_threads(planned.mesh, rank, first_message).unwrap_or_else(|e| panic!("{e:?}"));
    let first = counted[0].lock().expect("no rank panics");
    first.clone()
}

/// With parameters in parts, a generation gathers them once, and nothing else of the run is another bit: sampled answers, greedy
/// ones, weights after them.
#[test]
fn parameters_gathered_once_for_a_generation_change_no_bit() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let narrow = ["stages.ppo.bf16=true"];
    let adapted = ["stages.ppo.actor.weights=int8", "stages.ppo.actor.lora_r=2"];
    for (sets, temperature) in [(&[][..], 1.0), (&[], 0.0), (&narrow, 1.0), (&adapted, 1.0)] {
        let sets = [&["stages.ppo.max_steps=2"], sets].concat();
        let mut once = laid_out(&program(folder.path(), PPO, &sets), of_data(2), 3);
        generations(&mut once.stage.plan, &mut |generate| generate.sampling.temperature = temperature);
        let (a, b) = (ran(&once, On::Cpu, false, None), ran(&gathering(&once, false), On::Cpu, false, None));
        assert!(a == b, "gathered once and in every call differ: {sets:?}, temperature {temperature}");
    }
}

/// One gathering for each generation, which sends what one call of a graph sends otherwise; and what is gathered lies where
/// updates have their values.
#[test]
fn a_generation_sends_parameters_once() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let steps = 2;
    let once = laid_out(&program(folder.path(), PPO, &["stages.ppo.max_steps=2"]), of_data(2), 3);
    let plans = [true, false].map(|on| planned(&gathering(&once, on), On::Cpu));
    let [once, every] = plans.each_ref().map(|plan| counted(plan, On::Cpu));
    let (runs, sent) = once["actor.gather"];
    assert_eq!((runs, once["actor.prefill"].1, once["actor.step"].1), (steps, 0, 0));
    assert!(!every.contains_key("actor.gather"));
    for graph in ["actor.prefill", "actor.step"] {
        let (runs, of_all) = every[graph];
        assert_eq!(of_all / runs, sent / steps, "@{graph}");
    }
    assert!(every["actor.step"].0 > 3 * steps);
    // All others are what they were.
    for (graph, of_all) in once.iter().filter(|(graph, _)| !graph.starts_with("actor.")) {
        assert_eq!(every[graph], *of_all, "@{graph}");
    }
    let [a, b] = plans.map(|plan| plan.arena);
    assert_eq!(a.persistent, b.persistent);
    assert!(a.total() <= b.total(), "{a:?} and {b:?}");
}

/// What is gathered lies where updates have their values: a limit that leaves no more room than those need is kept with it.
#[test]
fn a_limit_of_memory_is_kept_with_what_is_gathered() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut program = laid_out(&program(folder.path(), PPO, &["stages.ppo.max_steps=1"]), of_data(2), 3);
    let limit = planned(&gathering(&program, false), On::Cpu).arena.total();
    program.stage.memory.max = Some(limit);
    let plan = planned(&program, On::Cpu);
    assert!(plan.graph("actor.gather").is_some() && plan.arena.total() <= limit, "{:?} of {limit}", plan.arena);
}

/// The program whose roles gather their parameters once for a generation, or in every call.
fn gathering(program: &Program, once: bool) -> Program {
    let mut program = program.clone();
    program.stage.roles.iter_mut().for_each(|role| role.gather_for_generation = once);
    program
}

/// Does something with all generations of a plan.
fn generations(body: &mut [Statement], each: &mut dyn FnMut(&mut Generate)) {
    for statement in body {
        match statement {
            Statement::For { body, .. } => generations(body, each),
            Statement::Generate(generate) => each(generate),
            _ => {}
        }
    }
}

/// Under ZeRO 3 parameters are gathered for the backward pass again, and a limit of memory has that among its bytes: what is
/// computed again to keep it is the same bit by bit.
#[test]
fn a_limit_of_memory_is_kept_with_gathers_and_changes_no_bit() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let wide = SFT.replace("hidden: 16, layers: 2, heads: 2, ffn: 32", "hidden: 64, layers: 4, heads: 4, ffn: 256");
    let program = program(folder.path(), &wide, &["stages.sft.max_steps=2", "stages.sft.eval_steps=100"]);
    let free = laid_out(&program, of_data(2), 3);
    let mut least = free.clone();
    least.stage.memory.gradient_checkpointing = true;
    let bytes = |program: &Program| planned(program, On::Cpu).arena.total();
    let (most, least) = (bytes(&free), bytes(&least));
    let expected = ran(&free, On::Cpu, false, None);
    let sent = |plan: &Planned| -> u64 {
        let of =
            |graph: &Graph| graph_sending(graph, &graph.upper_bounds(), &plan.mesh).expect("dims have ranges").bytes;
        plan.graphs.iter().map(of).sum()
    };
    let without = sent(&planned(&free, On::Cpu));
    for limit in [least + (most - least) / 4, least + (most - least) / 2, 2 * most] {
        let mut limited = free.clone();
        limited.stage.memory.max = Some(limit);
        let plan = planned(&limited, On::Cpu);
        assert!(plan.arena.total() <= limit, "{} of {limit}", plan.arena.total());
        // Where there is room, gradients use what the forward pass has gathered; nothing is gathered more than twice.
        let bound = if limit > most { without * 4 / 5 } else { without };
        assert!(sent(&plan) <= bound, "{} of {without} sent under {limit}", sent(&plan));
        assert!(ran(&limited, On::Cpu, false, None) == expected, "{limit} of {least} to {most}: other bits");
    }
}

/// What is short of a layer is sent in one message: fewer of them, and as many bytes.
#[test]
fn short_messages_of_a_layer_are_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let wide = SFT.replace("hidden: 16, layers: 2, heads: 2, ffn: 32", "hidden: 64, layers: 2, heads: 4, ffn: 256");
    let sets = ["stages.sft.max_steps=2", "stages.sft.eval_steps=100", "data.texts.eval=none"];
    let program = laid_out(&program(folder.path(), &wide, &sets), of_data(3), 3);
    let together = planned(&program, On::Cpu);
    let names: Vec<&str> = dsgc_passes::PIPELINE.iter().map(|pass| pass.name).filter(|&name| name != "merge").collect();
    let apart = run_passes(program.clone(), &names, &PassContext::new(&CpuTarget { threads: 1 }));
    let apart = Planned::new(apart.unwrap_or_else(|e| panic!("{e:?}"))).unwrap_or_else(|fault| panic!("{fault}"));
    let sending = |plan: &Planned| {
        let graph = plan.graph("model.loss.grad").expect("parts of a batch");
        graph_sending(graph, &graph.upper_bounds(), &plan.mesh).expect("all dims are bound")
    };
    let (few, many) = (sending(&together), sending(&apart));
    assert_eq!(few.bytes, many.bytes);
    assert!(2 * few.messages < many.messages, "{} and {} messages", few.messages, many.messages);
    counted(&together, On::Cpu);
}

/// The program whose roles keep states in the host's memory.
fn offloaded(program: &Program, optimizer: bool, param: bool) -> Program {
    let mut program = program.clone();
    for role in &mut program.stage.roles {
        (role.offload_optimizer, role.offload_param) = (optimizer, param);
    }
    program
}

/// What the host keeps changes no bit, whatever else is in parts; and the device has as much less of parameters and states.
#[test]
fn offloading_changes_no_bit() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dropout = ["stages.sft.max_steps=3", "stages.sft.lora_r=4", "stages.sft.lora_dropout=0.5"];
    let runs: [(&str, &[&str], usize, u8); 4] = [
        (SFT, &["stages.sft.max_steps=3", "stages.sft.bf16=true"], 1, 0),
        (SFT, &dropout, 2, 3),
        (PPO, &["stages.ppo.max_steps=2", "stages.ppo.fp16=true"], 2, 3),
        (DPO, &["stages.dpo.max_steps=2"], 2, 2),
    ];
    for (pipeline, sets, data, zero_stage) in runs {
        let kept = laid_out(&program(folder.path(), pipeline, sets), of_data(data), zero_stage);
        let expected = ran(&kept, On::Cpu, false, None);
        let plan = planned(&kept, On::Cpu).arena;
        for (optimizer, param) in [(true, false), (true, true)] {
            let what = format!("{sets:?}, {data} ranks, zero {zero_stage}, parameters {param}");
            let off = offloaded(&kept, optimizer, param);
            let arena = planned(&off, On::Cpu).arena;
            assert!(arena.host > 0, "{what}");
            assert_eq!(arena.persistent + arena.host, plan.persistent, "{what}");
            assert!(ran(&off, On::Cpu, false, None) == expected, "{what}: other bits");
        }
    }
}

/// A stage whose parameters and states alone are more than its limit fits where the host keeps them: no layer has those of another
/// on the device, also where it is computed again. The interpreter runs it among poison.
#[test]
fn what_the_host_keeps_counts_only_while_it_is_used() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let wide = SFT.replace("hidden: 16, layers: 2, heads: 2, ffn: 32", "hidden: 64, layers: 6, heads: 4, ffn: 256");
    let sets = ["stages.sft.max_steps=2", "stages.sft.eval_steps=100", "stages.sft.batch_size=2"];
    let mut kept = laid_out(&program(folder.path(), &wide, &sets), of_data(1), 0);
    kept.stage.memory.gradient_checkpointing = true;
    let limit = planned(&kept, On::Cpu).arena.persistent;
    let mut off = offloaded(&kept, true, true);
    off.stage.memory.max = Some(limit);
    let arena = planned(&off, On::Cpu).arena;
    assert!(arena.total() <= limit, "{arena:?} of {limit}");
    assert!(ran(&off, On::Cpu, false, None) == ran(&kept, On::Cpu, false, None), "other bits");
    off.stage.memory.max = None;
    assert_near(&ran(&off, On::Doubles, false, None), &ran(&kept, On::Doubles, false, None), 0.0, "in doubles");
}

/// Ranks, gathering for a generation, offloading and LoRA: DeepSpeed-Chat's matrix of its third stage.
#[test]
fn every_combination_of_memory_savers_has_the_same_losses() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let sets = ["stages.ppo.max_steps=5", "stages.ppo.unsup_coef=0", "stages.ppo.enable_ema=false"];
    let lora = [&sets[..], &["stages.ppo.actor.lora_r=16", "stages.ppo.critic.lora_r=16"]].concat();
    for sets in [&sets[..], &lora] {
        let program = program(folder.path(), PPO, sets);
        let one = ran(&laid_out(&program, of_data(1), 0), On::Fast, false, None);
        for (zero_stage, gathered, offload) in [2, 3]
            .into_iter()
            .flat_map(|z| [false, true].map(|g| (z, g)))
            .flat_map(|(z, g)| [(z, g, false), (z, g, true)])
        {
            let laid_out = gathering(&laid_out(&program, of_data(2), zero_stage), gathered);
            let found = ran(&offloaded(&laid_out, offload, offload), On::Fast, false, None);
            let what = format!("{sets:?}, zero {zero_stage}, gathered once {gathered}, offload {offload}");
            assert_eq!(found.steps.len(), 5, "{what}");
            let (losses, _) = difference(&found, &one);
            assert!(losses <= 1e-3, "{what}: they differ by {losses:e}");
        }
    }
}

/// Ranks that share layers, alone and beside others with other rows: data, tensor, stage of ZeRO.
fn shared_layers(pipeline: &str, sets: &[&str], layouts: &[(usize, usize, u8)], on: On, bound: f64) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path(), pipeline, sets);
    let one = run(&program, 1, 0, on);
    for &(data, tensor, zero_stage) in layouts {
        let mesh = Mesh { data, tensor, ..Mesh::default() };
        let found = ran(&laid_out(&program, mesh, zero_stage), on, false, None);
        assert_near(&found, &one, bound, &format!("{mesh}, zero {zero_stage}"));
    }
}

#[test]
fn lora_and_dropout_on_ranks_that_share_layers_have_one_ranks_numbers() {
    let lora = ["stages.sft.lora_r=16", "stages.sft.lora_dropout=0.5"];
    shared_layers(SFT, &lora, &[(1, 2, 0), (2, 2, 3)], On::Doubles, 1e-9);
}

#[test]
fn pairs_and_groups_on_ranks_that_share_layers_have_one_ranks_numbers() {
    shared_layers(DPO, &[], &[(1, 2, 0)], On::Doubles, 1e-9);
    shared_layers(GROUPED, &[], &[(2, 2, 2)], On::Doubles, 1e-9);
}

#[test]
fn bf16_on_ranks_that_share_layers_is_near() {
    shared_layers(SFT, &["stages.sft.max_steps=3", "stages.sft.bf16=true"], &[(1, 2, 0), (2, 2, 1)], On::Fast, 2e-2);
}

/// What GPUs send to each other goes by way of the host.
#[cfg(feature = "wgpu")]
#[test]
fn gpus_are_near() {
    let sets = ["stages.sft.max_steps=3", "stages.sft.learning_rate=1e-3"];
    every_layout(SFT, &sets, &[(2, 1), (2, 3)], On::Gpu, 1e-5);
    shared_layers(SFT, &sets, &[(1, 2, 0)], On::Gpu, 1e-5);
    let sets = ["stages.sft.max_steps=2", "stages.sft.bf16=true"];
    every_layout(SFT, &sets, &[(2, 3)], On::Gpu, 1e-3);
}

/// The bytes that ranks send are those of the formula: a sum of gradients, twice its bytes but for one part; with ZeRO 3 parameters
/// twice and gradients once for every part of a batch.
#[test]
fn ranks_send_what_the_formulas_say() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let sets = ["stages.sft.max_steps=2", "stages.sft.eval_steps=100", "data.texts.eval=none"];
    let wide = SFT.replace("hidden: 16, layers: 2, heads: 2, ffn: 32", "hidden: 64, layers: 1, heads: 4, ffn: 128");
    let program = program(folder.path(), &wide, &sets);
    let (ranks, parts, steps) = (2, 2, 2);
    for zero_stage in 0..=3 {
        let planned = planned(&laid_out(&program, of_data(ranks), zero_stage), On::Cpu);
        let counted = counted(&planned, On::Cpu);
        let of = |graph: &str| counted.get(graph).map_or(0, |(_, sent)| sent / steps);
        let (grad, apply) = (of("model.loss.grad"), of("model.apply"));
        let bytes: usize = planned
            .params_of("model")
            .map(|(id, _)| {
                4 * planned
                    .state(id)
                    .whole_dims()
                    .iter()
                    .map(|d| d.constant().expect("a number") as usize)
                    .product::<usize>()
            })
            .sum();
        let half = bytes as f64 / ranks as f64;
        let times = |sent: u64| sent as f64 / half;
        // In each part of a batch, and at the step.
        let expected = match zero_stage {
            0 | 1 => (0.0, 2.0),
            2 => (1.0, 1.0),
            _ => (3.0, 0.0),
        };
        let found = (times(grad) / f64::from(parts), times(apply));
        // Biases and norms are too small to be shared out; their sums are taken once.
        let near = |a: f64, b: f64| (a - b).abs() <= 0.025 * b.max(1.0);
        assert!(near(found.0, expected.0) && near(found.1, expected.1), "zero {zero_stage}: {found:?}");
    }
}

/// What `dsgc compile` prints for a step is what each rank counts, where rows are as long as they can be and parts are even.
#[test]
fn every_rank_sends_what_is_printed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = SFT.replace("hidden: 16, layers: 2, heads: 2, ffn: 32", "hidden: 32, layers: 2, heads: 4, ffn: 64");
    let text = text.replace("max_positions: 32", "max_positions: 34");
    let sets = ["stages.sft.max_steps=2", "stages.sft.eval_steps=100", "data.texts.eval=none"];
    let place = Place::with(&text);
    let rows: Vec<String> =
        (0..16).map(|i| format!("{{\"prompt\": \"{}\"}}", format!("{i} is odd? ").repeat(20))).collect();
    let program = stages::program(folder.path(), &text, &rows, &sets);
    let steps = 2;
    for (data, tensor, zero_stage) in [(1, 2, 0), (2, 2, 0), (2, 2, 3)] {
        let layout = format!("compile.parallel={{data: {data}, tensor: {tensor}, zero_stage: {zero_stage}}}");
        let report = place.out(&["compile", "pipeline.yaml", "--json"], &[&sets[..], &[&layout]].concat());
        let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
        let printed = report[0]["updates"][0]["sent_bytes_per_step"].as_u64().expect("bytes");
        assert!(printed > 0, "{layout}");
        let planned = planned(&laid_out(&program, Mesh { data, tensor, ..Mesh::default() }, zero_stage), On::Cpu);
        let rank = |member: Member| {
            let sent = Arc::new(Mutex::new(0));
            let counts = sent.clone();
            let run = move |device: &mut dyn Device, name: &str, inputs: &[(&str, &Tensor)]| -> Outputs {
                let before = device.sent();
                let outputs = device.run(name, inputs)?;
                *counts.lock().expect("no rank panics") += device.sent() - before;
                Ok(outputs)
            };
            let device = Box::new(Watched { device: device(&planned, On::Fast, &member), run });
            let mut session = Session::open_as(planned.clone(), device, member, &mut |_| Ok(()))?;
            session.run(&mut |_| Ok(())).map_err(|e| vec![e])?;
            let sent: u64 = *sent.lock().expect("no rank panics");
            Ok(sent)
        };
        let sent = on_threads(planned.mesh, rank, first_message).unwrap_or_else(|e: Vec<Diag>| panic!("{e:?}"));
        assert_eq!(sent, vec![steps * printed; data * tensor], "{layout}");
    }
}

#[test]
fn a_rank_that_fails_ends_all() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let planned = planned(&laid_out(&program(folder.path(), SFT, &[]), of_data(3), 3), On::Doubles);
    let began = Instant::now();
    let rank = |member: Member| {
        let mut device = device(&planned, On::Doubles, &member);
        if member.rank() == 1 {
            let mut runs = 0;
            let run = move |device: &mut dyn Device, name: &str, inputs: &[(&str, &Tensor)]| {
                runs += 1;
                if runs == 3 { Err(Diag::error("the device is gone")) } else { device.run(name, inputs) }
            };
            device = Box::new(Watched { device, run });
        }
        let mut session = Session::open_as(planned.clone(), device, member, &mut |_| Ok(()))?;
        session.run(&mut |_| Ok(())).map_err(|e| vec![e])
    };
    let failed = on_threads(planned.mesh, rank, first_message);
    assert_eq!(failed.expect_err("rank 1 fails")[0].message, "the device is gone");
    assert!(began.elapsed() < Duration::from_secs(30));
}

const PIPELINE: &str = "
dsgc: 1
output_dir: runs
save_steps: 2
compile: {parallel: {data: 2, zero_stage: 3}}
models:
  base: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 32}}
data:
  texts: {path: rows.jsonl, fields: {text: chosen}}
stages:
  sft: {model: base, data: texts, batch_size: 4, max_length: 24, learning_rate: 1e-2, max_steps: 4, logging_steps: 1}
";

/// As a user runs it: one of all that is printed and written, and what one rank goes on from.
#[test]
fn the_command_runs_all_ranks() {
    let place = Place::with(PIPELINE);
    let out = place.out(&["run", "pipeline.yaml"], &[]);
    for line in ["sft step 4/4", "sft wrote `model` to", "checkpoint runs/sft/checkpoints/step-00000004"] {
        assert_eq!(out.matches(line).count(), 1, "{line} in {out}");
    }
    let (steps, weights) = (place.steps("sft"), place.tensors("runs/sft/model.safetensors"));
    assert_eq!(steps.len(), 4);
    // From its middle on one rank.
    let resumed = ["run", "pipeline.yaml", "--resume", "runs/sft/checkpoints/step-00000002"];
    place.out(&resumed, &["compile.parallel={data: 1}"]);
    let losses = |steps: &[serde_json::Value]| -> Vec<f64> {
        steps.iter().map(|step| step["loss"].as_f64().expect("a number")).collect()
    };
    for (one, two) in losses(&place.steps("sft")).into_iter().zip(losses(&steps)) {
        assert!((one - two).abs() < 1e-5, "{one} and {two}");
    }
    let after = place.tensors("runs/sft/model.safetensors");
    assert!(weights.keys().eq(after.keys()) && weights.iter().all(|(name, t)| after[name].shape == t.shape));
    assert!(place.out(&["run", "pipeline.yaml", "--smoke"], &[]).contains("smoke: sft ran"));
}

#[test]
fn an_error_of_all_ranks_is_said_once() {
    let place = Place::with(PIPELINE);
    fs::write(place.path("rows.jsonl"), "{\"chosen\": \"Yes.\"}\n{\"chosen\": 3}\n").expect("a file");
    let out = place.command(&["run", "pipeline.yaml"]);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!((out.status.code(), text.matches("error").count()), (Some(1), 1), "{text}");
}
