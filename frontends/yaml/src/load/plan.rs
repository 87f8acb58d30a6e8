//! From the plan of a recipe to the statements of a stage.
//!
//! Values of a plan have shapes (`types`): batches of sources, rollouts, results of graphs. A call binds them to the
//! inputs of a graph (`bind`), which says how large the graph's dims can be and what its results are.

mod bind;
pub(super) mod called;
mod results;
mod rows;
pub(super) mod types;
mod updates;

use std::collections::BTreeMap;
use std::rc::Rc;

use dsgc_ir::Program;
use dsgc_ir::diag::{Diag, Span, nearest};
use dsgc_ir::stage::{Evaluate, Statement};

use crate::expr::{Arg, Expr, ExprKind};
use crate::graph::Graph;
use crate::literal::Constant;
use crate::lower::TokenIds;
use crate::plan::Step;
use crate::schema::words;

use super::documents::{Documents, ScopedRecipe};
use super::graphs::{self, Part};
use called::{Called, known, mentions};
use types::{Entry, Table, Value};

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

    fn table(&mut self, name: &str, rows: usize) -> Table {
        self.tables += 1;
        Table { id: self.tables, rows, samples: 1, name: name.into() }
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
        forget(&mut body);
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
}

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

/// Takes the name from the last call: nobody looks at its rows.
fn forget(statements: &mut [Statement]) {
    if let Some(Statement::Call(call)) = statements.last_mut() {
        call.name = None;
    }
}
