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
//! has, `table` says what is sent, along both axes.

mod assign;
mod table;
mod tensor;

use dsgc_ir::diag::Diag;
use dsgc_ir::infer::Contraction;
use dsgc_ir::trained::reads;
use dsgc_ir::{Axis, Class, Dim, Graph, Level, Mesh, Op, OpData, Placement, Program, Site, StateId, Type, Value};

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};
use assign::Assigned;
use table::{Has, Part, Table};

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

/// A graph on its way.
struct Partition<'a> {
    /// The program before, and after as far as its states are concerned.
    whole: &'a Program,
    local: &'a Program,
    rebuild: Rebuild<'a>,
    table: Table<'a>,
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
        let table = Table::new(Axis::Data, local.mesh.data, has, context);
        let mut partition = Partition { whole, local, rebuild, table };
        let added_up = added_up(graph);
        for (_, op) in graph.ops() {
            partition.op(op);
            // A sum over ranks that is used otherwise than to add to it is finished at once, so that it is sent once.
            if let Op::Read { state } = op.op
                && partition.has_old(op.result()) == Has::Partial
                && !added_up.contains(&state)
            {
                let want = assigned.finished.get(&state).map_or(Has::Same, |placement| cut(placement, &local.mesh));
                let finished = partition.reshard(partition.rebuild.get(op.result()), want, &op.site);
                partition.rebuild.set(op.result(), finished);
            }
        }
        let outputs = graph.outputs.iter().map(|(name, value)| {
            let value = partition.rebuild.get(*value);
            let left = match partition.table.has(value) {
                // The host adds up the totals of all parts.
                Has::Partial if is_total(name) => value,
                Has::Same | Has::Rows => value,
                _ => partition.reshard(value, Has::Same, &Site::default()),
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
        self.table.has(self.rebuild.get(old))
    }

    /// Says what is had of the values that were pushed since.
    fn note(&mut self, has: Has) {
        self.table.note(&self.rebuild.new, has);
    }

    fn op(&mut self, op: &OpData) {
        let has: Vec<Has> = op.args.iter().map(|&arg| self.has_old(arg)).collect();
        let part = has.iter().copied().find(|has| matches!(has, Has::Cut(_)));
        match &op.op {
            Op::Read { state } => {
                self.rebuild.copy(op, self.local);
                let has = match &self.local.state(*state).placement {
                    Some(placement) if placement.partial.is_some() => Has::Partial,
                    Some(placement) => cut(placement, &self.local.mesh),
                    None => Has::Same,
                };
                self.note(has);
            }
            Op::Write { state } => self.write(op, *state),
            _ if has.contains(&Has::Rows) => self.with_rows(op),
            Op::Adamw { .. } => {
                // Moments say where the step is taken.
                let want = if let Has::Cut(_) = has[2] { has[2] } else { Has::Same };
                let (each, settings) = op.args.split_at(op.args.len() - 3);
                let mut args = self.as_wanted(each, want, &op.site);
                args.extend(self.as_wanted(settings, Has::Same, &op.site));
                self.rebuild.push(op, op.op.clone(), &args, self.local);
                self.note(want);
            }
            rule if let Some(part) = part.filter(|_| rule.class() == Class::Elementwise || *rule == Op::Stop {}) => {
                let args = self.as_wanted(&op.args, part, &op.site);
                self.rebuild.push(op, op.op.clone(), &args, self.local);
                self.note(part);
            }
            Op::Contract { spec } if has.iter().all(|&has| matches!(has, Has::Cut(_))) && sums_all(spec) => {
                self.rebuild.copy(op, self.local);
                self.note(Has::Partial);
            }
            rule if has.contains(&Has::Partial) && is_linear(rule, &has, self.old().ty(op.result())) => {
                let args: Vec<Value> = op.args.iter().map(|&arg| self.rebuild.get(arg)).collect();
                let adds = matches!(op.op, Op::Add {} | Op::Sub {});
                let kept = |partition: &mut Self, arg: Value| match partition.table.has(arg) {
                    Has::Same if adds => partition.reshard(arg, Has::Partial, &op.site),
                    Has::Partial | Has::Same => arg,
                    _ => partition.reshard(arg, Has::Same, &op.site),
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
        let args = self.as_wanted(&op.args, Has::Same, &op.site);
        self.rebuild.push(op, op.op.clone(), &args, self.local);
        self.note(Has::Same);
    }

    /// What became of old values, as an op at this site wants them.
    fn as_wanted(&mut self, old: &[Value], want: Has, site: &Site) -> Vec<Value> {
        old.iter().map(|&old| self.reshard(self.rebuild.get(old), want, site)).collect()
    }

    /// An op on a rank's own rows: a result without rows has all of them in it. `autodiff` lets rows meet in sums only, and in
    /// extreme values that the host compares.
    fn with_rows(&mut self, op: &OpData) {
        let args: Vec<Value> = op.args.iter().map(|&arg| self.rebuild.get(arg)).collect();
        let stays = |partition: &Self, arg: Value| {
            let sum = matches!(op.op, Op::AddRows {}) && partition.table.has(arg) == Has::Partial;
            sum || partition.table.has(arg) == Has::Rows
        };
        let args: Vec<Value> = args
            .into_iter()
            .map(|arg| if stays(self, arg) { arg } else { self.reshard(arg, Has::Same, &op.site) })
            .collect();
        self.rebuild.push(op, op.op.clone(), &args, self.local);
        let batch = self.old().batch.as_ref();
        let rows = |ty: &Type| batch.is_some_and(|batch| ty.dims.iter().any(|dim| dim.mentions(batch)));
        let extreme = matches!(op.op, Op::ReduceMax { .. } | Op::ReduceMin { .. });
        for result in op.results() {
            let has = if rows(self.old().ty(result)) || extreme { Has::Rows } else { Has::Partial };
            self.table.set(self.rebuild.get(result), has);
        }
    }

    fn write(&mut self, op: &OpData, state: StateId) {
        let value = self.rebuild.get(op.args[0]);
        let placement = self.local.state(state).placement.as_ref();
        let value = match placement {
            Some(placement) if placement.partial.is_some() => match self.table.has(value) {
                Has::Partial => value,
                // Zeros of all ranks add up to zero.
                Has::Same if is_zero(&self.rebuild.new, value) => value,
                has => panic!("bug: `{}` of @{} is {has:?}", self.whole.state(state).name, self.old().name),
            },
            // What a rank keeps of its own rows from call to call, as generation does, is its own.
            _ => {
                let want = placement.map_or(Has::Same, |placement| cut(placement, &self.local.mesh));
                self.reshard(value, want, &op.site)
            }
        };
        self.rebuild.push(op, op.op.clone(), &[value], self.local);
    }

    /// The value as it is wanted, for an op at this site.
    fn reshard(&mut self, value: Value, want: Has, site: &Site) -> Value {
        self.table.reshard(&mut self.rebuild.new, value, want, site)
    }
}

/// What ranks with different rows have of a state, unless they have summands.
fn cut(placement: &Placement, mesh: &Mesh) -> Has {
    placement.cut_of_data(mesh).map_or(Has::Same, |extent| Has::Cut(Part { dim: 0, extent }))
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
