//! Products with one operand in common, in one launch. Each is computed as if it were alone, so merging changes no bit;
//! products of a few rows, as decoding has them, are shared out to the threads together.

use dsgc_ir::infer::Contraction;
use dsgc_ir::{DType, Op, Value};
use half::bf16;

use super::gemm::Element;
use super::skinny::{self, Source};
use super::{Launch, contract};

/// Runs `contract_each`.
pub(super) fn run(l: &mut Launch, spec: &str, common: usize) -> Result<(), String> {
    let labels = Contraction::parse(spec)?;
    match (l.dtype(l.op.args[0]), labels.wide) {
        (DType::Bf16, false) => each::<bf16, bf16>(l, spec, common, &labels),
        (DType::Bf16, true) => each::<bf16, f32>(l, spec, common, &labels),
        _ => each::<f32, f32>(l, spec, common, &labels),
    }
}

fn each<T: Source, O: Element>(l: &mut Launch, spec: &str, common: usize, labels: &Contraction) -> Result<(), String> {
    let few_rows = common == 0 && is_linear(labels);
    let (m, k) = l.rows(l.op.args[0]);
    let mut few: Vec<skinny::Part<T, O>> = Vec::new();
    for (i, &other) in l.op.args[1..].iter().enumerate() {
        // The matrix has rows if its product is linear.
        let n = if few_rows { l.shape(other)[0] } else { 0 };
        if skinny::fits(m, n, k) {
            few.push(skinny::Part { n, w: (l.arg(1 + i), k), out: (l.out(i), n) });
        } else {
            alone(l, spec, common, (i, other))?;
        }
    }
    // SAFETY: extents and strides are those of the operands and the results.
    unsafe { skinny::run(l.threads, (m, k), (l.arg(0), k), &few, l.workspace()) };
    Ok(())
}

/// Whether a product is `x w^T` on the last dim of `x`, as in `btd,vd->btv`.
pub(super) fn is_linear(Contraction { lhs, rhs, out, .. }: &Contraction) -> bool {
    match (lhs.split_last(), &rhs[..], out.split_last()) {
        (Some((k, rows)), [n, summed], Some((last, lead))) => k == summed && n == last && rows == lead,
        _ => false,
    }
}

/// Runs one of the products.
fn alone(l: &mut Launch, spec: &str, common: usize, (i, other): (usize, Value)) -> Result<(), String> {
    let shared = l.op.args[0];
    let args = if common == 0 { vec![shared, other] } else { vec![other, shared] };
    let part = l.op.part(Op::Contract { spec: spec.to_string() }, args, i..i + 1);
    contract::run(&mut l.part(&part), spec)
}
