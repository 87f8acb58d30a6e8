//! Attention of new columns over keys and values of all columns so far.
//!
//! One new column reads every key and every value that it sees once, column by column as they lie, for all heads of the
//! range that a thread has: memory must give no more than that. Several new columns, such as those of a prompt, are
//! worked on in blocks, as in [`super::attention`]. Columns behind the new ones hold nothing and are never read.

use std::ops::Range;

use dsgc_ir::{DType, segment};
use multiversion::multiversion;

use super::Launch;
use super::attention::{self, Heads};
use super::elementwise::{exp, larger};
use super::memory::Ptr;
use super::narrow;
use super::small::LANES;
use super::structure::place;

/// Values that are added to a result at once.
const TOGETHER: usize = 4;

/// Columns of narrow numbers that are widened at once; whole blocks of [`TOGETHER`].
const COLUMNS: usize = 2 * TOGETHER;

/// Elements that a thread needs for one new column: a score per head and column, and some columns in f32.
fn per_thread(heads: usize, columns: usize, groups: usize, width: usize) -> usize {
    heads * columns + COLUMNS * groups * width
}

/// Bytes that all threads need at once.
pub(super) fn workspace(q: &[usize], k: &[usize], threads: usize) -> usize {
    let one = threads.max(1) * per_thread(q[2], k[1], k[2], k[3]) * size_of::<f32>();
    if q[1] > 1 { one.max(attention::workspace(q[3], false, threads)) } else { one }
}

/// Runs `cached_attention`.
pub(super) fn run(l: &mut Launch, scale: f64, window: usize) -> Result<(), String> {
    let (q, k) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]));
    let first = place(l, 4, q[1], k[1])?;
    let heads = Heads { first, ..Heads::new(l, 5, true, scale, window) };
    if heads.is_empty() {
        return Ok(());
    }
    match heads.queries {
        1 => step(l, &heads),
        _ => heads.forward(l, None),
    }
    Ok(())
}

/// One new column: each thread some heads of keys, of one row after the other.
fn step(l: &mut Launch, h: &Heads) {
    let keys = l.op.args[1];
    let narrow = narrow::is_kept(&l.op.op, 1, l.dtype(keys), l.graph.ty(l.op.args[0]));
    let share = per_thread(h.heads, h.columns, h.groups, h.width);
    let (out, scratch): (Ptr<f32>, Ptr<f32>) = (l.out(0), l.workspace());
    let tasks = h.rows * h.groups;
    let parts = l.threads.count().min(tasks);
    let weight = 4 * (h.first + 1) * h.width * h.heads * h.rows;
    l.threads.run(parts, weight / parts, |range| {
        for part in range {
            let (mut at, end) = (tasks * part / parts, tasks * (part + 1) / parts);
            while at < end {
                let row = at / h.groups;
                let groups = at % h.groups..h.groups.min(at % h.groups + end - at);
                at += groups.len();
                // SAFETY: a thread writes the results of its own rows and heads, and uses a workspace of its own.
                unsafe { attend(h, narrow, row, groups, out, scratch.add(part * share)) }
            }
        }
    });
}

/// Runs of keys that a query of the segment `own` sees, which is the last place.
fn runs(segments: &[i32], own: i32, from: usize) -> impl Iterator<Item = Range<usize>> {
    let sees = move |s: usize| segment::sees(own, segments[s]);
    let mut at = from;
    std::iter::from_fn(move || {
        let begin = (at..segments.len()).find(|&s| sees(s))?;
        at = (begin..segments.len()).find(|&s| !sees(s)).unwrap_or(segments.len());
        Some(begin..at)
    })
}

/// The result of some heads of a row.
///
/// # Safety
/// Nobody else uses these results or the workspace of a thread. Keys and values are bf16 if `narrow`.
unsafe fn attend(h: &Heads, narrow: bool, row: usize, groups: Range<usize>, out: Ptr<f32>, scratch: Ptr<f32>) {
    let (width, stride, shared) = (h.width, h.k_stride(), h.heads / h.groups);
    let (heads, at) = (groups.len() * shared, row * h.heads + groups.start * shared);
    let own_width = groups.len() * width;
    // SAFETY: the caller's, and offsets come from the shapes of the operands.
    unsafe {
        let segments = &h.segments_of(row)[..=h.first];
        let from = if h.window == 0 { 0 } else { (h.first + 1).saturating_sub(h.window) };
        let own = segments[h.first];
        let seen: usize = runs(segments, own, from).map(|run| run.len()).sum();
        let (q, out) = (h.q.slice(at * width, heads * width), out.slice_mut(at * width, heads * width));
        let scores = scratch.slice_mut(0, heads * seen);
        let wide = scratch.add(h.heads * h.columns).slice_mut(0, COLUMNS * own_width);
        // Runs of columns as these heads use them: elements from the first to the last, and from one column to the next.
        let mut columns = |x: Ptr<f32>, work: &mut dyn FnMut(usize, &[f32], usize)| {
            let mut done = 0;
            for run in runs(segments, own, from) {
                let begin = |s: usize| (row * h.columns + s) * stride + groups.start * width;
                if !narrow {
                    work(done, x.slice(begin(run.start), (run.len() - 1) * stride + own_width), stride);
                    done += run.len();
                    continue;
                }
                for first in run.clone().step_by(COLUMNS) {
                    let count = COLUMNS.min(run.end - first);
                    for (s, line) in (first..first + count).zip(wide.chunks_exact_mut(own_width)) {
                        let from = x.0.cast::<u16>().add(begin(s)).cast();
                        narrow::widen(DType::Bf16, from, line.as_mut_ptr(), own_width);
                    }
                    work(done, &wide[..count * own_width], own_width);
                    done += count;
                }
            }
        };
        columns(h.k, &mut |done, keys, stride| {
            score(q, keys, (stride, width, shared), h.scale, &mut scores[done..], seen);
        });
        for (head, line) in scores.chunks_exact_mut(seen.max(1)).enumerate() {
            let slope = h.slope(groups.start * shared + head);
            if slope != 0.0 {
                let places = runs(segments, own, from).flatten();
                line.iter_mut().zip(places).for_each(|(score, s)| *score -= slope * (h.first - s) as f32);
            }
            soften(line);
        }
        out.fill(0.0);
        columns(h.v, &mut |done, values, stride| {
            mix(&scores[done..], seen, values, (stride, width, shared), out);
        });
    }
}

/// The sum of all lanes, by halves.
#[inline(always)]
fn folded(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for j in 0..half {
            lanes[j] += lanes[j + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `scores[head * seen + s] = scale * q[head] . k[s]`: keys lie `stride` elements apart, and `shared` heads use the same.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn score(
    q: &[f32],
    keys: &[f32],
    (stride, width, shared): (usize, usize, usize),
    scale: f32,
    scores: &mut [f32],
    seen: usize,
) {
    let whole = width / LANES * LANES;
    for (s, key) in keys.chunks(stride).enumerate() {
        for (head, q) in q.chunks_exact(width).enumerate() {
            let key = &key[head / shared * width..][..width];
            let mut lanes = [0.0f32; LANES];
            for (x, y) in q.chunks_exact(LANES).zip(key.chunks_exact(LANES)) {
                for j in 0..LANES {
                    lanes[j] += x[j] * y[j];
                }
            }
            let tail: f32 = q[whole..].iter().zip(&key[whole..]).map(|(a, b)| a * b).sum();
            scores[head * seen + s] = scale * (folded(lanes) + tail);
        }
    }
}

/// Scores to probabilities.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn soften(scores: &mut [f32]) {
    let most = scores.iter().fold(f32::NEG_INFINITY, |a, &b| larger(a, b));
    let mut sums = [0.0f32; LANES];
    for chunk in scores.chunks_mut(LANES) {
        for (score, sum) in chunk.iter_mut().zip(&mut sums) {
            *score = exp(*score - most);
            *sum += *score;
        }
    }
    let inverse = 1.0 / folded(sums);
    scores.iter_mut().for_each(|p| *p *= inverse);
}

/// `out[head] += sum of p[head * seen + s] * v[s]`, laid out as for `score`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn mix(p: &[f32], seen: usize, values: &[f32], (stride, width, shared): (usize, usize, usize), out: &mut [f32]) {
    for (block, values) in values.chunks(TOGETHER * stride).enumerate() {
        for (head, out) in out.chunks_exact_mut(width).enumerate() {
            let p = &p[head * seen + block * TOGETHER..];
            let value = |i: usize| &values[i * stride + head / shared * width..][..width];
            if values.len() > (TOGETHER - 1) * stride {
                let (p, v) = ([p[0], p[1], p[2], p[3]], [value(0), value(1), value(2), value(3)]);
                for d in 0..width {
                    out[d] = (((out[d] + p[0] * v[0][d]) + p[1] * v[1][d]) + p[2] * v[2][d]) + p[3] * v[3][d];
                }
            } else {
                for (i, p) in p.iter().enumerate().take(values.len().div_ceil(stride)) {
                    out.iter_mut().zip(value(i)).for_each(|(out, v)| *out += p * v);
                }
            }
        }
    }
}
