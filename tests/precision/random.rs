//! Mixed precision of random programs, whose parameters are those of the role `model`.

use std::ops::Deref;

use dsgc_ir::fuzz::{Rng, random_bindings, random_inputs, random_model, random_tensor};
use dsgc_ir::stage::{Model, Origin, Role};
use dsgc_ir::{Bindings, DType, Op, Planned, Program, StateId, Tensor, parse};
use dsgc_kernels::Device;
use dsgc_kernels::cpu::{Cpu, CpuTarget};
use dsgc_passes::PIPELINE;

use super::{common, planned};

/// A random program whose model computes in a narrow float.
fn program(seed: u64, dtype: DType) -> Program {
    let mut program = random_model(seed, 30);
    program.stage.roles.push(Role {
        name: "model".into(),
        model: Model::default(),
        origin: Origin::Random,
        init: String::new(),
        trained: false,
        precision: Some(dtype),
        weights: None,
        zero_stage: 0,
        gather_for_generation: true,
        offload_optimizer: false,
        offload_param: false,
        tokenizer: None,
        shared: vec![],
    });
    program
}

/// The program with all its numbers in f32.
fn widened(program: &Program) -> Program {
    let text = program.to_string().replace(":f32 ", " ").replace("bf16", "f32").replace("f16", "f32");
    parse(&text).unwrap_or_else(|e| panic!("{e} in\n{text}"))
}

fn casts(program: &Program) -> usize {
    let ops = program.graphs.iter().flat_map(|graph| graph.ops());
    ops.filter(|(_, op)| matches!(op.op, Op::Cast { dtype } if dtype.is_narrow())).count()
}

#[test]
fn it_changes_types_only_and_what_follows_keeps_the_bits() {
    for dtype in [DType::Bf16, DType::F16] {
        let mut found = 0;
        for seed in 0..100 {
            let mut program = program(6000 + seed, dtype);
            for pass in PIPELINE {
                let next =
                    common::run(pass, &program).unwrap_or_else(|e| panic!("seed {seed}, `{}`: {}", pass.name, e[0]));
                if pass.name == "precision" {
                    found += casts(&next);
                    common::equal_values(&program, &widened(&next), &format!("seed {seed}: in doubles\n{next}"));
                }
                program = next;
            }
        }
        assert!(found > 300, "only {found} values become {dtype}");
    }
}

/// All graphs, one after the other: outputs, and states at the end, or the error.
fn run(mut device: impl Device, program: &Program, seed: u64) -> Result<Vec<Tensor>, String> {
    let mut rng = Rng::new(seed);
    for (id, state) in program.state_ids() {
        device.set_state(id, &random_tensor(&state.ty, &Bindings::new(), &mut rng));
    }
    let mut results = Vec::new();
    for graph in &program.graphs {
        let inputs = random_inputs(graph, &random_bindings(graph, seed), seed);
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        results.extend(device.run(&graph.name, &inputs).map_err(|e| e.message)?.into_iter().map(|(_, t)| t));
    }
    results.extend((0..program.states.len()).map(|i| device.state(StateId(i as u32))));
    Ok(results)
}

#[test]
fn the_cpu_computes_it_among_nan_to_the_same_bits_on_all_threads() {
    for seed in 0..100 {
        let dtype = if seed % 2 == 0 { DType::Bf16 } else { DType::F16 };
        let program = program(7000 + seed, dtype);
        let plan = |threads: usize| planned(program.clone(), &CpuTarget { threads });
        let text = |device: Cpu, plan: &Planned| format!("{:?}", run(device, plan.deref(), seed));
        let one = plan(1);
        let expected = text(Cpu::new(one.clone(), 1), &one);
        for threads in 1..=3 {
            let plan = plan(threads);
            let found = text(Cpu::poisoned(plan.clone(), threads), &plan);
            assert_eq!(found, expected, "seed {seed}, {threads} threads\n{}", *plan);
        }
    }
}
