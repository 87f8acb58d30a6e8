//! A tiny model whose parameters are sines of their places, and the batch that it is trained on.

use std::collections::BTreeMap;

use dsgc_ir::{Program, Tensor};
use dsgc_kernels::Device;

/// The k-th element of the p-th parameter is a sine, plus 1 in norms.
pub fn fill(device: &mut dyn Device, program: &Program) {
    for (p, (id, _)) in program.params_of("model").enumerate() {
        let state = program.state(id);
        let shape = state.ty.shape(&BTreeMap::new()).expect("parameters have constant dims");
        let one = if state.name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let value = |k: usize| 0.1 * (0.7 * k as f64 + 1.9 * p as f64 + 0.3).sin() + one;
        device.set_state(id, &Tensor::f64(&shape, (0..shape.iter().product()).map(value).collect()));
    }
}

/// Tensors by name.
pub type Named = Vec<(String, Tensor)>;

/// Two rows; the last place of the first one is padding.
pub fn rows() -> Named {
    let tokens = Tensor::i32(&[2, 8], vec![2, 5, 6, 7, 8, 9, 2, 2, 2, 11, 12, 13, 14, 15, 16, 17]);
    let segment = Tensor::i32(&[2, 8], (0..16).map(|at| i32::from(at != 7)).collect());
    let trained = Tensor::bool(&[2, 8], (0..16).map(|at| at != 7).collect());
    [("text.tokens", tokens), ("text.segment", segment), ("text.trained", trained)]
        .map(|(name, tensor)| (name.to_string(), tensor))
        .into()
}
