//! Products that a region finishes: while a block of whole sums is in the cache of the thread that made it, the region
//! goes over it, and only what the region gives is stored. Sums lie in a result's place meanwhile where that is f32 and no
//! operand's, else in the workspace. A product that does not come in blocks, as one of a few rows, is in the workspace as a
//! whole before. Products and regions have the bits that they have apart.

use dsgc_ir::body::{ProductPart, product_parts};
use dsgc_ir::infer::{Contraction, infer};
use dsgc_ir::{Bindings, Body, DType, Op, Type, Value};
use half::bf16;

use super::Launch;
use super::contract::{self, Groups};
use super::contract_each::is_linear;
use super::fused::{self, Run};
use super::gemm::{Element, Finish, Matrix, Product};
use super::memory::{ALIGNMENT, Ptr};
use super::skinny::{self, Source};

/// Why products of these operands are not finished, if so.
pub(super) fn missing(operands: &[Type]) -> Option<String> {
    let own = |dtype| operands.iter().all(|operand| operand.dtype == dtype);
    let finished = own(DType::F32) || own(DType::Bf16);
    (!finished).then(|| "operands of other types than f32 or bf16 are widened as a whole".to_string())
}

/// The places of the left and the right operand of a product.
fn pair(common: usize, other: usize) -> [usize; 2] {
    if common == 0 { [0, other] } else { [other, 0] }
}

/// Bytes of workspace: of one product, of those that are whole before they are finished, and of a region.
pub(super) fn workspace(
    (spec, common, bodies): (&str, usize, &[Body]),
    args: &[Type],
    bounds: &Bindings,
    threads: usize,
) -> usize {
    let Ok(labels) = Contraction::parse(spec) else { return 0 };
    let contract = Op::Contract { spec: spec.to_string() };
    let (mut products, mut whole, mut regions) = (0, 0, 0);
    for (part, body) in product_parts(bodies).into_iter().zip(bodies) {
        let [left, right] = pair(common, part.other);
        let Ok(product) = infer(&contract, &[args[left].clone(), args[right].clone()], None) else { return 0 };
        let [left, right] = [left, right].map(|i| args[i].shape(bounds).unwrap_or_default());
        products = products.max(contract::workspace(spec, args[0].dtype, &left, &right, threads));
        whole += Groups::new(&labels, &left, &right).whole().saturating_mul(4).next_multiple_of(ALIGNMENT);
        let operands = [&product[..], &args[part.operands]].concat();
        regions = regions.max(fused::workspace((&product[0].dims, body), &operands, bounds, threads));
    }
    products.next_multiple_of(ALIGNMENT).saturating_add(whole).saturating_add(regions)
}

/// Runs `contract_fused`.
pub(super) fn run(l: &mut Launch, spec: &str, common: usize, bodies: &[Body]) -> Result<(), String> {
    let labels = Contraction::parse(spec)?;
    let parts = product_parts(bodies);
    match (l.dtype(l.op.args[0]), labels.wide) {
        (DType::Bf16, false) => all::<bf16, bf16>(l, (spec, &labels), common, &parts),
        (DType::Bf16, true) => all::<bf16, f32>(l, (spec, &labels), common, &parts),
        _ => all::<f32, f32>(l, (spec, &labels), common, &parts),
    }
}

/// Runs products of operands of `T` that are `O`.
fn all<T: Source, O: Element>(
    l: &mut Launch,
    (spec, labels): (&str, &Contraction),
    common: usize,
    parts: &[ProductPart],
) -> Result<(), String> {
    let (op, threads) = (l.op, l.threads);
    let operands = |part: &ProductPart| pair(common, part.other).map(|i| op.args[i]);
    let own = parts.iter().map(|part| {
        let [left, right] = operands(part).map(|value| l.shape(value));
        contract::workspace(spec, l.dtype(op.args[0]), &left, &right, threads.count())
    });
    let mut used = own.max().unwrap_or(0).next_multiple_of(ALIGNMENT);
    let few_rows = common == 0 && is_linear(labels);
    let (m, k) = l.rows(op.args[0]);
    let (mut in_blocks, mut whole, mut few) = (Vec::new(), Vec::new(), Vec::new());
    for (i, part) in parts.iter().enumerate() {
        let len = l.len(result(l, part));
        let [left, right] = operands(part);
        let groups = Groups::new(labels, &l.shape(left), &l.shape(right));
        if groups.in_blocks() {
            in_blocks.push((i, groups));
            continue;
        }
        // SAFETY: behind the workspace of a product there is room for all that are whole.
        let to: Ptr<O> = unsafe { Ptr(l.workspace::<u8>().add(used).0.cast()) };
        used += (len * size_of::<O>()).next_multiple_of(ALIGNMENT);
        // The matrix has rows if its product is linear.
        let n = if few_rows { l.shape(op.args[part.other])[0] } else { 0 };
        if skinny::fits(m, n, k) {
            few.push(skinny::Part { n, w: (l.arg::<T>(part.other), k), out: (to, n) });
        } else {
            let start = part.results.start;
            let one = op.part(Op::Contract { spec: spec.to_string() }, vec![left, right], start..start + 1);
            contract::run_into(&mut l.part(&one), spec, Ptr(to.0.cast()))?;
        }
        whole.push((i, to));
    }
    // SAFETY: extents and strides are those of the operands and of the places in the workspace.
    unsafe { skinny::run(threads, (m, k), (l.arg(0), k), &few, l.workspace()) };
    for (i, product) in whole {
        if let Some(run) = region(l, i, &parts[i], Some(Ptr(product.0.cast())), used) {
            run.all(threads);
        }
    }
    for (i, groups) in in_blocks {
        finished::<T>(l, &groups, pair(common, parts[i].other), (i, &parts[i]), used);
    }
    Ok(())
}

/// The first result of a product's body, whose dims are the product's.
fn result(l: &Launch, part: &ProductPart) -> Value {
    l.op.results().nth(part.results.start).expect("a body has a result")
}

/// The region of a product, which lies there or comes in blocks; so much of the workspace is taken.
fn region<'a>(
    l: &mut Launch<'a>,
    i: usize,
    part: &ProductPart,
    product: Option<Ptr<u8>>,
    used: usize,
) -> Option<Run<'a>> {
    let (op, regions) = (l.op, l.regions);
    let mut operands = vec![(product, result(l, part))];
    operands.extend(part.operands.clone().map(|arg| (Some(l.arg(arg)), op.args[arg])));
    Run::new(l, &regions[i], operands, part.results.clone(), used)
}

/// Runs a product in blocks that its region finishes.
fn finished<T: Element>(
    l: &mut Launch,
    &Groups { m, n, k, .. }: &Groups,
    [left, right]: [usize; 2],
    (i, part): (usize, &ProductPart),
    used: usize,
) {
    let Some(run) = region(l, i, part, None, used) else { return };
    let left: Matrix<T> = Matrix { at: l.arg(left), row: m.left, column: k.left };
    let right: Matrix<T> = Matrix { at: l.arg(right), row: k.right, column: n.right };
    // Columns of the result are neighbours.
    let (rows, columns, left, right) =
        if n.out == 1 { (m, n, left, right) } else { (n, m, right.transposed(), left.transposed()) };
    let results: Vec<Value> = l.op.results().collect();
    let place = part.results.clone().find(|&r| {
        let own = l.buffer(results[r]);
        let is_apart = |arg: usize| {
            let other = l.buffer(l.op.args[arg]);
            own.region != other.region
                || own.offset + own.bytes <= other.offset
                || other.offset + other.bytes <= own.offset
        };
        l.dtype(results[r]) == DType::F32 && part.operands.clone().all(is_apart)
    });
    let at: Ptr<f32> = match place {
        Some(result) => l.out(result),
        None => l.workspace(),
    };
    let width = columns.extent;
    let product = Product {
        threads: Some(l.threads),
        size: (rows.extent, width, k.extent),
        left,
        right,
        out: Matrix { at, row: width, column: 1 },
        accumulate: false,
        finish: Some(Finish {
            run: &|thread, sums, stride, rows, columns| run.finish(thread, (sums, stride), rows, columns, width),
            apart: place.is_none(),
        }),
        scratch: l.workspace(),
    };
    // SAFETY: extents and strides are those of the operands and the result, which is written by nobody else; where sums
    // are in it, the region reads nothing there but them.
    unsafe { product.run() };
}
