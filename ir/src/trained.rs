//! Which parameters a stage trains: what the settings of a training mean for the names of its model.
//!
//! The loader asks to tell the user what is wrong, the pass `adapt` to do it.

use crate::diag::{Diag, closest};
use crate::graph::StateId;
use crate::program::Program;
use crate::stage::{Pattern, Training, glob};

/// The parameters of a trained role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Those that have gradients.
    pub trained: Vec<StateId>,
    /// Those that stay as they are.
    pub frozen: Vec<StateId>,
}

/// Chooses among the parameters of a training's role. All that is wrong with its patterns comes at once.
pub fn choose(program: &Program, training: &Training) -> Result<Choice, Vec<Diag>> {
    let params: Vec<(StateId, &str)> = program.params_of(&training.role).collect();
    let errors: Vec<Diag> = training
        .freeze
        .iter()
        .filter(|pattern| !params.iter().any(|(_, name)| glob(&pattern.glob, name)))
        .map(|pattern| names_nothing("freeze", pattern, &training.role, params.iter().map(|(_, name)| *name)))
        .collect();
    if !errors.is_empty() {
        return Err(errors);
    }
    let frozen = |name: &str| training.freeze.iter().any(|pattern| glob(&pattern.glob, name));
    let (frozen, trained): (Vec<_>, Vec<_>) = params.iter().partition(|(_, name)| frozen(name));
    if let (true, Some(first)) = (trained.is_empty(), training.freeze.first()) {
        let diag = Diag::error(format!("`freeze` leaves no parameter of `{}` to train", training.role));
        return Err(vec![diag.label(first.span, "").help("a role that is not trained needs no `freeze`")]);
    }
    let ids = |params: Vec<(StateId, &str)>| params.into_iter().map(|(id, _)| id).collect();
    Ok(Choice { trained: ids(trained), frozen: ids(frozen) })
}

/// The error for a pattern that matches none of the names that it could.
fn names_nothing<'a>(key: &str, pattern: &Pattern, role: &str, known: impl Iterator<Item = &'a str>) -> Diag {
    let names: Vec<String> = closest(&pattern.glob, known, 3).into_iter().map(|name| format!("`{name}`")).collect();
    Diag::error(format!("`{}` names no parameter of `{role}`", pattern.glob))
        .label(pattern.span, format!("in `{key}` here"))
        .help(format!("the nearest are {}; `*` stands for any run of characters", names.join(", ")))
}
