//! What is done to scores between the products of attention, in the widest vectors of the machine.

use dsgc_ir::segment::sees;
use multiversion::multiversion;

use super::super::elementwise::{exp, larger};
use super::super::memory::Ptr;
use super::super::small::LANES;

/// Queries, and keys, that are worked on together: their scores, and a block of keys of the usual width, stay in the
/// second-level cache, and a sum over a block is long enough for the products.
pub(super) const BLOCK: usize = 64;

/// [`LANES`] queries and the keys of a block that they may see.
pub(super) struct Group<'a> {
    /// Segments of the queries.
    pub own: [i32; LANES],
    /// How many places the first query is behind the first key.
    pub distance: i32,
    /// Segments of the keys.
    pub segments: &'a [i32],
    /// Whether some of the keys are hidden from some of the queries.
    pub masked: bool,
    pub causal: bool,
    /// 0 for none.
    pub window: i32,
    pub slope: f32,
}

impl Group<'_> {
    /// The scores of a key, less what the distance takes, and minus infinity where it is hidden.
    #[inline(always)]
    fn line(&self, s: usize, scores: &[f32]) -> [f32; LANES] {
        let (segment, distance) = (self.segments[s], self.distance - s as i32);
        let mut line: [f32; LANES] = std::array::from_fn(|j| scores[s * BLOCK + j]);
        if self.slope != 0.0 {
            for (j, score) in line.iter_mut().enumerate() {
                *score -= self.slope * (distance + j as i32).abs() as f32;
            }
        }
        if self.masked {
            let window = if self.window == 0 { i32::MAX } else { self.window };
            let least = if self.causal { 0 } else { -window };
            for (j, score) in line.iter_mut().enumerate() {
                let away = distance + j as i32;
                let text = sees(self.own[j], segment);
                let near = (away >= least) & (away.abs() < window);
                *score = if text & near { *score } else { f32::NEG_INFINITY };
            }
        }
        line
    }
}

/// Largest score and divisor of queries so far.
#[derive(Clone, Copy)]
pub(super) struct Running {
    most: [f32; LANES],
    sum: [f32; LANES],
}

impl Default for Running {
    fn default() -> Running {
        Running { most: [f32::NEG_INFINITY; LANES], sum: [0.0; LANES] }
    }
}

impl Running {
    /// Largest score and divisor of one query.
    pub(super) fn of(&self, lane: usize) -> (f32, f32) {
        (self.most[lane], self.sum[lane])
    }
}

/// Scores of more keys to probabilities, not yet divided; the factors for what was summed with the former ones.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn soften(group: &Group<'_>, scores: &mut [f32], running: &mut Running) -> [f32; LANES] {
    let mut most = running.most;
    for s in 0..group.segments.len() {
        let line = group.line(s, scores);
        for j in 0..LANES {
            most[j] = larger(most[j], line[j]);
        }
        scores[s * BLOCK..][..LANES].copy_from_slice(&line);
    }
    let (mut base, mut factor, mut sum) = (most, [0.0; LANES], running.sum);
    for j in 0..LANES {
        // Nothing seen so far: every probability is 0, and not that of infinity less infinity.
        base[j] = if most[j] == f32::NEG_INFINITY { 0.0 } else { most[j] };
        factor[j] = exp(running.most[j] - base[j]);
        sum[j] *= factor[j];
    }
    for s in 0..group.segments.len() {
        let line = &mut scores[s * BLOCK..][..LANES];
        for j in 0..LANES {
            let p = exp(line[j] - base[j]);
            line[j] = p;
            sum[j] += p;
        }
    }
    *running = Running { most, sum };
    factor
}

/// Scores and gradients of probabilities to probabilities and gradients of scores:
/// `p = exp(score - divisor)`, `ds = scale * p * (dp - delta)`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn gradients(
    group: &Group<'_>,
    scores: &mut [f32],
    dp: &mut [f32],
    divisors: &[f32; LANES],
    deltas: &[f32; LANES],
    scale: f32,
) {
    for s in 0..group.segments.len() {
        let line = group.line(s, scores);
        let (scores, dp) = (&mut scores[s * BLOCK..][..LANES], &mut dp[s * BLOCK..][..LANES]);
        for j in 0..LANES {
            // A key that is not seen gives nothing, whatever its value is: 0 times infinity would be NaN.
            let hidden = line[j] == f32::NEG_INFINITY;
            let p = exp(line[j] - divisors[j]);
            let ds = scale * p * (dp[j] - deltas[j]);
            scores[j] = if hidden { 0.0 } else { p };
            dp[j] = if hidden { 0.0 } else { ds };
        }
    }
}

/// Rows of queries, times a factor, as columns `[width, BLOCK]`; up to a whole vector, columns without a query are 0.
///
/// # Safety
/// There are `count` rows, up to [`BLOCK`], of `width` elements, `stride` apart; nobody else uses the columns.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) unsafe fn transpose(
    rows: Ptr<f32>,
    stride: usize,
    count: usize,
    width: usize,
    factor: f32,
    columns: Ptr<f32>,
) {
    const TOGETHER: usize = 4;
    // SAFETY: the caller's.
    unsafe {
        let columns = columns.slice_mut(0, width * BLOCK);
        let whole = count / TOGETHER * TOGETHER;
        for first in (0..whole).step_by(TOGETHER) {
            let lines: [&[f32]; TOGETHER] = std::array::from_fn(|i| rows.slice((first + i) * stride, width));
            for d in 0..width {
                for i in 0..TOGETHER {
                    columns[d * BLOCK + first + i] = factor * lines[i][d];
                }
            }
        }
        for i in whole..count.next_multiple_of(LANES) {
            for d in 0..width {
                columns[d * BLOCK + i] = if i < count { factor * *rows.add(i * stride + d).0 } else { 0.0 };
            }
        }
    }
}

/// `sum of a * b`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (x, y) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = x.remainder().iter().zip(y.remainder()).map(|(a, b)| a * b).sum();
    for (x, y) in x.zip(y) {
        for j in 0..LANES {
            sums[j] += x[j] * y[j];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// Whether all elements of some rows are finite.
///
/// # Safety
/// There are `count` rows of `width` elements, `stride` apart, which nobody writes.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) unsafe fn all_finite(rows: Ptr<f32>, stride: usize, count: usize, width: usize) -> bool {
    const INFINITE: u32 = f32::INFINITY.to_bits();
    (0..count).all(|i| {
        // SAFETY: the caller's.
        let row = unsafe { rows.slice(i * stride, width) };
        !row.iter().fold(false, |odd, x| odd | (x.to_bits() & INFINITE == INFINITE))
    })
}
