//! Checkpoints that several ranks write, each its share, read by any number of ranks; and ranks that do not agree, which end.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use dsgc_ir::diag::Diag;
use dsgc_ir::{Mesh, Planned, Program, StateId, StateKind, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_kernels::ranks::Member;
use dsgc_passes::PassContext;
use dsgc_runtime::{Ended, Event, Keeper, Metrics, Session, on_threads};
use serde_json::Value;

#[allow(dead_code)] // Other tests use the rest.
mod stages;

/// Sizes that neither two nor four ranks can share out evenly.
const PIPELINE: &str = "
dsgc: 1
seed: 7
models:
  opt: {model: opt, tokenizer: TOKENIZER, config: {hidden: 12, layers: 2, heads: 2, ffn: 26, max_positions: 31}}
data:
  texts: {path: rows.jsonl, fields: {text: prompt}}
stages:
  sft: {model: opt, data: texts, batch_size: 8, micro_batch_size: 2, max_length: 24, learning_rate: 1e-2, max_steps: 4}
";

fn program(folder: &Path) -> Program {
    let rows: Vec<String> = (0..24).map(|i| format!("{{\"prompt\": \"Question {i} and {}?\"}}", i * i)).collect();
    stages::program(folder, PIPELINE, &rows, &[])
}

/// Ranks along `data` and `tensor`, and the stage of ZeRO.
type Layout = (usize, usize, u8);

const ONE: Layout = (1, 1, 0);

fn laid_out(program: &Program, (data, tensor, zero_stage): Layout) -> Program {
    let mut program = program.clone();
    program.mesh = Mesh { data, tensor, ..Mesh::default() };
    program.stage.roles.iter_mut().for_each(|role| role.zero_stage = zero_stage);
    program
}

fn planned(program: &Program) -> Planned {
    stages::compile(program, &PassContext::new(&InterpTarget), None)
}

fn device(planned: &Planned, member: &Member) -> Box<dyn Device> {
    Box::new(Interp::planned(planned.clone(), Precision::F64).as_member(member.clone()))
}

/// What all ranks have of a stage: metrics of its steps, and parameters and states.
type Ran = (Vec<Metrics>, BTreeMap<String, Tensor>);

/// Runs a stage on all ranks, from the newest checkpoint if it is to be resumed; the last rank may be told to stop after a step.
fn run(program: &Program, layout: Layout, resume: bool, stops: Option<u64>) -> Result<Ran, Vec<Diag>> {
    let program = laid_out(program, layout);
    let planned = planned(&program);
    let ranks = program.mesh.ranks();
    let rank = |member: Member| -> Result<Ran, Vec<Diag>> {
        let last = member.rank() + 1 == ranks;
        let (stop, mut steps) = (AtomicBool::new(false), Vec::new());
        let keeper = Keeper::new(&program, &stop);
        let device = device(&planned, &member);
        let mut session = Session::open_as(planned.clone(), device, member, &mut |_| Ok(()))?;
        if resume {
            let newest = keeper.newest().map_err(|e| vec![e])?.expect("there is a checkpoint");
            session.resume(&newest).map_err(|e| vec![e])?;
        }
        let ended = session.run_kept(&keeper, &mut |event| {
            if let Event::Step { step, metrics, .. } = event {
                steps.push(metrics.clone());
                stop.store(last && stops == Some(*step), Ordering::Relaxed);
            }
            Ok(())
        });
        assert_eq!(ended.map_err(|e| vec![e])?, stops.map_or(Ended::Finished, Ended::Stopped));
        let lasts = |kind| matches!(kind, StateKind::Param { .. } | StateKind::State);
        let ids: Vec<(StateId, String)> =
            planned.state_ids().filter(|(_, s)| lasts(s.kind)).map(|(id, s)| (id, s.name.clone())).collect();
        let states = ids.into_iter().map(|(id, name)| Ok((name, session.state(id)?)));
        Ok((steps, states.collect::<Result<_, Diag>>().map_err(|e| vec![e])?))
    };
    let mut all = on_threads(program.mesh, rank, |errors: &Vec<Diag>| errors[0].message.clone())?;
    assert!(all.iter().all(|other| *other == all[0]), "ranks have other numbers than the first one");
    Ok(all.swap_remove(0))
}

fn ran(program: &Program, layout: Layout, resume: bool, stops: Option<u64>) -> Ran {
    run(program, layout, resume, stops).unwrap_or_else(|e| panic!("{layout:?}: {e:?}"))
}

fn assert_near(found: &Ran, expected: &Ran, what: &str) {
    let losses = |ran: &Ran| ran.0.iter().map(|metrics| metrics["loss"]).collect::<Vec<_>>();
    let apart = |a: &f64, b: &f64| (a - b).abs();
    let (a, b) = (losses(found), losses(expected));
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(&b).all(|(a, b)| apart(a, b) <= 1e-9), "{what}: losses {a:?}, expected {b:?}");
    assert!(found.1.keys().eq(expected.1.keys()));
    // The gradient of this bias is zero in exact arithmetic: its steps follow rounding errors.
    for (name, expected) in expected.1.iter().filter(|(name, _)| !name.contains("k_proj.bias")) {
        let (a, b) = (found.1[name].to_f64(), expected.to_f64());
        assert_eq!(found.1[name].shape, expected.shape, "{name}");
        assert!(a.iter().zip(&b).all(|(a, b)| apart(a, b) <= 1e-9), "{what}: `{name}` differs");
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
    let one = ran(&program, ONE, false, None);
    for from in [(2, 1, 0), (2, 1, 3), (1, 2, 0), (2, 2, 3), ONE] {
        let whole = ran(&program, from, false, None);
        let begun = ran(&program, from, false, Some(2));
        let manifest = manifest(&program, 2);
        let ranks = from.0 * from.1;
        assert_eq!(manifest["format"], if ranks == 1 { 1 } else { 2 });
        let files = manifest["files"].as_object().expect("files");
        assert_eq!(files.len(), ranks, "{files:?}");
        let bytes: Vec<u64> = files.values().map(|file| file["bytes"].as_u64().expect("a size")).collect();
        let all: u64 = bytes.iter().sum();
        if from.2 == 3 {
            // What is too small to be cut is written by one rank.
            let share = all / ranks as u64;
            assert!(bytes.iter().all(|&own| own < share * 5 / 4), "{bytes:?} are no equal shares");
        }
        for to in [from, ONE, (4, 1, 1), (1, 2, 0)] {
            let after = ran(&program, to, true, None);
            let both = ([begun.0.clone(), after.0].concat(), after.1);
            assert_near(&both, &one, &format!("from {from:?} to {to:?}"));
            if to == from {
                assert!(both == whole, "{from:?} goes on to other bits");
            }
        }
    }
}

#[test]
fn what_is_wrong_with_a_share_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = program(folder.path());
    ran(&program, (2, 1, 3), false, Some(2));
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
    fs::write(checkpoint.join("checkpoint.json"), manifest.to_string()).expect("a file");
    let error = run(&program, ONE, true, None).expect_err("a part is missing").remove(0).message;
    assert!(error.ends_with(&format!("the parts are not the whole of `{name}`")), "{error}");
}

/// A device that gives another loss.
struct Straying(Box<dyn Device>);

impl Device for Straying {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn set_state(&mut self, id: StateId, value: &Tensor) {
        self.0.set_state(id, value);
    }

    fn set_part(&mut self, id: StateId, value: &Tensor) {
        self.0.set_part(id, value);
    }

    fn state(&self, id: StateId) -> Tensor {
        self.0.state(id)
    }

    fn run(&mut self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, Diag> {
        let mut outputs = self.0.run(graph, inputs)?;
        for (_, loss) in outputs.iter_mut().filter(|(name, _)| name == "loss") {
            *loss = Tensor::f64(&[], vec![loss.scalar() + 1e-12]);
        }
        Ok(outputs)
    }
}

/// The error with which three ranks end, of which the last one's program or device is another.
fn disagreement(alter: impl Fn(Planned) -> Planned + Sync, stray: bool) -> Diag {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let planned = planned(&laid_out(&program(folder.path()), (3, 1, 0)));
    let rank = |member: Member| {
        let last = member.rank() == 2;
        let own = if last { alter(planned.clone()) } else { planned.clone() };
        let mut device = device(&own, &member);
        if last && stray {
            device = Box::new(Straying(device));
        }
        let mut session = Session::open_as(own, device, member, &mut |_| Ok(()))?;
        session.run(&mut |_| Ok(())).map_err(|e| vec![e])
    };
    on_threads(planned.mesh, rank, |errors: &Vec<Diag>| errors[0].message.clone()).expect_err("they differ").remove(0)
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

#[test]
fn ranks_with_another_loss_end() {
    let error = disagreement(|planned| planned, true).message;
    let (losses, step) = (error.split(": ").nth(1).expect("two losses"), "ranks differ in the `loss` of step 1: ");
    let losses: Vec<f64> = losses.split(", ").map(|l| l.split(' ').next().unwrap().parse().expect("a loss")).collect();
    assert!(error.starts_with(step) && error.contains(" on rank 0, ") && error.ends_with(" on rank 2"), "{error}");
    assert!((losses[0] - losses[1]).abs() < 1e-11 && losses[0] != losses[1], "{error}");
}
