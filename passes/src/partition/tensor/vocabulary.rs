//! Ops on a vocabulary that is cut: each rank has the rows of some tokens, and the logits of some.

use dsgc_ir::{Axis, Builder, DType, Dim, Op, OpData, Value};

use super::Share;

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
                let tokens = self.own(args[1], self.rows_of_table(op.args[0]), op);
                let mut b = self.builder(&op.site);
                let rows = b.one(Op::Embed {}, &[args[0], tokens.safe]);
                let kept = keep(&mut b, tokens.inside, rows);
                self.note(true);
                self.rebuild.set(op.result(), kept);
            }
            Op::EmbedGrad { .. } => {
                let rows = self.rows_of_table(op.result());
                let tokens = self.own(args[0], rows, op);
                let mut b = self.builder(&op.site);
                let kept = keep(&mut b, tokens.inside, args[1]);
                let table = b.one(Op::EmbedGrad { rows: Dim::from(rows) }, &[tokens.safe, kept]);
                self.note(false);
                self.rebuild.set(op.result(), table);
            }
            Op::TokenLogp {} => {
                let tokens = self.own(args[1], self.width(args[0]), op);
                let softmax = self.softmax(args[0], op);
                let mut b = self.builder(&op.site);
                let logp = b.one(Op::TokenLogp {}, &[args[0], tokens.safe]);
                let logit = b.one(Op::Add {}, &[logp, softmax.own]);
                let dims = b.ty(logit).dims;
                let nothing = b.fill(0.0, &dims);
                let kept = b.one(Op::Where {}, &[tokens.inside, logit, nothing]);
                self.note(false);
                self.partial[kept.0 as usize] = true;
                let logit = self.sum(kept, &op.site);
                let mut b = self.builder(&op.site);
                let log = b.one(Op::Log {}, &[softmax.sum]);
                let divisor = b.one(Op::Add {}, &[softmax.most, log]);
                let logp = b.one(Op::Sub {}, &[logit, divisor]);
                self.note(false);
                self.rebuild.set(op.result(), logp);
            }
            Op::TokenLogpGrad {} => {
                let tokens = self.own(args[1], self.width(args[0]), op);
                let softmax = self.softmax(args[0], op);
                let width = self.width(args[0]);
                let mut b = self.builder(&op.site);
                let ty = b.ty(args[0]);
                let logits = b.cast(args[0], DType::F32);
                let most = along(&mut b, softmax.most, &ty.dims);
                let below = b.one(Op::Sub {}, &[logits, most]);
                let power = b.one(Op::Exp {}, &[below]);
                let sum = along(&mut b, softmax.sum, &ty.dims);
                let probability = b.one(Op::Div {}, &[power, sum]);
                let numbers = b.one(Op::Iota { len: Dim::from(width) }, &[]);
                let numbers = b.stretch(numbers, &ty.dims);
                let token = along(&mut b, tokens.local, &ty.dims);
                let hit = b.one(Op::Eq {}, &[numbers, token]);
                let hit = b.cast(hit, DType::F32);
                let slope = b.one(Op::Sub {}, &[hit, probability]);
                let gradient = along(&mut b, args[2], &ty.dims);
                let slope = b.one(Op::Mul {}, &[gradient, slope]);
                let slope = b.cast(slope, ty.dtype);
                self.note(false);
                self.rebuild.set(op.result(), slope);
            }
            Op::Sample { .. } => {
                let logits = self.whole(args[0], Some(1), &op.site);
                self.rebuild.push(op, op.op.clone(), &[&[logits], &args[1..]].concat(), self.local);
                self.note(false);
            }
            other => panic!("bug: `{other}` has no vocabulary"),
        }
    }

    /// A rank's rows of a table of the old graph.
    fn rows_of_table(&self, table: Value) -> i64 {
        let rows = self.part(&self.rebuild.old.ty(table).dims[0]);
        rows.constant().expect("a dim that is cut is a number")
    }

    /// A rank's extent of the last dim.
    fn width(&self, value: Value) -> i64 {
        let last = self.rebuild.new.ty(value).dims.last().and_then(Dim::constant);
        last.unwrap_or_else(|| panic!("bug: a vocabulary in @{} is no number", self.rebuild.old.name))
    }

    /// Tokens `i32[..]` as a rank with so many of them sees them.
    fn own(&mut self, tokens: Value, rows: i64, op: &OpData) -> Own {
        let ranks = self.ranks();
        let mut b = self.builder(&op.site);
        let dims = b.ty(tokens).dims;
        let number = |b: &mut Builder, value: i64| {
            let number = b.one(Op::Const { value: value as f64, dtype: DType::I32 }, &[]);
            b.stretch(number, &dims)
        };
        // The rank's part of 0, 1, 2, ... is its place.
        let places = b.one(Op::Iota { len: Dim::from(ranks as i64) }, &[]);
        let place = b.one(Op::Shard { over: Axis::Tensor, axis: 0, ranks }, &[places]);
        let place = b.one(Op::Reshape { shape: vec![] }, &[place]);
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
        let known = within(&mut b, tokens, rows * ranks as i64);
        let zero = number(&mut b, 0);
        let other = b.one(Op::Where {}, &[known, zero, tokens]);
        let safe = b.one(Op::Where {}, &[inside, local, other]);
        self.note(false);
        Own { local, inside, safe }
    }

    /// The softmax of logits `[.., V]` of which each rank has some.
    fn softmax(&mut self, logits: Value, op: &OpData) -> Softmax {
        if let Some(&softmax) = self.softmaxes.get(&logits) {
            return softmax;
        }
        self.context.matched("all_gather over tensor", 2);
        let ranks = self.ranks();
        let mut b = self.builder(&op.site);
        let wide = b.cast(logits, DType::F32);
        let last = b.ty(wide).rank() - 1;
        let own_most = b.one(Op::ReduceMax { axes: vec![last] }, &[wide]);
        let own_sum = powers(&mut b, wide, own_most, last);
        let own_sum = b.one(Op::ReduceSum { axes: vec![last] }, &[own_sum]);
        let log = b.one(Op::Log {}, &[own_sum]);
        let own = b.one(Op::Add {}, &[own_most, log]);
        let mut of_all = |value: Value| {
            let shape = [&[Dim::from(1i64)], &b.ty(value).dims[..]].concat();
            let row = b.one(Op::Reshape { shape }, &[value]);
            b.one(Op::AllGather { over: Axis::Tensor, axis: 0, lens: vec![ranks] }, &[row])
        };
        let (all_most, all_sums) = (of_all(own_most), of_all(own_sum));
        let most = b.one(Op::ReduceMax { axes: vec![0] }, &[all_most]);
        let shares = powers(&mut b, all_most, most, 0);
        let shares = b.one(Op::Mul {}, &[shares, all_sums]);
        let sum = b.one(Op::ReduceSum { axes: vec![0] }, &[shares]);
        self.note(false);
        let softmax = Softmax { own, most, sum };
        self.softmaxes.insert(logits, softmax);
        softmax
    }
}

/// What is known of a softmax over the logits of all ranks, all `f32[..]`.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
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
