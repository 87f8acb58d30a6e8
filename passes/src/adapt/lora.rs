//! LoRA: low-rank factors beside frozen weights.
//!
//! ```text
//! %w = read @m/q.weight                                 %w = read @m/q.weight
//! %y = contract %x, %w spec=btd,vd->btv                 %p = contract %x, %w spec=btd,vd->btv
//!                                               =>      %a = read @m/q.lora_A.weight
//!                                                       %d = contract %x, %a spec=btd,ad->bta
//!                                                       %b = read @m/q.lora_B.weight
//!                                                       %u = contract (%d * alpha / r), %b spec=bta,va->btv
//!                                                       %y = add %p, %u
//! ```
//!
//! The scale goes to the narrow value; dropout, if there is any, to `x` before `A`. Where a weight is used otherwise, as in
//! an average of models, it is `W + (alpha / r) B A`. The graph `<role>.adapter.init` draws `A` evenly between
//! `-1/sqrt(in)` and `1/sqrt(in)`, which is PEFT's Kaiming initialisation with `a = sqrt(5)`; `B` is zero as every state is
//! at first.

use std::collections::BTreeMap;

use dsgc_ir::stage::{Adapter, Lora};
use dsgc_ir::trained::{low_rank, reads};
use dsgc_ir::{Builder, DType, Dim, Graph, Loc, Op, OpData, Program, Site, StateId, StateKind, Tag, Type, Value};

use crate::rebuild::{Rebuild, without_dead_ops};

/// Folded into the stage's key, so that factors draw other numbers than the parameters of models.
const STREAM: u64 = 0x10_7a;

/// The factors of a weight `[out, in]`.
#[derive(Clone)]
struct Factors {
    /// `[r, in]`.
    a: StateId,
    /// `[out, r]`.
    b: StateId,
    /// The layer of the weight.
    tag: Option<Tag>,
}

/// Declares the factors of these weights of a role, and lets every graph compute with them. `whole` are the names of
/// the model's own parameters that are trained.
pub fn adapt(program: &mut Program, role: &str, lora: &Lora, weights: &[StateId], whole: Vec<String>) -> Adapter {
    let mut factors = BTreeMap::new();
    let mut modules = Vec::new();
    for &weight in weights {
        let state = program.state(weight).clone();
        let name = state.name.strip_prefix(role).and_then(|name| name.strip_prefix('/'));
        let module = name.and_then(|name| name.strip_suffix(".weight")).expect("only weights of layers are chosen");
        let r = Dim::from(lora.r as i64);
        let shapes = [vec![r.clone(), state.ty.dims[1].clone()], vec![state.ty.dims[0].clone(), r]];
        let names = Adapter::factors(module).map(|name| format!("{role}/{name}"));
        let mut declare = |i: usize| {
            let (name, ty) = (names[i].clone(), Type::new(DType::F32, shapes[i].clone()));
            program.declare(name, ty, StateKind::Param { trained: true }, state.span)
        };
        let (a, b) = (declare(0), declare(1));
        factors.insert(weight, Factors { a, b, tag: tag_of(program, weight) });
        modules.push(module.to_string());
    }
    let adapting =
        Adapting { program, role, factors: &factors, scale: lora.alpha / lora.r as f64, dropout: lora.dropout };
    program.graphs = program.graphs.iter().map(|graph| adapting.graph(graph)).collect();
    let init = format!("{role}.adapter.init");
    let graph = first_values(program, role, &init, factors.values());
    program.graphs.push(graph);
    Adapter { modules, whole, init }
}

/// The layer in which a parameter is read.
fn tag_of(program: &Program, param: StateId) -> Option<Tag> {
    let ops = program.graphs.iter().flat_map(|graph| graph.ops());
    let mut reads = ops.filter(|(_, op)| op.op == Op::Read { state: param });
    reads.find_map(|(_, op)| op.site.tag.clone())
}

/// The graph that draws the first factors.
fn first_values<'a>(program: &Program, role: &str, name: &str, factors: impl Iterator<Item = &'a Factors>) -> Graph {
    let mut graph = Graph::new(name);
    let key = graph.input("key", Type::scalar(DType::Key));
    let number = program.stage.roles.iter().position(|r| r.name == role).unwrap_or_default() as u64;
    let mut b = Builder::new(&mut graph, Site::default());
    let stream = b.one(Op::Fold { data: STREAM }, &[key]);
    let own = b.one(Op::Fold { data: number }, &[stream]);
    for (k, Factors { a, tag, .. }) in factors.enumerate() {
        let state = program.state(*a);
        b.site = Site { loc: Loc { span: state.span, ..Loc::default() }, tag: tag.clone(), ..Site::default() };
        let inputs = state.ty.dims[1].constant().expect("states have constant dims") as f64;
        let (shape, high) = (state.ty.dims.clone(), 1.0 / inputs.sqrt());
        let key = b.one(Op::Fold { data: k as u64 }, &[own]);
        let drawn = b.one(Op::RandomUniform { shape, low: -high, high }, &[key]);
        b.write(*a, &state.ty, drawn);
    }
    graph
}

/// Rewriting a graph.
struct Adapting<'a> {
    program: &'a Program,
    role: &'a str,
    /// By the weight that they belong to.
    factors: &'a BTreeMap<StateId, Factors>,
    scale: f64,
    /// Probability of dropout before `A`.
    dropout: f64,
}

impl Adapting<'_> {
    fn graph(&self, graph: &Graph) -> Graph {
        let reads = reads(graph);
        let factors = |v: &Value| reads.get(v).and_then(|state| self.factors.get(state));
        if !graph.ops().any(|(_, op)| op.args.iter().any(|v| factors(v).is_some())) {
            return graph.clone();
        }
        let mut rebuild = Rebuild::same(graph);
        for (_, op) in graph.ops() {
            let adapted: Vec<Option<&Factors>> = op.args.iter().map(factors).collect();
            let product = match (&op.op, &adapted[..]) {
                (Op::Contract { spec }, [None, Some(own)]) => low_rank(spec, 1).map(|specs| (0, *own, specs)),
                (Op::Contract { spec }, [Some(own), None]) => low_rank(spec, 0).map(|specs| (1, *own, specs)),
                _ => None,
            };
            if let Some((x, own, specs)) = product {
                let x = rebuild.get(op.args[x]);
                rebuild.copy(op, self.program);
                let wide = rebuild.get(op.result());
                rebuild.new.set_name(wide, "");
                let sum = self.beside(&mut rebuild.new, op, (x, wide), own, specs);
                rebuild.new.set_name(sum, graph.name_of(op.result()));
                rebuild.set(op.result(), sum);
                continue;
            }
            let args: Vec<(Value, Option<&Factors>)> =
                op.args.iter().zip(adapted).map(|(&arg, own)| (rebuild.get(arg), own)).collect();
            let args: Vec<Value> = args
                .into_iter()
                .map(|(arg, own)| own.map_or(arg, |own| self.whole(&mut rebuild.new, op, arg, own)))
                .collect();
            rebuild.push(op, op.op.clone(), &args, self.program);
        }
        without_dead_ops(&rebuild.finish(), self.program)
    }

    /// The product `wide` of `x` with a weight, and beside it that with the weight's factors.
    fn beside(
        &self,
        graph: &mut Graph,
        op: &OpData,
        (x, wide): (Value, Value),
        own: &Factors,
        [down, up]: [String; 2],
    ) -> Value {
        let mut builder = Builder::new(graph, op.site.clone());
        let a = builder.read(own.a, &self.program.state(own.a).ty);
        let x = self.dropped(&mut builder, x);
        let narrow = builder.one(Op::Contract { spec: down }, &[x, a]);
        let narrow = self.scaled(&mut builder, narrow);
        let b = builder.read(own.b, &self.program.state(own.b).ty);
        let low = builder.one(Op::Contract { spec: up }, &[narrow, b]);
        builder.one(Op::Add {}, &[wide, low])
    }

    /// `W + (alpha / r) B A`.
    fn whole(&self, graph: &mut Graph, op: &OpData, weight: Value, own: &Factors) -> Value {
        let mut builder = Builder::new(graph, op.site.clone());
        let a = builder.read(own.a, &self.program.state(own.a).ty);
        let a = self.scaled(&mut builder, a);
        let b = builder.read(own.b, &self.program.state(own.b).ty);
        let low = builder.one(Op::Contract { spec: "or,ri->oi".into() }, &[b, a]);
        builder.one(Op::Add {}, &[weight, low])
    }

    /// What is left of `x`; the op's place in the graph tells its numbers from those of others.
    fn dropped(&self, builder: &mut Builder, x: Value) -> Value {
        if self.dropout == 0.0 {
            return x;
        }
        let stream = STREAM << 32 | builder.graph.len() as u64;
        builder.one(Op::Dropout { p: self.dropout, role: self.role.into(), stream }, &[x])
    }

    fn scaled(&self, builder: &mut Builder, value: Value) -> Value {
        let scale = builder.fill(self.scale, &builder.ty(value).dims);
        builder.one(Op::Mul {}, &[value, scale])
    }
}
