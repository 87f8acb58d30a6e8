//! Attention of new columns over keys and values of all columns so far.
//!
//! One new column reads every key and every value that it sees once, column by column as they lie, for all heads of the
//! range that a thread has: memory must give no more than that. Several new columns, such as those of a prompt, are
//! worked on in blocks, as in [`super::attention`]. Columns behind the new ones hold nothing and are never read.

use std::ops::Range;

use dsgc_ir::segment;

use super::Launch;
use super::attention::{self, Heads, folded, padded};
use super::lanes::{Element, Kernel, LANES, Lanes, by_element};
use super::memory::Ptr;
use super::structure::place;

/// Columns of values that are added to a result at once.
const TOGETHER: usize = 4;

/// Elements that a thread needs for one new column: per head a score of each column, the lanes of [`LANES`] scores that
/// are not yet added up, its query, and its result.
fn per_thread(heads: usize, columns: usize, width: usize) -> usize {
    heads * (scores(columns) + LANES * LANES + 2 * padded(width))
}

/// Elements of a head's scores of so many columns: whole vectors, of which the last may begin at the last column.
fn scores(columns: usize) -> usize {
    padded(columns) + LANES
}

/// Bytes that all threads need at once.
pub(super) fn workspace(q: &[usize], k: &[usize], threads: usize) -> usize {
    let one = threads.max(1) * per_thread(q[2], k[1], k[3]) * size_of::<f32>();
    if q[1] > 1 { one.max(attention::workspace(q[1], q[3], threads)) } else { one }
}

/// Runs `cached_attention`.
pub(super) fn run(l: &mut Launch, scale: f64, window: usize) -> Result<(), String> {
    by_element!(l, run_of(l, scale, window))
}

fn run_of<E: Element>(l: &mut Launch, scale: f64, window: usize) -> Result<(), String> {
    let (q, k) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]));
    let first = place(l, 4, q[1], k[1])?;
    let heads = Heads::<E> { first, ..Heads::new(l, 5, true, scale, window) };
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
fn step<E: Element>(l: &mut Launch, h: &Heads<E>) {
    let share = per_thread(h.heads, h.columns, h.width);
    let (out, scratch): (Ptr<E>, Ptr<f32>) = (l.out(0), l.workspace());
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
                unsafe { h.kind.run(Step { h, row, groups, out, work: scratch.add(part * share) }) };
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
struct Step<'a, E> {
    h: &'a Heads<E>,
    row: usize,
    /// Heads of keys.
    groups: Range<usize>,
    out: Ptr<E>,
    work: Ptr<f32>,
}

/// Nobody else uses these results or the workspace of a thread.
impl<E: Element> Kernel for Step<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let h = self.h;
        let (shared, wide) = (h.shared(), padded(h.width));
        let (heads, first) = (self.groups.len() * shared, self.groups.start * shared);
        // SAFETY: the caller's, and offsets come from the shapes of the operands.
        unsafe {
            let segments = &h.segments_of(self.row)[..=h.first];
            let from = if h.window == 0 { 0 } else { (h.first + 1).saturating_sub(h.window) };
            let seen = || runs(segments, segments[h.first], from);
            let columns: usize = seen().map(|run| run.len()).sum();
            let (scores, stride) = (self.work, scores(columns));
            let lanes = scores.add(heads * stride);
            let (q, sums) = (lanes.add(heads * LANES * LANES), lanes.add(heads * (LANES * LANES + wide)));
            let at = (self.row * h.heads + first) * h.width;
            for head in 0..heads {
                for d in (0..wide).step_by(LANES) {
                    let from = h.q.add(at + head * h.width + d).0.cast_const();
                    (E::load_some::<L>(from, h.width - d) * L::splat(h.scale)).store(q.add(head * wide + d).0);
                    L::zero().store(sums.add(head * wide + d).0);
                }
                // Behind the last column nothing is seen.
                L::splat(f32::NEG_INFINITY).store(scores.add(head * stride + columns / LANES * LANES).0);
            }
            let mut done = 0;
            for run in seen() {
                for from in run.clone().step_by(LANES) {
                    let some = from..run.end.min(from + LANES);
                    self.score::<L>(some.clone(), q, lanes, scores.add(done), stride);
                    done += some.len();
                }
            }
            for head in 0..heads {
                soften::<L>(scores.add(head * stride), columns);
            }
            let mut done = 0;
            for run in seen() {
                for from in run.clone().step_by(TOGETHER) {
                    let some = from..run.end.min(from + TOGETHER);
                    self.mix::<L>(some.clone(), scores.add(done), stride, sums);
                    done += some.len();
                }
            }
            for head in 0..heads {
                for d in (0..wide).step_by(LANES) {
                    let to = self.out.add(at + head * h.width + d).0;
                    let lanes = L::load(sums.add(head * wide + d).0);
                    E::store_some(lanes, to, h.width - d);
                }
            }
        }
    }
}

impl<E: Element> Step<'_, E> {
    /// Where the keys, or values, of these heads in a column begin.
    fn column(&self, s: usize) -> usize {
        (self.row * self.h.columns + s) * self.h.k_stride() + self.groups.start * self.h.width
    }

    /// Scores of up to [`LANES`] columns, minus infinity behind the last: of each head [`LANES`] numbers, `stride` apart,
    /// which those of the next columns may overwrite.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn score<L: Lanes>(
        &self,
        some: Range<usize>,
        q: Ptr<f32>,
        lanes: Ptr<f32>,
        scores: Ptr<f32>,
        stride: usize,
    ) {
        let (h, wide, shared) = (self.h, padded(self.h.width), self.h.shared());
        let heads = self.groups.len() * shared;
        // SAFETY: the caller's.
        unsafe {
            for (j, s) in some.clone().enumerate() {
                let keys = h.k.add(self.column(s));
                for head in 0..heads {
                    let key = keys.add(head / shared * h.width);
                    let mut sum = L::zero();
                    for d in (0..wide).step_by(LANES) {
                        let key: L = E::load_some(key.add(d).0.cast_const(), h.width - d);
                        sum = key.mul_add(L::load(q.add(head * wide + d).0), sum);
                    }
                    sum.store(lanes.add((head * LANES + j) * LANES).0);
                }
            }
            let there = u16::MAX >> (LANES - some.len());
            let places: [f32; LANES] = std::array::from_fn(|j| j as f32);
            // How far each column is before the new one.
            let away = L::splat((h.first - some.start) as f32) - L::load(places.as_ptr());
            for head in 0..heads {
                let mut rows = [L::zero(); LANES];
                for (j, row) in rows.iter_mut().enumerate().take(some.len()) {
                    *row = L::load(lanes.add((head * LANES + j) * LANES).0);
                }
                let slope = h.slope(self.groups.start * shared + head);
                let sums = away.mul_add(L::splat(-slope), folded(rows));
                sums.choose(there, L::splat(f32::NEG_INFINITY)).store(scores.add(head * stride).0);
            }
        }
    }

    /// Adds values of up to [`TOGETHER`] columns times their probabilities, which are laid out as scores are.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn mix<L: Lanes>(&self, some: Range<usize>, p: Ptr<f32>, stride: usize, sums: Ptr<f32>) {
        let (h, wide, shared) = (self.h, padded(self.h.width), self.h.shared());
        // SAFETY: the caller's.
        unsafe {
            let values = h.v.add(self.column(some.start));
            for head in 0..self.groups.len() * shared {
                let value = values.add(head / shared * h.width);
                let mut factors = [L::zero(); TOGETHER];
                for (j, factor) in factors.iter_mut().enumerate().take(some.len()) {
                    *factor = L::splat(*p.add(head * stride + j).0);
                }
                for d in (0..wide).step_by(LANES) {
                    let sum = sums.add(head * wide + d).0;
                    let mut lanes = L::load(sum);
                    for (j, factor) in factors.iter().enumerate().take(some.len()) {
                        let value: L = E::load_some(value.add(j * h.k_stride() + d).0.cast_const(), h.width - d);
                        lanes = factor.mul_add(value, lanes);
                    }
                    lanes.store(sum);
                }
            }
        }
    }
}

/// Scores to probabilities.
///
/// # Safety
/// There are so many, and up to a whole vector minus infinity; nobody else uses them. The machine has what `L` needs.
#[inline(always)]
unsafe fn soften<L: Lanes>(scores: Ptr<f32>, count: usize) {
    // SAFETY: the caller's.
    unsafe {
        let at = |i: usize| scores.add(i).0;
        let mut most = L::splat(f32::MIN);
        for i in (0..count).step_by(LANES) {
            most = most.at_least(L::load(at(i)));
        }
        let most = most.to_array().into_iter().fold(f32::MIN, f32::max);
        let (mut sum, most) = (L::zero(), L::splat(most));
        for i in (0..count).step_by(LANES) {
            let p = (L::load(at(i)) - most).exp_or_zero();
            p.store(at(i));
            sum = sum + p;
        }
        let inverse = L::splat(1.0 / sum.to_array().iter().sum::<f32>());
        for i in (0..count).step_by(LANES) {
            (L::load(at(i)) * inverse).store(at(i));
        }
    }
}
