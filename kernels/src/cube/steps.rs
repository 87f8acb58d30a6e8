//! Bodies of regions as lists of steps, which kernels go through for an element.

// Loops over steps are unrolled by their numbers.
#![allow(clippy::needless_range_loop)]

use cubecl::prelude::*;
use dsgc_ir::{Body, DType, Op};

use super::index::{Store, element, joined, offset, rounded, stored, strides};
use super::math;

/// A function of one float.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Function {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    Tanh,
    Sigmoid,
    LogSigmoid,
    Relu,
    Gelu,
    GeluTanh,
    Silu,
    Erf,
}

/// A function of two numbers of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Pair {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    Pow,
}

/// A comparison of two numbers of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
}

/// What numbers are in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Number {
    Float,
    Int,
    Truth,
}

/// One step of a kernel; numbers name earlier values, operands first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Constant(u32),
    Same(usize),
    Float(Function, usize),
    NegInt(usize),
    AbsInt(usize),
    Floats(Pair, usize, usize),
    Ints(Pair, usize, usize),
    CompareFloats(Comparison, usize, usize),
    CompareInts(Comparison, usize, usize),
    And(usize, usize),
    Or(usize, usize),
    Not(usize),
    Where(usize, usize, usize),
    IntOfFloat(usize),
    FloatOfInt(usize),
    TruthOfFloat(usize),
    TruthOfInt(usize),
}

/// The sum of the first two values.
pub(super) const SUM: Step = Step::Floats(Pair::Add, 1, 0);

/// Where an operand's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// At the index of the result.
    Same,
    /// It has one.
    One,
    /// By coordinates: extents and strides from these numbers on.
    Strided { extents: usize, strides: usize, rank: usize },
}

/// How a kernel has a value of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Item {
    /// Not at all: it is not needed.
    Absent,
    /// It is an operand.
    Load(usize, Place, Store),
    /// The kernel has it already, under this number.
    Given(usize),
    /// It is computed, and rounded to what it is stored as.
    Do(Step, Store),
}

#[cube]
fn function(x: f32, #[comptime] which: Function) -> f32 {
    match which {
        Function::Neg => -x,
        Function::Abs => x.abs(),
        Function::Exp => math::exp(x),
        Function::Log => math::log(x),
        Function::Sqrt => x.sqrt(),
        Function::Tanh => math::tanh(x),
        Function::Sigmoid => math::sigmoid(x),
        Function::LogSigmoid => math::log_sigmoid(x),
        Function::Relu => math::larger(x, 0.0f32),
        Function::Gelu => math::gelu(x),
        Function::GeluTanh => math::gelu_tanh(x),
        Function::Silu => x * math::sigmoid(x),
        Function::Erf => math::erf(x),
    }
}

#[cube]
fn floats(a: f32, b: f32, #[comptime] which: Pair) -> f32 {
    match which {
        Pair::Add => a + b,
        Pair::Sub => a - b,
        Pair::Mul => a * b,
        Pair::Div => a / b,
        Pair::Max => math::larger(a, b),
        Pair::Min => math::smaller(a, b),
        Pair::Pow => math::pow(a, b),
    }
}

#[cube]
fn ints(a: i32, b: i32, faults: &mut Array<u32>, code: u32, #[comptime] which: Pair) -> i32 {
    match which {
        Pair::Add => a + b,
        Pair::Sub => a - b,
        Pair::Mul => a * b,
        Pair::Div => {
            if b == 0i32 {
                faults[0] = code;
            }
            // The one quotient that is too large wraps to what it came from.
            select(b == -1i32, -a, a / select(b == 0i32 || b == -1i32, 1i32, b))
        }
        Pair::Max | Pair::Pow => select(a > b, a, b),
        Pair::Min => select(a < b, a, b),
    }
}

#[cube]
fn compare_floats(a: f32, b: f32, #[comptime] which: Comparison) -> bool {
    match which {
        Comparison::Eq => a == b,
        Comparison::Ne => math::is_nan(a) || math::is_nan(b) || a != b,
        Comparison::Lt => a < b,
        Comparison::Le => a <= b,
    }
}

#[cube]
fn compare_ints(a: i32, b: i32, #[comptime] which: Comparison) -> bool {
    match which {
        Comparison::Eq => a == b,
        Comparison::Ne => a != b,
        Comparison::Lt => a < b,
        Comparison::Le => a <= b,
    }
}

/// Truncated, the nearest integer where there is none, 0 of NaN.
#[cube]
fn int_of_float(x: f32) -> u32 {
    let inside = i32::cast_from(min(max(x, -2_147_483_648.0f32), 2_147_483_520.0f32));
    let int = select(x >= 2_147_483_648.0f32, 2_147_483_647i32, inside);
    select(math::is_nan(x), 0u32, u32::reinterpret(int))
}

#[cube]
fn step(values: &Sequence<u32>, faults: &mut Array<u32>, code: u32, #[comptime] step: Step) -> u32 {
    match step {
        // CubeCL writes constants where they are used, and CUDA's compiler reinterprets none; so something is added that is
        // always 0, since there are fewer ops than that.
        Step::Constant(bits) => bits.runtime() | (code >> 31u32),
        Step::Same(a) => values[a],
        Step::Float(which, a) => u32::reinterpret(function(f32::reinterpret(values[a]), which)),
        Step::NegInt(a) => 0u32 - values[a],
        Step::AbsInt(a) => {
            let x = values[a];
            select(x >= 0x8000_0000u32, 0u32 - x, x)
        }
        Step::Floats(which, a, b) => {
            u32::reinterpret(floats(f32::reinterpret(values[a]), f32::reinterpret(values[b]), which))
        }
        Step::Ints(which, a, b) => {
            u32::reinterpret(ints(i32::reinterpret(values[a]), i32::reinterpret(values[b]), faults, code, which))
        }
        Step::CompareFloats(which, a, b) => {
            u32::cast_from(compare_floats(f32::reinterpret(values[a]), f32::reinterpret(values[b]), which))
        }
        Step::CompareInts(which, a, b) => {
            u32::cast_from(compare_ints(i32::reinterpret(values[a]), i32::reinterpret(values[b]), which))
        }
        Step::And(a, b) => values[a] & values[b],
        Step::Or(a, b) => values[a] | values[b],
        Step::Not(a) => 1u32 - values[a],
        Step::Where(condition, a, b) => select(values[condition] != 0u32, values[a], values[b]),
        Step::IntOfFloat(a) => int_of_float(f32::reinterpret(values[a])),
        Step::FloatOfInt(a) => u32::reinterpret(f32::cast_from(i32::reinterpret(values[a]))),
        Step::TruthOfFloat(a) => u32::cast_from((values[a] & 0x7fff_ffffu32) != 0u32),
        Step::TruthOfInt(a) => u32::cast_from(values[a] != 0u32),
    }
}

/// All values of a body for an element, by its index among those of the places. What the kernel has already is `given`.
#[cube]
pub(super) fn evaluate(
    operands: &Sequence<Array<u32>>,
    numbers: &Sequence<u32>,
    given: &Sequence<u32>,
    faults: &mut Array<u32>,
    i: u32,
    code: u32,
    #[comptime] items: Vec<Item>,
) -> Sequence<u32> {
    let mut values = Sequence::<u32>::new();
    #[unroll]
    for k in 0..comptime!(items.len()) {
        let item = comptime!(items[k]);
        let value = match item {
            Item::Absent => 0u32.runtime(),
            Item::Load(operand, place, store) => {
                let at = match place {
                    Place::Same => i,
                    Place::One => 0u32.runtime(),
                    Place::Strided { extents, strides, rank } => offset(i, numbers, extents, strides, rank),
                };
                element(&operands[operand], at, store)
            }
            Item::Given(which) => given[which],
            Item::Do(which, store) => rounded(step(&values, faults, code, which), store),
        };
        values.push(value);
    }
    values
}

/// Puts results of an element into words: it is number `j` of those of a unit, which has `each`.
#[cube]
pub(super) fn pack(
    packed: &mut Array<u32>,
    values: &Sequence<u32>,
    #[comptime] j: u32,
    #[comptime] each: u32,
    #[comptime] results: Vec<Made>,
) {
    #[unroll]
    for r in 0..comptime!(results.len()) {
        let made = comptime!(results[r]);
        let own = comptime!(made.store.each());
        let word = comptime!(r * each as usize + (j / own) as usize);
        let bits = stored(values[made.value], made.store);
        if comptime!(j.is_multiple_of(own)) {
            packed[word] = bits;
        } else {
            packed[word] |= bits << comptime!(j % own * (32 / own));
        }
    }
}

/// Writes the words of a unit's elements, which begin at `first`, of those before `end`.
#[cube]
pub(super) fn write(
    results: &mut Sequence<Array<u32>>,
    packed: &Array<u32>,
    first: u32,
    end: u32,
    #[comptime] each: u32,
    #[comptime] made: Vec<Made>,
) {
    #[unroll]
    for r in 0..comptime!(made.len()) {
        let result = comptime!(made[r]);
        let own = comptime!(result.store.each());
        let out = results.index_mut(result.result);
        #[unroll]
        for w in 0..comptime!(each / own) {
            if first + comptime!(w * own) < end {
                out[(first / own + w) as usize] = packed[comptime!(r * each as usize + w as usize)];
            }
        }
    }
}

/// A result of a kernel: which, of which value, and how it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Made {
    pub(super) result: usize,
    pub(super) value: usize,
    pub(super) store: Store,
}

/// Elements that a unit must have so that no word of a result has elements of two.
pub(super) fn each(results: &[Made]) -> u32 {
    results.iter().map(|made| made.store.each()).max().unwrap_or(1)
}

/// The steps of a body, whose values have these types.
pub(super) fn steps(body: &Body, types: &[DType]) -> Vec<Item> {
    let step = |(i, step): (usize, &dsgc_ir::Step)| {
        let own: Vec<DType> = step.args.iter().map(|&a| types[a]).collect();
        Item::Do(lower(&step.op, &step.args, &own), Store::of(types[body.operands() + i]))
    };
    body.steps().iter().enumerate().map(step).collect()
}

/// Where the elements of operands of these shapes are among those of a shape to which they are stretched; numbers for that
/// are appended.
pub(super) fn places(shape: &[usize], operands: &[Vec<usize>], numbers: &mut Vec<usize>) -> Vec<Place> {
    let stretched = |own: &Vec<usize>| {
        let (lead, dense) = (shape.len() - own.len(), strides(own));
        (0..shape.len()).map(|d| if d < lead || own[d - lead] == 1 { 0 } else { dense[d - lead] }).collect()
    };
    let all: Vec<Vec<usize>> = operands.iter().map(stretched).collect();
    let (extents, all) = joined(shape, &all);
    let (dense, rank, at) = (strides(&extents), extents.len(), numbers.len());
    numbers.extend(&extents);
    let mut place = |(shape, own): (&Vec<usize>, Vec<usize>)| {
        if shape.iter().product::<usize>() == 1 {
            Place::One
        } else if own == dense {
            Place::Same
        } else {
            numbers.extend(own);
            Place::Strided { extents: at, strides: numbers.len() - rank, rank }
        }
    };
    operands.iter().zip(all).map(&mut place).collect()
}

fn number(dtype: DType) -> Number {
    match dtype {
        DType::F32 | DType::Bf16 | DType::F16 => Number::Float,
        DType::I32 => Number::Int,
        DType::Bool => Number::Truth,
        DType::Key | DType::Quantized(_) => panic!("bug: {dtype} in a kernel of numbers"),
    }
}

/// A step for an elementwise op on values of these types.
pub(super) fn lower(op: &Op, args: &[usize], types: &[DType]) -> Step {
    let float = |f| Step::Float(f, args[0]);
    let is_float = types.first().is_some_and(|&dtype| number(dtype) == Number::Float);
    let pair =
        |which| if is_float { Step::Floats(which, args[0], args[1]) } else { Step::Ints(which, args[0], args[1]) };
    let compare = |which| {
        let make = if is_float { Step::CompareFloats } else { Step::CompareInts };
        make(which, args[0], args[1])
    };
    match op {
        Op::Const { value, dtype } => Step::Constant(bits(*value, *dtype)),
        Op::Add {} => pair(Pair::Add),
        Op::Sub {} => pair(Pair::Sub),
        Op::Mul {} => pair(Pair::Mul),
        Op::Div {} => pair(Pair::Div),
        Op::Max {} => pair(Pair::Max),
        Op::Min {} => pair(Pair::Min),
        Op::Pow {} => pair(Pair::Pow),
        Op::Neg {} if is_float => float(Function::Neg),
        Op::Neg {} => Step::NegInt(args[0]),
        Op::Abs {} if is_float => float(Function::Abs),
        Op::Abs {} => Step::AbsInt(args[0]),
        Op::Exp {} => float(Function::Exp),
        Op::Log {} => float(Function::Log),
        Op::Sqrt {} => float(Function::Sqrt),
        Op::Tanh {} => float(Function::Tanh),
        Op::Sigmoid {} => float(Function::Sigmoid),
        Op::LogSigmoid {} => float(Function::LogSigmoid),
        Op::Relu {} => float(Function::Relu),
        Op::Gelu {} => float(Function::Gelu),
        Op::GeluTanh {} => float(Function::GeluTanh),
        Op::Silu {} => float(Function::Silu),
        Op::Erf {} => float(Function::Erf),
        Op::Eq {} => compare(Comparison::Eq),
        Op::Ne {} => compare(Comparison::Ne),
        Op::Lt {} => compare(Comparison::Lt),
        Op::Le {} => compare(Comparison::Le),
        Op::And {} => Step::And(args[0], args[1]),
        Op::Or {} => Step::Or(args[0], args[1]),
        Op::Not {} => Step::Not(args[0]),
        Op::Where {} => Step::Where(args[0], args[1], args[2]),
        Op::Cast { dtype } => match (number(types[0]), number(*dtype)) {
            (Number::Float, Number::Int) => Step::IntOfFloat(args[0]),
            (Number::Float, Number::Truth) => Step::TruthOfFloat(args[0]),
            (Number::Int, Number::Truth) => Step::TruthOfInt(args[0]),
            (Number::Int | Number::Truth, Number::Float) => Step::FloatOfInt(args[0]),
            (Number::Float, Number::Float)
            | (Number::Int | Number::Truth, Number::Int)
            | (Number::Truth, Number::Truth) => Step::Same(args[0]),
        },
        other => panic!("bug: `{}` is no step of a region", other.name()),
    }
}

/// A constant as a word: floats in single precision.
fn bits(value: f64, dtype: DType) -> u32 {
    match number(dtype) {
        Number::Float => (value as f32).to_bits(),
        Number::Int => (value as i32).cast_unsigned(),
        Number::Truth => u32::from(value != 0.0),
    }
}

/// A constant as the bits of an element.
pub(super) fn element_bits(value: f64, dtype: DType) -> u32 {
    match dtype {
        DType::Bf16 => u32::from(half::bf16::from_f32(value as f32).to_bits()),
        DType::F16 => u32::from(half::f16::from_f32(value as f32).to_bits()),
        dtype => bits(value, dtype),
    }
}
