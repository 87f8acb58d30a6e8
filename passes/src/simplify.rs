//! Algebra: replaces ops by cheaper ones that are equal, by the rules of one table ([`rules`]).
//!
//! ```text
//! %a = broadcast %x shape=[B, T]
//! %b = broadcast %y shape=[B, T]      =>     %c = mul %x, %y
//! %c = mul %a, %b                            %d = broadcast %c shape=[B, T]
//! ```
//!
//! Which rule to apply first is no question here: all that match are applied, and what they make stands beside what
//! was there in an e-graph (Willsey and others 2021, the crate `egg`), out of which [`extract`] takes the cheapest program
//! by [`dsgc_ir::cost::time`] at the upper bounds of all dims. The result is never dearer than the program was.
//!
//! An e-graph holds the ops of one layer in one phase, or some hundred ops outside of layers: work never moves
//! from one phase to another, and the layers of a model, whose bodies are equal, are searched once and all
//! rewritten alike. Limits are numbers of nodes and iterations, never time, so equal programs have equal results.
//!
//! By default only rules apply that keep every bit ([`Numerics::Exact`]), so the pass is exact; the caller may
//! allow more ([`PassContext::numerics`]). Gradients come after the first run, which is why slices of logits are cut there
//! and not in `canonicalize`: the gradient of what was cut away is never computed either.
//!
//! Cost: linear in distinct bodies for the search, and in ops for the rest.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::rc::Rc;

use dsgc_ir::diag::Diag;
use dsgc_ir::print::value_names;
use dsgc_ir::{Bindings, Builder, Graph, Op, OpData, OpId, Phase, Program, Tag, Type, Value};

use crate::canonicalize::{cast, constant};
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

pub mod body;
pub mod extract;
pub mod language;
pub mod matching;
pub mod rules;

use body::{Body, Operand, Plan};
use language::{Data, is_known};
use matching::{Rewrite, rewrites};

/// The pass.
pub const PASS: Pass =
    Pass { name: "simplify", requires: &[Fact::Typed], provides: &[], numerics: Numerics::Exact, run };

/// The most ops of an e-graph. A layer has less, and extraction takes the square of it.
const MOST_OPS: usize = 400;

/// The largest extent of a symbol that is priced: with more, whole models would cost the largest number that there is.
const MOST_EXTENT: i64 = 1 << 16;

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut search = Search { rewrites: rewrites(context.numerics), explain: context.explain, found: BTreeMap::new() };
    program.graphs = program
        .graphs
        .iter()
        .map(|graph| without_dead_ops(&Regions::new(graph).rewritten(&program, &mut search), &program))
        .collect();
    for found in search.found.values() {
        let Some(plan) = &found.plan else { continue };
        for (rule, n) in &plan.matched {
            context.matched(rule, n * found.times);
        }
        if context.explain {
            let equal = if found.times > 1 { format!(", and {} equal ones", found.times - 1) } else { String::new() };
            context.changed(format!("{}{equal}\n{}", found.place, plan.changes.trim_end()));
        }
    }
    Ok(program)
}

/// What has been found for bodies so far.
struct Search {
    rewrites: Vec<Rewrite>,
    explain: bool,
    /// Body in text form -> what became of it.
    found: BTreeMap<String, Found>,
}

struct Found {
    plan: Option<Rc<Plan>>,
    /// Where the body stands first, in words.
    place: String,
    /// How often it stands.
    times: usize,
}

/// A phase of a layer, or of what is in none.
type Layer<'a> = (Phase, Option<(&'a str, u32)>);

/// The ops of a graph by e-graph.
struct Regions<'a> {
    graph: &'a Graph,
    regions: Vec<Vec<OpId>>,
    /// Region and place in it of each op that has one.
    of: Vec<Option<(usize, usize)>>,
    /// Whether an op's result is used outside of its region.
    root: Vec<bool>,
}

impl<'a> Regions<'a> {
    fn new(graph: &'a Graph) -> Regions<'a> {
        let mut numbers: BTreeMap<(Layer, usize), usize> = BTreeMap::new();
        let mut sizes: BTreeMap<Layer, usize> = BTreeMap::new();
        let mut regions: Vec<Vec<OpId>> = Vec::new();
        let mut of = vec![None; graph.len()];
        // Rules move ops over each other that keep elements apart, which quantised ones are not.
        let quantized =
            |op: &OpData| op.args.iter().copied().chain(op.results()).any(|v| graph.ty(v).dtype.is_quantized());
        let known = |op: &OpData| is_known(&op.op, op.results().len()) && !quantized(op);
        for (id, op) in graph.ops().filter(|(_, op)| known(op)) {
            let layer = (op.site.phase, op.site.tag.as_ref().map(|Tag { block, instance }| (&**block, *instance)));
            let size = sizes.entry(layer).or_default();
            let region = *numbers.entry((layer, *size / MOST_OPS)).or_insert(regions.len());
            *size += 1;
            if region == regions.len() {
                regions.push(Vec::new());
            }
            of[id.0 as usize] = Some((region, regions[region].len()));
            regions[region].push(id);
        }
        let mut root = vec![false; graph.len()];
        let region = |id: OpId| of[id.0 as usize].map(|o: (usize, usize)| o.0);
        for (id, op) in graph.ops() {
            for def in op.args.iter().filter_map(|&a| graph.def(a)) {
                root[def.0 as usize] |= region(id).is_none() || region(id) != region(def);
            }
        }
        for def in graph.outputs.iter().filter_map(|(_, v)| graph.def(*v)) {
            root[def.0 as usize] = true;
        }
        Regions { graph, regions, of, root }
    }

    /// The body of a region, and the values from outside that it uses.
    fn body(&self, region: usize) -> (Body, Vec<Value>) {
        let (graph, ops) = (self.graph, &self.regions[region]);
        let mut leaves: Vec<Value> = Vec::new();
        let mut numbers: BTreeMap<Value, usize> = BTreeMap::new();
        let mut operand = |value: Value| {
            if let Some((own, local)) = graph.def(value).and_then(|d| self.of[d.0 as usize])
                && own == region
            {
                return Operand::Op(local);
            }
            Operand::Leaf(*numbers.entry(value).or_insert_with(|| {
                leaves.push(value);
                leaves.len() - 1
            }))
        };
        let bodies = ops.iter().map(|&id| graph.op(id));
        let body: Vec<(Op, Vec<Operand>)> =
            bodies.map(|op| (op.op.clone(), op.args.iter().map(|&a| operand(a)).collect())).collect();
        let data = |&v: &Value| {
            let ty: Type = graph.ty(v).clone();
            Data::Value { constant: constant(graph, v).map(|c| cast(c, ty.dtype)), ty }
        };
        let roots = (0..ops.len()).filter(|&i| self.root[ops[i].0 as usize]).collect();
        let bounds: Bindings = graph.upper_bounds().into_iter().map(|(s, n)| (s, n.min(MOST_EXTENT))).collect();
        (Body { ops: body, leaves: leaves.iter().map(data).collect(), roots, bounds }, leaves)
    }

    /// The graph with every region replaced by the cheapest equal one.
    fn rewritten(&self, program: &Program, search: &mut Search) -> Graph {
        let graph = self.graph;
        let names = if search.explain { value_names(graph) } else { Vec::new() };
        let mut replays: Vec<Option<Replay>> = Vec::new();
        for (i, ops) in self.regions.iter().enumerate() {
            let (body, leaves) = self.body(i);
            let found = search.found.entry(body.to_string()).or_insert_with(|| {
                let name = |v: &Value| names.get(v.0 as usize).cloned().unwrap_or_default();
                let results = ops.iter().map(|&id| name(&graph.op(id).result())).collect();
                let names = body::Names { leaves: leaves.iter().map(name).collect(), results };
                let plan = body.plan(&search.rewrites, search.explain.then_some(&names));
                Found { plan: plan.map(Rc::new), place: place(graph, graph.op(ops[0])), times: 0 }
            });
            let replay = found.plan.clone().and_then(|plan| Replay::new(self, ops, plan, leaves, &body.roots));
            found.times += usize::from(replay.is_some());
            replays.push(replay);
        }
        let mut rebuild = Rebuild::same(graph);
        for (id, op) in graph.ops() {
            match self.of[id.0 as usize].and_then(|(region, local)| replays[region].as_mut().map(|r| (r, local))) {
                Some((replay, local)) => replay.reach(&mut rebuild, id, local, program),
                None => rebuild.copy(op, program),
            }
        }
        rebuild.finish()
    }
}

/// Where an op stands, in words.
fn place(graph: &Graph, op: &OpData) -> String {
    let mut text = format!("@{} {}", graph.name, op.site.phase.name());
    if let Some(Tag { block, instance }) = &op.site.tag {
        write!(text, " {block}/{instance}").expect("a string takes all");
    }
    text
}

/// A plan that is carried out for one region.
struct Replay<'a> {
    graph: &'a Graph,
    plan: Rc<Plan>,
    leaves: Vec<Value>,
    /// For each op of the plan, how many ops of the old graph must have been passed for all its leaves to be there.
    ready: Vec<u32>,
    /// For each op of the plan, the first old one with its value, whose name and place it inherits.
    heir_of: Vec<Option<OpId>>,
    /// What has been pushed for each op of the plan.
    pushed: Vec<Option<Value>>,
}

impl<'a> Replay<'a> {
    /// `None` if a root would need what comes after it. No rule of the table makes that, but nothing forbids one.
    fn new(
        regions: &'a Regions,
        ops: &[OpId],
        plan: Rc<Plan>,
        leaves: Vec<Value>,
        roots: &[usize],
    ) -> Option<Replay<'a>> {
        let graph = regions.graph;
        let leaf = |i: usize| graph.def(leaves[i]).map_or(0, |d| d.0 + 1);
        let mut ready: Vec<u32> = Vec::new();
        let at = |operand: &Operand, ready: &[u32]| match operand {
            Operand::Leaf(i) => leaf(*i),
            Operand::Op(i) => ready[*i],
        };
        for (_, operands) in &plan.ops {
            let last = operands.iter().map(|o| at(o, &ready)).max().unwrap_or(0);
            ready.push(last);
        }
        let in_time = |&root: &usize| plan.values[root].as_ref().is_some_and(|v| at(v, &ready) <= ops[root].0);
        roots.iter().all(in_time).then_some(())?;
        let mut heir_of = vec![None; plan.ops.len()];
        for (value, &id) in plan.values.iter().zip(ops).rev() {
            if let Some(Operand::Op(i)) = value {
                heir_of[*i] = Some(id);
            }
        }
        let pushed = vec![None; plan.ops.len()];
        Some(Replay { graph, plan, leaves, ready, heir_of, pushed })
    }

    /// Comes to an op of the old graph: pushes what has its value now, if the plan needs it and can have it here.
    fn reach(&mut self, rebuild: &mut Rebuild, id: OpId, local: usize, program: &Program) {
        let plan = Rc::clone(&self.plan);
        let result = self.graph.op(id).result();
        match plan.values[local] {
            Some(Operand::Leaf(i)) => {
                if let Some(value) = rebuild.find(self.leaves[i]) {
                    rebuild.set(result, value);
                }
            }
            Some(Operand::Op(i)) if self.ready[i] <= id.0 => {
                let value = self.push(rebuild, i, id, program);
                rebuild.set(result, value);
            }
            Some(Operand::Op(_)) | None => {}
        }
    }

    fn push(&mut self, rebuild: &mut Rebuild, i: usize, at: OpId, program: &Program) -> Value {
        if let Some(value) = self.pushed[i] {
            return value;
        }
        let plan = Rc::clone(&self.plan);
        let (op, operands) = &plan.ops[i];
        let args: Vec<Value> = operands
            .iter()
            .map(|operand| match *operand {
                Operand::Leaf(leaf) => rebuild.get(self.leaves[leaf]),
                Operand::Op(inner) => self.push(rebuild, inner, at, program),
            })
            .collect();
        let value = match self.heir_of[i] {
            Some(old) => {
                rebuild.push(self.graph.op(old), op.clone(), &args, program);
                rebuild.get(self.graph.op(old).result())
            }
            None => Builder::new(&mut rebuild.new, self.graph.op(at).site.clone()).one(op.clone(), &args),
        };
        self.pushed[i] = Some(value);
        value
    }
}
