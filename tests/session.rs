//! Stages that run in this process: which steps are taken, what is told, and what does not change the numbers.

use std::fs;
use std::path::{Path, PathBuf};

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Schedule, ScheduleKind, Statement};
use dsgc_ir::{Planned, Program, Tensor};
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::PassContext;
use dsgc_runtime::{Event, Metrics, Session, learning_rate};
use dsgc_yaml::load::{self, Options};
use tempfile::TempDir;

#[path = "../frontends/cli/host.rs"]
mod host;

const PIPELINE: &str = "\
dsgc: 1
seed: 7
models:
  base:
    model: opt
    tokenizer: TOKENIZER
    config: {hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 64}
data:
  prefs: {path: rows.jsonl, eval: 0.25}
stages:
  sft:
    model: base
    data: prefs
    batch_size: 4
    max_length: 48
    learning_rate: 1e-2
";

/// A folder with 24 rows, of which 6 are held out, and a pipeline on them.
struct Place(TempDir);

/// What is left of a stage.
struct Ran {
    session: Session,
    events: Vec<Event>,
    end: Result<(), Diag>,
}

impl Place {
    fn new() -> Place {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/rlhf");
        let place = Place(tempfile::tempdir().expect("a temporary folder"));
        let rows = fs::read_to_string(examples.join("data/prefs.jsonl")).expect("the example's rows");
        let rows: Vec<&str> = rows.lines().take(24).collect();
        fs::write(place.path("rows.jsonl"), rows.join("\n")).expect("a new file");
        let tokenizer = examples.join("tokenizer").display().to_string();
        fs::write(place.path("pipeline.yaml"), PIPELINE.replace("TOKENIZER", &tokenizer)).expect("a new file");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn program(&self, sets: &[&str]) -> Program {
        let mut sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        if !sets.iter().any(|s| s.starts_with("output_dir=")) {
            sets.push(format!("output_dir={}", self.path("runs").display()));
        }
        let loaded = load::load(&self.path("pipeline.yaml"), &Options { sets, ..Options::default() }, &host::Disk);
        loaded.unwrap_or_else(|e| panic!("{}", said(&e.diags))).stages.remove(0)
    }

    /// Opens a program in the interpreter, which computes in doubles.
    fn open(&self, program: Program, events: &mut Vec<Event>) -> Result<Session, Vec<Diag>> {
        let planned: Planned = dsgc_passes::compile(program, &PassContext::new(&InterpTarget), &mut |_| {})
            .unwrap_or_else(|e| panic!("{}", said(&e)));
        let device = Interp::planned(planned.clone(), Precision::F64);
        Session::open(planned, Box::new(device), &mut |event| {
            events.push(event.clone());
            Ok(())
        })
    }

    fn run_program(&self, program: Program) -> Ran {
        let mut events = Vec::new();
        let mut session = self.open(program, &mut events).unwrap_or_else(|e| panic!("{}", said(&e)));
        let end = session.run(&mut |event| {
            events.push(event.clone());
            Ok(())
        });
        Ran { session, events, end }
    }

    /// Runs the stage with these settings to its end.
    fn run(&self, sets: &[&str]) -> Ran {
        let ran = self.run_program(self.program(sets));
        assert!(ran.end.is_ok(), "{:?}", ran.end);
        ran
    }

    /// The messages of a stage that cannot begin.
    fn refused(&self, program: Program) -> String {
        self.open(program, &mut Vec::new()).err().map(|errors| said(&errors)).expect("the stage cannot begin")
    }
}

impl Ran {
    fn steps(&self) -> Vec<(u64, u64, f64, &Metrics, u64)> {
        let step = |event| match event {
            &Event::Step { step, steps, epoch, ref metrics, tokens, .. } => Some((step, steps, epoch, metrics, tokens)),
            _ => None,
        };
        self.events.iter().filter_map(step).collect()
    }

    fn evaluations(&self) -> Vec<(u64, &Metrics)> {
        let evaluation = |event| match event {
            &Event::Evaluated { step, ref metrics, .. } => Some((step, metrics)),
            _ => None,
        };
        self.events.iter().filter_map(evaluation).collect()
    }

    /// All parameters, but for those whose gradient is zero in exact arithmetic: their steps follow rounding errors.
    fn params(&self, program: &Program) -> Vec<(String, Tensor)> {
        let params = program.params_of("model").filter(|(_, name)| !name.ends_with("k_proj.bias"));
        params.map(|(id, name)| (name.to_string(), self.session.device().state(id))).collect()
    }
}

fn said(diags: &[Diag]) -> String {
    diags.iter().map(|d| format!("{d}\n")).collect()
}

/// The largest difference of two lists of parameters, relative to the largest element of each.
fn difference(a: &[(String, Tensor)], b: &[(String, Tensor)]) -> f64 {
    assert_eq!(a.len(), b.len());
    let of = |(a, b): (&(String, Tensor), &(String, Tensor))| {
        assert_eq!(a.0, b.0);
        let (a, b) = (a.1.to_f64(), b.1.to_f64());
        let largest = a.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        a.iter().zip(&b).map(|(x, y)| (x - y).abs() / largest).fold(0.0, f64::max)
    };
    a.iter().zip(b).map(of).fold(0.0, f64::max)
}

#[test]
fn steps_follow_from_epochs_unless_they_are_given() {
    let place = Place::new();
    // 18 rows in batches of 4 are 5 steps, the last of which has 2 rows.
    for (sets, expected) in [
        (["sft.num_epochs=1", ""], 5),
        (["sft.num_epochs=0.5", ""], 3),
        (["sft.num_epochs=2", ""], 10),
        (["sft.num_epochs=2", "sft.max_steps=4"], 4),
        (["sft.num_epochs=1", "sft.max_steps=7"], 7),
    ] {
        let sets: Vec<&str> = sets.into_iter().filter(|s| !s.is_empty()).collect();
        let ran = place.run(&sets);
        let steps = ran.steps();
        assert_eq!(ran.session.steps(), expected, "{sets:?}");
        for (i, (step, of, epoch, ..)) in steps.iter().enumerate() {
            assert_eq!((*step, *of), (i as u64 + 1, expected), "{sets:?}");
            assert!((epoch - (i + 1) as f64 / 5.0).abs() < 1e-12, "{sets:?}: {epoch}");
        }
        assert_eq!(steps.len() as u64, expected, "{sets:?}");
    }
}

#[test]
fn an_epoch_sees_every_row_once() {
    let place = Place::new();
    let ran = place.run(&["sft.num_epochs=2"]);
    let Event::Data { train, eval: Some(eval), .. } = &ran.events[0] else { panic!("{:?}", ran.events[0]) };
    assert_eq!((train.rows, eval.rows), (18, 6));
    let tokens: Vec<u64> = ran.steps().iter().map(|s| s.4).collect();
    let (first, second) = tokens.split_at(5);
    assert_eq!(first.iter().sum::<u64>(), train.tokens as u64);
    assert_eq!(second.iter().sum::<u64>(), train.tokens as u64);
    assert_ne!(first, second, "every epoch has its own order");
    assert!(matches!(ran.events.last(), Some(Event::Saved { role, .. }) if role == "model"), "{:?}", ran.events.last());
}

#[test]
fn evaluation_comes_before_between_and_after() {
    let place = Place::new();
    let steps = |sets: &[&str]| place.run(sets).evaluations().iter().map(|e| e.0).collect::<Vec<u64>>();
    assert_eq!(steps(&[]), [0, 5]);
    assert_eq!(steps(&["sft.eval_steps=2"]), [0, 2, 4, 5]);
    assert_eq!(steps(&["sft.eval_steps=2", "sft.max_steps=4"]), [0, 2, 4], "the end is not evaluated twice");
    assert_eq!(steps(&["sft.eval_steps=100"]), [0, 5]);
}

/// D1: the held-out rows are one batch, and so is an optimizer batch, however many rows a graph takes at once. The rows
/// differ in length, and the last batch and the last part of the held-out rows are smaller.
#[test]
fn parts_of_batches_give_the_numbers_of_whole_ones() {
    let place = Place::new();
    let run = |rows: &str| place.run(&["sft.batch_size=6", "sft.num_epochs=1.5", rows]);
    let whole = run("sft.micro_batch_size=6");
    assert_eq!(whole.steps().len(), 5);
    let program = place.program(&["sft.batch_size=6", "sft.num_epochs=1.5"]);
    for rows in ["sft.micro_batch_size=1", "sft.micro_batch_size=4"] {
        let parts = run(rows);
        let error = difference(&whole.params(&program), &parts.params(&program));
        assert!(error < 1e-11, "{rows}: parameters differ by {error:e}");
        let numbers = |ran: &Ran| -> Vec<(String, f64)> {
            let steps = ran.steps().into_iter().map(|s| s.3.clone());
            steps.chain(ran.evaluations().into_iter().map(|e| e.1.clone())).flatten().collect()
        };
        for (a, b) in numbers(&whole).iter().zip(numbers(&parts)) {
            assert_eq!(a.0, b.0);
            assert!((a.1 - b.1).abs() <= 1e-11 * a.1.abs(), "{rows}: {} {} and {}", a.0, a.1, b.1);
        }
    }
}

/// Wraps the body of a plan's `for` in a `repeat`.
fn repeated(mut program: Program, times: u64) -> Program {
    for statement in &mut program.stage.plan {
        if let Statement::For { body, .. } = statement {
            *body = vec![Statement::Repeat { times, body: std::mem::take(body) }];
        }
    }
    program
}

#[test]
fn a_repeat_takes_steps_on_the_same_batch() {
    let place = Place::new();
    // One batch of all rows, in the order of the file: two steps on it are two epochs.
    let whole = ["sft.batch_size=18", "data.prefs.shuffle=none"];
    let twice = place.run_program(repeated(place.program(&whole), 2));
    let two_epochs = place.run(&[&whole[..], &["sft.num_epochs=2"]].concat());
    let program = place.program(&whole);
    assert_eq!(twice.params(&program), two_epochs.params(&program));
    assert_eq!(twice.steps().len(), 1);
    assert_eq!(twice.evaluations()[1].1, two_epochs.evaluations()[1].1);
}

#[test]
fn the_schedule_counts_the_steps_of_a_role() {
    let place = Place::new();
    let schedule =
        Schedule { learning_rate: 1e-2, kind: ScheduleKind::Cosine, warmup_steps: 3, warmup_ratio: 0.0, clamp: false };
    let ran = place.run_program(repeated(place.program(&["sft.warmup_steps=3"]), 2));
    let rates: Vec<f64> = ran.steps().iter().map(|s| s.3["lr"]).collect();
    // 5 batches with 2 steps each; told is the second one of each.
    let expected: Vec<f64> = (0..5).map(|batch| learning_rate(&schedule, 2 * batch + 1, 10)).collect();
    assert_eq!(rates, expected);
}

#[test]
fn a_plan_of_another_form_is_refused_before_anything_is_read() {
    let place = Place::new();
    let mut nested = place.program(&[]);
    let plan = nested.stage.plan.clone();
    if let Some(Statement::For { body, .. }) = nested.stage.plan.first_mut() {
        *body = vec![Statement::Repeat { times: 2, body: plan }];
    }
    let refused = place.refused(nested);
    assert!(refused.contains("a `for` over data inside another one"), "{refused}");
    let mut two = place.program(&[]);
    two.stage.plan.extend(two.stage.plan.clone());
    let refused = place.refused(two);
    assert!(refused.contains("found 2 statements"), "{refused}");
}

#[test]
fn a_loss_that_is_no_number_ends_the_stage() {
    let place = Place::new();
    let ran = place.run_program(place.program(&["sft.learning_rate=1e200"]));
    let error = ran.end.as_ref().expect_err("the loss is NaN").to_string();
    assert!(error.contains("is NaN at step 2 of the stage `sft`"), "{error}");
    assert!(error.contains("learning_rate"), "{error}");
    assert_eq!(ran.steps().len(), 2, "the step that failed is told");
    assert!(!place.path("runs/sft").exists());
}

#[test]
fn parameters_that_are_no_numbers_are_not_written() {
    let place = Place::new();
    // The last step's loss is computed before its update, so nothing in its numbers shows what became of them.
    let ran = place.run_program(place.program(&["sft.learning_rate=1e308", "sft.weight_decay=1e9", "sft.max_steps=1"]));
    let error = ran.end.as_ref().expect_err("parameters are infinite").to_string();
    assert!(error.contains("is not finite after the stage `sft`: nothing is written"), "{error}");
    assert!(!place.path("runs/sft").exists());
}

/// Trains one step and gives a pipeline that begins with the result.
fn continued() -> Place {
    let place = Place::new();
    place.run(&["sft.max_steps=1"]);
    let text = fs::read_to_string(place.path("pipeline.yaml")).expect("the pipeline");
    let (head, rest) = text.split_once("  base:").expect("a model");
    let (_, tail) = rest.split_once("data:").expect("data");
    fs::write(place.path("pipeline.yaml"), format!("{head}  base: runs/sft\ndata:{tail}"))
        .expect("it was written before");
    place
}

#[test]
fn a_stage_does_not_write_over_the_model_that_it_begins_with() {
    let place = continued();
    let refused = place.refused(place.program(&[]));
    assert!(refused.contains("runs/sft` would be overwritten by the stage `sft`"), "{refused}");
    assert!(refused.contains("output_dir"), "{refused}");
    let elsewhere = format!("output_dir={}", place.path("other").display());
    let before = fs::read(place.path("runs/sft/model.safetensors")).expect("the weights");
    place.run(&[&elsewhere]);
    assert!(fs::read(place.path("runs/sft/model.safetensors")).expect("the weights") == before);
    assert!(place.path("other/sft/model.safetensors").exists());
}

#[test]
fn a_missing_tensor_is_named() {
    let place = continued();
    let file = place.path("runs/sft/model.safetensors");
    let bytes = fs::read(&file).expect("the weights");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a whole file");
    let missing = "model.decoder.layers.1.fc1.weight";
    let kept: Vec<_> = tensors.tensors().into_iter().filter(|(name, _)| name != missing).collect();
    assert_eq!(kept.len() + 1, tensors.len());
    let less = safetensors::serialize(kept, None).expect("tensors");
    fs::write(&file, less).expect("it was written before");
    let elsewhere = format!("output_dir={}", place.path("other").display());
    let refused = place.refused(place.program(&[&elsewhere]));
    assert!(refused.contains(&format!("found no tensor for parameter `{missing}`")), "{refused}");
    assert!(refused.contains("[32, 16]"), "{refused}");
    assert!(!place.path("other").exists());
}

/// The same texts in fewer rows: the loss is the mean over the same targets, and padding is left out.
#[test]
fn packed_texts_give_the_numbers_of_rows_apart() {
    let place = Place::new();
    let all = ["sft.batch_size=18", "sft.max_length=64", "sft.max_steps=1"];
    let apart = place.run(&all);
    let packed = place.run(&[&all[..], &["sft.packing=true"]].concat());
    let report = |ran: &Ran| {
        let data = ran.events.iter().find_map(|event| match event {
            Event::Data { train, .. } => Some(*train),
            _ => None,
        });
        data.expect("the data is told of")
    };
    let (rows, fewer) = (report(&apart), report(&packed));
    assert_eq!((rows.rows, rows.tokens, rows.packed), (fewer.rows, fewer.tokens, None));
    assert!(fewer.packed.is_some_and(|packed| packed < 18), "{fewer:?}");
    let numbers = |ran: &Ran| {
        let metrics = ran.evaluations().into_iter().map(|(_, metrics)| metrics.clone());
        metrics.chain(ran.steps().into_iter().map(|step| step.3.clone())).collect::<Vec<Metrics>>()
    };
    let (apart, packed) = (numbers(&apart), numbers(&packed));
    assert_eq!((apart.len(), packed.len()), (3, 3));
    for (apart, packed) in apart.iter().zip(&packed) {
        for (name, &number) in apart {
            let other = packed[name];
            assert!((number - other).abs() <= 1e-10 * number.abs(), "{name}: {number} apart, {other} packed");
        }
    }
}
