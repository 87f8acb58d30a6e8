//! Constant expressions: what is decided when the files are read.

use std::collections::BTreeMap;

use dsgc_ir::diag::Diag;

use crate::expr::{BinaryOp, Expr, ExprKind, UnaryOp};
use crate::literal::{Constant, Literal};

/// The value of an expression without names.
pub fn constant(expr: &Expr) -> Result<Constant, Diag> {
    constant_in(expr, &BTreeMap::new())
}

/// The value of an expression over named values.
pub fn constant_in(expr: &Expr, values: &BTreeMap<String, Constant>) -> Result<Constant, Diag> {
    let wrong = |message: String| Diag::error(message).label(expr.span, "");
    let go = |x: &Expr| constant_in(x, values);
    Ok(match &expr.kind {
        ExprKind::Int(n) => Constant::Int(*n),
        ExprKind::Float(x) => Constant::Float(*x),
        ExprKind::Str(s) => Constant::Str(s.clone()),
        ExprKind::Bool(b) => Constant::Bool(*b),
        ExprKind::None => Constant::None,
        ExprKind::Name(name) => {
            values.get(name).cloned().ok_or_else(|| wrong(format!("`{name}` is not known when the file is read")))?
        }
        ExprKind::Unary(UnaryOp::Not, x) => match go(x)? {
            Constant::Bool(b) => Constant::Bool(!b),
            found => return Err(wrong(format!("found `{found}` after `not`, expected a condition"))),
        },
        ExprKind::Unary(UnaryOp::Neg, x) => match go(x)? {
            Constant::Int(n) => {
                Constant::Int(n.checked_neg().ok_or_else(|| wrong(format!("cannot compute `{expr}`")))?)
            }
            Constant::Float(x) => Constant::Float(-x),
            found => return Err(wrong(format!("found `{found}` after `-`, expected a number"))),
        },
        ExprKind::Binary(op, a, b) => {
            binary(*op, go(a)?, go(b)?).ok_or_else(|| wrong(format!("cannot compute `{expr}`")))?
        }
        ExprKind::If { condition, then, otherwise } => match go(condition)? {
            Constant::Bool(yes) => go(if yes { then } else { otherwise })?,
            found => return Err(wrong(format!("found `{found}`, expected a condition"))),
        },
        ExprKind::List(items) => {
            let items: Result<Vec<Literal>, Diag> =
                items.iter().map(|x| go(x).map(|value| Literal { span: x.span, value })).collect();
            Constant::List(items?)
        }
        ExprKind::Member(..) | ExprKind::Call { .. } | ExprKind::Index { .. } => {
            return Err(wrong(format!("`{expr}` is not known when the file is read")));
        }
    })
}

fn binary(op: BinaryOp, a: Constant, b: Constant) -> Option<Constant> {
    use Constant::{Bool, Float, Int};
    Some(match (op, &a, &b) {
        (BinaryOp::Or, Bool(x), Bool(y)) => Bool(*x || *y),
        (BinaryOp::And, Bool(x), Bool(y)) => Bool(*x && *y),
        (BinaryOp::Eq, ..) => Bool(a.equals(&b)),
        (BinaryOp::Ne, ..) => Bool(!a.equals(&b)),
        (BinaryOp::Add, Int(x), Int(y)) => Int(x.checked_add(*y)?),
        (BinaryOp::Sub, Int(x), Int(y)) => Int(x.checked_sub(*y)?),
        (BinaryOp::Mul, Int(x), Int(y)) => Int(x.checked_mul(*y)?),
        // A quotient that is whole stays a whole number: `hidden / heads` is a size.
        (BinaryOp::Div, Int(x), Int(y)) if x.checked_rem(*y) == Some(0) => Int(x / y),
        (BinaryOp::Div, _, Int(0)) => return None,
        _ => {
            let (x, y) = (a.number()?, b.number()?);
            match op {
                BinaryOp::Lt => Bool(x < y),
                BinaryOp::Le => Bool(x <= y),
                BinaryOp::Gt => Bool(x > y),
                BinaryOp::Ge => Bool(x >= y),
                BinaryOp::Add => Float(x + y),
                BinaryOp::Sub => Float(x - y),
                BinaryOp::Mul => Float(x * y),
                BinaryOp::Div => Float(x / y),
                BinaryOp::Pow => Float(x.powf(y)),
                BinaryOp::Or | BinaryOp::And | BinaryOp::Eq | BinaryOp::Ne => return None,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use dsgc_ir::diag::Span;

    use super::*;
    use crate::text::{Style, Text};

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let span = Span { source: 0, line: 1, column: 1, len: 1 };
        let expr = Expr::parse(&Text::new(text.into(), text, span, Style::Plain, false)).unwrap();
        let values =
            BTreeMap::from([("heads".to_owned(), Constant::Int(4)), ("kind".into(), Constant::Str("a".into()))]);
        let found = match constant_in(&expr, &values) {
            Ok(value) => value.to_string(),
            Err(diag) => diag.message,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn whole_numbers_stay_whole() {
        check("64 / heads", "16");
        check("6 / heads", "1.5");
        check("-heads + 2 * 3", "2");
        check("2 ** 3", "8.0");
        check("1 / 0", "cannot compute `(1 / 0)`");
        check("9223372036854775807 + 1", "cannot compute `(9223372036854775807 + 1)`");
    }

    #[test]
    fn equal_values_are_equal_however_they_are_written() {
        check("heads == 4.0", "true");
        check("heads != 4.5", "true");
        check("[1, [heads]] == [1.0, [4]]", "true");
        check("[1, 2] == [1]", "false");
        check("9007199254740993 == 9007199254740992", "false");
        check("kind == 1", "false");
        check("1 == true", "false");
        check("none == none", "true");
    }

    #[test]
    fn conditions_are_decided() {
        check("heads > 3 and kind == \"a\"", "true");
        check("1 if not true else [heads, 2]", "[4, 2]");
        check("1 if heads else 2", "found `4`, expected a condition");
        check("batch.text", "`batch.text` is not known when the file is read");
    }
}
