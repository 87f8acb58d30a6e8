//! Panels: lanes of an operand side by side, unit by unit along `k`.

use half::bf16;

use super::Element;

/// A part of an operand that becomes a panel.
pub(super) struct Panel<T> {
    /// Its first element.
    pub(super) at: *const T,
    /// Elements from one lane to the next.
    pub(super) lane: usize,
    /// Elements from one `k` to the next.
    pub(super) k_stride: usize,
    /// Lanes that there are; the others of the panel become zeros.
    pub(super) lanes: usize,
    /// Lanes of the panel.
    pub(super) width: usize,
    /// Elements along `k`.
    pub(super) k: usize,
}

/// How elements become units.
pub(super) trait Unit<T> {
    /// Elements along `k` in a unit.
    const DEPTH: usize;
    /// The unit of these elements, of which the last may be missing.
    fn of(first: T, second: Option<T>) -> u32;
}

/// One number as f32.
pub(super) struct Wide;

impl<T: Element> Unit<T> for Wide {
    const DEPTH: usize = 1;
    #[inline(always)]
    fn of(first: T, _: Option<T>) -> u32 {
        first.wide().to_bits()
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
}

/// Packs a panel.
///
/// # Safety
/// The elements exist, and there is room for `width` units per unit of `k`.
pub(super) unsafe fn panel<T: Element, U: Unit<T>>(panel: Panel<T>, to: *mut u32) {
    // SAFETY: the caller's; the machine was asked.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                return avx512::<T, U>(&panel, to);
            }
            if is_x86_feature_detected!("avx2") {
                return avx2::<T, U>(&panel, to);
            }
        }
        any::<T, U>(&panel, to);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512<T: Element, U: Unit<T>>(panel: &Panel<T>, to: *mut u32) {
    // SAFETY: the caller's.
    unsafe { any::<T, U>(panel, to) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2<T: Element, U: Unit<T>>(panel: &Panel<T>, to: *mut u32) {
    // SAFETY: the caller's.
    unsafe { any::<T, U>(panel, to) }
}

/// # Safety
/// As for [`panel`].
#[inline(always)]
unsafe fn any<T: Element, U: Unit<T>>(panel: &Panel<T>, to: *mut u32) {
    let &Panel { at, lane, k_stride, lanes, width, k } = panel;
    let whole = k / U::DEPTH;
    // SAFETY: the caller's.
    unsafe {
        for unit in 0..whole {
            let (from, to) = (at.add(unit * U::DEPTH * k_stride), to.add(unit * width));
            let second = from.add((U::DEPTH - 1) * k_stride);
            if lane == 1 {
                for j in 0..lanes {
                    *to.add(j) = U::of(*from.add(j), Some(*second.add(j)));
                }
            } else {
                for j in 0..lanes {
                    *to.add(j) = U::of(*from.add(j * lane), Some(*second.add(j * lane)));
                }
            }
            for j in lanes..width {
                *to.add(j) = 0;
            }
        }
        if whole * U::DEPTH < k {
            let (from, to) = (at.add(whole * U::DEPTH * k_stride), to.add(whole * width));
            for j in 0..width {
                *to.add(j) = if j < lanes { U::of(*from.add(j * lane), None) } else { 0 };
            }
        }
    }
}
