//! Gradient rules: what an op's operands get from what its results get (vector-Jacobian products), one arm per op.
//!
//! Rules build ops through the builder that everybody uses. A rule makes only what is asked for: `needs` says which
//! operands a gradient is wanted for. Where a function has a kink, the rule follows PyTorch: relu and abs have slope
//! 0 at 0; of two equal operands of `max` and `min` the first gets all.

use std::f64::consts::PI;

use dsgc_ir::infer::Contraction;
use dsgc_ir::{Builder, Class, DType, Dim, Op, OpData, Value};

/// Gradients of an op's operands.
///
/// `args` and `results` are the op's values in the graph that is built; `dys` the gradients of the results, where
/// there are any. Operands that are not needed or have no slope get `None`. The error names ops without a rule.
pub fn vjp(
    b: &mut Builder,
    op: &OpData,
    args: &[Value],
    results: &[Value],
    dys: &[Option<Value>],
    needs: &[bool],
) -> Result<Vec<Option<Value>>, String> {
    let mut grads: Vec<Option<Value>> = vec![None; args.len()];
    let Some(dy) = dys.iter().flatten().next().copied() else {
        return Ok(grads);
    };
    if op.args.iter().any(|&a| b.ty(a).dtype.is_narrow()) && has_slope_formula(&op.op) {
        return in_f32(b, op, (args, results), dys, needs);
    }
    let want = |i: usize| needs[i];
    match &op.op {
        // No float operand, or no slope anywhere.
        Op::Const { .. }
        | Op::Size { .. }
        | Op::Iota { .. }
        | Op::Stop {}
        | Op::Eq {}
        | Op::Ne {}
        | Op::Lt {}
        | Op::Le {}
        | Op::And {}
        | Op::Or {}
        | Op::Not {}
        | Op::PositionIn {}
        | Op::Sample { .. }
        | Op::Fold { .. }
        | Op::RandomNormal { .. }
        | Op::RandomUniform { .. }
        | Op::RowUniform { .. }
        | Op::Read { .. }
        | Op::Write { .. } => {}

        Op::Cast { .. } => {
            let (from, to) = (b.ty(args[0]).dtype, b.ty(results[0]).dtype);
            if from.is_float() && to.is_float() {
                grads[0] = Some(if from == DType::F32 { unrounded(b, dy) } else { b.cast(dy, from) });
            }
        }
        // That of another role than the trained one: it leaves nothing out.
        Op::Dropout { .. } => grads[0] = Some(dy),
        Op::Broadcast { .. } => {
            let ty = b.ty(args[0]);
            let sum = unbroadcast(b, dy, &ty.dims);
            grads[0] = Some(b.cast(sum, ty.dtype));
        }
        Op::Reshape { .. } => {
            let shape = b.ty(args[0]).dims;
            grads[0] = Some(b.one(Op::Reshape { shape }, &[dy]));
        }
        Op::Transpose { order } => {
            let mut inverse = vec![0; order.len()];
            for (i, &o) in order.iter().enumerate() {
                inverse[o] = i;
            }
            grads[0] = Some(b.one(Op::Transpose { order: inverse }, &[dy]));
        }
        Op::Slice { axis, start, end } => {
            let after = &b.ty(args[0]).dims[*axis] - end;
            grads[0] = Some(b.one(Op::Pad { axis: *axis, before: start.clone(), after }, &[dy]));
        }
        Op::Pad { axis, before, .. } => {
            let end = before + &b.ty(args[0]).dims[*axis];
            grads[0] = Some(b.one(Op::Slice { axis: *axis, start: before.clone(), end }, &[dy]));
        }
        Op::Concat { axis } => {
            let mut start = Dim::default();
            for (i, &arg) in args.iter().enumerate() {
                let end = &start + &b.ty(arg).dims[*axis];
                if want(i) {
                    grads[i] = Some(b.one(Op::Slice { axis: *axis, start, end: end.clone() }, &[dy]));
                }
                start = end;
            }
        }

        Op::SliceAt { axis, .. } => {
            let zero = zeros_like(b, args[0]);
            grads[0] = Some(b.one(Op::WriteAt { axis: *axis }, &[zero, dy, args[1]]));
        }
        Op::WriteAt { axis } => {
            if want(0) {
                let zero = zeros_like(b, args[1]);
                grads[0] = Some(b.one(Op::WriteAt { axis: *axis }, &[dy, zero, args[2]]));
            }
            if want(1) {
                let len = b.ty(args[1]).dims[*axis].clone();
                grads[1] = Some(b.one(Op::SliceAt { axis: *axis, len }, &[dy, args[2]]));
            }
        }

        Op::Add {} => grads.fill(Some(dy)),
        Op::Sub {} => {
            grads[0] = Some(dy);
            if want(1) {
                grads[1] = Some(b.one(Op::Neg {}, &[dy]));
            }
        }
        Op::Mul {} => {
            for i in [0, 1] {
                if want(i) {
                    grads[i] = Some(b.one(Op::Mul {}, &[dy, args[1 - i]]));
                }
            }
        }
        Op::Div {} => {
            // y = a / c: da = dy / c, dc = -dy * y / c.
            let da = b.one(Op::Div {}, &[dy, args[1]]);
            grads[0] = Some(da);
            if want(1) {
                let scaled = b.one(Op::Mul {}, &[da, results[0]]);
                grads[1] = Some(b.one(Op::Neg {}, &[scaled]));
            }
        }
        Op::Max {} | Op::Min {} => {
            let (low, high) = if op.op == (Op::Max {}) { (args[1], args[0]) } else { (args[0], args[1]) };
            let first = b.one(Op::Le {}, &[low, high]);
            let zero = zeros_like(b, dy);
            grads[0] = Some(b.one(Op::Where {}, &[first, dy, zero]));
            grads[1] = Some(b.one(Op::Where {}, &[first, zero, dy]));
        }
        Op::Pow {} => {
            if want(0) {
                let one = fill_like(b, 1.0, dy);
                let less = b.one(Op::Sub {}, &[args[1], one]);
                let power = b.one(Op::Pow {}, &[args[0], less]);
                let slope = b.one(Op::Mul {}, &[args[1], power]);
                grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
            }
            if want(1) {
                let log = b.one(Op::Log {}, &[args[0]]);
                let slope = b.one(Op::Mul {}, &[results[0], log]);
                grads[1] = Some(b.one(Op::Mul {}, &[dy, slope]));
            }
        }
        Op::Neg {} => grads[0] = Some(b.one(Op::Neg {}, &[dy])),
        Op::Abs {} => {
            let zero = zeros_like(b, dy);
            let (minus, above) = (b.one(Op::Neg {}, &[dy]), b.one(Op::Lt {}, &[zero, args[0]]));
            let below = b.one(Op::Lt {}, &[args[0], zero]);
            let rest = b.one(Op::Where {}, &[below, minus, zero]);
            grads[0] = Some(b.one(Op::Where {}, &[above, dy, rest]));
        }
        Op::Exp {} => grads[0] = Some(b.one(Op::Mul {}, &[dy, results[0]])),
        Op::Log {} => grads[0] = Some(b.one(Op::Div {}, &[dy, args[0]])),
        Op::Sqrt {} => {
            let half = fill_like(b, 0.5, dy);
            let slope = b.one(Op::Div {}, &[half, results[0]]);
            grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
        }
        Op::Tanh {} => {
            let square = b.one(Op::Mul {}, &[results[0], results[0]]);
            let one = fill_like(b, 1.0, dy);
            let slope = b.one(Op::Sub {}, &[one, square]);
            grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
        }
        Op::Sigmoid {} => {
            let one = fill_like(b, 1.0, dy);
            let rest = b.one(Op::Sub {}, &[one, results[0]]);
            let slope = b.one(Op::Mul {}, &[results[0], rest]);
            grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
        }
        Op::LogSigmoid {} => {
            let minus = b.one(Op::Neg {}, &[args[0]]);
            let slope = b.one(Op::Sigmoid {}, &[minus]);
            grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
        }
        Op::Relu {} => {
            // The result is above 0 exactly where the operand is, and is often kept for the next product anyway.
            let zero = zeros_like(b, dy);
            let above = b.one(Op::Lt {}, &[zero, results[0]]);
            grads[0] = Some(b.one(Op::Where {}, &[above, dy, zero]));
        }
        Op::Gelu {} => {
            // Phi(x) + x * phi(x), the normal distribution function and density.
            let x = args[0];
            let scaled = scale(b, x, 0.5f64.sqrt());
            let erf = b.one(Op::Erf {}, &[scaled]);
            let one = fill_like(b, 1.0, dy);
            let sum = b.one(Op::Add {}, &[one, erf]);
            let cdf = scale(b, sum, 0.5);
            let square = b.one(Op::Mul {}, &[x, x]);
            let exponent = scale(b, square, -0.5);
            let bell = b.one(Op::Exp {}, &[exponent]);
            let density = scale(b, bell, (2.0 * PI).sqrt().recip());
            let tail = b.one(Op::Mul {}, &[x, density]);
            let slope = b.one(Op::Add {}, &[cdf, tail]);
            grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
        }
        Op::GeluTanh {} => {
            // With u = c (x + a x^3) and t = tanh u: (1 + t) / 2 + x / 2 * (1 - t^2) * c (1 + 3 a x^2).
            let (x, c, a) = (args[0], (2.0 / PI).sqrt(), 0.044715);
            let square = b.one(Op::Mul {}, &[x, x]);
            let one = fill_like(b, 1.0, dy);
            let cubic = scale(b, square, a);
            let inner = b.one(Op::Add {}, &[one, cubic]);
            let product = b.one(Op::Mul {}, &[x, inner]);
            let u = scale(b, product, c);
            let t = b.one(Op::Tanh {}, &[u]);
            let rise = b.one(Op::Add {}, &[one, t]);
            let first = scale(b, rise, 0.5);
            let t2 = b.one(Op::Mul {}, &[t, t]);
            let sech2 = b.one(Op::Sub {}, &[one, t2]);
            let cubic3 = scale(b, square, 3.0 * a);
            let inner3 = b.one(Op::Add {}, &[one, cubic3]);
            let du = scale(b, inner3, 0.5 * c);
            let xd = b.one(Op::Mul {}, &[x, du]);
            let second = b.one(Op::Mul {}, &[sech2, xd]);
            let slope = b.one(Op::Add {}, &[first, second]);
            grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
        }
        Op::Silu {} => {
            // s (1 + x (1 - s)) with s = sigmoid(x).
            let s = b.one(Op::Sigmoid {}, &[args[0]]);
            let one = fill_like(b, 1.0, dy);
            let rest = b.one(Op::Sub {}, &[one, s]);
            let tail = b.one(Op::Mul {}, &[args[0], rest]);
            let sum = b.one(Op::Add {}, &[one, tail]);
            let slope = b.one(Op::Mul {}, &[s, sum]);
            grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
        }
        Op::Erf {} => {
            let square = b.one(Op::Mul {}, &[args[0], args[0]]);
            let minus = b.one(Op::Neg {}, &[square]);
            let bell = b.one(Op::Exp {}, &[minus]);
            let slope = scale(b, bell, 2.0 / PI.sqrt());
            grads[0] = Some(b.one(Op::Mul {}, &[dy, slope]));
        }
        Op::Where {} => {
            let zero = zeros_like(b, dy);
            if want(1) {
                grads[1] = Some(b.one(Op::Where {}, &[args[0], dy, zero]));
            }
            if want(2) {
                grads[2] = Some(b.one(Op::Where {}, &[args[0], zero, dy]));
            }
        }

        Op::Contract { spec } => {
            let labels = Contraction { wide: false, ..Contraction::parse(spec)? };
            let dy = b.cast(dy, b.ty(args[0]).dtype);
            if want(0) {
                let (lhs, rhs, out) = (labels.out.clone(), labels.rhs.clone(), labels.lhs.clone());
                let grad = Contraction { lhs, rhs, out, ..labels };
                grads[0] = Some(b.one(Op::Contract { spec: grad.spec() }, &[dy, args[1]]));
            }
            if want(1) {
                let (lhs, rhs, out) = (labels.out.clone(), labels.lhs.clone(), labels.rhs.clone());
                let grad = Contraction { lhs, rhs, out, ..labels };
                grads[1] = Some(b.one(Op::Contract { spec: grad.spec() }, &[dy, args[0]]));
            }
        }
        Op::ReduceSum { axes } => {
            let dy = b.cast(dy, b.ty(args[0]).dtype);
            grads[0] = Some(restore(b, dy, args[0], axes));
        }
        Op::ReduceMax { axes } | Op::ReduceMin { axes } => {
            // Equal largest elements share the gradient evenly, as PyTorch's amax.
            let largest = restore(b, results[0], args[0], axes);
            let hit = b.one(Op::Eq {}, &[args[0], largest]);
            let one = fill_like(b, 1.0, args[0]);
            let zero = zeros_like(b, args[0]);
            let mask = b.one(Op::Where {}, &[hit, one, zero]);
            let count = b.one(Op::ReduceSum { axes: axes.clone() }, &[mask]);
            let share = b.one(Op::Div {}, &[dy, count]);
            let spread = restore(b, share, args[0], axes);
            grads[0] = Some(b.one(Op::Mul {}, &[spread, mask]));
        }
        Op::Cumsum { axis, reverse } => {
            grads[0] = Some(b.one(Op::Cumsum { axis: *axis, reverse: !reverse }, &[dy]));
        }
        Op::Recurrence { axis, decay, reverse } => {
            grads[0] = Some(b.one(Op::Recurrence { axis: *axis, decay: *decay, reverse: !reverse }, &[dy]));
        }

        Op::Embed {} => {
            let rows = b.ty(args[0]).dims[0].clone();
            let dy = unrounded(b, dy);
            let sum = b.one(Op::EmbedGrad { rows }, &[args[1], dy]);
            grads[0] = Some(b.cast(sum, b.ty(args[0]).dtype));
        }
        Op::LayerNorm { eps } => {
            let all = b.push(Op::LayerNormGrad { eps: *eps }, &[args[0], args[1], dy]);
            grads = all.into_iter().map(Some).collect();
        }
        Op::RmsNorm { eps } => {
            let all = b.push(Op::RmsNormGrad { eps: *eps }, &[args[0], args[1], dy]);
            grads = all.into_iter().map(Some).collect();
        }
        // Turning back is the transpose of turning. Frequencies are settings: they have no gradient.
        Op::Rope { inverse } => {
            grads[0] = Some(b.one(Op::Rope { inverse: !inverse }, &[dy, args[1], args[2]]));
            if want(2) {
                return Err("the frequencies of `rope` have no gradient".into());
            }
        }
        // Slopes are settings, as frequencies are.
        Op::Attention { causal, scale, window } => {
            if dys[1].is_some() {
                return Err("the divisor of `attention` has no gradient".into());
            }
            if args.len() > 4 && want(4) {
                return Err("the slopes of `attention` have no gradient".into());
            }
            let forward = [args[0], args[1], args[2], args[3], results[0], results[1], dy];
            let operands = [&forward[..], &args[4..]].concat();
            let grad = Op::AttentionGrad { causal: *causal, scale: *scale, window: *window };
            let all = b.push(grad, &operands);
            for (grad, value) in grads.iter_mut().zip(all) {
                *grad = Some(value);
            }
        }
        Op::TokenLogp {} => grads[0] = Some(b.one(Op::TokenLogpGrad {}, &[args[0], args[1], dy])),

        // Derived ops: the passes make them, and autodiff does not meet them.
        Op::EmbedGrad { .. }
        | Op::AddRows {}
        | Op::ContractEach { .. }
        | Op::ContractFused { .. }
        | Op::HeadLogp {}
        | Op::HeadLogpGrad { .. }
        | Op::SumSquares {}
        | Op::LayerNormGrad { .. }
        | Op::RmsNormGrad { .. }
        | Op::CachedAttention { .. }
        | Op::Fused { .. }
        | Op::AttentionGrad { .. }
        | Op::TokenLogpGrad {}
        | Op::AllReduce { .. }
        | Op::AllGather { .. }
        | Op::ReduceScatter { .. }
        | Op::Wait {}
        | Op::ToHost {}
        | Op::FromHost {}
        | Op::Shard { .. }
        | Op::Adamw { .. } => return Err(format!("`{}` has no gradient", op.op.name())),
    }
    for (grad, &need) in grads.iter_mut().zip(needs) {
        *grad = grad.filter(|_| need);
    }
    Ok(grads)
}

/// Whether the rule of an op has several steps of arithmetic, each of which would round.
fn has_slope_formula(op: &Op) -> bool {
    match op {
        Op::Add {} | Op::Sub {} | Op::Mul {} | Op::Max {} | Op::Min {} | Op::Neg {} | Op::Abs {} | Op::Relu {} => false,
        Op::Where {} | Op::Cast { .. } => false,
        Op::ReduceMax { .. } | Op::ReduceMin { .. } => true,
        op => op.class() == Class::Elementwise,
    }
}

/// The gradients of an op on narrow floats by its rule in f32; each is rounded once.
fn in_f32(
    b: &mut Builder,
    op: &OpData,
    (args, results): (&[Value], &[Value]),
    dys: &[Option<Value>],
    needs: &[bool],
) -> Result<Vec<Option<Value>>, String> {
    let types: Vec<DType> = args.iter().map(|&a| b.ty(a).dtype).collect();
    let mut wide = |value: Value| if b.ty(value).dtype.is_narrow() { b.cast(value, DType::F32) } else { value };
    let wide_args: Vec<Value> = args.iter().map(|&a| wide(a)).collect();
    let wide_results: Vec<Value> = results.iter().map(|&r| wide(r)).collect();
    let dys: Vec<Option<Value>> = dys.iter().map(|dy| dy.map(&mut wide)).collect();
    let mut op = op.clone();
    op.args.clone_from(&wide_args);
    let grads = vjp(b, &op, &wide_args, &wide_results, &dys, needs)?;
    Ok(grads.into_iter().zip(types).map(|(grad, dtype)| grad.map(|grad| b.cast(grad, dtype))).collect())
}

fn fill_like(b: &mut Builder, value: f64, like: Value) -> Value {
    let dims = b.ty(like).dims;
    let scalar = b.one(Op::Const { value, dtype: b.ty(like).dtype }, &[]);
    b.stretch(scalar, &dims)
}

/// A narrow gradient in f32. Where it is a sum of products, it is taken as such and was never rounded: gradients of
/// weights go to the optimizer as they are.
fn unrounded(b: &mut Builder, dy: Value) -> Value {
    let Some(def) = b.graph.def(dy).map(|def| b.graph.op(def).clone()) else { return b.cast(dy, DType::F32) };
    let site = std::mem::replace(&mut b.site, def.site.clone());
    let wide = match &def.op {
        _ if !b.ty(dy).dtype.is_narrow() => dy,
        Op::Contract { spec } => {
            let labels = Contraction::parse(spec).expect("verified ops have readable specs");
            b.one(Op::Contract { spec: Contraction { wide: true, ..labels }.spec() }, &def.args)
        }
        Op::Cast { .. } if b.ty(def.args[0]).dtype == DType::F32 => def.args[0],
        Op::Add {} => {
            let parts = [unrounded(b, def.args[0]), unrounded(b, def.args[1])];
            b.one(Op::Add {}, &parts)
        }
        Op::Reshape { .. } | Op::Transpose { .. } | Op::Broadcast { .. } => {
            let inner = unrounded(b, def.args[0]);
            b.one(def.op.clone(), &[inner])
        }
        _ => b.cast(dy, DType::F32),
    };
    b.site = site;
    wide
}

fn zeros_like(b: &mut Builder, like: Value) -> Value {
    fill_like(b, 0.0, like)
}

fn scale(b: &mut Builder, x: Value, by: f64) -> Value {
    let factor = fill_like(b, by, x);
    b.one(Op::Mul {}, &[x, factor])
}

/// Sums a stretched value back to the dims it was stretched from.
fn unbroadcast(b: &mut Builder, dy: Value, to: &[Dim]) -> Value {
    let from = b.ty(dy).dims;
    let lead = from.len() - to.len();
    let axes: Vec<usize> = (0..from.len()).filter(|&i| i < lead || from[i] != to[i - lead]).collect();
    let summed = b.one(Op::ReduceSum { axes }, &[dy]);
    if b.ty(summed).dims == to { summed } else { b.one(Op::Reshape { shape: to.to_vec() }, &[summed]) }
}

/// Stretches a reduced value over the dims that the reduction took away.
fn restore(b: &mut Builder, reduced: Value, like: Value, axes: &[usize]) -> Value {
    let full = b.ty(like).dims;
    let kept: Vec<Dim> =
        full.iter().enumerate().map(|(i, d)| if axes.contains(&i) { Dim::from(1i64) } else { d.clone() }).collect();
    let shaped = if b.ty(reduced).dims == kept { reduced } else { b.one(Op::Reshape { shape: kept }, &[reduced]) };
    b.stretch(shaped, &full)
}
