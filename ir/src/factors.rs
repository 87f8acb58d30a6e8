//! Factors: which dims of an op's operands and results go through their places together.
//!
//! `contract` of `btd,vd->btv` has the factors `b`, `t`, `d` and `v`. Where every operand and result that has a factor is cut along
//! it, a rank computes its part from parts; of a result without it, it has a summand. This is all that a pass must know of an op
//! to share it out to ranks.

use crate::dim::Dim;
use crate::infer::Contraction;
use crate::op::{Class, Op};
use crate::types::Type;

/// What cutting along a factor means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Parts of results come from the same parts of operands.
    Along,
    /// All places are needed together.
    Whole,
    /// Tokens number the places.
    Vocabulary,
    /// No operand has it, and what stands at a place depends on its number.
    Drawn,
}

/// Dims that belong together, as `(operand or result, dim)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Factor {
    /// What cutting along it means.
    pub kind: Kind,
    /// Dims of operands.
    pub args: Vec<(usize, usize)>,
    /// Dims of results.
    pub results: Vec<(usize, usize)>,
    /// Results that are sums over it.
    pub sums: Vec<usize>,
}

impl Factor {
    fn new(kind: Kind, args: impl Into<Vec<(usize, usize)>>, results: impl Into<Vec<(usize, usize)>>) -> Factor {
        Factor { kind, args: args.into(), results: results.into(), sums: Vec::new() }
    }

    fn along(args: impl Into<Vec<(usize, usize)>>, results: impl Into<Vec<(usize, usize)>>) -> Factor {
        Factor::new(Kind::Along, args, results)
    }

    fn whole(args: impl Into<Vec<(usize, usize)>>, results: impl Into<Vec<(usize, usize)>>) -> Factor {
        Factor::new(Kind::Whole, args, results)
    }

    fn summed(self, sums: impl Into<Vec<usize>>) -> Factor {
        Factor { sums: sums.into(), ..self }
    }
}

/// The factors of an op on operands and results of these types. Every dim is in one of them.
pub fn factors(op: &Op, args: &[Type], results: &[Type]) -> Vec<Factor> {
    let rank = |i: usize| args[i].rank();
    match op {
        Op::Read { .. } | Op::Write { .. } | Op::Const { .. } | Op::Size { .. } | Op::Fold { .. } => Vec::new(),
        Op::Iota { .. } | Op::RandomNormal { .. } | Op::RandomUniform { .. } => drawn(results, 0),
        Op::RowUniform { .. } => {
            let mut all = drawn(results, 1);
            all.push(Factor::along([(1, 0)], [(0, 0)]));
            all
        }
        Op::Broadcast { shape } => {
            let before = shape.len() - rank(0);
            let factor = |at: usize| match at.checked_sub(before) {
                Some(dim) if args[0].dims[dim] == shape[at] => Factor::along([(0, dim)], [(0, at)]),
                _ => Factor::along([], [(0, at)]),
            };
            let ones = (0..rank(0)).filter(|&dim| args[0].dims[dim] != shape[dim + before]);
            (0..shape.len()).map(factor).chain(ones.map(|dim| Factor::along([(0, dim)], []))).collect()
        }
        Op::Reshape { shape } => reshape(&args[0].dims, shape),
        Op::Transpose { order } => {
            order.iter().enumerate().map(|(at, &dim)| Factor::along([(0, dim)], [(0, at)])).collect()
        }
        Op::Slice { axis, .. }
        | Op::Pad { axis, .. }
        | Op::Concat { axis }
        | Op::SliceAt { axis, .. }
        | Op::Cumsum { axis, .. }
        | Op::Recurrence { axis, .. } => {
            let tensors = if let Op::SliceAt { .. } = op { 1 } else { args.len() };
            same_dims(tensors, 1, rank(0), &[*axis])
        }
        Op::WriteAt { axis } => same_dims(2, 1, rank(0), &[*axis]),
        Op::Stop {} | Op::Dropout { .. } => same_dims(1, 1, rank(0), &[]),
        Op::Contract { spec } => match Contraction::parse(spec) {
            Ok(labels) => contraction(&labels),
            Err(_) => all_whole(args, results),
        },
        Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => {
            let mut at = 0;
            let mut factor = |dim: usize| {
                if axes.contains(&dim) {
                    let sum = matches!(op, Op::ReduceSum { .. });
                    return match sum {
                        true => Factor::along([(0, dim)], []).summed([0]),
                        false => Factor::whole([(0, dim)], []),
                    };
                }
                at += 1;
                Factor::along([(0, dim)], [(0, at - 1)])
            };
            (0..rank(0)).map(&mut factor).collect()
        }
        Op::Embed {} => {
            let places = (0..rank(1)).map(|dim| Factor::along([(1, dim)], [(0, dim)]));
            let table = [Factor::new(Kind::Vocabulary, [(0, 0)], []), Factor::along([(0, 1)], [(0, rank(1))])];
            places.chain(table).collect()
        }
        Op::EmbedGrad { .. } => {
            let places = (0..rank(0)).map(|dim| Factor::along([(0, dim), (1, dim)], []).summed([0]));
            let table = [Factor::new(Kind::Vocabulary, [], [(0, 0)]), Factor::along([(1, rank(0))], [(0, 1)])];
            places.chain(table).collect()
        }
        Op::LayerNorm { .. } | Op::RmsNorm { .. } => {
            let last = rank(0) - 1;
            let weights = (1..args.len()).map(|arg| (arg, 0));
            let rows = (0..last).map(|dim| Factor::along([(0, dim)], [(0, dim)]));
            let row = Factor::whole([(0, last)].into_iter().chain(weights).collect::<Vec<_>>(), [(0, last)]);
            rows.chain([row]).collect()
        }
        Op::LayerNormGrad { .. } | Op::RmsNormGrad { .. } => {
            let last = rank(0) - 1;
            let weights = 1..results.len();
            let sums: Vec<usize> = weights.clone().collect();
            let rows = (0..last).map(|dim| Factor::along([(0, dim), (2, dim)], [(0, dim)]).summed(sums.clone()));
            let made = [(0, last)].into_iter().chain(weights.map(|result| (result, 0)));
            let row = Factor::whole([(0, last), (1, 0), (2, last)], made.collect::<Vec<_>>());
            rows.chain([row]).collect()
        }
        Op::Rope { .. } => vec![
            Factor::along([(0, 0), (1, 0)], [(0, 0)]),
            Factor::along([(0, 1), (1, 1)], [(0, 1)]),
            Factor::along([(0, 2)], [(0, 2)]),
            Factor::whole([(0, 3), (2, 0)], [(0, 3)]),
        ],
        Op::Attention { .. } => attention(&[0, 1, 2], &[3], (args.len() > 4).then_some(4), &[(0, 0)], Some(1)),
        Op::AttentionGrad { .. } => {
            let mut all =
                attention(&[0, 1, 2, 4, 6], &[3], (args.len() > 7).then_some(7), &[(0, 0), (1, 1), (2, 2)], None);
            // The divisors `[B, H, T]`.
            for (factor, dim) in all.iter_mut().zip([0, 2, 1]) {
                factor.args.push((5, dim));
            }
            all
        }
        Op::CachedAttention { .. } => {
            let mut all = attention(&[0, 1, 2], &[3], (args.len() > 5).then_some(5), &[(0, 0)], None);
            all.retain(|factor| factor.kind != Kind::Whole);
            all.push(Factor::whole([(0, 1)], [(0, 1)]));
            all.push(Factor::whole([(1, 1), (2, 1), (3, 1)], []));
            all.push(Factor::whole([(0, 3), (1, 3), (2, 3)], [(0, 3)]));
            all
        }
        Op::TokenLogp {} => {
            let last = rank(0) - 1;
            let rows = (0..last).map(|dim| Factor::along([(0, dim), (1, dim)], [(0, dim)]));
            rows.chain([Factor::new(Kind::Vocabulary, [(0, last)], [])]).collect()
        }
        Op::TokenLogpGrad {} => {
            let last = rank(0) - 1;
            let rows = (0..last).map(|dim| Factor::along([(0, dim), (1, dim), (2, dim)], [(0, dim)]));
            rows.chain([Factor::new(Kind::Vocabulary, [(0, last)], [(0, last)])]).collect()
        }
        Op::PositionIn {} => vec![Factor::along([(0, 0)], [(0, 0)]), Factor::whole([(0, 1)], [(0, 1)])],
        Op::Sample { .. } => {
            vec![Factor::along([(0, 0), (2, 0)], [(0, 0)]), Factor::new(Kind::Vocabulary, [(0, 1)], [])]
        }
        Op::Adamw { .. } => (0..args.len() / 4)
            .flat_map(|of| {
                let dims = 0..args[4 * of].rank();
                dims.map(move |dim| {
                    let given: Vec<(usize, usize)> = (0..4).map(|arg| (4 * of + arg, dim)).collect();
                    let made: Vec<(usize, usize)> = (0..3).map(|result| (3 * of + result, dim)).collect();
                    Factor::along(given, made)
                })
            })
            .collect(),
        op if op.class() == Class::Elementwise => same_dims(args.len(), 1, rank(0), &[]),
        _ => all_whole(args, results),
    }
}

/// Every dim of the first result from this one on, drawn.
fn drawn(results: &[Type], from: usize) -> Vec<Factor> {
    (from..results[0].rank()).map(|dim| Factor::new(Kind::Drawn, [], [(0, dim)])).collect()
}

/// Operands and results with the same dims, some of which must be whole.
fn same_dims(args: usize, results: usize, rank: usize, whole: &[usize]) -> Vec<Factor> {
    let factor = |dim: usize| {
        let kind = if whole.contains(&dim) { Kind::Whole } else { Kind::Along };
        let given: Vec<(usize, usize)> = (0..args).map(|arg| (arg, dim)).collect();
        Factor::new(kind, given, (0..results).map(|result| (result, dim)).collect::<Vec<_>>())
    };
    (0..rank).map(factor).collect()
}

fn all_whole(args: &[Type], results: &[Type]) -> Vec<Factor> {
    fn dims(types: &[Type]) -> impl Iterator<Item = (usize, usize)> {
        types.iter().enumerate().flat_map(|(at, ty)| (0..ty.rank()).map(move |dim| (at, dim)))
    }
    let args = dims(args).map(|place| Factor::whole([place], []));
    args.chain(dims(results).map(|place| Factor::whole([], [place]))).collect()
}

fn contraction(labels: &Contraction) -> Vec<Factor> {
    let mut letters: Vec<char> = labels.lhs.iter().chain(&labels.rhs).copied().collect();
    letters.sort_unstable();
    letters.dedup();
    let factor = |letter: char| {
        let at = |side: &[char]| side.iter().position(|&c| c == letter);
        let args = [at(&labels.lhs).map(|dim| (0, dim)), at(&labels.rhs).map(|dim| (1, dim))];
        let args: Vec<(usize, usize)> = args.into_iter().flatten().collect();
        match at(&labels.out) {
            Some(dim) => Factor::along(args, [(0, dim)]),
            None => Factor::along(args, []).summed([0]),
        }
    };
    letters.into_iter().map(factor).collect()
}

/// Attention's rows, places, heads and elements of heads. `heads` are operands `[B, T, H, D]`, `rows` are `[B, T]`; results are
/// `[B, T, H, D]`, as pairs of their number twice, and log-divisors `[B, H, T]`. Rows first, then places, then heads.
fn attention(
    heads: &[usize],
    rows: &[usize],
    slopes: Option<usize>,
    results: &[(usize, usize)],
    divisors: Option<usize>,
) -> Vec<Factor> {
    let of = |dim: usize| -> Vec<(usize, usize)> { heads.iter().map(|&arg| (arg, dim)).collect() };
    let with_rows = |dim: usize| [of(dim), rows.iter().map(|&arg| (arg, dim)).collect()].concat();
    let made = |dim: usize, of_divisors: Option<usize>| -> Vec<(usize, usize)> {
        let results = results.iter().map(|&(result, _)| (result, dim));
        results.chain(divisors.zip(of_divisors)).collect()
    };
    let slopes: Vec<(usize, usize)> = slopes.map(|arg| (arg, 0)).into_iter().collect();
    vec![
        Factor::along(with_rows(0), made(0, Some(0))),
        Factor::whole(with_rows(1), made(1, Some(2))),
        Factor::along([of(2), slopes].concat(), made(2, Some(1))),
        Factor::whole(of(3), made(3, None)),
    ]
}

/// Runs of dims with equally many elements: of each, the outermost dims are cut together.
fn reshape(from: &[Dim], to: &[Dim]) -> Vec<Factor> {
    let one = |dim: &Dim| *dim == Dim::from(1i64);
    let mut all: Vec<Factor> = Vec::new();
    let (mut i, mut o) = (0, 0);
    while i < from.len() || o < to.len() {
        // Ones belong to no run.
        if i < from.len() && one(&from[i]) && !(o < to.len() && one(&to[o])) {
            all.push(Factor::whole([(0, i)], []));
            i += 1;
            continue;
        }
        if o < to.len() && one(&to[o]) && !(i < from.len() && one(&from[i])) {
            all.push(Factor::whole([], [(0, o)]));
            o += 1;
            continue;
        }
        let (first_i, first_o) = (i, o);
        let (mut have, mut want) = (Dim::from(1i64), Dim::from(1i64));
        let mut step = |i: &mut usize, o: &mut usize| {
            // The side with fewer elements so far, as far as that is known, takes another dim.
            let fewer = match (have.constant(), want.constant()) {
                (Some(a), Some(b)) => a <= b,
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (None, None) => *i < from.len() && *o >= to.len(),
            };
            if (fewer && *i < from.len()) || *o >= to.len() {
                have = &have * &from[*i];
                *i += 1;
            } else {
                want = &want * &to[*o];
                *o += 1;
            }
            have == want
        };
        let mut met = false;
        while !met && (i < from.len() || o < to.len()) {
            met = step(&mut i, &mut o);
        }
        if !met {
            all.extend((first_i..from.len()).map(|dim| Factor::whole([(0, dim)], [])));
            all.extend((first_o..to.len()).map(|dim| Factor::whole([], [(0, dim)])));
            break;
        }
        all.push(Factor::along([(0, first_i)], [(0, first_o)]));
        all.extend((first_i + 1..i).map(|dim| Factor::whole([(0, dim)], [])));
        all.extend((first_o + 1..o).map(|dim| Factor::whole([], [(0, dim)])));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DType;

    fn dims(text: &str) -> Vec<Dim> {
        text.split(' ').map(|dim| Dim::parse(dim).expect("a dim")).collect()
    }

    #[test]
    fn reshaping_keeps_the_outermost_dims_of_runs() {
        let pairs = |from: &str, to: &str| -> Vec<(usize, usize)> {
            let all = reshape(&dims(from), &dims(to)).into_iter().filter(|factor| factor.kind == Kind::Along);
            all.map(|factor| (factor.args[0].1, factor.results[0].1)).collect()
        };
        assert_eq!(pairs("B T 768", "B T 12 64"), [(0, 0), (1, 1), (2, 2)]);
        assert_eq!(pairs("B T 12 64", "B T 768"), [(0, 0), (1, 1), (2, 2)]);
        assert_eq!(pairs("B T", "B*T"), [(0, 0)]);
        assert_eq!(pairs("B*T 6", "B T 2 3"), [(0, 0), (1, 2)]);
        assert_eq!(pairs("4 6", "6 4"), [(0, 0)]);
        assert_eq!(pairs("B T", "B 1 T"), [(0, 0), (1, 2)]);
    }

    /// Whatever the op, each of its dims is in exactly one factor.
    #[test]
    fn every_dim_has_one_factor() {
        let float = |text: &str| Type::new(DType::F32, dims(text));
        let (heads, rows) = (float("B T 4 8"), float("B T"));
        let attention = Op::Attention { causal: true, scale: 1.0, window: 0 };
        let gradient = Op::AttentionGrad { causal: true, scale: 1.0, window: 0 };
        let cached = Op::CachedAttention { scale: 1.0, window: 0 };
        let (h, r) = (|| heads.clone(), || rows.clone());
        let cases = [
            (attention, vec![h(), h(), h(), r(), float("4")], vec![h(), float("B 4 T")]),
            (gradient, vec![h(), h(), h(), r(), h(), float("B 4 T"), h()], vec![h(), h(), h()]),
            (cached, vec![h(), h(), h(), r(), Type::scalar(DType::I32)], vec![h()]),
            (Op::Broadcast { shape: dims("B T 4") }, vec![float("1 4")], vec![float("B T 4")]),
            (Op::Embed {}, vec![float("9 4"), r()], vec![float("B T 4")]),
            (Op::EmbedGrad { rows: Dim::from(9i64) }, vec![r(), float("B T 4")], vec![float("9 4")]),
            (
                Op::LayerNormGrad { eps: 0.0 },
                vec![float("B T 4"), float("4"), float("B T 4")],
                vec![float("B T 4"), float("4"), float("4")],
            ),
            (
                Op::Sample { temperature: 1.0, top_k: 0, top_p: 1.0 },
                vec![float("B 9"), Type::scalar(DType::Key), float("B"), Type::scalar(DType::I32)],
                vec![float("B")],
            ),
            (Op::ReduceMax { axes: vec![1] }, vec![float("B T 4")], vec![float("B 4")]),
            (Op::Rope { inverse: false }, vec![h(), r(), float("4")], vec![h()]),
            (Op::SumSquares {}, vec![h(), r()], vec![float("1")]),
        ];
        for (op, args, results) in cases {
            let all = factors(&op, &args, &results);
            let count = |types: &[Type], of: &dyn Fn(&Factor) -> Vec<(usize, usize)>| {
                let mut found: Vec<(usize, usize)> = all.iter().flat_map(of).collect();
                found.sort_unstable();
                let expected: Vec<(usize, usize)> =
                    types.iter().enumerate().flat_map(|(at, ty)| (0..ty.rank()).map(move |dim| (at, dim))).collect();
                assert_eq!(found, expected, "`{op}`: {all:?}");
            };
            count(&args, &|factor| factor.args.clone());
            count(&results, &|factor| factor.results.clone());
        }
    }
}
