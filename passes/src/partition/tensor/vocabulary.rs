//! Ops on a vocabulary that is cut: each rank has the rows of some tokens, and the logits of some.

use dsgc_ir::{Builder, DType, Dim, Op, OpData, Value};

use super::{Has, Part, Share};

/// What stands in the place of logits of tokens that there are none of: less than any logit, and no infinity, because a
/// rank may have no others, and the difference of two infinities is no number.
const NO_LOGIT: f64 = f32::MIN as f64;

/// Tokens as a rank sees them.
struct Own {
    /// Their numbers among the rank's tokens; what is not its own is below 0 or too large.
    local: Value,
    /// Whether they are its own.
    inside: Value,
    /// The number, or that of some token where it is not its own.
    safe: Value,
}

impl Share<'_> {
    /// An op of which some dim is the vocabulary's.
    pub(super) fn vocabulary(&mut self, op: &OpData) {
        let args = self.finished(op);
        match &op.op {
            Op::Embed {} => {
                let tokens = self.own(args[1], self.cut_of(op.args[0]), op);
                let mut b = self.builder(&op.site);
                let rows = b.one(Op::Embed {}, &[args[0], tokens.safe]);
                let kept = keep(&mut b, tokens.inside, rows);
                self.note(Has::Partial);
                self.rebuild.set(op.result(), kept);
            }
            Op::EmbedGrad { .. } => {
                let has = self.cut_of(op.result());
                let rows = self.part(&self.rebuild.old.ty(op.result()).dims[0]);
                let tokens = self.own(args[0], has, op);
                let mut b = self.builder(&op.site);
                let kept = keep(&mut b, tokens.inside, args[1]);
                let table = b.one(Op::EmbedGrad { rows }, &[tokens.safe, kept]);
                self.note(has);
                self.rebuild.set(op.result(), table);
            }
            Op::TokenLogp {} => {
                let tokens = self.own(args[1], self.table.has(args[0]), op);
                let softmax = self.softmax(args[0], op);
                let mut b = self.builder(&op.site);
                let logp = b.one(Op::TokenLogp {}, &[softmax.logits, tokens.safe]);
                let logit = b.one(Op::Add {}, &[logp, softmax.own]);
                let dims = b.ty(logit).dims;
                let nothing = b.fill(0.0, &dims);
                let kept = b.one(Op::Where {}, &[tokens.inside, logit, nothing]);
                self.note(Has::Partial);
                let logit = self.sum(kept, &op.site);
                let mut b = self.builder(&op.site);
                let log = b.one(Op::Log {}, &[softmax.sum]);
                let divisor = b.one(Op::Add {}, &[softmax.most, log]);
                let logp = b.one(Op::Sub {}, &[logit, divisor]);
                self.note(Has::Same);
                self.rebuild.set(op.result(), logp);
            }
            Op::TokenLogpGrad {} => {
                let has = self.table.has(args[0]);
                let tokens = self.own(args[1], has, op);
                let softmax = self.softmax(args[0], op);
                let mut b = self.builder(&op.site);
                let ty = b.ty(args[0]);
                let logits = b.cast(softmax.logits, DType::F32);
                let most = along(&mut b, softmax.most, &ty.dims);
                let below = b.one(Op::Sub {}, &[logits, most]);
                let power = b.one(Op::Exp {}, &[below]);
                let sum = along(&mut b, softmax.sum, &ty.dims);
                let probability = b.one(Op::Div {}, &[power, sum]);
                let numbers = b.one(Op::Iota { len: ty.dims[ty.rank() - 1].clone() }, &[]);
                let numbers = b.stretch(numbers, &ty.dims);
                let token = along(&mut b, tokens.local, &ty.dims);
                let hit = b.one(Op::Eq {}, &[numbers, token]);
                let hit = b.cast(hit, DType::F32);
                let slope = b.one(Op::Sub {}, &[hit, probability]);
                let gradient = along(&mut b, args[2], &ty.dims);
                let slope = b.one(Op::Mul {}, &[gradient, slope]);
                let slope = b.cast(slope, ty.dtype);
                self.note(has);
                self.rebuild.set(op.result(), slope);
            }
            Op::Sample { .. } => {
                let logits = self.reshard(args[0], Has::Same, &op.site);
                self.rebuild.push(op, op.op.clone(), &[&[logits], &args[1..]].concat(), self.local);
                self.note(Has::Same);
            }
            other => panic!("bug: `{other}` has no vocabulary"),
        }
    }

    /// Tokens `i32[..]` as a rank sees them that has its part of all.
    fn own(&mut self, tokens: Value, all: Has, op: &OpData) -> Own {
        let Has::Cut(all) = all else { panic!("bug: `{}` in @{} has its vocabulary", op.op, self.rebuild.old.name) };
        let (count, rows) = (all.extent as i64, all.extent.div_ceil(self.ranks()) as i64);
        let even = all.extent.is_multiple_of(self.ranks());
        let place = self.place(op);
        let mut b = self.builder(&op.site);
        let dims = b.ty(tokens).dims;
        let number = |b: &mut Builder, value: i64| {
            let number = b.one(Op::Const { value: value as f64, dtype: DType::I32 }, &[]);
            b.stretch(number, &dims)
        };
        let rows_of_rank = b.one(Op::Const { value: rows as f64, dtype: DType::I32 }, &[]);
        let first = b.one(Op::Mul {}, &[place, rows_of_rank]);
        let first = b.stretch(first, &dims);
        let local = b.one(Op::Sub {}, &[tokens, first]);
        let within = |b: &mut Builder, x: Value, rows: i64| {
            let (zero, end) = (number(b, 0), number(b, rows));
            let from = b.one(Op::Le {}, &[zero, x]);
            let to = b.one(Op::Lt {}, &[x, end]);
            b.one(Op::And {}, &[from, to])
        };
        let inside = within(&mut b, local, rows);
        // A token outside of the whole vocabulary stays one that is not there, and is found where it is looked up.
        let known = within(&mut b, tokens, count);
        let inside = if even { inside } else { b.one(Op::And {}, &[inside, known]) };
        let zero = number(&mut b, 0);
        let other = b.one(Op::Where {}, &[known, zero, tokens]);
        let safe = b.one(Op::Where {}, &[inside, local, other]);
        self.note(Has::Same);
        Own { local, inside, safe }
    }

    /// The softmax of logits `[.., V]` of which each rank has some.
    fn softmax(&mut self, logits: Value, op: &OpData) -> Softmax {
        if let Some(&softmax) = self.softmaxes.get(&logits) {
            return softmax;
        }
        let masked = match self.goes_beyond(logits) {
            Some(part) => {
                let wide = self.builder(&op.site).cast(logits, DType::F32);
                self.filled(wide, part, NO_LOGIT, op)
            }
            None => logits,
        };
        let mut b = self.builder(&op.site);
        let wide = b.cast(masked, DType::F32);
        let last = b.ty(wide).rank() - 1;
        let own_most = b.one(Op::ReduceMax { axes: vec![last] }, &[wide]);
        let own_sum = powers(&mut b, wide, own_most, last);
        let own_sum = b.one(Op::ReduceSum { axes: vec![last] }, &[own_sum]);
        let log = b.one(Op::Log {}, &[own_sum]);
        let own = b.one(Op::Add {}, &[own_most, log]);
        let (all_most, all_sums) = (self.of_all(own_most, op), self.of_all(own_sum, op));
        let mut b = self.builder(&op.site);
        let most = b.one(Op::ReduceMax { axes: vec![0] }, &[all_most]);
        let shares = powers(&mut b, all_most, most, 0);
        let shares = b.one(Op::Mul {}, &[shares, all_sums]);
        let sum = b.one(Op::ReduceSum { axes: vec![0] }, &[shares]);
        self.note(Has::Same);
        let softmax = Softmax { logits: masked, own, most, sum };
        self.softmaxes.insert(logits, softmax);
        softmax
    }

    /// What each rank has of a value, one after the other along a new first dim.
    fn of_all(&mut self, value: Value, op: &OpData) -> Value {
        let part = Has::Cut(Part { dim: 0, extent: self.ranks() });
        let mut b = self.builder(&op.site);
        let shape = [&[Dim::from(1i64)], &b.ty(value).dims[..]].concat();
        let row = b.one(Op::Reshape { shape }, &[value]);
        self.note(part);
        self.reshard(row, Has::Same, &op.site)
    }
}

/// What is known of a softmax over the logits of all ranks, all `f32[..]`.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    /// The logits `[.., V]` of a rank, with nothing beyond the end of the vocabulary.
    logits: Value,
    /// The logarithm of the sum of the exponentials of a rank's logits.
    own: Value,
    /// The largest logit of all ranks.
    most: Value,
    /// The sum of the exponentials of all ranks' logits less the largest.
    sum: Value,
}

/// `exp(x - most)`, where `most` lacks one dim of `x`.
fn powers(b: &mut Builder, x: Value, most: Value, axis: usize) -> Value {
    let dims = b.ty(x).dims;
    let mut one = dims.clone();
    one[axis] = Dim::from(1i64);
    let row = b.one(Op::Reshape { shape: one }, &[most]);
    let row = b.stretch(row, &dims);
    let below = b.one(Op::Sub {}, &[x, row]);
    b.one(Op::Exp {}, &[below])
}

/// A value `[..]` at every place of a last dim more.
fn along(b: &mut Builder, value: Value, dims: &[Dim]) -> Value {
    let shape = [&dims[..dims.len() - 1], &[Dim::from(1i64)]].concat();
    let column = b.one(Op::Reshape { shape }, &[value]);
    b.stretch(column, dims)
}

/// Rows `[.., D]` where a condition `[..]` holds, and zeros elsewhere.
fn keep(b: &mut Builder, inside: Value, rows: Value) -> Value {
    let ty = b.ty(rows);
    let inside = along(b, inside, &ty.dims);
    let nothing = b.fill(0.0, &ty.dims);
    let nothing = b.cast(nothing, ty.dtype);
    b.one(Op::Where {}, &[inside, rows, nothing])
}
