//! Mixed precision as a user asks for it: what is computed narrow, that devices agree on it, and how far it is from f32.

#[path = "../common/mod.rs"]
mod common;
mod fp16;
#[path = "../common/place.rs"]
mod place;
mod random;
mod runs;
#[path = "../common/sines.rs"]
mod sines;
#[path = "../common/text.rs"]
mod text;
mod training;
mod weights;

use std::path::Path;

use dsgc_ir::stage::{Statement, UpdateSteps};
use dsgc_ir::{Planned, Program, Target, Tensor};
use dsgc_kernels::Device;
use dsgc_passes::{PassContext, compile};
use dsgc_yaml::load::{Options, load};

use sines::{Named, fill, rows};
use text::Text;

/// A tiny model of either family, trained on rows of 8 tokens.
const SFT: &str = "\
dsgc: 1
models:
  tiny: {model: MODEL, tokenizer: tok, config: CONFIG}
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

const OPT: [&str; 2] = ["opt", "{vocab: 24, hidden: 16, layers: 2, heads: 2, ffn: 32, max_positions: 32}"];
const LLAMA: [&str; 2] =
    ["llama", "{vocab: 24, hidden: 16, layers: 2, heads: 4, kv_heads: 2, ffn: 32, max_positions: 32}"];

/// The stage of [`SFT`] for a family, with more lines in the stage.
fn stage([model, config]: [&str; 2], more: &str) -> Program {
    let pipeline = format!("{}{more}", SFT.replace("MODEL", model).replace("CONFIG", config));
    let text = Text { pipeline, columns: &["text"] };
    let loaded = load(Path::new("p.yaml"), &Options::default(), &text).unwrap_or_else(|e| panic!("{:#?}", e.diags));
    let [stage] = loaded.stages.try_into().unwrap_or_else(|_| panic!("the pipeline has one stage"));
    stage
}

fn planned(program: Program, target: &dyn Target) -> Planned {
    compile(program, &PassContext::new(target), &mut |_| {}).unwrap_or_else(|e| panic!("{e:#?}"))
}

/// The graph that is a whole optimizer step of the stage.
fn step_of(program: &Program) -> String {
    let Statement::For { body, .. } = &program.stage.plan[0] else { panic!("the plan begins with `for`") };
    let Statement::Update(update) = &body[0] else { panic!("its body is an update") };
    match update.steps.as_ref().expect("autodiff fills it in") {
        UpdateSteps::Whole { step } => step.clone(),
        UpdateSteps::Split { .. } => panic!("the batch is one call"),
    }
}

/// Takes the step number `t`, from 1; gives the outputs.
fn step(device: &mut dyn Device, program: &Program, t: i32) -> Named {
    let settings: Named = vec![("lr".into(), Tensor::f64(&[], vec![1e-2])), ("t".into(), Tensor::i32(&[], vec![t]))];
    let all = [rows(), settings].concat();
    let inputs: Vec<(&str, &Tensor)> = all.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    device.run(&step_of(program), &inputs).unwrap_or_else(|e| panic!("{e}"))
}

fn loss(outputs: &Named) -> f64 {
    outputs.iter().find(|(name, _)| name == "loss").expect("there is a loss").1.scalar()
}

/// The losses of some steps.
fn losses(device: &mut dyn Device, program: &Program, steps: i32) -> Vec<f64> {
    fill(device, program);
    (1..=steps).map(|t| loss(&step(device, program, t))).collect()
}
