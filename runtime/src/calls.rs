//! Calling graphs on parts of a batch, and putting their totals together.
//!
//! Which graphs exist and what they hand on is decided by the pass `autodiff`: totals are called `sum.<k>`, `max.<k>` or
//! `min.<k>`, and the first part of the name says how those of parts become those of the whole. All other outputs of a
//! part have rows.

use std::collections::BTreeMap;
use std::ops::Range;

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{CallSteps, TermSteps};
use dsgc_ir::{Axis, DType, Data, Graph, Program, Tensor};
use dsgc_kernels::Device;
use dsgc_kernels::ranks::Member;

use crate::rank::{of_all_parts, parts_of};

/// Named tensors: what goes into graphs and comes out.
pub type Named = BTreeMap<String, Tensor>;

/// Runs a graph on those of the given tensors that it names.
pub fn call(device: &mut dyn Device, program: &Program, graph: &str, given: &[&Named]) -> Result<Named, Diag> {
    let graph = graph_named(program, graph);
    let prefixes = prefixes(program, graph, given)?;
    Ok(device.run(&graph.name, &inputs_of(graph, &[given, &[&prefixes]].concat()))?.into_iter().collect())
}

/// The same for some of the outputs.
pub(crate) fn call_for(
    device: &mut dyn Device,
    program: &Program,
    graph: &str,
    given: &[&Named],
    wanted: &[&str],
) -> Result<Named, Diag> {
    let graph = graph_named(program, graph);
    Ok(device.run_for(&graph.name, &inputs_of(graph, given), wanted)?.into_iter().collect())
}

/// Runs a graph on several parts of a batch, with further tensors that all of them take.
fn call_parts(
    device: &mut dyn Device,
    program: &Program,
    graph: &str,
    parts: &[Named],
    all: &Named,
) -> Result<Vec<Named>, Diag> {
    let graph = graph_named(program, graph);
    let prefixes: Vec<Named> =
        parts.iter().map(|part| prefixes(program, graph, &[part, all])).collect::<Result<_, _>>()?;
    let inputs: Vec<_> = parts.iter().zip(&prefixes).map(|(part, p)| inputs_of(graph, &[part, all, p])).collect();
    let made = device.run_parts(&graph.name, &inputs)?;
    Ok(made.into_iter().map(|outputs| outputs.into_iter().collect()).collect())
}

/// Those of the given tensors that a graph names.
fn inputs_of<'a>(graph: &'a Graph, given: &[&'a Named]) -> Vec<(&'a str, &'a Tensor)> {
    let named = |v| {
        let name = graph.name_of(v);
        given.iter().find_map(|g| g.get(name)).map(|tensor| (name, tensor))
    };
    graph.inputs().filter_map(named).collect()
}

/// The inputs that say after how many columns some sequences differ; see [`dsgc_ir::stage::Prefix`].
fn prefixes(program: &Program, graph: &Graph, given: &[&Named]) -> Result<Named, Diag> {
    let mut found = Named::new();
    for prefix in program.stage.prefixes.iter().filter(|p| graph.input_named(&p.input).is_some()) {
        let tensors = |end: &str| -> Result<Vec<&Tensor>, Diag> {
            let tensor = |name: &String| {
                let name = format!("{name}.{end}");
                let found = given.iter().find_map(|g| g.get(&name));
                found.ok_or_else(|| Diag::error(format!("found no `{name}` for @{}", graph.name)))
            };
            prefix.sequences.iter().map(tensor).collect()
        };
        let (tokens, segments) = (tensors("tokens")?, tensors("segment")?);
        let columns = tokens[0].shape.get(1).copied().unwrap_or_default();
        let common = |all: &[&Tensor]| match prefix.samples {
            1 => common_columns(all),
            samples => common_columns_of_groups(all[0], samples),
        };
        let common = common(&tokens).min(common(&segments)).min(columns.saturating_sub(1));
        let rest = columns - common;
        found.insert(prefix.input.clone(), Tensor::i32(&[rest], vec![0; rest]));
    }
    Ok(found)
}

/// How many first columns of these tensors `[N, T]` are equal in every row.
fn common_columns(tensors: &[&Tensor]) -> usize {
    let [first, others @ ..] = tensors else { return 0 };
    let [_, width] = first.shape[..] else { return 0 };
    let Data::I32(all) = &first.data else { return 0 };
    let mut columns = width;
    for other in others {
        let Data::I32(other) = &other.data else { return 0 };
        for (a, b) in all.chunks(width.max(1)).zip(other.chunks(width.max(1))) {
            columns = columns.min(a.iter().zip(b).take_while(|(a, b)| a == b).count());
        }
    }
    columns
}

/// How many first columns of a tensor `[N, T]` are equal in all rows of a group.
fn common_columns_of_groups(rows: &Tensor, samples: usize) -> usize {
    let ([_, width], Data::I32(all)) = (&rows.shape[..], &rows.data) else { return 0 };
    let equal = |first: &[i32], other: &[i32]| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    let of_group = |group: &[i32]| {
        let (first, others) = group.split_at((*width).min(group.len()));
        others.chunks((*width).max(1)).map(|other| equal(first, other)).min().unwrap_or(*width)
    };
    all.chunks((samples * width).max(1)).map(of_group).min().unwrap_or(*width)
}

/// The graph of this name.
///
/// # Panics
/// If there is none: the plan names graphs that the passes made.
pub(crate) fn graph_named<'a>(program: &'a Program, name: &str) -> &'a Graph {
    program.graph(name).unwrap_or_else(|| panic!("bug: the plan calls @{name}, which the program does not have"))
}

/// How many rows a batch has, by the inputs of a graph that have them.
pub(crate) fn rows_of(graph: &Graph, inputs: &Named) -> usize {
    let rows = graph.inputs().filter_map(|input| {
        let (factor, symbol) = graph.ty(input).dims.first()?.as_scaled_symbol()?;
        let tensor = inputs.get(graph.name_of(input)).filter(|_| Some(symbol) == graph.batch.as_ref())?;
        Some(tensor.shape[0] / factor as usize)
    });
    rows.max().unwrap_or(0)
}

/// Graphs that run on a batch part by part.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Totals that later graphs take, in rounds: each runs on all parts with the totals so far.
    pub count: &'a [String],
    /// What has rows, and the other totals.
    pub rows: &'a str,
    /// What follows from the totals of all parts.
    pub finish: Option<&'a str>,
}

impl<'a> Parts<'a> {
    /// The graphs of a call; `None` where it is one call of the graph itself.
    pub fn of_call(steps: &'a CallSteps) -> Option<Parts<'a>> {
        match steps {
            CallSteps::Whole | CallSteps::Joined(_) => None,
            CallSteps::Split { count, rows, finish } => Some(Parts { count, rows, finish: finish.as_deref() }),
        }
    }

    /// The graphs of a term of an update.
    pub fn of_term(steps: &'a TermSteps) -> Parts<'a> {
        Parts { count: &steps.count, rows: &steps.grad, finish: Some(&steps.finish) }
    }

    /// Most rows of a part; `None` where the graphs have no batch.
    pub fn size(&self, program: &Program) -> Option<usize> {
        let graph = graph_named(program, self.rows);
        let range = graph.dim_range(graph.batch.as_ref()?)?;
        usize::try_from(range.max).ok().filter(|&n| n > 0)
    }

    /// A batch's tensors cut along the batch, each part as large as the graphs take it: those of one rank.
    pub fn cut(&self, program: &Program, member: &Member, inputs: &Named) -> Vec<Named> {
        let factors = self.factors(program, inputs);
        let rows = factors.iter().map(|(name, factor)| inputs[*name].shape[0] / factor).max();
        let (Some(rows), Some(size)) = (rows, self.size(program)) else {
            assert_eq!(member.mesh.data, 1, "bug: ranks share the rows of @{}, which has none", self.rows);
            return vec![inputs.clone()];
        };
        let parts = parts_of(rows, size, &member.group(Axis::Data));
        parts.into_iter().map(|rows| with_rows(inputs, &factors, rows)).collect()
    }

    /// The same without any row.
    pub(crate) fn without_rows(&self, program: &Program, inputs: &Named) -> Named {
        with_rows(inputs, &self.factors(program, inputs), 0..0)
    }

    /// How many rows of a tensor belong to one of the batch, for those that have rows.
    fn factors<'n>(&self, program: &Program, inputs: &'n Named) -> BTreeMap<&'n str, usize> {
        let graphs: Vec<&Graph> =
            self.count.iter().map(String::as_str).chain([self.rows]).map(|g| graph_named(program, g)).collect();
        let factor = |name: &str| {
            graphs.iter().find_map(|graph| {
                let dim = graph.ty(graph.input_named(name)?).dims.first()?.clone();
                let (factor, symbol) = dim.as_scaled_symbol()?;
                (Some(symbol) == graph.batch.as_ref()).then_some(factor as usize)
            })
        };
        inputs.keys().filter_map(|n| Some((n.as_str(), factor(n)?))).collect()
    }

    /// Runs the graphs on a rank's parts of a batch, which need not have the same width. Every rank has equally many, and gets
    /// what the parts of all ranks give.
    pub fn run(
        &self,
        device: &mut dyn Device,
        program: &Program,
        member: &Member,
        parts: &[Named],
    ) -> Result<Outputs, Diag> {
        let group = member.group(Axis::Data);
        let mut of_parts =
            |graph: &str, totals: &Named| of_all_parts(&group, call_parts(device, program, graph, parts, totals)?);
        let mut totals = Named::new();
        for graph in self.count {
            let mut round = Named::new();
            of_parts(graph, &totals)?.into_iter().for_each(|part| combine(&mut round, part));
            totals.extend(round);
        }
        let mut outputs = Outputs::default();
        let mut round = Named::new();
        for made in of_parts(self.rows, &totals)? {
            let (of_all, of_rows) = made.into_iter().partition(|(name, _)| is_total(name));
            combine(&mut round, of_all);
            outputs.rows.push(of_rows);
        }
        totals.extend(round);
        if let Some(finish) = self.finish {
            let first = parts.first().cloned().unwrap_or_default();
            outputs.whole = call(device, program, finish, &[&totals, &first])?;
        }
        Ok(outputs)
    }
}

/// Some rows of a batch; tensors without rows are part of every one.
fn with_rows(inputs: &Named, factors: &BTreeMap<&str, usize>, rows: Range<usize>) -> Named {
    let cut = |(name, tensor): (&String, &Tensor)| match factors.get(name.as_str()) {
        Some(factor) => (name.clone(), tensor.rows(rows.start * factor..rows.end * factor)),
        None => (name.clone(), tensor.clone()),
    };
    inputs.iter().map(cut).collect()
}

/// What a call on several parts gives.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// Outputs with rows, of each part.
    pub rows: Vec<Named>,
    /// Outputs of all parts together.
    pub whole: Named,
}

/// Whether an output's name is that of a total.
fn is_total(name: &str) -> bool {
    let (how, number) = (name.split('.').next(), name.rsplit_once('.').map(|(_, number)| number));
    how.is_some_and(|how| ["sum", "max", "min"].contains(&how)) && number.is_some_and(|k| k.parse::<usize>().is_ok())
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
