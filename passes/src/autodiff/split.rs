//! Cutting a graph along the batch: graphs for one part of the rows, and one that finishes from the totals (D1).
//!
//! ```text
//! rows --count--> totals of data  -+-> grad (per part of the rows) --> gradients in their accumulators
//!                                  |                                   other totals --finish--> loss and metrics
//! ```
//!
//! `grad` runs the whole graph on its part. Totals that rows or gradients depend on must be whole before: `count`
//! gives them, and `grad` takes them as inputs instead of computing its part. All others are outputs of `grad`.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::diag::Diag;
use dsgc_ir::{Builder, Graph, Op, OpId, Program, StateId, StateKind, Value};

use super::batch::{Batch, Combine, analyse, cannot};
use super::scale;
use super::update::{Layers, companion, layers, site};
use super::{gradients_of_params, is_trained, scalar_outputs};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The graphs of an update in parts; names are filled in by the caller.
pub struct UpdateParts {
    /// Totals of data, in rounds: each takes those before it.
    pub count: Vec<Graph>,
    /// Gradients and the other totals.
    pub grad: Graph,
    /// Outputs from all totals.
    pub finish: Graph,
    /// Parameters that have a gradient, with their layers.
    pub params: Layers,
}

/// The graphs of a call in parts; names are filled in by the caller.
pub struct CallParts {
    /// Totals that rows depend on, in rounds: each takes those before it.
    pub count: Vec<Graph>,
    /// Outputs with rows, and the other totals.
    pub rows: Graph,
    /// Outputs without rows, from all totals; `None` when there are none.
    pub finish: Option<Graph>,
}

/// Cuts a loss graph for the training of a role, with a factor on its gradient. Accumulators `<param>.grad` are
/// declared.
pub fn update(
    program: &mut Program,
    graph: &Graph,
    role: &str,
    (loss, weight): (Value, f64),
) -> Result<UpdateParts, Diag> {
    let scale = scale::Scale::of(program, role);
    let cut = Cut::new(program, graph, |state| is_trained(program, role, state))?;
    let outputs = scalar_outputs(graph);
    let finish = cut.finish(&outputs, program);
    if let Some(read) = cut.walk(&[loss]).ops.iter().find(|&&id| reads_trained(program, graph, role, id)) {
        return Err(cannot(graph, Some(graph.op(*read)), "a part of the loss does not depend on the batch"));
    }
    let layers = layers(graph);
    let mut given = BTreeSet::new();
    loop {
        let mut roots: Vec<Value> = finish.totals.iter().map(|&k| cut.batch.totals[k].value).collect();
        roots.extend(&finish.sizes);
        roots.push(loss);
        let needed = cut.totals_of_rows(&roots, &given);
        if cut.give(&mut given, needed)? {
            continue;
        }
        let mut part = cut.part(&roots, &given, program);
        let trained: Vec<usize> = cut.local(&part, &given).filter(|&k| cut.batch.totals[k].trained).collect();
        let values: Vec<Value> = trained.iter().map(|&k| part.get(cut.batch.totals[k].value)).collect();
        let loss = part.get(loss);
        let one = scale::seed(&mut Builder::new(&mut part.new, Default::default()), scale, weight);
        let slopes = super::backward::backward(&mut part.new, &[(loss, one)], &values)?;
        let needed = cut.totals_of_slopes(&part, &slopes, &given);
        if cut.give(&mut given, needed)? {
            continue;
        }
        let mut seeds = Vec::new();
        for (k, (value, slope)) in trained.iter().zip(values.into_iter().zip(slopes)) {
            let Some(slope) = slope else { continue };
            let total = &cut.batch.totals[*k];
            if total.combine != Combine::Sum {
                let why = "its gradient goes to the row that has the extreme value, which one part cannot know";
                return Err(cannot(graph, Some(graph.op(total.op)), why));
            }
            seeds.push((value, slope));
        }
        let gradients = gradients_of_params(&mut part.new, program, role, &seeds, &layers)?;
        for (&param, &gradient) in &gradients {
            let accumulator = companion(program, param, "grad", StateKind::Scratch);
            let ty = program.state(param).ty.clone();
            let mut b = Builder::new(&mut part.new, site(program, param, &layers));
            let so_far = b.read(accumulator, &ty);
            let sum = b.one(Op::Add {}, &[so_far, gradient]);
            b.write(accumulator, &ty, sum);
        }
        part.new.outputs = cut.handed_on(&part, &finish, &given);
        let grad = without_dead_ops(&part.new, program);
        let count = cut.count(&given, program);
        let params = gradients.keys().map(|p| (*p, layers.get(p).cloned().flatten())).collect();
        return Ok(UpdateParts { count, grad, finish: finish.graph, params });
    }
}

/// Cuts a graph that trains nothing: its outputs with rows come from parts of the rows, all others from the totals.
/// Where nobody wants the rows, they are not computed.
pub fn call(program: &Program, graph: &Graph, wanted: bool) -> Result<CallParts, Diag> {
    let cut = Cut::new(program, graph, |_| false)?;
    let (rows, others): (Vec<_>, Vec<_>) =
        graph.outputs.iter().cloned().partition(|(_, v)| cut.batch.per_row[v.0 as usize]);
    let rows = if wanted { rows } else { Vec::new() };
    let finish = cut.finish(&others, program);
    let mut roots: Vec<Value> = finish.totals.iter().map(|&k| cut.batch.totals[k].value).collect();
    roots.extend(&finish.sizes);
    roots.extend(rows.iter().map(|(_, v)| v));
    let mut given = BTreeSet::new();
    loop {
        let needed = cut.totals_of_rows(&roots, &given);
        if !cut.give(&mut given, needed)? {
            break;
        }
    }
    let mut part = cut.part(&roots, &given, program);
    part.new.outputs = cut.handed_on(&part, &finish, &given);
    let rows: Vec<_> = rows.into_iter().map(|(name, v)| (name, part.get(v))).collect();
    part.new.outputs.extend(rows);
    let count = cut.count(&given, program);
    Ok(CallParts { count, rows: part.new, finish: (!others.is_empty()).then_some(finish.graph) })
}

fn reads_trained(program: &Program, graph: &Graph, role: &str, id: OpId) -> bool {
    matches!(graph.op(id).op, Op::Read { state } if is_trained(program, role, state))
}

/// A graph with what is known of it along the batch.
struct Cut<'a> {
    graph: &'a Graph,
    batch: Batch,
}

/// What a computation from totals needs.
struct Walk {
    /// Ops, in program order.
    ops: Vec<OpId>,
    /// Totals, as indices.
    totals: BTreeSet<usize>,
    /// Values of sizes that are known at launch only.
    sizes: BTreeSet<Value>,
}

/// The graph that finishes, and what it takes.
struct Finish {
    graph: Graph,
    totals: BTreeSet<usize>,
    sizes: BTreeSet<Value>,
}

impl<'a> Cut<'a> {
    fn new(program: &Program, graph: &'a Graph, trained: impl Fn(StateId) -> bool) -> Result<Cut<'a>, Diag> {
        let Some(symbol) = &graph.batch else {
            let roles: Vec<&str> = program.stage.roles.iter().map(|r| r.name.as_str()).collect();
            let why = format!("none of its inputs has a row per example (roles {})", roles.join(", "));
            return Err(cannot(graph, None, &why));
        };
        Ok(Cut { graph, batch: analyse(graph, symbol, trained)? })
    }

    fn total_of(&self, id: OpId) -> Option<usize> {
        self.batch.totals.iter().position(|t| t.op == id)
    }

    /// A size of rows: not known where only totals are.
    fn is_size(&self, id: OpId) -> bool {
        matches!(&self.graph.op(id).op, Op::Size { dim, .. } if dim.constant().is_none())
    }

    /// The name under which a size is handed on: all parts agree, and so does their largest.
    fn size_name(&self, value: Value) -> String {
        format!("max.size.{}", value.0)
    }

    /// Everything between totals and `roots`.
    fn walk(&self, roots: &[Value]) -> Walk {
        let mut walk = Walk { ops: Vec::new(), totals: BTreeSet::new(), sizes: BTreeSet::new() };
        let mut used: BTreeSet<Value> = roots.iter().copied().collect();
        for (id, op) in self.graph.ops().rev() {
            if !op.results().any(|r| used.contains(&r)) {
                continue;
            }
            if let Some(k) = self.total_of(id) {
                walk.totals.insert(k);
            } else if self.is_size(id) {
                walk.sizes.insert(op.result());
            } else {
                used.extend(&op.args);
                walk.ops.push(id);
            }
        }
        walk.ops.reverse();
        walk
    }

    /// The graph from totals to outputs.
    fn finish(&self, outputs: &[(String, Value)], program: &Program) -> Finish {
        let roots: Vec<Value> = outputs.iter().map(|o| o.1).collect();
        let walk = self.walk(&roots);
        let mut rebuild = Rebuild::new(self.graph, "");
        for &k in &walk.totals {
            let total = &self.batch.totals[k];
            let input = rebuild.new.input(&total.name, self.graph.ty(total.value).clone());
            rebuild.set(total.value, input);
        }
        for &size in &walk.sizes {
            let input = rebuild.new.input(self.size_name(size), self.graph.ty(size).clone());
            rebuild.set(size, input);
        }
        for input in self.graph.inputs().filter(|&i| !self.batch.per_row[i.0 as usize]) {
            if walk.ops.iter().any(|&id| self.graph.op(id).args.contains(&input)) || roots.contains(&input) {
                rebuild.keep_input(input);
            }
        }
        for &id in &walk.ops {
            rebuild.copy(self.graph.op(id), program);
        }
        let mut graph = rebuild.new.clone();
        graph.outputs = outputs.iter().map(|(n, v)| (n.clone(), rebuild.get(*v))).collect();
        graph.batch = None;
        let symbols: BTreeSet<_> = graph.values().flat_map(|v| graph.ty(v).dims.clone()).collect();
        graph.dims.retain(|d| symbols.iter().any(|dim| dim.mentions(&d.symbol)));
        Finish { graph, totals: walk.totals, sizes: walk.sizes }
    }

    /// Ops that `roots` need on a part of the rows, where the totals in `given` are inputs.
    fn needed(&self, roots: &[Value], given: &BTreeSet<usize>) -> Vec<OpId> {
        let mut used: BTreeSet<Value> = roots.iter().copied().collect();
        let mut ops = Vec::new();
        for (id, op) in self.graph.ops().rev() {
            let is_given = self.total_of(id).is_some_and(|k| given.contains(&k));
            if !is_given && op.results().any(|r| used.contains(&r)) {
                used.extend(&op.args);
                ops.push(id);
            }
        }
        ops.reverse();
        ops
    }

    /// The totals, not given yet, that rows depend on.
    fn totals_of_rows(&self, roots: &[Value], given: &BTreeSet<usize>) -> Vec<usize> {
        let mut of: BTreeMap<Value, BTreeSet<usize>> = BTreeMap::new();
        let mut found = BTreeSet::new();
        for id in self.needed(roots, given) {
            let op = self.graph.op(id);
            let mut from: BTreeSet<usize> = op.args.iter().filter_map(|a| of.get(a)).flatten().copied().collect();
            let of_rows = op.results().any(|r| self.batch.per_row[r.0 as usize]);
            if let Some(k) = self.total_of(id) {
                found.append(&mut from);
                from.insert(k);
            } else if of_rows {
                found.append(&mut from);
            }
            if !from.is_empty() {
                of.extend(op.results().map(|r| (r, from.clone())));
            }
        }
        found.into_iter().collect()
    }

    /// The totals, not given yet, that the slopes of the loss along its totals depend on.
    fn totals_of_slopes(&self, part: &Rebuild, slopes: &[Option<Value>], given: &BTreeSet<usize>) -> Vec<usize> {
        let mut of: BTreeMap<Value, BTreeSet<usize>> = BTreeMap::new();
        for k in self.local(part, given) {
            of.insert(part.get(self.batch.totals[k].value), BTreeSet::from([k]));
        }
        for (_, op) in part.new.ops() {
            let from: BTreeSet<usize> = op.args.iter().filter_map(|a| of.get(a)).flatten().copied().collect();
            if !from.is_empty() {
                for result in op.results() {
                    of.entry(result).or_default().extend(&from);
                }
            }
        }
        let all: BTreeSet<usize> = slopes.iter().flatten().filter_map(|s| of.get(s)).flatten().copied().collect();
        all.into_iter().collect()
    }

    /// Adds totals that must be known beforehand, with those that they depend on; whether there are any.
    fn give(&self, given: &mut BTreeSet<usize>, more: Vec<usize>) -> Result<bool, Diag> {
        let mut open = more;
        let any = !open.is_empty();
        while let Some(k) = open.pop() {
            let total = &self.batch.totals[k];
            if total.trained {
                let why = "rows are weighted by this total, which depends on the parameters that are trained";
                return Err(cannot(self.graph, Some(self.graph.op(total.op)), why));
            }
            if given.insert(k) {
                // What the total itself is made from, but for its own last step.
                let before = self.graph.op(total.op).args.clone();
                open.extend(self.totals_of_rows(&before, &BTreeSet::new()));
            }
        }
        Ok(any)
    }

    /// The graphs that compute totals beforehand: one for each round, as each needs those before it whole.
    fn count(&self, given: &BTreeSet<usize>, program: &Program) -> Vec<Graph> {
        let rounds: BTreeSet<u32> = given.iter().map(|&k| self.batch.totals[k].round).collect();
        let graph = |&round: &u32| {
            let of = |keep: &dyn Fn(u32) -> bool| -> BTreeSet<usize> {
                given.iter().copied().filter(|&k| keep(self.batch.totals[k].round)).collect()
            };
            let (now, before) = (of(&|r| r == round), of(&|r| r < round));
            let roots: Vec<Value> = now.iter().map(|&k| self.batch.totals[k].value).collect();
            let mut part = self.part(&roots, &before, program);
            let totals = now.iter().map(|&k| &self.batch.totals[k]);
            part.new.outputs = totals.map(|t| (t.name.clone(), part.get(t.value))).collect();
            part.new
        };
        rounds.iter().map(graph).collect()
    }

    /// The graph that computes `roots` on a part of the rows; its outputs are the caller's.
    fn part(&self, roots: &[Value], given: &BTreeSet<usize>, program: &Program) -> Rebuild<'a> {
        let mut rebuild = Rebuild::new(self.graph, "");
        for input in self.graph.inputs() {
            rebuild.keep_input(input);
        }
        for &k in given {
            let total = &self.batch.totals[k];
            let input = rebuild.new.input(&total.name, self.graph.ty(total.value).clone());
            rebuild.set(total.value, input);
        }
        for id in self.needed(roots, given) {
            rebuild.copy(self.graph.op(id), program);
        }
        rebuild
    }

    /// Totals that a part computes itself.
    fn local(&self, part: &Rebuild, given: &BTreeSet<usize>) -> impl Iterator<Item = usize> {
        let present = |k: &usize| !given.contains(k) && part.find(self.batch.totals[*k].value).is_some();
        (0..self.batch.totals.len()).filter(present).collect::<Vec<_>>().into_iter()
    }

    /// What a part hands on to the graph that finishes.
    fn handed_on(&self, part: &Rebuild, finish: &Finish, given: &BTreeSet<usize>) -> Vec<(String, Value)> {
        let totals = finish.totals.difference(given).map(|&k| &self.batch.totals[k]);
        let totals = totals.map(|t| (t.name.clone(), part.get(t.value)));
        totals.chain(finish.sizes.iter().map(|&s| (self.size_name(s), part.get(s)))).collect()
    }
}
