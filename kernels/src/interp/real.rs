//! The two widths of floats, and the functions that the standard library lacks.

use std::fmt::Debug;
use std::ops::{Add, Div, Mul, Neg, Sub};

use dsgc_ir::{DType, Data, Tensor};

use crate::random;

/// A float of either width.
pub(crate) trait Real:
    Copy
    + PartialOrd
    + Debug
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// Rounds a double.
    fn of(x: f64) -> Self;
    /// As a double.
    fn wide(self) -> f64;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn ln_1p(self) -> Self;
    fn sqrt(self) -> Self;
    fn tanh(self) -> Self;
    fn powf(self, exponent: Self) -> Self;
    fn abs(self) -> Self;
    fn uniform(words: [u32; 2], low: f64, high: f64) -> Self;
    /// The elements, if they are floats of this width.
    fn of_data(data: &Data) -> Option<&[Self]>;
    fn into_data(elements: Vec<Self>) -> Data;
    /// The tensor with its floats in this width.
    fn convert(tensor: Tensor) -> Tensor;
    /// A tensor of a declared type, its floats rounded to it: single precision holds what narrower floats do. Double
    /// precision stays as it is, whatever was declared.
    fn rounded(tensor: Tensor, dtype: DType) -> Tensor;

    fn zero() -> Self {
        Self::of(0.0)
    }

    fn is_nan(self) -> bool {
        self.wide().is_nan()
    }

    /// Gauss's error function; single precision rounds the double.
    fn erf(self) -> Self {
        Self::of(erf(self.wide()))
    }

    /// `1 / (1 + exp(-x))`.
    fn sigmoid(self) -> Self {
        Self::of(1.0) / (Self::of(1.0) + (-self).exp())
    }

    /// The larger; NaN if either is, as PyTorch's `maximum`.
    fn larger(self, other: Self) -> Self {
        if self.is_nan() || self > other { self } else { other }
    }

    /// The smaller; NaN if either is, as PyTorch's `minimum`.
    fn smaller(self, other: Self) -> Self {
        if self.is_nan() || self < other { self } else { other }
    }
}

macro_rules! real {
    ($t:ident, $variant:ident, $uniform:path, $convert:path, $rounded:path) => {
        impl Real for $t {
            fn of(x: f64) -> $t {
                x as $t
            }
            fn wide(self) -> f64 {
                f64::from(self)
            }
            fn exp(self) -> $t {
                $t::exp(self)
            }
            fn ln(self) -> $t {
                $t::ln(self)
            }
            fn ln_1p(self) -> $t {
                $t::ln_1p(self)
            }
            fn sqrt(self) -> $t {
                $t::sqrt(self)
            }
            fn tanh(self) -> $t {
                $t::tanh(self)
            }
            fn powf(self, exponent: $t) -> $t {
                $t::powf(self, exponent)
            }
            fn abs(self) -> $t {
                $t::abs(self)
            }
            fn uniform(words: [u32; 2], low: f64, high: f64) -> $t {
                $uniform(words, low, high)
            }
            fn of_data(data: &Data) -> Option<&[$t]> {
                if let Data::$variant(v) = data { Some(v) } else { None }
            }
            fn into_data(elements: Vec<$t>) -> Data {
                Data::$variant(elements)
            }
            fn convert(tensor: Tensor) -> Tensor {
                $convert(tensor)
            }
            fn rounded(tensor: Tensor, dtype: DType) -> Tensor {
                $rounded(tensor, dtype)
            }
        }
    };
}
real!(f32, F32, random::uniform_f32, Tensor::single, Tensor::rounded);
real!(f64, F64, random::uniform, Tensor::double, as_it_is);

fn as_it_is(tensor: Tensor, _: DType) -> Tensor {
    tensor
}

/// Gauss's error function to the last digits of a double.
///
/// Both expansions are in Abramowitz and Stegun: the series 7.1.6, whose terms all have one sign, near 0; the
/// continued fraction 7.1.14 of the complement beyond.
pub(crate) fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a.is_nan() {
        return x;
    } else if a < 2.5 {
        // exp(-x^2) * 2/sqrt(pi) * sum of 2^n x^(2n+1) / (1 * 3 * ... * (2n+1))
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * a * a / (2.0 * n + 1.0);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-a * a).exp() * sum
    } else if a < 6.0 {
        // 60 levels: at 2.5, where it converges slowest, the rest is below 1e-17.
        let tail = (1..=60).rev().fold(a, |tail, n| a + f64::from(n) / 2.0 / tail);
        1.0 - (-a * a).exp() / (tail * std::f64::consts::PI.sqrt())
    } else {
        1.0
    };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::erf;

    #[test]
    fn erf_is_the_tabulated_one() {
        // Abramowitz and Stegun, table 7.1, and DLMF 7.23 beyond.
        let known = [
            (0.0, 0.0),
            (0.1, 0.112_462_916_018_284_9),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (2.4, 0.999_311_486_103_354_9),
            (2.6, 0.999_763_965_583_470_7),
            (3.0, 0.999_977_909_503_001_4),
            (4.0, 0.999_999_984_582_742_1),
        ];
        for (x, y) in known {
            assert!((erf(x) - y).abs() < 4e-16, "erf({x}) = {} not {y}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        assert_eq!((erf(f64::INFINITY), erf(9.0)), (1.0, 1.0));
        assert!(erf(f64::NAN).is_nan());
    }
}
