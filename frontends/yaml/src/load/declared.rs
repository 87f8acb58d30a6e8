//! Values for what documents declare: options of recipes, config entries of models.

use dsgc_ir::diag::{Diag, Span, nearest};

use crate::graph::{Declaration, Type};
use crate::literal::{Constant, Literal};
use crate::schema::words;

/// A value as its declaration wants it: a whole number where a number is asked for becomes one, and a choice is a text.
pub(super) fn typed(declared: &Declaration, given: &Literal) -> Result<Constant, Diag> {
    let wrong = |expected: String| {
        let diag =
            Diag::error(format!("found {} for `{}`, expected {expected}", shown(&given.value), declared.name.text));
        diag.label(given.span, "").label(declared.name.span, "declared here")
    };
    if !declared.choices.is_empty() {
        // `none` in `choices: [group, none]` is a choice like the others.
        let text = match &given.value {
            Constant::Str(text) => text.clone(),
            other => other.to_string(),
        };
        let names: Vec<&str> = declared.choices.iter().map(|c| c.text.as_str()).collect();
        if names.contains(&text.as_str()) {
            return Ok(Constant::Str(text));
        }
        let diag = wrong(format!("one of {}", words(&names)));
        return Err(match nearest(&text, names.iter().copied()) {
            Some(near) => diag.help(format!("write `{near}`")),
            None => diag,
        });
    }
    let value = &given.value;
    let optional = matches!(declared.default, Some(Literal { value: Constant::None, .. }));
    match (declared.ty, value) {
        (_, Constant::None) if optional => Ok(Constant::None),
        (Type::Int, Constant::Int(_))
        | (Type::Float, Constant::Float(_))
        | (Type::Bool, Constant::Bool(_))
        | (Type::Str, Constant::Str(_))
        | (Type::List, Constant::List(_)) => Ok(value.clone()),
        (Type::Float, Constant::Int(n)) => Ok(Constant::Float(*n as f64)),
        // A quotient such as `hidden_size / num_attention_heads`.
        (Type::Int, Constant::Float(x)) if x.fract() == 0.0 && x.abs() < 2f64.powi(53) => Ok(Constant::Int(*x as i64)),
        (ty, _) => Err(wrong(expected(ty).into())),
    }
}

/// A value for messages, as it is written without quotes.
pub(super) fn shown(value: &Constant) -> String {
    match value {
        Constant::Str(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

/// What a declaration without a value is told.
pub(super) fn missing(declared: &Declaration, what: &str, at: Span) -> Diag {
    Diag::error(format!("found no `{}` for {what}, expected {}", declared.name.text, expected(declared.ty)))
        .label(at, "")
        .label(declared.name.span, "declared here, without a default")
}

fn expected(ty: Type) -> &'static str {
    match ty {
        Type::Int => "a whole number",
        Type::Float => "a number",
        Type::Bool => "`true` or `false`",
        Type::Str => "a text",
        Type::List => "a list",
    }
}
