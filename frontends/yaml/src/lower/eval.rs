//! Expressions: what they are made of, and operators.

use std::collections::BTreeMap;

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Dim, Op, Value};

use crate::expr::{BinaryOp, Expr, ExprKind, Item, UnaryOp};
use crate::literal::{Constant, Literal};

use super::scope::Scope;
use super::value::{Arg, Val};
use super::{Lowering, R, Reported};

/// Largest number in sizes that are multiplied: many products of such can be added.
const MAX_FACTOR: i64 = 1 << 28;

/// An operator on values that are known, or `None` if it has no meaning there.
pub(super) fn fold(op: BinaryOp, a: &Constant, b: &Constant) -> Option<Constant> {
    let name = |n: &str| Box::new(Expr { span: Span::NONE, kind: ExprKind::Name(n.into()) });
    let expr = Expr { span: Span::NONE, kind: ExprKind::Binary(op, name("a"), name("b")) };
    let values = BTreeMap::from([("a".to_string(), a.clone()), ("b".to_string(), b.clone())]);
    crate::eval::constant_in(&expr, &values).ok()
}

impl<'a> Lowering<'a> {
    /// The value of an expression.
    pub fn eval(&mut self, scope: &mut Scope<'a>, expr: &Expr) -> R<Val> {
        let span = expr.span;
        match &expr.kind {
            ExprKind::Int(n) => Ok(Val::int(*n)),
            ExprKind::Float(x) => Ok(Val::float(*x)),
            ExprKind::Str(s) => Ok(Val::Static(Constant::Str(s.clone()))),
            ExprKind::Bool(b) => Ok(Val::bool(*b)),
            ExprKind::None => Ok(Val::Static(Constant::None)),
            ExprKind::Name(name) => match self.name(scope, name, span)? {
                Val::Bad => Err(Reported),
                value => Ok(value),
            },
            ExprKind::Member(base, name) => {
                let value = self.eval(scope, base)?;
                self.member(value, name)
            }
            ExprKind::Call { function, args } => self.call(scope, span, function, args),
            ExprKind::Index { base, items } => {
                let value = self.eval(scope, base)?;
                self.index(scope, span, Arg { span: base.span, value }, items)
            }
            ExprKind::Unary(op, x) => {
                let value = self.eval(scope, x)?;
                self.unary(*op, span, Arg { span: x.span, value })
            }
            ExprKind::Binary(op, a, b) => {
                // Both sides, so that all errors are told.
                let (left, right) = (self.eval(scope, a), self.eval(scope, b));
                let (a, b) = (Arg { span: a.span, value: left? }, Arg { span: b.span, value: right? });
                self.binary(*op, span, &a, &b)
            }
            ExprKind::If { condition, then, otherwise } => {
                let taken = self.condition(scope, condition);
                let (taken, other) = match taken {
                    Ok(true) => (then, otherwise),
                    Ok(false) => (otherwise, then),
                    Err(Reported) => {
                        let _ = self.check_names(scope, then);
                        let _ = self.check_names(scope, otherwise);
                        return Err(Reported);
                    }
                };
                let names = self.check_names(scope, other);
                let value = self.eval(scope, taken);
                names.and(value)
            }
            ExprKind::List(items) => {
                let mut all = Vec::new();
                for item in items {
                    let value = self.eval(scope, item)?;
                    all.push((item.span, value));
                }
                let literals: Option<Vec<Literal>> = all
                    .iter()
                    .map(|(span, v)| match v {
                        Val::Static(value) => Some(Literal { span: *span, value: value.clone() }),
                        _ => None,
                    })
                    .collect();
                Ok(match literals {
                    Some(literals) => Val::Static(Constant::List(literals)),
                    None => Val::List(all.into_iter().map(|(_, v)| v).collect()),
                })
            }
        }
    }

    /// A condition that is decided when the file is read (D3).
    pub fn condition(&mut self, scope: &mut Scope<'a>, expr: &Expr) -> R<bool> {
        match self.eval(scope, expr)? {
            Val::Static(Constant::Bool(b)) => Ok(b),
            Val::Tensor(value) => {
                let found = self.ty(value).to_string();
                self.fail(
                    Diag::error(format!(
                        "found {found} as a condition, expected one that is known when the file is read"
                    ))
                    .label(expr.span, "")
                    .help("write `where(condition, a, b)` to choose element by element"),
                )
            }
            other => {
                let found = self.describe(&other);
                self.fail(
                    Diag::error(format!("found {found} as a condition, expected `true` or `false`"))
                        .label(expr.span, ""),
                )
            }
        }
    }

    fn unary(&mut self, op: UnaryOp, span: Span, arg: Arg) -> R<Val> {
        match (op, &arg.value) {
            (UnaryOp::Neg, Val::Static(Constant::Int(n))) if *n != i64::MIN => return Ok(Val::int(-n)),
            (UnaryOp::Neg, Val::Static(Constant::Float(x))) => return Ok(Val::float(-x)),
            (UnaryOp::Neg, Val::Dim(dim)) => return Ok(Val::dim(-dim)),
            (UnaryOp::Not, Val::Static(Constant::Bool(b))) => return Ok(Val::bool(!b)),
            _ => {}
        }
        let value = match op {
            UnaryOp::Neg => self.numeric(&arg)?,
            UnaryOp::Not => self.tensor_of(&arg, DType::Bool)?,
        };
        let op = match op {
            UnaryOp::Neg => Op::Neg {},
            UnaryOp::Not => Op::Not {},
        };
        self.op(span, op, &[(value, arg.span)]).map(Val::Tensor)
    }

    /// A tensor of numbers.
    pub fn numeric(&mut self, arg: &Arg) -> R<Value> {
        let value = self.tensor(arg)?;
        if self.ty(value).dtype != DType::Bool {
            return Ok(value);
        }
        let found = self.ty(value).to_string();
        self.fail(
            Diag::error(format!("found {found}, expected numbers"))
                .label(arg.span, "")
                .help("write `f32(..)` or `i32(..)` around it: true is 1, false is 0"),
        )
    }

    /// `a op b`.
    pub fn binary(&mut self, op: BinaryOp, span: Span, a: &Arg, b: &Arg) -> R<Val> {
        if let (Val::Static(x), Val::Static(y)) = (&a.value, &b.value) {
            return match fold(op, x, y) {
                Some(value) => Ok(Val::Static(value)),
                None => {
                    let diag = Diag::error(format!("cannot compute `{x} {} {y}`", op.symbol())).label(span, "");
                    self.fail(diag)
                }
            };
        }
        if let Some(value) = self.sizes(op, span, a, b)? {
            return Ok(value);
        }
        let (ir, swapped) = match op {
            BinaryOp::Or => (Op::Or {}, false),
            BinaryOp::And => (Op::And {}, false),
            BinaryOp::Eq => (Op::Eq {}, false),
            BinaryOp::Ne => (Op::Ne {}, false),
            BinaryOp::Lt => (Op::Lt {}, false),
            BinaryOp::Le => (Op::Le {}, false),
            BinaryOp::Gt => (Op::Lt {}, true),
            BinaryOp::Ge => (Op::Le {}, true),
            BinaryOp::Add => (Op::Add {}, false),
            BinaryOp::Sub => (Op::Sub {}, false),
            BinaryOp::Mul => (Op::Mul {}, false),
            BinaryOp::Div => (Op::Div {}, false),
            BinaryOp::Pow => (Op::Pow {}, false),
        };
        self.check_operands(op, span, a, b)?;
        let aligned = self.aligned(span, &[a, b])?;
        let mut args = [(aligned[0], a.span), (aligned[1], b.span)];
        if swapped {
            args.swap(0, 1);
        }
        self.op(span, ir, &args).map(Val::Tensor)
    }

    /// Truth values are no numbers, and numbers no truth values; whole numbers are not divided.
    fn check_operands(&mut self, op: BinaryOp, span: Span, a: &Arg, b: &Arg) -> R<()> {
        let tensors: Vec<(&Arg, Value)> = [a, b]
            .into_iter()
            .filter_map(|arg| match arg.value.clone().single() {
                Val::Tensor(value) => Some((arg, value)),
                _ => None,
            })
            .collect();
        let whole = tensors.iter().all(|(_, value)| self.ty(*value).dtype == DType::I32);
        match op {
            BinaryOp::Eq | BinaryOp::Ne => {}
            BinaryOp::And | BinaryOp::Or => {
                for (arg, _) in tensors {
                    self.tensor_of(arg, DType::Bool)?;
                }
            }
            BinaryOp::Div | BinaryOp::Pow if whole && !tensors.is_empty() => {
                let what = if op == BinaryOp::Div { "a division" } else { "a power" };
                let mut diag = Diag::error(format!("found {what} of whole numbers, expected floats")).label(span, "");
                for (arg, value) in tensors {
                    diag = diag.label(arg.span, self.ty(value).to_string());
                }
                return self.fail(diag.help("write `f32(..)` around them"));
            }
            _ => {
                for (arg, _) in tensors {
                    self.numeric(arg)?;
                }
            }
        }
        Ok(())
    }

    /// An operator on sizes, as long as the result is one; a size beside a float is a number at run time.
    fn sizes(&mut self, op: BinaryOp, span: Span, a: &Arg, b: &Arg) -> R<Option<Val>> {
        let (Some(x), Some(y)) = (a.value.as_dim(), b.value.as_dim()) else { return Ok(None) };
        self.size(a)?;
        self.size(b)?;
        if op == BinaryOp::Mul && x.largest_coefficient().max(y.largest_coefficient()) > MAX_FACTOR {
            return self.fail(Diag::error(format!("the size {x} times {y} is out of range")).label(span, ""));
        }
        Ok(match op {
            BinaryOp::Add => Some(Val::dim(&x + &y)),
            BinaryOp::Sub => Some(Val::dim(&x - &y)),
            BinaryOp::Mul => Some(Val::dim(&x * &y)),
            BinaryOp::Div => match y.constant().map(|n| x.div_exact(n)) {
                Some(Some(quotient)) => Some(Val::dim(quotient)),
                Some(None) => {
                    let diag = Diag::error(format!("the size {x} does not divide by {y}")).label(span, "");
                    return self.fail(diag.help("write `f32(..)` around the size for a number that is no size"));
                }
                None => None,
            },
            BinaryOp::Eq | BinaryOp::Ne | BinaryOp::Lt | BinaryOp::Le | BinaryOp::Gt | BinaryOp::Ge => {
                let difference = (&x - &y).constant();
                difference.and_then(|d| fold(op, &Constant::Int(d), &Constant::Int(0))).map(Val::Static)
            }
            BinaryOp::Or | BinaryOp::And | BinaryOp::Pow => None,
        })
    }

    /// `x[:, 1:]`: slices with sizes as bounds, single places, new dims (D4).
    fn index(&mut self, scope: &mut Scope<'a>, span: Span, base: Arg, items: &[Item]) -> R<Val> {
        match &base.value {
            Val::Record(record) if !record.outputs => {
                let mut fields = Vec::new();
                for (name, value) in &record.fields {
                    let field = Arg { span: base.span, value: value.clone() };
                    fields.push((name.clone(), self.index(scope, span, field, items)?));
                }
                return Ok(Val::record(fields, false));
            }
            Val::Static(Constant::List(list)) => {
                if let [Item::At(at)] = items
                    && let Val::Static(Constant::Int(n)) = self.eval(scope, at)?
                {
                    let place = usize::try_from(if n < 0 { n + list.len() as i64 } else { n }).ok();
                    return match place.and_then(|i| list.get(i)) {
                        Some(literal) => Ok(Val::Static(literal.value.clone())),
                        None => {
                            let diag = Diag::error(format!("found place {n} in a list of {}", list.len()));
                            self.fail(diag.label(at.span, ""))
                        }
                    };
                }
            }
            _ => {}
        }
        let mut value = self.tensor(&base)?;
        let rank = self.ty(value).rank();
        let used = items.iter().filter(|i| matches!(i, Item::At(_) | Item::Slice { .. })).count();
        if used > rank {
            let diag = Diag::error(format!("found {used} places for {}, which has {rank} dims", self.ty(value)));
            return self.fail(diag.label(span, ""));
        }
        // The dims of the result, one after the other; slices leave the number of dims as it is, and one reshape at
        // the end takes single places away and puts new dims in.
        let (mut axis, mut dims, mut reshapes) = (0, Vec::new(), false);
        for item in items {
            match item {
                Item::New(_) => {
                    dims.push(Dim::from(1i64));
                    reshapes = true;
                }
                Item::Rest(_) => {
                    let rest = rank - used;
                    dims.extend_from_slice(&self.ty(value).dims[axis..axis + rest]);
                    axis += rest;
                }
                Item::At(at) => {
                    let extent = self.ty(value).dims[axis].clone();
                    let start = self.bound(scope, at, &extent)?;
                    let end = &start + &Dim::from(1i64);
                    value = self.slice(span, (value, base.span), axis, (start, end), at.span)?;
                    axis += 1;
                    reshapes = true;
                }
                Item::Slice { start, stop, span: colon } => {
                    let extent = self.ty(value).dims[axis].clone();
                    let from = match start {
                        Some(start) => self.bound(scope, start, &extent)?,
                        None => Dim::default(),
                    };
                    let end = match stop {
                        Some(stop) => self.bound(scope, stop, &extent)?,
                        None => extent.clone(),
                    };
                    if from.constant() != Some(0) || end != extent {
                        value = self.slice(span, (value, base.span), axis, (from, end), *colon)?;
                    }
                    dims.push(self.ty(value).dims[axis].clone());
                    axis += 1;
                }
            }
        }
        dims.extend_from_slice(&self.ty(value).dims[axis..]);
        if reshapes {
            value = self.emit(span, Op::Reshape { shape: dims }, &[value]);
        }
        Ok(Val::Tensor(value))
    }

    /// The part of a tensor from one place to another; both were written at `place`.
    pub fn slice(
        &mut self,
        span: Span,
        base: (Value, Span),
        axis: usize,
        (start, end): (Dim, Dim),
        place: Span,
    ) -> R<Value> {
        let extent = self.ty(base.0).dims[axis].clone();
        for (smaller, larger) in [(Dim::default(), &start), (start.clone(), &end), (end.clone(), &extent)] {
            if let Some(symbol) = self.can_be_negative(&(larger - &smaller)) {
                let range = self.graph.dim_range(&symbol).map_or((0, 0), |r| (r.min, r.max));
                let diag =
                    Diag::error(format!("the part from {start} to {end} of a dim {extent} does not always exist"))
                        .label(place, "")
                        .label(base.1, self.ty(base.0).to_string());
                return self.fail(diag.help(format!("`{symbol}` is between {} and {}", range.0, range.1)));
            }
        }
        self.op(span, Op::Slice { axis, start, end }, &[base])
    }

    /// The dim of which a size is a linear function that goes below 0 in the dim's range. Sizes of several dims are
    /// left to the launch: how these depend on each other is known to nobody before.
    fn can_be_negative(&self, size: &Dim) -> Option<dsgc_ir::Symbol> {
        let [symbol] = size.symbols().try_into().ok()?;
        let range = self.graph.dim_range(&symbol)?;
        let at = |n: i64| size.eval(&[(symbol.clone(), n)].into()).unwrap_or(0);
        (at(range.min) < 0 || at(range.max) < 0).then_some(symbol)
    }

    /// A bound of a slice: a size; numbers below zero count from the end.
    fn bound(&mut self, scope: &mut Scope<'a>, expr: &Expr, extent: &Dim) -> R<Dim> {
        let value = self.eval(scope, expr)?;
        if let Val::Tensor(tensor) = value {
            let found = self.ty(tensor).to_string();
            return self.fail(
                Diag::error(format!("found {found} as a place, expected a size or a number"))
                    .label(expr.span, "")
                    .help("places are known before the graph runs: `pick(x, i)` reads `x[b, i[b]]`")
                    .help("`range(T) >= a[:, None] and range(T) < b[:, None]` is a slice per row, as a mask"),
            );
        }
        let dim = self.size(&Arg { span: expr.span, value })?;
        Ok(if dim.constant().is_some_and(|n| n < 0) { extent + &dim } else { dim })
    }
}
