//! Rules of the builtins that are more than one elementwise op.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Dim, Op, Value};

use crate::expr::BinaryOp;
use crate::literal::Constant;

use super::builtins::Call;
use super::eval::fold;
use super::value::{Arg, Val};
use super::{Lowering, R};

pub(super) type Low<'l, 'a> = &'l mut Lowering<'a>;

pub(super) fn choose(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let condition = call.arg("condition");
    if matches!(condition.value, Val::Static(Constant::Bool(_))) {
        let diag = Diag::error("found a condition that is known when the file is read, expected a tensor");
        return low.fail(diag.label(condition.span, "").help("write `a if condition else b`"));
    }
    let test = low.tensor_of(condition, DType::Bool)?;
    let (a, b) = (call.arg("a"), call.arg("b"));
    let values = low.one_dtype(call.span, &[a, b])?;
    let placed = [(test, condition.span), (values[0], a.span), (values[1], b.span)];
    let dims = low.common_dims(call.span, &placed)?;
    let args: Vec<Value> = placed.map(|(v, span)| low.stretch(span, v, &dims)).into();
    Ok(Val::Tensor(low.emit(call.span, Op::Where {}, &args)))
}

pub(super) fn clip(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let lower = extremum(low, call.span, call.arg("x"), call.arg("low"), Side::Max)?;
    let lower = Arg { span: call.span, value: lower };
    extremum(low, call.span, &lower, call.arg("high"), Side::Min)
}

/// Which end of the order.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Max,
    Min,
}

pub(super) fn max(low: Low<'_, '_>, call: &Call) -> R<Val> {
    max_or_min(low, call, Side::Max)
}

pub(super) fn min(low: Low<'_, '_>, call: &Call) -> R<Val> {
    max_or_min(low, call, Side::Min)
}

fn max_or_min(low: Low<'_, '_>, call: &Call, side: Side) -> R<Val> {
    let reduces = ["axis", "where", "empty"].into_iter().find_map(|name| call.get(name));
    match (call.get("b"), reduces) {
        (Some(b), None) => extremum(low, call.span, call.arg("x"), b, side),
        (None, _) => extreme(low, call, side),
        (Some(b), Some(_)) => {
            let name = call.builtin.name;
            let diag = Diag::error(format!("found two values and a dim in one `{name}`")).label(b.span, "");
            low.fail(diag.help(format!("`{name}(a, b)` takes element by element, `{name}(x, axis=1)` along a dim")))
        }
    }
}

/// The larger or smaller of two.
fn extremum(low: Low<'_, '_>, span: Span, a: &Arg, b: &Arg, side: Side) -> R<Val> {
    if let (Val::Static(x), Val::Static(y)) = (&a.value, &b.value) {
        let op = if side == Side::Max { BinaryOp::Ge } else { BinaryOp::Le };
        if let Some(Constant::Bool(first)) = fold(op, x, y) {
            return Ok(Val::Static(if first { x.clone() } else { y.clone() }));
        }
    }
    let values = low.aligned(span, &[a, b])?;
    let op = if side == Side::Max { Op::Max {} } else { Op::Min {} };
    low.op(span, op, &[(values[0], a.span), (values[1], b.span)]).map(Val::Tensor)
}

/// A dim by its number; from the end below 0.
fn axis(low: Low<'_, '_>, arg: &Arg, rank: usize) -> R<usize> {
    let Val::Static(Constant::Int(n)) = arg.value else {
        let found = low.describe(&arg.value);
        return low.fail(Diag::error(format!("found {found}, expected the number of a dim")).label(arg.span, ""));
    };
    let at = if n < 0 { n + rank as i64 } else { n };
    match usize::try_from(at) {
        Ok(at) if at < rank => Ok(at),
        _ => low.fail(Diag::error(format!("found dim {n} of a tensor with {rank} dims")).label(arg.span, "")),
    }
}

/// The dims along which a call reduces: all of them unless it says otherwise.
fn axes(low: Low<'_, '_>, call: &Call, rank: usize) -> R<Vec<usize>> {
    let Some(arg) = call.get("axis") else { return Ok((0..rank).collect()) };
    let mut axes = Vec::new();
    match &arg.value {
        Val::Static(Constant::List(items)) => {
            for item in items {
                let one = Arg { span: item.span, value: Val::Static(item.value.clone()) };
                axes.push(axis(low, &one, rank)?);
            }
        }
        _ => axes.push(axis(low, arg, rank)?),
    }
    axes.sort_unstable();
    if axes.windows(2).any(|w| w[0] == w[1]) {
        return low.fail(Diag::error("found a dim twice").label(arg.span, ""));
    }
    Ok(axes)
}

/// What is reduced: the values, those that count, and the dims.
struct Reduction {
    x: Value,
    counts: Option<Value>,
    axes: Vec<usize>,
}

fn reduction(low: Low<'_, '_>, call: &Call, dtype: Option<DType>) -> R<Reduction> {
    let arg = call.arg("x");
    let x = match dtype {
        Some(dtype) => low.tensor_of(arg, dtype)?,
        None => low.numeric(arg)?,
    };
    let (x, counts) = match call.get("where") {
        None => (x, None),
        Some(mask) => {
            let counts = low.tensor_of(mask, DType::Bool)?;
            let dims = low.common_dims(call.span, &[(x, arg.span), (counts, mask.span)])?;
            (low.stretch(arg.span, x, &dims), Some(low.stretch(mask.span, counts, &dims)))
        }
    };
    let rank = low.ty(x).rank();
    Ok(Reduction { x, counts, axes: axes(low, call, rank)? })
}

/// The values, with another one in place of those that do not count.
fn filled(low: Low<'_, '_>, span: Span, reduction: &Reduction, value: f64) -> Value {
    let Some(counts) = reduction.counts else { return reduction.x };
    let ty = low.ty(reduction.x).clone();
    let other = low.scalar(span, value, ty.dtype);
    let other = low.stretch(span, other, &ty.dims);
    low.emit(span, Op::Where {}, &[counts, reduction.x, other])
}

fn reduced(low: Low<'_, '_>, span: Span, op: fn(Vec<usize>) -> Op, x: Value, axes: &[usize]) -> Value {
    if axes.is_empty() {
        return x;
    }
    low.emit(span, op(axes.to_vec()), &[x])
}

fn sum_op(axes: Vec<usize>) -> Op {
    Op::ReduceSum { axes }
}

/// The result of a reduction: with `keep=true`, its dims are those of the operand, and 1 where it reduced.
fn kept(low: Low<'_, '_>, call: &Call, reduction: &Reduction, value: Value) -> R<Val> {
    let value = if flag(low, call, "keep")? { spread(low, call.span, reduction, value) } else { value };
    Ok(Val::Tensor(value))
}

/// What was reduced, with the dims that went away as 1.
fn spread(low: Low<'_, '_>, span: Span, reduction: &Reduction, value: Value) -> Value {
    let mut shape = low.ty(reduction.x).dims.clone();
    for &axis in &reduction.axes {
        shape[axis] = Dim::from(1i64);
    }
    if low.ty(value).dims == shape {
        return value;
    }
    low.emit(span, Op::Reshape { shape }, &[value])
}

pub(super) fn sum(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let reduction = reduction(low, call, None)?;
    let x = filled(low, call.span, &reduction, 0.0);
    let sum = reduced(low, call.span, sum_op, x, &reduction.axes);
    kept(low, call, &reduction, sum)
}

/// How many elements are reduced to one where all of them count.
fn extent(low: Low<'_, '_>, span: Span, reduction: &Reduction) -> Value {
    let extents: Vec<Dim> = reduction.axes.iter().map(|&a| low.ty(reduction.x).dims[a].clone()).collect();
    let dim = Dim::product(&extents);
    match dim.constant() {
        Some(n) => low.scalar(span, n as f64, DType::F32),
        None => low.emit(span, Op::Size { dim, dtype: DType::F32 }, &[]),
    }
}

/// How many elements count, for each result of a reduction.
fn count(low: Low<'_, '_>, span: Span, reduction: &Reduction, dims: &[Dim]) -> Value {
    match reduction.counts {
        Some(counts) => {
            let ones = low.cast(span, counts, DType::F32);
            reduced(low, span, sum_op, ones, &reduction.axes)
        }
        None => {
            let count = extent(low, span, reduction);
            low.stretch(span, count, dims)
        }
    }
}

/// Sum and count of the elements that count.
fn totals(low: Low<'_, '_>, span: Span, reduction: &Reduction) -> (Value, Value) {
    let x = filled(low, span, reduction, 0.0);
    let sum = reduced(low, span, sum_op, x, &reduction.axes);
    let dims = low.ty(sum).dims.clone();
    (sum, count(low, span, reduction, &dims))
}

pub(super) fn mean(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let reduction = reduction(low, call, Some(DType::F32))?;
    let span = call.span;
    let (sum, count) = totals(low, span, &reduction);
    let dims = low.ty(sum).dims.clone();
    let Some(empty) = call.get("empty") else {
        let mean = low.emit(span, Op::Div {}, &[sum, count]);
        return kept(low, call, &reduction, mean);
    };
    // Divided by 1 where nothing is left, so that neither value nor gradient is NaN there.
    let place = empty.span;
    let empty = low.as_tensor(empty, DType::F32)?;
    let empty = low.fitted(span, (empty, place), &dims)?;
    let zero = low.scalar(span, 0.0, DType::F32);
    let one = low.scalar(span, 1.0, DType::F32);
    let [zero, one] = [zero, one].map(|v| low.stretch(span, v, &dims));
    let nothing = low.emit(span, Op::Eq {}, &[count, zero]);
    let count = low.emit(span, Op::Where {}, &[nothing, one, count]);
    let mean = low.emit(span, Op::Div {}, &[sum, count]);
    let mean = low.emit(span, Op::Where {}, &[nothing, empty, mean]);
    kept(low, call, &reduction, mean)
}

/// Mean of the squared differences from the mean, in two sweeps: exact where `mean(x ** 2) - mean(x) ** 2` is not, and
/// each a sum over the batch, so that it can be cut into parts.
fn variance(low: Low<'_, '_>, call: &Call) -> R<(Reduction, Value)> {
    let reduction = reduction(low, call, Some(DType::F32))?;
    let span = call.span;
    let (sum, count) = totals(low, span, &reduction);
    let mean = low.emit(span, Op::Div {}, &[sum, count]);
    let mean = spread(low, span, &reduction, mean);
    let dims = low.ty(reduction.x).dims.clone();
    let mean = low.stretch(span, mean, &dims);
    let difference = low.emit(span, Op::Sub {}, &[reduction.x, mean]);
    let square = low.emit(span, Op::Mul {}, &[difference, difference]);
    let squares = Reduction { x: square, ..reduction };
    let x = filled(low, span, &squares, 0.0);
    let sum = reduced(low, span, sum_op, x, &squares.axes);
    let variance = low.emit(span, Op::Div {}, &[sum, count]);
    Ok((squares, variance))
}

pub(super) fn var(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (reduction, variance) = variance(low, call)?;
    kept(low, call, &reduction, variance)
}

pub(super) fn std(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (reduction, variance) = variance(low, call)?;
    let deviation = low.emit(call.span, Op::Sqrt {}, &[variance]);
    kept(low, call, &reduction, deviation)
}

/// The largest or smallest element; the far end of the order where nothing is left.
fn extreme(low: Low<'_, '_>, call: &Call, side: Side) -> R<Val> {
    let reduction = reduction(low, call, None)?;
    let dtype = low.ty(reduction.x).dtype;
    let far = match (side, dtype) {
        (Side::Max, DType::I32) => f64::from(i32::MIN),
        (Side::Min, DType::I32) => f64::from(i32::MAX),
        (Side::Max, _) => f64::NEG_INFINITY,
        (Side::Min, _) => f64::INFINITY,
    };
    let op: fn(Vec<usize>) -> Op = match side {
        Side::Max => |axes| Op::ReduceMax { axes },
        Side::Min => |axes| Op::ReduceMin { axes },
    };
    let x = filled(low, call.span, &reduction, far);
    let found = reduced(low, call.span, op, x, &reduction.axes);
    let Some(empty) = call.get("empty") else { return kept(low, call, &reduction, found) };
    let place = empty.span;
    let empty = low.as_tensor(empty, dtype)?;
    let dims = low.ty(found).dims.clone();
    let empty = low.fitted(call.span, (empty, place), &dims)?;
    let left = match reduction.counts {
        Some(counts) => quantified(low, call.span, counts, &reduction.axes, |axes| Op::ReduceMax { axes }),
        None => {
            let count = extent(low, call.span, &reduction);
            let any = low.cast(call.span, count, DType::Bool);
            low.stretch(call.span, any, &dims)
        }
    };
    let found = low.emit(call.span, Op::Where {}, &[left, found, empty]);
    kept(low, call, &reduction, found)
}

/// A reduction of truth values, which the IR has on numbers.
fn quantified(low: Low<'_, '_>, span: Span, x: Value, axes: &[usize], op: fn(Vec<usize>) -> Op) -> Value {
    let numbers = low.cast(span, x, DType::I32);
    let found = reduced(low, span, op, numbers, axes);
    low.cast(span, found, DType::Bool)
}

pub(super) fn any(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let reduction = reduction(low, call, Some(DType::Bool))?;
    let x = filled(low, call.span, &reduction, 0.0);
    Ok(Val::Tensor(quantified(low, call.span, x, &reduction.axes, |axes| Op::ReduceMax { axes })))
}

pub(super) fn all(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let reduction = reduction(low, call, Some(DType::Bool))?;
    let x = filled(low, call.span, &reduction, 1.0);
    Ok(Val::Tensor(quantified(low, call.span, x, &reduction.axes, |axes| Op::ReduceMin { axes })))
}

/// A switch that is known when the file is read.
pub(super) fn flag(low: Low<'_, '_>, call: &Call, name: &str) -> R<bool> {
    match call.get(name) {
        None => Ok(false),
        Some(Arg { value: Val::Static(Constant::Bool(b)), .. }) => Ok(*b),
        Some(arg) => {
            let found = low.describe(&arg.value);
            low.fail(Diag::error(format!("found {found}, expected `true` or `false`")).label(arg.span, ""))
        }
    }
}

/// A number that is known when the file is read.
pub(super) fn number(low: Low<'_, '_>, arg: &Arg) -> R<f64> {
    match &arg.value {
        Val::Static(c) if c.number().is_some() => Ok(c.number().unwrap_or(f64::NAN)),
        other => {
            let found = low.describe(other);
            let diag = Diag::error(format!("found {found}, expected a number that is known when the file is read"));
            low.fail(diag.label(arg.span, ""))
        }
    }
}

/// How many, where that is known when the file is read.
pub(super) fn whole(low: Low<'_, '_>, arg: &Arg) -> R<usize> {
    if let Val::Static(Constant::Int(n)) = &arg.value
        && let Ok(n) = usize::try_from(*n)
    {
        return Ok(n);
    }
    let found = low.describe(&arg.value);
    let diag =
        Diag::error(format!("found {found}, expected a whole number from 0 that is known when the file is read"));
    low.fail(diag.label(arg.span, ""))
}

pub(super) fn cumsum(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let x = low.numeric(call.arg("x"))?;
    let rank = low.ty(x).rank();
    let axis = axis(low, call.arg("axis"), rank)?;
    let reverse = flag(low, call, "reverse")?;
    Ok(Val::Tensor(low.emit(call.span, Op::Cumsum { axis, reverse }, &[x])))
}

/// The dim that a call names; the last one unless it does.
fn axis_or_last(low: Low<'_, '_>, call: &Call, rank: usize) -> R<usize> {
    match (call.get("axis"), rank) {
        (Some(arg), _) => axis(low, arg, rank),
        (None, 1..) => Ok(rank - 1),
        (None, 0) => low.fail(Diag::error("found a scalar, expected a tensor").label(call.arg("x").span, "")),
    }
}

pub(super) fn recurrence(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let arg = call.arg("x");
    let x = low.tensor_of(arg, DType::F32)?;
    let axis = axis_or_last(low, call, low.ty(x).rank())?;
    let decay = number(low, call.arg("decay"))?;
    let reverse = flag(low, call, "reverse")?;
    low.op(call.span, Op::Recurrence { axis, decay, reverse }, &[(x, arg.span)]).map(Val::Tensor)
}

pub(super) fn shift(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let arg = call.arg("x");
    let x = low.tensor(arg)?;
    let ty = low.ty(x).clone();
    let axis = axis_or_last(low, call, ty.rank())?;
    let places = call.arg("n");
    let n = match &places.value {
        Val::Static(Constant::Int(n)) if i32::try_from(*n).is_ok() => *n,
        other => {
            let found = low.describe(other);
            let diag =
                Diag::error(format!("found {found}, expected a whole number that is known when the file is read"));
            return low.fail(diag.label(places.span, ""));
        }
    };
    let zero = Arg { span: call.span, value: if ty.dtype == DType::Bool { Val::bool(false) } else { Val::int(0) } };
    let fill = call.get("fill").unwrap_or(&zero);
    let filled = low.as_tensor(fill, ty.dtype)?;
    if n == 0 {
        return Ok(Val::Tensor(x));
    }
    let mut dims = ty.dims.clone();
    dims[axis] = Dim::from(n.abs());
    let filled = low.fitted(call.span, (filled, fill.span), &dims)?;
    let extent = &ty.dims[axis];
    let (start, end) = if n > 0 { (Dim::default(), extent - &Dim::from(n)) } else { (Dim::from(-n), extent.clone()) };
    let rest = low.slice(call.span, (x, arg.span), axis, (start, end), places.span)?;
    let parts = if n > 0 { [(filled, fill.span), (rest, arg.span)] } else { [(rest, arg.span), (filled, fill.span)] };
    low.op(call.span, Op::Concat { axis }, &parts).map(Val::Tensor)
}

pub(super) fn softmax(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (exponents, sum) = exponents(low, call)?;
    let powers = low.emit(call.span, Op::Exp {}, &[exponents]);
    Ok(Val::Tensor(low.emit(call.span, Op::Div {}, &[powers, sum])))
}

pub(super) fn log_softmax(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (exponents, sum) = exponents(low, call)?;
    let log = low.emit(call.span, Op::Log {}, &[sum]);
    Ok(Val::Tensor(low.emit(call.span, Op::Sub {}, &[exponents, log])))
}

/// `x - max(x)`, which changes no softmax and keeps it finite, and the sum of its exponentials, both with x's dims.
fn exponents(low: Low<'_, '_>, call: &Call) -> R<(Value, Value)> {
    let span = call.span;
    let x = low.tensor_of(call.arg("x"), DType::F32)?;
    let dims = low.ty(x).dims.clone();
    let axes = vec![axis_or_last(low, call, dims.len())?];
    let reduction = Reduction { x, counts: None, axes };
    let widened = |low: Low<'_, '_>, value: Value| {
        let value = spread(low, span, &reduction, value);
        low.stretch(span, value, &dims)
    };
    let largest = low.emit(span, Op::ReduceMax { axes: reduction.axes.clone() }, &[x]);
    let largest = low.emit(span, Op::Stop {}, &[largest]);
    let largest = widened(low, largest);
    let exponents = low.emit(span, Op::Sub {}, &[x, largest]);
    let powers = low.emit(span, Op::Exp {}, &[exponents]);
    let sum = low.emit(span, Op::ReduceSum { axes: reduction.axes.clone() }, &[powers]);
    Ok((exponents, widened(low, sum)))
}

pub(super) fn range(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let arg = call.arg("n");
    let len = low.size(arg)?;
    if len.constant().is_some_and(|n| n < 0) {
        return low.fail(Diag::error(format!("found {len}, expected 0 or more")).label(arg.span, ""));
    }
    Ok(Val::Tensor(low.emit(call.span, Op::Iota { len }, &[])))
}

/// A list of sizes.
fn sizes(low: Low<'_, '_>, arg: &Arg) -> R<Vec<Dim>> {
    let items: Option<Vec<Val>> = match &arg.value {
        Val::Static(Constant::List(items)) => Some(items.iter().map(|i| Val::Static(i.value.clone())).collect()),
        Val::List(items) => Some(items.clone()),
        _ => None,
    };
    let Some(items) = items else {
        let diag = Diag::error("expected a list of sizes, such as `[B, T, 2]`").label(arg.span, "");
        return low.fail(diag.help("sizes are whole numbers and dims; none of them can be left open"));
    };
    let mut sizes = Vec::new();
    for (i, item) in items.iter().enumerate() {
        match item.as_dim() {
            Some(size) if size.constant().is_none_or(|n| n >= 0) => sizes.push(size),
            _ => {
                let message =
                    format!("found {} as size {} of the list, expected a whole number", low.describe(item), i + 1);
                return low.fail(Diag::error(message).label(arg.span, ""));
            }
        }
    }
    low.check_elements(&sizes, arg.span)?;
    Ok(sizes)
}

pub(super) fn zeros(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let shape = sizes(low, call.arg("shape"))?;
    let zero = low.scalar(call.span, 0.0, DType::F32);
    Ok(Val::Tensor(low.stretch(call.span, zero, &shape)))
}

pub(super) fn reshape(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let arg = call.arg("x");
    let x = low.tensor(arg)?;
    let shape = sizes(low, call.arg("shape"))?;
    low.op(call.span, Op::Reshape { shape }, &[(x, arg.span)]).map(Val::Tensor)
}

pub(super) fn transpose(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (arg, order) = (call.arg("x"), call.arg("order"));
    let x = low.tensor(arg)?;
    let dims = sizes(low, order)?;
    let places: Option<Vec<usize>> = dims.iter().map(|d| usize::try_from(d.constant()?).ok()).collect();
    let Some(order) = places else {
        return low.fail(Diag::error("expected the numbers of dims, such as `[0, 2, 1]`").label(order.span, ""));
    };
    low.op(call.span, Op::Transpose { order }, &[(x, arg.span)]).map(Val::Tensor)
}

pub(super) fn concat(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let at = match call.get("axis") {
        Some(axis) => axis.clone(),
        None => Arg { span: call.span, value: Val::int(0) },
    };
    joined(low, call.span, &call.rest, &at)
}

fn joined(low: Low<'_, '_>, span: Span, parts: &[Arg], at: &Arg) -> R<Val> {
    let Some(first) = parts.first() else { panic!("bug: `concat` of nothing") };
    if let Val::Record(record) = &first.value
        && !record.outputs
    {
        let mut fields = Vec::new();
        for (name, _) in &record.fields {
            let members = parts.iter().map(|part| match &part.value {
                Val::Record(r) => r.get(name).map(|v| Arg { span: part.span, value: v.clone() }),
                _ => None,
            });
            let Some(members) = members.collect::<Option<Vec<Arg>>>() else {
                let diag = Diag::error(format!("found parts of which not all have a member `{name}`"));
                return low.fail(diag.label(span, ""));
            };
            fields.push((name.clone(), joined(low, span, &members, at)?));
        }
        return Ok(Val::record(fields, false));
    }
    let mut values = Vec::new();
    for part in parts {
        values.push((low.tensor(part)?, part.span));
    }
    let axis = axis(low, at, low.ty(values[0].0).rank())?;
    low.op(span, Op::Concat { axis }, &values).map(Val::Tensor)
}

pub(super) fn stop(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let x = low.tensor(call.arg("x"))?;
    Ok(Val::Tensor(low.emit(call.span, Op::Stop {}, &[x])))
}

pub(super) fn dropout(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (arg, share) = (call.arg("x"), call.arg("p"));
    let x = low.tensor(arg)?;
    let p = number(low, share)?;
    if !(0.0..1.0).contains(&p) {
        let diag = Diag::error(format!("found a dropout of {p}, expected at least 0 and less than 1"));
        return low.fail(diag.label(share.span, ""));
    }
    let Some(role) = low.computing else {
        let diag = Diag::error("found dropout outside of a model").label(call.span, "");
        return low.fail(diag.help("it acts where an update trains the model that it is part of"));
    };
    if p == 0.0 {
        return Ok(Val::Tensor(x));
    }
    // Its place in the graph tells its numbers from those of others.
    let (role, stream) = (low.roles[role].name.clone(), low.graph.len() as u64);
    low.op(call.span, Op::Dropout { p, role, stream }, &[(x, arg.span)]).map(Val::Tensor)
}
