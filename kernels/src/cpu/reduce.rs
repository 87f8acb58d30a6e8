//! Reductions, in blocks of a fixed size.

use dsgc_ir::{DType, Op};
use multiversion::multiversion;

use super::Launch;
use super::elementwise::{larger, smaller};
use super::lanes::together;
use super::memory::Ptr;
use super::structure::strides;

/// Elements of a whole-tensor reduction that one partial result covers.
const BLOCK: usize = 8 * 1024;
/// Independent sums in a loop: enough for the longest vectors, and pairwise enough for the last digits.
const LANES: usize = 32;
/// Rows of a column sum between two additions to the total.
const ROWS: usize = 64;
/// Columns of a column sum that a thread takes at once at most: their sums stay in the first-level cache. As many as there
/// are, since from row to row memory is asked for anew.
const COLUMNS: usize = 2048;
/// Columns that are not cut apart: a cache line of floats.
const LINE: usize = 16;

/// Bytes for the partial results of `n` elements.
pub(super) fn workspace(n: usize) -> usize {
    n.div_ceil(BLOCK) * size_of::<f64>()
}

/// How elements become one.
trait Fold<T: Copy>: Copy + Sync {
    const START: T;
    fn with(self, a: T, b: T) -> T;
}

macro_rules! folds {
    ($($name:ident $t:ty: $start:expr, $with:expr;)*) => { $(
        #[derive(Clone, Copy)]
        struct $name;
        impl Fold<$t> for $name {
            const START: $t = $start;
            #[inline(always)]
            fn with(self, a: $t, b: $t) -> $t { $with(a, b) }
        }
    )* };
}
folds! {
    SumF f32: 0.0, |a, b| a + b;
    MaxF f32: f32::NEG_INFINITY, larger;
    MinF f32: f32::INFINITY, smaller;
    SumI i32: 0, i32::wrapping_add;
    MaxI i32: i32::MIN, Ord::max;
    MinI i32: i32::MAX, Ord::min;
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn fold_row<T: Copy, F: Fold<T>>(row: &[T], fold: F) -> T {
    let mut lanes = [F::START; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for j in 0..LANES {
            lanes[j] = fold.with(lanes[j], chunk[j]);
        }
    }
    tail.iter().fold(together(lanes, |a, b| fold.with(a, b)), |a, &b| fold.with(a, b))
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn fold_into<T: Copy, F: Fold<T>>(into: &mut [T], row: &[T], fold: F) {
    for (a, &b) in into.iter_mut().zip(row) {
        *a = fold.with(*a, b);
    }
}

/// Runs a reduction over dims.
pub(super) fn run(l: &mut Launch, axes: &[usize]) {
    match (l.dtype(l.result()), &l.op.op) {
        (DType::F32, Op::ReduceSum { .. }) => reduce(l, axes, SumF),
        (DType::F32, Op::ReduceMax { .. }) => reduce(l, axes, MaxF),
        (DType::F32, _) => reduce(l, axes, MinF),
        (_, Op::ReduceSum { .. }) => reduce(l, axes, SumI),
        (_, Op::ReduceMax { .. }) => reduce(l, axes, MaxI),
        (_, _) => reduce(l, axes, MinI),
    }
}

fn reduce<T: Copy + Send + Sync, F: Fold<T>>(l: &mut Launch, axes: &[usize], fold: F) {
    let shape = l.shape(l.op.args[0]);
    // Neighbouring dims of one kind are one dim: (extent, whether it goes away).
    let mut dims: Vec<(usize, bool)> = Vec::new();
    for (i, &extent) in shape.iter().enumerate() {
        let goes = axes.contains(&i);
        match dims.last_mut() {
            _ if extent == 1 => {}
            Some(last) if last.1 == goes => last.0 *= extent,
            _ => dims.push((extent, goes)),
        }
    }
    let (a, out): (Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0));
    match dims.as_slice() {
        [] => unsafe {
            // SAFETY: one element becomes one element.
            *out.0 = fold.with(F::START, *a.0);
        },
        &[(n, true)] => all(l, a, out, n, fold),
        &[(n, false)] => rows(l, a, out, n, 1, fold),
        &[(n, false), (width, true)] => rows(l, a, out, n, width, fold),
        &[(height, true), (width, false)] => columns(l, a, out, 1, height, width, fold),
        &[(n, false), (height, true), (width, false)] => columns(l, a, out, n, height, width, fold),
        dims => scattered(l, a, out, dims, fold),
    }
}

fn all<T: Copy + Send + Sync, F: Fold<T>>(l: &mut Launch, a: Ptr<T>, out: Ptr<T>, n: usize, fold: F) {
    let blocks = n.div_ceil(BLOCK);
    let partial: Ptr<T> = l.workspace();
    // SAFETY: the workspace has a place per block, and the operand `n` elements.
    unsafe {
        l.threads.run(blocks, BLOCK, |r| {
            for i in r {
                let at = i * BLOCK;
                *partial.add(i).0 = fold_row(a.slice(at, BLOCK.min(n - at)), fold);
            }
        });
        *out.0 = fold_row(partial.slice(0, blocks), fold);
    }
}

fn rows<T: Copy + Send + Sync, F: Fold<T>>(l: &mut Launch, a: Ptr<T>, out: Ptr<T>, n: usize, width: usize, fold: F) {
    l.threads.run(n, width, |r| {
        for i in r {
            // SAFETY: the operand has `n` rows, the result an element for each.
            unsafe { *out.add(i).0 = fold_row(a.slice(i * width, width), fold) };
        }
    });
}

fn columns<T: Copy + Send + Sync, F: Fold<T>>(
    l: &mut Launch,
    a: Ptr<T>,
    out: Ptr<T>,
    n: usize,
    height: usize,
    width: usize,
    fold: F,
) {
    let lines = width.div_ceil(LINE);
    l.threads.run(n * lines, height * LINE, |r| {
        let (mut sum, mut line) = ([F::START; COLUMNS], r.start);
        while line < r.end {
            let (block, first) = (line / lines, line % lines);
            let last = lines.min(first + r.end - line).min(first + COLUMNS / LINE);
            let from = first * LINE;
            let take = (last * LINE).min(width) - from;
            // SAFETY: columns `from..from + take` of one block; every thread has its own.
            let total = unsafe { out.slice_mut(block * width + from, take) };
            // SAFETY: a row of the block.
            let row = |row: usize| unsafe { a.slice((block * height + row) * width + from, take) };
            total.fill(F::START);
            for first in (0..height).step_by(ROWS) {
                let sum = &mut sum[..take];
                sum.fill(F::START);
                (first..height.min(first + ROWS)).for_each(|at| fold_into(sum, row(at), fold));
                fold_into(total, sum, fold);
            }
            line += last - first;
        }
    });
}

/// Any mixture of dims that stay and dims that go.
fn scattered<T: Copy + Send + Sync, F: Fold<T>>(
    l: &mut Launch,
    a: Ptr<T>,
    out: Ptr<T>,
    dims: &[(usize, bool)],
    fold: F,
) {
    let own = strides(&dims.iter().map(|d| d.0).collect::<Vec<_>>());
    let of = |goes: bool| -> Vec<(usize, usize)> {
        dims.iter().zip(&own).filter(|(d, _)| d.1 == goes).map(|(d, &s)| (d.0, s)).collect()
    };
    let (stay, go) = (of(false), of(true));
    let count = |dims: &[(usize, usize)]| dims.iter().map(|d| d.0).product::<usize>();
    let offset = |dims: &[(usize, usize)], i: usize| {
        let (mut rest, mut at) = (i, 0);
        for &(extent, stride) in dims.iter().rev() {
            at += rest % extent * stride;
            rest /= extent;
        }
        at
    };
    l.threads.run(count(&stay), count(&go), |r| {
        for i in r {
            let base = offset(&stay, i);
            let mut sum = F::START;
            for j in 0..count(&go) {
                // SAFETY: offsets come from the operand's own dims.
                sum = fold.with(sum, unsafe { *a.add(base + offset(&go, j)).0 });
            }
            // SAFETY: element `i` of the result belongs to this thread.
            unsafe { *out.add(i).0 = sum };
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn dot_row(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (x, y) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail = x.remainder().iter().zip(y.remainder()).fold(0.0, |sum, (a, b)| sum + a * b);
    for (x, y) in x.zip(y) {
        for j in 0..LANES {
            lanes[j] += x[j] * y[j];
        }
    }
    together(lanes, |a, b| a + b) + tail
}

/// The sum of products of two dense vectors. Partial sums are added in doubles: gradient norms of large models are
/// sums over 10^8 elements.
pub(super) fn dot(l: &mut Launch, a: Ptr<f32>, b: Ptr<f32>, out: Ptr<f32>, n: usize) {
    let blocks = n.div_ceil(BLOCK);
    let partial: Ptr<f32> = l.workspace();
    // SAFETY: the workspace has a place per block, and both operands `n` elements.
    unsafe {
        l.threads.run(blocks, BLOCK, |r| {
            for i in r {
                let at = i * BLOCK;
                let len = BLOCK.min(n - at);
                *partial.add(i).0 = dot_row(a.slice(at, len), b.slice(at, len));
            }
        });
        *out.0 = partial.slice(0, blocks).iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
    }
}

/// The sums of squares of several tensors, each as by [`dot`], added from the first to the last. Blocks of all tensors are
/// shared out to the threads together.
pub(super) fn sum_squares(l: &mut Launch) {
    let partial: Ptr<f32> = l.workspace();
    // (elements, how many, its first block)
    let mut tensors: Vec<(Ptr<f32>, usize, usize)> = Vec::with_capacity(l.op.args.len());
    let mut blocks = 0;
    for i in 0..l.op.args.len() {
        let n = l.len(l.op.args[i]);
        tensors.push((l.arg(i), n, blocks));
        blocks += n.div_ceil(BLOCK);
    }
    l.threads.run(blocks, BLOCK, |r| {
        let mut of = tensors.partition_point(|t| t.2 <= r.start) - usize::from(!r.is_empty());
        for i in r {
            while tensors.get(of + 1).is_some_and(|next| next.2 <= i) {
                of += 1;
            }
            let (a, n, first) = tensors[of];
            let at = (i - first) * BLOCK;
            // SAFETY: block `i` lies in the tensor, and the workspace has a place for it.
            unsafe {
                let part = a.slice(at, BLOCK.min(n - at));
                *partial.add(i).0 = dot_row(part, part);
            }
        }
    });
    let sums = tensors.iter().map(|&(_, n, first)| {
        // SAFETY: every block of the tensor has its place.
        let blocks = unsafe { partial.slice(first, n.div_ceil(BLOCK)) };
        blocks.iter().map(|&x| f64::from(x)).sum::<f64>() as f32
    });
    let sum = sums.reduce(|a, b| a + b).expect("the op has an operand");
    // SAFETY: a scalar's buffer holds one element.
    unsafe { *l.out::<f32>(0).0 = sum };
}

/// Running sums along a dim.
pub(super) fn cumsum(l: &mut Launch, axis: usize, reverse: bool) {
    match l.dtype(l.result()) {
        DType::I32 => running(l, axis, reverse, i32::wrapping_add),
        _ => running(l, axis, reverse, |a: f32, b: f32| a + b),
    }
}

/// `y[t] = x[t] + decay * y[t - 1]` along a dim.
pub(super) fn recurrence(l: &mut Launch, axis: usize, decay: f32, reverse: bool) {
    running(l, axis, reverse, |before: f32, x: f32| x + decay * before);
}

fn running<T: Copy + Send + Sync>(l: &mut Launch, axis: usize, reverse: bool, add: impl Fn(T, T) -> T + Sync) {
    let shape = l.shape(l.result());
    let (extent, inner): (usize, usize) = (shape[axis], shape[axis + 1..].iter().product());
    let lines = shape[..axis].iter().product::<usize>() * inner;
    let (a, out): (Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0));
    l.threads.run(lines, extent, |r| {
        for line in r {
            let base = line / inner * extent * inner + line % inner;
            let place = |i: usize| base + if reverse { extent - 1 - i } else { i } * inner;
            // SAFETY: every place of a line lies in both tensors, and lines are apart.
            unsafe {
                for i in 0..extent {
                    let x = *a.add(place(i)).0;
                    *out.add(place(i)).0 = if i == 0 { x } else { add(*out.add(place(i - 1)).0, x) };
                }
            }
        }
    });
}
