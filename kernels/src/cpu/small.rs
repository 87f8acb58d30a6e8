//! Products of small matrices that lie in the cache, as the blocks of attention are: read where they lie, by any
//! strides, so that nothing is copied first.
//!
//! An element is one sum over `k` in order, whatever the extents; so results do not depend on how work is cut.

use super::memory::Ptr;

/// Numbers in a vector.
pub(super) const LANES: usize = 16;
/// Rows of results that are held in registers together.
const TALL: usize = 6;

/// [`LANES`] numbers in registers.
trait Lanes: Copy {
    /// Vectors of a row that are held in registers together: with [`TALL`] rows as many as there are registers for.
    const WIDE: usize;
    /// Zeros.
    unsafe fn zero() -> Self;
    /// The same number in all.
    unsafe fn splat(x: f32) -> Self;
    /// The numbers at an address.
    unsafe fn load(from: *const f32) -> Self;
    /// Puts the numbers to an address.
    unsafe fn store(self, to: *mut f32);
    /// `self + a * b`.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;

    /// The first `n` numbers at an address, and zeros.
    #[inline(always)]
    unsafe fn load_part(from: *const f32, n: usize) -> Self {
        let mut numbers = [0.0f32; LANES];
        // SAFETY: the caller's: there are `n` numbers, at most as many as lanes.
        unsafe {
            std::ptr::copy_nonoverlapping(from, numbers.as_mut_ptr(), n);
            Self::load(numbers.as_ptr())
        }
    }
    /// Puts the first `n` numbers to an address.
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, n: usize) {
        let mut numbers = [0.0f32; LANES];
        // SAFETY: as above.
        unsafe {
            self.store(numbers.as_mut_ptr());
            std::ptr::copy_nonoverlapping(numbers.as_ptr(), to, n);
        }
    }
}

impl Lanes for [f32; LANES] {
    const WIDE: usize = 1;
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's, here and below.
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for j in 0..LANES {
            self[j] += a[j] * b[j];
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    impl Lanes for __m512 {
        const WIDE: usize = 4;
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller's, here and below: the machine has AVX-512, and addresses are good.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
    }

    impl Lanes for [__m256; 2] {
        const WIDE: usize = 1;
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller's, here and below: the machine has AVX2 and FMA, and addresses are good.
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, self[0]);
                _mm256_storeu_ps(to.add(8), self[1]);
            }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], self[0]), _mm256_fmadd_ps(a[1], b[1], self[1])] }
        }
    }
}

/// A product: `out (+)= a * b`, strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Rows `m` of the result, columns `n`, elements `k` of a sum.
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

impl Product {
    /// `M` rows and `N` vectors of columns from here on; with `PART` one vector of which `part` are columns.
    ///
    /// # Safety
    /// There are so many, and the machine has what `L` needs.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const M: usize, const N: usize, const PART: bool>(&self, m: usize, n: usize, part: usize) {
        let Product { size, out, add, a, b } = *self;
        // SAFETY: the caller's.
        unsafe {
            let load = |from: *const f32| if PART { L::load_part(from, part) } else { L::load(from) };
            let (a, mut row) = (a.0.add(m * a.1).0.cast_const(), b.0.add(n).0.cast_const());
            let out = out.0.add(m * out.1 + n).0;
            let mut sums = [[L::zero(); N]; M];
            if add {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum = load(out.add(i * self.out.1 + j * LANES));
                    }
                }
            }
            let mut column = a;
            for _ in 0..size.2 {
                let mut columns = [L::zero(); N];
                for (j, lanes) in columns.iter_mut().enumerate() {
                    *lanes = load(row.add(j * LANES));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = L::splat(*column.add(i * self.a.1));
                    for (sum, lanes) in sums.iter_mut().zip(columns) {
                        *sum = sum.add_product(x, lanes);
                    }
                }
                row = row.wrapping_add(b.1);
                column = column.wrapping_add(self.a.2);
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let to = out.add(i * self.out.1 + j * LANES);
                    if PART { sum.store_part(to, part) } else { sum.store(to) }
                }
            }
        }
    }

    /// All rows of some columns, as `tile`.
    ///
    /// # Safety
    /// As for `tile`.
    #[inline(always)]
    unsafe fn strip<L: Lanes, const N: usize, const PART: bool>(&self, n: usize, part: usize) {
        // SAFETY: the caller's.
        unsafe {
            for m in (0..self.size.0).step_by(TALL) {
                match self.size.0 - m {
                    1 => self.tile::<L, 1, N, PART>(m, n, part),
                    2 => self.tile::<L, 2, N, PART>(m, n, part),
                    3 => self.tile::<L, 3, N, PART>(m, n, part),
                    4 => self.tile::<L, 4, N, PART>(m, n, part),
                    5 => self.tile::<L, 5, N, PART>(m, n, part),
                    _ => self.tile::<L, TALL, N, PART>(m, n, part),
                }
            }
        }
    }

    /// The product with one kind of registers.
    ///
    /// # Safety
    /// As for `run`; the machine has what `L` needs.
    #[inline(always)]
    unsafe fn with<L: Lanes>(&self) {
        let columns = self.size.1;
        let mut n = 0;
        // SAFETY: the caller's.
        unsafe {
            while n < columns {
                let left = columns - n;
                if L::WIDE == 4 && left >= 4 * LANES {
                    self.strip::<L, 4, false>(n, LANES);
                    n += 4 * LANES;
                } else if left >= LANES {
                    self.strip::<L, 1, false>(n, LANES);
                    n += LANES;
                } else {
                    self.strip::<L, 1, true>(n, left);
                    n = columns;
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn with_avx512(&self) {
        // SAFETY: the caller's.
        unsafe { self.with::<std::arch::x86_64::__m512>() }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn with_avx2(&self) {
        // SAFETY: the caller's.
        unsafe { self.with::<[std::arch::x86_64::__m256; 2]>() }
    }

    /// Computes it with the widest registers of the machine.
    ///
    /// # Safety
    /// All elements that extents and strides reach lie in their buffers; the result overlaps no operand.
    pub(super) unsafe fn run(&self) {
        // SAFETY: the machine was asked.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f") {
                    return self.with_avx512();
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    return self.with_avx2();
                }
            }
            self.with::<[f32; LANES]>();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `x = 1, -2, 3, ...` in eighths: sums of a few products are exact.
    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + 3) % 31) as f32 / 8.0 - 2.0).collect()
    }

    #[test]
    fn every_kind_of_registers_gives_the_product() {
        for (m, n, k) in [(1, 1, 1), (6, 64, 3), (13, 83, 5), (64, 16, 64), (7, 15, 0), (5, 130, 9)] {
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
                for kind in 0..4 {
                    let mut out = numbers(m * wide);
                    let product = Product {
                        size: (m, n, k),
                        out: (Ptr(out.as_mut_ptr()), wide),
                        add,
                        a: (Ptr(a.as_mut_ptr()), 1, tall),
                        b: (Ptr(b.as_mut_ptr()), wide),
                    };
                    // SAFETY: the vectors are as large as the strides say, and the machine is asked.
                    unsafe {
                        match kind {
                            0 => product.run(),
                            1 => product.with::<[f32; LANES]>(),
                            #[cfg(target_arch = "x86_64")]
                            2 if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") => {
                                product.with_avx2();
                            }
                            #[cfg(target_arch = "x86_64")]
                            3 if is_x86_feature_detected!("avx512f") => product.with_avx512(),
                            _ => product.run(),
                        }
                    }
                    assert_eq!(out, expected, "{m} x {n} x {k}, kind {kind}");
                }
            }
        }
    }
}
