//! Regions around a reduction.
//!
//! Elements go through the stages before the reduction and are folded while they are in the cache; orders of sums are those
//! of the op alone ([`Folding`]). *Rows* of up to [`LONGEST`] elements stay there until their value is known and go through the
//! stages behind it; short ones share a block. Of a longer row the stages run twice, block by block: that reads its operands
//! again, from the second-level cache as a rule, where keeping what they gave would take as much and have to be written.
//! *Columns* are folded in groups of rows, and a *whole* tensor in blocks, whose totals wait in the workspace for each other.

use std::ops::Range;

use dsgc_ir::{Along, Body, DType, Op};

use super::super::memory::Ptr;
use super::super::narrow::{round, widen};
use super::super::parallel::Threads;
use super::super::reduce::{self, Folding};
use super::plan::{Home, Plan, step_args};
use super::{BLOCK, Compiled, Run, Space, fill_constant, stretch};

/// Elements of the longest row that is kept: a few such rows are in a second-level cache at once.
const LONGEST: usize = 8 * 1024;

/// What a reduction goes over.
pub(super) struct Reduced {
    along: Along,
    folding: Folding,
    /// What is folded, by the number of the value, and its element type.
    arg: usize,
    dtype: DType,
    /// The number of the reduction's value.
    value: usize,
    /// The place of the reduction among the stages.
    stage: usize,
    /// Rows of the region and the elements of each: those that are folded, or over which columns are.
    rows: usize,
    width: usize,
    /// Where the operands' elements for the rows lie.
    space: Space,
    /// The buffer of elements that are widened before they are folded; the next one is that of their totals.
    widened: usize,
}

/// Rows, and the elements of each, that a reduction of a region of these extents goes over.
fn extents(body: &Body, shape: &[usize]) -> Option<(Along, usize, usize)> {
    let reduction = body.reduction()?;
    let along = reduction.along(shape.len());
    let lead = match along {
        Along::Rows => reduction.axes[0],
        Along::Columns => reduction.axes.len(),
        Along::Whole => 0,
    };
    Some((along, shape[..lead].iter().product(), shape[lead..].iter().product()))
}

/// Elements of a block of a region: a whole row, if it is kept.
pub(super) fn block(body: &Body, shape: &[usize]) -> usize {
    match extents(body, shape) {
        Some((Along::Rows, _, width)) if width <= LONGEST => width.next_multiple_of(BLOCK).max(BLOCK),
        _ => BLOCK,
    }
}

/// The same where the region's extents may be anything up to these.
pub(super) fn largest_block(body: &Body, shape: &[usize]) -> usize {
    match extents(body, shape) {
        Some((Along::Rows, _, width)) if width > LONGEST => LONGEST,
        _ => block(body, shape),
    }
}

/// Blocks of the workspace of a thread for a reduction, besides those of the plan: for narrow floats the elements that are
/// widened before they are folded, and their totals before they are rounded.
pub(super) fn buffers(body: &Body, plan: &Plan) -> usize {
    if body.reduction().is_some_and(|r| plan.dtypes[r.arg].is_narrow()) { 2 } else { 0 }
}

/// Bytes for what wait in the workspace: totals of groups of rows, or of blocks.
pub(super) fn partial_bytes(body: &Body, shape: &[usize]) -> usize {
    let totals = match extents(body, shape) {
        Some((Along::Columns, rows, width)) => rows.div_ceil(reduce::ROWS).saturating_mul(width),
        Some((Along::Whole, _, width)) => width.div_ceil(reduce::BLOCK),
        _ => 0,
    };
    totals.saturating_mul(size_of::<f32>())
}

impl Reduced {
    /// That of a region of these extents on operands of these, if it has a reduction. Elements are widened in this buffer.
    pub(super) fn new(
        body: &Body,
        plan: &Plan,
        shape: &[usize],
        operands: &[Vec<usize>],
        widened: usize,
    ) -> Option<Reduced> {
        let (along, rows, width) = extents(body, shape)?;
        let reduction = body.reduction()?;
        let dtype = plan.dtypes[reduction.arg];
        let mut row = shape.to_vec();
        reduction.axes.iter().for_each(|&axis| row[axis] = 1);
        // Of operands that run along the row, steps of the row take nothing.
        let of_row = |(i, own): (usize, &Vec<usize>)| if plan.row_homes[i].is_some() { own.clone() } else { vec![] };
        let operands: Vec<Vec<usize>> = operands.iter().enumerate().map(of_row).collect();
        Some(Reduced {
            along,
            folding: Folding::of(&body.steps()[reduction.value - body.operands()].op, dtype),
            arg: reduction.arg,
            dtype,
            value: reduction.value,
            stage: plan.reduce().expect("the plan has a stage for it"),
            rows,
            width,
            space: Space::new(&row, &operands),
            widened,
        })
    }
}

impl Run<'_> {
    /// Runs over all elements of a region with a reduction.
    pub(super) fn reduce(&self, reduced: &Reduced, threads: &Threads) {
        match reduced.along {
            Along::Rows => self.rows(reduced, threads),
            Along::Columns => self.columns(reduced, threads),
            Along::Whole => self.whole(reduced, threads),
        }
    }

    /// Values for rows, which are cut into groups that lie in one row of the space.
    fn rows(&self, reduced: &Reduced, threads: &Threads) {
        let (width, inner) = (reduced.width, self.space.inner);
        let kept = width <= self.block && (inner >= width || width == 0);
        let (together, group) = match kept && width > 0 {
            true => (inner / width, (self.block / width).max(1)),
            false => (1, 1),
        };
        let groups = together.div_ceil(group);
        let units = reduced.rows / together.max(1) * groups;
        self.shared(threads, units, |units, thread| {
            let mut places = self.places(thread);
            let of_rows = self.row_places(thread);
            let mut before = usize::MAX;
            for unit in units {
                let first = unit / groups * together;
                let from = first + unit % groups * group;
                let rows = from..(from + group).min(first + together);
                self.load_rows(reduced, &of_rows, rows.clone());
                if kept {
                    self.kept_rows(reduced, (&mut places, &of_rows), rows, &mut before, thread);
                } else {
                    self.long_row(reduced, (&mut places, &of_rows), rows.start, &mut before, thread);
                }
            }
        });
    }

    /// Per value that a step of the row takes or gives, its place, which holds constants already.
    fn row_places(&self, thread: usize) -> Vec<*mut u8> {
        let place = |(value, home): (usize, &Option<usize>)| {
            let Some(buffer) = home else { return std::ptr::null_mut() };
            let buffer = self.buffer(thread, *buffer);
            if let (true, Op::Const { value, dtype }) =
                (value >= self.operands.len(), self.step(value.max(self.operands.len())))
            {
                // SAFETY: a buffer holds a block of elements of any type of a region.
                unsafe { fill_constant(buffer, *value, *dtype, self.block) };
            }
            buffer.0
        };
        self.region.plan.row_homes.iter().enumerate().map(place).collect()
    }

    /// Reads the elements of operands that steps of the row take.
    fn load_rows(&self, reduced: &Reduced, of_rows: &[*mut u8], rows: Range<usize>) {
        for (i, operand) in self.operands.iter().enumerate() {
            let (Some(operand), false) = (operand, of_rows[i].is_null()) else { continue };
            let width = self.region.plan.dtypes[i].bytes();
            for (to, row) in rows.clone().enumerate() {
                let (outer, along) = (row / reduced.space.inner, row % reduced.space.inner);
                let at = reduced.space.start(outer, i) + if reduced.space.runs[i] { along } else { 0 };
                // SAFETY: the offset lies in the operand, whose dims it comes from; rows of a group fit a block.
                unsafe { std::ptr::copy_nonoverlapping(operand.add(at * width).0, of_rows[i].add(to * width), width) };
            }
        }
    }

    /// Runs a group of rows whose elements stay in the buffers of the thread.
    fn kept_rows(
        &self,
        reduced: &Reduced,
        (places, of_rows): (&mut [*mut u8], &[*mut u8]),
        rows: Range<usize>,
        before: &mut usize,
        thread: usize,
    ) {
        let (first, n) = (rows.start * reduced.width, rows.len() * reduced.width);
        if n > 0 {
            self.aim(places, first, before, thread);
            self.run(..reduced.stage, places, n);
        }
        let from = if n > 0 { self.folded(reduced, places, n, thread) } else { of_rows[reduced.value] };
        let to = self.total(reduced, of_rows, thread);
        // SAFETY: the places hold so many elements, and as many totals as there are rows.
        unsafe { reduced.folding.rows(from, reduced.width, to, rows.len()) };
        self.finish_rows(reduced, of_rows, to, rows.clone());
        if n > 0 {
            for (value, home) in self.region.plan.homes.iter().enumerate() {
                if let (Home::Buffer(_), true) = (home, self.is_row(value)) {
                    let bytes = self.region.plan.dtypes[value].bytes();
                    for row in 0..rows.len() {
                        // SAFETY: a buffer holds all elements of the rows.
                        unsafe {
                            let to = Ptr(places[value].add(row * reduced.width * bytes));
                            stretch(Ptr(of_rows[value].add(row * bytes)), to, bytes, reduced.width);
                        }
                    }
                }
            }
            self.run(reduced.stage + 1.., places, n);
            self.store(places, first, n);
        }
    }

    /// Runs a row that no buffer holds, or that is no row of the space.
    fn long_row(
        &self,
        reduced: &Reduced,
        (places, of_rows): (&mut [*mut u8], &[*mut u8]),
        row: usize,
        before: &mut usize,
        thread: usize,
    ) {
        let range = row * reduced.width..(row + 1) * reduced.width;
        let again = reduced.stage + 1 < self.region.stages.len();
        let to = self.total(reduced, of_rows, thread);
        let mut at = range.start;
        let mut next = || {
            let n = self.piece(at, range.end).min(reduce::BLOCK - (at - range.start) % reduce::BLOCK);
            if n == 0 {
                return None;
            }
            self.aim(places, at, before, thread);
            self.run(..reduced.stage, places, n);
            let from = self.folded(reduced, places, n, thread);
            if !again {
                self.store(places, at, n);
            }
            at += n;
            Some((from, n))
        };
        // SAFETY: the pieces are the elements of the row, cut where blocks of a reduction end.
        unsafe { reduced.folding.pieces(reduced.width, &mut next, to) };
        self.finish_rows(reduced, of_rows, to, row..row + 1);
        if !again {
            return;
        }
        for (value, home) in self.region.plan.homes.iter().enumerate() {
            if let (Home::Buffer(_), true) = (home, self.is_row(value)) {
                let bytes = self.region.plan.dtypes[value].bytes();
                // SAFETY: a buffer holds a block.
                unsafe { stretch(Ptr(of_rows[value]), Ptr(places[value]), bytes, self.block.min(reduced.width)) };
            }
        }
        let mut at = range.start;
        while at < range.end {
            let n = self.piece(at, range.end);
            self.aim(places, at, before, thread);
            self.run(.., places, n);
            self.store(places, at, n);
            at += n;
        }
    }

    /// Whether a value is of the row.
    fn is_row(&self, value: usize) -> bool {
        self.region.plan.row_homes[value].is_some()
            && value >= self.operands.len()
            && !matches!(self.step(value), Op::Const { .. })
    }

    /// Where totals of rows go before they are rounded to their type.
    fn total(&self, reduced: &Reduced, of_rows: &[*mut u8], thread: usize) -> *mut u8 {
        let rounded = self.region.plan.dtypes[reduced.value].is_narrow();
        if rounded { self.buffer(thread, reduced.widened + 1).0 } else { of_rows[reduced.value] }
    }

    /// Runs the steps of the row, and stores their results.
    fn finish_rows(&self, reduced: &Reduced, of_rows: &[*mut u8], totals: *mut u8, rows: Range<usize>) {
        let plan = &self.region.plan;
        let dtype = plan.dtypes[reduced.value];
        if dtype.is_narrow() {
            // SAFETY: both buffers hold a number for every row.
            unsafe { round(dtype, totals.cast(), of_rows[reduced.value], rows.len()) };
        }
        for (&value, kernel) in plan.row_steps.iter().zip(&self.region.row_steps) {
            let args: Vec<*const u8> =
                step_args(&self.region.body, value).iter().map(|&arg| of_rows[arg].cast_const()).collect();
            kernel(&args, of_rows[value], rows.len());
        }
        for (i, &value) in self.region.body.results().iter().enumerate().filter(|(_, value)| self.is_row(**value)) {
            let width = plan.dtypes[value].bytes();
            // SAFETY: the result has an element for every row, and rows of threads are apart.
            unsafe {
                std::ptr::copy_nonoverlapping(of_rows[value], self.result(i, rows.start, width), rows.len() * width);
            }
        }
    }

    /// Totals of columns: those of groups of rows, which threads share, and then of all.
    fn columns(&self, reduced: &Reduced, threads: &Threads) {
        let (width, folding) = (reduced.width, reduced.folding);
        let groups = reduced.rows.div_ceil(reduce::ROWS);
        let segments = width.div_ceil(BLOCK);
        let partial = self.partial(threads);
        self.shared(threads, groups * segments, |units, thread| {
            let mut places = self.places(thread);
            let mut before = usize::MAX;
            for unit in units {
                let (group, segment) = (unit / segments, unit % segments);
                let rows = group * reduce::ROWS..reduced.rows.min((group + 1) * reduce::ROWS);
                let columns = segment * BLOCK..width.min((segment + 1) * BLOCK);
                // SAFETY: there is a total for every group and column, and units are apart.
                let totals = unsafe { partial.add(group * width * size_of::<f32>()) };
                // SAFETY: as above.
                unsafe { folding.start(totals.add(columns.start * size_of::<f32>()).0, columns.len()) };
                let fold = |places: &mut [*mut u8], before: &mut usize, range: Range<usize>| {
                    let mut at = range.start;
                    while at < range.end {
                        let n = self.piece(at, range.end);
                        self.aim(places, at, before, thread);
                        self.run(..reduced.stage, places, n);
                        let from = self.folded(reduced, places, n, thread);
                        let mut done = 0;
                        while done < n {
                            let column = (at + done) % width;
                            let take = (width - column).min(n - done);
                            // SAFETY: as above; so many elements lie there.
                            unsafe {
                                let from = from.add(done * size_of::<f32>());
                                folding.each(totals.add(column * size_of::<f32>()).0, from, take);
                            }
                            done += take;
                        }
                        self.run(reduced.stage + 1.., places, n);
                        self.store(places, at, n);
                        at += n;
                    }
                };
                if segments == 1 {
                    fold(&mut places, &mut before, rows.start * width..rows.end * width);
                } else {
                    rows.for_each(|row| {
                        fold(&mut places, &mut before, row * width + columns.start..row * width + columns.end);
                    });
                }
            }
        });
        self.end(reduced, width, threads, |columns, to| {
            // SAFETY: every group has a total for every column.
            unsafe {
                folding.start(to, columns.len());
                for group in 0..groups {
                    let from = partial.add((group * width + columns.start) * size_of::<f32>()).0;
                    folding.each(to, from, columns.len());
                }
            }
        });
    }

    /// The total of all elements: those of blocks, which threads share, and then of them.
    fn whole(&self, reduced: &Reduced, threads: &Threads) {
        let blocks = reduced.width.div_ceil(reduce::BLOCK);
        let partial = self.partial(threads);
        self.shared(threads, blocks, |units, thread| {
            let mut places = self.places(thread);
            let mut before = usize::MAX;
            for unit in units {
                let range = unit * reduce::BLOCK..reduced.width.min((unit + 1) * reduce::BLOCK);
                let (mut at, mut n) = (range.start, 0);
                let mut next = || {
                    // What lies behind the reduction runs once its piece is folded, which is when the next one is asked for.
                    if n > 0 {
                        self.run(reduced.stage + 1.., &places, n);
                        self.store(&places, at, n);
                    }
                    at += n;
                    n = self.piece(at, range.end);
                    if n == 0 {
                        return None;
                    }
                    self.aim(&mut places, at, &mut before, thread);
                    self.run(..reduced.stage, &places, n);
                    Some((self.folded(reduced, &places, n, thread), n))
                };
                // SAFETY: the pieces are the elements of the block, which has a total.
                unsafe {
                    let to = partial.add(unit * size_of::<f32>()).0;
                    reduced.folding.pieces(range.len(), &mut next, to);
                }
            }
        });
        self.end(reduced, 1, threads, |_, to| {
            // SAFETY: every block has a total.
            unsafe { reduced.folding.blocks(partial.add(0).0, blocks, to) };
        });
    }

    /// Gives the reduction's result, of `n` elements, each range of which is totalled in the place that it is given.
    fn end(&self, reduced: &Reduced, n: usize, threads: &Threads, total: impl Fn(Range<usize>, *mut u8) + Sync) {
        let result = self.region.body.results().iter().position(|&r| r == reduced.value);
        let result = result.expect("nothing else takes the reduction's value");
        let dtype = self.region.plan.dtypes[reduced.value];
        threads.run(n, reduced.rows.div_ceil(reduce::ROWS), |range| {
            for from in range.clone().step_by(BLOCK) {
                let range = from..range.end.min(from + BLOCK);
                let to = self.result(result, range.start, dtype.bytes());
                if dtype.is_narrow() {
                    let mut wide = [0f32; BLOCK];
                    total(range.clone(), wide.as_mut_ptr().cast());
                    // SAFETY: the result has these elements, and ranges of threads are apart.
                    unsafe { round(dtype, wide.as_ptr(), to, range.len()) };
                } else {
                    total(range, to);
                }
            }
        });
    }

    /// The part of the workspace for totals.
    fn partial(&self, threads: &Threads) -> Ptr<u8> {
        // SAFETY: `workspace` counts them behind the parts of all threads.
        unsafe { self.workspace.add(self.part * threads.count()) }
    }

    /// How many elements from `at` on, and before `end`, lie in one block of a row of the space.
    fn piece(&self, at: usize, end: usize) -> usize {
        if at == end { 0 } else { self.block.min(self.space.inner - at % self.space.inner).min(end - at) }
    }

    /// Moves operands and results to an element; `before` is the row of the space where they were.
    fn aim(&self, places: &mut [*mut u8], first: usize, before: &mut usize, thread: usize) {
        let (row, from) = (first / self.space.inner, first % self.space.inner);
        self.move_operands(places, (row, from), row != *before, thread);
        *before = row;
        self.place_results(places, first, thread);
    }

    /// Runs some stages on `n` elements.
    fn run(&self, stages: impl std::slice::SliceIndex<[Compiled], Output = [Compiled]>, places: &[*mut u8], n: usize) {
        self.region.stages[stages].iter().for_each(|stage| stage.run(&self.region.plan, places, n));
    }

    /// The `n` elements that are folded, in four bytes each.
    fn folded(&self, reduced: &Reduced, places: &[*mut u8], n: usize, thread: usize) -> *const u8 {
        let from = places[reduced.arg].cast_const();
        if !reduced.dtype.is_narrow() {
            return from;
        }
        let to = self.buffer(thread, reduced.widened).0;
        // SAFETY: both hold `n` elements.
        unsafe { widen(reduced.dtype, from, to.cast(), n) };
        to
    }
}
