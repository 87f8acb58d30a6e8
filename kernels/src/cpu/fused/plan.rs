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
//!
//! A reduction is a stage too. What it needs comes first; all else, which may need the values of rows, comes behind it.

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
    /// The reduction, whose value this is.
    Reduce(usize),
}

impl Stage {
    /// The values that the stage computes.
    pub(super) fn values(&self) -> &[usize] {
        match self {
            Stage::Row(value) | Stage::Reduce(value) => std::slice::from_ref(value),
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
    /// The values of the row behind the reduction's, in order.
    pub(super) row_steps: Vec<usize>,
    /// Per value that a step of the row takes or gives, the block of the workspace with one for every row.
    pub(super) row_homes: Vec<Option<usize>>,
    /// How many blocks of workspace the values need.
    pub(super) buffers: usize,
}

impl Plan {
    /// The plan of a body on operands of these types, where these of its values are of the row. Without a compiler every
    /// step runs the kernel of its op.
    pub(super) fn new(body: &Body, operands: &[DType], rows: &[bool], compiler: bool) -> Plan {
        let dtypes = body.dtypes(operands).unwrap_or_else(|why| panic!("bug: a region that the verifier saw: {why}"));
        let stages = stages(body, &dtypes, rows, compiler);
        let n = dtypes.len();
        let mut plan = Plan {
            homes: vec![Home::Nowhere; n],
            dtypes,
            stages,
            copies: vec![],
            row_steps: (0..n).filter(|&v| rows[v] && body.reduction().is_none_or(|r| r.value != v)).collect(),
            row_homes: vec![None; n],
            buffers: 0,
        };
        plan.homes[..operands.len()].fill(Home::Operand);
        let again = plan.reduce().filter(|&at| plan.runs_again(at, rows));
        for (at, stage) in plan.stages.iter().enumerate() {
            let takes =
                |stage: &Stage, value: usize| stage.values().iter().any(|&v| step_args(body, v).contains(&value));
            // A result may be in the place of an operand: nobody may read operands after it is written there.
            let reads = |stage: &Stage| (0..operands.len()).any(|operand| takes(stage, operand));
            let direct = !plan.stages[at + 1..].iter().any(reads) && again.is_none_or(|reduce| at > reduce);
            for &value in stage.values() {
                let result = body.results().iter().position(|&r| r == value);
                let elsewhere = plan.stages.iter().enumerate().any(|(i, other)| i != at && takes(other, value));
                plan.homes[value] = match result {
                    _ if matches!(stage, Stage::Reduce(_)) => continue,
                    Some(result) if direct => Home::Result(result),
                    None if !elsewhere => Home::Nowhere,
                    _ => {
                        plan.buffers += 1;
                        Home::Buffer(plan.buffers - 1)
                    }
                };
            }
        }
        // Kernels of ops take constants from memory; values of the row are stretched for all stages.
        let mut buffer = || {
            plan.buffers += 1;
            plan.buffers - 1
        };
        for (value, &of_row) in rows.iter().enumerate().skip(operands.len()) {
            let op = &body.steps()[value - operands.len()].op;
            let takes = |stage: &Stage| stage.values().iter().any(|&v| step_args(body, v).contains(&value));
            let kernel = |stage: &Stage| !matches!(stage, Stage::Code(_)) && takes(stage);
            let constant = matches!(op, Op::Const { .. });
            let needed = constant && (body.results().contains(&value) || plan.stages.iter().any(kernel));
            if needed || (of_row && plan.stages.iter().any(takes)) {
                plan.homes[value] = Home::Buffer(buffer());
            }
        }
        for (value, &of_row) in rows.iter().enumerate() {
            if of_row || plan.row_steps.iter().any(|&step| step_args(body, step).contains(&value)) {
                plan.row_homes[value] = Some(buffer());
            }
        }
        for (result, &value) in body.results().iter().enumerate() {
            if matches!(plan.homes[value], Home::Buffer(_)) && !rows[value] {
                plan.copies.push((value, result));
            }
        }
        plan
    }

    /// The place of the reduction among the stages.
    pub(super) fn reduce(&self) -> Option<usize> {
        self.stages.iter().position(|stage| matches!(stage, Stage::Reduce(_)))
    }

    /// Whether the stages before the reduction in this place run a second time where a row is too long to be kept: what is
    /// behind it needs elements again.
    pub(super) fn runs_again(&self, reduce: usize, rows: &[bool]) -> bool {
        rows.contains(&true) && reduce + 1 < self.stages.len()
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

/// All stages: those of the elements that a reduction needs, the reduction, and those of all other elements.
fn stages(body: &Body, dtypes: &[DType], rows: &[bool], compiler: bool) -> Vec<Stage> {
    let elements = |v: &usize| !rows[*v] && !matches!(body.steps()[v - body.operands()].op, Op::Const { .. });
    let all: Vec<usize> = (body.operands()..dtypes.len()).filter(elements).collect();
    let Some(reduction) = body.reduction() else { return in_levels(body, dtypes, &all, compiler) };
    let mut needed = vec![false; dtypes.len()];
    needed[reduction.arg] = true;
    for &value in all.iter().rev().filter(|&&v| v != reduction.value) {
        if needed[value] {
            step_args(body, value).iter().for_each(|&arg| needed[arg] = true);
        }
    }
    let (before, behind): (Vec<usize>, Vec<usize>) =
        all.into_iter().filter(|&v| v != reduction.value).partition(|&v| needed[v]);
    let mut stages = in_levels(body, dtypes, &before, compiler);
    stages.push(Stage::Reduce(reduction.value));
    stages.extend(in_levels(body, dtypes, &behind, compiler));
    stages
}

/// The stages of some steps, whose other operands are there.
fn in_levels(body: &Body, dtypes: &[DType], values: &[usize], compiler: bool) -> Vec<Stage> {
    // Even levels are arithmetic, odd ones functions; a step stands on the first level where its operands are there.
    let mut levels: Vec<usize> = vec![0; dtypes.len()];
    for &value in values {
        let step = &body.steps()[value - body.operands()];
        let after = step.args.iter().map(|&a| levels[a]).max().unwrap_or(0);
        // Code knows bf16, whose numbers are the upper halves of others, and leaves f16 to kernels.
        let half = dtypes[value] == DType::F16 || step.args.iter().any(|&a| dtypes[a] == DType::F16);
        let parity = usize::from(is_function(&step.op) || half);
        levels[value] = if after % 2 == parity { after } else { after + 1 };
    }
    let mut stages = Vec::new();
    for level in 0..=values.iter().map(|&v| levels[v]).max().unwrap_or(0) {
        let on_level: Vec<usize> = values.iter().copied().filter(|&v| levels[v] == level).collect();
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
        let plan = Plan::new(&body, &[DType::F32; 2], &[false; 7], true);
        assert_eq!(plan.stages, [Stage::Code(vec![2, 3]), Stage::Row(4), Stage::Row(6)]);
        let (operand, buffer) = (Home::Operand, Home::Buffer);
        assert_eq!(plan.homes, [operand, operand, Home::Nowhere, buffer(0), buffer(1), buffer(2), Home::Result(0)]);
        let plain = Plan::new(&body, &[DType::F32; 2], &[false; 7], false);
        assert_eq!(plain.stages, [2, 3, 4, 6].map(Stage::Row));
    }

    #[test]
    fn results_wait_until_operands_were_read_for_the_last_time() {
        let body = body("{$1 = neg $0; $2 = abs $1; $3 = exp $2; $4 = mul $3, $0; return $2, $4}");
        let plan = Plan::new(&body, &[DType::F32], &[false; 5], true);
        assert_eq!(plan.stages, [Stage::Code(vec![1, 2]), Stage::Row(3), Stage::Row(4)]);
        assert_eq!(plan.copies, [(2, 0)]);
        assert_eq!(plan.homes[4], Home::Result(1));
    }

    #[test]
    fn what_a_row_needs_comes_before_it() {
        let body = body(
            "{$1 = mul $0, $0; $2 = reduce_sum $1 axes=[1]; $3 = sqrt $2; $4 = div $0, $3; $5 = neg $0; return $4, $5, $1}",
        );
        let rows = [false, false, true, true, false, false];
        let plan = Plan::new(&body, &[DType::F32], &rows, true);
        assert_eq!(plan.stages, [Stage::Row(1), Stage::Reduce(2), Stage::Code(vec![4, 5])]);
        assert_eq!(plan.row_steps, [3]);
        // $1 is made again where a row is long, so it waits until operands were read for the last time.
        assert_eq!(plan.copies, [(1, 2)]);
        assert_eq!((plan.homes[4], plan.homes[5]), (Home::Result(0), Home::Result(1)));
        assert!(plan.row_homes[2].is_some() && plan.row_homes[3].is_some() && plan.row_homes[0].is_none());
    }
}
