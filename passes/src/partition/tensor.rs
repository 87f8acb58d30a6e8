//! Shares layers out to the ranks along the axis `tensor`: dims of weights are cut, and every op that has them works on a part.
//!
//! Dims that go through their places together ([`dsgc_ir::factors`]) are one class over all graphs and states of a program: the
//! heads of a layer, its inner width, the vocabulary. A class is cut where every op can: then all of its values and states are in
//! parts, and nothing needs to be moved but for sums over it, which are partial (Megatron-LM, Shoeybi et al. 2019, is what
//! comes out for a transformer: column and row parallel layers). Ops on a vocabulary that is cut are written out: a rank
//! looks up the tokens that are its own (`vocabulary`).
//!
//! Parts are equally long, so the last ones may go beyond the end of a dim. What stands there is zero in states, and
//! whatever comes of it elsewhere (`Beyond`): ops that take several places together get zeros, and a softmax nothing, so
//! it never counts.

mod vocabulary;

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::factors::{Factor, Kind, factors};
use dsgc_ir::{
    Axis, Bindings, Builder, Class, Cut, DType, Dim, Graph, Op, OpData, Placement, Program, Site, StateId, StateKind,
    Type, Value,
};

use super::table::{Has, Part, Table};
use super::{is_linear, is_zero};
use crate::canonicalize;
use crate::pipeline::PassContext;
use crate::rebuild::{Rebuild, without_dead_ops};
use vocabulary::Softmax;

/// The program that one rank along the axis runs.
pub(super) fn run(program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let ranks = program.mesh.tensor;
    let graphs = program.graphs.iter().map(|graph| apart(graph, &program)).collect();
    let program = Program { graphs, ..program };
    let cuts = Classes::of(&program).choose(&program, ranks, context)?;
    let mut local = program.clone();
    for (&state, &dim) in &cuts.states {
        let state = &mut local.states[state.0 as usize];
        let whole = state.ty.shape(&Bindings::new()).expect("states have constant dims");
        let cuts = vec![Cut { over: Axis::Tensor, dim }];
        state.ty.dims[dim] = Dim::from(whole[dim].div_ceil(ranks) as i64);
        state.placement = Some(Placement { cuts, ..Placement::of_whole(whole) });
    }
    let share = |(at, graph): (usize, &Graph)| Share::of(graph, at, &cuts, &local, context);
    local.graphs = program.graphs.iter().enumerate().map(share).collect();
    // What was stretched apart, and is the same after all.
    canonicalize::run(local, context)
}

/// The graph with what is stretched stretched for each op by itself: zeros that many states begin with tie none to another.
fn apart(graph: &Graph, program: &Program) -> Graph {
    let mut rebuild = Rebuild::same(graph);
    for (_, op) in graph.ops() {
        let own = |rebuild: &mut Rebuild, &arg: &Value| {
            let stretched =
                graph.def(arg).map(|def| graph.op(def)).filter(|def| matches!(def.op, Op::Broadcast { .. }));
            let Some(def) = stretched else { return rebuild.get(arg) };
            let from = rebuild.get(def.args[0]);
            Builder::new(&mut rebuild.new, def.site.clone()).one(def.op.clone(), &[from])
        };
        let args: Vec<Value> = op.args.iter().map(|arg| own(&mut rebuild, arg)).collect();
        rebuild.push(op, op.op.clone(), &args, program);
    }
    without_dead_ops(&rebuild.finish(), program)
}

/// A dim of a value of a graph, or of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Value(usize, Value, usize),
    State(StateId, usize),
}

/// Dims that belong together.
struct Classes {
    /// The place of every dim, by number; the number of the place that stands for its class.
    places: Vec<Place>,
    numbers: BTreeMap<Place, usize>,
    parents: Vec<usize>,
    /// Per class, whether some op needs all of it together.
    whole: Vec<bool>,
    /// Per class, whether tokens number its places.
    vocabulary: Vec<bool>,
}

/// What is cut.
struct Cuts {
    values: BTreeMap<(usize, Value), usize>,
    states: BTreeMap<StateId, usize>,
}

impl Classes {
    fn of(program: &Program) -> Classes {
        let mut classes =
            Classes { places: vec![], numbers: BTreeMap::new(), parents: vec![], whole: vec![], vocabulary: vec![] };
        for (id, state) in program.state_ids() {
            for dim in 0..state.ty.rank() {
                let place = classes.number(Place::State(id, dim));
                if let StateKind::Copy { of } = state.kind {
                    let original = classes.number(Place::State(of, dim));
                    classes.join(place, original);
                }
            }
        }
        for (at, graph) in program.graphs.iter().enumerate() {
            for value in graph.values() {
                for (dim, extent) in graph.ty(value).dims.iter().enumerate() {
                    let place = classes.number(Place::Value(at, value, dim));
                    classes.whole[place] |= extent.constant().is_none() || graph.def(value).is_none();
                }
            }
            for (_, op) in graph.ops() {
                classes.op(at, graph, op);
            }
        }
        classes
    }

    fn op(&mut self, at: usize, graph: &Graph, op: &OpData) {
        if let Op::Read { state } | Op::Write { state } = op.op {
            let value = op.args.first().copied().unwrap_or_else(|| op.result());
            for dim in 0..graph.ty(value).rank() {
                let (a, b) = (self.number(Place::Value(at, value, dim)), self.number(Place::State(state, dim)));
                self.join(a, b);
            }
            return;
        }
        for factor in factors_of(graph, op) {
            let args = factor.args.iter().map(|&(arg, dim)| Place::Value(at, op.args[arg], dim));
            let results: Vec<Value> = op.results().collect();
            let results = factor.results.iter().map(|&(result, dim)| Place::Value(at, results[result], dim));
            let all: Vec<usize> = args.chain(results).map(|place| self.number(place)).collect();
            for pair in all.windows(2) {
                self.join(pair[0], pair[1]);
            }
            if let Some(&first) = all.first() {
                let root = self.root(first);
                self.whole[root] |= factor.kind == Kind::Whole;
                self.vocabulary[root] |= factor.kind == Kind::Vocabulary;
            }
        }
    }

    fn number(&mut self, place: Place) -> usize {
        if let Some(&number) = self.numbers.get(&place) {
            return number;
        }
        let number = self.places.len();
        self.numbers.insert(place, number);
        self.places.push(place);
        self.parents.push(number);
        self.whole.push(false);
        self.vocabulary.push(false);
        number
    }

    fn root(&mut self, mut at: usize) -> usize {
        while self.parents[at] != at {
            self.parents[at] = self.parents[self.parents[at]];
            at = self.parents[at];
        }
        at
    }

    /// The smaller number stands for both.
    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        let (first, second) = (a.min(b), a.max(b));
        self.parents[second] = first;
        self.whole[first] |= self.whole[second];
        self.vocabulary[first] |= self.vocabulary[second];
    }

    /// The classes that are cut: those of weights, the largest first, where every op can and nothing is cut along two dims.
    fn choose(mut self, program: &Program, ranks: usize, context: &PassContext) -> Result<Cuts, Vec<Diag>> {
        let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for at in 0..self.places.len() {
            let root = self.root(at);
            members.entry(root).or_default().push(at);
        }
        let factors_of_lora = lora(program);
        let weighs = |&at: &usize| match self.places[at] {
            Place::State(id, _) => {
                let state = program.state(id);
                let weight = matches!(state.kind, StateKind::Param { .. }) && state.ty.rank() > 1;
                if weight && !factors_of_lora.contains(&state.name) { state.bytes() } else { 0 }
            }
            Place::Value(..) => 0,
        };
        let bytes = |of: &[usize]| of.iter().map(weighs).sum::<usize>();
        let mut open: Vec<(usize, &Vec<usize>)> = members
            .iter()
            .filter(|&(&root, _)| !self.whole[root])
            .map(|(_, all)| (bytes(all), all))
            .filter(|(bytes, _)| *bytes > 0)
            .collect();
        open.sort_by_key(|(bytes, all)| (std::cmp::Reverse(*bytes), all[0]));
        let mut cuts = Cuts { values: BTreeMap::new(), states: BTreeMap::new() };
        let mut errors: BTreeMap<(Span, usize), Diag> = BTreeMap::new();
        for (_, all) in open {
            let divisor = all.iter().fold(0, |divisor, &at| gcd(divisor, self.extent(program, at)));
            let even = divisor.is_multiple_of(ranks);
            // Where one place is several elsewhere, as a head is many columns, parts of unequal length would tear them apart.
            if !even && all.iter().any(|&at| self.extent(program, at) != divisor) {
                // Layers are alike, and so are their messages.
                let (span, error) = uneven(program, self.places[first_weight(all, weighs)], divisor);
                errors.entry((span, divisor)).or_insert(error);
                continue;
            }
            if divisor < ranks {
                context.matched("width of fewer places than ranks, whole", 1);
                continue;
            }
            let taken = |&at: &usize| match self.places[at] {
                Place::Value(graph, value, _) => cuts.values.contains_key(&(graph, value)),
                Place::State(state, _) => cuts.states.contains_key(&state),
            };
            // Nor of one value or state in two dims.
            let of = |&at: &usize| match self.places[at] {
                Place::Value(graph, value, _) => Ok((graph, value)),
                Place::State(state, _) => Err(state),
            };
            let apart = all.iter().map(of).collect::<BTreeSet<_>>().len() == all.len();
            if !apart || all.iter().any(taken) {
                continue;
            }
            for &at in all {
                match self.places[at] {
                    Place::Value(graph, value, dim) => drop(cuts.values.insert((graph, value), dim)),
                    Place::State(state, dim) => drop(cuts.states.insert(state, dim)),
                }
            }
            context.matched(if self.vocabulary[self.parents[all[0]]] { "vocabulary cut" } else { "width cut" }, 1);
            context.matched("dim filled up for its last ranks", usize::from(!even));
        }
        if !errors.is_empty() {
            return Err(errors.into_values().collect());
        }
        if cuts.states.is_empty() {
            let message = format!("found nothing in the models that {ranks} ranks could share (`tensor: {ranks}`)");
            let diag = Diag::error(message).label(program.stage.parallel.tensor, "asked for here");
            return Err(vec![diag.help("ranks can have different rows instead: `data`")]);
        }
        Ok(cuts)
    }

    fn extent(&self, program: &Program, at: usize) -> usize {
        let dim = match self.places[at] {
            Place::Value(graph, value, dim) => &program.graphs[graph].ty(value).dims[dim],
            Place::State(state, dim) => &program.state(state).ty.dims[dim],
        };
        dim.constant().and_then(|extent| usize::try_from(extent).ok()).unwrap_or(1)
    }
}

fn first_weight(all: &[usize], weighs: impl Fn(&usize) -> usize) -> usize {
    all.iter().copied().find(|at| weighs(at) > 0).expect("a class of weights has one")
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Whether a sum is worth putting off past an op: it is sent once for all that are added up, and is no larger.
fn stays_as_large(op: &Op) -> bool {
    !matches!(op, Op::Contract { .. } | Op::Broadcast { .. } | Op::Pad { .. } | Op::Concat { .. })
}

/// The message where places cannot be shared evenly, and where the weight is declared.
fn uneven(program: &Program, place: Place, divisor: usize) -> (Span, Diag) {
    let Place::State(id, dim) = place else { panic!("bug: a weight is a state") };
    let state = program.state(id);
    let name = state.name.split_once('/').map_or(state.name.as_str(), |(_, name)| name);
    let would: Vec<String> = (1..=divisor).filter(|n| divisor.is_multiple_of(*n)).map(|n| n.to_string()).collect();
    let ranks = program.mesh.tensor;
    let message = format!("{ranks} ranks cannot share dim {dim} of `{name}`, which is {}", state.ty);
    let diag = Diag::error(message).label(program.stage.parallel.tensor, "asked for here");
    let diag = diag.label(state.span, "declared here").help(format!(
        "what goes with it, such as heads, has the divisor {divisor}: `tensor` can be {}",
        would.join(", ")
    ));
    (state.span, diag)
}

/// Parameters of low-rank factors.
fn lora(program: &Program) -> BTreeSet<String> {
    let adapters = program.stage.trainings.iter().filter_map(|t| Some((&t.role, t.lora.as_ref()?.adapter.as_ref()?)));
    let names = adapters.flat_map(|(role, adapter)| {
        let factors = adapter.modules.iter().flat_map(|module| dsgc_ir::stage::Adapter::factors(module));
        factors.map(move |name| format!("{role}/{name}"))
    });
    names.collect()
}

fn factors_of(graph: &Graph, op: &OpData) -> Vec<Factor> {
    let types = |values: Vec<Value>| -> Vec<Type> { values.into_iter().map(|v| graph.ty(v).clone()).collect() };
    factors(&op.op, &types(op.args.clone()), &types(op.results().collect()))
}

/// What stands beyond the end of a dim in the parts of the last ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Beyond {
    /// Zeros.
    Zeros,
    /// What stands at all other places of the dim too.
    Same,
    /// Anything, NaN too.
    Anything,
}

/// A graph on its way.
struct Share<'a> {
    at: usize,
    cuts: &'a Cuts,
    /// The program with a rank's states.
    local: &'a Program,
    rebuild: Rebuild<'a>,
    table: Table<'a>,
    /// By value of the new graph that goes beyond an end, if that is no zeros.
    beyond: BTreeMap<Value, Beyond>,
    /// Of logits that are cut.
    softmaxes: BTreeMap<Value, Softmax>,
}

impl<'a> Share<'a> {
    fn of(graph: &'a Graph, at: usize, cuts: &'a Cuts, local: &'a Program, context: &'a PassContext<'a>) -> Graph {
        let rebuild = Rebuild::same(graph);
        let table = Table::new(Axis::Tensor, local.mesh.tensor, vec![Has::Same; graph.inputs().len()], context);
        let (beyond, softmaxes) = (BTreeMap::new(), BTreeMap::new());
        let mut share = Share { at, cuts, local, rebuild, table, beyond, softmaxes };
        for (_, op) in graph.ops() {
            share.op(op);
        }
        let outputs = graph.outputs.iter();
        let whole = |(name, value): &(String, Value)| {
            let value = share.rebuild.get(*value);
            (name.clone(), share.reshard(value, Has::Same, &Site::default()))
        };
        let outputs = outputs.map(whole).collect();
        share.rebuild.new.outputs = outputs;
        without_dead_ops(&share.rebuild.new, local)
    }

    fn ranks(&self) -> usize {
        self.table.ranks()
    }

    /// The dim along which a value of the old graph is cut.
    fn cut(&self, old: Value) -> Option<usize> {
        self.cuts.values.get(&(self.at, old)).copied()
    }

    /// What is had of a value of the old graph, unless ranks have summands.
    fn cut_of(&self, old: Value) -> Has {
        let part = |dim| Part { dim, extent: extent(&self.rebuild.old.ty(old).dims[dim]) };
        self.cut(old).map_or(Has::Same, |dim| Has::Cut(part(dim)))
    }

    /// Says what is had of the values that were pushed since.
    fn note(&mut self, has: Has) {
        self.table.note(&self.rebuild.new, has);
    }

    fn builder(&mut self, site: &Site) -> Builder<'_> {
        Builder::new(&mut self.rebuild.new, site.clone())
    }

    fn reshard(&mut self, value: Value, want: Has, site: &Site) -> Value {
        self.table.reshard(&mut self.rebuild.new, value, want, site)
    }

    /// The operands, those of sums whole.
    fn finished(&mut self, op: &OpData) -> Vec<Value> {
        let args: Vec<Value> = op.args.iter().map(|&arg| self.rebuild.get(arg)).collect();
        args.into_iter().map(|arg| self.sum(arg, &op.site)).collect()
    }

    fn op(&mut self, op: &OpData) {
        let results: Vec<Value> = op.results().collect();
        let is_cut = |factor: &&Factor| {
            let arg = factor.args.iter().any(|&(arg, dim)| self.cut(op.args[arg]) == Some(dim));
            arg || factor.results.iter().any(|&(result, dim)| self.cut(results[result]) == Some(dim))
        };
        let all = factors_of(self.rebuild.old, op);
        let cut: Vec<&Factor> = all.iter().filter(is_cut).collect();
        if cut.iter().any(|factor| factor.kind == Kind::Vocabulary) {
            return self.vocabulary(op);
        }
        if cut.iter().any(|factor| factor.kind == Kind::Drawn) {
            return self.drawn(op);
        }
        let sums: Vec<usize> = cut.iter().flat_map(|factor| &factor.sums).copied().collect();
        let known = |&arg: &Value| self.rebuild.get(arg);
        let args: Vec<Value> = op.args.iter().map(known).collect();
        // A sum that is there already is taken.
        let args: Vec<Value> = args.into_iter().map(|arg| self.table.sum_of(arg).unwrap_or(arg)).collect();
        let has: Vec<Has> = args.iter().map(|&arg| self.table.has(arg)).collect();
        let linear = has.contains(&Has::Partial)
            && sums.is_empty()
            && stays_as_large(&op.op)
            && results.first().is_some_and(|&result| is_linear(&op.op, &has, self.rebuild.old.ty(result)));
        let args: Vec<Value> = if linear {
            let adds = matches!(op.op, Op::Add {} | Op::Sub {});
            let want = |has: Has| if adds && has == Has::Same { Has::Partial } else { has };
            args.into_iter().zip(has).map(|(arg, has)| self.reshard(arg, want(has), &op.site)).collect()
        } else {
            self.finished(op)
        };
        let takes_one_place = matches!(op.op.class(), Class::Elementwise | Class::Structure | Class::View);
        let args = if takes_one_place { args } else { args.into_iter().map(|arg| self.cleared(arg, op)).collect() };
        let beyond = self.beyond(&op.op, &args);
        let local = self.localised(op);
        self.rebuild.push(op, local, &args, self.local);
        for (at, &old) in results.iter().enumerate() {
            let new = self.rebuild.get(old);
            self.table.set(new, if linear || sums.contains(&at) { Has::Partial } else { self.cut_of(old) });
            if self.goes_beyond(new).is_some() && beyond != Beyond::Zeros {
                self.beyond.insert(new, beyond);
            }
        }
    }

    /// The op with a rank's extents in its attributes.
    fn localised(&self, op: &OpData) -> Op {
        let mut local = op.op.clone();
        if let Op::Broadcast { shape } | Op::Reshape { shape } = &mut local
            && let Some(dim) = self.cut(op.result())
        {
            shape[dim] = self.part(&shape[dim]);
        }
        local
    }

    /// A rank's extent of a dim that is cut.
    fn part(&self, dim: &Dim) -> Dim {
        Dim::from(extent(dim).div_ceil(self.ranks()) as i64)
    }

    /// What depends on the number of its place is made whole, and cut.
    fn drawn(&mut self, op: &OpData) {
        let args = self.finished(op);
        let whole = self.builder(&op.site).one(op.op.clone(), &args);
        self.note(Has::Same);
        let part = self.reshard(whole, self.cut_of(op.result()), &op.site);
        self.rebuild.set(op.result(), part);
    }

    /// A value, or the sum of which it is a summand.
    fn sum(&mut self, value: Value, site: &Site) -> Value {
        if self.table.has(value) == Has::Partial { self.reshard(value, Has::Same, site) } else { value }
    }

    /// The dim in which the last ranks' parts of a value go beyond its end.
    fn goes_beyond(&self, value: Value) -> Option<Part> {
        match self.table.has(value) {
            Has::Cut(part) if !part.extent.is_multiple_of(self.ranks()) => Some(part),
            _ => None,
        }
    }

    /// What stands beyond the end of what an op makes of these operands.
    fn beyond(&self, op: &Op, args: &[Value]) -> Beyond {
        let of = |arg: &Value| match self.goes_beyond(*arg) {
            Some(_) => self.beyond.get(arg).copied().unwrap_or(Beyond::Zeros),
            // It is stretched along the dim.
            None if is_zero(&self.rebuild.new, *arg) => Beyond::Zeros,
            None => Beyond::Same,
        };
        let of: Vec<Beyond> = args.iter().map(of).collect();
        let most = of.iter().copied().max().unwrap_or(Beyond::Zeros);
        let zeros = |at: &[usize]| at.iter().all(|&at| of[at] == Beyond::Zeros);
        match op {
            // A product of anything and zero may be no number.
            Op::Mul {} if most < Beyond::Anything && of.contains(&Beyond::Zeros) => Beyond::Zeros,
            Op::Where {} if zeros(&[1, 2]) => Beyond::Zeros,
            Op::Broadcast { .. } | Op::Add {} | Op::Sub {} | Op::Neg {} | Op::Cast { .. } => most,
            op if matches!(op.class(), Class::Structure | Class::View) => most,
            op if op.class() == Class::Elementwise && of.iter().all(|&of| of == Beyond::Same) => Beyond::Same,
            // Of zeros.
            op if matches!(op.class(), Class::Contraction | Class::Reduction | Class::Update | Class::State) => {
                Beyond::Zeros
            }
            Op::EmbedGrad { .. } => Beyond::Zeros,
            _ => Beyond::Anything,
        }
    }

    /// The value with zeros beyond the end of its dim.
    fn cleared(&mut self, value: Value, op: &OpData) -> Value {
        match self.goes_beyond(value) {
            Some(part) if self.beyond.contains_key(&value) => self.filled(value, part, 0.0, op),
            _ => value,
        }
    }

    /// The value with this number beyond the end of a dim.
    fn filled(&mut self, value: Value, Part { dim, extent }: Part, number: f64, op: &OpData) -> Value {
        let place = self.place(op);
        let len = extent.div_ceil(self.ranks()) as i64;
        let mut b = self.builder(&op.site);
        let ty = b.ty(value);
        let number_of =
            |b: &mut Builder, number: i64| b.one(Op::Const { value: number as f64, dtype: DType::I32 }, &[]);
        let (of_rank, end) = (number_of(&mut b, len), number_of(&mut b, extent as i64));
        let first = b.one(Op::Mul {}, &[place, of_rank]);
        // As many places as there are from the rank's first one on.
        let left = b.one(Op::Sub {}, &[end, first]);
        let left = b.stretch(left, &[Dim::from(len)]);
        let places = b.one(Op::Iota { len: Dim::from(len) }, &[]);
        let inside = b.one(Op::Lt {}, &[places, left]);
        let mut column = vec![Dim::from(1i64); ty.rank() - dim];
        column[0] = Dim::from(len);
        let inside = b.one(Op::Reshape { shape: column }, &[inside]);
        let inside = b.stretch(inside, &ty.dims);
        let number = b.fill(number, &ty.dims);
        let number = b.cast(number, ty.dtype);
        let filled = b.one(Op::Where {}, &[inside, value, number]);
        self.note(Has::Cut(Part { dim, extent }));
        filled
    }

    /// The rank's place along the axis: its part of 0, 1, 2, ...
    fn place(&mut self, op: &OpData) -> Value {
        let ranks = self.ranks();
        let places = self.builder(&op.site).one(Op::Iota { len: Dim::from(ranks as i64) }, &[]);
        self.note(Has::Same);
        let place = self.reshard(places, Has::Cut(Part { dim: 0, extent: ranks }), &op.site);
        let place = self.builder(&op.site).one(Op::Reshape { shape: vec![] }, &[place]);
        self.note(Has::Same);
        place
    }
}

/// The extent of a dim that is cut.
fn extent(dim: &Dim) -> usize {
    let extent = dim.constant().and_then(|extent| usize::try_from(extent).ok());
    extent.unwrap_or_else(|| panic!("bug: the dim {dim} is cut"))
}
