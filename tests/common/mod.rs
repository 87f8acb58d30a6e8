//! What tests of passes share: passes by name with everything that must hold after each, and exact comparison.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::fuzz::{Rng, random_bindings, random_inputs, random_tensor};
use dsgc_ir::verify::verify;
use dsgc_ir::{Bindings, Data, Graph, Level, Planned, Program, State, StateId, StateKind, Tensor, parse};
use dsgc_kernels::Device;
use dsgc_kernels::interp::{Evaluated, Given, Interp, InterpTarget, Precision, eval_ranks};
use dsgc_passes::{Numerics, Pass, PassContext};

/// How many bindings of the dims a graph is run with.
const RUNS: u64 = 3;

/// Runs a pass and checks what holds after every pass: it verifies, reads back, is the same when run again, and, if
/// the pass is exact, has the values it had before.
pub fn run(pass: &Pass, program: &Program) -> Result<Program, Vec<Diag>> {
    let context = PassContext::new(&InterpTarget);
    let after = (pass.run)(program.clone(), &context)?;
    let text = after.to_string();
    let what = format!("after `{}`:\n{text}\nwhich was:\n{program}", pass.name);
    verify(&after).unwrap_or_else(|fault| panic!("{fault} {what}"));
    let read = parse(&text).unwrap_or_else(|e| panic!("{e} {what}"));
    assert_eq!(read.to_string(), text, "does not read back");
    let again = (pass.run)(program.clone(), &context).map(|p| p.to_string());
    assert_eq!(again, Ok(text), "`{}` gives two programs", pass.name);
    if pass.numerics == Numerics::Exact {
        equal_values(program, &after, &what);
    }
    Ok(after)
}

/// Runs the graphs that both programs have on random inputs and states, in f64: results and states are equal bit by
/// bit. A planned program runs in its arena. Ranks run in lockstep.
pub fn equal_values(before: &Program, after: &Program, what: &str) {
    if after.level == Level::Partitioned {
        return equal_on_ranks(before, after, what);
    }
    for graph in before.graphs.iter().filter(|g| after.graph(&g.name).is_some()) {
        for seed in 0..RUNS {
            let bindings = random_bindings(graph, seed);
            let (a, mut b) = (values(before, graph, &bindings, seed), values(after, graph, &bindings, seed));
            // States that the pass adds are nobody's results.
            b.retain(|(name, _)| {
                !name.starts_with('@')
                    || before.state_named(&name[1..]).is_some()
                    || after.state_named(&name[1..]).is_none()
            });
            for ((name, a), (_, b)) in a.iter().zip(&b) {
                assert_eq!(a, b, "`{name}` of @{} differs with {bindings:?} {what}", graph.name);
            }
            assert_eq!(a.len(), b.len(), "results of @{} {what}", graph.name);
        }
    }
}

/// The same on all ranks of a mesh. What graphs that the pass adds write into states is there when the others run.
fn equal_on_ranks(before: &Program, after: &Program, what: &str) {
    let added: Vec<&Graph> = after.graphs.iter().filter(|g| before.graph(&g.name).is_none()).collect();
    for graph in before.graphs.iter().filter(|g| after.graph(&g.name).is_some()) {
        for seed in 0..RUNS {
            let bindings = random_bindings(graph, seed);
            // Ranks that differ have other inputs and other parts of states.
            let states = |rank: usize| -> BTreeMap<StateId, Tensor> {
                let own = |name: &str| {
                    name.bytes().fold(seed + 97 * rank as u64, |hash, b| hash.wrapping_mul(31).wrapping_add(b.into()))
                };
                let random =
                    |state: &State| random_tensor(&state.ty, &Bindings::new(), &mut Rng::new(own(&state.name)));
                before.state_ids().map(|(id, state)| (id, random(state))).collect()
            };
            let inputs: Vec<_> =
                (0..after.mesh.ranks()).map(|rank| random_inputs(graph, &bindings, seed + 97 * rank as u64)).collect();
            let run = |program: &Program, added: &[&Graph]| {
                let given = |rank: usize| Given { inputs: Vec::new(), states: states(rank) };
                let mut ranks: Vec<Given> = (0..inputs.len()).map(given).collect();
                for graph in added {
                    let made = eval_ranks(program, &graph.name, &ranks, Precision::F64);
                    let made = made.unwrap_or_else(|e| panic!("{e} {what}"));
                    ranks.iter_mut().zip(made).for_each(|(rank, made)| rank.states.extend(made.written));
                }
                for (rank, own) in ranks.iter_mut().zip(&inputs) {
                    rank.inputs = own.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
                }
                eval_ranks(program, &graph.name, &ranks, Precision::F64).unwrap_or_else(|e| panic!("{e} {what}"))
            };
            let exact = |made: Vec<Evaluated>| -> Vec<_> {
                let of = |made: Evaluated| {
                    let written = made.written.into_iter().map(|(id, tensor)| (format!("@{}", id.0), tensor));
                    let all = made.outputs.into_iter().chain(written);
                    all.map(|(name, tensor)| (name, (tensor.shape.clone(), bits(&tensor)))).collect::<Vec<_>>()
                };
                made.into_iter().map(of).collect()
            };
            let (a, b) = (exact(run(before, &[])), exact(run(after, &added)));
            assert_eq!(a, b, "@{} with {bindings:?} {what}", graph.name);
        }
    }
}

/// Shape and bits of a tensor.
type Exact = (Vec<usize>, Vec<u64>);

/// All results of a graph and all states that are there before it, by name, as shape and bits.
fn values(program: &Program, graph: &Graph, bindings: &Bindings, seed: u64) -> Vec<(String, Exact)> {
    let mut interp = match program.level {
        Level::Logical | Level::Partitioned => Interp::new(program.clone(), Precision::F64),
        Level::Planned => {
            let planned = Planned::new(program.clone()).unwrap_or_else(|fault| panic!("{fault} in\n{program}"));
            Interp::planned(planned, Precision::F64)
        }
    };
    // A parameter may become narrow, and must not become another number by that.
    let narrow = program.stage.roles.iter().any(|role| role.precision.is_some());
    // What other generations keep may lie in one place.
    let kept = program.generation_of(graph);
    let is_there = |id: &StateId| program.state(*id).kind != StateKind::Generation || kept.contains(id);
    // Copies follow what they copy.
    let set = |(id, state): &(StateId, &State)| is_there(id) && !matches!(state.kind, StateKind::Copy { .. });
    for (id, state) in program.state_ids().filter(set) {
        // Equal names have equal values in both programs.
        let own = state.name.bytes().fold(seed, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let value = random_tensor(&state.ty, &Bindings::new(), &mut Rng::new(own));
        interp.set_state(id, &if narrow { of_few_bits(value) } else { value });
    }
    let inputs = random_inputs(graph, bindings, seed);
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let outputs = interp.run(&graph.name, &inputs).unwrap_or_else(|e| panic!("{e} in\n{program}"));
    let states = program.state_ids().filter(|(id, _)| is_there(id));
    let states = states.map(|(id, state)| (format!("@{}", state.name), interp.state(id)));
    let mut all: Vec<(String, Tensor)> = outputs.into_iter().chain(states).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all.into_iter().map(|(name, tensor)| (name, (tensor.shape.clone(), bits(&tensor)))).collect()
}

/// The tensor with floats that every type of floats has.
fn of_few_bits(tensor: Tensor) -> Tensor {
    let rounded = |x: f64| (x * 64.0).round() / 64.0;
    match &tensor.data {
        Data::F64(values) => Tensor::f64(&tensor.shape, values.iter().copied().map(rounded).collect()),
        _ => tensor,
    }
}

/// Exact contents: bits, with one NaN.
fn bits(tensor: &Tensor) -> Vec<u64> {
    match &tensor.data {
        Data::Key(v) => v.iter().map(|k| u64::from(k[0]) << 32 | u64::from(k[1])).collect(),
        _ => tensor.to_f64().into_iter().map(|x| if x.is_nan() { u64::MAX } else { x.to_bits() }).collect(),
    }
}
