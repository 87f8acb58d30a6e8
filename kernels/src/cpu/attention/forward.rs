//! The forward pass: some blocks of queries of a head at a time, so that a block of keys is copied once for all of them.

use std::ops::Range;

use super::super::Launch;
use super::super::lanes::{Element, Kernel, LANES, Lanes};
use super::super::memory::Ptr;
use super::super::small::Product;
use super::rows::{Rows, padded};
use super::scores::{Lane, Running, soften};
use super::sight::{Side, VECTORS};
use super::{BLOCK, Block, Heads, add};

/// Most blocks of queries that a thread works on together.
const TOGETHER: usize = 4;

/// Bytes that all threads need at once, for so many queries of heads so wide.
pub(in super::super) fn workspace(queries: usize, width: usize, threads: usize) -> usize {
    threads.max(1) * per_thread(queries, width) * size_of::<f32>()
}

/// Blocks that a thread works on together, of so many queries.
pub(super) fn together(queries: usize) -> usize {
    queries.div_ceil(BLOCK).min(TOGETHER)
}

/// Elements that a thread needs: queries in columns and sums of the result; keys, values, and scores of a block.
pub(super) fn per_thread(queries: usize, width: usize) -> usize {
    together(queries) * (width + padded(width)) * BLOCK + 2 * padded(width) * BLOCK + BLOCK * BLOCK
}

/// The blocks of queries of all heads, one head after the other, as they are shared out to threads.
struct Shares {
    /// Blocks of keys that all blocks of queries before this one may see, and at the end all of a head.
    before: Vec<usize>,
    heads: usize,
}

impl Shares {
    /// The number of a part's first block, among all heads' blocks, of parts that have about as much to do.
    fn begin(&self, part: usize, parts: usize) -> usize {
        let blocks = self.before.len() - 1;
        let one = self.before[blocks].max(1);
        let target = one * self.heads * part / parts;
        target / one * blocks + self.before[..blocks].partition_point(|before| *before < target % one)
    }
}

impl<E: Element> Heads<E> {
    /// The result for all queries, and the logs of their divisors.
    pub(in super::super) fn forward(&self, l: &mut Launch, divisors: Option<Ptr<f32>>) {
        let (out, scratch): (Ptr<E>, Ptr<f32>) = (l.out(0), l.workspace());
        let blocks = self.queries.div_ceil(BLOCK);
        let mut before = vec![0];
        for number in 0..blocks {
            before.push(before[number] + self.key_blocks(Block::nth(number, self.queries)).len());
        }
        let shares = Shares { before, heads: self.rows * self.heads };
        // A thread needs a workspace of its own, and the number of its part tells it which.
        let parts = l.threads.count().min(shares.heads * blocks);
        l.threads.run(parts, self.weight() / parts, |range| {
            for part in range {
                let (mut at, end) = (shares.begin(part, parts), shares.begin(part + 1, parts));
                while at < end {
                    let (head, number) = (at / blocks, at % blocks);
                    let count = (end - at).min(blocks - number).min(together(self.queries));
                    at += count;
                    let task = Forward {
                        heads: self,
                        row: head / self.heads,
                        head: head % self.heads,
                        blocks: number..number + count,
                        out,
                        divisors,
                        // SAFETY: every part has a workspace of its own.
                        work: unsafe { scratch.add(part * per_thread(self.queries, self.width)) },
                    };
                    // SAFETY: offsets come from the shapes of the operands; a task writes the results of its own queries.
                    unsafe { self.kind.run(task) };
                }
            }
        });
    }
}

/// The result of some blocks of queries of a head.
pub(super) struct Forward<'a, E> {
    pub heads: &'a Heads<E>,
    pub row: usize,
    pub head: usize,
    pub blocks: Range<usize>,
    pub out: Ptr<E>,
    pub divisors: Option<Ptr<f32>>,
    pub work: Ptr<f32>,
}

/// A block of queries, and what it has so far.
#[derive(Clone, Copy)]
struct Queries {
    block: Block,
    /// Columns `[width, BLOCK]`, times the scale.
    columns: Ptr<f32>,
    /// Sums of the result `[BLOCK, padded(width)]`.
    sums: Ptr<f32>,
    running: [Running; VECTORS],
}

/// The blocks are the head's; nobody else uses their results, or the workspace of `per_thread`.
impl<E: Element> Kernel for Forward<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let h = self.heads;
        let (width, wide) = (h.width, padded(h.width));
        // SAFETY: the caller's, and the shapes of the operands.
        unsafe {
            let (segments, slope) = (h.segments_of(self.row), h.slope(self.head));
            let (key, value) = (self.work, self.work.add(wide * BLOCK));
            let scores = self.work.add(2 * wide * BLOCK);
            let own = scores.add(BLOCK * BLOCK);
            let none = Block { from: 0, count: 0 };
            let empty = Queries { block: none, columns: own, sums: own, running: Default::default() };
            let mut all = [empty; TOGETHER];
            let all = &mut all[..self.blocks.len()];
            let (mut begin, mut end) = (usize::MAX, 0);
            for (i, (queries, number)) in all.iter_mut().zip(self.blocks.clone()).enumerate() {
                let block = Block::nth(number, h.queries);
                let columns = own.add(i * (width + wide) * BLOCK);
                let sums = columns.add(width * BLOCK);
                *queries = Queries { block, columns, sums, ..empty };
                self.queries(h.q, block).turn::<L>(h.scale, columns);
                sums.slice_mut(0, block.count * wide).fill(0.0);
                let blocks = h.key_blocks(block);
                (begin, end) = (begin.min(blocks.start), end.max(blocks.end));
            }
            for number in begin..end {
                let keys = Block::nth(number, h.columns);
                let mut finite = None;
                for queries in all.iter_mut() {
                    let Some(sight) = h.sight(segments, queries.block, keys, Side::Queries) else { continue };
                    let finite = *finite.get_or_insert_with(|| {
                        self.keys(h.k, keys).copy::<L>(key);
                        self.keys(h.v, keys).copy::<L>(value)
                    });
                    let Queries { block, columns, sums, .. } = *queries;
                    for part in sight.bands(keys.count, block.count).map(|part| part.padded()) {
                        L::enter(Product {
                            size: (part.rows, part.lanes, width),
                            out: (scores.add(part.at()), BLOCK),
                            add: false,
                            a: (key.add(part.row * wide), wide, 1),
                            b: (columns.add(part.lane), BLOCK),
                        });
                    }
                    let distance = (h.first + block.from) as isize - keys.from as isize;
                    for (vector, running) in queries.running.iter_mut().enumerate() {
                        if sight.rows[vector].0 < sight.rows[vector].1 {
                            let lane = Lane { sight: &sight, vector, slope, distance };
                            let factors = soften::<L>(&lane, scores, running);
                            for (i, &factor) in (vector * LANES..block.count).zip(&factors) {
                                if factor != 1.0 {
                                    sums.slice_mut(i * wide, wide).iter_mut().for_each(|x| *x *= factor);
                                }
                            }
                        }
                    }
                    if sight.is_masked() && !finite {
                        for (i, s) in h.pairs(segments, block, keys) {
                            let p = *scores.add(s * BLOCK + i).0;
                            add(sums.slice_mut(i * wide, wide), p, value.slice(s * wide, wide));
                        }
                        continue;
                    }
                    for part in sight.parts() {
                        L::enter(Product {
                            size: (part.lanes.min(block.count - part.lane), wide, part.rows),
                            out: (sums.add(part.lane * wide), wide),
                            add: true,
                            a: (scores.add(part.at()), 1, BLOCK),
                            b: (value.add(part.row * wide), wide),
                        });
                    }
                }
            }
            for queries in all.iter() {
                self.finish::<L>(segments, queries);
            }
        }
    }
}

impl<E: Element> Forward<'_, E> {
    /// The rows of a block of the head's queries, or of its results.
    ///
    /// # Safety
    /// They are there.
    unsafe fn queries(&self, of: Ptr<E>, block: Block) -> Rows<E> {
        let h = self.heads;
        // SAFETY: the caller's.
        let at = unsafe { of.add(h.q_at(self.row, self.head, block.from)) };
        Rows { at, stride: h.q_stride(), count: block.count, width: h.width }
    }

    /// The rows of a block of the head's keys, or of their values.
    ///
    /// # Safety
    /// They are there.
    unsafe fn keys(&self, of: Ptr<E>, block: Block) -> Rows<E> {
        let h = self.heads;
        // SAFETY: the caller's.
        let at = unsafe { of.add(h.k_at(self.row, self.head, block.from)) };
        Rows { at, stride: h.k_stride(), count: block.count, width: h.width }
    }

    /// Divides the sums of a block, and writes them and the logs of the divisors.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&self, segments: &[i32], queries: &Queries) {
        let (h, block) = (self.heads, queries.block);
        let (mut factors, mut logs) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
        let mut odd = false;
        for i in 0..block.count {
            let running = &queries.running[i / LANES];
            let (most, sum) = (running.most[i % LANES], running.sum[i % LANES]);
            factors[i] = 1.0 / sum;
            logs[i] = most + sum.ln();
            odd |= sum == 0.0;
        }
        // SAFETY: the caller's, and the shapes of the operands.
        unsafe {
            if odd {
                // Nothing is seen, or what is seen has no softmax.
                for i in (0..block.count).filter(|&i| queries.running[i / LANES].sum[i % LANES] == 0.0) {
                    let t = h.first + block.from + i;
                    let seen = (0..h.columns).any(|s| h.sees(segments, t, s));
                    logs[i] = if seen { f32::NAN } else { 0.0 };
                    factors[i] = 1.0;
                    queries.sums.slice_mut(i * padded(h.width), padded(h.width)).fill(logs[i]);
                }
            }
            self.queries(self.out, block).write::<L>(queries.sums, |i| factors[i]);
            if let Some(divisors) = self.divisors {
                let at = (self.row * h.heads + self.head) * h.queries + block.from;
                divisors.slice_mut(at, block.count).copy_from_slice(&logs[..block.count]);
            }
        }
    }
}
