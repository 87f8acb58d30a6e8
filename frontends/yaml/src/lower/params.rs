//! Parameters: their states, and the graph that gives them their first values.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Dim, Op, StateId, StateKind, Tag, Type, Value};

use crate::expr::{Expr, ExprKind};
use crate::model::Param;

use super::scope::Scope;
use super::sweep::states_read;
use super::value::{Arg, ParamRef, Val};
use super::{Lowering, R, Reported, RoleState};

/// A parameter of a role.
pub(super) struct Declared<'a> {
    pub param: &'a Param,
    /// `None` where its `when` is false; an error where its declaration is wrong.
    pub state: R<Option<StateId>>,
}

/// A parameter with a state.
#[derive(Clone)]
pub(super) struct Own {
    pub state: StateId,
    pub init: Init,
    /// The layer that it belongs to.
    pub tag: Option<Tag>,
}

/// How a parameter begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Init {
    Constant(f64),
    Normal { mean: f64, std: f64 },
    Uniform { low: f64, high: f64 },
}

/// Standard deviation of parameters where a model says nothing.
const STD: f64 = 0.02;

impl<'a> Lowering<'a> {
    /// Declares the parameters of all roles, and checks their graphs whether they are called or not.
    pub fn models(&mut self) {
        for role in 0..self.roles.len() {
            let before = self.errors.len();
            self.computing = Some(role);
            self.model(role);
            self.computing = None;
            let below = self.roles[role].trunk.is_some_and(|(_, trunk)| self.roles[trunk].broken);
            self.roles[role].broken = below || self.errors.len() > before;
        }
    }

    fn model(&mut self, role: usize) {
        let model = self.roles[role].model;
        if self.trunk(role).is_err() {
            return;
        }
        // Uses of parameters that are wrong are silent; the rest of the graph is not.
        let _ = self.declare(role, &model.params, "", None);
        self.begin(&format!("{}.forward", self.roles[role].name), &[]);
        let mut scope = Scope::new(self.home_of(role));
        self.symbols(&mut scope, &model.graph, |symbol| Some(Dim::symbol(symbol)), "");
        self.host_inputs(&mut scope, &model.graph);
        self.body(&mut scope, &model.graph);
        // Whatever is wrong has been noted.
        let Ok(out) = self.out(&mut scope, &model.graph.out) else { return };
        let mut tensors = Vec::new();
        leaves(&out, "", &mut tensors);
        let mut roots: Vec<Value> = tensors.iter().map(|(_, value)| *value).collect();
        roots.extend(self.asserted.iter().map(|assert| assert.holds));
        self.roles[role].needs = states_read(&self.graph, &roots);
        self.roles[role].outputs = tensors.into_iter().map(|(name, v)| (name, self.ty(v).clone())).collect();
    }

    /// Checks that a model which is built upon another has exactly this one.
    fn trunk(&mut self, role: usize) -> R<()> {
        let RoleState { model, trunk, is_trunk, .. } = &self.roles[role];
        let name = &model.name.text;
        let (diag, decl) = match (model.models.first(), trunk) {
            (None, None) => return Ok(()),
            // What is wrong with it has been said.
            (Some(_), Some((_, trunk))) if self.roles[*trunk].broken => return Err(Reported),
            (Some(_), Some(_)) => return Ok(()),
            (Some(decl), None) if *is_trunk => {
                let diag = Diag::error(format!("found a model over `{name}`, which is built upon a model itself"));
                (diag.help("a model is built upon one that has no `models`"), decl)
            }
            (Some(decl), None) => {
                let diag = Diag::error(format!("found `{name}` alone, expected it over another model"));
                (diag.help("let the role have a `type`, and bind it to the other model"), decl)
            }
            (None, Some(_)) => panic!("bug: model `{name}` is bound over another one"),
        };
        self.fail(diag.label(decl.name.span, ""))
    }

    /// Declares parameters, unless that has been done for an earlier call of the model.
    pub fn declare(&mut self, role: usize, params: &'a [Param], prefix: &str, tag: Option<&Tag>) -> R<()> {
        let mut scope = Scope::new(self.home_of(role));
        let mut all = Ok(());
        for param in params {
            let name = format!("{prefix}{}", param.name.text);
            let of_trunk = self.roles[role].trunk.and_then(|(_, trunk)| self.roles[trunk].params.get(&name));
            match self.roles[role].params.get(&name).or(of_trunk) {
                Some(known) if std::ptr::eq(known.param, param) => continue,
                Some(known) => {
                    let diag = Diag::error(format!("the parameter `{name}` is declared twice"))
                        .label(param.name.span, "")
                        .label(known.param.name.span, "first declared here");
                    all = self.fail(diag);
                    continue;
                }
                None => {}
            }
            if let Some(other) = shadow(&scope, &param.name.text) {
                let first = param.name.text.split('.').next().unwrap_or_default();
                let diag = Diag::error(format!("`{first}` has two meanings"))
                    .label(param.name.span, "a parameter's name begins so")
                    .label(other, "a value of that name is set here")
                    .help("give the value another name");
                all = self.fail(diag);
            }
            let exists = match &param.when {
                Some(when) => self.condition(&mut scope, when),
                None => Ok(true),
            };
            let state = match exists {
                Ok(true) => self.state(&mut scope, role, param, &name, tag).map(Some),
                Ok(false) => Ok(None),
                Err(Reported) => Err(Reported),
            };
            all = all.and(state.map(|_| ()));
            self.roles[role].params.insert(name, Declared { param, state });
        }
        all
    }

    fn state(
        &mut self,
        scope: &mut Scope<'a>,
        role: usize,
        param: &Param,
        name: &str,
        tag: Option<&Tag>,
    ) -> R<StateId> {
        // All of them, so that all errors are told.
        let dims: Vec<R<Dim>> = param.shape.iter().map(|expr| self.extent(scope, expr)).collect();
        let dims: Vec<Dim> = dims.into_iter().collect::<R<_>>()?;
        self.check_elements(&dims, param.name.span)?;
        let model = self.roles[role].model;
        let init = match param.init.as_ref().or(model.init.as_ref()) {
            Some(expr) => self.init_of(scope, expr)?,
            None => Init::Normal { mean: 0.0, std: STD },
        };
        let whole = format!("{}/{name}", self.roles[role].name);
        let kind = StateKind::Param { trained: self.roles[role].trained };
        let id = self.program.declare(whole, Type::new(DType::F32, dims), kind, param.name.span);
        self.roles[role].own.push(Own { state: id, init, tag: tag.cloned() });
        Ok(id)
    }

    /// A dim of a parameter.
    fn extent(&mut self, scope: &mut Scope<'a>, expr: &Expr) -> R<Dim> {
        let dim = self.dim(scope, expr)?;
        match dim.constant() {
            Some(n) if (1..=i32::MAX.into()).contains(&n) => Ok(dim),
            _ => self.fail(
                Diag::error(format!("found a size of {dim}, expected one from 1 to {}", i32::MAX)).label(expr.span, ""),
            ),
        }
    }

    /// `zeros`, `ones`, `normal(std)`, `uniform(low, high)`.
    fn init_of(&mut self, scope: &mut Scope<'a>, expr: &Expr) -> R<Init> {
        match &expr.kind {
            ExprKind::Name(name) if name == "zeros" => return Ok(Init::Constant(0.0)),
            ExprKind::Name(name) if name == "ones" => return Ok(Init::Constant(1.0)),
            ExprKind::Call { function, args } => {
                let mut numbers = Vec::new();
                for arg in args {
                    match self.eval(scope, &arg.value)? {
                        Val::Static(ref c) if c.number().is_some() => numbers.extend(c.number()),
                        other => {
                            let found = self.describe(&other);
                            let diag = Diag::error(format!("found {found}, expected a number"));
                            return self.fail(diag.label(arg.value.span, ""));
                        }
                    }
                }
                match (function.text.as_str(), numbers.as_slice()) {
                    ("normal", [std]) => return Ok(Init::Normal { mean: 0.0, std: *std }),
                    ("uniform", [low, high]) => return Ok(Init::Uniform { low: *low, high: *high }),
                    _ => {}
                }
            }
            _ => {}
        }
        self.fail(
            Diag::error(format!("found `{expr}`, expected how a parameter begins"))
                .label(expr.span, "")
                .help("write `zeros`, `ones`, `normal(std)` or `uniform(low, high)`"),
        )
    }

    /// The value of a parameter.
    pub fn read(&mut self, span: Span, param: &ParamRef) -> R<Value> {
        let declared = self.roles[param.role].params.get(&param.name);
        let Some(declared) = declared else { panic!("bug: parameter `{}` was not declared", param.name) };
        match (declared.state, &declared.param.when) {
            (Err(Reported), _) => Err(Reported),
            (Ok(Some(state)), _) => Ok(self.read_state(span, state)),
            (Ok(None), when) => {
                let when = when.as_ref().map_or(Span::NONE, |when| when.span);
                let diag = Diag::error(format!("the parameter `{}` does not exist here", param.name))
                    .label(span, "")
                    .label(when, "which is false with this config")
                    .help("write `a if condition else b` with the same condition");
                self.fail(diag)
            }
        }
    }

    /// A member of a group, if it is declared and exists.
    pub fn optional(&mut self, span: Span, group: &ParamRef, member: &str) -> R<Option<Value>> {
        let name = format!("{}.{member}", group.name);
        match self.roles[group.role].params.get(&name) {
            Some(declared) => Ok(declared.state?.map(|state| self.read_state(span, state))),
            None => Ok(None),
        }
    }

    /// Weight and bias of an argument that names a group, or the weight alone.
    pub fn group(&mut self, arg: &Arg) -> R<(Value, Option<Value>)> {
        let Val::Group(group) = &arg.value else {
            return Ok((self.tensor(arg)?, None));
        };
        let weight = ParamRef { role: group.role, name: format!("{}.weight", group.name) };
        if !self.roles[group.role].params.contains_key(&weight.name) {
            let diag = Diag::error(format!("there is no parameter `{}`", weight.name)).label(arg.span, "");
            return self.fail(diag);
        }
        let weight = self.read(arg.span, &weight)?;
        Ok((weight, self.optional(arg.span, group, "bias")?))
    }

    /// The parameters of a role: those of the model it is built upon, then its own.
    pub fn all_params(&self, role: usize) -> Vec<Own> {
        let role = &self.roles[role];
        let trunk = role.trunk.map_or(&[][..], |(_, trunk)| &self.roles[trunk].own);
        trunk.iter().chain(&role.own).cloned().collect()
    }

    /// The graph that writes first values to every parameter of a role; each draws from a key of its own.
    pub fn init(&mut self, role: usize) {
        let name = super::init_graph(&self.roles[role].name);
        self.begin(&name, &[]);
        let key = self.graph.input("key", Type::scalar(DType::Key));
        for (number, Own { state: id, init, .. }) in self.all_params(role).into_iter().enumerate() {
            let state = self.program.state(id);
            let (ty, span) = (state.ty.clone(), state.span);
            let shape = ty.dims.clone();
            let value = match init {
                Init::Constant(value) => {
                    let scalar = self.scalar(span, value, DType::F32);
                    self.stretch(span, scalar, &shape)
                }
                Init::Normal { mean, std } => {
                    let own = self.emit(span, Op::Fold { data: number as u64 }, &[key]);
                    self.emit(span, Op::RandomNormal { shape, mean, std }, &[own])
                }
                Init::Uniform { low, high } => {
                    let own = self.emit(span, Op::Fold { data: number as u64 }, &[key]);
                    self.emit(span, Op::RandomUniform { shape, low, high }, &[own])
                }
            };
            self.write(span, id, &ty, value);
        }
        self.program.graphs.push(std::mem::take(&mut self.graph));
    }
}

/// The tensors of a result, by their names with dots.
fn leaves(value: &Val, name: &str, tensors: &mut Vec<(String, Value)>) {
    match value {
        Val::Tensor(value) => tensors.push((name.into(), *value)),
        Val::Record(record) => {
            for (field, value) in &record.fields {
                let whole = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                leaves(&value.clone().single(), &whole, tensors);
            }
        }
        _ => {}
    }
}

/// The place of a config entry whose name is the first part of a parameter's.
fn shadow(scope: &Scope<'_>, param: &str) -> Option<Span> {
    let first = param.split('.').next()?;
    scope.home.statics.iter().find(|s| s.name == first).map(|s| s.span)
}
