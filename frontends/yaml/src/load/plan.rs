//! From the plan of a recipe to the statements of a stage.
//!
//! Calls bind by D8: a record without a name fills the inputs that are named like its members; a sequence without a
//! name is the next input; anything may be given by name.

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Span, nearest};
use dsgc_ir::stage::{Evaluate, Statement, Update};

use crate::expr::{Arg, Expr, ExprKind, Item, Word};
use crate::graph::Graph;
use crate::literal::Constant;
use crate::plan::Step;
use crate::schema::words;

/// What a plan may speak of.
pub(super) struct Scope<'a> {
    /// Options and other values that are known.
    pub values: &'a BTreeMap<String, Constant>,
    /// Graphs of the recipe.
    pub graphs: &'a [Graph],
    /// Roles, and whether an update trains them.
    pub roles: Vec<(String, bool)>,
    /// Sources, their sequences, and whether rows are held out.
    pub sources: Vec<SourceShape>,
}

/// What is known of a source.
pub(super) struct SourceShape {
    pub name: String,
    pub sequences: Vec<String>,
    pub has_eval: bool,
    /// Shortest and longest rows of a batch, in tokens.
    pub length: (i64, i64),
}

/// A graph that is called from outside, with the ranges of its dims.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub graph: String,
    /// The dim that counts rows.
    pub batch: Option<String>,
    /// Dims of lengths: smallest and largest.
    pub lengths: Vec<(String, i64, i64)>,
}

/// Statements, and the graphs they call.
#[derive(Default)]
pub(super) struct Planned {
    pub plan: Vec<Statement>,
    pub evaluate: Vec<Evaluate>,
    pub entries: Vec<Entry>,
    pub errors: Vec<Diag>,
}

/// A name in the body of a `for`.
struct Batch<'a> {
    name: &'a str,
    source: &'a SourceShape,
}

/// A value in an argument of a call.
enum Bound<'a> {
    /// All sequences of a batch.
    Batch(&'a SourceShape, String),
    /// One sequence.
    Sequence(&'a SourceShape, String),
}

/// Where the value of an input comes from: input -> source and path.
type Inputs<'a> = Vec<(String, (&'a SourceShape, String))>;

impl Planned {
    /// Reads the whole plan.
    pub fn read(scope: &Scope<'_>, plan: &[Step], evaluate: &[Expr]) -> Planned {
        let mut planned = Planned::default();
        planned.plan = planned.steps(scope, plan, &[]);
        planned.top(plan);
        for call in evaluate {
            if let Some(statement) = planned.evaluation(scope, call) {
                planned.evaluate.push(statement);
            }
        }
        planned
    }

    /// What runs is one loop over rows: epochs and steps are counted by it.
    fn top(&mut self, plan: &[Step]) {
        let mut loops = plan.iter().filter_map(|step| match step {
            Step::For { span, .. } => Some(*span),
            _ => None,
        });
        if let (Some(first), Some(second)) = (loops.next(), loops.next()) {
            let diag = Diag::error("found a second loop over rows; more than one is not part of this version");
            self.errors.push(diag.label(second, "").label(first, "the first"));
        }
        for step in plan {
            let (what, span) = match step {
                Step::Repeat { span, .. } => ("`repeat`", *span),
                Step::Call { call, name: None } => ("a call", call.span),
                Step::If { then, otherwise, .. } => {
                    self.top(then);
                    self.top(otherwise);
                    continue;
                }
                // These have messages of their own.
                Step::For { .. } | Step::Set { .. } | Step::Call { .. } => continue,
            };
            let diag = Diag::error(format!("found {what} outside of a loop over rows")).label(span, "");
            self.errors.push(diag.help("write `for: batch`, `in: <source>`, and this under `do:`"));
        }
    }

    fn not_yet(&mut self, what: &str, span: Span) {
        self.errors.push(Diag::error(format!("{what} is not part of this version")).label(span, ""));
    }

    fn constant(&mut self, scope: &Scope<'_>, expr: &Expr) -> Option<Constant> {
        match crate::eval::constant_in(expr, scope.values) {
            Ok(value) => Some(value),
            Err(diag) => {
                self.errors.push(diag);
                None
            }
        }
    }

    fn steps(&mut self, scope: &Scope<'_>, steps: &[Step], batches: &[Batch<'_>]) -> Vec<Statement> {
        let mut statements = Vec::new();
        for step in steps {
            match step {
                Step::For { batch, source, body, .. } => {
                    let Some(shape) = self.source(scope, source) else { continue };
                    if let Some(outer) = batches.first() {
                        let diag = Diag::error(format!(
                            "found a loop over `{}` inside of one over `{}`",
                            shape.name, outer.source.name
                        ));
                        self.errors.push(
                            diag.label(source.span, "").help("loops over minibatches are not part of this version"),
                        );
                        continue;
                    }
                    let inner = [Batch { name: &batch.text, source: shape }];
                    let body = self.steps(scope, body, &inner);
                    statements.push(Statement::For {
                        batch: batch.text.clone(),
                        rows: dsgc_ir::stage::Rows::Source(shape.name.clone()),
                        body,
                    });
                }
                Step::Repeat { times, body, .. } => {
                    let body = self.steps(scope, body, batches);
                    match self.constant(scope, times) {
                        Some(Constant::Int(n)) if n >= 0 => {
                            statements.push(Statement::Repeat { times: n as u64, body });
                        }
                        Some(found) => self.errors.push(
                            Diag::error(format!("found `{found}` times, expected a whole number from 0"))
                                .label(times.span, ""),
                        ),
                        None => {}
                    }
                }
                // Decided when the file is read (D3), like `when:`.
                Step::If { condition, then, otherwise, .. } => match self.constant(scope, condition) {
                    Some(Constant::Bool(yes)) => {
                        statements.extend(self.steps(scope, if yes { then } else { otherwise }, batches));
                    }
                    Some(found) => self
                        .errors
                        .push(Diag::error(format!("found `{found}`, expected a condition")).label(condition.span, "")),
                    None => {}
                },
                Step::Set { span, .. } => self.not_yet("`set` in a plan", *span),
                Step::Call { name: Some(name), .. } => {
                    self.not_yet("a plan that keeps the result of a call", name.span)
                }
                Step::Call { name: None, call } => statements.extend(self.call(scope, call, batches)),
            }
        }
        statements
    }

    /// What a `for` runs over.
    fn source<'a>(&mut self, scope: &'a Scope<'_>, expr: &Expr) -> Option<&'a SourceShape> {
        match &expr.kind {
            ExprKind::Name(name) => {
                let found = scope.sources.iter().find(|s| s.name == *name);
                if found.is_none() {
                    let known: Vec<&str> = scope.sources.iter().map(|s| s.name.as_str()).collect();
                    let diag = Diag::error(format!("found `{name}`, expected a source of rows")).label(expr.span, "");
                    self.errors.push(diag.help(match nearest(name, known.iter().copied()) {
                        Some(near) => format!("write `{near}`"),
                        None => format!("this recipe has {}", words(&known)),
                    }));
                }
                found
            }
            ExprKind::Call { function, .. } => {
                self.not_yet(&format!("a loop over `{}(...)`", function.text), expr.span);
                None
            }
            _ => {
                self.errors
                    .push(Diag::error(format!("found `{expr}`, expected a source of rows")).label(expr.span, ""));
                None
            }
        }
    }

    fn call(&mut self, scope: &Scope<'_>, call: &Expr, batches: &[Batch<'_>]) -> Option<Statement> {
        let ExprKind::Call { function, args } = &call.kind else { return None };
        if function.text != "update" {
            let known = ["average", "cached", "generate", "given", "join", "minibatches", "next"];
            if known.contains(&function.text.as_str()) || scope.graphs.iter().any(|g| g.name.text == function.text) {
                self.not_yet(&format!("`{}(...)` as a statement of a plan", function.text), call.span);
            } else {
                let diag =
                    Diag::error(format!("unknown function `{}` in a plan", function.text)).label(function.span, "");
                self.errors.push(diag.help("write `update(role, loss(batch))`"));
            }
            return None;
        }
        let [role, loss] = &args[..] else {
            let diag = Diag::error(format!("found {} arguments of `update`, expected a role and a loss", args.len()));
            self.errors.push(diag.label(call.span, "").help("write `update(role, loss(batch))`"));
            return None;
        };
        let role = self.trained_role(scope, &role.value);
        let (graph, inputs) = self.graph_call(scope, &loss.value, batches)?;
        if !has_output(graph, "loss") {
            self.errors.push(
                Diag::error(format!("graph `{}` has no output `loss`", graph.name.text))
                    .label(loss.value.span, "`update` needs it")
                    .label(graph.name.span, "defined here"),
            );
        }
        let args = inputs.into_iter().map(|(input, (_, path))| (input, dsgc_ir::stage::Operand::Path(path))).collect();
        let term = dsgc_ir::stage::Term { weight: 1.0, graph: graph.name.text.clone(), args };
        Some(Statement::Update(Update { role: role?, terms: vec![term], steps: None }))
    }

    fn trained_role(&mut self, scope: &Scope<'_>, expr: &Expr) -> Option<String> {
        let Some(name) = expr.name() else {
            match &expr.kind {
                ExprKind::List(_) => self.not_yet("`update` of several models at once", expr.span),
                _ => self.errors.push(Diag::error(format!("found `{expr}`, expected a role")).label(expr.span, "")),
            }
            return None;
        };
        let diag = match scope.roles.iter().find(|r| r.0 == name) {
            Some((_, true)) => return Some(name.to_string()),
            Some((_, false)) => Diag::error(format!("found an update of `{name}`, which is not trained"))
                .label(expr.span, "")
                .help(format!("write `{name}: {{..., trained: true}}` under `models`")),
            None => {
                let known: Vec<&str> = scope.roles.iter().map(|r| r.0.as_str()).collect();
                let diag = Diag::error(format!("unknown role `{name}`")).label(expr.span, "");
                match nearest(name, known.iter().copied()) {
                    Some(near) => diag.help(format!("write `{near}`")),
                    None => diag.help(format!("this recipe has {}", words(&known))),
                }
            }
        };
        self.errors.push(diag);
        None
    }

    fn evaluation(&mut self, scope: &Scope<'_>, call: &Expr) -> Option<Evaluate> {
        let (graph, inputs) = self.graph_call(scope, call, &[])?;
        let Some((_, (source, _))) = inputs.first() else {
            self.errors.push(
                Diag::error(format!("found `{call}`, expected a call on held-out rows"))
                    .label(call.span, "")
                    .help("write `loss(text.eval)`"),
            );
            return None;
        };
        if let Some((_, (other, _))) = inputs.iter().find(|(_, (other, _))| other.name != source.name) {
            let (a, b) = (source.name.clone(), other.name.clone());
            self.not_yet(&format!("an evaluation on both `{a}` and `{b}`"), call.span);
            return None;
        }
        // Nothing is held out: nothing to call.
        let source = source.has_eval.then(|| source.name.clone())?;
        let args = inputs.into_iter().map(|(input, (_, path))| (input, dsgc_ir::stage::Operand::Path(path))).collect();
        let call =
            dsgc_ir::stage::Call { name: None, graph: graph.name.text.clone(), args, cached: false, steps: None };
        Some(Evaluate { source, body: vec![Statement::Call(call)] })
    }

    /// A call of one graph of the recipe.
    fn graph_call<'a>(
        &mut self,
        scope: &'a Scope<'_>,
        call: &Expr,
        batches: &[Batch<'a>],
    ) -> Option<(&'a Graph, Inputs<'a>)> {
        let ExprKind::Call { function, args } = &call.kind else {
            match &call.kind {
                ExprKind::Binary(..) | ExprKind::Unary(..) => self.not_yet("a sum of losses", call.span),
                _ => self
                    .errors
                    .push(Diag::error(format!("found `{call}`, expected a call of a graph")).label(call.span, "")),
            }
            return None;
        };
        let Some(graph) = scope.graphs.iter().find(|g| g.name.text == function.text) else {
            let known: Vec<&str> = scope.graphs.iter().map(|g| g.name.text.as_str()).collect();
            let diag = Diag::error(format!("unknown graph `{}`", function.text)).label(function.span, "");
            self.errors.push(diag.help(match nearest(&function.text, known.iter().copied()) {
                Some(near) => format!("write `{near}`"),
                None => format!("this recipe has {}", words(&known)),
            }));
            return None;
        };
        let before = self.errors.len();
        let inputs = self.bind(scope, graph, function, args, batches);
        (self.errors.len() == before).then_some((graph, inputs))
    }

    fn bind<'a>(
        &mut self,
        scope: &'a Scope<'_>,
        graph: &Graph,
        function: &Word,
        args: &[Arg],
        batches: &[Batch<'a>],
    ) -> Inputs<'a> {
        let before = self.errors.len();
        let mut inputs: Inputs<'a> = Vec::new();
        let mut next = 0;
        for arg in args {
            let Some(bound) = self.argument(scope, &arg.value, batches) else { continue };
            match (&arg.name, bound) {
                (Some(name), Bound::Sequence(source, path)) => {
                    if graph.inputs.iter().any(|i| i.0.text == name.text) {
                        inputs.push((name.text.clone(), (source, path)));
                    } else {
                        let known: Vec<&str> = graph.inputs.iter().map(|i| i.0.text.as_str()).collect();
                        self.errors.push(
                            Diag::error(format!("graph `{}` has no input `{}`", graph.name.text, name.text))
                                .label(name.span, "")
                                .help(format!("its inputs are {}", words(&known))),
                        );
                    }
                }
                (Some(name), Bound::Batch(source, _)) => {
                    let members: Vec<String> = source.sequences.iter().map(|s| format!("{}.{s}", arg.value)).collect();
                    self.errors.push(
                        Diag::error(format!(
                            "found all of `{}` for the input `{}`, expected one sequence",
                            arg.value, name.text
                        ))
                        .label(arg.value.span, "")
                        .help(format!("it holds {}", words(&members))),
                    );
                }
                (None, Bound::Sequence(source, path)) => {
                    if let Some((name, _)) = graph.inputs.get(next) {
                        inputs.push((name.text.clone(), (source, path)));
                    } else {
                        self.errors.push(
                            Diag::error(format!("graph `{}` has only {} inputs", graph.name.text, graph.inputs.len()))
                                .label(arg.value.span, "")
                                .label(graph.name.span, "defined here"),
                        );
                    }
                    next += 1;
                }
                (None, Bound::Batch(source, path)) => {
                    let members = source.sequences.iter().filter(|s| graph.inputs.iter().any(|i| i.0.text == **s));
                    inputs.extend(members.map(|s| (s.clone(), (source, format!("{path}.{s}")))));
                }
            }
        }
        let (mut batch, mut lengths) = (None, Vec::new());
        // An argument that is wrong has its message; what it would have filled needs no other.
        let inputs_of = if self.errors.len() == before { &graph.inputs[..] } else { &[] };
        for (name, ty) in inputs_of {
            let Some((_, (source, _))) = inputs.iter().find(|i| i.0 == name.text) else {
                let given: Vec<String> = args.iter().map(|a| a.value.to_string()).collect();
                self.errors.push(
                    Diag::error(format!("`{}` gets no value for its input `{}`", function.text, name.text))
                        .label(function.span, format!("it is called with {}", words(&given)))
                        .label(name.span, "the input"),
                );
                continue;
            };
            match sequence_dims(ty) {
                Some((rows, length)) => {
                    batch = Some(rows.to_string());
                    widen(&mut lengths, (length.to_string(), source.length.0, source.length.1));
                }
                None => self.errors.push(
                    Diag::error(format!("found a sequence for the input `{}` of type `{ty}`", name.text))
                        .label(function.span, "")
                        .label(ty.span, "expected `sequence[B, T]`"),
                ),
            }
        }
        self.enter(Entry { graph: graph.name.text.clone(), batch, lengths });
        inputs
    }

    /// Notes that a graph is called; of several calls, the widest ranges.
    fn enter(&mut self, new: Entry) {
        let Some(known) = self.entries.iter_mut().find(|e| e.graph == new.graph) else {
            self.entries.push(new);
            return;
        };
        new.lengths.into_iter().for_each(|length| widen(&mut known.lengths, length));
    }

    /// `batch`, `batch.text`, `text.eval`, `text.eval.text`.
    fn argument<'a>(&mut self, scope: &'a Scope<'_>, expr: &Expr, batches: &[Batch<'a>]) -> Option<Bound<'a>> {
        let Some(name) = expr.name() else {
            self.not_yet(&format!("`{expr}` as an argument in a plan"), expr.span);
            return None;
        };
        let (first, rest) = name.split_once('.').map_or((name, ""), |(a, b)| (a, b));
        let (source, path, rest) = if let Some(batch) = batches.iter().find(|b| b.name == first) {
            (batch.source, batch.name.to_string(), rest)
        } else if let Some(source) = scope.sources.iter().find(|s| s.name == first)
            && (rest == "eval" || rest.starts_with("eval."))
        {
            (source, "batch".to_string(), rest.trim_start_matches("eval").trim_start_matches('.'))
        } else {
            let known = batches.iter().map(|b| b.name.to_string());
            let known: Vec<String> = known.chain(scope.sources.iter().map(|s| format!("{}.eval", s.name))).collect();
            let diag = Diag::error(format!("found `{name}`, expected rows of a source")).label(expr.span, "");
            self.errors.push(diag.help(format!("here there are {}", words(&known))));
            return None;
        };
        if rest.is_empty() {
            return Some(Bound::Batch(source, path));
        }
        if source.sequences.iter().any(|s| s == rest) {
            return Some(Bound::Sequence(source, format!("{path}.{rest}")));
        }
        let known: Vec<&str> = source.sequences.iter().map(String::as_str).collect();
        self.errors.push(
            Diag::error(format!("rows of `{}` have no sequence `{rest}`", source.name))
                .label(expr.span, "")
                .help(format!("they have {}", words(&known))),
        );
        None
    }
}

/// Adds the range of a dim, or widens the one that is there.
fn widen(lengths: &mut Vec<(String, i64, i64)>, (dim, min, max): (String, i64, i64)) {
    match lengths.iter_mut().find(|l| l.0 == dim) {
        Some(known) => (known.1, known.2) = (known.1.min(min), known.2.max(max)),
        None => lengths.push((dim, min, max)),
    }
}

fn has_output(graph: &Graph, name: &str) -> bool {
    match &graph.out {
        crate::graph::Tree::Expr(_) => false,
        crate::graph::Tree::Record(_, entries) => entries.iter().any(|(n, _)| n.text == name),
    }
}

/// `B` and `T` of `sequence[B, T]`.
fn sequence_dims(ty: &Expr) -> Option<(&str, &str)> {
    let ExprKind::Index { base, items } = &ty.kind else { return None };
    match (base.name(), &items[..]) {
        (Some("sequence"), [Item::At(rows), Item::At(length)]) => Some((rows.name()?, length.name()?)),
        _ => None,
    }
}
