//! Derives the graphs that generate text: from a model's forward graph over whole sequences, one that takes some new
//! columns and finds the keys and values of earlier ones in states.
//!
//! ```text
//! graph @actor.forward(%tokens: i32[B, T], %segment: i32[B, T]) { ... return logits=%l }
//! generate(actor, prompts)
//!   =>  @actor.prefill  T up to the prompt's width     @actor.step  T = 1
//! %y, %d = attention %q, %k, %v, %segment causal=true
//!   =>  %cache = write_at (read @cache/actor/0.k), %k, %place; ...; %y = cached_attention %q, %cache, ...
//! ```
//!
//! `segment` is that of all columns in both graphs, so that places inside texts and masks are those of the whole. Ops
//! must work on each column alone (D27); causal attention and `position_in` are the only ones that look at others.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;
use dsgc_ir::infer::Contraction;
use dsgc_ir::stage::{Generate, GenerateSteps, Rows, Statement};
use dsgc_ir::{Class, DType, Dim, DimRange, Graph, Op, OpData, Program, Site, StateId, StateKind, Symbol, Type, Value};

use crate::infer::with_dims;
use crate::pipeline::{Fact, Numerics, Pass, PassContext};

/// The pass. It adds graphs and leaves all others as they are.
pub const PASS: Pass =
    Pass { name: "decode", requires: &[Fact::Typed, Fact::Adapted], provides: &[], numerics: Numerics::Exact, run };

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut stage = std::mem::take(&mut program.stage);
    let mut derive = Derive::default();
    for source in &stage.sources {
        derive.batches.insert(format!("{}.eval", source.name), source.batch_size);
    }
    derive.sources = stage.sources.iter().map(|source| (source.name.clone(), source.batch_size)).collect();
    derive.statements(&mut program, &mut stage.plan);
    for evaluation in &mut stage.evaluate {
        derive.statements(&mut program, &mut evaluation.body);
    }
    program.stage = stage;
    for (_, steps) in &derive.done {
        for name in [&steps.prefill, &steps.step] {
            let ops = program.graph(name).into_iter().flat_map(Graph::ops);
            let cached = ops.filter(|(_, op)| matches!(op.op, Op::CachedAttention { .. })).count();
            context.matched(&format!("attention to a cache in @{name}"), cached);
        }
    }
    program.graphs.retain(|g| !derive.done.iter().any(|(generate, _)| generate.forward == g.name));
    if derive.errors.is_empty() { Ok(program) } else { Err(derive.errors) }
}

/// What has been derived so far.
#[derive(Default)]
struct Derive {
    done: Vec<(Generate, GenerateSteps)>,
    errors: Vec<Diag>,
    /// Rows of the batches of a source.
    sources: BTreeMap<String, usize>,
    /// Rows of the batches of the plan by their names; of held-out rows, as many are taken at once.
    batches: BTreeMap<String, usize>,
}

impl Derive {
    fn statements(&mut self, program: &mut Program, body: &mut [Statement]) {
        for statement in body {
            match statement {
                Statement::For { batch, rows: Rows::Source(source), body } => {
                    self.bind(batch, source);
                    self.statements(program, body);
                }
                Statement::For { body, .. } | Statement::Repeat { body, .. } => self.statements(program, body),
                Statement::Next { name, source } => self.bind(name, source),
                Statement::Generate(generate) => {
                    generate.rows = self.rows_of_call(generate, program.mesh.data);
                    match self.generate(program, generate) {
                        Ok(steps) => generate.steps = Some(steps),
                        Err(diag) if self.errors.contains(&diag) => {}
                        Err(diag) => self.errors.push(diag),
                    }
                }
                _ => {}
            }
        }
    }

    /// Notes that a name of the plan is a batch of a source.
    fn bind(&mut self, name: &str, source: &str) {
        self.batches.extend(self.sources.get(source).map(|&rows| (name.to_string(), rows)));
    }

    /// Rows of a call, no more than each of the ranks with different rows has of a batch.
    fn rows_of_call(&self, generate: &Generate, ranks: usize) -> usize {
        let batch = generate.prompt.rsplit_once('.').and_then(|(batch, _)| self.batches.get(batch));
        match batch {
            Some(rows) if ranks > 1 => generate.rows.min(rows.div_ceil(ranks)),
            _ => generate.rows,
        }
    }

    fn generate(&mut self, program: &mut Program, generate: &Generate) -> Result<GenerateSteps, Diag> {
        let equal = |g: &Generate| {
            (&g.forward, g.prompt_width, g.max_new_tokens, g.rows, g.sampling)
                == (&generate.forward, generate.prompt_width, generate.max_new_tokens, generate.rows, generate.sampling)
        };
        if let Some((_, steps)) = self.done.iter().find(|(g, _)| equal(g)) {
            return Ok(steps.clone());
        }
        let forward = program.graph(&generate.forward).cloned();
        let forward = forward.ok_or_else(|| {
            Diag::error(format!("`generate({})` runs `{}`, which is no graph", generate.role, generate.forward))
        })?;
        let others = self.done.iter().filter(|(g, _)| g.role == generate.role).count();
        let suffix = if others == 0 { String::new() } else { format!(".{others}") };
        let model = Model::new(&forward)?;
        let mut add = |what: &str, new: usize| {
            let mut graph = model.decode(program, generate, new)?;
            graph.name = format!("{}.{what}{suffix}", generate.role);
            let name = graph.name.clone();
            program.graphs.push(graph);
            Ok(name)
        };
        let (prefill, step) = (add("prefill", generate.prompt_width)?, add("step", 1)?);
        let steps = GenerateSteps { gather: None, prefill, step };
        self.done.push((generate.clone(), steps.clone()));
        Ok(steps)
    }
}

/// A forward graph that works on each column alone but for causal attention.
struct Model<'a> {
    graph: &'a Graph,
    tokens: Value,
    segment: Value,
    logits: Value,
    /// The dim of columns.
    columns: Symbol,
}

impl<'a> Model<'a> {
    fn new(graph: &'a Graph) -> Result<Model<'a>, Diag> {
        let wrong = |what: &str| Diag::error(format!("`{}` cannot generate: {what}", graph.name));
        let input = |name: &str| graph.input_named(name).ok_or_else(|| wrong(&format!("it has no input `{name}`")));
        let (tokens, segment) = (input("tokens")?, input("segment")?);
        let logits = graph.output_named("logits").ok_or_else(|| wrong("it has no output `logits`"))?;
        let columns = graph.ty(tokens).dims.get(1).and_then(Dim::as_symbol).cloned();
        let columns = columns.ok_or_else(|| wrong("its tokens are no rows of columns"))?;
        let model = Model { graph, tokens, segment, logits, columns };
        if model.axis(logits) != Some(1) || graph.ty(logits).rank() != 3 {
            return Err(wrong(&format!("its logits are {}, expected one row of scores per token", graph.ty(logits))));
        }
        for (_, op) in graph.ops() {
            model.check(op).map_err(|why| {
                let name = op.op.name();
                Diag::error(format!("`{name}` {why}, so `generate` cannot run this model column by column"))
                    .label(op.site.loc.span, format!("in `{name}` here"))
                    .help("along the tokens, a model that generates may use causal `attention`, `position_in`, and what works on each token alone")
            })?;
        }
        Ok(model)
    }

    /// The axis that counts columns.
    fn axis(&self, value: Value) -> Option<usize> {
        self.graph.ty(value).dims.iter().position(|d| d.as_symbol() == Some(&self.columns))
    }

    /// What is wrong with an op that looks at other columns.
    fn check(&self, op: &OpData) -> Result<(), &'static str> {
        let mentions = |v: Value| self.graph.ty(v).dims.iter().any(|d| d.mentions(&self.columns));
        let axes: Vec<Option<usize>> = op.args.iter().map(|&a| self.axis(a)).collect();
        let odd = |v: Value| mentions(v) && self.axis(v).is_none();
        if op.results().chain(op.args.iter().copied()).any(odd) {
            return Err("mixes the columns of a sequence with another dim");
        }
        if !op.args.iter().any(|&a| mentions(a)) {
            // Nothing of it depends on columns, or it stretches over them.
            let made = op.results().any(mentions) || op.op.dims().iter().any(|d| d.mentions(&self.columns));
            return match op.op {
                _ if !made => Ok(()),
                Op::Broadcast { .. } => Ok(()),
                _ => Err("counts the columns of a sequence"),
            };
        }
        let along = |axis: usize| axes[0] == Some(axis);
        let last = |i: usize| axes[i].is_some() && axes[i] == self.graph.ty(op.args[i]).rank().checked_sub(1);
        const MIXES: &str = "looks at several columns of a sequence";
        let fits = match &op.op {
            Op::Attention { causal, .. } => {
                let divisor = op.results().nth(1).expect("attention has two results");
                let used = self.graph.ops().any(|(_, o)| o.args.contains(&divisor));
                if !causal {
                    return Err("looks at later columns");
                }
                if op.args[3] != self.segment {
                    return Err("has a mask of its own");
                }
                !used && !self.graph.outputs.iter().any(|(_, v)| *v == divisor)
            }
            Op::PositionIn {} => op.args[0] == self.segment,
            Op::Slice { axis, .. }
            | Op::Pad { axis, .. }
            | Op::Concat { axis }
            | Op::Cumsum { axis, .. }
            | Op::Recurrence { axis, .. }
            | Op::SliceAt { axis, .. }
            | Op::WriteAt { axis } => !along(*axis),
            Op::ReduceSum { axes: gone } | Op::ReduceMax { axes: gone } | Op::ReduceMin { axes: gone } => {
                axes[0].is_none_or(|axis| !gone.contains(&axis))
            }
            Op::Contract { spec } => {
                let labels = Contraction::parse(spec).expect("verified ops have readable specs");
                let letter = |side: &[char], axis: Option<usize>| axis.map(|a| side[a]);
                match (letter(&labels.lhs, axes[0]), letter(&labels.rhs, axes[1])) {
                    (Some(a), Some(b)) if a != b => false,
                    (a, b) => a.or(b).is_none_or(|c| labels.out.contains(&c)),
                }
            }
            Op::LayerNorm { .. } | Op::RmsNorm { .. } | Op::TokenLogp {} => !last(0),
            Op::Embed {} => axes[0].is_none(),
            Op::Rope { .. } | Op::Reshape { .. } | Op::Transpose { .. } | Op::Broadcast { .. } | Op::Stop {} => true,
            Op::Dropout { .. } => true,
            op if op.class() == Class::Elementwise => true,
            _ => false,
        };
        if fits { Ok(()) } else { Err(MIXES) }
    }

    /// The graph for up to `new` columns at a place; for one, exactly one.
    fn decode(&self, program: &mut Program, generate: &Generate, new: usize) -> Result<Graph, Diag> {
        let (rows, all) = (generate.rows as i64, (generate.prompt_width + generate.max_new_tokens) as i64);
        let mut with = BTreeMap::new();
        if let Some(symbol) = self.graph.ty(self.tokens).dims[0].as_symbol() {
            with.insert(symbol.clone(), Dim::from(rows));
        }
        let mut graph = Graph::new("");
        if new == 1 {
            with.insert(self.columns.clone(), Dim::from(1i64));
        } else {
            graph.dims = vec![DimRange { symbol: self.columns.clone(), min: 1, max: new as i64 }];
        }
        let columns = Dim::symbol(&self.columns).substitute(&with);
        let rows_of = |dtype, dims: &[Dim]| Type::new(dtype, [&[Dim::from(rows)], dims].concat());
        let tokens = graph.input("tokens", rows_of(DType::I32, std::slice::from_ref(&columns)));
        let segment = graph.input("segment", rows_of(DType::I32, &[Dim::from(all)]));
        let place = graph.input("place", Type::scalar(DType::I32));
        let key = graph.input("key", Type::scalar(DType::Key));
        let row = graph.input("row", rows_of(DType::I32, &[]));
        let mut map: BTreeMap<Value, Value> = BTreeMap::from([(self.tokens, tokens)]);
        let mut push = |op: Op, args: &[Value], site: &Site| one(&mut graph, op, args, None, site);
        let own = push(Op::SliceAt { axis: 1, len: columns.clone() }, &[segment, place], &Site::default());
        map.insert(self.segment, own);
        let mut layer = 0;
        for (_, op) in self.graph.ops() {
            let site = &op.site;
            match &op.op {
                Op::Attention { scale, window, .. } => {
                    let cached = |suffix: &str, value: Value, graph: &mut Graph, program: &mut Program| {
                        let new = map[&value];
                        let dims = &graph.ty(new).dims;
                        let dims = [&[Dim::from(rows), Dim::from(all)], &dims[2..]].concat();
                        let ty = Type::new(graph.ty(new).dtype, dims);
                        let state = cache(program, &generate.role, &format!("{layer}.{suffix}"), &ty, site);
                        let old = one(graph, Op::Read { state }, &[], Some(&ty), site);
                        let whole = one(graph, Op::WriteAt { axis: 1 }, &[old, new, place], None, site);
                        graph
                            .try_push(Op::Write { state }, &[whole], Some(&ty), site.clone())
                            .unwrap_or_else(|why| panic!("bug: the cache of `{}`: {why}", generate.forward));
                        whole
                    };
                    let k = cached("k", op.args[1], &mut graph, program);
                    let v = cached("v", op.args[2], &mut graph, program);
                    let q = map[&op.args[0]];
                    let attended = Op::CachedAttention { scale: *scale, window: *window };
                    let slopes = op.args.get(4).map(|slopes| map[slopes]);
                    let operands: Vec<Value> = [q, k, v, segment, place].into_iter().chain(slopes).collect();
                    let result = op.results().next().expect("attention has two results");
                    map.insert(result, one(&mut graph, attended, &operands, None, site));
                    layer += 1;
                }
                Op::PositionIn {} => {
                    let whole = one(&mut graph, Op::PositionIn {}, &[segment], None, site);
                    let cut = Op::SliceAt { axis: 1, len: columns.clone() };
                    map.insert(op.result(), one(&mut graph, cut, &[whole, place], None, site));
                }
                other => {
                    let args: Vec<Value> = op.args.iter().map(|a| map[a]).collect();
                    let state = match other {
                        Op::Read { state } => Some(program.state(*state).ty.clone()),
                        _ => None,
                    };
                    let id = graph.try_push(with_dims(other, &with), &args, state.as_ref(), site.clone());
                    let id = id.unwrap_or_else(|why| panic!("bug: `{other}` of `{}`: {why}", generate.forward));
                    let results: Vec<Value> = graph.op(id).results().collect();
                    for (old, new) in op.results().zip(results) {
                        graph.set_name(new, self.graph.name_of(old));
                        map.insert(old, new);
                    }
                }
            }
        }
        let site = Site::default();
        let scores = map[&self.logits];
        let last = Op::Slice { axis: 1, start: &columns - &Dim::from(1i64), end: columns.clone() };
        let column = one(&mut graph, last, &[scores], None, &site);
        let vocabulary = graph.ty(column).dims[2].clone();
        let logits = one(&mut graph, Op::Reshape { shape: vec![Dim::from(rows), vocabulary] }, &[column], None, &site);
        let dsgc_ir::stage::Sampling { temperature, top_k, top_p } = generate.sampling;
        let sample = Op::Sample { temperature, top_k, top_p };
        let token = one(&mut graph, sample, &[logits, key, row, place], None, &site);
        graph.outputs = vec![("token".into(), token), ("logits".into(), logits)];
        Ok(graph)
    }
}

/// The state that holds keys or values of a layer; one of another shape gets another name.
fn cache(program: &mut Program, role: &str, name: &str, ty: &Type, site: &Site) -> StateId {
    for n in 0.. {
        let owner = if n == 0 { role.to_string() } else { format!("{role}.{n}") };
        let name = format!("cache/{owner}/{name}");
        match program.state_named(&name) {
            Some(id) if program.state(id).ty == *ty => return id,
            Some(_) => {}
            None => return program.declare(name, ty.clone(), StateKind::Generation, site.loc.span),
        }
    }
    unreachable!("there are fewer shapes than numbers")
}

/// Pushes an op with one result.
fn one(graph: &mut Graph, op: Op, args: &[Value], state: Option<&Type>, site: &Site) -> Value {
    let name = op.name();
    match graph.try_push(op, args, state, site.clone()) {
        Ok(id) => graph.op(id).result(),
        Err(why) => panic!("bug: `{name}` in a graph that generates: {why}"),
    }
}
