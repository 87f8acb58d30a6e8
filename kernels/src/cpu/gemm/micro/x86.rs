//! AVX-512, with and without bf16, and AVX2.

use std::arch::x86_64::*;

use super::{AHEAD, LINE};

/// With two registers per row, 28 of the 32 hold sums: more than the FMA units have under way.
pub(super) const ROWS: usize = 14;
pub(super) const COLUMNS: usize = 32;

/// With two registers per row, 12 of the 16 hold sums.
pub(super) const AVX2_ROWS: usize = 6;
pub(super) const AVX2_COLUMNS: usize = 16;

/// A tile of f32; see [`super::Tile`].
///
/// # Safety
/// The machine has AVX-512F; the panels have so many units, and the result so many rows and columns.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512(
    units: usize,
    [left, right, ahead]: [*const u32; 3],
    out: *mut f32,
    stride: usize,
    size: (usize, usize),
    add: bool,
) {
    fetch(out, stride);
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for unit in 0..units {
        if unit % AHEAD == 0 {
            fetch_later(ahead.wrapping_add(unit / AHEAD * LINE));
        }
        // SAFETY: the caller's.
        unsafe {
            let (left, right) = (left.add(unit * ROWS).cast::<f32>(), right.add(unit * COLUMNS).cast::<f32>());
            let right = [_mm512_loadu_ps(right), _mm512_loadu_ps(right.add(16))];
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = _mm512_set1_ps(*left.add(i));
                sums[0] = _mm512_fmadd_ps(left, right[0], sums[0]);
                sums[1] = _mm512_fmadd_ps(left, right[1], sums[1]);
            }
        }
    }
    // SAFETY: the caller's.
    unsafe { store(sums, out, stride, size, add) }
}

/// A tile of pairs of bf16; see [`super::Tile`].
///
/// # Safety
/// The machine has AVX-512F and AVX512_BF16; the panels have so many units, and the result so many rows and columns.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn avx512_bf16(
    units: usize,
    [left, right, ahead]: [*const u32; 3],
    out: *mut f32,
    stride: usize,
    size: (usize, usize),
    add: bool,
) {
    fetch(out, stride);
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for unit in 0..units {
        if unit % AHEAD == 0 {
            fetch_later(ahead.wrapping_add(unit / AHEAD * LINE));
        }
        // SAFETY: the caller's.
        unsafe {
            let (left, right) = (left.add(unit * ROWS), right.add(unit * COLUMNS));
            let right = [pairs(_mm512_loadu_si512(right.cast())), pairs(_mm512_loadu_si512(right.add(16).cast()))];
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = pairs(_mm512_set1_epi32(*left.add(i) as i32));
                sums[0] = _mm512_dpbf16_ps(sums[0], left, right[0]);
                sums[1] = _mm512_dpbf16_ps(sums[1], left, right[1]);
            }
        }
    }
    // SAFETY: the caller's.
    unsafe { store(sums, out, stride, size, add) }
}

/// Asks for the lines of a tile of the result, some of which may not be its.
#[inline(always)]
fn fetch(out: *const f32, stride: usize) {
    for i in 0..ROWS {
        // SAFETY: a prefetch reads nothing.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(i * stride).cast());
            _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(i * stride + 16).cast());
        }
    }
}

/// Asks for a line in the second-level cache.
#[inline(always)]
fn fetch_later(at: *const u32) {
    // SAFETY: a prefetch reads nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
}

/// # Safety
/// The machine has AVX-512F, and the result so many rows and columns.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(sums: [[__m512; 2]; ROWS], out: *mut f32, stride: usize, size: (usize, usize), add: bool) {
    if size != (ROWS, COLUMNS) {
        // SAFETY: the caller's.
        return unsafe { store_some(sums, out, stride, size, add) };
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let to = out.add(i * stride + j * 16);
                _mm512_storeu_ps(to, if add { _mm512_add_ps(_mm512_loadu_ps(to), sum) } else { sum });
            }
        }
    }
}

/// [`store`] of a tile at an edge. Apart, so that sums stay in registers elsewhere.
///
/// # Safety
/// As there.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f")]
unsafe fn store_some(
    sums: [[__m512; 2]; ROWS],
    out: *mut f32,
    stride: usize,
    (rows, columns): (usize, usize),
    add: bool,
) {
    let mask = |from: usize| ((1u32 << columns.saturating_sub(from).min(16)) - 1) as __mmask16;
    for (i, sums) in sums.iter().enumerate().take(rows) {
        for (&sum, j) in sums.iter().zip([0, 16]) {
            // SAFETY: the caller's; columns that are not the result's are neither read nor written.
            unsafe {
                let to = out.wrapping_add(i * stride + j);
                let old = if add { _mm512_maskz_loadu_ps(mask(j), to) } else { _mm512_setzero_ps() };
                _mm512_mask_storeu_ps(to, mask(j), _mm512_add_ps(old, sum));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which all values are good.
    unsafe { std::mem::transmute(bits) }
}

/// A tile of f32; see [`super::Tile`].
///
/// # Safety
/// The machine has AVX2 and FMA; the panels have so many units, and the result so many rows and columns.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(
    units: usize,
    [left, right, _]: [*const u32; 3],
    out: *mut f32,
    stride: usize,
    (rows, columns): (usize, usize),
    add: bool,
) {
    let mut sums = [[_mm256_setzero_ps(); 2]; AVX2_ROWS];
    for unit in 0..units {
        // SAFETY: the caller's.
        unsafe {
            let left = left.add(unit * AVX2_ROWS).cast::<f32>();
            let right = right.add(unit * AVX2_COLUMNS).cast::<f32>();
            let right = [_mm256_loadu_ps(right), _mm256_loadu_ps(right.add(8))];
            for (i, sums) in sums.iter_mut().enumerate() {
                let left = _mm256_set1_ps(*left.add(i));
                sums[0] = _mm256_fmadd_ps(left, right[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(left, right[1], sums[1]);
            }
        }
    }
    let mut numbers = [[0.0f32; AVX2_COLUMNS]; AVX2_ROWS];
    for (numbers, sums) in numbers.iter_mut().zip(sums) {
        // SAFETY: a row of numbers is two registers.
        unsafe {
            _mm256_storeu_ps(numbers.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(numbers.as_mut_ptr().add(8), sums[1]);
        }
    }
    for (i, numbers) in numbers.iter().enumerate().take(rows) {
        for (j, number) in numbers.iter().enumerate().take(columns) {
            // SAFETY: the caller's.
            unsafe {
                let to = out.add(i * stride + j);
                *to = if add { *to + number } else { *number };
            }
        }
    }
}
