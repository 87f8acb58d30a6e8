//! Reductions, in blocks of a fixed size.
//!
//! Orders are fixed, and those of a fused region's reduction ([`Folding`]): elements of a row go to [`LANES`] sums, which are
//! added pairwise, in blocks of [`BLOCK`] whose sums are a row again; rows of a column sum are added in groups of [`ROWS`].

use dsgc_ir::{DType, Op};
use multiversion::multiversion;

use super::Launch;
use super::elementwise::{larger, smaller};
use super::lanes::together;
use super::memory::Ptr;
use super::structure::strides;

/// Elements of a row, or of a whole tensor, that one partial result covers.
pub(super) const BLOCK: usize = 8 * 1024;
/// Independent sums in a loop: enough for the longest vectors, and pairwise enough for the last digits.
const LANES: usize = 32;
/// Rows of a column sum between two additions to the total.
pub(super) const ROWS: usize = 64;
/// Columns of a column sum that a thread takes at once at most: their sums stay in the first-level cache. As many as there
/// are, since from row to row memory is asked for anew.
const COLUMNS: usize = 2048;
/// Columns that are not cut apart: a cache line of floats.
const LINE: usize = 16;

/// Bytes for the partial results of `n` elements.
pub(super) fn workspace(n: usize) -> usize {
    n.div_ceil(BLOCK) * size_of::<f64>()
}

/// How elements become one.
trait Fold<T: Copy>: Copy + Sync + 'static {
    const START: T;
    fn with(self, a: T, b: T) -> T;
}

macro_rules! folds {
    ($($name:ident $t:ty: $start:expr, $with:expr;)*) => { $(
        #[derive(Clone, Copy)]
        struct $name;
        impl Fold<$t> for $name {
            const START: $t = $start;
            #[inline(always)]
            fn with(self, a: $t, b: $t) -> $t { $with(a, b) }
        }
    )* };
}
folds! {
    SumF f32: 0.0, |a, b| a + b;
    MaxF f32: f32::NEG_INFINITY, larger;
    MinF f32: f32::INFINITY, smaller;
    SumI i32: 0, i32::wrapping_add;
    MaxI i32: i32::MIN, Ord::max;
    MinI i32: i32::MAX, Ord::min;
}

/// A row that comes in pieces.
struct Pieces<T, F> {
    fold: F,
    /// Elements that are still to come for the lanes; those behind them are fewer than lanes.
    whole: usize,
    /// The lane of the next element.
    lane: usize,
    lanes: [T; LANES],
    total: T,
}

impl<T: Copy, F: Fold<T>> Pieces<T, F> {
    fn new(fold: F, len: usize) -> Pieces<T, F> {
        Pieces { fold, whole: len - len % LANES, lane: 0, lanes: [F::START; LANES], total: F::START }
    }

    #[inline(always)]
    fn push(&mut self, piece: &[T]) {
        let (whole, tail) = piece.split_at(piece.len().min(self.whole));
        if !whole.is_empty() {
            self.lane = fold_lanes(&mut self.lanes, self.lane, whole, self.fold);
            self.whole -= whole.len();
            if self.whole == 0 {
                self.total = together(self.lanes, |a, b| self.fold.with(a, b));
            }
        }
        self.total = tail.iter().fold(self.total, |a, &b| self.fold.with(a, b));
    }
}

/// Folds elements into the lanes from one on; the lane of the next element.
#[inline(always)]
fn fold_lanes<T: Copy, F: Fold<T>>(lanes: &mut [T; LANES], first: usize, elements: &[T], fold: F) -> usize {
    let (head, rest) = elements.split_at(elements.len().min((LANES - first) % LANES));
    for (j, &x) in (first..).zip(head) {
        lanes[j] = fold.with(lanes[j], x);
    }
    let mut sums = *lanes;
    let chunks = rest.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for j in 0..LANES {
            sums[j] = fold.with(sums[j], chunk[j]);
        }
    }
    for (j, &x) in tail.iter().enumerate() {
        sums[j] = fold.with(sums[j], x);
    }
    *lanes = sums;
    (first + elements.len()) % LANES
}

/// A row as one block.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn fold_block<T: Copy, F: Fold<T>>(block: &[T], fold: F) -> T {
    let mut pieces = Pieces::new(fold, block.len());
    pieces.push(block);
    pieces.total
}

/// A part of a row that comes in pieces.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn fold_piece<T: Copy, F: Fold<T>>(pieces: &mut Pieces<T, F>, piece: &[T]) {
    pieces.push(piece);
}

/// A row in blocks of [`BLOCK`] elements.
fn fold_row<T: Copy, F: Fold<T>>(row: &[T], fold: F) -> T {
    if row.len() <= BLOCK {
        return fold_block(row, fold);
    }
    let mut blocks = Pieces::new(fold, row.len().div_ceil(BLOCK));
    row.chunks(BLOCK).for_each(|part| blocks.push(&[fold_block(part, fold)]));
    blocks.total
}

/// What folds elements of 4 bytes that a region computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Folding {
    SumF,
    MaxF,
    MinF,
    SumI,
    MaxI,
    MinI,
}

/// # Safety
/// The place holds an element of the type.
unsafe fn write<T>(to: *mut u8, element: T) {
    // SAFETY: the caller's promise.
    unsafe { to.cast::<T>().write(element) };
}

/// An expression over the fold that a [`Folding`] stands for.
macro_rules! with_fold {
    ($folding:expr, $fold:ident => $value:expr) => {
        match $folding {
            Folding::SumF => {
                let $fold = SumF;
                $value
            }
            Folding::MaxF => {
                let $fold = MaxF;
                $value
            }
            Folding::MinF => {
                let $fold = MinF;
                $value
            }
            Folding::SumI => {
                let $fold = SumI;
                $value
            }
            Folding::MaxI => {
                let $fold = MaxI;
                $value
            }
            Folding::MinI => {
                let $fold = MinI;
                $value
            }
        }
    };
}

impl Folding {
    /// That of a reduction of elements of a type; narrow floats are widened before.
    pub(super) fn of(op: &Op, dtype: DType) -> Folding {
        match (dtype == DType::I32, op) {
            (false, Op::ReduceSum { .. }) => Folding::SumF,
            (false, Op::ReduceMax { .. }) => Folding::MaxF,
            (false, _) => Folding::MinF,
            (true, Op::ReduceSum { .. }) => Folding::SumI,
            (true, Op::ReduceMax { .. }) => Folding::MaxI,
            (true, _) => Folding::MinI,
        }
    }

    /// Folds each of `count` rows of `len` elements, one after the other.
    ///
    /// # Safety
    /// The places hold so many elements of 4 bytes, and `count` results, and are apart.
    pub(super) unsafe fn rows(self, from: *const u8, len: usize, to: *mut u8, count: usize) {
        unsafe fn each<T: Copy, F: Fold<T>>(fold: F, from: *const T, len: usize, to: *mut T, count: usize) {
            for i in 0..count {
                // SAFETY: the caller's promise.
                unsafe { *to.add(i) = fold_row(std::slice::from_raw_parts(from.add(i * len), len), fold) };
            }
        }
        // SAFETY: as above.
        with_fold!(self, fold => unsafe { each(fold, from.cast(), len, to.cast(), count) });
    }

    /// Folds a row of `len` elements that comes in pieces: where the next one lies, and how many elements it has.
    ///
    /// # Safety
    /// The pieces are `len` elements of 4 bytes together, and none goes over the end of a block of [`BLOCK`].
    pub(super) unsafe fn pieces(self, len: usize, next: &mut dyn FnMut() -> Option<(*const u8, usize)>, to: *mut u8) {
        fn all<T: Copy, F: Fold<T>>(fold: F, len: usize, next: &mut dyn FnMut() -> Option<(*const u8, usize)>) -> T {
            let (mut at, mut block) = (0, Pieces::new(fold, len.min(BLOCK)));
            let mut blocks = Pieces::new(fold, len.div_ceil(BLOCK));
            while let Some((from, n)) = next() {
                // SAFETY: the caller's promise.
                fold_piece(&mut block, unsafe { std::slice::from_raw_parts(from.cast(), n) });
                at += n;
                if at == len || at % BLOCK == 0 {
                    blocks.push(&[block.total]);
                    block = Pieces::new(fold, (len - at).min(BLOCK));
                }
            }
            blocks.total
        }
        with_fold!(self, fold => {
            let total = all(fold, len, next);
            // SAFETY: a result's place holds an element.
            unsafe { write(to, total) };
        });
    }

    /// Folds what blocks of a tensor gave.
    ///
    /// # Safety
    /// The places hold `n` elements of 4 bytes and one, and are apart.
    pub(super) unsafe fn blocks(self, from: *const u8, n: usize, to: *mut u8) {
        // SAFETY: the caller's promise.
        with_fold!(self, fold => unsafe { write(to, fold_block(std::slice::from_raw_parts(from.cast(), n), fold)) });
    }

    /// Fills `n` places with what nothing gives.
    ///
    /// # Safety
    /// The place holds so many elements of 4 bytes.
    pub(super) unsafe fn start(self, to: *mut u8, n: usize) {
        fn of<T: Copy, F: Fold<T>>(_: F) -> T {
            F::START
        }
        // SAFETY: the caller's promise.
        with_fold!(self, fold => unsafe { std::slice::from_raw_parts_mut(to.cast(), n).fill(of(fold)) });
    }

    /// Folds each of `n` elements into one of as many totals.
    ///
    /// # Safety
    /// Both places hold so many elements of 4 bytes, and are apart.
    pub(super) unsafe fn each(self, totals: *mut u8, from: *const u8, n: usize) {
        // SAFETY: the caller's promise.
        with_fold!(self, fold => unsafe {
            fold_into(std::slice::from_raw_parts_mut(totals.cast(), n), std::slice::from_raw_parts(from.cast(), n), fold);
        });
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn fold_into<T: Copy, F: Fold<T>>(into: &mut [T], row: &[T], fold: F) {
    for (a, &b) in into.iter_mut().zip(row) {
        *a = fold.with(*a, b);
    }
}

/// Runs a reduction over dims.
pub(super) fn run(l: &mut Launch, axes: &[usize]) {
    with_fold!(Folding::of(&l.op.op, l.dtype(l.result())), fold => reduce(l, axes, fold));
}

fn reduce<T: Copy + Send + Sync, F: Fold<T>>(l: &mut Launch, axes: &[usize], fold: F) {
    let shape = l.shape(l.op.args[0]);
    // Neighbouring dims of one kind are one dim: (extent, whether it goes away).
    let mut dims: Vec<(usize, bool)> = Vec::new();
    for (i, &extent) in shape.iter().enumerate() {
        let goes = axes.contains(&i);
        match dims.last_mut() {
            _ if extent == 1 => {}
            Some(last) if last.1 == goes => last.0 *= extent,
            _ => dims.push((extent, goes)),
        }
    }
    let (a, out): (Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0));
    match dims.as_slice() {
        [] => unsafe {
            // SAFETY: one element becomes one element.
            *out.0 = fold.with(F::START, *a.0);
        },
        &[(n, true)] => all(l, a, out, n, fold),
        &[(n, false)] => rows(l, a, out, n, 1, fold),
        &[(n, false), (width, true)] => rows(l, a, out, n, width, fold),
        &[(height, true), (width, false)] => columns(l, a, out, 1, height, width, fold),
        &[(n, false), (height, true), (width, false)] => columns(l, a, out, n, height, width, fold),
        dims => scattered(l, a, out, dims, fold),
    }
}

fn all<T: Copy + Send + Sync, F: Fold<T>>(l: &mut Launch, a: Ptr<T>, out: Ptr<T>, n: usize, fold: F) {
    let blocks = n.div_ceil(BLOCK);
    let partial: Ptr<T> = l.workspace();
    // SAFETY: the workspace has a place per block, and the operand `n` elements.
    unsafe {
        l.threads.run(blocks, BLOCK, |r| {
            for i in r {
                let at = i * BLOCK;
                *partial.add(i).0 = fold_block(a.slice(at, BLOCK.min(n - at)), fold);
            }
        });
        *out.0 = fold_block(partial.slice(0, blocks), fold);
    }
}

fn rows<T: Copy + Send + Sync, F: Fold<T>>(l: &mut Launch, a: Ptr<T>, out: Ptr<T>, n: usize, width: usize, fold: F) {
    l.threads.run(n, width, |r| {
        for i in r {
            // SAFETY: the operand has `n` rows, the result an element for each.
            unsafe { *out.add(i).0 = fold_row(a.slice(i * width, width), fold) };
        }
    });
}

fn columns<T: Copy + Send + Sync, F: Fold<T>>(
    l: &mut Launch,
    a: Ptr<T>,
    out: Ptr<T>,
    n: usize,
    height: usize,
    width: usize,
    fold: F,
) {
    let lines = width.div_ceil(LINE);
    l.threads.run(n * lines, height * LINE, |r| {
        let (mut sum, mut line) = ([F::START; COLUMNS], r.start);
        while line < r.end {
            let (block, first) = (line / lines, line % lines);
            let last = lines.min(first + r.end - line).min(first + COLUMNS / LINE);
            let from = first * LINE;
            let take = (last * LINE).min(width) - from;
            // SAFETY: columns `from..from + take` of one block; every thread has its own.
            let total = unsafe { out.slice_mut(block * width + from, take) };
            // SAFETY: a row of the block.
            let row = |row: usize| unsafe { a.slice((block * height + row) * width + from, take) };
            total.fill(F::START);
            for first in (0..height).step_by(ROWS) {
                let sum = &mut sum[..take];
                sum.fill(F::START);
                (first..height.min(first + ROWS)).for_each(|at| fold_into(sum, row(at), fold));
                fold_into(total, sum, fold);
            }
            line += last - first;
        }
    });
}

/// Any mixture of dims that stay and dims that go.
fn scattered<T: Copy + Send + Sync, F: Fold<T>>(
    l: &mut Launch,
    a: Ptr<T>,
    out: Ptr<T>,
    dims: &[(usize, bool)],
    fold: F,
) {
    let own = strides(&dims.iter().map(|d| d.0).collect::<Vec<_>>());
    let of = |goes: bool| -> Vec<(usize, usize)> {
        dims.iter().zip(&own).filter(|(d, _)| d.1 == goes).map(|(d, &s)| (d.0, s)).collect()
    };
    let (stay, go) = (of(false), of(true));
    let count = |dims: &[(usize, usize)]| dims.iter().map(|d| d.0).product::<usize>();
    let offset = |dims: &[(usize, usize)], i: usize| {
        let (mut rest, mut at) = (i, 0);
        for &(extent, stride) in dims.iter().rev() {
            at += rest % extent * stride;
            rest /= extent;
        }
        at
    };
    l.threads.run(count(&stay), count(&go), |r| {
        for i in r {
            let base = offset(&stay, i);
            let mut sum = F::START;
            for j in 0..count(&go) {
                // SAFETY: offsets come from the operand's own dims.
                sum = fold.with(sum, unsafe { *a.add(base + offset(&go, j)).0 });
            }
            // SAFETY: element `i` of the result belongs to this thread.
            unsafe { *out.add(i).0 = sum };
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn dot_row(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (x, y) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail = x.remainder().iter().zip(y.remainder()).fold(0.0, |sum, (a, b)| sum + a * b);
    for (x, y) in x.zip(y) {
        for j in 0..LANES {
            lanes[j] += x[j] * y[j];
        }
    }
    together(lanes, |a, b| a + b) + tail
}

/// The sum of products of two dense vectors. Partial sums are added in doubles: gradient norms of large models are
/// sums over 10^8 elements.
pub(super) fn dot(l: &mut Launch, a: Ptr<f32>, b: Ptr<f32>, out: Ptr<f32>, n: usize) {
    let blocks = n.div_ceil(BLOCK);
    let partial: Ptr<f32> = l.workspace();
    // SAFETY: the workspace has a place per block, and both operands `n` elements.
    unsafe {
        l.threads.run(blocks, BLOCK, |r| {
            for i in r {
                let at = i * BLOCK;
                let len = BLOCK.min(n - at);
                *partial.add(i).0 = dot_row(a.slice(at, len), b.slice(at, len));
            }
        });
        *out.0 = partial.slice(0, blocks).iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
    }
}

/// The sums of squares of several tensors, each as by [`dot`], added from the first to the last. Blocks of all tensors are
/// shared out to the threads together.
pub(super) fn sum_squares(l: &mut Launch) {
    let partial: Ptr<f32> = l.workspace();
    // (elements, how many, its first block)
    let mut tensors: Vec<(Ptr<f32>, usize, usize)> = Vec::with_capacity(l.op.args.len());
    let mut blocks = 0;
    for i in 0..l.op.args.len() {
        let n = l.len(l.op.args[i]);
        tensors.push((l.arg(i), n, blocks));
        blocks += n.div_ceil(BLOCK);
    }
    l.threads.run(blocks, BLOCK, |r| {
        let mut of = tensors.partition_point(|t| t.2 <= r.start) - usize::from(!r.is_empty());
        for i in r {
            while tensors.get(of + 1).is_some_and(|next| next.2 <= i) {
                of += 1;
            }
            let (a, n, first) = tensors[of];
            let at = (i - first) * BLOCK;
            // SAFETY: block `i` lies in the tensor, and the workspace has a place for it.
            unsafe {
                let part = a.slice(at, BLOCK.min(n - at));
                *partial.add(i).0 = dot_row(part, part);
            }
        }
    });
    let sums = tensors.iter().map(|&(_, n, first)| {
        // SAFETY: every block of the tensor has its place.
        let blocks = unsafe { partial.slice(first, n.div_ceil(BLOCK)) };
        blocks.iter().map(|&x| f64::from(x)).sum::<f64>() as f32
    });
    let sum = sums.reduce(|a, b| a + b).expect("the op has an operand");
    // SAFETY: a scalar's buffer holds one element.
    unsafe { *l.out::<f32>(0).0 = sum };
}

/// Running sums along a dim.
pub(super) fn cumsum(l: &mut Launch, axis: usize, reverse: bool) {
    match l.dtype(l.result()) {
        DType::I32 => running(l, axis, reverse, i32::wrapping_add),
        _ => running(l, axis, reverse, |a: f32, b: f32| a + b),
    }
}

/// `y[t] = x[t] + decay * y[t - 1]` along a dim.
pub(super) fn recurrence(l: &mut Launch, axis: usize, decay: f32, reverse: bool) {
    running(l, axis, reverse, |before: f32, x: f32| x + decay * before);
}

fn running<T: Copy + Send + Sync>(l: &mut Launch, axis: usize, reverse: bool, add: impl Fn(T, T) -> T + Sync) {
    let shape = l.shape(l.result());
    let (extent, inner): (usize, usize) = (shape[axis], shape[axis + 1..].iter().product());
    let lines = shape[..axis].iter().product::<usize>() * inner;
    let (a, out): (Ptr<T>, Ptr<T>) = (l.arg(0), l.out(0));
    l.threads.run(lines, extent, |r| {
        for line in r {
            let base = line / inner * extent * inner + line % inner;
            let place = |i: usize| base + if reverse { extent - 1 - i } else { i } * inner;
            // SAFETY: every place of a line lies in both tensors, and lines are apart.
            unsafe {
                for i in 0..extent {
                    let x = *a.add(place(i)).0;
                    *out.add(place(i)).0 = if i == 0 { x } else { add(*out.add(place(i - 1)).0, x) };
                }
            }
        }
    });
}
