//! Attention of new columns over keys and values of all columns so far: a task per row and head of keys.
//!
//! One new column reads every key and every value once, which is all that memory must give. Several new columns, such
//! as those of a prompt, are worked on in blocks of matrix products, as in [`super::attention`]. Columns behind the new
//! ones hold nothing and are never read.

use multiversion::multiversion;

use super::Launch;
use super::attention::{QUERIES, product, softmax_row};
use super::memory::Ptr;
use super::structure::place;

/// Independent sums in a loop.
const LANES: usize = 16;

/// Bytes of scores that all threads need at once.
pub(super) fn workspace(q: &[usize], k: &[usize], threads: usize) -> usize {
    threads.max(1) * q[1].min(QUERIES) * k[1] * size_of::<f32>()
}

/// `scores[s] = scale * q . k[s]`, where keys lie `stride` elements apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn score_all(q: &[f32], keys: &[f32], stride: usize, scale: f32, scores: &mut [f32]) {
    let width = q.len();
    for (s, score) in scores.iter_mut().enumerate() {
        let key = &keys[s * stride..][..width];
        let mut lanes = [0.0f32; LANES];
        let (x, y) = (q.chunks_exact(LANES), key.chunks_exact(LANES));
        let tail: f32 = x.remainder().iter().zip(y.remainder()).map(|(a, b)| a * b).sum();
        for (x, y) in x.zip(y) {
            for j in 0..LANES {
                lanes[j] += x[j] * y[j];
            }
        }
        *score = scale * (lanes.iter().sum::<f32>() + tail);
    }
}

/// `out = sum of p[s] * v[s]`, where values lie `stride` elements apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn mix_all(p: &[f32], values: &[f32], stride: usize, out: &mut [f32]) {
    let width = out.len();
    out.fill(0.0);
    for (s, &p) in p.iter().enumerate() {
        for (out, v) in out.iter_mut().zip(&values[s * stride..][..width]) {
            *out += p * v;
        }
    }
}

/// Runs `cached_attention`.
pub(super) fn run(l: &mut Launch, scale: f32) -> Result<(), String> {
    let (q_shape, k_shape) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]));
    let [rows, new, heads, width] = [q_shape[0], q_shape[1], q_shape[2], q_shape[3]];
    let (columns, groups) = (k_shape[1], k_shape[2]);
    let before = place(l, 4, new, columns)?;
    let (q, k, v): (Ptr<f32>, Ptr<f32>, Ptr<f32>) = (l.arg(0), l.arg(1), l.arg(2));
    let (segments, out): (Ptr<i32>, Ptr<f32>) = (l.arg(3), l.out(0));
    let scratch: Ptr<f32> = l.workspace();
    let block = new.min(QUERIES);
    let (q_stride, k_stride) = (heads * width, groups * width);
    if rows * new * heads * width == 0 {
        return Ok(());
    }
    let per_group = heads / groups;
    let task = |row: usize, group: usize, thread: usize| {
        // SAFETY: offsets come from the shapes of the operands; a task writes the results of its own row and heads, and
        // uses the workspace of its own thread.
        unsafe {
            let segments = segments.slice(row * columns, columns);
            let base = row * columns * k_stride + group * width;
            let scores = scratch.add(thread * block * columns);
            for head in group * per_group..(group + 1) * per_group {
                for first in (0..new).step_by(block) {
                    let queries = block.min(new - first);
                    let keys = before + first + queries;
                    let at = (row * new + first) * q_stride + head * width;
                    // From the first element of the first key to the last of the last.
                    let reach = (keys - 1) * k_stride + width;
                    if queries == 1 {
                        let scores = scores.slice_mut(0, keys);
                        score_all(q.slice(at, width), k.slice(base, reach), k_stride, scale, scores);
                    } else {
                        let key = (k.add(base), 1, k_stride);
                        let size = (queries, keys, width);
                        product(size, (scores, keys, 1), false, (q.add(at), q_stride, 1), key, scale);
                    }
                    for i in 0..queries {
                        let line = scores.slice_mut(i * keys, keys);
                        let t = before + first + i;
                        let (_, sum) = softmax_row(line, &segments[..keys], segments[t], t, true);
                        let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
                        line.iter_mut().for_each(|p| *p *= inverse);
                    }
                    if queries == 1 {
                        mix_all(scores.slice(0, keys), v.slice(base, reach), k_stride, out.slice_mut(at, width));
                    } else {
                        let size = (queries, width, keys);
                        let value = (v.add(base), k_stride, 1);
                        product(size, (out.add(at), q_stride, 1), false, (scores, keys, 1), value, 1.0);
                    }
                }
            }
        }
    };
    let tasks = rows * groups;
    let parts = l.threads.count().min(tasks.max(1));
    let weight = 4 * (before + new) * new * width * per_group;
    l.threads.run(parts, weight * tasks / parts, |r| {
        for part in r {
            for at in tasks * part / parts..tasks * (part + 1) / parts {
                task(at / groups, at % groups, part);
            }
        }
    });
    Ok(())
}
