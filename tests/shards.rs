//! Checkpoints that several ranks write, each its share, read by any number of ranks; and ranks that do not agree, which end.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use dsgc_ir::diag::Diag;
use dsgc_ir::print::GraphText;
use dsgc_ir::{Class, Mesh, Planned, Program, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::ranks::{Member, threads_within};
use dsgc_runtime::{Keeper, Session, on_threads};
use serde_json::Value;
use sha2::{Digest, Sha256};

#[path = "common/on_ranks.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod on_ranks;
#[allow(dead_code)] // Other tests use the rest.
mod stages;
#[path = "common/tiny.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod tiny;

use on_ranks::{
    On, Outputs, Ran, Watched, assert_near, device, difference_above, first_message, laid_out, planned, ran,
};
use tiny::Tiny;

/// Sizes that neither two nor four ranks can share out evenly.
const PIPELINE: &str = "
dsgc: 1
seed: 7
models:
  opt: {model: opt, tokenizer: TOKENIZER, config: {vocab: 641, hidden: 12, layers: 2, heads: 2, ffn: 26, max_positions: 31}}
data:
  texts: {path: rows.jsonl, fields: {text: prompt}}
stages:
  sft: {model: opt, data: texts, batch_size: 8, micro_batch_size: 2, max_length: 24, learning_rate: 1e-2, max_steps: 4}
";

fn rows() -> Vec<String> {
    (0..24).map(|i| format!("{{\"prompt\": \"Question {i} and {}?\"}}", i * i)).collect()
}

fn program(folder: &Path) -> Program {
    stages::program(folder, PIPELINE, &rows(), &[])
}

/// Ranks along `pipeline`, `data` and `tensor`, and the stage of ZeRO.
type Layout = (usize, usize, usize, u8);

const ONE: Layout = (1, 1, 1, 0);

/// The program as these ranks run it.
fn on(program: &Program, (pipeline, data, tensor, zero_stage): Layout) -> Program {
    laid_out(program, Mesh { pipeline, data, tensor }, zero_stage)
}

/// Runs a stage in doubles, from the newest checkpoint if it is to be resumed; the last rank may be told to stop after a step.
fn run(program: &Program, layout: Layout, resume: bool, stops: Option<u64>) -> Ran {
    run_with(program, layout, On::Doubles, resume, stops)
}

fn run_with(program: &Program, layout: Layout, with: On, resume: bool, stops: Option<u64>) -> Ran {
    let program = on(program, layout);
    ran(&program, with, resume, stops.map(|step| (program.mesh.ranks() - 1, step)))
}

/// What was run before a stop and after it.
fn joined(begun: &Ran, after: Ran) -> Ran {
    Ran {
        steps: [begun.steps.clone(), after.steps].concat(),
        evaluations: [begun.evaluations.clone(), after.evaluations].concat(),
        states: after.states,
    }
}

fn manifest(program: &Program, step: u64) -> Value {
    let path = Path::new(&program.stage.output_dir).join(format!("checkpoints/step-{step:08}/checkpoint.json"));
    serde_json::from_str(&fs::read_to_string(path).expect("a manifest")).expect("JSON")
}

#[test]
fn what_ranks_write_any_number_of_ranks_reads() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path());
    let one = run(&program, ONE, false, None);
    for from in [(1, 2, 1, 0), (1, 2, 1, 3), (1, 1, 2, 0), (2, 2, 1, 3), ONE] {
        let whole = run(&program, from, false, None);
        let begun = run(&program, from, false, Some(2));
        let manifest = manifest(&program, 2);
        let ranks = from.0 * from.1 * from.2;
        assert_eq!(manifest["format"], if ranks == 1 { 1 } else { 2 });
        let files = manifest["files"].as_object().expect("files");
        assert_eq!(files.len(), ranks, "{files:?}");
        let bytes: Vec<u64> = files.values().map(|file| file["bytes"].as_u64().expect("a size")).collect();
        let all: u64 = bytes.iter().sum();
        if (from.0, from.3) == (1, 3) {
            // What is too small to be cut is written by one rank.
            let share = all / ranks as u64;
            assert!(bytes.iter().all(|&own| own < share * 5 / 4), "{bytes:?} are no equal shares");
        }
        for to in [from, ONE, (1, 4, 1, 1), (2, 1, 2, 0)] {
            let both = joined(&begun, run(&program, to, true, None));
            assert_near(&both, &one, 1e-9, &format!("from {from:?} to {to:?}"));
            if to == from {
                assert!(both == whole, "{from:?} goes on to other bits");
            }
        }
    }
}

/// Every step learns from rollouts of this one and of earlier ones.
const REPLAY: &str = include_str!("common/replay.yaml");

const REPLAYED: &str = "
dsgc: 1
seed: 7
models:
  opt: {model: opt, tokenizer: TOKENIZER, config: {vocab: 641, hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 48}}
data:
  prompts: {path: rows.jsonl}
stages:
  replay:
    recipe: ./replay.yaml
    actor: opt
    data: prompts
    batch_size: 4
    micro_batch_size: 1
    learning_rate: 1e-3
    max_steps: 5
";

/// Actor, critic, their moments, the average, the penalty that follows the divergence, other text beside the rollouts, and
/// rollouts that are kept: all go on where they were, on as many ranks or on others.
#[test]
fn ppo_goes_on_on_any_number_of_ranks() {
    let tiny = Tiny { model: "opt", stage: "ppo", layers: 2, vocabulary: 25 };
    for (pipeline, rows) in [(tiny.pipeline("1e-3"), tiny::rows()), (REPLAYED.to_string(), rows())] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        tiny::write_tokenizer(folder.path());
        fs::write(folder.path().join("replay.yaml"), REPLAY).expect("a file");
        let mut program = stages::program(folder.path(), &pipeline, &rows, &[]);
        program.stage.max_steps = Some(6);
        for with in [On::Doubles, On::Fast] {
            // In single precision moments have as few digits as gradients that nearly cancel: what they do to weights is
            // compared.
            let comparable = |mut ran: Ran| {
                ran.steps.iter_mut().for_each(|step| step.retain(|name, _| name != tiny::OF_FEW_DIGITS));
                ran.states.retain(|name, _| with == On::Doubles || !(name.ends_with(".m") || name.ends_with(".v")));
                ran
            };
            let (least, bound) = if with == On::Doubles { (1e-3, 1e-9) } else { (1.0, 1e-5) };
            let one = comparable(run_with(&program, ONE, with, false, None));
            for from in [(1, 2, 1, 3), (1, 1, 2, 0), (2, 1, 1, 0)] {
                let whole = run_with(&program, from, with, false, None);
                assert_eq!(whole.steps.len(), 6);
                let begun = run_with(&program, from, with, false, Some(3));
                for to in [from, ONE, (1, 2, 2, 1)] {
                    let both = joined(&begun, run_with(&program, to, with, true, None));
                    let what = format!("{}, {with:?}, from {from:?} to {to:?}", program.stage.name);
                    assert!(to != from || both == whole, "{what}: it goes on to other bits");
                    let (metrics, states) = difference_above(&comparable(both), &one, least);
                    assert!(
                        metrics <= bound && states <= bound,
                        "{what}: {metrics:e} in metrics, {states:e} in states"
                    );
                }
            }
        }
    }
}

/// States have the bits that were written, whoever has written and whoever reads them.
#[test]
fn what_is_read_is_what_was_written() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut program = program(folder.path());
    (program.stage.max_steps, program.stage.checkpoints.every) = (Some(2), Some(2));
    let layouts = [(2, 1, 1, 0), (2, 2, 1, 3), (2, 1, 2, 0), (1, 2, 2, 1), ONE];
    for from in layouts {
        let written = run(&program, from, false, None);
        for to in layouts {
            let read = run(&program, to, true, None);
            assert_eq!(read.steps, [], "the last checkpoint is the end");
            assert!(read.states == written.states, "from {from:?} to {to:?}");
        }
    }
}

/// The text of a manifest with the hash that it then has.
fn sealed(mut manifest: Value) -> String {
    manifest.as_object_mut().expect("an object").remove("sha256");
    let text = serde_json::to_string_pretty(&manifest).expect("JSON") + "\n";
    let hash: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
    text.replacen("\n}\n", &format!(",\n  \"sha256\": \"{hash}\"\n}}\n"), 1)
}

#[test]
fn what_is_wrong_with_a_share_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path());
    run(&program, (1, 2, 1, 3), false, Some(2));
    let checkpoint = Path::new(&program.stage.output_dir).join("checkpoints/step-00000002");
    let keeper = || {
        static STOP: AtomicBool = AtomicBool::new(false);
        Keeper::new(&program, &STOP)
    };
    let share = checkpoint.join("states.1.safetensors");
    let bytes = fs::read(&share).expect("a share");
    let mut altered = bytes.clone();
    *altered.last_mut().expect("it has bytes") ^= 1;
    for (wrong, why) in [(Some(altered), "is not what was written"), (None, "cannot read")] {
        match wrong {
            Some(wrong) => fs::write(&share, wrong).expect("a file"),
            None => fs::remove_file(&share).expect("a file"),
        }
        let error = keeper().newest().err().expect("it is broken").message;
        assert!(error.contains(why) && error.contains("states.1.safetensors"), "{error}");
    }
    fs::write(&share, bytes).expect("a file");
    // A part that no file has.
    let mut manifest = manifest(&program, 2);
    let shards = manifest["shards"].as_object_mut().expect("shards");
    let (name, shard) = shards.iter_mut().find(|(_, s)| s["parts"][1].is_object()).expect("a state in parts");
    let name = name.clone();
    shard["parts"].as_array_mut().expect("parts").pop();
    fs::write(checkpoint.join("checkpoint.json"), sealed(manifest)).expect("a file");
    let error = on_ranks::run(&on(&program, ONE), On::Doubles, true, None);
    let error = error.expect_err("a part is missing").remove(0).message;
    assert!(error.ends_with(&format!("the parts are not the whole of `{name}`")), "{error}");
}

/// The error with which three ranks end, of which the last one's program or device is another.
fn disagreement(alter: impl Fn(Planned) -> Planned + Sync, stray: bool) -> Diag {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let planned = planned(&on(&program(folder.path()), (1, 3, 1, 0)), On::Doubles);
    let rank = |member: Member| {
        let last = member.rank() == 2;
        let own = if last { alter(planned.clone()) } else { planned.clone() };
        let mut device = device(&own, On::Doubles, &member);
        if last && stray {
            let run = |device: &mut dyn Device, graph: &str, inputs: &[(&str, &Tensor)]| -> Outputs {
                let mut outputs = device.run(graph, inputs)?;
                for (_, loss) in outputs.iter_mut().filter(|(name, _)| name == "loss") {
                    *loss = Tensor::f64(&[], vec![loss.scalar() + 1e-12]);
                }
                Ok(outputs)
            };
            device = Box::new(Watched { device, run });
        }
        let mut session = Session::open_as(own, device, member, &mut |_| Ok(()))?;
        session.run(&mut |_| Ok(())).map_err(|e| vec![e])
    };
    on_threads(planned.mesh, rank, first_message).expect_err("they differ").remove(0)
}

#[test]
fn ranks_that_run_another_program_do_not_begin() {
    let other = |planned: Planned| {
        let mut program = Program::clone(&planned);
        program.stage.trainings[0].schedule.learning_rate *= 2.0;
        Planned::new(program).expect("it is as good")
    };
    let error = disagreement(other, false).message;
    assert!(error.starts_with("ranks differ in the planned program: "), "{error}");
    assert!(error.contains(" on rank 0, ") && error.ends_with(" on rank 2"), "{error}");
}

/// Ranks that begin after different steps of one run.
#[test]
fn ranks_that_go_on_after_another_step_end() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut program = on(&program(folder.path()), (1, 2, 1, 0));
    program.stage.checkpoints.every = Some(1);
    ran(&program, On::Doubles, false, None);
    let planned = planned(&program, On::Doubles);
    let stop = AtomicBool::new(false);
    let rank = |member: Member| -> Result<(), Vec<Diag>> {
        let keeper = Keeper::new(&program, &stop);
        let step = 2 + member.rank();
        let folder = Path::new(&program.stage.output_dir).join(format!("checkpoints/step-{step:08}"));
        let device = device(&planned, On::Doubles, &member);
        let mut session = Session::open_as(planned.clone(), device, member, &mut |_| Ok(()))?;
        session.resume(&keeper.open(&folder).map_err(|e| vec![e])?).map_err(|e| vec![e])?;
        session.run_kept(&keeper, &mut |_| Ok(())).map(drop).map_err(|e| vec![e])
    };
    let error = on_threads(planned.mesh, rank, first_message).expect_err("they differ").remove(0).message;
    assert_eq!(error, "ranks differ in the step that the run begins after: 2 on rank 0, 3 on rank 1");
}

#[test]
fn ranks_with_another_loss_end() {
    let error = disagreement(|planned| planned, true).message;
    let (losses, step) = (error.split(": ").nth(1).expect("two losses"), "ranks differ in the `loss` of step 1: ");
    let losses: Vec<f64> = losses.split(", ").map(|l| l.split(' ').next().unwrap().parse().expect("a loss")).collect();
    assert!(error.starts_with(step) && error.contains(" on rank 0, ") && error.ends_with(" on rank 2"), "{error}");
    assert!((losses[0] - losses[1]).abs() < 1e-11 && losses[0] != losses[1], "{error}");
}

/// Two ranks, of which the last one has gone when the second step comes to a graph, and says nothing: why the first one ends.
fn left_alone(planned: &Planned, graph: &'static str) -> String {
    let ranks = threads_within(2, Duration::from_millis(500));
    let rank = |at: usize| {
        let member = Member { mesh: planned.mesh, transport: ranks[at].clone() };
        let mut device = device(planned, On::Cpu, &member);
        if at == 1 {
            let mut stepped = false;
            let run = move |device: &mut dyn Device, name: &str, inputs: &[(&str, &Tensor)]| -> Outputs {
                if stepped && name == graph {
                    return Err(Diag::error("it has gone"));
                }
                stepped |= name == "model.apply";
                device.run(name, inputs)
            };
            device = Box::new(Watched { device, run });
        }
        let mut session = Session::open_as(planned.clone(), device, member, &mut |_| Ok(()))?;
        session.run(&mut |_| Ok(())).map_err(|e| vec![e])
    };
    let error = thread::scope(|scope| {
        scope.spawn(|| rank(1).expect_err("it goes"));
        rank(0).expect_err("nobody comes")
    });
    error[0].message.clone()
}

/// The message names the op as the graph's text form does, so that a reader finds it among all others of its kind.
#[test]
fn a_rank_that_hangs_is_missed_at_a_step_and_an_op() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let planned = planned(&on(&program(folder.path()), (1, 2, 1, 3)), On::Cpu);
    for name in ["model.loss.grad", "model.apply"] {
        let graph = planned.graph(name).expect("a step has it");
        let text = GraphText(graph, &planned).to_string();
        let collective = |kind: &str| text.lines().filter(|line| line.contains(&format!(" = {kind} "))).count();
        let all: usize = ["all_gather", "all_reduce", "reduce_scatter"].map(collective).iter().sum();
        let (_, first) = graph.ops().find(|(_, op)| op.op.class() == Class::Collective).expect("ranks send");
        let message = left_alone(&planned, name);
        let (before, after) = message.split_once(", at `").unwrap_or_else(|| panic!("no op in {message}"));
        assert!(before.contains("rank 0 has waited 0.") && before.ends_with(" from rank 1"), "{message}");
        let (op, after) = after.split_once("` ").expect("an op");
        let (result, after) = after.split_once(' ').expect("its result");
        assert_eq!(op, first.op.name(), "{message}");
        assert!(after.starts_with(&format!("in @{name}, step 2 of `sft`; `DSGC_WAIT_SECONDS`")), "{message}");
        let of_it = |line: &&str| line.trim().starts_with(result) && line.contains(&format!(" = {op} "));
        let found: Vec<&str> = text.lines().filter(of_it).collect();
        assert_eq!(found.len(), 1, "{result} is one of {all} in\n{text}");
        assert!(name == "model.apply" || all > 5, "{all} in\n{text}");
    }
}
