//! Vectors of [`LANES`] numbers in every kind of registers, and code that is compiled for each of them.
//!
//! Code over vectors is written once, as [`Code`], and runs with the widest registers of the machine ([`Kind::best`]).
//! Numbers in memory are f32 or bf16 ([`Element`]); in registers all are f32.

use half::bf16;

use super::narrow::{from_bf16, to_bf16};

/// Numbers in a vector.
pub(super) const LANES: usize = 16;

/// Code that is compiled for every kind of registers.
pub(super) trait Code {
    /// What it gives.
    type Result;
    /// Runs it. To be inlined, since what it is inlined into says which instructions there are.
    ///
    /// # Safety
    /// The machine has what `L` needs; and what the code itself asks.
    unsafe fn run<L: Lanes>(self) -> Self::Result;
}

/// A kind of registers that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind(Registers);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Registers {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Kind {
    /// The widest.
    pub(super) fn best() -> Kind {
        #[cfg(target_arch = "x86_64")]
        {
            if avx512() {
                return Kind(Registers::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Kind(Registers::Avx2);
            }
        }
        Kind(Registers::Portable)
    }

    /// All of them.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Kind> {
        let mut all = vec![Kind(Registers::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Kind(Registers::Avx2));
            }
            if avx512() {
                all.push(Kind(Registers::Avx512));
            }
        }
        all
    }

    /// Runs code with these registers.
    ///
    /// # Safety
    /// What the code itself asks.
    pub(super) unsafe fn run<C: Code>(self, code: C) -> C::Result {
        // SAFETY: the machine has the registers, as there is no other way to have a `Kind`; the rest is the caller's.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Registers::Avx512 => std::arch::x86_64::__m512::enter(code),
                #[cfg(target_arch = "x86_64")]
                Registers::Avx2 => <[std::arch::x86_64::__m256; 2]>::enter(code),
                Registers::Portable => <[f32; LANES]>::enter(code),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// [`LANES`] numbers in registers.
///
/// # Safety
/// Of all functions: the machine has these registers, and addresses hold as many numbers as are read or written.
pub(super) trait Lanes: Copy {
    /// Most vectors that one row of a tile has in registers, beside as many rows as there are registers for.
    const WIDE: usize;

    /// Runs code with these registers, as a function of its own.
    unsafe fn enter<C: Code>(code: C) -> C::Result;
    /// Zeros.
    unsafe fn zero() -> Self;
    /// The same number in all.
    unsafe fn splat(x: f32) -> Self;
    /// The numbers at an address.
    unsafe fn load(from: *const f32) -> Self;
    /// Puts the numbers to an address.
    unsafe fn store(self, to: *mut f32);
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self - other`.
    unsafe fn sub(self, other: Self) -> Self;
    /// `self * other`.
    unsafe fn mul(self, other: Self) -> Self;
    /// `self + a * b`.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// The larger; `other` if one is no number.
    unsafe fn larger(self, other: Self) -> Self;
    /// The smaller; `other` if one is no number.
    unsafe fn smaller(self, other: Self) -> Self;
    /// `self * 2^n` for whole `n` from -126 to 129.
    unsafe fn times_power(self, n: Self) -> Self;
    /// Bits that are 1 where this is less than `other`.
    unsafe fn below(self, other: Self) -> u16;
    /// This where bits are 1, `other` where they are 0.
    unsafe fn choose(self, bits: u16, other: Self) -> Self;

    /// Rows become columns.
    #[inline(always)]
    unsafe fn transposed(rows: [Self; LANES]) -> [Self; LANES] {
        let mut numbers = [[0.0f32; LANES]; LANES];
        let mut columns = [[0.0f32; LANES]; LANES];
        // SAFETY: the caller's.
        unsafe {
            for (to, row) in numbers.iter_mut().zip(rows) {
                row.store(to.as_mut_ptr());
            }
            for (i, column) in columns.iter_mut().enumerate() {
                *column = std::array::from_fn(|j| numbers[j][i]);
            }
            std::array::from_fn(|i| Self::load(columns[i].as_ptr()))
        }
    }

    /// The numbers.
    #[inline(always)]
    unsafe fn numbers(self) -> [f32; LANES] {
        let mut numbers = [0.0; LANES];
        // SAFETY: the caller's.
        unsafe { self.store(numbers.as_mut_ptr()) };
        numbers
    }

    /// `e` to the power of each number: the steps of [`exp`](super::elementwise::exp), with fewer roundings. What would be
    /// subnormal is 0: to make such a number takes a processor a hundred cycles, and all that is hidden would be one.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.0;
        // SAFETY: the caller's.
        unsafe {
            let of = |x: f32| Self::splat(x);
            // What is no number stays none.
            let least = of(-87.33);
            let t = of(89.0).smaller(least.larger(self));
            let n = of(ROUND).add_product(t, of(std::f32::consts::LOG2_E)).sub(of(ROUND));
            let r = t.add_product(n, of(-0.693_359_4)).add_product(n, of(2.121_944_4e-4));
            let mut p = of(1.987_569_1e-4);
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = of(c).add_product(p, r);
            }
            let e = r.add_product(p, r.mul(r)).add(of(1.0));
            Self::zero().choose(self.below(least), e.times_power(n))
        }
    }
}

impl Lanes for [f32; LANES] {
    const WIDE: usize = 1;
    unsafe fn enter<C: Code>(code: C) -> C::Result {
        // SAFETY: the caller's, here and below.
        unsafe { code.run::<Self>() }
    }
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
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|j| self[j] + other[j])
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        std::array::from_fn(|j| self[j] - other[j])
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        std::array::from_fn(|j| self[j] * other[j])
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|j| self[j] + a[j] * b[j])
    }
    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        std::array::from_fn(|j| if self[j] > other[j] { self[j] } else { other[j] })
    }
    #[inline(always)]
    unsafe fn smaller(self, other: Self) -> Self {
        std::array::from_fn(|j| if self[j] < other[j] { self[j] } else { other[j] })
    }
    #[inline(always)]
    unsafe fn times_power(self, n: Self) -> Self {
        // In two factors, since one has not the range.
        let power = |n: i32| f32::from_bits(((n.wrapping_add(127)) as u32) << 23);
        std::array::from_fn(|j| {
            let n = n[j] as i32;
            self[j] * power(n >> 1) * power(n.wrapping_sub(n >> 1))
        })
    }
    #[inline(always)]
    unsafe fn below(self, other: Self) -> u16 {
        (0..LANES).fold(0, |bits, j| bits | u16::from(self[j] < other[j]) << j)
    }
    #[inline(always)]
    unsafe fn choose(self, bits: u16, other: Self) -> Self {
        std::array::from_fn(|j| if bits >> j & 1 == 1 { self[j] } else { other[j] })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Code, LANES, Lanes};

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn enter_avx512<C: Code>(code: C) -> C::Result {
        // SAFETY: the caller's, here and below.
        unsafe { code.run::<__m512>() }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn enter_avx2<C: Code>(code: C) -> C::Result {
        unsafe { code.run::<[__m256; 2]>() }
    }

    impl Lanes for __m512 {
        const WIDE: usize = 4;
        unsafe fn enter<C: Code>(code: C) -> C::Result {
            unsafe { enter_avx512(code) }
        }
        #[inline(always)]
        unsafe fn zero() -> Self {
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
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm512_add_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { _mm512_sub_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { _mm512_mul_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn larger(self, other: Self) -> Self {
            unsafe { _mm512_max_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn smaller(self, other: Self) -> Self {
            unsafe { _mm512_min_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn times_power(self, n: Self) -> Self {
            unsafe { _mm512_scalef_ps(self, n) }
        }
        #[inline(always)]
        unsafe fn below(self, other: Self) -> u16 {
            unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self, other) }
        }
        #[inline(always)]
        unsafe fn choose(self, bits: u16, other: Self) -> Self {
            unsafe { _mm512_mask_mov_ps(other, bits, self) }
        }
        /// Of pairs of rows, of four, of all.
        #[inline(always)]
        unsafe fn transposed(r: [Self; LANES]) -> [Self; LANES] {
            let (mut fours, mut columns) = ([r[0]; LANES], [r[0]; LANES]);
            unsafe {
                for i in (0..LANES).step_by(4) {
                    let (a, b) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
                    let (c, d) = (_mm512_unpacklo_ps(r[i + 2], r[i + 3]), _mm512_unpackhi_ps(r[i + 2], r[i + 3]));
                    let [a, b, c, d] =
                        [_mm512_castps_pd(a), _mm512_castps_pd(b), _mm512_castps_pd(c), _mm512_castps_pd(d)];
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
            columns
        }
    }

    impl Lanes for [__m256; 2] {
        const WIDE: usize = 1;
        unsafe fn enter<C: Code>(code: C) -> C::Result {
            unsafe { enter_avx2(code) }
        }
        #[inline(always)]
        unsafe fn zero() -> Self {
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
        unsafe fn add(self, other: Self) -> Self {
            unsafe { [_mm256_add_ps(self[0], other[0]), _mm256_add_ps(self[1], other[1])] }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { [_mm256_sub_ps(self[0], other[0]), _mm256_sub_ps(self[1], other[1])] }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { [_mm256_mul_ps(self[0], other[0]), _mm256_mul_ps(self[1], other[1])] }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], self[0]), _mm256_fmadd_ps(a[1], b[1], self[1])] }
        }
        #[inline(always)]
        unsafe fn larger(self, other: Self) -> Self {
            unsafe { [_mm256_max_ps(self[0], other[0]), _mm256_max_ps(self[1], other[1])] }
        }
        #[inline(always)]
        unsafe fn smaller(self, other: Self) -> Self {
            unsafe { [_mm256_min_ps(self[0], other[0]), _mm256_min_ps(self[1], other[1])] }
        }
        #[inline(always)]
        unsafe fn times_power(self, n: Self) -> Self {
            unsafe { [times_power(self[0], n[0]), times_power(self[1], n[1])] }
        }
        #[inline(always)]
        unsafe fn below(self, other: Self) -> u16 {
            unsafe {
                let low = _mm256_cmp_ps::<_CMP_LT_OQ>(self[0], other[0]);
                let high = _mm256_cmp_ps::<_CMP_LT_OQ>(self[1], other[1]);
                _mm256_movemask_ps(low) as u16 | (_mm256_movemask_ps(high) as u16) << 8
            }
        }
        #[inline(always)]
        unsafe fn choose(self, bits: u16, other: Self) -> Self {
            unsafe { [choose(self[0], bits, other[0]), choose(self[1], bits >> 8, other[1])] }
        }
    }

    /// Half of a vector times powers of two, in two factors, since one has not the range.
    #[inline(always)]
    unsafe fn times_power(x: __m256, n: __m256) -> __m256 {
        unsafe {
            let (n, bias) = (_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            let low = _mm256_srai_epi32::<1>(n);
            let high = _mm256_sub_epi32(n, low);
            let low = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(low, bias)));
            let high = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(high, bias)));
            _mm256_mul_ps(_mm256_mul_ps(x, low), high)
        }
    }

    /// Half of a vector where the lower eight bits are 1, of another where they are 0.
    #[inline(always)]
    unsafe fn choose(x: __m256, bits: u16, other: __m256) -> __m256 {
        unsafe {
            let each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(i32::from(bits)), each), each);
            _mm256_blendv_ps(other, x, _mm256_castsi256_ps(chosen))
        }
    }
}

/// What numbers are in memory: f32 or bf16.
///
/// # Safety
/// Of all functions: the machine has the registers, and addresses hold as many numbers as are read or written.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// Zero.
    const ZERO: Self;
    /// The numbers at an address.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
    /// Puts the nearest numbers to an address.
    unsafe fn store<L: Lanes>(lanes: L, to: *mut Self);

    /// The first `n` numbers at an address, and zeros; all if there are more than lanes.
    #[inline(always)]
    unsafe fn load_some<L: Lanes>(from: *const Self, n: usize) -> L {
        // SAFETY: the caller's.
        unsafe {
            if n >= LANES {
                return Self::load(from);
            }
            let mut numbers = [Self::ZERO; LANES];
            std::ptr::copy_nonoverlapping(from, numbers.as_mut_ptr(), n);
            Self::load(numbers.as_ptr())
        }
    }

    /// Puts the first `n` numbers to an address; all if there are more than lanes.
    #[inline(always)]
    unsafe fn store_some<L: Lanes>(lanes: L, to: *mut Self, n: usize) {
        // SAFETY: as above.
        unsafe {
            if n >= LANES {
                return Self::store(lanes, to);
            }
            let mut numbers = [Self::ZERO; LANES];
            Self::store(lanes, numbers.as_mut_ptr());
            std::ptr::copy_nonoverlapping(numbers.as_ptr(), to, n);
        }
    }
}

impl Element for f32 {
    const ZERO: f32 = 0.0;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L {
        // SAFETY: the caller's.
        unsafe { L::load(from) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { lanes.store(to) }
    }
}

impl Element for bf16 {
    const ZERO: bf16 = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const bf16) -> L {
        // SAFETY: the caller's.
        unsafe {
            let numbers = from.cast::<[u16; LANES]>().read_unaligned().map(from_bf16);
            L::load(numbers.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut bf16) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(lanes.numbers().map(to_bf16)) }
    }
}

/// Calls a function for the element type of a launch's first operand. What is neither f32 nor bf16 is f32 here, as it
/// runs on widened copies.
macro_rules! by_element {
    ($l:expr, $f:ident($($arg:expr),*)) => {
        match $l.dtype($l.op.args[0]) {
            dsgc_ir::DType::Bf16 => $f::<half::bf16>($($arg),*),
            _ => $f::<f32>($($arg),*),
        }
    };
}
pub(super) use by_element;

#[cfg(test)]
mod tests {
    use super::*;

    /// Each function on some vectors, number by number.
    struct Numbers([f32; LANES], [f32; LANES]);

    impl Code for Numbers {
        type Result = Vec<[f32; LANES]>;
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) -> Vec<[f32; LANES]> {
            // SAFETY: the machine has the registers.
            unsafe {
                let (a, b) = (L::load(self.0.as_ptr()), L::load(self.1.as_ptr()));
                let rows = L::transposed(std::array::from_fn(|i| a.add(L::splat(i as f32))));
                let (mut wide, mut narrow) = ([0.0; LANES], [bf16::ZERO; LANES]);
                f32::store_some(f32::load_some::<L>(self.0.as_ptr(), 5), wide.as_mut_ptr(), 7);
                bf16::store(a, narrow.as_mut_ptr());
                let part = bf16::load_some::<L>(narrow.as_ptr(), 11);
                let all = [a.add(b), a.sub(b), a.mul(b), L::zero().add_product(a, b), a.larger(b), a.smaller(b)];
                let below = L::splat(f32::from(a.below(b)));
                let all =
                    all.into_iter().chain([below, a.choose(0b1010_0111_0000_1101, b), L::load(wide.as_ptr()), part]);
                all.chain(rows).map(|lanes| lanes.numbers()).collect()
            }
        }
    }

    #[test]
    fn every_kind_of_registers_gives_the_numbers() {
        let a: [f32; LANES] =
            std::array::from_fn(|j| (j as f32 - 5.0) / 8.0 * if j == 3 { f32::INFINITY } else { 1.0 });
        let mut b: [f32; LANES] = std::array::from_fn(|j| (j as f32 * 7.0) % 5.0 - 2.0);
        b[14] = f32::NAN;
        let of = |f: &dyn Fn(usize) -> f32| -> [f32; LANES] { std::array::from_fn(f) };
        let bit = |j: usize| 0b1010_0111_0000_1101 >> j & 1 == 1;
        let mut expected = vec![
            of(&|j| a[j] + b[j]),
            of(&|j| a[j] - b[j]),
            of(&|j| a[j] * b[j]),
            of(&|j| 0.0 + a[j] * b[j]),
            of(&|j| if a[j] > b[j] { a[j] } else { b[j] }),
            of(&|j| if a[j] < b[j] { a[j] } else { b[j] }),
            of(&|_| (0..LANES).map(|j| if a[j] < b[j] { (1 << j) as f32 } else { 0.0 }).sum()),
            of(&|j| if bit(j) { a[j] } else { b[j] }),
            of(&|j| if j < 5 { a[j] } else { 0.0 }),
            of(&|j| if j < 11 { from_bf16(to_bf16(a[j])) } else { 0.0 }),
        ];
        expected.extend((0..LANES).map(|i| of(&|j| a[i] + j as f32)));
        let bits = |all: &[[f32; LANES]]| -> Vec<u32> {
            all.iter().flatten().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
        };
        for kind in Kind::all() {
            // SAFETY: the code asks for nothing.
            let found = unsafe { kind.run(Numbers(a, b)) };
            assert_eq!(bits(&found), bits(&expected), "{kind:?}: {found:?}\n{expected:?}");
        }
    }

    struct Exp([f32; LANES]);

    impl Code for Exp {
        type Result = [f32; LANES];
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) -> [f32; LANES] {
            // SAFETY: the machine has the registers.
            unsafe { L::load(self.0.as_ptr()).exp().numbers() }
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for kind in Kind::all() {
            let mut worst: f64 = 0.0;
            for i in 0..40_000 {
                let x: [f32; LANES] = std::array::from_fn(|j| -87.0 + 175.0 * ((16 * i + j) as f32 / 640_000.0));
                // SAFETY: the code asks for nothing.
                let found = unsafe { kind.run(Exp(x)) };
                for (x, found) in x.into_iter().zip(found) {
                    let exact = f64::from(x).exp();
                    let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
                    worst = worst.max((f64::from(found) - exact).abs() / unit);
                }
            }
            assert!(worst <= 2.0, "{kind:?} is off by {worst} units");
            let mut odd = [0.0; LANES];
            odd[..6].copy_from_slice(&[0.0, -200.0, f32::NEG_INFINITY, 100.0, f32::INFINITY, f32::NAN]);
            // SAFETY: as above.
            let found = unsafe { kind.run(Exp(odd)) };
            assert_eq!(found[..5], [1.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY], "{kind:?}");
            assert!(found[5].is_nan(), "{kind:?}");
        }
    }
}
