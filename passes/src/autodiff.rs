//! Derives the graphs that train a role: from every loss in the plan, its gradient and the optimizer's step.
//!
//! ```text
//! graph @loss(%x: f32[B, 4]) { ... return loss=%l }
//! update(model, loss(batch))
//!   =>  @model.loss.step                                   the whole batch in one call: loss, gradient, optimizer
//!   or  @model.loss.count, .grad, .finish and @model.apply  several micro-batches
//! evaluate loss
//!   =>  @loss.sums, @loss.finish
//! ```
//!
//! `B` is the optimizer batch (D1): where it is larger than a micro-batch, or a held-out set, the graph is cut along
//! it (`split`) so that the numbers are those of the whole. Loss graphs themselves go away: nothing calls them.

mod backward;
mod batch;
mod split;
mod update;
mod vjp;

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{EvaluateSteps, Statement, Training, Update, UpdateSteps};
use dsgc_ir::{Builder, DType, Graph, Op, Program, Site, StateId, StateKind, Type, Value};

use update::Layers;

use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::{Rebuild, without_dead_ops};

/// The pass.
pub const PASS: Pass = Pass {
    name: "autodiff",
    requires: &[Fact::Typed],
    provides: &[Fact::Differentiated],
    numerics: Numerics::Exact,
    run,
};

/// Runs the pass.
pub fn run(mut program: Program, _: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut derive =
        Derive { errors: Vec::new(), used: BTreeSet::new(), updates: BTreeMap::new(), applied: BTreeMap::new() };
    let mut plan = std::mem::take(&mut program.stage.plan);
    derive.statements(&mut program, &mut plan, None);
    program.stage.plan = plan;
    let mut evaluate = std::mem::take(&mut program.stage.evaluate);
    for call in &mut evaluate {
        let made = derive.evaluate(&mut program, &call.graph, &call.source);
        call.steps = derive.note(made);
    }
    program.stage.evaluate = evaluate;
    if !derive.errors.is_empty() {
        return Err(derive.errors);
    }
    program.graphs.retain(|g| !derive.used.contains(&g.name));
    Ok(program)
}

/// What has been derived so far.
struct Derive {
    errors: Vec<Diag>,
    /// Graphs that have been taken apart.
    used: BTreeSet<String>,
    /// Role and loss graph -> how the update runs.
    updates: BTreeMap<(String, String), UpdateSteps>,
    /// Role -> parameters that its `apply` graph updates.
    applied: BTreeMap<String, Layers>,
}

/// Rows per call and per optimizer step of the batches that an update sees.
#[derive(Clone, Copy)]
struct Rows {
    micro: usize,
    batch: usize,
}

impl Derive {
    fn note<T>(&mut self, made: Result<T, Diag>) -> Option<T> {
        made.map_err(|error| self.errors.push(error)).ok()
    }

    fn statements(&mut self, program: &mut Program, plan: &mut [Statement], rows: Option<Rows>) {
        for statement in plan {
            match statement {
                Statement::For { source, body, .. } => {
                    let rows = rows_of(program, source).or(rows);
                    self.statements(program, body, rows);
                }
                Statement::Repeat { body, .. } => self.statements(program, body, rows),
                Statement::Update(update) => {
                    let made = self.update(program, update, rows);
                    update.steps = self.note(made);
                }
            }
        }
    }

    fn update(&mut self, program: &mut Program, update: &Update, rows: Option<Rows>) -> Result<UpdateSteps, Diag> {
        let key = (update.role.clone(), update.graph.clone());
        if let Some(steps) = self.updates.get(&key) {
            return Ok(steps.clone());
        }
        let mut graph = graph_named(program, &update.graph)?;
        let training = program.stage.trainings.iter().find(|t| t.role == update.role).cloned();
        let training = training.ok_or_else(|| {
            Diag::error(format!("`update({}, {}(..))` has no training settings", update.role, update.graph))
        })?;
        let loss = loss_of(&graph)?;
        let rows = rows.unwrap_or(Rows { micro: 1, batch: 1 });
        let steps = if rows.batch <= rows.micro {
            limit_rows(&mut graph, rows.batch);
            let step = named(whole(program, &graph, &training, loss)?, format!("{}.{}.step", update.role, graph.name));
            let name = step.name.clone();
            program.graphs.push(step);
            UpdateSteps::Whole { step: name }
        } else {
            limit_rows(&mut graph, rows.micro);
            let parts = split::update(program, &graph, &update.role, loss)?;
            let prefix = format!("{}.{}", update.role, graph.name);
            let add = |program: &mut Program, graph, suffix: &str| {
                let graph = named(graph, format!("{prefix}.{suffix}"));
                let name = graph.name.clone();
                program.graphs.push(graph);
                name
            };
            let count = parts.count.map(|g| add(program, g, "count"));
            let grad = add(program, parts.grad, "grad");
            let finish = add(program, parts.finish, "finish");
            let apply = self.apply(program, &training, parts.params);
            UpdateSteps::Split { count, grad, finish, apply }
        };
        self.used.insert(graph.name);
        self.updates.insert(key, steps.clone());
        Ok(steps)
    }

    /// The role's `apply` graph, for all parameters that any loss so far gives a gradient.
    fn apply(&mut self, program: &mut Program, training: &Training, params: Layers) -> String {
        let name = format!("{}.apply", training.role);
        let all = self.applied.entry(training.role.clone()).or_default();
        all.extend(params);
        let all = &*all;
        program.graphs.retain(|g| g.name != name);
        let mut graph = Graph::new(&name);
        let settings = update::inputs(&mut graph);
        let mut gradients = BTreeMap::new();
        for &param in all.keys() {
            let accumulator = update::companion(program, param, "grad");
            let mut b = Builder::new(&mut graph, update::site(program, param, all));
            gradients.insert(param, b.read(accumulator, &program.state(param).ty));
        }
        update::append(&mut graph, program, training, settings, &gradients, all);
        for &param in all.keys() {
            let accumulator = update::companion(program, param, "grad");
            let state = program.state(param);
            let mut b = Builder::new(&mut graph, update::site(program, param, all));
            let zero = b.fill(0.0, &state.ty.dims);
            b.write(accumulator, &state.ty, zero);
        }
        program.graphs.push(graph);
        name
    }

    fn evaluate(&mut self, program: &mut Program, name: &str, source: &str) -> Result<EvaluateSteps, Diag> {
        let steps = EvaluateSteps { sums: format!("{name}.sums"), finish: format!("{name}.finish") };
        if program.graph(&steps.sums).is_some() {
            return Ok(steps);
        }
        let mut graph = graph_named(program, name)?;
        limit_rows(&mut graph, rows_of(program, source).map_or(1, |r| r.micro));
        let (sums, finish) = split::evaluate(program, &graph)?;
        program.graphs.extend([named(sums, steps.sums.clone()), named(finish, steps.finish.clone())]);
        self.used.insert(graph.name);
        Ok(steps)
    }
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
    let one = Builder::new(&mut step, Site::default()).fill(1.0, &[]);
    let layers = update::layers(graph);
    let gradients = gradients_of_params(&mut step, program, &training.role, &[(loss, one)], &layers)?;
    update::append(&mut step, program, training, settings, &gradients, &layers);
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

fn named(mut graph: Graph, name: String) -> Graph {
    graph.name = name;
    graph
}

fn rows_of(program: &Program, source: &str) -> Option<Rows> {
    let source = program.stage.sources.iter().find(|s| s.name == source)?;
    Some(Rows { micro: source.micro_batch_size, batch: source.batch_size })
}

/// Plans for this many rows per call.
fn limit_rows(graph: &mut Graph, rows: usize) {
    let batch = graph.batch.clone();
    if let Some(range) = graph.dims.iter_mut().find(|d| Some(&d.symbol) == batch.as_ref()) {
        (range.min, range.max) = (0, rows as i64);
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
