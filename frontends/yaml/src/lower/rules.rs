//! Rules of the builtins that are more than one elementwise op.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Dim, Op, Value};

use crate::expr::BinaryOp;
use crate::literal::Constant;

use super::builtins::Call;
use super::eval::fold;
use super::value::{Arg, ParamRef, Val};
use super::{Lowering, R};

type Low<'l, 'a> = &'l mut Lowering<'a>;

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

pub(super) fn sum(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let reduction = reduction(low, call, None)?;
    let x = filled(low, call.span, &reduction, 0.0);
    Ok(Val::Tensor(reduced(low, call.span, sum_op, x, &reduction.axes)))
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

pub(super) fn mean(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let reduction = reduction(low, call, Some(DType::F32))?;
    let span = call.span;
    let x = filled(low, span, &reduction, 0.0);
    let sum = reduced(low, span, sum_op, x, &reduction.axes);
    let dims = low.ty(sum).dims.clone();
    let count = match reduction.counts {
        Some(counts) => {
            let ones = low.cast(span, counts, DType::F32);
            reduced(low, span, sum_op, ones, &reduction.axes)
        }
        None => {
            let count = extent(low, span, &reduction);
            low.stretch(span, count, &dims)
        }
    };
    let Some(empty) = call.get("empty") else {
        return Ok(Val::Tensor(low.emit(span, Op::Div {}, &[sum, count])));
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
    Ok(Val::Tensor(low.emit(span, Op::Where {}, &[nothing, empty, mean])))
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
    let Some(empty) = call.get("empty") else { return Ok(Val::Tensor(found)) };
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
    Ok(Val::Tensor(low.emit(call.span, Op::Where {}, &[left, found, empty])))
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
fn flag(low: Low<'_, '_>, call: &Call, name: &str) -> R<bool> {
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
fn number(low: Low<'_, '_>, arg: &Arg) -> R<f64> {
    match &arg.value {
        Val::Static(c) if c.number().is_some() => Ok(c.number().unwrap_or(f64::NAN)),
        other => {
            let found = low.describe(other);
            let diag = Diag::error(format!("found {found}, expected a number that is known when the file is read"));
            low.fail(diag.label(arg.span, ""))
        }
    }
}

pub(super) fn cumsum(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let x = low.numeric(call.arg("x"))?;
    let rank = low.ty(x).rank();
    let axis = axis(low, call.arg("axis"), rank)?;
    let reverse = flag(low, call, "reverse")?;
    Ok(Val::Tensor(low.emit(call.span, Op::Cumsum { axis, reverse }, &[x])))
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

pub(super) fn embed(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (indices, table) = (call.arg("indices"), call.arg("table"));
    let rows = low.tensor_of(indices, DType::I32)?;
    let (weight, _) = low.group(table)?;
    low.op(call.span, Op::Embed {}, &[(weight, table.span), (rows, indices.span)]).map(Val::Tensor)
}

pub(super) fn linear(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (arg, weights) = (call.arg("x"), call.arg("weight"));
    let x = low.tensor_of(arg, DType::F32)?;
    let (weight, own_bias) = low.group(weights)?;
    let bias = match call.get("bias") {
        Some(bias) => Some((low.tensor_of(bias, DType::F32)?, bias.span)),
        None => own_bias.map(|bias| (bias, weights.span)),
    };
    let rank = low.ty(x).rank();
    // Letters for the leading dims of x; far more than anyone has dims.
    let lead: String = ('a'..'o').take(rank.saturating_sub(1)).collect();
    if rank == 0 || rank > 15 || low.ty(weight).rank() != 2 {
        let (x, weight) = (low.ty(x).clone(), low.ty(weight).clone());
        let diag = Diag::error(format!("found {x} times {weight}, expected `[.., in]` times `[out, in]`"));
        return low
            .fail(diag.label(call.span, "").label(arg.span, x.to_string()).label(weights.span, weight.to_string()));
    }
    let spec = format!("{lead}y,zy->{lead}z");
    let (x_ty, w_ty) = (low.ty(x).clone(), low.ty(weight).clone());
    if x_ty.dims[rank - 1] != w_ty.dims[1] {
        let diag = Diag::error(format!("found {} features, expected {}", x_ty.dims[rank - 1], w_ty.dims[1]))
            .label(call.span, "")
            .label(arg.span, x_ty.to_string())
            .label(weights.span, w_ty.to_string());
        return low.fail(diag);
    }
    let product = low.op(call.span, Op::Contract { spec }, &[(x, arg.span), (weight, weights.span)])?;
    let Some((bias, bias_span)) = bias else { return Ok(Val::Tensor(product)) };
    let dims = low.common_dims(call.span, &[(product, call.span), (bias, bias_span)])?;
    let bias = low.stretch(bias_span, bias, &dims);
    low.op(call.span, Op::Add {}, &[(product, call.span), (bias, bias_span)]).map(Val::Tensor)
}

/// What PyTorch adds to the variance unless told otherwise.
const LAYER_NORM_EPS: f64 = 1e-5;

pub(super) fn layer_norm(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let arg = call.arg("x");
    let x = low.tensor_of(arg, DType::F32)?;
    let Some(width) = low.ty(x).dims.last().cloned() else {
        return low.fail(Diag::error("found a scalar, expected a tensor").label(arg.span, ""));
    };
    let mut own = (None, None);
    let mut place = call.span;
    if let Some(weight) = call.get("weight") {
        place = weight.span;
        own = match &weight.value {
            Val::Group(group) => norm_group(low, weight.span, group)?,
            _ => (Some(low.tensor_of(weight, DType::F32)?), None),
        };
    }
    if let Some(bias) = call.get("bias") {
        own.1 = Some(low.tensor_of(bias, DType::F32)?);
    }
    let [weight, bias] = [(own.0, 1.0), (own.1, 0.0)].map(|(given, constant)| {
        given.unwrap_or_else(|| {
            let scalar = low.scalar(call.span, constant, DType::F32);
            low.stretch(call.span, scalar, std::slice::from_ref(&width))
        })
    });
    let eps = match call.get("eps") {
        Some(eps) => number(low, eps)?,
        None => LAYER_NORM_EPS,
    };
    low.op(call.span, Op::LayerNorm { eps }, &[(x, arg.span), (weight, place), (bias, place)]).map(Val::Tensor)
}

/// Weight and bias of a norm, each if the model has it.
fn norm_group(low: Low<'_, '_>, span: Span, group: &ParamRef) -> R<(Option<Value>, Option<Value>)> {
    Ok((low.optional(span, group, "weight")?, low.optional(span, group, "bias")?))
}

pub(super) fn attention(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let mut args = Vec::new();
    for (name, dtype) in [("q", DType::F32), ("k", DType::F32), ("v", DType::F32), ("segment", DType::I32)] {
        let arg = call.arg(name);
        args.push((low.tensor_of(arg, dtype)?, arg.span));
    }
    let q = low.ty(args[0].0).clone();
    let scale = match (call.get("scale"), q.dims.last().and_then(Dim::constant)) {
        (Some(scale), _) => number(low, scale)?,
        (None, Some(width)) => (width as f64).powf(-0.5),
        (None, None) => {
            let diag = Diag::error(format!("found queries {q}, expected a last dim that is a number"));
            return low.fail(diag.label(args[0].1, ""));
        }
    };
    let causal = flag(low, call, "causal")?;
    low.op(call.span, Op::Attention { causal, scale }, &args).map(Val::Tensor)
}

pub(super) fn position_in(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let arg = call.arg("segment");
    let segment = low.tensor_of(arg, DType::I32)?;
    low.op(call.span, Op::PositionIn {}, &[(segment, arg.span)]).map(Val::Tensor)
}

pub(super) fn token_logp(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let (logits, tokens) = (call.arg("logits"), call.arg("tokens"));
    let scores = low.tensor_of(logits, DType::F32)?;
    let ids = low.tensor_of(tokens, DType::I32)?;
    low.op(call.span, Op::TokenLogp {}, &[(scores, logits.span), (ids, tokens.span)]).map(Val::Tensor)
}
