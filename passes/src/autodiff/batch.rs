//! What a graph does along the batch: rows, totals, and whether it can be cut (D1).
//!
//! `B` in a loss is the whole optimizer batch. A graph can be run on one part of the rows after the other if rows
//! meet each other only in sums, maxima and minima over the batch (*totals*): each part gives its own, and what
//! follows is computed once from all of them. This analysis finds the totals, and the ops where rows meet otherwise.

use dsgc_ir::diag::Diag;
use dsgc_ir::infer::Contraction;
use dsgc_ir::{Class, Dim, Graph, Op, OpData, OpId, StateId, Symbol, Type, Value};

/// How the totals of parts are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// Added.
    Sum,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

impl Combine {
    /// First part of a total's name, by which the runtime knows what to do.
    pub fn name(self) -> &'static str {
        match self {
            Combine::Sum => "sum",
            Combine::Max => "max",
            Combine::Min => "min",
        }
    }
}

/// A value that all rows of the batch have a part in.
#[derive(Clone, Debug)]
pub struct Total {
    /// The name under which graphs hand it on: `sum.0`.
    pub name: String,
    /// The op that makes it.
    pub op: OpId,
    /// Its value.
    pub value: Value,
    /// How parts become the whole.
    pub combine: Combine,
    /// Whether a trained parameter has a part in it.
    pub trained: bool,
    /// 1 plus the largest round among the totals that it depends on: how often the batch must be passed over.
    pub round: u32,
}

/// Where the elements of a row lie along the dim that mentions the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Every row is equal: fits all others.
    Equal,
    /// The dim is the batch.
    Plain,
    /// `k` elements of the first row, `k` of the second, ...: from `[B, T]` reshaped to `[B*T]`.
    Rows,
    /// All rows, then all rows again: from joining `[B]` and `[B]`.
    Blocks,
}

/// What is known of a graph along the batch.
pub struct Batch {
    /// All totals in program order.
    pub totals: Vec<Total>,
    /// Per value, whether it has a part per row.
    pub per_row: Vec<bool>,
    /// Per value, whether a trained parameter has a part in it.
    pub trained: Vec<bool>,
}

/// Analyses a graph; the error says which op mixes rows in a way that cannot be cut.
pub fn analyse(graph: &Graph, batch: &Symbol, trained: impl Fn(StateId) -> bool) -> Result<Batch, Diag> {
    let count = graph.values().len();
    let mut rows = Rows { graph, batch, layouts: vec![None; count] };
    let mut known = Batch { totals: Vec::new(), per_row: vec![false; count], trained: vec![false; count] };
    let mut round = vec![0u32; count];
    for input in graph.inputs() {
        let axis = rows.axis(graph.ty(input)).map_err(|why| cannot(graph, None, &why))?;
        // Rows of a group stand together.
        let alone = |axis: usize| graph.ty(input).dims[axis].as_symbol() == Some(batch);
        rows.layouts[input.0 as usize] = axis.map(|axis| if alone(axis) { Layout::Plain } else { Layout::Rows });
        known.per_row[input.0 as usize] = rows.layouts[input.0 as usize].is_some();
    }
    for (id, op) in graph.ops() {
        let combine = rows.step(op).map_err(|why| cannot(graph, Some(op), &why))?;
        let of = |table: &[u32]| op.args.iter().map(|a| table[a.0 as usize]).max().unwrap_or(0);
        let from_trained = op.args.iter().any(|a| known.trained[a.0 as usize])
            || matches!(op.op, Op::Read { state } if trained(state));
        for result in op.results() {
            let at = result.0 as usize;
            known.per_row[at] = rows.layouts[at].is_some();
            known.trained[at] = from_trained;
            round[at] = of(&round) + u32::from(combine.is_some());
        }
        if let Some(combine) = combine {
            let (value, name) = (op.result(), format!("{}.{}", combine.name(), known.totals.len()));
            let round = round[value.0 as usize];
            known.totals.push(Total { name, op: id, value, combine, trained: from_trained, round });
        }
    }
    Ok(known)
}

/// The error for a graph that cannot be run on one part of the batch after the other.
pub fn cannot(graph: &Graph, op: Option<&OpData>, why: &str) -> Diag {
    let diag = Diag::error(format!("`{}` cannot be computed from parts of the batch: {why}", graph.name));
    let diag = match op {
        Some(op) => diag.label(op.site.loc.span, format!("in `{}` here", op.op.name())),
        None => diag,
    };
    diag.help("let rows meet in sums, means, `max` and `min` over the batch only")
        .help("or train on the whole batch at once: give `micro_batch_size` the value of `batch_size`")
}

struct Rows<'a> {
    graph: &'a Graph,
    batch: &'a Symbol,
    layouts: Vec<Option<Layout>>,
}

impl Rows<'_> {
    /// The dim that mentions the batch.
    fn axis(&self, ty: &Type) -> Result<Option<usize>, String> {
        let all: Vec<usize> = (0..ty.rank()).filter(|&i| ty.dims[i].mentions(self.batch)).collect();
        match all.as_slice() {
            [] => Ok(None),
            [one] if ty.dims[*one].is_linear_in(self.batch) => Ok(Some(*one)),
            [one] => Err(format!("a dim of {ty} is {}, no multiple of {}", ty.dims[*one], self.batch)),
            _ => Err(format!("{ty} pairs rows with rows")),
        }
    }

    /// How many times the batch a dim is.
    fn blocks(&self, dim: &Dim) -> Option<i64> {
        match dim.as_scaled_symbol() {
            Some((factor, symbol)) if symbol == self.batch => Some(factor),
            _ => (dim.constant() == Some(0)).then_some(0),
        }
    }

    fn layout(&self, value: Value) -> Option<Layout> {
        self.layouts[value.0 as usize]
    }

    fn type_axis(&self, value: Value) -> Result<Option<usize>, String> {
        self.axis(self.graph.ty(value))
    }

    /// Notes the layout of an op's results; the answer says whether they are totals.
    fn step(&mut self, op: &OpData) -> Result<Option<Combine>, String> {
        // What the operands with rows agree on.
        let mut common: Option<Layout> = None;
        for layout in op.args.iter().filter_map(|&a| self.layout(a)) {
            common = Some(match (common, layout) {
                (None | Some(Layout::Equal), other) => other,
                (Some(one), other) if one == other || other == Layout::Equal => one,
                _ => return Err("it puts elements of different rows beside each other".into()),
            });
        }
        let (result, combine) = match (&op.op, common) {
            (Op::Size { dim, .. }, _) if dim.mentions(self.batch) => {
                let linear = dim.is_linear_in(self.batch);
                let why = || format!("{dim} is no multiple of {}", self.batch);
                (None, Some(linear.then_some(Combine::Sum).ok_or_else(why)?))
            }
            (Op::Iota { len }, _) if len.mentions(self.batch) => {
                return Err("it numbers the rows, and a part does not know where it begins".into());
            }
            (Op::RandomNormal { shape, .. } | Op::RandomUniform { shape, .. }, _)
                if shape.iter().any(|d| d.mentions(self.batch)) =>
            {
                return Err("its numbers depend on the row's place in the batch".into());
            }
            // A value without rows is the same for every row.
            (Op::Broadcast { shape }, None) => {
                (shape.iter().any(|d| d.mentions(self.batch)).then_some(Layout::Equal), None)
            }
            (_, None) => (None, None),
            (rule, Some(layout)) => self.with_rows(rule, op, layout)?,
        };
        for value in op.results() {
            // A layout other than `Equal` follows from the dim where it is the batch itself.
            let axis = self.type_axis(value)?;
            let plain = axis.is_some_and(|a| self.graph.ty(value).dims[a].as_symbol() == Some(self.batch));
            if axis.is_some() != result.is_some() {
                return Err("rows get lost in it".into());
            }
            self.layouts[value.0 as usize] =
                result.map(|r| if plain && r != Layout::Equal { Layout::Plain } else { r });
        }
        Ok(combine)
    }

    /// The rule of an op with operands that have rows.
    fn with_rows(&self, rule: &Op, op: &OpData, layout: Layout) -> Result<(Option<Layout>, Option<Combine>), String> {
        let keep = Ok((Some(layout), None));
        let along = |axis: usize| Ok::<bool, String>(self.type_axis(op.args[0])? == Some(axis));
        let last = |value: Value| self.graph.ty(value).rank().checked_sub(1);
        let total = |combine| Ok((None, Some(combine)));
        match rule {
            Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => {
                let axis = self.type_axis(op.args[0])?;
                if !axis.is_some_and(|a| axes.contains(&a)) {
                    return keep;
                }
                total(match rule {
                    Op::ReduceSum { .. } => Combine::Sum,
                    Op::ReduceMax { .. } => Combine::Max,
                    _ => Combine::Min,
                })
            }
            Op::Contract { spec } => {
                let labels = Contraction::parse(spec)?;
                let letter = |side: &[char], value| Ok::<_, String>(self.type_axis(value)?.map(|a| side[a]));
                let (a, b) = (letter(&labels.lhs, op.args[0])?, letter(&labels.rhs, op.args[1])?);
                match (a, b) {
                    (Some(a), Some(b)) if a != b => Err("it pairs rows with rows".into()),
                    (a, b) if a.or(b).is_some_and(|l| labels.out.contains(&l)) => keep,
                    _ => total(Combine::Sum),
                }
            }
            Op::Cumsum { axis, .. } | Op::Recurrence { axis, .. } if along(*axis)? => {
                Err("it sums from row to row".into())
            }
            Op::SliceAt { axis, .. } | Op::WriteAt { axis } if along(*axis)? => {
                Err("it takes or writes some of the rows".into())
            }
            Op::Slice { axis, start, end } if along(*axis)? => {
                let dim = &self.graph.ty(op.args[0]).dims[*axis];
                let whole = start.constant() == Some(0) && end == dim;
                let fits = self.blocks(start).is_some() && self.blocks(end).is_some() && self.blocks(dim).is_some();
                if whole || (fits && layout != Layout::Rows) {
                    keep
                } else {
                    Err(format!("it takes the rows {start} to {end}"))
                }
            }
            Op::Pad { axis, before, after } if along(*axis)? => {
                let dim = &self.graph.ty(op.args[0]).dims[*axis];
                let fits = [before, after, dim].iter().all(|d| self.blocks(d).is_some()) && layout != Layout::Rows;
                if fits { Ok((Some(Layout::Blocks), None)) } else { Err("it adds rows".into()) }
            }
            Op::Concat { axis } => {
                let axes: Vec<_> = op.args.iter().map(|&a| self.type_axis(a)).collect::<Result<_, _>>()?;
                if !axes.contains(&Some(*axis)) {
                    return keep;
                }
                let fits = op.args.iter().all(|&a| self.blocks(&self.graph.ty(a).dims[*axis]).is_some());
                if fits && layout != Layout::Rows {
                    Ok((Some(Layout::Blocks), None))
                } else {
                    Err("it joins rows with something else".into())
                }
            }
            Op::Reshape { shape } => {
                let from = &self.graph.ty(op.args[0]).dims;
                let (i, o) = (self.type_axis(op.args[0])?, self.type_axis(op.result())?);
                let (Some(i), Some(o)) = (i, o) else { return Err("rows get lost in it".into()) };
                let before = |dims: &[Dim], at: usize| Dim::product(&dims[..at]);
                if from[i] == shape[o] && before(from, i) == before(shape, o) {
                    keep
                } else if i == 0 && o == 0 && layout != Layout::Blocks {
                    Ok((Some(if layout == Layout::Equal { layout } else { Layout::Rows }), None))
                } else {
                    Err("it moves elements from row to row".into())
                }
            }
            Op::Embed {} if self.layout(op.args[0]).is_some() => Err("its table has rows of the batch".into()),
            Op::LayerNorm { .. } | Op::RmsNorm { .. } | Op::TokenLogp {}
                if self.type_axis(op.args[0])? == last(op.args[0]) =>
            {
                Err("it works along the batch".into())
            }
            Op::Attention { .. } | Op::Rope { .. } | Op::PositionIn {} if self.type_axis(op.args[0])? != Some(0) => {
                Err("it works along the batch".into())
            }
            Op::Write { .. } => Err("it writes a state of the batch".into()),
            _ if rule.class() == Class::Update => Err("it updates with a state of the batch".into()),
            // Elementwise ops, and all others whose rows do not meet.
            _ => keep,
        }
    }
}
