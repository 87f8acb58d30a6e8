//! Random bodies of fused regions.

use super::{Rng, plain};
use crate::body::{Along, Body, Step};
use crate::dim::Dim;
use crate::infer::infer;
use crate::op::Op;
use crate::types::{DType, Type};

/// A body on operands of these types, with a reduction of dims if it is given any. It uses all operands; what it does not
/// use itself are its results.
pub(super) fn random_body(rng: &mut Rng, operands: &[DType], reduction: Option<(Along, Vec<usize>)>) -> Body {
    let mut draw = Draw { rng, dtypes: operands.to_vec(), steps: Vec::new(), used: vec![false; operands.len()] };
    let least = draw.rng.between(1, 6) as usize;
    while draw.steps.len() < least || draw.used[..operands.len()].contains(&false) {
        let new = draw.used[..operands.len()].iter().position(|used| !used);
        let x = new.unwrap_or_else(|| draw.rng.below(draw.dtypes.len()));
        draw.step_on(x);
    }
    if let Some((along, axes)) = reduction {
        let reduced = draw.reduce(axes);
        // Only values of rows are for other steps.
        if along == Along::Rows {
            for _ in 0..draw.rng.below(5) {
                let x = if draw.rng.once_in(2) { reduced } else { draw.rng.below(draw.dtypes.len()) };
                draw.step_on(x);
            }
        }
    }
    let results = (operands.len()..draw.dtypes.len()).filter(|&v| !draw.used[v]).collect();
    Body::new(operands.len(), draw.steps, results)
}

struct Draw<'a> {
    rng: &'a mut Rng,
    /// Of every value, operands first.
    dtypes: Vec<DType>,
    steps: Vec<Step>,
    used: Vec<bool>,
}

impl Draw<'_> {
    fn push(&mut self, op: Op, args: &[usize]) -> usize {
        let dims = match &op {
            Op::ReduceSum { axes } | Op::ReduceMax { axes } | Op::ReduceMin { axes } => {
                axes.iter().max().map_or(0, |a| a + 1)
            }
            _ => 0,
        };
        let types: Vec<Type> = args.iter().map(|&a| Type::new(self.dtypes[a], vec![Dim::from(1i64); dims])).collect();
        let results = infer(&op, &types, None).unwrap_or_else(|why| panic!("the fuzzer drew the step `{op}`: {why}"));
        args.iter().for_each(|&a| self.used[a] = true);
        self.dtypes.push(results[0].dtype);
        self.steps.push(Step { op, args: args.to_vec() });
        self.used.push(false);
        self.dtypes.len() - 1
    }

    /// A reduction of a number.
    fn reduce(&mut self, axes: Vec<usize>) -> usize {
        let numbers: Vec<usize> = (0..self.dtypes.len()).filter(|&v| self.dtypes[v] != DType::Bool).collect();
        let x = match numbers.is_empty() {
            true => self.push(Op::Cast { dtype: DType::F32 }, &[0]),
            false => self.rng.choose(&numbers),
        };
        let op = match self.rng.below(3) {
            0 => Op::ReduceMax { axes },
            1 => Op::ReduceMin { axes },
            _ => Op::ReduceSum { axes },
        };
        self.push(op, &[x])
    }

    fn constant(&mut self, dtype: DType) -> usize {
        let value = match dtype {
            DType::Bool => self.rng.choose(&[0.0, 1.0]),
            DType::I32 => self.rng.between(-2, 3) as f64,
            DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) | DType::Key => {
                self.rng.choose(&[0.0, -0.0, 1.0, -1.0, 2.0, 0.1, -1.75])
            }
        };
        self.push(Op::Const { value, dtype }, &[])
    }

    /// A value of the type of `x`; now and then a new constant.
    fn like(&mut self, x: usize) -> usize {
        let dtype = self.dtypes[x];
        let all: Vec<usize> = (0..self.dtypes.len()).filter(|&v| self.dtypes[v] == dtype).collect();
        if self.rng.once_in(4) { self.constant(dtype) } else { self.rng.choose(&all) }
    }

    /// A step that uses a value, with the steps that keep its numbers finite.
    fn step_on(&mut self, x: usize) {
        let names: &[&str] = match self.dtypes[x] {
            DType::F32 | DType::Bf16 | DType::F16 | DType::Quantized(_) => &[
                "add",
                "sub",
                "mul",
                "div",
                "max",
                "min",
                "pow",
                "neg",
                "abs",
                "exp",
                "log",
                "sqrt",
                "tanh",
                "sigmoid",
                "log_sigmoid",
                "relu",
                "gelu",
                "gelu_tanh",
                "silu",
                "erf",
                "eq",
                "ne",
                "lt",
                "le",
                "where",
                "cast",
            ],
            DType::I32 => &["add", "sub", "mul", "max", "min", "neg", "abs", "eq", "ne", "lt", "le", "where", "cast"],
            DType::Bool | DType::Key => &["and", "or", "not", "eq", "ne", "where", "cast"],
        };
        let name = self.rng.choose(names);
        match name {
            "exp" => {
                let tame = self.push(Op::Tanh {}, &[x]);
                self.push(Op::Exp {}, &[tame]);
            }
            "sqrt" => {
                let tame = self.push(Op::Abs {}, &[x]);
                self.push(Op::Sqrt {}, &[tame]);
            }
            "log" | "pow" => {
                let least = self.push(Op::Const { value: 0.1, dtype: DType::F32 }, &[]);
                let tame = self.push(Op::Abs {}, &[x]);
                let tame = self.push(Op::Max {}, &[tame, least]);
                if name == "log" {
                    self.push(Op::Log {}, &[tame]);
                } else {
                    let exponent = self.constant(DType::F32);
                    self.push(Op::Pow {}, &[tame, exponent]);
                }
            }
            "cast" => {
                let dtype = self.rng.choose(&[DType::F32, DType::I32, DType::Bool]);
                self.push(Op::Cast { dtype }, &[x]);
            }
            "where" => {
                let conditions: Vec<usize> =
                    (0..self.dtypes.len()).filter(|&v| self.dtypes[v] == DType::Bool).collect();
                let condition = match conditions.is_empty() {
                    true => self.constant(DType::Bool),
                    false => self.rng.choose(&conditions),
                };
                let other = self.like(x);
                let both = if self.rng.once_in(2) { [x, other] } else { [other, x] };
                self.push(Op::Where {}, &[condition, both[0], both[1]]);
            }
            "add" | "sub" | "mul" | "div" | "max" | "min" | "eq" | "ne" | "lt" | "le" | "and" | "or" => {
                let other = self.like(x);
                let both = if self.rng.once_in(2) { [x, other] } else { [other, x] };
                self.push(plain(name), &both);
            }
            _ => {
                self.push(plain(name), &[x]);
            }
        }
    }
}
