//! How a region runs on a block of elements: in stages, and where every value of its body lies between them.
//!
//! Arithmetic of one stage is compiled to one loop whose values stay in registers. Functions that a library computes,
//! and arithmetic that is alone, are a stage each and run the kernel of their op, whose vectors are as wide as the
//! machine's.
//!
//! ```text
//! $3 = mul $0, $1
//! $4 = add $3, $2      code ($3, $4)
//! $5 = tanh $4         row tanh
//! $6 = mul $5, $0      row mul
//! ```

use dsgc_ir::{Body, DType, Op};

/// Where a value of a body lies while a block runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// In the operand's own place, or stretched in a buffer.
    Operand,
    /// In the place of this result.
    Result(usize),
    /// In a block of the workspace, counted from 0.
    Buffer(usize),
    /// In a register, or in the code as a constant.
    Nowhere,
}

/// What runs over a block before the next stage begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The kernel of the op that gives this value.
    Row(usize),
    /// Compiled code for these values.
    Code(Vec<usize>),
}

impl Stage {
    /// The values that the stage computes.
    pub(super) fn values(&self) -> &[usize] {
        match self {
            Stage::Row(value) => std::slice::from_ref(value),
            Stage::Code(values) => values,
        }
    }
}

/// The plan of a region.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The element type of every value.
    pub(super) dtypes: Vec<DType>,
    /// The place of every value.
    pub(super) homes: Vec<Home>,
    /// In the order in which they run.
    pub(super) stages: Vec<Stage>,
    /// Values in buffers that are results, with the number of the result: copied when all stages are done.
    pub(super) copies: Vec<(usize, usize)>,
    /// How many blocks of workspace the values need.
    pub(super) buffers: usize,
}

impl Plan {
    /// The plan of a body on operands of these types. Without a compiler every step runs the kernel of its op.
    pub(super) fn new(body: &Body, operands: &[DType], compiler: bool) -> Plan {
        let dtypes = body.dtypes(operands).unwrap_or_else(|why| panic!("bug: a region that the verifier saw: {why}"));
        let stages = stages(body, &dtypes, compiler);
        let mut plan = Plan { homes: vec![Home::Nowhere; dtypes.len()], dtypes, stages, copies: vec![], buffers: 0 };
        plan.homes[..operands.len()].fill(Home::Operand);
        for (at, stage) in plan.stages.iter().enumerate() {
            // A result may be in the place of an operand: nobody may read operands after it is written there.
            let reads =
                |stage: &Stage| stage.values().iter().any(|&v| step_args(body, v).iter().any(|&a| a < operands.len()));
            let direct = !plan.stages[at + 1..].iter().any(reads);
            for &value in stage.values() {
                let result = body.results().iter().position(|&r| r == value);
                let outside = |other: &Stage| other.values().iter().any(|&v| step_args(body, v).contains(&value));
                let elsewhere = plan.stages.iter().enumerate().any(|(i, other)| i != at && outside(other));
                plan.homes[value] = match result {
                    Some(result) if direct => Home::Result(result),
                    None if !elsewhere => Home::Nowhere,
                    _ => {
                        plan.buffers += 1;
                        Home::Buffer(plan.buffers - 1)
                    }
                };
            }
        }
        // Kernels of ops take constants from memory.
        for (i, step) in body.steps().iter().enumerate() {
            let value = operands.len() + i;
            let row = |stage: &Stage| matches!(stage, Stage::Row(v) if step_args(body, *v).contains(&value));
            if matches!(step.op, Op::Const { .. }) && (body.results().contains(&value) || plan.stages.iter().any(row)) {
                plan.homes[value] = Home::Buffer(plan.buffers);
                plan.buffers += 1;
            }
        }
        for (result, &value) in body.results().iter().enumerate() {
            if matches!(plan.homes[value], Home::Buffer(_)) {
                plan.copies.push((value, result));
            }
        }
        plan
    }
}

/// The operands of the step that gives a value; none for an operand of the region.
pub(super) fn step_args(body: &Body, value: usize) -> &[usize] {
    value.checked_sub(body.operands()).map_or(&[], |step| &body.steps()[step].args)
}

/// Whether an op is left to its kernel: a library's function, or many instructions that gain from wide vectors.
fn is_function(op: &Op) -> bool {
    matches!(
        op,
        Op::Pow {}
            | Op::Exp {}
            | Op::Log {}
            | Op::Tanh {}
            | Op::Sigmoid {}
            | Op::LogSigmoid {}
            | Op::Gelu {}
            | Op::GeluTanh {}
            | Op::Silu {}
            | Op::Erf {}
    )
}

fn stages(body: &Body, dtypes: &[DType], compiler: bool) -> Vec<Stage> {
    // Even levels are arithmetic, odd ones functions; a step stands on the first level where its operands are there.
    let mut levels: Vec<usize> = vec![0; body.operands()];
    for (i, step) in body.steps().iter().enumerate() {
        let after = step.args.iter().map(|&a| levels[a]).max().unwrap_or(0);
        // Code knows bf16, whose numbers are the upper halves of others, and leaves f16 to kernels.
        let half = |v: usize| dtypes[v] == DType::F16 && !matches!(step.op, Op::Const { .. });
        let half = half(body.operands() + i) || step.args.iter().any(|&a| half(a));
        let parity = usize::from(is_function(&step.op) || half);
        levels.push(if after % 2 == parity { after } else { after + 1 });
    }
    let mut stages = Vec::new();
    for level in 0..=levels.iter().copied().max().unwrap_or(0) {
        let on_level: Vec<usize> = (body.operands()..levels.len())
            .filter(|&v| levels[v] == level && !matches!(body.steps()[v - body.operands()].op, Op::Const { .. }))
            .collect();
        if compiler && level % 2 == 0 && on_level.len() > 1 {
            stages.push(Stage::Code(on_level));
        } else {
            stages.extend(on_level.into_iter().map(Stage::Row));
        }
    }
    stages
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsgc_ir::Op;

    fn body(text: &str) -> Body {
        let attributes = [("shape".to_string(), "[4]".to_string()), ("body".to_string(), text.to_string())];
        match Op::from_text("fused", &attributes) {
            Ok(Op::Fused { body, .. }) => body,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn arithmetic_is_compiled_and_functions_are_not() {
        let body = body(
            "{$2 = mul $0, $1; $3 = add $2, $1; $4 = tanh $3; $5 = const value=2.0 dtype=f32; $6 = mul $4, $5; return $6}",
        );
        let plan = Plan::new(&body, &[DType::F32; 2], true);
        assert_eq!(plan.stages, [Stage::Code(vec![2, 3]), Stage::Row(4), Stage::Row(6)]);
        let (operand, buffer) = (Home::Operand, Home::Buffer);
        assert_eq!(plan.homes, [operand, operand, Home::Nowhere, buffer(0), buffer(1), buffer(2), Home::Result(0)]);
        let plain = Plan::new(&body, &[DType::F32; 2], false);
        assert_eq!(plain.stages, [2, 3, 4, 6].map(Stage::Row));
    }

    #[test]
    fn results_wait_until_operands_were_read_for_the_last_time() {
        let body = body("{$1 = neg $0; $2 = abs $1; $3 = exp $2; $4 = mul $3, $0; return $2, $4}");
        let plan = Plan::new(&body, &[DType::F32], true);
        assert_eq!(plan.stages, [Stage::Code(vec![1, 2]), Stage::Row(3), Stage::Row(4)]);
        assert_eq!(plan.copies, [(2, 0)]);
        assert_eq!(plan.homes[4], Home::Result(1));
    }
}
