//! Calling graphs on parts of a batch, and putting their totals together.
//!
//! Which graphs exist and what they hand on is decided by the pass `autodiff`: totals are called `sum.<k>`, `max.<k>` or
//! `min.<k>`, and the first part of the name says how those of parts become those of the whole.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::UpdateSteps;
use dsgc_ir::{DType, Data, Graph, Program, Tensor};
use dsgc_kernels::Device;

use crate::data::Batch;

/// Named tensors: what goes into graphs and comes out.
pub type Named = BTreeMap<String, Tensor>;

/// A batch as the inputs of a graph: `args` says which input is which part of the batch.
///
/// An entry `(text.tokens, batch.text.tokens)` gives the input `text.tokens` the tensor of that name; what the batch is
/// called in the plan does not matter.
pub fn inputs_of(batch: &Batch, args: &[(String, String)]) -> Named {
    let tensor = |path: &str| path.split_once('.').and_then(|(_, name)| batch.tensors.get(name)).cloned();
    args.iter().filter_map(|(input, path)| Some((input.clone(), tensor(path)?))).collect()
}

/// Runs a graph on those of the given tensors that it names.
pub fn call(device: &mut dyn Device, program: &Program, graph: &str, given: &[&Named]) -> Result<Named, Diag> {
    let graph = graph_named(program, graph);
    let inputs: Vec<(&str, &Tensor)> = graph
        .inputs()
        .filter_map(|v| {
            let name = graph.name_of(v);
            given.iter().find_map(|g| g.get(name)).map(|tensor| (name, tensor))
        })
        .collect();
    Ok(device.run(&graph.name, &inputs)?.into_iter().collect())
}

/// The graph of this name.
///
/// # Panics
/// If there is none: the plan names graphs that the passes made.
fn graph_named<'a>(program: &'a Program, name: &str) -> &'a Graph {
    program.graph(name).unwrap_or_else(|| panic!("bug: the plan calls @{name}, which the program does not have"))
}

/// One optimizer step on a batch; the answer holds the loss graph's numbers and `grad_norm`.
pub fn update(
    device: &mut dyn Device,
    program: &Program,
    steps: &UpdateSteps,
    inputs: &Named,
    micro_batch_size: usize,
    settings: &Named,
) -> Result<Named, Diag> {
    match steps {
        UpdateSteps::Whole { step } => call(device, program, step, &[inputs, settings]),
        UpdateSteps::Split { count, grad, finish, apply } => {
            let parts = parts(inputs, micro_batch_size);
            let mut totals = Named::new();
            if let Some(count) = count {
                for part in &parts {
                    combine(&mut totals, call(device, program, count, &[part])?);
                }
            }
            let given = totals.clone();
            let mut rest = Named::new();
            for part in &parts {
                combine(&mut rest, call(device, program, grad, &[part, &given])?);
            }
            totals.extend(rest);
            let mut outputs = call(device, program, finish, &[&totals, inputs])?;
            outputs.extend(call(device, program, apply, &[settings])?);
            Ok(outputs)
        }
    }
}

/// The inputs cut into at most `rows` rows each.
fn parts(inputs: &Named, rows: usize) -> Vec<Named> {
    let all = inputs.values().map(|t| t.shape[0]).max().unwrap_or(0);
    let cut = |from: usize| {
        let to = (from + rows).min(all);
        inputs.iter().map(|(name, tensor)| (name.clone(), tensor.rows(from..to))).collect()
    };
    (0..all).step_by(rows.max(1)).map(cut).collect()
}

/// Adds the totals of a part to those of the parts before it, in doubles.
///
/// # Panics
/// If a name says no way to combine: a bug of the pass that named it.
pub fn combine(totals: &mut Named, part: Named) {
    for (name, tensor) in part {
        let Some(so_far) = totals.get_mut(&name) else {
            let doubled = if tensor.dtype() == DType::F32 { tensor.double() } else { tensor };
            totals.insert(name, doubled);
            continue;
        };
        let with: fn(f64, f64) -> f64 = match name.split('.').next() {
            Some("sum") => |a, b| a + b,
            Some("max") => f64::max,
            Some("min") => f64::min,
            _ => panic!("bug: `{name}` does not say how parts become the whole"),
        };
        let numbers = so_far.to_f64().into_iter().zip(tensor.to_f64()).map(|(a, b)| with(a, b));
        let data = match so_far.data {
            Data::I32(_) => Data::I32(numbers.map(|x| x as i32).collect()),
            _ => Data::F64(numbers.collect()),
        };
        *so_far = Tensor::new(&tensor.shape, data);
    }
}
