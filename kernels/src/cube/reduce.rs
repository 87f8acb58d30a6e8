//! Sums and extremes over dims, running sums, and the squares of all elements summed.

use cubecl::prelude::*;
use dsgc_ir::{Along, DType, Op};

use super::index::{Store, element, joined, offset, strides};
use super::{Launch, cubes, math, numbers, region};

/// Units of a cube that reduces together.
pub(super) const TOGETHER: u32 = 64;

/// So many elements are reduced by one unit where there are no more.
const FEW: usize = 64;

/// Elements whose squares a cube sums.
const BLOCK: usize = 1 << 14;

/// What is done with two elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum With {
    Sum,
    Max,
    Min,
}

/// All that a compiled kernel depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    kept: usize,
    reduced: usize,
    with: With,
    /// Whether elements are floats.
    floats: bool,
    /// How the operand's are stored; those of the result are whole words.
    store: Store,
}

#[cube]
pub(super) fn join(a: u32, b: u32, #[comptime] with: With, #[comptime] floats: bool) -> u32 {
    if comptime!(floats) {
        u32::reinterpret(join_floats(f32::reinterpret(a), f32::reinterpret(b), with))
    } else {
        u32::reinterpret(join_ints(i32::reinterpret(a), i32::reinterpret(b), with))
    }
}

#[cube]
fn join_floats(a: f32, b: f32, #[comptime] with: With) -> f32 {
    match with {
        With::Sum => a + b,
        With::Max => math::larger(a, b),
        With::Min => math::smaller(a, b),
    }
}

#[cube]
fn join_ints(a: i32, b: i32, #[comptime] with: With) -> i32 {
    match with {
        With::Sum => a + b,
        With::Max => select(a > b, a, b),
        With::Min => select(a < b, a, b),
    }
}

/// Joins floats that the units of a cube have, in pairs; all units get the result.
#[cube]
pub(super) fn together(own: f32, #[comptime] with: With) -> f32 {
    f32::reinterpret(words_together(u32::reinterpret(own), with, true))
}

/// The same of floats or whole numbers.
#[cube]
pub(super) fn words_together(own: u32, #[comptime] with: With, #[comptime] floats: bool) -> u32 {
    let mut shared = SharedMemory::<u32>::new(comptime!(TOGETHER as usize));
    shared[UNIT_POS as usize] = own;
    sync_cube();
    #[unroll]
    for step in 0..comptime!(TOGETHER.ilog2()) {
        let width = comptime!(TOGETHER >> (step + 1));
        if UNIT_POS < width {
            let other = shared[(UNIT_POS + width) as usize];
            shared[UNIT_POS as usize] = join(shared[UNIT_POS as usize], other, with, floats);
        }
        sync_cube();
    }
    let joined = shared[0];
    // Nobody writes before all have read.
    sync_cube();
    joined
}

/// `numbers`: extents and strides of the kept dims, then those of the reduced ones. A unit per result.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn alone(
    from: &Array<u32>,
    to: &mut Array<u32>,
    numbers: &Sequence<u32>,
    results: u32,
    terms: u32,
    start: u32,
    #[comptime] plan: Plan,
) {
    let i = ABSOLUTE_POS as u32;
    let (kept, reduced) = comptime!((plan.kept, plan.reduced));
    if i < results {
        let base = offset(i, numbers, 0usize, kept, kept);
        let mut all = start;
        for t in 0..terms {
            let at = base + offset(t, numbers, comptime!(2 * kept), comptime!(2 * kept + reduced), reduced);
            all = join(all, element(from, at, plan.store), plan.with, plan.floats);
        }
        to[i as usize] = all;
    }
}

/// As [`alone`], a cube per result: each unit takes every so many elements, and then they are joined in pairs.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn by_cubes(
    from: &Array<u32>,
    to: &mut Array<u32>,
    numbers: &Sequence<u32>,
    results: u32,
    terms: u32,
    start: u32,
    #[comptime] plan: Plan,
) {
    let i = CUBE_POS as u32;
    let (kept, reduced) = comptime!((plan.kept, plan.reduced));
    let mut all = start;
    if i < results {
        let base = offset(i, numbers, 0usize, kept, kept);
        let mut t = UNIT_POS;
        while t < terms {
            let at = base + offset(t, numbers, comptime!(2 * kept), comptime!(2 * kept + reduced), reduced);
            all = join(all, element(from, at, plan.store), plan.with, plan.floats);
            t += TOGETHER;
        }
    }
    let joined = words_together(all, plan.with, plan.floats);
    if i < results && UNIT_POS == 0u32 {
        to[i as usize] = joined;
    }
}

/// Squares of the elements of each block, summed; the sums from the place `first` on.
#[cube(launch_unchecked)]
fn squares(from: &Array<f32>, sums: &mut Array<f32>, len: u32, first: u32) {
    let block = CUBE_POS as u32;
    let start = block * comptime!(BLOCK as u32);
    let mut own = 0.0f32;
    if start < len {
        let end = min(len, start + comptime!(BLOCK as u32));
        let mut i = start + UNIT_POS;
        while i < end {
            let x = from[i as usize];
            own = fma(x, x, own);
            i += TOGETHER;
        }
    }
    let sum = together(own, With::Sum);
    if start < len && UNIT_POS == 0u32 {
        sums[(first + block) as usize] = sum;
    }
}

/// All numbers summed, by one cube.
#[cube(launch_unchecked)]
fn total(from: &Array<f32>, to: &mut Array<f32>, len: u32) {
    let mut own = 0.0f32;
    let mut i = UNIT_POS;
    while i < len {
        own += from[i as usize];
        i += TOGETHER;
    }
    let sum = together(own, With::Sum);
    if UNIT_POS == 0u32 {
        to[0] = sum;
    }
}

/// `y[t] = x[t] + decay y[t - 1]` along a dim of `extent` with `inner` elements behind each place; a unit per line.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn running(
    from: &Array<u32>,
    to: &mut Array<u32>,
    lines: u32,
    extent: u32,
    inner: u32,
    decay: f32,
    #[comptime] reverse: bool,
    #[comptime] floats: bool,
) {
    let line = ABSOLUTE_POS as u32;
    if line < lines {
        let start = line / inner * extent * inner + line % inner;
        let mut before = 0u32;
        for t in 0..extent {
            let place = select(reverse.runtime(), extent - 1u32 - t, t);
            let at = (start + place * inner) as usize;
            if comptime!(floats) {
                before = u32::reinterpret(f32::reinterpret(from[at]) + decay * f32::reinterpret(before));
            } else {
                before += from[at];
            }
            to[at] = before;
        }
    }
}

/// Bytes of workspace of `sum_squares` on operands of so many elements.
pub(super) fn workspace(operands: impl Iterator<Item = usize>) -> usize {
    operands.map(|len| len.div_ceil(BLOCK)).sum::<usize>() * 4
}

/// What a reduction does with two elements, and the word with which it begins.
pub(super) fn beginning(op: &Op, floats: bool) -> (With, u32) {
    match (op, floats) {
        (Op::ReduceSum { .. }, _) => (With::Sum, 0),
        (Op::ReduceMax { .. }, true) => (With::Max, f32::NEG_INFINITY.to_bits()),
        (Op::ReduceMax { .. }, false) => (With::Max, i32::MIN.cast_unsigned()),
        (_, true) => (With::Min, f32::INFINITY.to_bits()),
        (_, false) => (With::Min, i32::MAX.cast_unsigned()),
    }
}

/// A reduction over dims.
pub(super) fn run<R: Runtime>(l: &Launch<R>, axes: &[usize]) {
    let arg = l.op.args[0];
    let floats = l.dtype(arg).is_float();
    let (with, start) = beginning(&l.op.op, floats);
    let shape = l.shape(arg);
    let dense = strides(&shape);
    let part = |reduced: bool| {
        let dims: Vec<usize> = (0..shape.len()).filter(|d| axes.contains(d) == reduced).collect();
        let pick = |from: &[usize]| dims.iter().map(|&d| from[d]).collect::<Vec<usize>>();
        let (extents, along) = joined(&pick(&shape), &[pick(&dense)]);
        (extents, along.concat())
    };
    let (kept, reduced) = (part(false), part(true));
    let [results, terms] = [&kept.0, &reduced.0].map(|extents| extents.iter().product::<usize>());
    if results == 0 {
        return;
    }
    if terms > FEW && Along::of(axes, shape.len()).is_some() {
        region::reduction(l);
        return;
    }
    let plan = Plan { kept: kept.0.len(), reduced: reduced.0.len(), with, floats, store: Store::of(l.dtype(arg)) };
    let given = numbers(&[kept.0, kept.1, reduced.0, reduced.1].concat());
    let (from, to, results_, terms_) = (l.arg(0), l.out(0), results as u32, terms as u32);
    // SAFETY: what is read lies in the operand, whose shape the strides come from; nothing is written behind the results.
    unsafe {
        if terms <= FEW || results >= BLOCK {
            let (cubes, cube) = l.units(results);
            alone::launch_unchecked::<R>(l.client, cubes, cube, from, to, given, results_, terms_, start, plan);
        } else {
            let cube = CubeDim::new_1d(TOGETHER);
            by_cubes::launch_unchecked::<R>(
                l.client,
                cubes(results),
                cube,
                from,
                to,
                given,
                results_,
                terms_,
                start,
                plan,
            );
        }
    }
}

/// The squares of all elements of all operands.
pub(super) fn sum_squares<R: Runtime>(l: &Launch<R>) {
    let cube = CubeDim::new_1d(TOGETHER);
    let mut first = 0;
    for (i, &arg) in l.op.args.iter().enumerate() {
        let len = l.len(arg);
        let blocks = len.div_ceil(BLOCK);
        if blocks > 0 {
            // SAFETY: cubes beyond the last block do nothing; the workspace has a place for each block of each operand.
            unsafe {
                squares::launch_unchecked::<R>(
                    l.client,
                    cubes(blocks),
                    cube,
                    l.arg(i),
                    l.workspace(),
                    len as u32,
                    first as u32,
                );
            }
        }
        first += blocks;
    }
    let from = if first == 0 { l.out(0) } else { l.workspace() };
    // SAFETY: all these sums were made.
    unsafe { total::launch_unchecked::<R>(l.client, CubeCount::new_single(), cube, from, l.out(0), first as u32) }
}

/// A running sum along a dim.
pub(super) fn along<R: Runtime>(l: &Launch<R>, axis: usize, decay: f64, reverse: bool) {
    let shape = l.shape(l.op.args[0]);
    let (extent, inner) = (shape[axis], shape[axis + 1..].iter().product::<usize>());
    let lines = shape[..axis].iter().product::<usize>() * inner;
    if lines * extent == 0 {
        return;
    }
    let floats = l.dtype(l.op.args[0]) == DType::F32;
    let (cubes, cube) = l.units(lines);
    let sizes = [lines as u32, extent as u32, inner as u32];
    // SAFETY: units beyond the last line do nothing.
    unsafe {
        running::launch_unchecked::<R>(
            l.client,
            cubes,
            cube,
            l.arg(0),
            l.out(0),
            sizes[0],
            sizes[1],
            sizes[2],
            decay as f32,
            reverse,
            floats,
        );
    }
}
