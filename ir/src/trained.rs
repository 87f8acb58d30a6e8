//! Which parameters a stage trains: what the settings of a training mean for the names of its model.
//!
//! The loader asks to tell the user what is wrong, the pass `adapt` to do it.

use std::collections::{BTreeMap, BTreeSet};

use crate::diag::{Diag, closest};
use crate::graph::{Graph, StateId, Value};
use crate::infer::Contraction;
use crate::op::Op;
use crate::program::Program;
use crate::stage::{Lora, Pattern, Targets, Training, glob};

/// The parameters of a trained role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Those that have gradients.
    pub trained: Vec<StateId>,
    /// Those that stay as they are.
    pub frozen: Vec<StateId>,
    /// Frozen weights beside which low-rank factors are trained.
    pub adapted: Vec<StateId>,
}

/// A parameter with its Hugging Face name.
type Named<'a> = (StateId, &'a str);

/// Chooses among the parameters of a training's role. All that is wrong with its patterns comes at once.
pub fn choose(program: &Program, training: &Training) -> Result<Choice, Vec<Diag>> {
    let params: Vec<Named> = program.params_of(&training.role).collect();
    let names = || params.iter().map(|(_, name)| *name);
    let mut errors: Vec<Diag> = Vec::new();
    for pattern in training.freeze.iter().filter(|pattern| !names().any(|name| glob(&pattern.glob, name))) {
        errors.push(names_nothing(("freeze", "parameter"), pattern, &training.role, names()));
    }
    let adapted = match &training.lora {
        Some(lora) => adapted(program, &training.role, lora, &params, &mut errors),
        None => Vec::new(),
    };
    if !errors.is_empty() {
        return Err(errors);
    }
    let role = program.stage.roles.iter().find(|role| role.name == training.role);
    let new = role.map_or(&[][..], |role| &role.model.tensors.may_be_new[..]);
    let stays = |name: &str| {
        training.freeze.iter().any(|pattern| glob(&pattern.glob, name))
            || (training.lora.is_some() && !new.iter().any(|pattern| glob(pattern, name)))
    };
    let (frozen, trained): (Vec<Named>, Vec<Named>) =
        params.iter().partition(|(id, name)| stays(name) || adapted.contains(id));
    if let (true, None, Some(first)) = (trained.is_empty(), &training.lora, training.freeze.first()) {
        let diag = Diag::error(format!("`freeze` leaves no parameter of `{}` to train", training.role));
        return Err(vec![diag.label(first.span, "").help("a role that is not trained needs no `freeze`")]);
    }
    let ids = |params: Vec<Named>| params.into_iter().map(|(id, _)| id).collect();
    Ok(Choice { trained: ids(trained), frozen: ids(frozen), adapted })
}

/// The error for a pattern that matches none of the names that it could.
fn names_nothing<'a>(
    (key, what): (&str, &str),
    pattern: &Pattern,
    role: &str,
    known: impl Iterator<Item = &'a str>,
) -> Diag {
    let names: Vec<String> = closest(&pattern.glob, known, 3).into_iter().map(|name| format!("`{name}`")).collect();
    Diag::error(format!("`{}` names no {what} of `{role}`", pattern.glob))
        .label(pattern.span, format!("in `{key}` here"))
        .help(format!("the nearest are {}; `*` stands for any run of characters", names.join(", ")))
}

/// The weights that get low-rank factors.
fn adapted(program: &Program, role: &str, lora: &Lora, params: &[Named], errors: &mut Vec<Diag>) -> Vec<StateId> {
    let linear = linear_weights(program);
    let layers: Vec<Named> =
        params.iter().filter_map(|(id, name)| Some((*id, name.strip_suffix(".weight")?))).collect();
    let patterns = match &lora.targets {
        Targets::Named(patterns) => patterns,
        Targets::AllLinear => {
            let ids = layers.iter().map(|(id, _)| *id).filter(|id| linear.contains(id));
            let found: Vec<StateId> = ids.filter(|&id| !is_head(program, role, id)).collect();
            if found.is_empty() {
                let diag = Diag::error(format!("`{role}` has no linear layer but its head"));
                errors.push(diag.label(lora.span, "LoRA is asked for here"));
            }
            return found;
        }
    };
    let mut found = BTreeSet::new();
    for pattern in patterns {
        let is_glob = pattern.glob.contains('*');
        let matches = |name: &str| match is_glob {
            true => glob(&pattern.glob, name),
            false => name.strip_suffix(&pattern.glob).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
        };
        let (fit, odd): (Vec<Named>, Vec<Named>) =
            layers.iter().filter(|(_, name)| matches(name)).partition(|(id, _)| linear.contains(id));
        match (fit.is_empty(), odd.first()) {
            // A glob may span layers of all kinds; a name means its own.
            (_, Some((_, name))) if !is_glob || fit.is_empty() => {
                let diag = Diag::error(format!("`{name}` is no linear layer, which LoRA needs"));
                errors.push(diag.label(pattern.span, "named here").help("it goes beside weights of `linear`: not of norms, and not of embeddings, which may be the head too"));
            }
            (true, _) => {
                let linear = layers.iter().filter(|(id, _)| linear.contains(id)).map(|(_, name)| *name);
                // Of a name that is no glob, ends of as many parts.
                let parts = pattern.glob.matches('.').count() + 1;
                let known: BTreeSet<&str> =
                    linear.map(|name| if is_glob { name } else { end_of(name, parts) }).collect();
                errors.push(names_nothing(("lora_target_modules", "layer"), pattern, role, known.into_iter()));
            }
            (false, _) => found.extend(fit.iter().map(|(id, _)| *id)),
        }
    }
    found.into_iter().collect()
}

/// The last parts of a name.
fn end_of(name: &str, parts: usize) -> &str {
    name.rmatch_indices('.').nth(parts - 1).map_or(name, |(dot, _)| &name[dot + 1..])
}

/// The values of parameters and states in a graph.
pub fn reads(graph: &Graph) -> BTreeMap<Value, StateId> {
    let read = graph.ops().filter_map(|(_, op)| match op.op {
        Op::Read { state } => Some((op.result(), state)),
        _ => None,
    });
    read.collect()
}

/// The values of parameters and states in a graph, in whatever type they are taken.
pub fn reads_of_any_type(graph: &Graph) -> BTreeMap<Value, StateId> {
    let mut reads = reads(graph);
    for (_, op) in graph.ops() {
        if let (Op::Cast { .. }, Some(&state)) = (&op.op, op.args.first().and_then(|arg| reads.get(arg))) {
            reads.insert(op.result(), state);
        }
    }
    reads
}

/// The weights of a role's linear layers: all but that of its head, and tables of embeddings.
pub fn weights_of_layers(program: &Program, role: &str) -> BTreeSet<StateId> {
    let linear = linear_weights(program);
    let own = program.params_of(role).map(|(id, _)| id);
    own.filter(|id| linear.contains(id) && !is_head(program, role, *id)).collect()
}

/// Parameters that are the weight of a linear layer and never the table of an embedding.
fn linear_weights(program: &Program) -> BTreeSet<StateId> {
    let (mut linear, mut tables) = (BTreeSet::new(), BTreeSet::new());
    for graph in &program.graphs {
        let reads = reads_of_any_type(graph);
        for (_, op) in graph.ops() {
            for (at, state) in op.args.iter().enumerate().filter_map(|(at, arg)| Some((at, *reads.get(arg)?))) {
                match &op.op {
                    Op::Contract { spec } if low_rank(spec, at).is_some() => drop(linear.insert(state)),
                    Op::Embed {} => drop(tables.insert(state)),
                    _ => {}
                }
            }
        }
    }
    &linear - &tables
}

/// The contractions that two factors of low rank take in the place of one by a weight `[out, in]`, the operand number
/// `weight`: of the other operand with `A: [r, in]`, and of that with `B: [out, r]`. `None` where it is no linear layer.
pub fn low_rank(spec: &str, weight: usize) -> Option<[String; 2]> {
    let Contraction { lhs, rhs, out, wide } = Contraction::parse(spec).ok()?;
    let (x, w) = if weight == 0 { (rhs, lhs) } else { (lhs, rhs) };
    let &[o, i] = &w[..] else { return None };
    let kept = out.iter().filter(|c| **c != o).all(|c| x.contains(c));
    if !kept || !out.contains(&o) || out.contains(&i) || !x.contains(&i) || x.contains(&o) || out.len() != x.len() {
        return None;
    }
    let r = ('a'..='z').find(|c| ![&x, &w, &out].iter().any(|side| side.contains(c)))?;
    let inner: Vec<char> = out.iter().map(|&c| if c == o { r } else { c }).collect();
    let down = Contraction { lhs: x, rhs: vec![r, i], out: inner.clone(), wide };
    let up = Contraction { lhs: inner, rhs: vec![o, r], out, wide };
    Some([down.spec(), up.spec()])
}

/// Whether a weight belongs to the head: it lies outside of all repeated layers, and in no graph comes another matrix of
/// the model after it.
fn is_head(program: &Program, role: &str, weight: StateId) -> bool {
    let matrices: BTreeSet<StateId> =
        program.params_of(role).map(|(id, _)| id).filter(|&id| program.state(id).ty.rank() > 1).collect();
    program.graphs.iter().all(|graph| {
        let reads = reads_of_any_type(graph);
        let mut after = vec![false; graph.values().len()];
        graph.ops().all(|(_, op)| {
            let own = matches!(op.op, Op::Read { state } if state == weight);
            let depends = own || op.args.iter().any(|a| after[a.0 as usize]);
            op.results().for_each(|r| after[r.0 as usize] = depends);
            let others = op.args.iter().filter_map(|a| reads.get(a)).any(|s| *s != weight && matrices.contains(s));
            !(own && op.site.tag.is_some() || depends && others)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::low_rank;

    #[test]
    fn low_rank_products_are_those_of_linear_layers() {
        let specs = |spec, weight| low_rank(spec, weight).map(|[down, up]| format!("{down} {up}"));
        assert_eq!(specs("btd,vd->btv", 1).as_deref(), Some("btd,ad->bta bta,va->btv"));
        assert_eq!(specs("oi,bi->bo", 0).as_deref(), Some("bi,ai->ba ba,oa->bo"));
        // The transposed weight, a sum over rows, and a product that is no layer.
        assert_eq!(specs("bo,oi->bi", 1), None);
        assert_eq!(specs("bi,oi->o", 1), None);
        assert_eq!(specs("bi,bi->b", 1), None);
    }
}
