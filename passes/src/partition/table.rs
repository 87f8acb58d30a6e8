//! The resharding table: how what the ranks along an axis have of a value becomes what is wanted of it.
//!
//! | has \ wants | same | cut | partial |
//! |---|---|---|---|
//! | same | - | `shard` | a `shard` of one place |
//! | cut | `all_gather` | - | |
//! | partial | `all_reduce` | `reduce_scatter` | - |
//!
//! Nothing else inserts a collective. A value is moved once, and used by all ops of its phase that want it so. Gradients
//! gather again: so what was gathered lives for its layer only (ZeRO 3). The sum of what ranks that share a layer have is
//! sent once for both passes.

use std::collections::BTreeMap;

use dsgc_ir::{Axis, Builder, Dim, Graph, Op, Phase, Site, Value};

use crate::pipeline::PassContext;

/// A dim of which each rank has a part: equally long ones, zeros behind the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Part {
    /// The dim.
    pub dim: usize,
    /// How many places all ranks have together.
    pub extent: usize,
}

/// What the ranks along an axis have of a value, or what an op wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Has {
    /// All have it.
    Same,
    /// Each has what its own rows give; nothing makes a whole of that.
    Rows,
    /// Each has a summand.
    Partial,
    /// Each has a part.
    Cut(Part),
}

/// What is had of the values of a graph that grows, along one axis.
pub(super) struct Table<'a> {
    over: Axis,
    ranks: usize,
    context: &'a PassContext<'a>,
    /// Per value.
    has: Vec<Has>,
    /// What has been moved already: value, what was wanted, and whether for the forward pass.
    moved: BTreeMap<(Value, Has, bool), Value>,
}

impl<'a> Table<'a> {
    /// For ranks along an axis, and a graph whose inputs are had like this.
    pub(super) fn new(over: Axis, ranks: usize, inputs: Vec<Has>, context: &'a PassContext<'a>) -> Table<'a> {
        Table { over, ranks, context, has: inputs, moved: BTreeMap::new() }
    }

    /// How many ranks there are.
    pub(super) fn ranks(&self) -> usize {
        self.ranks
    }

    /// What is had of a value.
    pub(super) fn has(&self, value: Value) -> Has {
        self.has[value.0 as usize]
    }

    /// Says what is had of the values that were pushed since.
    pub(super) fn note(&mut self, graph: &Graph, has: Has) {
        self.has.resize(graph.values().len(), has);
    }

    /// Says what is had of a value that was pushed: of those before it that nothing was said of, the same.
    pub(super) fn set(&mut self, value: Value, has: Has) {
        let len = self.has.len().max(value.0 as usize + 1);
        self.has.resize(len, has);
        self.has[value.0 as usize] = has;
    }

    /// The sum of a value of which ranks have summands, if it was sent already.
    pub(super) fn sum_of(&self, value: Value) -> Option<Value> {
        let sum = self.moved.get(&(value, Has::Same, true)).copied();
        sum.filter(|_| self.has(value) == Has::Partial)
    }

    /// The value as it is wanted, for an op at this site.
    ///
    /// # Panics
    /// If the table has no such entry: a bug of the caller.
    pub(super) fn reshard(&mut self, graph: &mut Graph, value: Value, want: Has, site: &Site) -> Value {
        let (over, ranks, has) = (self.over, self.ranks, self.has(value));
        if has == want || (has == Has::Rows && want == Has::Same) {
            return value;
        }
        if let (Has::Same, Has::Cut(part)) = (has, want)
            && let Some(stretched) = self.stretched(graph, value, part, site)
        {
            return stretched;
        }
        // Gradients would wait for the same sum a second time.
        let phase = if over == Axis::Tensor && has == Has::Partial { Phase::Forward } else { site.phase };
        let key = (value, want, phase == Phase::Forward);
        if let Some(&moved) = self.moved.get(&key) {
            return moved;
        }
        // What was read belongs to the layer of the op that needs it; its place is that of what is moved.
        let loc = graph.def(value).map_or(site.loc, |def| graph.op(def).site.loc);
        let mut b = Builder::new(graph, Site { loc, ..site.clone() });
        let (what, moved) = match (has, want) {
            (Has::Same, Has::Cut(Part { dim, .. })) => {
                (Some("shard"), b.one(Op::Shard { over, axis: dim, ranks }, &[value]))
            }
            // The only part of one place that is not beyond its end is the first one.
            (Has::Same, Has::Partial) => {
                let ty = b.ty(value);
                let row = b.one(Op::Reshape { shape: [&[Dim::from(1i64)], &ty.dims[..]].concat() }, &[value]);
                let part = b.one(Op::Shard { over, axis: 0, ranks }, &[row]);
                (None, b.one(Op::Reshape { shape: ty.dims }, &[part]))
            }
            (Has::Cut(part), Has::Same) => (Some("all_gather"), gather(&mut b, value, over, part)),
            (Has::Partial, Has::Same) => (Some("all_reduce"), b.one(Op::AllReduce { over }, &[value])),
            (Has::Partial, Has::Cut(Part { dim, .. })) => {
                (Some("reduce_scatter"), b.one(Op::ReduceScatter { over, axis: dim, ranks }, &[value]))
            }
            (has, want) => {
                panic!("bug: {} in @{} is {has:?}, and {want:?} is wanted", graph.ty(value), graph.name)
            }
        };
        if let Some(what) = what {
            self.context.matched(&format!("{what} over {over}"), 1);
        }
        self.note(graph, want);
        self.moved.insert(key, moved);
        moved
    }

    /// A rank's part of a value that is the same along the dim: stretched that far only.
    fn stretched(&mut self, graph: &mut Graph, value: Value, part: Part, site: &Site) -> Option<Value> {
        let def = graph.op(graph.def(value)?);
        let Op::Broadcast { shape } = &def.op else { return None };
        let operand = def.args[0];
        let given = &graph.ty(operand).dims;
        let before = shape.len() - given.len();
        if part.dim >= before && given[part.dim - before] != Dim::from(1i64) {
            return None;
        }
        let mut shape = shape.clone();
        shape[part.dim] = Dim::from(part.extent.div_ceil(self.ranks) as i64);
        let stretched = Builder::new(graph, site.clone()).one(Op::Broadcast { shape }, &[operand]);
        self.note(graph, Has::Cut(part));
        Some(stretched)
    }
}

/// The parts of all ranks together. They lie one after the other along the first dim only, so another one is put first
/// meanwhile.
fn gather(b: &mut Builder, value: Value, over: Axis, part: Part) -> Value {
    let Part { dim, extent } = part;
    let order: Vec<usize> = [dim].into_iter().chain((0..b.ty(value).rank()).filter(|&other| other != dim)).collect();
    let back: Vec<usize> = (1..=dim).chain([0]).chain(dim + 1..order.len()).collect();
    let turn = |b: &mut Builder, order: &[usize], value| match dim {
        0 => value,
        _ => b.one(Op::Transpose { order: order.to_vec() }, &[value]),
    };
    let first = turn(b, &order, value);
    let all = b.one(Op::AllGather { over, axis: 0, lens: vec![extent] }, &[first]);
    turn(b, &back, all)
}
