//! Numbers in the f64 interpreter.

use dsgc_ir::Tensor;
use dsgc_ir::verify::verify;
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Interp, Precision};

use crate::setup::{Documents, lower, tiny};

/// The golden model of rlhf.md 17.6: the k-th element of the p-th parameter is a sine, plus 1 in norms.
fn fill(interp: &mut Interp) {
    let states: Vec<_> = interp.program().state_ids().map(|(id, s)| (id, s.clone())).collect();
    for (p, (id, state)) in states.into_iter().enumerate() {
        let shape: Vec<usize> = state.ty.dims.iter().map(|d| d.constant().expect("a number") as usize).collect();
        let one = if state.name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let value = |k: usize| 0.1 * (0.7 * k as f64 + 1.9 * p as f64 + 0.3).sin() + one;
        let elements = (0..shape.iter().product()).map(value).collect();
        interp.set_state(id, &Tensor::f64(&shape, elements));
    }
}

#[test]
fn the_tiny_opt_has_its_golden_loss() {
    let mut documents = Documents::default();
    let (recipe, functions, model) =
        (documents.std_recipe("sft"), documents.std_functions(), documents.std_model("opt"));
    let program = lower(&recipe, &functions, &model, &tiny()).unwrap_or_else(|e| panic!("{e:?}"));
    verify(&program).unwrap_or_else(|e| panic!("{e}\n{program}"));
    let mut interp = Interp::new(program, Precision::F64);
    fill(&mut interp);
    let tokens = Tensor::i32(&[2, 8], vec![2, 5, 6, 7, 8, 9, 2, 2, 2, 11, 12, 13, 14, 15, 16, 17]);
    let seen = |at: usize| at != 7;
    let segment = Tensor::i32(&[2, 8], (0..16).map(|at| i32::from(seen(at))).collect());
    let trained = Tensor::bool(&[2, 8], (0..16).map(seen).collect());
    let inputs = [("text.tokens", &tokens), ("text.segment", &segment), ("text.trained", &trained)];
    let outputs = interp.run("loss", &inputs).unwrap_or_else(|e| panic!("{e}"));
    let loss = outputs.iter().find(|(name, _)| name == "loss").expect("an output `loss`").1.scalar();
    assert!((loss - 3.377_144_34).abs() < 1e-6, "{loss}");
}
