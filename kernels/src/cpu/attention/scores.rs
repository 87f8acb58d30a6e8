//! What is done to scores between the products of attention.

use super::super::lanes::{LANES, Lanes};
use super::super::memory::Ptr;
use super::BLOCK;
use super::sight::Sight;

/// Scores of [`LANES`] lanes in the rows of a block that they see.
pub(super) struct Lane<'a> {
    pub sight: &'a Sight,
    /// The number among the block's vectors.
    pub vector: usize,
    /// How much less a score is per place of distance.
    pub slope: f32,
    /// How many places the first lane of the block is behind its first row.
    pub distance: isize,
}

impl Lane<'_> {
    /// The scores of a row, less what the distance takes, and minus infinity where nothing is seen.
    ///
    /// # Safety
    /// The machine has what `L` needs.
    #[inline(always)]
    unsafe fn line<L: Lanes>(&self, row: usize, mut scores: L) -> L {
        // SAFETY: the caller's.
        unsafe {
            if self.slope != 0.0 {
                let places: [f32; LANES] = std::array::from_fn(|j| j as f32);
                let begin = self.distance + (self.vector * LANES) as isize - row as isize;
                let away = L::load(places.as_ptr()) + L::splat(begin as f32);
                scores = away.abs().mul_add(L::splat(-self.slope), scores);
            }
            if self.sight.masked[self.vector] {
                scores = scores.choose(self.bits(row), L::splat(f32::NEG_INFINITY));
            }
            scores
        }
    }

    /// The lanes of a row that see.
    #[inline(always)]
    fn bits(&self, row: usize) -> u16 {
        (self.sight.bits[row] >> (self.vector * LANES)) as u16
    }

    /// Whether scores are what the product gave.
    fn is_plain(&self) -> bool {
        self.slope == 0.0 && !self.sight.masked[self.vector]
    }
}

/// Largest score and divisor of the queries in the lanes so far.
#[derive(Clone, Copy)]
pub(super) struct Running {
    pub most: [f32; LANES],
    pub sum: [f32; LANES],
}

/// Less than any score that is a number: so the probability of what is hidden is 0, and not that of infinity less
/// infinity.
const LEAST: f32 = f32::MIN;

impl Default for Running {
    fn default() -> Running {
        Running { most: [LEAST; LANES], sum: [0.0; LANES] }
    }
}

/// Rows at a time, so that no maximum and no sum waits for the one before.
const TOGETHER: usize = 4;

/// Scores of more keys, which are rows, to probabilities, not yet divided; the factors for what was summed with the
/// former ones.
///
/// # Safety
/// The scores are the block's, and nobody else uses them. The machine has what `L` needs.
#[inline(always)]
pub(super) unsafe fn soften<L: Lanes>(lane: &Lane<'_>, scores: Ptr<f32>, running: &mut Running) -> [f32; LANES] {
    let (from, to) = lane.sight.rows[lane.vector];
    // SAFETY: the caller's.
    unsafe {
        let at = |row: usize| scores.add(row * BLOCK + lane.vector * LANES).0;
        let before = L::load(running.most.as_ptr());
        let mut most = [before; TOGETHER];
        if lane.is_plain() {
            let mut row = from;
            while row + TOGETHER <= to {
                for (i, most) in most.iter_mut().enumerate() {
                    *most = most.at_least(L::load(at(row + i)));
                }
                row += TOGETHER;
            }
            for row in row..to {
                most[0] = most[0].at_least(L::load(at(row)));
            }
        } else {
            for row in from..to {
                let line = lane.line(row, L::load(at(row)));
                most[0] = most[0].at_least(line);
                line.store(at(row));
            }
        }
        let most = most[0].at_least(most[1]).at_least(most[2].at_least(most[3]));
        let factor = (before - most).exp_or_zero();
        let mut sums = [L::load(running.sum.as_ptr()) * factor, L::zero(), L::zero(), L::zero()];
        let mut row = from;
        while row + TOGETHER <= to {
            for (i, sum) in sums.iter_mut().enumerate() {
                let p = (L::load(at(row + i)) - most).exp_or_zero();
                p.store(at(row + i));
                *sum = *sum + p;
            }
            row += TOGETHER;
        }
        for row in row..to {
            let p = (L::load(at(row)) - most).exp_or_zero();
            p.store(at(row));
            sums[0] = sums[0] + p;
        }
        most.store(running.most.as_mut_ptr());
        ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(running.sum.as_mut_ptr());
        let before = before.to_array();
        let mut factor = factor.to_array();
        // Where nothing was summed there is nothing to correct.
        factor.iter_mut().zip(before).filter(|(_, before)| *before == LEAST).for_each(|(factor, _)| *factor = 1.0);
        factor
    }
}

/// Scores and gradients of probabilities of queries, which are rows, to probabilities and gradients of scores:
/// `p = exp(score - divisor)`, `ds = scale * p * (dp - delta)`. Gradients in rows outside of what is seen become 0.
///
/// # Safety
/// Scores and gradients are the block's, of `rows` rows, and nobody else uses them. The machine has what `L` needs.
#[inline(always)]
pub(super) unsafe fn gradients<L: Lanes>(
    lane: &Lane<'_>,
    rows: usize,
    (scores, dp): (Ptr<f32>, Ptr<f32>),
    (divisors, deltas): (&[f32], &[f32]),
    scale: f32,
) {
    let (from, to) = lane.sight.rows[lane.vector];
    // SAFETY: the caller's.
    unsafe {
        let at = |of: Ptr<f32>, row: usize| of.add(row * BLOCK + lane.vector * LANES).0;
        for row in (0..from).chain(to..rows) {
            L::zero().store(at(dp, row));
        }
        let plain = lane.is_plain();
        for row in from..to {
            let mut line = L::load(at(scores, row));
            if !plain {
                line = lane.line(row, line);
            }
            let mut p = (line - L::splat(divisors[row])).exp_or_zero();
            let mut ds = (L::load(at(dp, row)) - L::splat(deltas[row])) * (p * L::splat(scale));
            if lane.sight.masked[lane.vector] {
                // A key that is not seen gives nothing, whatever its value is: 0 times infinity would be NaN.
                p = p.choose(lane.bits(row), L::zero());
                ds = ds.choose(lane.bits(row), L::zero());
            }
            p.store(at(scores, row));
            ds.store(at(dp, row));
        }
    }
}
