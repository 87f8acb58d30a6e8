//! Elementwise ops, alone and in regions, and regions around a reduction.
//!
//! A kernel is made of a body's list of steps when it is first launched. Around a reduction over the last dims, a cube has a
//! row, or as many as share words of a result: it reduces the row, computes what is of the row, and goes over it again. Over
//! the first dims a unit has a column of a block of rows, over all dims a cube has a block; what blocks give is joined by a
//! second kernel. All sums have a fixed order.

use cubecl::prelude::*;
use dsgc_ir::body::{Along, Reduction};
use dsgc_ir::{Bindings, Body, Buffer, DType, Op, Step, Type, Value};

use super::index::{Store, stored};
use super::reduce::{TOGETHER, With, join, words_together};
use super::steps::{Item, Made, each, evaluate, lower, pack, places, steps, write};
use super::{Launch, MOST_CUBES, cubes, numbers};

/// Rows whose elements of a column a unit reduces.
const ROWS: usize = 64;

/// Elements that a cube reduces.
const BLOCK: usize = 1 << 13;

/// All that a kernel without a reduction depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Plan {
    items: Vec<Item>,
    results: Vec<Made>,
    /// Elements of one unit.
    each: u32,
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
    if first < len {
        let given = Sequence::<u32>::new();
        let mut packed = Array::<u32>::new(comptime!(plan.results.len().max(1) * plan.each as usize));
        #[unroll]
        for j in 0..comptime!(plan.each) {
            if first + j < len {
                let items = comptime!(plan.items.clone());
                let values = evaluate(operands, numbers, &given, faults, first + j, code, items);
                pack(&mut packed, &values, j, comptime!(plan.each), comptime!(plan.results.clone()));
            }
        }
        write(results, &packed, first, len, comptime!(plan.each), comptime!(plan.results.clone()));
    }
}

/// What a kernel with a reduction depends on besides.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Reduced {
    /// What leads to the reduction, for each element.
    before: Vec<Item>,
    /// The value that is reduced.
    arg: usize,
    with: With,
    /// Whether it is a float.
    floats: bool,
    /// Where joining begins.
    start: u32,
}

/// What a kernel of rows depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RowPlan {
    reduced: Reduced,
    /// What is of the row, from the reduction on.
    of_row: Vec<Item>,
    /// Which of these values elements or results take.
    kept: Vec<usize>,
    /// Results of the row; their values are numbers among the kept ones.
    row_results: Vec<Made>,
    /// What is computed for each element when the row's values are there.
    after: Vec<Item>,
    results: Vec<Made>,
    each: u32,
    /// Rows of a cube.
    group: u32,
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn by_rows(
    operands: &Sequence<Array<u32>>,
    results: &mut Sequence<Array<u32>>,
    faults: &mut Array<u32>,
    numbers: &Sequence<u32>,
    rows: u32,
    width: u32,
    first: u32,
    code: u32,
    #[comptime] plan: RowPlan,
) {
    let first_row = (CUBE_POS as u32 + first) * comptime!(plan.group);
    let count = comptime!(plan.kept.len());
    let mut kept = SharedMemory::<u32>::new(comptime!(plan.group as usize * plan.kept.len()));
    for g in 0..comptime!(plan.group) {
        // A row beyond the last is the last one again, so that all units of a cube come to the same places.
        let row = min(first_row + g, rows - 1u32);
        let nothing = Sequence::<u32>::new();
        let mut own = comptime!(plan.reduced.start).runtime();
        let mut i = UNIT_POS;
        while i < width {
            let items = comptime!(plan.reduced.before.clone());
            let values = evaluate(operands, numbers, &nothing, faults, row * width + i, code, items);
            own = join(
                own,
                values[comptime!(plan.reduced.arg)],
                comptime!(plan.reduced.with),
                comptime!(plan.reduced.floats),
            );
            i += TOGETHER;
        }
        let all = words_together(own, comptime!(plan.reduced.with), comptime!(plan.reduced.floats));
        let mut given = Sequence::<u32>::new();
        given.push(all);
        let values = evaluate(operands, numbers, &given, faults, row, code, comptime!(plan.of_row.clone()));
        if UNIT_POS == 0u32 {
            #[unroll]
            for k in 0..count {
                kept[g as usize * count + k] = values[comptime!(plan.kept[k])];
            }
        }
    }
    sync_cube();
    if comptime!(!plan.results.is_empty()) {
        let begin = first_row * width;
        let end = min(first_row + comptime!(plan.group), rows) * width;
        let mut at = begin + UNIT_POS * comptime!(plan.each);
        while at < end {
            let mut packed = Array::<u32>::new(comptime!(plan.results.len().max(1) * plan.each as usize));
            #[unroll]
            for j in 0..comptime!(plan.each) {
                if at + j < end {
                    let mut row = 0u32;
                    if comptime!(plan.group > 1) {
                        row = (at + j - begin) / width;
                    }
                    let mut given = Sequence::<u32>::new();
                    #[unroll]
                    for k in 0..count {
                        given.push(kept[row as usize * count + k]);
                    }
                    let items = comptime!(plan.after.clone());
                    let values = evaluate(operands, numbers, &given, faults, at + j, code, items);
                    pack(&mut packed, &values, j, comptime!(plan.each), comptime!(plan.results.clone()));
                }
            }
            write(results, &packed, at, end, comptime!(plan.each), comptime!(plan.results.clone()));
            at += comptime!(TOGETHER * plan.each);
        }
    }
    // Results of the row may take the place of operands that have one element for it.
    sync_cube();
    if UNIT_POS == 0u32 && first_row < rows {
        let group = comptime!(plan.group);
        let mut packed = Array::<u32>::new(comptime!(plan.row_results.len().max(1) * plan.group as usize));
        #[unroll]
        for g in 0..group {
            let mut values = Sequence::<u32>::new();
            #[unroll]
            for k in 0..count {
                values.push(kept[comptime!(g as usize * count + k)]);
            }
            pack(&mut packed, &values, g, group, comptime!(plan.row_results.clone()));
        }
        write(results, &packed, first_row, rows, group, comptime!(plan.row_results.clone()));
    }
}

/// What a kernel of blocks depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct BlockPlan {
    reduced: Reduced,
    results: Vec<Made>,
    each: u32,
}

/// A unit has `each` neighbouring columns of a block of rows.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn by_columns(
    operands: &Sequence<Array<u32>>,
    results: &mut Sequence<Array<u32>>,
    parts: &mut Array<u32>,
    faults: &mut Array<u32>,
    numbers: &Sequence<u32>,
    rows: u32,
    width: u32,
    code: u32,
    #[comptime] plan: BlockPlan,
) {
    let each = comptime!(plan.each);
    let across = width.div_ceil(each);
    let block = ABSOLUTE_POS as u32 / across;
    let column = ABSOLUTE_POS as u32 % across * each;
    let begin = block * comptime!(ROWS as u32);
    if begin < rows {
        let end = min(rows, begin + comptime!(ROWS as u32));
        let nothing = Sequence::<u32>::new();
        let mut all = Array::<u32>::new(each as usize);
        #[unroll]
        for j in 0..each {
            all[j as usize] = comptime!(plan.reduced.start).runtime();
        }
        for row in begin..end {
            let first = row * width + column;
            let mut packed = Array::<u32>::new(comptime!(plan.results.len().max(1) * plan.each as usize));
            #[unroll]
            for j in 0..each {
                let items = comptime!(plan.reduced.before.clone());
                let values = evaluate(operands, numbers, &nothing, faults, first + j, code, items);
                let (with, floats) = comptime!((plan.reduced.with, plan.reduced.floats));
                all[j as usize] = join(all[j as usize], values[comptime!(plan.reduced.arg)], with, floats);
                pack(&mut packed, &values, j, each, comptime!(plan.results.clone()));
            }
            write(results, &packed, first, first + each, each, comptime!(plan.results.clone()));
        }
        #[unroll]
        for j in 0..each {
            parts[(block * width + column + j) as usize] = all[j as usize];
        }
    }
}

/// A cube has a block.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn by_blocks(
    operands: &Sequence<Array<u32>>,
    results: &mut Sequence<Array<u32>>,
    parts: &mut Array<u32>,
    faults: &mut Array<u32>,
    numbers: &Sequence<u32>,
    len: u32,
    code: u32,
    #[comptime] plan: BlockPlan,
) {
    let block = CUBE_POS as u32;
    let begin = block * comptime!(BLOCK as u32);
    let nothing = Sequence::<u32>::new();
    let mut own = comptime!(plan.reduced.start).runtime();
    if begin < len {
        let end = min(len, begin + comptime!(BLOCK as u32));
        let mut at = begin + UNIT_POS * comptime!(plan.each);
        while at < end {
            let mut packed = Array::<u32>::new(comptime!(plan.results.len().max(1) * plan.each as usize));
            #[unroll]
            for j in 0..comptime!(plan.each) {
                if at + j < end {
                    let items = comptime!(plan.reduced.before.clone());
                    let values = evaluate(operands, numbers, &nothing, faults, at + j, code, items);
                    let (with, floats) = comptime!((plan.reduced.with, plan.reduced.floats));
                    own = join(own, values[comptime!(plan.reduced.arg)], with, floats);
                    pack(&mut packed, &values, j, comptime!(plan.each), comptime!(plan.results.clone()));
                }
            }
            write(results, &packed, at, end, comptime!(plan.each), comptime!(plan.results.clone()));
            at += comptime!(TOGETHER * plan.each);
        }
    }
    let all = words_together(own, comptime!(plan.reduced.with), comptime!(plan.reduced.floats));
    if begin < len && UNIT_POS == 0u32 {
        parts[block as usize] = all;
    }
}

/// Joins what blocks of rows gave for each column, in their order; a unit has the columns of a word.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn join_columns(
    parts: &Array<u32>,
    to: &mut Array<u32>,
    blocks: u32,
    width: u32,
    start: u32,
    #[comptime] store: Store,
    #[comptime] with: With,
    #[comptime] floats: bool,
) {
    let each = comptime!(store.each());
    let first = ABSOLUTE_POS as u32 * each;
    if first < width {
        let mut word = 0u32;
        #[unroll]
        for j in 0..each {
            let column = first + j;
            if column < width {
                let mut all = start;
                for block in 0..blocks {
                    all = join(all, parts[(block * width + column) as usize], with, floats);
                }
                word |= stored(all, store) << comptime!(j * (32 / store.each()) % 32);
            }
        }
        to[(first / each) as usize] = word;
    }
}

/// Joins what blocks gave, by one cube.
#[cube(launch_unchecked)]
fn join_blocks(
    parts: &Array<u32>,
    to: &mut Array<u32>,
    blocks: u32,
    start: u32,
    #[comptime] store: Store,
    #[comptime] with: With,
    #[comptime] floats: bool,
) {
    let mut own = start;
    let mut i = UNIT_POS;
    while i < blocks {
        own = join(own, parts[i as usize], with, floats);
        i += TOGETHER;
    }
    let all = words_together(own, with, floats);
    if UNIT_POS == 0u32 {
        to[0] = stored(all, store);
    }
}

/// Runs an elementwise op.
pub(super) fn single<R: Runtime>(l: &Launch<R>) {
    let types: Vec<DType> = l.op.args.iter().map(|&v| l.dtype(v)).collect();
    let args: Vec<usize> = (0..types.len()).collect();
    let step = Item::Do(lower(&l.op.op, &args, &types), Store::of(l.dtype(l.op.result())));
    let made = [Made { result: 0, value: types.len(), store: Store::of(l.dtype(l.op.result())) }];
    elements(l, (&operands(l), &results(l)), &[step], &made, &l.shape(l.op.result()));
}

/// Bytes of workspace of a reduction over these dims.
pub(super) fn workspace(shape: &[usize], axes: &[usize]) -> usize {
    let len: usize = shape.iter().product();
    let blocks = match Along::of(axes, shape.len()) {
        Some(Along::Columns) => {
            let width: usize = shape[axes.len()..].iter().product();
            shape[..axes.len()].iter().product::<usize>().div_ceil(ROWS) * width
        }
        Some(Along::Whole) => len.div_ceil(BLOCK),
        Some(Along::Rows) | None => 0,
    };
    blocks * 4
}

/// Bytes of workspace of a region.
pub(super) fn workspace_of(op: &Op, bounds: &Bindings) -> usize {
    let Op::Fused { shape, body } = op else { return 0 };
    let shape = Type::new(DType::F32, shape.clone()).shape(bounds).unwrap_or_default();
    body.reduction().map_or(0, |reduction| workspace(&shape, reduction.axes))
}

/// Runs a region.
pub(super) fn fused<R: Runtime>(l: &Launch<R>, shape: &[usize], body: &Body) {
    let types: Vec<DType> = l.op.args.iter().map(|&v| l.dtype(v)).collect();
    let types = body.dtypes(&types).unwrap_or_else(|why| panic!("bug: a wrong body: {why}"));
    let make =
        |(result, (&value, own)): (usize, (&usize, Value))| Made { result, value, store: Store::of(l.dtype(own)) };
    let made: Vec<Made> = body.results().iter().zip(l.op.results()).enumerate().map(make).collect();
    match body.reduction() {
        None => elements(l, (&operands(l), &results(l)), &steps(body, &types), &made, shape),
        Some(reduction) => {
            let around = Around { l, shape, body, types: &types, reduction };
            match reduction.along(shape.len()) {
                Along::Rows => around.rows(&made),
                Along::Columns => around.blocks(&made, shape[..reduction.axes.len()].iter().product()),
                Along::Whole => around.blocks(&made, 0),
            }
        }
    }
}

/// Elements of an operand as those of another type, into a buffer.
pub(super) fn cast<R: Runtime>(l: &Launch<R>, from: Operand, to: Buffer, dtype: DType) {
    let (shape, store) = (from.shape.clone(), Store::of(dtype));
    let step = Item::Do(lower(&Op::Cast { dtype }, &[0], &[from.dtype]), store);
    elements(l, (&[from], &[to]), &[step], &[Made { result: 0, value: 1, store }], &shape);
}

/// A reduction over the first, the last or all dims.
pub(super) fn reduction<R: Runtime>(l: &Launch<R>) {
    let step = Step { op: l.op.op.clone(), args: vec![0] };
    fused(l, &l.shape(l.op.args[0]), &Body::new(1, vec![step], vec![1]));
}

/// A tensor that steps read.
pub(super) struct Operand {
    pub(super) buffer: Buffer,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: DType,
}

impl Operand {
    /// A value of an op.
    pub(super) fn of<R: Runtime>(l: &Launch<R>, value: Value) -> Operand {
        Operand { buffer: l.buffer(value), shape: l.shape(value), dtype: l.dtype(value) }
    }
}

fn operands<R: Runtime>(l: &Launch<R>) -> Vec<Operand> {
    l.op.args.iter().map(|&value| Operand::of(l, value)).collect()
}

fn results<R: Runtime>(l: &Launch<R>) -> Vec<Buffer> {
    l.op.results().map(|value| l.buffer(value)).collect()
}

/// Operands as items, and numbers for their places.
pub(super) fn loads(operands: &[Operand], shape: &[usize], given: &mut Vec<usize>) -> Vec<Item> {
    let shapes: Vec<Vec<usize>> = operands.iter().map(|operand| operand.shape.clone()).collect();
    let all = places(shape, &shapes, given).into_iter().zip(operands).enumerate();
    all.map(|(i, (place, operand))| Item::Load(i, place, Store::of(operand.dtype))).collect()
}

/// Buffers for a kernel.
pub(super) fn arrays<R: Runtime>(l: &Launch<R>, all: impl Iterator<Item = Buffer>) -> SequenceArg<R, Array<u32>> {
    all.map(|buffer| l.memory.words(buffer)).collect()
}

/// Runs steps for all elements.
pub(super) fn elements<R: Runtime>(
    l: &Launch<R>,
    (operands, results): (&[Operand], &[Buffer]),
    steps: &[Item],
    made: &[Made],
    shape: &[usize],
) {
    let len: usize = shape.iter().product();
    if len == 0 {
        return;
    }
    let mut given = Vec::new();
    let items = [&loads(operands, shape, &mut given), steps].concat();
    let plan = Plan { items, results: made.to_vec(), each: each(made) };
    let (cubes, cube) = l.units(len.div_ceil(plan.each as usize));
    // SAFETY: units beyond the last element do nothing; strides are those of the operands' shapes.
    unsafe {
        region::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            arrays(l, operands.iter().map(|operand| operand.buffer)),
            arrays(l, results.iter().copied()),
            l.faults(),
            numbers(&given),
            len as u32,
            l.code,
            plan,
        );
    }
}

/// A region around a reduction.
struct Around<'a, R: Runtime> {
    l: &'a Launch<'a, R>,
    shape: &'a [usize],
    body: &'a Body,
    types: &'a [DType],
    reduction: Reduction<'a>,
}

impl<R: Runtime> Around<'_, R> {
    /// What needs not be known of a body to have some of its values.
    fn needed(&self, items: &[Item], wanted: &[usize]) -> Vec<Item> {
        let mut alive = vec![false; items.len()];
        wanted.iter().for_each(|&value| alive[value] = true);
        for value in (0..items.len()).rev().filter(|&value| matches!(items[value], Item::Do(..))).collect::<Vec<_>>() {
            if alive[value] {
                self.body.steps()[value - self.body.operands()].args.iter().for_each(|&arg| alive[arg] = true);
            }
        }
        items.iter().zip(alive).map(|(&item, alive)| if alive { item } else { Item::Absent }).collect()
    }

    /// The reduction, with what leads to it and these other values.
    fn reduced(&self, items: &[Item], others: &[usize]) -> Reduced {
        let Reduction { value, arg, .. } = self.reduction;
        let floats = self.types[arg].is_float();
        let (with, start) = super::reduce::beginning(&self.body.steps()[value - self.body.operands()].op, floats);
        let before = self.needed(items, &[&[arg], others].concat());
        Reduced { before, arg, with, floats, start }
    }

    /// All values but what takes the reduction, for an element.
    fn items(&self, given: &mut Vec<usize>) -> Vec<Item> {
        let value = self.reduction.value;
        let steps = self.body.steps().iter().enumerate().map(|(i, step)| {
            let own: Vec<DType> = step.args.iter().map(|&a| self.types[a]).collect();
            let number = self.body.operands() + i;
            if number == value {
                return Item::Given(0);
            }
            Item::Do(lower(&step.op, &step.args, &own), Store::of(self.types[number]))
        });
        loads(&operands(self.l), self.shape, given).into_iter().chain(steps).collect()
    }

    fn rows(&self, made: &[Made]) {
        let (l, rank, value) = (self.l, self.shape.len(), self.reduction.value);
        let left = rank - self.reduction.axes.len();
        let width: usize = self.shape[left..].iter().product();
        let rows: usize = self.shape[..left].iter().product();
        if rows == 0 {
            return;
        }
        let mut given = Vec::new();
        let items = self.items(&mut given);
        // As the types say it, so that shapes that happen to be 1 change nothing.
        let alike = |v: usize, from_last: usize| {
            let dims = &l.graph.ty(l.op.args[v]).dims;
            dims.len().checked_sub(1 + from_last).is_none_or(|i| dims[i].constant() == Some(1))
        };
        let of_rows = self.body.of_rows(rank, alike);
        let takes = |step: &Step, v: usize| step.args.contains(&v);
        let is_kept = |v: &usize| {
            let steps = self.body.steps().iter().enumerate();
            let outside = |(i, step): (usize, &Step)| takes(step, *v) && !of_rows[self.body.operands() + i];
            of_rows[*v] && (steps.into_iter().any(outside) || self.body.results().contains(v))
        };
        let kept: Vec<usize> = (0..items.len()).filter(is_kept).collect();
        let number = |v: usize| kept.iter().position(|&k| k == v).expect("it is kept");
        let row_results: Vec<Made> = made
            .iter()
            .filter(|made| of_rows[made.value])
            .map(|made| Made { value: number(made.value), ..*made })
            .collect();
        let results: Vec<Made> = made.iter().filter(|made| !of_rows[made.value]).copied().collect();
        let wanted: Vec<usize> = results.iter().map(|made| made.value).collect();
        let after: Vec<Item> = items
            .iter()
            .enumerate()
            .map(|(v, &item)| if kept.contains(&v) { Item::Given(number(v)) } else { item })
            .collect();
        let after = self.needed(&after, &wanted);
        // Operands of the row, by the dims that are left.
        let shapes: Vec<Vec<usize>> = l.op.args.iter().map(|&operand| l.shape(operand)).collect();
        let trimmed = |own: &Vec<usize>| {
            let stays = own.iter().rev().take(rank - left).all(|&extent| extent == 1);
            if stays { own[..own.len().saturating_sub(rank - left)].to_vec() } else { Vec::new() }
        };
        let trimmed: Vec<Vec<usize>> = shapes.iter().map(trimmed).collect();
        let places = places(&self.shape[..left], &trimmed, &mut given);
        let of_row: Vec<Item> = items
            .iter()
            .enumerate()
            .map(|(v, &item)| match item {
                Item::Load(operand, _, store) => Item::Load(operand, places[operand], store),
                Item::Do(..) if !of_rows[v] && !self.is_constant(v) => Item::Absent,
                item => item,
            })
            .collect();
        let of_row = self.needed(&of_row, &[&kept[..], &[value]].concat());
        let each = each(&results);
        let fits = |group: &u32| {
            (*group as usize * width).is_multiple_of(each as usize)
                && row_results.iter().all(|made| group.is_multiple_of(made.store.each()))
        };
        let group = [1, 2, 4].into_iter().find(fits).expect("four elements fill every word");
        let reduced = self.reduced(&items, &[]);
        let plan = RowPlan { reduced, of_row, kept, row_results, after, results, each, group };
        let all = rows.div_ceil(group as usize);
        // No cube may come to a row that another has changed, so there are exactly as many as needed.
        for first in (0..all).step_by(MOST_CUBES) {
            // SAFETY: rows and columns are those of the region, strides those of the operands' shapes.
            unsafe {
                by_rows::launch_unchecked::<R>(
                    l.client,
                    CubeCount::Static((all - first).min(MOST_CUBES) as u32, 1, 1),
                    CubeDim::new_1d(TOGETHER),
                    arrays(l, l.op.args.iter().map(|&value| l.buffer(value))),
                    arrays(l, l.op.results().map(|value| l.buffer(value))),
                    l.faults(),
                    numbers(&given),
                    rows as u32,
                    width as u32,
                    first as u32,
                    l.code,
                    plan.clone(),
                );
            }
        }
    }

    fn is_constant(&self, value: usize) -> bool {
        let step = value.checked_sub(self.body.operands()).map(|i| &self.body.steps()[i]);
        step.is_some_and(|step| matches!(step.op, Op::Const { .. }))
    }

    /// Over the first dims, which are so many rows, or over all (0).
    fn blocks(&self, made: &[Made], rows: usize) {
        let (l, value) = (self.l, self.reduction.value);
        let columns = self.reduction.axes.len() < self.shape.len();
        let len: usize = self.shape.iter().product();
        let width: usize = self.shape[self.reduction.axes.len()..].iter().product();
        let mut given = Vec::new();
        let items = self.items(&mut given);
        let (end, others): (Vec<Made>, Vec<Made>) = made.iter().partition(|made| made.value == value);
        let own = each(&others);
        // Where words of a result go from one row to the next, the reduction comes first, and the others then.
        let apart = columns && !width.is_multiple_of(own as usize);
        let stored = if apart { Vec::new() } else { others.clone() };
        let wanted: Vec<usize> = stored.iter().map(|made| made.value).collect();
        let reduced = self.reduced(&items, &wanted);
        let (with, floats, start) = (reduced.with, reduced.floats, reduced.start);
        let plan = BlockPlan { reduced, each: each(&stored), results: stored };
        let blocks = if columns { rows.div_ceil(ROWS) } else { len.div_ceil(BLOCK) };
        let cube = CubeDim::new_1d(TOGETHER);
        let from = || arrays(l, l.op.args.iter().map(|&value| l.buffer(value)));
        let into = || arrays(l, l.op.results().map(|value| l.buffer(value)));
        if len > 0 {
            // SAFETY: units and cubes beyond the last block do nothing; the workspace has a place for each.
            unsafe {
                if columns {
                    let units = blocks * (width / plan.each as usize);
                    by_columns::launch_unchecked::<R>(
                        l.client,
                        cubes(units.div_ceil(TOGETHER as usize)),
                        cube,
                        from(),
                        into(),
                        l.workspace(),
                        l.faults(),
                        numbers(&given),
                        rows as u32,
                        width as u32,
                        l.code,
                        plan,
                    );
                } else {
                    by_blocks::launch_unchecked::<R>(
                        l.client,
                        cubes(blocks),
                        cube,
                        from(),
                        into(),
                        l.workspace(),
                        l.faults(),
                        numbers(&given),
                        len as u32,
                        l.code,
                        plan,
                    );
                }
            }
        }
        if apart && len > 0 {
            let wanted: Vec<usize> = others.iter().map(|made| made.value).collect();
            let steps = self.needed(&items, &wanted);
            elements(l, (&operands(l), &results(l)), &steps[self.body.operands()..], &others, self.shape);
        }
        let Some(end) = end.first().filter(|_| width > 0) else { return };
        let to = || l.out(end.result);
        let from = if len == 0 { to() } else { l.workspace() };
        // SAFETY: the workspace has what all blocks gave.
        unsafe {
            if columns {
                let (cubes, cube) = l.units(width.div_ceil(end.store.each() as usize));
                let (blocks, width) = (blocks as u32, width as u32);
                join_columns::launch_unchecked::<R>(
                    l.client,
                    cubes,
                    cube,
                    from,
                    to(),
                    blocks,
                    width,
                    start,
                    end.store,
                    with,
                    floats,
                );
            } else {
                let cubes = CubeCount::new_single();
                join_blocks::launch_unchecked::<R>(
                    l.client,
                    cubes,
                    cube,
                    from,
                    to(),
                    blocks as u32,
                    start,
                    end.store,
                    with,
                    floats,
                );
            }
        }
    }
}
