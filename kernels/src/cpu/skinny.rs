//! Products of a few rows with a large matrix, as every step of decoding has them: memory binds, so the matrix is read
//! once, as it lies, by all threads together. A GEMM library would copy it into blocks first, and so touch it three times.
//!
//! Narrow operands are widened on their way into registers. Each result is [`LANES`] partial sums over `k` in one order, whatever the number of rows, columns or threads; so an
//! answer does not depend on the others of its batch.

use half::bf16;

use super::gemm::Element;
use super::memory::Ptr;
use super::parallel::Threads;

/// Most rows. With more of them arithmetic binds, and a GEMM library is better at that.
pub(super) const ROWS: usize = 16;
/// Elements of the matrix below which a GEMM library's copy stays in the cache.
pub(super) const LARGE: usize = 64 * 1024;

/// Partial sums of a result.
const LANES: usize = 16;
/// Rows, and columns of the matrix, whose sums are held in registers together.
const TILE: usize = 4;

/// [`LANES`] numbers in registers.
pub(super) trait Lanes: Copy {
    /// Zeros.
    unsafe fn zero() -> Self;
    /// The numbers at an address.
    unsafe fn load(from: *const f32) -> Self;
    /// The numbers of narrow ones at an address.
    unsafe fn widen(from: *const bf16) -> Self;
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
    unsafe fn widen(from: *const bf16) -> Self {
        // SAFETY: the caller's.
        unsafe { from.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32)
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

    use half::bf16;

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
        unsafe fn widen(from: *const bf16) -> Self {
            // Narrow numbers are the upper halves of wide ones.
            unsafe {
                let halves = _mm256_loadu_si256(from.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            }
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
        unsafe fn widen(from: *const bf16) -> Self {
            unsafe {
                [from, from.add(8)].map(|from| {
                    let halves = _mm_loadu_si128(from.cast());
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
                })
            }
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

/// Elements that are loaded into lanes of f32.
pub(super) trait Source: Element {
    /// [`LANES`] of them at an address.
    ///
    /// # Safety
    /// They are there, and the machine has what `L` needs.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

impl Source for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L {
        // SAFETY: the caller's.
        unsafe { L::load(from) }
    }
}

impl Source for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const bf16) -> L {
        // SAFETY: the caller's.
        unsafe { L::widen(from) }
    }
}

/// What all threads work on; strides in elements.
#[derive(Clone, Copy)]
struct Product<T, O> {
    /// Rows `m`, columns `n`, elements `k` of a sum.
    size: (usize, usize, usize),
    x: (Ptr<T>, usize),
    w: (Ptr<T>, usize),
    out: (Ptr<O>, usize),
}

impl<T: Source, O: Element> Product<T, O> {
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
                    *column = T::load::<L>(w.add(j * self.w.1 + at));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let row = T::load::<L>(x.add(i * self.x.1 + at));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = sum.add_product(row, column);
                    }
                }
                at += LANES;
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let rest =
                        (whole..k).map(|at| (*x.add(i * self.x.1 + at)).wide() * (*w.add(j * self.w.1 + at)).wide());
                    let sum = folded(sum.numbers()) + rest.sum::<f32>();
                    *self.out.0.add((m + i) * self.out.1 + n + j).0 = O::nearest(sum);
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
pub(super) unsafe fn run<T: Source, O: Element>(
    threads: &Threads,
    size: (usize, usize, usize),
    x: (Ptr<T>, usize),
    w: (Ptr<T>, usize),
    out: (Ptr<O>, usize),
) {
    let product = Product { size, x, w, out };
    let (_, n, k) = size;
    // In whole tiles, so that which columns are summed together does not depend on the number of threads.
    threads.run(n.div_ceil(TILE), TILE * k, |tiles| {
        let product = &product;
        // SAFETY: the caller's; threads write different columns.
        unsafe { product.best_part(tiles.start * TILE, (tiles.end * TILE).min(n)) };
    });
}
