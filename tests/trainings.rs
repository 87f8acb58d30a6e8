//! Random trainings through all passes: exact passes keep every bit of what the steps compute, and gradients are those of finite
//! differences.

use std::collections::BTreeMap;

use dsgc_ir::fuzz::{Rng, random_bindings, random_inputs, random_tensor, random_training};
use dsgc_ir::{Bindings, Op, Program, StateId, StateKind, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, Precision};
use dsgc_passes::PIPELINE;

mod common;

#[test]
fn exact_passes_keep_every_bit_of_random_trainings() {
    let mut changed: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..200 {
        let mut program = random_training(seed, 8 + seed as usize % 24);
        for pass in PIPELINE {
            let next = common::run(pass, &program).unwrap_or_else(|e| panic!("seed {seed}, `{}`: {}", pass.name, e[0]));
            *changed.entry(pass.name).or_default() += usize::from(next != program);
            program = next;
        }
    }
    let all =
        ["adapt", "autodiff", "canonicalize", "simplify", "rematerialize", "merge", "fuse", "order", "plan_memory"];
    for pass in all {
        assert!(changed[pass] > 0, "`{pass}` found nothing to do: {changed:?}");
    }
}

/// What moments are after the first step, of the gradient: `1 - betas[0]`.
const SHARE: f64 = 0.1;

/// Small enough for the curvature, large enough for the digits of doubles.
const STEP: f64 = 1e-5;

/// A loss and its step, in doubles on the same inputs and parameters.
struct Trial {
    program: Program,
    inputs: Vec<(String, Tensor)>,
    params: Vec<(String, Tensor)>,
}

impl Trial {
    /// `None` where a step leaves elements out at random, which the loss alone does not, or where it stops gradients, which
    /// differences do not see.
    fn new(seed: u64) -> Option<Trial> {
        let mut program = random_training(seed, 8 + seed as usize % 24);
        let graph = &program.graphs[0];
        if graph.ops().any(|(_, op)| matches!(op.op, Op::Dropout { .. } | Op::Stop {})) {
            return None;
        }
        let bindings: Bindings = random_bindings(graph, seed).into_iter().map(|(dim, n)| (dim, n.max(1))).collect();
        let inputs = random_inputs(graph, &bindings, seed);
        let mut rng = Rng::new(seed);
        let params = program.states.iter().map(|s| (s.name.clone(), random_tensor(&s.ty, &Bindings::new(), &mut rng)));
        let params = params.collect();
        program.stage.trainings[0].max_grad_norm = None;
        Some(Trial { program, inputs, params })
    }

    /// A device with the parameters moved along a direction.
    fn device(&self, program: &Program, direction: &[Vec<f64>], by: f64) -> Interp {
        let mut device = Interp::new(program.clone(), Precision::F64);
        for ((name, value), direction) in self.params.iter().zip(direction) {
            let moved = value.to_f64().iter().zip(direction).map(|(x, d)| x + by * d).collect();
            device.set_state(id(program, name), &Tensor::f64(&value.shape, moved));
        }
        device
    }

    fn run(&self, mut device: Interp, graph: &str, more: &[(&str, Tensor)]) -> (Tensor, Interp) {
        let own = self.inputs.iter().map(|(name, value)| (name.as_str(), value));
        let given: Vec<(&str, &Tensor)> = own.chain(more.iter().map(|(name, value)| (*name, value))).collect();
        let outputs = device.run(graph, &given).unwrap_or_else(|e| panic!("{e} in\n{}", self.program));
        let loss = outputs.into_iter().find(|(name, _)| name == "loss").expect("there is a loss");
        (loss.1, device)
    }

    /// How the loss grows along a direction, by differences over a step and over half of it.
    fn differences(&self, direction: &[Vec<f64>]) -> [f64; 2] {
        [STEP, STEP / 2.0].map(|by| {
            let [more, less] =
                [by, -by].map(|by| self.run(self.device(&self.program, direction, by), "loss", &[]).0.to_f64()[0]);
            (more - less) / (2.0 * by)
        })
    }

    /// The same by the gradient of the derived step, where the parameters that it trains move.
    fn derived(&self, direction: &mut [Vec<f64>]) -> f64 {
        let mut program = self.program.clone();
        for pass in &PIPELINE[..=PIPELINE.iter().position(|pass| pass.name == "autodiff").expect("it is there")] {
            program =
                common::run(pass, &program).unwrap_or_else(|e| panic!("`{}`: {}\n{}", pass.name, e[0], self.program));
        }
        let device = self.device(&program, direction, 0.0);
        let more = [("lr", Tensor::f64(&[], vec![0.1])), ("t", Tensor::i32(&[], vec![1]))];
        let (_, device) = self.run(device, "model.loss.step", &more);
        let mut slope = 0.0;
        for ((name, _), direction) in self.params.iter().zip(direction) {
            let trained = program.state(id(&program, name)).kind == StateKind::Param { trained: true };
            if !trained {
                direction.fill(0.0);
                continue;
            }
            let moments = device.state(id(&program, &format!("{name}.m"))).to_f64();
            slope += moments.iter().zip(direction.iter()).map(|(m, d)| m / SHARE * d).sum::<f64>();
        }
        slope
    }
}

fn id(program: &Program, name: &str) -> StateId {
    program.state_named(name).unwrap_or_else(|| panic!("there is no state `{name}` in\n{program}"))
}

#[test]
fn gradients_of_random_trainings_are_those_of_finite_differences() {
    let mut compared = 0;
    for seed in 0..300 {
        let Some(trial) = Trial::new(1000 + seed) else { continue };
        let mut rng = Rng::new(seed);
        let mut direction: Vec<Vec<f64>> =
            trial.params.iter().map(|(_, value)| value.to_f64().iter().map(|_| rng.unit() - 0.5).collect()).collect();
        let slope = trial.derived(&mut direction);
        let [wide, narrow] = trial.differences(&direction);
        // Where differences do not agree with each other, there is a bend or a jump. At an end of where a root, a logarithm or a power
        // has numbers, the formula of its slope has none.
        let scale = 1.0 + narrow.abs();
        let apart = (wide - narrow).abs() / scale;
        if !slope.is_finite() || apart.is_nan() || apart >= 1e-6 {
            continue;
        }
        compared += 1;
        assert!(
            (slope - narrow).abs() < 1e-5 * scale,
            "seed {seed}: {slope}, and {narrow} by differences of\n{}",
            trial.program
        );
    }
    assert!(compared > 120, "only {compared} were compared");
}
