//! Matrix products in blocks: `out[m, n] = sum over k of left[m, k] * right[k, n]`, of f32 or bf16, summed in f32.
//!
//! Both operands are packed into panels: of the lanes of a register tile, the numbers of one `k` lie side by side. A
//! number in a panel is a *unit* of 32 bits: an f32, or two bf16 that follow each other along `k`. So packing absorbs all
//! strides, and all that knows the machine is a register tile and its panels (`micro`).
//!
//! The operand with fewer panels is packed whole, once, by all threads; the panels of the other are cut among the
//! threads, and each packs its own into its second-level cache, block by block of `k`, and runs the shared panels past it.
//! Blocks of `k` depend on `k` alone, and every result is one chain of sums along `k` inside of a block, then block by
//! block (AMX's tiles go on with the chain): so numbers depend neither on the number of threads nor on the other rows and
//! columns.
//!
//! With bf16 tiles (`vdpbf16ps`, `tdpbf16ps`) a denormal operand counts as zero, and so does a denormal partial sum; sums round to
//! nearest even, in an order inside of a pair that is the machine's. A result differs from the exact sum by at most
//! `(k + 2) * 2^-24 * sum |left * right|`, plus `2^-126 * k * (1 + max |left| + max |right|)` for what was flushed.

pub mod measure;
pub(super) mod micro;
mod pack;
#[cfg(test)]
mod tests;

use std::ops::Range;

use half::bf16;
use multiversion::multiversion;

use super::machine::has_fast_bf16_pairs;
use super::memory::Ptr;
use super::parallel::Threads;
use micro::{AHEAD, LINE, Micro};

/// Units along `k` in a block: one panel of a tile's rows stays in the first-level cache.
const DEPTH: usize = 384;
/// Lanes of the operand that a thread packs for itself at a time; with [`DEPTH`], three eighths of a mebibyte.
const CHUNK: usize = 256;
/// How much of an operand is packed at a time.
#[derive(Clone, Copy)]
struct Most {
    /// Lanes and bytes of the shared operand.
    lanes: usize,
    bytes: usize,
    /// Longest sum that is one chain of blocks, where sums are not in the result; longer ones are sums of results.
    k: usize,
}

/// Of all threads together, whose shared panels stay in the last-level cache.
const TEAM: Most = Most { lanes: 2048, bytes: 8 << 20, k: 64 * 1024 };
/// Longest sums that may be finished block by block.
pub(super) const LONGEST: usize = TEAM.k;
/// Of a thread alone, beside others: in its second-level cache.
const ALONE: Most = Most { lanes: 512, bytes: 1 << 20, k: 8 * 1024 };

/// Units along `k` that are packed at a time where lanes are neighbours.
const ROWS: usize = 16;
/// Most lanes of a panel.
const WIDEST: usize = 32;

/// What matrices are made of.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// Whether it is f32.
    const WIDE: bool;
    /// The number.
    fn wide(self) -> f32;
    /// The nearest number; of two the even one.
    fn nearest(number: f32) -> Self;
    /// Register tiles that this machine has for it, the fastest first.
    fn tiles() -> Vec<Micro<Self>>;
}

impl Element for f32 {
    const WIDE: bool = true;
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn nearest(number: f32) -> f32 {
        number
    }
    fn tiles() -> Vec<Micro<f32>> {
        micro::wide()
    }
}

impl Element for bf16 {
    const WIDE: bool = false;
    #[inline(always)]
    fn wide(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn nearest(number: f32) -> bf16 {
        bf16::from_f32(number)
    }
    fn tiles() -> Vec<Micro<bf16>> {
        let (pairs, wide) = (micro::pairs(), micro::wide());
        let (first, then) = if has_fast_bf16_pairs() { (pairs, wide) } else { (wide, pairs) };
        micro::matrices().into_iter().chain(first).chain(then).collect()
    }
}

/// A matrix as it lies: its first element, and how many elements on the next row and the next column are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<T> {
    pub(super) at: Ptr<T>,
    pub(super) row: usize,
    pub(super) column: usize,
}

impl<T> Matrix<T> {
    pub(super) fn transposed(self) -> Matrix<T> {
        Matrix { at: self.at, row: self.column, column: self.row }
    }

    /// # Safety
    /// The matrix has the element.
    unsafe fn from(self, row: usize, column: usize) -> Matrix<T> {
        // SAFETY: the caller's.
        Matrix { at: unsafe { self.at.add(row * self.row + column * self.column) }, ..self }
    }
}

/// Rows, columns and elements of a sum: of one product, or at most so many of several.
pub(super) type Size = (usize, usize, usize);

/// Bytes of workspace for any product of at most this size: of one product by all threads, or of one by each.
pub(super) fn workspace(size: Size, threads: usize) -> usize {
    let team = shared_bytes(size, TEAM) + threads * own_bytes(size, TEAM) + whole_bytes(size, TEAM);
    team.max(threads * workspace_alone(size))
}

/// Bytes of workspace for a product by one thread; a multiple of 64.
pub(super) fn workspace_alone(size: Size) -> usize {
    shared_bytes(size, ALONE) + own_bytes(size, ALONE) + whole_bytes(size, ALONE)
}

/// Lanes of all panels of either operand.
fn padded((m, n, _): Size) -> usize {
    m.max(n).saturating_add(WIDEST)
}

/// Bytes of the shared panels.
fn shared_bytes(size: Size, most: Most) -> usize {
    let bytes = padded(size).saturating_mul(size.2).saturating_mul(4);
    bytes.min(most.bytes).next_multiple_of(64)
}

/// Bytes of what a thread has for itself: its panels, and sums that cannot be in the result.
fn own_bytes(size: Size, most: Most) -> usize {
    let panels = (padded(size).min(CHUNK) * size.2.min(DEPTH) * 4).next_multiple_of(64);
    panels + sums_bytes(size, most)
}

/// Bytes of the sums of a whole result, if they are few enough to be kept.
fn whole_bytes((m, n, _): Size, most: Most) -> usize {
    m.saturating_mul(n).saturating_mul(4).min(most.bytes).next_multiple_of(64)
}

/// Bytes of the sums of a block.
fn sums_bytes((m, n, _): Size, most: Most) -> usize {
    m.saturating_mul(n).min(CHUNK * most.lanes).saturating_mul(4).next_multiple_of(64)
}

/// What becomes of sums, block by block, as soon as they are whole.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    /// Takes the number of the thread, the first sum of a block, the stride of its rows, and the rows and columns of the
    /// result that it is. Sums of a row lie one behind the other.
    pub(super) run: &'a (dyn Fn(usize, Ptr<f32>, usize, Range<usize>, Range<usize>) + Sync),
    /// Whether sums must not be in the result meanwhile; then they never come there.
    pub(super) apart: bool,
}

/// A product for all threads, or one for this thread alone.
#[derive(Clone, Copy)]
pub(super) struct Product<'a, T, O> {
    /// Who works on it; nobody else if none.
    pub(super) threads: Option<&'a Threads>,
    /// Rows `m`, columns `n`, and elements `k` of a sum.
    pub(super) size: Size,
    pub(super) left: Matrix<T>,
    pub(super) right: Matrix<T>,
    pub(super) out: Matrix<O>,
    /// Adds to what the result holds.
    pub(super) accumulate: bool,
    /// What finishes the sums. Columns of the result are neighbours then, and a sum has at most [`LONGEST`] elements.
    pub(super) finish: Option<Finish<'a>>,
    /// [`workspace`] bytes, or [`workspace_alone`] if there are no threads; aligned to 64.
    pub(super) scratch: Ptr<u8>,
}

impl<T: Element, O: Element> Product<'_, T, O> {
    /// Runs it.
    ///
    /// # Safety
    /// The operands and the result have elements for the size and nobody else writes them; different elements of the
    /// result lie in different places, none of them in an operand; the workspace is as large as it must be.
    pub(super) unsafe fn run(self) {
        // SAFETY: the caller's.
        unsafe { self.run_on(&T::tiles()[0]) }
    }

    /// # Safety
    /// As for `run`, and the machine has what the tile needs.
    unsafe fn run_on(self, micro: &Micro<T>) {
        let (m, n, k) = self.size;
        if m == 0 || n == 0 {
            return;
        }
        // Registers hold columns, so columns of the result must be neighbours; else rows take their place.
        let out = self.out;
        if out.row == 1 && (out.column != 1 || m > n) {
            let (left, right) = (self.right.transposed(), self.left.transposed());
            let turned = Product { size: (n, m, k), left, right, out: out.transposed(), ..self };
            // SAFETY: it is the same product; what may not be turned back is one row or one column.
            return unsafe { Blocks::new(turned, micro).run() };
        }
        // SAFETY: the caller's.
        unsafe { Blocks::new(self, micro).run() }
    }
}

/// An operand as lanes along which panels are cut: their stride, and that along `k`.
#[derive(Clone, Copy)]
struct Side<T> {
    at: Ptr<T>,
    lanes: usize,
    lane: usize,
    k: usize,
    /// Lanes of a panel, and what packs it.
    width: usize,
    packer: micro::Pack<T>,
}

impl<T: Element> Side<T> {
    fn panels(&self) -> usize {
        self.lanes.div_ceil(self.width)
    }

    /// Packs `k` elements from `from` on of some panels, each of which takes `width` times the units of `k`.
    ///
    /// # Safety
    /// There is room for them, and nobody else reads or writes there.
    unsafe fn pack(&self, panels: Range<usize>, from: usize, k: usize, depth: usize, to: Ptr<u32>) {
        let size = self.width * k.div_ceil(depth);
        // Where lanes are neighbours, a line of the cache holds those of several panels: a few lines at a time.
        let step = if self.lane == 1 { ROWS * depth } else { k.max(1) };
        for at in (0..k).step_by(step) {
            for (i, panel) in panels.clone().enumerate() {
                let first = panel * self.width;
                let (lanes, k) = ((self.lanes - first).min(self.width), step.min(k - at));
                // SAFETY: the operand has these lanes; the caller's.
                unsafe {
                    let place = self.at.add(first * self.lane + (from + at) * self.k).0.cast_const();
                    let to = to.add(i * size + at / depth * self.width);
                    (self.packer)(pack::Panel { at: place, lane: self.lane, next: self.k, lanes, k }, to.0);
                }
            }
        }
    }
}

/// A product cut into blocks.
struct Blocks<'a, T, O> {
    product: Product<'a, T, O>,
    micro: &'a Micro<T>,
    /// The operand that every thread reads, and the one of which each reads its own panels.
    shared: Side<T>,
    own: Side<T>,
    /// Whether `own` is the right operand.
    columns: bool,
    most: Most,
    /// Elements of `k` in a block.
    depth: usize,
}

impl<'a, T: Element, O: Element> Blocks<'a, T, O> {
    fn new(product: Product<'a, T, O>, micro: &'a Micro<T>) -> Self {
        let ((m, n, k), left, right) = (product.size, product.left, product.right);
        let left =
            Side { at: left.at, lanes: m, lane: left.row, k: left.column, width: micro.rows, packer: micro.pack[0] };
        let right = Side {
            at: right.at,
            lanes: n,
            lane: right.column,
            k: right.row,
            width: micro.columns,
            packer: micro.pack[1],
        };
        // More panels are cut more evenly.
        let columns = right.panels() > left.panels();
        let (shared, own) = if columns { (left, right) } else { (right, left) };
        let most = if product.threads.is_some() { TEAM } else { ALONE };
        let mut blocks = Blocks { product, micro, shared, own, columns, most, depth: 0 };
        let units = if blocks.direct() { k } else { k.min(most.k) }.div_ceil(micro.depth);
        blocks.depth = units.div_ceil(units.div_ceil(micro.block).max(1)) * micro.depth;
        blocks
    }

    /// # Safety
    /// As for [`Product::run`].
    unsafe fn run(&self) {
        let Product { size: (m, n, k), accumulate, finish, scratch, out, .. } = self.product;
        let (bytes, units) = (whole_bytes(self.product.size, self.most), k.div_ceil(self.micro.depth));
        // A long sum of few results is cheaper with all sums in the workspace.
        if !self.direct() && bytes >= m * n * 4 && self.shared.lanes * units * 4 > self.most.bytes {
            let sums = Matrix { at: Ptr(scratch.0.cast::<f32>()), row: n, column: 1 };
            let Product { threads, left, right, .. } = self.product;
            // SAFETY: the workspace begins with room for these sums; every row is written once.
            unsafe {
                let scratch = scratch.add(bytes);
                let finish = finish.map(|finish| Finish { apart: false, ..finish });
                let wide =
                    Product { threads, size: (m, n, k), left, right, out: sums, accumulate: false, finish, scratch };
                Blocks::new(wide, self.micro).run();
                if finish.is_some() {
                    return;
                }
                let rows = |rows: Range<usize>| finish_rows(sums.from(rows.start, 0).at, n, out, (rows, 0), accumulate);
                return match threads {
                    Some(threads) => threads.run(m, n, rows),
                    None => rows(0..m),
                };
            }
        }
        // SAFETY: the caller's.
        unsafe { self.run_blocks() }
    }

    /// # Safety
    /// As for [`Product::run`].
    unsafe fn run_blocks(&self) {
        let (k, width) = (self.product.size.2, self.shared.width);
        // Where sums are in the result, a long `k` can be cut between any two blocks; elsewhere few lanes of the shared
        // operand are packed at a time.
        let lanes = (self.shared.panels() * width).min(self.most.lanes);
        let (lanes, longest) = if self.direct() {
            let units = self.most.bytes / (4 * lanes);
            (lanes, (units * self.micro.depth / self.depth.max(1)).max(1) * self.depth)
        } else {
            let longest = k.min(self.most.k);
            ((self.most.bytes / (4 * longest.div_ceil(self.micro.depth).max(1))).min(lanes), longest)
        };
        let panels = lanes / width;
        let mut accumulate = self.product.accumulate;
        let mut from = 0;
        loop {
            let k = (k - from).min(longest);
            for block in (0..self.shared.panels()).step_by(panels) {
                let block = block..(block + panels).min(self.shared.panels());
                // SAFETY: the caller's; all of it lies in the operands.
                unsafe { self.run_shared(block, from, k, accumulate) };
            }
            from += k;
            accumulate = true;
            if from == self.product.size.2 {
                return;
            }
        }
    }

    /// Whether sums can be in the result.
    fn direct(&self) -> bool {
        O::WIDE && self.product.out.column == 1 && self.product.finish.is_none_or(|finish| !finish.apart)
    }

    /// Blocks of `k`: where each begins in `0..k`, and its elements.
    fn depths(&self, k: usize) -> impl Iterator<Item = (usize, usize)> {
        let depth = self.depth.max(1);
        (0..k.div_ceil(depth)).map(move |i| (i * depth, depth.min(k - i * depth)))
    }

    /// The results of some panels of the shared operand, of the sum over `k` elements from `from` on.
    ///
    /// # Safety
    /// As for [`Product::run`].
    unsafe fn run_shared(&self, block: Range<usize>, from: usize, k: usize, accumulate: bool) {
        let (depth, width) = (self.micro.depth, self.shared.width);
        let units = k.div_ceil(depth);
        let packed: Ptr<u32> = Ptr(self.product.scratch.0.cast());
        let (shared, count) = (self.shared, block.len());
        // SAFETY: panels lie side by side in the workspace: behind all of one block of `k` all of the next.
        let slab = |at: usize| unsafe { packed.add(at / depth * width * count) };
        let pack = |panels: Range<usize>| {
            for (at, k) in self.depths(k) {
                // SAFETY: as above; panels are written by one thread each.
                unsafe {
                    let to = slab(at).add(panels.start * width * k.div_ceil(depth));
                    shared.pack(block.start + panels.start..block.start + panels.end, from + at, k, depth, to);
                }
            }
        };
        let work = |part: usize, parts: usize| {
            let cut = |part: usize| self.own.panels() * part / parts;
            // SAFETY: parts have different panels and different workspaces.
            unsafe { self.run_own(cut(part)..cut(part + 1), part, (&block, from, k), slab, accumulate) };
        };
        match self.product.threads {
            Some(threads) => {
                let parts = threads.count().min(self.own.panels());
                threads.run(count, width * units, pack);
                threads
                    .run(parts, 2 * count * width * units * self.own.lanes, |r| r.for_each(|part| work(part, parts)));
            }
            None => {
                pack(0..count);
                work(0, 1);
            }
        }
    }

    /// The part of [`Self::run_shared`] that has some panels of the other operand.
    ///
    /// # Safety
    /// As for [`Product::run`]; the shared panels are packed.
    unsafe fn run_own(
        &self,
        panels: Range<usize>,
        part: usize,
        (block, from, k): (&Range<usize>, usize, usize),
        slab: impl Fn(usize) -> Ptr<u32>,
        accumulate: bool,
    ) {
        let (micro, out, (m, n, _)) = (self.micro, self.product.out, self.product.size);
        let (units, depth) = (self.depth.div_ceil(micro.depth), micro.depth);
        let chunk = (CHUNK / self.own.width).min(self.own.panels());
        let direct = self.direct();
        let packed_shared = block.len() * self.shared.width * k.div_ceil(depth) * 4;
        let packed_chunk = (chunk * self.own.width * units * 4).next_multiple_of(64);
        let sums = if direct { 0 } else { sums_bytes(self.product.size, self.most) };
        // SAFETY: the workspace holds the shared panels, and then per part a chunk and its sums.
        let (mine, temporary): (Ptr<u32>, Ptr<f32>) = unsafe {
            let at = packed_shared.next_multiple_of(64) + part * (packed_chunk + sums);
            let mine = self.product.scratch.add(at);
            (Ptr(mine.0.cast()), Ptr(mine.add(packed_chunk).0.cast()))
        };
        for first in panels.clone().step_by(chunk) {
            let own = first..(first + chunk).min(panels.end);
            let (rows, columns) = if self.columns { (block, &own) } else { (&own, block) };
            let lanes =
                |panels: &Range<usize>, width: usize, all: usize| (panels.start * width, (panels.end * width).min(all));
            let (rows, columns) = (lanes(rows, micro.rows, m), lanes(columns, micro.columns, n));
            // SAFETY: the rows and columns are the result's.
            let target: (Ptr<f32>, usize) = if direct {
                (Ptr(unsafe { out.from(rows.0, columns.0) }.at.0.cast()), out.row)
            } else {
                (temporary, columns.1 - columns.0)
            };
            // Sums that are whole are finished as soon as rows of all columns are there.
            let finish = self.product.finish.filter(|_| from + k == self.product.size.2);
            let finish = |from: usize, to: usize| {
                if let Some(finish) = finish {
                    // SAFETY: the rows are this part's.
                    let sums = unsafe { target.0.add(from * target.1) };
                    (finish.run)(part, sums, target.1, rows.0 + from..rows.0 + to, columns.0..columns.1);
                }
            };
            let all = k;
            for (at, k) in self.depths(all) {
                let units = k.div_ceil(depth);
                let (panel_shared, panel_own) = (self.shared.width * units, self.own.width * units);
                // SAFETY: a chunk of panels fits into this part's workspace.
                unsafe { self.own.pack(own.clone(), from + at, k, depth, mine) };
                let add = at > 0 || (direct && accumulate);
                for s in 0..block.len() {
                    for o in 0..own.len() {
                        // SAFETY: both panels are packed; a tile has the rows and columns that the result has there.
                        unsafe {
                            let (shared, own) = (slab(at).add(s * panel_shared), mine.add(o * panel_own));
                            let (left, right, i, j) =
                                if self.columns { (shared, own, s, o) } else { (own, shared, o, s) };
                            let (i, j) = (i * micro.rows, j * micro.columns);
                            let size =
                                (micro.rows.min(rows.1 - rows.0 - i), micro.columns.min(columns.1 - columns.0 - j));
                            let to = target.0.add(i * target.1 + j).0;
                            // Together, the tiles of a shared panel fetch the next.
                            let ahead = shared.0.wrapping_add(panel_shared + o * units.div_ceil(AHEAD) * LINE);
                            (micro.tile)(units, [left.0, right.0, ahead], to, target.1, size, add);
                        }
                    }
                    if self.columns && at + k == all {
                        finish(s * micro.rows, ((s + 1) * micro.rows).min(rows.1 - rows.0));
                    }
                }
            }
            if k == 0 && !(direct && accumulate) {
                for row in 0..rows.1 - rows.0 {
                    // SAFETY: the row is of the result or of the sums, and this part's alone.
                    unsafe { target.0.add(row * target.1).slice_mut(0, columns.1 - columns.0) }.fill(0.0);
                }
            }
            if self.product.finish.is_some() {
                if k == 0 || !self.columns {
                    finish(0, rows.1 - rows.0);
                }
            } else if !direct {
                // SAFETY: sums and results are this part's alone.
                unsafe { finish_rows(temporary, target.1, out, (rows.0..rows.1, columns.0), accumulate) };
            }
        }
    }
}

/// Sums, `width` in a row, as results of some rows from a column on.
///
/// # Safety
/// The result has them, and nobody else reads or writes either.
unsafe fn finish_rows<O: Element>(
    sums: Ptr<f32>,
    width: usize,
    out: Matrix<O>,
    (rows, column): (Range<usize>, usize),
    accumulate: bool,
) {
    let first = rows.start;
    for row in rows {
        // SAFETY: the caller's.
        unsafe {
            let (sums, to) = (sums.slice((row - first) * width, width), out.from(row, column));
            if out.column == 1 {
                finish(sums, to.at.slice_mut(0, width), accumulate);
            } else {
                for (j, sum) in sums.iter().enumerate() {
                    finish(std::slice::from_ref(sum), to.from(0, j).at.slice_mut(0, 1), accumulate);
                }
            }
        }
    }
}

/// Sums as results, or added to them.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn finish<O: Element>(sums: &[f32], out: &mut [O], accumulate: bool) {
    for (sum, out) in sums.iter().zip(out) {
        *out = O::nearest(if accumulate { out.wide() + sum } else { *sum });
    }
}
