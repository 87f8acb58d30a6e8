//! Normalisation of rows and its gradient: LayerNorm and RMSNorm.

use multiversion::multiversion;

use super::Launch;
use super::memory::Ptr;
use super::reduce::together;

/// Rows whose contributions to the gradients of weight and bias are added up before those of other rows.
const ROWS: usize = 64;
/// Independent sums in a loop.
const LANES: usize = 16;

/// Bytes for the gradients of weight and bias of every block of rows.
pub(super) fn workspace(shape: &[usize]) -> usize {
    let (width, lead) = shape.split_last().map_or((0, &[] as &[usize]), |(w, lead)| (*w, lead));
    let rows: usize = lead.iter().product();
    rows.div_ceil(ROWS) * width * (size_of::<f64>() + size_of::<f32>())
}

#[inline(always)]
fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = n / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
    }
    let tail: f32 = (whole..n).map(&f).sum();
    together(lanes, |a, b| a + b) + tail
}

/// Mean and `1 / sqrt(var + eps)`.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x.len(), |i| x[i]) / n;
    let variance = sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn forward_row(x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32], eps: f32) {
    let n = out.len();
    let (x, weight, bias) = (&x[..n], &weight[..n], &bias[..n]);
    let (mean, inverse) = moments(x, eps);
    for i in 0..n {
        out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
    }
}

/// With `n = (x - mean) * inverse` and `h = grad * weight`:
/// `dx = inverse * (h - mean(h) - n * mean(h * n))`; adds `grad * n` to `dw` and `grad` to `db`. The latter in doubles: where
/// a loss takes differences of two texts, their gradients cancel, and an optimizer would magnify what roundings leave.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn backward_row(x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], dw: &mut [f32], db: &mut [f64], eps: f32) {
    let n = dx.len();
    let (x, weight, grad, dw, db) = (&x[..n], &weight[..n], &grad[..n], &mut dw[..n], &mut db[..n]);
    let (mean, inverse) = moments(x, eps);
    let mean_h = sum(n, |i| grad[i] * weight[i]) / n as f32;
    let mean_hn = sum(n, |i| grad[i] * weight[i] * ((x[i] - mean) * inverse)) / n as f32;
    for i in 0..n {
        let normal = (x[i] - mean) * inverse;
        dx[i] = inverse * (grad[i] * weight[i] - mean_h - normal * mean_hn);
        dw[i] += grad[i] * normal;
        db[i] += f64::from(grad[i]);
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn rms_forward_row(x: &[f32], weight: &[f32], out: &mut [f32], eps: f32) {
    let n = out.len();
    let (x, weight) = (&x[..n], &weight[..n]);
    let inverse = inverse_rms(x, eps);
    for i in 0..n {
        out[i] = x[i] * inverse * weight[i];
    }
}

/// With `n = x * inverse` and `h = grad * weight`: `dx = inverse * (h - n * mean(h * n))`; adds `grad * n` to `dw`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn rms_backward_row(x: &[f32], weight: &[f32], grad: &[f32], dx: &mut [f32], dw: &mut [f32], eps: f32) {
    let n = dx.len();
    let (x, weight, grad, dw) = (&x[..n], &weight[..n], &grad[..n], &mut dw[..n]);
    let inverse = inverse_rms(x, eps);
    let mean = sum(n, |i| grad[i] * weight[i] * (x[i] * inverse)) / n as f32;
    for i in 0..n {
        let normal = x[i] * inverse;
        dx[i] = inverse * (grad[i] * weight[i] - normal * mean);
        dw[i] += grad[i] * normal;
    }
}

/// Runs `rms_norm`.
pub(super) fn rms_forward(l: &mut Launch, eps: f64) {
    let (rows, width) = l.rows(l.result());
    let (x, weight, out): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.out(0));
    l.threads.run(rows, 3 * width, |r| {
        for row in r {
            // SAFETY: operand and result have `rows` rows of `width`; rows are apart.
            unsafe {
                let out = out.slice_mut(row * width, width);
                rms_forward_row(x.slice(row * width, width), weight.slice(0, width), out, eps as f32);
            }
        }
    });
}

/// Runs `rms_norm_grad`.
pub(super) fn rms_backward(l: &mut Launch, eps: f64) {
    let (rows, width) = l.rows(l.op.args[0]);
    let (x, weight, grad): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.arg(2));
    let (dx, dw): (Ptr<f32>, Ptr<f32>) = (l.out(0), l.out(1));
    let partial: Ptr<f32> = l.workspace();
    let blocks = rows.div_ceil(ROWS);
    l.threads.run(blocks, 6 * ROWS * width, |r| {
        for block in r {
            // SAFETY: the workspace has a row per block; rows of operands and results are apart.
            unsafe {
                let dw = partial.slice_mut(block * width, width);
                dw.fill(0.0);
                for row in block * ROWS..rows.min((block + 1) * ROWS) {
                    let dx = dx.slice_mut(row * width, width);
                    let (x, grad) = (x.slice(row * width, width), grad.slice(row * width, width));
                    rms_backward_row(x, weight.slice(0, width), grad, dx, dw, eps as f32);
                }
            }
        }
    });
    // SAFETY: all blocks are written, and nobody else touches the result.
    unsafe {
        let dw = dw.slice_mut(0, width);
        dw.fill(0.0);
        for block in 0..blocks {
            dw.iter_mut().zip(partial.slice(block * width, width)).for_each(|(a, b)| *a += b);
        }
    }
}

/// Runs `layer_norm`.
pub(super) fn forward(l: &mut Launch, eps: f64) {
    let (rows, width) = l.rows(l.result());
    let (x, weight, bias, out): (Ptr<f32>, Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.arg(2), l.out(0));
    l.threads.run(rows, 4 * width, |r| {
        for row in r {
            // SAFETY: operands and result have `rows` rows of `width`; rows are apart.
            unsafe {
                let out = out.slice_mut(row * width, width);
                forward_row(x.slice(row * width, width), weight.slice(0, width), bias.slice(0, width), out, eps as f32);
            }
        }
    });
}

/// Runs `layer_norm_grad`.
pub(super) fn backward(l: &mut Launch, eps: f64) {
    let (rows, width) = l.rows(l.op.args[0]);
    let (x, weight, grad): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.arg(2));
    let (dx, dw, db): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.out(0), l.out(1), l.out(2));
    let blocks = rows.div_ceil(ROWS);
    let partial_db: Ptr<f64> = l.workspace();
    // SAFETY: the workspace has a row of doubles per block, and behind them one of floats.
    let partial_dw: Ptr<f32> = Ptr(unsafe { partial_db.add(blocks * width) }.0.cast());
    l.threads.run(blocks, 8 * ROWS * width, |r| {
        for block in r {
            // SAFETY: the workspace has two rows per block; rows of operands and results are apart.
            unsafe {
                let (dw, db) = (partial_dw.slice_mut(block * width, width), partial_db.slice_mut(block * width, width));
                dw.fill(0.0);
                db.fill(0.0);
                for row in block * ROWS..rows.min((block + 1) * ROWS) {
                    let dx = dx.slice_mut(row * width, width);
                    let (x, grad) = (x.slice(row * width, width), grad.slice(row * width, width));
                    backward_row(x, weight.slice(0, width), grad, dx, dw, db, eps as f32);
                }
            }
        }
    });
    // SAFETY: all blocks are written, and nobody else touches the results.
    unsafe {
        let (dw, db) = (dw.slice_mut(0, width), db.slice_mut(0, width));
        dw.fill(0.0);
        for block in 0..blocks {
            dw.iter_mut().zip(partial_dw.slice(block * width, width)).for_each(|(a, b)| *a += b);
        }
        let sums = partial_db.slice_mut(0, blocks * width);
        for block in 1..blocks {
            let (all, of_block) = sums.split_at_mut(block * width);
            all[..width].iter_mut().zip(&of_block[..width]).for_each(|(a, b)| *a += b);
        }
        db.fill(0.0);
        db.iter_mut().zip(&*sums).for_each(|(a, &b)| *a = b as f32);
    }
}
