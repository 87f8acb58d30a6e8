//! Products of a few rows with a large matrix, as every step of decoding has them: memory binds, so the matrix is read
//! once, as it lies, by all threads together. A GEMM library would copy it into blocks first, and so touch it three times.
//!
//! Each result is [`LANES`] partial sums over `k` in one order, whatever the number of rows, columns or threads; so an
//! answer does not depend on the others of its batch.

use super::memory::Ptr;
use super::parallel::Threads;

/// Most rows. With more of them arithmetic binds, and a GEMM library is better at that.
const ROWS: usize = 16;
/// Elements of the matrix below which a GEMM library's copy stays in the cache.
const LARGE: usize = 64 * 1024;

/// Whether a product of `m` rows with a matrix of `n` rows of `k` elements is one of these.
pub(super) fn fits(m: usize, n: usize, k: usize) -> bool {
    (1..=ROWS).contains(&m) && n * k >= LARGE
}

/// Partial sums of a result.
const LANES: usize = 16;
/// Rows, and columns of the matrix, whose sums are held in registers together.
const TILE: usize = 4;

/// [`LANES`] numbers in registers.
trait Lanes: Copy {
    /// Zeros.
    unsafe fn zero() -> Self;
    /// The numbers at an address.
    unsafe fn load(from: *const f32) -> Self;
    /// `self + a * b`.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// The numbers one by one.
    unsafe fn numbers(self) -> [f32; LANES];
}

impl Lanes for [f32; LANES] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for j in 0..LANES {
            self[j] += a[j] * b[j];
        }
        self
    }
    #[inline(always)]
    unsafe fn numbers(self) -> [f32; LANES] {
        self
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    impl Lanes for __m512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller's, here and below: the machine has AVX-512, and addresses are good.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn numbers(self) -> [f32; LANES] {
            let mut numbers = [0.0; LANES];
            unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), self) };
            numbers
        }
    }

    impl Lanes for [__m256; 2] {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller's, here and below: the machine has AVX2 and FMA, and addresses are good.
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], self[0]), _mm256_fmadd_ps(a[1], b[1], self[1])] }
        }
        #[inline(always)]
        unsafe fn numbers(self) -> [f32; LANES] {
            let mut numbers = [0.0; LANES];
            unsafe {
                _mm256_storeu_ps(numbers.as_mut_ptr(), self[0]);
                _mm256_storeu_ps(numbers.as_mut_ptr().add(8), self[1]);
            }
            numbers
        }
    }
}

/// What all threads work on; strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Rows `m`, columns `n`, elements `k` of a sum.
    pub(super) size: (usize, usize, usize),
    /// The rows, and the elements from one to the next; so below.
    pub(super) x: (Ptr<f32>, usize),
    /// The matrix.
    pub(super) w: (Ptr<f32>, usize),
    /// The result.
    pub(super) out: (Ptr<f32>, usize),
}

impl Product {
    /// Results of `M` rows and `N` columns from here on.
    ///
    /// # Safety
    /// There are so many, and the machine has what `L` needs.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const M: usize, const N: usize>(&self, m: usize, n: usize) {
        let k = self.size.2;
        let whole = k / LANES * LANES;
        // SAFETY: rows and columns have `k` elements each, and a result for each pair.
        unsafe {
            let x = self.x.0.add(m * self.x.1).0.cast_const();
            let w = self.w.0.add(n * self.w.1).0.cast_const();
            let mut sums = [[L::zero(); N]; M];
            let mut at = 0;
            while at < whole {
                let mut columns = [L::zero(); N];
                for (j, column) in columns.iter_mut().enumerate() {
                    *column = L::load(w.add(j * self.w.1 + at));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let row = L::load(x.add(i * self.x.1 + at));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = sum.add_product(row, column);
                    }
                }
                at += LANES;
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let rest = (whole..k).map(|at| *x.add(i * self.x.1 + at) * *w.add(j * self.w.1 + at)).sum::<f32>();
                    *self.out.0.add((m + i) * self.out.1 + n + j).0 = folded(sum.numbers()) + rest;
                }
            }
        }
    }

    /// Results of the columns `from..to`.
    ///
    /// # Safety
    /// As for `tile`.
    #[inline(always)]
    unsafe fn part<L: Lanes>(&self, from: usize, to: usize) {
        let rows = self.size.0;
        // SAFETY: all tiles lie in the result.
        unsafe {
            let mut n = from;
            while n < to {
                let four = n + TILE <= to;
                let mut m = 0;
                while m < rows {
                    match ((rows - m).min(TILE), four) {
                        (4, true) => self.tile::<L, 4, TILE>(m, n),
                        (3, true) => self.tile::<L, 3, TILE>(m, n),
                        (2, true) => self.tile::<L, 2, TILE>(m, n),
                        (_, true) => self.tile::<L, 1, TILE>(m, n),
                        (4, false) => self.tile::<L, 4, 1>(m, n),
                        (3, false) => self.tile::<L, 3, 1>(m, n),
                        (2, false) => self.tile::<L, 2, 1>(m, n),
                        (_, false) => self.tile::<L, 1, 1>(m, n),
                    }
                    m += TILE;
                }
                n += if four { TILE } else { 1 };
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn part_avx512(&self, from: usize, to: usize) {
        // SAFETY: the caller's.
        unsafe { self.part::<std::arch::x86_64::__m512>(from, to) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn part_avx2(&self, from: usize, to: usize) {
        // SAFETY: the caller's.
        unsafe { self.part::<[std::arch::x86_64::__m256; 2]>(from, to) }
    }

    /// `part` with the widest registers of the machine.
    ///
    /// # Safety
    /// The columns are those of the matrix.
    unsafe fn best_part(&self, from: usize, to: usize) {
        // SAFETY: the machine was asked.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f") {
                    return self.part_avx512(from, to);
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    return self.part_avx2(from, to);
                }
            }
            self.part::<[f32; LANES]>(from, to);
        }
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

/// `out[m, n] = sum over k of x[m, k] * w[n, k]` for up to [`ROWS`] rows, whose elements lie one behind the other in all
/// three; beside each stands its stride in elements.
///
/// # Safety
/// `x` has `m` rows and `w` `n`, of `k` elements each, and the result `m` rows of `n`.
pub(super) unsafe fn run(
    threads: &Threads,
    size: (usize, usize, usize),
    x: (Ptr<f32>, usize),
    w: (Ptr<f32>, usize),
    out: (Ptr<f32>, usize),
) {
    // SAFETY: the caller's.
    unsafe { run_all(threads, &[Product { size, x, w, out }]) };
}

/// Several such products, whose columns are shared out to the threads together.
///
/// # Safety
/// As for [`run`], for each of them; their results are apart.
pub(super) unsafe fn run_all(threads: &Threads, products: &[Product]) {
    // In whole tiles, so that which columns are summed together does not depend on the number of threads.
    let tiles = |product: &Product| product.size.1.div_ceil(TILE);
    let weight = products.iter().map(|p| TILE * p.size.2).max().unwrap_or(0);
    threads.run(products.iter().map(tiles).sum(), weight, |all| {
        let mut first = 0;
        for product in products {
            let (from, to) = (all.start.max(first) - first, all.end.min(first + tiles(product)).saturating_sub(first));
            if from < to {
                // SAFETY: the caller's; threads write different columns.
                unsafe { product.best_part(from * TILE, (to * TILE).min(product.size.1)) };
            }
            first += tiles(product);
        }
    });
}
