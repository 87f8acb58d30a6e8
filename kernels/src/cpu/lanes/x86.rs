//! The vectors of x86-64.

use std::arch::x86_64::*;

use super::*;

/// Whether the machine has what [`Avx512`] needs.
#[inline(always)]
pub(in crate::cpu) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && has_avx2()
}

/// Whether the machine has what [`Avx2`] needs.
#[inline(always)]
pub(in crate::cpu) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// # Safety
/// The machine has the instructions; and what the kernel asks for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512>() }
}

/// # Safety
/// As for `avx512`.
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx2>() }
}

/// One register of AVX-512.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx512(__m512);

// SAFETY, here and in the operators: there is a value, so the machine has AVX-512.
operators! { Avx512:
    Add add a b Avx512(unsafe { _mm512_add_ps(a.0, b.0) });
    Sub sub a b Avx512(unsafe { _mm512_sub_ps(a.0, b.0) });
    Mul mul a b Avx512(unsafe { _mm512_mul_ps(a.0, b.0) });
    Div div a b Avx512(unsafe { _mm512_div_ps(a.0, b.0) });
}

impl Lanes for Avx512 {
    const WIDE: usize = 4;
    #[inline(always)]
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe { avx512(kernel) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller's promise in all that is unsafe; elsewhere the value of this type.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Avx512(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn load_part(self, from: *const f32, n: usize) -> Self {
        Avx512(unsafe { _mm512_mask_loadu_ps(self.0, (1 << n) - 1, from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, n: usize) {
        unsafe { _mm512_mask_storeu_ps(to, (1 << n) - 1, self.0) }
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Avx512(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
    }
    // Of a NaN and a number, the instructions give what comes second.
    #[inline(always)]
    fn at_most(self, other: Self) -> Self {
        Avx512(unsafe { _mm512_min_ps(other.0, self.0) })
    }
    #[inline(always)]
    fn at_least(self, other: Self) -> Self {
        Avx512(unsafe { _mm512_max_ps(other.0, self.0) })
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Avx512(unsafe { _mm512_abs_ps(self.0) })
    }
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        unsafe {
            let sign = _mm512_set1_ps(-0.0);
            Avx512(_mm512_or_ps(_mm512_andnot_ps(sign, self.0), _mm512_and_ps(sign, other.0)))
        }
    }
    #[inline(always)]
    fn choose_below(self, bound: Self, a: Self, b: Self) -> Self {
        unsafe { Avx512(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, bound.0), b.0, a.0)) }
    }
    #[inline(always)]
    fn choose(self, bits: u16, other: Self) -> Self {
        Avx512(unsafe { _mm512_mask_mov_ps(other.0, bits, self.0) })
    }
    /// Of pairs of rows, of four, of all.
    #[inline(always)]
    fn transposed(rows: [Self; LANES]) -> [Self; LANES] {
        let r = rows.map(|row| row.0);
        let (mut fours, mut columns) = ([r[0]; LANES], [r[0]; LANES]);
        unsafe {
            for i in (0..LANES).step_by(4) {
                let (a, b) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
                let (c, d) = (_mm512_unpacklo_ps(r[i + 2], r[i + 3]), _mm512_unpackhi_ps(r[i + 2], r[i + 3]));
                let [a, b, c, d] = [_mm512_castps_pd(a), _mm512_castps_pd(b), _mm512_castps_pd(c), _mm512_castps_pd(d)];
                // Column `j` of these rows, and every fourth after it.
                fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            for j in 0..4 {
                let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
                let (x, y) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
                let (z, w) = (_mm512_shuffle_f32x4::<0xDD>(a, b), _mm512_shuffle_f32x4::<0xDD>(c, d));
                columns[j] = _mm512_shuffle_f32x4::<0x88>(x, y);
                columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(z, w);
                columns[8 + j] = _mm512_shuffle_f32x4::<0xDD>(x, y);
                columns[12 + j] = _mm512_shuffle_f32x4::<0xDD>(z, w);
            }
        }
        columns.map(Avx512)
    }
    #[inline(always)]
    fn any_above(self, other: Self) -> bool {
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, other.0) != 0 }
    }
    #[inline(always)]
    fn round(self) -> Self {
        Avx512(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        Avx512(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        // SAFETY: both are sixteen floats.
        unsafe { std::mem::transmute(self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        unsafe { _mm512_stream_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add_to_doubles(self, to: *mut f64) {
        unsafe {
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(self.0));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(self.0));
            _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
            _mm512_storeu_pd(to.add(8), _mm512_add_pd(_mm512_loadu_pd(to.add(8)), high));
        }
    }
}

/// Two registers of AVX2.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx2([__m256; 2]);

/// An instruction on both registers of its operands.
macro_rules! both {
    ($f:path: $($x:expr),*) => {
        // SAFETY: there is a value, so the machine has AVX2 and FMA.
        unsafe { Avx2([$f($($x.0[0]),*), $f($($x.0[1]),*)]) }
    };
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn abs(x: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), x)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn with_sign_of(x: __m256, y: __m256) -> __m256 {
    _mm256_or_ps(abs(x), _mm256_and_ps(_mm256_set1_ps(-0.0), y))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn choose_below(x: __m256, bound: __m256, a: __m256, b: __m256) -> __m256 {
    _mm256_blendv_ps(b, a, _mm256_cmp_ps::<_CMP_LT_OQ>(x, bound))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn choose(x: __m256, bits: u16, other: __m256) -> __m256 {
    let each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(i32::from(bits)), each), each);
    _mm256_blendv_ps(other, x, _mm256_castsi256_ps(chosen))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn scale(x: __m256, n: __m256) -> __m256 {
    // In two factors, since one would leave the exponents of normal numbers.
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    let rest = _mm256_sub_epi32(n, half);
    let bias = _mm256_set1_epi32(127);
    let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias)));
    let other = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias)));
    _mm256_mul_ps(_mm256_mul_ps(x, power), other)
}

operators! { Avx2:
    Add add a b both!(_mm256_add_ps: a, b);
    Sub sub a b both!(_mm256_sub_ps: a, b);
    Mul mul a b both!(_mm256_mul_ps: a, b);
    Div div a b both!(_mm256_div_ps: a, b);
}

impl Lanes for Avx2 {
    const WIDE: usize = 1;
    #[inline(always)]
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe { avx2(kernel) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller's promise in all that is unsafe; elsewhere the value of this type.
        Avx2([unsafe { _mm256_set1_ps(x) }; 2])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx2([_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]) }
    }
    #[inline(always)]
    unsafe fn load_part(self, from: *const f32, n: usize) -> Self {
        let mut all = self.to_array();
        unsafe {
            std::ptr::copy_nonoverlapping(from, all.as_mut_ptr(), n);
            Self::load(all.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0[0]);
            _mm256_storeu_ps(to.add(8), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, n: usize) {
        let all = self.to_array();
        unsafe { std::ptr::copy_nonoverlapping(all.as_ptr(), to, n) };
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        both!(_mm256_fmadd_ps: self, a, b)
    }
    #[inline(always)]
    fn at_most(self, other: Self) -> Self {
        both!(_mm256_min_ps: other, self)
    }
    #[inline(always)]
    fn at_least(self, other: Self) -> Self {
        both!(_mm256_max_ps: other, self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        both!(abs: self)
    }
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        both!(with_sign_of: self, other)
    }
    #[inline(always)]
    fn choose_below(self, bound: Self, a: Self, b: Self) -> Self {
        both!(choose_below: self, bound, a, b)
    }
    #[inline(always)]
    fn choose(self, bits: u16, other: Self) -> Self {
        unsafe { Avx2([choose(self.0[0], bits, other.0[0]), choose(self.0[1], bits >> 8, other.0[1])]) }
    }
    #[inline(always)]
    fn any_above(self, other: Self) -> bool {
        let above = both!(_mm256_cmp_ps::<_CMP_GT_OQ>: self, other);
        unsafe { _mm256_movemask_ps(_mm256_or_ps(above.0[0], above.0[1])) != 0 }
    }
    #[inline(always)]
    fn round(self) -> Self {
        both!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>: self)
    }
    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        both!(scale: self, n)
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        // SAFETY: both are sixteen floats.
        unsafe { std::mem::transmute(self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        unsafe {
            _mm256_stream_ps(to, self.0[0]);
            _mm256_stream_ps(to.add(8), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn add_to_doubles(self, to: *mut f64) {
        unsafe {
            for (i, half) in self.0.into_iter().enumerate() {
                let quarters = [_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half)];
                for (j, quarter) in quarters.into_iter().enumerate() {
                    let to = to.add(8 * i + 4 * j);
                    _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), _mm256_cvtps_pd(quarter)));
                }
            }
        }
    }
}
