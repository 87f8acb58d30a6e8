//! Random programs run: without errors for all values of their dims, and alike in and outside of the arena.

use dsgc_ir::fuzz::{random_bindings, random_inputs, random_program};
use dsgc_ir::{Data, Planned, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::interp::apart::plan_apart;
use dsgc_kernels::interp::{Interp, Precision};

/// Exact contents: bits, with one NaN.
fn bits(tensor: &Tensor) -> Vec<u64> {
    match &tensor.data {
        Data::Key(v) => v.iter().map(|k| u64::from(k[0]) << 32 | u64::from(k[1])).collect(),
        _ => tensor.to_f64().into_iter().map(|x| if x.is_nan() { u64::MAX } else { x.to_bits() }).collect(),
    }
}

#[test]
fn programs_give_the_same_inside_and_outside_of_the_arena() {
    let (mut programs, mut numbers, mut finite) = (0, 0, 0);
    for seed in 0..200 {
        let program = random_program(seed, 30);
        // Where the old value of a state is used after a write, a plan needs a copy, which `plan_apart` does not make.
        let Ok(planned) = Planned::new(plan_apart(program.clone())) else { continue };
        programs += 1;
        for precision in [Precision::F32, Precision::F64] {
            let mut loose = Interp::new(program.clone(), precision);
            let mut arena = Interp::planned(planned.clone(), precision);
            // Every graph twice, so that it also meets states that are not zero.
            for (i, graph) in program.graphs.iter().chain(&program.graphs).enumerate() {
                let bindings = random_bindings(graph, seed + i as u64);
                let inputs = random_inputs(graph, &bindings, seed + i as u64);
                let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
                let run = |interp: &mut Interp| {
                    interp.run(&graph.name, &inputs).unwrap_or_else(|e| panic!("seed {seed}: {e:?} in\n{program}"))
                };
                for ((name, a), (_, b)) in run(&mut loose).into_iter().zip(run(&mut arena)) {
                    assert_eq!((&a.shape, bits(&a)), (&b.shape, bits(&b)), "seed {seed}, `{name}` of\n{program}");
                    if matches!(a.data, Data::F64(_)) {
                        numbers += a.len();
                        finite += a.to_f64().iter().filter(|x| x.is_finite()).count();
                    }
                }
                for (id, state) in program.state_ids() {
                    assert_eq!(bits(&loose.state(id)), bits(&arena.state(id)), "seed {seed}, `{}`", state.name);
                }
            }
        }
    }
    assert!(programs > 100, "only {programs} programs can be planned");
    // Programs of NaN only would show nothing.
    assert!(finite * 3 > numbers * 2, "{finite} of {numbers} numbers are finite");
}
