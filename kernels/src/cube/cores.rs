//! Products of narrow floats on tensor cores, where a device has them.
//!
//! A cube makes a tile of the result, a plane of it some fragments of 16 x 16. While the planes multiply fragments of a tile
//! of both operands in shared memory, their units fetch the next one to registers, and then put it into the other half.
//! Operands are never turned: a fragment is read along the sum or across it, as the operand lies. What is beyond an operand
//! is zero. The products of narrow floats are exact, and added up in f32 by 16 in the order of the sum; how the 16 are added
//! up is the device's, always the same. The sums go through shared memory to the region that finishes them.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;
use dsgc_ir::DType;
use half::{bf16, f16};

use super::contract::{Plan, Work};
use super::index::{Store, offset, rounded, stored};
use super::kept::{Kept, factor};
use super::region::arrays;
use super::steps::{evaluate, pack, write};
use super::{Launch, numbers};

/// Rows, columns and summed letters of a fragment.
const FRAGMENT: usize = 16;
/// Summed letters of a tile of an operand.
const DEPTH: usize = 32;
/// Neighbours that a unit fetches at once, and so many that lines of a tile are apart in shared memory, so that those of a
/// fragment lie in different banks.
const RUN: usize = 8;
/// Units of a plane.
const PLANE: usize = 32;

/// The tile of a cube.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Tile {
    /// Its rows, and its columns.
    side: usize,
    /// Fragments of a plane along rows and columns.
    fragments: [usize; 2],
}

const SMALL: Tile = Tile { side: 64, fragments: [2, 2] };
const LARGE: Tile = Tile { side: 128, fragments: [4, 2] };

impl Tile {
    /// Planes along columns.
    fn across(self) -> usize {
        self.side / FRAGMENT / self.fragments[1]
    }

    fn units(self) -> usize {
        self.side / FRAGMENT / self.fragments[0] * self.across() * PLANE
    }

    /// Runs that a unit fetches of each operand.
    fn runs(self) -> usize {
        self.side * DEPTH / RUN / self.units()
    }

    /// Elements between lines of a tile of an operand, which follow the sum or go across it.
    fn stride(self, across: bool) -> usize {
        RUN + if across { self.side } else { DEPTH }
    }

    /// Runs of a tile of an operand.
    fn half(self, across: bool) -> usize {
        self.stride(across) / RUN * if across { DEPTH } else { self.side }
    }

    /// Floats between rows of the sums.
    fn sums(self) -> usize {
        self.side + FRAGMENT / 4
    }

    /// Bytes of shared memory, if the sums have their own.
    fn shared(self) -> usize {
        2 * 4 * self.half(true).max(self.half(false)) * RUN * 2 + self.sums() * self.side * 4
    }
}

/// An operand, as a kernel fetches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Side {
    kept: Kept,
    /// As what it is multiplied.
    store: Store,
    /// Whether neighbours are in a row or column of the result, and not in the sum.
    across: bool,
    /// Elements that are read at once: a run, a word, or one.
    read: usize,
    /// Where extents and strides begin, and how many there are, of rows or columns and of the sum.
    lines: [usize; 3],
    summed: [usize; 3],
}

/// All that a compiled kernel depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Cores {
    plan: Plan,
    sides: [Side; 2],
    tile: Tile,
}

/// Where a run begins in a tile of an operand: the row or column, and the summed letter.
#[cube]
fn run_place(run: u32, #[comptime] across: bool, #[comptime] tile: Tile) -> (u32, u32) {
    if comptime!(across) {
        let width = comptime!((tile.side / RUN) as u32);
        (run % width * comptime!(RUN as u32), run / width)
    } else {
        let width = comptime!((DEPTH / RUN) as u32);
        (run / width, run % width * comptime!(RUN as u32))
    }
}

/// Where an element is, in runs from where its tile begins.
#[cube]
fn run_of(line: u32, k: u32, #[comptime] across: bool, #[comptime] tile: Tile) -> u32 {
    let stride = comptime!((tile.stride(across) / RUN) as u32);
    if comptime!(across) {
        k * stride + line / comptime!(RUN as u32)
    } else {
        line * stride + k / comptime!(RUN as u32)
    }
}

/// A run of an operand as words; zeros beyond its rows or columns, and beyond the sum.
#[cube]
#[allow(clippy::too_many_arguments)]
fn fetch(
    from: &Array<u32>,
    numbers: &Sequence<u32>,
    start: u32,
    line: u32,
    k: u32,
    lines: u32,
    summed: u32,
    #[comptime] side: Side,
) -> Vector<u32, Const<4>> {
    let [line_dims, line_strides, line_rank] = comptime!(side.lines);
    let [sum_dims, sum_strides, sum_rank] = comptime!(side.summed);
    let mut words = Vector::<u32, Const<4>>::zeroed();
    if comptime!(side.read == RUN) {
        if line < lines && k < summed {
            let at = start
                + offset(line, numbers, line_dims, line_strides, line_rank)
                + offset(k, numbers, sum_dims, sum_strides, sum_rank);
            let all = from.to_slice().into_vectorized().with_vector_size::<Const<4>>();
            words = all[(at / comptime!(RUN as u32)) as usize];
        }
    } else {
        #[unroll]
        for w in 0..4usize {
            let mut word = 0u32;
            #[unroll]
            for half in 0..comptime!(2 / side.read) {
                let step = comptime!((2 * w + half) as u32);
                let (line, k) = if comptime!(side.across) { (line + step, k) } else { (line, k + step) };
                if line < lines && k < summed {
                    let at = start
                        + offset(line, numbers, line_dims, line_strides, line_rank)
                        + offset(k, numbers, sum_dims, sum_strides, sum_rank);
                    if comptime!(side.read == 2) {
                        word = from[(at / 2u32) as usize];
                    } else {
                        let bits = stored(factor(from, numbers, at, side.kept), side.store);
                        word |= bits << comptime!(16 * half as u32);
                    }
                }
            }
            words[w] = word;
        }
    }
    words
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn product<E: Float>(
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
    #[comptime] cores: Cores,
) {
    let [at_batch, at_rows, at_columns, _] = comptime!(cores.plan.ranks.starts());
    let batch_rank = comptime!(cores.plan.ranks.batch);
    let (rows_rank, columns_rank) = comptime!((cores.plan.ranks.rows, cores.plan.ranks.columns));
    let tile = comptime!(cores.tile);
    let [left_side, right_side] = comptime!(cores.sides);
    let (left_half, right_half) = comptime!((tile.half(left_side.across), tile.half(right_side.across)));
    let batch = CUBE_POS_Z + first_batch;
    let a_start = offset(batch, numbers, at_batch, comptime!(at_batch + batch_rank), batch_rank);
    let b_start = offset(batch, numbers, at_batch, comptime!(at_batch + 2 * batch_rank), batch_rank);
    let out_start = offset(batch, numbers, at_batch, comptime!(at_batch + 3 * batch_rank), batch_rank);
    let first_row = CUBE_POS_Y * comptime!(tile.side as u32);
    let first_column = CUBE_POS_X * comptime!(tile.side as u32);
    // The plane's first row and column in the tile.
    let plane = UNIT_POS / comptime!(PLANE as u32);
    let plane_row = plane / comptime!(tile.across() as u32) * comptime!((tile.fragments[0] * FRAGMENT) as u32);
    let plane_column = plane % comptime!(tile.across() as u32) * comptime!((tile.fragments[1] * FRAGMENT) as u32);
    let mut left = SharedMemory::<Vector<E, Const<8>>>::new_aligned(comptime!(2 * left_half), 32usize);
    let mut right = SharedMemory::<Vector<E, Const<8>>>::new_aligned(comptime!(2 * right_half), 32usize);
    let mut next_left = Array::<Vector<u32, Const<4>>>::new(comptime!(tile.runs()));
    let mut next_right = Array::<Vector<u32, Const<4>>>::new(comptime!(tile.runs()));
    let mut sums = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(tile.fragments[0] * tile.fragments[1]) {
        sums.push(Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            FRAGMENT,
            FRAGMENT,
            FRAGMENT,
            MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    let tiles = (summed + comptime!(DEPTH as u32 - 1)) / comptime!(DEPTH as u32);
    // Tile `t` is fetched and put into its half while the one before is multiplied.
    for t in 0..tiles + 1u32 {
        if t < tiles {
            #[unroll]
            for i in 0..comptime!(tile.runs()) {
                let run = UNIT_POS + comptime!((i * tile.units()) as u32);
                let (line, k) = run_place(run, comptime!(left_side.across), tile);
                let (line, k) = (first_row + line, t * comptime!(DEPTH as u32) + k);
                next_left[i] = fetch(a, numbers, a_start, line, k, rows, summed, left_side);
                let (line, k) = run_place(run, comptime!(right_side.across), tile);
                let (line, k) = (first_column + line, t * comptime!(DEPTH as u32) + k);
                next_right[i] = fetch(b, numbers, b_start, line, k, columns, summed, right_side);
            }
        }
        if t > 0u32 {
            // Units of a plane multiply together, and some of them may have fetched less.
            sync_plane();
            let half = (t - 1u32) % 2u32;
            #[unroll]
            for step in 0..comptime!(DEPTH / FRAGMENT) {
                let k = comptime!((step * FRAGMENT) as u32);
                let mut rights = Sequence::<Matrix<Vector<E, Const<8>>>>::new();
                #[unroll]
                for j in 0..comptime!(tile.fragments[1]) {
                    let line = plane_column + comptime!((j * FRAGMENT) as u32);
                    let at = half * comptime!(right_half as u32) + run_of(line, k, comptime!(right_side.across), tile);
                    rights.push(Matrix::<Vector<E, Const<8>>>::from_slice(
                        MatrixIdent::B,
                        FRAGMENT,
                        FRAGMENT,
                        FRAGMENT,
                        comptime!(if right_side.across { MatrixLayout::RowMajor } else { MatrixLayout::ColMajor }),
                        &right.slice(at as usize, comptime!(2 * right_half)),
                        comptime!(tile.stride(right_side.across) as u32),
                    ));
                }
                #[unroll]
                for i in 0..comptime!(tile.fragments[0]) {
                    let line = plane_row + comptime!((i * FRAGMENT) as u32);
                    let at = half * comptime!(left_half as u32) + run_of(line, k, comptime!(left_side.across), tile);
                    let own = Matrix::<Vector<E, Const<8>>>::from_slice(
                        MatrixIdent::A,
                        FRAGMENT,
                        FRAGMENT,
                        FRAGMENT,
                        comptime!(if left_side.across { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor }),
                        &left.slice(at as usize, comptime!(2 * left_half)),
                        comptime!(tile.stride(left_side.across) as u32),
                    );
                    #[unroll]
                    for j in 0..comptime!(tile.fragments[1]) {
                        let sum = sums.index(comptime!(i * tile.fragments[1] + j));
                        cmma::execute(&own, rights.index(j), sum, sum);
                    }
                }
            }
        }
        if t < tiles {
            let half = t % 2u32;
            #[unroll]
            for i in 0..comptime!(tile.runs()) {
                let run = UNIT_POS + comptime!((i * tile.units()) as u32);
                let (line, k) = run_place(run, comptime!(left_side.across), tile);
                let at = half * comptime!(left_half as u32) + run_of(line, k, comptime!(left_side.across), tile);
                left[at as usize] = Vector::<E, Const<8>>::reinterpret(next_left[i]);
                let (line, k) = run_place(run, comptime!(right_side.across), tile);
                let at = half * comptime!(right_half as u32) + run_of(line, k, comptime!(right_side.across), tile);
                right[at as usize] = Vector::<E, Const<8>>::reinterpret(next_right[i]);
            }
        }
        sync_cube();
    }
    let stride = comptime!(tile.sums() as u32);
    let mut shared = SharedMemory::<f32>::new_aligned(comptime!(tile.sums() * tile.side), 32usize);
    #[unroll]
    for i in 0..comptime!(tile.fragments[0]) {
        #[unroll]
        for j in 0..comptime!(tile.fragments[1]) {
            let row = plane_row + comptime!((i * FRAGMENT) as u32);
            let at = row * stride + plane_column + comptime!((j * FRAGMENT) as u32);
            let sum = sums.index(comptime!(i * tile.fragments[1] + j));
            let mut place = shared.slice_mut(at as usize, comptime!(tile.sums() * tile.side));
            cmma::store(&mut place, sum, stride, MatrixLayout::RowMajor);
        }
    }
    sync_cube();
    let each = comptime!(cores.plan.each);
    let width = comptime!(tile.side as u32 / each);
    for n in 0..comptime!((tile.side * tile.side / tile.units()) as u32 / each) {
        let place = UNIT_POS + n * comptime!(tile.units() as u32);
        let (line, first) = (place / width, place % width * each);
        let (row, column) = (first_row + line, first_column + first);
        if row < rows && column < columns {
            let at = out_start
                + offset(row, numbers, at_rows, comptime!(at_rows + 3 * rows_rank), rows_rank)
                + offset(column, numbers, at_columns, comptime!(at_columns + 3 * columns_rank), columns_rank);
            let mut packed = Array::<u32>::new(comptime!(cores.plan.results.len() * cores.plan.each as usize));
            #[unroll]
            for j in 0..each {
                let sum = shared[(line * stride + first + j) as usize];
                let mut given = Sequence::<u32>::new();
                given.push(rounded(u32::reinterpret(sum), comptime!(cores.plan.product)));
                let items = comptime!(cores.plan.items.clone());
                let values = evaluate(operands, numbers, &given, faults, at + j, code, items);
                pack(&mut packed, &values, j, each, comptime!(cores.plan.results.clone()));
            }
            write(results, &packed, at, at + each, each, comptime!(cores.plan.results.clone()));
        }
    }
}

/// Whether products that compute in a type run on tensor cores, where a device has them.
pub(super) fn multiplies(computed: DType) -> bool {
    matches!(computed, DType::Bf16 | DType::F16)
}

/// The tiles of a cube.
pub(super) fn tiles() -> String {
    format!("tensor cores, tiles of {0} x {0} or {1} x {1} by {DEPTH}", SMALL.side, LARGE.side)
}

/// Large tiles read operands less often, where they are enough for all multiprocessors and fit their shared memory.
fn tile<R: Runtime>(l: &Launch<R>, work: &Work) -> Tile {
    let device = &l.client.properties().hardware;
    let count = work.rows / LARGE.side * (work.columns / LARGE.side) * work.batch;
    let enough = count >= device.num_streaming_multiprocessors.unwrap_or(1) as usize;
    if enough && LARGE.shared() <= device.max_shared_memory_size { LARGE } else { SMALL }
}

/// How an operand is fetched.
fn side(work: &Work, which: usize) -> Side {
    let (plan, ranks) = (&work.plan, work.plan.ranks);
    let [_, at_rows, at_columns, at_summed] = ranks.starts();
    let (at_lines, rank) = [(at_rows, ranks.rows), (at_columns, ranks.columns)][which];
    let lines = [at_lines, at_lines + (1 + which) * rank, rank];
    let summed = [at_summed, at_summed + (1 + which) * ranks.summed, ranks.summed];
    let batch = [0, (1 + which) * ranks.batch, ranks.batch];
    let across = plan.across[which];
    let strides = |[_, at, rank]: [usize; 3]| &work.numbers[at..at + rank];
    let (along, other) = if across { (lines, summed) } else { (summed, lines) };
    // Elements that lie side by side, and begin where so many do, are read at once.
    let whole = |read: usize| {
        let Some((1, rest)) = strides(along).split_last().map(|(last, rest)| (*last, rest)) else { return false };
        let extent = work.numbers[along[0] + along[2] - 1];
        let all = rest.iter().chain(strides(other)).chain(strides(batch)).chain([&extent]);
        all.into_iter().all(|n| n % read == 0)
    };
    let floats = matches!(plan.kept[which], Kept::Floats(_));
    let read = [RUN, 2].into_iter().find(|&read| floats && whole(read)).unwrap_or(1);
    Side { kept: plan.kept[which], store: Store::of(work.computed), across, read, lines, summed }
}

/// Runs a product whose operands are narrow floats of one type, or numbers in few bits beside such.
pub(super) fn run<R: Runtime>(l: &Launch<R>, work: &Work) {
    let cores = Cores { plan: work.plan.clone(), sides: [0, 1].map(|which| side(work, which)), tile: tile(l, work) };
    match work.computed {
        DType::Bf16 => launch::<bf16, R>(l, work, &cores),
        _ => launch::<f16, R>(l, work, &cores),
    }
}

fn launch<E: Float, R: Runtime>(l: &Launch<R>, work: &Work, cores: &Cores) {
    for (cubes, first) in work.launches(cores.tile.side) {
        // SAFETY: elements beyond the operands are not read, those beyond the result not written.
        unsafe {
            product::launch_unchecked::<E, R>(
                l.client,
                cubes,
                CubeDim::new_1d(cores.tile.units() as u32),
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
                cores.clone(),
            );
        }
    }
}
