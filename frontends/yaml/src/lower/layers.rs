//! Rules of the builtins that models are made of.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::{DType, Dim, Op, Value};

use super::R;
use super::builtins::Call;
use super::rules::{Low, flag, number, whole};
use super::value::{ParamRef, Val};

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
    let width = last_dim(low, x, arg.span)?;
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
    let [weight, bias] = [(own.0, 1.0), (own.1, 0.0)]
        .map(|(given, constant)| given.unwrap_or_else(|| row(low, call.span, constant, &width)));
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

/// What Hugging Face adds to the mean square unless a model says otherwise.
const RMS_NORM_EPS: f64 = 1e-6;

pub(super) fn rms_norm(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let arg = call.arg("x");
    let x = low.tensor_of(arg, DType::F32)?;
    let width = last_dim(low, x, arg.span)?;
    let (weight, place) = match call.get("weight") {
        Some(weight) => {
            let own = match &weight.value {
                Val::Group(group) => low.optional(weight.span, group, "weight")?,
                _ => Some(low.tensor_of(weight, DType::F32)?),
            };
            (own, weight.span)
        }
        None => (None, call.span),
    };
    let weight = weight.unwrap_or_else(|| row(low, call.span, 1.0, &width));
    let eps = match call.get("eps") {
        Some(eps) => number(low, eps)?,
        None => RMS_NORM_EPS,
    };
    low.op(call.span, Op::RmsNorm { eps }, &[(x, arg.span), (weight, place)]).map(Val::Tensor)
}

fn last_dim(low: Low<'_, '_>, x: Value, span: Span) -> R<Dim> {
    match low.ty(x).dims.last().cloned() {
        Some(width) => Ok(width),
        None => low.fail(Diag::error("found a scalar, expected a tensor").label(span, "")),
    }
}

/// A row of equal numbers, in place of a parameter that the model does not have.
fn row(low: Low<'_, '_>, span: Span, value: f64, width: &Dim) -> Value {
    let scalar = low.scalar(span, value, DType::F32);
    low.stretch(span, scalar, std::slice::from_ref(width))
}

pub(super) fn rope(low: Low<'_, '_>, call: &Call) -> R<Val> {
    let mut args = Vec::new();
    for (name, dtype) in [("x", DType::F32), ("positions", DType::I32), ("freq", DType::F32)] {
        let arg = call.arg(name);
        args.push((low.tensor_of(arg, dtype)?, arg.span));
    }
    low.op(call.span, Op::Rope { inverse: false }, &args).map(Val::Tensor)
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
    let window = call.get("window").map_or(Ok(0), |window| whole(low, window))?;
    if let Some(slopes) = call.get("slopes") {
        args.push((low.tensor_of(slopes, DType::F32)?, slopes.span));
    }
    low.op(call.span, Op::Attention { causal, scale, window }, &args).map(Val::Tensor)
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
