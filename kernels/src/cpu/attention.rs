//! Attention and its gradient in blocks of queries and keys (Dao et al. 2022): scores of a block live in the cache only.
//!
//! The forward pass keeps the largest score and the divisor of each query so far and corrects the result when a later
//! block has a larger one. The gradient computes the scores again from the stored log of the divisor. Blocks of which
//! nothing is seen (later ones, outside of the window, other texts, padding) are left out, and of a block that is seen
//! in part what no lane of a vector sees ([`sight`]).
//!
//! Rows of queries, keys and values are copied before they are used, as f32 and whole vectors ([`rows`]): so all that
//! products read lies close together, whatever the heads' stride is, and bf16 costs no more than f32.
//!
//! A key that a query does not see gives it nothing, whatever its values are: where they may be no numbers, products
//! leave it out, since 0 times infinity is not 0.

mod backward;
mod forward;
mod rows;
mod scores;
mod sight;
#[cfg(test)]
mod tests;

use std::ops::Range;

use dsgc_ir::segment;

use super::Launch;
use super::lanes::{Element, Kind, by_element};
use super::memory::Ptr;
pub(super) use backward::workspace as grad_workspace;
pub(super) use forward::workspace;
pub(super) use rows::{folded, padded};

/// Queries, and keys, that are worked on together: their scores, and a block of keys of the usual width, stay in the
/// first-level cache or near it, and a sum over a block is long enough for the products.
const BLOCK: usize = 64;

/// Extents, settings and operands of one launch.
#[derive(Clone, Copy)]
pub(super) struct Heads<E> {
    pub rows: usize,
    /// Places of queries in a row.
    pub queries: usize,
    /// Places of keys in a row.
    pub columns: usize,
    /// The place among keys of the first query.
    pub first: usize,
    /// Heads of queries, and of keys.
    pub heads: usize,
    pub groups: usize,
    pub width: usize,
    pub causal: bool,
    pub scale: f32,
    /// 0 for none.
    pub window: usize,
    pub q: Ptr<E>,
    pub k: Ptr<E>,
    pub v: Ptr<E>,
    pub segments: Ptr<i32>,
    pub slopes: Option<Ptr<f32>>,
    /// Registers to compute in.
    pub kind: Kind,
}

/// Up to [`BLOCK`] places.
#[derive(Clone, Copy)]
struct Block {
    from: usize,
    count: usize,
}

impl Block {
    /// The block with this number among so many places.
    fn nth(number: usize, places: usize) -> Block {
        Block { from: number * BLOCK, count: BLOCK.min(places - number * BLOCK) }
    }
}

impl<E: Element> Heads<E> {
    /// For the operands of `attention` or `attention_grad`, of which slopes would be number `slopes`.
    pub(super) fn new(l: &mut Launch, slopes: usize, causal: bool, scale: f64, window: usize) -> Heads<E> {
        let (q, k) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]));
        Heads {
            rows: q[0],
            queries: q[1],
            columns: k[1],
            first: 0,
            heads: q[2],
            groups: k[2],
            width: q[3],
            causal,
            scale: scale as f32,
            window,
            q: l.arg(0),
            k: l.arg(1),
            v: l.arg(2),
            segments: l.arg(3),
            slopes: (l.op.args.len() > slopes).then(|| l.arg(slopes)),
            kind: Kind::best(),
        }
    }

    /// Whether there is nothing to compute.
    pub(super) fn is_empty(&self) -> bool {
        self.rows * self.queries * self.heads * self.width == 0
    }

    /// Heads of queries that use the same keys.
    pub(super) fn shared(&self) -> usize {
        self.heads / self.groups
    }

    /// Elements from one place of queries to the next.
    fn q_stride(&self) -> usize {
        self.heads * self.width
    }

    /// Elements from one place of keys to the next.
    pub(super) fn k_stride(&self) -> usize {
        self.groups * self.width
    }

    /// Where a query of a head lies.
    fn q_at(&self, row: usize, head: usize, place: usize) -> usize {
        (row * self.queries + place) * self.q_stride() + head * self.width
    }

    /// Where a key that a head of queries uses lies.
    fn k_at(&self, row: usize, head: usize, place: usize) -> usize {
        (row * self.columns + place) * self.k_stride() + head / self.shared() * self.width
    }

    /// Segments of a row's keys.
    ///
    /// # Safety
    /// The row is one of the batch.
    pub(super) unsafe fn segments_of<'a>(&self, row: usize) -> &'a [i32] {
        // SAFETY: the caller's; nobody writes segments meanwhile.
        unsafe { self.segments.slice(row * self.columns, self.columns) }
    }

    /// How much less a score is per place of distance.
    ///
    /// # Safety
    /// The head is one of the queries'.
    pub(super) unsafe fn slope(&self, head: usize) -> f32 {
        // SAFETY: the caller's.
        self.slopes.map_or(0.0, |slopes| unsafe { *slopes.add(head).0 })
    }

    /// Least and most places that a key may be before a query that sees it.
    fn near(&self) -> (isize, isize) {
        let far = if self.window == 0 {
            (self.first + self.queries + self.columns) as isize
        } else {
            self.window as isize - 1
        };
        (if self.causal { 0 } else { -far }, far)
    }

    /// Blocks of keys that a block of queries may see by their places.
    fn key_blocks(&self, queries: Block) -> Range<usize> {
        let ((least, most), place) = (self.near(), (self.first + queries.from) as isize);
        let end = (place + queries.count as isize - least).min(self.columns as isize).max(0) as usize;
        (place - most).max(0) as usize / BLOCK..end.div_ceil(BLOCK)
    }

    /// Whether a query sees a key, both by their places among keys.
    fn sees(&self, segments: &[i32], t: usize, s: usize) -> bool {
        let ((least, most), distance) = (self.near(), t as isize - s as isize);
        segment::sees(segments[t], segments[s]) && (least..=most).contains(&distance)
    }

    /// The pairs of a query and a key that see each other, counted from the blocks' first.
    fn pairs<'a>(
        &'a self,
        segments: &'a [i32],
        queries: Block,
        keys: Block,
    ) -> impl Iterator<Item = (usize, usize)> + 'a {
        let place = self.first + queries.from;
        (0..queries.count)
            .flat_map(move |i| (0..keys.count).map(move |s| (i, s)))
            .filter(move |&(i, s)| self.sees(segments, place + i, keys.from + s))
    }

    /// Multiplications and additions of all pairs of places, about: what [`Threads::run`](super::parallel::Threads::run)
    /// must know.
    fn weight(&self) -> usize {
        4 * self.rows * self.queries * self.columns * self.heads * self.width
    }
}

/// `out += factor * x`.
fn add(out: &mut [f32], factor: f32, x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out += factor * x);
}

/// Runs `attention`.
pub(super) fn forward(l: &mut Launch, causal: bool, scale: f64, window: usize) {
    by_element!(l, forward_of(l, causal, scale, window));
}

fn forward_of<E: Element>(l: &mut Launch, causal: bool, scale: f64, window: usize) {
    let heads = Heads::<E>::new(l, 4, causal, scale, window);
    if !heads.is_empty() {
        let divisors = l.out(1);
        heads.forward(l, Some(divisors));
    }
}

/// Runs `attention_grad`.
pub(super) fn backward(l: &mut Launch, causal: bool, scale: f64, window: usize) {
    by_element!(l, backward_of(l, causal, scale, window));
}

fn backward_of<E: Element>(l: &mut Launch, causal: bool, scale: f64, window: usize) {
    let heads = Heads::<E>::new(l, 7, causal, scale, window);
    if !heads.is_empty() {
        heads.backward(l);
    }
}
