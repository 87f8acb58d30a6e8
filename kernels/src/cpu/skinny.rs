//! Products of a few rows with a large matrix, as every step of decoding has them: memory binds, so the matrix is read
//! once, as it lies, by all threads together. A product in blocks would copy it first, and so touch it three times.
//!
//! Rows of the matrix are summed some at a time, each in lanes that become one number only at its end; meanwhile the rows
//! behind them are fetched. The few rows are copied first, so that those of a tile are read in order too.
//!
//! Each result is a fixed number of partial sums over `k` in one order, whatever the number of rows, columns or threads;
//! so an answer does not depend on the others of its batch.

use dsgc_ir::DType;
use half::bf16;

use super::gemm::Element;
use super::kept::{self, Column, Format, Plain};
use super::memory::Ptr;
use super::parallel::Threads;

/// Most rows. With more of them arithmetic binds, and blocks are better at that.
pub(super) const ROWS: usize = 16;
/// Elements of the matrix below which a copy in blocks stays in the cache.
const LARGE: usize = 64 * 1024;

/// Longest sums; so the workspace of a product in blocks with a [`LARGE`] matrix has room for a copy of the rows.
const LONG: usize = 64 * 1024;

/// Whether a product of `m` rows with a matrix of `n` rows of `k` elements is one of these.
pub(super) fn fits(m: usize, n: usize, k: usize) -> bool {
    (1..=ROWS).contains(&m) && n * k >= LARGE && k <= LONG
}

/// Whether a product of `m` rows with weights that are kept in fewer bits is one of these, whatever their number: a copy in
/// blocks would have to widen them first.
pub(super) fn fits_kept(m: usize, k: usize) -> bool {
    m <= ROWS && k <= LONG
}

/// Bytes of workspace for rows of `k` elements, if these are products with weights that are kept in fewer bits.
pub(super) fn workspace(k: usize) -> usize {
    if k <= LONG { copied(ROWS, k) * size_of::<f32>() } else { 0 }
}

/// Partial sums of a result.
pub(super) const LANES: usize = 16;
/// Rows, and columns of the matrix, whose sums are held in registers together.
pub(super) const TILE: usize = 4;
/// A line of the cache.
pub(super) const LINE: usize = 64;

/// [`LANES`] partial sums in registers.
pub(super) trait Sums: Copy {
    /// Zeros.
    unsafe fn zero() -> Self;
    /// The sums of each, all in the same order.
    unsafe fn totals(four: [Self; TILE]) -> [f32; TILE];
}

/// Sums of products of elements of `T`.
pub(super) trait Products<T>: Sums {
    /// Elements that are multiplied at a time.
    const STEP: usize;
    /// So many of them, in registers.
    type Operand: Copy;
    /// The elements at an address.
    unsafe fn load(from: *const T) -> Self::Operand;
    /// `self + a * b`.
    unsafe fn add(self, a: Self::Operand, b: Self::Operand) -> Self;
}

impl Sums for [f32; LANES] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn totals(four: [Self; TILE]) -> [f32; TILE] {
        four.map(|mut lanes| {
            let mut half = LANES / 2;
            while half > 0 {
                for j in 0..half {
                    lanes[j] += lanes[j + half];
                }
                half /= 2;
            }
            lanes[0]
        })
    }
}

impl<T: Element> Products<T> for [f32; LANES] {
    const STEP: usize = LANES;
    type Operand = Self;
    #[inline(always)]
    unsafe fn load(from: *const T) -> Self {
        // SAFETY: the caller's.
        unsafe { from.cast::<[T; LANES]>().read_unaligned() }.map(T::wide)
    }
    #[inline(always)]
    unsafe fn add(mut self, a: Self, b: Self) -> Self {
        for j in 0..LANES {
            self[j] += a[j] * b[j];
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    //! Callers say that the machine has what the type needs: AVX-512F, for pairs AVX512_BF16 too, or AVX2 and FMA; and
    //! that addresses are good.

    use std::arch::x86_64::*;

    use half::bf16;

    use super::{LANES, Products, Sums, TILE};

    impl Sums for __m512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn totals([a, b, c, d]: [Self; TILE]) -> [f32; TILE] {
            unsafe {
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                let all = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
                // Each quarter holds a sum of every one.
                let half = _mm512_add_ps(all, _mm512_shuffle_f32x4::<0b01_00_11_10>(all, all));
                let whole = _mm512_add_ps(half, _mm512_shuffle_f32x4::<0b10_11_00_01>(half, half));
                std::mem::transmute(_mm512_castps512_ps128(whole))
            }
        }
    }

    impl Products<f32> for __m512 {
        const STEP: usize = LANES;
        type Operand = __m512;
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn add(self, a: __m512, b: __m512) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
    }

    impl Products<bf16> for __m512 {
        const STEP: usize = LANES;
        type Operand = __m512;
        #[inline(always)]
        unsafe fn load(from: *const bf16) -> __m512 {
            // Narrow numbers are the upper halves of wide ones.
            unsafe {
                let halves = _mm256_loadu_si256(from.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            }
        }
        #[inline(always)]
        unsafe fn add(self, a: __m512, b: __m512) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
    }

    /// Sums of pairs of bf16, with the rounding of `vdpbf16ps`.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Pairs(__m512);

    impl Sums for Pairs {
        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { Pairs(_mm512_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn totals(four: [Self; TILE]) -> [f32; TILE] {
            unsafe { Sums::totals(four.map(|x| x.0)) }
        }
    }

    impl Products<bf16> for Pairs {
        const STEP: usize = 2 * LANES;
        type Operand = __m512bh;
        #[inline(always)]
        unsafe fn load(from: *const bf16) -> __m512bh {
            unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
        }
        #[inline(always)]
        unsafe fn add(self, a: __m512bh, b: __m512bh) -> Self {
            unsafe { Pairs(_mm512_dpbf16_ps(self.0, a, b)) }
        }
    }

    impl Sums for [__m256; 2] {
        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        unsafe fn totals(four: [Self; TILE]) -> [f32; TILE] {
            unsafe {
                let [a, b, c, d] = four.map(|x| _mm256_add_ps(x[0], x[1]));
                let all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
                std::mem::transmute(_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all)))
            }
        }
    }

    impl Products<f32> for [__m256; 2] {
        const STEP: usize = LANES;
        type Operand = Self;
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(LANES / 2))] }
        }
        #[inline(always)]
        unsafe fn add(self, a: Self, b: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], self[0]), _mm256_fmadd_ps(a[1], b[1], self[1])] }
        }
    }

    impl Products<bf16> for [__m256; 2] {
        const STEP: usize = LANES;
        type Operand = Self;
        #[inline(always)]
        unsafe fn load(from: *const bf16) -> Self {
            unsafe {
                let wide = |halves| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)));
                [wide(_mm_loadu_si128(from.cast())), wide(_mm_loadu_si128(from.add(LANES / 2).cast()))]
            }
        }
        #[inline(always)]
        unsafe fn add(self, a: Self, b: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], self[0]), _mm256_fmadd_ps(a[1], b[1], self[1])] }
        }
    }
}

/// Asks for the line of an address, which may be nobody's.
#[inline(always)]
pub(super) fn fetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Elements of which a large matrix may be.
pub(super) trait Source: Element {
    /// What this machine has for it, the fastest first.
    fn kernels<O: Element>() -> Vec<Kernel<Self, O>>;
    /// The same for rows of it and a matrix that is kept in fewer bits.
    ///
    /// # Panics
    /// If there is no such product.
    fn kernels_of_kept<O: Element>(kept: DType) -> Vec<Kernel<Self, O>>;
}

/// What computes columns `from..to` of a product.
#[derive(Clone, Copy)]
pub(super) struct Kernel<T, O> {
    pub(super) part: unsafe fn(&Product<T, O>, usize, usize),
    /// Elements that it multiplies at a time.
    pub(super) step: usize,
    /// Whether it multiplies as many at the end of a row, where rows have zeros then.
    pub(super) padded: bool,
}

impl Source for f32 {
    fn kernels<O: Element>() -> Vec<Kernel<f32, O>> {
        let mut kernels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                kernels.push(Kernel { part: Product::part_avx512 as _, step: LANES, padded: false });
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                kernels.push(Kernel { part: Product::part_avx2 as _, step: LANES, padded: false });
            }
        }
        kernels.push(Kernel { part: Product::part::<[f32; LANES], Plain>, step: LANES, padded: false });
        kernels
    }

    fn kernels_of_kept<O: Element>(kept: DType) -> Vec<Kernel<f32, O>> {
        kept::kernels_of_f32(kept)
    }
}

impl Source for bf16 {
    fn kernels<O: Element>() -> Vec<Kernel<bf16, O>> {
        let mut kernels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
                kernels.push(Kernel { part: Product::part_pairs as _, step: 2 * LANES, padded: false });
            }
            if is_x86_feature_detected!("avx512f") {
                kernels.push(Kernel { part: Product::part_avx512 as _, step: LANES, padded: false });
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                kernels.push(Kernel { part: Product::part_avx2 as _, step: LANES, padded: false });
            }
        }
        kernels.push(Kernel { part: Product::part::<[f32; LANES], Plain>, step: LANES, padded: false });
        kernels
    }

    fn kernels_of_kept<O: Element>(kept: DType) -> Vec<Kernel<bf16, O>> {
        kept::kernels_of_bf16(kept)
    }
}

/// What all threads work on; strides in elements, of the matrix in bytes.
#[derive(Clone, Copy)]
pub(super) struct Product<T, O> {
    /// Rows `m`, columns `n`, elements `k` of a sum.
    size: (usize, usize, usize),
    /// [`TILE`] rows after [`TILE`] rows, of which the last may be fewer; of these for every [`LANES`] of `k` so many
    /// elements of each row.
    x: Ptr<T>,
    w: (Ptr<u8>, usize),
    format: Format,
    out: (Ptr<O>, usize),
}

/// Elements that the copy of `m` rows of `k` takes.
fn copied(m: usize, k: usize) -> usize {
    m * k.next_multiple_of(2 * LANES)
}

impl<T: Element, O: Element> Product<T, O> {
    /// Results of `M` rows and `N` columns from here on; all rows together fetch what lies behind the columns.
    ///
    /// # Safety
    /// There are so many, and the machine has what `P` needs.
    #[inline(always)]
    unsafe fn tile<P: Products<T>, C: Column<T, P>, const M: usize, const N: usize>(&self, m: usize, n: usize) {
        let k = self.size.2;
        let whole = if C::PADDED { k.next_multiple_of(P::STEP) } else { k / P::STEP * P::STEP };
        // SAFETY: rows and columns have `k` elements each, and a result for each pair.
        unsafe {
            let x = self.x.add(copied(m, k)).0.cast_const();
            let w = self.w.0.add(n * self.w.1).0.cast_const();
            let ahead = w.wrapping_add(N * self.w.1);
            let (tiles, tile) = (self.size.0.div_ceil(TILE), m / TILE);
            let share = tile * N / tiles..(tile + 1) * N / tiles;
            let mut sums = [[P::zero(); TILE]; M];
            let mut at = 0;
            while at < whole {
                let mut columns = [C::load(w, self.format, at); N];
                for (j, column) in columns.iter_mut().enumerate().skip(1) {
                    *column = C::load(w.add(j * self.w.1), self.format, at);
                }
                // As far ahead in all as the columns are read in parts. A line may be that of several.
                for j in share.clone().step_by((LINE / C::BYTES).max(1)) {
                    for line in (0..C::BYTES).step_by(LINE) {
                        fetch(ahead.wrapping_add((at / P::STEP * N + j) * C::BYTES + line));
                    }
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let row = P::load(x.add(at * M + i * P::STEP));
                    for (sum, &column) in sums.iter_mut().zip(&columns) {
                        *sum = sum.add(row, column);
                    }
                }
                at += P::STEP;
            }
            for (i, sums) in sums.iter().enumerate() {
                let totals = P::totals(*sums);
                for (j, &total) in totals.iter().enumerate().take(N) {
                    let product = |at: usize| {
                        let row = x.add(whole * M + i * P::STEP + at - whole);
                        (*row).wide() * C::one(w.add(j * self.w.1), at)
                    };
                    let sum = total + (whole..k).map(product).sum::<f32>();
                    *self.out.0.add((m + i) * self.out.1 + n + j).0 = O::nearest(sum);
                }
            }
        }
    }

    /// Copies the rows of `x`, `step` elements of each at a time, with zeros behind the last if they are padded.
    ///
    /// # Safety
    /// There are as many as the size says, and room for [`copied`] elements.
    unsafe fn copy_rows(&self, x: (Ptr<T>, usize), step: usize, padded: bool) {
        let (rows, _, k) = self.size;
        for m in 0..rows {
            let (first, together) = (m / TILE * TILE, (rows - m / TILE * TILE).min(TILE));
            for at in (0..k).step_by(step) {
                let len = step.min(k - at);
                // SAFETY: the caller's.
                unsafe {
                    let to = self.x.add(copied(first, k) + at * together + (m - first) * step);
                    to.slice_mut(0, len).copy_from_slice(x.0.add(m * x.1 + at).slice(0, len));
                    if padded {
                        to.slice_mut(len, step - len).fill(T::nearest(0.0));
                    }
                }
            }
        }
    }

    /// Results of the columns `from..to`.
    ///
    /// # Safety
    /// As for `tile`.
    #[inline(always)]
    pub(super) unsafe fn part<P: Products<T>, C: Column<T, P>>(&self, from: usize, to: usize) {
        let rows = self.size.0;
        // SAFETY: all tiles lie in the result.
        unsafe {
            let mut n = from;
            while n < to {
                let four = n + TILE <= to;
                let mut m = 0;
                while m < rows {
                    match ((rows - m).min(TILE), four) {
                        (4, true) => self.tile::<P, C, 4, TILE>(m, n),
                        (3, true) => self.tile::<P, C, 3, TILE>(m, n),
                        (2, true) => self.tile::<P, C, 2, TILE>(m, n),
                        (_, true) => self.tile::<P, C, 1, TILE>(m, n),
                        (4, false) => self.tile::<P, C, 4, 1>(m, n),
                        (3, false) => self.tile::<P, C, 3, 1>(m, n),
                        (2, false) => self.tile::<P, C, 2, 1>(m, n),
                        (_, false) => self.tile::<P, C, 1, 1>(m, n),
                    }
                    m += TILE;
                }
                n += if four { TILE } else { 1 };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl<T: Element, O: Element> Product<T, O> {
    #[target_feature(enable = "avx512f")]
    unsafe fn part_avx512(&self, from: usize, to: usize)
    where
        std::arch::x86_64::__m512: Products<T>,
    {
        // SAFETY: the caller's.
        unsafe { self.part::<std::arch::x86_64::__m512, Plain>(from, to) }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn part_avx2(&self, from: usize, to: usize)
    where
        [std::arch::x86_64::__m256; 2]: Products<T>,
    {
        // SAFETY: the caller's.
        unsafe { self.part::<[std::arch::x86_64::__m256; 2], Plain>(from, to) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn part_pairs(&self, from: usize, to: usize)
    where
        x86::Pairs: Products<T>,
    {
        // SAFETY: the caller's.
        unsafe { self.part::<x86::Pairs, Plain>(from, to) }
    }
}

/// A matrix of `n` rows, and where its product goes; beside each stands its stride in elements. Elements of a matrix that
/// is kept in fewer bits are bytes.
#[derive(Clone, Copy)]
pub(super) struct Part<W, O> {
    pub(super) n: usize,
    pub(super) w: (Ptr<W>, usize),
    pub(super) out: (Ptr<O>, usize),
}

/// `out[m, n] = sum over k of x[m, k] * w[n, k]` for up to [`ROWS`] rows and one matrix or several, whose columns are
/// shared out to the threads together. Elements of a row lie one behind the other in all of them.
///
/// # Safety
/// `x` has `m` rows and every matrix `n`, of `k` elements each, and its result `m` rows of `n`; results are apart. `k` is
/// at most [`LONG`], and the workspace that of a product in blocks with one of them.
pub(super) unsafe fn run<T: Source, O: Element>(
    threads: &Threads,
    size: (usize, usize),
    x: (Ptr<T>, usize),
    parts: &[Part<T, O>],
    scratch: Ptr<u8>,
) {
    // SAFETY: the caller's.
    unsafe { run_on((T::kernels()[0], Format::default()), threads, size, x, parts, scratch) }
}

/// [`run`] with matrices that are all kept as elements of one type.
///
/// # Safety
/// As for [`run`]; the workspace has [`workspace`] bytes.
pub(super) unsafe fn run_kept<T: Source, O: Element>(
    kept: DType,
    threads: &Threads,
    size: (usize, usize),
    x: (Ptr<T>, usize),
    parts: &[Part<u8, O>],
    scratch: Ptr<u8>,
) {
    let kernel = (T::kernels_of_kept(kept)[0], kept::rows(kept, size.1).0);
    // SAFETY: the caller's.
    unsafe { run_on(kernel, threads, size, x, parts, scratch) }
}

/// # Safety
/// As for [`run`] or [`run_kept`], and the machine has what the kernel needs, which is one for matrices of this format.
pub(super) unsafe fn run_on<T: Source, W, O: Element>(
    (kernel, format): (Kernel<T, O>, Format),
    threads: &Threads,
    (m, k): (usize, usize),
    x: (Ptr<T>, usize),
    parts: &[Part<W, O>],
    scratch: Ptr<u8>,
) {
    let product = |part: &Part<W, O>| Product {
        size: (m, part.n, k),
        x: Ptr(scratch.0.cast()),
        w: (Ptr(part.w.0.0.cast()), part.w.1 * size_of::<W>()),
        format,
        out: part.out,
    };
    let products: Vec<Product<T, O>> = parts.iter().map(product).collect();
    let Some(first) = products.first() else { return };
    // SAFETY: the caller's.
    unsafe { first.copy_rows(x, kernel.step, kernel.padded) };
    // In whole tiles, so that which columns are summed together does not depend on the number of threads.
    let tiles = |product: &Product<T, O>| product.size.1.div_ceil(TILE);
    threads.run(products.iter().map(tiles).sum(), TILE * k, |all| {
        let mut first = 0;
        for product in &products {
            let (from, to) = (all.start.max(first) - first, all.end.min(first + tiles(product)).saturating_sub(first));
            if from < to {
                // SAFETY: the caller's; threads write different columns.
                unsafe { (kernel.part)(product, from * TILE, (to * TILE).min(product.size.1)) };
            }
            first += tiles(product);
        }
    });
}

#[cfg(test)]
mod tests {
    use dsgc_ir::fuzz::Rng;

    use super::*;

    fn random<T: Element>(len: usize, seed: u64) -> Vec<T> {
        let mut rng = Rng::new(seed);
        (0..len).map(|_| T::nearest((rng.between(-4096, 4096) as f32) / 1024.0)).collect()
    }

    /// Every kernel against f64, with rows that lie apart; the first rows alone have the same bits.
    fn check<T: Source, O: Element>(step: f64) {
        for kernel in T::kernels::<O>() {
            for (m, n, k) in [(1, 4, 32), (2, 5, 33), (3, 3, 31), (4, 9, 64), (5, 8, 100), (7, 1, 1), (16, 37, 301)] {
                let (x_row, w_row, out_row) = (k + 3, k + 5, n + 2);
                let (mut x, mut w) = (random::<T>(m * x_row, 1), random::<T>(n * w_row, 2));
                let mut run = |m: usize, threads: usize| {
                    let mut out = vec![O::nearest(7.0); m * out_row];
                    let mut scratch = vec![0xFFu8; copied(m, k) * size_of::<T>() + 64];
                    let at = scratch.as_mut_ptr();
                    let at = Ptr(at.wrapping_add(at.align_offset(64)));
                    let (x, w) = ((Ptr(x.as_mut_ptr()), x_row), (Ptr(w.as_mut_ptr()), w_row));
                    let to = (Ptr(out.as_mut_ptr()), out_row);
                    // SAFETY: all have their rows, and the kernel is one of the machine's.
                    unsafe {
                        let (kernel, part) = ((kernel, Format::default()), Part { n, w, out: to });
                        run_on(kernel, &Threads::new(threads), (m, k), x, &[part], at);
                    }
                    out.iter().map(|x| x.wide()).collect::<Vec<f32>>()
                };
                let out = run(m, 1);
                assert_eq!(out, run(m, 2));
                assert_eq!(out, run(m, 3));
                assert_eq!(out[..n], run(1, 1)[..n], "a row alone, {m} {n} {k}");
                for i in 0..m {
                    for j in 0..out_row {
                        let found = f64::from(out[i * out_row + j]);
                        if j >= n {
                            assert_eq!(found, 7.0, "writes between rows, {m} {n} {k}");
                            continue;
                        }
                        let (x, w) = (&x[i * x_row..i * x_row + k], &w[j * w_row..j * w_row + k]);
                        let terms = x.iter().zip(w).map(|(x, w)| f64::from(x.wide()) * f64::from(w.wide()));
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, z), x| (s + x, z + x.abs()));
                        let bound = (k + 2) as f64 * 2f64.powi(-24) * size + step * sum.abs();
                        assert!((found - sum).abs() <= bound, "{m} {n} {k} at {i}, {j}: {found} for {sum}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_of_f32_are_near_those_of_f64() {
        check::<f32, f32>(0.0);
    }

    #[test]
    fn few_rows_of_bf16_are_near_those_of_f64() {
        check::<bf16, f32>(0.0);
        check::<bf16, bf16>(2f64.powi(-8));
    }
}
