//! What changes states outside of updates: first values of the recipe's states, `set`, and averages of models.

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Op, StateId, StateKind, Type};

use crate::expr::{Expr, Word};

use super::scope::{Home, Scope};
use super::value::{Arg, Val};
use super::{Average, Lowering, R, STATE_INIT, Set, average_graph, set_graph, state_name};

/// An average of which both roles are known.
pub(super) struct Averaged {
    span: Span,
    /// The average, by number.
    role: usize,
    /// What it follows.
    of: usize,
    decay: f64,
}

impl<'a> Lowering<'a> {
    /// Declares the states of the recipe, and makes the graph that writes their first values.
    pub fn recipe_states(&mut self, home: &Home<'a>, states: &[(Word, Expr)]) {
        if states.is_empty() {
            return;
        }
        self.begin(STATE_INIT, &[]);
        let mut scope = Scope::new(home.clone());
        let before = self.errors.len();
        for (name, init) in states {
            let Ok(value) = self.eval(&mut scope, init) else { continue };
            let Ok(value) = self.as_tensor(&Arg { span: init.span, value }, DType::F32) else { continue };
            let ty = self.ty(value).clone();
            let id = self.program.declare(state_name(&name.text), ty.clone(), StateKind::State, name.span);
            self.write(init.span, id, &ty, value);
        }
        if self.errors.len() == before {
            self.program.graphs.push(std::mem::take(&mut self.graph));
        }
    }

    /// The state of the recipe with this name.
    fn recipe_state(&self, name: &str) -> Option<StateId> {
        self.program.state_named(&state_name(name))
    }

    /// Makes the graph of a `set` statement. All values are computed from the states as they were before.
    pub fn set(&mut self, home: &Home<'a>, number: usize, set: &Set<'_>) {
        let before = self.errors.len();
        self.begin(&set_graph(number), &[]);
        let mut scope = Scope::new(home.clone());
        let mut used: BTreeMap<&str, Span> = BTreeMap::new();
        for (name, span) in set.values.iter().flat_map(|(_, value)| value.names()) {
            used.entry(name).or_insert(span);
        }
        // Inputs come before all ops, so before states are read.
        for (&name, &span) in &used {
            let first = name.split('.').next().unwrap_or(name);
            let known = home.statics.iter().any(|s| s.name == first) || name == "pi";
            if !known && self.recipe_state(first).is_none() {
                let ty = set.inputs.get(name).cloned().unwrap_or_else(|| Type::scalar(DType::F32));
                let input = Val::Tensor(self.graph.input(name, ty));
                self.bind(&mut scope, &Word { span, text: name.into() }, input);
            }
        }
        for (&name, &span) in &used {
            if let Some(state) = self.recipe_state(name) {
                let value = Val::Tensor(self.read_state(span, state));
                self.bind(&mut scope, &Word { span, text: name.into() }, value);
            }
        }
        for (name, value) in set.values {
            let Some(state) = self.recipe_state(&name.text) else {
                let diag = Diag::error(format!("found `{}`, expected a state of this recipe", name.text));
                let _: R<()> =
                    self.fail(diag.label(name.span, "").help("declare it with its first value under `state`"));
                continue;
            };
            let ty = self.program.state(state).ty.clone();
            let Ok(found) = self.eval(&mut scope, value) else { continue };
            let Ok(found) = self.as_tensor(&Arg { span: value.span, value: found }, DType::F32) else { continue };
            let Ok(found) = self.fitted(name.span, (found, value.span), &ty.dims) else { continue };
            self.write(value.span, state, &ty, found);
        }
        if self.errors.len() == before {
            self.program.graphs.push(std::mem::take(&mut self.graph));
        }
    }

    /// Finds the roles and the number of an average.
    pub fn average(&mut self, home: &Home<'a>, average: &Average<'_>) -> R<Averaged> {
        let role = |name: &str| match self.roles.iter().position(|r| !r.is_trunk && r.name == name) {
            Some(role) => role,
            None => panic!("bug: an average of role `{name}`, which the stage lacks"),
        };
        let (role, of) = (role(average.role), role(average.of));
        let span = average.decay.span;
        self.begin(&average_graph(average.role), &[]);
        let value = self.eval(&mut Scope::new(home.clone()), average.decay)?;
        match &value {
            Val::Static(c) if c.number().is_some_and(|x| (0.0..=1.0).contains(&x)) => {
                Ok(Averaged { span, role, of, decay: c.number().unwrap_or_default() })
            }
            other => {
                let found = self.describe(other);
                let diag = Diag::error(format!("found {found}, expected a number from 0 to 1")).label(span, "");
                self.fail(diag.help("it says how much of the old value stays"))
            }
        }
    }

    /// The graph of an average: `role = decay * role + (1 - decay) * of` for every parameter.
    pub fn averaged(&mut self, average: &Averaged) {
        let span = average.span;
        let name = average_graph(&self.roles[average.role].name);
        self.begin(&name, &[]);
        let (mine, theirs) = (self.all_params(average.role), self.all_params(average.of));
        let short = |role: &str, whole: &str| whole[role.len()..].to_string();
        for own in mine {
            let ty = self.program.state(own.state).ty.clone();
            let param = short(&self.roles[average.role].name, &self.program.state(own.state).name);
            let of = &self.roles[average.of].name;
            let other = theirs.iter().find(|o| short(of, &self.program.state(o.state).name) == param);
            let Some(other) = other.filter(|o| self.program.state(o.state).ty == ty) else {
                panic!("bug: in {name}, the models do not have the same parameter `{param}`");
            };
            self.tag = own.tag;
            let [old, new] = [own.state, other.state].map(|state| self.read_state(span, state));
            let parts = [(old, average.decay), (new, 1.0 - average.decay)].map(|(value, factor)| {
                let factor = self.scalar(span, factor, DType::F32);
                let factor = self.stretch(span, factor, &ty.dims);
                self.emit(span, Op::Mul {}, &[factor, value])
            });
            let sum = self.emit(span, Op::Add {}, &parts);
            self.write(span, own.state, &ty, sum);
        }
        self.tag = None;
        self.program.graphs.push(std::mem::take(&mut self.graph));
    }
}
