//! Several ranks: collectives, and programs on all ranks in lockstep.

use std::collections::BTreeMap;
use std::sync::Arc;

use dsgc_ir::diag::Diag;
use dsgc_ir::{Mesh, Op, Program, StateId, Tensor, Value};

use super::real::Real;
use super::{Evaluated, Precision, eval, input, step, zero_state};
use crate::bind;
use crate::ranks::{Member, pack, unpack};

/// What a collective gives each rank of a group, from its operand with this number on all of them in their order.
fn collective<F: Real>(op: &Op, number: usize, parts: &[&Tensor]) -> Vec<Tensor> {
    let sum = || {
        let add = |a: Tensor, b: &&Tensor| {
            let sum = eval::arithmetic::<F>(&[&a, b], |a, b| a + b, |a, b| Some(a.wrapping_add(b)));
            sum.expect("operands of all ranks have one type").swap_remove(0)
        };
        parts[1..].iter().fold(parts[0].clone(), add)
    };
    match *op {
        Op::AllReduce { .. } => vec![sum(); parts.len()],
        Op::AllGather { axis, ref lens, .. } => vec![Tensor::unshard(axis, parts, lens[number]); parts.len()],
        Op::ReduceScatter { axis, ranks, .. } => (0..ranks).map(|at| sum().shard(axis, ranks, at)).collect(),
        Op::Shard { axis, ranks, .. } => parts.iter().enumerate().map(|(at, x)| x.shard(axis, ranks, at)).collect(),
        _ => panic!("bug: `{}` concerns one rank", op.name()),
    }
}

/// Runs a collective as one of its ranks; any other op gives `None`.
pub(super) fn as_member<F: Real>(
    member: &Member,
    op: &Op,
    operands: &[Arc<Tensor>],
) -> Result<Option<Vec<Tensor>>, Diag> {
    let over = match *op {
        Op::Shard { axis, over, ranks } => {
            return Ok(Some(vec![operands[0].shard(axis, ranks, member.mesh.place(over, member.rank()))]));
        }
        Op::AllReduce { over } | Op::AllGather { over, .. } | Op::ReduceScatter { over, .. } => over,
        _ => return Ok(None),
    };
    let group = member.group(over);
    let one = |(number, operand): (usize, &Arc<Tensor>)| {
        let parts: Vec<Tensor> = group.messages(&pack(operand))?.iter().map(|part| unpack(part).0).collect();
        let mut all = collective::<F>(op, number, &parts.iter().collect::<Vec<_>>());
        Ok(all.swap_remove(group.at()))
    };
    operands.iter().enumerate().map(one).collect::<Result<_, Diag>>().map(Some)
}

/// What one of several ranks begins with.
#[derive(Clone, Debug, Default)]
pub struct Given<'a> {
    /// Named inputs.
    pub inputs: Vec<(&'a str, &'a Tensor)>,
    /// States; those that are not there are zero.
    pub states: BTreeMap<StateId, Tensor>,
}

/// Runs one graph on all ranks of a mesh in lockstep.
pub fn eval_ranks(
    program: &Program,
    graph: &str,
    ranks: &[Given],
    precision: Precision,
) -> Result<Vec<Evaluated>, Diag> {
    match precision {
        Precision::F32 => lockstep::<f32>(program, graph, ranks, precision),
        Precision::F64 => lockstep::<f64>(program, graph, ranks, precision),
    }
}

fn lockstep<F: Real>(
    program: &Program,
    name: &str,
    ranks: &[Given],
    precision: Precision,
) -> Result<Vec<Evaluated>, Diag> {
    let graph = program.graph(name).ok_or_else(|| super::no_graph(program, name))?;
    let mesh: Mesh = program.mesh;
    assert_eq!(ranks.len(), mesh.ranks(), "inputs of every rank");
    let dims = ranks.iter().map(|given| bind(graph, &given.inputs)).collect::<Result<Vec<_>, _>>()?;
    let mut values: Vec<Vec<Option<Arc<Tensor>>>> = vec![vec![None; graph.values().len()]; ranks.len()];
    let mut made: Vec<Evaluated> = ranks.iter().map(|_| Evaluated::default()).collect();
    for (own, given) in values.iter_mut().zip(ranks) {
        for value in graph.inputs() {
            own[value.0 as usize] = Some(Arc::new(input::<F>(graph, value, &given.inputs)?));
        }
    }
    let get = |values: &[Vec<Option<Arc<Tensor>>>], rank: usize, v: Value| {
        values[rank][v.0 as usize].clone().unwrap_or_else(|| panic!("bug: %{} of @{} has no value", v.0, graph.name))
    };
    for (_, op) in graph.ops() {
        let over = match op.op {
            Op::AllReduce { over } | Op::AllGather { over, .. } => Some(over),
            Op::ReduceScatter { over, .. } | Op::Shard { over, .. } => Some(over),
            _ => None,
        };
        let results: Vec<Vec<Tensor>> = match over {
            Some(over) => {
                let mut results = vec![Vec::new(); ranks.len()];
                for first in (0..ranks.len()).filter(|&rank| mesh.place(over, rank) == 0) {
                    let group = mesh.group(over, first);
                    for (number, (&arg, result)) in op.args.iter().zip(op.results()).enumerate() {
                        let parts: Vec<Arc<Tensor>> = group.iter().map(|&rank| get(&values, rank, arg)).collect();
                        let parts: Vec<&Tensor> = parts.iter().map(|part| &**part).collect();
                        for (&rank, made) in group.iter().zip(collective::<F>(&op.op, number, &parts)) {
                            results[rank].push(F::rounded(made, graph.ty(result).dtype));
                        }
                    }
                }
                results
            }
            None => {
                let one = |rank: usize| {
                    let state = |id: StateId| {
                        let given = ranks[rank].states.get(&id).cloned();
                        let given = given.unwrap_or_else(|| zero_state(program, id, precision));
                        Arc::new(F::rounded(F::convert(given), program.state(id).ty.dtype))
                    };
                    let args: Vec<Arc<Tensor>> = match op.op {
                        Op::Read { state: id } => vec![state(id)],
                        _ => op.args.iter().map(|&arg| get(&values, rank, arg)).collect(),
                    };
                    if let Op::Write { state } = op.op {
                        made[rank].written.insert(state, Tensor::clone(&args[0]));
                    }
                    step::<F>(graph, op, &args, &dims[rank])
                };
                (0..ranks.len()).map(one).collect::<Result<_, _>>()?
            }
        };
        for (own, results) in values.iter_mut().zip(results) {
            for (value, result) in op.results().zip(results) {
                own[value.0 as usize] = Some(Arc::new(result));
            }
        }
    }
    for (rank, made) in made.iter_mut().enumerate() {
        let outputs = graph.outputs.iter();
        made.outputs = outputs.map(|(name, v)| (name.clone(), Tensor::clone(&get(&values, rank, *v)))).collect();
    }
    Ok(made)
}
