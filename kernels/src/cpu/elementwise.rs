//! Elementwise ops: one pass, in blocks that the compiler turns into vector instructions.

use std::f32::consts::FRAC_1_SQRT_2;

use dsgc_ir::{DType, Op};
use multiversion::multiversion;

use super::Launch;
use super::lanes::{Kernel, LANES, Lanes, for_vectors, widest};
use super::memory::Ptr;
use super::narrow::{from_bf16, through, to_bf16};

/// Elements that are loaded before any of their results is stored. So a result may lie where an operand does, and the
/// compiler need not ask whether it does.
const BLOCK: usize = 64;

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
pub(super) unsafe fn map1<A: Copy, R: Copy + Default, F: Fn(A) -> R>(a: *const A, out: *mut R, n: usize, f: F) {
    let mut i = 0;
    while i + BLOCK <= n {
        // SAFETY: the caller has `n` elements at each pointer; results are stored when all operands are loaded.
        unsafe {
            let x = a.add(i).cast::<[A; BLOCK]>().read_unaligned();
            let mut r = [R::default(); BLOCK];
            for j in 0..BLOCK {
                r[j] = f(x[j]);
            }
            out.add(i).cast::<[R; BLOCK]>().write_unaligned(r);
        }
        i += BLOCK;
    }
    while i < n {
        // SAFETY: as above.
        unsafe { out.add(i).write(f(a.add(i).read())) };
        i += 1;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
unsafe fn map2<A: Copy, B: Copy, R: Copy + Default, F: Fn(A, B) -> R>(
    a: *const A,
    b: *const B,
    out: *mut R,
    n: usize,
    f: F,
) {
    let mut i = 0;
    while i + BLOCK <= n {
        // SAFETY: as in `map1`.
        unsafe {
            let (x, y) =
                (a.add(i).cast::<[A; BLOCK]>().read_unaligned(), b.add(i).cast::<[B; BLOCK]>().read_unaligned());
            let mut r = [R::default(); BLOCK];
            for j in 0..BLOCK {
                r[j] = f(x[j], y[j]);
            }
            out.add(i).cast::<[R; BLOCK]>().write_unaligned(r);
        }
        i += BLOCK;
    }
    while i < n {
        // SAFETY: as above.
        unsafe { out.add(i).write(f(a.add(i).read(), b.add(i).read())) };
        i += 1;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
unsafe fn choose<T: Copy + Default>(c: *const u8, a: *const T, b: *const T, out: *mut T, n: usize) {
    let mut i = 0;
    while i + BLOCK <= n {
        // SAFETY: as in `map1`.
        unsafe {
            let c = c.add(i).cast::<[u8; BLOCK]>().read_unaligned();
            let (x, y) =
                (a.add(i).cast::<[T; BLOCK]>().read_unaligned(), b.add(i).cast::<[T; BLOCK]>().read_unaligned());
            let mut r = [T::default(); BLOCK];
            for j in 0..BLOCK {
                r[j] = if c[j] != 0 { x[j] } else { y[j] };
            }
            out.add(i).cast::<[T; BLOCK]>().write_unaligned(r);
        }
        i += BLOCK;
    }
    while i < n {
        // SAFETY: as above.
        unsafe { out.add(i).write(if c.add(i).read() != 0 { a.add(i).read() } else { b.add(i).read() }) };
        i += 1;
    }
}

/// `e` to the power of `x`, within 2 units in the last place: `2^n * e^r` with `|r| <= ln(2) / 2` and the polynomial of
/// Cephes' `expf` (Moshier). Without branches, so that loops over it become vector instructions.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let t = x.clamp(-104.0, 89.0);
    let shifted = t * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (t - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e = p * (r * r) + r + 1.0;
    // 2^n in two factors, since n runs from -150 to 129.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |k: i32| f32::from_bits(((k.wrapping_add(127)) as u32) << 23);
    e * power(half) * power(n.wrapping_sub(half))
}

/// A function that takes so many instructions that it is written for whole vectors.
trait Function: Copy + Send + Sync + 'static {
    /// Its values.
    fn of<L: Lanes>(x: L) -> L;
}

macro_rules! functions {
    ($($name:ident($x:ident) $value:expr;)*) => { $(
        #[derive(Clone, Copy)]
        struct $name;
        impl Function for $name {
            #[inline(always)]
            fn of<L: Lanes>($x: L) -> L {
                $value
            }
        }
    )* };
}
functions! {
    Exp(x) x.exp();
    Sigmoid(x) x.sigmoid();
    Silu(x) x / (x.all(1.0) + (x.all(0.0) - x).exp());
    Tanh(x) x.tanh();
    Erf(x) x.erf();
    Gelu(x) {
        let half = x.all(0.5) * x;
        half.mul_add((x * x.all(FRAC_1_SQRT_2)).erf(), half)
    };
    // x * sigmoid(2u) is x / 2 * (1 + tanh u), with u = sqrt(2 / pi) * (x + 0.044715 x^3).
    GeluTanh(x) {
        let u = x * (x * x).mul_add(x.all(-0.071_354_814), x.all(-1.595_769));
        x / (x.all(1.0) + u.exp())
    };
}

/// A function of `n` elements that lie one after the other; the result may lie where they do.
struct Map<F> {
    from: *const f32,
    to: *mut f32,
    n: usize,
    function: std::marker::PhantomData<F>,
}

impl<F: Function> Kernel for Map<F> {
    type Output = ();
    /// # Safety
    /// Both places hold `n` elements and are apart or the same.
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller's; vectors are loaded before their results are stored.
        unsafe {
            let zero = L::splat(0.0);
            for_vectors!((i, n) in self.n => F::of(zero.take(self.from.add(i), n)).put(self.to.add(i), n));
        }
    }
}

fn function<F: Function>(_: F) -> Row {
    let function = std::marker::PhantomData::<F>;
    // SAFETY: the promise of `Row`.
    Box::new(move |x, out, n| unsafe { widest(Map { from: x[0].cast(), to: out.cast(), n, function }) })
}

/// The larger; NaN if either is.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// The smaller; NaN if either is.
#[inline(always)]
pub(super) fn smaller(a: f32, b: f32) -> f32 {
    if a < b || a.is_nan() { a } else { b }
}

/// A kernel on elements that lie one after the other: operands, result, how many. Operands and result are buffers of
/// that many elements, of which the result may be an operand's.
pub(super) type Row = Box<dyn Fn(&[*const u8], *mut u8, usize) + Send + Sync>;

/// Whether an op belongs to this family.
pub(super) fn has(op: &Op) -> bool {
    op.class() == dsgc_ir::Class::Elementwise
}

/// Runs an elementwise op.
pub(super) fn run(l: &mut Launch) -> Result<(), String> {
    let n = l.len(l.result());
    let operands: Vec<DType> = l.op.args.iter().map(|&a| l.dtype(a)).collect();
    if l.op.op == (Op::Div {}) && operands[0] == DType::I32 {
        let divisors: Ptr<i32> = l.arg(1);
        // SAFETY: the operand holds `n` elements.
        if unsafe { divisors.slice(0, n) }.contains(&0) {
            return Err("an integer is divided by zero".into());
        }
    }
    let kernel = row(&l.op.op, &operands);
    let args: Vec<(Ptr<u8>, usize)> = (0..operands.len()).map(|i| (l.arg(i), operands[i].bytes())).collect();
    let (out, width): (Ptr<u8>, usize) = (l.out(0), l.dtype(l.result()).bytes());
    l.threads.run(n, 1, |r| {
        // SAFETY: all buffers hold `n` elements; ranges of threads are apart.
        let at = |&(p, width): &(Ptr<u8>, usize)| unsafe { p.add(r.start * width) }.0.cast_const();
        let all: Vec<*const u8> = args.iter().map(at).collect();
        // SAFETY: as above.
        kernel(&all, unsafe { out.add(r.start * width) }.0, r.len());
    });
    Ok(())
}

/// The kernel of an elementwise op on operands of these types. Integers must not be divided by zero.
pub(super) fn row(op: &Op, operands: &[DType]) -> Row {
    match (operands[0], op) {
        (DType::Bf16, Op::Cast { dtype: DType::F32 }) => unary(from_bf16),
        (DType::F32, Op::Cast { dtype: DType::Bf16 }) => unary(to_bf16),
        (from, Op::Cast { dtype }) => match dtype.is_narrow() || from.is_narrow() {
            true => through(cast(wide(from), wide(*dtype)), operands, *dtype),
            false => cast(from, *dtype),
        },
        (_, Op::Where {}) => match operands[1].bytes() {
            1 => select::<u8>(),
            2 => select::<u16>(),
            4 => select::<u32>(),
            _ => select::<u64>(),
        },
        (DType::F32, op) => floats(op),
        (DType::Bf16 | DType::F16, op) => {
            let compares = matches!(op, Op::Eq {} | Op::Ne {} | Op::Lt {} | Op::Le {});
            through(floats(op), operands, if compares { DType::Bool } else { operands[0] })
        }
        (DType::I32, op) => integers(op),
        (DType::Bool, op) => logic(op),
        (DType::Key | DType::Quantized(_), op) => panic!("bug: `{op}` of {}", operands[0]),
    }
}

/// The type in which narrow floats are computed.
fn wide(dtype: DType) -> DType {
    if dtype.is_narrow() { DType::F32 } else { dtype }
}

fn select<T: Copy + Default + 'static>() -> Row {
    // SAFETY: the promise of `Row`.
    Box::new(|x, out, n| unsafe { choose::<T>(x[0], x[1].cast(), x[2].cast(), out.cast(), n) })
}

fn unary<A: Copy, R: Copy + Default>(f: impl Fn(A) -> R + Copy + Send + Sync + 'static) -> Row {
    // SAFETY: the promise of `Row`.
    Box::new(move |x, out, n| unsafe { map1(x[0].cast::<A>(), out.cast::<R>(), n, f) })
}

fn binary<A: Copy, R: Copy + Default>(f: impl Fn(A, A) -> R + Copy + Send + Sync + 'static) -> Row {
    // SAFETY: the promise of `Row`.
    Box::new(move |x, out, n| unsafe { map2(x[0].cast::<A>(), x[1].cast::<A>(), out.cast::<R>(), n, f) })
}

fn cast(from: DType, to: DType) -> Row {
    match (from, to) {
        (DType::F32, DType::F32) => unary(|x: f32| x),
        (DType::F32, DType::I32) => unary(|x: f32| x as i32),
        (DType::F32, DType::Bool) => unary(|x: f32| u8::from(x != 0.0)),
        (DType::I32, DType::F32) => unary(|x: i32| x as f32),
        (DType::I32, DType::I32) => unary(|x: i32| x),
        (DType::I32, DType::Bool) => unary(|x: i32| u8::from(x != 0)),
        (DType::Bool, DType::F32) => unary(|x: u8| f32::from(x)),
        (DType::Bool, DType::I32) => unary(|x: u8| i32::from(x)),
        (DType::Bool, DType::Bool) => unary(|x: u8| x),
        (from, to) => panic!("bug: a cast from {from} to {to}"),
    }
}

fn floats(op: &Op) -> Row {
    match op {
        Op::Add {} => binary(|a: f32, b: f32| a + b),
        Op::Sub {} => binary(|a: f32, b: f32| a - b),
        Op::Mul {} => binary(|a: f32, b: f32| a * b),
        Op::Div {} => binary(|a: f32, b: f32| a / b),
        Op::Max {} => binary(larger),
        Op::Min {} => binary(smaller),
        Op::Pow {} => binary(f32::powf),
        Op::Eq {} => binary(|a: f32, b: f32| u8::from(a == b)),
        Op::Ne {} => binary(|a: f32, b: f32| u8::from(a != b)),
        Op::Lt {} => binary(|a: f32, b: f32| u8::from(a < b)),
        Op::Le {} => binary(|a: f32, b: f32| u8::from(a <= b)),
        Op::Neg {} => unary(|x: f32| -x),
        Op::Abs {} => unary(f32::abs),
        Op::Exp {} => function(Exp),
        Op::Log {} => unary(f32::ln),
        Op::Sqrt {} => unary(f32::sqrt),
        Op::Tanh {} => function(Tanh),
        Op::Sigmoid {} => function(Sigmoid),
        Op::LogSigmoid {} => unary(|x: f32| smaller(x, 0.0) - exp(-x.abs()).ln_1p()),
        Op::Relu {} => unary(|x: f32| if x > 0.0 || x.is_nan() { x } else { 0.0 }),
        Op::Gelu {} => function(Gelu),
        Op::GeluTanh {} => function(GeluTanh),
        Op::Silu {} => function(Silu),
        Op::Erf {} => function(Erf),
        other => panic!("bug: `{other}` is not elementwise on floats"),
    }
}

fn integers(op: &Op) -> Row {
    match op {
        Op::Add {} => binary(i32::wrapping_add),
        Op::Sub {} => binary(i32::wrapping_sub),
        Op::Mul {} => binary(i32::wrapping_mul),
        Op::Div {} => binary(i32::wrapping_div),
        Op::Max {} => binary(|a: i32, b: i32| a.max(b)),
        Op::Min {} => binary(|a: i32, b: i32| a.min(b)),
        Op::Eq {} => binary(|a: i32, b: i32| u8::from(a == b)),
        Op::Ne {} => binary(|a: i32, b: i32| u8::from(a != b)),
        Op::Lt {} => binary(|a: i32, b: i32| u8::from(a < b)),
        Op::Le {} => binary(|a: i32, b: i32| u8::from(a <= b)),
        Op::Neg {} => unary(i32::wrapping_neg),
        Op::Abs {} => unary(i32::wrapping_abs),
        other => panic!("bug: `{other}` is not elementwise on integers"),
    }
}

fn logic(op: &Op) -> Row {
    match op {
        Op::And {} => binary(|a: u8, b: u8| a & b),
        Op::Or {} => binary(|a: u8, b: u8| a | b),
        Op::Eq {} => binary(|a: u8, b: u8| u8::from(a == b)),
        Op::Ne {} => binary(|a: u8, b: u8| u8::from(a != b)),
        Op::Not {} => unary(|a: u8| u8::from(a == 0)),
        other => panic!("bug: `{other}` is not elementwise on truth values"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst: f64 = 0.0;
        for i in 0..2_000_000 {
            let x = -87.0 + 175.0 * (i as f32 / 2_000_000.0);
            let exact = f64::from(x).exp();
            let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / unit);
        }
        assert!(worst <= 2.0, "off by {worst} units");
        assert_eq!((exp(0.0), exp(-200.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert_eq!((exp(100.0), exp(f32::INFINITY)), (f32::INFINITY, f32::INFINITY));
        assert!(exp(f32::NAN).is_nan());
        assert!((f64::from(exp(-100.0)) - (-100f64).exp()).abs() < 2e-45, "subnormal results");
    }
}
