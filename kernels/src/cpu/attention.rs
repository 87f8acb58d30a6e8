//! Attention and its gradient: a task per row of the batch and head of keys, in blocks of queries.
//!
//! Scores of a block of queries with all keys that it may see are one matrix product into the workspace; the softmax is
//! taken there, and a second product gives the result (Rabe and Staats 2021, with whole rows of scores, which fit the
//! cache). The gradient computes the scores again from the stored log of the divisor.

use dsgc_ir::segment::sees;
use gemm::Parallelism;
use multiversion::multiversion;

use super::Launch;
use super::elementwise::{exp, larger};
use super::memory::Ptr;

/// Queries that are worked on together.
pub(super) const QUERIES: usize = 64;

/// Bytes of scores that all threads need at once.
pub(super) fn workspace(q: &[usize], gradient: bool, threads: usize) -> usize {
    let places = q[1];
    let per_task = QUERIES * places * if gradient { 2 } else { 1 } + if gradient { QUERIES } else { 0 };
    threads.max(1) * per_task * size_of::<f32>()
}

/// Extents and strides of one launch.
#[derive(Clone, Copy)]
struct Heads {
    rows: usize,
    places: usize,
    heads: usize,
    groups: usize,
    width: usize,
    causal: bool,
    scale: f32,
}

impl Heads {
    fn new(l: &Launch, causal: bool, scale: f32) -> Heads {
        let (q, k) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]));
        Heads { rows: q[0], places: q[1], heads: q[2], groups: k[2], width: q[3], causal, scale }
    }

    /// Elements from one place of queries to the next.
    fn q_stride(&self) -> usize {
        self.heads * self.width
    }

    /// Elements from one place of keys to the next.
    fn k_stride(&self) -> usize {
        self.groups * self.width
    }

    /// Keys that a block of queries can see.
    fn keys(&self, first: usize, queries: usize) -> usize {
        if self.causal { first + queries } else { self.places }
    }

    /// Runs `task(row, group, thread)` for every row and head of keys.
    fn run(&self, l: &Launch, work: impl Fn(usize, usize, usize) + Sync) {
        let tasks = self.rows * self.groups;
        let weight = 4 * self.places * self.places * self.width * (self.heads / self.groups.max(1)).max(1);
        // A task needs a workspace of its own: threads take whole ranges, and the range tells them apart.
        let parts = l.threads.count().min(tasks.max(1));
        l.threads.run(parts, weight * tasks / parts, |r| {
            for part in r {
                for task in tasks * part / parts..tasks * (part + 1) / parts {
                    work(task / self.groups, task % self.groups, part);
                }
            }
        });
    }
}

/// `out = beta * out + a * b` for matrices given by pointer and strides (row, column).
///
/// # Safety
/// All elements that the extents and strides reach lie in their buffers.
#[allow(clippy::too_many_arguments)] // A matrix product has this many.
pub(super) unsafe fn product(
    (m, n, k): (usize, usize, usize),
    out: (Ptr<f32>, usize, usize),
    add: bool,
    a: (Ptr<f32>, usize, usize),
    b: (Ptr<f32>, usize, usize),
    scale: f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.0.0,
            out.2 as isize,
            out.1 as isize,
            add,
            a.0.0,
            a.2 as isize,
            a.1 as isize,
            b.0.0,
            b.2 as isize,
            b.1 as isize,
            1.0f32,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Sets scores of keys that the query does not see to minus infinity.
#[inline(always)]
fn mask(scores: &mut [f32], segments: &[i32], own: i32, t: usize, causal: bool) {
    for (s, (score, &segment)) in scores.iter_mut().zip(segments).enumerate() {
        let seen = sees(own, segment) && (!causal || s <= t);
        *score = if seen { *score } else { f32::NEG_INFINITY };
    }
}

/// Scores to probabilities, not yet divided; the largest score and the divisor. Nothing seen: all 0, divisor 0.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn softmax_row(scores: &mut [f32], segments: &[i32], own: i32, t: usize, causal: bool) -> (f32, f32) {
    mask(scores, segments, own, t, causal);
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = scores.chunks_exact(16);
    let mut most = chunks.remainder().iter().fold(f32::NEG_INFINITY, |a, &b| larger(a, b));
    for chunk in chunks {
        for j in 0..16 {
            lanes[j] = larger(lanes[j], chunk[j]);
        }
    }
    most = lanes.iter().fold(most, |a, &b| larger(a, b));
    if most == f32::NEG_INFINITY {
        // Nothing is seen, or what is seen has no softmax.
        let seen = |(s, &segment): (usize, &i32)| sees(own, segment) && (!causal || s <= t);
        let none = if segments.iter().enumerate().any(seen) { f32::NAN } else { 0.0 };
        scores.fill(none);
        return (none, none);
    }
    let mut sums = [0.0f32; 16];
    let mut chunks = scores.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for j in 0..16 {
            let e = exp(chunk[j] - most);
            chunk[j] = e;
            sums[j] += e;
        }
    }
    let mut sum = 0.0;
    for score in chunks.into_remainder() {
        *score = exp(*score - most);
        sum += *score;
    }
    (most, sums.iter().sum::<f32>() + sum)
}

/// Scores and gradients of probabilities to probabilities and gradients of scores:
/// `p = exp(score - divisor)`, `ds = scale * p * (dp - delta)`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn softmax_grad_row(
    scores: &mut [f32],
    dp: &mut [f32],
    segments: &[i32],
    own: i32,
    (t, causal): (usize, bool),
    (divisor, delta, scale): (f32, f32, f32),
) {
    mask(scores, segments, own, t, causal);
    for (score, dp) in scores.iter_mut().zip(dp) {
        let p = exp(*score - divisor);
        // A key that is not seen gives nothing, whatever its value is: 0 times infinity would be NaN.
        *dp = if *score == f32::NEG_INFINITY { 0.0 } else { scale * p * (*dp - delta) };
        *score = p;
    }
}

/// Runs `attention`.
pub(super) fn forward(l: &mut Launch, causal: bool, scale: f32) {
    let h = Heads::new(l, causal, scale);
    let (q, k, v): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.arg(2));
    let (segments, out, divisors): (Ptr<i32>, Ptr<f32>, Ptr<f32>) = (l.arg(3), l.out(0), l.out(1));
    let scratch: Ptr<f32> = l.workspace();
    if h.rows * h.places * h.heads * h.width == 0 {
        return;
    }
    h.run(l, |row, group, thread| {
        // SAFETY: offsets come from the shapes of the operands; a task writes the results of its own row and heads,
        // and uses the workspace of its own thread.
        unsafe {
            let scores = scratch.add(thread * QUERIES * h.places);
            let segments = segments.slice(row * h.places, h.places);
            let (key, value) = (
                k.add(row * h.places * h.k_stride() + group * h.width),
                v.add(row * h.places * h.k_stride() + group * h.width),
            );
            let per_group = h.heads / h.groups;
            for head in group * per_group..(group + 1) * per_group {
                for first in (0..h.places).step_by(QUERIES) {
                    let queries = QUERIES.min(h.places - first);
                    let keys = h.keys(first, queries);
                    let at = (row * h.places + first) * h.q_stride() + head * h.width;
                    product(
                        (queries, keys, h.width),
                        (scores, keys, 1),
                        false,
                        (q.add(at), h.q_stride(), 1),
                        (key, 1, h.k_stride()),
                        h.scale,
                    );
                    let divisor = divisors.slice_mut((row * h.heads + head) * h.places + first, queries);
                    for (i, divisor) in divisor.iter_mut().enumerate() {
                        let t = first + i;
                        let line = scores.slice_mut(i * keys, keys);
                        let (most, sum) = softmax_row(line, &segments[..keys], segments[t], t, h.causal);
                        *divisor = if sum == 0.0 { 0.0 } else { most + sum.ln() };
                        let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
                        line.iter_mut().for_each(|p| *p *= inverse);
                    }
                    product(
                        (queries, h.width, keys),
                        (out.add(at), h.q_stride(), 1),
                        false,
                        (scores, keys, 1),
                        (value, h.k_stride(), 1),
                        1.0,
                    );
                }
            }
        }
    });
}

/// Runs `attention_grad`: with `p` the probabilities and `g` the result's gradient, `dv = p^T g`, `dp = g v^T`,
/// `ds = scale * p * (dp - sum(g * out))`, `dq = ds k`, `dk = ds^T q`.
pub(super) fn backward(l: &mut Launch, causal: bool, scale: f32) {
    let h = Heads::new(l, causal, scale);
    let (q, k, v, segments): (Ptr<f32>, Ptr<f32>, Ptr<f32>, Ptr<i32>) = (l.arg(0), l.arg(1), l.arg(2), l.arg(3));
    let (out, divisors, grad): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(4), l.arg(5), l.arg(6));
    let (dq, dk, dv): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.out(0), l.out(1), l.out(2));
    let scratch: Ptr<f32> = l.workspace();
    if h.rows * h.places * h.heads * h.width == 0 {
        return;
    }
    h.run(l, |row, group, thread| {
        // SAFETY: as in `forward`.
        unsafe {
            let scores = scratch.add(thread * QUERIES * (2 * h.places + 1));
            let dp = scores.add(QUERIES * h.places);
            let deltas = dp.add(QUERIES * h.places).slice_mut(0, QUERIES);
            let segments = segments.slice(row * h.places, h.places);
            let base = row * h.places * h.k_stride() + group * h.width;
            let (key, value, dkey, dvalue) = (k.add(base), v.add(base), dk.add(base), dv.add(base));
            for t in 0..h.places {
                dkey.slice_mut(t * h.k_stride(), h.width).fill(0.0);
                dvalue.slice_mut(t * h.k_stride(), h.width).fill(0.0);
            }
            let per_group = h.heads / h.groups;
            for head in group * per_group..(group + 1) * per_group {
                for first in (0..h.places).step_by(QUERIES) {
                    let queries = QUERIES.min(h.places - first);
                    let keys = h.keys(first, queries);
                    let at = (row * h.places + first) * h.q_stride() + head * h.width;
                    let (query, g) = ((q.add(at), h.q_stride(), 1), (grad.add(at), h.q_stride(), 1));
                    let key_rows = (key, h.k_stride(), 1);
                    product((queries, keys, h.width), (scores, keys, 1), false, query, (key, 1, h.k_stride()), h.scale);
                    product((queries, keys, h.width), (dp, keys, 1), false, g, (value, 1, h.k_stride()), 1.0);
                    let divisor = divisors.slice((row * h.heads + head) * h.places + first, queries);
                    for (i, delta) in deltas[..queries].iter_mut().enumerate() {
                        let (a, b) =
                            (grad.slice(at + i * h.q_stride(), h.width), out.slice(at + i * h.q_stride(), h.width));
                        *delta = a.iter().zip(b).map(|(a, b)| a * b).sum();
                        let t = first + i;
                        softmax_grad_row(
                            scores.slice_mut(i * keys, keys),
                            dp.slice_mut(i * keys, keys),
                            &segments[..keys],
                            segments[t],
                            (t, h.causal),
                            (divisor[i], *delta, h.scale),
                        );
                    }
                    let dquery = (dq.add(at), h.q_stride(), 1);
                    product((queries, h.width, keys), dquery, false, (dp, keys, 1), key_rows, 1.0);
                    product((keys, h.width, queries), (dkey, h.k_stride(), 1), true, (dp, 1, keys), query, 1.0);
                    product((keys, h.width, queries), (dvalue, h.k_stride(), 1), true, (scores, 1, keys), g, 1.0);
                }
            }
        }
    });
}
