//! Derives the graphs that train a role: from every loss in the plan, its gradient and the optimizer's step.
//!
//! ```text
//! graph @loss(%x: f32[B, 4]) { ... return loss=%l }
//! update(model, loss(batch))
//!   =>  @model.loss.step                                   the whole batch in one call: loss, gradient, optimizer
//!   or  @model.loss.count.0, .grad, .finish and @model.apply  several micro-batches, or a sum of losses
//!       and @model.squares                                    in fp16, beside the update of another role
//! a call of a graph on more rows than a micro-batch has
//!   =>  @graph.count.0, .rows, .finish
//! ```
//!
//! `B` is the whole batch (D1): where it is larger than a micro-batch, or a held-out set, the graph is cut along it
//! (`split`) so that the numbers are those of the whole. Graphs that nothing calls any more go away.

mod backward;
mod batch;
mod dropout;
mod scale;
mod split;
mod update;
mod vjp;

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{self, CallSteps, Operand, Operands, Statement, Term, TermSteps, Training, Update, UpdateSteps};
use dsgc_ir::{Builder, DType, Graph, Op, Program, Site, StateId, StateKind, Type, Value};

use scale::Scale;
use update::Layers;

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass = Pass {
    name: "autodiff",
    requires: &[Fact::Typed, Fact::Adapted],
    provides: &[Fact::Differentiated],
    numerics: Numerics::Exact,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut derive = Derive::default();
    let mut plan = std::mem::take(&mut program.stage.plan);
    derive.statements(&mut program, &mut plan, None);
    program.stage.plan = plan;
    let mut evaluate = std::mem::take(&mut program.stage.evaluate);
    for evaluation in &mut evaluate {
        let micro = rows_of(&program, &evaluation.source).map_or(1, |r| r.micro);
        // How many rows are held out is not known: never taken for one call.
        derive.rows.insert(format!("{}.eval", evaluation.source), Rows { micro, batch: usize::MAX });
        derive.statements(&mut program, &mut evaluation.body, None);
    }
    program.stage.evaluate = evaluate;
    if !derive.errors.is_empty() {
        return Err(derive.errors);
    }
    let whole = derive.updates.values().filter(|derived| matches!(derived, Derived::Whole(_))).count();
    context.matched("loss with gradient and step in one graph", whole);
    context.matched("loss with gradients of parts of a batch", derive.updates.len() - whole);
    context.matched("step after the gradients of all parts", derive.applied.len());
    context.matched("call of all rows at once", derive.called.len());
    context.matched("call of parts of the rows", derive.calls.len());
    program.graphs.retain(|g| !derive.used.contains(&g.name) || derive.called.contains_key(&g.name));
    Ok(program)
}

/// What has been derived so far.
#[derive(Default)]
struct Derive {
    errors: Vec<Diag>,
    /// Graphs that have been taken apart.
    used: BTreeSet<String>,
    /// Graphs that are called as they are, with the most rows of any call.
    called: BTreeMap<String, usize>,
    /// Name of a value of the plan -> its rows.
    rows: BTreeMap<String, Rows>,
    /// Role, loss graph, weight and whether it is cut -> how the update runs.
    updates: BTreeMap<(String, String, u64, bool), Derived>,
    /// Graph, and whether its outputs with rows are wanted -> how it is called in parts.
    calls: BTreeMap<(String, bool), CallSteps>,
    /// Roles that step together with others.
    aligned: BTreeSet<String>,
    /// Role -> parameters that its `apply` graph updates.
    applied: BTreeMap<String, Layers>,
}

/// What became of a loss.
#[derive(Clone)]
enum Derived {
    Whole(String),
    Term(TermSteps),
}

/// Rows of a value of the plan: in a call of a graph, and in all.
#[derive(Clone, Copy, Debug)]
struct Rows {
    micro: usize,
    batch: usize,
}

impl Rows {
    fn fit(self) -> bool {
        self.batch <= self.micro
    }

    /// Rows of a part, where ranks with different rows share them.
    fn part(self, ranks: usize) -> usize {
        self.micro.min(self.batch.div_ceil(ranks))
    }
}

impl Derive {
    fn note<T>(&mut self, made: Result<T, Diag>) -> Option<T> {
        made.map_err(|error| self.errors.push(error)).ok()
    }

    fn statements(&mut self, program: &mut Program, plan: &mut [Statement], outer: Option<Rows>) {
        let aligned = aligned_roles(program, plan);
        for statement in plan {
            match statement {
                Statement::For { batch, rows, body } => {
                    let rows = match rows {
                        stage::Rows::Source(source) => rows_of(program, source),
                        stage::Rows::Minibatches { size, .. } => outer.map(|outer| Rows { batch: *size, ..outer }),
                    };
                    let rows = rows.unwrap_or(Rows { micro: 1, batch: 1 });
                    self.rows.insert(batch.clone(), rows);
                    self.statements(program, body, outer.or(Some(rows)));
                }
                Statement::Repeat { body, .. } => self.statements(program, body, outer),
                Statement::Call(call) => {
                    let rows = self.rows_in(&call.args);
                    if let (Some(name), Some(rows)) = (&call.name, rows) {
                        self.rows.insert(name.clone(), rows);
                    }
                    let made = self.call(program, &call.graph, rows, call.name.is_some());
                    call.steps = self.note(made);
                }
                Statement::Generate(generate) => {
                    let rows = self.rows_at(&generate.prompt).unwrap_or(Rows { micro: 1, batch: 1 });
                    let batch = rows.batch.saturating_mul(generate.samples);
                    self.rows.insert(generate.name.clone(), Rows { batch, ..rows });
                }
                Statement::Next { name, source } => {
                    if let Some(rows) = rows_of(program, source) {
                        self.rows.insert(name.clone(), rows);
                    }
                }
                Statement::Join { name, parts } => {
                    if let Some(rows) = parts.iter().find_map(|part| self.rows_at(part)) {
                        self.rows.insert(name.clone(), rows);
                    }
                }
                Statement::Recent { name, table, rows } => {
                    if let Some(of) = self.rows_at(table) {
                        self.rows.insert(name.clone(), Rows { batch: *rows, ..of });
                    }
                }
                Statement::Update(update) => {
                    let made = self.update(program, update, aligned.contains(&update.role));
                    update.steps = self.note(made);
                }
            }
        }
    }

    /// Rows of the value that a path leads into: of names with dots, the longest.
    fn rows_at(&self, path: &str) -> Option<Rows> {
        let mut name = path;
        loop {
            if let Some(rows) = self.rows.get(name) {
                return Some(*rows);
            }
            name = name.rsplit_once('.')?.0;
        }
    }

    /// Rows of a call with these operands.
    fn rows_in(&self, args: &Operands) -> Option<Rows> {
        let rows = args.iter().filter_map(|(_, operand)| match operand {
            Operand::Path(path) => self.rows_at(path),
            Operand::State(_) | Operand::Number(_) => None,
        });
        rows.max_by_key(|r| r.batch)
    }

    fn call(&mut self, program: &mut Program, name: &str, rows: Option<Rows>, wanted: bool) -> Result<CallSteps, Diag> {
        let graph = graph_named(program, name)?;
        let rows = rows.unwrap_or(Rows { micro: 1, batch: 1 });
        let ranks = program.mesh.data;
        if graph.batch.is_none() || (rows.fit() && ranks == 1) {
            return Ok(self.whole_call(program, name, rows));
        }
        let key = (name.to_string(), wanted);
        if let Some(steps) = self.calls.get(&key) {
            return Ok(steps.clone());
        }
        let mut graph = graph;
        limit_rows(&mut graph, rows.part(ranks));
        let parts = match split::call(program, &graph, wanted) {
            // Every rank does all of it.
            Err(_) if rows.fit() => return Ok(self.whole_call(program, name, rows)),
            parts => parts?,
        };
        let prefix = if wanted { name.to_string() } else { format!("{name}.totals") };
        let add = |program: &mut Program, graph: Graph, suffix: &str| add(program, graph, format!("{prefix}.{suffix}"));
        let count = parts.count.into_iter().enumerate();
        let steps = CallSteps::Split {
            count: count.map(|(i, g)| add(program, g, &format!("count.{i}"))).collect(),
            rows: add(program, parts.rows, "rows"),
            finish: parts.finish.map(|g| add(program, g, "finish")),
        };
        self.used.insert(name.to_string());
        self.calls.insert(key, steps.clone());
        Ok(steps)
    }

    /// A call of the graph as it is, on all rows.
    fn whole_call(&mut self, program: &mut Program, name: &str, rows: Rows) -> CallSteps {
        let most = self.called.entry(name.to_string()).or_default();
        *most = rows.batch.max(*most);
        if let Some(graph) = program.graphs.iter_mut().find(|g| g.name == name) {
            limit_rows(graph, *most);
        }
        CallSteps::Whole
    }

    fn update(&mut self, program: &mut Program, update: &Update, aligned: bool) -> Result<UpdateSteps, Diag> {
        let rows: Vec<Rows> =
            update.terms.iter().map(|t| self.rows_in(&t.args).unwrap_or(Rows { micro: 1, batch: 1 })).collect();
        if let ([term], [rows]) = (&update.terms[..], &rows[..])
            && term.weight == 1.0
            && rows.fit()
            && !aligned
            && program.mesh.data == 1
            && program.mesh.pipeline == 1
        {
            let Derived::Whole(step) = self.term(program, &update.role, term, *rows, false)? else {
                unreachable!("bug: a whole step of `{}` was cut", term.graph)
            };
            return Ok(UpdateSteps::Whole { step });
        }
        let mut terms = Vec::new();
        for (term, rows) in update.terms.iter().zip(rows) {
            if aligned {
                self.aligned.insert(update.role.clone());
            }
            match self.term(program, &update.role, term, rows, true) {
                Ok(Derived::Term(steps)) => terms.push(steps),
                Ok(Derived::Whole(_)) => unreachable!("bug: a part of `{}` was not cut", term.graph),
                Err(diag) if program.mesh.data > 1 => {
                    return Err(diag.help("ranks with different rows each compute a part: write `data: 1`"));
                }
                Err(diag) if program.mesh.pipeline > 1 => {
                    return Err(diag.help("ranks with different layers work on parts: write `pipeline: 1`"));
                }
                Err(diag) if aligned && rows.fit() => {
                    return Err(diag.help("with `align_overflow: false`, the batch is one call and needs no sums"));
                }
                Err(diag) => return Err(diag),
            }
        }
        let squares = aligned.then(|| format!("{}.squares", update.role));
        Ok(UpdateSteps::Split { terms, squares, apply: format!("{}.apply", update.role) })
    }

    /// The graphs of one loss.
    fn term(&mut self, program: &mut Program, role: &str, term: &Term, rows: Rows, cut: bool) -> Result<Derived, Diag> {
        let key = (role.to_string(), term.graph.clone(), term.weight.to_bits(), cut);
        if let Some(derived) = self.updates.get(&key) {
            return Ok(derived.clone());
        }
        let mut graph = dropout::live(&graph_named(program, &term.graph)?, program, role)?;
        let training = program.stage.trainings.iter().find(|t| t.role == role).cloned();
        let training = training
            .ok_or_else(|| Diag::error(format!("`update({role}, {}(..))` has no training settings", term.graph)))?;
        let loss = loss_of(&graph)?;
        let prefix = format!("{role}.{}", term.graph);
        let derived = if cut {
            limit_rows(&mut graph, rows.part(program.mesh.data));
            let parts = split::update(program, &graph, role, (loss, term.weight))?;
            // The same loss may stand in sums with several weights.
            let others = self.updates.keys().filter(|k| (&k.0, &k.1, k.3) == (&key.0, &key.1, true)).count();
            let prefix = if others == 0 { prefix } else { format!("{prefix}.{others}") };
            let count = parts.count.into_iter().enumerate();
            let steps = TermSteps {
                count: count.map(|(i, g)| add(program, g, format!("{prefix}.count.{i}"))).collect(),
                grad: add(program, parts.grad, format!("{prefix}.grad")),
                finish: add(program, parts.finish, format!("{prefix}.finish")),
            };
            self.apply(program, &training, parts.params);
            Derived::Term(steps)
        } else {
            limit_rows(&mut graph, rows.batch);
            let step = whole(program, &graph, &training, loss)?;
            Derived::Whole(add(program, step, format!("{prefix}.step")))
        };
        self.used.insert(graph.name);
        self.updates.insert(key, derived.clone());
        Ok(derived)
    }

    /// The role's `apply` graph, for all parameters that any loss so far gives a gradient; and where the role steps together
    /// with others, its `squares` graph.
    fn apply(&mut self, program: &mut Program, training: &Training, params: Layers) {
        let (name, squares) = (format!("{}.apply", training.role), format!("{}.squares", training.role));
        let all = self.applied.entry(training.role.clone()).or_default();
        all.extend(params);
        let all = &*all;
        program.graphs.retain(|g| g.name != name && g.name != squares);
        let mut graph = Graph::new(&name);
        let settings = update::inputs(&mut graph);
        let others = self.aligned.contains(&training.role).then(|| update::squares_of_others(&mut graph));
        let gradients = gradients_in_states(&mut graph, program, all);
        if others.is_some() {
            let mut own = Graph::new(&squares);
            let gradients = gradients_in_states(&mut own, program, all);
            let sum = update::squares(&mut own, program, &gradients, all);
            own.outputs.push((update::SQUARES.into(), sum));
            program.graphs.push(own);
        }
        update::append(&mut graph, program, training, settings, others, &gradients, all);
        for &param in all.keys() {
            let accumulator = update::companion(program, param, "grad", StateKind::Scratch);
            let state = program.state(param);
            let mut b = Builder::new(&mut graph, update::site(program, param, all));
            let zero = b.fill(0.0, &state.ty.dims);
            b.write(accumulator, &state.ty, zero);
        }
        program.graphs.push(graph);
    }
}

/// Reads the accumulators of parameters.
fn gradients_in_states(graph: &mut Graph, program: &mut Program, params: &Layers) -> BTreeMap<StateId, Value> {
    let read = |&param: &StateId| {
        let accumulator = update::companion(program, param, "grad", StateKind::Scratch);
        let mut b = Builder::new(graph, update::site(program, param, params));
        (param, b.read(accumulator, &program.state(param).ty))
    };
    params.keys().map(read).collect()
}

/// Roles in fp16 whose updates in this body stand beside each other, and step together.
fn aligned_roles(program: &Program, body: &[Statement]) -> BTreeSet<String> {
    let in_fp16 = |role: &str| Scale::belongs_to(program, role);
    let role = |statement: &Statement| match statement {
        Statement::Update(update) if program.stage.align_overflow && in_fp16(&update.role) => Some(update.role.clone()),
        _ => None,
    };
    let roles: Vec<Option<String>> = body.iter().map(role).collect();
    let beside = roles.windows(2).filter_map(|pair| match pair {
        [Some(a), Some(b)] if a != b => Some([a.clone(), b.clone()]),
        _ => None,
    });
    beside.flatten().collect()
}

/// Loss, gradient and optimizer in one graph.
fn whole(program: &mut Program, graph: &Graph, training: &Training, loss: Value) -> Result<Graph, Diag> {
    let mut rebuild = Rebuild::same(graph);
    let settings = update::inputs(&mut rebuild.new);
    for (_, op) in graph.ops() {
        rebuild.copy(op, program);
    }
    let outputs = scalar_outputs(graph);
    rebuild.new.outputs = outputs.into_iter().map(|(n, v)| (n, rebuild.get(v))).collect();
    let loss = rebuild.get(loss);
    let mut step = rebuild.new;
    let scale = Scale::of(program, &training.role);
    let one = scale::seed(&mut Builder::new(&mut step, Site::default()), scale, 1.0);
    let layers = update::layers(graph);
    let gradients = gradients_of_params(&mut step, program, &training.role, &[(loss, one)], &layers)?;
    update::append(&mut step, program, training, settings, None, &gradients, &layers);
    Ok(without_dead_ops(&step, program))
}

/// Appends the gradients of a role's trained parameters, from gradients of later values.
fn gradients_of_params(
    graph: &mut Graph,
    program: &Program,
    role: &str,
    seeds: &[(Value, Value)],
    layers: &Layers,
) -> Result<BTreeMap<StateId, Value>, Diag> {
    let reads: Vec<(StateId, Value)> = graph
        .ops()
        .filter_map(|(_, op)| match op.op {
            Op::Read { state } if is_trained(program, role, state) => Some((state, op.result())),
            _ => None,
        })
        .collect();
    let values: Vec<Value> = reads.iter().map(|r| r.1).collect();
    let found = backward::backward(graph, seeds, &values)?;
    let mut gradients: BTreeMap<StateId, Value> = BTreeMap::new();
    for ((state, _), gradient) in reads.into_iter().zip(found) {
        let Some(gradient) = gradient else { continue };
        let sum = match gradients.get(&state) {
            None => gradient,
            Some(&so_far) => {
                Builder::new(graph, update::site(program, state, layers)).one(Op::Add {}, &[so_far, gradient])
            }
        };
        gradients.insert(state, sum);
    }
    if gradients.is_empty() {
        return Err(Diag::error(format!("the loss of `{role}` depends on none of its trained parameters")));
    }
    Ok(gradients)
}

/// Whether an update of the role trains this parameter.
fn is_trained(program: &Program, role: &str, state: StateId) -> bool {
    let state = program.state(state);
    let of_role = state.name.strip_prefix(role).is_some_and(|rest| rest.starts_with('/'));
    of_role && state.kind == StateKind::Param { trained: true }
}

fn graph_named(program: &Program, name: &str) -> Result<Graph, Diag> {
    program.graph(name).cloned().ok_or_else(|| Diag::error(format!("the plan calls `{name}`, which is no graph")))
}

/// Adds a graph under a name, which it gives back.
fn add(program: &mut Program, mut graph: Graph, name: String) -> String {
    graph.name.clone_from(&name);
    program.graphs.push(graph);
    name
}

fn rows_of(program: &Program, source: &str) -> Option<Rows> {
    let source = program.stage.sources.iter().find(|s| s.name == source)?;
    Some(Rows { micro: source.micro_batch_size, batch: source.batch_size })
}

/// Plans for this many rows per call, or for more where another call has more.
fn limit_rows(graph: &mut Graph, rows: usize) {
    let (batch, factor) = (graph.batch.clone(), graph.rows_of_batch());
    if let Some(range) = graph.dims.iter_mut().find(|d| Some(&d.symbol) == batch.as_ref()) {
        (range.min, range.max) = (0, rows.div_ceil(factor) as i64);
    }
}

/// Outputs that are one number: what an update or evaluation reports.
fn scalar_outputs(graph: &Graph) -> Vec<(String, Value)> {
    graph.outputs.iter().filter(|(_, v)| *graph.ty(*v) == Type::scalar(DType::F32)).cloned().collect()
}

fn loss_of(graph: &Graph) -> Result<Value, Diag> {
    let place = |v: Value| graph.def(v).map_or(Span::NONE, |d| graph.op(d).site.loc.span);
    match graph.outputs.iter().find(|(name, _)| name == "loss") {
        None => Err(Diag::error(format!("`{}` has no output `loss`, which `update` needs", graph.name))),
        Some(&(_, v)) if *graph.ty(v) != Type::scalar(DType::F32) => {
            let ty = graph.ty(v);
            let diag = Diag::error(format!("found {ty} as the loss of `{}`, expected one number", graph.name));
            Err(diag.label(place(v), "").help("take its `mean`"))
        }
        Some(&(_, v)) => Ok(v),
    }
}
