//! Weights that are kept in fewer bits as numbers in registers: for AVX-512, AVX2, and the least of the architecture.

use half::{bf16, f16};

use super::super::gemm::Element;
use super::super::skinny::{LANES, Products, Sums, TILE};
use super::Format;

/// How elements of a matrix become operands.
///
/// Functions take the address of a row. Callers say that it has the elements, and that the machine has what `P` needs.
pub(in super::super) trait Column<T, P: Products<T>> {
    /// Whether rows are padded to a multiple of every step, with what counts nothing.
    const PADDED: bool;
    /// Bytes of the elements of a step.
    const BYTES: usize;
    /// The elements from `at` on, a multiple of the step.
    unsafe fn load(row: *const u8, format: Format, at: usize) -> P::Operand;
    /// One element, of rows that are not padded.
    unsafe fn one(row: *const u8, at: usize) -> f32;
}

/// Elements of the type that is computed in.
pub(in super::super) struct Plain;

impl<T: Element, P: Products<T>> Column<T, P> for Plain {
    const PADDED: bool = false;
    const BYTES: usize = P::STEP * size_of::<T>();
    #[inline(always)]
    unsafe fn load(row: *const u8, _: Format, at: usize) -> P::Operand {
        // SAFETY: the caller's.
        unsafe { P::load(row.cast::<T>().add(at)) }
    }
    #[inline(always)]
    unsafe fn one(row: *const u8, at: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe { (*row.cast::<T>().add(at)).wide() }
    }
}

/// Numbers in registers, as many as are read at a time.
pub(in super::super) const STEP: usize = 2 * LANES;

/// [`STEP`] numbers in registers. The safety of all functions is the caller's: that addresses are good, and that the
/// machine has what the type needs.
pub(in super::super) trait Lanes: Copy {
    /// Sums of products of them.
    type Sum: Sums;
    unsafe fn wide(from: *const f32) -> Self;
    unsafe fn bf16(from: *const bf16) -> Self;
    unsafe fn f16(from: *const f16) -> Self;
    /// Bytes with a sign, times a scale.
    unsafe fn int8(from: *const u8, scale: *const f32) -> Self;
    /// Half bytes as [`Quantized`] orders them, times a scale.
    unsafe fn int4(from: *const u8, scale: *const f32) -> Self;
    /// Rounded to bf16.
    unsafe fn rounded(self) -> Self;
    unsafe fn add(sum: Self::Sum, a: Self, b: Self) -> Self::Sum;
    unsafe fn store(self, to: *mut f32);
}

/// [`Sums`] of so many products at a time.
#[derive(Clone, Copy)]
pub(in super::super) struct Wide<L: Lanes>(L::Sum);

impl<L: Lanes> Sums for Wide<L> {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's, here and below.
        Wide(unsafe { L::Sum::zero() })
    }
    #[inline(always)]
    unsafe fn totals(four: [Self; TILE]) -> [f32; TILE] {
        // SAFETY: as above.
        unsafe { L::Sum::totals(four.map(|sums| sums.0)) }
    }
}

impl<L: Lanes> Products<f32> for Wide<L> {
    const STEP: usize = STEP;
    type Operand = L;
    #[inline(always)]
    unsafe fn load(from: *const f32) -> L {
        // SAFETY: the caller's, here and below.
        unsafe { L::wide(from) }
    }
    #[inline(always)]
    unsafe fn add(self, a: L, b: L) -> Self {
        // SAFETY: as above.
        Wide(unsafe { L::add(self.0, a, b) })
    }
}

impl<L: Lanes> Products<bf16> for Wide<L> {
    const STEP: usize = STEP;
    type Operand = L;
    #[inline(always)]
    unsafe fn load(from: *const bf16) -> L {
        // SAFETY: the caller's, here and below.
        unsafe { L::bf16(from) }
    }
    #[inline(always)]
    unsafe fn add(self, a: L, b: L) -> Self {
        // SAFETY: as above.
        Wide(unsafe { L::add(self.0, a, b) })
    }
}

/// Elements that are kept in fewer bits, as numbers in registers.
pub(in super::super) trait Kept {
    /// As in [`Column`].
    const PADDED: bool;
    /// As in [`Column`].
    const BYTES: usize;
    unsafe fn load<L: Lanes>(row: *const u8, format: Format, at: usize) -> L;
    unsafe fn one(row: *const u8, at: usize) -> f32;
}

macro_rules! kept {
    ($(#[doc = $doc:literal])+ $name:ident $element:ident) => {
        $(#[doc = $doc])+
        pub(super) struct $name;

        impl Kept for $name {
            const PADDED: bool = false;
            const BYTES: usize = STEP * size_of::<$element>();
            #[inline(always)]
            unsafe fn load<L: Lanes>(row: *const u8, _: Format, at: usize) -> L {
                // SAFETY: the caller's.
                unsafe { L::$element(row.cast::<$element>().add(at)) }
            }
            #[inline(always)]
            unsafe fn one(row: *const u8, at: usize) -> f32 {
                // SAFETY: the caller's.
                unsafe { row.cast::<$element>().add(at).read_unaligned() }.to_f32()
            }
        }
    };
    ($(#[doc = $doc:literal])+ $name:ident $read:ident, $bits:literal bits) => {
        $(#[doc = $doc])+
        pub(super) struct $name;

        impl Kept for $name {
            const PADDED: bool = true;
            const BYTES: usize = STEP * $bits / 8;
            #[inline(always)]
            unsafe fn load<L: Lanes>(row: *const u8, format: Format, at: usize) -> L {
                // SAFETY: the caller's; a step lies in one group.
                unsafe { L::$read(row.add(format.elements + at * $bits / 8), row.cast::<f32>().add(at >> format.group)) }
            }
            unsafe fn one(_: *const u8, _: usize) -> f32 {
                unreachable!("padded rows have no rest")
            }
        }
    };
}
kept!(/// bf16 in a product in f32.
    Brain bf16);
kept!(/// f16 in a product in f32.
    Half f16);
kept!(/// Bytes.
    Int8 int8, 8 bits);
kept!(/// Half bytes.
    Int4 int4, 4 bits);

impl<K: Kept, L: Lanes> Column<f32, Wide<L>> for K {
    const PADDED: bool = K::PADDED;
    const BYTES: usize = K::BYTES;
    #[inline(always)]
    unsafe fn load(row: *const u8, format: Format, at: usize) -> L {
        // SAFETY: the caller's, here and below.
        unsafe { K::load(row, format, at) }
    }
    #[inline(always)]
    unsafe fn one(row: *const u8, at: usize) -> f32 {
        // SAFETY: as above.
        unsafe { K::one(row, at) }
    }
}

impl<K: Kept, L: Lanes> Column<bf16, Wide<L>> for K {
    const PADDED: bool = K::PADDED;
    const BYTES: usize = K::BYTES;
    #[inline(always)]
    unsafe fn load(row: *const u8, format: Format, at: usize) -> L {
        // SAFETY: the caller's, here and below.
        unsafe { K::load::<L>(row, format, at).rounded() }
    }
    #[inline(always)]
    unsafe fn one(row: *const u8, at: usize) -> f32 {
        // SAFETY: as above.
        bf16::from_f32(unsafe { K::one(row, at) }).to_f32()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::super::super::skinny::x86::Pairs;
    use super::{Column, Format, Kept, LANES, Lanes};

    impl Lanes for [__m512; 2] {
        type Sum = __m512;
        #[inline(always)]
        unsafe fn wide(from: *const f32) -> Self {
            unsafe { [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(LANES))] }
        }
        #[inline(always)]
        unsafe fn bf16(from: *const bf16) -> Self {
            unsafe {
                let wide = |halves| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)));
                [wide(_mm256_loadu_si256(from.cast())), wide(_mm256_loadu_si256(from.add(LANES).cast()))]
            }
        }
        #[inline(always)]
        unsafe fn f16(from: *const f16) -> Self {
            unsafe {
                let wide = |at: *const f16| _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()));
                [wide(from), wide(from.add(LANES))]
            }
        }
        #[inline(always)]
        unsafe fn int8(from: *const u8, scale: *const f32) -> Self {
            unsafe {
                let scale = _mm512_set1_ps(*scale);
                let wide = |at: *const u8| {
                    let whole = _mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()));
                    _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale)
                };
                [wide(from), wide(from.add(LANES))]
            }
        }
        #[inline(always)]
        unsafe fn int4(from: *const u8, scale: *const f32) -> Self {
            unsafe {
                // The 16 numbers that there are; a lane takes its own by its lowest bits.
                let numbers = _mm512_setr_ps(-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.);
                let numbers = _mm512_mul_ps(numbers, _mm512_set1_ps(*scale));
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                [_mm512_permutexvar_ps(bytes, numbers), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), numbers)]
            }
        }
        #[inline(always)]
        unsafe fn rounded(self) -> Self {
            unsafe {
                self.map(|x| {
                    let bits = _mm512_castps_si512(x);
                    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
                    _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(-0x1_0000)))
                })
            }
        }
        #[inline(always)]
        unsafe fn add(sum: __m512, a: Self, b: Self) -> __m512 {
            unsafe { _mm512_fmadd_ps(a[1], b[1], _mm512_fmadd_ps(a[0], b[0], sum)) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                _mm512_storeu_ps(to, self[0]);
                _mm512_storeu_ps(to.add(LANES), self[1]);
            }
        }
    }

    impl<K: Kept> Column<bf16, Pairs> for K {
        const PADDED: bool = K::PADDED;
        const BYTES: usize = K::BYTES;
        #[inline(always)]
        unsafe fn load(row: *const u8, format: Format, at: usize) -> __m512bh {
            unsafe {
                let [low, high] = K::load::<[__m512; 2]>(row, format, at);
                _mm512_cvtne2ps_pbh(high, low)
            }
        }
        #[inline(always)]
        unsafe fn one(row: *const u8, at: usize) -> f32 {
            bf16::from_f32(unsafe { K::one(row, at) }).to_f32()
        }
    }

    impl Lanes for [__m256; 4] {
        type Sum = [__m256; 2];
        #[inline(always)]
        unsafe fn wide(from: *const f32) -> Self {
            unsafe { [0, 1, 2, 3].map(|i| _mm256_loadu_ps(from.add(8 * i))) }
        }
        #[inline(always)]
        unsafe fn bf16(from: *const bf16) -> Self {
            unsafe {
                [0, 1, 2, 3].map(|i| {
                    let halves = _mm_loadu_si128(from.add(8 * i).cast());
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
                })
            }
        }
        #[inline(always)]
        unsafe fn f16(from: *const f16) -> Self {
            unsafe { [0, 1, 2, 3].map(|i| _mm256_cvtph_ps(_mm_loadu_si128(from.add(8 * i).cast()))) }
        }
        #[inline(always)]
        unsafe fn int8(from: *const u8, scale: *const f32) -> Self {
            unsafe {
                let scale = _mm256_set1_ps(*scale);
                [0, 1, 2, 3].map(|i| {
                    let whole = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8 * i).cast()));
                    _mm256_mul_ps(_mm256_cvtepi32_ps(whole), scale)
                })
            }
        }
        #[inline(always)]
        unsafe fn int4(from: *const u8, scale: *const f32) -> Self {
            unsafe {
                let scale = _mm256_set1_ps(*scale);
                let bytes = [0, 1].map(|i| _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8 * i).cast())));
                let number = |four| {
                    let whole = _mm256_sub_epi32(four, _mm256_set1_epi32(8));
                    _mm256_mul_ps(_mm256_cvtepi32_ps(whole), scale)
                };
                let low = bytes.map(|bytes| number(_mm256_and_si256(bytes, _mm256_set1_epi32(0xF))));
                let high = bytes.map(|bytes| number(_mm256_srli_epi32::<4>(bytes)));
                [low[0], low[1], high[0], high[1]]
            }
        }
        #[inline(always)]
        unsafe fn rounded(self) -> Self {
            unsafe {
                self.map(|x| {
                    let bits = _mm256_castps_si256(x);
                    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
                    _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(-0x1_0000)))
                })
            }
        }
        #[inline(always)]
        unsafe fn add(sum: [__m256; 2], a: Self, b: Self) -> [__m256; 2] {
            unsafe {
                let first = [_mm256_fmadd_ps(a[0], b[0], sum[0]), _mm256_fmadd_ps(a[1], b[1], sum[1])];
                [_mm256_fmadd_ps(a[2], b[2], first[0]), _mm256_fmadd_ps(a[3], b[3], first[1])]
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            for (i, x) in self.into_iter().enumerate() {
                unsafe { _mm256_storeu_ps(to.add(8 * i), x) };
            }
        }
    }
}

impl Lanes for [f32; STEP] {
    type Sum = [f32; LANES];
    #[inline(always)]
    unsafe fn wide(from: *const f32) -> Self {
        // SAFETY: the caller's, here and below.
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn bf16(from: *const bf16) -> Self {
        // SAFETY: as above.
        unsafe { from.cast::<[bf16; STEP]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn f16(from: *const f16) -> Self {
        // SAFETY: as above.
        unsafe { from.cast::<[f16; STEP]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn int8(from: *const u8, scale: *const f32) -> Self {
        // SAFETY: as above.
        let (bytes, scale) = unsafe { (from.cast::<[i8; STEP]>().read_unaligned(), *scale) };
        bytes.map(|whole| f32::from(whole) * scale)
    }
    #[inline(always)]
    unsafe fn int4(from: *const u8, scale: *const f32) -> Self {
        // SAFETY: as above.
        let (bytes, scale) = unsafe { (from.cast::<[u8; LANES]>().read_unaligned(), *scale) };
        std::array::from_fn(|i| {
            let four = if i < LANES { bytes[i] & 0xF } else { bytes[i - LANES] >> 4 };
            f32::from(four as i8 - 8) * scale
        })
    }
    #[inline(always)]
    unsafe fn rounded(self) -> Self {
        self.map(|x| bf16::from_f32(x).to_f32())
    }
    #[inline(always)]
    unsafe fn add(mut sum: [f32; LANES], a: Self, b: Self) -> [f32; LANES] {
        for i in 0..STEP {
            sum[i % LANES] += a[i] * b[i];
        }
        sum
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as above.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }
}
