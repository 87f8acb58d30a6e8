//! Calls of graphs in a plan (D8): a record without a name fills the inputs that are named like its members; a sequence
//! or a tensor without a name is the next input; anything may be given by name.

use dsgc_ir::diag::{Diag, Span, nearest};
use dsgc_ir::stage::{Call, Operand, Operands, Statement};
use dsgc_ir::{Bindings, DType};

use crate::expr::{Arg, Expr, ExprKind, Word};
use crate::graph::Graph;
use crate::schema::words;

use super::types::{Dims, Entry, Extent, Shape, Value, shown, uses};
use super::{Env, Planned, Scope};

/// What an input gets, with the place where it is said.
struct Given {
    span: Span,
    bound: Bound,
}

/// A value in an argument of a call.
#[derive(Clone)]
enum Bound {
    /// Of a batch, or made from one.
    Value(Value),
    /// A state of the recipe.
    State(String, Shape),
    /// Known when the file is read.
    Number(f64),
}

impl Planned {
    /// A call of a graph; `name` is its result's. The value has the path of the name.
    pub(super) fn graph_call(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        name: Option<String>,
        cached: bool,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<(Value, Call)> {
        let ExprKind::Call { function, args } = &call.kind else { return None };
        let Some(graph) = scope.graph(&function.text) else { return self.unknown_function(scope, function) };
        let given = self.givens(scope, graph, function, args, env, out)?;
        // A graph whose own text is wrong has its messages.
        let lowered = scope.lowered.graph(&graph.name.text)?;
        let (mut dims, mut operands) = (Dims::default(), Operands::new());
        for input in lowered.inputs() {
            let path = lowered.name_of(input);
            let (first, rest) = path.split_once('.').unwrap_or((path, ""));
            let declared = graph.inputs.iter().find(|(name, _)| name.text == first);
            let (Some((word, ty)), Some((_, given))) = (declared, given.iter().find(|(name, _)| name == first)) else {
                panic!("bug: graph `{}` has an input `{path}` that it does not declare", lowered.name);
            };
            let operand = match self.operand(given, rest, lowered.ty(input), &mut dims) {
                Ok(operand) => operand,
                // Nobody fills it, and nobody reads it.
                Err(None) if !uses(lowered, input) => continue,
                Err(why) => {
                    let message = match (why, &given.bound) {
                        (Some(why), _) => format!("{why} for the input `{}` of `{}`", word.text, graph.name.text),
                        (None, Bound::Value(value)) => {
                            let found = words(&value.members());
                            format!("`{}` needs `.{rest}` of `{}`, found {found}", graph.name.text, word.text)
                        }
                        (None, _) => format!("found a number for the input `{}`, expected `{ty}`", word.text),
                    };
                    return self.error(
                        Diag::error(message).label(given.span, "").label(ty.span, format!("declared as `{ty}`")),
                    );
                }
            };
            operands.push((path.to_string(), operand));
        }
        let table = dims.batch.as_ref().map(|(_, table, _)| table.clone());
        let path = name.clone().unwrap_or_default();
        let fields = lowered.outputs.iter().map(|(name, v)| (name.clone(), dims.shape(lowered.ty(*v)))).collect();
        if cached && !table.as_ref().is_some_and(|t| env.iter().any(|(_, v)| v.table.as_ref() == Some(t))) {
            let diag =
                Diag::error(format!("found `{call}`, expected a call on a batch of a source")).label(call.span, "");
            return self.error(diag.help("only what depends on rows of a file can be kept"));
        }
        self.enter(Entry {
            graph: lowered.name.clone(),
            rows: dims.batch.as_ref().map_or(1, |(_, table, together)| table.rows / *together as usize),
            batch: dims.batch.map(|(symbol, ..)| symbol),
            ranges: dims.ranges,
        });
        let call = Call { name, graph: lowered.name.clone(), args: operands, cached, steps: None };
        Some((Value { path, fields, table }, call))
    }

    /// Notes that a graph is called; of several calls, the widest ranges.
    pub(super) fn enter(&mut self, new: Entry) {
        match self.entries.iter_mut().find(|e| e.graph == new.graph) {
            Some(known) => known.widen(&new),
            None => self.entries.push(new),
        }
    }

    /// What one tensor of an input gets. No error text: nothing is there for it.
    fn operand(
        &mut self,
        given: &Given,
        member: &str,
        ty: &dsgc_ir::Type,
        dims: &mut Dims,
    ) -> Result<Operand, Option<String>> {
        match &given.bound {
            Bound::Number(x) if member.is_empty() => {
                if ty.dtype != DType::F32 || ty.rank() != 0 {
                    return Err(Some(format!("found the number {x}, expected {ty}")));
                }
                Ok(Operand::Number(*x))
            }
            Bound::State(name, shape) if member.is_empty() => {
                dims.bind(ty, shape, None).map_err(Some)?;
                Ok(Operand::State(name.clone()))
            }
            Bound::Value(value) => {
                let part = if member.is_empty() { value.clone() } else { value.member(member).ok_or(None)? };
                let shape =
                    part.tensor().ok_or_else(|| Some(format!("found the record `{}`, expected {ty}", part.path)))?;
                dims.bind(ty, shape, part.table.as_ref()).map_err(Some)?;
                Ok(Operand::Path(part.path))
            }
            Bound::Number(_) | Bound::State(..) => Err(None),
        }
    }

    /// Every input of a graph with what it gets.
    fn givens(
        &mut self,
        scope: &Scope<'_>,
        graph: &Graph,
        function: &Word,
        args: &[Arg],
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<Vec<(String, Given)>> {
        let mut given: Vec<(String, Given)> = Vec::new();
        let (mut next, mut good) = (0, true);
        for arg in args {
            let span = arg.value.span;
            let Some(bound) = self.bound(scope, &arg.value, env, out) else {
                good = false;
                continue;
            };
            let whole = |value: &Value| value.tensor().is_some() || value.is_sequence();
            match (&arg.name, bound) {
                (Some(name), bound) => {
                    if graph.inputs.iter().any(|(input, _)| input.text == name.text) {
                        // What is given by name counts before what a record brings.
                        given.retain(|(input, _)| *input != name.text);
                        given.push((name.text.clone(), Given { span, bound }));
                    } else {
                        let known: Vec<&str> = graph.inputs.iter().map(|i| i.0.text.as_str()).collect();
                        let diag = Diag::error(format!("graph `{}` has no input `{}`", graph.name.text, name.text));
                        self.errors.push(diag.label(name.span, "").help(
                            match nearest(&name.text, known.iter().copied()) {
                                Some(near) => format!("write `{near}`"),
                                None => format!("its inputs are {}", words(&known)),
                            },
                        ));
                        good = false;
                    }
                }
                (None, Bound::Value(value)) if !whole(&value) => {
                    for member in value.members() {
                        let wanted = graph.inputs.iter().any(|(input, _)| input.text == member);
                        if wanted
                            && !given.iter().any(|(input, _)| input == member)
                            && let Some(part) = value.member(member)
                        {
                            given.push((member.to_string(), Given { span, bound: Bound::Value(part) }));
                        }
                    }
                }
                (None, bound) => {
                    if let Some((name, _)) = graph.inputs.get(next) {
                        given.retain(|(input, _)| *input != name.text);
                        given.push((name.text.clone(), Given { span, bound }));
                    } else {
                        let count = graph.inputs.len();
                        let diag = Diag::error(format!("graph `{}` has only {count} inputs", graph.name.text));
                        self.errors.push(diag.label(span, "").label(graph.name.span, "defined here"));
                        good = false;
                    }
                    next += 1;
                }
            }
        }
        // An argument that is wrong has its message; what it would have filled needs no other.
        if !good {
            return None;
        }
        for (name, _) in &graph.inputs {
            if given.iter().any(|(input, _)| *input == name.text) {
                continue;
            }
            let found: Vec<String> = args.iter().map(|a| a.value.to_string()).collect();
            let diag = Diag::error(format!("`{}` gets no value for its input `{}`", function.text, name.text));
            self.errors.push(
                diag.label(function.span, format!("it is called with {}", words(&found))).label(name.span, "the input"),
            );
            good = false;
        }
        good.then_some(given)
    }

    /// An argument: a value, a state, a number, or another call, whose statements come first.
    fn bound(&mut self, scope: &Scope<'_>, expr: &Expr, env: &Env, out: &mut Vec<Statement>) -> Option<Bound> {
        if let ExprKind::Call { function, .. } = &expr.kind {
            if function.text == "update" || function.text == "average" {
                let diag = Diag::error(format!("`{}` has no result", function.text)).label(expr.span, "");
                return self.error(diag);
            }
            return self.result(scope, expr, None, env, out).map(Bound::Value);
        }
        if let Some(name) = expr.name()
            && !scope.values.contains_key(name)
        {
            if scope.states.iter().any(|s| s == name) {
                let id = scope.lowered.state_named(&crate::lower::state_name(name))?;
                let ty = &scope.lowered.state(id).ty;
                let dims = ty.shape(&Bindings::new()).expect("states have constant dims");
                let dims = dims.into_iter().map(|n| Extent::Range(n as i64, n as i64)).collect();
                return Some(Bound::State(name.to_string(), Shape { dtype: ty.dtype, dims }));
            }
            return self.named(scope, name, expr.span, env).map(Bound::Value);
        }
        let found = self.constant(scope, expr)?;
        match found.number() {
            Some(n) => Some(Bound::Number(n)),
            None => self.error(
                Diag::error(format!("found `{found}`, expected rows or a number"))
                    .label(expr.span, "")
                    .help("graphs see options by their names; nothing needs to be passed"),
            ),
        }
    }

    /// An argument that is no number.
    pub(super) fn argument(
        &mut self,
        scope: &Scope<'_>,
        expr: &Expr,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<Value> {
        match self.bound(scope, expr, env, out)? {
            Bound::Value(value) => Some(value),
            Bound::State(_, shape) => {
                let diag = Diag::error(format!("found the state `{expr}`, {}, expected rows", shown(&shape)));
                self.error(diag.label(expr.span, ""))
            }
            Bound::Number(n) => {
                self.error(Diag::error(format!("found the number {n}, expected rows")).label(expr.span, ""))
            }
        }
    }

    /// `batch`, `batch.text`, `exp.rows.keep`, `text.eval`.
    pub(super) fn named(&mut self, scope: &Scope<'_>, name: &str, span: Span, env: &Env) -> Option<Value> {
        let rest = |known: &str| match name.strip_prefix(known)? {
            "" => Some(""),
            rest => rest.strip_prefix('.'),
        };
        let Some((value, rest)) = env.iter().rev().find_map(|(known, value)| Some((value, rest(known)?))) else {
            let known: Vec<&str> =
                env.iter().map(|(name, _)| name.as_str()).chain(scope.states.iter().map(String::as_str)).collect();
            let diag = Diag::error(format!("found `{name}`, expected a value of the plan")).label(span, "");
            return self.error(match nearest(name, known.iter().copied()) {
                Some(near) => diag.help(format!("write `{near}`")),
                None => diag.help(format!("here there are {}", words(&known))),
            });
        };
        if rest.is_empty() {
            return Some(value.clone());
        }
        if let Some(part) = value.member(rest) {
            return Some(part);
        }
        let members = value.members();
        let diag = Diag::error(format!("`{}` has no `{rest}`", value.path)).label(span, "");
        self.error(match nearest(rest, members.iter().copied()) {
            Some(near) => diag.help(format!("write `{}.{near}`", value.path)),
            None => diag.help(format!("it has {}", words(&members))),
        })
    }
}
