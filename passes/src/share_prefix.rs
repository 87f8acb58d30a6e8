//! Computes the common beginning of sequences once.
//!
//! ```text
//! %t = concat %chosen.tokens, %rejected.tokens axis=0            %t = concat %chosen.tokens, (the end of rejected) axis=1
//! %s = concat %chosen.segment, %rejected.segment axis=0    =>    %s = beginning, branch 1, branch 2
//! model(%t, %s) : f32[2*N, T, D]                                 model(%t, %s) : f32[N, T + S, D]
//! ```
//!
//! A chosen and a rejected answer to one question are rows that begin alike, and a causal model gives equal numbers for
//! what is equal up to there. So both stand in one row, the question once, the answers as branches of it
//! ([`dsgc_ir::segment`]). That is possible from the concatenation to where the columns of a sequence meet; there the
//! two rows are put together again. So it is with the answers to a prompt that a graph gets as rows that stand together: its
//! `B` rows become `samples * B`, and each `B` is a prompt. `S`, the columns of an end, is a dim: the host counts how many are alike in a call,
//! which may be none. Values are those of before but for the order of sums in attention and in gradients of the beginning.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::cost::graph_time;
use dsgc_ir::diag::Diag;
use dsgc_ir::infer::Contraction;
use dsgc_ir::segment::BRANCH;
use dsgc_ir::stage::{Call, Generate, Operand, Prefix, Source, Statement};
use dsgc_ir::{
    Bindings, Builder, Class, DType, Dim, DimRange, Graph, Op, OpData, OpId, Program, Site, Symbol, Type, Value,
};

use crate::infer::substituted;
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass. It leaves graphs as they are in which nothing is to be saved.
pub const PASS: Pass = Pass {
    name: "share_prefix",
    requires: &[Fact::Typed, Fact::Adapted],
    provides: &[],
    numerics: Numerics::Reassociating,
    run,
};

/// A graph is rewritten if this share of its time is saved when half of every row is alike.
const WORTH: f64 = 0.05;

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let groups = groups(&program);
    for at in 0..program.graphs.len() {
        let graph = &program.graphs[at];
        let group = groups.get(&graph.name);
        let grouped = group.and_then(|group| in_groups(graph, group.samples, &program));
        let found = match (&grouped, group) {
            (Some(grouped), Some(group)) => Rows::of_group(grouped, group).map(|rows| (grouped, rows)),
            _ => Rows::find(graph).map(|rows| (graph, rows)),
        };
        let Some((graph, rows)) = found else { continue };
        let region = region(graph, &rows);
        let (new, symbol) = rewrite(graph, &rows, &region, &program);
        let half = |g: &Graph| {
            let mut bounds: Bindings = g.upper_bounds();
            bounds.entry(symbol.clone()).and_modify(|most| *most /= 2);
            graph_time(g, &bounds).unwrap_or(u64::MAX)
        };
        let left = half(&new) as f64 / half(graph) as f64;
        if left > 1.0 - WORTH {
            continue;
        }
        let prefix = Prefix { sequences: rows.names.clone(), samples: rows.samples, input: input_name(&rows) };
        if !program.stage.prefixes.contains(&prefix) {
            program.stage.prefixes.push(prefix);
        }
        context.matched("sequences with a common beginning", rows.count());
        let whose = match rows.samples {
            1 => rows.names.join(" and "),
            samples => format!("{samples} rows of {}", rows.names[0]),
        };
        context.changed(format!(
            "@{}: the common beginning of {whose} once; {:.0} % of the time by the cost model where it is half of a row",
            graph.name,
            100.0 * left
        ));
        program.graphs[at] = new;
    }
    Ok(program)
}

/// A sequence of which a graph gets several answers to each prompt.
#[derive(PartialEq)]
struct Group {
    /// Its name among the graph's inputs.
    sequence: String,
    /// Answers to a prompt.
    samples: usize,
}

/// Graphs that the plan calls on what a model has written, several answers to a prompt, and on nothing else.
fn groups(program: &Program) -> BTreeMap<String, Group> {
    let mut found: BTreeMap<String, Option<Group>> = BTreeMap::new();
    let mut generated = Vec::new();
    let stage = &program.stage;
    collect(&stage.plan, &mut generated, &mut found);
    stage.evaluate.iter().for_each(|evaluation| collect(&evaluation.body, &mut generated, &mut found));
    // Micro-batches must fall between groups.
    let fits = |samples: usize| {
        let one =
            |s: &Source| s.micro_batch_size.is_multiple_of(samples) || s.batch_size * samples <= s.micro_batch_size;
        stage.sources.iter().all(one)
    };
    let groups = found.into_iter().filter_map(|(graph, group)| Some((graph, group?)));
    groups.filter(|(_, group)| fits(group.samples)).collect()
}

fn collect<'a>(body: &'a [Statement], generated: &mut Vec<&'a Generate>, found: &mut BTreeMap<String, Option<Group>>) {
    for statement in body {
        match statement {
            Statement::For { body, .. } | Statement::Repeat { body, .. } => collect(body, generated, found),
            Statement::Generate(generate) => generated.push(generate),
            Statement::Call(call) => {
                let group = group_of(call, generated);
                let same = found.get(&call.graph).is_none_or(|other| *other == group);
                found.insert(call.graph.clone(), group.filter(|_| same));
            }
            // Minibatches are drawn row by row.
            Statement::Update(update) => {
                found.extend(update.terms.iter().map(|term| (term.graph.clone(), None)));
            }
            Statement::Next { .. } | Statement::Join { .. } | Statement::Recent { .. } => {}
        }
    }
}

/// The group of a call's only sequence, if several answers to each prompt are all that has rows.
fn group_of(call: &Call, generated: &[&Generate]) -> Option<Group> {
    let mut from: Option<&Generate> = None;
    for (_, operand) in &call.args {
        let Operand::Path(path) = operand else { continue };
        let of = |g: &&&Generate| path.strip_prefix(&g.name).is_some_and(|rest| rest.starts_with('.'));
        let generate = generated.iter().rev().find(of)?;
        if from.get_or_insert(generate).name != generate.name {
            return None;
        }
    }
    let samples = from?.samples;
    let mut sequences = call.args.iter().filter_map(|(input, _)| input.strip_suffix(".tokens"));
    match (sequences.next(), sequences.next()) {
        (Some(sequence), None) if samples > 1 => Some(Group { sequence: sequence.to_string(), samples }),
        _ => None,
    }
}

/// The graph with `samples` rows where it had one; `None` if its rows are in groups already.
fn in_groups(graph: &Graph, samples: usize, program: &Program) -> Option<Graph> {
    let batch = graph.batch.as_ref()?;
    if graph.rows_of_batch() != 1 {
        return None;
    }
    let with = BTreeMap::from([(batch.clone(), &Dim::from(samples as i64) * &Dim::symbol(batch))]);
    Some(substituted(graph, &with, program))
}

/// Sequences that stand one behind the other in a graph's rows.
struct Rows {
    /// Their names.
    names: Vec<String>,
    /// Rows of a group that stand together; 1 where each row of one sequence belongs to one of every other.
    samples: usize,
    /// Tokens of all, `[n*N, T]`.
    tokens: Value,
    /// Segments of all.
    segment: Value,
    /// Tokens and segment of each; of a group there are none.
    each: Vec<(Value, Value)>,
    /// `N` and `T`.
    dims: [Dim; 2],
}

impl Rows {
    fn of_group(graph: &Graph, group: &Group) -> Option<Rows> {
        let input = |what: &str| graph.input_named(&format!("{}.{what}", group.sequence));
        let (tokens, segment) = (input("tokens")?, input("segment")?);
        let [_, columns] = <[Dim; 2]>::try_from(graph.ty(tokens).dims.clone()).ok()?;
        let dims = [Dim::symbol(graph.batch.as_ref()?), columns];
        let names = vec![group.sequence.clone()];
        let rows = Rows { names, samples: group.samples, tokens, segment, each: Vec::new(), dims };
        let fits = |v: Value| graph.ty(v).dims == rows.stacked() && graph.ty(v).dtype == DType::I32;
        [tokens, segment].into_iter().all(fits).then_some(rows)
    }

    fn find(graph: &Graph) -> Option<Rows> {
        graph.ops().find_map(|(_, op)| {
            let each = inputs_of(graph, op, ".tokens")?;
            let names: Vec<String> = each.iter().map(|(name, _)| name.clone()).collect();
            let same = |(_, op): (OpId, &OpData)| {
                let others = inputs_of(graph, op, ".segment")?;
                let equal = others.iter().map(|(name, _)| name).eq(&names);
                equal.then(|| (op.result(), others))
            };
            let (segment, segments) = graph.ops().find_map(same)?;
            let [rows, columns] = <[Dim; 2]>::try_from(graph.ty(each[0].1).dims.clone()).ok()?;
            let each = each.iter().zip(&segments).map(|(t, s)| (t.1, s.1)).collect();
            Some(Rows { names, samples: 1, tokens: op.result(), segment, each, dims: [rows, columns] })
        })
    }

    /// How many share a beginning.
    fn count(&self) -> usize {
        self.names.len() * self.samples
    }

    /// The dims of a value with columns of all sequences, `[n*N, T]`.
    fn stacked(&self) -> [Dim; 2] {
        [&Dim::from(self.count() as i64) * &self.dims[0], self.dims[1].clone()]
    }
}

/// The inputs that an op puts one behind the other along rows, by their names without this end.
fn inputs_of(graph: &Graph, op: &OpData, end: &str) -> Option<Vec<(String, Value)>> {
    let alike = |&v: &Value| graph.ty(v) == graph.ty(op.args[0]) && graph.ty(v).dtype == DType::I32;
    if op.op != (Op::Concat { axis: 0 }) || op.args.len() < 2 || !op.args.iter().all(alike) {
        return None;
    }
    let name = |&v: &Value| {
        let name = graph.name_of(v).strip_suffix(end).filter(|_| graph.def(v).is_none())?;
        Some((name.to_string(), v))
    };
    let named: Vec<(String, Value)> = op.args.iter().map(name).collect::<Option<_>>()?;
    let distinct: BTreeSet<Value> = op.args.iter().copied().collect();
    (distinct.len() == named.len()).then_some(named)
}

/// The ops that work on each column alone, of values that come from the tokens: attention and places look at columns
/// before, which [`dsgc_ir::segment`] keeps apart.
fn region(graph: &Graph, rows: &Rows) -> BTreeSet<OpId> {
    // Whether a value depends on inputs at all: what does not is the same for all rows and columns, or made for them.
    let mut given: BTreeSet<Value> = graph.inputs().collect();
    let mut inside: BTreeSet<Value> = BTreeSet::from([rows.tokens, rows.segment]);
    let mut region: BTreeSet<OpId> = BTreeSet::new();
    for (id, op) in graph.ops() {
        if op.args.iter().any(|a| given.contains(a)) {
            given.extend(op.results());
        }
        if fits(graph, op, rows, &given, &inside) {
            inside.extend(op.results());
            region.insert(id);
        }
    }
    // What leaves the region is copied. So an op at its border stays outside if it makes more than it takes, or if
    // it only looks at tokens.
    loop {
        let mut users: BTreeMap<Value, bool> = BTreeMap::new();
        for (id, op) in graph.ops() {
            for arg in &op.args {
                *users.entry(*arg).or_default() |= region.contains(&id);
            }
        }
        let bounds = graph.upper_bounds();
        let bytes = |v: Value| graph.ty(v).bytes(&bounds).unwrap_or(0);
        let out = region.iter().rev().find(|&&id| {
            let op = graph.op(id);
            let taken: Vec<Value> = op.args.iter().copied().filter(|a| inside.contains(a)).collect();
            let made: usize = op.results().map(bytes).sum();
            let border = !op.results().any(|r| users.get(&r).copied().unwrap_or(false));
            let sources = taken.iter().all(|v| [rows.tokens, rows.segment].contains(v));
            border && (sources || made > taken.iter().map(|&v| bytes(v)).sum())
        });
        let Some(&out) = out else { return region };
        region.remove(&out);
    }
}

/// Whether an op can work on rows that hold all sequences.
fn fits(graph: &Graph, op: &OpData, rows: &Rows, given: &BTreeSet<Value>, inside: &BTreeSet<Value>) -> bool {
    let stacked = rows.stacked();
    let leads = |v: Value| graph.ty(v).dims.get(..2) == Some(&stacked[..]);
    let within: Vec<bool> = op.args.iter().map(|a| inside.contains(a)).collect();
    let free = |i: usize| !given.contains(&op.args[i]);
    let rank = |v: Value| graph.ty(v).rank();
    if op.results().len() == 0 || !op.results().next().is_some_and(leads) {
        return false;
    }
    match &op.op {
        // The same for all rows and columns, stretched over them; or one number per column of the region.
        Op::Broadcast { shape } => {
            let over = |v: Value| {
                let dims = &graph.ty(v).dims;
                dims.len() + 2 <= shape.len()
                    || dims[..dims.len() + 2 - shape.len()].iter().all(|d| *d == Dim::from(1i64))
            };
            within[0] && leads(op.args[0]) || free(0) && over(op.args[0])
        }
        Op::Embed {} => free(0) && within[1],
        Op::LayerNorm { .. } | Op::RmsNorm { .. } => within[0] && rank(op.args[0]) > 2 && (1..within.len()).all(free),
        Op::Rope { .. } => within[0] && within[1] && free(2),
        Op::Contract { spec } => {
            let labels = Contraction::parse(spec).expect("verified ops have readable specs");
            within[0]
                && free(1)
                && labels.lhs[..2] == labels.out[..2]
                && !labels.rhs.iter().any(|c| labels.lhs[..2].contains(c))
        }
        // Distances are counted in columns, which ends that follow one another make longer.
        Op::Attention { window: 1.., .. } => false,
        Op::Attention { .. } if op.args.len() > 4 => false,
        Op::Attention { causal, .. } => {
            let divisor = op.results().nth(1).expect("attention has two results");
            let used = graph.ops().any(|(_, o)| o.args.contains(&divisor));
            let returned = graph.outputs.iter().any(|(_, v)| *v == divisor);
            *causal && within[..3].iter().all(|&w| w) && op.args[3] == rows.segment && !used && !returned
        }
        Op::PositionIn {} => op.args[0] == rows.segment,
        Op::TokenLogp {} => within.iter().all(|&w| w) && rank(op.args[0]) > 2,
        Op::Reshape { .. } | Op::Stop {} => within[0],
        Op::Transpose { order } => within[0] && order[..2] == [0, 1],
        Op::Slice { axis, .. } | Op::Pad { axis, .. } => within[0] && *axis >= 2,
        Op::Concat { axis } => within.iter().all(|&w| w) && *axis >= 2,
        Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => {
            within[0] && axes.iter().all(|&a| a >= 2)
        }
        op if op.class() == Class::Elementwise => within.iter().all(|&w| w),
        // Dropout draws by row and column; all others look at several columns, or are none of a model's.
        _ => false,
    }
}

fn input_name(rows: &Rows) -> String {
    format!("ends.{}", rows.names.join("."))
}

/// The graph with the region on rows that hold all sequences, and the symbol of the columns of an end.
fn rewrite(graph: &Graph, rows: &Rows, region: &BTreeSet<OpId>, program: &Program) -> (Graph, Symbol) {
    let mut rebuild = Rebuild::same(graph);
    let names = std::iter::once("S".to_string()).chain((1..).map(|n| format!("S{n}")));
    let symbol = names.into_iter().find(|s| graph.dim_range(s).is_none()).expect("there are more names than dims");
    let symbol = Symbol::from(symbol.as_str());
    // Sizes only grow with it, so that memory can be planned for the largest.
    let columns = rows.dims[1].eval(&graph.upper_bounds()).expect("the verifier saw that every dim is declared");
    rebuild.new.dims.push(DimRange { symbol: symbol.clone(), min: 1, max: columns.max(1) });
    let end = Dim::symbol(&symbol);
    rebuild.new.input(input_name(rows), Type::new(DType::I32, vec![end.clone()]));
    let mut packed = Packed { rows, end, values: BTreeMap::new(), branched: None };
    if rows.samples > 1 {
        [rows.tokens, rows.segment].into_iter().for_each(|v| packed.begin(&mut rebuild, v, &Site::default()));
    }
    for (id, op) in graph.ops() {
        if region.contains(&id) {
            packed.push(&mut rebuild, op);
            continue;
        }
        for &arg in &op.args {
            packed.restore(&mut rebuild, arg, &op.site);
        }
        rebuild.copy(op, program);
        if let Some(source) = op.results().find(|r| [rows.tokens, rows.segment].contains(r)) {
            packed.begin(&mut rebuild, source, &op.site);
        }
    }
    for (_, value) in &graph.outputs {
        packed.restore(&mut rebuild, *value, &Site::default());
    }
    (without_dead_ops(&rebuild.finish(), program), symbol)
}

/// Values whose rows hold all sequences: the first one whole, then the end of each other.
struct Packed<'a> {
    rows: &'a Rows,
    /// Columns of an end.
    end: Dim,
    /// By the value that they take the place of.
    values: BTreeMap<Value, Value>,
    /// Segments with branches, for ops that look at columns before.
    branched: Option<Value>,
}

impl Packed<'_> {
    /// Columns of a row up to the end of the sequence `k`.
    fn columns(&self, k: usize) -> Dim {
        &self.rows.dims[1] + &(&Dim::from(k as i64) * &self.end)
    }

    /// The column at which ends begin, `i32[]`.
    fn place(&self, b: &mut Builder) -> Value {
        b.one(Op::Size { dim: &self.rows.dims[1] - &self.end, dtype: DType::I32 }, &[])
    }

    /// After tokens or segments stand one behind the other: the same in rows.
    fn begin(&mut self, rebuild: &mut Rebuild, source: Value, site: &Site) {
        let is_tokens = source == self.rows.tokens;
        let each: Vec<Value> = self.rows.each.iter().map(|(t, s)| if is_tokens { *t } else { *s }).collect();
        let mut each: Vec<Value> = each.into_iter().map(|v| rebuild.get(v)).collect();
        let whole = rebuild.get(source);
        let mut b = Builder::new(&mut rebuild.new, site.clone());
        if self.rows.samples > 1 {
            let [n, t] = self.rows.dims.clone();
            let samples = self.rows.samples as i64;
            let groups = b.one(Op::Reshape { shape: vec![n.clone(), Dim::from(samples), t.clone()] }, &[whole]);
            let mut one = |k: i64| {
                let row = b.one(Op::Slice { axis: 1, start: Dim::from(k), end: Dim::from(k + 1) }, &[groups]);
                b.one(Op::Reshape { shape: vec![n.clone(), t.clone()] }, &[row])
            };
            each = (0..samples).map(&mut one).collect();
        }
        let columns = &self.rows.dims[1];
        let slice = Op::Slice { axis: 1, start: columns - &self.end, end: columns.clone() };
        let mut ends: Vec<Value> = each.iter().map(|&v| b.one(slice.clone(), &[v])).collect();
        let parts = [&each[..1], &ends[1..]].concat();
        self.values.insert(source, b.one(Op::Concat { axis: 1 }, &parts));
        if is_tokens {
            return;
        }
        for (k, end) in ends.iter_mut().enumerate() {
            let dims = b.ty(*end).dims;
            let branch = b.one(Op::Const { value: f64::from(BRANCH) * (k + 1) as f64, dtype: DType::I32 }, &[]);
            let branch = b.stretch(branch, &dims);
            *end = b.one(Op::Add {}, &[*end, branch]);
        }
        let place = self.place(&mut b);
        ends[0] = b.one(Op::WriteAt { axis: 1 }, &[each[0], ends[0], place]);
        self.branched = Some(b.one(Op::Concat { axis: 1 }, &ends));
    }

    /// Pushes an op of the region.
    fn push(&mut self, rebuild: &mut Rebuild, op: &OpData) {
        let looks_back = matches!(op.op, Op::Attention { .. } | Op::PositionIn {});
        let arg = |a: &Value| match self.values.get(a) {
            _ if looks_back && *a == self.rows.segment => self.branched.expect("segments come before their use"),
            Some(&packed) => packed,
            None => rebuild.get(*a),
        };
        let args: Vec<Value> = op.args.iter().map(arg).collect();
        let mut new = op.op.clone();
        if let Op::Broadcast { shape } | Op::Reshape { shape } = &mut new {
            (shape[0], shape[1]) = (self.rows.dims[0].clone(), self.columns(self.rows.count() - 1));
        }
        let results = Builder::new(&mut rebuild.new, op.site.clone()).push(new, &args);
        for (old, new) in op.results().zip(results) {
            rebuild.new.set_name(new, rebuild.old.name_of(old));
            self.values.insert(old, new);
        }
    }

    /// Makes sure that a value is there as it was: the sequences one behind the other.
    fn restore(&self, rebuild: &mut Rebuild, old: Value, site: &Site) {
        let Some(&packed) = self.values.get(&old).filter(|_| rebuild.find(old).is_none()) else { return };
        let mut b = Builder::new(&mut rebuild.new, site.clone());
        let slice = |start: Dim, end: Dim| Op::Slice { axis: 1, start, end };
        let first = b.one(slice(Dim::from(0i64), self.columns(0)), &[packed]);
        let place = self.place(&mut b);
        let mut each = vec![first];
        for k in 1..self.rows.count() {
            let end = b.one(slice(self.columns(k - 1), self.columns(k)), &[packed]);
            each.push(b.one(Op::WriteAt { axis: 1 }, &[first, end, place]));
        }
        let back = if self.rows.samples > 1 {
            let dims = b.ty(first).dims;
            let shape = |lead: &[Dim]| [lead, &dims[1..]].concat();
            let alone = Op::Reshape { shape: shape(&[self.rows.dims[0].clone(), Dim::from(1i64)]) };
            let each: Vec<Value> = each.into_iter().map(|row| b.one(alone.clone(), &[row])).collect();
            let groups = b.one(Op::Concat { axis: 1 }, &each);
            b.one(Op::Reshape { shape: shape(&self.rows.stacked()[..1]) }, &[groups])
        } else {
            b.one(Op::Concat { axis: 0 }, &each)
        };
        rebuild.set(old, back);
    }
}
