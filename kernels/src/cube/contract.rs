//! Products: every contraction as matrix products with strides, without copies.
//!
//! The letters of `contract` fall into four groups, as on the CPU: in both operands and the result (batch), in the left
//! operand and the result (rows), in the right operand and the result (columns), in both operands only (summed). A cube
//! makes a tile of the result from tiles of both operands in shared memory. The sum of each element runs in order, and that
//! of a pair of tiles is added as a whole, so that rounding grows with the count of tiles. A region that finishes the
//! product goes over the sums before they leave the registers; where words of a result would have elements of two units, the
//! product is stored first. Where a device has tensor cores, products of narrow floats are those of `cores.rs`.

use cubecl::prelude::*;
use dsgc_ir::body::product_parts;
use dsgc_ir::infer::{Contraction, infer, product_type};
use dsgc_ir::{Bindings, Body, Buffer, DType, Op, Type, Value};

use super::index::{Store, joined, offset, rounded, strides};
use super::kept::{Kept, factor};
use super::region::{self, Operand, arrays};
use super::steps::{Item, Made, each, evaluate, pack, steps, write};
use super::{Launch, MOST_CUBES, cores, numbers};

/// Rows and columns of a tile of the result.
const TILE: usize = 64;
/// Summed letters of a tile of an operand.
const DEPTH: usize = 16;
/// Units of a cube along rows and along columns.
const SIDE: usize = 16;
/// Rows of a unit, and its neighbouring columns.
const EACH: usize = TILE / SIDE;

/// How many dims each group has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ranks {
    pub(super) batch: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) summed: usize,
}

impl Ranks {
    /// Where the numbers of a group begin: extents, then strides in the left operand, the right one, the result.
    pub(super) fn starts(self) -> [usize; 4] {
        let [batch, rows, columns] = [4 * self.batch, 4 * self.rows, 4 * self.columns];
        [0, batch, batch + rows, batch + rows + columns]
    }
}

/// All that a compiled kernel depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) ranks: Ranks,
    /// How both operands are kept.
    pub(super) kept: [Kept; 2],
    /// Of both operands, whether neighbours are in a row or column of the result, and not in the sum.
    pub(super) across: [bool; 2],
    /// What the sums are rounded to.
    pub(super) product: Store,
    /// What is computed of each sum.
    pub(super) items: Vec<Item>,
    pub(super) results: Vec<Made>,
    /// Columns of a unit that share words of results.
    pub(super) each: u32,
}

/// A product that is launched.
pub(super) struct Work {
    pub(super) plan: Plan,
    /// As what both operands are multiplied.
    pub(super) computed: DType,
    pub(super) left: Buffer,
    pub(super) right: Buffer,
    /// Of the region that finishes it.
    pub(super) operands: Vec<Buffer>,
    pub(super) results: Vec<Buffer>,
    /// What the launch is told: extents and strides, and where numbers of the rest are.
    pub(super) numbers: Vec<usize>,
    /// How many there are of each group of letters.
    pub(super) batch: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) summed: usize,
}

impl Work {
    /// Launches of cubes that make tiles of so many rows and columns, each with its first batch.
    pub(super) fn launches(&self, tile: usize) -> impl Iterator<Item = (CubeCount, usize)> {
        let [columns, rows] = [self.columns, self.rows].map(|n| n.div_ceil(tile) as u32);
        let batch = self.batch;
        let cubes = move |first: usize| CubeCount::Static(columns, rows, (batch - first).min(MOST_CUBES) as u32);
        (0..batch).step_by(MOST_CUBES).map(move |first| (cubes(first), first))
    }
}

/// Place `e` of a unit among those of a tile of an operand: the row or column, and the summed letter.
#[cube]
fn tile_place(e: u32, #[comptime] across: bool) -> (u32, u32) {
    let place = UNIT_POS + e * comptime!((SIDE * SIDE) as u32);
    if comptime!(across) {
        (place % comptime!(TILE as u32), place / comptime!(TILE as u32))
    } else {
        (place / comptime!(DEPTH as u32), place % comptime!(DEPTH as u32))
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn product(
    a: &Array<u32>,
    b: &Array<u32>,
    operands: &mut Sequence<Array<u32>>,
    results: &mut Sequence<Array<u32>>,
    faults: &mut Array<u32>,
    numbers: &Sequence<u32>,
    rows: u32,
    columns: u32,
    summed: u32,
    first_batch: u32,
    code: u32,
    #[comptime] plan: Plan,
) {
    let [at_batch, at_rows, at_columns, at_summed] = comptime!(plan.ranks.starts());
    let (batch_rank, rows_rank) = comptime!((plan.ranks.batch, plan.ranks.rows));
    let (columns_rank, summed_rank) = comptime!((plan.ranks.columns, plan.ranks.summed));
    let batch = CUBE_POS_Z + first_batch;
    let a_start = offset(batch, numbers, at_batch, comptime!(at_batch + batch_rank), batch_rank);
    let b_start = offset(batch, numbers, at_batch, comptime!(at_batch + 2 * batch_rank), batch_rank);
    let out_start = offset(batch, numbers, at_batch, comptime!(at_batch + 3 * batch_rank), batch_rank);
    let first_row = CUBE_POS_Y * comptime!(TILE as u32);
    let first_column = CUBE_POS_X * comptime!(TILE as u32);
    let mut left = SharedMemory::<f32>::new(comptime!(TILE * DEPTH));
    let mut right = SharedMemory::<f32>::new(comptime!(TILE * DEPTH));
    let mut sums = Array::<f32>::new(comptime!(EACH * EACH));
    #[unroll]
    for i in 0..comptime!(EACH * EACH) {
        sums[i] = 0.0f32;
    }
    let tiles = (summed + comptime!(DEPTH as u32 - 1)) / comptime!(DEPTH as u32);
    for tile in 0..tiles {
        for e in 0..comptime!((TILE * DEPTH / (SIDE * SIDE)) as u32) {
            let (line, deep) = tile_place(e, comptime!(plan.across[0]));
            let (row, k) = (first_row + line, tile * comptime!(DEPTH as u32) + deep);
            let mut x = 0u32;
            if k < summed && row < rows {
                let at = a_start
                    + offset(row, numbers, at_rows, comptime!(at_rows + rows_rank), rows_rank)
                    + offset(k, numbers, at_summed, comptime!(at_summed + summed_rank), summed_rank);
                x = factor(a, numbers, at, comptime!(plan.kept[0]));
            }
            left[(deep * comptime!(TILE as u32) + line) as usize] = f32::reinterpret(x);
            let (line, deep) = tile_place(e, comptime!(plan.across[1]));
            let (column, k) = (first_column + line, tile * comptime!(DEPTH as u32) + deep);
            let mut y = 0u32;
            if k < summed && column < columns {
                let at = b_start
                    + offset(column, numbers, at_columns, comptime!(at_columns + 2 * columns_rank), columns_rank)
                    + offset(k, numbers, at_summed, comptime!(at_summed + 2 * summed_rank), summed_rank);
                y = factor(b, numbers, at, comptime!(plan.kept[1]));
            }
            right[(deep * comptime!(TILE as u32) + line) as usize] = f32::reinterpret(y);
        }
        sync_cube();
        let mut parts = Array::<f32>::new(comptime!(EACH * EACH));
        #[unroll]
        for i in 0..comptime!(EACH * EACH) {
            parts[i] = 0.0f32;
        }
        for deep in 0..comptime!(DEPTH as u32) {
            let mut x = Array::<f32>::new(EACH);
            let mut y = Array::<f32>::new(EACH);
            #[unroll]
            for i in 0..EACH {
                let start = deep * comptime!(TILE as u32);
                x[i] = left[(start + UNIT_POS_Y + comptime!((i * SIDE) as u32)) as usize];
                y[i] = right[(start + UNIT_POS_X * comptime!(EACH as u32) + comptime!(i as u32)) as usize];
            }
            #[unroll]
            for i in 0..EACH {
                #[unroll]
                for j in 0..EACH {
                    parts[comptime!(i * EACH + j)] = fma(x[i], y[j], parts[comptime!(i * EACH + j)]);
                }
            }
        }
        #[unroll]
        for i in 0..comptime!(EACH * EACH) {
            sums[i] += parts[i];
        }
        sync_cube();
    }
    let each = comptime!(plan.each);
    #[unroll]
    for i in 0..EACH {
        #[unroll]
        for word in 0..comptime!(EACH / plan.each as usize) {
            let row = first_row + UNIT_POS_Y + comptime!((i * SIDE) as u32);
            let column = first_column + UNIT_POS_X * comptime!(EACH as u32) + comptime!(word as u32 * each);
            if row < rows && column < columns {
                let at = out_start
                    + offset(row, numbers, at_rows, comptime!(at_rows + 3 * rows_rank), rows_rank)
                    + offset(column, numbers, at_columns, comptime!(at_columns + 3 * columns_rank), columns_rank);
                let mut packed = Array::<u32>::new(comptime!(plan.results.len() * plan.each as usize));
                #[unroll]
                for j in 0..each {
                    let sum = sums[comptime!(i * EACH + word * each as usize + j as usize)];
                    let mut given = Sequence::<u32>::new();
                    given.push(rounded(u32::reinterpret(sum), comptime!(plan.product)));
                    let items = comptime!(plan.items.clone());
                    let values = evaluate(operands, numbers, &given, faults, at + j, code, items);
                    pack(&mut packed, &values, j, each, comptime!(plan.results.clone()));
                }
                write(results, &packed, at, at + each, each, comptime!(plan.results.clone()));
            }
        }
    }
}

/// What is done with a product: by these steps on it and on operands, these results.
struct Finish {
    product: Store,
    operands: Vec<Operand>,
    steps: Vec<Item>,
    made: Vec<Made>,
    results: Vec<Buffer>,
}

impl Finish {
    /// It is stored.
    fn none(result: Buffer, store: Store) -> Finish {
        let made = vec![Made { result: 0, value: 0, store }];
        Finish { product: store, operands: Vec::new(), steps: Vec::new(), made, results: vec![result] }
    }
}

/// Whether words of a product's results have elements of one unit each, where results are stored like that: neighbours are
/// columns of the right operand or rows of the left one.
fn in_place(labels: &Contraction, result: &Type, each: u32) -> bool {
    let own = |last: &char| labels.lhs.contains(last) != labels.rhs.contains(last);
    let whole = |n: i64| n % i64::from(each) == 0;
    let neighbours = || labels.out.last().is_some_and(own);
    each == 1 || (neighbours() && result.dims.last().and_then(|dim| dim.constant()).is_some_and(whole))
}

/// Whether a region goes over a product's sums before they leave the registers, to these results of one shape.
pub(super) fn finishes(spec: &str, results: &[Type]) -> bool {
    let each = results.iter().map(|ty| Store::of(ty.dtype).each()).max().unwrap_or(1);
    results.first().is_none_or(|result| in_place(&parse(spec), result, each))
}

/// The tiles of a cube.
pub(super) fn tiles() -> String {
    format!("tiles of {TILE} x {TILE} by {DEPTH}")
}

/// As what the operands of a product are multiplied.
pub(super) fn computed(left: DType, right: DType) -> DType {
    product_type(left, right).unwrap_or(DType::F32)
}

fn parse(spec: &str) -> Contraction {
    Contraction::parse(spec).unwrap_or_else(|why| panic!("bug: wrong labels: {why}"))
}

/// The places of the left and the right operand of a product.
fn pair(common: usize, other: usize) -> [usize; 2] {
    if common == 0 { [0, other] } else { [other, 0] }
}

/// Bytes of workspace of products: those that are stored before their results are.
pub(super) fn workspace(op: &Op, args: &[Type], bounds: &Bindings) -> usize {
    let whole = |ty: &Type| 4 * ty.shape(bounds).unwrap_or_default().iter().product::<usize>();
    let product = |spec: &str, [left, right]: [usize; 2]| {
        infer(&Op::Contract { spec: spec.into() }, &[args[left].clone(), args[right].clone()], None)
            .map_or_else(|_| Type::scalar(DType::F32), |mut types| types.swap_remove(0))
    };
    let stored = |spec: &str, operands: [usize; 2]| {
        let result = product(spec, operands);
        let each = Store::of(result.dtype).each();
        if in_place(&parse(spec), &result, each) { 0 } else { whole(&result) }
    };
    match op {
        Op::Contract { spec } => stored(spec, [0, 1]),
        Op::ContractEach { spec, common } => (1..args.len()).map(|i| stored(spec, pair(*common, i))).max().unwrap_or(0),
        Op::ContractFused { spec, common, bodies } => {
            let parts = product_parts(bodies).into_iter().zip(bodies);
            let one = parts.map(|(part, body)| {
                let result = product(spec, pair(*common, part.other));
                let types: Vec<DType> =
                    [result.dtype].into_iter().chain(args[part.operands].iter().map(|ty| ty.dtype)).collect();
                let all = body.dtypes(&types).unwrap_or_default();
                let each = body.results().iter().filter_map(|&r| Some(Store::of(*all.get(r)?).each())).max();
                if in_place(&parse(spec), &result, each.unwrap_or(1)) { 0 } else { whole(&result) }
            });
            one.max().unwrap_or(0)
        }
        _ => 0,
    }
}

/// The product of two operands, into a result.
pub(super) fn run<R: Runtime>(l: &Launch<R>, spec: &str, operands: [usize; 2], result: usize) {
    let [a, b] = operands.map(|i| Operand::of(l, l.op.args[i]));
    let result = l.op.results().nth(result).expect("it has this result");
    let out = (l.shape(result), l.graph.ty(result));
    product_finished(l, spec, [a, b], out, Finish::none(l.buffer(result), Store::of(l.dtype(result))));
}

/// Products that regions finish.
pub(super) fn finished<R: Runtime>(l: &Launch<R>, spec: &str, common: usize, bodies: &[Body]) {
    let all: Vec<Value> = l.op.results().collect();
    let types: Vec<Type> = l.op.args.iter().map(|&value| l.graph.ty(value).clone()).collect();
    for (part, body) in product_parts(bodies).into_iter().zip(bodies) {
        let operands = pair(common, part.other);
        let contract = Op::Contract { spec: spec.into() };
        let product = infer(&contract, &operands.map(|i| types[i].clone()), None)
            .unwrap_or_else(|why| panic!("bug: a wrong product: {why}"))
            .swap_remove(0);
        let own: Vec<DType> =
            [product.dtype].into_iter().chain(types[part.operands.clone()].iter().map(|ty| ty.dtype)).collect();
        let own = body.dtypes(&own).unwrap_or_else(|why| panic!("bug: a wrong body: {why}"));
        let make = |(result, &value): (usize, &usize)| Made { result, value, store: Store::of(own[value]) };
        let results = &all[part.results.clone()];
        let finish = Finish {
            product: Store::of(product.dtype),
            operands: l.op.args[part.operands].iter().map(|&value| Operand::of(l, value)).collect(),
            steps: steps(body, &own),
            made: body.results().iter().enumerate().map(make).collect(),
            results: results.iter().map(|&value| l.buffer(value)).collect(),
        };
        let out = (l.shape(results[0]), l.graph.ty(results[0]));
        product_finished(l, spec, operands.map(|i| Operand::of(l, l.op.args[i])), out, finish);
    }
}

fn product_finished<R: Runtime>(
    l: &Launch<R>,
    spec: &str,
    operands: [Operand; 2],
    (out, ty): (Vec<usize>, &Type),
    finish: Finish,
) {
    let labels = parse(spec);
    if in_place(&labels, ty, each(&finish.made)) {
        multiply_into(l, &labels, operands, &out, finish);
        return;
    }
    let bytes = 4 * out.iter().product::<usize>();
    let sums = Buffer { bytes, ..l.scratch() };
    multiply_into(l, &labels, operands, &out, Finish { product: finish.product, ..Finish::none(sums, Store::Word) });
    let sums = Operand { buffer: sums, shape: out.clone(), dtype: DType::F32 };
    let all: Vec<Operand> = [sums].into_iter().chain(finish.operands).collect();
    region::elements(l, (&all, &finish.results), &finish.steps, &finish.made, &out);
}

/// The product of two tensors of f32 into a third, or added to it.
pub(super) fn multiply<R: Runtime>(l: &Launch<R>, spec: &str, tensors: [(Buffer, Vec<usize>); 3], add: bool) {
    let [a, b, out] = tensors.map(|(buffer, shape)| Operand { buffer, shape, dtype: DType::F32 });
    let (shape, mut finish) = (out.shape.clone(), Finish::none(out.buffer, Store::Word));
    if add {
        finish.operands.push(out);
        finish.steps.push(Item::Do(super::steps::SUM, Store::Word));
        finish.made[0].value = 2;
    }
    multiply_into(l, &parse(spec), [a, b], &shape, finish);
}

fn multiply_into<R: Runtime>(l: &Launch<R>, labels: &Contraction, [a, b]: [Operand; 2], out: &[usize], finish: Finish) {
    if out.contains(&0) {
        return;
    }
    let (mut a, mut b) = ((&labels.lhs, a), (&labels.rhs, b));
    // Neighbours of the result are columns, where they can be.
    if labels.out.last().is_some_and(|last| a.0.contains(last) && !b.0.contains(last)) {
        std::mem::swap(&mut a, &mut b);
    }
    let sides = [a.0, b.0, &labels.out];
    let shapes = [&a.1.shape[..], &b.1.shape, out];
    let place = |side: usize, letter: char| sides[side].iter().position(|&x| x == letter);
    let group = |from: usize, keep: &dyn Fn(char) -> bool| {
        let letters: Vec<char> = sides[from].iter().copied().filter(|&x| keep(x)).collect();
        let extents: Vec<usize> =
            letters.iter().map(|&x| shapes[from][place(from, x).expect("the letter is from this side")]).collect();
        let along = |side: usize| {
            let own = strides(shapes[side]);
            letters.iter().map(|&x| place(side, x).map_or(0, |i| own[i])).collect::<Vec<usize>>()
        };
        joined(&extents, &[along(0), along(1), along(2)])
    };
    let (in_left, in_right, in_out) = (|x| place(0, x).is_some(), |x| place(1, x).is_some(), |x| place(2, x).is_some());
    let groups = [
        group(2, &|x| in_left(x) && in_right(x)),
        group(2, &|x| in_left(x) && !in_right(x)),
        group(2, &|x| !in_left(x) && in_right(x)),
        group(0, &|x| !in_out(x)),
    ];
    let ranks = Ranks {
        batch: groups[0].0.len(),
        rows: groups[1].0.len(),
        columns: groups[2].0.len(),
        summed: groups[3].0.len(),
    };
    let [batch, rows, columns, summed] = [0, 1, 2, 3].map(|i| groups[i].0.iter().product::<usize>());
    let mut given: Vec<usize> =
        groups.iter().flat_map(|(extents, all)| [std::slice::from_ref(extents), &all[..]].concat().concat()).collect();
    let loads = region::loads(&finish.operands, out, &mut given);
    let computed = computed(a.1.dtype, b.1.dtype);
    let kept = [&a.1, &b.1].map(|operand| Kept::of(operand.dtype, &operand.shape, computed, &mut given));
    let plan = Plan {
        ranks,
        kept,
        across: [0, 1].map(|side| groups[1 + side].1[side].last() == Some(&1)),
        product: finish.product,
        items: [Item::Given(0)].into_iter().chain(loads).chain(finish.steps).collect(),
        each: each(&finish.made),
        results: finish.made,
    };
    let work = Work {
        plan,
        computed,
        left: a.1.buffer,
        right: b.1.buffer,
        operands: finish.operands.iter().map(|operand| operand.buffer).collect(),
        results: finish.results,
        numbers: given,
        batch,
        rows,
        columns,
        summed,
    };
    if l.cores && cores::multiplies(computed) {
        cores::run(l, &work);
        return;
    }
    let cube = CubeDim::new_2d(SIDE as u32, SIDE as u32);
    for (cubes, first) in work.launches(TILE) {
        // SAFETY: elements beyond the operands are not read, those beyond the result not written.
        unsafe {
            product::launch_unchecked::<R>(
                l.client,
                cubes,
                cube,
                l.memory.words(work.left),
                l.memory.words(work.right),
                arrays(l, work.operands.iter().copied()),
                arrays(l, work.results.iter().copied()),
                l.faults(),
                numbers(&work.numbers),
                work.rows as u32,
                work.columns as u32,
                work.summed as u32,
                first as u32,
                l.code,
                work.plan.clone(),
            );
        }
    }
}
