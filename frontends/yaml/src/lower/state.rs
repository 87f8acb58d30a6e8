//! What a recipe keeps over steps: its states and their new values, and averages of models.

use crate::expr::{Expr, Word};

/// New values of states, all computed from the old ones.
#[derive(Clone, Debug)]
pub struct Set {
    /// State and its new value.
    pub values: Vec<(Word, Expr)>,
    /// Names of the plan in those values, with their types.
    pub inputs: Vec<(String, dsgc_ir::Type)>,
}

/// A model that follows another: `average = decay * average + (1 - decay) * of`.
#[derive(Clone, Debug, PartialEq)]
pub struct Average {
    /// The role that follows.
    pub role: String,
    /// The role that it follows.
    pub of: String,
    /// Share of the old value.
    pub decay: f64,
}

/// Name of the program's state for a state of the recipe.
pub fn state_name(name: &str) -> String {
    format!("state/{name}")
}

/// Name of the graph that gives all states their first values.
pub const STATE_INIT: &str = "state.init";

/// Name of the graph of the n-th `set` statement.
pub fn set_graph(n: usize) -> String {
    format!("set.{n}")
}

/// Name of the graph that moves a role's average on.
pub fn average_graph(role: &str) -> String {
    format!("{role}.average")
}
