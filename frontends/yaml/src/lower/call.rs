//! Calls: graphs, models and layers are inlined (D8, D25).

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Op, Tag, Value};

use crate::expr::{Arg as Written, Expr, Word};
use crate::graph::{Graph as Source, Tree};
use crate::literal::Constant;

use super::scope::{Callee, Home, Scope};
use super::value::{Arg, Val};
use super::{Asserted, Lowering, R, Reported};

/// Whether an expression uses a name.
pub(super) fn mentions(expr: &Expr, name: &str) -> bool {
    let is = |found: &str| found == name || found.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    expr.names().into_iter().any(|(found, _)| is(found))
}

/// How deep calls may be nested: each takes a part of our own stack.
const MAX_CALLS: usize = 64;

/// How many ops a graph may have: two calls of a function that calls another twice, and so on, double each time.
const MAX_OPS: usize = 1 << 17;

/// How many layers a model may have.
const MAX_LAYERS: i64 = 1 << 16;

impl<'a> Lowering<'a> {
    pub fn call(&mut self, scope: &mut Scope<'a>, span: Span, function: &Word, args: &[Written]) -> R<Val> {
        match self.callee(scope, &function.text) {
            None => self.unknown_function(scope, function),
            Some(Callee::Repeat) => self.repeat(scope, span, args),
            Some(Callee::Builtin(builtin)) => {
                let args = self.evaluated(scope, args);
                self.builtin(builtin, span, args?)
            }
            Some(Callee::Graph(graph, home)) => {
                let args = self.evaluated(scope, args);
                self.inline(home, String::new(), graph, span, args?)
            }
            Some(Callee::Model(role)) => {
                let args = self.evaluated(scope, args);
                if self.roles[role].broken {
                    return Err(Reported);
                }
                let home = self.home_of(role);
                let model = self.roles[role].model;
                self.inline(home, String::new(), &model.graph, span, args?)
            }
        }
    }

    fn evaluated(&mut self, scope: &mut Scope<'a>, args: &[Written]) -> R<Vec<(Option<Word>, Arg)>> {
        let mut all = Vec::new();
        let mut failed = false;
        for arg in args {
            match self.eval(scope, &arg.value) {
                Ok(value) => all.push((arg.name.clone(), Arg { span: arg.value.span, value })),
                Err(Reported) => failed = true,
            }
        }
        if failed { Err(Reported) } else { Ok(all) }
    }

    /// Computes another graph in place of its call.
    fn inline(
        &mut self,
        home: Home<'a>,
        prefix: String,
        source: &'a Source,
        span: Span,
        args: Vec<(Option<Word>, Arg)>,
    ) -> R<Val> {
        let name = &source.name.text;
        let identity = format!("{}:{}:{name}", source.name.span.source, source.name.span.line);
        if self.calls.contains(&identity) {
            return self.fail(
                Diag::error(format!("`{name}` calls itself, without an end"))
                    .label(span, "")
                    .label(source.name.span, "defined here"),
            );
        }
        self.check_size(span)?;
        let args = self.distribute(source, span, args)?;
        let before = self.errors.len();
        self.calls.push(identity);
        // A function computes for the model that calls it.
        let computing = home.role.or(self.computing);
        let outer = std::mem::replace(&mut self.computing, computing);
        let mut scope = Scope::new(home);
        scope.prefix = prefix;
        let entered = self.arguments(&mut scope, source, args);
        let result = entered.and_then(|()| {
            self.body(&mut scope, source);
            self.out(&mut scope, &source.out)
        });
        self.calls.pop();
        self.computing = outer;
        for error in &mut self.errors[before..] {
            // What is wrong inside depends on what was passed.
            let shown = error.labels.iter().any(|l| (l.span.source, l.span.line) == (span.source, span.line));
            if !shown && error.labels.len() < 4 {
                *error = error.clone().label(span, format!("in this call of `{name}`"));
            }
        }
        result
    }

    /// Ends what would never end; said once.
    fn check_size(&mut self, span: Span) -> R<()> {
        if self.exhausted {
            return Err(Reported);
        }
        let what = match (self.calls.len() >= MAX_CALLS, self.graph.len() >= MAX_OPS) {
            (true, _) => format!("calls within calls, {MAX_CALLS} deep"),
            (_, true) => format!("a graph of {MAX_OPS} ops"),
            _ => return Ok(()),
        };
        self.exhausted = true;
        let diag = Diag::error(format!("found {what}, expected less")).label(span, "");
        self.fail(diag.help("every call is computed in its place; a function that calls another twice doubles it"))
    }

    /// Arguments in the order of the inputs. A record without a name fills the inputs that are called like its
    /// members; anything else fills the next free one.
    fn distribute(&mut self, source: &Source, span: Span, args: Vec<(Option<Word>, Arg)>) -> R<Vec<Arg>> {
        let mut filled: Vec<Option<Arg>> = source.inputs.iter().map(|_| None).collect();
        let place = |name: &str| source.inputs.iter().position(|(n, _)| n.text == name);
        let name = &source.name.text;
        for (given, arg) in args {
            if let Some(given) = given {
                let Some(at) = place(&given.text) else {
                    let known: Vec<&str> = source.inputs.iter().map(|(n, _)| n.text.as_str()).collect();
                    let diag = Diag::error(format!(
                        "`{name}` has no input `{}`, expected one of {}",
                        given.text,
                        crate::schema::words(&known)
                    ));
                    return self.fail(diag.label(given.span, "").label(source.name.span, "defined here"));
                };
                if filled[at].replace(arg).is_some() {
                    let diag = Diag::error(format!("`{}` is given twice", given.text)).label(given.span, "");
                    return self.fail(diag);
                }
                continue;
            }
            if let Val::Record(record) = &arg.value {
                let fields = record.fields.iter().filter_map(|(field, value)| Some((place(field)?, value)));
                let free: Vec<_> = fields.filter(|(at, _)| filled[*at].is_none()).collect();
                if !free.is_empty() {
                    for (at, value) in free {
                        filled[at] = Some(Arg { span: arg.span, value: value.clone() });
                    }
                    continue;
                }
            }
            let Some(next) = filled.iter_mut().find(|f| f.is_none()) else {
                let diag = Diag::error(format!("found an argument too many, `{name}` has {} inputs", filled.len()));
                return self.fail(diag.label(arg.span, "").label(source.name.span, "defined here"));
            };
            *next = Some(arg);
        }
        let mut all = Vec::new();
        for (arg, (input, ty)) in filled.into_iter().zip(&source.inputs) {
            let Some(arg) = arg else {
                let diag = Diag::error(format!("`{name}` misses its input `{}`", input.text)).label(span, "");
                return self.fail(diag.label(ty.span, "declared here"));
            };
            all.push(arg);
        }
        Ok(all)
    }

    /// The lets and conditions of a graph whose inputs are bound.
    pub fn body(&mut self, scope: &mut Scope<'a>, source: &'a Source) {
        for (name, tree) in &source.lets {
            self.let_value(scope, name, tree);
        }
        self.asserts(scope, source);
    }

    /// What must hold: told at once where it is known when the file is read, and else an output of the graph that
    /// the plan calls, wherever the condition stands below it.
    pub fn asserts(&mut self, scope: &mut Scope<'a>, source: &'a Source) {
        for assert in &source.asserts {
            match self.eval(scope, &assert.condition) {
                Ok(Val::Static(Constant::Bool(true))) | Err(Reported) => {}
                Ok(Val::Static(Constant::Bool(false))) => {
                    let _: R<()> = self.fail(Diag::error(&assert.message.text).label(assert.condition.span, ""));
                }
                Ok(value) => {
                    let arg = Arg { span: assert.condition.span, value };
                    if let Ok(test) = self.tensor_of(&arg, DType::Bool) {
                        self.assert(arg.span, test, &assert.message.text);
                    }
                }
            }
        }
    }

    /// Notes a condition that is known when the graph runs: the smallest of its elements, so that it can be tested on
    /// a part of the rows at a time.
    fn assert(&mut self, span: Span, test: Value, message: &str) {
        let mut holds = self.cast(span, test, DType::F32);
        let axes: Vec<usize> = (0..self.ty(holds).rank()).collect();
        if !axes.is_empty() {
            holds = self.emit(span, Op::ReduceMin { axes }, &[holds]);
        }
        self.asserted.push(Asserted { holds, message: message.into(), span });
    }

    /// Computes a let and binds it.
    pub fn let_value(&mut self, scope: &mut Scope<'a>, name: &Word, tree: &Tree) {
        let value = self.out_tree(scope, tree, false).unwrap_or(Val::Bad);
        if let Val::Tensor(tensor) = &value
            && self.graph.name_of(*tensor).is_empty()
        {
            self.graph.set_name(*tensor, &name.text);
        }
        self.bind(scope, name, value);
    }

    /// The result of a graph.
    pub fn out(&mut self, scope: &mut Scope<'a>, tree: &Tree) -> R<Val> {
        self.out_tree(scope, tree, true)
    }

    fn out_tree(&mut self, scope: &mut Scope<'a>, tree: &Tree, outputs: bool) -> R<Val> {
        match tree {
            Tree::Expr(expr) => self.eval(scope, expr),
            Tree::Record(_, entries) => {
                let mut fields = Vec::new();
                let mut failed = false;
                for (name, tree) in entries {
                    match self.out_tree(scope, tree, false) {
                        Ok(value) => fields.push((name.text.clone(), value)),
                        Err(Reported) => failed = true,
                    }
                }
                if failed { Err(Reported) } else { Ok(Val::record(fields, outputs)) }
            }
        }
    }

    /// What the document of a role's model gives to its graphs.
    pub fn home_of(&self, role: usize) -> Home<'a> {
        let state = &self.roles[role];
        Home {
            statics: state.statics.clone(),
            graphs: &[],
            functions: state.functions.clone(),
            first: 0,
            role: Some(role),
            calls_models: false,
        }
    }

    /// `repeat(block, times=n, name="model.layers", x=x, ..)`: the block's result is its first input in the next
    /// layer. In the arguments, `i` is the layer's number.
    fn repeat(&mut self, scope: &mut Scope<'a>, span: Span, args: &[Written]) -> R<Val> {
        let Some(role) = scope.home.role else {
            return self.fail(Diag::error("found `repeat` outside of a model").label(span, ""));
        };
        let model = self.roles[role].model;
        let Some((Written { name: None, value: block }, rest)) = args.split_first() else {
            return self.fail(Diag::error("`repeat` misses its block").label(span, "").help(REPEAT_HELP));
        };
        let Some(found) = model.blocks.iter().find(|b| block.name() == Some(b.graph.name.text.as_str())) else {
            let known: Vec<&str> = model.blocks.iter().map(|b| b.graph.name.text.as_str()).collect();
            let diag = Diag::error(format!("found `{block}`, expected a block of this model")).label(block.span, "");
            return self.fail(match known.is_empty() {
                true => diag.help("write it under `blocks:`"),
                false => diag.help(format!("it has {}", crate::schema::words(&known))),
            });
        };
        let (settings, passed): (Vec<&Written>, Vec<&Written>) =
            rest.iter().partition(|a| a.name.as_ref().is_some_and(|n| n.text == "times" || n.text == "name"));
        let mut times = None;
        let mut name = None;
        for setting in settings {
            let value = self.eval(scope, &setting.value)?;
            match (setting.name.as_ref().map(|n| n.text.as_str()), &value) {
                (Some("times"), Val::Static(Constant::Int(n))) if (0..=MAX_LAYERS).contains(n) => {
                    times = Some(*n as u32);
                }
                (Some("name"), Val::Static(Constant::Str(text))) => name = Some(text.clone()),
                (given, _) => {
                    let expected = if given == Some("times") { "a number of layers" } else { "a text" };
                    let found = self.describe(&value);
                    let diag = Diag::error(format!("found {found}, expected {expected}"));
                    return self.fail(diag.label(setting.value.span, ""));
                }
            }
        }
        let (Some(times), Some(name)) = (times, name) else {
            return self.fail(Diag::error("`repeat` misses `times` or `name`").label(span, "").help(REPEAT_HELP));
        };
        // What does not depend on the layer is computed once, before the layers.
        let mut fixed: Vec<Option<Arg>> = Vec::new();
        for arg in &passed {
            fixed.push(match mentions(&arg.value, "i") {
                true => None,
                false => Some(Arg { span: arg.value.span, value: self.eval(scope, &arg.value)? }),
            });
        }
        let first_input = found.graph.inputs.first().map(|(name, _)| name.text.as_str());
        let carried = passed.iter().position(|a| match &a.name {
            Some(name) => Some(name.text.as_str()) == first_input,
            None => true,
        });
        let Some(carried) = carried else {
            let input = first_input.unwrap_or("x");
            let diag = Diag::error(format!("`repeat` misses `{input}`, which goes from layer to layer"));
            return self.fail(diag.label(span, "").help(REPEAT_HELP));
        };
        let mut carry: Option<Val> = None;
        let outer = self.tag.clone();
        for layer in 0..times {
            let mut all = Vec::new();
            for (at, (arg, fixed)) in passed.iter().zip(&fixed).enumerate() {
                let value = match (&carry, fixed) {
                    (Some(carry), _) if at == carried => Arg { span: arg.value.span, value: carry.clone() },
                    (_, Some(fixed)) => fixed.clone(),
                    (_, None) => {
                        let i = Word { span: arg.value.span, text: "i".into() };
                        self.bind(scope, &i, Val::int(layer.into()));
                        let value = self.eval(scope, &arg.value);
                        scope.unbind("i");
                        Arg { span: arg.value.span, value: value? }
                    }
                };
                all.push((arg.name.clone(), value));
            }
            let prefix = format!("{name}.{layer}.");
            let tag = Tag { block: name.as_str().into(), instance: layer };
            let declared = self.declare(role, &found.params, &prefix, Some(&tag));
            self.tag = Some(tag);
            let result = self.inline(self.home_of(role), prefix, &found.graph, span, all);
            self.tag = outer.clone();
            // The other layers would make the same mistakes.
            declared?;
            carry = Some(result?);
        }
        match carry {
            Some(value) => Ok(value),
            None => fixed.swap_remove(carried).map_or(Err(Reported), |arg| Ok(arg.value)),
        }
    }
}

const REPEAT_HELP: &str = "write `repeat(block, times=layers, name=\"model.layers\", x=x)`";
