//! What changes states outside of updates: first values of the recipe's states, `set`, and averages of models.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Op, StateId, StateKind, Type};

use crate::expr::{Expr, Word};

use super::scope::{Home, Scope};
use super::value::{Arg, Val};
use super::{Lowering, R};

/// New values of states, all computed from the old ones.
#[derive(Clone, Debug)]
pub struct Set {
    /// State and its new value.
    pub values: Vec<(Word, Expr)>,
    /// Names of the plan in those values, such as `exp.kl`, with their types.
    pub inputs: Vec<(String, Type)>,
}

/// A model that follows another: `average = decay * average + (1 - decay) * of`.
#[derive(Clone, Debug, PartialEq)]
pub struct Average {
    /// The role that follows.
    pub role: String,
    /// The role that it follows; both have the same model and config.
    pub of: String,
    /// Share of the old value.
    pub decay: f64,
}

/// Name of the program's state for a state of the recipe.
pub fn state_name(name: &str) -> String {
    format!("state/{name}")
}

/// Name of the graph that gives all states their first values. It has no inputs, and is there if there are states.
pub const STATE_INIT: &str = "state.init";

/// Name of the graph of the n-th `set` statement. Its inputs are the names of the plan in its values.
pub fn set_graph(n: usize) -> String {
    format!("set.{n}")
}

/// Name of the graph that moves a role's average on.
pub fn average_graph(role: &str) -> String {
    format!("{role}.average")
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
    pub fn set(&mut self, home: &Home<'a>, number: usize, set: &Set) {
        let before = self.errors.len();
        self.begin(&set_graph(number), &[]);
        let mut scope = Scope::new(home.clone());
        let used: Vec<(&str, Span)> = set.values.iter().flat_map(|(_, value)| value.names()).collect();
        // Inputs come before all ops, so before states are read.
        for (name, ty) in &set.inputs {
            let span = used.iter().find(|(n, _)| n == name).map_or(Span::NONE, |(_, span)| *span);
            let input = Val::Tensor(self.graph.input(name, ty.clone()));
            self.bind(&mut scope, &Word { span, text: name.clone() }, input);
        }
        for (name, span) in used {
            if let (None, Some(state)) = (scope.value(name), self.recipe_state(name)) {
                let value = Val::Tensor(self.read_state(span, state));
                self.bind(&mut scope, &Word { span, text: name.into() }, value);
            }
        }
        for (name, value) in &set.values {
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

    /// The graph of an average: `role = decay * role + (1 - decay) * of` for every parameter.
    pub fn average(&mut self, average: &Average) {
        let name = average_graph(&average.role);
        let role = |role: &str| {
            let found = self.roles.iter().position(|r| !r.is_trunk && r.name == role);
            found.unwrap_or_else(|| panic!("bug: {name} is of role `{role}`, which the stage lacks"))
        };
        let (mine, theirs) = (role(&average.role), role(&average.of));
        let (mine, theirs) = (self.all_params(mine), self.all_params(theirs));
        self.begin(&name, &[]);
        let short = |role: &str, whole: &str| whole[role.len()..].to_string();
        for own in mine {
            let state = self.program.state(own.state);
            let (ty, span) = (state.ty.clone(), state.span);
            let param = short(&average.role, &state.name);
            let other = theirs.iter().find(|o| short(&average.of, &self.program.state(o.state).name) == param);
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
