//! The gradient: with `p` the probabilities and `g` the result's gradient, `dv = p^T g`, `dp = g v^T`,
//! `ds = scale * p * (dp - sum(g * out))`, `dq = ds k`, `dk = ds^T q`.
//!
//! Keys are in the lanes, since a block of them is turned into columns once for all queries of a row, and its gradients
//! are added up over all of these. Those of the queries are added up over blocks of keys, so a thread keeps them for all
//! heads of a row that share keys.

use super::super::Launch;
use super::super::lanes::{Element, Kernel, Lanes};
use super::super::memory::Ptr;
use super::super::small::Product;
use super::rows::{Rows, padded};
use super::scores::{Lane, gradients};
use super::sight::{Side, VECTORS};
use super::{BLOCK, Block, Heads, add};

/// Bytes that all threads need at once, for operands of these shapes.
pub(in super::super) fn workspace(q: &[usize], k: &[usize], threads: usize) -> usize {
    let shared = q[2].checked_div(k[2]).unwrap_or(0);
    threads.max(1) * per_thread(shared * q[1], q[3]) * size_of::<f32>()
}

/// Elements that a thread needs for so many queries of all heads that share keys: their gradients, and for each the sum
/// of its result's gradient times the result; keys and values in columns, keys, queries, gradients of all of these but
/// queries; scores and their gradients.
pub(super) fn per_thread(queries: usize, width: usize) -> usize {
    queries * padded(width) + padded(queries) + (2 * width + 5 * padded(width)) * BLOCK + 2 * BLOCK * BLOCK
}

/// What the gradient has besides the operands of the forward pass, and what it gives.
#[derive(Clone, Copy)]
pub(super) struct Operands<E> {
    pub out: Ptr<E>,
    pub divisors: Ptr<f32>,
    pub grad: Ptr<E>,
    pub dq: Ptr<E>,
    pub dk: Ptr<E>,
    pub dv: Ptr<E>,
}

impl<E: Element> Heads<E> {
    /// The gradients of all queries, keys and values.
    pub(super) fn backward(&self, l: &mut Launch) {
        let operands =
            Operands { out: l.arg(4), divisors: l.arg(5), grad: l.arg(6), dq: l.out(0), dk: l.out(1), dv: l.out(2) };
        let scratch: Ptr<f32> = l.workspace();
        // Heads that share keys add to the same gradients, so they are one task.
        let tasks = self.rows * self.groups;
        let parts = l.threads.count().min(tasks);
        l.threads.run(parts, self.weight() / parts, |range| {
            for part in range {
                // SAFETY: every part has a workspace of its own.
                let work = unsafe { scratch.add(part * per_thread(self.shared() * self.queries, self.width)) };
                for task in tasks * part / parts..tasks * (part + 1) / parts {
                    let (row, group) = (task / self.groups, task % self.groups);
                    // SAFETY: offsets come from the shapes of the operands; a task writes the results of its own row and
                    // heads.
                    unsafe { self.kind.run(Backward { heads: self, row, group, operands, work }) };
                }
            }
        });
    }
}

/// The gradients of a row's heads that share keys.
pub(super) struct Backward<'a, E> {
    pub heads: &'a Heads<E>,
    pub row: usize,
    pub group: usize,
    pub operands: Operands<E>,
    pub work: Ptr<f32>,
}

/// Where a thread has what it works on.
#[derive(Clone, Copy)]
struct Places {
    /// Of each query of each head: its gradient, and the sum of the result's gradient times the result.
    dq: Ptr<f32>,
    deltas: Ptr<f32>,
    /// Columns of a block of keys, times the scale, and of its values; keys in rows.
    key_columns: Ptr<f32>,
    value_columns: Ptr<f32>,
    key: Ptr<f32>,
    /// The block's gradients.
    dk: Ptr<f32>,
    dv: Ptr<f32>,
    /// A block of queries, and of the result's gradient.
    q: Ptr<f32>,
    grad: Ptr<f32>,
    /// Scores, then probabilities; their gradients, then those of scores.
    scores: Ptr<f32>,
    dp: Ptr<f32>,
}

/// The head is one of the row's; nobody else uses the gradients of its queries and keys, or the workspace of `per_thread`.
impl<E: Element> Kernel for Backward<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let h = self.heads;
        let (wide, count) = (padded(h.width), h.shared() * h.queries);
        let block = wide * BLOCK;
        let own = self.group * h.shared()..(self.group + 1) * h.shared();
        // SAFETY: the caller's, and the shapes of the operands.
        unsafe {
            let mut rest = self.work;
            let mut take = |n: usize| {
                let at = rest;
                rest = rest.add(n);
                at
            };
            let places = Places {
                dq: take(count * wide),
                deltas: take(padded(count)),
                key_columns: take(h.width * BLOCK),
                value_columns: take(h.width * BLOCK),
                key: take(block),
                dk: take(block),
                dv: take(block),
                q: take(block),
                grad: take(block),
                scores: take(BLOCK * BLOCK),
                dp: take(BLOCK * BLOCK),
            };
            places.dq.slice_mut(0, count * wide).fill(0.0);
            for (head, place) in own.clone().zip((0..).step_by(h.queries)) {
                for number in 0..h.queries.div_ceil(BLOCK) {
                    let queries = Block::nth(number, h.queries);
                    let [out, grad] = [self.operands.out, self.operands.grad].map(|of| self.rows(of, head, queries));
                    grad.dot::<L>(&out, places.deltas.slice_mut(place + queries.from, queries.count));
                }
            }
            for number in 0..h.columns.div_ceil(BLOCK) {
                let keys = Block::nth(number, h.columns);
                let at = h.k_at(self.row, own.start, keys.from);
                let rows =
                    |of: Ptr<E>| Rows { at: of.add(at), stride: h.k_stride(), count: keys.count, width: h.width };
                places.dk.slice_mut(0, block).fill(0.0);
                places.dv.slice_mut(0, block).fill(0.0);
                rows(h.k).turn::<L>(h.scale, places.key_columns);
                rows(h.v).turn::<L>(1.0, places.value_columns);
                let finite = rows(h.k).copy::<L>(places.key);
                for (head, place) in own.clone().zip((0..).step_by(h.queries)) {
                    for number in 0..h.queries.div_ceil(BLOCK) {
                        let queries = Block::nth(number, h.queries);
                        let places = Places {
                            dq: places.dq.add((place + queries.from) * wide),
                            deltas: places.deltas.add(place + queries.from),
                            ..places
                        };
                        self.block::<L>(head, (queries, keys), finite, &places);
                    }
                }
                rows(self.operands.dk).write::<L>(places.dk, |_| 1.0);
                rows(self.operands.dv).write::<L>(places.dv, |_| 1.0);
            }
            for (head, place) in own.zip((0..).step_by(h.queries)) {
                for number in 0..h.queries.div_ceil(BLOCK) {
                    let queries = Block::nth(number, h.queries);
                    let dq = places.dq.add((place + queries.from) * wide);
                    self.rows(self.operands.dq, head, queries).write::<L>(dq, |_| 1.0);
                }
            }
        }
    }
}

impl<E: Element> Backward<'_, E> {
    /// The rows of a block of queries, or of what has as many.
    unsafe fn rows(&self, of: Ptr<E>, head: usize, block: Block) -> Rows<E> {
        let h = self.heads;
        // SAFETY: the caller's.
        let at = unsafe { of.add(h.q_at(self.row, head, block.from)) };
        Rows { at, stride: h.q_stride(), count: block.count, width: h.width }
    }

    /// What a block of queries adds to the gradients of a block of keys, and the other way round.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn block<L: Lanes>(&self, head: usize, (queries, keys): (Block, Block), finite: bool, places: &Places) {
        let h = self.heads;
        let (width, wide) = (h.width, padded(h.width));
        let Places { dq, deltas, key, dk, dv, q, grad, scores, dp, .. } = *places;
        // SAFETY: the caller's, and the shapes of the operands.
        unsafe {
            let segments = h.segments_of(self.row);
            let Some(sight) = h.sight(segments, queries, keys, Side::Keys) else { return };
            let finite = self.rows(h.q, head, queries).copy::<L>(q)
                & self.rows(self.operands.grad, head, queries).copy::<L>(grad)
                & finite;
            for part in sight.bands(queries.count, keys.count).map(|part| part.padded()) {
                for (rows, columns, out) in [(q, places.key_columns, scores), (grad, places.value_columns, dp)] {
                    L::enter(Product {
                        size: (part.rows, part.lanes, width),
                        out: (out.add(part.at()), BLOCK),
                        add: false,
                        a: (rows.add(part.row * wide), wide, 1),
                        b: (columns.add(part.lane), BLOCK),
                    });
                }
            }
            let stored = (self.row * h.heads + head) * h.queries + queries.from;
            let divisors = self.operands.divisors.slice(stored, queries.count);
            let deltas = deltas.slice(0, queries.count);
            let (slope, distance) = (h.slope(head), keys.from as isize - (h.first + queries.from) as isize);
            for vector in 0..VECTORS {
                let lane = Lane { sight: &sight, vector, slope, distance };
                gradients::<L>(&lane, queries.count, (scores, dp), (divisors, deltas), h.scale);
            }
            if sight.is_masked() && !finite {
                for (i, s) in h.pairs(segments, queries, keys) {
                    let (p, ds) = (*scores.add(i * BLOCK + s).0, *dp.add(i * BLOCK + s).0);
                    add(dq.slice_mut(i * wide, wide), ds, key.slice(s * wide, wide));
                    add(dk.slice_mut(s * wide, wide), ds, q.slice(i * wide, wide));
                    add(dv.slice_mut(s * wide, wide), p, grad.slice(i * wide, wide));
                }
                return;
            }
            for part in sight.parts() {
                for (of, rows, out) in [(dp, q, dk), (scores, grad, dv)] {
                    L::enter(Product {
                        size: (part.lanes.min(keys.count - part.lane), wide, part.rows),
                        out: (out.add(part.lane * wide), wide),
                        add: true,
                        a: (of.add(part.at()), 1, BLOCK),
                        b: (rows.add(part.row * wide), wide),
                    });
                }
            }
            for part in sight.bands(queries.count, keys.count) {
                L::enter(Product {
                    size: (part.rows, wide, part.lanes),
                    out: (dq.add(part.row * wide), wide),
                    add: true,
                    a: (dp.add(part.at()), BLOCK, 1),
                    b: (key.add(part.lane * wide), wide),
                });
            }
        }
    }
}
