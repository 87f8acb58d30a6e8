//! Joins a call with the updates that follow on the same rows into one graph, where that saves work.
//!
//! ```text
//! exp: experience(rollout)              scores the rollout with the actor
//! for mini in minibatches(exp.rows, n)  all rows are one minibatch
//!   update(actor, actor_loss(mini))     begins with the very pass that scored it
//!   =>  @experience.joined              both, with that pass once
//! ```
//!
//! In PPO the first inner step sees weights that are those of the scoring, so its forward pass is the scoring's: the
//! joined graph has the activations that the gradient needs when the scores are there, and the ratio is exactly 1. The
//! graphs are only put one behind the other, with outputs of the first as inputs of the second; equal ops are merged by
//! `canonicalize`. So the pass knows of no algorithm, and dropout, which differs between the two, keeps them apart.

use std::collections::{BTreeMap, BTreeSet};

use dsgc_ir::cost::graph_time;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Call, CallSteps, Joined, Operand, Rows, Statement, Update, UpdateSteps};
use dsgc_ir::{Dim, Graph, Op, Program, StateId, Symbol, Type, Value};

use crate::canonicalize;
use crate::infer::with_dims;
use crate::pipeline::{Fact, Numerics, Pass, PassContext};
use crate::rebuild::without_dead_ops;

/// The pass. It adds graphs and leaves all others as they are.
pub const PASS: Pass =
    Pass { name: "join_updates", requires: &[Fact::Differentiated], provides: &[], numerics: Numerics::Exact, run };

/// A joined graph is taken if it saves this share of the work at least: it has a longer life of activations.
const WORTH: f64 = 0.05;

/// Runs the pass.
pub fn run(mut program: Program, context: &PassContext) -> Result<Program, Vec<Diag>> {
    let mut plan = std::mem::take(&mut program.stage.plan);
    statements(&mut program, &mut plan, context);
    program.stage.plan = plan;
    Ok(program)
}

fn statements(program: &mut Program, body: &mut [Statement], context: &PassContext) {
    for at in 0..body.len() {
        let (before, after) = body.split_at_mut(at + 1);
        match &mut before[at] {
            Statement::For { body, .. } | Statement::Repeat { body, .. } => statements(program, body, context),
            Statement::Call(call) if call.steps == Some(CallSteps::Whole) && !call.cached => {
                if let Some(joined) = after.first().and_then(|next| join(program, call, next, context)) {
                    call.steps = Some(CallSteps::Joined(joined));
                }
            }
            _ => {}
        }
    }
}

/// A loop over the rows of a call.
struct Minibatches<'a> {
    /// Name of a minibatch.
    batch: &'a str,
    /// The member of the call's record that is cut.
    table: &'a str,
    size: usize,
    /// The member that says which rows take part.
    keep: Option<&'a str>,
    body: &'a [Statement],
}

impl<'a> Minibatches<'a> {
    /// What runs first, if it is such a loop over the record `of`.
    fn first(next: &'a Statement, of: &str) -> Option<Minibatches<'a>> {
        match next {
            Statement::Repeat { times: 1.., body } => Minibatches::first(body.first()?, of),
            Statement::For { batch, rows: Rows::Minibatches { table, size, keep, .. }, body } => {
                let keep = match keep {
                    Some(path) => Some(member(path, of)?),
                    None => None,
                };
                Some(Minibatches { batch, table: member(table, of)?, size: *size, keep, body })
            }
            _ => None,
        }
    }

    /// The call's output that a minibatch has under this path.
    fn output(&self, path: &str) -> Option<String> {
        Some(format!("{}.{}", self.table, member(path, self.batch)?))
    }
}

/// The rest of a path into the record `of`.
fn member<'a>(path: &'a str, of: &str) -> Option<&'a str> {
    path.strip_prefix(of)?.strip_prefix('.')
}

fn join(program: &mut Program, call: &Call, next: &Statement, context: &PassContext) -> Option<Joined> {
    let rows = Minibatches::first(next, call.name.as_deref()?)?;
    let graph = program.graph(&call.graph)?.clone();
    let most = graph.dim_range(graph.batch.as_ref()?)?.max;
    if usize::try_from(most).ok()?.saturating_mul(graph.rows_of_batch()) > rows.size
        || graph.ops().any(|(_, op)| matches!(op.op, Op::Write { .. }))
    {
        return None;
    }
    let keep = match rows.keep {
        None => None,
        Some(output) => Some(keep_graph(&graph, program, output)?),
    };
    let (mut parts, mut updates): (Vec<Part>, Vec<Update>) = (Vec::new(), Vec::new());
    for statement in rows.body {
        let Statement::Update(update) = statement else { break };
        let Some(part) = Part::new(program, &graph, update, &rows) else { break };
        // Every read gives the value when the graph begins.
        if parts.iter().any(|earlier| !earlier.writes().is_disjoint(&part.reads())) {
            break;
        }
        parts.push(part);
        updates.push(update.clone());
    }
    if updates.is_empty() {
        return None;
    }
    let joined = canonicalize::of_graph(&build(&graph, &parts, program), program);
    let time = |g: &Graph| graph_time(g, &g.upper_bounds()).unwrap_or(u64::MAX);
    let apart = parts.iter().map(|part| time(&part.step)).fold(time(&graph), u64::saturating_add);
    let together = time(&joined);
    let saved = 1.0 - together as f64 / apart as f64;
    if saved < WORTH {
        return None;
    }
    let roles: Vec<&str> = updates.iter().map(|u| u.role.as_str()).collect();
    context.matched("calls joined with the updates after them", 1);
    context.changed(format!(
        "@{} and the updates of {} in one graph: {:.0} % of their time by the cost model",
        call.graph,
        roles.join(" and "),
        100.0 * (1.0 - saved)
    ));
    let graph = joined.name.clone();
    program.graphs.push(joined);
    let keep = keep.map(|graph| {
        let name = graph.name.clone();
        program.graphs.push(graph);
        name
    });
    Some(Joined { graph, keep, updates })
}

/// The part of a graph that says which rows take part; `None` if that takes a model.
fn keep_graph(graph: &Graph, program: &Program, output: &str) -> Option<Graph> {
    let mut keep = graph.clone();
    keep.name = format!("{}.keep", graph.name);
    keep.outputs = vec![("keep".into(), graph.output_named(output)?)];
    let keep = without_dead_ops(&keep, program);
    let needs_model = keep.ops().any(|(_, op)| matches!(op.op, Op::Read { .. }));
    if needs_model { None } else { Some(keep) }
}

/// An update that follows a call.
struct Part {
    /// Its graph.
    step: Graph,
    /// Its inputs that the call gives, and the call's value.
    given: BTreeMap<Value, Value>,
    /// Its dims in those of the call.
    dims: BTreeMap<Symbol, Dim>,
}

impl Part {
    /// `None` where the update is not one call, draws numbers for dropout, or has dims that the call does not know.
    fn new(program: &Program, call: &Graph, update: &Update, rows: &Minibatches) -> Option<Part> {
        let (Some(UpdateSteps::Whole { step }), [term]) = (&update.steps, &update.terms[..]) else { return None };
        let step = program.graph(step)?.clone();
        let mut part = Part { given: BTreeMap::new(), dims: BTreeMap::new(), step };
        for input in part.step.inputs() {
            let name = part.step.name_of(input);
            if name.starts_with("dropout.") {
                return None;
            }
            let path = term.args.iter().find_map(|(of, operand)| match operand {
                Operand::Path(path) if of == name => Some(path),
                _ => None,
            });
            let Some(value) = path.and_then(|path| call.output_named(&rows.output(path)?)) else { continue };
            part.given.insert(input, value);
            for (dim, of_call) in part.step.ty(input).dims.iter().zip(&call.ty(value).dims) {
                if let Some(symbol) = dim.as_symbol() {
                    part.dims.entry(symbol.clone()).or_insert_with(|| of_call.clone());
                }
            }
        }
        let same = |(&input, &value): (&Value, &Value)| {
            let ty = part.step.ty(input);
            let dims: Vec<Dim> = ty.dims.iter().map(|d| d.substitute(&part.dims)).collect();
            Type::new(ty.dtype, dims) == *call.ty(value)
        };
        let known = part.step.dims.iter().all(|d| part.dims.contains_key(&d.symbol));
        (known && part.given.iter().all(same)).then_some(part)
    }

    fn reads(&self) -> BTreeSet<StateId> {
        let read = |op: &Op| if let Op::Read { state } = op { Some(*state) } else { None };
        self.step.ops().filter_map(|(_, op)| read(&op.op)).collect()
    }

    fn writes(&self) -> BTreeSet<StateId> {
        let written = |op: &Op| if let Op::Write { state } = op { Some(*state) } else { None };
        self.step.ops().filter_map(|(_, op)| written(&op.op)).collect()
    }
}

/// The call and the updates one behind the other.
fn build(call: &Graph, parts: &[Part], program: &Program) -> Graph {
    let mut new = Graph::like(call, format!("{}.joined", call.name));
    let mut of_call = vec![None; call.values().len()];
    for input in call.inputs() {
        of_call[input.0 as usize] = Some(new.input(call.name_of(input), call.ty(input).clone()));
    }
    let mut of_parts: Vec<Vec<Option<Value>>> = Vec::new();
    for (k, part) in parts.iter().enumerate() {
        let mut map = vec![None; part.step.values().len()];
        for input in part.step.inputs().filter(|input| !part.given.contains_key(input)) {
            let ty = part.step.ty(input);
            let dims: Vec<Dim> = ty.dims.iter().map(|d| d.substitute(&part.dims)).collect();
            let name = Joined::name(k, part.step.name_of(input));
            map[input.0 as usize] = Some(new.input(name, Type::new(ty.dtype, dims)));
        }
        of_parts.push(map);
    }
    copy(call, &BTreeMap::new(), &mut of_call, &mut new, program);
    new.outputs = outputs(call, &of_call, str::to_string);
    for (k, (part, map)) in parts.iter().zip(&mut of_parts).enumerate() {
        for (input, value) in &part.given {
            map[input.0 as usize] = of_call[value.0 as usize];
        }
        copy(&part.step, &part.dims, map, &mut new, program);
        new.outputs.extend(outputs(&part.step, map, |name| Joined::name(k, name)));
    }
    new
}

/// Appends the ops of a graph; `map` says what its values are in the new one.
fn copy(old: &Graph, dims: &BTreeMap<Symbol, Dim>, map: &mut [Option<Value>], new: &mut Graph, program: &Program) {
    for (_, op) in old.ops() {
        let args: Vec<Value> = op.args.iter().map(|a| map[a.0 as usize].expect("defined before it is used")).collect();
        let state = match op.op {
            Op::Read { state } | Op::Write { state } => Some(&program.state(state).ty),
            _ => None,
        };
        let id = new.try_push(with_dims(&op.op, dims), &args, state, op.site.clone());
        let id = id.unwrap_or_else(|why| panic!("bug: join_updates: `{}` of @{}: {why}", op.op, old.name));
        let results: Vec<Value> = new.op(id).results().collect();
        for (from, to) in op.results().zip(results) {
            new.set_name(to, old.name_of(from));
            map[from.0 as usize] = Some(to);
        }
    }
}

fn outputs(of: &Graph, map: &[Option<Value>], name: impl Fn(&str) -> String) -> Vec<(String, Value)> {
    let one = |(output, value): &(String, Value)| (name(output), map[value.0 as usize].expect("the graph was copied"));
    of.outputs.iter().map(one).collect()
}
