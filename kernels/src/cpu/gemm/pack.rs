//! Panels: lanes of an operand side by side, unit by unit along `k`.

use half::bf16;

use super::Element;

/// A part of an operand that becomes a panel.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Panel<T> {
    /// Its first element.
    pub(super) at: *const T,
    /// Elements from one lane to the next.
    pub(super) lane: usize,
    /// Elements from one `k` to the next.
    pub(super) next: usize,
    /// Lanes that there are; the others of the panel become zeros.
    pub(super) lanes: usize,
    /// Elements along `k`.
    pub(super) k: usize,
}

/// How elements become units.
pub(super) trait Unit<T> {
    /// Elements along `k` in a unit.
    const DEPTH: usize;
    /// The unit of these elements, of which the last may be missing.
    fn of(first: T, second: Option<T>) -> u32;
    /// Units of elements one behind the other.
    ///
    /// # Safety
    /// There are so many elements.
    unsafe fn block(at: *const T) -> [u32; BLOCK];
}

/// Units and lanes that change places in registers.
const BLOCK: usize = 8;

/// One number as f32.
pub(super) struct Wide;

impl<T: Element> Unit<T> for Wide {
    const DEPTH: usize = 1;
    #[inline(always)]
    fn of(first: T, _: Option<T>) -> u32 {
        first.wide().to_bits()
    }
    #[inline(always)]
    unsafe fn block(at: *const T) -> [u32; BLOCK] {
        // SAFETY: the caller's.
        unsafe { at.cast::<[T; BLOCK]>().read_unaligned() }.map(|x| x.wide().to_bits())
    }
}

/// Two bf16, the first in the lower half.
pub(super) struct Pair;

impl Unit<bf16> for Pair {
    const DEPTH: usize = 2;
    #[inline(always)]
    fn of(first: bf16, second: Option<bf16>) -> u32 {
        u32::from(first.to_bits()) | u32::from(second.map_or(0, bf16::to_bits)) << 16
    }
    #[inline(always)]
    unsafe fn block(at: *const bf16) -> [u32; BLOCK] {
        // SAFETY: the caller's.
        unsafe { at.cast::<[u32; BLOCK]>().read_unaligned() }.map(u32::from_le)
    }
}

/// Packs a panel of `W` lanes.
///
/// # Safety
/// The elements exist, and there is room for `W` units per unit of `k`.
pub(super) unsafe fn panel<T: Element, U: Unit<T>, const W: usize>(panel: Panel<T>, to: *mut u32) {
    // SAFETY: the caller's; the machine was asked.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            return x86::panel::<T, U, W>(panel, to);
        }
        units::<T, U, W>(panel, 0, to);
    }
}

/// Packs the units from `first` on, one by one.
///
/// # Safety
/// As for [`panel`].
#[inline(always)]
unsafe fn units<T: Element, U: Unit<T>, const W: usize>(panel: Panel<T>, first: usize, to: *mut u32) {
    let Panel { at, lane, next, lanes, k } = panel;
    for unit in first..k.div_ceil(U::DEPTH) {
        // SAFETY: the caller's; a second element is read only where `k` has it.
        unsafe {
            let from = at.add(unit * U::DEPTH * next);
            let second = from.add((U::DEPTH - 1) * next);
            let both = (unit + 1) * U::DEPTH <= k;
            let row = &mut *to.add(unit * W).cast::<[u32; W]>();
            if lanes == W && lane == 1 && both {
                let (from, second) = (from.cast::<[T; W]>().read_unaligned(), second.cast::<[T; W]>().read_unaligned());
                for (to, (&first, &second)) in row.iter_mut().zip(from.iter().zip(&second)) {
                    *to = U::of(first, Some(second));
                }
            } else {
                for (j, to) in row.iter_mut().enumerate() {
                    let unit = || U::of(*from.add(j * lane), if both { Some(*second.add(j * lane)) } else { None });
                    *to = if j < lanes { unit() } else { 0 };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// [`super::panel`] with registers that hold a row of a block.
    ///
    /// # Safety
    /// As there, and the machine has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn panel<T: Element, U: Unit<T>, const W: usize>(panel: Panel<T>, to: *mut u32) {
        let mut unit = 0;
        if panel.next == 1 {
            let whole = panel.k / U::DEPTH;
            // Blocks that are wider than the panel write into the next units, which are written later; so the last unit
            // is not among them.
            while unit + BLOCK < whole {
                for lane in (0..W).step_by(BLOCK).rev() {
                    // SAFETY: the caller's; lanes that are missing are not read, and a prefetch reads nothing.
                    unsafe {
                        let rows = std::array::from_fn(|i| {
                            if lane + i < panel.lanes.min(W) {
                                let at = panel.at.add((lane + i) * panel.lane + unit * U::DEPTH);
                                // The same of the next panel, for whose rows the machine does not know where they begin.
                                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(W * panel.lane).cast());
                                std::mem::transmute::<[u32; BLOCK], __m256i>(U::block(at))
                            } else {
                                _mm256_setzero_si256()
                            }
                        });
                        for (i, row) in transposed(rows).into_iter().enumerate() {
                            _mm256_storeu_si256(to.add((unit + i) * W + lane).cast(), row);
                        }
                    }
                }
                unit += BLOCK;
            }
        }
        // SAFETY: the caller's.
        unsafe { units::<T, U, W>(panel, unit, to) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn transposed(r: [__m256i; BLOCK]) -> [__m256i; BLOCK] {
        let pair = |i: usize| (_mm256_unpacklo_epi32(r[i], r[i + 1]), _mm256_unpackhi_epi32(r[i], r[i + 1]));
        let four = |(a, b): (__m256i, __m256i), (c, d): (__m256i, __m256i)| {
            [
                _mm256_unpacklo_epi64(a, c),
                _mm256_unpackhi_epi64(a, c),
                _mm256_unpacklo_epi64(b, d),
                _mm256_unpackhi_epi64(b, d),
            ]
        };
        let (low, high) = (four(pair(0), pair(2)), four(pair(4), pair(6)));
        std::array::from_fn(|i| match i {
            0..4 => _mm256_permute2x128_si256::<0x20>(low[i], high[i]),
            _ => _mm256_permute2x128_si256::<0x31>(low[i - 4], high[i - 4]),
        })
    }
}
