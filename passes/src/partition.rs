//! Makes of a program what one rank of its mesh runs: states become parts, and collectives move what other ranks have.
//!
//! ```text
//! mesh data=2                                     with ZeRO 3
//! param @model/w : f32[8, 4] trained       =>     param @model/w : f32[4, 4] of [8, 4] cut data/0 trained
//! %w = read @model/w : f32[8, 4]                  %p = read @model/w : f32[4, 4]
//!                                                 %w = all_gather %p over=data axis=0 lens=[8] : f32[8, 4]
//! %y = contract %x, %w spec=bt,vt->bv             %y = contract %x, %w spec=bt,vt->bv
//! ```
//!
//! Layers are shared out first (`tensor`), then rows. `assign` says what a rank holds of each state. One walk over each graph
//! follows what ranks hold of every value (`Has`): a rank has other rows than the others, so what is summed over rows is
//! partial; sums of partial values stay so; what is elementwise stays in parts. Where an op wants something else than it
//! has, `Partition::reshard` is the only place that inserts a collective:
//!
//! | has \ wants | same | cut |
//! |---|---|---|
//! | same | - | `shard` |
//! | cut | `all_gather` | - |
//! | partial | `all_reduce` | `reduce_scatter` |
//!
//! A value is moved once and used by all ops of its phase that want it. The backward pass gathers again: so what was gathered
//! lives for its layer only (ZeRO 3).

mod assign;
mod tensor;

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::infer::Contraction;
use dsgc_ir::trained::reads;
use dsgc_ir::{Axis, Builder, Class, Dim, Graph, Level, Op, OpData, Phase, Program, Site, StateId, Type, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};
use assign::Assigned;

/// The pass.
pub const PASS: Pass = Pass {
    name: "partition",
    requires: &[Fact::Typed, Fact::Differentiated],
    provides: &[Fact::Partitioned],
    // Sums over rows are taken of each rank's rows first.
    numerics: Numerics::Reassociating,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    if program.mesh.is_single() {
        return Ok(program);
    }
    program.level = Level::Partitioned;
    if program.mesh.tensor > 1 {
        program = tensor::run(program, context)?;
    }
    if program.mesh.data == 1 {
        return Ok(program);
    }
    let assigned = assign::assign(&program);
    let whole = program.clone();
    for (&id, placement) in &assigned.placements {
        let local = placement.local(&program.mesh);
        let state = &mut program.states[id.0 as usize];
        state.ty.dims = local.into_iter().map(|extent| Dim::from(extent as i64)).collect();
        state.placement = Some(placement.clone());
        let how = if placement.partial.is_some() { "partial" } else { "cut" };
        context.matched(&format!("state {how} over data"), 1);
    }
    let graphs = whole.graphs.iter().map(|graph| Partition::of(graph, &whole, &program, &assigned, context));
    program.graphs = graphs.collect();
    Ok(program)
}

/// What the ranks along the data axis have of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Has {
    /// All have it.
    Same,
    /// Each has what its own rows give.
    Rows,
    /// Each has a summand.
    Partial,
    /// Each has a part of the first dim, which has so many places in all.
    Cut(usize),
}

/// What an op wants of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Want {
    Same,
    Cut(usize),
}

/// A graph on its way.
struct Partition<'a> {
    /// The program before, and after as far as its states are concerned.
    whole: &'a Program,
    local: &'a Program,
    context: &'a PassContext<'a>,
    rebuild: Rebuild<'a>,
    /// Per value of the new graph.
    has: Vec<Has>,
    /// What has been moved already: value, what was wanted, and whether for the forward pass.
    moved: BTreeMap<(Value, Want, bool), Value>,
}

impl<'a> Partition<'a> {
    fn of(
        graph: &'a Graph,
        whole: &'a Program,
        local: &'a Program,
        assigned: &Assigned,
        context: &'a PassContext<'a>,
    ) -> Graph {
        let rebuild = Rebuild::same(graph);
        let rows = |&input: &Value| match graph.batch.as_ref() {
            _ if assigned.whole_calls.contains(&graph.name) => Has::Same,
            Some(batch) if graph.ty(input).dims.iter().any(|dim| dim.mentions(batch)) => Has::Rows,
            _ => Has::Same,
        };
        let has = graph.inputs().collect::<Vec<_>>().iter().map(rows).collect();
        let mut partition = Partition { whole, local, context, rebuild, has, moved: BTreeMap::new() };
        let added_up = added_up(graph);
        for (_, op) in graph.ops() {
            partition.op(op);
            // A sum over ranks that is used otherwise than to add to it is finished at once, so that it is sent once.
            if let Op::Read { state } = op.op
                && partition.has_old(op.result()) == Has::Partial
                && !added_up.contains(&state)
            {
                let want = assigned.finished.get(&state).and_then(|placement| placement.cut_of_data(&local.mesh));
                let want = want.map_or(Want::Same, Want::Cut);
                let finished = partition.reshard(partition.rebuild.get(op.result()), want, &op.site);
                partition.rebuild.set(op.result(), finished);
            }
        }
        let outputs = graph.outputs.iter().map(|(name, value)| {
            let value = partition.rebuild.get(*value);
            let left = match partition.has[value.0 as usize] {
                // The host adds up the totals of all parts.
                Has::Partial if is_total(name) => value,
                Has::Same | Has::Rows => value,
                _ => partition.reshard(value, Want::Same, &Site::default()),
            };
            (name.clone(), left)
        });
        let outputs: Vec<(String, Value)> = outputs.collect();
        partition.rebuild.new.outputs = outputs;
        without_dead_ops(&partition.rebuild.new, local)
    }

    fn old(&self) -> &'a Graph {
        self.rebuild.old
    }

    fn has_old(&self, old: Value) -> Has {
        self.has[self.rebuild.get(old).0 as usize]
    }

    fn ranks(&self) -> usize {
        self.local.mesh.data
    }

    /// Says what is had of the values that were pushed since.
    fn note(&mut self, has: Has) {
        self.has.resize(self.rebuild.new.values().len(), has);
    }

    fn op(&mut self, op: &OpData) {
        let has: Vec<Has> = op.args.iter().map(|&arg| self.has_old(arg)).collect();
        let cut = has.iter().find_map(|has| if let Has::Cut(extent) = has { Some(*extent) } else { None });
        match &op.op {
            Op::Read { state } => {
                self.rebuild.copy(op, self.local);
                let has = match &self.local.state(*state).placement {
                    Some(placement) if placement.partial.is_some() => Has::Partial,
                    Some(placement) => placement.cut_of_data(&self.local.mesh).map_or(Has::Same, Has::Cut),
                    None => Has::Same,
                };
                self.note(has);
            }
            Op::Write { state } => self.write(op, *state),
            _ if has.contains(&Has::Rows) => self.with_rows(op),
            Op::Adamw { .. } => {
                // Moments say where the step is taken.
                let want = match has[2] {
                    Has::Cut(extent) => Want::Cut(extent),
                    _ => Want::Same,
                };
                let (each, settings) = op.args.split_at(op.args.len() - 3);
                let mut args = self.as_wanted(each, want, &op.site);
                args.extend(self.as_wanted(settings, Want::Same, &op.site));
                self.rebuild.push(op, op.op.clone(), &args, self.local);
                self.note(match want {
                    Want::Cut(extent) => Has::Cut(extent),
                    Want::Same => Has::Same,
                });
            }
            rule if let Some(extent) = cut.filter(|_| rule.class() == Class::Elementwise || *rule == Op::Stop {}) => {
                let args = self.as_wanted(&op.args, Want::Cut(extent), &op.site);
                self.rebuild.push(op, op.op.clone(), &args, self.local);
                self.note(Has::Cut(extent));
            }
            Op::Contract { spec } if has.iter().all(|&has| matches!(has, Has::Cut(_))) && sums_all(spec) => {
                self.rebuild.copy(op, self.local);
                self.note(Has::Partial);
            }
            rule if has.contains(&Has::Partial) && is_linear(rule, &has, self.old().ty(op.result())) => {
                let args: Vec<Value> = op.args.iter().map(|&arg| self.rebuild.get(arg)).collect();
                let adds = matches!(op.op, Op::Add {} | Op::Sub {});
                let kept = |partition: &mut Self, arg: Value| match partition.has[arg.0 as usize] {
                    Has::Same if adds => {
                        let ranks = partition.ranks();
                        let mut b = Builder::new(&mut partition.rebuild.new, op.site.clone());
                        let summand = on_one_rank(&mut b, arg, Axis::Data, ranks);
                        partition.note(Has::Partial);
                        summand
                    }
                    Has::Partial | Has::Same => arg,
                    _ => partition.reshard(arg, Want::Same, &op.site),
                };
                let args: Vec<Value> = args.into_iter().map(|arg| kept(self, arg)).collect();
                self.rebuild.push(op, op.op.clone(), &args, self.local);
                self.note(Has::Partial);
            }
            _ => self.on_wholes(op),
        }
    }

    /// An op on wholes.
    fn on_wholes(&mut self, op: &OpData) {
        let args = self.as_wanted(&op.args, Want::Same, &op.site);
        self.rebuild.push(op, op.op.clone(), &args, self.local);
        self.note(Has::Same);
    }

    /// What became of old values, as an op at this site wants them.
    fn as_wanted(&mut self, old: &[Value], want: Want, site: &Site) -> Vec<Value> {
        old.iter().map(|&old| self.reshard(self.rebuild.get(old), want, site)).collect()
    }

    /// An op on a rank's own rows: a result without rows has all of them in it. `autodiff` lets rows meet in sums only, and in
    /// extreme values that the host compares.
    fn with_rows(&mut self, op: &OpData) {
        let args: Vec<Value> = op.args.iter().map(|&arg| self.rebuild.get(arg)).collect();
        let stays = |partition: &Self, arg: Value| {
            let sum = matches!(op.op, Op::AddRows {}) && partition.has[arg.0 as usize] == Has::Partial;
            sum || partition.has[arg.0 as usize] == Has::Rows
        };
        let args: Vec<Value> = args
            .into_iter()
            .map(|arg| if stays(self, arg) { arg } else { self.reshard(arg, Want::Same, &op.site) })
            .collect();
        self.rebuild.push(op, op.op.clone(), &args, self.local);
        let batch = self.old().batch.as_ref();
        let rows = |ty: &Type| batch.is_some_and(|batch| ty.dims.iter().any(|dim| dim.mentions(batch)));
        let extreme = matches!(op.op, Op::ReduceMax { .. } | Op::ReduceMin { .. });
        for result in op.results() {
            let has = if rows(self.old().ty(result)) || extreme { Has::Rows } else { Has::Partial };
            self.has.push(has);
        }
    }

    fn write(&mut self, op: &OpData, state: StateId) {
        let value = self.rebuild.get(op.args[0]);
        let placement = self.local.state(state).placement.as_ref();
        let value = match placement {
            Some(placement) if placement.partial.is_some() => match self.has[value.0 as usize] {
                Has::Partial => value,
                // Zeros of all ranks add up to zero.
                Has::Same if is_zero(&self.rebuild.new, value) => value,
                has => panic!("bug: `{}` of @{} is {has:?}", self.whole.state(state).name, self.old().name),
            },
            _ => match placement.and_then(|placement| placement.cut_of_data(&self.local.mesh)) {
                Some(extent) => self.reshard(value, Want::Cut(extent), &op.site),
                // What a rank keeps of its own rows from call to call, as generation does, is its own.
                None if self.has[value.0 as usize] == Has::Rows => value,
                None => self.reshard(value, Want::Same, &op.site),
            },
        };
        self.rebuild.push(op, op.op.clone(), &[value], self.local);
    }

    /// The value as it is wanted, for an op at this site: the only place where ranks come to send something.
    fn reshard(&mut self, value: Value, want: Want, site: &Site) -> Value {
        let over = Axis::Data;
        let ty = self.rebuild.new.ty(value).clone();
        let (op, then) = match (self.has[value.0 as usize], want) {
            (Has::Same | Has::Rows, Want::Same) => return value,
            (Has::Cut(has), Want::Cut(extent)) if has == extent => return value,
            (Has::Same, Want::Cut(extent)) => {
                if let Some(stretched) = self.stretched(value, site) {
                    return stretched;
                }
                (Op::Shard { over, axis: 0, ranks: self.ranks() }, Has::Cut(extent))
            }
            (Has::Cut(extent), Want::Same) => (Op::AllGather { over, axis: 0, lens: vec![extent] }, Has::Same),
            (Has::Partial, Want::Same) => (Op::AllReduce { over }, Has::Same),
            (Has::Partial, Want::Cut(extent)) => {
                (Op::ReduceScatter { over, axis: 0, ranks: self.ranks() }, Has::Cut(extent))
            }
            (has, want) => panic!("bug: {ty} in @{} is {has:?}, and {want:?} is wanted", self.old().name),
        };
        let forward = site.phase == Phase::Forward;
        if let Some(&moved) = self.moved.get(&(value, want, forward)) {
            return moved;
        }
        self.context.matched(op.name(), 1);
        // What was read belongs to the layer of the op that needs it; its place is that of what is moved.
        let loc = self.rebuild.new.def(value).map_or(site.loc, |def| self.rebuild.new.op(def).site.loc);
        let moved = Builder::new(&mut self.rebuild.new, Site { loc, ..site.clone() }).one(op, &[value]);
        self.note(then);
        self.moved.insert((value, want, forward), moved);
        moved
    }

    /// A rank's part of a value that is the same along the first dim: stretched that far only.
    fn stretched(&mut self, value: Value, site: &Site) -> Option<Value> {
        let def = self.rebuild.new.op(self.rebuild.new.def(value)?);
        let Op::Broadcast { shape } = &def.op else { return None };
        let operand = def.args[0];
        let given = &self.rebuild.new.ty(operand).dims;
        if given.len() == shape.len() && given[0] != Dim::from(1i64) {
            return None;
        }
        let extent = usize::try_from(shape[0].constant()?).ok()?;
        let mut shape = shape.clone();
        shape[0] = Dim::from(extent.div_ceil(self.ranks()) as i64);
        let part = Builder::new(&mut self.rebuild.new, site.clone()).one(Op::Broadcast { shape }, &[operand]);
        self.note(Has::Cut(extent));
        Some(part)
    }
}

/// A number that all ranks along an axis have, as a summand of the first one: the only part of `[1]` that is not beyond its
/// end.
fn on_one_rank(b: &mut Builder, value: Value, over: Axis, ranks: usize) -> Value {
    let row = b.one(Op::Reshape { shape: vec![Dim::from(1i64)] }, &[value]);
    let part = b.one(Op::Shard { over, axis: 0, ranks }, &[row]);
    b.one(Op::Reshape { shape: vec![] }, &[part])
}

/// States that a graph reads only to add to them.
fn added_up(graph: &Graph) -> Vec<StateId> {
    let reads = reads(graph);
    let mut states = Vec::new();
    for (_, op) in graph.ops() {
        let Op::Write { state } = op.op else { continue };
        let Some(def) = graph.def(op.args[0]).map(|def| graph.op(def)) else { continue };
        let adds = matches!(def.op, Op::Add {} | Op::AddRows {});
        if adds && def.args.iter().any(|arg| reads.get(arg) == Some(&state)) {
            states.push(state);
        }
    }
    states
}

/// Whether an op of partial values, and of others that all ranks have, is the sum of what it is on each rank.
fn is_linear(op: &Op, has: &[Has], result: &Type) -> bool {
    let partial = |at: usize| has[at] == Has::Partial;
    match op {
        // A number that all ranks have can be one rank's summand.
        Op::Add {} | Op::Sub {} => (0..2).all(|at| partial(at) || (has[at] == Has::Same && result.is_scalar())),
        Op::Neg {}
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Broadcast { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Stop {}
        | Op::ReduceSum { .. }
        | Op::AllReduce { .. }
        | Op::AllGather { .. }
        | Op::Shard { .. } => true,
        Op::Cast { dtype } => dtype.is_float(),
        Op::Mul {} | Op::Contract { .. } => partial(0) != partial(1),
        Op::Div {} => partial(0) && !partial(1),
        Op::Concat { .. } => has.iter().all(|&has| has == Has::Partial),
        _ => false,
    }
}

/// Whether a product gives one number: a sum over all elements of both operands, which are alike.
fn sums_all(spec: &str) -> bool {
    Contraction::parse(spec).is_ok_and(|labels| labels.out.is_empty() && labels.lhs == labels.rhs)
}

/// Whether a value is zeros.
fn is_zero(graph: &Graph, value: Value) -> bool {
    graph.def(value).is_some_and(|def| match &graph.op(def).op {
        Op::Const { value, .. } => *value == 0.0,
        Op::Broadcast { .. } | Op::Reshape { .. } => is_zero(graph, graph.op(def).args[0]),
        _ => false,
    })
}

/// Whether an output is a total, which the host puts together: `sum.<k>`.
fn is_total(name: &str) -> bool {
    name.strip_prefix("sum.").is_some_and(|number| number.parse::<usize>().is_ok())
}
