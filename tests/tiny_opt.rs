//! From YAML to numbers: the tiny OPT of DeepSpeed-Chat's golden runs, its loss before and after one optimizer step, as
//! one call and cut into micro-batches (D1).

use std::path::Path;

use dsgc_ir::stage::{Statement, UpdateSteps};
use dsgc_ir::{Program, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, InterpTarget, Precision};
use dsgc_passes::{PassContext, run_passes};
use dsgc_yaml::load::{Options, load};

#[path = "common/sines.rs"]
mod sines;
#[path = "common/text.rs"]
mod text;

use sines::{Named, fill, rows};
use text::Text;

const PIPELINE: &str = "\
dsgc: 1
models:
  tiny: {model: opt, tokenizer: tok, config: {vocab: 24, hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 32}}
data:
  rows: {path: rows.jsonl}
stages:
  sft:
    model: tiny
    data: rows
    max_length: 8
    batch_size: 2
    learning_rate: 1e-2
    lr_scheduler_type: constant
    weight_decay: 0.1
    max_grad_norm: 1.0
";

/// The stage with its gradients, for calls of so many rows.
fn program(rows: usize) -> Program {
    let options = Options { sets: vec![format!("stages.sft.micro_batch_size={rows}")], ..Options::default() };
    let files = Text { pipeline: PIPELINE.into(), columns: &["text"] };
    let loaded = load(Path::new("p.yaml"), &options, &files).unwrap_or_else(|e| panic!("{:#?}", e.diags));
    let [stage] = loaded.stages.try_into().unwrap_or_else(|_| panic!("the pipeline has one stage"));
    let context = PassContext::new(&InterpTarget);
    run_passes(stage, &["infer", "adapt", "canonicalize", "autodiff", "canonicalize"], &context)
        .unwrap_or_else(|e| panic!("{e:#?}"))
}

fn call(interp: &mut Interp, graph: &str, values: &Named) -> Named {
    let declared = interp.program().graph(graph).unwrap_or_else(|| panic!("there is no @{graph}")).clone();
    let taken = values.iter().filter(|(name, _)| declared.input_named(name).is_some());
    let inputs: Vec<(&str, &Tensor)> = taken.map(|(name, tensor)| (name.as_str(), tensor)).collect();
    interp.run(graph, &inputs).unwrap_or_else(|e| panic!("@{graph}: {e}"))
}

/// Adds the totals of a graph over all calls; the sft loss has no others than sums.
fn totals(interp: &mut Interp, graph: &str, rows_per_call: usize, given: &Named) -> Named {
    let mut totals: Named = Vec::new();
    for at in (0..2).step_by(rows_per_call) {
        let part = rows().into_iter().map(|(name, tensor)| (name, tensor.rows(at..at + rows_per_call)));
        for (name, tensor) in call(interp, graph, &part.chain(given.clone()).collect()) {
            assert!(name.starts_with("sum."), "{name}");
            match totals.iter_mut().find(|(n, _)| *n == name) {
                None => totals.push((name, tensor)),
                Some((_, sum)) => {
                    let added = sum.to_f64().into_iter().zip(tensor.to_f64()).map(|(a, b)| a + b).collect();
                    *sum = Tensor::f64(&sum.shape, added);
                }
            }
        }
    }
    totals
}

/// The losses of two optimizer steps: before the first, and after it.
fn losses(rows_per_call: usize) -> [f64; 2] {
    let program = program(rows_per_call);
    let Statement::For { body, .. } = &program.stage.plan[0] else { panic!("the plan begins with `for`") };
    let Statement::Update(update) = &body[0] else { panic!("its body is an update") };
    let mut interp = Interp::new(program.clone(), Precision::F64);
    fill(&mut interp, &program);
    [1, 2].map(|step| {
        let settings: Named =
            vec![("lr".into(), Tensor::f64(&[], vec![1e-2])), ("t".into(), Tensor::i32(&[], vec![step]))];
        let outputs = match update.steps.as_ref().expect("autodiff fills it in") {
            UpdateSteps::Whole { step } => call(&mut interp, step, &[rows(), settings].concat()),
            UpdateSteps::Split { terms, apply, .. } => {
                let [steps] = &terms[..] else { panic!("the update has one term") };
                let mut all = Named::new();
                for graph in steps.count.iter().chain([&steps.grad]) {
                    all.extend(totals(&mut interp, graph, rows_per_call, &all.clone()));
                }
                let outputs = call(&mut interp, &steps.finish, &all);
                call(&mut interp, apply, &settings);
                outputs
            }
        };
        outputs.iter().find(|(name, _)| name == "loss").expect("there is a loss").1.scalar()
    })
}

#[test]
fn the_loss_of_the_tiny_opt_falls_as_it_should() {
    for rows_per_call in [1, 2] {
        let found = losses(rows_per_call);
        for (found, golden) in found.into_iter().zip([3.377_144_34, 2.889_971_02]) {
            assert!((found - golden).abs() < 1e-6, "found {found}, expected {golden}, {rows_per_call} rows per call");
        }
    }
}
