//! Elementwise ops, alone and in fused regions: one kernel per body, made of a list of steps when it is first launched.

use cubecl::prelude::*;
use dsgc_ir::{Body, DType, Op, Value};

use super::index::{element, joined, offset, strides};
use super::{Launch, math, numbers};

/// A function of one float.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Function {
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
enum Pair {
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
enum Comparison {
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
enum Step {
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

/// Where an operand's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Place {
    /// At the index of the result.
    Same,
    /// It has one.
    One,
    /// By coordinates, with the strides from this number on.
    Strided(usize),
}

/// All that a compiled kernel depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Plan {
    rank: usize,
    /// Place, and whether elements are bytes.
    operands: Vec<(Place, bool)>,
    steps: Vec<Step>,
    /// Which value, and whether elements are bytes.
    results: Vec<(usize, bool)>,
    /// Elements of one unit: four where a result is bytes, which share a word.
    each: u32,
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
        Step::Constant(bits) => bits.runtime(),
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

#[cube(launch_unchecked)]
fn region(
    operands: &Sequence<Array<u32>>,
    results: &mut Sequence<Array<u32>>,
    faults: &mut Array<u32>,
    numbers: &Sequence<u32>,
    len: u32,
    code: u32,
    #[comptime] plan: Plan,
) {
    let first = ABSOLUTE_POS as u32 * comptime!(plan.each);
    let count = comptime!(plan.results.len());
    let mut packed = Array::<u32>::new(count);
    #[unroll]
    for r in 0..count {
        packed[r] = 0u32;
    }
    #[unroll]
    for j in 0..comptime!(plan.each) {
        let i = first + j;
        if i < len {
            let mut values = Sequence::<u32>::new();
            #[unroll]
            for k in 0..comptime!(plan.operands.len()) {
                let (place, bytes) = comptime!(plan.operands[k]);
                let at = match place {
                    Place::Same => i,
                    Place::One => 0u32.runtime(),
                    Place::Strided(strides) => offset(i, numbers, 0usize, strides, comptime!(plan.rank)),
                };
                values.push(element(&operands[k], at, bytes));
            }
            #[unroll]
            for s in 0..comptime!(plan.steps.len()) {
                let value = step(&values, faults, code, comptime!(plan.steps[s]));
                values.push(value);
            }
            #[unroll]
            for r in 0..count {
                let (value, bytes) = comptime!(plan.results[r]);
                if comptime!(bytes) {
                    packed[r] |= values[value] << comptime!(8 * j);
                } else {
                    let out = results.index_mut(r);
                    out[i as usize] = values[value];
                }
            }
        }
    }
    if first < len {
        #[unroll]
        for r in 0..count {
            let (_, bytes) = comptime!(plan.results[r]);
            if comptime!(bytes) {
                let out = results.index_mut(r);
                out[(first / 4u32) as usize] = packed[r];
            }
        }
    }
}

fn number(dtype: DType) -> Number {
    match dtype {
        DType::F32 => Number::Float,
        DType::I32 => Number::Int,
        DType::Bool => Number::Truth,
        other => panic!("bug: {other} in a kernel of 32-bit numbers"),
    }
}

/// A step for an elementwise op on values of these types.
fn lower(op: &Op, args: &[usize], types: &[DType]) -> Step {
    let float = |f| Step::Float(f, args[0]);
    let is_float = types.first() == Some(&DType::F32);
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

/// A constant as a word.
pub(super) fn bits(value: f64, dtype: DType) -> u32 {
    match number(dtype) {
        Number::Float => (value as f32).to_bits(),
        Number::Int => (value as i32).cast_unsigned(),
        Number::Truth => u32::from(value != 0.0),
    }
}

/// Runs an elementwise op.
pub(super) fn single<R: Runtime>(l: &Launch<R>) {
    let types: Vec<DType> = l.op.args.iter().map(|&v| l.dtype(v)).collect();
    let args: Vec<usize> = (0..types.len()).collect();
    let step = lower(&l.op.op, &args, &types);
    launch(l, vec![step], &[types.len()], &l.shape(l.op.result()));
}

/// Runs a region.
pub(super) fn fused<R: Runtime>(l: &Launch<R>, body: &Body) {
    let types: Vec<DType> = l.op.args.iter().map(|&v| l.dtype(v)).collect();
    let all = body.dtypes(&types).unwrap_or_else(|why| panic!("bug: a wrong body: {why}"));
    let steps = body.steps().iter().map(|step| {
        let types: Vec<DType> = step.args.iter().map(|&a| all[a]).collect();
        lower(&step.op, &step.args, &types)
    });
    launch(l, steps.collect(), body.results(), &l.shape(l.op.results().next().expect("a region has results")));
}

fn launch<R: Runtime>(l: &Launch<R>, steps: Vec<Step>, results: &[usize], shape: &[usize]) {
    let len: usize = shape.iter().product();
    if len == 0 {
        return;
    }
    let stretched = |&value: &Value| {
        let own = l.shape(value);
        let (lead, dense) = (shape.len() - own.len(), strides(&own));
        (0..shape.len()).map(|d| if d < lead || own[d - lead] == 1 { 0 } else { dense[d - lead] }).collect()
    };
    let all: Vec<Vec<usize>> = l.op.args.iter().map(stretched).collect();
    let (extents, all) = joined(shape, &all);
    let (dense, mut given) = (strides(&extents), extents.clone());
    let mut operands = Vec::new();
    for (&value, own) in l.op.args.iter().zip(&all) {
        let place = if l.len(value) == 1 {
            Place::One
        } else if *own == dense {
            Place::Same
        } else {
            let at = given.len();
            given.extend(own);
            Place::Strided(at)
        };
        operands.push((place, l.dtype(value) == DType::Bool));
    }
    let made: Vec<Value> = l.op.results().collect();
    let results: Vec<(usize, bool)> =
        results.iter().zip(&made).map(|(&value, &result)| (value, l.dtype(result) == DType::Bool)).collect();
    let each = if results.iter().any(|r| r.1) { 4 } else { 1 };
    let plan = Plan { rank: extents.len(), operands, steps, results, each };
    let (cubes, cube) = l.units(len.div_ceil(each as usize));
    // SAFETY: units beyond the last element do nothing; strides are those of the operands' shapes.
    unsafe {
        region::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            l.op.args.iter().map(|&v| l.words(v)).collect(),
            made.iter().map(|&v| l.words(v)).collect(),
            l.faults(),
            numbers(&given),
            len as u32,
            l.code,
            plan,
        );
    }
}
