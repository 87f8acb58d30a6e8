//! Result types: one rule per op.

use crate::body::product_parts;
use crate::dim::Dim;
use crate::op::{Arity, Op};
use crate::types::{DType, DimList, Type};

/// The types of an op's results from the types of its operands, or what is wrong with the operands.
///
/// `state` is the type of the parameter or state that [`Op::Read`] and [`Op::Write`] name; ignored by all others.
pub fn infer(op: &Op, args: &[Type], state: Option<&Type>) -> Result<Vec<Type>, String> {
    let arity_fits = match op.row().arity {
        Arity::Exactly(n) => args.len() == n,
        Arity::Optional(n) => args.len() == n || args.len() == n + 1,
        Arity::Many => !args.is_empty(),
    };
    if !arity_fits {
        return Err(format!("`{}` has {} operands, expected {:?}", op.name(), args.len(), op.row().arity));
    }
    let one = |ty: Type| Ok(vec![ty]);
    let takes_quantized = matches!(
        op,
        Op::Cast { .. }
            | Op::Contract { .. }
            | Op::ContractEach { .. }
            | Op::Read { .. }
            | Op::Write { .. }
            | Op::AllGather { axis: 0, .. }
            | Op::Shard { axis: 0, .. }
            | Op::Wait {}
    );
    if let Some(arg) = args.iter().find(|arg| arg.dtype.is_quantized() && !takes_quantized) {
        return Err(format!("`{}` of {arg}, which is for products only", op.name()));
    }
    match op {
        Op::Const { dtype, .. } => one(not_key(op, &Type::scalar(*dtype))?.clone()),
        Op::Size { dtype, .. } => one(number(op, &Type::scalar(*dtype))?.clone()),
        Op::Iota { len } => one(Type::new(DType::I32, [len.clone()])),
        Op::Cast { dtype } if dtype.is_quantized() || args[0].dtype.is_quantized() => {
            let (from, to) = (&args[0], args[0].with(*dtype));
            if from.is_scalar() || !(from.dtype == DType::F32 || to.dtype.is_float()) {
                return Err(format!("`cast` of {from} to {dtype}, expected rows from f32, or to floats"));
            }
            one(to)
        }
        Op::Cast { dtype } => one(not_key(op, &not_key(op, &args[0])?.with(*dtype))?.clone()),
        Op::Broadcast { shape } => {
            broadcasts(&args[0].dims, shape)?;
            one(Type::new(args[0].dtype, shape.clone()))
        }
        Op::Reshape { shape } => {
            let (have, want) = (args[0].len(), Dim::product(shape));
            if have != want {
                return Err(format!("{} has {have} elements, {} has {want}", args[0], DimList(shape)));
            }
            one(Type::new(args[0].dtype, shape.clone()))
        }
        Op::Transpose { order } => {
            let mut seen = order.clone();
            seen.sort_unstable();
            if seen != (0..args[0].rank()).collect::<Vec<_>>() {
                return Err(format!("{order:?} does not order the dims of {}", args[0]));
            }
            one(Type::new(args[0].dtype, order.iter().map(|&i| args[0].dims[i].clone()).collect::<Vec<_>>()))
        }
        Op::Slice { axis, start, end } => {
            let dim = axis_of(&args[0], *axis)?;
            let mut dims = args[0].dims.clone();
            dims[*axis] = end - start;
            // Constant bounds can be checked here; symbolic ones are the frontend's and the launch's business.
            let bad = |d: &Dim| d.constant().is_some_and(|n| n < 0);
            if bad(start) || bad(&dims[*axis]) || bad(&(dim - end)) {
                return Err(format!("slice {start}:{end} leaves dim {axis} of {}", args[0]));
            }
            one(Type::new(args[0].dtype, dims))
        }
        Op::Pad { axis, before, after } => {
            let dim = axis_of(&args[0], *axis)?;
            let mut dims = args[0].dims.clone();
            dims[*axis] = &(dim + before) + after;
            one(Type::new(args[0].dtype, dims))
        }
        Op::Concat { axis } => {
            let mut dims = args[0].dims.clone();
            axis_of(&args[0], *axis)?;
            for arg in &args[1..] {
                let same = arg.dtype == args[0].dtype
                    && arg.rank() == dims.len()
                    && (0..dims.len()).all(|i| i == *axis || arg.dims[i] == dims[i]);
                if !same {
                    return Err(format!("cannot join {} and {arg} along dim {axis}", args[0]));
                }
                dims[*axis] = &dims[*axis] + &arg.dims[*axis];
            }
            one(Type::new(args[0].dtype, dims))
        }
        Op::SliceAt { axis, len } => {
            place(op, &args[1])?;
            let dim = axis_of(&args[0], *axis)?;
            if (dim - len).constant().is_some_and(|n| n < 0) || len.constant().is_some_and(|n| n < 0) {
                return Err(format!("{len} places leave dim {axis} of {}", args[0]));
            }
            let mut dims = args[0].dims.clone();
            dims[*axis] = len.clone();
            one(Type::new(args[0].dtype, dims))
        }
        Op::WriteAt { axis } => {
            place(op, &args[2])?;
            let mut dims = args[0].dims.clone();
            let dim = axis_of(&args[0], *axis)?;
            let len = axis_of(&args[1], *axis)?;
            if (dim - len).constant().is_some_and(|n| n < 0) {
                return Err(format!("{} leaves dim {axis} of {}", args[1], args[0]));
            }
            dims[*axis] = len.clone();
            same(&args[1], &Type::new(args[0].dtype, dims))?;
            one(args[0].clone())
        }
        Op::Stop {} | Op::Dropout { .. } => one(args[0].clone()),
        Op::Add {} | Op::Sub {} | Op::Mul {} | Op::Div {} | Op::Max {} | Op::Min {} => {
            same(&args[0], &args[1])?;
            one(number(op, &args[0])?.clone())
        }
        Op::Pow {} => {
            same(&args[0], &args[1])?;
            one(floats(op, &args[0])?.clone())
        }
        Op::Neg {} | Op::Abs {} => one(number(op, &args[0])?.clone()),
        Op::Exp {}
        | Op::Log {}
        | Op::Sqrt {}
        | Op::Tanh {}
        | Op::Sigmoid {}
        | Op::LogSigmoid {}
        | Op::Relu {}
        | Op::Gelu {}
        | Op::GeluTanh {}
        | Op::Silu {}
        | Op::Erf {} => one(floats(op, &args[0])?.clone()),
        Op::Eq {} | Op::Ne {} => {
            same(&args[0], &args[1])?;
            one(not_key(op, &args[0])?.with(DType::Bool))
        }
        Op::Lt {} | Op::Le {} => {
            same(&args[0], &args[1])?;
            one(number(op, &args[0])?.with(DType::Bool))
        }
        Op::And {} | Op::Or {} => {
            same(&args[0], &args[1])?;
            one(typed(op, &args[0], DType::Bool)?.clone())
        }
        Op::Not {} => one(typed(op, &args[0], DType::Bool)?.clone()),
        Op::Where {} => {
            typed(op, &args[0], DType::Bool)?;
            same(&args[1], &args[2])?;
            same(&args[0], &args[1].with(DType::Bool))?;
            one(args[1].clone())
        }
        Op::Fused { shape, body } => {
            let all = body.types(shape, args)?;
            Ok(body.results().iter().map(|&r| all[r].clone()).collect())
        }
        Op::Contract { spec } => {
            let labels = Contraction::parse(spec)?;
            one(labels.result(&args[0], &args[1])?)
        }
        Op::ContractFused { spec, common, bodies } => {
            let parts = product_parts(bodies);
            let count = parts.last().map_or(0, |part| part.operands.end);
            if *common > 1 || args.len() != count {
                return Err(format!(
                    "`{op}` of {} operands, expected {count}, of which the first or second is common",
                    args.len()
                ));
            }
            let mut results = Vec::new();
            for (part, body) in parts.into_iter().zip(bodies) {
                let mut pair = [args[0].clone(), args[part.other].clone()];
                pair.rotate_left(*common);
                let product = infer(&Op::Contract { spec: spec.clone() }, &pair, None)?.swap_remove(0);
                let mut operands = vec![product.dtype];
                for arg in &args[part.operands] {
                    broadcasts(&arg.dims, &product.dims)?;
                    operands.push(arg.dtype);
                }
                if body.reduction().is_some() {
                    return Err(format!("`{}` with a reduction in a body", op.name()));
                }
                let all = body.dtypes(&operands)?;
                results.extend(body.results().iter().map(|&r| product.with(all[r])));
            }
            Ok(results)
        }
        Op::ContractEach { spec, common } => {
            if *common > 1 || args.len() < 2 {
                return Err(format!(
                    "`{op}` of {} operands, expected the one in common, 0 or 1, and others",
                    args.len()
                ));
            }
            let each = Op::Contract { spec: spec.clone() };
            let result = |other: &Type| {
                let mut pair = [args[0].clone(), other.clone()];
                pair.rotate_left(*common);
                Ok(infer(&each, &pair, None)?.swap_remove(0))
            };
            args[1..].iter().map(result).collect()
        }
        Op::SumSquares {} => {
            for arg in args {
                float(op, arg)?;
            }
            one(Type::scalar(args[0].dtype))
        }
        Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => {
            number(op, &args[0])?;
            if !axes.windows(2).all(|w| w[0] < w[1]) || axes.iter().any(|&a| a >= args[0].rank()) {
                return Err(format!("dims {axes:?} are not ascending dims of {}", args[0]));
            }
            let kept = (0..args[0].rank()).filter(|i| !axes.contains(i)).map(|i| args[0].dims[i].clone());
            // The sum of many narrow numbers is not rounded to one of them; the largest is one of them.
            let summed = matches!(op, Op::ReduceSum { .. }) && args[0].dtype.is_narrow();
            let dtype = if summed { DType::F32 } else { args[0].dtype };
            one(Type::new(dtype, kept.collect::<Vec<_>>()))
        }
        Op::Cumsum { axis, .. } => {
            if args[0].dtype != DType::I32 {
                float(op, &args[0])?;
            }
            axis_of(&args[0], *axis)?;
            one(args[0].clone())
        }
        Op::Recurrence { axis, .. } => {
            axis_of(float(op, &args[0])?, *axis)?;
            one(args[0].clone())
        }
        Op::Embed {} => {
            floats(op, &args[0])?;
            typed(op, &args[1], DType::I32)?;
            rank(op, &args[0], 2)?;
            one(Type::new(args[0].dtype, [args[1].dims.as_slice(), &args[0].dims[1..]].concat()))
        }
        Op::EmbedGrad { rows } => {
            typed(op, &args[0], DType::I32)?;
            floats(op, &args[1])?;
            let (width, lead) = args[1].dims.split_last().ok_or("`embed_grad` of a scalar")?;
            if lead != args[0].dims {
                return Err(format!("indices {} and gradient {} differ", args[0], args[1]));
            }
            one(Type::new(DType::F32, [rows.clone(), width.clone()]))
        }
        Op::AddRows {} => {
            let x = float(op, &args[0])?;
            let [rows, width] = &x.dims[..] else { return Err(format!("`add_rows` to {x}, expected 2 dims")) };
            let added = infer(&Op::EmbedGrad { rows: rows.clone() }, &args[1..], None)?;
            same(&added[0], &Type::new(x.dtype, [rows.clone(), width.clone()]))?;
            one(x.clone())
        }
        Op::LayerNorm { .. } => {
            let x = float(op, &args[0])?;
            let width = x.dims.last().ok_or("`layer_norm` of a scalar")?;
            for arg in &args[1..] {
                same(arg, &Type::new(x.dtype, [width.clone()]))?;
            }
            one(x.clone())
        }
        Op::LayerNormGrad { .. } => {
            let x = float(op, &args[0])?;
            let width = x.dims.last().ok_or("`layer_norm_grad` of a scalar")?;
            let row = Type::new(x.dtype, [width.clone()]);
            same(&args[1], &row)?;
            same(&args[2], x)?;
            Ok(vec![x.clone(), row.clone(), row])
        }
        Op::RmsNorm { .. } | Op::RmsNormGrad { .. } => {
            let x = float(op, &args[0])?;
            let width = x.dims.last().ok_or_else(|| format!("`{}` of a scalar", op.name()))?;
            let row = Type::new(x.dtype, [width.clone()]);
            same(&args[1], &row)?;
            match args.get(2) {
                None => one(x.clone()),
                Some(grad) => {
                    same(grad, x)?;
                    Ok(vec![x.clone(), row])
                }
            }
        }
        Op::Rope { .. } => {
            let x = floats(op, &args[0])?;
            rank(op, x, 4)?;
            same(&args[1], &Type::new(DType::I32, &x.dims[..2]))?;
            rank(op, float(op, &args[2])?, 1)?;
            if &args[2].dims[0] + &args[2].dims[0] != x.dims[3] {
                return Err(format!("{} frequencies for {x}, expected half of its last dim", args[2].dims[0]));
            }
            one(x.clone())
        }
        Op::Attention { .. } => attention(op, args, args.get(4)),
        Op::CachedAttention { .. } => {
            let (q, k, v) = (floats(op, &args[0])?, typed(op, &args[1], args[0].dtype)?, &args[2]);
            rank(op, q, 4)?;
            rank(op, k, 4)?;
            same(k, v)?;
            same(&args[3], &Type::new(DType::I32, &k.dims[..2]))?;
            place(op, &args[4])?;
            slopes(q, args.get(5))?;
            if q.dims[0] != k.dims[0] || q.dims[3] != k.dims[3] || !groups(q, k) {
                return Err(format!("queries {q} and keys {k} do not fit"));
            }
            one(q.clone())
        }
        Op::AttentionGrad { .. } => {
            let forward = attention(op, args, args.get(7))?;
            same(&args[4], &forward[0])?;
            same(&args[5], &forward[1])?;
            same(&args[6], &forward[0])?;
            Ok(args[..3].to_vec())
        }
        Op::TokenLogp {} | Op::TokenLogpGrad {} => {
            let (_, lead) =
                floats(op, &args[0])?.dims.split_last().ok_or_else(|| format!("`{}` of a scalar", op.name()))?;
            typed(op, &args[1], DType::I32)?;
            if lead != args[1].dims {
                return Err(format!("logits {} and tokens {} differ", args[0], args[1]));
            }
            if let Some(grad) = args.get(2) {
                same(grad, &args[1].with(DType::F32))?;
                return one(args[0].clone());
            }
            one(args[1].with(DType::F32))
        }
        Op::HeadLogp {} | Op::HeadLogpGrad { .. } => {
            let (x, head) = (float(op, &args[0])?, float(op, &args[1])?);
            let (width, lead) = x.dims.split_last().ok_or_else(|| format!("`{}` of a scalar", op.name()))?;
            rank(op, head, 2)?;
            if head.dims[1] != *width {
                return Err(format!("{x} and the head {head} differ"));
            }
            same(&args[2], &Type::new(DType::I32, lead))?;
            let logp = Type::new(x.dtype, lead);
            let Op::HeadLogpGrad { head: wanted } = op else { return one(logp) };
            same(&args[3], &logp)?;
            let all = [logp, x.clone(), head.clone()];
            Ok(all.into_iter().take(2 + usize::from(*wanted)).collect())
        }
        Op::PositionIn {} => {
            rank(op, &args[0], 2)?;
            one(typed(op, &args[0], DType::I32)?.clone())
        }
        Op::Fold { .. } => one(typed(op, &args[0], DType::Key)?.clone()),
        Op::RandomNormal { shape, .. } | Op::RandomUniform { shape, .. } => {
            typed(op, &args[0], DType::Key)?;
            rank(op, &args[0], 0)?;
            one(Type::new(DType::F32, shape.clone()))
        }
        Op::RowUniform { shape } => {
            typed(op, &args[0], DType::Key)?;
            rank(op, &args[0], 0)?;
            let [rows, ..] = &shape[..] else { return Err("`row_uniform` of no dims, expected rows".into()) };
            same(&args[1], &Type::new(DType::I32, [rows.clone()]))?;
            one(Type::new(DType::F32, shape.clone()))
        }
        Op::Sample { .. } => {
            rank(op, float(op, &args[0])?, 2)?;
            typed(op, &args[1], DType::Key)?;
            rank(op, &args[1], 0)?;
            let rows = Type::new(DType::I32, &args[0].dims[..1]);
            same(&args[2], &rows)?;
            place(op, &args[3])?;
            one(rows)
        }
        Op::AllReduce { .. } => args.iter().map(|arg| number(op, arg).cloned()).collect(),
        Op::AllGather { lens, .. } if lens.len() != args.len() => {
            Err(format!("`all_gather` of {} operands has {} numbers of places", args.len(), lens.len()))
        }
        Op::AllGather { axis, lens, .. } => {
            args.iter().zip(lens).map(|(arg, &len)| with_extent(movable(op, arg)?, *axis, |_| len)).collect()
        }
        Op::ReduceScatter { axis, ranks, .. } => {
            let part = |extent: usize| extent.div_ceil((*ranks).max(1));
            args.iter().map(|arg| with_extent(number(op, arg)?, *axis, part)).collect()
        }
        Op::Wait {} | Op::ToHost {} | Op::FromHost {} => one(args[0].clone()),
        Op::Shard { axis, ranks, .. } => {
            one(with_extent(movable(op, &args[0])?, *axis, |extent| extent.div_ceil((*ranks).max(1)))?)
        }
        Op::Adamw { .. } => {
            let (each, settings) = args.split_at(args.len().saturating_sub(3));
            if each.is_empty() || each.len() % 4 != 0 {
                return Err(format!("`adamw` of {} operands, expected 4 for each parameter and 3", args.len()));
            }
            for of in each.chunks(4) {
                for arg in &of[1..] {
                    same(arg, float(op, &of[0])?)?;
                }
            }
            same(&settings[0], &Type::scalar(DType::F32))?;
            same(&settings[1], &Type::scalar(DType::I32))?;
            same(&settings[2], &Type::scalar(DType::F32))?;
            Ok(each.chunks(4).flat_map(|of| vec![of[0].clone(); 3]).collect())
        }
        Op::Read { .. } => one(state.ok_or("`read` of an unknown state")?.clone()),
        Op::Write { .. } => {
            same(&args[0], state.ok_or("`write` of an unknown state")?)?;
            Ok(vec![])
        }
    }
}

/// Whether `from` stretches to `to`: aligned from the right, each dim equal or a literal 1.
pub fn broadcasts(from: &[Dim], to: &[Dim]) -> Result<(), String> {
    let fits = from.len() <= to.len()
        && from.iter().rev().zip(to.iter().rev()).all(|(a, b)| a == b || a.constant() == Some(1));
    if fits { Ok(()) } else { Err(format!("{} does not stretch to {}", DimList(from), DimList(to))) }
}

/// The type in which a product of such elements computes: the one that both have, or, where weights are kept in fewer bits,
/// that of the other operand; each weight is first made a number of it. `None` if there is no such product.
pub fn product_type(lhs: DType, rhs: DType) -> Option<DType> {
    match (lhs, rhs) {
        (a, b) if a == b => a.is_float().then_some(a),
        (DType::Quantized(_), float) | (float, DType::Quantized(_)) => float.is_float().then_some(float),
        (DType::F32, kept) | (kept, DType::F32) => kept.is_narrow().then_some(DType::F32),
        _ => None,
    }
}

/// What makes the result of a product of narrow floats wide.
const WIDE: &str = ":f32";

/// The labels of a [`Op::Contract`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contraction {
    /// Letters of the first operand's dims.
    pub lhs: Vec<char>,
    /// Letters of the second operand's dims.
    pub rhs: Vec<char>,
    /// Letters of the result's dims.
    pub out: Vec<char>,
    /// Whether the product of narrow floats is f32: sums are taken in f32 always, and not rounded then.
    pub wide: bool,
}

impl Contraction {
    /// Reads `btd,vd->btv`, or `btd,vd->btv:f32` of narrow floats with a result that is wide. A letter stands once per
    /// operand; every letter of the result stands in an operand.
    pub fn parse(spec: &str) -> Result<Contraction, String> {
        let bad = || format!("`{spec}` is no contraction; expected e.g. `btd,vd->btv`");
        let (operands, out) = spec.split_once("->").ok_or_else(bad)?;
        let (out, wide) = out.strip_suffix(WIDE).map_or((out, false), |out| (out, true));
        let (lhs, rhs) = operands.split_once(',').ok_or_else(bad)?;
        let letters = |s: &str| -> Result<Vec<char>, String> {
            let all: Vec<char> = s.chars().collect();
            let unique = all.iter().enumerate().all(|(i, c)| c.is_ascii_lowercase() && !all[..i].contains(c));
            if unique { Ok(all) } else { Err(bad()) }
        };
        let labels = Contraction { lhs: letters(lhs)?, rhs: letters(rhs)?, out: letters(out)?, wide };
        let known = |c: &char| labels.lhs.contains(c) || labels.rhs.contains(c);
        let used = |c: &char, other: &[char]| labels.out.contains(c) || other.contains(c);
        if !labels.out.iter().all(known)
            || !labels.lhs.iter().all(|c| used(c, &labels.rhs))
            || !labels.rhs.iter().all(|c| used(c, &labels.lhs))
        {
            return Err(bad());
        }
        Ok(labels)
    }

    /// The text form.
    pub fn spec(&self) -> String {
        let text = |v: &[char]| v.iter().collect::<String>();
        let wide = if self.wide { WIDE } else { "" };
        format!("{},{}->{}{wide}", text(&self.lhs), text(&self.rhs), text(&self.out))
    }

    fn result(&self, lhs: &Type, rhs: &Type) -> Result<Type, String> {
        if lhs.rank() != self.lhs.len() || rhs.rank() != self.rhs.len() {
            return Err(format!("{} does not label {lhs} and {rhs}", self.spec()));
        }
        let dim_of = |c: &char| {
            let left = self.lhs.iter().position(|x| x == c).map(|i| &lhs.dims[i]);
            let right = self.rhs.iter().position(|x| x == c).map(|i| &rhs.dims[i]);
            match (left, right) {
                (Some(a), Some(b)) if a != b => Err(format!("`{c}` is {a} in {lhs} and {b} in {rhs}")),
                (a, b) => Ok(a.or(b).cloned().unwrap_or_default()),
            }
        };
        for c in self.lhs.iter().chain(&self.rhs) {
            dim_of(c)?;
        }
        let computes = product_type(lhs.dtype, rhs.dtype)
            .ok_or_else(|| format!("the product {} of {lhs} and {rhs}, expected floats of one type", self.spec()))?;
        if self.wide && !computes.is_narrow() {
            return Err(format!("the product {} of {lhs} is f32 without `{WIDE}`", self.spec()));
        }
        let dtype = if self.wide { DType::F32 } else { computes };
        Ok(Type::new(dtype, self.out.iter().map(dim_of).collect::<Result<Vec<_>, _>>()?))
    }
}

/// The results of attention over q, k, v and segment, which `args` begin with.
fn attention(op: &Op, args: &[Type], bias: Option<&Type>) -> Result<Vec<Type>, String> {
    let (q, k, v, segment) = (floats(op, &args[0])?, typed(op, &args[1], args[0].dtype)?, &args[2], &args[3]);
    rank(op, q, 4)?;
    rank(op, k, 4)?;
    same(k, v)?;
    same(segment, &Type::new(DType::I32, &q.dims[..2]))?;
    if q.dims[..2] != k.dims[..2] || q.dims[3] != k.dims[3] || !groups(q, k) {
        return Err(format!("queries {q} and keys {k} do not fit"));
    }
    slopes(q, bias)?;
    let lse = Type::new(DType::F32, [q.dims[0].clone(), q.dims[2].clone(), q.dims[1].clone()]);
    Ok(vec![q.clone(), lse])
}

/// One number per head of the queries, where there are slopes.
fn slopes(q: &Type, found: Option<&Type>) -> Result<(), String> {
    found.map_or(Ok(()), |found| same(found, &Type::new(DType::F32, [q.dims[2].clone()])))
}

/// Whether every head of the keys serves a whole number of heads of the queries.
fn groups(q: &Type, k: &Type) -> bool {
    match (q.dims[2].constant(), k.dims[2].constant()) {
        (Some(h), Some(kv)) => kv > 0 && h % kv == 0,
        _ => q.dims[2] == k.dims[2],
    }
}

/// A place along a dim that is known when the op runs.
fn place(op: &Op, ty: &Type) -> Result<(), String> {
    rank(op, typed(op, ty, DType::I32)?, 0)
}

fn same(found: &Type, expected: &Type) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("found {found}, expected {expected}")) }
}

fn typed<'a>(op: &Op, ty: &'a Type, dtype: DType) -> Result<&'a Type, String> {
    if ty.dtype == dtype { Ok(ty) } else { Err(format!("`{}` of {ty}, expected {dtype}", op.name())) }
}

/// Floats of full width: what is computed in f32 always.
fn float<'a>(op: &Op, ty: &'a Type) -> Result<&'a Type, String> {
    typed(op, ty, DType::F32)
}

/// Floats of any width.
fn floats<'a>(op: &Op, ty: &'a Type) -> Result<&'a Type, String> {
    if ty.dtype.is_float() { Ok(ty) } else { typed(op, ty, DType::F32) }
}

fn number<'a>(op: &Op, ty: &'a Type) -> Result<&'a Type, String> {
    match ty.dtype {
        DType::F32 | DType::Bf16 | DType::F16 | DType::I32 => Ok(ty),
        DType::Quantized(_) | DType::Bool | DType::Key => Err(format!("`{}` of {ty}, expected numbers", op.name())),
    }
}

fn not_key<'a>(op: &Op, ty: &'a Type) -> Result<&'a Type, String> {
    match ty.dtype {
        DType::Key => Err(format!("`{}` of a random key", op.name())),
        DType::Quantized(_) => Err(format!("`{}` of {ty}, which is for products only", op.name())),
        DType::F32 | DType::Bf16 | DType::F16 | DType::I32 | DType::Bool => Ok(ty),
    }
}

/// What can be moved as it lies.
fn movable<'a>(op: &Op, ty: &'a Type) -> Result<&'a Type, String> {
    if ty.dtype.is_quantized() { Ok(ty) } else { not_key(op, ty) }
}

fn rank(op: &Op, ty: &Type, rank: usize) -> Result<(), String> {
    if ty.rank() == rank { Ok(()) } else { Err(format!("`{}` of {ty}, expected {rank} dims", op.name())) }
}

/// A type with another extent of a dim that is a number.
fn with_extent(ty: &Type, axis: usize, extent: impl Fn(usize) -> usize) -> Result<Type, String> {
    let have = axis_of(ty, axis)?.constant().and_then(|n| usize::try_from(n).ok());
    let have = have.ok_or_else(|| format!("dim {axis} of {ty} is no number"))?;
    let mut dims = ty.dims.clone();
    dims[axis] = Dim::from(extent(have) as i64);
    Ok(Type::new(ty.dtype, dims))
}

fn axis_of(ty: &Type, axis: usize) -> Result<&Dim, String> {
    ty.dims.get(axis).ok_or_else(|| format!("{ty} has no dim {axis}"))
}
