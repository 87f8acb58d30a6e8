//! Products of small matrices that lie in the cache, as the blocks of attention are: read where they lie, by any
//! strides, so that nothing is copied first.
//!
//! An element is one sum over `k` in order, whatever the extents; so results do not depend on how work is cut.

use super::lanes::{Kernel, LANES, Lanes};
use super::memory::Ptr;

/// Most rows of a tile.
const TALLEST: usize = 16;
/// Rows of a tile that are found from one pointer.
const APART: usize = 4;

/// A product: `out (+)= a * b`, strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Rows `m` of the result, columns `n` in whole vectors, elements `k` of a sum.
    pub size: (usize, usize, usize),
    /// First element; from row to row. Columns lie one after the other.
    pub out: (Ptr<f32>, usize),
    /// Whether to add to what is there.
    pub add: bool,
    /// `[m, k]`: first element; from row to row; from column to column.
    pub a: (Ptr<f32>, usize, usize),
    /// `[k, n]`: first element; from row to row. Columns lie one after the other.
    pub b: (Ptr<f32>, usize),
}

/// Computes it. All elements that extents and strides reach must lie in their buffers; the result overlaps no operand.
impl Kernel for Product {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let columns = self.size.1;
        debug_assert!(columns.is_multiple_of(LANES), "columns are whole vectors");
        let mut n = 0;
        // SAFETY: the caller's. With fewer columns more rows are in the registers, so that enough sums are under way.
        unsafe {
            while n < columns {
                let wide = ((columns - n) / LANES).min(L::WIDE);
                match wide {
                    4 => self.strip::<L, 4, 6>(n),
                    3 => self.strip::<L, 3, 8>(n),
                    2 => self.strip::<L, 2, 12>(n),
                    _ if L::WIDE == 1 => self.strip::<L, 1, 6>(n),
                    _ => self.strip::<L, 1, TALLEST>(n),
                }
                n += wide * LANES;
            }
        }
    }
}

impl Product {
    /// `M` rows and `N` vectors of columns from here on.
    ///
    /// # Safety
    /// There are so many, and the machine has what `L` needs.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const M: usize, const N: usize>(&self, m: usize, n: usize) {
        let Product { size, out, add, a, b } = *self;
        // SAFETY: the caller's.
        unsafe {
            let mut row = b.0.add(n).0.cast_const();
            // A pointer for every few rows, so that no address waits for that of all rows before.
            let mut columns: [*const f32; TALLEST / APART] =
                std::array::from_fn(|i| a.0.0.wrapping_add((m + i * APART) * a.1).cast_const());
            let out = out.0.add(m * out.1 + n).0;
            let mut sums = [[L::zero(); N]; M];
            if add {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum = L::load(out.add(i * self.out.1 + j * LANES));
                    }
                }
            }
            for _ in 0..size.2 {
                let mut right = [L::zero(); N];
                for (j, lanes) in right.iter_mut().enumerate() {
                    *lanes = L::load(row.add(j * LANES));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = L::splat(*columns[i / APART].add(i % APART * a.1));
                    for (sum, lanes) in sums.iter_mut().zip(right) {
                        *sum = x.mul_add(lanes, *sum);
                    }
                }
                row = row.wrapping_add(b.1);
                for column in &mut columns[..M.div_ceil(APART)] {
                    *column = column.wrapping_add(a.2);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    sum.store(out.add(i * self.out.1 + j * LANES));
                }
            }
        }
    }

    /// All rows of some columns, `M` at a time.
    ///
    /// # Safety
    /// As for `tile`.
    #[inline(always)]
    unsafe fn strip<L: Lanes, const N: usize, const M: usize>(&self, n: usize) {
        let (rows, mut m) = (self.size.0, 0);
        // SAFETY: the caller's.
        unsafe {
            while m + M <= rows {
                self.tile::<L, M, N>(m, n);
                m += M;
            }
            while m + 4 <= rows {
                self.tile::<L, 4, N>(m, n);
                m += 4;
            }
            while m < rows {
                self.tile::<L, 1, N>(m, n);
                m += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Kind;
    use super::*;

    /// `x = 1, -2, 3, ...` in eighths: sums of a few products are exact.
    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + 3) % 31) as f32 / 8.0 - 2.0).collect()
    }

    #[test]
    fn every_kind_of_registers_gives_the_product() {
        for (m, n, k) in [(1, 16, 1), (6, 64, 3), (13, 112, 5), (64, 16, 64), (7, 48, 0), (5, 128, 9), (35, 32, 7)] {
            let (wide, tall) = (n + 3, m + 2);
            // The left operand lies by columns.
            let (mut a, mut b) = (numbers(tall * k + 1), numbers(wide * k + 1));
            for add in [false, true] {
                let mut expected = numbers(m * wide);
                for i in 0..m {
                    for j in 0..n {
                        let sum: f32 = (0..k).map(|x| a[x * tall + i] * b[x * wide + j]).sum();
                        expected[i * wide + j] = sum + if add { expected[i * wide + j] } else { 0.0 };
                    }
                }
                for kind in Kind::all() {
                    let mut out = numbers(m * wide);
                    let product = Product {
                        size: (m, n, k),
                        out: (Ptr(out.as_mut_ptr()), wide),
                        add,
                        a: (Ptr(a.as_mut_ptr()), 1, tall),
                        b: (Ptr(b.as_mut_ptr()), wide),
                    };
                    // SAFETY: the vectors are as large as the strides say.
                    unsafe { kind.run(product) };
                    assert_eq!(out, expected, "{m} x {n} x {k}, {kind:?}");
                }
            }
        }
    }
}
