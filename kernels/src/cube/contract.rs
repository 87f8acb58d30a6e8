//! Products: every contraction as matrix products with strides, without copies.
//!
//! The letters of `contract` fall into four groups, as on the CPU: in both operands and the result (batch), in the left
//! operand and the result (rows), in the right operand and the result (columns), in both operands only (summed). A cube
//! makes a tile of the result from tiles of both operands in shared memory; the sum of each element runs in order.

use cubecl::prelude::*;
use dsgc_ir::Buffer;
use dsgc_ir::infer::Contraction;

use super::index::{joined, offset, strides};
use super::{Launch, MOST_CUBES, numbers};

/// Rows and columns of a tile of the result.
const TILE: usize = 64;
/// Summed letters of a tile of an operand.
const DEPTH: usize = 16;
/// Units of a cube along rows and along columns.
const SIDE: usize = 16;
/// Rows and columns of a unit.
const EACH: usize = TILE / SIDE;

/// How many dims each group has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ranks {
    batch: usize,
    rows: usize,
    columns: usize,
    summed: usize,
}

impl Ranks {
    /// Where the numbers of a group begin: extents, then strides in the left operand, the right one, the result.
    fn starts(self) -> [usize; 4] {
        let [batch, rows, columns] = [4 * self.batch, 4 * self.rows, 4 * self.columns];
        [0, batch, batch + rows, batch + rows + columns]
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn product(
    a: &Array<f32>,
    b: &Array<f32>,
    out: &mut Array<f32>,
    numbers: &Sequence<u32>,
    rows: u32,
    columns: u32,
    summed: u32,
    first_batch: u32,
    #[comptime] ranks: Ranks,
    #[comptime] add: bool,
) {
    let [at_batch, at_rows, at_columns, at_summed] = comptime!(ranks.starts());
    let (batch_rank, rows_rank) = comptime!((ranks.batch, ranks.rows));
    let (columns_rank, summed_rank) = comptime!((ranks.columns, ranks.summed));
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
        #[unroll]
        for e in 0..comptime!(TILE * DEPTH / (SIDE * SIDE)) {
            let place = UNIT_POS + comptime!((e * SIDE * SIDE) as u32);
            let (line, deep) = (place / comptime!(DEPTH as u32), place % comptime!(DEPTH as u32));
            let k = tile * comptime!(DEPTH as u32) + deep;
            let row = first_row + line;
            let column = first_column + line;
            let mut x = 0.0f32;
            let mut y = 0.0f32;
            if k < summed {
                if row < rows {
                    let at = a_start
                        + offset(row, numbers, at_rows, comptime!(at_rows + rows_rank), rows_rank)
                        + offset(k, numbers, at_summed, comptime!(at_summed + summed_rank), summed_rank);
                    x = a[at as usize];
                }
                if column < columns {
                    let at = b_start
                        + offset(column, numbers, at_columns, comptime!(at_columns + 2 * columns_rank), columns_rank)
                        + offset(k, numbers, at_summed, comptime!(at_summed + 2 * summed_rank), summed_rank);
                    y = b[at as usize];
                }
            }
            left[(deep * comptime!(TILE as u32) + line) as usize] = x;
            right[(deep * comptime!(TILE as u32) + line) as usize] = y;
        }
        sync_cube();
        for deep in 0..comptime!(DEPTH as u32) {
            let mut x = Array::<f32>::new(EACH);
            let mut y = Array::<f32>::new(EACH);
            #[unroll]
            for i in 0..EACH {
                let along = comptime!((i * SIDE) as u32);
                x[i] = left[(deep * comptime!(TILE as u32) + UNIT_POS_Y + along) as usize];
                y[i] = right[(deep * comptime!(TILE as u32) + UNIT_POS_X + along) as usize];
            }
            #[unroll]
            for i in 0..EACH {
                #[unroll]
                for j in 0..EACH {
                    sums[comptime!(i * EACH + j)] = fma(x[i], y[j], sums[comptime!(i * EACH + j)]);
                }
            }
        }
        sync_cube();
    }
    #[unroll]
    for i in 0..EACH {
        #[unroll]
        for j in 0..EACH {
            let row = first_row + UNIT_POS_Y + comptime!((i * SIDE) as u32);
            let column = first_column + UNIT_POS_X + comptime!((j * SIDE) as u32);
            if row < rows && column < columns {
                let at = out_start
                    + offset(row, numbers, at_rows, comptime!(at_rows + 3 * rows_rank), rows_rank)
                    + offset(column, numbers, at_columns, comptime!(at_columns + 3 * columns_rank), columns_rank);
                let sum = sums[comptime!(i * EACH + j)];
                if comptime!(add) {
                    out[at as usize] += sum;
                } else {
                    out[at as usize] = sum;
                }
            }
        }
    }
}

/// The product of two operands, into a result.
pub(super) fn run<R: Runtime>(l: &Launch<R>, spec: &str, operands: [usize; 2], result: usize) {
    let values =
        [l.op.args[operands[0]], l.op.args[operands[1]], l.op.results().nth(result).expect("it has this result")];
    let tensors = values.map(|value| (l.buffer(value), l.shape(value)));
    multiply(l, spec, tensors, false);
}

/// The product of two tensors into a third, or added to it.
pub(super) fn multiply<R: Runtime>(l: &Launch<R>, spec: &str, tensors: [(Buffer, Vec<usize>); 3], add: bool) {
    let labels = Contraction::parse(spec).unwrap_or_else(|why| panic!("bug: wrong labels: {why}"));
    let [(a, a_shape), (b, b_shape), (out, out_shape)] = tensors;
    let shapes = [a_shape, b_shape, out_shape];
    if shapes[2].contains(&0) {
        return;
    }
    let sides = [&labels.lhs, &labels.rhs, &labels.out];
    let place = |side: usize, letter: char| sides[side].iter().position(|&x| x == letter);
    let group = |from: usize, keep: &dyn Fn(char) -> bool| {
        let letters: Vec<char> = sides[from].iter().copied().filter(|&x| keep(x)).collect();
        let extents: Vec<usize> =
            letters.iter().map(|&x| shapes[from][place(from, x).expect("the letter is from this side")]).collect();
        let along = |side: usize| {
            let own = strides(&shapes[side]);
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
    let given: Vec<usize> =
        groups.iter().flat_map(|(extents, all)| [std::slice::from_ref(extents), &all[..]].concat().concat()).collect();
    let cube = CubeDim::new_2d(SIDE as u32, SIDE as u32);
    for first in (0..batch).step_by(MOST_CUBES) {
        let count = [columns.div_ceil(TILE), rows.div_ceil(TILE), (batch - first).min(MOST_CUBES)].map(|n| n as u32);
        // SAFETY: elements beyond the operands are not read, those beyond the result not written.
        unsafe {
            product::launch_unchecked::<R>(
                l.client,
                CubeCount::Static(count[0], count[1], count[2]),
                cube,
                l.memory.words(a),
                l.memory.words(b),
                l.memory.words(out),
                numbers(&given),
                rows as u32,
                columns as u32,
                summed as u32,
                first as u32,
                ranks,
                add,
            );
        }
    }
}
