//! The meaning of every op, one arm each; composites are in [`super::composite`].
//!
//! Loops in the plainest order, arithmetic in the chosen width, sums in index order. Where IEEE leaves a choice the
//! answer is PyTorch's: `max`, `min` and their reductions give NaN if any element is; `relu` of NaN is NaN; a cast of
//! NaN to `bool` is true. Integers wrap; a float too large for an integer becomes the nearest one.

use std::cmp::Ordering;

use dsgc_ir::body::product_parts;
use dsgc_ir::infer::{Contraction, product_type};
use dsgc_ir::stage::Sampling;
use dsgc_ir::{Bindings, Body, DType, Data, Dim, Op, Tensor};

use super::real::Real;
use super::structure::{
    around, broadcast, choose, concat, offsets, replaced, reshape, strides, transpose, window, zeros,
};
use super::{attention, composite};
use crate::random;
use crate::sample::choose as choose_token;

/// The results of an op from its operands, or what is wrong with their values.
///
/// `types` are the operands' declared types, `shapes` the results' extents under `dims`. Results are yet to be rounded to
/// their types. The value of a state stands as the operand of [`Op::Read`]; to
/// keep the operand of [`Op::Write`] is the caller's business.
pub(crate) fn eval<F: Real>(
    op: &Op,
    (args, types): (&[&Tensor], &[DType]),
    shapes: &[Vec<usize>],
    dims: &Bindings,
) -> Result<Vec<Tensor>, String> {
    let one = |t: Tensor| Ok(vec![t]);
    let unary = |f: fn(F) -> F| Ok(vec![map(args[0], f)]);
    match op {
        Op::Const { value, dtype } => one(scalar::<F>(*value, *dtype)),
        Op::Size { dim, dtype } => one(scalar::<F>(extent(dim, dims)? as f64, *dtype)),
        Op::Iota { .. } => one(Tensor::i32(&shapes[0], (0..shapes[0][0] as i32).collect())),
        Op::Cast { dtype } => one(cast::<F>(args[0], *dtype)),
        Op::Broadcast { .. } => one(broadcast(args[0], &shapes[0])),
        Op::Reshape { .. } => one(reshape(args[0], &shapes[0])),
        Op::Transpose { order } => one(transpose(args[0], &shapes[0], order)),
        Op::Slice { axis, start, end } => {
            let (first, last, own) = (extent(start, dims)?, extent(end, dims)?, args[0].shape[*axis]);
            if first > last || last > own {
                return Err(format!("slice {start}:{end} is {first}:{last}, but the dim is {own}"));
            }
            one(window(args[0], &shapes[0], *axis, first as i64))
        }
        Op::Pad { axis, before, after } => {
            extent(after, dims)?;
            one(window(args[0], &shapes[0], *axis, -(extent(before, dims)? as i64)))
        }
        Op::Concat { axis } => one(concat::<F>(args, &shapes[0], *axis)),
        Op::SliceAt { axis, len } => {
            let first = place(args[1], extent(len, dims)?, args[0].shape[*axis])?;
            one(window(args[0], &shapes[0], *axis, first as i64))
        }
        Op::WriteAt { axis } => {
            let first = place(args[2], args[1].shape[*axis], args[0].shape[*axis])?;
            one(replaced(args[0], args[1], *axis, first))
        }
        Op::Stop {} | Op::Dropout { .. } => one(args[0].clone()),

        Op::Add {} => arithmetic::<F>(args, |a, b| a + b, |a, b| Some(a.wrapping_add(b))),
        Op::Sub {} => arithmetic::<F>(args, |a, b| a - b, |a, b| Some(a.wrapping_sub(b))),
        Op::Mul {} => arithmetic::<F>(args, |a, b| a * b, |a, b| Some(a.wrapping_mul(b))),
        Op::Div {} => arithmetic::<F>(args, |a, b| a / b, |a, b| (b != 0).then(|| a.wrapping_div(b))),
        Op::Max {} => arithmetic::<F>(args, F::larger, |a, b| Some(a.max(b))),
        Op::Min {} => arithmetic::<F>(args, F::smaller, |a, b| Some(a.min(b))),
        Op::Pow {} => arithmetic::<F>(args, F::powf, |_, _| None),
        Op::Neg {} => one(signed::<F>(args[0], |x| -x, i32::wrapping_neg)),
        Op::Abs {} => one(signed::<F>(args[0], F::abs, i32::wrapping_abs)),
        Op::Exp {} => unary(F::exp),
        Op::Log {} => unary(F::ln),
        Op::Sqrt {} => unary(F::sqrt),
        Op::Tanh {} => unary(F::tanh),
        Op::Sigmoid {} => unary(F::sigmoid),
        // With exp(-|x|) nothing overflows.
        Op::LogSigmoid {} => unary(|x| x.smaller(F::zero()) - (-x.abs()).exp().ln_1p()),
        Op::Relu {} => unary(|x| x.larger(F::zero())),
        Op::Gelu {} => unary(|x| F::of(0.5) * x * (F::of(1.0) + (x * F::of(std::f64::consts::FRAC_1_SQRT_2)).erf())),
        Op::GeluTanh {} => unary(|x| {
            let inner = F::of((2.0 / std::f64::consts::PI).sqrt()) * (x + F::of(0.044715) * x * x * x);
            F::of(0.5) * x * (F::of(1.0) + inner.tanh())
        }),
        Op::Silu {} => unary(|x| x * x.sigmoid()),
        Op::Erf {} => unary(F::erf),

        Op::Eq {} => one(compare::<F>(args, |o| o == Some(Ordering::Equal))),
        Op::Ne {} => one(compare::<F>(args, |o| o != Some(Ordering::Equal))),
        Op::Lt {} => one(compare::<F>(args, |o| o == Some(Ordering::Less))),
        Op::Le {} => one(compare::<F>(args, |o| matches!(o, Some(Ordering::Less | Ordering::Equal)))),
        Op::And {} => one(logic(args, |a, b| a && b)),
        Op::Or {} => one(logic(args, |a, b| a || b)),
        Op::Not {} => one(logic(&[args[0], args[0]], |a, _| !a)),
        Op::Where {} => one(choose(bools(args[0]), args[1], args[2])),

        Op::Fused { shape, body } => {
            let shape = shape.iter().map(|dim| extent(dim, dims)).collect::<Result<Vec<usize>, String>>()?;
            let results = fused::<F>(body, (args, types), &shape, dims)?;
            Ok(results.iter().zip(shapes).map(|(result, shape)| reshape(result, shape)).collect())
        }
        Op::Contract { spec } => {
            let labels = Contraction::parse(spec)?;
            one(product::<F>(&labels, [args[0], args[1]], [types[0], types[1]], &shapes[0])?)
        }
        Op::ContractEach { spec, common } => {
            let labels = Contraction::parse(spec)?;
            let product = |(i, shape): (usize, &Vec<usize>)| {
                let (mut pair, mut dtypes) = ([args[0], args[1 + i]], [types[0], types[1 + i]]);
                pair.rotate_left(*common);
                dtypes.rotate_left(*common);
                product::<F>(&labels, pair, dtypes, shape)
            };
            shapes.iter().enumerate().map(product).collect()
        }
        Op::ContractFused { spec, common, bodies } => {
            let labels = Contraction::parse(spec)?;
            let mut results = Vec::new();
            for (part, body) in product_parts(bodies).into_iter().zip(bodies) {
                let (mut pair, mut dtypes) = ([args[0], args[part.other]], [types[0], types[part.other]]);
                pair.rotate_left(*common);
                dtypes.rotate_left(*common);
                let shape = &shapes[part.results.start];
                let narrow = product_type(dtypes[0], dtypes[1]).unwrap_or(types[0]);
                let dtype = if labels.wide { DType::F32 } else { narrow };
                let product = F::rounded(product::<F>(&labels, pair, dtypes, shape)?, dtype);
                let operands = [&[&product], &args[part.operands.clone()]].concat();
                let types = [&[dtype], &types[part.operands]].concat();
                results.extend(fused::<F>(body, (&operands, &types), shape, dims)?);
            }
            Ok(results)
        }
        Op::SumSquares {} => {
            let square = |x: &&Tensor| floats::<F>(x).iter().fold(F::zero(), |sum, &x| sum + x * x);
            let sum = args.iter().map(square).reduce(|a, b| a + b);
            one(tensor(&[], vec![sum.expect("the op has an operand")]))
        }
        Op::ReduceSum { axes } => one(reduce::<F>(args[0], axes, (F::zero(), |a, b| a + b), (0, i32::wrapping_add))),
        Op::ReduceMax { axes } => {
            one(reduce::<F>(args[0], axes, (F::of(f64::NEG_INFINITY), F::larger), (i32::MIN, Ord::max)))
        }
        Op::ReduceMin { axes } => {
            one(reduce::<F>(args[0], axes, (F::of(f64::INFINITY), F::smaller), (i32::MAX, Ord::min)))
        }
        Op::Cumsum { axis, reverse } => one(match &args[0].data {
            Data::I32(v) => Tensor::i32(&args[0].shape, running(v, &args[0].shape, *axis, *reverse, i32::wrapping_add)),
            Data::F32(_) | Data::F64(_) | Data::Bool(_) | Data::Key(_) => {
                tensor(&args[0].shape, running(floats::<F>(args[0]), &args[0].shape, *axis, *reverse, |a, b| a + b))
            }
        }),
        Op::Recurrence { axis, decay, reverse } => {
            let shape = &args[0].shape;
            let decay = F::of(*decay);
            one(tensor(shape, running(floats::<F>(args[0]), shape, *axis, *reverse, |before, x| x + decay * before)))
        }

        Op::Embed {} => composite::embed::<F>(args[0], args[1], &shapes[0]),
        Op::EmbedGrad { .. } => composite::embed_grad::<F>(args[0], args[1], &shapes[0]),
        Op::AddRows {} => {
            let rows = composite::embed_grad::<F>(args[1], args[2], &shapes[0])?;
            arithmetic::<F>(&[args[0], &rows[0]], |a, b| a + b, |a, b| Some(a.wrapping_add(b)))
        }
        Op::LayerNorm { eps } => composite::layer_norm::<F>(args[0], args[1], args[2], *eps),
        Op::LayerNormGrad { eps } => composite::layer_norm_grad::<F>(args[0], args[1], args[2], *eps),
        Op::RmsNorm { eps } => composite::rms_norm::<F>(args[0], args[1], *eps),
        Op::RmsNormGrad { eps } => composite::rms_norm_grad::<F>(args[0], args[1], args[2], *eps),
        Op::Rope { inverse } => composite::rope::<F>(args[0], args[1], args[2], *inverse),
        Op::CachedAttention { scale, window } => attention::cached::<F>(args, *scale, *window),
        Op::Attention { causal, scale, window } => {
            attention::Heads::<F>::new(args, *causal, *scale, *window).forward(args)
        }
        Op::AttentionGrad { causal, scale, window } => {
            attention::Heads::<F>::new(args, *causal, *scale, *window).backward(args)
        }
        Op::TokenLogp {} => composite::token_logp::<F>(args[0], args[1]),
        Op::TokenLogpGrad {} => composite::token_logp_grad::<F>(args[0], args[1], args[2]),
        Op::HeadLogp {} | Op::HeadLogpGrad { .. } => head::<F>(op, args, shapes),
        Op::PositionIn {} => composite::position_in(args[0]),

        Op::Fold { data } => {
            let folded = keys(args[0]).iter().map(|&key| random::fold(key, *data)).collect();
            one(Tensor::new(&args[0].shape, Data::Key(folded)))
        }
        Op::RandomNormal { mean, std, .. } => {
            one(draw::<F>(args[0], &shapes[0], |words| F::of(random::normal(words, *mean, *std))))
        }
        Op::RandomUniform { low, high, .. } => {
            one(draw::<F>(args[0], &shapes[0], |words| F::uniform(words, *low, *high)))
        }
        Op::RowUniform { .. } => {
            let (key, inner) = (keys(args[0])[0], shapes[0][1..].iter().product::<usize>());
            let row = |&row: &i32| (0..inner).map(move |i| F::uniform(random::row_words(key, row, i), 0.0, 1.0));
            one(tensor(&shapes[0], ints(args[1]).iter().flat_map(row).collect()))
        }
        Op::Sample { temperature, top_k, top_p } => {
            let how = Sampling { temperature: *temperature, top_k: *top_k, top_p: *top_p };
            let (key, place) = (keys(args[1])[0], ints(args[3])[0]);
            let width = args[0].shape[1];
            let rows = ints(args[2]).iter().enumerate().map(|(i, &row)| {
                let logits = floats::<F>(args[0])[i * width..(i + 1) * width].iter().map(|x| x.wide());
                choose_token(logits, &how, key, row, place)
            });
            one(Tensor::i32(&shapes[0], rows.collect::<Result<_, _>>()?))
        }
        Op::Adamw { beta1, beta2, eps, decay } => {
            let how = composite::Adam { beta1: *beta1, beta2: *beta2, eps: *eps, decay: *decay };
            let (each, settings) = args.split_at(args.len() - 3);
            let made = each.chunks(4).map(|of| composite::adamw::<F>(&[of, settings].concat(), how));
            Ok(made.collect::<Result<Vec<_>, _>>()?.concat())
        }
        Op::AllReduce { .. } | Op::AllGather { .. } | Op::ReduceScatter { .. } | Op::Shard { .. } => {
            panic!("bug: `{}` needs the other ranks", op.name())
        }
        Op::Read { .. } | Op::Wait {} | Op::ToHost {} | Op::FromHost {} => one(args[0].clone()),
        Op::Write { .. } => Ok(vec![]),
    }
}

/// A place that an operand gives, where `len` places of `extent` begin.
pub(crate) fn place(at: &Tensor, len: usize, extent: usize) -> Result<usize, String> {
    let first = ints(at)[0];
    usize::try_from(first)
        .ok()
        .filter(|first| first + len <= extent)
        .ok_or_else(|| format!("found place {first} for {len} of {extent} places"))
}

/// The value of a dim at launch.
pub(crate) fn extent(dim: &Dim, dims: &Bindings) -> Result<usize, String> {
    let n = dim.eval(dims).map_err(|s| format!("no input shows how large `{s}` is"))?;
    usize::try_from(n).map_err(|_| format!("the dim {dim} is {n}"))
}

// The elements of a verified op's operands have the types that `infer` asked for.

pub(crate) fn floats<F: Real>(tensor: &Tensor) -> &[F] {
    F::of_data(&tensor.data).unwrap_or_else(|| panic!("bug: {} where floats are inferred", tensor.dtype()))
}

pub(crate) fn ints(tensor: &Tensor) -> &[i32] {
    if let Data::I32(v) = &tensor.data { v } else { panic!("bug: {} where i32 is inferred", tensor.dtype()) }
}

fn bools(tensor: &Tensor) -> &[bool] {
    if let Data::Bool(v) = &tensor.data { v } else { panic!("bug: {} where bool is inferred", tensor.dtype()) }
}

fn keys(tensor: &Tensor) -> &[random::Key] {
    if let Data::Key(v) = &tensor.data { v } else { panic!("bug: {} where key is inferred", tensor.dtype()) }
}

pub(crate) fn tensor<F: Real>(shape: &[usize], elements: Vec<F>) -> Tensor {
    Tensor::new(shape, F::into_data(elements))
}

fn scalar<F: Real>(value: f64, dtype: DType) -> Tensor {
    cast::<F>(&Tensor::f64(&[], vec![value]), dtype)
}

fn cast<F: Real>(x: &Tensor, dtype: DType) -> Tensor {
    if let (Data::I32(_), DType::I32) | (Data::Bool(_), DType::Bool) | (Data::Key(_), _) = (&x.data, dtype) {
        return x.clone();
    }
    // Every number of every type is a double.
    let all = x.to_f64();
    let data = match dtype {
        DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) => {
            F::into_data(all.into_iter().map(F::of).collect())
        }
        DType::I32 => Data::I32(all.into_iter().map(|x| x as i32).collect()),
        DType::Bool => Data::Bool(all.into_iter().map(|x| x != 0.0).collect()),
        DType::Key => return zeros::<F>(dtype, &x.shape),
    };
    Tensor::new(&x.shape, data)
}

fn map<F: Real>(x: &Tensor, f: fn(F) -> F) -> Tensor {
    tensor(&x.shape, floats::<F>(x).iter().map(|&x| f(x)).collect())
}

fn signed<F: Real>(x: &Tensor, float: fn(F) -> F, int: fn(i32) -> i32) -> Tensor {
    match &x.data {
        Data::I32(v) => Tensor::i32(&x.shape, v.iter().map(|&x| int(x)).collect()),
        Data::F32(_) | Data::F64(_) | Data::Bool(_) | Data::Key(_) => map(x, float),
    }
}

pub(super) fn arithmetic<F: Real>(
    args: &[&Tensor],
    float: fn(F, F) -> F,
    int: fn(i32, i32) -> Option<i32>,
) -> Result<Vec<Tensor>, String> {
    let shape = &args[0].shape;
    if let (Data::I32(a), Data::I32(b)) = (&args[0].data, &args[1].data) {
        let all: Option<Vec<i32>> = a.iter().zip(b).map(|(&a, &b)| int(a, b)).collect();
        return Ok(vec![Tensor::i32(shape, all.ok_or("an integer is divided by zero")?)]);
    }
    let (a, b) = (floats::<F>(args[0]), floats::<F>(args[1]));
    Ok(vec![tensor(shape, a.iter().zip(b).map(|(&a, &b)| float(a, b)).collect())])
}

fn compare<F: Real>(args: &[&Tensor], holds: fn(Option<Ordering>) -> bool) -> Tensor {
    fn each<T: PartialOrd>(a: &[T], b: &[T], holds: fn(Option<Ordering>) -> bool) -> Vec<bool> {
        a.iter().zip(b).map(|(a, b)| holds(a.partial_cmp(b))).collect()
    }
    let all = match (&args[0].data, &args[1].data) {
        (Data::I32(a), Data::I32(b)) => each(a, b, holds),
        (Data::Bool(a), Data::Bool(b)) => each(a, b, holds),
        (_, _) => each(floats::<F>(args[0]), floats::<F>(args[1]), holds),
    };
    Tensor::bool(&args[0].shape, all)
}

fn logic(args: &[&Tensor], f: fn(bool, bool) -> bool) -> Tensor {
    Tensor::bool(&args[0].shape, bools(args[0]).iter().zip(bools(args[1])).map(|(&a, &b)| f(a, b)).collect())
}

/// Step by step, each on whole tensors and rounded to its type. What is of the row has 1 in the place of the dims that are
/// reduced; a reduction's value too.
fn fused<F: Real>(
    body: &Body,
    (args, types): (&[&Tensor], &[DType]),
    shape: &[usize],
    dims: &Bindings,
) -> Result<Vec<Tensor>, String> {
    let dtypes = body.dtypes(types)?;
    let rows =
        body.of_rows(shape.len(), |arg, from_last| args[arg].shape.iter().rev().nth(from_last).is_none_or(|&n| n == 1));
    let mut row = shape.to_vec();
    body.reduction().iter().flat_map(|r| r.axes).for_each(|&axis| row[axis] = 1);
    let mut values: Vec<Tensor> = args.iter().map(|&arg| arg.clone()).collect();
    for step in body.steps() {
        let value = values.len();
        let reduces = body.reduction().is_some_and(|r| r.value == value);
        let here = if rows[value] && !reduces { &row[..] } else { shape };
        let operands: Vec<Tensor> = step.args.iter().map(|&a| broadcast(&values[a], here)).collect();
        let operands: Vec<&Tensor> = operands.iter().collect();
        let types: Vec<DType> = step.args.iter().map(|&a| dtypes[a]).collect();
        let result = eval::<F>(&step.op, (&operands, &types), &[here.to_vec()], dims)?.remove(0);
        let result = F::rounded(result, dtypes[value]);
        values.push(if reduces { reshape(&result, &row) } else { result });
    }
    let whole = |r: usize| match rows[r] || body.reduction().is_some_and(|reduction| reduction.value == r) {
        true => values[r].clone(),
        false => broadcast(&values[r], shape),
    };
    Ok(body.results().iter().map(|&r| whole(r)).collect())
}

/// A contraction of operands of these types: weights that are kept in fewer bits become numbers of the other one's.
fn product<F: Real>(
    labels: &Contraction,
    operands: [&Tensor; 2],
    types: [DType; 2],
    shape: &[usize],
) -> Result<Tensor, String> {
    let dtype = product_type(types[0], types[1]).ok_or("operands of a product that do not fit")?;
    let [a, b] = operands.map(|operand| F::rounded(operand.clone(), dtype));
    Ok(contract::<F>(labels, &a, &b, shape))
}

fn contract<F: Real>(labels: &Contraction, lhs: &Tensor, rhs: &Tensor, shape: &[usize]) -> Tensor {
    let summed: Vec<char> = labels.lhs.iter().copied().filter(|c| !labels.out.contains(c)).collect();
    let extents: Vec<usize> = summed
        .iter()
        .map(|c| labels.lhs.iter().zip(&lhs.shape).find(|(l, _)| *l == c).map_or(0, |(_, &n)| n))
        .collect();
    // Offsets in an operand as the given letters run; a letter it lacks leaves it in place.
    let walk = |letters: &[char], shape: &[usize], own: &[char], operand: &Tensor| {
        let steps = strides(&operand.shape);
        let steps: Vec<usize> =
            letters.iter().map(|c| own.iter().position(|o| o == c).map_or(0, |i| steps[i])).collect();
        offsets(shape, &steps)
    };
    let (outer_l, outer_r) = (walk(&labels.out, shape, &labels.lhs, lhs), walk(&labels.out, shape, &labels.rhs, rhs));
    let (inner_l, inner_r) = (walk(&summed, &extents, &labels.lhs, lhs), walk(&summed, &extents, &labels.rhs, rhs));
    let (a, b) = (floats::<F>(lhs), floats::<F>(rhs));
    let sum_at = |l: usize, r: usize| {
        let mut sum = F::zero();
        for (i, j) in inner_l.iter().zip(&inner_r) {
            sum = sum + a[l + i] * b[r + j];
        }
        sum
    };
    tensor(shape, outer_l.into_iter().zip(outer_r).map(|(l, r)| sum_at(l, r)).collect())
}

/// A head's log-probabilities, and the gradients that are wanted, by the ops that they stand for.
fn head<F: Real>(op: &Op, args: &[&Tensor], shapes: &[Vec<usize>]) -> Result<Vec<Tensor>, String> {
    let (n, [v, d]) = (args[2].len(), [args[1].shape[0], args[1].shape[1]]);
    let (x, tokens) = (reshape(args[0], &[n, d]), reshape(args[2], &[n]));
    let product = |spec: &str, a: &Tensor, b: &Tensor, shape: &[usize]| -> Result<Tensor, String> {
        Ok(contract::<F>(&Contraction::parse(spec)?, a, b, shape))
    };
    let logits = product("nd,vd->nv", &x, args[1], &[n, v])?;
    let mut all = composite::token_logp::<F>(&logits, &tokens)?;
    if let Op::HeadLogpGrad { head } = op {
        let gradient = composite::token_logp_grad::<F>(&logits, &tokens, &reshape(args[3], &[n]))?.remove(0);
        all.push(product("nv,vd->nd", &gradient, args[1], &[n, d])?);
        if *head {
            all.push(product("nv,nd->vd", &gradient, &x, &[v, d])?);
        }
    }
    Ok(all.iter().zip(shapes).map(|(one, shape)| reshape(one, shape)).collect())
}

fn reduce<F: Real>(
    x: &Tensor,
    axes: &[usize],
    (start, step): (F, fn(F, F) -> F),
    (int_start, int_step): (i32, fn(i32, i32) -> i32),
) -> Tensor {
    fn each<T: Copy>(all: &[T], to: &[usize], len: usize, start: T, step: fn(T, T) -> T) -> Vec<T> {
        let mut out = vec![start; len];
        for (&x, &at) in all.iter().zip(to) {
            out[at] = step(out[at], x);
        }
        out
    }
    let kept: Vec<usize> = (0..x.shape.len()).filter(|i| !axes.contains(i)).collect();
    let shape: Vec<usize> = kept.iter().map(|&i| x.shape[i]).collect();
    let mut steps = vec![0; x.shape.len()];
    for (&i, stride) in kept.iter().zip(strides(&shape)) {
        steps[i] = stride;
    }
    let (to, len) = (offsets(&x.shape, &steps), shape.iter().product());
    match &x.data {
        Data::I32(v) => Tensor::i32(&shape, each(v, &to, len, int_start, int_step)),
        Data::F32(_) | Data::F64(_) | Data::Bool(_) | Data::Key(_) => {
            tensor(&shape, each(floats::<F>(x), &to, len, start, step))
        }
    }
}

fn running<T: Copy>(all: &[T], shape: &[usize], axis: usize, reverse: bool, add: impl Fn(T, T) -> T) -> Vec<T> {
    let (outer, inner) = around(shape, axis);
    let extent = shape[axis];
    let mut out = all.to_vec();
    for o in 0..outer {
        for k in 0..inner {
            let at = |i: usize| (o * extent + if reverse { extent - 1 - i } else { i }) * inner + k;
            for i in 1..extent {
                out[at(i)] = add(out[at(i - 1)], out[at(i)]);
            }
        }
    }
    out
}

fn draw<F: Real>(key: &Tensor, shape: &[usize], number: impl Fn([u32; 2]) -> F) -> Tensor {
    let key = keys(key)[0];
    let inner = shape.iter().skip(1).product();
    let n = shape.iter().product();
    tensor(shape, (0..n).map(|i| number(random::words(key, i, inner))).collect())
}
