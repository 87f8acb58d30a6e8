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
            Constant::Int(n) => Constant::Int(-n),
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
        (BinaryOp::Eq, ..) => Bool(a == b),
        (BinaryOp::Ne, ..) => Bool(a != b),
        (BinaryOp::Add, Int(x), Int(y)) => Int(x.checked_add(*y)?),
        (BinaryOp::Sub, Int(x), Int(y)) => Int(x.checked_sub(*y)?),
        (BinaryOp::Mul, Int(x), Int(y)) => Int(x.checked_mul(*y)?),
        (BinaryOp::Div, Int(x), Int(y)) if *y != 0 && x % y == 0 => Int(x / y),
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
