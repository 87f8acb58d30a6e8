//! What a name means (D7): one flat scope per graph, in which a name has one value.

use std::collections::BTreeMap;
use std::rc::Rc;

use dsgc_ir::Type;
use dsgc_ir::diag::{Diag, Span, nearest};

use crate::expr::{Expr, ExprKind, Item, Word};
use crate::functions::Functions;
use crate::graph::Graph as Source;
use crate::literal::Constant;

use super::call::mentions;
use super::params::Declared;
use super::value::{ParamRef, Record, Val};
use super::{Lowering, R};

/// A config entry, an option, or a token id.
#[derive(Clone, Debug)]
pub(super) struct Static {
    pub name: String,
    pub span: Span,
    /// `None` for a token that the tokenizer does not have.
    pub value: Option<Constant>,
}

/// What a document gives to the graphs in it.
#[derive(Clone)]
pub(super) struct Home<'a> {
    pub statics: Rc<[Static]>,
    /// Graphs of the same document.
    pub graphs: &'a [Source],
    /// Documents of functions in scope; an earlier one wins.
    pub functions: Rc<[&'a Functions]>,
    /// The first of these that comes before the builtins: that of a function itself, so that nobody's `sum` changes
    /// what the library's functions mean.
    pub first: usize,
    /// The role whose model this is.
    pub role: Option<usize>,
    /// Whether models can be called by their roles.
    pub calls_models: bool,
}

/// The names of one graph.
pub(super) struct Scope<'a> {
    pub home: Home<'a>,
    /// What stands before the names of parameters: `model.decoder.layers.0.` in a layer.
    pub prefix: String,
    names: Vec<Binding>,
}

struct Binding {
    name: String,
    span: Span,
    value: Val,
}

impl<'a> Scope<'a> {
    pub fn new(home: Home<'a>) -> Scope<'a> {
        Scope { home, prefix: String::new(), names: Vec::new() }
    }

    fn bound(&self, name: &str) -> Option<&Binding> {
        self.names.iter().find(|b| b.name == name)
    }

    /// The value of an input, a dim or a let.
    pub fn value(&self, name: &str) -> Option<&Val> {
        self.bound(name).map(|b| &b.value)
    }

    /// Takes back the binding of a name.
    pub fn unbind(&mut self, name: &str) {
        self.names.retain(|b| b.name != name);
    }

    fn static_named(&self, name: &str) -> Option<&Static> {
        self.home.statics.iter().find(|s| s.name == name)
    }
}

/// What a function's name means.
pub(super) enum Callee<'a> {
    Model(usize),
    /// A graph, and the document it stands in.
    Graph(&'a Source, Home<'a>),
    Builtin(&'static super::Builtin),
    Repeat,
}

impl<'a> Lowering<'a> {
    /// Binds a name; a second binding is an error that shows both places.
    pub fn bind(&mut self, scope: &mut Scope<'a>, name: &Word, value: Val) {
        let taken = scope
            .bound(&name.text)
            .map(|b| (b.span, "first bound here"))
            .or_else(|| scope.static_named(&name.text).map(|s| (s.span, "a value of that name is set here")))
            .or_else(|| self.role_span(scope, &name.text).map(|span| (span, "a model of that name")))
            .or_else(|| self.param_span(scope, &name.text).map(|span| (span, "parameters of that name")));
        if let Some((span, why)) = taken {
            let diag = Diag::error(format!("`{}` has two meanings", name.text)).label(name.span, "bound again here");
            let diag = match span.is_some() {
                true => diag.label(span, why),
                false => diag.help(format!("`{}` is the id of a token in every graph", name.text)),
            };
            let _: R<()> = self.fail(diag.help("give one of them another name"));
        }
        scope.names.push(Binding { name: name.text.clone(), span: name.span, value });
    }

    fn role_span(&self, scope: &Scope<'a>, name: &str) -> Option<Span> {
        self.model_named(scope, name).map(|role| self.roles[role].model.name.span)
    }

    /// The model that a graph calls by this name: that of a role of the recipe, or the one that this one is built upon.
    fn model_named(&self, scope: &Scope<'a>, name: &str) -> Option<usize> {
        if scope.home.calls_models {
            return self.roles.iter().position(|r| !r.is_trunk && r.name == name);
        }
        let (trunk, role) = self.roles[scope.home.role?].trunk?;
        (trunk == name).then_some(role)
    }

    /// The place of a parameter that is called so, or whose name begins so.
    fn param_span(&self, scope: &Scope<'a>, name: &str) -> Option<Span> {
        let found = self.param(scope, name)?;
        let ParamRef { role, name } = match &found {
            Val::Param(p) | Val::Group(p) => p,
            _ => return None,
        };
        let params = &self.roles[*role].params;
        params.get(name).or_else(|| first_of(params, name)).map(|d| d.param.name.span)
    }

    /// The parameter or the group of this name.
    fn param(&self, scope: &Scope<'a>, name: &str) -> Option<Val> {
        let role = scope.home.role?;
        let whole = format!("{}{name}", scope.prefix);
        let params = &self.roles[role].params;
        if params.contains_key(&whole) {
            return Some(Val::Param(ParamRef { role, name: whole }));
        }
        first_of(params, &whole).is_some().then_some(Val::Group(ParamRef { role, name: whole }))
    }

    /// The value of a name with dots.
    pub fn name(&mut self, scope: &Scope<'a>, name: &str, span: Span) -> R<Val> {
        // The plan's results are bound under their whole names: `exp.kl`.
        if let Some(binding) = scope.bound(name) {
            return Ok(binding.value.clone());
        }
        let mut parts = name.split('.');
        let first = parts.next().unwrap_or_default();
        let found = match (scope.bound(first), scope.static_named(first)) {
            (Some(binding), _) => Some(binding.value.clone()),
            (None, Some(Static { value: Some(value), .. })) => Some(Val::Static(value.clone())),
            (None, Some(Static { value: None, .. })) => {
                return self.fail(Diag::error(format!("the tokenizer has no `{first}` token")).label(span, ""));
            }
            (None, None) => None,
        };
        if let Some(mut value) = found {
            for part in parts {
                value = self.member(value, &Word { span, text: part.into() })?;
            }
            return Ok(value);
        }
        if let Some(value) = self.param(scope, name) {
            return Ok(value);
        }
        if name == "pi" {
            return Ok(Val::float(std::f64::consts::PI));
        }
        if let Some(role) = self.model_named(scope, first) {
            let mut value = Val::Model(role);
            for part in parts {
                value = self.member(value, &Word { span, text: part.into() })?;
            }
            return Ok(value);
        }
        self.undefined(scope, name, span)
    }

    fn undefined<T>(&mut self, scope: &Scope<'a>, name: &str, span: Span) -> R<T> {
        let diag = Diag::error(format!("`{name}` is not defined")).label(span, "");
        if self.callee(scope, name).is_some() {
            return self.fail(diag.help(format!("`{name}` is a function: write `{name}(..)`")));
        }
        if super::shape::is_dim(name) {
            return self.fail(
                diag.help(format!("the dim `{name}` must stand alone, or times a number, in the type of an input"))
                    .help("or follow from other dims under `dims:`"),
            );
        }
        let mut known: Vec<String> = scope.names.iter().map(|b| b.name.clone()).collect();
        known.extend(scope.home.statics.iter().map(|s| s.name.clone()));
        if let Some(role) = scope.home.role {
            for param in self.roles[role].params.keys() {
                if let Some(own) = param.strip_prefix(&scope.prefix) {
                    known.push(own.into());
                    known.extend(own.rsplit_once('.').map(|(group, _)| group.to_string()));
                }
            }
        }
        let near = nearest(name, known.iter().map(String::as_str)).map(String::from);
        self.fail(match near {
            Some(near) => diag.help(format!("write `{near}`")),
            None => diag,
        })
    }

    /// A member of a record.
    pub fn member(&mut self, value: Val, name: &Word) -> R<Val> {
        let record = match &value {
            Val::Record(record) => record,
            Val::Model(role) => &self.sizes_of(*role),
            Val::Bad => return Err(super::Reported),
            other => {
                let found = self.describe(other);
                return self.fail(
                    Diag::error(format!("found `.{}` after {found}, which has no members", name.text))
                        .label(name.span, ""),
                );
            }
        };
        if let Some(found) = record.get(&name.text) {
            return Ok(found.clone());
        }
        let known: Vec<&str> = record.fields.iter().map(|f| f.0.as_str()).collect();
        let diag = Diag::error(format!("found `.{}`, expected one of {}", name.text, crate::schema::words(&known)))
            .label(name.span, "");
        self.fail(match nearest(&name.text, known.iter().copied()) {
            Some(near) => diag.help(format!("write `.{near}`")),
            None => diag,
        })
    }

    /// What is known of a model's outputs before it is called: `trunk.hidden.size` is the last dim of `hidden`.
    fn sizes_of(&self, role: usize) -> Record {
        let size = |ty: &Type| ty.dims.last().map(|dim| ("size".to_string(), Val::dim(dim.clone())));
        let outputs = self.roles[role].outputs.iter();
        let fields = outputs.map(|(name, ty)| (name.clone(), Val::record(size(ty).into_iter().collect(), false)));
        Record { fields: fields.collect(), outputs: false }
    }

    /// What is called by this name: a model, a choice among functions, a graph of the file, one of the files of
    /// functions, a builtin.
    pub fn callee(&self, scope: &Scope<'a>, name: &str) -> Option<Callee<'a>> {
        if let Some(role) = self.model_named(scope, name) {
            return Some(Callee::Model(role));
        }
        if let Some(Static { value: Some(Constant::Str(chosen)), .. }) = scope.static_named(name)
            && chosen != name
        {
            return self.callee(scope, chosen);
        }
        if let Some(graph) = scope.home.graphs.iter().find(|g| g.name.text == name) {
            return Some(Callee::Graph(graph, scope.home.clone()));
        }
        let (later, earlier) = (scope.home.first..scope.home.functions.len(), 0..scope.home.first);
        if let Some(found) = self.shared(scope, name, later) {
            return Some(found);
        }
        if name == "repeat" {
            return Some(Callee::Repeat);
        }
        let builtin = super::BUILTINS.iter().find(|b| b.name == name).map(Callee::Builtin);
        builtin.or_else(|| self.shared(scope, name, earlier))
    }

    /// A graph of some of the documents of functions.
    fn shared(&self, scope: &Scope<'a>, name: &str, mut documents: std::ops::Range<usize>) -> Option<Callee<'a>> {
        documents.find_map(|first| {
            let document = scope.home.functions[first];
            let graph = document.graphs.iter().find(|g| g.name.text == name)?;
            let home = Home {
                statics: self.ids.clone(),
                graphs: &document.graphs,
                functions: scope.home.functions.clone(),
                first,
                role: None,
                calls_models: false,
            };
            Some(Callee::Graph(graph, home))
        })
    }

    /// The error for a call of something that does not exist.
    pub fn unknown_function<T>(&mut self, scope: &Scope<'a>, function: &Word) -> R<T> {
        let diag = Diag::error(format!("there is no function `{}`", function.text)).label(function.span, "");
        let roles = self.roles.iter().filter(|r| scope.home.calls_models && !r.is_trunk).map(|r| r.name.as_str());
        let own = scope.home.graphs.iter().map(|g| g.name.text.as_str());
        let shared = scope.home.functions.iter().flat_map(|f| &f.graphs).map(|g| g.name.text.as_str());
        let builtins = super::BUILTINS.iter().map(|b| b.name).chain(["repeat"]);
        let near = nearest(&function.text, roles.chain(own).chain(shared).chain(builtins)).map(String::from);
        let near = near.or_else(|| {
            let dtypes = ["float", "int", "long"].contains(&function.text.as_str());
            dtypes.then(|| if function.text == "float" { "f32".into() } else { "i32".into() })
        });
        self.fail(match near {
            Some(near) => diag.help(format!("write `{near}(..)`")),
            None => diag.help("`dsgc std list` shows all functions"),
        })
    }

    /// Checks that the names of an expression mean something, and nothing else: of the branch that is not taken.
    pub fn check_names(&mut self, scope: &Scope<'a>, expr: &Expr) -> R<()> {
        let mut all = Ok(());
        match &expr.kind {
            ExprKind::Name(name) => {
                let first = name.split('.').next().unwrap_or_default();
                // Values that are known are not looked into: members may belong to the other case.
                if scope.bound(first).is_none() && scope.static_named(first).is_none() {
                    all = self.name(scope, name, expr.span).map(|_| ());
                }
            }
            ExprKind::Call { function, args } => {
                if self.callee(scope, &function.text).is_none() {
                    all = self.unknown_function(scope, function);
                }
                // The block of a repeat is no value, and `i` is one in its arguments only.
                let repeat = usize::from(function.text == "repeat");
                for arg in args.iter().skip(repeat).filter(|a| repeat == 0 || !mentions(&a.value, "i")) {
                    all = all.and(self.check_names(scope, &arg.value));
                }
            }
            ExprKind::Member(base, _) => all = self.check_names(scope, base),
            ExprKind::Unary(_, x) => all = self.check_names(scope, x),
            ExprKind::Binary(_, a, b) => {
                all = self.check_names(scope, a);
                all = all.and(self.check_names(scope, b));
            }
            ExprKind::If { condition, then, otherwise } => {
                for part in [condition, then, otherwise] {
                    all = all.and(self.check_names(scope, part));
                }
            }
            ExprKind::List(items) => {
                for item in items {
                    all = all.and(self.check_names(scope, item));
                }
            }
            ExprKind::Index { base, items } => {
                all = self.check_names(scope, base);
                for item in items {
                    let parts = match item {
                        Item::At(x) => vec![x],
                        Item::Slice { start, stop, .. } => start.iter().chain(stop).collect(),
                        Item::New(_) | Item::Rest(_) => vec![],
                    };
                    for part in parts {
                        all = all.and(self.check_names(scope, part));
                    }
                }
            }
            ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Str(_) | ExprKind::Bool(_) | ExprKind::None => {}
        }
        all
    }
}

/// The first parameter whose name is `group`, a dot and more.
fn first_of<'p, 'a>(params: &'p BTreeMap<String, Declared<'a>>, group: &str) -> Option<&'p Declared<'a>> {
    let begin = format!("{group}.");
    let (name, found) = params.range(begin.clone()..).next()?;
    name.starts_with(&begin).then_some(found)
}
