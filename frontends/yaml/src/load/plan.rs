//! From the plan of a recipe to the statements of a stage.
//!
//! Values of a plan have shapes (`types`): batches of sources, rollouts, results of graphs. A call binds them to the
//! inputs of a graph (`bind`), which says how large the graph's dims can be and what its results are.

mod bind;
pub(super) mod types;

use std::collections::BTreeMap;
use std::rc::Rc;

use dsgc_ir::diag::{Diag, Span, nearest};
use dsgc_ir::stage::{Call, Evaluate, Generate, Operand, Rows, Sampling, Statement, Term, Update};
use dsgc_ir::{DType, Program};

use crate::expr::{Arg, BinaryOp, Expr, ExprKind, UnaryOp, Word};
use crate::graph::Graph;
use crate::literal::Constant;
use crate::lower::TokenIds;
use crate::plan::Step;
use crate::schema::words;

use super::documents::{Documents, ScopedRecipe};
use super::graphs::{self, Part};
use types::{Entry, Extent, Shape, Table, Value};

/// What a plan may speak of.
struct Scope<'a> {
    /// Options and other values that are known.
    pub values: &'a BTreeMap<String, Constant>,
    /// Graphs of the recipe.
    pub graphs: &'a [Graph],
    /// Those that are called, lowered: their inputs and outputs.
    pub lowered: &'a Program,
    /// Roles, and whether an update trains them.
    pub roles: Vec<(String, bool)>,
    /// Sources that have rows.
    pub sources: Vec<SourceShape>,
    /// Sources of the recipe without rows.
    pub missing: Vec<String>,
    /// Names of the recipe's states.
    pub states: Vec<String>,
    pub ids: TokenIds,
    /// Rows per call of a graph.
    pub micro_batch_size: usize,
}

/// What a plan is read with.
pub(super) struct Planning<'a> {
    pub recipe: &'a Rc<ScopedRecipe>,
    /// Options and other values that are known.
    pub values: &'a BTreeMap<String, Constant>,
    pub parts: Vec<Part<'a>>,
    pub ids: TokenIds,
    /// Sources that have rows.
    pub sources: Vec<SourceShape>,
    /// Rows per call of a graph.
    pub micro_batch_size: usize,
    /// The stage that all this is for, if there is one.
    pub at: Option<Span>,
}

impl Planning<'_> {
    /// The plan, or nothing if something is wrong with it. Its graphs are lowered once without sizes before: what
    /// a call gives follows from theirs.
    pub fn plan(self, documents: &mut Documents<'_>) -> Option<Planned> {
        let recipe = &self.recipe.recipe;
        let steps = recipe.plan.as_deref().unwrap_or_default();
        let declared = recipe.data.iter().map(|d| d.name.text.clone());
        let missing: Vec<String> = declared.filter(|d| !self.sources.iter().any(|s| s.name == *d)).collect();
        let given = |name: &str| given(&self.sources, &missing, name);
        let decide = |condition: &Expr| match known(condition, self.values, &given) {
            Ok(Constant::Bool(yes)) => Some(yes),
            _ => None,
        };
        let called = Called::by(steps, &recipe.evaluate, &decide);
        let lowered = graphs::signatures(documents, &self, &called)?;
        let scope = Scope {
            values: self.values,
            graphs: &recipe.graphs,
            lowered: &lowered,
            roles: self.parts.iter().map(|part| (part.name.to_string(), part.trained)).collect(),
            states: recipe.state.iter().map(|s| s.0.text.clone()).collect(),
            ids: self.ids,
            micro_batch_size: self.micro_batch_size,
            sources: self.sources,
            missing,
        };
        let mut planned = Planned::read(&scope, steps, &recipe.evaluate);
        let right = planned.errors.is_empty();
        documents.errors.append(&mut planned.errors);
        right.then_some(planned)
    }
}

/// Whether a source of the recipe has rows.
fn given(sources: &[SourceShape], missing: &[String], name: &str) -> Option<bool> {
    match sources.iter().any(|s| s.name == name) {
        true => Some(true),
        false => missing.iter().any(|s| s == name).then_some(false),
    }
}

/// What is known of a source.
pub(super) struct SourceShape {
    pub name: String,
    pub sequences: Vec<String>,
    pub has_eval: bool,
    /// Shortest and longest rows of a batch, in tokens.
    pub length: (i64, i64),
    pub batch_size: usize,
}

/// Statements, and the graphs they call.
#[derive(Default)]
pub(super) struct Planned {
    pub plan: Vec<Statement>,
    pub evaluate: Vec<Evaluate>,
    pub entries: Vec<Entry>,
    /// Rows of a batch, where the plan says so: source -> rows.
    pub batch_sizes: BTreeMap<String, usize>,
    /// New values of states, in the order of their statements; `set.<n>` is the graph of each.
    pub sets: Vec<crate::lower::Set>,
    /// Moving averages, in the order of their statements.
    pub averages: Vec<crate::lower::Average>,
    pub errors: Vec<Diag>,
    tables: usize,
    /// Results that the user gave no name.
    unnamed: usize,
}

/// The name of the graph that runs a role alone.
pub(super) fn forward_graph(role: &str) -> String {
    format!("{role}.forward")
}

/// What a plan calls, before anything is known of its values.
#[derive(Debug, Default)]
pub(super) struct Called {
    /// Graphs of the recipe.
    pub graphs: Vec<String>,
    /// Roles that generate.
    pub generates: Vec<String>,
}

impl Called {
    /// Everything in the branches that are taken; mistakes are told when the plan is read.
    fn by(plan: &[Step], evaluate: &[Expr], decide: &dyn Fn(&Expr) -> Option<bool>) -> Called {
        let mut called = Called::default();
        called.steps(plan, decide);
        evaluate.iter().for_each(|call| called.expr(call));
        called
    }

    fn steps(&mut self, steps: &[Step], decide: &dyn Fn(&Expr) -> Option<bool>) {
        for step in steps {
            match step {
                Step::For { source, body, .. } => {
                    self.expr(source);
                    self.steps(body, decide);
                }
                Step::Repeat { body, .. } => self.steps(body, decide),
                Step::If { condition, then, otherwise, .. } => {
                    self.steps(if decide(condition) == Some(true) { then } else { otherwise }, decide);
                }
                Step::Set { .. } => {}
                Step::Call { call, .. } => self.expr(call),
            }
        }
    }

    fn expr(&mut self, expr: &Expr) {
        match &expr.kind {
            ExprKind::Call { function, args } => {
                let note = |list: &mut Vec<String>, name: &str| {
                    if !list.iter().any(|known| known == name) {
                        list.push(name.into());
                    }
                };
                match (function.text.as_str(), args.first().and_then(|a| a.value.name())) {
                    ("generate", Some(role)) => note(&mut self.generates, role),
                    (name, _) => note(&mut self.graphs, name),
                }
                args.iter().for_each(|a| self.expr(&a.value));
            }
            ExprKind::Binary(_, a, b) => {
                self.expr(a);
                self.expr(b);
            }
            ExprKind::Unary(_, a) => self.expr(a),
            _ => {}
        }
    }
}

/// The value of an expression that is known when the file is read; `given(source)` is whether a source has rows.
fn known(
    expr: &Expr,
    values: &BTreeMap<String, Constant>,
    given: &dyn Fn(&str) -> Option<bool>,
) -> Result<Constant, Diag> {
    crate::eval::constant_in(&with_given(expr, given)?, values)
}

fn with_given(expr: &Expr, given: &dyn Fn(&str) -> Option<bool>) -> Result<Expr, Diag> {
    let kind = match &expr.kind {
        ExprKind::Call { function, args } if function.text == "given" => {
            let name = match &args[..] {
                [Arg { name: None, value }] => value.name(),
                _ => None,
            };
            match name.and_then(given) {
                Some(yes) => ExprKind::Bool(yes),
                None => {
                    let diag = Diag::error(format!("found `{expr}`, expected a source of this recipe"));
                    return Err(diag.label(expr.span, "").help("write `given(ptx)`"));
                }
            }
        }
        ExprKind::Unary(op, x) => ExprKind::Unary(*op, Box::new(with_given(x, given)?)),
        ExprKind::Binary(op, a, b) => {
            ExprKind::Binary(*op, Box::new(with_given(a, given)?), Box::new(with_given(b, given)?))
        }
        other => other.clone(),
    };
    Ok(Expr { span: expr.span, kind })
}

/// Names that are bound, the innermost last.
type Env = Vec<(String, Value)>;

impl Planned {
    /// Reads the whole plan.
    fn read(scope: &Scope<'_>, plan: &[Step], evaluate: &[Expr]) -> Planned {
        let mut planned = Planned::default();
        planned.top(plan);
        planned.plan = planned.steps(scope, plan, &mut Env::new(), true);
        for call in evaluate {
            planned.evaluation(scope, call);
        }
        planned
    }

    fn error<T>(&mut self, diag: Diag) -> Option<T> {
        self.errors.push(diag);
        None
    }

    /// What runs is one loop over rows: epochs and steps are counted by it.
    fn top(&mut self, plan: &[Step]) {
        let mut loops = plan.iter().filter_map(|step| match step {
            Step::For { span, .. } => Some(*span),
            _ => None,
        });
        if let (Some(first), Some(second)) = (loops.next(), loops.next()) {
            let diag = Diag::error("found a second loop over rows, expected one with everything in it");
            self.errors
                .push(diag.label(second, "").label(first, "the first").help("take more rows with `next(source)`"));
        }
        for step in plan {
            let (what, span) = match step {
                Step::Repeat { span, .. } => ("`repeat`", *span),
                Step::Set { span, .. } => ("`set`", *span),
                Step::Call { call, .. } => ("a call", call.span),
                Step::If { then, otherwise, .. } => {
                    self.top(then);
                    self.top(otherwise);
                    continue;
                }
                Step::For { .. } => continue,
            };
            let diag = Diag::error(format!("found {what} outside of a loop over rows")).label(span, "");
            self.errors.push(diag.help("write `for: batch`, `in: <source>`, and this under `do:`"));
        }
    }

    fn constant(&mut self, scope: &Scope<'_>, expr: &Expr) -> Option<Constant> {
        let given = |name: &str| scope.given(name);
        known(expr, scope.values, &given).map_err(|diag| self.errors.push(diag)).ok()
    }

    /// A number of rows, tokens or the like.
    fn count(&mut self, scope: &Scope<'_>, expr: &Expr, what: &str, least: i64) -> Option<usize> {
        match self.constant(scope, expr)? {
            Constant::Int(n) if n >= least => usize::try_from(n).ok(),
            found => {
                let diag = Diag::error(format!("found `{found}` {what}, expected a whole number from {least}"));
                self.error(diag.label(expr.span, ""))
            }
        }
    }

    fn table(&mut self, name: &str, rows: usize) -> Table {
        self.tables += 1;
        Table { id: self.tables, rows, name: name.into() }
    }

    fn steps(&mut self, scope: &Scope<'_>, steps: &[Step], env: &mut Env, outermost: bool) -> Vec<Statement> {
        let (mut statements, bound) = (Vec::new(), env.len());
        for step in steps {
            self.step(scope, step, env, outermost, &mut statements);
        }
        env.truncate(bound);
        statements
    }

    fn step(&mut self, scope: &Scope<'_>, step: &Step, env: &mut Env, outermost: bool, out: &mut Vec<Statement>) {
        match step {
            Step::For { batch, source, body, .. } => {
                let Some((rows, value)) = self.rows(scope, source, batch, env, outermost, out) else { return };
                env.push((batch.text.clone(), value));
                let body = self.steps(scope, body, env, false);
                env.pop();
                out.push(Statement::For { batch: batch.text.clone(), rows, body });
            }
            Step::Repeat { times, body, .. } => {
                let body = self.steps(scope, body, env, outermost);
                if let Some(times) = self.count(scope, times, "times", 0) {
                    out.push(Statement::Repeat { times: times as u64, body });
                }
            }
            // Decided when the file is read (D3), like `when:`. What is bound in it is bound after it too.
            Step::If { condition, then, otherwise, .. } => match self.constant(scope, condition) {
                Some(Constant::Bool(yes)) => {
                    for step in if yes { then } else { otherwise } {
                        self.step(scope, step, env, outermost, out);
                    }
                }
                Some(found) => {
                    let diag = Diag::error(format!("found `{found}`, expected a condition"));
                    self.errors.push(diag.label(condition.span, ""));
                }
                None => {}
            },
            Step::Set { values, .. } => out.extend(self.set(scope, values, env)),
            Step::Call { name, call } => self.call(scope, name.as_ref(), call, env, out),
        }
    }

    /// What a `for` runs over.
    fn rows(
        &mut self,
        scope: &Scope<'_>,
        expr: &Expr,
        batch: &Word,
        env: &Env,
        outermost: bool,
        out: &mut Vec<Statement>,
    ) -> Option<(Rows, Value)> {
        if let ExprKind::Call { function, args } = &expr.kind {
            return match function.text.as_str() {
                "batches" => {
                    let [source, size] = self.args(expr, args, ["source", "size"])?;
                    let rows = self.count(scope, size, "rows", 1)?;
                    let name = self.source(scope, source)?.name.clone();
                    if let Some(other) = self.batch_sizes.insert(name.clone(), rows).filter(|other| *other != rows) {
                        let diag = Diag::error(format!("found batches of {rows} rows of `{name}`, and of {other}"));
                        self.errors.push(diag.label(expr.span, "the second"));
                    }
                    self.rows_of_source(scope, source, batch, env, outermost)
                }
                "minibatches" => self.minibatches(scope, expr, args, batch, env, out),
                _ => {
                    let diag = Diag::error(format!("found `{expr}`, expected rows")).label(expr.span, "");
                    self.error(diag.help("write a source, `batches(source, rows)` or `minibatches(table, rows)`"))
                }
            };
        }
        self.rows_of_source(scope, expr, batch, env, outermost)
    }

    fn rows_of_source(
        &mut self,
        scope: &Scope<'_>,
        expr: &Expr,
        batch: &Word,
        env: &Env,
        outermost: bool,
    ) -> Option<(Rows, Value)> {
        if !outermost {
            let source = expr.name().unwrap_or("source");
            let diag = Diag::error("found a loop over a source inside of a loop").label(expr.span, "");
            return self.error(match env.iter().any(|(name, _)| name == source) {
                true => diag.help(format!("write `minibatches({source}, rows)` to cut a table by rows")),
                false => diag.help(format!("write `- more: next({source})` for its next batch")),
            });
        }
        let source = self.source(scope, expr)?;
        let rows = self.batch_sizes.get(&source.name).copied().unwrap_or(source.batch_size);
        let table = self.table(&batch.text, rows);
        Some((Rows::Source(source.name.clone()), source.batch(batch.text.clone(), &table)))
    }

    fn minibatches(
        &mut self,
        scope: &Scope<'_>,
        expr: &Expr,
        args: &[Arg],
        batch: &Word,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<(Rows, Value)> {
        let (named, plain): (Vec<&Arg>, Vec<&Arg>) = args.iter().partition(|a| a.name.is_some());
        let plain: Vec<Arg> = plain.into_iter().cloned().collect();
        let [table, size] = self.args(expr, &plain, ["table", "rows"])?;
        // A table may be written where it is used: `minibatches(join(a, b), 8)`.
        let value = self.argument(scope, table, env, out)?;
        let size = self.count(scope, size, "rows", 1)?;
        let Some(of) = value.table.clone() else {
            let diag = Diag::error(format!("found `{table}`, which has no rows, expected a table"));
            return self.error(diag.label(table.span, ""));
        };
        let (mut keep, mut shuffle) = (None, true);
        for arg in named {
            match arg.name.as_ref().map(|n| n.text.as_str()) {
                Some("where") => {
                    let mask = self.argument(scope, &arg.value, env, out)?;
                    let expected = Shape { dtype: DType::Bool, dims: vec![Extent::Rows(1)] };
                    let fits = mask.tensor() == Some(&expected) && mask.table.as_ref().is_some_and(|t| t.id == of.id);
                    if !fits {
                        let found = mask.tensor().map_or("a record".into(), types::shown);
                        let diag = Diag::error(format!("found {found}, expected bool[rows] of `{table}`"));
                        return self.error(diag.label(arg.value.span, ""));
                    }
                    keep = Some(mask.path);
                }
                Some("shuffle") => match self.constant(scope, &arg.value)? {
                    Constant::Bool(yes) => shuffle = yes,
                    found => {
                        let diag = Diag::error(format!("found `{found}`, expected `true` or `false`"));
                        return self.error(diag.label(arg.value.span, ""));
                    }
                },
                _ => return self.unknown_argument(arg, "minibatches(table, rows, where=mask, shuffle=true)"),
            }
        }
        let path = value.path.clone();
        let table = self.table(&batch.text, size.min(of.rows));
        // What has no rows is no part of a table of rows.
        let fields = value.fields.into_iter().filter(|(_, s)| s.dims.first() == Some(&Extent::Rows(1))).collect();
        let value = Value { path: batch.text.clone(), fields, table: Some(table) };
        Some((Rows::Minibatches { table: path, size, keep, shuffle }, value))
    }

    /// Exactly these arguments, without names.
    fn args<'e, const N: usize>(&mut self, call: &Expr, args: &'e [Arg], names: [&str; N]) -> Option<[&'e Expr; N]> {
        let plain: Vec<&Expr> = args.iter().filter(|a| a.name.is_none()).map(|a| &a.value).collect();
        match (<[&Expr; N]>::try_from(plain), args.iter().find(|a| a.name.is_some())) {
            (Ok(args), None) => Some(args),
            (_, found) => {
                let name = if let ExprKind::Call { function, .. } = &call.kind { function.text.as_str() } else { "" };
                let usage = format!("{name}({})", names.join(", "));
                match found {
                    Some(arg) => self.unknown_argument(arg, &usage),
                    None => {
                        let diag = Diag::error(format!("found {} arguments, expected {N}", args.len()));
                        self.error(diag.label(call.span, "").help(format!("it is `{usage}`")))
                    }
                }
            }
        }
    }

    fn unknown_argument<T>(&mut self, arg: &Arg, usage: &str) -> Option<T> {
        let name = arg.name.as_ref().map_or_else(|| arg.value.to_string(), |n| n.text.clone());
        let span = arg.name.as_ref().map_or(arg.value.span, |n| n.span);
        self.error(Diag::error(format!("unknown argument `{name}`")).label(span, "").help(format!("it is `{usage}`")))
    }

    fn source<'a>(&mut self, scope: &'a Scope<'_>, expr: &Expr) -> Option<&'a SourceShape> {
        let name = expr.name().unwrap_or_default();
        if let Some(found) = scope.sources.iter().find(|s| s.name == name) {
            return Some(found);
        }
        let diag = Diag::error(format!("found `{expr}`, expected a source of rows")).label(expr.span, "");
        if scope.missing.iter().any(|s| s == name) {
            return self.error(diag.help(format!("the stage gives `{name}` no rows: ask with `if: given({name})`")));
        }
        let known: Vec<&str> = scope.sources.iter().map(|s| s.name.as_str()).collect();
        self.error(diag.help(match nearest(name, known.iter().copied()) {
            Some(near) => format!("write `{near}`"),
            None => format!("this recipe has {}", words(&known)),
        }))
    }

    /// A statement that is a call.
    fn call(&mut self, scope: &Scope<'_>, name: Option<&Word>, call: &Expr, env: &mut Env, out: &mut Vec<Statement>) {
        let ExprKind::Call { function, args } = &call.kind else { return };
        match (function.text.as_str(), name) {
            ("update", None) => {
                let update = self.update(scope, call, args, env, out);
                out.extend(update.map(Statement::Update));
            }
            ("average", None) => {
                let average = self.average(scope, call, args);
                out.extend(average.map(Statement::Call));
            }
            ("update" | "average", Some(name)) => {
                let diag = Diag::error(format!("`{}` has no result to name", function.text)).label(name.span, "");
                self.errors.push(diag.help(format!("write `- {call}`")));
            }
            (_, None) if scope.graph(&function.text).is_none() && !FUNCTIONS.contains(&function.text.as_str()) => {
                self.unknown_function::<()>(scope, function);
            }
            (_, None) if FUNCTIONS.contains(&function.text.as_str()) && function.text != "cached" => {
                let diag = Diag::error(format!("nothing is done with the result of `{}`", function.text));
                self.errors.push(diag.label(call.span, "").help(format!("name it: `- rows: {call}`")));
            }
            (_, name) => {
                if let Some(name) = name {
                    let taken = scope.values.contains_key(&name.text)
                        || scope.states.contains(&name.text)
                        || scope.sources.iter().any(|s| s.name == name.text)
                        || env.iter().any(|(n, _)| *n == name.text);
                    if taken {
                        let diag = Diag::error(format!("`{}` has two meanings", name.text)).label(name.span, "");
                        self.errors.push(diag.help("give the result another name"));
                        return;
                    }
                }
                let path = name.map(|n| n.text.clone());
                if let Some(value) = self.result(scope, call, path, env, out)
                    && let Some(name) = name
                {
                    env.push((name.text.clone(), value));
                }
            }
        }
    }

    fn unknown_function<T>(&mut self, scope: &Scope<'_>, function: &Word) -> Option<T> {
        let known = scope.graphs.iter().map(|g| g.name.text.as_str()).chain(FUNCTIONS).chain(["update", "average"]);
        let diag = Diag::error(format!("unknown function `{}` in a plan", function.text)).label(function.span, "");
        let near = nearest(&function.text, known);
        self.error(match near {
            Some(near) => diag.help(format!("write `{near}`")),
            None => {
                let graphs: Vec<&str> = scope.graphs.iter().map(|g| g.name.text.as_str()).collect();
                diag.help(format!("this recipe has {}", words(&graphs)))
            }
        })
    }

    /// The value of a call; its statements are added to `out`. A value that nobody named gets a name of ours, which no
    /// user can write.
    fn result(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        name: Option<String>,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<Value> {
        let ExprKind::Call { function, args } = &call.kind else { return None };
        let named = name.is_some();
        let path = name.unwrap_or_else(|| {
            self.unnamed += 1;
            format!("{}#{}", function.text, self.unnamed)
        });
        let (value, statement) = match function.text.as_str() {
            "generate" => self.generate(scope, call, args, path, env, out)?,
            "next" => {
                let [source] = self.args(call, args, ["source"])?;
                let source = self.source(scope, source)?;
                let rows = self.batch_sizes.get(&source.name).copied().unwrap_or(source.batch_size);
                let table = self.table(&path, rows);
                (source.batch(path.clone(), &table), Statement::Next { name: path, source: source.name.clone() })
            }
            "join" => self.join(scope, call, args, path, env, out)?,
            "recent" => {
                let [table, rows] = self.args(call, args, ["table", "rows"])?;
                let value = self.argument(scope, table, env, out)?;
                let rows = self.count(scope, rows, "rows", 1)?;
                if value.table.is_none() {
                    let diag = Diag::error(format!("found `{table}`, which has no rows, expected a table"));
                    return self.error(diag.label(table.span, ""));
                }
                let from = value.path.clone();
                let fields =
                    value.fields.into_iter().filter(|(_, s)| s.dims.first() == Some(&Extent::Rows(1))).collect();
                let value = Value { path: path.clone(), fields, table: Some(self.table(&path, rows)) };
                (value, Statement::Recent { name: path, table: from, rows })
            }
            "cached" => {
                let (call, when) = self.cached(scope, call, args)?;
                let (value, call) = self.graph_call(scope, call, named.then_some(path), when, env, out)?;
                (value, Statement::Call(call))
            }
            _ => {
                // A result without a name is needed by its own call only where it is an argument.
                let (value, call) = self.graph_call(scope, call, Some(path), false, env, out)?;
                (value, Statement::Call(call))
            }
        };
        out.push(statement);
        Some(value)
    }

    /// The call in `cached(call, when=condition)`, and whether it is cached.
    fn cached<'e>(&mut self, scope: &Scope<'_>, call: &Expr, args: &'e [Arg]) -> Option<(&'e Expr, bool)> {
        let mut when = true;
        for arg in args.iter().filter(|a| a.name.is_some()) {
            match (arg.name.as_ref().map(|n| n.text.as_str()), self.constant(scope, &arg.value)?) {
                (Some("when"), Constant::Bool(yes)) => when = yes,
                (Some("when"), found) => {
                    let diag = Diag::error(format!("found `{found}`, expected `true` or `false`"));
                    return self.error(diag.label(arg.value.span, ""));
                }
                _ => return self.unknown_argument(arg, "cached(graph(batch), when=true)"),
            }
        }
        let plain: Vec<&Arg> = args.iter().filter(|a| a.name.is_none()).collect();
        match &plain[..] {
            [Arg { value: inner, .. }] if matches!(inner.kind, ExprKind::Call { .. }) => Some((inner, when)),
            _ => {
                let diag =
                    Diag::error(format!("found `{call}`, expected a call of a graph to keep")).label(call.span, "");
                self.error(diag.help("write `cached(reference(batch))`"))
            }
        }
    }

    fn join(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        args: &[Arg],
        path: String,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<(Value, Statement)> {
        let (mut fields, mut parts, mut table): (Vec<(String, Shape)>, Vec<String>, Option<Table>) =
            (Vec::new(), Vec::new(), None);
        for arg in args {
            if arg.name.is_some() {
                return self.unknown_argument(arg, "join(a, b.member)");
            }
            let value = self.argument(scope, &arg.value, env, out)?;
            match (&table, &value.table) {
                (Some(a), Some(b)) if a.id != b.id => {
                    let diag = Diag::error(format!("found rows of `{}` beside those of `{}`", b.name, a.name));
                    return self.error(diag.label(arg.value.span, ""));
                }
                (None, Some(of)) => table = Some(of.clone()),
                _ => {}
            }
            // A member that is one tensor keeps its own name.
            let own = value.path.rsplit('.').next().unwrap_or_default().to_string();
            for (field, shape) in value.fields {
                let name = if field.is_empty() { own.clone() } else { field };
                if fields.iter().any(|(known, _)| *known == name) {
                    let diag = Diag::error(format!("found a second `{name}` in `{call}`")).label(arg.value.span, "");
                    return self.error(diag);
                }
                fields.push((name, shape));
            }
            parts.push(value.path);
        }
        Some((Value { path: path.clone(), fields, table }, Statement::Join { name: path, parts }))
    }

    fn generate(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        args: &[Arg],
        path: String,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<(Value, Statement)> {
        const USAGE: &str = "generate(role, prompt, max_new_tokens=, samples=, temperature=, top_k=, top_p=, greedy=)";
        let plain: Vec<&Arg> = args.iter().filter(|a| a.name.is_none()).collect();
        let [role, prompt] = plain[..] else {
            let diag = Diag::error(format!("found `{call}`, expected a role and prompts")).label(call.span, "");
            return self.error(diag.help(format!("it is `{USAGE}`")));
        };
        let role = self.role(scope, &role.value)?;
        let sequence = self.argument(scope, &prompt.value, env, out)?;
        let (Some(table), Some((_, tokens)), true) =
            (sequence.table.clone(), sequence.fields.iter().find(|(name, _)| name == "tokens"), sequence.is_sequence())
        else {
            let diag = Diag::error(format!("found `{}`, expected a sequence of a batch", prompt.value));
            let members = sequence.members().join(", ");
            return self.error(diag.label(prompt.value.span, "").help(format!("it holds {members}")));
        };
        let Some(Extent::Range(low, high)) = tokens.dims.get(1).copied() else {
            let diag = Diag::error(format!("found {} as prompts, expected tokens", types::shown(tokens)));
            return self.error(diag.label(prompt.value.span, ""));
        };
        let (mut samples, mut new, mut greedy) = (1, None, false);
        let mut sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };
        for arg in args.iter() {
            let Some(name) = &arg.name else { continue };
            match name.text.as_str() {
                "samples" => samples = self.count(scope, &arg.value, "answers", 1)?,
                "max_new_tokens" => new = Some(self.count(scope, &arg.value, "new tokens", 1)?),
                "top_k" => sampling.top_k = self.count(scope, &arg.value, "as `top_k`", 0)?,
                "temperature" => {
                    sampling.temperature = self.number(scope, &arg.value, "temperature", 0.0..=f64::MAX)?
                }
                "top_p" => sampling.top_p = self.number(scope, &arg.value, "top_p", f64::MIN_POSITIVE..=1.0)?,
                "greedy" => match self.constant(scope, &arg.value)? {
                    Constant::Bool(yes) => greedy = yes,
                    found => {
                        let diag = Diag::error(format!("found `{found}`, expected `true` or `false`"));
                        return self.error(diag.label(arg.value.span, ""));
                    }
                },
                _ => return self.unknown_argument(arg, USAGE),
            }
        }
        let Some(new) = new else {
            let diag = Diag::error("`generate` misses `max_new_tokens`").label(call.span, "");
            return self.error(diag.help(format!("it is `{USAGE}`")));
        };
        if greedy {
            sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0 };
        }
        let Some(pad) = scope.ids.pad else {
            return self
                .error(Diag::error("`generate` needs a tokenizer with a padding or end token").label(call.span, ""));
        };
        let all = if samples == 1 { table } else { self.table(&path, table.rows * samples) };
        let answer = new as i64;
        let whole = Value::sequence(path.clone(), &all, (low + answer, high + answer));
        let mut fields = whole.fields.clone();
        fields.extend(whole.fields.into_iter().map(|(name, shape)| (format!("seq.{name}"), shape)));
        let answers = Shape { dtype: DType::Bool, dims: vec![Extent::Rows(1), Extent::Range(answer, answer)] };
        fields.push(("answer".into(), answers));
        let forward = forward_graph(&role);
        self.enter(Entry {
            graph: forward.clone(),
            batch: Some("B".into()),
            rows: scope.micro_batch_size,
            ranges: vec![dsgc_ir::DimRange { symbol: "T".into(), min: 1, max: high + answer }],
        });
        let generate = Generate {
            name: path.clone(),
            role,
            prompt: sequence.path,
            samples,
            max_new_tokens: new,
            sampling,
            stop: scope.ids.eos,
            pad,
            forward,
            prompt_width: high as usize,
            rows: scope.micro_batch_size.min(all.rows),
            steps: None,
        };
        Some((Value { path, fields, table: Some(all) }, Statement::Generate(generate)))
    }

    /// A number in a range.
    fn number(
        &mut self,
        scope: &Scope<'_>,
        expr: &Expr,
        what: &str,
        range: std::ops::RangeInclusive<f64>,
    ) -> Option<f64> {
        let found = self.constant(scope, expr)?;
        match found.number().filter(|n| range.contains(n)) {
            Some(n) => Some(n),
            None => {
                let expected = match *range.end() {
                    f64::MAX => "0 or more".to_string(),
                    end => format!("more than 0, at most {end}"),
                };
                self.error(Diag::error(format!("found `{found}` as {what}, expected {expected}")).label(expr.span, ""))
            }
        }
    }

    fn update(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        args: &[Arg],
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<Update> {
        let [role, loss] = args else {
            let diag = Diag::error(format!("found {} arguments of `update`, expected a role and a loss", args.len()));
            return self.error(diag.label(call.span, "").help("write `update(role, loss(batch))`"));
        };
        let role = self.trained_role(scope, &role.value);
        let mut terms = Vec::new();
        self.terms(scope, &loss.value, 1.0, env, &mut terms, out)?;
        Some(Update { role: role?, terms, steps: None })
    }

    /// The losses of a sum.
    fn terms(
        &mut self,
        scope: &Scope<'_>,
        loss: &Expr,
        weight: f64,
        env: &Env,
        terms: &mut Vec<Term>,
        out: &mut Vec<Statement>,
    ) -> Option<()> {
        let is_call = |e: &Expr| contains_call(e);
        match &loss.kind {
            ExprKind::Binary(op @ (BinaryOp::Add | BinaryOp::Sub), a, b) => {
                let right = if *op == BinaryOp::Sub { -weight } else { weight };
                let first = self.terms(scope, a, weight, env, terms, out);
                let second = self.terms(scope, b, right, env, terms, out);
                first.and(second)
            }
            ExprKind::Unary(UnaryOp::Neg, a) => self.terms(scope, a, -weight, env, terms, out),
            ExprKind::Binary(BinaryOp::Mul, a, b) if is_call(a) != is_call(b) => {
                let (factor, loss) = if is_call(a) { (b, a) } else { (a, b) };
                let factor = self.number(scope, factor, "the weight of a loss", 0.0..=f64::MAX)?;
                self.terms(scope, loss, weight * factor, env, terms, out)
            }
            ExprKind::Call { .. } => {
                let (value, call) = self.graph_call(scope, loss, None, false, env, out)?;
                if value.member("loss").is_none() {
                    let graph = scope.graph(&call.graph);
                    let diag = Diag::error(format!("graph `{}` has no output `loss`", call.graph))
                        .label(loss.span, "`update` needs it");
                    return self.error(match graph {
                        Some(graph) => diag.label(graph.name.span, "defined here"),
                        None => diag,
                    });
                }
                terms.push(Term { weight, graph: call.graph, args: call.args });
                Some(())
            }
            _ => {
                let diag = Diag::error(format!("found `{loss}`, expected a call of a graph")).label(loss.span, "");
                self.error(diag.help("a loss is `a(batch)`, or a sum such as `a(batch) + 0.5 * b(more)`"))
            }
        }
    }

    fn average(&mut self, scope: &Scope<'_>, call: &Expr, args: &[Arg]) -> Option<Call> {
        let [of, from, decay] = self.args(call, args, ["average", "of", "decay"])?;
        let role = self.role(scope, of)?;
        let from = self.role(scope, from)?;
        let decay = self.number(scope, decay, "decay", 0.0..=1.0)?;
        let graph = crate::lower::average_graph(&role);
        let average = crate::lower::Average { role, of: from, decay };
        if !self.averages.contains(&average) {
            self.averages.push(average);
        }
        Some(Call { name: None, graph, args: Vec::new(), cached: false, steps: None })
    }

    fn set(&mut self, scope: &Scope<'_>, values: &[(Word, Expr)], env: &Env) -> Option<Statement> {
        let mut inputs: Vec<(String, dsgc_ir::Type)> = Vec::new();
        let mut args = Vec::new();
        for (name, expr) in values {
            if !scope.states.contains(&name.text) {
                let known: Vec<&str> = scope.states.iter().map(String::as_str).collect();
                let diag = Diag::error(format!("found `{}`, expected a state", name.text)).label(name.span, "");
                return self.error(match known.is_empty() {
                    true => diag.help(format!("declare it: `state: {{{}: {{init: 0.0}}}}`", name.text)),
                    false => diag.help(format!("this recipe has {}", words(&known))),
                });
            }
            for found in names_of(expr) {
                let first = found.split('.').next().unwrap_or_default();
                if inputs.iter().any(|(known, _)| *known == found) || !env.iter().any(|(name, _)| name == first) {
                    continue;
                }
                let value = self.named(scope, &found, expr.span, env)?;
                let Some(dims) = value.tensor().map(|shape| shape.dims.as_slice()) else {
                    let diag = Diag::error(format!("found the record `{found}`, expected one value"));
                    return self.error(diag.label(expr.span, "").help(format!("it holds {}", words(&value.members()))));
                };
                let dims: Option<Vec<dsgc_ir::Dim>> = dims
                    .iter()
                    .map(|d| match d {
                        Extent::Range(a, b) if a == b => Some(dsgc_ir::Dim::from(*a)),
                        _ => None,
                    })
                    .collect();
                let Some(dims) = dims else {
                    let shape = value.tensor().map_or(String::new(), types::shown);
                    let diag =
                        Diag::error(format!("found {shape} in the new value of a state, expected a fixed shape"));
                    return self.error(diag.label(expr.span, "").help("let a graph take its mean or sum"));
                };
                let dtype = value.tensor().map_or(DType::F32, |shape| shape.dtype);
                inputs.push((found.clone(), dsgc_ir::Type::new(dtype, dims)));
                args.push((found, Operand::Path(value.path)));
            }
        }
        let graph = crate::lower::set_graph(self.sets.len());
        self.sets.push(crate::lower::Set { values: values.to_vec(), inputs });
        Some(Statement::Call(Call { name: None, graph, args, cached: false, steps: None }))
    }

    fn role(&mut self, scope: &Scope<'_>, expr: &Expr) -> Option<String> {
        let name = expr.name().unwrap_or_default();
        if scope.roles.iter().any(|r| r.0 == name) {
            return Some(name.to_string());
        }
        let known: Vec<&str> = scope.roles.iter().map(|r| r.0.as_str()).collect();
        let diag = match expr.name() {
            Some(name) => Diag::error(format!("unknown role `{name}`")),
            None => Diag::error(format!("found `{expr}`, expected a role")),
        };
        self.error(match nearest(name, known.iter().copied()) {
            Some(near) => diag.label(expr.span, "").help(format!("write `{near}`")),
            None => diag.label(expr.span, "").help(format!("this recipe has {}", words(&known))),
        })
    }

    fn trained_role(&mut self, scope: &Scope<'_>, expr: &Expr) -> Option<String> {
        if let ExprKind::List(_) = &expr.kind {
            let diag = Diag::error("`update` of several models at once is not part of this version");
            return self.error(diag.label(expr.span, "").help("write one `update` for each"));
        }
        let name = self.role(scope, expr)?;
        if scope.roles.contains(&(name.clone(), true)) {
            return Some(name);
        }
        let diag = Diag::error(format!("found an update of `{name}`, which is not trained"));
        self.error(diag.label(expr.span, "").help(format!("write `{name}: {{..., trained: true}}` under `models`")))
    }

    fn evaluation(&mut self, scope: &Scope<'_>, call: &Expr) {
        // The held-out rows of every source, `text.eval`.
        let mut env = Env::new();
        for source in &scope.sources {
            let name = format!("{}.eval", source.name);
            let table = self.table(&name, scope.micro_batch_size);
            env.push((name.clone(), source.batch(name, &table)));
        }
        let before = self.errors.len();
        let mut body = Vec::new();
        self.result(scope, call, None, &env, &mut body);
        if self.errors.len() > before {
            return;
        }
        let mentioned = |source: &&SourceShape| mentions(call, &format!("{}.eval", source.name));
        let sources: Vec<&SourceShape> = scope.sources.iter().filter(mentioned).collect();
        match sources[..] {
            [source] => {
                // Nothing is held out: nothing to call.
                if source.has_eval {
                    self.evaluate.push(Evaluate { source: source.name.clone(), body });
                }
            }
            [] => {
                let diag = Diag::error(format!("found `{call}`, expected a call on held-out rows"));
                self.errors.push(diag.label(call.span, "").help("write `loss(text.eval)`"));
            }
            [a, b, ..] => {
                let diag = Diag::error(format!("found rows of both `{}` and `{}` in one evaluation", a.name, b.name));
                self.errors.push(diag.label(call.span, "").help("write one call for each"));
            }
        }
    }
}

/// Functions whose results have names.
const FUNCTIONS: [&str; 5] = ["generate", "join", "recent", "next", "cached"];

impl Scope<'_> {
    fn graph(&self, name: &str) -> Option<&Graph> {
        self.graphs.iter().find(|g| g.name.text == name)
    }

    fn given(&self, name: &str) -> Option<bool> {
        given(&self.sources, &self.missing, name)
    }
}

impl SourceShape {
    /// A batch of it.
    fn batch(&self, path: String, table: &Table) -> Value {
        let mut fields = Vec::new();
        for name in &self.sequences {
            let of_sequence = Value::sequence(String::new(), table, self.length).fields;
            fields.extend(of_sequence.into_iter().map(|(field, shape)| (format!("{name}.{field}"), shape)));
        }
        Value { path, fields, table: Some(table.clone()) }
    }
}

fn contains_call(expr: &Expr) -> bool {
    match &expr.kind {
        ExprKind::Call { .. } => true,
        ExprKind::Binary(_, a, b) => contains_call(a) || contains_call(b),
        ExprKind::Unary(_, a) => contains_call(a),
        _ => false,
    }
}

/// Whether a call speaks of a name or of its members.
fn mentions(expr: &Expr, name: &str) -> bool {
    names_of(expr)
        .iter()
        .any(|found| found.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// All names in an expression, each once.
fn names_of(expr: &Expr) -> Vec<String> {
    fn walk(expr: &Expr, names: &mut Vec<String>) {
        match &expr.kind {
            ExprKind::Name(name) => {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
            ExprKind::Call { args, .. } => args.iter().for_each(|a| walk(&a.value, names)),
            ExprKind::Member(base, _) => walk(base, names),
            ExprKind::Unary(_, x) => walk(x, names),
            ExprKind::Binary(_, a, b) => {
                walk(a, names);
                walk(b, names);
            }
            ExprKind::If { condition, then, otherwise } => {
                for part in [condition, then, otherwise] {
                    walk(part, names);
                }
            }
            ExprKind::List(items) => items.iter().for_each(|x| walk(x, names)),
            ExprKind::Index { base, items } => {
                walk(base, names);
                for item in items {
                    match item {
                        crate::expr::Item::At(x) => walk(x, names),
                        crate::expr::Item::Slice { start, stop, .. } => {
                            start.iter().chain(stop).for_each(|x| walk(x, names));
                        }
                        crate::expr::Item::New(_) | crate::expr::Item::Rest(_) => {}
                    }
                }
            }
            ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Str(_) | ExprKind::Bool(_) | ExprKind::None => {}
        }
    }
    let mut names = Vec::new();
    walk(expr, &mut names);
    names
}
