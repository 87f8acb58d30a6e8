//! Sixteen floats at once: the widest vectors of the machine under one name, and the functions that kernels of rows need.
//!
//! A kernel is a [`Kernel`] that is written once over [`Lanes`]; [`widest`] runs it with AVX-512, with AVX2, or with plain
//! loops. Lanes are sixteen everywhere, so sums are added in one order; only where a machine has fused multiply-adds may
//! a result's last bits be others than where it has none.

mod element;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use element::{Element, by_element};

use std::ops::{Add, Div, Mul, Sub};

/// Numbers in a vector.
pub(super) const LANES: usize = 16;

/// [`LANES`] numbers in registers. Whoever makes one promises that the machine has the instructions of the type; all
/// else needs only a number that is there.
pub(super) trait Lanes:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// Most vectors that one row of a tile has in registers, beside as many rows as there are registers for.
    const WIDE: usize;

    /// Runs a kernel with these registers, as a function of its own.
    ///
    /// # Safety
    /// The machine has the instructions of this type; and what the kernel asks for.
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output;
    /// The same number in all.
    ///
    /// # Safety
    /// The machine has the instructions of this type.
    unsafe fn splat(x: f32) -> Self;
    /// The numbers at an address.
    ///
    /// # Safety
    /// There are so many, and the machine has the instructions of this type.
    unsafe fn load(from: *const f32) -> Self;
    /// The first `n` numbers at an address, fewer than lanes, and those of `self` behind them.
    ///
    /// # Safety
    /// There are `n` numbers.
    unsafe fn load_part(self, from: *const f32, n: usize) -> Self;
    /// Puts the numbers to an address.
    ///
    /// # Safety
    /// There is room.
    unsafe fn store(self, to: *mut f32);
    /// Puts the first `n` numbers to an address, fewer than lanes.
    ///
    /// # Safety
    /// There is room for `n`.
    unsafe fn store_part(self, to: *mut f32, n: usize);
    /// `self * a + b`, rounded once where the machine can.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The smaller; `self` if either is NaN.
    fn at_most(self, other: Self) -> Self;
    /// The larger; `self` if either is NaN.
    fn at_least(self, other: Self) -> Self;
    /// Without the sign.
    fn abs(self) -> Self;
    /// With the sign of another.
    fn with_sign_of(self, other: Self) -> Self;
    /// Where `self` is below a bound `a`, elsewhere (for NaN too) `b`.
    fn choose_below(self, bound: Self, a: Self, b: Self) -> Self;
    /// This where bits are 1, the lowest for the first lane, `other` where they are 0.
    fn choose(self, bits: u16, other: Self) -> Self;
    /// Whether any lane is larger than the other's.
    fn any_above(self, other: Self) -> bool;
    /// The next whole number, the even one of two; of numbers below 2^22.
    fn round(self) -> Self;
    /// `self * 2^n` for whole `n` of -150 to 128, where the result may be subnormal or infinite.
    fn scale(self, n: Self) -> Self;
    /// The lanes in memory.
    fn to_array(self) -> [f32; LANES];
    /// Puts the numbers to an address past the caches, where nobody will look for them soon. Only [`fence`] makes them
    /// known to other threads.
    ///
    /// # Safety
    /// There is room, at a multiple of [`LANES`] floats.
    unsafe fn stream(self, to: *mut f32);
    /// Adds the numbers to doubles at an address.
    ///
    /// # Safety
    /// There are [`LANES`] doubles.
    unsafe fn add_to_doubles(self, to: *mut f64);

    /// Zeros.
    ///
    /// # Safety
    /// The machine has the instructions of this type.
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's.
        unsafe { Self::splat(0.0) }
    }

    /// Rows become columns.
    #[inline(always)]
    fn transposed(rows: [Self; LANES]) -> [Self; LANES] {
        let rows = rows.map(Self::to_array);
        let mut columns = [[0.0f32; LANES]; LANES];
        for (i, column) in columns.iter_mut().enumerate() {
            *column = std::array::from_fn(|j| rows[j][i]);
        }
        // SAFETY: a column is as many numbers as lanes, and there are values of this type.
        std::array::from_fn(|i| unsafe { Self::load(columns[i].as_ptr()) })
    }

    /// The first `n` numbers at an address, at most as many as lanes, and those of `self` behind them.
    ///
    /// # Safety
    /// There are `n` numbers.
    #[inline(always)]
    unsafe fn take(self, from: *const f32, n: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { if n == LANES { Self::load(from) } else { self.load_part(from, n) } }
    }

    /// Puts the first `n` numbers to an address, at most as many as lanes.
    ///
    /// # Safety
    /// There is room for `n`.
    #[inline(always)]
    unsafe fn put(self, to: *mut f32, n: usize) {
        // SAFETY: the caller's.
        unsafe { if n == LANES { self.store(to) } else { self.store_part(to, n) } }
    }

    /// A number in all lanes.
    #[inline(always)]
    fn all(self, x: f32) -> Self {
        // SAFETY: there is a value of this type, so the machine has its instructions.
        unsafe { Self::splat(x) }
    }

    /// `c0 x^n + c1 x^(n - 1) + ...`
    #[inline(always)]
    fn polynomial<const N: usize>(self, coefficients: [f32; N]) -> Self {
        let mut sum = self.all(coefficients[0]);
        for &c in &coefficients[1..] {
            sum = sum.mul_add(self, self.all(c));
        }
        sum
    }

    /// The sum of all lanes, in pairs of neighbours: of up to three numbers and zeros as one adds them by hand.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut all = self.to_array();
        for width in [8, 4, 2, 1] {
            for j in 0..width {
                all[j] = all[2 * j] + all[2 * j + 1];
            }
        }
        all[0]
    }

    /// The largest lane.
    #[inline(always)]
    fn largest(self) -> f32 {
        together(self.to_array(), |a, b| if a > b { a } else { b })
    }

    /// `e` to the power of `x`, within 2 units in the last place: `2^n * e^r` with `|r| <= ln(2) / 2` and the polynomial
    /// of Cephes' `expf` (Moshier).
    #[inline(always)]
    fn exp(self) -> Self {
        self.exp_from(-104.0)
    }

    /// [`Self::exp`], but 0 where that would be subnormal: to make such a number takes a processor a hundred cycles, and
    /// all that attention hides would be one.
    #[inline(always)]
    fn exp_or_zero(self) -> Self {
        const LEAST: f32 = -87.33;
        self.choose_below(self.all(LEAST), self.all(0.0), self.exp_from(LEAST))
    }

    /// [`Self::exp`] of `self`, or of `least` where that is more.
    #[inline(always)]
    fn exp_from(self, least: f32) -> Self {
        let t = self.at_least(self.all(least)).at_most(self.all(89.0));
        let n = (t * t.all(std::f32::consts::LOG2_E)).round();
        let r = n.mul_add(n.all(2.121_944_4e-4), n.mul_add(n.all(-0.693_359_4), t));
        let p = r.polynomial([1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5]);
        p.mul_add(r * r, r + r.all(1.0)).scale(n)
    }

    /// `1 / (1 + exp(-x))`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let one = self.all(1.0);
        one / (one + (self.all(0.0) - self).exp())
    }

    /// The hyperbolic tangent, within 2 units in the last place: near 0 the polynomial of Cephes' `tanhf` (Moshier), else
    /// by `exp`.
    #[inline(always)]
    fn tanh(self) -> Self {
        let (size, square) = (self.abs(), self * self);
        let p = [-5.704_988_7e-3, 2.063_908_8e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1];
        let near = (square.polynomial(p) * square).mul_add(self, self);
        let one = self.all(1.0);
        let far = one - self.all(2.0) / ((size + size).exp() + one);
        size.choose_below(self.all(0.625), near, far).with_sign_of(self)
    }

    /// The error function, within 2 units in the last place: near 0 a polynomial, else `1 - exp` of one, both as fitted by
    /// N. Juffa ("A faster and more accurate erff()").
    #[inline(always)]
    fn erf(self) -> Self {
        let (size, square) = (self.abs(), self * self);
        let near = square.polynomial([
            -5.967_617e-4,
            4.991_194_3e-3,
            -2.676_813_5e-2,
            1.128_199_25e-1,
            -3.761_253_4e-1,
            1.283_791_7e-1,
        ]);
        let far = size.polynomial([
            -1.728_534_7e-5,
            3.831_972_6e-4,
            -3.883_964_4e-3,
            2.425_462_2e-2,
            -1.067_778_8e-1,
            -6.348_468_7e-1,
            -1.287_175_1e-1,
        ]);
        let one = self.all(1.0);
        let far = one - far.mul_add(size, self.all(0.0) - size).at_least(self.all(-100.0)).exp();
        size.choose_below(self.all(0.927_734_4), near.mul_add(self, self), far.with_sign_of(self))
    }
}

/// Asks for the cache line at an address, which need not be a good one, before it is written.
#[inline(always)]
pub(super) fn prefetch_to_write(at: *mut f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: no x86-64 faults at the instruction, whether it knows it or not.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(at.cast_const().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Runs a body for every vector of so many elements: `i` is its first one, `n` how many there are, fewer than lanes only
/// in the last.
macro_rules! for_vectors {
    (($i:ident, $n:ident) in $len:expr => $body:expr) => {{
        let (len, mut $i) = ($len, 0);
        let $n = LANES;
        while $i + $n <= len {
            $body;
            $i += $n;
        }
        if $i < len {
            let $n = len - $i;
            $body;
        }
    }};
}
pub(super) use for_vectors;

/// Makes what was streamed known to other threads.
#[inline(always)]
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Bytes of a result from which on it goes past the caches. Measured on a CPU with 2 MiB of second-level cache per core: a
/// result of 12 MiB and its next reader take as long either way, one of 50 MiB half as long past the caches, and one of
/// 3 MiB half as long through them.
const STREAMED: usize = 12 << 20;

/// Whether so many bytes at an address, written in rows of so many bytes, go past the caches.
pub(super) fn streams<T>(to: *const T, bytes: usize, row: usize) -> bool {
    bytes >= STREAMED && row.is_multiple_of(LINE) && to.addr().is_multiple_of(LINE)
}

/// Bytes of a cache line, which is a vector of [`LANES`] floats.
const LINE: usize = LANES * size_of::<f32>();

/// Writes lines past the caches: a copy, or zeros.
struct Stream {
    from: Option<*const f32>,
    to: *mut f32,
    lines: usize,
}

impl Kernel for Stream {
    type Output = ();
    /// # Safety
    /// Both places hold so many lines and are apart, nobody else touches the second, and it begins with a line.
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for i in (0..self.lines * LANES).step_by(LANES) {
            // SAFETY: the caller's.
            unsafe {
                let line = match self.from {
                    Some(from) => L::load(from.add(i)),
                    None => L::splat(0.0),
                };
                line.stream(self.to.add(i));
            }
        }
    }
}

/// Copies bytes past the caches, where [`streams`] says so; [`fence`] makes them known to other threads.
///
/// # Safety
/// Both places hold so many bytes, whole lines, and are apart; the second begins with a line, and nobody else touches it.
pub(super) unsafe fn stream_copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's; vectors are moved without a look at their numbers.
    unsafe { widest(Stream { from: Some(from.cast()), to: to.cast(), lines: bytes / LINE }) }
}

/// Writes zeros, as [`stream_copy`] copies.
///
/// # Safety
/// As for `stream_copy`.
pub(super) unsafe fn stream_zeros(to: *mut u8, bytes: usize) {
    // SAFETY: the caller's.
    unsafe { widest(Stream { from: None, to: to.cast(), lines: bytes / LINE }) }
}

/// What is in all lanes, taken together in pairs; their number is a power of two.
#[inline(always)]
pub(super) fn together<T: Copy, const N: usize>(mut lanes: [T; N], with: impl Fn(T, T) -> T) -> T {
    let mut width = N / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] = with(lanes[j], lanes[j + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Asks for the cache line at an address, which need not be a good one, before it is read.
#[inline(always)]
pub(super) fn prefetch(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// What [`widest`] runs.
pub(super) trait Kernel {
    /// What it gives.
    type Output;
    /// Runs with one kind of registers.
    ///
    /// # Safety
    /// The machine has the instructions of `L`. A kernel says what else must be.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
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
    /// All of them, the widest first.
    fn present() -> impl Iterator<Item = Kind> {
        #[cfg(target_arch = "x86_64")]
        let wide = [(x86::has_avx512(), Registers::Avx512), (x86::has_avx2(), Registers::Avx2)];
        #[cfg(not(target_arch = "x86_64"))]
        let wide = [];
        wide.into_iter().chain([(true, Registers::Portable)]).filter(|kind| kind.0).map(|kind| Kind(kind.1))
    }

    /// The widest.
    #[inline]
    pub(super) fn best() -> Kind {
        Kind::present().next().unwrap_or(Kind(Registers::Portable))
    }

    /// All of them.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Kind> {
        Kind::present().collect()
    }

    /// Runs a kernel with these registers.
    ///
    /// # Safety
    /// What the kernel asks for.
    #[inline]
    pub(super) unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the machine has the registers, as there is no other way to have a `Kind`; the rest is the caller's.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Registers::Avx512 => x86::Avx512::enter(kernel),
                #[cfg(target_arch = "x86_64")]
                Registers::Avx2 => x86::Avx2::enter(kernel),
                Registers::Portable => Portable::enter(kernel),
            }
        }
    }
}

/// Runs a kernel with the widest registers of the machine.
///
/// # Safety
/// What the kernel asks for.
#[inline]
pub(super) unsafe fn widest<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { Kind::best().run(kernel) }
}

/// Plain loops over an array, which the compiler turns into what vectors every machine of the architecture has.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // As the formula is written.
    fn each(self, other: Portable, f: impl Fn(f32, f32) -> f32) -> Portable {
        let mut all = self.0;
        for i in 0..LANES {
            all[i] = f(self.0[i], other.0[i]);
        }
        Portable(all)
    }
}

macro_rules! operators {
    ($t:ident: $($op:ident $f:ident $a:ident $b:ident $e:expr;)*) => { $(
        impl $op for $t {
            type Output = $t;
            #[inline(always)]
            fn $f(self, other: $t) -> $t {
                let ($a, $b) = (self, other);
                $e
            }
        }
    )* };
}
#[cfg(target_arch = "x86_64")]
use operators;
operators! { Portable:
    Add add a b a.each(b, |a, b| a + b);
    Sub sub a b a.each(b, |a, b| a - b);
    Mul mul a b a.each(b, |a, b| a * b);
    Div div a b a.each(b, |a, b| a / b);
}

impl Lanes for Portable {
    const WIDE: usize = 1;
    #[inline(always)]
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe { kernel.run::<Self>() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's, here and below.
        Portable(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_part(mut self, from: *const f32, n: usize) -> Self {
        unsafe { std::ptr::copy_nonoverlapping(from, self.0.as_mut_ptr(), n) };
        self
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, n: usize) {
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), to, n) };
    }
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // As the formula is written.
    fn mul_add(self, a: Self, b: Self) -> Self {
        // Every machine of this architecture has the instruction; elsewhere a library would compute it.
        let mut all = self.0;
        for i in 0..LANES {
            all[i] =
                if cfg!(target_arch = "aarch64") { all[i].mul_add(a.0[i], b.0[i]) } else { all[i] * a.0[i] + b.0[i] };
        }
        Portable(all)
    }
    #[inline(always)]
    fn at_most(self, other: Self) -> Self {
        self.each(other, |a, b| if b < a { b } else { a })
    }
    #[inline(always)]
    fn at_least(self, other: Self) -> Self {
        self.each(other, |a, b| if b > a { b } else { a })
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Portable(self.0.map(f32::abs))
    }
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        self.each(other, f32::copysign)
    }
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // As the formula is written.
    fn choose_below(self, bound: Self, a: Self, b: Self) -> Self {
        let mut all = b.0;
        for i in 0..LANES {
            all[i] = if self.0[i] < bound.0[i] { a.0[i] } else { b.0[i] };
        }
        Portable(all)
    }
    #[inline(always)]
    fn choose(self, bits: u16, other: Self) -> Self {
        Portable(std::array::from_fn(|i| if bits >> i & 1 == 1 { self.0[i] } else { other.0[i] }))
    }
    #[inline(always)]
    fn any_above(self, other: Self) -> bool {
        (0..LANES).fold(false, |any, i| any | (self.0[i] > other.0[i]))
    }
    #[inline(always)]
    fn round(self) -> Self {
        // Adding 1.5 * 2^23 leaves no bits for a fraction.
        let shift = self.all(12_582_912.0);
        self + shift - shift
    }
    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        // In two factors, since one would leave the exponents of normal numbers.
        let power = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
        self.each(n, |x, n| {
            let n = (n + 12_582_912.0).to_bits().wrapping_sub(12_582_912f32.to_bits()) as i32;
            let half = n >> 1;
            x * power(half) * power(n.wrapping_sub(half))
        })
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        self.0
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { self.store(to) }
    }
    #[inline(always)]
    unsafe fn add_to_doubles(self, to: *mut f64) {
        let to = unsafe { &mut *to.cast::<[f64; LANES]>() };
        to.iter_mut().zip(self.0).for_each(|(to, x)| *to += f64::from(x));
    }
}

/// Runs a kernel with every kind of registers that the machine has.
#[cfg(test)]
pub(super) fn every<K: Kernel>(kernel: impl Fn() -> K) -> Vec<K::Output> {
    // SAFETY: tests give what their kernels ask for.
    Kind::all().into_iter().map(|kind| unsafe { kind.run(kernel()) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation on a vector and on part of one.
    struct All<'a> {
        x: &'a [f32],
        y: &'a [f32],
    }

    impl Kernel for All<'_> {
        type Output = (Vec<f32>, Vec<f64>);
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) -> (Vec<f32>, Vec<f64>) {
            let (mut out, mut doubles) = (Vec::new(), vec![0.25f64; LANES]);
            // SAFETY: both have as many numbers as two vectors, and five more; so has `room`.
            unsafe {
                for at in [0, 5] {
                    let (x, y) = (L::load(self.x.as_ptr().add(at)), L::load(self.y.as_ptr().add(at)));
                    let all = [
                        x + y,
                        x - y,
                        x * y,
                        x / y,
                        x.at_most(y),
                        x.at_least(y),
                        x.abs(),
                        x.with_sign_of(y),
                        x.choose_below(y, y, x + x),
                        x.choose(0b1010_0111_0000_1101, y),
                        x.round(),
                        x.scale(y.round()),
                        x.all(x.sum() + x.largest()),
                        x.all(if x.any_above(y) { 1.0 } else { 0.0 }),
                        x.take(self.y.as_ptr(), 3),
                        x.polynomial([2.0, 0.5, 1.0]),
                    ];
                    all.iter().for_each(|x| out.extend(x.to_array()));
                    let rows: [L; LANES] = std::array::from_fn(|i| x + x.all(i as f32));
                    L::transposed(rows).iter().for_each(|x| out.extend(x.to_array()));
                    let mut room = [7.0f32; 2 * LANES];
                    x.put(room.as_mut_ptr().add(1), 5);
                    y.put(room.as_mut_ptr().add(9), LANES);
                    out.extend(room);
                    x.add_to_doubles(doubles.as_mut_ptr());
                    y.add_to_doubles(doubles.as_mut_ptr());
                }
            }
            (out, doubles)
        }
    }

    #[test]
    fn every_kind_of_registers_computes_the_same() {
        // In eighths, so that nothing is rounded but quotients, which all round alike.
        let x: Vec<f32> = (0..21).map(|i| (i * 7 % 23) as f32 / 8.0 - 1.25).collect();
        let y: Vec<f32> = (0..21).map(|i| (i * 5 % 19) as f32 / 8.0 - 1.0625).collect();
        let all = every(|| All { x: &x, y: &y });
        let (first, doubles) = &all[0];
        for i in 0..LANES {
            assert_eq!((first[i], first[LANES + i]), (x[i] + y[i], x[i] - y[i]));
            let (tail, other) = (x[i + 5], y[i + 5]);
            assert_eq!(doubles[i], 0.25 + f64::from(x[i]) + f64::from(y[i]) + f64::from(tail) + f64::from(other));
        }
        assert!(all.iter().all(|other| *other == all[0]));
        let odd = [f32::NAN, 1.0, f32::INFINITY, -0.0, 0.0, -1e30, 3.5, 2.5];
        let (x, y): (Vec<f32>, Vec<f32>) = (0..21).map(|i| (odd[i % 8], odd[i / 3 % 8])).unzip();
        let bits = |all: &[f32]| all.iter().map(|x| if x.is_nan() { 1 } else { x.to_bits() }).collect::<Vec<_>>();
        // Without what asks for numbers that can be rounded, or how many of a sum are NaN.
        let comparable = |all: Vec<f32>| bits(&all[..10 * LANES]);
        let all: Vec<_> = every(|| All { x: &x, y: &y }).into_iter().map(|(out, _)| comparable(out)).collect();
        assert!(all.iter().all(|other| *other == all[0]), "{all:?}");
    }

    macro_rules! function {
        ($name:ident) => {{
            struct Of<'a>(&'a [f32]);
            impl Kernel for Of<'_> {
                type Output = Vec<f32>;
                #[inline(always)]
                unsafe fn run<L: Lanes>(self) -> Vec<f32> {
                    let mut out = vec![0.0; self.0.len()];
                    // SAFETY: both have so many elements.
                    unsafe {
                        let zero = L::splat(0.0);
                        for_vectors!((i, n) in out.len() =>
                            zero.take(self.0.as_ptr().add(i), n).$name().put(out.as_mut_ptr().add(i), n));
                    }
                    out
                }
            }
            |x: &[f32]| every(|| Of(x))
        }};
    }

    /// Checks a function between two numbers and at ever smaller ones of both signs: units in the last place, at most.
    fn within(units: f64, f: impl Fn(&[f32]) -> Vec<Vec<f32>>, exact: impl Fn(f64) -> f64, low: f32, high: f32) {
        let mut x: Vec<f32> = (0..1_000_001).map(|i| low + (high - low) * (i as f32 / 1e6)).collect();
        for i in 0..40_000 {
            let size = 2f32.powi(-(i / 1000)) * (1.0 + (i % 1000) as f32 / 1000.0);
            x.extend([size, -size].into_iter().filter(|x| (low..=high).contains(x)));
        }
        for found in f(&x) {
            for (&x, &y) in x.iter().zip(&found) {
                let expected = exact(f64::from(x));
                let size = (expected as f32).abs().max(f32::MIN_POSITIVE);
                let unit = f64::from(f32::from_bits(size.to_bits() + 1)) - f64::from(size);
                let off = (f64::from(y) - expected).abs() / unit;
                assert!(off <= units, "off by {off} units at {x}: {y}, expected {expected}");
            }
        }
    }

    #[test]
    fn functions_are_within_their_units_in_the_last_place() {
        within(2.0, function!(exp), f64::exp, -87.0, 88.7);
        within(2.0, function!(exp_or_zero), f64::exp, -87.0, 88.7);
        within(2.0, function!(tanh), f64::tanh, -12.0, 12.0);
        within(2.0, function!(erf), crate::interp::real::erf, -6.0, 6.0);
        within(4.0, function!(sigmoid), |x| 1.0 / (1.0 + (-x).exp()), -87.0, 87.0);
    }

    #[test]
    fn functions_have_their_limits() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let x = [-inf, -200.0, -0.0, 0.0, 100.0, inf, nan];
        let check = |all: Vec<Vec<f32>>, expected: [f32; 6]| {
            for found in all {
                assert_eq!(found[..6], expected);
                assert!(found[6].is_nan());
            }
        };
        check(function!(exp)(&x), [0.0, 0.0, 1.0, 1.0, inf, inf]);
        check(function!(exp_or_zero)(&x), [0.0, 0.0, 1.0, 1.0, inf, inf]);
        assert!(function!(exp_or_zero)(&[-87.4]).iter().all(|found| found[0] == 0.0));
        check(function!(sigmoid)(&x), [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]);
        check(function!(tanh)(&x), [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]);
        check(function!(erf)(&x), [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]);
        for found in function!(exp)(&[-100.0]) {
            assert!((f64::from(found[0]) - (-100f64).exp()).abs() < 2e-45, "subnormal results");
        }
        for found in [function!(tanh)(&[-0.0]), function!(erf)(&[-0.0])].concat() {
            assert!(found[0].is_sign_negative());
        }
    }
}
