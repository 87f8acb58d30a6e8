//! Normalisation of rows and its gradient: LayerNorm and RMSNorm, which is LayerNorm with a mean of 0 and no bias.
//!
//! A row is read from memory once; its later passes find it in the cache, and ask for the next row. Every operation rounds
//! as in the interpreter, and no multiply-add is fused: gradients of short rows are differences of nearly equal numbers, in
//! which nothing but the rounding may be left.

use multiversion::multiversion;

use super::Launch;
use super::lanes::{Kernel, LANES, Lanes, fence, for_vectors, prefetch, prefetch_to_write, streams, widest};
use super::memory::Ptr;

/// Rows whose contributions to the gradients of weight and bias are added up before those of other rows.
const ROWS: usize = 64;

/// A width in whole vectors.
fn padded(width: usize) -> usize {
    width.next_multiple_of(LANES)
}

/// Bytes for the gradients of weight and bias of every block of rows.
pub(super) fn workspace(shape: &[usize]) -> usize {
    let (width, lead) = shape.split_last().map_or((0, &[] as &[usize]), |(w, lead)| (*w, lead));
    let rows: usize = lead.iter().product();
    rows.div_ceil(ROWS) * padded(width) * (size_of::<f64>() + size_of::<f32>())
}

/// Normalises rows: `(x - mean) / sqrt(var + eps) * weight + bias`; where they are not `CENTERED`, mean and bias are 0.
/// Past the caches if `STREAM`.
struct Forward<const CENTERED: bool, const STREAM: bool> {
    x: *const f32,
    weight: *const f32,
    bias: *const f32,
    out: *mut f32,
    rows: usize,
    width: usize,
    eps: f32,
}

impl<const CENTERED: bool, const STREAM: bool> Kernel for Forward<CENTERED, STREAM> {
    type Output = ();
    /// # Safety
    /// All places hold what `rows` and `width` say, and nobody else writes them. If `STREAM`, vectors of the result lie at
    /// multiples of their size.
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for row in 0..self.rows {
            let (x, out) = (self.x.wrapping_add(row * self.width), self.out.wrapping_add(row * self.width));
            // SAFETY: the caller's.
            unsafe {
                let zero = L::splat(0.0);
                let (mean, inverse) = moments::<L, CENTERED>(x, self.width, self.eps, (!STREAM).then_some(out));
                for_vectors!((i, n) in self.width => {
                    let normal = (zero.take(x.add(i), n) - mean) * inverse;
                    let weight = zero.take(self.weight.add(i), n);
                    let bias = if CENTERED { zero.take(self.bias.add(i), n) } else { zero };
                    let y = normal * weight + bias;
                    if STREAM { y.stream(out.add(i)) } else { y.put(out.add(i), n) }
                });
            }
        }
        if STREAM {
            fence();
        }
    }
}

/// Mean and `1 / sqrt(var + eps)` of a row, in all lanes. Asks for the next row, and for where its result goes.
///
/// # Safety
/// There are `width` numbers, and the machine has the instructions of `L`.
#[inline(always)]
unsafe fn moments<L: Lanes, const CENTERED: bool>(
    x: *const f32,
    width: usize,
    eps: f32,
    out: Option<*mut f32>,
) -> (L, L) {
    // SAFETY: the caller's.
    unsafe {
        let zero = L::splat(0.0);
        let mut mean = zero;
        if CENTERED {
            let mut sum = zero;
            for_vectors!((i, n) in width => sum = sum + zero.take(x.add(i), n));
            mean = L::splat(sum.sum() / width as f32);
        }
        let mut square = zero;
        for_vectors!((i, n) in width => {
            prefetch(x.wrapping_add(width + i));
            if let Some(out) = out {
                prefetch_to_write(out.wrapping_add(width + i));
            }
            let d = mean.take(x.add(i), n) - mean;
            square = square + d * d;
        });
        let inverse = 1.0 / (square.sum() / width as f32 + eps).sqrt();
        (mean, L::splat(inverse))
    }
}

/// With `n = (x - mean) * inverse` and `h = grad * weight`: `dx = inverse * (h - mean(h) - n * mean(h * n))`; adds `grad * n`
/// to `dw` and `grad` to `db`. The latter in doubles: where a loss takes differences of two texts, their gradients cancel,
/// and an optimizer would magnify what roundings leave. Where rows are not `CENTERED`, both means are 0 and there is no `db`.
struct Backward<const CENTERED: bool> {
    x: *const f32,
    weight: *const f32,
    grad: *const f32,
    dx: *mut f32,
    dw: *mut f32,
    db: *mut f64,
    rows: usize,
    width: usize,
    eps: f32,
}

impl<const CENTERED: bool> Kernel for Backward<CENTERED> {
    type Output = ();
    /// # Safety
    /// All places hold what `rows` and `width` say, `dw` and `db` up to whole vectors, and nobody else touches what is
    /// written. `dx` may lie where `x` or `grad` do.
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let width = self.width;
        for row in 0..self.rows {
            let at = row * width;
            let (x, grad, dx) = (self.x.wrapping_add(at), self.grad.wrapping_add(at), self.dx.wrapping_add(at));
            // SAFETY: the caller's; of a vector all is loaded before anything is stored.
            unsafe {
                let zero = L::splat(0.0);
                let (mean, inverse) = moments::<L, CENTERED>(x, width, self.eps, Some(dx));
                let (mut sum_h, mut product) = (zero, zero);
                for_vectors!((i, n) in width => {
                    prefetch(grad.wrapping_add(width + i));
                    let h = zero.take(grad.add(i), n) * zero.take(self.weight.add(i), n);
                    sum_h = sum_h + h;
                    product = product + h * ((mean.take(x.add(i), n) - mean) * inverse);
                });
                let mean_hn = L::splat(product.sum() / width as f32);
                let mean_h = if CENTERED { L::splat(sum_h.sum() / width as f32) } else { zero };
                for_vectors!((i, n) in width => {
                    let (weight, grad) = (zero.take(self.weight.add(i), n), zero.take(grad.add(i), n));
                    let normal = (mean.take(x.add(i), n) - mean) * inverse;
                    (inverse * (grad * weight - mean_h - normal * mean_hn)).put(dx.add(i), n);
                    (L::load(self.dw.add(i)) + grad * normal).store(self.dw.add(i));
                    if CENTERED {
                        grad.add_to_doubles(self.db.add(i));
                    }
                });
            }
        }
    }
}

/// Runs `rms_norm`.
pub(super) fn rms_forward(l: &mut Launch, eps: f64) {
    let (x, weight, out) = (l.arg(0), l.arg(1), l.out(0));
    forward_rows::<false>(l, [x, weight, weight, out], eps);
}

/// Runs `layer_norm`.
pub(super) fn forward(l: &mut Launch, eps: f64) {
    let all = [l.arg(0), l.arg(1), l.arg(2), l.out(0)];
    forward_rows::<true>(l, all, eps);
}

fn forward_rows<const CENTERED: bool>(l: &mut Launch, [x, weight, bias, out]: [Ptr<f32>; 4], eps: f64) {
    let (rows, width) = l.rows(l.result());
    let eps = eps as f32;
    let stream = x.0 != out.0 && streams(out.0, rows * width * size_of::<f32>(), width * size_of::<f32>());
    l.threads.run(rows, 4 * width, |r| {
        let (at, rows) = (r.start * width, r.len());
        // SAFETY: operand and result have rows of `width`; those of threads are apart; `streams` was asked.
        unsafe {
            let (x, out) = (x.add(at).0.cast_const(), out.add(at).0);
            let [weight, bias] = [weight, bias].map(|p| p.slice(0, width).as_ptr());
            if stream {
                widest(Forward::<CENTERED, true> { x, weight, bias, out, rows, width, eps });
            } else {
                widest(Forward::<CENTERED, false> { x, weight, bias, out, rows, width, eps });
            }
        }
    });
}

/// Runs `rms_norm_grad`.
pub(super) fn rms_backward(l: &mut Launch, eps: f64) {
    backward_rows::<false>(l, None, eps);
}

/// Runs `layer_norm_grad`.
pub(super) fn backward(l: &mut Launch, eps: f64) {
    let db = l.out(2);
    backward_rows::<true>(l, Some(db), eps);
}

fn backward_rows<const CENTERED: bool>(l: &mut Launch, db: Option<Ptr<f32>>, eps: f64) {
    let (rows, width) = l.rows(l.op.args[0]);
    let (x, weight, grad): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.arg(2));
    let (dx, dw): (Ptr<f32>, Ptr<f32>) = (l.out(0), l.out(1));
    let (blocks, stride, eps) = (rows.div_ceil(ROWS), padded(width), eps as f32);
    let partial_db: Ptr<f64> = l.workspace();
    // SAFETY: the workspace has a row of doubles per block, and behind them one of floats.
    let partial_dw: Ptr<f32> = Ptr(unsafe { partial_db.add(blocks * stride) }.0.cast());
    l.threads.run(blocks, 8 * ROWS * width, |r| {
        for block in r {
            let first = block * ROWS;
            let (at, rows) = (first * width, rows.min(first + ROWS) - first);
            // SAFETY: the workspace has two rows per block; rows of operands and results are apart.
            unsafe {
                let (dw, db) =
                    (partial_dw.slice_mut(block * stride, stride), partial_db.slice_mut(block * stride, stride));
                dw.fill(0.0);
                db.fill(0.0);
                let (x, grad) = (x.add(at).0.cast_const(), grad.add(at).0.cast_const());
                let weight = weight.slice(0, width).as_ptr();
                let (dx, dw, db) = (dx.add(at).0, dw.as_mut_ptr(), db.as_mut_ptr());
                widest(Backward::<CENTERED> { x, weight, grad, dx, dw, db, rows, width, eps });
            }
        }
    });
    // SAFETY: all blocks are written, and nobody else touches the results.
    unsafe {
        add_rows(partial_dw.slice_mut(0, blocks * stride), stride, dw.slice_mut(0, width), |x| x);
        if let Some(db) = db {
            add_rows(partial_db.slice_mut(0, blocks * stride), stride, db.slice_mut(0, width), |x| x as f32);
        }
    }
}

/// Adds rows of so many numbers to the first, which is used up, and puts the sums where they go; 0 if there are no rows.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn add_rows<T: Copy + std::ops::AddAssign, F: Fn(T) -> f32>(rows: &mut [T], stride: usize, to: &mut [f32], single: F) {
    let (sums, others) = rows.split_at_mut(stride.min(rows.len()));
    for row in others.chunks_exact(stride.max(1)) {
        for (sum, &x) in sums.iter_mut().zip(row) {
            *sum += x;
        }
    }
    to.fill(0.0);
    for (to, &sum) in to.iter_mut().zip(&*sums) {
        *to = single(sum);
    }
}
