//! What is seen of a plan before it is read: which graphs it calls, and conditions that are known.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;

use crate::expr::{Arg, Expr, ExprKind, Item};
use crate::literal::Constant;
use crate::plan::Step;

/// What a plan calls, before anything is known of its values.
#[derive(Debug, Default)]
pub struct Called {
    /// Graphs of the recipe.
    pub graphs: Vec<String>,
    /// Roles that generate.
    pub generates: Vec<String>,
}

impl Called {
    /// Everything in the branches that are taken; mistakes are told when the plan is read.
    pub fn by(plan: &[Step], evaluate: &[Expr], decide: &dyn Fn(&Expr) -> Option<bool>) -> Called {
        let mut called = Called::default();
        called.steps(plan, decide);
        evaluate.iter().for_each(|call| called.expr(call));
        called
    }

    fn steps(&mut self, steps: &[Step], decide: &dyn Fn(&Expr) -> Option<bool>) {
        for step in steps {
            match step {
                Step::For { source, body, .. } => {
                    self.expr(source);
                    self.steps(body, decide);
                }
                Step::Repeat { body, .. } => self.steps(body, decide),
                Step::If { condition, then, otherwise, .. } => {
                    self.steps(if decide(condition) == Some(true) { then } else { otherwise }, decide);
                }
                Step::Set { .. } => {}
                Step::Call { call, .. } => self.expr(call),
            }
        }
    }

    fn expr(&mut self, expr: &Expr) {
        match &expr.kind {
            ExprKind::Call { function, args } => {
                let note = |list: &mut Vec<String>, name: &str| {
                    if !list.iter().any(|known| known == name) {
                        list.push(name.into());
                    }
                };
                match (function.text.as_str(), args.first().and_then(|a| a.value.name())) {
                    ("generate", Some(role)) => note(&mut self.generates, role),
                    (name, _) => note(&mut self.graphs, name),
                }
                args.iter().for_each(|a| self.expr(&a.value));
            }
            ExprKind::Binary(_, a, b) => {
                self.expr(a);
                self.expr(b);
            }
            ExprKind::Unary(_, a) => self.expr(a),
            _ => {}
        }
    }
}

/// The value of an expression that is known when the file is read; `given(source)` is whether a source has rows.
pub(super) fn known(
    expr: &Expr,
    values: &BTreeMap<String, Constant>,
    given: &dyn Fn(&str) -> Option<bool>,
) -> Result<Constant, Diag> {
    crate::eval::constant_in(&with_given(expr, given)?, values)
}

fn with_given(expr: &Expr, given: &dyn Fn(&str) -> Option<bool>) -> Result<Expr, Diag> {
    let kind = match &expr.kind {
        ExprKind::Call { function, args } if function.text == "given" => {
            let name = match &args[..] {
                [Arg { name: None, value }] => value.name(),
                _ => None,
            };
            match name.and_then(given) {
                Some(yes) => ExprKind::Bool(yes),
                None => {
                    let diag = Diag::error(format!("found `{expr}`, expected a source of this recipe"));
                    return Err(diag.label(expr.span, "").help("write `given(ptx)`"));
                }
            }
        }
        ExprKind::Unary(op, x) => ExprKind::Unary(*op, Box::new(with_given(x, given)?)),
        ExprKind::Binary(op, a, b) => {
            ExprKind::Binary(*op, Box::new(with_given(a, given)?), Box::new(with_given(b, given)?))
        }
        other => other.clone(),
    };
    Ok(Expr { span: expr.span, kind })
}

pub(super) fn contains_call(expr: &Expr) -> bool {
    match &expr.kind {
        ExprKind::Call { .. } => true,
        ExprKind::Binary(_, a, b) => contains_call(a) || contains_call(b),
        ExprKind::Unary(_, a) => contains_call(a),
        _ => false,
    }
}

/// Whether a call speaks of a name or of its members.
pub(super) fn mentions(expr: &Expr, name: &str) -> bool {
    names_of(expr)
        .iter()
        .any(|found| found.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// All names in an expression, each once.
pub(super) fn names_of(expr: &Expr) -> Vec<String> {
    fn walk(expr: &Expr, names: &mut Vec<String>) {
        match &expr.kind {
            ExprKind::Name(name) => {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
            ExprKind::Call { args, .. } => args.iter().for_each(|a| walk(&a.value, names)),
            ExprKind::Member(base, _) => walk(base, names),
            ExprKind::Unary(_, x) => walk(x, names),
            ExprKind::Binary(_, a, b) => {
                walk(a, names);
                walk(b, names);
            }
            ExprKind::If { condition, then, otherwise } => {
                for part in [condition, then, otherwise] {
                    walk(part, names);
                }
            }
            ExprKind::List(items) => items.iter().for_each(|x| walk(x, names)),
            ExprKind::Index { base, items } => {
                walk(base, names);
                for item in items {
                    match item {
                        Item::At(x) => walk(x, names),
                        Item::Slice { start, stop, .. } => {
                            start.iter().chain(stop).for_each(|x| walk(x, names));
                        }
                        Item::New(_) | Item::Rest(_) => {}
                    }
                }
            }
            ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Str(_) | ExprKind::Bool(_) | ExprKind::None => {}
        }
    }
    let mut names = Vec::new();
    walk(expr, &mut names);
    names
}
