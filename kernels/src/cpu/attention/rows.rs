//! Rows of queries, keys and values: copies as f32 in whole vectors, as they lie or as columns, and results back.

use super::super::lanes::{Element, LANES, Lanes};
use super::super::memory::Ptr;
use super::BLOCK;

/// Rows that are copied at a time.
const TOGETHER: usize = 4;

/// A width in whole vectors.
pub(in super::super) fn padded(width: usize) -> usize {
    width.next_multiple_of(LANES)
}

/// Rows of a head.
#[derive(Clone, Copy)]
pub(super) struct Rows<E> {
    /// The first; elements from row to row.
    pub at: Ptr<E>,
    pub stride: usize,
    /// How many; up to [`BLOCK`] where they become columns.
    pub count: usize,
    pub width: usize,
}

impl<E: Element> Rows<E> {
    /// Up to a vector of a row from an element on; zeros behind its end.
    ///
    /// # Safety
    /// The row is there, and nobody writes it. The machine has what `L` needs.
    #[inline(always)]
    unsafe fn vector<L: Lanes>(&self, row: usize, from: usize) -> L {
        // SAFETY: the caller's.
        unsafe { E::load_some(self.at.add(row * self.stride + from).0.cast_const(), self.width - from) }
    }

    /// As `vector`, of [`LANES`] rows; zeros behind the last.
    ///
    /// # Safety
    /// As for `vector`.
    #[inline(always)]
    unsafe fn vectors<L: Lanes>(&self, first: usize, from: usize) -> [L; LANES] {
        // SAFETY: the caller's.
        unsafe {
            let mut rows = [L::zero(); LANES];
            if first + LANES <= self.count {
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = self.vector(first + i, from);
                }
            } else {
                for (i, row) in rows.iter_mut().enumerate().take(self.count - first) {
                    *row = self.vector(first + i, from);
                }
            }
            rows
        }
    }

    /// Copies rows with zeros up to whole vectors, `padded(width)` apart; whether all their numbers are finite.
    ///
    /// # Safety
    /// As for `vector`; nobody else uses the copy.
    #[inline(always)]
    pub(super) unsafe fn copy<L: Lanes>(&self, to: Ptr<f32>) -> bool {
        let wide = padded(self.width);
        // SAFETY: the caller's.
        unsafe {
            // 0 times what is finite is 0, else no number. Several sums, so that none waits for the one before.
            let mut odd = [L::zero(); TOGETHER];
            let whole = self.count / TOGETHER * TOGETHER;
            for first in (0..whole).step_by(TOGETHER) {
                for from in (0..wide).step_by(LANES) {
                    for (i, odd) in odd.iter_mut().enumerate() {
                        let lanes: L = self.vector(first + i, from);
                        *odd = lanes.mul_add(L::zero(), *odd);
                        lanes.store(to.add((first + i) * wide + from).0);
                    }
                }
            }
            for row in whole..self.count {
                for from in (0..wide).step_by(LANES) {
                    let lanes: L = self.vector(row, from);
                    odd[0] = lanes.mul_add(L::zero(), odd[0]);
                    lanes.store(to.add(row * wide + from).0);
                }
            }
            let odd = (odd[0] + odd[1]) + (odd[2] + odd[3]);
            odd.to_array().iter().all(|x| *x == 0.0)
        }
    }

    /// Copies rows, times a factor, as columns `[width, BLOCK]`; up to a whole vector, columns without a row are 0.
    ///
    /// # Safety
    /// As for `copy`.
    #[inline(always)]
    pub(super) unsafe fn turn<L: Lanes>(&self, factor: f32, to: Ptr<f32>) {
        // SAFETY: the caller's.
        unsafe {
            let factor = L::splat(factor);
            for first in (0..self.count).step_by(LANES) {
                for from in (0..self.width).step_by(LANES) {
                    let columns = L::transposed(self.vectors::<L>(first, from));
                    let to = to.add(from * BLOCK + first);
                    if from + LANES <= self.width {
                        for (d, column) in columns.iter().enumerate() {
                            (*column * factor).store(to.add(d * BLOCK).0);
                        }
                    } else {
                        for (d, column) in columns.iter().enumerate().take(self.width - from) {
                            (*column * factor).store(to.add(d * BLOCK).0);
                        }
                    }
                }
            }
        }
    }

    /// Writes numbers that lie `padded(width)` apart, row `i` times `factor(i)`, each rounded once.
    ///
    /// # Safety
    /// There are as many of them; nobody else uses the rows. The machine has what `L` needs.
    #[inline(always)]
    pub(super) unsafe fn write<L: Lanes>(&self, numbers: Ptr<f32>, factor: impl Fn(usize) -> f32) {
        let wide = padded(self.width);
        // SAFETY: the caller's.
        unsafe {
            for row in 0..self.count {
                let factor = L::splat(factor(row));
                for from in (0..wide).step_by(LANES) {
                    let lanes = L::load(numbers.add(row * wide + from).0) * factor;
                    E::store_some(lanes, self.at.add(row * self.stride + from).0, self.width - from);
                }
            }
        }
    }

    /// `sum of a * b` of each row of two, by rows.
    ///
    /// # Safety
    /// As for `vector`, of both; rows and width are the same.
    #[inline(always)]
    pub(super) unsafe fn dot<L: Lanes>(&self, other: &Rows<E>, sums: &mut [f32]) {
        // SAFETY: the caller's.
        unsafe {
            for first in (0..self.count).step_by(LANES) {
                let mut rows = [L::zero(); LANES];
                for from in (0..padded(self.width)).step_by(LANES) {
                    let (a, b) = (self.vectors::<L>(first, from), other.vectors::<L>(first, from));
                    for (sum, (a, b)) in rows.iter_mut().zip(a.into_iter().zip(b)) {
                        *sum = a.mul_add(b, *sum);
                    }
                }
                let sums = &mut sums[first..];
                let count = sums.len().min(LANES);
                sums[..count].copy_from_slice(&folded(rows).to_array()[..count]);
            }
        }
    }
}

/// The sum of the lanes of each of [`LANES`] vectors.
#[inline(always)]
pub(in super::super) fn folded<L: Lanes>(rows: [L; LANES]) -> L {
    let mut columns = L::transposed(rows);
    let mut half = LANES / 2;
    while half > 0 {
        for j in 0..half {
            columns[j] = columns[j] + columns[j + half];
        }
        half /= 2;
    }
    columns[0]
}
