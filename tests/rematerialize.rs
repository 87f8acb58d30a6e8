//! Computing again changes no bit: a tiny OPT and a tiny Llama, with and without dropout, are trained for five steps under
//! every setting of memory, on the interpreter and on the CPU with one, two and three threads, and end with equal
//! parameters. Limits are kept, and missed ones say what fits.

use std::fs;
use std::path::Path;

use dsgc_ir::diag::Diag;
use dsgc_ir::fuzz::random_program;
use dsgc_ir::stage::Memory;
use dsgc_ir::{Op, Phase, Planned, Program, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::{PIPELINE, PassContext};
use dsgc_runtime::Session;
use dsgc_yaml::load::{self, Options};
use tempfile::TempDir;

mod common;
#[path = "../frontends/cli/host.rs"]
mod host;

const PIPELINE_TEXT: &str = "\
dsgc: 1
seed: 7
models:
  opt: {model: opt, tokenizer: TOKENIZER, config: {hidden: 16, layers: 3, heads: 2, ffn: 32, max_positions: 64, activation: gelu}}
  llama:
    model: llama
    tokenizer: TOKENIZER
    config: {hidden: 16, layers: 3, heads: 2, kv_heads: 1, head_dim: 8, ffn: 32, max_positions: 64}
data:
  rows: {path: rows.jsonl}
stages:
  sft: {model: MODEL, data: rows, batch_size: 4, max_length: 48, max_steps: 5, learning_rate: 1e-2, weight_decay: 0.1, save: []}
";

/// A folder with 24 rows and a pipeline on them.
struct Place(TempDir);

impl Place {
    fn new(model: &str) -> Place {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/rlhf");
        let place = Place(tempfile::tempdir().expect("a temporary folder"));
        let rows = fs::read_to_string(examples.join("data/prefs.jsonl")).expect("the example's rows");
        let rows: Vec<&str> = rows.lines().take(24).collect();
        fs::write(place.0.path().join("rows.jsonl"), rows.join("\n")).expect("a new file");
        let tokenizer = examples.join("tokenizer").display().to_string();
        let text = PIPELINE_TEXT.replace("TOKENIZER", &tokenizer).replace("MODEL", model);
        fs::write(place.0.path().join("pipeline.yaml"), text).expect("a new file");
        place
    }

    fn program(&self, sets: &[&str]) -> Program {
        let mut sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        sets.push(format!("output_dir={}", self.0.path().join("runs").display()));
        let options = Options { sets, ..Options::default() };
        let loaded = load::load(&self.0.path().join("pipeline.yaml"), &options, &host::Disk);
        loaded.unwrap_or_else(|e| panic!("{}", said(&e.diags))).stages.remove(0)
    }
}

fn said(diags: &[Diag]) -> String {
    diags.iter().map(|d| format!("{d}\n")).collect()
}

fn with_memory(mut program: Program, memory: Memory) -> Program {
    program.stage.memory = memory;
    program
}

fn checkpointing() -> Memory {
    Memory { gradient_checkpointing: true, ..Memory::default() }
}

fn at_most(bytes: usize) -> Memory {
    Memory { max: Some(bytes), ..Memory::default() }
}

fn compile(program: Program) -> Result<Planned, Vec<Diag>> {
    // Equal plans on all devices: the largest workspace is that of three threads.
    dsgc_passes::compile(program, &PassContext::new(&CpuTarget { threads: 3 }), &mut |_| {})
}

fn planned(program: Program) -> Planned {
    compile(program).unwrap_or_else(|e| panic!("{}", said(&e)))
}

/// Ops of the backward pass that draw or multiply: more of them where something runs again.
fn backward_work(program: &Program) -> usize {
    let ops = program.graphs.iter().flat_map(|g| g.ops());
    ops.filter(|(_, op)| op.site.phase != Phase::Forward)
        .map(|(_, op)| match &op.op {
            Op::Contract { .. } | Op::RowUniform { .. } | Op::LayerNorm { .. } | Op::RmsNorm { .. } => 1,
            Op::ContractEach { .. } => op.results().len(),
            Op::ContractFused { bodies, .. } => bodies.len(),
            _ => 0,
        })
        .sum()
}

/// All parameters and states after the stage has run on a device.
fn trained(planned: &Planned, device: Box<dyn Device>) -> Vec<Tensor> {
    let mut session =
        Session::open(planned.clone(), device, &mut |_| Ok(())).unwrap_or_else(|e| panic!("{}", said(&e)));
    session.run(&mut |_| Ok(())).unwrap_or_else(|e| panic!("{e}"));
    planned.state_ids().map(|(id, _)| session.device().state(id)).collect()
}

fn assert_equal_bits(a: &[Tensor], b: &[Tensor], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (a, b) in a.iter().zip(b) {
        let bits = |t: &Tensor| t.to_f64().into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(a), bits(b), "{what}");
    }
}

/// What layers keep is in the host's memory meanwhile: the device needs less, also where some of it runs again.
fn offloads(model: &str, sets: &[&str]) {
    let place = Place::new(model);
    for memory in [Memory::default(), checkpointing()] {
        let program = with_memory(place.program(sets), memory.clone());
        let kept = planned(program.clone());
        let memory = Memory { offload_activations: true, ..memory };
        let offloaded = planned(with_memory(program.clone(), memory));
        assert_eq!(kept.arena.host, 0);
        // A limit counts the device's memory only: nothing runs again for what lies on the host.
        let limited = Memory { max: Some(offloaded.arena.total()), ..offloaded.stage.memory.clone() };
        let limited = planned(with_memory(program, limited));
        assert_eq!(backward_work(&limited), backward_work(&offloaded));
        let (least, arena) = (kept.arena.values, offloaded.arena);
        assert!(arena.values < least && arena.host > 0, "{} and {} of {least}", arena.values, arena.host);
        let expected = trained(&kept, Box::new(Interp::planned(kept.clone(), Precision::F64)));
        let found = trained(&offloaded, Box::new(Interp::planned(offloaded.clone(), Precision::F64)));
        assert_equal_bits(&expected, &found, "on the interpreter");
        let expected = trained(&kept, Box::new(Cpu::new(kept.clone(), 1)));
        let found = trained(&offloaded, Box::new(Cpu::poisoned(offloaded.clone(), 3)));
        assert_equal_bits(&expected, &found, "on the CPU");
    }
}

fn changes_no_bit(model: &str, sets: &[&str]) {
    let place = Place::new(model);
    let program = place.program(sets);
    let kept = planned(program.clone());
    let least = planned(with_memory(program.clone(), checkpointing()));
    assert!(backward_work(&least) > backward_work(&kept), "nothing runs again");
    assert!(least.arena.total() < kept.arena.total(), "{} and {}", least.arena.total(), kept.arena.total());
    // Something between: some layers keep what others compute again.
    let middle = kept.arena.total().midpoint(least.arena.total());
    let some = planned(with_memory(program, at_most(middle)));
    assert!(some.arena.total() <= middle);
    assert!(backward_work(&some) < backward_work(&least) && backward_work(&some) > backward_work(&kept));

    let expected = trained(&kept, Box::new(Interp::planned(kept.clone(), Precision::F64)));
    for planned in [&least, &some] {
        let found = trained(planned, Box::new(Interp::planned(planned.clone(), Precision::F64)));
        assert_equal_bits(&expected, &found, "on the interpreter");
    }
    let expected = trained(&kept, Box::new(Cpu::new(kept.clone(), 1)));
    for threads in 1..=3 {
        for planned in [&kept, &least, &some] {
            let found = trained(planned, Box::new(Cpu::new(planned.clone(), threads)));
            assert_equal_bits(&expected, &found, &format!("on {threads} threads"));
        }
    }
}

#[test]
fn activations_of_an_opt_are_offloaded() {
    offloads("opt", &["sft.lora_r=2", "sft.lora_dropout=0.2", "sft.micro_batch_size=2"]);
}

#[test]
fn activations_of_a_llama_are_offloaded() {
    offloads("llama", &["sft.max_grad_norm=1.0"]);
}

#[test]
fn nothing_runs_again_where_the_user_says_so() {
    let program = Place::new("opt").program(&[]);
    let kept = planned(program.clone());
    let memory = Memory { keep_all: true, ..at_most(kept.arena.total()) };
    assert_eq!(planned(with_memory(program.clone(), memory.clone())).arena, kept.arena);
    let memory = Memory { max: Some(kept.arena.total() - 1), ..memory };
    let errors = said(&compile(with_memory(program, memory)).expect_err("a byte is missing"));
    assert!(errors.contains("`gradient_checkpointing: auto` keeps less"), "{errors}");
}

#[test]
fn an_opt_learns_the_same() {
    changes_no_bit("opt", &["sft.max_grad_norm=1.0"]);
}

#[test]
fn an_opt_with_dropout_and_micro_batches_learns_the_same() {
    changes_no_bit("opt", &["sft.lora_r=2", "sft.lora_dropout=0.2", "sft.micro_batch_size=2"]);
}

#[test]
fn a_llama_learns_the_same() {
    changes_no_bit("llama", &["sft.micro_batch_size=2"]);
}

#[test]
fn a_llama_with_dropout_learns_the_same() {
    changes_no_bit("llama", &["sft.lora_r=2", "sft.lora_dropout=0.2"]);
}

#[test]
fn a_limit_is_kept_as_closely_as_layers_allow() {
    let program = Place::new("opt").program(&[]);
    let kept = planned(program.clone());
    let least = planned(with_memory(program.clone(), checkpointing()));
    let (most, least) = (kept.arena.total(), least.arena.total());
    let mut work = backward_work(&kept);
    for limit in (0..=8).map(|i| most - (most - least) * i / 8) {
        let planned = planned(with_memory(program.clone(), at_most(limit)));
        assert!(planned.arena.total() <= limit, "{} of {limit}", planned.arena.total());
        // The less memory, the more runs again.
        assert!(backward_work(&planned) >= work);
        work = backward_work(&planned);
    }
    assert!(work > backward_work(&kept));
}

#[test]
fn a_missed_limit_says_how_many_rows_fit() {
    let program = Place::new("opt").program(&["sft.batch_size=12"]);
    let with = |rows: usize| {
        let mut program = with_memory(program.clone(), checkpointing());
        program.stage.sources.iter_mut().for_each(|s| s.micro_batch_size = rows);
        planned(program).arena.total()
    };
    assert!(with(3) < with(12), "fewer rows take less, accumulators and all");
    let limit = with(3);
    let errors = compile(with_memory(program.clone(), at_most(limit))).expect_err("it does not fit");
    let text = said(&errors);
    assert!(text.contains("needs at least") && text.contains("`memory` allows"), "{text}");
    let help = text.split("`micro_batch_size: ").nth(1).and_then(|t| t.split('`').next());
    let rows: usize = help.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no rows in {text}"));
    assert!((3..12).contains(&rows), "{text}");
    assert!(with(rows) <= limit && (rows == 11 || with(rows + 1) > limit), "{rows} rows are not the most");
    let errors = compile(with_memory(program, at_most(1000))).expect_err("it does not fit");
    assert!(said(&errors).contains("even `micro_batch_size: 1` needs more"), "{}", said(&errors));
}

#[test]
fn random_programs_keep_every_bit() {
    let pass = PIPELINE.iter().find(|p| p.name == "rematerialize").expect("it is a pass");
    let mut again = 0;
    for seed in 0..300 {
        let mut program = random_program(2000 + seed, 10 + seed as usize % 30);
        for pass in PIPELINE.iter().take_while(|p| p.name != "rematerialize") {
            program = (pass.run)(program, &PassContext::new(&InterpTarget)).unwrap_or_else(|e| panic!("{}", said(&e)));
        }
        let memory = if seed % 2 == 0 { checkpointing() } else { at_most(64) };
        let before = with_memory(program, memory);
        let after = common::run(pass, &before).unwrap_or_else(|e| panic!("{}", said(&e)));
        let ops = |p: &Program| p.graphs.iter().map(|g| g.len()).sum::<usize>();
        again += usize::from(ops(&after) > ops(&before));
    }
    assert!(again > 30, "only {again} programs compute anything again");
}

#[test]
fn orders_never_need_more() {
    use dsgc_passes::live_bytes;
    let (mut before, mut after) = (0, 0);
    for seed in 0..200 {
        let mut program = random_program(3000 + seed, 10 + seed as usize % 40);
        for pass in PIPELINE.iter().take_while(|p| p.name != "plan_memory") {
            let next = (pass.run)(program.clone(), &PassContext::new(&InterpTarget));
            let next = next.unwrap_or_else(|e| panic!("{}", said(&e)));
            if pass.name == "order" {
                for (old, new) in program.graphs.iter().zip(&next.graphs) {
                    let live = [(old, &program), (new, &next)].map(|(g, p)| live_bytes(g, p, &InterpTarget));
                    assert!(live[1] <= live[0], "seed {seed}: {live:?}");
                    assert_eq!(old.len(), new.len());
                    (before, after) = (before + live[0], after + live[1]);
                }
            }
            program = next;
        }
    }
    assert!(after * 100 < before * 97, "{before} bytes became {after}");
}
