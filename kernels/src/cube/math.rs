//! Functions of single numbers on the device.
//!
//! WGSL leaves `exp`, `log`, `tanh`, `sin` and what becomes of NaN to the driver, within bounds that are too wide for
//! training; so they are made of arithmetic here, by the formulas that the CPU's kernels use, and every device gives
//! the same numbers but for the last digits.

use cubecl::prelude::*;

/// Whether a number is NaN: by its bits, since compilers for graphics may take it that there is none.
#[cube]
pub(super) fn is_nan(x: f32) -> bool {
    (u32::reinterpret(x) & 0x7fff_ffffu32) > 0x7f80_0000u32
}

/// The larger; NaN if either is.
#[cube]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    select(is_nan(a) || a > b, a, b)
}

/// The smaller; NaN if either is.
#[cube]
pub(super) fn smaller(a: f32, b: f32) -> f32 {
    select(is_nan(a) || a < b, a, b)
}

/// A number with more bits set: infinity or NaN, which WGSL has no constants for, and CUDA cannot reinterpret any.
#[cube]
fn with_bits(x: f32, bits: u32) -> f32 {
    f32::reinterpret(u32::reinterpret(x) | bits)
}

/// `2^n` for `-126 <= n <= 127`.
#[cube]
fn power_of_two(n: i32) -> f32 {
    f32::reinterpret(u32::cast_from(n + 127) << 23u32)
}

/// `e^x`: `2^n e^r` with the polynomial of Cephes' `expf` (Moshier).
#[cube]
pub(super) fn exp(x: f32) -> f32 {
    let t = min(max(x, -104.0f32), 89.0f32);
    let n = (t * std::f32::consts::LOG2_E).round();
    let r = fma(n, 2.121_944_4e-4f32, fma(n, -0.693_359_4f32, t));
    let p = fma(1.987_569_1e-4f32, r, 1.398_2e-3f32);
    let p = fma(p, r, 8.333_452e-3f32);
    let p = fma(p, r, 4.166_579_6e-2f32);
    let p = fma(p, r, 1.666_666_5e-1f32);
    let p = fma(p, r, 0.5f32);
    let y = fma(p, r * r, r + 1.0f32);
    // In two factors, since one would leave the exponents of normal numbers.
    let n = i32::cast_from(n);
    let half = n / 2i32;
    select(is_nan(x), x, y * power_of_two(half) * power_of_two(n - half))
}

/// The natural logarithm, by Cephes' `logf` (Moshier).
#[cube]
pub(super) fn log(x: f32) -> f32 {
    let bits = u32::reinterpret(x);
    // Subnormal numbers are made normal ones first.
    let small = bits < 0x0080_0000u32;
    let bits = select(small, u32::reinterpret(x * 8_388_608.0f32), bits);
    let exponent = i32::cast_from(bits >> 23u32) - select(small, 149i32, 126i32);
    let mantissa = f32::reinterpret((bits & 0x007f_ffffu32) | 0x3f00_0000u32);
    let low = mantissa < std::f32::consts::FRAC_1_SQRT_2;
    let e = f32::cast_from(exponent) - select(low, 1.0f32, 0.0f32);
    let m = select(low, mantissa + mantissa, mantissa) - 1.0f32;
    let p = fma(7.037_683_6e-2f32, m, -1.151_461e-1f32);
    let p = fma(p, m, 1.167_699_84e-1f32);
    let p = fma(p, m, -1.242_014_1e-1f32);
    let p = fma(p, m, 1.424_932_3e-1f32);
    let p = fma(p, m, -1.666_805_7e-1f32);
    let p = fma(p, m, 2.000_071_4e-1f32);
    let p = fma(p, m, -2.499_999_4e-1f32);
    let p = fma(p, m, 3.333_333e-1f32);
    let square = m * m;
    let y = fma(e, -2.121_944_4e-4f32, p * m * square);
    let y = fma(square, -0.5f32, y);
    let y = fma(e, 0.693_359_4f32, m + y);
    // Of 0, of negative numbers, of infinity and of NaN.
    let y = select((u32::reinterpret(x) & 0x7fff_ffffu32) == 0u32, with_bits(x, 0xff80_0000u32), y);
    let y = select(x < 0.0f32, with_bits(x, 0x7fc0_0000u32), y);
    let y = select(u32::reinterpret(x) == 0x7f80_0000u32, x, y);
    select(is_nan(x), x, y)
}

/// `log(1 + x)` for `x` between 0 and 1.
#[cube]
fn log_of_one_more(x: f32) -> f32 {
    let sum = 1.0f32 + x;
    let rest = sum - 1.0f32;
    select(rest == 0.0f32, x, log(sum) * (x / rest))
}

/// `1 / (1 + e^-x)`.
#[cube]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0f32 / (1.0f32 + exp(-x))
}

/// `log(sigmoid(x))`; with `e^-|x|` nothing overflows.
#[cube]
pub(super) fn log_sigmoid(x: f32) -> f32 {
    smaller(x, 0.0f32) - log_of_one_more(exp(-x.abs()))
}

/// A number with the sign of another.
#[cube]
fn with_sign(x: f32, sign: f32) -> f32 {
    f32::reinterpret((u32::reinterpret(x) & 0x7fff_ffffu32) | (u32::reinterpret(sign) & 0x8000_0000u32))
}

/// The hyperbolic tangent: near 0 the polynomial of Cephes' `tanhf` (Moshier), else by `exp`.
#[cube]
pub(super) fn tanh(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    let p = fma(-5.704_988_7e-3f32, square, 2.063_908_8e-2f32);
    let p = fma(p, square, -5.373_971_5e-2f32);
    let p = fma(p, square, 1.333_144_2e-1f32);
    let p = fma(p, square, -3.333_328e-1f32);
    let near = fma(p * square, x, x);
    let far = 1.0f32 - 2.0f32 / (exp(size + size) + 1.0f32);
    select(is_nan(x), x, with_sign(select(size < 0.625f32, near, far), x))
}

/// The error function: near 0 a polynomial, else `1 - exp` of one, both as fitted by N. Juffa ("A faster and more
/// accurate erff()").
#[cube]
pub(super) fn erf(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    let p = fma(-5.967_617e-4f32, square, 4.991_194_3e-3f32);
    let p = fma(p, square, -2.676_813_5e-2f32);
    let p = fma(p, square, 1.128_199_2e-1f32);
    let p = fma(p, square, -3.761_253_4e-1f32);
    let p = fma(p, square, 1.283_791_7e-1f32);
    let near = fma(p, x, x);
    // From 4 on it is 1, and the polynomial would leave the floats.
    let t = min(size, 4.0f32);
    let q = fma(-1.728_534_7e-5f32, t, 3.831_972_6e-4f32);
    let q = fma(q, t, -3.883_964_4e-3f32);
    let q = fma(q, t, 2.425_462_2e-2f32);
    let q = fma(q, t, -1.067_778_8e-1f32);
    let q = fma(q, t, -6.348_468_7e-1f32);
    let q = fma(q, t, -1.287_175_1e-1f32);
    let far = 1.0f32 - exp(fma(q, t, -t));
    select(is_nan(x), x, with_sign(select(size < 0.927_734_4f32, near, far), x))
}

/// `x * Phi(x)` with the normal distribution function.
#[cube]
pub(super) fn gelu(x: f32) -> f32 {
    0.5f32 * x * (1.0f32 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// GELU by `tanh`: `x / 2 (1 + tanh u)` is `x sigmoid(2u)`, with `u = sqrt(2 / pi) (x + 0.044715 x^3)`.
#[cube]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    let u = 1.595_769_f32 * fma(0.044_715f32 * x * x, x, x);
    x / (1.0f32 + exp(-u))
}

/// `x` to the power of `y`: of a negative number where `y` is whole, else NaN.
#[cube]
pub(super) fn pow(x: f32, y: f32) -> f32 {
    let size = x.abs();
    let magnitude =
        select(y == 0.0f32, 1.0f32, select(y == 2.0f32, x * x, select(y == 1.0f32, size, exp(y * log(size)))));
    let whole = y.floor() == y;
    let odd = whole && (y * 0.5f32).floor() * 2.0f32 != y;
    let negative = select(whole || y == 0.0f32, select(odd, -magnitude, magnitude), with_bits(x, 0x7fc0_0000u32));
    select(x < 0.0f32, negative, magnitude)
}

/// `1 - e^x` for `x <= 0`, with all digits near 0.
#[cube]
pub(super) fn one_minus_exp(x: f32) -> f32 {
    let p = fma(x, 1.0f32 / 5040.0f32, 1.0f32 / 720.0f32);
    let p = fma(p, x, 1.0f32 / 120.0f32);
    let p = fma(p, x, 1.0f32 / 24.0f32);
    let p = fma(p, x, 1.0f32 / 6.0f32);
    let p = fma(p, x, 0.5f32);
    select(x > -0.5f32, -fma(p * x, x, x), 1.0f32 - exp(x))
}

/// A turn in three parts, of which the first two have so few digits that their products with whole numbers of up to 12 bits
/// are exact.
const TURN: [f32; 3] = {
    let first = 6.28125;
    let second = f32::from_bits(0.001_935_307_2f32.to_bits() & 0xffff_e000);
    [first, second, (std::f64::consts::TAU - 6.28125 - second as f64) as f32]
};

/// An angle less whole turns.
#[cube]
fn less_turns(angle: f32) -> f32 {
    let turns = (angle * comptime!(1.0 / std::f32::consts::TAU)).round();
    ((angle - turns * comptime!(TURN[0])) - turns * comptime!(TURN[1])) - turns * comptime!(TURN[2])
}

/// Sine and cosine of an angle of at most a few turns, by Cephes' `sinf` and `cosf` (Moshier).
#[cube]
pub(super) fn sin_cos(angle: f32) -> (f32, f32) {
    let quarter = (angle * std::f32::consts::FRAC_2_PI).round();
    let y = ((angle - quarter * comptime!(TURN[0] / 4.0)) - quarter * comptime!(TURN[1] / 4.0))
        - quarter * comptime!(TURN[2] / 4.0);
    let z = y * y;
    let p = fma(-1.951_529_6e-4f32, z, 8.332_161e-3f32);
    let p = fma(p, z, -1.666_665_5e-1f32);
    let sin = fma(p * z, y, y);
    let p = fma(2.443_315_7e-5f32, z, -1.388_731_6e-3f32);
    let p = fma(p, z, 4.166_664_6e-2f32);
    let cos = fma(p * z, z, fma(z, -0.5f32, 1.0f32));
    let turn = u32::cast_from(i32::cast_from(quarter)) & 3u32;
    let odd = turn % 2u32 == 1u32;
    let (s, c) = (select(odd, cos, sin), select(odd, sin, cos));
    (select(turn >= 2u32, -s, s), select(turn == 1u32 || turn == 2u32, -c, c))
}

/// Sine and cosine of `position * frequency`, as if the product had all its digits: both factors are taken in halves,
/// whose four products are exact for positions below `2^24`.
#[cube]
pub(super) fn turned(position: u32, frequency: f32) -> (f32, f32) {
    let backwards = position >= 0x8000_0000u32;
    let size = select(backwards, 0u32 - position, position);
    let high = f32::cast_from(size & 0xffff_f000u32);
    let low = f32::cast_from(size & 0x0000_0fffu32);
    let first = f32::reinterpret(u32::reinterpret(frequency) & 0xffff_f000u32);
    let second = frequency - first;
    let angle =
        (less_turns(high * first) + less_turns(low * first)) + (less_turns(high * second) + less_turns(low * second));
    let (sin, cos) = sin_cos(less_turns(angle));
    (select(backwards, -sin, sin), cos)
}
